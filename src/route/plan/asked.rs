//! What plans need to know of the catalog: which columns of a table are which. Pure.

use std::sync::Arc;

use super::{At, Plan, Plans, Rules};
use crate::event::Table;
use crate::position::Position;
use crate::route::Router;
use crate::route::description::Description;

impl Plans {
    /// Whether the columns of a table that is described so can only be told apart by a younger
    /// catalog than the one that the session read.
    pub fn needs_catalog(&self, router: &Router, table: &Arc<Table>, position: Position) -> bool {
        let at = At::of(&self.schemas, position.mark);
        let (rules, now) = (Rules::of_table(router, table, &at), Description::of(table));
        let of_route = |plan: &Plan| {
            self.schemas.needs_catalog(&plan.route, &table.full_name, &now, position.mark)
        };
        rules.plans().any(of_route)
    }

    /// From `position` on nobody knows which columns the table has: those that may be hidden are.
    pub fn forget_columns(&mut self, router: &Router, table: &Arc<Table>, position: Position) {
        self.schemas.forget_numbers(&table.full_name);
        let at = At::of(&self.schemas, position.mark);
        let rules = Rules::of_table(router, table, &at);
        if let Some(known) = self.tables.get_mut(&table.oid) {
            // Where another column of the key is hidden, its lanes have other hashes.
            let barrier = known.barrier || known.lanes_hang_on() != rules.lanes_hang_on();
            *known = Rules { barrier, ..rules };
        }
    }

    /// Whether a column is gone that the table had when the session read the catalog: it has those
    /// with these numbers now.
    pub fn has_lost(&self, table: &Table, numbers: &[i16]) -> bool {
        self.schemas.has_lost(&table.full_name, numbers)
    }
}
