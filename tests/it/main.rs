//! The integration tests: one binary, real servers, shared by all tests of the process.
//!
//! Each test takes its own database and its own vhost, so tests run in parallel. A test that
//! stops, kills or specially configures a server starts a private one through `watership::dev`.

mod admin;
mod amqp;
mod amqp_tls;
mod audit;
mod backfill;
mod backfill_commits;
mod binary;
mod cli;
mod contracts;
mod crash;
mod dev;
mod dry_run;
mod failover;
mod find;
mod formats;
mod harmless;
mod hosted;
mod identity;
mod inbox_commands;
mod inbox_parking;
mod inbox_sql;
mod init_again;
mod keys;
mod lock;
mod lost_tables;
mod maintain;
mod management;
mod mapping;
mod memory;
mod messages;
mod parked_commands;
mod parking;
mod partitions;
mod pg_stream;
mod pg_wire;
mod polling;
mod polling_verdicts;
mod position;
mod publishable;
mod publisher_contract;
mod random_values;
mod refused;
mod relay;
mod relay_faults;
mod relay_operation;
mod relay_routes;
mod relay_types;
mod relay_verdicts;
mod removal;
mod rights;
mod rotation;
mod slot;
mod sources;
mod sql;
#[path = "../support/mod.rs"]
mod support;
mod table_shapes;
mod topology;
mod two_relays;
mod type_matrix;
mod unstored;
mod user_types;
