//! The rows that a captured table had before it was captured, or that its consumers need again.
//!
//! A run reads the table in chunks, in the order of its key. For each chunk the `worker`, on a
//! connection of its own, writes a low mark into the WAL, reads the rows after the mark's commit,
//! and hands them to the loop (`window`), which puts them where the mark stands in the stream.
//!
//! Invariant: **a chunk stands at its low mark, before the live changes after it, in the same
//! lanes.** What comes of the table between the mark and the chunk is held, nothing else is; if
//! that takes too long, the chunk is given up and comes again. `merge` decides what a live change
//! means for rows of the chunk that are not sent. A chunk's cursor is durable with the checkpoint
//! that covers the chunk, and the next mark is written only then: a crash repeats one chunk.
//!
//! A chunk must show all that its table's changes before the mark did. A transaction can have a
//! place in the WAL and not be visible yet (its commit waits for a standby, or its process has not
//! come to it), so each chunk names the transactions that it does not see, and one that has come
//! through the stream before the mark is the end of the chunk. What came before the run was known
//! to the loop, the worker waits for.

pub mod active;
pub mod copied;
pub mod keyset;
pub mod merge;
pub mod moved;
mod options;
pub mod pace;
pub mod read;
pub mod reread;
pub mod runs;
pub mod shown;
pub mod waits;
mod window;
pub mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::event::{Event, Row, Table};
use crate::relay::window::EntryId;
use crate::source::{Cursor, LowMark, Note};

use merge::Unsent;

pub use options::Options;

/// Commands and reports that are on their way: one chunk at a time makes few of them.
const LINK_MAX: usize = 64;
/// Transactions of one table that are remembered between two chunks; above it the run has to begin
/// again to know them.
const TRANSACTIONS_MAX: usize = 1 << 16;
/// Share of the window that may be held for a chunk.
const HELD_SHARE: usize = 4;

/// What the worker asks of the loop.
#[derive(Debug)]
pub enum ChunkCommand {
    /// A run of the table is about to begin: its transactions are to be remembered.
    Begin(u32),
    /// The run of the table has ended, or pauses.
    End(u32),
    /// A low mark with this token is about to be written for the table.
    Expect {
        /// Of the mark.
        token: Uuid,
        /// OID of the table.
        table: u32,
        /// How long live changes may be held.
        hold: Duration,
    },
    /// The rows.
    Rows(Box<Chunk>),
    /// There will be no rows for the mark.
    Forget(Uuid),
}

/// What the loop tells the worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkReport {
    /// From now on the table's transactions are remembered.
    Began(u32),
    /// The chunk was given up.
    GivenUp(Uuid, GivenUp),
    /// The cursor of the chunk is durable.
    Stored {
        /// Of its mark.
        token: Uuid,
        /// Rows of the run that were left out so far.
        left_out: u64,
        /// From its first row to the last confirm.
        sent: Duration,
    },
    /// The table was truncated.
    Truncated(u32),
}

/// Why a chunk was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenUp {
    /// Live changes were held for too long, or there were too many of them.
    TooSlow,
    /// It does not show a transaction that came before its mark.
    Stale,
    /// The transactions before its mark are no longer known.
    Forgotten,
}

/// The rows of a chunk, as they were read.
#[derive(Debug)]
pub struct Chunk {
    /// Of its mark.
    pub token: Uuid,
    /// How they are described.
    pub table: Arc<Table>,
    /// The numbers of its columns.
    pub numbers: Vec<i16>,
    /// The rows that are wanted.
    pub rows: Vec<Row>,
    /// For rows that moved: the position of the change of each, in the order of the rows.
    pub moved: Vec<String>,
    /// Transactions that the chunk does not see, although they had begun before it.
    pub unseen: Vec<u32>,
    /// Where the next one begins.
    pub cursor: Cursor,
}

/// The worker's end of the link.
#[derive(Debug)]
pub struct WorkerEnd {
    /// To the loop.
    pub commands: mpsc::Sender<ChunkCommand>,
    /// From the loop.
    pub reports: mpsc::Receiver<ChunkReport>,
}

/// The loop's end of the link, and what it holds and sends for it.
#[derive(Debug)]
pub struct Backfill {
    link: Option<(mpsc::Receiver<ChunkCommand>, mpsc::Sender<ChunkReport>)>,
    /// Messages of rows that may be unconfirmed.
    max_unconfirmed: usize,
    /// Tables with a run that has not ended, paused ones included.
    watched: Vec<u32>,
    tables: Vec<Remembered>,
    stage: Stage,
    /// When the last chunk was there, and how long it took to send it.
    filled_at: Option<Instant>,
    sent: Duration,
    /// Cursors in the checkpoint that is being written.
    storing: Vec<Cursor>,
}

/// The transactions of a table that came through the stream.
#[derive(Debug)]
struct Remembered {
    table: u32,
    transactions: Vec<u32>,
    /// There were more than can be remembered.
    forgotten: bool,
    /// It was truncated; said once.
    truncated: bool,
}

/// Where the one chunk is that is under way.
#[derive(Debug)]
enum Stage {
    None,
    /// Its mark has not come.
    Expected(Expected),
    /// Its mark has come, its rows have not.
    Held(Held),
    /// Its rows are sent.
    Sending(Box<Sending>),
}

#[derive(Debug)]
struct Expected {
    token: Uuid,
    table: u32,
    hold: Duration,
    chunk: Option<Box<Chunk>>,
}

#[derive(Debug)]
struct Held {
    token: Uuid,
    table: u32,
    place: Place,
    /// Transactions that came before the mark.
    before: Vec<u32>,
    /// Live changes after the mark, with their entries.
    changes: Vec<(Event, EntryId)>,
    bytes: usize,
    until: Instant,
}

#[derive(Debug)]
struct Sending {
    token: Uuid,
    table: u32,
    place: Place,
    unsent: Unsent,
    /// See [`Chunk::moved`].
    moved: Vec<String>,
    cursor: Cursor,
}

/// Where a chunk stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    mark: LowMark,
    entry: EntryId,
}

impl Backfill {
    /// Of a relay whose source has no backfills.
    pub fn none() -> Self {
        let (watched, tables, storing) = Default::default();
        let (filled_at, sent) = Default::default();
        let stage = Stage::None;
        Self { link: None, max_unconfirmed: 1, watched, tables, stage, filled_at, sent, storing }
    }

    /// A link between a loop and a worker. At most `max_unconfirmed` messages of rows may be
    /// unconfirmed; `watched` are the tables with a run that has not ended.
    pub fn linked(max_unconfirmed: usize, watched: Vec<u32>) -> (Self, WorkerEnd) {
        let (commands, take) = mpsc::channel(LINK_MAX);
        let (tell, reports) = mpsc::channel(LINK_MAX);
        let link = Some((take, tell));
        (Self { link, max_unconfirmed, watched, ..Self::none() }, WorkerEnd { commands, reports })
    }

    /// A run has begun and not ended: the loop listens, and looks at what comes of its table.
    pub(in crate::relay) fn is_active(&self) -> bool {
        !self.tables.is_empty() || !matches!(self.stage, Stage::None)
    }

    /// Whether changes of captured tables have to be inspected.
    pub(in crate::relay) fn sees_changes(&self) -> bool {
        self.is_active() || !self.watched.is_empty()
    }

    /// The next command. Cancel-safe.
    pub(in crate::relay) async fn command(&mut self) -> Option<ChunkCommand> {
        match &mut self.link {
            Some((commands, _)) => commands.recv().await,
            None => std::future::pending().await,
        }
    }

    /// A command that has arrived.
    fn try_command(&mut self) -> Option<ChunkCommand> {
        self.link.as_mut()?.0.try_recv().ok()
    }

    fn report(&self, report: ChunkReport) {
        if let Some((_, reports)) = &self.link {
            // A worker that does not take them has ended, or will begin again.
            let _gone = reports.try_send(report);
        }
    }

    fn table(&mut self, table: u32) -> Option<&mut Remembered> {
        self.tables.iter_mut().find(|remembered| remembered.table == table)
    }

    /// All rows of a chunk are settled.
    pub(in crate::relay) fn settled(&mut self, now: Instant) {
        let taken = self.filled_at.take().map(|at| now.saturating_duration_since(at));
        self.sent = taken.unwrap_or_default();
    }

    /// Cursors that are in the checkpoint that is about to be written.
    pub(in crate::relay) fn store(&mut self, notes: &[Note]) {
        self.storing.extend(notes.iter().filter_map(|note| match note {
            Note::Backfilled(cursor) => Some(cursor.clone()),
            Note::Described(_) | Note::Changed(_) | Note::Canary(_) | Note::Moved(_) => None,
        }));
    }

    /// They are durable.
    pub(in crate::relay) fn stored(&mut self) {
        for cursor in std::mem::take(&mut self.storing) {
            let Cursor { token, left_out, .. } = cursor;
            self.report(ChunkReport::Stored { token, left_out, sent: self.sent });
        }
    }

    /// When held changes may not be held any longer.
    pub(in crate::relay) fn wake_at(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Held(held) => Some(held.until),
            Stage::None | Stage::Expected(_) | Stage::Sending(_) => None,
        }
    }
}

impl Remembered {
    fn new(table: u32) -> Self {
        Self { table, transactions: Vec::new(), forgotten: false, truncated: false }
    }

    /// A change of this transaction came.
    fn remember(&mut self, xid: u32) {
        if self.transactions.last() == Some(&xid) {
            return;
        }
        if self.transactions.len() >= TRANSACTIONS_MAX {
            self.forgotten = true;
            self.transactions.clear();
        }
        self.transactions.push(xid);
    }
}
