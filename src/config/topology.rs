//! `[[exchange]]`, `[[queue]]`, `[[binding]]`: what is declared or verified in the broker.

use std::collections::HashSet;

use super::checked_arguments;
use super::partitions::{self, Partitioned};
use super::routes;
use super::section::{Scalar, Section};
use crate::amqp::topology::{
    Argument, Binding, Destination, Exchange, Mode, Queue, QueueKind, Topology,
};
use crate::message::SHORT_STRING_MAX;
use crate::route::Rule;

const NAME: &str = "name";

/// What is listed, and the exchanges of the routes: durable topic exchanges unless listed. Those of
/// partitions are direct exchanges, and come with their queues and bindings.
pub(super) fn topology(
    root: &mut Section<'_>,
    mode: Mode,
    rules: &[Rule],
    partitioned: &[Partitioned],
) -> Topology {
    let mut seen = HashSet::new();
    let mut exchanges: Vec<Exchange> = root
        .tables("exchange")
        .into_iter()
        .map(|mut t| exchange(&mut t, mode, &mut seen))
        .collect();
    for name in routes::exchanges(rules) {
        if !exchanges.iter().any(|exchange| exchange.name == name) {
            let kind = partitions::kind_of_exchange(partitioned, rules, name);
            let kind = brokers_own(name).unwrap_or(kind);
            exchanges.push(durable(name.to_owned(), kind.to_owned(), Vec::new()));
            if let Some(problem) = reserved(name).filter(|_| mode == Mode::Declare) {
                root.problem("route", problem);
            }
        }
    }
    let mut seen = HashSet::new();
    let queues = root.tables("queue").into_iter();
    let queues = queues.map(|mut t| queue(&mut t, mode, &mut seen)).collect();
    let bindings = root.tables("binding").into_iter();
    let bindings = bindings.filter_map(|mut t| binding(&mut t, &exchanges)).collect();
    let mut topology = Topology { mode, exchanges, queues, bindings };
    partitions::add_all(root, partitioned, &mut topology);
    topology
}

pub(super) fn durable(name: String, kind: String, arguments: Vec<(String, Argument)>) -> Exchange {
    Exchange { name, kind, durable: true, arguments }
}

/// The broker would refuse the second of two that differ, and say so in its own words.
fn unique(t: &Section<'_>, what: &str, name: &str, seen: &mut HashSet<String>) {
    if !name.is_empty() && !seen.insert(name.to_owned()) {
        t.problem(NAME, format!("{what} {name:?} is listed twice; remove one"));
    }
}

/// The kinds of the exchanges that each vhost has from the beginning.
fn brokers_own(name: &str) -> Option<&'static str> {
    match name {
        "amq.direct" => Some("direct"),
        "amq.fanout" => Some("fanout"),
        "amq.headers" | "amq.match" => Some("headers"),
        "amq.topic" => Some("topic"),
        // Of its trace, log and event plugins.
        name if name.starts_with("amq.rabbitmq.") => Some("topic"),
        _ => None,
    }
}

/// What is wrong with a name under which the broker lets nobody declare anything.
fn reserved(name: &str) -> Option<String> {
    (name.starts_with("amq.") && brokers_own(name).is_none()).then(|| {
        format!(
            "exchange {name:?}: the broker refuses to declare names with \"amq.\"; use another \
             one, or broker.topology = \"verify\" if it exists"
        )
    })
}

fn exchange(t: &mut Section<'_>, mode: Mode, seen: &mut HashSet<String>) -> Exchange {
    const KIND: &str = "kind";
    let name = t.short_string(NAME);
    unique(t, "exchange", &name, seen);
    if let Some(problem) = reserved(&name).filter(|_| mode == Mode::Declare) {
        t.problem(NAME, problem);
    }
    let kind = t.text(KIND, brokers_own(&name).unwrap_or("topic"));
    let known = ["topic", "direct", "fanout", "headers"];
    // Plugins bring more kinds, all of them named x-….
    if !known.contains(&&*kind) && !kind.starts_with("x-") {
        let expected = "\"topic\", \"direct\", \"fanout\", \"headers\" or a plugin's \"x-…\"";
        t.invalid(KIND, format!("{kind:?}"), expected);
    }
    let arguments = arguments(t, "such as { alternate-exchange = \"unrouted\" }");
    checked_arguments::of_exchange(t, &arguments);
    if kind == "x-delayed-message" && !arguments.iter().any(|(key, _)| key == "x-delayed-type") {
        let what = format!("exchange {name:?}: the broker needs to know how it routes");
        t.problem(KIND, format!("{what}: add arguments = {{ x-delayed-type = \"topic\" }}"));
    }
    durable(name, kind, arguments)
}

/// The arguments of a thing: strings, whole numbers, true and false.
pub(super) fn arguments(t: &mut Section<'_>, example: &str) -> Vec<(String, Argument)> {
    let mut given = t.table("arguments", example);
    let mut arguments = Vec::new();
    for key in given.keys() {
        if key.len() > SHORT_STRING_MAX {
            given.problem(key, format!("the name {key:.60?}… has more than 255 bytes"));
        }
        let argument = given.scalar(key).map(|scalar| match scalar {
            Scalar::Text(text) => Argument::Text(text),
            Scalar::Int(number) => Argument::Int(number),
            Scalar::Bool(yes) => Argument::Bool(yes),
        });
        arguments.extend(argument.map(|argument| (key.to_owned(), argument)));
    }
    arguments
}

fn queue(t: &mut Section<'_>, mode: Mode, seen: &mut HashSet<String>) -> Queue {
    let name = t.short_string(NAME);
    unique(t, "queue", &name, seen);
    if name.starts_with("amq.") && mode == Mode::Declare {
        let what = format!("queue {name:?}: the broker refuses to declare names with \"amq.\"");
        t.problem(NAME, format!("{what}; use another one"));
    }
    if name.starts_with("watership.") && name.ends_with(".lock") {
        let what = format!("queue {name:?}: relays use names of this form for their locks");
        t.problem(NAME, format!("{what}; use another one"));
    }
    let kinds = [QueueKind::Quorum, QueueKind::Classic, QueueKind::Stream];
    let kind = t.word("type", &kinds.map(|kind| (kind.name(), kind)));
    let arguments = arguments(t, "such as { x-max-length = 100000 }");
    if arguments.iter().any(|(key, _)| key == "x-queue-type") {
        let path = t.path("arguments.x-queue-type");
        t.problem("arguments", format!("{path}: set the queue's type with its key \"type\""));
    }
    checked_arguments::of_queue(t, kind, &arguments);
    Queue { name, kind, max_length: None, arguments }
}

/// `None` where there is a problem with where it leads.
fn binding(t: &mut Section<'_>, exchanges: &[Exchange]) -> Option<Binding> {
    const QUEUE: &str = "queue";
    const TO: &str = "to_exchange";
    let exchange = t.short_string("exchange");
    let (queue, to) = (t.text(QUEUE, ""), t.text(TO, ""));
    for (key, name) in [(QUEUE, &queue), (TO, &to)] {
        if name.len() > SHORT_STRING_MAX {
            t.problem(key, format!("{} has {} bytes; at most 255", t.path(key), name.len()));
        }
    }
    let routing_key = t.text("routing_key", "");
    if routing_key.len() > SHORT_STRING_MAX {
        let path = t.path("routing_key");
        t.problem("routing_key", format!("{path} has {} bytes; at most 255", routing_key.len()));
    }
    let arguments = arguments(t, "such as { x-match = \"all\", region = \"eu\" }");
    let destination = match (queue.is_empty(), to.is_empty()) {
        (false, true) => Destination::Queue(queue),
        (true, false) => Destination::Exchange(to),
        (true, true) => {
            t.problem(QUEUE, "a binding leads somewhere: set queue or to_exchange");
            return None;
        }
        (false, false) => {
            t.problem(TO, "a binding leads to one place: set queue or to_exchange, not both");
            return None;
        }
    };
    let kind = exchanges.iter().find(|e| e.name == exchange).map(routing);
    let with_x = |(key, value): &(String, Argument)| match value {
        Argument::Text(mode) => key == "x-match" && mode.ends_with("-with-x"),
        Argument::Int(_) | Argument::Bool(_) => false,
    };
    let with_x = arguments.iter().any(with_x);
    let is_compared = |key: &str| key != "x-match" && (with_x || !key.starts_with("x-"));
    let compares = arguments.iter().any(|(key, _)| is_compared(key));
    if kind == Some("headers") && !compares {
        let what = format!("exchange {exchange:?} routes by headers, and a binding without any");
        t.problem(
            "arguments",
            format!(
                "{what} gets every message (or none): add the headers to compare, such as \
                 arguments = {{ x-match = \"all\", region = \"eu\" }}"
            ),
        );
    }
    Some(Binding { destination, exchange, routing_key, arguments })
}

/// The type by whose rules an exchange routes.
pub(super) fn routing(exchange: &Exchange) -> &str {
    let delayed = exchange.arguments.iter().find_map(|(key, value)| match value {
        Argument::Text(kind) if key == "x-delayed-type" => Some(kind.as_str()),
        _ => None,
    });
    delayed.unwrap_or(&exchange.kind)
}
