//! What the broker confirmed and no checkpoint covers yet: what a process carries from one session
//! to the next, so that after a fault of the broker it sends only what has no confirm. Pure.
//!
//! Invariant: **a message is left out only if the broker confirmed this very message, and only in
//! the turn of its lanes.** Same id, route, part and position; and everything before it in its
//! lanes that came in the sessions since then was left out as well. So its lanes are empty when it
//! comes, and to leave it out at once is to leave it out at its turn. Once something of a lane is
//! sent again, everything that follows in that lane is sent again, too: a consumer that only keeps
//! the latest state must not be left with an earlier one.
//!
//! A confirm is the broker's promise and is good for as long as the broker keeps it: what a queue
//! without durability loses in a restart was lost to it whether or not a checkpoint covers it.
//!
//! Nothing here outlives the process, and nothing is used when anybody else has had the checkpoint
//! in between (`relay/checkpoint/own`).

use std::collections::HashMap;

use uuid::Uuid;

use crate::message::{Message, RouteId};
use crate::position::Position;
use crate::route::LaneKeys;

/// A log of confirms is looked through when it has at least this many of them.
const PRUNE_AT_LEAST: usize = 1024;

/// Which message of which event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessageKey {
    /// The message's id: that of its event, or made of it and the route.
    pub id: Uuid,
    /// The route that made it.
    pub route: RouteId,
    /// Which of the messages that the route makes of the event.
    pub part: u16,
}

impl MessageKey {
    /// The key of a message.
    pub fn of(message: &Message) -> Self {
        Self { id: message.id, route: message.route, part: message.part }
    }
}

/// What was confirmed in this session and is not covered by a checkpoint: at most what the window
/// holds and what may be settled and not stored. It grows with each confirm, so it is looked
/// through only when it has doubled: a few instructions a message.
#[derive(Debug)]
pub struct Confirms {
    log: Vec<(Position, MessageKey)>,
    prune_at: usize,
}

impl Confirms {
    /// Nothing was confirmed.
    pub fn new() -> Self {
        Self { log: Vec::new(), prune_at: PRUNE_AT_LEAST }
    }

    /// The broker has the message of the event at `position`.
    pub fn add(&mut self, position: Position, message: MessageKey) {
        self.log.push((position, message));
    }

    /// Drops what the checkpoint at `stored` covers, now and then.
    pub fn prune(&mut self, stored: Position) {
        if self.log.len() >= self.prune_at {
            self.log.retain(|(position, _)| *position > stored);
            self.prune_at = PRUNE_AT_LEAST.max(self.log.len() * 2);
        }
    }
}

impl Default for Confirms {
    fn default() -> Self {
        Self::new()
    }
}

/// What earlier sessions of this process got confirms for.
#[derive(Debug, Default)]
pub struct Remembered {
    /// Where each message stands, and in which session it was confirmed, or left out, last.
    messages: HashMap<MessageKey, (Position, u32)>,
    /// The last of these positions; behind it nothing is remembered.
    until: Position,
    /// Number of this session among those that remember something.
    session: u32,
    sent: Sent,
}

/// In which session something was sent, last, by what would have to follow it.
#[derive(Debug, Default)]
struct Sent {
    lanes: HashMap<u64, u32>,
    /// By table: any message, and truncates alone.
    tables: HashMap<u64, u32>,
    truncates: HashMap<u64, u32>,
    /// A pipelined route has no lanes. All of its messages count as one lane.
    routes: HashMap<RouteId, u32>,
}

impl Remembered {
    /// Nothing is remembered: the way of almost every message.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// How many messages are remembered.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Forgets everything: it is all sent again.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Whether the message is left out: the broker has it. Asked about every message when it is
    /// admitted to its lanes, in that order; one that is not left out counts as sent.
    pub fn leaves_out(&mut self, message: MessageKey, position: Position, lanes: LaneKeys) -> bool {
        if position > self.until {
            self.forget();
            return false;
        }
        let known = self.messages.get(&message).filter(|(at, _)| *at == position).copied();
        let Some((_, confirmed_in)) = known else {
            self.sends(message.route, lanes);
            return false;
        };
        self.messages.remove(&message);
        let in_turn = self.sent.last(message.route, lanes) <= confirmed_in;
        if !in_turn {
            self.sends(message.route, lanes);
        }
        if self.is_empty() {
            self.forget();
        }
        in_turn
    }

    /// Something is sent in these lanes that nobody asked about: a parked row that is tried again.
    pub fn sends(&mut self, route: RouteId, lanes: LaneKeys) {
        if !self.is_empty() {
            self.sent.add(route, lanes, self.session);
        }
    }

    /// What the next session remembers: what this one got confirms for and the checkpoint at
    /// `stored` does not cover, what was `released` of the parked and is not written, and what it
    /// did not come to.
    #[must_use]
    pub fn after(
        mut self,
        confirms: &Confirms,
        stored: Position,
        released: impl Iterator<Item = (MessageKey, Position)>,
    ) -> Self {
        let confirmed = confirms.log.iter().filter(|(position, _)| *position > stored);
        let confirmed = confirmed.map(|(position, message)| (*message, *position));
        for (message, position) in confirmed.chain(released) {
            self.messages.insert(message, (position, self.session));
            self.until = self.until.max(position);
        }
        self.session += 1;
        self
    }
}

impl Sent {
    fn add(&mut self, route: RouteId, lanes: LaneKeys, session: u32) {
        match lanes {
            LaneKeys::Free => {
                self.routes.insert(route, session);
            }
            LaneKeys::One { lane, group } => {
                self.lanes.insert(lane, session);
                self.tables.extend(group.map(|group| (group, session)));
            }
            LaneKeys::Two { lanes, group } => {
                self.lanes.extend(lanes.map(|lane| (lane, session)));
                self.tables.insert(group, session);
            }
            LaneKeys::Barrier { group } => {
                self.tables.insert(group, session);
                self.truncates.insert(group, session);
            }
        }
    }

    /// The last session in which something was sent that the message must follow; 0 for none.
    fn last(&self, route: RouteId, lanes: LaneKeys) -> u32 {
        let lane = |lane: u64| self.lanes.get(&lane).copied();
        let truncate = |group: u64| self.truncates.get(&group).copied();
        let last = match lanes {
            LaneKeys::Free => self.routes.get(&route).copied(),
            LaneKeys::One { lane: one, group } => lane(one).max(group.and_then(truncate)),
            LaneKeys::Two { lanes: [a, b], group } => lane(a).max(lane(b)).max(truncate(group)),
            LaneKeys::Barrier { group } => self.tables.get(&group).copied(),
        };
        last.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
