//! Rows whose key changes while their table is backfilled: values that the change does not carry
//! must arrive anyway.

use serde_json::json;

use watership::relay::backfill::keyset::From;
use watership::relay::backfill::read::{self, ONE_BY_ONE};
use watership::relay::backfill::worker::SETTINGS;

use super::backfill::{Replica, backfill, reads, until_state};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// `big` is stored out of line, and no update here touches it.
const TABLE: &str = "CREATE TABLE t (a int, b text COLLATE \"C\", n int, big text, \
    PRIMARY KEY (b, a)); ALTER TABLE t ALTER big SET STORAGE EXTERNAL; \
    INSERT INTO t SELECT g, 'k', 0, repeat('b' || g, 1000) FROM generate_series(1, 600) AS g; \
    CREATE UNIQUE INDEX other ON t (n, a, b)";

async fn half_read() -> Stage {
    let settings = "backfill.chunk_rows = 20\nbackfill.max_rate = 400";
    let tables = ["public.t"];
    let sql = format!("{TABLE}; UPDATE t SET n = a; ALTER TABLE t ALTER n SET NOT NULL");
    Stage::new(Setup { sql: &sql, tables: &tables, settings, ..Setup::default() }).await
}

async fn is_half_read(stage: &Stage) {
    let read = "(SELECT max(rows_read) FROM watership.backfill) BETWEEN 40 AND 300";
    until("some rows are read", async || stage.holds(read).await).await;
}

/// Fails unless the consumer's table equals that of the database.
async fn is_whole(stage: &Stage) {
    let messages = stage.settled().await;
    let replica = Replica::of(&messages);
    replica.is_ordered();
    let sql = "SELECT jsonb_build_object('a', a, 'b', b), to_jsonb(t) FROM t";
    let rows = stage.sql.query(sql, &[]).await.expect("the rows");
    assert_eq!(replica.rows.len(), rows.len());
    for row in rows {
        let (key, row): (serde_json::Value, serde_json::Value) = (row.get(0), row.get(1));
        assert_eq!(replica.rows.get(&key.to_string()), Some(&row), "{key}");
    }
    assert!(stage.holds("(SELECT count(*) FROM watership.backfill_moved) = 0").await);
}

#[tokio::test]
async fn a_row_that_moves_from_a_key_not_read_to_one_that_was_is_whole_at_the_end() {
    let stage = half_read().await;
    let relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    is_half_read(&stage).await;
    stage
        .execute(
            "UPDATE t SET a = -500 WHERE a = 500; UPDATE t SET a = -501, n = 7 WHERE a = 501; \
             UPDATE t SET a = -502 WHERE a = 502; UPDATE t SET a = -1502 WHERE a = -502; \
             UPDATE t SET a = -3 WHERE a = 3; DELETE FROM t WHERE a = 5; \
             UPDATE t SET a = 5 WHERE a = 503; UPDATE t SET a = -504, big = 'new' WHERE a = 504; \
             UPDATE t SET b = 'a''\"' WHERE a = 505; UPDATE t SET a = -506 WHERE a = 506; \
             DELETE FROM t WHERE a = -506",
        )
        .await;
    until_state(&stage, "public.t", "done").await;
    is_whole(&stage).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_row_that_moves_while_the_run_is_paused_or_the_relay_is_down_is_whole_at_the_end() {
    let stage = half_read().await;
    let relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    is_half_read(&stage).await;
    stage.run(&["backfill", "pause", "public.t"]).await.expect_code(0);
    stage.execute("UPDATE t SET a = -500 WHERE a = 500").await;
    stage.settled().await;
    let count = "(SELECT count(*) FROM watership.backfill_moved) = 1";
    until("it is recorded", async || stage.holds(count).await).await;
    relay.kill();
    stage.execute("UPDATE t SET a = -501 WHERE a = 501").await;
    let relay = stage.start().await;
    stage.run(&["backfill", "resume", "public.t"]).await.expect_code(0);
    is_half_read(&stage).await;
    stage.execute("UPDATE t SET a = -502 WHERE a = 502").await;
    until_state(&stage, "public.t", "done").await;
    relay.kill();
    let relay = stage.start().await;
    stage.settled().await;
    is_whole(&stage).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_key_that_the_identity_does_not_carry_is_looked_at_again() {
    let stage = half_read().await;
    stage.execute("ALTER TABLE t REPLICA IDENTITY USING INDEX other").await;
    let relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    is_half_read(&stage).await;
    stage.execute("UPDATE t SET a = -500 WHERE a = 500; UPDATE t SET n = -1 WHERE a = 7").await;
    until_state(&stage, "public.t", "done").await;
    is_whole(&stage).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_key_that_two_rows_had_in_one_run_gives_them_two_ids() {
    let stage = half_read().await;
    let relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    is_half_read(&stage).await;
    stage.execute("DELETE FROM t WHERE a = 5; UPDATE t SET a = 5 WHERE a = 503").await;
    until_state(&stage, "public.t", "done").await;
    let messages = stage.settled().await;
    let of_five: Vec<_> =
        reads(&messages).into_iter().filter(|m| m.json()["after"]["a"] == json!(5)).collect();
    let big: Vec<_> = of_five.iter().map(|m| m.json()["after"]["big"].clone()).collect();
    assert_eq!(big, [json!("b5".repeat(1000)), json!("b503".repeat(1000))]);
    assert_ne!(of_five[0].id(), of_five[1].id());
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn rows_that_moved_are_found_by_the_index_and_not_by_reading_the_table_again() {
    let stage = half_read().await;
    stage
        .execute("INSERT INTO t SELECT g, 'k', g, 'x' FROM generate_series(601, 20000) AS g")
        .await;
    stage.execute(&format!("ANALYZE t; {SETTINGS}; BEGIN; {ONE_BY_ONE}")).await;
    let name = "public.t".parse().expect("a name");
    let found = read::find(&stage.sql, &name, "watership").await.expect("an answer");
    let shape = read::shape(&stage.sql, &found.expect("a table")).await.expect("an answer");
    let shape = shape.expect("a table").expect("it can be read");
    let keys = ["7", "15000", "19000"].map(|a| vec!["k".to_owned(), a.to_owned()]);
    let copy = shape.statement(&From::Only(keys.to_vec()), None, 4);
    let query = copy.strip_prefix("COPY (").and_then(|q| q.strip_suffix(") TO STDOUT"));
    let explain = format!("EXPLAIN {}", query.expect("a query"));
    let plan = stage.sql.query(&explain, &[]).await.expect("a plan");
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert!(plan.contains("Bitmap Index Scan on t_pkey"), "{plan}");
    assert!(!plan.contains("Seq Scan"), "{plan}");
}
