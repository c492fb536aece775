//! How large the next chunk is, and when it may come. Pure.
//!
//! A chunk holds back the live changes of its table while it is read, and what is settled behind it
//! while it is sent. So it is kept so small that neither takes long; and after a chunk that had to
//! be given up, smaller still.

use std::time::Duration;

/// A chunk that takes longer to read is smaller next time.
const READ_WANTED: Duration = Duration::from_millis(20);
/// The same of a chunk from its first row to the last confirm.
const SENT_WANTED: Duration = Duration::from_millis(250);
/// Below this many rows, what a chunk takes is not a matter of its rows.
const FEW: usize = 100;
/// The first chunk has this many rows.
const FIRST: usize = 500;
/// How long live changes may be held while a chunk is read.
pub const HOLD: Duration = Duration::from_millis(50);
/// The same for a chunk of one row that was given up again and again: it could never be read
/// otherwise.
const HOLD_MAX: Duration = Duration::from_secs(5);

/// The pace of one run.
#[derive(Debug, Clone)]
pub struct Pace {
    rows: usize,
    max: usize,
    hold: Duration,
    /// Rows a second; 0 means as fast as it goes.
    rate: u32,
}

impl Pace {
    /// Chunks of `max` rows at most, and `rate` rows a second; 0 for no such limit.
    pub fn new(max: usize, rate: u32) -> Self {
        // So that the rate is kept within each second, too.
        let share = if rate == 0 { max } else { (rate as usize / 4).max(1) };
        let max = max.min(share);
        Self { rows: FIRST.min(max), max, hold: HOLD, rate }
    }

    /// Rows of the next chunk.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How long live changes may be held for it.
    pub fn hold(&self) -> Duration {
        self.hold
    }

    /// The chunk was given up.
    pub fn given_up(&mut self) {
        if self.rows == 1 {
            self.hold = (self.hold * 2).min(HOLD_MAX);
        }
        self.rows = (self.rows / 2).max(1);
    }

    /// A chunk of `rows` was stored: how long it took to read, to send, and in all. Returns how
    /// long to wait before the next one.
    pub fn done(&mut self, rows: usize, read: Duration, sent: Duration, all: Duration) -> Duration {
        let few = FEW.min(self.max);
        let slow = read > READ_WANTED || sent > SENT_WANTED;
        let quick = read < READ_WANTED / 2 && sent < SENT_WANTED / 2;
        if slow && self.rows > few {
            self.rows = (self.rows / 2).max(few);
        } else if quick || self.rows < few {
            self.rows = (self.rows * 2).min(self.max);
        }
        if self.rows > 1 {
            self.hold = HOLD;
        }
        match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(rows as f64 / f64::from(rate)).saturating_sub(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn chunks_grow_while_they_are_quick_and_shrink_when_they_are_not() {
        let mut pace = Pace::new(3_000, 0);
        let mut sizes = Vec::new();
        for (read, sent) in [(2, 20), (2, 20), (2, 20), (15, 20), (15, 300), (30, 40)] {
            sizes.push(pace.rows());
            let rows = pace.rows();
            assert_eq!(pace.done(rows, MS * read, MS * sent, MS * 400), Duration::ZERO);
        }
        assert_eq!(sizes, [500, 1_000, 2_000, 3_000, 3_000, 1_500]);
        assert_eq!(pace.rows(), 750);
        for _ in 0..9 {
            pace.done(1, MS * 30, MS * 300, MS * 400);
        }
        assert_eq!(pace.rows(), FEW, "fewer would not be faster");
        assert_eq!(Pace::new(50, 0).rows(), 50);
    }

    #[test]
    fn a_chunk_that_is_given_up_comes_again_smaller_and_one_row_is_given_more_time() {
        let mut pace = Pace::new(3, 0);
        let mut tries = Vec::new();
        for _ in 0..9 {
            tries.push((pace.rows(), pace.hold().as_millis()));
            pace.given_up();
        }
        let rows: Vec<_> = tries.iter().map(|(rows, _)| *rows).collect();
        assert_eq!(rows, [3, 1, 1, 1, 1, 1, 1, 1, 1]);
        let holds: Vec<_> = tries.iter().map(|(_, hold)| *hold).collect();
        assert_eq!(holds, [50, 50, 100, 200, 400, 800, 1_600, 3_200, 5_000]);
        pace.done(1, MS * 30, MS, MS);
        assert_eq!((pace.rows(), pace.hold()), (2, HOLD));
    }

    #[test]
    fn a_rate_is_kept_by_smaller_chunks_and_waits() {
        let mut pace = Pace::new(5_000, 1_000);
        assert_eq!(pace.rows(), 250);
        assert_eq!(pace.done(250, MS, MS * 10, MS * 50), MS * 200);
        assert_eq!(pace.done(250, MS, MS * 10, MS * 400), Duration::ZERO);
    }
}
