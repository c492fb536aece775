//! A captured table that no longer has what a route promised, with a backlog behind the change:
//! each policy does what it says, nothing is lost, and nothing overtakes.

use std::collections::HashMap;

use serde_json::Value;

use crate::parking::{parked, rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE TABLE items (id int PRIMARY KEY, name text, price int); \
    ALTER TABLE items REPLICA IDENTITY FULL";

/// What is done to the table, a change of the row `id` afterwards, and how it is told.
const CHANGES: &[(&str, &str, &str)] = &[
    (
        "ALTER TABLE items DROP COLUMN name",
        "UPDATE items SET price = price + 1 WHERE id = {id}",
        "column \"name\" (text) is gone",
    ),
    (
        "ALTER TABLE items RENAME COLUMN name TO title",
        "UPDATE items SET price = price + 1 WHERE id = {id}",
        "column \"name\" (text) is gone",
    ),
    (
        "ALTER TABLE items ALTER COLUMN price TYPE numeric(10,2)",
        "UPDATE items SET price = price + 1 WHERE id = {id}",
        "column \"price\" was integer and is numeric(10,2)",
    ),
    (
        "ALTER TABLE items REPLICA IDENTITY DEFAULT",
        "UPDATE items SET price = price + 1 WHERE id = {id}",
        "the replica identity was all columns and is (id)",
    ),
    // Another column has the name and the type.
    (
        "ALTER TABLE items DROP COLUMN name; ALTER TABLE items ADD COLUMN name text",
        "UPDATE items SET price = price + 1 WHERE id = {id}",
        "column \"name\" (text) is gone",
    ),
];

async fn stage(on_drift: &str) -> Stage {
    let routes = format!(
        "[[route]]\nname = \"items\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
         on_drift = \"{on_drift}\"\n"
    );
    let tables = &["public.items"];
    Stage::new(Setup { sql: TABLE, tables, routes: &routes, ..Setup::default() }).await
}

/// Two rows are sent, the relay stops, the table changes between two writes of each row, and a new
/// row and a deleted one come after.
async fn backlog(stage: &Stage, change: &str, write: &str) {
    let relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'a', 10), (2, 'b', 20)").await;
    assert_eq!(stage.settled().await.len(), 2);
    relay.stop().await.expect_code(0);
    for id in ["1", "2"] {
        stage.execute(&format!("UPDATE items SET price = price + 1 WHERE id = {id}")).await;
    }
    stage.execute(change).await;
    for id in ["1", "2"] {
        stage.execute(&write.replace("{id}", id)).await;
    }
    stage.execute("DELETE FROM items WHERE id = 2").await;
    stage.execute("INSERT INTO items (id, price) VALUES (3, 30)").await;
}

/// Operation and price of each change, by key, in the order of arrival.
fn by_key(messages: &[Message]) -> HashMap<i64, Vec<String>> {
    let mut all: HashMap<i64, Vec<String>> = HashMap::new();
    for message in messages {
        let body = message.json();
        let key = body["key"]["id"].as_i64().expect("a key");
        let price = match &body["after"]["price"] {
            Value::String(text) => text.trim_end_matches(".00").to_owned(),
            price => price.to_string(),
        };
        all.entry(key).or_default().push(format!("{} {price}", message.text("ws-op")));
    }
    all
}

/// Everything that was committed came once, in the order of its key.
fn is_complete(messages: &[Message]) {
    let expected: HashMap<i64, Vec<String>> = [
        (1, vec!["insert 10", "update 11", "update 12"]),
        (2, vec!["insert 20", "update 21", "update 22", "delete null"]),
        (3, vec!["insert 30"]),
    ]
    .map(|(key, changes)| (key, changes.into_iter().map(str::to_owned).collect()))
    .into();
    assert_eq!(by_key(messages), expected);
}

/// The change is recorded once, at its place.
async fn is_recorded(stage: &Stage, told: &str) {
    let recorded = format!(
        "(SELECT count(*) = 1 AND bool_and(changes @> ARRAY['{told}'] AND broken = '{{items}}' \
         AND (mark, ordinal) <= (SELECT mark, ordinal FROM watership.checkpoint)) \
         FROM watership.schema_history WHERE kind = 'changed')"
    );
    assert!(stage.holds(&recorded).await, "{}", stage.run(&["schema", "public.items"]).await.log);
    stage.run(&["schema", "public.items"]).await.expect_text(&[told]);
}

#[tokio::test]
async fn with_pass_everything_comes_and_the_change_is_logged_counted_and_recorded() {
    for (change, write, told) in CHANGES {
        let stage = stage("pass").await;
        backlog(&stage, change, write).await;
        let relay = stage.start().await;
        is_complete(&stage.settled().await);
        is_recorded(&stage, told).await;
        let drift = "watership_route_drift_total{route=\"items\",owner=\"\"}";
        assert_eq!(relay.metric(drift).await, Some(1.0), "{change}");
        stage.run(&["check"]).await.expect_code(0).expect_text(&[told]);
        let log = relay.stop().await.log;
        assert_eq!(log.matches("the table no longer has what the route promised").count(), 1);
        assert!(log.contains(&told.replace('"', "\\\"")), "{log}");
    }
}

#[tokio::test]
async fn with_park_changes_wait_in_order_until_somebody_agrees_and_retries() {
    for (change, write, told) in CHANGES {
        let stage = stage("park").await;
        backlog(&stage, change, write).await;
        let relay = stage.start().await;
        until("all after the change is parked", async || rows(&stage).await == ["parked drift"; 4])
            .await;
        assert_eq!(stage.settled().await.len(), 4, "what was written before has come");
        is_recorded(&stage, told).await;
        stage.run(&["check"]).await.expect_code(1).expect_text(&[told]);
        // A retry without an agreement parks them again.
        parked(&stage, &["retry", "--all"]).await;
        until("they were tried", async || {
            stage.holds("(SELECT min(attempts) FROM watership.parked) >= 1").await
                && rows(&stage).await == ["parked drift"; 4]
        })
        .await;
        let sessions = relay.metric("watership_sessions_total").await.expect("a series");
        stage.run(&["schema", "accept", "public.items"]).await.expect_code(0).expect_text(&[told]);
        until("the relay takes it over", async || {
            relay.metric("watership_sessions_total").await.is_some_and(|now| now > sessions)
                && relay.status().await["state"] == "streaming"
        })
        .await;
        stage.execute("INSERT INTO items (id, price) VALUES (4, 40)").await;
        parked(&stage, &["retry", "--all"]).await;
        until("they are published", async || rows(&stage).await == ["released drift"; 4]).await;
        let mut got = stage.settled().await;
        got.retain(|message| message.json()["key"]["id"] != 4);
        is_complete(&got);
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn with_stop_the_relay_stops_before_the_change_and_goes_on_when_somebody_agrees() {
    for (change, write, told) in CHANGES {
        let stage = stage("stop").await;
        backlog(&stage, change, write).await;
        for _ in 0..2 {
            let ended = stage.spawn().ended().await;
            ended.expect_code(3).expect_text(&["schema_drift", "watership schema accept"]);
        }
        assert_eq!(stage.settled_now().await.len(), 4, "what was written before has come");
        is_recorded(&stage, told).await;
        stage.run(&["schema", "accept", "public.items"]).await.expect_code(0).expect_text(&[told]);
        let relay = stage.start().await;
        is_complete(&stage.settled().await);
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn several_changes_in_a_backlog_are_agreed_to_together() {
    let stage = stage("stop").await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'a', 10)").await;
    assert_eq!(stage.settled().await.len(), 1);
    relay.stop().await.expect_code(0);
    for (from, to) in [("name", "title"), ("title", "label"), ("label", "caption")] {
        stage.execute(&format!("ALTER TABLE items RENAME COLUMN {from} TO {to}")).await;
        stage.execute("UPDATE items SET price = price + 1").await;
    }
    stage.spawn().ended().await.expect_code(3).expect_text(&["schema_drift"]);
    stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
    let relay = stage.start().await;
    let got = stage.settled().await;
    let expected = ["insert 10", "update 11", "update 12", "update 13"];
    assert_eq!(by_key(&got)[&1], expected);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_masked_column_that_is_renamed_is_not_sent_in_clear_under_its_new_name() {
    let rules = "columns = { mask = [\"name\"] }\non_drift = \"pass\"";
    let stage = stage("pass").await;
    stage.replace_configuration(&stage.configuration().replace("on_drift = \"pass\"", rules));
    let relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'topsecret', 10)").await;
    assert_eq!(stage.settled().await.len(), 1);
    relay.stop().await.expect_code(0);
    stage.execute("ALTER TABLE items RENAME COLUMN name TO title").await;
    stage.execute("UPDATE items SET price = 11").await;
    stage.execute("INSERT INTO items VALUES (2, 'topsecret', 20)").await;
    let relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(got.len(), 3);
    assert!(!format!("{got:?}").contains("topsecret"));
    relay.stop().await.expect_code(0);
    // Nobody can agree to it while the rule names what is gone.
    let refused = stage.run(&["schema", "accept", "public.items"]).await;
    refused.expect_code(1).expect_text(&["columns.mask names column \"name\""]);
    let renamed = rules.replace("name", "title");
    stage.replace_configuration(&stage.configuration().replace(rules, &renamed));
    stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (3, 'topsecret', 30)").await;
    let got = stage.settled().await;
    assert_eq!(got.last().expect("it came").json()["after"]["title"], "***");
    assert!(!format!("{got:?}").contains("topsecret"));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn what_only_adds_is_recorded_and_breaks_no_promise() {
    let stage = stage("stop").await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'a', 10)").await;
    stage.execute("ALTER TABLE items ADD size int, ALTER price TYPE bigint").await;
    stage.execute("INSERT INTO items VALUES (2, 'b', 20, 5)").await;
    let got = stage.settled().await;
    assert_eq!(got[1].json()["after"]["size"], 5);
    let recorded = "(SELECT changes = ARRAY['column \"price\" was integer and is bigint', \
        'column \"size\" (integer) is new'] AND broken = '{}' \
        FROM watership.schema_history WHERE kind = 'changed')";
    assert!(stage.holds(recorded).await);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_column_that_was_dropped_and_added_again_breaks_the_promise_although_nothing_shows_it() {
    const AGAIN: &str = "ALTER TABLE items DROP COLUMN price; ALTER TABLE items ADD price int";
    const TOLD: &str = "column \"price\" (integer) is gone";
    for on_drift in ["pass", "park", "stop"] {
        let stage = stage(on_drift).await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO items VALUES (1, 'a', 10)").await;
        assert_eq!(stage.settled().await.len(), 1);
        stage.execute(AGAIN).await;
        if on_drift == "pass" {
            // No row has shown it yet: the catalog is looked at every few seconds.
            until("the next session has begun", async || {
                relay.metric("watership_sessions_total").await > Some(1.0)
            })
            .await;
        }
        stage.execute("INSERT INTO items VALUES (2, 'b', 20)").await;
        stage.run(&["check"]).await.expect_text(&[TOLD]);
        match on_drift {
            "pass" => {
                assert_eq!(stage.settled().await.len(), 2);
                let log = relay.stop().await.log;
                let told = "the table no longer has what the route promised";
                assert_eq!(log.matches(told).count(), 1, "{log}");
            }
            "park" => {
                until("it is parked", async || rows(&stage).await == ["parked drift"]).await;
                stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
                relay.stop().await.expect_code(0);
                let relay = stage.start().await;
                parked(&stage, &["retry", "--all"]).await;
                until("it is sent", async || rows(&stage).await == ["released drift"]).await;
                assert_eq!(stage.settled().await.len(), 2);
                relay.stop().await.expect_code(0);
            }
            _ => {
                relay.ended().await.expect_code(3).expect_text(&["schema_drift", "price"]);
                stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
                let relay = stage.start().await;
                assert_eq!(stage.settled().await.len(), 2);
                relay.stop().await.expect_code(0);
            }
        }
        stage.run(&["schema", "public.items"]).await.expect_text(match on_drift {
            "stop" => &["agreed"],
            _ => &[TOLD],
        });
    }
}
