//! The key of a captured table under every replica identity: right `key` and `before`, one lane for
//! each row, or a refusal that says what to alter.

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::support::inbox::Message;
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

/// What a change says of its row: operation, `key`, `before` and `after`.
fn change(message: &Message) -> Value {
    let body = message.json();
    json!([body["op"], body["key"], body["before"], body["after"]])
}

/// In the order of the WAL, because different keys may overtake each other, and each once: what a
/// session has sent and not settled is sent again by the next one.
fn changes(messages: &[Message]) -> Vec<Value> {
    let mut seen = HashSet::new();
    let mut once: Vec<&Message> = messages.iter().filter(|m| seen.insert(m.id())).collect();
    once.sort_by_key(|message| message.text("ws-position"));
    once.into_iter().map(change).collect()
}

async fn stage(sql: &str, tables: &[&str]) -> Stage {
    Stage::new(Setup { sql, tables, ..Setup::default() }).await
}

/// Waits until sessions end because of this.
async fn until_it_says(relay: &Running, text: &str) {
    until(text, async || {
        let error = relay.status().await["last_error"].clone();
        error["error"].to_string().contains(text) || error["hint"].to_string().contains(text)
    })
    .await;
}

/// What makes a table unfit, what is said about it, and what makes it fit again.
const UNFIT: &[(&str, &[&str], &str)] = &[
    (
        "ALTER TABLE plain REPLICA IDENTITY USING INDEX plain_email_key",
        &["plain is an index on email, without column \"id\" of its primary key"],
        "ALTER TABLE \"public\".\"plain\" REPLICA IDENTITY DEFAULT",
    ),
    (
        "ALTER TABLE roots_1 REPLICA IDENTITY USING INDEX roots_1_email_key",
        &["partition public.roots_1 lacks column \"id\""],
        "ALTER TABLE \"public\".\"roots_1\" REPLICA IDENTITY DEFAULT",
    ),
    (
        "ALTER TABLE roots_1 REPLICA IDENTITY NOTHING",
        &["partition public.roots_1 lacks column \"id\""],
        "ALTER TABLE \"public\".\"roots_1\" REPLICA IDENTITY DEFAULT",
    ),
    (
        "ALTER TABLE full_1 REPLICA IDENTITY DEFAULT",
        &["partition public.full_1 is not FULL, but that of its root public.full_roots is FULL"],
        "ALTER TABLE \"public\".\"full_1\" REPLICA IDENTITY FULL",
    ),
];

const FIT: &str = "CREATE TABLE plain (id int PRIMARY KEY, email text NOT NULL UNIQUE); \
    CREATE TABLE roots (id int PRIMARY KEY, email text NOT NULL) PARTITION BY RANGE (id); \
    CREATE TABLE roots_1 PARTITION OF roots (UNIQUE (email)) DEFAULT; \
    CREATE TABLE full_roots (id int PRIMARY KEY, n int) PARTITION BY RANGE (id); \
    CREATE TABLE full_1 PARTITION OF full_roots DEFAULT; \
    ALTER TABLE full_roots REPLICA IDENTITY FULL; ALTER TABLE full_1 REPLICA IDENTITY FULL";

#[tokio::test]
async fn a_table_whose_changes_do_not_name_their_row_is_refused_by_init_check_and_start() {
    let tables = ["public.plain", "public.roots", "public.full_roots"];
    let stage = stage(FIT, &tables).await;
    for (alter, texts, repair) in UNFIT {
        stage.execute(alter).await;
        for (command, arguments) in [("init", &["init"][..]), ("check", &["check"])] {
            let ended = stage.run(arguments).await;
            ended.expect_code(1).expect_text(texts).expect_text(&[repair]);
            assert!(!ended.log.contains("panicked"), "{command}: {}", ended.log);
        }
        stage.spawn().ended().await.expect_code(1).expect_text(texts).expect_text(&[repair]);
        stage.execute(repair).await;
        stage.run(&["init"]).await.expect_code(0);
        stage.run(&["check"]).await.expect_code(0);
    }
    let relay = stage.start().await;
    stage.execute("INSERT INTO plain VALUES (1, 'a')").await;
    assert_eq!(stage.settled().await.len(), 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_key_that_is_not_in_the_stream_is_refused_before_a_publication_is_made() {
    let sql = "CREATE TABLE hashed (tenant int, note text, \
        hash text GENERATED ALWAYS AS (md5(note)) STORED, PRIMARY KEY (tenant, hash)); \
        CREATE TABLE listed (id int PRIMARY KEY, note text); \
        CREATE TABLE late (id int PRIMARY KEY DEFERRABLE)";
    let stage = stage(sql, &[]).await;
    let own = stage.configuration();
    let capturing = |table: &str| own.replacen("tables = []", &format!("tables = [{table:?}]"), 1);
    stage.replace_configuration(&capturing("public.hashed"));
    for command in ["init", "check"] {
        let text = "column \"hash\" of the key of public.hashed is generated and not published";
        stage.run(&[command]).await.expect_code(1).expect_text(&[text]);
    }
    let published = "(SELECT count(*) FROM pg_publication_tables WHERE schemaname = 'public') = 0";
    assert!(stage.holds(published).await);
    stage.replace_configuration(&capturing("public.listed"));
    stage.execute("ALTER PUBLICATION watership ADD TABLE public.listed (note)").await;
    for command in ["init", "check"] {
        let text = "without key column \"id\"";
        stage.run(&[command]).await.expect_code(1).expect_text(&[text]);
    }
    // Postgres itself refuses the application's UPDATE of such a table once it is published.
    stage.execute("ALTER PUBLICATION watership DROP TABLE public.listed").await;
    stage.replace_configuration(&capturing("public.late"));
    let text = "public.late has no replica identity: its primary key is DEFERRABLE";
    stage.run(&["init"]).await.expect_code(1).expect_text(&[text]);
    stage.run(&["init", "--publish-anyway"]).await.expect_code(0).expect_text(&[text]);
    stage.run(&["check"]).await.expect_code(1).expect_text(&["(not DEFERRABLE)"]);
    stage.sql.batch_execute("DELETE FROM late").await.expect_err("without a replica identity");
}

#[tokio::test]
async fn an_index_chosen_while_the_relay_runs_stops_it_until_it_is_taken_back() {
    let sql = "CREATE TABLE plain (id int PRIMARY KEY, email text NOT NULL UNIQUE, n int)";
    let stage = stage(sql, &["public.plain"]).await;
    let relay = stage.start().await;
    stage
        .execute("INSERT INTO plain SELECT g, 'mail ' || g, 0 FROM generate_series(1, 9) AS g")
        .await;
    stage.inbox.count(9).await;
    stage.execute("ALTER TABLE plain REPLICA IDENTITY USING INDEX plain_email_key").await;
    for sql in [
        "UPDATE plain SET n = 1 WHERE id = 1",
        "UPDATE plain SET id = 11 WHERE id = 1",
        "UPDATE plain SET email = 'new' WHERE id = 11",
        "DELETE FROM plain WHERE id = 2",
    ] {
        stage.execute(sql).await;
    }
    until_it_says(&relay, "ALTER TABLE \\\"public\\\".\\\"plain\\\" REPLICA IDENTITY DEFAULT")
        .await;
    stage.execute("ALTER TABLE plain REPLICA IDENTITY DEFAULT").await;
    stage.execute("UPDATE plain SET n = 2 WHERE id = 11").await;
    stage.execute("DELETE FROM plain WHERE id = 3").await;
    let got = stage.settled().await;
    let row = |id: i32, email: &str, n: i32| json!({"id": id, "email": email, "n": n});
    let expected = [
        json!(["update", {"id": 1}, null, row(1, "mail 1", 1)]),
        json!(["update", {"id": 11}, null, row(11, "mail 1", 1)]),
        json!(["update", {"id": 11}, {"email": "mail 1"}, row(11, "new", 1)]),
        // Only the email was written to the WAL.
        json!(["delete", {"email": "mail 2"}, {"email": "mail 2"}, null]),
        json!(["update", {"id": 11}, null, row(11, "new", 2)]),
        json!(["delete", {"id": 3}, {"id": 3}, null]),
    ];
    assert_eq!(changes(&got)[9..], expected);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn an_index_without_a_primary_key_is_the_key() {
    let sql = "CREATE TABLE plain (email text NOT NULL UNIQUE, n int, note text); \
        ALTER TABLE plain REPLICA IDENTITY USING INDEX plain_email_key";
    let stage = stage(sql, &["public.plain"]).await;
    stage.run(&["check"]).await.expect_code(0);
    for sql in [
        "INSERT INTO plain VALUES ('a', 1, NULL)",
        "UPDATE plain SET n = 2",
        "UPDATE plain SET email = 'b'",
        "INSERT INTO plain VALUES ('a', 3, NULL)",
        "UPDATE plain SET email = 'c' WHERE email = 'b'",
        "DELETE FROM plain WHERE n = 2",
    ] {
        stage.execute(sql).await;
    }
    let _relay = stage.start().await;
    let got = stage.settled().await;
    let row = |email: &str, n: i32| json!({"email": email, "n": n, "note": null});
    let expected = [
        json!(["insert", {"email": "a"}, null, row("a", 1)]),
        json!(["update", {"email": "a"}, null, row("a", 2)]),
        json!(["update", {"email": "b"}, {"email": "a"}, row("b", 2)]),
        json!(["insert", {"email": "a"}, null, row("a", 3)]),
        json!(["update", {"email": "c"}, {"email": "b"}, row("c", 2)]),
        json!(["delete", {"email": "c"}, {"email": "c"}, null]),
    ];
    assert_eq!(changes(&got), expected);
    let mut keys: Vec<String> = got.iter().map(|message| message.text("ws-key")).collect();
    keys.sort();
    assert_eq!(keys, ["a", "a", "a", "b", "c", "c"].map(|key| format!("public.plain/{key}")));
}

#[tokio::test]
async fn a_composite_key_is_written_alike_and_in_order_while_the_identity_changes_under_load() {
    const ROUNDS: usize = 60;
    let sql = "CREATE TABLE pairs (a int, b text, n int, PRIMARY KEY (b, a)); \
        CREATE UNIQUE INDEX pairs_wide ON pairs (a, b); \
        INSERT INTO pairs SELECT g, 'x', 0 FROM generate_series(1, 40) AS g";
    let stage = stage(sql, &["public.pairs"]).await;
    let _relay = stage.start().await;
    let identities = ["FULL", "USING INDEX pairs_wide", "DEFAULT"];
    for round in 0..ROUNDS {
        stage.execute("UPDATE pairs SET n = n + 1").await;
        if round % 5 == 4 {
            let identity = identities[round / 5 % identities.len()];
            stage.execute(&format!("ALTER TABLE pairs REPLICA IDENTITY {identity}")).await;
        }
    }
    let got = stage.settled().await;
    let mut last: HashMap<String, i64> = HashMap::new();
    for message in &got {
        let body = message.json();
        let (a, n) = (&body["after"]["a"], body["after"]["n"].as_i64().expect("a number"));
        let text = format!("\"key\":{{\"a\":{a},\"b\":\"x\"}},");
        assert!(message.body.contains(&text), "{}", message.body);
        assert_eq!(message.text("ws-key"), format!("public.pairs/{a}/x"));
        let before = last.insert(message.text("ws-key"), n).unwrap_or(0);
        assert_eq!(before + 1, n, "{}", message.body);
    }
    assert_eq!((last.len(), got.len()), (40, 40 * ROUNDS));
}

#[tokio::test]
async fn a_partition_that_logs_more_than_its_root_changes_nothing_of_what_is_said() {
    let sql = "CREATE TABLE roots (id int PRIMARY KEY, email text NOT NULL, note text) \
        PARTITION BY RANGE (id); \
        CREATE TABLE roots_1 PARTITION OF roots FOR VALUES FROM (0) TO (10); \
        CREATE TABLE roots_2 PARTITION OF roots DEFAULT; \
        ALTER TABLE roots_1 REPLICA IDENTITY FULL";
    let stage = stage(sql, &["public.roots"]).await;
    let said = stage.run(&["check"]).await;
    said.expect_code(0)
        .expect_text(&["partition public.roots_1 and its root differ in replica identity"]);
    for first in [1, 11] {
        for sql in [
            "INSERT INTO roots VALUES ($, 'a', NULL)",
            "UPDATE roots SET email = 'b' WHERE id = $",
            "UPDATE roots SET id = $ + 1 WHERE id = $",
            "DELETE FROM roots WHERE id = $ + 1",
        ] {
            stage.execute(&sql.replace('$', &first.to_string())).await;
        }
    }
    let _relay = stage.start().await;
    let got = stage.settled().await;
    for (place, first) in [(0, 1), (4, 11)] {
        let row = |id: i32, email: &str| json!({"id": id, "email": email, "note": null});
        let expected = [
            json!(["insert", {"id": first}, null, row(first, "a")]),
            json!(["update", {"id": first}, null, row(first, "b")]),
            json!(["update", {"id": first + 1}, {"id": first}, row(first + 1, "b")]),
            json!(["delete", {"id": first + 1}, {"id": first + 1}, null]),
        ];
        assert_eq!(changes(&got)[place..place + 4], expected);
    }
}

#[tokio::test]
async fn a_partition_that_begins_to_log_less_than_its_root_stops_the_relay_and_nothing_is_made_up()
{
    let sql = "CREATE TABLE roots (id int PRIMARY KEY, email text NOT NULL) \
        PARTITION BY RANGE (id); \
        CREATE TABLE roots_1 PARTITION OF roots (UNIQUE (email)) DEFAULT; \
        CREATE TABLE full_roots (id int PRIMARY KEY, n int, m int) PARTITION BY RANGE (id); \
        CREATE TABLE full_1 PARTITION OF full_roots FOR VALUES FROM (0) TO (10); \
        CREATE TABLE full_2 PARTITION OF full_roots DEFAULT; \
        ALTER TABLE full_roots REPLICA IDENTITY FULL; \
        ALTER TABLE full_1 REPLICA IDENTITY FULL; ALTER TABLE full_2 REPLICA IDENTITY FULL";
    let stage = stage(sql, &["public.roots", "public.full_roots"]).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO roots SELECT g, 'm' || g FROM generate_series(1, 3) AS g").await;
    stage.execute("INSERT INTO full_roots SELECT g, g FROM generate_series(1, 13) AS g").await;
    // Two tables one after the other in one record are no root and partition.
    stage.execute("CREATE TABLE other (note text); TRUNCATE full_roots, other").await;
    stage.execute("INSERT INTO full_roots SELECT g, g FROM generate_series(1, 13) AS g").await;
    stage.inbox.count(3 + 13 + 1 + 13).await;
    assert_eq!(relay.status().await["sessions"], 1);
    for sql in [
        "ALTER TABLE full_1 REPLICA IDENTITY DEFAULT",
        "DELETE FROM full_roots WHERE id IN (2, 12)",
        "UPDATE full_roots SET id = 0, n = NULL WHERE id = 3",
        "ALTER TABLE roots_1 REPLICA IDENTITY USING INDEX roots_1_email_key",
        "UPDATE roots SET email = 'x' WHERE id = 1",
        "DELETE FROM roots WHERE id = 2",
    ] {
        stage.execute(sql).await;
    }
    until_it_says(&relay, "REPLICA IDENTITY").await;
    stage.execute("ALTER TABLE full_1 REPLICA IDENTITY FULL").await;
    stage.execute("ALTER TABLE roots_1 REPLICA IDENTITY DEFAULT").await;
    stage.execute("DELETE FROM full_roots WHERE id IN (5, 13)").await;
    stage.execute("DELETE FROM roots WHERE id = 3").await;
    let got = stage.settled().await;
    let key = |id: i32| json!({"id": id});
    let row = |id: i32| json!({"id": id, "n": id, "m": null});
    let expected = [
        json!(["delete", key(2), key(2), null]),
        // What this partition sent is not told apart from what another might have left out.
        json!(["delete", key(12), {"id": 12, "n": 12}, null]),
        json!(["update", key(0), key(3), {"id": 0, "n": null, "m": null}]),
        json!(["update", key(1), {"email": "m1"}, {"id": 1, "email": "x"}]),
        json!(["delete", {"email": "m2"}, {"email": "m2"}, null]),
        json!(["delete", key(5), row(5), null]),
        json!(["delete", key(13), row(13), null]),
        json!(["delete", key(3), key(3), null]),
    ];
    assert_eq!(changes(&got)[30..], expected);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_toasted_key_is_told_when_it_did_not_change() {
    let sql = "CREATE TABLE docs (id text PRIMARY KEY, n int, big text); \
        ALTER TABLE docs ALTER COLUMN id SET STORAGE EXTERNAL; \
        ALTER TABLE docs ALTER COLUMN big SET STORAGE EXTERNAL";
    let stage = stage(sql, &["public.docs"]).await;
    let text = |seed: i32| {
        format!("(SELECT string_agg(md5((g * {seed})::text), '') FROM generate_series(1, 80) AS g)")
    };
    let (one, two) = (stage.text(&text(1)).await, stage.text(&text(2)).await);
    stage.execute(&format!("INSERT INTO docs VALUES ('{one}', 1, repeat('y', 9000))")).await;
    let external = "SELECT pg_column_size(id) > 2000 AND pg_relation_size(reltoastrelid) > 0 \
        FROM docs, pg_class WHERE relname = 'docs'";
    assert!(stage.holds(external).await);
    for (identity, n) in [("DEFAULT", 2), ("FULL", 3)] {
        stage.execute(&format!("ALTER TABLE docs REPLICA IDENTITY {identity}")).await;
        stage.execute(&format!("UPDATE docs SET n = {n}")).await;
    }
    stage.execute("ALTER TABLE docs REPLICA IDENTITY DEFAULT").await;
    stage.execute(&format!("UPDATE docs SET id = '{two}'")).await;
    stage.execute("UPDATE docs SET n = 5").await;
    stage.execute("DELETE FROM docs").await;
    let _relay = stage.start().await;
    let got = stage.settled().await;
    let key = |id: &str| json!({ "id": id });
    let big = "y".repeat(9000);
    let full = |n: i32| json!({"id": one, "n": n, "big": big});
    let expected = [
        json!(["insert", key(&one), null, full(1)]),
        json!(["update", key(&one), null, {"id": one, "n": 2}]),
        json!(["update", key(&one), full(2), full(3)]),
        json!(["update", key(&two), key(&one), {"id": two, "n": 3}]),
        json!(["update", key(&two), null, {"id": two, "n": 5}]),
        json!(["delete", key(&two), key(&two), null]),
    ];
    assert_eq!(changes(&got), expected);
    let unchanged: Vec<Value> = got.iter().map(|m| m.json()["unchanged"].clone()).collect();
    let big = json!(["big"]);
    assert_eq!(unchanged, [Value::Null, big.clone(), Value::Null, big.clone(), big, Value::Null]);
}

#[tokio::test]
async fn a_key_column_renamed_under_full_is_right_before_and_after_whether_the_relay_runs_or_not() {
    let sql = "CREATE TABLE items (n int, id int PRIMARY KEY); \
        ALTER TABLE items REPLICA IDENTITY FULL";
    for runs in [true, false] {
        let stage = stage(sql, &["public.items"]).await;
        let mut relay = Some(stage.start().await);
        stage.execute("INSERT INTO items SELECT 0, g FROM generate_series(1, 50) AS g").await;
        stage.inbox.count(50).await;
        if let Some(relay) = relay.take_if(|_| !runs) {
            relay.stop().await.expect_code(0);
        }
        stage.execute("UPDATE items SET n = 1").await;
        stage.execute("ALTER TABLE items RENAME COLUMN id TO number").await;
        stage.execute("UPDATE items SET n = 2").await;
        stage.execute("UPDATE items SET number = -number WHERE number > 40").await;
        stage
            .execute(
                "BEGIN; UPDATE items SET n = 3; ALTER TABLE items RENAME COLUMN number TO no; \
            UPDATE items SET n = 4; COMMIT",
            )
            .await;
        stage.execute("DELETE FROM items").await;
        let relay = match relay {
            Some(relay) => relay,
            None => stage.start().await,
        };
        let mut got = stage.settled().await;
        relay.stop().await.expect_code(0);
        // A session that ends for the new name may have sent some of it twice.
        let mut seen = HashSet::new();
        got.retain(|message| seen.insert(message.id()));
        assert_eq!(got.len(), 50 + 50 + 50 + 10 + 50 + 50 + 50);
        let mut rows: HashMap<String, Vec<String>> = HashMap::new();
        for message in &got {
            let body = message.json();
            let row = if body["after"].is_null() { &body["before"] } else { &body["after"] };
            let name = ["id", "number", "no"].into_iter().find(|name| row[name].is_i64());
            let name = name.expect("a column of one of these names");
            assert_eq!(body["key"], json!({ name: row[name] }), "{}", message.body);
            let key = row[name].as_i64().expect("a number").abs().to_string();
            let step = format!("{} {} {}", message.text("ws-op"), name, row["n"]);
            rows.entry(key).or_default().push(step);
        }
        let steps = [
            "insert id 0",
            "update id 1",
            "update number 2",
            "update number 3",
            "update no 4",
            "delete no 4",
        ];
        let mut moved = steps.to_vec();
        moved.insert(3, "update number 2");
        for (key, found) in rows {
            let expected =
                if key.parse::<i32>().expect("a number") > 40 { &moved[..] } else { &steps };
            assert_eq!(found, expected, "{key}, runs: {runs}");
        }
    }
}

#[tokio::test]
async fn a_publication_of_inserts_alone_does_not_care_for_the_identity() {
    let sql = "CREATE TABLE plain (id int PRIMARY KEY, email text NOT NULL UNIQUE); \
        ALTER TABLE plain REPLICA IDENTITY USING INDEX plain_email_key";
    let stage = stage(sql, &[]).await;
    stage.execute("ALTER PUBLICATION watership SET (publish = 'insert')").await;
    stage.execute("ALTER PUBLICATION watership ADD TABLE plain").await;
    stage
        .execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots \
        WHERE database = current_database(); DELETE FROM watership.checkpoint",
        )
        .await;
    let own = stage.configuration();
    stage.replace_configuration(&own.replacen("tables = []", "tables = [\"public.plain\"]", 1));
    stage.run(&["init"]).await.expect_code(0);
    let relay = stage.start().await;
    for id in 1..=5 {
        stage.execute(&format!("INSERT INTO plain VALUES ({id}, 'mail {id}')")).await;
        stage.execute(&format!("UPDATE plain SET email = 'x{id}'  WHERE id = {id}")).await;
    }
    let got = stage.settled().await;
    let keys: Vec<Value> = got.iter().map(|message| message.json()["key"].clone()).collect();
    assert_eq!(keys, (1..=5).map(|id| json!({ "id": id })).collect::<Vec<_>>());
    assert_eq!(relay.status().await["sessions"], 1, "no session ended for it");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_primary_key_added_to_a_table_with_full_is_the_key_of_what_comes_after() {
    let sql =
        "CREATE TABLE plain (id int NOT NULL, n int); ALTER TABLE plain REPLICA IDENTITY FULL";
    let stage = stage(sql, &["public.plain"]).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO plain VALUES (1, 1)").await;
    assert_eq!(stage.settled().await[0].json()["key"], json!({}));
    stage.execute("ALTER TABLE plain ADD PRIMARY KEY (id)").await;
    until("another session", async || relay.status().await["sessions"].as_u64() > Some(1)).await;
    stage.execute("UPDATE plain SET n = 2").await;
    let got = stage.settled().await;
    let last = got.last().expect("the update").json();
    assert_eq!((&last["op"], &last["key"]), (&json!("update"), &json!({"id": 1})));
    relay.stop().await.expect_code(0);
}

/// The steps of each row, by key, in the order of arrival.
fn steps(got: &[Message]) -> HashMap<String, Vec<String>> {
    let mut rows: HashMap<String, Vec<String>> = HashMap::new();
    for message in got.iter().filter(|message| message.header("ws-op").is_some()) {
        let body = message.json();
        let step = format!("{} {}", message.text("ws-op"), body["after"]["v"]);
        rows.entry(body["key"]["id"].to_string()).or_default().push(step);
    }
    rows
}

async fn rename(stage: &Stage) {
    stage.execute("ALTER TABLE before RENAME TO now").await;
    let text = stage.configuration().replace("\"public.before\"", "\"public.now\"");
    stage.replace_configuration(&text);
}

#[tokio::test]
async fn a_backlog_of_a_table_that_was_renamed_comes_in_order_under_the_name_it_has_now() {
    let sql = "CREATE TABLE before (id int PRIMARY KEY, v int)";
    let stage = stage(sql, &["public.before"]).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO before SELECT g, 0 FROM generate_series(1, 20) AS g").await;
    stage.inbox.count(20).await;
    relay.stop().await.expect_code(0);
    stage.execute("UPDATE before SET v = 1").await;
    rename(&stage).await;
    stage.execute("UPDATE now SET v = 2").await;
    let route = "[[route]]\nname = \"now\"\ntable = \"public.now\"\nexchange = \"watership\"\n\
        routing_key = \"{table}\"\n\
        [[route]]\nname = \"outbox\"\noutbox = { aggregate_type = \"*\" }\n\
        exchange = \"watership\"\nrouting_key = \"{event_type}\"\n";
    stage.append_to_configuration(route);
    let relay = stage.start().await;
    stage.execute("UPDATE now SET v = 3").await;
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    assert!(stage.holds("NOT EXISTS (SELECT FROM watership.parked)").await);
    for (key, steps) in steps(&got) {
        assert_eq!(steps, ["insert 0", "update 1", "update 2", "update 3"], "{key}");
    }
    let rows = got.iter().filter(|message| message.header("ws-op").is_some());
    let later = rows.filter(|message| message.json()["after"]["v"] != 0);
    assert!(later.clone().all(|message| message.text("ws-source") == "public.now"));
    let name = |v: i32| {
        let mut of = later.clone().filter(move |message| message.json()["after"]["v"] == v);
        of.next().expect("one").json()["source"]["table"].clone()
    };
    assert_eq!((name(1), name(2)), ("before".into(), "now".into()), "as it was called then");
}

#[tokio::test]
async fn nothing_passes_what_was_parked_under_the_former_name_of_a_table() {
    let sql = "CREATE TABLE before (id int PRIMARY KEY, v int, t text)";
    let setup = Setup {
        sql,
        tables: &["public.before"],
        settings: "broker.max_message_size = \"1KiB\"",
        ..Setup::default()
    };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO before VALUES (1, 0, ''), (2, 0, '')").await;
    stage.inbox.count(2).await;
    stage.execute("UPDATE before SET v = 1, t = repeat('x', 2000) WHERE id = 1").await;
    until("it is parked", async || stage.holds("EXISTS (SELECT FROM watership.parked)").await)
        .await;
    relay.stop().await.expect_code(0);
    rename(&stage).await;
    let relay = stage.start().await;
    stage.execute("UPDATE now SET v = 2, t = ''").await;
    stage.execute("UPDATE now SET v = 3").await;
    let rows = stage.settled().await;
    assert_eq!(steps(&rows).get("1").map(Vec::len), Some(1), "the insert, and nothing after it");
    relay.stop().await.expect_code(0);
    let text = stage.configuration().replace("1KiB", "1MiB");
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    stage.run(&["parked", "retry", "--all"]).await.expect_code(0);
    until("all are released", async || {
        stage.holds("NOT EXISTS (SELECT FROM watership.parked WHERE state <> 'released')").await
    })
    .await;
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    let steps = steps(&got);
    assert_eq!(steps["1"], ["insert 0", "update 1", "update 2", "update 3"]);
    assert_eq!(steps["2"], ["insert 0", "update 2", "update 3"]);
}
