//! The checkpoint row. It lives in the source database, so that it rolls back together with the
//! data; it is written before the source is advanced. Whether the relay may start from it is
//! decided in `position_check.rs`.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, GenericClient, Row as SqlRow, Statement};

use crate::error::{Error, Kind, Result};
use crate::pg::publication::Publication;
use crate::pg::sqlstate::postgres_error;
use crate::position::{Lsn, Position};
use crate::relay::own_checkpoint::OwnCheckpoint;
use crate::relay::parked::{Indexed, Key, Row as Parked, RowState, Writes};
use crate::relay::parking::store::{self as parked_store, Found};
use crate::relay::position_check::Failover;
use crate::verdict::Verdict;

/// How long storing a checkpoint may take; longer than `statement_timeout`, for a backend that is
/// frozen. Without a checkpoint the duplicates of the next fault have no bound.
const STORE_LIMIT: Duration = Duration::from_secs(45);

/// The row that a relay starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
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
    const SQL: &str = include_str!("../../sql/query/checkpoint_create.sql");
    let written = client
        .execute(
            SQL,
            &[
                &row.name,
                &PgLsn::from(row.consistent_point.0),
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
pub async fn read(client: &impl GenericClient, name: &str) -> Result<Option<Row>> {
    const SQL: &str = include_str!("../../sql/query/checkpoint_read.sql");
    let row = client.query_opt(SQL, &[&name]).await.map_err(missing_schema)?;
    row.as_ref().map(from_sql).transpose()
}

/// Takes the row over: from now on only this session may write it.
///
/// # Errors
/// [`Kind::Verdict`] when there is no row.
pub async fn take_session(client: &Client, name: &str, publication_oid: u32) -> Result<Row> {
    const SQL: &str = include_str!("../../sql/query/checkpoint_take_session.sql");
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
        .hint("two relays with one name: this one stands by")
}

fn missing_schema(error: tokio_postgres::Error) -> Error {
    // 42P01 undefined_table, 3F000 invalid_schema_name: init was never run.
    let code = error.code().map(|c| c.code().to_owned());
    let error = postgres_error(error);
    match code.as_deref() {
        Some("42P01" | "3F000") => error
            .as_verdict(Verdict::SchemaUnknown)
            .hint("run `watership init` first: the schema watership is missing or older"),
        Some(_) | None => error,
    }
}

fn from_sql(row: &SqlRow) -> Result<Row> {
    let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
    let lsn = |i: usize| row.try_get::<_, PgLsn>(i).map(|l| Lsn(l.into())).map_err(postgres_error);
    let int = |i: usize| row.try_get::<_, i64>(i).map_err(postgres_error);
    let wrong =
        |what: &str| Error::protocol(format!("watership.checkpoint.{what} is out of range"));
    let position = Position {
        epoch: u32::try_from(int(0)?).map_err(|_| wrong("epoch"))?,
        commit_lsn: lsn(1)?,
        ordinal: u64::try_from(int(2)?).map_err(|_| wrong("ordinal"))?,
        sub: 0,
    };
    Ok(Row {
        position,
        flush_lsn: lsn(3)?,
        session_no: int(4)?,
        slot: text(5)?,
        system_id: text(6)?.parse().map_err(|_| wrong("system_identifier"))?,
        timeline: u32::try_from(int(7)?).map_err(|_| wrong("timeline"))?,
        publication: text(8)?,
        publication_oid: row.try_get(9).map_err(postgres_error)?,
    })
}

/// The row goes on at a promoted server. Returns the new epoch; absent when another session took
/// over meanwhile.
///
/// # Errors
/// The server's.
pub async fn follow(client: &Client, name: &str, row: &Row, to: &Failover) -> Result<Option<u32>> {
    const SQL: &str = include_str!("../../sql/query/checkpoint_follow.sql");
    let ordinal = i64::try_from(to.ordinal).expect("fewer than 2^40 changes");
    let row = client
        .query_opt(
            SQL,
            &[
                &name,
                &row.session_no,
                &i64::from(to.timeline),
                &PgLsn::from(to.commit_lsn.0),
                &ordinal,
                &PgLsn::from(to.flush_lsn.0),
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
pub async fn read_agreed(client: &impl GenericClient, name: &str) -> Result<Option<Publication>> {
    const SQL: &str = include_str!("../../sql/query/publication_seen_read.sql");
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
pub async fn agree(client: &impl GenericClient, name: &str, facts: &Publication) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/publication_seen_store.sql");
    let facts = serde_json::to_value(facts).expect("plain data is JSON");
    client.execute(SQL, &[&name, &facts]).await.map(drop).map_err(postgres_error)
}

/// Where progress is kept.
#[derive(Clone)]
pub enum Store {
    /// The row in the source database.
    Postgres(Arc<PostgresStore>),
    /// Memory, for the simulation.
    Memory(Arc<MemoryStore>),
}

/// Every checkpoint that was written, and how long a write takes.
#[derive(Debug, Default)]
pub struct MemoryStore {
    /// The rows, oldest first.
    pub rows: Mutex<Vec<(Position, Lsn)>>,
    /// Half of it passes before the row is there, half after: a crash can fall on either side.
    pub latency: Duration,
    /// The parked rows, of any state.
    pub parked: Mutex<BTreeMap<Key, Parked>>,
}

/// Writes the row of one session.
pub struct PostgresStore {
    client: Arc<Client>,
    statement: Statement,
    with_parked: Statement,
    name: String,
    session_no: i64,
    own: Arc<OwnCheckpoint>,
}

/// A look at the parked rows under way.
pub type Looking = Pin<Box<dyn Future<Output = Result<Found>>>>;

/// A write under way; resolves with about where in the WAL it ended.
pub type Storing = Pin<Box<dyn Future<Output = Result<Lsn>>>>;

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
        const SQL: &str = include_str!("../../sql/query/checkpoint_store.sql");
        // The row must survive a crash of this server; whether a standby has it does not matter.
        let statement = client.prepare(SQL).await.map_err(postgres_error)?;
        const PARKED: &str = include_str!("../../sql/query/checkpoint_store_parked.sql");
        let with_parked = client.prepare(PARKED).await.map_err(missing_schema)?;
        let name = name.to_owned();
        Ok(Self { client, statement, with_parked, name, session_no, own })
    }
}

impl Store {
    /// Writes a checkpoint and what goes with it, in one transaction; durable when the future
    /// resolves.
    pub fn store(&self, position: Position, flush: Lsn, writes: Writes) -> Storing {
        match self {
            Store::Memory(store) => {
                let store = store.clone();
                Box::pin(async move {
                    tokio::time::sleep(store.latency / 2).await;
                    store.write(position, flush, writes);
                    tokio::time::sleep(store.latency / 2).await;
                    Ok(flush)
                })
            }
            Store::Postgres(store) => {
                let store = store.clone();
                Box::pin(async move { store.store(position, flush, writes).await })
            }
        }
    }

    /// Looks whether people changed parked rows; `expected` are the counts without such a change.
    pub fn look(&self, expected: (usize, usize)) -> Looking {
        match self {
            Store::Memory(store) => {
                let store = store.clone();
                Box::pin(async move {
                    tokio::time::sleep(store.latency).await;
                    Ok(Found::Index(store.index()))
                })
            }
            Store::Postgres(store) => {
                let store = store.clone();
                Box::pin(
                    async move { parked_store::look(&store.client, &store.name, expected).await },
                )
            }
        }
    }

    /// Reads the contents of parked rows.
    pub fn read(&self, keys: Vec<Key>) -> Looking {
        match self {
            Store::Memory(store) => {
                let store = store.clone();
                Box::pin(async move {
                    tokio::time::sleep(store.latency).await;
                    Ok(Found::Rows(store.read(&keys)))
                })
            }
            Store::Postgres(store) => {
                let store = store.clone();
                Box::pin(async move { parked_store::rows(&store.client, &store.name, &keys).await })
            }
        }
    }
}

impl MemoryStore {
    fn write(&self, position: Position, flush: Lsn, writes: Writes) {
        self.rows.lock().expect("no holder panics").push((position, flush));
        let mut parked = self.parked.lock().expect("no holder panics");
        for row in writes.rows {
            parked.entry(row.key.clone()).or_insert(row);
        }
        for change in writes.changes {
            let unreleased =
                |row: &&mut Parked| matches!(row.state, RowState::Parked | RowState::Retrying);
            if let Some(row) = parked.get_mut(&change.key).filter(unreleased) {
                row.state = change.state;
            }
        }
    }

    /// The unreleased rows.
    pub fn index(&self) -> Vec<Indexed> {
        let parked = self.parked.lock().expect("no holder panics");
        let unreleased = |row: &&Parked| matches!(row.state, RowState::Parked | RowState::Retrying);
        let indexed = |row: &Parked| Indexed {
            key: row.key.clone(),
            state: row.state,
            why: row.why,
            lanes: row.lanes,
            bytes: row.size(),
            parked_at: 0.0,
        };
        parked.values().filter(unreleased).map(indexed).collect()
    }

    fn read(&self, keys: &[Key]) -> Vec<Parked> {
        let parked = self.parked.lock().expect("no holder panics");
        let row = |key| parked.get(key).filter(|row| row.state == RowState::Retrying).cloned();
        keys.iter().filter_map(row).collect()
    }
}

impl PostgresStore {
    async fn store(&self, position: Position, flush: Lsn, writes: Writes) -> Result<Lsn> {
        let epoch = i64::from(position.epoch);
        let commit_lsn = PgLsn::from(position.commit_lsn.0);
        let ordinal = i64::try_from(position.ordinal).expect("fewer than 2^40 changes");
        let flush_lsn = PgLsn::from(flush.0);
        let (rows, changes);
        let mut statement = &self.statement;
        let mut values: Vec<&(dyn ToSql + Sync)> =
            vec![&self.name, &self.session_no, &epoch, &commit_lsn, &ordinal, &flush_lsn];
        if !writes.is_empty() {
            (rows, changes) = writes.to_json();
            statement = &self.with_parked;
            values.extend([&rows as &(dyn ToSql + Sync), &changes]);
        }
        let stored = timeout(STORE_LIMIT, self.client.query_opt(statement, &values)).await;
        let stored = stored.map_err(|_| {
            let text = format!("Postgres did not store the checkpoint within {STORE_LIMIT:?}");
            Error::unreachable(text)
        })?;
        match stored.map_err(postgres_error)? {
            Some(row) => {
                self.own.stored(position, flush);
                let end: PgLsn = row.try_get(0).map_err(postgres_error)?;
                Ok(Lsn(end.into()))
            }
            None => Err(taken_over(&self.name)),
        }
    }
}
