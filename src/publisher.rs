//! The seam to the broker: a [`Publisher`] takes messages and says what became of each.
//!
//! Two implementations in production, `amqp::publisher` for RabbitMQ and `amqp::printer` for a dry
//! run, and the simulated broker of the tests. The relay's loop knows only this trait.

use std::future::Future;

use crate::error::Result;
use crate::message::Message;

/// The sender's own number for a publish; comes back with its outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What became of one publish. Every publish gets exactly one, unless the connection is lost:
/// then `next_outcomes` returns an error and every outstanding publish is in doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The broker has taken responsibility and the message reached at least one queue.
    Confirmed,
    /// The broker refused this message now (`basic.nack`); it may take it later.
    Nacked,
    /// No queue is bound for it (`basic.return`); the text is the broker's.
    Returned(String),
    /// The broker closed its channel while it was unconfirmed.
    ChannelClosed {
        /// AMQP reply code; `amqp::reply` says what follows from it.
        code: u16,
        /// The broker's text.
        text: String,
    },
}

/// Sends messages and says what became of each.
pub trait Publisher {
    /// Takes the message for sending. Never waits: bytes are copied into the output buffer, and
    /// `next_outcomes` moves them. The caller bounds how many are outstanding.
    fn send(&mut self, ticket: Ticket, message: &Message);

    /// Moves bytes and appends at least one outcome to `outcomes`.
    ///
    /// Cancel-safe: dropping the future loses neither bytes nor outcomes.
    ///
    /// # Errors
    /// When the connection is lost or a confirm deadline expired: the session is over.
    fn next_outcomes(
        &mut self,
        outcomes: &mut Vec<(Ticket, Outcome)>,
    ) -> impl Future<Output = Result<()>>;

    /// True while the broker has blocked this connection (`connection.blocked`).
    fn is_blocked(&self) -> bool;

    /// Maximum size of a body, in bytes.
    fn max_body(&self) -> usize;

    /// Closes the connection properly, so that a successor need not wait for its timeout.
    fn close(self) -> impl Future<Output = ()>;
}
