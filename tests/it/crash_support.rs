//! One run under faults: writers, the real binary as the relay, a consumer, and the judge.
//!
//! The truth is what the outbox table holds at the end, so a COMMIT whose answer was lost needs
//! no guess. Each writer owns its keys and numbers their events; a number is never used twice, so
//! "first arrivals of a key rise strictly, and every row arrived" is the whole promise. The
//! judgement itself is the demo's ledger.

use std::hash::{Hash as _, Hasher as _};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Connection};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use watership::dev::consumer;
use watership::dev::ledger::{Counts, Judgement, Ledger, Mark};

use crate::crash_relay::{LIMIT, POLL, QUEUE, Relay, Window, within};

/// Writers, each on its own connection.
const WRITERS: u32 = 4;
/// Keys of one writer.
const KEYS: u32 = 50;
/// One transaction in so many is rolled back.
const ROLLBACK_EVERY: u32 = 16;

/// Nothing takes longer to get over, once it is over: a refused session waits 15 s at most.
const RECOVERY_MAX: Duration = Duration::from_secs(25);
/// What a writer may be behind and catch up: timers are a millisecond or two late.
const LATE: Duration = Duration::from_millis(20);

/// What the writers do.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Events of all writers together, rolled back ones included.
    pub events: u32,
    /// Events a second of all writers together, and never more: who was held up does not hurry
    /// afterwards. 0 means as fast as they can.
    pub rate: u32,
    /// Most rows in one transaction; the least is 1.
    pub rows: u32,
}

/// What the consumer and the judge share.
struct Shared {
    start: Instant,
    ledger: Mutex<Ledger>,
    /// Events of transactions whose COMMIT was answered.
    committed: AtomicU64,
    /// The writers have to end.
    enough: AtomicBool,
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
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

/// What the judge found; the rest of it would have failed the test.
#[derive(Debug, Clone, Default)]
pub struct Judged {
    pub events: u64,
    pub lost: u64,
    pub violations: u64,
    pub duplicates: u64,
    /// Most duplicates of all faults together.
    pub bound: u64,
    /// Duplicates of the fault that had most, as far as they came before the next fault.
    pub most: u64,
    pub faults: u64,
    pub recoveries: Vec<Duration>,
    /// The test looked at what the relay said.
    pub heard: bool,
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

    /// Seeded anew for each run, and printed.
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
        let mut seen = self.counts();
        let mut deadline = Instant::now() + LIMIT;
        while seen.delivered < count {
            self.relay.check();
            tokio::time::sleep(POLL).await;
            let counts = self.counts();
            if counts != seen {
                (seen, deadline) = (counts, Instant::now() + LIMIT);
            }
            let (title, log) = (&self.title, self.relay.log());
            let delivered = seen.delivered;
            assert!(
                Instant::now() < deadline,
                "{title}: {delivered} of {count} delivered, then nothing for {LIMIT:?}; {log}"
            );
        }
    }

    /// Waits until the writers have committed `more` events than now.
    pub async fn committed_more(&mut self, more: u64) {
        let count = self.shared.committed.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + LIMIT;
        while self.shared.committed.load(Ordering::Relaxed) < count {
            assert!(Instant::now() < deadline, "{}: the writers do not get on", self.title);
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits for `more` events beyond those that have arrived.
    pub async fn flowing(&mut self, more: u64) {
        let count = self.counts().delivered + more;
        self.delivered(count).await;
    }

    /// Starts the consumer. Where a broker goes down, this comes after it: what a consumer held
    /// unacknowledged comes back from a dead broker behind newer messages, and that order is the
    /// broker's. Whoever starts later sees the queue as it was published.
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
    /// on, and returns how long that took. There must be something to send.
    pub async fn recovered(&mut self, ended: Instant, confirmed_before: u64) -> Duration {
        self.relay.confirms(confirmed_before + 1).await;
        let took = ended.elapsed();
        self.recovered_in(took);
        took
    }

    /// The last fault is over, and the relay took this time to get over it.
    pub fn recovered_in(&mut self, took: Duration) {
        assert!(took < RECOVERY_MAX, "{}: recovered after {took:?}; {}", self.title, {
            self.relay.log()
        });
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
        // What the window held, and what was confirmed in the 100 ms since the last checkpoint.
        let bound = u64::from(self.window.events) + verdict.best_second / 10;
        let repeated = verdict.counts.duplicates - verdict.counts.redelivered;
        let most = bound * self.faults.len() as u64;
        assert!(repeated <= most, "{}: {repeated} duplicates, at most {most}", self.title);
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

/// Whether the long tests were asked for.
pub fn full() -> bool {
    std::env::var_os("WATERSHIP_FULL").is_some()
}

/// The committed events.
async fn truth(database: &str) -> Vec<(Uuid, Mark)> {
    let client = client(database).await.expect("Postgres is up at the end");
    let sql = "SELECT id, aggregate_id, (payload->>'n')::bigint FROM watership.outbox";
    let rows = client.query(sql, &[]).await.expect("the outbox can be read");
    let mark = |row: &tokio_postgres::Row| Mark {
        key: row.get(1),
        n: row.get::<_, i64>(2).cast_unsigned(),
    };
    rows.iter().map(|row| (row.get(0), mark(row))).collect()
}

/// An ordinary SQL connection.
pub async fn client(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A writer: it goes on through every fault of the server, and gives up after [`LIMIT`] of them.
async fn write(shared: &Shared, url: &str, writer: u32, load: Load, mut dice: fastrand::Rng) {
    let mut numbers = [0_u64; KEYS as usize];
    let (mut due, mut written) = (Instant::now(), 0);
    let mut deadline = due + LIMIT;
    let wanted = |written| written < load.events && !shared.enough.load(Ordering::Relaxed);
    while wanted(written) {
        assert!(Instant::now() < deadline, "writer {writer}: Postgres stays away");
        let Ok(client) = client(url).await else {
            tokio::time::sleep(POLL).await;
            continue;
        };
        // The casts say which overload is meant.
        let emit = "SELECT watership.emit('order'::text, k, 'changed'::text, p) \
                    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS u(k, p, i) ORDER BY i";
        let Ok(emit) = client.prepare(emit).await else { continue };
        while wanted(written) {
            let rows = dice.u32(1..=load.rows);
            if load.rate > 0 {
                tokio::time::sleep_until(due).await;
                due = due.max(Instant::now() - LATE) + Duration::from_secs(1) * rows / load.rate;
            }
            let (keys, bodies) = batch(writer, rows, &mut numbers, &mut dice);
            written += rows;
            let roll_back = dice.u32(0..ROLLBACK_EVERY) == 0;
            let done = async {
                if roll_back {
                    client.batch_execute("BEGIN").await?;
                }
                client.query(&emit, &[&keys, &bodies]).await?;
                if roll_back {
                    client.batch_execute("ROLLBACK").await?;
                }
                Ok::<_, tokio_postgres::Error>(())
            };
            // Whether it committed is what the table says at the end.
            if done.await.is_err() {
                break;
            }
            deadline = Instant::now() + LIMIT;
            if !roll_back {
                shared.committed.fetch_add(rows.into(), Ordering::Relaxed);
            }
        }
    }
}

/// Keys and bodies of one transaction.
fn batch(
    writer: u32,
    rows: u32,
    numbers: &mut [u64],
    dice: &mut fastrand::Rng,
) -> (Vec<String>, Vec<String>) {
    let event = |_| {
        let key = dice.usize(0..numbers.len());
        numbers[key] += 1;
        let (name, n) = (format!("{writer}-{key}"), numbers[key]);
        let note = "Please leave it with the neighbours if nobody opens. ".repeat(5);
        let sum = checksum(&name, n, &note);
        let body = format!("{{\"key\":\"{name}\",\"n\":{n},\"sum\":{sum},\"note\":\"{note}\"}}");
        (name, body)
    };
    (0..rows).map(event).unzip()
}

/// So many messages out of order are printed when they come; all are counted.
const TOLD_MOST: u64 = 10;

/// A message arrived; the last one ends the consumer.
fn record(shared: &Shared, message: &Delivery) -> ControlFlow<()> {
    let properties = &message.properties;
    if properties.kind().as_ref().is_some_and(|kind| kind.as_str() == LAST) {
        return ControlFlow::Break(());
    }
    let at = shared.start.elapsed();
    let id = properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
    let mut ledger = shared.ledger();
    match id.zip(mark_of(&message.data)) {
        Some((id, mark)) => {
            let before = ledger.counts().violations;
            let (key, n) = (mark.key.clone(), mark.n);
            ledger.arrived(id, mark, at, message.redelivered);
            if ledger.counts().violations > before && before < TOLD_MOST {
                let headers = properties.headers();
                println!("OUT OF ORDER after {at:.3?}: key {key}, n {n}: {headers:?}");
            }
        }
        None => ledger.unreadable(),
    }
    ControlFlow::Continue(())
}

fn mark_of(body: &[u8]) -> Option<Mark> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let mark = Mark { key: value.get("key")?.as_str()?.into(), n: value.get("n")?.as_u64()? };
    match (value.get("sum"), value.get("note")) {
        // A test's own event, in a few bytes.
        (None, None) => Some(mark),
        (sum, note) => {
            let right = checksum(&mark.key, mark.n, note?.as_str()?);
            (sum?.as_u64()? == right).then_some(mark)
        }
    }
}

/// Of all that a body says; a body that was changed on its way counts as altered.
fn checksum(key: &str, n: u64, note: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    (key, n, note).hash(&mut hasher);
    // JSON numbers are exact up to here everywhere.
    hasher.finish() >> 11
}

/// The type of the message behind which nothing comes any more.
const LAST: &str = "last";

async fn send_last(broker: &str) {
    let connection = Connection::connect(broker, Default::default()).await.expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    let properties = BasicProperties::default().with_type(LAST.into());
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish("".into(), QUEUE.into(), options, b"", properties).await;
    sent.expect("sent").await.expect("not confirmed, but written");
}
