//! The checkpoint row, its statements (`sql/query/checkpoint_*`), and the `Store` that writes it.
//! It lives in the source database, so that it rolls back together with the data; it is written
//! before the source is advanced. Whether the relay may start from it is decided in
//! `relay/check/position`.
//!
//! To keep another value in the row: a migration (`sql`, `pg/migrate`), `Checkpoint` here, and the
//! statements that read it and take it over. What must be durable *with* a position is a `rider`.

pub mod own;
mod postgres;
pub mod progress;
pub mod rider;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;

use tokio_postgres::types::{PgLsn, ToSql};
use tokio_postgres::{Client, GenericClient, Row as SqlRow};

use crate::error::{Error, Kind, Result};
use crate::pg::sqlstate::{INVALID_SCHEMA_NAME, UNDEFINED_TABLE, postgres_error};
use crate::pg::unnamed;
use crate::position::{Lsn, Mark, ORDINAL_END, Position};
use crate::relay::check::lost::Agreed;
use crate::relay::check::position::Failover;
use crate::relay::checkpoint::rider::Rider;
use crate::relay::parking::row::ParkedKey;
use crate::relay::parking::store::Found;
use crate::source::SourceKind;
use crate::source::transaction::Former;
use crate::verdict::Verdict;

pub use postgres::PostgresStore;

/// The row that a relay starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// What its marks are.
    pub kind: SourceKind,
    /// Last settled event.
    pub position: Position,
    /// Highest mark ever authorised for feedback: an LSN of the WAL; see [`Checkpoint::flush`].
    pub flush_lsn: Lsn,
    /// Number of the session that may write; the latest one.
    pub session_no: i64,
    /// Slot; empty, as the publication is, of a relay that does not read the WAL.
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

impl Checkpoint {
    /// Everything up to this mark is settled.
    pub fn flush(&self) -> Mark {
        self.flush_lsn.into()
    }
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
    let written = unnamed::execute(
        client,
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
    let row = unnamed::query_opt(client, SQL, &[&name]).await.map_err(missing_schema)?;
    row.as_ref().map(from_sql).transpose()
}

/// Takes the row over: from now on only this session may write it.
///
/// # Errors
/// [`Kind::Verdict`] when there is no row.
pub async fn take_session(
    client: &Client,
    name: &str,
    publication_oid: Option<u32>,
) -> Result<Checkpoint> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_take_session.sql");
    let row = unnamed::query_opt(client, SQL, &[&name, &publication_oid])
        .await
        .map_err(missing_schema)?;
    row.as_ref().map(from_sql).transpose()?.ok_or_else(|| no_row(name))
}

/// What to say when a relay has no checkpoint row.
pub fn no_row(name: &str) -> Error {
    let text = format!("there is no checkpoint row for relay {name:?} in watership.checkpoint");
    Error::named(Verdict::CheckpointMissing, text)
        .hint("run `watership init` first; it creates what is missing and changes nothing else")
}

/// What to say when the row belongs to a relay that reads from something else.
///
/// # Errors
/// [`Kind::Refused`], with what to do.
pub fn is_of(row: &Checkpoint, name: &str, kind: SourceKind) -> Result<()> {
    if row.kind == kind {
        return Ok(());
    }
    let (stored, asked) = (row.kind.name(), kind.name());
    let text = format!(
        "the checkpoint of relay {name:?} is that of a relay with source.mode = {stored:?}, not \
         {asked:?}"
    );
    Err(Error::refused(text).hint(
        "set source.mode back, or give the relay another name and run `watership init`: it then \
         starts from there, not from where the other one is",
    ))
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
    let or_none = |i: usize| row.try_get::<_, Option<String>>(i).map_err(postgres_error);
    let kind = text(6)?;
    let Some(kind) = SourceKind::ALL.into_iter().find(|known| known.name() == kind) else {
        let text = format!("the checkpoint is of kind {kind:?}, which this version does not read");
        return Err(Error::refused(text)
            .hint("use the version that wrote it, or give the relay another name and run init"));
    };
    Ok(Checkpoint {
        kind,
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
        slot: or_none(7)?.unwrap_or_default(),
        system_id: text(8)?.parse().map_err(|_| wrong("system_identifier"))?,
        timeline: u32::try_from(int(9)?).map_err(|_| wrong("timeline"))?,
        publication: or_none(10)?.unwrap_or_default(),
        publication_oid: row
            .try_get::<_, Option<u32>>(11)
            .map_err(postgres_error)?
            .unwrap_or_default(),
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
    let row = unnamed::query_opt(
        client,
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
    let Some(row) = unnamed::query_opt(client, SQL, &[&name]).await.map_err(missing_schema)? else {
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
    unnamed::execute(client, SQL, &[&name, &facts]).await.map(drop).map_err(postgres_error)
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
    unnamed::query_one(client, SQL, &values).await.map(drop).map_err(postgres_error)
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

    /// Checks whether people changed parked rows; `expected` are the counts without such a change.
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

/// How the captured tables were described at the checkpoint, by OID.
///
/// # Errors
/// The server's; a missing table is a [`Kind::Verdict`].
pub async fn described(client: &Client, name: &str) -> Result<HashMap<u32, Former>> {
    const SQL: &str = include_str!("../../../sql/query/described_read.sql");
    let rows = unnamed::query(client, SQL, &[&name]).await.map_err(missing_schema)?;
    let former = |row: &SqlRow| {
        let version: i64 = row.try_get(1).map_err(postgres_error)?;
        let key = row.try_get(2).map_err(postgres_error)?;
        let relation = row.try_get(0).map_err(postgres_error)?;
        Ok((relation, Former { version: version as u64, key }))
    };
    rows.iter().map(former).collect()
}
