//! Speaks Postgres; knows no event, no broker, no config.

pub mod pgoutput;
pub mod auth;
pub mod client;
pub mod connect;
pub mod replication;
pub mod socket;
pub mod sqlstate;
pub mod wire;
