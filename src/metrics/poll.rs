//! Polling.

use metrics::{Counter, Gauge, counter, gauge};

/// A source that polls; all are 0 where the WAL is read.
#[derive(Clone)]
pub struct PollMetrics {
    /// Looks for what is new.
    pub looks: Counter,
    /// Batches found.
    pub batches: Counter,
    /// How long ago the oldest batch was found that is not settled and stored, in seconds.
    pub backlog_age_seconds: Gauge,
    /// Number of the newest batch.
    pub received: Gauge,
    /// Number of the last batch that is settled and stored.
    pub checkpointed: Gauge,
}

impl PollMetrics {
    pub(super) fn new() -> Self {
        let batch = |stage| gauge!("watership_poll_batch", "stage" => stage);
        Self {
            looks: counter!("watership_polls_total"),
            batches: counter!("watership_poll_batches_total"),
            backlog_age_seconds: gauge!("watership_poll_backlog_age_seconds"),
            received: batch("received"),
            checkpointed: batch("checkpointed"),
        }
    }
}
