//! A [`Publisher`] that publishes nothing: each message becomes a line of JSON.
//!
//! Invariant: every message that is taken gets one outcome, as with a broker. What is taken after
//! the last line that was asked for, or after the reader of the lines has gone, is confirmed and
//! not printed: nobody depends on it, because a dry run stores nothing.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::sync::Arc;

use amq_protocol::protocol::basic::{AMQPProperties, parse_properties};
use amq_protocol::types::AMQPValue;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::message::Message;
use crate::publisher::{Outcome, Publisher, Ticket};

/// Prints messages, one line each, by calling `print` with it.
pub struct Printer<F> {
    print: F,
    exchanges: Vec<String>,
    max_body: usize,
    /// Lines that are still to be printed.
    left: u64,
    taken: Vec<Ticket>,
    failed: Option<io::Error>,
    /// Becomes true when nothing more will be printed.
    over: Arc<watch::Sender<bool>>,
}

/// One message, in the order in which its parts are shown.
#[derive(Serialize)]
struct Line<'a> {
    exchange: &'a str,
    routing_key: &'a str,
    properties: BTreeMap<&'static str, Value>,
    headers: BTreeMap<&'a str, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    /// Where the body is not text.
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
}

impl<F> Printer<F>
where
    F: FnMut(&str) -> io::Result<()>,
{
    /// `exchanges` are those that messages name by index; `limit` is the number of lines after
    /// which `over` becomes true.
    pub fn new(
        print: F,
        exchanges: Vec<String>,
        max_body: usize,
        limit: Option<u64>,
        over: Arc<watch::Sender<bool>>,
    ) -> Self {
        let left = limit.unwrap_or(u64::MAX);
        Self { print, exchanges, max_body, left, taken: Vec::new(), failed: None, over }
    }

    fn line(&mut self, message: &Message) {
        let exchange = &self.exchanges[usize::from(message.exchange.0)];
        match line(exchange, message).and_then(|line| (self.print)(&line)) {
            Ok(()) => self.left -= 1,
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.left = 0,
            Err(error) => {
                self.failed.get_or_insert(error);
            }
        }
        if self.left == 0 {
            self.over.send_replace(true);
        }
    }
}

impl<F: FnMut(&str) -> io::Result<()>> Publisher for Printer<F> {
    fn send(&mut self, ticket: Ticket, message: &Message) {
        if self.left > 0 && self.failed.is_none() {
            self.line(message);
        }
        self.taken.push(ticket);
    }

    async fn next_outcomes(&mut self, outcomes: &mut Vec<(Ticket, Outcome)>) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(Error::internal(format!("the messages cannot be printed: {error}")));
        }
        if self.taken.is_empty() {
            return std::future::pending().await;
        }
        outcomes.extend(self.taken.drain(..).map(|ticket| (ticket, Outcome::Confirmed)));
        Ok(())
    }

    fn is_blocked(&self) -> bool {
        false
    }

    fn max_body(&self) -> usize {
        self.max_body
    }

    async fn close(self) {}
}

fn line(exchange: &str, message: &Message) -> io::Result<String> {
    let wrong = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    let (_, encoded) =
        parse_properties(message.properties()).map_err(|_| wrong("properties cannot be read"))?;
    let routing_key = std::str::from_utf8(message.routing_key())
        .map_err(|_| wrong("a routing key is not UTF-8"))?;
    let body = std::str::from_utf8(message.body()).ok();
    let headers = encoded.headers().as_ref().map(|headers| headers.inner());
    let headers = headers.into_iter().flatten();
    let line = Line {
        exchange,
        routing_key,
        properties: properties(&encoded),
        headers: headers.map(|(name, value)| (name.as_str(), shown(value))).collect(),
        body,
        body_base64: body.is_none().then(|| STANDARD.encode(message.body())),
    };
    Ok(serde_json::to_string(&line)?)
}

/// The text of a header in properties that were made here; absent without it.
pub fn text_header(properties: &[u8], name: &str) -> Option<String> {
    let (_, properties) = parse_properties(properties).ok()?;
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn properties(encoded: &AMQPProperties) -> BTreeMap<&'static str, Value> {
    let text = |value: &Option<amq_protocol::types::ShortString>| {
        value.as_ref().map(|value| json!(value.as_str()))
    };
    let all = [
        ("content_type", text(encoded.content_type())),
        ("content_encoding", text(encoded.content_encoding())),
        ("delivery_mode", encoded.delivery_mode().map(|mode| json!(mode))),
        ("priority", encoded.priority().map(|priority| json!(priority))),
        ("correlation_id", text(encoded.correlation_id())),
        ("expiration", text(encoded.expiration())),
        ("message_id", text(encoded.message_id())),
        ("timestamp", encoded.timestamp().map(|seconds| json!(seconds))),
        ("type", text(encoded.kind())),
        ("app_id", text(encoded.app_id())),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// A header as JSON. The relay writes none of the types that are shown by their name.
fn shown(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(yes) => json!(yes),
        AMQPValue::LongInt(int) => json!(int),
        AMQPValue::LongLongInt(int) => json!(int),
        AMQPValue::Timestamp(seconds) => json!(seconds),
        AMQPValue::Double(double) => json!(double),
        AMQPValue::LongString(text) => json!(String::from_utf8_lossy(text.as_bytes())),
        AMQPValue::ShortString(text) => json!(text.as_str()),
        AMQPValue::Void => Value::Null,
        other => json!(format!("{other:?}")),
    }
}
