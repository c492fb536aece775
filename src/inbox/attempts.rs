//! The inbox's calls that only the helper makes: attempts, and maintenance.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient, Transaction};

use super::claim::{Param, one};
use super::message::seconds;
use crate::error::Result;
use crate::pg::sqlstate::postgres_error;

/// Why a message that `receive` has stored waits.
pub(super) async fn parked_for(
    tx: &Transaction<'_>,
    consumer: &str,
    message_id: &str,
) -> Result<String> {
    const REASON: &str = "SELECT coalesce((SELECT m.reason \
        FROM watership_inbox.parked_messages AS m \
        WHERE m.consumer = $1 AND m.message_id = $2), 'behind')";
    let params: [Param<'_>; 2] = [(&consumer, Type::TEXT), (&message_id, Type::TEXT)];
    one(tx, REASON, &params).await
}

/// Whether an attempt at it started and never returned.
pub(super) async fn has_killed(client: &Client, consumer: &str, id: &str) -> Result<bool> {
    const KILLED: &str = "SELECT EXISTS (SELECT FROM watership_inbox.unfinished_attempts AS a \
        WHERE a.consumer = $1 AND a.message_id = $2 AND a.killed > 0)";
    let params: [Param<'_>; 2] = [(&consumer, Type::TEXT), (&id, Type::TEXT)];
    one(client, KILLED, &params).await
}

/// An attempt begins: recorded failures, and attempts that never returned.
pub(super) async fn started(client: &Client, consumer: &str, id: &str) -> Result<(u32, u32)> {
    const STARTED: &str = "SELECT failed, killed FROM watership_inbox.attempt_started($1, $2)";
    let params: [Param<'_>; 2] = [(&consumer, Type::TEXT), (&id, Type::TEXT)];
    let row = client.query_typed_one(STARTED, &params).await.map_err(postgres_error)?;
    let number = |column| row.try_get::<_, i32>(column).map_err(postgres_error);
    let count = |n: i32| u32::try_from(n).unwrap_or(0);
    Ok((count(number(0)?), count(number(1)?)))
}

/// An attempt failed: recorded failures.
pub(super) async fn failed(client: &Client, consumer: &str, id: &str, error: &str) -> Result<u32> {
    let error = error.replace('\0', "\u{fffd}");
    let params: [Param<'_>; 3] = [(&consumer, Type::TEXT), (&id, Type::TEXT), (&error, Type::TEXT)];
    let call = "SELECT watership_inbox.attempt_failed($1, $2, $3)";
    let failures: i32 = one(client, call, &params).await?;
    Ok(u32::try_from(failures).unwrap_or(1).max(1))
}

/// The message needs no more attempts.
pub(super) async fn ended(client: &impl GenericClient, consumer: &str, id: &str) -> Result<()> {
    let params: [Param<'_>; 2] = [(&consumer, Type::TEXT), (&id, Type::TEXT)];
    let call = "SELECT watership_inbox.attempt_ended($1, $2)";
    client.query_typed(call, &params).await.map(drop).map_err(postgres_error)
}

/// Lets the window move on by a step, as far as everybody has passed it. True if another call can
/// do more at once. `occurred_at` is the time of a message that found no slot, which shows that the
/// window has to move and the clock is right.
pub(super) async fn maintain(
    client: &Client,
    consumer: &str,
    occurred_at: Option<u64>,
) -> Result<bool> {
    const MAINTAIN: &str =
        "SELECT done, postponed, more FROM watership_inbox.maintain(to_timestamp($1))";
    let at = occurred_at.map(seconds);
    let row = client.query_typed_one(MAINTAIN, &[(&at, Type::FLOAT8)]).await;
    let row = row.map_err(postgres_error)?;
    let text = |column| row.try_get::<_, Vec<String>>(column).map_err(postgres_error);
    let (done, postponed) = (text(0)?.join("; "), text(1)?.join("; "));
    if !(done.is_empty() && postponed.is_empty()) {
        tracing::info!(consumer, done, postponed, "maintained the inbox");
    }
    row.try_get(2).map_err(postgres_error)
}
