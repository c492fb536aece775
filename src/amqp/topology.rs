//! Declares or verifies exchanges and queues, on a connection of its own that is closed at once.
//!
//! Declaring again what is there the same way changes nothing; declaring it differently is an
//! error that quotes both sides. Verifying is a passive declare: it shows that a thing exists, not
//! of which kind it is, and it needs no configure permission (AMQP 0-9-1, `exchange.declare` and
//! `queue.declare`). Bindings cannot be verified over AMQP at all.
//!
//! lapin has been seen to hang in connect, open and close, so every step has a time limit of ours,
//! and its automatic recovery stays off.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::tcp::{AMQPUriTcpExt, RustlsConnector, TLSConfig};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::{
    AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism,
};
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, ExchangeKind};
use tokio::time::timeout;

use super::options::{Auth, Options, Url};
use super::publisher::join_errors;
use super::reply;
use crate::error::{Code, Error, Kind, Result};
use crate::fault::{classify, is_tls, with_hint};
use crate::tls;

/// Largest frame of this connection, in bytes. lapin keeps 64 of them in memory, and nothing large
/// is sent here; RabbitMQ 4 refuses a smaller one.
const FRAME_MAX: u32 = 8192;

/// Whether missing things are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Make what is missing; what is there must be equivalent.
    #[default]
    Declare,
    /// Change nothing; what is missing is an error.
    Verify,
}

/// The things that must be there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Topology {
    /// Declare or verify.
    pub mode: Mode,
    /// Exchanges, done first. The default exchange (empty name) is always there.
    pub exchanges: Vec<Exchange>,
    /// Queues, done second.
    pub queues: Vec<Queue>,
    /// Bindings, done last and only when declaring.
    pub bindings: Vec<Binding>,
}

/// One exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// `topic`, `direct`, `fanout`, `headers` or a plugin's type.
    pub kind: String,
    /// Whether it survives a restart of the broker.
    pub durable: bool,
}

/// One durable queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Becomes `x-queue-type`.
    pub kind: QueueKind,
    /// Becomes `x-max-length`, with `x-overflow = reject-publish`: a full queue must say so.
    pub max_length: Option<u32>,
    /// Further arguments; they cannot be changed later.
    pub arguments: Vec<(String, Argument)>,
}

/// The queue types of RabbitMQ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueKind {
    /// Replicated; its confirm means fsync on a majority.
    #[default]
    Quorum,
    /// On one node; its confirm means no fsync.
    Classic,
    /// Append-only, replicated; its confirm means no fsync.
    Stream,
}

impl QueueKind {
    /// The value of `x-queue-type`.
    pub fn name(self) -> &'static str {
        match self {
            QueueKind::Quorum => "quorum",
            QueueKind::Classic => "classic",
            QueueKind::Stream => "stream",
        }
    }
}

/// Value of a queue argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument {
    /// A string.
    Text(String),
    /// A whole number.
    Int(i64),
    /// True or false.
    Bool(bool),
}

/// Messages of `exchange` whose routing key matches `routing_key` go to `queue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The queue.
    pub queue: String,
    /// The exchange.
    pub exchange: String,
    /// The binding key.
    pub routing_key: String,
}

/// Declares or verifies `topology` on the first broker that answers.
///
/// # Errors
/// `Refused` for a thing that is missing (verify), declared differently or not permitted;
/// `Unreachable` when no broker answers within `connect_timeout`, which bounds each step.
pub async fn apply(options: &Options, topology: &Topology) -> Result<()> {
    let mut errors: Vec<(&Url, Error)> = Vec::new();
    let urls = options.current_urls()?;
    for url in &urls {
        let limit = url.connect_timeout.unwrap_or(options.connect_timeout);
        match connect(options, url, limit).await {
            Ok(connection) => {
                let result = apply_on(&connection, topology, url, limit).await;
                // What was to be done is done or has failed; a failed close changes neither.
                let _ = timeout(limit, connection.close(reply::REPLY_SUCCESS, "done".into())).await;
                return result.map_err(|e| e.context(format!("broker {url}")));
            }
            Err(error) if error.kind() == Kind::Config => return Err(error),
            Err(error) => errors.push((url, error)),
        }
    }
    Err(join_errors(errors))
}

async fn connect(options: &Options, url: &Url, limit: Duration) -> Result<Connection> {
    let tls = options.tls_for(url)?.map(|o| tls::client_config(&o)).transpose()?;
    let connector = tls.map(RustlsConnector::from);
    let runtime = lapin::runtime::default_runtime()
        .map_err(|e| Error::internal("no runtime for the broker connection").caused_by(e))?;
    let name = format!("{} topology", options.connection_name);
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    // The stream is made here and not by lapin, so that all levels of TLS work as they do for the
    // publisher: lapin's own way can only verify in full.
    let connecting = Connection::connector(
        uri(options, url),
        runtime,
        async move |uri, runtime| {
            let plain = AMQPUri { scheme: AMQPScheme::AMQP, ..uri.clone() };
            let stream = plain.connect_with_config_async(TLSConfig::default(), &runtime).await?;
            match &connector {
                None => Ok(stream),
                Some(connector) => Ok(stream.into_rustls(connector, &uri.authority.host).await?),
            }
        },
        properties,
    );
    step(limit, "connecting", connecting).await
}

fn uri(options: &Options, url: &Url) -> AMQPUri {
    let mechanism = match url.auth.unwrap_or(options.auth) {
        Auth::Plain => SASLMechanism::Plain,
        Auth::External => SASLMechanism::External,
    };
    let userinfo =
        AMQPUserInfo { username: url.username.clone(), password: url.password.expose().to_owned() };
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority { userinfo, host: url.host.clone(), port: url.port },
        vhost: url.vhost.clone(),
        query: AMQPQueryString {
            auth_mechanism: Some(mechanism),
            frame_max: Some(FRAME_MAX),
            ..Default::default()
        },
    }
}

async fn apply_on(
    connection: &Connection,
    topology: &Topology,
    url: &Url,
    limit: Duration,
) -> Result<()> {
    let channel = step(limit, "opening a channel", connection.create_channel()).await?;
    for exchange in topology.exchanges.iter().filter(|e| !e.name.is_empty()) {
        apply_exchange(&channel, exchange, topology.mode, limit)
            .await
            .map_err(|e| say_missing(e, "exchange", &exchange.name, url))?;
    }
    for queue in &topology.queues {
        apply_queue(&channel, queue, topology.mode, limit)
            .await
            .map_err(|e| say_missing(e, "queue", &queue.name, url))?;
    }
    match topology.mode {
        Mode::Verify => Ok(()),
        Mode::Declare => {
            for binding in &topology.bindings {
                apply_binding(&channel, binding, limit).await?;
            }
            Ok(())
        }
    }
}

async fn apply_exchange(
    channel: &Channel,
    exchange: &Exchange,
    mode: Mode,
    limit: Duration,
) -> Result<()> {
    let options = ExchangeDeclareOptions {
        passive: mode == Mode::Verify,
        durable: exchange.durable,
        ..Default::default()
    };
    let name = short(&exchange.name)?;
    let kind = ExchangeKind::Custom(exchange.kind.clone());
    let declare = channel.exchange_declare(name, kind, options, FieldTable::default());
    step(limit, &format!("exchange {:?}", exchange.name), declare).await
}

async fn apply_queue(channel: &Channel, queue: &Queue, mode: Mode, limit: Duration) -> Result<()> {
    let options =
        QueueDeclareOptions { passive: mode == Mode::Verify, durable: true, ..Default::default() };
    let declare = channel.queue_declare(short(&queue.name)?, options, arguments(queue)?);
    step(limit, &format!("queue {:?}", queue.name), declare).await.map(|_| ())
}

async fn apply_binding(channel: &Channel, binding: &Binding, limit: Duration) -> Result<()> {
    let Binding { queue, exchange, routing_key } = binding;
    let bind = channel.queue_bind(
        short(queue)?,
        short(exchange)?,
        short(routing_key)?,
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    let what = format!("binding of queue {queue:?} to exchange {exchange:?} by {routing_key:?}");
    step(limit, &what, bind).await
}

fn arguments(queue: &Queue) -> Result<FieldTable> {
    let text = |value: &str| AMQPValue::LongString(value.into());
    let mut table = FieldTable::default();
    table.insert("x-queue-type".into(), text(queue.kind.name()));
    if let Some(limit) = queue.max_length {
        table.insert("x-max-length".into(), AMQPValue::LongLongInt(limit.into()));
        table.insert("x-overflow".into(), text("reject-publish"));
    }
    for (name, value) in &queue.arguments {
        let value = match value {
            Argument::Text(value) => text(value),
            Argument::Int(value) => AMQPValue::LongLongInt(*value),
            Argument::Bool(value) => AMQPValue::Boolean(*value),
        };
        table.insert(short(name)?, value);
    }
    Ok(table)
}

fn short(text: &str) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|_| {
        Error::config(format!("{text:.60?}... has {} bytes, at most 255 are allowed", text.len()))
    })
}

/// Awaits one step of lapin, within its limit.
async fn step<T>(
    limit: Duration,
    what: &str,
    future: impl Future<Output = lapin::Result<T>>,
) -> Result<T> {
    match timeout(limit, future).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(translate(&error).context(what)),
        Err(_) => Err(Error::unreachable(format!("{what}: no answer within {limit:?}"))),
    }
}

/// The broker's refusal is quoted; everything else is a matter of the connection.
fn translate(error: &lapin::Error) -> Error {
    match error.kind() {
        ErrorKind::ProtocolError(broker) => {
            let error = reply::error("", broker.get_id(), broker.get_message().as_str());
            match error.kind() {
                // An exclusive queue of another connection; the lock queue is declared elsewhere.
                Kind::Busy => {
                    error.with_kind(Kind::Refused).hint("delete it, or configure another name")
                }
                _ => error,
            }
        }
        ErrorKind::IOError(io) => {
            let (kind, hint) = classify(io);
            let what = if is_tls(io) { "TLS with the broker" } else { "broker connection failed" };
            with_hint(Error::new(kind, what).caused_by(error.clone()), hint)
        }
        _ => Error::unreachable("broker connection failed").caused_by(error.clone()),
    }
}

/// Turns "not found" into a sentence with what to do.
fn say_missing(error: Error, what: &str, name: &str, url: &Url) -> Error {
    if !reply::is_missing(&error) {
        return error;
    }
    Error::refused(format!("{what} {name:?} does not exist in vhost {:?}", url.vhost))
        .coded(Code::Reply(reply::NOT_FOUND))
        .hint("create it, or set broker.topology = \"declare\"")
}
