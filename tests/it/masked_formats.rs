//! Column rules with Debezium's format and CloudEvents, and with a contract and templates: what is
//! hidden is seen nowhere, and the contract is about what is sent.

use lapin::types::AMQPValue;
use serde_json::{Value, json};

use crate::column_rules::{TABLE, not_seen, seen};
use crate::parking::until_rows;
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};

const CONTRACT: &str = r#"{"required": ["name", "email"], "properties": {
    "name": {"const": "***"}, "email": {"pattern": "^[0-9a-f]{64}$"}, "ssn": false,
    "note": {"maxLength": 20}}}"#;
const SETTINGS: &str = "log.level = \"trace\"\nrelay.checkpoint_interval = \"20ms\"";

/// A stage whose route has this format, after changes of two keys, one of which violates the
/// contract; and what arrived.
async fn after_changes(format: &str) -> (Stage, Vec<Message>) {
    let directory = watership::dev::home().expect("a temporary directory");
    std::fs::write(directory.join("masked.json"), CONTRACT).expect("a schema");
    let routes = format!(
        "[[route]]\nname = \"customers\"\ntable = \"public.customers\"\n\
         exchange = \"watership\"\ncontract = \"masked.json\"\n\
         headers = {{ who = \"{{column.name}}/{{column.email}}\" }}\n\
         columns = {{ exclude = [\"ssn\"], mask = [\"name\"], hash = [\"email\"] }}\n{format}"
    );
    let sql = format!("{TABLE}; ALTER TABLE customers REPLICA IDENTITY FULL");
    let (tables, settings) = (&["public.customers"], SETTINGS);
    let setup = Setup { sql: &sql, tables, settings, routes: &routes, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    let hidden = "'topsecret-name', 'topsecret-ssn'";
    for (mail, note) in [("mail", "first"), ("other", "first")] {
        let row = format!("INSERT INTO customers VALUES ('topsecret-{mail}', {hidden}, '{note}')");
        stage.execute(&row).await;
    }
    for change in [
        "UPDATE customers SET email = 'topsecret-new' WHERE email = 'topsecret-mail'",
        "UPDATE customers SET note = repeat('x', 21) WHERE email = 'topsecret-new'",
        "DELETE FROM customers WHERE email = 'topsecret-new'",
        "UPDATE customers SET note = 'last' WHERE email = 'topsecret-other'",
    ] {
        stage.execute(change).await;
    }
    until_rows(&stage, &["parked invalid", "parked follows"]).await;
    let mut got = stage.settled().await;
    // Only the messages of one key come in order.
    let part = |m: &Message| m.header("ws-part").and_then(AMQPValue::as_long_long_int);
    got.sort_by_key(|m| (m.text("ws-position"), part(m).unwrap_or(0)));
    let pages = [relay.get("/status").await.1, relay.get("/metrics").await.1];
    let mut all = seen(&stage, &got, &pages).await;
    let ended = relay.stop().await;
    ended.expect_code(0);
    all += &ended.log;
    not_seen(&all);
    assert!(all.contains("contract \"masked.json\" at /note: maxLength"), "the reason is told");
    for message in &got {
        assert_eq!(message.text("ws-rules").len(), 16);
        let (mask, hash) = message
            .text("who")
            .split_once('/')
            .map(|(a, b)| (a.to_owned(), b.len()))
            .expect("both");
        assert_eq!((&*mask, hash), ("***", 64));
    }
    (stage, got)
}

/// A row as it may be sent: the hash of its key, and that all else is as it should be.
fn hash_of(row: &Value) -> String {
    let names: Vec<&String> = row.as_object().expect("a row").keys().collect();
    assert_eq!(names, ["email", "name", "note"]);
    assert_eq!(row["name"], "***");
    row["email"].as_str().expect("a hash").to_owned()
}

#[tokio::test]
async fn debezium_with_masks_and_a_contract() {
    let format = "format = \"debezium\"\ndebezium = { routing_key = \"key\" }\n";
    let (_stage, got) = after_changes(format).await;
    let ops: Vec<Value> = got.iter().map(|message| message.json()["op"].clone()).collect();
    assert_eq!(ops, ["c", "c", "d", "c", "u"]);
    let (mail, other) = (hash_of(&got[0].json()["after"]), hash_of(&got[1].json()["after"]));
    assert_eq!(hash_of(&got[2].json()["before"]), mail);
    let new = hash_of(&got[3].json()["after"]);
    assert!(mail != other && mail != new);
    let key = |hash: &str| json!({ "email": hash }).to_string();
    assert_eq!(got[2].text("__debezium.newkey"), key(&new));
    assert_eq!(got[3].text("__debezium.oldkey"), key(&mail));
    assert_eq!((&got[0].routing_key, &got[3].routing_key), (&key(&mail), &key(&new)));
    assert_eq!(hash_of(&got[4].json()["before"]), other);
    assert_eq!(got[4].json()["after"]["note"], "last");
    assert_eq!(got[3].header("ws-part"), Some(&AMQPValue::LongLongInt(1)));
}

#[tokio::test]
async fn cloudevents_with_masks_templates_and_a_contract() {
    let attributes = "source = \"/{column.name}/{column.email}\", type = \"{column.name}.{op}\"";
    for mode in ["binary", "structured"] {
        let format = format!(
            "format = \"cloudevents\"\ncloudevents = {{ mode = \"{mode}\", {attributes} }}\n"
        );
        let (_stage, got) = after_changes(&format).await;
        assert_eq!(got.len(), 4, "{got:?}");
        for (message, op) in got.iter().zip(["insert", "insert", "update", "update"]) {
            let body = message.json();
            let (data, source, kind, subject) = match mode {
                "binary" => (
                    body,
                    message.text("cloudEvents_source"),
                    message.text("cloudEvents_type"),
                    message.text("cloudEvents_subject"),
                ),
                _ => {
                    let text = |name: &str| body[name].as_str().expect("set").to_owned();
                    (body["data"].clone(), text("source"), text("type"), text("subject"))
                }
            };
            let hash = hash_of(&data["after"]);
            assert_eq!(source, format!("/%2A%2A%2A/{hash}"));
            assert_eq!(kind, format!("***.{op}"));
            assert_eq!(subject, format!("public.customers/{hash}"));
        }
    }
}
