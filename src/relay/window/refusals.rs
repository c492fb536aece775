//! Routes whose messages the broker refuses for now: said once when it begins and once when it
//! ends, and shown meanwhile. How they are sent is in `relay/window/lanes/refusing`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::message::{ExchangeId, RouteId};
use crate::metrics::Metrics;
use crate::relay::window::lanes::Lanes;
use crate::route::Router;

/// How often all messages of the window are looked at for the oldest one of each route.
const OLDEST_EVERY: Duration = Duration::from_secs(1);

/// A route that is refused, as `/status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RefusedRoute {
    /// The route.
    pub route: String,
    /// The exchange of the destination that refuses longest; empty for the default one.
    pub exchange: String,
    /// Its routing key.
    pub routing_key: String,
    /// Routing keys that are refused.
    pub destinations: usize,
    /// Messages that wait, each of another key.
    pub waiting: usize,
    /// Since when it has been refused, in seconds.
    pub for_seconds: f64,
}

/// What of it is known at one tick.
#[derive(Debug, Clone)]
struct Now {
    exchange: ExchangeId,
    routing_key: String,
    since: Instant,
    destinations: usize,
    waiting: usize,
    nacks: u64,
}

/// The routes that were refused at the last tick.
#[derive(Debug)]
pub struct Refusals {
    routes: BTreeMap<RouteId, Now>,
    oldest_at: Option<Instant>,
}

impl Refusals {
    /// None yet.
    pub fn new() -> Self {
        Self { routes: BTreeMap::new(), oldest_at: None }
    }

    /// Logs what has begun and ended since the last call, sets the gauges, and returns what is
    /// refused now.
    pub fn tick(
        &mut self,
        lanes: &Lanes,
        router: &Router,
        metrics: &Metrics,
        now: Instant,
    ) -> Vec<RefusedRoute> {
        self.set_oldest(lanes, metrics, now);
        let found = by_route(lanes);
        if found.is_empty() && self.routes.is_empty() {
            return Vec::new();
        }
        let exchanges = router.exchanges();
        let exchange = |id: ExchangeId| exchanges.get(usize::from(id.0)).map_or("", |name| name);
        for (route, refused) in &found {
            let seconds = now.saturating_duration_since(refused.since).as_secs_f64();
            metrics.routes[usize::from(route.0)].refused_seconds.set(seconds);
            if !self.routes.contains_key(route) {
                tracing::warn!(
                    route = router.by_id(*route).name,
                    exchange = exchange(refused.exchange),
                    routing_key = refused.routing_key,
                    messages = refused.waiting,
                    keys = refused.waiting,
                    hint = "a queue behind this destination is full or has no majority: see \
                            `rabbitmqctl list_queues`; nothing is lost, and it is retried at \
                            increasing intervals",
                    "the broker refuses messages of the route; they wait"
                );
            }
        }
        for (route, refused) in self.routes.iter().filter(|(route, _)| !found.contains_key(route)) {
            metrics.routes[usize::from(route.0)].refused_seconds.set(0.0);
            tracing::info!(
                route = router.by_id(*route).name,
                exchange = exchange(refused.exchange),
                routing_key = refused.routing_key,
                nacks = refused.nacks,
                seconds = now.saturating_duration_since(refused.since).as_secs(),
                "the broker accepts all messages of the route again"
            );
        }
        let shown = found.iter().map(|(route, refused)| RefusedRoute {
            route: router.by_id(*route).name.clone(),
            exchange: exchange(refused.exchange).to_owned(),
            routing_key: refused.routing_key.clone(),
            destinations: refused.destinations,
            waiting: refused.waiting,
            for_seconds: now.saturating_duration_since(refused.since).as_secs_f64(),
        });
        let shown = shown.collect();
        self.routes = found;
        shown
    }

    fn set_oldest(&mut self, lanes: &Lanes, metrics: &Metrics, now: Instant) {
        let due = |at| now.saturating_duration_since(at) >= OLDEST_EVERY;
        if !self.oldest_at.is_none_or(due) {
            return;
        }
        self.oldest_at = Some(now);
        let oldest = lanes.oldest();
        for (index, route) in metrics.routes.iter().enumerate() {
            let at = u16::try_from(index).ok().and_then(|index| oldest.get(&RouteId(index)));
            let age = at.map_or(Duration::ZERO, |at| now.saturating_duration_since(*at));
            route.oldest_unsettled_seconds.set(age.as_secs_f64());
        }
    }
}

impl Default for Refusals {
    fn default() -> Self {
        Self::new()
    }
}

/// The destinations of each route, as one.
fn by_route(lanes: &Lanes) -> BTreeMap<RouteId, Now> {
    let mut routes: BTreeMap<RouteId, Now> = BTreeMap::new();
    for refused in lanes.refused() {
        let routing_key = || String::from_utf8_lossy(refused.routing_key).into_owned();
        let of_route = routes.entry(refused.route).or_insert_with(|| Now {
            exchange: refused.exchange,
            routing_key: routing_key(),
            since: refused.since,
            destinations: 0,
            waiting: 0,
            nacks: 0,
        });
        if refused.since < of_route.since {
            of_route.since = refused.since;
            (of_route.exchange, of_route.routing_key) = (refused.exchange, routing_key());
        }
        of_route.destinations += 1;
        of_route.waiting += refused.waiting;
        of_route.nacks += refused.nacks;
    }
    routes
}
