//! Queues that are full, with a consumer or without, on a clock of their own.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::super::tests::{about, entry, message_to, now};
use super::super::{Lanes, Owner};
use super::{DESTINATIONS_MAX, QUIET};
use crate::publisher::Ticket;
use crate::route::LaneKeys;

const MILLISECOND: Duration = Duration::from_millis(1);
/// From a publish to its outcome.
const ANSWER: Duration = Duration::from_micros(500);

/// A queue with a maximum length and `x-overflow = "reject-publish"`.
struct Queue {
    room: usize,
    /// Between two messages that its consumer takes.
    consumes_every: Option<Duration>,
    consumed_at: Instant,
    length: usize,
    accepted: usize,
}

/// Messages of as many keys on their way to queues.
struct Broker {
    lanes: Lanes,
    now: Instant,
    begin: Instant,
    queues: Vec<Queue>,
    queue_of: HashMap<u128, usize>,
    /// By when the outcome comes.
    out: BTreeMap<(Instant, u64), (Ticket, usize)>,
    sent: HashMap<u128, usize>,
    admitted: u128,
}

impl Broker {
    fn new(queues: &[(usize, Option<Duration>)]) -> Self {
        let begin = now();
        let queue = |&(room, consumes_every): &(usize, Option<Duration>)| Queue {
            room,
            consumes_every,
            consumed_at: begin,
            length: 0,
            accepted: 0,
        };
        Self {
            lanes: Lanes::new(),
            now: begin,
            begin,
            queues: queues.iter().map(queue).collect(),
            queue_of: HashMap::new(),
            out: BTreeMap::new(),
            sent: HashMap::new(),
            admitted: 0,
        }
    }

    /// A message of a key of its own.
    fn admit(&mut self, routing_key: &str, queue: usize) {
        let id = self.admitted;
        self.admitted += 1;
        self.queue_of.insert(id, queue);
        let keys = LaneKeys::One { lane: id as u64, group: None };
        let message = message_to(routing_key, id, 0);
        self.lanes.admit(message, about(), keys, Owner::Window(entry()), self.now);
    }

    fn run(&mut self, until: Duration) {
        let end = self.begin + until;
        while self.now < end {
            while self.lanes.in_flight() < 2048
                && let Some((ticket, slot)) = self.lanes.next(self.now)
            {
                let id = slot.message.id.as_u128();
                *self.sent.entry(id).or_default() += 1;
                self.out.insert((self.now + ANSWER, ticket.0), (ticket, self.queue_of[&id]));
            }
            let outcome = self.out.first_key_value().map(|((at, _), _)| *at);
            let next = outcome.into_iter().chain(self.lanes.wake_at()).chain([end]).min();
            // The loop wakes on whole milliseconds.
            self.now = next.unwrap().max(self.now + MILLISECOND / 10);
            for queue in &mut self.queues {
                queue.consume(self.now);
            }
            while let Some(first) = self.out.first_entry().filter(|first| first.key().0 <= self.now)
            {
                let (ticket, queue) = first.remove();
                let queue = &mut self.queues[queue];
                if queue.length < queue.room {
                    queue.length += 1;
                    queue.accepted += 1;
                    self.lanes.confirmed(ticket, self.now);
                } else {
                    self.lanes.nacked(ticket, self.now);
                }
            }
            self.lanes.forget_well(self.now);
        }
    }

    /// Messages that were sent again.
    fn copies(&self) -> usize {
        self.sent.values().map(|times| times - 1).sum()
    }
}

impl Queue {
    fn consume(&mut self, now: Instant) {
        let Some(every) = self.consumes_every else { return };
        while self.consumed_at + every <= now {
            self.consumed_at += every;
            self.length = self.length.saturating_sub(1);
        }
    }
}

#[test]
fn a_queue_that_stays_full_costs_a_few_copies_whatever_waits_for_it() {
    let mut broker = Broker::new(&[(1, None)]);
    for n in 0..3000 {
        broker.admit(if n % 2 == 0 { "even" } else { "odd" }, 0);
    }
    broker.run(Duration::from_secs(60));
    assert_eq!(broker.queues[0].accepted, 1);
    assert!(broker.copies() <= 200, "{} copies", broker.copies());
    let nacks: u64 = broker.lanes.refused().map(|refused| refused.nacks).sum();
    assert!(nacks > 2048, "it is probed");
}

#[test]
fn a_thousand_routing_keys_into_one_full_queue_are_probed_as_one() {
    let mut broker = Broker::new(&[(1, None)]);
    for n in 0..3000 {
        broker.admit(&format!("key.{}", n % 1000), 0);
    }
    broker.run(Duration::from_secs(60));
    assert!(broker.copies() <= 200, "{} copies", broker.copies());
}

#[test]
fn a_full_queue_is_followed_at_the_pace_of_its_consumer() {
    for (room, every) in [(100, MILLISECOND), (1000, MILLISECOND / 5), (20, MILLISECOND * 20)] {
        let mut broker = Broker::new(&[(room, Some(every))]);
        for _ in 0..5000 {
            broker.admit("key", 0);
        }
        let time = Duration::from_secs(10);
        broker.run(time);
        let possible = 5000.min(room + (time.as_nanos() / every.as_nanos()) as usize);
        let accepted = broker.queues[0].accepted;
        assert!(accepted * 10 >= possible * 9, "{accepted} of {possible} at {every:?}");
    }
}

#[test]
fn a_queue_that_was_full_for_long_is_noticed_and_takes_everything_at_once() {
    let mut broker = Broker::new(&[(10, None)]);
    for _ in 0..2000 {
        broker.admit("key", 0);
    }
    broker.run(Duration::from_secs(30));
    assert_eq!(broker.queues[0].accepted, 10);
    broker.queues[0].room = 1_000_000;
    broker.run(Duration::from_secs(37));
    assert_eq!(broker.queues[0].accepted, 2000);
    assert_eq!(broker.lanes.refused().count(), 0, "it refuses no more");
}

#[test]
fn other_destinations_do_not_wait_for_one_that_refuses() {
    let mut broker = Broker::new(&[(1, None), (1_000_000, None)]);
    for _ in 0..500 {
        broker.admit("full", 0);
        broker.admit("well", 1);
    }
    broker.run(MILLISECOND);
    assert_eq!(broker.queues[1].accepted, 500);
    for _ in 0..500 {
        broker.admit("full", 0);
        broker.admit("well", 1);
    }
    broker.run(MILLISECOND * 2);
    assert_eq!(broker.queues[1].accepted, 1000);
}

#[test]
fn a_queue_that_opens_is_not_kept_waiting_by_many_that_stay_full() {
    let mut queues = vec![(0, None); 300];
    queues.push((0, None));
    let mut broker = Broker::new(&queues);
    for n in 0..300 {
        broker.admit(&format!("full.{n}"), n);
    }
    broker.run(Duration::from_secs(120));
    broker.admit("late", 300);
    broker.run(Duration::from_secs(121));
    assert_eq!(broker.queues[300].accepted, 0);
    broker.queues[300].room = 10;
    broker.run(Duration::from_secs(131));
    assert_eq!(broker.queues[300].accepted, 1);
}

#[test]
fn one_message_that_is_always_refused_does_not_keep_others_of_its_destination() {
    let mut broker = Broker::new(&[(0, None), (1_000_000, None)]);
    broker.admit("key", 0);
    broker.run(MILLISECOND * 100);
    // All further messages of the destination are taken.
    for _ in 0..2000 {
        broker.admit("key", 1);
    }
    broker.run(Duration::from_secs(20));
    assert_eq!(broker.queues[1].accepted, 2000);
}

#[test]
fn what_is_kept_of_destinations_is_bounded_and_forgotten() {
    let mut broker = Broker::new(&[(0, None)]);
    for n in 0..DESTINATIONS_MAX + 2000 {
        broker.admit(&format!("key.{n}"), 0);
    }
    broker.run(Duration::from_secs(3));
    let refused: Vec<_> = broker.lanes.refused().collect();
    assert!(refused.len() <= DESTINATIONS_MAX + super::SHARED as usize, "{}", refused.len());
    let waiting: usize = refused.iter().map(|refused| refused.waiting).sum();
    assert!(waiting + 100 > DESTINATIONS_MAX + 2000, "nothing is forgotten: {waiting}");
    broker.queues[0].room = usize::MAX;
    broker.run(Duration::from_secs(20) + QUIET);
    assert_eq!(broker.queues[0].accepted, DESTINATIONS_MAX + 2000);
    assert_eq!(broker.lanes.refused().count(), 0);
}
