//! `outbox` and `inbox` in a transaction of sqlx. Needs `--features sqlx,sqlx/runtime-tokio`.

#[path = "support/mod.rs"]
mod support;

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;
use watership::inbox::{self, Message, Received};
use watership::outbox::{self, NewEvent, Payload};
use watership::pg::migrate::{INBOX, OUTBOX};

use support::servers::own_database;

/// A database with both schemas, and a connection of sqlx.
async fn connection() -> PgConnection {
    let database = own_database().await;
    let mut admin = database.connect().await;
    OUTBOX.apply(&mut admin).await.expect("the outbox");
    INBOX.apply(&mut admin).await.expect("the inbox");
    PgConnection::connect(&database.url).await.expect("a connection")
}

/// Since 1970. The tests end on the day on which they began, or shortly after.
fn seconds() -> u64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs()
}

async fn rows(connection: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(connection).await.expect("a count")
}

#[tokio::test]
async fn an_event_exists_when_the_callers_transaction_commits() {
    let mut connection = connection().await;
    let headers = json!({"tenant": 7});
    let id = Uuid::from_u128(42);
    let text = NewEvent {
        headers: Some(&headers),
        id: Some(id),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ..NewEvent::new("order", "1", "paid", Payload::Json("{\"total\": 1.50}"))
    };
    let bytes = Payload::Bytes { data: &[0, 255], content_type: "image/png" };
    let bytes = NewEvent::new("order", "1", "drawn", bytes);
    let mut tx = connection.begin().await.expect("a transaction");
    assert_eq!(outbox::sqlx::emit(&mut tx, &text).await.expect("emitted"), id);
    outbox::sqlx::emit(&mut tx, &bytes).await.expect("emitted");
    tx.rollback().await.expect("rolled back");
    let count = "SELECT count(*) FROM watership.outbox WHERE aggregate_type = 'order'";
    assert_eq!(rows(&mut connection, count).await, 0);
    let mut tx = connection.begin().await.expect("a transaction");
    outbox::sqlx::emit(&mut tx, &text).await.expect("emitted");
    outbox::sqlx::emit(&mut tx, &bytes).await.expect("emitted");
    tx.commit().await.expect("committed");
    assert_eq!(rows(&mut connection, count).await, 2);
    let kept = "SELECT count(*) FROM watership.outbox WHERE payload::text = '{\"total\": 1.50}' \
                AND headers->>'tenant' = '7' AND traceparent IS NOT NULL";
    assert_eq!(rows(&mut connection, kept).await, 1, "byte for byte");
    let wrong = NewEvent { headers: Some(&json!([1])), ..text };
    assert!(outbox::sqlx::emit(&mut connection, &wrong).await.is_err());
}

#[tokio::test]
async fn an_event_without_a_table_is_in_the_wal_when_the_callers_transaction_commits() {
    let mut connection = connection().await;
    for sql in [
        "CREATE PUBLICATION w",
        "SELECT pg_create_logical_replication_slot('sqlx_' || current_database(), 'pgoutput')",
    ] {
        sqlx::query(sql).execute(&mut connection).await.expect("a slot");
    }
    let text = NewEvent::new("order", "1", "paid", Payload::Json("{\"total\": 1.50}"));
    let bytes = Payload::Bytes { data: b"\x00drawn", content_type: "image/png" };
    let bytes = NewEvent::new("order", "1", "drawn", bytes);
    for commits in [false, true] {
        let mut tx = connection.begin().await.expect("a transaction");
        outbox::sqlx::emit_wal(&mut tx, &text).await.expect("emitted");
        outbox::sqlx::emit_wal(&mut tx, &bytes).await.expect("emitted");
        match commits {
            true => tx.commit().await.expect("committed"),
            false => tx.rollback().await.expect("rolled back"),
        }
    }
    let rows_of_it = "SELECT count(*) FROM watership.outbox WHERE aggregate_type = 'order'";
    assert_eq!(rows(&mut connection, rows_of_it).await, 0);
    let messages = "SELECT count(*) FROM pg_logical_slot_get_binary_changes( \
            'sqlx_' || current_database(), NULL, NULL, 'proto_version', '1', \
            'publication_names', 'w', 'messages', 'true') \
        WHERE get_byte(data, 0) = ascii('M')";
    assert_eq!(rows(&mut connection, messages).await, 2);
    let drop = "SELECT pg_drop_replication_slot('sqlx_' || current_database())";
    sqlx::query(drop).execute(&mut connection).await.expect("dropped");
}

#[tokio::test]
async fn a_message_is_claimed_once_in_the_callers_transaction() {
    let mut connection = connection().await;
    let mut tx = connection.begin().await.expect("a transaction");
    assert!(inbox::sqlx::claim(&mut tx, "c", "m1", Some(seconds())).await.expect("claimed"));
    tx.rollback().await.expect("rolled back");
    let mut tx = connection.begin().await.expect("a transaction");
    for (id, at) in [("m1", Some(seconds())), ("m2", None)] {
        assert!(inbox::sqlx::claim(&mut tx, "c", id, at).await.expect("claimed"));
        assert!(!inbox::sqlx::claim(&mut tx, "c", id, at).await.expect("claimed"));
    }
    let many = [("m1", seconds()), ("m3", seconds()), ("m3", seconds())];
    let first = inbox::sqlx::claim_many(&mut tx, "c", &many).await;
    assert_eq!(first.expect("claimed"), ["m3"]);
    tx.commit().await.expect("committed");
    assert!(inbox::sqlx::forget(&mut connection, "c", "m3").await.expect("forgotten"));
    assert!(!inbox::sqlx::forget(&mut connection, "c", "m3").await.expect("not known"));
    let old = inbox::sqlx::claim(&mut connection, "c", "m4", Some(0)).await.expect_err("too old");
    let code = old.as_database_error().and_then(|error| error.code());
    assert_eq!(code.as_deref(), Some("WI001"));
}

#[tokio::test]
async fn a_failed_message_is_parked_and_its_key_waits() {
    let mut connection = connection().await;
    let message = |id: &str| Message::new(id, Some(seconds()), "body").with_key("k");
    let mut tx = connection.begin().await.expect("a transaction");
    let first = inbox::sqlx::receive(&mut tx, "c", &message("m1")).await;
    assert_eq!(first.expect("received"), Received::Handle);
    tx.rollback().await.expect("rolled back");
    let parked = inbox::sqlx::park(&mut connection, "c", &message("m1"), "failed", "why").await;
    assert!(parked.expect("parked"));
    for (id, expected) in [("m1", Received::Duplicate), ("m2", Received::Parked)] {
        let received = inbox::sqlx::receive(&mut connection, "c", &message(id)).await;
        assert_eq!(received.expect("received"), expected);
    }
}
