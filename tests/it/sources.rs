//! What every kind of source promises: one suite, run for each of them between real servers.

use crate::support::inbox::{Message, kinds};
use crate::support::relay::Window;
use crate::support::scene::{Place, Scene};
use crate::support::servers::{own_database, own_vhost};
use crate::support::stage::{Setup, Stage};
use crate::support::writers::{Load, STEADY};

pub const WAL: &str = "source.mode = \"wal\"";
pub const POLL: &str = "source.mode = \"poll\"";
const MODES: [&str; 2] = [WAL, POLL];

async fn stage(mode: &str, more: &str) -> Stage {
    let settings = format!("{mode}\n{more}");
    Stage::new(Setup { settings: &settings, ..Setup::default() }).await
}

/// The ids of the outbox in the order of inserts.
async fn ids(stage: &Stage) -> Vec<String> {
    let sql = "SELECT id::text FROM watership.outbox WHERE aggregate_type <> 'fence' ORDER BY seq";
    let rows = stage.sql.query(sql, &[]).await.expect("the outbox");
    rows.iter().map(|row| row.get(0)).collect()
}

fn positions(messages: &[Message]) -> Vec<String> {
    messages.iter().map(|message| message.text("ws-position")).collect()
}

#[tokio::test]
async fn what_commits_arrives_once_with_its_id_in_order_and_what_rolls_back_never() {
    for mode in MODES {
        let stage = stage(mode, "").await;
        let relay = stage.start().await;
        // Each by itself: a BEGIN takes what stands before it in one call into its transaction.
        let transactions = [
            "SELECT watership.emit('order', '1', 'a', '{\"n\": 1.10}', \
                    '{\"x\": 1, \"traceparent\": \"00-1\"}')",
            "BEGIN; SELECT watership.emit('order', '1', 'never', '1'); ROLLBACK",
            "BEGIN; SELECT watership.emit('order', '1', 'b', '1'), \
                    watership.emit_bytes('order', 1, 'c', '\\x00ff', 'application/x'); COMMIT",
            "BEGIN; SAVEPOINT s; SELECT watership.emit('order', '1', 'never', '1'); \
                    ROLLBACK TO s; SELECT watership.emit('order', '1', 'd', '1'); COMMIT",
        ];
        for transaction in transactions {
            stage.execute(transaction).await;
        }
        let messages = stage.settled().await;
        assert_eq!(kinds(&messages), ["a", "b", "c", "d"], "{mode}");
        assert_eq!(messages.iter().map(Message::id).collect::<Vec<_>>(), ids(&stage).await);
        assert!(positions(&messages).is_sorted(), "{mode}: {:?}", positions(&messages));
        assert_eq!((&*messages[0].body, &messages[2].bytes[..]), ("{\"n\": 1.10}", &[0, 255][..]));
        assert_eq!(messages[0].text("ws-key"), "order/1");
        assert_eq!(messages[0].text("traceparent"), "00-1");
        let created = "SELECT floor(extract(epoch FROM created_at))::text FROM watership.outbox \
            WHERE event_type = 'a'";
        let created = stage.sql.query_one(created, &[]).await.expect("a row").get::<_, String>(0);
        let timestamp = messages[0].properties.timestamp().expect("a time");
        assert_eq!(timestamp.to_string(), created, "{mode}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_restart_goes_on_behind_what_is_settled_and_repeats_nothing() {
    for mode in MODES {
        let stage = stage(mode, "").await;
        for round in 1..=3 {
            let relay = stage.start().await;
            let emit = format!("SELECT watership.emit('order', '1', 'in {round}', '1')");
            stage.execute(&emit).await;
            stage.settled().await;
            relay.stop().await.expect_code(0);
            let emit = format!("SELECT watership.emit('order', '1', 'after {round}', '1')");
            stage.execute(&emit).await;
        }
        let relay = stage.start().await;
        let messages = stage.settled().await;
        let expected = ["in 1", "after 1", "in 2", "after 2", "in 3", "after 3"];
        assert_eq!(kinds(&messages), expected, "{mode}");
        assert!(positions(&messages).is_sorted(), "{mode}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_large_transaction_that_is_killed_in_the_middle_comes_again_at_the_same_places() {
    const EVENTS: usize = 12_000;
    for mode in MODES {
        let limits = "relay.max_window_events = 512\nrelay.checkpoint_interval = \"20ms\"";
        let stage = stage(mode, limits).await;
        let emit = format!(
            "SELECT watership.emit('order', (n % 50)::text, n::text, '1') \
             FROM generate_series(1, {EVENTS}) AS n"
        );
        stage.execute(&emit).await;
        for part in 1..=3 {
            let relay = stage.start().await;
            stage.inbox.count(part * EVENTS / 5).await;
            relay.kill();
        }
        let relay = stage.start().await;
        let messages = stage.settled().await;
        let mut places = std::collections::HashMap::new();
        let mut first = Vec::new();
        for message in &messages {
            let position = message.text("ws-position");
            match places.insert(message.id(), position.clone()) {
                None => first.push((position, message.id())),
                Some(before) => assert_eq!(before, position, "{mode}: another place"),
            }
        }
        first.sort();
        let first: Vec<String> = first.into_iter().map(|(_, id)| id).collect();
        assert_eq!(first, ids(&stage).await, "{mode}: all of them, in the order of inserts");
        // What had been settled did not come again: at most a window and what was not stored.
        assert!(messages.len() < EVENTS * 2, "{mode}: {} messages", messages.len());
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_relay_killed_again_and_again_under_load_loses_nothing_and_keeps_the_order_of_keys() {
    for mode in MODES {
        let (database, vhost) = (own_database().await, own_vhost().await);
        let place = Place {
            title: mode,
            database: &database.url,
            broker: &vhost.url,
            relay_database: &database.url,
            relay_broker: &vhost.url,
            window: Window { events: 1024, unconfirmed: 512 },
            settings: mode,
        };
        let mut scene = Scene::at(place).await;
        scene.consume();
        scene.relay().start();
        scene.write(Load { rate: 2_000, ..STEADY });
        scene.flowing(500).await;
        crate::crash::kill_at_random(&mut scene, 4, 2_000).await;
        scene.enough();
        scene.finish().await;
    }
}

#[tokio::test]
async fn what_cannot_be_published_is_parked_with_its_key_and_the_source_goes_on() {
    for mode in MODES {
        let stage = stage(mode, crate::parking::SMALL).await;
        let relay = stage.start().await;
        crate::parking::emit(&stage, "order", "1", "before").await;
        crate::parking::emit_large(&stage, "order", "1", "large").await;
        crate::parking::emit(&stage, "order", "1", "after").await;
        crate::parking::emit(&stage, "order", "2", "other").await;
        crate::parking::until_rows(&stage, &["parked too_large", "parked follows"]).await;
        assert_eq!(kinds(&stage.settled().await), ["before", "other"], "{mode}");
        relay.stop().await.expect_code(0);
    }
}
