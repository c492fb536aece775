//! Ordinary SQL, by tokio-postgres, over our own socket.
//!
//! tokio-postgres runs on a stream that `socket.rs` opened and `auth.rs` logged in on, because by
//! itself it knows no verify-full, answers a server that asks for the clear-text password, and does
//! not do as many SCRAM iterations as hardened servers ask for. It sees a server that lets it in
//! without asking: its start-up packet is not sent.
//!
//! Invariant: the connection is driven by a task of its own, so the end of it (57P01 at a server
//! shutdown) is seen at once, even while no query runs.

use std::convert::Infallible;
use std::future::{Ready, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding, SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding as BindingBytes, TlsConnect, TlsStream};
use tokio_postgres::types::FromSql;
use tokio_postgres::{AsyncMessage, Client, Connection, Row};

use super::auth;
use super::connect::{Options, Settings};
use super::socket::Socket;
use super::sqlstate::postgres_error;
use super::wire::Wire;
use crate::error::{Error, Result};

/// A connection for ordinary SQL.
#[derive(Debug)]
pub struct SqlConnection {
    /// Runs the queries.
    pub client: Client,
    /// Resolves when the connection ends.
    pub closed: Closed,
}

/// Resolves when the connection ends; apart from the client, so that both can be used at once.
#[derive(Debug)]
pub struct Closed(mpsc::Receiver<Error>);

impl Closed {
    /// Waits for the end of the connection and says why it ended. May be dropped and called again.
    pub async fn wait(&mut self) -> Error {
        let closed = || Error::unreachable("the connection to Postgres is closed");
        self.0.recv().await.unwrap_or_else(closed)
    }
}

/// The value of a column. Never a panic: an object that goes away while a query runs can make a
/// catalog function return null where there always is a value.
///
/// # Errors
/// [`crate::error::Kind::Internal`] when it is null or of another type than asked for.
pub fn column<'r, T: FromSql<'r>>(row: &'r Row, index: usize) -> Result<T> {
    row.try_get(index).map_err(postgres_error)
}

/// Connects within the connect timeout.
///
/// # Errors
/// As the table in `sqlstate.rs` says; [`crate::error::Kind::Unreachable`] after the timeout.
pub async fn sql(options: &Options) -> Result<SqlConnection> {
    let options = &*options.current()?;
    let limit = options.connect_timeout;
    let opened = timeout(limit, open(options)).await.unwrap_or_else(|_| {
        Err(Error::unreachable(format!("no connection within {} s", limit.as_secs()))
            .hint("the limit is connect_timeout in the URL"))
    });
    let (client, connection) =
        opened.map_err(|error| error.context(format!("Postgres {options}")))?;
    let (sender, receiver) = mpsc::channel(1);
    let version = connection.parameter("server_version").unwrap_or_default();
    let ours = options.settings == Settings::Relay;
    let is_limited = ours && auth::has_transaction_timeout(version);
    tokio::spawn(drive(connection, sender));
    if is_limited {
        timeout(limit, client.batch_execute(auth::NO_TRANSACTION_TIMEOUT))
            .await
            .map_err(|_| Error::unreachable(format!("no answer within {} s", limit.as_secs())))?
            .map_err(postgres_error)?;
    }
    Ok(SqlConnection { client, closed: Closed(receiver) })
}

type Driver = Connection<LoggedIn, LoggedIn>;

async fn open(options: &Options) -> Result<(Client, Driver)> {
    let (socket, behind) = Wire::log_in(options).await?;
    let mut config = tokio_postgres::Config::new();
    // The user has to be given, and goes nowhere.
    config
        .user(&options.user)
        // "Direct" makes tokio-postgres take the stream as it is.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct)
        .channel_binding(ChannelBinding::Disable);
    let mut answer = BytesMut::from(AUTHENTICATION_OK);
    answer.extend_from_slice(&behind);
    let logged_in = LoggedIn { socket, answer, start_up: StartUp::Length(Vec::new()) };
    let (client, connection) =
        config.connect_raw(logged_in, Established).await.map_err(postgres_error)?;
    let ours = options.settings == Settings::Relay;
    for name in ["DateStyle", "IntervalStyle", "TimeZone"].into_iter().filter(|_| ours) {
        connection.parameter(name).map_or(Ok(()), |value| auth::check_reported(name, value))?;
    }
    Ok((client, connection))
}

/// Drives the connection until it ends. Ends by itself when the client is dropped.
async fn drive(mut connection: Driver, ended: mpsc::Sender<Error>) {
    let error = loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notice(notice))) => {
                tracing::debug!(message = notice.message(), "notice from Postgres");
            }
            Some(Ok(_)) => {}
            Some(Err(error)) => break postgres_error(error),
            None => break Error::unreachable("the connection to Postgres is closed"),
        }
    };
    // The session may be over already; then there is no receiver.
    let _ = ended.try_send(error);
}

/// Hands over a stream that needs no handshake any more.
struct Established;

impl TlsConnect<LoggedIn> for Established {
    type Stream = LoggedIn;
    type Error = Infallible;
    type Future = Ready<Result<LoggedIn, Infallible>>;

    fn connect(self, stream: LoggedIn) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

/// What a server says that lets somebody in.
///
/// <https://www.postgresql.org/docs/current/protocol-message-formats.html>
const AUTHENTICATION_OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";

/// The socket after the login, for a client that has yet to log in.
struct LoggedIn {
    socket: Socket,
    /// What is read before what the socket has.
    answer: BytesMut,
    start_up: StartUp,
}

/// How much of the client's start-up packet, which is not sent, has been written.
enum StartUp {
    /// A part of its length.
    Length(Vec<u8>),
    /// All but this many bytes.
    Left(usize),
}

impl LoggedIn {
    /// Takes bytes of the start-up packet; returns how many.
    fn swallow(&mut self, bytes: &[u8]) -> usize {
        match &mut self.start_up {
            StartUp::Length(seen) => {
                let taken = bytes.len().min(4 - seen.len());
                seen.extend_from_slice(&bytes[..taken]);
                if let [a, b, c, d] = seen[..] {
                    let length = u32::from_be_bytes([a, b, c, d]) as usize;
                    self.start_up = StartUp::Left(length.saturating_sub(4));
                }
                taken
            }
            StartUp::Left(left) => {
                let taken = bytes.len().min(*left);
                *left -= taken;
                taken
            }
        }
    }
}

impl TlsStream for LoggedIn {
    fn channel_binding(&self) -> BindingBytes {
        BindingBytes::none()
    }
}

impl AsyncRead for LoggedIn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.answer.is_empty() {
            return Pin::new(&mut this.socket).poll_read(cx, buf);
        }
        let n = this.answer.len().min(buf.remaining());
        buf.put_slice(&this.answer.split_to(n));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LoggedIn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match this.start_up {
            StartUp::Left(0) => Pin::new(&mut this.socket).poll_write(cx, buf),
            StartUp::Length(_) | StartUp::Left(_) => Poll::Ready(Ok(this.swallow(buf))),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}
