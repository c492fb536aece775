//! Group C: networks that are silent, slow or flapping for longer.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::network::Net;
use crate::report::Class;
use crate::support::framing::Protocol;
use crate::support::full;
use crate::support::proxy::{Accept, Direction, Flow, How, Proxy};
use crate::support::scene::led;
use crate::support::servers::{own_postgres, own_vhost, rabbit};
use crate::support::waiting::throughout;
use crate::support::writers::STEADY;

const DEAD: Flow = Flow {
    stalled: false,
    dead: true,
    delay: Duration::ZERO,
    jitter: Duration::ZERO,
    bandwidth: None,
    slice: None,
};

/// Half-open: packets vanish both ways until the relay has given the connection up.
async fn half_open(mut class: Class, before_postgres: bool) {
    let mut net = Net::flowing("C3", "").await;
    net.scene.fault("half-open");
    let proxy = if before_postgres { &net.postgres } else { &net.rabbit };
    proxy.flows(DEAD);
    let begin = Instant::now();
    net.scene.relay().logs(&["session ended"]).await;
    class.took("given_up_ms", begin.elapsed());
    proxy.heal();
    net.over(class).await;
}

#[tokio::test]
async fn network_c03_half_open_before_rabbitmq() {
    let class = Class::new("C3", "network_c03_half_open_before_rabbitmq");
    half_open(class, false).await;
}

#[tokio::test]
async fn network_c03_half_open_before_postgres() {
    let mut class = Class::new("C3", "network_c03_half_open_before_postgres");
    // The relay answers at a third of the server's patience and gives up a silent server later.
    let server = own_postgres(&["wal_sender_timeout = '4s'"]).await;
    let url = server.url("postgres", "shop");
    let vhost = own_vhost().await;
    let proxy = Proxy::before(server.port(), Protocol::Postgres).await;
    let through = proxy.url(&url);
    let mut scene = led("C3 Postgres", (&url, &through), (&vhost.url, &vhost.url), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    scene.fault("half-open before Postgres");
    proxy.flows(DEAD);
    let begin = Instant::now();
    scene.relay().logs(&["session ended"]).await;
    class.took("given_up_ms", begin.elapsed());
    proxy.heal();
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(300).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn network_c03_stalled_for_less_than_anybodys_patience() {
    let Some(class) = Class::long("C3", "network_c03_stalled_for_less_than_anybodys_patience")
    else {
        return;
    };
    let mut net = Net::flowing("C3 stall", "").await;
    net.scene.fault("both stalled for 3 s");
    let stalled = Flow { stalled: true, ..Flow::default() };
    net.postgres.flows(stalled);
    net.rabbit.flows(stalled);
    throughout(Duration::from_secs(3), "it lives", async || {
        net.scene.relay().check();
        true
    })
    .await;
    net.postgres.heal();
    net.rabbit.heal();
    net.back().await;
    assert_eq!(net.scene.relay().status().await["sessions"], 1, "a short stall ends no session");
    class.survived_in_silence(net.scene).await;
}

#[tokio::test]
async fn network_c06_little_bandwidth() {
    let Some(class) = Class::long("C6", "network_c06_little_bandwidth") else { return };
    let server = own_postgres(&["wal_sender_timeout = '5s'"]).await;
    let url = server.url("postgres", "shop");
    let vhost = own_vhost().await;
    let rabbit = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
    let through = rabbit.url(&vhost.url);
    let mut scene = led("C6", (&url, &url), (&vhost.url, &through), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    scene.fault("100 kB/s to the broker");
    rabbit.flow(Direction::ToServer, Flow { bandwidth: Some(100_000), ..Flow::default() });
    throughout(Duration::from_secs(20), "one session, streaming", async || {
        let status = scene.relay().status().await;
        status["sessions"] == 1 && status["state"] == "streaming"
    })
    .await;
    let before = scene.relay().confirmed().await;
    rabbit.heal();
    scene.recovered(Instant::now(), before).await;
    class.survived_in_silence(scene).await;
}

#[tokio::test]
async fn network_c11_flapping() {
    let Some(mut class) = Class::long("C11", "network_c11_flapping") else { return };
    let mut net = Net::flowing("C11", "").await;
    let times = if full() { 50 } else { 6 };
    let begin = Instant::now();
    let second = Duration::from_secs(1);
    for time in 1..=times {
        net.scene.fault(&format!("down for a second, {time}"));
        for proxy in [&net.rabbit, &net.postgres] {
            proxy.accepts(Accept::Refuse);
            proxy.cut(How::Reset);
        }
        throughout(second, "it lives", async || {
            net.scene.relay().check();
            true
        })
        .await;
        net.rabbit.heal();
        net.postgres.heal();
        let before = net.scene.relay().confirmed().await;
        net.scene.recovered(Instant::now(), before).await;
    }
    // How often it tries is for the report: that it waits longer each time, backoff.rs tests.
    class.note("sessions", net.scene.relay().status().await["sessions"].clone());
    class.took("ms", begin.elapsed());
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c04_confirms_stalled_while_publishes_arrive() {
    let class = Class::new("C4", "network_c04_confirms_stalled_while_publishes_arrive");
    let mut net = Net::flowing("C4 stall", "").await;
    net.scene.fault("nothing comes back for 3 s");
    net.rabbit.flow(Direction::ToRelay, Flow { stalled: true, ..Flow::default() });
    let full = |status: &Value| status["in_flight"].as_u64() >= Some(150);
    net.scene.relay().reaches("every key waits for its confirm", full).await;
    throughout(Duration::from_secs(3), "one session that waits", async || {
        let status = net.scene.relay().status().await;
        status["sessions"] == 1 && status["state"] == "streaming" && status["in_flight"] != 0
    })
    .await;
    net.rabbit.heal();
    net.back().await;
    net.scene.relay().says_nothing();
    net.scene.enough();
    let judged = net.scene.judge().await;
    assert_eq!(judged.duplicates, 0, "a late confirm is a confirm");
    class.survived(&judged);
}
