//! Group A: the Postgres process and its cluster.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use watership::dev::{Postgres, Signal, StopMode};

use crate::report::Class;
use crate::support::relay::Window;
use crate::support::scene::{Scene, led, plain, recovered_after};
use crate::support::servers::{
    client, execute, first_row, own_database, own_node, own_postgres, own_vhost, text, vhost_on,
};
use crate::support::topology::{bind, held, quiet, unbind};
use crate::support::waiting::{throughout, until};
use crate::support::writers::STEADY;

const UNREACHABLE: &str = "watership_reconnects_total{cause=\"unreachable\"}";
const TERMINATE_ALL: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
    WHERE application_name = 'watership' OR backend_type = 'walsender'";

/// A run on a private Postgres, in which events flow.
async fn flowing(title: &str, conf: &[&str], settings: &str) -> (Postgres, String, Scene) {
    let server = own_postgres(conf).await;
    let url = server.url("postgres", "shop");
    let vhost = own_vhost().await;
    let mut scene = plain(title, &url, &vhost.url, settings).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    (server, url, scene)
}

/// Waits for the relay after the server serves again, lets events flow, and judges.
async fn over(class: Class, mut scene: Scene, url: &str, before: u64) {
    recovered_after(&mut scene, first_row(url.to_owned()), before).await;
    let lost = scene.relay().counted(UNREACHABLE).await;
    assert!(lost > 0, "the lost session is counted");
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn pg_a01_kill_nine_of_the_postmaster() {
    let class = Class::new("A1", "pg_a01_kill_nine_of_the_postmaster");
    let (mut server, url, mut scene) = flowing("A1", &[], "").await;
    scene.fault("kill -9 of Postgres");
    server.kill().await;
    scene.relay().logs(&["session ended", "unreachable"]).await;
    let before = scene.relay().confirmed().await;
    server.start_again().await.expect("recovers");
    over(class, scene, &url, before).await;
}

#[tokio::test]
async fn pg_a01_immediate_shutdown() {
    let Some(class) = Class::long("A1", "pg_a01_immediate_shutdown") else { return };
    let (mut server, url, mut scene) = flowing("A1 immediate", &[], "").await;
    scene.fault("immediate shutdown of Postgres");
    server.stop(StopMode::Immediate).await.expect("stops");
    scene.relay().logs(&["session ended", "unreachable"]).await;
    let before = scene.relay().confirmed().await;
    server.start_again().await.expect("recovers");
    over(class, scene, &url, before).await;
}

/// A walsender waits at a shutdown until the relay has taken everything. Of this server it waits
/// without a limit, so that only the relay can let it end.
const PATIENT: &str = "wal_sender_timeout = 0";

async fn fast_shutdown(class: &mut Class, server: &mut Postgres, how: &str) {
    let begin = Instant::now();
    server.stop(StopMode::Fast).await.expect("the relay holds up no shutdown");
    class.took(&format!("shutdown_ms {how}"), begin.elapsed());
}

#[tokio::test]
async fn pg_a02_fast_restart_with_the_broker_up() {
    let mut class = Class::new("A2", "pg_a02_fast_restart_with_the_broker_up");
    let (mut server, url, mut scene) = flowing("A2", &[PATIENT], "").await;
    scene.fault("fast restart of Postgres");
    fast_shutdown(&mut class, &mut server, "broker up").await;
    scene.relay().logs(&["session ended"]).await;
    let before = scene.relay().confirmed().await;
    server.start_again().await.expect("starts again");
    over(class, scene, &url, before).await;
}

#[tokio::test]
async fn pg_a02_fast_shutdown_with_the_broker_frozen_and_dead() {
    let mut class = Class::new("A2", "pg_a02_fast_shutdown_with_the_broker_frozen_and_dead");
    let mut node = own_node().await;
    let mut server = own_postgres(&[PATIENT]).await;
    let url = server.url("postgres", "shop");
    let broker = vhost_on(&node).await;
    let mut scene = plain("A2 broker down", &url, &broker, "").await;
    scene.relay().start();
    scene.write(STEADY);
    scene.confirmed_more(500).await;

    scene.fault("fast shutdown with the broker frozen");
    node.signal(Signal::Stop);
    let piled_up = |status: &serde_json::Value| status["in_flight"].as_u64() >= Some(200);
    scene.relay().reaches("messages in flight", piled_up).await;
    fast_shutdown(&mut class, &mut server, "broker frozen").await;
    server.start_again().await.expect("starts again");
    node.signal(Signal::Cont);
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.confirmed_more(500).await;

    scene.fault("fast shutdown with the broker dead");
    node.kill().await;
    fast_shutdown(&mut class, &mut server, "broker dead").await;
    server.start_again().await.expect("starts again");
    node.start_again().await.expect("starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.consume();
    scene.relay().logs(&["terminating connection due to administrator command"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn pg_a03_terminated_backends() {
    let class = Class::new("A3", "pg_a03_terminated_backends");
    let database = own_database().await;
    let vhost = own_vhost().await;
    let mut scene = plain("A3", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    let own = format!("datname = '{}' AND", database.name);
    for which in ["backend_type = 'walsender'", "application_name LIKE 'watership%'"] {
        scene.fault(&format!("pg_terminate_backend of {which}"));
        let before = scene.relay().confirmed().await;
        let sql = format!(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
             WHERE {own} {which} AND pid <> pg_backend_pid()"
        );
        assert_ne!(text(&database.url, &sql).await, "0", "{which} hits nobody");
        let sessions = scene.relay().counted(UNREACHABLE).await;
        scene.recovered(Instant::now(), before).await;
        scene.relay().counts(UNREACHABLE, sessions.max(1)).await;
        scene.flowing(500).await;
    }
    scene.relay().logs(&["terminating connection due to administrator"]).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

/// Seconds after which a silent server is given up: 15 of silence, and half of its own patience of
/// 60 and 15 more for an answer.
const GIVEN_UP: u64 = 60;

/// Frozen for so long while somebody watches that nobody answers.
async fn frozen(class: Class, seconds: u64) {
    let (mut server, url, mut scene) = flowing("A4", &[], "").await;
    scene.fault(&format!("Postgres frozen for {seconds} s"));
    let other = client(&url).await.expect("a connection");
    server.signal(Signal::Stop);
    let silence = timeout(Duration::from_secs(seconds), other.simple_query("SELECT 1")).await;
    assert!(silence.is_err(), "a frozen server must not answer");
    let before = scene.relay().confirmed().await;
    server.signal(Signal::Cont);
    recovered_after(&mut scene, first_row(url.clone()), before).await;
    scene.flowing(500).await;
    if seconds < GIVEN_UP {
        scene.relay().says_nothing();
    } else {
        scene.relay().logs(&["session ended", "Postgres was silent for"]).await;
    }
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn pg_a04_frozen_for_5_seconds() {
    frozen(Class::new("A4", "pg_a04_frozen_for_5_seconds"), 5).await;
}

#[tokio::test]
async fn pg_a04_frozen_for_70_seconds() {
    let Some(class) = Class::long("A4", "pg_a04_frozen_for_70_seconds") else { return };
    frozen(class, 70).await;
}

#[tokio::test]
async fn pg_a05_server_that_comes_back_as_a_standby_first() {
    let class = Class::new("A5", "pg_a05_server_that_comes_back_as_a_standby_first");
    let (mut server, url, mut scene) = flowing("A5", &[], "").await;
    scene.enough();
    scene.written().await;
    scene.fault("Postgres in recovery");
    server.stop(StopMode::Fast).await.expect("stops");
    let signal = server.data_dir().join("standby.signal");
    std::fs::write(&signal, "").expect("the data directory is ours");
    server.start_again().await.expect("starts as a standby");
    assert_eq!(text(&url, "pg_is_in_recovery()").await, "true");
    let before = scene.relay().confirmed().await;
    let waiting = |status: &serde_json::Value| status["last_error"]["error"].is_string();
    scene.relay().reaches("it waits", waiting).await;
    scene.relay().stays(Duration::from_secs(3), waiting).await;
    server.stop(StopMode::Fast).await.expect("stops");
    std::fs::remove_file(&signal).expect("the data directory is ours");
    server.start_again().await.expect("starts as itself");
    execute(&url, EMIT_ONE).await;
    recovered_after(&mut scene, first_row(url.clone()), before).await;
    scene.relay().logs(&["the server is a standby (in recovery)"]).await;
    class.survived(&scene.judge().await);
}

/// An event of nobody else's key.
pub const EMIT_ONE: &str = "SELECT watership.emit('order', 'alone', 'changed', \
    '{\"key\":\"alone\",\"n\":1}'::text)";

#[tokio::test]
async fn pg_a13_max_connections_exhausted() {
    let class = Class::new("A13", "pg_a13_max_connections_exhausted");
    let conf = ["max_connections = 20"];
    let server = own_postgres(&conf).await;
    let url = server.url("postgres", "shop");
    execute(&url, "CREATE ROLE relay LOGIN REPLICATION").await;
    execute(&url, "CREATE ROLE crowd LOGIN").await;
    let vhost = own_vhost().await;
    let relay = server.url("relay", "shop");
    let broker = (&*vhost.url, &*vhost.url);
    let mut scene = led("A13", (&url, &relay), broker, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("no connection left");
    let own = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'relay'";
    let crowd = server.url("crowd", "shop");
    let mut held = Vec::new();
    while let Ok(one) = client(&crowd).await {
        held.push(one);
    }
    let before = scene.relay().confirmed().await;
    let admin = client(&url).await.expect("a reserved connection");
    admin.batch_execute(TERMINATE_ALL).await.expect("the relay's sessions end");
    admin
        .batch_execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'relay'",
        )
        .await
        .expect("the relay's sessions end");
    // The places that became free.
    while let Ok(one) = client(&crowd).await {
        held.push(one);
    }
    scene.relay().logs(&["connection"]).await;
    let waiting = |status: &serde_json::Value| status["state"] == "waiting";
    scene.relay().reaches("it waits for a place", waiting).await;
    drop(held);
    drop(admin);
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    // Replication, SQL, and the upkeep that looks at the slot now and then.
    let used = async || text(&url, own).await.parse::<u32>().expect("a number");
    until("its number of connections is fixed", async || used().await <= 3).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn pg_a13_max_wal_senders_exhausted() {
    let Some(class) = Class::long("A13", "pg_a13_max_wal_senders_exhausted") else { return };
    let (mut server, url, mut scene) = flowing("A13 walsenders", &[], "").await;
    scene.fault("no walsender allowed");
    server.append("postgresql.conf", "max_wal_senders = 0\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts without walsenders");
    scene.relay().logs(&["max_wal_senders"]).await;
    let before = scene.relay().confirmed().await;
    server.append("postgresql.conf", "max_wal_senders = 5\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with walsenders");
    over(class, scene, &url, before).await;
}

#[tokio::test]
async fn pg_a14_walsender_killed_with_nine() {
    let class = Class::new("A14", "pg_a14_walsender_killed_with_nine");
    let (_server, url, mut scene) = flowing("A14", &[], "").await;
    scene.fault("kill -9 of the walsender");
    let before = scene.relay().confirmed().await;
    let pid = text(&url, "SELECT pid FROM pg_stat_replication").await;
    let killed = std::process::Command::new("kill").args(["-9", &pid]).status();
    assert!(killed.expect("kill runs").success());
    scene.relay().logs(&["session ended"]).await;
    over(class, scene, &url, before).await;
}

#[tokio::test]
async fn pg_a18_timeouts_of_the_role() {
    let class = Class::new("A18", "pg_a18_timeouts_of_the_role");
    let server = own_postgres(&[]).await;
    let url = server.url("postgres", "shop");
    let timeouts = [
        ("statement_timeout", "200ms"),
        ("lock_timeout", "100ms"),
        ("idle_in_transaction_session_timeout", "200ms"),
        ("idle_session_timeout", "500ms"),
    ];
    execute(&url, "CREATE ROLE relay LOGIN REPLICATION").await;
    for (name, value) in timeouts {
        execute(&url, &format!("ALTER ROLE relay SET {name} = '{value}'")).await;
    }
    let vhost = own_vhost().await;
    let relay = server.url("relay", "shop");
    let broker = (&*vhost.url, &*vhost.url);
    let mut scene = led("A18", (&url, &relay), broker, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("a locked checkpoint row, and silence");
    let locker = client(&url).await.expect("a connection");
    let lock = "BEGIN; LOCK TABLE watership.checkpoint";
    locker.batch_execute(lock).await.expect("locked");
    throughout(Duration::from_secs(2), "it lives", async || {
        scene.relay().check();
        true
    })
    .await;
    locker.batch_execute("COMMIT").await.expect("unlocked");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    scene.relay().says_nothing();
    scene.enough();
    scene.written().await;
    // Idle sessions of the relay outlive the role's timeout.
    let sessions = scene.relay().status().await["sessions"].clone();
    throughout(Duration::from_secs(2), "the idle session ends", async || {
        scene.relay().status().await["sessions"] == sessions
    })
    .await;
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn pg_a19_intake_paused_longer_than_the_walsender_waits() {
    let class = Class::new("A19", "pg_a19_intake_paused_longer_than_the_walsender_waits");
    let window = Window { events: 500, unconfirmed: 200 };
    let server = own_postgres(&["wal_sender_timeout = '4s'"]).await;
    let url = server.url("postgres", "shop");
    let vhost = own_vhost().await;
    let mut scene = Scene::new("A19", &url, &vhost.url, window).await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    let (_connection, channel) = vhost.connect().await;
    scene.fault("queue unbound for three times the walsender's patience");
    unbind(&channel).await;
    // Under load the window may be full for a moment by itself; and what was sent before the
    // queue was unbound may still be confirmed.
    let full =
        |status: &serde_json::Value| held(status) && status["window_events"].as_u64() >= Some(500);
    let wanted = |status: &serde_json::Value| full(status) && quiet(status);
    scene.relay().reaches("the route is held and the window full", wanted).await;
    scene.relay().stays(Duration::from_secs(12), full).await;
    let before = scene.relay().confirmed().await;
    bind(&channel).await;
    scene.recovered(Instant::now(), before).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "the session lives on");
    scene.flowing(300).await;
    scene.relay().logs(&["unroutable: NO_ROUTE"]).await;
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0);
    class.survived(&judged);
}
