//! What the loop tells the metrics at each tick: gauges, and counters of what others count.

use std::time::{Duration, Instant};

use crate::metrics::Metrics;
use crate::relay::progress::Progress;
use crate::source::Seen;

/// What one session has told so far.
#[derive(Debug)]
pub struct Observed {
    counted: Seen,
    /// When the checkpoint was last seen to be as new as what is settled.
    current_at: Instant,
    last: Instant,
    /// Time blocked by the broker that is not counted yet; less than a second.
    blocked: Duration,
}

impl Observed {
    /// A session that begins at `now`.
    pub fn new(now: Instant) -> Self {
        let (counted, blocked) = (Seen::default(), Duration::ZERO);
        Self { counted, current_at: now, last: now, blocked }
    }

    /// Sets gauges and adds to counters what has come since the last call.
    pub fn tick(
        &mut self,
        metrics: &Metrics,
        progress: &Progress,
        seen: Seen,
        blocked: bool,
        now: Instant,
    ) {
        progress.publish(metrics);
        metrics.wal.changes.increment(seen.changes - self.counted.changes);
        metrics.wal.skipped.increment(seen.skipped - self.counted.skipped);
        self.counted = seen;
        if !progress.has_unstored() {
            self.current_at = now;
        }
        let age = now.saturating_duration_since(self.current_at);
        metrics.checkpoint.age_seconds.set(age.as_secs_f64());
        metrics.broker.blocked.set(f64::from(u8::from(blocked)));
        if blocked {
            self.blocked += now.saturating_duration_since(self.last);
            metrics.broker.blocked_seconds.increment(self.blocked.as_secs());
            self.blocked = Duration::from_nanos(u64::from(self.blocked.subsec_nanos()));
        }
        self.last = now;
    }
}
