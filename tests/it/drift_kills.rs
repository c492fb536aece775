//! A relay that is killed with -9 while it finds that a table has changed: nothing is lost, nothing
//! overtakes within a key, and the change is recorded once.

use std::collections::{BTreeMap, HashSet};

use crate::parking::{parked, rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const KEYS: usize = 40;
/// Updates of each row, before the change and after it.
const UPDATES: usize = 30;

async fn stage(on_drift: &str) -> Stage {
    let routes = format!(
        "[[route]]\nname = \"items\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
         on_drift = \"{on_drift}\"\n"
    );
    let sql = "CREATE TABLE items (id int PRIMARY KEY, n int, note text)";
    Stage::new(Setup { sql, tables: &["public.items"], routes: &routes, ..Setup::default() }).await
}

/// The table changes in the middle of its writes.
async fn writes(stage: &Stage) {
    stage
        .execute(&format!("INSERT INTO items SELECT g, 0 FROM generate_series(1, {KEYS}) g"))
        .await;
    let updates = "UPDATE items SET n = n + 1;".repeat(UPDATES);
    let change = "ALTER TABLE items DROP COLUMN note";
    stage.execute(&updates).await;
    stage.execute(&format!("BEGIN; {updates} {change}; {updates} COMMIT")).await;
    // Each a transaction of its own.
    for _ in 0..UPDATES {
        stage.execute("UPDATE items SET n = n + 1").await;
    }
}

/// Each message once, by first arrival: every row has all its states in order.
fn is_complete(messages: &[Message]) {
    let mut seen = HashSet::new();
    let mut rows: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for message in messages.iter().filter(|message| seen.insert(message.id())) {
        let body = message.json();
        let number = |name: &str| body["after"][name].as_i64().expect("a number");
        rows.entry(number("id")).or_default().push(number("n"));
    }
    assert_eq!(rows.len(), KEYS);
    let last = i64::try_from(4 * UPDATES).expect("a small number");
    let all: Vec<i64> = (0..=last).collect();
    for (id, states) in rows {
        assert_eq!(states, all, "row {id}");
    }
}

async fn is_recorded_once(stage: &Stage) {
    let recorded = "(SELECT count(*) = 1 AND bool_and(changes::text LIKE '%note%gone%') \
         FROM watership.schema_history WHERE kind = 'changed')";
    let history = "(SELECT json_agg(h) FROM watership.schema_history h WHERE kind = 'changed')";
    assert!(stage.holds(recorded).await, "{}", stage.text(history).await);
}

#[tokio::test]
async fn kills_while_drift_is_parked_and_retried_lose_nothing_and_keep_each_key_in_order() {
    let stage = stage("park").await;
    let mut relay = stage.start().await;
    writes(&stage).await;
    let of_drift = 2 * UPDATES * KEYS;
    for parked in [1, of_drift / 8, of_drift / 2] {
        let some = format!("(SELECT count(*) FROM watership.parked) >= {parked}");
        until("some are parked", async || stage.holds(&some).await).await;
        relay.kill();
        relay = stage.start().await;
    }
    stage.settled().await;
    let kinds = rows(&stage).await;
    assert_eq!(kinds, vec!["parked drift"; of_drift]);
    is_recorded_once(&stage).await;
    stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
    // Before it knows of the agreement.
    relay.kill();
    relay = stage.start().await;
    parked(&stage, &["retry", "--all"]).await;
    for released in [1, of_drift / 2] {
        let some = format!(
            "(SELECT count(*) FROM watership.parked WHERE state = 'released') >= {released}"
        );
        until("some are released", async || stage.holds(&some).await).await;
        relay.kill();
        relay = stage.start().await;
    }
    let none = "NOT EXISTS (SELECT FROM watership.parked WHERE state <> 'released')";
    until("all are released", async || stage.holds(none).await).await;
    is_complete(&stage.settled().await);
    is_recorded_once(&stage).await;
    relay.stop().await.expect_code(0);
}

/// The checkpoint's transaction has moved the position, and waits to record the change.
#[tokio::test]
async fn a_kill_between_the_checkpoint_and_the_record_leaves_both_or_none() {
    for on_drift in ["pass", "park", "stop"] {
        let stage = stage(on_drift).await;
        let relay = stage.start().await;
        let other = stage.database.connect().await;
        let lock = "BEGIN; LOCK TABLE watership.schema_history IN SHARE MODE";
        other.batch_execute(lock).await.expect("the lock");
        writes(&stage).await;
        let waits = "EXISTS (SELECT FROM pg_locks AS l WHERE NOT l.granted \
            AND l.relation = 'watership.schema_history'::regclass)";
        until("the record waits", async || stage.holds(waits).await).await;
        let none = "NOT EXISTS (SELECT FROM watership.schema_history WHERE kind = 'changed')";
        assert!(stage.holds(none).await);
        relay.kill();
        other.batch_execute("COMMIT").await.expect("the lock is gone");
        let relay = match on_drift {
            "stop" => {
                stage.spawn().ended().await.expect_code(3).expect_text(&["schema_drift"]);
                is_recorded_once(&stage).await;
                stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
                stage.start().await
            }
            "park" => {
                let relay = stage.start().await;
                stage.settled().await;
                assert_eq!(rows(&stage).await, vec!["parked drift"; 2 * UPDATES * KEYS]);
                stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
                relay.stop().await.expect_code(0);
                let relay = stage.start().await;
                parked(&stage, &["retry", "--all"]).await;
                let none = "NOT EXISTS (SELECT FROM watership.parked WHERE state <> 'released')";
                until("all are released", async || stage.holds(none).await).await;
                relay
            }
            _ => stage.start().await,
        };
        is_complete(&stage.settled().await);
        is_recorded_once(&stage).await;
        relay.stop().await.expect_code(0);
    }
}
