//! The private servers of a run, and small conversations with them.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use lapin::options::{
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use serde::Serialize;
use tokio_postgres::{Client, NoTls};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions};
use watership::error::{Error, Result};

/// The exchange that the relay publishes to.
pub const EXCHANGE: &str = "bench";
/// The routing key of every event of the load.
pub const ROUTING_KEY: &str = "order.placed";

/// What kind of exchange that is: what the broker spends on routing is not the relay's doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Routing {
    /// Compares whole keys: the cheapest that names an exchange.
    Direct,
    /// Compares words; about 6 µs more a message on RabbitMQ 3.10.
    Topic,
}

impl Routing {
    /// As AMQP and the relay's configuration call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Topic => "topic",
        }
    }
}

/// Postgres, RabbitMQ, and a channel for queues.
pub struct Servers {
    pub postgres: Postgres,
    pub rabbit: Rabbit,
    pub channel: Channel,
    pub routing: Routing,
    // Dropping it would close the channel.
    connection: Connection,
}

impl Servers {
    /// Starts both; fsync on, WAL large enough that no checkpoint falls into a measurement.
    pub async fn start(routing: Routing) -> Result<Self> {
        let conf = [
            "wal_level = logical",
            "max_replication_slots = 10",
            "max_wal_size = 16GB",
            "checkpoint_timeout = 1h",
            "shared_buffers = 256MB",
            // Else vacuum of the freshly loaded table takes CPU at random moments.
            "autovacuum = off",
        ];
        let conf = conf.map(str::to_owned).to_vec();
        let options = PostgresOptions { fsync: true, conf, ..PostgresOptions::default() };
        let rabbit_options = RabbitOptions::default();
        let (postgres, rabbit) =
            tokio::try_join!(Postgres::start(options), Rabbit::start(rabbit_options))?;
        let url = rabbit.url("/");
        let connection = Connection::connect(&url, ConnectionProperties::default());
        let connection = connection.await.map_err(broker("connecting"))?;
        let channel = connection.create_channel().await.map_err(broker("opening a channel"))?;
        Ok(Self { postgres, rabbit, channel, routing, connection })
    }

    /// A second channel, for consumers.
    pub async fn another_channel(&self) -> Result<Channel> {
        self.connection.create_channel().await.map_err(broker("opening a channel"))
    }

    pub fn rabbit_pid(&self) -> Result<u32> {
        self.rabbit.pid().ok_or_else(|| Error::unreachable("RabbitMQ is not running"))
    }

    /// A client of `database` as the superuser.
    pub async fn client(&self, database: &str) -> Result<Client> {
        let url = self.postgres.url("postgres", database);
        let (client, connection) =
            tokio_postgres::connect(&url, NoTls).await.map_err(sql("connecting"))?;
        // Ends with the client.
        tokio::spawn(connection);
        Ok(client)
    }

    /// An empty durable quorum queue, bound to the relay's exchange.
    pub async fn fresh_queue(&self, name: &str) -> Result<()> {
        self.fresh_queue_with(name, FieldTable::default()).await
    }

    /// The same, with further arguments.
    pub async fn fresh_queue_with(&self, name: &str, arguments: FieldTable) -> Result<()> {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let kind = match self.routing {
            Routing::Direct => ExchangeKind::Direct,
            Routing::Topic => ExchangeKind::Topic,
        };
        self.channel
            .exchange_declare(EXCHANGE.into(), kind, durable, FieldTable::default())
            .await
            .map_err(broker("declaring the exchange"))?;
        self.delete_queue(name).await?;
        self.bound_queue(name, ROUTING_KEY, arguments).await
    }

    /// A durable quorum queue, bound by this key to the relay's exchange, which must exist.
    pub async fn bound_queue(
        &self,
        name: &str,
        routing_key: &str,
        mut arguments: FieldTable,
    ) -> Result<()> {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel
            .queue_declare(name.into(), durable, arguments)
            .await
            .map_err(broker("declaring the queue"))?;
        let (queue, key) = (name.into(), routing_key.into());
        let options = QueueBindOptions::default();
        self.channel
            .queue_bind(queue, EXCHANGE.into(), key, options, FieldTable::default())
            .await
            .map_err(broker("binding the queue"))
    }

    /// Empties the queue.
    pub async fn purge(&self, name: &str) -> Result<()> {
        let purged = self.channel.queue_purge(name.into(), QueuePurgeOptions::default()).await;
        purged.map(drop).map_err(broker("emptying the queue"))
    }

    pub async fn delete_queue(&self, name: &str) -> Result<()> {
        let options = QueueDeleteOptions::default();
        let deleted = self.channel.queue_delete(name.into(), options).await;
        deleted.map(drop).map_err(broker("deleting the queue"))
    }

    /// Makes the broker begin a new write-ahead log for its quorum queues, and waits until the old
    /// one is written to segments. Without it that work, a third of a backlog's CPU, falls on
    /// whichever measurement fills the log (512 MiB, about every third), limit or relay or peer.
    pub async fn settle_broker(&self) -> Result<()> {
        let settle = "ra_log_wal:force_roll_over(ra_log_wal), timer:sleep(300), \
                      ra_log_segment_writer:await(ra_log_segment_writer).";
        let said = self.rabbit.ctl(&["eval", settle]).await?;
        if said.trim() == "ok" {
            return Ok(());
        }
        Err(Error::protocol(format!("RabbitMQ's log was not started again: {}", said.trim())))
    }

    /// Messages that lie in the queue now.
    pub async fn depth(&self, name: &str) -> Result<u64> {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.channel.queue_declare(name.into(), passive, FieldTable::default());
        Ok(u64::from(queue.await.map_err(broker("asking for the queue"))?.message_count()))
    }

    /// A program of this build: `target/release/<name>`, seen from our own place.
    pub fn built(name: &str) -> Result<PathBuf> {
        let own = std::env::current_exe()
            .map_err(|e| Error::config("finding this program").caused_by(e))?;
        let folder = own.parent().and_then(Path::parent).unwrap_or(Path::new("."));
        let path = folder.join(name);
        if path.exists() {
            return Ok(path);
        }
        let text = format!("{} is not there", path.display());
        Err(Error::config(text)
            .hint("tests/bench/run builds it: cargo build --release --bins --examples"))
    }
}

/// Turns an error of the broker's client into ours.
pub fn broker(doing: &str) -> impl FnOnce(lapin::Error) -> Error {
    move |e| Error::unreachable(format!("RabbitMQ: {doing}")).caused_by(e)
}

/// Turns an error of Postgres' client into ours.
pub fn sql(doing: &str) -> impl FnOnce(tokio_postgres::Error) -> Error {
    move |e| Error::unreachable(format!("Postgres: {doing}")).caused_by(e)
}
