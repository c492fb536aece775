//! What the database keeps of captured tables and routes: the secret, the agreements, and the last
//! descriptions (`sql/query/schema_*`). A route without an agreement is agreed with its table as it
//! is now, by `init` or at the start of a session; afterwards only `watership schema accept` does
//! so.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::{Client, GenericClient, Row as SqlRow};

use crate::error::{Error, Result};
use crate::pg::publication::{CatalogIdentity, Publication, TableFacts};
use crate::pg::sqlstate::postgres_error;
use crate::position::{Lsn, Mark, Position};
use crate::relay::Options;
use crate::relay::check::columns;
use crate::relay::checkpoint::{missing_schema, to_sql};
use crate::relay::session::constants;
use crate::route::description::{DescribedColumn, DescribedIdentity, Description, Numbered};
use crate::route::rules::column_type::{ColumnType, ColumnTypes};
use crate::route::{Agreement, DatabaseSecret, Recorded, Schemas};
use crate::verdict::Verdict;

/// A captured table as the catalog has it.
#[derive(Debug, Clone)]
pub struct Cataloged {
    /// `schema.table` as the configuration has it.
    pub table: String,
    /// Its OID.
    pub oid: u32,
    /// What the stream says of it from now on.
    pub description: Description,
    /// Columns whose values are numbers in binary mode but names in text mode, each with the type
    /// that causes it.
    pub named_things: Vec<(String, String)>,
    /// The types of its columns.
    pub types: ColumnTypes,
}

/// All that is kept, for the start of a session; with the captured tables as the catalog has them,
/// and where the WAL ended before that.
///
/// # Errors
/// The server's; a missing table is a [`crate::error::Kind::Verdict`].
pub async fn read(
    client: &impl GenericClient,
    name: &str,
    (now, now_at): (Vec<Cataloged>, Lsn),
) -> Result<Schemas> {
    const SECRET: &str = include_str!("../../../sql/query/schema_secret.sql");
    const LAST: &str = include_str!("../../../sql/query/schema_last.sql");
    let secret = client.query_opt(SECRET, &[]).await.map_err(missing_schema)?;
    let secret: Vec<u8> = match secret {
        Some(row) => row.try_get(0).map_err(postgres_error)?,
        None => {
            return Err(Error::refused("watership.secret is empty").hint(
                "restore its row from a backup; or, as the owner of the schema, insert one with \
                 its default: ids, lanes and hashes of hidden values are different from then on",
            ));
        }
    };
    let rows = client.query(LAST, &[&name]).await.map_err(missing_schema)?;
    Ok(Schemas {
        secret: Arc::new(DatabaseSecret::new(&secret)),
        agreed: agreed(client, name).await?,
        recorded: recorded(&rows)?,
        now: now.into_iter().map(|cataloged| (cataloged.table, cataloged.description)).collect(),
        now_at: now_at.into(),
    })
}

/// What is recorded of each table, by its name.
fn recorded(rows: &[SqlRow]) -> Result<HashMap<String, Recorded>> {
    let mut recorded: HashMap<String, Recorded> = HashMap::new();
    for row in rows {
        let number = |i: usize| row.try_get::<_, Option<i64>>(i).map_err(postgres_error);
        let unsigned = |i: usize| number(i).map(|n| u64::try_from(n.unwrap_or_default()));
        let table: String = row.try_get(0).map_err(postgres_error)?;
        let recorded = recorded.entry(table).or_default();
        let mark = Mark(unsigned(2)?.unwrap_or_default());
        match number(1)? {
            None => recorded.agreed.push((mark, description(row, 5)?)),
            Some(epoch) => {
                let epoch = u32::try_from(epoch).unwrap_or_default();
                let ordinal = unsigned(3)?.unwrap_or_default();
                let sub = number(4)?.and_then(|sub| u32::try_from(sub).ok()).unwrap_or_default();
                let position = Position { epoch, mark, ordinal, sub };
                recorded.changed = Some((position, description(row, 5)?));
            }
        }
    }
    Ok(recorded)
}

/// What the routes are agreed with, by route and table.
///
/// # Errors
/// The server's.
pub async fn agreed(
    client: &impl GenericClient,
    name: &str,
) -> Result<HashMap<(String, String), Agreement>> {
    const SQL: &str = include_str!("../../../sql/query/schema_agreed.sql");
    let rows = client.query(SQL, &[&name]).await.map_err(missing_schema)?;
    let agreement = |row: &SqlRow| {
        let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
        let mark: i64 = row.try_get(2).map_err(postgres_error)?;
        let since = Mark(u64::try_from(mark).unwrap_or_default());
        Ok(((text(0)?, text(1)?), Agreement { description: description(row, 3)?, since }))
    };
    rows.iter().map(agreement).collect()
}

/// As [`agreed`]; nothing where the schema is not installed, or older.
///
/// # Errors
/// The server's.
pub async fn agreed_if_installed(
    client: &impl GenericClient,
    name: &str,
) -> Result<HashMap<(String, String), Agreement>> {
    match agreed(client, name).await {
        Err(error) if error.verdict() == Some(Verdict::SchemaUnknown) => Ok(HashMap::new()),
        agreed => agreed,
    }
}

/// The number of the last agreement.
///
/// # Errors
/// The server's.
pub async fn agreed_to(client: &impl GenericClient, name: &str) -> Result<i64> {
    const SQL: &str = include_str!("../../../sql/query/schema_agreed_to.sql");
    let row = client.query_one(SQL, &[&name]).await.map_err(missing_schema)?;
    row.try_get(0).map_err(postgres_error)
}

/// A description in a column of type jsonb.
pub(in crate::relay) fn description(row: &SqlRow, index: usize) -> Result<Description> {
    let json: serde_json::Value = row.try_get(index).map_err(postgres_error)?;
    let wrong = |e| Error::protocol("watership.schema_history.description").caused_by(e);
    serde_json::from_value(json).map_err(wrong)
}

/// How the stream describes tables from now on, by the catalog; without a publication, as one that
/// is made for them will have it.
///
/// # Errors
/// The server's.
pub async fn catalog(
    client: &impl GenericClient,
    publication: Option<&Publication>,
    tables: &[TableFacts],
) -> Result<Vec<Cataloged>> {
    const SQL: &str = include_str!("../../../sql/query/schema_catalog.sql");
    let mut found = Vec::new();
    for facts in tables {
        let list = publication.and_then(|there| there.table(&facts.table)?.columns.clone());
        let generated = publication.is_some_and(|there| there.generated);
        let rows = client.query(SQL, &[&facts.oid, &list, &generated]).await;
        let column = |row: &SqlRow| {
            Ok(DescribedColumn {
                name: row.try_get(0)?,
                type_oid: row.try_get(1)?,
                type_modifier: row.try_get(2)?,
            })
        };
        let rows = rows.map_err(postgres_error)?;
        let numbers: std::result::Result<_, _> = rows.iter().map(|row| row.try_get(3)).collect();
        let numbered = Numbered { relation: facts.oid, numbers: numbers.map_err(postgres_error)? };
        let columns: std::result::Result<Vec<_>, _> = rows.iter().map(column).collect();
        let (mut named_things, mut types) = (Vec::new(), ColumnTypes::new());
        for row in &rows {
            let name: String = row.try_get(0).map_err(postgres_error)?;
            types.insert(name.clone(), column_type(row).map_err(postgres_error)?);
            if let Some(kind) = row.try_get::<_, Option<String>>(4).map_err(postgres_error)? {
                named_things.push((name, kind));
            }
        }
        let columns = columns.map_err(postgres_error)?;
        let key = match (&*facts.primary_key, &facts.identity) {
            ([], CatalogIdentity::Index(columns)) => columns.clone(),
            (key, _) => key.to_vec(),
        };
        let identity = match &facts.identity {
            CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => {
                DescribedIdentity::Columns(columns.clone())
            }
            CatalogIdentity::Full => DescribedIdentity::Full,
            CatalogIdentity::Nothing => DescribedIdentity::Nothing,
        };
        let (schema, table) = (facts.table.schema.clone(), facts.table.name.clone());
        let description =
            Description { schema, table, columns, key, identity, numbered: Some(numbered) };
        let (table, oid) = (facts.table.to_string(), facts.oid);
        found.push(Cataloged { table, oid, description, named_things, types });
    }
    Ok(found)
}

/// The type of a column, in a row of `sql/query/schema_catalog.sql`.
fn column_type(row: &SqlRow) -> std::result::Result<ColumnType, tokio_postgres::Error> {
    let category: i8 = row.try_get(7)?;
    Ok(ColumnType {
        name: row.try_get(5)?,
        base: row.try_get(6)?,
        category: category.cast_unsigned(),
        modifier: row.try_get(8)?,
    })
}

/// Refuses routes whose rules do not fit their tables.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with the first that does not; the server's.
pub async fn verify(
    client: &impl GenericClient,
    options: &Options,
    tables: &[Cataloged],
    agreed: &HashMap<(String, String), Agreement>,
) -> Result<()> {
    for cataloged @ Cataloged { table, .. } in tables {
        for rule in columns::routes_of(&options.rules, table) {
            let agreed = agreed.get(&(rule.name.clone(), table.clone()));
            let agreed = agreed.map(|agreed| &agreed.description);
            columns::verify(rule, cataloged, agreed)?;
            if options.binary {
                columns::verify_binary(rule, cataloged, agreed)?;
            }
            constants::verify(client, rule, cataloged).await?;
        }
    }
    Ok(())
}

/// Agrees routes that are not agreed yet with their tables; `at` is where the WAL ended before the
/// catalog was read. Returns these routes and tables.
///
/// # Errors
/// The server's.
pub async fn agree_first(
    client: &Client,
    options: &Options,
    tables: &[Cataloged],
    agreed: &HashMap<(String, String), Agreement>,
    at: Lsn,
) -> Result<Vec<(String, String)>> {
    let mut new = Vec::new();
    for cataloged in tables {
        for rule in columns::routes_of(&options.rules, &cataloged.table) {
            let route_and_table = (rule.name.clone(), cataloged.table.clone());
            if !agreed.contains_key(&route_and_table) {
                agree(client, &options.name, &rule.name, cataloged, at).await?;
                new.push(route_and_table);
            }
        }
    }
    Ok(new)
}

/// From `at` on the route is agreed with the table as it is.
///
/// # Errors
/// The server's.
pub async fn agree(
    client: &impl GenericClient,
    name: &str,
    route: &str,
    table: &Cataloged,
    at: Lsn,
) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/schema_agree.sql");
    let json = serde_json::to_value(&table.description).expect("names and numbers are JSON");
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&name, &route, &table.table, &table.oid, &json, &to_sql(at.0)];
    client.execute(SQL, &values).await.map(drop).map_err(postgres_error)
}
