//! From a tuple of the stream to the values of a row, and to a row of the outbox. Pure.

use std::borrow::Cow;
use std::cell::OnceCell;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use super::options::{Options, OutboxNames};
use crate::column::binary::Types;
use crate::column::{instant, oid};
use crate::error::{Error, Result};
use crate::event::{
    self, Broken, Identity, OldRow, OutboxPayload, OutboxRow, Row, Table, Unreadable, Value,
};
use crate::pg::pgoutput::{self, OldKind, OldTuple, Tuple};
use crate::verdict::Verdict;

/// Columns of an outbox row that are looked at; more are allowed and ignored.
const OUTBOX_COLUMNS_MAX: usize = 32;
/// Bytes of a value without a text form that are kept, for people.
const KEPT_MAX: usize = 1 << 20;

/// Where the columns of the outbox are.
#[derive(Debug)]
pub(super) struct OutboxColumns {
    id: usize,
    aggregate_type: usize,
    aggregate_id: usize,
    event_type: usize,
    payload: Option<usize>,
    data: Option<usize>,
    content_type: Option<usize>,
    headers: Option<usize>,
    traceparent: Option<usize>,
    created_at: Option<usize>,
    /// How many columns lie up to the last of them: the rest need not be read.
    count: usize,
}

impl OutboxColumns {
    pub(super) fn find(table: &Table, names: &OutboxNames) -> Result<Self> {
        let needed = |name: &str| {
            table.column(name).filter(|i| *i < OUTBOX_COLUMNS_MAX).ok_or_else(|| {
                let text = format!("column {name:?} is missing in {}", table.full_name);
                Error::named(Verdict::OutboxAltered, text)
                    .hint("restore the column, or put it into the publication's column list")
            })
        };
        let optional = |name: &str| table.column(name).filter(|i| *i < OUTBOX_COLUMNS_MAX);
        let mut columns = Self {
            id: needed(&names.id)?,
            aggregate_type: needed(&names.aggregate_type)?,
            aggregate_id: needed(&names.aggregate_id)?,
            event_type: needed(&names.event_type)?,
            payload: optional(&names.payload),
            data: optional(&names.data),
            content_type: optional(&names.content_type),
            headers: optional(&names.headers),
            traceparent: optional(&names.traceparent),
            created_at: optional(&names.created_at),
            count: 0,
        };
        let needed_ones =
            [columns.id, columns.aggregate_type, columns.aggregate_id, columns.event_type];
        let optional_ones = [
            columns.payload,
            columns.data,
            columns.content_type,
            columns.headers,
            columns.traceparent,
            columns.created_at,
        ];
        let last = needed_ones.into_iter().chain(optional_ones.into_iter().flatten()).max();
        columns.count = last.map_or(0, |last| last + 1);
        if columns.payload.is_none() && columns.data.is_none() {
            return needed(&names.payload).map(|_| columns);
        }
        Ok(columns)
    }
}

/// Values of a row of `table` as text, slices of `data` where they can be.
pub(super) struct Values<'a> {
    pub(super) data: &'a Bytes,
    pub(super) table: &'a Table,
    /// How to read values in binary; absent in text mode.
    pub(super) types: Option<&'a Types>,
    /// Most bytes of a body.
    pub(super) max_body: usize,
}

impl<'a> Values<'a> {
    pub(super) fn new(data: &'a Bytes, table: &'a Table, options: &'a Options) -> Self {
        Self { data, table, types: options.types.as_ref(), max_body: options.max_body }
    }

    fn value(&self, index: usize, value: &pgoutput::TupleValue<'_>) -> event::Value {
        match value {
            pgoutput::TupleValue::Null => event::Value::Null,
            pgoutput::TupleValue::Unchanged => event::Value::Unchanged,
            pgoutput::TupleValue::Text(text) => event::Value::Text(self.data.slice_ref(text)),
            pgoutput::TupleValue::Binary(bytes) => {
                let type_oid = self.table.columns[index].type_oid;
                let text = match self.types {
                    // As text it would be twice as large, and no message can be made of it.
                    Some(_) if type_oid == oid::BYTEA && bytes.len() > self.max_body => {
                        Err(too_large(bytes.len(), self.max_body))
                    }
                    Some(types) => types.text(type_oid, bytes),
                    None => Err(Error::event("a binary value where text was requested")),
                };
                match text {
                    Ok(Cow::Borrowed(text)) => event::Value::Text(self.data.slice_ref(text)),
                    Ok(Cow::Owned(text)) => event::Value::Text(Bytes::from(text)),
                    Err(error) => event::Value::Unreadable(Box::new(Unreadable {
                        why: error.text_with_hint(),
                        // A copy: a slice would keep the whole message of the stream.
                        bytes: (bytes.len() <= KEPT_MAX).then(|| Bytes::copy_from_slice(bytes)),
                    })),
                }
            }
        }
    }

    /// The value of an inserted row; why it has none that can be read is noted in `why`.
    fn bytes(
        &self,
        index: usize,
        value: &pgoutput::TupleValue<'_>,
        why: &OnceCell<String>,
    ) -> Option<Bytes> {
        match value {
            pgoutput::TupleValue::Text(text) => Some(self.data.slice_ref(text)),
            // Inserts carry no unchanged TOAST.
            pgoutput::TupleValue::Null | pgoutput::TupleValue::Unchanged => None,
            pgoutput::TupleValue::Binary(_) => match self.value(index, value) {
                Value::Text(text) => Some(text),
                Value::Null | Value::Unchanged => None,
                Value::Unreadable(value) => {
                    let column = &self.table.columns[index].name;
                    why.get_or_init(|| format!("column {column:?}: {}", value.why));
                    None
                }
            },
        }
    }

    pub(super) fn row(&self, tuple: &Tuple<'_>) -> Result<Row> {
        if tuple.len() != self.table.columns.len() {
            let (got, want) = (tuple.len(), self.table.columns.len());
            return Err(Error::protocol(format!("a row has {got} columns, its relation {want}")));
        }
        Ok(tuple.columns().enumerate().map(|(index, value)| self.value(index, &value)).collect())
    }
}

fn too_large(len: usize, max: usize) -> Error {
    Error::event(format!("a bytea of {len} bytes is larger than a body of {max} bytes may be"))
        .hint("raise broker.max_message_size if the broker takes more")
}

/// The row with its id and its `created_at` (microseconds since 1970-01-01 UTC), if it has one that
/// can be read. What breaks the outbox's contract still becomes an event, so that it is parked
/// under its key.
pub(super) fn outbox_row(
    values_of: &Values<'_>,
    columns: &OutboxColumns,
    tuple: &Tuple<'_>,
) -> (Option<Uuid>, Option<i64>, Box<OutboxRow>) {
    let mut values = [pgoutput::TupleValue::Null; OUTBOX_COLUMNS_MAX];
    tuple.read_into(&mut values[..columns.count]);
    let why = OnceCell::new();
    let bytes = |index: Option<usize>| values_of.bytes(index?, &values[index?], &why);
    let text = |index: Option<usize>, name: &str| {
        let text = ByteString::try_from(bytes(index)?);
        if text.is_err() {
            why.get_or_init(|| format!("column {name:?} is not valid UTF-8"));
        }
        text.ok()
    };
    let traceparent = text(columns.traceparent, "traceparent");
    let content_type = text(columns.content_type, "content_type");
    let needed = |index: usize, name: &str| {
        let text = text(Some(index), name);
        if text.is_none() {
            why.get_or_init(|| format!("column {name:?} of the outbox row is null"));
        }
        text.unwrap_or_default()
    };
    let id_text = needed(columns.id, "id");
    let aggregate_type = needed(columns.aggregate_type, "aggregate_type");
    let aggregate_id = needed(columns.aggregate_id, "aggregate_id");
    let event_type = needed(columns.event_type, "event_type");
    let id = Uuid::try_parse(&id_text).ok();
    if id.is_none() {
        why.get_or_init(|| format!("column \"id\" is not a UUID: {id_text:?}"));
    }
    let payload = match (bytes(columns.payload), bytes(columns.data)) {
        (Some(json), None) => OutboxPayload::Json(json),
        (None, Some(hex)) => OutboxPayload::Hex(hex),
        (Some(_), Some(_)) | (None, None) => {
            why.get_or_init(|| "exactly one of payload and data must be set".to_owned());
            OutboxPayload::Json(Bytes::new())
        }
    };
    let headers = bytes(columns.headers);
    let created_at_us = bytes(columns.created_at).and_then(|text| instant::parse_us(&text));
    let payload = match why.get() {
        Some(why) => OutboxPayload::Broken(Box::new(broken(values_of, tuple, why.clone()))),
        None => payload,
    };
    let row = OutboxRow {
        aggregate_type,
        aggregate_id,
        event_type,
        payload,
        content_type,
        headers,
        traceparent,
    };
    (id, created_at_us, Box::new(row))
}

/// What there is of a row that breaks the outbox's contract.
fn broken(values: &Values<'_>, tuple: &Tuple<'_>, why: String) -> Broken {
    let ignored = OnceCell::new();
    let columns = values.table.columns.iter().zip(tuple.columns()).take(OUTBOX_COLUMNS_MAX);
    let shown = columns.enumerate().map(|(index, (column, value))| {
        (column.name.clone(), values.bytes(index, &value, &ignored))
    });
    Broken { why, columns: shown.collect() }
}

pub(super) fn old_row(old: &OldTuple<'_>, values: &Values<'_>) -> Result<OldRow> {
    let row = values.row(&old.tuple)?;
    Ok(match (old.kind, &values.table.identity) {
        (OldKind::Full, Identity::Full | Identity::Columns(_)) => OldRow::Full(row),
        // A partition says it for its root, and may have sent less.
        (OldKind::Key, _) | (OldKind::Full, Identity::Nothing) => OldRow::Key(row),
    })
}

/// Puts values that an update did not touch, and that were therefore not sent with the new row,
/// into it from the old one where that has them: of an identity that is TOASTed Postgres sends the
/// old row even when it has not changed (heapam.c, `ExtractReplicaIdentity`), and a partition with
/// FULL always does. Returns whether the old row says more than the new one.
pub(super) fn complete(table: &Table, old: &OldRow, new: &mut Row) -> bool {
    let mut take = |column: usize| {
        if new[column] == Value::Unchanged {
            match &old.row()[column] {
                value @ (Value::Text(_) | Value::Unreadable(_)) => new[column] = value.clone(),
                Value::Null | Value::Unchanged => {}
            }
        }
    };
    match (old, &table.identity) {
        // What a partition unlike its root sends is unknown, so everything that came is used.
        (OldRow::Full(row), _) | (OldRow::Key(row), Identity::Full | Identity::Nothing) => {
            (0..row.len()).for_each(&mut take);
            true
        }
        (OldRow::Key(row), Identity::Columns(columns)) => {
            columns.iter().copied().for_each(&mut take);
            columns.iter().any(|column| row[*column] != new[*column])
        }
    }
}
