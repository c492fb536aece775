//! Intake: what the source hands on becomes entries of the window and messages in lanes, or rows
//! that are parked.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::envelope::{Envelope, parts};
use crate::error::{Error, Kind, Result};
use crate::event::{Content, Event, id};
use crate::message::Message;
use crate::position::Position;
use crate::publisher::Publisher;
use crate::relay::checkpoint::Store;
use crate::relay::parking::Disposition;
use crate::relay::parking::row::{ParkedKey, ParkedRow, Why};
use crate::relay::window::EntryId;
use crate::relay::window::lanes::{About, Owner};
use crate::relay::window::remembered::MessageKey;
use crate::relay::{Ending, Making, Relay};
use crate::route::{Decision, LaneKeys, OnDrift, OnPoison, Plan};
use crate::source::{Item, Receipt, Source};
use crate::verdict::Verdict;

/// What became of an event on one route.
pub(in crate::relay) enum Made {
    /// It may be sent when its lanes let it.
    Message(Message, LaneKeys),
    /// It is parked; with what its route wants for poison.
    Row(Box<ParkedRow>, OnPoison),
}

/// Of the first lines about parked messages each is logged, then one in every [`LOGGED_EVERY`].
const LOGGED_FIRST: u64 = 20;
const LOGGED_EVERY: u64 = 1000;
const BLOCKED_HINT: &str = "its route has on_poison = \"block\", a limit of parked rows is \
    reached, or it follows such a message: fix the cause and restart the relay, or make room among \
    parked rows (`watership parked`)";

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    pub(in crate::relay) fn admit_batch(&mut self) {
        let now = tokio::time::Instant::now().into_std();
        let mut batch = std::mem::take(&mut self.making.batch);
        let beside = self.backfill.sees_changes();
        for item in batch.drain(..) {
            if matches!(self.ending, Ending::Draining { .. }) {
                // A poison event came before: nothing after it may be settled.
                break;
            }
            let admitted = match item {
                Item::Event(event, receipt) if beside => self.admit_beside(event, receipt, now),
                Item::Event(event, receipt) => self.admit(&event, receipt, now),
                Item::Commit(receipt) => {
                    self.seen.metrics.wal.transactions.increment(1);
                    self.push_settled(receipt);
                    Ok(())
                }
                Item::Idle(receipt) => {
                    self.durable.idle.reached(receipt);
                    Ok(())
                }
                Item::LowMark(mark, receipt) => {
                    self.marked(mark, receipt, now);
                    Ok(())
                }
                Item::Columns(table, position, doubt) => {
                    self.columns_in_doubt(&table, position, doubt)
                }
                Item::Described(table, position, receipt) => {
                    self.before_description(&table, now);
                    let described = self.described(&table, position, receipt);
                    described.map(|receipt| self.push_settled(receipt))
                }
            };
            if let Err(poison) = admitted {
                self.drain(Some(poison_verdict(poison)));
            }
        }
        self.making.batch = batch;
        self.settle_prefix();
    }

    /// Routes one event, gives its messages to the lanes, and parks what cannot be published.
    pub(in crate::relay) fn admit(
        &mut self,
        event: &Event,
        receipt: Receipt,
        now: Instant,
    ) -> Result<()> {
        // All messages are made before the first is admitted: a verdict is about the whole event.
        self.make(event)?;
        let size = |made: &Made| match made {
            Made::Message(message, _) => message.size(),
            Made::Row(row, _) => row.size(),
        };
        let bytes = self.making.made.iter().map(size).sum();
        let count = u16::try_from(self.making.made.len()).expect("three for each of RULES_MAX fit");
        let entry = self.push(receipt, count, bytes);
        self.seen.published.event(event.position.mark);
        self.hand_over(event, Owner::Window(entry), now);
        Ok(())
    }

    /// Makes what there is to be sent and to be parked of an event.
    ///
    /// # Errors
    /// For one that its route does not want parked.
    pub(in crate::relay) fn make(&mut self, event: &Event) -> Result<()> {
        self.making.made.clear();
        let mut selected = false;
        let max_body = self.max_body();
        let least = event.least_body();
        let Making { plans, router, envelope, made, .. } = &mut self.making;
        for decision in plans.decide(router, event) {
            selected = true;
            match decision {
                Decision::Drop(rule) => {
                    self.seen.metrics.routes[usize::from(rule.0)].dropped.increment(1);
                }
                Decision::Publish(plan, _) if !plan.is_plain() && !plan.passes(event) => {
                    let route = usize::from(plan.route.id.0);
                    self.seen.metrics.routes[route].dropped.increment(1);
                }
                Decision::Publish(plan, lanes) => {
                    make_on_route(envelope, made, event, plan, lanes, (least, max_body))?;
                }
            }
        }
        if !selected {
            let plan = self.making.plans.unrouted(&self.making.router, event);
            let (lanes, error) = (plan.lanes(event), no_route(event));
            let row = ParkedRow::of_event(event, &plan, lanes, Why::NoRoute, &error);
            self.making.made.push(Made::Row(Box::new(row), OnPoison::Park));
        }
        if !self.parked.parking.is_idle() {
            self.follow_parked(event);
        }
        Ok(())
    }

    /// Gives what was made of an event to the lanes, and parks the rest. The owner's entry waits
    /// for all of it.
    pub(in crate::relay) fn hand_over(&mut self, event: &Event, owner: Owner, now: Instant) {
        let entry = match owner {
            Owner::Window(entry) | Owner::Chunk(entry) => entry,
            Owner::Parked(_) => unreachable!("what is tried again was made before"),
        };
        let mut made = std::mem::take(&mut self.making.made);
        for made in made.drain(..) {
            match made {
                Made::Message(message, lanes) => {
                    self.seen.metrics.routes[usize::from(message.route.0)].received.increment(1);
                    if self.is_left_out(&message, event.position, lanes, owner) {
                        continue;
                    }
                    let about = About {
                        position: event.position,
                        source: event.table.full_name.clone(),
                        committed_at_us: event.committed_at_us,
                    };
                    self.flight.lanes.admit(message, about, lanes, owner, now);
                }
                Made::Row(row, policy) => self.park(*row, entry, policy),
            }
        }
        self.making.made = made;
    }

    /// The broker confirmed the message to an earlier session, and its turn has come: it is settled
    /// and not sent.
    fn is_left_out(
        &mut self,
        message: &Message,
        position: Position,
        lanes: LaneKeys,
        owner: Owner,
    ) -> bool {
        if self.flight.remembered.is_empty() {
            return false;
        }
        let Owner::Window(entry) = owner else {
            // A chunk that comes again has another place, and other rows.
            self.flight.remembered.sends(message.route, lanes);
            return false;
        };
        let key = MessageKey::of(message);
        if !self.flight.remembered.leaves_out(key, position, lanes) {
            return false;
        }
        self.flight.confirms.add(position, key);
        self.flight.window.settle(entry);
        true
    }

    /// Something is parked: makes rows of the messages that must follow it, and leaves out what an
    /// earlier session parked already.
    fn follow_parked(&mut self, event: &Event) {
        let follows = follows();
        if self.parked.parking.has_unrouted() {
            let unrouted = ParkedKey { position: event.position, route: "".into(), part: 0 };
            let plan = self.making.plans.unrouted(&self.making.router, event);
            let lanes = plan.lanes(event);
            let known = self.parked.parking.is_known(plan.event_id(event.id), "", 0);
            if known || self.parked.parking.follows(&unrouted, lanes).is_some() {
                self.making.made.clear();
                if !known {
                    let row = ParkedRow::of_event(event, &plan, lanes, Why::Follows, &follows);
                    self.making.made.push(Made::Row(Box::new(row), OnPoison::Park));
                }
                return;
            }
        }
        let mut made = std::mem::take(&mut self.making.made);
        made.retain_mut(|made| {
            let (message, lanes) = match made {
                Made::Message(message, lanes) => (message, *lanes),
                Made::Row(row, _) => {
                    return !self.parked.parking.is_known(row.id, &row.key.route, row.key.part);
                }
            };
            let route = self.making.router.by_id(message.route);
            let plan = self.making.plans.of_route(event, message.route);
            let plan = plan.expect("the message was made by it");
            let part = message.part;
            let key = ParkedKey { position: event.position, route: route.label.clone(), part };
            // Hashing the route's id for each event would be seen in the rate.
            if self.parked.parking.has_known() {
                let id = plan.event_id(event.id);
                let ids = [id, id::of_route(id, &route.name), message.id];
                if ids.iter().any(|id| self.parked.parking.is_known(*id, &route.name, part)) {
                    return false;
                }
            }
            if self.parked.parking.follows(&key, lanes).is_some() {
                let mut row = ParkedRow::of_event(event, plan, lanes, Why::Follows, &follows);
                row.key.part = part;
                *made = Made::Row(Box::new(row), OnPoison::Park);
            }
            true
        });
        self.making.made = made;
    }

    /// Parks a message whose entry is in the window.
    pub(in crate::relay) fn park(&mut self, row: ParkedRow, entry: EntryId, policy: OnPoison) {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let follows = self.parked.parking.follows(&row.key, row.lanes);
        self.parked.count += 1;
        let count = self.parked.count;
        let logged = count <= LOGGED_FIRST || count.is_multiple_of(LOGGED_EVERY);
        let told = logged.then(|| (row.key.clone(), row.error.clone()));
        let (route, why) = (row.key.route.clone(), row.why);
        match self.parked.parking.park(row, entry, policy, follows, clock.as_secs_f64()) {
            Disposition::Settled => {
                self.flight.window.settle(entry);
                self.seen.metrics.parked.count(&route, why.as_str());
                if let Some((ParkedKey { position, .. }, error)) = told {
                    let (route, kind, hint) = (&*route, why.as_str(), why.hint());
                    tracing::warn!(
                        route,
                        %position,
                        kind,
                        error,
                        hint,
                        count,
                        "a message cannot be published; it is parked"
                    );
                }
            }
            Disposition::Blocked => {
                if let Some((ParkedKey { position, .. }, error)) = told {
                    let (route, kind) = (&*route, why.as_str());
                    tracing::warn!(
                        route,
                        %position,
                        kind,
                        error,
                        hint = BLOCKED_HINT,
                        count,
                        "a message can be neither published nor parked; its key is blocked"
                    );
                }
            }
        }
    }

    /// Largest body that the publisher takes, or that the broker was seen to take.
    pub(in crate::relay) fn max_body(&self) -> usize {
        self.publisher.max_body().min(self.making.broker_max_body)
    }

    pub(in crate::relay) fn push_settled(&mut self, receipt: Receipt) {
        self.durable.idle.busy();
        self.durable.progress.on_received(receipt.position());
        self.flight.window.push_settled(receipt);
    }

    pub(in crate::relay) fn push(
        &mut self,
        receipt: Receipt,
        messages: u16,
        bytes: usize,
    ) -> EntryId {
        self.durable.idle.busy();
        self.durable.progress.on_received(receipt.position());
        self.flight.window.push(receipt, messages, bytes)
    }
}

/// Whether the broker could take a message of which the body has at least this size, in bytes. One
/// that it could not is not made, because it may be larger than the memory.
pub(in crate::relay) fn may_fit(least: usize, max: usize) -> Result<(), (Why, Error)> {
    if least <= max.max(COUNTED_MAX) {
        return Ok(());
    }
    let text = format!("its body has at least {least} bytes, the limit is {max}");
    Err((Why::TooLarge, Error::event(text).hint(RAISE_LIMIT)))
}

/// A body of up to this size, in bytes, is made all the same: then it is known how large it is.
const COUNTED_MAX: usize = 1 << 20;
const RAISE_LIMIT: &str = "raise broker.max_message_size if the broker takes more";

/// The message, if the broker takes one of its size.
pub(in crate::relay) fn fits(message: Message, max: usize) -> Result<Message, (Why, Error)> {
    let len = message.body().len();
    if len <= max {
        return Ok(message);
    }
    let text = format!("its body has {len} bytes, the limit is {max}");
    Err((Why::TooLarge, Error::event(text).hint(RAISE_LIMIT)))
}

/// All messages of the event on one route, of what its rules let through; what follows one that is
/// parked must not be sent before it. `least` and `max` are bytes of a body: what it has at least,
/// and may have at most.
fn make_on_route(
    envelope: &mut Envelope,
    out: &mut Vec<Made>,
    event: &Event,
    plan: &Plan,
    lanes: LaneKeys,
    (least, max): (usize, usize),
) -> Result<()> {
    let mut is_parked = false;
    let (sent, of_sent) = plan.sent(event);
    let least = if plan.is_plain() { least } else { sent.least_body() };
    let least = least / plan.route.format.shrinks_at_most();
    for part in 0..parts(&sent, of_sent) {
        let made = not_drifted(plan).and_then(|()| may_fit(least, max)).and_then(|()| {
            if is_parked {
                return Err((Why::Follows, follows()));
            }
            let made = envelope.message(&sent, of_sent, part);
            fits(made.map_err(|error| (Why::Invalid, error))?, max)
        });
        is_parked |= made.is_err();
        out.push(match made {
            Ok(message) => Made::Message(message, lanes),
            Err((why, error)) => poison(event, plan, (lanes, part), why, error)?,
        });
    }
    Ok(())
}

fn follows() -> Error {
    Error::event("an earlier message with its key could not be published")
}

/// An error when the table lacks what the route promised.
pub(in crate::relay) fn not_drifted(plan: &Plan) -> Result<(), (Why, Error)> {
    let Some(drift) = plan.drift() else { return Ok(()) };
    let table = plan.table.as_ref().map_or("", |plan| &*plan.table.full_name);
    let text = format!("table {table} is not as it was agreed for this route: {}", drift.what);
    Err((Why::Drift, Error::event(text).hint(Why::Drift.hint())))
}

fn poison(
    event: &Event,
    plan: &Plan,
    (lanes, part): (LaneKeys, u16),
    why: Why,
    error: Error,
) -> Result<Made> {
    let policy = match (why, plan.drift()) {
        (Why::Drift, Some(drift)) => match drift.policy {
            OnDrift::Stop => {
                let (route, position) = (&plan.route.name, event.position);
                let error = error.context(format!("route {route:?}, at {position}"));
                return Err(error.as_verdict(Verdict::SchemaDrift).hint(AGREE));
            }
            OnDrift::Park | OnDrift::Pass => OnPoison::Park,
        },
        _ => plan.route.policy.on_poison,
    };
    match policy {
        OnPoison::Stop => {
            let id = plan.event_id(event.id);
            Err(error.context(format!("event {id} ({})", event.position)))
        }
        policy @ (OnPoison::Park | OnPoison::Block) => {
            let mut row = ParkedRow::of_event(event, plan, lanes, why, &error);
            row.key.part = part;
            // One that follows has nothing wrong with it.
            let policy = if why == Why::Follows { OnPoison::Park } else { policy };
            Ok(Made::Row(Box::new(row), policy))
        }
    }
}

const AGREE: &str = "`watership schema TABLE` shows what has changed; agree to the table as it is \
                     now with `watership schema accept TABLE`, then start the relay again; nothing \
                     is lost";

fn no_route(event: &Event) -> Error {
    let what = match &event.content {
        Content::Outbox(row) => format!("aggregate type {:?}", &*row.aggregate_type),
        Content::Change(_) => format!("table {:?}", event.table.full_name),
    };
    Error::event(format!("no route selects {what}"))
        .hint("add a [[route]] for it, or one with drop = true to drop and count such events")
}

/// An event that its route does not want parked stops the relay.
pub(in crate::relay) fn poison_verdict(error: Error) -> Error {
    if error.kind() != Kind::Event {
        return error;
    }
    error.context("this event cannot be published").as_verdict(Verdict::EventUnpublishable)
}
