//! A table that changes and has several routes, one of which parks: only that one waits, with all
//! messages of each event, and a retry keeps the order and what is hidden.

use crate::parking::{parked, rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE TABLE items (id int PRIMARY KEY, n int, note text, secret text)";
const RULES: &str = "columns = { mask = [\"secret\"] }\n";

fn routes() -> String {
    let of = |name: &str, lines: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
             {lines}\n"
        )
    };
    let strict = format!(
        "{RULES}on_drift = \"park\"\nformat = \"debezium\"\n\
         debezium = {{ topic_prefix = \"d\", tombstones = true }}"
    );
    [of("plain", "columns = { exclude = [\"secret\"] }"), of("strict", &strict)].concat()
}

fn of<'a>(messages: &'a [Message], route: &str) -> Vec<&'a Message> {
    messages.iter().filter(|message| message.text("ws-route") == route).collect()
}

#[tokio::test]
async fn only_the_route_that_parks_waits_and_its_messages_come_in_order_and_stay_hidden() {
    let routes = routes();
    let tables = &["public.items"];
    let stage = Stage::new(Setup { sql: TABLE, tables, routes: &routes, ..Setup::default() }).await;
    let relay = stage.start().await;
    let insert = "INSERT INTO items (id, n, secret) VALUES";
    stage.execute(&format!("{insert} (1, 1, 'topsecret'), (2, 1, 'topsecret')")).await;
    stage.execute("ALTER TABLE items DROP COLUMN note").await;
    stage.execute("UPDATE items SET n = 2").await;
    // Two events of Debezium's and a tombstone, and then a delete and its tombstone.
    stage.execute("UPDATE items SET id = 3 WHERE id = 1").await;
    stage.execute("UPDATE items SET n = 3").await;
    stage.execute("DELETE FROM items WHERE id = 3").await;
    let got = stage.settled().await;
    let ops: Vec<String> = of(&got, "plain").iter().map(|m| m.text("ws-op")).collect();
    assert_eq!(ops.len(), 8, "the other route flows: {ops:?}");
    assert_eq!(of(&got, "strict").len(), 2, "what came before");
    let kinds = rows(&stage).await;
    assert_eq!(kinds, vec!["parked drift"; 9]);
    let only = "(SELECT bool_and(route = 'strict' AND rules IS NOT NULL) FROM watership.parked)";
    assert!(stage.holds(only).await);
    let stored = "SELECT string_agg(p::text, ' ') FROM watership.parked AS p";
    assert!(!stage.text(stored).await.contains("topsecret"));

    // Agreed, and with weaker rules by now.
    relay.stop().await.expect_code(0);
    stage.replace_configuration(&stage.configuration().replace(RULES, ""));
    stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("UPDATE items SET n = 4 WHERE id = 2").await;
    stage.execute(&format!("{insert} (4, 1, 'open')")).await;
    until("what comes now follows in its key", async || {
        rows(&stage).await == [vec!["parked drift"; 9], vec!["parked follows"]].concat()
    })
    .await;
    assert_eq!(of(&stage.settled().await, "strict").len(), 3, "another key flows");
    parked(&stage, &["retry", "--route", "strict"]).await;
    until("all are released", async || {
        rows(&stage).await.iter().all(|row| row.starts_with("released "))
    })
    .await;
    let got = stage.settled().await;
    let key = |message: &&&Message| message.text("ws-key");
    let told = |message: &&Message| match message.bytes.is_empty() {
        true => "tombstone".to_owned(),
        false => {
            let body = message.json();
            let body = body.get("payload").unwrap_or(&body);
            format!("{} {}", body["op"].as_str().unwrap_or("?"), body["after"]["n"])
        }
    };
    let strict = of(&got, "strict");
    let of_key = |id: u32| -> Vec<String> {
        let ending = format!("/{id}");
        let messages = strict.iter().filter(|m| key(m).ends_with(&ending));
        messages.map(told).collect()
    };
    assert_eq!(of_key(2), ["c 1", "u 2", "u 3", "u 4"]);
    assert_eq!(of_key(1), ["c 1", "u 2", "d null", "tombstone"]);
    assert_eq!(of_key(3), ["c 2", "u 3", "d null", "tombstone"]);
    assert_eq!(of_key(4), ["c 1"]);
    let parked: Vec<String> =
        strict.iter().map(|m| String::from_utf8_lossy(&m.bytes).into()).collect();
    // The row that followed was stored after the rule was gone.
    let seen: Vec<&String> = parked.iter().filter(|body| body.contains("topsecret")).collect();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen[0].contains("\"n\":4"), "{seen:?}");
    relay.stop().await.expect_code(0);
}
