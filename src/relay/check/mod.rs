//! What must hold before a session starts, and while it runs. Pure: others read, these compare.

pub mod columns;
pub mod lost;
pub mod outbox;
pub mod partitions;
pub mod polled_table;
pub mod polling;
pub mod position;
pub mod publishable;
pub mod resync;
pub mod server;
pub mod slot_risk;
pub mod tables;
#[cfg(test)]
mod tests;
