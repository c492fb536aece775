//! The connection that publishes messages and says what became of each.
//!
//! Invariant: **a nack, a return, a lost channel is never success.** Every publish has exactly one
//! outcome (`channel` keeps the count), or the connection ends with an error and then every
//! publish without an outcome is in doubt.
//!
//! One owner, no task: `send` appends frames to the output buffer, `next_outcomes` moves all bytes
//! in both directions, keeps the heartbeats and watches the deadlines. It has to be polled all the
//! time, also when nothing is outstanding. All state is in the struct, so a dropped future loses
//! nothing.
//!
//! Each exchange has channels of its own, because the broker answers a publish to a missing or
//! forbidden exchange by closing the channel, without a delivery tag. Such a channel is opened
//! again by the next publish to it; the other channels go on. Under load the messages of one
//! exchange are spread over its channels and may overtake each other, but for those that are
//! `in_sequence`.

use std::future::{Future, poll_fn};
use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};

use super::channel::{Answer, Channel, Outcomes, Sent, State, target, target_exchange};
use super::handshake::{self, CONTROL_CHANNEL, Tuned, close_error};
use super::link::Link;
use super::options::{CHANNELS_MAX, Options, SPREAD_FROM, Url};
use super::reply;
use super::wire::{self, Incoming};
use crate::error::{Error, Kind, Result};
use crate::fault::io_error;
use crate::message::{Message, SHORT_STRING_MAX};
use crate::publisher::{Outcome, Publisher, Ticket};

/// Maximum wait for `connection.close-ok`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the deadlines are checked within the shortest of them.
const TICKS_PER_DEADLINE: u32 = 4;

/// A confirming connection to RabbitMQ.
pub struct Connection {
    link: Link,
    url: Url,
    /// Why the broker does not say when it deletes the lock queue.
    unwatched: Option<String>,
    channels: Vec<Channel>,
    channels_per_exchange: usize,
    /// Publishes whose outcome has not been handed on.
    outstanding: usize,
    exchanges: Vec<Exchange>,
    /// Send a heartbeat after this much silence of ours.
    heartbeat: Duration,
    confirm_timeout: Duration,
    max_body: usize,
    ticks: Interval,
    blocked_since: Option<Instant>,
    /// Confirm deadlines count from here at the earliest: when the last block ended, or when the
    /// link last had something left to write.
    deadlines_from: Instant,
    /// Kept until everything that was received is read: it may hold the broker's reason.
    write_error: Option<io::Error>,
}

struct Exchange {
    name: String,
    /// The exchange's part of what a return is matched by.
    target: u64,
}

impl Connection {
    /// Connects to the first URL that works, takes the lock queue and opens a channel in confirm
    /// mode for every exchange. Whether the exchanges exist shows at the first publish.
    ///
    /// # Errors
    /// `Unreachable`; `Refused` for login, virtual host, permissions and certificates; `Busy` when
    /// another connection holds the lock queue; `Config` for TLS files. With several URLs the text
    /// says what each of them answered.
    pub async fn open(options: &Options) -> Result<Self> {
        let mut errors: Vec<(&Url, Error)> = Vec::new();
        let urls = options.current_urls()?;
        for url in &urls {
            let limit = url.connect_timeout.unwrap_or(options.connect_timeout);
            let error = match timeout(limit, Self::open_one(options, url)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => error,
                Err(_) => Error::unreachable(format!("no AMQP connection within {limit:?}")),
            };
            // The lock belongs to the cluster; files and our bugs are the same for every broker.
            if matches!(error.kind(), Kind::Busy | Kind::Config | Kind::Internal) {
                return Err(error.context(format!("broker {url}")));
            }
            errors.push((url, error));
        }
        Err(join_errors(errors))
    }

    async fn open_one(options: &Options, url: &Url) -> Result<Self> {
        for name in options.exchanges.iter().chain(&options.lock_queue) {
            if name.len() > SHORT_STRING_MAX {
                let what = format!("name {name:.60?}... has {} bytes;", name.len());
                return Err(Error::config(format!(
                    "{what} AMQP allows at most {SHORT_STRING_MAX}"
                )));
            }
        }
        let mut link = Link::connect(url, options).await?;
        let tuned = handshake::handshake(&mut link, url, options).await?;
        let locked = match &options.lock_queue {
            Some(name) => handshake::take_lock(&mut link, name).await,
            None => Ok(None),
        };
        let mut connection = Self::new(options, url, link, tuned);
        match locked {
            Ok(reason) => connection.unwatched = reason,
            Err(error) => {
                connection.close().await;
                return Err(error);
            }
        }
        connection.open_channels().await?;
        Ok(connection)
    }

    /// What is wrong with the lock, and what to do, when the broker will not say that it is gone.
    pub fn unwatched(&self) -> Option<(String, &'static str)> {
        let reason = self.unwatched.as_ref()?;
        Some((format!("{} ({reason})", handshake::UNWATCHED), handshake::UNWATCHED_HINT))
    }

    fn new(options: &Options, url: &Url, link: Link, tuned: Tuned) -> Self {
        let available = usize::from(tuned.channel_max.saturating_sub(CONTROL_CHANNEL)).max(1);
        let exchanges = options.exchanges.len();
        let channels_most = available.min(CHANNELS_MAX);
        let each = options.channels_per_exchange.min(channels_most / exchanges.max(1)).max(1);
        let count = (exchanges * each).min(channels_most);
        let timeout = Duration::from_secs(u64::from(tuned.heartbeat));
        let mut ticks = interval((timeout / 2).min(options.confirm_timeout) / TICKS_PER_DEADLINE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let exchange =
            |name: &String| Exchange { name: name.clone(), target: target_exchange(name) };
        Self {
            link,
            url: url.clone(),
            unwatched: None,
            channels: (0..count).map(|i| Channel::new(CONTROL_CHANNEL + 1 + i as u16)).collect(),
            channels_per_exchange: each,
            outstanding: 0,
            exchanges: options.exchanges.iter().map(exchange).collect(),
            heartbeat: timeout / 2,
            confirm_timeout: options.confirm_timeout,
            max_body: options.max_message_size,
            ticks,
            blocked_since: None,
            deadlines_from: Instant::now(),
            write_error: None,
        }
    }

    /// Opens all channels at once, so the round trips do not add up.
    async fn open_channels(&mut self) -> Result<()> {
        for index in 0..self.channels.len() {
            self.open_channel(index);
        }
        let mut outcomes = Vec::new();
        poll_fn(|cx| {
            loop {
                let step = self.poll_step(cx, &mut outcomes);
                // A step that ends pending may have handled the last answer before it did.
                if self.channels.iter().all(|c| c.state == State::Open) {
                    return Poll::Ready(Ok(()));
                }
                match step {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await?;
        assert!(outcomes.is_empty(), "nothing was published yet");
        Ok(())
    }

    fn open_channel(&mut self, index: usize) {
        let channel = &mut self.channels[index];
        let open = channel::AMQPMethod::Open(channel::Open {});
        wire::put_method(self.link.out(), channel.number, AMQPClass::Channel(open));
        channel.state = State::Opening;
    }

    /// Publishes without an outcome.
    pub fn unconfirmed(&self) -> usize {
        self.channels.iter().map(Channel::unconfirmed).sum()
    }

    fn poll_outcomes(&mut self, cx: &mut Context<'_>, outcomes: &mut Outcomes) -> Poll<Result<()>> {
        let before = outcomes.len();
        loop {
            match self.poll_step(cx, outcomes) {
                Poll::Ready(Ok(())) if outcomes.len() == before => {}
                Poll::Ready(result) => {
                    self.outstanding -= outcomes.len() - before;
                    if result.is_err() {
                        // A close-ok may be due; its fate does not matter.
                        let _ = self.link.poll_write(cx);
                    }
                    return Poll::Ready(result.map_err(|e| self.named(e)));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// One round: frames that are here, then write, then read. Deadlines are only checked when
    /// nothing is left to read, so that a pause of our own is not taken for the broker's.
    fn poll_step(&mut self, cx: &mut Context<'_>, outcomes: &mut Outcomes) -> Poll<Result<()>> {
        let before = outcomes.len();
        while let Some(frame) = self.link.next_frame()? {
            self.received(frame, outcomes)?;
        }
        if self.write_error.is_none()
            && let Poll::Ready(Err(error)) = self.link.poll_write(cx)
        {
            self.write_error = Some(error);
        }
        if outcomes.len() > before {
            return Poll::Ready(Ok(()));
        }
        match self.link.poll_read(cx) {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(lost("broker closed the connection", None))),
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
            Poll::Ready(Err(e)) => Poll::Ready(Err(lost("reading from the broker", Some(e)))),
            Poll::Pending if self.write_error.is_some() => {
                let error = self.write_error.take();
                Poll::Ready(Err(lost("writing to the broker", error)))
            }
            Poll::Pending if self.ticks.poll_tick(cx).is_ready() => {
                Poll::Ready(self.check_deadlines())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Adds the broker's name; while the connection is being opened, the caller does that.
    fn named(&self, error: Error) -> Error {
        error.context(format!("broker {}", self.url))
    }

    fn check_deadlines(&mut self) -> Result<()> {
        let now = Instant::now();
        // Twice the negotiated timeout is what the broker itself allows us.
        let silence = now - self.link.last_read;
        if silence > self.heartbeat * 4 {
            return Err(lost(&format!("nothing received for {silence:.1?}"), None));
        }
        if now - self.link.last_write >= self.heartbeat && self.link.urgent().is_empty() {
            wire::put_heartbeat(self.link.urgent());
        }
        if self.blocked_since.is_some() {
            return Ok(());
        }
        if self.link.unsent() > 0 && now - self.link.last_write < self.heartbeat {
            // A slow link is still taking what was sent: the broker cannot have confirmed it.
            self.deadlines_from = now;
        }
        let oldest = self.channels.iter().filter_map(Channel::oldest).min();
        let waited =
            oldest.map(|sent| now.saturating_duration_since(sent.max(self.deadlines_from)));
        match waited {
            Some(waited) if waited > self.confirm_timeout => Err(lost(
                &format!(
                    "no confirm for {waited:.1?} ({} messages unconfirmed)",
                    self.unconfirmed()
                ),
                None,
            )
            .hint("are the queue's leader and a majority of its replicas up?")),
            Some(_) | None => Ok(()),
        }
    }

    fn received(&mut self, frame: Incoming, outcomes: &mut Outcomes) -> Result<()> {
        match frame {
            Incoming::Ack { channel, tag, multiple } => {
                self.channel(channel)?.confirm(tag, multiple, Answer::Ack, outcomes)
            }
            Incoming::Heartbeat
            | Incoming::ContentHeader { channel: CONTROL_CHANNEL, .. }
            | Incoming::ContentBody { channel: CONTROL_CHANNEL, .. } => Ok(()),
            Incoming::Method(CONTROL_CHANNEL, class) => handshake::received_of_lock(class),
            Incoming::ContentHeader { channel, body_size, message_id, route } => {
                self.channel(channel)?.content_header(body_size, message_id, route)
            }
            Incoming::ContentBody { channel, len } => self.channel(channel)?.content_body(len),
            Incoming::Method(number, AMQPClass::Basic(method)) => {
                self.received_basic(number, method, outcomes)
            }
            Incoming::Method(0, AMQPClass::Connection(method)) => self.received_connection(method),
            Incoming::Method(number, AMQPClass::Channel(method)) => {
                self.received_channel(number, method, outcomes)
            }
            Incoming::Method(
                number,
                AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(confirm::SelectOk {})),
            ) => {
                let channel = self.channel_in(number, State::Selecting)?;
                channel.state = State::Open;
                let waiting = std::mem::take(&mut channel.waiting);
                self.link.out().extend_from_slice(&waiting);
                Ok(())
            }
            other @ (Incoming::Start(_) | Incoming::Method(..)) => {
                Err(handshake::unexpected(&other, "a confirm"))
            }
        }
    }

    fn received_basic(
        &mut self,
        number: u16,
        method: basic::AMQPMethod,
        outcomes: &mut Outcomes,
    ) -> Result<()> {
        match method {
            basic::AMQPMethod::Nack(nack) => {
                let (tag, multiple) = (nack.delivery_tag, nack.multiple);
                self.channel(number)?.confirm(tag, multiple, Answer::Nack, outcomes)
            }
            basic::AMQPMethod::Return(back) => {
                let exchange = target_exchange(back.exchange.as_str());
                let target = target(exchange, back.routing_key.as_str().as_bytes());
                self.channel(number)?.begin_return(String::from(back.reply_text), target)
            }
            other => {
                let other = Incoming::Method(number, AMQPClass::Basic(other));
                Err(handshake::unexpected(&other, "a confirm"))
            }
        }
    }

    fn received_connection(&mut self, method: connection::AMQPMethod) -> Result<()> {
        match method {
            connection::AMQPMethod::Close(close) => {
                let ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
                self.link.hold(true);
                wire::put_method(self.link.urgent(), 0, AMQPClass::Connection(ok));
                Err(close_error(&close))
            }
            connection::AMQPMethod::Blocked(blocked) => {
                if self.blocked_since.is_none() {
                    let hint = "see the broker log for the alarm, and free memory or disk space";
                    let reason = blocked.reason.as_str();
                    tracing::warn!(
                        reason,
                        hint,
                        "broker blocked the connection (memory or disk alarm)"
                    );
                }
                self.blocked_since.get_or_insert_with(Instant::now);
                self.link.hold(true);
                Ok(())
            }
            connection::AMQPMethod::Unblocked(_) => {
                if let Some(since) = self.blocked_since.take() {
                    let seconds = since.elapsed().as_secs();
                    tracing::info!(seconds, "broker unblocked the connection");
                }
                self.deadlines_from = Instant::now();
                self.link.hold(false);
                Ok(())
            }
            other => {
                let other = Incoming::Method(0, AMQPClass::Connection(other));
                Err(handshake::unexpected(&other, "a confirm"))
            }
        }
    }

    fn received_channel(
        &mut self,
        number: u16,
        method: channel::AMQPMethod,
        outcomes: &mut Outcomes,
    ) -> Result<()> {
        match method {
            channel::AMQPMethod::OpenOk(_) => {
                self.channel_in(number, State::Opening)?.state = State::Selecting;
                let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
                wire::put_method(self.link.out(), number, AMQPClass::Confirm(select));
                Ok(())
            }
            channel::AMQPMethod::Close(close)
                if matches!(self.channel(number)?.state, State::Opening | State::Selecting) =>
            {
                let what = format!("broker closed channel {number} while it was being opened");
                Err(reply::error(&what, close.reply_code, close.reply_text.as_str()))
            }
            channel::AMQPMethod::Close(close) => {
                self.channel(number)?.close(close.reply_code, close.reply_text.as_str(), outcomes);
                // After the publishes that are still in the buffer: the broker drops those.
                let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
                wire::put_method(self.link.out(), number, AMQPClass::Channel(ok));
                Ok(())
            }
            other => {
                let other = Incoming::Method(number, AMQPClass::Channel(other));
                Err(handshake::unexpected(&other, "a confirm"))
            }
        }
    }

    /// The index of the channel that a message to this exchange takes.
    fn channel_for(&self, exchange: usize, message: &Message) -> usize {
        // Ids are random, or hashes.
        let one = message.in_sequence || self.outstanding < SPREAD_FROM;
        let spread = if one { 0 } else { message.id.as_u128() as usize };
        let each = self.channels_per_exchange;
        (exchange * each + spread % each) % self.channels.len()
    }

    fn channel(&mut self, number: u16) -> Result<&mut Channel> {
        let index = usize::from(number).checked_sub(usize::from(CONTROL_CHANNEL) + 1);
        index.and_then(|index| self.channels.get_mut(index)).ok_or_else(|| {
            Error::protocol(format!("broker sent a frame on channel {number}, which is not open"))
        })
    }

    fn channel_in(&mut self, number: u16, state: State) -> Result<&mut Channel> {
        let channel = self.channel(number)?;
        if channel.state == state {
            Ok(channel)
        } else {
            let (is, want) = (channel.state, state);
            let what = format!("broker answered on channel {number} in state {is:?}, not {want:?}");
            Err(Error::protocol(what))
        }
    }

    async fn wait_for_close_ok(&mut self) -> Result<()> {
        loop {
            while let Some(frame) = self.link.next_frame()? {
                let close_ok = connection::AMQPMethod::CloseOk(connection::CloseOk {});
                if frame == Incoming::Method(0, AMQPClass::Connection(close_ok)) {
                    return Ok(());
                }
            }
            let read = poll_fn(|cx| {
                if let Poll::Ready(Err(error)) = self.link.poll_write(cx) {
                    return Poll::Ready(Err(error));
                }
                self.link.poll_read(cx)
            });
            match read.await {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(self.named(lost("closing", Some(error)))),
            }
        }
    }
}

impl Publisher for Connection {
    /// # Panics
    /// When the body is larger than [`Publisher::max_body`] or the exchange is not in the options.
    fn send(&mut self, ticket: Ticket, message: &Message) {
        assert!(message.body().len() <= self.max_body, "the caller checks the body's size");
        let exchange = usize::from(message.exchange.0);
        assert!(
            exchange < self.exchanges.len(),
            "the message names an exchange of this connection"
        );
        let index = self.channel_for(exchange, message);
        if self.channels[index].state == State::Closed {
            self.open_channel(index);
        }
        let (exchange, frame_max) = (&self.exchanges[exchange], self.link.frame_max);
        let target = target(exchange.target, message.routing_key());
        let channel = &mut self.channels[index];
        let (id, route, at) = (message.id, message.route_hash, Instant::now());
        channel.publish(Sent { ticket, id, target, route, at });
        self.outstanding += 1;
        let out = match channel.state {
            State::Open => self.link.out(),
            State::Opening | State::Selecting => &mut channel.waiting,
            State::Closed => unreachable!("it was opened above"),
        };
        wire::put_publish(out, channel.number, &exchange.name, message, frame_max);
    }

    fn next_outcomes(
        &mut self,
        outcomes: &mut Vec<(Ticket, Outcome)>,
    ) -> impl Future<Output = Result<()>> {
        poll_fn(move |cx| self.poll_outcomes(cx, outcomes))
    }

    fn is_blocked(&self) -> bool {
        self.blocked_since.is_some()
    }

    fn max_body(&self) -> usize {
        self.max_body
    }

    /// Sends `connection.close` and waits at most one second for the answer: then the broker has
    /// deleted the lock queue. What is still in the output buffer is not sent.
    async fn close(mut self) {
        let close = connection::AMQPMethod::Close(connection::Close {
            reply_code: reply::REPLY_SUCCESS,
            reply_text: "bye".into(),
            class_id: 0,
            method_id: 0,
        });
        self.link.hold(true);
        wire::put_method(self.link.urgent(), 0, AMQPClass::Connection(close));
        // An error or a timeout here changes nothing: the socket is dropped next.
        let _ = timeout(CLOSE_TIMEOUT, self.wait_for_close_ok()).await;
    }
}

fn lost(what: &str, cause: Option<io::Error>) -> Error {
    match cause {
        Some(cause) => io_error(what, cause),
        None => Error::unreachable(what),
    }
}

pub(super) fn join_errors(mut errors: Vec<(&Url, Error)>) -> Error {
    if errors.len() == 1 {
        let (url, error) = errors.remove(0);
        return error.context(format!("broker {url}"));
    }
    if errors.is_empty() {
        return Error::config("no broker URL is given");
    }
    let all_refused = errors.iter().all(|(_, e)| e.kind() == Kind::Refused);
    let kind = if all_refused { Kind::Refused } else { Kind::Unreachable };
    let hint = errors.iter().find_map(|(_, e)| e.hint_text().map(str::to_owned));
    let each: Vec<String> = errors.iter().map(|(url, e)| format!("{url}: {e}")).collect();
    let error = Error::new(kind, format!("no usable broker: {}", each.join("; ")));
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}
