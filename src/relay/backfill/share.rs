//! How many messages of rows may be unconfirmed at the same time, so that live events are not late.
//! Pure.
//!
//! What waits in the broker makes everything after it wait, so the share follows how long confirms
//! of rows take, as TCP Vegas follows round trips: it grows by one a round while they take about
//! as long as with a single row on its way, and is halved when most take longer. Every few seconds
//! it begins again with one row, because a queue that always stands hides how quick the broker is.
//! Without live events there is nobody to be late for, and the share only grows.

use std::time::{Duration, Instant};

/// Confirms may take this many times the shortest, and [`LEEWAY`] more.
const TIMES: u32 = 2;
/// What timers and wake-ups add to either.
const LEEWAY: Duration = Duration::from_millis(1);
/// How long the shortest time counts, and how often it is measured again.
const EPOCH: Duration = Duration::from_secs(10);

/// The share of one session's backfills.
#[derive(Debug)]
pub struct Share {
    max: usize,
    allowed: usize,
    /// Nothing took long since the epoch began: the share doubles with each round.
    is_quick: bool,
    /// Confirms until the round ends: as many as were allowed when it began.
    left: usize,
    /// Confirms of this round that took long.
    late: usize,
    /// A live message was confirmed in this round.
    beside_live: bool,
    /// The shortest confirm of this epoch, and of the one before it.
    shortest: [Option<Duration>; 2],
    began: Option<Instant>,
}

impl Share {
    /// At most `max` messages.
    pub fn new(max: usize) -> Self {
        let (late, beside_live, shortest, began) = Default::default();
        let one = 1;
        Self { max, allowed: one, is_quick: true, left: one, late, beside_live, shortest, began }
    }

    /// Messages that may be unconfirmed.
    pub fn allowed(&self) -> usize {
        self.allowed
    }

    /// A live message was confirmed.
    pub fn live(&mut self) {
        self.beside_live = true;
    }

    /// A message of a row was confirmed, `took` after it was handed over.
    pub fn confirmed(&mut self, took: Duration, now: Instant) {
        let began = *self.began.get_or_insert(now);
        if now.saturating_duration_since(began) >= EPOCH {
            self.shortest = [None, self.shortest[0]];
            self.began = Some(now);
            self.is_quick = true;
            self.start_round(1);
            return;
        }
        let this = self.shortest[0].map_or(took, |shortest| shortest.min(took));
        self.shortest[0] = Some(this);
        let shortest = self.shortest[1].map_or(this, |before| before.min(this));
        self.late += usize::from(took > shortest * TIMES + LEEWAY);
        self.left -= 1;
        if self.left == 0 {
            self.end_round();
        }
    }

    fn end_round(&mut self) {
        // A disk makes single ones late.
        let is_late = self.late * 2 > self.allowed;
        let allowed = if is_late && self.beside_live {
            self.is_quick = false;
            self.allowed / 2
        } else if self.is_quick {
            self.allowed * 2
        } else {
            self.allowed + 1
        };
        self.start_round(allowed);
    }

    fn start_round(&mut self, allowed: usize) {
        self.allowed = allowed.clamp(1, self.max);
        self.left = self.allowed;
        self.late = 0;
        self.beside_live = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A share whose confirms take as long as `takes` says for what is allowed.
    fn after(share: &mut Share, rounds: usize, now: Instant, takes: fn(u32) -> u32, live: bool) {
        for _ in 0..rounds {
            for _ in 0..share.allowed() {
                if live {
                    share.live();
                }
                let allowed = u32::try_from(share.allowed()).expect("it is small");
                share.confirmed(MS * takes(allowed), now);
            }
        }
    }

    #[test]
    fn it_doubles_until_confirms_take_longer_then_stays_near_that() {
        let (mut share, now) = (Share::new(100), Instant::now());
        let takes = |allowed| 1 + allowed / 8;
        let mut seen = Vec::new();
        for _ in 0..16 {
            seen.push(share.allowed());
            after(&mut share, 1, now, takes, true);
        }
        assert_eq!(seen, [1, 2, 4, 8, 16, 32, 16, 17, 18, 19, 20, 21, 22, 23, 24, 12]);
    }

    #[test]
    fn without_live_events_it_only_grows() {
        let (mut share, now) = (Share::new(100), Instant::now());
        after(&mut share, 8, now, |allowed| allowed, false);
        assert_eq!(share.allowed(), 100);
        after(&mut share, 1, now, |_| 500, true);
        assert_eq!(share.allowed(), 50, "a live event came");
        after(&mut share, 6, now, |_| 500, true);
        assert_eq!(share.allowed(), 1, "there is always one on its way");
    }

    #[test]
    fn a_broker_that_has_become_slower_for_good_is_measured_anew() {
        let (mut share, now) = (Share::new(8), Instant::now());
        after(&mut share, 4, now, |_| 1, true);
        assert_eq!(share.allowed(), 8);
        after(&mut share, 4, now, |_| 10, true);
        assert_eq!(share.allowed(), 1);
        // Two epochs later nothing is known of the time when it was quick.
        for epoch in 1..=2 {
            share.confirmed(MS * 10, now + EPOCH * epoch);
            assert_eq!(share.allowed(), 1, "it begins again");
            after(&mut share, 1, now + EPOCH * epoch, |_| 10, true);
        }
        after(&mut share, 3, now + EPOCH * 2, |_| 10, true);
        assert_eq!(share.allowed(), 8);
    }
}
