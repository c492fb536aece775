//! How long to wait before the next try: exponential with full jitter.
//!
//! The random number is passed in, so that the file stays pure and tests are exact.

use std::time::Duration;

/// A growing upper bound for the wait; the wait itself is uniform below it (full jitter).
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    tries: u32,
}

impl Backoff {
    /// Waits grow from `first` by doubling and never exceed `limit`.
    pub fn new(first: Duration, limit: Duration) -> Self {
        assert!(first > Duration::ZERO && first <= limit, "0 < first <= limit");
        Self { first, limit, tries: 0 }
    }

    /// The next wait; `random` is uniform in 0.0..1.0.
    ///
    /// Never below half of the first bound: a wait of zero is a busy loop.
    pub fn next(&mut self, random: f64) -> Duration {
        let bound = self.first.saturating_mul(1 << self.tries.min(20)).min(self.limit);
        self.tries = self.tries.saturating_add(1);
        bound.mul_f64(random.clamp(0.0, 1.0)).max(self.first / 2)
    }

    /// How many waits were handed out since the last reset.
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Begins again at the first bound, after health.
    pub fn reset(&mut self) {
        self.tries = 0;
    }

    /// Keeps the number of tries but changes the limit: short while a peer is away, long where a
    /// person is needed.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit.max(self.first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit_and_starts_again_after_reset() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(50), ms(1000));
        let waits: Vec<_> = (0..7).map(|_| backoff.next(1.0)).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000].map(ms));
        backoff.reset();
        assert_eq!(backoff.next(1.0), ms(50));
    }

    #[test]
    fn never_waits_zero() {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        assert_eq!(backoff.next(0.0), Duration::from_millis(25));
    }
}
