//! Captured tables that are dropped, renamed away, or taken out of the publication: a verdict, or,
//! with `on_table_lost = "hold"`, a table that is reported while everything else flows.

use serde_json::json;

use crate::support::inbox::Message;
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const TABLES: [&str; 2] = ["public.a", "public.b"];
const SQL: &str = "CREATE TABLE a (id int PRIMARY KEY, n int); \
    CREATE TABLE b (id int PRIMARY KEY, n int)";

async fn stage() -> Stage {
    let setup = Setup { sql: SQL, tables: &TABLES, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let held = "source.tables = [{ name = \"public.a\", on_table_lost = \"hold\" }, \"public.b\"]";
    let plain = format!("source.tables = {TABLES:?}");
    let text = stage.configuration();
    assert!(text.contains(&plain), "{text}");
    stage.replace_configuration(&text.replace(&plain, held));
    stage
}

/// Key and number of each change, by key: only within one there is an order.
fn changes(messages: &[Message]) -> Vec<(String, i64)> {
    let change = |message: &Message| {
        let after = message.json()["after"]["n"].as_i64();
        (message.text("ws-key"), after.expect("a row"))
    };
    let mut changes: Vec<_> = messages.iter().map(change).collect();
    changes.sort_by(|a, b| a.0.cmp(&b.0));
    changes
}

fn change(key: &str, n: i64) -> (String, i64) {
    (key.to_owned(), n)
}

async fn insert(stage: &Stage, table: &str, n: i64) {
    stage.execute(&format!("INSERT INTO {table} VALUES ({n}, {n})")).await;
}

async fn until_lost(relay: &Running, reason: &str) {
    let is_lost = async || {
        let status = relay.status().await;
        let lost = &status["lost_tables"][0];
        lost["reason"].as_str().is_some_and(|text| text.contains(reason))
            && status["state"] == "streaming"
    };
    until(&format!("it says: {reason}"), is_lost).await;
}

async fn until_back(relay: &Running) {
    let is_back = async || {
        let status = relay.status().await;
        status["lost_tables"] == json!([])
            && status["returned_tables"][0]["table"] == "public.a"
            && status["state"] == "streaming"
    };
    until("the table is back", is_back).await;
}

#[tokio::test]
async fn a_table_that_is_not_held_stops_the_relay_with_a_verdict_when_it_is_lost() {
    let setup = Setup { sql: SQL, tables: &TABLES, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    stage.execute("DROP TABLE a").await;
    let ended = relay.ended().await;
    ended.expect_code(3).expect_text(&["table_removed", "table public.a is not in publication"]);
}

#[tokio::test]
async fn a_held_table_that_leaves_the_publication_stops_nothing_else_and_comes_back_by_init() {
    let stage = stage().await;
    let relay = stage.start().await;
    insert(&stage, "a", 1).await;
    insert(&stage, "b", 1).await;
    assert_eq!(changes(&stage.settled().await).len(), 2);
    stage.execute("ALTER PUBLICATION watership DROP TABLE a").await;
    insert(&stage, "a", 2).await;
    insert(&stage, "b", 2).await;
    until_lost(&relay, "public.a is not in publication").await;
    insert(&stage, "b", 3).await;
    let arrived = changes(&stage.settled().await);
    assert!(arrived.contains(&change("public.b/3", 3)), "{arrived:?}");
    assert_eq!(relay.metric("watership_table_lost{table=\"public.a\"}").await, Some(1.0));
    let shown = stage.run(&["status"]).await;
    shown.expect_code(1).expect_text(&["public.a is not in publication", "watership init"]);
    stage.run(&["check"]).await.expect_code(1).expect_text(&["public.a"]);

    // Another process finds it lost, and says so again; it starts all the same.
    let log = relay.stop().await;
    log.expect_code(0);
    let told = log.log.matches("its changes are not published from now on").count();
    assert_eq!(told, 1, "{}", log.log);
    let relay = stage.start().await;
    until_lost(&relay, "public.a is not in publication").await;

    stage.run(&["init", "--admin-url", &stage.database.url]).await.expect_code(0);
    until_back(&relay).await;
    insert(&stage, "a", 4).await;
    let arrived = changes(&stage.settled().await);
    let of_a: Vec<_> = arrived.iter().filter(|(key, _)| key.starts_with("public.a/")).collect();
    assert_eq!(of_a, [&change("public.a/1", 1), &change("public.a/4", 4)]);
    assert_eq!(relay.metric("watership_table_lost{table=\"public.a\"}").await, Some(0.0));
    let recorded = "SELECT count(*) FROM watership.resync WHERE gap_from < gap_to \
        AND reason LIKE '%public.a%' AND verdicts = '{table_removed}'";
    assert_eq!(stage.text(recorded).await, "1");
    stage.run(&["status"]).await.expect_code(0).expect_text(&["is back"]);
    relay.stop().await.expect_code(0).expect_text(&["is back", "from_lsn"]);
}

#[tokio::test]
async fn the_backlog_of_a_held_table_that_was_dropped_is_published_and_its_successor_flows() {
    let stage = stage().await;
    insert(&stage, "a", 1).await;
    stage.execute("UPDATE a SET n = 2; DROP TABLE a").await;
    insert(&stage, "b", 3).await;
    let relay = stage.start().await;
    until_lost(&relay, "public.a does not exist").await;
    let expected = [change("public.a/1", 1), change("public.a/1", 2), change("public.b/3", 3)];
    assert_eq!(changes(&stage.settled().await), expected);
    // `init` does without it, too.
    stage.run(&["init", "--admin-url", &stage.database.url]).await.expect_code(0);

    stage.execute("CREATE TABLE a (id int PRIMARY KEY, n int)").await;
    insert(&stage, "a", 4).await;
    stage.run(&["init", "--admin-url", &stage.database.url]).await.expect_code(0);
    // No look at the catalog is needed: the stream shows that it is there.
    insert(&stage, "a", 5).await;
    let arrived = changes(&stage.settled().await);
    assert_eq!(arrived.len(), 4, "{arrived:?}");
    assert_eq!(arrived[2], change("public.a/5", 5));
    until_back(&relay).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn changes_of_a_held_table_under_another_name_are_not_taken_for_its_own() {
    let stage = stage().await;
    let relay = stage.start().await;
    insert(&stage, "a", 1).await;
    stage.settled().await;
    stage.execute("ALTER TABLE a RENAME TO a_old; INSERT INTO a_old VALUES (2, 2)").await;
    insert(&stage, "b", 3).await;
    let expected = [change("public.a/1", 1), change("public.b/3", 3)];
    assert_eq!(changes(&stage.settled().await), expected);
    until_lost(&relay, "public.a does not exist").await;
    // The usual exchange of a table, in one go.
    stage.execute("CREATE TABLE a (LIKE a_old INCLUDING ALL)").await;
    stage.execute("ALTER PUBLICATION watership ADD TABLE a").await;
    insert(&stage, "a", 4).await;
    insert(&stage, "a_old", 5).await;
    let arrived = changes(&stage.settled().await);
    assert_eq!(arrived.len(), 3, "{arrived:?}");
    assert_eq!(arrived[1], change("public.a/4", 4));
    until_back(&relay).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_held_table_that_was_away_while_nobody_looked_is_told_too() {
    let stage = stage().await;
    let relay = stage.start().await;
    insert(&stage, "a", 1).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    stage.execute("ALTER PUBLICATION watership DROP TABLE a").await;
    insert(&stage, "a", 2).await;
    stage.execute("ALTER PUBLICATION watership ADD TABLE a WHERE (id > 2)").await;
    insert(&stage, "a", 3).await;
    let relay = stage.start().await;
    until_back(&relay).await;
    let expected = [change("public.a/1", 1), change("public.a/3", 3)];
    assert_eq!(changes(&stage.settled().await), expected);
    let status = relay.status().await;
    let differs = status["returned_tables"][0]["differs"].to_string();
    assert!(differs.contains("row filter (id > 2) instead of none"), "{differs}");
    relay.stop().await.expect_code(0);
}
