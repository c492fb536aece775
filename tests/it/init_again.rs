//! `init` where another relay is, or one was before.

use watership::pg::connect::Options;
use watership::pg::replication::{ReplicationConnection, StreamOptions};
use watership::position::Lsn;
use watership::secret::Secret;

use crate::support::servers::{own_database, own_vhost};
use crate::support::stage::{Setup, Stage, configuration, run};
use crate::support::waiting::until;

#[tokio::test]
async fn a_relay_that_is_made_again_begins_after_every_epoch_it_has_had() {
    let stage = Stage::new(Setup::default()).await;
    let resync = ["resync", "--anyway", "--from", "checkpoint", "--accept-gap", "--reason", "test"];
    stage.run(&resync).await.expect_code(0);
    assert_eq!(stage.text("SELECT epoch FROM watership.checkpoint").await, "2");
    stage.execute("DELETE FROM watership.checkpoint").await;
    stage.run(&["init", "--admin-url", &stage.database.url]).await.expect_code(0);
    assert_eq!(stage.text("SELECT epoch FROM watership.checkpoint").await, "3");
}

#[tokio::test]
async fn a_slot_without_a_checkpoint_is_not_taken_from_who_reads_it() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute("DELETE FROM watership.checkpoint").await;
    let options = Options::parse(&Secret::new(&*stage.database.url)).expect("a URL");
    let reader = ReplicationConnection::connect(&options).await.expect("a connection");
    let asked = StreamOptions::default();
    let stream = reader.start(&stage.slot, Lsn::ZERO, &["watership"], asked).await;
    let stream = stream.expect("it reads");
    let init = ["init", "--admin-url", &stage.database.url];
    stage.run(&init).await.expect_code(1).expect_text(&["has no checkpoint", "reads it", "hint: "]);
    stream.close().await;
}

#[tokio::test]
async fn init_says_for_which_open_transaction_its_slot_waits() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let writer = database.connect().await;
    writer.batch_execute("BEGIN; CREATE TABLE t ()").await.expect("it is open");
    let pid: i32 = writer.query_one("SELECT pg_backend_pid()", &[]).await.expect("a pid").get(0);
    let slot = format!("slot_{}", database.name);
    let (file, _) = configuration(&database.url, &slot, &vhost, &Setup::default());
    let url = database.url.clone();
    let init = tokio::spawn(async move { run(&file, &["init", "--admin-url", &url]).await });
    let looked = format!(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = '{}' AND state = 'idle' \
         AND query LIKE '%pg_blocking_pids%')",
        database.name
    );
    let other = database.connect().await;
    let has_looked =
        async || other.query_one(&looked, &[]).await.expect("an answer").get::<_, bool>(0);
    until("it has looked", has_looked).await;
    writer.batch_execute("COMMIT").await.expect("it ends");
    let told = format!("the slot waits for open transactions to end: pid {pid} (");
    init.await.expect("no panic").expect_code(0).expect_text(&[&told, "created  slot"]);
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    other.batch_execute(&drop).await.expect("it is dropped");
}
