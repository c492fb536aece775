//! Group C, as far as consumers see it: what networks do to connections, in both directions,
//! before Postgres and before RabbitMQ.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::report::Class;
use crate::support::framing::{Protocol, is_ack, is_body, is_feedback, is_publish, is_wal};
use crate::support::proxy::{Accept, Action, Direction, Flow, How, Proxy, Trigger};
use crate::support::scene::{Scene, led, plain};
use crate::support::servers::{own_database, own_vhost, postgres, rabbit};
use crate::support::waiting::Patience;
use crate::support::writers::STEADY;

const UNREACHABLE: &str = "watership_reconnects_total{cause=\"unreachable\"}";

/// A run with a proxy before each server, in which events flow.
pub struct Net {
    pub scene: Scene,
    pub postgres: Proxy,
    pub rabbit: Proxy,
    /// The way to the database that avoids the proxy.
    pub database: String,
}

impl Net {
    pub async fn flowing(title: &str, settings: &str) -> Self {
        let mut net = Self::ready(title, settings).await;
        net.scene.relay().start();
        net.scene.write(STEADY);
        net.scene.flowing(300).await;
        net
    }

    /// Prepared; neither relay nor writers run.
    pub async fn ready(title: &str, settings: &str) -> Self {
        let (database, vhost) = (own_database().await, own_vhost().await);
        let postgres = Proxy::before(postgres().await.port(), Protocol::Postgres).await;
        let rabbit = Proxy::before(rabbit().await.port(), Protocol::Amqp).await;
        let through = postgres.url(&database.url);
        let broker = rabbit.url(&vhost.url);
        let ways = (&*database.url, &*through);
        let mut scene = led(title, ways, (&vhost.url, &broker), settings).await;
        scene.consume();
        Self { scene, postgres, rabbit, database: database.url }
    }

    /// The fault has just been healed: the relay gets over it, and everything is judged.
    pub async fn over(mut self, class: Class) {
        self.back().await;
        self.scene.enough();
        class.survived(&self.scene.judge().await);
    }

    pub async fn back(&mut self) {
        let before = self.scene.relay().confirmed().await;
        self.scene.recovered(Instant::now(), before).await;
        self.scene.flowing(300).await;
    }

    /// One message is met by `action`, and the session ends by it.
    async fn strike(&mut self, name: &str, before_postgres: bool, trigger: Trigger) {
        self.scene.fault(name);
        let sessions = sessions(&mut self.scene).await;
        let proxy = if before_postgres { &self.postgres } else { &self.rabbit };
        proxy.trigger(trigger);
        proxy.strikes().await;
        let another = |status: &Value| status["sessions"].as_u64() > Some(sessions);
        self.scene.relay().reaches(&format!("{name}: a new session"), another).await;
        self.back().await;
    }
}

async fn sessions(scene: &mut Scene) -> u64 {
    scene.relay().status().await["sessions"].as_u64().expect("a number")
}

fn once(direction: Direction, matches: fn(&[u8]) -> bool, nth: u64, action: Action) -> Trigger {
    Trigger { direction, matches, nth, action, for_ever: false }
}

/// Cuts at random bytes in both directions before both servers.
async fn cuts(class: Class, how: How) {
    let mut net = Net::flowing(&format!("C {how:?}"), "").await;
    let mut dice = net.scene.dice();
    for direction in [Direction::ToServer, Direction::ToRelay] {
        for before_postgres in [false, true] {
            let to = if before_postgres { "Postgres" } else { "RabbitMQ" };
            net.scene.fault(&format!("{how:?} at a random byte {direction:?}, {to}"));
            let sessions = sessions(&mut net.scene).await;
            // The connection that looks at the slot now and then may be hit: it ends no session.
            let mut patience = Patience::new();
            while net.scene.relay().status().await["sessions"] == sessions {
                let proxy = if before_postgres { &net.postgres } else { &net.rabbit };
                proxy.cut_after(direction, dice.u64(1..2_000), how);
                proxy.strikes().await;
                patience.more((), || "a cut ends the session".into()).await;
            }
            net.back().await;
        }
    }
    net.scene.relay().counts(UNREACHABLE, 4).await;
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c01_reset_at_a_random_byte() {
    let Some(class) = Class::long("C1", "network_c01_reset_at_a_random_byte") else { return };
    cuts(class, How::Reset).await;
}

#[tokio::test]
async fn network_c02_end_at_a_random_byte() {
    let Some(class) = Class::long("C2", "network_c02_end_at_a_random_byte") else { return };
    cuts(class, How::Fin).await;
}

#[tokio::test]
async fn network_c01_cut_in_the_middle_of_a_message() {
    let class = Class::new("C1", "network_c01_cut_in_the_middle_of_a_message");
    let mut net = Net::flowing("C1 inside", "").await;
    let (inside, out, back) =
        (Action::CutInside(How::Reset), Direction::ToServer, Direction::ToRelay);
    net.strike("half a publish", false, once(out, is_publish, 9, inside)).await;
    net.strike("half a body", false, once(out, is_body, 9, inside)).await;
    net.strike("half a confirm", false, once(back, is_ack, 5, inside)).await;
    net.strike("half a piece of WAL", true, once(back, is_wal, 9, inside)).await;
    net.strike("half a feedback", true, once(out, is_feedback, 2, inside)).await;
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c01_cut_between_two_messages() {
    let Some(class) = Class::long("C1", "network_c01_cut_between_two_messages") else { return };
    let mut net = Net::flowing("C1 between", "").await;
    let (before, out, back) =
        (Action::CutBefore(How::Fin), Direction::ToServer, Direction::ToRelay);
    net.strike("before a body", false, once(out, is_body, 9, before)).await;
    net.strike("before a confirm", false, once(back, is_ack, 5, before)).await;
    net.strike("before a piece of WAL", true, once(back, is_wal, 9, before)).await;
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c07_corrupt_bytes() {
    let Some(class) = Class::long("C7", "network_c07_corrupt_bytes") else { return };
    let mut net = Net::flowing("C7", "").await;
    let (first, last) = (Action::CorruptFirst, Action::CorruptLast);
    let (out, back) = (Direction::ToServer, Direction::ToRelay);
    net.strike("a confirm's type", false, once(back, is_ack, 5, first)).await;
    net.strike("a confirm's end", false, once(back, is_ack, 5, last)).await;
    net.strike("a publish's type", false, once(out, is_publish, 5, first)).await;
    net.strike("a publish's end", false, once(out, is_publish, 5, last)).await;
    net.strike("a Postgres message's type", true, once(back, is_wal, 9, first)).await;
    net.scene.relay().logs(&["session ended", "kind=\"protocol\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c08_one_byte_at_a_time() {
    let class = Class::new("C8", "network_c08_one_byte_at_a_time");
    let mut net = Net::flowing("C8", "").await;
    net.scene.fault("slices of one byte");
    net.postgres.flows(Flow { slice: Some(1), ..Flow::default() });
    net.rabbit.flows(Flow { slice: Some(1), ..Flow::default() });
    net.scene.flowing(100).await;
    let sessions = sessions(&mut net.scene).await;
    net.postgres.heal();
    net.rabbit.heal();
    assert_eq!(sessions, 1, "slices end no session");
    net.back().await;
    class.survived_in_silence(net.scene).await;
}

#[tokio::test]
async fn network_c10_accepted_and_never_answered() {
    let Some(class) = Class::long("C10", "network_c10_accepted_and_never_answered") else { return };
    let mut net = Net::flowing("C10", "broker.connect_timeout = \"2s\"").await;
    for before_postgres in [false, true] {
        let proxy = if before_postgres { &net.postgres } else { &net.rabbit };
        net.scene.fault(if before_postgres { "Postgres is silent" } else { "RabbitMQ is silent" });
        proxy.accepts(Accept::Silent);
        proxy.cut(How::Reset);
        let connections = proxy.connections();
        // The second connection of a silent server is the proof that the first was given up.
        let mut patience = Patience::new();
        while proxy.connections() <= connections + 2 {
            net.scene.relay().check();
            patience.more(proxy.connections(), || "it gives up a silent server".into()).await;
        }
        proxy.heal();
        proxy.cut(How::Reset);
        net.back().await;
    }
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

#[tokio::test]
async fn network_c05_latency_and_jitter() {
    let Some(mut class) = Class::long("C5", "network_c05_latency_and_jitter") else { return };
    let mut net = Net::flowing("C5", "").await;
    net.scene.fault("100 ms and as much jitter");
    let (delay, jitter) = (Duration::from_millis(100), Duration::from_millis(100));
    for proxy in [&net.postgres, &net.rabbit] {
        proxy.flows(Flow { delay, jitter, ..Flow::default() });
    }
    let begin = Instant::now();
    net.scene.flowing(2_400).await;
    // The load is 800 a second, the window allows some 2048 in a round trip of 300 ms.
    class.took("ms_for_3_seconds_of_events", begin.elapsed());
    assert_eq!(sessions(&mut net.scene).await, 1, "latency ends no session");
    net.postgres.heal();
    net.rabbit.heal();
    net.back().await;
    class.survived_in_silence(net.scene).await;
}

#[tokio::test]
async fn network_c09_a_name_that_cannot_be_resolved() {
    let class = Class::new("C9", "network_c09_a_name_that_cannot_be_resolved");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("C9", &database.url, &vhost.url, "").await;
    scene.consume();
    let text = std::fs::read_to_string(&scene.relay().config).expect("the configuration");
    let nowhere = text.replace("@127.0.0.1", "@no-such-host.invalid");
    assert_ne!(text, nowhere);
    let config = scene.relay().config.clone();
    std::fs::write(&config, nowhere).expect("written");
    scene.relay().start();
    scene.fault("the name of a server is unknown");
    scene
        .relay()
        .reaches("it says the name", |status| {
            let error = status["last_error"]["error"].as_str().unwrap_or_default();
            error.contains("no-such-host.invalid") && status["state"] != "stopped"
        })
        .await;
    scene.relay().stop().await;
    std::fs::write(&config, text).expect("written");
    scene.relay().start();
    scene.write(STEADY);
    scene.recovered(Instant::now(), 0).await;
    scene.relay().logs(&["\"no-such-host.invalid"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn network_c04_one_direction_dead() {
    let Some(mut class) = Class::long("C4", "network_c04_one_direction_dead") else { return };
    let mut net = Net::flowing("C4", "broker.heartbeat = \"2s\"").await;
    for direction in [Direction::ToRelay, Direction::ToServer] {
        net.scene.fault(&format!("{direction:?} dead before RabbitMQ"));
        let before = sessions(&mut net.scene).await;
        net.rabbit.flow(direction, Flow { dead: true, ..Flow::default() });
        let begin = Instant::now();
        let another = |status: &Value| status["sessions"].as_u64() > Some(before);
        net.scene.relay().reaches("the session is given up", another).await;
        // Twice the heartbeat in the direction that the relay reads; the broker does the same.
        class.took(&format!("given_up_ms {direction:?}"), begin.elapsed());
        net.rabbit.heal();
        net.back().await;
    }
    net.scene.relay().logs(&["nothing received for"]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}
