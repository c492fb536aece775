//! The rows of `watership.backfill`: what is asked for, and what became of it. How far a run is,
//! is written with the checkpoint (`relay/checkpoint/rider`).

use tokio_postgres::types::ToSql;
use tokio_postgres::{GenericClient, Row as SqlRow};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::pg::sqlstate::{FOREIGN_KEY_VIOLATION, UNIQUE_VIOLATION, postgres_error};
use crate::relay::checkpoint::{missing_schema, no_row};

/// What a run is doing, as the table has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// The relay has not begun.
    Requested,
    /// The relay reads.
    Running,
    /// Somebody paused it.
    Paused,
    /// Every row was sent.
    Done,
    /// It cannot go on.
    Failed,
    /// Somebody ended it.
    Cancelled,
}

impl RunState {
    const ALL: [(RunState, &str); 6] = [
        (RunState::Requested, "requested"),
        (RunState::Running, "running"),
        (RunState::Paused, "paused"),
        (RunState::Done, "done"),
        (RunState::Failed, "failed"),
        (RunState::Cancelled, "cancelled"),
    ];

    /// As the table has it.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    /// It will go no further.
    pub fn has_ended(self) -> bool {
        matches!(self, RunState::Done | RunState::Failed | RunState::Cancelled)
    }
}

/// A run.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its id; part of the ids of its rows.
    pub run: Uuid,
    /// `schema.table`, as the configuration has it.
    pub table: String,
    /// Which rows are wanted, as SQL.
    pub condition: Option<String>,
    /// The key at which it begins.
    pub first_key: Option<Vec<String>>,
    /// What it is doing.
    pub state: RunState,
    /// Why it does not go on now.
    pub waits: Option<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// OID of the table when it began, and its version.
    pub began: Option<(u32, u64)>,
    /// The key of the last row that is settled.
    pub last_key: Option<Vec<String>>,
    /// Rows that were read.
    pub rows: u64,
    /// Those of them that were not sent.
    pub left_out: u64,
    /// Rows of the table, about.
    pub total: Option<u64>,
    /// It is the snapshot of the slot.
    pub initial: bool,
    /// When it was asked for, in seconds since 1970-01-01 UTC,
    pub requested_at: f64,
    /// when it began,
    pub started_at: Option<f64>,
    /// and when it ended.
    pub ended_at: Option<f64>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request<'a> {
    /// `schema.table`, as the configuration has it.
    pub table: &'a str,
    /// Which rows are wanted, as SQL.
    pub condition: Option<&'a str>,
    /// The key at which it begins.
    pub first_key: Option<&'a [String]>,
    /// The slot whose snapshot it is.
    pub initial_slot: Option<&'a str>,
}

/// Asks for a run; absent when the snapshot of this slot was asked for before.
///
/// # Errors
/// [`crate::error::Kind::Refused`] while another run of the table has not ended; or the server's.
pub async fn request(
    client: &impl GenericClient,
    name: &str,
    request: Request<'_>,
) -> Result<Option<Uuid>> {
    const SQL: &str = include_str!("../../../sql/query/backfill_request.sql");
    let Request { table, condition, first_key, initial_slot } = request;
    let values: [&(dyn ToSql + Sync); 5] = [&name, &table, &condition, &first_key, &initial_slot];
    match client.query_opt(SQL, &values).await.map_err(missing_schema) {
        Ok(row) => row.map(|row| row.try_get(0).map_err(postgres_error)).transpose(),
        Err(error) if error.sqlstate() == Some(UNIQUE_VIOLATION) => {
            Err(Error::refused(format!("a backfill of {table} has not ended"))
                .hint("`watership backfill list` shows it; wait for it, resume it, or cancel it"))
        }
        Err(error) if error.sqlstate() == Some(FOREIGN_KEY_VIOLATION) => Err(no_row(name)),
        Err(error) => Err(error),
    }
}

/// The runs of a relay, the oldest first; `open` for those only that have not ended.
///
/// # Errors
/// The server's.
pub async fn list(client: &impl GenericClient, name: &str, open: bool) -> Result<Vec<Run>> {
    const SQL: &str = include_str!("../../../sql/query/backfill_list.sql");
    let rows = client.query(SQL, &[&name, &open]).await.map_err(missing_schema)?;
    rows.iter().map(from_sql).collect()
}

fn from_sql(row: &SqlRow) -> Result<Run> {
    fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a SqlRow, i: usize) -> Result<T> {
        row.try_get(i).map_err(postgres_error)
    }
    let wrong = |what| Error::protocol(format!("watership.backfill.{what} is out of range"));
    let number = |i, what| u64::try_from(get::<i64>(row, i)?).map_err(|_| wrong(what));
    let state: &str = get(row, 4)?;
    let known = RunState::ALL.iter().find(|(_, name)| *name == state);
    let relation: Option<u32> = get(row, 7)?;
    let version: Option<i64> = get(row, 8)?;
    Ok(Run {
        run: get(row, 0)?,
        table: get(row, 1)?,
        condition: get(row, 2)?,
        first_key: get(row, 3)?,
        state: known.ok_or_else(|| wrong("state"))?.0,
        waits: get(row, 5)?,
        error: get(row, 6)?,
        // The bits are the same: Postgres has no unsigned numbers.
        began: relation.zip(version.map(|version| version as u64)),
        last_key: get(row, 9)?,
        rows: number(10, "rows_read")?,
        left_out: number(11, "rows_left_out")?,
        total: get::<Option<i64>>(row, 12)?.and_then(|total| u64::try_from(total).ok()),
        initial: get(row, 13)?,
        requested_at: get(row, 14)?,
        started_at: get(row, 15)?,
        ended_at: get(row, 16)?,
    })
}

/// A run has begun.
///
/// # Errors
/// The server's.
pub async fn begin(
    client: &impl GenericClient,
    run: Uuid,
    of: (u32, u64),
    total: Option<u64>,
) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/backfill_begin.sql");
    let (relation, version) = (of.0, of.1 as i64);
    let total = total.and_then(|total| i64::try_from(total).ok());
    let done = client.execute(SQL, &[&run, &relation, &version, &total]).await;
    done.map(drop).map_err(postgres_error)
}

/// A run does not go on now, and why; or it does.
///
/// # Errors
/// The server's.
pub async fn waits(client: &impl GenericClient, run: Uuid, why: Option<&str>) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/backfill_waits.sql");
    client.execute(SQL, &[&run, &why]).await.map(drop).map_err(postgres_error)
}

/// Deletes the recorded moves of runs that have ended.
///
/// # Errors
/// The server's.
pub async fn purge_moved(client: &impl GenericClient, name: &str) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/backfill_moved_purge.sql");
    client.execute(SQL, &[&name]).await.map(drop).map_err(postgres_error)
}

/// A run cannot go on.
///
/// # Errors
/// The server's.
pub async fn fail(client: &impl GenericClient, run: Uuid, why: &str) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/backfill_fail.sql");
    client.execute(SQL, &[&run, &why]).await.map(drop).map_err(postgres_error)
}

/// Pauses (`paused`), resumes (`requested`) or ends (`cancelled`) runs: all, or those of one table
/// or id. Returns their ids and tables.
///
/// # Errors
/// The server's.
pub async fn set(
    client: &impl GenericClient,
    name: &str,
    which: Option<&str>,
    to: RunState,
) -> Result<Vec<(Uuid, String)>> {
    const SQL: &str = include_str!("../../../sql/query/backfill_set.sql");
    let rows = client.query(SQL, &[&name, &which, &to.name()]).await.map_err(missing_schema)?;
    let one = |row: &SqlRow| {
        Ok((row.try_get(0).map_err(postgres_error)?, row.try_get(1).map_err(postgres_error)?))
    };
    rows.iter().map(one).collect()
}
