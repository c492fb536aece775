//! Handlers that fail, and what becomes of their messages.

use lapin::options::{BasicGetOptions, BasicNackOptions};
use lapin::types::AMQPValue;
use watership::inbox::{IsolationLevel, OnFailure};

use crate::stage::{Failing, Stage, now};
use crate::support::waiting::until;

const DAY: u64 = 86_400;

fn header(message: &lapin::message::Delivery, name: &str) -> String {
    match message.properties.headers().as_ref().and_then(|h| h.inner().get(name)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        Some(AMQPValue::LongLongInt(n)) => n.to_string(),
        other => panic!("{name}: {other:?}"),
    }
}

#[tokio::test]
async fn a_message_that_fails_is_parked_and_its_key_waits_in_order_until_the_retry() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("bad", "error");
    let running = failing.run(stage.inbox().max_failures(3));
    stage.publish("m1", "k", "bad").await;
    for n in 2..=5 {
        stage.publish(&format!("m{n}"), "k", &n.to_string()).await;
    }
    stage.publish("m6", "other", "6").await;
    stage.effects_come(1).await;
    until("the key is parked", async || stage.parked().await.len() == 5).await;
    let parked = ["m1 failed", "m2 behind", "m3 behind", "m4 behind", "m5 behind"];
    assert_eq!(stage.parked().await, parked);
    assert_eq!(stage.effects("%").await, ["6"], "another key continues");
    assert_eq!(stage.counted("failures_total", ""), 3);
    assert_eq!(stage.counted("parked_total", "reason=\"failed\""), 1);
    assert_eq!(stage.counted("parked_total", "reason=\"behind\""), 4);
    assert_eq!(stage.waiting().await, 0);

    // It fails again: everything stays.
    let retry = format!("watership_inbox.retry('{}', key => 'k')", stage.consumer);
    assert_eq!(stage.text(&retry).await, "1");
    let attempts = "SELECT attempts FROM watership_inbox.parked_keys";
    until("the retry has failed", async || stage.text(attempts).await == "1").await;
    assert_eq!(stage.parked().await.len(), 5);
    let error = "SELECT last_error FROM watership_inbox.parked_keys";
    assert_eq!(stage.text(error).await, "the handler's own error");

    failing.heal();
    assert_eq!(stage.text(&retry).await, "1");
    until("all are handled", async || stage.effects("k").await.len() == 5).await;
    assert_eq!(stage.effects("k").await, ["bad", "2", "3", "4", "5"]);
    // The key lives again.
    stage.publish("m7", "k", "7").await;
    until("the key lives", async || stage.effects("k").await.len() == 6).await;
    assert!(stage.parked().await.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_failure_that_passes_keeps_the_order_of_its_key() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("1", "error");
    let running = failing.run(stage.inbox().max_failures(1000));
    for n in 1..=5 {
        stage.publish(&format!("m{n}"), "k", &n.to_string()).await;
    }
    until("it has failed", async || stage.counted("failures_total", "") >= 2).await;
    assert!(stage.effects("%").await.is_empty());
    failing.heal();
    assert_eq!(stage.effects_come(5).await, ["1", "2", "3", "4", "5"]);
    until("no attempt is open", async || {
        stage.text("SELECT count(*) FROM watership_inbox.unfinished_attempts").await == "0"
    })
    .await;
    running.stop().await;
}

#[tokio::test]
async fn a_final_error_a_panic_and_a_transaction_that_the_handler_spoilt_are_failures() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    let kinds = ["permanent", "panic", "aborted", "ended"];
    kinds.iter().for_each(|kind| failing.fail(kind, kind));
    let running = failing.run(stage.inbox().max_failures(2));
    for kind in kinds {
        stage.publish(kind, kind, kind).await;
    }
    stage.publish("m", "k", "good").await;
    until("all four are parked", async || stage.parked().await.len() == 4).await;
    assert_eq!(stage.effects_come(1).await, ["good"]);
    let error = |id: &str| {
        format!("SELECT error FROM watership_inbox.parked_messages WHERE message_id = '{id}'")
    };
    assert_eq!(stage.text(&error("permanent")).await, "it can never be handled");
    let panicked = "the handler panicked: the handler's own panic";
    assert_eq!(stage.text(&error("panic")).await, panicked);
    let aborted = stage.text(&error("aborted")).await;
    assert!(aborted.contains("hid an error of the database"), "{aborted}");
    assert!(aborted.contains("25P02"), "{aborted}");
    let ended = stage.text(&error("ended")).await;
    assert!(ended.contains("the handler ended the transaction"), "{ended}");
    // The final one was not tried again: 1 + 2 + 2 + 2.
    assert_eq!(stage.counted("failures_total", ""), 7);
    assert!(running.is_running());
    running.stop().await;
}

#[tokio::test]
async fn a_message_whose_handler_ends_the_transaction_is_parked_and_no_retry_loses_it() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    let kinds = ["aborted", "ended", "restarted"];
    kinds.iter().for_each(|kind| failing.fail(kind, kind));
    // Attempts between the first and the last record that they have ended.
    let running = failing.run(stage.inbox().max_failures(4));
    for kind in kinds {
        stage.publish(kind, kind, kind).await;
    }
    until("all of them are parked", async || stage.parked().await.len() == 3).await;
    let told = "SELECT count(*) FROM watership_inbox.parked_messages \
        WHERE error LIKE '%the handler %' AND error NOT LIKE '%committing%'";
    assert_eq!(stage.text(told).await, "3");
    let retry = format!("watership_inbox.retry('{}', all_keys => true)", stage.consumer);
    let failed = "(SELECT count(*) FROM watership_inbox.parked_messages WHERE attempts = 1)";
    assert_eq!(stage.text(&retry).await, "3");
    until("all of them have failed again", async || stage.text(failed).await == "3").await;
    assert_eq!(stage.parked().await.len(), 3);
    assert!(stage.effects("%").await.is_empty());
    failing.heal();
    assert_eq!(stage.text(&retry).await, "3");
    assert_eq!(stage.effects_come(3).await.len(), 3);
    until("none is parked", async || stage.parked().await.is_empty()).await;
    running.stop().await;
}

#[tokio::test]
async fn an_effect_that_only_the_commit_refuses_is_a_failure() {
    let stage = Stage::new().await;
    stage
        .sql
        .batch_execute(
            "ALTER TABLE effect ADD CONSTRAINT once UNIQUE (body) DEFERRABLE INITIALLY DEFERRED",
        )
        .await
        .expect("a deferred constraint");
    stage.publish("m1", "a", "same").await;
    stage.publish("m2", "b", "same").await;
    let running = Failing::default().run(stage.inbox().max_failures(2));
    until("one of them is parked", async || stage.parked().await.len() == 1).await;
    assert_eq!(stage.effects_come(1).await, ["same"]);
    running.stop().await;
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn a_dead_letter_says_why_and_is_handled_when_it_is_moved_back() {
    let stage = Stage::new().await;
    stage.declare_queue("dead", &[]).await;
    let failing = Failing::default();
    failing.fail("bad", "error");
    let to = OnFailure::DeadLetter { exchange: String::new(), routing_key: "dead".into() };
    let running = failing.run(stage.inbox().max_failures(2).on_failure(to));
    let at = now();
    stage.publish_at("m1", Some(at), "k", "bad").await;
    stage.publish("m2", "k", "2").await;
    let letter = stage.get("dead").await;
    assert_eq!(letter.data, b"bad");
    assert_eq!(header(&letter, "ws-dead-consumer"), stage.consumer);
    assert_eq!(header(&letter, "ws-dead-reason"), "failed");
    assert_eq!(header(&letter, "ws-dead-error"), "the handler's own error");
    assert_eq!(header(&letter, "ws-dead-failures"), "2");
    assert_eq!(header(&letter, "ws-key"), "k");
    assert_eq!(*letter.properties.timestamp(), Some(at));
    assert_eq!(stage.effects_come(1).await, ["2"], "the key continues");
    assert!(stage.parked().await.is_empty());

    failing.heal();
    stage.publish_with(letter.delivery.properties.clone(), "bad").await;
    assert_eq!(stage.effects_come(2).await, ["2", "bad"]);
    running.stop().await;
    assert_eq!(stage.counted("dead_lettered_total", "reason=\"failed\""), 1);
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn a_dead_letter_that_nobody_takes_stays_in_its_queue() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("bad", "permanent");
    let to = OnFailure::DeadLetter { exchange: String::new(), routing_key: "nowhere".into() };
    let running = failing.run(stage.inbox().on_failure(to));
    stage.publish("m1", "k", "bad").await;
    stage.publish("m2", "k", "2").await;
    stage.publish("m3", "other", "3").await;
    assert_eq!(stage.effects_come(1).await, ["3"]);
    until("it has failed", async || stage.counted("failures_total", "") > 0).await;
    running.stop().await;
    // Both of the key go back, in order.
    until("both are in the queue", async || stage.waiting().await == 2).await;
    assert_eq!(stage.get(&stage.queue).await.data, b"bad");
    assert_eq!(stage.counted("dead_lettered_total", ""), 0);
}

#[tokio::test]
async fn what_is_older_than_the_window_is_parked_and_handled_once_on_request() {
    let stage = Stage::new().await;
    let running = stage.start();
    for _ in 0..2 {
        stage.publish_at("old", Some(now() - 30 * DAY), "k", "old").await;
    }
    stage.publish_at("early", Some(now() + 5 * DAY), "k2", "early").await;
    stage.publish_at("recent", Some(now() - 3 * DAY), "k3", "recent").await;
    stage.publish_at("recent", Some(now() - 3 * DAY), "k3", "recent").await;
    assert_eq!(stage.effects_come(1).await, ["recent"]);
    until("two are parked", async || stage.parked().await.len() == 2).await;
    let mut parked = stage.parked().await;
    parked.sort();
    assert_eq!(parked, ["early beyond_tomorrow", "old beyond_window"]);
    until("parked is counted", async || {
        stage.counted("parked_total", "reason=\"beyond_window\"") >= 1
    })
    .await;
    let retry =
        |more: &str| format!("watership_inbox.retry('{}', all_keys => true{more})", stage.consumer);
    assert_eq!(stage.text(&retry("")).await, "0", "only by name");
    assert_eq!(stage.text(&retry(", beyond_window => true")).await, "2");
    until("both are handled", async || stage.effects("%").await.len() == 3).await;
    // Handled now, so known.
    stage.publish_at("old", Some(now() - 30 * DAY), "k", "old").await;
    until("it is parked once more", async || stage.parked().await.len() == 1).await;
    assert_eq!(stage.text(&retry(", beyond_window => true")).await, "1");
    until("it is found to be handled", async || stage.parked().await.is_empty()).await;
    assert_eq!(stage.effects("%").await.len(), 3);
    running.stop().await;
}

#[tokio::test]
async fn what_cannot_be_serialized_is_tried_again_and_is_no_failure() {
    let stage = Stage::new().await;
    stage
        .sql
        .batch_execute(
            "CREATE TABLE total (n bigint); INSERT INTO total VALUES (0);
             GRANT ALL ON total TO PUBLIC",
        )
        .await
        .expect("a table");
    stage.publish_many(40, 40).await;
    let inbox = stage.inbox().isolation(IsolationLevel::Serializable).max_failures(1);
    let running = crate::stage::run(inbox, |message, tx| {
        Box::pin(async move {
            let row = tx.query_one("SELECT n FROM total", &[]).await?;
            tx.execute("UPDATE total SET n = $1", &[&(row.get::<_, i64>(0) + 1)]).await?;
            crate::stage::record(message, tx).await
        })
    });
    let all = async || stage.effects("%").await.len() + stage.parked().await.len() == 40;
    until("all are handled", all).await;
    let handled = stage.effects("%").await.len().to_string();
    assert_eq!(stage.text("SELECT n FROM total").await, handled, "no update is lost");
    assert!(stage.counted("retries_total", "") > 0, "they met");
    running.stop().await;
}

#[tokio::test]
async fn an_error_for_another_try_becomes_a_failure_only_in_the_end() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("bad", "serialization");
    let running = failing.run(stage.inbox().max_failures(1));
    stage.publish("m1", "k", "bad").await;
    until("it is parked in the end", async || stage.parked().await == ["m1 failed"]).await;
    assert_eq!(stage.counted("retries_total", ""), 9);
    assert_eq!(stage.counted("failures_total", ""), 1);
    running.stop().await;
}

#[tokio::test]
async fn an_inbox_that_nobody_maintained_is_maintained_and_the_message_handled() {
    let stage = Stage::new().await;
    let running = stage.start();
    stage.publish("m0", "k", "0").await;
    stage.effects_come(1).await;
    // As if the last call had been forty days ago.
    let back = "UPDATE watership_inbox.ring SET first_day = first_day - 40, \
                emptied_before = emptied_before - 40";
    stage.sql.batch_execute(back).await.expect("set back");
    stage.publish("m1", "k", "1").await;
    assert_eq!(stage.effects_come(2).await, ["0", "1"]);
    running.stop().await;
}

#[tokio::test]
async fn conflicts_while_a_parked_message_is_retried_are_no_kills() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("m", "error");
    let running = failing.run(stage.inbox().max_failures(1).max_kills(2));
    stage.publish("m", "k", "m").await;
    until("it is parked", async || stage.parked().await.len() == 1).await;
    failing.heal();
    failing.fail("m", "serialization");
    let retry = format!("watership_inbox.retry('{}', key => 'k')", stage.consumer);
    assert_eq!(stage.text(&retry).await, "1");
    let attempts = "SELECT attempts FROM watership_inbox.parked_keys";
    until("the retry has failed", async || stage.text(attempts).await == "1").await;
    let error = stage.text("SELECT last_error FROM watership_inbox.parked_keys").await;
    assert!(error.contains("40001"), "{error}");
    assert!(stage.counted("retries_total", "") > 2);
    running.stop().await;
}

#[tokio::test]
async fn a_redelivered_message_that_waits_behind_its_key_leaves_no_attempt() {
    let stage = Stage::new().await;
    let failing = Failing::default();
    failing.fail("bad", "error");
    let running = failing.run(stage.inbox().max_failures(1));
    stage.publish("m1", "k", "bad").await;
    until("the key is parked", async || stage.parked().await.len() == 1).await;
    running.stop().await;
    stage.publish("m2", "k", "2").await;
    let mut got = None;
    until("it is delivered once", async || {
        let (queue, options) = (stage.queue.as_str().into(), BasicGetOptions::default());
        got = stage.channel.basic_get(queue, options).await.expect("an answer");
        got.is_some()
    })
    .await;
    let again = BasicNackOptions { requeue: true, multiple: false };
    got.expect("a message").nack(again).await.expect("it is requeued");
    let running = failing.run(stage.inbox().max_failures(1));
    until("it waits behind its key", async || stage.parked().await.len() == 2).await;
    assert_eq!(stage.counted("redelivered_total", ""), 1);
    let attempts = "SELECT count(*) FROM watership_inbox.attempt WHERE message_id = 'm2'";
    assert_eq!(stage.text(attempts).await, "0");
    running.stop().await;
}

#[tokio::test]
async fn a_lock_that_does_not_come_is_no_failure_of_the_message() {
    let stage = Stage::new().await;
    let set = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET lock_timeout = 2000', \
        current_database()); END $$";
    stage.sql.batch_execute(set).await.expect("it is set");
    let other = stage.database.connect().await;
    let receive = format!(
        "BEGIN; SELECT watership_inbox.receive('{}', 'other', now(), 'k', '')",
        stage.consumer
    );
    other.batch_execute(&receive).await.expect("it holds the key");
    let running = Failing::default().run(stage.inbox().max_failures(1));
    stage.publish("m", "k", "m").await;
    let waits = "SELECT count(*) FROM pg_stat_activity \
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("the inbox waits", async || stage.text(waits).await == "1").await;
    until("it has given up", async || stage.text(waits).await == "0").await;
    assert!(stage.parked().await.is_empty());
    assert_eq!(stage.counted("failures_total", ""), 0);
    other.batch_execute("ROLLBACK").await.expect("it ends");
    assert_eq!(stage.effects_come(1).await, ["m"]);
    running.stop().await;
}
