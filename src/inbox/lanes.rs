//! Which message may be handled next: pure.
//!
//! Invariant: of one lane (a key) one message is in work or waits for its next attempt, and nothing
//! of the lane passes it.

use std::collections::{HashMap, HashSet, VecDeque};

/// Messages by lane, each in the order of delivery.
#[derive(Debug)]
pub(super) struct KeyLanes<T> {
    queues: HashMap<String, VecDeque<T>>,
    /// KeyLanes whose first message may begin.
    ready: VecDeque<String>,
    /// KeyLanes with a message in work. They outlive [`KeyLanes::clear`]: the work continues.
    working: HashSet<String>,
    /// KeyLanes that wait for their next attempt.
    delayed: HashSet<String>,
    waiting: usize,
}

impl<T> Default for KeyLanes<T> {
    fn default() -> Self {
        Self {
            queues: HashMap::new(),
            ready: VecDeque::new(),
            working: HashSet::new(),
            delayed: HashSet::new(),
            waiting: 0,
        }
    }
}

impl<T> KeyLanes<T> {
    /// A message was delivered.
    pub fn push(&mut self, lane: String, message: T) {
        let queue = self.queues.entry(lane.clone()).or_default();
        queue.push_back(message);
        self.waiting += 1;
        if queue.len() == 1 && !self.working.contains(&lane) && !self.delayed.contains(&lane) {
            self.ready.push_back(lane);
        }
    }

    /// The next message to handle; its lane is in work until `done` or `delay`.
    pub fn take(&mut self) -> Option<(String, T)> {
        let lane = self.ready.pop_front()?;
        let message = self.queues.get_mut(&lane)?.pop_front()?;
        self.waiting -= 1;
        self.working.insert(lane.clone());
        Some((lane, message))
    }

    /// Work on the lane's message has ended: it was settled, or its subscription was lost.
    pub fn done(&mut self, lane: &str) {
        self.working.remove(lane);
        self.free(lane);
    }

    /// The message in work is tried again later, before all others of its lane.
    pub fn delay(&mut self, lane: String, message: T) {
        self.working.remove(&lane);
        self.queues.entry(lane.clone()).or_default().push_front(message);
        self.waiting += 1;
        self.delayed.insert(lane);
    }

    /// The time for the next attempt of a lane has come.
    pub fn wake(&mut self, lane: &str) {
        if self.delayed.remove(lane) {
            self.free(lane);
        }
    }

    /// Forgets all messages that are not in work.
    pub fn clear(&mut self) {
        self.queues.clear();
        self.ready.clear();
        self.delayed.clear();
        self.waiting = 0;
    }

    /// Messages that are here: waiting or in work.
    pub fn in_hand(&self) -> usize {
        self.waiting + self.working.len()
    }

    fn free(&mut self, lane: &str) {
        match self.queues.get(lane).map(VecDeque::is_empty) {
            Some(false) => self.ready.push_back(lane.to_owned()),
            Some(true) => {
                self.queues.remove(lane);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(messages: &[(&str, u32)]) -> KeyLanes<u32> {
        let mut lanes = KeyLanes::default();
        for (lane, number) in messages {
            lanes.push((*lane).to_owned(), *number);
        }
        lanes
    }

    #[test]
    fn one_message_of_a_lane_is_in_work_and_other_lanes_go_on() {
        let mut lanes = lanes(&[("a", 1), ("a", 2), ("b", 3)]);
        assert_eq!(lanes.take(), Some(("a".into(), 1)));
        assert_eq!(lanes.take(), Some(("b".into(), 3)));
        assert_eq!(lanes.take(), None);
        lanes.done("a");
        assert_eq!(lanes.take(), Some(("a".into(), 2)));
        lanes.done("a");
        lanes.done("b");
        assert_eq!((lanes.take(), lanes.in_hand()), (None, 0));
    }

    #[test]
    fn a_message_that_waits_for_its_next_attempt_stays_first() {
        let mut lanes = lanes(&[("a", 1), ("a", 2)]);
        let (lane, first) = lanes.take().unwrap();
        lanes.delay(lane, first);
        lanes.push("a".into(), 3);
        assert_eq!((lanes.take(), lanes.in_hand()), (None, 3));
        lanes.wake("a");
        assert_eq!(lanes.take(), Some(("a".into(), 1)));
        lanes.done("a");
        assert_eq!(lanes.take(), Some(("a".into(), 2)));
    }

    #[test]
    fn after_a_clear_a_lane_still_waits_for_what_is_in_work() {
        let mut lanes = lanes(&[("a", 1), ("a", 2), ("b", 3)]);
        lanes.take();
        let (lane, message) = lanes.take().unwrap();
        lanes.delay(lane, message);
        lanes.clear();
        lanes.wake("b");
        lanes.push("a".into(), 1);
        lanes.push("b".into(), 3);
        assert_eq!(lanes.take(), Some(("b".into(), 3)));
        assert_eq!(lanes.take(), None);
        lanes.done("a");
        assert_eq!(lanes.take(), Some(("a".into(), 1)));
    }
}
