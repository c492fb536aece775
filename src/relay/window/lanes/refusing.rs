//! Destinations that refuse: an exchange and routing key whose messages the broker nacks, because a
//! queue is full or has no majority. Pure; time is passed in.
//!
//! A copy that is sent again goes to every queue of its destination, also to those that had taken
//! the first one. So what is limited is sending: from the first nack on, all messages of the
//! destination wait here, and go out as TCP sends into a link that drops. A nack makes the wait
//! between two of them longer, down to one that probes every few seconds; a confirm makes it
//! shorter, until the pace is that of the queue's consumer, or the destination refuses no more.
//! Other destinations of the route are not touched.
//!
//! Probes have one budget per exchange: many routing keys that lead into one full queue are
//! together probed as often as one. Every other probe is for the one that refuses since last, so
//! that a queue that was full for a moment does not wait for the turn of a hundred that are stuck.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use xxhash_rust::xxh64::xxh64;

use crate::message::{ExchangeId, Message, RouteId};

/// First wait after a nack; doubles with each.
pub const WAIT_FIRST: Duration = Duration::from_millis(5);
/// Longest wait between two probes of a destination.
pub const WAIT_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait between two probes of one exchange.
const BUDGET_LIMIT: Duration = Duration::from_secs(1);
/// Shortest wait between two probes of one exchange.
const BUDGET_FIRST: Duration = Duration::from_millis(1);
/// The wait after a probe was confirmed, at most: the queue takes messages again.
const OPEN_LIMIT: Duration = Duration::from_millis(50);
/// The longest wait of one message before its next try, where others of its destination pass.
const MESSAGE_LIMIT: Duration = Duration::from_secs(1);
/// A message that was refused this often, and again between confirms of others, is refused for
/// itself.
const ALONE_FROM: u32 = 4;
/// A shorter wait counts as no wait.
const NO_WAIT: Duration = Duration::from_micros(5);
/// How far sending may catch up with a pace that the loop's own turns are too slow for.
const CATCH_UP: Duration = Duration::from_millis(5);
/// A destination without a nack for this long, and nothing waiting, refuses no more.
const QUIET: Duration = Duration::from_secs(2);
/// Destinations that are told apart; the others of an exchange share [`SHARED`] places.
const DESTINATIONS_MAX: usize = 4096;
const SHARED: u64 = 64;
/// How many of the youngest are looked at for one that may be probed.
const YOUNG: usize = 16;

/// What the lanes know of a message that waits here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Order of admission.
    pub(super) order: u64,
    /// Its slot.
    pub(super) id: u32,
}

/// A destination's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct DestinationKey(u64);

/// All destinations that refuse.
#[derive(Debug, Default)]
pub(super) struct Refusing {
    destinations: HashMap<DestinationKey, Destination>,
    /// Those that follow their consumer and have something to send, by when they may.
    following: BTreeSet<(Instant, DestinationKey)>,
    budgets: HashMap<ExchangeId, Budget>,
    /// Messages that wait here.
    waiting: usize,
}

/// Probes of one exchange.
#[derive(Debug)]
struct Budget {
    wait: Duration,
    next_at: Instant,
    /// The next probe is for the youngest, not for the one that has waited longest.
    youngest: bool,
    /// Destinations that are probed and have something to send, by when they may be.
    probing: BTreeSet<(Instant, DestinationKey)>,
    /// The same by since when they refuse.
    by_age: BTreeSet<(Instant, DestinationKey)>,
}

#[derive(Debug)]
struct Destination {
    exchange: ExchangeId,
    route: RouteId,
    routing_key: Box<[u8]>,
    since: Instant,
    refused_at: Instant,
    /// Messages refused since.
    nacks: u64,
    /// Since the last confirm.
    nacks_in_row: u32,
    /// Between two messages.
    wait: Duration,
    /// Above this a confirm halves the wait, below it takes a tenth off.
    careful_from: Duration,
    /// When the last message went, or was refused.
    last: Instant,
    /// Most messages out.
    window: u32,
    out: u32,
    /// Raised whenever the wait grows: a nack of what was sent before says nothing new.
    epoch: u32,
    /// Not refused yet.
    fresh: BTreeMap<u64, u32>,
    /// Refused, by when each may be tried again.
    refused: BTreeMap<(Instant, u64), u32>,
}

/// A destination that refuses, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused<'a> {
    /// A route that leads there.
    pub route: RouteId,
    /// The exchange.
    pub exchange: ExchangeId,
    /// The routing key.
    pub routing_key: &'a [u8],
    /// Since when.
    pub since: Instant,
    /// Nacks since.
    pub nacks: u64,
    /// Messages that wait for it, of as many keys.
    pub waiting: usize,
}

impl Destination {
    fn new(message: &Message, now: Instant) -> Self {
        Self {
            exchange: message.exchange,
            route: message.route,
            routing_key: message.routing_key().into(),
            since: now,
            refused_at: now,
            nacks: 0,
            nacks_in_row: 0,
            wait: WAIT_FIRST / 2,
            careful_from: Duration::ZERO,
            last: now,
            window: 1,
            out: 0,
            epoch: 0,
            fresh: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    fn is_probing(&self) -> bool {
        self.nacks_in_row > 0
    }

    fn has_room(&self) -> bool {
        self.out < self.window && !(self.fresh.is_empty() && self.refused.is_empty())
    }

    /// What goes next. A probe is a message that was not sent yet, if there is one: its first copy
    /// costs nobody anything. Else the one whose turn comes first.
    fn take(&mut self, now: Instant) -> Option<Place> {
        let refused = self.refused.first_key_value().map(|((due, _), _)| *due);
        let refused_first = match refused {
            Some(due) => self.fresh.is_empty() || (!self.is_probing() && due <= now),
            None => false,
        };
        if !refused_first {
            return self.fresh.pop_first().map(|(order, id)| Place { order, id });
        }
        self.refused.pop_first().map(|((_, order), id)| Place { order, id })
    }

    /// When the next message may go, if there is one.
    fn next_at(&self) -> Instant {
        self.last + self.wait
    }

    /// The same with what the message that is next has to wait itself, apart from the budget.
    fn due(&self) -> Instant {
        let refused = self.refused.first_key_value().map(|((due, _), _)| *due);
        match refused.filter(|_| self.fresh.is_empty() && !self.is_probing()) {
            Some(due) => self.next_at().max(due),
            None => self.next_at(),
        }
    }

    fn sent(&mut self, now: Instant) {
        self.out += 1;
        self.last = self.next_at().max(now.checked_sub(CATCH_UP).unwrap_or(now));
    }

    fn on_nack(&mut self, now: Instant) {
        self.nacks_in_row = self.nacks_in_row.saturating_add(1);
        self.careful_from = self.wait * 2;
        self.wait = (self.wait * 2).clamp(WAIT_FIRST, WAIT_LIMIT);
        self.last = now;
        self.window = 1;
        self.epoch = self.epoch.wrapping_add(1).max(1);
    }

    fn on_confirm(&mut self) {
        if self.nacks_in_row > 1 {
            // It was closed, and nothing is known of the pace at which it opens.
            (self.wait, self.careful_from) = (self.wait.min(OPEN_LIMIT), Duration::ZERO);
        }
        self.nacks_in_row = 0;
        self.window = self.window.saturating_add(1);
        let wait = self.wait;
        self.wait = if wait > self.careful_from { wait / 2 } else { wait - wait / 10 };
        if self.wait < NO_WAIT {
            self.wait = Duration::ZERO;
        }
    }
}

impl Refusing {
    /// No destination refuses.
    pub(super) fn is_empty(&self) -> bool {
        self.destinations.is_empty()
    }

    /// Messages that wait here.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The destination of the message, if it refuses.
    pub(super) fn find(&self, message: &Message) -> Option<DestinationKey> {
        if self.destinations.is_empty() {
            // The way of almost every message.
            return None;
        }
        let keys = keys(message.exchange, message.routing_key());
        keys.into_iter().find(|key| self.destinations.contains_key(key))
    }

    /// The message may not be sent now: it waits for its turn.
    pub(super) fn wait(&mut self, key: DestinationKey, place: Place) {
        self.with(key, |destination| destination.fresh.insert(place.order, place.id));
        self.waiting += 1;
    }

    /// A message was nacked, as it had been `times` before; it went out in `epoch`, 0 where nobody
    /// refused then. From now on its destination refuses.
    pub(super) fn nacked(
        &mut self,
        message: &Message,
        place: Place,
        times: u32,
        epoch: u32,
        now: Instant,
    ) {
        let [own, shared] = keys(message.exchange, message.routing_key());
        let other = if self.destinations.len() < DESTINATIONS_MAX { own } else { shared };
        let key = self.find(message).unwrap_or(other);
        self.destinations.entry(key).or_insert_with(|| Destination::new(message, now));
        let retry = WAIT_FIRST.saturating_mul(1 << times.min(16)).min(MESSAGE_LIMIT);
        let mut probed = None;
        self.with(key, |destination| {
            destination.nacks += 1;
            destination.refused_at = now;
            destination.refused.insert((now + retry, place.order), place.id);
            // What was out together was refused together: that is one refusal. And a message that
            // is refused while others pass says nothing about them.
            let alone = times >= ALONE_FROM && !destination.is_probing();
            if epoch == destination.epoch && !alone {
                probed = destination.is_probing().then_some(destination.exchange);
                destination.on_nack(now);
            }
        });
        self.waiting += 1;
        if let Some(exchange) = probed {
            let budget = self.budget(exchange, now);
            budget.wait = (budget.wait * 2).clamp(WAIT_FIRST, BUDGET_LIMIT);
            budget.next_at = now + budget.wait;
        }
    }

    /// What was sent from here was confirmed.
    pub(super) fn confirmed(&mut self, key: DestinationKey, now: Instant) {
        let mut probed = None;
        self.with(key, |destination| {
            probed = destination.is_probing().then_some(destination.exchange);
            destination.on_confirm();
        });
        if let Some(exchange) = probed {
            let budget = self.budget(exchange, now);
            budget.wait = (budget.wait / 4).max(BUDGET_FIRST);
            budget.next_at = budget.next_at.min(now + budget.wait);
        }
    }

    /// What was sent from here has an outcome, whichever.
    pub(super) fn landed(&mut self, key: DestinationKey) {
        self.with(key, |destination| destination.out -= 1);
    }

    /// The next message that may go, with its destination and the epoch in which it goes.
    pub(super) fn next(&mut self, now: Instant) -> Option<(Place, DestinationKey, u32)> {
        if self.waiting == 0 {
            return None;
        }
        let key = self.next_following(now).or_else(|| self.next_probe(now))?;
        let mut taken = None;
        self.with(key, |destination| {
            taken = destination.take(now).map(|place| (place, key, destination.epoch));
            destination.sent(now);
        });
        self.waiting -= 1;
        taken
    }

    fn next_following(&self, now: Instant) -> Option<DestinationKey> {
        self.following.first().filter(|(due, _)| *due <= now).map(|(_, key)| *key)
    }

    fn next_probe(&mut self, now: Instant) -> Option<DestinationKey> {
        let budgets = self.budgets.values_mut().filter(|budget| budget.next_at <= now);
        let mut found = None;
        for budget in budgets {
            let Some((_, longest)) = budget.probing.first().filter(|(due, _)| *due <= now) else {
                continue;
            };
            let young = budget.by_age.iter().rev().take(YOUNG).map(|(_, key)| key);
            let mut young = young.filter(|key| self.destinations[key].next_at() <= now);
            let young = if budget.youngest { young.next() } else { None };
            found = Some(*young.unwrap_or(longest));
            budget.next_at = now + budget.wait;
            budget.youngest = !budget.youngest;
            break;
        }
        found
    }

    /// When `next` may have something again without any outcome in between.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let following = self.following.first().map(|(due, _)| *due);
        let probes = self.budgets.values().filter_map(|budget| {
            let (due, _) = budget.probing.first()?;
            Some(budget.next_at.max(*due))
        });
        probes.chain(following).min()
    }

    /// The message leaves: it is parked. Returns whether it waited here.
    pub(super) fn remove(&mut self, message: &Message, place: Place) -> bool {
        let Some(key) = self.find(message) else { return false };
        let mut found = false;
        self.with(key, |destination| {
            found = destination.fresh.remove(&place.order).is_some();
            let refused = destination.refused.iter().find(|(_, id)| **id == place.id);
            if let Some((at, _)) = refused.map(|(at, id)| (*at, *id)) {
                destination.refused.remove(&at);
                found = true;
            }
        });
        self.waiting -= usize::from(found);
        found
    }

    /// Drops the destinations that take everything again.
    pub(super) fn sweep(&mut self, now: Instant) {
        let well = |destination: &Destination| {
            let idle = destination.fresh.is_empty() && destination.refused.is_empty();
            let quiet = now.saturating_duration_since(destination.refused_at) >= QUIET;
            idle && quiet && destination.out == 0
        };
        self.destinations.retain(|_, destination| !well(destination));
        if self.destinations.is_empty() {
            self.budgets.clear();
        }
    }

    /// Each destination that refuses, for people.
    pub(super) fn each(&self) -> impl Iterator<Item = Refused<'_>> {
        self.destinations.values().map(|destination| Refused {
            route: destination.route,
            exchange: destination.exchange,
            routing_key: &destination.routing_key,
            since: destination.since,
            nacks: destination.nacks,
            waiting: destination.fresh.len() + destination.refused.len(),
        })
    }

    /// Changes a destination, and keeps the order in which they are served.
    fn with<T>(&mut self, key: DestinationKey, change: impl FnOnce(&mut Destination) -> T) {
        let destination = self.destinations.get_mut(&key).expect("a destination that refuses");
        let before = (destination.due(), key);
        let probed_before = (destination.next_at(), key);
        change(destination);
        let (due, exchange) = (destination.due(), destination.exchange);
        let (room, probing) = (destination.has_room(), destination.is_probing());
        let (refused_at, since) = (destination.refused_at, destination.since);
        let next_at = destination.next_at();
        self.following.remove(&before);
        if room && !probing {
            self.following.insert((due, key));
        }
        // A following destination has no budget, and needs none.
        let budget = self.budget(exchange, refused_at);
        budget.probing.remove(&probed_before);
        if room && probing {
            budget.probing.insert((next_at, key));
            budget.by_age.insert((since, key));
        } else {
            budget.by_age.remove(&(since, key));
        }
    }

    fn budget(&mut self, exchange: ExchangeId, now: Instant) -> &mut Budget {
        let new = || Budget {
            wait: BUDGET_FIRST,
            next_at: now,
            youngest: true,
            probing: BTreeSet::new(),
            by_age: BTreeSet::new(),
        };
        self.budgets.entry(exchange).or_insert_with(new)
    }
}

/// The destination's own key, and the one that it shares where there are too many.
fn keys(exchange: ExchangeId, routing_key: &[u8]) -> [DestinationKey; 2] {
    let seed = u64::from(exchange.0);
    let own = xxh64(routing_key, seed);
    [own, xxh64(&(own % SHARED).to_le_bytes(), !seed)].map(DestinationKey)
}

#[cfg(test)]
mod tests;
