//! Where AMQP frames and Postgres messages begin and end, and which is which.
//!
//! <https://www.rabbitmq.com/resources/specs/amqp0-9-1.pdf> 4.2.3 and
//! <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Bytes; whatever is read at once counts as a message.
    Raw,
    Amqp,
    Postgres,
}

/// Cuts the bytes of one direction of one connection into messages.
pub struct Framing {
    kind: Kind,
    pending: Vec<u8>,
    /// The client has asked for TLS: the answer is one byte, what follows is not for us.
    asked_for_tls: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    /// The eight bytes with which a client greets.
    AmqpHeader,
    AmqpFrame,
    /// The first message of a client has no type.
    PostgresStart,
    PostgresAnswer,
    PostgresMessage,
}

impl Framing {
    /// For what the client sends, and for what the server sends.
    pub fn pair(protocol: Protocol) -> (Self, Self) {
        let (client, server) = match protocol {
            Protocol::Raw => (Kind::Raw, Kind::Raw),
            Protocol::Amqp => (Kind::AmqpHeader, Kind::AmqpFrame),
            Protocol::Postgres => (Kind::PostgresStart, Kind::PostgresAnswer),
        };
        let asked_for_tls = Arc::new(AtomicBool::new(false));
        let framing =
            |kind| Self { kind, pending: Vec::new(), asked_for_tls: asked_for_tls.clone() };
        (framing(client), framing(server))
    }

    /// Takes what was read; returns the messages that are whole now, in order.
    pub fn split(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.pending.extend_from_slice(bytes);
        let mut messages = Vec::new();
        while let Some(length) = self.whole() {
            let rest = self.pending.split_off(length);
            messages.push(std::mem::replace(&mut self.pending, rest));
        }
        messages
    }

    /// The length of the first message, when all of it is there.
    fn whole(&mut self) -> Option<usize> {
        if self.pending.is_empty() {
            return None;
        }
        let number = |at: usize| {
            let bytes = self.pending.get(at..at + 4)?;
            usize::try_from(u32::from_be_bytes(bytes.try_into().ok()?)).ok()
        };
        let length = match self.kind {
            Kind::Raw => self.pending.len(),
            Kind::AmqpHeader => 8,
            Kind::AmqpFrame => number(3)? + 8,
            Kind::PostgresStart => number(0)?,
            Kind::PostgresAnswer if self.asked_for_tls.load(Ordering::Relaxed) => 1,
            Kind::PostgresAnswer | Kind::PostgresMessage => number(1)? + 1,
        };
        if self.pending.len() < length {
            return None;
        }
        self.advance(length);
        Some(length)
    }

    fn advance(&mut self, length: usize) {
        self.kind = match self.kind {
            Kind::AmqpHeader => Kind::AmqpFrame,
            Kind::PostgresStart if self.pending[..length].get(4..8) == Some(&TLS_REQUEST) => {
                self.asked_for_tls.store(true, Ordering::Relaxed);
                Kind::PostgresStart
            }
            Kind::PostgresAnswer if self.asked_for_tls.load(Ordering::Relaxed) => {
                match self.pending[0] {
                    b'S' => Kind::Raw,
                    _ => Kind::PostgresMessage,
                }
            }
            Kind::PostgresStart | Kind::PostgresAnswer => Kind::PostgresMessage,
            same => same,
        };
    }
}

/// The code of an SSLRequest.
const TLS_REQUEST: [u8; 4] = 80_877_103_u32.to_be_bytes();

/// Whether this is an AMQP method frame of that class and method.
fn is_method(frame: &[u8], class: u16, method: u16) -> bool {
    let [a, b] = class.to_be_bytes();
    let [c, d] = method.to_be_bytes();
    frame.first() == Some(&1) && frame.get(7..11) == Some(&[a, b, c, d])
}

/// A `basic.publish`.
pub fn is_publish(frame: &[u8]) -> bool {
    is_method(frame, 60, 40)
}

/// A confirm.
pub fn is_ack(frame: &[u8]) -> bool {
    is_method(frame, 60, 80)
}

/// A `basic.return`.
pub fn is_return(frame: &[u8]) -> bool {
    is_method(frame, 60, 50)
}

/// A `channel.open`.
pub fn is_channel_open(frame: &[u8]) -> bool {
    is_method(frame, 20, 10)
}

/// A content body.
pub fn is_body(frame: &[u8]) -> bool {
    frame.first() == Some(&3)
}

/// A piece of WAL.
pub fn is_wal(message: &[u8]) -> bool {
    message.first() == Some(&b'd') && message.get(5) == Some(&b'w')
}

/// The tag of the pgoutput message in a piece of WAL, behind type, length, kind and three numbers.
pub fn wal_tag(message: &[u8]) -> Option<u8> {
    is_wal(message).then(|| message.get(30).copied()).flatten()
}

/// What a client says about how far it has got.
pub fn is_feedback(message: &[u8]) -> bool {
    message.first() == Some(&b'd') && message.get(5) == Some(&b'r')
}

/// An execution of a prepared statement. Once it streams, the relay executes one statement over
/// and over: that which stores the checkpoint.
pub fn is_bind(message: &[u8]) -> bool {
    message.first() == Some(&b'B')
}

/// The server's word that a statement is done.
pub fn is_complete(message: &[u8]) -> bool {
    message.first() == Some(&b'C')
}

/// Any message.
pub fn is_any(_: &[u8]) -> bool {
    true
}
