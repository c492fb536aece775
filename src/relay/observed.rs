//! What the loop tells the metrics at each tick: gauges, and counters of what others count.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::metrics::Metrics;
use crate::publisher::Publisher;
use crate::relay::Relay;
use crate::relay::checkpoint::Store;
use crate::relay::checkpoint::progress::Progress;
use crate::relay::parking::{Parking, Summary};
use crate::relay::window::lanes::Lanes;
use crate::source::{Seen, Source};

/// What one session has told so far.
#[derive(Debug)]
pub struct Observed {
    counted: Seen,
    /// When the checkpoint was last seen to be as new as what is settled.
    current_at: Instant,
    last: Instant,
    /// Time blocked by the broker that is not counted yet; less than a second.
    blocked: Duration,
    /// Nothing was parked or held at the last tick. False at first: an earlier session may have
    /// left gauges behind.
    quiet: bool,
}

impl Observed {
    /// A session that begins at `now`.
    pub fn new(now: Instant) -> Self {
        let (counted, blocked) = (Seen::default(), Duration::ZERO);
        Self { counted, current_at: now, last: now, blocked, quiet: false }
    }

    /// Sets gauges and adds to counters what has come since the last call. Returns for how long
    /// something has been settled and not stored.
    pub fn tick(
        &mut self,
        metrics: &Metrics,
        progress: &Progress,
        seen: Seen,
        blocked: bool,
        now: Instant,
    ) -> Duration {
        match seen.polled {
            None => progress.publish(metrics),
            Some(polled) => {
                let counted = self.counted.polled.unwrap_or_default();
                metrics.poll.looks.increment(polled.looks - counted.looks);
                metrics.poll.batches.increment(polled.batches - counted.batches);
                metrics.poll.backlog_age_seconds.set(polled.backlog_age.as_secs_f64());
                metrics.poll.received.set(polled.batch.0 as f64);
                metrics.poll.checkpointed.set(progress.stored_checkpoint().1.0 as f64);
            }
        }
        metrics.wal.changes.increment(seen.changes - self.counted.changes);
        metrics.wal.skipped.increment(seen.skipped - self.counted.skipped);
        self.ignored(metrics, seen);
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
        age
    }

    /// What looks like an event and is not one: counted, and said once in a session.
    fn ignored(&self, metrics: &Metrics, seen: Seen) {
        let (updates, messages) = (seen.outbox_updates, seen.messages_ignored);
        let (unsigned, counted) = (seen.messages_unsigned, self.counted.messages_unsigned);
        metrics.outbox.updates_ignored.increment(updates - self.counted.outbox_updates);
        metrics.outbox.messages_ignored.increment(messages - self.counted.messages_ignored);
        metrics.outbox.messages_ignored.increment(unsigned - counted);
        if unsigned > 0 && counted == 0 {
            tracing::warn!(
                unsigned,
                "logical messages with the prefix \"watership\" that watership.emit_wal did not \
                 write are ignored"
            );
        }
        if updates > 0 && self.counted.outbox_updates == 0 {
            tracing::warn!(
                updates,
                "rows of the outbox were updated: that is ignored, an event is sent as it was \
                 inserted"
            );
        }
        if messages > 0 && self.counted.messages_ignored == 0 {
            tracing::warn!(
                messages,
                "logical messages with the prefix \"watership\" that belong to no transaction are \
                 ignored: emit events with watership.emit_wal"
            );
        }
    }

    /// Sets the gauges of what is parked and held.
    pub fn parked(&mut self, metrics: &Metrics, parking: &Parking, lanes: &Lanes, now: Instant) {
        let Summary { rows, blocked, keys, oldest_at } = parking.summary();
        // Almost always there is nothing, and the gauges say so already.
        let was_quiet =
            std::mem::replace(&mut self.quiet, rows + blocked == 0 && lanes.holds().count() == 0);
        if was_quiet && self.quiet {
            return;
        }
        metrics.parked.rows.set(rows as f64);
        metrics.parked.blocked.set(blocked as f64);
        metrics.parked.keys.set(keys as f64);
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let age = oldest_at.map_or(0.0, |oldest| (clock - oldest).max(0.0));
        metrics.parked.oldest_seconds.set(age);
        let counts = parking.by_route();
        metrics.parked.set_rows(|route, kind| {
            let count = counts.iter().find(|((r, why), _)| *r == route && why.as_str() == kind);
            count.map_or(0, |(_, count)| *count)
        });
        for (index, route) in metrics.routes.iter().enumerate() {
            let hold = lanes.holds().find(|(id, _)| usize::from(id.0) == index);
            let held =
                hold.map_or(Duration::ZERO, |(_, hold)| now.saturating_duration_since(hold.since));
            // Set here, because a hold has several ends: its probe is confirmed, nacked or parked.
            route.held.set(f64::from(u8::from(hold.is_some())));
            route.held_seconds.set(held.as_secs_f64());
        }
    }
}

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    pub(super) fn publish_progress(&mut self, now: std::time::Instant) {
        let metrics = &self.seen.metrics;
        metrics.window.in_flight.set(self.flight.lanes.in_flight() as f64);
        metrics.window.events.set(self.flight.window.len() as f64);
        metrics.window.bytes.set(self.flight.window.bytes() as f64);
        metrics.window.paused.set(f64::from(u8::from(self.room() == 0)));
        let blocked = self.publisher.is_blocked();
        let (progress, seen) = (&self.durable.progress, self.source.seen());
        let age = self.seen.observed.tick(metrics, progress, seen, blocked, now);
        self.seen.status.checkpoint_age(age);
        self.seen.status.polled(seen.polled);
        self.seen.observed.parked(metrics, &self.parked.parking, &self.flight.lanes, now);
        metrics.probes.increment(self.flight.lanes.take_probes());
        self.seen.status.update(
            &self.durable.progress,
            &self.flight.lanes,
            self.flight.window.len(),
            blocked,
            now,
        );
        self.seen.status.parked(&self.parked.parking);
        self.flight.lanes.forget_well(now);
        let (lanes, router) = (&self.flight.lanes, &self.making.router);
        let refused = self.seen.refusals.tick(lanes, router, metrics, now);
        self.seen.status.refused(refused);
    }
}
