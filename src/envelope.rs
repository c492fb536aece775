//! Event to message: properties, headers and body. Pure.
//!
//! An outbox payload passes through verbatim: the relay does not parse what the application wrote
//! (no number or key-order damage, and fast). A captured change becomes one JSON object.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::value::RawValue;
use uuid::Uuid;

use crate::column;
use crate::error::{Error, Result};
use crate::event::{
    Change, Column, Content, Event, Identity, OldRow, OutboxPayload, OutboxRow, Row, Table, Value,
    id,
};
use crate::message::{Builder, Message, Properties, ROUTE_HEADER};
use crate::route::{MessageIdRule, Ordering, Plan, Route, TablePlan};

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";
/// A body above this size, in bytes, does not stay in memory as scratch space.
const SCRATCH_KEPT: usize = 64 * 1024;

/// Turns events into messages.
#[derive(Debug)]
pub struct Envelope {
    app_id: String,
    // Scratch space, kept between events.
    routing_key: String,
    kind: String,
    key: String,
    body: Vec<u8>,
    message: Vec<u8>,
    /// The last commit time as text: the same for all changes of a transaction.
    committed_at: (i64, String),
}

impl Envelope {
    /// `app_id` is the relay's name.
    pub fn new(app_id: impl Into<String>) -> Self {
        let (routing_key, kind, key, body, message) = Default::default();
        let committed_at = (0, iso_time(0));
        Self { app_id: app_id.into(), routing_key, kind, key, body, message, committed_at }
    }

    /// The event's message number `part` on this route; almost every event has one, number 0.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when something in it cannot be carried by AMQP.
    pub fn message(&mut self, event: &Event, plan: &Plan, part: u16) -> Result<Message> {
        let mut message = match &event.content {
            Content::Outbox(row) => self.of_outbox(event, row, plan, part),
            Content::Change(change) => {
                let table = plan.table.as_ref().expect("a captured table has a plan of its own");
                self.of_change(event, change, plan, table, part)
            }
        }?;
        message.in_sequence = plan.route.ordering == Ordering::Pipelined;
        message.part = part;
        message.route_hash = plan.route.hash();
        Ok(message)
    }

    fn of_outbox(
        &mut self,
        event: &Event,
        row: &OutboxRow,
        plan: &Plan,
        part: u16,
    ) -> Result<Message> {
        let route = &*plan.route;
        self.key.clear();
        self.key.push_str(&row.aggregate_type);
        self.key.push('/');
        self.key.push_str(&row.aggregate_id);
        route.routing_key(event, &self.key, &mut self.routing_key)?;
        let default = match &row.payload {
            OutboxPayload::Json(_) => JSON,
            OutboxPayload::Hex(_) | OutboxPayload::Broken(_) => BYTES,
        };
        let properties = Properties {
            content_type: row.content_type.as_deref().unwrap_or(default),
            message_id: message_id(event.id, route, part),
            timestamp: seconds(event.occurred_at_us),
            kind: &row.event_type,
            app_id: &self.app_id,
        };
        let mut builder = Builder::new(&mut self.message, &self.routing_key, properties)?;
        write_own_headers(&mut builder, event, plan, &self.key)?;
        if let Some(traceparent) = &row.traceparent {
            builder.header_text("traceparent", traceparent.as_bytes())?;
        }
        if let Some(headers) = &row.headers {
            write_headers(&mut builder, headers, row.traceparent.is_some())?;
        }
        let body = Body::of(&row.payload)?;
        builder.finish(route.exchange, route.id, |out| body.write(out))
    }

    fn of_change(
        &mut self,
        event: &Event,
        change: &Change,
        plan: &Plan,
        table: &TablePlan,
        part: u16,
    ) -> Result<Message> {
        let route = &*plan.route;
        let op = event.op().as_str();
        self.kind.clear();
        self.kind.push_str(&event.table.full_name);
        self.kind.push('.');
        self.kind.push_str(op);
        self.key.clear();
        self.key.push_str(&event.table.full_name);
        write_key_text(&mut self.key, &event.table, table, change)?;
        route.routing_key(event, &self.key, &mut self.routing_key)?;
        if self.committed_at.0 != event.committed_at_us {
            self.committed_at = (event.committed_at_us, iso_time(event.committed_at_us));
        }
        self.body.clear();
        write_change(&mut self.body, event, table, change, &self.committed_at.1)?;
        let properties = Properties {
            content_type: JSON,
            message_id: message_id(event.id, route, part),
            timestamp: seconds(event.occurred_at_us),
            kind: &self.kind,
            app_id: &self.app_id,
        };
        let mut builder = Builder::new(&mut self.message, &self.routing_key, properties)?;
        write_own_headers(&mut builder, event, plan, &self.key)?;
        builder.header_text("ws-source", event.table.full_name.as_bytes())?;
        builder.header_text("ws-op", op.as_bytes())?;
        let body = &self.body;
        let message = builder.finish(route.exchange, route.id, |out| out.extend_from_slice(body));
        if self.body.capacity() > SCRATCH_KEPT {
            self.body = Vec::new();
        }
        message
    }
}

/// What every message carries. What is constant for a kind of message is not in a header: each
/// costs the broker 1.3 µs a message.
fn write_own_headers(
    builder: &mut Builder<'_>,
    event: &Event,
    plan: &Plan,
    key: &str,
) -> Result<()> {
    builder.header_text("ws-position", &event.position.text())?;
    builder.header_text(ROUTE_HEADER, plan.route.name.as_bytes())?;
    builder.header_key(key)?;
    builder.header_int("ws-committed-at", event.committed_at_us)
}

/// The id of an event's message number `part` on a route.
pub fn message_id(event: Uuid, route: &Route, part: u16) -> Uuid {
    match route.message_id {
        MessageIdRule::Event => id::part(event, part),
        MessageIdRule::Route => id::part(id::of_route(event, &route.name), part),
    }
}

/// AMQP's timestamp: seconds since 1970-01-01 UTC, and nothing before.
fn seconds(us: i64) -> u64 {
    u64::try_from(us.div_euclid(1_000_000)).unwrap_or(0)
}

/// A body that is known to be writable.
enum Body<'a> {
    Verbatim(&'a [u8]),
    Hex(&'a [u8]),
}

impl<'a> Body<'a> {
    fn of(payload: &'a OutboxPayload) -> Result<Self> {
        match payload {
            OutboxPayload::Json(json) => Ok(Body::Verbatim(json)),
            OutboxPayload::Hex(text) => {
                let digits = text
                    .strip_prefix(b"\\x")
                    .filter(|d| d.len().is_multiple_of(2) && d.iter().all(u8::is_ascii_hexdigit));
                digits.map(Body::Hex).ok_or_else(|| {
                    Error::event("column \"data\" is not in hex form")
                        .hint("the replication session must run with bytea_output = hex")
                })
            }
            OutboxPayload::Broken(broken) => Err(Error::event(broken.why.clone())
                .hint("discard the row, and restore the outbox's CHECK constraints")),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Body::Verbatim(bytes) => out.extend_from_slice(bytes),
            Body::Hex(digits) => {
                let digit = |d: u8| match d {
                    b'0'..=b'9' => d - b'0',
                    _ => (d | 0x20) - b'a' + 10,
                };
                out.extend(digits.chunks_exact(2).map(|d| digit(d[0]) << 4 | digit(d[1])));
            }
        }
    }
}

/// True for names that RabbitMQ or the relay give a meaning to: an application must not set them.
/// `CC` and `BCC` would add routing keys (sender-selected distribution). Header names are
/// case-sensitive, so an application's `X-Request-Id` is its own; the outbox's check says the same.
pub fn is_reserved_header(name: &str) -> bool {
    name == "CC" || name == "BCC" || name.starts_with("x-") || name.starts_with("ws-")
}

/// Numbers never go through a double, which would change them, and which clients read in their own
/// ways: what is not an integer of 64 bits stays the text that it is.
fn write_headers(builder: &mut Builder<'_>, headers: &[u8], has_traceparent: bool) -> Result<()> {
    let wrong = |e: serde_json::Error| {
        let error = Error::event("column \"headers\" is not a JSON object");
        // What another kind of value is, serde shows with the value.
        if e.is_data() { error } else { error.caused_by(e) }
    };
    let map: BTreeMap<String, &RawValue> = serde_json::from_slice(headers).map_err(wrong)?;
    for (name, value) in &map {
        if is_reserved_header(name) {
            return Err(Error::event(format!("header {name:?} is reserved"))
                .hint("applications cannot set CC, BCC, x-* or ws-*; choose another name"));
        }
        if name == "traceparent" && has_traceparent {
            continue;
        }
        let text = value.get();
        match text.as_bytes().first() {
            Some(b'n') => builder.header_void(name)?,
            Some(b't' | b'f') => builder.header_bool(name, text == "true")?,
            Some(b'"') => {
                let value: String = serde_json::from_str(text).map_err(wrong)?;
                builder.header_text(name, value.as_bytes())?;
            }
            // AMQP tables could nest, but few clients read them; JSON text is read by all.
            Some(b'{' | b'[') => builder.header_text(name, compact(text).as_bytes())?,
            _ => match text.parse() {
                Ok(int) => builder.header_int(name, int)?,
                Err(_) => builder.header_text(name, text.as_bytes())?,
            },
        }
    }
    Ok(())
}

/// JSON without the white space between its parts; everything else as it is.
fn compact(json: &str) -> String {
    let (mut quoted, mut escaped) = (false, false);
    let keep = |c: &char| {
        let inside = quoted;
        quoted ^= *c == '"' && !escaped;
        escaped = quoted && *c == '\\' && !escaped;
        inside || !c.is_ascii_whitespace()
    };
    json.chars().filter(keep).collect()
}

/// The row that tells the key after the change (before it, for a delete).
fn key_row(change: &Change) -> Option<&Row> {
    match change {
        Change::Insert { new } | Change::Update { new, .. } => Some(new),
        Change::Delete { old } => Some(old.row()),
        Change::Truncate => None,
    }
}

/// The columns that name the row. A delete whose old row does not have the key is named by what it
/// has.
fn key_columns<'a>(table: &'a TablePlan, change: &'a Change) -> impl Iterator<Item = usize> + 'a {
    let old = match change {
        Change::Delete { old: OldRow::Key(row) } => Some(row),
        Change::Delete { old: OldRow::Full(_) }
        | Change::Insert { .. }
        | Change::Update { .. }
        | Change::Truncate => None,
    };
    sent_columns(&table.key, old)
}

/// These columns; of an old row that is only an identity, all that were sent where one of these was
/// not. No column of an identity can be null: what is null was not sent.
fn sent_columns<'a>(wanted: &'a [usize], old: Option<&'a Row>) -> impl Iterator<Item = usize> + 'a {
    let is_sent = move |column: &usize| old.is_none_or(|row| row[*column] != Value::Null);
    let all = old.filter(|_| wanted.is_empty() || !wanted.iter().all(is_sent));
    let count = all.map_or(wanted.len(), |row| row.len());
    (0..count).map(move |i| if all.is_some() { i } else { wanted[i] }).filter(is_sent)
}

/// `/value/value` of the key columns; for people and logs, not for parsing.
fn write_key_text(
    out: &mut String,
    table: &Table,
    plan: &TablePlan,
    change: &Change,
) -> Result<()> {
    let Some(row) = key_row(change) else { return Ok(()) };
    for column in key_columns(plan, change) {
        out.push('/');
        if let Value::Text(text) = &row[column] {
            let text = std::str::from_utf8(text).map_err(|_| {
                Error::event(format!("key column {:?} is not UTF-8", table.columns[column].name))
            })?;
            out.push_str(text);
        }
    }
    Ok(())
}

/// The event's key by this plan, for people and logs.
pub fn key_text(event: &Event, plan: &Plan) -> String {
    let change = match &event.content {
        Content::Outbox(row) => return format!("{}/{}", row.aggregate_type, row.aggregate_id),
        Content::Change(change) => change,
    };
    let mut text = event.table.full_name.to_string();
    if let Some(table) = &plan.table {
        // A key that is not text is shown as far as it is.
        let _ = write_key_text(&mut text, &event.table, table, change);
    }
    text
}

fn write_change(
    out: &mut Vec<u8>,
    event: &Event,
    plan: &TablePlan,
    change: &Change,
    committed_at: &str,
) -> Result<()> {
    let table = &*event.table;
    out.extend_from_slice(b"{\"op\":\"");
    out.extend_from_slice(event.op().as_str().as_bytes());
    out.extend_from_slice(b"\",");
    out.extend_from_slice(&plan.source_json);
    // A captured change comes from the WAL: its mark is the commit LSN.
    let _ = write!(Text(out), "\"{}\",\"xid\":{}}}", event.position.mark.lsn(), event.xid);
    out.extend_from_slice(b",\"key\":");
    match key_row(change) {
        Some(row) => write_row(out, table, row, key_columns(plan, change))?,
        None => out.extend_from_slice(b"null"),
    }
    let (before, after) = match change {
        Change::Insert { new } => (None, Some(new)),
        Change::Update { old, new } => (old.as_ref(), Some(new)),
        Change::Delete { old } => (Some(old), None),
        Change::Truncate => (None, None),
    };
    out.extend_from_slice(b",\"before\":");
    match (before, &table.identity) {
        (None, _) => out.extend_from_slice(b"null"),
        (Some(OldRow::Full(row)), _) => write_row(out, table, row, 0..row.len())?,
        (Some(OldRow::Key(row)), identity) => {
            let wanted: &[usize] = match identity {
                Identity::Columns(columns) => columns,
                Identity::Full | Identity::Nothing => &[],
            };
            write_row(out, table, row, sent_columns(wanted, Some(row)))?;
        }
    }
    out.extend_from_slice(b",\"after\":");
    match after {
        None => out.extend_from_slice(b"null"),
        Some(row) => {
            write_row(out, table, row, 0..row.len())?;
            write_unchanged(out, table, row);
        }
    }
    out.extend_from_slice(b",\"position\":\"");
    out.extend_from_slice(&event.position.text());
    out.extend_from_slice(b"\",\"committed_at\":\"");
    out.extend_from_slice(committed_at.as_bytes());
    out.extend_from_slice(b"\"}");
    Ok(())
}

/// Lets `write!` append to bytes.
struct Text<'a>(&'a mut Vec<u8>);

impl std::fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// The row as a JSON object of these columns; unchanged TOAST values are absent.
fn write_row(
    out: &mut Vec<u8>,
    table: &Table,
    row: &Row,
    columns: impl Iterator<Item = usize>,
) -> Result<()> {
    let mut separator = b'{';
    for index in columns {
        let column = &table.columns[index];
        match &row[index] {
            Value::Unchanged => continue,
            value => {
                out.push(separator);
                separator = b',';
                out.extend_from_slice(&column.name_json);
                write_value(out, column, value)?;
            }
        }
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    Ok(())
}

fn write_value(out: &mut Vec<u8>, column: &Column, value: &Value) -> Result<()> {
    match value {
        Value::Null | Value::Unchanged => out.extend_from_slice(b"null"),
        Value::Text(text) => column
            .shape
            .write(out, text)
            .map_err(|e| e.context(format!("column {:?}", column.name)))?,
        Value::Unreadable(value) => {
            let text = format!("column {:?}: {}", column.name, value.why);
            return Err(Error::event(text));
        }
    }
    Ok(())
}

fn write_unchanged(out: &mut Vec<u8>, table: &Table, row: &Row) {
    let mut separator: &[u8] = b",\"unchanged\":[";
    for (column, value) in table.columns.iter().zip(row) {
        if *value == Value::Unchanged {
            out.extend_from_slice(separator);
            separator = b",";
            column::write_string(out, &column.name);
        }
    }
    if separator == b"," {
        out.push(b']');
    }
}

/// `2024-01-02T03:04:05.123456Z`.
fn iso_time(us: i64) -> String {
    match jiff::Timestamp::from_microsecond(us) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => us.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::compact;

    #[test]
    fn json_is_compacted_outside_of_strings_only() {
        for (json, expected) in [
            ("{\"a\": [1, 2.50]}", "{\"a\":[1,2.50]}"),
            ("{ \"a b\" : \"c  d\" }", "{\"a b\":\"c  d\"}"),
            ("[\"\\\" , \", 1]", "[\"\\\" , \",1]"),
            ("[\"\\\\\", 1]", "[\"\\\\\",1]"),
        ] {
            assert_eq!(compact(json), expected);
        }
    }
}
