//! An outbox without a table (`watership.emit_wal`), with the real program on real servers.

use std::collections::HashSet;

use watership::outbox::{NewEvent, Payload, emit_wal};

use crate::support::full;
use crate::support::inbox::{Message, kinds};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

fn content_type(message: &Message) -> &str {
    message.properties.content_type().as_ref().expect("set").as_str()
}

#[tokio::test]
async fn a_message_is_what_emit_would_have_sent() {
    for settings in ["", "source.binary = true"] {
        let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
        let relay = stage.start().await;
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let headers = format!("{{\"n\": 1, \"s\": \"\u{e9}\", \"traceparent\": \"{trace}\"}}");
        let body = "{ \"z\":1.10, \"\u{e9}\" : [1,2 ]}";
        let mut ids = Vec::new();
        for call in ["emit", "emit_wal"] {
            let sql =
                format!("SELECT watership.{call}('order', 42, 'paid', '{body}', '{headers}')");
            ids.push(stage.text(&sql.replace("SELECT ", "")).await);
        }
        for call in ["emit_bytes", "emit_wal_bytes"] {
            let own = "11111111-2222-4333-8444-555555555555";
            let sql = format!(
                "watership.{call}('order', '{own}'::uuid, 'sent', '\\x00ff'::bytea, \
                 'application/x-odd', NULL, gen_random_uuid())"
            );
            ids.push(stage.text(&sql).await);
        }
        let mut got = stage.inbox.count(4).await;
        // Different keys do not wait for each other.
        got.sort_by_key(|message| ids.iter().position(|id| *id == message.id()));
        assert_eq!(got.iter().map(Message::id).collect::<Vec<_>>(), ids);
        for (row, message) in [(&got[0], &got[1]), (&got[2], &got[3])] {
            assert_eq!((&row.bytes, row.kind()), (&message.bytes, message.kind()));
            assert_eq!(row.routing_key, message.routing_key);
            assert_eq!(content_type(row), content_type(message));
            assert_eq!(row.text("ws-key"), message.text("ws-key"));
            let plain = |message: &Message| {
                let headers = message.properties.headers().clone().expect("headers");
                let own = ["ws-position", "ws-committed-at"];
                let mut list: Vec<_> = headers.inner().clone().into_iter().collect();
                list.retain(|(name, _)| !own.contains(&name.as_str()));
                format!("{list:?}")
            };
            assert_eq!(plain(row), plain(message));
        }
        assert_eq!((&*got[1].body, &*got[1].text("traceparent")), (body, trace));
        // The time that belongs to it is when its transaction began.
        stage.execute("BEGIN; SELECT watership.emit_wal('order', '1', 'old', '1')").await;
        let now = stage.text("floor(extract(epoch FROM now()))::bigint").await;
        stage.execute("COMMIT").await;
        let old = stage.inbox.count(5).await.remove(4);
        assert_eq!(old.properties.timestamp().map(|at| at.to_string()), Some(now));
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn what_could_not_be_sent_is_refused_as_the_outbox_refuses_it() {
    let stage = Stage::new(Setup::default()).await;
    for arguments in [
        "'', '1', 'e', '{}'",
        "'t', '', 'e', '{}'",
        "'t', NULL::text, 'e', '{}'",
        "NULL, '1', 'e', '{}'",
        "'t', '1', 'e', NULL::json",
        "'t', '1', 'e', 'no json'",
        "'t', '1', 'e', '{}', '[1]'",
        "'t', '1', 'e', '{}', '{\"CC\": \"x\"}'",
        "'t', '1', 'e', '{}', '{\"ws-x\": 1}'",
        "'t', '1', 'e', '{}', '{\"traceparent\": \"\"}'",
        "repeat('t', 200), '1', repeat('e', 55), '{}'",
        "'t', repeat('1', 1025), 'e', '{}'",
        "'t', '1', 'e', '{}', jsonb_build_object('h', repeat('x', 57400))",
    ] {
        let code = async |call: &str| {
            let sql = format!("SELECT watership.{call}({arguments})");
            let error = stage.sql.simple_query(&sql).await.expect_err(&sql);
            error.code().map(|code| code.code().to_owned())
        };
        assert_eq!(code("emit_wal").await, code("emit").await, "{arguments}");
    }
    let bytes = "SELECT watership.emit_wal_bytes('t', '1', 'e', NULL::bytea, 'x')";
    assert!(stage.sql.simple_query(bytes).await.is_err());
    // An application needs no other right than the role.
    stage
        .execute(
            "SET ROLE watership_app; SELECT watership.emit_wal('t', '1', 'e', '{}'); \
             SELECT watership.emit_wal_bytes('t', 7, 'e', '', 'a/b'); RESET ROLE",
        )
        .await;
}

#[tokio::test]
async fn rows_and_messages_of_one_transaction_arrive_in_the_order_of_its_statements() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let calls: Vec<String> = (0..40)
        .map(|n| {
            let call = if n % 3 == 1 { "emit" } else { "emit_wal" };
            format!("SELECT watership.{call}('order', '1', 'e{n}', '{{}}')")
        })
        .collect();
    stage.execute(&format!("BEGIN; {}; COMMIT", calls.join("; "))).await;
    stage.execute("BEGIN; SELECT watership.emit_wal('order', '1', 'no', '1'); ROLLBACK").await;
    stage
        .execute(
            "BEGIN; SELECT watership.emit_wal('order', '1', 'kept', '1'); SAVEPOINT a; \
             SELECT watership.emit_wal('order', '1', 'no', '1'); ROLLBACK TO a; COMMIT",
        )
        .await;
    let got = stage.settled().await;
    let mut expected: Vec<String> = (0..40).map(|n| format!("e{n}")).collect();
    expected.push("kept".into());
    assert_eq!(kinds(&got), expected);
    let positions: Vec<String> = got.iter().map(|message| message.text("ws-position")).collect();
    assert!(positions.is_sorted() && positions.windows(2).all(|pair| pair[0] != pair[1]));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_relay_killed_in_a_huge_transaction_of_messages_resumes_inside_of_it() {
    // A million takes minutes in a debug build.
    let events: usize = if full() { 1_000_000 } else { 100_000 };
    const WINDOW: usize = 8192;
    let stage = Stage::new(Setup::default()).await;
    stage
        .execute(&format!(
            "SELECT count(watership.emit_wal('order', g % 1000, g::text, '1')) \
             FROM generate_series(1, {events}) AS g"
        ))
        .await;
    let mut most = events;
    let mut relay = stage.start().await;
    for kill in 1..=3 {
        stage.inbox.count(kill * events / 5).await;
        relay.kill();
        let inside = "SELECT ordinal = 0 AND sub > 10000 FROM watership.checkpoint";
        assert!(stage.holds(&format!("({inside})")).await, "it stands inside of the transaction");
        relay = stage.start().await;
        // What was in the window, and what was settled in the interval of a checkpoint.
        most += WINDOW + 16_384;
    }
    let got = stage.settled().await;
    assert!((events..=most).contains(&got.len()), "{} of at most {most}", got.len());
    let mut seen = HashSet::with_capacity(events);
    let mut last = vec![0; 1000];
    let mut ids = HashSet::with_capacity(events);
    for message in &got {
        let number: usize = message.kind().parse().expect("its number");
        if seen.insert(number) {
            let key = number % 1000;
            assert!(number > last[key], "{number} after {}", last[key]);
            last[key] = number;
        }
        ids.insert(message.id());
    }
    assert_eq!((seen.len(), ids.len()), (events, events), "each once, under one id");
    relay.stop().await.expect_code(0);
}

/// The rows of `watership.parked`: state, reason and key.
async fn parked(stage: &Stage) -> String {
    let rows = "SELECT coalesce(string_agg(concat_ws(' ', state, kind, source, key), ', ' \
                ORDER BY mark, ordinal, sub), '') FROM watership.parked";
    stage.text(rows).await
}

#[tokio::test]
async fn an_application_in_rust_needs_no_table() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let mut client = stage.database.connect().await;
    let bytes = Payload::Bytes { data: &[0, 255], content_type: "image/png" };
    let id = uuid::Uuid::from_u128(7);
    for (kind, commits) in [("undone", false), ("drawn", true)] {
        let event = NewEvent { id: Some(id), ..NewEvent::new("order", "1", kind, bytes) };
        let tx = client.transaction().await.expect("a transaction");
        assert_eq!(emit_wal(&tx, &event).await.expect("it is written"), id);
        let other = NewEvent::new("order", "1", "paid", Payload::Json("{\"n\": 1.0}"));
        emit_wal(&tx, &other).await.expect("it is written");
        match commits {
            true => tx.commit().await.expect("committed"),
            false => tx.rollback().await.expect("rolled back"),
        }
    }
    let got = stage.settled().await;
    let told: Vec<_> = got.iter().map(|m| (m.kind(), m.bytes.clone())).collect();
    assert_eq!(told, [("drawn", vec![0, 255]), ("paid", b"{\"n\": 1.0}".to_vec())]);
    assert_eq!(got[0].id(), id.to_string());
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_message_that_is_too_large_is_parked_with_its_key_and_retried() {
    let settings = "broker.max_message_size = \"1KiB\"";
    let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    let body = "\\x00ff".to_owned() + &"ab".repeat(2000);
    stage
        .execute(&format!(
            "BEGIN; SELECT watership.emit_wal_bytes('order', '1', 'large', '{body}', 'a/b'); \
             SELECT watership.emit_wal('order', '1', 'after', '1'); \
             SELECT watership.emit_wal('order', '2', 'other', '1'); COMMIT"
        ))
        .await;
    assert_eq!(kinds(&stage.settled().await), ["other"]);
    let rows =
        "parked too_large watership.emit_wal order/1, parked follows watership.emit_wal order/1";
    assert_eq!(parked(&stage).await, rows);
    let shown = stage.run(&["parked", "show", "1"]).await;
    shown.expect_code(0).expect_text(&["watership.emit_wal", "order/1"]);
    relay.kill();
    stage.replace_configuration(&stage.configuration().replace("1KiB", "1MiB"));
    let relay = stage.start().await;
    stage.run(&["parked", "retry", "--all"]).await.expect_code(0);
    let got = stage.inbox.count(3).await;
    assert_eq!(kinds(&got), ["other", "large", "after"]);
    assert_eq!((got[1].bytes.len(), &got[1].bytes[..3]), (2002, &b"\x00\xff\xab"[..]));
    assert_eq!(content_type(&got[1]), "a/b");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn messages_that_are_no_events_neither_stop_the_relay_nor_vanish_unseen() {
    let settings = "relay.idle_interval = \"1s\"";
    let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    let emit = |transactional: bool, prefix: &str, content: &str| {
        format!("SELECT pg_logical_emit_message({transactional}, '{prefix}', {content})")
    };
    stage.execute(&emit(true, "other", "'\\xff00'::bytea")).await;
    stage.execute(&emit(false, "other", "'text'")).await;
    stage.execute(&emit(false, "watership", "'not in a transaction'")).await;
    // As any role may.
    stage.execute("CREATE ROLE nobody LOGIN; SET ROLE nobody").await;
    stage.execute(&emit(true, "watership", "'{\"id\": 1}'")).await;
    stage.execute(&emit(true, "watership", "'\\x02ff'::bytea")).await;
    let many = "count(pg_logical_emit_message(true, 'watership', 'junk'))";
    stage.execute(&format!("SELECT {many} FROM generate_series(1, 12000)")).await;
    stage.execute("RESET ROLE; DROP ROLE nobody").await;
    stage.execute("SELECT watership.emit_wal('order', '1', 'fine', '{}')").await;
    assert_eq!(kinds(&stage.settled().await), ["fine"]);
    assert_eq!(parked(&stage).await, "");
    let ignored = "watership_messages_ignored_total";
    until("it is counted", async || relay.metric(ignored).await == Some(12003.0)).await;
    let ended = relay.stop().await;
    let told = ["that belong to no transaction are ignored", "emit_wal did not write are ignored"];
    ended.expect_code(0).expect_text(&told);
}

#[tokio::test]
async fn a_transaction_with_only_foreign_messages_is_idle_traffic() {
    let settings = "relay.idle_interval = \"1s\"\nrelay.canary_interval = \"0s\"";
    let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    let written = "watership_checkpoints_total";
    stage.settled().await;
    let before = relay.metric(written).await.expect("a number");
    for _ in 0..200 {
        stage.execute("SELECT pg_logical_emit_message(true, 'other', repeat('x', 1000))").await;
    }
    let at = stage.text("pg_current_wal_insert_lsn()").await;
    until("the slot follows", async || {
        let slot = stage.confirmed_flush().await;
        stage.holds(&format!("'{slot}'::pg_lsn >= '{at}'::pg_lsn")).await
    })
    .await;
    let after = relay.metric(written).await.expect("a number");
    assert!(after - before < 100.0, "{} checkpoints for foreign messages", after - before);
    relay.stop().await.expect_code(0);
}
