//! What breaks once a table is published: no replica identity, row filters, column lists, generated
//! columns, kinds of table. Its application can no longer change rows, or rows are never captured.
//! Pure.
//!
//! `init` asks before it makes anything, because the application is the one that fails; `check` and
//! every start ask again, because the table may have been altered since.

use crate::error::{Error, Result};
use crate::pg::publication::{
    CATALOG, CatalogIdentity, Operations, Publication, TableFacts, TableName,
};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// Something is left out of the events, which may be intended.
    Less,
    /// Rows never come that are rows of the table in queries.
    Partly,
    /// Rows of its own never come.
    Absent,
    /// The application's UPDATE and DELETE fail from then on.
    Breaks,
    /// Postgres refuses to publish it.
    Impossible,
}

/// Something about a table that is in the way of its publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// How bad it is.
    pub harm: Harm,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub hint: String,
}

/// Everything about a table that is in the way. Without a publication it is the one of `init`.
pub fn obstacles(facts: &TableFacts, publication: Option<&Publication>) -> Vec<Obstacle> {
    let mut found = Vec::new();
    let (table, quoted) = (&facts.table, facts.table.quoted());
    let mut add = |harm, what: String, hint: String| found.push(Obstacle { harm, what, hint });
    if let Some(kind) = facts.nature.other_than_table {
        let hint = match kind {
            CATALOG => "remove it from source.tables",
            _ => "remove it from source.tables; capture the tables that it reads",
        };
        let hint = hint.to_owned();
        add(Harm::Impossible, format!("{table} is {kind}, which no publication can hold"), hint);
        return found;
    }
    if let Some(kind) = facts.nature.not_logged {
        let hint = format!("ALTER TABLE {quoted} SET LOGGED, or remove it from source.tables");
        add(Harm::Impossible, format!("{table} is {kind}: its rows are not in the WAL"), hint);
        return found;
    }
    if facts.nature.hypertable {
        add(
            Harm::Absent,
            format!(
                "{table} is a hypertable of TimescaleDB: its rows are in chunks and are never \
                 captured"
            ),
            "emit events to the outbox for it, and remove it from source.tables".to_owned(),
        );
    } else if !facts.nature.children.is_empty() {
        add(
            Harm::Partly,
            format!(
                "{table} has inheritance children ({}): their rows are not captured",
                facts.nature.children.join(", ")
            ),
            "name the children in source.tables, too; each needs a replica identity of its own"
                .to_owned(),
        );
    }
    for (leaf, why) in &facts.nature.lost_leaves {
        add(
            Harm::Absent,
            format!("partition {leaf} of {table} is {why}: its rows are never captured"),
            "make it an ordinary table, or detach it".to_owned(),
        );
    }
    let operations = publication.map_or(Operations::ALL, |publication| publication.operations);
    if operations.update || operations.delete {
        identity(facts, &mut add);
        let sent = publication.is_some_and(|publication| publication.generated);
        generated(facts, sent, &mut add);
        let published = publication.and_then(|publication| publication.table(table));
        if let Some(list) = published.and_then(|published| published.columns.as_ref()) {
            column_list(facts, list, &mut add);
        }
    }
    found
}

/// Refuses a partition that is captured together with the table that it is a part of: its rows are
/// published as rows of that table, and Postgres refuses to publish both.
///
/// # Errors
/// [`crate::error::Kind::Refused`], with the two tables.
pub fn none_inside_another(all: &[TableFacts]) -> Result<()> {
    let has = |whole: &TableFacts, leaf: &TableName| whole.leaves.iter().any(|(l, _)| l == leaf);
    let is_inside = |part: &TableFacts, whole: &TableFacts| match &part.leaves[..] {
        [] => has(whole, &part.table),
        leaves => {
            leaves.len() <= whole.leaves.len() && leaves.iter().all(|(leaf, _)| has(whole, leaf))
        }
    };
    let pairs = all.iter().flat_map(|part| all.iter().map(move |whole| (part, whole)));
    let mut different = pairs.filter(|(part, whole)| part.oid != whole.oid);
    let Some((part, whole)) = different.find(|(part, whole)| is_inside(part, whole)) else {
        return Ok(());
    };
    let (part, whole) = (&part.table, &whole.table);
    Err(Error::refused(format!("{part} is a partition of {whole}, and both are captured"))
        .hint(format!("remove {part} from source.tables: its rows come as rows of {whole}")))
}

/// A column list has to cover the replica identity, or changes fail.
fn column_list(facts: &TableFacts, list: &[String], add: &mut impl FnMut(Harm, String, String)) {
    let table = &facts.table;
    let identity: &[String] = match &facts.identity {
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => columns,
        CatalogIdentity::Full => &facts.columns,
        CatalogIdentity::Nothing => return,
    };
    let full = facts.identity == CatalogIdentity::Full;
    let missing = identity.iter().find(|column| !list.contains(column));
    let text = match missing {
        Some(column) => format!("lacks {column:?}, which is in its replica identity"),
        // Postgres refuses every list here, also one of all columns.
        None if full => "is not allowed with REPLICA IDENTITY FULL".to_owned(),
        None => return,
    };
    add(
        Harm::Breaks,
        format!("the column list of {table} {text}: UPDATE and DELETE on it fail"),
        "ALTER PUBLICATION ... SET TABLE, with those columns in the list, or without a list"
            .to_owned(),
    );
}

/// A row filter may only look at columns of the replica identity, or changes fail. `columns` are
/// those that it looks at.
pub fn filter_breaks(
    facts: &TableFacts,
    publication: &Publication,
    columns: &[String],
) -> Option<Obstacle> {
    let operations = publication.operations;
    let changes = operations.update || operations.delete;
    let column = facts.identity.lacks(columns).filter(|_| changes && !facts.partitioned)?;
    let table = &facts.table;
    Some(Obstacle {
        harm: Harm::Breaks,
        what: format!(
            "the row filter of {table} uses column {column:?}, which is not in its replica \
             identity: UPDATE and DELETE on it fail"
        ),
        hint: format!(
            "ALTER TABLE {} REPLICA IDENTITY FULL, or remove the filter",
            facts.table.quoted()
        ),
    })
}

/// Changes of a published table need a replica identity.
fn identity(facts: &TableFacts, add: &mut impl FnMut(Harm, String, String)) {
    let (table, quoted) = (&facts.table, facts.table.quoted());
    if !facts.partitioned && facts.identity == CatalogIdentity::Nothing {
        let why = if facts.nature.deferrable_key { ": its primary key is DEFERRABLE" } else { "" };
        add(
            Harm::Breaks,
            format!("{table} has no replica identity{why}: UPDATE and DELETE on it fail"),
            format!(
                "add a primary key (not DEFERRABLE), or ALTER TABLE {quoted} REPLICA IDENTITY FULL"
            ),
        );
    }
    if !facts.partitioned {
        return;
    }
    for (leaf, _) in facts.leaves.iter().filter(|(_, of)| *of == CatalogIdentity::Nothing) {
        add(
            Harm::Breaks,
            format!(
                "partition {leaf} of {table} has no replica identity: UPDATE and DELETE in it fail"
            ),
            format!(
                "add a primary key (not DEFERRABLE) to {table}, or ALTER TABLE {} REPLICA IDENTITY \
                 FULL, for {table} and each partition",
                leaf.quoted()
            ),
        );
    }
    if !matches!(facts.identity, CatalogIdentity::Key(_)) {
        add(
            Harm::Less,
            format!(
                "partitions that are added to {table} later do not take over its replica identity"
            ),
            "set it on each new partition before rows are written; with a primary key nothing is \
             needed"
                .to_owned(),
        );
    }
}

/// Generated columns are in the stream only where the publication says so, from Postgres 18 on.
/// There a replica identity that has one that is not sent makes changes fail; before, it was left
/// out.
fn generated(facts: &TableFacts, sent: bool, add: &mut impl FnMut(Harm, String, String)) {
    let table = &facts.table;
    let is_virtual = |column: &&String| facts.nature.virtual_columns.contains(column);
    let unsent = |column: &&String| !sent || is_virtual(column);
    let in_identity = |column: &&String| match &facts.identity {
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => columns.contains(column),
        CatalogIdentity::Full => true,
        CatalogIdentity::Nothing => false,
    };
    let columns: Vec<&str> =
        facts.generated.iter().filter(unsent).filter(in_identity).map(String::as_str).collect();
    if columns.is_empty() {
        return;
    }
    let columns = columns.join(", ");
    if facts.nature.server_version >= 180_000 {
        add(
            Harm::Breaks,
            format!(
                "the replica identity of {table} has generated columns that are not published \
                 ({columns}): UPDATE and DELETE on it fail"
            ),
            format!(
                "ALTER TABLE {} REPLICA IDENTITY DEFAULT; or, for stored columns, ALTER \
                 PUBLICATION ... SET (publish_generated_columns = stored)",
                facts.table.quoted()
            ),
        );
    } else if facts.identity == CatalogIdentity::Full {
        add(
            Harm::Less,
            format!("generated columns of {table} ({columns}) are not in its events"),
            "before an upgrade to Postgres 18, set REPLICA IDENTITY DEFAULT: there UPDATE and \
             DELETE would fail"
                .to_owned(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::publication::{Nature, PublishedTable, TableName};

    fn names(columns: &[&str]) -> Vec<String> {
        columns.iter().map(|column| (*column).to_owned()).collect()
    }

    fn table(identity: CatalogIdentity) -> TableFacts {
        TableFacts {
            table: TableName::new("public", "t"),
            oid: 1,
            partitioned: false,
            identity,
            leaves: Vec::new(),
            primary_key: Vec::new(),
            columns: names(&["id", "title", "slug"]),
            generated: Vec::new(),
            leading: Vec::new(),
            may_select: true,
            nature: Nature { server_version: 150_000, ..Nature::default() },
        }
    }

    fn keyed() -> TableFacts {
        table(CatalogIdentity::Key(names(&["id"])))
    }

    /// The worst, and what it says.
    fn worst(facts: &TableFacts) -> Option<(Harm, String)> {
        let found = obstacles(facts, None);
        found.into_iter().map(|obstacle| (obstacle.harm, obstacle.what)).max()
    }

    #[test]
    fn what_cannot_be_published_is_named_by_its_kind() {
        assert_eq!(worst(&keyed()), None);
        for kind in ["a view", "a foreign table"] {
            let nature = Nature { other_than_table: Some(kind), ..Nature::default() };
            let (harm, what) = worst(&TableFacts { nature, ..keyed() }).expect(kind);
            assert!(harm == Harm::Impossible && what.contains(kind), "{what}");
        }
        let nature = Nature { not_logged: Some("unlogged"), ..Nature::default() };
        let (harm, what) = worst(&TableFacts { nature, ..keyed() }).expect("unlogged");
        assert!(harm == Harm::Impossible && what.contains("is unlogged"), "{what}");
    }

    #[test]
    fn rows_that_never_come_are_named_with_the_place_where_they_are() {
        let nature = |nature| TableFacts { nature, ..keyed() };
        let children = Nature { children: names(&["public.c1"]), ..Nature::default() };
        let lost = vec![("public.t_1".to_owned(), "unlogged")];
        let leaf = Nature { lost_leaves: lost, ..Nature::default() };
        let chunks = Nature { hypertable: true, ..Nature::default() };
        for (nature_of, text) in [(children, "public.c1"), (leaf, "public.t_1"), (chunks, "chunks")]
        {
            let (harm, what) = worst(&nature(nature_of)).expect(text);
            assert!(harm >= Harm::Partly && harm < Harm::Breaks && what.contains(text), "{what}");
        }
    }

    #[test]
    fn changes_that_would_fail_are_named_and_none_fails_where_only_inserts_are_published() {
        let deferrable = Nature { deferrable_key: true, ..Nature::default() };
        let nothing = table(CatalogIdentity::Nothing);
        let root = TableFacts {
            partitioned: true,
            leaves: vec![(TableName::new("public", "t_1"), CatalogIdentity::Nothing)],
            ..table(CatalogIdentity::Nothing)
        };
        let late = Nature { server_version: 180_000, ..Nature::default() };
        let full = TableFacts {
            generated: names(&["slug"]),
            nature: late.clone(),
            ..table(CatalogIdentity::Full)
        };
        let by_index =
            TableFacts { identity: CatalogIdentity::Index(names(&["slug"])), ..full.clone() };
        for (facts, text) in [
            (nothing.clone(), "no replica identity"),
            (TableFacts { nature: deferrable, ..nothing }, "DEFERRABLE"),
            (root, "partition public.t_1"),
            (full.clone(), "(slug)"),
            (by_index, "(slug)"),
        ] {
            let (harm, what) = worst(&facts).expect(text);
            assert!(harm == Harm::Breaks && what.contains(text), "{what}");
            let inserts = Operations { update: false, delete: false, ..Operations::ALL };
            let publication = publication(inserts, false);
            assert!(obstacles(&facts, Some(&publication)).is_empty(), "{text}");
        }
        assert!(obstacles(&full, Some(&publication(Operations::ALL, true))).is_empty());
        let virtual_columns = names(&["slug"]);
        let never = Nature { virtual_columns, ..late };
        let never = TableFacts { nature: never, ..full.clone() };
        assert_eq!(obstacles(&never, Some(&publication(Operations::ALL, true))).len(), 1);
        let early = Nature { server_version: 170_000, ..Nature::default() };
        let (harm, _) = worst(&TableFacts { nature: early, ..full }).expect("it is said");
        assert_eq!(harm, Harm::Less);
    }

    #[test]
    fn a_column_list_or_a_row_filter_that_the_replica_identity_does_not_cover_breaks_changes() {
        let listed = |columns: &[&str]| Publication {
            tables: vec![PublishedTable {
                oid: 1,
                entry: Some(3),
                table: TableName::new("public", "t"),
                row_filter: None,
                columns: Some(names(columns)),
            }],
            ..publication(Operations::ALL, false)
        };
        let full = table(CatalogIdentity::Full);
        assert!(obstacles(&keyed(), Some(&listed(&["id"]))).is_empty());
        for (facts, list) in [
            (&keyed(), &["title"][..]),
            (&full, &["id", "title"]),
            (&full, &["id", "title", "slug"]),
        ] {
            let found = obstacles(facts, Some(&listed(list)));
            assert_eq!(found.first().map(|o| o.harm), Some(Harm::Breaks), "{list:?}");
        }
        let all = publication(Operations::ALL, false);
        let filter =
            |facts: &TableFacts, columns: &[&str]| filter_breaks(facts, &all, &names(columns));
        assert_eq!(filter(&keyed(), &["id"]), None);
        assert_eq!(filter(&full, &["title"]), None);
        assert!(filter(&keyed(), &["id", "title"]).is_some_and(|o| o.what.contains("\"title\"")));
    }

    fn publication(operations: Operations, generated: bool) -> Publication {
        Publication {
            altered_by: None,
            oid: 2,
            name: "w".into(),
            via_root: true,
            all_tables: false,
            operations,
            generated,
            tables: Vec::new(),
        }
    }
}
