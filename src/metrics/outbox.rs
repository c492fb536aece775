//! What is said of the outbox.

use metrics::{Counter, counter};

/// The outbox table's partitions.
#[derive(Clone)]
pub struct OutboxMetrics {
    /// Partitions made ahead.
    pub partitions_created: Counter,
    /// Partitions dropped after the checkpoint had passed them.
    pub partitions_dropped: Counter,
    /// Days for which no partition could be made, because the default partition has their rows.
    pub partitions_skipped: Counter,
    /// Partition work put off, because its lock was not available within 100 ms.
    pub maintain_postponed: Counter,
    /// Runs of the upkeep that failed.
    pub maintain_failures: Counter,
    /// Rows of a mapped outbox table that `delete_after` deleted.
    pub rows_deleted: Counter,
    /// Updates of outbox rows, which are ignored.
    pub updates_ignored: Counter,
    /// Logical messages with the relay's prefix that are no part of a transaction.
    pub messages_ignored: Counter,
}

impl OutboxMetrics {
    pub(super) fn new() -> Self {
        Self {
            partitions_created: counter!("watership_outbox_partitions_created_total"),
            partitions_dropped: counter!("watership_outbox_partitions_dropped_total"),
            partitions_skipped: counter!("watership_outbox_partitions_skipped_total"),
            maintain_postponed: counter!("watership_outbox_maintain_postponed_total"),
            maintain_failures: counter!("watership_outbox_maintain_failures_total"),
            rows_deleted: counter!("watership_outbox_rows_deleted_total"),
            updates_ignored: counter!("watership_outbox_updates_ignored_total"),
            messages_ignored: counter!("watership_messages_ignored_total"),
        }
    }
}
