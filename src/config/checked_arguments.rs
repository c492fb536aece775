//! Arguments of queues and exchanges that RabbitMQ knows: their types and values, and the types of
//! queues that take them. It would refuse others only when the relay declares them; names that it
//! does not know it ignores.
//!
//! <https://www.rabbitmq.com/docs/queues#optional-arguments>

use super::section::Section;
use crate::amqp::topology::{Argument, QueueKind};

/// What a value may be.
enum Value {
    /// A whole number from here on.
    From(i64),
    /// A whole number of this range.
    Within(i64, i64),
    Text,
    Word(&'static [&'static str]),
    Bool,
    /// Such as `7D`.
    Age,
}

use QueueKind::{Classic, Quorum, Stream};
use Value::{Age, Bool, From, Text, Within, Word};

const ALL: &[QueueKind] = &[Quorum, Classic, Stream];
const QUEUES: &[QueueKind] = &[Quorum, Classic];

/// Name, value, and the types of queues that take it.
#[rustfmt::skip]
const KNOWN: &[(&str, Value, &[QueueKind])] = &[
    ("x-max-length", From(0), QUEUES),
    ("x-max-length-bytes", From(0), ALL),
    ("x-message-ttl", From(0), QUEUES),
    ("x-expires", From(1), QUEUES),
    ("x-overflow", Word(&["drop-head", "reject-publish", "reject-publish-dlx"]), QUEUES),
    ("x-dead-letter-exchange", Text, QUEUES),
    (DEAD_LETTER_KEY, Text, QUEUES),
    ("x-single-active-consumer", Bool, QUEUES),
    ("x-queue-leader-locator", Text, ALL),
    ("x-delivery-limit", From(-1), &[Quorum]),
    ("x-dead-letter-strategy", Word(&["at-most-once", "at-least-once"]), &[Quorum]),
    ("x-quorum-initial-group-size", From(1), &[Quorum]),
    ("x-max-priority", Within(0, 255), &[Classic]),
    ("x-queue-mode", Word(&["default", "lazy"]), &[Classic]),
    ("x-queue-version", Within(1, 2), &[Classic]),
    ("x-max-age", Age, &[Stream]),
    ("x-stream-max-segment-size-bytes", From(1), &[Stream]),
    ("x-initial-cluster-size", From(1), &[Stream]),
];

const DEAD_LETTER_KEY: &str = "x-dead-letter-routing-key";
const ARGUMENTS: &str = "arguments";

/// Adds a problem for each argument that the broker refuses.
pub(super) fn of_queue(t: &Section<'_>, kind: QueueKind, arguments: &[(String, Argument)]) {
    for (key, argument) in arguments {
        let Some((_, value, kinds)) = KNOWN.iter().find(|(known, ..)| known == key) else {
            continue;
        };
        if !kinds.contains(&kind) {
            let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            let (path, names) = (t.path(&format!("{ARGUMENTS}.{key}")), names.join(" or "));
            let kind = kind.name();
            t.problem(
                ARGUMENTS,
                format!("{path}: a queue of type {kind:?} does not take it, only {names}"),
            );
        } else if !value.allows(argument) {
            invalid(t, key, argument, &value.expected());
        }
    }
    let has = |name: &str| arguments.iter().any(|(key, _)| key == name);
    if has(DEAD_LETTER_KEY) && !has("x-dead-letter-exchange") {
        let path = t.path(&format!("{ARGUMENTS}.{DEAD_LETTER_KEY}"));
        t.problem(ARGUMENTS, format!("{path} needs x-dead-letter-exchange, too; add it"));
    }
}

/// The same for an exchange.
pub(super) fn of_exchange(t: &Section<'_>, arguments: &[(String, Argument)]) {
    for (key, argument) in arguments {
        let names_one = ["alternate-exchange", "x-delayed-type"].contains(&key.as_str());
        if names_one && !Text.allows(argument) {
            invalid(t, key, argument, &Text.expected());
        }
    }
}

fn invalid(t: &Section<'_>, key: &str, argument: &Argument, expected: &str) {
    let path = t.path(&format!("{ARGUMENTS}.{key}"));
    let shown = match argument {
        Argument::Text(text) => format!("{text:?}"),
        Argument::Int(number) => number.to_string(),
        Argument::Bool(yes) => yes.to_string(),
    };
    t.problem(ARGUMENTS, format!("{path} = {shown} is invalid; expected {expected}"));
}

impl Value {
    fn allows(&self, argument: &Argument) -> bool {
        match (self, argument) {
            (From(least), Argument::Int(number)) => number >= least,
            (Within(least, most), Argument::Int(number)) => (least..=most).contains(&number),
            (Text, Argument::Text(_)) | (Bool, Argument::Bool(_)) => true,
            (Word(words), Argument::Text(text)) => words.contains(&text.as_str()),
            (Age, Argument::Text(text)) => is_age(text),
            _ => false,
        }
    }

    fn expected(&self) -> String {
        match self {
            From(least) => format!("a whole number, at least {least}"),
            Within(least, most) => format!("a whole number, {least} to {most}"),
            Text => "a string".to_owned(),
            Word(words) => {
                let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
                words.join(" or ")
            }
            Bool => "true or false".to_owned(),
            Age => "a number with one of Y, M, D, h, m, s, such as \"7D\"".to_owned(),
        }
    }
}

fn is_age(text: &str) -> bool {
    let number = text.strip_suffix(['Y', 'M', 'D', 'h', 'm', 's']);
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit()))
}
