//! Declares or verifies exchanges, queues and bindings, on a connection of its own that is closed
//! at once.
//!
//! Declaring again what is there the same way changes nothing; declaring it differently is an
//! error that quotes both sides. Verifying is a passive declare: it shows that a thing exists, not
//! of which kind it is, and it needs no configure permission (AMQP 0-9-1, `exchange.declare` and
//! `queue.declare`). Bindings cannot be verified over AMQP at all.
//!
//! What is wrong with one thing is told of that thing, and the others are looked at all the same:
//! the broker answers by closing the channel, and for a few codes the connection.
//!
//! The connection is lapin's, by `amqp/client`.

use std::time::Duration;

use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ExchangeKind};
use tokio::time::timeout;

use super::{Argument, Binding, Destination, Exchange, Mode, Queue, Thing, Topology, Wrong};
use crate::amqp::client::{self, Use, short, step};
use crate::amqp::options::{Options, Url};
use crate::amqp::publisher::join_errors;
use crate::amqp::reply;
use crate::error::{Code, Error, Kind, Result};

/// Largest frame of this connection, in bytes. lapin keeps 64 of them in memory, and nothing large
/// is sent here; RabbitMQ 4 refuses a smaller one.
const FRAME_MAX: u32 = 8192;
/// How often the connection is opened again because a thing made the broker close it.
const RECONNECTS_MAX: u32 = 8;

/// Declares or verifies `topology` on the first broker that answers.
///
/// # Errors
/// `Refused` for things that are missing (verify), declared differently or not permitted;
/// `Unreachable` when no broker answers within `connect_timeout`, which bounds each step.
pub async fn apply(options: &Options, topology: &Topology) -> Result<()> {
    let mut wrong = apply_each(options, topology).await?.into_iter();
    let Some(Wrong { error, .. }) = wrong.next() else { return Ok(()) };
    let others: Vec<String> = wrong.map(|wrong| wrong.error.to_string()).collect();
    if others.is_empty() {
        return Err(error);
    }
    let hint = error.hint_or_kind().to_owned();
    let text = format!("{error}; {}", others.join("; "));
    let all = Error::new(error.kind(), text).hint(hint);
    Err(match error.code().cloned() {
        Some(code) => all.coded(code),
        None => all,
    })
}

/// Declares or verifies all of `topology`, and returns what is wrong, thing by thing.
///
/// # Errors
/// Only what concerns the connection as a whole; see [`apply`].
pub async fn apply_each(options: &Options, topology: &Topology) -> Result<Vec<Wrong>> {
    on_first(options, async |hand| hand.apply(topology).await).await
}

/// Messages that are ready, and consumers, of each of these queues; absent for one that does not
/// exist. What a consumer holds is not among the messages.
///
/// # Errors
/// As [`apply_each`], and `Refused` where a queue may not be looked at.
pub async fn counts(options: &Options, queues: &[String]) -> Result<Vec<Option<(u32, u32)>>> {
    on_first(options, async |hand| {
        let mut counts = Vec::new();
        for queue in queues {
            counts.push(
                match hand.declare_queue(queue, Mode::Verify, FieldTable::default()).await {
                    Ok(queue) => Some((queue.message_count(), queue.consumer_count())),
                    Err(error) if reply::is_missing(&error) => None,
                    Err(error) => return Err(error),
                },
            );
        }
        Ok(counts)
    })
    .await
}

/// Does `work` on the first broker that answers.
pub(super) async fn on_first<T>(
    options: &Options,
    work: impl AsyncFnOnce(&mut Hand<'_>) -> Result<T>,
) -> Result<T> {
    let mut errors: Vec<(&Url, Error)> = Vec::new();
    let urls = options.current_urls()?;
    for url in &urls {
        let limit = url.connect_timeout.unwrap_or(options.connect_timeout);
        match connect(options, url, limit).await {
            Ok(connection) => {
                let mut hand =
                    Hand { options, url, limit, connection, channel: None, reconnects: 0 };
                let result = work(&mut hand).await;
                // What was to be done is done or has failed; a failed close changes neither.
                let close = hand.connection.close(reply::REPLY_SUCCESS, "done".into());
                let _ = timeout(limit, close).await;
                return result.map_err(|e| e.context(format!("broker {url}")));
            }
            Err(error) if error.kind() == Kind::Config => return Err(error),
            Err(error) => errors.push((url, error)),
        }
    }
    Err(join_errors(errors))
}

async fn connect(options: &Options, url: &Url, limit: Duration) -> Result<Connection> {
    let name = format!("{} topology", options.connection_name);
    let kind = Use { name, frame_max: FRAME_MAX, heartbeat: None };
    client::connect(options, url, limit, &kind).await
}

/// One connection, opened again where a thing made the broker close it.
pub(super) struct Hand<'a> {
    options: &'a Options,
    url: &'a Url,
    pub(super) limit: Duration,
    connection: Connection,
    channel: Option<Channel>,
    reconnects: u32,
}

impl Hand<'_> {
    async fn apply(&mut self, topology: &Topology) -> Result<Vec<Wrong>> {
        let mut wrong = Vec::new();
        for exchange in topology.exchanges.iter().filter(|e| !e.name.is_empty()) {
            let Err(error) = self.exchange(exchange, topology.mode).await else { continue };
            let error = self.of_thing(error)?;
            let mut missing = reply::is_missing(&error);
            if may_not_declare(&error, topology.mode)
                && let Err(seen) = self.exchange(exchange, Mode::Verify).await
            {
                missing = reply::is_missing(&self.of_thing(seen)?);
            }
            let thing = Thing::Exchange(exchange.name.clone());
            wrong.push(self.wrong(thing, missing, error, topology));
        }
        for queue in &topology.queues {
            let Err(error) = self.queue(queue, topology.mode).await else { continue };
            let error = self.of_thing(error)?;
            let mut missing = reply::is_missing(&error);
            if may_not_declare(&error, topology.mode)
                && let Err(seen) = self.queue(queue, Mode::Verify).await
            {
                missing = reply::is_missing(&self.of_thing(seen)?);
            }
            let thing = Thing::Queue(queue.name.clone());
            wrong.push(self.wrong(thing, missing, error, topology));
        }
        if topology.mode == Mode::Declare {
            for binding in &topology.bindings {
                let Err(error) = self.binding(binding).await else { continue };
                let error = self.of_thing(error)?;
                let thing = Thing::Binding(binding.clone());
                wrong.push(self.wrong(thing, true, error, topology));
            }
        }
        Ok(wrong)
    }

    /// The error, if it is about the thing that was asked for and not about the connection.
    pub(super) fn of_thing(&self, error: Error) -> Result<Error> {
        let connected = self.connection.status().connected();
        match error.reply_code() {
            None | Some(reply::CONNECTION_FORCED) => Err(error),
            Some(_) if !connected && self.reconnects >= RECONNECTS_MAX => Err(error),
            Some(_) => Ok(error),
        }
    }

    pub(super) fn wrong(
        &self,
        thing: Thing,
        missing: bool,
        error: Error,
        topology: &Topology,
    ) -> Wrong {
        let vhost = &self.url.vhost;
        let error = match (&thing, error.reply_code()) {
            (Thing::Exchange(_) | Thing::Queue(_), Some(reply::NOT_FOUND)) => {
                Error::refused(format!("{thing} does not exist in vhost {vhost:?}"))
                    .coded(Code::Reply(reply::NOT_FOUND))
                    .hint("create it, or set broker.topology = \"declare\"")
            }
            (Thing::Binding(binding), Some(reply::NOT_FOUND)) => {
                error.hint(topology.hint_for_ends(binding))
            }
            (_, Some(reply::ACCESS_REFUSED)) => {
                let hint = reply::access_hint(&error.to_string(), &needed(&thing));
                error.hint(hint)
            }
            _ => error,
        };
        Wrong { thing, missing, error: error.context(format!("broker {}", self.url)) }
    }

    /// An open channel; a refusal has closed the one before.
    pub(super) async fn channel(&mut self) -> Result<Channel> {
        if !self.connection.status().connected() {
            self.reconnects += 1;
            self.connection = connect(self.options, self.url, self.limit).await?;
            self.channel = None;
        }
        if let Some(channel) = self.channel.as_ref().filter(|c| c.status().connected()) {
            return Ok(channel.clone());
        }
        let opening = self.connection.create_channel();
        let channel = step(self.limit, "opening a channel", opening).await?;
        Ok(self.channel.insert(channel).clone())
    }

    pub(super) async fn exchange(&mut self, exchange: &Exchange, mode: Mode) -> Result<()> {
        let channel = self.channel().await?;
        let options = ExchangeDeclareOptions {
            passive: mode == Mode::Verify,
            durable: exchange.durable,
            ..Default::default()
        };
        let name = short(&exchange.name)?;
        let kind = ExchangeKind::Custom(exchange.kind.clone());
        let declare = channel.exchange_declare(name, kind, options, table(&exchange.arguments)?);
        step(self.limit, &format!("exchange {:?}", exchange.name), declare).await
    }

    pub(super) async fn queue(&mut self, queue: &Queue, mode: Mode) -> Result<()> {
        self.declare_queue(&queue.name, mode, queue_table(queue)?).await.map(drop)
    }

    async fn declare_queue(
        &mut self,
        name: &str,
        mode: Mode,
        arguments: FieldTable,
    ) -> Result<lapin::Queue> {
        let channel = self.channel().await?;
        let options = QueueDeclareOptions {
            passive: mode == Mode::Verify,
            durable: true,
            ..Default::default()
        };
        let declare = channel.queue_declare(short(name)?, options, arguments);
        step(self.limit, &format!("queue {name:?}"), declare).await
    }

    async fn binding(&mut self, binding: &Binding) -> Result<()> {
        let channel = self.channel().await?;
        let Binding { destination, exchange, routing_key, arguments } = binding;
        let (from, key) = (short(exchange)?, short(routing_key)?);
        let (what, arguments) = (format!("binding of {binding}"), table(arguments)?);
        match destination {
            Destination::Queue(queue) => {
                let none = QueueBindOptions::default();
                let bind = channel.queue_bind(short(queue)?, from, key, none, arguments);
                step(self.limit, &what, bind).await
            }
            Destination::Exchange(name) => {
                let none = ExchangeBindOptions::default();
                let bind = channel.exchange_bind(short(name)?, from, key, none, arguments);
                step(self.limit, &what, bind).await
            }
        }
    }
}

/// The permissions without which a thing cannot be declared.
fn needed(thing: &Thing) -> String {
    match thing {
        Thing::Exchange(_) => {
            format!(
                "configure permission on {thing} (with an alternate exchange also read, and \
                     write on that one)"
            )
        }
        Thing::Queue(_) => {
            format!(
                "configure permission on {thing} (with dead letters also read, and write on \
                     their exchange)"
            )
        }
        Thing::Binding(Binding { destination, exchange, .. }) => {
            format!(
                "write permission on {destination} and read permission on exchange {exchange:?}"
            )
        }
    }
}

/// The thing may be there all the same: a passive declare needs no permission.
fn may_not_declare(error: &Error, mode: Mode) -> bool {
    mode == Mode::Declare && error.reply_code() == Some(reply::ACCESS_REFUSED)
}

pub(super) fn table(arguments: &[(String, Argument)]) -> Result<FieldTable> {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Argument::Text(value) => AMQPValue::LongString(value.as_str().into()),
            Argument::Int(value) => AMQPValue::LongLongInt(*value),
            Argument::Bool(value) => AMQPValue::Boolean(*value),
        };
        table.insert(short(name)?, value);
    }
    Ok(table)
}

fn queue_table(queue: &Queue) -> Result<FieldTable> {
    let text = |value: &str| AMQPValue::LongString(value.into());
    let mut table = table(&queue.arguments)?;
    table.insert("x-queue-type".into(), text(queue.kind.name()));
    if let Some(limit) = queue.max_length {
        table.insert("x-max-length".into(), AMQPValue::LongLongInt(limit.into()));
        table.insert("x-overflow".into(), text("reject-publish"));
    }
    Ok(table)
}
