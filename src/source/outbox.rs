//! Where the outbox is, and which of its columns means what. Pure.
//!
//! Invariant: after an [`OutboxTable`] exists nobody guesses a column: each is named by the
//! configuration or a profile, and the start of a session compares all of them with the catalog.

use std::collections::HashMap;

use postgres_protocol::escape::escape_identifier;
use uuid::Uuid;

use crate::pg::publication::TableName;
use crate::pg::statement::fill;

/// The table that applications write their events into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxTable {
    /// The table.
    pub table: TableName,
    /// Its columns.
    pub columns: OutboxNames,
    /// Those of the columns that it need not have, and that the configuration names itself: they
    /// have to be there.
    pub demanded: Vec<String>,
    /// Headers whose values other columns have: name of the header, name of the column.
    pub headers_from: Vec<(String, String)>,
    /// Further columns that routes place in messages, where the table has them.
    pub placed: Vec<String>,
    /// Columns that templates of routes name: they have to be there.
    pub shown: Vec<String>,
    /// The indexed column that grows with each insert; only for a source that polls.
    pub order_by: Option<String>,
    /// The column with the transaction of the insert (`xid8`); only for a source that polls.
    pub xid: Option<String>,
    /// What the catalog says of it at the start of a session.
    pub catalog: OutboxCatalog,
}

/// Names of the outbox's columns. A column that is `None`, or that the table does not have, is
/// absent from its events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxNames {
    /// The event's id: a uuid, or something that one is derived from.
    pub id: String,
    /// Kind of the thing that the event is about.
    pub aggregate_type: AggregateType,
    /// Which thing.
    pub aggregate_id: String,
    /// What happened to it.
    pub event_type: String,
    /// The body: JSON as a rule, bytes where the column is a `bytea`.
    pub payload: Option<String>,
    /// The body as bytes.
    pub data: Option<String>,
    /// MIME type of the body.
    pub content_type: Option<String>,
    /// The application's headers: a JSON object.
    pub headers: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The time that belongs to the event; without it, that is the commit time.
    pub created_at: Option<String>,
}

/// Where the kind of thing comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AggregateType {
    /// From this column.
    Column(String),
    /// All events of the table have this one.
    Constant(String),
}

/// What the catalog says of a mapped table. Empty for the relay's own outbox, whose columns the
/// schema's migrations make.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OutboxCatalog {
    /// Its OID: under another name it is still this table.
    pub oid: Option<u32>,
    /// The base types of the domains among its columns, by the domain's OID.
    pub domains: HashMap<u32, u32>,
}

impl Default for OutboxTable {
    /// `watership.outbox`, as `sql/0001_schema.sql` makes it.
    fn default() -> Self {
        let name = |name: &str| Some(name.to_owned());
        Self {
            table: TableName::outbox(),
            columns: OutboxNames {
                id: "id".into(),
                aggregate_type: AggregateType::Column("aggregate_type".into()),
                aggregate_id: "aggregate_id".into(),
                event_type: "event_type".into(),
                payload: name("payload"),
                data: name("data"),
                content_type: name("content_type"),
                headers: name("headers"),
                traceparent: name("traceparent"),
                created_at: name("created_at"),
            },
            demanded: Vec::new(),
            headers_from: Vec::new(),
            placed: Vec::new(),
            shown: Vec::new(),
            order_by: None,
            xid: None,
            catalog: OutboxCatalog::default(),
        }
    }
}

/// An outbox as a source that polls sees it: what finds its rows, and their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Polled {
    /// The table.
    pub table: TableName,
    /// The column that grows with each insert.
    pub order_by: String,
    /// The column with the transaction of the insert (`xid8`).
    pub xid: String,
}

impl Polled {
    /// The relay's own outbox.
    pub fn own() -> Self {
        Self { table: TableName::outbox(), order_by: "seq".into(), xid: "xid".into() }
    }

    /// A statement with the names in it, for `:outbox`, `:order` and `:transaction`. Names of the
    /// relay's own outbox need no quotation marks.
    pub fn fill(&self, sql: &str) -> String {
        self.fill_with(sql, &[])
    }

    /// The same with further values.
    pub fn fill_with(&self, sql: &str, more: &[(&str, &str)]) -> String {
        let (table, [order_by, xid]) = match self.is_own() {
            true => (self.table.to_string(), [self.order_by.clone(), self.xid.clone()]),
            false => {
                (self.table.quoted(), [&self.order_by, &self.xid].map(|c| escape_identifier(c)))
            }
        };
        let mut values = vec![("outbox", &*table), ("order", &order_by), ("transaction", &xid)];
        values.extend(more);
        fill(sql, &values)
    }

    /// Whether it is `watership.outbox`.
    pub fn is_own(&self) -> bool {
        self.table == TableName::outbox()
    }
}

/// UUIDv5 namespace of the ids that are derived from rows of mapped tables. Changing it would
/// change every such id.
const MAPPED: Uuid = Uuid::from_u128(0x3b5a_8f0e_6d0c_4c1b_9c55_2f7e_a1d4_5e03);

impl OutboxTable {
    /// Whether it is a table of the application's, and not `watership.outbox`.
    pub fn is_mapped(&self) -> bool {
        self.table != TableName::outbox()
    }

    /// The columns that every event needs.
    pub fn needed(&self) -> Vec<&str> {
        let OutboxNames { id, aggregate_type, aggregate_id, event_type, .. } = &self.columns;
        let mut needed = vec![id.as_str(), aggregate_id, event_type];
        match aggregate_type {
            AggregateType::Column(column) => needed.insert(1, column),
            AggregateType::Constant(_) => {}
        }
        needed
    }

    /// The columns that it need not have.
    pub fn optional(&self) -> impl Iterator<Item = &str> {
        let OutboxNames { payload, data, content_type, headers, traceparent, created_at, .. } =
            &self.columns;
        let all = [payload, data, content_type, headers, traceparent, created_at];
        all.into_iter().filter_map(Option::as_deref)
    }

    /// The base type of a column's type.
    pub fn base_type(&self, type_oid: u32) -> u32 {
        self.catalog.domains.get(&type_oid).copied().unwrap_or(type_oid)
    }

    /// What a source that polls goes by; absent where the configuration does not name it.
    pub fn polled(&self) -> Option<Polled> {
        if !self.is_mapped() {
            return Some(Polled::own());
        }
        let (order_by, xid) = (self.order_by.clone()?, self.xid.clone()?);
        Some(Polled { table: self.table.clone(), order_by, xid })
    }

    /// The namespace of the ids that are derived from its rows.
    pub fn namespace(&self) -> Uuid {
        Uuid::new_v5(&MAPPED, self.table.to_string().as_bytes())
    }
}

/// The event's id of a row whose id column is not a uuid: the text itself, where that is a UUID in
/// canonical form (lower case, with hyphens), else UUIDv5 of the table and the text. Only the
/// canonical form counts, because two texts must not become one id.
pub fn derived_id(namespace: Uuid, text: &str) -> Uuid {
    let mut canonical = Uuid::encode_buffer();
    match Uuid::try_parse(text) {
        Ok(id) if *id.hyphenated().encode_lower(&mut canonical) == *text => id,
        Ok(_) | Err(_) => Uuid::new_v5(&namespace, text.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_a_mapped_table_is_the_same_in_every_version_and_never_that_of_another_row() {
        let table = |name: &str| OutboxTable {
            table: TableName::new("public", name),
            ..OutboxTable::default()
        };
        let ids = table("outbox").namespace();
        assert_eq!(derived_id(ids, "42").to_string(), "578ef2ac-123d-5986-aebe-f440c34fd1ad");
        assert_ne!(derived_id(ids, "42"), derived_id(ids, "042"));
        assert_ne!(derived_id(ids, "42"), derived_id(table("outbox2").namespace(), "42"));
        let text = "da8d6de6-3b77-45ff-8f44-57db55a7a06c";
        assert_eq!(derived_id(ids, text).to_string(), text);
        for other in [text.to_uppercase(), text.replace('-', ""), format!("{{{text}}}")] {
            assert_ne!(derived_id(ids, &other).to_string(), text, "{other}");
        }
    }
}
