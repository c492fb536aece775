//! How much may be parked, and what an earlier session parked beyond the checkpoint. A row that
//! does not fit is blocked: it stays in the window until `Parking::unblock` can park it.

use std::collections::{BTreeSet, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use uuid::Uuid;

use crate::position::Mark;
use crate::relay::parking::Parking;
use crate::relay::parking::row::{ParkedKey, ParkedRow, ROW_BYTES_MAX, RowState, Why};
use crate::route::LaneKeys;

/// Limits of `watership.parked`, for one relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most unreleased rows.
    pub rows: usize,
    /// Most lanes that are parked.
    pub keys: usize,
}

impl Default for Limits {
    /// No limits; those of a relay come from its configuration.
    fn default() -> Self {
        Self { rows: usize::MAX, keys: usize::MAX }
    }
}

/// Rows of any state that a replay may come upon: id and route, and where the last of them is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Ids of events, or of messages, with the route and the part.
    pub ids: HashSet<(Uuid, Arc<str>, u16)>,
    /// Mark of the last one.
    pub until: Mark,
}

impl Parking {
    /// Whether parking this row would exceed a limit.
    ///
    /// Pending rows after this one do not count: they cannot be written until this one is, so
    /// waiting for them would never end. The limits can therefore be exceeded by up to a window of
    /// rows.
    pub(super) fn is_full(&self, row: &ParkedRow) -> bool {
        if row.size() > ROW_BYTES_MAX {
            return true;
        }
        let after = (Bound::Excluded(&row.key), Bound::Unbounded);
        let waits = |(_, row): &(&ParkedKey, &ParkedRow)| row.state != RowState::Released;
        let later = || self.pending.range::<ParkedKey, _>(after).filter(waits);
        let rows = self.rows.len() - self.blocked.len() + self.loaded.len();
        if let Some(more) = rows.checked_sub(self.limits.rows)
            && later().take(more + 1).count() <= more
        {
            return true;
        }
        // What is blocked is not parked: its key may still be one too many.
        let takes_place = |key: &ParkedKey| {
            !self.blocked.contains_key(key) && (*key <= row.key || !self.pending.contains_key(key))
        };
        let parked = |keys: &BTreeSet<ParkedKey>| keys.iter().any(takes_place);
        let is_new = |lane: &u64| !self.lanes.get(lane).is_some_and(parked);
        let new_lane = match row.lanes {
            LaneKeys::One { lane, .. } => is_new(&lane),
            LaneKeys::Two { lanes: [a, b], .. } => is_new(&a) || is_new(&b),
            LaneKeys::Free | LaneKeys::Barrier { .. } => false,
        };
        if !new_lane || self.lanes.len() < self.limits.keys {
            return false;
        }
        // With thousands of blocked keys the walk is long, and each of them asks for it.
        let mut full_from = self.keys_full_from.borrow_mut();
        if full_from.as_ref().is_some_and(|from| row.key >= *from) {
            return true;
        }
        let lanes = self.lanes.values().filter(|keys| parked(keys)).take(self.limits.keys);
        let full = lanes.count() >= self.limits.keys;
        if full {
            *full_from = Some(row.key.clone());
        }
        full
    }

    /// A blocked row that was to be tried again cannot be published either: it is parked for that
    /// reason when it may be.
    pub fn refused_blocked(&mut self, key: &ParkedKey, why: Why, error: String) {
        self.set_state(key, RowState::Parked);
        self.rows.get_mut(key).expect("blocked rows are rows").why = why;
        let row = &mut self.blocked.get_mut(key).expect("it is blocked").row;
        (row.state, row.why, row.error) = (RowState::Parked, why, error);
        row.attempts += 1;
        self.park_followers(key);
    }
}
