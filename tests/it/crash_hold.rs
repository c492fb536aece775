//! Faults that take nothing away but time: peers frozen, a broker that blocks, a queue unbound,
//! a second relay waiting. The judgement is that of `crash.rs`.
//!
//! A fault lasts until something has happened (so much committed, the session given up) or as long
//! as somebody watches that nothing happens. The long ones run when WATERSHIP_FULL is set.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, timeout};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal};

use crate::crash_relay::{EXCHANGE, QUEUE, Relay, Window};
use crate::crash_support::{Load, Scene, client, full};
use crate::support::{own_database, own_vhost};

/// Within this time a waiting relay has to take over from one that was killed.
const TAKEOVER: Duration = Duration::from_secs(5);
/// A steady load for about fifteen seconds.
const LOAD: Load = Load { events: 15_000, rate: 1_000, rows: 5 };

#[tokio::test]
async fn an_unbound_queue_holds_its_route_without_a_duplicate_until_it_is_bound_again() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window::default();
    let mut scene = Scene::new("unbound", &database.url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 8_000, ..LOAD });
    scene.flowing(1_000).await;
    let (_connection, channel) = vhost.connect().await;

    scene.fault("queue unbound");
    let none = lapin::types::FieldTable::default();
    let unbound = channel.queue_unbind(QUEUE.into(), EXCHANGE.into(), "#".into(), none.clone());
    unbound.await.expect("the queue is unbound");
    let held = |status: &Value| !status["held"].as_array().is_none_or(Vec::is_empty);
    scene.relay().reaches("the route is held", held).await;
    scene.relay().stays(Duration::from_secs(2), held).await;
    let before = scene.relay().confirmed().await;
    let bound =
        channel.queue_bind(QUEUE.into(), EXCHANGE.into(), "#".into(), Default::default(), none);
    bound.await.expect("the queue is bound");
    scene.recovered(Instant::now(), before).await;
    scene.relay().reaches("the hold ends", |status| !held(status)).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "a hold does not end the session");
    assert_eq!(scene.finish().await, 0, "an unbound queue got nothing, so nothing comes twice");
}

#[tokio::test]
async fn a_second_relay_stands_by_and_takes_over_in_order_when_the_first_is_killed() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window::default();
    let mut scene = Scene::new("takeover", &database.url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 10_000, ..LOAD });
    scene.flowing(500).await;
    let mut second = Relay::new(&database.url, &vhost.url, window);
    second.start();
    second.reaches("the second stands by", |status| status["state"] == "standing_by").await;
    scene.flowing(500).await;
    assert_eq!(second.confirmed().await, 0, "two relays must not publish");

    scene.fault("kill -9 of the first of two relays");
    scene.relay().kill();
    std::mem::swap(scene.relay(), &mut second);
    let took = scene.recovered(Instant::now(), 0).await;
    assert!(took < TAKEOVER, "the second took over after {took:?}");
    scene.finish().await;
}

#[tokio::test]
async fn a_frozen_relay_goes_on_where_it_was() {
    if !full() {
        return;
    }
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window::default();
    let mut scene = Scene::new("relay frozen", &database.url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(LOAD);
    scene.flowing(1_000).await;

    scene.fault("relay frozen for 8000 events");
    let before = scene.relay().confirmed().await;
    scene.relay().signal(Signal::Stop);
    // 8 seconds at the rate of the load.
    scene.committed_more(8_000).await;
    scene.relay().signal(Signal::Cont);
    scene.recovered(Instant::now(), before).await;
    scene.finish().await;
}

#[tokio::test]
async fn a_frozen_broker_ends_the_session_and_gets_the_rest_afterwards() {
    if !full() {
        return;
    }
    let database = own_database().await;
    let mut node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    let window = Window::default();
    let mut scene = Scene::new("broker frozen", &database.url, &node.url("/"), window).await;
    scene.relay().start();
    scene.write(LOAD);
    scene.confirmed_more(1_000).await;

    scene.fault("broker frozen until given up");
    let begin = Instant::now();
    node.signal(Signal::Stop);
    let over = |status: &Value| status["sessions"].as_u64() > Some(1);
    scene.relay().reaches("the session is given up", over).await;
    println!("the session with a frozen broker was given up after {:.2?}", begin.elapsed());
    let before = scene.relay().confirmed().await;
    node.signal(Signal::Cont);
    scene.recovered(Instant::now(), before).await;
    scene.consume();
    scene.finish().await;
}

#[tokio::test]
async fn a_frozen_postgres_loses_nothing() {
    if !full() {
        return;
    }
    let vhost = own_vhost().await;
    let mut server = Postgres::start(PostgresOptions::default()).await.expect("a private server");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    let mut scene = Scene::new("postgres frozen", &url, &vhost.url, Window::default()).await;
    scene.consume();
    scene.relay().start();
    scene.write(LOAD);
    scene.flowing(1_000).await;

    scene.fault("Postgres frozen for 5 s");
    let other = client(&url).await.expect("a connection");
    server.signal(Signal::Stop);
    let silence = timeout(Duration::from_secs(5), other.simple_query("SELECT 1")).await;
    assert!(silence.is_err(), "a frozen server must not answer");
    let before = scene.relay().confirmed().await;
    server.signal(Signal::Cont);
    scene.recovered(Instant::now(), before).await;
    scene.finish().await;
}

#[tokio::test]
async fn a_memory_alarm_blocks_the_relay_without_ending_its_session() {
    if !full() {
        return;
    }
    let database = own_database().await;
    let node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    let window = Window::default();
    let mut scene = Scene::new("memory alarm", &database.url, &node.url("/"), window).await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 20_000, ..LOAD });
    scene.flowing(1_000).await;

    scene.fault("memory alarm for 8 s");
    node.ctl(&["set_vm_memory_high_watermark", "0"]).await.expect("the alarm is on");
    let blocked = |status: &Value| status["broker_blocked"] == true;
    scene.relay().reaches("the relay is blocked", blocked).await;
    let streaming = |status: &Value| blocked(status) && status["state"] == "streaming";
    scene.relay().stays(Duration::from_secs(8), streaming).await;
    let sql = "SELECT count(*) FROM pg_stat_replication JOIN pg_replication_slots \
               ON active_pid = pid WHERE database = current_database() AND state = 'streaming'";
    let client = client(&database.url).await.expect("a connection");
    let walsenders: i64 = client.query_one(sql, &[]).await.expect("an answer").get(0);
    assert_eq!(walsenders, 1, "Postgres still streams to the relay");
    let before = scene.relay().confirmed().await;
    node.ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]).await.expect("the alarm is off");
    scene.recovered(Instant::now(), before).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "an alarm does not end the session");
    assert_eq!(scene.finish().await, 0, "an alarm loses no confirm, so nothing comes twice");
}
