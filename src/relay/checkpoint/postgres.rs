//! The `Store` of production: the checkpoint's row and what rides on it, in Postgres.
//!
//! Invariant: one transaction writes all of it, and only while the row is this session's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::try_join;
use tokio::time::timeout;
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, Row as SqlRow, Statement};

use super::{Store, missing_schema, taken_over, to_sql};
use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::{Lsn, Mark, Position};
use crate::relay::checkpoint::own::OwnCheckpoint;
use crate::relay::checkpoint::rider::{Rider, STATEMENTS};
use crate::relay::parking::row::ParkedKey;
use crate::relay::parking::store::{self as parked_store, Found};
use crate::verdict::Verdict;

/// How long storing a checkpoint may take; longer than `statement_timeout`, for a backend that is
/// frozen. Without a checkpoint the duplicates of the next fault have no bound.
const STORE_LIMIT: Duration = Duration::from_secs(45);
/// How long a look at parked rows may take: no checkpoint is stored meanwhile.
const LOOK_LIMIT: Duration = Duration::from_secs(15);

/// Writes the row of one session. A clone is another handle to the same session.
#[derive(Clone)]
pub struct PostgresStore {
    client: Arc<Client>,
    statements: Statements,
    name: Arc<str>,
    session_no: i64,
    own: Arc<OwnCheckpoint>,
}

const STORE: &str = include_str!("../../../sql/query/checkpoint_store.sql");

/// How the statements reach the server. The row must survive a crash of it; whether a standby has
/// the row does not matter.
#[derive(Clone)]
enum Statements {
    /// Prepared, on a connection of our own with `synchronous_commit = local`.
    Prepared {
        checkpoint: Statement,
        /// In the order of [`STATEMENTS`].
        riders: Arc<[Statement]>,
    },
    /// Through a pooler, where only a transaction has settings.
    Unnamed,
}

impl Statements {
    fn begin(&self) -> &'static str {
        match self {
            Statements::Prepared { .. } => "BEGIN",
            Statements::Unnamed => {
                "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
                 SET LOCAL synchronous_commit = local"
            }
        }
    }
}

impl PostgresStore {
    /// For the session that took the row; `own` is told what is stored. `client` is a connection
    /// to the server itself.
    ///
    /// # Errors
    /// The server's.
    pub async fn new(
        client: Arc<Client>,
        name: &str,
        session_no: i64,
        own: Arc<OwnCheckpoint>,
    ) -> Result<Self> {
        let checkpoint = client.prepare(STORE).await.map_err(postgres_error)?;
        let mut riders = Vec::new();
        for sql in STATEMENTS {
            riders.push(client.prepare(sql).await.map_err(missing_schema)?);
        }
        let statements = Statements::Prepared { checkpoint, riders: riders.into() };
        Ok(Self { client, statements, name: name.into(), session_no, own })
    }

    /// The same through a pooler.
    pub fn pooled(
        client: Arc<Client>,
        name: &str,
        session_no: i64,
        own: Arc<OwnCheckpoint>,
    ) -> Self {
        Self { client, statements: Statements::Unnamed, name: name.into(), session_no, own }
    }
}

impl Store for PostgresStore {
    fn store(
        &self,
        position: Position,
        flush: Mark,
        riders: Vec<Rider>,
    ) -> impl Future<Output = Result<Lsn>> + 'static {
        let store = self.clone();
        async move { store.write(position, flush, riders).await }
    }

    fn look(&self, expected: (usize, usize)) -> impl Future<Output = Result<Found>> + 'static {
        let store = self.clone();
        async move { in_time(parked_store::look(&store.client, &store.name, expected)).await }
    }

    fn read(&self, keys: Vec<ParkedKey>) -> impl Future<Output = Result<Found>> + 'static {
        let store = self.clone();
        async move { in_time(parked_store::rows(&store.client, &store.name, &keys)).await }
    }
}

async fn in_time(look: impl Future<Output = Result<Found>>) -> Result<Found> {
    timeout(LOOK_LIMIT, look).await.unwrap_or_else(|_| {
        let text = format!("Postgres did not read watership.parked within {LOOK_LIMIT:?}");
        Err(Error::unreachable(text))
    })
}

impl PostgresStore {
    async fn write(&self, position: Position, flush: Mark, riders: Vec<Rider>) -> Result<Lsn> {
        let written = async {
            match (&riders[..], &self.statements) {
                ([], Statements::Prepared { .. }) => self.checkpoint(position, flush).await,
                (riders, _) => self.with_riders(position, flush, riders).await,
            }
        };
        let written = timeout(STORE_LIMIT, written).await.map_err(|_| {
            let text = format!("Postgres did not store the checkpoint within {STORE_LIMIT:?}");
            Error::unreachable(text)
        })?;
        match written.map_err(Failed::told)? {
            Some(row) => {
                self.own.stored(position, flush.lsn());
                let end: PgLsn = row.try_get(0).map_err(postgres_error)?;
                Ok(Lsn(end.into()))
            }
            None => Err(taken_over(&self.name)),
        }
    }

    async fn checkpoint(&self, position: Position, flush: Mark) -> SqlResult<Option<SqlRow>> {
        let (name, flush) = (&*self.name, to_sql(flush.0));
        let [epoch, mark, ordinal, sub] = numbers(position);
        let values: [&(dyn ToSql + Sync); 7] =
            [&name, &self.session_no, &epoch, &mark, &ordinal, &sub, &flush];
        let row = match &self.statements {
            Statements::Prepared { checkpoint, .. } => {
                self.client.query_opt(checkpoint, &values).await
            }
            Statements::Unnamed => unnamed::query_opt(&*self.client, STORE, &values).await,
        };
        row.map_err(|error| Failed { error, parking: false })
    }

    /// All of it in one transaction, sent at once: polled in this order, and the server works in
    /// the order of arrival. A statement that fails makes COMMIT a rollback.
    async fn with_riders(
        &self,
        position: Position,
        flush: Mark,
        riders: &[Rider],
    ) -> SqlResult<Option<SqlRow>> {
        let riders = riders.iter().map(|rider| self.ride(position, rider));
        let frame = async |sql| {
            let done = self.client.batch_execute(sql).await;
            done.map_err(|error| Failed { error, parking: false })
        };
        let (_, row, _, _) = try_join!(
            frame(self.statements.begin()),
            self.checkpoint(position, flush),
            try_join_all(riders),
            frame("COMMIT"),
        )?;
        Ok(row)
    }

    async fn ride(&self, position: Position, rider: &Rider) -> SqlResult<()> {
        let (name, json) = (&*self.name, rider.to_json());
        let [epoch, mark, ordinal, sub] = numbers(position);
        let values: [&(dyn ToSql + Sync); 7] =
            [&name, &self.session_no, &epoch, &mark, &ordinal, &sub, &json];
        let number = rider.statement();
        let done = match &self.statements {
            Statements::Prepared { riders, .. } => {
                self.client.execute(&riders[number], &values).await
            }
            Statements::Unnamed => {
                unnamed::execute(&*self.client, STATEMENTS[number], &values).await
            }
        };
        let parking = matches!(rider, Rider::Parked(_) | Rider::Unparked(_));
        done.map(drop).map_err(|error| Failed { error, parking })
    }
}

type SqlResult<T> = std::result::Result<T, Failed>;

/// Which statement of a checkpoint failed.
struct Failed {
    error: tokio_postgres::Error,
    /// It was about `watership.parked`.
    parking: bool,
}

impl Failed {
    /// A row that Postgres does not take is refused again however often it is tried, and what was
    /// published since the last checkpoint is published again each time. So it is a verdict, unless
    /// time may help: a lack of resources, a lock, a server that shuts down.
    fn told(self) -> Error {
        let error = postgres_error(self.error);
        let refused = |code: &str| PARKING_REFUSED.iter().any(|class| code.starts_with(class));
        if !self.parking || !error.sqlstate().is_some_and(refused) {
            return error;
        }
        error
            .context("Postgres does not let the relay write to watership.parked")
            .as_verdict(Verdict::ParkingRefused)
            .hint(
                "give the role of source.url SELECT, INSERT, UPDATE and DELETE on \
                 watership.parked without row-level security, triggers or constraints of your \
                 own, then start the relay again; nothing is lost",
            )
    }
}

/// Classes of SQLSTATE that say that the statement itself is refused: unsupported feature, raised
/// by a trigger, wrong value, constraint, access rule, check option, program limit.
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const PARKING_REFUSED: [&str; 7] = ["0A", "P0", "22", "23", "42", "44", "54"];

fn numbers(position: Position) -> [i64; 4] {
    let Position { epoch, mark, ordinal, sub } = position;
    [i64::from(epoch), to_sql(mark.0), to_sql(ordinal), i64::from(sub)]
}
