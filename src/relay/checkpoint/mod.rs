//! The checkpoint row, its statements (`sql/query/checkpoint_*`), and the `Store` that writes it.
//! It lives in the source database, so that it rolls back together with the data; it is written
//! before the source is advanced. Whether the relay may start from it is decided in
//! `relay/check/position`.
//!
//! To keep another value in the row: a migration (`sql`, `pg/migrate`), `Checkpoint` here, and the
//! statements that read it and take it over. What must be durable *with* a position is a `rider`.

pub mod own;
pub mod progress;
pub mod rider;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::try_join;
use tokio::time::timeout;
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, GenericClient, Row as SqlRow, Statement};

use crate::error::{Error, Kind, Result};
use crate::pg::sqlstate::{INVALID_SCHEMA_NAME, UNDEFINED_TABLE, postgres_error};
use crate::position::{Lsn, Mark, ORDINAL_END, Position};
use crate::relay::check::lost::Agreed;
use crate::relay::check::position::Failover;
use crate::relay::checkpoint::own::OwnCheckpoint;
use crate::relay::checkpoint::rider::{Rider, STATEMENTS};
use crate::relay::parking::row::ParkedKey;
use crate::relay::parking::store::{self as parked_store, Found};
use crate::source::SourceKind;
use crate::source::transaction::Former;
use crate::verdict::Verdict;

/// How long storing a checkpoint may take; longer than `statement_timeout`, for a backend that is
/// frozen. Without a checkpoint the duplicates of the next fault have no bound.
const STORE_LIMIT: Duration = Duration::from_secs(45);
/// How long a look at parked rows may take: no checkpoint is stored meanwhile.
const LOOK_LIMIT: Duration = Duration::from_secs(15);

/// The row that a relay starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Last settled event.
    pub position: Position,
    /// Highest LSN ever authorised for feedback.
    pub flush_lsn: Lsn,
    /// Number of the session that may write; the latest one.
    pub session_no: i64,
    /// Slot.
    pub slot: String,
    /// System identifier of the cluster.
    pub system_id: u64,
    /// Timeline.
    pub timeline: u32,
    /// Publication.
    pub publication: String,
    /// Its oid; a re-created publication has another one.
    pub publication_oid: u32,
}

/// What `init` writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewCheckpoint {
    /// Relay name.
    pub name: String,
    /// Slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// Its oid.
    pub publication_oid: u32,
    /// The slot's consistent point: everything committed after it is streamed.
    pub consistent_point: Lsn,
    /// System identifier of the cluster.
    pub system_id: u64,
    /// Timeline.
    pub timeline: u32,
}

/// Writes the first row. Returns false when there is one already; it is left as it is.
///
/// # Errors
/// The server's.
pub async fn create(client: &Client, row: &NewCheckpoint) -> Result<bool> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_create.sql");
    let written = client
        .execute(
            SQL,
            &[
                &row.name,
                &to_sql(row.consistent_point.0),
                &row.slot,
                &row.system_id.to_string(),
                &i64::from(row.timeline),
                &row.publication,
                &row.publication_oid,
            ],
        )
        .await
        .map_err(postgres_error)?;
    Ok(written == 1)
}

/// Reads the row of a relay.
///
/// # Errors
/// The server's; a missing table is a [`Kind::Verdict`].
pub async fn read(client: &impl GenericClient, name: &str) -> Result<Option<Checkpoint>> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_read.sql");
    let row = client.query_opt(SQL, &[&name]).await.map_err(missing_schema)?;
    row.as_ref().map(from_sql).transpose()
}

/// Takes the row over: from now on only this session may write it.
///
/// # Errors
/// [`Kind::Verdict`] when there is no row.
pub async fn take_session(client: &Client, name: &str, publication_oid: u32) -> Result<Checkpoint> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_take_session.sql");
    let row = client.query_opt(SQL, &[&name, &publication_oid]).await.map_err(missing_schema)?;
    row.as_ref().map(from_sql).transpose()?.ok_or_else(|| no_row(name))
}

/// What to say when a relay has no checkpoint row.
pub fn no_row(name: &str) -> Error {
    let text = format!("there is no checkpoint row for relay {name:?} in watership.checkpoint");
    Error::named(Verdict::CheckpointMissing, text)
        .hint("run `watership init` first; it creates what is missing and changes nothing else")
}

/// What to say when another session has the row.
pub fn taken_over(name: &str) -> Error {
    Error::new(Kind::Busy, format!("another relay has taken over the checkpoint of {name:?}"))
        .hint("two relays with one name: this one is on standby")
}

/// What the server says, as a verdict where a table of the schema is missing.
pub fn missing_schema(error: tokio_postgres::Error) -> Error {
    let error = postgres_error(error);
    if !matches!(error.sqlstate(), Some(UNDEFINED_TABLE | INVALID_SCHEMA_NAME)) {
        return error;
    }
    error
        .as_verdict(Verdict::SchemaUnknown)
        .hint("run `watership init` first: the schema watership is missing or older")
}

fn from_sql(row: &SqlRow) -> Result<Checkpoint> {
    let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
    let int = |i: usize| row.try_get::<_, i64>(i).map_err(postgres_error);
    let wrong =
        |what: &str| Error::protocol(format!("watership.checkpoint.{what} is out of range"));
    let number = |i: usize, what: &str| u64::try_from(int(i)?).map_err(|_| wrong(what));
    let kind = text(6)?;
    if !SourceKind::ALL.iter().any(|known| known.name() == kind) {
        let text = format!("the checkpoint is of kind {kind:?}, which this version does not read");
        return Err(Error::refused(text)
            .hint("use the version that wrote it, or give the relay another name and run init"));
    }
    Ok(Checkpoint {
        position: Position {
            epoch: u32::try_from(int(0)?).map_err(|_| wrong("epoch"))?,
            mark: Mark(number(1, "mark")?),
            ordinal: Some(number(2, "ordinal")?)
                .filter(|ordinal| *ordinal < ORDINAL_END)
                .ok_or_else(|| wrong("ordinal"))?,
            sub: u32::try_from(int(3)?).map_err(|_| wrong("sub"))?,
        },
        flush_lsn: Lsn(number(4, "flush_mark")?),
        session_no: int(5)?,
        slot: text(7)?,
        system_id: text(8)?.parse().map_err(|_| wrong("system_identifier"))?,
        timeline: u32::try_from(int(9)?).map_err(|_| wrong("timeline"))?,
        publication: text(10)?,
        publication_oid: row.try_get(11).map_err(postgres_error)?,
    })
}

/// A number as the type bigint, which has no unsigned form. No WAL is 2^63 bytes long, and no
/// transaction has 2^63 changes.
pub fn to_sql(number: u64) -> i64 {
    i64::try_from(number).expect("positions are below 2^63")
}

/// The row continues at a promoted server. Returns the new epoch; absent when another session took
/// over meanwhile.
///
/// # Errors
/// The server's.
pub async fn follow(
    client: &Client,
    name: &str,
    row: &Checkpoint,
    to: &Failover,
) -> Result<Option<u32>> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_follow.sql");
    let row = client
        .query_opt(
            SQL,
            &[
                &name,
                &row.session_no,
                &i64::from(to.timeline),
                &to_sql(to.mark.0),
                &to_sql(to.ordinal),
                &i64::from(to.sub),
                &to_sql(to.flush_lsn.0),
            ],
        )
        .await
        .map_err(postgres_error)?;
    row.map(|row| epoch(&row)).transpose()
}

fn epoch(row: &SqlRow) -> Result<u32> {
    let epoch: i64 = row.try_get(0).map_err(postgres_error)?;
    u32::try_from(epoch).map_err(|_| Error::protocol("watership.checkpoint.epoch is out of range"))
}

/// What the relay last agreed to of its publication; absent before the first time.
///
/// # Errors
/// The server's; a missing table is a [`Kind::Verdict`].
pub async fn read_agreed(client: &impl GenericClient, name: &str) -> Result<Option<Agreed>> {
    const SQL: &str = include_str!("../../../sql/query/publication_seen_read.sql");
    let Some(row) = client.query_opt(SQL, &[&name]).await.map_err(missing_schema)? else {
        return Ok(None);
    };
    let facts: serde_json::Value = row.try_get(0).map_err(postgres_error)?;
    let wrong = |e| Error::protocol("watership.publication_seen.facts").caused_by(e);
    serde_json::from_value(facts).map(Some).map_err(wrong)
}

/// From now on the publication is expected to be like this.
///
/// # Errors
/// The server's.
pub async fn agree(client: &impl GenericClient, name: &str, facts: &Agreed) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/publication_seen_store.sql");
    let facts = serde_json::to_value(facts).expect("plain data is JSON");
    client.execute(SQL, &[&name, &facts]).await.map(drop).map_err(postgres_error)
}

/// A range of the WAL that the relay itself went past, because that was accepted beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// What it would have been.
    pub verdict: Verdict,
    /// From this LSN,
    pub from: Lsn,
    /// up to this one.
    pub to: Lsn,
}

/// Records it beside the gaps that a person accepted.
///
/// # Errors
/// The server's.
pub async fn record_gap(
    client: &Client,
    name: &str,
    row: &Checkpoint,
    gap: &Gap,
    reason: &str,
) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/resync_record.sql");
    let verdicts = [gap.verdict.name()];
    let [from, to, at] = [gap.from, gap.to, row.flush_lsn].map(|lsn| PgLsn::from(lsn.0));
    let (timeline, epoch) = (i64::from(row.timeline), i64::from(row.position.epoch));
    let values: [&(dyn ToSql + Sync); 12] = [
        &name,
        &"the relay",
        &reason,
        &&verdicts[..],
        &from,
        &to,
        &"checkpoint",
        &at,
        &row.slot,
        &false,
        &timeline,
        &epoch,
    ];
    client.query_one(SQL, &values).await.map(drop).map_err(postgres_error)
}

/// Where progress is kept, and the parked rows with it. Production: Postgres; and memory, for the
/// simulation.
///
/// Nothing is borrowed from the store while one of its futures runs: the loop keeps the future and
/// continues with everything else.
pub trait Store {
    /// Writes a checkpoint and what goes with it, in one transaction; durable when the future
    /// resolves, with about where in the WAL the write ended.
    ///
    /// # Errors
    /// [`Kind::Busy`] when another session has taken over; otherwise the server's.
    fn store(
        &self,
        position: Position,
        flush: Mark,
        riders: Vec<Rider>,
    ) -> impl Future<Output = Result<Lsn>> + 'static;

    /// Looks whether people changed parked rows; `expected` are the counts without such a change.
    ///
    /// # Errors
    /// The server's.
    fn look(&self, expected: (usize, usize)) -> impl Future<Output = Result<Found>> + 'static;

    /// Reads the contents of parked rows.
    ///
    /// # Errors
    /// The server's.
    fn read(&self, keys: Vec<ParkedKey>) -> impl Future<Output = Result<Found>> + 'static;
}

/// A look at the parked rows under way. Boxed, as is [`Storing`], because it is kept in a field
/// while the loop turns, and what an `impl Future` of a trait hides has no name to be declared by.
pub type Looking = Pin<Box<dyn Future<Output = Result<Found>>>>;

/// A write under way; resolves with about where in the WAL it ended.
pub type Storing = Pin<Box<dyn Future<Output = Result<Lsn>>>>;

/// Writes the row of one session. A clone is another handle to the same session.
#[derive(Clone)]
pub struct PostgresStore {
    client: Arc<Client>,
    statement: Statement,
    /// In the order of [`STATEMENTS`].
    riders: Arc<[Statement]>,
    name: Arc<str>,
    session_no: i64,
    own: Arc<OwnCheckpoint>,
}

impl PostgresStore {
    /// For the session that took the row; `own` is told what is stored.
    ///
    /// # Errors
    /// The server's.
    pub async fn new(
        client: Arc<Client>,
        name: &str,
        session_no: i64,
        own: Arc<OwnCheckpoint>,
    ) -> Result<Self> {
        const SQL: &str = include_str!("../../../sql/query/checkpoint_store.sql");
        // The row must survive a crash of this server; whether a standby has it does not matter.
        let statement = client.prepare(SQL).await.map_err(postgres_error)?;
        let mut riders = Vec::new();
        for sql in STATEMENTS {
            riders.push(client.prepare(sql).await.map_err(missing_schema)?);
        }
        Ok(Self { client, statement, riders: riders.into(), name: name.into(), session_no, own })
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
            match &riders[..] {
                [] => self.checkpoint(position, flush).await,
                riders => self.with_riders(position, flush, riders).await,
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
        let row = self.client.query_opt(&self.statement, &values).await;
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
            frame("BEGIN"),
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
        let done = self.client.execute(&self.riders[rider.statement()], &values).await;
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

/// How the captured tables were described at the checkpoint, by OID.
///
/// # Errors
/// The server's; a missing table is a [`Kind::Verdict`].
pub async fn described(client: &Client, name: &str) -> Result<HashMap<u32, Former>> {
    const SQL: &str = include_str!("../../../sql/query/described_read.sql");
    let rows = client.query(SQL, &[&name]).await.map_err(missing_schema)?;
    let former = |row: &SqlRow| {
        let version: i64 = row.try_get(1).map_err(postgres_error)?;
        let key = row.try_get(2).map_err(postgres_error)?;
        let relation = row.try_get(0).map_err(postgres_error)?;
        Ok((relation, Former { version: version as u64, key }))
    };
    rows.iter().map(former).collect()
}
