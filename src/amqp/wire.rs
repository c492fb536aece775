//! AMQP 0-9-1 frames to bytes and back. Pure: no socket, no clock.
//!
//! The two frames that occur per message are coded by hand: a publish (method, content header,
//! body frames) and `basic.ack`. Everything else goes through `amq-protocol`. A property test
//! holds the hand-written publish against `amq-protocol`'s own encoding.
//!
//! Invariant: a frame above `frame_max` is refused before anything is allocated for it, and no
//! input panics. Nothing that holds a table is given to `amq-protocol`, because nested tables
//! recurse: of content headers only the message id is read, of `connection.start` the mechanisms.

use amq_protocol::frame::{AMQPFrame, WriteContext, gen_frame, parse_frame};
use amq_protocol::protocol::AMQPClass;
use uuid::Uuid;

use super::client::NOT_RABBITMQ;
use crate::error::{Error, Result};
use crate::message::{Message, ROUTE_HEADER, route_hash};

/// What a client sends first: protocol id, then version 0-9-1.
pub const PROTOCOL_HEADER: &[u8; 8] = b"AMQP\x00\x00\x09\x01";

/// Bytes around a frame's payload: type, channel, size before it and the end mark after it.
pub const FRAME_OVERHEAD: usize = HEAD + 1;

/// The largest frame that we ask for, in bytes; RabbitMQ's own default.
pub const FRAME_MAX: usize = 131_072;

const HEAD: usize = 7;
const END: u8 = 0xCE;
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const BASIC: [u8; 2] = [0, 60];
const BASIC_PUBLISH: [u8; 4] = [0, 60, 0, 40];
const BASIC_ACK: [u8; 4] = [0, 60, 0, 80];
const MANDATORY: u8 = 1;
const CONNECTION_START: [u8; 4] = [0, 10, 0, 10];

/// Class and method of what a broker sends to a publisher, without those that carry a table.
#[rustfmt::skip]
const RECEIVED: [(u8, u8); 18] = [
    // connection: secure, tune, open-ok, close, close-ok, blocked, unblocked
    (10, 20), (10, 30), (10, 41), (10, 50), (10, 51), (10, 60), (10, 61),
    // channel: open-ok, close, close-ok
    (20, 11), (20, 40), (20, 41),
    // queue.declare-ok, basic: consume-ok, cancel, return, deliver, ack of an odd length, nack
    (50, 11), (60, 21), (60, 30), (60, 50), (60, 60), (60, 80), (60, 120),
    // confirm.select-ok
    (85, 11),
];

/// One received frame, as far as a publisher cares.
#[derive(Debug, Clone, PartialEq)]
pub enum Incoming {
    /// `basic.ack`: the broker confirms.
    Ack {
        /// Channel number.
        channel: u16,
        /// Delivery tag.
        tag: u64,
        /// Whether all tags up to this one are meant.
        multiple: bool,
    },
    /// `connection.start`: the broker's SASL mechanisms, separated by spaces.
    Start(String),
    /// Any other method that a broker may send to a publisher.
    Method(u16, AMQPClass),
    /// Content header of a returned message.
    ContentHeader {
        /// Channel number.
        channel: u16,
        /// Bytes of body that follow.
        body_size: u64,
        /// The `message_id` property, if it is there and a uuid.
        message_id: Option<Uuid>,
        /// [`route_hash`] of the message.
        route: u64,
    },
    /// Piece of a returned message's body; the bytes themselves do not matter.
    ContentBody {
        /// Channel number.
        channel: u16,
        /// Bytes in this piece.
        len: u64,
    },
    /// The broker is alive.
    Heartbeat,
}

/// Takes one frame off the front of `bytes`: the frame and its length, or `None` when more bytes
/// are needed.
///
/// # Errors
/// [`crate::error::Kind::Protocol`] for a frame above `frame_max` bytes, an unknown frame type, a
/// missing end mark or a method that AMQP 0-9-1 does not have.
pub fn parse(bytes: &[u8], frame_max: usize) -> Result<Option<(Incoming, usize)>> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else {
        return match bytes.first() {
            Some(kind) => known_type(*kind).map(|()| None),
            None => Ok(None),
        };
    };
    let [kind, c0, c1, s0, s1, s2, s3] = *head;
    known_type(kind)?;
    let channel = u16::from_be_bytes([c0, c1]);
    let size = u32::from_be_bytes([s0, s1, s2, s3]) as usize;
    let len = size.saturating_add(FRAME_OVERHEAD);
    if len > frame_max {
        return Err(Error::protocol(format!(
            "broker sent a frame of {len} bytes, which exceeds the negotiated {frame_max}"
        )));
    }
    let (Some(payload), Some(end)) = (rest.get(..size), rest.get(size)) else { return Ok(None) };
    if *end != END {
        return Err(Error::protocol(format!(
            "broker sent a frame that ends with byte {end:#04x}, not 0xce"
        )));
    }
    let frame = match kind {
        METHOD => parse_method(channel, payload, &bytes[..len])?,
        HEADER => parse_content_header(channel, payload)?,
        BODY => Incoming::ContentBody { channel, len: size as u64 },
        _ => Incoming::Heartbeat,
    };
    Ok(Some((frame, len)))
}

fn known_type(kind: u8) -> Result<()> {
    match kind {
        METHOD | HEADER | BODY | HEARTBEAT => Ok(()),
        b'A' => Err(Error::protocol("the server does not speak AMQP 0-9-1").hint(NOT_RABBITMQ)),
        other => Err(Error::protocol(format!("broker sent a frame of unknown type {other}"))
            .hint(NOT_RABBITMQ)),
    }
}

fn parse_method(channel: u16, payload: &[u8], frame: &[u8]) -> Result<Incoming> {
    if let Some((&BASIC_ACK, arguments)) = payload.split_first_chunk::<4>()
        && let Some((tag, &[bits])) = arguments.split_first_chunk::<8>()
    {
        return Ok(Incoming::Ack {
            channel,
            tag: u64::from_be_bytes(*tag),
            multiple: bits & 1 == 1,
        });
    }
    let bad = || {
        let id = payload.get(..4).unwrap_or(payload);
        Error::protocol(format!("broker sent an unreadable method, id {id:?}"))
    };
    let (id, arguments) = payload.split_first_chunk::<4>().ok_or_else(bad)?;
    if *id == CONNECTION_START {
        return parse_start(arguments).map(Incoming::Start).ok_or_else(bad);
    }
    if !RECEIVED.contains(&(id[1], id[3])) || id[0] != 0 || id[2] != 0 {
        return Err(bad());
    }
    match parse_frame(frame) {
        Ok((_, AMQPFrame::Method(channel, class))) => Ok(Incoming::Method(channel, class)),
        Ok(_) | Err(_) => Err(bad()),
    }
}

/// The mechanisms: after two version bytes and the server's properties, which are skipped.
fn parse_start(arguments: &[u8]) -> Option<String> {
    let (table_len, rest) = arguments.get(2..)?.split_first_chunk::<4>()?;
    let rest = rest.get(u32::from_be_bytes(*table_len) as usize..)?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let mechanisms = rest.get(..u32::from_be_bytes(*len) as usize)?;
    Some(String::from_utf8_lossy(mechanisms).into_owned())
}

/// Reads the property list up to the message id, AMQP 0-9-1 section 4.2.6.1.
fn parse_content_header(channel: u16, payload: &[u8]) -> Result<Incoming> {
    let bad = || Error::protocol("broker sent an unreadable content header");
    let rest = payload.strip_prefix(&BASIC).ok_or_else(bad)?;
    let (size, rest) = rest.get(2..).and_then(|r| r.split_first_chunk::<8>()).ok_or_else(bad)?;
    let (flags, list) = rest.split_first_chunk::<2>().ok_or_else(bad)?;
    let body_size = u64::from_be_bytes(*size);
    let (message_id, route) = message_id(u16::from_be_bytes(*flags), list).ok_or_else(bad)?;
    Ok(Incoming::ContentHeader { channel, body_size, message_id, route })
}

/// Message id and [`route_hash`]. The outer `None`: the list ends too early. The inner one: there
/// has no id, or it is not a uuid.
fn message_id(flags: u16, mut list: &[u8]) -> Option<(Option<Uuid>, u64)> {
    let mut route = "";
    const MESSAGE_ID_BIT: u16 = 7;
    for bit in (MESSAGE_ID_BIT..16).rev().filter(|bit| flags & (1 << bit) != 0) {
        let len = match bit {
            // headers: a table with a long length
            13 => {
                let (len, rest) = list.split_first_chunk::<4>()?;
                list = rest;
                u32::from_be_bytes(*len) as usize
            }
            // delivery_mode and priority: one byte
            12 | 11 => 1,
            // content_type, content_encoding, correlation_id, reply_to, expiration, message_id
            _ => {
                let (len, rest) = list.split_first()?;
                list = rest;
                usize::from(*len)
            }
        };
        if bit == MESSAGE_ID_BIT {
            return Some((Uuid::try_parse_ascii(list.get(..len)?).ok(), route_hash(route)));
        }
        if bit == 13 {
            route = route_of(list.get(..len)?);
        }
        list = list.get(len..)?;
    }
    Some((None, route_hash(route)))
}

/// The [`ROUTE_HEADER`] of a returned message; empty when it has none, or when a header before it
/// is of a type that the relay does not write. What the broker sends back is the only place that
/// says which of an event's messages was returned.
fn route_of(mut headers: &[u8]) -> &str {
    while let Some((header, rest)) = next_header(headers) {
        if header.kind == b'S' && header.name == ROUTE_HEADER.as_bytes() {
            return std::str::from_utf8(header.value).unwrap_or_default();
        }
        headers = rest;
    }
    ""
}

struct Header<'a> {
    name: &'a [u8],
    kind: u8,
    value: &'a [u8],
}

/// The first header and what follows, AMQP 0-9-1 section 4.2.5.5. Nested tables are not entered.
fn next_header(headers: &[u8]) -> Option<(Header<'_>, &[u8])> {
    let (&len, rest) = headers.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(len))?;
    let (&kind, rest) = rest.split_first()?;
    let (value, rest) = match kind {
        b'S' => {
            let (len, rest) = rest.split_first_chunk::<4>()?;
            rest.split_at_checked(u32::from_be_bytes(*len) as usize)?
        }
        b'l' | b'd' => rest.split_at_checked(8)?,
        b't' => rest.split_at_checked(1)?,
        b'V' => (&[][..], rest),
        _ => return None,
    };
    Some((Header { name, kind, value }, rest))
}

/// Appends method, header and body frames of one mandatory `basic.publish`.
///
/// # Panics
/// When the names or the properties do not fit: the caller made them fit.
pub fn put_publish(
    out: &mut Vec<u8>,
    channel: u16,
    exchange: &str,
    message: &Message,
    frame_max: usize,
) {
    let (key, properties, body) = (message.routing_key(), message.properties(), message.body());
    let exchange_len = u8::try_from(exchange.len()).expect("exchange names were checked at open");
    let key_len = u8::try_from(key.len()).expect("a message's routing key has at most 255 bytes");
    let header_len = BASIC.len() + 2 + 8 + properties.len();
    let piece_max = frame_max - FRAME_OVERHEAD;
    assert!(header_len <= piece_max, "message properties fit one frame");
    out.reserve(96 + exchange.len() + key.len() + properties.len() + body.len());

    put_head(
        out,
        METHOD,
        channel,
        BASIC_PUBLISH.len() + 2 + 1 + exchange.len() + 1 + key.len() + 1,
    );
    out.extend_from_slice(&BASIC_PUBLISH);
    out.extend_from_slice(&[0, 0, exchange_len]);
    out.extend_from_slice(exchange.as_bytes());
    out.push(key_len);
    out.extend_from_slice(key);
    out.extend_from_slice(&[MANDATORY, END]);

    put_head(out, HEADER, channel, header_len);
    out.extend_from_slice(&BASIC);
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&(body.len() as u64).to_be_bytes());
    out.extend_from_slice(properties);
    out.push(END);

    for piece in body.chunks(piece_max) {
        put_head(out, BODY, channel, piece.len());
        out.extend_from_slice(piece);
        out.push(END);
    }
}

fn put_head(out: &mut Vec<u8>, kind: u8, channel: u16, size: usize) {
    let [c0, c1] = channel.to_be_bytes();
    let size = u32::try_from(size).expect("a frame is far below 4 GiB");
    let [s0, s1, s2, s3] = size.to_be_bytes();
    out.extend_from_slice(&[kind, c0, c1, s0, s1, s2, s3]);
}

/// Appends one method frame.
pub fn put_method(out: &mut Vec<u8>, channel: u16, class: AMQPClass) {
    let frame = AMQPFrame::Method(channel, class);
    let context = gen_frame::<Vec<u8>>(&frame)(WriteContext::from(Vec::new()))
        .expect("a method with checked strings can be written to memory");
    out.extend_from_slice(&context.into_inner().0);
}

/// Appends a heartbeat frame.
pub fn put_heartbeat(out: &mut Vec<u8>) {
    out.extend_from_slice(&[HEARTBEAT, 0, 0, 0, 0, 0, 0, END]);
}

/// Length of the frame that starts `bytes`, which we wrote ourselves.
pub fn frame_len(bytes: &[u8]) -> usize {
    let size: [u8; 4] = bytes[3..HEAD].try_into().expect("four bytes");
    u32::from_be_bytes(size) as usize + FRAME_OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::frame::AMQPContentHeader;
    use amq_protocol::protocol::basic::{AMQPMethod, Publish, parse_properties};
    use proptest::prelude::*;

    use crate::message::{Builder, ExchangeId, NO_ROUTE_HASH, Properties, RouteId};

    fn message(key: &str, header: &str, body: &[u8]) -> Message {
        let properties = Properties {
            content_type: "application/json",
            message_id: Uuid::from_u128(77),
            timestamp: 1_700_000_000,
            kind: "order.created",
            app_id: "shop",
        };
        let mut scratch = Vec::new();
        let mut builder = Builder::new(&mut scratch, key, properties).unwrap();
        // In the order of their names, as the codec writes them.
        builder.header_void("a").unwrap();
        builder.header_int("b", 1).unwrap();
        builder.header_bool("c", true).unwrap();
        builder.header_text("ws-key", header.as_bytes()).unwrap();
        builder.header_text(ROUTE_HEADER, header.as_bytes()).unwrap();
        let write = |out: &mut Vec<u8>| out.extend_from_slice(body);
        let mut message = builder.finish(ExchangeId(0), RouteId(0), write).unwrap();
        message.route_hash = route_hash(header);
        message
    }

    fn generated(frame: &AMQPFrame) -> Vec<u8> {
        let context = gen_frame::<Vec<u8>>(frame)(WriteContext::from(Vec::new())).unwrap();
        context.into_inner().0
    }

    fn reference(channel: u16, exchange: &str, message: &Message, frame_max: usize) -> Vec<u8> {
        let routing_key = std::str::from_utf8(message.routing_key()).unwrap();
        let publish = AMQPMethod::Publish(Publish {
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            mandatory: true,
            immediate: false,
        });
        let (_, properties) = parse_properties(message.properties()).unwrap();
        let body_size = message.body().len() as u64;
        let header = AMQPContentHeader { class_id: 60, body_size, properties };
        let mut out = generated(&AMQPFrame::Method(channel, AMQPClass::Basic(publish)));
        out.extend(generated(&AMQPFrame::Header(channel, header)));
        for piece in message.body().chunks(frame_max - FRAME_OVERHEAD) {
            out.extend(generated(&AMQPFrame::Body(channel, piece.to_vec())));
        }
        out
    }

    fn parse_all(mut bytes: &[u8], frame_max: usize) -> Result<Vec<Incoming>> {
        let mut frames = Vec::new();
        while let Some((frame, len)) = parse(bytes, frame_max)? {
            frames.push(frame);
            bytes = &bytes[len..];
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn publish_is_what_the_amqp_codec_writes(
            channel in 1u16.., exchange in "[a-z.]{0,255}", key in "[a-z.é]{0,120}",
            header in ".{0,60}", body in proptest::collection::vec(any::<u8>(), 0..9000),
        ) {
            let message = message(&key, &header, &body);
            let mut out = Vec::new();
            put_publish(&mut out, channel, &exchange, &message, 4096);
            prop_assert_eq!(&out, &reference(channel, &exchange, &message, 4096));
            // The same frames come back as they do in a return: header with id, then the body.
            let frames = parse_all(&out[frame_len(&out)..], 4096).unwrap();
            prop_assert_eq!(&frames[0], &Incoming::ContentHeader {
                channel, body_size: body.len() as u64, message_id: Some(message.id),
                route: message.route_hash,
            });
            let len: u64 = frames[1..].iter().map(|f| match f {
                Incoming::ContentBody { len, .. } => *len,
                other => panic!("{other:?}"),
            }).sum();
            prop_assert_eq!(len, body.len() as u64);
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0u8..10,
        ) {
            let _ = parse_all(&bytes, 4096);
            // And as the payload of a well-formed frame, which gets further.
            let mut frame = Vec::new();
            put_head(&mut frame, kind, 1, bytes.len());
            frame.extend_from_slice(&bytes);
            frame.push(END);
            let _ = parse_all(&frame, 4096);
        }

        #[test]
        fn ack_is_what_the_amqp_codec_reads(channel: u16, tag: u64, multiple: bool) {
            let ack = amq_protocol::protocol::basic::Ack { delivery_tag: tag, multiple };
            let class = AMQPClass::Basic(AMQPMethod::Ack(ack));
            let bytes = generated(&AMQPFrame::Method(channel, class));
            let expected = (Incoming::Ack { channel, tag, multiple }, bytes.len());
            prop_assert_eq!(bytes.len(), 21);
            prop_assert_eq!(parse(&bytes, 4096).unwrap(), Some(expected));
            for cut in 0..bytes.len() {
                prop_assert_eq!(parse(&bytes[..cut], 4096).unwrap(), None);
            }
        }
    }

    #[test]
    fn frame_above_the_agreed_size_is_refused_before_it_arrives() {
        let mut head = Vec::new();
        put_head(&mut head, METHOD, 0, 4096 - FRAME_OVERHEAD + 1);
        let error = parse(&head, 4096).unwrap_err();
        assert_eq!(
            error.to_string(),
            "broker sent a frame of 4097 bytes, which exceeds the negotiated 4096"
        );
        head.clear();
        put_head(&mut head, METHOD, 0, 4096 - FRAME_OVERHEAD);
        assert_eq!(parse(&head, 4096).unwrap(), None);
    }

    #[test]
    fn deeply_nested_tables_of_a_hostile_return_are_skipped() {
        let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0];
        payload.extend_from_slice(&100_000u32.to_be_bytes());
        payload.extend(std::iter::repeat_n(*b"\x01aF\x00\x00\x7f\xff", 14_285).flatten());
        payload.extend_from_slice(&[0; 5]);
        let mut frame = Vec::new();
        put_head(&mut frame, HEADER, 3, payload.len());
        frame.extend_from_slice(&payload);
        frame.push(END);
        let (frame, _) = parse(&frame, FRAME_MAX).unwrap().unwrap();
        let expected = Incoming::ContentHeader {
            channel: 3,
            body_size: 0,
            message_id: None,
            route: NO_ROUTE_HASH,
        };
        assert_eq!(frame, expected);
    }
}
