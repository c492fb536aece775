//! Reading a table: what there is to know of it, and a chunk of its rows.
//!
//! Invariant: a chunk is read under a lock that keeps the table's description as it is, in one
//! snapshot that is taken after the lock: a rewritten table would look empty in an older one.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{TryStreamExt as _, pin_mut};
use tokio_postgres::{Client, GenericClient, Row as SqlRow};

use super::copied;
use super::keyset::{From, KeyColumn, TableShape};
use crate::column::{Types, oid};
use crate::error::{Error, Result};
use crate::event::{Column, Row, Value};
use crate::pg::publication::TableName;
use crate::pg::sqlstate::{INVALID_SCHEMA_NAME, UNDEFINED_TABLE, postgres_error};
use crate::relay::session::user_types::read_types;

/// Settings for reading given keys: a bitmap scan looks each one up, while a scan in index order
/// would read the whole table.
pub const ONE_BY_ONE: &str = "SET LOCAL enable_bitmapscan = on; SET LOCAL enable_indexscan = off; \
    SET LOCAL enable_indexonlyscan = off";

/// Bytes of a chunk: what is more is left for the next one.
const CHUNK_BYTES: usize = 4 << 20;

/// What is wrong with a table, as far as a backfill is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// What it is.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl Unfit {
    fn new(what: String, hint: impl Into<String>) -> Self {
        Self { what, hint: hint.into() }
    }
}

impl std::convert::From<Unfit> for Error {
    fn from(unfit: Unfit) -> Self {
        Error::refused(unfit.what).hint(unfit.hint)
    }
}

/// Where the table is: the database's name for descriptions, the OID, the name in the
/// configuration, and the publication.
#[derive(Debug, Clone)]
pub struct ReadTable {
    /// Name of the database.
    pub database: String,
    /// The table's OID.
    pub oid: u32,
    /// `schema.table`, as the configuration has it.
    pub full_name: String,
    /// The publication.
    pub publication: String,
    /// The role that reads.
    pub role: String,
}

/// Of a table by its name; absent when there is none.
///
/// # Errors
/// The server's.
pub async fn find(
    client: &impl GenericClient,
    table: &TableName,
    publication: &str,
) -> Result<Option<ReadTable>> {
    let sql = "SELECT c.oid, current_database()::text, current_user::text \
        FROM pg_catalog.pg_class AS c \
        JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
        WHERE n.nspname = $1::text AND c.relname = $2::text";
    let row = client.query_opt(sql, &[&table.schema, &table.name]).await.map_err(postgres_error)?;
    Ok(row.map(|row| ReadTable {
        oid: row.get(0),
        database: row.get(1),
        role: row.get(2),
        full_name: table.to_string(),
        publication: publication.to_owned(),
    }))
}

/// How a table is read, or why it cannot be; absent when it is gone.
///
/// # Errors
/// The server's.
pub async fn shape(
    client: &impl GenericClient,
    wanted: &ReadTable,
) -> Result<Option<std::result::Result<TableShape, Unfit>>> {
    const SQL: &str = include_str!("../../../sql/query/backfill_table.sql");
    let row = client.query_opt(SQL, &[&wanted.oid, &wanted.publication]).await;
    let Some(row) = row.map_err(postgres_error)? else { return Ok(None) };
    let of_columns = row.try_get::<_, Option<Vec<u32>>>(6).map_err(postgres_error)?;
    let is_fixed = |type_oid: &u32| *type_oid < oid::FIRST_NOT_FIXED;
    // The same shapes as in the stream; most tables have built-in types only.
    let types = match of_columns.unwrap_or_default().iter().all(is_fixed) {
        true => Types::default(),
        false => read_types(client).await?,
    };
    read_shape(&row, wanted, &types).map(Some)
}

fn read_shape(
    row: &SqlRow,
    wanted: &ReadTable,
    user_types: &Types,
) -> Result<std::result::Result<TableShape, Unfit>> {
    let failed = postgres_error;
    let texts = |i: usize| row.try_get::<_, Option<Vec<String>>>(i).map_err(failed);
    let texts = |i: usize| texts(i).map(Option::unwrap_or_default);
    let name = TableName::new(
        row.try_get::<_, String>(0).map_err(failed)?,
        row.try_get::<_, String>(1).map_err(failed)?,
    );
    let names = texts(5)?;
    let types = row.try_get::<_, Option<Vec<u32>>>(6).map_err(failed)?.unwrap_or_default();
    let modifiers = row.try_get::<_, Option<Vec<i32>>>(7).map_err(failed)?.unwrap_or_default();
    let key_names = texts(8)?;
    let role = postgres_protocol::escape::escape_identifier(&wanted.role);
    if row.try_get::<_, Option<bool>>(16).map_err(failed)? != Some(true) {
        let publication = &wanted.publication;
        let what = format!("{name} is not in publication {publication:?}: its changes do not come");
        return Ok(Err(Unfit::new(what, "`watership init` puts it back")));
    }
    if !row.try_get::<_, bool>(4).map_err(failed)? {
        let what = format!("role {:?} lacks SELECT on {name}, which a backfill reads", wanted.role);
        let hint = format!("as its owner: GRANT SELECT ON {} TO {role}", name.quoted());
        return Ok(Err(Unfit::new(what, hint)));
    }
    if row.try_get::<_, bool>(3).map_err(failed)? {
        let what = format!("row-level security hides rows of {name} from role {:?}", wanted.role);
        let hint = format!("as a superuser: ALTER ROLE {role} BYPASSRLS");
        return Ok(Err(Unfit::new(what, hint)));
    }
    if key_names.is_empty() {
        return Ok(Err(without_key(&name)));
    }
    let columns: Vec<Column> = names
        .iter()
        .zip(types.iter().zip(&modifiers))
        .map(|(name, (oid, modifier))| Column::of(name.as_str(), *oid, *modifier, user_types))
        .collect();
    let parts = (9..=14).map(texts).collect::<Result<Vec<_>>>()?;
    let mut key = Vec::new();
    for (place, column) in key_names.iter().enumerate() {
        let part = |of: usize| parts[of].get(place).cloned().unwrap_or_default();
        let Some(index) = names.iter().position(|name| name == column) else {
            let what = format!("key column {column:?} of {name} is not published");
            return Ok(Err(Unfit::new(what, "put it into the publication's column list")));
        };
        key.push(KeyColumn {
            column: index,
            cast: part(0),
            collation: part(1),
            less: part(2),
            equal: part(3),
            at_least: part(4),
            greater: part(5),
        });
    }
    let (database, full_name) = (&wanted.database, &wanted.full_name);
    let table = TableShape::describe(database, wanted.oid, &name, full_name, columns, &key);
    let partitioned = row.try_get(2).map_err(failed)?;
    let filter = row.try_get(15).map_err(failed)?;
    let numbers = row.try_get::<_, Option<Vec<i16>>>(17).map_err(failed)?.unwrap_or_default();
    Ok(Ok(TableShape { table, numbers, name, partitioned, key, filter }))
}

fn without_key(name: &TableName) -> Unfit {
    let what = format!(
        "{name} has no primary key and no unique index as its replica identity, so it cannot be \
         read in chunks"
    );
    let hint = format!(
        "add a primary key, or ALTER TABLE {} REPLICA IDENTITY USING INDEX a unique one",
        name.quoted()
    );
    Unfit::new(what, hint)
}

/// About how many rows it has; absent when nobody knows.
///
/// # Errors
/// The server's.
pub async fn estimate(client: &impl GenericClient, oid: u32) -> Result<Option<u64>> {
    let sql = "SELECT sum(c.reltuples)::bigint FROM pg_catalog.pg_class AS c \
        WHERE c.reltuples >= 0 AND c.relkind = 'r' AND (c.oid = $1 \
            OR c.oid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1::oid)))";
    let row = client.query_one(sql, &[&oid]).await.map_err(postgres_error)?;
    let total: Option<i64> = row.try_get(0).map_err(postgres_error)?;
    Ok(total.and_then(|total| u64::try_from(total).ok()))
}

/// The transactions that had begun and are not visible yet, without their epoch, and whether
/// commits may have to wait for a standby.
///
/// # Errors
/// The server's.
pub async fn unseen(client: &impl GenericClient) -> Result<(HashSet<u32>, bool)> {
    let sql = "SELECT pg_current_snapshot()::text, \
        current_setting('synchronous_standby_names') <> ''";
    let row = client.query_one(sql, &[]).await.map_err(postgres_error)?;
    let snapshot: &str = row.try_get(0).map_err(postgres_error)?;
    Ok((parse_snapshot(snapshot)?, row.try_get(1).map_err(postgres_error)?))
}

/// `xmin:xmax:xip,xip,…`.
fn parse_snapshot(text: &str) -> Result<HashSet<u32>> {
    let wrong = || Error::protocol(format!("snapshot {text:?}"));
    let list = text.splitn(3, ':').nth(2).ok_or_else(wrong)?;
    let ids = list.split(',').filter(|id| !id.is_empty());
    ids.map(|id| id.parse::<u64>().map(|id| id as u32).map_err(|_| wrong())).collect()
}

/// What was read of a chunk.
#[derive(Debug, Default)]
pub struct ChunkRows {
    /// The rows that are wanted.
    pub wanted: Vec<Row>,
    /// ChunkRows that were read.
    pub read: usize,
    /// The key of the last of them.
    pub last_key: Option<Vec<String>>,
    /// The keys of all rows that were read, if they were read by key.
    pub keys: Vec<Vec<String>>,
    /// There was no more.
    pub done: bool,
    /// Transactions that it does not see.
    pub unseen: Vec<u32>,
    /// How long it took.
    pub took: Duration,
}

/// How the reading of a chunk ended.
#[derive(Debug)]
pub enum ReadOutcome {
    /// With rows.
    Rows(ChunkRows),
    /// The table is another one than the run began with, or it can no longer be read.
    Changed(String),
}

/// Reads up to `rows` rows, if the table is still described as in `shape`.
///
/// # Errors
/// The server's.
pub async fn chunk(
    client: &mut Client,
    wanted: &ReadTable,
    shape_then: &TableShape,
    from: &From,
    condition: Option<&str>,
    rows: usize,
) -> Result<ReadOutcome> {
    let began = Instant::now();
    let builder = client.build_transaction().read_only(true);
    let builder = builder.isolation_level(tokio_postgres::IsolationLevel::RepeatableRead);
    let tx = builder.start().await.map_err(postgres_error)?;
    let table = &shape_then.name;
    let only = if shape_then.partitioned { "" } else { "ONLY " };
    let lock = format!("LOCK TABLE {only}{} IN ACCESS SHARE MODE", table.quoted());
    if let Err(error) = tx.batch_execute(&lock).await.map_err(postgres_error) {
        return match error.sqlstate() {
            Some(UNDEFINED_TABLE | INVALID_SCHEMA_NAME) => {
                Ok(ReadOutcome::Changed(format!("{table} is gone")))
            }
            _ => Err(error),
        };
    }
    let now = match shape(&tx, wanted).await? {
        None => return Ok(ReadOutcome::Changed(format!("{table} was dropped"))),
        Some(Err(unfit)) => return Ok(ReadOutcome::Changed(unfit.what)),
        Some(Ok(now)) => now,
    };
    if now.table.version != shape_then.table.version || now.numbers != shape_then.numbers {
        let what = format!("{table} was altered: its columns, its key or its name have changed");
        return Ok(ReadOutcome::Changed(what));
    }
    let (unseen, _) = unseen(&tx).await?;
    if matches!(from, From::Only(_)) {
        tx.batch_execute(ONE_BY_ONE).await.map_err(postgres_error)?;
    }
    let sql = now.statement(from, condition, rows);
    let keeps_keys = matches!(from, From::Only(_));
    let mut read = copy(&tx, &sql, &now, rows, keeps_keys).await?;
    tx.commit().await.map_err(postgres_error)?;
    read.unseen = unseen.into_iter().collect();
    read.took = began.elapsed();
    Ok(ReadOutcome::Rows(read))
}

async fn copy(
    tx: &tokio_postgres::Transaction<'_>,
    sql: &str,
    shape: &TableShape,
    rows: usize,
    keeps_keys: bool,
) -> Result<ChunkRows> {
    let stream = tx.copy_out(sql).await.map_err(postgres_error)?;
    pin_mut!(stream);
    let mut read = ChunkRows { done: true, ..ChunkRows::default() };
    let (mut bytes, mut last): (usize, Option<Vec<Value>>) = (0, None);
    while let Some(line) = stream.try_next().await.map_err(postgres_error)? {
        if bytes >= CHUNK_BYTES {
            // The rest is read to the end, because the statement cannot be left, and comes again.
            read.done = false;
            continue;
        }
        let line: Bytes = line;
        bytes += line.len();
        let mut values = copied::values(&line)?;
        let is_wanted = values.pop() == Some(Value::Text(Bytes::from_static(b"t")));
        if values.len() != shape.table.columns.len() {
            return Err(Error::protocol("a row of another width than its table"));
        }
        read.read += 1;
        if keeps_keys {
            read.keys.push(key(shape, &values)?);
        }
        if is_wanted {
            last = None;
            read.wanted.push(values.into());
        } else {
            last = Some(values);
        }
    }
    read.done &= read.read < rows;
    let last = last.as_deref().or_else(|| read.wanted.last().map(|row| &**row));
    read.last_key = last.map(|row| key(shape, row)).transpose()?;
    Ok(read)
}

/// The text of a row's key, in the order of its index.
pub(super) fn key(shape: &TableShape, row: &[Value]) -> Result<Vec<String>> {
    let text = |key: &KeyColumn| {
        let name = &shape.table.columns[key.column].name;
        match &row[key.column] {
            Value::Text(text) => String::from_utf8(text.to_vec()).map_err(|_| {
                Error::refused(format!("key column {name:?} of {} is not UTF-8", shape.name))
            }),
            Value::Null | Value::Unchanged | Value::Unreadable(_) => {
                Err(Error::refused(format!("key column {name:?} of {} is null", shape.name)))
            }
        }
    };
    shape.key.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_names_the_transactions_that_it_does_not_see() {
        assert_eq!(parse_snapshot("10:20:").unwrap(), HashSet::new());
        let ids = parse_snapshot("10:20:10,14,4294967301").unwrap();
        assert_eq!(ids, HashSet::from([10, 14, 5]));
        assert!(parse_snapshot("10:20").is_err());
        assert!(parse_snapshot("10:20:x").is_err());
    }
}
