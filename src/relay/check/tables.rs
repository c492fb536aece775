//! Whether the replica identity that a table has carries its key: each change of a captured table
//! must say which row it is about. Pure.
//!
//! Invariant: what is refused here at `init`, `check` and every start could otherwise make an event
//! whose `key` or `before` is wrong. Order does not rest on it: a change that does not carry its
//! key waits for its whole table (`route/lanes`).

use crate::error::{Error, Result};
use crate::pg::publication::{
    CatalogIdentity, Operations, Publication, PublishedTable, TableFacts, TableName,
};

/// Refuses a table whose changes cannot be told apart by its key. Without a publication it is that
/// which `init` makes.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with the statement that repairs it.
pub fn keys_its_changes(facts: &TableFacts, publication: Option<&Publication>) -> Result<()> {
    let operations = publication.map_or(Operations::ALL, |publication| publication.operations);
    let published = publication.and_then(|publication| publication.table(&facts.table));
    let generated = publication.is_some_and(|publication| publication.generated);
    if operations.update || operations.delete {
        identity_has_key(&facts.table, &facts.identity, &facts.primary_key)?;
        for (leaf, identity) in &facts.leaves {
            same_as_root(facts, leaf, identity)?;
        }
    }
    columns_have_key(facts, published)?;
    key_is_sent(facts, published, generated)
}

/// An index that lacks a column of the primary key: a DELETE does not say which row went, and an
/// UPDATE of the key does not say which row it was.
fn identity_has_key(table: &TableName, identity: &CatalogIdentity, key: &[String]) -> Result<()> {
    let CatalogIdentity::Index(columns) = identity else { return Ok(()) };
    let Some(column) = identity.lacks(key) else { return Ok(()) };
    let text = format!(
        "the replica identity of {table} is an index on {}, without column {column:?} of its \
         primary key: a DELETE would not say which row was deleted",
        columns.join(", ")
    );
    let quoted = table.quoted();
    Err(Error::refused(text).hint(format!(
        "ALTER TABLE {quoted} REPLICA IDENTITY DEFAULT; or FULL, if consumers need the old rows"
    )))
}

/// Rows are logged with the identity of the partition that holds them, and described by the root's.
fn same_as_root(root: &TableFacts, leaf: &TableName, identity: &CatalogIdentity) -> Result<()> {
    let needed: &[String] = match &root.identity {
        CatalogIdentity::Full => &[],
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => columns,
        CatalogIdentity::Nothing => &root.primary_key,
    };
    let full = *identity == CatalogIdentity::Full;
    let whole = root.identity == CatalogIdentity::Full;
    let lacks = identity.lacks(needed).or_else(|| identity.lacks(&root.primary_key));
    let what = match (full, whole, lacks) {
        (true, ..) | (false, false, None) => return Ok(()),
        (false, true, _) => "is not FULL".to_owned(),
        (false, false, Some(column)) => format!("lacks column {column:?}"),
    };
    let table = &root.table;
    let text = format!(
        "the replica identity of partition {leaf} {what}, but that of its root {table} {}: the \
         partition's changes would be misread",
        match &root.identity {
            CatalogIdentity::Full => "is FULL".to_owned(),
            CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => {
                format!("has {}", columns.join(", "))
            }
            CatalogIdentity::Nothing => "is NOTHING".to_owned(),
        }
    );
    let form = match &root.identity {
        CatalogIdentity::Key(_) => "DEFAULT",
        CatalogIdentity::Full | CatalogIdentity::Index(_) | CatalogIdentity::Nothing => "FULL",
    };
    let quoted = leaf.quoted();
    Err(Error::refused(text).hint(format!("ALTER TABLE {quoted} REPLICA IDENTITY {form}")))
}

/// A column list without the key: no event says which row it is about.
fn columns_have_key(facts: &TableFacts, published: Option<&PublishedTable>) -> Result<()> {
    let Some(columns) = published.and_then(|published| published.columns.as_ref()) else {
        return Ok(());
    };
    let missing = key_of(facts).iter().find(|column| !columns.contains(column));
    let Some(column) = missing else { return Ok(()) };
    let table = &facts.table;
    let text = format!(
        "only columns {} of {table} are published, without key column {column:?}: \
         no event would say which row it is about",
        columns.join(", ")
    );
    Err(Error::refused(text).hint(
        "ALTER PUBLICATION ... SET TABLE, with the key in the column list, or without a list",
    ))
}

/// The primary key, or the index that stands in for it.
fn key_of(facts: &TableFacts) -> &[String] {
    match &facts.identity {
        CatalogIdentity::Index(columns) if facts.primary_key.is_empty() => columns,
        _ => &facts.primary_key,
    }
}

/// A generated column in the key, which Postgres leaves out of the stream: no event says all of it.
fn key_is_sent(
    facts: &TableFacts,
    published: Option<&PublishedTable>,
    generated: bool,
) -> Result<()> {
    let key = key_of(facts);
    let list = published.and_then(|published| published.columns.as_ref());
    let is_sent = |column: &String| list.map_or(generated, |list| list.contains(column));
    let mut missing = key.iter().filter(|column| facts.generated.contains(column));
    let Some(column) = missing.find(|column| !is_sent(column)) else { return Ok(()) };
    let table = &facts.table;
    let text = format!(
        "column {column:?} of the key of {table} is generated and not published: no event would \
         say which row it is about"
    );
    Err(Error::refused(text).hint(
        "give the table a key of ordinary columns; from Postgres 18 on, ALTER PUBLICATION ... SET \
         (publish_generated_columns = stored) is enough",
    ))
}

/// What keeps a route from finding its key in every change of the table, with what to do.
pub fn hides_route_key(
    facts: &TableFacts,
    route: &str,
    key: &[String],
) -> Option<(String, String)> {
    let (table, quoted) = (&facts.table, facts.table.quoted());
    if let Some(column) = key.iter().find(|column| !facts.columns.contains(column)) {
        let text = format!(
            "route {route:?} uses column {column:?} as key, but {table} has no such column: its \
             changes have no key and are published one at a time"
        );
        return Some((text, "set the route's key to columns of the table".to_owned()));
    }
    let column = facts.identity.lacks(key)?;
    let text = format!(
        "route {route:?} uses column {column:?} of {table} as key, but it is not in the replica \
         identity: each UPDATE and DELETE waits for all earlier changes, and a DELETE lacks \
         the key"
    );
    Some((text, format!("ALTER TABLE {quoted} REPLICA IDENTITY FULL, or choose another key")))
}

/// Where another publication of the same table could give the same change another id: a consumer of
/// both could not recognise it. With what to do.
pub fn ids_differ(facts: &TableFacts, publication: &Publication) -> Vec<(String, &'static str)> {
    let table = &facts.table;
    let mut found = Vec::new();
    let Some(published) = publication.table(table) else { return found };
    let identity = match &facts.identity {
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => Some(columns),
        CatalogIdentity::Full | CatalogIdentity::Nothing => None,
    };
    if let Some(columns) = &published.columns {
        let lacks = match identity {
            Some(identity) => identity.iter().any(|column| !columns.contains(column)),
            // The id is made of all columns.
            None => true,
        };
        if lacks {
            let text = format!(
                "{table}: the column list leaves out columns that ids derive from; a relay with \
                 a different publication gives the same changes different ids"
            );
            found.push((
                text,
                "add the replica identity's columns to the list, or give the table a primary key",
            ));
        }
    }
    if identity.is_none() && publication.generated && !facts.generated.is_empty() {
        let text = format!(
            "{table}: ids are made of all columns, the generated ones included; a relay with a \
             publication that leaves those out gives the same changes different ids"
        );
        found.push((text, "give the table a primary key or another index as replica identity"));
    }
    let rewritten = publication.operations.update && published.row_filter.is_some();
    if rewritten {
        let which = if facts.identity == CatalogIdentity::Full {
            "an UPDATE that moves a row into or out of the row filter"
        } else {
            "an UPDATE that changes the key and moves the row into or out of the row filter"
        };
        let text = format!(
            "{table}: {which} arrives as an INSERT or DELETE, and a relay with another filter \
             gives it a different id"
        );
        found.push((text, "capture the table with only one relay, or remove the row filter"));
    }
    let differs = facts.leaves.iter().find(|(_, leaf)| !same_columns(leaf, &facts.identity));
    if let Some((leaf, _)) = differs {
        let text = format!(
            "{table}: partition {leaf} and its root differ in replica identity; a relay that \
             reads partitions under their own names gives the same changes different ids"
        );
        found.push((text, "give the partition the replica identity of its root"));
    }
    found
}

fn same_columns(a: &CatalogIdentity, b: &CatalogIdentity) -> bool {
    let columns = |identity: &CatalogIdentity| match identity {
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => {
            let mut columns = columns.clone();
            columns.sort();
            Some(columns)
        }
        CatalogIdentity::Full | CatalogIdentity::Nothing => None,
    };
    columns(a) == columns(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::publication::Nature;

    fn names(columns: &[&str]) -> Vec<String> {
        columns.iter().map(|column| (*column).to_owned()).collect()
    }

    fn key(columns: &[&str]) -> CatalogIdentity {
        CatalogIdentity::Key(names(columns))
    }

    fn index(columns: &[&str]) -> CatalogIdentity {
        CatalogIdentity::Index(names(columns))
    }

    fn table(identity: CatalogIdentity, primary_key: &[&str]) -> TableFacts {
        TableFacts {
            table: TableName::new("public", "t"),
            oid: 1,
            partitioned: false,
            identity,
            leaves: Vec::new(),
            primary_key: names(primary_key),
            columns: names(&["id", "email", "note"]),
            generated: Vec::new(),
            leading: Vec::new(),
            may_select: true,
            nature: Nature::default(),
        }
    }

    fn root(identity: CatalogIdentity, leaf: CatalogIdentity) -> TableFacts {
        let leaves = vec![(TableName::new("public", "t_1"), leaf)];
        TableFacts { leaves, partitioned: true, ..table(identity, &["id"]) }
    }

    fn publication(columns: Option<&[&str]>, row_filter: Option<&str>) -> Publication {
        Publication {
            oid: 2,
            altered_by: None,
            name: "w".into(),
            via_root: true,
            all_tables: false,
            operations: Operations::ALL,
            generated: false,
            tables: vec![PublishedTable {
                oid: 1,
                entry: Some(3),
                table: TableName::new("public", "t"),
                row_filter: row_filter.map(str::to_owned),
                columns: columns.map(names),
            }],
        }
    }

    #[test]
    fn a_table_is_refused_when_a_change_would_not_say_which_row_it_is_about() {
        let refused = |facts: &TableFacts| keys_its_changes(facts, None).err();
        let fine = [
            table(key(&["id"]), &["id"]),
            table(CatalogIdentity::Full, &["id"]),
            table(CatalogIdentity::Full, &[]),
            table(index(&["email"]), &[]),
            table(index(&["email", "id"]), &["id"]),
            root(key(&["id"]), key(&["id"])),
            root(key(&["id"]), CatalogIdentity::Full),
            root(CatalogIdentity::Full, CatalogIdentity::Full),
            root(index(&["id"]), key(&["id"])),
        ];
        for facts in fine {
            assert_eq!(refused(&facts).map(|e| e.to_string()), None, "{facts:?}");
        }
        let broken = [
            (table(index(&["email"]), &["id"]), "public\".\"t\" REPLICA IDENTITY DEFAULT"),
            (root(key(&["id"]), index(&["email"])), "public\".\"t_1\" REPLICA IDENTITY DEFAULT"),
            (root(key(&["id"]), CatalogIdentity::Nothing), "t_1\" REPLICA IDENTITY DEFAULT"),
            (root(CatalogIdentity::Full, key(&["id"])), "t_1\" REPLICA IDENTITY FULL"),
            (root(index(&["id", "email"]), key(&["id"])), "t_1\" REPLICA IDENTITY FULL"),
        ];
        for (facts, hint) in broken {
            let error = refused(&facts).unwrap_or_else(|| panic!("{facts:?}"));
            let text = error.text_with_hint();
            assert!(text.contains(hint), "{text}");
        }
        let operations = Operations { update: false, delete: false, ..Operations::ALL };
        let inserts = Publication { operations, ..publication(None, None) };
        assert!(keys_its_changes(&table(index(&["email"]), &["id"]), Some(&inserts)).is_ok());
    }

    #[test]
    fn a_column_list_without_the_key_is_refused() {
        let facts = table(key(&["id"]), &["id"]);
        let checked =
            |columns: &[&str]| keys_its_changes(&facts, Some(&publication(Some(columns), None)));
        assert!(checked(&["id", "note"]).is_ok());
        let error = checked(&["note"]).unwrap_err();
        assert!(error.to_string().contains("without key column \"id\""), "{error}");
    }

    #[test]
    fn a_generated_column_in_the_key_is_refused_unless_it_is_published() {
        let generated = names(&["hash"]);
        let with_key = TableFacts { generated, ..table(key(&["id", "hash"]), &["id", "hash"]) };
        let by_index = TableFacts { identity: index(&["hash"]), primary_key: vec![], ..with_key };
        let beside = TableFacts { primary_key: names(&["id"]), ..by_index.clone() };
        let beside = TableFacts { identity: index(&["hash", "id"]), ..beside };
        let with_key = TableFacts { primary_key: names(&["id", "hash"]), ..beside.clone() };
        let stored = Publication { generated: true, ..publication(None, None) };
        for facts in [&with_key, &by_index] {
            let error = keys_its_changes(facts, None).unwrap_err();
            assert!(error.to_string().starts_with("column \"hash\" of the key"), "{error}");
            assert!(keys_its_changes(facts, Some(&stored)).is_ok());
            let listed = publication(Some(&["id", "hash"]), None);
            assert!(keys_its_changes(facts, Some(&listed)).is_ok());
        }
        assert!(keys_its_changes(&beside, None).is_ok(), "the key itself is sent");
    }

    #[test]
    fn publications_that_could_not_agree_on_an_id_are_named() {
        let found =
            |facts: &TableFacts, publication: &Publication| ids_differ(facts, publication).len();
        let keyed = table(key(&["id"]), &["id"]);
        let full = table(CatalogIdentity::Full, &["id"]);
        assert_eq!(found(&keyed, &publication(None, None)), 0);
        assert_eq!(found(&keyed, &publication(Some(&["id"]), None)), 0);
        assert_eq!(found(&full, &publication(Some(&["id"]), None)), 1);
        assert_eq!(found(&keyed, &publication(None, Some("(n > 1)"))), 1);
        assert_eq!(found(&root(key(&["id"]), CatalogIdentity::Full), &publication(None, None)), 1);
        assert_eq!(found(&root(key(&["id"]), key(&["id"])), &publication(None, None)), 0);
        let stored = Publication { generated: true, ..publication(None, None) };
        assert_eq!(found(&full, &stored), 0);
        assert_eq!(found(&TableFacts { generated: names(&["note"]), ..full }, &stored), 1);
    }

    #[test]
    fn a_route_whose_key_a_change_may_not_show_is_named() {
        let told = |identity, route_key: &[&str]| {
            let hidden = hides_route_key(&table(identity, &["id"]), "r", &names(route_key));
            hidden.map(|(text, _)| text).unwrap_or_default()
        };
        assert_eq!(told(key(&["id"]), &["id"]), "");
        assert_eq!(told(CatalogIdentity::Full, &["email"]), "");
        assert!(told(key(&["id"]), &["email"]).contains("not in the replica identity"));
        assert!(told(CatalogIdentity::Full, &["mail"]).contains("but public.t has no such column"));
    }
}
