//! `init` where another relay is, or one was before.

use watership::pg::connect::Options;
use watership::pg::replication::{ReplicationConnection, StreamOptions};
use watership::position::Lsn;
use watership::secret::Secret;

use crate::support::stage::{Setup, Stage};

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
