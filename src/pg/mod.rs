//! Speaks Postgres; knows no event, no broker, no config.

pub mod auth;
pub mod client;
pub mod connect;
pub mod pgoutput;
pub mod replication;
pub mod socket;
pub mod sqlstate;
pub mod wire;
pub mod migrate;
pub mod publication;
pub mod slot;
pub mod sqlstate;
