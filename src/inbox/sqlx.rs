//! The inbox's functions in the caller's transaction, by sqlx: what [`super`] says of those by
//! tokio-postgres holds for them.
//!
//! ```no_run
//! # async fn example(pool: &sqlx::PgPool, message: watership::inbox::Message)
//! #     -> Result<(), sqlx::Error> {
//! let mut tx = pool.begin().await?;
//! if watership::inbox::sqlx::claim(&mut tx, "billing", &message.id, message.occurred_at).await? {
//!     sqlx::query("UPDATE invoice SET paid = true WHERE id = 7").execute(&mut *tx).await?;
//! }
//! tx.commit().await?;
//! // Acknowledge the message.
//! # Ok(())
//! # }
//! ```

use ::sqlx::postgres::PgConnection;
use ::sqlx::{Error, query_scalar};

use super::message::{Message, seconds};
use super::sql::{self, Received};

/// Claims a message: true the first time, false for a duplicate.
///
/// # Errors
/// What Postgres says, by its SQLSTATE.
pub async fn claim(
    connection: &mut PgConnection,
    consumer: &str,
    message_id: &str,
    occurred_at: Option<u64>,
) -> Result<bool, Error> {
    match occurred_at.map(seconds) {
        None => {
            let claim = query_scalar(sql::CLAIM_WITHOUT_TIME).bind(consumer).bind(message_id);
            claim.fetch_one(connection).await
        }
        Some(at) => {
            let claim = query_scalar(sql::CLAIM).bind(consumer).bind(message_id).bind(at);
            claim.fetch_one(connection).await
        }
    }
}

/// Claims many messages; returns the ids of the new ones, each once.
///
/// # Errors
/// What Postgres says, by its SQLSTATE.
pub async fn claim_many(
    connection: &mut PgConnection,
    consumer: &str,
    messages: &[(&str, u64)],
) -> Result<Vec<String>, Error> {
    let ids: Vec<&str> = messages.iter().map(|(id, _)| *id).collect();
    let times: Vec<f64> = messages.iter().map(|(_, at)| seconds(*at)).collect();
    query_scalar(sql::CLAIM_MANY).bind(consumer).bind(ids).bind(times).fetch_all(connection).await
}

/// Claims a message, and keeps the order of its key: says what to do with it.
///
/// # Errors
/// What Postgres says, by its SQLSTATE.
pub async fn receive(
    connection: &mut PgConnection,
    consumer: &str,
    message: &Message,
) -> Result<Received, Error> {
    let answer: String = query_scalar(sql::RECEIVE)
        .bind(consumer)
        .bind(&message.id)
        .bind(message.occurred_at.map(seconds))
        .bind(&message.key)
        .bind(&message.body)
        .bind(properties(message))
        .fetch_one(connection)
        .await?;
    let unknown = || Error::Protocol(format!("watership_inbox.receive said {answer:?}"));
    Received::read(&answer).ok_or_else(unknown)
}

/// Parks a message: later ones of its key wait behind it. False if it was handled or parked
/// meanwhile.
///
/// # Errors
/// What Postgres says, by its SQLSTATE.
pub async fn park(
    connection: &mut PgConnection,
    consumer: &str,
    message: &Message,
    reason: &str,
    error: &str,
) -> Result<bool, Error> {
    query_scalar(sql::PARK)
        .bind(consumer)
        .bind(&message.id)
        .bind(message.occurred_at.map(seconds))
        .bind(&message.key)
        .bind(reason)
        .bind(error.replace('\0', "\u{fffd}"))
        .bind(&message.body)
        .bind(properties(message))
        .fetch_one(connection)
        .await
}

/// Lets a message have its effect a second time, at its next delivery. True if it was known.
///
/// # Errors
/// 55000 while it is parked: it had no effect yet.
pub async fn forget(
    connection: &mut PgConnection,
    consumer: &str,
    message_id: &str,
) -> Result<bool, Error> {
    query_scalar(sql::FORGET).bind(consumer).bind(message_id).fetch_one(connection).await
}

fn properties(message: &Message) -> String {
    serde_json::Value::Object(message.properties.clone()).to_string()
}
