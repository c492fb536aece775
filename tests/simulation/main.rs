//! The real loop over a simulated source and a simulated publisher, with paused time and seeded
//! faults. Every run checks: nothing lost, order of first arrivals per key, duplicates within
//! the bound, checkpoints monotonic, the slot never past what has arrived.
//!
//! A failing seed reproduces: `WATERSHIP_SEED=17 cargo test --test simulation`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use watership::metrics::{Metrics, RouteLabel};
use watership::position::{Lsn, Position};
use watership::relay::canary::Canary;
use watership::relay::checkpoint::{MemoryStore, Store};
use watership::relay::parked::RowState;
use watership::relay::parking::{Known, Limits, Parking};
use watership::relay::phantoms::Published;
use watership::relay::progress::Progress;
use watership::relay::status::Status;
use watership::relay::{Parts, Relay, Tuning, Window};
use watership::route::{Action, Ordering, Router, default_rules};
use world::{Faults, Shared, SimPublisher, SimSource, World};

const EVENTS: u32 = 600;
const KEYS: u32 = 40;
const WINDOW: Window = Window { events: 256, bytes: 1 << 20, unconfirmed: 64 };
const INTERVAL: Duration = Duration::from_millis(100);
const TUNING: Tuning = Tuning {
    window: WINDOW,
    checkpoint_interval: INTERVAL,
    drain_timeout: Duration::from_secs(10),
    idle_interval: Duration::from_secs(30),
    parked: Limits { rows: 10_000, keys: 1_000 },
};
/// Simulated time after which a run that is not done is stuck.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What a run did, besides being right.
#[derive(Debug, Default)]
struct Report {
    duplicates: usize,
    allowed: usize,
    sessions: u32,
    runs: u32,
}

struct Run {
    world: Shared,
    store: Arc<MemoryStore>,
    report: Report,
    crashes_left: u32,
    ordering: Ordering,
    limits: Limits,
}

impl Run {
    fn new(seed: u64, faults: Faults, ordering: Ordering) -> Self {
        let world = World::new(seed, EVENTS, KEYS, faults);
        let latency = Duration::from_millis(world.borrow_mut().rng.u64(0..30));
        let store = Arc::new(MemoryStore { latency, ..MemoryStore::default() });
        let (report, crashes_left) = (Report::default(), faults.crashes);
        // Some runs park without a limit, some run into it.
        let rows = if world.borrow_mut().rng.bool() { 10_000 } else { 20 };
        let limits = Limits { rows, keys: 1_000 };
        Self { world, store, report, crashes_left, ordering, limits }
    }

    fn checkpoint(&self) -> (Position, Lsn) {
        let start = Position { epoch: 1, commit_lsn: Lsn(1000), ..Position::default() };
        self.store.rows.lock().unwrap().last().copied().unwrap_or((start, Lsn(1000)))
    }

    /// One session: until everything is stored, a lost connection or a crash.
    async fn session(&mut self) {
        self.report.sessions += 1;
        let (position, flush) = self.checkpoint();
        let mut rules = default_rules();
        if let Action::Publish { ordering, policy, .. } = &mut rules[0].action {
            *ordering = self.ordering;
            policy.park_unroutable = self.world.borrow().faults.unroutable > 0.0;
        }
        let labels: Vec<RouteLabel> = rules
            .iter()
            .map(|r| RouteLabel { name: r.name.clone(), owner: r.owner.clone() })
            .collect();
        let parts = Parts {
            source: SimSource::new(&self.world, &self.store, position, flush),
            publisher: SimPublisher::new(&self.world),
            store: Store::Memory(self.store.clone()),
            progress: Progress::new(position, flush),
            parking: Parking::new(self.limits, self.store.index(), self.known(position)),
            router: Arc::new(Router::new(&rules).unwrap()),
            metrics: Arc::new(Metrics::new(&labels)),
            status: Status::new("sim", Vec::new()),
            canary: Canary::new(Duration::ZERO),
            published: Published::default(),
        };
        let idle_interval = Duration::from_millis(300);
        let tuning = Tuning { parked: self.limits, idle_interval, ..TUNING };
        let mut relay = Relay::new(parts, "sim", &tuning);
        let (_stop, shutdown) = watch::channel(false);
        let operator = self.operator();
        let done = self.done();
        let crash = self.crash();
        tokio::select! {
            _ = relay.run(shutdown) => {}
            () = done => {}
            () = operator => unreachable!("the operator never ends"),
            () = crash => self.crashes_left -= 1,
        }
        drop(relay);
        self.report.allowed += self.world.borrow().uncovered(self.checkpoint().0);
        // A row that arrived and is not marked as released is published again.
        let again = self.store.index();
        let parked = self.store.parked.lock().unwrap();
        let seen = |id| self.world.borrow().has_seen(id);
        self.report.allowed += again.iter().filter(|row| seen(parked[&row.key].id)).count();
        drop(parked);
        // The slot was saved at an earlier moment: after a crash of the server it goes back.
        let mut world = self.world.borrow_mut();
        if world.rng.bool() {
            let saved = world.slot.0;
            let back = world.rng.u64(1000..=saved);
            world.slot = Lsn(back);
        }
    }

    /// Ends when the last transaction is stored.
    fn done(&self) -> impl Future<Output = ()> + use<> {
        let end = self.world.borrow().log.last().expect("a world has events").end_lsn;
        let store = self.store.clone();
        async move {
            let stored = || store.rows.lock().unwrap().last().is_some_and(|(_, f)| *f >= end);
            while !stored() || !store.index().is_empty() {
                sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// Rows of any state that a replay may bring again.
    fn known(&self, position: Position) -> Known {
        let parked = self.store.parked.lock().unwrap();
        let mut known = Known::default();
        for row in parked.values().filter(|row| row.key.position.commit_lsn >= position.commit_lsn)
        {
            known.ids.insert((row.id, row.key.route.clone()));
            known.until = known.until.max(row.key.position.commit_lsn);
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
                if world.borrow_mut().rng.f64() < 0.2 {
                    world.borrow_mut().max_body = usize::MAX;
                }
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
        async move {
            match wait {
                Some(wait) => sleep(Duration::from_millis(wait)).await,
                None => std::future::pending().await,
            }
        }
    }

    fn is_done(&self) -> bool {
        let end = self.world.borrow().log.last().unwrap().end_lsn;
        self.checkpoint().1 >= end && self.store.index().is_empty()
    }

    fn check(&mut self, with_order: bool) {
        let world = self.world.borrow();
        let mut first = HashSet::new();
        let numbers: HashMap<_, _> =
            world.log.iter().flat_map(|t| &t.events).map(|e| (e.id, (e.key, e.n))).collect();
        let mut last: HashMap<u32, u32> = HashMap::new();
        for id in &world.arrived {
            if !first.insert(*id) {
                self.report.duplicates += 1;
                continue;
            }
            let (key, n) = numbers[id];
            let before = last.insert(key, n).unwrap_or(0);
            assert!(!with_order || n == before + 1, "key {key}: {n} arrived after {before}");
        }
        assert_eq!(first.len(), numbers.len(), "lost events");
        assert!(
            self.report.duplicates <= self.report.allowed,
            "{} duplicates, {} were not covered by a checkpoint at a fault",
            self.report.duplicates,
            self.report.allowed
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
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut run = Run::new(seed, faults, ordering);
        let sessions = timeout(LIMIT, async {
            while !run.is_done() {
                run.session().await;
            }
        });
        sessions.await.expect("the run makes progress");
        run
    })
}

/// Runs many seeds and names the one that fails.
fn seeds(count: u64, faults: Faults, ordering: Ordering) -> Report {
    let number = |name| std::env::var(name).ok().map(|s| s.parse::<u64>().unwrap());
    let only = number("WATERSHIP_SEED");
    let count = number("WATERSHIP_SEEDS").unwrap_or(count);
    let mut total = Report::default();
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        let run = || simulate(seed, faults, ordering);
        match std::panic::catch_unwind(run) {
            Ok(report) => {
                total.duplicates += report.duplicates;
                total.allowed += report.allowed;
                total.sessions += report.sessions;
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

fn crashing() -> Faults {
    Faults { crash_within: Duration::from_millis(600), crashes: 6, ..Faults::default() }
}

#[test]
fn without_a_fault_every_event_arrives_once_and_in_order() {
    let total = seeds(100, Faults::default(), Ordering::Keyed);
    assert_eq!(total.duplicates, 0);
}

#[test]
fn a_crash_at_any_moment_loses_nothing_and_repeats_only_what_no_checkpoint_covered() {
    let total = seeds(300, crashing(), Ordering::Keyed);
    assert!(total.duplicates > 0, "the crashes must hurt, or they test nothing");
    let per_session = total.allowed / total.sessions as usize;
    assert!(per_session <= WINDOW.events * 2, "{per_session} uncovered events at a fault");
}

#[test]
fn selective_nacks_do_not_reorder_a_key() {
    let total = seeds(200, Faults { nack: 0.1, ..Faults::default() }, Ordering::Keyed);
    assert_eq!(total.duplicates, 0);
}

#[test]
fn a_lost_confirm_ends_the_session_and_nothing_is_lost() {
    let faults = Faults { confirm_lost: 0.005, ..Faults::default() };
    let total = seeds(200, faults, Ordering::Keyed);
    assert!(total.sessions > total.runs);
}

#[test]
fn an_unbound_queue_holds_the_route_and_it_resumes_by_itself() {
    let faults = Faults { unbound: 0.003, ..Faults::default() };
    let total = seeds(200, faults, Ordering::Keyed);
    assert_eq!((total.duplicates, total.sessions), (0, total.runs));
}

#[test]
fn all_faults_together() {
    let faults = Faults {
        nack: 0.05,
        confirm_lost: 0.002,
        cut: 0.003,
        unbound: 0.001,
        poison: 0.005,
        ..crashing()
    };
    seeds(300, faults, Ordering::Keyed);
}

#[test]
fn a_pipelined_route_keeps_order_while_there_is_no_nack() {
    let faults = Faults { cut: 0.003, ..crashing() };
    seeds(100, faults, Ordering::Pipelined);
}

#[test]
fn the_checker_sees_how_nacks_reorder_a_pipelined_route() {
    let faults = Faults { nack: 0.1, ..Faults::default() };
    let reordered = |seed: &u64| {
        let mut run = finished(*seed, faults, Ordering::Pipelined);
        run.check(false);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.check(true))).is_err()
    };
    assert_eq!((0..5).filter(reordered).count(), 5);
}

#[test]
fn poison_is_parked_and_its_key_stays_in_order_through_retries() {
    let total = seeds(200, Faults { poison: 0.01, ..Faults::default() }, Ordering::Keyed);
    assert_eq!((total.duplicates, total.sessions), (0, total.runs));
}

#[test]
fn parking_survives_crashes_at_any_moment() {
    seeds(300, Faults { poison: 0.01, ..crashing() }, Ordering::Keyed);
}

#[test]
fn unroutable_messages_are_parked_with_all_that_follow_them() {
    let faults = Faults { unroutable: 0.01, nack: 0.02, ..crashing() };
    seeds(300, faults, Ordering::Keyed);
}

#[test]
fn shutdown_drains_the_window_and_leaves_nothing_to_repeat() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let world = World::new(5, EVENTS, KEYS, Faults::default());
        let store = Arc::new(MemoryStore::default());
        let start = Position { epoch: 1, commit_lsn: Lsn(1000), ..Position::default() };
        let rules = default_rules();
        let label = RouteLabel { name: "outbox".into(), owner: String::new() };
        let parts = Parts {
            source: SimSource::new(&world, &store, start, Lsn(1000)),
            publisher: SimPublisher::new(&world),
            store: Store::Memory(store.clone()),
            progress: Progress::new(start, Lsn(1000)),
            parking: Parking::default(),
            router: Arc::new(Router::new(&rules).unwrap()),
            metrics: Arc::new(Metrics::new(&[label])),
            status: Status::new("sim", Vec::new()),
            canary: Canary::new(Duration::ZERO),
            published: Published::default(),
        };
        let mut relay = Relay::new(parts, "sim", &TUNING);
        let (stop, shutdown) = watch::channel(false);
        let asked = async {
            sleep(Duration::from_millis(150)).await;
            stop.send(true).unwrap();
            std::future::pending::<()>().await;
        };
        tokio::select! { result = relay.run(shutdown) => result.unwrap(), () = asked => {} }
        let (position, flush) = *store.rows.lock().unwrap().last().expect("a checkpoint");
        let world = world.borrow();
        assert!(!world.arrived.is_empty());
        assert_eq!(world.uncovered(position), 0, "all that arrived is covered");
        assert_eq!(world.slot, flush, "the source was told");
    });
}
