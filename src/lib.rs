//! Watership: WAL, shipped to rabbits. A relay from Postgres to RabbitMQ: a transactional outbox
//! and change data capture, at least once and in order.
//!
//! ```text
//!  app tx ─ watership.emit() ─► outbox ─┐
//!                                       ├─ WAL ─► pg ─► source ─┐
//!  any table ───────────────────────────┘                      │
//!        ┌──────────────────────────────────────────────────────┘
//!        └► event ─► route ─► envelope ─► relay::window::lanes ─► amqp::publisher ─► exchange
//!                                                              │ outcome
//!  source.advance ◄── relay::checkpoint ◄── relay::window ◄─┘
//! ```
//!
//! From left to right an event becomes less Postgres and more AMQP; from right to left only a
//! receipt comes back. To follow one event, read in this order:
//!
//! 1. [`pg::replication`] takes WAL data off the wire, [`pg::pgoutput`] decodes it in place;
//! 2. [`source::transaction`] gives each change its position and makes it an [`event::Event`];
//! 3. [`route`] says where it goes, [`envelope`] makes it a [`message::Message`];
//! 4. [`relay::window::lanes`] says when it may go, [`amqp::publisher`] sends it and says what
//!    became of it;
//! 5. [`relay::window`] finds the settled prefix, [`relay::checkpoint`] stores it, and the
//!    source is told.
//!
//! [`relay::Relay::run`] is the loop that does all this; [`relay::session::supervisor`] opens
//! everything and starts over after any error. Applications need [`outbox`] where events begin and
//! [`inbox`] where they arrive; everything else serves the `watership` program.
//!
//! Cargo features: `outbox` (emit events, with tokio-postgres), `inbox` (consume them, with lapin
//! and tokio-postgres), `sqlx` (both in a transaction of sqlx, without the other two) and `relay`
//! (the program). All but `sqlx` are on by default; an application names what it needs, with
//! `default-features = false`.

#[cfg(feature = "relay")]
pub mod admin;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod amqp;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod backoff;
#[cfg(feature = "relay")]
pub mod cli;
#[cfg(feature = "relay")]
pub mod column;
#[cfg(feature = "relay")]
pub mod config;
#[cfg(feature = "relay")]
pub mod contract;
#[cfg(feature = "relay")]
pub mod dev;
#[cfg(feature = "relay")]
pub mod envelope;
pub mod error;
#[cfg(feature = "relay")]
pub mod event;
pub mod fault;
#[cfg(any(feature = "inbox", feature = "sqlx"))]
pub mod inbox;
#[cfg(feature = "relay")]
pub mod message;
#[cfg(feature = "relay")]
pub mod metrics;
#[cfg(any(feature = "outbox", feature = "sqlx"))]
pub mod outbox;
#[cfg(any(feature = "inbox", feature = "outbox", feature = "relay"))]
pub mod pg;
#[cfg(feature = "relay")]
pub mod position;
#[cfg(feature = "relay")]
pub mod publisher;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "relay")]
pub mod route;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod secret;
#[cfg(feature = "relay")]
pub mod source;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod tls;
pub mod verdict;
