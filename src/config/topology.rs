//! `[[exchange]]`, `[[queue]]`, `[[binding]]`: what is declared or verified in the broker.

use std::collections::HashSet;

use super::routes;
use super::section::{Scalar, Section};
use crate::amqp::topology::{Argument, Binding, Exchange, Mode, Queue, QueueKind, Topology};
use crate::route::Rule;

const NAME: &str = "name";

/// What is listed, and the exchanges of the routes: durable topic exchanges unless listed.
pub(super) fn topology(root: &mut Section<'_>, mode: Mode, rules: &[Rule]) -> Topology {
    let mut seen = HashSet::new();
    let mut exchanges: Vec<Exchange> =
        root.tables("exchange").into_iter().map(|mut t| exchange(&mut t, &mut seen)).collect();
    for name in routes::exchanges(rules) {
        if !exchanges.iter().any(|exchange| exchange.name == name) {
            exchanges.push(durable(name.to_owned(), "topic".to_owned()));
        }
    }
    let mut seen = HashSet::new();
    let queues = root.tables("queue").into_iter().map(|mut t| queue(&mut t, &mut seen)).collect();
    let bindings = root.tables("binding").into_iter().map(|mut t| binding(&mut t)).collect();
    Topology { mode, exchanges, queues, bindings }
}

fn durable(name: String, kind: String) -> Exchange {
    Exchange { name, kind, durable: true }
}

/// The broker would refuse the second of two that differ, and say so in its own words.
fn unique(t: &Section<'_>, what: &str, name: &str, seen: &mut HashSet<String>) {
    if !name.is_empty() && !seen.insert(name.to_owned()) {
        t.problem(NAME, format!("{what} {name:?} is listed twice; remove one"));
    }
}

fn exchange(t: &mut Section<'_>, seen: &mut HashSet<String>) -> Exchange {
    const KIND: &str = "kind";
    let name = t.short_string(NAME);
    unique(t, "exchange", &name, seen);
    let kind = t.text(KIND, "topic");
    let known = ["topic", "direct", "fanout", "headers"];
    // Plugins bring more kinds, all of them named x-….
    if !known.contains(&&*kind) && !kind.starts_with("x-") {
        let expected = "\"topic\", \"direct\", \"fanout\", \"headers\" or a plugin's \"x-…\"";
        t.invalid(KIND, format!("{kind:?}"), expected);
    }
    durable(name, kind)
}

fn queue(t: &mut Section<'_>, seen: &mut HashSet<String>) -> Queue {
    let name = t.short_string(NAME);
    unique(t, "queue", &name, seen);
    let kinds = [QueueKind::Quorum, QueueKind::Classic, QueueKind::Stream];
    let kind = t.word("type", &kinds.map(|kind| (kind.name(), kind)));
    let mut given = t.table("arguments", "such as { x-max-length = 100000 }");
    let mut arguments = Vec::new();
    for key in given.keys() {
        if key == "x-queue-type" {
            let path = given.path(key);
            given.problem(key, format!("{path}: set the queue's type with its key \"type\""));
        }
        let argument = given.scalar(key).map(|scalar| match scalar {
            Scalar::Text(text) => Argument::Text(text),
            Scalar::Int(number) => Argument::Int(number),
            Scalar::Bool(yes) => Argument::Bool(yes),
        });
        arguments.extend(argument.map(|argument| (key.to_owned(), argument)));
    }
    Queue { name, kind, max_length: None, arguments }
}

fn binding(t: &mut Section<'_>) -> Binding {
    Binding {
        queue: t.short_string("queue"),
        exchange: t.short_string("exchange"),
        routing_key: t.text("routing_key", ""),
    }
}
