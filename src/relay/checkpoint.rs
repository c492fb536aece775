//! The checkpoint row, and the question whether the relay may start from it.
//!
//! Invariant: never start behind a gap. The row lives in the source database, so that it rolls
//! back together with the data; it is written before the source is advanced, so the slot can never
//! rightly be ahead of it. A slot that is ahead was moved or re-created by somebody else.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, Row as SqlRow, Statement};

use crate::error::{Error, Kind, Result};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus};
use crate::pg::sqlstate::postgres_error;
use crate::position::{Lsn, Position};

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
pub async fn read(client: &Client, name: &str) -> Result<Option<Row>> {
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
    Error::verdict(format!("there is no checkpoint row for relay {name:?} in watership.checkpoint"))
        .hint("run `watership init` first; it creates what is missing and changes nothing else")
}

fn missing_schema(error: tokio_postgres::Error) -> Error {
    // 42P01 undefined_table, 3F000 invalid_schema_name: init was never run.
    let code = error.code().map(|c| c.code().to_owned());
    let error = postgres_error(error);
    match code.as_deref() {
        Some("42P01" | "3F000") => error
            .with_kind(Kind::Verdict)
            .hint("run `watership init` first: the schema watership is missing in this database"),
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

/// Compares the row with the server and the slot.
///
/// # Errors
/// A [`Kind::Verdict`] that names what does not fit and what to do. The order is that of
/// certainty: another cluster explains everything that would come after it.
pub fn verify(row: &Row, server: &ServerFacts, slot: Option<&SlotState>) -> Result<()> {
    let name = &row.slot;
    if server.wal_level != "logical" {
        let text =
            format!("wal_level is {:?}, logical replication needs \"logical\"", server.wal_level);
        return Err(Error::verdict(text)
            .hint("ALTER SYSTEM SET wal_level = 'logical', then restart Postgres"));
    }
    if server.system_identifier != row.system_id {
        let (now, then) = (server.system_identifier, row.system_id);
        let text = format!("this is another cluster: its system identifier is {now}, not {then}");
        return Err(Error::verdict(text).hint("check source.url; a restored copy needs a new init"));
    }
    if server.timeline != row.timeline {
        let (now, then) = (server.timeline, row.timeline);
        let text = format!("the server is on timeline {now}, the checkpoint on {then}: a failover");
        return Err(Error::verdict(text)
            .hint("positions of two timelines cannot be compared; a person has to decide"));
    }
    if row.flush_lsn > server.wal_lsn {
        let (stored, now) = (row.flush_lsn, server.wal_lsn);
        let text = format!("the checkpoint ({stored}) is ahead of the server's WAL ({now})");
        return Err(Error::verdict(text).hint("the server was restored to an earlier time"));
    }
    let Some(slot) = slot else {
        return Err(Error::verdict(format!("replication slot {name:?} does not exist")).hint(
            "nobody may create it silently: events since the last checkpoint would be missing. \
             On a new database run `watership init`",
        ));
    };
    verify_slot(row, server, slot)
}

fn verify_slot(row: &Row, server: &ServerFacts, slot: &SlotState) -> Result<()> {
    let name = &row.slot;
    if slot.plugin.as_deref() != Some("pgoutput")
        || slot.database.as_deref() != Some(&*server.database)
        || slot.temporary
        || slot.two_phase
    {
        let text = format!(
            "slot {name:?} is of the wrong kind: plugin {:?}, database {:?}, temporary {}, \
             two-phase {}; needed is a persistent pgoutput slot of database {:?}",
            slot.plugin, slot.database, slot.temporary, slot.two_phase, server.database
        );
        return Err(Error::verdict(text).hint("name another slot in source.slot"));
    }
    if slot.wal_status == Some(WalStatus::Lost) {
        let reason = slot.invalidation_reason.as_deref().unwrap_or("max_slot_wal_keep_size");
        let text = format!("slot {name:?} is lost ({reason}): WAL that it needs was removed");
        return Err(Error::verdict(text).hint(format!(
            "events after {} are missing in the WAL; a person has to decide",
            row.flush_lsn
        )));
    }
    match slot.confirmed_flush_lsn {
        Some(confirmed) if confirmed > row.flush_lsn => {
            let stored = row.flush_lsn;
            let text = format!(
                "slot {name:?} is at {confirmed}, ahead of the checkpoint at {stored}: it was \
                 re-created or advanced by somebody else"
            );
            Err(Error::verdict(text).hint(format!(
                "events committed between {stored} and {confirmed} were not published by this \
                 relay; a person has to decide"
            )))
        }
        Some(_) | None => Ok(()),
    }
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
}

/// Writes the row of one session.
pub struct PostgresStore {
    client: Arc<Client>,
    statement: Statement,
    name: String,
    session_no: i64,
}

/// A write under way; resolves with about where in the WAL it ended.
pub type Storing = Pin<Box<dyn Future<Output = Result<Lsn>>>>;

impl PostgresStore {
    /// For the session that took the row.
    ///
    /// # Errors
    /// The server's.
    pub async fn new(client: Arc<Client>, name: &str, session_no: i64) -> Result<Self> {
        const SQL: &str = include_str!("../../sql/query/checkpoint_store.sql");
        // The row must survive a crash of this server; whether a standby has it does not matter.
        client.batch_execute("SET synchronous_commit = local").await.map_err(postgres_error)?;
        let statement = client.prepare(SQL).await.map_err(postgres_error)?;
        Ok(Self { client, statement, name: name.to_owned(), session_no })
    }
}

impl Store {
    /// Writes a checkpoint; durable when the future resolves.
    pub fn store(&self, position: Position, flush: Lsn) -> Storing {
        match self {
            Store::Memory(store) => {
                let store = store.clone();
                Box::pin(async move {
                    tokio::time::sleep(store.latency / 2).await;
                    store.rows.lock().expect("no holder panics").push((position, flush));
                    tokio::time::sleep(store.latency / 2).await;
                    Ok(flush)
                })
            }
            Store::Postgres(store) => {
                let store = store.clone();
                Box::pin(async move { store.store(position, flush).await })
            }
        }
    }
}

impl PostgresStore {
    async fn store(&self, position: Position, flush: Lsn) -> Result<Lsn> {
        let row = self
            .client
            .query_opt(
                &self.statement,
                &[
                    &self.name,
                    &self.session_no,
                    &i64::from(position.epoch),
                    &PgLsn::from(position.commit_lsn.0),
                    &i64::try_from(position.ordinal).expect("fewer than 2^40 changes"),
                    &PgLsn::from(flush.0),
                ],
            )
            .await
            .map_err(postgres_error)?;
        match row {
            Some(row) => {
                let end: PgLsn = row.try_get(0).map_err(postgres_error)?;
                Ok(Lsn(end.into()))
            }
            None => Err(Error::new(
                Kind::Busy,
                format!("another relay has taken over the checkpoint of {:?}", self.name),
            )
            .hint("two relays with one name: this one stands by")),
        }
    }
}
