//! From the protocol header to `connection.open-ok`, and the lock queue.
//!
//! AMQP 0-9-1, section 2.2.4. The caller limits the time of the whole. A refusal is reported in
//! the broker's own words, with what to do about it.

use std::future::poll_fn;

use amq_protocol::protocol::{AMQPClass, basic, channel, connection, queue};
use amq_protocol::types::{AMQPValue, FieldTable, LongString};

use super::client::NO_WORD;
use super::link::Link;
use super::options::{Auth, Options, Url};
use super::reply;
use super::wire::{self, FRAME_MAX, Incoming};
use crate::error::{Code, Error, Kind, Result};
use crate::fault::{io_error, is_tls};
use crate::message::PROPERTIES_MAX;

/// The channel of the lock queue; publishing channels follow it.
pub(super) const CONTROL_CHANNEL: u16 = 1;

/// The client property that says what a connection works for.
pub(super) const SERVES: &str = "serves";

/// What it means that the lock queue cannot be consumed.
pub(super) const UNWATCHED: &str =
    "the lock queue cannot be watched: a policy with expires would delete it unnoticed";
/// What to do about it.
pub(super) const UNWATCHED_HINT: &str = "grant read permission on it (rabbitmqctl set_permissions)";

/// The smallest `frame_max` that takes every message's properties in one frame.
const FRAME_MIN: usize = PROPERTIES_MAX + 64;

/// What both sides agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tuned {
    /// Largest frame, in bytes.
    pub frame_max: usize,
    /// Highest channel number.
    pub channel_max: u16,
    /// Heartbeat timeout in seconds.
    pub heartbeat: u16,
}

/// Opens the connection: authentication, tuning, virtual host.
pub(super) async fn handshake(link: &mut Link, url: &Url, options: &Options) -> Result<Tuned> {
    link.out().extend_from_slice(wire::PROTOCOL_HEADER);
    let mechanisms = match receive(link).await.map_err(no_word)? {
        Incoming::Start(mechanisms) => mechanisms,
        other => return Err(unexpected(&other, "connection.start")),
    };
    let auth = url.auth.unwrap_or(options.auth);
    put(link, 0, connection::AMQPMethod::StartOk(start_ok(auth, &mechanisms, url, options)?));
    let tune = match receive(link).await.map_err(silent_refusal)? {
        Incoming::Method(0, AMQPClass::Connection(connection::AMQPMethod::Tune(tune))) => tune,
        Incoming::Method(0, AMQPClass::Connection(connection::AMQPMethod::Close(close))) => {
            return Err(login_refused(link, &close, url).await);
        }
        other => return Err(unexpected(&other, "connection.tune")),
    };
    let tuned = tune_with(&tune, url, options)?;
    link.frame_max = tuned.frame_max;
    put(
        link,
        0,
        connection::AMQPMethod::TuneOk(connection::TuneOk {
            channel_max: tuned.channel_max,
            frame_max: tuned.frame_max as u32,
            heartbeat: tuned.heartbeat,
        }),
    );
    let virtual_host = url.vhost.as_str().into();
    put(link, 0, connection::AMQPMethod::Open(connection::Open { virtual_host }));
    match receive(link).await? {
        Incoming::Method(0, AMQPClass::Connection(connection::AMQPMethod::OpenOk(_))) => Ok(tuned),
        Incoming::Method(0, AMQPClass::Connection(connection::AMQPMethod::Close(close))) => {
            say_close_ok(link).await;
            let error = close_error(&close);
            // The same code stands for a vhost that is missing and for a limit that is reached.
            if reply::limit_hint(close.reply_text.as_str()).is_some() {
                return Err(error);
            }
            Err(error.hint(format!(
                "create the virtual host {:?} and give user {:?} permissions in it",
                url.vhost, url.username
            )))
        }
        other => Err(unexpected(&other, "connection.open-ok")),
    }
}

/// Declares the exclusive queue that fences a second publisher of the same name.
///
/// An exclusive queue belongs to one connection and is deleted with it
/// (<https://www.rabbitmq.com/docs/queues#exclusive-queues>). Returns why it cannot be watched, if
/// it cannot.
pub(super) async fn take_lock(link: &mut Link, name: &str) -> Result<Option<String>> {
    open_control_channel(link).await?;
    match declare_lock(link, name, false).await? {
        None => watch_lock(link, name).await,
        Some(close) if close.reply_code == reply::RESOURCE_LOCKED => {
            Err(held_or_ordinary(link, name, &close).await?)
        }
        Some(close) => Err(lock_error(name, &close)),
    }
}

/// Why the lock cannot be taken. The broker gives the same code for a queue that is exclusive to
/// another connection and for an ordinary one of that name; only the ordinary one can be declared
/// passively by others.
async fn held_or_ordinary(link: &mut Link, name: &str, close: &channel::Close) -> Result<Error> {
    put_class(
        link,
        CONTROL_CHANNEL,
        AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})),
    );
    open_control_channel(link).await?;
    if declare_lock(link, name, true).await?.is_some() {
        return Ok(lock_error(name, close));
    }
    let what = format!("queue {name:?} is an ordinary queue, not the lock of a relay");
    Ok(Error::refused(what).coded(Code::Reply(close.reply_code)).hint(
        "delete that queue: the relay declares one of this name for itself alone; or give the \
         relay another name",
    ))
}

async fn open_control_channel(link: &mut Link) -> Result<()> {
    put_class(
        link,
        CONTROL_CHANNEL,
        AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})),
    );
    match receive(link).await? {
        Incoming::Method(CONTROL_CHANNEL, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_))) => {
            Ok(())
        }
        other => Err(unexpected(&other, "channel.open-ok")),
    }
}

/// Declares the lock queue, or only looks at it. Returns the broker's refusal, if it refuses.
async fn declare_lock(
    link: &mut Link,
    name: &str,
    passive: bool,
) -> Result<Option<channel::Close>> {
    let declare = queue::Declare {
        queue: name.into(),
        passive,
        durable: false,
        exclusive: !passive,
        auto_delete: false,
        nowait: false,
        arguments: FieldTable::default(),
    };
    put_class(link, CONTROL_CHANNEL, AMQPClass::Queue(queue::AMQPMethod::Declare(declare)));
    match receive(link).await? {
        Incoming::Method(CONTROL_CHANNEL, AMQPClass::Queue(queue::AMQPMethod::DeclareOk(_))) => {
            Ok(None)
        }
        Incoming::Method(
            CONTROL_CHANNEL,
            AMQPClass::Channel(channel::AMQPMethod::Close(close)),
        ) => Ok(Some(close)),
        other => Err(unexpected(&other, "queue.declare-ok")),
    }
}

/// Consumes the lock queue: a policy with `expires` deletes only queues that nobody uses, and the
/// broker tells a consumer when its queue is deleted (`basic.cancel`).
///
/// The lock holds without it. So a user who may not read the queue is only told; the reason is
/// returned.
async fn watch_lock(link: &mut Link, name: &str) -> Result<Option<String>> {
    let consume = basic::Consume {
        queue: name.into(),
        consumer_tag: "lock".into(),
        no_local: false,
        no_ack: true,
        exclusive: true,
        nowait: false,
        arguments: FieldTable::default(),
    };
    put_class(link, CONTROL_CHANNEL, AMQPClass::Basic(basic::AMQPMethod::Consume(consume)));
    match receive(link).await? {
        Incoming::Method(CONTROL_CHANNEL, AMQPClass::Basic(basic::AMQPMethod::ConsumeOk(_))) => {
            Ok(None)
        }
        Incoming::Method(
            CONTROL_CHANNEL,
            AMQPClass::Channel(channel::AMQPMethod::Close(close)),
        ) if close.reply_code == reply::ACCESS_REFUSED => {
            let ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
            put_class(link, CONTROL_CHANNEL, AMQPClass::Channel(ok));
            tracing::warn!(
                queue = name,
                reason = close.reply_text.as_str(),
                hint = UNWATCHED_HINT,
                "{UNWATCHED}"
            );
            Ok(Some(close.reply_text.as_str().to_owned()))
        }
        Incoming::Method(
            CONTROL_CHANNEL,
            AMQPClass::Channel(channel::AMQPMethod::Close(close)),
        ) => Err(lock_error(name, &close)),
        other => Err(unexpected(&other, "basic.consume-ok")),
    }
}

/// What came on the channel of the lock queue, after it was taken.
///
/// # Errors
/// When the queue is gone, or its channel: another relay may take the lock.
pub(super) fn received_of_lock(class: AMQPClass) -> Result<()> {
    match class {
        // Somebody published to the lock queue; it is not for us.
        AMQPClass::Basic(basic::AMQPMethod::Deliver(_)) => Ok(()),
        AMQPClass::Basic(basic::AMQPMethod::Cancel(_)) => Err(Error::unreachable(
            "the lock queue of this relay was deleted",
        )
        .hint("no action needed, the next session takes the lock again; nobody should delete it")),
        AMQPClass::Channel(channel::AMQPMethod::Close(close)) => {
            let what = "broker closed the channel of the lock queue";
            Err(reply::error(what, close.reply_code, close.reply_text.as_str()))
        }
        other => {
            Err(unexpected(&Incoming::Method(CONTROL_CHANNEL, other), "nothing on this channel"))
        }
    }
}

fn lock_error(name: &str, close: &channel::Close) -> Error {
    let text = &close.reply_text;
    let error = match close.reply_code {
        reply::RESOURCE_LOCKED => {
            let relay = name.strip_prefix("watership.").and_then(|n| n.strip_suffix(".lock"));
            let relay = relay.map_or(String::new(), |relay| format!(" named {relay:?}"));
            Error::new(Kind::Busy, format!("another relay{relay} holds the lock queue {name:?}"))
                .hint("stop the other relay, or leave this one running as its standby")
        }
        reply::ACCESS_REFUSED => Error::refused(format!("lock queue {name:?}: {text}"))
            .hint(format!("grant configure permission on {name:?} (rabbitmqctl set_permissions)")),
        reply::PRECONDITION_FAILED => Error::refused(format!("lock queue {name:?}: {text}")).hint(
            reply::limit_hint(text.as_str()).unwrap_or("delete the existing queue of that name"),
        ),
        code => reply::error(&format!("lock queue {name:?}"), code, text.as_str()),
    };
    error.coded(Code::Reply(close.reply_code))
}

fn start_ok(
    auth: Auth,
    mechanisms: &str,
    url: &Url,
    options: &Options,
) -> Result<connection::StartOk> {
    let mechanism = auth.mechanism();
    if !mechanisms.split(' ').any(|offered| offered == mechanism) {
        return Err(Error::refused(format!(
            "broker does not offer the SASL mechanism {mechanism}, only {mechanisms}"
        ))
        .hint(match auth {
            Auth::Plain => {
                "enable it (auth_mechanisms in rabbitmq.conf), or use broker.auth = \"external\""
            }
            Auth::External => "it needs TLS, a client certificate and rabbitmq_auth_mechanism_ssl",
        }));
    }
    let response = match auth {
        Auth::Plain => format!("\0{}\0{}", url.username, url.password.expose()),
        Auth::External => String::new(),
    };
    Ok(connection::StartOk {
        client_properties: client_properties(options),
        mechanism: mechanism.into(),
        response: response.into(),
        locale: "en_US".into(),
    })
}

/// <https://www.rabbitmq.com/docs/connections#capabilities>
fn client_properties(options: &Options) -> FieldTable {
    let text = |value: &str| AMQPValue::LongString(LongString::from(value));
    let mut capabilities = FieldTable::default();
    for name in [
        "publisher_confirms",
        "basic.nack",
        "connection.blocked",
        "consumer_cancel_notify",
        "authentication_failure_close",
    ] {
        capabilities.insert(name.into(), AMQPValue::Boolean(true));
    }
    let mut properties = FieldTable::default();
    properties.insert("product".into(), text("watership"));
    properties.insert("version".into(), text(env!("CARGO_PKG_VERSION")));
    properties.insert("platform".into(), text("Rust"));
    properties.insert("connection_name".into(), text(&options.connection_name));
    if !options.serves.is_empty() {
        properties.insert(SERVES.into(), text(&options.serves));
    }
    properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities));
    properties
}

/// Zero from the broker means "no limit" for both maxima.
fn tune_with(tune: &connection::Tune, url: &Url, options: &Options) -> Result<Tuned> {
    let frame_max = match tune.frame_max as usize {
        0 => FRAME_MAX,
        offered => offered.min(FRAME_MAX),
    };
    if frame_max < FRAME_MIN {
        return Err(Error::refused(format!(
            "broker allows frames of at most {frame_max} bytes; {FRAME_MIN} are needed"
        ))
        .hint("raise frame_max in rabbitmq.conf; the default is 131072"));
    }
    let channel_max = if tune.channel_max == 0 { u16::MAX } else { tune.channel_max };
    if channel_max <= CONTROL_CHANNEL {
        return Err(Error::refused(format!(
            "broker allows {channel_max} channel per connection; {} are needed, for the lock queue \
             and to publish",
            CONTROL_CHANNEL + 1
        ))
        .hint("raise channel_max in rabbitmq.conf; the default is 2047"));
    }
    let heartbeat = url.heartbeat.unwrap_or(options.heartbeat).as_secs().clamp(1, 3600);
    Ok(Tuned { frame_max, channel_max, heartbeat: heartbeat as u16 })
}

async fn login_refused(link: &mut Link, close: &connection::Close, url: &Url) -> Error {
    say_close_ok(link).await;
    let hint = format!("check user {:?} and its password in the broker URL", url.username);
    close_error(close).with_kind(Kind::Refused).hint(hint)
}

/// A broker that closes the socket here has most likely rejected the password.
fn silent_refusal(error: Error) -> Error {
    error
        .hint("the broker closed the connection during login, often wrong credentials; see its log")
}

/// A server of another protocol closes what it does not understand.
fn no_word(error: Error) -> Error {
    match (error.kind(), error.hint_text()) {
        (Kind::Unreachable, None) => error.hint(NO_WORD),
        _ => error,
    }
}

/// What a `connection.close` of the broker means for us.
pub(super) fn close_error(close: &connection::Close) -> Error {
    reply::error("broker closed the connection", close.reply_code, close.reply_text.as_str())
}

/// The error for a frame that came in place of `wanted`.
pub(super) fn unexpected(incoming: &Incoming, wanted: &str) -> Error {
    match incoming {
        Incoming::Method(_, AMQPClass::Connection(connection::AMQPMethod::Close(close))) => {
            close_error(close)
        }
        Incoming::Method(_, AMQPClass::Connection(connection::AMQPMethod::Secure(_))) => {
            Error::refused("broker asks for a second authentication step, which is not supported")
        }
        other => Error::protocol(format!("broker sent {other:?}, expected {wanted}")),
    }
}

async fn say_close_ok(link: &mut Link) {
    put(link, 0, connection::AMQPMethod::CloseOk(connection::CloseOk {}));
    // The broker is done with this connection; whether the answer arrives does not matter.
    let _ = poll_fn(|cx| link.poll_write(cx)).await;
}

fn put(link: &mut Link, channel: u16, method: connection::AMQPMethod) {
    put_class(link, channel, AMQPClass::Connection(method));
}

fn put_class(link: &mut Link, channel: u16, class: AMQPClass) {
    wire::put_method(link.out(), channel, class);
}

/// Sends what is in the buffer and waits for the next frame that is not a heartbeat.
///
/// When writing fails, what the broker sent before it closed is read first: it holds the reason.
async fn receive(link: &mut Link) -> Result<Incoming> {
    let write_error = poll_fn(|cx| link.poll_write(cx)).await.err();
    loop {
        match link.next_frame()? {
            Some(Incoming::Heartbeat) => {}
            Some(frame) => return Ok(frame),
            None => match (poll_fn(|cx| link.poll_read(cx)).await, write_error.as_ref()) {
                // With TLS 1.3 a refused client certificate shows only here.
                (Err(e), _) if is_tls(&e) => {
                    return Err(io_error("reading from the broker", e));
                }
                (Ok(0), None) => return Err(Error::unreachable("broker closed the connection")),
                (Err(e), None) => return Err(io_error("reading from the broker", e)),
                (Ok(0) | Err(_), Some(e)) => {
                    return Err(Error::unreachable(format!("writing to the broker: {e}")));
                }
                (Ok(_), _) => {}
            },
        }
    }
}
