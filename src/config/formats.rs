//! `format` of a route, and the tables with what a format can be told.
//!
//! Invariant: an option that the route's format does not look at is an error, unless it is at its
//! default.

use std::sync::Arc;

use super::section::{Scalar, Section};
use crate::column::debezium::{
    BinaryHandling, DecimalHandling, HstoreHandling, IntervalHandling, MONEY_DIGITS_MAX,
    TimePrecision, ValueForms,
};
use crate::event::Op;
use crate::route::{
    CloudEvents, Debezium, EventRouter, EventTime, Format, Placement, Select, TombstoneBody,
    topic_template,
};

const DEBEZIUM: &str = "debezium";
const CLOUDEVENTS: &str = "cloudevents";

/// The format of a route, and the routing key if the format chooses it.
pub(super) fn read(
    t: &mut Section<'_>,
    select: Option<&Select>,
    relay: &str,
) -> (Format, Option<String>) {
    #[derive(Clone, Copy, PartialEq)]
    enum Word {
        Raw,
        Watership,
        Debezium,
        CloudEvents,
    }
    let is_table = matches!(select, Some(Select::Table { .. }));
    let mut words = [
        ("raw", Word::Raw),
        ("watership", Word::Watership),
        (DEBEZIUM, Word::Debezium),
        (CLOUDEVENTS, Word::CloudEvents),
    ];
    if is_table {
        words.swap(0, 1);
    }
    let word = t.word("format", &words);
    let mut options = t.table(DEBEZIUM, "such as { topic_prefix = \"shop\" }");
    let first = options.asked();
    let (debezium, key) = debezium(&mut options, is_table, relay);
    let given = options.given_since(first);
    drop(options);
    let is_default = key == Key::Template && debezium == default_debezium(relay);
    if word != Word::Debezium && !is_default {
        let (path, given) = (t.path(DEBEZIUM), given.join(", "));
        let text = format!("{path} has no effect without format = \"debezium\": {given}");
        t.problem(DEBEZIUM, text);
    }
    let mut options = t.table(CLOUDEVENTS, "such as { mode = \"structured\" }");
    let cloudevents = cloudevents(&mut options);
    drop(options);
    if word != Word::CloudEvents && cloudevents != CloudEvents::default() {
        let path = t.path(CLOUDEVENTS);
        let text = format!("{path} has no effect without format = \"cloudevents\"");
        t.problem(CLOUDEVENTS, text);
    }
    let routing_key = match key {
        Key::Template => None,
        Key::Empty => Some(String::new()),
        Key::Record => Some("{record_key}".to_owned()),
        Key::Topic if is_table => Some(topic_template(&debezium.topic_prefix)),
        Key::Topic => Some("outbox.event.{aggregate_type}".to_owned()),
    };
    match word {
        Word::Raw => (Format::Raw, None),
        Word::Watership => (Format::Watership, None),
        Word::CloudEvents => (Format::CloudEvents(Arc::new(cloudevents)), None),
        Word::Debezium => (Format::Debezium(Arc::new(debezium)), routing_key),
    }
}

/// What the routing key is, as the sink of Debezium Server has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Key {
    /// That of the route.
    Template,
    Empty,
    Topic,
    Record,
}

fn debezium(t: &mut Section<'_>, is_table: bool, relay: &str) -> (Debezium, Key) {
    let default = default_debezium(relay);
    let first = t.asked();
    let values = values(t, default.values);
    let keys = [
        ("template", Key::Template),
        ("empty", Key::Empty),
        ("topic", Key::Topic),
        ("key", Key::Record),
    ];
    let key = t.word("routing_key", &keys);
    let bodies = [("empty", TombstoneBody::Empty), ("default", TombstoneBody::Default)];
    let debezium = Debezium {
        values,
        topic_prefix: t.text("topic_prefix", &default.topic_prefix),
        version: t.text("version", &default.version),
        event_time: t.word(
            "event_time",
            &[("commit", EventTime::Commit), ("processing", EventTime::Processing)],
        ),
        tombstones: t.flag("tombstones", default.tombstones),
        tombstone_body: t.word("tombstone_body", &bodies),
        skipped: skipped(t),
        router: router(t),
    };
    let of_outbox = Debezium {
        router: debezium.router.clone(),
        tombstone_body: debezium.tombstone_body,
        ..default_debezium(relay)
    };
    let given = t.given_since(first);
    if !is_table && of_outbox != debezium {
        let allowed = format!("{}, {}", OF_BOTH.join(", "), OF_ROUTER.join(", "));
        let of_tables = |key: &&str| !OF_BOTH.contains(key) && !OF_ROUTER.contains(key);
        for key in given.into_iter().filter(of_tables) {
            let shown = shown(t, key);
            let text = format!("{shown} is for routes of tables; an outbox route has: {allowed}");
            t.problem(key, text);
        }
    } else if is_table && debezium.router != EventRouter::default() {
        for key in given.into_iter().filter(|key| OF_ROUTER.contains(key)) {
            let shown = shown(t, key);
            t.problem(key, format!("{shown} is for outbox routes; remove it"));
        }
    }
    (debezium, key)
}

/// The options that any route has.
const OF_BOTH: [&str; 2] = ["routing_key", "tombstone_body"];

/// The options of the outbox event router.
const OF_ROUTER: [&str; 8] = [
    PLACEMENT,
    "missing_field",
    "expand_json_payload",
    "json_null",
    "json_empty_array",
    "tombstone_on_empty_payload",
    "payload_as_string",
    "quoted_id",
];

const PLACEMENT: &str = "additional_placement";

/// The key with its value.
fn shown<'f>(t: &mut Section<'f>, key: &'f str) -> String {
    let path = t.path(key);
    if key == PLACEMENT {
        return path;
    }
    match t.scalar(key) {
        Some(Scalar::Text(text)) => format!("{path} = {text:?}"),
        Some(Scalar::Int(number)) => format!("{path} = {number}"),
        Some(Scalar::Bool(yes)) => format!("{path} = {yes}"),
        None => path,
    }
}

fn values(t: &mut Section<'_>, default: ValueForms) -> ValueForms {
    let decimals = [
        ("precise", DecimalHandling::Precise),
        ("double", DecimalHandling::Double),
        ("string", DecimalHandling::String),
    ];
    let times = [
        ("adaptive", TimePrecision::Adaptive),
        ("adaptive_time_microseconds", TimePrecision::AdaptiveTimeMicroseconds),
        ("connect", TimePrecision::Connect),
        ("isostring", TimePrecision::IsoString),
        ("microseconds", TimePrecision::Microseconds),
        ("nanoseconds", TimePrecision::Nanoseconds),
    ];
    let intervals = [("numeric", IntervalHandling::Numeric), ("string", IntervalHandling::String)];
    let binaries = [
        ("bytes", BinaryHandling::Bytes),
        ("base64", BinaryHandling::Base64),
        ("base64-url-safe", BinaryHandling::Base64UrlSafe),
        ("hex", BinaryHandling::Hex),
    ];
    let hstores = [("json", HstoreHandling::Json), ("map", HstoreHandling::Map)];
    ValueForms {
        decimal: t.word("decimal_handling", &decimals),
        time: t.word("time_precision", &times),
        interval: t.word("interval_handling", &intervals),
        binary: t.word("binary_handling", &binaries),
        hstore: t.word("hstore_handling", &hstores),
        money_fraction_digits: t.number(
            "money_fraction_digits",
            default.money_fraction_digits,
            0..=MONEY_DIGITS_MAX,
        ),
        include_unknown: t.flag("include_unknown", default.include_unknown),
        unavailable: t.text("unavailable_value", &default.unavailable),
    }
}

/// `"c,u,d,t"`, or `"none"`.
fn skipped(t: &mut Section<'_>) -> Vec<Op> {
    const KEY: &str = "skipped_operations";
    let text = t.text(KEY, "t");
    if text == "none" {
        return Vec::new();
    }
    let op = |letter: &str| match letter.trim() {
        "c" => Some(Op::Insert),
        "u" => Some(Op::Update),
        "d" => Some(Op::Delete),
        "t" => Some(Op::Truncate),
        _ => None,
    };
    let ops: Option<Vec<Op>> = text.split(',').map(op).collect();
    ops.unwrap_or_else(|| {
        t.invalid(KEY, format!("{text:?}"), "\"none\", or some of c, u, d, t with commas");
        Vec::new()
    })
}

fn router(t: &mut Section<'_>) -> EventRouter {
    const EXPECTED: &str = "\"field:header\" or \"field:envelope\", followed by \":alias\" to \
        rename it";
    let mut placements = Vec::new();
    for text in t.list(PLACEMENT) {
        let parts: Vec<&str> = text.split(':').collect();
        let (field, place, name) = match parts[..] {
            [field, place] => (field, place, field),
            [field, place, name] => (field, place, name),
            _ => ("", "", ""),
        };
        if field.is_empty() || name.is_empty() || !matches!(place, "header" | "envelope") {
            t.invalid(PLACEMENT, format!("{text:?}"), EXPECTED);
            continue;
        }
        let in_body = place == "envelope";
        let is_same = |other: &Placement| other.in_body == in_body && other.name == name;
        // The router itself makes these.
        let own = if in_body { "payload" } else { "id" };
        if name == own || placements.iter().any(is_same) {
            let whose = if name == own { "the router itself" } else { "another field" };
            let expected = format!(
                "an alias of its own, such as {:?}: {whose} has the name {name:?} in the {place}",
                format!("{field}:{place}:{name}2")
            );
            t.invalid(PLACEMENT, format!("{text:?}"), expected);
            continue;
        }
        if !in_body && crate::envelope::is_reserved_header(name) {
            t.invalid(PLACEMENT, format!("{text:?}"), "a header other than CC, BCC, x-* and ws-*");
        }
        placements.push(Placement { field: field.to_owned(), in_body, name: name.to_owned() });
    }
    EventRouter {
        placements,
        ignore_missing: t.word("missing_field", &[("error", false), ("ignore", true)]),
        expand: t.flag("expand_json_payload", false),
        keep_nulls: t.word("json_null", &[("ignore", false), ("keep", true)]),
        keep_empty_arrays: t.word("json_empty_array", &[("ignore", false), ("keep", true)]),
        tombstone_on_empty: t.flag("tombstone_on_empty_payload", false),
        payload_as_string: t.flag("payload_as_string", false),
        quoted_id: t.flag("quoted_id", false),
    }
}

fn cloudevents(t: &mut Section<'_>) -> CloudEvents {
    let options = CloudEvents {
        structured: t.word("mode", &[("binary", false), ("structured", true)]),
        source: t.text("source", ""),
        kind: t.text("type", ""),
        type_prefix: t.text("type_prefix", ""),
        dataschema: t.text("dataschema", ""),
    };
    // RFC 3986, section 2; a dataschema is a URI with its scheme.
    let is_uri = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&'()*+,;=%".contains(c);
    let has_scheme = options.dataschema.is_empty() || options.dataschema.contains(':');
    if !options.dataschema.chars().all(is_uri) || !has_scheme {
        let expected = "a URI, such as \"https://example.com/order.json\"";
        t.invalid("dataschema", format!("{:?}", options.dataschema), expected);
    }
    if options.type_prefix.contains(char::is_control) {
        let expected = "text without control characters";
        t.invalid("type_prefix", format!("{:?}", options.type_prefix), expected);
    }
    options
}

fn default_debezium(relay: &str) -> Debezium {
    Debezium {
        values: ValueForms::default(),
        topic_prefix: relay.to_owned(),
        version: "watership".to_owned(),
        event_time: EventTime::Commit,
        tombstones: false,
        tombstone_body: TombstoneBody::Empty,
        skipped: vec![Op::Truncate],
        router: EventRouter::default(),
    }
}
