//! Ordinary SQL, by tokio-postgres, over our own socket.
//!
//! tokio-postgres runs on a stream that `socket.rs` opened, because by itself it knows no
//! verify-full and answers a server that asks for the clear-text password. Here the TLS session
//! exists before tokio-postgres sees the stream, the channel binding is handed to it, and a guard
//! reads the first answer of the server before tokio-postgres does.
//!
//! Invariant: the connection is driven by a task of its own, so the end of it (57P01 at a server
//! shutdown) is seen at once, even while no query runs.

use std::convert::Infallible;
use std::future::{Ready, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding as Binding, SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding as BindingBytes, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client, Connection};

use super::auth;
use super::connect::{ChannelBinding, Options};
use super::socket::Socket;
use super::sqlstate::{login_error, postgres_error};
use crate::error::{Error, Result};

/// Limits of a session, so that no statement of ours holds a lock indefinitely. Longer work sets
/// its own with `SET LOCAL`. Idle sessions are allowed: a limit that the role sets for them would
/// look like a failure.
///
/// Rows that row-level security would hide are an error and never just absent. And a server that
/// was made read-only by its default, as hosting services do when the disk is full, still takes the
/// checkpoint: only that lets it remove WAL.
const LIMITS: &str = " -c statement_timeout=30s -c lock_timeout=5s \
     -c idle_in_transaction_session_timeout=60s -c idle_session_timeout=0 -c row_security=off \
     -c default_transaction_read_only=off";

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
    let is_limited = auth::has_transaction_timeout(version);
    tokio::spawn(drive(connection, sender));
    if is_limited {
        timeout(limit, client.batch_execute(auth::NO_TRANSACTION_TIMEOUT))
            .await
            .map_err(|_| Error::unreachable(format!("no answer within {} s", limit.as_secs())))?
            .map_err(postgres_error)?;
    }
    Ok(SqlConnection { client, closed: Closed(receiver) })
}

type Driver = Connection<Guard, Guard>;

async fn open(options: &Options) -> Result<(Client, Driver)> {
    let socket = Socket::open(options).await?;
    let mut config = tokio_postgres::Config::new();
    config
        .user(&options.user)
        .dbname(&options.database)
        .application_name(&options.application_name)
        .options(format!("{}{LIMITS}", auth::SETTINGS))
        // "Direct" makes tokio-postgres take the stream as it is and ask it for its binding.
        .ssl_mode(SslMode::Require)
        .ssl_negotiation(SslNegotiation::Direct)
        .channel_binding(match options.channel_binding {
            ChannelBinding::Disable => Binding::Disable,
            ChannelBinding::Prefer => Binding::Prefer,
            ChannelBinding::Require => Binding::Require,
        });
    if let Some(password) = &options.password {
        config.password(password.expose());
    }
    let guard = Guard { socket, options: options.clone(), first: First::Awaited(Vec::new()) };
    config.connect_raw(guard, Established).await.map_err(login_error)
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

impl TlsConnect<Guard> for Established {
    type Stream = Guard;
    type Error = Infallible;
    type Future = Ready<Result<Guard, Infallible>>;

    fn connect(self, stream: Guard) -> Self::Future {
        std::future::ready(Ok(stream))
    }
}

/// The socket, which checks the first message of the server before it hands it on.
struct Guard {
    socket: Socket,
    options: Options,
    first: First,
}

enum First {
    /// The first bytes so far, not handed on yet.
    Awaited(Vec<u8>),
    /// Judged; these bytes are to be handed on.
    Judged(Vec<u8>),
    /// Handed on.
    Passed,
}

/// Tag, length and request code of an authentication request.
const REQUEST: usize = 9;

/// Judges the first message; anything but an authentication request is left to tokio-postgres.
///
/// <https://www.postgresql.org/docs/current/protocol-message-formats.html>
fn judge(first: &[u8], options: &Options) -> Result<()> {
    let [b'R', _, _, _, _, code @ ..] = first else { return Ok(()) };
    match code {
        [0, 0, 0, 0] => auth::admit_without_proof(options),
        [0, 0, 0, 3] => Err(auth::refuse_clear_text()),
        [0, 0, 0, 5] => auth::admit_md5(options).and(auth::password(options).map(drop)),
        [0, 0, 0, 10] => auth::password(options).map(drop),
        _ => Ok(()),
    }
}

impl Guard {
    fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let First::Awaited(seen) = &mut self.first else { return Poll::Ready(Ok(())) };
        while seen.len() < REQUEST {
            let mut space = [0; REQUEST];
            let mut buf = ReadBuf::new(&mut space[seen.len()..]);
            ready!(Pin::new(&mut self.socket).poll_read(cx, &mut buf))?;
            if buf.filled().is_empty() {
                break;
            }
            seen.extend_from_slice(buf.filled());
        }
        judge(seen, &self.options).map_err(io::Error::other)?;
        self.first = First::Judged(std::mem::take(seen));
        Poll::Ready(Ok(()))
    }
}

impl TlsStream for Guard {
    fn channel_binding(&self) -> BindingBytes {
        let hash = self.socket.channel_binding();
        hash.map_or_else(BindingBytes::none, BindingBytes::tls_server_end_point)
    }
}

impl AsyncRead for Guard {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let guard = self.get_mut();
        ready!(guard.poll_first(cx))?;
        match &mut guard.first {
            First::Judged(rest) if !rest.is_empty() => {
                let n = rest.len().min(buf.remaining());
                buf.put_slice(&rest[..n]);
                rest.drain(..n);
                Poll::Ready(Ok(()))
            }
            First::Judged(_) | First::Passed | First::Awaited(_) => {
                guard.first = First::Passed;
                Pin::new(&mut guard.socket).poll_read(cx, buf)
            }
        }
    }
}

impl AsyncWrite for Guard {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}
