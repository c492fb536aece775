//! Speaks Postgres; knows no event, no broker, no config.

#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod auth;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod client;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod connect;
#[cfg(feature = "relay")]
pub mod hosting;
#[cfg(feature = "relay")]
pub mod migrate;
#[cfg(feature = "relay")]
pub mod outbox;
#[cfg(feature = "relay")]
pub mod pgoutput;
#[cfg(feature = "relay")]
pub mod publication;
#[cfg(feature = "relay")]
pub mod replication;
#[cfg(any(feature = "inbox", feature = "relay"))]
mod scram;
#[cfg(feature = "relay")]
pub mod slot;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod socket;
#[cfg(any(feature = "inbox", feature = "outbox", feature = "relay"))]
pub mod sqlstate;
#[cfg(feature = "relay")]
pub mod statement;
pub mod unnamed;
#[cfg(feature = "relay")]
pub mod visibility;
#[cfg(any(feature = "inbox", feature = "relay"))]
pub mod wire;
