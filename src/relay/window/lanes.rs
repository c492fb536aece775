//! Which message may be sent next. Pure; time is passed in.
//!
//! Invariant: one unconfirmed message per key; a nack goes back to the head of its lane. A
//! message stands in the queue of each of its lanes (two for a key change) and may be sent when
//! it is at the head of all of them. A truncate is a barrier: it waits for everything before it in
//! its table, and everything after it waits for it.
//!
//! A held route's messages wait aside, in order; its first one probes whether the destination
//! works again (`lanes/hold`). Other routes go on.
//!
//! Messages for a destination that nacks wait in `lanes/refusing`, which says when the next goes.
//!
//! A message that can never be published is evicted, with all that wait behind it in its lanes
//! (`lanes/evict`).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::Instant;

use crate::message::{Message, RouteId};
use crate::position::Position;
use crate::publisher::Ticket;
use crate::relay::window::EntryId;
use crate::relay::window::remembered::MessageKey;
use crate::route::LaneKeys;

/// Whom the end of a message is told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// The window's entry that it settles.
    Window(EntryId),
    /// The same, of a chunk of a backfill.
    Chunk(EntryId),
    /// The number of a parked row that is tried again.
    Parked(u64),
}

/// What a nack says, if more than "not now".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nacked {
    /// How often this message has been refused.
    pub times: u32,
    /// Other messages of its route were confirmed since it was refused first.
    pub others_pass: bool,
}

/// The event that a message tells of, as far as it is needed when the message ends.
#[derive(Debug, Clone)]
pub struct About {
    /// Its place in the source order.
    pub position: Position,
    /// The table it comes from, `schema.table`.
    pub source: Arc<str>,
    /// Commit time, in microseconds since 1970-01-01 UTC, for the metric.
    pub committed_at_us: i64,
}

/// A message between admission and settlement.
#[derive(Debug)]
pub struct Pending {
    /// The message.
    pub message: Message,
    /// Its event.
    pub about: About,
    /// Whom its end is told to.
    pub owner: Owner,
    /// When it was captured, for the metric.
    pub captured: Instant,
    /// Order of admission: what is put aside comes back in this order.
    order: u64,
    nacks: u32,
    /// It went out to a destination that refused, in this epoch of it.
    sent_to: Option<(DestinationKey, u32)>,
    /// Confirms of its route when it was refused first.
    confirms_then: u64,
    /// The lanes that it stands in.
    pub keys: LaneKeys,
    /// Next slot in each of its lanes.
    next: [Option<u32>; 2],
}

/// What a confirmed message was.
#[derive(Debug, Clone, Copy)]
pub struct Confirmed {
    /// Which message.
    pub key: MessageKey,
    /// Where its event stands in the source.
    pub position: Position,
    /// Whom its end is reported to.
    pub owner: Owner,
    /// Commit time of its event, in microseconds since 1970-01-01 UTC, for the metric.
    pub committed_at_us: i64,
    /// It was the probe of a hold, which has ended.
    pub released: bool,
}

/// First and last slot of a lane.
#[derive(Debug, Clone, Copy)]
struct Ends {
    head: u32,
    tail: u32,
}

/// The messages of one table: truncates are barriers among them.
#[derive(Debug, Default)]
struct Group {
    /// Messages past the barrier check and not settled.
    live: u32,
    /// A barrier is one of them.
    barrier: bool,
    /// Messages behind a barrier; the first may be the barrier itself.
    waiting: VecDeque<u32>,
}

/// What holds a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Why, in words.
    pub reason: String,
    /// Since when.
    pub since: Instant,
    /// A thing of the route is known to be missing: no probe goes out.
    missing: bool,
    /// When the next probe goes out, if none of another route is out.
    probe_from: Instant,
    /// When it goes out in any case.
    probe_by: Instant,
    /// The probe that is out.
    probing: Option<u32>,
    /// When the last probe went out.
    probed: Option<Instant>,
}

/// Lanes hold ready-made hashes as keys; hashing them again would be work for nothing.
#[derive(Debug, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are used")
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

type ByHash<T> = HashMap<u64, T, BuildHasherDefault<AsIs>>;

/// All unsettled messages and the order in which they may go.
#[derive(Debug, Default)]
pub struct Lanes {
    slots: Vec<Option<Pending>>,
    free: Vec<u32>,
    admitted: u64,
    lanes: ByHash<Ends>,
    groups: ByHash<Group>,
    ready: VecDeque<u32>,
    refusing: Refusing,
    holds: BTreeMap<RouteId, Hold>,
    probes: u64,
    /// Messages of held routes that could otherwise go, by admission.
    aside: BTreeMap<(RouteId, u64), u32>,
    in_flight: usize,
    /// Confirms by route.
    confirms: Vec<u64>,
    /// One of these made the broker close a channel (406); the largest is tried first, alone.
    suspects: BTreeSet<(Reverse<usize>, u64, u32)>,
    /// The suspect that is out, alone.
    accused: Option<u32>,
}

impl Lanes {
    /// No messages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Messages sent and without outcome.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Nothing is out, and what is left waits for a held route.
    pub fn is_stuck(&self) -> bool {
        let may_go = !self.ready.is_empty() || self.refusing.waiting() > 0;
        self.in_flight == 0 && !may_go && !self.holds.is_empty() && self.suspects.is_empty()
    }

    /// Routes that are held, with their reasons.
    pub fn holds(&self) -> impl Iterator<Item = (RouteId, &Hold)> {
        self.holds.iter().map(|(route, hold)| (*route, hold))
    }

    /// The message of a ticket that is out.
    pub fn slot(&self, ticket: Ticket) -> &Pending {
        self.at(index(ticket))
    }

    /// Takes the next message in source order.
    pub fn admit(
        &mut self,
        message: Message,
        about: About,
        keys: LaneKeys,
        owner: Owner,
        captured: Instant,
    ) {
        let order = self.admitted;
        self.admitted += 1;
        let next = [None; 2];
        let (nacks, confirms_then, sent_to) = (0, 0, None);
        let slot = Pending {
            message,
            about,
            owner,
            captured,
            order,
            nacks,
            sent_to,
            confirms_then,
            keys,
            next,
        };
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = Some(slot);
                id
            }
            None => {
                self.slots.push(Some(slot));
                u32::try_from(self.slots.len() - 1).expect("the window is far below 2^32")
            }
        };
        match group_of(keys) {
            None => self.enter(id),
            Some((group, barrier)) => {
                let group = self.groups.entry(group).or_default();
                let must_wait =
                    group.barrier || !group.waiting.is_empty() || (barrier && group.live > 0);
                if must_wait {
                    group.waiting.push_back(id);
                } else {
                    group.live += 1;
                    group.barrier = barrier;
                    self.enter(id);
                }
            }
        }
    }

    /// The next message that may be sent now; it counts as in flight from here on.
    pub fn next(&mut self, now: Instant) -> Option<(Ticket, &Pending)> {
        let id = self.next_id(now)?;
        self.in_flight += 1;
        Some((Ticket(u64::from(id)), self.at(id)))
    }

    /// Probes that went out since the last call.
    pub fn take_probes(&mut self) -> u64 {
        std::mem::take(&mut self.probes)
    }

    /// When `next` may have something again without any outcome in between.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.accused.is_some() || !self.suspects.is_empty() {
            // Everything else waits for the outcome of the one that is out.
            return None;
        }
        [self.refusing.wake_at(), self.probe_at()].into_iter().flatten().min()
    }

    /// The broker has it: the message leaves, its lanes move on, and a hold that it probed ends.
    pub fn confirmed(&mut self, ticket: Ticket, now: Instant) -> Confirmed {
        if let Some((destination, _)) = self.slot(ticket).sent_to {
            self.refusing.confirmed(destination, now);
        }
        let id = self.landed(ticket);
        let slot = self.at(id);
        let (key, keys, next) = (MessageKey::of(&slot.message), slot.keys, slot.next);
        let (owner, position) = (slot.owner, slot.about.position);
        let committed_at_us = slot.about.committed_at_us;
        // Dropped where it is: a slot is large, and nobody needs the rest of it.
        self.slots[id as usize] = None;
        self.free.push(id);
        let released = self.end_probe(id, key.route);
        *self.route_confirms(key.route) += 1;
        self.leave(id, keys, next);
        Confirmed { key, position, owner, committed_at_us, released }
    }

    /// The broker refused it for now: it stays at the head of its lane and is tried again, without
    /// a limit. A nack says that the destination exists, so a hold that it probed ends.
    pub fn nacked(&mut self, ticket: Ticket, now: Instant) -> Nacked {
        let epoch = self.slot(ticket).sent_to.map_or(0, |(_, epoch)| epoch);
        let id = self.landed(ticket);
        let route = self.at(id).message.route;
        let confirms = *self.route_confirms(route);
        let slot = self.slots[id as usize].as_mut().expect("an outcome belongs to a live slot");
        if slot.nacks == 0 {
            slot.confirms_then = confirms;
        }
        let place = Place { order: slot.order, id };
        self.refusing.nacked(&slot.message, place, slot.nacks, epoch, now);
        slot.nacks = slot.nacks.saturating_add(1);
        let others_pass = confirms > slot.confirms_then;
        let nacked = Nacked { times: slot.nacks, others_pass };
        self.end_probe(id, route);
        nacked
    }

    /// When the oldest message of each route was captured.
    pub fn oldest(&self) -> BTreeMap<RouteId, Instant> {
        let mut oldest = BTreeMap::new();
        for slot in self.slots.iter().flatten() {
            let at = oldest.entry(slot.message.route).or_insert(slot.captured);
            *at = slot.captured.min(*at);
        }
        oldest
    }

    /// Destinations that refuse.
    pub fn refused(&self) -> impl Iterator<Item = Refused<'_>> {
        self.refusing.each()
    }

    /// Forgets destinations that take everything again.
    pub fn forget_well(&mut self, now: Instant) {
        self.refusing.sweep(now);
    }

    fn next_id(&mut self, now: Instant) -> Option<u32> {
        if self.accused.is_some() || !self.suspects.is_empty() {
            return self.next_suspect();
        }
        if let Some(id) = self.next_probe(now) {
            return Some(id);
        }
        while let Some((Place { id, .. }, destination, epoch)) = self.refusing.next(now) {
            if self.unless_held(id).is_none() {
                self.refusing.landed(destination);
                continue;
            }
            let slot = self.slots[id as usize].as_mut().expect("what waits is live");
            slot.sent_to = Some((destination, epoch));
            return Some(id);
        }
        while let Some(id) = self.ready.pop_front() {
            if let Some(id) = self.unless_held(id).and_then(|id| self.unless_refused(id)) {
                return Some(id);
            }
        }
        None
    }

    /// Has the message wait when its destination refuses.
    fn unless_refused(&mut self, id: u32) -> Option<u32> {
        let slot = self.slots[id as usize].as_ref().expect("a ready slot is live");
        let Some(destination) = self.refusing.find(&slot.message) else { return Some(id) };
        self.refusing.wait(destination, Place { order: slot.order, id });
        None
    }

    /// Past the barrier check: joins its lanes, and is ready when it heads all of them.
    fn enter(&mut self, id: u32) {
        let (lanes, count) = lanes_of(self.at(id).keys);
        let mut heads = 0;
        for (place, lane) in lanes[..count].iter().enumerate() {
            match self.lanes.get_mut(lane) {
                None => {
                    self.lanes.insert(*lane, Ends { head: id, tail: id });
                    heads += 1;
                }
                Some(ends) => {
                    let tail = std::mem::replace(&mut ends.tail, id);
                    self.link(tail, *lane, id);
                }
            }
            debug_assert!(self.at(id).next[place].is_none());
        }
        if heads == count {
            self.ready.push_back(id);
        }
    }

    /// Makes `id` follow `tail` in `lane`.
    fn link(&mut self, tail: u32, lane: u64, id: u32) {
        let tail = self.slots[tail as usize].as_mut().expect("a lane's tail is live");
        let (lanes, count) = lanes_of(tail.keys);
        let place =
            lanes[..count].iter().position(|l| *l == lane).expect("the tail is in its lane");
        tail.next[place] = Some(id);
    }

    /// Takes a settled slot out of its lanes and its group, and lets the next ones go.
    fn leave(&mut self, id: u32, keys: LaneKeys, next: [Option<u32>; 2]) {
        let (lanes, count) = lanes_of(keys);
        for (place, lane) in lanes[..count].iter().enumerate() {
            let ends = self.lanes.get_mut(lane).expect("a live slot's lane exists");
            assert_eq!(ends.head, id, "only the head of a lane is ever in flight");
            match next[place] {
                None => {
                    self.lanes.remove(lane);
                }
                Some(next) => {
                    ends.head = next;
                    if self.heads_all(next) {
                        self.ready.push_back(next);
                    }
                }
            }
        }
        if let Some((group, _)) = group_of(keys) {
            self.leave_group(group);
        }
    }

    fn heads_all(&self, id: u32) -> bool {
        let (lanes, count) = lanes_of(self.at(id).keys);
        lanes[..count].iter().all(|lane| self.lanes[lane].head == id)
    }

    fn leave_group(&mut self, key: u64) {
        let group = self.groups.get_mut(&key).expect("a live slot's group exists");
        group.live -= 1;
        if group.live == 0 {
            group.barrier = false;
        }
        let mut entering = Vec::new();
        while !group.barrier
            && let Some(&id) = group.waiting.front()
        {
            let slot = self.slots[id as usize].as_ref().expect("a waiting slot is live");
            let barrier = matches!(slot.keys, LaneKeys::Barrier { .. });
            if barrier && group.live > 0 {
                break;
            }
            group.waiting.pop_front();
            group.live += 1;
            group.barrier = barrier;
            entering.push(id);
        }
        if group.live == 0 && group.waiting.is_empty() {
            self.groups.remove(&key);
        }
        for id in entering {
            self.enter(id);
        }
    }

    fn landed(&mut self, ticket: Ticket) -> u32 {
        assert!(self.in_flight > 0, "an outcome belongs to a message in flight");
        self.in_flight -= 1;
        let id = index(ticket);
        let slot = self.slots[id as usize].as_mut().expect("an outcome belongs to a live slot");
        if let Some((destination, _)) = slot.sent_to.take() {
            self.refusing.landed(destination);
        }
        self.accused.take_if(|accused| *accused == id);
        id
    }

    fn route_confirms(&mut self, route: RouteId) -> &mut u64 {
        let index = usize::from(route.0);
        if self.confirms.len() <= index {
            self.confirms.resize(index + 1, 0);
        }
        &mut self.confirms[index]
    }

    fn at(&self, id: u32) -> &Pending {
        self.slots[id as usize].as_ref().expect("the slot is live")
    }
}

fn index(ticket: Ticket) -> u32 {
    u32::try_from(ticket.0).expect("tickets are slot numbers")
}

fn lanes_of(keys: LaneKeys) -> ([u64; 2], usize) {
    match keys {
        LaneKeys::Free | LaneKeys::Barrier { .. } => ([0; 2], 0),
        LaneKeys::One { lane, .. } => ([lane, 0], 1),
        LaneKeys::Two { lanes, .. } => (lanes, 2),
    }
}

/// The group and whether the message is its barrier.
fn group_of(keys: LaneKeys) -> Option<(u64, bool)> {
    match keys {
        LaneKeys::Free | LaneKeys::One { group: None, .. } => None,
        LaneKeys::One { group: Some(group), .. } | LaneKeys::Two { group, .. } => {
            Some((group, false))
        }
        LaneKeys::Barrier { group } => Some((group, true)),
    }
}

mod evict;
mod hold;
mod refusing;
mod shown;

use refusing::{DestinationKey, Place, Refusing};

pub use hold::{PROBE_FIRST, PROBE_LIMIT};
pub use refusing::{Refused, WAIT_FIRST, WAIT_LIMIT};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_rows;
