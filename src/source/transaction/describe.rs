//! From the stream's description of a table (Relation) to what its changes are to the relay. Pure.
//!
//! Invariant: the key of a captured table and its replica identity are two things. The identity is
//! what the stream says it is; the key is the primary key, in column order whatever the identity in
//! force. Where the stream does not carry it, the key is known and not covered by the identity, or
//! it is not known and empty: then nothing of the table overtakes anything else of it (`route`).

use std::collections::BTreeMap;
use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use super::canary::CanaryColumns;
use super::outbox_row::OutboxColumns;
use super::{CapturedTable, HeldTable, Options};
use crate::error::{Error, Result};
use crate::event::{Column, Identity, Table, id};
use crate::pg::pgoutput::{Relation, ReplicaIdentity};

/// Schema of the relay's own tables. None of them is an event, but the outbox is read.
const OWN_SCHEMA: &str = "watership";
const CANARY: &str = "canary";

/// A table of the stream.
#[derive(Debug)]
pub(super) struct Described {
    pub(super) table: Arc<Table>,
    pub(super) role: Role,
    /// The first column whose type is not among those that this session read of the catalog.
    pub(super) unknown_type: Option<usize>,
    /// Its key from where the catalog was read, if it differs.
    pub(super) later_key: Option<Vec<usize>>,
}

/// What the changes of a table are to the relay.
#[derive(Debug)]
pub(super) enum Role {
    /// Events that applications wrote.
    Outbox(Box<OutboxColumns>),
    /// Events; with the columns that their ids are made of.
    Captured(Vec<usize>),
    /// The canary; where its columns are, if they can be found.
    Canary(Option<CanaryColumns>),
    /// Another of our own tables.
    Own,
    /// In the publication, but nobody asked for it.
    Unwanted,
}

/// `is_older` says that what was read of the catalog is younger than this description.
pub(super) fn describe(
    relation: &Relation<'_>,
    options: &Options,
    is_older: bool,
) -> Result<Described> {
    let (schema, name) = (relation.namespace, relation.name);
    let described = format!("{schema}.{name}");
    let columns: Vec<Column> = relation
        .columns()
        .map(|column| {
            Column::of(column.name, column.type_oid, column.type_modifier, &options.types)
        })
        .collect();
    let captured = captured(options, &described, relation.id);
    let full_name = captured.map_or(&described, |(name, _)| name);
    let captured = captured.map(|(_, captured)| captured);
    let (identity, version) = (identity(relation), version(relation));
    let key_of =
        |is_older| key(relation.replica_identity, &identity, &columns, version, captured, is_older);
    let key = key_of(is_older);
    let later_key = (is_older && captured.is_some()).then(|| key_of(false));
    let later_key = later_key.filter(|later| *later != key);
    let table = Arc::new(Table {
        database: options.database.clone(),
        oid: relation.id,
        version,
        schema: schema.to_owned(),
        name: name.to_owned(),
        key,
        full_name: full_name.as_str().into(),
        columns,
        identity,
    });
    let outbox = &options.outbox;
    let is_outbox = (schema, name) == (&*outbox.table.schema, &*outbox.table.name);
    // A mapped table is the outbox under any name; a rename must not lose its events.
    let role = if is_outbox || outbox.catalog.oid == Some(relation.id) {
        Role::Outbox(Box::new(OutboxColumns::find(&table, outbox, is_older)?))
    } else if schema == OWN_SCHEMA {
        match name {
            CANARY => Role::Canary(CanaryColumns::find(&table)),
            _ => Role::Own,
        }
    } else if captured.is_some() {
        Role::Captured(id::columns(&table))
    } else {
        Role::Unwanted
    };
    let unknown_type = table.columns.iter().position(|c| !options.types.knows(c.type_oid));
    Ok(Described { table, role, unknown_type, later_key })
}

/// Whether each change of the table says which row it is about, by the key that the catalog names.
pub(super) fn names_every_row(table: &Table, options: &Options) -> bool {
    let Some((_, captured)) = captured(options, &table.full_name, table.oid) else { return true };
    let known = captured.primary_key.is_empty() || !table.key.is_empty();
    let carried = captured.inserts_only
        || table.identity == Identity::Nothing
        || table.identity.covers(&table.key);
    known && carried
}

/// Whether a partition, described right after its root, sends of an old row at least what the root
/// is said to send. The stream names the root in every change, never the partition.
pub(super) fn sends_like_root(root: &Table, partition: &Relation<'_>, options: &Options) -> bool {
    let Some((_, captured)) = captured(options, &root.full_name, root.oid) else { return true };
    if captured.inserts_only || partition.replica_identity == ReplicaIdentity::Full {
        return true;
    }
    // In a truncate of several tables another table may come after a root.
    let is_partition = partition.columns().count() == root.columns.len()
        && partition.columns().all(|column| root.column(column.name).is_some());
    if !is_partition {
        return true;
    }
    let flagged = |column: &usize| {
        let name = &*root.columns[*column].name;
        partition.columns().any(|column| column.key && column.name == name)
    };
    match &root.identity {
        Identity::Full => false,
        Identity::Columns(columns) => columns.iter().chain(&root.key).all(flagged),
        Identity::Nothing => root.key.iter().all(flagged),
    }
}

/// The same table, if nothing is known of what its changes say about old rows: another description.
pub(super) fn without_identity(table: &Table) -> Arc<Table> {
    let (identity, version) = (Identity::Nothing, !table.version);
    Arc::new(Table { identity, version, ..table.clone() })
}

/// Whether a partition's rows come under the name of this table.
pub(super) fn is_root(table: &Table, options: &Options) -> bool {
    captured(options, &table.full_name, table.oid).is_some_and(|(_, captured)| captured.partitioned)
}

/// Whether it is the description that was stored last.
pub(super) fn is_former(table: &Table, options: &Options) -> bool {
    let captured = captured(options, &table.full_name, table.oid);
    captured.and_then(|(_, captured)| captured.former.as_ref()).is_some_and(|former| {
        let key = table.key.iter().map(|column| &table.columns[*column].name);
        former.version == table.version && key.eq(&former.key)
    })
}

/// By OID, or by name: a table that was renamed is still captured, and its changes before and after
/// that are of one table, whose name is that of the configuration. A table that was created again
/// has another OID; what came before is recognised by the name. Of a held table that is lost, only
/// what was written under its name is taken.
fn captured<'a>(
    options: &'a Options,
    described: &str,
    oid: u32,
) -> Option<(&'a String, &'a CapturedTable)> {
    let captured = &options.captured;
    let is_it = |(name, table): &(&String, &CapturedTable)| {
        table.oid == oid && (!table.is_lost() || *name == described)
    };
    let by_name = || captured.get_key_value(described).filter(|(_, table)| !table.is_lost());
    captured.iter().find(is_it).or_else(by_name)
}

/// The held table that has just gone or come, as this description shows, which is younger than what
/// was read of the catalog: another table has its name, or it has another name.
pub(super) fn held_is_another<'a>(
    relation: &Relation<'_>,
    options: &'a Options,
) -> Option<&'a String> {
    let is_named = |name: &str| {
        name.split_once('.').is_some_and(|name| name == (relation.namespace, relation.name))
    };
    let is_another = |(name, table): &(&String, &CapturedTable)| match table.held {
        None => false,
        Some(HeldTable::There) => (table.oid == relation.id) != is_named(name),
        Some(HeldTable::Lost { unfit }) => is_named(name) && relation.id != unfit,
    };
    options.captured.iter().find(is_another).map(|(name, _)| name)
}

/// What this session read of the catalog is older than the stream: the next one compares them, and
/// refuses what cannot work.
pub(super) fn just_changed(table: &str) -> Error {
    Error::protocol(format!("the key or the replica identity of {table} has just changed"))
        .hint("no action needed: the next session reads it again")
}

/// The next session finds out which, leaves out what is not certain, and says what may be missing.
pub(super) fn just_lost_or_found(table: &str) -> Error {
    Error::protocol(format!("the held table {table} has just been lost, or is back"))
        .hint("no action needed: the next session checks it, and says what may be missing")
}

/// The table of a change.
pub(super) fn described(tables: &BTreeMap<u32, Described>, relation: u32) -> Result<&Described> {
    tables.get(&relation).ok_or_else(|| {
        Error::protocol(format!("a change of relation {relation}, which was never described"))
    })
}

fn identity(relation: &Relation<'_>) -> Identity {
    let flagged = relation.columns().enumerate().filter(|(_, column)| column.key);
    let flagged: Vec<usize> = flagged.map(|(index, _)| index).collect();
    match relation.replica_identity {
        ReplicaIdentity::Full => Identity::Full,
        ReplicaIdentity::Nothing => Identity::Nothing,
        ReplicaIdentity::Default | ReplicaIdentity::Index if flagged.is_empty() => {
            Identity::Nothing
        }
        ReplicaIdentity::Default | ReplicaIdentity::Index => Identity::Columns(flagged),
    }
}

fn key(
    kind: ReplicaIdentity,
    identity: &Identity,
    columns: &[Column],
    version: u64,
    captured: Option<&CapturedTable>,
    is_older: bool,
) -> Vec<usize> {
    let index = |name: &String| columns.iter().position(|column| column.name == *name);
    let of = |names: &[String]| -> Option<Vec<usize>> {
        let mut key: Vec<usize> = names.iter().map(index).collect::<Option<_>>()?;
        key.sort_unstable();
        Some(key)
    };
    let named = || -> Option<Vec<usize>> {
        let captured = captured?;
        let now = of(&captured.primary_key);
        if !is_older {
            return now;
        }
        // The same description has the same key as before, whatever the catalog says by now.
        match &captured.former {
            Some(former) if former.version == version && !former.key.is_empty() => of(&former.key),
            Some(former) => now.or_else(|| renamed(columns, captured)).or_else(|| of(&former.key)),
            None => now.or_else(|| renamed(columns, captured)),
        }
    };
    match (kind, identity) {
        // The primary key as it was when this was written: a column may have another name now.
        (ReplicaIdentity::Default, Identity::Columns(flagged)) => flagged.clone(),
        (ReplicaIdentity::Index, Identity::Columns(flagged)) => match named() {
            Some(key) if !key.is_empty() => key,
            // The key has other names by now, and the next session reads them.
            None if !is_older => Vec::new(),
            Some(_) | None => flagged.clone(),
        },
        _ => named().unwrap_or_default(),
    }
}

/// The key of a description from before its columns were renamed: by their places. Absent where a
/// column before them has changed in another way than by its name.
fn renamed(columns: &[Column], captured: &CapturedTable) -> Option<Vec<usize>> {
    let leading = &captured.leading;
    let place = |name: &String| leading.iter().position(|column| column == name);
    let mut key: Vec<usize> = captured.primary_key.iter().map(place).collect::<Option<_>>()?;
    let count = key.iter().max()? + 1;
    let is_same = |(now, then): (&String, &Column)| {
        let then_there = columns.iter().any(|column| column.name == *now);
        *now == then.name || !(then_there || leading.contains(&then.name))
    };
    let same = leading.iter().zip(columns).take(count).all(is_same);
    key.sort_unstable();
    (same && columns.len() >= count).then_some(key)
}

/// The same for the same description, in every session.
fn version(relation: &Relation<'_>) -> u64 {
    let mut hasher = Xxh64::new(0);
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add(relation.namespace.as_bytes());
    add(relation.name.as_bytes());
    add(&[relation.replica_identity as u8]);
    for column in relation.columns() {
        add(column.name.as_bytes());
        add(&column.type_oid.to_le_bytes());
        add(&column.type_modifier.to_le_bytes());
        add(&[u8::from(column.key)]);
    }
    hasher.digest()
}
