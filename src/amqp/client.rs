//! Connections by lapin, for all that is not the hot path: the topology, and consumers.
//!
//! lapin has been seen to hang in connect, open and close, so every step has a time limit of ours,
//! and its automatic recovery stays off.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::tcp::{AMQPUriTcpExt, RustlsConnector, TLSConfig};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::{
    AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism,
};
use lapin::{Connection, ConnectionProperties, ErrorKind};
use tokio::net::lookup_host;
use tokio::time::timeout;

use super::options::{Auth, Options, Url};
use super::reply;
use crate::error::{Error, Kind, Result};
use crate::fault::{classify, io_error, is_tls, with_hint};
use crate::tls;

/// Addresses of a name that are tried; with more, none would have time to answer.
const ADDRESSES_MAX: usize = 8;

/// What to do when something else answers.
pub(super) const NOT_RABBITMQ: &str = "this is not a RabbitMQ port: check host and port in the \
    broker URL, such as broker.url (5672; for amqps:// 5671)";

/// The same, when it closes without an answer.
pub(super) const NO_WORD: &str = "see the broker's log; if it has nothing, this is not a RabbitMQ \
    port: check host and port in the broker URL, such as broker.url (5672; for amqps:// 5671)";

/// What connections of different use differ in.
#[derive(Debug, Clone)]
pub struct Use {
    /// Shown in the broker's list of connections.
    pub name: String,
    /// Largest frame, in bytes. lapin keeps 64 of them in memory; RabbitMQ 4 refuses below 8192.
    pub frame_max: u32,
    /// Seconds; without one the broker's, which is long.
    pub heartbeat: Option<u16>,
}

/// Connects to one broker.
///
/// # Errors
/// `Refused` where the broker or its certificate says no, `Config` for a wrong file, `Unreachable`
/// otherwise.
pub async fn connect(
    options: &Options,
    url: &Url,
    limit: Duration,
    kind: &Use,
) -> Result<Connection> {
    let tls = options.tls_for(url)?.map(|o| tls::client_config(&o)).transpose()?;
    let connector = tls.map(RustlsConnector::from);
    let runtime = lapin::runtime::default_runtime()
        .map_err(|e| Error::internal("no runtime for the broker connection").caused_by(e))?;
    let name = kind.name.as_str().into();
    let properties = ConnectionProperties::default().with_connection_name(name);
    let failed = Arc::new(Mutex::new(None));
    let tell = failed.clone();
    // The stream is made here and not by lapin, so that each address of the name has its share of
    // the time, and all levels of TLS work, as they do for the publisher.
    let connecting = Connection::connector(
        uri(options, url, kind),
        runtime,
        async move |uri, runtime| {
            let AMQPAuthority { host, port, .. } = &uri.authority;
            let stream = each_address(host, *port, limit, async |address| {
                let mut plain = AMQPUri { scheme: AMQPScheme::AMQP, ..uri.clone() };
                plain.authority.host = address.ip().to_string();
                plain.connect_with_config_async(TLSConfig::default(), &runtime).await
            });
            let stream = match stream.await {
                Ok(stream) => stream,
                Err(error) => {
                    let text = error.to_string();
                    *tell.lock().expect("nobody panics while holding it") = Some(error);
                    return Err(std::io::Error::other(text).into());
                }
            };
            match &connector {
                None => Ok(stream),
                Some(connector) => Ok(stream.into_rustls(connector, host).await?),
            }
        },
        properties,
    );
    // Servers of other protocols close what they do not understand.
    let mut closed = false;
    let connecting = async {
        let connected = connecting.await;
        closed = connected.as_ref().is_err_and(is_closed);
        connected
    };
    let connected = step(limit, "connecting", connecting).await;
    let connected = connected.map_err(|error| if closed { error.hint(NO_WORD) } else { error });
    let failed = failed.lock().expect("nobody panics while holding it").take();
    connected.map_err(|error| failed.map_or(error, |failed| failed.context("connecting")))
}

fn is_closed(error: &lapin::Error) -> bool {
    use io::ErrorKind as E;
    let kind = match error.kind() {
        ErrorKind::IOError(io) => io.kind(),
        _ => return false,
    };
    matches!(kind, E::ConnectionReset | E::ConnectionAborted | E::UnexpectedEof | E::BrokenPipe)
}

fn uri(options: &Options, url: &Url, kind: &Use) -> AMQPUri {
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
            frame_max: Some(kind.frame_max),
            heartbeat: kind.heartbeat,
            ..Default::default()
        },
    }
}

/// A name of AMQP.
///
/// # Errors
/// `Config` above 255 bytes.
pub fn short(text: &str) -> Result<ShortString> {
    ShortString::try_new(text).map_err(|_| {
        Error::config(format!("{text:.60?}... has {} bytes, at most 255 are allowed", text.len()))
    })
}

/// Awaits one step of lapin, within its limit.
///
/// # Errors
/// What [`translate`] says; `Unreachable` after the limit.
pub async fn step<T>(
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
pub fn translate(error: &lapin::Error) -> Error {
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
        ErrorKind::ParsingError(_) | ErrorKind::InvalidProtocolVersion(_) => {
            Error::protocol("the answer is not AMQP 0-9-1").hint(NOT_RABBITMQ)
        }
        _ => Error::unreachable("broker connection failed").caused_by(error.clone()),
    }
}

/// Connects to the first address of `host` that answers within its share of `limit`: one that
/// swallows packets must leave time for the others.
pub async fn each_address<T>(
    host: &str,
    port: u16,
    limit: Duration,
    connect: impl AsyncFn(SocketAddr) -> io::Result<T>,
) -> Result<T> {
    let addresses = lookup_host((host, port)).await.map_err(|e| {
        Error::unreachable(format!("host {host:?} cannot be resolved")).caused_by(e)
    })?;
    let mut addresses: Vec<SocketAddr> = addresses.take(ADDRESSES_MAX).collect();
    let name = (host.to_owned(), port);
    let last = answered().get(&name).copied();
    // What answered last time comes first: one that swallows packets costs its share of the time.
    addresses.sort_by_key(|address| Some(*address) != last);
    let connected = each_of(addresses, limit, connect).await;
    let no_address = || Err(Error::unreachable(format!("host {host:?} has no address")));
    let (address, stream) = connected.unwrap_or_else(no_address)?;
    answered().insert(name, address);
    Ok(stream)
}

/// The address of each host and port that was connected to last.
fn answered() -> MutexGuard<'static, BTreeMap<(String, u16), SocketAddr>> {
    static ANSWERED: Mutex<BTreeMap<(String, u16), SocketAddr>> = Mutex::new(BTreeMap::new());
    ANSWERED.lock().expect("nobody panics while holding the addresses")
}

/// `None` without addresses.
async fn each_of<T>(
    addresses: Vec<SocketAddr>,
    limit: Duration,
    connect: impl AsyncFn(SocketAddr) -> io::Result<T>,
) -> Option<Result<(SocketAddr, T)>> {
    let share = limit / u32::try_from(addresses.len()).unwrap_or(1).max(1);
    let mut last = None;
    for address in addresses {
        let connected = timeout(share, connect(address)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Some(Ok((address, stream))),
            Err(e) => {
                last = Some(io_error(&format!("no connection to {address}"), e));
            }
        }
    }
    last.map(Err)
}

/// Messages that wait in the queue, and its consumers, by a passive declare; each step may take
/// `limit`.
///
/// # Errors
/// The broker's: 404 where there is no such queue.
pub async fn queue_counts(
    connection: &Connection,
    queue: &str,
    limit: Duration,
) -> Result<(u32, u32)> {
    let channel = step(limit, "opening a channel", connection.create_channel()).await?;
    let options = QueueDeclareOptions { passive: true, ..Default::default() };
    let declare = channel.queue_declare(short(queue)?, options, FieldTable::default());
    let seen = step(limit, &format!("queue {queue:?}"), declare).await?;
    let close = channel.close(reply::REPLY_SUCCESS, "seen".into());
    step(limit, "closing a channel", close).await?;
    Ok((seen.message_count(), seen.consumer_count()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_that_answered_last_is_tried_first() {
        let tried = Mutex::new(Vec::new());
        // Names of this machine have more than one address only by chance: one is remembered.
        let only = async |wanted: SocketAddr| {
            let connect = async |address: SocketAddr| {
                tried.lock().unwrap().push(address);
                (address == wanted).then_some(()).ok_or(io::ErrorKind::ConnectionRefused.into())
            };
            let addresses = lookup_host(("localhost", 7)).await.unwrap().collect::<Vec<_>>();
            each_address("localhost", 7, Duration::from_secs(1), connect).await.ok();
            addresses
        };
        let nowhere = SocketAddr::from(([127, 0, 0, 9], 7));
        let addresses = only(nowhere).await;
        let last = *addresses.last().expect("localhost has an address");
        only(last).await;
        tried.lock().unwrap().clear();
        only(nowhere).await;
        assert_eq!(tried.lock().unwrap()[0], last);
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_swallows_packets_leaves_the_others_their_share_of_the_time() {
        let addresses = |n: u16| (1..=n).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let limit = Duration::from_secs(8);
        let last_answers = async |address: SocketAddr| match address.port() {
            4 => Ok(address.port()),
            3 => Err(io::ErrorKind::ConnectionRefused.into()),
            _ => std::future::pending().await,
        };
        let connecting = each_of(addresses(4).collect(), limit, last_answers);
        let connected = timeout(limit, connecting).await.expect("within the limit");
        assert_eq!(connected.unwrap().unwrap().1, 4);
        let dead = each_of(addresses(2).collect(), limit, last_answers).await.unwrap();
        assert!(dead.unwrap_err().to_string().contains("no connection to 127.0.0.1:2"));
        assert!(each_of(Vec::new(), limit, last_answers).await.is_none());
    }
}
