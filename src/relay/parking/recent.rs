//! Rows that were written to `watership.parked` lately, so that a failover can tell which of them
//! the new primary lacks. Pure.
//!
//! A row is written with the checkpoint that passes it, and the slot is advanced after that. If the
//! old primary dies before the standby has received that write, while the slot's copy has already
//! moved on, the event is neither streamed again nor parked.

use std::collections::VecDeque;

use crate::position::Lsn;
use crate::relay::checkpoint::rider::Rider;
use crate::relay::parking::row::{ParkedKey, RowState};

/// Rows that are remembered.
const ROWS_MAX: usize = 8_192;

/// Rows that the sessions of this process gave to a checkpoint, by their key.
#[derive(Debug, Default)]
pub struct RecentlyParked(VecDeque<ParkedKey>);

impl RecentlyParked {
    /// These go with a checkpoint.
    pub fn written(&mut self, riders: &[Rider]) {
        for rider in riders {
            match rider {
                Rider::Parked(rows) => {
                    let waits = rows.iter().filter(|row| row.state != RowState::Released);
                    self.0.extend(waits.map(|row| row.key.clone()));
                }
                Rider::Unparked(changes) => {
                    let done = changes.iter().filter(|change| change.state == RowState::Released);
                    let done: Vec<&ParkedKey> = done.map(|change| &change.key).collect();
                    if !done.is_empty() {
                        self.0.retain(|key| !done.contains(&key));
                    }
                }
                Rider::Described(_)
                | Rider::Backfilled(_)
                | Rider::Moved(_)
                | Rider::Changed(_)
                | Rider::Canary(_) => {}
            }
        }
        let excess = self.0.len().saturating_sub(ROWS_MAX);
        self.0.drain(..excess);
    }

    /// Forgets everything, and returns the rows of transactions that the stream does not bring
    /// again, committed from `from` up to `to`, which are not there.
    pub fn take_missing(
        &mut self,
        from: Lsn,
        to: Lsn,
        is_there: impl Fn(&ParkedKey) -> bool,
    ) -> Vec<ParkedKey> {
        let all = std::mem::take(&mut self.0);
        let passed = |key: &ParkedKey| (from..to).contains(&key.position.mark.lsn());
        all.into_iter().filter(|key| passed(key) && !is_there(key)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Mark, Position};
    use crate::relay::parking::row::Changed;
    use crate::relay::parking::row::Why;
    use crate::relay::parking::tests::{lane, row};

    fn parked(marks: &[u64]) -> Rider {
        Rider::Parked(marks.iter().map(|mark| row(*mark, lane(1), Why::TooLarge)).collect())
    }

    #[test]
    fn rows_that_were_passed_and_are_not_there_are_named() {
        let mut recent = RecentlyParked::default();
        recent.written(&[parked(&[10, 20, 30, 40, 50])]);
        let key = row(30, lane(1), Why::TooLarge).key;
        let released = Changed { key, state: RowState::Released, why: None };
        recent.written(&[Rider::Unparked(vec![released])]);
        let there = |key: &ParkedKey| key.position.mark == Mark(20);
        let missing = recent.take_missing(Lsn(20), Lsn(50), there);
        let marks: Vec<u64> = missing.iter().map(|key| key.position.mark.0).collect();
        assert_eq!(marks, [40], "20 is there, 30 was published, 50 is streamed again");
        assert_eq!(recent.take_missing(Lsn(0), Lsn(u64::MAX), |_| false), [], "forgotten");
    }

    #[test]
    fn memory_is_bounded() {
        let mut recent = RecentlyParked::default();
        let marks: Vec<u64> = (0..ROWS_MAX as u64 + 5).collect();
        recent.written(&[parked(&marks)]);
        let missing = recent.take_missing(Lsn(0), Lsn(u64::MAX), |_| false);
        assert_eq!(missing.len(), ROWS_MAX);
        assert_eq!(missing[0].position, Position { mark: Mark(5), ..missing[0].position });
    }
}
