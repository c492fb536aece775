//! Speaks Postgres; knows no event, no broker, no config.

pub mod migrate;
pub mod publication;
pub mod slot;
pub mod sqlstate;
