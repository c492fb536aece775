//! The servers, the relay, the applications and the consumers, and what kills them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};
use watership::dev::{
    self, Postgres, PostgresOptions, Process, Rabbit, RabbitOptions, Signal, free_port,
};
use watership::pg::migrate::{INBOX, OUTBOX};

use super::Arguments;
use super::judge::{self, Verdict};

const DATABASE: &str = "shop";
const QUEUE: &str = "orders";
const CONSUMER: &str = "billing";
/// Nothing came for this long, although everything runs.
const PATIENCE: Duration = Duration::from_secs(90);
/// After the last effect: time for duplicates to show.
const SETTLE: Duration = Duration::from_secs(4);
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Until a server or the relay is ready again.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a wait looks again.
const GRAIN: Duration = Duration::from_millis(20);
/// Events of one transaction, at most.
const TRANSACTION_MAX: u32 = 5;

/// What the applications write beside each event, in its transaction.
const TABLES: &str = "
    CREATE TABLE counter (key text PRIMARY KEY, number bigint NOT NULL);
    CREATE TABLE emitted (id uuid PRIMARY KEY, key text NOT NULL, number bigint NOT NULL);
    CREATE SCHEMA watership_torture;
    CREATE TABLE watership_torture.effect (
        id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
        message_id text NOT NULL, key text NOT NULL, number bigint NOT NULL)";

/// What can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Relay,
    Broker,
    Postgres,
    Consumer,
}

struct Stack<'a> {
    wanted: &'a Arguments,
    postgres: Postgres,
    rabbit: Rabbit,
    config: PathBuf,
    relay: Process,
    consumers: Vec<Process>,
    started: u32,
}

/// Runs it and panics if an effect is lost, doubled or out of order.
pub async fn run(wanted: &Arguments) {
    let began = Instant::now();
    let mut dice = fastrand::Rng::with_seed(wanted.seed);
    let mut stack = Stack::start(wanted).await;
    println!("ready after {:.1?}", began.elapsed());
    let (database, events, keys) = (stack.database(), wanted.events, wanted.keys);
    let writer = tokio::spawn(write(database, events, keys, dice.fork()));

    let mut victims = Vec::new();
    for victim in [Victim::Relay, Victim::Broker, Victim::Postgres, Victim::Consumer] {
        victims.extend((0..wanted.kills).map(|_| victim));
    }
    dice.shuffle(&mut victims);
    let steps = victims.len();
    for (step, victim) in victims.into_iter().enumerate() {
        // Spread over the run, by how far the effects have got.
        let share = (step + 1) as f64 / (steps + 1) as f64;
        stack.wait_for((share * f64::from(events)) as i64).await;
        sleep(Duration::from_millis(dice.u64(0..300))).await;
        stack.kill(victim, &mut dice).await;
        println!("{:>6.1?} killed {victim:?}, {} of {steps}", began.elapsed(), step + 1);
    }
    writer.await.expect("the writer");
    stack.wait_for(events.into()).await;
    sleep(SETTLE).await;
    stack.stop_consumers().await;
    let client = stack.client().await;
    let verdict = judge::judge(&client, CONSUMER, wanted.partitions > 0).await;
    println!("{verdict:#?}");
    println!("took {:.0?}", began.elapsed());
    assert_eq!(verdict, Verdict::good(events.into()), "seed {}", wanted.seed);
}

impl<'a> Stack<'a> {
    async fn start(wanted: &'a Arguments) -> Self {
        // What is confirmed must survive a kill of Postgres, as in production.
        // Each consumer has connections for each partition.
        let conf = vec!["max_connections = 400".to_owned()];
        let options = PostgresOptions { fsync: true, conf, ..Default::default() };
        let postgres = Postgres::start(options).await.expect("Postgres");
        let rabbit = Rabbit::start(RabbitOptions::default()).await.expect("RabbitMQ");
        postgres.create_database(DATABASE).await.expect("a database");
        rabbit.create_vhost(DATABASE).await.expect("a vhost");
        let mut client = connect(&postgres.url("postgres", DATABASE)).await.expect("connected");
        OUTBOX.apply(&mut client).await.expect("the outbox");
        INBOX.apply(&mut client).await.expect("the inbox");
        client.batch_execute(TABLES).await.expect("the tables");
        let config = configuration(wanted, &postgres, &rabbit);
        let relay = watership(&config, "init", 0);
        assert!(settled(relay).await, "init failed");
        let relay = watership(&config, "run", 1);
        let mut stack =
            Self { wanted, postgres, rabbit, config, relay, consumers: Vec::new(), started: 0 };
        for _ in 0..wanted.consumers {
            let consumer = stack.consumer();
            stack.consumers.push(consumer);
        }
        stack
    }

    fn database(&self) -> String {
        self.postgres.url("postgres", DATABASE)
    }

    fn queues(&self) -> String {
        match self.wanted.partitions {
            0 => QUEUE.to_owned(),
            count => {
                let names: Vec<_> = (0..count).map(|n| format!("{QUEUE}.{n:02}")).collect();
                names.join(",")
            }
        }
    }

    fn consumer(&mut self) -> Process {
        self.started += 1;
        let [program, arguments @ ..] = &*self.wanted.command else { panic!("no command") };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("DATABASE_URL", self.database())
            .env("AMQP_URL", self.rabbit.url(DATABASE))
            .env("QUEUE", self.queues())
            .env("CONSUMER", CONSUMER)
            .env("ORDERED", (self.wanted.partitions > 0).to_string());
        let log = dev::home().expect("a directory").join(format!("consumer{}.log", self.started));
        Process::spawn("consumer", command, &log).expect("the consumer starts")
    }

    async fn kill(&mut self, victim: Victim, dice: &mut fastrand::Rng) {
        let pause = Duration::from_millis(dice.u64(0..1_000));
        match victim {
            Victim::Relay => {
                self.relay.kill();
                sleep(pause).await;
                self.started += 1;
                self.relay = watership(&self.config, "run", self.started);
            }
            Victim::Broker => {
                self.rabbit.kill().await;
                sleep(pause).await;
                self.rabbit.start_again().await.expect("RabbitMQ starts again");
            }
            Victim::Postgres => {
                self.postgres.kill().await;
                sleep(pause).await;
                self.postgres.start_again().await.expect("Postgres starts again");
            }
            Victim::Consumer => {
                let at = dice.usize(..self.consumers.len());
                self.consumers[at].kill();
                sleep(pause).await;
                self.consumers[at] = self.consumer();
            }
        }
    }

    async fn client(&self) -> Client {
        let began = Instant::now();
        loop {
            match connect(&self.database()).await {
                Ok(client) => return client,
                Err(error) if began.elapsed() > START_LIMIT => panic!("{error}"),
                Err(_) => sleep(GRAIN).await,
            }
        }
    }

    /// Waits until that many events had their effect.
    async fn wait_for(&mut self, goal: i64) {
        let client = self.client().await;
        let (mut last, mut moved) = (-1, Instant::now());
        loop {
            let effects = judge::effects(&client).await;
            if effects >= goal {
                return;
            }
            if effects > last {
                (last, moved) = (effects, Instant::now());
            }
            if moved.elapsed() > PATIENCE {
                println!("nothing came for {PATIENCE:?}: {effects} effects of {goal}");
                println!("the relay:\n{}", dev::tail(self.relay.log()));
                for consumer in &self.consumers {
                    println!("a consumer:\n{}", dev::tail(consumer.log()));
                }
                return;
            }
            // Neither may end by itself, whatever happens to the servers.
            assert!(self.relay.ended().is_none(), "the relay:\n{}", dev::tail(self.relay.log()));
            for consumer in &mut self.consumers {
                let ended = consumer.ended();
                assert!(ended.is_none(), "{ended:?}:\n{}", dev::tail(consumer.log()));
            }
            // The count reads the whole table.
            sleep(5 * GRAIN).await;
        }
    }

    async fn stop_consumers(&mut self) {
        self.consumers.iter_mut().for_each(|consumer| consumer.signal(Signal::Term));
        for consumer in &mut self.consumers {
            consumer.wait(STOP_LIMIT).await.expect("a consumer stops");
        }
    }
}

async fn connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn configuration(wanted: &Arguments, postgres: &Postgres, rabbit: &Rabbit) -> PathBuf {
    let admin = free_port().expect("a port");
    let route = match wanted.partitions {
        0 => "exchange = \"shop\"\nrouting_key = \"{aggregate_type}.{event_type}\"\n\
              [[queue]]\nname = \"orders\"\narguments = { x-delivery-limit = 1000000 }\n\
              [[binding]]\nqueue = \"orders\"\nexchange = \"shop\"\nrouting_key = \"#\"\n"
            .to_owned(),
        count => format!("partitions = {count}\nqueue = \"{QUEUE}\"\ndelivery_limit = 1000000\n"),
    };
    let text = format!(
        "name = \"shop\"\nsource.url = \"{}\"\nbroker.url = \"{}\"\n\
         admin.listen = \"127.0.0.1:{admin}\"\n\
         [[route]]\nname = \"orders\"\noutbox = {{ aggregate_type = \"order\" }}\n{route}",
        postgres.url("postgres", DATABASE),
        rabbit.url(DATABASE)
    );
    let path = dev::home().expect("a directory").join("consumers.toml");
    std::fs::write(&path, text).expect("the configuration");
    path
}

/// The program, with its output in a file.
fn watership(config: &Path, command: &str, number: u32) -> Process {
    let mut program = Command::new(env!("CARGO_BIN_EXE_watership"));
    program.arg("--config").arg(config).arg(command);
    let log = dev::home().expect("a directory").join(format!("{command}{number}.log"));
    Process::spawn(command, program, &log).expect("the program starts")
}

/// Waits for a command that ends.
async fn settled(mut process: Process) -> bool {
    let status = process.wait(START_LIMIT).await.expect("the command ends");
    if !status.success() {
        println!("{}", dev::tail(process.log()));
    }
    status.success()
}

/// Commits `events` events, each in the transaction that numbers it, whatever happens to Postgres.
async fn write(url: String, events: u32, keys: u32, mut dice: fastrand::Rng) {
    let mut client = None;
    let mut done = 0;
    while done < events {
        let wanted = dice.u32(1..=TRANSACTION_MAX).min(events - done);
        // Sorted, so that nobody waits for a row in another order.
        let mut chosen: Vec<_> = (0..wanted).map(|_| dice.u32(..keys)).collect();
        chosen.sort_unstable();
        if client.is_none() {
            client = connect(&url).await.ok();
        }
        let Some(open) = &mut client else {
            sleep(GRAIN).await;
            continue;
        };
        // Without an answer nobody knows whether it committed; the table knows.
        if transaction(open, &chosen).await.is_err() {
            client = None;
        }
        match &client {
            Some(_) => done += wanted,
            None => done = committed(&url).await,
        }
    }
}

async fn transaction(client: &mut Client, keys: &[u32]) -> Result<(), tokio_postgres::Error> {
    const NUMBER: &str = "INSERT INTO counter AS c VALUES ($1, 1) \
        ON CONFLICT (key) DO UPDATE SET number = c.number + 1 RETURNING number";
    const EMIT: &str = "INSERT INTO emitted \
        SELECT watership.emit('order', $1::text, 'changed', \
            json_build_object('key', $1::text, 'number', $2::bigint)::text), $1::text, $2::bigint";
    let tx = client.transaction().await?;
    for key in keys {
        let key = format!("k{key}");
        let number: i64 = tx.query_one(NUMBER, &[&key]).await?.get(0);
        tx.execute(EMIT, &[&key, &number]).await?;
    }
    tx.commit().await
}

/// How many events are committed.
async fn committed(url: &str) -> u32 {
    loop {
        if let Ok(client) = connect(url).await
            && let Ok(row) = client.query_one("SELECT count(*) FROM emitted", &[]).await
        {
            return u32::try_from(row.get::<_, i64>(0)).expect("a count");
        }
        sleep(GRAIN).await;
    }
}
