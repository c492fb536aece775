//! Whatever the database does, no effect is lost or repeated, and no message is blamed for it.

use watership::dev::StopMode;
use watership::error::Kind;
use watership::inbox::Inbox;

use crate::stage::{Failing, Stage, record, run};
use crate::support::framing::{self, Protocol};
use crate::support::proxy::{Action, Direction, Flow, How, Proxy, Trigger};
use crate::support::servers::{database_of, own_database, own_vhost, postgres, private_postgres};
use crate::support::waiting::until;

#[tokio::test]
async fn a_database_that_restarts_loses_and_repeats_nothing() {
    let mut server = private_postgres(&[], None).await;
    let vhost = own_vhost().await;
    let mut stage = Stage::on(database_of(&server), &vhost.url).await;
    let running = stage.start();
    for (round, mode) in [StopMode::Fast, StopMode::Immediate].into_iter().enumerate() {
        for n in 1..=100 {
            let number = round * 100 + n;
            stage.publish(&format!("m{number}"), &format!("k{}", n % 5), &number.to_string()).await;
        }
        // Its sessions are open, so it notices.
        until("it works", async || stage.effects("%").await.len() > round * 100).await;
        server.stop(mode).await.expect("it stops");
        server.start_again().await.expect("it starts");
        stage.sql = stage.database.connect().await;
    }
    assert_eq!(stage.effects_come(200).await.len(), 200);
    for key in 0..5 {
        let bodies = stage.effects(&format!("k{key}")).await;
        let numbers: Vec<u32> = bodies.iter().map(|n| n.parse().unwrap()).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
    assert!(stage.parked().await.is_empty(), "no message was blamed");
    assert!(stage.counted("resubscribed_total", "cause=\"database\"") > 0);
    running.stop().await;
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn while_the_database_is_away_messages_are_back_in_the_queue() {
    let mut server = private_postgres(&[], None).await;
    let stage = Stage::on(database_of(&server), &own_vhost().await.url).await;
    let running = stage.start();
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    server.stop(StopMode::Fast).await.expect("it stops");
    stage.publish_many(10, 3).await;
    until("others could have them", async || stage.waiting().await == 10).await;
    server.start_again().await.expect("it starts");
    let effects = "SELECT count(*) FROM effect";
    until("they are handled", async || stage.text(effects).await == "10").await;
    running.stop().await;
}

#[tokio::test]
async fn a_session_that_is_terminated_under_a_handler_is_no_failure_of_the_message() {
    let stage = Stage::new().await;
    let terminated = std::sync::atomic::AtomicBool::new(false);
    let terminated = std::sync::Arc::new(terminated);
    let running = run(stage.inbox().max_failures(1), move |message, tx| {
        let again = terminated.swap(true, std::sync::atomic::Ordering::SeqCst);
        Box::pin(async move {
            if !again {
                tx.batch_execute("SELECT pg_terminate_backend(pg_backend_pid())").await?;
            }
            record(message, tx).await
        })
    });
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    running.stop().await;
    assert_eq!((stage.parked().await.len(), stage.counted("failures_total", "")), (0, 0));
}

#[tokio::test]
async fn a_message_that_costs_its_handler_the_connection_fails_and_others_go_on() {
    let stage = Stage::new().await;
    let url = stage.database.url.clone();
    let inbox = stage.inbox().max_failures(3).concurrency(2);
    let running = run(inbox, move |message, tx| {
        let url = url.clone();
        Box::pin(async move {
            let own = tx.query_one("SELECT pg_backend_pid()", &[]).await?.get::<_, i32>(0);
            match message.key.as_deref() {
                Some("loud") => {
                    tx.execute("SELECT pg_terminate_backend($1)", &[&own]).await?;
                }
                // As by a timeout of the server, while the handler does something else.
                Some("quiet") => {
                    let (other, connection) =
                        tokio_postgres::connect(&url, tokio_postgres::NoTls).await?;
                    tokio::spawn(connection);
                    let end = "SELECT pg_terminate_backend($1, 60000)";
                    other.execute(end, &[&own]).await?;
                    return Ok(());
                }
                _ => {}
            }
            record(message, tx).await
        })
    });
    stage.publish("loud", "loud", "").await;
    stage.publish("quiet", "quiet", "").await;
    stage.publish_many(20, 4).await;
    assert_eq!(stage.effects_come(20).await.len(), 20);
    until("they are parked", async || stage.parked().await.len() == 2).await;
    running.stop().await;
    let mut parked = stage.parked().await;
    parked.sort();
    assert_eq!(parked, ["loud failed", "quiet failed"]);
    assert_eq!(stage.counted("failures_total", ""), 6);
    assert_eq!(stage.counted("resubscribed_total", "cause=\"database\""), 0);
    assert_eq!(stage.waiting().await, 0);
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_has_one_effect() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(postgres().await.port(), Protocol::Postgres).await;
    let inbox = Inbox::new(&stage.consumer).queue(&stage.queue).amqp(&stage.amqp);
    let inbox = inbox.postgres(proxy.url(&stage.postgres));
    let running = run(inbox, |message, tx| Box::pin(record(message, tx)));
    stage.publish("m0", "k", "0").await;
    stage.effects_come(1).await;
    for n in 1..=40 {
        // Every message of the server's in turn: answers to BEGIN, the claim, the effect, COMMIT.
        proxy.trigger(Trigger {
            direction: Direction::ToRelay,
            matches: framing::is_any,
            nth: n,
            action: Action::CutBefore(How::Reset),
            for_ever: false,
        });
        stage.publish(&format!("m{n}"), "k", &n.to_string()).await;
        stage.publish(&format!("n{n}"), "l", &n.to_string()).await;
        stage.effects_come(1 + 2 * usize::try_from(n).unwrap()).await;
    }
    assert!(proxy.struck() > 0);
    assert!(stage.parked().await.is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_half_open_connection_to_the_database_is_given_up() {
    let stage = Stage::new().await;
    let proxy = Proxy::before(postgres().await.port(), Protocol::Postgres).await;
    let inbox = Inbox::new(&stage.consumer).queue(&stage.queue).amqp(&stage.amqp);
    let inbox = inbox.postgres(proxy.url(&stage.postgres));
    let running = run(inbox, |message, tx| Box::pin(record(message, tx)));
    stage.publish("m1", "k", "1").await;
    stage.effects_come(1).await;
    proxy.flows(Flow { dead: true, ..Flow::default() });
    stage.publish("m2", "k", "2").await;
    until("it has tried", async || stage.waiting().await == 0).await;
    proxy.heal();
    assert_eq!(stage.effects_come(2).await, ["1", "2"]);
    running.stop().await;
}

#[tokio::test]
async fn a_database_without_the_inbox_or_the_right_to_it_is_an_error_at_the_start() {
    let stage = Stage::new().await;
    let empty = own_database().await;
    let start = |url: &str| {
        let inbox = Inbox::new("c").queue(&stage.queue).amqp(&stage.amqp).postgres(url);
        inbox.run(|message, tx| Box::pin(record(message, tx)), std::future::pending())
    };
    let error = start(&empty.url).await.unwrap_err();
    assert_eq!((error.kind(), error.sqlstate()), (Kind::Refused, Some("3F000")));
    assert!(format!("{error:?}").contains("watership inbox install"), "{error:?}");
    stage.sql.batch_execute("CREATE ROLE stranger LOGIN").await.expect("a role");
    let stranger = stage.database.url.replacen("postgres@", "stranger@", 1);
    let error = start(&stranger).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("42501"));
    assert!(format!("{error:?}").contains("watership_consumer"), "{error:?}");
}

#[tokio::test]
async fn a_handlers_session_has_the_settings_of_its_role() {
    let stage = Stage::new().await;
    stage
        .sql
        .batch_execute(&format!(
            "CREATE SCHEMA shop;
             CREATE TABLE shop.effect (message_id text, key text, body text);
             GRANT ALL ON SCHEMA shop TO PUBLIC; GRANT ALL ON shop.effect TO PUBLIC;
             ALTER ROLE {} SET search_path = shop",
            stage.postgres.split(['/', '@']).nth(2).expect("a user")
        ))
        .await
        .expect("a schema");
    let running = stage.start();
    stage.publish("m1", "k", "1").await;
    let count = "SELECT count(*) FROM shop.effect";
    until("it is where the role's path leads", async || stage.text(count).await == "1").await;
    running.stop().await;
}

#[tokio::test]
async fn an_application_may_open_the_clients() {
    let stage = Stage::new().await;
    let url = stage.postgres.clone();
    let inbox = Inbox::new(&stage.consumer).queue(&stage.queue).amqp(&stage.amqp);
    let inbox = inbox.concurrency(2).postgres_by(move || {
        let url = url.clone();
        Box::pin(async move {
            let connected = tokio_postgres::connect(&url, tokio_postgres::NoTls).await;
            let (client, connection) =
                connected.map_err(watership::pg::sqlstate::postgres_error)?;
            tokio::spawn(connection);
            Ok(client)
        })
    });
    let running = Failing::default().run(inbox);
    stage.publish_many(10, 3).await;
    stage.effects_come(10).await;
    let others = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                  WHERE usename LIKE 'user_%' AND datname = current_database()";
    stage.text(others).await;
    stage.publish("m11", "k", "11").await;
    stage.effects_come(11).await;
    running.stop().await;
}
