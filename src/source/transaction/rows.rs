//! From a tuple of the stream to the values of a row. Pure.

use std::borrow::Cow;
use std::cell::{Cell, OnceCell};

use bytes::Bytes;

use super::options::Options;
use crate::column::{Types, oid};
use crate::error::{Error, Kind, Result};
use crate::event::{self, Identity, OldRow, Row, Table, Unreadable, Value};
use crate::pg::pgoutput::{self, OldKind, OldTuple, Tuple};

/// Bytes of a value without a text form that are kept, for people.
const KEPT_MAX: usize = 1 << 20;

/// Values of a row of `table` as text, slices of `data` where they can be.
pub(in crate::source) struct Values<'a> {
    pub(super) data: &'a Bytes,
    pub(super) table: &'a Table,
    /// How to read values in binary.
    pub(super) types: &'a Types,
    /// Most bytes of a body.
    pub(super) max_body: usize,
    /// A column with a value that has something of an unknown type in it.
    pub(super) unknown_type: Cell<Option<usize>>,
}

impl<'a> Values<'a> {
    pub(super) fn new(data: &'a Bytes, table: &'a Table, options: &'a Options) -> Self {
        Self::of(data, table, &options.types, options.max_body)
    }

    /// Values of a row that came in another way than by the stream.
    pub(in crate::source) fn of(
        data: &'a Bytes,
        table: &'a Table,
        types: &'a Types,
        max_body: usize,
    ) -> Self {
        Self { data, table, types, max_body, unknown_type: Cell::new(None) }
    }

    fn value(&self, index: usize, value: &pgoutput::TupleValue<'_>) -> event::Value {
        match value {
            pgoutput::TupleValue::Null => event::Value::Null,
            pgoutput::TupleValue::Unchanged => event::Value::Unchanged,
            pgoutput::TupleValue::Text(text) => event::Value::Text(self.data.slice_ref(text)),
            pgoutput::TupleValue::Binary(bytes) => {
                let type_oid = self.table.columns[index].type_oid;
                let is_bytea = || self.types.base_of(type_oid) == oid::BYTEA;
                // As text it would be twice as large, and no message can be made of it.
                let text = match bytes.len() > self.max_body && is_bytea() {
                    true => Err(too_large(bytes.len(), self.max_body)),
                    false => self.types.text(type_oid, bytes),
                };
                if text.as_ref().is_err_and(|error| error.kind() == Kind::Protocol) {
                    self.unknown_type.set(Some(index));
                }
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
    pub(super) fn bytes(
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
