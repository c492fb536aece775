//! The crash test for consumers: runs a command as consumers of a queue, kills them with -9 at
//! random, and judges a table that their handler writes.
//!
//! The handler inserts one row into `watership_torture.effect (message_id, key, number)` for each
//! message, in the transaction that the inbox gives it. Each effect must be there once; and in the
//! order of its key where the queue keeps the order.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{POLL, Process, Signal, home, tail};
use crate::error::{Error, Kind, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect;
use crate::pg::sqlstate::postgres_error;

/// The run ends when no effect came for so long.
const PATIENCE: Duration = Duration::from_secs(60);
/// After the last effect: time for duplicates to show.
const SETTLE: Duration = Duration::from_secs(3);
/// How long consumers may take to stop after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// The longest pause between a kill and the next start of that process.
const PAUSE_MS_MAX: u64 = 500;
/// A command that ends by itself so often is broken, not unlucky.
const ENDS_MAX: u32 = 10;

/// What to run, and how.
#[derive(Debug)]
pub struct Options {
    /// The consumer's database.
    pub postgres: connect::Options,
    /// Its URL, as the command gets it.
    pub postgres_url: String,
    /// The broker, as the command gets it.
    pub amqp_url: String,
    /// The queue. It is made, and removed at the end, if it does not exist.
    pub queue: String,
    /// The consumer's name.
    pub consumer: String,
    /// Different events to publish.
    pub events: usize,
    /// Keys that they have.
    pub keys: usize,
    /// Percentage of events that are published a second time, later.
    pub duplicates_percent: u8,
    /// How often a process is killed.
    pub kills: usize,
    /// How many processes run side by side.
    pub processes: usize,
    /// Make the queue with a single active consumer, and judge the order within each key.
    pub ordered: bool,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// One published event.
#[derive(Debug, Clone)]
struct Event {
    id: String,
    key: String,
    number: i64,
}

/// What came of it.
#[derive(Debug, Default, serde::Serialize)]
pub struct Report {
    /// Different events that were published.
    pub events: usize,
    /// Messages published again.
    pub duplicates: usize,
    /// Processes killed with -9.
    pub kills: usize,
    /// Processes that ended by themselves.
    pub ended: u32,
    /// Different events with an effect.
    pub effects: usize,
    /// Events without an effect, the parked ones among them.
    pub lost: Vec<String>,
    /// Events with more than one effect.
    pub twice: Vec<String>,
    /// Effects that came after a later one of their key; not judged without `ordered`.
    pub out_of_order: Vec<String>,
    /// Effects of messages that were never published.
    pub unknown: Vec<String>,
    /// Events that the consumer parked.
    pub parked: i64,
    /// Messages that were left in the queue.
    pub left: u32,
}

impl Report {
    /// Whether each event had its effect once, and in order where that is judged.
    pub fn is_good(&self) -> bool {
        let faults = [&self.lost, &self.twice, &self.out_of_order, &self.unknown];
        faults.iter().all(|list| list.is_empty()) && self.left == 0
    }
}

/// Runs the test; `tell` is called with each line of progress.
///
/// # Errors
/// What keeps the test from being run: a peer that cannot be reached, a queue that has messages, a
/// database without the inbox, a command that cannot be started or ends at once.
pub async fn run(options: &Options, tell: impl Fn(&str)) -> Result<Report> {
    let SqlConnection { client, closed: _closed } = sql(&options.postgres).await?;
    prepare(&client).await?;
    let connection = Connection::connect(&options.amqp_url, ConnectionProperties::default());
    let connection = connection.await.map_err(broker)?;
    let channel = connection.create_channel().await.map_err(broker)?;
    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(broker)?;
    let ours = make_queue(&connection, options).await?;
    let time = "SELECT extract(epoch FROM now())::bigint";
    let time: i64 = client.query_one(time, &[]).await.map_err(postgres_error)?.get(0);
    let mut run = Run::start(options, client, channel, time.unsigned_abs())?;
    let result = run.go(&tell).await;
    let stopped = run.stop().await;
    let mut report = result?;
    stopped?;
    report.left = ready(&connection, &options.queue).await?;
    run.judge(&mut report).await?;
    if ours {
        let delete = QueueDeleteOptions::default();
        run.channel.queue_delete(options.queue.as_str().into(), delete).await.map_err(broker)?;
    }
    Ok(report)
}

fn broker(error: lapin::Error) -> Error {
    Error::unreachable("RabbitMQ").caused_by(error)
}

/// An empty table of effects, which every role may write.
async fn prepare(client: &Client) -> Result<()> {
    let there =
        "SELECT pg_catalog.to_regprocedure('watership_inbox.maintain(timestamptz)') IS NOT NULL";
    let there: bool = client.query_one(there, &[]).await.map_err(postgres_error)?.get(0);
    if !there {
        return Err(Error::refused("the database has no inbox")
            .hint("install it: watership inbox install --url …"));
    }
    let sql = "
        DROP SCHEMA IF EXISTS watership_torture CASCADE;
        CREATE SCHEMA watership_torture;
        CREATE TABLE watership_torture.effect (
            id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
            message_id text NOT NULL, key text NOT NULL, number bigint NOT NULL,
            at timestamptz NOT NULL DEFAULT clock_timestamp());
        GRANT USAGE ON SCHEMA watership_torture TO PUBLIC;
        GRANT INSERT ON watership_torture.effect TO PUBLIC";
    client.batch_execute(sql).await.map_err(postgres_error)
}

/// Declares the queue. True if it was not there before.
async fn make_queue(connection: &Connection, options: &Options) -> Result<bool> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let probe = connection.create_channel().await.map_err(broker)?;
    let name = options.queue.as_str();
    if let Ok(queue) = probe.queue_declare(name.into(), passive, FieldTable::default()).await {
        if queue.message_count() > 0 {
            let text = format!("queue {name:?} holds {} messages", queue.message_count());
            return Err(
                Error::refused(text).hint("name an empty queue, or one that does not exist")
            );
        }
        return Ok(false);
    }
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    // Every kill counts as a delivery of all that the process held.
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(1_000_000));
    if options.ordered {
        arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    }
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let probe = connection.create_channel().await.map_err(broker)?;
    probe.queue_declare(name.into(), durable, arguments).await.map_err(broker)?;
    Ok(true)
}

/// Messages that wait in the queue.
async fn ready(connection: &Connection, queue: &str) -> Result<u32> {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let channel = connection.create_channel().await.map_err(broker)?;
    let queue = channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
    Ok(queue.map_err(broker)?.message_count())
}

struct Run<'a> {
    options: &'a Options,
    client: Client,
    channel: Channel,
    events: Vec<Event>,
    /// The time of every event, in seconds since 1970: the same for a duplicate.
    time: u64,
    /// The last number of each key.
    numbers: Vec<i64>,
    processes: Vec<Process>,
    logs: Vec<PathBuf>,
    started: u32,
    report: Report,
}

impl<'a> Run<'a> {
    fn start(options: &'a Options, client: Client, channel: Channel, time: u64) -> Result<Self> {
        let mut run = Self {
            options,
            client,
            channel,
            events: Vec::new(),
            time,
            numbers: vec![0; options.keys],
            processes: Vec::new(),
            logs: Vec::new(),
            started: 0,
            report: Report::default(),
        };
        for _ in 0..options.processes {
            let process = run.spawn()?;
            run.processes.push(process);
        }
        Ok(run)
    }

    fn spawn(&mut self) -> Result<Process> {
        let [program, arguments @ ..] = &*self.options.command else {
            return Err(Error::config("no command is given after --"));
        };
        self.started += 1;
        let name = format!("consumer{}", self.started);
        let log = home()?.join(format!("{name}.log"));
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("DATABASE_URL", &self.options.postgres_url)
            .env("AMQP_URL", &self.options.amqp_url)
            .env("QUEUE", &self.options.queue)
            .env("CONSUMER", &self.options.consumer)
            .env("ORDERED", self.options.ordered.to_string());
        self.logs.push(log.clone());
        Process::spawn(&name, command, &log)
    }

    async fn go(&mut self, tell: &impl Fn(&str)) -> Result<Report> {
        let rounds = self.options.kills.max(1);
        for round in 0..rounds {
            let before = self.effects().await?;
            let goal = self.options.events * (round + 1) / rounds;
            let published = self.publish_up_to(goal).await?;
            if round >= self.options.kills {
                break;
            }
            // Somewhere in the middle of them, or when they do not move.
            let moment = before + fastrand::i64(0..=published.max(1));
            self.wait_for(moment).await?;
            let victim = fastrand::usize(..self.processes.len());
            self.processes[victim].kill();
            self.report.kills += 1;
            sleep(Duration::from_millis(fastrand::u64(0..=PAUSE_MS_MAX))).await;
            self.processes[victim] = self.spawn()?;
            let effects = self.effects().await?;
            tell(&format!(
                "killed {} of {}, {} published, {effects} effects",
                round + 1,
                self.options.kills,
                self.events.len()
            ));
        }
        self.wait_for(self.options.events as i64).await?;
        sleep(SETTLE).await;
        self.revive()?;
        Ok(std::mem::take(&mut self.report))
    }

    /// Publishes events until there are `goal`, some of the earlier ones again among them.
    async fn publish_up_to(&mut self, goal: usize) -> Result<i64> {
        let mut published = 0;
        while self.events.len() < goal {
            let at = fastrand::usize(..self.numbers.len());
            self.numbers[at] += 1;
            let event = Event {
                id: Uuid::now_v7().to_string(),
                key: format!("k{at}"),
                number: self.numbers[at],
            };
            self.publish(&event).await?;
            self.events.push(event);
            published += 1;
            if fastrand::u8(..100) < self.options.duplicates_percent {
                let again = self.events[fastrand::usize(..self.events.len())].clone();
                self.publish(&again).await?;
                self.report.duplicates += 1;
            }
        }
        Ok(published)
    }

    async fn publish(&mut self, event: &Event) -> Result<()> {
        let Event { id, key, number } = event;
        let mut headers = FieldTable::default();
        headers.insert("ws-key".into(), AMQPValue::LongString(key.as_str().into()));
        let properties = BasicProperties::default()
            .with_message_id(id.as_str().into())
            .with_timestamp(self.time)
            .with_content_type("application/json".into())
            .with_type("torture".into())
            .with_app_id("torture".into())
            .with_delivery_mode(2)
            .with_headers(headers);
        let body = serde_json::json!({ "key": key, "number": number }).to_string();
        let mandatory = BasicPublishOptions { mandatory: true, ..Default::default() };
        let queue = self.options.queue.as_str().into();
        let sent =
            self.channel.basic_publish("".into(), queue, mandatory, body.as_bytes(), properties);
        let confirm = sent.await.map_err(broker)?.await.map_err(broker)?;
        if !confirm.is_ack() || confirm.take_message().is_some() {
            return Err(Error::refused(format!("queue {:?} refuses messages", self.options.queue)));
        }
        Ok(())
    }

    async fn effects(&self) -> Result<i64> {
        let sql = "SELECT count(DISTINCT message_id) FROM watership_torture.effect";
        Ok(self.client.query_one(sql, &[]).await.map_err(postgres_error)?.get(0))
    }

    async fn parked(&self) -> Result<i64> {
        let sql = "SELECT count(*) FROM watership_inbox.parked_messages WHERE consumer = $1";
        let row = self.client.query_one(sql, &[&self.options.consumer]).await;
        Ok(row.map_err(postgres_error)?.get(0))
    }

    /// Waits until there are `goal` effects, or none comes any more.
    async fn wait_for(&mut self, goal: i64) -> Result<()> {
        let (mut last, mut moved) = (-1, Instant::now());
        loop {
            let now = self.effects().await?;
            if now >= goal {
                return Ok(());
            }
            if now > last {
                (last, moved) = (now, Instant::now());
            }
            // What is parked will have no effect, so there may be nothing to wait for.
            let quiet = moved.elapsed();
            if quiet >= PATIENCE || quiet >= PATIENCE / 6 && now + self.parked().await? >= goal {
                return Ok(());
            }
            self.revive()?;
            sleep(POLL).await;
        }
    }

    /// Starts what ended by itself again.
    fn revive(&mut self) -> Result<()> {
        for at in 0..self.processes.len() {
            let Some(status) = self.processes[at].ended() else { continue };
            self.report.ended += 1;
            if self.report.ended >= ENDS_MAX && self.report.kills == 0 {
                let text = format!(
                    "the command ended by itself {ENDS_MAX} times, at last with {status}; the end \
                     of its output:\n{}",
                    tail(self.processes[at].log())
                );
                return Err(Error::refused(text)
                    .hint("a consumer must run until SIGTERM; see clients/README.md"));
            }
            self.processes[at] = self.spawn()?;
        }
        Ok(())
    }

    /// Asks the consumers to stop, and waits for them.
    async fn stop(&mut self) -> Result<()> {
        self.processes.iter_mut().for_each(|process| process.signal(Signal::Term));
        for process in &mut self.processes {
            if process.wait(STOP_LIMIT).await.is_err() {
                process.kill();
                let text = format!("a consumer did not stop within {STOP_LIMIT:?} of SIGTERM");
                return Err(Error::new(Kind::Refused, text));
            }
        }
        Ok(())
    }

    async fn judge(&self, report: &mut Report) -> Result<()> {
        let sql = "SELECT message_id, key, number FROM watership_torture.effect ORDER BY id";
        let rows = self.client.query(sql, &[]).await.map_err(postgres_error)?;
        let effects =
            rows.iter().map(|row| Event { id: row.get(0), key: row.get(1), number: row.get(2) });
        judge(&self.events, effects, self.options.ordered, report);
        report.parked = self.parked().await?;
        Ok(())
    }
}

/// Compares what was published with the effects, in the order in which they happened.
fn judge(
    events: &[Event],
    effects: impl Iterator<Item = Event>,
    ordered: bool,
    report: &mut Report,
) {
    let mut times: HashMap<&str, u32> = events.iter().map(|e| (&*e.id, 0)).collect();
    let mut last: HashMap<String, i64> = HashMap::new();
    for effect in effects {
        let name = format!("{} ({} {})", effect.id, effect.key, effect.number);
        let Some(times) = times.get_mut(&*effect.id) else {
            report.unknown.push(name);
            continue;
        };
        *times += 1;
        if *times > 1 {
            report.twice.push(name);
            continue;
        }
        let highest = last.entry(effect.key).or_default();
        if ordered && effect.number < *highest {
            report.out_of_order.push(format!("{name} after {highest}"));
        }
        *highest = effect.number.max(*highest);
    }
    report.events = events.len();
    report.effects = times.values().filter(|times| **times > 0).count();
    let lost = events.iter().filter(|event| times[&*event.id] == 0);
    report.lost = lost.map(|e| format!("{} ({} {})", e.id, e.key, e.number)).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, number: i64) -> Event {
        Event { id: id.into(), key: "k".into(), number }
    }

    fn judged(effects: &[Event], ordered: bool) -> Report {
        let published = [event("a", 1), event("b", 2), event("c", 3)];
        let mut report = Report::default();
        judge(&published, effects.iter().cloned(), ordered, &mut report);
        report
    }

    #[test]
    fn each_effect_once_and_in_order_is_good() {
        let report = judged(&[event("a", 1), event("b", 2), event("c", 3)], true);
        assert!(report.is_good(), "{report:?}");
        assert_eq!((report.events, report.effects), (3, 3));
    }

    #[test]
    fn a_lost_a_doubled_and_an_unknown_effect_are_found() {
        let report = judged(&[event("a", 1), event("a", 1), event("x", 9), event("b", 2)], true);
        let counts = [&report.lost, &report.twice, &report.unknown].map(Vec::len);
        assert_eq!(counts, [1, 1, 1], "{report:?}");
        assert!(!report.is_good());
    }

    #[test]
    fn an_overtaking_is_found_only_where_order_is_judged() {
        let effects = [event("a", 1), event("c", 3), event("b", 2)];
        assert_eq!(judged(&effects, true).out_of_order.len(), 1);
        assert!(judged(&effects, false).is_good());
    }

    #[test]
    fn a_message_left_in_the_queue_is_not_good() {
        let report = Report { left: 1, ..Report::default() };
        assert!(!report.is_good());
    }
}
