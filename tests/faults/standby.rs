//! Group A and E: a primary and its standby under one address, with a failover slot.
//!
//! `synchronized_standby_slots` lets the relay see only what the standby has, so a failover rolls
//! nothing away. Postgres 17 and later.

use std::time::Duration;

use tokio::time::Instant;
use watership::dev::{Postgres, StopMode};

use crate::report::Class;
use crate::support::framing::Protocol;
use crate::support::proxy::{Action, Direction, How, Proxy, Trigger};
use crate::support::scene::{Scene, led};
use crate::support::servers::{first_row, own_postgres, own_vhost, text};
use crate::support::waiting::until;
use crate::support::writers::STEADY;

/// A standby that has a copy of the slot, and a relay that is led to its primary by a proxy.
struct Pair {
    primary: Postgres,
    standby: Postgres,
    /// The standby's address will be the primary's, for all but the relay.
    proxy: Proxy,
    scene: Scene,
}

/// Events flow, and the standby keeps a copy of the slot.
async fn pair(title: &str) -> Pair {
    let mut primary = own_postgres(&["synchronized_standby_slots = 'standby'"]).await;
    let mut standby = primary.standby("sync_replication_slots = on").await.expect("a standby");
    standby.start_again().await.expect("the standby starts");
    let url = primary.url("postgres", "shop");
    let proxy = Proxy::before(primary.port(), Protocol::Postgres).await;
    let (vhost, through) = (own_vhost().await, proxy.url(&url));
    let broker = (&*vhost.url, &*vhost.url);
    let mut scene = led(title, (&url, &through), broker, "source.failover = true").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    let behind = standby.url("postgres", "shop");
    let synced = "SELECT count(*) = 1 FROM pg_replication_slots \
        WHERE synced AND NOT temporary AND invalidation_reason IS NULL";
    until("the slot is synchronised", async || {
        // The primary's slot has to move before the standby can keep its copy.
        primary.execute("SELECT pg_log_standby_snapshot()").await.expect("it is logged");
        text(&behind, synced).await == "true"
    })
    .await;
    Pair { primary, standby, proxy, scene }
}

/// Earlier versions have no failover slots: A8 is their case.
async fn has_failover_slots() -> bool {
    own_postgres(&[]).await.major() >= 17
}

impl Pair {
    /// The primary dies, the standby is promoted; returns when it serves.
    async fn fail_over(&mut self) -> Instant {
        self.primary.stop(StopMode::Immediate).await.expect("the primary dies");
        self.standby.execute("SELECT pg_promote()").await.expect("it is promoted");
        self.standby.stop(StopMode::Fast).await.expect("it stops");
        self.standby.move_to(self.primary.port()).expect("it moves");
        self.standby.append("postgresql.conf", "synchronized_standby_slots = ''\n").expect("conf");
        self.standby.start_again().await.expect("it is the primary");
        first_row(self.standby.url("postgres", "shop")).await
    }

    async fn goes_on(mut self, class: Class, served: Instant, before: u64) {
        self.scene.recovered(served, before).await;
        self.scene.flowing(500).await;
        let phantoms = self.scene.relay().counted("watership_phantom_suspected_total").await;
        assert_eq!(phantoms, 0, "nothing was sent that the standby did not have");
        self.scene.relay().logs(&["a standby was promoted"]).await;
        self.scene.enough();
        let judged = self.scene.judge().await;
        class.survived(&judged);
    }
}

#[tokio::test]
async fn standby_a06_failover_to_a_standby_that_had_everything() {
    let class = Class::new("A6", "standby_a06_failover_to_a_standby_that_had_everything");
    if !has_failover_slots().await {
        return class.not_here("failover slots came with Postgres 17");
    }
    let mut pair = pair("A6").await;
    pair.scene.fault("failover");
    let before = pair.scene.relay().confirmed().await;
    let served = pair.fail_over().await;
    pair.goes_on(class, served, before).await;
}

#[tokio::test]
async fn standby_e12_relay_killed_during_a_failover() {
    let class = Class::new("E12", "standby_e12_relay_killed_during_a_failover");
    if !has_failover_slots().await {
        return class.not_here("failover slots came with Postgres 17");
    }
    let mut pair = pair("E12").await;
    pair.scene.fault("failover, and the relay killed in it");
    pair.proxy.cut(How::Reset);
    pair.scene.relay().kill();
    let served = pair.fail_over().await;
    pair.scene.relay().start();
    pair.scene.confirmed_more(1).await;
    // Killed again on its way through the first session on the new timeline.
    pair.scene.relay().kill();
    pair.scene.relay().start();
    pair.goes_on(class, served, 0).await;
}

/// The first question of a session that a running one does not ask again on that connection.
fn is_read_of_the_checkpoint(message: &[u8]) -> bool {
    let text = b"The checkpoint of relay";
    message.first() == Some(&b'P') && message.windows(text.len()).any(|part| part == text)
}

#[tokio::test]
async fn standby_a06_promoted_while_a_session_looks_at_it() {
    let class = Class::new("A6", "standby_a06_promoted_while_a_session_looks_at_it");
    if !has_failover_slots().await {
        return class.not_here("failover slots came with Postgres 17");
    }
    let mut pair = pair("A6 between").await;
    pair.scene.fault("failover between two looks of a session's start");
    pair.proxy.cut(How::Reset);
    pair.scene.relay().kill();
    pair.primary.stop(StopMode::Immediate).await.expect("the primary dies");
    pair.standby.stop(StopMode::Fast).await.expect("it stops");
    pair.standby.move_to(pair.primary.port()).expect("it moves");
    pair.standby.append("postgresql.conf", "synchronized_standby_slots = ''\n").expect("conf");
    pair.standby.start_again().await.expect("it is there, and still a standby");
    // The session has read the timeline; what it compares it with comes from behind the promotion.
    let (direction, matches) = (Direction::ToServer, is_read_of_the_checkpoint as fn(&[u8]) -> _);
    let action = Action::StallBefore;
    pair.proxy.trigger(Trigger { direction, matches, nth: 1, action, for_ever: false });
    pair.scene.relay().start();
    pair.proxy.strikes().await;
    pair.standby.execute("SELECT pg_promote()").await.expect("it is promoted");
    let served = first_row(pair.standby.url("postgres", "shop")).await;
    pair.proxy.heal();
    pair.scene.relay().logs(&["the server went from timeline 1 to 2 just now"]).await;
    pair.goes_on(class, served, 0).await;
}

#[tokio::test]
async fn standby_a16_held_back_by_a_standby_that_is_down() {
    let class = Class::new("A16", "standby_a16_held_back_by_a_standby_that_is_down");
    if !has_failover_slots().await {
        return class.not_here("synchronized_standby_slots came with Postgres 17");
    }
    let mut pair = pair("A16").await;
    pair.scene.fault("the standby is down");
    pair.standby.stop(StopMode::Fast).await.expect("it stops");
    let told = |status: &serde_json::Value| {
        let warning = status["slot"]["warning"].as_str().unwrap_or_default();
        warning.contains("waits for standby slots that nobody reads (standby)")
    };
    pair.scene.relay().reaches("it says who holds it back", told).await;
    let texts = ["nobody reads (standby)", "start the standby, or take its slot out of"];
    pair.scene.relay().logs(&texts).await;
    assert_eq!(pair.scene.relay().counted("watership_slot_held_by_standby").await, 1);
    // Nothing comes, and nothing is wrong: the session lives on, no verdict of a deaf stream.
    let out = |status: &serde_json::Value| told(status) && status["in_flight"] == 0;
    pair.scene.relay().reaches("nothing is out", out).await;
    pair.scene.relay().stays(Duration::from_secs(6), told).await;
    let before = pair.scene.relay().confirmed().await;
    pair.standby.start_again().await.expect("it starts");
    let served = Instant::now();
    pair.scene.recovered(served, before).await;
    pair.scene.flowing(300).await;
    pair.scene.enough();
    let sessions = pair.scene.relay().status().await["sessions"].clone();
    assert_eq!(sessions, 1);
    let judged = pair.scene.judge().await;
    assert_eq!(judged.duplicates, 0);
    class.survived(&judged);
}
