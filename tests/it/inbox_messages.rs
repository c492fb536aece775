//! The calls that take a message from its delivery to its end: retries of many keys, old snapshots,
//! and the order of locks.

use tokio_postgres::Client;

use crate::inbox_sql::{Installed, code, pid, run, waits};
use crate::support::waiting::within;

/// Calls a function that says what is to be done about the message next; `more` are further
/// arguments.
async fn next(client: &Client, function: &str, id: &str, more: &str) -> Result<String, String> {
    let sql = format!(
        "SELECT next FROM watership_inbox.{function}('c', '{id}', now(), 'k', 'body', '{{}}'{more})"
    );
    client.query_one(&sql, &[]).await.map(|row| row.get(0)).map_err(code)
}

/// Parks a message of the key, and marks the key for retry. Returns its number.
async fn marked(client: &Client, id: &str) -> i64 {
    let given_up = next(client, "fail_message", id, ", NULL, 'why', true").await;
    assert_eq!(given_up, Ok("parked".into()));
    run(client, "SELECT watership_inbox.retry('c', key => 'k')").await;
    next_retry(client).await.expect("a marked message").0
}

async fn next_retry(client: &Client) -> Option<(i64, String)> {
    let sql = "SELECT retried, message_id FROM watership_inbox.next_retry('c')";
    let rows = client.query(sql, &[]).await.expect("the next one");
    rows.first().map(|row| (row.get(0), row.get(1)))
}

async fn end(client: &Client, id: &str, retried: i64) -> Result<(), String> {
    let sql = format!("SELECT watership_inbox.end_message('c', '{id}', {retried})");
    client.batch_execute(&sql).await.map_err(code)
}

#[tokio::test]
async fn a_retry_of_twenty_thousand_keys_locks_one() {
    let inbox = Installed::new().await;
    let many = "INSERT INTO watership_inbox.parked_key (consumer, lane, retry_at) \
                SELECT c.id, 'k' || n, now() + n * interval '1 ms' \
                FROM watership_inbox.consumer AS c, generate_series(1, 20000) AS n; \
                INSERT INTO watership_inbox.parked (consumer, lane, key, message_id, occurred_at, \
                    recorded, reason, properties, body) \
                SELECT c.id, 'k' || n, n::text, 'm' || n, now(), true, 'failed', '{}', '' \
                FROM watership_inbox.consumer AS c, generate_series(1, 20000) AS n";
    run(&inbox.admin, many).await;
    let sessions = [inbox.session().await, inbox.session().await];
    for (session, message) in sessions.iter().zip(["m1", "m2"]) {
        run(session, "BEGIN").await;
        let next = next_retry(session).await.map(|(_, message)| message);
        assert_eq!(next.as_deref(), Some(message), "the first that nobody has in hand");
        let locks = format!(
            "count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = {}",
            pid(session).await
        );
        assert_eq!(inbox.text(&locks).await, "1");
    }
}

#[tokio::test]
async fn a_message_parked_behind_a_retry_with_an_older_snapshot_keeps_its_key() {
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let inbox = Installed::new().await;
        let (a, b) = (inbox.session().await, inbox.session().await);
        let begin = format!("BEGIN ISOLATION LEVEL {level}");
        let retried = marked(&a, "m1").await;
        run(&b, &begin).await;
        assert_eq!(next(&b, "receive_message", "m2", "").await, Ok("parked".into()));
        run(&a, &begin).await;
        let a_pid = pid(&a).await;
        let first = tokio::spawn(async move {
            let received = next(&a, "receive_message", "m1", &format!(", {retried}")).await;
            (a, received)
        });
        waits(&inbox, a_pid).await;
        run(&b, "COMMIT").await;
        let (a, received) = within("it continues", first).await.expect("no panic");
        let ended = match received {
            Ok(_) => end(&a, "m1", retried).await,
            Err(code) => Err(code),
        };
        assert_eq!(ended, Err("40001".into()), "{level}");
        run(&a, "ROLLBACK").await;
        let waiting =
            "string_agg(message_id, ' ' ORDER BY id) FROM watership_inbox.parked_messages";
        assert_eq!(inbox.text(waiting).await, "m1 m2", "{level}");
        for id in ["m1", "m2"] {
            let (retried, message) = next_retry(&a).await.expect("a marked message");
            assert_eq!(message, id, "{level}");
            run(&a, &begin).await;
            let handle = next(&a, "receive_message", id, &format!(", {retried}")).await;
            assert_eq!(handle, Ok("handle".into()), "{level}");
            assert_eq!(end(&a, id, retried).await, Ok(()));
            run(&a, "COMMIT").await;
        }
        assert_eq!(inbox.text("count(*) FROM watership_inbox.parked").await, "0", "{level}");
    }
}

#[tokio::test]
async fn a_discard_with_an_older_snapshot_leaves_no_message_without_its_key() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    marked(&a, "m1").await;
    run(&b, "BEGIN").await;
    assert_eq!(next(&b, "receive_message", "m2", "").await, Ok("parked".into()));
    run(&a, "SET default_transaction_isolation = 'repeatable read'").await;
    let a_pid = pid(&a).await;
    let discard = "SELECT watership_inbox.discard('c', 'of no use', key => 'k')";
    let discarded = tokio::spawn(async move {
        let first = a.batch_execute(discard).await.map_err(code);
        (a, first)
    });
    waits(&inbox, a_pid).await;
    run(&b, "COMMIT").await;
    let (a, first) = within("it continues", discarded).await.expect("no panic");
    assert_eq!(first, Err("40001".into()));
    run(&a, discard).await;
    assert_eq!(inbox.text("count(*) FROM watership_inbox.discarded").await, "2");
    assert_eq!(inbox.text("count(*) FROM watership_inbox.parked").await, "0");
}

#[tokio::test]
async fn an_attempt_that_begins_waits_for_its_key_and_takes_nothing_from_who_has_it() {
    let inbox = Installed::new().await;
    let (a, b) = (inbox.session().await, inbox.session().await);
    run(&a, "BEGIN").await;
    assert_eq!(next(&a, "receive_message", "m1", "").await, Ok("handle".into()));
    let b_pid = pid(&b).await;
    // It is given up at once: its attempts and its key are both locked.
    let second =
        tokio::spawn(async move { next(&b, "begin_message", "m1", ", max_kills => 0").await });
    waits(&inbox, b_pid).await;
    let failed = next(&a, "fail_message", "m1", ", NULL, 'why'").await;
    assert_eq!(failed, Ok("again".into()), "no deadlock");
    run(&a, "COMMIT").await;
    assert_eq!(within("it continues", second).await.expect("no panic"), Ok("parked".into()));
}

#[tokio::test]
async fn a_retry_that_somebody_else_did_leaves_no_attempt() {
    let inbox = Installed::new().await;
    let a = inbox.session().await;
    let retried = marked(&a, "m1").await;
    let more = format!(", {retried}");
    run(&a, "SELECT watership_inbox.discard('c', 'of no use', key => 'k')").await;
    assert_eq!(next(&a, "begin_message", "m1", &more).await, Ok("handle".into()));
    assert_eq!(next(&a, "receive_message", "m1", &more).await, Ok("kept".into()));
    assert_eq!(inbox.text("count(*) FROM watership_inbox.unfinished_attempts").await, "0");
}
