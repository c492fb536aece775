//! How far the relay is: received ≥ settled ≥ stored ≥ advanced. Pure.
//!
//! Also the idle rule: when an idle stream may advance although no event asked for it.

use std::time::{Duration, Instant};

use crate::metrics::{Metrics, lsn_value};
use crate::position::{Lsn, Mark, Position};
use crate::source::Receipt;

/// How far each stage is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    received: Position,
    settled: Position,
    settled_flush: Mark,
    storing: Option<(Position, Mark)>,
    stored: Position,
    stored_flush: Mark,
    advanced: Mark,
    due: bool,
    last_stored: Option<Instant>,
}

impl Progress {
    /// Everything stands where the checkpoint row stands.
    pub fn new(position: Position, flush: Mark) -> Self {
        Self {
            received: position,
            settled: position,
            settled_flush: flush,
            storing: None,
            stored: position,
            stored_flush: flush,
            advanced: flush,
            due: false,
            last_stored: None,
        }
    }

    /// The source handed on everything up to here.
    pub fn on_received(&mut self, position: Position) {
        self.received = self.received.max(position);
    }

    /// Everything covered by the receipt is settled.
    pub fn on_settled(&mut self, receipt: &Receipt) {
        self.on_received(receipt.position());
        self.settled = self.settled.max(receipt.position());
        assert!(self.settled <= self.received, "settled ≤ received");
        if let Some(flush) = receipt.flush() {
            // A replayed transaction ends before what was authorised already.
            self.settled_flush = self.settled_flush.max(flush);
        }
    }

    /// How far the source could be told to flush, once stored.
    pub fn flush(&self) -> Mark {
        self.settled_flush
    }

    /// Position up to which everything is settled.
    pub fn settled_position(&self) -> Position {
        self.settled
    }

    /// The stored checkpoint.
    pub fn stored_checkpoint(&self) -> (Position, Mark) {
        (self.stored, self.stored_flush)
    }

    /// How far the source has been told.
    pub fn advanced_mark(&self) -> Mark {
        self.advanced
    }

    /// Position up to which everything was received.
    pub fn received_position(&self) -> Position {
        self.received
    }

    /// One checkpoint interval has passed.
    pub fn tick(&mut self) {
        self.due = true;
    }

    /// The interval has passed since the last write began.
    pub fn is_due(&self) -> bool {
        self.due
    }

    /// There is something that is settled and not stored.
    pub fn has_unstored(&self) -> bool {
        (self.settled, self.settled_flush) != (self.stored, self.stored_flush)
    }

    /// What to write now.
    pub fn begin_storing(&mut self) -> (Position, Mark) {
        assert!(self.storing.is_none(), "one checkpoint at a time");
        self.due = false;
        let checkpoint = (self.settled, self.settled_flush);
        self.storing = Some(checkpoint);
        checkpoint
    }

    /// The write that was begun is durable.
    pub fn on_stored(&mut self) {
        let (position, flush) = self.storing.take().expect("a write was under way");
        assert!(position >= self.stored && flush >= self.stored_flush, "checkpoints are monotonic");
        assert!(position <= self.settled && flush <= self.settled_flush, "stored ≤ settled");
        (self.stored, self.stored_flush) = (position, flush);
    }

    /// What the source may be told now; never more than is stored.
    pub fn to_advance(&self) -> Option<Mark> {
        (self.stored_flush > self.advanced).then_some(self.stored_flush)
    }

    /// The source was told.
    pub fn on_advanced(&mut self, flush: Mark) {
        assert!(flush <= self.stored_flush, "advanced ≤ stored");
        assert!(flush >= self.advanced, "the source never goes back");
        self.advanced = flush;
    }

    /// Sets the gauges.
    pub fn publish(&self, metrics: &Metrics) {
        metrics.wal.received.set(lsn_value(self.received.mark.lsn()));
        metrics.wal.settled.set(lsn_value(self.settled.mark.lsn()));
        metrics.wal.checkpointed.set(lsn_value(self.stored_flush.lsn()));
        metrics.wal.advanced.set(lsn_value(self.advanced.lsn()));
    }
}

/// WAL that pins nothing interesting: written by our own checkpoints and by background processes.
const OWN_WAL: u64 = 4096;
/// An idle advance does not wait for the interval when this much WAL is pinned, in bytes.
const IDLE_BYTES: u64 = 16 << 20;
/// Between two idle advances while commits wait for the stream.
const HURRIED: Duration = Duration::from_secs(1);

/// When an idle stream may advance: every interval, or when much WAL is pinned; never when the WAL
/// grew only by our own writes, because the checkpoint of an advance is such a write and would
/// cause the next one. While commits wait for the stream, because the server counts it among its
/// synchronous standbys, it advances every second: a small commit of somebody else looks like a
/// write of ours.
#[derive(Debug)]
pub struct Idle {
    interval: Duration,
    last: Instant,
    reached: Option<Receipt>,
    own_wal_end: Lsn,
    /// WAL that our canaries took since then, in bytes.
    own_bytes: u64,
    /// Commits wait for the stream.
    hurried: bool,
}

impl Idle {
    /// Nothing reached yet; the first interval begins at `now`.
    pub fn new(interval: Duration, now: Instant) -> Self {
        let (reached, own_wal_end, own_bytes, hurried) = (None, Lsn::ZERO, 0, false);
        Self { interval, last: now, reached, own_wal_end, own_bytes, hurried }
    }

    /// Whether commits wait for the stream.
    pub fn hurry(&mut self, hurried: bool) {
        self.hurried = hurried;
    }

    /// The source is idle and handed on everything before this receipt.
    pub fn reached(&mut self, receipt: Receipt) {
        self.reached = Some(receipt);
    }

    /// Something was received: what the source said before is covered by its receipt.
    pub fn busy(&mut self) {
        self.reached = None;
    }

    /// Our own checkpoint ended about here in the WAL.
    pub fn wrote(&mut self, wal_end: Lsn) {
        self.own_wal_end = self.own_wal_end.max(wal_end);
        self.own_bytes = 0;
    }

    /// Our own canaries took this much WAL.
    pub fn wrote_canary(&mut self, bytes: u64) {
        self.own_bytes += bytes;
    }

    /// The receipt to settle now, if the rule allows it; not beyond `limit`, the last canary that
    /// came. Call only with an empty window.
    pub fn due(&mut self, flush: Mark, limit: Option<Lsn>, now: Instant) -> Option<Receipt> {
        let reached = self.reached.as_ref()?;
        let (end, flush) = (reached.flush()?.lsn(), flush.lsn());
        let end = limit.map_or(end, |limit| limit.min(end));
        let pinned = end.bytes_since(flush);
        let foreign = end.bytes_since(self.own_wal_end.max(flush)).saturating_sub(self.own_bytes);
        let waited = now.saturating_duration_since(self.last);
        let due = waited >= self.interval && foreign > OWN_WAL;
        let awaited = self.hurried && waited >= HURRIED && pinned > 0;
        if pinned >= IDLE_BYTES || due || awaited {
            self.last = now;
            let position = reached.position();
            self.reached = None;
            return Some(Receipt::new(position, Some(end.into())));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(lsn: u64, flush: Option<u64>) -> Receipt {
        let position = Position { epoch: 1, mark: Mark(lsn), ordinal: 1, sub: 0 };
        Receipt::new(position, flush.map(Mark))
    }

    #[test]
    fn nothing_is_advanced_before_it_is_stored() {
        let mut progress = Progress::new(Position::default(), Mark(5));
        progress.on_settled(&receipt(10, Some(12)));
        assert_eq!(progress.to_advance(), None);
        assert_eq!(progress.begin_storing().1, Mark(12));
        progress.on_settled(&receipt(20, Some(22)));
        assert_eq!(progress.to_advance(), None);
        progress.on_stored();
        // What was settled after the write began is not covered by it (museum M10).
        assert_eq!(progress.to_advance(), Some(Mark(12)));
        progress.on_advanced(Mark(12));
        assert!(progress.has_unstored());
    }

    #[test]
    #[should_panic(expected = "advanced ≤ stored")]
    fn advancing_past_the_checkpoint_panics() {
        let mut progress = Progress::new(Position::default(), Mark(5));
        progress.on_settled(&receipt(10, Some(12)));
        progress.on_advanced(Mark(12));
    }

    #[test]
    fn a_replayed_commit_does_not_lower_the_flush_position() {
        let mut progress = Progress::new(Position::default(), Mark(50));
        progress.on_settled(&receipt(10, Some(12)));
        assert_eq!(progress.flush(), Mark(50));
    }

    #[test]
    fn an_idle_stream_advances_on_foreign_wal_but_not_on_our_own() {
        let start = Instant::now();
        let later = start + Duration::from_secs(31);
        let mut idle = Idle::new(Duration::from_secs(30), start);
        let at = |lsn| receipt(1, Some(lsn));
        idle.reached(at(100_000));
        assert_eq!(idle.due(Mark(1000), None, start), None, "too early");
        assert!(idle.due(Mark(1000), None, later).is_some());
        idle.wrote(Lsn(100_500));
        idle.reached(at(100_600));
        assert_eq!(
            idle.due(Mark(100_000), None, later + Duration::from_secs(31)),
            None,
            "only our own write"
        );
        idle.reached(at(200_000));
        idle.busy();
        assert_eq!(idle.due(Mark(100_000), None, later), None, "an event came in between");
        idle.reached(at(100_000 + IDLE_BYTES));
        assert!(idle.due(Mark(100_000), None, later).is_some(), "much WAL does not wait");
    }

    #[test]
    fn an_idle_stream_that_commits_wait_for_advances_on_the_smallest_write() {
        let start = Instant::now();
        let mut idle = Idle::new(Duration::from_secs(30), start);
        idle.wrote(Lsn(100_000));
        idle.reached(receipt(1, Some(100_100)));
        let second = start + Duration::from_secs(1);
        assert_eq!(idle.due(Mark(100_000), None, second), None, "nobody waits");
        idle.hurry(true);
        assert_eq!(idle.due(Mark(100_000), None, start), None, "not without a pause");
        let due = idle.due(Mark(100_000), None, second).expect("a commit may wait");
        assert_eq!(due.flush(), Some(Mark(100_100)));
        idle.reached(receipt(1, Some(100_100)));
        let later = second + Duration::from_secs(9);
        assert_eq!(idle.due(Mark(100_100), None, later), None, "everything is told");
    }

    #[test]
    fn an_idle_stream_advances_no_further_than_the_last_canary() {
        let start = Instant::now();
        let later = start + Duration::from_secs(31);
        let mut idle = Idle::new(Duration::from_secs(30), start);
        idle.reached(receipt(1, Some(100_000)));
        assert_eq!(idle.due(Mark(1000), Some(Lsn(1000)), later), None, "no canary came");
        let due = idle.due(Mark(1000), Some(Lsn(60_000)), later).expect("up to the canary");
        assert_eq!(due.flush(), Some(Mark(60_000)));
    }

    #[test]
    fn canaries_alone_never_make_an_idle_stream_advance() {
        let start = Instant::now();
        let mut idle = Idle::new(Duration::from_secs(30), start);
        for n in 1..=100_u32 {
            let end = Lsn(100_000 + u64::from(n) * 300);
            idle.wrote_canary(290);
            idle.reached(receipt(1, Some(end.0)));
            let now = start + Duration::from_secs(31) * n;
            assert_eq!(idle.due(Mark(100_000), Some(end), now), None, "canary {n}");
        }
        idle.reached(receipt(1, Some(140_000)));
        let now = start + Duration::from_secs(31) * 101;
        assert!(idle.due(Mark(100_000), Some(Lsn(140_000)), now).is_some(), "somebody else wrote");
    }
}
