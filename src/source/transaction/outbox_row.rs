//! From a tuple of the stream to an event that an application wrote. Pure.
//!
//! Invariant: every row becomes an event. What breaks the outbox's contract becomes one that is
//! parked under its key; nothing is left out, and nothing ends the session.

use std::cell::OnceCell;
use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;
use uuid::Uuid;

use super::rows::Values;
use crate::column::debezium::{ValueForms, Writer};
use crate::column::{instant, oid};
use crate::error::{Error, Result};
use crate::event::{Broken, Column, OutboxPayload, OutboxRow, Table};
use crate::pg::pgoutput::{Tuple, TupleValue};
use crate::source::outbox::{AggregateType, OutboxTable, derived_id};
use crate::verdict::Verdict;

/// Columns that are read without an allocation.
const FEW_COLUMNS: usize = 32;
/// Columns of a broken row that are kept, for people.
const SHOWN_MAX: usize = 32;
/// The years 1970 to 9999, in microseconds since 1970; outside of them an event has the commit
/// time. The checks of `watership.outbox` let no other in.
const YEARS: std::ops::Range<i64> = 0..253_402_214_400_000_000;

/// Where the columns of the outbox are, and how their values are read.
#[derive(Debug)]
pub(in crate::source) struct OutboxColumns {
    id: usize,
    id_form: IdForm,
    aggregate_type: Aggregate,
    aggregate_id: usize,
    event_type: usize,
    payload: Option<usize>,
    /// The payload is a `bytea`.
    payload_is_bytes: bool,
    data: Option<usize>,
    content_type: Option<usize>,
    headers: Option<usize>,
    traceparent: Option<usize>,
    created_at: Option<(usize, TimeForm)>,
    /// Headers whose values other columns have.
    headers_from: Vec<HeaderColumn>,
    /// Further columns that routes place, with how Debezium writes them.
    placed: Vec<(HeaderColumn, Writer)>,
    /// Columns that templates name.
    shown: Vec<(Arc<str>, usize)>,
    /// How many columns lie up to the last of them: the rest need not be read.
    count: usize,
    /// The table is the application's: what its own outbox forbids may be null.
    mapped: bool,
}

#[derive(Debug, Clone, Copy)]
enum IdForm {
    /// The column is a uuid.
    Uuid,
    /// It is something else; the id is derived in this namespace.
    Derived(Uuid),
}

#[derive(Debug)]
enum Aggregate {
    Column(usize),
    Constant(ByteString),
}

#[derive(Debug, Clone, Copy)]
enum TimeForm {
    WithZone,
    /// Taken for UTC.
    WithoutZone,
    /// Milliseconds since 1970.
    Millis,
}

#[derive(Debug)]
struct HeaderColumn {
    /// The name, as a member of a JSON object: `"name":`.
    name_json: Box<[u8]>,
    index: usize,
}

impl OutboxColumns {
    /// `is_older` says that the catalog was read after this description: columns that the table
    /// got since are not in it.
    ///
    /// # Errors
    /// [`crate::error::Kind::Verdict`] when a needed column is missing; Protocol when one that was
    /// there has just gone.
    pub(in crate::source) fn find(
        table: &Table,
        outbox: &OutboxTable,
        is_older: bool,
    ) -> Result<Self> {
        let names = &outbox.columns;
        let needed = |name: &str| table.column(name).ok_or_else(|| missing(table, name));
        let optional = |name: &Option<String>| table.column(name.as_ref()?);
        let gone = outbox.demanded.iter().find(|name| table.column(name).is_none());
        if let Some(name) = gone.filter(|_| !is_older) {
            let text = format!("column {name:?} of the outbox {} has just gone", table.full_name);
            return Err(Error::protocol(text)
                .hint("no action needed: the next session reads the table again"));
        }
        let base = |index: usize| outbox.base_type(table.columns[index].type_oid);
        let id = needed(&names.id)?;
        let is_uuid = !outbox.is_mapped() || base(id) == oid::UUID;
        let payload = optional(&names.payload);
        let mut columns = Self {
            id,
            id_form: if is_uuid { IdForm::Uuid } else { IdForm::Derived(outbox.namespace()) },
            aggregate_type: match &names.aggregate_type {
                AggregateType::Column(name) => Aggregate::Column(needed(name)?),
                AggregateType::Constant(text) => Aggregate::Constant(text.as_str().into()),
            },
            aggregate_id: needed(&names.aggregate_id)?,
            event_type: needed(&names.event_type)?,
            payload,
            payload_is_bytes: payload.is_some_and(|index| base(index) == oid::BYTEA),
            data: optional(&names.data),
            content_type: optional(&names.content_type),
            headers: optional(&names.headers),
            traceparent: optional(&names.traceparent),
            created_at: optional(&names.created_at).map(|index| (index, time_form(base(index)))),
            headers_from: headers_from(table, outbox),
            placed: placed(table, outbox),
            shown: shown(table, outbox),
            count: 0,
            mapped: outbox.is_mapped(),
        };
        if columns.payload.is_none() && columns.data.is_none() {
            let name = names.payload.as_ref().or(names.data.as_ref());
            return Err(missing(table, name.map_or("payload", String::as_str)));
        }
        columns.count = columns.last() + 1;
        Ok(columns)
    }

    /// The last column that is looked at.
    fn last(&self) -> usize {
        let aggregate_type = match self.aggregate_type {
            Aggregate::Column(index) => Some(index),
            Aggregate::Constant(_) => None,
        };
        let optional_ones = [
            aggregate_type,
            self.payload,
            self.data,
            self.content_type,
            self.headers,
            self.traceparent,
            self.created_at.map(|(index, _)| index),
        ];
        let needed_ones = [self.id, self.aggregate_id, self.event_type];
        let placed = self.placed.iter().map(|(column, _)| column.index);
        let shown = self.shown.iter().map(|(_, index)| *index);
        let headers = self.headers_from.iter().map(|header| header.index);
        let further = headers.chain(placed).chain(shown);
        let all = needed_ones.into_iter().chain(optional_ones.into_iter().flatten());
        all.chain(further).max().unwrap_or(0)
    }
}

fn missing(table: &Table, name: &str) -> Error {
    let text = format!("column {name:?} is missing from {}", table.full_name);
    Error::named(Verdict::OutboxAltered, text)
        .hint("restore the column, or put it into the publication's column list")
}

fn time_form(base_type: u32) -> TimeForm {
    match base_type {
        oid::TIMESTAMP => TimeForm::WithoutZone,
        oid::INT8 => TimeForm::Millis,
        _ => TimeForm::WithZone,
    }
}

fn headers_from(table: &Table, outbox: &OutboxTable) -> Vec<HeaderColumn> {
    let header = |(header, column): &(String, String)| {
        Some(HeaderColumn::new(header, table.column(column)?))
    };
    outbox.headers_from.iter().filter_map(header).collect()
}

/// Those that the table has and Debezium knows: the rest may be members of the column `headers`.
fn placed(table: &Table, outbox: &OutboxTable) -> Vec<(HeaderColumn, Writer)> {
    let column = |name: &String| {
        let index = table.column(name)?;
        Some((HeaderColumn::new(name, index), writer(&table.columns[index])?))
    };
    outbox.placed.iter().filter_map(column).collect()
}

fn shown(table: &Table, outbox: &OutboxTable) -> Vec<(Arc<str>, usize)> {
    let column = |name: &String| Some((name.as_str().into(), table.column(name)?));
    outbox.shown.iter().filter_map(column).collect()
}

fn writer(column: &Column) -> Option<Writer> {
    let values = ValueForms::default();
    match column.resolved {
        Some(resolved) => Writer::of_user_type(resolved, &values),
        None => Writer::of(column.type_oid, column.type_modifier, &values),
    }
}

impl HeaderColumn {
    fn new(name: &str, index: usize) -> Self {
        let mut name_json = Vec::new();
        crate::column::write_string(&mut name_json, name);
        name_json.push(b':');
        Self { name_json: name_json.into(), index }
    }
}

/// The values of a row, and the first thing that is wrong with it.
struct Cells<'a> {
    of: &'a Values<'a>,
    values: &'a [TupleValue<'a>],
    why: OnceCell<String>,
}

impl Cells<'_> {
    fn bytes(&self, index: Option<usize>) -> Option<Bytes> {
        self.of.bytes(index?, &self.values[index?], &self.why)
    }

    /// Reads a value, without a copy if the stream has its text; absent for null.
    fn read<T>(&self, index: usize, read: impl FnOnce(&[u8]) -> T) -> Option<T> {
        match &self.values[index] {
            TupleValue::Text(text) => Some(read(text)),
            TupleValue::Null | TupleValue::Unchanged => None,
            TupleValue::Binary(_) => self.bytes(Some(index)).map(|text| read(&text)),
        }
    }

    fn is_null(&self, index: usize) -> bool {
        matches!(self.values[index], TupleValue::Null | TupleValue::Unchanged)
    }

    fn name(&self, index: usize) -> &str {
        &self.of.table.columns[index].name
    }

    fn text(&self, index: Option<usize>) -> Option<ByteString> {
        let text = ByteString::try_from(self.bytes(index)?);
        if text.is_err() {
            let name = self.name(index?);
            self.why.get_or_init(|| format!("column {name:?} is not valid UTF-8"));
        }
        text.ok()
    }

    fn needed(&self, index: usize) -> Option<ByteString> {
        let text = self.text(Some(index));
        if text.is_none() {
            let name = self.name(index);
            self.why.get_or_init(|| format!("column {name:?} of the outbox row is null"));
        }
        text
    }
}

/// The row with its id and its `created_at` (microseconds since 1970-01-01 UTC), if it has one that
/// can be read. What breaks the outbox's contract still becomes an event, so that it is parked
/// under its key.
pub(in crate::source) fn outbox_row(
    values_of: &Values<'_>,
    columns: &OutboxColumns,
    tuple: &Tuple<'_>,
) -> (Option<Uuid>, Option<i64>, Box<OutboxRow>) {
    if columns.count <= FEW_COLUMNS {
        let mut values = [TupleValue::Null; FEW_COLUMNS];
        read_row(values_of, columns, tuple, &mut values[..columns.count])
    } else {
        let mut values = vec![TupleValue::Null; columns.count];
        read_row(values_of, columns, tuple, &mut values)
    }
}

#[inline(always)]
fn read_row<'a>(
    values_of: &Values<'_>,
    columns: &OutboxColumns,
    tuple: &Tuple<'a>,
    values: &mut [TupleValue<'a>],
) -> (Option<Uuid>, Option<i64>, Box<OutboxRow>) {
    tuple.read_into(values);
    let cells = Cells { of: values_of, values, why: OnceCell::new() };
    let traceparent = cells.text(columns.traceparent);
    let content_type = cells.text(columns.content_type);
    let id = match columns.id_form {
        IdForm::Uuid => cells.read(columns.id, |text| Uuid::try_parse_ascii(text).ok()).flatten(),
        IdForm::Derived(namespace) => {
            cells.needed(columns.id).map(|text| derived_id(namespace, &text))
        }
    };
    if id.is_none() {
        let (name, is_null) = (cells.name(columns.id), cells.is_null(columns.id));
        cells.why.get_or_init(|| match is_null {
            true => format!("column {name:?} of the outbox row is null"),
            false => format!("column {name:?} is not a UUID"),
        });
    }
    let aggregate_type = match &columns.aggregate_type {
        Aggregate::Column(index) => cells.needed(*index),
        Aggregate::Constant(text) => Some(text.clone()),
    };
    // Without a key an event has no order with others: its own id is its key.
    let is_keyless =
        columns.mapped && cells.is_null(columns.aggregate_id) && cells.why.get().is_none();
    let aggregate_id = cells.needed(if is_keyless { columns.id } else { columns.aggregate_id });
    let event_type = cells.needed(columns.event_type);
    let payload = payload(columns, &cells);
    let headers = headers(columns, &cells);
    let further = further(columns, &cells);
    let shown = columns.shown.iter().map(|(name, index)| (name.clone(), cells.text(Some(*index))));
    let shown = shown.collect();
    let created_at_us = columns.created_at.and_then(|(index, form)| {
        let read = cells.read(index, |text| created_at(text, form)).flatten();
        read.filter(|us| !columns.mapped || YEARS.contains(us))
    });
    let payload = match cells.why.get() {
        Some(why) => OutboxPayload::Broken(Box::new(broken(values_of, tuple, why.clone()))),
        None => payload,
    };
    let row = OutboxRow {
        aggregate_type: aggregate_type.unwrap_or_default(),
        aggregate_id: aggregate_id.unwrap_or_default(),
        event_type: event_type.unwrap_or_default(),
        payload,
        content_type,
        headers,
        traceparent,
        columns: further,
        shown,
    };
    (id, created_at_us, Box::new(row))
}

fn payload(columns: &OutboxColumns, cells: &Cells<'_>) -> OutboxPayload {
    match (cells.bytes(columns.payload), cells.bytes(columns.data)) {
        (Some(hex), None) if columns.payload_is_bytes => OutboxPayload::Hex(hex),
        (Some(json), None) => OutboxPayload::Json(json),
        (None, Some(hex)) => OutboxPayload::Hex(hex),
        // A tombstone, or an event that says all with its type.
        (None, None) if columns.mapped => OutboxPayload::Empty,
        (Some(_), Some(_)) | (None, None) => {
            let text = "exactly one of payload and data must be set";
            cells.why.get_or_init(|| text.to_owned());
            OutboxPayload::Empty
        }
    }
}

/// The application's headers, and before them those of other columns: of two with one name the
/// later one counts.
fn headers(columns: &OutboxColumns, cells: &Cells<'_>) -> Option<Bytes> {
    let own = cells.bytes(columns.headers);
    if columns.headers_from.is_empty() {
        return own;
    }
    let mut json = vec![b'{'];
    for HeaderColumn { name_json, index } in &columns.headers_from {
        if json.len() > 1 {
            json.push(b',');
        }
        json.extend_from_slice(name_json);
        let column = &cells.of.table.columns[*index];
        let written = match cells.bytes(Some(*index)) {
            None => {
                json.extend_from_slice(b"null");
                Ok(())
            }
            Some(text) => column.shape.write(&mut json, &text),
        };
        if let Err(error) = written {
            cells.why.get_or_init(|| format!("column {:?}: {error}", column.name));
            return own;
        }
    }
    let Some(own) = own else {
        json.push(b'}');
        return Some(json.into());
    };
    // If it is not an object, the envelope says so.
    let Some(rest) = own.trim_ascii_start().strip_prefix(b"{") else { return Some(own) };
    if !rest.trim_ascii_start().starts_with(b"}") {
        json.push(b',');
    }
    json.extend_from_slice(rest);
    Some(json.into())
}

/// Further columns that routes place, as a JSON object.
fn further(columns: &OutboxColumns, cells: &Cells<'_>) -> Option<Bytes> {
    if columns.placed.is_empty() {
        return None;
    }
    let mut json = Vec::new();
    for (HeaderColumn { name_json, index }, writer) in &columns.placed {
        json.push(if json.is_empty() { b'{' } else { b',' });
        json.extend_from_slice(name_json);
        match cells.bytes(Some(*index)) {
            None => json.extend_from_slice(b"null"),
            Some(text) => {
                if let Err(error) = writer.write(&mut json, &text) {
                    let name = cells.name(*index);
                    cells.why.get_or_init(|| format!("column {name:?}: {error}"));
                    return None;
                }
            }
        }
    }
    json.push(b'}');
    Some(json.into())
}

fn created_at(text: &[u8], form: TimeForm) -> Option<i64> {
    match form {
        TimeForm::WithZone => instant::parse_us(text),
        TimeForm::WithoutZone => instant::parse_local_us(text),
        TimeForm::Millis => {
            let millis: i64 = std::str::from_utf8(text).ok()?.parse().ok()?;
            millis.checked_mul(1000)
        }
    }
}

/// What there is of a row that breaks the outbox's contract.
pub(in crate::source) fn broken(values: &Values<'_>, tuple: &Tuple<'_>, why: String) -> Broken {
    let ignored = OnceCell::new();
    let columns = values.table.columns.iter().zip(tuple.columns()).take(SHOWN_MAX);
    let shown = columns.enumerate().map(|(index, (column, value))| {
        (column.name.clone(), values.bytes(index, &value, &ignored))
    });
    Broken { why, columns: shown.collect() }
}
