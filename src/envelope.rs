//! Event to message: properties, headers and body. Pure.
//!
//! An outbox payload passes through verbatim: the relay does not parse what the application wrote
//! (no number or key-order damage, and fast). A captured change becomes one JSON object.

use std::fmt::Write as _;

use crate::column;
use crate::error::{Error, Result};
use crate::event::{
    Change, Content, Event, OldRow, OutboxRow, Payload, Row, Table, Value, route_id,
};
use crate::message::{Builder, Message, Properties, ROUTE_HEADER};
use crate::route::{MessageIdRule, Ordering, Route};

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";

/// Turns events into messages.
#[derive(Debug)]
pub struct Envelope {
    app_id: String,
    // Scratch space, kept between events.
    routing_key: String,
    kind: String,
    key: String,
    message: Vec<u8>,
}

impl Envelope {
    /// `app_id` is the relay's name.
    pub fn new(app_id: impl Into<String>) -> Self {
        let (routing_key, kind, key, message) = Default::default();
        Self { app_id: app_id.into(), routing_key, kind, key, message }
    }

    /// The event's message on this route.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when something in it cannot be carried by AMQP.
    pub fn message(&mut self, event: &Event, route: &Route) -> Result<Message> {
        let mut message = self.make(event, route)?;
        message.in_sequence = route.ordering == Ordering::Pipelined;
        message.route_hash = route.hash();
        Ok(message)
    }

    fn make(&mut self, event: &Event, route: &Route) -> Result<Message> {
        route.routing_key(event, &mut self.routing_key)?;
        self.kind.clear();
        self.key.clear();
        let (content_type, body_len) = match &event.content {
            Content::Outbox(row) => {
                self.kind.push_str(&row.event_type);
                let _ = write!(self.key, "{}/{}", row.aggregate_type, row.aggregate_id);
                outbox_content(row)
            }
            Content::Change(change) => {
                let op = event.op().as_str();
                let _ = write!(self.kind, "{}.{op}", event.table.full_name);
                write_key_text(
                    &mut self.key,
                    &event.table,
                    &route.key_columns(&event.table),
                    change,
                )?;
                (JSON, change_len(change))
            }
        };
        let message_id = match route.message_id {
            MessageIdRule::Event => event.id,
            MessageIdRule::Route => route_id(event.id, &route.name),
        };
        let properties = Properties {
            content_type,
            message_id,
            timestamp: u64::try_from(event.committed_at_us / 1_000_000).unwrap_or(0),
            kind: &self.kind,
            app_id: &self.app_id,
        };
        let mut builder = Builder::new(&mut self.message, &self.routing_key, properties)?;
        builder.header_with("ws-position", |out| event.position.write_text(out))?;
        builder.header_text(ROUTE_HEADER, route.name.as_bytes())?;
        builder.header_key(&self.key)?;
        builder.header_text("ws-source", event.table.full_name.as_bytes())?;
        builder.header_text("ws-op", event.op().as_str().as_bytes())?;
        match &event.content {
            Content::Outbox(row) => {
                if let Some(traceparent) = &row.traceparent {
                    builder.header_text("traceparent", traceparent.as_bytes())?;
                }
                if let Some(headers) = &row.headers {
                    write_headers(&mut builder, headers, row.traceparent.is_some())?;
                }
                let body = Body::of(&row.payload)?;
                builder.finish(route.exchange, route.id, |out| body.write(out))
            }
            Content::Change(change) => {
                let mut body = Vec::with_capacity(body_len);
                write_change(&mut body, event, route, change)?;
                builder.finish(route.exchange, route.id, |out| out.extend_from_slice(&body))
            }
        }
    }
}

fn outbox_content(row: &OutboxRow) -> (&str, usize) {
    let (default, len) = match &row.payload {
        Payload::Json(json) => (JSON, json.len()),
        Payload::Hex(hex) => (BYTES, hex.len() / 2),
        Payload::Broken(_) => (BYTES, 0),
    };
    (row.content_type.as_deref().unwrap_or(default), len)
}

/// A body that is known to be writable.
enum Body<'a> {
    Verbatim(&'a [u8]),
    Hex(&'a [u8]),
}

impl<'a> Body<'a> {
    fn of(payload: &'a Payload) -> Result<Self> {
        match payload {
            Payload::Json(json) => Ok(Body::Verbatim(json)),
            Payload::Hex(text) => {
                let digits = text
                    .strip_prefix(b"\\x")
                    .filter(|d| d.len().is_multiple_of(2) && d.iter().all(u8::is_ascii_hexdigit));
                digits.map(Body::Hex).ok_or_else(|| {
                    Error::event("column \"data\" is not in hex form")
                        .hint("the replication session must run with bytea_output = hex")
                })
            }
            Payload::Broken(broken) => Err(Error::event(broken.why.clone())
                .hint("no retry can mend the row: discard it, and restore the outbox's checks")),
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

fn write_headers(builder: &mut Builder<'_>, headers: &[u8], has_traceparent: bool) -> Result<()> {
    let wrong =
        |e: serde_json::Error| Error::event("column \"headers\" is no JSON object").caused_by(e);
    let map: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(headers).map_err(wrong)?;
    for (name, value) in &map {
        if is_reserved_header(name) {
            return Err(Error::event(format!("header {name:?} is reserved"))
                .hint("CC, BCC, x-* and ws-* are not the application's; choose another name"));
        }
        if name == "traceparent" && has_traceparent {
            continue;
        }
        match value {
            serde_json::Value::Null => builder.header_void(name)?,
            serde_json::Value::Bool(value) => builder.header_bool(name, *value)?,
            serde_json::Value::String(text) => builder.header_text(name, text.as_bytes())?,
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(int), _) => builder.header_int(name, int)?,
                (None, Some(float)) => builder.header_float(name, float)?,
                (None, None) => builder.header_text(name, number.to_string().as_bytes())?,
            },
            // AMQP tables could nest, but few clients read them; JSON text is read by all.
            serde_json::Value::Array(_) | serde_json::Value::Object(_) => {
                builder.header_text(name, value.to_string().as_bytes())?;
            }
        }
    }
    Ok(())
}

fn change_len(change: &Change) -> usize {
    const FRAME: usize = 400;
    let row = |row: &Row| -> usize {
        row.iter().map(|v| if let Value::Text(t) = v { t.len() + 32 } else { 16 }).sum()
    };
    let rows = match change {
        Change::Insert { new } | Change::Update { old: None, new } => row(new),
        Change::Update { old: Some(old), new } => row(old.row()) + row(new),
        Change::Delete { old } => row(old.row()),
        Change::Truncate => 0,
    };
    FRAME + rows
}

/// The row that tells the key after the change (before it, for a delete).
fn key_row(change: &Change) -> Option<&Row> {
    match change {
        Change::Insert { new } | Change::Update { new, .. } => Some(new),
        Change::Delete { old } => Some(old.row()),
        Change::Truncate => None,
    }
}

/// `value/value` of the key columns; for people and logs, not for parsing.
fn write_key_text(out: &mut String, table: &Table, key: &[usize], change: &Change) -> Result<()> {
    out.push_str(&table.full_name);
    let Some(row) = key_row(change) else { return Ok(()) };
    for &column in key {
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

/// The event's key on the route, or its own without one; for people and logs.
pub fn key_text(event: &Event, route: Option<&Route>) -> String {
    let change = match &event.content {
        Content::Outbox(row) => return format!("{}/{}", row.aggregate_type, row.aggregate_id),
        Content::Change(change) => change,
    };
    let table = &event.table;
    let columns = route.map_or_else(|| table.key.clone(), |route| route.key_columns(table));
    let mut text = table.full_name.to_string();
    // A key that is no text is shown as far as it is.
    let _ = write_key_text(&mut text, table, &columns, change);
    text.split_off(table.full_name.len())
}

fn write_change(out: &mut Vec<u8>, event: &Event, route: &Route, change: &Change) -> Result<()> {
    let table = &*event.table;
    let text = |out: &mut Vec<u8>, name: &str, value: &str| {
        out.extend_from_slice(name.as_bytes());
        column::write_string(out, value);
    };
    text(out, "{\"op\":", event.op().as_str());
    text(out, ",\"source\":{\"schema\":", &table.schema);
    text(out, ",\"table\":", &table.name);
    text(out, ",\"commit_lsn\":", &event.position.commit_lsn.to_string());
    out.extend_from_slice(format!(",\"xid\":{}}},\"key\":", event.xid).as_bytes());
    match key_row(change) {
        Some(row) => write_row(out, table, row, Some(&route.key_columns(table)))?,
        None => out.extend_from_slice(b"null"),
    }
    let (before, after) = match change {
        Change::Insert { new } => (None, Some(new)),
        Change::Update { old, new } => (old.as_ref(), Some(new)),
        Change::Delete { old } => (Some(old), None),
        Change::Truncate => (None, None),
    };
    out.extend_from_slice(b",\"before\":");
    match before {
        None => out.extend_from_slice(b"null"),
        Some(OldRow::Full(row)) => write_row(out, table, row, None)?,
        Some(OldRow::Key(row)) => write_row(out, table, row, Some(&identity(table, row)))?,
    }
    out.extend_from_slice(b",\"after\":");
    match after {
        None => out.extend_from_slice(b"null"),
        Some(row) => {
            write_row(out, table, row, None)?;
            write_unchanged(out, table, row);
        }
    }
    text(out, ",\"position\":", &event.position.to_string());
    text(out, ",\"committed_at\":", &iso_time(event.committed_at_us));
    out.push(b'}');
    Ok(())
}

/// Of an old key Postgres sends the identity's columns; the rest are null and mean nothing.
fn identity(table: &Table, row: &Row) -> Vec<usize> {
    if !table.key.is_empty() {
        return table.key.clone();
    }
    (0..row.len()).filter(|&i| row[i] != Value::Null).collect()
}

/// The row as a JSON object; unchanged TOAST values are absent.
fn write_row(out: &mut Vec<u8>, table: &Table, row: &Row, only: Option<&[usize]>) -> Result<()> {
    let mut separator = b'{';
    let mut write = |index: usize| {
        let column = &table.columns[index];
        let value = &row[index];
        if *value == Value::Unchanged {
            return Ok(());
        }
        out.push(separator);
        separator = b',';
        column::write_string(out, &column.name);
        out.push(b':');
        match value {
            Value::Null | Value::Unchanged => out.extend_from_slice(b"null"),
            Value::Text(text) => column::write_json(out, column.type_oid, text)
                .map_err(|e| e.context(format!("column {:?}", column.name)))?,
            Value::Unreadable(value) => {
                let text = format!("column {:?}: {}", column.name, value.why);
                return Err(Error::event(text));
            }
        }
        Ok::<(), Error>(())
    };
    match only {
        Some(columns) => columns.iter().copied().try_for_each(&mut write)?,
        None => (0..row.len()).try_for_each(&mut write)?,
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
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
