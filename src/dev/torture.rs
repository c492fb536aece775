//! The crash test for consumers: runs a command as consumers of a queue, kills them with -9 at
//! random, and judges a table that their handler writes.
//!
//! The handler inserts one row into `watership_torture.effect (message_id, key, number)` for each
//! message, in the transaction that the inbox gives it. Each effect must be there once; and in the
//! order of its key where the queue keeps the order.
//!
//! Invariant: however the run ends, its processes are ended and the queue that it made is deleted.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{LOG_TAIL, POLL, Process, Signal, own_directory, tail};
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect;
use crate::pg::sqlstate::postgres_error;

mod queue;
mod report;

use queue::TestQueue;
pub use report::Report;
use report::judge;

/// After the last effect: time for duplicates to show.
const SETTLE: Duration = Duration::from_secs(3);
/// How long consumers may take to stop after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// The longest pause between a kill and the next start of that process.
const PAUSE_MS_MAX: u64 = 500;
/// A command that ends by itself so often is broken, not unlucky.
const ENDS_MAX: u32 = 10;
/// The run ends when this many waits in a row have seen no effect: what hangs may continue after
/// the kill that follows the first of them.
const STUCK_MAX: u32 = 2;
/// A wait says at least so often how far the effects have come.
const TOLD_EVERY: Duration = Duration::from_secs(15);
/// Lines of a consumer's output that are shown.
const OUTPUT_LINES_MAX: usize = 20;

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
    /// A wait ends when no effect came for so long.
    pub patience: Duration,
    /// Make the queue with a single active consumer, and judge the order within each key.
    pub ordered: bool,
    /// The program and its arguments.
    pub command: Vec<String>,
}

/// What the run tells while it runs.
#[derive(Debug, Clone, Copy)]
pub enum Told<'a> {
    /// A process was killed and started again.
    Round(&'a str),
    /// How a long wait is going, or what a consumer printed; it may have several lines.
    Note(&'a str),
}

/// One published event.
#[derive(Debug, Clone)]
struct Event {
    id: String,
    key: String,
    number: i64,
}

/// Runs the test until `stop` is true; `tell` is called with each line of progress.
///
/// # Errors
/// What keeps the test from being run: a peer that cannot be reached, a queue that has messages, a
/// database without the inbox, a command that cannot be started or ends at once, a stop.
pub async fn run(
    options: &Options,
    mut stop: watch::Receiver<bool>,
    tell: impl Fn(Told<'_>),
) -> Result<Report> {
    let prepared = unless_stopped(&mut stop, prepare(&options.postgres)).await?;
    let SqlConnection { client, closed: _closed } = prepared;
    let queue = TestQueue::open(options).await?;
    let result = unless_stopped(&mut stop, test(options, &client, &queue, &tell)).await;
    // The processes have ended with their run.
    if let Err(error) = queue.remove().await {
        let text = format!("queue {:?} could not be removed: {error}", options.queue);
        tell(Told::Note(&text));
    }
    result
}

async fn unless_stopped<T>(
    stop: &mut watch::Receiver<bool>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        Ok(_) = stop.wait_for(|stop| *stop) => {
            Err(Error::refused("interrupted by a signal; the run has no verdict"))
        }
        result = work => result,
    }
}

async fn test(
    options: &Options,
    client: &Client,
    queue: &TestQueue,
    tell: &dyn Fn(Told<'_>),
) -> Result<Report> {
    let mut run = Run::start(options, client, queue, tell).await?;
    run.go().await?;
    run.stop().await?;
    run.report.left = queue.ready().await?;
    run.judge().await?;
    if !run.report.is_good() {
        run.report.output = run.output();
    }
    Ok(std::mem::take(&mut run.report))
}

/// An empty table of effects, which every role may write.
async fn prepare(options: &connect::Options) -> Result<SqlConnection> {
    const ALLOWED: &str = "SELECT has_database_privilege(current_database(), 'CREATE'), \
        format('GRANT CREATE ON DATABASE %I TO %I', current_database(), current_user), \
        (SELECT pg_get_userbyid(n.nspowner)::text FROM pg_catalog.pg_namespace AS n \
            WHERE n.nspname = 'watership_torture' AND NOT pg_has_role(n.nspowner, 'USAGE')), \
        current_user::text";
    const SQL: &str = "
        DROP SCHEMA IF EXISTS watership_torture CASCADE;
        CREATE SCHEMA watership_torture;
        CREATE TABLE watership_torture.effect (
            id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
            message_id text NOT NULL, key text NOT NULL, number bigint NOT NULL,
            at timestamptz NOT NULL DEFAULT clock_timestamp());
        GRANT USAGE ON SCHEMA watership_torture TO PUBLIC;
        GRANT INSERT ON watership_torture.effect TO PUBLIC";
    let connection = sql(options).await?;
    let client = &connection.client;
    let row = client.query_one(ALLOWED, &[]).await.map_err(postgres_error)?;
    let (allowed, grant, owner, user): (bool, String, Option<String>, String) =
        (row.get(0), row.get(1), row.get(2), row.get(3));
    if !allowed {
        let text = format!("user {user:?} may not make the schema watership_torture");
        return Err(Error::refused(text)
            .hint(format!("run as a superuser or as the owner of the database: {grant}")));
    }
    if let Some(owner) = owner {
        let text = format!("the schema watership_torture belongs to {owner:?}, not to {user:?}");
        return Err(Error::refused(text).hint(
            "it is from an earlier crash test: run DROP SCHEMA watership_torture CASCADE as its \
             owner, or name that user in --url",
        ));
    }
    client.batch_execute(SQL).await.map_err(postgres_error)?;
    Ok(connection)
}

struct Run<'a> {
    options: &'a Options,
    client: &'a Client,
    queue: &'a TestQueue,
    tell: &'a dyn Fn(Told<'_>),
    /// When something was told.
    told: Instant,
    events: Vec<Event>,
    /// The time of every event, in seconds since 1970: the same for a duplicate.
    time: u64,
    /// The last number of each key.
    numbers: Vec<i64>,
    processes: Vec<Process>,
    directory: PathBuf,
    /// What the processes printed, in the order of their starts.
    logs: Vec<PathBuf>,
    report: Report,
}

impl<'a> Run<'a> {
    async fn start(
        options: &'a Options,
        client: &'a Client,
        queue: &'a TestQueue,
        tell: &'a dyn Fn(Told<'_>),
    ) -> Result<Self> {
        let time = "SELECT extract(epoch FROM now())::bigint";
        let time: i64 = client.query_one(time, &[]).await.map_err(postgres_error)?.get(0);
        let mut run = Self {
            options,
            client,
            queue,
            tell,
            told: Instant::now(),
            events: Vec::new(),
            time: time.unsigned_abs(),
            numbers: vec![0; options.keys],
            processes: Vec::new(),
            directory: own_directory("torture")?,
            logs: Vec::new(),
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
        let name = format!("consumer{}", self.logs.len() + 1);
        let log = self.directory.join(format!("{name}.log"));
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

    fn tell(&mut self, line: Told<'_>) {
        self.told = Instant::now();
        (self.tell)(line);
    }

    async fn go(&mut self) -> Result<()> {
        let rounds = self.options.kills.max(1);
        let mut stuck = 0;
        for round in 0..rounds {
            let before = self.effects().await?;
            let goal = self.options.events * (round + 1) / rounds;
            let published = self.publish_up_to(goal).await?;
            if round >= self.options.kills {
                break;
            }
            // Somewhere in the middle of them, or when they do not move.
            let moment = before + fastrand::i64(0..=published.max(1));
            let moved = self.wait_for(moment).await?;
            stuck = if moved { 0 } else { stuck + 1 };
            if stuck >= STUCK_MAX {
                return Ok(());
            }
            let victim = fastrand::usize(..self.processes.len());
            self.processes[victim].kill();
            self.report.kills += 1;
            sleep(Duration::from_millis(fastrand::u64(0..=PAUSE_MS_MAX))).await;
            self.processes[victim] = self.spawn()?;
            let (effects, published) = (self.effects().await?, self.events.len());
            let of = format!("killed {} of {}", round + 1, self.options.kills);
            self.tell(Told::Round(&format!("{of}, {published} published, {effects} effects")));
        }
        self.wait_for(self.options.events as i64).await?;
        sleep(SETTLE).await;
        self.revive()
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
            self.queue.publish(&event, self.time).await?;
            self.events.push(event);
            published += 1;
            if fastrand::u8(..100) < self.options.duplicates_percent {
                let again = &self.events[fastrand::usize(..self.events.len())];
                self.queue.publish(again, self.time).await?;
                self.report.duplicates += 1;
            }
        }
        Ok(published)
    }

    async fn effects(&self) -> Result<i64> {
        let sql = "SELECT count(DISTINCT message_id) FROM watership_torture.effect";
        Ok(self.client.query_one(sql, &[]).await.map_err(postgres_error)?.get(0))
    }

    /// How many messages are parked, and why the first one.
    async fn parked(&self) -> Result<(i64, Option<String>)> {
        let sql = "SELECT count(*), (array_agg(coalesce(error, reason) ORDER BY id))[1] \
                   FROM watership_inbox.parked_messages WHERE consumer = $1";
        let row = self.client.query_one(sql, &[&self.options.consumer]).await;
        let row = row.map_err(postgres_error)?;
        Ok((row.get(0), row.get(1)))
    }

    /// Waits until there are `goal` effects. False if none came for so long that none will.
    async fn wait_for(&mut self, goal: i64) -> Result<bool> {
        let (mut last, mut moved) = (-1, Instant::now());
        loop {
            let now = self.effects().await?;
            if now >= goal {
                return Ok(true);
            }
            if now > last {
                (last, moved) = (now, Instant::now());
            }
            // What is parked will have no effect, so there may be nothing to wait for.
            let (quiet, patience) = (moved.elapsed(), self.options.patience);
            if quiet >= patience / 6 && now + self.parked().await?.0 >= goal {
                return Ok(true);
            }
            if quiet >= patience {
                return Ok(false);
            }
            if self.told.elapsed() >= TOLD_EVERY {
                let (ready, quiet) = (self.queue.ready().await?, quiet.as_secs());
                self.tell(Told::Note(&format!(
                    "waiting: {now} effects, {goal} are expected by now; {ready} messages are \
                     ready in the queue; no effect for {quiet} s, gives up at {} s",
                    patience.as_secs()
                )));
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
                let output = self.output();
                if !output.is_empty() {
                    let text = format!(
                        "the last lines that the command printed:\n    {}",
                        output.join("\n    ")
                    );
                    self.tell(Told::Note(&text));
                }
                let text =
                    format!("the command ended by itself {ENDS_MAX} times, at last with {status}");
                return Err(Error::refused(text).hint(
                    "a consumer must run until SIGTERM; docs/consuming.md says what the command \
                     gets (\"Is my consumer right?\")",
                ));
            }
            self.processes[at] = self.spawn()?;
        }
        Ok(())
    }

    /// The last lines of the process that printed something and was started last.
    fn output(&self) -> Vec<String> {
        let texts = self.logs.iter().rev().map(|log| tail(log));
        let text = texts.into_iter().find(|text| !text.trim().is_empty()).unwrap_or_default();
        // The tail begins within a line.
        let cut = usize::from(text.len() >= LOG_TAIL && text.trim_end().contains('\n'));
        let lines: Vec<_> = text.trim_end().lines().skip(cut).map(str::to_owned).collect();
        lines[lines.len().saturating_sub(OUTPUT_LINES_MAX)..].to_vec()
    }

    /// Asks the consumers to stop, and waits for them.
    async fn stop(&mut self) -> Result<()> {
        self.processes.iter_mut().for_each(|process| process.signal(Signal::Term));
        for process in &mut self.processes {
            if process.wait(STOP_LIMIT).await.is_err() {
                process.kill();
                let text = format!("a consumer did not stop within {STOP_LIMIT:?} of SIGTERM");
                return Err(Error::refused(text));
            }
        }
        Ok(())
    }

    async fn judge(&mut self) -> Result<()> {
        let sql = "SELECT message_id, key, number FROM watership_torture.effect ORDER BY id";
        let rows = self.client.query(sql, &[]).await.map_err(postgres_error)?;
        let effects =
            rows.iter().map(|row| Event { id: row.get(0), key: row.get(1), number: row.get(2) });
        (self.report.parked, self.report.first_parked) = self.parked().await?;
        judge(&self.events, effects, self.options.ordered, &mut self.report);
        Ok(())
    }
}
