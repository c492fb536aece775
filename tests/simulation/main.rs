//! The real loop over a simulated source and a simulated publisher, with paused time and seeded
//! faults. Every run checks: nothing lost, order of first arrivals per key, duplicates within
//! the bound, checkpoints monotonic, the slot never past what has arrived.
//!
//! A failing seed reproduces: `WATERSHIP_SEED=17 cargo test --test simulation`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod history;
mod runs;
mod store;
mod world;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use store::MemoryStore;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use watership::metrics::{Metrics, RouteLabel};
use watership::position::{Lsn, Mark, Position};
use watership::relay::backfill::Backfill;
use watership::relay::checkpoint::Checkpoint;
use watership::relay::checkpoint::own::OwnCheckpoint;
use watership::relay::checkpoint::progress::Progress;
use watership::relay::parking::row::RowState;
use watership::relay::parking::{Known, Limits, Parking};
use watership::relay::status::Status;
use watership::relay::upkeep::canary::Canary;
use watership::relay::{Kept, Relay, RelayParts, Tuning, WindowLimits};
use watership::route::{Action, Ordering, Plans, Resumed, Router, default_rules};
use watership::source::SourceKind;
use world::{Faults, Shared, SimPublisher, SimSource, World};

const EVENTS: u32 = 600;
const KEYS: u32 = 40;
const WINDOW: WindowLimits = WindowLimits { events: 256, bytes: 1 << 20, unconfirmed: 64 };
const INTERVAL: Duration = Duration::from_millis(100);
/// Longest simulated time from the loss of the broker to the end of the session: the last
/// checkpoint has a second, and the clock of this runtime has a grain of a millisecond.
const LAST_STORE: Duration = Duration::from_millis(1002);
const TUNING: Tuning = Tuning {
    max_unstored: 64,
    window: WINDOW,
    checkpoint_interval: INTERVAL,
    drain_timeout: Duration::from_secs(10),
    idle_interval: Duration::from_secs(30),
    parked: Limits { rows: 10_000, keys: 1_000 },
};
/// Failovers of one run at most: each writes the rest of the history again.
const FAILOVERS_MAX: u32 = 5;
/// Simulated time after which a run that is not done is stuck.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What a run did.
#[derive(Debug, Default)]
struct Report {
    duplicates: usize,
    allowed: usize,
    sessions: u32,
    runs: u32,
    /// Sessions that ended with the broker.
    broker_lost: u32,
    /// Messages that a session remembered when it began.
    remembered: usize,
    /// Checkpoints that went back under a process that knew better.
    went_back: u32,
    /// Standbys that were promoted.
    failovers: u32,
    /// Events that a failover lost after they had arrived.
    phantoms: usize,
    /// Messages that arrived and whose channel was closed before their confirm.
    closed_on: usize,
}

/// What a process remembers from session to session.
#[derive(Default)]
struct Process {
    kept: Kept,
    own: OwnCheckpoint,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Done,
    BrokerLost,
    Crashed,
}

struct Run {
    world: Shared,
    store: MemoryStore,
    process: Process,
    session_no: i64,
    report: Report,
    crashes_left: u32,
    ordering: Ordering,
    limits: Limits,
    timeline: u32,
}

impl Run {
    fn new(seed: u64, faults: Faults, ordering: Ordering) -> Self {
        let world = World::new(seed, EVENTS, KEYS, faults);
        let latency = if faults.slow_store { 8_000..9_000 } else { 0..30 };
        let latency = Duration::from_millis(world.borrow_mut().rng.u64(latency));
        let mut store = MemoryStore::new(latency);
        store.keeps_history = faults.failover > 0.0;
        let (report, crashes_left) = (Report::default(), faults.crashes);
        // Some runs park without a limit, some run into it.
        let rows = if world.borrow_mut().rng.bool() { 10_000 } else { 20 };
        let limits = Limits { rows, keys: 1_000 };
        let (process, session_no) = (Process::default(), 0);
        let timeline = 1;
        Self { world, store, process, session_no, report, crashes_left, ordering, limits, timeline }
    }

    fn checkpoint(&self) -> (Position, Mark) {
        let start = Position { epoch: 1, mark: Mark(1000), ..Position::default() };
        self.store.rows.lock().unwrap().last().copied().unwrap_or((start, Mark(1000)))
    }

    /// Takes the checkpoint over as a session does. When it went back, the process ends, and a
    /// person has a new one go on where the row is, in a new epoch.
    fn take_over(&mut self) -> (Position, Mark) {
        let mark = self.process.own.last_known();
        let (mut position, flush) = self.checkpoint();
        if mark.is_some_and(|mark| mark.verify(&self.row()).is_err()) {
            self.report.went_back += 1;
            position.epoch += 1;
            self.store.rows.lock().unwrap().push((position, flush));
            self.process = Process::default();
            self.nothing_is_remembered();
        }
        let timeline = self.world.borrow().history.timelines().current();
        if self.timeline != timeline {
            // The session follows the promoted server.
            self.timeline = timeline;
            position.epoch += 1;
            self.store.rows.lock().unwrap().push((position, flush));
        }
        self.session_no += 1;
        let before = self.process.kept.remembered.len();
        self.process.own.took(&self.row(), &mut self.process.kept.remembered);
        if self.process.kept.remembered.len() < before {
            self.nothing_is_remembered();
        }
        self.report.remembered += self.process.kept.remembered.len();
        (position, flush)
    }

    fn row(&self) -> Checkpoint {
        let (position, flush) = self.checkpoint();
        Checkpoint {
            kind: SourceKind::Wal,
            position,
            flush_lsn: flush.lsn(),
            session_no: self.session_no,
            slot: String::new(),
            system_id: 7,
            timeline: self.timeline,
            publication: String::new(),
            publication_oid: 1,
        }
    }

    /// All that arrived beyond the checkpoint may come again.
    fn nothing_is_remembered(&mut self) {
        self.report.allowed += self.world.borrow().uncovered(self.checkpoint().0);
    }

    /// One session: until everything is stored, a lost connection or a crash.
    async fn session(&mut self) -> Ended {
        self.report.sessions += 1;
        let (position, flush) = self.take_over();
        let mut rules = default_rules();
        for rule in &mut rules {
            if let Action::Publish { ordering, policy, .. } = &mut rule.action {
                *ordering = self.ordering;
                policy.park_unroutable = self.world.borrow().faults.unroutable > 0.0;
            }
        }
        let labels: Vec<RouteLabel> = rules
            .iter()
            .map(|r| RouteLabel { name: r.name.clone(), owner: r.owner.clone() })
            .collect();
        let Kept { published, parked, remembered } = std::mem::take(&mut self.process.kept);
        let parts = RelayParts {
            source: SimSource::new(&self.world, &self.store, position, flush.lsn()),
            publisher: SimPublisher::new(&self.world),
            store: self.store.clone(),
            progress: Progress::new(position, flush),
            parking: Parking::new(self.limits, self.store.index(), self.known(position)),
            router: Arc::new(Router::new(&rules).unwrap()),
            plans: Plans::new(
                &Router::new(&rules).unwrap(),
                Resumed { keys: self.store.keys(), ..Resumed::default() },
            ),
            metrics: Arc::new(Metrics::new(&labels)),
            status: Status::new("sim", Vec::new()),
            canary: Canary::new(Duration::ZERO),
            broken: Vec::new(),
            missing: Default::default(),
            published,
            recently_parked: parked,
            remembered,
            backfill: Backfill::none(),
        };
        let idle_interval = Duration::from_millis(300);
        let tuning = Tuning { parked: self.limits, idle_interval, ..TUNING };
        let mut relay = Relay::new(parts, "sim", &tuning);
        let (_stop, shutdown) = watch::channel(false);
        let operator = self.operator();
        let done = self.done();
        let crash = self.crash();
        let punctual = self.punctual(flush);
        let ended = tokio::select! {
            lost = relay.run(shutdown) => {
                lost.expect_err("nobody asked it to end");
                Ended::BrokerLost
            }
            () = done => Ended::Done,
            () = operator => unreachable!("the operator never ends"),
            () = crash => Ended::Crashed,
            () = punctual => unreachable!("it watches until the end"),
        };
        let (stored, stored_flush) = relay.progress().stored_checkpoint();
        self.process.own.stored(stored, stored_flush.lsn());
        match ended {
            Ended::BrokerLost => self.process.kept = relay.close().await,
            Ended::Done | Ended::Crashed => drop(relay),
        }
        self.count_doubts(ended);
        ended
    }

    /// How many messages may come again because of the end of this session.
    fn count_doubts(&mut self, ended: Ended) {
        let faults = self.world.borrow().faults;
        match ended {
            Ended::Done => {}
            Ended::Crashed => {
                self.crashes_left = self.crashes_left.saturating_sub(1);
                self.process = Process::default();
                self.nothing_is_remembered();
            }
            Ended::BrokerLost => {
                self.report.broker_lost += 1;
                let world = self.world.borrow();
                let late = world.lost_at.expect("it was lost").elapsed();
                assert!(late <= LAST_STORE, "the session ended {late:?} after the broker was lost");
                let in_doubt = world.in_doubt.len();
                drop(world);
                assert!(in_doubt <= WINDOW.unconfirmed, "{in_doubt} are in doubt");
                self.report.allowed += in_doubt;
                // What is settled was not stored; and the messages of a pipelined route follow each
                // other, whatever their keys are.
                if faults.slow_store || self.ordering == Ordering::Pipelined {
                    self.nothing_is_remembered();
                }
            }
        }
        self.parked_come_again();
    }

    /// A row that arrived and is not marked as released is published again.
    fn parked_come_again(&mut self) {
        let again = self.store.index();
        let parked = self.store.parked.lock().unwrap();
        let seen = |id| self.world.borrow().has_seen(id);
        self.report.allowed += again.iter().filter(|row| seen(parked[&row.key].id)).count();
    }

    /// What happens between two sessions.
    async fn pause(&mut self) {
        let (faults, dice) = {
            let mut world = self.world.borrow_mut();
            // The slot was saved at an earlier moment: after a crash of the server it goes back.
            if world.rng.bool() {
                let saved = world.slot.0;
                let back = world.rng.u64(1000..=saved);
                world.slot = Lsn(back);
            }
            (world.faults, [(); 4].map(|()| world.rng.f64()))
        };
        if dice[0] < faults.takeover {
            let first = std::mem::take(&mut self.process);
            self.nothing_is_remembered();
            self.crashes_left += 1;
            self.session().await;
            self.process = first;
            self.nothing_is_remembered();
        }
        if dice[1] < faults.resync {
            let (mut position, flush) = self.checkpoint();
            (position.epoch, self.session_no) = (position.epoch + 1, self.session_no + 1);
            self.store.rows.lock().unwrap().push((position, flush));
        }
        if dice[3] < faults.failover && self.report.failovers < FAILOVERS_MAX {
            self.fail_over();
        }
        if dice[2] < faults.restore {
            let mut rows = self.store.rows.lock().unwrap();
            let kept = self.world.borrow_mut().rng.usize(0..=rows.len());
            rows.truncate(kept);
            drop(rows);
            let flush = self.checkpoint().1;
            let mut world = self.world.borrow_mut();
            world.slot = world.slot.min(flush.lsn());
            drop(world);
            self.nothing_is_remembered();
        }
    }

    /// The promoted server has the first transactions, and the rows that were written before then.
    fn fail_over(&mut self) {
        self.report.failovers += 1;
        let stored = self.checkpoint().1.lsn();
        let switch = self.world.borrow_mut().fail_over(stored);
        self.store.go_back_to(switch);
        let flush = self.checkpoint().1;
        let mut world = self.world.borrow_mut();
        world.slot = world.slot.min(flush.lsn());
        world.parked = self.store.parked.lock().unwrap().values().map(|row| row.id).collect();
        drop(world);
        self.nothing_is_remembered();
        self.parked_come_again();
    }

    /// Panics when a transaction was confirmed whole and is not stored for too long.
    fn punctual(&self, from: Mark) -> impl Future<Output = ()> + use<> {
        let (world, store) = (self.world.clone(), self.store.clone());
        // Before it is written, another write or a look at the parked rows may be under way.
        let limit = INTERVAL + 3 * store.latency + Duration::from_millis(300);
        async move {
            let mut next = world.borrow().log().partition_point(|t| t.end_lsn <= from.lsn());
            let mut since = Instant::now();
            loop {
                sleep(Duration::from_millis(50)).await;
                let stored = store.rows.lock().unwrap().last().map_or(from, |(_, flush)| *flush);
                let world = world.borrow();
                let end = |next: usize| world.log()[next - 1].end_lsn;
                if next == 0 || end(next) <= stored.lsn() {
                    since = Instant::now();
                    next = world.first_unconfirmed(next);
                }
                let age = since.elapsed();
                assert!(
                    age <= limit,
                    "confirmed up to {} and stored up to {stored:?} for {age:?}",
                    end(next)
                );
            }
        }
    }

    /// Ends when the last transaction is stored.
    fn done(&self) -> impl Future<Output = ()> + use<> {
        let end = self.world.borrow().end();
        let store = self.store.clone();
        async move {
            let stored = || store.rows.lock().unwrap().last().is_some_and(|(_, f)| f.lsn() >= end);
            while !stored() || !store.index().is_empty() {
                sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// Rows of any state that a replay may bring again.
    fn known(&self, position: Position) -> Known {
        let parked = self.store.parked.lock().unwrap();
        let mut known = Known::default();
        for row in parked.values().filter(|row| row.key.position.mark >= position.mark) {
            known.ids.insert((row.id, row.key.route.clone(), row.key.part));
            known.until = known.until.max(row.key.position.mark);
        }
        known
    }

    /// Raises the broker's limit some day, and now and then has everything tried again.
    fn operator(&self) -> impl Future<Output = ()> + use<> {
        let (world, store) = (self.world.clone(), self.store.clone());
        async move {
            loop {
                let wait = world.borrow_mut().rng.u64(10..1500);
                sleep(Duration::from_millis(wait)).await;
                let mut world = world.borrow_mut();
                if world.rng.f64() < 0.2 && world.max_body != usize::MAX {
                    world.max_body = usize::MAX;
                    world.restart = world.faults.unannounced;
                }
                drop(world);
                for row in store.parked.lock().unwrap().values_mut() {
                    if row.state == RowState::Parked {
                        row.state = RowState::Retrying;
                    }
                }
            }
        }
    }

    /// Ends when the process is to die.
    fn crash(&self) -> impl Future<Output = ()> + use<> {
        let mut world = self.world.borrow_mut();
        let within = u64::try_from(world.faults.crash_within.as_millis()).unwrap();
        let wait = (self.crashes_left > 0).then(|| world.rng.u64(1..=within));
        let may_restart = world.faults.unannounced;
        drop(world);
        let world = self.world.clone();
        async move {
            let wait = wait.map_or(LIMIT, Duration::from_millis);
            let asked = async {
                if !may_restart {
                    std::future::pending::<()>().await;
                }
                while !std::mem::take(&mut world.borrow_mut().restart) {
                    sleep(Duration::from_millis(50)).await;
                }
            };
            tokio::select! { () = sleep(wait) => {} () = asked => {} }
        }
    }

    fn is_done(&self) -> bool {
        let end = self.world.borrow().end();
        self.checkpoint().1.lsn() >= end && self.store.index().is_empty()
    }

    fn check(&mut self, with_order: bool) {
        let world = self.world.borrow();
        self.report.closed_on = world.closed_on;
        let mut first = HashSet::new();
        let events = world.log().iter().flat_map(|t| &t.events);
        let places: HashMap<_, _> = events.map(|e| (e.id, &e.places)).collect();
        let mut last: HashMap<u32, u32> = HashMap::new();
        let mut newest: HashMap<u32, u32> = HashMap::new();
        for id in &world.arrived {
            let Some(places) = places.get(id) else {
                assert!(world.history.was_lost(*id), "{id} was never committed");
                self.report.phantoms += 1;
                continue;
            };
            newest.extend(places.iter().copied());
            if !first.insert(*id) {
                self.report.duplicates += 1;
                continue;
            }
            for (lane, n) in *places {
                let before = last.insert(*lane, *n).unwrap_or(0);
                assert!(!with_order || *n == before + 1, "lane {lane}: {n} came after {before}");
            }
        }
        assert_eq!(first.len(), places.len(), "lost events");
        // A consumer that keeps only what came last of a key ends up with the last state.
        assert!(!with_order || newest == last, "an earlier event was the last to arrive");
        assert!(
            self.report.duplicates <= self.report.allowed + self.report.closed_on,
            "{} duplicates, {} were not covered by a checkpoint at a fault, {} had no confirm when \
             their channel was closed",
            self.report.duplicates,
            self.report.allowed,
            self.report.closed_on
        );
        assert!(self.store.rows.lock().unwrap().is_sorted(), "checkpoints are monotonic");
    }
}

/// Runs a seed to its end and checks it.
fn simulate(seed: u64, faults: Faults, ordering: Ordering) -> Report {
    let mut run = finished(seed, faults, ordering);
    run.check(ordering == Ordering::Keyed || faults.nack + faults.unbound == 0.0);
    run.report
}

/// Runs a seed to its end.
fn finished(seed: u64, faults: Faults, ordering: Ordering) -> Run {
    paused(async {
        let mut run = Run::new(seed, faults, ordering);
        let sessions = timeout(LIMIT, async {
            while !run.is_done() {
                run.session().await;
                run.pause().await;
            }
        });
        sessions.await.expect("the run makes progress");
        run
    })
}

/// Runs on a clock that moves on when everything waits for it.
fn paused<T>(run: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(run)
}

/// Runs many seeds and names the one that fails: all of `count` in the long check, which also looks
/// for planted bugs, and a third of them otherwise.
fn seeds(count: u64, faults: Faults, ordering: Ordering) -> Report {
    let number = |name| std::env::var(name).ok().map(|s| s.parse::<u64>().unwrap());
    let only = number("WATERSHIP_SEED");
    let short = if std::env::var_os("WATERSHIP_FULL").is_some() { 1 } else { 3 };
    let count = number("WATERSHIP_SEEDS").unwrap_or(count / short);
    let mut total = Report::default();
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        let run = || simulate(seed, faults, ordering);
        match std::panic::catch_unwind(run) {
            Ok(report) => {
                total.duplicates += report.duplicates;
                total.allowed += report.allowed;
                total.sessions += report.sessions;
                total.broker_lost += report.broker_lost;
                total.remembered += report.remembered;
                total.went_back += report.went_back;
                total.failovers += report.failovers;
                total.phantoms += report.phantoms;
                total.closed_on += report.closed_on;
                total.runs += 1;
            }
            Err(panic) => {
                eprintln!("seed {seed} failed: WATERSHIP_SEED={seed} runs it alone");
                std::panic::resume_unwind(panic);
            }
        }
    }
    total
}
