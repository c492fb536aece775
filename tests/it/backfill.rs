//! Backfills: the rows that a table has already, between its live changes, on real servers.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};

use crate::support::full;
use crate::support::inbox::Message;
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::{Patience, until};

/// A consumer's view of one table, made of messages by first arrival.
#[derive(Debug, Default)]
pub struct Replica {
    /// Rows by the text of their key.
    pub rows: BTreeMap<String, Value>,
    /// How often each id came.
    pub ids: HashMap<String, u32>,
    /// Positions by key, in order of first arrival.
    pub positions: HashMap<String, Vec<String>>,
}

impl Replica {
    pub fn of<'a>(messages: impl IntoIterator<Item = &'a Message>) -> Self {
        let mut replica = Self::default();
        for message in messages {
            replica.take(message);
        }
        replica
    }

    fn take(&mut self, message: &Message) {
        let seen = self.ids.entry(message.id()).or_default();
        *seen += 1;
        if *seen > 1 {
            return;
        }
        let body = message.json();
        let text = |key: &Value| key.to_string();
        let (key, op) = (text(&body["key"]), body["op"].as_str().expect("an op"));
        self.positions.entry(key.clone()).or_default().push(message.text("ws-position"));
        match op {
            "insert" | "read" => {
                self.rows.insert(key, body["after"].clone());
            }
            "update" => {
                // The replica identity may have more columns than the key.
                let old = body["before"].as_object().map_or(key.clone(), |before| {
                    let mut old = body["key"].clone();
                    for (column, value) in old.as_object_mut().expect("a key") {
                        value.clone_from(before.get(column).unwrap_or(&Value::Null));
                    }
                    text(&old)
                });
                let mut row = self.rows.remove(&old).unwrap_or_else(|| json!({}));
                for (column, value) in body["after"].as_object().expect("a row") {
                    row[column] = value.clone();
                }
                self.rows.insert(key, row);
            }
            "delete" => drop(self.rows.remove(&key)),
            "truncate" => self.rows.clear(),
            other => panic!("{other}"),
        }
    }

    /// Fails unless the messages of each key came in the order of their positions.
    pub fn is_ordered(&self) {
        for (key, positions) in &self.positions {
            assert!(positions.is_sorted(), "{key}: {positions:?}");
        }
    }
}

pub fn reads(messages: &[Message]) -> Vec<&Message> {
    messages.iter().filter(|message| message.text("ws-op") == "read").collect()
}

/// Runs a backfill to its end.
pub async fn backfill(stage: &Stage, arguments: &[&str]) {
    let all: Vec<&str> = ["backfill"].iter().chain(arguments).copied().collect();
    stage.run(&all).await.expect_code(0);
}

/// What the table of runs says of the last run of a table.
pub async fn state(stage: &Stage, table: &str) -> String {
    let last = format!(
        "SELECT concat_ws(': ', state, coalesce(error, waits)) FROM watership.backfill \
         WHERE table_name = '{table}' ORDER BY requested_at DESC LIMIT 1"
    );
    stage.text(&format!("coalesce(({last}), '')")).await
}

pub async fn until_state(stage: &Stage, table: &str, wanted: &str) {
    let what = format!("the backfill of {table} is {wanted}");
    let mut patience = Patience::new();
    loop {
        let now = state(stage, table).await;
        if now.starts_with(wanted) {
            return;
        }
        let over = now.starts_with("failed") || now.starts_with("done");
        assert!(!over, "{what}: it is {now}");
        // On a busy machine a chunk may be read again and again, with fewer rows.
        patience.more((rows_read(stage, table).await, now), || what.clone()).await;
    }
}

async fn rows_read(stage: &Stage, table: &str) -> u64 {
    let sql = format!("SELECT max(rows_read) FROM watership.backfill WHERE table_name = '{table}'");
    stage.text(&format!("coalesce(({sql}), 0)")).await.parse().expect("a number")
}

/// The table as JSON rows of text by key.
async fn table(stage: &Stage, sql: &str) -> BTreeMap<String, Value> {
    let rows = stage.sql.query(sql, &[]).await.expect("the rows");
    rows.iter().map(|row| (row.get::<_, Value>(0).to_string(), row.get(1))).collect()
}

/// One table for each type of key; `{k}` is an expression over `g` that makes keys of it.
const KEYS: [(&str, &str, &str); 13] = [
    ("small", "smallint", "(g - 20)::smallint"),
    ("big", "bigint", "g * 1000000007::bigint"),
    ("uid", "uuid", "md5(g::text)::uuid"),
    ("icu", "text COLLATE \"und-x-icu\"", "(ARRAY['a','B','c','Ä','é','_'])[g % 6 + 1] || g"),
    ("c", "text COLLATE \"C\"", "(ARRAY['a','B','c','Ä','é','_'])[g % 6 + 1] || g"),
    ("plain", "varchar(20)", "E'q''uo\\\\te\\t' || g"),
    ("padded", "char(8)", "'p' || g"),
    ("mood", "mood", "('m' || g % 40)::mood"),
    ("num", "numeric", "CASE g WHEN 7 THEN 'NaN' ELSE ((g - 20) * 1.50)::text END::numeric"),
    ("bin", "bytea", "decode(md5(g::text), 'hex')"),
    ("time", "timestamptz", "timestamptz '2000-01-01' + g * interval '1001 us'"),
    ("own", "positive", "g"),
    ("real", "double precision", "g / 3.0::float8"),
];

#[tokio::test]
async fn keys_of_every_type_are_read_whole_and_rows_look_as_the_stream_has_them() {
    let moods: Vec<String> = (0..40).rev().map(|n| format!("'m{n}'")).collect();
    let mut sql = format!(
        "CREATE TYPE mood AS ENUM ({}); CREATE DOMAIN positive AS int CHECK (VALUE > 0);",
        moods.join(",")
    );
    for (name, of, _) in KEYS {
        sql += &format!("CREATE TABLE k_{name} (note text, k {of} PRIMARY KEY);");
    }
    sql += "CREATE TABLE k_two (b int, a text COLLATE \"und-x-icu\", note text, \
        PRIMARY KEY (a, b));";
    let mut tables: Vec<String> =
        KEYS.iter().map(|(name, ..)| format!("public.k_{name}")).collect();
    tables.push("public.k_two".into());
    let names: Vec<&str> = tables.iter().map(String::as_str).collect();
    let settings = "backfill.chunk_rows = 7";
    let stage = Stage::new(Setup { sql: &sql, tables: &names, settings, ..Setup::default() }).await;
    for (name, _, key) in KEYS {
        let rows = format!("SELECT 'tab\t' || g, {key} FROM generate_series(1, 40) AS g");
        stage.execute(&format!("INSERT INTO k_{name} {rows}")).await;
    }
    stage
        .execute(
            "INSERT INTO k_two SELECT g % 7, chr(65 + g % 5) || g / 7, NULL \
            FROM generate_series(1, 40) AS g",
        )
        .await;
    let _relay = stage.start().await;
    for table in &tables {
        backfill(&stage, &[table, "--detach"]).await;
    }
    for table in &tables {
        until_state(&stage, table, "done").await;
    }
    let messages = stage.settled().await;
    let after = |op: &str, table: &str| {
        let of = |m: &&Message| m.text("ws-op") == op && m.text("ws-source") == table;
        let found = messages.iter().filter(of);
        let row = |m: &Message| {
            let body = m.json();
            (body["key"].to_string(), body["after"].clone())
        };
        found.map(row).collect::<Vec<_>>()
    };
    for table in &tables {
        let read = after("read", table);
        assert_eq!(read.len(), 40, "{table}");
        let inserted: BTreeMap<_, _> = after("insert", table).into_iter().collect();
        let read: BTreeMap<_, _> = read.into_iter().collect();
        assert_eq!(read, inserted, "{table}");
    }
}

#[tokio::test]
async fn a_row_of_a_backfill_says_so_and_has_its_id_in_its_run_only() {
    let sql = "CREATE TABLE t (id int PRIMARY KEY, note text); INSERT INTO t VALUES (7, 'x')";
    let tables = ["public.t"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.t"]).await;
    backfill(&stage, &["public.t"]).await;
    let got = stage.settled().await;
    let [first, second] = &got[..] else { panic!("{got:?}") };
    let body = first.json();
    assert_eq!((&body["op"], &body["key"]), (&json!("read"), &json!({"id": 7})));
    assert_eq!((&body["before"], &body["after"]), (&Value::Null, &json!({"id": 7, "note": "x"})));
    assert_eq!(first.routing_key, "public.t.read");
    assert_ne!(first.id(), second.id());
    assert_ne!(first.text("ws-backfill"), second.text("ws-backfill"));
    let runs = "SELECT array_agg(run::text ORDER BY requested_at) FROM watership.backfill";
    let runs: Vec<String> = stage.sql.query_one(runs, &[]).await.expect("the runs").get(0);
    assert_eq!([first.text("ws-backfill"), second.text("ws-backfill")], runs[..]);
    assert!(first.text("ws-position") < second.text("ws-position"));
}

#[tokio::test]
async fn a_value_that_a_live_change_did_not_touch_is_not_lost() {
    let sql = "CREATE TABLE t (id int PRIMARY KEY, n int, big text); \
        ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
        INSERT INTO t SELECT g, 0, repeat(md5(g::text), 100) FROM generate_series(1, 400) AS g";
    let tables = ["public.t"];
    let settings = "backfill.chunk_rows = 50\nbackfill.max_unconfirmed = 8";
    let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    let mut n = 0;
    while !state(&stage, "public.t").await.starts_with("done") {
        n += 1;
        stage.execute(&format!("UPDATE t SET n = {n} WHERE id = {n} * 7 % 400 + 1")).await;
    }
    let messages = stage.settled().await;
    let replica = Replica::of(&messages);
    replica.is_ordered();
    let rows = "SELECT json_build_object('id', id)::jsonb, to_jsonb(t) FROM t";
    assert_eq!(replica.rows, table(&stage, rows).await);
    let unchanged = messages.iter().filter(|m| m.json().get("unchanged").is_some()).count();
    assert!(unchanged > 0, "no update left a value out, so nothing was tested");
}

#[tokio::test]
async fn a_row_whose_live_change_a_filter_drops_is_sent_all_the_same() {
    let sql = "CREATE TABLE t (id int PRIMARY KEY, n int); \
        INSERT INTO t SELECT g, 0 FROM generate_series(1, 400) AS g";
    let route = |name: &str, filter: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\ntable = \"public.t\"\nexchange = \"watership\"\n\
             routing_key = \"{name}\"\n{filter}\n"
        )
    };
    let filtered = route("some", "filter = \"op != 'update' and op != 'delete'\"");
    for routes in [filtered.clone(), filtered + &route("all", "")] {
        let settings = "backfill.chunk_rows = 50\nbackfill.max_unconfirmed = 8";
        let setup = Setup { sql, tables: &["public.t"], settings, routes: &routes, source_url: "" };
        let stage = Stage::new(setup).await;
        let relay = stage.start().await;
        backfill(&stage, &["public.t", "--detach"]).await;
        let mut n = 0;
        while !state(&stage, "public.t").await.starts_with("done") {
            n += 1;
            // Rows that are read next.
            let next = rows_read(&stage, "public.t").await;
            let wanted = format!("id > {next} AND id <= {next} + 50 AND id % 10 = {n} % 10");
            stage.execute(&format!("UPDATE t SET n = {n} WHERE {wanted}")).await;
        }
        assert!(n > 1, "nothing was changed meanwhile, so nothing was tested");
        let got = stage.settled().await;
        let of = |name: &str| -> Vec<&Message> {
            got.iter().filter(|message| message.text("ws-route") == name).collect()
        };
        let some: HashSet<String> = of("some").iter().map(|m| m.text("ws-key")).collect();
        assert_eq!(some.len(), 400, "each row was sent");
        let all = Replica::of(of("all"));
        all.is_ordered();
        if routes.contains("\"all\"") {
            let rows = "SELECT json_build_object('id', id)::jsonb, to_jsonb(t) FROM t";
            assert_eq!(all.rows, table(&stage, rows).await);
        }
        relay.stop().await.expect_code(0);
    }
}

/// One row in ten has a value that is stored out of line.
fn busy(rows: u64) -> String {
    format!(
        "CREATE TABLE t (id int PRIMARY KEY, n int, big text); \
         ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
         INSERT INTO t SELECT g, 0, repeat(md5(g::text), CASE g % 10 WHEN 0 THEN 80 ELSE 2 END) \
         FROM generate_series(1, {rows}) AS g"
    )
}

/// In the long check with a million rows, as fast as they come.
#[tokio::test]
async fn after_kill_9_under_writes_the_table_is_whole_and_one_chunk_at_most_came_twice() {
    let (rows, chunk, rate) = if full() { (1_000_000, 5_000, 0) } else { (6_000, 300, 3_000) };
    let (tables, sql) = (["public.t"], busy(rows));
    let settings = format!("backfill.chunk_rows = {chunk}\nbackfill.max_rate = {rate}");
    let setup = Setup { sql: &sql, tables: &tables, settings: &settings, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let mut relay = Some(stage.start().await);
    backfill(&stage, &["public.t", "--detach"]).await;
    let (mut n, mut kills) = (0, 0);
    while !state(&stage, "public.t").await.starts_with("done") {
        n += 1;
        let (a, b) = (n * 37 % rows, n * 91 % rows);
        stage
            .execute(&format!(
                "UPDATE t SET n = {n} WHERE id IN ({a}, {b}); DELETE FROM t WHERE id = {a} + 1; \
                 INSERT INTO t VALUES ({a} + 1, {n}, 'new'), ({rows} + {n}, {n}, 'new'); \
                 UPDATE t SET id = 10000000 + {n} WHERE id = {b} + 2; \
                 UPDATE t SET id = -{n} WHERE id = {b} + 4"
            ))
            .await;
        if rows_read(&stage, "public.t").await > [rows / 6, rows / 2, u64::MAX][kills] {
            relay.take().expect("it runs").kill();
            kills += 1;
            relay = Some(stage.start().await);
        }
    }
    assert_eq!(kills, 2, "the backfill was over before it could be killed");
    let messages = stage.settled().await;
    let replica = Replica::of(&messages);
    replica.is_ordered();
    let now = "SELECT json_build_object('id', id)::jsonb, to_jsonb(t) FROM t";
    // Not with assert_eq, which would print a million rows.
    assert!(replica.rows == table(&stage, now).await, "another table than {now}");
    let mut again: HashMap<String, usize> = HashMap::new();
    for message in reads(&messages) {
        *again.entry(message.id()).or_default() += 1;
    }
    let repeated: usize = again.values().map(|times| times - 1).sum();
    assert!(repeated <= chunk * kills, "{repeated} rows came again");
    assert!(reads(&messages).len() as u64 > rows / 2, "almost all was left out");
}

const TWO: &str = "CREATE TABLE a (id int PRIMARY KEY, n int); \
    CREATE TABLE b (id int PRIMARY KEY, n int); \
    INSERT INTO a SELECT g, 0 FROM generate_series(1, 600) AS g; \
    INSERT INTO b SELECT g, 0 FROM generate_series(1, 600) AS g";

async fn two(settings: &str) -> (Stage, Running) {
    let tables = ["public.a", "public.b"];
    let stage = Stage::new(Setup { sql: TWO, tables: &tables, settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    (stage, relay)
}

fn keys(messages: &[Message], table: &str) -> HashSet<i64> {
    let of = reads(messages).into_iter().filter(|m| m.text("ws-source") == table);
    of.map(|m| m.json()["key"]["id"].as_i64().expect("a key")).collect()
}

#[tokio::test]
async fn a_truncate_or_an_alter_ends_the_run_of_its_table_with_the_reason_and_the_other_goes_on() {
    let (stage, relay) = two("backfill.chunk_rows = 20\nbackfill.max_rate = 40").await;
    for (sql, reason) in [
        ("TRUNCATE a", "failed: the table was truncated"),
        ("ALTER TABLE a ADD COLUMN note text", "failed: public.a was altered"),
        ("ALTER TABLE a RENAME TO c; ALTER TABLE c RENAME TO a", ""),
    ] {
        stage
            .execute("DELETE FROM a; INSERT INTO a SELECT g, 1 FROM generate_series(1, 600) AS g")
            .await;
        backfill(&stage, &["public.a", "--detach"]).await;
        until("it has begun", async || rows_read(&stage, "public.a").await > 0).await;
        stage.execute(sql).await;
        if reason.is_empty() {
            stage.run(&["backfill", "cancel", "--all"]).await.expect_code(0);
            until_state(&stage, "public.a", "cancelled").await;
            continue;
        }
        backfill(&stage, &["public.b", "--detach"]).await;
        until_state(&stage, "public.a", reason).await;
        until("the other continues", async || rows_read(&stage, "public.b").await > 0).await;
        let failed = relay.metric("watership_backfill_failed_total{table=\"public.a\"}").await;
        assert!(failed.is_some_and(|failed| failed > 0.0), "{failed:?}");
        stage.run(&["backfill", "cancel", "public.b"]).await.expect_code(0);
        stage.execute("DELETE FROM watership.backfill").await;
    }
}

#[tokio::test]
async fn a_backfill_is_paused_resumed_listed_and_cancelled() {
    let (stage, relay) = two("backfill.chunk_rows = 20\nbackfill.max_rate = 40").await;
    backfill(&stage, &["public.a", "--detach"]).await;
    let again = stage.run(&["backfill", "public.a"]).await;
    again.expect_code(1).expect_text(&["a backfill of public.a has not ended"]);
    until("it has begun", async || rows_read(&stage, "public.a").await > 0).await;
    stage.run(&["backfill", "pause", "public.a"]).await.expect_code(0);
    let running = "watership_backfill_running{table=\"public.a\"}";
    until("it is paused", async || relay.metric(running).await == Some(0.0)).await;
    let then = rows_read(&stage, "public.a").await;
    stage.settled().await;
    assert_eq!(rows_read(&stage, "public.a").await, then);
    let list = stage.run(&["backfill", "list", "--json"]).await;
    list.expect_code(0).expect_text(&["\"state\": \"paused\"", "\"table\": \"public.a\""]);
    stage.run(&["backfill", "resume", "public.a"]).await.expect_code(0);
    until("it continues", async || rows_read(&stage, "public.a").await > then).await;
    stage.run(&["backfill", "cancel", "public.a"]).await.expect_code(0);
    until("it has ended", async || relay.metric(running).await == Some(0.0)).await;
    let then = rows_read(&stage, "public.a").await;
    let sent = keys(&stage.settled().await, "public.a").len();
    assert!(then < 600 && sent < 600, "{then} were read, {sent} sent");
    let none = stage.run(&["backfill", "resume", "public.a"]).await;
    none.expect_code(1).expect_text(&["public.a: no open backfill matches"]);
}

#[tokio::test]
async fn the_snapshot_of_a_table_is_taken_once_and_two_tables_come_side_by_side() {
    let tables = ["public.a", "public.b"];
    let stage = Stage::new(Setup { sql: TWO, tables: &tables, ..Setup::default() }).await;
    let text = stage.configuration();
    let plain = "source.tables = [\"public.a\", \"public.b\"]";
    assert!(text.contains(plain), "{text}");
    let initial = "source.tables = [{ name = \"public.a\", snapshot = \"initial\" }, \
        { name = \"public.b\", snapshot = \"initial\" }]";
    stage.replace_configuration(&text.replace(plain, initial));
    stage.run(&["check"]).await.expect_text(&["public.a can be read for its snapshot"]);
    for _ in 0..2 {
        let relay = stage.start().await;
        until_state(&stage, "public.a", "done").await;
        until_state(&stage, "public.b", "done").await;
        relay.stop().await.expect_code(0);
    }
    let got = stage.settled_now().await;
    assert_eq!(got.len(), 1200);
    let all: HashSet<i64> = (1..=600).collect();
    assert_eq!((keys(&got, "public.a"), keys(&got, "public.b")), (all.clone(), all));
    assert!(stage.holds("(SELECT count(*) FROM watership.backfill) = 2").await);
}

#[tokio::test]
async fn only_the_rows_that_are_wanted_and_published_are_sent() {
    let sql = "CREATE TABLE t (a int, b text, secret text, n int, PRIMARY KEY (a, b)); \
        INSERT INTO t SELECT g / 10, g % 10, 'no', g FROM generate_series(1, 99) AS g; \
        CREATE PUBLICATION watership FOR TABLE t (a, b, n) WHERE (a < 8) \
            WITH (publish_via_partition_root = true)";
    let tables = ["public.t"];
    let settings = "backfill.chunk_rows = 9";
    let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.t", "--where", "n % 2 = 0", "--from", "3", "--from", "5"]).await;
    let got = stage.settled().await;
    let expected: HashSet<i64> = (35..80).filter(|n| n % 2 == 0).collect();
    let rows: Vec<Value> = reads(&got).iter().map(|m| m.json()["after"].clone()).collect();
    let sent: HashSet<i64> = rows.iter().map(|row| row["n"].as_i64().expect("n")).collect();
    assert_eq!((sent, rows.len()), (expected.clone(), expected.len()));
    assert!(rows.iter().all(|row| row.get("secret").is_none()), "{rows:?}");
    let wrong = stage.run(&["backfill", "public.t", "--where", "missing = 1"]).await;
    let told = ["--where or --from", "missing", "an SQL condition on the table's columns"];
    wrong.expect_code(1).expect_text(&told);
    let wrong = stage.run(&["backfill", "public.t", "--where", " "]).await;
    wrong.expect_code(1).expect_text(&["--where is empty"]);
    let wrong = stage.run(&["backfill", "public.t", "--from", "-3"]).await;
    wrong.expect_code(1).expect_text(&["--from has 1 values for the key (a, b)"]);
    let wrong = stage.run(&["backfill", "public.t", "--where", "-n > 'x'"]).await;
    wrong.expect_code(1).expect_text(&["--where or --from", "invalid input syntax"]);
    stage.execute("DELETE FROM watership.checkpoint").await;
    let early = stage.run(&["backfill", "public.t"]).await;
    early.expect_text(&["there is no checkpoint row for relay", "run `watership init` first"]);
}

#[tokio::test]
async fn a_table_that_cannot_be_read_is_refused_with_the_statement_that_helps() {
    let sql = "CREATE TABLE bare (id int); ALTER TABLE bare REPLICA IDENTITY FULL; \
        CREATE TABLE t (id int PRIMARY KEY)";
    let tables = ["public.bare", "public.t"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let refused = stage.run(&["backfill", "public.bare"]).await;
    refused
        .expect_code(1)
        .expect_text(&["has no primary key and no unique index", "REPLICA IDENTITY USING INDEX"]);
    let refused = stage.run(&["backfill", "public.other"]).await;
    refused.expect_code(1).expect_text(&["public.other is not captured", "source.tables"]);
    stage.execute("ALTER PUBLICATION watership DROP TABLE t").await;
    let refused = stage.run(&["backfill", "public.t"]).await;
    refused.expect_code(1).expect_text(&["public.t is not in publication", "watership init"]);
    stage.execute("ALTER PUBLICATION watership ADD TABLE t").await;
    backfill(&stage, &["public.t", "--detach"]).await;
}

#[tokio::test]
async fn partitions_are_read_through_their_root() {
    let sql = "CREATE TABLE p (id int, day date, n int, PRIMARY KEY (id, day)) \
            PARTITION BY RANGE (day); \
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM ('2026-01-01') TO ('2026-01-02'); \
        CREATE TABLE p2 PARTITION OF p FOR VALUES FROM ('2026-01-02') TO ('2026-01-03'); \
        INSERT INTO p SELECT g, date '2026-01-01' + g % 2, g FROM generate_series(1, 50) AS g";
    let tables = ["public.p"];
    let settings = "backfill.chunk_rows = 8";
    let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.p"]).await;
    let got = stage.settled().await;
    let replica = Replica::of(&got);
    assert_eq!((replica.rows.len(), got.len()), (50, 50));
}

#[tokio::test]
async fn a_backfill_waits_while_a_queue_is_longer_than_its_limit() {
    let tables = ["public.a", "public.b"];
    let settings = "backfill.chunk_rows = 10\nbackfill.max_rate = 100\n\
        backfill.max_queue_messages = 20";
    let routes = "[[route]]\nname = \"tables\"\ntable = \"*\"\nexchange = \"watership\"\n\
        [[queue]]\nname = \"slow\"\n[[binding]]\nqueue = \"slow\"\nexchange = \"watership\"\n\
        routing_key = \"#\"";
    let stage =
        Stage::new(Setup { sql: TWO, tables: &tables, settings, routes, ..Setup::default() });
    let stage = stage.await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.a", "--detach"]).await;
    until_state(&stage, "public.a", "running: queue \"slow\" holds").await;
    assert!(rows_read(&stage, "public.a").await < 600);
    stage.run(&["backfill", "list"]).await.expect_text(&["backfill.max_queue_messages"]);
    let purge = async || {
        let options = lapin::options::QueuePurgeOptions::default();
        stage.channel.queue_purge("slow".into(), options).await.expect("it is emptied");
        state(&stage, "public.a").await == "done"
    };
    until("it is done", purge).await;
    assert_eq!(keys(&stage.settled().await, "public.a").len(), 600);
}
