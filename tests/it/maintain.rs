//! Maintenance: days ahead, retirement in two steps, and nobody is kept waiting.

use std::collections::HashMap;

use tokio_postgres::{Client, Row};
use watership::pg::publication::{TableName, create_publication};
use watership::pg::slot::create_slot;

use crate::sql::installed;
use crate::support::waiting::{until, within};

const EVENT: &str = "(aggregate_type, aggregate_id, event_type, payload, created_at) \
    VALUES ('t', '1', 'e', '{}'";

async fn maintain(client: &Client) -> Row {
    client.query_one("SELECT * FROM watership.maintain('14 days')", &[]).await.expect("it runs")
}

fn list(row: &Row, column: &str) -> Vec<String> {
    row.get(column)
}

async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(sql, &[]).await.expect("an answer").get(0)
}

/// Waits for a condition that other transactions bring about.
async fn until_true(client: &Client, condition: &str) {
    let holds = async || client.query_one(condition, &[]).await.expect("an answer").get(0);
    until(condition, holds).await;
}

/// A partition for the first day of 2020, long due.
async fn old_partition(client: &Client) {
    let sql = "SET ROLE watership_owner; \
        CREATE TABLE watership.outbox_20200101 PARTITION OF watership.outbox \
        FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00'); RESET ROLE; \
        INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, \
        created_at) \
        VALUES ('t', '1', 'e', '{}', '2020-01-01 12:00+00')";
    client.batch_execute(sql).await.expect("an old partition");
}

/// Says that one relay has passed `lsn`, an SQL expression.
async fn pass(client: &Client, lsn: &str) {
    let sql = format!(
        "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, slot, \
         system_identifier, timeline, publication, publication_oid) VALUES \
         ('shop', 0, 1, 0, ({lsn})::pg_lsn - '0/0', 'watership', '1', 1, 'watership', 1) \
         ON CONFLICT (name) DO UPDATE SET flush_mark = excluded.flush_mark"
    );
    client.batch_execute(&sql).await.expect("a checkpoint");
}

#[tokio::test]
async fn today_and_fourteen_days_are_there_and_missing_ones_come_back() {
    let (_database, client) = installed().await;
    let days = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'watership.outbox'::regclass";
    assert_eq!(number(&client, days).await, 16, "15 days and the default");
    let row = maintain(&client).await;
    assert_eq!((list(&row, "created").len(), row.get::<_, bool>("more")), (0, false));
    let last = "SELECT 'outbox_' || to_char((now() AT TIME ZONE 'UTC')::date + 14, 'YYYYMMDD')";
    let last: String = client.query_one(last, &[]).await.unwrap().get(0);
    client.batch_execute(&format!("DROP TABLE watership.{last}")).await.unwrap();
    let row = maintain(&client).await;
    assert_eq!((list(&row, "created"), row.get::<_, bool>("more")), (vec![last], true));
    client.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
    assert_eq!(number(&client, "SELECT count(*) FROM watership.outbox_default").await, 0);
}

#[tokio::test]
async fn a_day_with_rows_in_the_default_partition_is_skipped_and_named() {
    let (_database, client) = installed().await;
    let day = "SELECT to_char((now() AT TIME ZONE 'UTC')::date + 3, 'YYYYMMDD')";
    let day: String = client.query_one(day, &[]).await.unwrap().get(0);
    client.batch_execute(&format!("DROP TABLE watership.outbox_{day}")).await.unwrap();
    let insert = format!("INSERT INTO watership.outbox {EVENT}, '{day} 12:00+00')");
    client.batch_execute(&insert).await.unwrap();
    let row = maintain(&client).await;
    let skipped = list(&row, "skipped");
    assert_eq!(skipped, [format!("outbox_{day}: 1 rows of that day are in the default partition")]);
    assert_eq!(row.get::<_, i64>("default_left"), 1);
    assert!(!row.get::<_, bool>("more"), "a skipped day is not a reason to call again at once");
    client.batch_execute("DELETE FROM watership.outbox_default").await.unwrap();
    assert_eq!(list(&maintain(&client).await, "created"), [format!("outbox_{day}")]);
}

/// Days ahead are missing, and their rows are not, as after a long time without maintenance.
async fn neglected(client: &Client, rows: u32) {
    let days = "SELECT 'DROP TABLE ' || string_agg(inhrelid::regclass::text, ', ') \
        FROM pg_inherits WHERE inhparent = 'watership.outbox'::regclass \
            AND inhrelid <> 'watership.outbox_default'::regclass";
    let drop: String = client.query_one(days, &[]).await.expect("days").get(0);
    client.batch_execute(&drop).await.expect("days are dropped");
    let fill = format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 't', n::text, 'e', to_json(repeat('x', 900)) FROM generate_series(1, {rows}) AS n"
    );
    client.batch_execute(&fill).await.expect("rows");
}

#[tokio::test]
async fn days_come_back_beside_a_large_default_partition_without_reading_it() {
    let (database, client) = installed().await;
    const ROWS: i64 = 12_000;
    neglected(&client, ROWS as u32).await;
    assert!(number(&client, "SELECT pg_relation_size('watership.outbox_default')").await > 8 << 20);
    let read = |table: &str| {
        format!(
            "SELECT coalesce(seq_tup_read, 0) FROM pg_stat_all_tables \
             WHERE schemaname = 'watership' AND relname = '{table}'"
        )
    };
    // A transaction that has written to it is not waited for, and its neighbours do not wait.
    let open = database.connect().await;
    let writer = database.connect().await;
    open.batch_execute("BEGIN; SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
    let emit = writer.batch_execute("SELECT watership.emit('t', '2', 'e', '{}')");
    let both = async { tokio::join!(maintain(&client), emit) };
    let (row, emitted) = within("nobody waits for it", both).await;
    emitted.unwrap();
    let postponed = list(&row, "postponed");
    assert!(postponed[0].starts_with("replacing outbox_default: "), "{postponed:?}");
    open.batch_execute("COMMIT").await.unwrap();

    // The counters of a session are shown when it has been idle.
    let flush = "SELECT pg_stat_force_next_flush()";
    client.batch_execute(flush).await.unwrap();
    let before = number(&client, &read("outbox_default")).await;
    let row = maintain(&client).await;
    assert_eq!(list(&row, "created").len(), 15, "today, too");
    let [old] = &list(&row, "detached")[..] else { panic!("one is detached") };
    client.batch_execute(flush).await.unwrap();
    let after = number(&client, &read(old)).await;
    assert!(after - before < ROWS, "{} rows were read", after - before);
    client.batch_execute("SELECT watership.emit('t', '3', 'e', '{}')").await.unwrap();
    assert_eq!(number(&client, "SELECT count(*) FROM watership.outbox_default").await, 0);
    assert_eq!(number(&client, "SELECT count(*) FROM watership.outbox").await, 1);

    // It stays until every relay has passed it, and its rows are old.
    let there = format!("SELECT count(*) FROM watership.{old}");
    pass(&client, "'0/1'").await;
    let retain = |days: u32| format!("SELECT * FROM watership.maintain('{days} days')");
    let dropped =
        async |days| list(&client.query_one(&retain(days), &[]).await.unwrap(), "dropped");
    assert_eq!(dropped(0).await, [""; 0], "no relay has passed it");
    pass(&client, "pg_current_wal_insert_lsn()").await;
    assert_eq!(dropped(1).await, [""; 0], "its rows are not old");
    assert_eq!(number(&client, &there).await, ROWS + 2);
    assert_eq!(dropped(0).await, [old.as_str()]);
}

#[tokio::test]
async fn a_small_default_partition_is_kept_and_days_come_one_at_a_call() {
    let (_database, client) = installed().await;
    neglected(&client, 10).await;
    let row = maintain(&client).await;
    assert_eq!((list(&row, "created").len(), list(&row, "detached").len()), (1, 0));
    assert_eq!(list(&row, "skipped").len(), 1, "its rows are of today");
}

#[tokio::test]
async fn a_partition_is_detached_and_dropped_only_after_every_relay_passed_it() {
    let (_database, client) = installed().await;
    old_partition(&client).await;
    let row = maintain(&client).await;
    assert_eq!((list(&row, "detached"), row.get("more")), (vec!["outbox_20200101".into()], true));
    let there = "SELECT count(*) FROM watership.outbox_20200101";
    let noted = "(SELECT lsn FROM watership.retired_partition)";

    assert_eq!(list(&maintain(&client).await, "dropped").len(), 0, "no relay is known");
    pass(&client, &format!("{noted} - 1")).await;
    assert_eq!(list(&maintain(&client).await, "dropped").len(), 0, "one byte short");
    assert_eq!(number(&client, there).await, 1);
    pass(&client, noted).await;
    let columns = "epoch, mark, ordinal, flush_mark, slot, system_identifier, timeline, \
        publication, publication_oid";
    for (changed, to) in [("flush_mark", "1"), ("slot", "slot, 'poll'")] {
        let values = columns.replace(changed, to);
        let kind = if changed == "slot" { ", kind" } else { "" };
        let columns = columns.replace("slot", &format!("slot{kind}"));
        let second = format!(
            "INSERT INTO watership.checkpoint (name, {columns}) SELECT 'slow', {values} \
             FROM watership.checkpoint"
        );
        client.batch_execute(&second).await.unwrap();
        let dropped = list(&maintain(&client).await, "dropped").len();
        assert_eq!(dropped, 0, "the slowest counts, and one that does not read the WAL");
        client.batch_execute("DELETE FROM watership.checkpoint WHERE name = 'slow'").await.unwrap();
    }
    assert_eq!(list(&maintain(&client).await, "dropped"), ["outbox_20200101"]);
    assert!(client.query(there, &[]).await.is_err(), "it is gone");
    assert_eq!(number(&client, "SELECT count(*) FROM watership.retired_partition").await, 0);
}

#[tokio::test]
async fn a_detached_partition_that_was_attached_again_is_not_dropped() {
    let (_database, client) = installed().await;
    old_partition(&client).await;
    assert_eq!(list(&maintain(&client).await, "detached").len(), 1);
    let again = "ALTER TABLE watership.outbox ATTACH PARTITION watership.outbox_20200101 \
        FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00')";
    client.batch_execute(again).await.unwrap();
    pass(&client, "pg_current_wal_lsn()").await;
    let row = maintain(&client).await;
    assert_eq!(list(&row, "dropped").len(), 0);
    // Its note is gone too, so it starts over with both steps.
    assert_eq!(list(&row, "detached"), ["outbox_20200101"]);
}

#[tokio::test]
async fn old_default_rows_go_in_batches_once_passed_and_later_ones_wait() {
    let (database, client) = installed().await;
    let open = database.connect().await;
    let old = "'2020-01-01 12:00+00')";
    let rows = "INSERT INTO watership.outbox \
        (aggregate_type, aggregate_id, event_type, payload, created_at) \
        SELECT 't', n::text, 'e', '{}', '2020-01-01' FROM generate_series(1, 1500) AS n";
    client.batch_execute(rows).await.unwrap();
    // Open when the note is taken: its row will lie behind the noted position.
    open.batch_execute(&format!("BEGIN; INSERT INTO watership.outbox {EVENT}, {old}"))
        .await
        .unwrap();
    pass(&client, "'0/1'").await;
    // Transactions of other tests that are older than our rows hold the horizon back.
    let xid = number(&open, "SELECT pg_current_xact_id()::text::bigint").await;
    until_true(&client, &format!("SELECT pg_snapshot_xmin(pg_current_snapshot()) >= '{xid}'"))
        .await;
    assert_eq!(maintain(&client).await.get::<_, i64>("default_deleted"), 0);
    open.batch_execute("COMMIT").await.unwrap();
    client.batch_execute(&format!("INSERT INTO watership.outbox {EVENT}, now())")).await.unwrap();
    let note = "SELECT count(*) FROM watership.default_retirement";
    assert_eq!(number(&client, note).await, 1);

    pass(&client, "(SELECT lsn - 1 FROM watership.default_retirement)").await;
    assert_eq!(maintain(&client).await.get::<_, i64>("default_deleted"), 0);
    pass(&client, "(SELECT lsn FROM watership.default_retirement)").await;
    let row = maintain(&client).await;
    assert_eq!((row.get::<_, i64>("default_deleted"), row.get("more")), (1000, true));
    let row = maintain(&client).await;
    assert_eq!(row.get::<_, i64>("default_deleted"), 500);
    assert_eq!(row.get::<_, i64>("default_left"), 1, "the late row has a new note");
    assert_eq!(number(&client, note).await, 1);
    until_true(&client, &format!("SELECT pg_snapshot_xmin(pg_current_snapshot()) > '{xid}'")).await;
    // The note may be older than that: two notes are enough.
    for _ in 0..2 {
        pass(&client, "pg_current_wal_insert_lsn()").await;
        maintain(&client).await;
    }
    assert_eq!(number(&client, "SELECT count(*) FROM watership.outbox").await, 1);
}

#[tokio::test]
async fn an_open_reader_or_writer_delays_a_detach_and_not_the_writers() {
    let (database, client) = installed().await;
    old_partition(&client).await;
    let open = database.connect().await;
    let writer = database.connect().await;
    for held in [
        "SELECT count(*) FROM watership.outbox",
        "SELECT watership.emit('t', '1', 'e', '{}')",
        "SELECT count(*) FROM watership.outbox_20200101",
    ] {
        open.batch_execute(&format!("BEGIN; {held}")).await.unwrap();
        // Both come to their end while that transaction is still open.
        let emit = writer.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')");
        let both = async { tokio::join!(maintain(&client), emit) };
        let (row, emitted) = within(&format!("{held}: nobody waits for it"), both).await;
        emitted.unwrap();
        let postponed = list(&row, "postponed");
        assert!(postponed[0].starts_with("detaching outbox_20200101: "), "{postponed:?}");
        assert_eq!((list(&row, "detached").len(), row.get("more")), (0, false));
        open.batch_execute("ROLLBACK").await.unwrap();
    }
    assert_eq!(list(&maintain(&client).await, "detached"), ["outbox_20200101"]);
}

#[tokio::test]
async fn a_second_maintenance_at_once_steps_aside() {
    let (database, client) = installed().await;
    let other = database.connect().await;
    other.batch_execute("BEGIN; SELECT * FROM watership.maintain('14 days')").await.unwrap();
    let row = maintain(&client).await;
    assert_eq!(list(&row, "postponed"), ["all: maintenance is running in another session"]);
    assert!(!row.get::<_, bool>("more"));
    other.batch_execute("ROLLBACK").await.unwrap();
    assert!(list(&maintain(&client).await, "postponed").is_empty());
}

#[tokio::test]
async fn a_negative_retention_is_refused() {
    let (_database, client) = installed().await;
    for retain in ["'-1 day'", "NULL"] {
        let sql = format!("SELECT * FROM watership.maintain({retain})");
        assert!(client.query(&sql, &[]).await.is_err(), "{retain}");
    }
}

/// The table that each Insert among pgoutput messages names.
///
/// With publish_via_partition_root a Relation message comes for the root *and* for the leaf, and
/// the Insert refers to the root's.
fn tables_inserted_into(messages: &[Vec<u8>]) -> Vec<String> {
    let mut names = HashMap::new();
    let mut inserts = Vec::new();
    for message in messages {
        // 'R' or 'I', Int32 oid; a Relation then has String namespace, String name, ...
        match message[0] {
            b'R' => {
                let mut strings = message[5..].split(|byte| *byte == 0);
                let mut next = || String::from_utf8_lossy(strings.next().expect("a string"));
                names.insert(message[1..5].to_vec(), format!("{}.{}", next(), next()));
            }
            b'I' => inserts.push(names[&message[1..5]].clone()),
            _ => {}
        }
    }
    inserts
}

#[tokio::test]
async fn a_partition_dropped_before_it_was_decoded_still_arrives_under_the_root() {
    let (database, client) = installed().await;
    create_publication(&client, "watership", &[TableName::outbox()]).await.unwrap();
    let slot = database.name.as_str();
    create_slot(&client, slot, false).await.unwrap();
    old_partition(&client).await;
    client.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
    assert_eq!(list(&maintain(&client).await, "detached"), ["outbox_20200101"]);
    // A lie, to have it dropped although nothing was decoded.
    pass(&client, "pg_current_wal_insert_lsn()").await;
    assert_eq!(list(&maintain(&client).await, "dropped"), ["outbox_20200101"]);
    client.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
    let sql = "SELECT data FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, \
        'proto_version', '1', 'publication_names', 'watership')";
    let rows = client.query(sql, &[&slot]).await.unwrap();
    let messages: Vec<Vec<u8>> = rows.iter().map(|row| row.get(0)).collect();
    // The row of the dropped partition is the first.
    assert_eq!(tables_inserted_into(&messages), ["watership.outbox"; 3]);
    client.execute("SELECT pg_drop_replication_slot($1)", &[&slot]).await.unwrap();
}
