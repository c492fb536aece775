//! The simulated ends: a walsender with history and a broker with a queue.
//!
//! The source speaks real pgoutput bytes through the real assembler. The broker handles publishes
//! in the order in which they were sent, answers in any order, and writes down every arrival.

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;
use watership::error::{Error, Result};
use watership::message::Message;
use watership::position::{Lsn, Mark, Position};
use watership::publisher::{Outcome, Publisher, Ticket};
use watership::source::transaction::Assembler;
use watership::source::{Item, Receipt, Seen, Source};

use crate::history::{self, Frame, GAP, History, MAX_BODY, OUTBOX, Shape, Transaction, Written};
use crate::store::MemoryStore;

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
    /// Share of changes of captured tables among the events.
    pub captured: f64,
    /// The broker does not say what it takes; a larger message makes it close the channel (406).
    pub unannounced: bool,
    /// The exchange is away (404), or may not be used (403), for this long, once per message with
    /// this probability.
    pub gone: f64,
    /// No queue is bound for this message, this time.
    pub unroutable: f64,
    /// What comes between two sessions, by session: another relay has the checkpoint for a while, a
    /// person has it go on in a new epoch, an older state of it is restored.
    pub takeover: f64,
    pub resync: f64,
    /// A standby is promoted that does not have the last transactions, and is written to.
    pub failover: f64,
    pub restore: f64,
    /// A checkpoint takes longer than the end of a session waits for it.
    pub slow_store: bool,
}

/// Everything outside of the relay.
pub struct World {
    pub rng: fastrand::Rng,
    pub history: History,
    /// Ids in order of arrival.
    pub arrived: Vec<Uuid>,
    seen: HashSet<Uuid>,
    /// What arrived in this session and whose confirm the relay has not got.
    pub in_doubt: HashSet<Uuid>,
    /// What the relay got a confirm for in this session.
    confirmed: HashSet<Uuid>,
    /// Messages that arrived and whose channel was closed before their confirm.
    pub closed_on: usize,
    /// When the broker was lost, last.
    pub lost_at: Option<Instant>,
    /// Transactions at the start of the log that arrived whole.
    whole: usize,
    pub slot: Lsn,
    pub faults: Faults,
    unbound_until: Option<Instant>,
    gone_until: Option<Instant>,
    pub faults_seen: u32,
    /// Largest body that the broker takes.
    pub max_body: usize,
    /// Somebody changed the broker's limit and restarts the relay, which has learnt the old one.
    pub restart: bool,
    /// Ids that are in the table of parked rows, whatever became of them.
    pub parked: HashSet<Uuid>,
}

pub type Shared = Rc<RefCell<World>>;

impl World {
    pub fn new(seed: u64, events: u32, keys: u32, faults: Faults) -> Shared {
        let mut rng = fastrand::Rng::with_seed(seed);
        let shape = Shape { events, keys, large: faults.poison, captured: faults.captured };
        let history = History::new(&mut rng, shape);
        let (arrived, seen, in_doubt, confirmed, parked) = Default::default();
        let (lost_at, unbound_until, gone_until) = (None, None, None);
        let world = Self {
            rng,
            history,
            arrived,
            seen,
            in_doubt,
            confirmed,
            closed_on: 0,
            lost_at,
            whole: 0,
            slot: Lsn(1000),
            faults,
            unbound_until,
            gone_until,
            faults_seen: 0,
            max_body: MAX_BODY,
            restart: false,
            parked,
        };
        Rc::new(RefCell::new(world))
    }

    pub fn log(&self) -> &[Transaction] {
        &self.history.log
    }

    /// Where the log ends.
    pub fn end(&self) -> Lsn {
        self.log().last().expect("a world has events").end_lsn
    }

    /// The first transaction from `from` on of which something has no confirm in this session.
    pub fn first_unconfirmed(&self, from: usize) -> usize {
        let confirmed = |e: &Written| self.confirmed.contains(&e.id);
        let whole = |t: &&Transaction| t.events.iter().all(confirmed);
        from + self.log()[from..].iter().take_while(whole).count()
    }

    /// A standby is promoted: of what the relay has stored it has what ends at `stored` at most.
    pub fn fail_over(&mut self, stored: Lsn) -> Lsn {
        let settled = self.log().partition_point(|t| t.end_lsn <= stored);
        let kept = self.rng.usize(settled.saturating_sub(3)..=settled + 10);
        let switch = self.history.promote(&mut self.rng, kept);
        self.whole = self.whole.min(self.log().partition_point(|t| t.end_lsn <= switch));
        switch
    }

    /// Reply code and text with which the broker closes the channel because of a message.
    fn closes_on(&mut self, size: usize, now: Instant) -> Option<(u16, String)> {
        if self.rng.f64() < self.faults.gone {
            self.gone_until = Some(now + Duration::from_millis(self.rng.u64(1..5_000)));
        }
        if self.gone_until.is_some_and(|until| now < until) {
            let refused = self.rng.bool();
            let gone = (404, "NOT_FOUND - no exchange 'watership' in vhost '/'");
            let (code, text) =
                if refused { (403, "ACCESS_REFUSED - no write access") } else { gone };
            return Some((code, text.into()));
        }
        (size > self.max_body).then(|| {
            let text = format!("message size {size} is larger than configured max size {MAX_BODY}");
            (406, format!("PRECONDITION_FAILED - {text}"))
        })
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
        self.whole += self.history.log[self.whole..].iter().take_while(whole).count();
        self.history.log.get(self.whole).map_or(Lsn(u64::MAX), |open| open.commit_lsn)
    }

    /// True when the message arrived at least once.
    pub fn has_seen(&self, id: Uuid) -> bool {
        self.seen.contains(&id)
    }

    /// Arrivals that a stored checkpoint at `position` does not cover: they may come again.
    pub fn uncovered(&self, position: Position) -> usize {
        let place = |t: &Transaction, e: &Written| Position {
            mark: t.commit_lsn.into(),
            ordinal: e.ordinal,
            sub: e.sub,
            ..position
        };
        self.log()
            .iter()
            .flat_map(|t| t.events.iter().map(move |e| (place(t, e), e.id)))
            .filter(|(at, id)| *at > position && self.seen.contains(id))
            .count()
    }
}

/// The replication stream of one session.
pub struct SimSource {
    world: Shared,
    store: MemoryStore,
    assembler: Assembler,
    frames: VecDeque<Frame>,
    /// Captured tables that this stream has described.
    described: HashSet<u32>,
    next: usize,
    flushed: Lsn,
}

impl SimSource {
    /// As a server does: from the requested position or the slot's, whichever is later.
    pub fn new(world: &Shared, store: &MemoryStore, stored: Position, flush: Lsn) -> Self {
        let from = flush.max(world.borrow().slot);
        let next = world.borrow().log().partition_point(|t| t.end_lsn <= from);
        let captured = history::captured_tables(&store.described.lock().unwrap());
        let options = history::options(stored, world.borrow().history.timelines(), captured);
        let frames = VecDeque::from([history::relation(OUTBOX)]);
        Self {
            world: world.clone(),
            store: store.clone(),
            assembler: Assembler::new(options),
            frames,
            described: HashSet::new(),
            next,
            flushed: from,
        }
    }

    fn load(&mut self) -> bool {
        let mut world = self.world.borrow_mut();
        if world.rng.f64() < 0.02 {
            // An invalidation: every table is described again.
            self.described.clear();
        }
        let Some(transaction) = world.log().get(self.next) else { return false };
        self.next += 1;
        self.frames.push_back(history::begin(transaction));
        for frame in &transaction.frames {
            let new = frame.tables.iter().filter(|table| self.described.insert(**table));
            self.frames.extend(new.map(|table| history::relation(*table)));
            self.frames.push_back(frame.clone());
        }
        self.frames.push_back(history::commit(transaction));
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
                    self.next.checked_sub(1).map(|last| self.world.borrow().log()[last].end_lsn);
                batch.extend(sent.map(|end| Item::Idle(Receipt::idle(Mark(end.0 + GAP / 2)))));
            }
            if self.frames.is_empty() && !self.load() {
                break;
            }
            let frame = self.frames.pop_front().expect("just loaded");
            self.assembler.apply(frame.lsn, &frame.bytes, batch)?;
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
    sent: VecDeque<(Ticket, Uuid, usize)>,
    answers: Vec<(Instant, Ticket, Uuid, Outcome)>,
    broken_at: Option<Instant>,
}

impl SimPublisher {
    pub fn new(world: &Shared) -> Self {
        let (sent, answers) = Default::default();
        world.borrow_mut().in_doubt.clear();
        world.borrow_mut().confirmed.clear();
        Self { world: world.clone(), sent, answers, broken_at: None }
    }

    /// The broker handles what has been sent, in order.
    fn handle(&mut self) {
        let world = self.world.clone();
        let mut world = world.borrow_mut();
        let now = Instant::now();
        while let Some((ticket, id, size)) = self.sent.pop_front() {
            if self.broken_at.is_some_and(|at| at <= now) {
                return;
            }
            let faults = world.faults;
            let answer_at = now + Duration::from_millis(world.rng.u64(1..40));
            if let Some((code, text)) = world.closes_on(size, now) {
                self.answers.push((answer_at, ticket, id, closed(code, &text)));
                self.close_channel(&mut world, answer_at, code, &text);
                return;
            }
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

    /// What was sent after the message that closed the channel was never looked at, and some
    /// confirms of earlier ones do not get out any more.
    fn close_channel(&mut self, world: &mut World, at: Instant, code: u16, text: &str) {
        for (_, _, id, outcome) in &mut self.answers {
            if *outcome == Outcome::Confirmed && world.rng.bool() {
                *outcome = closed(code, text);
                world.closed_on += 1;
                world.in_doubt.remove(id);
            }
        }
        // All of a channel's end is known at once.
        for (due, ..) in &mut self.answers {
            *due = at;
        }
        let unseen =
            self.sent.drain(..).map(|(ticket, id, _)| (at, ticket, id, closed(code, text)));
        self.answers.extend(unseen);
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
                    world.confirmed.insert(*id);
                }
            }
            !due
        });
    }
}

impl Publisher for SimPublisher {
    fn send(&mut self, ticket: Ticket, message: &Message) {
        self.sent.push_back((ticket, message.id, message.body().len()));
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
        let world = self.world.borrow();
        if world.faults.unannounced { usize::MAX } else { world.max_body }
    }

    async fn close(self) {}
}

fn closed(code: u16, text: &str) -> Outcome {
    Outcome::ChannelClosed { code, text: text.into() }
}
