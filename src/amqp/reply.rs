//! What a reply code of the broker means: one table, for `connection.close`, `channel.close` and
//! `basic.return`. Pure. The table knows codes; the texts are shown, never looked into.
//!
//! AMQP 0-9-1, section 1.2 "Reply codes"; <https://www.rabbitmq.com/docs/channels#error-handling>

use crate::error::{Error, Kind};

/// Unroutable, in `basic.return`.
pub const NO_ROUTE: u16 = 312;
/// User, password or permission.
pub const ACCESS_REFUSED: u16 = 403;
/// The exchange or queue is missing.
pub const NOT_FOUND: u16 = 404;
/// Somebody else's exclusive queue.
pub const RESOURCE_LOCKED: u16 = 405;
/// Declared differently; for a publish, a message that the broker does not take.
pub const PRECONDITION_FAILED: u16 = 406;

/// One line of the table: code, its name, what the caller does about it, and our advice.
type Line = (u16, &'static str, Kind, &'static str);

/// The table.
const REPLIES: &[Line] = &[
    (200, "reply-success", Kind::Unreachable, "closed on purpose; it is opened again"),
    (311, "content-too-large", Kind::Event, "lower broker.max_message_size to the broker's limit"),
    (NO_ROUTE, "no-route", Kind::Refused, "bind a queue whose binding key matches"),
    (313, "no-consumers", Kind::Protocol, "only \"immediate\" publishes get this; see its log"),
    (
        320,
        "connection-forced",
        Kind::Unreachable,
        "the broker or an operator closed it; it is opened again",
    ),
    (402, "invalid-path", Kind::Refused, "check the virtual host in broker.url"),
    (
        ACCESS_REFUSED,
        "access-refused",
        Kind::Refused,
        "check user, password and the permissions configure, write and read",
    ),
    (NOT_FOUND, "not-found", Kind::Refused, "create it, or set broker.topology = \"declare\""),
    (
        RESOURCE_LOCKED,
        "resource-locked",
        Kind::Busy,
        "another connection owns this queue; this one waits as its stand-by",
    ),
    (
        PRECONDITION_FAILED,
        "precondition-failed",
        Kind::Refused,
        "change the configuration to what is there, or delete it and declare it anew",
    ),
    (501, "frame-error", Kind::Protocol, "a proxy may garble the stream; see the broker's log"),
    (502, "syntax-error", Kind::Protocol, "the broker did not understand a field; see its log"),
    (503, "command-invalid", Kind::Protocol, "the broker did not expect this method; see its log"),
    (504, "channel-error", Kind::Protocol, "the broker does not know this channel; see its log"),
    (505, "unexpected-frame", Kind::Protocol, "the broker did not expect this frame; see its log"),
    (
        506,
        "resource-error",
        Kind::Unreachable,
        "the broker is short of a resource: see its memory, disk and limits",
    ),
    (
        530,
        "not-allowed",
        Kind::Refused,
        "create the virtual host, give the user permissions in it, look at limits",
    ),
    (540, "not-implemented", Kind::Refused, "the broker is too old, or lacks a plugin"),
    (541, "internal-error", Kind::Unreachable, "see the broker's log"),
];

/// The name of a reply code, what the caller does about it, and our advice. A code that no line
/// names is taken for the broker's own trouble.
pub fn classify(code: u16) -> (&'static str, Kind, &'static str) {
    match REPLIES.iter().find(|(known, ..)| *known == code) {
        Some((_, name, kind, advice)) => (name, *kind, advice),
        None => ("unknown", Kind::Unreachable, "see the broker's log"),
    }
}

/// The error for a reply: `what` happened, with the broker's own words.
pub fn error(what: &str, code: u16, text: &str) -> Error {
    let (name, kind, advice) = classify(code);
    let space = if what.is_empty() { "" } else { ": " };
    // The broker's text mostly begins with the name, in capitals.
    let begins = text.to_ascii_lowercase().replace('_', "-").starts_with(name);
    let shown = if begins { text.to_owned() } else { format!("{name}, {text}") };
    Error::new(kind, format!("{what}{space}{code} {shown}")).hint(advice)
}
