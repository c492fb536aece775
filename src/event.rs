//! What happened: one committed row change, as the relay sees it between source and envelope.
//!
//! Invariant: the same change has the same id for ever, on every attempt and from every instance,
//! and different events never share one. An outbox event's id is its row's uuid. A captured
//! event's is UUIDv5 over (system identifier, timeline, commit LSN, ordinal, sub-ordinal): the
//! timeline is part of it because after an asynchronous failover the same LSN can carry another
//! change; the epoch is not, because it only sorts.
//!
//! Texts and values are slices of the buffer that the row arrived in: cheap to make, and they keep
//! that buffer alive, so an event must not outlive its batch.

pub mod stored;

use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use crate::position::Position;

/// UUIDv5 namespace of captured events. Changing it would change every id.
const CAPTURED: Uuid = Uuid::from_u128(0x7d1c_9c5e_5b0a_4f6e_9a58_3f1e_7a77_5e01);

/// One committed row change.
#[derive(Debug, Clone)]
pub struct Event {
    /// Stable id.
    pub id: Uuid,
    /// Place in the source order.
    pub position: Position,
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
    pub payload: Payload,
    /// MIME type; absent means the payload's default.
    pub content_type: Option<ByteString>,
    /// The application's headers: a JSON object as text.
    pub headers: Option<Bytes>,
    /// W3C trace context.
    pub traceparent: Option<ByteString>,
}

/// The body of an outbox event.
#[derive(Debug, Clone)]
pub enum Payload {
    /// Column `payload`: JSON text as the application wrote it.
    Json(Bytes),
    /// Column `data`: Postgres' hex text (`\x…`) of the bytes; decoded into the body.
    Hex(Bytes),
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

/// What Postgres tells of a row before the change.
#[derive(Debug, Clone)]
pub enum OldRow {
    /// Only the columns of the replica identity; the others are null.
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
    /// Schema.
    pub schema: String,
    /// Name.
    pub name: String,
    /// `schema.name`, for headers and routes.
    pub full_name: Arc<str>,
    /// Columns in stream order.
    pub columns: Vec<Column>,
    /// Indexes of the columns that identify a row: the primary key. Empty: the table has none.
    pub key: Vec<usize>,
}

/// A column of a published table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Type OID.
    pub type_oid: u32,
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
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
    /// TRUNCATE.
    Truncate,
}

impl Op {
    /// `insert`, `update`, `delete` or `truncate`.
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Insert => "insert",
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
            Content::Change(Change::Update { .. }) => Op::Update,
            Content::Change(Change::Delete { .. }) => Op::Delete,
            Content::Change(Change::Truncate) => Op::Truncate,
        }
    }
}

/// Where a captured event's id comes from, besides its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// System identifier of the cluster (`IDENTIFY_SYSTEM`).
    pub system_id: u64,
    /// Timeline on which the commit LSN lies.
    pub timeline: u32,
}

/// The id of a captured event.
pub fn captured_id(origin: Origin, position: Position) -> Uuid {
    let mut name = [0_u8; 8 + 4 + 8 + 8 + 2];
    name[..8].copy_from_slice(&origin.system_id.to_be_bytes());
    name[8..12].copy_from_slice(&origin.timeline.to_be_bytes());
    name[12..20].copy_from_slice(&position.commit_lsn.0.to_be_bytes());
    name[20..28].copy_from_slice(&position.ordinal.to_be_bytes());
    name[28..].copy_from_slice(&position.sub.to_be_bytes());
    Uuid::new_v5(&CAPTURED, &name)
}

/// The id of a route's own message (`message_id = "route"`): UUIDv5(event id, route name).
pub fn route_id(event: Uuid, route: &str) -> Uuid {
    Uuid::new_v5(&event, route.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::Lsn;

    #[test]
    fn captured_ids_are_stable_and_ignore_the_epoch() {
        let origin = Origin { system_id: 7_301_234_567_890_123_456, timeline: 1 };
        let at =
            |epoch, ordinal, sub| Position { epoch, commit_lsn: Lsn(0x16B_3748), ordinal, sub };
        let id = captured_id(origin, at(1, 3, 0));
        assert_eq!(id.to_string(), "4d5c7839-7f9b-5959-8ca2-2ca638fe9ff4");
        assert_eq!(id, captured_id(origin, at(2, 3, 0)));
        assert_ne!(id, captured_id(origin, at(1, 4, 0)));
        assert_ne!(id, captured_id(origin, at(1, 3, 1)));
        assert_ne!(id, captured_id(Origin { timeline: 2, ..origin }, at(1, 3, 0)));
    }
}
