//! Parking at the consumer: what races on one key, what is retried, and who may do what.

use tokio_postgres::Client;

use crate::inbox_sql::{Installed, code, pid, refused, run, waits};
use crate::support::waiting::within;

/// Receives a message of `days_ago`.
async fn receive(client: &Client, id: &str, days_ago: i32, key: &str) -> Result<String, String> {
    let sql = "SELECT watership_inbox.receive('c', $1, now() - $2::integer * interval '1 day', \
               nullif($3, ''), 'body', '{\"type\": \"x\"}')";
    client.query_one(sql, &[&id, &days_ago, &key]).await.map(|row| row.get(0)).map_err(code)
}

async fn received(client: &Client, id: &str, key: &str) -> String {
    receive(client, id, 0, key).await.expect("received")
}

async fn park(client: &Client, id: &str, key: &str) -> bool {
    let sql = "SELECT watership_inbox.park('c', $1, now(), nullif($2, ''), 'failed', 'x', 'body')";
    client.query_one(sql, &[&id, &key]).await.expect("parked").get(0)
}

async fn retry(client: &Client, key: &str) -> i64 {
    let sql = "SELECT watership_inbox.retry('c', key => $1)";
    client.query_one(sql, &[&key]).await.expect("marked").get(0)
}

/// The parked message that this session has to handle now.
async fn next(client: &Client) -> Option<(i64, String)> {
    let sql = "SELECT id, message_id FROM watership_inbox.retry_next('c')";
    let rows = client.query(sql, &[]).await.expect("the next one");
    rows.first().map(|row| (row.get(0), row.get(1)))
}

async fn done(client: &Client, id: i64) -> i64 {
    let sql = "SELECT watership_inbox.retry_done($1)";
    client.query_one(sql, &[&id]).await.expect("done").get(0)
}

#[tokio::test]
async fn nothing_passes_between_a_failure_and_its_parking() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    run(&a, "BEGIN").await;
    assert_eq!(received(&a, "m1", "k").await, "handle");
    run(&a, "SAVEPOINT watership_handler").await;
    let b_pid = pid(&b).await;
    let second = tokio::spawn(async move { received(&b, "m2", "k").await });
    waits(&inbox, b_pid).await;
    let c = inbox.session().await;
    assert_eq!(received(&c, "m3", "other").await, "handle", "another key continues");
    run(&a, "ROLLBACK TO watership_handler").await;
    assert!(park(&a, "m1", "k").await);
    run(&a, "COMMIT").await;
    assert_eq!(within("it continues", second).await.expect("no panic"), "parked");
    let order = "string_agg(message_id || ' ' || reason, ', ' ORDER BY id) \
                 FROM watership_inbox.parked_messages";
    assert_eq!(inbox.text(order).await, "m1 failed, m2 behind");
    assert_eq!(inbox.text("count(*) FROM watership_inbox.duplicates").await, "0");
}

#[tokio::test]
async fn a_snapshot_from_before_a_parking_is_refused_and_then_sees_it() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let inbox = Installed::new().await;
        let (a, b) = (inbox.session().await, inbox.session().await);
        let begin =
            format!("BEGIN ISOLATION LEVEL {level}; SELECT * FROM watership_inbox.remembered");
        run(&b, &begin).await;
        assert!(park(&a, "m1", "k").await);
        assert_eq!(receive(&b, "m2", 0, "k").await, Err("40001".into()), "{level}");
        run(&b, "ROLLBACK").await;
        run(&b, &begin).await;
        assert_eq!(received(&b, "m2", "k").await, "parked", "{level}");
        run(&b, "COMMIT").await;
        // And the other way round: the key lives again, and the snapshot does not know.
        run(&b, &begin).await;
        retry(&a, "k").await;
        for waiting in [1, 0] {
            run(&a, "BEGIN").await;
            let (id, _) = next(&a).await.expect("a parked message");
            assert_eq!(done(&a, id).await, waiting);
            run(&a, "COMMIT").await;
        }
        assert_eq!(receive(&b, "m3", 0, "k").await, Err("40001".into()), "{level}");
        run(&b, "ROLLBACK").await;
        assert_eq!(received(&b, "m3", "k").await, "handle", "{level}");
    }
}

#[tokio::test]
async fn a_message_that_comes_during_the_last_retry_waits_for_its_end() {
    for (end, expected) in [("COMMIT", "handle"), ("ROLLBACK", "parked")] {
        let inbox = Installed::new().await;
        let (a, b) = (inbox.session().await, inbox.session().await);
        assert!(park(&a, "m1", "k").await);
        assert_eq!(retry(&a, "k").await, 1);
        run(&a, "BEGIN").await;
        let (id, message) = next(&a).await.expect("a parked message");
        assert_eq!((message.as_str(), done(&a, id).await), ("m1", 0));
        let other = inbox.session().await;
        assert_eq!(next(&other).await, None, "one at a time");
        let b_pid = pid(&b).await;
        let second = tokio::spawn(async move { received(&b, "m2", "k").await });
        waits(&inbox, b_pid).await;
        run(&a, end).await;
        assert_eq!(within("it continues", second).await.expect("no panic"), expected);
    }
}

#[tokio::test]
async fn two_retries_of_one_message_have_one_effect() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    for id in ["m1", "m2"] {
        received(&a, id, id).await;
        assert!(!park(&a, id, id).await, "it was handled");
        assert!(park(&a, &format!("{id}b"), "k").await);
    }
    retry(&a, "k").await;
    // A snapshot that shows the message, which somebody else then handles.
    run(&b, "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT * FROM watership_inbox.parked_keys")
        .await;
    run(&a, "BEGIN").await;
    let (id, _) = next(&a).await.expect("a parked message");
    assert_eq!(done(&a, id).await, 1);
    run(&a, "COMMIT").await;
    if let Some((id, _)) = next(&b).await {
        let sql = format!("SELECT watership_inbox.retry_done({id})");
        assert_eq!(refused(&b, &sql).await, "40001", "its effect is rolled back");
    }
    run(&b, "ROLLBACK").await;
    assert_eq!(next(&b).await.map(|(_, message)| message), Some("m2b".into()));
}

#[tokio::test]
async fn a_message_from_the_future_that_was_retried_is_known_when_its_day_has_come() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    assert_eq!(receive(&a, "m", -3, "k").await, Ok("parked".into()));
    assert_eq!(receive(&a, "m", -3, "k").await, Ok("parked".into()));
    assert_eq!(inbox.text("count(*) FROM watership_inbox.parked_messages").await, "1");
    let beyond = "SELECT watership_inbox.retry('c', key => 'k', beyond_window => true)";
    run(&a, beyond).await;
    run(&a, "BEGIN").await;
    let (id, _) = next(&a).await.expect("a parked message");
    assert_eq!(done(&a, id).await, 0);
    run(&a, "COMMIT").await;
    // Its next delivery looks into the slot of its day.
    let recorded = "count(*) FROM watership_inbox.seen WHERE message_id = 'm' \
                    AND day = (now() AT TIME ZONE 'UTC')::date + 3";
    assert_eq!(inbox.text(recorded).await, "1");
    assert_eq!(receive(&a, "m", -3, "k").await, Ok("parked".into()));
    run(&a, beyond).await;
    assert_eq!(next(&a).await, None, "it was handled");
    assert_eq!(inbox.text("count(*) FROM watership_inbox.parked_messages").await, "0");
}

#[tokio::test]
async fn a_key_that_no_index_takes_is_parked_retried_and_discarded() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    // Not compressible.
    let key: String = std::iter::repeat_with(fastrand::alphanumeric).take(20_000).collect();
    assert_eq!(received(&a, "m1", &key).await, "handle");
    assert!(park(&a, "m2", &key).await);
    assert_eq!(received(&a, "m3", &key).await, "parked");
    assert_eq!(retry(&a, &key).await, 1);
    run(&a, "BEGIN").await;
    let (id, _) = next(&a).await.expect("a parked message");
    assert_eq!(done(&a, id).await, 1);
    run(&a, "COMMIT").await;
    let discard = "SELECT watership_inbox.discard('c', 'of no use', key => $1)";
    assert_eq!(a.query_one(discard, &[&key]).await.expect("discarded").get::<_, i64>(0), 1);
    assert_eq!(received(&a, "m3", &key).await, "duplicate", "it counts as handled");
    assert_eq!(received(&a, "m4", &key).await, "handle", "the key lives");
}

#[tokio::test]
async fn a_consumers_user_can_do_all_of_it_and_take_nothing_away() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    for call in [
        "register('c')",
        "claim('c', 'm1', now())",
        "claim('c', 'm1', now(), '\\x01', true)",
        "claim('c', 'm2')",
        "claim_many('c', ARRAY['m3'], ARRAY[now()])",
        "receive('c', 'm4', now(), 'k', 'x')",
        "receive('c', 'm5', NULL, NULL, 'x', '{}')",
        "park('c', 'm6', now(), 'k', 'failed', NULL, 'x')",
        "retry('c', key => 'k')",
        "retry_next('c')",
        "retry_failed(1, 'x')",
        "discard('c', 'why', key => 'k')",
        "attempt_started('c', 'm7')",
        "attempt_failed('c', 'm7', 'x')",
        "attempt_ended('c', 'm7')",
        "begin_message('c', 'm8', now(), 'k2', 'x', '{}')",
        "receive_message('c', 'm8', now(), 'k2', 'x', '{}')",
        "fail_message('c', 'm9', now(), 'k2', 'x', '{}', NULL, 'why')",
        "end_message('c', 'm8')",
        "suspect('c', 'm8')",
        "next_retry('c')",
        "forget('c', 'm1')",
        "maintain()",
    ] {
        run(&a, &format!("SELECT watership_inbox.{call}")).await;
    }
    for view in ["remembered", "processed_per_hour", "seen", "duplicates", "body_mismatches"] {
        run(&a, &format!("SELECT * FROM watership_inbox.{view}")).await;
    }
    let tables = "SELECT c.relname FROM pg_class AS c WHERE c.relkind IN ('r', 'p') \
                  AND c.relnamespace = 'watership_inbox'::regnamespace";
    for row in inbox.admin.query(tables, &[]).await.expect("the tables") {
        let table: &str = row.get(0);
        for statement in ["DELETE FROM", "TRUNCATE"] {
            let sql = format!("{statement} watership_inbox.{table}");
            assert_eq!(refused(&a, &sql).await, "42501", "{sql}");
        }
        let column = if table == "parked" { "body" } else { "*" };
        if matches!(table, "parked" | "attempt" | "ring" | "generation" | "discarded") {
            let sql = format!("SELECT {column} FROM watership_inbox.{table}");
            assert_eq!(refused(&a, &sql).await, "42501", "{sql}");
        }
    }
    for call in
        ["turn_ring(now()::date)", "turn_generation(now())", "empty_slots('claimed', '{0}')"]
    {
        assert_eq!(refused(&a, &format!("SELECT watership_inbox.{call}")).await, "42501", "{call}");
    }
}
