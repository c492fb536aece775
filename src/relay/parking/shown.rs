//! What others see of what is parked: counts by route, lane and age, and what was released
//! unwritten. Pure.

use std::collections::BTreeMap;

use super::{Blocked, Parking, Place};
use crate::relay::parking::row::{ParkedRow, RowState, Why};

/// Counts of what is parked or blocked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Rows that are parked and not released.
    pub rows: usize,
    /// Messages that may not be parked, for now or at all.
    pub blocked: usize,
    /// Keys that are parked or blocked.
    pub keys: usize,
    /// When the oldest of them was parked or blocked, in seconds since 1970.
    pub oldest_at: Option<f64>,
}

impl Parking {
    /// Names of the routes that have blocked rows.
    pub fn blocked_routes(&self) -> BTreeMap<&str, &ParkedRow> {
        let mut routes = BTreeMap::new();
        for (key, Blocked { row, .. }) in &self.blocked {
            routes.entry(&*key.route).or_insert(row);
        }
        routes
    }

    /// Rows that are in memory and not in the table: pending ones and blocked ones.
    pub fn unwritten(&self) -> impl Iterator<Item = &ParkedRow> {
        let waiting = self.pending.values().filter(|row| row.state != RowState::Released);
        waiting.chain(self.blocked.values().map(|blocked| &blocked.row))
    }

    /// Rows that were published before a checkpoint passed them: nothing durable tells of them.
    pub fn released_unwritten(&self) -> impl Iterator<Item = &ParkedRow> {
        self.pending.values().filter(|row| row.state == RowState::Released)
    }

    /// Rows that are parked and not released, as (route, why): how many.
    pub fn by_route(&self) -> BTreeMap<(&str, Why), usize> {
        let mut counts = BTreeMap::new();
        let loaded = self.loaded.values().map(|l| (&l.key, &l.waiting));
        let rows = self.rows.iter().filter(|(_, waiting)| waiting.place != Place::Blocked);
        for (key, waiting) in rows.chain(loaded) {
            *counts.entry((&*key.route, waiting.why)).or_default() += 1;
        }
        counts
    }

    /// Counts of what is parked or blocked.
    pub fn summary(&self) -> Summary {
        let oldest_at = self.rows.values().map(|w| w.parked_at).min_by(f64::total_cmp);
        let blocked = self.blocked.len();
        let rows = self.rows.len() - blocked + self.loaded.len();
        Summary { rows, blocked, keys: self.lanes.len(), oldest_at }
    }
}
