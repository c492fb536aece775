//! `[[exchange]]`, `[[queue]]`, `[[binding]]`: what is declared or verified in the broker.

use std::collections::HashSet;

use super::raw::{self, Raw};
use super::routes;
use super::value::Problems;
use crate::amqp::topology::{Argument, Binding, Exchange, Mode, Queue, QueueKind, Topology};
use crate::message::SHORT_STRING_MAX;
use crate::route::Rule;

/// What is listed, and the exchanges of the routes: durable topic exchanges unless listed.
pub(super) fn topology(p: &mut Problems, raw: &Raw, rules: &[Rule]) -> Topology {
    let modes = [("declare", Mode::Declare), ("verify", Mode::Verify)];
    let mode = p.word("broker.topology", &raw.broker.topology, &modes);
    let durable = |name: &str, kind: &str| Exchange {
        name: name.to_owned(),
        kind: kind.to_owned(),
        durable: true,
    };
    let mut exchanges: Vec<Exchange> = Vec::new();
    unique(p, "exchange", raw.exchange.iter().map(|exchange| &*exchange.name));
    unique(p, "queue", raw.queue.iter().map(|queue| &*queue.name));
    for (index, exchange) in raw.exchange.iter().enumerate() {
        check_exchange(p, index, exchange);
        exchanges.push(durable(&exchange.name, &exchange.kind));
    }
    for name in routes::exchanges(rules) {
        if !exchanges.iter().any(|exchange| exchange.name == name) {
            exchanges.push(durable(name, "topic"));
        }
    }
    let queues = raw.queue.iter().enumerate().map(|(index, raw)| queue(p, index, raw)).collect();
    for (index, binding) in raw.binding.iter().enumerate() {
        short_name(p, &format!("binding[{index}].queue"), &binding.queue);
        short_name(p, &format!("binding[{index}].exchange"), &binding.exchange);
    }
    let binding = |raw: &raw::Binding| Binding {
        queue: raw.queue.clone(),
        exchange: raw.exchange.clone(),
        routing_key: raw.routing_key.clone(),
    };
    Topology { mode, exchanges, queues, bindings: raw.binding.iter().map(binding).collect() }
}

/// The broker would refuse the second of two that differ, and say so in its own words.
fn unique<'a>(p: &mut Problems, what: &str, names: impl Iterator<Item = &'a str>) {
    let mut seen = HashSet::new();
    for (index, name) in names.enumerate() {
        if !seen.insert(name) {
            p.other(format!("{what}[{index}]: {what} {name:?} is listed twice; keep one"));
        }
    }
}

fn check_exchange(p: &mut Problems, index: usize, exchange: &raw::Exchange) {
    short_name(p, &format!("exchange[{index}].name"), &exchange.name);
    // Plugins bring more kinds, all of them named x-….
    if !exchange.kind.starts_with("x-") {
        let kinds = ["topic", "direct", "fanout", "headers"].map(|kind| (kind, ()));
        p.word(&format!("exchange[{index}].kind"), &exchange.kind, &kinds);
    }
}

fn queue(p: &mut Problems, index: usize, raw: &raw::Queue) -> Queue {
    short_name(p, &format!("queue[{index}].name"), &raw.name);
    let kinds = [QueueKind::Quorum, QueueKind::Classic, QueueKind::Stream];
    let kinds = kinds.map(|kind| (kind.name(), kind));
    let kind = p.word(&format!("queue[{index}].type"), &raw.kind, &kinds);
    let mut arguments = Vec::new();
    for (name, value) in &raw.arguments {
        let key = format!("queue[{index}].arguments.{name}");
        if name == "x-queue-type" {
            p.other(format!("{key}: the type of a queue is set by its key \"type\""));
        }
        let value = match value {
            toml::Value::String(text) => Argument::Text(text.clone()),
            toml::Value::Integer(number) => Argument::Int(*number),
            toml::Value::Boolean(yes) => Argument::Bool(*yes),
            toml::Value::Float(_)
            | toml::Value::Datetime(_)
            | toml::Value::Array(_)
            | toml::Value::Table(_) => {
                p.other(format!("{key}: allowed are strings, integers and booleans"));
                continue;
            }
        };
        arguments.push((name.clone(), value));
    }
    Queue { name: raw.name.clone(), kind, max_length: None, arguments }
}

/// A name of an exchange or a queue: an AMQP short string that is not empty.
fn short_name(p: &mut Problems, key: &str, name: &str) {
    if name.is_empty() || name.len() > SHORT_STRING_MAX {
        p.value(key, format!("{name:?}"), "1 to 255 bytes");
    }
}
