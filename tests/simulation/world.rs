//! The simulated ends: a walsender with history and a broker with a queue.
//!
//! The source speaks real pgoutput bytes through the real assembler. The broker handles publishes
//! in the order in which they were sent, answers in any order, and writes down every arrival.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::{BufMut, Bytes};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;
use watership::error::{Error, Result};
use watership::message::Message;
use watership::position::{Lsn, Mark, Position};
use watership::publisher::{Outcome, Publisher, Ticket};
use watership::source::transaction::{Assembler, Options, OutboxTable, Timelines};
use watership::source::{Item, Receipt, Seen, Source};

use crate::store::MemoryStore;

const OUTBOX: u32 = 16_384;

/// One committed event: its key and its number within the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub id: Uuid,
    pub key: u32,
    pub n: u32,
    /// Larger than the broker takes until it is healed.
    pub large: bool,
}

/// A committed transaction.
#[derive(Debug)]
pub struct Transaction {
    pub commit_lsn: Lsn,
    pub end_lsn: Lsn,
    pub events: Vec<Written>,
}

/// Which faults a run has; probabilities per message unless said.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub nack: f64,
    /// Arrived, but the confirm never comes: ends the session at the deadline.
    pub confirm_lost: f64,
    /// The connection breaks with messages in flight.
    pub cut: f64,
    /// The queue is unbound for this long, once per message with this probability.
    pub unbound: f64,
    /// The process dies within this time of its start, at most this many times.
    pub crash_within: Duration,
    pub crashes: u32,
    /// The event is too large until somebody raises the limit; by event.
    pub poison: f64,
    /// No queue is bound for this message, this time.
    pub unroutable: f64,
    /// What comes between two sessions, by session: another relay has the checkpoint for a while, a
    /// person has it go on in a new epoch, an older state of it is restored.
    pub takeover: f64,
    pub resync: f64,
    pub restore: f64,
    /// A checkpoint takes longer than the end of a session waits for it.
    pub slow_store: bool,
}

/// Everything outside of the relay.
pub struct World {
    pub rng: fastrand::Rng,
    pub log: Vec<Transaction>,
    /// Ids in order of arrival.
    pub arrived: Vec<Uuid>,
    seen: HashSet<Uuid>,
    /// What arrived in this session and whose confirm the relay has not got.
    pub in_doubt: HashSet<Uuid>,
    /// When the broker was lost, last.
    pub lost_at: Option<Instant>,
    /// Transactions at the start of the log that arrived whole.
    whole: usize,
    pub slot: Lsn,
    pub faults: Faults,
    pub unbound_until: Option<Instant>,
    pub faults_seen: u32,
    /// Largest body that the broker takes.
    pub max_body: usize,
    /// Ids that are in the table of parked rows, whatever became of them.
    pub parked: HashSet<Uuid>,
}

/// WAL between two transactions: more than the relay's own writes, so that an idle stream advances.
const GAP: u64 = 10_000;
/// A small event's body is below it, a large one's above.
const MAX_BODY: usize = 100;

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn new(seed: u64, events: u32, keys: u32, faults: Faults) -> Shared {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut log = Vec::new();
        let (mut written, mut lsn) = (0, 1000);
        let mut next: HashMap<u32, u32> = HashMap::new();
        while written < events {
            let large = rng.f64() < 0.05;
            let size = rng.u32(1..=if large { 200 } else { 5 });
            let events = (0..size)
                .map(|_| {
                    let key = rng.u32(0..keys);
                    let n = next.entry(key).and_modify(|n| *n += 1).or_insert(1);
                    let large = rng.f64() < faults.poison;
                    Written { id: Uuid::from_u128(rng.u128(..)), key, n: *n, large }
                })
                .collect();
            written += size;
            lsn += GAP + u64::from(size);
            // The end of one transaction may equal the next change's LSN (M3).
            log.push(Transaction { commit_lsn: Lsn(lsn), end_lsn: Lsn(lsn + 10), events });
            lsn += 10;
        }
        let world = Self {
            rng,
            log,
            arrived: Vec::new(),
            seen: HashSet::new(),
            in_doubt: HashSet::new(),
            lost_at: None,
            whole: 0,
            slot: Lsn(1000),
            faults,
            unbound_until: None,
            faults_seen: 0,
            max_body: MAX_BODY,
            parked: HashSet::new(),
        };
        Rc::new(RefCell::new(world))
    }

    fn arrive(&mut self, id: Uuid) {
        self.arrived.push(id);
        self.seen.insert(id);
        self.in_doubt.insert(id);
    }

    /// How far a server may be told to forget: the first transaction of which something has
    /// neither arrived nor been parked must be sent again.
    pub fn may_forget(&mut self) -> Lsn {
        let (seen, parked) = (&self.seen, &self.parked);
        let there = |e: &Written| seen.contains(&e.id) || parked.contains(&e.id);
        let whole = |t: &&Transaction| t.events.iter().all(there);
        self.whole += self.log[self.whole..].iter().take_while(whole).count();
        self.log.get(self.whole).map_or(Lsn(u64::MAX), |open| open.commit_lsn)
    }

    /// True when the message arrived at least once.
    pub fn has_seen(&self, id: Uuid) -> bool {
        self.seen.contains(&id)
    }

    /// Arrivals that a stored checkpoint at `position` does not cover: they may come again.
    pub fn uncovered(&self, position: Position) -> usize {
        let place = |t: &Transaction, ordinal: usize| Position {
            mark: t.commit_lsn.into(),
            ordinal: ordinal as u64 + 1,
            ..position
        };
        self.log
            .iter()
            .flat_map(|t| t.events.iter().enumerate().map(move |(i, e)| (place(t, i), e.id)))
            .filter(|(at, id)| *at > position && self.seen.contains(id))
            .count()
    }
}

/// The replication stream of one session.
pub struct SimSource {
    world: Shared,
    store: MemoryStore,
    assembler: Assembler,
    frames: VecDeque<Bytes>,
    /// LSN of the last frame: in a real stream each change has one of its own.
    lsn: u64,
    next: usize,
    flushed: Lsn,
}

impl SimSource {
    /// As a server does: from the requested position or the slot's, whichever is later.
    pub fn new(world: &Shared, store: &MemoryStore, stored: Position, flush: Lsn) -> Self {
        let from = flush.max(world.borrow().slot);
        let next = world.borrow().log.partition_point(|t| t.end_lsn <= from);
        let options = Options {
            epoch: stored.epoch,
            system_id: 7,
            timelines: Timelines::new(1, Vec::new()),
            resume_after: stored,
            captured: HashMap::new(),
            database: "shop".into(),
            outbox: OutboxTable::default(),
            catalog_at: Lsn::ZERO,
            types: None,
            canary: String::new(),
        };
        let frames = VecDeque::from([relation()]);
        Self {
            world: world.clone(),
            store: store.clone(),
            assembler: Assembler::new(options),
            frames,
            lsn: 0,
            next,
            flushed: from,
        }
    }

    fn load(&mut self) -> bool {
        let world = self.world.borrow();
        let Some(transaction) = world.log.get(self.next) else { return false };
        self.next += 1;
        self.frames.push_back(begin(transaction.commit_lsn));
        self.frames.extend(transaction.events.iter().map(insert));
        self.frames.push_back(commit(transaction.commit_lsn, transaction.end_lsn));
        true
    }
}

impl Source for SimSource {
    async fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<()> {
        if self.world.borrow_mut().rng.f64() < 0.2 {
            let wait = self.world.borrow_mut().rng.u64(1..20);
            sleep(Duration::from_millis(wait)).await;
        }
        while batch.len() < room {
            // A keepalive between two transactions: its WAL end is past what was sent.
            if self.frames.is_empty() && self.world.borrow_mut().rng.f64() < 0.1 {
                let sent =
                    self.next.checked_sub(1).map(|last| self.world.borrow().log[last].end_lsn);
                batch.extend(sent.map(|end| Item::Idle(Receipt::idle(Mark(end.0 + GAP / 2)))));
            }
            if self.frames.is_empty() && !self.load() {
                break;
            }
            let frame = self.frames.pop_front().expect("just loaded");
            self.lsn += 1;
            self.assembler.apply(Lsn(self.lsn), &frame, batch)?;
        }
        if batch.is_empty() {
            std::future::pending::<()>().await;
        }
        Ok(())
    }

    async fn advance(&mut self, flush: Mark) -> Result<()> {
        let flush = flush.lsn();
        assert!(flush >= self.flushed, "feedback never goes back");
        self.flushed = flush;
        let wait = self.world.borrow_mut().rng.u64(0..5);
        sleep(Duration::from_millis(wait)).await;
        let mut world = self.world.borrow_mut();
        // The LSN rule: at every instant the slot is behind what has arrived or is parked.
        world.parked.extend(self.store.parked.lock().unwrap().values().map(|row| row.id));
        let limit = world.may_forget();
        assert!(flush <= limit, "slot at {flush}, past what has arrived: {limit}");
        let stored =
            self.store.rows.lock().unwrap().last().map_or(Lsn(1000), |(_, flush)| flush.lsn());
        assert!(flush <= stored, "slot at {flush}, past what is stored: {stored}");
        world.slot = world.slot.max(flush);
        Ok(())
    }

    async fn keep_alive(&mut self) -> Result<()> {
        Ok(())
    }

    fn seen(&self) -> Seen {
        self.assembler.seen()
    }

    async fn close(self) {}
}

/// The broker connection of one session.
pub struct SimPublisher {
    world: Shared,
    sent: VecDeque<(Ticket, Uuid)>,
    answers: Vec<(Instant, Ticket, Uuid, Outcome)>,
    broken_at: Option<Instant>,
}

impl SimPublisher {
    pub fn new(world: &Shared) -> Self {
        let (sent, answers) = Default::default();
        world.borrow_mut().in_doubt.clear();
        Self { world: world.clone(), sent, answers, broken_at: None }
    }

    /// The broker handles what has been sent, in order.
    fn handle(&mut self) {
        let mut world = self.world.borrow_mut();
        let now = Instant::now();
        while let Some((ticket, id)) = self.sent.pop_front() {
            if self.broken_at.is_some_and(|at| at <= now) {
                return;
            }
            let faults = world.faults;
            let answer_at = now + Duration::from_millis(world.rng.u64(1..40));
            if world.rng.f64() < faults.cut {
                world.faults_seen += 1;
                self.broken_at = Some(now + Duration::from_millis(world.rng.u64(0..20)));
            }
            if world.rng.f64() < faults.unbound {
                world.unbound_until = Some(now + Duration::from_secs(12));
            }
            if world.unbound_until.is_some_and(|until| now < until) {
                self.answers.push((answer_at, ticket, id, Outcome::Returned("NO_ROUTE".into())));
                continue;
            }
            if world.rng.f64() < faults.unroutable {
                self.answers.push((answer_at, ticket, id, Outcome::Returned("NO_ROUTE".into())));
                continue;
            }
            if world.rng.f64() < faults.nack {
                self.answers.push((answer_at, ticket, id, Outcome::Nacked));
                continue;
            }
            world.arrive(id);
            if world.rng.f64() < faults.confirm_lost {
                world.faults_seen += 1;
                self.broken_at.get_or_insert(now + Duration::from_secs(30));
                continue;
            }
            self.answers.push((answer_at, ticket, id, Outcome::Confirmed));
        }
    }

    /// Hands on the answers that are here.
    fn hand_on(&mut self, now: Instant, outcomes: &mut Vec<(Ticket, Outcome)>) {
        let mut world = self.world.borrow_mut();
        self.answers.retain(|(at, ticket, id, outcome)| {
            let due = *at <= now;
            if due {
                outcomes.push((*ticket, outcome.clone()));
                if *outcome == Outcome::Confirmed {
                    world.in_doubt.remove(id);
                }
            }
            !due
        });
    }
}

impl Publisher for SimPublisher {
    fn send(&mut self, ticket: Ticket, message: &Message) {
        self.sent.push_back((ticket, message.id));
    }

    async fn next_outcomes(&mut self, outcomes: &mut Vec<(Ticket, Outcome)>) -> Result<()> {
        loop {
            self.handle();
            let now = Instant::now();
            let before = outcomes.len();
            // What came before the connection broke comes together with the error.
            self.hand_on(now.min(self.broken_at.unwrap_or(now)), outcomes);
            if self.broken_at.is_some_and(|at| at <= now) {
                self.world.borrow_mut().lost_at = Some(now);
                return Err(Error::unreachable("simulated connection loss"));
            }
            if outcomes.len() > before {
                return Ok(());
            }
            let next = self.answers.iter().map(|(at, ..)| *at).chain(self.broken_at).min();
            match next {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        }
    }

    fn is_blocked(&self) -> bool {
        false
    }

    fn max_body(&self) -> usize {
        self.world.borrow().max_body
    }

    async fn close(self) {}
}

fn relation() -> Bytes {
    let columns = [("id", 2950), ("aggregate_type", 25), ("aggregate_id", 25), ("event_type", 25)];
    let columns: Vec<(&str, u32)> = columns.into_iter().chain([("payload", 114)]).collect();
    let mut out = Vec::new();
    out.put_u8(b'R');
    out.put_u32(OUTBOX);
    out.extend_from_slice(b"watership\0outbox\0d");
    out.put_i16(columns.len() as i16);
    for (name, oid) in columns {
        out.put_u8(u8::from(name == "id"));
        out.extend_from_slice(name.as_bytes());
        out.put_u8(0);
        out.put_u32(oid);
        out.put_i32(-1);
    }
    out.into()
}

fn begin(commit_lsn: Lsn) -> Bytes {
    let mut out = Vec::new();
    out.put_u8(b'B');
    out.put_u64(commit_lsn.0);
    out.put_i64(0);
    out.put_u32(1);
    out.into()
}

fn commit(commit_lsn: Lsn, end_lsn: Lsn) -> Bytes {
    let mut out = Vec::new();
    out.put_slice(b"C\0");
    out.put_u64(commit_lsn.0);
    out.put_u64(end_lsn.0);
    out.put_i64(0);
    out.into()
}

fn insert(event: &Written) -> Bytes {
    let (id, key, n) = (event.id.to_string(), event.key.to_string(), event.n);
    let padding = "x".repeat(if event.large { MAX_BODY } else { 0 });
    let payload = format!("{{\"n\":{n},\"padding\":\"{padding}\"}}");
    let mut out = Vec::new();
    out.put_u8(b'I');
    out.put_u32(OUTBOX);
    out.put_u8(b'N');
    out.put_i16(5);
    for value in [&*id, "order", &*key, "changed", &*payload] {
        out.put_u8(b't');
        out.put_u32(value.len() as u32);
        out.extend_from_slice(value.as_bytes());
    }
    out.into()
}
