//! Canaries that are missing between two: a verdict of every start until somebody accepts the gap,
//! and no verdict where a session in between did not keep the last one.

use crate::position::{assert_goes_on, emit, stage};
use crate::support::waiting::until;

#[tokio::test]
async fn a_canary_that_a_later_one_overtook_is_a_verdict() {
    let stage = stage("relay.canary_interval = \"1s\"").await;
    let relay = stage.start().await;
    until("two canaries came", async || {
        relay.status().await["canary_age_seconds"].as_f64().is_some()
            && stage.holds("(SELECT coalesce(max(number), 0) >= 2 FROM watership.canary)").await
    })
    .await;
    // An event moves the checkpoint past the canaries so far.
    stage.execute(&emit("before")).await;
    stage.settled().await;
    // As if the publication had left out five while events went on.
    stage.execute("UPDATE watership.canary SET number = number + 5").await;
    stage.execute(&emit("past")).await;
    let ended = relay.ended().await;
    ended.expect_code(3).expect_text(&[
        "stream_deaf: ",
        "without all of canaries",
        "may be missing",
    ]);
    // The position may be past the gap by now.
    stage.execute(&emit("later")).await;
    let begins = stage.text("SELECT canary_lsn FROM watership.checkpoint").await;
    let again = stage.spawn().ended().await;
    let range = format!("committed between {begins} and ");
    again.expect_code(3).expect_text(&["stream_deaf: ", &range, "--anyway --from checkpoint"]);
    let asked = ["resync", "--accept-gap", "--reason", "x", "--anyway", "--from", "checkpoint"];
    stage.run(&asked).await.expect_code(0);
    let gap = format!("(SELECT gap_from <= '{begins}' FROM watership.resync)");
    assert!(stage.holds(&gap).await, "it begins where the last canary came");
    let relay = stage.start().await;
    assert_goes_on(&stage).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_session_that_does_not_keep_the_canary_makes_the_next_one_forget_it() {
    let stage = stage("relay.canary_interval = \"1s\"").await;
    let relay = stage.start().await;
    until("a canary is stored", async || {
        stage.execute(&emit("before")).await;
        stage.holds("(SELECT canary IS NOT NULL FROM watership.checkpoint)").await
    })
    .await;
    relay.stop().await.expect_code(0);
    // As an older version does, which writes canaries and does not know the columns.
    stage.execute("UPDATE watership.checkpoint SET session_no = session_no + 1").await;
    stage.execute("UPDATE watership.canary SET number = number + 5").await;
    let flush = "UPDATE watership.checkpoint SET flush_mark = pg_current_wal_lsn() - '0/0'";
    stage.execute(flush).await;
    let relay = stage.start().await;
    assert!(stage.holds("(SELECT canary IS NULL FROM watership.checkpoint)").await);
    stage.execute(&emit("after")).await;
    until("it comes", async || {
        let got = stage.inbox.wait("anything", |all| !all.is_empty()).await;
        got.iter().any(|message| message.kind() == "after")
    })
    .await;
    relay.stop().await.expect_code(0);
}
