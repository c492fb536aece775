//! An outbox table of the application's, seen through ordinary SQL: what the catalog says of its
//! columns, and the few statements about its rows. Names come from configuration and are quoted
//! here.

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{GenericClient, Row};
use uuid::Uuid;

use crate::error::Result;
use crate::pg::publication::TableName;
use crate::pg::sqlstate::postgres_error;
use crate::pg::statement::fill;
use crate::pg::unnamed;

/// A column, as far as a mapping has to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedColumn {
    /// `attnum`, which stays the same under another name.
    pub number: i32,
    /// Name.
    pub name: String,
    /// OID of its type, which the stream names.
    pub type_oid: u32,
    /// OID of the type below all domains.
    pub base_oid: u32,
    /// `pg_type.typcategory` of that: `S` strings, `E` enums, `N` numbers.
    pub category: char,
    /// The type as SQL names it.
    pub type_name: String,
    /// Whether it is generated.
    pub generated: bool,
    /// Whether it is never null.
    pub not_null: bool,
    /// Whether a whole and valid index begins with it.
    pub indexed: bool,
    /// `atttypmod`.
    pub type_modifier: i32,
    /// The expression of its default, as SQL.
    pub default: Option<String>,
    /// Whether a sequence numbers it, upwards and without beginning again.
    pub numbered: bool,
}

/// The columns of a table, in order.
///
/// # Errors
/// What the server says.
pub async fn read_columns(client: &impl GenericClient, oid: u32) -> Result<Vec<MappedColumn>> {
    let sql = "WITH RECURSIVE typed AS ( \
            SELECT attnum, attname::text AS name, atttypid AS declared, atttypid AS base, \
                format_type(atttypid, NULL) AS type_name, attgenerated <> '' AS generated, \
                attnotnull AS not_null, atttypmod AS modifier \
            FROM pg_catalog.pg_attribute \
            WHERE attrelid = $1 AND attnum > 0 AND NOT attisdropped \
            UNION ALL \
            SELECT t.attnum, t.name, t.declared, d.typbasetype, t.type_name, t.generated, \
                t.not_null OR d.typnotnull, t.modifier \
            FROM typed AS t \
            JOIN pg_catalog.pg_type AS d ON d.oid = t.base AND d.typtype = 'd') \
        SELECT t.name, t.declared, t.base, b.typcategory::text, t.type_name, t.generated, \
            t.not_null, EXISTS (SELECT FROM pg_catalog.pg_index AS i WHERE i.indrelid = $1 \
                AND i.indisvalid AND i.indpred IS NULL AND i.indkey[0] = t.attnum), t.modifier, \
            CASE WHEN NOT t.generated THEN pg_get_expr(a.adbin, a.adrelid) END, \
            EXISTS (SELECT FROM pg_catalog.pg_depend AS d \
                JOIN pg_catalog.pg_sequence AS s \
                    ON s.seqincrement > 0 AND NOT s.seqcycle AND s.seqcache = 1 \
                WHERE d.classid = 'pg_class'::regclass AND d.objid = s.seqrelid \
                    AND d.refclassid = 'pg_class'::regclass AND d.refobjid = $1 \
                    AND d.refobjsubid = t.attnum AND d.deptype = 'i' \
                OR d.classid = 'pg_attrdef'::regclass AND d.objid = a.oid \
                    AND d.refclassid = 'pg_class'::regclass AND d.refobjid = s.seqrelid \
                    AND pg_get_expr(a.adbin, a.adrelid) LIKE 'nextval(%'), \
            t.attnum::integer \
        FROM typed AS t \
        JOIN pg_catalog.pg_type AS b ON b.oid = t.base AND b.typtype <> 'd' \
        LEFT JOIN pg_catalog.pg_attrdef AS a ON a.adrelid = $1 AND a.adnum = t.attnum \
        ORDER BY t.attnum";
    let rows = unnamed::query(client, sql, &[&oid]).await.map_err(postgres_error)?;
    let column = |row: &Row| {
        let category: String = row.try_get(3)?;
        Ok(MappedColumn {
            number: row.try_get(11)?,
            name: row.try_get(0)?,
            type_oid: row.try_get(1)?,
            base_oid: row.try_get(2)?,
            category: category.chars().next().unwrap_or('U'),
            type_name: row.try_get(4)?,
            generated: row.try_get(5)?,
            not_null: row.try_get(6)?,
            indexed: row.try_get(7)?,
            type_modifier: row.try_get(8)?,
            default: row.try_get(9)?,
            numbered: row.try_get(10)?,
        })
    };
    rows.iter().map(|row| column(row).map_err(postgres_error)).collect()
}

/// The first two columns of a whole and valid B-tree index; the second may be absent.
pub type IndexColumns = (String, Option<String>);

/// The indexes of a table; none where it does not exist.
///
/// # Errors
/// What the server says.
pub async fn read_indexes(
    client: &impl GenericClient,
    table: &TableName,
) -> Result<Vec<IndexColumns>> {
    let sql = "SELECT f.attname::text, s.attname::text \
        FROM pg_catalog.pg_index AS i \
        JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid \
        JOIN pg_catalog.pg_am AS m ON m.oid = c.relam AND m.amname = 'btree' \
        JOIN pg_catalog.pg_attribute AS f ON f.attrelid = i.indrelid AND f.attnum = i.indkey[0] \
        LEFT JOIN pg_catalog.pg_attribute AS s ON s.attrelid = i.indrelid \
            AND s.attnum = i.indkey[1] AND i.indnkeyatts > 1 \
        WHERE i.indrelid = to_regclass($1::text) AND i.indisvalid AND i.indpred IS NULL";
    let rows = unnamed::query(client, sql, &[&table.quoted()]).await.map_err(postgres_error)?;
    let index = |row: &Row| Ok((row.try_get(0)?, row.try_get(1)?));
    rows.iter().map(|row| index(row).map_err(postgres_error)).collect()
}

/// The role of the connection. Behind a pooler it may differ from the one in the URL.
///
/// # Errors
/// What the server says.
pub async fn current_role(client: &impl GenericClient) -> Result<String> {
    let row = unnamed::query_one(client, "SELECT current_user::text", &[]).await;
    row.map_err(postgres_error)?.try_get(0).map_err(postgres_error)
}

/// What `role` may see of a table: whether it may use its schema, read its rows, and whether
/// row-level security can hide some of them (as `check_enable_rls` in `rls.c` decides).
///
/// # Errors
/// What the server says.
pub async fn sight(
    client: &impl GenericClient,
    oid: u32,
    role: &str,
) -> Result<(bool, bool, bool)> {
    let sql = "SELECT has_schema_privilege(r.oid, c.relnamespace, 'USAGE'), \
            has_table_privilege(r.oid, c.oid, 'SELECT'), \
            c.relrowsecurity AND NOT (r.rolsuper OR r.rolbypassrls) \
                AND (c.relforcerowsecurity OR NOT pg_has_role(r.oid, c.relowner, 'USAGE')) \
        FROM pg_catalog.pg_roles AS r, pg_catalog.pg_class AS c \
        WHERE r.rolname = $2::text AND c.oid = $1::oid";
    let row = unnamed::query_opt(client, sql, &[&oid, &role]).await.map_err(postgres_error)?;
    // The table has just been dropped, or the role is not there.
    let Some(row) = row else { return Ok((false, false, false)) };
    let flag = |i| row.try_get(i).map_err(postgres_error);
    Ok((flag(0)?, flag(1)?, flag(2)?))
}

/// Whether `role` may read and delete rows of the table.
///
/// # Errors
/// What the server says.
pub async fn may_delete(client: &impl GenericClient, oid: u32, role: &str) -> Result<bool> {
    let sql = "SELECT has_table_privilege(oid, $1::oid, 'SELECT') \
            AND has_table_privilege(oid, $1::oid, 'DELETE') \
        FROM pg_catalog.pg_roles WHERE rolname = $2::text";
    let row = unnamed::query_opt(client, sql, &[&oid, &role]).await.map_err(postgres_error)?;
    let Some(row) = row else { return Ok(false) };
    // Null where the table has just been dropped.
    let may: Option<bool> = row.try_get(0).map_err(postgres_error)?;
    Ok(may.unwrap_or(false))
}

/// How many rows the table has; counting stops at `most`.
///
/// # Errors
/// What the server says.
pub async fn count(client: &impl GenericClient, table: &TableName, most: i64) -> Result<i64> {
    let from = table.quoted();
    let sql = format!("SELECT count(*) FROM (SELECT FROM {from} LIMIT $1) AS rows");
    unnamed::query_one(client, &sql, &[&most])
        .await
        .map_err(postgres_error)?
        .try_get(0)
        .map_err(postgres_error)
}

/// How the column with the time of an event tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeColumn {
    /// `timestamptz`.
    WithZone,
    /// `timestamp`, taken for UTC.
    WithoutZone,
    /// `bigint`: milliseconds since 1970.
    Millis,
}

impl TimeColumn {
    /// A time, given as the text of a timestamptz in this SQL, in the column's terms.
    fn value(self, time: &str) -> String {
        match self {
            TimeColumn::WithZone => format!("{time}::timestamptz"),
            TimeColumn::WithoutZone => format!("({time}::timestamptz AT TIME ZONE 'UTC')"),
            TimeColumn::Millis => {
                format!("(extract(epoch FROM {time}::timestamptz) * 1000)::bigint")
            }
        }
    }
}

/// How many rows were made since `since`, at most `most`, and the time now in UTC, as text.
///
/// # Errors
/// What the server says.
pub async fn count_since(
    client: &impl GenericClient,
    table: &TableName,
    created_at: (&str, TimeColumn),
    since: &str,
    most: i64,
) -> Result<(i64, String)> {
    let (column, form) = (escape_identifier(created_at.0), created_at.1);
    let sql = format!(
        "SELECT count(*), to_char(clock_timestamp() AT TIME ZONE 'UTC', \
            'YYYY-MM-DD HH24:MI:SS.US\"Z\"') \
        FROM (SELECT FROM {} WHERE {column} >= {} LIMIT $2) AS rows",
        table.quoted(),
        form.value("$1::text")
    );
    let row = unnamed::query_one(client, &sql, &[&since, &most]).await.map_err(postgres_error)?;
    Ok((row.try_get(0).map_err(postgres_error)?, row.try_get(1).map_err(postgres_error)?))
}

/// Rows whose transactions had ended when this was noted lie before `lsn` in the WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedNote {
    /// Older ones are deleted.
    cutoff: String,
    /// The oldest transaction that was open then (`xid8`).
    horizon: String,
    /// Where the WAL ended then.
    pub lsn: String,
}

/// Notes where the WAL ends now, for rows older than `age_seconds`. The snapshot is older than the
/// position, so what it shows as ended lies before it.
///
/// # Errors
/// What the server says.
pub async fn note_passed(client: &impl GenericClient, age_seconds: i64) -> Result<PassedNote> {
    let sql = "SELECT (now() - make_interval(secs => $1::bigint::double precision))::text, \
        pg_snapshot_xmin(pg_current_snapshot())::text, pg_current_wal_insert_lsn()::text";
    let row = unnamed::query_one(client, sql, &[&age_seconds]).await.map_err(postgres_error)?;
    let text = |i| row.try_get(i).map_err(postgres_error);
    Ok(PassedNote { cutoff: text(0)?, horizon: text(1)?, lsn: text(2)? })
}

/// What every relay that polls the table has published, as snapshots; absent where the batch that
/// one of them stands at is missing: then nothing is passed.
///
/// # Errors
/// What the server says.
pub async fn polled_snapshots(
    client: &impl GenericClient,
    table: &TableName,
) -> Result<Option<Vec<String>>> {
    const SQL: &str = include_str!("../../sql/query/poll_passed.sql");
    let row = unnamed::query_one(client, SQL, &[&table.to_string()]).await;
    row.map_err(postgres_error)?.try_get(0).map_err(postgres_error)
}

/// The rows that may be deleted.
#[derive(Debug, Clone, Copy)]
pub struct Passed<'a> {
    /// What relays that read the WAL have passed.
    pub note: &'a PassedNote,
    /// The column with the transaction, and what relays that poll the table have passed; absent
    /// where none polls it.
    pub polled: Option<(&'a str, &'a [String])>,
}

/// Deletes up to `most` rows (of each partition) that are passed, the oldest first. Returns how
/// many.
///
/// # Errors
/// What the server says.
pub async fn delete_passed(
    client: &impl GenericClient,
    table: &TableName,
    created_at: (&str, TimeColumn),
    passed: Passed<'_>,
    most: i64,
) -> Result<u64> {
    let Passed { note, polled } = passed;
    let (column, form) = (escape_identifier(created_at.0), created_at.1);
    let table = table.quoted();
    // The numbers of transactions are compared as Postgres does, in a circle: a row that was frozen
    // more than half of it ago seems to come from the future.
    let mut passed = format!(
        "{column} < {} AND (age(xmin) > age($2::text::xid8::xid) OR age(xmin) < 0)",
        form.value("$1::text")
    );
    let (mut values, snapshots): (Vec<unnamed::Parameter<'_>>, _) =
        (vec![&note.cutoff, &note.horizon, &most], polled.map(|(_, snapshots)| snapshots));
    if let (Some((xid, _)), Some(snapshots)) = (polled, &snapshots) {
        passed += &format!(
            " AND NOT EXISTS (SELECT FROM unnest($4::text[]) AS s (snapshot) \
                WHERE NOT pg_visible_in_snapshot({}, s.snapshot::pg_snapshot))",
            escape_identifier(xid)
        );
        values.push(snapshots);
    }
    // The places of rows are those of a partition, so the condition is asked twice.
    let sql = format!(
        "DELETE FROM {table} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {table} WHERE {passed} \
            ORDER BY {column} LIMIT $3)) AND {passed}"
    );
    let deleted = unnamed::execute(client, &sql, &values).await;
    deleted.map_err(postgres_error)
}

/// The columns that a search goes by, and that it shows.
#[derive(Debug, Clone, Copy)]
pub struct FindColumns<'a> {
    /// The table.
    pub table: &'a TableName,
    /// The column of the id, and whether it is a uuid.
    pub id: (&'a str, bool),
    /// The column of the aggregate type, or all rows' own.
    pub aggregate_type: std::result::Result<&'a str, &'a str>,
    /// The column of the aggregate id.
    pub aggregate_id: &'a str,
    /// The column of the event type.
    pub event_type: &'a str,
    /// The column of the time, if there is one.
    pub created_at: Option<&'a str>,
    /// The column of the transaction, if the table is polled.
    pub xid: Option<&'a str>,
}

/// Rows of the table with this id or key, at most `most`, in the form of `find_outbox.sql`.
///
/// # Errors
/// What the server says.
pub async fn find(
    client: &impl GenericClient,
    columns: FindColumns<'_>,
    relay: &str,
    id: Option<Uuid>,
    key: Option<&str>,
    most: i64,
) -> Result<Vec<Row>> {
    const SQL: &str = include_str!("../../sql/query/find_mapped.sql");
    let named = |name: &str| format!("o.{}", escape_identifier(name));
    let id_column = named(columns.id.0);
    // A derived id cannot be turned back; one that is a UUID as text is found.
    let same_id = match columns.id.1 {
        true => format!("{id_column} = $2"),
        false => format!("{id_column}::text = $2::text"),
    };
    let aggregate_type = match columns.aggregate_type {
        Ok(column) => format!("{}::text", named(column)),
        Err(constant) => format!("{}::text", escape_literal(constant)),
    };
    let created_at = columns.created_at.map_or("NULL::text".to_owned(), named);
    let visible = match columns.xid {
        Some(xid) => format!("pg_visible_in_snapshot({}, b.snapshot)", named(xid)),
        None => "NULL::boolean".to_owned(),
    };
    let values = [
        ("table", &*columns.table.quoted()),
        ("visible", &visible),
        ("same_id", &same_id),
        ("id", &id_column),
        ("aggregate_type", &aggregate_type),
        ("aggregate_id", &named(columns.aggregate_id)),
        ("event_type", &named(columns.event_type)),
        ("created_at", &created_at),
    ];
    let sql = fill(SQL, &values);
    unnamed::query(client, &sql, &[&relay, &id, &key, &most]).await.map_err(postgres_error)
}
