//! A captured table is described differently than before: what that means to routes is said once,
//! and recorded with the position.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::event::Table;
use crate::position::Position;
use crate::publisher::Publisher;
use crate::relay::checkpoint::Store;
use crate::relay::{Making, Relay};
use crate::route::SchemaChange;
use crate::source::{ColumnDoubt, Note, Receipt, Source};

/// Ends the session: only a younger catalog tells which columns the table has now.
pub(in crate::relay) fn columns_changed(table: &Table) -> Error {
    Error::protocol(format!("the columns of {} have just changed", table.full_name))
        .hint("no action needed: the next session reads which ones they are")
}

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// The receipt, with what is to be recorded.
    ///
    /// # Errors
    /// Where a hidden column may have another name now, and only the catalog tells which.
    pub(in crate::relay) fn described(
        &mut self,
        table: &Arc<Table>,
        position: Position,
        receipt: Receipt,
    ) -> Result<Receipt> {
        let Making { plans, router, .. } = &self.making;
        if plans.needs_catalog(router, table, position) {
            return Err(columns_changed(table));
        }
        Ok(match self.making.plans.describe(&self.making.router, table, position) {
            None => receipt,
            Some(change) => {
                self.tell(&change);
                receipt.with_note(Note::Changed(Box::new(change)))
            }
        })
    }

    /// Sends nothing of the table that may be hidden, until the catalog has been read again.
    ///
    /// # Errors When the catalog can be read at once: the next session does that.
    pub(in crate::relay) fn columns_in_doubt(
        &mut self,
        table: &Arc<Table>,
        position: Position,
        doubt: ColumnDoubt,
    ) -> Result<()> {
        match doubt {
            ColumnDoubt::Others => Err(columns_changed(table)),
            ColumnDoubt::Unknown => {
                tracing::warn!(
                    table = &*table.full_name,
                    position = %position,
                    hint = "no action needed: its routes send all columns again some seconds after \
                            the transaction has ended; alter tables in transactions of their own",
                    "a transaction that may have altered the table is not visible yet: columns \
                     that may need hiding are left out"
                );
                self.making.plans.forget_columns(&self.making.router, table, position);
                Ok(())
            }
        }
    }

    fn tell(&self, change: &SchemaChange) {
        let SchemaChange { table, position, differences, broken, left_out, .. } = change;
        let changes: Vec<String> = differences.iter().map(ToString::to_string).collect();
        let changes = changes.join("; ");
        for (route, lost) in broken {
            let metrics = self.making.router.by_name(route).map(|route| route.id);
            metrics.into_iter().for_each(|id| self.route_metrics(id).drifted.increment(1));
            let lost: Vec<String> = lost.iter().map(ToString::to_string).collect();
            let on_drift = self.making.router.by_name(route).map(|route| route.rules.on_drift);
            tracing::warn!(
                table,
                route,
                position = %position,
                lost = lost.join("; "),
                on_drift = ?on_drift.unwrap_or_default(),
                hint = "`watership schema TABLE` shows what has changed; `watership schema accept \
                        TABLE` agrees to it",
                "the table no longer has what the route promised"
            );
        }
        for (route, columns) in left_out {
            tracing::warn!(
                table,
                route,
                ?columns,
                hint = "`watership schema accept TABLE` agrees to them; mask, hash or exclude them \
                        first, if they must not be sent",
                "the route leaves out new columns that nobody has agreed to"
            );
        }
        tracing::info!(table, position = %position, changes, "the table has changed");
    }
}
