//! From the stream's description of a table (Relation) to what its changes are to the relay. Pure.
//!
//! Invariant: the key of a captured table and its replica identity are two things. The identity is
//! what the stream says it is; the key is the primary key, in column order whatever the identity in
//! force. Where the stream does not carry it, the key is known and not covered by the identity, or
//! it is not known and empty: then nothing of the table overtakes anything else of it (`route`).

use std::sync::Arc;

use xxhash_rust::xxh64::Xxh64;

use super::canary::CanaryColumns;
use super::rows::OutboxColumns;
use super::{CapturedTable, Options};
use crate::error::Result;
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
}

/// What the changes of a table are to the relay.
#[derive(Debug)]
pub(super) enum Role {
    /// Events that applications wrote.
    Outbox(OutboxColumns),
    /// Events; with the columns that their ids are made of.
    Captured(Vec<usize>),
    /// The canary; where its columns are, if they can be found.
    Canary(Option<CanaryColumns>),
    /// Another of our own tables.
    Own,
    /// In the publication, but nobody asked for it.
    Unwanted,
}

pub(super) fn describe(relation: &Relation<'_>, options: &Options) -> Result<Described> {
    let (schema, name) = (relation.namespace, relation.name);
    let full_name = format!("{schema}.{name}");
    let columns: Vec<Column> = relation
        .columns()
        .map(|column| Column::new(column.name, column.type_oid, column.type_modifier))
        .collect();
    let captured = captured(options, &full_name, relation.id);
    let (identity, version) = (identity(relation), version(relation));
    let table = Arc::new(Table {
        database: options.database.clone(),
        oid: relation.id,
        version,
        schema: schema.to_owned(),
        name: name.to_owned(),
        key: key(relation.replica_identity, &identity, &columns, version, captured),
        full_name: full_name.into(),
        columns,
        identity,
    });
    let outbox = &options.outbox;
    let role = if (schema, name) == (&*outbox.table.schema, &*outbox.table.name) {
        Role::Outbox(OutboxColumns::find(&table, &outbox.columns)?)
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
    Ok(Described { table, role })
}

/// Whether each change of the table says which row it is about, by the key that the catalog names.
pub(super) fn names_every_row(table: &Table, options: &Options) -> bool {
    let Some(captured) = captured(options, &table.full_name, table.oid) else { return true };
    let known = captured.primary_key.is_empty() || !table.key.is_empty();
    known && (table.identity == Identity::Nothing || table.identity.covers(&table.key))
}

/// The version of the description that was stored last.
pub(super) fn former_version(table: &Table, options: &Options) -> Option<u64> {
    captured(options, &table.full_name, table.oid)?.former.as_ref().map(|former| former.version)
}

/// By name, or by OID: a table that was renamed is still captured, and the next comparison with
/// the catalog decides about it.
fn captured<'a>(options: &'a Options, full_name: &str, oid: u32) -> Option<&'a CapturedTable> {
    let captured = &options.captured;
    captured.get(full_name).or_else(|| captured.values().find(|table| table.oid == oid))
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
) -> Vec<usize> {
    let index = |name: &String| columns.iter().position(|column| column.name == *name);
    let of = |names: &[String]| -> Option<Vec<usize>> {
        let mut key: Vec<usize> = names.iter().map(index).collect::<Option<_>>()?;
        key.sort_unstable();
        Some(key)
    };
    let named = || -> Option<Vec<usize>> {
        let captured = captured?;
        let former = captured.former.as_ref();
        // The same description has the same key as before, whatever the catalog says by now.
        if let Some(former) = former.filter(|former| former.version == version) {
            return of(&former.key);
        }
        of(&captured.primary_key).or_else(|| of(&former?.key))
    };
    match (kind, identity) {
        // The primary key as it was when this was written: a column may have another name now.
        (ReplicaIdentity::Default, Identity::Columns(flagged)) => flagged.clone(),
        (ReplicaIdentity::Index, Identity::Columns(flagged)) => {
            named().filter(|key| !key.is_empty()).unwrap_or_else(|| flagged.clone())
        }
        _ => named().unwrap_or_default(),
    }
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
