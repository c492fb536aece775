//! What came out of a queue: messages, and waits for them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::waiting::{LIMIT, LONGEST};

/// Events of this aggregate type only show that the relay has passed a point.
pub const FENCE: &str = "fence";

/// One message as it came out of a queue.
#[derive(Debug, Clone)]
pub struct Message {
    pub exchange: String,
    pub routing_key: String,
    pub body: String,
    pub bytes: Vec<u8>,
    pub properties: BasicProperties,
}

impl Message {
    /// Neither a fence nor a marker.
    fn is_event(&self) -> bool {
        !self.exchange.is_empty() && !self.routing_key.starts_with(FENCE)
    }

    /// The message id.
    pub fn id(&self) -> String {
        self.properties.message_id().as_ref().map(ToString::to_string).unwrap_or_default()
    }

    /// The property `type`.
    pub fn kind(&self) -> &str {
        self.properties.kind().as_ref().map(|kind| kind.as_str()).unwrap_or_default()
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&AMQPValue> {
        self.properties.headers().as_ref()?.inner().get(name)
    }

    /// A header that is text.
    pub fn text(&self, name: &str) -> String {
        match self.header(name) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            other => panic!("header {name} is {other:?}"),
        }
    }

    /// The body, parsed.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// What a consumer got.
#[derive(Debug, Clone, Default)]
pub struct Inbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    messages: Mutex<Vec<Message>>,
    arrived: Notify,
}

impl Inbox {
    /// Consumes `queue` until the connection ends.
    pub async fn open(channel: &Channel, queue: &str) -> Self {
        let inbox = Self::default();
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consume =
            channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
        let mut consumer = consume.await.expect("a consumer");
        let shared = Arc::clone(&inbox.0);
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                let message = Message {
                    exchange: delivery.exchange.to_string(),
                    routing_key: delivery.routing_key.to_string(),
                    body: String::from_utf8_lossy(&delivery.data).into_owned(),
                    bytes: delivery.data,
                    properties: delivery.properties,
                };
                shared.messages.lock().expect("nobody panics with it").push(message);
                shared.arrived.notify_waiters();
            }
        });
        inbox
    }

    /// Waits until `enough`, as long as messages come; then returns everything.
    pub async fn wait(&self, what: &str, enough: impl Fn(&[Message]) -> bool) -> Vec<Message> {
        let all = async {
            loop {
                let arrived = self.0.arrived.notified();
                tokio::pin!(arrived);
                arrived.as_mut().enable();
                if enough(&self.0.messages.lock().expect("nobody panics with it")) {
                    return true;
                }
                if timeout(LIMIT, arrived).await.is_err() {
                    return false;
                }
            }
        };
        let came = timeout(LONGEST, all).await.unwrap_or(false);
        let messages = self.0.messages.lock().expect("nobody panics with it").clone();
        assert!(came, "{what}: {} messages came, then none for {LIMIT:?}", messages.len());
        messages
    }

    /// Waits until `count` messages have arrived, fences and markers left out; returns all of them.
    pub async fn count(&self, count: usize) -> Vec<Message> {
        let enough = |all: &[Message]| all.iter().filter(|m| m.is_event()).count() >= count;
        let mut messages = self.wait(&format!("{count} messages"), enough).await;
        messages.retain(Message::is_event);
        messages
    }

    /// Waits for all that is in the queue now; leaves fences and markers out.
    pub async fn flush(&self, channel: &Channel, queue: &str) -> Vec<Message> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let marker = format!("marker-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default().with_type(marker.as_str().into());
        let publish = channel.basic_publish("".into(), queue.into(), options, b"", properties);
        publish.await.expect("the marker is published");
        let has_marker = |all: &[Message]| all.iter().any(|message| message.kind() == marker);
        let mut messages = self.wait("the marker", has_marker).await;
        messages.retain(Message::is_event);
        messages
    }
}

/// The property `type` of each message.
pub fn kinds(messages: &[Message]) -> Vec<&str> {
    messages.iter().map(Message::kind).collect()
}

/// The event types of one key, in order of arrival.
pub fn of_key<'a>(messages: &'a [Message], key: &str) -> Vec<&'a str> {
    messages.iter().filter(|m| m.text("ws-key") == key).map(Message::kind).collect()
}
