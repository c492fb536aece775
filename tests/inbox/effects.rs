//! One effect for each message, in the order of its key.

use std::sync::Arc;

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::Semaphore;

use crate::stage::{Gate, Handled, Stage, record, run, spans};
use crate::support::framing::{self, Protocol};
use crate::support::proxy::{Action, Direction, How, Proxy, Trigger};
use crate::support::servers::rabbit;
use crate::support::waiting::until;

#[tokio::test]
async fn a_message_that_comes_three_times_has_one_effect() {
    let stage = Stage::new().await;
    for _ in 0..3 {
        stage.publish("m1", "k", "1").await;
    }
    stage.publish("m2", "k", "2").await;
    let running = stage.start();
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    until("both duplicates are counted", async || stage.counted("duplicates_total", "") == 2).await;
    running.stop().await;
    assert_eq!((stage.waiting().await, stage.counted("handled_total", "")), (0, 2));
}

#[tokio::test]
async fn a_message_whose_acknowledgement_is_lost_has_one_effect() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    proxy.trigger(Trigger {
        direction: Direction::ToServer,
        matches: framing::is_ack,
        nth: 1,
        action: Action::CutBefore(How::Reset),
        for_ever: false,
    });
    stage.publish_many(20, 3).await;
    let inbox = watership::inbox::Inbox::new(&stage.consumer).queue(&stage.queue);
    let inbox = inbox.postgres(&stage.postgres).amqp(proxy.url(&stage.amqp));
    let running = run(inbox, |message, tx| Box::pin(record(message, tx)));
    proxy.strikes().await;
    stage.effects_come(20).await;
    until("the redelivery is a duplicate", async || stage.counted("duplicates_total", "") > 0)
        .await;
    assert!(stage.counted("redelivered_total", "") > 0);
    assert!(stage.counted("resubscribed_total", "") > 0);
    running.stop().await;
    assert_eq!(stage.effects("%").await.len(), 20);
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn two_consumers_with_the_same_message_at_once_have_one_effect() {
    let stage = Stage::new().await;
    let gate = Gate::new();
    let first = gate.run(stage.inbox().prefetch(1));
    let second = gate.run(stage.inbox().prefetch(1));
    stage.publish("m1", "k", "1").await;
    gate.begun.acquire().await.expect("open").forget();
    // The other consumer gets this one, because the first has its one message.
    stage.publish("m1", "k", "1").await;
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' \
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    until("the duplicate waits for the first", async || stage.text(waits).await == "1").await;
    gate.go.add_permits(2);
    until("the duplicate is one", async || stage.counted("duplicates_total", "") == 1).await;
    assert_eq!(stage.effects("%").await, ["1"]);
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn messages_of_a_key_are_handled_in_order_and_keys_side_by_side() {
    let stage = Stage::new().await;
    stage.publish("first", "slow", "0").await;
    stage.publish_many(60, 5).await;
    stage.publish("last", "slow", "61").await;
    let others = Arc::new(Semaphore::new(0));
    let inbox = stage.inbox().concurrency(4).prefetch(100);
    let running = run(inbox, move |message, tx| handle_late(message, tx, &others));
    stage.effects_come(62).await;
    // The first of the slow key has waited for sixty others, so it did not hold them up.
    assert_eq!(stage.effects("slow").await, ["0", "61"]);
    for key in 0..5 {
        let numbers: Vec<u32> =
            stage.effects(&format!("k{key}")).await.iter().map(|n| n.parse().unwrap()).collect();
        assert!(numbers.is_sorted() && numbers.len() == 12, "{numbers:?}");
    }
    running.stop().await;
}

/// The first message of the key `slow` waits until all others are handled.
fn handle_late<'a>(
    message: &'a watership::inbox::Message,
    tx: &'a watership::inbox::Transaction<'a>,
    others: &Arc<Semaphore>,
) -> Handled<'a> {
    let others = others.clone();
    Box::pin(async move {
        match message.id.as_str() {
            "first" => others.acquire_many(60).await.map(drop)?,
            "last" => {}
            _ => others.add_permits(1),
        }
        record(message, tx).await
    })
}

#[tokio::test]
async fn a_message_without_an_id_is_parked_with_that_reason() {
    let stage = Stage::new().await;
    stage.publish_at("", None, "k", "anonymous").await;
    stage.publish("m1", "other", "1").await;
    let running = stage.start();
    stage.effects_come(1).await;
    until("it is parked", async || !stage.parked().await.is_empty()).await;
    let parked = stage.parked().await;
    assert!(
        parked[0].starts_with("sha256-") && parked[0].ends_with(" no_message_id"),
        "{parked:?}"
    );
    running.stop().await;
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn a_message_without_a_time_has_one_effect_too() {
    let stage = Stage::new().await;
    for _ in 0..3 {
        stage.publish_at("m1", None, "", "1").await;
    }
    let running = stage.start();
    until("both duplicates are counted", async || stage.counted("duplicates_total", "") == 2).await;
    assert_eq!(stage.effects("%").await, ["1"]);
    running.stop().await;
}

#[tokio::test]
async fn what_postgres_cannot_store_of_a_message_does_not_hold_up_its_queue() {
    let stage = Stage::new().await;
    let mut headers = FieldTable::default();
    headers.insert("ws-key".into(), AMQPValue::LongString("a\0b".into()));
    headers.insert("odd\0".into(), AMQPValue::LongString(b"\xff\0"[..].into()));
    let properties = BasicProperties::default().with_message_id("m1".into()).with_headers(headers);
    stage.publish_with(properties, "1").await;
    // Milliseconds where seconds belong, and the largest number there is.
    for (id, at) in [("m2", crate::stage::now() * 1000), ("m3", u64::MAX)] {
        stage.publish_at(id, Some(at), "", "late").await;
    }
    let long = "x".repeat(100_000);
    stage.publish("m4", &long, "4").await;
    stage.publish("m5", "k", "5").await;
    let running = stage.start();
    let mut effects = stage.effects_come(3).await;
    effects.sort();
    assert_eq!(effects, ["1", "4", "5"]);
    until("both are parked", async || stage.parked().await.len() == 2).await;
    let mut parked = stage.parked().await;
    parked.sort();
    assert_eq!(parked, ["m2 beyond_tomorrow", "m3 beyond_tomorrow"]);
    running.stop().await;
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn the_handler_runs_in_a_span_with_the_trace_context_of_the_message() {
    let stage = Stage::new().await;
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent.into()));
    headers.insert("ws-key".into(), AMQPValue::LongString("k7".into()));
    let properties = BasicProperties::default().with_message_id("m1".into()).with_headers(headers);
    stage.publish_with(properties, "1").await;
    let running = stage.start();
    stage.effects_come(1).await;
    running.stop().await;
    let consumer = format!("consumer=\"{}\"", stage.consumer);
    let seen = spans().lock().expect("nobody panics with it").clone();
    let seen = seen.into_iter().find(|fields| fields.contains(&consumer)).expect("a span");
    for field in [
        format!("traceparent=\"{traceparent}\""),
        "message_id=\"m1\"".to_owned(),
        "key=\"k7\"".to_owned(),
    ] {
        assert!(seen.contains(&field), "{field} in {seen}");
    }
}
