//! Parking against its rules: what follows what, what is written when, what may be tried again.

use super::{Disposition, Follows, Known, Limits, Next, Parking, Place};
use crate::position::{Mark, Position};
use crate::relay::checkpoint::rider::Rider;
use crate::relay::parking::row::{Changed, ParkedKey, ParkedRow, Raw, RowState, Why};
use crate::relay::window::{EntryId, Window};
use crate::route::{LaneKeys, OnPoison};
use crate::source::Receipt;
use uuid::Uuid;

fn at(lsn: u64) -> Position {
    Position { epoch: 1, mark: Mark(lsn), ordinal: 1, sub: 0 }
}

fn key(lsn: u64) -> ParkedKey {
    ParkedKey { position: at(lsn), route: "orders".into(), part: 0 }
}

pub(super) fn row(lsn: u64, lanes: LaneKeys, why: Why) -> ParkedRow {
    ParkedRow {
        key: key(lsn),
        state: RowState::Parked,
        why,
        error: "too large".into(),
        attempts: 1,
        id: Uuid::from_u128(lsn.into()),
        source: "watership.outbox".into(),
        key_text: "order/1".into(),
        committed_at_us: 0,
        lanes,
        lanes_keyed: false,
        rules: None,
        raw: Raw::Event("{}".into()),
    }
}

pub(super) fn lane(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: None }
}

fn of_table(lane: u64) -> LaneKeys {
    LaneKeys::One { lane, group: Some(7) }
}

fn entry() -> EntryId {
    Window::new().push(Receipt::new(Position::default(), None), 1, 0)
}

fn park(parking: &mut Parking, row: ParkedRow) -> Disposition {
    let follows = parking.follows(&row.key, row.lanes);
    parking.park(row, entry(), OnPoison::Park, follows, 0.0)
}

fn none_held(_: &str) -> bool {
    false
}

fn sub(position: Position, sub: u32) -> ParkedKey {
    ParkedKey { position: Position { sub, ..position }, route: "orders".into(), part: 0 }
}

fn rows(riders: Vec<Rider>) -> Vec<ParkedRow> {
    let rows = |rider| match rider {
        Rider::Parked(rows) => rows,
        Rider::Unparked(_)
        | Rider::Described(_)
        | Rider::Backfilled(_)
        | Rider::Moved(_)
        | Rider::Changed(_)
        | Rider::Canary(_) => Vec::new(),
    };
    riders.into_iter().flat_map(rows).collect()
}

fn changes(riders: Vec<Rider>) -> Vec<Changed> {
    let changes = |rider| match rider {
        Rider::Unparked(changes) => changes,
        Rider::Parked(_)
        | Rider::Described(_)
        | Rider::Backfilled(_)
        | Rider::Moved(_)
        | Rider::Changed(_)
        | Rider::Canary(_) => Vec::new(),
    };
    riders.into_iter().flat_map(changes).collect()
}

/// Marks everything that is stored as a person would.
fn retry_all(parking: &mut Parking) {
    let indexed =
        |(key, waiting): (&ParkedKey, &super::Waiting)| crate::relay::parking::row::Indexed {
            key: key.clone(),
            state: RowState::Retrying,
            why: waiting.why,
            lanes: waiting.lanes,
            bytes: 1,
            parked_at: 0.0,
        };
    let stored = parking.rows.iter().filter(|(_, w)| w.place == Place::Stored);
    let found = stored.map(indexed).collect();
    parking.reload(found);
}

#[test]
fn later_messages_of_a_parked_lane_follow_and_others_do_not() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    let follows = Some(Follows { state: RowState::Parked, place: Place::Pending });
    assert_eq!(parking.follows(&key(11), lane(1)), follows);
    assert_eq!(parking.follows(&key(11), lane(2)), None);
    assert_eq!(parking.follows(&key(11), LaneKeys::Free), None);
    assert_eq!(parking.follows(&key(9), lane(1)), None, "it stands before the first parked one");
    assert_eq!(parking.follows(&key(11), LaneKeys::Two { lanes: [2, 1], group: 7 }), follows);
}

#[test]
fn a_truncate_follows_its_table_and_its_table_follows_it() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, of_table(1), Why::Invalid));
    assert!(parking.follows(&key(11), of_table(2)).is_none());
    assert!(parking.follows(&key(11), LaneKeys::Barrier { group: 7 }).is_some());
    park(&mut parking, row(11, LaneKeys::Barrier { group: 7 }, Why::Follows));
    assert!(parking.follows(&key(12), of_table(2)).is_some());
    assert!(parking.follows(&key(12), LaneKeys::One { lane: 2, group: Some(8) }).is_none());
}

#[test]
fn what_was_blocked_while_its_key_was_retried_is_written_as_to_be_retried() {
    let limits = Limits { rows: 1, keys: 10 };
    let mut parking = Parking::new(limits, Vec::new(), Known::default());
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    assert_eq!(park(&mut parking, row(11, lane(1), Why::Follows)), Disposition::Blocked);
    parking.take_riders(at(10));
    retry_all(&mut parking);
    let number = parking.load(&key(10), 1);
    parking.confirmed(number);
    assert_eq!(park(&mut parking, row(12, lane(1), Why::Follows)), Disposition::Blocked);
    assert_eq!(parking.unblock().len(), 1);
    let written = rows(parking.take_riders(at(11)));
    assert_eq!(written.iter().map(|row| row.state).collect::<Vec<_>>(), [RowState::Retrying]);
    // A read that brought the second alone must not let it pass the first.
    assert!(parking.is_next(&key(11)) && !parking.is_next(&key(12)));
}

#[test]
fn a_row_is_written_with_the_first_checkpoint_that_passes_it_and_not_before() {
    let mut parking = Parking::default();
    assert_eq!(park(&mut parking, row(10, lane(1), Why::TooLarge)), Disposition::Settled);
    assert!(!parking.has_riders(at(9)));
    assert!(parking.take_riders(at(9)).is_empty());
    assert!(parking.has_riders(at(10)) && parking.pending_bytes() > 0);
    assert_eq!(rows(parking.take_riders(at(10))).len(), 1);
    assert_eq!((parking.pending_bytes(), parking.counts()), (0, (1, 0)));
    assert!(!parking.has_riders(at(99)));
}

#[test]
fn at_the_limit_poison_waits_in_the_window_and_is_parked_when_there_is_room() {
    let limits = Limits { rows: 1, keys: 10 };
    let mut parking = Parking::new(limits, Vec::new(), Known::default());
    assert_eq!(park(&mut parking, row(10, lane(1), Why::TooLarge)), Disposition::Settled);
    assert_eq!(park(&mut parking, row(11, lane(2), Why::TooLarge)), Disposition::Blocked);
    assert_eq!(park(&mut parking, row(12, lane(2), Why::Follows)), Disposition::Blocked);
    let bytes = row(11, lane(2), Why::TooLarge).size();
    assert_eq!(parking.blocked_bytes(), 2 * bytes);
    assert!(parking.unblock().is_empty());
    assert_eq!(parking.blocked_routes().len(), 1);
    parking.take_riders(at(10));
    // A person discards the stored row.
    parking.reload(Vec::new());
    assert_eq!(parking.unblock().len(), 1, "there is room for one");
    assert_eq!(parking.blocked_bytes(), bytes);
    assert!(parking.follows(&key(13), lane(2)).is_some());
    assert!(parking.follows(&key(13), lane(1)).is_none());
}

#[test]
fn a_row_is_written_though_later_ones_that_wait_for_it_have_taken_all_places() {
    for limits in [Limits { rows: 1, keys: 10 }, Limits { rows: 10, keys: 1 }] {
        let mut parking = Parking::new(limits, Vec::new(), Known::default());
        assert_eq!(park(&mut parking, row(20, lane(2), Why::Unroutable)), Disposition::Settled);
        // It was sent before 20 and came back after it; 20 cannot be written before it is.
        let earlier = park(&mut parking, row(10, lane(1), Why::Unroutable));
        assert_eq!(earlier, Disposition::Settled);
        // What comes after both finds no room.
        let later = park(&mut parking, row(30, lane(3), Why::Unroutable));
        assert_eq!(later, Disposition::Blocked);
        assert_eq!(rows(parking.take_riders(at(20))).len(), 2);
    }
}

#[test]
fn beyond_the_most_keys_poison_stays_blocked_and_parked_keys_go_on() {
    let limits = Limits { rows: 10, keys: 1 };
    let mut parking = Parking::new(limits, Vec::new(), Known::default());
    assert_eq!(park(&mut parking, row(10, lane(1), Why::TooLarge)), Disposition::Settled);
    assert_eq!(park(&mut parking, row(11, lane(2), Why::TooLarge)), Disposition::Blocked);
    for _ in 0..3 {
        assert!(parking.unblock().is_empty(), "a tick later it is still one key too many");
    }
    assert_eq!(park(&mut parking, row(12, lane(1), Why::Follows)), Disposition::Settled);
    parking.take_riders(at(12));
    // A person discards the stored rows.
    parking.reload(Vec::new());
    assert_eq!(parking.unblock().len(), 1, "there is room for one key");
}

#[test]
fn a_lane_is_live_again_when_its_last_row_is_on_its_way() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    park(&mut parking, row(11, lane(1), Why::Follows));
    parking.take_riders(at(11));
    retry_all(&mut parking);
    park(&mut parking, row(12, lane(1), Why::Follows));
    let Some(Next::Read(keys)) = parking.next_retry(none_held) else {
        panic!("rows are to be read")
    };
    assert_eq!(keys, [key(10), key(11)]);
    let first = parking.load(&key(10), 1);
    let second = parking.load(&key(11), 1);
    assert!(parking.follows(&key(13), lane(1)).is_some(), "one is still waiting");
    let Some(Next::Pending(pending)) = parking.next_retry(none_held) else {
        panic!("one is in memory")
    };
    assert_eq!(pending.key, key(12));
    parking.load(&key(12), 1);
    assert!(parking.follows(&key(13), lane(1)).is_none());
    parking.confirmed(first);
    parking.confirmed(second);
    let released: Vec<ParkedKey> =
        changes(parking.take_riders(at(11))).into_iter().map(|change| change.key).collect();
    assert_eq!(released, [key(10), key(11)]);
}

#[test]
fn a_row_that_fails_again_stops_the_rows_behind_it() {
    let mut parking = Parking::default();
    for (lsn, why) in [(10, Why::TooLarge), (11, Why::Follows), (12, Why::Follows)] {
        park(&mut parking, row(lsn, lane(1), why));
    }
    parking.take_riders(at(12));
    retry_all(&mut parking);
    parking.refused(&key(10), Why::TooLarge, "still too large".into());
    assert!(parking.next_retry(none_held).is_none());
    let changed = changes(parking.take_riders(at(12)));
    assert!(changed.iter().all(|change| change.state == RowState::Parked));
    assert_eq!(changed.len(), 3);
    assert_eq!(parking.counts(), (3, 0));
}

#[test]
fn a_row_behind_a_parked_one_of_another_lane_waits_for_it() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, of_table(1), Why::TooLarge));
    park(&mut parking, row(11, LaneKeys::Two { lanes: [1, 2], group: 7 }, Why::Follows));
    parking.take_riders(at(11));
    // Only the second is marked: by hand, past the command line.
    let mut found: Vec<_> = Vec::new();
    for (key, waiting) in &parking.rows {
        let second = key.position == at(11);
        found.push(crate::relay::parking::row::Indexed {
            key: key.clone(),
            state: if second { RowState::Retrying } else { RowState::Parked },
            why: waiting.why,
            lanes: waiting.lanes,
            bytes: 1,
            parked_at: 0.0,
        });
    }
    parking.reload(found);
    assert!(parking.next_retry(none_held).is_none());
}

#[test]
fn what_an_earlier_session_parked_is_known_until_the_checkpoint_has_passed_it() {
    let id = Uuid::from_u128(1);
    let known = Known { ids: [(id, "orders".into(), 0)].into(), until: Mark(10) };
    let mut parking = Parking::new(Limits::default(), Vec::new(), known);
    assert!(parking.is_known(id, "orders", 0) && !parking.is_known(id, "other", 0));
    parking.take_riders(at(10));
    assert!(parking.is_known(id, "orders", 0));
    parking.take_riders(at(11));
    assert!(!parking.is_known(id, "orders", 0) && parking.is_idle());
}

#[test]
fn a_parked_truncate_of_a_second_table_is_written_with_the_checkpoint_that_passes_it() {
    let mut parking = Parking::default();
    let mut second = row(10, LaneKeys::Barrier { group: 7 }, Why::Unroutable);
    second.key = sub(at(10), 1);
    park(&mut parking, second);
    assert!(!parking.has_riders(at(10)), "the first table is settled, the second is not");
    let both = Position { sub: 1, ..at(10) };
    assert!(parking.has_riders(both));
    assert_eq!(rows(parking.take_riders(both)).len(), 1);
}

#[test]
fn what_was_parked_behind_a_row_after_a_person_asked_for_it_goes_with_it() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    parking.take_riders(at(10));
    // A person marks the row; before that is seen, another one is written behind it.
    park(&mut parking, row(11, lane(1), Why::Follows));
    parking.take_riders(at(11));
    let found = |(lsn, state, why)| crate::relay::parking::row::Indexed {
        key: key(lsn),
        state,
        why,
        lanes: lane(1),
        bytes: 1,
        parked_at: 0.0,
    };
    let marked = (10, RowState::Retrying, Why::TooLarge);
    let behind = (11, RowState::Parked, Why::Follows);
    parking.reload([marked, behind].map(found).to_vec());
    let Some(Next::Read(keys)) = parking.next_retry(none_held) else { panic!("one is to be read") };
    assert_eq!(keys, [key(10)], "of the other it is not written yet that it is to be tried");
    let changed = changes(parking.take_riders(at(11)));
    let changed: Vec<_> = changed.iter().map(|c| (c.key.clone(), c.state)).collect();
    assert_eq!(changed, [(key(11), RowState::Retrying)]);
    let Some(Next::Read(keys)) = parking.next_retry(none_held) else {
        panic!("both are to be read")
    };
    assert_eq!(keys, [key(10), key(11)]);
}

#[test]
fn rows_of_a_held_route_leave_the_others_room() {
    let mut parking = Parking::default();
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    let mut other = row(11, lane(2), Why::TooLarge);
    other.key.route = "other".into();
    park(&mut parking, other);
    parking.take_riders(at(11));
    retry_all(&mut parking);
    let Some(Next::Read(keys)) = parking.next_retry(|route| route == "orders") else {
        panic!("one is to be read")
    };
    assert_eq!(keys.iter().map(|key| &*key.route).collect::<Vec<_>>(), ["other"]);
}

#[test]
fn what_comes_behind_an_unrouted_row_on_its_way_waits_for_its_confirm() {
    let mut parking = Parking::default();
    let unrouted = |lsn| ParkedKey { position: at(lsn), route: "".into(), part: 0 };
    let mut first = row(10, lane(1), Why::NoRoute);
    first.key = unrouted(10);
    park(&mut parking, first);
    parking.take_riders(at(10));
    retry_all(&mut parking);
    let number = parking.load(&unrouted(10), 1);
    assert!(parking.has_unrouted() && !parking.is_idle());
    let follows = parking.follows(&unrouted(11), lane(1));
    assert_eq!(follows.map(|f| f.state), Some(RowState::Retrying));
    assert_eq!(parking.follows(&unrouted(11), lane(2)), None);
    parking.confirmed(number);
    assert!(!parking.has_unrouted());
    assert_eq!(parking.follows(&unrouted(11), lane(1)), None);
}

#[test]
fn bytes_that_are_on_their_way_leave_less_for_the_next_read() {
    let large = |lsn| crate::relay::parking::row::Indexed {
        key: key(lsn),
        state: RowState::Retrying,
        why: Why::TooLarge,
        lanes: lane(u64::from(lsn as u8)),
        bytes: super::RETRYING_BYTES / 2 + 1,
        parked_at: 0.0,
    };
    let mut parking = Parking::default();
    parking.reload((10..16).map(large).collect());
    let Some(Next::Read(keys)) = parking.next_retry(none_held) else { panic!("two fit") };
    assert_eq!(keys, [key(10), key(11)]);
    let numbers: Vec<_> = keys.iter().map(|key| parking.load(key, 1)).collect();
    assert!(parking.next_retry(none_held).is_none(), "what was read before still counts");
    parking.confirmed(numbers[0]);
    let Some(Next::Read(keys)) = parking.next_retry(none_held) else { panic!("one fits again") };
    assert_eq!(keys, [key(12)]);
}

#[test]
fn a_blocked_row_that_cannot_be_published_lets_the_other_retries_go() {
    let limits = Limits { rows: 1, keys: usize::MAX };
    let mut parking = Parking::new(limits, Vec::new(), Known::default());
    park(&mut parking, row(10, lane(1), Why::TooLarge));
    assert_eq!(park(&mut parking, row(20, lane(1), Why::Follows)), Disposition::Blocked);
    parking.take_riders(at(15));
    retry_all(&mut parking);
    let number = parking.load(&key(10), 1);
    let Some(Next::Blocked(first, _)) = parking.next_retry(none_held) else { panic!("20 follows") };
    parking.refused_blocked(&first.key, Why::TooLarge, "larger than by now".into());
    assert!(parking.next_retry(none_held).is_none(), "it waits for a person");
    assert_eq!(parking.follows(&key(30), lane(1)).map(|f| f.state), Some(RowState::Parked));
    parking.confirmed(number);
    assert_eq!(parking.unblock().len(), 1, "and is parked for its own reason");
    let written = rows(parking.take_riders(at(20)));
    assert_eq!((written[0].why, written[0].error.as_str()), (Why::TooLarge, "larger than by now"));
}
