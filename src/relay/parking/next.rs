//! Which rows are tried again next. Pure.
//!
//! Only rows that are to be tried again are looked at, each at its own place in its lanes, and none
//! of a route that has no room: with many thousands of rows this is asked after every confirm.

use std::collections::BTreeSet;

use super::{LOADED_MAX, Next, Parking, Place, RETRYING_BYTES, RETRYING_MAX};
use crate::relay::parking::row::{ParkedKey, RowState, Why};
use crate::route::LaneKeys;

impl Parking {
    /// The next rows to try again: they head all of their lanes, or only such rows stand before
    /// them. Those of a `held` route would only lie in memory.
    pub fn next_retry(&mut self, held: impl Fn(&str) -> bool) -> Option<Next> {
        if self.loaded.len() >= LOADED_MAX {
            return None;
        }
        let mut bytes = self.loaded_bytes;
        let mut chosen = BTreeSet::new();
        for (route, keys) in &self.retrying {
            if held(route) {
                continue;
            }
            let mut of_route = self.loaded_of.get(route).copied().unwrap_or(0);
            for key in keys {
                if of_route >= RETRYING_MAX || bytes > RETRYING_BYTES {
                    break;
                }
                let waiting = &self.rows[key];
                // Until it is written that it is to be tried again, it cannot be read.
                let unwritten = waiting.place == Place::Stored && self.changes.contains_key(key);
                if unwritten || !self.is_free(key, waiting.lanes, &chosen) {
                    continue;
                }
                match waiting.place {
                    Place::Stored => {
                        bytes += waiting.bytes;
                        of_route += 1;
                        chosen.insert(key.clone());
                    }
                    // Behind rows that are still to be read: their turn comes.
                    Place::Pending | Place::Blocked if !chosen.is_empty() => {}
                    Place::Pending => return self.pending.get(key).cloned().map(Next::Pending),
                    Place::Blocked if waiting.why == Why::Follows => {
                        let blocked = &self.blocked[key];
                        return Some(Next::Blocked(blocked.row.clone(), blocked.entry));
                    }
                    Place::Blocked => {}
                }
            }
        }
        (!chosen.is_empty()).then(|| Next::Read(chosen.into_iter().collect()))
    }

    /// Whether all rows before this one in its lanes are `chosen`. If the one right before it in a
    /// lane is, those before that are, too; a truncate asks for each row of its table.
    pub(super) fn is_free(
        &self,
        key: &ParkedKey,
        lanes: LaneKeys,
        chosen: &BTreeSet<ParkedKey>,
    ) -> bool {
        let free = |set: Option<&BTreeSet<ParkedKey>>| {
            let before = set.and_then(|set| set.range(..key).next_back());
            before.is_none_or(|before| chosen.contains(before))
        };
        let lane = |lane: &u64| free(self.lanes.get(lane));
        let barrier = |group: &u64| free(self.barriers.get(group));
        match lanes {
            LaneKeys::Free => true,
            LaneKeys::One { lane: l, group } => lane(&l) && group.as_ref().is_none_or(barrier),
            LaneKeys::Two { lanes: [a, b], group } => lane(&a) && lane(&b) && barrier(&group),
            LaneKeys::Barrier { group } => self
                .tables
                .get(&group)
                .is_none_or(|set| set.range(..key).all(|before| chosen.contains(before))),
        }
    }

    /// Notes that a row is to be tried again, or not any more.
    pub(super) fn note_retrying(&mut self, key: &ParkedKey, state: RowState) {
        if state == RowState::Retrying {
            self.retrying.entry(key.route.clone()).or_default().insert(key.clone());
        } else if let Some(keys) = self.retrying.get_mut(&key.route) {
            keys.remove(key);
            if keys.is_empty() {
                self.retrying.remove(&key.route);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::position::{Mark, Position};
    use crate::relay::parking::order::Blocking;
    use crate::relay::parking::row::Indexed;
    use crate::relay::parking::{Known, Limits};

    fn lanes() -> impl Strategy<Value = LaneKeys> {
        prop_oneof![
            Just(LaneKeys::Free),
            (0..4_u64).prop_map(|lane| LaneKeys::One { lane, group: None }),
            (4..8_u64).prop_map(|lane| LaneKeys::One { lane, group: Some(9) }),
            (4..8_u64, 4..8_u64).prop_map(|(a, b)| LaneKeys::Two { lanes: [a, b], group: 9 }),
            Just(LaneKeys::Barrier { group: 9 }),
        ]
    }

    proptest! {
        /// Against a walk over all rows by position, which remembers what stands in which lane.
        #[test]
        fn the_same_rows_go_as_in_a_walk_over_all_of_them(
            rows in proptest::collection::vec((lanes(), any::<bool>()), 0..24),
        ) {
            let row = |(at, (lanes, retrying)): (usize, &(LaneKeys, bool))| Indexed {
                key: ParkedKey {
                    position: Position { epoch: 1, mark: Mark(at as u64), ordinal: 1, sub: 0 },
                    route: "orders".into(),
                    part: 0,
                },
                state: if *retrying { RowState::Retrying } else { RowState::Parked },
                why: Why::TooLarge,
                lanes: *lanes,
                bytes: 1,
                parked_at: 0.0,
            };
            let rows: Vec<Indexed> = rows.iter().enumerate().map(row).collect();
            let (mut blocking, mut expected) = (Blocking::default(), Vec::new());
            for row in &rows {
                if row.state == RowState::Retrying && !blocking.holds(row.lanes) {
                    expected.push(row.key.clone());
                } else {
                    blocking.add(row.lanes);
                }
            }
            let mut parking = Parking::new(Limits::default(), rows, Known::default());
            let read = match parking.next_retry(|_| false) {
                Some(Next::Read(keys)) => keys,
                Some(other) => panic!("{other:?}"),
                None => Vec::new(),
            };
            prop_assert_eq!(read, expected);
        }
    }
}
