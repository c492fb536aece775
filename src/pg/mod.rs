//! Speaks Postgres; knows no event, no broker, no config.

#[cfg(feature = "relay")]
pub mod auth;
#[cfg(feature = "relay")]
pub mod client;
#[cfg(feature = "relay")]
pub mod connect;
#[cfg(feature = "relay")]
pub mod hosting;
#[cfg(feature = "relay")]
pub mod migrate;
#[cfg(feature = "relay")]
pub mod pgoutput;
#[cfg(feature = "relay")]
pub mod publication;
#[cfg(feature = "relay")]
pub mod replication;
#[cfg(feature = "relay")]
mod scram;
#[cfg(feature = "relay")]
pub mod slot;
#[cfg(feature = "relay")]
pub mod socket;
pub mod sqlstate;
#[cfg(feature = "relay")]
pub mod wire;
