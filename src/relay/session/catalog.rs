//! What a session reads of the catalog: the captured tables, and the types of users.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio_postgres::Client;

use crate::column::binary::{Types, UserType};
use crate::error::{Error, Result};
use crate::pg::publication::{CatalogIdentity, Publication, TableFacts, TableName, read_table};
use crate::pg::sqlstate::postgres_error;
use crate::relay::check::publishable::{Harm, Obstacle, obstacles};
use crate::relay::check::tables;
use crate::relay::{Options, checkpoint};
use crate::route::keys_of;
use crate::source::transaction::CapturedTable;

/// The primary keys that the session was started with, by the table's OID. The stream does not show
/// that one was added or replaced, unless it is the replica identity.
#[derive(Debug, Default)]
pub(in crate::relay) struct StartedWith(Mutex<HashMap<u32, Vec<String>>>);

impl StartedWith {
    /// A session starts with these.
    pub(super) fn set(&self, captured: &HashMap<String, CapturedTable>) {
        let keys = captured.values().map(|table| (table.oid, table.primary_key.clone()));
        *self.0.lock().expect("nobody panics while holding the keys") = keys.collect();
    }

    /// An error when a key is another one now.
    pub(in crate::relay) fn compare(&self, tables: &[TableFacts]) -> Option<Error> {
        let keys = self.0.lock().expect("nobody panics while holding the keys");
        let changed = |facts: &&TableFacts| {
            let shown = matches!(facts.identity, CatalogIdentity::Key(_));
            !shown && keys.get(&facts.oid).is_some_and(|key| *key != facts.primary_key)
        };
        let table = &tables.iter().find(changed)?.table;
        let text = format!("the primary key of {table} has changed");
        Some(Error::protocol(text).hint("no action needed: the next session reads it again"))
    }
}

/// The tables of `source.tables`.
pub(super) async fn captured(
    client: &Client,
    options: &Options,
    publication: &Publication,
) -> Result<HashMap<String, CapturedTable>> {
    let mut captured = HashMap::new();
    let operations = publication.operations;
    let mut described = checkpoint::described(client, &options.name).await?;
    for facts in read_tables(client, options, publication).await? {
        let table = &facts.table.to_string();
        let serious = |obstacle: &Obstacle| obstacle.harm > Harm::Less;
        for obstacle in obstacles(&facts, Some(publication)).into_iter().filter(serious) {
            tracing::warn!(hint = obstacle.hint, "{}", obstacle.what);
        }
        for (route, key) in keys_of(&options.rules, table) {
            if let Some((what, hint)) = tables::hides_route_key(&facts, route, key) {
                tracing::warn!(hint, "{what}");
            }
        }
        let list = publication.table(&facts.table).and_then(|table| table.columns.as_ref());
        let known = CapturedTable {
            oid: facts.oid,
            primary_key: facts.primary_key,
            leading: if list.is_none() { facts.leading } else { Vec::new() },
            partitioned: facts.partitioned,
            inserts_only: !operations.update && !operations.delete,
            former: described.remove(&facts.oid),
        };
        captured.insert(table.clone(), known);
    }
    Ok(captured)
}

/// The tables of `source.tables`, each of them fit to be captured.
///
/// # Errors
/// [`crate::error::Kind::Refused`] for one that does not exist, or whose changes could not be told
/// apart.
pub(in crate::relay) async fn read_tables(
    client: &Client,
    options: &Options,
    publication: &Publication,
) -> Result<Vec<TableFacts>> {
    let mut found = Vec::new();
    for table in &options.tables {
        let name: TableName = table.parse()?;
        let facts = read_table(client, &name).await?.ok_or_else(|| {
            Error::refused(format!("captured table {table} does not exist"))
                .hint("create it, or remove it from source.tables")
        })?;
        let impossible = |obstacle: &Obstacle| obstacle.harm == Harm::Impossible;
        let obstacles = obstacles(&facts, Some(publication));
        if let Some(Obstacle { what, hint, .. }) = obstacles.into_iter().find(impossible) {
            return Err(Error::refused(what).hint(hint));
        }
        tables::keys_its_changes(&facts, Some(publication))?;
        found.push(facts);
    }
    Ok(found)
}

/// How each type of users and extensions is sent in binary.
pub(super) async fn user_types(client: &Client) -> Result<Types> {
    const SQL: &str = include_str!("../../../sql/query/user_types.sql");
    let mut types = HashMap::new();
    for row in client.query(SQL, &[]).await.map_err(postgres_error)? {
        let type_oid: u32 = row.try_get(0).map_err(postgres_error)?;
        let base: Option<u32> = row.try_get(1).map_err(postgres_error)?;
        let send: &str = row.try_get(2).map_err(postgres_error)?;
        let subtype: Option<u32> = row.try_get(3).map_err(postgres_error)?;
        let how = match base {
            Some(base) => UserType::Domain(base),
            None => UserType::of(send, subtype.unwrap_or(0)),
        };
        types.insert(type_oid, how);
    }
    Ok(Types(types))
}
