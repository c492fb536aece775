//! Backfills of tables whose routes promise or hide something, on real servers.

use serde_json::json;

use crate::backfill::{backfill, reads, state};
use crate::support::stage::{Setup, Stage};

fn route(more: &str) -> String {
    format!("[[route]]\nname = \"t\"\ntable = \"public.t\"\nexchange = \"watership\"\n{more}\n")
}

#[tokio::test]
async fn a_row_that_was_read_breaks_no_promise_about_old_rows() {
    for policy in ["park", "stop"] {
        let sql = "CREATE TABLE t (id int PRIMARY KEY, note text); \
            ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')";
        let routes = route(&format!("on_drift = \"{policy}\""));
        let tables = ["public.t"];
        let stage = Stage::new(Setup { sql, tables: &tables, routes: &routes, ..Setup::default() });
        let stage = stage.await;
        let relay = stage.start().await;
        // The first start agrees, a live change is by the agreement.
        stage.execute("UPDATE t SET note = 'later' WHERE id = 3").await;
        stage.settled().await;
        backfill(&stage, &["public.t"]).await;
        let got = stage.settled().await;
        assert_eq!(reads(&got).len(), 3, "{policy}");
        assert_eq!(stage.text("SELECT count(*) FROM watership.parked").await, "0", "{policy}");
        assert_eq!(state(&stage, "public.t").await, "done", "{policy}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn rows_of_a_table_that_lost_a_hidden_column_unseen_are_sent_whole() {
    let sql = "CREATE TABLE t (id int PRIMARY KEY, note text, ssn text, name text); \
        INSERT INTO t VALUES (1, 'a', 'topsecret', 'x')";
    let routes = route("columns = { exclude = [\"ssn\"] }");
    let tables = ["public.t"];
    let stage = Stage::new(Setup { sql, tables: &tables, routes: &routes, ..Setup::default() });
    let stage = stage.await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO t VALUES (2, 'b', 'topsecret', 'y')").await;
    stage.settled().await;
    stage.execute("ALTER TABLE t DROP ssn").await;
    backfill(&stage, &["public.t"]).await;
    let got = stage.settled().await;
    let mut rows: Vec<_> = reads(&got).iter().map(|row| row.json()["after"].clone()).collect();
    rows.sort_by_key(|row| row["id"].as_i64());
    rows.dedup();
    let whole =
        [json!({"id": 1, "note": "a", "name": "x"}), json!({"id": 2, "note": "b", "name": "y"})];
    assert_eq!(rows, whole);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_table_that_was_created_again_is_read_in_one_session() {
    let sql = "CREATE TABLE t (id int PRIMARY KEY, note text, ssn text)";
    let routes = route("columns = { mask = [\"ssn\"] }");
    let tables = ["public.t"];
    let stage = Stage::new(Setup { sql, tables: &tables, routes: &routes, ..Setup::default() });
    let stage = stage.await;
    stage.start().await.stop().await.expect_code(0);
    stage
        .execute(&format!("DROP TABLE t; {sql}; INSERT INTO t VALUES (1, 'a', 'topsecret')"))
        .await;
    stage.run(&["init"]).await.expect_code(0);
    let resync = ["resync", "--accept-gap", "--reason", "it was created again"];
    stage.run(&resync).await.expect_code(0);
    let relay = stage.start().await;
    backfill(&stage, &["public.t"]).await;
    let got = stage.settled().await;
    let rows: Vec<_> = reads(&got).iter().map(|row| row.json()["after"].clone()).collect();
    assert_eq!(rows, [json!({"id": 1, "note": "a", "ssn": "***"})]);
    assert_eq!(relay.status().await["sessions"], 1);
    relay.stop().await.expect_code(0);
}
