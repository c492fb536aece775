//! Messages that leave without having been published: those that can never be, and what waits
//! behind them. And the search for the one message that made the broker close a channel.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet, VecDeque};

use super::{Lanes, Pending, Place, group_of, index, lanes_of};
use crate::publisher::Ticket;

impl Lanes {
    /// Takes the message out, with all that wait behind it in its lanes, behind those in theirs,
    /// and behind a barrier that now can never come. In the order of admission.
    pub fn evict(&mut self, ticket: Ticket) -> Vec<Pending> {
        let first = self.landed(ticket);
        self.end_probe(first, self.at(first).message.route);
        self.evict_id(first)
    }

    /// As [`Lanes::evict`], for a message that was nacked and waits for its next try.
    pub fn evict_nacked(&mut self, ticket: Ticket) -> Vec<Pending> {
        let first = index(ticket);
        let slot = self.slots[first as usize].as_ref().expect("a nacked slot is live");
        let waited = self.refusing.remove(&slot.message, Place { order: slot.order, id: first });
        assert!(waited, "a nacked message waits for its next try");
        self.evict_id(first)
    }

    fn evict_id(&mut self, first: u32) -> Vec<Pending> {
        let doomed = self.behind(first);
        let ids: HashSet<u32> = doomed.values().copied().collect();
        let outside = self.take_waiting(&ids);
        for &id in doomed.values().filter(|id| !outside.contains(id)) {
            let keys = self.at(id).keys;
            if let Some((key, _)) = group_of(keys) {
                let group = self.groups.get_mut(&key).expect("a live slot's group exists");
                group.live -= 1;
                group.barrier &= group.live > 0;
            }
            let (lanes, count) = lanes_of(keys);
            lanes[..count].iter().for_each(|lane| self.trim(*lane, &ids));
        }
        self.groups.retain(|_, group| group.live > 0 || !group.waiting.is_empty());
        let take = |id: u32| {
            self.free.push(id);
            self.slots[id as usize].take().expect("a doomed slot is live")
        };
        doomed.into_values().map(take).collect()
    }

    /// Takes the doomed out of what waits behind barriers; returns those, which have not entered
    /// their lanes yet.
    fn take_waiting(&mut self, doomed: &HashSet<u32>) -> HashSet<u32> {
        let keys = doomed.iter().filter_map(|id| group_of(self.at(*id).keys));
        let keys: HashSet<u64> = keys.map(|(key, _)| key).collect();
        let mut taken = HashSet::new();
        for key in keys {
            let group = self.groups.get_mut(&key).expect("a live slot's group exists");
            let (gone, kept) = group.waiting.iter().partition(|id| doomed.contains(id));
            group.waiting = kept;
            let gone: VecDeque<u32> = gone;
            taken.extend(gone);
        }
        taken
    }

    /// The message and everything that may only follow it, by admission.
    fn behind(&self, first: u32) -> BTreeMap<u64, u32> {
        let mut doomed = BTreeMap::new();
        let mut next = vec![first];
        // All of a table's waiting messages are doomed with the first of its messages.
        let mut groups = HashSet::new();
        while let Some(id) = next.pop() {
            let slot = self.at(id);
            if doomed.insert(slot.order, id).is_none() {
                next.extend(slot.next.iter().flatten());
                // A barrier waits for all before it, and all after it wait for the barrier.
                if let Some((group, _)) = group_of(slot.keys)
                    && groups.insert(group)
                {
                    next.extend(&self.groups[&group].waiting);
                }
            }
        }
        doomed
    }

    /// Cuts the doomed end off a lane: whatever follows a doomed message is doomed too.
    fn trim(&mut self, lane: u64, doomed: &HashSet<u32>) {
        let Some(ends) = self.lanes.get(&lane).copied() else { return };
        let mut kept = None;
        let mut at = Some(ends.head);
        while let Some(id) = at.filter(|id| !doomed.contains(id)) {
            let slot = self.at(id);
            let (lanes, count) = lanes_of(slot.keys);
            let place = lanes[..count].iter().position(|l| *l == lane);
            let place = place.expect("a slot is in its lane");
            (kept, at) = (Some((id, place)), slot.next[place]);
        }
        let Some((tail, place)) = kept else {
            self.lanes.remove(&lane);
            return;
        };
        self.lanes.get_mut(&lane).expect("it was just read").tail = tail;
        self.slots[tail as usize].as_mut().expect("it was just read").next[place] = None;
    }

    /// Its channel was closed because of another message: it goes again before what has not gone.
    pub fn resend(&mut self, ticket: Ticket) {
        let id = self.landed(ticket);
        let order = self.at(id).order;
        let at = self.ready.iter().take_while(|other| self.at(**other).order < order).count();
        self.ready.insert(at, id);
    }

    /// The broker closed the channel because of one of its messages and did not say which: each is
    /// tried again alone, the largest first, until one fails alone.
    pub fn suspect(&mut self, ticket: Ticket) {
        let id = self.landed(ticket);
        let (size, order, route) =
            (self.at(id).message.size(), self.at(id).order, self.at(id).message.route);
        if let Some(hold) = self.holds.get_mut(&route) {
            // As a probe it has said nothing; another one may go.
            hold.probing.take_if(|probing| *probing == id);
        }
        self.suspects.insert((Reverse(size), order, id));
    }

    /// True when the message is out alone, as a suspect: what happens now is its own doing.
    pub fn is_accused(&self, ticket: Ticket) -> bool {
        self.accused == Some(index(ticket))
    }

    /// The culprit is found: the other suspects go on as before.
    pub fn acquit(&mut self) {
        let mut rest: Vec<(u64, u32)> = std::mem::take(&mut self.suspects)
            .into_iter()
            .map(|(_, order, id)| (order, id))
            .collect();
        rest.sort_unstable();
        for (_, id) in rest.into_iter().rev() {
            self.ready.push_front(id);
        }
    }

    /// The next suspect, once nothing else is out. Also one of a held route: put aside it could
    /// come back as a probe and close a channel again and again.
    pub(super) fn next_suspect(&mut self) -> Option<u32> {
        if self.in_flight > 0 {
            return None;
        }
        let (.., id) = self.suspects.pop_first()?;
        self.accused = Some(id);
        Some(id)
    }
}
