//! The unconfirmed publishes of one channel. Pure: no socket, no clock of its own.
//!
//! The broker numbers the publishes of a channel 1, 2, 3, … from `confirm.select` on and confirms
//! them by that number, singly or as a range, in any order, each exactly once
//! (<https://www.rabbitmq.com/docs/confirms#publisher-confirms>). A returned message comes back
//! *before* its confirm, without its number; it is found by message id, exchange and routing key.
//!
//! Invariant: every publish leaves this file with exactly one outcome, and what was returned or
//! nacked never leaves as confirmed. A confirm or a return that fits nothing is an error: then the
//! count of the two sides differs, and no later confirm could be trusted.

use std::collections::VecDeque;

use tokio::time::Instant;
use uuid::Uuid;
use xxhash_rust::xxh64::xxh64;

use crate::error::{Error, Result};
use crate::publisher::{Outcome, Ticket};

/// The life of a channel. Publishes made before `Open` wait in `waiting`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The broker closed it; the next publish opens it again.
    Closed,
    /// `channel.open` is sent.
    Opening,
    /// `confirm.select` is sent.
    Selecting,
    /// Publishes go out.
    Open,
}

/// A publish, as its confirm or its return finds it again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub ticket: Ticket,
    /// The message id.
    pub id: Uuid,
    /// [`target`] of its exchange and routing key.
    pub target: u64,
    /// The hash of its route.
    pub route: u64,
    /// When.
    pub at: Instant,
}

/// One publish that has no outcome yet, or follows one that has none.
struct Pending {
    sent: Sent,
    fate: Fate,
}

enum Fate {
    Waiting,
    /// `basic.return` was seen; its confirm follows.
    Returned(String),
    Settled,
}

/// How the broker confirms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Ack,
    Nack,
}

/// A `basic.return` whose content is still arriving.
enum Content {
    None,
    Header { text: String, target: u64 },
    Body { text: String, target: u64, id: Option<Uuid>, route: u64, remaining: u64 },
}

pub(super) type Outcomes = Vec<(Ticket, Outcome)>;

pub(super) struct Channel {
    /// Channel number.
    pub number: u16,
    /// Where it is in its life.
    pub state: State,
    /// Frames of publishes made while the channel is being opened.
    pub waiting: Vec<u8>,
    /// Delivery tag of the front of `pending`.
    base: u64,
    pending: VecDeque<Pending>,
    content: Content,
}

impl Channel {
    pub fn new(number: u16) -> Self {
        Self {
            number,
            state: State::Closed,
            waiting: Vec::new(),
            base: 1,
            pending: VecDeque::new(),
            content: Content::None,
        }
    }

    /// Notes a publish; its delivery tag follows from its place.
    pub fn publish(&mut self, sent: Sent) {
        self.pending.push_back(Pending { sent, fate: Fate::Waiting });
    }

    /// When the oldest unconfirmed publish was made.
    pub fn oldest(&self) -> Option<Instant> {
        self.pending.front().map(|p| p.sent.at)
    }

    /// How many publishes have no outcome.
    pub fn unconfirmed(&self) -> usize {
        self.pending.iter().filter(|p| !matches!(p.fate, Fate::Settled)).count()
    }

    /// `basic.ack` or `basic.nack`.
    pub fn confirm(
        &mut self,
        tag: u64,
        multiple: bool,
        answer: Answer,
        outcomes: &mut Outcomes,
    ) -> Result<()> {
        self.expect_no_content("a confirm")?;
        if self.state != State::Open {
            return Err(
                self.bad(format!("confirm for delivery tag {tag} while the channel is not open"))
            );
        }
        let next = self.base + self.pending.len() as u64;
        // AMQP 0-9-1, basic.ack: tag zero with `multiple` means all so far.
        let tag = if tag == 0 && multiple { next.saturating_sub(1) } else { tag };
        if tag < self.base {
            return Err(self.bad(format!("second confirm for delivery tag {tag}")));
        }
        if tag >= next {
            let last = next - 1;
            return Err(self
                .bad(format!("confirm for delivery tag {tag}, but the last one sent is {last}")));
        }
        let at = (tag - self.base) as usize;
        if matches!(self.pending[at].fate, Fate::Settled) {
            return Err(self.bad(format!("second confirm for delivery tag {tag}")));
        }
        let from = if multiple { 0 } else { at };
        for pending in self.pending.range_mut(from..=at) {
            settle(pending, answer, outcomes);
        }
        while self.pending.front().is_some_and(|p| matches!(p.fate, Fate::Settled)) {
            self.pending.pop_front();
            self.base += 1;
        }
        Ok(())
    }

    /// `basic.return`: its content header and body follow.
    pub fn begin_return(&mut self, text: String, target: u64) -> Result<()> {
        self.expect_no_content("basic.return")?;
        self.content = Content::Header { text, target };
        Ok(())
    }

    /// The content header of a returned message.
    pub fn content_header(&mut self, body_size: u64, id: Option<Uuid>, route: u64) -> Result<()> {
        match std::mem::replace(&mut self.content, Content::None) {
            Content::Header { text, target } if body_size == 0 => {
                self.end_return(text, target, id, route)
            }
            Content::Header { text, target } => {
                self.content = Content::Body { text, target, id, route, remaining: body_size };
                Ok(())
            }
            Content::None | Content::Body { .. } => {
                Err(self.bad("content header without a basic.return".into()))
            }
        }
    }

    /// A piece of a returned message's body.
    pub fn content_body(&mut self, len: u64) -> Result<()> {
        match std::mem::replace(&mut self.content, Content::None) {
            Content::Body { text, target, id, route, remaining } if len == remaining => {
                self.end_return(text, target, id, route)
            }
            Content::Body { text, target, id, route, remaining } if len < remaining => {
                let remaining = remaining - len;
                self.content = Content::Body { text, target, id, route, remaining };
                Ok(())
            }
            Content::None | Content::Header { .. } | Content::Body { .. } => {
                Err(self.bad(format!("unexpected content body of {len} bytes")))
            }
        }
    }

    fn end_return(
        &mut self,
        text: String,
        target: u64,
        id: Option<Uuid>,
        route: u64,
    ) -> Result<()> {
        let waits = |p: &Pending| {
            matches!(p.fate, Fate::Waiting) && p.sent.target == target && Some(p.sent.id) == id
        };
        // One event can go to one destination by several routes, and an exchange that looks at
        // headers returns only one of them. Where the broker changed the headers, any one will do.
        let exact = self.pending.iter().position(|p| waits(p) && p.sent.route == route);
        let found = exact.or_else(|| self.pending.iter().position(waits));
        match found {
            Some(at) => {
                self.pending[at].fate = Fate::Returned(text);
                Ok(())
            }
            None => Err(self.bad(format!(
                "returned message {} matches none of the {} unconfirmed ones",
                id.map_or("without an id".into(), |id| id.to_string()),
                self.unconfirmed()
            ))),
        }
    }

    /// `channel.close` by the broker: everything unconfirmed is in doubt and has this outcome.
    pub fn close(&mut self, code: u16, text: &str, outcomes: &mut Outcomes) {
        for pending in self.pending.drain(..) {
            match pending.fate {
                // A return before the close does not make the publish any more settled.
                Fate::Waiting | Fate::Returned(_) => {
                    let outcome = Outcome::ChannelClosed { code, text: text.to_owned() };
                    outcomes.push((pending.sent.ticket, outcome));
                }
                Fate::Settled => {}
            }
        }
        self.base = 1;
        self.waiting.clear();
        self.content = Content::None;
        self.state = State::Closed;
    }

    fn expect_no_content(&self, what: &str) -> Result<()> {
        match &self.content {
            Content::None => Ok(()),
            Content::Header { .. } | Content::Body { .. } => {
                Err(self.bad(format!("{what} inside the content of a returned message")))
            }
        }
    }

    fn bad(&self, what: String) -> Error {
        Error::protocol(format!("broker, channel {}: {what}", self.number))
    }
}

fn settle(pending: &mut Pending, answer: Answer, outcomes: &mut Outcomes) {
    let outcome = match (std::mem::replace(&mut pending.fate, Fate::Settled), answer) {
        (Fate::Settled, Answer::Ack | Answer::Nack) => return,
        (Fate::Waiting, Answer::Ack) => Outcome::Confirmed,
        (Fate::Waiting, Answer::Nack) => Outcome::Nacked,
        (Fate::Returned(text), Answer::Ack | Answer::Nack) => Outcome::Returned(text),
    };
    outcomes.push((pending.sent.ticket, outcome));
}

/// What a return is matched by in addition to the message id: the hash of exchange and routing key.
pub(super) fn target(exchange: u64, routing_key: &[u8]) -> u64 {
    xxh64(routing_key, exchange)
}

/// The exchange's part of [`target`].
pub(super) fn target_exchange(name: &str) -> u64 {
    xxh64(name.as_bytes(), 0)
}

#[cfg(test)]
mod tests {
    use super::super::reply;
    use super::*;
    use proptest::prelude::*;

    fn sent(ticket: u64, id: u128, route: u64) -> Sent {
        let (ticket, id) = (Ticket(ticket), Uuid::from_u128(id));
        Sent { ticket, id, target: 7, route, at: Instant::now() }
    }

    fn open(publishes: u64) -> Channel {
        let mut channel = Channel::new(2);
        channel.state = State::Open;
        for n in 1..=publishes {
            channel.publish(sent(n, n.into(), 0));
        }
        channel
    }

    fn give_back(channel: &mut Channel, n: u64) -> Result<()> {
        channel.begin_return("NO_ROUTE".into(), 7)?;
        channel.content_header(3, Some(Uuid::from_u128(n.into())), 0)?;
        channel.content_body(1)?;
        channel.content_body(2)
    }

    #[test]
    fn returns_before_one_multiple_ack_mark_exactly_their_own_publishes() {
        let mut channel = open(8);
        for n in [4, 2, 6] {
            give_back(&mut channel, n).unwrap();
        }
        let mut outcomes = Vec::new();
        channel.confirm(6, true, Answer::Ack, &mut outcomes).unwrap();
        let expected: Outcomes = (1..=6)
            .map(|n| match n % 2 {
                0 => (Ticket(n), Outcome::Returned("NO_ROUTE".into())),
                _ => (Ticket(n), Outcome::Confirmed),
            })
            .collect();
        assert_eq!(outcomes, expected);
        assert_eq!(channel.unconfirmed(), 2);
    }

    #[test]
    fn a_return_marks_the_message_of_its_own_route() {
        let mut channel = open(0);
        for route in [1, 2, 3] {
            channel.publish(sent(route, 0, route));
        }
        let mut give_back = |route| {
            channel.begin_return("NO_ROUTE".into(), 7).unwrap();
            channel.content_header(0, Some(Uuid::nil()), route).unwrap();
        };
        give_back(2);
        // Headers that the broker changed: one of the others.
        give_back(99);
        let mut outcomes = Vec::new();
        channel.confirm(3, true, Answer::Ack, &mut outcomes).unwrap();
        let returned = |n: usize| outcomes[n].1 == Outcome::Returned("NO_ROUTE".into());
        assert_eq!([0, 1, 2].map(returned), [true, true, false]);
    }

    #[test]
    fn confirms_that_fit_nothing_are_errors() {
        for (tag, multiple) in [(0, false), (5, false), (2, false), (2, true), (u64::MAX, true)] {
            let mut channel = open(4);
            let mut outcomes = Vec::new();
            channel.confirm(2, false, Answer::Ack, &mut outcomes).unwrap();
            let error = channel.confirm(tag, multiple, Answer::Ack, &mut outcomes).unwrap_err();
            assert_eq!(error.kind(), crate::error::Kind::Protocol, "{tag} {multiple}");
            assert_eq!(outcomes.len(), 1);
        }
        let mut closed = Channel::new(2);
        assert!(closed.confirm(1, true, Answer::Ack, &mut Vec::new()).is_err());
        assert!(closed.confirm(0, true, Answer::Ack, &mut Vec::new()).is_err());
    }

    #[test]
    fn returns_that_fit_nothing_are_errors() {
        assert!(give_back(&mut open(3), 4).is_err());
        let mut twice = open(3);
        give_back(&mut twice, 1).unwrap();
        assert!(give_back(&mut twice, 1).is_err());
        let mut other_key = open(3);
        other_key.begin_return("NO_ROUTE".into(), 8).unwrap();
        assert!(other_key.content_header(0, Some(Uuid::from_u128(1)), 0).is_err());
        let mut interrupted = open(3);
        interrupted.begin_return("NO_ROUTE".into(), 7).unwrap();
        assert!(interrupted.confirm(1, false, Answer::Ack, &mut Vec::new()).is_err());
        assert!(open(1).content_body(1).is_err());
        assert!(open(1).content_header(1, None, 0).is_err());
    }

    #[test]
    fn closed_channel_gives_every_publish_an_outcome_and_counts_from_one_again() {
        let mut channel = open(4);
        give_back(&mut channel, 3).unwrap();
        let mut outcomes = Vec::new();
        channel.confirm(2, false, Answer::Nack, &mut outcomes).unwrap();
        channel.close(reply::NOT_FOUND, "NOT_FOUND", &mut outcomes);
        assert_eq!(outcomes[0], (Ticket(2), Outcome::Nacked));
        let closed: Vec<u64> = outcomes[1..].iter().map(|(ticket, _)| ticket.0).collect();
        assert_eq!(closed, [1, 3, 4]);
        channel.state = State::Open;
        channel.publish(sent(9, 0, 0));
        channel.confirm(1, false, Answer::Ack, &mut outcomes).unwrap();
        assert_eq!(outcomes.last().unwrap(), &(Ticket(9), Outcome::Confirmed));
    }

    proptest! {
        /// Against a plain list: any mix of confirms gives each publish exactly one outcome, and
        /// the returned and nacked ones are never confirmed.
        #[test]
        fn every_publish_has_exactly_one_outcome(
            steps in proptest::collection::vec((1u64..60, any::<bool>(), any::<bool>()), 0..80),
            returned in proptest::collection::btree_set(1u64..60, 0..20),
        ) {
            let mut channel = open(60);
            for n in &returned {
                give_back(&mut channel, *n).unwrap();
            }
            let mut expected: Vec<Option<Outcome>> = vec![None; 61];
            let mut outcomes = Vec::new();
            for (tag, multiple, ack) in steps {
                let answer = if ack { Answer::Ack } else { Answer::Nack };
                let result = channel.confirm(tag, multiple, answer, &mut outcomes);
                prop_assert_eq!(result.is_err(), expected[tag as usize].is_some());
                if result.is_err() {
                    continue;
                }
                let from = if multiple { 1 } else { tag };
                for n in from..=tag {
                    expected[n as usize].get_or_insert(match (returned.contains(&n), ack) {
                        (true, _) => Outcome::Returned("NO_ROUTE".into()),
                        (false, true) => Outcome::Confirmed,
                        (false, false) => Outcome::Nacked,
                    });
                }
            }
            channel.close(reply::CONNECTION_FORCED, "bye", &mut outcomes);
            prop_assert_eq!(outcomes.len(), 60);
            for (ticket, outcome) in outcomes {
                let code = reply::CONNECTION_FORCED;
                let closed = Outcome::ChannelClosed { code, text: "bye".into() };
                prop_assert_eq!(outcome, expected[ticket.0 as usize].take().unwrap_or(closed));
            }
        }
    }
}
