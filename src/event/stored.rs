//! An event as a JSON document and back: how the raw row of a parked event is kept. Pure.
//!
//! Invariant: what comes back is the event that was stored, byte for byte, so that a retry makes
//! the message that would have been made then, or the right one under a corrected configuration.
//! A document names the version of its form; one of a later version is refused, not guessed.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use bytestring::ByteString;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::hidden::Hidden;
use super::{
    Broken, Change, Column, Content, Event, Identity, OldRow, OutboxPayload, OutboxRow, Row, Table,
    Unreadable, Value,
};
use crate::column::{Resolved, Shape};
use crate::error::{Error, Result};
use crate::position::{Lsn, Position};

/// Version of the latest form that this program writes. It reads this one and those before it.
const FORM: u32 = 2;
/// The form of a document without what the second form brought, which are shapes, hidden values,
/// further columns, and the rows that a backfill read: an earlier program reads what it knows.
const FIRST_FORM: u32 = 1;

/// Bytes of a document above which large values are left out of it. It is in memory several times
/// while it is written or tried again, and Postgres has to read and write it within the time of one
/// statement.
pub const STORED_MAX: usize = 64 << 20;
/// Bytes of a value that stays even then.
const KEPT_MAX: usize = 1 << 20;

/// The document. Id and position stand beside it.
#[derive(Serialize, Deserialize)]
struct Stored {
    form: u32,
    /// LSN of the change, as a number; absent from a source that does not read the WAL.
    lsn: Option<u64>,
    occurred_at_us: i64,
    committed_at_us: i64,
    xid: u32,
    table: StoredTable,
    content: StoredContent,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hidden: Option<Hidden>,
}

#[derive(Serialize, Deserialize)]
struct StoredTable {
    database: String,
    oid: u32,
    version: u64,
    schema: String,
    name: String,
    /// Absent where it is schema and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    full_name: Option<String>,
    /// Name, type OID and type modifier.
    columns: Vec<(String, u32, i32)>,
    /// How values are written, by column, where the type alone does not say it. A type can be gone
    /// when the row is tried again.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    shapes: BTreeMap<usize, Shape>,
    /// What types of users and extensions are made of, by column, likewise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    resolved: BTreeMap<usize, Resolved>,
    key: Vec<usize>,
    identity: StoredIdentity,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredIdentity {
    Nothing,
    Columns(Vec<usize>),
    Full,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredContent {
    Outbox(Box<StoredOutbox>),
    Insert { new: Vec<Cell> },
    Read { new: Vec<Cell>, run: String },
    Update { old: Option<StoredOld>, new: Vec<Cell> },
    Delete { old: StoredOld },
    Truncate,
}

#[derive(Serialize, Deserialize)]
struct StoredOutbox {
    aggregate_type: String,
    aggregate_id: String,
    event_type: String,
    payload: StoredPayload,
    content_type: Option<String>,
    headers: Option<Cell>,
    traceparent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    columns: Option<Cell>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    shown: Vec<(String, Cell)>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredPayload {
    Json(Cell),
    Data(Cell),
    Broken { why: String, columns: Vec<(String, Cell)> },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredOld {
    Key(Vec<Cell>),
    Full(Vec<Cell>),
}

/// A value: text, null, or an object that says what else it is.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Cell {
    Null,
    Text(String),
    /// Bytes that are not UTF-8 (a database with the encoding SQL_ASCII).
    Base64 {
        base64: String,
    },
    Unchanged {
        unchanged: bool,
    },
    /// A value without a text form, or one that is too large to be kept here.
    Unreadable {
        unreadable: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        base64_binary: Option<String>,
    },
}

/// The document of an event, of which these values are hidden.
pub fn to_json(event: &Event, hidden: Option<&Hidden>) -> String {
    document(event, hidden, STORED_MAX)
}

/// What is certainly too large is not copied before its large values are left out.
fn document(event: &Event, hidden: Option<&Hidden>, max: usize) -> String {
    let whole = (event.bytes() <= max).then(|| stored(event, hidden, usize::MAX));
    let whole = whole.and_then(|stored| {
        let mut out = Bounded { bytes: Vec::new(), max };
        serde_json::to_writer(&mut out, &stored).ok().map(|()| out.bytes)
    });
    let bytes = whole.unwrap_or_else(|| {
        let stored = stored(event, hidden, KEPT_MAX);
        serde_json::to_vec(&stored).expect("strings and numbers are always JSON")
    });
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

/// Takes no more than `max` bytes.
struct Bounded {
    bytes: Vec<u8>,
    max: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// With values of up to `kept` bytes.
fn stored(event: &Event, hidden: Option<&Hidden>, kept: usize) -> Stored {
    let cells = |row: &Row| cells(row, kept);
    let old = |old: &OldRow| match old {
        OldRow::Key(row) => StoredOld::Key(cells(row)),
        OldRow::Full(row) => StoredOld::Full(cells(row)),
    };
    let table = store_table(&event.table);
    Stored {
        form: match &event.content {
            _ if hidden.is_some() => FORM,
            Content::Change(Change::Read { .. }) => FORM,
            Content::Outbox(row) if row.columns.is_some() || !row.shown.is_empty() => FORM,
            _ if !(table.shapes.is_empty() && table.resolved.is_empty()) => FORM,
            Content::Outbox(_) | Content::Change(_) => FIRST_FORM,
        },
        hidden: hidden.cloned(),
        lsn: event.lsn.map(|lsn| lsn.0),
        occurred_at_us: event.occurred_at_us,
        committed_at_us: event.committed_at_us,
        xid: event.xid,
        table,
        content: match &event.content {
            Content::Outbox(row) => StoredContent::Outbox(Box::new(store_outbox(row, kept))),
            Content::Change(Change::Insert { new }) => StoredContent::Insert { new: cells(new) },
            Content::Change(Change::Read { new, run }) => {
                StoredContent::Read { new: cells(new), run: run.to_string() }
            }
            Content::Change(Change::Update { old: before, new }) => {
                StoredContent::Update { old: before.as_ref().map(old), new: cells(new) }
            }
            Content::Change(Change::Delete { old: before }) => {
                StoredContent::Delete { old: old(before) }
            }
            Content::Change(Change::Truncate) => StoredContent::Truncate,
        },
    }
}

/// Only the version of a document's form.
#[derive(Deserialize)]
struct Form {
    form: u32,
}

/// The event of a document, and what of it is hidden.
///
/// # Errors
/// [`crate::error::Kind::Event`] when the document is damaged, or of a later version.
pub fn from_json(json: &str, id: Uuid, position: Position) -> Result<(Event, Hidden)> {
    let wrong = |e: serde_json::Error| Error::event("the stored row is damaged").caused_by(e);
    let Form { form } = serde_json::from_str(json).map_err(wrong)?;
    if form > FORM {
        let text = format!("the stored row has form {form}, this version reads up to {FORM}");
        return Err(Error::event(text).hint("retry it with the version that stored it, or later"));
    }
    let stored: Stored = serde_json::from_str(json).map_err(wrong)?;
    let Stored { lsn, occurred_at_us, committed_at_us, xid, table, content, hidden, .. } = stored;
    let table = Arc::new(load_table(table)?);
    let width = table.columns.len();
    let hidden = hidden.unwrap_or_default();
    if hidden.columns.iter().any(|(index, _)| *index >= width) {
        return Err(Error::event("the stored row is damaged: a hidden column is missing"));
    }
    let row = |cells: Vec<Cell>| {
        if cells.len() != width {
            let text = format!("the stored row is damaged: {} of {width} columns", cells.len());
            return Err(Error::event(text));
        }
        cells.into_iter().map(load).collect::<Result<Row>>()
    };
    let old = |old: StoredOld| match old {
        StoredOld::Key(cells) => row(cells).map(OldRow::Key),
        StoredOld::Full(cells) => row(cells).map(OldRow::Full),
    };
    let content = match content {
        StoredContent::Outbox(stored) => Content::Outbox(Box::new(load_outbox(*stored)?)),
        StoredContent::Insert { new } => Content::Change(Change::Insert { new: row(new)? }),
        StoredContent::Read { new, run } => {
            let wrong = |e| Error::event("the stored row is damaged: its run").caused_by(e);
            let run = Uuid::try_parse(&run).map_err(wrong)?;
            Content::Change(Change::Read { new: row(new)?, run })
        }
        StoredContent::Update { old: before, new } => {
            let old = before.map(old).transpose()?;
            Content::Change(Change::Update { old, new: row(new)? })
        }
        StoredContent::Delete { old: before } => {
            Content::Change(Change::Delete { old: old(before)? })
        }
        StoredContent::Truncate => Content::Change(Change::Truncate),
    };
    let lsn = lsn.map(Lsn);
    let event = Event { id, position, lsn, occurred_at_us, committed_at_us, xid, table, content };
    Ok((event, hidden))
}

fn store_table(table: &Table) -> StoredTable {
    let column = |c: &Column| (c.name.clone(), c.type_oid, c.type_modifier);
    let is_own = |(_, c): &(usize, &Column)| c.shape != Shape::of(c.type_oid);
    let shapes = table.columns.iter().enumerate().filter(is_own);
    let resolved = |(index, column): (usize, &Column)| Some((index, column.resolved?));
    StoredTable {
        database: table.database.to_string(),
        oid: table.oid,
        version: table.version,
        schema: table.schema.clone(),
        name: table.name.clone(),
        full_name: Some(table.full_name.to_string())
            .filter(|name| *name != format!("{}.{}", table.schema, table.name)),
        columns: table.columns.iter().map(column).collect(),
        shapes: shapes.map(|(index, column)| (index, column.shape)).collect(),
        resolved: table.columns.iter().enumerate().filter_map(resolved).collect(),
        key: table.key.clone(),
        identity: match &table.identity {
            Identity::Nothing => StoredIdentity::Nothing,
            Identity::Columns(columns) => StoredIdentity::Columns(columns.clone()),
            Identity::Full => StoredIdentity::Full,
        },
    }
}

fn load_table(stored: StoredTable) -> Result<Table> {
    let StoredTable { database, oid, version, schema, name, full_name, columns, .. } = stored;
    let (key, shapes, resolved) = (stored.key, stored.shapes, stored.resolved);
    let identity = match stored.identity {
        StoredIdentity::Nothing => Identity::Nothing,
        StoredIdentity::Columns(columns) => Identity::Columns(columns),
        StoredIdentity::Full => Identity::Full,
    };
    let sent = if let Identity::Columns(sent) = &identity { &sent[..] } else { &[] };
    if key.iter().chain(sent).any(|index| *index >= columns.len()) {
        return Err(Error::event("the stored row is damaged: a key column is missing"));
    }
    let column = |(index, (name, oid, modifier))| {
        let resolved = resolved.get(&index).copied();
        let column = Column { resolved, ..Column::new(name, oid, modifier) };
        match shapes.get(&index) {
            Some(shape) => column.shaped(*shape),
            None => column,
        }
    };
    let columns = columns.into_iter().enumerate().map(column);
    Ok(Table {
        database: database.into(),
        oid,
        version,
        full_name: full_name.unwrap_or_else(|| format!("{schema}.{name}")).into(),
        schema,
        name,
        columns: columns.collect(),
        key,
        identity,
    })
}

fn store_outbox(row: &OutboxRow, kept: usize) -> StoredOutbox {
    let cell = |bytes: &Bytes| cell(bytes, kept);
    let text = |text: &ByteString| text.to_string();
    let named = |(name, value): &(String, Option<Bytes>)| {
        (name.clone(), value.as_ref().map_or(Cell::Null, cell))
    };
    let shown = |(name, value): &(Arc<str>, Option<ByteString>)| {
        let value = value.as_ref().map(|text| cell(text.as_bytes()));
        (name.to_string(), value.unwrap_or(Cell::Null))
    };
    StoredOutbox {
        aggregate_type: text(&row.aggregate_type),
        aggregate_id: text(&row.aggregate_id),
        event_type: text(&row.event_type),
        payload: match &row.payload {
            OutboxPayload::Json(bytes) => StoredPayload::Json(cell(bytes)),
            OutboxPayload::Hex(bytes) => StoredPayload::Data(cell(bytes)),
            OutboxPayload::Bytes(bytes) => StoredPayload::Data(cell(&hex(bytes))),
            OutboxPayload::Empty => StoredPayload::Json(Cell::Null),
            OutboxPayload::Broken(broken) => StoredPayload::Broken {
                why: broken.why.clone(),
                columns: broken.columns.iter().map(named).collect(),
            },
        },
        content_type: row.content_type.as_ref().map(text),
        headers: row.headers.as_ref().map(cell),
        traceparent: row.traceparent.as_ref().map(text),
        columns: row.columns.as_ref().map(cell),
        shown: row.shown.iter().map(shown).collect(),
    }
}

fn load_outbox(stored: StoredOutbox) -> Result<OutboxRow> {
    let present = |cell: Cell| -> Result<Option<Bytes>> {
        Ok(match load(cell)? {
            Value::Text(bytes) => Some(bytes),
            Value::Null | Value::Unchanged => None,
            Value::Unreadable(value) => return Err(Error::event(value.why)),
        })
    };
    let needed = |cell: Cell| {
        present(cell)?.ok_or_else(|| Error::event("the stored row is damaged: it has no payload"))
    };
    let shown = |(name, cell): (String, Cell)| {
        let text = present(cell)?.map(ByteString::try_from).transpose();
        let damaged = |_| Error::event(format!("the stored column {name:?} is not UTF-8"));
        Ok((name.as_str().into(), text.map_err(damaged)?))
    };
    Ok(OutboxRow {
        aggregate_type: stored.aggregate_type.into(),
        aggregate_id: stored.aggregate_id.into(),
        event_type: stored.event_type.into(),
        payload: match stored.payload {
            StoredPayload::Json(Cell::Null) => OutboxPayload::Empty,
            StoredPayload::Json(cell) => OutboxPayload::Json(needed(cell)?),
            StoredPayload::Data(cell) => OutboxPayload::Hex(needed(cell)?),
            StoredPayload::Broken { why, columns } => {
                let columns = columns.into_iter().map(|(name, cell)| Ok((name, present(cell)?)));
                OutboxPayload::Broken(Box::new(Broken {
                    why,
                    columns: columns.collect::<Result<_>>()?,
                }))
            }
        },
        content_type: stored.content_type.map(Into::into),
        headers: stored.headers.map(present).transpose()?.flatten(),
        traceparent: stored.traceparent.map(Into::into),
        columns: stored.columns.map(present).transpose()?.flatten(),
        shown: stored.shown.into_iter().map(shown).collect::<Result<_>>()?,
    })
}

/// Postgres' text form of a `bytea`, as a column of the outbox has it.
fn hex(bytes: &[u8]) -> Bytes {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    b"\\x".iter().copied().chain(digits.map(|digit| DIGITS[usize::from(digit)])).collect()
}

fn cells(row: &Row, kept: usize) -> Vec<Cell> {
    let one = |value: &Value| match value {
        Value::Null => Cell::Null,
        Value::Unchanged => Cell::Unchanged { unchanged: true },
        Value::Text(bytes) => cell(bytes, kept),
        Value::Unreadable(value) => Cell::Unreadable {
            unreadable: value.why.clone(),
            base64_binary: value.bytes.as_ref().map(|bytes| STANDARD.encode(bytes)),
        },
    };
    row.iter().map(one).collect()
}

/// A value of more than `kept` bytes is left out, and that is said in its place.
fn cell(bytes: &Bytes, kept: usize) -> Cell {
    if bytes.len() > kept {
        let unreadable = format!(
            "a value of {} bytes was too large to be kept with the parked row (discard the row, \
             and have its consumers read the table)",
            bytes.len()
        );
        return Cell::Unreadable { unreadable, base64_binary: None };
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Cell::Text(text.to_owned()),
        Err(_) => Cell::Base64 { base64: STANDARD.encode(bytes) },
    }
}

fn load(cell: Cell) -> Result<Value> {
    Ok(match cell {
        Cell::Null => Value::Null,
        Cell::Unchanged { .. } => Value::Unchanged,
        Cell::Text(text) => Value::Text(text.into()),
        Cell::Base64 { base64 } => Value::Text(decode(&base64)?),
        Cell::Unreadable { unreadable: why, base64_binary } => {
            let bytes = base64_binary.as_deref().map(decode).transpose()?;
            Value::Unreadable(Box::new(Unreadable { why, bytes }))
        }
    })
}

fn decode(base64: &str) -> Result<Bytes> {
    let wrong = |e| Error::event("the stored row is damaged: its base64 is wrong").caused_by(e);
    STANDARD.decode(base64).map(Bytes::from).map_err(wrong)
}

#[cfg(test)]
mod tests;
