//! For consumers in Rust: the effect of a message once, in the order of its key, whatever crashes.
//!
//! The consumer's own database remembers which messages were handled (schema `watership_inbox`, by
//! `watership inbox install`; the user needs the role `watership_consumer`). A message is claimed
//! in the transaction of its handler and acknowledged after the commit, so a redelivery finds the
//! claim and has no second effect.
//!
#![cfg_attr(
    feature = "inbox",
    doc = r#"
```no_run
use watership::inbox::{HandlerError, Inbox, Message, OnFailure, Transaction};

async fn handle(message: &Message, tx: &Transaction<'_>) -> Result<(), HandlerError> {
    if message.event_type() != Some("paid") {
        return Err(HandlerError::permanent("not an event of ours"));
    }
    let order = message.key.as_deref().unwrap_or_default();
    tx.execute("UPDATE invoice SET paid = true WHERE order_id = $1", &[&order]).await?;
    Ok(())
}

# async fn example() -> watership::error::Result<()> {
let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
Inbox::new("billing")
    .queue("billing.orders")
    .postgres("postgres://billing@db/shop")
    .amqp("amqps://billing:secret@broker/shop")
    .concurrency(8)
    .on_failure(OnFailure::Park)
    .run(|message, tx| Box::pin(handle(message, tx)), stop)
    .await
# }
```

A handler that fails is tried again, with pauses that grow outside of any transaction; then its
message is parked, and later messages of its key wait behind it until somebody retries
(`watership inbox parked`). A handler must not commit or roll back by itself.

The parts by themselves, in a transaction of the caller: [`Message::parse`], [`claim`], [`receive`],
[`park`] and [`forget`]. `run` connects by itself and takes URLs; [`Inbox::postgres_by`] takes
clients that the application has opened. What is logged has the fields `consumer`, `message_id` and
`key`; the handler runs in the span `handle`, with `traceparent` of the message among its fields.
The counters go to the crate `metrics`, as `watership_inbox_..._total`.
"#
)]

#[cfg(feature = "inbox")]
mod attempts;
#[cfg(feature = "inbox")]
mod claim;
#[cfg(feature = "inbox")]
mod consumer;
#[cfg(feature = "inbox")]
mod counters;
#[cfg(feature = "inbox")]
mod database;
#[cfg(feature = "inbox")]
mod dead_letters;
#[cfg(feature = "inbox")]
mod handler;
#[cfg(feature = "inbox")]
mod lanes;
mod message;
#[cfg(feature = "inbox")]
mod options;
#[cfg(feature = "inbox")]
mod parked;
mod sql;
#[cfg(feature = "sqlx")]
pub mod sqlx;
#[cfg(feature = "inbox")]
mod subscription;
#[cfg(feature = "inbox")]
mod turns;
#[cfg(feature = "inbox")]
mod version;
#[cfg(feature = "inbox")]
mod watchdog;
#[cfg(feature = "inbox")]
mod work;

#[cfg(feature = "inbox")]
pub use claim::{claim, claim_many, claim_with_hash, forget, park, receive};
#[cfg(feature = "inbox")]
pub use handler::HandlerError;
pub use message::Message;
#[cfg(feature = "inbox")]
pub use options::{Inbox, OnFailure};
pub use sql::Received;
#[cfg(feature = "inbox")]
pub use tokio_postgres::{IsolationLevel, Transaction};
