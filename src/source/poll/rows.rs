//! From a row that a poll of the relay's own outbox read to an event. Pure.
//!
//! Values are the text that the stream of the WAL would have sent, so everything behind this is the
//! same code and makes the same bytes.

use std::error::Error as StdError;
use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSql, Type};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::event::{Broken, Content, Event, OutboxPayload, OutboxRow, Table};
use crate::pg::sqlstate::postgres_error;
use crate::position::Position;

/// The bytes of a value as they came.
pub(super) struct RawValue<'a>(pub &'a [u8]);

impl<'a> FromSql<'a> for RawValue<'a> {
    fn from_sql(
        _: &Type,
        raw: &'a [u8],
    ) -> std::result::Result<Self, Box<dyn StdError + Sync + Send>> {
        Ok(RawValue(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// A row of `poll_read.sql`, or of a mapped table.
pub(super) struct PolledRow {
    pub seq: i64,
    /// What tells rows with one `seq` apart, in the order of the statement.
    pub tie: String,
    pub id: Uuid,
    /// Bytes of its body in the database.
    pub body: u64,
    pub xid: u32,
    /// Absent where the table does not tell it.
    pub created_at_us: Option<i64>,
    pub content: Box<OutboxRow>,
}

impl PolledRow {
    /// # Errors
    /// When the columns are not those of the statement.
    pub fn read(row: &Row, max_body: usize) -> Result<Self> {
        let length = |i: usize| -> Result<Option<u64>> {
            let length: Option<i64> = row.try_get(i).map_err(postgres_error)?;
            Ok(length.and_then(|length| u64::try_from(length).ok()))
        };
        let xid: &str = row.try_get(2).map_err(postgres_error)?;
        let id: Uuid = row.try_get(1).map_err(postgres_error)?;
        let body = length(7)?.unwrap_or_default() + length(9)?.unwrap_or_default();
        Ok(Self {
            seq: row.try_get(0).map_err(postgres_error)?,
            tie: id.to_string(),
            id,
            body,
            xid: Self::short_xid(xid)?,
            created_at_us: row.try_get(13).map_err(postgres_error)?,
            content: Box::new(content(row, body, max_body)?),
        })
    }

    /// The lower half, as the stream of the WAL has it.
    pub fn short_xid(xid8: &str) -> Result<u32> {
        let xid: u64 = xid8.parse().map_err(|_| Error::protocol(format!("xid8 {xid8:?}")))?;
        Ok((xid & u64::from(u32::MAX)) as u32)
    }

    /// The event, with its place and the time at which its batch was found.
    pub fn event(self, table: &Arc<Table>, position: Position, committed_at_us: i64) -> Event {
        Event {
            id: self.id,
            position,
            lsn: None,
            occurred_at_us: self.created_at_us.unwrap_or(committed_at_us),
            committed_at_us,
            xid: self.xid,
            table: table.clone(),
            content: Content::Outbox(self.content),
        }
    }
}

/// What breaks the outbox's contract still becomes an event, so that it is parked under its key.
fn content(row: &Row, body: u64, max_body: usize) -> Result<OutboxRow> {
    let bytes = |i: usize| -> Result<Option<Bytes>> {
        let raw: Option<RawValue<'_>> = row.try_get(i).map_err(postgres_error)?;
        Ok(raw.map(|raw| Bytes::copy_from_slice(raw.0)))
    };
    let mut why = None;
    let mut text = |i: usize| -> Result<Option<ByteString>> {
        let Some(bytes) = bytes(i)? else { return Ok(None) };
        let text = ByteString::try_from(bytes).ok();
        if text.is_none() {
            let name = row.columns()[i].name();
            why.get_or_insert_with(|| format!("column {name:?} is not valid UTF-8"));
        }
        Ok(text)
    };
    let [aggregate_type, aggregate_id, event_type] = [text(3)?, text(4)?, text(5)?];
    let (content_type, traceparent) = (text(10)?, text(12)?);
    let payload = match (bytes(6)?, bytes(8)?) {
        (Some(json), None) => OutboxPayload::Json(json),
        (None, Some(hex)) => OutboxPayload::Hex(hex),
        (None, None) if body > max_body as u64 => {
            why.get_or_insert_with(|| too_large(body, max_body));
            OutboxPayload::Json(Bytes::new())
        }
        (Some(_), Some(_)) | (None, None) => {
            why.get_or_insert_with(|| "exactly one of payload and data must be set".to_owned());
            OutboxPayload::Json(Bytes::new())
        }
    };
    let payload = match why {
        Some(why) => {
            let all = row.columns().iter().enumerate();
            let columns = all.map(|(i, column)| Ok((column.name().to_owned(), shown(row, i)?)));
            let columns = columns.collect::<Result<_>>()?;
            OutboxPayload::Broken(Box::new(Broken { why, columns }))
        }
        None => payload,
    };
    Ok(OutboxRow {
        aggregate_type: aggregate_type.unwrap_or_default(),
        aggregate_id: aggregate_id.unwrap_or_default(),
        event_type: event_type.unwrap_or_default(),
        payload,
        content_type,
        headers: bytes(11)?,
        traceparent,
        columns: None,
        shown: Vec::new(),
    })
}

/// Why a body was not read.
pub(super) fn too_large(body: u64, max_body: usize) -> String {
    format!(
        "a body of {body} bytes is larger than {max_body} bytes; raise broker.max_message_size if \
         the broker takes more"
    )
}

/// A column of a broken row, for people: texts as they are.
fn shown(row: &Row, index: usize) -> Result<Option<Bytes>> {
    if *row.columns()[index].type_() != Type::TEXT {
        return Ok(None);
    }
    let raw: Option<RawValue<'_>> = row.try_get(index).map_err(postgres_error)?;
    Ok(raw.map(|raw| Bytes::copy_from_slice(raw.0)))
}
