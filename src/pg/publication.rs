//! The publication and the tables in it, seen through ordinary SQL; with what the catalog says of a
//! captured table (`TableFacts`: columns, primary key, replica identity, partitions).
//!
//! What a publication leaves out is lost silently, so everything that can leave something out is
//! read: tables, operations, row filters, column lists. Names come from configuration and are
//! always quoted here and in `outbox`; no other file builds such a statement.

use std::fmt;
use std::str::FromStr;

use postgres_protocol::escape::escape_identifier;
use serde::{Deserialize, Serialize};
use tokio_postgres::{GenericClient, Row};

use crate::error::{Error, Result};
use crate::pg::client::column;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;

/// A table by schema and name, each as it stands in the catalog (not quoted, not folded).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableName {
    /// The schema.
    pub schema: String,
    /// The table.
    pub name: String,
}

impl TableName {
    /// A name from its two parts.
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        Self { schema: schema.into(), name: name.into() }
    }

    /// The outbox.
    pub fn outbox() -> Self {
        Self::new("watership", "outbox")
    }

    /// The canary.
    pub fn canary() -> Self {
        Self::new("watership", "canary")
    }

    /// As SQL.
    pub fn quoted(&self) -> String {
        format!("{}.{}", escape_identifier(&self.schema), escape_identifier(&self.name))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl FromStr for TableName {
    type Err = Error;

    /// Splits `schema.table` at its first dot.
    fn from_str(text: &str) -> Result<Self> {
        match text.split_once('.') {
            Some((schema, name)) if !schema.is_empty() && !name.is_empty() => {
                Ok(Self::new(schema, name))
            }
            _ => Err(Error::config(format!("table {text:?} is not of the form schema.table"))),
        }
    }
}

/// A publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Changes when the publication is dropped and created again.
    pub oid: u32,
    /// The transaction that last altered its row in the catalog, other than its list of tables:
    /// changes also when something is altered and set back.
    #[serde(default)]
    pub altered_by: Option<String>,
    /// Its name.
    pub name: String,
    /// Whether changes of partitions come under the root's name.
    pub via_root: bool,
    /// Whether it was made FOR ALL TABLES.
    pub all_tables: bool,
    /// What it publishes.
    pub operations: Operations,
    /// Whether it publishes stored generated columns (Postgres 18 and later).
    #[serde(default)]
    pub generated: bool,
    /// Its tables, sorted by name; of a partitioned one the root where `via_root` is set.
    pub tables: Vec<PublishedTable>,
}

impl Publication {
    /// A table of it.
    pub fn table(&self, name: &TableName) -> Option<&PublishedTable> {
        self.tables.iter().find(|published| published.table == *name)
    }
}

/// The operations that a publication publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operations {
    /// INSERT.
    pub insert: bool,
    /// UPDATE.
    pub update: bool,
    /// DELETE.
    pub delete: bool,
    /// TRUNCATE.
    pub truncate: bool,
}

impl Operations {
    /// What `init` asks for.
    pub const ALL: Self = Self { insert: true, update: true, delete: true, truncate: true };
}

/// A table of a publication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedTable {
    /// Its oid: changes when the table is dropped and created again.
    pub oid: u32,
    /// The oid of its entry in the publication, or of its schema's: changes when it is taken out
    /// and put back. Absent where all tables are published.
    pub entry: Option<u32>,
    /// Its name.
    pub table: TableName,
    /// The WHERE clause, where there is one: other rows are silently left out.
    pub row_filter: Option<String>,
    /// The column list, where there is one: other columns are silently left out.
    pub columns: Option<Vec<String>>,
}

/// The publication of that name in this database.
///
/// # Errors
/// What the server says.
pub async fn read_publication(
    client: &impl GenericClient,
    name: &str,
) -> Result<Option<Publication>> {
    // Postgres before 18 has no pubgencols.
    let sql = "SELECT oid, pubviaroot, puballtables, pubinsert, pubupdate, pubdelete, pubtruncate, \
            coalesce(to_jsonb(p) ->> 'pubgencols', 'n') = 's', xmin::text \
        FROM pg_catalog.pg_publication AS p WHERE pubname = $1::text";
    let Some(row) = client.query_opt(sql, &[&name]).await.map_err(postgres_error)? else {
        return Ok(None);
    };
    Ok(Some(Publication {
        oid: column(&row, 0)?,
        altered_by: column(&row, 8)?,
        name: name.to_owned(),
        via_root: column(&row, 1)?,
        all_tables: column(&row, 2)?,
        operations: Operations {
            insert: column(&row, 3)?,
            update: column(&row, 4)?,
            delete: column(&row, 5)?,
            truncate: column(&row, 6)?,
        },
        generated: column(&row, 7)?,
        tables: read_tables(client, name).await?,
    }))
}

async fn read_tables(client: &impl GenericClient, name: &str) -> Result<Vec<PublishedTable>> {
    // pg_publication_tables always lists columns; only prattrs tells a column list from all.
    let sql = "SELECT c.oid, t.schemaname::text, t.tablename::text, t.rowfilter, \
            CASE WHEN r.prattrs IS NOT NULL THEN t.attnames::text[] END, \
            coalesce(r.oid, s.oid) \
        FROM pg_catalog.pg_publication_tables AS t \
        JOIN pg_catalog.pg_publication AS p ON p.pubname = t.pubname \
        JOIN pg_catalog.pg_namespace AS n ON n.nspname = t.schemaname \
        JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = t.tablename \
        LEFT JOIN pg_catalog.pg_publication_rel AS r ON r.prpubid = p.oid AND r.prrelid = c.oid \
        LEFT JOIN pg_catalog.pg_publication_namespace AS s \
            ON s.pnpubid = p.oid AND s.pnnspid = n.oid \
        WHERE t.pubname = $1::text ORDER BY t.schemaname, t.tablename";
    let rows = client.query(sql, &[&name]).await.map_err(postgres_error)?;
    let table = |row: &Row| {
        Ok(PublishedTable {
            oid: column(row, 0)?,
            table: TableName::new(column::<String>(row, 1)?, column::<String>(row, 2)?),
            row_filter: column(row, 3)?,
            columns: column(row, 4)?,
            entry: column(row, 5)?,
        })
    };
    rows.iter().map(table).collect()
}

/// The columns that the row filter of a published table looks at. None for a table with a column
/// list, whose columns cannot be told from them.
///
/// # Errors
/// What the server says.
pub async fn filter_columns(
    client: &impl GenericClient,
    published: &PublishedTable,
) -> Result<Vec<String>> {
    let PublishedTable { entry: Some(entry), row_filter: Some(_), columns: None, .. } = published
    else {
        return Ok(Vec::new());
    };
    let sql = "SELECT a.attname::text FROM pg_catalog.pg_depend AS d \
        JOIN pg_catalog.pg_attribute AS a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
        WHERE d.classid = 'pg_catalog.pg_publication_rel'::regclass AND d.objid = $1 \
            AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.refobjid = $2 \
        ORDER BY a.attnum";
    let rows = client.query(sql, &[entry, &published.oid]).await.map_err(postgres_error)?;
    rows.iter().map(|row| column(row, 0)).collect()
}

/// Creates the publication for `tables`, with every operation, under the roots' names. Tables that
/// inherit from them are left out: they may have no replica identity, and are captured by name.
///
/// The user needs CREATE on the database and must own the tables.
///
/// # Errors
/// What the server says: a table is missing, the name is taken, the right is lacking.
pub async fn create_publication(
    client: &impl GenericClient,
    name: &str,
    tables: &[TableName],
) -> Result<()> {
    let sql = create_statement(name, tables);
    let failed = |e| postgres_error(e).context(format!("creating the publication {name}"));
    client.batch_execute(&sql).await.map_err(failed)
}

/// The statement of [`create_publication`].
pub fn create_statement(name: &str, tables: &[TableName]) -> String {
    assert!(!tables.is_empty(), "a publication without tables publishes nothing");
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true, \
         publish = 'insert, update, delete, truncate')",
        escape_identifier(name),
        quoted_list(tables)
    )
}

/// The statement of [`add_tables`].
pub fn add_statement(name: &str, tables: &[TableName]) -> String {
    assert!(!tables.is_empty(), "there is something to add");
    format!("ALTER PUBLICATION {} ADD TABLE {}", escape_identifier(name), quoted_list(tables))
}

/// Drops the publication.
///
/// # Errors
/// What the server says: the right is lacking.
pub async fn drop_publication(client: &impl GenericClient, name: &str) -> Result<()> {
    let sql = format!("DROP PUBLICATION IF EXISTS {}", escape_identifier(name));
    let failed = |e| postgres_error(e).context(format!("dropping the publication {name}"));
    client.batch_execute(&sql).await.map_err(failed)
}

/// Adds `tables` to the publication.
///
/// # Errors
/// What the server says: a table is there already or missing, the right is lacking.
pub async fn add_tables(
    client: &impl GenericClient,
    name: &str,
    tables: &[TableName],
) -> Result<()> {
    let sql = add_statement(name, tables);
    let failed = |e| postgres_error(e).context(format!("adding to the publication {name}"));
    client.batch_execute(&sql).await.map_err(failed)
}

fn quoted_list(tables: &[TableName]) -> String {
    let only = |table: &TableName| format!("ONLY {}", table.quoted());
    tables.iter().map(only).collect::<Vec<_>>().join(", ")
}

/// What a table writes to the WAL to say which row an UPDATE or DELETE changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CatalogIdentity {
    /// DEFAULT with a primary key that is not deferrable: its columns, in key order.
    Key(Vec<String>),
    /// The columns of the unique index that USING INDEX names, in its order.
    Index(Vec<String>),
    /// All columns.
    Full,
    /// None: UPDATE and DELETE of a published table fail *in the application*.
    Nothing,
}

impl CatalogIdentity {
    /// The first of these columns that a DELETE, or an UPDATE that changes it, does not carry.
    pub fn lacks<'a>(&self, columns: &'a [String]) -> Option<&'a String> {
        let there: &[String] = match self {
            CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => columns,
            CatalogIdentity::Full => return None,
            CatalogIdentity::Nothing => &[],
        };
        columns.iter().find(|column| !there.contains(column))
    }
}

/// What `check` wants to know of a captured table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFacts {
    /// Its name.
    pub table: TableName,
    /// Its OID.
    pub oid: u32,
    /// Whether it is a partitioned root. Its partitions then have identities of their own.
    pub partitioned: bool,
    /// Its replica identity.
    pub identity: CatalogIdentity,
    /// The partitions that hold its rows, with the identities that theirs are logged with.
    pub leaves: Vec<(TableName, CatalogIdentity)>,
    /// The columns of its primary key, in key order; empty without one.
    pub primary_key: Vec<String>,
    /// Its columns, in order.
    pub columns: Vec<String>,
    /// Those of them that are generated.
    pub generated: Vec<String>,
    /// Its columns before the first that is generated or was dropped, in order. Without a column
    /// list these have had the same places in every description of the table, under any name.
    pub leading: Vec<String>,
    /// Whether the current role may read it.
    pub may_select: bool,
    /// What else decides about its publication.
    pub nature: Nature,
}

/// What a relation is, as far as a publication or its application could stumble over it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Nature {
    /// In words, where it is not a user's table: a view, a foreign table, a catalog. Its rows are
    /// never in the stream as its own.
    pub other_than_table: Option<&'static str>,
    /// In words, where its rows are not written to the WAL: unlogged or temporary.
    pub not_logged: Option<&'static str>,
    /// Tables that inherit from it, partitions left out; their rows are rows of it in queries only.
    pub children: Vec<String>,
    /// Whether TimescaleDB keeps its rows in chunks.
    pub hypertable: bool,
    /// Whether the current role may publish it: it owns it, or is a member of the owner.
    pub owned: bool,
    /// Whether it has a primary key that is deferrable, which is not a replica identity.
    pub deferrable_key: bool,
    /// Its generated columns that are not stored, which no publication sends (Postgres 18).
    pub virtual_columns: Vec<String>,
    /// Partitions whose rows are not in the WAL, with the reason in words.
    pub lost_leaves: Vec<(String, &'static str)>,
    /// As `server_version_num`.
    pub server_version: i32,
}

/// Columns of a relation `c` for [`identity`]: its `relreplident`, the columns of its primary key
/// and of the index that REPLICA IDENTITY USING INDEX names, and whether DEFAULT means the primary
/// key: a deferrable one does not count (relcache.c, `RelationGetIndexList`).
const IDENTITY: &str = "c.relreplident::text, k.key, k.chosen, k.immediate";
/// Where they come from.
const OF_INDEXES: &str = "CROSS JOIN LATERAL (SELECT \
        array_agg(a.attname::text ORDER BY p.place) FILTER (WHERE i.indisprimary) AS key, \
        array_agg(a.attname::text ORDER BY p.place) FILTER (WHERE i.indisreplident) AS chosen, \
        bool_and(i.indimmediate) FILTER (WHERE i.indisprimary) AS immediate \
    FROM pg_catalog.pg_index AS i \
    CROSS JOIN LATERAL unnest(i.indkey::int2[]) WITH ORDINALITY AS p (attnum, place) \
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = p.attnum \
    WHERE i.indrelid = c.oid AND p.place <= i.indnkeyatts) AS k";
/// The columns, the generated ones, and those before the first that is generated or was dropped.
const COLUMNS: &str = "CROSS JOIN LATERAL (SELECT \
        array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE NOT a.attisdropped) AS names, \
        array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attgenerated <> '') AS made, \
        array_agg(a.attname::text) FILTER (WHERE a.attgenerated = 'v') AS virtual, \
        array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE a.attnum < a.gap) AS leading \
    FROM (SELECT *, coalesce(min(attnum) FILTER (WHERE attisdropped OR attgenerated <> '') \
            OVER (), 32767) AS gap \
        FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum > 0) AS a) AS a";

/// What [`Nature`] says.
const NATURE: &str = "c.relkind::text, c.relpersistence::text, a.virtual, \
    pg_has_role(c.relowner, 'USAGE'), \
    ARRAY(SELECT kn.nspname || '.' || k.relname FROM pg_catalog.pg_inherits AS i \
        JOIN pg_catalog.pg_class AS k ON k.oid = i.inhrelid AND NOT k.relispartition \
        JOIN pg_catalog.pg_namespace AS kn ON kn.oid = k.relnamespace \
        WHERE i.inhparent = c.oid ORDER BY 1), \
    EXISTS (SELECT FROM pg_catalog.pg_trigger AS t \
        WHERE t.tgrelid = c.oid AND t.tgname = 'ts_insert_blocker') \
    OR EXISTS (SELECT FROM pg_catalog.pg_inherits AS i \
        JOIN pg_catalog.pg_class AS k ON k.oid = i.inhrelid \
        JOIN pg_catalog.pg_namespace AS kn ON kn.oid = k.relnamespace \
        WHERE i.inhparent = c.oid AND kn.nspname = '_timescaledb_internal'), \
    current_setting('server_version_num')::int";

/// The facts about a relation; absent when there is none of that name. Whether it can be captured
/// is decided in `relay/check`.
///
/// # Errors
/// What the server says.
pub async fn read_table(
    client: &impl GenericClient,
    table: &TableName,
) -> Result<Option<TableFacts>> {
    // A table that is dropped at this instant has no privileges: null.
    let sql = format!(
        "SELECT {IDENTITY}, c.oid, c.relkind = 'p', \
            coalesce(has_table_privilege(c.oid, 'SELECT'), false), a.names, a.made, a.leading, \
            {NATURE} \
        FROM pg_catalog.pg_class AS c \
        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace {OF_INDEXES} {COLUMNS} \
        WHERE n.nspname = $1::text AND c.relname = $2::text \
            AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
    );
    let row = unnamed::query_opt(client, &sql, &[&table.schema, &table.name]).await;
    let Some(row) = row.map_err(postgres_error)? else { return Ok(None) };
    let (identity, primary_key) = identity(&row, table)?;
    let oid = row.try_get(4).map_err(postgres_error)?;
    let partitioned = row.try_get(5).map_err(postgres_error)?;
    let names = |i| row.try_get::<_, Option<Vec<String>>>(i).map_err(postgres_error);
    let (leaves, lost_leaves) = match partitioned {
        true => read_leaves(client, oid).await?,
        false => (Vec::new(), Vec::new()),
    };
    Ok(Some(TableFacts {
        table: table.clone(),
        oid,
        partitioned,
        identity,
        leaves,
        primary_key,
        columns: names(7)?.unwrap_or_default(),
        generated: names(8)?.unwrap_or_default(),
        leading: names(9)?.unwrap_or_default(),
        may_select: row.try_get(6).map_err(postgres_error)?,
        nature: nature(&row, oid, lost_leaves)?,
    }))
}

/// Smaller OIDs were assigned by initdb (access/transam.h, `FirstNormalObjectId`).
const FIRST_NORMAL_OID: u32 = 16384;
/// A value of [`Nature::other_than_table`].
pub(crate) const CATALOG: &str = "a system catalog";

/// What the columns of [`NATURE`] say, which follow those of the facts.
fn nature(
    row: &tokio_postgres::Row,
    oid: u32,
    lost_leaves: Vec<(String, &'static str)>,
) -> Result<Nature> {
    let failed = postgres_error;
    let immediate = row.try_get::<_, Option<bool>>(3).map_err(failed)?;
    Ok(Nature {
        other_than_table: match row.try_get(10).map_err(failed)? {
            _ if oid < FIRST_NORMAL_OID => Some(CATALOG),
            "r" | "p" => None,
            "v" => Some("a view"),
            "m" => Some("a materialized view"),
            "f" => Some("a foreign table"),
            _ => Some("a sequence"),
        },
        not_logged: not_logged(row.try_get(11).map_err(failed)?),
        virtual_columns: row.try_get::<_, Option<_>>(12).map_err(failed)?.unwrap_or_default(),
        owned: row.try_get(13).map_err(failed)?,
        children: row.try_get(14).map_err(failed)?,
        hypertable: row.try_get(15).map_err(failed)?,
        server_version: row.try_get(16).map_err(failed)?,
        deferrable_key: immediate == Some(false),
        lost_leaves,
    })
}

/// Of `relpersistence`.
fn not_logged(persistence: &str) -> Option<&'static str> {
    match persistence {
        "u" => Some("unlogged"),
        "t" => Some("temporary"),
        _ => None,
    }
}

/// The partitions that hold rows: those that are logged, and those whose changes never come.
type Leaves = (Vec<(TableName, CatalogIdentity)>, Vec<(String, &'static str)>);

async fn read_leaves(client: &impl GenericClient, root: u32) -> Result<Leaves> {
    let sql = format!(
        "SELECT {IDENTITY}, n.nspname::text, c.relname::text, c.relkind::text, \
            c.relpersistence::text \
        FROM pg_catalog.pg_partition_tree($1::oid) AS t \
        JOIN pg_catalog.pg_class AS c ON c.oid = t.relid \
        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace {OF_INDEXES} \
        WHERE t.isleaf AND c.relkind IN ('r', 'f') ORDER BY 5, 6"
    );
    let (mut logged, mut lost) = (Vec::new(), Vec::new());
    for row in &unnamed::query(client, &sql, &[&root]).await.map_err(postgres_error)? {
        let text = |i| row.try_get::<_, &str>(i).map_err(postgres_error);
        let table = TableName::new(text(4)?, text(5)?);
        match (text(6)?, not_logged(text(7)?)) {
            ("f", _) => lost.push((table.to_string(), "a foreign table")),
            (_, Some(why)) => lost.push((table.to_string(), why)),
            (_, None) => {
                let (identity, _) = identity(row, &table)?;
                logged.push((table, identity));
            }
        }
    }
    Ok((logged, lost))
}

/// The identity and the primary key out of the columns of [`IDENTITY`].
fn identity(
    row: &tokio_postgres::Row,
    table: &TableName,
) -> Result<(CatalogIdentity, Vec<String>)> {
    let names = |i| row.try_get::<_, Option<Vec<String>>>(i).map_err(postgres_error);
    let primary_key = names(1)?.unwrap_or_default();
    let chosen = names(2)?.unwrap_or_default();
    let immediate = row.try_get::<_, Option<bool>>(3).map_err(postgres_error)?;
    let identity = match row.try_get(0).map_err(postgres_error)? {
        "d" if immediate == Some(true) => CatalogIdentity::Key(primary_key.clone()),
        "d" => CatalogIdentity::Nothing,
        // The chosen index may have been dropped since: then there is no identity.
        "i" if chosen.is_empty() => CatalogIdentity::Nothing,
        "i" => CatalogIdentity::Index(chosen),
        "f" => CatalogIdentity::Full,
        "n" => CatalogIdentity::Nothing,
        other => {
            return Err(Error::protocol(format!("unknown replica identity {other:?} of {table}")));
        }
    };
    Ok((identity, primary_key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_name_is_split_at_its_first_dot() {
        let table: TableName = "public.a.b".parse().unwrap();
        assert_eq!(table, TableName::new("public", "a.b"));
        for wrong in ["", "orders", ".orders", "public."] {
            assert!(wrong.parse::<TableName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn hostile_names_stay_names() {
        let table = TableName::new("a\"; DROP", "b'c");
        assert_eq!(table.quoted(), "\"a\"\"; DROP\".\"b'c\"");
    }
}
