//! `watership demo`: private servers, a small shop, a relay process, a consumer, and two faults.
//!
//! The relay runs as a process of its own, so that it can be killed with -9 as any process can;
//! the configuration it gets is an ordinary file, printed with `--keep`. The judgement is the
//! ledger's: what committed arrived, nothing else did, and each key in commit order.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lapin::message::Delivery;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use uuid::Uuid;

use crate::dev::ledger::{Counts, Ledger};
use crate::dev::{Postgres, PostgresOptions, Process, Rabbit, RabbitOptions, StopMode, consumer};
use crate::error::{Error, Result};

mod shop;
mod view;

use shop::Transactions;
use view::View;

const QUEUE: &str = "demo.orders";
const EXCHANGE: &str = "demo.events";
const DATABASE: &str = "shop";

/// How long the shop should be open, whatever the number of events.
const OPENING_SECONDS: u64 = 16;
/// The shop writes at least this many events a second.
const LEAST_RATE: u64 = 200;
/// How long `init`, the first connection or a recovery may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// The demo gives up when nothing arrives for so long although everything should be up.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// After the last event: time for duplicates to show.
const SETTLE: Duration = Duration::from_secs(1);
/// How often progress is looked at, and shown on a terminal.
const TICK: Duration = Duration::from_millis(100);

/// Show Watership at work on private servers, through two faults.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Example:\n  watership demo --events 50000\n\n\
    It starts its own Postgres and RabbitMQ in a temporary directory and touches nothing else.\n\
    Exit code 0 if every committed event arrived, in order; 1 if not.")]
pub struct Args {
    /// Number of events that the shop commits.
    #[arg(long, value_name = "N", default_value_t = 20_000,
        value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
    pub events: u64,
    /// Keep the servers and the relay running until Ctrl-C, and print their URLs.
    #[arg(long)]
    pub keep: bool,
}

/// What the shop, the consumer and the judge share.
#[derive(Debug)]
struct Run {
    start: Instant,
    ledger: Mutex<Ledger>,
}

impl Run {
    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("nobody panics while holding the ledger")
    }

    /// A message arrived.
    fn record(&self, message: &Delivery) -> ControlFlow<()> {
        let at = self.elapsed();
        let id = message.properties.message_id().as_ref();
        let id = id.and_then(|id| Uuid::parse_str(id.as_str()).ok());
        let mut ledger = self.ledger();
        match id.zip(shop::mark_of(&message.data)) {
            Some((id, mark)) => ledger.arrived(id, mark, at, message.redelivered),
            None => ledger.unreadable(),
        }
        ControlFlow::Continue(())
    }
}

/// The servers, and the relay between them.
struct Stack {
    postgres: Postgres,
    rabbit: Rabbit,
    config: PathBuf,
    /// Port of `/status` and the others.
    admin: u16,
    relay: Process,
}

/// How a wait for progress ended.
enum Watched {
    Reached,
    Silent,
}

const SILENT: &str = "no progress for";

/// When the faults happened, since the start of the run.
#[derive(Debug, Clone, Copy)]
struct Faults {
    relay_killed: Duration,
    relay_back: Duration,
    broker_stopped: Duration,
    broker_back: Duration,
}

/// Runs the demo; `true` when everything that committed arrived, in order.
///
/// # Errors
/// When a part cannot be started or ends on its own; the text shows the end of its log.
pub async fn run(args: Args) -> Result<bool> {
    let mut stack = Stack::start().await?;
    let run = Arc::new(Run { start: Instant::now(), ledger: Mutex::default() });
    let (consuming, mut ready) = watch::channel(false);
    let consumer = {
        let (run, url) = (run.clone(), stack.rabbit.url("/"));
        let record = move |message: &Delivery| run.record(message);
        tokio::spawn(async move { consumer::consume(&url, QUEUE, &consuming, record).await })
    };
    stack.wait_for_queue(&mut ready).await?;
    let shop = open_shop(&run, &stack, args.events);
    let (faults, transactions) = stack.live_through(&run, shop, args.events).await?;
    consumer.abort();
    let judgement = run.ledger().judgement(faults.relay_killed);
    view::report(&judgement, transactions, &faults);
    if args.keep {
        stack.keep().await?;
    }
    stack.end().await?;
    Ok(judgement.holds())
}

/// Starts the writers; together they commit `events` events.
fn open_shop(run: &Arc<Run>, stack: &Stack, events: u64) -> JoinSet<Result<Transactions>> {
    let rate = (events / OPENING_SECONDS).max(LEAST_RATE);
    let mut shop = JoinSet::new();
    for writer in 0..shop::WRITERS {
        // The first writers take what does not divide evenly.
        let share = events / shop::WRITERS + u64::from(writer < events % shop::WRITERS);
        let (run, url) = (run.clone(), stack.postgres.url("shop", DATABASE));
        let rate = rate as f64 / shop::WRITERS as f64;
        shop.spawn(async move { shop::write(&run, &url, writer, share, rate).await });
    }
    shop
}

impl Stack {
    async fn start() -> Result<Self> {
        println!("Starting a private Postgres and a private RabbitMQ ...");
        let begin = Instant::now();
        let (postgres, rabbit) = tokio::try_join!(
            Postgres::start(PostgresOptions { fsync: true, ..Default::default() }),
            Rabbit::start(RabbitOptions { management: true, ..Default::default() }),
        )?;
        println!(
            "  Postgres {} on port {}, RabbitMQ on port {}, after {:.1} s",
            postgres.major(),
            postgres.port(),
            rabbit.port(),
            begin.elapsed().as_secs_f64()
        );
        postgres.create_database(DATABASE).await?;
        postgres.execute("CREATE ROLE shop LOGIN; CREATE ROLE relay LOGIN REPLICATION").await?;
        postgres.execute_in(DATABASE, shop::TABLE).await?;
        let config = crate::dev::home()?.join("watership.toml");
        let admin = crate::dev::free_port()?;
        std::fs::write(&config, config_text(&postgres, &rabbit, admin))
            .map_err(|e| Error::config(format!("writing {}", config.display())).caused_by(e))?;
        init(&config, &postgres.url("postgres", DATABASE)).await?;
        let grants = "GRANT watership_app TO shop; GRANT watership_relay TO relay";
        postgres.execute_in(DATABASE, grants).await?;
        let relay = start_relay(&config)?;
        Ok(Self { postgres, rabbit, config, admin, relay })
    }

    /// The consumer finds its queue once the relay has declared it.
    async fn wait_for_queue(&mut self, ready: &mut watch::Receiver<bool>) -> Result<()> {
        let deadline = Instant::now() + STEP_LIMIT;
        while !*ready.borrow_and_update() {
            self.check_relay()?;
            if Instant::now() > deadline {
                let text = format!("the relay has not declared queue {QUEUE} in {STEP_LIMIT:?}");
                return Err(Error::unreachable(text + &self.relay_log()));
            }
            // A change wakes early; without one the relay is looked at again.
            let _ = tokio::time::timeout(TICK, ready.changed()).await;
        }
        Ok(())
    }

    /// Watches the run, breaks things at a quarter and at the half of it, waits for the rest.
    async fn live_through(
        &mut self,
        run: &Run,
        mut shop: JoinSet<Result<Transactions>>,
        events: u64,
    ) -> Result<(Faults, Transactions)> {
        let mut view = View::new();
        self.reach(run, &mut view, &mut shop, |c| c.committed >= events / 4).await?;
        let relay_killed = run.elapsed();
        view.note("kill -9 of the relay; a new one starts");
        self.relay.kill();
        self.relay = start_relay(&self.config)?;
        let mark = run.ledger().counts().delivered;
        self.reach(run, &mut view, &mut shop, back(mark, events)).await?;
        let relay_back = run.elapsed();
        self.reach(run, &mut view, &mut shop, |c| c.committed >= events / 2).await?;
        let broker_stopped = run.elapsed();
        view.note("RabbitMQ restarts; the shop keeps writing");
        self.restart_broker(run, &mut view).await?;
        let mark = run.ledger().counts().delivered;
        self.reach(run, &mut view, &mut shop, back(mark, events)).await?;
        let broker_back = run.elapsed();
        self.reach(run, &mut view, &mut shop, |c| c.committed >= events).await?;
        let mut transactions = Transactions::default();
        while let Some(writer) = shop.join_next().await {
            let done = ended_well(writer)?;
            transactions.committed += done.committed;
            transactions.rolled_back += done.rolled_back;
        }
        // What is missing when nothing comes any more is for the ledger to say.
        match self.watch(run, &mut view, |c| c.delivered >= events).await? {
            Watched::Reached => tokio::time::sleep(SETTLE).await,
            Watched::Silent => eprintln!("\n{SILENT} {SILENCE_LIMIT:?}{}", self.relay_log()),
        }
        view.end();
        Ok((Faults { relay_killed, relay_back, broker_stopped, broker_back }, transactions))
    }

    /// Like [`Stack::watch`], for what the demo cannot go on without.
    async fn reach(
        &mut self,
        run: &Run,
        view: &mut View,
        shop: &mut JoinSet<Result<Transactions>>,
        reached: impl Fn(Counts) -> bool,
    ) -> Result<()> {
        match self.watch(run, view, reached).await? {
            Watched::Reached => Ok(()),
            Watched::Silent => {
                view.end();
                // A writer that failed is the better story.
                while let Some(writer) = shop.try_join_next() {
                    ended_well(writer)?;
                }
                let counts = run.ledger().counts();
                let text = format!(
                    "{SILENT} {SILENCE_LIMIT:?}, with {} events committed and {} delivered",
                    counts.committed, counts.delivered
                );
                Err(Error::unreachable(text + &self.relay_log()))
            }
        }
    }

    /// Shows progress until `reached`, or until nothing has happened for [`SILENCE_LIMIT`].
    async fn watch(
        &mut self,
        run: &Run,
        view: &mut View,
        reached: impl Fn(Counts) -> bool,
    ) -> Result<Watched> {
        let mut last = (run.ledger().counts(), Instant::now());
        loop {
            let counts = run.ledger().counts();
            view.show(run.elapsed(), counts);
            if reached(counts) {
                return Ok(Watched::Reached);
            }
            self.check_relay()?;
            if counts != last.0 {
                last = (counts, Instant::now());
            } else if last.1.elapsed() > SILENCE_LIMIT {
                return Ok(Watched::Silent);
            }
            tokio::time::sleep(TICK).await;
        }
    }

    async fn restart_broker(&mut self, run: &Run, view: &mut View) -> Result<()> {
        let restart = async {
            self.rabbit.stop().await?;
            self.rabbit.start_again().await
        };
        let mut restart = std::pin::pin!(restart);
        loop {
            tokio::select! {
                done = &mut restart => return done,
                () = tokio::time::sleep(TICK) => view.show(run.elapsed(), run.ledger().counts()),
            }
        }
    }

    /// The relay must outlive everything but our own kill.
    fn check_relay(&mut self) -> Result<()> {
        match self.relay.ended() {
            None => Ok(()),
            Some(status) => {
                let text = format!("the relay ended unexpectedly with {status}");
                Err(Error::unreachable(text + &self.relay_log()))
            }
        }
    }

    fn relay_log(&self) -> String {
        format!("\nthe end of the relay's log:\n{}", crate::dev::tail(self.relay.log()))
    }

    async fn keep(&mut self) -> Result<()> {
        println!("\nEverything keeps running until Ctrl-C:");
        println!("  Postgres    {}", self.postgres.url("postgres", DATABASE));
        println!("  RabbitMQ    {}", self.rabbit.url("/"));
        println!("  management  {}", self.rabbit.management_url().unwrap_or_default());
        println!("  relay       http://127.0.0.1:{}/status", self.admin);
        println!("  config      {}", self.config.display());
        println!("  relay's log {}", self.relay.log().display());
        println!("  try         watership status --config {}", self.config.display());
        let heard = tokio::signal::ctrl_c().await;
        heard.map_err(|e| Error::internal("waiting for Ctrl-C").caused_by(e))
    }

    /// In this order the relay sees no fault at the end.
    async fn end(mut self) -> Result<()> {
        self.relay.kill();
        self.rabbit.kill().await;
        self.postgres.stop(StopMode::Immediate).await
    }
}

/// Something more has arrived, or there is nothing more to come.
fn back(mark: u64, events: u64) -> impl Fn(Counts) -> bool {
    move |counts| counts.delivered > mark || counts.delivered >= events
}

fn ended_well(writer: Result<Result<Transactions>, JoinError>) -> Result<Transactions> {
    writer.map_err(|e| Error::protocol("a writer of the shop").caused_by(e))?
}

fn start_relay(config: &Path) -> Result<Process> {
    let log = crate::dev::home()?.join("relay.log");
    let mut command = Command::new(crate::dev::this_program()?);
    command.arg("run").arg("--config").arg(config);
    Process::spawn("the relay", command, &log)
}

async fn init(config: &Path, admin: &str) -> Result<()> {
    let mut command = tokio::process::Command::new(crate::dev::this_program()?);
    command.args(["init", "--admin-url", admin, "--config"]).arg(config).kill_on_drop(true);
    let failed = |text: String| Error::refused(format!("watership init {text}"));
    let out = match tokio::time::timeout(STEP_LIMIT, command.output()).await {
        Ok(Ok(out)) => out,
        Ok(Err(e)) => return Err(failed("cannot be started".into()).caused_by(e)),
        Err(_) => return Err(failed(format!("has not finished after {STEP_LIMIT:?}"))),
    };
    if out.status.success() {
        println!("  watership init created schema, roles, publication and slot");
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(failed(format!("ended with {}: {}", out.status, said.trim())))
}

fn config_text(postgres: &Postgres, rabbit: &Rabbit, admin: u16) -> String {
    let source = postgres.url("relay", DATABASE);
    let broker = rabbit.url("/");
    let management = rabbit.management_url().unwrap_or_default();
    format!(
        "name = \"demo\"\n\n[source]\nurl = \"{source}\"\n\n\
         [broker]\nurl = \"{broker}\"\ntopology = \"declare\"\n\
         management_url = \"{management}\"\n\n\
         [admin]\nlisten = \"127.0.0.1:{admin}\"\n\n\
         [[queue]]\nname = \"{QUEUE}\"\ntype = \"quorum\"\n\n\
         [[binding]]\nqueue = \"{QUEUE}\"\nexchange = \"{EXCHANGE}\"\nrouting_key = \"order.#\"\n\n\
         [[route]]\nname = \"orders\"\nowner = \"demo\"\n\
         outbox = {{ aggregate_type = \"order\" }}\nexchange = \"{EXCHANGE}\"\n\
         routing_key = \"{{aggregate_type}}.{{event_type}}\"\n"
    )
}
