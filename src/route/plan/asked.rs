//! What plans have to ask the catalog: which column is which. Pure.

use std::sync::Arc;

use super::{At, Plan, Plans, Rules};
use crate::event::Table;
use crate::position::Position;
use crate::route::Router;
use crate::route::description::Description;

impl Plans {
    /// Whether it takes a newer catalog than the session has read to identify the columns of this
    /// description.
    pub fn needs_catalog(&self, router: &Router, table: &Arc<Table>, position: Position) -> bool {
        let at = At::of(&self.schemas, position.mark);
        let (rules, now) = (Rules::of_table(router, table, &at), Description::of(table));
        let of_route = |plan: &Plan| {
            self.schemas.needs_catalog(&plan.route, &table.full_name, &now, position.mark)
        };
        rules.plans().any(of_route)
    }

    /// From `position` on the columns of the table are unknown: everything that may be hidden is.
    pub fn forget_columns(&mut self, router: &Router, table: &Arc<Table>, position: Position) {
        self.schemas.forget_numbers(&table.full_name);
        let at = At::of(&self.schemas, position.mark);
        let rules = Rules::of_table(router, table, &at);
        if let Some(known) = self.tables.get_mut(&table.oid) {
            // If another column of the key is hidden, the hashes of its lanes change.
            let barrier = known.barrier || known.lanes_hang_on() != rules.lanes_hang_on();
            *known = Rules { barrier, ..rules };
        }
    }

    /// Whether the table, which has columns with these numbers now, lacks one that it had when the
    /// session read the catalog.
    pub fn has_lost(&self, table: &Table, numbers: &[i16]) -> bool {
        self.schemas.has_lost(&table.full_name, numbers)
    }
}
