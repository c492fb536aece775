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
use uuid::Uuid;

use crate::column::binary::Types;
use crate::error::{Error, Result};
use crate::event::{self, Change, Column, Content, Event, Origin, Row, Table};
use crate::pg::pgoutput::{self, Message, Relation, ReplicaIdentity, Tuple};
use crate::position::{Lsn, Position};
use crate::source::{Canary, Item, Receipt, Seen};
use canary::CanaryColumns;
use rows::{OutboxColumns, Values, old_row, outbox_row};

mod canary;
mod rows;
#[cfg(test)]
mod tests;

/// Schema of the relay's own tables. None of them is an event, but the outbox is read.
const OWN_SCHEMA: &str = "watership";
const OUTBOX: &str = "outbox";
const CANARY: &str = "canary";
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

    /// The timeline that the server is on.
    pub fn current(&self) -> u32 {
        self.current
    }

    /// The earlier timelines with their switch points, oldest first.
    pub fn history(&self) -> &[(u32, Lsn)] {
        &self.history
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
    /// The captured tables, by `schema.table`. Changes of other tables that are published are
    /// counted and left out.
    pub captured: HashMap<String, CapturedTable>,
    /// How values of users' types are sent in binary; of no use in text mode.
    pub types: Types,
    /// Where the WAL ended when `types` were read; none in text mode, which needs no types.
    pub types_read_at: Option<Lsn>,
    /// Name of the relay whose canary is looked for.
    pub canary: String,
}

/// What the catalog says of a captured table.
#[derive(Debug, Clone)]
pub struct CapturedTable {
    /// Under another name it is still this one: the stream has the name of its time, and the next
    /// comparison with the catalog decides about it.
    pub oid: u32,
    /// The columns of its primary key: with replica identity full the stream marks every column as
    /// key, so it cannot tell.
    pub primary_key: Vec<String>,
}

/// Turns pgoutput messages into items.
#[derive(Debug)]
pub struct Assembler {
    options: Options,
    state: State,
    tables: HashMap<u32, Published>,
    seen: Seen,
    /// Number of the canary of the open transaction.
    canary: Option<u64>,
    /// Commit LSN of the last transaction that began.
    last_begun: Lsn,
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
    /// Changes of the relay's own tables.
    own: u64,
}

#[derive(Debug)]
enum Published {
    Outbox(Arc<Table>, OutboxColumns),
    Captured(Arc<Table>),
    /// The canary; where its columns are, if they can be found.
    Canary(Option<CanaryColumns>),
    /// One of our own tables besides these.
    Own,
    /// In the publication, but nobody asked for it.
    Unwanted,
}

impl Assembler {
    /// An assembler at the start of a stream.
    pub fn new(options: Options) -> Self {
        let (tables, seen) = Default::default();
        let state = State::Idle;
        Self { options, state, tables, seen, canary: None, last_begun: Lsn(0) }
    }

    /// What came so far; how far the server is, is not known here.
    pub fn seen(&self) -> Seen {
        self.seen
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
                self.change(data, relation, Some(&new), change, out)
            }
            Message::Delete { relation, old } => {
                let change = |row: &dyn Fn(&Tuple<'_>) -> Result<Row>| {
                    Ok(Change::Delete { old: old_row(&old, row)? })
                };
                self.change(data, relation, None, change, out)
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
        // The invariant of this file rests on it, and a server that breaks it is none to follow.
        if commit_lsn <= self.last_begun {
            let text = format!("Begin of {commit_lsn} after that of {}", self.last_begun);
            return Err(Error::protocol(text));
        }
        self.last_begun = commit_lsn;
        self.state = State::Open(Transaction {
            commit_lsn,
            committed_at_us: commit_time.saturating_add(POSTGRES_EPOCH_US),
            xid,
            ordinal: 0,
            timeline: self.options.timelines.at(commit_lsn),
            own: 0,
        });
        self.canary = None;
        Ok(())
    }

    fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn, out: &mut Vec<Item>) -> Result<()> {
        let transaction = self.open_transaction()?;
        if transaction.commit_lsn != commit_lsn {
            let begun = transaction.commit_lsn;
            return Err(Error::protocol(format!("Commit of {commit_lsn} ends Begin of {begun}")));
        }
        let position = self.position(&transaction, transaction.ordinal, 0);
        if let Some(number) = self.canary.take() {
            self.seen.canary = Some(Canary { number, end: end_lsn });
        }
        self.state = State::Idle;
        // What we wrote ourselves is no progress: its checkpoint would be the next such write.
        if transaction.own > 0 && transaction.own == transaction.ordinal {
            out.push(Item::Idle(Receipt::new(Position::default(), Some(end_lsn))));
        } else {
            out.push(Item::Commit(self.receipt(position, Some(end_lsn))));
        }
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
            self.own_change(relation, Some(new));
            return Ok(());
        }
        let receipt = self.receipt(position, None);
        let (table, row) = match self.published(relation)? {
            Published::Own | Published::Canary(_) => {
                self.own_change(relation, Some(new));
                return Ok(());
            }
            Published::Unwanted => return Ok(()),
            Published::Outbox(table, columns) => {
                let id = || event::captured_id(self.origin(&transaction), position);
                let values = Values { data, table, types: &self.options.types };
                let (id, row) = outbox_row(&values, columns, new, id);
                (table, (id, Content::Outbox(row)))
            }
            Published::Captured(table) => {
                self.knows_types(&transaction, table)?;
                let id = event::captured_id(self.origin(&transaction), position);
                let new = Values { data, table, types: &self.options.types }.row(new)?;
                (table, (id, Content::Change(Change::Insert { new })))
            }
        };
        push_event(transaction, position, table, row, receipt, out);
        Ok(())
    }

    fn change(
        &mut self,
        data: &Bytes,
        relation: u32,
        new: Option<&Tuple<'_>>,
        change: impl FnOnce(&dyn Fn(&Tuple<'_>) -> Result<Row>) -> Result<Change>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let (transaction, position) = self.count_change()?;
        if self.is_settled(position) {
            self.own_change(relation, new);
            return Ok(());
        }
        let receipt = self.receipt(position, None);
        match self.published(relation)? {
            Published::Own | Published::Canary(_) => self.own_change(relation, new),
            // The outbox is INSERT-only; deletes there are our own retention.
            Published::Outbox(..) | Published::Unwanted => {}
            Published::Captured(table) => {
                self.knows_types(&transaction, table)?;
                let id = event::captured_id(self.origin(&transaction), position);
                let values = Values { data, table, types: &self.options.types };
                let made = (id, Content::Change(change(&|tuple| values.row(tuple))?));
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
            let made = (id, Content::Change(Change::Truncate));
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
        let captured = &self.options.captured;
        let captured = captured
            .get(&full_name)
            .or_else(|| captured.values().find(|table| table.oid == relation.id));
        let is_captured = captured.is_some();
        let named = captured.and_then(|table| {
            table.primary_key.iter().map(|n| columns.iter().position(|c| c.name == *n)).collect()
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
        let full_name = full_name.into();
        let table = Arc::new(Table { schema: schema.to_owned(), name, full_name, columns, key });
        let published = match (schema, relation.name) {
            (OWN_SCHEMA, OUTBOX) => {
                let columns = OutboxColumns::find(&table)?;
                Published::Outbox(table, columns)
            }
            (OWN_SCHEMA, CANARY) => Published::Canary(CanaryColumns::find(&table)),
            (OWN_SCHEMA, _) => Published::Own,
            _ if is_captured => Published::Captured(table),
            _ => Published::Unwanted,
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

    /// An error when a type of the table may be younger than what was read of the catalog. A type
    /// that is not there although it is older was dropped since, and its values cannot be rendered.
    fn knows_types(&self, transaction: &Transaction, table: &Table) -> Result<()> {
        let Some(read_at) = self.options.types_read_at else { return Ok(()) };
        if transaction.commit_lsn < read_at {
            return Ok(());
        }
        let unknown = |column: &&Column| !self.options.types.knows(column.type_oid);
        let Some(column) = table.columns.iter().find(unknown) else { return Ok(()) };
        let (name, full_name) = (&column.name, &table.full_name);
        let text = format!("the type of column {name:?} of {full_name} is newer than this session");
        Err(Error::protocol(text).hint("nothing: the next session reads the types again"))
    }

    /// Counts one change of the open transaction and gives it its position.
    fn count_change(&mut self) -> Result<(Transaction, Position)> {
        let State::Open(transaction) = &mut self.state else {
            return Err(Error::protocol("a change outside of a transaction"));
        };
        transaction.ordinal += 1;
        self.seen.changes += 1;
        let transaction = *transaction;
        Ok((transaction, self.position(&transaction, transaction.ordinal, 0)))
    }

    /// A change that was counted; if it is of a table of our own, it is no news to anybody.
    fn own_change(&mut self, relation: u32, new: Option<&Tuple<'_>>) {
        let columns = match self.tables.get(&relation) {
            Some(Published::Own) => None,
            Some(Published::Canary(columns)) => *columns,
            Some(Published::Outbox(..) | Published::Captured(_) | Published::Unwanted) | None => {
                return;
            }
        };
        if let State::Open(transaction) = &mut self.state {
            transaction.own += 1;
        }
        self.seen.changes -= 1;
        let (Some(columns), Some(new)) = (columns, new) else { return };
        if let Some(number) = columns.number(new, &self.options.canary) {
            self.canary = Some(number);
        }
    }

    fn position(&self, transaction: &Transaction, ordinal: u64, sub: u16) -> Position {
        let epoch = self.options.epoch;
        Position { epoch, commit_lsn: transaction.commit_lsn, ordinal, sub }
    }

    fn is_settled(&mut self, position: Position) -> bool {
        let settled = position <= self.options.resume_after;
        self.seen.skipped += u64::from(settled);
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

fn push_event(
    transaction: Transaction,
    position: Position,
    table: &Arc<Table>,
    (id, content): (Uuid, Content),
    receipt: Receipt,
    out: &mut Vec<Item>,
) {
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
