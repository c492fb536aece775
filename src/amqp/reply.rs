//! What a reply code of the broker means: one table, for `connection.close`, `channel.close` and
//! `basic.return`, and what the relay decides by such a code. Pure.
//!
//! Decisions are made by code. Texts are shown, never parsed, with two exceptions: [`size_limit`],
//! a number that RabbitMQ gives nowhere else, and the hints of [`limit_hint`] and [`access_hint`],
//! because one code stands for many things, each with its own remedy.
//!
//! AMQP 0-9-1, section 1.2 "Reply codes"; <https://www.rabbitmq.com/docs/channels#error-handling>

use crate::error::{Code, Error, Kind};

/// The peer closes on purpose; no failure.
pub const REPLY_SUCCESS: u16 = 200;
/// The message is larger than the broker takes. RabbitMQ says 406 instead.
pub const CONTENT_TOO_LARGE: u16 = 311;
/// Unroutable, in `basic.return`.
pub const NO_ROUTE: u16 = 312;
/// No consumer is ready; only for "immediate" publishes.
pub const NO_CONSUMERS: u16 = 313;
/// The broker or an operator closes the connection.
pub const CONNECTION_FORCED: u16 = 320;
/// The virtual host is unknown.
pub const INVALID_PATH: u16 = 402;
/// User, password or permission.
pub const ACCESS_REFUSED: u16 = 403;
/// The exchange or queue is missing.
pub const NOT_FOUND: u16 = 404;
/// The queue belongs to another connection.
pub const RESOURCE_LOCKED: u16 = 405;
/// Declared differently; for a publish, a message that the broker does not take.
pub const PRECONDITION_FAILED: u16 = 406;
/// A frame that cannot be decoded.
pub const FRAME_ERROR: u16 = 501;
/// A field with an illegal value.
pub const SYNTAX_ERROR: u16 = 502;
/// A method out of place.
pub const COMMAND_INVALID: u16 = 503;
/// A channel that is not open.
pub const CHANNEL_ERROR: u16 = 504;
/// A frame out of place.
pub const UNEXPECTED_FRAME: u16 = 505;
/// The broker is short of a resource.
pub const RESOURCE_ERROR: u16 = 506;
/// Forbidden by policy, a limit, or a missing virtual host.
pub const NOT_ALLOWED: u16 = 530;
/// A feature that the broker lacks.
pub const NOT_IMPLEMENTED: u16 = 540;
/// The broker failed inside.
pub const INTERNAL_ERROR: u16 = 541;

/// One line of the table: code, its name, what the caller does about it, and our hint.
type Line = (u16, &'static str, Kind, &'static str);

/// The table.
#[rustfmt::skip]
const REPLIES: &[Line] = &[
    (REPLY_SUCCESS, "reply-success", Kind::Unreachable,
        "closed on purpose; Watership reconnects"),
    (CONTENT_TOO_LARGE, "content-too-large", Kind::Event,
        "lower broker.max_message_size to the broker's limit"),
    (NO_ROUTE, "no-route", Kind::Refused,
        "bind a queue whose binding key matches"),
    (NO_CONSUMERS, "no-consumers", Kind::Protocol,
        "only \"immediate\" publishes get this reply; see the broker's log"),
    (CONNECTION_FORCED, "connection-forced", Kind::Unreachable,
        "the broker or an operator closed the connection; Watership reconnects"),
    (INVALID_PATH, "invalid-path", Kind::Refused,
        "check the virtual host in broker.url"),
    (ACCESS_REFUSED, "access-refused", Kind::Refused,
        "grant what is missing (rabbitmqctl set_permissions): configure to declare, write to \
         publish and to the target of a binding, read to its source and to consume"),
    (NOT_FOUND, "not-found", Kind::Refused,
        "create the missing exchange or queue; with broker.topology = \"declare\" the relay \
         creates those listed as [[exchange]] and [[queue]]"),
    (RESOURCE_LOCKED, "resource-locked", Kind::Busy,
        "another connection owns this queue; this relay is on standby"),
    (PRECONDITION_FAILED, "precondition-failed", Kind::Refused,
        "match the configuration to the existing object, or delete the object to redeclare it"),
    (FRAME_ERROR, "frame-error", Kind::Protocol,
        "a proxy may be corrupting the stream; see the broker's log"),
    (SYNTAX_ERROR, "syntax-error", Kind::Protocol,
        "the broker did not understand a field; see its log"),
    (COMMAND_INVALID, "command-invalid", Kind::Protocol,
        "the broker did not expect this method; see its log"),
    (CHANNEL_ERROR, "channel-error", Kind::Protocol,
        "the broker does not know this channel; see its log"),
    (UNEXPECTED_FRAME, "unexpected-frame", Kind::Protocol,
        "the broker did not expect this frame; see its log"),
    (RESOURCE_ERROR, "resource-error", Kind::Unreachable,
        "the broker is short of a resource: check its memory, disk and limits"),
    (NOT_ALLOWED, "not-allowed", Kind::Refused,
        "create the virtual host, and give the user permissions in it"),
    (NOT_IMPLEMENTED, "not-implemented", Kind::Refused,
        "the broker is too old, or lacks a plugin"),
    (INTERNAL_ERROR, "internal-error", Kind::Unreachable,
        "see the broker's log"),
];

/// The name of a reply code, what the caller does about it, and our hint. A code that is not in
/// the table ends the connection like any other failure.
pub fn classify(code: u16) -> (&'static str, Kind, &'static str) {
    match REPLIES.iter().find(|(known, ..)| *known == code) {
        Some((_, name, kind, hint)) => (name, *kind, hint),
        None => ("unknown", Kind::Unreachable, "see the broker's log"),
    }
}

/// The error for a reply: `what` happened, with the broker's own words and code.
pub fn error(what: &str, code: u16, text: &str) -> Error {
    let (name, kind, hint) = classify(code);
    let space = if what.is_empty() { "" } else { ": " };
    // The broker's text mostly begins with the name, in capitals.
    let begins = text.to_ascii_lowercase().replace('_', "-").starts_with(name);
    let shown = if begins { text.to_owned() } else { format!("{name}, {text}") };
    let of_text = match code {
        ACCESS_REFUSED => refusal_hint(text),
        _ => limit_hint(text).map(str::to_owned),
    };
    let hint = of_text.unwrap_or_else(|| hint.to_owned());
    Error::new(kind, format!("{what}{space}{code} {shown}")).coded(Code::Reply(code)).hint(hint)
}

/// What to do about a 403 to something that needs these permissions.
pub fn access_hint(text: &str, needed: &str) -> String {
    refusal_hint(text).unwrap_or_else(|| format!("grant {needed} (rabbitmqctl set_permissions)"))
}

/// What to do when a publish to this exchange is refused.
pub fn publish_hint(code: u16, text: &str, exchange: &str) -> String {
    match code {
        ACCESS_REFUSED => access_hint(text, &format!("write permission on exchange {exchange:?}")),
        _ => classify(code).2.to_owned(),
    }
}

/// What to do about a 403 whose text says more than that a permission is missing. Newer
/// brokers name it: "read access to exchange 'a' in vhost '/' refused for user 'b'".
fn refusal_hint(text: &str) -> Option<String> {
    let fixed = [
        (
            "internal exchange",
            "an internal exchange takes messages from other exchanges only: publish to one that is \
             bound to it",
        ),
        ("reserved prefix", "names that begin with \"amq.\" are the broker's own: use another one"),
        (
            "default exchange",
            "the default exchange routes to each queue by its name; it cannot be declared or bound",
        ),
    ];
    if let Some((_, hint)) = fixed.iter().find(|(part, _)| text.contains(part)) {
        return Some((*hint).to_owned());
    }
    let (before, after) = text.split_once(" access to ").or(text.split_once("access to "))?;
    let (thing, _) = after.split_once(" in vhost ")?;
    if thing.starts_with("topic ") {
        let permissions = "rabbitmqctl set_topic_permissions";
        return Some(format!("grant the topic permission for {thing} ({permissions})"));
    }
    let permission = before.rsplit(' ').next()?;
    ["configure", "write", "read"]
        .contains(&permission)
        .then(|| format!("grant {permission} permission on {thing} (rabbitmqctl set_permissions)"))
}

/// What to do when the broker says that a limit is reached, which has no code of its own:
/// "number of channels opened for user 'a' has reached ...", "connection limit (1) is reached",
/// "queue limit in vhost '/' (0) is reached".
pub fn limit_hint(text: &str) -> Option<&'static str> {
    if text.contains("number of channels") {
        return Some(
            "raise that limit (max-channels of the user, or channel_max): a relay opens a channel \
             for its lock, up to four for each exchange, and one to look at exchanges and queues",
        );
    }
    if !text.contains("is reached") {
        return None;
    }
    if text.contains("connection limit") {
        return Some(
            "raise that limit (max-connections of the vhost or the user), or close connections: a \
             relay needs two, and `watership check` one more while it runs",
        );
    }
    let of_queues = text.contains("queue limit");
    of_queues.then_some(
        "raise that limit (max-queues of the vhost), or delete queues: a relay needs one for its \
         lock, in addition to those of its routes",
    )
}

/// The broker says that the exchange or queue does not exist.
pub fn is_missing(error: &Error) -> bool {
    error.reply_code() == Some(NOT_FOUND)
}

/// What made the broker close a channel with unconfirmed publishes on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The exchange is missing or may not be written to: all messages of the route would fail.
    Destination,
    /// One of the messages; the broker does not say which.
    Message,
    /// Neither: the session is over.
    Session,
}

/// What made the broker close a channel that is only published on.
pub fn channel_closed(code: u16) -> Cause {
    match code {
        ACCESS_REFUSED | NOT_FOUND => Cause::Destination,
        CONTENT_TOO_LARGE | PRECONDITION_FAILED => Cause::Message,
        _ => Cause::Session,
    }
}

/// The broker's own limit for a message, in bytes, out of the text of a 406, which is the only
/// place that has it: "message size 20 is larger than configured max size 10".
///
/// It only saves further channels from being closed, one for each message that is too large; what
/// becomes of the message itself is decided by the code. So nothing is wrong, only slower, when
/// the text says something else: then it is absent.
pub fn size_limit(text: &str) -> Option<usize> {
    let (_, limit) = text.split_once("max size ")?;
    let digits: String = limit.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_stands_once_in_the_table() {
        for (index, (code, name, ..)) in REPLIES.iter().enumerate() {
            let again = REPLIES[..index].iter().any(|(c, n, ..)| c == code || n == name);
            assert!(!again, "{code} {name}");
        }
    }

    #[test]
    fn a_closed_channel_is_the_doing_of_the_exchange_of_a_message_or_of_neither() {
        for (code, cause) in [
            (ACCESS_REFUSED, Cause::Destination),
            (NOT_FOUND, Cause::Destination),
            (PRECONDITION_FAILED, Cause::Message),
            (CONTENT_TOO_LARGE, Cause::Message),
            (CHANNEL_ERROR, Cause::Session),
            (INTERNAL_ERROR, Cause::Session),
            (999, Cause::Session),
        ] {
            assert_eq!(channel_closed(code), cause, "{code}");
        }
    }

    #[test]
    fn what_is_missing_is_known_by_its_code_and_not_by_its_text() {
        assert!(is_missing(&error("exchange \"a\"", NOT_FOUND, "NOT_FOUND - no exchange")));
        assert!(is_missing(&error("x", NOT_FOUND, "")));
        assert!(!is_missing(&error("x", ACCESS_REFUSED, "404 does not exist")));
        assert!(!is_missing(&Error::refused("404 does not exist")));
    }

    #[test]
    fn a_limit_that_is_reached_is_named_in_the_hint_whatever_its_code() {
        for (code, text, expected) in [
            (
                NOT_ALLOWED,
                "NOT_ALLOWED - number of channels opened for user 'a' has reached the maximum \
                 allowed user limit of (2)",
                "max-channels",
            ),
            (
                NOT_ALLOWED,
                "NOT_ALLOWED - access to vhost '/' refused for user 'a': connection limit (1) is \
                 reached",
                "max-connections",
            ),
            (
                PRECONDITION_FAILED,
                "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost '/' (0) is \
                 reached",
                "max-queues",
            ),
            (NOT_ALLOWED, "NOT_ALLOWED - vhost a not found", "create the virtual host"),
        ] {
            let hint = error("x", code, text).hint_or_kind().to_owned();
            assert!(hint.contains(expected), "{text}: {hint}");
        }
    }

    #[test]
    fn the_hint_to_a_403_names_the_permission_or_what_is_wrong_in_its_place() {
        let unnamed = "ACCESS_REFUSED - access to exchange 'e' in vhost '/' refused for user 'u'";
        let needed = "write permission on exchange \"e\"";
        assert_eq!(
            publish_hint(ACCESS_REFUSED, unnamed, "e"),
            format!("grant {needed} (rabbitmqctl set_permissions)")
        );
        for (text, expected) in [
            (
                "ACCESS_REFUSED - read access to queue 'q' in vhost '/' refused for user 'u'",
                "grant read permission on queue 'q' (rabbitmqctl set_permissions)",
            ),
            (
                "ACCESS_REFUSED - access to topic 'a.b' in exchange 'e' in vhost '/' refused for \
                 user 'u'",
                "grant the topic permission for topic 'a.b' in exchange 'e' (rabbitmqctl \
                 set_topic_permissions)",
            ),
            (
                "ACCESS_REFUSED - cannot publish to internal exchange 'e' in vhost '/'",
                "an internal exchange takes messages from other exchanges only: publish to one \
                 that is bound to it",
            ),
        ] {
            assert_eq!(access_hint(text, needed), expected);
            assert_eq!(error("x", ACCESS_REFUSED, text).hint_text(), Some(expected));
        }
        let generic = error("x", ACCESS_REFUSED, unnamed).hint_or_kind().to_owned();
        assert!(generic.contains("configure to declare"), "{generic}");
    }

    #[test]
    fn the_brokers_size_limit_is_learnt_from_its_text() {
        let text = "PRECONDITION_FAILED - message size 2000000 is larger than configured max size \
                    1048576";
        assert_eq!(size_limit(text), Some(1_048_576));
        assert_eq!(
            size_limit("PRECONDITION_FAILED - message size 9 larger than max size 8"),
            Some(8)
        );
        assert_eq!(size_limit("PRECONDITION_FAILED - invalid expiration"), None);
        assert_eq!(size_limit("max size 99999999999999999999999"), None);
    }
}
