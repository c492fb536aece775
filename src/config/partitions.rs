//! `partitions = N` of a route: the queues, their arguments, and where their dead letters go.
//!
//! The arguments are those that keep the order of a key and drop nothing in silence: one active
//! consumer, a delivery limit far above that of RabbitMQ 4, and dead letters that leave the queue
//! only when another one has them.

use super::checked_arguments;
use super::section::Section;
use super::topology::{self, durable, routing};
use crate::amqp::topology::{Argument, Binding, Destination, Queue, QueueKind, Topology};
use crate::message::SHORT_STRING_MAX;
use crate::route::{Action, PARTITIONS_MAX, Partitions, Rule};

/// Default of `delivery_limit`: RabbitMQ 4 has 20, and every crash of a consumer counts.
const DELIVERY_LIMIT: u32 = 1000;
/// Limit of the dead-letter queue. Even reading a message there counts as a delivery, and past the
/// limit the message would be dropped.
const DEAD_LETTER_DELIVERY_LIMIT: i64 = 1_000_000;
/// Longest name of a partition's queue without its number, in bytes.
const QUEUE_MAX: usize = SHORT_STRING_MAX - ".dead".len();

const PARTITIONS: &str = "partitions";
const QUEUE: &str = "queue";
const LIMIT: &str = "delivery_limit";
const DEAD_EXCHANGE: &str = "dead_letter_exchange";
const DEAD_QUEUE: &str = "dead_letter_queue";
const ARGUMENTS: &str = "arguments";
/// Arguments of a partition that are not the user's to set.
const OWN_ARGUMENTS: [&str; 6] = [
    "x-queue-type",
    "x-single-active-consumer",
    "x-delivery-limit",
    "x-dead-letter-exchange",
    "x-dead-letter-strategy",
    "x-overflow",
];

/// What a route says of its partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partitioned {
    pub(super) partitions: Partitions,
    /// The exchange that they are bound to; empty until the route has named it.
    pub(super) exchange: String,
    delivery_limit: u32,
    dead_letter_exchange: String,
    dead_letter_queue: String,
    arguments: Vec<(String, Argument)>,
}

impl Partitioned {
    /// `None` for a route without partitions, or where there is a problem with them.
    pub(super) fn read(t: &mut Section<'_>) -> Option<Self> {
        let first = t.asked();
        let count = t.number(PARTITIONS, 0, 0..=PARTITIONS_MAX);
        let queue = t.text(QUEUE, "");
        let delivery_limit = t.number(LIMIT, DELIVERY_LIMIT, 1..=u32::MAX >> 1);
        let name = |t: &mut Section<'_>, key, ending| {
            Some(t.text(key, ""))
                .filter(|name| !name.is_empty())
                .unwrap_or(format!("{queue}{ending}"))
        };
        let dead_letter_exchange = name(t, DEAD_EXCHANGE, ".dlx");
        let dead_letter_queue = name(t, DEAD_QUEUE, ".dead");
        let arguments = topology::arguments(t, "such as { x-max-length = 100000 }");
        if count == 0 {
            let is_used = |key: &&str| match *key {
                QUEUE => !queue.is_empty(),
                LIMIT => delivery_limit != DELIVERY_LIMIT,
                DEAD_EXCHANGE => dead_letter_exchange != format!("{queue}.dlx"),
                DEAD_QUEUE => dead_letter_queue != format!("{queue}.dead"),
                ARGUMENTS => !arguments.is_empty(),
                _ => false,
            };
            let used: Vec<&str> = t.given_since(first).into_iter().filter(is_used).collect();
            if let Some(key) = used.first() {
                let (path, used) = (t.path(PARTITIONS), used.join(", "));
                t.problem(key, format!("{path} is not set, and {used} would have no effect"));
            }
            return None;
        }
        if queue.is_empty() || queue.len() > QUEUE_MAX || queue.contains(['*', '#']) {
            let expected = format!("1 to {QUEUE_MAX} bytes without \"*\" and \"#\"");
            t.invalid(QUEUE, format!("{queue:?}"), expected);
            return None;
        }
        for (key, name) in
            [(DEAD_EXCHANGE, &dead_letter_exchange), (DEAD_QUEUE, &dead_letter_queue)]
        {
            if name.len() > SHORT_STRING_MAX {
                t.problem(key, format!("{} has {} bytes; at most 255", t.path(key), name.len()));
            }
        }
        for (key, _) in arguments.iter().filter(|(key, _)| OWN_ARGUMENTS.contains(&&**key)) {
            let path = t.path(&format!("{ARGUMENTS}.{key}"));
            t.problem(ARGUMENTS, format!("{path}: the relay sets it itself for partitions"));
        }
        let own = |key: &str| OWN_ARGUMENTS.contains(&key);
        let others: Vec<_> = arguments.iter().filter(|(key, _)| !own(key)).cloned().collect();
        checked_arguments::of_queue(t, QueueKind::Quorum, &others);
        let (partitions, exchange) = (Partitions { queue, count }, String::new());
        Some(Self {
            partitions,
            exchange,
            delivery_limit,
            dead_letter_exchange,
            dead_letter_queue,
            arguments,
        })
    }

    fn queue(&self, name: String) -> Queue {
        let text = |name: &str, text: &str| (name.to_owned(), Argument::Text(text.to_owned()));
        let limit = Argument::Int(self.delivery_limit.into());
        let mut arguments = vec![
            ("x-single-active-consumer".to_owned(), Argument::Bool(true)),
            ("x-delivery-limit".to_owned(), limit),
            text("x-dead-letter-exchange", &self.dead_letter_exchange),
            // With both of these, and only then, a dead letter is confirmed before it goes.
            text("x-dead-letter-strategy", "at-least-once"),
            text("x-overflow", "reject-publish"),
        ];
        arguments.extend(self.arguments.iter().cloned());
        Queue { name, kind: QueueKind::Quorum, max_length: None, arguments }
    }

    /// Adds the queues, their bindings, and what dead letters come through, unless they are listed.
    fn add_to(&self, root: &Section<'_>, topology: &mut Topology) {
        let exchange = &self.exchange;
        let kind = topology.exchanges.iter().find(|e| e.name == *exchange).map(routing);
        if let Some(kind) = kind
            && !["direct", "topic"].contains(&kind)
        {
            let what = format!("exchange {exchange:?} routes as {kind:?}");
            let text = "and partitions need one that routes by the routing key: \"direct\"";
            root.problem("route", format!("{what}, {text}"));
        }
        let dead = &self.dead_letter_exchange;
        let by_key = match topology.exchanges.iter().find(|e| e.name == *dead) {
            Some(listed) => routing(listed) == "direct",
            None => {
                topology.exchanges.push(durable(dead.clone(), "fanout".to_owned(), Vec::new()));
                false
            }
        };
        let dead_queue = &self.dead_letter_queue;
        if !topology.queues.iter().any(|queue| queue.name == *dead_queue) {
            let limit = Argument::Int(DEAD_LETTER_DELIVERY_LIMIT);
            topology.queues.push(Queue {
                name: dead_queue.clone(),
                kind: QueueKind::Quorum,
                max_length: None,
                arguments: vec![("x-delivery-limit".to_owned(), limit)],
            });
        }
        for name in self.partitions.names() {
            if topology.queues.iter().any(|queue| queue.name == name) {
                let text = format!("queue {name:?} is a partition of a route; do not list it");
                root.problem(QUEUE, text);
                continue;
            }
            topology.queues.push(self.queue(name.clone()));
            bind(topology, &name, exchange, &name);
            if by_key {
                bind(topology, dead_queue, dead, &name);
            }
        }
        if !by_key {
            bind(topology, dead_queue, dead, "#");
        }
    }
}

fn bind(topology: &mut Topology, queue: &str, exchange: &str, routing_key: &str) {
    let binding = Binding {
        destination: Destination::Queue(queue.to_owned()),
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
        arguments: Vec::new(),
    };
    if !topology.bindings.contains(&binding) {
        topology.bindings.push(binding);
    }
}

/// Adds the partitions of all routes. Two routes may share theirs if they say the same of them.
pub(super) fn add_all(root: &Section<'_>, all: &[Partitioned], topology: &mut Topology) {
    let same_queue = |a: &Partitioned, b: &Partitioned| a.partitions.queue == b.partitions.queue;
    for (index, one) in all.iter().enumerate() {
        match all[..index].iter().find(|other| same_queue(other, one)) {
            None => one.add_to(root, topology),
            Some(other) if other == one => {}
            Some(_) => {
                let queue = &one.partitions.queue;
                let text = format!(
                    "two routes have partitions of queue {queue:?} and disagree about \
                     them; partitions, exchange, delivery_limit, dead_letter_exchange, \
                     dead_letter_queue and arguments must be the same"
                );
                root.problem("route", text);
            }
        }
    }
}

/// The exchange of partitions routes by whole keys, unless another route needs patterns of it.
pub(super) fn kind_of_exchange(all: &[Partitioned], rules: &[Rule], name: &str) -> &'static str {
    let needs_patterns = |rule: &Rule| match &rule.action {
        Action::Publish { address, partitions, .. } => {
            partitions.is_none() && address.exchanges().iter().any(|e| e == name)
        }
        Action::Drop => false,
    };
    let partitioned = all.iter().any(|one| one.exchange == name);
    if partitioned && !rules.iter().any(needs_patterns) { "direct" } else { "topic" }
}
