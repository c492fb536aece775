//! Doubts about the position on real servers: each is named, ends the relay with code 3, and is
//! resolved by `watership resync`, after which the relay continues in a new epoch.

use serde_json::Value;

use crate::support::inbox::kinds;
use crate::support::servers::{
    Database, database_of, own_database, own_vhost, postgres, private_postgres,
};
use crate::support::stage::{Running, Setup, Stage, configuration, run};
use crate::support::waiting::until;

/// A stage with the captured table `items`, on which one event has passed.
pub async fn stage(settings: &str) -> Stage {
    stage_on(own_database().await, settings).await
}

async fn stage_on(database: Database, settings: &str) -> Stage {
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, note text)";
    let setup = Setup { sql, tables: &["public.items"], settings, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let relay = stage.start().await;
    stage.execute(&emit("before")).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    stage
}

pub fn emit(kind: &str) -> String {
    format!("SELECT watership.emit('t', '1', '{kind}', '1')")
}

/// A new start is refused with this verdict and its range; `resync` accepts it, once.
async fn resolve(stage: &Stage, verdict: &str, from: &str) {
    let begins = format!("{verdict}: ");
    let texts = [&*begins, "hint: ", "watership resync --accept-gap"];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    stage.run(&["check"]).await.expect_code(3).expect_text(&[&begins]);
    let before = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;
    let shown = stage.run(&["resync"]).await;
    shown.expect_code(3).expect_text(&[&begins, "Nothing was changed"]);
    let arguments = ["resync", "--accept-gap", "--reason", "a test", "--by", "me", "--json"];
    let done = stage.run(&arguments).await;
    let json = &done.expect_code(0).log[done.log.find("\n{").expect("JSON")..];
    let report: Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {json}"));
    assert_eq!((&report["verdicts"][0], &report["from"]), (&verdict.into(), &from.into()));
    assert_eq!((&report["epoch"], &report["gap_from"]), (&2.into(), &before.into()));
    let record = stage
        .text(
            "SELECT concat_ws(' ', who, role, reason, verdicts, resumed_from, epoch, \
             resumed_at = (SELECT flush_lsn FROM watership.checkpoint)) FROM watership.resync",
        )
        .await;
    assert_eq!(record, format!("me postgres a test {{{verdict}}} {from} 2 t"));
    let again = stage.run(&arguments).await;
    again.expect_code(1).expect_text(&["nothing is wrong", "hint: "]);
    let relay = stage.start().await;
    assert_goes_on(stage).await;
    let busy = stage.run(&["resync", "--accept-gap", "--reason", "x", "--anyway", "--from", "now"]);
    busy.await.expect_code(1).expect_text(&["is in use by pid", "stop the relay first"]);
    relay.stop().await.expect_code(0);
}

/// What is emitted now arrives, in the second epoch.
pub async fn assert_goes_on(stage: &Stage) {
    stage.execute(&emit("after")).await;
    stage.execute("INSERT INTO items SELECT coalesce(max(id), 0) + 1 FROM items").await;
    let got = stage.settled().await;
    let after = got.iter().find(|message| message.kind() == "after").expect("it arrives");
    assert!(after.text("ws-position").starts_with("00000002-"), "{after:?}");
    assert!(kinds(&got).contains(&"public.items.insert"), "{got:?}");
}

/// The running relay ends by itself.
async fn ends_with(relay: Running, verdict: &str) {
    let begins = format!("{verdict}: ");
    relay.ended().await.expect_code(3).expect_text(&[&begins, "watership resync"]);
}

#[tokio::test]
async fn a_dropped_slot_is_resolved_with_a_new_one() {
    let stage = stage("").await;
    stage.execute(&format!("SELECT pg_drop_replication_slot('{}')", stage.slot)).await;
    stage.execute(&emit("lost")).await;
    let checked = stage.run(&["check"]).await;
    checked.expect_code(3).expect_text(&["do not create it again", "slot_missing"]);
    assert!(!checked.log.contains("run `watership init`"), "{}", checked.log);
    let status = stage.run(&["status"]).await;
    status.expect_code(3).expect_text(&["slot_missing", "watership resync"]);
    resolve(&stage, "slot_missing", "now").await;
    assert!(!kinds(&stage.settled_now().await).contains(&"lost"));
}

#[tokio::test]
async fn a_slot_made_anew_is_not_mistaken_for_an_advanced_one() {
    let stage = stage("").await;
    let slot = &stage.slot;
    stage.execute(&emit("lost")).await;
    let recreate = format!(
        "SELECT pg_drop_replication_slot('{slot}'); \
         SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"
    );
    stage.execute(&recreate).await;
    resolve(&stage, "slot_recreated", "slot").await;
}

#[tokio::test]
async fn an_advanced_slot_is_resolved_where_it_is() {
    let stage = stage("").await;
    stage.execute(&emit("lost")).await;
    let slot = &stage.slot;
    stage
        .execute(&format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())"))
        .await;
    resolve(&stage, "slot_ahead", "slot").await;
}

#[tokio::test]
async fn a_slot_whose_wal_was_removed_is_resolved_with_a_new_one() {
    let server =
        private_postgres(&["max_slot_wal_keep_size = '16MB'", "min_wal_size = '32MB'"], None).await;
    let stage = stage_on(database_of(&server), "").await;
    until("the slot is lost", async || {
        stage.execute("SELECT pg_logical_emit_message(true, 'a', '')").await;
        stage.execute("SELECT pg_switch_wal()").await;
        stage.execute("CHECKPOINT").await;
        stage.holds("(SELECT wal_status = 'lost' FROM pg_replication_slots)").await
    })
    .await;
    resolve(&stage, "slot_lost", "now").await;
}

#[tokio::test]
async fn a_slot_that_was_idle_for_too_long_is_lost_and_says_why() {
    if postgres().await.major() < 18 {
        return;
    }
    let server = private_postgres(&["idle_replication_slot_timeout = '1s'"], None).await;
    let stage = stage_on(database_of(&server), "").await;
    until("the slot is lost", async || {
        stage.execute("CHECKPOINT").await;
        stage.holds("(SELECT wal_status = 'lost' FROM pg_replication_slots)").await
    })
    .await;
    stage.spawn().ended().await.expect_code(3).expect_text(&["is lost (idle_timeout)"]);
    resolve(&stage, "slot_lost", "now").await;
}

#[tokio::test]
async fn a_checkpoint_beyond_the_wal_is_resolved_at_the_slot() {
    let stage = stage("").await;
    stage.execute("UPDATE watership.checkpoint SET flush_mark = 'FFFF/0'::pg_lsn - '0/0'").await;
    stage.execute(&emit("during")).await;
    resolve(&stage, "checkpoint_ahead", "slot").await;
    assert!(kinds(&stage.settled_now().await).contains(&"during"), "nothing was skipped");
}

#[tokio::test]
async fn another_cluster_is_resolved_at_the_slot_there() {
    let stage = stage("").await;
    stage.execute("UPDATE watership.checkpoint SET system_identifier = '42'").await;
    resolve(&stage, "other_cluster", "slot").await;
}

#[tokio::test]
async fn another_timeline_without_a_synchronised_slot_is_a_verdict() {
    let stage = stage("").await;
    stage.execute("UPDATE watership.checkpoint SET timeline = 7").await;
    resolve(&stage, "timeline_changed", "slot").await;
}

#[tokio::test]
async fn a_publication_made_anew_is_resolved_behind_it() {
    let stage = stage("").await;
    stage.execute("DROP PUBLICATION watership").await;
    stage.execute(&emit("lost")).await;
    let missing = stage.run(&["resync", "--accept-gap", "--reason", "x"]).await;
    missing.expect_code(1).expect_text(&["publication_missing: ", "watership init"]);
    let made = stage.run(&["init"]).await;
    made.expect_code(0).expect_text(&["created  publication", "not recorded"]);
    resolve(&stage, "publication_recreated", "now").await;
    assert!(!kinds(&stage.settled_now().await).contains(&"lost"));
}

#[tokio::test]
async fn a_table_taken_out_under_a_running_relay_is_a_verdict_even_when_it_is_back() {
    let stage = stage("").await;
    let relay = stage.start().await;
    stage.execute("ALTER PUBLICATION watership DROP TABLE items").await;
    stage.execute("INSERT INTO items VALUES (1)").await;
    ends_with(relay, "table_removed").await;
    stage.run(&["init"]).await.expect_code(0).expect_text(&["not recorded: table_removed"]);
    resolve(&stage, "table_removed", "checkpoint").await;
}

#[tokio::test]
async fn a_table_made_anew_under_a_running_relay_is_a_verdict() {
    let stage = stage("").await;
    let relay = stage.start().await;
    let recreate = "BEGIN; DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, note text); \
        ALTER PUBLICATION watership ADD TABLE items; COMMIT";
    stage.execute(recreate).await;
    ends_with(relay, "table_recreated").await;
    resolve(&stage, "table_recreated", "checkpoint").await;
}

#[tokio::test]
async fn an_altered_publication_is_a_verdict_and_a_further_table_is_none() {
    let stage = stage("").await;
    let relay = stage.start().await;
    stage.execute("CREATE TABLE more (id int)").await;
    stage.execute("ALTER PUBLICATION watership ADD TABLE more").await;
    let written = "SELECT coalesce(max(number), 0) FROM watership.canary";
    let number = stage.text(written).await;
    until("the publication was compared since", async || {
        let now: i64 = stage.text(written).await.parse().expect("a number");
        now > number.parse::<i64>().expect("a number") + 1
    })
    .await;
    // What is written to it is nobody's event: neither published nor parked, and in nobody's way.
    stage.execute("INSERT INTO more SELECT generate_series(1, 1500)").await;
    stage.execute(&emit("beside")).await;
    assert_eq!(kinds(&stage.settled().await), ["before", "beside"]);
    assert_eq!(relay.metric("watership_parked").await, Some(0.0));
    assert_eq!(relay.status().await["state"], "streaming");
    stage.execute("ALTER PUBLICATION watership SET (publish = 'insert')").await;
    ends_with(relay, "publication_altered").await;
    resolve(&stage, "publication_altered", "checkpoint").await;
    // Without updates no second canary would come: none is waited for.
    let relay = stage.start().await;
    stage.execute(&emit("again")).await;
    let written = async || relay.metric("watership_checkpoints_total").await > Some(0.0);
    until("a checkpoint, and with it a tick", written).await;
    let status = relay.status().await;
    assert!(status["state"] == "streaming" && status["canary_age_seconds"].is_null(), "{status}");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn changes_lost_by_a_publication_that_was_altered_for_a_moment_are_a_verdict() {
    let stage = stage("").await;
    stage.execute("INSERT INTO items VALUES (1)").await;
    let relay = stage.start().await;
    stage
        .execute(
            "ALTER PUBLICATION watership SET (publish = 'insert'); \
             UPDATE items SET note = 'lost'; \
             ALTER PUBLICATION watership SET (publish = 'insert, update, delete, truncate')",
        )
        .await;
    ends_with(relay, "publication_altered").await;
    resolve(&stage, "publication_altered", "checkpoint").await;
}

#[tokio::test]
async fn a_publication_altered_for_a_moment_while_the_relay_is_down_is_a_verdict_at_its_start() {
    let stage = stage("").await;
    stage.start().await.stop().await.expect_code(0);
    stage
        .execute(
            "ALTER PUBLICATION watership SET (publish = 'insert'); \
             ALTER PUBLICATION watership SET (publish = 'insert, update, delete, truncate')",
        )
        .await;
    ends_with(stage.spawn(), "publication_altered").await;
    resolve(&stage, "publication_altered", "checkpoint").await;
}

#[tokio::test]
async fn a_publication_that_had_another_name_for_a_while_is_a_verdict_with_a_way_out() {
    let stage = stage("").await;
    stage.start().await.stop().await.expect_code(0);
    stage.execute("ALTER PUBLICATION watership RENAME TO other").await;
    stage.execute("INSERT INTO items VALUES (7)").await;
    stage.execute("ALTER PUBLICATION other RENAME TO watership").await;
    ends_with(stage.spawn(), "publication_altered").await;
    let asked = ["resync", "--accept-gap", "--reason", "x"];
    stage.run(&asked).await.expect_code(0);
    // WAL is read with the catalog of its time, which has no such publication.
    let way_out = "--accept-gap --reason '\u{2026}' --anyway --from now";
    stage.spawn().ended().await.expect_code(3).expect_text(&["publication_missing: ", way_out]);
    let asked = [&asked[..], &["--anyway", "--from", "now"]].concat();
    stage.run(&asked).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute(&emit("after")).await;
    let got = stage.settled().await;
    assert!(got.iter().any(|message| message.kind() == "after"), "{got:?}");
    relay.stop().await.expect_code(0);
}

/// Sets the checkpoint back under a running relay, which ends with a verdict; a person has it go
/// on, and a relay that is started afterwards finds nothing wrong.
async fn went_back(set_back: &str, new_session: bool) {
    let stage = stage("").await;
    let relay = stage.start().await;
    stage.execute(&emit("seen")).await;
    stage.settled().await;
    stage.execute(&format!("UPDATE watership.checkpoint SET {set_back}")).await;
    if new_session {
        let slots = format!("pg_replication_slots WHERE slot_name = '{}'", stage.slot);
        stage.execute(&format!("SELECT pg_terminate_backend(active_pid) FROM {slots}")).await;
    }
    let ended = relay.ended().await;
    let begins = "checkpoint_went_back: ";
    ended.expect_code(3).expect_text(&[begins, "--anyway --from checkpoint"]);
    let asked = ["resync", "--accept-gap", "--reason", "x", "--anyway", "--from", "checkpoint"];
    stage.run(&asked).await.expect_code(0);
    let relay = stage.start().await;
    assert_goes_on(&stage).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_checkpoint_that_went_back_is_a_verdict_of_the_next_session() {
    went_back("mark = 1", true).await;
}

#[tokio::test]
async fn a_checkpoint_of_an_earlier_session_is_a_verdict_of_the_next_session() {
    went_back("session_no = session_no - 1", true).await;
}

#[tokio::test]
async fn a_checkpoint_that_went_back_is_noticed_while_the_relay_runs() {
    went_back("mark = 1", false).await;
}

#[tokio::test]
async fn the_canary_comes_through_and_is_neither_event_nor_progress() {
    // Alone on its server: WAL of others is something to advance for.
    let server = private_postgres(&["autovacuum = off"], None).await;
    let settings = "relay.canary_interval = \"1s\"\noutbox.maintain = false";
    let setup = Setup { settings, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    let resting = stage.confirmed_flush().await;
    until("ten canaries", async || {
        stage.holds("(SELECT coalesce(max(number), 0) >= 10 FROM watership.canary)").await
    })
    .await;
    // Its age falls again whenever one comes through.
    let fresh = |age: f64| age < 5.0;
    until("a canary has just come through", async || {
        relay.metric("watership_canary_age_seconds").await.is_some_and(fresh)
            && relay.status().await["canary_age_seconds"].as_f64().is_some_and(fresh)
    })
    .await;
    assert_eq!(relay.metric("watership_changes_received_total").await, Some(0.0));
    assert_eq!(relay.metric("watership_transactions_total").await, Some(0.0));
    assert_eq!(relay.metric("watership_checkpoints_total").await, Some(0.0));
    assert_eq!(stage.confirmed_flush().await, resting);
    relay.stop().await.expect_code(0);
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty());
}

#[tokio::test]
async fn a_stream_that_leaves_out_the_canary_is_deaf_and_the_slot_stays() {
    let stage = stage("relay.canary_interval = \"1s\"\nrelay.idle_interval = \"1s\"").await;
    // What is compared agrees with the filter, so only the canary can notice it.
    stage
        .execute(
            "ALTER PUBLICATION watership SET TABLE watership.outbox, items, \
             watership.canary WHERE (name = 'nobody')",
        )
        .await;
    stage.run(&["resync", "--accept-gap", "--reason", "x"]).await.expect_code(0);
    let before = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;
    let relay = stage.start().await;
    stage
        .execute("CREATE TABLE junk AS SELECT repeat('x', 100) FROM generate_series(1, 50000)")
        .await;
    let ended = relay.ended().await;
    ended.expect_code(3).expect_text(&["stream_deaf: ", "without canary", "--anyway"]);
    assert_eq!(stage.text("SELECT flush_lsn FROM watership.checkpoint").await, before);
    let arguments = ["resync", "--accept-gap", "--reason", "x", "--anyway", "--from", "now"];
    stage.run(&arguments).await.expect_code(0).expect_text(&["recreated"]);
}

#[tokio::test]
async fn an_installation_without_the_canary_in_its_publication_runs_and_is_told() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute("DELETE FROM watership.publication_seen").await;
    stage.execute("ALTER PUBLICATION watership DROP TABLE watership.canary").await;
    let told = stage.run(&["check"]).await;
    told.expect_code(0).expect_text(&["lacks watership.canary", "watership init"]);
    let relay = stage.start().await;
    stage.execute(&emit("e")).await;
    assert_eq!(kinds(&stage.settled().await), ["e"]);
    relay
        .stop()
        .await
        .expect_code(0)
        .expect_text(&["watership.canary or its updates are not published"]);
    stage.run(&["init"]).await.expect_code(0).expect_text(&["changed  publication"]);
    stage.start().await.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_slot_in_danger_is_told_in_status_metric_and_log() {
    let server = private_postgres(&["max_slot_wal_keep_size = '64MB'"], None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    let relay = stage.start().await;
    let safe = relay.status().await["slot"]["warning"].clone();
    assert!(safe.is_null(), "{safe}");
    // An open transaction keeps the WAL since its start.
    let open = stage.database.connect().await;
    open.batch_execute(&format!("BEGIN; {}", emit("late"))).await.expect("an open transaction");
    for _ in 0..4 {
        stage.execute("SELECT pg_logical_emit_message(true, 'a', '')").await;
        stage.execute("SELECT pg_switch_wal()").await;
    }
    until("the danger is seen", async || relay.metric("watership_slot_at_risk").await == Some(1.0))
        .await;
    let warning = relay.status().await["slot"]["warning"].clone();
    assert!(warning.as_str().is_some_and(|text| text.contains("less than a quarter")), "{warning}");
    open.batch_execute("ROLLBACK").await.expect("an end");
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&["less than a quarter of max_slot_wal_keep_size"]);
    stage.run(&["check"]).await.expect_text(&["less than a quarter"]);
}

#[tokio::test]
async fn init_makes_a_failover_slot_where_the_server_can() {
    let server = private_postgres(&[], None).await;
    let setup = Setup { settings: "source.failover = true", ..Setup::default() };
    if server.major() < 17 {
        let (config, _) =
            configuration(&server.url("postgres", "postgres"), "shop", &own_vhost().await, &setup);
        let refused = run(&config, &["init"]).await;
        refused.expect_code(2).expect_text(&["source.failover = true needs Postgres 17"]);
        return;
    }
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    assert!(stage.holds("(SELECT failover FROM pg_replication_slots)").await);
}

#[tokio::test]
async fn making_a_slot_waits_for_transactions_that_are_open_for_long() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute(&format!("SELECT pg_drop_replication_slot('{}')", stage.slot)).await;
    let open = stage.database.connect().await;
    open.batch_execute("BEGIN; CREATE TABLE pending ()").await.expect("an open transaction");
    // The limit for locks of other statements is 5 s.
    let waits = "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'transactionid' \
        AND datname = current_database() AND now() - query_start > interval '5.5 s')";
    let release = async {
        until("it has waited for long", async || stage.holds(waits).await).await;
        open.batch_execute("COMMIT").await.expect("its end");
    };
    let resync = stage.run(&["resync", "--accept-gap", "--reason", "x"]);
    let (ended, ()) = tokio::join!(resync, release);
    ended.expect_code(0).expect_text(&["recreated"]);
}

/// A relay does not start, and says this.
async fn refused(stage: &Stage, text: &str) {
    stage.spawn().ended().await.expect_code(1).expect_text(&[text, "hint: "]);
}

#[tokio::test]
async fn a_publication_that_leaves_out_what_is_wanted_is_refused_whatever_was_agreed_to() {
    let stage = stage("").await;
    let accept = ["resync", "--accept-gap", "--reason", "a test"];
    let root = |on| format!("ALTER PUBLICATION watership SET (publish_via_partition_root = {on})");
    stage.execute(&root(false)).await;
    stage.run(&accept).await.expect_code(0);
    refused(&stage, "publishes partitions under their own names").await;
    stage.execute(&root(true)).await;
    stage.run(&accept).await.expect_code(0);

    stage.execute("CREATE TABLE public.more (id int PRIMARY KEY)").await;
    let text =
        stage.configuration().replace("\"public.items\"", "\"public.items\", \"public.more\"");
    stage.replace_configuration(&text);
    refused(&stage, "table public.more is not in publication \"watership\"").await;
    stage.run(&["init"]).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("INSERT INTO public.more VALUES (1)").await;
    assert!(kinds(&stage.settled().await).contains(&"public.more.insert"));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn outbox_rows_of_an_accepted_gap_are_counted_and_sent_again_by_the_printed_statement() {
    let stage = stage("").await;
    stage.execute(&format!("SELECT pg_drop_replication_slot('{}')", stage.slot)).await;
    stage.execute(&emit("lost")).await;
    let bytes = "SELECT watership.emit_bytes('t', '1', 'bytes', 'ab', 'x/y', '{\"h\": \"1\"}')";
    stage.execute(bytes).await;
    // Two of them have been published: `before`, and the fence of the stage.
    let shown = stage.run(&["resync"]).await;
    shown.expect_code(3).expect_text(&["4 outbox rows since "]);
    let done = stage.run(&["resync", "--accept-gap", "--reason", "a test"]).await;
    done.expect_code(0).expect_text(&["4 outbox rows since ", "are still there"]);
    let begin = done.log.find("INSERT INTO watership.outbox").expect("a statement");
    let end = begin + done.log[begin..].find(';').expect("its end");
    let relay = stage.start().await;
    stage.execute(&done.log[begin..=end]).await;
    let mut got = stage.settled().await;
    got.retain(|message| message.kind() != "before");
    assert_eq!(kinds(&got), ["lost", "bytes"]);
    assert_eq!((got[1].text("h"), &*got[1].body), ("1".to_owned(), "ab"));
    let same = "(SELECT count(*) = 6 AND count(DISTINCT id) = 3 FROM watership.outbox \
                WHERE aggregate_type = 't')";
    assert!(stage.holds(same).await, "they keep their ids");
    relay.stop().await.expect_code(0);
}
