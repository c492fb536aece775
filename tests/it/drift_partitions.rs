//! Drift of partitioned tables, captured by their root or partition by partition.

use std::collections::BTreeMap;

use crate::parking::{parked, rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE TABLE roots (id int PRIMARY KEY, n int, note text) \
        PARTITION BY RANGE (id); \
    CREATE TABLE roots_1 PARTITION OF roots FOR VALUES FROM (0) TO (10); \
    CREATE TABLE roots_2 PARTITION OF roots DEFAULT; \
    ALTER TABLE roots_1 REPLICA IDENTITY FULL; ALTER TABLE roots_2 REPLICA IDENTITY FULL; \
    ALTER TABLE roots REPLICA IDENTITY FULL";

fn route(name: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\ntable = \"public.{name}\"\nexchange = \"watership\"\n\
         on_drift = \"park\"\n"
    )
}

/// The states of each row, in the order of arrival.
fn states(messages: &[Message]) -> BTreeMap<i64, Vec<i64>> {
    let mut rows: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for message in messages {
        let body = message.json();
        let number = |name: &str| body["after"][name].as_i64().expect("a number");
        rows.entry(number("id")).or_default().push(number("n"));
    }
    rows
}

async fn accept_and_retry(stage: &Stage, tables: &[&str]) {
    for table in tables {
        stage.run(&["schema", "accept", table]).await.expect_code(0);
    }
    let relay = stage.start().await;
    parked(stage, &["retry", "--all"]).await;
    until("all are released", async || {
        rows(stage).await.iter().all(|row| row.starts_with("released "))
    })
    .await;
    stage.execute("UPDATE roots SET n = n + 1").await;
    let all = BTreeMap::from([(1, vec![1, 2, 3, 4]), (11, vec![1, 2, 3, 4])]);
    assert_eq!(states(&stage.settled().await), all);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_root_that_changes_parks_the_rows_of_all_its_partitions() {
    let (tables, routes) = (["public.roots"], route("roots"));
    let stage =
        Stage::new(Setup { sql: TABLE, tables: &tables, routes: &routes, ..Setup::default() })
            .await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO roots VALUES (1, 1), (11, 1)").await;
    stage.execute("UPDATE roots SET n = n + 1").await;
    // Nothing of it is another for those who read the root.
    stage.execute("CREATE TABLE more PARTITION OF roots FOR VALUES FROM (20) TO (30)").await;
    stage.execute("ALTER TABLE more REPLICA IDENTITY FULL").await;
    assert_eq!(stage.settled().await.len(), 4);
    stage.execute("ALTER TABLE roots DROP COLUMN note").await;
    stage.execute("UPDATE roots SET n = n + 1").await;
    until("both rows are parked", async || rows(&stage).await == ["parked drift"; 2]).await;
    relay.stop().await.expect_code(0);
    accept_and_retry(&stage, &tables).await;
}

#[tokio::test]
async fn a_partition_that_is_captured_by_itself_drifts_by_itself() {
    let tables = ["public.roots_1", "public.roots_2"];
    let routes = [route("roots_1"), route("roots_2")].concat();
    let stage =
        Stage::new(Setup { sql: TABLE, tables: &tables, routes: &routes, ..Setup::default() })
            .await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO roots VALUES (1, 1), (11, 1)").await;
    stage.execute("UPDATE roots SET n = n + 1").await;
    stage.execute("ALTER TABLE roots_1 REPLICA IDENTITY DEFAULT").await;
    stage.execute("UPDATE roots SET n = n + 1").await;
    until("its row is parked", async || rows(&stage).await == ["parked drift"]).await;
    let only = "(SELECT bool_and(route = 'roots_1') FROM watership.parked)";
    assert!(stage.holds(only).await);
    assert_eq!(states(&stage.settled().await)[&11], [1, 2, 3]);
    relay.stop().await.expect_code(0);
    accept_and_retry(&stage, &tables).await;
}
