//! Polling of an outbox table of the application's: the same events as from the WAL, nothing that
//! is skipped or held up, and nothing that works by half.

use std::process::Command;

use lapin::types::AMQPValue;

use crate::polling::Pooler;
use crate::polling_mapped_refused::refuse;
use crate::support::inbox::{Message, kinds, of_key};
use crate::support::servers::{Database, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{Patience, until};

pub const TABLE: &str = "CREATE TABLE public.outbox (id uuid PRIMARY KEY, \
    aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL, \
    type varchar(255) NOT NULL, payload jsonb, \
    seq bigint GENERATED ALWAYS AS IDENTITY, \
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()); \
    CREATE INDEX ON outbox (xid, seq); CREATE INDEX ON outbox (seq)";
pub const MAPPED: &str = "outbox.table = \"public.outbox\"\noutbox.profile = \"debezium\"\n\
    source.mode = \"poll\"\noutbox.retained_for = \"1d\"";
pub const COLUMNS: &str = "outbox.order_by = \"seq\"\noutbox.xid = \"xid\"";

pub async fn stage(sql: &str, settings: &str) -> Stage {
    let settings = format!("{MAPPED}\n{COLUMNS}\n{settings}");
    Stage::new(Setup { sql, settings: &settings, ..Setup::default() }).await
}

pub fn emit(kind: &str) -> String {
    emit_of("1", kind)
}

fn emit_of(key: &str, kind: &str) -> String {
    format!(
        "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) \
         VALUES (gen_random_uuid(), 'order', '{key}', '{kind}', '1')"
    )
}

/// Everything that has arrived, once the settled batch shows all rows of the table that are there.
pub async fn settled(stage: &Stage, table: &str) -> Vec<Message> {
    let passed = format!(
        "NOT EXISTS (SELECT FROM {table} AS o, watership.checkpoint AS c \
             JOIN watership.poll_batch AS b ON b.name = c.name AND b.number = c.flush_mark \
             WHERE c.name = 'shop' AND NOT pg_visible_in_snapshot(o.xid, b.snapshot))"
    );
    let mut patience = Patience::new();
    while !stage.holds(&passed).await {
        let row = stage.text("SELECT json_agg(c) FROM watership.checkpoint AS c").await;
        patience.more(row, || "the relay passes what is committed".into()).await;
    }
    stage.settled_now().await
}

/// Waits until this many events have arrived, and tells their kinds.
async fn arrived(stage: &Stage, count: usize) -> Vec<String> {
    let messages = stage.inbox.count(count).await;
    kinds(&messages).into_iter().map(str::to_owned).collect()
}

/// What a message is, but for its place and the time at which it was found.
fn content(message: &Message) -> (String, String, Vec<u8>, Vec<(String, AMQPValue)>) {
    let headers = message.properties.headers().as_ref().expect("headers").inner();
    let headers = headers.iter().map(|(name, value)| (name.to_string(), value.clone()));
    let placed = ["ws-position", "ws-lsn", "ws-committed-at"];
    let headers = headers.filter(|(name, _)| !placed.contains(&name.as_str()));
    let properties = &message.properties;
    let shown = format!(
        "{:?} {:?} {:?} {:?}",
        properties.content_type(),
        properties.kind(),
        properties.delivery_mode(),
        message.routing_key
    );
    (message.id(), shown, message.bytes.clone(), headers.collect())
}

/// A table with columns of many types, and how it is read.
const EVENTS: &str = "CREATE TYPE kind AS ENUM ('made', 'paid'); \
    CREATE DOMAIN instant AS bigint CHECK (value > 0); \
    CREATE DOMAIN label AS varchar(20); CREATE DOMAIN score AS numeric; \
    CREATE SCHEMA \"Shop\"; \
    CREATE TABLE \"Shop\".\"Events\" (n serial PRIMARY KEY, what kind NOT NULL, \
        order_id bigint, body bytea, meta json, version int, paid boolean, happened instant, \
        \"Odd Name\" label, score score, since interval, fixed char(4), at timestamptz, \
        raw bytea, ratio float8, pair point, \
        txid xid8 NOT NULL DEFAULT pg_current_xact_id()); \
    CREATE INDEX ON \"Shop\".\"Events\" (txid, n)";
const READ: &str = "outbox.table = \"Shop.Events\"\noutbox.aggregate_type = \"order\"\n\
    outbox.columns = { id = \"n\", aggregate_id = \"order_id\", event_type = \"what\", \
    payload = \"body\", headers = \"meta\", created_at = \"happened\" }\n\
    outbox.headers_from = { eventVersion = \"version\", isPaid = \"paid\", odd = \"Odd Name\", \
    score = \"score\", fixed = \"fixed\", since = \"since\", at = \"at\", raw = \"raw\", \
    ratio = \"ratio\", pair = \"pair\" }";
const ROWS: &str = "INSERT INTO \"Shop\".\"Events\" (what, order_id, body, meta, version, paid, \
    happened, \"Odd Name\", score, since, fixed, at, raw, ratio, pair) VALUES \
    ('made', 7, '\\x00ff', '{\"a\": 1, \"odd\": \"own\"}', 3, true, 1553460779000, 'x', 1.50, \
        '1 day 2 hours', 'ab', '2020-01-02 03:04:05.6+02', '\\x0102', 0.1, '(1,2)'), \
    ('paid', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL), \
    ('paid', 7, 'text', ' {} ', 4, false, 9223372036854775807, '', 'NaN', '-1 month', '', \
        'infinity', '', 'NaN', NULL), \
    ('made', 8, 'parked', '[1]', 5, true, 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL)";

#[tokio::test]
async fn events_of_a_mapped_table_are_the_same_as_from_the_wal() {
    let polled = format!(
        "{READ}\nsource.mode = \"poll\"\noutbox.order_by = \"n\"\noutbox.xid = \"txid\"\n\
         outbox.retained_for = \"1d\""
    );
    let mut both = Vec::new();
    for settings in [READ, &polled] {
        let stage = Stage::new(Setup { sql: EVENTS, settings, ..Setup::default() }).await;
        // What a role prefers must not matter.
        let prefers = "ALTER DATABASE :name SET IntervalStyle = 'postgres'; \
            ALTER DATABASE :name SET bytea_output = 'escape'";
        stage.execute(&prefers.replace(":name", &stage.database.name)).await;
        let relay = stage.start().await;
        stage.execute(ROWS).await;
        let messages = stage.inbox.count(3).await;
        let parked = "SELECT coalesce(string_agg(key || ': ' || error || event_id, ''), '') \
            FROM watership.parked";
        until("one is parked", async || stage.text(parked).await.contains("not a JSON")).await;
        assert_eq!(kinds(&messages), ["made", "paid", "paid"]);
        both.push((messages.iter().map(content).collect::<Vec<_>>(), stage.text(parked).await));
        relay.stop().await.expect_code(0);
    }
    assert_eq!(both[0], both[1]);
    assert!(both[0].0[0].3.iter().any(|(name, _)| name == "since"), "{:?}", both[0]);
}

#[tokio::test]
async fn what_commits_late_is_not_skipped_and_what_stays_open_holds_up_nobody() {
    let server = private_postgres(&["max_prepared_transactions = 5"], None).await;
    server.create_database("shop").await.expect("a database");
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let settings = format!("{MAPPED}\n{COLUMNS}");
    let setup = Setup { sql: TABLE, settings: &settings, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    // In one batch, in the order of inserts: the relay begins when both are there.
    let early = stage.database.connect().await;
    early.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.expect("it has its number");
    stage.execute(&emit("v1")).await;
    early.batch_execute(&format!("{}; COMMIT", emit("v2"))).await.expect("it commits");
    let relay = stage.start().await;
    assert_eq!(arrived(&stage, 2).await, ["v1", "v2"]);
    // Open ones of many rows and of none, and a prepared one, with lower numbers.
    let (open, other) = (stage.database.connect().await, stage.database.connect().await);
    let many = emit_of("2", "open").replace("VALUES (", "SELECT ").trim_end_matches(')').to_owned();
    let many = format!("BEGIN; {many} FROM generate_series(1, 3000)");
    open.batch_execute(&many).await.expect("it stays open");
    other.batch_execute("CREATE TABLE x (n int); BEGIN; INSERT INTO x VALUES (1)").await.unwrap();
    stage.execute(&format!("BEGIN; {}; PREPARE TRANSACTION 'p'", emit("prepared"))).await;
    stage.execute(&format!("BEGIN; {}; ROLLBACK", emit("never"))).await;
    for n in 3..=5 {
        stage.execute(&emit(&format!("v{n}"))).await;
        arrived(&stage, n).await;
    }
    relay.stop().await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("COMMIT PREPARED 'p'").await;
    assert_eq!(arrived(&stage, 6).await, ["v1", "v2", "v3", "v4", "v5", "prepared"]);
    open.batch_execute("COMMIT").await.expect("it commits");
    assert_eq!(settled(&stage, "outbox").await.len(), 3006);
    other.batch_execute("ROLLBACK").await.expect("it ends");
    let key = stage.text("SELECT id FROM outbox WHERE type = 'prepared'").await;
    stage.run(&["find", &key]).await.expect_code(0).expect_text(&["passed: it was"]);
    let told = ["public.outbox, mapped; the relay never deletes its rows", "at batch"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_large_transaction_that_is_killed_in_the_middle_comes_again_at_the_same_places() {
    const EVENTS: usize = 12_000;
    let limits = "relay.max_window_events = 512\nrelay.checkpoint_interval = \"20ms\"";
    let stage = stage(TABLE, limits).await;
    stage
        .execute(&format!(
            "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) \
             SELECT gen_random_uuid(), 'order', (n % 50)::text, n::text, \
                to_json(repeat('x', n % 2000)) FROM generate_series(1, {EVENTS}) AS n"
        ))
        .await;
    for part in 1..=3 {
        let relay = stage.start().await;
        stage.inbox.count(part * EVENTS / 5).await;
        // What is committed meanwhile is of another batch.
        stage.execute(&emit_of("new", "new")).await;
        relay.kill();
    }
    let relay = stage.start().await;
    let messages = settled(&stage, "outbox").await;
    let mut places = std::collections::HashMap::new();
    let mut first = Vec::new();
    for message in &messages {
        let position = message.text("ws-position");
        match places.insert(message.id(), position.clone()) {
            None => first.push((position, message.id())),
            Some(before) => assert_eq!(before, position, "another place"),
        }
    }
    first.sort();
    let all = "SELECT string_agg(id::text, ' ' ORDER BY seq) FROM outbox";
    let first: Vec<String> = first.into_iter().map(|(_, id)| id).collect();
    assert_eq!(first.join(" "), stage.text(all).await, "all of them, in the order of inserts");
    assert!(messages.len() < EVENTS * 2, "{} messages", messages.len());
    // Nothing of the table was touched.
    assert!(stage.holds("(SELECT count(*) FROM outbox) = 12003").await);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn rows_of_one_place_come_one_after_the_other_and_one_without_an_id_is_parked() {
    let table = TABLE
        .replace("id uuid PRIMARY KEY", "id text")
        .replace("GENERATED ALWAYS AS IDENTITY", "GENERATED BY DEFAULT AS IDENTITY");
    let stage = stage(&table, "").await;
    // As many rows of one place as no portion has.
    stage
        .execute(
            "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, seq) \
             SELECT to_char(n, 'FM00000'), 'order', 'k' || n % 100, n::text, '1', 7 \
             FROM generate_series(1, 5000) AS n; \
             INSERT INTO outbox (aggregatetype, aggregateid, type, seq) \
             VALUES ('order', '2', 'no id', 8)",
        )
        .await;
    let relay = stage.start().await;
    let messages = settled(&stage, "outbox").await;
    assert_eq!(messages.len(), 5000);
    for key in 0..100 {
        let numbers = (1..=5000).filter(|n: &u32| n % 100 == key);
        let expected: Vec<String> = numbers.map(|n| n.to_string()).collect();
        assert_eq!(of_key(&messages, &format!("order/k{key}")), expected);
    }
    let parked = "SELECT string_agg(key || ': ' || error, '') FROM watership.parked";
    let told = "order/2: column \"id\" of the outbox row is null";
    until("it is parked", async || stage.text(parked).await.contains(told)).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_mapped_table_is_polled_through_a_pooler_in_transaction_mode() {
    if Command::new("pgbouncer").arg("--version").output().is_err() {
        println!("pgbouncer is missing: scripts/install fault-tools");
        return;
    }
    let server = private_postgres(&["wal_level = replica"], None).await;
    server.create_database("shop").await.expect("a database");
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let pooler = Pooler::before(server.port(), "shop", "poller").await;
    let settings = format!("{MAPPED}\n{COLUMNS}");
    let sql = format!("{TABLE}; CREATE ROLE poller LOGIN; GRANT SELECT ON outbox TO poller");
    let (sql, source_url) = (&*sql, &*pooler.url);
    let setup = Setup { sql, settings: &settings, source_url, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    for round in 1..=2 {
        let relay = stage.start().await;
        let many = "INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) \
            SELECT gen_random_uuid(), 'order', (n % 7)::text, 'e', '1' \
            FROM generate_series(1, 3000) AS n";
        stage.execute(many).await;
        assert_eq!(settled(&stage, "outbox").await.len(), round * 3000);
        relay.stop().await.expect_code(0);
    }
    stage.run(&["find", "--key", "order/3"]).await.expect_code(0).expect_text(&["passed: it was"]);
    stage.run(&["check"]).await.expect_code(0).expect_text(&["public.outbox, mapped", "at batch"]);
}

#[tokio::test]
async fn a_partitioned_table_is_polled_whatever_its_rows_were_inserted_into() {
    let table = "CREATE TABLE outbox (id uuid DEFAULT gen_random_uuid(), aggregatetype text, \
            aggregateid text, type text, payload json, day date NOT NULL, seq bigserial, \
            xid xid8 NOT NULL DEFAULT pg_current_xact_id()) PARTITION BY RANGE (day); \
        CREATE TABLE outbox_1 PARTITION OF outbox \
            FOR VALUES FROM ('2026-01-01') TO ('2026-02-01'); \
        CREATE TABLE outbox_2 PARTITION OF outbox \
            FOR VALUES FROM ('2026-02-01') TO ('2026-03-01'); \
        CREATE INDEX ON outbox (xid, seq); CREATE INDEX by_seq ON outbox (seq)";
    let stage = stage(table, "").await;
    let insert = |table: &str, kind: &str, day: &str| {
        format!(
            "INSERT INTO {table} (aggregatetype, aggregateid, type, payload, day) \
             VALUES ('order', '1', '{kind}', '1', '{day}')"
        )
    };
    let late = stage.database.connect().await;
    late.batch_execute(&format!("BEGIN; {}", insert("outbox", "late", "2026-02-02")))
        .await
        .unwrap();
    stage.execute(&insert("outbox", "a", "2026-02-03")).await;
    stage.execute(&insert("outbox_1", "b", "2026-01-03")).await;
    stage.execute(&insert("outbox", "c", "2026-01-04")).await;
    let relay = stage.start().await;
    assert_eq!(arrived(&stage, 3).await, ["a", "b", "c"]);
    late.batch_execute("COMMIT").await.expect("it commits");
    // A partition that goes takes along what has been read.
    assert_eq!(arrived(&stage, 4).await, ["a", "b", "c", "late"]);
    settled(&stage, "outbox").await;
    stage.execute("DROP TABLE outbox_1").await;
    stage.execute(&insert("outbox", "d", "2026-02-04")).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["a", "b", "c", "late", "d"]);
    relay.stop().await.expect_code(0);
    stage.execute("DROP INDEX by_seq").await;
    let by_seq = "CREATE INDEX ON \"public\".\"outbox\" (\"seq\") (writers wait meanwhile";
    refuse(&stage, &["lacks an index on (seq)", by_seq]).await;
}

#[tokio::test]
async fn what_was_not_read_for_longer_than_rows_stay_is_told_and_polling_goes_on() {
    let stage = stage(TABLE, "").await;
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    settled(&stage, "outbox").await;
    relay.stop().await.expect_code(0);
    let down = "UPDATE watership.checkpoint SET polled_at = now() - interval '2 days'; \
        UPDATE watership.poll_batch SET made_at = now() - interval '2 days'";
    stage.execute(down).await;
    let relay = stage.start().await;
    stage.execute(&emit("two")).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["one", "two"]);
    let told = ["longer than outbox.retained_for", "deleted meanwhile were not sent"];
    relay.stop().await.expect_code(0).expect_text(&told);
}

#[tokio::test]
async fn a_column_that_gets_another_type_is_read_as_what_it_is_from_then_on() {
    let stage = stage(TABLE, "").await;
    let relay = stage.start().await;
    stage.execute(&emit("json")).await;
    assert_eq!(arrived(&stage, 1).await, ["json"]);
    let alter =
        "ALTER TABLE outbox ALTER payload TYPE bytea USING convert_to(payload::text, 'UTF8')";
    stage.execute(alter).await;
    stage.execute(&emit("bytes").replace("'1')", "'\\x00ff')")).await;
    let messages = settled(&stage, "outbox").await;
    assert_eq!(kinds(&messages), ["json", "bytes"]);
    assert_eq!((&*messages[0].body, &messages[1].bytes[..]), ("1", &[0, 255][..]));
    relay.stop().await.expect_code(0).expect_text(&["of public.outbox has just changed"]);
}

#[tokio::test]
async fn a_body_that_no_broker_takes_is_parked_without_it_and_others_flow() {
    let stage = stage(TABLE, "").await;
    let relay = stage.start().await;
    let large = emit_of("2", "large").replace("'1')", "to_jsonb(repeat('x', 70000000)))");
    stage.execute(&format!("BEGIN; {}; {large}; {}; COMMIT", emit("a"), emit("b"))).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["a", "b"]);
    let parked = "SELECT coalesce(string_agg(key || ': ' || error, ''), '') FROM watership.parked";
    let told = "order/2: a body of 70000002 bytes is larger than";
    until("it is parked", async || stage.text(parked).await.contains(told)).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn after_a_gap_that_was_accepted_a_mapped_table_is_polled_from_then_on() {
    let stage = stage(TABLE, "").await;
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    settled(&stage, "outbox").await;
    relay.stop().await.expect_code(0);
    stage.execute("DELETE FROM watership.poll_batch").await;
    stage.run(&["run"]).await.expect_code(3).expect_text(&["batch_missing"]);
    stage.execute(&emit("in the gap")).await;
    let accept = ["resync", "--accept-gap", "--reason", "a test"];
    stage.run(&accept).await.expect_code(0).expect_text(&["resumes", "from now"]);
    let relay = stage.start().await;
    stage.execute(&emit("after")).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["one", "after"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn old_rows_are_deleted_only_when_every_relay_that_polls_the_table_has_passed_them() {
    let table = format!(
        "{TABLE}; ALTER TABLE outbox ADD at timestamptz DEFAULT now(); \
        CREATE INDEX ON outbox (at)"
    );
    let settings = "outbox.delete_after = \"1d\"\noutbox.columns.created_at = \"at\"";
    let stage = stage(&table, settings).await;
    let old = |kind: &str| {
        emit(kind)
            .replace("payload)", "payload, at)")
            .replace("'1')", "'1', now() - interval '3 d')")
    };
    let left = "SELECT coalesce(string_agg(type, ' ' ORDER BY type), '') FROM outbox";
    // A transaction that is open has an old row, which nobody has seen when the next is deleted.
    let open = stage.database.connect().await;
    open.batch_execute(&format!("BEGIN; {}", old("open"))).await.expect("it stays open");
    let relay = stage.start().await;
    stage.execute(&old("before")).await;
    stage.execute(&emit("young")).await;
    arrived(&stage, 2).await;
    open.batch_execute("COMMIT").await.expect("it commits");
    assert_eq!(arrived(&stage, 3).await, ["before", "young", "open"]);
    // What was noted before is about other rows.
    relay.stop().await.expect_code(0);
    let relay = stage.start().await;
    until("the old ones are deleted", async || stage.text(left).await == "young").await;
    relay.stop().await.expect_code(0);
    // Another relay that polls the table and stands where it is, and one of another table, which
    // does not matter.
    stage
        .execute(
            "INSERT INTO watership.checkpoint (name, kind, epoch, mark, ordinal, flush_mark, \
                 system_identifier, timeline) \
             SELECT v, 'poll', epoch, mark, ordinal, flush_mark, system_identifier, timeline \
             FROM watership.checkpoint, (VALUES ('held'), ('other')) AS v (v) WHERE name = 'shop'; \
             INSERT INTO watership.poll_batch (name, number, since, snapshot, first_seq, made_at, \
                 outbox) \
             SELECT c.name, b.number, '4:4:', '4:4:', 1, now(), \
                 CASE c.name WHEN 'held' THEN b.outbox ELSE 'public.other' END \
             FROM watership.checkpoint AS c, watership.poll_batch AS b \
             WHERE c.name IN ('held', 'other') AND b.number = c.flush_mark AND b.name = 'shop'",
        )
        .await;
    let relay = stage.start().await;
    stage.execute(&old("kept")).await;
    arrived(&stage, 4).await;
    settled(&stage, "outbox").await;
    relay.stop().await.expect_code(0);
    // What this one notes is about that row, too.
    let relay = stage.start().await;
    let polls = async || relay.metric("watership_polls_total").await.unwrap_or_default();
    until("some time is over", async || polls().await > 30.0).await;
    assert_eq!(stage.text(left).await, "kept young");
    relay.stop().await.expect_code(0);
    stage.execute("DELETE FROM watership.checkpoint WHERE name = 'held'").await;
    let relay = stage.start().await;
    until("it is deleted now", async || stage.text(left).await == "young").await;
    relay.stop().await.expect_code(0);
}
