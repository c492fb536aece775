//! Speaks AMQP 0-9-1 to RabbitMQ; knows no event, no Postgres, no config.
//!
//! | file | what |
//! |---|---|
//! | `options` | broker URLs and everything a connection is opened with |
//! | `wire` | frames to bytes and back, pure |
//! | `link` | one socket, plain or TLS, with an output and an input buffer |
//! | `handshake` | protocol header to `connection.open-ok`, and the lock queue |
//! | `reply` | what a reply code of the broker means, pure |
//! | `channel` | the unconfirmed publishes of one channel, pure |
//! | `publisher` | the connection: the `Publisher` of messages to RabbitMQ |
//! | `printer` | a `Publisher` that prints what would be published |
//! | `client` | connections by lapin, for `topology` and for consumers |
//! | `topology` | declares or verifies exchanges and queues (lapin) |
//! | `management` | what only the management API shows: bindings, policies |
//! | `audit` | what a confirm is worth, by what `management` has read, pure |

#[cfg(feature = "relay")]
pub mod audit;
#[cfg(feature = "relay")]
mod channel;
pub mod client;
#[cfg(feature = "relay")]
mod handshake;
#[cfg(feature = "relay")]
mod link;
#[cfg(feature = "relay")]
pub mod management;
pub mod options;
#[cfg(feature = "relay")]
pub mod printer;
#[cfg(feature = "relay")]
pub mod publisher;
pub mod reply;
#[cfg(feature = "relay")]
pub mod topology;
#[cfg(feature = "relay")]
pub mod wire;
