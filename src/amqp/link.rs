//! One socket to the broker, plain or TLS, with an output and an input buffer.
//!
//! All state lives in the struct, so every poll can be dropped half-way: a frame half written is
//! continued by the next poll. While output is held (the broker blocks us), the frame in progress
//! is still finished, and only urgent frames (heartbeats, `connection.close`) go out after it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::client::each_address;
use super::options::{Options, Url};
use super::wire::{self, Incoming};
use crate::error::{Error, Result};
use crate::fault::{io_error, is_tls};
use crate::tls;

/// Bytes read with one system call, at most.
const INPUT_BYTES: usize = 64 * 1024;
/// An empty output buffer above this size is given back.
const OUTPUT_BYTES_KEPT: usize = 1024 * 1024;
/// First TCP keepalive probe after this much silence.
const KEEPALIVE: Duration = Duration::from_secs(15);

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The connection's bytes.
pub(super) struct Link {
    stream: Stream,
    user_timeout: Duration,
    /// Frames to send; the part before `written` is gone.
    out: Vec<u8>,
    written: usize,
    /// Start of a frame in `out`, at or before `written`; moved on only when needed.
    frame_start: usize,
    urgent: Vec<u8>,
    held: bool,
    unflushed: bool,
    input: Vec<u8>,
    input_start: usize,
    input_end: usize,
    /// Largest frame that may be received, in bytes.
    pub frame_max: usize,
    /// When bytes were last written.
    pub last_write: Instant,
    /// When bytes were last read.
    pub last_read: Instant,
}

impl Link {
    /// Connects by TCP, and TLS where the URL says so.
    pub async fn connect(url: &Url, options: &Options) -> Result<Self> {
        let tls = options.tls_for(url)?.map(|o| tls::client_config(&o)).transpose()?;
        let limit = url.connect_timeout.unwrap_or(options.connect_timeout);
        let tcp = each_address(&url.host, url.port, limit, TcpStream::connect).await?;
        let user_timeout = options.confirm_timeout;
        prepare(&tcp, user_timeout)
            .map_err(|e| Error::unreachable("setting socket options").caused_by(e))?;
        let stream = match tls {
            None => Stream::Plain(tcp),
            Some(config) => {
                let name = tls::server_name(&url.host)?;
                let stream = TlsConnector::from(config).connect(name, tcp).await;
                Stream::Tls(Box::new(stream.map_err(tls_error)?))
            }
        };
        let now = Instant::now();
        Ok(Self {
            stream,
            user_timeout,
            out: Vec::new(),
            written: 0,
            frame_start: 0,
            urgent: Vec::new(),
            held: false,
            unflushed: false,
            input: vec![0; INPUT_BYTES],
            input_start: 0,
            input_end: 0,
            frame_max: wire::FRAME_MAX,
            last_write: now,
            last_read: now,
        })
    }

    /// The output buffer, for appending whole frames.
    pub fn out(&mut self) -> &mut Vec<u8> {
        if self.written == self.out.len() {
            self.clear_output();
        } else if self.written > INPUT_BYTES && self.written > self.out.len() / 2 {
            let start = self.boundary_before();
            self.out.drain(..start);
            self.written -= start;
            self.frame_start = 0;
        }
        &mut self.out
    }

    /// Frames that go before what is in the output buffer.
    pub fn urgent(&mut self) -> &mut Vec<u8> {
        &mut self.urgent
    }

    /// Bytes that are not yet handed to the kernel.
    pub fn unsent(&self) -> usize {
        self.out.len() - self.written + self.urgent.len()
    }

    /// Holds output back, or lets it go. While held, TCP may stall for as long as it takes: the
    /// user timeout would end the connection in the middle of a long alarm.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
        let timeout = (!held).then_some(self.user_timeout);
        // If the kernel refuses, heartbeats still find a dead peer.
        let _ = set_user_timeout(self.tcp(), timeout);
    }

    /// Writes as much as the socket takes. Ready when nothing is left that may go out.
    pub fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let end = if self.held || !self.urgent.is_empty() {
                self.boundary_after()
            } else {
                self.out.len()
            };
            if self.written < end {
                let bytes = &self.out[self.written..end];
                self.written += written(ready!(self.stream.poll_write(cx, bytes)))?;
            } else if !self.urgent.is_empty() {
                let n = written(ready!(self.stream.poll_write(cx, &self.urgent)))?;
                self.urgent.drain(..n);
            } else {
                break;
            }
            self.last_write = Instant::now();
            self.unflushed = true;
        }
        if self.written == self.out.len() {
            self.clear_output();
        }
        if self.unflushed {
            ready!(self.stream.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once. `Ok(0)` is the end of the stream.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.input_start == self.input_end {
            (self.input_start, self.input_end) = (0, 0);
        } else if self.input_end == self.input.len() {
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
            // Still full: one frame is larger than the buffer. `wire::parse` has checked its size.
            if self.input_end == self.input.len() {
                self.input.resize(self.frame_max.max(INPUT_BYTES), 0);
            }
        }
        let mut buf = ReadBuf::new(&mut self.input[self.input_end..]);
        assert!(buf.remaining() > 0, "a frame of at most frame_max bytes fits the input buffer");
        ready!(self.stream.poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        self.input_end += n;
        self.last_read = Instant::now();
        Poll::Ready(Ok(n))
    }

    /// The next complete frame that has been read.
    pub fn next_frame(&mut self) -> Result<Option<Incoming>> {
        let bytes = &self.input[self.input_start..self.input_end];
        Ok(wire::parse(bytes, self.frame_max)?.map(|(frame, len)| {
            self.input_start += len;
            frame
        }))
    }

    fn clear_output(&mut self) {
        self.out.clear();
        if self.out.capacity() > OUTPUT_BYTES_KEPT {
            self.out = Vec::new();
        }
        (self.written, self.frame_start) = (0, 0);
    }

    /// Start of the frame in which `written` lies.
    fn boundary_before(&mut self) -> usize {
        while self.frame_start < self.written {
            let end = self.frame_start + wire::frame_len(&self.out[self.frame_start..]);
            if end > self.written {
                break;
            }
            self.frame_start = end;
        }
        self.frame_start
    }

    /// End of the frame in which `written` lies; `written` itself between two frames.
    fn boundary_after(&mut self) -> usize {
        let start = self.boundary_before();
        if start == self.written { start } else { start + wire::frame_len(&self.out[start..]) }
    }

    fn tcp(&self) -> &TcpStream {
        match &self.stream {
            Stream::Plain(tcp) => tcp,
            Stream::Tls(tls) => tls.get_ref().0,
        }
    }
}

fn written(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        Ok(n) => Ok(n),
        Err(e) => Err(e),
    }
}

fn prepare(tcp: &TcpStream, user_timeout: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3);
    SockRef::from(tcp).set_tcp_keepalive(&keepalive)?;
    set_user_timeout(tcp, Some(user_timeout))
}

#[cfg(target_os = "linux")]
fn set_user_timeout(tcp: &TcpStream, timeout: Option<Duration>) -> io::Result<()> {
    SockRef::from(tcp).set_tcp_user_timeout(timeout)
}

#[cfg(not(target_os = "linux"))]
fn set_user_timeout(_tcp: &TcpStream, _timeout: Option<Duration>) -> io::Result<()> {
    Ok(())
}

fn tls_error(error: io::Error) -> Error {
    let is_tls = is_tls(&error);
    let error = io_error("TLS handshake with the broker", error);
    // A port without TLS usually hangs up on the first bytes.
    if is_tls { error } else { error.hint("is TLS enabled on this port?") }
}

impl Stream {
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Stream::Plain(s) => Pin::new(s).poll_write(cx, bytes),
            Stream::Tls(s) => Pin::new(s).poll_write(cx, bytes),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Plain(s) => Pin::new(s).poll_flush(cx),
            Stream::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self {
            Stream::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Stream::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}
