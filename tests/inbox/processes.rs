//! The example's program, killed: at random, by the crash test that is for any consumer, and at one
//! message again and again.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::sync::watch;
use watership::dev::torture::{self, Report};
use watership::dev::{self, Process, Signal};
use watership::pg::connect;
use watership::secret::Secret;

use crate::stage::Stage;
use crate::support::waiting::{Patience, until, within};

/// The example, which cargo builds before the tests.
fn program() -> PathBuf {
    let mut path = dev::this_program().expect("this program");
    path.pop();
    path.set_file_name("examples");
    path.join("inbox_consumer")
}

/// What came of the crash test with `events` events and `kills` kills of three processes.
async fn tortured(stage: &Stage, ordered: bool, events: usize, kills: usize) -> Report {
    let admin = Secret::new(&*stage.database.url);
    let options = torture::Options {
        postgres: connect::Options::parse(&admin).expect("the URL of the database"),
        postgres_url: stage.postgres.clone(),
        amqp_url: stage.amqp.clone(),
        queue: "torture".to_owned(),
        consumer: stage.consumer.clone(),
        events,
        keys: 40,
        duplicates_percent: 10,
        kills,
        processes: 3,
        patience: Duration::from_secs(60),
        ordered,
        command: vec![program().display().to_string()],
    };
    let (_never, stop) = watch::channel(false);
    torture::run(&options, stop, |_| {}).await.expect("the crash test runs")
}

#[tokio::test]
async fn processes_killed_at_random_lose_and_repeat_nothing() {
    let report = tortured(&Stage::new().await, false, 2_000, 15).await;
    assert!(report.is_good(), "{report:#?}");
    assert_eq!((report.kills, report.ended, report.parked), (15, 0, 0));
}

#[tokio::test]
async fn with_a_single_active_consumer_processes_killed_at_random_keep_the_order_of_each_key() {
    let report = tortured(&Stage::new().await, true, 1_000, 10).await;
    assert!(report.is_good(), "{report:#?}");
    assert_eq!((report.kills, report.ended, report.parked), (10, 0, 0));
}

/// Runs the command with the example, and returns its verdict.
async fn command(stage: &Stage, code: i32) -> (String, String) {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_watership"));
    command
        .args(["inbox", "torture", "--url", &stage.postgres, "--amqp", &stage.amqp])
        .args(["--queue", "q", "--events", "60", "--keys", "6", "--kills", "1", "--"])
        .arg(program())
        .kill_on_drop(true);
    let output = within("the crash test ends", command.output()).await.expect("it starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}\n{err}");
    (out, err)
}

#[tokio::test]
async fn a_run_that_parks_says_why_and_does_not_spoil_the_next_one() {
    let stage = Stage::new().await;
    let user = "DO $$ BEGIN EXECUTE (SELECT format('GRANT CREATE ON DATABASE %I TO %I', \
                current_database(), rolname) FROM pg_roles WHERE rolname LIKE \
                'user_' || current_database() || '_%'); END $$";
    stage.sql.batch_execute(user).await.expect("granted");
    // No effect fits the table, as if the handler were wrong.
    let wrong = "CREATE FUNCTION spoil() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN \
                 ALTER TABLE watership_torture.effect ADD CONSTRAINT wrong CHECK (number < 0); \
                 END $$; \
                 CREATE EVENT TRIGGER spoil ON ddl_command_end WHEN TAG IN ('CREATE TABLE') \
                 EXECUTE FUNCTION spoil()";
    stage.sql.batch_execute(wrong).await.expect("an event trigger");
    let (out, _) = command(&stage, 1).await;
    assert!(out.contains("parked        60"), "{out}");
    assert!(out.contains("the first: ") && out.contains("\"wrong\""), "{out}");
    assert!(out.contains("inbox parked --url … list --consumer torture"), "{out}");
    stage.sql.batch_execute("DROP EVENT TRIGGER spoil").await.expect("dropped");
    let (out, _) = command(&stage, 0).await;
    assert!(out.contains("parked        0"), "{out}");
}

/// A process of the example.
fn consumer(stage: &Stage) -> Process {
    let mut command = Command::new(program());
    command
        .env("AMQP_URL", &stage.amqp)
        .env("DATABASE_URL", &stage.postgres)
        .env("QUEUE", &stage.queue)
        .env("CONSUMER", &stage.consumer)
        .env("ORDERED", "false");
    let log = dev::home().expect("a directory").join(format!("{}.log", stage.consumer));
    Process::spawn("inbox_consumer", command, &log).expect("the example is built")
}

#[tokio::test]
async fn a_message_that_kills_its_process_is_parked_and_others_go_on() {
    let stage = Stage::new().await;
    // The handler of this one hangs in the database until its process is killed.
    stage
        .sql
        .batch_execute(
            "CREATE SCHEMA watership_torture;
             CREATE TABLE watership_torture.effect (
                 message_id text NOT NULL, key text NOT NULL, number bigint NOT NULL);
             GRANT USAGE ON SCHEMA watership_torture TO PUBLIC;
             GRANT INSERT ON watership_torture.effect TO PUBLIC;
             CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
             CREATE TRIGGER poison BEFORE INSERT ON watership_torture.effect
                 FOR EACH ROW WHEN (NEW.key = 'poison') EXECUTE FUNCTION poison()",
        )
        .await
        .expect("a trigger");
    stage.publish("bad", "poison", "{\"key\": \"poison\", \"number\": 1}").await;
    for n in 0..20 {
        let body = format!("{{\"key\": \"k{n}\", \"number\": 1}}");
        stage.publish(&format!("m{n}"), &format!("k{n}"), &body).await;
    }
    let mut process = consumer(&stage);
    let hangs = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' \
                 AND datname = current_database()";
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE wait_event = 'PgSleep' AND datname = current_database()";
    let mut kills = 0;
    let mut patience = Patience::new();
    while stage.parked().await.is_empty() {
        if stage.text(hangs).await == "1" {
            process.kill();
            stage.text(end).await;
            // A session that is told to end is still there for a moment, and counts only once.
            until("its session has ended", async || stage.text(hangs).await == "0").await;
            process = consumer(&stage);
            kills += 1;
        }
        patience.more(kills, || "the poison is parked".into()).await;
    }
    assert_eq!(stage.parked().await, ["bad killed"]);
    // The first delivery is not recorded, ten that came back are, and the next one gives up.
    assert_eq!(kills, 11);
    let effects = "SELECT count(*) FROM watership_torture.effect";
    until("others are handled", async || stage.text(effects).await == "20").await;
    process.signal(Signal::Term);
    let ended = process.wait(Duration::from_secs(60)).await.expect("it ends");
    assert!(ended.success(), "{ended}: {}", dev::tail(process.log()));
}
