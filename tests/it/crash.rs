//! Faults under load: the real binary between real servers that are killed, frozen and stopped.
//!
//! Every test asserts the same at the end (`Scene::finish`): nothing lost, nothing that never
//! committed, first arrivals of each key in order, no more duplicates than the window and 100 ms
//! of events per fault. The long ones run when WATERSHIP_FULL is set.

use std::time::Duration;

use tokio::time::Instant;
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal, StopMode};

use crate::crash_relay::Window;
use crate::crash_support::{Load, Scene, full};
use crate::support::{own_database, own_vhost};

/// A relay must not hold a fast shutdown of Postgres for longer.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_relay_killed_again_and_again_loses_nothing_and_keeps_the_order() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window { events: 1024, unconfirmed: 512 };
    let mut scene = Scene::new("relay kill -9", &database.url, &vhost.url, window).await;
    let mut dice = scene.dice();
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 24_000, rate: 2_000, rows: 5 });
    scene.flowing(500).await;
    for kill in 1..=8 {
        // A random moment, the start of the relay included: 2 events are committed in 1 ms.
        scene.committed_more(dice.u64(40..3_000)).await;
        scene.fault(&format!("kill -9 of the relay, {kill}"));
        scene.relay().kill();
        scene.relay().start();
        // Half of the kills hit a relay that has not come far.
        if dice.bool() {
            scene.recovered(Instant::now(), 0).await;
        }
    }
    scene.finish().await;
}

#[tokio::test]
async fn a_relay_killed_while_it_drains_large_transactions_loses_nothing() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = Scene::new("backlog", &database.url, &vhost.url, Window::default()).await;
    let events = if full() { 60_000 } else { 20_000 };
    scene.write(Load { events, rate: 0, rows: 200 });
    scene.written().await;
    let mut dice = scene.dice();
    scene.consume();
    scene.relay().start();
    for kill in 1..=5 {
        // By confirms, not by arrivals: the consumer may lag behind.
        scene.relay().confirms(dice.u64(1..u64::from(events) / 7)).await;
        scene.fault(&format!("kill -9 of the relay, {kill}"));
        scene.relay().kill();
        scene.relay().start();
        scene.recovered(Instant::now(), 0).await;
    }
    scene.finish().await;
}

#[tokio::test]
async fn a_broker_killed_and_restarted_under_load_gets_everything_in_order() {
    let database = own_database().await;
    let mut node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    let window = Window::default();
    let mut scene = Scene::new("broker", &database.url, &node.url("/"), window).await;
    scene.relay().start();
    scene.write(Load { events: 25_000, rate: 800, rows: 5 });
    scene.confirmed_more(1_000).await;

    scene.fault("kill -9 of the broker");
    node.kill().await;
    node.start_again().await.expect("the node starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.confirmed_more(1_000).await;

    scene.fault("orderly restart of the broker");
    node.stop().await.expect("the node stops");
    node.start_again().await.expect("the node starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.consume();
    scene.finish().await;
}

#[tokio::test]
async fn a_postgres_that_crashes_and_restarts_under_load_loses_nothing() {
    let vhost = own_vhost().await;
    let mut server = Postgres::start(PostgresOptions::default()).await.expect("a private server");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    let mut scene = Scene::new("postgres", &url, &vhost.url, Window::default()).await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 20_000, rate: 1_500, rows: 5 });
    scene.flowing(1_000).await;

    scene.fault("immediate shutdown of Postgres");
    server.stop(StopMode::Immediate).await.expect("stops");
    server.start_again().await.expect("recovers");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(1_000).await;

    scene.fault("kill -9 of Postgres");
    server.kill().await;
    server.start_again().await.expect("recovers");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(1_000).await;

    scene.fault("fast restart of Postgres");
    fast_shutdown(&mut server, "with the broker up").await;
    server.start_again().await.expect("starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.finish().await;
}

#[tokio::test]
async fn postgres_shuts_down_within_5_seconds_with_a_frozen_and_with_a_dead_broker() {
    let mut server = Postgres::start(PostgresOptions::default()).await.expect("a private server");
    let mut node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    let mut scene = Scene::new("shutdown", &url, &node.url("/"), Window::default()).await;
    scene.relay().start();
    scene.write(Load { events: 16_000, rate: 800, rows: 5 });
    scene.confirmed_more(500).await;

    scene.fault("fast shutdown with the broker frozen");
    node.signal(Signal::Stop);
    let piled_up = |status: &serde_json::Value| status["in_flight"].as_u64() >= Some(200);
    scene.relay().reaches("messages in flight", piled_up).await;
    fast_shutdown(&mut server, "with the broker frozen").await;
    server.start_again().await.expect("starts again");
    node.signal(Signal::Cont);
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.confirmed_more(500).await;

    scene.fault("fast shutdown with the broker dead");
    node.kill().await;
    fast_shutdown(&mut server, "with the broker dead").await;
    server.start_again().await.expect("starts again");
    node.start_again().await.expect("starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.consume();
    scene.finish().await;
}

async fn fast_shutdown(server: &mut Postgres, how: &str) {
    let begin = Instant::now();
    server.stop(StopMode::Fast).await.expect("stops");
    let took = begin.elapsed();
    println!("fast shutdown of Postgres {how}: {took:.2?}");
    assert!(took < SHUTDOWN_LIMIT, "{how}: {took:?}");
}
