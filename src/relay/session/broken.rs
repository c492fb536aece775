//! Which routes it concerns that something is wrong in the broker. Pure.
//!
//! They begin held, with what the broker said, and the others flow. Where a thing is known to be
//! missing, the route is not probed before it is there: a probe could reach the route's other
//! queues, be confirmed, and hide that one of them gets nothing.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use crate::amqp::topology::{Binding, Destination, Thing, Topology, Wrong};
use crate::message::RouteId;
use crate::route::{Action, Rule};

/// A route that begins held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenRoute {
    /// Which one.
    pub route: RouteId,
    /// What the broker said.
    pub reason: String,
    /// A thing of it is known to be missing.
    pub missing: bool,
}

/// Routes of which a thing is known to be missing, and held ones where nothing is wrong any more.
#[derive(Debug, Default)]
pub struct Missing(Mutex<Looked>);

#[derive(Debug, Default)]
struct Looked {
    missing: BTreeSet<RouteId>,
    well: BTreeSet<RouteId>,
}

impl Missing {
    /// A session begins, and these are all.
    pub fn set(&self, broken: &[BrokenRoute]) {
        let missing = broken.iter().filter(|broken| broken.missing);
        let missing = missing.map(|broken| broken.route).collect();
        *self.lock() = Looked { missing, well: BTreeSet::new() };
    }

    /// Only these are left.
    pub fn keep(&self, left: &BTreeSet<RouteId>) {
        self.lock().missing.retain(|route| left.contains(route));
    }

    /// Somebody looked, and nothing is wrong with what these held routes come through.
    pub fn set_well(&self, well: BTreeSet<RouteId>) {
        self.lock().well = well;
    }

    /// The routes that were found well since the last call.
    pub fn take_well(&self) -> BTreeSet<RouteId> {
        std::mem::take(&mut self.lock().well)
    }

    /// Whether the route is one of them.
    pub fn has(&self, route: RouteId) -> bool {
        self.lock().missing.contains(&route)
    }

    fn lock(&self) -> MutexGuard<'_, Looked> {
        self.0.lock().expect("nobody panics while holding it")
    }
}

/// The routes whose messages come through what is wrong, as it is configured.
pub fn routes(topology: &Topology, rules: &[Rule], wrong: &[Wrong]) -> Vec<BrokenRoute> {
    let mut broken = Vec::new();
    for (route, things) in things(topology, rules) {
        let of_route: Vec<&Wrong> =
            wrong.iter().filter(|wrong| things.contain(&wrong.thing)).collect();
        if of_route.is_empty() {
            continue;
        }
        let reasons: Vec<String> = of_route.iter().map(|wrong| wrong.error.to_string()).collect();
        let missing = of_route.iter().any(|wrong| wrong.missing);
        broken.push(BrokenRoute { route, reason: reasons.join("; "), missing });
    }
    broken
}

/// The part of the topology that messages of these routes come through.
pub fn part(topology: &Topology, rules: &[Rule], of: &BTreeSet<RouteId>) -> Topology {
    let all = things(topology, rules).into_iter();
    let of: Vec<Things> = all.filter(|(id, _)| of.contains(id)).map(|(_, things)| things).collect();
    let any = |thing: Thing| of.iter().any(|things| things.contain(&thing));
    let mut part = topology.clone();
    part.exchanges.retain(|exchange| any(Thing::Exchange(exchange.name.clone())));
    part.queues.retain(|queue| any(Thing::Queue(queue.name.clone())));
    part.bindings.retain(|binding| any(Thing::Binding(binding.clone())));
    part
}

/// Only what is missing, and the bindings that are lost with it.
pub fn lost(mut topology: Topology, missing: &[Thing]) -> Topology {
    let is_lost = |thing: Thing| missing.contains(&thing);
    topology.bindings.retain(|binding| {
        is_lost(destination(binding)) || is_lost(Thing::Exchange(binding.exchange.clone()))
    });
    topology.exchanges.retain(|exchange| is_lost(Thing::Exchange(exchange.name.clone())));
    topology.queues.retain(|queue| is_lost(Thing::Queue(queue.name.clone())));
    topology
}

/// What a route's messages can come through.
struct Things {
    exchanges: Vec<String>,
    queues: Vec<String>,
}

impl Things {
    fn contain(&self, thing: &Thing) -> bool {
        match thing {
            Thing::Exchange(name) => self.exchanges.contains(name),
            Thing::Queue(name) => self.queues.contains(name),
            Thing::Binding(binding) => {
                self.exchanges.contains(&binding.exchange) && self.contain(&destination(binding))
            }
        }
    }
}

fn destination(binding: &Binding) -> Thing {
    match &binding.destination {
        Destination::Queue(name) => Thing::Queue(name.clone()),
        Destination::Exchange(name) => Thing::Exchange(name.clone()),
    }
}

fn things(topology: &Topology, rules: &[Rule]) -> Vec<(RouteId, Things)> {
    let survey = topology.survey();
    let mut all = Vec::new();
    for (id, rule) in (0..).map(RouteId).zip(rules) {
        let Action::Publish { address, .. } = &rule.action else { continue };
        let mut things = Things { exchanges: Vec::new(), queues: Vec::new() };
        let (headers, keys) = (rule.known_headers(), rule.known_keys());
        for (exchange, key) in
            address.exchanges().iter().flat_map(|e| keys.iter().map(move |key| (e, key)))
        {
            things.exchanges.extend(survey.exchanges_of(&headers, exchange, key));
            things.queues.extend(survey.queues_of(&headers, exchange, key));
        }
        all.push((id, things));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::topology::{Exchange, Mode, Queue, QueueKind};
    use crate::error::Error;
    use crate::route::{self, Format, MessageIdRule, Ordering, Policy, Select};

    fn rule(name: &str, exchange: &str) -> Rule {
        Rule {
            name: name.into(),
            owner: String::new(),
            select: Select::Outbox { aggregate_type: name.into() },
            action: Action::Publish {
                contracts: Default::default(),
                address: route::Address::new(exchange, "{aggregate_type}.{event_type}").into(),
                partitions: None,
                format: Format::Raw,
                ordering: Ordering::Keyed,
                message_id: MessageIdRule::Event,
                key: Vec::new(),
                policy: Policy::default(),
                rules: Box::default(),
            },
        }
    }

    fn exchange(name: &str, kind: &str) -> Exchange {
        Exchange { name: name.into(), kind: kind.into(), durable: true, arguments: Vec::new() }
    }

    fn binding(destination: Destination, exchange: &str, key: &str) -> Binding {
        Binding {
            destination,
            exchange: exchange.into(),
            routing_key: key.into(),
            arguments: Vec::new(),
        }
    }

    fn topology() -> Topology {
        let queue = |name: &str| Queue {
            name: name.into(),
            kind: QueueKind::Quorum,
            max_length: None,
            arguments: Vec::new(),
        };
        let to = |name: &str| Destination::Queue(name.into());
        Topology {
            mode: Mode::Declare,
            exchanges: vec![exchange("e", "topic"), exchange("inner", "fanout")],
            queues: ["orders", "bills", "all"].map(queue).into(),
            bindings: vec![
                binding(to("orders"), "e", "order.#"),
                binding(to("bills"), "e", "bill.#"),
                binding(Destination::Exchange("inner".into()), "e", "order.#"),
                binding(to("all"), "inner", ""),
            ],
        }
    }

    fn concerned(thing: Thing) -> Vec<u16> {
        let rules = [rule("order", "e"), rule("bill", "e")];
        let wrong = Wrong { thing, missing: true, error: Error::refused("gone") };
        routes(&topology(), &rules, &[wrong]).iter().map(|broken| broken.route.0).collect()
    }

    #[test]
    fn a_wrong_thing_concerns_the_routes_whose_messages_come_through_it_and_no_other() {
        assert_eq!(concerned(Thing::Queue("orders".into())), [0]);
        assert_eq!(concerned(Thing::Queue("bills".into())), [1]);
        assert_eq!(concerned(Thing::Queue("all".into())), [0], "behind another exchange");
        assert_eq!(concerned(Thing::Exchange("e".into())), [0, 1]);
        assert_eq!(concerned(Thing::Exchange("inner".into())), [0]);
        assert_eq!(concerned(Thing::Binding(topology().bindings[1].clone())), [1]);
        assert!(concerned(Thing::Queue("nobodys".into())).is_empty());
    }

    #[test]
    fn each_exchange_that_a_route_may_choose_concerns_it() {
        let mut several = rule("order", "{aggregate_type}");
        let Action::Publish { address, .. } = &mut several.action else { unreachable!() };
        address.exchanges = vec!["other".into(), "e".into()];
        let mut topology = topology();
        topology.exchanges.push(exchange("other", "topic"));
        let concerned = |thing: Thing| {
            let wrong = Wrong { thing, missing: true, error: Error::refused("gone") };
            !routes(&topology, std::slice::from_ref(&several), &[wrong]).is_empty()
        };
        assert!(concerned(Thing::Exchange("other".into())));
        assert!(concerned(Thing::Exchange("e".into())));
        assert!(concerned(Thing::Queue("orders".into())));
        assert!(!concerned(Thing::Queue("bills".into())));
    }

    #[test]
    fn what_is_declared_again_is_what_is_missing_with_its_bindings() {
        let rules = [rule("order", "e"), rule("bill", "e")];
        let part = part(&topology(), &rules, &[RouteId(0)].into());
        let names: Vec<&str> = part.queues.iter().map(|queue| &*queue.name).collect();
        assert_eq!(names, ["orders", "all"]);
        let lost = lost(part, &[Thing::Exchange("inner".into())]);
        assert!(lost.queues.is_empty());
        assert_eq!((lost.exchanges.len(), lost.bindings.len()), (1, 2));
    }
}
