//! What stops a relay that polls, or keeps it from starting: never a silent loss.

use crate::sources::POLL;
use crate::support::inbox::kinds;
use crate::support::stage::{Setup, Stage};

const SETUP: Setup<'static> =
    Setup { sql: "", tables: &[], settings: POLL, routes: "", source_url: "" };

const EMIT: &str = "SELECT watership.emit('order', '1', 'e', '1')";

/// One event has passed, and the relay is down.
async fn stopped() -> Stage {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    stage.execute(EMIT).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    stage
}

/// It does not start, says the verdict, and `check` and `resync` say the same.
async fn is_verdict(stage: &Stage, verdict: &str) {
    stage.run(&["run"]).await.expect_code(3).expect_text(&[verdict]);
    stage.run(&["check"]).await.expect_code(3).expect_text(&[verdict]);
}

/// A person accepts it: what comes from then on arrives.
async fn is_accepted(stage: &Stage, verdict: &str) {
    stage.run(&["resync"]).await.expect_code(3).expect_text(&[verdict, "Nothing was changed"]);
    let accept = ["resync", "--accept-gap", "--reason", "a test"];
    stage.run(&accept).await.expect_code(0).expect_text(&["resumes", "from now"]);
    assert!(stage.holds("(SELECT epoch FROM watership.checkpoint) = 2").await);
    assert_eq!(stage.text("SELECT verdicts[1] FROM watership.resync").await, verdict);
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('order', '1', 'after', '1')").await;
    let messages = stage.settled().await;
    assert_eq!(kinds(&messages), ["e", "after"]);
    assert!(messages[0].text("ws-position") < messages[1].text("ws-position"));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn another_cluster_is_a_verdict_and_can_be_accepted() {
    let stage = stopped().await;
    stage.execute("UPDATE watership.checkpoint SET system_identifier = '1'").await;
    is_verdict(&stage, "other_cluster").await;
    is_accepted(&stage, "other_cluster").await;
}

#[tokio::test]
async fn a_batch_that_was_deleted_is_a_verdict_and_can_be_accepted() {
    let stage = stopped().await;
    stage.execute("DELETE FROM watership.poll_batch").await;
    is_verdict(&stage, "batch_missing").await;
    is_accepted(&stage, "batch_missing").await;
}

#[tokio::test]
async fn a_snapshot_of_the_future_is_a_verdict_and_can_be_accepted() {
    let stage = stopped().await;
    stage.execute("UPDATE watership.poll_batch SET snapshot = '900000000:900000000:'").await;
    is_verdict(&stage, "checkpoint_ahead").await;
    is_accepted(&stage, "checkpoint_ahead").await;
}

#[tokio::test]
async fn rows_of_another_cluster_are_a_verdict_until_somebody_has_decided_about_them() {
    let stage = stopped().await;
    stage
        .execute(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, xid) \
             VALUES ('order', '1', 'foreign', '1', '900000000')",
        )
        .await;
    is_verdict(&stage, "foreign_rows").await;
    stage.run(&["resync"]).await.expect_code(1).expect_text(&["SET xid = pg_current_xact_id()"]);
    stage
        .execute(
            "UPDATE watership.outbox SET xid = pg_current_xact_id() \
             WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())",
        )
        .await;
    let relay = stage.start().await;
    assert_eq!(kinds(&stage.settled().await), ["e", "foreign"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn after_a_promotion_polling_goes_on_in_a_new_epoch() {
    let stage = stopped().await;
    stage.execute("UPDATE watership.checkpoint SET timeline = 0").await;
    stage.run(&["check"]).await.expect_text(&["promoted or restored"]);
    stage.execute("SELECT watership.emit('order', '1', 'after', '1')").await;
    let relay = stage.start().await;
    let messages = stage.settled().await;
    assert_eq!(kinds(&messages), ["e", "after"], "nothing is lost and nothing repeated");
    assert!(messages[1].text("ws-position").starts_with("00000002-"));
    relay.stop().await.expect_code(0).expect_text(&["another timeline"]);
}

#[tokio::test]
async fn a_missing_index_is_refused_with_its_statement_and_init_makes_it_again() {
    let stage = stopped().await;
    stage.execute("DROP INDEX watership.outbox_by_seq").await;
    let statement = ["CREATE INDEX outbox_by_seq ON watership.outbox (seq)"];
    stage.run(&["run"]).await.expect_code(1).expect_text(&statement);
    stage.run(&["check"]).await.expect_code(1).expect_text(&statement);
    stage.run(&["init"]).await.expect_code(0).expect_text(&["created", "(seq)"]);
    stage.start().await.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_checkpoint_of_the_other_mode_is_refused_by_every_command() {
    let polling = stopped().await;
    let reading = Stage::new(Setup::default()).await;
    for (stage, mode) in [(&polling, "wal"), (&reading, "poll")] {
        let text = stage.configuration();
        let line = text.lines().find(|line| line.starts_with("source.mode"));
        let without: String = text
            .lines()
            .filter(|l| !l.starts_with("source.mode") && !l.starts_with("source.slot"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert!(line.is_some() == (mode == "wal"));
        stage.replace_configuration(&format!("source.mode = \"{mode}\"\n{without}"));
        for command in ["run", "init", "resync", "check"] {
            let ended = stage.run(&[command]).await;
            ended.expect_code(1).expect_text(&["set source.mode back"]);
        }
    }
}

#[tokio::test]
async fn rows_that_were_there_before_are_refused_or_skipped_and_never_sent_by_chance() {
    let stage = Stage::new(Setup { settings: POLL, ..Setup::default() }).await;
    stage.execute(&format!("{EMIT}; DELETE FROM watership.checkpoint")).await;
    stage.run(&["init"]).await.expect_code(1).expect_text(&["--skip-existing"]);
    stage.run(&["init", "--skip-existing"]).await.expect_code(0).expect_text(&["skipped"]);
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('order', '1', 'new', '1')").await;
    assert_eq!(kinds(&stage.settled().await), ["new"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn what_init_prints_makes_a_relay_that_polls() {
    let stage = Stage::new(SETUP).await;
    stage.run(&["drop", "--yes"]).await.expect_code(0);
    let printed = stage.run(&["init", "--print-sql"]).await;
    printed.expect_code(0);
    let sql: Vec<&str> =
        printed.log.lines().filter(|line| !line.starts_with("warning: ")).collect();
    stage.execute(&sql.join("\n")).await;
    stage.run(&["init"]).await.expect_code(0).expect_text(&["exists   checkpoint"]);
    let relay = stage.start().await;
    stage.execute(EMIT).await;
    assert_eq!(kinds(&stage.settled().await), ["e"]);
    relay.stop().await.expect_code(0);
}
