//! Which rows wait for which: rows of a lane for each other, all rows of a table for a truncate,
//! and it for them. Pure.

use std::collections::{BTreeSet, HashSet};
use std::ops::Bound;

use super::Parking;
use crate::relay::parking::row::ParkedKey;
use crate::route::LaneKeys;

/// A set in which a row stands.
#[derive(Debug, Clone, Copy)]
pub(super) enum Set {
    Lane(u64),
    Table(u64),
    Barriers(u64),
}

impl Set {
    pub(super) fn hash(self) -> u64 {
        match self {
            Set::Lane(hash) | Set::Table(hash) | Set::Barriers(hash) => hash,
        }
    }
}

pub(super) fn sets(lanes: LaneKeys) -> impl Iterator<Item = Set> {
    let sets = match lanes {
        LaneKeys::Free => [None; 3],
        LaneKeys::One { lane, group } => [Some(Set::Lane(lane)), group.map(Set::Table), None],
        LaneKeys::Two { lanes: [a, b], group } => {
            [Some(Set::Lane(a)), Some(Set::Lane(b)), Some(Set::Table(group))]
        }
        LaneKeys::Barrier { group } => [Some(Set::Table(group)), Some(Set::Barriers(group)), None],
    };
    sets.into_iter().flatten()
}

/// Lanes in which something stands that the rest must wait for, in a walk by position.
#[derive(Debug, Default)]
pub(super) struct Blocking {
    lanes: HashSet<u64>,
    tables: HashSet<u64>,
    barriers: HashSet<u64>,
}

impl Blocking {
    pub(super) fn add(&mut self, lanes: LaneKeys) {
        for set in sets(lanes) {
            match set {
                Set::Lane(lane) => self.lanes.insert(lane),
                Set::Table(table) => self.tables.insert(table),
                Set::Barriers(table) => self.barriers.insert(table),
            };
        }
    }

    pub(super) fn holds(&self, lanes: LaneKeys) -> bool {
        match lanes {
            LaneKeys::Free => false,
            LaneKeys::One { lane, group } => {
                self.lanes.contains(&lane) || group.is_some_and(|g| self.barriers.contains(&g))
            }
            LaneKeys::Two { lanes: [a, b], group } => {
                self.lanes.contains(&a) || self.lanes.contains(&b) || self.barriers.contains(&group)
            }
            LaneKeys::Barrier { group } => self.tables.contains(&group),
        }
    }
}

impl Parking {
    /// The rows that may only follow this one: of its lanes, and truncates of its table, behind
    /// which everything waits.
    pub(super) fn behind(&self, key: &ParkedKey) -> Vec<ParkedKey> {
        let after = |set: Option<&BTreeSet<ParkedKey>>| -> Vec<ParkedKey> {
            let after = (Bound::Excluded(key), Bound::Unbounded);
            set.map_or(Vec::new(), |set| set.range::<ParkedKey, _>(after).cloned().collect())
        };
        let mut found = Vec::new();
        let lanes = self.rows[key].lanes;
        for set in sets(lanes) {
            found.extend(match set {
                Set::Lane(lane) => after(self.lanes.get(&lane)),
                Set::Table(table) if matches!(lanes, LaneKeys::Barrier { .. }) => {
                    after(self.tables.get(&table))
                }
                Set::Table(table) => after(self.barriers.get(&table)),
                Set::Barriers(_) => Vec::new(),
            });
        }
        found
    }
}
