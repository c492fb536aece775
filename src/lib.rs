//! Watership: WAL, shipped to rabbits.

pub mod admin;
pub mod amqp;
pub mod backoff;
pub mod cli;
pub mod column;
pub mod config;
pub mod dev;
pub mod envelope;
pub mod error;
pub mod event;
pub mod message;
pub mod metrics;
pub mod outbox;
pub mod pg;
pub mod position;
pub mod relay;
pub mod route;
pub mod secret;
pub mod source;
pub mod tls;
