//! The message of a delivery: its properties and headers, as JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::AMQPValue;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::Message;

/// The header with the key, which the relay sets.
const KEY: &str = "ws-key";
/// The header with the failed deliveries, which quorum queues set.
const DELIVERY_COUNT: &str = "x-delivery-count";

impl Message {
    /// Reads a delivery. It cannot fail: what is missing is absent, and a message without an id (or
    /// with one that Postgres cannot store) gets one from its body, with [`Message::has_id`] false.
    pub fn parse(delivery: &Delivery) -> Self {
        let properties = &delivery.properties;
        let own_id = properties.message_id().as_ref().map(|id| id.as_str());
        let own_id = own_id.filter(|id| !id.is_empty() && !id.contains('\0'));
        let header = |name: &str| properties.headers().as_ref()?.inner().get(name).map(value);
        let mut described = describe(properties);
        described.insert("exchange".into(), text(delivery.exchange.as_str()).into());
        described.insert("routing_key".into(), text(delivery.routing_key.as_str()).into());
        Self {
            id: own_id.map_or_else(|| id_of(&delivery.data), str::to_owned),
            has_id: own_id.is_some(),
            occurred_at: *properties.timestamp(),
            key: header(KEY).and_then(|key| key_of(&key)),
            body: delivery.data.clone(),
            properties: described,
            redelivered: delivery.redelivered,
            delivery_count: header(DELIVERY_COUNT).and_then(|n| n.as_u64()).unwrap_or(0),
        }
    }

    /// A message that was parked.
    pub(in crate::inbox) fn parked(
        id: String,
        occurred_at: Option<f64>,
        key: Option<String>,
        body: Vec<u8>,
        properties: Value,
    ) -> Self {
        let properties = match properties {
            Value::Object(properties) => properties,
            _ => Map::new(),
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds")]
        let occurred_at = occurred_at.map(|at| at.max(0.0) as u64);
        Self { key, properties, ..Self::new(id, occurred_at, body) }
    }
}

/// The id of a message that has none.
fn id_of(body: &[u8]) -> String {
    let hash: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256-{hash}")
}

/// A key is text; a number of a foreign producer is taken as its digits.
fn key_of(key: &Value) -> Option<String> {
    match key {
        Value::String(key) => Some(key.clone()),
        Value::Number(key) => Some(key.to_string()),
        _ => None,
    }
}

/// The properties that are set, under AMQP's names.
fn describe(properties: &BasicProperties) -> Map<String, Value> {
    let mut described = Map::new();
    for (name, property) in [
        ("content_type", properties.content_type()),
        ("content_encoding", properties.content_encoding()),
        ("correlation_id", properties.correlation_id()),
        ("reply_to", properties.reply_to()),
        ("expiration", properties.expiration()),
        ("message_id", properties.message_id()),
        ("type", properties.kind()),
        ("user_id", properties.user_id()),
        ("app_id", properties.app_id()),
    ] {
        if let Some(property) = property {
            described.insert(name.into(), text(property.as_str()).into());
        }
    }
    for (name, number) in
        [("delivery_mode", properties.delivery_mode()), ("priority", properties.priority())]
    {
        if let Some(number) = number {
            described.insert(name.into(), (*number).into());
        }
    }
    if let Some(at) = properties.timestamp() {
        described.insert("timestamp".into(), (*at).into());
    }
    if let Some(headers) = properties.headers() {
        let fields = headers.inner().iter();
        let fields = fields.map(|(name, field)| (text(name.as_str()), value(field)));
        described.insert("headers".into(), Value::Object(fields.collect()));
    }
    described
}

/// A field of a table as JSON. Bytes that are no text become `{"base64": "…"}`.
fn value(field: &AMQPValue) -> Value {
    match field {
        AMQPValue::Boolean(yes) => (*yes).into(),
        AMQPValue::ShortShortInt(n) => (*n).into(),
        AMQPValue::ShortShortUInt(n) => (*n).into(),
        AMQPValue::ShortInt(n) => (*n).into(),
        AMQPValue::ShortUInt(n) => (*n).into(),
        AMQPValue::LongInt(n) => (*n).into(),
        AMQPValue::LongUInt(n) => (*n).into(),
        AMQPValue::LongLongInt(n) => (*n).into(),
        AMQPValue::Timestamp(n) => (*n).into(),
        AMQPValue::Float(n) => number(f64::from(*n)),
        AMQPValue::Double(n) => number(*n),
        AMQPValue::DecimalValue(n) => format!("{}e-{}", n.value, n.scale).into(),
        AMQPValue::ShortString(value) => text(value.as_str()).into(),
        AMQPValue::LongString(value) => bytes(value.as_bytes()),
        AMQPValue::ByteArray(value) => bytes(value.as_slice()),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(value).collect(),
        AMQPValue::FieldTable(table) => {
            let fields = table.inner().iter();
            Value::Object(fields.map(|(name, v)| (text(name.as_str()), value(v))).collect())
        }
        AMQPValue::Void => Value::Null,
    }
}

/// JSON has no infinity.
fn number(n: f64) -> Value {
    serde_json::Number::from_f64(n).map_or_else(|| n.to_string().into(), Value::Number)
}

fn bytes(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(utf8) => text(utf8).into(),
        Err(_) => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

/// Postgres stores no zero character.
fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use lapin::types::{FieldTable, ShortString};

    use super::*;

    fn delivery(properties: BasicProperties) -> Delivery {
        let (exchange, key) = (ShortString::from("shop"), ShortString::from("order.paid"));
        let mut delivery = Delivery::mock(7, exchange, key, true, b"{}".to_vec());
        delivery.properties = properties;
        delivery
    }

    fn headers(list: &[(&str, AMQPValue)]) -> FieldTable {
        let mut table = FieldTable::default();
        for (name, value) in list {
            table.insert((*name).into(), value.clone());
        }
        table
    }

    #[test]
    fn id_time_key_and_headers_come_from_the_delivery() {
        let table = headers(&[
            ("ws-key", AMQPValue::LongString("o7".into())),
            ("x-delivery-count", AMQPValue::LongLongInt(3)),
            ("traceparent", AMQPValue::LongString("00-a-b-01".into())),
            ("raw", AMQPValue::ByteArray(vec![0xff, 0].as_slice().into())),
            ("nan", AMQPValue::Double(f64::NAN)),
            ("zero", AMQPValue::LongString("a\0b".into())),
        ]);
        let properties = BasicProperties::default()
            .with_message_id("m1".into())
            .with_timestamp(1_700_000_000)
            .with_type("paid".into())
            .with_content_type("application/json".into())
            .with_headers(table);
        let message = Message::parse(&delivery(properties));
        assert_eq!((message.id.as_str(), message.has_id), ("m1", true));
        assert_eq!(message.occurred_at, Some(1_700_000_000));
        assert_eq!((message.key.as_deref(), message.delivery_count), (Some("o7"), 3));
        assert_eq!((message.exchange(), message.routing_key()), ("shop", "order.paid"));
        assert_eq!(message.event_type(), Some("paid"));
        assert_eq!(message.content_type(), Some("application/json"));
        assert_eq!(message.traceparent(), Some("00-a-b-01"));
        assert_eq!(message.header("raw"), Some(&json!({"base64": "/wA="})));
        assert_eq!(message.header("nan"), Some(&json!("NaN")));
        assert_eq!(message.header("zero"), Some(&json!("a\u{fffd}b")));
        assert!(message.came_back());
    }

    #[test]
    fn a_message_without_an_id_that_can_be_stored_gets_one_from_its_body() {
        let hash = "sha256-44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        for properties in [
            BasicProperties::default(),
            BasicProperties::default().with_message_id("".into()),
            BasicProperties::default().with_message_id("a\0b".into()),
        ] {
            let message = Message::parse(&delivery(properties));
            assert_eq!((message.id.as_str(), message.has_id), (hash, false));
            assert_eq!((message.occurred_at, message.key), (None, None));
        }
    }
}
