//! The stream describes a table: what that says of its partitions, and whether it is handed on.

use std::sync::Arc;

use super::describe::{Role, just_changed, just_lost_or_found};
use super::{Assembler, RELATIONS_MAX, State, describe};
use crate::error::{Error, Result};
use crate::event::Table;
use crate::pg::pgoutput::Relation;
use crate::position::Position;
use crate::source::{Item, Note};

/// A captured table was described, whether or not it is different.
#[derive(Debug, Clone)]
pub struct DescribedAt {
    /// How.
    pub table: Arc<Table>,
    /// Where.
    pub position: Position,
    /// By which transaction.
    pub xid: u32,
}

impl Assembler {
    pub(super) fn relation(&mut self, relation: &Relation<'_>, out: &mut Vec<Item>) -> Result<()> {
        let is_older = match &self.state {
            State::Open(transaction) => transaction.commit_lsn < self.options.catalog_at,
            State::Idle => true,
        };
        if !is_older && let Some(table) = describe::held_is_another(relation, &self.options) {
            return Err(just_lost_or_found(table));
        }
        let mut described = describe::describe(relation, &self.options, is_older)?;
        // A partition of a captured root is never captured itself: a table that is, and that comes
        // right after a root, is another one of the same truncate.
        if let Some(root) = self.root.take()
            && matches!(described.role, Role::Unwanted)
        {
            self.partition(&root, relation, is_older, out)?;
        }
        if self.tables.len() >= RELATIONS_MAX {
            // The server describes a relation again before it uses it only after an invalidation,
            // so forgetting is not possible; a new session is.
            return Err(Error::protocol(format!("more than {RELATIONS_MAX} tables in one stream")));
        }
        if matches!(described.role, Role::Captured(_)) {
            if !is_older && !describe::names_every_row(&described.table, &self.options) {
                return Err(just_changed(&described.table.full_name));
            }
            if describe::is_root(&described.table, &self.options) {
                self.root = Some(described.table.clone());
            }
            if self.has_unlike(relation.id) {
                described.table = describe::without_identity(&described.table);
            }
            self.announce(&described.table, out);
            if let State::Open(transaction) = &self.state {
                let (table, position) = (described.table.clone(), self.position(transaction));
                self.described = Some(DescribedAt { table, position, xid: transaction.xid });
            }
        }
        self.has_later_keys |= described.later_key.is_some();
        self.tables.insert(relation.id, described);
        Ok(())
    }

    /// The first transaction began that committed after the catalog was read. With REPLICA IDENTITY
    /// FULL the stream describes a table in the same way after its key was changed, so from here on
    /// the key is that of the catalog.
    pub(super) fn take_later_keys(&mut self, out: &mut Vec<Item>) {
        self.has_later_keys = false;
        let mut found = Vec::new();
        for described in self.tables.values_mut() {
            let Some(key) = described.later_key.take() else { continue };
            let table = Arc::new(Table { key, ..Table::clone(&described.table) });
            if describe::names_every_row(&table, &self.options) {
                found.push(table);
            }
        }
        for table in found {
            self.announce(&table, out);
            if let Some(described) = self.tables.get_mut(&table.oid) {
                described.table = table;
            }
        }
    }

    /// A partition was described, right after its root.
    fn partition(
        &mut self,
        root: &Arc<Table>,
        partition: &Relation<'_>,
        is_older: bool,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        let pair = (root.oid, partition.id);
        if describe::sends_like_root(root, partition, &self.options) {
            self.unlike.remove(&pair);
        } else if is_older {
            self.unlike.insert(pair);
        } else {
            return Err(just_changed(&format!("{}.{}", partition.namespace, partition.name)));
        }
        let unlike = self.has_unlike(root.oid);
        let table = if unlike { describe::without_identity(root) } else { Arc::clone(root) };
        self.announce(&table, out);
        if let Some(described) = self.tables.get_mut(&root.oid) {
            described.table = table;
        }
        Ok(())
    }

    fn has_unlike(&self, root: u32) -> bool {
        self.unlike.range((root, 0)..=(root, u32::MAX)).next().is_some()
    }

    /// Hands on a description that differs from the one before it in this stream, or from the
    /// stored one.
    fn announce(&self, table: &Arc<Table>, out: &mut Vec<Item>) {
        let State::Open(transaction) = &self.state else { return };
        let is_known = match self.tables.get(&table.oid) {
            Some(before) => before.table.version == table.version && before.table.key == table.key,
            None => {
                describe::is_former(table, &self.options)
                    && !self.options.renumbered.contains(&table.oid)
            }
        };
        if !is_known {
            let position = self.position(transaction);
            let receipt = self.receipt(position, None).with_note(Note::Described(table.clone()));
            out.push(Item::Described(table.clone(), position, receipt));
        }
    }
}
