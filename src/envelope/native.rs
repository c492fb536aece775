//! Format `watership`: one JSON object for each change, with the operation, the key, the row
//! before and after, and the place in the stream; and one for each outbox event.

use std::fmt::Write as _;

use crate::column;
use crate::error::{Error, Result};
use crate::event::{
    Change, Column, Event, Identity, OldRow, OutboxPayload, OutboxRow, Row, Table, Value,
};
use crate::route::TablePlan;

use super::{Text, key_columns, key_row, raw, sent_columns};

/// The envelope of an outbox event; the payload stands in it as the application wrote it.
pub(super) fn write_outbox(
    out: &mut Vec<u8>,
    event: &Event,
    row: &OutboxRow,
    committed_at: &str,
) -> Result<()> {
    let _ = write!(Text(out), "{{\"id\":\"{}\",\"aggregate_type\":", event.id.as_hyphenated());
    column::write_string(out, &row.aggregate_type);
    out.extend_from_slice(b",\"aggregate_id\":");
    column::write_string(out, &row.aggregate_id);
    out.extend_from_slice(b",\"event_type\":");
    column::write_string(out, &row.event_type);
    match &row.payload {
        OutboxPayload::Json(json) => {
            out.extend_from_slice(b",\"payload\":");
            out.extend_from_slice(raw::checked_json(json)?.as_bytes());
        }
        OutboxPayload::Empty => out.extend_from_slice(b",\"payload\":null"),
        payload => {
            out.extend_from_slice(b",\"payload_base64\":\"");
            raw::Body::of(payload)?.write_base64(out);
            out.push(b'"');
        }
    }
    end_with_place(out, event, committed_at);
    Ok(())
}

/// The envelope of a change.
pub(super) fn write_change(
    out: &mut Vec<u8>,
    event: &Event,
    plan: &TablePlan,
    change: &Change,
    committed_at: &str,
) -> Result<()> {
    let table = &*event.table;
    out.extend_from_slice(b"{\"op\":\"");
    out.extend_from_slice(event.op().as_str().as_bytes());
    out.extend_from_slice(b"\",");
    out.extend_from_slice(&plan.source_json);
    // A captured change comes from the WAL: its mark is the commit LSN.
    let _ = write!(Text(out), "\"{}\",\"xid\":{}}}", event.position.mark.lsn(), event.xid);
    out.extend_from_slice(b",\"key\":");
    match key_row(change) {
        Some(row) => write_row(out, table, row, key_columns(plan, change))?,
        None => out.extend_from_slice(b"null"),
    }
    let (before, after) = match change {
        Change::Insert { new } | Change::Read { new, .. } => (None, Some(new)),
        Change::Update { old, new } => (old.as_ref(), Some(new)),
        Change::Delete { old } => (Some(old), None),
        Change::Truncate => (None, None),
    };
    out.extend_from_slice(b",\"before\":");
    match (before, &table.identity) {
        (None, _) => out.extend_from_slice(b"null"),
        (Some(OldRow::Full(row)), _) => write_row(out, table, row, 0..row.len())?,
        (Some(OldRow::Key(row)), identity) => {
            let wanted: &[usize] = match identity {
                Identity::Columns(columns) => columns,
                Identity::Full | Identity::Nothing => &[],
            };
            write_row(out, table, row, sent_columns(wanted, Some(row)))?;
        }
    }
    out.extend_from_slice(b",\"after\":");
    match after {
        None => out.extend_from_slice(b"null"),
        Some(row) => {
            write_row(out, table, row, 0..row.len())?;
            write_unchanged(out, table, row);
        }
    }
    end_with_place(out, event, committed_at);
    Ok(())
}

/// The last members, the same in both envelopes: where in the stream it happened, and when.
fn end_with_place(out: &mut Vec<u8>, event: &Event, committed_at: &str) {
    out.extend_from_slice(b",\"position\":\"");
    out.extend_from_slice(&event.position.text());
    out.extend_from_slice(b"\",\"committed_at\":\"");
    out.extend_from_slice(committed_at.as_bytes());
    out.extend_from_slice(b"\"}");
}

/// The row as a JSON object of these columns; unchanged TOAST values are absent.
pub(super) fn write_row(
    out: &mut Vec<u8>,
    table: &Table,
    row: &Row,
    columns: impl Iterator<Item = usize>,
) -> Result<()> {
    let mut separator = b'{';
    for index in columns {
        let column = &table.columns[index];
        match &row[index] {
            Value::Unchanged => continue,
            value => {
                out.push(separator);
                separator = b',';
                out.extend_from_slice(&column.name_json);
                write_value(out, column, value)?;
            }
        }
    }
    if separator == b'{' {
        out.push(b'{');
    }
    out.push(b'}');
    Ok(())
}

fn write_value(out: &mut Vec<u8>, column: &Column, value: &Value) -> Result<()> {
    match value {
        Value::Null | Value::Unchanged => out.extend_from_slice(b"null"),
        Value::Text(text) => column
            .shape
            .write(out, text)
            .map_err(|e| e.context(format!("column {:?}", column.name)))?,
        Value::Unreadable(value) => {
            let text = format!("column {:?}: {}", column.name, value.why);
            return Err(Error::event(text));
        }
    }
    Ok(())
}

fn write_unchanged(out: &mut Vec<u8>, table: &Table, row: &Row) {
    let mut separator: &[u8] = b",\"unchanged\":[";
    for (column, value) in table.columns.iter().zip(row) {
        if *value == Value::Unchanged {
            out.extend_from_slice(separator);
            separator = b",";
            column::write_string(out, &column.name);
        }
    }
    if separator == b"," {
        out.push(b']');
    }
}
