//! The consumer `watership::inbox`, between real servers.
//!
//! Each test has its own database with the inbox in it, its own vhost, and a user that has the role
//! `watership_consumer` and nothing more of the inbox.

mod broker;
mod database;
mod effects;
mod failures;
mod parts;
mod processes;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod tls;
