//! The engine: the one loop, and the only place that sees both ends.
//!
//! Invariant: received ≥ settled ≥ stored ≥ advanced, each monotonic. `Progress` asserts it at
//! every move: what is told to the source was stored before, what is stored was settled before.

pub mod checkpoint;
pub mod lanes;
pub mod observed;
mod options;
pub mod progress;
pub mod session;
pub mod status;
pub mod supervisor;
pub mod upkeep;
pub mod watermark;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::envelope::Envelope;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::message::{Message, Outcome, Publisher, RouteId, Ticket};
use crate::metrics::Metrics;
use crate::position::Lsn;
use crate::relay::checkpoint::Store;
use crate::relay::lanes::Lanes;
use crate::relay::observed::Observed;
use crate::relay::progress::{Idle, Progress};
use crate::relay::status::Status;
use crate::relay::watermark::Watermark;
use crate::route::{self, Decision, Router};
use crate::source::{Item, Receipt, Source};

pub use options::{Options, Tuning, Window};

/// Items taken from the source at once; keeps the loop responsive.
const BATCH_MAX: usize = 512;
/// Longest time between two ticks: connections are kept alive by them, and probes look at them.
const TICK_MAX: Duration = Duration::from_secs(1);

/// One session's engine between a source and a publisher.
pub struct Relay<S, P> {
    source: S,
    publisher: P,
    store: Store,
    router: Arc<Router>,
    envelope: Envelope,
    tuning: Tuning,
    window: Watermark,
    lanes: Lanes,
    progress: Progress,
    idle: Idle,
    batch: Vec<Item>,
    /// Messages of the event that is being admitted; kept for its capacity.
    made: Vec<(Message, route::Lanes)>,
    outcomes: Vec<(Ticket, Outcome)>,
    storing: Option<Pin<Box<dyn Future<Output = Result<Lsn>>>>>,
    ending: Ending,
    checkpoint_at: Instant,
    observed: Observed,
    metrics: Arc<Metrics>,
    status: Arc<Status>,
}

/// What a [`Relay`] is made of.
pub struct Parts<S, P> {
    /// Where events come from.
    pub source: S,
    /// Where messages go.
    pub publisher: P,
    /// Where progress is kept.
    pub store: Store,
    /// What the store says now.
    pub progress: Progress,
    /// Routes.
    pub router: Arc<Router>,
    /// Metrics handles.
    pub metrics: Arc<Metrics>,
    /// What `/status` shows.
    pub status: Arc<Status>,
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

impl<S: Source, P: Publisher> Relay<S, P> {
    /// An engine that has not begun; `name` is the `app_id` of its messages.
    pub fn new(parts: Parts<S, P>, name: &str, tuning: &Tuning) -> Self {
        let Parts { source, publisher, store, progress, router, metrics, status } = parts;
        Self {
            source,
            publisher,
            store,
            router,
            envelope: Envelope::new(name),
            tuning: *tuning,
            window: Watermark::new(),
            lanes: Lanes::new(),
            idle: Idle::new(tuning.idle_interval, Instant::now().into_std()),
            progress,
            batch: Vec::new(),
            made: Vec::new(),
            outcomes: Vec::new(),
            storing: None,
            ending: Ending::No,
            checkpoint_at: Instant::now(),
            observed: Observed::new(Instant::now().into_std()),
            metrics,
            status,
        }
    }

    /// Moves events from the source to the broker until `shutdown`, then settles what is in the
    /// window.
    ///
    /// Priorities, in order: shutdown, outcomes, a stored checkpoint, the tick, new items.
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
                done = self.publisher.next_outcomes(&mut self.outcomes) => {
                    done?;
                    self.settle_outcomes()?;
                }
                stored = pending_store(&mut self.storing), if self.storing.is_some() => {
                    self.storing = None;
                    self.stored(stored?).await?;
                }
                _ = tick.tick() => self.tick().await?,
                taken = self.source.next(room, &mut self.batch), if room > 0 => {
                    taken?;
                    self.admit_batch();
                }
                () = sleep_until(wake_at.unwrap_or_else(Instant::now)), if wake_at.is_some() => {}
            }
        }
    }

    /// Closes both ends in order; best effort.
    pub async fn close(self) {
        tokio::join!(self.publisher.close(), self.source.close());
    }

    /// Progress so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// How many more items may be taken.
    fn room(&self) -> usize {
        let full = self.window.bytes() >= self.tuning.window.bytes;
        if full || matches!(self.ending, Ending::Draining { .. }) {
            return 0;
        }
        self.tuning.window.events.saturating_sub(self.window.len()).min(BATCH_MAX)
    }

    fn wake_at(&self) -> Option<Instant> {
        let lanes = self.lanes.wake_at().map(Instant::from_std);
        let drain = match &self.ending {
            Ending::No => None,
            Ending::Draining { deadline, .. } => Some(*deadline),
        };
        [lanes, drain].into_iter().flatten().min()
    }

    fn send_ready(&mut self) {
        let now = Instant::now().into_std();
        while self.lanes.in_flight() < self.tuning.window.unconfirmed {
            let Some((ticket, slot)) = self.lanes.next(now) else { break };
            self.publisher.send(ticket, &slot.message);
            let metrics = &self.metrics.routes[usize::from(slot.message.route.0)];
            metrics.published.increment(1);
            let waited = now.saturating_duration_since(slot.captured);
            metrics.capture_to_publish.record(waited.as_secs_f64());
        }
    }

    fn admit_batch(&mut self) {
        let now = Instant::now().into_std();
        let mut batch = std::mem::take(&mut self.batch);
        for item in batch.drain(..) {
            if matches!(self.ending, Ending::Draining { .. }) {
                // A poison event came before: nothing after it may be settled.
                break;
            }
            let admitted = match item {
                Item::Event(event, receipt) => self.admit(&event, receipt, now),
                Item::Poison(error, _) => Err(error),
                Item::Commit(receipt) => {
                    self.metrics.wal.transactions.increment(1);
                    self.push(receipt, 0, 0);
                    Ok(())
                }
                Item::Idle(receipt) => {
                    self.idle.reached(receipt);
                    Ok(())
                }
            };
            if let Err(poison) = admitted {
                self.drain(Some(poison_verdict(poison)));
            }
        }
        self.batch = batch;
        self.settle_prefix();
    }

    /// Routes one event and gives its messages to the lanes.
    fn admit(&mut self, event: &Event, receipt: Receipt, now: std::time::Instant) -> Result<()> {
        let at = |e: Error| e.context(format!("event {} ({})", event.id, event.position));
        // All messages are made before the first is admitted: an event is poison as a whole.
        self.made.clear();
        let mut selected = false;
        for decision in self.router.route(event) {
            selected = true;
            match decision {
                Decision::Drop(rule) => {
                    self.metrics.routes[usize::from(rule.0)].dropped.increment(1);
                }
                Decision::Publish(route) => {
                    let message = self.envelope.message(event, route).map_err(at)?;
                    let (len, max) = (message.body().len(), self.publisher.max_body());
                    if len > max {
                        let text = format!("its body has {len} bytes, the limit is {max}");
                        return Err(at(Error::event(text)
                            .hint("raise broker.max_message_size if the broker takes more")));
                    }
                    self.made.push((message, route.lanes(event)));
                }
            }
        }
        if !selected {
            return Err(at(no_route(event)));
        }
        let bytes = self.made.iter().map(|(m, _)| m.size()).sum();
        let count = u16::try_from(self.made.len()).expect("RULES_MAX fits");
        let entry = self.push(receipt, count, bytes);
        for (message, lanes) in self.made.drain(..) {
            self.metrics.routes[usize::from(message.route.0)].received.increment(1);
            self.lanes.admit(message, lanes, entry, now, event.committed_at_us);
        }
        Ok(())
    }

    fn push(&mut self, receipt: Receipt, messages: u16, bytes: usize) -> watermark::EntryId {
        self.idle.busy();
        self.progress.received(receipt.position());
        self.window.push(receipt, messages, bytes)
    }

    /// Every outcome of the publisher, each exactly once.
    fn settle_outcomes(&mut self) -> Result<()> {
        let now = Instant::now().into_std();
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut outcomes = std::mem::take(&mut self.outcomes);
        for (ticket, outcome) in outcomes.drain(..) {
            match outcome {
                Outcome::Confirmed => self.confirmed(ticket, clock),
                Outcome::Nacked => {
                    let route = self.lanes.slot(ticket).message.route;
                    self.route_metrics(route).nacked.increment(1);
                    self.lanes.nacked(ticket, now);
                }
                Outcome::Returned(text) => {
                    let route = self.lanes.slot(ticket).message.route;
                    self.route_metrics(route).returned.increment(1);
                    self.hold(ticket, format!("unroutable: {text}"), now);
                }
                Outcome::ChannelClosed { code: 403 | 404, text } => self.hold(ticket, text, now),
                Outcome::ChannelClosed { code: 406, text } => {
                    let text = format!("the broker refused a message: {text}");
                    self.drain(Some(Error::verdict(text)));
                }
                Outcome::ChannelClosed { code, text } => {
                    return Err(Error::unreachable(format!("channel closed: {code} {text}")));
                }
            }
        }
        self.outcomes = outcomes;
        self.settle_prefix();
        Ok(())
    }

    fn confirmed(&mut self, ticket: Ticket, clock: Duration) {
        let (slot, released) = self.lanes.confirmed(ticket);
        self.window.settle(slot.entry);
        let route = slot.message.route;
        let metrics = self.route_metrics(route);
        metrics.confirmed.increment(1);
        let committed = Duration::from_micros(u64::try_from(slot.committed_at_us).unwrap_or(0));
        metrics.commit_to_confirm.record(clock.saturating_sub(committed).as_secs_f64());
        self.metrics.broker.last_confirmed_seconds.set(clock.as_secs_f64());
        if released {
            self.route_metrics(route).held.set(0.0);
            tracing::info!(route = route.0, "the destination works again, the route goes on");
        }
    }

    fn hold(&mut self, ticket: Ticket, reason: String, now: std::time::Instant) {
        let route = self.lanes.slot(ticket).message.route;
        if self.lanes.hold(ticket, reason.clone(), now) {
            self.route_metrics(route).held.set(1.0);
            tracing::error!(
                route = route.0,
                reason,
                "the destination is broken: the route is held and probed, nothing is lost"
            );
        }
    }

    fn settle_prefix(&mut self) {
        if let Some(receipt) = self.window.take_settled() {
            self.progress.settled(&receipt);
        }
    }

    /// Begins to write the checkpoint when there is something to write.
    ///
    /// At most one write is under way, and the tick (or the drain) decides when.
    fn start_storing(&mut self) {
        let due = self.progress.is_due() || self.drained();
        if due && self.storing.is_none() && self.progress.has_unstored() {
            let (position, flush) = self.progress.begin_storing();
            self.storing = Some(self.store.store(position, flush));
        }
    }

    async fn stored(&mut self, wal_end: Lsn) -> Result<()> {
        self.metrics.checkpoint.written.increment(1);
        self.idle.wrote(wal_end);
        self.progress.stored();
        if let Some(flush) = self.progress.to_advance() {
            self.source.advance(flush).await?;
            self.progress.advanced(flush);
        }
        Ok(())
    }

    async fn tick(&mut self) -> Result<()> {
        let now = Instant::now().into_std();
        if self.window.is_empty()
            && let Some(receipt) = self.idle.due(self.progress.flush(), now)
        {
            self.progress.settled(&receipt);
        }
        if self.tuning.checkpoint_interval <= TICK_MAX || now >= self.checkpoint_at.into_std() {
            self.checkpoint_at = Instant::now() + self.tuning.checkpoint_interval;
            self.progress.tick();
        }
        self.source.keep_alive().await?;
        self.publish_progress(now);
        Ok(())
    }

    fn drain(&mut self, because: Option<Error>) {
        if matches!(self.ending, Ending::No) {
            let deadline = Instant::now() + self.tuning.drain_timeout;
            self.ending = Ending::Draining { deadline, because };
        }
    }

    /// Draining, and everything in the window is settled.
    fn drained(&self) -> bool {
        matches!(self.ending, Ending::Draining { .. }) && self.window.is_empty()
    }

    fn is_over(&self) -> bool {
        match &self.ending {
            Ending::No => false,
            Ending::Draining { deadline, .. } => {
                let saved = self.storing.is_none() && !self.progress.has_unstored();
                (self.drained() && saved) || Instant::now() >= *deadline
            }
        }
    }

    async fn end(&mut self) -> Result<()> {
        self.publish_progress(Instant::now().into_std());
        let left = self.window.len();
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

    fn publish_progress(&mut self, now: std::time::Instant) {
        let metrics = &self.metrics;
        metrics.window.in_flight.set(self.lanes.in_flight() as f64);
        metrics.window.events.set(self.window.len() as f64);
        metrics.window.bytes.set(self.window.bytes() as f64);
        metrics.window.paused.set(f64::from(u8::from(self.room() == 0)));
        let blocked = self.publisher.is_blocked();
        self.observed.tick(metrics, &self.progress, self.source.seen(), blocked, now);
        self.status.update(&self.progress, &self.lanes, self.window.len(), blocked, now);
    }

    fn route_metrics(&self, route: RouteId) -> &crate::metrics::RouteMetrics {
        &self.metrics.routes[usize::from(route.0)]
    }
}

async fn requested(shutdown: &mut watch::Receiver<bool>) {
    // A dropped sender cannot ask any more; then only errors end the relay.
    if shutdown.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn pending_store(
    storing: &mut Option<Pin<Box<dyn Future<Output = Result<Lsn>>>>>,
) -> Result<Lsn> {
    match storing {
        Some(storing) => storing.await,
        None => std::future::pending().await,
    }
}

fn no_route(event: &Event) -> Error {
    use crate::event::Content;
    let what = match &event.content {
        Content::Outbox(row) => format!("aggregate type {:?}", &*row.aggregate_type),
        Content::Change(_) => format!("table {:?}", event.table.full_name),
    };
    Error::event(format!("no route selects {what}"))
        .hint("add a [[route]] for it, or one with drop = true to drop and count such events")
}

/// Until poison events can be parked, one stops the relay.
fn poison_verdict(error: Error) -> Error {
    use crate::error::Kind;
    match error.kind() {
        Kind::Event => error.with_kind(Kind::Verdict).context("this event cannot be published"),
        Kind::Config
        | Kind::Unreachable
        | Kind::Refused
        | Kind::Busy
        | Kind::Protocol
        | Kind::Verdict => error,
    }
}
