//! The example's program, killed at random: what `watership inbox torture` does to any consumer.

use std::process::Command;

use lapin::types::AMQPValue;
use watership::dev::{self, Process, Signal};

use crate::stage::Stage;
use crate::support::waiting::{Patience, until};

const EFFECT: &str = "CREATE SCHEMA watership_torture;
    CREATE TABLE watership_torture.effect (n bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        message_id text NOT NULL, key text NOT NULL, number bigint NOT NULL);
    GRANT USAGE ON SCHEMA watership_torture TO PUBLIC;
    GRANT INSERT ON watership_torture.effect TO PUBLIC";

/// Processes of the example.
struct Consumers<'a> {
    stage: &'a Stage,
    processes: Vec<Process>,
    queue: String,
    ordered: bool,
}

/// The example, which cargo builds before the tests.
fn program() -> std::path::PathBuf {
    let mut path = dev::this_program().expect("this program");
    path.pop();
    path.set_file_name("examples");
    path.join("inbox_consumer")
}

impl<'a> Consumers<'a> {
    async fn new(stage: &'a Stage, count: usize, ordered: bool) -> Self {
        stage.sql.batch_execute(EFFECT).await.expect("the table of effects");
        let mut consumers =
            Self { stage, processes: Vec::new(), queue: stage.queue.clone(), ordered };
        for n in 0..count {
            let process = consumers.spawn(n);
            consumers.processes.push(process);
        }
        consumers
    }

    fn spawn(&self, n: usize) -> Process {
        let mut command = Command::new(program());
        command
            .env("AMQP_URL", &self.stage.amqp)
            .env("DATABASE_URL", &self.stage.postgres)
            .env("QUEUE", &self.queue)
            .env("CONSUMER", &self.stage.consumer)
            .env("ORDERED", self.ordered.to_string());
        let name = format!("{}-{n}.log", self.stage.consumer);
        let log = dev::home().expect("a directory").join(name);
        Process::spawn("inbox_consumer", command, &log).expect("the example is built")
    }

    /// Kills one and starts it again.
    fn kill(&mut self, n: usize) {
        self.processes[n].kill();
        self.processes[n] = self.spawn(n);
    }

    async fn effects(&self) -> u64 {
        let count = self.stage.text("SELECT count(*) FROM watership_torture.effect").await;
        count.parse().expect("a number")
    }

    /// Kills one of them at random whenever some more effects are there, until all are.
    async fn killed_until(&mut self, effects: u64, kills: u64) {
        let mut patience = Patience::new();
        let mut killed = 0;
        loop {
            let done = self.effects().await;
            if done >= effects {
                break;
            }
            if killed < kills && done >= killed * effects / (kills + 1) {
                self.kill(fastrand::usize(..self.processes.len()));
                killed += 1;
            }
            patience.more(done, || format!("{effects} effects, after {killed} kills")).await;
        }
    }

    async fn stop(mut self) {
        for process in &mut self.processes {
            process.signal(Signal::Term);
        }
        for process in &mut self.processes {
            let ended = process.wait(std::time::Duration::from_secs(60)).await.expect("it ends");
            assert!(ended.success(), "{ended}: {}", dev::tail(process.log()));
        }
    }
}

/// Publishes `count` messages under 40 keys, every tenth twice.
async fn publish(stage: &Stage, count: u64) {
    let mut numbers = [0_u64; 40];
    for n in 0..count {
        let key = fastrand::usize(..numbers.len());
        numbers[key] += 1;
        let body = format!("{{\"key\": \"k{key}\", \"number\": {}}}", numbers[key]);
        for _ in 0..if n % 10 == 0 { 2 } else { 1 } {
            stage.publish(&format!("m{n}"), &format!("k{key}"), &body).await;
        }
    }
}

const TWICE: &str = "SELECT count(*) - count(DISTINCT message_id) FROM watership_torture.effect";
const INVERTED: &str = "SELECT count(*) FROM (SELECT number - lag(number, 1, 0::bigint) OVER ( \
    PARTITION     BY key ORDER BY n) AS step FROM watership_torture.effect) AS s WHERE step <> 1";

#[tokio::test]
async fn processes_killed_at_random_lose_and_repeat_nothing() {
    let stage = Stage::new().await;
    let mut consumers = Consumers::new(&stage, 3, false).await;
    publish(&stage, 2_000).await;
    consumers.killed_until(2_000, 15).await;
    assert_eq!(stage.text(TWICE).await, "0");
    assert!(stage.parked().await.is_empty());
    until("the queue is empty", async || stage.waiting().await == 0).await;
    consumers.stop().await;
    assert_eq!(consumers_effects(&stage).await, 2_000);
}

async fn consumers_effects(stage: &Stage) -> u64 {
    let count = stage.text("SELECT count(*) FROM watership_torture.effect").await;
    count.parse().expect("a number")
}

#[tokio::test]
async fn with_a_single_active_consumer_processes_killed_at_random_keep_the_order_of_each_key() {
    let mut stage = Stage::new().await;
    stage.queue = "ordered".to_owned();
    stage.declare(&[("x-single-active-consumer", AMQPValue::Boolean(true))]).await;
    let mut consumers = Consumers::new(&stage, 3, true).await;
    publish(&stage, 1_000).await;
    consumers.killed_until(1_000, 10).await;
    assert_eq!((stage.text(TWICE).await, stage.text(INVERTED).await), ("0".into(), "0".into()));
    consumers.stop().await;
}

#[tokio::test]
async fn a_message_that_kills_its_process_is_parked_and_others_go_on() {
    let stage = Stage::new().await;
    let mut consumers = Consumers::new(&stage, 1, false).await;
    // The handler of this one hangs in the database until its process is killed.
    stage
        .sql
        .batch_execute(
            "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(3600); RETURN NEW; END $$;
             CREATE TRIGGER poison BEFORE INSERT ON watership_torture.effect
                 FOR EACH ROW WHEN (NEW.key = 'poison') EXECUTE FUNCTION poison()",
        )
        .await
        .expect("a trigger");
    stage.publish("bad", "poison", "{\"key\": \"poison\", \"number\": 1}").await;
    publish(&stage, 20).await;
    let hangs = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' \
                 AND datname = current_database()";
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE wait_event = 'PgSleep' AND datname = current_database()";
    let mut kills = 0;
    let mut patience = Patience::new();
    while stage.parked().await.is_empty() {
        if stage.text(hangs).await == "1" {
            consumers.processes[0].kill();
            stage.text(end).await;
            consumers.kill(0);
            kills += 1;
        }
        patience.more(kills, || "the poison is parked".into()).await;
    }
    assert_eq!(stage.parked().await, ["bad killed"]);
    // The first delivery is not recorded, ten that came back are, and the next one gives up.
    assert_eq!(kills, 11);
    until("others are handled", async || consumers.effects().await == 20).await;
    consumers.stop().await;
}
