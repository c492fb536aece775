//! One publish as bytes: which AMQP properties a message has and how they are encoded; routing key,
//! body.
//!
//! A message is encoded once, into one allocation, in the form in which AMQP carries it: the
//! properties are the bytes of the content header's flags and list (AMQP 0-9-1, section 4.2.6.1).
//! So a retry copies bytes and encodes nothing. The publisher adds frames around it.
//!
//! What is needed again later, the route and the key's text, is noted beside the bytes; nothing
//! here reads them back.

mod largest;

use uuid::Uuid;
use xxhash_rust::xxh64::xxh64;

use crate::error::{Error, Result};
use crate::position::Position;

/// Index of a route in the router's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(pub u16);

/// Index of an exchange in the list that the publisher was opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExchangeId(pub u16);

/// A part of a routing key, as far as it is known without an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPart {
    /// This text.
    Text(String),
    /// Some word: text without a dot.
    Word,
    /// Some text, which may have dots in it.
    Any,
}

/// Maximum length of an AMQP short string, in bytes: routing key, type, header name and others.
pub const SHORT_STRING_MAX: usize = 255;

/// Maximum size of properties and headers together, in bytes. They travel in one frame, and brokers
/// accept frames of 131,072 bytes by default.
pub const PROPERTIES_MAX: usize = 60 * 1024;

/// One publish, ready to be framed.
#[derive(Debug, Clone)]
pub struct Message {
    buf: Box<[u8]>,
    /// Where the routing key begins; after the key's text, in a message that was stored.
    start: u32,
    routing_key_len: u8,
    properties_end: u32,
    key_at: u32,
    key_len: u32,
    /// The exchange to publish to.
    pub exchange: ExchangeId,
    /// The route that made this message.
    pub route: RouteId,
    /// [`route_hash`] of the route; [`NO_ROUTE_HASH`] without a [`ROUTE_HEADER`].
    pub route_hash: u64,
    /// The `message_id` property; a returned message is matched by it.
    pub id: Uuid,
    /// Number among the messages that its event has on its route.
    pub part: u16,
    /// Keeps its order among the messages of its exchange that are in sequence, even while they are
    /// unconfirmed. Otherwise the sender keeps the order by waiting for confirms.
    pub in_sequence: bool,
}

impl Message {
    /// The routing key, at most 255 bytes.
    pub fn routing_key(&self) -> &[u8] {
        let start = self.start as usize;
        &self.buf[start..start + usize::from(self.routing_key_len)]
    }

    /// Property flags and property list, as they stand in the content header frame.
    pub fn properties(&self) -> &[u8] {
        let start = self.start as usize + usize::from(self.routing_key_len);
        &self.buf[start..self.properties_end as usize]
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.buf[self.properties_end as usize..]
    }

    /// The text of the key, for people; empty for a message without one.
    pub fn key_text(&self) -> &str {
        let at = self.key_at as usize;
        std::str::from_utf8(&self.buf[at..at + self.key_len as usize]).expect("it came as text")
    }

    /// A message from the parts of an earlier one.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the routing key or the properties are too long.
    pub fn from_parts(
        parts: &Parts<'_>,
        exchange: ExchangeId,
        route: RouteId,
        id: Uuid,
    ) -> Result<Self> {
        let Parts { key, routing_key, properties, body } = parts;
        let routing_key_len = check_short("routing key", routing_key)?;
        if properties.len() > PROPERTIES_MAX {
            return Err(too_long(properties));
        }
        Ok(Self {
            buf: [key.as_bytes(), routing_key.as_bytes(), properties, body].concat().into(),
            // A text in Postgres has less than 1 GiB.
            start: key.len() as u32,
            routing_key_len,
            properties_end: (key.len() + routing_key.len() + properties.len()) as u32,
            key_at: 0,
            key_len: key.len() as u32,
            exchange,
            route,
            route_hash: NO_ROUTE_HASH,
            id,
            part: 0,
            in_sequence: false,
        })
    }

    /// Bytes held in memory for this message.
    pub fn size(&self) -> usize {
        self.buf.len() + size_of::<Self>()
    }
}

/// The parts of a message that was stored.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// [`Message::key_text`].
    pub key: &'a str,
    /// The routing key.
    pub routing_key: &'a str,
    /// [`Message::properties`].
    pub properties: &'a [u8],
    /// The body.
    pub body: &'a [u8],
}

/// The header that names a message's route.
pub const ROUTE_HEADER: &str = "ws-route";

/// The header that names a message's exchange, where its route chooses one of several: a message
/// that was parked is sent to it again.
pub const EXCHANGE_HEADER: &str = "ws-exchange";

/// The header with the text of a message's key.
const KEY_HEADER: &str = "ws-key";

const POSITION_HEADER: &str = "ws-position";

/// Where the position stands in [`OwnHeaders`]: after its header's name, type and length.
const POSITION_AT: usize = 1 + POSITION_HEADER.len() + 1 + 4;

/// The length and name of the header with the commit time, and its type, a 64-bit integer.
const COMMITTED_AT: &[u8; 17] = b"\x0fws-committed-atl";

/// The headers that each message of a route has, up to the text of its key. Most of this is the
/// same each time, so it is encoded once, with room for the position.
#[derive(Debug)]
pub struct OwnHeaders(Box<[u8]>);

impl OwnHeaders {
    /// Those of a route.
    pub fn of(route: &str) -> Self {
        let (mut bytes, position) = (Vec::new(), Position::default().text());
        let mut put = |name, value| put_text(&mut bytes, name, value).expect("both are short");
        put(POSITION_HEADER, &position);
        put(ROUTE_HEADER, route.as_bytes());
        put(KEY_HEADER, b"");
        Self(bytes.into())
    }
}

/// True for names that RabbitMQ or the relay give a meaning to: an application must not set them.
/// `CC` and `BCC` would add routing keys (sender-selected distribution). Header names are
/// case-sensitive, so an application's `X-Request-Id` is its own; the outbox's check says the same.
pub fn is_reserved_header(name: &str) -> bool {
    name == "CC" || name == "BCC" || name.starts_with("x-") || name.starts_with("ws-")
}

/// By which routes are told apart without comparing names: a returned message finds its publish
/// by it, and lanes begin with it, which are stored with parked rows. So it must never change.
pub fn route_hash(name: &str) -> u64 {
    xxh64(name.as_bytes(), 0)
}

/// [`route_hash`] of no name.
pub const NO_ROUTE_HASH: u64 = 0xef46_db37_51d8_e999;

/// The fixed properties of every message; `delivery_mode` is always 2 (persistent).
#[derive(Debug, Clone, Copy)]
pub struct Properties<'a> {
    /// MIME type of the body.
    pub content_type: &'a str,
    /// Stable id of the message.
    pub message_id: Uuid,
    /// Seconds since 1970-01-01 UTC.
    pub timestamp: u64,
    /// The `type` property.
    pub kind: &'a str,
    /// The `app_id` property.
    pub app_id: &'a str,
}

/// A message above this size, in bytes, takes the scratch space with it instead of being copied.
const SCRATCH_KEPT: usize = 64 * 1024;

/// Builds a [`Message`]: properties, then headers, then [`Builder::finish`] with the body.
pub struct Builder<'a> {
    /// Scratch space: a message's own memory is allocated once, when its size is known.
    buf: &'a mut Vec<u8>,
    routing_key_len: u8,
    headers_len_at: usize,
    key_at: usize,
    key_len: usize,
    properties: Properties<'a>,
}

// Property flags, AMQP 0-9-1 section 4.2.6.1 and class basic (60), high bit first.
const FLAGS: u16 = CONTENT_TYPE | HEADERS | DELIVERY_MODE | MESSAGE_ID | TIMESTAMP | TYPE | APP_ID;
const CONTENT_TYPE: u16 = 1 << 15;
const HEADERS: u16 = 1 << 13;
const DELIVERY_MODE: u16 = 1 << 12;
const MESSAGE_ID: u16 = 1 << 7;
const TIMESTAMP: u16 = 1 << 6;
const TYPE: u16 = 1 << 5;
const APP_ID: u16 = 1 << 3;
const PERSISTENT: u8 = 2;

impl<'a> Builder<'a> {
    /// Starts a message in `scratch`, whose content is replaced.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the routing key, the content type, the type or the
    /// application id is longer than 255 bytes.
    pub fn new(
        scratch: &'a mut Vec<u8>,
        routing_key: &str,
        properties: Properties<'a>,
    ) -> Result<Self> {
        let len = check_short("routing key", routing_key)?;
        check_short("type", properties.kind)?;
        check_short("app_id", properties.app_id)?;
        let buf = scratch;
        buf.clear();
        buf.extend_from_slice(routing_key.as_bytes());
        buf.extend_from_slice(&FLAGS.to_be_bytes());
        buf.push(check_short("content_type", properties.content_type)?);
        buf.extend_from_slice(properties.content_type.as_bytes());
        let headers_len_at = buf.len();
        buf.extend_from_slice(&[0; 4]);
        Ok(Self { buf, routing_key_len: len, headers_len_at, key_at: 0, key_len: 0, properties })
    }

    /// Adds what each message has: position, route, key and commit time (microseconds since
    /// 1970-01-01 UTC), and notes where the key's text is.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the key is longer than 4 GiB.
    pub fn own_headers(
        &mut self,
        own: &OwnHeaders,
        position: Position,
        key: &str,
        committed_at_us: i64,
    ) -> Result<()> {
        let at = self.buf.len();
        self.buf.extend_from_slice(&own.0);
        let written = &mut self.buf[at..];
        let position = position.text();
        written[POSITION_AT..POSITION_AT + position.len()].copy_from_slice(&position);
        let key_len_at = written.len() - 4;
        written[key_len_at..].copy_from_slice(&text_len(KEY_HEADER, key.as_bytes())?);
        (self.key_at, self.key_len) = (self.buf.len(), key.len());
        self.buf.extend_from_slice(key.as_bytes());
        let mut committed_at = [0; COMMITTED_AT.len() + 8];
        committed_at[..COMMITTED_AT.len()].copy_from_slice(COMMITTED_AT);
        committed_at[COMMITTED_AT.len()..].copy_from_slice(&committed_at_us.to_be_bytes());
        self.buf.extend_from_slice(&committed_at);
        Ok(())
    }

    /// Adds a header that is a string of any length.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the name is longer than 255 bytes.
    pub fn header_text(&mut self, name: &str, value: &[u8]) -> Result<()> {
        put_text(self.buf, name, value)
    }

    /// Adds a 64-bit integer header.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the name is longer than 255 bytes.
    pub fn header_int(&mut self, name: &str, value: i64) -> Result<()> {
        put_name(self.buf, name)?;
        self.buf.push(b'l');
        self.buf.extend_from_slice(&value.to_be_bytes());
        Ok(())
    }

    /// Adds a boolean header.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the name is longer than 255 bytes.
    pub fn header_bool(&mut self, name: &str, value: bool) -> Result<()> {
        put_name(self.buf, name)?;
        self.buf.extend_from_slice(&[b't', u8::from(value)]);
        Ok(())
    }

    /// Adds a header without a value.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the name is longer than 255 bytes.
    pub fn header_void(&mut self, name: &str) -> Result<()> {
        put_name(self.buf, name)?;
        self.buf.push(b'V');
        Ok(())
    }

    /// Ends the headers and adds the body that `write_body` appends.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the properties exceed [`PROPERTIES_MAX`].
    pub fn finish(
        mut self,
        exchange: ExchangeId,
        route: RouteId,
        write_body: impl FnOnce(&mut Vec<u8>),
    ) -> Result<Message> {
        self.set_len(self.headers_len_at)?;
        let properties = self.properties;
        let mut id_text = Uuid::encode_buffer();
        let id_text = properties.message_id.as_hyphenated().encode_lower(&mut id_text);
        self.buf.push(PERSISTENT);
        for text in [&*id_text, properties.kind, properties.app_id] {
            // Lengths were checked by `new`; a uuid has 36 bytes.
            self.buf.push(text.len() as u8);
            self.buf.extend_from_slice(text.as_bytes());
            if std::ptr::eq(text, id_text) {
                self.buf.extend_from_slice(&properties.timestamp.to_be_bytes());
            }
        }
        let written = &self.buf[usize::from(self.routing_key_len)..];
        if written.len() > PROPERTIES_MAX {
            return Err(too_long(written));
        }
        let properties_end = self.buf.len() as u32;
        write_body(self.buf);
        let buf = match self.buf.len() {
            ..=SCRATCH_KEPT => Box::from(self.buf.as_slice()),
            _ => std::mem::take(self.buf).into_boxed_slice(),
        };
        Ok(Message {
            buf,
            start: 0,
            routing_key_len: self.routing_key_len,
            properties_end,
            // Both lie within the properties, whose length was just compared.
            key_at: self.key_at as u32,
            key_len: self.key_len as u32,
            exchange,
            route,
            route_hash: NO_ROUTE_HASH,
            id: properties.message_id,
            part: 0,
            in_sequence: false,
        })
    }

    /// Writes the length of everything after the four bytes at `at` into them.
    fn set_len(&mut self, at: usize) -> Result<()> {
        let len = u32::try_from(self.buf.len() - at - 4)
            .map_err(|_| Error::event("message headers are longer than 4 GiB"))?;
        self.buf[at..at + 4].copy_from_slice(&len.to_be_bytes());
        Ok(())
    }
}

fn put_name(buf: &mut Vec<u8>, name: &str) -> Result<()> {
    let len = check_short("header name", name)?;
    buf.push(len);
    buf.extend_from_slice(name.as_bytes());
    Ok(())
}

fn put_text(buf: &mut Vec<u8>, name: &str, value: &[u8]) -> Result<()> {
    put_name(buf, name)?;
    buf.push(b'S');
    buf.extend_from_slice(&text_len(name, value)?);
    buf.extend_from_slice(value);
    Ok(())
}

/// The length of a header's text, which AMQP puts before the text.
fn text_len(name: &str, value: &[u8]) -> Result<[u8; 4]> {
    let len = u32::try_from(value.len())
        .map_err(|_| Error::event(format!("header {name:?} is longer than 4 GiB")))?;
    Ok(len.to_be_bytes())
}

fn too_long(properties: &[u8]) -> Error {
    let largest = match largest::largest_header(properties) {
        Some((name, len)) => format!("; the largest header, {name:?}, has {len}"),
        None => String::new(),
    };
    let len = properties.len();
    Error::event(format!(
        "message properties and headers have {len} bytes, at most {PROPERTIES_MAX} are \
         allowed{largest}"
    ))
}

fn check_short(what: &str, text: &str) -> Result<u8> {
    u8::try_from(text.len()).map_err(|_| {
        Error::event(format!(
            "{what} has {} bytes, AMQP allows at most {SHORT_STRING_MAX}",
            text.len()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::protocol::basic::parse_properties;
    use amq_protocol::types::AMQPValue;

    const PROPERTIES: Properties<'static> = Properties {
        content_type: "application/json",
        message_id: Uuid::from_u128(7),
        timestamp: 1_700_000_000,
        kind: "order.created",
        app_id: "shop",
    };

    fn sample(scratch: &mut Vec<u8>) -> Builder<'_> {
        Builder::new(scratch, "order.created", PROPERTIES).unwrap()
    }

    #[test]
    fn properties_are_what_the_amqp_codec_reads() {
        let mut scratch = Vec::new();
        let mut builder = sample(&mut scratch);
        let own = OwnHeaders::of("orders");
        builder.own_headers(&own, Position::default(), "order/7", 1_700_000_000_123_456).unwrap();
        builder.header_int("n", -3).unwrap();
        builder.header_bool("b", true).unwrap();
        builder.header_void("v").unwrap();
        let message = builder.finish(ExchangeId(0), RouteId(1), |b| b.extend(b"{}")).unwrap();
        assert_eq!(message.routing_key(), b"order.created");
        assert_eq!(message.body(), b"{}");

        assert_eq!(message.key_text(), "order/7");

        let (rest, properties) = parse_properties(message.properties()).unwrap();
        assert!(rest.is_empty());
        let text = |s: &Option<amq_protocol::types::ShortString>| s.as_ref().unwrap().to_string();
        assert_eq!(text(properties.content_type()), "application/json");
        assert_eq!(text(properties.message_id()), Uuid::from_u128(7).to_string());
        assert_eq!(text(properties.kind()), "order.created");
        assert_eq!(text(properties.app_id()), "shop");
        assert_eq!(*properties.timestamp(), Some(1_700_000_000));
        assert_eq!(*properties.delivery_mode(), Some(2));
        let headers = properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers.len(), 7);
        let position = AMQPValue::LongString(Position::default().to_string().into());
        assert_eq!(headers["ws-position"], position);
        assert_eq!(headers["ws-committed-at"], AMQPValue::LongLongInt(1_700_000_000_123_456));
        assert_eq!(headers["n"], AMQPValue::LongLongInt(-3));
        assert_eq!(headers["b"], AMQPValue::Boolean(true));
        assert_eq!(headers["ws-route"], AMQPValue::LongString("orders".into()));
        assert_eq!(headers["ws-key"], AMQPValue::LongString("order/7".into()));
    }

    #[test]
    fn the_hash_of_a_route_never_changes() {
        assert_eq!(route_hash(""), NO_ROUTE_HASH);
        assert_eq!(route_hash("orders"), 0x0f4f_95cf_b44c_a775);
    }

    #[test]
    fn a_stored_message_is_what_it_was() {
        let mut scratch = Vec::new();
        let mut builder = sample(&mut scratch);
        let own = OwnHeaders::of("orders");
        builder.own_headers(&own, Position::default(), "order/7é", 0).unwrap();
        let message = builder.finish(ExchangeId(3), RouteId(1), |b| b.extend(b"{}")).unwrap();
        for key in [message.key_text(), ""] {
            let parts = Parts {
                key,
                routing_key: "order.created",
                properties: message.properties(),
                body: message.body(),
            };
            let again = Message::from_parts(&parts, ExchangeId(3), RouteId(1), message.id).unwrap();
            assert_eq!(again.routing_key(), message.routing_key());
            assert_eq!(again.properties(), message.properties());
            assert_eq!((again.body(), again.key_text()), (message.body(), key));
        }
    }

    #[test]
    fn a_large_message_leaves_no_large_scratch_space_behind() {
        let mut scratch = Vec::new();
        for len in [10, SCRATCH_KEPT, 4 * SCRATCH_KEPT, 20] {
            let body = vec![b'x'; len];
            let builder = sample(&mut scratch);
            let message = builder.finish(ExchangeId(0), RouteId(0), |b| b.extend(&body)).unwrap();
            assert_eq!(message.body(), body);
            assert!(scratch.capacity() <= 2 * SCRATCH_KEPT, "{len}: {}", scratch.capacity());
        }
    }

    #[test]
    fn refuses_what_amqp_cannot_carry() {
        let long = "x".repeat(256);
        let mut scratch = Vec::new();
        let mut builder = sample(&mut scratch);
        assert!(builder.header_text(&long, b"").is_err());
        let mut builder = sample(&mut scratch);
        builder.header_text("big", &vec![b'x'; PROPERTIES_MAX]).unwrap();
        let error = builder.finish(ExchangeId(0), RouteId(0), |_| {}).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Event);
        let error = Builder::new(&mut scratch, &long, PROPERTIES).err().unwrap();
        assert!(
            error.to_string().starts_with("routing key has 256 bytes, AMQP allows at most 255")
        );
    }
}
