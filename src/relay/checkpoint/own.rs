//! What this process itself last took or stored of its checkpoint row.
//!
//! A row only ever goes forward. One that lies before what this process knows it wrote has been
//! set back, by a restore of an older state that took the timeline with it, or by hand; nothing in
//! the database can tell. And a row whose session number is not the next one was in other hands.

use std::sync::{Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::position::{Lsn, Position};
use crate::relay::checkpoint::Checkpoint;
use crate::relay::window::remembered::Remembered;
use crate::verdict::{RESYNC, Verdict};

/// Shared by the sessions, their store, and the upkeep.
#[derive(Debug, Default)]
pub struct OwnCheckpoint(Mutex<Option<LastKnown>>);

/// A state of the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastKnown {
    system_id: u64,
    timeline: u32,
    session_no: i64,
    position: Position,
    flush_lsn: Lsn,
}

impl OwnCheckpoint {
    /// The last state that is known. For a comparison with the row it is read before the row is:
    /// a session that runs moves both on.
    pub fn last_known(&self) -> Option<LastKnown> {
        *self.lock()
    }

    /// A session of this process took the row over: what is remembered is good only if nobody else
    /// has had the row in between.
    pub fn took(&self, row: &Checkpoint, remembered: &mut Remembered) {
        let mut last = self.lock();
        if !last.is_some_and(|mark| mark.precedes(row)) {
            remembered.forget();
        }
        *last = Some(LastKnown {
            system_id: row.system_id,
            timeline: row.timeline,
            session_no: row.session_no,
            position: row.position,
            flush_lsn: row.flush_lsn,
        });
    }

    /// The session that took the row stored this.
    pub fn stored(&self, position: Position, flush_lsn: Lsn) {
        if let Some(mark) = &mut *self.lock() {
            (mark.position, mark.flush_lsn) = (position, flush_lsn);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<LastKnown>> {
        self.0.lock().expect("nobody panics while holding the mark")
    }
}

impl LastKnown {
    /// The row has not gone back since. Rows of another history say nothing: LSNs are compared
    /// only on one timeline of one cluster, and a later epoch may begin anywhere.
    ///
    /// # Errors
    /// A verdict.
    pub fn verify(&self, row: &Checkpoint) -> Result<()> {
        let same_history = (row.system_id, row.timeline) == (self.system_id, self.timeline);
        if !same_history || row.position.epoch > self.position.epoch {
            return Ok(());
        }
        let back = row.position < self.position
            || row.flush_lsn < self.flush_lsn
            || row.session_no < self.session_no;
        if !back {
            return Ok(());
        }
        let text = format!(
            "the checkpoint went back: it is at {} (flush {}, session {}), and this process has \
             seen it at {} (flush {}, session {}); events between the two were published already",
            row.position,
            row.flush_lsn,
            row.session_no,
            self.position,
            self.flush_lsn,
            self.session_no
        );
        Err(Error::named(Verdict::CheckpointWentBack, text).hint(format!(
            "find out whether an older state was restored, or who changed the row; then continue \
             from the row in a new epoch, which repeats events and skips none: \
             {RESYNC} --anyway --from checkpoint"
        )))
    }

    /// The session that took `row` is the next one after this state: nobody else has had it.
    fn precedes(&self, row: &Checkpoint) -> bool {
        let same_history = (row.system_id, row.timeline) == (self.system_id, self.timeline);
        same_history
            && row.position.epoch == self.position.epoch
            && Some(row.session_no) == self.session_no.checked_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Mark;
    use crate::source::SourceKind;

    fn row() -> Checkpoint {
        Checkpoint {
            kind: SourceKind::Wal,
            position: Position { epoch: 2, mark: Mark(100), ordinal: 3, ..Position::default() },
            flush_lsn: Lsn(90),
            session_no: 7,
            slot: "shop".into(),
            system_id: 42,
            timeline: 1,
            publication: "watership".into(),
            publication_oid: 5,
        }
    }

    /// What is found of the row, changed, by a process that took it as it is.
    fn found(change: impl FnOnce(&mut Checkpoint)) -> (Result<()>, bool) {
        let own = OwnCheckpoint::default();
        own.took(&row(), &mut Remembered::default());
        let mut now = row();
        change(&mut now);
        let mark = own.last_known().expect("it took the row");
        (mark.verify(&now), mark.precedes(&now))
    }

    #[test]
    fn a_row_that_lies_before_what_this_process_knows_is_a_verdict() {
        type Change = fn(&mut Checkpoint);
        let back: [Change; 5] = [
            |row| row.position.ordinal = 2,
            |row| row.position.mark = Mark(99),
            |row| row.flush_lsn = Lsn(89),
            |row| row.session_no = 6,
            |row| row.position.epoch = 1,
        ];
        for change in back {
            let (verdict, next) = found(change);
            let error = verdict.expect_err("it went back");
            assert_eq!(error.verdict(), Some(Verdict::CheckpointWentBack));
            assert!(error.hint_or_kind().contains("--anyway --from checkpoint"), "{error:?}");
            assert!(!next);
        }
    }

    #[test]
    fn a_row_that_went_on_or_is_of_another_history_is_none() {
        type Change = fn(&mut Checkpoint);
        let on: [Change; 5] = [
            |_| {},
            |row| row.position.mark = Mark(101),
            |row| (row.session_no, row.flush_lsn) = (9, Lsn(95)),
            |row| (row.timeline, row.position, row.flush_lsn) = (2, Position::default(), Lsn(1)),
            |row| (row.system_id, row.session_no) = (43, 1),
        ];
        for change in on {
            let (verdict, next) = found(change);
            assert!(verdict.is_ok() && !next, "{verdict:?}");
        }
        // A person accepted a gap: the new epoch begins where they said.
        let resync = |row: &mut Checkpoint| {
            row.position = Position { epoch: 3, mark: Mark(50), ..Position::default() };
            (row.flush_lsn, row.session_no) = (Lsn(50), 8);
        };
        let (verdict, next) = found(resync);
        assert!(verdict.is_ok() && !next, "{verdict:?}");
    }

    #[test]
    fn only_the_next_session_goes_on_from_what_was_stored() {
        let own = OwnCheckpoint::default();
        own.stored(Position::default(), Lsn(0));
        assert_eq!(own.last_known(), None, "nothing was taken");
        own.took(&row(), &mut Remembered::default());
        let position = Position { mark: Mark(200), ..row().position };
        own.stored(position, Lsn(190));
        let next = Checkpoint { position, flush_lsn: Lsn(190), session_no: 8, ..row() };
        let mark = own.last_known().expect("it took the row");
        assert!(mark.verify(&next).is_ok() && mark.precedes(&next));
        assert!(mark.verify(&row()).is_err(), "before what was stored");
        assert!(!mark.precedes(&Checkpoint { session_no: 9, ..next }), "somebody else had it");
    }
}
