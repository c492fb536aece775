//! One named test for each class of faults, on the real binary between real servers.
//!
//! The classes are those of `classes.rs`: which test proves which class, and which classes are
//! not run, with the reason. Each run is judged like every other: nothing lost, nothing that never
//! committed, first arrivals of each key in order. How long a recovery took and how much came twice
//! is reported, and asserted nowhere. Those that take long run when WATERSHIP_FULL is set.

mod broker;
mod broker_limits;
mod classes;
mod cluster;
mod host_limits;
mod museum;
mod network;
mod network_slow;
mod pg;
mod process;
mod process_limits;
mod proxy_tests;
mod report;
mod schedule_tests;
mod slot;
mod slot_rights;
mod standby;
#[path = "../support/mod.rs"]
mod support;
