//! Captured tables with `on_table_lost = "hold"`: that they are gone, and that they are back. Pure.
//!
//! Invariant: nothing of such a table is guessed. What was committed while it was in the
//! publication under its name is published; what was not sent meanwhile is named as a range of the
//! WAL when it is back. The other tables are not concerned.

use serde::{Deserialize, Serialize};

use crate::pg::publication::{Publication, PublishedTable, TableName};
use crate::position::Lsn;
use crate::relay::check::position::narrowed;

/// A publication as a relay agreed to it last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// What it publishes, of the tables that the relay wants.
    #[serde(flatten)]
    pub publication: Publication,
    /// Tables that are wanted, held, and not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<Missed>,
}

/// A held table since it was missed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missed {
    /// Its name.
    pub table: TableName,
    /// How it was published; absent if it never was.
    pub was: Option<PublishedTable>,
    /// From this LSN on changes of it may be missing.
    pub since: u64,
}

impl Agreed {
    /// A publication of which nothing is missing.
    pub fn whole(publication: Publication) -> Self {
        Self { publication, lost: Vec::new() }
    }

    /// The tables that are there.
    pub fn tables(&self) -> impl Iterator<Item = &TableName> {
        self.publication.tables.iter().map(|published| &published.table)
    }

    /// What is known of a table that was lost before.
    pub fn lost(&self, table: &TableName) -> Option<&Missed> {
        self.lost.iter().find(|lost| lost.table == *table)
    }

    /// How a table was published when it was last there.
    pub fn was(&self, table: &TableName) -> Option<&PublishedTable> {
        let lost = || self.lost(table).and_then(|lost| lost.was.as_ref());
        self.publication.table(table).or_else(lost)
    }
}

/// A held table that is back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Returned {
    /// Its name.
    pub table: TableName,
    /// From this LSN on changes of it may be missing,
    pub from: Lsn,
    /// and up to this one.
    pub to: Lsn,
    /// What of it is published differently than before.
    pub differs: Option<String>,
}

/// Whether a table is not the one that was agreed to, or was out of the publication since.
pub fn was_away(agreed: &Agreed, now: &PublishedTable) -> bool {
    let then = agreed.publication.table(&now.table);
    let same = |then: &PublishedTable| (then.oid, then.entry) == (now.oid, now.entry);
    agreed.lost(&now.table).is_some() || then.is_some_and(|then| !same(then))
}

/// What is agreed to from now on, and which held tables have come back. `now` has only tables that
/// are wanted, `lost` are the held ones that are not there or cannot be captured; `intact` is how
/// far the agreed state was known to hold, `end` is the end of WAL.
pub fn agree(
    then: Option<&Agreed>,
    now: Publication,
    held: &[TableName],
    lost: &[TableName],
    (intact, end): (Lsn, Lsn),
) -> (Agreed, Vec<Returned>) {
    let since = |table: &TableName| {
        let before = then.and_then(|then| then.lost(table));
        before.map_or(intact, |before| Lsn(before.since))
    };
    let was = |table: &TableName| then.and_then(|then| then.was(table));
    let back = |table: &&PublishedTable| {
        held.contains(&table.table)
            && !lost.contains(&table.table)
            && then.is_some_and(|then| was_away(then, table))
    };
    let returned = now.tables.iter().filter(back).map(|published| {
        let table = published.table.clone();
        let differs = was(&table).and_then(|was| narrowed(was, published));
        Returned { from: since(&table), to: end, differs, table }
    });
    let returned = returned.collect();
    let mark = |table: &TableName| Missed {
        table: table.clone(),
        was: was(table).cloned(),
        since: since(table).0,
    };
    let lost_now = lost.iter().map(mark).collect();
    let mut publication = now;
    publication.tables.retain(|published| !lost.contains(&published.table));
    (Agreed { publication, lost: lost_now }, returned)
}

/// What `init` records: of the held tables what was agreed to before, so that the relay itself
/// finds out that one was away.
pub fn keep_held(then: Option<&Agreed>, now: Publication, held: &[TableName]) -> Agreed {
    let Some(then) = then else { return Agreed::whole(now) };
    let mut publication = now;
    publication.tables.retain(|published| {
        let table = &published.table;
        !held.contains(table) || !was_away(then, published)
    });
    let is_held = |published: &&PublishedTable| held.contains(&published.table);
    for before in then.publication.tables.iter().filter(is_held) {
        if publication.table(&before.table).is_none() {
            publication.tables.push(before.clone());
        }
    }
    publication.tables.sort_by(|a, b| a.table.cmp(&b.table));
    let lost = then.lost.iter().filter(|lost| held.contains(&lost.table)).cloned().collect();
    Agreed { publication, lost }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::publication::Operations;

    fn name(table: &str) -> TableName {
        TableName::new("public", table)
    }

    fn table(table: &str, oid: u32, entry: u32) -> PublishedTable {
        let table = name(table);
        PublishedTable { oid, entry: Some(entry), table, row_filter: None, columns: None }
    }

    fn publication(tables: &[PublishedTable]) -> Publication {
        Publication {
            oid: 5,
            altered_by: None,
            name: "w".into(),
            via_root: true,
            all_tables: false,
            operations: Operations::ALL,
            generated: false,
            tables: tables.to_vec(),
        }
    }

    #[test]
    fn a_table_that_comes_back_names_the_range_in_which_it_was_away() {
        let held = [name("a")];
        let range = (Lsn(200), Lsn(300));
        let first = Agreed::whole(publication(&[table("a", 1, 11), table("b", 2, 12)]));
        let was = Some(table("a", 1, 11));
        let lost = [Missed { table: name("a"), was, since: 200 }];
        let without = publication(&[table("b", 2, 12)]);
        let (gone, returned) = agree(Some(&first), without.clone(), &held, &held, range);
        assert_eq!(returned, []);
        assert_eq!(gone.lost, lost);
        // While it is away, neither its OID nor the beginning is forgotten.
        let later = (Lsn(700), Lsn(800));
        let (gone, _) = agree(Some(&gone), without.clone(), &held, &held, later);
        assert_eq!(gone.lost, lost);
        // `init` puts it back, and does not take the statement away from the relay.
        let again = publication(&[table("a", 9, 19), table("b", 2, 12)]);
        assert_eq!(keep_held(Some(&gone), again.clone(), &held), gone);
        let (whole, returned) = agree(Some(&gone), again.clone(), &held, &[], later);
        let (from, to) = (Lsn(200), Lsn(800));
        assert_eq!(returned, [Returned { table: name("a"), from, to, differs: None }]);
        assert_eq!(whole, Agreed::whole(again.clone()));
        assert_eq!(agree(Some(&whole), again, &held, &[], later).1, []);
    }

    #[test]
    fn one_that_was_away_between_two_looks_is_told_too_and_a_new_one_is_not() {
        let held = [name("a")];
        let range = (Lsn(200), Lsn(300));
        let first = Agreed::whole(publication(&[table("a", 1, 11)]));
        let filtered = PublishedTable { row_filter: Some("(x)".into()), ..table("a", 1, 12) };
        let otherwise = "row filter (x) instead of none";
        for (put_back, differs) in
            [(table("a", 1, 12), None), (table("a", 2, 12), None), (filtered, Some(otherwise))]
        {
            let differs = differs.map(str::to_owned);
            let now = publication(&[put_back]);
            assert_eq!(keep_held(Some(&first), now.clone(), &held), first);
            let (_, returned) = agree(Some(&first), now, &held, &[], range);
            let (from, to) = range;
            assert_eq!(returned, [Returned { table: name("a"), from, to, differs }]);
        }
        let none = Agreed::whole(publication(&[]));
        let now = publication(&[table("a", 1, 11)]);
        assert_eq!(agree(Some(&none), now.clone(), &held, &[], range).1, []);
        assert_eq!(agree(None, now, &held, &[], range).1, []);
    }

    #[test]
    fn what_was_agreed_to_before_there_were_held_tables_is_read() {
        let plain = publication(&[table("a", 1, 11)]);
        let stored = serde_json::to_value(&plain).unwrap();
        let agreed: Agreed = serde_json::from_value(stored.clone()).unwrap();
        assert_eq!(agreed, Agreed::whole(plain));
        assert_eq!(serde_json::to_value(&agreed).unwrap(), stored);
    }
}
