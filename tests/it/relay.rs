//! From the outbox to a queue, with the real program on real servers.

use lapin::types::AMQPValue;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::inbox::{Message, kinds};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// Odd white space, key order, digits that no float holds, and characters of every length.
const ODD: &str = "{ \"z\" : 1,\t\"a\":[1,2 ], \"n\": 12345678901234567890.50,\n \
                   \"\u{e9}\":\"\u{1f407}\\u00e9\", \"z\":2 }";

async fn emit(client: &Client, call: &str) -> String {
    let row = client.query_one(&format!("SELECT watership.{call}"), &[]).await;
    row.unwrap_or_else(|e| panic!("{call}: {e:?}")).get::<_, Uuid>(0).to_string()
}

/// The number that a body `{"n": 7}` holds.
fn number(message: &Message) -> u64 {
    message.json()["n"].as_u64().expect("a number")
}

#[tokio::test]
async fn payloads_arrive_byte_for_byte_with_their_content_type() {
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let call = |payload: &str| format!("emit('order', '1', 'made', {payload})");
    emit(&stage.sql, &call(&format!("$j${ODD}$j$"))).await;
    emit(&stage.sql, &call(&format!("$j${ODD}$j$::json"))).await;
    emit(&stage.sql, &call("$j${\"b\": 1,\"a\":1.10}$j$::jsonb")).await;
    emit(&stage.sql, &call("'null'")).await;
    let bytes = "emit_bytes('order', '1', 'made', '\\x00ff0a5c'::bytea, 'application/x-odd')";
    emit(&stage.sql, bytes).await;
    emit(&stage.sql, "emit_bytes('order', '1', 'made', ''::bytea, NULL)").await;
    let got = stage.inbox.count(6).await;
    let bodies: Vec<&[u8]> = got.iter().map(|message| &*message.bytes).collect();
    let expected: [&[u8]; 6] =
        [ODD.as_bytes(), ODD.as_bytes(), b"{\"a\": 1.10, \"b\": 1}", b"null", b"\x00\xff\n\\", b""];
    assert_eq!(bodies, expected);
    let types: Vec<&str> =
        got.iter().map(|m| m.properties.content_type().as_ref().expect("set").as_str()).collect();
    let json = "application/json";
    assert_eq!(types, [json, json, json, json, "application/x-odd", "application/octet-stream"]);
}

#[tokio::test]
async fn a_message_has_every_property_and_header_that_is_promised() {
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = format!(
        "{{\"text\":\"caf\u{e9}\",\"int\":-42,\"float\":1.5,\"yes\":true,\"none\":null,\
         \"deep\":{{\"a\":[1]}},\"traceparent\":\"{trace}\"}}"
    );
    let before: i64 = stage.text("floor(extract(epoch FROM now()))").await.parse().unwrap();
    let id = emit(&stage.sql, &format!("emit('order', '4/2', 'made', '{{}}', '{headers}')")).await;
    let own = "11111111-2222-4333-8444-555555555555";
    emit(&stage.sql, &format!("emit('order', '4/2', 'paid', '{{}}', NULL, '{own}')")).await;
    let got = stage.inbox.count(2).await;
    let after: i64 = stage.text("floor(extract(epoch FROM now()))").await.parse().unwrap();

    let (first, second) = (&got[0], &got[1]);
    assert_eq!((first.id(), second.id()), (id, own.to_owned()));
    assert_eq!(kinds(&got), ["made", "paid"]);
    assert_eq!((&*first.exchange, &*first.routing_key), ("watership", "order.made"));
    let properties = &first.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.app_id().as_ref().expect("set").as_str(), "shop");
    let timestamp = i64::try_from(properties.timestamp().expect("set")).expect("seconds");
    assert!((before..=after).contains(&timestamp), "{before} {timestamp} {after}");
    for (name, value) in [
        ("ws-route", "outbox"),
        ("ws-key", "order/4/2"),
        ("traceparent", trace),
        ("text", "caf\u{e9}"),
        ("deep", "{\"a\":[1]}"),
    ] {
        assert_eq!(first.text(name), value, "{name}");
    }
    assert_eq!(first.header("int"), Some(&AMQPValue::LongLongInt(-42)));
    assert_eq!(first.text("float"), "1.5");
    assert_eq!(first.header("yes"), Some(&AMQPValue::Boolean(true)));
    assert_eq!(first.header("none"), Some(&AMQPValue::Void));
    for name in ["ws-source", "ws-op"] {
        assert_eq!(first.header(name), None, "{name} is constant for outbox events");
    }
    let Some(AMQPValue::LongLongInt(committed)) = first.header("ws-committed-at") else {
        panic!("ws-committed-at is a number")
    };
    assert!((before..=after).contains(&(committed / 1_000_000)), "{before} {committed} {after}");
    let positions = [first.text("ws-position"), second.text("ws-position")];
    assert!(positions[0] < positions[1], "{positions:?}");
    assert!(positions.iter().all(|p| p.len() == 45 && p.ends_with("-0000000001-00000000")));
}

#[tokio::test]
async fn numbers_in_headers_arrive_exact_whatever_their_size() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let cases = [
        ("9223372036854775807", "9223372036854775807"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("11171330917854890490", "11171330917854890490"),
        ("12345678901234567.89", "12345678901234567.89"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1", "0.1"),
        ("1.50", "1.50"),
        ("1e2", "100"),
        (
            "{\"d\": 12345678901234567.89, \"s\": \"a \\\" b\", \"l\": [1, 2.0]}",
            "{\"d\":12345678901234567.89,\"l\":[1,2.0],\"s\":\"a \\\" b\"}",
        ),
    ];
    for (value, _) in cases {
        emit(&stage.sql, &format!("emit('t', '1', 'e', '{{}}', '{{\"n\": {value}}}')")).await;
    }
    emit(&stage.sql, "emit('t', '1', 'e', '{}', '{\"n\": 1e400}')").await;
    let got = stage.settled().await;
    assert_eq!(got.len(), cases.len() + 1, "none is parked");
    for (message, (_, expected)) in got.iter().zip(cases) {
        let shown = match message.header("n").expect("the header") {
            AMQPValue::LongLongInt(int) => int.to_string(),
            AMQPValue::LongString(text) => text.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(shown, expected);
        let is_int = matches!(message.header("n"), Some(AMQPValue::LongLongInt(_)));
        assert_eq!(is_int, expected.parse::<i64>().is_ok(), "{expected}");
    }
    assert_eq!(got[cases.len()].text("n"), format!("1{}", "0".repeat(400)));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn headers_at_their_limit_fit_beside_the_longest_of_everything_else() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let insert = "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, \
        content_type, traceparent, headers) VALUES (repeat('t', 127), repeat('i', 1024), \
        repeat('e', 127), '1', repeat('c', 255), repeat('p', 255), \
        jsonb_build_object('k', repeat('v', 57337)))";
    stage.execute(insert).await;
    assert_eq!(stage.settled().await.len(), 1, "it is not parked");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn nobody_can_insert_a_reserved_header() {
    let stage = Stage::new(Setup::default()).await;
    for name in ["CC", "BCC", "x-delay", "ws-position"] {
        let sql = format!(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, \
             headers) VALUES ('t', '1', 'e', '{{}}', '{{\"{name}\": \"1\"}}')"
        );
        let error = stage.sql.batch_execute(&sql).await.expect_err(name);
        let text = error.as_db_error().expect("from the server").message();
        assert!(text.contains("reserved names CC, BCC, x-* and ws-*"), "{text}");
    }
}

#[tokio::test]
async fn a_header_that_only_looks_reserved_arrives() {
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let headers = r#"{"X-Request-Id": "7", "Ws-Note": "n", "Cc": "c"}"#;
    stage.execute(&format!("SELECT watership.emit('t', '1', 'e', '{{}}', '{headers}')")).await;
    let got = stage.settled().await;
    let text = |name| got[0].text(name);
    assert_eq!([text("X-Request-Id"), text("Ws-Note"), text("Cc")], ["7", "n", "c"]);
}

#[tokio::test]
async fn what_was_rolled_back_never_arrives_and_released_savepoints_do() {
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let emit = |kind: &str| format!("SELECT watership.emit('t', '1', '{kind}', '{{}}');");
    let [gone, a, b, c, d, e, f] = ["gone", "a", "b", "c", "d", "e", "f"].map(emit);
    stage.execute(&format!("BEGIN; {gone} ROLLBACK")).await;
    stage
        .execute(&format!(
            "BEGIN; {a} SAVEPOINT s; {gone} SAVEPOINT inner_one; {gone} RELEASE inner_one; \
             ROLLBACK TO s; {b} SAVEPOINT t; {c} SAVEPOINT u; {d} RELEASE u; RELEASE t; {e} COMMIT"
        ))
        .await;
    let gone = gone.replace("SELECT", "PERFORM");
    stage
        .execute(&format!(
            "DO $$ BEGIN BEGIN {gone} RAISE EXCEPTION 'no'; EXCEPTION WHEN raise_exception THEN \
             NULL; END; {} END $$",
            f.replace("SELECT", "PERFORM")
        ))
        .await;
    assert_eq!(kinds(&stage.settled().await), ["a", "b", "c", "d", "e", "f"]);
}

/// <https://event-driven.io/en/ordering_in_postgres_outbox/>
#[tokio::test]
async fn museum_m18_interleaved_transactions_arrive_whole_in_commit_order() {
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    let (one, two) = (stage.database.connect().await, stage.database.connect().await);
    let call = |kind: &str| format!("emit('t', '1', '{kind}', '{{}}')");
    one.batch_execute("BEGIN").await.unwrap();
    two.batch_execute("BEGIN").await.unwrap();
    emit(&one, &call("second-1")).await;
    emit(&two, &call("first-1")).await;
    emit(&one, &call("second-2")).await;
    emit(&two, &call("first-2")).await;
    two.batch_execute("COMMIT").await.unwrap();
    emit(&stage.sql, &call("between")).await;
    emit(&one, &call("second-3")).await;
    one.batch_execute("COMMIT").await.unwrap();
    let got = stage.settled().await;
    let expected = ["first-1", "first-2", "between", "second-1", "second-2", "second-3"];
    assert_eq!(kinds(&got), expected);
    let positions: Vec<String> = got.iter().map(|m| m.text("ws-position")).collect();
    assert!(positions.is_sorted_by(|a, b| a < b), "{positions:?}");
}

#[tokio::test]
async fn rows_of_a_copy_that_share_one_lsn_arrive_once_each() {
    const ROWS: u64 = 5_000;
    let stage = Stage::new(Setup::default()).await;
    let _relay = stage.start().await;
    stage
        .execute(&format!(
            "COPY watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
             FROM PROGRAM $p$seq 1 {ROWS} | sed 's/.*/t\\t1\\te\\t{{\"n\":&}}/'$p$"
        ))
        .await;
    let got = stage.settled().await;
    assert!(got.iter().map(number).eq(1..=ROWS), "{} came", got.len());
}

#[tokio::test]
async fn a_transaction_of_100k_rows_streams_through_in_little_memory() {
    const ROWS: u64 = 100_000;
    const KEYS: u64 = 1_000;
    // The program is a debug build; what a release build takes is measured by the benchmark.
    const MOST_KIB: u64 = 60 * 1024;
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let insert = format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 't', (n % {KEYS})::text, 'e', format('{{\"n\":%s,\"pad\":\"%s\"}}', n, \
         repeat('x', 300))::json FROM generate_series(1, {ROWS}) AS n"
    );
    let start = stage.text("pg_current_wal_insert_lsn()").await;
    stage.execute(&insert).await;
    // Progress inside the transaction is stored, and the slot stays at its beginning.
    let inside = format!(
        "(SELECT commit_lsn > '{start}' AND ordinal BETWEEN 1 AND {ROWS} - 1 \
         AND flush_lsn < commit_lsn FROM watership.checkpoint)"
    );
    until("a checkpoint inside the transaction", async || stage.holds(&inside).await).await;
    let got = stage.settled().await;
    assert_eq!(got.len() as u64, ROWS);
    let mut last = vec![0; usize::try_from(KEYS).unwrap()];
    for message in &got {
        let n = number(message);
        let key = usize::try_from(n % KEYS).unwrap();
        assert!(n > last[key], "{n} of key {key} came after {}", last[key]);
        last[key] = n;
    }
    let peak = relay.peak_memory_kib();
    assert!(peak <= MOST_KIB, "{peak} KiB");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn every_partition_arrives_as_the_outbox_even_one_dropped_before_it_was_read() {
    let stage = Stage::new(Setup::default()).await;
    let row = |kind: &str, day: &str| {
        format!(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, \
             created_at) VALUES ('t', '1', '{kind}', '{{}}', '{day}')"
        )
    };
    stage
        .execute(
            "CREATE TABLE watership.outbox_20200101 PARTITION OF watership.outbox \
             FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00')",
        )
        .await;
    stage.execute(&row("dropped", "2020-01-01 12:00+00")).await;
    stage.execute(&row("default", "2019-01-01 12:00+00")).await;
    stage.execute(&row("today", "now")).await;
    stage.execute("ALTER TABLE watership.outbox DETACH PARTITION watership.outbox_20200101").await;
    stage.execute("DROP TABLE watership.outbox_20200101").await;
    stage.execute(&row("later", "now")).await;
    let _relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(kinds(&got), ["dropped", "default", "today", "later"]);
}
