//! What rides on a checkpoint: things that must be durable exactly with a position. Pure.
//!
//! Invariant: a rider is written in the transaction of the first checkpoint that covers it, and
//! only if that checkpoint is: each statement asks for the session and the position that were just
//! written. To add a rider: a variant here, and its statement in `sql/query/rider_*.sql`.

use std::sync::Arc;

use serde::Serialize;

use crate::event::Table;
use crate::position::Position;
use crate::relay::parking::row::{Changed, ParkedRow, changes_to_json, rows_to_json};
use crate::route::SchemaChange;
use crate::route::description::Description;
use crate::source::{CanarySighting, Cursor, Moved, Note};

/// One of them: all of its kind that go with one checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Rider {
    /// Messages that were parked; a row that is there already stays as it is.
    Parked(Vec<ParkedRow>),
    /// What became of parked rows that are there.
    Unparked(Vec<Changed>),
    /// How captured tables are described from here on; the later of two for one table counts.
    Described(Vec<Arc<Table>>),
    /// How far backfills are; the later of two for one run counts.
    Backfilled(Vec<Cursor>),
    /// Rows that backfills have to read again.
    Moved(Vec<Moved>),
    /// What is different about captured tables from here on.
    Changed(Vec<SchemaChange>),
    /// The last canary that was received.
    Canary(CanarySighting),
}

/// The kinds, in the order of their statements.
pub const STATEMENTS: [&str; 7] = [
    include_str!("../../../sql/query/rider_parked.sql"),
    include_str!("../../../sql/query/rider_unparked.sql"),
    include_str!("../../../sql/query/rider_described.sql"),
    include_str!("../../../sql/query/rider_backfilled.sql"),
    include_str!("../../../sql/query/rider_changed.sql"),
    include_str!("../../../sql/query/rider_moved.sql"),
    include_str!("../../../sql/query/rider_canary.sql"),
];

impl Rider {
    /// Index of its statement in [`STATEMENTS`].
    pub fn statement(&self) -> usize {
        match self {
            Rider::Parked(_) => 0,
            Rider::Unparked(_) => 1,
            Rider::Described(_) => 2,
            Rider::Backfilled(_) => 3,
            Rider::Changed(_) => 4,
            Rider::Moved(_) => 5,
            Rider::Canary(_) => 6,
        }
    }

    /// Its content as a JSON array, the parameter of its statement next to the position.
    pub fn to_json(&self) -> String {
        match self {
            Rider::Parked(rows) => rows_to_json(rows),
            Rider::Unparked(changes) => changes_to_json(changes),
            Rider::Described(tables) => {
                let latest = |(at, table): &(usize, &Arc<Table>)| {
                    !tables[at + 1..].iter().any(|later| later.oid == table.oid)
                };
                let rows = tables.iter().enumerate().filter(latest);
                let rows: Vec<JsonTable<'_>> =
                    rows.map(|(_, table)| JsonTable::of(table)).collect();
                serde_json::to_string(&rows).expect("names and numbers are JSON")
            }
            Rider::Backfilled(cursors) => {
                let latest = |(at, cursor): &(usize, &Cursor)| {
                    !cursors[at + 1..].iter().any(|later| later.run == cursor.run)
                };
                let rows = cursors.iter().enumerate().filter(latest);
                let rows: Vec<JsonCursor<'_>> =
                    rows.map(|(_, cursor)| JsonCursor::of(cursor)).collect();
                serde_json::to_string(&rows).expect("texts and numbers are JSON")
            }
            Rider::Moved(rows) => {
                let rows: Vec<JsonMoved> = rows.iter().map(JsonMoved::of).collect();
                serde_json::to_string(&rows).expect("texts and numbers are JSON")
            }
            Rider::Canary(canary) => {
                let row = (canary.number, canary.end.to_string());
                serde_json::to_string(&row).expect("texts and numbers are JSON")
            }
            Rider::Changed(changes) => {
                let rows: Vec<JsonChange<'_>> = changes.iter().map(JsonChange::of).collect();
                serde_json::to_string(&rows).expect("names and numbers are JSON")
            }
        }
    }
}

/// The riders that notes become, one of a kind.
pub fn of_notes(notes: Vec<Note>) -> Vec<Rider> {
    let (mut tables, mut cursors, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut moved, mut canary) = (Vec::new(), None);
    for note in notes {
        match note {
            Note::Described(table) => tables.push(table),
            Note::Backfilled(cursor) => cursors.push(cursor),
            Note::Moved(row) => moved.push(row),
            Note::Changed(change) => changes.push(*change),
            Note::Canary(last) => canary = Some(last),
        }
    }
    let mut riders = Vec::new();
    if !tables.is_empty() {
        riders.push(Rider::Described(tables));
    }
    if !cursors.is_empty() {
        riders.push(Rider::Backfilled(cursors));
    }
    if !moved.is_empty() {
        riders.push(Rider::Moved(moved));
    }
    if !changes.is_empty() {
        riders.push(Rider::Changed(changes));
    }
    riders.extend(canary.map(Rider::Canary));
    riders
}

#[derive(Serialize)]
struct JsonCursor<'a> {
    run: String,
    last_key: Option<&'a [String]>,
    rows: u64,
    left_out: u64,
    reread: &'a [String],
    done: bool,
}

#[derive(Serialize)]
struct JsonMoved {
    relation: u32,
    position: String,
    key: Option<serde_json::Map<String, serde_json::Value>>,
}

impl JsonMoved {
    fn of(row: &Moved) -> Self {
        let Moved { relation, position, key } = row;
        let text = |(name, text): &(String, String)| (name.clone(), text.as_str().into());
        let key = key.as_ref().map(|key| key.iter().map(text).collect());
        Self { relation: *relation, position: position.to_string(), key }
    }
}

impl<'a> JsonCursor<'a> {
    fn of(cursor: &'a Cursor) -> Self {
        let Cursor { run, last_key, rows, left_out, reread, done, token: _ } = cursor;
        let (rows, left_out, done) = (*rows, *left_out, *done);
        let last_key = last_key.as_deref();
        Self { run: run.to_string(), last_key, rows, left_out, reread, done }
    }
}

#[derive(Serialize)]
struct JsonChange<'a> {
    table_name: &'a str,
    relation: u32,
    epoch: u32,
    mark: u64,
    ordinal: u64,
    sub: u32,
    description: &'a Description,
    changes: Vec<String>,
    broken: Vec<&'a str>,
}

impl<'a> JsonChange<'a> {
    fn of(change: &'a SchemaChange) -> Self {
        let Position { epoch, mark, ordinal, sub } = change.position;
        Self {
            table_name: &change.table,
            relation: change.relation,
            epoch,
            mark: mark.0,
            ordinal,
            sub,
            description: &change.description,
            changes: change.differences.iter().map(ToString::to_string).collect(),
            broken: change.broken.iter().map(|(route, _)| &**route).collect(),
        }
    }
}

#[derive(Serialize)]
struct JsonTable<'a> {
    relation: u32,
    /// Postgres has no unsigned numbers; the bits are the same.
    version: i64,
    schema_name: &'a str,
    table_name: &'a str,
    key: Vec<&'a str>,
}

impl<'a> JsonTable<'a> {
    fn of(table: &'a Table) -> Self {
        Self {
            relation: table.oid,
            version: table.version as i64,
            schema_name: &table.schema,
            table_name: &table.name,
            key: table.key.iter().map(|column| &*table.columns[*column].name).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Column, Identity};

    #[test]
    fn of_two_descriptions_of_one_table_the_later_is_written() {
        let table = |oid, version, name: &str| {
            Arc::new(Table {
                database: "shop".into(),
                oid,
                version,
                schema: "public".into(),
                name: "t".into(),
                full_name: "public.t".into(),
                columns: vec![Column::new(name, 23, -1)],
                key: vec![0],
                identity: Identity::Full,
            })
        };
        let tables = [table(1, 7, "id"), table(2, u64::MAX, "id"), table(1, 8, "new_id")];
        let riders = of_notes(tables.map(Note::Described).into());
        let [rider] = &riders[..] else { panic!("{riders:?}") };
        let row = |relation, version, key| {
            format!(
                "{{\"relation\":{relation},\"version\":{version},\"schema_name\":\"public\",\
                 \"table_name\":\"t\",\"key\":[\"{key}\"]}}"
            )
        };
        assert_eq!(rider.to_json(), format!("[{},{}]", row(2, -1, "id"), row(1, 8, "new_id")));
        assert_eq!(of_notes(Vec::new()), []);
    }
}
