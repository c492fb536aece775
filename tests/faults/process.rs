//! Group E: the relay's own process, killed, frozen, doubled and asked to end.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use watership::dev::Signal;

use crate::broker::relays;
use crate::network::Net;
use crate::report::Class;
use crate::support::framing::{
    Protocol, is_ack, is_any, is_bind, is_body, is_channel_open, is_complete, is_feedback,
    is_publish, is_return, is_wal,
};
use crate::support::full;
use crate::support::proxy::{Action, Direction, Flow, Proxy, Trigger};
use crate::support::relay::{Relay, Window};
use crate::support::scene::{Scene, led, plain, recovered_after};
use crate::support::servers::{
    first_confirm, own_database, own_node, own_postgres, own_vhost, rabbit, vhost_on,
};
use crate::support::topology::{bind, unbind};
use crate::support::waiting::{throughout, until};
use crate::support::writers::STEADY;

/// A message at which the relay is killed.
struct Point {
    name: &'static str,
    before_postgres: bool,
    direction: Direction,
    matches: fn(&[u8]) -> bool,
    /// Whether the message still arrives.
    arrives: bool,
}

const fn point(
    name: &'static str,
    before_postgres: bool,
    direction: Direction,
    matches: fn(&[u8]) -> bool,
    arrives: bool,
) -> Point {
    Point { name, before_postgres, direction, matches, arrives }
}

const OUT: Direction = Direction::ToServer;
const IN: Direction = Direction::ToRelay;

/// Kills the relay `rounds` times at each of these points.
async fn kill_at(mut class: Class, points: &[Point], rounds: u64) {
    let mut net = Net::flowing("kill at a message", "").await;
    let mut dice = net.scene.dice();
    for round in 0..rounds {
        for point in points {
            net.scene.fault(&format!("kill -9 at {}, {round}", point.name));
            let proxy = if point.before_postgres { &net.postgres } else { &net.rabbit };
            let action = if point.arrives { Action::StallAfter } else { Action::StallBefore };
            let (direction, matches) = (point.direction, point.matches);
            let nth = dice.u64(1..20).div_ceil(if is_rare(point) { 10 } else { 1 });
            proxy.trigger(Trigger { direction, matches, nth, action, for_ever: false });
            proxy.strikes().await;
            net.scene.relay().kill();
            // What the dead relay had sent before still arrives, late.
            proxy.heal();
            net.scene.relay().start();
            net.scene.recovered(Instant::now(), 0).await;
        }
    }
    class.note("crash_points", points.len());
    net.scene.relay().says_nothing();
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

/// Messages that come ten times a second at most.
fn is_rare(point: &Point) -> bool {
    point.name.contains("checkpoint") || point.name.contains("feedback")
}

fn rounds() -> u64 {
    if full() { 5 } else { 1 }
}

#[tokio::test]
async fn process_e01_killed_after_wal_was_read() {
    let class = Class::new("E1", "process_e01_killed_after_wal_was_read");
    let points = [
        point("WAL not arrived", true, IN, is_wal, false),
        point("WAL arrived", true, IN, is_wal, true),
    ];
    kill_at(class, &points, rounds()).await;
}

#[tokio::test]
async fn process_e02_killed_after_it_was_decoded() {
    let class = Class::new("E2", "process_e02_killed_after_it_was_decoded");
    kill_at(class, &[point("publish not written", false, OUT, is_publish, false)], rounds()).await;
}

#[tokio::test]
async fn process_e03_killed_around_a_publish() {
    let class = Class::new("E3", "process_e03_killed_around_a_publish");
    let points = [
        point("publish without its body", false, OUT, is_publish, true),
        point("publish written", false, OUT, is_body, true),
    ];
    kill_at(class, &points, rounds()).await;
}

#[tokio::test]
async fn process_e04_killed_after_a_return() {
    let class = Class::new("E4", "process_e04_killed_after_a_return");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let proxy = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let through = proxy.url(&vhost.url);
    let ways = (&*database.url, &*database.url);
    let mut scene = led("E4", ways, (&vhost.url, &through), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    let (_connection, channel) = vhost.connect().await;
    scene.fault("kill -9 after a return");
    let action = Action::StallAfter;
    proxy.trigger(Trigger { direction: IN, matches: is_return, nth: 1, action, for_ever: false });
    unbind(&channel).await;
    proxy.strikes().await;
    scene.relay().kill();
    bind(&channel).await;
    proxy.heal();
    // The topology is fixed by hand: the new relay finds it as it should be.
    scene.relay().start();
    scene.recovered(Instant::now(), 0).await;
    scene.flowing(300).await;
    scene.relay().says_nothing();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e05_killed_around_a_confirm() {
    let class = Class::new("E5", "process_e05_killed_around_a_confirm");
    let points = [
        point("confirm not arrived", false, IN, is_ack, false),
        point("confirm arrived", false, IN, is_ack, true),
    ];
    kill_at(class, &points, rounds()).await;
}

#[tokio::test]
async fn process_e06_killed_around_a_checkpoint() {
    let class = Class::new("E6", "process_e06_killed_around_a_checkpoint");
    let points = [
        point("checkpoint not written", true, OUT, is_bind, false),
        point("checkpoint written, unanswered", true, OUT, is_bind, true),
        point("checkpoint's answer not arrived", true, IN, is_complete, false),
        point("checkpoint answered", true, IN, is_complete, true),
    ];
    kill_at(class, &points, rounds()).await;
}

#[tokio::test]
async fn process_e07_killed_around_a_feedback() {
    let class = Class::new("E7", "process_e07_killed_around_a_feedback");
    let points = [
        point("feedback not written", true, OUT, is_feedback, false),
        point("feedback written", true, OUT, is_feedback, true),
    ];
    kill_at(class, &points, rounds()).await;
}

#[tokio::test]
async fn process_e08_killed_in_its_handshakes() {
    let mut class = Class::new("E8", "process_e08_killed_in_its_handshakes");
    let mut net = Net::flowing("E8", "").await;
    let mut dice = net.scene.dice();
    let kills = if full() { 30 } else { 6 };
    net.scene.relay().kill();
    for kill in 1..=kills {
        net.scene.fault(&format!("kill -9 in a handshake, {kill}"));
        let before_postgres = dice.bool();
        let proxy = if before_postgres { &net.postgres } else { &net.rabbit };
        let direction = if dice.bool() { OUT } else { IN };
        let (nth, action) = (dice.u64(1..10), Action::StallAfter);
        proxy.trigger(Trigger { direction, matches: is_any, nth, action, for_ever: false });
        net.scene.relay().start();
        proxy.strikes().await;
        net.scene.relay().kill();
        proxy.heal();
    }
    net.scene.fault("kill -9 before the channels are open");
    let (matches, action) = (is_channel_open as fn(&[u8]) -> bool, Action::StallBefore);
    net.rabbit.trigger(Trigger { direction: OUT, matches, nth: 1, action, for_ever: false });
    net.scene.relay().start();
    net.rabbit.strikes().await;
    net.scene.relay().kill();
    net.rabbit.heal();
    class.note("crash_points", kills + 1);
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.relay().says_nothing();
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn process_e10_killed_while_it_drains() {
    let class = Class::new("E10", "process_e10_killed_while_it_drains");
    let mut net = Net::flowing("E10", "").await;
    net.scene.fault("kill -9 after SIGTERM");
    net.rabbit.flow(IN, Flow { stalled: true, ..Flow::default() });
    let waiting = |status: &Value| status["in_flight"].as_u64() >= Some(50);
    net.scene.relay().reaches("confirms are awaited", waiting).await;
    net.scene.relay().signal(Signal::Term);
    net.scene.relay().logs(&["shutting down"]).await;
    net.scene.relay().kill();
    net.rabbit.heal();
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.flowing(300).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn process_e01_killed_at_random_moments() {
    let mut class = Class::new("E1", "process_e01_killed_at_random_moments");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("E1 random", &database.url, &vhost.url, "").await;
    let mut dice = scene.dice();
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    let kills = if full() { 40 } else { 5 };
    for kill in 1..=kills {
        scene.committed_more(dice.u64(10..800)).await;
        scene.fault(&format!("kill -9 of the relay, {kill}"));
        scene.relay().kill();
        let begin = Instant::now();
        scene.relay().start();
        scene.recovered(begin, 0).await;
    }
    class.note("kills", kills);
    scene.relay().says_nothing();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e13_term_drains_and_repeats_nothing() {
    let class = Class::new("E13", "process_e13_term_drains_and_repeats_nothing");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let patient = "relay.drain_timeout = \"45s\"";
    let mut scene = plain("E13", &database.url, &vhost.url, patient).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    for _ in 0..3 {
        scene.flowing(500).await;
        scene.fault("SIGTERM");
        scene.relay().stop().await;
        scene.relay().start();
        scene.recovered(Instant::now(), 0).await;
    }
    scene.relay().logs(&["shutting down"]).await;
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0, "a drained relay leaves nothing to repeat");
    class.survived(&judged);
}

/// Messages are out and no confirm comes back; then somebody asks the relay to end.
async fn asked_to_end_in_vain(net: &mut Net) {
    let waiting = |status: &Value| status["in_flight"].as_u64() >= Some(50);
    net.rabbit.flow(IN, Flow { stalled: true, ..Flow::default() });
    net.scene.relay().reaches("confirms are awaited", waiting).await;
    net.scene.relay().signal(Signal::Term);
    net.scene.relay().logs(&["shutting down"]).await;
}

/// What the relay says when nothing but its own patience ended it.
const DRAIN_TIMEOUT: &str = "not confirmed within the drain timeout";

/// The next one sends what the one that ended could not.
async fn goes_on(class: Class, mut net: Net) {
    net.rabbit.heal();
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.flowing(300).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn process_e13_second_term_ends_it_at_once() {
    let class = Class::new("E13", "process_e13_second_term_ends_it_at_once");
    let mut net = Net::flowing("E13 twice", "relay.drain_timeout = \"1h\"").await;
    net.scene.fault("two SIGTERM while confirms stay away");
    asked_to_end_in_vain(&mut net).await;
    net.scene.relay().signal(Signal::Term);
    assert_ne!(net.scene.relay().ended().await, 0, "it did not drain");
    assert!(!net.scene.relay().log_text().contains(DRAIN_TIMEOUT), "it waited for the hour");
    goes_on(class, net).await;
}

#[tokio::test]
async fn process_e13_drain_timeout_ends_it() {
    let class = Class::new("E13", "process_e13_drain_timeout_ends_it");
    let mut net = Net::flowing("E13 stuck", "relay.drain_timeout = \"3s\"").await;
    net.scene.fault("SIGTERM and the drain timeout");
    asked_to_end_in_vain(&mut net).await;
    assert_eq!(net.scene.relay().ended().await, 1, "it could not drain, and says so");
    net.scene.relay().logs(&[DRAIN_TIMEOUT]).await;
    goes_on(class, net).await;
}

#[tokio::test]
async fn process_e14_zombie_wakes_up_behind_its_successor() {
    let class = Class::new("E14", "process_e14_zombie_wakes_up_behind_its_successor");
    let server = own_postgres(&["wal_sender_timeout = '10s'"]).await;
    let url = server.url("postgres", "shop");
    let vhost = own_vhost().await;
    let window = Window::default();
    let mut scene = Scene::new("E14", &url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    let mut second = Relay::new(&url, &vhost.url, window);
    second.start();
    second.reaches("the second is on standby", |status| status["state"] == "standing_by").await;
    scene.fault("SIGSTOP of the first of two relays");
    let begin = Instant::now();
    scene.relay().signal(Signal::Stop);
    std::mem::swap(scene.relay(), &mut second);
    let mut zombie = second;
    scene.recovered(begin, 0).await;
    scene.flowing(500).await;
    zombie.signal(Signal::Cont);
    zombie.reaches("the zombie is on standby", |status| status["state"] == "standing_by").await;
    let confirmed = zombie.confirmed().await;
    scene.flowing(1_000).await;
    assert_eq!(zombie.confirmed().await, confirmed, "two relays must not publish");
    zombie.stop().await;
    scene.relay().logs(&["another relay named"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e15_three_relays_at_once() {
    let class = Class::new("E15", "process_e15_three_relays_at_once");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let window = Window::default();
    let mut scene = Scene::new("E15", &database.url, &vhost.url, window).await;
    scene.consume();
    let mut others: Vec<Relay> =
        (0..2).map(|_| Relay::new(&database.url, &vhost.url, window)).collect();
    others.iter_mut().for_each(Relay::start);
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    for kill in 1..=2 {
        // The one that publishes; the others stand by.
        if scene.relay().status().await["state"] != "streaming" {
            let mut leader = None;
            for (index, other) in others.iter().enumerate() {
                if other.status().await["state"] == "streaming" {
                    leader = Some(index);
                }
            }
            std::mem::swap(scene.relay(), &mut others[leader.expect("one streams")]);
        }
        scene.fault(&format!("kill -9 of the leader, {kill}"));
        scene.relay().kill();
        let begin = Instant::now();
        let mut next = others.pop().expect("one is left");
        if kill == 1 && next.status().await["state"] == "stopped" {
            next = others.pop().expect("one is left");
        }
        std::mem::swap(scene.relay(), &mut next);
        scene.flowing(200).await;
        scene.recovered_in(begin.elapsed());
        if kill == 1 {
            scene.flowing(300).await;
        }
    }
    scene.relay().logs(&["another relay named"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e17_broker_down_at_full_input() {
    let Some(mut class) = Class::long("E17", "process_e17_broker_down_at_full_input") else {
        return;
    };
    let (mut node, database) = (own_node().await, own_database().await);
    let url = vhost_on(&node).await;
    let mut scene = plain("E17", &database.url, &url, "").await;
    scene.relay().start();
    scene.write(STEADY);
    scene.confirmed_more(500).await;
    scene.fault("broker down while events are written");
    node.stop().await.expect("the node stops");
    scene.relay().logs(&["session ended"]).await;
    let before = scene.relay().memory_kib().0;
    let seconds = if full() { 60 } else { 8 };
    throughout(Duration::from_secs(seconds), "it lives", async || {
        scene.relay().check();
        true
    })
    .await;
    let grown = scene.relay().memory_kib().0.saturating_sub(before);
    class.note("memory_grown_kib", grown);
    assert!(grown < 8 * 1024, "{grown} KiB");
    let confirmed = scene.relay().confirmed().await;
    node.start_again().await.expect("the node starts again");
    let raw = first_confirm(url.clone());
    recovered_after(&mut scene, raw, confirmed).await;
    scene.consume();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e14_frozen_and_alone() {
    let Some(class) = Class::long("E14", "process_e14_frozen_and_alone") else { return };
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("E14 alone", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("relay frozen until the broker gives it up");
    let before = scene.relay().confirmed().await;
    until("the broker knows the relay", async || !relays(&vhost.name).await.is_empty()).await;
    scene.relay().signal(Signal::Stop);
    until("the broker gives it up", async || relays(&vhost.name).await.is_empty()).await;
    scene.relay().signal(Signal::Cont);
    scene.recovered(Instant::now(), before).await;
    scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}
