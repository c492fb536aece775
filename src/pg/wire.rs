//! Our own connection to Postgres: messages in, messages out, simple queries, CopyBoth.
//!
//! Invariants: all state is in `Wire`, so every future here can be dropped at any await without
//! losing a byte; an announced length is never an allocation, the buffer grows with what arrives;
//! the first failure is sticky, every later call returns it; a command that was cancelled poisons
//! the connection. What the messages of replication mean is in `replication.rs`.
//!
//! <https://www.postgresql.org/docs/current/protocol-message-formats.html>

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::message::backend::{DataRowBody, Message, NoticeResponseBody};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, timeout};
use tokio_postgres::fallible_iterator::FallibleIterator;

use super::auth;
use super::connect::Options;
use super::socket::Socket;
use super::sqlstate::{OBJECT_NOT_IN_PREREQUISITE_STATE, ServerError};
use crate::error::{Code, Error, Kind, Result};
use crate::fault::io_error;
use crate::verdict::{RESYNC, Verdict};

/// One read takes at most this much: starts low, doubles while reads come back full.
const READ_MIN: usize = 64 * 1024;
const READ_MAX: usize = 256 * 1024;
/// Below this much free space the buffer is renewed before the next read.
const SPARE_MIN: usize = 16 * 1024;
/// Postgres sends no message above 1 GiB (`MaxAllocSize`) and a little for the frame around it.
const MESSAGE_MAX: usize = (1 << 30) + 1024;
/// Outside CopyBoth a message is small: errors, parameters, rows of our own queries.
const REPLY_MAX: usize = 16 * 1024 * 1024;
/// Rows that one of our own queries may return.
const ROWS_MAX: usize = 10_000;

/// The rows of a simple query, each a list of columns as text; `None` is NULL.
pub type Rows = Vec<Vec<Option<String>>>;

/// What the connection is doing.
#[derive(Debug)]
enum State {
    /// Ready for a command; also start-up before the first ReadyForQuery.
    Idle,
    /// A command was sent and its ReadyForQuery has not come.
    Busy,
    /// START_REPLICATION was answered: only CopyData flows.
    Copy,
    /// Unusable, for this reason.
    Failed(Failure),
}

/// An error that every later call returns again.
#[derive(Debug)]
struct Failure {
    kind: Kind,
    what: String,
    hint: Option<String>,
    code: Option<Code>,
}

impl Failure {
    fn of(error: &Error) -> Self {
        Self {
            kind: error.kind(),
            what: error.to_string(),
            hint: error.hint_text().map(str::to_owned),
            code: error.code().cloned(),
        }
    }

    fn to_error(&self) -> Error {
        let mut error = Error::new(self.kind, self.what.clone());
        if let Some(hint) = &self.hint {
            error = error.hint(hint.clone());
        }
        match &self.code {
            Some(code) => error.coded(code.clone()),
            None => error,
        }
    }
}

/// A connection to a Postgres server.
pub struct Wire {
    socket: Socket,
    input: BytesMut,
    read_size: usize,
    output: BytesMut,
    /// The socket holds bytes of its own (TLS records) that a flush has to push out.
    flush_due: bool,
    state: State,
    last_received: Instant,
    server_version: String,
}

impl Wire {
    /// Opens the socket, authenticates and waits until the server is ready, all within the
    /// connect timeout. `replication` asks for a walsender that also speaks SQL to the database.
    ///
    /// # Errors
    /// As the table in `sqlstate.rs` says; [`Kind::Unreachable`] after the timeout.
    pub async fn connect(options: &Options, replication: bool) -> Result<Self> {
        let options = &*options.current()?;
        let limit = options.connect_timeout;
        let opened = timeout(limit, Self::open(options, replication)).await;
        let opened = opened.unwrap_or_else(|_| {
            Err(Error::unreachable(format!("no connection within {} s", limit.as_secs()))
                .hint("the limit is connect_timeout in the URL"))
        });
        opened.map_err(|error| error.context(format!("Postgres {options}")))
    }

    async fn open(options: &Options, replication: bool) -> Result<Self> {
        let mut wire = Self::new(Socket::open(options).await?);
        auth::start_up(&mut wire, options, replication).await?;
        wire.ready().await?;
        Ok(wire)
    }

    /// For ordinary SQL, up to where the server has let us in: the socket, and what came behind.
    pub(super) async fn log_in(options: &Options) -> Result<(Socket, BytesMut)> {
        let mut wire = Self::new(Socket::open(options).await?);
        auth::start_up(&mut wire, options, false).await?;
        Ok((wire.socket, wire.input))
    }

    fn new(socket: Socket) -> Self {
        Self {
            socket,
            input: BytesMut::with_capacity(READ_MIN),
            read_size: READ_MIN,
            output: BytesMut::new(),
            flush_due: false,
            state: State::Idle,
            last_received: Instant::now(),
            server_version: String::new(),
        }
    }

    /// When bytes last came from the server.
    pub fn last_received(&self) -> Instant {
        self.last_received
    }

    /// `server_version` as the server reports it, for example `15.18 (Debian 15.18-0+deb12u1)`.
    pub fn server_version(&self) -> &str {
        &self.server_version
    }

    /// The stream below, for what only it knows (channel binding).
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Where messages to the server are appended; they leave with the next `fill` or `flush`.
    pub fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// Bytes that wait to be sent.
    pub fn unsent(&self) -> usize {
        self.output.len()
    }

    /// Marks the connection as failed and returns the error, now and from every later call.
    pub(super) fn fail(&mut self, error: Error) -> Error {
        if !matches!(self.state, State::Failed(_)) {
            self.state = State::Failed(Failure::of(&error));
            // What came after the failure is meaningless.
            self.input.clear();
        }
        error
    }

    fn check(&self) -> Result<()> {
        match &self.state {
            State::Idle | State::Busy | State::Copy => Ok(()),
            State::Failed(failure) => Err(failure.to_error()),
        }
    }

    /// Sends what is queued, then reads once: at least one byte, or an error. Dropping the future
    /// loses nothing.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the peer is gone.
    pub async fn fill(&mut self) -> Result<()> {
        self.check()?;
        if self.input.capacity() - self.input.len() < SPARE_MIN {
            // Reclaims the same memory when all slices of it have been dropped.
            self.input.reserve(self.read_size);
        }
        let room = self.input.capacity() - self.input.len();
        match poll_fn(|cx| self.poll_fill(cx)).await {
            Ok(0) => Err(self.fail(Error::unreachable("the server closed the connection"))),
            Ok(n) => {
                self.last_received = Instant::now();
                if n == room {
                    self.read_size = (self.read_size * 2).min(READ_MAX);
                }
                Ok(())
            }
            Err(e) => Err(self.fail(io_error("reading from the server", e))),
        }
    }

    /// Sends what is queued. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the peer is gone.
    pub async fn flush(&mut self) -> Result<()> {
        self.check()?;
        let sent = poll_fn(|cx| self.poll_output(cx)).await;
        sent.map_err(|e| self.fail(io_error("writing to the server", e)))
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // Output that the peer does not take must not keep us from reading: the peer may be
        // waiting for us to read first, and one that has closed may have said why.
        let written = self.poll_output(cx);
        match (pin!(self.socket.read_buf(&mut self.input)).poll(cx), written) {
            (Poll::Pending, Poll::Ready(Err(e))) => Poll::Ready(Err(e)),
            (read, _) => read,
        }
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let n = ready!(Pin::new(&mut self.socket).poll_write(cx, &self.output))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.advance(n);
            self.flush_due = true;
        }
        if self.flush_due {
            ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
            self.flush_due = false;
        }
        Poll::Ready(Ok(()))
    }

    /// The tag and whole length of the message at the front of the input, once all of it is there.
    fn front(&mut self, max: usize) -> Result<Option<(u8, usize)>> {
        match front(&self.input, max) {
            Ok(found) => Ok(found),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn take(&mut self, total: usize) -> BytesMut {
        let message = self.input.split_to(total);
        if total > READ_MAX {
            // The buffer grew for one huge message; what follows starts a small one again, so
            // that the memory goes when the message does.
            let mut fresh = BytesMut::with_capacity(self.read_size.max(self.input.len()));
            fresh.extend_from_slice(&self.input);
            self.input = fresh;
        }
        message
    }

    /// The next message outside CopyBoth. Notices and parameters are dealt with on the way.
    pub(super) async fn reply(&mut self) -> Result<Reply> {
        loop {
            while let Some((tag, total)) = self.front(REPLY_MAX)? {
                let message = self.take(total);
                if let Some(reply) = self.sort(tag, message)? {
                    return Ok(reply);
                }
            }
            self.fill().await?;
        }
    }

    /// `None` for what may come at any time and needs no answer.
    ///
    /// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-ASYNC>
    fn sort(&mut self, tag: u8, mut message: BytesMut) -> Result<Option<Reply>> {
        match tag {
            // Neither is known to the protocol crate.
            b'W' => return Ok(Some(Reply::CopyBoth)),
            b'v' => return Ok(None),
            _ => {}
        }
        let parsed = match Message::parse(&mut message) {
            Ok(Some(parsed)) => parsed,
            Ok(None) => unreachable!("the message is complete"),
            Err(e) => {
                let error = Error::protocol("unreadable message from the server");
                return Err(self.fail(error.caused_by(e)));
            }
        };
        match parsed {
            Message::NoticeResponse(body) => self.notice(&body)?,
            Message::NotificationResponse(_) => {}
            Message::ParameterStatus(body) => {
                let checked = auth::note_reported(&body, &mut self.server_version);
                checked.map_err(|error| self.fail(error))?;
            }
            other => return Ok(Some(Reply::Message(other))),
        }
        Ok(None)
    }

    /// From Postgres 18 a walsender leaves out the changes of a publication that did not exist when
    /// they were made, and warns with this code, before whatever comes next; older ones fail. Other
    /// files use this code too, and the text is translated.
    fn notice(&mut self, body: &NoticeResponseBody) -> Result<()> {
        let notice = ServerError::read(body.fields());
        let notice = notice.map_err(|e| {
            self.fail(Error::protocol("unreadable notice from the server").caused_by(e))
        })?;
        tracing::debug!(message = notice.message, code = notice.code, "notice from Postgres");
        if matches!(self.state, State::Copy)
            && notice.code == OBJECT_NOT_IN_PREREQUISITE_STATE
            && notice.file == "pgoutput.c"
        {
            let detail = notice.detail.as_deref().unwrap_or_default();
            let text = format!("changes are missing from the stream: {}: {detail}", notice.message);
            return Err(self.fail(Error::named(Verdict::PublicationMissing, text).hint(format!(
                "changes made while no publication had this name are not published; if it is gone, \
                 create it with `watership init`; to accept: {RESYNC} --anyway --from now"
            ))));
        }
        Ok(())
    }

    async fn ready(&mut self) -> Result<()> {
        loop {
            match self.reply().await? {
                Reply::Message(Message::BackendKeyData(_)) => {}
                Reply::Message(Message::ReadyForQuery(_)) => return Ok(()),
                other => return Err(self.unexpected(other, "starting up")),
            }
        }
    }

    /// The failure that an unexpected reply is: the server's error, or a breach of the protocol.
    pub(super) fn unexpected(&mut self, reply: Reply, doing: &str) -> Error {
        let error = match reply {
            Reply::Message(Message::ErrorResponse(body)) => {
                match ServerError::read(body.fields()) {
                    Ok(error) => error.to_error(),
                    Err(e) => {
                        Error::protocol("unreadable error response from the server").caused_by(e)
                    }
                }
            }
            Reply::Message(_) | Reply::CopyBoth => {
                Error::protocol(format!("unexpected message while {doing}"))
            }
        };
        self.fail(error)
    }

    /// Runs a command or query by the simple protocol.
    ///
    /// # Errors
    /// The server's error by the table in `sqlstate.rs` (the connection stays usable unless it was
    /// fatal); [`Kind::Internal`] when an earlier command was cancelled.
    pub async fn query(&mut self, sql: &str) -> Result<Rows> {
        self.begin(sql)?;
        let mut rows = Rows::new();
        let mut refused = None;
        loop {
            match self.reply().await? {
                Reply::Message(Message::DataRow(body)) => {
                    if rows.len() == ROWS_MAX {
                        return Err(self.fail(Error::protocol(format!(
                            "a query returned more than {ROWS_MAX} rows"
                        ))));
                    }
                    let row = columns(&body);
                    rows.push(row.map_err(|e| {
                        self.fail(Error::protocol("unreadable row from the server").caused_by(e))
                    })?);
                }
                Reply::Message(
                    Message::RowDescription(_)
                    | Message::CommandComplete(_)
                    | Message::EmptyQueryResponse,
                ) => {}
                Reply::Message(Message::ReadyForQuery(_)) => {
                    self.state = State::Idle;
                    return refused.map_or(Ok(rows), Err);
                }
                Reply::Message(Message::ErrorResponse(body)) => {
                    let error = ServerError::read(body.fields());
                    let error = error.map_err(|e| {
                        self.fail(
                            Error::protocol("unreadable error response from the server")
                                .caused_by(e),
                        )
                    })?;
                    if error.fatal {
                        return Err(self.fail(error.to_error()));
                    }
                    refused.get_or_insert(error.to_error());
                }
                other => return Err(self.unexpected(other, "running a query")),
            }
        }
    }

    fn begin(&mut self, sql: &str) -> Result<()> {
        self.check()?;
        match self.state {
            State::Idle => {}
            State::Busy => return Err(self.fail(Error::internal("a command was cancelled"))),
            State::Copy | State::Failed(_) => {
                return Err(Error::internal("a query on a connection that replicates"));
            }
        }
        frontend::query(sql, &mut self.output)
            .map_err(|e| Error::internal("a command holds a zero byte").caused_by(e))?;
        self.state = State::Busy;
        Ok(())
    }

    /// Runs a command that switches to CopyBoth (START_REPLICATION).
    ///
    /// # Errors
    /// As [`Wire::query`]; the connection is unusable afterwards.
    pub async fn start_copy(&mut self, command: &str) -> Result<()> {
        self.begin(command)?;
        match self.reply().await? {
            Reply::CopyBoth => {
                self.state = State::Copy;
                Ok(())
            }
            other => Err(self.unexpected(other, "starting replication")),
        }
    }

    /// The body of the next CopyData that has fully arrived, a slice of the read buffer; `None`
    /// when more has to be read. Never waits.
    ///
    /// A slice keeps its whole buffer (64 to 256 KiB) alive: copy what is kept for long.
    ///
    /// # Errors
    /// The server's error, or [`Kind::Unreachable`] when it ended the stream; both are sticky.
    pub fn try_copy(&mut self) -> Result<Option<Bytes>> {
        while let Some((tag, total)) = self.front(MESSAGE_MAX)? {
            let mut message = self.take(total);
            if tag == b'd' {
                message.advance(HEADER);
                return Ok(Some(message.freeze()));
            }
            self.aside(tag, message)?;
        }
        self.check()?;
        Ok(None)
    }

    /// What comes between CopyData messages: notices, an error, the end of the stream.
    fn aside(&mut self, tag: u8, message: BytesMut) -> Result<()> {
        match self.sort(tag, message)? {
            None => Ok(()),
            // A walsender that shuts down ends its stream with CopyDone or CommandComplete.
            Some(Reply::Message(Message::CopyDone | Message::CommandComplete(_))) => {
                Err(self.fail(Error::unreachable("the server ended the replication stream")))
            }
            Some(other) => Err(self.unexpected(other, "replicating")),
        }
    }

    /// Ends the session and waits until the server has closed, for at most `limit`; then what the
    /// session held (an active slot) is free. Best effort.
    pub async fn close(mut self, limit: Duration) {
        if matches!(self.state, State::Copy) {
            frontend::copy_done(&mut self.output);
        }
        frontend::terminate(&mut self.output);
        let ended = timeout(limit, async {
            // What the server still sends must be read, or it never reads our terminate message.
            while self.fill().await.is_ok() {
                self.input.clear();
            }
        });
        if ended.await.is_err() {
            tracing::debug!("the server did not close the connection in time");
        }
    }
}

/// A message outside CopyBoth.
pub(super) enum Reply {
    /// CopyBothResponse.
    CopyBoth,
    /// Any other.
    Message(Message),
}

/// Tag and length.
const HEADER: usize = 5;

/// The tag and whole length of the message at the front of `input`, once all of it is there.
fn front(input: &[u8], max: usize) -> Result<Option<(u8, usize)>> {
    let Some((header, _)) = input.split_first_chunk::<HEADER>() else { return Ok(None) };
    let [tag, length @ ..] = *header;
    let length = u32::from_be_bytes(length) as usize;
    if length < 4 || length > max {
        let shown = char::from(tag).escape_default();
        return Err(Error::protocol(format!(
            "message '{shown}' announces {length} bytes; allowed: 4 to {max}"
        )));
    }
    Ok((input.len() > length).then_some((tag, length + 1)))
}

fn columns(body: &DataRowBody) -> io::Result<Vec<Option<String>>> {
    let mut row = Vec::new();
    let mut ranges = body.ranges();
    while let Some(range) = ranges.next()? {
        let text = range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned());
        row.push(text);
    }
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_seen_only_when_all_of_it_is_there() {
        let message = [b'Z', 0, 0, 0, 5, b'I', b'E'];
        for end in 0..6 {
            assert_eq!(front(&message[..end], 100).unwrap(), None);
        }
        assert_eq!(front(&message, 100).unwrap(), Some((b'Z', 6)));
    }

    #[test]
    fn absurd_lengths_are_protocol_errors() {
        for length in [0u32, 3, 101, u32::MAX] {
            let mut message = vec![b'd'];
            message.extend(length.to_be_bytes());
            assert_eq!(front(&message, 100).unwrap_err().kind(), Kind::Protocol, "{length}");
        }
    }
}
