//! Group B: the slot, the publication, and what is in the stream.

use std::time::Duration;

use tokio::time::Instant;
use watership::pg::connect::Options;
use watership::pg::replication::{ReplicationConnection, StreamOptions};
use watership::position::Lsn;
use watership::secret::Secret;

use crate::report::Class;
use crate::support::full;
use crate::support::inbox::kinds;
use crate::support::scene::{led, plain};
use crate::support::servers::{
    Database, database_of, execute, own_postgres, own_vhost, private_postgres,
};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{throughout, until};
use crate::support::writers::Load;

fn emit(kind: &str) -> String {
    format!("SELECT watership.emit('t', '1', '{kind}', '1')")
}

#[tokio::test]
async fn slot_b02_lost_because_its_wal_was_removed() {
    let class = Class::new("B2", "slot_b02_lost_because_its_wal_was_removed");
    let conf = ["max_slot_wal_keep_size = '1MB'", "max_wal_size = '32MB'", "min_wal_size = '32MB'"];
    let server = private_postgres(&conf, None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    stage.execute(&emit("lost")).await;
    stage.execute("CREATE TABLE junk (filler text)").await;
    let slot = &stage.slot;
    let lost = format!(
        "(SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = '{slot}')"
    );
    until("the slot is lost", async || {
        stage.execute("INSERT INTO junk VALUES ('x')").await;
        stage.execute("SELECT pg_switch_wal()").await;
        stage.execute("CHECKPOINT").await;
        stage.holds(&lost).await
    })
    .await;
    let texts = [&*format!("slot \"{slot}\" is lost"), "hint: "];
    for _ in 0..2 {
        stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    }
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty(), "nothing was skipped");
    class.held(1);
}

#[tokio::test]
async fn slot_b05_checkpoint_ahead_of_the_server() {
    let class = Class::new("B5", "slot_b05_checkpoint_ahead_of_the_server");
    let stage = Stage::new(Setup::default()).await;
    stage.execute(&emit("kept")).await;
    stage.execute("UPDATE watership.checkpoint SET flush_mark = 'FFFF/0'::pg_lsn - '0/0'").await;
    let texts = ["the checkpoint (FFFF/0) is ahead of the server's WAL", "hint: "];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty());
    class.held(1);
}

#[tokio::test]
async fn slot_b06_busy_with_another_client() {
    let mut class = Class::new("B6", "slot_b06_busy_with_another_client");
    let stage = Stage::new(Setup::default()).await;
    let options = Options::parse(&Secret::new(&*stage.database.url)).expect("a good URL");
    let holder = ReplicationConnection::connect(&options).await.expect("connected");
    let none = StreamOptions::default();
    let holder = holder.start(&stage.slot, Lsn::ZERO, &["watership"], none).await.expect("held");
    let mut relay = stage.spawn();
    until("it is on standby", async || relay.status().await["state"] == "standing_by").await;
    let status = relay.status().await;
    assert_eq!(status["last_error"]["kind"], "busy", "{status}");
    let active =
        format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{}'", stage.slot);
    let pid = stage.text(&active).await;
    let error = status["last_error"]["error"].as_str().unwrap_or_default().to_owned();
    assert!(error.contains(&pid), "{error} names {pid}");
    stage.execute(&emit("kept")).await;
    holder.close().await;
    let begin = Instant::now();
    relay.ready().await;
    class.took("taken_over_ms", begin.elapsed());
    assert_eq!(kinds(&stage.settled().await), ["kept"]);
    class.held(1);
}

#[tokio::test]
async fn slot_b07_wrong_kind() {
    let class = Class::new("B7", "slot_b07_wrong_kind");
    let stage = Stage::new(Setup::default()).await;
    stage.execute(&emit("kept")).await;
    let slot = &stage.slot;
    for (plugin, arguments) in [("test_decoding", ""), ("pgoutput", ", twophase => true")] {
        stage.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
        stage
            .execute(&format!(
                "SELECT pg_create_logical_replication_slot('{slot}', '{plugin}'{arguments})"
            ))
            .await;
        let texts = [&*format!("slot \"{slot}\" is of the wrong kind"), "hint: "];
        stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    }
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty());
    class.held(1);
}

#[tokio::test]
async fn slot_b15_replica_identity_nothing_and_back() {
    let class = Class::new("B15", "slot_b15_replica_identity_nothing_and_back");
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, v text)";
    let tables = ["public.items"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'a')").await;
    stage.execute("ALTER TABLE items REPLICA IDENTITY NOTHING").await;
    stage.execute("INSERT INTO items VALUES (2, 'b')").await;
    let refused = stage.sql.batch_execute("UPDATE items SET v = 'c' WHERE id = 1").await;
    let refused = format!("{:?}", refused.expect_err("Postgres refuses it"));
    assert!(refused.contains("replica identity"), "{refused}");
    stage.execute("ALTER TABLE items REPLICA IDENTITY DEFAULT").await;
    stage.execute("UPDATE items SET v = 'c' WHERE id = 1").await;
    let got = stage.settled().await;
    let expected = ["public.items.insert", "public.items.insert", "public.items.update"];
    assert_eq!(kinds(&got), expected);
    class.held(3);
}

#[tokio::test]
async fn slot_b18_transaction_of_many_rows_and_a_kill_inside() {
    let Some(mut class) = Class::long("B18", "slot_b18_transaction_of_many_rows_and_a_kill_inside")
    else {
        return;
    };
    let rows: u32 = if full() { 1_000_000 } else { 40_000 };
    // A server of its own: elsewhere a new slot would have to wait for the end of it.
    let (server, vhost) = (own_postgres(&[]).await, own_vhost().await);
    let url = server.url("postgres", "shop");
    let mut scene = plain("B18", &url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    let sql = format!(
        "SELECT count(watership.emit('order'::text, k, 'changed'::text, \
             '{{\"key\":\"' || k || '\",\"n\":' || n || '}}')) \
         FROM (SELECT 'k' || i % 1000 AS k, i / 1000 + 1 AS n \
               FROM generate_series(0, {} - 1) AS i ORDER BY i OFFSET 0) AS rows",
        rows
    );
    execute(&url, &sql).await;
    // Step by step: each step has its own deadline.
    for step in 1..=u64::from(rows) / 3 / 10_000 {
        scene.relay().confirms(step * 10_000).await;
    }
    let (_, peak) = scene.relay().memory_kib();
    scene.fault("kill -9 inside a large transaction");
    scene.relay().kill();
    scene.relay().start();
    scene.recovered(Instant::now(), 0).await;
    scene.delivered(rows.into()).await;
    let peak = peak.max(scene.relay().memory_kib().1);
    class.note("peak_memory_kib", peak);
    assert!(peak < 96 * 1024, "{peak} KiB");
    scene.relay().says_nothing();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn slot_b19_transaction_open_across_a_restart_of_the_relay() {
    let class = Class::new("B19", "slot_b19_transaction_open_across_a_restart_of_the_relay");
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let open = stage.database.connect().await;
    open.batch_execute(&format!("BEGIN; {}", emit("late"))).await.expect("begun");
    stage.execute(&emit("between")).await;
    assert_eq!(kinds(&stage.settled().await), ["between"]);
    relay.kill();
    let relay = stage.start().await;
    stage.execute(&emit("after")).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    let _relay = stage.start().await;
    open.batch_execute(&format!("{}; COMMIT", emit("later"))).await.expect("committed");
    assert_eq!(kinds(&stage.settled().await), ["between", "after", "late", "later"]);
    class.held(4);
}

#[tokio::test]
async fn slot_b29_an_old_snapshot_delays_nothing() {
    let class = Class::new("B29", "slot_b29_an_old_snapshot_delays_nothing");
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let old = stage.database.connect().await;
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM watership.outbox";
    old.batch_execute(begin).await.expect("begun");
    for kind in ["one", "two"] {
        stage.execute(&emit(kind)).await;
        stage.settled().await;
    }
    assert_eq!(kinds(&stage.settled().await), ["one", "two"]);
    // The relay itself holds no old snapshot.
    let held = "(SELECT count(*) = 0 FROM pg_stat_activity WHERE \
        application_name LIKE 'watership%' AND datname = current_database() \
        AND backend_type = 'client backend' AND state <> 'active' AND backend_xmin IS NOT NULL)";
    assert!(stage.holds(held).await);
    class.held(2);
}

#[tokio::test]
async fn slot_b30_outbox_rows_changed_before_they_were_relayed() {
    let class = Class::new("B30", "slot_b30_outbox_rows_changed_before_they_were_relayed");
    let stage = Stage::new(Setup::default()).await;
    stage.execute(&emit("kept")).await;
    stage.execute(&emit("also")).await;
    stage.execute("UPDATE watership.outbox SET payload = '2' WHERE event_type = 'kept'").await;
    stage.execute("DELETE FROM watership.outbox WHERE event_type = 'also'").await;
    let _relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(kinds(&got), ["kept", "also"], "what was committed is what happened");
    assert!(got.iter().all(|message| message.body == "1"));
    class.held(2);
}

#[tokio::test]
async fn slot_b12_rights_on_the_checkpoint_revoked() {
    let Some(class) = Class::long("B12", "slot_b12_rights_on_the_checkpoint_revoked") else {
        return;
    };
    let server = own_postgres(&[]).await;
    let url = server.url("postgres", "shop");
    execute(&url, "CREATE ROLE relay LOGIN REPLICATION").await;
    let vhost = own_vhost().await;
    let relay = server.url("relay", "shop");
    let ways = (&*url, &*relay);
    let mut scene = led("B12", ways, (&vhost.url, &vhost.url), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(Load { events: 4_000_000, rate: 800, rows: 5 });
    scene.flowing(500).await;
    scene.fault("rights revoked");
    execute(&url, "REVOKE ALL ON watership.checkpoint FROM watership_relay").await;
    scene.relay().logs(&["session ended", "permission denied"]).await;
    throughout(Duration::from_secs(2), "it stays up", async || {
        scene.relay().check();
        true
    })
    .await;
    let before = scene.relay().confirmed().await;
    let grant = "GRANT SELECT, INSERT, UPDATE, DELETE ON watership.checkpoint TO watership_relay";
    execute(&url, grant).await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn slot_b03_invalidated_while_nobody_used_it() {
    let class = Class::new("B3", "slot_b03_invalidated_while_nobody_used_it");
    let server = own_postgres(&[]).await;
    let url = server.url("postgres", "shop");
    if server.major() < 18 {
        return class.not_here("servers before 18 do not invalidate slots for idleness");
    }
    let database = Database { url: url.clone(), name: "shop".into() };
    let stage = Stage::on(database, own_vhost().await, Setup::default()).await;
    stage.execute(&emit("kept")).await;
    execute(&url, "ALTER SYSTEM SET idle_replication_slot_timeout = '1s'").await;
    execute(&url, "SELECT pg_reload_conf()").await;
    let lost = format!(
        "(SELECT invalidation_reason = 'idle_timeout' FROM pg_replication_slots \
         WHERE slot_name = '{}')",
        stage.slot
    );
    until("the slot is invalidated", async || {
        stage.execute("CHECKPOINT").await;
        stage.holds(&format!("coalesce({lost}, false)")).await
    })
    .await;
    let texts = ["is lost (idle_timeout)", "hint: "];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    class.held(1);
}
