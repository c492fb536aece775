//! What others see of what is parked: counts by route, lane and age, and what was released
//! unwritten. Pure.

use std::collections::BTreeMap;

use super::{Blocked, Parking};
use crate::relay::parking::row::{ParkedRow, RowState, Why};

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

    /// Rows that are not released, as (route, why): how many.
    pub fn by_route(&self) -> BTreeMap<(&str, Why), usize> {
        let mut counts = BTreeMap::new();
        let loaded = self.loaded.values().map(|l| (&l.key, &l.waiting));
        for (key, waiting) in self.rows.iter().chain(loaded) {
            *counts.entry((&*key.route, waiting.why)).or_default() += 1;
        }
        counts
    }

    /// Rows that are not released, lanes that are parked, and since when the oldest row is there.
    pub fn summary(&self) -> (usize, usize, Option<f64>) {
        let oldest = self.rows.values().map(|w| w.parked_at).min_by(f64::total_cmp);
        (self.rows.len() + self.loaded.len(), self.lanes.len(), oldest)
    }
}
