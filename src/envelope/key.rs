//! Which row a message is about, the columns that name it, and the text of its key. Pure.

use crate::error::{Error, Result};
use crate::event::{Change, Content, Event, OldRow, Row, Table, Value};
use crate::route::{Plan, ShownRow, TablePlan};

/// The row that tells the key after the change (before it, for a delete).
pub(super) fn key_row(change: &Change) -> Option<&Row> {
    match change {
        Change::Insert { new } | Change::Read { new, .. } | Change::Update { new, .. } => Some(new),
        Change::Delete { old } => Some(old.row()),
        Change::Truncate => None,
    }
}

/// What templates may show of the change.
pub(super) fn shown_row<'a>(table: &'a TablePlan, change: &'a Change) -> ShownRow<'a> {
    let is_only_identity = matches!(change, Change::Delete { old: OldRow::Key(_) });
    ShownRow { table, row: key_row(change), is_only_identity }
}

/// The columns that name the row. A delete whose old row does not have the key is named by what it
/// has.
pub(super) fn key_columns<'a>(
    table: &'a TablePlan,
    change: &'a Change,
) -> impl Iterator<Item = usize> + 'a {
    let old = match change {
        Change::Delete { old: OldRow::Key(row) } => Some(row),
        Change::Delete { old: OldRow::Full(_) }
        | Change::Insert { .. }
        | Change::Read { .. }
        | Change::Update { .. }
        | Change::Truncate => None,
    };
    key_columns_of(table, old)
}

/// The same; `old` is a row that is only an identity.
pub(super) fn key_columns_of<'a>(
    table: &'a TablePlan,
    old: Option<&'a Row>,
) -> impl Iterator<Item = usize> + 'a {
    sent_columns(&table.key, old)
}

/// These columns; of an old row that is only an identity, all that were sent where one of these was
/// not. No column of an identity can be null: what is null was not sent.
pub(super) fn sent_columns<'a>(
    wanted: &'a [usize],
    old: Option<&'a Row>,
) -> impl Iterator<Item = usize> + 'a {
    let is_sent = move |column: &usize| old.is_none_or(|row| row[*column] != Value::Null);
    let all = old.filter(|_| wanted.is_empty() || !wanted.iter().all(is_sent));
    let count = all.map_or(wanted.len(), |row| row.len());
    (0..count).map(move |i| if all.is_some() { i } else { wanted[i] }).filter(is_sent)
}

/// `/value/value` of the key columns; for people and logs, not for parsing.
pub(super) fn write_key_text(
    out: &mut String,
    table: &Table,
    plan: &TablePlan,
    change: &Change,
) -> Result<()> {
    let Some(row) = key_row(change) else { return Ok(()) };
    write_row_key_text(out, table, row, key_columns(plan, change))
}

pub(super) fn write_row_key_text(
    out: &mut String,
    table: &Table,
    row: &Row,
    columns: impl Iterator<Item = usize>,
) -> Result<()> {
    for column in columns {
        out.push('/');
        if let Value::Text(text) = &row[column] {
            let text = std::str::from_utf8(text).map_err(|_| {
                Error::event(format!("key column {:?} is not UTF-8", table.columns[column].name))
            })?;
            out.push_str(text);
        }
    }
    Ok(())
}

/// The event's key by this plan, for people and logs.
pub fn key_text(event: &Event, plan: &Plan) -> String {
    let change = match &event.content {
        Content::Outbox(row) => return format!("{}/{}", row.aggregate_type, row.aggregate_id),
        Content::Change(change) => change,
    };
    let mut text = event.table.full_name.to_string();
    if let Some(table) = &plan.table {
        // A key that is not text is shown as far as it is.
        let _ = write_key_text(&mut text, &event.table, table, change);
    }
    text
}
