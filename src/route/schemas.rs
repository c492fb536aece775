//! What routes are agreed with, and how each captured table was last described. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use super::database_secret::DatabaseSecret;
use super::description::{Description, Difference};
use crate::position::{Mark, Position};

/// A description that somebody agreed to for a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    /// What the table was like.
    pub description: Description,
    /// Where the WAL ended then: what was described before is agreed to as well.
    pub since: Mark,
}

/// What a session knows of the captured tables.
#[derive(Debug)]
pub struct Schemas {
    /// The secret of the database.
    pub secret: Arc<DatabaseSecret>,
    /// By route and table (`schema.table` as the configuration has it).
    pub agreed: HashMap<(String, String), Agreement>,
    /// The last description of each table that is recorded, by its name in the configuration.
    pub last: HashMap<String, Description>,
}

impl Default for Schemas {
    /// Without agreements, and with a secret that everybody knows: for runs without a database.
    fn default() -> Self {
        let secret = Arc::new(DatabaseSecret::new(b""));
        Self { secret, agreed: HashMap::new(), last: HashMap::new() }
    }
}

impl Schemas {
    /// What the route is agreed with for this table.
    pub fn agreement(&self, route: &str, table: &str) -> Option<&Agreement> {
        // Almost never asked for: no need to spare the two allocations.
        self.agreed.get(&(route.to_owned(), table.to_owned()))
    }
}

/// A table is described otherwise than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaChange {
    /// `schema.table` as the configuration has it.
    pub table: String,
    /// Its OID.
    pub relation: u32,
    /// From here on.
    pub position: Position,
    /// How it is described now.
    pub description: Description,
    /// What is different.
    pub differences: Vec<Difference>,
    /// Routes that promised what is gone now, and what that is.
    pub broken: Vec<(String, Vec<Difference>)>,
    /// Routes that leave out columns nobody agreed to, and those columns.
    pub left_out: Vec<(String, Vec<String>)>,
}
