//! Messages that are given up, published where the configuration says.
//!
//! On a connection of its own: a broker that blocks publishers must not hold back acknowledgements.
//! One publish at a time, so that a returned message can only be this one.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::Mutex;

use super::subscription;
use crate::amqp::client::{short, step};
use crate::amqp::options::Options as Broker;
use crate::error::{Error, Result};

/// The broker must have confirmed by then.
const LIMIT: Duration = Duration::from_secs(30);
/// Of the error's text, in bytes.
const ERROR_BYTES_MAX: usize = 1000;
/// Persistent.
const PERSISTENT: u8 = 2;

/// Why a message is a dead letter.
pub(super) struct Reason<'a> {
    pub consumer: &'a str,
    /// One word.
    pub word: &'static str,
    pub error: &'a str,
    pub failures: u32,
}

/// The publisher.
pub(super) struct DeadLetters {
    broker: Broker,
    open: Mutex<Option<(Connection, Channel)>>,
}

impl DeadLetters {
    pub fn new(broker: &Broker) -> Self {
        let connection_name = format!("{} dead letters", broker.connection_name);
        Self { broker: Broker { connection_name, ..broker.clone() }, open: Mutex::new(None) }
    }

    /// Publishes a message, and returns when the broker has it in a queue.
    pub async fn publish(
        &self,
        exchange: &str,
        routing_key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) -> Result<()> {
        let mut open = self.open.lock().await;
        let connected = open.as_ref().is_some_and(|(_, channel)| channel.status().connected());
        if !connected {
            *open = Some(self.connect().await?);
        }
        let Some((_, channel)) = &*open else {
            return Err(Error::internal("no channel for dead letters"));
        };
        let what = format!("dead letter to exchange {exchange:?} with routing key {routing_key:?}");
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let (exchange, routing_key) = (short(exchange)?, short(routing_key)?);
        let publish = async {
            let sent = channel.basic_publish(exchange, routing_key, options, body, properties);
            sent.await?.await
        };
        match step(LIMIT, &what, publish).await {
            Ok(Confirmation::Ack(None)) => Ok(()),
            Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
                Err(Error::refused(format!("{what}: no queue is bound there"))
                    .hint("create the queue and its binding; the message waits in its own queue"))
            }
            Ok(Confirmation::Nack(None)) => {
                Err(Error::refused(format!("{what}: the broker does not take it (nack)"))
                    .hint("the queue is full; the message waits in its own queue"))
            }
            Ok(Confirmation::NotRequested) => Err(Error::internal("confirms are off")),
            Err(error) => {
                // Its confirm could still come, for another publish.
                *open = None;
                Err(error)
            }
        }
    }

    async fn connect(&self) -> Result<(Connection, Channel)> {
        let connection = subscription::connect(&self.broker).await?;
        let channel = step(LIMIT, "opening a channel", connection.create_channel()).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        step(LIMIT, "asking for confirms", confirms).await?;
        Ok((connection, channel))
    }
}

/// The message's own properties and the reason. Left out is what would harm it there: `CC` and
/// `BCC` would send it to other queues, `expiration` would drop it, a foreign `user_id` is refused.
pub(super) fn properties(own: &BasicProperties, reason: &Reason<'_>) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in own.headers().iter().flat_map(|headers| headers.inner()) {
        if !matches!(name.as_str(), "CC" | "BCC") {
            headers.insert(name.clone(), value.clone());
        }
    }
    let mut end = reason.error.len().min(ERROR_BYTES_MAX);
    while !reason.error.is_char_boundary(end) {
        end -= 1;
    }
    for (name, text) in [
        ("ws-dead-consumer", reason.consumer),
        ("ws-dead-reason", reason.word),
        ("ws-dead-error", &reason.error[..end]),
    ] {
        headers.insert(name.into(), AMQPValue::LongString(text.into()));
    }
    let failures = AMQPValue::LongLongInt(reason.failures.into());
    headers.insert("ws-dead-failures".into(), failures);
    let mut kept = BasicProperties::default().with_headers(headers).with_delivery_mode(PERSISTENT);
    if let Some(value) = own.content_type() {
        kept = kept.with_content_type(value.clone());
    }
    if let Some(value) = own.content_encoding() {
        kept = kept.with_content_encoding(value.clone());
    }
    if let Some(value) = own.priority() {
        kept = kept.with_priority(*value);
    }
    if let Some(value) = own.correlation_id() {
        kept = kept.with_correlation_id(value.clone());
    }
    if let Some(value) = own.reply_to() {
        kept = kept.with_reply_to(value.clone());
    }
    if let Some(value) = own.message_id() {
        kept = kept.with_message_id(value.clone());
    }
    if let Some(value) = own.timestamp() {
        kept = kept.with_timestamp(*value);
    }
    if let Some(value) = own.kind() {
        kept = kept.with_type(value.clone());
    }
    if let Some(value) = own.app_id() {
        kept = kept.with_app_id(value.clone());
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_letter_keeps_its_properties_but_what_would_harm_it() {
        let mut headers = FieldTable::default();
        headers.insert("CC".into(), AMQPValue::LongString("elsewhere".into()));
        headers.insert("ws-key".into(), AMQPValue::LongString("k".into()));
        let own = BasicProperties::default()
            .with_message_id("m".into())
            .with_timestamp(7)
            .with_type("paid".into())
            .with_app_id("shop".into())
            .with_expiration("1000".into())
            .with_user_id("other".into())
            .with_delivery_mode(1)
            .with_headers(headers);
        let error = "ä".repeat(ERROR_BYTES_MAX);
        let reason = Reason { consumer: "c", word: "failed", error: &error, failures: 5 };
        let kept = properties(&own, &reason);
        assert_eq!(kept.message_id(), own.message_id());
        assert_eq!((kept.timestamp(), kept.kind()), (own.timestamp(), own.kind()));
        assert_eq!((kept.expiration(), kept.user_id()), (&None, &None));
        assert_eq!(*kept.delivery_mode(), Some(PERSISTENT));
        let headers = kept.headers().as_ref().unwrap().inner();
        assert!(headers.contains_key("ws-key") && !headers.contains_key("CC"));
        assert_eq!(headers["ws-dead-failures"], AMQPValue::LongLongInt(5));
        match &headers["ws-dead-error"] {
            AMQPValue::LongString(text) => assert_eq!(text.len(), ERROR_BYTES_MAX),
            other => panic!("{other:?}"),
        }
    }
}
