//! What is settled and cannot be stored: it is bounded, it is said, and nothing of it is lost.

use std::collections::HashMap;
use std::process::Command;

use crate::support::inbox::Message;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// Events that are settled and not stored, at most, and entries of the window.
const LIMITS: &str = "relay.max_unstored_events = 50\nrelay.max_window_events = 20";
const BOUND: usize = 70;
const CONFIRMED: &str = "watership_messages_confirmed_total{route=\"outbox\",owner=\"\"}";

fn emit(count: u32) -> String {
    format!(
        "SELECT watership.emit('order', n::text, 'made', '{{}}') FROM generate_series(1, {count}) \
         AS n"
    )
}

/// Messages that came more than once.
fn copies(got: &[Message]) -> usize {
    let mut times: HashMap<String, usize> = HashMap::new();
    got.iter().for_each(|message| *times.entry(message.id()).or_default() += 1);
    times.values().map(|times| times - 1).sum()
}

#[tokio::test]
async fn a_locked_checkpoint_holds_intake_back_and_a_kill_then_repeats_no_more_than_the_limits() {
    let stage = Stage::new(Setup { settings: LIMITS, ..Setup::default() }).await;
    let relay = stage.start().await;
    let locker = stage.database.connect().await;
    locker.batch_execute("BEGIN; SELECT 1 FROM watership.checkpoint FOR UPDATE").await.unwrap();
    stage.execute(&emit(500)).await;
    until("intake pauses", async || {
        relay.metric("watership_window_paused").await == Some(1.0)
            && relay.metric(CONFIRMED).await >= Some(50.0)
    })
    .await;
    assert!(relay.metric(CONFIRMED).await <= Some(BOUND as f64));
    relay.kill();
    locker.batch_execute("ROLLBACK").await.unwrap();
    let relay = stage.start().await;
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    assert!(copies(&got) <= BOUND, "{} copies", copies(&got));
    assert_eq!(got.len() - copies(&got), 500);
}

#[tokio::test]
async fn a_checkpoint_that_could_not_be_stored_repeats_nothing_in_the_next_session() {
    let stage = Stage::new(Setup { settings: LIMITS, ..Setup::default() }).await;
    let relay = stage.start().await;
    let locker = stage.database.connect().await;
    locker.batch_execute("BEGIN; SELECT 1 FROM watership.checkpoint FOR UPDATE").await.unwrap();
    stage.execute(&emit(500)).await;
    // The lock timeout ends the session, and the next one cannot have the row either.
    until("a session has ended", async || relay.metric(SESSIONS).await > Some(1.0)).await;
    locker.batch_execute("ROLLBACK").await.unwrap();
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    assert_eq!((got.len(), copies(&got)), (500, 0));
}

const SESSIONS: &str = "watership_sessions_total";

#[tokio::test]
async fn a_look_at_parked_rows_that_hangs_ends_the_session_and_repeats_nothing() {
    let server = private_postgres(&[], None).await;
    let settings = &format!("{LIMITS}\nbroker.max_message_size = \"1KiB\"");
    let setup = Setup { settings, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('order', '0', 'large', to_json(repeat('x', 2000)))").await;
    until("it is parked", async || stage.holds("EXISTS (SELECT FROM watership.parked)").await)
        .await;
    // The relay's own session that looks at the table every second.
    let pid = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%FROM watership.parked%' \
        AND pid <> pg_backend_pid()";
    until("a look", async || stage.holds(&format!("EXISTS ({pid})")).await).await;
    let pid = stage.text(&format!("{pid} LIMIT 1")).await;
    let signal = |name: &str| Command::new("kill").args([name, &pid]).status().expect("kill runs");
    assert!(signal("-STOP").success());
    stage.execute(&emit(500)).await;
    until("intake pauses", async || relay.metric("watership_window_paused").await == Some(1.0))
        .await;
    assert!(relay.metric(CONFIRMED).await <= Some(BOUND as f64));
    until("the session ends", async || relay.metric(SESSIONS).await > Some(1.0)).await;
    assert!(signal("-CONT").success());
    let got = stage.settled().await;
    relay.stop().await.expect_code(0);
    assert_eq!((got.len(), copies(&got)), (500, 0));
}

#[tokio::test]
async fn a_row_that_may_not_be_parked_is_a_verdict_and_nothing_is_repeated_without_end() {
    let settings = "broker.max_message_size = \"1KiB\"";
    let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
        $$ BEGIN RAISE 'over quota'; END $$; \
        CREATE TRIGGER refuse BEFORE INSERT ON watership.parked \
        FOR EACH ROW EXECUTE FUNCTION refuse()";
    stage.execute(refuse).await;
    stage.execute("SELECT watership.emit('order', '0', 'large', to_json(repeat('x', 2000)))").await;
    stage.execute(&emit(50)).await;
    let ended = relay.ended().await;
    ended.expect_code(3).expect_text(&["parking_refused: ", "watership.parked", "over quota"]);
    stage.execute("DROP TRIGGER refuse ON watership.parked").await;
    let relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(got.len() - copies(&got), 50);
    assert!(copies(&got) <= 50, "one session was lost");
    assert!(stage.holds("(SELECT count(*) = 1 FROM watership.parked)").await);
    relay.stop().await.expect_code(0);
}
