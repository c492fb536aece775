//! The options of backfills.

use crate::pg::publication::TableName;

/// How backfills are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tables of which a snapshot is taken once for a slot.
    pub initial: Vec<TableName>,
    /// Rows of a chunk at most.
    pub chunk_rows: usize,
    /// Messages of rows that may be unconfirmed: their share of the window.
    pub max_unconfirmed: usize,
    /// Rows a second of a run at most; 0 for no limit.
    pub max_rate: u32,
    /// Messages that a queue of the configuration may hold while a backfill runs; 0 for no limit.
    pub max_queue_messages: u32,
    /// Bytes of WAL that the slot may keep while a backfill runs.
    pub max_slot_wal: u64,
}
