//! One run under faults: writers, the real binary as the relay, a consumer, and the judge.
//!
//! The truth is what the outbox table holds at the end, so a COMMIT whose answer was lost needs
//! no guess. Each writer owns its keys and numbers their events; a number is never used twice, so
//! "first arrivals of a key rise strictly, and every row arrived" is the whole promise. The
//! judgement itself is the ledger's (`watership::dev::ledger`).

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lapin::message::Delivery;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use watership::dev::consumer;
use watership::dev::ledger::{Counts, Judgement, Ledger};

use super::judge::{Judged, record, send_last, truth};
use super::relay::{QUEUE, Relay, Window};
use super::waiting::{LIMIT, Patience, within};
use super::writers::{Load, WRITERS, write};

/// What the consumer and the judge share.
pub struct Shared {
    pub start: Instant,
    ledger: Mutex<Ledger>,
    /// Events of transactions whose COMMIT was answered.
    pub committed: AtomicU64,
    /// The writers have to end.
    pub enough: AtomicBool,
}

impl Shared {
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("nobody panics while holding the ledger")
    }
}

/// One run.
pub struct Scene {
    title: String,
    database: String,
    broker: String,
    window: Window,
    relay: Relay,
    shared: Arc<Shared>,
    writers: JoinSet<()>,
    /// Writers that were ever started: each has keys of its own.
    begun: u32,
    consumer: Option<JoinHandle<()>>,
    faults: Vec<Fault>,
    seed: u64,
}

/// Where a run takes place. The relay may be led to its servers by other URLs than writers and
/// consumer, for example through a proxy or as another user.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub title: &'a str,
    pub database: &'a str,
    pub broker: &'a str,
    pub relay_database: &'a str,
    pub relay_broker: &'a str,
    pub window: Window,
    /// Further lines at the top of the relay's configuration.
    pub settings: &'a str,
}

/// What one fault did.
struct Fault {
    name: String,
    /// Unknown while nobody consumes.
    duplicates_before: Option<u64>,
    recovery: Option<Duration>,
}

impl Scene {
    /// Prepares the database and the broker; the relay does not run yet.
    pub async fn new(title: &str, database: &str, broker: &str, window: Window) -> Self {
        let (relay_database, relay_broker, settings) = (database, broker, "");
        Self::at(Place { title, database, broker, relay_database, relay_broker, window, settings })
            .await
    }

    /// As [`Scene::new`], with all that a test may choose.
    pub async fn at(place: Place<'_>) -> Self {
        let Place { title, database, broker, window, settings, .. } = place;
        let relay = Relay::with(place.relay_database, place.relay_broker, window, settings);
        let mut init = tokio::process::Command::from(relay.command("init"));
        let init = init.args(["--admin-url", database]).output();
        let init = timeout(LIMIT, init).await.expect("init ends").expect("init starts");
        assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
        let seed = std::env::var("WATERSHIP_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        println!("{title}: WATERSHIP_SEED={seed}");
        let shared = Arc::new(Shared {
            start: Instant::now(),
            ledger: Mutex::default(),
            committed: AtomicU64::new(0),
            enough: AtomicBool::new(false),
        });
        Self {
            title: title.into(),
            database: database.into(),
            broker: broker.into(),
            window,
            relay,
            shared,
            writers: JoinSet::new(),
            begun: 0,
            consumer: None,
            faults: Vec::new(),
            seed,
        }
    }

    pub fn relay(&mut self) -> &mut Relay {
        &mut self.relay
    }

    /// With a new seed for each run, and printed.
    pub fn dice(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed)
    }

    /// Starts the writers.
    pub fn write(&mut self, load: Load) {
        for writer in self.begun..self.begun + WRITERS {
            let (url, seed) = (self.database.clone(), self.seed ^ u64::from(writer));
            let load =
                Load { events: load.events / WRITERS, rate: load.rate.div_ceil(WRITERS), ..load };
            let shared = self.shared.clone();
            let dice = fastrand::Rng::with_seed(seed);
            self.writers.spawn(async move { write(&shared, &url, writer, load, dice).await });
        }
        self.begun += WRITERS;
    }

    /// The writers end with the transaction that they are in.
    pub fn enough(&self) {
        self.shared.enough.store(true, Ordering::Relaxed);
    }

    /// Hands arrivals to the judge; for a consumer of the test's own.
    pub fn recorder(&self) -> impl FnMut(&Delivery) -> ControlFlow<()> + Send + 'static {
        let shared = self.shared.clone();
        move |message: &Delivery| record(&shared, message)
    }

    /// A consumer of the test's own consumes; it has to end with the break of the recorder.
    pub fn consumed_by(&mut self, consumer: JoinHandle<()>) {
        self.consumer = Some(consumer);
    }

    /// Takes another seed; before writing.
    pub fn seeded(&mut self, seed: u64) {
        self.seed = seed;
    }

    /// Arrivals of what had arrived before, those left out that the broker marked as redelivered.
    pub fn repeated(&self) -> u64 {
        let counts = self.counts();
        counts.duplicates - counts.redelivered
    }

    /// The consumer goes away at once; what it has not acknowledged goes back into the queue.
    pub fn pause(&mut self) {
        self.consumer.take().expect("somebody consumes").abort();
    }

    /// Events of transactions whose COMMIT was answered.
    pub fn committed(&self) -> u64 {
        self.shared.committed.load(Ordering::Relaxed)
    }

    /// Different events that have arrived.
    pub fn arrived(&self) -> u64 {
        self.counts().delivered
    }

    /// First arrivals behind a later event of their key.
    pub fn violations(&self) -> u64 {
        self.counts().violations
    }

    /// Waits until all writers are done.
    pub async fn written(&mut self) {
        while let Some(done) = self.writers.join_next().await {
            done.expect("a writer does not fail");
        }
    }

    fn counts(&self) -> Counts {
        self.shared.ledger().counts()
    }

    /// Waits until `count` different events have arrived.
    pub async fn delivered(&mut self, count: u64) {
        let mut patience = Patience::new();
        while self.counts().delivered < count {
            self.relay.check();
            let what = || format!("{}: {count} delivered; {}", self.title, self.relay.log());
            patience.more(self.counts(), what).await;
        }
    }

    /// Waits until the writers have committed `more` events than now.
    pub async fn committed_more(&mut self, more: u64) {
        let count = self.committed() + more;
        let mut patience = Patience::new();
        while self.committed() < count {
            let what = || format!("{}: {count} committed", self.title);
            patience.more(self.committed(), what).await;
        }
    }

    /// Waits for `more` events beyond those that have arrived.
    pub async fn flowing(&mut self, more: u64) {
        let count = self.counts().delivered + more;
        self.delivered(count).await;
    }

    /// Starts the consumer. Where a broker goes down, this comes after it: what a consumer held
    /// unacknowledged comes back from a dead broker behind newer messages, and that order is the
    /// broker's. A consumer that starts later sees the queue as it was published.
    pub fn consume(&mut self) {
        let (shared, url) = (self.shared.clone(), self.broker.clone());
        let record = move |message: &Delivery| record(&shared, message);
        let consuming = watch::Sender::new(false);
        let consume = async move { consumer::consume(&url, QUEUE, &consuming, record).await };
        self.consumer = Some(tokio::spawn(consume));
    }

    /// Waits until this relay process has `more` confirms than now.
    pub async fn confirmed_more(&mut self, more: u64) {
        let count = self.relay.confirmed().await + more;
        self.relay.confirms(count).await;
    }

    /// A fault begins.
    pub fn fault(&mut self, name: &str) {
        let duplicates_before = self.consumer.is_some().then(|| self.repeated());
        if self.faults.is_empty() {
            let none = duplicates_before.unwrap_or_default();
            assert_eq!(none, 0, "{}: duplicates without a fault", self.title);
        }
        self.faults.push(Fault { name: name.into(), duplicates_before, recovery: None });
    }

    /// The last fault has ended: waits for the first message that the broker confirms from here
    /// on, and notes how long that took. There must be something to send.
    pub async fn recovered(&mut self, ended: Instant, confirmed_before: u64) {
        self.relay.confirms(confirmed_before + 1).await;
        self.recovered_in(ended.elapsed());
    }

    /// The last fault is over, and the relay took this time to get over it: a figure for the
    /// report.
    pub fn recovered_in(&mut self, took: Duration) {
        self.faults.last_mut().expect("a fault was announced").recovery = Some(took);
    }

    /// Waits for the rest, ends the relay, and judges. Returns the number of duplicates.
    pub async fn finish(self) -> u64 {
        self.judge().await.duplicates
    }

    /// As [`Scene::finish`], with all that was counted.
    pub async fn judge(mut self) -> Judged {
        self.written().await;
        let truth = truth(&self.database).await;
        self.delivered(truth.len() as u64).await;
        self.relay.has_counted_its_faults().await;
        self.relay.stop().await;
        // Nothing is published any more; what the queue still holds comes before this message.
        within("the last message is sent", send_last(&self.broker)).await;
        let consumed =
            within("the last arrives", self.consumer.take().expect("somebody consumes")).await;
        consumed.expect("the consumer does not fail");
        let mut ledger = self.shared.ledger();
        for (id, mark) in truth {
            ledger.committed(id, mark, Duration::ZERO);
        }
        let verdict = ledger.judgement(Duration::ZERO);
        drop(ledger);
        self.report(&verdict);
        assert!(verdict.holds(), "{}: {verdict:?} seed {}; {}", self.title, self.seed, {
            self.relay.log()
        });
        // What the window held, and what was confirmed in the 100 ms since the last checkpoint: of
        // a machine that stores its checkpoints in time. It is reported, not asserted.
        let bound = u64::from(self.window.events) + verdict.best_second / 10;
        let repeated = verdict.counts.duplicates - verdict.counts.redelivered;
        let most = bound * self.faults.len() as u64;
        Judged {
            events: verdict.counts.committed,
            lost: verdict.lost,
            violations: verdict.counts.violations,
            duplicates: repeated,
            bound: most,
            most: self.each(repeated).into_iter().flatten().max().unwrap_or(repeated),
            faults: self.faults.len() as u64,
            recoveries: self.faults.iter().filter_map(|fault| fault.recovery).collect(),
            heard: self.relay.is_heard(),
        }
    }

    /// The duplicates of each fault, where somebody counted; `total` is that of the run.
    fn each(&self, total: u64) -> Vec<Option<u64>> {
        let after = self.faults.iter().skip(1).map(|fault| fault.duplicates_before);
        let faults = self.faults.iter().zip(after.chain([Some(total)]));
        let between = |(fault, after): (&Fault, Option<u64>)| {
            fault.duplicates_before.zip(after).map(|(before, after)| after.saturating_sub(before))
        };
        faults.map(between).collect()
    }

    fn report(&self, verdict: &Judgement) {
        let Counts { committed, duplicates, redelivered, .. } = verdict.counts;
        println!(
            "{}: committed {committed}, keys {}, lost {}, violations {}, never committed {}, \
             duplicates {} (and {redelivered} redelivered), best second {}",
            self.title,
            verdict.keys,
            verdict.lost,
            verdict.counts.violations,
            verdict.unexpected,
            duplicates - redelivered,
            verdict.best_second
        );
        for (fault, repeated) in self.faults.iter().zip(self.each(duplicates - redelivered)) {
            let repeated = repeated.map_or("-".into(), |count| count.to_string());
            let recovery = fault.recovery.map_or("-".into(), |took| format!("{took:.2?}"));
            println!("    {:<36} duplicates {repeated:>5}, recovery {recovery}", fault.name);
        }
    }
}

/// A run in which the relay goes by the same ways as everybody.
pub async fn plain(title: &str, database: &str, broker: &str, settings: &str) -> Scene {
    led(title, (database, database), (broker, broker), settings).await
}

/// A run in which the relay is led to its servers by the second URL of each pair.
pub async fn led(
    title: &str,
    (database, relay_database): (&str, &str),
    (broker, relay_broker): (&str, &str),
    settings: &str,
) -> Scene {
    let window = Window::default();
    Scene::at(Place { title, database, broker, relay_database, relay_broker, window, settings })
        .await
}

/// Waits for the relay's first confirm, and notes how long after `raw` that came. `raw` is when
/// the server served somebody else.
pub async fn recovered_after(
    scene: &mut Scene,
    raw: impl Future<Output = Instant> + Send + 'static,
    confirmed_before: u64,
) {
    let raw = tokio::spawn(raw);
    scene.relay().confirms(confirmed_before + 1).await;
    let relay = Instant::now();
    let raw = raw.await.expect("the server serves");
    scene.recovered_in(relay.saturating_duration_since(raw));
}
