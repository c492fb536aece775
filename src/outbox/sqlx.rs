//! The same by sqlx: an event in the transaction of the caller.
//!
//! ```no_run
//! use watership::outbox::{self, NewEvent, Payload};
//!
//! # async fn example(pool: &sqlx::PgPool) -> Result<(), sqlx::Error> {
//! let mut tx = pool.begin().await?;
//! sqlx::query("UPDATE orders SET state = 'paid' WHERE id = 42").execute(&mut *tx).await?;
//! let event = NewEvent::new("order", "42", "paid", Payload::Json("{}"));
//! let id = outbox::sqlx::emit(&mut tx, &event).await?;
//! tx.commit().await?;
//! # let _ = id; Ok(())
//! # }
//! ```

use ::sqlx::postgres::PgConnection;
use ::sqlx::{Error, query_scalar};
use uuid::Uuid;

use super::{NewEvent, Payload, headers};

/// The types are named, and text is all that is sent: sqlx needs no feature for JSON or UUIDs.
const JSON: &str =
    "SELECT watership.emit($1, $2, $3, $4::text, $5::text::jsonb, $6::text::uuid)::text";
const BYTES: &str =
    "SELECT watership.emit_bytes($1, $2, $3, $4, $7, $5::text::jsonb, $6::text::uuid)::text";
const WAL_JSON: &str =
    "SELECT watership.emit_wal($1, $2, $3, $4::text, $5::text::jsonb, $6::text::uuid)::text";
const WAL_BYTES: &str =
    "SELECT watership.emit_wal_bytes($1, $2, $3, $4, $7, $5::text::jsonb, $6::text::uuid)::text";

/// Writes `event` to the outbox in the transaction that `connection` is in, and returns its id.
///
/// # Errors
/// What the server says: the event breaks a limit of the outbox, the payload is not JSON, the role
/// lacks the right. The transaction is then aborted. [`Error::Encode`] for headers that are no
/// object.
pub async fn emit(connection: &mut PgConnection, event: &NewEvent<'_>) -> Result<Uuid, Error> {
    call(connection, event, JSON, BYTES).await
}

/// Writes `event` into the WAL and nowhere else: only a relay that reads the WAL sees it,
/// and only while its slot is there.
///
/// ```no_run
/// use watership::outbox::{self, NewEvent, Payload};
///
/// # async fn example(connection: &mut sqlx::PgConnection) -> Result<(), sqlx::Error> {
/// let event = NewEvent::new("order", "42", "paid", Payload::Json("{}"));
/// outbox::sqlx::emit_wal(connection, &event).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`emit`]; and when `wal_level` is not `logical`.
pub async fn emit_wal(connection: &mut PgConnection, event: &NewEvent<'_>) -> Result<Uuid, Error> {
    call(connection, event, WAL_JSON, WAL_BYTES).await
}

async fn call(
    connection: &mut PgConnection,
    event: &NewEvent<'_>,
    json: &'static str,
    bytes: &'static str,
) -> Result<Uuid, Error> {
    let headers = headers(event).map_err(|error| Error::Encode(error.into()))?;
    let headers = headers.map(|headers| headers.to_string());
    let id = event.id.map(|id| id.to_string());
    let sql = match &event.payload {
        Payload::Json(_) => json,
        Payload::Bytes { .. } => bytes,
    };
    let call = query_scalar(sql)
        .bind(event.aggregate_type)
        .bind(event.aggregate_id)
        .bind(event.event_type);
    let call = match &event.payload {
        Payload::Json(text) => call.bind(*text),
        Payload::Bytes { data, .. } => call.bind(*data),
    };
    let call = call.bind(headers).bind(id);
    let call = match &event.payload {
        Payload::Json(_) => call,
        Payload::Bytes { content_type, .. } => call.bind(*content_type),
    };
    let id: String = call.fetch_one(connection).await?;
    id.parse().map_err(|error| Error::Decode(Box::new(error)))
}
