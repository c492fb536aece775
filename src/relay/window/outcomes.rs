//! What follows from ack, nack, return and channel close: what was published, an event of the
//! window or a parked row on its way again, is settled or released, tried again, held, or parked.
//! The route's policy decides here; waits and places in lanes are in `relay/window/lanes`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::amqp::reply::{self, Cause};
use crate::error::{Error, Result};
use crate::message::RouteId;
use crate::metrics::RouteMetrics;
use crate::publisher::{Outcome, Publisher, Ticket};
use crate::relay::checkpoint::Store;
use crate::relay::parking::row::{ParkedKey, ParkedRow, RowState, Why, raw_message, shorten};
use crate::relay::window::lanes::{Confirmed, Owner, Pending};
use crate::relay::{Flight, Relay};
use crate::route::OnPoison;
use crate::source::{Note, Source};
use crate::verdict::Verdict;

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// Every outcome of the publisher, each exactly once.
    ///
    /// # Errors
    /// When the broker closed a channel for another reason than its messages: the session is over.
    pub(in crate::relay) fn settle_outcomes(&mut self) -> Result<()> {
        let mut over = None;
        let now = tokio::time::Instant::now().into_std();
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut outcomes = std::mem::take(&mut self.flight.outcomes);
        // A probe was out on a channel that was closed: it is the one to blame.
        let closed_on_probe = |(ticket, outcome): &&(Ticket, Outcome)| {
            let Outcome::ChannelClosed { code, .. } = outcome else { return false };
            reply::channel_closed(*code) == Cause::Destination
                && self.flight.lanes.is_probe(*ticket)
        };
        let probes = outcomes.iter().filter(closed_on_probe).count();
        for (ticket, outcome) in outcomes.drain(..) {
            match outcome {
                Outcome::Confirmed => self.confirmed(ticket, clock, now),
                Outcome::Nacked => self.nacked(ticket, now),
                Outcome::Returned(text) => self.returned(ticket, &text, now),
                Outcome::ChannelClosed { code, text } => match reply::channel_closed(code) {
                    Cause::Destination if probes > 0 && !self.flight.lanes.is_held(ticket) => {
                        self.flight.lanes.resend(ticket);
                    }
                    // It is unknown which of the probes closed it.
                    Cause::Destination if probes > 1 && self.flight.lanes.is_probe(ticket) => {
                        self.flight.lanes.probe_again(ticket, now);
                    }
                    Cause::Destination => {
                        let exchange = self.exchange_of(ticket);
                        let hint = reply::publish_hint(code, &text, exchange);
                        self.hold(ticket, text, &hint, now);
                    }
                    Cause::Message => self.refused(ticket, &text, now),
                    Cause::Session => {
                        // What other messages became is still good.
                        over = Some(reply::error("broker closed a channel", code, &text));
                    }
                },
            }
        }
        self.flight.outcomes = outcomes;
        self.settle_prefix();
        over.map_or(Ok(()), Err)
    }

    fn confirmed(&mut self, ticket: Ticket, clock: Duration, now: Instant) {
        let Confirmed { key, position, owner, committed_at_us, released } =
            self.flight.lanes.confirmed(ticket, now);
        match owner {
            Owner::Window(entry) => {
                self.flight.confirms.add(position, key);
                self.flight.window.settle(entry);
            }
            Owner::Chunk(entry) => self.flight.window.settle(entry),
            Owner::Parked(number) => {
                self.parked.parking.confirmed(number);
                self.parked.retry_due = true;
            }
        }
        self.seen.recent.add(key, clock);
        let metrics = self.route_metrics(key.route);
        metrics.confirmed.increment(1);
        // The rows of a chunk wait for their turn, which says nothing of live changes.
        if !matches!(owner, Owner::Chunk(_)) {
            let committed = Duration::from_micros(u64::try_from(committed_at_us).unwrap_or(0));
            metrics.commit_to_confirm.record(clock.saturating_sub(committed).as_secs_f64());
        }
        self.seen.metrics.broker.last_confirmed_seconds.set(clock.as_secs_f64());
        if released {
            let route = &*self.making.router.by_id(key.route).name;
            tracing::info!(route, "the destination works again; the route resumes");
        }
    }

    /// Tried again without a limit at the head of its lane, unless the route has one and the queue
    /// takes other messages of the route.
    fn nacked(&mut self, ticket: Ticket, now: Instant) {
        let route = self.flight.lanes.slot(ticket).message.route;
        self.route_metrics(route).nacked.increment(1);
        let nacked = self.flight.lanes.nacked(ticket, now);
        let limit = self.making.router.by_id(route).policy.nack_limit;
        if nacked.others_pass && limit.is_some_and(|limit| nacked.times >= limit) {
            let text = format!("the broker nacked it {} times but accepted others", nacked.times);
            let slots = self.flight.lanes.evict_nacked(ticket);
            self.park_evicted(slots, Why::Nacked, &Error::event(text));
        }
    }

    fn returned(&mut self, ticket: Ticket, text: &str, now: Instant) {
        let route = self.flight.lanes.slot(ticket).message.route;
        self.route_metrics(route).returned.increment(1);
        if self.making.router.by_id(route).policy.park_unroutable {
            let slots = self.flight.lanes.evict(ticket);
            let error = Error::event(format!("no queue is bound for this message: {text}"));
            self.park_evicted(slots, Why::Unroutable, &error);
        } else {
            let hint = reply::classify(reply::NO_ROUTE).2;
            self.hold(ticket, format!("unroutable: {text}"), hint, now);
        }
    }

    /// The broker closed the channel because of one of its messages, and does not say which.
    fn refused(&mut self, ticket: Ticket, text: &str, now: Instant) {
        if let Some(limit) = reply::size_limit(text) {
            // What comes next is compared before it is sent: no second channel is lost.
            self.making.broker_max_body = self.making.broker_max_body.min(limit);
        }
        if !self.flight.lanes.is_accused(ticket) {
            self.flight.lanes.suspect(ticket);
            return;
        }
        self.flight.lanes.acquit();
        let error = Error::event(format!("the broker refused it: {text}"));
        let route = self.making.router.by_id(self.flight.lanes.slot(ticket).message.route);
        if route.policy.on_poison == OnPoison::Stop {
            self.hold(ticket, error.to_string(), error.hint_or_kind(), now);
            self.drain(Some(error.as_verdict(Verdict::EventUnpublishable)));
            return;
        }
        let slots = self.flight.lanes.evict(ticket);
        self.park_evicted(slots, Why::Refused, &error);
    }

    fn exchange_of(&self, ticket: Ticket) -> &str {
        let exchange = self.flight.lanes.slot(ticket).message.exchange;
        &self.making.router.exchanges()[usize::from(exchange.0)]
    }

    fn hold(&mut self, ticket: Ticket, reason: String, hint: &str, now: Instant) {
        let exchange = self.exchange_of(ticket).to_owned();
        let message = &self.flight.lanes.slot(ticket).message;
        let router = &self.making.router;
        let routing_key = String::from_utf8_lossy(message.routing_key()).into_owned();
        let route = &*router.by_id(message.route).name;
        if self.flight.lanes.hold(ticket, reason.clone(), now) {
            tracing::error!(
                route,
                exchange,
                routing_key,
                reason,
                hint,
                "the destination is broken: the route is held and probed, nothing is lost"
            );
        }
    }

    /// Parks messages that were evicted together: the first for `why`, the others follow it.
    fn park_evicted(&mut self, slots: Vec<Pending>, why: Why, error: &Error) {
        let follows = Error::event("an earlier message with its key could not be published");
        for (index, slot) in slots.into_iter().enumerate() {
            let (why, error) = if index == 0 { (why, error) } else { (Why::Follows, &follows) };
            match slot.owner {
                Owner::Window(entry) | Owner::Chunk(entry) => {
                    let policy = match why {
                        Why::Refused => {
                            self.making.router.by_id(slot.message.route).policy.on_poison
                        }
                        // The route asks for these to be parked; and what follows, follows.
                        Why::Unroutable | Why::Nacked | Why::Follows => OnPoison::Park,
                        Why::TooLarge | Why::Invalid | Why::Drift | Why::NoRoute => {
                            unreachable!("these are seen before a message is sent")
                        }
                    };
                    let row = self.evicted_row(&slot, why, error);
                    self.park(row, entry, policy);
                }
                Owner::Parked(number) => {
                    let failed = (index == 0).then(|| (why, shorten(error)));
                    self.parked.parking.failed(number, failed);
                }
            }
        }
    }

    fn evicted_row(&self, slot: &Pending, why: Why, error: &Error) -> ParkedRow {
        let route = self.making.router.by_id(slot.message.route);
        ParkedRow {
            key: ParkedKey {
                position: slot.about.position,
                route: route.label.clone(),
                part: slot.message.part,
            },
            state: RowState::Parked,
            why,
            error: shorten(error),
            attempts: 1,
            id: slot.message.id,
            source: slot.about.source.to_string(),
            key_text: slot.message.key_text().to_owned(),
            committed_at_us: slot.about.committed_at_us,
            lanes: slot.keys,
            lanes_keyed: self.making.plans.is_keyed(route.id, slot.keys),
            rules: route.version.clone(),
            raw: raw_message(&slot.message),
        }
    }

    /// What was seen of the destinations of held routes, and what waits for them.
    pub(in crate::relay) fn look_at_holds(&mut self, now: Instant) {
        let Flight { lanes, missing, .. } = &mut self.flight;
        lanes.probe_what_is_back(|route| missing.has(route), now);
        for route in missing.take_well() {
            if lanes.end_idle_hold(route) {
                let route = &*self.making.router.by_id(route).name;
                tracing::info!(route, "the destination works again; the route is no longer held");
            }
        }
        self.flight.stuck_bytes = lanes.stuck_bytes();
    }

    pub(in crate::relay) fn settle_prefix(&mut self) {
        if let Some(mut receipt) = self.flight.window.take_settled() {
            self.durable.progress.on_settled(&receipt);
            let mut notes = receipt.take_notes();
            if notes.iter().any(|note| matches!(note, Note::Backfilled(_))) {
                // The next chunk waits for it.
                self.backfill.settled(tokio::time::Instant::now().into_std());
                self.durable.progress.tick();
            }
            self.durable.notes.append(&mut notes);
            if self.durable.storing.is_none() && !self.durable.progress.has_unstored() {
                // A replay of what was stored before needs no checkpoint.
                self.durable.stored_left = self.flight.window.left();
            }
            let (stored, _) = self.durable.progress.stored_checkpoint();
            self.flight.confirms.prune(stored);
        }
    }

    pub(in crate::relay) fn route_metrics(&self, route: RouteId) -> &RouteMetrics {
        &self.seen.metrics.routes[usize::from(route.0)]
    }
}
