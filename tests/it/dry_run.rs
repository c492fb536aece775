//! `watership run --dry-run`: prints what would be published, and changes nothing.

use serde_json::Value;

use crate::polling_mapped::{COLUMNS, MAPPED, TABLE, emit};
use crate::sources::POLL;
use crate::support::stage::{Ended, Setup, Stage};
use crate::support::waiting::until;

/// The lines of JSON that a dry run has printed.
fn printed(ended: &Ended) -> Vec<Value> {
    let lines = ended.log.lines().filter(|line| line.starts_with("{\"exchange\""));
    lines.map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect()
}

/// All that a run would change.
async fn state(stage: &Stage) -> String {
    let tables = "SELECT string_agg(row_to_json(c)::text, ',') FROM watership.checkpoint AS c";
    let parked = "SELECT count(*) FROM watership.parked";
    // Not restart_lsn: the server moves that by itself, while anybody reads, to a later place from
    // which everything after confirmed_flush_lsn can be decoded (snapbuild.c).
    let slot = "SELECT confirmed_flush_lsn FROM pg_replication_slots \
        WHERE database = current_database()";
    let canary = "SELECT count(*) FROM watership.canary";
    let described = "SELECT count(*) FROM watership.described";
    let mut all = String::new();
    for sql in [tables, parked, slot, canary, described] {
        all += &stage.text(sql).await;
        all.push('\n');
    }
    all
}

/// Of a relay that polls.
async fn polled_state(stage: &Stage) -> String {
    let tables = "SELECT string_agg(row_to_json(c)::text, ',') FROM watership.checkpoint AS c";
    let batches = "SELECT string_agg(row_to_json(b)::text, ',' ORDER BY number) \
        FROM watership.poll_batch AS b";
    let parked = "SELECT count(*)::text FROM watership.parked";
    let parts = [stage.text(tables).await, stage.text(batches).await, stage.text(parked).await];
    parts.join("\n")
}

async fn stage() -> Stage {
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, name text)";
    let settings = "broker.max_message_size = \"1KiB\"";
    Stage::new(Setup { sql, tables: &["public.items"], settings, ..Setup::default() }).await
}

#[tokio::test]
async fn a_dry_run_prints_what_a_run_then_publishes_and_moves_nothing() {
    let stage = stage().await;
    stage.execute("INSERT INTO items VALUES (1, 'ü'), (2, NULL)").await;
    stage
        .execute("SELECT watership.emit('order', '7', 'placed', '{\"a\": 1}', '{\"n\": 3}')")
        .await;
    stage.execute("SELECT watership.emit_bytes('t', '1', 'bytes', '\\xff00'::bytea, NULL)").await;
    // One that would be parked, and one that would follow it.
    stage.execute("INSERT INTO items VALUES (3, repeat('x', 2000))").await;
    stage.execute("DELETE FROM items WHERE id = 3").await;
    let before = state(&stage).await;
    let dry = stage.run(&["run", "--dry-run", "--until-caught-up"]).await;
    dry.expect_code(0).expect_text(&["would_be_parked=2"]);
    assert_eq!(state(&stage).await, before);
    assert!(stage.settled_now().await.is_empty(), "nothing reached the broker");
    let again = stage.run(&["run", "--dry-run", "--until-caught-up"]).await;
    let (first, second) = (printed(&dry), printed(&again));
    assert_eq!(first, second, "it has consumed nothing");

    let relay = stage.start().await;
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    assert_eq!(got.len(), 4);
    assert_eq!(first.len(), 4);
    for message in &got {
        let line = first.iter().find(|line| line["properties"]["message_id"] == message.id());
        let line = line.unwrap_or_else(|| panic!("{} is not printed: {first:?}", message.id()));
        assert_eq!(line["exchange"], message.exchange);
        assert_eq!(line["routing_key"], message.routing_key);
        assert_eq!(line["properties"]["type"], message.kind());
        assert_eq!(line["properties"]["delivery_mode"], 2);
        assert_eq!(line["headers"]["ws-key"], message.text("ws-key"));
        assert_eq!(line["headers"]["ws-position"], message.text("ws-position"));
        match line.get("body") {
            Some(body) => assert_eq!(body, &message.body),
            None => assert_eq!(line["body_base64"], "/wA="),
        }
    }
}

#[tokio::test]
async fn a_dry_run_ends_at_its_limit_and_says_when_a_relay_has_the_slot() {
    let stage = stage().await;
    stage.execute("INSERT INTO items SELECT n FROM generate_series(1, 3000) AS n").await;
    let limited = stage.run(&["run", "--dry-run", "--limit", "5"]).await;
    limited.expect_code(0);
    assert_eq!(printed(&limited).len(), 5);
    let relay = stage.start().await;
    let busy = stage.run(&["run", "--dry-run", "--limit", "1"]).await;
    busy.expect_code(1).expect_text(&["is in use by pid", "a slot has one reader"]);
    assert_eq!(stage.settled().await.len(), 3000);
    assert_eq!(relay.status().await["sessions"], 1, "the relay has not noticed");
    relay.stop().await.expect_code(0);
    stage.run(&["run", "--limit", "5"]).await.expect_code(2).expect_text(&["--dry-run"]);
}

#[tokio::test]
async fn a_dry_run_of_a_relay_that_polls_prints_what_it_then_publishes_and_stores_nothing() {
    let mapped = format!("{MAPPED}\n{COLUMNS}");
    let insert = |is_mapped: bool, kind: &str| match is_mapped {
        true => emit(kind),
        false => format!("SELECT watership.emit('order', '1', '{kind}', '{{\"a\": 1}}')"),
    };
    for (is_mapped, sql, settings) in [(false, "", POLL), (true, TABLE, &mapped)] {
        let emit = |kind: &str| insert(is_mapped, kind);
        let stage = Stage::new(Setup { sql, settings, ..Setup::default() }).await;
        let nothing = stage.run(&["run", "--dry-run", "--until-caught-up"]).await;
        nothing.expect_code(0).expect_text(&["would_be_parked=0"]);
        for kind in ["one", "two", "three"] {
            stage.execute(&emit(kind)).await;
        }
        let before = polled_state(&stage).await;
        let dry = stage.run(&["run", "--dry-run", "--until-caught-up"]).await;
        dry.expect_code(0).expect_text(&["nothing was changed"]);
        assert_eq!(polled_state(&stage).await, before);
        assert!(stage.settled_now().await.is_empty(), "nothing reached the broker");
        let again = stage.run(&["run", "--dry-run", "--limit", "2"]).await;
        let first = printed(&dry);
        assert_eq!((first.len(), printed(&again).len()), (3, 2));
        let later = async {
            // Its last statement is a look, or the end of one.
            let looks = "EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() \
                AND pid <> pg_backend_pid() \
                AND (query = 'COMMIT' OR query LIKE '%FROM watership.poll%look(%'))";
            until("it polls", async || stage.holds(looks).await).await;
            for _ in 0..3 {
                stage.execute(&emit("later")).await;
            }
        };
        let (following, ()) = tokio::join!(stage.run(&["run", "--dry-run", "--limit", "6"]), later);
        assert_eq!(printed(following.expect_code(0)).len(), 6, "it continues");
        assert_eq!(polled_state(&stage).await, before);

        let relay = stage.start().await;
        let got = stage.inbox.count(6).await;
        for (line, message) in first.iter().zip(&got) {
            assert_eq!(line["properties"]["message_id"], message.id());
            assert_eq!(line["routing_key"], message.routing_key);
            assert_eq!(line["headers"]["ws-key"], message.text("ws-key"));
            assert_eq!(line["body"], message.body);
        }
        // A relay that runs does not stand in the way, and is not disturbed.
        let beside = stage.run(&["run", "--dry-run", "--until-caught-up"]).await;
        beside.expect_code(0);
        assert_eq!(relay.status().await["sessions"], 1);
        relay.stop().await.expect_code(0);
    }
}
