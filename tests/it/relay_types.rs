//! Captured tables: what a changed row looks like as JSON, and where it stands in the order.

use serde_json::{Value, json};

use crate::support::inbox::{Message, kinds};
use crate::support::stage::{Setup, Stage};

const ITEMS: &str = "CREATE TABLE public.items (id int PRIMARY KEY, name text, big text)";

async fn items() -> Stage {
    let tables = ["public.items"];
    Stage::new(Setup { sql: ITEMS, tables: &tables, ..Setup::default() }).await
}

/// The parts of a change's body that do not depend on where the server is.
fn change(message: &Message) -> (String, Value, Value, Value) {
    let body = message.json();
    let op = body["op"].as_str().expect("op").to_owned();
    (op, body["key"].clone(), body["before"].clone(), body["after"].clone())
}

#[tokio::test]
async fn insert_update_delete_and_truncate_become_json_with_key_before_and_after() {
    let stage = items().await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'one', NULL)").await;
    stage.execute("UPDATE items SET name = 'uno' WHERE id = 1").await;
    stage.execute("UPDATE items SET id = 2 WHERE id = 1").await;
    stage.execute("DELETE FROM items").await;
    stage.execute("TRUNCATE items").await;
    let got = stage.settled().await;
    let row = |id: i32, name: &str| json!({"id": id, "name": name, "big": null});
    let no = Value::Null;
    let expected = [
        ("insert".into(), json!({"id": 1}), no.clone(), row(1, "one")),
        ("update".into(), json!({"id": 1}), no.clone(), row(1, "uno")),
        // A key change carries the old key.
        ("update".into(), json!({"id": 2}), json!({"id": 1}), row(2, "uno")),
        ("delete".into(), json!({"id": 2}), json!({"id": 2}), no.clone()),
        ("truncate".into(), no.clone(), no.clone(), no.clone()),
    ];
    let changes: Vec<_> = got.iter().map(change).collect();
    assert_eq!(changes, expected);
    let names = ["op", "source", "key", "before", "after", "position", "committed_at"];
    for (message, op) in got.iter().zip(["insert", "update", "update", "delete", "truncate"]) {
        assert_eq!(message.kind(), format!("public.items.{op}"));
        assert_eq!(message.routing_key, format!("public.items.{op}"));
        assert_eq!(message.text("ws-op"), op);
        assert_eq!(message.text("ws-route"), "tables");
        assert_eq!(message.text("ws-source"), "public.items");
        let body = message.json();
        let mut found: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
        found.sort_by_key(|name| names.iter().position(|known| known == name));
        assert_eq!(found, names, "{}", message.body);
        assert_eq!(body["source"]["schema"], "public");
        assert_eq!(body["source"]["table"], "items");
        assert!(body["source"]["xid"].is_u64() && body["source"]["commit_lsn"].is_string());
        assert_eq!(body["position"], message.text("ws-position"));
        let time = body["committed_at"].as_str().unwrap();
        assert!(time.len() == 27 && time.ends_with('Z'), "{time}");
    }
    let keys: Vec<String> = got.iter().map(|m| m.text("ws-key")).collect();
    let key = |id: &str| format!("public.items{id}");
    assert_eq!(keys, [key("/1"), key("/1"), key("/2"), key("/2"), key("")]);
}

#[tokio::test]
async fn an_unchanged_toast_value_is_absent_and_listed() {
    let stage = items().await;
    let _relay = stage.start().await;
    stage.execute("ALTER TABLE items ALTER COLUMN big SET STORAGE EXTERNAL").await;
    stage.execute("INSERT INTO items VALUES (1, 'one', repeat('x', 10000))").await;
    stage.execute("UPDATE items SET name = 'uno'").await;
    stage.execute("UPDATE items SET big = NULL").await;
    let got = stage.settled().await;
    let bodies: Vec<Value> = got.iter().map(Message::json).collect();
    assert_eq!(bodies[0]["after"]["big"].as_str().unwrap().len(), 10_000);
    assert_eq!(bodies[1]["after"], json!({"id": 1, "name": "uno"}));
    assert_eq!(bodies[1]["unchanged"], json!(["big"]));
    assert_eq!(bodies[2]["after"], json!({"id": 1, "name": "uno", "big": null}));
    assert!(bodies[0].get("unchanged").is_none() && bodies[2].get("unchanged").is_none());
}

#[tokio::test]
async fn replica_identity_full_gives_the_whole_row_before_and_the_primary_key_stays_the_key() {
    let stage = items().await;
    stage.execute("ALTER TABLE items REPLICA IDENTITY FULL").await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'one', 'b')").await;
    stage.execute("UPDATE items SET name = 'uno'").await;
    stage.execute("DELETE FROM items").await;
    let got = stage.settled().await;
    let changes: Vec<_> = got.iter().map(change).collect();
    let row = |name: &str| json!({"id": 1, "name": name, "big": "b"});
    let key = || json!({"id": 1});
    assert_eq!(changes[1], ("update".into(), key(), row("one"), row("uno")));
    assert_eq!(changes[2], ("delete".into(), key(), row("uno"), Value::Null));
    assert!(got.iter().all(|m| m.text("ws-key") == "public.items/1"));
}

#[tokio::test]
async fn a_table_without_a_key_has_one_lane_and_an_empty_key() {
    let sql = "CREATE TABLE public.log (line text); ALTER TABLE public.log REPLICA IDENTITY FULL";
    let tables = ["public.log"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO log SELECT n::text FROM generate_series(1, 500) AS n").await;
    stage.execute("DELETE FROM log WHERE line = '7'").await;
    let got = stage.settled().await;
    let lines = got[..500].iter().map(|m| m.json()["after"]["line"].as_str().unwrap().to_owned());
    assert!(lines.eq((1..=500).map(|n| n.to_string())));
    let deleted = change(&got[500]);
    assert_eq!(deleted, ("delete".into(), json!({}), json!({"line": "7"}), Value::Null));
    assert!(got.iter().all(|m| m.text("ws-key") == "public.log"));
}

#[tokio::test]
async fn a_partitioned_table_arrives_as_its_root_with_its_key() {
    let sql = "CREATE TABLE public.parts (region text, id int, PRIMARY KEY (region, id)) \
        PARTITION BY LIST (region); \
        CREATE TABLE public.parts_eu PARTITION OF public.parts FOR VALUES IN ('eu'); \
        CREATE TABLE public.parts_us PARTITION OF public.parts FOR VALUES IN ('us')";
    let tables = ["public.parts"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let told = ["does not publish TRUNCATE of a single partition of public.parts"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    let _relay = stage.start().await;
    stage.execute("INSERT INTO parts VALUES ('eu', 1), ('us', 1)").await;
    stage.execute("DELETE FROM parts WHERE region = 'us'").await;
    let got = stage.settled().await;
    let keys: Vec<String> = got.iter().map(|m| m.text("ws-key")).collect();
    assert_eq!(keys, ["public.parts/eu/1", "public.parts/us/1", "public.parts/us/1"]);
    assert!(got.iter().all(|m| m.text("ws-source") == "public.parts"));
    assert_eq!(change(&got[2]).2, json!({"region": "us", "id": 1}));
}

#[tokio::test]
async fn a_truncate_comes_after_the_rows_before_it_and_before_the_rows_after_it() {
    const ROWS: usize = 300;
    let sql = "CREATE TABLE public.one (id int PRIMARY KEY); \
        CREATE TABLE public.two (id int PRIMARY KEY)";
    let tables = ["public.one", "public.two"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let rows = format!("SELECT n FROM generate_series(1, {ROWS}) AS n");
    stage
        .execute(&format!(
            "BEGIN; INSERT INTO one {rows}; INSERT INTO two {rows}; TRUNCATE one, two; \
             INSERT INTO one {rows}; INSERT INTO two {rows}; COMMIT"
        ))
        .await;
    let _relay = stage.start().await;
    let got = stage.settled().await;
    let mut truncate_ids = Vec::new();
    for table in ["one", "two"] {
        let name = format!("public.{table}");
        let own: Vec<&Message> = got.iter().filter(|m| m.text("ws-source") == name).collect();
        let ops: Vec<String> = own.iter().map(|m| m.text("ws-op")).collect();
        assert_eq!(ops.len(), 2 * ROWS + 1);
        assert_eq!(ops.iter().position(|op| op == "truncate"), Some(ROWS), "{table}");
        truncate_ids.push(own[ROWS].id());
    }
    assert_ne!(truncate_ids[0], truncate_ids[1], "one truncate of two tables is two events");
}

#[tokio::test]
async fn a_table_that_changes_its_columns_is_followed() {
    let stage = items().await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO items VALUES (1, 'a', NULL)").await;
    stage.execute("ALTER TABLE items ADD COLUMN price numeric DEFAULT 1.50").await;
    stage.execute("INSERT INTO items VALUES (2, 'b', NULL)").await;
    stage.execute("ALTER TABLE items DROP COLUMN big").await;
    stage.execute("INSERT INTO items VALUES (3, 'c')").await;
    stage.execute("ALTER TABLE items RENAME COLUMN name TO title").await;
    stage.execute("INSERT INTO items VALUES (4, 'd')").await;
    stage.execute("ALTER TABLE items ALTER COLUMN price TYPE int").await;
    stage
        .execute(
            "BEGIN; INSERT INTO items VALUES (5, 'e'); ALTER TABLE items DROP price; \
                   INSERT INTO items VALUES (6, 'f'); COMMIT",
        )
        .await;
    stage.execute("ALTER TABLE items RENAME COLUMN id TO number").await;
    stage.execute("UPDATE items SET title = 'g' WHERE number = 6").await;
    stage.execute("UPDATE items SET number = 7 WHERE number = 6").await;
    let got = stage.settled().await;
    let rows: Vec<Value> = got.iter().map(|m| m.json()["after"].clone()).collect();
    assert_eq!(
        rows[..6],
        [
            json!({"id": 1, "name": "a", "big": null}),
            json!({"id": 2, "name": "b", "big": null, "price": "1.50"}),
            json!({"id": 3, "name": "c", "price": "1.50"}),
            json!({"id": 4, "title": "d", "price": "1.50"}),
            json!({"id": 5, "title": "e", "price": 2}),
            json!({"id": 6, "title": "f"}),
        ]
    );
    let (six, seven) = (json!({"number": 6}), json!({"number": 7}));
    let row = |n: i32| json!({"number": n, "title": "g"});
    assert_eq!(change(&got[got.len() - 2]), ("update".into(), six.clone(), Value::Null, row(6)));
    assert_eq!(change(&got[got.len() - 1]), ("update".into(), seven, six, row(7)));
}

/// Column, type, SQL value, JSON as text.
pub const VALUES: &[(&str, &str, &str, &str)] = &[
    ("yes", "bool", "true", "true"),
    ("no", "bool", "false", "false"),
    ("small", "int2", "-32768", "-32768"),
    ("mid", "int4", "2147483647", "2147483647"),
    ("large", "int8", "-9223372036854775808", "-9223372036854775808"),
    ("single", "float4", "'1.1'", "1.1"),
    ("double", "float8", "0.1::float8 + 0.2::float8", "0.30000000000000004"),
    ("tiny", "float8", "1e-300", "1e-300"),
    ("nan", "float8", "'NaN'", "\"NaN\""),
    ("inf", "float8", "'-Infinity'", "\"-Infinity\""),
    ("num", "numeric", "12345678901234567890.12300", "\"12345678901234567890.12300\""),
    ("num_nan", "numeric", "'NaN'", "\"NaN\""),
    ("doc", "json", "'{ \"b\":1,  \"a\":1.0 }'", "{ \"b\":1,  \"a\":1.0 }"),
    ("docb", "jsonb", "'{\"b\":1,\"a\":[1.0,null]}'", "{\"a\": [1.0, null], \"b\": 1}"),
    ("bin", "bytea", "'\\x00ff10'", "\"AP8Q\""),
    ("day", "date", "'2024-02-29'", "\"2024-02-29\""),
    ("clock", "time", "'03:04:05.678'", "\"03:04:05.678\""),
    ("zoned", "timetz", "'03:04:05+05:30'", "\"03:04:05+05:30\""),
    ("stamp", "timestamp", "'2024-01-02 03:04:05.123456'", "\"2024-01-02T03:04:05.123456\""),
    ("instant", "timestamptz", "'2024-01-02 03:04:05+02'", "\"2024-01-02T01:04:05Z\""),
    ("ever", "timestamptz", "'infinity'", "\"infinity\""),
    ("span", "interval", "'1 year 2 months 3 days 04:05:06.7'", "\"P1Y2M3DT4H5M6.7S\""),
    (
        "uid",
        "uuid",
        "'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'",
        "\"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11\"",
    ),
    ("ints", "int4[]", "'{1,NULL,3}'", "[1,null,3]"),
    (
        "nested",
        "text[]",
        "'{{a,\"b \\\"q\\\",\"},{NULL,\"NULL\"}}'",
        "[[\"a\",\"b \\\"q\\\",\"],[null,\"NULL\"]]",
    ),
    ("none", "int8[]", "'{}'", "[]"),
    ("flags", "bool[]", "'{t,f}'", "[true,false]"),
    ("days", "date[]", "'{2024-01-02}'", "[\"2024-01-02\"]"),
    ("docs", "jsonb[]", "ARRAY['{\"a\": 1}'::jsonb]", "[{\"a\": 1}]"),
    ("feeling", "mood", "'so so'", "\"so so\""),
    ("positive", "posint", "7", "7"),
    ("words", "text", "E'a \"q\" \\\\ b\\n\\t\u{1f407}'", "\"a \\\"q\\\" \\\\ b\\n\\t\u{1f407}\""),
    ("empty", "text", "''", "\"\""),
    ("nothing", "text", "NULL", "null"),
    ("padded", "char(3)", "'x'", "\"x  \""),
    ("address", "inet", "'10.0.0.1/8'", "\"10.0.0.1/8\""),
    ("range", "int4range", "'[1,5)'", "\"[1,5)\""),
];

#[tokio::test]
async fn every_column_type_arrives_in_its_documented_form() {
    let columns: Vec<String> =
        VALUES.iter().map(|(name, kind, ..)| format!("{name} {kind}")).collect();
    let sql = format!(
        "CREATE TYPE mood AS ENUM ('fine', 'so so'); \
         CREATE DOMAIN posint AS int CHECK (VALUE > 0); \
         CREATE TABLE public.everything (id int8 PRIMARY KEY, {})",
        columns.join(", ")
    );
    let tables = ["public.everything"];
    let stage = Stage::new(Setup { sql: &sql, tables: &tables, ..Setup::default() }).await;
    // The relay's session must not depend on what the database prefers.
    let odd = "ALTER DATABASE \"DB\" SET DateStyle = 'SQL, DMY'; \
        ALTER DATABASE \"DB\" SET IntervalStyle = 'postgres_verbose'; \
        ALTER DATABASE \"DB\" SET TimeZone = 'Asia/Kolkata'; \
        ALTER DATABASE \"DB\" SET extra_float_digits = 0; \
        ALTER DATABASE \"DB\" SET bytea_output = 'escape'";
    stage.execute(&odd.replace("DB", &stage.database.name)).await;
    let _relay = stage.start().await;
    let values: Vec<&str> = VALUES.iter().map(|(_, _, value, _)| *value).collect();
    let insert = format!("INSERT INTO everything VALUES (1, {})", values.join(", "));
    stage.execute(&format!("SET IntervalStyle = 'postgres'; {insert}")).await;
    let bytes = "SELECT watership.emit_bytes('t', '1', 'bytes', '\\x5c00ff'::bytea, NULL)";
    stage.execute(bytes).await;
    let got = stage.settled().await;
    let after = got[0].body.split_once("\"after\":").expect("after").1;
    let fields: Vec<String> =
        VALUES.iter().map(|(name, _, _, json)| format!("\"{name}\":{json}")).collect();
    let expected = format!("{{\"id\":1,{}}},\"position\":", fields.join(","));
    assert!(after.starts_with(&expected), "{after}\nis not\n{expected}");
    got[0].json();
    assert_eq!(kinds(&got)[1], "bytes");
    assert_eq!(got[1].bytes, b"\\\x00\xff");
}
