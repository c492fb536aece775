//! Starts the retries that people ask for: parked rows are read, made into messages, and put into
//! their lanes in order. Nobody else publishes them. How a retry ends is in `relay/window/outcomes`
//! and in `Parking::confirmed`.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::amqp::printer::text_header;
use crate::envelope::{message_id, parts};
use crate::error::{Error, Result};
use crate::message::{EXCHANGE_HEADER, Message, Parts};
use crate::position::Position;
use crate::publisher::Publisher;
use crate::relay::checkpoint::Store;
use crate::relay::checkpoint::rider::Rider;
use crate::relay::parking::Next;
use crate::relay::parking::row::{ParkedKey, ParkedRow, Raw, RowState, Why, shorten};
use crate::relay::parking::store::Found;
use crate::relay::window::admission::{fits, may_fit, not_drifted};
use crate::relay::window::lanes::{About, Owner};
use crate::relay::window::remembered::MessageKey;
use crate::relay::{Ending, Making, Relay};
use crate::route::{Decision, LaneKeys, Ordering, Route};
use crate::source::Source;

/// How often the table is asked whether people changed something, while it has rows.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// Begins to look at the table, or to read rows, when there is a reason. Not while a write is
    /// under way: what is read must be what we know plus what people did.
    pub(in crate::relay) fn start_looking(&mut self) {
        let ending = !matches!(self.ending, Ending::No);
        // The checkpoint has its turn: each row that is read frees the way for the next one.
        let storing = self.durable.storing.is_some()
            || (self.durable.progress.is_due() && self.has_unstored());
        if !self.parked.retry_due || self.parked.looking.is_some() || storing || ending {
            return;
        }
        self.parked.retry_due = false;
        if self.parked.parking.is_idle() {
            return;
        }
        let holds = self.flight.lanes.holds();
        let held: Vec<_> =
            holds.map(|(id, _)| self.making.router.by_id(id).label.clone()).collect();
        loop {
            match self.parked.parking.next_retry(|route| held.iter().any(|name| **name == *route)) {
                Some(Next::Read(keys)) => {
                    self.parked.looking = Some(Box::pin(self.store.read(keys)));
                    return;
                }
                Some(Next::Pending(row)) => self.retry(row),
                Some(Next::Blocked(row, entry)) => {
                    let messages = match self.messages_of(&row) {
                        Ok(messages) => messages,
                        // It follows, and could not be published by itself: what comes behind
                        // waits for it, and nothing else does.
                        Err((why, error)) => {
                            self.parked.parking.refused_blocked(&row.key, why, shorten(&error));
                            continue;
                        }
                    };
                    self.parked.parking.unload_blocked(&row.key);
                    // The entry waits for one: the row.
                    self.flight.window.becomes(entry, messages.len());
                    let (about, now) = (about(&row), Instant::now().into_std());
                    for (message, lanes) in messages {
                        let owner = Owner::Window(entry);
                        self.flight.remembered.sends(message.route, lanes);
                        self.flight.lanes.admit(message, about.clone(), lanes, owner, now);
                    }
                }
                None => break,
            }
        }
        if Instant::now() >= self.parked.look_at {
            self.parked.look_at = Instant::now() + LOOK_EVERY;
            self.parked.looking = Some(Box::pin(self.store.look(self.parked.parking.counts())));
        }
    }

    /// What the look has found.
    pub(in crate::relay) fn found(&mut self, found: Found) {
        self.parked.retry_due = true;
        match found {
            Found::Same => {}
            Found::Index(rows) => self.parked.parking.reload(rows),
            Found::Rows(rows) => {
                let mut tried = false;
                for row in rows {
                    // One that was to come before it may not have come: somebody discarded it.
                    if self.parked.parking.is_next(&row.key) {
                        tried = true;
                        self.retry(row);
                    }
                }
                if !tried {
                    // Somebody was faster: what we know is old. No count is as large as this.
                    self.parked.retry_due = false;
                    self.parked.looking = Some(Box::pin(self.store.look((usize::MAX, 0))));
                }
            }
        }
    }

    /// Puts a row into its lanes, if nothing has come between; else it is parked again.
    fn retry(&mut self, row: ParkedRow) {
        match self.messages_of(&row) {
            Ok(messages) => {
                let number = self.parked.parking.load(&row.key, messages.len().max(1));
                if messages.is_empty() {
                    // By now a route drops it.
                    self.parked.parking.confirmed(number);
                }
                let (about, now) = (about(&row), Instant::now().into_std());
                for (message, lanes) in messages {
                    self.seen.metrics.parked.retried.increment(1);
                    let owner = Owner::Parked(number);
                    self.flight.remembered.sends(message.route, lanes);
                    self.flight.lanes.admit(message, about.clone(), lanes, owner, now);
                }
            }
            Err((why, error)) => {
                tracing::warn!(
                    route = &*row.key.route,
                    position = %row.key.position,
                    kind = %why,
                    error = %error,
                    "a parked message still cannot be published; it stays parked"
                );
                self.parked.parking.refused(&row.key, why, shorten(&error));
            }
        }
    }

    /// Messages that were parked and published before a checkpoint passed them. A row of an event
    /// that no route selected has several, and is not among them.
    pub(in crate::relay) fn released(&self) -> Vec<(MessageKey, Position)> {
        let rows = self.parked.parking.released_unwritten();
        let message = |row: &ParkedRow| {
            let route = self.making.router.by_name(&row.key.route)?;
            let part = row.key.part;
            let id = match &row.raw {
                Raw::Event(_) => message_id(row.id, route, part),
                Raw::Message { .. } => row.id,
            };
            Some((MessageKey { id, route: route.id, part }, row.key.position))
        };
        rows.filter_map(message).collect()
    }

    /// The messages of a parked row under the routes as they are now.
    fn messages_of(&mut self, row: &ParkedRow) -> Result<Vec<(Message, LaneKeys)>, (Why, Error)> {
        let max_body = self.max_body();
        let router = self.making.router.clone();
        let route = router.by_name(&row.key.route);
        if route.is_none() && !row.key.route.is_empty() {
            let text = format!("there is no route {:?} any more", row.key.route);
            let hint = "add the route again, or discard the row";
            return Err((Why::NoRoute, Error::event(text).hint(hint)));
        }
        let (event, hidden) = match (&row.raw, route) {
            (Raw::Event(json), _) => {
                let event = crate::event::stored::from_json(json, row.id, row.key.position);
                let (mut event, hidden) = event.map_err(|error| (Why::Invalid, error))?;
                self.making.plans.name_as_configured(&mut event);
                (event, hidden)
            }
            (Raw::Message { routing_key, properties, body }, Some(route)) => {
                // The number of partitions may have changed since.
                let routing_key = route.partition_of(&row.key_text).unwrap_or(routing_key);
                let parts = Parts { key: &row.key_text, routing_key, properties, body };
                let message = as_it_was(row, route, &parts).map_err(|e| (Why::Invalid, e))?;
                return Ok(vec![(fits(message, max_body)?, row.lanes)]);
            }
            (Raw::Message { .. }, None) => {
                return Err((Why::Invalid, Error::event("the stored row names no route")));
            }
        };
        // A row that no route selected becomes what all routes make of it now.
        let part = row.key.part;
        // By now its route may make fewer messages of it: then this one is gone.
        let (mut made, mut selected) = (Vec::new(), false);
        let Making { plans, envelope, .. } = &mut self.making;
        let metrics = &self.seen.metrics;
        plans.decide_alone(&router, &event, &hidden, |decision| match decision {
            Decision::Drop(rule) => selected |= route.is_none_or(|r| r.id == rule),
            Decision::Publish(plan, lanes) if route.is_none_or(|r| r.id == plan.route.id) => {
                selected |= route.is_some();
                if !plan.passes(&event) {
                    // By now its filter drops it.
                    metrics.routes[usize::from(plan.route.id.0)].dropped.increment(1);
                    selected = true;
                    return;
                }
                let (sent, of_sent) = plan.sent(&event);
                let numbers = match route {
                    None => 0..parts(&sent, of_sent),
                    Some(_) => part..parts(&sent, of_sent).min(part + 1),
                };
                // Of a key that is hidden in the row, the lanes were taken before.
                let is_hidden = route.is_some() && !hidden.columns.is_empty();
                let lanes = if is_hidden { row.lanes } else { lanes };
                let least = sent.least_body() / plan.route.format.shrinks_at_most();
                for part in numbers {
                    let message =
                        not_drifted(plan).and_then(|()| may_fit(least, max_body)).and_then(|()| {
                            let message = envelope.message(&sent, of_sent, part);
                            fits(message.map_err(|error| (Why::Invalid, error))?, max_body)
                        });
                    made.push(message.map(|message| (message, lanes)));
                }
            }
            Decision::Publish(..) => {}
        });
        let messages = made.into_iter().collect::<Result<Vec<_>, (Why, Error)>>()?;
        if messages.is_empty() && !selected {
            let text = format!("route {:?} does not select this event", row.key.route);
            return Err((Why::NoRoute, Error::event(text).hint(Why::NoRoute.hint())));
        }
        Ok(messages)
    }
}

/// The message that was parked as it is.
fn as_it_was(row: &ParkedRow, route: &Route, parts: &Parts<'_>) -> Result<Message> {
    let exchange =
        route.exchange_called(text_header(parts.properties, EXCHANGE_HEADER).as_deref())?;
    let mut message = Message::from_parts(parts, exchange, route.id, row.id)?;
    message.part = row.key.part;
    message.in_sequence = route.ordering == Ordering::Pipelined;
    message.route_hash = route.hash();
    Ok(message)
}

/// Logs which rows the next checkpoint records as published: one line for each route.
pub(in crate::relay) fn tell_releases(riders: &[Rider]) {
    let mut released: BTreeMap<&str, Vec<Position>> = BTreeMap::new();
    for rider in riders {
        let keys: Vec<&ParkedKey> = match rider {
            Rider::Parked(rows) => {
                let rows = rows.iter().filter(|row| row.state == RowState::Released);
                rows.map(|row| &row.key).collect()
            }
            Rider::Unparked(changes) => {
                let changes = changes.iter().filter(|c| c.state == RowState::Released);
                changes.map(|change| &change.key).collect()
            }
            Rider::Described(_)
            | Rider::Backfilled(_)
            | Rider::Moved(_)
            | Rider::Changed(_)
            | Rider::Canary(_) => {
                continue;
            }
        };
        for key in keys {
            released.entry(&key.route).or_default().push(key.position);
        }
    }
    for (route, positions) in released {
        tracing::info!(
            route,
            rows = positions.len(),
            first = positions.iter().min().map(ToString::to_string),
            last = positions.iter().max().map(ToString::to_string),
            "parked messages are released: they were published"
        );
    }
}

fn about(row: &ParkedRow) -> About {
    About {
        position: row.key.position,
        source: row.source.as_str().into(),
        committed_at_us: row.committed_at_us,
    }
}
