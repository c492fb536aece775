//! Data contracts: what violates one is poison, with the place and the reason, and no value.

use crate::support::inbox::kinds;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const PLACED: &str = r#"{"type": "object", "required": ["id"],
    "properties": {"id": {"type": "integer"}}}"#;
const ROW: &str = r#"{"required": ["name", "big"], "properties": {"name": {"maxLength": 5}}}"#;

/// A stage whose routes have contracts; `more` stands in the route of the orders.
async fn stage(more: &str) -> Stage {
    let directory = watership::dev::home().expect("a temporary directory");
    std::fs::write(directory.join("placed.json"), PLACED).expect("a schema");
    std::fs::write(directory.join("row.json"), ROW).expect("a schema");
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, name text, big text); \
        ALTER TABLE public.items ALTER COLUMN big SET STORAGE EXTERNAL";
    let routes = format!(
        "[[route]]\nname = \"orders\"\noutbox = {{ aggregate_type = \"order\" }}\n\
         exchange = \"watership\"\ncontracts = {{ placed = \"placed.json\" }}\n{more}\n\
         [[route]]\nname = \"items\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
         contract = \"row.json\"\n"
    );
    let tables = ["public.items"];
    Stage::new(Setup { sql, tables: &tables, routes: &routes, ..Setup::default() }).await
}

fn emit(key: u32, kind: &str, payload: &str) -> String {
    format!("SELECT watership.emit('order', '{key}', '{kind}', '{payload}')")
}

#[tokio::test]
async fn what_violates_a_contract_is_parked_with_place_and_keyword_and_no_value() {
    let stage = stage("").await;
    let relay = stage.start().await;
    stage.execute(&emit(1, "placed", "{\"id\": 1}")).await;
    stage.execute(&emit(2, "placed", "{\"id\": \"canary-4711\"}")).await;
    stage.execute(&emit(2, "placed", "{\"id\": 2}")).await;
    // Another type has no contract.
    stage.execute(&emit(3, "shipped", "[]")).await;
    stage.execute("INSERT INTO items VALUES (1, 'short', repeat('x', 10000))").await;
    // The large value did not change and is not sent: it counts as there.
    stage.execute("UPDATE items SET name = 'other'").await;
    stage.execute("INSERT INTO items VALUES (2, 'canary-4711', '')").await;
    stage.execute("DELETE FROM items WHERE id = 1").await;
    let parked = "(SELECT count(*) FROM watership.parked) = 3";
    until("three are parked", async || stage.holds(parked).await).await;
    let got = stage.settled().await;
    let mut found = kinds(&got);
    found.sort_unstable();
    let items = ["public.items.delete", "public.items.insert", "public.items.update"];
    assert_eq!(found, [&["placed"], &items[..], &["shipped"]].concat());
    let sql = "SELECT string_agg(error, E'\\n' ORDER BY mark) FROM watership.parked \
               WHERE kind = 'invalid'";
    let errors = stage.text(sql).await;
    assert!(errors.contains("contract \"placed.json\" at /id: type"), "{errors}");
    assert!(errors.contains("contract \"row.json\" at /name: maxLength"), "{errors}");
    let ended = relay.stop().await;
    ended.expect_code(0);
    for text in [&errors, &ended.log] {
        assert!(!text.contains("canary-4711"), "{text}");
    }
}

#[tokio::test]
async fn a_violation_follows_the_policy_of_its_route() {
    let stage = stage("on_poison = \"stop\"").await;
    let relay = stage.start().await;
    stage.execute(&emit(1, "placed", "{}")).await;
    relay.ended().await.expect_code(3).expect_text(&["\"id\" is missing", "placed.json"]);
}

#[tokio::test]
async fn check_tries_the_outbox_against_the_contracts() {
    let stage = stage("").await;
    for key in 0..250 {
        stage.execute(&emit(key, "placed", &format!("{{\"id\": {key}}}"))).await;
    }
    stage.execute(&emit(7, "shipped", "{}")).await;
    let kept = ["route \"orders\": 250 rows of the outbox satisfy its contracts"];
    stage.run(&["check", "--contracts"]).await.expect_code(0).expect_text(&kept);
    stage.execute(&emit(8, "placed", "{\"id\": \"canary-4711\"}")).await;
    let wrong = ["1 of 251 rows of the outbox violate its contracts", "at /id: type"];
    let ended = stage.run(&["check", "--contracts"]).await;
    ended.expect_code(1).expect_text(&wrong);
    assert!(!ended.log.contains("canary-4711"), "{}", ended.log);
}

#[tokio::test]
async fn a_schema_that_is_missing_or_wrong_is_an_error_of_the_configuration() {
    let stage = stage("").await;
    let configuration = stage.configuration();
    let directory = watership::dev::home().expect("a temporary directory");
    let path = directory.join("wrong.json");
    for (schema, text) in [
        (None, "cannot be read"),
        (Some("{"), "it is not JSON"),
        (Some(r#"{"type": 5}"#), "at /type"),
        (Some(r#"{"$ref": "https://example.com/x.json"}"#), "schemas must be self-contained"),
    ] {
        if let Some(schema) = schema {
            std::fs::write(&path, schema).expect("a schema");
        }
        stage.replace_configuration(&configuration.replace("row.json", "wrong.json"));
        let told = ["route \"items\": contract", "wrong.json", text];
        stage.run(&["check"]).await.expect_code(2).expect_text(&told);
    }
}
