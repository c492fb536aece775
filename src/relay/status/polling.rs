//! How far a relay is that polls.

use serde::Serialize;

use super::Status;
use crate::relay::checkpoint::progress::Progress;
use crate::source::PollSeen;

/// How far polling is.
#[derive(Debug, Clone, Serialize)]
pub struct PollStatus {
    /// The newest batch.
    pub batch: u64,
    /// The last batch that is settled and stored.
    pub settled_batch: Option<u64>,
    /// How long ago the oldest batch was found that is not settled and stored, in seconds; 0
    /// without one.
    pub backlog_age_seconds: f64,
}

impl PollStatus {
    pub(super) fn new(polled: PollSeen, progress: Option<&Progress>) -> Self {
        Self {
            batch: polled.batch.0,
            settled_batch: progress.map(|progress| progress.stored_checkpoint().1.0),
            backlog_age_seconds: polled.backlog_age.as_secs_f64(),
        }
    }
}

impl Status {
    /// How far polling is; absent where the WAL is read.
    pub fn polled(&self, polled: Option<PollSeen>) {
        self.lock().polled = polled;
    }
}
