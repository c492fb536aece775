//! Whether an outbox table of the application's has what polling needs: an order, the transaction
//! of each row, indexes on both, and rows that the relay may see. Pure.
//!
//! Invariant: what is lacking is told with the statement that adds it, in the table's own names.

use postgres_protocol::escape::escape_identifier;

use super::outbox::{MappedFacts, MappingFault, is_int};
use super::polling::missing_indexes;
use crate::error::{Error, Result};
use crate::pg::outbox::{IndexColumns, MappedColumn};
use crate::source::outbox::{OutboxTable, Polled};

/// `xid8`.
const XID8: u32 = 5069;
/// What fills the column with the transaction.
const OWN_XID: &str = "pg_current_xact_id()";
/// From here on a partitioned table may have an identity column.
const PARTITIONED_IDENTITY: i32 = 170_000;

/// What the catalog says of it beside its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolledTable {
    /// Its indexes.
    pub indexes: Vec<IndexColumns>,
    /// Whether the role of `source.url` may use its schema.
    pub may_use_schema: bool,
    /// Whether that role may read its rows.
    pub may_select: bool,
    /// Whether row-level security can hide rows from that role.
    pub hidden: bool,
}

/// A column that polling goes by: what it is called, or shall be, and what is wrong with it.
struct Needed {
    name: String,
    fault: Option<MappingFault>,
}

/// Everything that is in the way.
pub fn faults(outbox: &OutboxTable, found: MappedFacts<'_>) -> Vec<MappingFault> {
    let (order_by, xid) = (order_by(outbox, found), xid(outbox, found));
    let table = outbox.table.clone();
    let polled = Polled { table, order_by: order_by.name, xid: xid.name };
    let mut faults: Vec<MappingFault> = [order_by.fault, xid.fault].into_iter().flatten().collect();
    let Some(facts) = found.polled else { return faults };
    for index in missing_indexes(&polled, &facts.indexes, found.facts.partitioned) {
        let text = format!(
            "{} lacks an index on ({}), without which each poll reads all of it",
            outbox.table, index.columns
        );
        let waits = " (writers wait meanwhile; docs/sources.md shows how to avoid that)";
        let note = if found.facts.partitioned { waits } else { "" };
        faults.push((text, format!("{}{note}", index.statement)));
    }
    faults.extend(unseen(outbox, found, facts));
    faults
}

/// Refuses a table without an order or without the transaction of each row.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with the statements that add them.
pub fn verify_columns(outbox: &OutboxTable, found: MappedFacts<'_>) -> Result<()> {
    let needed = [order_by(outbox, found), xid(outbox, found)];
    let (what, hints): (Vec<_>, Vec<_>) = needed.into_iter().filter_map(|n| n.fault).unzip();
    if what.is_empty() {
        return Ok(());
    }
    Err(Error::refused(what.join("; ")).hint(hints.join("; ")))
}

fn order_by(outbox: &OutboxTable, found: MappedFacts<'_>) -> Needed {
    let table = outbox.table.quoted();
    let identity =
        !found.facts.partitioned || found.facts.nature.server_version >= PARTITIONED_IDENTITY;
    // The other form needs a right on its sequence.
    let (definition, right) = match identity {
        true => ("bigint GENERATED ALWAYS AS IDENTITY", ""),
        false => ("bigserial", "; and GRANT USAGE ON its sequence TO the role of each application"),
    };
    let add = |name: &str| {
        format!(
            "ALTER TABLE {table} ADD COLUMN {} {definition} (it rewrites the table while readers \
             and writers wait, and numbers existing rows){right}",
            escape_identifier(name)
        )
    };
    let fits = |column: &MappedColumn| is_int(column) && column.numbered;
    let fix = |column: &MappedColumn| {
        let name = escape_identifier(&column.name);
        fits(column).then(|| format!("ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL"))
    };
    let why = "a NOT NULL integer that an ascending sequence with CACHE 1 fills: rows are read in \
               its order, and an event's position counts from the first row of its batch";
    let wanted = Wanted { key: "order_by", default: "seq", why, fits: &fits, add: &add, fix: &fix };
    wanted.column(outbox, &outbox.order_by, found)
}

fn xid(outbox: &OutboxTable, found: MappedFacts<'_>) -> Needed {
    let table = outbox.table.quoted();
    let add = |name: &str| {
        format!(
            "ALTER TABLE {table} ADD COLUMN {} xid8 NOT NULL DEFAULT {OWN_XID} (it does not \
             rewrite the table; existing rows get the transaction of this statement, and \
             `init --skip-existing` leaves them unsent)",
            escape_identifier(name)
        )
    };
    let fits = |column: &MappedColumn| {
        column.base_oid == XID8 && column.default.as_deref() == Some(OWN_XID)
    };
    // What has no transaction is taken for what was passed long ago.
    let fix = |column: &MappedColumn| {
        let name = escape_identifier(&column.name);
        (column.base_oid == XID8).then(|| {
            format!(
                "ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {OWN_XID}; UPDATE {table} \
                 SET {name} = '3' WHERE {name} IS NULL; ALTER TABLE {table} ALTER COLUMN {name} \
                 SET NOT NULL (rows without a value then count as sent; to send them, set \
                 {OWN_XID} instead of '3')"
            )
        })
    };
    let why = "an xid8, NOT NULL, with the default pg_current_xact_id(): it tells a row that \
               commits late from those that were read";
    let wanted = Wanted { key: "xid", default: "xid", why, fits: &fits, add: &add, fix: &fix };
    wanted.column(outbox, &outbox.xid, found)
}

/// A column that polling goes by.
struct Wanted<'a> {
    /// Its key.
    key: &'a str,
    /// What it is called where the table has none.
    default: &'a str,
    /// What it has to be, and why.
    why: &'a str,
    /// Whether a column is that, apart from nulls.
    fits: &'a dyn Fn(&MappedColumn) -> bool,
    /// The statement that adds one of a name.
    add: &'a dyn Fn(&str) -> String,
    /// The statement that makes a column fit, where one can.
    fix: &'a dyn Fn(&MappedColumn) -> Option<String>,
}

impl Wanted<'_> {
    /// The column that is `given`, or one that the table has already, or one that shall be added.
    fn column(
        &self,
        outbox: &OutboxTable,
        given: &Option<String>,
        found: MappedFacts<'_>,
    ) -> Needed {
        let Self { key, default, why, .. } = self;
        let table = &outbox.table;
        let named = |name: &str| found.columns.iter().find(|column| column.name == name);
        let fits = |column: &&MappedColumn| (self.fits)(column) && column.not_null;
        let set = |name: &str| format!("set outbox.{key} = {name:?}");
        let added = |text: String| {
            let prefix = if named(default).is_some() { "watership_" } else { "" };
            let name = format!("{prefix}{default}");
            let hint = format!("{}; and {}", (self.add)(&name), set(&name));
            Needed { name, fault: Some((text, hint)) }
        };
        let Some(given) = given else {
            let text =
                format!("source.mode = \"poll\" needs outbox.{key}, a column of {table}: {why}");
            return match found.columns.iter().find(fits).map(|column| column.name.clone()) {
                Some(name) => Needed { fault: Some((text, set(&name))), name },
                None => added(text),
            };
        };
        let name = given.clone();
        let Some(column) = named(given) else {
            let text = format!("{table} has no column {given:?} (outbox.{key})");
            return Needed { fault: Some((text, (self.add)(given))), name };
        };
        if fits(&column) {
            return Needed { name, fault: None };
        }
        let null = if column.not_null { "" } else { ", may be null" };
        let filled = match &column.default {
            Some(default) => format!("with the default {default}"),
            None => "without a default".into(),
        };
        let text = format!(
            "column {given:?} of {table} (outbox.{key}) is of type {}{null}, {filled}; expected \
             {why}",
            column.type_name
        );
        match (self.fix)(column) {
            Some(hint) => Needed { name, fault: Some((text, hint)) },
            None => added(text),
        }
    }
}

/// Rows that the relay would not see.
fn unseen(outbox: &OutboxTable, found: MappedFacts<'_>, facts: &PolledTable) -> Vec<MappingFault> {
    let (table, role) = (&outbox.table, found.role);
    let (quoted, grantee) = (table.quoted(), escape_identifier(role));
    let mut faults = Vec::new();
    if !facts.may_use_schema || !facts.may_select {
        let schema = match facts.may_use_schema {
            true => String::new(),
            false => {
                format!("GRANT USAGE ON SCHEMA {} TO {grantee}; ", escape_identifier(&table.schema))
            }
        };
        faults.push((
            format!("role {role:?} may not read {table}"),
            format!("{schema}GRANT SELECT ON {quoted} TO {grantee}"),
        ));
    }
    if facts.hidden {
        faults.push((
            format!(
                "row-level security of {table} applies to role {role:?} and can hide rows from it"
            ),
            format!(
                "ALTER TABLE {quoted} DISABLE ROW LEVEL SECURITY, or, as a superuser: ALTER ROLE \
                 {grantee} BYPASSRLS"
            ),
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::publication::{CatalogIdentity, Nature, TableFacts, TableName};

    fn refusals(partitioned: bool, server_version: i32, polled: &PolledTable) -> String {
        let outbox =
            OutboxTable { table: TableName::new("Shop", "events"), ..OutboxTable::default() };
        let facts = TableFacts {
            table: outbox.table.clone(),
            oid: 7,
            partitioned,
            identity: CatalogIdentity::Key(Vec::new()),
            leaves: Vec::new(),
            primary_key: Vec::new(),
            columns: Vec::new(),
            generated: Vec::new(),
            leading: Vec::new(),
            may_select: true,
            nature: Nature { server_version, ..Nature::default() },
        };
        let (polled, columns) = (Some(polled), &[][..]);
        let found = MappedFacts { facts: &facts, columns, may_delete: None, polled, role: "r" };
        let told = faults(&outbox, found).into_iter();
        told.map(|(what, hint)| format!("{what}; {hint}")).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn what_a_table_lacks_is_told_with_a_statement_that_its_server_takes() {
        let bare = PolledTable {
            indexes: Vec::new(),
            may_use_schema: false,
            may_select: true,
            hidden: false,
        };
        let plain = refusals(false, 150_000, &bare);
        let alter = "ALTER TABLE \"Shop\".\"events\" ADD COLUMN \"seq\" ";
        let identity = format!("{alter}bigint GENERATED ALWAYS AS IDENTITY");
        assert!(plain.contains(&identity), "{plain}");
        assert!(
            plain.contains("CONCURRENTLY ON \"Shop\".\"events\" (\"xid\", \"seq\")"),
            "{plain}"
        );
        assert!(plain.contains("GRANT USAGE ON SCHEMA \"Shop\" TO \"r\"; GRANT SELECT"), "{plain}");
        let old = refusals(true, 160_000, &bare);
        assert!(old.contains(&format!("{alter}bigserial")) && !old.contains("IDENTITY"), "{old}");
        assert!(old.contains("GRANT USAGE ON its sequence"), "{old}");
        assert!(old.contains("CREATE INDEX ON \"Shop\"") && !old.contains("CONCURR"), "{old}");
        assert!(refusals(true, 170_000, &bare).contains(&identity));
    }
}
