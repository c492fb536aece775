//! Starts everything, does what the schedule says, and watches.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection};
use tokio::time::{Instant, interval, sleep};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal, StopMode};

use crate::crash_relay::{EXCHANGE, POLL, QUEUE, Window};
use crate::crash_support::{Judged, Load, Place, Scene, client};
use crate::framing::{Protocol, is_ack, is_wal};
use crate::proxy::{Action, Direction, Flow, How, Proxy, Trigger};
use crate::schedule::{Duplicates, Fault, Step, growth};

/// Growth of resident memory that is no leak, in KiB: the first outages fill buffers that stay.
const GROWTH: i64 = 4096;
/// Runs of fewer seconds say nothing about memory.
const MEMORY_AFTER: u64 = 300;

/// All that can be broken.
struct Ground {
    scene: Scene,
    server: Postgres,
    node: Rabbit,
    postgres: Proxy,
    rabbit: Proxy,
    broker: String,
}

/// Runs the schedule; panics when something is not as promised.
pub async fn soak(seed: u64, seconds: u64, rate: u32, steps: &[Step]) {
    let mut ground = Ground::new(seed).await;
    let watch = tokio::spawn(watch_slot(ground.server.url("postgres", "shop")));
    ground.scene.consume();
    ground.scene.relay().start();
    ground.scene.write(Load { events: 4_000_000, rate, rows: 5 });
    ground.scene.flowing(500).await;
    let begin = Instant::now();
    let mut duplicates = Duplicates::default();
    let mut memory = Vec::new();
    for step in steps {
        ground.calm_until(begin + step.at, &mut memory).await;
        let name = format!("{:?}", step.fault);
        println!("{:>6.1?} {name}", begin.elapsed());
        duplicates.begins(&name, ground.scene.repeated());
        ground.scene.fault(&name);
        ground.strike(step.fault).await;
        let ended = Instant::now();
        ground.live(ended).await;
        memory.push(ground.scene.relay().memory_kib().0);
        let bound = u64::from(Window::default().events) + u64::from(rate);
        duplicates.recovered(&name, ground.scene.repeated(), bound);
    }
    ground.calm_until(begin + Duration::from_secs(seconds), &mut memory).await;
    duplicates.begins("the end", ground.scene.repeated());
    let grown = growth(&memory);
    println!(
        "memory: {} samples, {} KiB at last, grown by {grown} KiB; most duplicates of a fault {}",
        memory.len(),
        memory.last().copied().unwrap_or_default(),
        duplicates.most()
    );
    ground.scene.enough();
    let judged = ground.scene.judge().await;
    record(seed, seconds, &judged, grown, &duplicates);
    assert_eq!(duplicates.wrong, [""; 0], "seed {seed}");
    assert!(seconds < MEMORY_AFTER || grown <= GROWTH, "seed {seed}: grown by {grown} KiB");
    assert!(!watch.is_finished(), "seed {seed}: the slot was ahead of the checkpoint");
    watch.abort();
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
        Self { scene, server, node, postgres, rabbit, broker }
    }

    /// Nothing is broken until then; looks at the memory once a second.
    async fn calm_until(&mut self, time: Instant, memory: &mut Vec<u64>) {
        let mut second = interval(Duration::from_secs(1));
        while Instant::now() < time {
            second.tick().await;
            self.scene.relay().check();
            memory.push(self.scene.relay().memory_kib().0);
        }
    }

    /// What was committed until now arrives, and then more.
    async fn live(&mut self, ended: Instant) {
        let committed = self.scene.committed();
        let before = self.scene.relay().confirmed().await;
        self.scene.recovered(ended, before).await;
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

    /// What a queue holds goes with it; so it is unbound and emptied first.
    async fn delete_queue(&mut self, ms: u64) {
        let (_connection, channel) = self.channel().await;
        let none = FieldTable::default();
        let unbound = channel.queue_unbind(QUEUE.into(), EXCHANGE.into(), "#".into(), none.clone());
        unbound.await.expect("unbound");
        let deadline = Instant::now() + Duration::from_secs(60);
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        loop {
            let queue = channel.queue_declare(QUEUE.into(), passive, none.clone()).await;
            if queue.expect("it is there").message_count() == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "the queue is not empty within a minute");
            sleep(POLL).await;
        }
        let options = QueueDeleteOptions::default();
        channel.queue_delete(QUEUE.into(), options).await.expect("deleted");
        sleep(Duration::from_millis(ms)).await;
        let mut arguments = FieldTable::default();
        let quorum = AMQPValue::LongString("quorum".into());
        arguments.insert("x-queue-type".into(), quorum);
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(QUEUE.into(), options, arguments).await.expect("declared");
        bind(&channel).await;
    }
}

async fn bind(channel: &Channel) {
    let (options, none) = (Default::default(), FieldTable::default());
    let bound = channel.queue_bind(QUEUE.into(), EXCHANGE.into(), "#".into(), options, none);
    bound.await.expect("bound");
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

/// One line for `scripts/reliability`.
fn record(seed: u64, seconds: u64, judged: &Judged, grown: i64, duplicates: &Duplicates) {
    use std::io::Write as _;
    let recoveries: Vec<_> = judged.recoveries.iter().map(Duration::as_millis).collect();
    let most = recoveries.iter().max().copied().unwrap_or_default();
    let Judged { events, lost, violations, duplicates: repeated, bound, faults, .. } = judged;
    let line = format!(
        "{{\"class\":\"soak\",\"group\":\"soak\",\"test\":\"soak\",\"ok\":{ok},\
         \"recovery_ms\":{recoveries:?},\"events\":{events},\"lost\":{lost},\
         \"order_violations\":{violations},\"duplicates\":{repeated},\"duplicate_bound\":{bound},\
         \"faults_injected\":{faults},\"more\":{{\"seed\":{seed},\"seconds\":{seconds},\
         \"memory_grown_kib\":{grown},\"slowest_ms\":{most},\"most_duplicates\":{}}}}}\n",
        duplicates.most(),
        ok = duplicates.wrong.is_empty(),
    );
    print!("{line}");
    let Some(path) = std::env::var_os("WATERSHIP_FAULT_RESULTS") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.expect("the results can be written");
}
