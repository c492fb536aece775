//! One message as a handler sees it: from a delivery, or from the row in which it was parked.
//!
//! What is read here has to be stored by Postgres, so no text has a zero character: a message whose
//! id has one counts as a message without an id.

use serde_json::{Map, Value};

#[cfg(feature = "inbox")]
mod delivery;

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// AMQP's `message_id`; of a message that has none, `sha256-` and the SHA-256 of its body.
    pub id: String,
    /// Whether the id is AMQP's own. Without one a message cannot be told from its duplicates.
    pub has_id: bool,
    /// AMQP's `timestamp`: whole seconds since 1970, in UTC. It belongs to the event, so it is the
    /// same on every delivery.
    pub occurred_at: Option<u64>,
    /// The header `ws-key`: messages of one key are handled in order.
    pub key: Option<String>,
    /// The body.
    pub body: Vec<u8>,
    /// All else that AMQP carries, under its names: `exchange`, `routing_key`, `content_type`,
    /// `type`, `headers` and others. An object.
    pub properties: Map<String, Value>,
    /// The broker marks it as delivered before.
    pub redelivered: bool,
    /// The header `x-delivery-count` of a quorum queue; 0 where there is none.
    pub delivery_count: u64,
}

impl Message {
    /// A message with an id and a body, for the functions that take one.
    pub fn new(id: impl Into<String>, occurred_at: Option<u64>, body: impl Into<Vec<u8>>) -> Self {
        Self {
            id: id.into(),
            has_id: true,
            occurred_at,
            key: None,
            body: body.into(),
            properties: Map::new(),
            redelivered: false,
            delivery_count: 0,
        }
    }

    /// The same message with a key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// A header, such as `ws-source` or one of the producer's own.
    pub fn header(&self, name: &str) -> Option<&Value> {
        self.properties.get("headers")?.get(name)
    }

    /// What happened: AMQP's `type`, as `paid`.
    pub fn event_type(&self) -> Option<&str> {
        self.text("type")
    }

    /// AMQP's `content_type`.
    pub fn content_type(&self) -> Option<&str> {
        self.text("content_type")
    }

    /// The exchange that it was published to; empty for the default one.
    pub fn exchange(&self) -> &str {
        self.text("exchange").unwrap_or_default()
    }

    /// The routing key that it was published with.
    pub fn routing_key(&self) -> &str {
        self.text("routing_key").unwrap_or_default()
    }

    /// W3C trace context of the producer.
    pub fn traceparent(&self) -> Option<&str> {
        self.header("traceparent")?.as_str()
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.properties.get(name)?.as_str()
    }

    /// Whether an attempt at it may have been cut off before.
    #[cfg(feature = "inbox")]
    pub(super) fn came_back(&self) -> bool {
        self.redelivered || self.delivery_count > 0
    }
}

/// The time as Postgres takes it. Past the year 9999 there is nothing to tell apart: a time so far
/// ahead is `beyond_tomorrow`.
#[expect(clippy::cast_precision_loss, reason = "a double is exact beyond this limit")]
pub(super) fn seconds(occurred_at: u64) -> f64 {
    const YEAR_9999: u64 = 253_402_300_799;
    occurred_at.min(YEAR_9999) as f64
}
