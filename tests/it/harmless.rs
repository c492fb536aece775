//! The relay does no harm to Postgres: a shutdown is never held up, a walsender never waits in
//! vain for a sign of life, and no limit that is set on the role disturbs the relay.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use watership::dev::{Postgres, Rabbit, RabbitOptions, Signal, StopMode};

use crate::support::inbox::kinds;
use crate::support::relay::Window;
use crate::support::scene::Scene;
use crate::support::servers::{Vhost, database_of, own_vhost, private_postgres};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::{throughout, until};
use crate::support::writers::Load;

const WINDOW: Window = Window { events: 512, unconfirmed: 256 };

async fn fast_shutdown(server: &mut Postgres, how: &str) {
    let begin = Instant::now();
    server.stop(StopMode::Fast).await.expect("the relay holds up no shutdown");
    println!("fast shutdown of Postgres {how}: {:.2?}", begin.elapsed());
    server.start_again().await.expect("starts again");
}

#[tokio::test]
async fn postgres_shuts_down_whatever_the_broker_does() {
    // A walsender that waits without a limit at a shutdown: only the relay can let it end.
    let mut server = private_postgres(&["wal_sender_timeout = 0"], None).await;
    let mut node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    let mut scene = Scene::new("fast shutdown", &url, &node.url("/"), WINDOW).await;
    scene.relay().start();
    scene.write(Load { events: 30_000, rate: 800, rows: 5 });
    scene.confirmed_more(500).await;

    scene.fault("with the broker up, under load");
    fast_shutdown(&mut server, "with the broker up, under load").await;
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;

    scene.fault("with the broker blocked by a memory alarm");
    node.ctl(&["set_vm_memory_high_watermark", "0"]).await.expect("the alarm is on");
    scene.relay().reaches("it is blocked", |status| status["broker_blocked"] == true).await;
    // The window is full: intake is paused, the walsender has more than it can send.
    let full = |status: &Value| status["window_events"].as_u64() >= Some(WINDOW.events.into());
    scene.relay().reaches("the window is full", full).await;
    fast_shutdown(&mut server, "with the broker blocked, intake paused").await;
    let before = scene.relay().confirmed().await;
    node.ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]).await.expect("no alarm");
    scene.recovered(Instant::now(), before).await;
    scene.confirmed_more(500).await;

    scene.fault("with the broker frozen");
    node.signal(Signal::Stop);
    scene.relay().reaches("the window is full", full).await;
    fast_shutdown(&mut server, "with the broker frozen").await;
    node.signal(Signal::Cont);
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.confirmed_more(500).await;

    scene.fault("with the broker dead");
    node.kill().await;
    scene.relay().reaches("it waits", |status| status["circuit"]["state"] == "open").await;
    fast_shutdown(&mut server, "with the broker dead").await;
    node.start_again().await.expect("starts again");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.consume();
    scene.finish().await;
}

/// A server that gives up a silent walsender after 5 s, and longer than that.
const TIMEOUT: &str = "wal_sender_timeout = '5s'";
const LONGER: Duration = Duration::from_secs(16);
/// The tick, which keeps the connection alive, must not depend on the checkpoints.
const SMALL: &str = "relay.max_window_events = 50\nrelay.checkpoint_interval = \"1m\"";

/// Watches for a while that the session continues although nothing is taken from it.
async fn stays_paused(relay: &Running, stage: &Stage) {
    until("intake pauses", async || relay.metric("watership_window_paused").await == Some(1.0))
        .await;
    let pid =
        format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", stage.slot);
    let before = stage.text(&pid).await;
    throughout(LONGER, "one session", async || relay.status().await["sessions"] == 1).await;
    assert_eq!(stage.text(&pid).await, before, "it is the same walsender");
    assert_eq!(relay.metric("watership_window_paused").await, Some(1.0));
}

const MANY: &str = "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, \
    payload) SELECT 't', n::text, 'e', '1' FROM generate_series(1, 20000) AS n";

#[tokio::test]
async fn keepalives_are_answered_while_the_broker_is_blocked() {
    let server = private_postgres(&[TIMEOUT], None).await;
    let node = Rabbit::start(RabbitOptions::default()).await.expect("a private node");
    let vhost = Vhost { name: "/".into(), url: node.url("/") };
    let setup = Setup { settings: SMALL, ..Setup::default() };
    let stage = Stage::on(database_of(&server), vhost, setup).await;
    let relay = stage.start().await;
    node.ctl(&["set_vm_memory_high_watermark", "0"]).await.expect("the alarm is on");
    stage.execute(MANY).await;
    stays_paused(&relay, &stage).await;
    assert_eq!(relay.status().await["broker_blocked"], true);
    node.ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]).await.expect("no alarm");
    stage.inbox.count(20_000).await;
    assert_eq!(relay.status().await["sessions"], 1);
}

#[tokio::test]
async fn keepalives_are_answered_while_a_held_route_pauses_the_intake() {
    let server = private_postgres(&[TIMEOUT], None).await;
    let setup = Setup { settings: SMALL, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    let unbind = stage.channel.queue_unbind(
        "all".into(),
        "watership".into(),
        "#".into(),
        Default::default(),
    );
    unbind.await.expect("it is unbound");
    stage.execute(MANY).await;
    stays_paused(&relay, &stage).await;
    until("it probes", async || relay.metric("watership_route_probes_total").await >= Some(1.0))
        .await;
    let bind = stage.channel.queue_bind(
        "all".into(),
        "watership".into(),
        "#".into(),
        Default::default(),
        Default::default(),
    );
    bind.await.expect("it is bound");
    stage.inbox.count(20_000).await;
    assert_eq!(relay.status().await["sessions"], 1);
}

#[tokio::test]
async fn limits_that_are_set_on_the_role_do_not_disturb() {
    let stage = Stage::new(Setup::default()).await;
    for limit in [
        "statement_timeout = '1ms'",
        "lock_timeout = '1ms'",
        "idle_in_transaction_session_timeout = '1ms'",
        "idle_session_timeout = '200ms'",
        // The statement that lifts it has to end before.
        "transaction_timeout = '2s'",
    ] {
        let (name, _) = limit.split_once(' ').expect("a setting");
        // transaction_timeout came with 17.
        if stage.holds(&format!("EXISTS (SELECT FROM pg_settings WHERE name = '{name}')")).await {
            let database = &stage.database.name;
            stage.execute(&format!("ALTER ROLE postgres IN DATABASE {database} SET {limit}")).await;
        }
    }
    let relay = stage.start().await;
    // Idle for longer than any of them, but for the keepalives.
    until("upkeep has looked twice", async || {
        relay.status().await["state_seconds"].as_f64() > Some(6.0)
    })
    .await;
    // One transaction that takes longer than a millisecond to decode, and a lock in the way.
    stage.execute(MANY).await;
    stage.inbox.count(20_000).await;
    stage.execute("BEGIN; LOCK TABLE watership.checkpoint IN ACCESS EXCLUSIVE MODE").await;
    stage.execute("SELECT watership.emit('t', '1', 'late', '1')").await;
    stage.execute("SELECT pg_sleep(3); COMMIT").await;
    stage.settled().await;
    let status = relay.status().await;
    assert_eq!(status["sessions"], 1, "{status}");
    assert_eq!(relay.metric("watership_outbox_maintain_failures_total").await, Some(0.0));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_synchronous_standby_that_is_away_keeps_no_session_from_its_start() {
    let server = private_postgres(&[], None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    // From now on each COMMIT waits for a standby that nobody ever saw, unless it is asked not to.
    stage.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'").await;
    stage.execute("SELECT pg_reload_conf()").await;
    let waits = "current_setting('synchronous_standby_names') = 'away'";
    until("the setting counts", async || stage.holds(waits).await).await;
    stage.execute("SET synchronous_commit = local").await;
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('t', '1', 'alone', '1')").await;
    assert_eq!(kinds(&stage.settled().await), ["alone"]);
    assert_eq!(relay.status().await["sessions"], 1);
    stage.execute("DROP TABLE watership.backfill_moved").await;
    stage.execute("DELETE FROM watership.migration WHERE version = 13").await;
    stage.run(&["init", "--admin-url", &stage.database.url]).await.expect_code(0);
    relay.stop().await.expect_code(0);
    stage.run(&["drop", "--yes", "--admin-url", &stage.database.url]).await.expect_code(0);
}
