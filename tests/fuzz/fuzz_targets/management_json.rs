//! Any JSON of the management API: what can be read can be graded, and a circle of exchanges ends.
//!
//! The lines are an exchange, its bindings and a queue. Run:
//! `scripts/fuzz 60 management_json`

#![no_main]

use libfuzzer_sys::fuzz_target;
use watership::amqp::audit::{BindingFacts, ExchangeFacts, QueueFacts, Survey};
use watership::message::KeyPart;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.splitn(3, |byte| *byte == b'\n');
    let mut survey = Survey { broker_major: 4, ..Survey::default() };
    let exchange = lines.next().and_then(|line| serde_json::from_slice::<ExchangeFacts>(line).ok());
    let Some(exchange) = exchange else { return };
    // Two of them, so that bindings can lead from one to the other and back.
    survey.exchanges.insert("a".into(), exchange.clone());
    survey.exchanges.insert("b".into(), exchange);
    let bindings = lines.next().and_then(|line| serde_json::from_slice(line).ok());
    let bindings: Vec<BindingFacts> = bindings.unwrap_or_default();
    survey.bindings.insert("a".into(), bindings.clone());
    survey.bindings.insert("b".into(), bindings);
    if let Some(queue) = lines.next().and_then(|line| serde_json::from_slice(line).ok()) {
        let queue: QueueFacts = queue;
        survey.queues.insert(queue.name.clone(), queue);
    }
    let key = [KeyPart::Text("order.".into()), KeyPart::Any, KeyPart::Word];
    let graded = survey.grade(&[], "a", &key);
    assert!(!graded.reason.is_empty());
});
