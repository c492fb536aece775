//! Format `debezium`, for captured tables: the change event of Debezium's PostgreSQL connector.
//!
//! Invariant: one change is one record or several (a key change is a delete and a create; a
//! tombstone follows a delete), and each is a message of its own with a number, so that order and
//! ids hold on every attempt. The times of the source are those of the commit.
//!
//! <https://debezium.io/documentation/reference/stable/connectors/postgresql.html>, "Data change
//! events".

use std::fmt::Write as _;

use super::{Text, key_columns_of, sent_columns};
use crate::error::{Error, Result};
use crate::event::{Change, Event, Identity, OldRow, Row, Value};
use crate::route::{Debezium, DebeziumTable, TablePlan};

/// What a record says of the change.
#[derive(Debug, Clone, Copy)]
pub(super) enum Record<'a> {
    Create {
        new: &'a Row,
        old_key: Option<&'a Row>,
    },
    /// A backfill read the row.
    Read {
        new: &'a Row,
    },
    Update {
        old: Option<&'a OldRow>,
        new: &'a Row,
    },
    Delete {
        old: &'a OldRow,
        new_key: Option<&'a Row>,
    },
    Tombstone {
        old: &'a OldRow,
    },
    Truncate,
}

impl<'a> Record<'a> {
    /// Record number `part` of the change.
    pub(super) fn of(change: &'a Change, table: &TablePlan, tombstones: bool, part: u16) -> Self {
        match (change, part) {
            (Change::Insert { new }, _) => Record::Create { new, old_key: None },
            (Change::Read { new, .. }, _) => Record::Read { new },
            (Change::Truncate, _) => Record::Truncate,
            (Change::Delete { old }, 0) => Record::Delete { old, new_key: None },
            (Change::Delete { old }, _) => Record::Tombstone { old },
            (Change::Update { old: Some(old), new }, part) if changes_key(table, old, new) => {
                match (part, tombstones) {
                    (0, _) => Record::Delete { old, new_key: Some(new) },
                    (1, true) => Record::Tombstone { old },
                    _ => Record::Create { new, old_key: Some(old.row()) },
                }
            }
            (Change::Update { old, new }, _) => Record::Update { old: old.as_ref(), new },
        }
    }

    /// The operation, as in `ws-op`.
    pub(super) fn op(self) -> &'static str {
        match self {
            Record::Create { .. } => "insert",
            Record::Read { .. } => "read",
            Record::Update { .. } => "update",
            Record::Delete { .. } | Record::Tombstone { .. } => "delete",
            Record::Truncate => "truncate",
        }
    }

    /// The row that tells the record's key, and whether it is only an identity.
    pub(super) fn key_row(self) -> Option<(&'a Row, bool)> {
        match self {
            Record::Create { new, .. } | Record::Read { new } | Record::Update { new, .. } => {
                Some((new, false))
            }
            Record::Delete { old, .. } | Record::Tombstone { old } => {
                Some((old.row(), matches!(old, OldRow::Key(_))))
            }
            Record::Truncate => None,
        }
    }

    /// The header that links the two records of a key change, and the row with the other key.
    pub(super) fn link(self) -> Option<(&'static str, &'a Row)> {
        match self {
            Record::Create { old_key: Some(row), .. } => Some(("__debezium.oldkey", row)),
            Record::Delete { new_key: Some(row), .. } => Some(("__debezium.newkey", row)),
            _ => None,
        }
    }
}

/// How many records a change is.
pub(super) fn records(change: &Change, table: &TablePlan, tombstones: bool) -> u16 {
    match change {
        Change::Delete { .. } => 1 + u16::from(tombstones),
        Change::Update { old: Some(old), new } if changes_key(table, old, new) => {
            2 + u16::from(tombstones)
        }
        Change::Insert { .. } | Change::Read { .. } => 1,
        Change::Update { .. } | Change::Truncate => 1,
    }
}

/// Both keys are known, and they differ.
fn changes_key(table: &TablePlan, old: &OldRow, new: &Row) -> bool {
    let before = old.row();
    let is_only_identity = matches!(old, OldRow::Key(_));
    let is_known = |column: &usize| match (&before[*column], &new[*column]) {
        (_, Value::Unchanged) | (Value::Unchanged, _) => false,
        (Value::Null, _) => !is_only_identity,
        _ => true,
    };
    table.identity_has_key
        && !table.key.is_empty()
        && table.key.iter().all(is_known)
        && table.key.iter().any(|column| before[*column] != new[*column])
}

/// The record's key: `{"id":7}`; empty for a table without a key, and for a truncate.
pub(super) fn write_key(
    out: &mut String,
    table: &TablePlan,
    format: &DebeziumTable,
    row: Option<(&Row, bool)>,
) -> Result<()> {
    out.clear();
    let Some((row, is_only_identity)) = row.filter(|_| !table.key.is_empty()) else {
        return Ok(());
    };
    let mut bytes = std::mem::take(out).into_bytes();
    let columns = key_columns_of(table, is_only_identity.then_some(row));
    write_columns(&mut bytes, table, format, row, columns, None)?;
    *out = String::from_utf8(bytes).expect("JSON is UTF-8");
    Ok(())
}

/// The body; a tombstone has none. `us` is the time of the event.
pub(super) fn write(
    out: &mut Vec<u8>,
    event: &Event,
    table: &TablePlan,
    (format, debezium): (&DebeziumTable, &Debezium),
    record: Record<'_>,
    us: i64,
) -> Result<()> {
    let (op, before, after) = match record {
        Record::Create { new, .. } => ('c', None, Some(new)),
        Record::Read { new } => ('r', None, Some(new)),
        Record::Update { old, new } => ('u', old, Some(new)),
        Record::Delete { old, .. } => ('d', Some(old), None),
        Record::Truncate => ('t', None, None),
        Record::Tombstone { .. } => return Ok(()),
    };
    out.extend_from_slice(b"{\"before\":");
    match (before, &table.table.identity) {
        (None, _) => out.extend_from_slice(b"null"),
        (Some(OldRow::Full(row)), _) => {
            write_columns(out, table, format, row, 0..row.len(), Some(debezium))?;
        }
        (Some(OldRow::Key(row)), identity) => {
            let wanted: &[usize] = match identity {
                Identity::Columns(columns) => columns,
                Identity::Full | Identity::Nothing => &[],
            };
            write_columns(out, table, format, row, sent_columns(wanted, Some(row)), None)?;
        }
    }
    out.extend_from_slice(b",\"after\":");
    match after {
        None => out.extend_from_slice(b"null"),
        Some(row) => write_columns(out, table, format, row, 0..row.len(), Some(debezium))?,
    }
    out.extend_from_slice(b",\"source\":");
    write_source(out, event, format, matches!(record, Record::Read { .. }));
    let _ = write!(Text(out), ",\"op\":\"{op}\",");
    write_times(out, us);
    out.extend_from_slice(b",\"transaction\":null}");
    Ok(())
}

/// A row that a backfill read is of no transaction.
fn write_source(out: &mut Vec<u8>, event: &Event, format: &DebeziumTable, is_read: bool) {
    out.extend_from_slice(&format.source_json);
    out.push(b',');
    write_times(out, event.committed_at_us);
    let commit = event.position.mark.0;
    let _ = match is_read {
        true => write!(Text(out), ",\"txId\":null,\"lsn\":"),
        false => write!(Text(out), ",\"txId\":{},\"lsn\":", event.xid),
    };
    let _ = match event.lsn {
        Some(lsn) => write!(
            Text(out),
            "{lsn},\"xmin\":null,\"sequence\":\"[\\\"{commit}\\\",\\\"{lsn}\\\"]\"",
            lsn = lsn.0,
        ),
        None => write!(Text(out), "null,\"xmin\":null,\"sequence\":\"[\\\"{commit}\\\",null]\"",),
    };
    let snapshot = if is_read { "incremental" } else { "false" };
    let _ = write!(Text(out), ",\"snapshot\":\"{snapshot}\"}}");
}

fn write_times(out: &mut Vec<u8>, us: i64) {
    let ms = us.div_euclid(1000);
    // The year 2262 is the end of 64 bits of nanoseconds.
    let ns = us.saturating_mul(1000);
    let _ = write!(Text(out), "\"ts_ms\":{ms},\"ts_us\":{us},\"ts_ns\":{ns}");
}

/// These columns of the row, without those of a type that Debezium does not know. With `debezium`
/// a placeholder stands for a value that was not sent.
fn write_columns(
    out: &mut Vec<u8>,
    table: &TablePlan,
    format: &DebeziumTable,
    row: &Row,
    columns: impl Iterator<Item = usize>,
    debezium: Option<&Debezium>,
) -> Result<()> {
    let mut separator = b'{';
    for index in columns {
        let (column, Some(writer)) = (&table.table.columns[index], format.writers[index]) else {
            continue;
        };
        let start = out.len();
        out.push(separator);
        out.extend_from_slice(&column.name_json);
        match &row[index] {
            Value::Null => out.extend_from_slice(b"null"),
            Value::Text(text) => writer
                .write(out, text)
                .map_err(|error| error.context(format!("column {:?}", column.name)))?,
            Value::Unreadable(value) => {
                return Err(Error::event(format!("column {:?}: {}", column.name, value.why)));
            }
            Value::Unchanged => match debezium {
                Some(debezium) => writer.write_unavailable(out, &debezium.values),
                None => {
                    out.truncate(start);
                    continue;
                }
            },
        }
        separator = b',';
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    Ok(())
}
