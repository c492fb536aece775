//! What the relay is doing, for `/status`, `/readyz` and `/livez`. Written by the loop, read by
//! the admin server's thread.

mod polling;
mod problems;
mod standby;
mod tables;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::Notify;

use crate::amqp::audit::Grade;
use crate::error::{Error, Kind};
use crate::message::RouteId;
use crate::pg::slot::SlotState;
use crate::pg::sqlstate::OBJECT_IN_USE;
use crate::relay::backfill::shown::BackfillView;
use crate::relay::checkpoint::progress::Progress;
use crate::relay::find::Asks;
use crate::relay::parking::{Parking, Summary};
use crate::relay::session::circuit::{self, Circuit};
use crate::relay::window::lanes::Lanes;
use crate::relay::window::refusals::RefusedRoute;
use crate::source::PollSeen;

pub use polling::PollStatus;
pub use problems::{Concern, Severity};
pub use standby::{Holder, StandingBy};
pub use tables::{LostTable, ReturnedTable};

/// A streaming loop that has not ticked for this long is stuck.
const STUCK: Duration = Duration::from_secs(30);

/// The shared cell.
#[derive(Debug)]
pub struct Status {
    inner: Mutex<Inner>,
    /// Wakes who looks at the broker.
    changed: Notify,
    /// What people look for.
    pub asks: Asks,
}

#[derive(Debug)]
struct Inner {
    name: String,
    routes: Vec<String>,
    state: RelayState,
    since: Instant,
    last_tick: Instant,
    sessions: u64,
    last_error: Option<Trouble>,
    circuit: Circuit,
    holder: Option<Holder>,
    /// Since when the slot has been seen without a reader while another relay holds the lock.
    unread_since: Option<Instant>,
    /// How long that was at the last look.
    unread: Duration,
    lock_owner: Option<String>,
    grades: Vec<RouteGrade>,
    progress: Option<Progress>,
    in_flight: usize,
    window_events: usize,
    blocked: bool,
    held: Vec<(usize, String, Instant)>,
    refused: Vec<RefusedRoute>,
    parked: ParkedStatus,
    canary_age: Option<Duration>,
    canary_late: bool,
    checkpoint_age: Duration,
    polled: Option<PollSeen>,
    slot: Option<SlotStatus>,
    tables: tables::Tables,
    backfills: Vec<BackfillView>,
}

/// What is parked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ParkedStatus {
    /// Rows that are neither released nor discarded.
    pub rows: usize,
    /// Keys that are parked.
    pub keys: usize,
    /// Messages that may not be parked and wait in the window: route and reason.
    pub blocked: Vec<(String, String)>,
}

/// The replication slot as the upkeep saw it last.
#[derive(Debug, Clone, Serialize)]
pub struct SlotStatus {
    /// How much of the WAL that it needs is still there.
    pub wal_status: Option<&'static str>,
    /// Bytes that may still be written before it may be lost; absent without a limit.
    pub safe_wal_size: Option<i64>,
    /// Bytes of WAL that it keeps.
    pub retained_bytes: u64,
    /// Bytes between its position and the end of WAL.
    pub lag_bytes: u64,
    /// Why WAL that it needs may soon be removed, the disk may fill, or nothing comes.
    pub warning: Option<String>,
    /// What to do about that.
    pub hint: Option<&'static str>,
}

/// What the relay is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RelayState {
    /// Opening a session.
    Connecting,
    /// Streaming and publishing.
    Streaming,
    /// Waiting because another relay holds the slot or the lock.
    StandingBy,
    /// Waiting before the next session.
    Waiting,
    /// Ended.
    Stopped,
}

/// The last error, with what to do.
#[derive(Debug, Clone, Serialize)]
pub struct Trouble {
    /// Kind of error.
    pub kind: &'static str,
    /// The stable name of the verdict, where it is one.
    pub verdict: Option<&'static str>,
    /// What happened.
    pub error: String,
    /// What to do.
    pub hint: String,
    /// Wait before the next session, in milliseconds.
    pub next_try_ms: Option<u64>,
}

/// What a confirm for a route's messages is worth, as the last audit found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RouteGrade {
    /// Route name.
    pub name: String,
    /// Who is called when it is broken.
    pub owner: String,
    /// The grade.
    pub grade: Grade,
    /// Why.
    pub reason: String,
}

/// A route whose destination is broken.
#[derive(Debug, Clone, Serialize)]
pub struct Held {
    /// Route name.
    pub route: String,
    /// The broker's words.
    pub reason: String,
    /// For how long, in seconds.
    pub for_seconds: f64,
}

/// What `/status` shows.
#[derive(Debug, Clone, Serialize)]
pub struct Snapshot {
    /// Relay name.
    pub name: String,
    /// What it is doing.
    pub state: RelayState,
    /// For how long, in seconds.
    pub state_seconds: f64,
    /// Sessions opened since the process started.
    pub sessions: u64,
    /// The last error.
    pub last_error: Option<Trouble>,
    /// Whether sessions work, and when the next one is tried.
    pub circuit: circuit::CircuitView,
    /// What a standby relay waits for; absent in every other state.
    pub standing_by: Option<StandingBy>,
    /// Position up to which everything was received.
    pub received: Option<String>,
    /// Position up to which everything is settled.
    pub settled: Option<String>,
    /// Position of the stored checkpoint.
    pub checkpointed: Option<String>,
    /// Flush LSN of the stored checkpoint; absent where the WAL is not read.
    pub flush_lsn: Option<String>,
    /// LSN that Postgres was told it may forget up to; absent where the WAL is not read.
    pub advanced: Option<String>,
    /// Of a relay that polls; absent where the WAL is read.
    pub poll: Option<PollStatus>,
    /// Messages sent and not confirmed.
    pub in_flight: usize,
    /// Entries in the window.
    pub window_events: usize,
    /// The broker has blocked the connection.
    pub broker_blocked: bool,
    /// Routes that are held.
    pub held: Vec<Held>,
    /// Routes whose messages the broker refuses for now.
    pub refused: Vec<RefusedRoute>,
    /// What is parked.
    pub parked: ParkedStatus,
    /// What the last audit of the broker found, by route; empty before the first one.
    pub routes: Vec<RouteGrade>,
    /// Age of the last canary that came through the stream, in seconds.
    pub canary_age_seconds: Option<f64>,
    /// It is so old that the stream may be said not to move.
    pub canary_late: bool,
    /// For how long something has been settled and not stored, in seconds.
    pub checkpoint_age_seconds: f64,
    /// The replication slot.
    pub slot: Option<SlotStatus>,
    /// Captured tables whose changes do not come.
    pub lost_tables: Vec<LostTable>,
    /// Captured tables that were lost since the process started, and are back.
    pub returned_tables: Vec<ReturnedTable>,
    /// Backfills that have begun in this process.
    pub backfills: Vec<BackfillView>,
    /// Everything that is wrong, with what to do; empty when everything is flowing.
    pub problems: Vec<Concern>,
}

impl Status {
    /// A relay that has not begun; `routes` are the names in order.
    pub fn new(name: &str, routes: Vec<String>) -> Arc<Self> {
        let now = Instant::now();
        let inner = Mutex::new(Inner {
            name: name.to_owned(),
            routes,
            state: RelayState::Connecting,
            since: now,
            last_tick: now,
            sessions: 0,
            last_error: None,
            circuit: Circuit::new(),
            holder: None,
            unread_since: None,
            unread: Duration::ZERO,
            lock_owner: None,
            grades: Vec::new(),
            progress: None,
            in_flight: 0,
            window_events: 0,
            blocked: false,
            held: Vec::new(),
            refused: Vec::new(),
            parked: ParkedStatus::default(),
            canary_age: None,
            canary_late: false,
            checkpoint_age: Duration::ZERO,
            polled: None,
            slot: None,
            tables: tables::Tables::default(),
            backfills: Vec::new(),
        });
        Arc::new(Self { inner, changed: Notify::new(), asks: Asks::default() })
    }

    /// A session is being opened.
    pub fn connecting(&self) {
        let mut inner = self.lock();
        inner.sessions += 1;
        inner.circuit.try_now();
        // A standby that tries again is still standing by.
        if inner.state != RelayState::StandingBy {
            inner.enter(RelayState::Connecting);
        }
    }

    /// The session runs. Returns how many tries had failed before it.
    pub fn streaming(&self) -> u32 {
        let mut inner = self.lock();
        let tries = inner.circuit.close();
        self.changed.notify_one();
        inner.last_tick = Instant::now();
        inner.last_error = None;
        inner.enter(RelayState::Streaming);
        tries
    }

    /// The session ended; the next one comes after `wait`.
    pub fn waiting(&self, error: &Error, wait: Duration) {
        let mut inner = self.lock();
        inner.last_error = Some(Trouble::new(error, Some(wait)));
        inner.circuit.open(error.label(), Some(wait), Instant::now());
        // A lock on a table is not another relay.
        let of_relay = error.sqlstate().is_none_or(|code| code == OBJECT_IN_USE);
        let busy = error.kind() == Kind::Busy && of_relay;
        inner.enter(if busy { RelayState::StandingBy } else { RelayState::Waiting });
    }

    /// What only a running session can say is not known any more.
    pub fn session_over(&self) {
        let mut inner = self.lock();
        (inner.in_flight, inner.window_events, inner.blocked) = (0, 0, false);
        inner.held.clear();
        inner.refused.clear();
        inner.parked.blocked.clear();
        (inner.canary_late, inner.checkpoint_age) = (false, Duration::ZERO);
    }

    /// No further session.
    pub fn stopped(&self, error: Option<&Error>) {
        let mut inner = self.lock();
        match error {
            Some(error) => {
                inner.last_error = Some(Trouble::new(error, None));
                inner.circuit.open(error.label(), None, Instant::now());
            }
            None => inner.circuit.end(),
        }
        inner.enter(RelayState::Stopped);
    }

    /// The loop's tick.
    pub fn update(
        &self,
        progress: &Progress,
        lanes: &Lanes,
        window_events: usize,
        blocked: bool,
        now: Instant,
    ) {
        let mut inner = self.lock();
        inner.last_tick = now;
        inner.progress = Some(progress.clone());
        inner.in_flight = lanes.in_flight();
        inner.window_events = window_events;
        inner.blocked = blocked;
        let held =
            lanes.holds().map(|(route, h)| (usize::from(route.0), h.reason.clone(), h.since));
        let before = std::mem::replace(&mut inner.held, held.collect());
        let route = |(route, ..): &(usize, String, Instant)| *route;
        if !before.iter().map(route).eq(inner.held.iter().map(route)) {
            self.changed.notify_one();
        }
    }

    /// The loop's tick, about routes whose messages the broker refuses.
    pub fn refused(&self, refused: Vec<RefusedRoute>) {
        self.lock().refused = refused;
    }

    /// The loop's tick, about what is parked.
    pub fn parked(&self, parking: &Parking) {
        let Summary { rows, keys, .. } = parking.summary();
        let blocked = parking.blocked_routes();
        let blocked = blocked.iter().map(|(route, row)| ((*route).to_owned(), row.error.clone()));
        self.lock().parked = ParkedStatus { rows, keys, blocked: blocked.collect() };
    }

    /// Waits until there is a reason to look at the broker again: a session streams, or a route is
    /// held or released. What came meanwhile counts. For one waiter.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The routes that are held, and for how long.
    pub fn held(&self) -> Vec<(RouteId, Duration)> {
        let inner = self.lock();
        let held = inner.held.iter();
        held.map(|(route, _, since)| (RouteId(*route as u16), since.elapsed())).collect()
    }

    /// What an audit of the broker found.
    pub fn graded(&self, grades: Vec<RouteGrade>) {
        self.lock().grades = grades;
    }

    /// Who reads the slot now, as Postgres says.
    pub fn slot_seen(&self, slot: Option<&SlotState>) {
        let holder = slot.and_then(|slot| {
            let pid = slot.active_pid?;
            Some(Holder { slot: slot.name.clone(), pid, client: slot.active_client.clone() })
        });
        let mut inner = self.lock();
        let unread = inner.state == RelayState::StandingBy && holder.is_none();
        inner.unread_since = unread.then(|| inner.unread_since.unwrap_or_else(Instant::now));
        inner.unread = inner.unread_since.map_or(Duration::ZERO, |since| since.elapsed());
        inner.holder = holder;
    }

    /// Whom the connection that holds the lock works for.
    pub fn lock_owner(&self, owner: Option<String>) {
        self.lock().lock_owner = owner;
    }

    /// Why it is not ready, for people; absent when it is.
    pub fn not_ready(&self) -> Option<String> {
        if self.is_ready() {
            return None;
        }
        let snapshot = self.snapshot();
        Some(match (&snapshot.standing_by, &snapshot.last_error) {
            (Some(standing_by), _) => standing_by.to_string(),
            (None, Some(error)) => format!("not streaming: {}; {}", error.error, error.hint),
            (None, None) => "not streaming, or the broker connection is not open".into(),
        })
    }

    /// Whether sessions work.
    pub fn circuit(&self) -> circuit::CircuitView {
        self.lock().circuit.view(Instant::now())
    }

    /// How old the last canary is, and whether that is late.
    pub fn canary(&self, age: Option<Duration>, late: bool) {
        let mut inner = self.lock();
        (inner.canary_age, inner.canary_late) = (age, late);
    }

    /// For how long something has been settled and not stored.
    pub fn checkpoint_age(&self, age: Duration) {
        self.lock().checkpoint_age = age;
    }

    /// The slot, as it was seen now. True when it came into danger or out of it.
    pub fn slot(&self, slot: SlotStatus) -> bool {
        let now = slot.warning.is_some();
        let then = self.lock().slot.replace(slot).is_some_and(|slot| slot.warning.is_some());
        now != then
    }

    /// The captured tables that are lost and held now. Returns those for which that is news.
    pub fn lost_tables(&self, lost: Vec<LostTable>) -> Vec<LostTable> {
        self.lock().tables.lose(lost)
    }

    /// A held table is back.
    pub fn returned_table(&self, back: ReturnedTable) {
        self.lock().tables.find(back);
    }

    /// The backfills of this process.
    pub fn backfills(&self, backfills: Vec<BackfillView>) {
        self.lock().backfills = backfills;
    }

    /// A session runs.
    pub fn is_streaming(&self) -> bool {
        self.lock().state == RelayState::Streaming
    }

    /// Another relay does the work.
    pub fn is_standing_by(&self) -> bool {
        self.lock().state == RelayState::StandingBy
    }

    /// Another relay does the work, as far as this one can see.
    pub fn is_good_standby(&self) -> bool {
        self.lock().standing_by().is_some_and(|by| by.in_vain().is_none())
    }

    /// Streaming, with the broker open.
    pub fn is_ready(&self) -> bool {
        let inner = self.lock();
        inner.state == RelayState::Streaming && inner.is_alive()
    }

    /// The loop is not stuck.
    pub fn is_alive(&self) -> bool {
        self.lock().is_alive()
    }

    /// A copy to show.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        let progress = inner.progress.as_ref();
        let of_wal = progress.filter(|_| inner.polled.is_none());
        let poll = inner.polled.map(|polled| PollStatus::new(polled, progress));
        let held = inner.held.iter().map(|(route, reason, since)| Held {
            route: inner.routes.get(*route).cloned().unwrap_or_default(),
            reason: reason.clone(),
            for_seconds: since.elapsed().as_secs_f64(),
        });
        let mut shown = Snapshot {
            name: inner.name.clone(),
            state: inner.state,
            state_seconds: inner.since.elapsed().as_secs_f64(),
            sessions: inner.sessions,
            last_error: inner.last_error.clone(),
            circuit: inner.circuit.view(Instant::now()),
            standing_by: inner.standing_by(),
            received: progress.map(|p| p.received_position().to_string()),
            settled: progress.map(|p| p.settled_position().to_string()),
            checkpointed: progress.map(|p| p.stored_checkpoint().0.to_string()),
            flush_lsn: of_wal.map(|p| p.stored_checkpoint().1.lsn().to_string()),
            advanced: of_wal.map(|p| p.advanced_mark().lsn().to_string()),
            poll,
            in_flight: inner.in_flight,
            window_events: inner.window_events,
            broker_blocked: inner.blocked,
            held: held.collect(),
            refused: inner.refused.clone(),
            parked: inner.parked.clone(),
            routes: inner.grades.clone(),
            canary_age_seconds: inner.canary_age.map(|age| age.as_secs_f64()),
            canary_late: inner.canary_late,
            checkpoint_age_seconds: inner.checkpoint_age.as_secs_f64(),
            slot: inner.slot.clone(),
            lost_tables: inner.tables.lost.clone(),
            returned_tables: inner.tables.returned.clone(),
            backfills: inner.backfills.clone(),
            problems: Vec::new(),
        };
        shown.problems = problems::of(&shown, inner.is_alive());
        shown
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding the status")
    }
}

impl Inner {
    fn is_alive(&self) -> bool {
        self.state != RelayState::Streaming || self.last_tick.elapsed() < STUCK
    }

    fn standing_by(&self) -> Option<StandingBy> {
        let because = match (&self.state, &self.last_error) {
            (RelayState::StandingBy, Some(error)) => error.error.clone(),
            _ => return None,
        };
        let doubt = self.unread_since.map(|_| standby::NOBODY_READS);
        let doubt_seconds = self.unread_since.map(|_| self.unread.as_secs());
        let (slot_holder, lock_owner) = (self.holder.clone(), self.lock_owner.clone());
        Some(StandingBy { because, slot_holder, lock_owner, doubt, doubt_seconds })
    }

    fn enter(&mut self, state: RelayState) {
        if self.state != state {
            (self.state, self.since) = (state, Instant::now());
            self.unread_since = None;
        }
    }
}

impl Trouble {
    fn new(error: &Error, wait: Option<Duration>) -> Self {
        Self {
            kind: error.label(),
            verdict: error.verdict().map(crate::verdict::Verdict::name),
            error: error.to_string(),
            hint: error.hint_or_kind().to_owned(),
            next_try_ms: wait.and_then(|w| u64::try_from(w.as_millis()).ok()),
        }
    }
}
