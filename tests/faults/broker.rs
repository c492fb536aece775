//! Group D: the broker, its node and its topology.

use std::time::Duration;

use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use serde_json::Value;
use tokio::time::Instant;
use watership::dev::{Rabbit, Signal};

use crate::report::Class;
use crate::support::full;
use crate::support::judge::Judged;
use crate::support::relay::{EXCHANGE, QUEUE, Window};
use crate::support::scene::{Place, Scene, plain, recovered_after};
use crate::support::servers::{
    Vhost, execute, first_confirm, own_database, own_node, own_vhost, rabbit, vhost_on,
};
use crate::support::topology::{bind, empty, held, quiet, unbind};
use crate::support::waiting::{Patience, throughout};
use crate::support::writers::{Load, STEADY};

const UNREACHABLE: &str = "watership_reconnects_total{cause=\"unreachable\"}";

/// A run on the shared node, in which events flow.
async fn flowing(title: &str, settings: &str) -> (Vhost, Scene) {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain(title, &database.url, &vhost.url, settings).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    (vhost, scene)
}

#[tokio::test]
async fn broker_d01_kill_nine_of_the_node() {
    let class = Class::new("D1", "broker_d01_kill_nine_of_the_node");
    let (mut node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    first_confirm(url.clone()).await;
    let mut scene = plain("D1", &database.url, &url, "").await;
    scene.relay().start();
    scene.write(STEADY);
    // A quorum queue that was declared in the last moment before a kill -9 confirms to nobody
    // afterwards (RabbitMQ 3.10): its node saves the register of its queues a little later.
    scene.confirmed_more(2_500).await;
    scene.fault("kill -9 of the broker");
    node.kill().await;
    scene.relay().logs(&["session ended", "unreachable"]).await;
    let before = scene.relay().confirmed().await;
    node.start_again().await.expect("the node starts again");
    recovered_after(&mut scene, first_confirm(url.clone()), before).await;
    scene.relay().counts(UNREACHABLE, 1).await;
    scene.confirmed_more(500).await;
    scene.consume();
    scene.enough();
    class.survived(&scene.judge().await);
}

/// Messages of a backlog that may be without a confirm at once: few, so that it shows when more
/// than those are sent again.
const UNCONFIRMED: u32 = 100;

/// 60,000 events flow as fast as they can when the broker is lost; returns what came twice. Where
/// that takes so long that nothing flows any more, it is done again with more of them.
async fn lost_in_full_flow(title: &str, lose: impl AsyncFn(&mut Rabbit)) -> Judged {
    for events in [60_000, 240_000] {
        if let Some(judged) = lost_among(events, title, &lose).await {
            return judged;
        }
    }
    panic!("everything was confirmed before the broker was lost");
}

async fn lost_among(events: u32, title: &str, lose: &impl AsyncFn(&mut Rabbit)) -> Option<Judged> {
    let (mut node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    first_confirm(url.clone()).await;
    let window = Window { unconfirmed: UNCONFIRMED, ..Window::default() };
    let (here, broker) = (&*database.url, &*url);
    let place = Place {
        title,
        database: here,
        broker,
        relay_database: here,
        relay_broker: broker,
        window,
        settings: "",
    };
    let mut scene = Scene::at(place).await;
    scene.write(Load { events, rate: 0, rows: 50 });
    scene.written().await;
    scene.relay().start();
    // See D1 for the reason why not at once.
    scene.confirmed_more(5_000).await;
    scene.fault(title);
    lose(&mut node).await;
    scene.relay().logs(&["session ended", "unreachable"]).await;
    let before = scene.relay().confirmed().await;
    if before + u64::from(events) / 10 > u64::from(events) {
        scene.relay().stop().await;
        return None;
    }
    if node.pid().is_none() {
        node.start_again().await.expect("the node starts again");
    }
    recovered_after(&mut scene, first_confirm(url.clone()), before).await;
    scene.consume();
    Some(scene.judge().await)
}

#[tokio::test]
async fn broker_d01_kill_nine_in_full_flow_repeats_only_what_had_no_confirm() {
    let class = Class::new("D1", "broker_d01_kill_nine_in_full_flow");
    let judged = lost_in_full_flow("kill -9 of the broker", async |node| node.kill().await).await;
    assert!(judged.duplicates <= u64::from(UNCONFIRMED), "{judged:?}");
    class.survived(&judged);
}

#[tokio::test]
async fn broker_d03_connection_closed_in_full_flow_repeats_only_what_had_no_confirm() {
    let class = Class::new("D3", "broker_d03_connection_closed_in_full_flow");
    let close = async |node: &mut Rabbit| {
        let closed = node.ctl(&["close_all_connections", "--global", "a test"]).await;
        closed.expect("all connections are closed");
    };
    let judged = lost_in_full_flow("all connections closed", close).await;
    assert!(judged.duplicates <= u64::from(UNCONFIRMED), "{judged:?}");
    class.survived(&judged);
}

#[tokio::test]
async fn broker_d02_orderly_restart() {
    let class = Class::new("D2", "broker_d02_orderly_restart");
    let (mut node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    first_confirm(url.clone()).await;
    let mut scene = plain("D2", &database.url, &url, "").await;
    scene.relay().start();
    scene.write(STEADY);
    scene.confirmed_more(500).await;
    scene.fault("orderly restart of the broker");
    node.stop().await.expect("the node stops");
    scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    // It does not wait for an answer: a reset for what it had not read can overtake its words.
    let log = scene.relay().log_text();
    let says = |text| log.contains(text);
    assert!(says("CONNECTION_FORCED") || says("Connection reset by peer"), "{log}");
    let before = scene.relay().confirmed().await;
    node.start_again().await.expect("the node starts again");
    recovered_after(&mut scene, first_confirm(url.clone()), before).await;
    scene.confirmed_more(500).await;
    scene.consume();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn broker_d03_connection_closed_by_an_operator() {
    let Some(class) = Class::long("D3", "broker_d03_connection_closed_by_an_operator") else {
        return;
    };
    let (vhost, mut scene) = flowing("D3", "").await;
    scene.fault("the operator closes the relay's connection");
    let before = scene.relay().confirmed().await;
    close_relays(&vhost.name).await;
    scene.relay().logs(&["CONNECTION_FORCED"]).await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

/// The publishing connections in this vhost, as paths of the management API, whose list lags
/// behind by seconds.
pub async fn relays(vhost: &str) -> Vec<String> {
    let list = rabbit().await.management("GET", "/api/connections", "").await.expect("a list");
    let list: Vec<Value> = serde_json::from_str(&list).expect("JSON");
    let mine = |c: &&Value| {
        // Only the relay holds a lock queue; consumers and judges present themselves as lapin.
        c["vhost"] == vhost && c["client_properties"]["product"] == "watership"
    };
    let names = list.iter().filter(mine).filter_map(|c| c["name"].as_str());
    let path = |name: &str| name.replace(' ', "%20").replace('>', "%3E").replace(':', "%3A");
    names.map(|name| format!("/api/connections/{}", path(name))).collect()
}

/// Closes the publishing connections in this vhost.
pub async fn close_relays(vhost: &str) {
    let mut patience = Patience::new();
    loop {
        let relays = relays(vhost).await;
        for path in &relays {
            let closed = rabbit().await.management("DELETE", path, "").await;
            closed.expect("the connection is closed");
        }
        if !relays.is_empty() {
            return;
        }
        patience.more((), || format!("a connection of a relay in {vhost}")).await;
    }
}

#[tokio::test]
async fn broker_d04_exchange_deleted_and_made_again() {
    let class = Class::new("D4", "broker_d04_exchange_deleted_and_made_again");
    let (vhost, mut scene) = flowing("D4", "").await;
    let (_connection, channel) = vhost.connect().await;
    scene.fault("exchange deleted");
    channel.exchange_delete(EXCHANGE.into(), Default::default()).await.expect("deleted");
    scene.relay().reaches("the route is held", held).await;
    scene
        .relay()
        .reaches("with the broker's words", |status| {
            status["held"][0]["reason"]
                .as_str()
                .is_some_and(|r| r.contains("no exchange 'watership'"))
        })
        .await;
    assert_eq!(scene.relay().counted("watership_route_held").await, 1);
    // The relay declares it again by itself.
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.relay().reaches("the hold ends", |status| !held(status)).await;
    scene.flowing(500).await;
    scene.relay().logs(&["the route is held and probed", "no exchange 'watership'"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn broker_d08_queue_unbound() {
    let class = Class::new("D8", "broker_d08_queue_unbound");
    let (vhost, mut scene) = flowing("D8", "").await;
    let (_connection, channel) = vhost.connect().await;
    scene.fault("queue unbound");
    unbind(&channel).await;
    scene.relay().reaches("the route is held", held).await;
    assert!(scene.relay().counted("watership_messages_returned_total").await > 0);
    scene.relay().reaches("nothing is out", quiet).await;
    scene.relay().stays(Duration::from_secs(2), held).await;
    let before = scene.relay().confirmed().await;
    bind(&channel).await;
    scene.recovered(Instant::now(), before).await;
    scene.relay().reaches("the hold ends", |status| !held(status)).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "a hold does not end the session");
    scene.flowing(500).await;
    scene.relay().logs(&["the route is held and probed", "unroutable: NO_ROUTE"]).await;
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0, "an unbound queue got nothing, so nothing comes twice");
    class.survived(&judged);
}

#[tokio::test]
async fn broker_d08_queue_deleted_under_load_and_made_again() {
    let class = Class::new("D8", "broker_d08_queue_deleted_under_load_and_made_again");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("D8 deleted", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    let (_connection, channel) = vhost.connect().await;
    scene.fault("queue deleted");
    // What a queue holds goes with it, and that is the operator's loss, as is what is on its way to
    // it, which the broker confirms or forgets. So nothing is, and it is emptied first.
    unbind(&channel).await;
    scene.relay().reaches("the route is held and nothing is out", quiet).await;
    empty(&channel).await;
    let deleted = channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default());
    assert_eq!(deleted.await.expect("deleted"), 0, "the queue was empty");
    // The relay declares it again by itself, with its binding.
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.relay().reaches("the hold ends", |status| !held(status)).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "a hold does not end the session");
    scene.flowing(500).await;
    scene.relay().logs(&["the route is held and probed", "unroutable: NO_ROUTE"]).await;
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0);
    class.survived(&judged);
}

/// What a consumer takes in a second.
const TAKEN: u32 = 3_000;

#[tokio::test]
async fn broker_d10_nacks_of_a_full_queue_with_a_slow_consumer() {
    let mut class = Class::new("D10", "broker_d10_nacks_of_a_full_queue_with_a_slow_consumer");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let policy = r#"{"pattern":"^all$","apply-to":"queues",
        "definition":{"max-length":200,"overflow":"reject-publish"}}"#;
    let path = format!("/api/policies/{}/full", vhost.name);
    rabbit().await.management("PUT", &path, policy).await.expect("the policy is set");
    let mut scene = plain("D10", &database.url, &vhost.url, "").await;
    let events: u32 = if full() { 60_000 } else { 12_000 };
    for hundred in 0..events / 6_000 {
        execute(&database.url, &rows(hundred * 6, 6)).await;
    }
    scene.fault("a queue of 200 that rejects");
    let (_connection, channel) = vhost.connect().await;
    let record = scene.recorder();
    scene.consumed_by(tokio::spawn(take_slowly(channel, record)));
    let begin = Instant::now();
    scene.relay().start();
    scene.delivered(events.into()).await;
    let seconds = begin.elapsed().as_secs_f64();
    let nacks = scene.relay().counted("watership_messages_nacked_total").await;
    // It follows the consumer, which takes 3,000 a second: a figure, and no promise of this test.
    class.note("events_per_second", (f64::from(events) / seconds).round());
    class.note("nacks", nacks);
    assert!(nacks > 0, "the queue was never full");
    scene.relay().logs(&["the broker refuses messages of the route"]).await;
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0, "a nacked message is in no queue");
    class.survived(&judged);
}

/// `count` events of each of 1,000 keys in one transaction, numbered from `from` + 1.
fn rows(from: u32, count: u32) -> String {
    format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 'order', 'k' || k, 'changed', json_build_object('key', 'k' || k, 'n', n) \
         FROM generate_series({from} + 1, {from} + {count}) AS n, generate_series(1, 1000) AS k"
    )
}

/// Takes [`TAKEN`] messages a second, one hundredth of them at a time.
async fn take_slowly(
    channel: Channel,
    mut record: impl FnMut(&lapin::message::Delivery) -> std::ops::ControlFlow<()>,
) {
    use futures_util::StreamExt as _;
    channel.basic_qos(100, BasicQosOptions::default()).await.expect("a prefetch");
    let options = BasicConsumeOptions::default();
    let consume = channel.basic_consume(QUEUE.into(), "".into(), options, FieldTable::default());
    let mut deliveries = consume.await.expect("a consumer");
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    loop {
        tick.tick().await;
        for taken in 1..=TAKEN / 100 {
            let delivery = deliveries.next().await.expect("messages").expect("a message");
            let flow = record(&delivery);
            if taken == TAKEN / 100 || flow.is_break() {
                delivery.ack(BasicAckOptions { multiple: true }).await.expect("acknowledged");
            }
            if flow.is_break() {
                return;
            }
        }
    }
}

#[tokio::test]
async fn broker_d12_memory_alarm() {
    let class = Class::new("D12", "broker_d12_memory_alarm");
    let on = ["set_vm_memory_high_watermark", "0"];
    let off = ["set_vm_memory_high_watermark", "absolute", "2GB"];
    alarm(class, &on, &off).await;
}

#[tokio::test]
async fn broker_d23_disk_alarm() {
    let Some(class) = Class::long("D23", "broker_d23_disk_alarm") else { return };
    let (on, off) = (["set_disk_free_limit", "1000000GB"], ["set_disk_free_limit", "50MB"]);
    alarm(class, &on, &off).await;
}

async fn alarm(class: Class, on: &[&str], off: &[&str]) {
    let (node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    let mut scene = plain("D12", &database.url, &url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("alarm for 6 s");
    node.ctl(on).await.expect("the alarm is on");
    let blocked = |status: &Value| status["broker_blocked"] == true;
    scene.relay().reaches("the relay is blocked", blocked).await;
    assert_eq!(scene.relay().counted("watership_broker_blocked ").await, 1);
    // What was out may still be confirmed, and nothing else is.
    let out = scene.relay().status().await["in_flight"].as_u64().expect("a number");
    let most = scene.relay().confirmed().await + out;
    throughout(Duration::from_secs(6), "one session, blocked", async || {
        let status = scene.relay().status().await;
        assert!(scene.relay().confirmed().await <= most, "{status}");
        blocked(&status) && status["state"] == "streaming"
    })
    .await;
    let before = scene.relay().confirmed().await;
    node.ctl(off).await.expect("the alarm is off");
    scene.recovered(Instant::now(), before).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "an alarm does not end the session");
    scene.flowing(500).await;
    scene.relay().logs(&["broker blocked the connection", "broker unblocked the connection"]).await;
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0, "an alarm loses no confirm, so nothing comes twice");
    class.survived(&judged);
}

#[tokio::test]
async fn broker_d18_frozen_until_given_up() {
    let mut class = Class::new("D18", "broker_d18_frozen_until_given_up");
    let (mut node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    let mut scene = plain("D18", &database.url, &url, "").await;
    scene.relay().start();
    scene.write(STEADY);
    scene.confirmed_more(500).await;
    scene.fault("broker frozen until given up");
    let begin = Instant::now();
    node.signal(Signal::Stop);
    scene.relay().logs(&["session ended"]).await;
    class.took("given_up_ms", begin.elapsed());
    throughout(Duration::from_secs(2), "not ready", async || {
        scene.relay().page("/readyz").await != "ready"
    })
    .await;
    let before = scene.relay().confirmed().await;
    node.signal(Signal::Cont);
    recovered_after(&mut scene, first_confirm(url.clone()), before).await;
    scene.consume();
    scene.enough();
    class.survived(&scene.judge().await);
}
