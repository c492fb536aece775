//! Which routes it concerns that something is wrong in the broker. Pure.
//!
//! They begin held, with what the broker said, and the others flow. Where a thing is known to be
//! missing, the route is not probed before it is there: a probe could reach the route's other
//! queues, be confirmed, and hide that one of them gets nothing.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};

use crate::amqp::topology::{Binding, Thing, Topology, Wrong};
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
    /// Counts the sessions.
    session: u64,
    missing: BTreeSet<RouteId>,
    unbound: Vec<Binding>,
    well: BTreeSet<RouteId>,
}

/// What one look at the broker begins with: nobody can see a binding, so those that were refused
/// are remembered, and made again until the broker takes them.
#[derive(Debug)]
pub struct Unbound {
    session: u64,
    /// Bindings that were refused.
    pub bindings: Vec<Binding>,
}

/// What it ends with.
#[derive(Debug)]
pub struct StillWrong {
    /// Of these routes something is still missing.
    pub missing: BTreeSet<RouteId>,
    /// These bindings are still refused.
    pub unbound: Vec<Binding>,
    /// Nothing is wrong with what these held routes come through.
    pub well: BTreeSet<RouteId>,
}

impl Missing {
    /// A session begins, and this is all that is wrong.
    pub fn set(&self, broken: &[BrokenRoute], wrong: &[Wrong]) {
        let missing = broken.iter().filter(|broken| broken.missing);
        let missing = missing.map(|broken| broken.route).collect();
        let mut looked = self.lock();
        let session = looked.session + 1;
        *looked = Looked { session, missing, unbound: unbound(wrong), well: BTreeSet::new() };
    }

    /// The bindings that have to be made again.
    pub fn unbound(&self) -> Unbound {
        let looked = self.lock();
        Unbound { session: looked.session, bindings: looked.unbound.clone() }
    }

    /// Somebody looked. It does not count when another session has begun meanwhile.
    pub fn looked(&self, begin: &Unbound, seen: StillWrong) {
        let mut looked = self.lock();
        if looked.session == begin.session {
            looked.missing.retain(|route| seen.missing.contains(route));
            (looked.unbound, looked.well) = (seen.unbound, seen.well);
        }
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

/// The bindings among what is wrong.
pub fn unbound(wrong: &[Wrong]) -> Vec<Binding> {
    let bindings = wrong.iter().filter_map(|wrong| match &wrong.thing {
        Thing::Binding(binding) => Some(binding.clone()),
        Thing::Exchange(_) | Thing::Queue(_) => None,
    });
    bindings.collect()
}

/// Only what is missing, the bindings that are lost with it, and those that were refused before.
pub fn lost(mut topology: Topology, missing: &[Thing], unbound: &[Binding]) -> Topology {
    let is_lost = |thing: Thing| missing.contains(&thing);
    topology
        .bindings
        .retain(|binding| unbound.contains(binding) || binding.ends().into_iter().any(is_lost));
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
            Thing::Binding(binding) => binding.ends().iter().all(|end| self.contain(end)),
        }
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
    use crate::amqp::topology::{Destination, Exchange, Mode, Queue, QueueKind};
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
        let lost_with = lost(part.clone(), &[Thing::Exchange("inner".into())], &[]);
        assert!(lost_with.queues.is_empty());
        assert_eq!((lost_with.exchanges.len(), lost_with.bindings.len()), (1, 2));
        let refused = part.bindings[0].clone();
        let again = lost(part, &[], std::slice::from_ref(&refused));
        assert_eq!((again.exchanges.len(), again.queues.len()), (0, 0));
        assert_eq!(again.bindings, [refused]);
    }

    #[test]
    fn a_binding_to_an_exchange_that_is_not_listed_concerns_the_route() {
        let mut topology = topology();
        let to = Destination::Exchange("elsewhere".into());
        topology.bindings.push(binding(to, "e", "bill.#"));
        let rules = [rule("order", "e"), rule("bill", "e")];
        let thing = Thing::Binding(topology.bindings.last().unwrap().clone());
        let wrong = Wrong { thing, missing: true, error: Error::refused("gone") };
        let broken = routes(&topology, &rules, &[wrong]);
        assert_eq!(broken.iter().map(|broken| broken.route.0).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn what_was_seen_before_a_session_began_does_not_count_for_it() {
        let missing = Missing::default();
        let broken = BrokenRoute { route: RouteId(0), reason: "gone".into(), missing: true };
        let refused = || Wrong {
            thing: Thing::Binding(topology().bindings[0].clone()),
            missing: true,
            error: Error::refused("gone"),
        };
        let none =
            || StillWrong { missing: [].into(), unbound: Vec::new(), well: [RouteId(0)].into() };
        missing.set(std::slice::from_ref(&broken), &[refused()]);
        let before = missing.unbound();
        missing.set(std::slice::from_ref(&broken), &[refused()]);
        missing.looked(&before, none());
        assert!(missing.has(RouteId(0)) && missing.take_well().is_empty());
        let begin = missing.unbound();
        assert_eq!(begin.bindings, topology().bindings[..1]);
        missing.looked(&begin, none());
        assert!(!missing.has(RouteId(0)) && missing.unbound().bindings.is_empty());
        assert_eq!(missing.take_well(), [RouteId(0)].into());
    }
}
