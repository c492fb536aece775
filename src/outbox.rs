//! For applications in Rust: an event in the application's own transaction.
//!
//! The event exists exactly when the transaction commits; nothing here talks to a broker. Emit
//! after the change of state that the event tells of, then readers of the event find that state.
//! The application's user needs the role `watership_app`.
//!
//! `emit` is for tokio-postgres (feature `outbox`), `sqlx::emit` for sqlx (feature `sqlx`). Beside
//! each is an `emit_wal`, for an outbox without a table.
//!
//! ```no_run
//! use watership::outbox::{NewEvent, Payload, emit};
//!
//! # type Failed = Box<dyn std::error::Error>;
//! # async fn example(client: &mut tokio_postgres::Client) -> Result<(), Failed> {
//! let tx = client.transaction().await?;
//! tx.execute("UPDATE orders SET state = 'paid' WHERE id = $1", &[&42_i64]).await?;
//! let body = r#"{"order": 42, "total": 12.50}"#;
//! let event = NewEvent::new("order", "42", "paid", Payload::Json(body));
//! let id = emit(&tx, &event).await?;
//! tx.commit().await?;
//! # let _ = id; Ok(())
//! # }
//! ```

use serde_json::{Map, Value};
#[cfg(feature = "outbox")]
use tokio_postgres::GenericClient;
#[cfg(feature = "outbox")]
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use crate::error::{Error, Result};
#[cfg(feature = "outbox")]
use crate::pg::sqlstate::postgres_error;

#[cfg(feature = "sqlx")]
pub mod sqlx;

/// The body of an event. It is sent byte for byte as it stands here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload<'a> {
    /// JSON text; Postgres checks that it is JSON and keeps it as it is.
    Json(&'a str),
    /// Any bytes, with their MIME type (1 to 255 bytes).
    Bytes {
        /// The body.
        data: &'a [u8],
        /// Becomes the `content_type` of the message.
        content_type: &'a str,
    },
}

/// An event to be emitted.
#[derive(Debug, Clone, Copy)]
pub struct NewEvent<'a> {
    /// What kind of thing it happened to, `order`. With the type at most 254 bytes.
    pub aggregate_type: &'a str,
    /// Which one. Events of one aggregate arrive in commit order. 1 to 1024 bytes.
    pub aggregate_id: &'a str,
    /// What happened, `created`. Becomes the `type` of the message.
    pub event_type: &'a str,
    /// The body.
    pub payload: Payload<'a>,
    /// Headers of the message: an object, at most 57,344 bytes as AMQP fields, without `CC`, `BCC`,
    /// `x-*` and `ws-*`.
    pub headers: Option<&'a Value>,
    /// The event's id, never used again; absent means a random one.
    pub id: Option<Uuid>,
    /// W3C trace context of the caller; wins over a header of that name.
    pub traceparent: Option<&'a str>,
}

impl<'a> NewEvent<'a> {
    /// An event with a random id and no headers.
    pub fn new(
        aggregate_type: &'a str,
        aggregate_id: &'a str,
        event_type: &'a str,
        payload: Payload<'a>,
    ) -> Self {
        Self {
            aggregate_type,
            aggregate_id,
            event_type,
            payload,
            headers: None,
            id: None,
            traceparent: None,
        }
    }
}

/// Writes `event` to the outbox in the transaction that `client` is in, and returns its id.
///
/// One round trip without a named statement, so it works through a pooler in transaction mode. On
/// a plain client without a transaction the event is committed at once.
///
/// # Errors
/// What the server says: the event breaks a limit of the outbox, the payload is not JSON, the
/// role lacks the right. The transaction is then aborted.
#[cfg(feature = "outbox")]
pub async fn emit(client: &impl GenericClient, event: &NewEvent<'_>) -> Result<Uuid> {
    const JSON: &str = "SELECT watership.emit($1, $2, $3, $4, $5, $6)";
    const BYTES: &str = "SELECT watership.emit_bytes($1, $2, $3, $4, $7, $5, $6)";
    call(client, event, JSON, BYTES).await
}

/// Writes `event` into the WAL and nowhere else, as [`emit`] does with the outbox: an outbox
/// without a table. Only a relay that reads the WAL sees it, and only while its slot is there.
///
/// ```no_run
/// use watership::outbox::{NewEvent, Payload, emit_wal};
///
/// # async fn example(tx: &tokio_postgres::Transaction<'_>) -> watership::error::Result<()> {
/// emit_wal(tx, &NewEvent::new("order", "42", "paid", Payload::Json("{}"))).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`emit`]; and when `wal_level` is not `logical`.
#[cfg(feature = "outbox")]
pub async fn emit_wal(client: &impl GenericClient, event: &NewEvent<'_>) -> Result<Uuid> {
    const JSON: &str = "SELECT watership.emit_wal($1, $2, $3, $4, $5, $6)";
    const BYTES: &str = "SELECT watership.emit_wal_bytes($1, $2, $3, $4, $7, $5, $6)";
    call(client, event, JSON, BYTES).await
}

/// One of the two, by the kind of body.
#[cfg(feature = "outbox")]
async fn call(
    client: &impl GenericClient,
    event: &NewEvent<'_>,
    json: &str,
    bytes: &str,
) -> Result<Uuid> {
    let headers = headers(event)?;
    let (sql, body, body_type, content_type): (_, &(dyn ToSql + Sync), _, _) = match &event.payload
    {
        Payload::Json(text) => (json, text, Type::TEXT, None),
        Payload::Bytes { data, content_type } => (bytes, data, Type::BYTEA, Some(content_type)),
    };
    let mut params: Vec<(&(dyn ToSql + Sync), Type)> = vec![
        (&event.aggregate_type, Type::TEXT),
        (&event.aggregate_id, Type::TEXT),
        (&event.event_type, Type::TEXT),
        (body, body_type),
        (&headers, Type::JSONB),
        (&event.id, Type::UUID),
    ];
    if let Some(content_type) = content_type {
        params.push((content_type, Type::TEXT));
    }
    let row = client.query_typed_one(sql, &params).await.map_err(|e| {
        postgres_error(e).context(format!(
            "emitting {:?} of {:?} {:?}",
            event.event_type, event.aggregate_type, event.aggregate_id
        ))
    })?;
    row.try_get(0).map_err(postgres_error)
}

/// The headers with the trace context among them; `emit` moves it to its column.
fn headers(event: &NewEvent<'_>) -> Result<Option<Value>> {
    let Some(traceparent) = event.traceparent else {
        return Ok(event.headers.cloned());
    };
    let mut headers = match event.headers {
        None => Map::new(),
        Some(Value::Object(headers)) => headers.clone(),
        Some(_) => return Err(Error::event("the headers of an event must be a JSON object")),
    };
    headers.insert("traceparent".to_owned(), Value::from(traceparent));
    Ok(Some(Value::Object(headers)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_callers_trace_context_wins_over_the_header() {
        let given = json!({"a": 1, "traceparent": "old"});
        let event = NewEvent::new("order", "1", "paid", Payload::Json("{}"));
        let with = NewEvent { headers: Some(&given), traceparent: Some("new"), ..event };
        assert_eq!(headers(&with).unwrap(), Some(json!({"a": 1, "traceparent": "new"})));
        assert_eq!(headers(&event).unwrap(), None);
    }

    #[test]
    fn headers_that_are_no_object_are_refused() {
        let given = json!([1]);
        let event = NewEvent::new("order", "1", "paid", Payload::Json("{}"));
        let with = NewEvent { headers: Some(&given), traceparent: Some("new"), ..event };
        assert!(headers(&with).is_err());
    }
}
