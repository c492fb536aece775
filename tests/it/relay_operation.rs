//! What operators rely on: the slot of an idle relay, metrics, probes.

use crate::support::inbox::kinds;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// Answers of the relay to the server within which a thing that must not happen would happen.
const ANSWERS: u32 = 3;

/// <https://github.com/confluentinc/bottledwater-pg/pull/73>
#[tokio::test]
async fn museum_m12_an_idle_slot_advances_under_foreign_wal_and_rests_when_only_we_write() {
    // The relay answers every two seconds, so that time is seen to pass.
    let server = private_postgres(&["wal_sender_timeout = '6s'", "autovacuum = off"], None).await;
    let settings = "relay.idle_interval = \"1s\"\noutbox.maintain = false";
    let setup = Setup { settings, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    stage.execute("CREATE TABLE junk (filler text)").await;
    let foreign = "INSERT INTO junk SELECT repeat('x', 100) FROM generate_series(1, 5000)";
    for _ in 0..2 {
        stage.execute(foreign).await;
        let end = stage.text("pg_current_wal_lsn()").await;
        until("the slot passes foreign WAL", async || {
            stage.holds(&format!("'{}' >= '{end}'::pg_lsn", stage.confirmed_flush().await)).await
        })
        .await;
        let resting = stage.confirmed_flush().await;
        let stored = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;
        let answered = "SELECT max(reply_time) FROM pg_stat_replication";
        for _ in 0..ANSWERS {
            let last = stage.text(answered).await;
            until("an answer", async || stage.text(answered).await != last).await;
        }
        assert_eq!(stage.confirmed_flush().await, resting);
        assert_eq!(stage.text("SELECT flush_lsn FROM watership.checkpoint").await, stored);
    }
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn an_idle_slot_never_passes_an_open_transaction() {
    let settings = "relay.idle_interval = \"1s\"";
    let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
    let _relay = stage.start().await;
    let open = stage.database.connect().await;
    open.batch_execute("BEGIN; SELECT watership.emit('t', '1', 'late', '1')").await.unwrap();
    stage
        .execute("CREATE TABLE junk AS SELECT repeat('x', 100) FROM generate_series(1, 5000)")
        .await;
    let end = stage.text("pg_current_wal_lsn()").await;
    until("the slot passes foreign WAL", async || {
        stage.holds(&format!("'{}' >= '{end}'::pg_lsn", stage.confirmed_flush().await)).await
    })
    .await;
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(kinds(&stage.settled().await), ["late"]);
}

#[tokio::test]
async fn two_phase_transactions_arrive_when_they_are_committed() {
    let server = private_postgres(&["max_prepared_transactions = 5"], None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    let relay = stage.start().await;
    let emit = |kind: &str| format!("SELECT watership.emit('t', '1', '{kind}', '1')");
    for (kind, name) in [("kept", "one"), ("gone", "two")] {
        stage.execute(&format!("BEGIN; {}; PREPARE TRANSACTION '{name}'", emit(kind))).await;
    }
    stage.execute(&emit("between")).await;
    assert_eq!(kinds(&stage.settled().await), ["between"]);
    relay.stop().await.expect_code(0);
    let _relay = stage.start().await;
    stage.execute("COMMIT PREPARED 'one'").await;
    stage.execute("ROLLBACK PREPARED 'two'").await;
    assert_eq!(kinds(&stage.settled().await), ["between", "kept"]);
}

const SERIES: &[&str] = &[
    "watership_events_received_total{ROUTE}",
    "watership_messages_published_total{ROUTE}",
    "watership_messages_confirmed_total{ROUTE}",
    "watership_messages_nacked_total{ROUTE}",
    "watership_messages_returned_total{ROUTE}",
    "watership_events_dropped_total{ROUTE}",
    "watership_commit_to_confirm_seconds_count{ROUTE}",
    "watership_capture_to_publish_seconds_count{ROUTE}",
    "watership_route_held{ROUTE}",
    "watership_in_flight_messages",
    "watership_window_events",
    "watership_window_bytes",
    "watership_window_paused",
    "watership_slot_lag_bytes",
    "watership_retained_wal_bytes",
    "watership_safe_wal_size_bytes",
    "watership_wal_status{status=\"reserved\"}",
    "watership_wal_status{status=\"lost\"}",
    "watership_transactions_total",
    "watership_changes_received_total",
    "watership_events_skipped_total",
    "watership_position_lsn{stage=\"received\"}",
    "watership_position_lsn{stage=\"settled\"}",
    "watership_position_lsn{stage=\"checkpointed\"}",
    "watership_position_lsn{stage=\"advanced\"}",
    "watership_checkpoint_age_seconds",
    "watership_checkpoints_total",
    "watership_last_confirmed_timestamp_seconds",
    "watership_broker_blocked",
    "watership_broker_blocked_seconds_total",
    "watership_outbox_partitions_created_total",
    "watership_outbox_maintain_failures_total",
    "watership_sessions_total",
    "watership_reconnects_total{cause=\"unreachable\"}",
    "watership_reconnects_total{cause=\"busy\"}",
];

#[tokio::test]
async fn every_series_is_there_before_the_first_event_and_moves_with_it() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let route = "route=\"outbox\",owner=\"\"";
    let metric = async |series: &str| {
        let series = series.replace("ROUTE", route);
        relay.metric(&series).await.unwrap_or_else(|| panic!("{series} is missing"))
    };
    for series in SERIES {
        metric(series).await;
    }
    assert_eq!(metric("watership_messages_confirmed_total{ROUTE}").await, 0.0);
    until("upkeep looks at the slot", async || {
        metric("watership_wal_status{status=\"reserved\"}").await == 1.0
    })
    .await;
    let clock = async || -> f64 {
        stage.text("extract(epoch FROM clock_timestamp())").await.parse().expect("a number")
    };
    let before = clock().await.floor();
    stage.execute("SELECT watership.emit('t', '1', 'e', '1') FROM generate_series(1, 10)").await;
    stage.settled().await;
    // The fence is the eleventh.
    for (series, value) in [
        ("watership_events_received_total{ROUTE}", 11.0),
        ("watership_messages_published_total{ROUTE}", 11.0),
        ("watership_messages_confirmed_total{ROUTE}", 11.0),
        ("watership_commit_to_confirm_seconds_count{ROUTE}", 11.0),
        ("watership_transactions_total", 2.0),
        ("watership_sessions_total", 1.0),
    ] {
        assert_eq!(metric(series).await, value, "{series}");
    }
    until("the changes are counted", async || {
        metric("watership_changes_received_total").await == 11.0
    })
    .await;
    let after = clock().await;
    let confirmed = metric("watership_last_confirmed_timestamp_seconds").await;
    assert!((before..=after).contains(&confirmed), "{before} {confirmed} {after}");
    for path in ["/livez", "/readyz", "/status", "/metrics"] {
        assert_eq!(relay.get(path).await.0, 200, "{path}");
    }
    assert_eq!(relay.get("/nothing").await.0, 404);
}

#[tokio::test]
async fn one_piece_of_upkeep_that_fails_keeps_no_other_from_its_turn() {
    let stage = Stage::new(Setup::default()).await;
    // Rows of watership.parked cannot be removed, which comes before the partitions.
    stage
        .execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql \
             AS $$ BEGIN RAISE EXCEPTION 'not today'; END $$; \
             CREATE TRIGGER refuse BEFORE DELETE ON watership.parked \
             FOR EACH STATEMENT EXECUTE FUNCTION refuse()",
        )
        .await;
    let days = "(SELECT count(*) FROM pg_inherits WHERE inhparent = 'watership.outbox'::regclass)";
    let all = stage.text(days).await;
    let last = stage
        .text(
            "(SELECT max(inhrelid::regclass::text) FROM pg_inherits \
               WHERE inhparent = 'watership.outbox'::regclass \
               AND inhrelid::regclass::text ~ '[0-9]$')",
        )
        .await;
    stage.execute(&format!("DROP TABLE {last}")).await;
    let relay = stage.start().await;
    until("the missing day is back", async || stage.text(days).await == all).await;
    until("canaries are written", async || {
        stage.holds("EXISTS (SELECT FROM watership.canary WHERE number > 0)").await
    })
    .await;
    assert!(relay.metric("watership_outbox_maintain_failures_total").await >= Some(1.0));
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&["upkeep failed; it will be retried", "not today"]);
}
