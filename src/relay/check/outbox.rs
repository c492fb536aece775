//! Whether an outbox table of the application's can be read as it is mapped. Pure.
//!
//! Invariant: `init`, `check`, every start and the running relay ask the same here, and say the
//! same; what passes gives every row of the table an id, a key and a type.

use std::collections::HashMap;

use super::polled_table::{self, PolledTable};
use crate::column::oid;
use crate::error::{Error, Result};
use crate::pg::outbox::{MappedColumn, TimeColumn};
use crate::pg::publication::{Publication, TableFacts};
use crate::source::SourceKind;
use crate::source::outbox::{AggregateType, OutboxCatalog, OutboxTable};

/// What is wrong, and what to do.
pub type MappingFault = (String, String);

/// What the catalog says of the table, and of what is asked of it.
#[derive(Debug, Clone, Copy)]
pub struct MappedFacts<'a> {
    /// The table.
    pub facts: &'a TableFacts,
    /// Its columns.
    pub columns: &'a [MappedColumn],
    /// Whether the role of `source.url` may delete its rows; absent where that is not asked.
    pub may_delete: Option<bool>,
    /// What only a source that polls asks.
    pub polled: Option<&'a PolledTable>,
    /// The role of `source.url`.
    pub role: &'a str,
}

/// Everything that is in the way. Without a publication it is the one of `init`.
pub fn faults(
    outbox: &OutboxTable,
    found: MappedFacts<'_>,
    publication: Option<&Publication>,
    kind: SourceKind,
) -> Vec<MappingFault> {
    let mut faults = Vec::new();
    let nature = &found.facts.nature;
    let table = &outbox.table;
    if let Some(what) = nature.other_than_table {
        let hint = "name the table that applications insert their events into";
        return vec![(format!("outbox.table {table} is {what}"), hint.into())];
    }
    if let Some(what) = nature.not_logged {
        let why = match kind {
            SourceKind::Wal => "its rows are not in the WAL",
            SourceKind::Poll => "a crash of the server empties it",
        };
        let text = format!("outbox.table {table} is {what}: {why}");
        return vec![(text, format!("ALTER TABLE {} SET LOGGED", table.quoted()))];
    }
    if nature.hypertable && kind == SourceKind::Wal {
        let text = format!(
            "outbox.table {table} is a hypertable of TimescaleDB: its rows are in chunks and are \
             never captured"
        );
        return vec![(text, "use an ordinary or a partitioned table".into())];
    }
    for (name, what, fits) in wanted(outbox) {
        if let Some(fault) = column_fault(outbox, found.columns, name, what, fits) {
            faults.push(fault);
        }
    }
    faults.extend(no_body(outbox, found.columns));
    match kind {
        SourceKind::Wal => faults.extend(unsent(outbox, found.columns, publication)),
        SourceKind::Poll => faults.extend(polled_table::faults(outbox, found)),
    }
    if found.may_delete == Some(false) {
        let (role, quoted) = (found.role, table.quoted());
        let grantee = postgres_protocol::escape::escape_identifier(role);
        faults.push((
            format!("outbox.delete_after is set, and role {role:?} may not delete rows of {table}"),
            format!("GRANT SELECT, DELETE ON {quoted} TO {grantee}, or remove outbox.delete_after"),
        ));
    }
    faults
}

/// Refuses a table that cannot be read as it is mapped.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with everything that is in the way.
pub fn fits(
    outbox: &OutboxTable,
    found: MappedFacts<'_>,
    publication: Option<&Publication>,
    kind: SourceKind,
) -> Result<OutboxCatalog> {
    let faults = faults(outbox, found, publication, kind);
    if !faults.is_empty() {
        let (what, mut hints): (Vec<_>, Vec<_>) = faults.into_iter().unzip();
        hints.dedup();
        return Err(Error::refused(what.join("; ")).hint(hints.join("; ")));
    }
    let domains = found.columns.iter().filter(|column| column.type_oid != column.base_oid);
    let domains: HashMap<u32, u32> = domains.map(|c| (c.type_oid, c.base_oid)).collect();
    Ok(OutboxCatalog { oid: Some(found.facts.oid), domains })
}

/// A table that is not there.
pub fn missing(outbox: &OutboxTable) -> Error {
    Error::refused(format!("outbox.table {} does not exist", outbox.table))
        .hint("create it, rename it back, or correct outbox.table")
}

/// The column with the time of an event, if the table has it, and how it tells it.
pub fn time_column<'a>(
    outbox: &'a OutboxTable,
    columns: &[MappedColumn],
) -> Option<(&'a str, TimeColumn)> {
    let name = outbox.columns.created_at.as_deref()?;
    let column = columns.iter().find(|column| column.name == name)?;
    let form = match column.base_oid {
        oid::TIMESTAMP => TimeColumn::WithoutZone,
        oid::INT8 => TimeColumn::Millis,
        _ => TimeColumn::WithZone,
    };
    Some((name, form))
}

/// What is slow about it, with what to do.
pub fn slow(outbox: &OutboxTable, columns: &[MappedColumn], deletes: bool) -> Option<MappingFault> {
    let name = outbox.columns.created_at.as_ref().filter(|_| deletes)?;
    let column = columns.iter().find(|column| column.name == *name)?;
    let table = &outbox.table;
    (!column.indexed).then(|| {
        (
            format!(
                "outbox.delete_after: no index of {table} begins with {name:?}, so each portion \
                 reads the whole table"
            ),
            format!(
                "CREATE INDEX CONCURRENTLY ON {} ({})",
                table.quoted(),
                postgres_protocol::escape::escape_identifier(name)
            ),
        )
    })
}

type Fits = fn(&MappedColumn) -> bool;

/// Which column is what, and which types fit.
const ID: (&str, Fits) = ("uuid, text or an integer", |c| is_uuid(c) || is_text(c) || is_int(c));
const NAME: (&str, Fits) =
    ("text, an enum or an integer", |c| is_text(c) || is_enum(c) || is_int(c));
const KEY: (&str, Fits) = ("text, an enum, a number or a uuid", |c| {
    is_text(c) || is_enum(c) || is_int(c) || is_uuid(c) || c.base_oid == oid::NUMERIC
});
const BODY: (&str, Fits) =
    ("json, jsonb, text or bytea", |c| is_json(c) || is_text(c) || c.base_oid == oid::BYTEA);
const BYTES: (&str, Fits) = ("bytea", |c| c.base_oid == oid::BYTEA);
const TEXT: (&str, Fits) = ("text", is_text);
const OBJECT: (&str, Fits) = ("json or jsonb", is_json);
const TIME: (&str, Fits) = ("timestamptz, timestamp, or bigint (milliseconds since 1970)", |c| {
    [oid::TIMESTAMPTZ, oid::TIMESTAMP, oid::INT8].contains(&c.base_oid)
});
const ANY: (&str, Fits) = ("any type", |_| true);

fn is_text(column: &MappedColumn) -> bool {
    column.category == 'S'
}

fn is_enum(column: &MappedColumn) -> bool {
    column.category == 'E'
}

pub(super) fn is_int(column: &MappedColumn) -> bool {
    [oid::INT2, oid::INT4, oid::INT8].contains(&column.base_oid)
}

fn is_uuid(column: &MappedColumn) -> bool {
    column.base_oid == oid::UUID
}

fn is_json(column: &MappedColumn) -> bool {
    [oid::JSON, oid::JSONB].contains(&column.base_oid)
}

/// Columns that the mapping names: the name, what it is for, and what fits.
fn wanted(outbox: &OutboxTable) -> Vec<(&str, &str, (&'static str, Fits))> {
    let names = &outbox.columns;
    let mut wanted = vec![
        (names.id.as_str(), "columns.id", ID),
        (&names.aggregate_id, "columns.aggregate_id", KEY),
        (&names.event_type, "columns.event_type", NAME),
    ];
    match &names.aggregate_type {
        AggregateType::Column(name) => wanted.insert(1, (name, "columns.aggregate_type", NAME)),
        AggregateType::Constant(_) => {}
    }
    let optional = [
        (&names.payload, "columns.payload", BODY),
        (&names.data, "columns.data", BYTES),
        (&names.content_type, "columns.content_type", TEXT),
        (&names.headers, "columns.headers", OBJECT),
        (&names.traceparent, "columns.traceparent", TEXT),
        (&names.created_at, "columns.created_at", TIME),
    ];
    for (name, what, fits) in optional {
        wanted.extend(name.as_deref().map(|name| (name, what, fits)));
    }
    let headers = outbox.headers_from.iter();
    wanted.extend(headers.map(|(_, column)| (column.as_str(), "headers_from", ANY)));
    wanted.extend(outbox.shown.iter().map(|name| (name.as_str(), TEMPLATE, ANY)));
    wanted
}

/// The use of a column that a template of a route names.
const TEMPLATE: &str = "{column.NAME}";

/// Where the configuration names the column.
fn told(what: &str) -> String {
    match what {
        TEMPLATE => "{column.NAME} in a template of a route".into(),
        key => format!("outbox.{key}"),
    }
}

/// Whether it may be missing: a profile's optional column, which the configuration does not name.
fn may_be_missing(outbox: &OutboxTable, name: &str) -> bool {
    let others = outbox.headers_from.iter().map(|(_, column)| column).chain(&outbox.shown);
    let mut must = outbox.demanded.iter().chain(others);
    !must.any(|must| must == name) && !outbox.needed().contains(&name)
}

fn column_fault(
    outbox: &OutboxTable,
    columns: &[MappedColumn],
    name: &str,
    what: &str,
    (expected, fits): (&str, Fits),
) -> Option<MappingFault> {
    let table = &outbox.table;
    let Some(column) = columns.iter().find(|column| column.name == name) else {
        if may_be_missing(outbox, name) {
            return None;
        }
        let there: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
        let text = format!("{table} has no column {name:?} ({})", told(what));
        return Some((text, format!("its columns are: {}", there.join(", "))));
    };
    if fits(column) {
        return None;
    }
    let type_name = &column.type_name;
    let text = format!(
        "column {name:?} of {table} ({}) is of type {type_name}; expected {expected}",
        told(what)
    );
    Some((text, "map another column, or add one of such a type".into()))
}

/// A table with none of the columns that may have the body.
fn no_body(outbox: &OutboxTable, columns: &[MappedColumn]) -> Option<MappingFault> {
    let names: Vec<&String> =
        [&outbox.columns.payload, &outbox.columns.data].into_iter().flatten().collect();
    let there = |name: &&String| columns.iter().any(|column| column.name == **name);
    // One that is demanded was named already.
    if names.iter().any(|name| there(name) || outbox.demanded.contains(name)) {
        return None;
    }
    let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
    let text =
        format!("{} has no column {} for the body of an event", outbox.table, names.join(" or "));
    Some((text, "set outbox.columns.payload, or outbox.columns.data".into()))
}

/// Columns that the stream does not carry.
fn unsent(
    outbox: &OutboxTable,
    columns: &[MappedColumn],
    publication: Option<&Publication>,
) -> Vec<MappingFault> {
    let table = &outbox.table;
    let list = publication.and_then(|p| p.table(table)?.columns.as_ref());
    let mut faults = Vec::new();
    for (name, what, _) in wanted(outbox) {
        let Some(column) = columns.iter().find(|column| column.name == name) else { continue };
        if list.is_some_and(|list| !list.contains(&column.name)) {
            faults.push((
                format!("column {name:?} of {table} ({}) is not published", told(what)),
                "ALTER PUBLICATION ... SET TABLE, with it in the column list, or without a list"
                    .into(),
            ));
        } else if column.generated && list.is_none() && !publication.is_some_and(|p| p.generated) {
            faults.push((
                format!(
                    "column {name:?} of {table} ({}) is generated, and generated columns are \
                     not published",
                    told(what)
                ),
                "map the columns that it is made of".into(),
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::publication::{CatalogIdentity, Nature, TableName};

    fn column(name: &str, base_oid: u32, category: char) -> MappedColumn {
        MappedColumn {
            number: 1,
            name: name.into(),
            type_oid: base_oid,
            base_oid,
            category,
            type_name: format!("type {base_oid}"),
            generated: false,
            not_null: true,
            indexed: false,
            type_modifier: -1,
            default: None,
            numbered: false,
        }
    }

    fn columns() -> Vec<MappedColumn> {
        vec![
            column("id", oid::UUID, 'U'),
            column("aggregate_type", oid::VARCHAR, 'S'),
            column("aggregate_id", oid::INT8, 'N'),
            column("event_type", 20_000, 'E'),
            column("payload", oid::JSONB, 'U'),
            column("created_at", oid::TIMESTAMP, 'D'),
        ]
    }

    fn outbox() -> OutboxTable {
        OutboxTable { table: TableName::new("public", "events"), ..OutboxTable::default() }
    }

    fn table(nature: Nature) -> TableFacts {
        TableFacts {
            table: TableName::new("public", "events"),
            oid: 7,
            partitioned: false,
            identity: CatalogIdentity::Key(vec!["id".into()]),
            leaves: Vec::new(),
            primary_key: vec!["id".into()],
            columns: Vec::new(),
            generated: Vec::new(),
            leading: Vec::new(),
            may_select: true,
            nature,
        }
    }

    fn refusal(outbox: &OutboxTable, columns: &[MappedColumn], nature: Nature) -> Option<String> {
        let facts = &table(nature);
        let found = MappedFacts { facts, columns, may_delete: None, polled: None, role: "relay" };
        fits(outbox, found, None, SourceKind::Wal).err().map(|error| error.text_with_hint())
    }

    #[test]
    fn a_table_that_gives_each_row_an_id_a_key_and_a_type_fits() {
        assert_eq!(refusal(&outbox(), &columns(), Nature::default()), None);
        let mut domain = columns();
        domain[0].type_oid = 30_000;
        let facts = &table(Nature::default());
        let found = MappedFacts {
            facts,
            columns: &domain,
            may_delete: Some(true),
            polled: None,
            role: "relay",
        };
        let catalog = fits(&outbox(), found, None, SourceKind::Wal).unwrap();
        assert_eq!(catalog.oid, Some(7));
        assert_eq!(catalog.domains, HashMap::from([(30_000, oid::UUID)]));
    }

    #[test]
    fn each_thing_in_the_way_is_named_with_its_key() {
        let without = |name: &str| {
            let mut columns = columns();
            columns.retain(|column| column.name != name);
            columns
        };
        let with = |name: &str, base: u32, category: char| {
            let mut columns = without(name);
            columns.push(column(name, base, category));
            columns
        };
        let mut generated = columns();
        generated[4].generated = true;
        let mut demanding = outbox();
        demanding.columns.headers = Some("meta".into());
        demanding.demanded = vec!["meta".into()];
        let mut more = outbox();
        more.headers_from = vec![("version".into(), "event_version".into())];
        for (outbox, columns, text) in [
            (outbox(), without("id"), "no column \"id\" (outbox.columns.id)"),
            (outbox(), without("event_type"), "(outbox.columns.event_type); hint"),
            (outbox(), without("payload"), "has no column \"payload\" or \"data\" for the body"),
            (outbox(), with("id", oid::JSONB, 'U'), "expected uuid, text or an integer"),
            (outbox(), with("payload", oid::INT8, 'N'), "expected json, jsonb, text or bytea"),
            (outbox(), with("created_at", oid::DATE, 'D'), "expected timestamptz, timestamp, or"),
            (outbox(), generated, "is generated, and generated columns are not published"),
            (demanding, columns(), "no column \"meta\" (outbox.columns.headers)"),
            (more, columns(), "no column \"event_version\" (outbox.headers_from)"),
        ] {
            let told = refusal(&outbox, &columns, Nature::default());
            let text = text.trim_end_matches("; hint");
            assert!(told.as_ref().is_some_and(|told| told.contains(text)), "{text}: {told:?}");
        }
        for (nature, text) in [
            (Nature { other_than_table: Some("a view"), ..Nature::default() }, "is a view"),
            (Nature { not_logged: Some("unlogged"), ..Nature::default() }, "SET LOGGED"),
            (Nature { hypertable: true, ..Nature::default() }, "hypertable"),
        ] {
            let told = refusal(&outbox(), &columns(), nature).unwrap_or_default();
            assert!(told.contains(text), "{told}");
        }
    }

    #[test]
    fn deleting_without_an_index_or_the_right_to_is_told_with_the_statement() {
        let facts = &table(Nature::default());
        let columns = columns();
        let found = MappedFacts {
            facts,
            columns: &columns,
            may_delete: Some(false),
            polled: None,
            role: "r",
        };
        let told = fits(&outbox(), found, None, SourceKind::Wal).unwrap_err().text_with_hint();
        let grant = "GRANT SELECT, DELETE ON \"public\".\"events\" TO \"r\"";
        assert!(told.contains(grant), "{told}");
        let (_, hint) = slow(&outbox(), &columns, true).expect("it is slow");
        assert_eq!(hint, "CREATE INDEX CONCURRENTLY ON \"public\".\"events\" (\"created_at\")");
        assert_eq!(slow(&outbox(), &columns, false), None);
    }
}
