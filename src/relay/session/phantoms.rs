//! What was published lately, so that a failover can tell what of it does not exist any more.
//!
//! Events beyond the point where the new timeline left the old one were rolled away by the
//! promotion. They are out and cannot be called back; they are counted. Pure.

use std::collections::VecDeque;

use crate::position::{Lsn, Mark};

/// Transactions that are remembered; with more, the count is a lower bound.
const TRANSACTIONS_MAX: usize = 8_192;

/// Events handed to the publisher by the sessions of this process, by transaction.
#[derive(Debug, Default)]
pub struct RecentlyPublished {
    /// (mark, events), in commit order.
    transactions: VecDeque<(Mark, u64)>,
}

impl RecentlyPublished {
    /// One event of the transaction with this mark.
    pub fn event(&mut self, mark: Mark) {
        // After a new start the same transactions come again.
        match self.transactions.back_mut() {
            Some((last, count)) if *last == mark => *count += 1,
            Some((last, _)) if *last > mark => {
                while self.transactions.back().is_some_and(|(last, _)| *last >= mark) {
                    self.transactions.pop_back();
                }
                self.transactions.push_back((mark, 1));
            }
            Some(_) | None => self.transactions.push_back((mark, 1)),
        }
        if self.transactions.len() > TRANSACTIONS_MAX {
            self.transactions.pop_front();
        }
    }

    /// Forgets everything and says how many events lay at or beyond `switch`.
    pub fn take_beyond(&mut self, switch: Lsn) -> u64 {
        let all = std::mem::take(&mut self.transactions);
        all.iter().filter(|(mark, _)| mark.lsn() >= switch).map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_events_beyond_the_switch_are_counted_and_each_once() {
        let mut published = RecentlyPublished::default();
        for lsn in [10, 20, 20, 20, 30, 30] {
            published.event(Mark(lsn));
        }
        assert_eq!(published.take_beyond(Lsn(20)), 5);
        assert_eq!(published.take_beyond(Lsn(0)), 0, "forgotten");
    }

    #[test]
    fn memory_is_bounded() {
        let mut published = RecentlyPublished::default();
        for lsn in 0..TRANSACTIONS_MAX as u64 * 2 {
            published.event(Mark(lsn));
        }
        assert_eq!(published.take_beyond(Lsn(0)), TRANSACTIONS_MAX as u64);
    }
}
