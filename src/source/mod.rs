//! Where events come from. A source hands on committed changes in source order and is told what
//! has been settled; it advances only as far as the receipts that come back.

pub mod columns;
pub mod outbox;
pub mod poll;
pub mod transaction;
pub mod wal;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::error::Result;
use crate::event::{Event, Table};
use crate::position::{Lsn, Mark, Position};
use crate::route::SchemaChange;

/// One step of the source, in source order.
#[derive(Debug)]
pub enum Item {
    /// A committed change.
    Event(Event, Receipt),
    /// The end of a transaction: everything before it has been handed on.
    Commit(Receipt),
    /// From here on changes of this captured table are described so; another description than the
    /// one that was stored last, or than the one before in this stream. With its own place, which
    /// the receipt is past where an earlier session settled what comes next.
    Described(Arc<Table>, Position, Receipt),
    /// From here on, what the session read does not tell which columns the table has.
    Columns(Arc<Table>, Position, ColumnDoubt),
    /// A low mark of a backfill: the rows of its chunk stand here.
    LowMark(LowMark, Receipt),
    /// Nothing is open and everything up to here was handed on; the WAL has grown by something
    /// that is not ours.
    Idle(Receipt),
}

/// Why the columns of a table are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnDoubt {
    /// It lost or replaced some: the catalog has to be read again.
    Others,
    /// A transaction that is not visible yet may have altered it.
    Unknown,
}

/// Proof that the source handed something on. Not `Clone`: it travels with the entry through the
/// window and comes back once, when everything up to it is settled.
#[derive(Debug, PartialEq, Eq)]
pub struct Receipt {
    position: Position,
    flush: Option<Mark>,
    notes: Vec<Note>,
}

/// What must be durable exactly with the position that covers it, such as what a source wants to
/// find again when it resumes: it travels with a receipt and rides on the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// How a captured table is described from here on.
    Described(Arc<Table>),
    /// How far a backfill is.
    Backfilled(Cursor),
    /// A row that a backfill has to read again.
    Moved(Moved),
    /// What is different about it from what was recorded last.
    Changed(Box<SchemaChange>),
    /// The last canary that was received, with none missing before it.
    Canary(CanarySighting),
}

/// A low mark of a backfill, which the relay itself wrote: a transactional logical message, alone
/// in its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LowMark {
    /// Tells it from all others.
    pub token: Uuid,
    /// Where its transaction begins: rows of its chunk stand at the sub-ordinals from 1 on.
    pub position: Position,
    /// LSN of the message.
    pub lsn: Lsn,
    /// Commit time, in microseconds since 1970-01-01 UTC.
    pub committed_at_us: i64,
    /// Its transaction.
    pub xid: u32,
}

/// How far the run of a backfill is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// The run.
    pub run: Uuid,
    /// The mark of the chunk that came last.
    pub token: Uuid,
    /// The text of the key columns of its last row; absent where no row was found.
    pub last_key: Option<Vec<String>>,
    /// Rows that were read since the beginning of the run.
    pub rows: u64,
    /// Those of them that were not sent: a later change told all of them, or they are not wanted.
    pub left_out: u64,
    /// The positions, as text, of the changes whose moved rows have been read again.
    pub reread: Vec<String>,
    /// There are no more rows.
    pub done: bool,
}

/// A row whose key was changed by a change that does not carry all of its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// OID of the table.
    pub relation: u32,
    /// Position of the change.
    pub position: Position,
    /// The new key, as names and texts of its columns; absent if it is not UTF-8.
    pub key: Option<Vec<(String, String)>>,
}

impl Receipt {
    /// Only sources make receipts.
    pub(crate) fn new(position: Position, flush: Option<Mark>) -> Self {
        Self { position, flush, notes: Vec::new() }
    }

    /// Of a source that is idle: it covers no change, so its position is the lowest; receipts merge
    /// upwards.
    pub fn idle(reached: Mark) -> Self {
        Self::new(Position::default(), Some(reached))
    }

    /// Everything up to and including this position is covered.
    pub fn position(&self) -> Position {
        self.position
    }

    /// How far the source may be told to flush; `None` inside a transaction.
    pub fn flush(&self) -> Option<Mark> {
        self.flush
    }

    /// With something to be found again.
    #[must_use]
    pub(crate) fn with_note(mut self, note: Note) -> Self {
        self.notes.push(note);
        self
    }

    /// Adds something to be found again.
    pub(crate) fn add_note(&mut self, note: Note) {
        self.notes.push(note);
    }

    /// What is to be durable with the position, in source order; once.
    pub fn take_notes(&mut self) -> Vec<Note> {
        std::mem::take(&mut self.notes)
    }

    /// Takes in the receipt of the next entry in source order.
    pub fn absorb(&mut self, mut later: Receipt) {
        assert!(later.position >= self.position, "receipts come back in source order");
        self.position = later.position;
        self.flush = later.flush.or(self.flush);
        self.notes.append(&mut later.notes);
    }
}

/// What a source has seen: counts for the metrics, and signs of life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Changes received, before any filter or route.
    pub changes: u64,
    /// Events not handed on because an earlier session settled them.
    pub skipped: u64,
    /// Updates of outbox rows, which are ignored.
    pub outbox_updates: u64,
    /// Logical messages with our prefix that are no part of a transaction, which are ignored.
    pub messages_ignored: u64,
    /// Those that are part of a transaction and were not written by `emit_wal`, ignored too.
    pub messages_unsigned: u64,
    /// The last canary of this relay that came.
    pub canary: Option<CanarySighting>,
    /// The first canaries that did not come although a later one did.
    pub canary_gap: Option<CanaryGap>,
    /// The server has sent everything before this.
    pub received: Lsn,
    /// Of a source that polls.
    pub polled: Option<PollSeen>,
}

/// What a source that polls has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PollSeen {
    /// Looks for what is new.
    pub looks: u64,
    /// Batches found.
    pub batches: u64,
    /// The newest batch.
    pub batch: Mark,
    /// How long ago the oldest batch was found that is not settled and stored; zero without one.
    pub backlog_age: Duration,
}

/// A canary that came through the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CanarySighting {
    /// Its number.
    pub number: u64,
    /// End LSN of its transaction.
    pub end: Lsn,
}

/// Canaries that are missing between two that came: something published was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CanaryGap {
    /// The last one before.
    pub before: CanarySighting,
    /// The first one after.
    pub after: CanarySighting,
}

/// Hands on committed changes in order. Production: [`AnySource`]; and a simulator.
pub trait Source {
    /// Appends at least one item to `batch`, and about `room` at most.
    ///
    /// Cancel-safe: items are appended only when the future is about to finish.
    ///
    /// # Errors
    /// When the connection is lost or the stream cannot be understood: the session is over.
    fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> impl Future<Output = Result<()>>;

    /// Tells the source that everything up to `flush` is settled and stored. It may forget it.
    ///
    /// # Errors
    /// When the connection is lost.
    fn advance(&mut self, flush: Mark) -> impl Future<Output = Result<()>>;

    /// Keeps the connection alive while nobody calls `next`. Call it at least every second.
    ///
    /// # Errors
    /// When the connection is lost.
    fn keep_alive(&mut self) -> impl Future<Output = Result<()>>;

    /// What it has seen since it was made.
    fn seen(&self) -> Seen;

    /// Ends the connection in order.
    fn close(self) -> impl Future<Output = ()>;
}

/// What a relay reads from. A kind decides how a session starts, what its position is compared
/// with, and what there is to look after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceKind {
    /// The write-ahead log, through a replication slot.
    Wal,
    /// The outbox, with SQL.
    Poll,
}

impl SourceKind {
    /// All of them.
    pub const ALL: [SourceKind; 2] = [SourceKind::Wal, SourceKind::Poll];

    /// As it is called in the configuration and in the checkpoint row.
    pub fn name(self) -> &'static str {
        match self {
            SourceKind::Wal => "wal",
            SourceKind::Poll => "poll",
        }
    }
}

/// A source of any kind: what production runs.
#[expect(clippy::large_enum_variant, reason = "a session has one")]
pub enum AnySource {
    /// See [`wal::Wal`].
    Wal(wal::Wal),
    /// See [`poll::Poll`].
    Poll(poll::Poll),
}

impl Source for AnySource {
    async fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<()> {
        match self {
            AnySource::Wal(source) => source.next(room, batch).await,
            AnySource::Poll(source) => source.next(room, batch).await,
        }
    }

    async fn advance(&mut self, flush: Mark) -> Result<()> {
        match self {
            AnySource::Wal(source) => source.advance(flush).await,
            AnySource::Poll(source) => source.advance(flush).await,
        }
    }

    async fn keep_alive(&mut self) -> Result<()> {
        match self {
            AnySource::Wal(source) => source.keep_alive().await,
            AnySource::Poll(source) => source.keep_alive().await,
        }
    }

    fn seen(&self) -> Seen {
        match self {
            AnySource::Wal(source) => source.seen(),
            AnySource::Poll(source) => source.seen(),
        }
    }

    async fn close(self) {
        match self {
            AnySource::Wal(source) => source.close().await,
            AnySource::Poll(source) => source.close().await,
        }
    }
}
