//! What the relay is doing, for `/status`, `/readyz` and `/livez`. Written by the loop, read by
//! the admin server's thread.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::Error;
use crate::relay::lanes::Lanes;
use crate::relay::progress::Progress;

/// A streaming loop that has not ticked for this long is stuck.
const STUCK: Duration = Duration::from_secs(30);

/// The shared cell.
#[derive(Debug)]
pub struct Status(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    routes: Vec<String>,
    state: State,
    since: Instant,
    last_tick: Instant,
    sessions: u64,
    last_error: Option<Trouble>,
    progress: Option<Progress>,
    in_flight: usize,
    window_events: usize,
    blocked: bool,
    held: Vec<(usize, String, Instant)>,
}

/// What the relay is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
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
    /// What happened.
    pub error: String,
    /// What to do, where it is known.
    pub hint: Option<String>,
    /// Wait before the next session, in milliseconds.
    pub next_try_ms: Option<u64>,
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
    pub state: State,
    /// For how long, in seconds.
    pub state_seconds: f64,
    /// Sessions opened since the process started.
    pub sessions: u64,
    /// The last error.
    pub last_error: Option<Trouble>,
    /// Position up to which everything was received.
    pub received: Option<String>,
    /// Position up to which everything is settled.
    pub settled: Option<String>,
    /// Position of the stored checkpoint.
    pub checkpointed: Option<String>,
    /// Flush LSN of the stored checkpoint.
    pub flush_lsn: Option<String>,
    /// LSN that Postgres was told it may forget up to.
    pub advanced: Option<String>,
    /// Messages sent and not confirmed.
    pub in_flight: usize,
    /// Entries in the window.
    pub window_events: usize,
    /// The broker has blocked the connection.
    pub broker_blocked: bool,
    /// Routes that are held.
    pub held: Vec<Held>,
}

impl Status {
    /// A relay that has not begun; `routes` are the names in order.
    pub fn new(name: &str, routes: Vec<String>) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self(Mutex::new(Inner {
            name: name.to_owned(),
            routes,
            state: State::Connecting,
            since: now,
            last_tick: now,
            sessions: 0,
            last_error: None,
            progress: None,
            in_flight: 0,
            window_events: 0,
            blocked: false,
            held: Vec::new(),
        })))
    }

    /// A session is being opened.
    pub fn connecting(&self) {
        let mut inner = self.lock();
        inner.sessions += 1;
        // A standby that tries again is still standing by.
        if inner.state != State::StandingBy {
            inner.enter(State::Connecting);
        }
    }

    /// The session runs.
    pub fn streaming(&self) {
        let mut inner = self.lock();
        inner.last_tick = Instant::now();
        inner.last_error = None;
        inner.enter(State::Streaming);
    }

    /// The session ended; the next one comes after `wait`.
    pub fn waiting(&self, error: &Error, wait: Duration) {
        let mut inner = self.lock();
        inner.last_error = Some(Trouble::new(error, Some(wait)));
        let busy = error.kind() == crate::error::Kind::Busy;
        inner.enter(if busy { State::StandingBy } else { State::Waiting });
    }

    /// No further session.
    pub fn stopped(&self, error: Option<&Error>) {
        let mut inner = self.lock();
        if let Some(error) = error {
            inner.last_error = Some(Trouble::new(error, None));
        }
        inner.enter(State::Stopped);
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
        inner.held.clear();
        let held =
            lanes.holds().map(|(route, h)| (usize::from(route.0), h.reason.clone(), h.since));
        inner.held.extend(held);
    }

    /// Streaming, with the broker open.
    pub fn is_ready(&self) -> bool {
        let inner = self.lock();
        inner.state == State::Streaming && inner.last_tick.elapsed() < STUCK
    }

    /// The loop is not stuck.
    pub fn is_alive(&self) -> bool {
        let inner = self.lock();
        inner.state != State::Streaming || inner.last_tick.elapsed() < STUCK
    }

    /// A copy to show.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        let progress = inner.progress.as_ref();
        let held = inner.held.iter().map(|(route, reason, since)| Held {
            route: inner.routes.get(*route).cloned().unwrap_or_default(),
            reason: reason.clone(),
            for_seconds: since.elapsed().as_secs_f64(),
        });
        Snapshot {
            name: inner.name.clone(),
            state: inner.state,
            state_seconds: inner.since.elapsed().as_secs_f64(),
            sessions: inner.sessions,
            last_error: inner.last_error.clone(),
            received: progress.map(|p| p.received_position().to_string()),
            settled: progress.map(|p| p.settled_position().to_string()),
            checkpointed: progress.map(|p| p.stored_checkpoint().0.to_string()),
            flush_lsn: progress.map(|p| p.stored_checkpoint().1.to_string()),
            advanced: progress.map(|p| p.advanced_lsn().to_string()),
            in_flight: inner.in_flight,
            window_events: inner.window_events,
            broker_blocked: inner.blocked,
            held: held.collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nobody panics while holding the status")
    }
}

impl Inner {
    fn enter(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.since = Instant::now();
        }
    }
}

impl Trouble {
    fn new(error: &Error, wait: Option<Duration>) -> Self {
        Self {
            kind: error.label(),
            error: error.to_string(),
            hint: error.advice().map(str::to_owned),
            next_try_ms: wait.and_then(|w| u64::try_from(w.as_millis()).ok()),
        }
    }
}
