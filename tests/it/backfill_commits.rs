//! A commit that has a place in the WAL and that nobody sees yet, because it waits for a standby:
//! what a backfill reads then is older than what the stream has brought.

use tokio::task::JoinHandle;
use watership::dev::{Postgres, StopMode};

use crate::backfill::{backfill, state};
use crate::support::servers::{client, database_of, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE TABLE t (id int PRIMARY KEY, v text); \
    INSERT INTO t SELECT g, 'old' FROM generate_series(1, 400) AS g";

/// Whether commits wait for a standby that is not there.
async fn standby(server: &Postgres, wanted: bool) {
    let name = if wanted { "nobody" } else { "" };
    let sql = format!("ALTER SYSTEM SET synchronous_standby_names = '{name}'");
    server.execute(&sql).await.expect("the setting is changed");
    server.execute("SELECT pg_reload_conf()").await.expect("the server reads it");
}

/// Starts an update that is committed and not visible; returns when the stream has brought it.
async fn hang(stage: &Stage, sql: &'static str) -> JoinHandle<()> {
    let committing = loop {
        let session = client(&stage.database.url).await.expect("a session");
        let pid = session.query_one("SELECT pg_backend_pid()", &[]).await.expect("its number");
        let pid: i32 = pid.get(0);
        let committing = tokio::spawn(async move {
            session.batch_execute(sql).await.expect("it commits in the end");
        });
        let waits = format!("pg_stat_activity WHERE pid = {pid} AND wait_event = 'SyncRep'");
        let waits = format!("(SELECT count(*) FROM {waits}) = 1");
        until("it waits, or has not waited", async || {
            committing.is_finished() || stage.holds(&waits).await
        })
        .await;
        // The checkpointer tells all others that commits wait, and may not have done so yet.
        if !committing.is_finished() {
            break committing;
        }
    };
    stage.inbox.wait("the update", |all| all.iter().any(|m| m.body.contains("new"))).await;
    committing
}

async fn stage(server: &Postgres, settings: &str) -> Stage {
    let tables = ["public.t"];
    let setup = Setup { sql: TABLE, tables: &tables, settings, ..Setup::default() };
    let stage = Stage::on(database_of(server), own_vhost().await, setup).await;
    stage.execute("SET synchronous_commit = local").await;
    stage
}

async fn last_value(stage: &Stage, id: i32) -> String {
    let got = stage.settled().await;
    let of = |m: &&crate::support::inbox::Message| m.json()["key"]["id"] == id;
    let last = got.iter().rfind(of).expect("it came").json();
    last["after"]["v"].as_str().expect("a value").to_owned()
}

#[tokio::test]
async fn a_commit_from_before_the_run_that_nobody_sees_yet_is_waited_for() {
    let mut server = private_postgres(&[], None).await;
    let stage = stage(&server, "").await;
    let _relay = stage.start().await;
    standby(&server, true).await;
    let committing = hang(&stage, "UPDATE t SET v = 'new' WHERE id = 7").await;
    let request = "INSERT INTO watership.backfill (name, table_name) VALUES ('shop', 'public.t')";
    stage.execute(request).await;
    until("it waits", async || {
        let now = state(&stage, "public.t").await;
        assert!(!now.starts_with("done"), "it read the row as it was before");
        now.contains("transactions that were open when it began")
    })
    .await;
    standby(&server, false).await;
    committing.await.expect("it commits");
    until("it is done", async || state(&stage, "public.t").await == "done").await;
    assert_eq!(last_value(&stage, 7).await, "new");
    server.stop(StopMode::Fast).await.expect("the server stops");
}

#[tokio::test]
async fn a_chunk_that_does_not_see_a_commit_before_its_mark_is_read_again() {
    let mut server = private_postgres(&[], None).await;
    let stage = stage(&server, "backfill.chunk_rows = 10\nbackfill.max_rate = 100").await;
    let _relay = stage.start().await;
    backfill(&stage, &["public.t", "--detach"]).await;
    until("it has begun", async || {
        stage.holds("(SELECT max(rows_read) > 0 FROM watership.backfill)").await
    })
    .await;
    standby(&server, true).await;
    let committing = hang(&stage, "UPDATE t SET v = 'new' WHERE id = 399").await;
    until("it waits", async || {
        let now = state(&stage, "public.t").await;
        assert!(!now.starts_with("done"), "it read the row as it was before");
        now.contains("committed and not visible")
    })
    .await;
    standby(&server, false).await;
    committing.await.expect("it commits");
    until("it is done", async || state(&stage, "public.t").await == "done").await;
    assert_eq!(last_value(&stage, 399).await, "new");
    server.stop(StopMode::Fast).await.expect("the server stops");
}
