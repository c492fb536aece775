//! What routes are agreed with, and how each captured table was last described. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use super::database_secret::DatabaseSecret;
use super::description::{Description, Difference};
use super::{Route, agreed};
use crate::event::Table;
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
    /// What is recorded of each table, by its name in the configuration.
    pub recorded: HashMap<String, Recorded>,
    /// Each table as the catalog has it, by its name in the configuration.
    pub now: HashMap<String, Description>,
    /// Where the WAL ended before the catalog was read.
    pub now_at: Mark,
}

/// The descriptions of a table that are recorded.
#[derive(Debug, Default)]
pub struct Recorded {
    /// The last one that the stream brought, and where.
    pub changed: Option<(Position, Description)>,
    /// Those that were agreed to, and where the WAL ended then; the latest last.
    pub agreed: Vec<(Mark, Description)>,
}

impl Recorded {
    /// The last one.
    fn last(&self) -> Option<&Description> {
        match (&self.changed, self.agreed.last()) {
            (Some((at, changed)), Some((mark, _))) if *mark <= at.mark => Some(changed),
            (Some((_, changed)), None) => Some(changed),
            (_, agreed) => agreed.map(|(_, agreed)| agreed),
        }
    }

    /// All that are younger than this place.
    fn since(&self, mark: Mark) -> Vec<&Description> {
        let changed = self.changed.iter().filter(|(at, _)| at.mark > mark);
        let agreed = self.agreed.iter().filter(|(at, _)| *at > mark);
        changed.map(|(_, one)| one).chain(agreed.map(|(_, one)| one)).collect()
    }

    /// The description before `position`; absent where none is known, and where what comes there
    /// is recorded already: a transaction that is read again begins with its old description.
    pub(super) fn before(&self, position: Position) -> Option<&Description> {
        let agreed = self.agreed.iter().rfind(|(mark, _)| *mark <= position.mark);
        match (&self.changed, agreed) {
            (Some((at, _)), _) if position <= *at => None,
            (Some((at, _)), Some((mark, agreed))) if *mark > at.mark => Some(agreed),
            (Some((_, changed)), _) => Some(changed),
            (None, agreed) => agreed.map(|(_, agreed)| agreed),
        }
    }
}

impl Default for Schemas {
    /// Without agreements, and with a secret that everybody knows: for runs without a database.
    fn default() -> Self {
        let secret = Arc::new(DatabaseSecret::new(b""));
        Self {
            secret,
            agreed: HashMap::new(),
            recorded: HashMap::new(),
            now: HashMap::new(),
            now_at: Mark(0),
        }
    }
}

impl Schemas {
    /// What the route is agreed with for this table.
    pub fn agreement(&self, route: &str, table: &str) -> Option<&Agreement> {
        // Almost never asked for: no need to spare the two allocations.
        self.agreed.get(&(route.to_owned(), table.to_owned()))
    }

    /// The columns of `now`, the table of that name, that a route with hidden columns may send.
    pub(super) fn agreed_columns<'a>(
        &self,
        route: &Route,
        table: &str,
        now: &'a Description,
    ) -> Vec<&'a str> {
        let rules = &route.rules.columns;
        match self.agreement(&route.name, table) {
            Some(agreement) if !rules.is_empty() => {
                let seen = self.recorded.get(table).map(|recorded| recorded.since(agreement.since));
                let found = (self.now.get(table), &*seen.unwrap_or_default());
                agreed::columns(rules, &route.key, &agreement.description, now, found)
            }
            // Nothing has been agreed.
            None if rules.is_closed() => Vec::new(),
            Some(_) | None => now.columns.iter().map(|column| &*column.name).collect(),
        }
    }

    /// The table of that name as the stream describes it, with column numbers if they are known.
    /// `agreed`: an earlier description.
    pub(super) fn described(&self, name: &str, table: &Table, agreed: &Description) -> Description {
        let now = Description::of(table);
        let numbered = agreed::numbered(agreed, &now, self.now.get(name));
        Description { numbered, ..now }
    }

    /// Whether columns of the table of that name were replaced under the same names, which its
    /// description does not show.
    pub fn is_renumbered(&self, table: &str) -> bool {
        let (recorded, now) = (self.recorded.get(table), self.now.get(table));
        let last = recorded.and_then(Recorded::last);
        last.zip(now).is_some_and(|(last, now)| last.has_others(now))
    }

    /// Notes that the columns of the table of that name are unknown: it was being altered when the
    /// catalog was asked.
    pub(super) fn forget_numbers(&mut self, table: &str) {
        if let Some(now) = self.now.get_mut(table) {
            now.numbered = None;
        }
    }

    /// Whether the table of that name, which now has columns with these `numbers`, lacks one that
    /// the catalog had.
    pub(super) fn has_lost(&self, table: &str, numbers: &[i16]) -> bool {
        let known = self.now.get(table).and_then(|now| now.numbered.as_ref());
        known.is_some_and(|known| known.numbers.iter().any(|number| !numbers.contains(number)))
    }

    /// Whether only a younger catalog than the one that was read can tell which columns these are,
    /// from `mark` on.
    pub(super) fn needs_catalog(
        &self,
        route: &Route,
        table: &str,
        now: &Description,
        mark: Mark,
    ) -> bool {
        let agreement = self.agreement(&route.name, table).filter(|_| mark >= self.now_at);
        agreement.is_some_and(|agreement| {
            let catalog = self.now.get(table);
            agreed::needs_catalog(&route.rules.columns, &agreement.description, now, catalog)
        })
    }
}

/// A table is described differently than before.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Description {
        Description { table: name.to_owned(), ..Description::default() }
    }

    fn at(mark: u64, ordinal: u64) -> Position {
        Position { epoch: 1, mark: Mark(mark), ordinal, sub: 0 }
    }

    #[test]
    fn the_description_before_a_place_is_the_last_that_was_in_force_there() {
        let agreed = vec![(Mark(10), named("first")), (Mark(30), named("third"))];
        let mut recorded = Recorded { changed: None, agreed };
        let before = |recorded: &Recorded, mark, ordinal| {
            recorded.before(at(mark, ordinal)).map(|description| description.table.clone())
        };
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(before(&recorded, 9, 0), None, "nobody knows");
        assert_eq!(before(&recorded, 10, 0), some("first"));
        assert_eq!(before(&recorded, 29, 0), some("first"), "the later one is not in force yet");
        assert_eq!(before(&recorded, 30, 0), some("third"));
        recorded.changed = Some((at(20, 2), named("second")));
        assert_eq!(before(&recorded, 20, 1), None);
        assert_eq!(before(&recorded, 20, 2), None, "it is recorded already");
        assert_eq!(before(&recorded, 20, 3), some("second"));
        assert_eq!(before(&recorded, 29, 0), some("second"));
        assert_eq!(before(&recorded, 31, 0), some("third"));
    }
}
