//! Routes whose destination is broken. Their messages wait aside, in order of admission, and the
//! first one probes whether the destination works again.
//!
//! The wait between two probes is a quarter of the time that the route has been held: however long
//! an outage was, the next probe follows its end by at most a quarter of it. It is never less than
//! `PROBE_FIRST` nor more than `PROBE_LIMIT`.
//!
//! The broker answers a probe to a missing or forbidden exchange by closing the channel, and the
//! answers to all other probes on that channel are lost with it. Routes that are held together
//! would be probed together, and one of them could lose its answer again and again. So a probe
//! goes alone where it can: in the last eighth of its wait it goes as soon as no other one is out,
//! and at the end of the wait in any case. Of several that are due at once the one that went last
//! goes first, so that each of a pair has its turn.

use std::time::{Duration, Instant};

use super::{Hold, Lanes, index};
use crate::message::RouteId;
use crate::publisher::Ticket;

/// Shortest wait between two probes of a held route.
pub const PROBE_FIRST: Duration = Duration::from_millis(100);
/// Longest wait between two probes of a held route.
pub const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// The wait is the time that the route has been held, divided by this.
const HELD_PER_WAIT: u32 = 4;
/// The part of a wait in which a probe may go already, alone, is the wait divided by this.
const WAIT_PER_ALONE: u32 = 8;

impl Hold {
    /// A hold that begins at `now`.
    fn new(reason: String, now: Instant) -> Self {
        let (probing, probed) = (None, None);
        let (since, probe_from, probe_by, missing) = (now, now, now, false);
        let mut hold = Self { reason, since, missing, probe_from, probe_by, probing, probed };
        hold.schedule(now);
        hold
    }

    /// Sets when the next probe goes; the last answer came at `now`.
    fn schedule(&mut self, now: Instant) {
        let held = now.saturating_duration_since(self.since);
        let wait = (held / HELD_PER_WAIT).clamp(PROBE_FIRST, PROBE_LIMIT);
        self.probe_from = now + (wait - wait / WAIT_PER_ALONE);
        self.probe_by = now + wait;
    }

    /// When the next probe may go; `alone` says that none of another route is out.
    fn due(&self, alone: bool) -> Instant {
        if alone { self.probe_from } else { self.probe_by }
    }
}

impl Lanes {
    /// The destination is broken: the message's route is held, and the message waits at the head
    /// of its lane. Returns whether the reason is new: the route was not held before, or the
    /// probe failed for a different reason.
    pub fn hold(&mut self, ticket: Ticket, reason: String, now: Instant) -> bool {
        let id = self.landed(ticket);
        let (route, order) = (self.at(id).message.route, self.at(id).order);
        self.aside.insert((route, order), id);
        match self.holds.get_mut(&route) {
            Some(hold) => {
                if hold.probing != Some(id) {
                    return false;
                }
                hold.probing = None;
                hold.schedule(now);
                std::mem::replace(&mut hold.reason, reason) != hold.reason
            }
            None => {
                self.holds.insert(route, Hold::new(reason, now));
                true
            }
        }
    }

    /// The destination is known to be broken before anything was sent. With `missing`, no probe
    /// goes out before [`Lanes::probe_what_is_back`] allows it.
    pub fn hold_route(&mut self, route: RouteId, reason: String, missing: bool, now: Instant) {
        let mut hold = Hold::new(reason, now);
        hold.missing = missing;
        self.holds.insert(route, hold);
    }

    /// A route where nothing is wrong any more is not held without a message that could probe it.
    /// Returns whether its hold has ended.
    pub fn end_idle_hold(&mut self, route: RouteId) -> bool {
        let probing = self.holds.get(&route).is_some_and(|hold| hold.probing.is_some());
        if probing || self.first_aside(route).is_some() {
            return false;
        }
        self.holds.remove(&route).is_some()
    }

    /// Routes that are not `missing` any more are probed from now on.
    pub fn probe_what_is_back(&mut self, missing: impl Fn(RouteId) -> bool, now: Instant) {
        for (route, hold) in self.holds.iter_mut().filter(|(_, hold)| hold.missing) {
            if !missing(*route) {
                hold.missing = false;
                (hold.probe_from, hold.probe_by) = (now, now);
            }
        }
    }

    /// A probe was lost without an answer of its own: its route stays held for the same reason.
    pub fn probe_again(&mut self, ticket: Ticket, now: Instant) {
        let reason = self.hold_of(ticket).map(|hold| hold.reason.clone());
        self.hold(ticket, reason.unwrap_or_default(), now);
    }

    /// It is out as the probe of a held route.
    pub fn is_probe(&self, ticket: Ticket) -> bool {
        self.hold_of(ticket).is_some_and(|hold| hold.probing == Some(index(ticket)))
    }

    /// Its route is held.
    pub fn is_held(&self, ticket: Ticket) -> bool {
        self.hold_of(ticket).is_some()
    }

    fn hold_of(&self, ticket: Ticket) -> Option<&Hold> {
        self.holds.get(&self.slot(ticket).message.route)
    }

    /// When the next probe is due.
    pub(super) fn probe_at(&self) -> Option<Instant> {
        let alone = self.all_answered();
        self.probes_waiting().map(|(_, hold)| hold.due(alone)).min()
    }

    /// The next probe that is due; it counts as out from here on.
    pub(super) fn next_probe(&mut self, now: Instant) -> Option<u32> {
        if self.holds.is_empty() {
            return None;
        }
        let alone = self.all_answered();
        let due = self.probes_waiting().filter(|(_, hold)| hold.due(alone) <= now);
        let (route, _) = due.max_by_key(|(_, hold)| hold.probed)?;
        let key = self.first_aside(route).expect("a probe that waits has a message");
        let id = self.aside.remove(&key).expect("the key was just read");
        let hold = self.holds.get_mut(&route).expect("the route is held");
        (hold.probing, hold.probed) = (Some(id), Some(now));
        self.probes += 1;
        Some(id)
    }

    /// No probe is out.
    fn all_answered(&self) -> bool {
        self.holds.values().all(|hold| hold.probing.is_none())
    }

    /// Held routes of which no probe is out and that have a message for one.
    fn probes_waiting(&self) -> impl Iterator<Item = (RouteId, &Hold)> {
        self.holds().filter(|(route, hold)| {
            !hold.missing && hold.probing.is_none() && self.first_aside(*route).is_some()
        })
    }

    fn first_aside(&self, route: RouteId) -> Option<(RouteId, u64)> {
        self.aside.range((route, 0)..=(route, u64::MAX)).next().map(|(key, _)| *key)
    }

    /// Puts the message aside when its route is held.
    pub(super) fn unless_held(&mut self, id: u32) -> Option<u32> {
        if self.holds.is_empty() {
            return Some(id);
        }
        let (route, order) = (self.at(id).message.route, self.at(id).order);
        if self.holds.contains_key(&route) {
            self.aside.insert((route, order), id);
            return None;
        }
        Some(id)
    }

    /// When `id` was the probe of a hold, the hold ends and what it kept goes first.
    pub(super) fn end_probe(&mut self, id: u32, route: RouteId) -> bool {
        if self.holds.get(&route).and_then(|hold| hold.probing) != Some(id) {
            return false;
        }
        self.holds.remove(&route);
        let mut last_first = Vec::new();
        while let Some(key) = self.first_aside(route) {
            last_first.extend(self.aside.remove(&key));
        }
        for id in last_first.into_iter().rev() {
            self.ready.push_front(id);
        }
        true
    }
}
