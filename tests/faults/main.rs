//! One named test for each class of faults, on the real binary between real servers.
//!
//! The classes are those of `classes.rs`: which test proves which class, and which classes are
//! not run, with the reason. Each run is judged like every other: nothing lost, nothing that never
//! committed, first arrivals of each key in order, no more duplicates than the window and 100 ms of
//! events per fault. Those that take long run when WATERSHIP_FULL is set.

mod broker;
mod broker_limits;
mod class;
mod classes;
mod cluster;
#[path = "../it/crash_relay.rs"]
#[allow(dead_code, reason = "shared with the other test binaries")]
mod crash_relay;
#[path = "../it/crash_support.rs"]
#[allow(dead_code, reason = "shared with the other test binaries")]
mod crash_support;
mod framing;
mod ground;
mod museum;
mod network;
mod network_slow;
mod pg;
mod process;
mod process_limits;
mod proxy;
mod proxy_itself;
#[path = "../it/relay_support.rs"]
#[allow(dead_code, reason = "shared with the other test binaries")]
mod relay_support;
#[path = "../soak/schedule.rs"]
#[allow(dead_code, reason = "its own tests run here: the soak has no harness")]
mod schedule;
mod schedule_itself;
mod slot;
mod slot_rights;
mod standby;
#[path = "../it/support.rs"]
#[allow(dead_code, reason = "shared with the other test binaries")]
mod support;
mod surroundings;
