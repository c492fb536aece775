//! The museum: bugs that other relays, connectors and clients shipped, each tried on this one.
//!
//! Almost all of them are one bug: a position moved past something that was not yet confirmed.
//! M4, M12, M14, M15 and M18 stand where their subject stands (`classes.rs` names them); M9 is
//! about snapshots.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use crate::network::Net;
use crate::report::Class;
use crate::support::framing::{is_ack, wal_tag};
use crate::support::inbox::kinds;
use crate::support::proxy::{Action, Direction, Flow, Trigger};
use crate::support::relay::Window;
use crate::support::scene::Scene;
use crate::support::servers::{client, execute, own_database, own_vhost, text};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{throughout, until};

const SLOT: &str =
    "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE database = current_database()";

/// A COPY-like statement: all rows of one transaction, of keys `k0` to `k99`.
fn rows(count: u32) -> String {
    format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 'order', 'k' || i % 100, 'changed', \
             json_build_object('key', 'k' || i % 100, 'n', i / 100 + 1) \
         FROM generate_series(0, {count} - 1) AS i"
    )
}

/// One transaction of many rows, killed again and again inside it.
async fn killed_inside(class: Class, count: u32, window: Window) {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = Scene::new("museum", &database.url, &vhost.url, window).await;
    let mut dice = scene.dice();
    scene.consume();
    scene.relay().start();
    execute(&database.url, &rows(count)).await;
    for kill in 1..=4 {
        scene.relay().confirms(dice.u64(1..u64::from(count) / 8)).await;
        let stored = "SELECT flush_lsn FROM watership.checkpoint";
        let end = text(&database.url, "SELECT pg_current_wal_lsn()").await;
        let inside = format!("({stored}) < '{end}'::pg_lsn AND ({SLOT}) <= ({stored})");
        assert_eq!(text(&database.url, &inside).await, "true", "feedback stays below it");
        scene.fault(&format!("kill -9 inside the transaction, {kill}"));
        scene.relay().kill();
        scene.relay().start();
        scene.recovered(Instant::now(), 0).await;
    }
    scene.relay().says_nothing();
    class.survived(&scene.judge().await);
}

/// <https://github.com/debezium/debezium/pull/7531>
#[tokio::test]
async fn museum_m01_rows_that_share_an_lsn() {
    let Some(class) = Class::long("M1", "museum_m01_rows_that_share_an_lsn") else { return };
    killed_inside(class, 20_000, Window::default()).await;
}

/// <https://github.com/debezium/debezium/pull/3620>
#[tokio::test]
async fn museum_m02_filter_that_never_switches_off() {
    let class = Class::new("M2", "museum_m02_filter_that_never_switches_off");
    let stage = Stage::new(Setup::default()).await;
    let emit = |kind: &str| format!("SELECT watership.emit('t', '1', '{kind}', '1')");
    stage.execute(&emit("before")).await;
    // A position that no transaction has: between two of them.
    stage.execute("CREATE TABLE junk AS SELECT 1").await;
    let between = stage.text("SELECT pg_current_wal_insert_lsn()").await;
    stage.execute("CREATE TABLE more AS SELECT 1").await;
    for kind in ["one", "two", "three"] {
        stage.execute(&emit(kind)).await;
    }
    stage
        .execute(&format!(
            "UPDATE watership.checkpoint SET mark = '{between}'::pg_lsn - '0/0', ordinal = 1"
        ))
        .await;
    let relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(kinds(&got), ["one", "two", "three"], "all behind the position, nothing before");
    let skipped = relay.metric("watership_events_skipped_total").await;
    assert_eq!(skipped, Some(1.0), "the filter stops at the first newer event");
    class.held(3);
}

/// <https://github.com/debezium/debezium/pull/4152>
#[tokio::test]
async fn museum_m03_begin_with_the_lsn_of_its_first_row() {
    let Some(class) = Class::long("M3", "museum_m03_begin_with_the_lsn_of_its_first_row") else {
        return;
    };
    let mut net = Net::flowing("M3", "").await;
    type Tag = (&'static str, fn(&[u8]) -> bool);
    let tags: [Tag; 3] = [
        ("Begin", |message| wal_tag(message) == Some(b'B')),
        ("Insert", |message| wal_tag(message) == Some(b'I')),
        ("Commit", |message| wal_tag(message) == Some(b'C')),
    ];
    for (name, matches) in tags {
        for action in [Action::StallBefore, Action::StallAfter] {
            net.scene.fault(&format!("kill -9 at {name}, {action:?}"));
            let (direction, nth, for_ever) = (Direction::ToRelay, 5, false);
            net.postgres.trigger(Trigger { direction, matches, nth, action, for_ever });
            net.postgres.strikes().await;
            net.scene.relay().kill();
            net.postgres.heal();
            net.scene.relay().start();
            net.scene.recovered(Instant::now(), 0).await;
        }
    }
    net.scene.relay().says_nothing();
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

/// Confirms stay away while the server asks for answers; the slot must not pass the event.
async fn unconfirmed(class: Class, title: &str, fresh: bool) {
    let mut net = Net::ready(title, "relay.idle_interval = \"1s\"").await;
    let database = net.database.clone();
    execute(&database, "SELECT pg_current_wal_lsn()").await;
    if !fresh {
        net.scene.relay().start();
        net.scene.relay().reaches("it streams", |status| status["state"] == "streaming").await;
    }
    net.rabbit.trigger(Trigger {
        direction: Direction::ToRelay,
        matches: is_ack,
        nth: 1,
        action: Action::StallBefore,
        for_ever: false,
    });
    let start = text(&database, "SELECT pg_current_wal_insert_lsn()").await;
    execute(&database, crate::pg::EMIT_ONE).await;
    if fresh {
        net.scene.relay().start();
    }
    net.rabbit.strikes().await;
    let foreign = "CREATE TABLE junk AS SELECT repeat('x', 100) FROM generate_series(1, 5000)";
    execute(&database, foreign).await;
    let behind = format!("({SLOT}) <= '{start}'::pg_lsn");
    let client = client(&database).await.expect("a connection");
    throughout(Duration::from_secs(5), "the slot stays behind the event", async || {
        let row = client.query_one(&format!("SELECT {behind}"), &[]).await;
        row.expect("an answer").get(0)
    })
    .await;
    net.scene.fault("kill -9 before the confirm");
    net.scene.relay().kill();
    net.rabbit.heal();
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.relay().says_nothing();
    class.survived(&net.scene.judge().await);
}

/// <https://github.com/pgjdbc/pgjdbc/pull/2941>
#[tokio::test]
async fn museum_m05_driver_that_acknowledges_on_a_fresh_connection() {
    let Some(class) =
        Class::long("M5", "museum_m05_driver_that_acknowledges_on_a_fresh_connection")
    else {
        return;
    };
    unconfirmed(class, "M5", true).await;
}

/// <https://github.com/electric-sql/electric/pull/4731>
#[tokio::test]
async fn museum_m06_keepalive_past_a_small_transaction() {
    let class = Class::new("M6", "museum_m06_keepalive_past_a_small_transaction");
    unconfirmed(class, "M6", false).await;
}

/// <https://github.com/yugabyte/yugabyte-db/issues/33126>
#[tokio::test]
async fn museum_m07_position_of_the_last_callback() {
    let class = Class::new("M7", "museum_m07_position_of_the_last_callback");
    let routes = "[[route]]\nname = \"held\"\noutbox = { aggregate_type = \"held\" }\n\
        exchange = \"nowhere\"\n[[route]]\nname = \"good\"\n\
        outbox = { aggregate_type = \"good\" }\nexchange = \"watership\"\n";
    let stage = Stage::new(Setup { routes, ..Setup::default() }).await;
    let emit = |kind: &str, n: u32| format!("SELECT watership.emit('{kind}', '1', 'e{n}', '1')");
    let relay = stage.start().await;
    let start = stage.text("SELECT pg_current_wal_insert_lsn()").await;
    stage.execute(&emit("held", 1)).await;
    for n in 2..=50 {
        stage.execute(&emit("good", n)).await;
    }
    stage.inbox.count(49).await;
    until("the route is held", async || relay.status().await["held"] != Value::Array(vec![])).await;
    let behind = format!("'{start}'::pg_lsn");
    throughout(Duration::from_secs(1), "the slot stays behind the first", async || {
        let stored = format!("(SELECT flush_lsn FROM watership.checkpoint) <= {behind}");
        stage.holds(&format!("({SLOT}) <= {behind} AND {stored}")).await
    })
    .await;
    relay.kill();
    let bind = stage.channel.queue_bind(
        "all".into(),
        "nowhere".into(),
        "#".into(),
        Default::default(),
        Default::default(),
    );
    bind.await.expect("bound");
    let _relay = stage.start().await;
    let got = stage.settled().await;
    assert!(kinds(&got).contains(&"e1"), "the first arrives");
    class.held(50);
}

/// <https://github.com/PostHog/posthog/pull/64719>
#[tokio::test]
async fn museum_m08_size_limit_inside_a_transaction() {
    let Some(class) = Class::long("M8", "museum_m08_size_limit_inside_a_transaction") else {
        return;
    };
    killed_inside(class, 10_000, Window { events: 500, unconfirmed: 100 }).await;
}

/// Holds the checkpoint back while confirms come in; returns with the row still locked.
async fn locked(title: &str) -> (Net, tokio_postgres::Client) {
    let mut net = Net::flowing(title, "").await;
    let locker = client(&net.database).await.expect("a connection");
    let lock = "BEGIN; SELECT 1 FROM watership.checkpoint FOR UPDATE";
    locker.batch_execute(lock).await.expect("locked");
    let client = client(&net.database).await.expect("a connection");
    let stored = text(&net.database, "SELECT flush_lsn FROM watership.checkpoint").await;
    let behind = format!("SELECT ({SLOT}) <= '{stored}'::pg_lsn");
    net.scene.confirmed_more(800).await;
    throughout(Duration::from_secs(2), "nothing is told that is not stored", async || {
        client.query_one(&behind, &[]).await.expect("an answer").get(0)
    })
    .await;
    (net, locker)
}

/// <https://github.com/apache/flink-cdc/issues/2538>
#[tokio::test]
async fn museum_m10_checkpoint_that_is_stored_late() {
    let Some(class) = Class::long("M10", "museum_m10_checkpoint_that_is_stored_late") else {
        return;
    };
    let (mut net, locker) = locked("M10").await;
    locker.batch_execute("COMMIT").await.expect("unlocked");
    let client = client(&net.database).await.expect("a connection");
    throughout(Duration::from_secs(2), "the slot is where a stored row was", async || {
        let slot: String =
            client.query_one(&format!("SELECT ({SLOT})::text"), &[]).await.expect("a slot").get(0);
        let sql = format!("SELECT flush_lsn >= '{slot}' FROM watership.checkpoint");
        client.query_one(&sql, &[]).await.expect("a row").get(0)
    })
    .await;
    net.scene.fault("kill -9 after a late checkpoint");
    net.scene.relay().kill();
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.relay().says_nothing();
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

/// <https://github.com/ConduitIO/conduit/pull/2680>
#[tokio::test]
async fn museum_m11_upstream_told_before_the_position_is_stored() {
    let Some(class) = Class::long("M11", "museum_m11_upstream_told_before_the_position_is_stored")
    else {
        return;
    };
    let (mut net, locker) = locked("M11").await;
    net.scene.fault("kill -9 before the position is stored");
    net.scene.relay().kill();
    locker.batch_execute("ROLLBACK").await.expect("unlocked");
    net.scene.relay().start();
    net.scene.recovered(Instant::now(), 0).await;
    net.scene.relay().says_nothing();
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

/// <https://github.com/debezium/debezium-server/pull/136>
#[tokio::test]
async fn museum_m13_confirm_timeout_without_consequence() {
    let Some(class) = Class::long("M13", "museum_m13_confirm_timeout_without_consequence") else {
        return;
    };
    crate::broker_limits::never_confirmed(class, "M13").await;
}

/// <https://github.com/sequinstream/sequin/issues/2141>
#[tokio::test]
async fn museum_m16_one_connection_after_the_other_is_lost() {
    let Some(class) = Class::long("M16", "museum_m16_one_connection_after_the_other_is_lost")
    else {
        return;
    };
    let mut net = Net::flowing("M16", "").await;
    for round in 1..=4 {
        net.scene.fault(&format!("one backend ends, {round}"));
        let end = "SELECT count(pg_terminate_backend(pid)) FROM (SELECT pid FROM pg_stat_activity \
            WHERE datname = current_database() AND application_name LIKE 'watership%' \
            ORDER BY random() LIMIT 1) AS one";
        text(&net.database, end).await;
        net.back().await;
    }
    let count = "SELECT count(*) <= 3 FROM pg_stat_activity \
        WHERE datname = current_database() AND application_name LIKE 'watership%'";
    assert_eq!(text(&net.database, count).await, "true", "none leaks");
    net.scene.relay().logs(&["session ended", "kind=\"unreachable\""]).await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}

/// <https://github.com/OpenSDN-io/community/issues/129>
#[tokio::test]
async fn museum_m17_missing_confirm_in_a_silent_loop() {
    let Some(class) = Class::long("M17", "museum_m17_missing_confirm_in_a_silent_loop") else {
        return;
    };
    let settings = "broker.heartbeat = \"3s\"\nbroker.confirm_timeout = \"7s\"";
    let mut net = Net::flowing("M17", settings).await;
    net.scene.fault("publishes arrive, heartbeats too, confirms never");
    net.rabbit.trigger(Trigger {
        direction: Direction::ToRelay,
        matches: is_ack,
        nth: 1,
        action: Action::Drop,
        for_ever: true,
    });
    // Each retry is counted, and the log says why.
    net.scene.relay().counts("watership_reconnects_total", 2).await;
    net.scene.relay().logs(&["session ended", "confirm"]).await;
    net.rabbit.heal();
    net.rabbit.flows(Flow::default());
    net.back().await;
    net.scene.enough();
    class.survived(&net.scene.judge().await);
}
