//! Batches (everything between two snapshots, of any size), places in them, and when to look for
//! the next one. Pure.
//!
//! Invariant: a batch is what `snapshot` shows and `since` does not, in the order of `seq`; both
//! are stored before anything of it is handed on. So an event has the same position on every
//! attempt, whatever was committed in between.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::pg::outbox::MappedColumn;
use crate::position::{Mark, ORDINAL_END, Position};
use crate::source::outbox::Polled;

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The mark of its events.
    pub number: Mark,
    /// What was known before, a `pg_snapshot` as text.
    pub since: String,
    /// What was visible when it was found.
    pub snapshot: String,
    /// The lowest `seq` of its rows; an event's ordinal is its distance from here.
    pub first_seq: i64,
    /// The range of `seq` of rows whose transactions began after `since`, if there are any.
    pub new: Option<(i64, i64)>,
    /// When it was found, in microseconds since 1970-01-01 UTC.
    pub made_at_us: i64,
    /// The table of its rows, `schema.table`.
    pub outbox: String,
    /// What it was made with; absent for the relay's own outbox, and where it is not known.
    pub made_with: Option<MadeWith>,
}

/// What found the rows of a batch, by numbers that stay the same under another name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MadeWith {
    /// OID of the table.
    pub table: u32,
    /// `attnum` of the column that grows with each insert.
    pub order_by: i32,
    /// `attnum` of the column with the transaction.
    pub xid: i32,
}

impl MadeWith {
    /// That of a table with this OID and these columns; absent where a column is not there.
    pub fn of(table: u32, polled: &Polled, columns: &[MappedColumn]) -> Option<Self> {
        let number = |name: &str| {
            let column = columns.iter().find(|column| column.name == name);
            column.map(|column| column.number)
        };
        Some(Self { table, order_by: number(&polled.order_by)?, xid: number(&polled.xid)? })
    }

    /// The three, as statements store them.
    pub fn stored(made_with: Option<Self>) -> (Option<u32>, Option<i32>, Option<i32>) {
        match made_with {
            Some(Self { table, order_by, xid }) => (Some(table), Some(order_by), Some(xid)),
            None => (None, None, None),
        }
    }
}

/// Where the reading of a batch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchCursor {
    /// Rows behind this one come next, in the order of `seq` and of what tells rows with one `seq`
    /// apart; without the latter, rows with a greater `seq`.
    pub after: (i64, Option<String>),
    /// Number of the row `after` among those with its `seq`.
    sub: Option<u32>,
    last: Option<Position>,
}

impl BatchCursor {
    /// At the first row that an earlier session had not settled, or at rows beside it.
    pub fn begin(batch: &Batch, resume_after: Position) -> Self {
        let skipped = match resume_after.mark == batch.number {
            // The row itself comes again, because others may have its seq.
            true => i64::try_from(resume_after.ordinal).unwrap_or(i64::MAX).saturating_sub(1),
            false => 0,
        };
        let seq = batch.first_seq.saturating_add(skipped.max(0)).saturating_sub(1);
        Self { after: (seq, None), sub: None, last: None }
    }

    /// Moves to the next row and says where it stands.
    ///
    /// # Errors
    /// [`crate::error::Kind::Protocol`] when `seq` lies before the batch, or so far behind its
    /// beginning that a position cannot say it.
    pub fn pass(&mut self, batch: &Batch, epoch: u32, seq: i64, tie: String) -> Result<Position> {
        let beside = self.sub.filter(|_| seq == self.after.0);
        let sub = beside.map_or(0, |sub| sub.saturating_add(1));
        (self.after, self.sub) = ((seq, Some(tie)), Some(sub));
        let distance = seq.checked_sub(batch.first_seq).and_then(|far| u64::try_from(far).ok());
        let ordinal = distance.map(|far| far + 1).filter(|ordinal| *ordinal < ORDINAL_END);
        let ordinal = ordinal.ok_or_else(|| {
            let (number, first) = (batch.number.0, batch.first_seq);
            Error::protocol(format!(
                "a row of batch {number} has seq {seq}, too far from its first, {first}"
            ))
            .hint("only the default of the column may set seq: find out who has set it")
        })?;
        let position = Position { epoch, mark: batch.number, ordinal, sub };
        self.last = Some(position);
        Ok(position)
    }

    /// The last position that was passed; without one, where the batch begins.
    pub fn last(&self, batch: &Batch, epoch: u32) -> Position {
        let begin = Position { epoch, mark: batch.number, ordinal: 0, sub: 0 };
        self.last.unwrap_or(begin)
    }
}

/// How often the outbox is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// While events come.
    pub min: Duration,
    /// After a while without any.
    pub max: Duration,
}

/// Looks in a row that find nothing before the interval grows.
const EMPTY_LOOKS: u32 = 20;

/// When to look next: at the shortest interval while events come and a little longer, then at
/// intervals that double.
#[derive(Debug)]
pub struct LookPace {
    interval: Interval,
    now: Duration,
    empty: u32,
    due: Instant,
}

impl LookPace {
    /// The first look is due at once.
    pub fn new(interval: Interval, now: Instant) -> Self {
        Self { interval, now: interval.min, empty: 0, due: now }
    }

    /// When the next look is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// A look that began at `at` has found something, or not.
    pub fn looked(&mut self, at: Instant, found: bool) {
        if found {
            (self.empty, self.now) = (0, self.interval.min);
        } else {
            self.empty = self.empty.saturating_add(1);
            if self.empty > EMPTY_LOOKS {
                self.now = (self.now * 2).min(self.interval.max);
            }
        }
        self.due = at + self.now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        Batch {
            number: Mark(7),
            since: "10:10:".into(),
            snapshot: "12:12:".into(),
            first_seq: 100,
            new: Some((100, 120)),
            made_at_us: 1,
            outbox: "watership.outbox".into(),
            made_with: None,
        }
    }

    fn pass(cursor: &mut BatchCursor, seq: i64) -> (u64, u32) {
        let position = cursor.pass(&batch(), 3, seq, String::new()).expect("a position");
        assert_eq!((position.epoch, position.mark), (3, Mark(7)));
        (position.ordinal, position.sub)
    }

    #[test]
    fn a_place_hangs_on_the_first_row_only_and_rows_with_one_seq_are_told_apart() {
        let mut cursor = BatchCursor::begin(&batch(), Position::default());
        assert_eq!(cursor.after, (99, None));
        let places = [100, 104, 104, 104, 105].map(|seq| pass(&mut cursor, seq));
        assert_eq!(places, [(1, 0), (5, 0), (5, 1), (5, 2), (6, 0)]);
        assert_eq!(cursor.after.0, 105);
    }

    #[test]
    fn what_was_settled_in_the_batch_is_not_read_again_but_for_the_last_row() {
        let settled = |mark, ordinal| Position { mark: Mark(mark), ordinal, ..Position::default() };
        let at = |mark, ordinal| BatchCursor::begin(&batch(), settled(mark, ordinal)).after.0;
        assert_eq!([at(7, 5), at(7, 1), at(7, 0), at(6, 5)], [103, 99, 99, 99]);
        let mut cursor = BatchCursor::begin(&batch(), settled(7, 5));
        assert_eq!([104, 104, 105].map(|seq| pass(&mut cursor, seq)), [(5, 0), (5, 1), (6, 0)]);
    }

    #[test]
    fn a_seq_that_no_position_can_say_is_an_error() {
        for seq in [99, i64::MIN, 100 + (1 << 40), i64::MAX] {
            let mut cursor = BatchCursor::begin(&batch(), Position::default());
            let error = cursor.pass(&batch(), 1, seq, String::new()).expect_err("out of range");
            assert!(error.to_string().contains("batch 7"), "{error}");
        }
    }

    #[test]
    fn looks_are_frequent_while_events_come_and_rare_after_a_while() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut pace = LookPace::new(Interval { min: ms(5), max: ms(1000) }, start);
        assert_eq!(pace.due(), start);
        for _ in 0..EMPTY_LOOKS {
            pace.looked(start, false);
            assert_eq!(pace.due(), start + ms(5));
        }
        let waits = [10, 20, 40, 80, 160, 320, 640, 1000, 1000];
        for wait in waits {
            pace.looked(start, false);
            assert_eq!(pace.due(), start + ms(wait));
        }
        pace.looked(start, true);
        assert_eq!(pace.due(), start + ms(5));
    }
}
