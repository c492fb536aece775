//! The inbox's functions in the caller's transaction, by tokio-postgres.
//!
//! Each is one round trip without a named statement, so it works through a pooler in transaction
//! mode. Errors keep the SQLSTATE: 40001 and 40P01 ask for the whole transaction once more, WI001
//! is a message older than the window, WI002 one from the future, WI003 an inbox that is not
//! maintained, WI004 another body under a known id.

use tokio_postgres::GenericClient;
use tokio_postgres::types::{FromSql, ToSql, Type};

use super::message::{Message, seconds};
use super::sql::{self, Received};
use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;

/// A parameter with its type.
pub(super) type Param<'a> = (&'a (dyn ToSql + Sync), Type);

/// Claims a message: true the first time, false for a duplicate. A concurrent duplicate waits for
/// the first. `occurred_at` is AMQP's `timestamp` and nothing else; without one the message is
/// remembered for one to one and a half windows after it came.
///
/// # Errors
/// As in the head of this module.
pub async fn claim(
    client: &impl GenericClient,
    consumer: &str,
    message_id: &str,
    occurred_at: Option<u64>,
) -> Result<bool> {
    let names = [(&consumer as _, Type::TEXT), (&message_id as _, Type::TEXT)];
    match occurred_at.map(seconds) {
        None => one(client, sql::CLAIM_WITHOUT_TIME, &names).await,
        Some(at) => {
            let [consumer, message_id] = names;
            one(client, sql::CLAIM, &[consumer, message_id, (&at, Type::FLOAT8)]).await
        }
    }
}

/// The same, and reports another body under the same id (`watership_inbox.body_mismatches`): it
/// counts as a duplicate, or is the error WI004 where `strict`.
///
/// # Errors
/// As in the head of this module.
pub async fn claim_with_hash(
    client: &impl GenericClient,
    consumer: &str,
    message_id: &str,
    occurred_at: u64,
    body_hash: &[u8],
    strict: bool,
) -> Result<bool> {
    let at = seconds(occurred_at);
    let params: [Param<'_>; 5] = [
        (&consumer, Type::TEXT),
        (&message_id, Type::TEXT),
        (&at, Type::FLOAT8),
        (&body_hash, Type::BYTEA),
        (&strict, Type::BOOL),
    ];
    one(client, sql::CLAIM_WITH_HASH, &params).await
}

/// Claims many messages, each an id and AMQP's `timestamp`; returns the ids of the new ones, each
/// once. All are claimed or none.
///
/// # Errors
/// As in the head of this module.
pub async fn claim_many(
    client: &impl GenericClient,
    consumer: &str,
    messages: &[(&str, u64)],
) -> Result<Vec<String>> {
    let ids: Vec<&str> = messages.iter().map(|(id, _)| *id).collect();
    let times: Vec<f64> = messages.iter().map(|(_, at)| seconds(*at)).collect();
    let params: [Param<'_>; 3] =
        [(&consumer, Type::TEXT), (&ids, Type::TEXT_ARRAY), (&times, Type::FLOAT8_ARRAY)];
    let rows = client.query_typed(sql::CLAIM_MANY, &params).await.map_err(postgres_error)?;
    rows.iter().map(|row| row.try_get(0).map_err(postgres_error)).collect()
}

/// Claims a message, and keeps the order of its key: says what to do with it.
///
/// # Errors
/// As in the head of this module, without WI001 and WI002: such a message is parked.
pub async fn receive(
    client: &impl GenericClient,
    consumer: &str,
    message: &Message,
) -> Result<Received> {
    let (at, properties) = (message.occurred_at.map(seconds), properties(message));
    let params: [Param<'_>; 6] = [
        (&consumer, Type::TEXT),
        (&message.id, Type::TEXT),
        (&at, Type::FLOAT8),
        (&message.key, Type::TEXT),
        (&message.body, Type::BYTEA),
        (&properties, Type::TEXT),
    ];
    let answer: String = one(client, sql::RECEIVE, &params).await?;
    Received::read(&answer).ok_or_else(|| {
        Error::protocol(format!("watership_inbox.receive said {answer:?}"))
            .hint("the schema is newer than this program: update the program")
    })
}

/// Parks a message: later ones of its key wait behind it. Call it after the rollback of what the
/// handler did. False if it was handled or parked meanwhile.
///
/// # Errors
/// As in the head of this module.
pub async fn park(
    client: &impl GenericClient,
    consumer: &str,
    message: &Message,
    reason: &str,
    error: &str,
) -> Result<bool> {
    let (at, properties) = (message.occurred_at.map(seconds), properties(message));
    let error = error.replace('\0', "\u{fffd}");
    let params: [Param<'_>; 8] = [
        (&consumer, Type::TEXT),
        (&message.id, Type::TEXT),
        (&at, Type::FLOAT8),
        (&message.key, Type::TEXT),
        (&reason, Type::TEXT),
        (&error, Type::TEXT),
        (&message.body, Type::BYTEA),
        (&properties, Type::TEXT),
    ];
    one(client, sql::PARK, &params).await
}

/// Lets a message have its effect a second time, at its next delivery. True if it was known.
///
/// # Errors
/// 55000 while it is parked: it had no effect yet.
pub async fn forget(client: &impl GenericClient, consumer: &str, message_id: &str) -> Result<bool> {
    one(client, sql::FORGET, &[(&consumer, Type::TEXT), (&message_id, Type::TEXT)]).await
}

fn properties(message: &Message) -> String {
    serde_json::Value::Object(message.properties.clone()).to_string()
}

/// Runs a call that returns one value.
pub(super) async fn one<T: for<'a> FromSql<'a>>(
    client: &impl GenericClient,
    call: &str,
    params: &[Param<'_>],
) -> Result<T> {
    let row = client.query_typed_one(call, params).await.map_err(postgres_error)?;
    row.try_get(0).map_err(postgres_error)
}
