//! What Debezium's outbox event router makes of a table of the application's, with the real program
//! on real servers: its cases D5 to D8 (docs/formats.md).

use lapin::types::AMQPValue;
use serde_json::json;

use crate::parking::{parked, until_rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};

const SQL: &str = "CREATE SCHEMA outboxsmtit; CREATE TABLE outboxsmtit.outbox (\
    id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL, \
    aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb, \
    version int NOT NULL, somebooltype boolean NOT NULL, createdat timestamp(3) NOT NULL, \
    is_deleted boolean DEFAULT false, seq bigint GENERATED ALWAYS AS IDENTITY, \
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()); \
    CREATE INDEX ON outboxsmtit.outbox (xid, seq); CREATE INDEX ON outboxsmtit.outbox (seq)";
const POLL: &str = "source.mode = \"poll\"\noutbox.retained_for = \"1d\"\n\
    outbox.order_by = \"seq\"\noutbox.xid = \"xid\"\n";
const SETTINGS: &str = "outbox.table = \"outboxsmtit.outbox\"\noutbox.profile = \"debezium\"\n\
    outbox.columns = { created_at = \"createdat\" }\nrelay.checkpoint_interval = \"20ms\"";
const PLACEMENT: &str = "routing_key = \"topic\", additional_placement = [\
    \"version:envelope:eventVersion\", \"aggregatetype:envelope:aggregateType\", \
    \"somebooltype:envelope:someBoolType\", \"is_deleted:envelope:deleted\", \
    \"createdat:envelope:at\", \"somebooltype:header\", \"version:header\"]";

fn routes() -> String {
    let route = |name: &str, kind: &str, more: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\noutbox = {{ aggregate_type = \"{kind}\" }}\n\
             exchange = \"watership\"\nformat = \"debezium\"\n\
             debezium = {{ {PLACEMENT}{more} }}\n"
        )
    };
    let tombstones = ", tombstone_on_empty_payload = true";
    let missing = route("missing", "Odd", "").replace("version:envelope", "versoin:envelope");
    [route("kept", "UserEmail", ""), route("gone", "User", tombstones), missing].concat()
}

fn insert(id: &str, kind: &str, payload: &str) -> String {
    format!(
        "INSERT INTO outboxsmtit.outbox VALUES ('{id}', '{kind}', '7bdf2e9e', 'UserUpdated', \
         {payload}, 1, true, '2019-03-24 20:52:59', false)"
    )
}

fn all_features(message: &Message, id: &str, kind: &str) {
    assert_eq!(message.routing_key, format!("outbox.event.{kind}"));
    assert_eq!((message.id(), message.text("id")), (id.to_owned(), id.to_owned()));
    assert_eq!(message.header("somebooltype"), Some(&AMQPValue::Boolean(true)));
    assert_eq!(message.header("version"), Some(&AMQPValue::LongLongInt(1)));
    assert_eq!(message.text("ws-key"), format!("{kind}/7bdf2e9e"));
    assert_eq!(*message.properties.timestamp(), Some(1_553_460_779));
}

#[tokio::test]
async fn further_columns_are_placed_and_a_null_payload_is_null_or_a_tombstone() {
    const D5: &str = "f9171eb6-19f3-4579-9206-0e179d2ebad7";
    const D7: &str = "a9d76f78-bda6-48d3-97ed-13a146163218";
    const D8: &str = "a9d76f78-bda6-48d3-97ed-13a146163219";
    let routes = routes();
    for mode in ["", "source.binary = true\n", POLL] {
        let settings = format!("{mode}{SETTINGS}");
        let setup = Setup { sql: SQL, settings: &settings, routes: &routes, ..Setup::default() };
        let stage = Stage::new(setup).await;
        let relay = stage.start().await;
        stage.execute(&insert(D5, "UserEmail", "'{\"email\": \"gh@mefi.in\"}'")).await;
        stage.execute(&insert(D7, "UserEmail", "NULL")).await;
        stage.execute(&insert(D8, "User", "NULL")).await;
        let got = stage.inbox.count(3).await;
        let of = |id: &str| got.iter().find(|message| message.id() == id).expect("it came");
        let (d5, d7, d8) = (of(D5), of(D7), of(D8));
        let body = |payload| {
            json!({
                "payload": payload, "eventVersion": 1, "aggregateType": "UserEmail",
                "someBoolType": true, "deleted": false, "at": 1_553_460_779_000_i64,
            })
        };
        all_features(d5, D5, "UserEmail");
        assert_eq!(d5.json(), body(json!("{\"email\": \"gh@mefi.in\"}")), "{mode}");
        all_features(d7, D7, "UserEmail");
        assert_eq!(d7.json(), body(json!(null)));
        all_features(d8, D8, "User");
        assert_eq!((&*d8.body, d8.header("ws-tombstone")), ("", Some(&AMQPValue::Boolean(true))));

        // A field that nothing has: parked, with its columns, and sent with a corrected route.
        let id = "da8d6de6-3b77-45ff-8f44-57db55a7a06c";
        stage.execute(&insert(id, "Odd", "'{}'")).await;
        until_rows(&stage, &["parked invalid"]).await;
        let error = stage.text("SELECT error FROM watership.parked").await;
        assert!(error.contains("has no field \"versoin\""), "{error}");
        relay.stop().await.expect_code(0);
        let corrected = stage.configuration().replace("versoin:envelope", "version:envelope");
        stage.replace_configuration(&corrected);
        let relay = stage.start().await;
        parked(&stage, &["retry", "--all"]).await;
        until_rows(&stage, &["released invalid"]).await;
        let got = stage.inbox.count(4).await;
        all_features(&got[3], id, "Odd");
        assert_eq!(got[3].json()["eventVersion"], 1);
        relay.stop().await.expect_code(0);
    }
}
