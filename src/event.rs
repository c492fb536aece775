//! What happened: one committed row change, as the relay sees it between source and envelope.
//!
//! Texts and values are slices of the buffer that the row arrived in: cheap to make, and they keep
//! that buffer alive, so an event must not outlive its batch.

pub mod hidden;
pub mod id;
mod size;
pub mod stored;

use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use crate::column::{self, Resolved, Shape, Types};
use crate::position::{Lsn, Position};

/// One committed row change.
#[derive(Debug, Clone)]
pub struct Event {
    /// Stable id.
    pub id: Uuid,
    /// Place in the source order.
    pub position: Position,
    /// LSN of the change itself; absent from a source that does not read the WAL.
    pub lsn: Option<Lsn>,
    /// The time that belongs to the event, in microseconds since 1970-01-01 UTC: `created_at` of an
    /// outbox row, the commit time of a captured change. The same from every source and replay.
    pub occurred_at_us: i64,
    /// Commit time, in microseconds since 1970-01-01 UTC.
    pub committed_at_us: i64,
    /// Transaction id (32 bits, wraps around).
    pub xid: u32,
    /// The table it comes from: schema and name, and how its columns are read.
    pub table: Arc<Table>,
    /// What happened.
    pub content: Content,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Content {
    /// A row that an application wrote into the outbox.
    Outbox(Box<OutboxRow>),
    /// A change of a captured table.
    Change(Change),
}

/// The columns of an outbox row.
#[derive(Debug, Clone)]
pub struct OutboxRow {
    /// Kind of the thing that the event is about, such as `order`.
    pub aggregate_type: ByteString,
    /// Which thing; with the type it is the key.
    pub aggregate_id: ByteString,
    /// What happened to it, such as `created`.
    pub event_type: ByteString,
    /// The body, verbatim.
    pub payload: OutboxPayload,
    /// MIME type; absent means the payload's default.
    pub content_type: Option<ByteString>,
    /// The application's headers: a JSON object as text.
    pub headers: Option<Bytes>,
    /// W3C trace context.
    pub traceparent: Option<ByteString>,
    /// Further columns of a table of the application's that routes place: a JSON object, with
    /// values as Debezium writes them.
    pub columns: Option<Bytes>,
    /// The columns of a table of the application's that templates of routes name, as text.
    pub shown: Vec<(Arc<str>, Option<ByteString>)>,
}

/// The body of an outbox event.
#[derive(Debug, Clone)]
pub enum OutboxPayload {
    /// Column `payload`: JSON text as the application wrote it.
    Json(Bytes),
    /// Column `data`: Postgres' hex text (`\x…`) of the bytes; decoded into the body.
    Hex(Bytes),
    /// The bytes themselves, of a logical message.
    Bytes(Bytes),
    /// None at all: a mapped table may have null there.
    Empty,
    /// A row that breaks the outbox's contract, which only a table without its checks lets in.
    Broken(Box<Broken>),
}

/// A row of the outbox of which no message can be made.
#[derive(Debug, Clone)]
pub struct Broken {
    /// What is wrong with it.
    pub why: String,
    /// Its columns by name, as they came.
    pub columns: Vec<(String, Option<Bytes>)>,
}

/// A row change of a captured table.
#[derive(Debug, Clone)]
pub enum Change {
    /// A new row.
    Insert {
        /// The row.
        new: Row,
    },
    /// A row that was there already: a backfill read it.
    Read {
        /// The row.
        new: Row,
        /// The backfill's run.
        run: Uuid,
    },
    /// A changed row.
    Update {
        /// The old key (when it changed) or the whole old row (replica identity full).
        old: Option<OldRow>,
        /// The row as it is now.
        new: Row,
    },
    /// A deleted row.
    Delete {
        /// The old key or the whole old row.
        old: OldRow,
    },
    /// The whole table was emptied.
    Truncate,
}

/// What Postgres sends of a row before the change.
#[derive(Debug, Clone)]
pub enum OldRow {
    /// Only the columns of the replica identity; the others were not sent and are null here.
    Key(Row),
    /// All columns.
    Full(Row),
}

impl OldRow {
    /// The values.
    pub fn row(&self) -> &Row {
        match self {
            OldRow::Key(row) | OldRow::Full(row) => row,
        }
    }
}

/// The values of a row, in column order.
pub type Row = Box<[Value]>;

/// One column's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// SQL NULL.
    Null,
    /// A TOAST value that the change did not touch; Postgres does not send it.
    Unchanged,
    /// The value's text form.
    Text(Bytes),
    /// A value that has no text here: a message with it cannot be made.
    Unreadable(Box<Unreadable>),
}

/// Why a value has no text, and what there is of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// Says what is wrong and what to do.
    pub why: String,
    /// Its binary form (`*send`), unless that is too large to keep.
    pub bytes: Option<Bytes>,
}

/// A published table as the stream last described it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Name of its database.
    pub database: Arc<str>,
    /// OID by which the stream names it: the root's where partitions are published as their root.
    pub oid: u32,
    /// Hash of the description: the same text of names, types and identity has the same version in
    /// every session.
    pub version: u64,
    /// Schema, as the stream names it.
    pub schema: String,
    /// Name, as the stream names it.
    pub name: String,
    /// `schema.name` as the configuration has it, for routes, lanes and headers: a captured table
    /// that is renamed keeps it, so its changes before and after that stay in order.
    pub full_name: Arc<str>,
    /// Columns in stream order.
    pub columns: Vec<Column>,
    /// Indexes of the columns that say which thing a row is about, in column order: the primary
    /// key, or the identity where there is no key. Empty: the table has neither, or it is unknown.
    pub key: Vec<usize>,
    /// What the stream sends of a row before its change.
    pub identity: Identity,
}

/// What Postgres sends of a row before its change, as the Relation message flags it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// Nothing: updates and deletes are not possible while the table is published.
    Nothing,
    /// These columns, by index, in column order: of the primary key or of another unique index.
    Columns(Vec<usize>),
    /// All columns.
    Full,
}

impl Identity {
    /// Whether the old row of a change has all of these columns.
    pub fn covers(&self, columns: &[usize]) -> bool {
        match self {
            Identity::Nothing => false,
            Identity::Columns(sent) => columns.iter().all(|column| sent.contains(column)),
            Identity::Full => true,
        }
    }
}

/// A column of a published table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Type OID.
    pub type_oid: u32,
    /// `atttypmod`: length, precision and scale, packed by the type; -1 for none.
    pub type_modifier: i32,
    /// How its values are written as JSON.
    pub shape: Shape,
    /// What its type is made of, where users or extensions made it.
    pub resolved: Option<Resolved>,
    /// Its name as a member of a JSON object: `"name":`.
    pub name_json: Box<[u8]>,
}

impl Column {
    /// A column of a built-in type, or of one that is written as text.
    pub fn new(name: impl Into<String>, type_oid: u32, type_modifier: i32) -> Self {
        let name = name.into();
        let mut name_json = Vec::new();
        column::write_string(&mut name_json, &name);
        name_json.push(b':');
        let (shape, name_json) = (Shape::of(type_oid), name_json.into());
        Self { name, type_oid, type_modifier, shape, resolved: None, name_json }
    }

    /// A column of this type, built-in or of users, by what a session read of the catalog.
    pub fn of(name: impl Into<String>, type_oid: u32, type_modifier: i32, types: &Types) -> Self {
        let resolved = types.resolve(type_oid, type_modifier);
        let column = Self::new(name, type_oid, type_modifier).shaped(types.shape(type_oid));
        Self { resolved, ..column }
    }

    /// The same, with values that are written like this.
    #[must_use]
    pub fn shaped(self, shape: Shape) -> Self {
        Self { shape, ..self }
    }
}

impl Table {
    /// Index of the column called `name`.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|c| c.name == name)
    }
}

/// What kind of change; the text is the `ws-op` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// INSERT (every outbox event is one).
    Insert,
    /// None: a backfill read the row.
    Read,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
    /// TRUNCATE.
    Truncate,
}

impl Op {
    /// `insert`, `read`, `update`, `delete` or `truncate`.
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Insert => "insert",
            Op::Read => "read",
            Op::Update => "update",
            Op::Delete => "delete",
            Op::Truncate => "truncate",
        }
    }
}

impl Event {
    /// What kind of change it is.
    pub fn op(&self) -> Op {
        match &self.content {
            Content::Outbox(_) | Content::Change(Change::Insert { .. }) => Op::Insert,
            Content::Change(Change::Read { .. }) => Op::Read,
            Content::Change(Change::Update { .. }) => Op::Update,
            Content::Change(Change::Delete { .. }) => Op::Delete,
            Content::Change(Change::Truncate) => Op::Truncate,
        }
    }
}
