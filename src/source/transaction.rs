//! From pgoutput messages to events: pure, one call per message.
//!
//! Invariant: only committed transactions leave, in commit order, each event with its position.
//! Protocol version 1 sends a transaction only after its commit, and `Begin` already carries the
//! commit LSN, so events leave while the transaction is still arriving and nothing is buffered.
//!
//! The ordinal counts every insert, update, delete and truncate received, before any filter:
//! configuration can change between two attempts, the count must not. The sub-ordinal numbers the
//! tables of one truncate, and after them the logical messages up to the next change: those do not
//! count, because a relay that does not ask for them must count alike.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::event::id::{self, Ids};
use crate::event::{Change, Content, Event, Table};
use crate::pg::pgoutput::{self, ReplicationMessage, Tuple};
use crate::position::{Lsn, Mark, Position};
use crate::source::{CanaryGap, CanarySighting, Item, Note, Receipt, Seen};
use describe::{Described, Role, described};
use outbox_row::outbox_row;
use rows::{Values, complete, old_row};

mod canary;
mod describe;
mod low_mark;
mod message;
mod options;
pub(super) mod outbox_row;
mod relation;
pub(super) mod rows;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_identity;

pub use low_mark::MARK_PREFIX;
pub use options::{CapturedTable, Former, HeldTable};
pub use options::{Options, Timelines};
pub use relation::DescribedAt;

/// Relations described by one stream; more would be a leak on somebody's side.
const RELATIONS_MAX: usize = 100_000;
/// Microseconds from 1970-01-01 to 2000-01-01, Postgres' epoch.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Turns pgoutput messages into items.
#[derive(Debug)]
pub struct Assembler {
    options: Options,
    state: State,
    tables: BTreeMap<u32, Described>,
    seen: Seen,
    ids: Ids,
    /// Namespace of the ids, and the timeline that it stands for.
    namespace: (u32, Uuid),
    /// Number of the canary of the open transaction.
    canary: Option<u64>,
    /// That of the last one that came, until a receipt carries it.
    canary_came: Option<CanarySighting>,
    /// Commit LSN of the last transaction that began.
    last_begun: Lsn,
    /// The root that was described last; the description of the partition comes right after it.
    root: Option<Arc<Table>>,
    /// What stands for the table of an event that is a logical message.
    no_table: Arc<Table>,
    /// Roots with partitions that do not send what the root is said to send.
    unlike: BTreeSet<(u32, u32)>,
    /// The captured table that the last message has described.
    described: Option<DescribedAt>,
    /// Some table has a different key from `catalog_at` on.
    has_later_keys: bool,
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
    /// Number of the last change, and of the last thing at it.
    ordinal: u64,
    sub: u32,
    /// Changes of the relay's own tables.
    own: u64,
    /// It has logical messages that are events.
    has_messages: bool,
}

/// A change that was counted.
#[derive(Debug, Clone, Copy)]
struct Counted {
    transaction: Transaction,
    position: Position,
    /// LSN of the change itself.
    lsn: Lsn,
    /// An earlier session settled it: it is not handed on.
    settled: bool,
}

/// A change as it was received, and where.
#[derive(Clone, Copy)]
struct Received<'a> {
    lsn: Lsn,
    data: &'a Bytes,
    relation: u32,
}

impl Assembler {
    /// An assembler at the start of a stream.
    pub fn new(options: Options) -> Self {
        let (tables, seen, ids) = Default::default();
        let timeline = options.timelines.current();
        let namespace = (timeline, id::namespace(options.system_id, timeline));
        let (state, last_begun) = (State::Idle, Lsn::ZERO);
        let (canary, canary_came) = (None, None);
        let (root, unlike, described) = Default::default();
        let no_table = message::no_table(&options.database);
        Self {
            options,
            state,
            tables,
            seen,
            ids,
            namespace,
            canary,
            canary_came,
            last_begun,
            root,
            no_table,
            unlike,
            described,
            has_later_keys: false,
        }
    }

    /// The captured table that the last message has described; once.
    pub fn take_described(&mut self) -> Option<DescribedAt> {
        self.described.take()
    }

    /// What came so far; how far the server is, is not known here.
    pub fn seen(&self) -> Seen {
        self.seen
    }

    /// True when no transaction is open in the decoder.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Takes one pgoutput message and appends what it means. `lsn` is where XLogData says that the
    /// message begins: for a change its own LSN, the same for every reader of the WAL.
    ///
    /// # Errors
    /// [`crate::error::Kind::Protocol`] when the message is malformed or out of place, or when the
    /// catalog is newer than what this session read of it; [`crate::error::Kind::Verdict`] when the
    /// outbox lacks a column that is needed.
    pub fn apply(&mut self, lsn: Lsn, data: &Bytes, out: &mut Vec<Item>) -> Result<()> {
        let message =
            pgoutput::decode(data).map_err(|e| Error::protocol("pgoutput message").caused_by(e))?;
        let at = |relation| Received { lsn, data, relation };
        match message {
            ReplicationMessage::Insert { relation, new } => self.insert(at(relation), &new, out),
            ReplicationMessage::Begin { final_lsn, commit_time, xid } => {
                self.begin(final_lsn, commit_time, xid)?;
                if self.has_later_keys && final_lsn >= self.options.catalog_at {
                    self.take_later_keys(out);
                }
                Ok(())
            }
            ReplicationMessage::Commit { commit_lsn, end_lsn, .. } => {
                self.commit(commit_lsn, end_lsn, out)
            }
            ReplicationMessage::Relation(relation) => self.relation(&relation, out),
            ReplicationMessage::Update { relation, old, new } => {
                let change = |values: &Values<'_>| {
                    let old = old.as_ref().map(|old| old_row(old, values)).transpose()?;
                    let mut new = values.row(&new)?;
                    let old = old.filter(|old| complete(values.table, old, &mut new));
                    Ok(Change::Update { old, new })
                };
                self.change(at(relation), Some(&new), change, out)
            }
            ReplicationMessage::Delete { relation, old } => {
                let change =
                    |values: &Values<'_>| Ok(Change::Delete { old: old_row(&old, values)? });
                self.change(at(relation), None, change, out)
            }
            ReplicationMessage::Truncate(truncate) => self.truncate(lsn, truncate.relations(), out),
            ReplicationMessage::Logical { transactional, prefix, lsn: at, content } => {
                let content = data.slice_ref(content);
                self.logical(prefix, transactional, (lsn, at), content, out)
            }
            ReplicationMessage::Origin { .. } | ReplicationMessage::Type { .. } => Ok(()),
        }
    }

    fn begin(&mut self, commit_lsn: Lsn, commit_time: i64, xid: u32) -> Result<()> {
        if let State::Open(open) = &self.state {
            let text = format!("Begin of {commit_lsn} inside the transaction {}", open.commit_lsn);
            return Err(Error::protocol(text));
        }
        // The invariant of this file rests on it, and a server that breaks it cannot be followed.
        if commit_lsn <= self.last_begun {
            let text = format!("Begin of {commit_lsn} after that of {}", self.last_begun);
            return Err(Error::protocol(text));
        }
        self.last_begun = commit_lsn;
        self.root = None;
        self.state = State::Open(Transaction {
            commit_lsn,
            committed_at_us: commit_time.saturating_add(POSTGRES_EPOCH_US),
            xid,
            ordinal: 0,
            sub: 0,
            own: 0,
            has_messages: false,
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
        let position = self.position(&transaction);
        if let Some(number) = self.canary.take() {
            self.canary_came(CanarySighting { number, end: end_lsn });
        }
        self.state = State::Idle;
        // What we wrote ourselves is not progress: its checkpoint would be the next such write. Nor
        // is what others write that was never ours to read.
        if transaction.own == transaction.ordinal && !transaction.has_messages {
            out.push(Item::Idle(Receipt::idle(end_lsn.into())));
        } else {
            let mut receipt = self.receipt(position, Some(end_lsn.into()));
            if let Some(canary) = self.canary_came.take() {
                receipt.add_note(Note::Canary(canary));
            }
            out.push(Item::Commit(receipt));
        }
        Ok(())
    }

    /// Each is one more than the one before, and their transactions wait for each other. After one
    /// that is missing, none is noted: a relay that is started again has to find the gap again.
    fn canary_came(&mut self, after: CanarySighting) {
        let missing = |before: &CanarySighting| {
            let last = after.number.saturating_sub(1);
            last > before.number && last > self.options.canary_accepted
        };
        let before = self.seen.canary.or(self.options.canary_before);
        if let Some(before) = before.filter(missing) {
            self.seen.canary_gap.get_or_insert(CanaryGap { before, after });
        }
        self.seen.canary = Some(after);
        if self.seen.canary_gap.is_none() {
            self.canary_came = Some(after);
        }
    }

    fn insert(
        &mut self,
        received: Received<'_>,
        new: &Tuple<'_>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let counted = self.count_change(received.lsn)?;
        let Described { table, role, .. } = described(&self.tables, received.relation)?;
        match role {
            Role::Own | Role::Canary(_) => self.own_change(received.relation, Some(new)),
            Role::Unwanted => {}
            Role::Outbox(columns) => {
                let values = Values::new(received.data, table, &self.options);
                let (id, occurred_at_us, row) = outbox_row(&values, columns, new);
                // A row without an id that can be read is parked, and needs one for that.
                let id = match id {
                    Some(id) => id,
                    None => {
                        let source = id_source(&mut self.namespace, &self.options, &counted);
                        self.ids.row(source, &id::columns(table), &values.row(new)?)
                    }
                };
                let at = occurred_at_us.unwrap_or(counted.transaction.committed_at_us);
                self.hand_on(counted, table, id, at, Content::Outbox(row), out);
            }
            Role::Captured(_) => {
                let change = |values: &Values<'_>| Ok(Change::Insert { new: values.row(new)? });
                self.captured(counted, received, change, out)?;
            }
        }
        Ok(())
    }

    fn change(
        &mut self,
        received: Received<'_>,
        new: Option<&Tuple<'_>>,
        change: impl FnOnce(&Values<'_>) -> Result<Change>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let counted = self.count_change(received.lsn)?;
        match described(&self.tables, received.relation)?.role {
            Role::Own | Role::Canary(_) => self.own_change(received.relation, new),
            // The outbox is INSERT-only. Deletes are its retention; what an update changes in an
            // event that was written before is not sent again.
            Role::Outbox(_) => self.seen.outbox_updates += u64::from(new.is_some()),
            Role::Unwanted => {}
            Role::Captured(_) => self.captured(counted, received, change, out)?,
        }
        Ok(())
    }

    /// A change of a captured table. What was settled before gets its id all the same: of equal
    /// rows with one LSN the next must not get the number of the one before it.
    fn captured(
        &mut self,
        counted: Counted,
        received: Received<'_>,
        change: impl FnOnce(&Values<'_>) -> Result<Change>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let described = described(&self.tables, received.relation)?;
        let Described { table, role, unknown_type, .. } = described;
        let Role::Captured(id_columns) = role else { unreachable!("the caller has looked") };
        if let Some(column) = unknown_type {
            self.has_known_types(&counted.transaction, table, *column)?;
        }
        let values = Values::new(received.data, table, &self.options);
        let change = change(&values)?;
        if let Some(column) = values.unknown_type.get() {
            self.has_known_types(&counted.transaction, table, column)?;
        }
        let row = match &change {
            Change::Insert { new } | Change::Read { new, .. } | Change::Update { new, .. } => new,
            Change::Delete { old } => old.row(),
            Change::Truncate => unreachable!("a truncate has no row"),
        };
        let source = id_source(&mut self.namespace, &self.options, &counted);
        let id = self.ids.row(source, id_columns, row);
        let at = counted.transaction.committed_at_us;
        self.hand_on(counted, table, id, at, Content::Change(change), out);
        Ok(())
    }

    fn truncate(
        &mut self,
        lsn: Lsn,
        relations: impl Iterator<Item = u32>,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let first = self.count_change(lsn)?;
        self.root = None;
        for (sub, relation) in relations.enumerate() {
            let counted = if sub == 0 { first } else { self.count_sub(lsn)? };
            let Described { table, role, .. } = described(&self.tables, relation)?;
            if !matches!(role, Role::Captured(_)) {
                continue;
            }
            let source = id_source(&mut self.namespace, &self.options, &counted);
            let id = self.ids.truncate(source, relation);
            let at = counted.transaction.committed_at_us;
            self.hand_on(counted, table, id, at, Content::Change(Change::Truncate), out);
        }
        Ok(())
    }

    fn open_transaction(&self) -> Result<Transaction> {
        match &self.state {
            State::Open(transaction) => Ok(*transaction),
            State::Idle => Err(Error::protocol("a change or Commit outside of a transaction")),
        }
    }

    /// An error when the type of `column` may be younger than what was read of the catalog. A type
    /// that is not there although it is older was dropped since, and its values cannot be rendered.
    fn has_known_types(&self, at: &Transaction, table: &Table, column: usize) -> Result<()> {
        if at.commit_lsn < self.options.catalog_at {
            return Ok(());
        }
        let (name, full_name) = (&table.columns[column].name, &table.full_name);
        let text = format!(
            "the type of column {name:?} of {full_name} was created after this session began"
        );
        Err(Error::protocol(text).hint("no action needed: the next session reads the types again"))
    }

    /// Counts one change of the open transaction and gives it its position.
    fn count_change(&mut self, lsn: Lsn) -> Result<Counted> {
        let State::Open(transaction) = &mut self.state else {
            return Err(Error::protocol("a change outside of a transaction"));
        };
        transaction.ordinal += 1;
        transaction.sub = 0;
        self.seen.changes += 1;
        let transaction = *transaction;
        Ok(self.counted(transaction, lsn))
    }

    /// Counts one more thing at the change that was counted last, or before the first one.
    fn count_sub(&mut self, lsn: Lsn) -> Result<Counted> {
        let State::Open(transaction) = &mut self.state else {
            return Err(Error::protocol("a change outside of a transaction"));
        };
        transaction.sub = transaction.sub.checked_add(1).ok_or_else(|| {
            Error::protocol("more than 2^32 logical messages between two changes")
        })?;
        let transaction = *transaction;
        Ok(self.counted(transaction, lsn))
    }

    fn counted(&mut self, transaction: Transaction, lsn: Lsn) -> Counted {
        let position = self.position(&transaction);
        let settled = position <= self.options.resume_after;
        self.seen.skipped += u64::from(settled);
        Counted { transaction, position, lsn, settled }
    }

    /// A change that was counted, of a table of our own: nothing is sent for it.
    fn own_change(&mut self, relation: u32, new: Option<&Tuple<'_>>) {
        if let State::Open(transaction) = &mut self.state {
            transaction.own += 1;
        }
        self.seen.changes -= 1;
        let columns = match self.tables.get(&relation).map(|described| &described.role) {
            Some(Role::Canary(columns)) => *columns,
            Some(Role::Own | Role::Outbox(_) | Role::Captured(_) | Role::Unwanted) | None => None,
        };
        let (Some(columns), Some(new)) = (columns, new) else { return };
        if let Some(number) = columns.number(new, &self.options.canary) {
            self.canary = Some(number);
        }
    }

    fn position(&self, transaction: &Transaction) -> Position {
        Position {
            epoch: self.options.epoch,
            mark: transaction.commit_lsn.into(),
            ordinal: transaction.ordinal,
            sub: transaction.sub,
        }
    }

    /// A receipt never goes behind what was settled before this stream began.
    fn receipt(&self, position: Position, flush: Option<Mark>) -> Receipt {
        Receipt::new(position.max(self.options.resume_after), flush)
    }

    fn hand_on(
        &self,
        counted: Counted,
        table: &Arc<Table>,
        id: Uuid,
        occurred_at_us: i64,
        content: Content,
        out: &mut Vec<Item>,
    ) {
        if counted.settled {
            return;
        }
        let Counted { transaction, position, lsn, .. } = counted;
        let event = Event {
            id,
            position,
            lsn: Some(lsn),
            occurred_at_us,
            committed_at_us: transaction.committed_at_us,
            xid: transaction.xid,
            table: table.clone(),
            content,
        };
        out.push(Item::Event(event, self.receipt(position, None)));
    }
}

/// What the id of a change is made of. The namespace is that of the timeline on which the change
/// lies; it is kept, because it is the same for almost all of a stream.
fn id_source(namespace: &mut (u32, Uuid), options: &Options, counted: &Counted) -> id::Origin {
    let timeline = options.timelines.at(counted.lsn);
    if namespace.0 != timeline {
        *namespace = (timeline, id::namespace(options.system_id, timeline));
    }
    id::Origin {
        namespace: namespace.1,
        lsn: counted.lsn,
        committed_at_us: counted.transaction.committed_at_us,
        xid: counted.transaction.xid,
    }
}
