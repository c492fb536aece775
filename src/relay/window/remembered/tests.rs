//! Sessions in short: messages come in source order, are left out or sent, and some are confirmed.

use uuid::Uuid;

use super::{Confirms, MessageKey, PRUNE_AT_LEAST, Remembered};
use crate::message::RouteId;
use crate::position::{Mark, Position};
use crate::route::LaneKeys;

const TABLE: u64 = 77;

fn at(place: u64) -> Position {
    Position { epoch: 1, mark: Mark(place), ordinal: 1, ..Position::default() }
}

fn key(place: u64, route: u16) -> MessageKey {
    MessageKey { id: Uuid::from_u128(place.into()), route: RouteId(route), part: 0 }
}

fn one(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: None }
}

fn row(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: Some(TABLE) }
}

/// One session; a message is known by its place in the source.
struct Session {
    confirms: Confirms,
    /// What a checkpoint covers.
    stored: Position,
    remembered: Remembered,
}

impl Session {
    fn new(remembered: Remembered) -> Self {
        Self { confirms: Confirms::new(), stored: Position::default(), remembered }
    }

    /// The message comes; true when it is left out.
    fn comes(&mut self, place: u64, lanes: LaneKeys, confirmed: bool) -> bool {
        self.comes_on(0, place, lanes, confirmed)
    }

    fn comes_on(&mut self, route: u16, place: u64, lanes: LaneKeys, confirmed: bool) -> bool {
        let key = key(place, route);
        let left_out = self.remembered.leaves_out(key, at(place), lanes);
        if left_out || confirmed {
            self.confirms.add(at(place), key);
        }
        left_out
    }

    /// The broker is lost.
    fn ends(self) -> Self {
        let released = std::iter::empty();
        Self::new(self.remembered.after(&self.confirms, self.stored, released))
    }
}

/// The session after one in which place 1 was not confirmed, and these messages were.
fn after(confirmed: &[(u64, LaneKeys)]) -> Session {
    let mut first = Session::new(Remembered::default());
    first.comes(1, LaneKeys::Free, false);
    for (place, lanes) in confirmed {
        first.comes(*place, *lanes, true);
    }
    first.ends()
}

#[test]
fn only_what_was_confirmed_behind_an_open_entry_is_left_out_and_only_once() {
    let mut first = Session::new(Remembered::default());
    for (place, confirmed) in [(1, true), (2, false), (3, true), (4, true), (5, false)] {
        first.comes(place, one(place), confirmed);
    }
    first.stored = at(1);
    let mut second = first.ends();
    assert_eq!(second.remembered.len(), 2, "a checkpoint covers place 1");
    let left_out = |place| second.comes(place, one(place), false);
    assert_eq!([1, 2, 3, 4, 5, 3].map(left_out), [false, false, true, true, false, false]);
    assert!(second.remembered.is_empty());
}

#[test]
fn another_message_of_the_same_id_is_sent() {
    let mut second = after(&[(2, one(1)), (3, one(2)), (4, one(3))]);
    assert!(!second.comes_on(1, 2, one(9), false), "another route's");
    let other = MessageKey { part: 1, ..key(3, 0) };
    assert!(!second.remembered.leaves_out(other, at(3), one(8)), "another part");
    assert!(!second.remembered.leaves_out(key(4, 0), at(3), one(3)), "another position");
    assert!(second.comes(3, one(2), false));
}

#[test]
fn what_follows_a_message_that_is_sent_again_is_sent_again() {
    let two = LaneKeys::Two { lanes: [1, 2], group: TABLE };
    let truncate = LaneKeys::Barrier { group: TABLE };
    let follows = [
        (one(1), one(1)),
        (two, row(1)),
        (two, row(2)),
        (row(2), two),
        (row(1), truncate),
        (two, truncate),
        (truncate, row(3)),
        (truncate, two),
        (truncate, truncate),
        (LaneKeys::Free, LaneKeys::Free),
    ];
    for (sent, then) in follows {
        let mut second = after(&[(3, then), (4, one(99))]);
        assert!(!second.comes(2, sent, false));
        assert!(!second.comes(3, then, false), "{then:?} follows {sent:?}");
        assert!(second.comes(4, one(99), false), "it follows nothing");
    }
    let apart = [(one(1), one(2)), (row(1), row(2)), (one(1), truncate), (LaneKeys::Free, one(1))];
    for (sent, then) in apart {
        let mut second = after(&[(3, then)]);
        assert!(!second.comes(2, sent, false));
        assert!(second.comes(3, then, false), "{then:?} does not follow {sent:?}");
    }
}

#[test]
fn what_follows_a_parked_row_that_is_tried_again_is_sent_again() {
    let mut second = after(&[(2, one(1)), (3, one(2))]);
    second.remembered.sends(RouteId(0), one(1));
    assert!(!second.comes(2, one(1), false));
    assert!(second.comes(3, one(2), false));
}

#[test]
fn what_a_short_session_did_not_come_to_is_remembered_in_the_next_one() {
    let mut second = after(&[(2, one(1)), (3, one(2)), (4, one(3))]);
    assert!(second.comes(2, one(1), false));
    let mut third = second.ends();
    assert_eq!(third.remembered.len(), 3);
    for place in 2..5 {
        assert!(third.comes(place, one(place - 1), false), "{place}");
    }
}

/// Lane 1 of place 3 was confirmed first, place 2 of the same lane only in the second session: were
/// place 3 left out in the third, place 2 would be the last that arrived.
#[test]
fn an_older_confirm_does_not_cover_what_was_sent_since() {
    let mut second = after(&[(3, one(1))]);
    assert!(!second.comes(2, one(1), true));
    let mut third = second.ends();
    assert!(third.comes(2, one(1), false), "its own confirm is as new as its sending");
    assert!(!third.comes(3, one(1), false));
}

#[test]
fn beyond_the_last_remembered_place_nothing_is_kept() {
    let mut second = after(&[(2, one(1)), (3, one(2))]);
    assert!(!second.comes(4, one(3), false));
    assert!(second.remembered.is_empty());
    let mut forgetful = after(&[(2, one(1))]);
    forgetful.remembered.forget();
    assert!(!forgetful.comes(2, one(1), false));
}

#[test]
fn the_log_of_confirms_is_bounded_by_what_no_checkpoint_covers() {
    let mut session = Session::new(Remembered::default());
    for place in 1..=20 * PRUNE_AT_LEAST as u64 {
        session.comes(place, one(1), true);
        session.stored = at(place);
        session.confirms.prune(session.stored);
        assert!(session.confirms.log.len() <= PRUNE_AT_LEAST);
    }
    assert!(session.ends().remembered.is_empty());
}
