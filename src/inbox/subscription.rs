//! The broker's side: a connection, a channel, a subscription; and why it ended.
//!
//! Invariant: the prefetch is set once per channel, and a subscription is never cancelled: to give
//! it up, its channel is closed, so that all unacknowledged messages go back at once and in order.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, Consumer};

use super::counters::Loss;
use super::options::Options;
use super::version;
use crate::amqp::client::{self, Use, short, step, translate};
use crate::amqp::options::Options as Broker;
use crate::amqp::reply;
use crate::error::{Error, Result};

/// Largest frame, in bytes; RabbitMQ's own default.
const FRAME_MAX: u32 = 131_072;
/// Limit of each step other than the connect, and of a close.
const LIMIT: Duration = Duration::from_secs(5);

/// Opens a connection to the first broker that answers.
pub(super) async fn connect(broker: &Broker) -> Result<Connection> {
    let mut last = Error::config("no broker URL is given");
    for url in &broker.urls {
        let heartbeat = url.heartbeat.unwrap_or(broker.heartbeat).as_secs();
        let kind = Use {
            name: broker.connection_name.clone(),
            frame_max: FRAME_MAX,
            heartbeat: u16::try_from(heartbeat).ok(),
        };
        let limit = url.connect_timeout.unwrap_or(LIMIT);
        match client::connect(broker, url, limit, &kind).await {
            Ok(connection) => return Ok(connection),
            Err(error) => last = error.context(format!("broker {url}")),
        }
    }
    Err(last)
}

/// Opens subscriptions, on one connection as long as that lives.
pub(super) struct Subscriber {
    broker: Broker,
    connection: Option<Arc<Connection>>,
    /// What `ordered` sets the prefetch to; asked once per connection.
    prefetch: u16,
}

impl Subscriber {
    pub fn new(broker: Broker) -> Self {
        Self { broker, connection: None, prefetch: 1 }
    }

    /// Subscribes to the queue.
    pub async fn subscribe(&mut self, options: &Options) -> Result<Subscription> {
        let connection = self.connection(options).await?;
        let queue = short(&options.queue)?;
        let channel = step(LIMIT, "opening a channel", connection.create_channel()).await?;
        let qos = channel.basic_qos(self.prefetch, BasicQosOptions::default());
        step(LIMIT, "setting the prefetch", qos).await?;
        let consume = channel.basic_consume(
            queue,
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let what = format!("subscribing to queue {:?}", options.queue);
        let consumer = step(LIMIT, &what, consume).await?;
        Ok(Subscription { connection, channel, consumer })
    }

    /// The connection, opened again if it is gone.
    async fn connection(&mut self, options: &Options) -> Result<Arc<Connection>> {
        if let Some(connection) = self.connection.as_ref().filter(|c| c.status().connected()) {
            return Ok(connection.clone());
        }
        self.connection = None;
        self.prefetch = options.prefetch;
        if options.ordered {
            let version = version::of(&self.broker).await?;
            if version < version::KEEPS_ORDER {
                tracing::info!(
                    consumer = options.consumer,
                    "prefetch 1: this broker's redelivery can change the order (before 4.3)"
                );
                self.prefetch = 1;
            }
        }
        let connection = Arc::new(connect(&self.broker).await?);
        Ok(self.connection.insert(connection).clone())
    }

    /// Forgets the connection: nothing is heard on it.
    pub fn drop_connection(&mut self) {
        self.connection = None;
    }

    /// Closes the connection, if there is one.
    pub async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            let close = connection.close(reply::REPLY_SUCCESS, "stopped".into());
            let _ = step(LIMIT, "closing the connection", close).await;
        }
    }
}

/// A subscription and its channel.
pub(super) struct Subscription {
    connection: Arc<Connection>,
    channel: Channel,
    consumer: Consumer,
}

impl Subscription {
    /// The next message, or why there will be none. May be dropped and called again.
    pub async fn next(&mut self) -> Result<Delivery, (Loss, Option<Error>)> {
        match self.consumer.next().await {
            Some(Ok(delivery)) => Ok(delivery),
            Some(Err(error)) => Err((self.cause(&error), Some(translate(&error)))),
            // The broker has sent basic.cancel; or what comes after an error.
            None if self.connection.status().connected() => Err((Loss::Cancelled, None)),
            None => Err((Loss::ConnectionLost, None)),
        }
    }

    fn cause(&self, error: &lapin::Error) -> Loss {
        if error.is_amqp_soft_error() && self.connection.status().connected() {
            return Loss::ChannelClosed;
        }
        Loss::ConnectionLost
    }

    /// The connection, for what runs beside the subscription.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Gives the messages back, by closing the channel. False when the broker does not answer.
    pub async fn close(self) -> bool {
        if !self.channel.status().connected() {
            return self.connection.status().connected();
        }
        let close = self.channel.close(reply::REPLY_SUCCESS, "giving messages back".into());
        // The consumer ends after the channel: its end would cancel it before.
        let closed = step(LIMIT, "closing the channel", close).await.is_ok();
        drop(self.consumer);
        closed
    }
}
