//! Whatever the broker's side does, consuming continues.

use std::sync::Arc;
use std::time::Duration;

use lapin::BasicProperties;
use tokio::sync::Semaphore;
use watership::dev::{Rabbit, RabbitOptions};
use watership::inbox::Inbox;

use crate::stage::{Gate, Stage, record, run};
use crate::support::framing::Protocol;
use crate::support::proxy::{Action, Direction, Flow, How, Proxy, Trigger};
use crate::support::servers::{own_database, own_node, rabbit, vhost_on};
use crate::support::waiting::until;

/// A consumer whose way to the broker is this proxy.
fn through(stage: &Stage, proxy: &Proxy) -> Inbox {
    let inbox = Inbox::new(&stage.consumer).queue(&stage.queue);
    inbox.postgres(&stage.postgres).amqp(proxy.url(&stage.amqp))
}

#[tokio::test]
async fn a_queue_that_is_deleted_and_made_again_is_consumed_again() {
    let stage = Stage::new().await;
    let running = stage.start();
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    stage.delete().await;
    let cancelled = "cause=\"cancelled\"";
    until("it is noticed", async || stage.counted("resubscribed_total", cancelled) == 1).await;
    stage.declare(&[]).await;
    stage.publish("m2", "k", "2").await;
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    running.stop().await;
}

#[tokio::test]
async fn a_queue_that_comes_later_is_consumed() {
    let stage = Stage::new().await;
    stage.delete().await;
    let running = stage.start();
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                    AND application_name LIKE 'watership inbox%'";
    until("it has its connections", async || stage.text(sessions).await == "10").await;
    stage.declare(&[]).await;
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    assert!(running.is_running());
    running.stop().await;
}

#[tokio::test]
async fn a_handler_beyond_the_consumer_timeout_loses_its_channel_and_has_one_effect() {
    let conf = vec!["consumer_timeout = 1000".to_owned()];
    let node = Rabbit::start(RabbitOptions { conf, ..Default::default() }).await.expect("a node");
    let often = "application:set_env(rabbit, channel_tick_interval, 500).";
    node.ctl(&["eval", often]).await.expect("it looks often");
    let stage = Stage::on(own_database().await, &node.url("/")).await;
    let gate = Gate::new();
    stage.publish("m1", "k", "1").await;
    stage.publish("m2", "k", "2").await;
    let running = gate.run(stage.inbox());
    // By a closed channel up to 4.2, by a cancel from 4.3 on.
    until("it is noticed", async || stage.counted("resubscribed_total", "") > 0).await;
    gate.go.add_permits(100);
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    until("the redelivery is a duplicate", async || stage.counted("duplicates_total", "") > 0)
        .await;
    assert!(running.is_running());
    running.stop().await;
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_middle_of_handlers_repeats_no_effect() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let running = run(through(&stage, &proxy), |message, tx| Box::pin(record(message, tx)));
    for round in 0_u32..5 {
        let before = stage.counted("handled_total", "");
        for n in 1..=30 {
            let number = round * 30 + n;
            stage.publish(&format!("m{number}"), &format!("k{}", n % 4), &number.to_string()).await;
        }
        // Only a consumer that is connected loses its connection.
        until("some are handled", async || stage.counted("handled_total", "") > before).await;
        proxy.cut(if round % 2 == 0 { How::Reset } else { How::Fin });
    }
    let effects = stage.effects_come(150).await;
    assert_eq!(effects.len(), 150);
    for key in 0..4 {
        let bodies = stage.effects(&format!("k{key}")).await;
        let numbers: Vec<u32> = bodies.iter().map(|n| n.parse().unwrap()).collect();
        assert!(numbers.is_sorted(), "one consumer keeps the order: {numbers:?}");
    }
    assert!(stage.counted("resubscribed_total", "cause=\"connection_lost\"") > 0);
    running.stop().await;
}

#[tokio::test]
async fn a_connection_that_is_half_open_is_given_up() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let running = run(through(&stage, &proxy), |message, tx| Box::pin(record(message, tx)));
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    proxy.flows(Flow { dead: true, ..Flow::default() });
    stage.publish("m2", "k", "2").await;
    let lost = "cause=\"connection_lost\"";
    until("it is noticed", async || stage.counted("resubscribed_total", lost) == 1).await;
    proxy.heal();
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    running.stop().await;
}

/// A `basic.cancel` of the broker.
fn is_cancel(frame: &[u8]) -> bool {
    frame.first() == Some(&1) && frame.get(7..11) == Some(&[0, 60, 0, 30])
}

#[tokio::test]
async fn a_cancel_that_got_lost_is_noticed_at_the_queue() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    proxy.trigger(Trigger {
        direction: Direction::ToRelay,
        matches: is_cancel,
        nth: 1,
        action: Action::Drop,
        for_ever: false,
    });
    let running = run(through(&stage, &proxy), |message, tx| Box::pin(record(message, tx)));
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    stage.delete().await;
    proxy.strikes().await;
    stage.declare(&[]).await;
    stage.publish("m2", "k", "2").await;
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    assert_eq!(stage.counted("resubscribed_total", "cause=\"watchdog\""), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_broker_that_restarts_is_consumed_again() {
    let mut node = own_node().await;
    let stage = Stage::on(own_database().await, &vhost_on(&node).await).await;
    let running = stage.start();
    stage.publish_many(20, 3).await;
    stage.effects_come(20).await;
    node.stop().await.expect("the node stops");
    node.start_again().await.expect("the node starts again");
    let mut stage = stage;
    until("its queue takes it", async || {
        stage.again().await;
        let again = BasicProperties::default().with_message_id("again".into());
        stage.try_publish(again, "again").await
    })
    .await;
    stage.effects_come(21).await;
    assert!(running.is_running());
    running.stop().await;
}

#[tokio::test]
async fn a_stop_lets_handlers_end_and_gives_the_rest_back() {
    let stage = Stage::new().await;
    let gate = Gate::new();
    stage.publish_many(10, 10).await;
    let running = gate.run(stage.inbox().concurrency(2));
    gate.begun.acquire_many(2).await.expect("open").forget();
    let stopping = tokio::spawn(running.stop());
    gate.go.add_permits(2);
    stopping.await.expect("it stops");
    assert_eq!(gate.begun.available_permits(), 0, "nothing was begun after the stop");
    assert_eq!(stage.effects_come(2).await.len(), 2);
    until("the rest is back", async || stage.waiting().await == 8).await;
}

#[tokio::test]
async fn a_stop_cuts_off_what_does_not_end_and_its_effect_is_undone() {
    let stage = Stage::new().await;
    stage.publish("m1", "k", "1").await;
    let begun = Arc::new(Semaphore::new(0));
    let tell = begun.clone();
    let inbox = stage.inbox().stop_timeout(Duration::from_millis(100));
    let running = run(inbox, move |message, tx| {
        let begun = tell.clone();
        Box::pin(async move {
            record(message, tx).await?;
            begun.add_permits(1);
            std::future::pending().await
        })
    });
    begun.acquire().await.expect("open").forget();
    running.stop().await;
    assert!(stage.effects("%").await.is_empty());
    let again = stage.start();
    stage.effects_come(1).await;
    again.stop().await;
}
