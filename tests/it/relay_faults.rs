//! The end of a relay in the middle of its work, and what the next one makes of it.

use std::collections::{HashMap, HashSet};

use watership::dev::Signal;

use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const KEYS: u64 = 100;
const SMALL_WINDOW: &str = "relay.max_window_events = 1000\nrelay.max_unconfirmed = 200";

/// `count` rows of one transaction, numbered from `first`.
fn rows(first: u64, count: u64) -> String {
    let last = first + count - 1;
    format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 't', (n % {KEYS})::text, 'e', n::text::json \
         FROM generate_series({first}, {last}) AS n"
    )
}

/// Nothing lost and each key in order, by first arrival; returns the number of duplicates.
fn duplicates(got: &[Message], count: u64) -> usize {
    let mut seen = HashSet::new();
    let mut last = HashMap::new();
    for message in got.iter().filter(|message| seen.insert(message.id())) {
        let n: u64 = message.body.parse().expect("a number");
        let before = last.insert(n % KEYS, n).unwrap_or(0);
        assert!(n > before, "{n} came after {before}");
    }
    assert_eq!(seen.len() as u64, count, "lost some");
    got.len() - seen.len()
}

/// Waits until a checkpoint inside a transaction after `start` is stored.
async fn inside(stage: &Stage, start: &str) {
    let inside = format!(
        "(SELECT commit_lsn > '{start}' AND ordinal > 0 AND flush_lsn < commit_lsn \
         FROM watership.checkpoint)"
    );
    until("a checkpoint inside the transaction", async || stage.holds(&inside).await).await;
}

#[tokio::test]
async fn a_kill_inside_a_large_transaction_loses_nothing_and_repeats_only_what_was_not_stored() {
    const ROWS: u64 = 40_000;
    let stage = Stage::new(Setup { settings: SMALL_WINDOW, ..Setup::default() }).await;
    let start = stage.text("pg_current_wal_insert_lsn()").await;
    let relay = stage.start().await;
    stage.execute(&rows(1, ROWS)).await;
    inside(&stage, &start).await;
    relay.kill();
    let ordinal: u64 =
        stage.text("SELECT ordinal FROM watership.checkpoint").await.parse().unwrap();
    assert!(ordinal < ROWS, "it was killed too late to show anything");
    let relay = stage.start().await;
    let got = stage.settled().await;
    duplicates(&got, ROWS);
    // The second session did not begin again: it skipped what the checkpoint covers.
    let number = |message: &Message| message.body.parse::<u64>().expect("a number");
    let covered = got.iter().filter(|message| number(message) <= ordinal).count() as u64;
    assert_eq!(covered, ordinal, "what was stored came twice");
    relay.stop().await.expect_code(0);
}

/// Whether this process, and what it starts, ignores SIGHUP: proc(5), `SigIgn`.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").expect("it is Linux");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("it says so");
    u64::from_str_radix(mask.trim(), 16).expect("a mask") & 1 == 1
}

#[tokio::test]
async fn a_relay_that_is_asked_to_end_drains_and_repeats_nothing() {
    let stage = Stage::new(Setup { settings: SMALL_WINDOW, ..Setup::default() }).await;
    let mut written = 0;
    let mut signals = vec![Signal::Term, Signal::Int, Signal::Hangup];
    if ignores_hang_up() {
        // Under nohup, which the relay inherits and keeps to.
        signals.pop();
    }
    for signal in signals {
        let mut relay = stage.start().await;
        stage.execute(&rows(written + 1, 5_000)).await;
        stage.inbox.count(usize::try_from(written).unwrap() + 1_000).await;
        // More comes while it ends.
        relay.signal(signal);
        stage.execute(&rows(written + 5_001, 5_000)).await;
        relay.ended().await.expect_code(0);
        written += 10_000;
    }
    let _relay = stage.start().await;
    assert_eq!(duplicates(&stage.settled().await, written), 0);
}

#[tokio::test]
async fn what_is_sent_again_after_a_kill_is_the_same_message_with_the_same_id() {
    // Nothing is stored between the events and the kill, so everything is sent again.
    let settings = "relay.checkpoint_interval = \"1m\"";
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, name text); \
        CREATE TABLE public.more (id int PRIMARY KEY)";
    let tables = ["public.items", "public.more"];
    let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    // The first progress of a session is stored at once, the next a minute later.
    stage.settled().await;
    stage
        .execute(
            "BEGIN; INSERT INTO items SELECT n, 'x' FROM generate_series(1, 50) AS n; \
             UPDATE items SET name = 'y' WHERE id % 2 = 0; UPDATE items SET id = 100 WHERE id = 1; \
             SELECT watership.emit('t', '1', 'e', '1'); DELETE FROM items WHERE id = 2; \
             INSERT INTO more VALUES (1); TRUNCATE items, more; COMMIT",
        )
        .await;
    stage.execute("INSERT INTO more VALUES (2)").await;
    const MESSAGES: usize = 50 + 25 + 1 + 1 + 1 + 1 + 2 + 1;
    let first = stage.inbox.count(MESSAGES).await;
    relay.kill();
    let relay = stage.start().await;
    let all = stage.inbox.count(2 * MESSAGES).await;
    relay.stop().await.expect_code(0);
    let ids: HashSet<String> = first.iter().map(Message::id).collect();
    assert_eq!(ids.len(), MESSAGES, "every event has an id of its own");
    let by_id = |messages: &[Message]| {
        let facts = |m: &Message| (m.id(), m.body.clone(), m.text("ws-position"));
        let mut list: Vec<_> = messages.iter().map(facts).collect();
        list.sort();
        list
    };
    assert_eq!(by_id(&all[..MESSAGES]), by_id(&all[MESSAGES..]));
}

#[tokio::test]
async fn a_second_relay_of_the_same_name_stands_by_and_takes_over() {
    let stage = Stage::new(Setup::default()).await;
    let first = stage.start().await;
    stage.execute("SELECT watership.emit('t', '1', 'e', '1')").await;
    stage.settled().await;
    let mut second = stage.spawn_second();
    until("it is on standby", async || second.status().await["state"] == "standing_by").await;
    assert_eq!((second.get("/livez").await.0, second.get("/readyz").await.0), (200, 503));
    let status = second.status().await;
    assert_eq!(status["last_error"]["kind"], "busy", "{status}");
    assert_eq!(first.status().await["state"], "streaming");
    stage.execute("SELECT watership.emit('t', '1', 'e', '2')").await;
    stage.settled().await;
    first.kill();
    stage.execute("SELECT watership.emit('t', '1', 'e', '3')").await;
    second.ready().await;
    let got = stage.settled().await;
    let bodies: Vec<&str> = got.iter().map(|message| &*message.body).collect();
    assert_eq!(bodies, ["1", "2", "3"]);
    second.stop().await.expect_code(0);
}
