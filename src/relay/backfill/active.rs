//! A run that has begun: where it is, and whether its table is the one that it began with.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::keyset::{From, TableShape};
use super::pace::Pace;
use super::read::{self, ChunkRows, ReadTable, Unfit};
use super::reread::{MovedRows, Phase, ROWS_MAX};
use super::runs::{self, Run};
use super::shown::BackfillView;
use super::{Options, runs::RunState};
use crate::error::{Error, Result};
use crate::pg::publication::TableName;
use crate::relay::options;
use crate::source::Cursor;

/// How long a run waits for transactions that were open when it began, where no commit waits for a
/// standby: one that is committed is visible as soon as its process comes to it.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Over which time the rate is told.
const RATE_OVER: Duration = Duration::from_secs(10);

/// A run that has begun in this session.
pub(super) struct Active {
    pub(super) run: Run,
    pub(super) wanted: ReadTable,
    pub(super) shape: TableShape,
    pub(super) pace: Pace,
    /// What the next chunk contains.
    pub(super) phase: Phase,
    /// The position up to which this round reads rows that moved.
    pub(super) until: String,
    lacks_moved: bool,
    /// Read rows that moved one at a time.
    one_moved: bool,
    /// Transactions that were open when the loop began to remember those of the table; absent once
    /// none of them can matter.
    before: Option<(HashSet<u32>, Instant)>,
    /// When it may go on.
    pub(super) not_before: Instant,
    /// Rows of earlier times, by which the rate is told.
    since: (Instant, u64),
    lately: Option<(u64, Duration)>,
}

impl Active {
    /// Looks at the table of a run. The inner error is why it cannot be read.
    pub(super) async fn begin(
        client: &impl GenericClient,
        relay: &options::Options,
        mut run: Run,
    ) -> Result<std::result::Result<Self, Unfit>> {
        let (wanted, shape) = match look(client, relay, &run.table).await? {
            Ok(found) => found,
            Err(unfit) => return Ok(Err(unfit)),
        };
        let unfit = |what: String| {
            let hint = "start another backfill of it".to_owned();
            Ok(Err(Unfit { what, hint }))
        };
        let is = (wanted.oid, shape.table.version);
        if run.began.is_some_and(|began| began != is) {
            return unfit(format!(
                "{} was altered, or created again, since the run began",
                run.table
            ));
        }
        let key = run.last_key.as_ref().or(run.first_key.as_ref());
        if let Some(key) = key.filter(|key| key.len() != shape.key.len()) {
            let (table, got, wants) = (&run.table, key.len(), shape.key.len());
            return unfit(format!(
                "the key of {table} has {wants} columns, {got} values were given"
            ));
        }
        run.total = read::estimate(client, wanted.oid).await?.or(run.total);
        runs::begin(client, run.run, is, run.total).await?;
        run.state = RunState::Running;
        let Options { chunk_rows, max_rate, .. } = relay.backfill;
        let (pace, now) = (Pace::new(chunk_rows, max_rate), Instant::now());
        let (since, lately, before) = ((now, run.rows), None, None);
        let (phase, until, lacks_moved, one_moved) = (Phase::Keys, String::new(), false, false);
        Ok(Ok(Self {
            run,
            wanted,
            shape,
            pace,
            phase,
            until,
            lacks_moved,
            one_moved,
            before,
            not_before: now,
            since,
            lately,
        }))
    }

    /// From now on the loop remembers the transactions of the table; these were open before.
    pub(super) fn remembered_since(&mut self, open: HashSet<u32>) {
        self.before = Some((open, Instant::now()));
    }

    /// Why it has to wait for a transaction from before that may be committed and not visible.
    pub(super) async fn waits_for_open(
        &mut self,
        client: &impl GenericClient,
    ) -> Result<Option<String>> {
        let Some((before, since)) = &mut self.before else { return Ok(None) };
        let (open, standby) = read::unseen(client).await?;
        before.retain(|xid| open.contains(xid));
        let limit = !standby && since.elapsed() >= OPEN_LIMIT;
        if before.is_empty() || limit {
            self.before = None;
            return Ok(None);
        }
        let count = before.len();
        Ok(Some(format!("{count} transactions that were open when it began have not ended")))
    }

    /// Where the next chunk begins.
    pub(super) fn from(&self) -> From {
        match (&self.run.last_key, &self.run.first_key) {
            (Some(key), _) => From::After(key.clone()),
            (None, Some(key)) => From::At(key.clone()),
            (None, None) => From::Start,
        }
    }

    /// How many rows that moved may be read at once.
    pub(super) fn moved_rows(&self) -> usize {
        if self.one_moved { 1 } else { ROWS_MAX.min(self.pace.rows()) }
    }

    /// The cursor after a chunk with these rows; `moved` are the moved rows it was to read.
    pub(super) fn cursor(&self, token: Uuid, rows: &ChunkRows, moved: &MovedRows) -> Cursor {
        let in_order = self.phase == Phase::Keys;
        Cursor {
            run: self.run.run,
            token,
            last_key: rows.last_key.clone().filter(|_| in_order),
            rows: self.run.rows + rows.read as u64,
            left_out: self.run.left_out + (rows.read - rows.wanted.len()) as u64,
            reread: moved.reread(rows),
            done: self.phase == Phase::Moved && moved.is_empty() && !self.lacks_moved,
        }
    }

    /// Chooses what follows a stored chunk. `all`: it had all remaining rows. `lacks`: a row that
    /// moved was not found.
    pub(super) fn next_phase(
        &mut self,
        all: bool,
        lacks: bool,
        moved: &MovedRows,
        cursor: &Cursor,
    ) {
        // The text of a key may differ from what was recorded; alone, it is recognized anyway.
        self.one_moved = !moved.is_empty() && cursor.reread.is_empty();
        self.lacks_moved |= lacks;
        self.phase = match self.phase {
            Phase::Keys if all => Phase::Passing,
            Phase::Keys => Phase::Keys,
            Phase::Passing => Phase::Moved,
            Phase::Moved if moved.is_empty() && std::mem::take(&mut self.lacks_moved) => {
                Phase::Passing
            }
            Phase::Moved => Phase::Moved,
        };
    }

    /// A chunk with this cursor is stored. Returns how many rows it had, and how many were left
    /// out.
    pub(super) fn stored(&mut self, cursor: &Cursor, left_out: u64) -> (u64, u64) {
        let moved = (cursor.rows - self.run.rows, left_out - self.run.left_out);
        (self.run.rows, self.run.left_out) = (cursor.rows, left_out);
        if cursor.last_key.is_some() {
            self.run.last_key.clone_from(&cursor.last_key);
        }
        if cursor.done {
            self.run.state = RunState::Done;
        }
        let (since, rows) = self.since;
        self.lately = Some((self.run.rows - rows, since.elapsed()));
        if since.elapsed() >= RATE_OVER {
            self.since = (Instant::now(), self.run.rows);
        }
        moved
    }

    pub(super) fn view(&self) -> BackfillView {
        BackfillView::new(&self.run, self.lately)
    }
}

/// The table and how it is read, or why it cannot be.
///
/// # Errors
/// The server's.
pub async fn look(
    client: &impl GenericClient,
    relay: &options::Options,
    table: &str,
) -> Result<std::result::Result<(ReadTable, TableShape), Unfit>> {
    if !relay.tables.iter().any(|captured| captured == table) {
        let what = format!("{table} is not captured");
        let tables: Vec<&str> = relay.tables.iter().map(String::as_str).collect();
        let hint = format!(
            "source.tables has: {}; use one of these names, or add the table and run `watership \
             init`",
            tables.join(", ")
        );
        return Ok(Err(Unfit { what, hint }));
    }
    let name: TableName = table.parse()?;
    let gone = || Unfit {
        what: format!("{table} does not exist"),
        hint: "create it, or rename it back".to_owned(),
    };
    let Some(wanted) = read::find(client, &name, &relay.publication).await? else {
        return Ok(Err(gone()));
    };
    Ok(match read::shape(client, &wanted).await? {
        None => Err(gone()),
        Some(Err(unfit)) => Err(unfit),
        Some(Ok(shape)) => Ok((wanted, shape)),
    })
}

/// What is told of an error of a statement over the table: not its text where that may have a
/// value of a row.
pub(super) fn told(error: &Error) -> String {
    match error.sqlstate() {
        Some(code) if code.starts_with("22") => {
            format!("a condition or a value of the table cannot be evaluated (SQLSTATE {code})")
        }
        Some(_) | None => error.to_string(),
    }
}
