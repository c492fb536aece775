//! Series of what could not be published. `relay/observed` sets the gauges, from what
//! `relay/parking/shown` adds up.

use metrics::{Counter, Gauge, counter, gauge};

use super::RouteLabel;

/// Messages that could not be published (labels `route`, `kind`; the route is empty for events that
/// no route selects).
#[derive(Clone)]
pub struct ParkedMetrics {
    by_route: Vec<ParkedKind>,
    /// Unreleased rows.
    pub rows: Gauge,
    /// Messages that may not be parked and block their keys.
    pub blocked: Gauge,
    /// Keys that are parked or blocked.
    pub keys: Gauge,
    /// Age of the oldest row or blocked message, in seconds; 0 without one.
    pub oldest_seconds: Gauge,
    /// Messages that were tried again.
    pub retried: Counter,
    /// Rows that a promoted server lacks, as far as this process knows.
    pub lost: Counter,
}

#[derive(Clone)]
struct ParkedKind {
    route: String,
    kind: &'static str,
    parked: Counter,
    rows: Gauge,
}

/// Why messages are parked; the label `kind`.
const PARKED_KINDS: [&str; 8] =
    ["too_large", "invalid", "drift", "no_route", "unroutable", "nacked", "refused", "follows"];

impl ParkedMetrics {
    pub(super) fn new(routes: &[RouteLabel]) -> Self {
        let names = routes.iter().map(|route| &*route.name).chain([""]);
        let series = |route: &str, kind: &'static str| {
            let labels = [("route", route.to_owned()), ("kind", kind.to_owned())];
            ParkedKind {
                route: route.to_owned(),
                kind,
                parked: counter!("watership_messages_parked_total", &labels),
                rows: gauge!("watership_parked_rows", &labels),
            }
        };
        let kinds = |route| PARKED_KINDS.iter().map(move |kind| series(route, kind));
        Self {
            by_route: names.flat_map(kinds).collect(),
            rows: gauge!("watership_parked"),
            blocked: gauge!("watership_parked_blocked"),
            keys: gauge!("watership_parked_keys"),
            oldest_seconds: gauge!("watership_parked_oldest_seconds"),
            retried: counter!("watership_parked_retried_total"),
            lost: counter!("watership_parked_lost_total"),
        }
    }

    /// Counts one message that was parked.
    pub fn count(&self, route: &str, kind: &str) {
        for series in self.by_route.iter().filter(|s| s.route == route && s.kind == kind) {
            series.parked.increment(1);
        }
    }

    /// Sets how many rows wait, by route and kind; those that `count` does not know have none.
    pub fn set_rows(&self, count: impl Fn(&str, &str) -> usize) {
        for series in &self.by_route {
            series.rows.set(count(&series.route, series.kind) as f64);
        }
    }
}
