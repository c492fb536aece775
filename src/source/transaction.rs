//! From pgoutput messages to events: pure, one call per message.
//!
//! Invariant: only committed transactions leave, in commit order, each event with its position.
//! Protocol version 1 sends a transaction only after its commit, and `Begin` already carries the
//! commit LSN, so events leave while the transaction is still arriving and nothing is buffered.
//!
//! The ordinal counts every insert, update, delete and truncate received, before any filter:
//! configuration can change between two attempts, the count must not.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::event::{
    self, Change, Column, Content, Event, OldRow, Origin, OutboxRow, Payload, Row, Table,
};
use crate::pg::pgoutput::{self, Message, OldKind, OldTuple, Relation, ReplicaIdentity, Tuple};
use crate::position::{Lsn, Position};
use crate::source::{Item, Receipt};

/// Schema of the relay's own tables. None of them is an event, but the outbox is read.
const OWN_SCHEMA: &str = "watership";
const OUTBOX: &str = "outbox";
/// Columns of an outbox row that are looked at; more are allowed and ignored.
const OUTBOX_COLUMNS_MAX: usize = 32;
/// Relations described by one stream; more would be a leak on somebody's side.
const RELATIONS_MAX: usize = 100_000;
/// Microseconds from 1970-01-01 to 2000-01-01, Postgres' epoch.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Which timeline an LSN lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timelines {
    current: u32,
    /// (timeline, LSN at which it ended), ascending.
    history: Vec<(u32, Lsn)>,
}

impl Timelines {
    /// `history` lists the earlier timelines with their switch points, oldest first.
    pub fn new(current: u32, history: Vec<(u32, Lsn)>) -> Self {
        assert!(history.is_sorted_by_key(|(_, end)| *end), "timelines end in order");
        Self { current, history }
    }

    fn at(&self, lsn: Lsn) -> u32 {
        self.history.iter().find(|(_, end)| lsn < *end).map_or(self.current, |(tli, _)| *tli)
    }
}

/// What the assembler has to know before the stream starts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Epoch of the checkpoint.
    pub epoch: u32,
    /// System identifier of the cluster.
    pub system_id: u64,
    /// Timelines of the cluster.
    pub timelines: Timelines,
    /// Events up to and including this position were settled before: they are not handed on.
    pub resume_after: Position,
    /// Primary key columns by `schema.table`, from the catalog. With replica identity full the
    /// stream marks every column as key, so it cannot tell.
    pub primary_keys: HashMap<String, Vec<String>>,
}

/// Turns pgoutput messages into items.
#[derive(Debug)]
pub struct Assembler {
    options: Options,
    state: State,
    tables: HashMap<u32, Published>,
    /// Changes received, for the metric.
    pub changes_received: u64,
    /// Events not handed on because they were settled before.
    pub events_skipped: u64,
}

#[derive(Debug)]
enum State {
    Idle,
    Open(Transaction),
}

#[derive(Debug, Clone, Copy)]
struct Transaction {
    commit_lsn: Lsn,
    committed_at_us: i64,
    xid: u32,
    ordinal: u64,
    timeline: u32,
}

#[derive(Debug)]
enum Published {
    Outbox(Arc<Table>, OutboxColumns),
    Captured(Arc<Table>),
    /// One of our own tables besides the outbox.
    Own,
}

#[derive(Debug)]
struct OutboxColumns {
    id: usize,
    aggregate_type: usize,
    aggregate_id: usize,
    event_type: usize,
    payload: Option<usize>,
    data: Option<usize>,
    content_type: Option<usize>,
    headers: Option<usize>,
    traceparent: Option<usize>,
}

impl Assembler {
    /// An assembler at the start of a stream.
    pub fn new(options: Options) -> Self {
        let tables = HashMap::new();
        Self { options, state: State::Idle, tables, changes_received: 0, events_skipped: 0 }
    }

    /// True when no transaction is open in the decoder.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Takes one pgoutput message and appends what it means.
    ///
    /// # Errors
    /// [`crate::error::Kind::Protocol`] when the message is malformed or out of place,
    /// [`crate::error::Kind::Verdict`] when the outbox lacks a column that is needed.
    pub fn apply(&mut self, data: &Bytes, out: &mut Vec<Item>) -> Result<()> {
        let message =
            pgoutput::decode(data).map_err(|e| Error::protocol("pgoutput message").caused_by(e))?;
        match message {
            Message::Insert { relation, new } => self.insert(data, relation, &new, out),
            Message::Begin { final_lsn, commit_time, xid } => {
                self.begin(final_lsn, commit_time, xid)
            }
            Message::Commit { commit_lsn, end_lsn, .. } => self.commit(commit_lsn, end_lsn, out),
            Message::Relation(relation) => self.relation(&relation),
            Message::Update { relation, old, new } => {
                let change = |row: &dyn Fn(&Tuple<'_>) -> Result<Row>| {
                    let old = old.as_ref().map(|old| old_row(old, row)).transpose()?;
                    Ok(Change::Update { old, new: row(&new)? })
                };
                self.change(data, relation, change, out)
            }
            Message::Delete { relation, old } => {
                let change = |row: &dyn Fn(&Tuple<'_>) -> Result<Row>| {
                    Ok(Change::Delete { old: old_row(&old, row)? })
                };
                self.change(data, relation, change, out)
            }
            Message::Truncate(truncate) => self.truncate(truncate.relations(), out),
            // Messages have ids of their own and never count; they come with a later source.
            Message::Logical { .. } | Message::Origin { .. } | Message::Type { .. } => Ok(()),
        }
    }

    fn begin(&mut self, commit_lsn: Lsn, commit_time: i64, xid: u32) -> Result<()> {
        if let State::Open(open) = &self.state {
            let text = format!("Begin of {commit_lsn} inside the transaction {}", open.commit_lsn);
            return Err(Error::protocol(text));
        }
        self.state = State::Open(Transaction {
            commit_lsn,
            committed_at_us: commit_time.saturating_add(POSTGRES_EPOCH_US),
            xid,
            ordinal: 0,
            timeline: self.options.timelines.at(commit_lsn),
        });
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn, out: &mut Vec<Item>) -> Result<()> {
        let transaction = self.open_transaction()?;
        if transaction.commit_lsn != commit_lsn {
            let begun = transaction.commit_lsn;
            return Err(Error::protocol(format!("Commit of {commit_lsn} ends Begin of {begun}")));
        }
        let position = self.position(&transaction, transaction.ordinal, 0);
        out.push(Item::Commit(self.receipt(position, Some(end_lsn))));
        self.state = State::Idle;
        Ok(())
    }

    fn insert(
        &mut self,
        data: &Bytes,
        relation: u32,
        new: &Tuple<'_>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let (transaction, position) = self.count_change()?;
        if self.is_settled(position) {
            return Ok(());
        }
        let receipt = self.receipt(position, None);
        let (table, row) = match self.published(relation)? {
            Published::Own => return Ok(()),
            Published::Outbox(table, columns) => {
                (table, outbox_row(data, columns, new).map(|(id, row)| (id, Content::Outbox(row))))
            }
            Published::Captured(table) => {
                let id = event::captured_id(self.origin(&transaction), position);
                let row = row_of(data, table, new);
                (table, row.map(|new| (id, Content::Change(Change::Insert { new }))))
            }
        };
        push_event(transaction, position, table, row, receipt, out);
        Ok(())
    }

    fn change(
        &mut self,
        data: &Bytes,
        relation: u32,
        change: impl FnOnce(&dyn Fn(&Tuple<'_>) -> Result<Row>) -> Result<Change>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let (transaction, position) = self.count_change()?;
        if self.is_settled(position) {
            return Ok(());
        }
        let receipt = self.receipt(position, None);
        match self.published(relation)? {
            // The outbox is INSERT-only; deletes there are our own retention.
            Published::Own | Published::Outbox(..) => {}
            Published::Captured(table) => {
                let id = event::captured_id(self.origin(&transaction), position);
                let made = change(&|tuple| row_of(data, table, tuple))
                    .map(|change| (id, Content::Change(change)));
                push_event(transaction, position, table, made, receipt, out);
            }
        }
        Ok(())
    }

    fn truncate(
        &mut self,
        relations: impl ExactSizeIterator<Item = u32>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let (transaction, position) = self.count_change()?;
        if self.is_settled(position) {
            return Ok(());
        }
        let count = relations.len();
        for (sub, relation) in relations.enumerate() {
            let Published::Captured(table) = self.published(relation)? else { continue };
            let sub = u16::try_from(sub)
                .map_err(|_| Error::protocol(format!("truncate of {count} tables")))?;
            let at = Position { sub, ..position };
            // Checkpoints know no sub-ordinal: until the last table is settled the change is not.
            let last = usize::from(sub) + 1 == count;
            let covered = Position { ordinal: position.ordinal - u64::from(!last), ..position };
            let id = event::captured_id(self.origin(&transaction), at);
            let made = Ok((id, Content::Change(Change::Truncate)));
            push_event(transaction, at, table, made, self.receipt(covered, None), out);
        }
        Ok(())
    }

    fn relation(&mut self, relation: &Relation<'_>) -> Result<()> {
        // An empty namespace means pg_catalog (protocol page, Relation).
        let schema = if relation.namespace.is_empty() { "pg_catalog" } else { relation.namespace };
        let columns: Vec<Column> = relation
            .columns()
            .map(|c| Column { name: c.name.to_owned(), type_oid: c.type_oid })
            .collect();
        let full_name = format!("{schema}.{}", relation.name);
        let named = self.options.primary_keys.get(&full_name).and_then(|names| {
            names.iter().map(|n| columns.iter().position(|c| c.name == *n)).collect()
        });
        let flagged: Vec<usize> =
            relation.columns().enumerate().filter(|(_, c)| c.key).map(|(i, _)| i).collect();
        let key = match relation.replica_identity {
            // The primary key as it was when this was written: a column may have another name now.
            ReplicaIdentity::Default if !flagged.is_empty() => flagged,
            ReplicaIdentity::Index => named.unwrap_or(flagged),
            ReplicaIdentity::Default | ReplicaIdentity::Nothing | ReplicaIdentity::Full => {
                named.unwrap_or_default()
            }
        };
        let name = relation.name.to_owned();
        let table = Arc::new(Table { schema: schema.to_owned(), name, full_name, columns, key });
        let published = match (schema, relation.name) {
            (OWN_SCHEMA, OUTBOX) => {
                let columns = OutboxColumns::find(&table)?;
                Published::Outbox(table, columns)
            }
            (OWN_SCHEMA, _) => Published::Own,
            _ => Published::Captured(table),
        };
        if self.tables.len() >= RELATIONS_MAX {
            // The server describes a relation again before it uses it only after an invalidation,
            // so forgetting is not possible; a new session is.
            return Err(Error::protocol(format!("more than {RELATIONS_MAX} tables in one stream")));
        }
        self.tables.insert(relation.id, published);
        Ok(())
    }

    fn open_transaction(&self) -> Result<Transaction> {
        match &self.state {
            State::Open(transaction) => Ok(*transaction),
            State::Idle => Err(Error::protocol("a change or Commit outside of a transaction")),
        }
    }

    /// Counts one change of the open transaction and gives it its position.
    fn count_change(&mut self) -> Result<(Transaction, Position)> {
        let State::Open(transaction) = &mut self.state else {
            return Err(Error::protocol("a change outside of a transaction"));
        };
        transaction.ordinal += 1;
        self.changes_received += 1;
        let transaction = *transaction;
        Ok((transaction, self.position(&transaction, transaction.ordinal, 0)))
    }

    fn position(&self, transaction: &Transaction, ordinal: u64, sub: u16) -> Position {
        let epoch = self.options.epoch;
        Position { epoch, commit_lsn: transaction.commit_lsn, ordinal, sub }
    }

    fn is_settled(&mut self, position: Position) -> bool {
        let settled = position <= self.options.resume_after;
        self.events_skipped += u64::from(settled);
        settled
    }

    /// A receipt never goes behind what was settled before this stream began.
    fn receipt(&self, position: Position, flush: Option<Lsn>) -> Receipt {
        Receipt::new(position.max(self.options.resume_after), flush)
    }

    fn origin(&self, transaction: &Transaction) -> Origin {
        Origin { system_id: self.options.system_id, timeline: transaction.timeline }
    }

    fn published(&self, relation: u32) -> Result<&Published> {
        self.tables.get(&relation).ok_or_else(|| {
            Error::protocol(format!("a change of relation {relation}, which was never described"))
        })
    }
}

impl OutboxColumns {
    fn find(table: &Table) -> Result<Self> {
        let needed = |name: &str| {
            table.column(name).filter(|i| *i < OUTBOX_COLUMNS_MAX).ok_or_else(|| {
                let text = format!("column {name:?} is missing in {}", table.full_name);
                Error::verdict(text)
                    .hint("restore the column, or put it into the publication's column list")
            })
        };
        let optional = |name: &str| table.column(name).filter(|i| *i < OUTBOX_COLUMNS_MAX);
        let columns = Self {
            id: needed("id")?,
            aggregate_type: needed("aggregate_type")?,
            aggregate_id: needed("aggregate_id")?,
            event_type: needed("event_type")?,
            payload: optional("payload"),
            data: optional("data"),
            content_type: optional("content_type"),
            headers: optional("headers"),
            traceparent: optional("traceparent"),
        };
        if columns.payload.is_none() && columns.data.is_none() {
            return needed("payload").map(|_| columns);
        }
        Ok(columns)
    }
}

fn push_event(
    transaction: Transaction,
    position: Position,
    table: &Arc<Table>,
    made: Result<(Uuid, Content)>,
    receipt: Receipt,
    out: &mut Vec<Item>,
) {
    match made {
        Ok((id, content)) => {
            let event = Event {
                id,
                position,
                committed_at_us: transaction.committed_at_us,
                xid: transaction.xid,
                table: table.clone(),
                content,
            };
            out.push(Item::Event(event, receipt));
        }
        Err(error) => {
            let at = format!("event {position} of {}", table.full_name);
            out.push(Item::Poison(error.context(at), receipt));
        }
    }
}

fn outbox_row(
    data: &Bytes,
    columns: &OutboxColumns,
    tuple: &Tuple<'_>,
) -> Result<(Uuid, Box<OutboxRow>)> {
    let mut values = [pgoutput::Value::Null; OUTBOX_COLUMNS_MAX];
    tuple.read_into(&mut values);
    let bytes = |index: Option<usize>| match index.map(|i| values[i]) {
        Some(pgoutput::Value::Text(text)) => Some(data.slice_ref(text)),
        // Inserts carry no unchanged TOAST, and the binary option is not used for the outbox.
        Some(pgoutput::Value::Null | pgoutput::Value::Unchanged | pgoutput::Value::Binary(_))
        | None => None,
    };
    let text = |index: Option<usize>, name: &str| match bytes(index) {
        None => Ok(None),
        Some(bytes) => ByteString::try_from(bytes)
            .map(Some)
            .map_err(|_| Error::event(format!("column {name:?} is not valid UTF-8"))),
    };
    let needed = |index: usize, name: &str| {
        text(Some(index), name)?
            .ok_or_else(|| Error::event(format!("column {name:?} of the outbox row is null")))
    };
    let id = needed(columns.id, "id")?;
    let id = Uuid::try_parse(&id)
        .map_err(|e| Error::event(format!("column \"id\" is no uuid: {id:?}")).caused_by(e))?;
    let payload = match (bytes(columns.payload), bytes(columns.data)) {
        (Some(json), None) => Payload::Json(json),
        (None, Some(hex)) => Payload::Hex(hex),
        (Some(_), Some(_)) | (None, None) => {
            return Err(Error::event("exactly one of payload and data must be set"));
        }
    };
    let row = OutboxRow {
        aggregate_type: needed(columns.aggregate_type, "aggregate_type")?,
        aggregate_id: needed(columns.aggregate_id, "aggregate_id")?,
        event_type: needed(columns.event_type, "event_type")?,
        payload,
        content_type: text(columns.content_type, "content_type")?,
        headers: bytes(columns.headers),
        traceparent: text(columns.traceparent, "traceparent")?,
    };
    Ok((id, Box::new(row)))
}

fn row_of(data: &Bytes, table: &Table, tuple: &Tuple<'_>) -> Result<Row> {
    if tuple.len() != table.columns.len() {
        let (got, want) = (tuple.len(), table.columns.len());
        return Err(Error::event(format!("the row has {got} columns, its relation {want}")));
    }
    tuple
        .columns()
        .map(|value| match value {
            pgoutput::Value::Null => Ok(event::Value::Null),
            pgoutput::Value::Unchanged => Ok(event::Value::Unchanged),
            pgoutput::Value::Text(text) => Ok(event::Value::Text(data.slice_ref(text))),
            pgoutput::Value::Binary(_) => Err(Error::event("a value came in binary form")),
        })
        .collect()
}

fn old_row(old: &OldTuple<'_>, row: &dyn Fn(&Tuple<'_>) -> Result<Row>) -> Result<OldRow> {
    let values = row(&old.tuple)?;
    Ok(match old.kind {
        OldKind::Key => OldRow::Key(values),
        OldKind::Full => OldRow::Full(values),
    })
}
