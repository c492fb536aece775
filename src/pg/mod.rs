//! Speaks Postgres; knows no event, no broker, no config.

pub mod auth;
pub mod client;
pub mod connect;
pub mod migrate;
pub mod pgoutput;
pub mod publication;
pub mod replication;
pub mod slot;
pub mod socket;
pub mod sqlstate;
pub mod wire;
