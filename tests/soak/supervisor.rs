//! Starts everything, does what the schedule says, and watches.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection};
use serde_json::json;
use tokio::time::{Instant, interval, sleep};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal, StopMode};

use crate::support::framing::{Protocol, is_ack, is_wal};
use crate::support::judge::Judged;
use crate::support::proxy::{Action, Direction, Flow, How, Proxy, Trigger};
use crate::support::relay::{EXCHANGE, QUEUE, Window};
use crate::support::results;
use crate::support::scene::{Place, Scene};
use crate::support::schedule::{Duplicates, Fault, Step, growth, last_life};
use crate::support::servers::{client, text};
use crate::support::topology::{bind, declare, empty, quiet, unbind};
use crate::support::waiting::{POLL, until};
use crate::support::writers::Load;

/// More resident memory than a full window needs, in KiB: three times what runs of ten minutes took
/// at their peak. What leaks a few bytes an event gets there, whatever the machine.
const MEMORY_MAX_KIB: u64 = 96 * 1024;
/// How many events show what is possible here at most.
const TRIAL: u32 = 60_000;
/// How long a rate is tried, in seconds.
const TRIED: u32 = 12;
/// No fault begins later than this share of the run's time.
const LATE: f64 = 1.25;

/// All that can be broken.
struct Ground {
    scene: Scene,
    server: Postgres,
    node: Rabbit,
    postgres: Proxy,
    rabbit: Proxy,
    broker: String,
    begin: Instant,
    /// Resident memory in KiB, and the second of each look.
    memory: Vec<(f64, u64)>,
}

/// Runs the schedule; panics when something is not as promised.
pub async fn soak(seed: u64, seconds: u64, load: crate::Load, steps: &[Step]) {
    let failed = Failed { seed, seconds };
    let mut ground = Ground::new(seed).await;
    let rate = ground.rate(load).await;
    println!("soak: {rate} events a second");
    let watch = tokio::spawn(watch_slot(ground.server.url("postgres", "shop")));
    ground.scene.consume();
    ground.scene.relay().start();
    ground.scene.write(Load { events: u32::MAX / 2, rate, rows: 5 });
    ground.scene.flowing(500).await;
    ground.begin = Instant::now();
    let begin = ground.begin;
    let mut duplicates = Duplicates::default();
    let mut killed = true;
    for (done, step) in steps.iter().enumerate() {
        if begin.elapsed() > Duration::from_secs(seconds).mul_f64(LATE) {
            // The machine has become slower than it was in the trial, and catches up slowly.
            println!("soak: {done} of {} faults, the others would come too late", steps.len());
            break;
        }
        if killed && step.at >= last_life(seconds) {
            killed = false;
            ground.calm_until(begin + last_life(seconds)).await;
            duplicates.begins("a full window", ground.scene.repeated());
            ground.fill_the_window().await;
            duplicates.recovered(ground.scene.repeated());
            ground.memory.clear();
        }
        ground.calm_until(begin + step.at).await;
        let name = format!("{:?}", step.fault);
        println!("{:>6.1?} {name}", begin.elapsed());
        duplicates.begins(&name, ground.scene.repeated());
        ground.scene.fault(&name);
        ground.strike(step.fault).await;
        let ended = Instant::now();
        ground.live(ended).await;
        duplicates.recovered(ground.scene.repeated());
        let (violations, log) = (ground.scene.violations(), ground.scene.relay().log_text());
        assert_eq!(violations, 0, "seed {seed}: out of order after {name}; {log}");
    }
    ground.calm_until(begin + Duration::from_secs(seconds)).await;
    duplicates.begins("the end", ground.scene.repeated());
    let grown = growth(&ground.memory);
    let (now, peak) = ground.scene.relay().memory_kib();
    println!(
        "memory: {} samples, {now} KiB at last, {peak} KiB at its peak, grows by {grown:.0} KiB in \
         ten minutes; most duplicates of a fault {}",
        ground.memory.len(),
        duplicates.most()
    );
    ground.scene.enough();
    let judged = ground.scene.judge().await;
    let line = line(&Run { seed, seconds, rate, grown, peak }, &judged, &duplicates);
    assert_eq!(duplicates.wrong, [""; 0], "seed {seed}");
    assert!(peak <= MEMORY_MAX_KIB, "seed {seed}: {peak} KiB at its peak");
    assert!(!watch.is_finished(), "seed {seed}: the slot was ahead of the checkpoint");
    watch.abort();
    // Else its drop tells.
    std::mem::forget(failed);
    tell(&line);
}

/// A run until it has held. One that panics leaves a line too.
struct Failed {
    seed: u64,
    seconds: u64,
}

impl Drop for Failed {
    fn drop(&mut self) {
        let Self { seed, seconds } = self;
        let more = json!({"seed": seed, "seconds": seconds});
        let line = json!({"class": "soak", "test": "soak", "ok": false, "more": more});
        tell(&format!("{line}\n"));
    }
}

impl Ground {
    async fn new(seed: u64) -> Self {
        let server = Postgres::start(PostgresOptions::default()).await.expect("a private server");
        server.create_database("shop").await.expect("a database");
        let options = RabbitOptions { management: true, ..Default::default() };
        let node = Rabbit::start(options).await.expect("a private node");
        node.create_vhost("soak").await.expect("a vhost");
        let postgres = Proxy::before(server.port(), Protocol::Postgres).await;
        let rabbit = Proxy::before(node.port(), Protocol::Amqp).await;
        let (database, broker) = (server.url("postgres", "shop"), node.url("soak"));
        let mut scene = Scene::at(Place {
            title: "soak",
            database: &database,
            broker: &broker,
            relay_database: &postgres.url(&database),
            relay_broker: &rabbit.url(&broker),
            window: Window::default(),
            settings: "",
        })
        .await;
        scene.seeded(seed);
        let (begin, memory) = (Instant::now(), Vec::new());
        Self { scene, server, node, postgres, rabbit, broker, begin, memory }
    }

    /// Events a second that are written.
    async fn rate(&self, load: crate::Load) -> u32 {
        match load {
            crate::Load::Rate(rate) => rate,
            crate::Load::Percent(percent) => self.possible().await * percent / 100,
        }
    }

    /// The rate that all of this sustains without a fault, in events a second: another database,
    /// the same servers and proxies. First as fast as writers, relay, consumer and judge can; then
    /// a tenth less until what is written arrives within a tenth of a second. (Small transactions
    /// that come evenly cost more than a backlog.)
    async fn possible(&self) -> u32 {
        self.server.create_database("trial").await.expect("a database");
        self.node.create_vhost("trial").await.expect("a vhost");
        let (database, broker) = (self.server.url("postgres", "trial"), self.node.url("trial"));
        let mut scene = Scene::at(Place {
            title: "trial",
            database: &database,
            broker: &broker,
            relay_database: &self.postgres.url(&database),
            relay_broker: &self.rabbit.url(&broker),
            window: Window::default(),
            settings: "",
        })
        .await;
        scene.consume();
        scene.relay().start();
        let begin = Instant::now();
        scene.write(Load { events: TRIAL, rate: 0, rows: 5 });
        scene.written().await;
        scene.delivered(scene.committed()).await;
        let mut possible = (scene.committed() as f64 / begin.elapsed().as_secs_f64()) as u32;
        while !sustained(&mut scene, possible).await {
            possible -= possible / 10;
        }
        scene.judge().await;
        // Nothing of it may weigh on the run: neither its slot nor its queue.
        self.node.ctl(&["delete_vhost", "trial"]).await.expect("the vhost goes");
        let drop_slot = "SELECT pg_drop_replication_slot('slot_trial')";
        self.server.execute(drop_slot).await.expect("the slot goes");
        self.server.execute("DROP DATABASE trial WITH (FORCE)").await.expect("the database goes");
        possible
    }

    /// What a relay needs at most, it needs now: nothing is confirmed until the window is full.
    async fn fill_the_window(&mut self) {
        self.scene.fault("a full window");
        let (_connection, channel) = self.channel().await;
        unbind(&channel).await;
        let full = |status: &serde_json::Value| {
            status["window_events"].as_u64() >= Some(u64::from(Window::default().events))
        };
        self.scene.relay().reaches("the window is full", full).await;
        bind(&channel).await;
        self.live(Instant::now()).await;
    }

    /// Nothing is broken until then; looks at the memory once a second.
    async fn calm_until(&mut self, time: Instant) {
        let mut second = interval(Duration::from_secs(1));
        while Instant::now() < time {
            second.tick().await;
            self.scene.relay().check();
            let at = self.begin.elapsed().as_secs_f64();
            self.memory.push((at, self.scene.relay().memory_kib().0));
        }
    }

    /// What was committed until now arrives, and then more. What is sent again may come behind
    /// first arrivals of other keys: it is over once the checkpoint has passed it, and what the
    /// queue held then was consumed.
    async fn live(&mut self, ended: Instant) {
        let committed = self.scene.committed();
        let before = self.scene.relay().confirmed().await;
        self.scene.recovered(ended, before).await;
        self.scene.delivered(committed).await;
        let database = self.server.url("postgres", "shop");
        let now = text(&database, "pg_current_wal_lsn()").await;
        let passed = format!("SELECT bool_and(flush_lsn >= '{now}') FROM watership.checkpoint");
        until("a checkpoint", async || text(&database, &passed).await == "true").await;
        let committed = self.scene.committed();
        self.scene.delivered(committed).await;
        self.scene.flowing(300).await;
    }

    async fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::KillRelay => {
                self.scene.relay().kill();
                self.scene.relay().start();
            }
            Fault::FreezeRelay { ms } => {
                self.scene.relay().signal(Signal::Stop);
                sleep(Duration::from_millis(ms)).await;
                self.scene.relay().signal(Signal::Cont);
            }
            Fault::FreezeBroker { ms } => {
                self.node.signal(Signal::Stop);
                sleep(Duration::from_millis(ms)).await;
                self.node.signal(Signal::Cont);
            }
            Fault::Cut { postgres, reset } => {
                self.proxy(postgres).cut(if reset { How::Reset } else { How::Fin });
            }
            Fault::CutInside { postgres, nth } => {
                let (direction, for_ever) = (Direction::ToRelay, false);
                let matches = if postgres { is_wal as fn(&[u8]) -> bool } else { is_ack };
                let action = Action::CutInside(How::Reset);
                let proxy = self.proxy(postgres);
                proxy.trigger(Trigger { direction, matches, nth, action, for_ever });
                proxy.strikes().await;
            }
            Fault::Delay { ms, hold_ms } => {
                let delay = Duration::from_millis(ms);
                let flow = Flow { delay, jitter: delay, ..Flow::default() };
                self.slow(&[true, false], flow, hold_ms).await;
            }
            Fault::Stall { postgres, ms } => {
                let flow = Flow { stalled: true, ..Flow::default() };
                self.slow(&[postgres], flow, ms).await;
            }
            Fault::HalfOpen { postgres, ms } => {
                let flow = Flow { dead: true, ..Flow::default() };
                self.slow(&[postgres], flow, ms).await;
            }
            Fault::RestartBroker { kill } => self.restart_broker(kill).await,
            Fault::RestartPostgres { fast } => {
                let mode = if fast { StopMode::Fast } else { StopMode::Immediate };
                self.server.stop(mode).await.expect("Postgres stops");
                self.server.start_again().await.expect("Postgres starts again");
            }
            Fault::Alarm { ms } => self.alarm(ms).await,
            Fault::DeleteExchange { ms } => self.delete_exchange(ms).await,
            Fault::DeleteQueue { ms } => self.delete_queue(ms).await,
        }
    }

    fn proxy(&self, postgres: bool) -> &Proxy {
        if postgres { &self.postgres } else { &self.rabbit }
    }

    async fn slow(&mut self, which: &[bool], flow: Flow, ms: u64) {
        which.iter().for_each(|postgres| self.proxy(*postgres).flows(flow));
        sleep(Duration::from_millis(ms)).await;
        which.iter().for_each(|postgres| self.proxy(*postgres).heal());
    }

    /// The consumer is away meanwhile: what it held comes back from a dead broker behind newer
    /// messages, and that order would be the broker's.
    async fn restart_broker(&mut self, kill: bool) {
        self.scene.pause();
        if kill {
            self.node.kill().await;
        } else {
            self.node.stop().await.expect("the node stops");
        }
        self.node.start_again().await.expect("the node starts again");
        self.scene.consume();
    }

    async fn alarm(&mut self, ms: u64) {
        let level = "set_vm_memory_high_watermark";
        self.node.ctl(&[level, "0"]).await.expect("the alarm is on");
        sleep(Duration::from_millis(ms)).await;
        self.node.ctl(&[level, "absolute", "2GB"]).await.expect("the alarm is off");
    }

    async fn channel(&self) -> (Connection, Channel) {
        let connected = Connection::connect(&self.broker, Default::default()).await;
        let connection = connected.expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        (connection, channel)
    }

    async fn delete_exchange(&mut self, ms: u64) {
        let (_connection, channel) = self.channel().await;
        channel.exchange_delete(EXCHANGE.into(), Default::default()).await.expect("deleted");
        sleep(Duration::from_millis(ms)).await;
        let kind = lapin::ExchangeKind::Topic;
        let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let none = FieldTable::default();
        // A session that began meanwhile has declared it already; the same again changes nothing.
        let declared = channel.exchange_declare(EXCHANGE.into(), kind, options, none);
        declared.await.expect("declared");
        bind(&channel).await;
    }

    /// What a queue holds goes with it, and what is on its way to it, which the broker confirms all
    /// the same. So it is unbound first, until nothing is in flight, and emptied.
    async fn delete_queue(&mut self, ms: u64) {
        let (_connection, channel) = self.channel().await;
        unbind(&channel).await;
        self.scene.relay().reaches("the route is held and nothing is out", quiet).await;
        empty(&channel).await;
        let options = QueueDeleteOptions::default();
        channel.queue_delete(QUEUE.into(), options).await.expect("deleted");
        sleep(Duration::from_millis(ms)).await;
        declare(&channel).await;
        bind(&channel).await;
    }
}

/// Whether what is written at this rate arrives within a tenth of a second.
async fn sustained(scene: &mut Scene, rate: u32) -> bool {
    let (begin, before) = (Instant::now(), scene.committed());
    scene.write(Load { events: rate * TRIED, rate, rows: 5 });
    scene.written().await;
    let written = (scene.committed() - before) as f64 / begin.elapsed().as_secs_f64();
    let behind = scene.committed() - scene.arrived();
    scene.delivered(scene.committed()).await;
    println!("soak: {rate} a second: {written:.0} committed, at last {behind} behind");
    // One transaction in sixteen is rolled back.
    written > f64::from(rate) * 0.9 && behind < u64::from(rate) / 10
}

/// Ends when the slot is seen ahead of the stored checkpoint. The slot is read first: what it
/// stands at was stored before, so it is there in the later look at the table.
async fn watch_slot(url: String) {
    loop {
        sleep(POLL).await;
        let Ok(client) = client(&url).await else { continue };
        while let Ok(ahead) = is_ahead(&client).await {
            if ahead {
                return;
            }
            sleep(POLL).await;
        }
    }
}

async fn is_ahead(client: &tokio_postgres::Client) -> Result<bool, tokio_postgres::Error> {
    let slot = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots \
        WHERE database = current_database()";
    let slot: String = client.query_one(slot, &[]).await?.get(0);
    let ahead =
        format!("SELECT coalesce(bool_or(flush_lsn < '{slot}'), false) FROM watership.checkpoint");
    Ok(client.query_one(&ahead, &[]).await?.get(0))
}

/// A run's own figures.
struct Run {
    seed: u64,
    seconds: u64,
    rate: u32,
    /// KiB in ten minutes.
    grown: f64,
    /// KiB.
    peak: u64,
}

/// The line for `scripts/reliability`.
fn line(run: &Run, judged: &Judged, duplicates: &Duplicates) -> String {
    let recoveries: Vec<_> = judged.recoveries.iter().map(Duration::as_millis).collect();
    let Run { seed, seconds, rate, grown, peak } = run;
    let Judged { events, lost, violations, duplicates: repeated, bound, faults, .. } = judged;
    let line = json!({
        "class": "soak",
        "group": "soak",
        "test": "soak",
        "ok": true,
        "recovery_ms": recoveries,
        "events": events,
        "lost": lost,
        "order_violations": violations,
        "duplicates": repeated,
        "duplicate_bound": bound,
        "faults_injected": faults,
        "more": {
            "seed": seed,
            "seconds": seconds,
            "rate": rate,
            "memory_grown_kib": grown.round(),
            "memory_peak_kib": peak,
            "slowest_ms": recoveries.iter().max(),
            "most_duplicates": duplicates.most(),
        },
    });
    format!("{line}\n")
}

fn tell(line: &str) {
    print!("{line}");
    results::add(line);
}
