//! The engine: the one loop, and the only place that sees both ends.
//!
//! Invariant: received ≥ settled ≥ stored ≥ advanced, each monotonic. `Progress` asserts it at
//! every move: what is told to the source was stored before, what is stored was settled before.

pub mod backfill;
pub mod check;
pub mod checkpoint;
pub mod find;
pub mod observed;
pub(in crate::relay) mod options;
pub mod parking;
mod parts;
pub mod session;
pub mod status;
pub mod upkeep;
pub mod window;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use crate::envelope::Envelope;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::position::Lsn;
use crate::publisher::{Outcome, Publisher, Ticket};
use crate::relay::backfill::Backfill;
use crate::relay::checkpoint::progress::{Idle, Progress};
use crate::relay::checkpoint::{Looking, Store, Storing};
use crate::relay::observed::Observed;
use crate::relay::parking::Parking;
use crate::relay::parking::recent::RecentlyParked;
use crate::relay::session::broken::{BrokenRoute, Missing};
use crate::relay::session::phantoms::RecentlyPublished;
use crate::relay::status::Status;
use crate::relay::upkeep::canary::Canary;
use crate::relay::window::Window;
use crate::relay::window::admission::Made;
use crate::relay::window::lanes::{Lanes, Owner};
use crate::relay::window::recent::RecentConfirms;
use crate::relay::window::refusals::Refusals;
use crate::relay::window::remembered::{Confirms, Remembered};
use crate::route::{Plans, Router};
use crate::source::{Item, Note, Source};

pub use options::{Options, Tuning, WindowLimits};
pub use parts::{Kept, RelayParts};

/// Items taken from the source at once; keeps the loop responsive.
const BATCH_MAX: usize = 512;
/// Bytes of messages that wait for nothing but their turn: more of them make nothing faster.
const MOVING_BYTES: usize = 2 << 20;
/// Longest time between two ticks: connections are kept alive by them, and probes look at them.
const TICK_MAX: Duration = Duration::from_secs(1);
/// How long the end of a session without a broker may wait for its last checkpoint.
const LAST_STORE_LIMIT: Duration = Duration::from_secs(1);

/// One session's engine between a source and a publisher, with a store of its progress.
pub struct Relay<S, P, C> {
    source: S,
    publisher: P,
    store: C,
    making: Making,
    flight: Flight,
    parked: ParkedWork,
    durable: Durable,
    backfill: Backfill,
    seen: Seen,
    tuning: Tuning,
    ending: Ending,
    stream_failed: bool,
}

/// Microseconds since 1970-01-01 UTC.
fn clock_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Events become messages.
struct Making {
    router: Arc<Router>,
    plans: Plans,
    envelope: Envelope,
    /// Items that were just taken from the source; kept for its capacity.
    batch: Vec<Item>,
    /// Messages of the event that is being admitted; kept for its capacity.
    made: Vec<Made>,
    /// What the broker was seen to refuse by size; more than it takes is not sent again.
    broker_max_body: usize,
}

/// Messages are on their way until their entry is settled.
struct Flight {
    window: Window,
    lanes: Lanes,
    /// Routes that are not probed yet.
    missing: Arc<Missing>,
    /// Bytes of messages that wait for a broken or refusing destination, at the last tick.
    stuck_bytes: usize,
    /// Kept for its capacity.
    outcomes: Vec<(Ticket, Outcome)>,
    /// What was confirmed in this session and may not be covered by a checkpoint.
    confirms: Confirms,
    /// The same of earlier sessions.
    remembered: Remembered,
}

/// What cannot be published now.
struct ParkedWork {
    parking: Parking,
    /// Messages parked by this session.
    count: u64,
    looking: Option<Looking>,
    look_at: Instant,
    /// Parked rows may be ready to be tried again.
    retry_due: bool,
}

/// How far everything is settled, and how far that is stored.
struct Durable {
    progress: Progress,
    idle: Idle,
    /// Notes of the source that are settled and not stored.
    notes: Vec<Note>,
    storing: Option<Storing>,
    /// Entries that had left the window when the write under way began, and when the last one that
    /// ended had begun.
    storing_left: u64,
    stored_left: u64,
    /// When the next checkpoint is due, if the interval is longer than a tick.
    due_at: Instant,
}

impl Durable {
    fn new(progress: Progress, tuning: &Tuning, now: Instant) -> Self {
        let idle = Idle::new(tuning.idle_interval, now.into_std());
        let (notes, storing, due_at) = (Vec::new(), None, now);
        Self { progress, idle, notes, storing, storing_left: 0, stored_left: 0, due_at }
    }
}

/// What others see of it.
struct Seen {
    observed: Observed,
    canary: Arc<Canary>,
    published: RecentlyPublished,
    parked: RecentlyParked,
    refusals: Refusals,
    recent: RecentConfirms,
    metrics: Arc<Metrics>,
    status: Arc<Status>,
}

/// Whether the relay is asked to end.
#[derive(Debug)]
enum Ending {
    No,
    /// Nothing new is taken; what is in the window is settled, until the deadline.
    Draining {
        deadline: Instant,
        because: Option<Error>,
    },
}

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// An engine that has not begun; `name` is the `app_id` of its messages.
    pub fn new(parts: RelayParts<S, P, C>, name: &str, tuning: &Tuning) -> Self {
        let RelayParts {
            source,
            publisher,
            store,
            progress,
            parking,
            router,
            plans,
            metrics,
            status,
            canary,
            broken,
            missing,
            published,
            recently_parked,
            remembered,
            backfill,
        } = parts;
        let now = Instant::now();
        let mut lanes = Lanes::new();
        for BrokenRoute { route, reason, missing } in broken {
            lanes.hold_route(route, reason, missing, now.into_std());
        }
        Self {
            source,
            publisher,
            store,
            making: Making {
                router,
                plans,
                envelope: Envelope::new(name, clock_us),
                batch: Vec::new(),
                made: Vec::new(),
                broker_max_body: usize::MAX,
            },
            flight: Flight {
                window: Window::new(),
                lanes,
                missing,
                stuck_bytes: 0,
                outcomes: Vec::new(),
                confirms: Confirms::new(),
                remembered,
            },
            parked: ParkedWork { parking, count: 0, looking: None, look_at: now, retry_due: true },
            durable: Durable::new(progress, tuning, now),
            seen: Seen {
                observed: Observed::new(now.into_std()),
                canary,
                published,
                parked: recently_parked,
                refusals: Refusals::new(),
                recent: RecentConfirms::default(),
                metrics,
                status,
            },
            backfill,
            tuning: *tuning,
            ending: Ending::No,
            stream_failed: false,
        }
    }

    /// Moves events from the source to the broker until `shutdown`, then settles what is in the
    /// window.
    ///
    /// Priorities, in order: shutdown, outcomes, a stored checkpoint, parked rows, a backfill's
    /// commands, the tick, new items.
    /// Outcomes come before intake, so what is in flight is bounded even when the source never
    /// runs dry. Without room nobody polls the source: the tick keeps its connection alive.
    /// Every branch is cancel-safe.
    ///
    /// # Errors
    /// Whatever ends the session: a lost connection, a lost checkpoint row, a poison event.
    pub async fn run(&mut self, mut shutdown: watch::Receiver<bool>) -> Result<()> {
        let mut tick = interval(self.tuning.checkpoint_interval.min(TICK_MAX));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_looking();
            self.move_backfill();
            self.send_ready();
            self.start_storing();
            if self.is_over() {
                return self.end().await;
            }
            let room = self.room();
            let wake_at = self.wake_at();
            tokio::select! { biased;
                () = requested(&mut shutdown), if matches!(self.ending, Ending::No) => {
                    self.drain(None);
                }
                done = self.publisher.next_outcomes(&mut self.flight.outcomes) => {
                    // What was confirmed before the connection broke is confirmed.
                    let settled = self.settle_outcomes();
                    if let Err(lost) = done.and(settled) {
                        self.store_last().await;
                        return Err(lost);
                    }
                }
                stored = pending(&mut self.durable.storing), if self.durable.storing.is_some() => {
                    self.durable.storing = None;
                    self.stored(stored?).await?;
                }
                found = pending(&mut self.parked.looking), if self.parked.looking.is_some() => {
                    self.parked.looking = None;
                    self.found(found?);
                }
                command = self.backfill.command(), if self.backfill.is_active() => {
                    self.obey(command, Instant::now().into_std());
                }
                _ = tick.tick() => self.tick().await?,
                taken = self.source.next(room, &mut self.making.batch), if room > 0 => {
                    self.stream_failed = taken.is_err();
                    taken?;
                    self.admit_batch();
                }
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
    }

    /// Closes both ends in order; best effort. Returns what the next session starts from.
    pub async fn close(self) -> Kept {
        let released = self.released().into_iter();
        let (stored, _) = self.durable.progress.stored_checkpoint();
        let remembered = self.flight.remembered.after(&self.flight.confirms, stored, released);
        tokio::join!(self.publisher.close(), self.source.close());
        Kept { published: self.seen.published, parked: self.seen.parked, remembered }
    }

    /// Progress so far.
    pub fn progress(&self) -> &Progress {
        &self.durable.progress
    }

    /// Whether it was the source that ended the session.
    pub fn stream_failed(&self) -> bool {
        self.stream_failed
    }

    /// How many more items may be taken.
    fn room(&self) -> usize {
        let bytes = self.flight.window.bytes() + self.parked.parking.pending_bytes();
        let stuck = self.flight.stuck_bytes + self.parked.parking.blocked_bytes();
        let moving = bytes.saturating_sub(stuck);
        let full = bytes >= self.tuning.window.bytes || moving >= MOVING_BYTES;
        let unstored = self.flight.window.left() - self.durable.stored_left;
        let unstored = usize::try_from(unstored).unwrap_or(usize::MAX);
        if full || matches!(self.ending, Ending::Draining { .. }) {
            return 0;
        }
        let storable = self.tuning.max_unstored.saturating_sub(unstored);
        let events = self.tuning.window.events.saturating_sub(self.flight.window.len());
        events.min(storable).min(BATCH_MAX)
    }

    fn wake_at(&self) -> Option<Instant> {
        // With everything in flight that may be, time alone changes nothing; waking would be a loop
        // without a pause until an outcome comes.
        let full = self.flight.lanes.in_flight() >= self.tuning.window.unconfirmed;
        let lanes = self.flight.lanes.wake_at().filter(|_| !full).map(Instant::from_std);
        let drain = match &self.ending {
            Ending::No => None,
            Ending::Draining { deadline, .. } => Some(*deadline),
        };
        let held = self.backfill.wake_at().map(Instant::from_std);
        [lanes, drain, held].into_iter().flatten().min()
    }

    fn move_backfill(&mut self) {
        if !self.backfill.is_quiet() {
            self.move_chunk(Instant::now().into_std());
        }
    }

    fn send_ready(&mut self) {
        let now = Instant::now().into_std();
        while self.flight.lanes.in_flight() < self.tuning.window.unconfirmed {
            let Some((ticket, slot)) = self.flight.lanes.next(now) else { break };
            self.publisher.send(ticket, &slot.message);
            let metrics = &self.seen.metrics.routes[usize::from(slot.message.route.0)];
            metrics.published.increment(1);
            if !matches!(slot.owner, Owner::Chunk(_)) {
                let waited = now.saturating_duration_since(slot.captured);
                metrics.capture_to_publish.record(waited.as_secs_f64());
            }
        }
    }

    /// Begins to write the checkpoint when there is something to write.
    ///
    /// At most one write is under way, and the tick (or the drain) decides when.
    fn start_storing(&mut self) {
        let due = self.durable.progress.is_due() || self.drained();
        let idle = self.durable.storing.is_none() && self.parked.looking.is_none();
        if due && idle && self.has_unstored() {
            self.begin_storing();
        }
    }

    fn begin_storing(&mut self) {
        let (position, flush) = self.durable.progress.begin_storing();
        self.durable.storing_left = self.flight.window.left();
        let mut riders = self.parked.parking.take_riders(position);
        parking::tell_releases(&riders);
        self.seen.parked.written(&riders);
        let notes = std::mem::take(&mut self.durable.notes);
        self.backfill.store(&notes);
        riders.extend(checkpoint::rider::of_notes(notes));
        self.durable.storing = Some(Box::pin(self.store.store(position, flush, riders)));
    }

    /// The broker is lost: stores what is settled, so that it is not sent again. Not for long: it
    /// may be Postgres that is away, too.
    async fn store_last(&mut self) {
        let failed = match timeout(LAST_STORE_LIMIT, self.store_settled()).await {
            Ok(stored) => stored.err(),
            Err(_) => Some(Error::unreachable(format!("no answer within {LAST_STORE_LIMIT:?}"))),
        };
        if let Some(error) = failed {
            tracing::info!(error = %error, "the last checkpoint of the session was not stored");
        }
    }

    /// Stores everything that is settled. Cancel-safe: the loop continues where it stopped.
    async fn store_settled(&mut self) -> Result<()> {
        while self.durable.storing.is_some() || self.has_unstored() {
            if self.durable.storing.is_none() {
                self.begin_storing();
            }
            let stored = pending(&mut self.durable.storing).await;
            self.durable.storing = None;
            self.stored(stored?).await?;
        }
        Ok(())
    }

    pub(in crate::relay) fn has_unstored(&self) -> bool {
        let settled = self.durable.progress.settled_position();
        self.durable.progress.has_unstored()
            || self.parked.parking.has_riders(settled)
            || !self.durable.notes.is_empty()
    }

    async fn stored(&mut self, wal_end: Lsn) -> Result<()> {
        self.seen.metrics.checkpoint.written.increment(1);
        self.durable.idle.wrote(wal_end);
        self.durable.progress.on_stored();
        self.durable.stored_left = self.durable.storing_left;
        self.backfill.stored();
        if let Some(flush) = self.durable.progress.to_advance() {
            self.source.advance(flush).await?;
            self.durable.progress.on_advanced(flush);
        }
        Ok(())
    }

    async fn tick(&mut self) -> Result<()> {
        let now = Instant::now().into_std();
        self.parked.retry_due = true;
        self.take_commands(now);
        self.look_at_holds(now);
        for (entry, route, why) in self.parked.parking.unblock() {
            self.seen.metrics.parked.count(&route, why.as_str());
            self.flight.window.settle(entry);
        }
        self.settle_prefix();
        self.look_at_canary(now);
        let limit = self.seen.canary.limit(now);
        if self.flight.window.is_empty()
            && let Some(receipt) = self.durable.idle.due(self.durable.progress.flush(), limit, now)
        {
            self.durable.progress.on_settled(&receipt);
            let seen = self.source.seen();
            let canary = seen.canary_gap.map_or(seen.canary, |gap| Some(gap.before));
            self.durable.notes.extend(canary.map(Note::Canary));
        }
        if self.tuning.checkpoint_interval <= TICK_MAX || now >= self.durable.due_at.into_std() {
            self.durable.due_at = Instant::now() + self.tuning.checkpoint_interval;
            self.durable.progress.tick();
        }
        self.source.keep_alive().await?;
        self.publish_progress(now);
        self.answer_asks();
        Ok(())
    }

    fn look_at_canary(&mut self, now: std::time::Instant) {
        let seen = self.source.seen();
        self.seen.canary.seen(seen.canary, now);
        self.durable.idle.wrote_canary(self.seen.canary.take_own_bytes());
        self.durable.idle.hurry(self.seen.canary.is_hurried());
        let age = self.seen.canary.age(now);
        self.seen.status.canary(age, self.seen.canary.is_late(now));
        self.seen.metrics.wal.canary_age_seconds.set(age.unwrap_or_default().as_secs_f64());
        let gap = seen.canary_gap.and_then(|gap| self.seen.canary.missed(gap));
        if let Some(deaf) = gap.or_else(|| self.seen.canary.verdict(seen.received, now)) {
            self.drain(Some(deaf));
        }
    }

    fn drain(&mut self, because: Option<Error>) {
        if matches!(self.ending, Ending::No) {
            let deadline = Instant::now() + self.tuning.drain_timeout;
            self.ending = Ending::Draining { deadline, because };
        }
    }

    /// Draining, and everything in the window is settled, as is every parked row on its way that
    /// is out or may still go: what a held route keeps would wait indefinitely.
    fn drained(&self) -> bool {
        let retried = self.parked.parking.on_their_way() == 0 || self.flight.lanes.is_stuck();
        matches!(self.ending, Ending::Draining { .. }) && self.flight.window.is_empty() && retried
    }

    fn is_over(&self) -> bool {
        match &self.ending {
            Ending::No => false,
            Ending::Draining { deadline, .. } => {
                let saved = self.durable.storing.is_none() && !self.has_unstored();
                (self.drained() && saved) || Instant::now() >= *deadline
            }
        }
    }

    async fn end(&mut self) -> Result<()> {
        self.publish_progress(Instant::now().into_std());
        let left = self.flight.window.len();
        let Ending::Draining { because, .. } = std::mem::replace(&mut self.ending, Ending::No)
        else {
            unreachable!("only a draining relay ends");
        };
        match because {
            Some(error) => Err(error),
            None if left == 0 => Ok(()),
            None => Err(Error::unreachable(format!(
                "shutdown: {left} events were not confirmed within the drain timeout of {:?}",
                self.tuning.drain_timeout
            ))
            .hint("nothing is lost: they are sent again at the next start")),
        }
    }
}

async fn requested(shutdown: &mut watch::Receiver<bool>) {
    // A dropped sender cannot ask any more; then only errors end the relay.
    if shutdown.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn pending<T>(future: &mut Option<Pin<Box<dyn Future<Output = T>>>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
