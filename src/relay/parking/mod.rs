//! Which lanes are parked, and what waits to be written, retried or published. Pure.
//!
//! Invariant: **nothing overtakes a parked message of its lane.** While a lane has an unreleased
//! row, later messages of the lane become rows behind it. A retry takes rows from the front of
//! their lanes only; once the last row of a lane is on its way, what comes next is published
//! behind it. Order is by position, never by the order of insertion.
//!
//! A row that is parked counts as settled at once, but it is written in the same transaction as
//! the first checkpoint that passes it, so nothing durable ever passes a row that is not.

mod bounds;
mod next;
mod order;
pub mod recent;
mod retries;
pub mod row;
mod shown;
pub mod store;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use uuid::Uuid;

use crate::position::Position;
use crate::relay::checkpoint::rider::Rider;
use crate::relay::parking::row::{Changed, Indexed, ParkedKey, ParkedRow, RowState, Why};
use crate::relay::window::EntryId;
use crate::route::{LaneKeys, OnPoison};
use order::{Blocking, Set, sets};

pub use bounds::{Known, Limits};
pub(in crate::relay) use retries::tell_releases;
pub use shown::Summary;

/// Most rows of a route that are on their way again at once.
pub const RETRYING_MAX: usize = 256;
/// The same of all routes.
const LOADED_MAX: usize = 2048;
/// Most bytes of them.
const RETRYING_BYTES: usize = 4 << 20;

/// Where a row is that is neither released nor on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the database.
    Stored,
    /// In memory, and settled: the next checkpoint that passes it writes it.
    Pending,
    /// In memory, and not settled: it may not be parked now, or never.
    Blocked,
}

#[derive(Debug, Clone, Copy)]
struct Waiting {
    lanes: LaneKeys,
    state: RowState,
    why: Why,
    place: Place,
    bytes: usize,
    parked_at: f64,
}

#[derive(Debug)]
struct Blocked {
    row: ParkedRow,
    entry: EntryId,
    policy: OnPoison,
}

/// A row that is on its way again.
#[derive(Debug)]
struct Loaded {
    key: ParkedKey,
    waiting: Waiting,
    /// Messages of it without a confirm: an event that no route selected may have several now.
    open: usize,
}

/// What a message that comes now must follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Follows {
    state: RowState,
    place: Place,
}

/// What became of a message that was given to [`Parking::park`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// It will be written: its entry is settled.
    Settled,
    /// It waits in memory: its entry stays open.
    Blocked,
}

/// The next row to try again.
#[derive(Debug)]
pub enum Next {
    /// Read these from the database first.
    Read(Vec<ParkedKey>),
    /// It is in memory, not written yet.
    Pending(ParkedRow),
    /// It is in memory and its entry is open.
    Blocked(ParkedRow, EntryId),
}

/// All of it.
#[derive(Debug, Default)]
pub struct Parking {
    limits: Limits,
    rows: BTreeMap<ParkedKey, Waiting>,
    lanes: HashMap<u64, BTreeSet<ParkedKey>>,
    tables: HashMap<u64, BTreeSet<ParkedKey>>,
    barriers: HashMap<u64, BTreeSet<ParkedKey>>,
    pending: BTreeMap<ParkedKey, ParkedRow>,
    pending_bytes: usize,
    blocked: BTreeMap<ParkedKey, Blocked>,
    blocked_bytes: usize,
    loaded: HashMap<u64, Loaded>,
    next_number: u64,
    /// Changes that are not written yet; a later one of a row replaces the earlier.
    changes: BTreeMap<ParkedKey, Changed>,
    /// Unreleased rows as the database has them.
    stored: BTreeMap<ParkedKey, RowState>,
    /// Rows beyond the checkpoint, of any state: a replay neither parks nor publishes them again.
    known: Known,
    /// The first row that found the limit of lanes reached. Later rows find the same until a row
    /// is removed.
    keys_full_from: RefCell<Option<ParkedKey>>,
    /// Rows to be tried again, by route.
    retrying: BTreeMap<Arc<str>, BTreeSet<ParkedKey>>,
    /// Of `loaded`: its bytes, and how many there are of each route.
    loaded_bytes: usize,
    loaded_of: HashMap<Arc<str>, usize>,
    /// Waiting rows of events that no route selected, and those of them on their way.
    unrouted: usize,
    unrouted_loaded: usize,
}

impl Parking {
    /// What the database has at the start of a session.
    pub fn new(limits: Limits, found: Vec<Indexed>, known: Known) -> Self {
        let mut parking = Self { limits, known, ..Self::default() };
        parking.reload(found);
        parking
    }

    /// Nothing is parked: the way of almost every event.
    pub fn is_idle(&self) -> bool {
        self.rows.is_empty()
            && self.loaded.is_empty()
            && self.known.ids.is_empty()
            && self.stored.is_empty()
    }

    /// Earlier sessions parked messages beyond the checkpoint.
    pub fn has_known(&self) -> bool {
        !self.known.ids.is_empty()
    }

    /// An earlier session parked this message beyond the checkpoint.
    pub fn is_known(&self, id: Uuid, route: &str, part: u16) -> bool {
        self.has_known() && self.known.ids.contains(&(id, route.into(), part))
    }

    /// An event that no route selected is parked, so its key is on all routes.
    pub fn has_unrouted(&self) -> bool {
        self.unrouted + self.unrouted_loaded > 0 || self.has_known()
    }

    /// What the message must follow: the last row before it in its lanes, if there is one.
    pub fn follows(&self, key: &ParkedKey, lanes: LaneKeys) -> Option<Follows> {
        if self.rows.is_empty() && self.loaded.is_empty() {
            return None;
        }
        let before = |set: Option<&BTreeSet<ParkedKey>>| set?.range(..key).next_back().cloned();
        let lane = |lane: &u64| before(self.lanes.get(lane));
        let barrier = |group: &u64| before(self.barriers.get(group));
        let last = match lanes {
            LaneKeys::Free => None,
            LaneKeys::One { lane: l, group } => lane(&l).max(group.as_ref().and_then(barrier)),
            LaneKeys::Two { lanes: [a, b], group } => lane(&a).max(lane(&b)).max(barrier(&group)),
            LaneKeys::Barrier { group } => before(self.tables.get(&group)),
        };
        let Some(last) = last else {
            // What the routes make of it now stands in other lanes than the row does, so what comes
            // next of its key waits until it is confirmed.
            let on_its_way = key.route.is_empty() && self.unrouted_loaded_in(lanes);
            return on_its_way
                .then_some(Follows { state: RowState::Retrying, place: Place::Pending });
        };
        let waiting = self.rows[&last];
        Some(Follows { state: waiting.state, place: waiting.place })
    }

    /// Takes a message that cannot be published, or that follows one.
    pub fn park(
        &mut self,
        mut row: ParkedRow,
        entry: EntryId,
        policy: OnPoison,
        follows: Option<Follows>,
        now: f64,
    ) -> Disposition {
        if let Some(follows) = follows.filter(|_| row.why == Why::Follows) {
            row.state = follows.state;
        }
        let behind_blocked = follows.is_some_and(|f| f.place == Place::Blocked);
        let key = row.key.clone();
        let blocked = policy == OnPoison::Block || behind_blocked || self.is_full(&row);
        let place = if blocked { Place::Blocked } else { Place::Pending };
        let (lanes, state, why, bytes) = (row.lanes, row.state, row.why, row.size());
        self.insert(&key, Waiting { lanes, state, why, place, bytes, parked_at: now });
        if blocked {
            self.blocked_bytes += bytes;
            self.blocked.insert(key, Blocked { row, entry, policy });
            return Disposition::Blocked;
        }
        self.pending_bytes += bytes;
        self.pending.insert(key, row);
        Disposition::Settled
    }

    /// Parks messages that a limit had blocked, as far as there is room again. Returns the entries
    /// to settle, with the route and the reason of each.
    pub fn unblock(&mut self) -> Vec<(EntryId, Arc<str>, Why)> {
        let mut settled = Vec::new();
        let mut lanes_blocked = Blocking::default();
        let keys: Vec<ParkedKey> = self.blocked.keys().cloned().collect();
        for key in keys {
            let Blocked { row, policy, .. } = &self.blocked[&key];
            if *policy == OnPoison::Block || lanes_blocked.holds(row.lanes) || self.is_full(row) {
                lanes_blocked.add(row.lanes);
                continue;
            }
            let Blocked { mut row, entry, .. } =
                self.blocked.remove(&key).expect("it was just read");
            let waiting = self.rows.get_mut(&key).expect("blocked rows are rows");
            waiting.place = Place::Pending;
            // Somebody may have asked for a retry, or one may have failed, while it was blocked.
            row.state = waiting.state;
            self.blocked_bytes -= waiting.bytes;
            self.pending_bytes += row.size();
            settled.push((entry, key.route.clone(), row.why));
            self.pending.insert(key, row);
        }
        settled
    }

    /// What rides on a checkpoint at `settled`.
    pub fn take_riders(&mut self, settled: Position) -> Vec<Rider> {
        if settled.mark > self.known.until {
            self.known.ids.clear();
        }
        let mut rows = Vec::new();
        while let Some(entry) = self.pending.first_entry() {
            if entry.key().position > settled {
                break;
            }
            let (key, row) = entry.remove_entry();
            self.pending_bytes -= row.size();
            if let Some(waiting) = self.rows.get_mut(&key) {
                waiting.place = Place::Stored;
            }
            if matches!(row.state, RowState::Parked | RowState::Retrying) {
                self.stored.insert(key, row.state);
            }
            rows.push(row);
        }
        let changes: Vec<Changed> = std::mem::take(&mut self.changes).into_values().collect();
        for change in &changes {
            match change.state {
                RowState::Parked | RowState::Retrying => {
                    self.stored.insert(change.key.clone(), change.state);
                }
                RowState::Released | RowState::Discarded => {
                    self.stored.remove(&change.key);
                }
            }
        }
        let mut riders = Vec::new();
        if !rows.is_empty() {
            riders.push(Rider::Parked(rows));
        }
        if !changes.is_empty() {
            riders.push(Rider::Unparked(changes));
        }
        riders
    }

    /// The row is in the database, neither released nor discarded.
    pub fn is_stored(&self, key: &ParkedKey) -> bool {
        self.stored.contains_key(key)
    }

    /// There is something that would ride on a checkpoint at `settled`.
    pub fn has_riders(&self, settled: Position) -> bool {
        let due = self.pending.first_key_value().is_some_and(|(k, _)| k.position <= settled);
        due || !self.changes.is_empty()
    }

    /// How many unreleased rows the database has: (parked, retrying).
    pub fn counts(&self) -> (usize, usize) {
        let parked = self.stored.values().filter(|state| **state == RowState::Parked).count();
        (parked, self.stored.len() - parked)
    }

    /// Takes over what people changed. Not while a write is under way.
    pub fn reload(&mut self, found: Vec<Indexed>) {
        let before = std::mem::take(&mut self.stored);
        for row in found {
            let is_new = !before.contains_key(&row.key);
            self.stored.insert(row.key.clone(), row.state);
            let Indexed { key, state, why, lanes, bytes, parked_at } = row;
            // A change of ours that is not written yet is newer than what was read.
            if self.changes.contains_key(&key) {
                continue;
            }
            if self.rows.contains_key(&key) {
                self.set_state(&key, state);
            } else if is_new {
                let place = Place::Stored;
                self.insert(&key, Waiting { lanes, state, why, place, bytes, parked_at });
            }
        }
        for (key, _) in before {
            let is_stored = |w: &Waiting| w.place == Place::Stored;
            if !self.stored.contains_key(&key) && self.rows.get(&key).is_some_and(is_stored) {
                self.remove(&key);
            }
        }
        self.follow_retries();
    }

    /// Rows with which nothing is wrong take over the state of the row before them in their lane:
    /// a retry is about whole keys, and some of these were written after a person asked for it.
    fn follow_retries(&mut self) {
        let follows = |(key, waiting): (&ParkedKey, &Waiting)| {
            (waiting.why == Why::Follows && waiting.state == RowState::Parked).then(|| key.clone())
        };
        for key in self.rows.iter().filter_map(follows).collect::<Vec<ParkedKey>>() {
            let waiting = self.rows[&key];
            let before = self.follows(&key, waiting.lanes);
            if before.is_some_and(|before| before.state != RowState::Retrying) {
                continue;
            }
            self.set_state(&key, RowState::Retrying);
            match waiting.place {
                Place::Blocked => {}
                Place::Stored | Place::Pending => self.change(key, RowState::Retrying, None),
            }
        }
    }

    /// The row still waits to be tried again, and no row waits before it in its lanes.
    pub fn is_next(&self, key: &ParkedKey) -> bool {
        let is_next = |waiting: &Waiting| {
            waiting.state == RowState::Retrying
                && self.is_free(key, waiting.lanes, &BTreeSet::new())
        };
        self.rows.get(key).is_some_and(is_next)
    }

    /// The row is on its way with `open` messages; returns its number.
    pub fn load(&mut self, key: &ParkedKey, open: usize) -> u64 {
        let waiting = self.remove(key).expect("only a waiting row is loaded");
        let number = self.next_number;
        self.next_number += 1;
        self.unrouted_loaded += usize::from(key.route.is_empty());
        self.loaded_bytes += waiting.bytes;
        *self.loaded_of.entry(key.route.clone()).or_default() += 1;
        self.loaded.insert(number, Loaded { key: key.clone(), waiting, open });
        number
    }

    fn unload(&mut self, number: u64) -> Option<Loaded> {
        let loaded = self.loaded.remove(&number)?;
        self.unrouted_loaded -= usize::from(loaded.key.route.is_empty());
        self.loaded_bytes -= loaded.waiting.bytes;
        *self.loaded_of.get_mut(&loaded.key.route).expect("it was counted") -= 1;
        Some(loaded)
    }

    fn unrouted_loaded_in(&self, lanes: LaneKeys) -> bool {
        if self.unrouted_loaded == 0 {
            return false;
        }
        let mut before = Blocking::default();
        let unrouted = self.loaded.values().filter(|l| l.key.route.is_empty());
        unrouted.for_each(|l| before.add(l.waiting.lanes));
        before.holds(lanes)
    }

    /// A blocked row is published after all; its entry settles with its message.
    pub fn unload_blocked(&mut self, key: &ParkedKey) {
        let waiting = self.remove(key);
        self.blocked_bytes -= waiting.map_or(0, |waiting| waiting.bytes);
        self.blocked.remove(key);
    }

    /// One message of a loaded row was confirmed.
    pub fn confirmed(&mut self, number: u64) {
        // Another of its messages may have failed meanwhile; then the row waits again.
        let Some(loaded) = self.loaded.get_mut(&number) else { return };
        loaded.open -= 1;
        if loaded.open == 0 {
            let Loaded { key, .. } = self.unload(number).expect("it was just read");
            self.change(key, RowState::Released, None);
        }
    }

    /// A loaded row failed again, or follows one that did: it waits for a person again.
    pub fn failed(&mut self, number: u64, why: Option<(Why, String)>) {
        // With several messages the first failure speaks for the row; a row is published again as
        // a whole, and its messages keep their ids.
        let Some(Loaded { key, mut waiting, .. }) = self.unload(number) else { return };
        waiting.state = RowState::Parked;
        if let Some((why, _)) = &why {
            waiting.why = *why;
        }
        waiting.place =
            if self.pending.contains_key(&key) { Place::Pending } else { Place::Stored };
        self.insert(&key, waiting);
        self.change(key.clone(), RowState::Parked, why);
        self.park_followers(&key);
    }

    /// A row that was to be tried again failed before it was on its way.
    pub fn refused(&mut self, key: &ParkedKey, why: Why, error: String) {
        let number = self.load(key, 1);
        self.failed(number, Some((why, error)));
    }

    /// What waits behind this row, which is parked again, waits for a person, too. What waits
    /// behind other parked rows does so already.
    fn park_followers(&mut self, first: &ParkedKey) {
        let mut next = vec![first.clone()];
        while let Some(key) = next.pop() {
            for key in self.behind(&key) {
                let waiting = self.rows[&key];
                if waiting.state != RowState::Retrying {
                    continue;
                }
                self.set_state(&key, RowState::Parked);
                match waiting.place {
                    Place::Blocked => {}
                    Place::Stored | Place::Pending => {
                        self.change(key.clone(), RowState::Parked, None);
                    }
                }
                next.push(key);
            }
        }
    }

    fn set_state(&mut self, key: &ParkedKey, state: RowState) {
        let waiting = self.rows.get_mut(key).expect("a row that waits");
        waiting.state = state;
        self.note_retrying(key, state);
    }

    /// Notes a change of a row where it is: in memory, or to be written.
    fn change(&mut self, key: ParkedKey, state: RowState, why: Option<(Why, String)>) {
        let Some(row) = self.pending.get_mut(&key) else {
            self.changes.insert(key.clone(), Changed { key, state, why });
            return;
        };
        row.state = state;
        if let Some((why, error)) = why {
            (row.why, row.error) = (why, error);
            row.attempts += 1;
        }
    }

    /// Rows that are on their way again.
    pub fn on_their_way(&self) -> usize {
        self.loaded.len()
    }

    /// Bytes that wait to be written and belong to no entry of the window.
    pub fn pending_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// Bytes of rows that wait for room in the table, or for a person.
    pub fn blocked_bytes(&self) -> usize {
        self.blocked_bytes
    }

    fn insert(&mut self, key: &ParkedKey, waiting: Waiting) {
        for set in sets(waiting.lanes) {
            self.map(set).entry(set.hash()).or_default().insert(key.clone());
        }
        self.unrouted += usize::from(key.route.is_empty());
        self.note_retrying(key, waiting.state);
        self.rows.insert(key.clone(), waiting);
    }

    fn remove(&mut self, key: &ParkedKey) -> Option<Waiting> {
        let waiting = self.rows.remove(key)?;
        self.keys_full_from.take();
        self.unrouted -= usize::from(key.route.is_empty());
        self.note_retrying(key, RowState::Parked);
        for set in sets(waiting.lanes) {
            let map = self.map(set);
            let keys = map.get_mut(&set.hash()).expect("a row stands in its lanes");
            keys.remove(key);
            if keys.is_empty() {
                map.remove(&set.hash());
            }
        }
        Some(waiting)
    }

    fn map(&mut self, set: Set) -> &mut HashMap<u64, BTreeSet<ParkedKey>> {
        match set {
            Set::Lane(_) => &mut self.lanes,
            Set::Table(_) => &mut self.tables,
            Set::Barriers(_) => &mut self.barriers,
        }
    }
}
