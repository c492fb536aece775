//! The exchange and the one queue of a scene, taken away and given back by hand.

use lapin::Channel;
use lapin::options::QueueDeclareOptions;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;

use super::relay::{EXCHANGE, QUEUE};
use super::waiting::Patience;

/// A route is held.
pub fn held(status: &Value) -> bool {
    !status["held"].as_array().is_none_or(Vec::is_empty)
}

/// A route is held, and nothing is out that could still be confirmed.
pub fn quiet(status: &Value) -> bool {
    held(status) && status["in_flight"] == 0
}

/// Takes the one queue away from the exchange.
pub async fn unbind(channel: &Channel) {
    let done =
        channel.queue_unbind(QUEUE.into(), EXCHANGE.into(), "#".into(), FieldTable::default());
    done.await.expect("the queue is unbound");
}

/// Gives it back.
pub async fn bind(channel: &Channel) {
    let (options, none) = (Default::default(), FieldTable::default());
    let done = channel.queue_bind(QUEUE.into(), EXCHANGE.into(), "#".into(), options, none);
    done.await.expect("the queue is bound");
}

/// Declares the one queue again, as the relay would.
pub async fn declare(channel: &Channel) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(QUEUE.into(), options, arguments).await.expect("declared");
}

/// Waits until nothing is ready in the one queue.
pub async fn empty(channel: &Channel) {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let mut patience = Patience::new();
    loop {
        let queue = channel.queue_declare(QUEUE.into(), passive, FieldTable::default()).await;
        let left = queue.expect("the queue is there").message_count();
        if left == 0 {
            return;
        }
        patience.more(left, || "the queue is empty".into()).await;
    }
}
