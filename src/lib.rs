//! Watership: WAL, shipped to rabbits.

pub mod amqp;
pub mod backoff;
pub mod dev;
pub mod column;
pub mod error;
pub mod message;
pub mod metrics;
pub mod outbox;
pub mod pg;
pub mod position;
pub mod secret;
pub mod tls;
