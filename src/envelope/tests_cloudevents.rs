//! CloudEvents 1.0: attributes as headers, and as one JSON object.

use std::sync::Arc;

use amq_protocol::protocol::basic::parse_properties;
use amq_protocol::types::AMQPValue;
use bytes::Bytes;
use serde_json::{Value as Json, json};

use super::tests::{event, message, outbox, rule, table};
use crate::column::oid;
use crate::event::{Change, Column, Content, Event, Identity, OutboxPayload, Value};
use crate::message::Message;
use crate::route::{CloudEvents, Format};

const ID: &str = "00000000-0000-0000-0000-000000000007";
const TIME: &str = "2026-01-02T03:04:05.678901Z";

fn made(event: &Event, options: &CloudEvents) -> crate::error::Result<Message> {
    message(event, rule(event, Format::CloudEvents(Arc::new(options.clone()))), 0)
}

/// The attributes in headers, and the content type.
fn attributes(message: &Message) -> (Vec<(String, String)>, String) {
    let (_, properties) = parse_properties(message.properties()).unwrap();
    let headers = properties.headers().as_ref().unwrap().inner();
    let attribute = |(name, value): (&_, &AMQPValue)| {
        let name: &amq_protocol::types::ShortString = name;
        let name = name.as_str().strip_prefix("cloudEvents_")?.to_owned();
        match value {
            AMQPValue::LongString(text) => Some((name, text.to_string())),
            other => panic!("{name} is {other:?}"),
        }
    };
    let list = headers.iter().filter_map(attribute).collect();
    (list, properties.content_type().as_ref().unwrap().to_string())
}

fn order(payload: OutboxPayload) -> Event {
    let mut event = outbox(payload);
    let Content::Outbox(row) = &mut event.content else { unreachable!() };
    row.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    event
}

fn json_payload() -> OutboxPayload {
    OutboxPayload::Json(Bytes::from_static(b"{\"total\": 10.50}"))
}

#[test]
fn in_binary_mode_the_body_is_the_data_and_attributes_are_headers() {
    let options = CloudEvents {
        type_prefix: "com.example.".into(),
        dataschema: "https://example.com/order.json".into(),
        ..CloudEvents::default()
    };
    let got = made(&order(json_payload()), &options).unwrap();
    assert_eq!(got.body(), b"{\"total\": 10.50}");
    let (list, content_type) = attributes(&got);
    let expected = [
        ("dataschema", "https://example.com/order.json"),
        ("id", ID),
        ("partitionkey", "order/42"),
        ("source", "/shop/public.outbox"),
        ("specversion", "1.0"),
        ("subject", "order/42"),
        ("time", TIME),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("type", "com.example.created"),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!((list, &*content_type), (expected.into(), "application/json"));
}

#[test]
fn in_structured_mode_all_of_it_is_one_json_object() {
    let options = CloudEvents { structured: true, source: "urn:shop".into(), ..Default::default() };
    let got = made(&order(json_payload()), &options).unwrap();
    let (list, content_type) = attributes(&got);
    assert_eq!((list.len(), &*content_type), (0, "application/cloudevents+json"));
    let text = str::from_utf8(got.body()).unwrap();
    assert!(text.ends_with(",\"data\":{\"total\": 10.50}}"), "{text}");
    let expected = json!({
        "specversion": "1.0", "id": ID, "source": "urn:shop", "type": "created",
        "subject": "order/42", "time": TIME, "partitionkey": "order/42",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "datacontenttype": "application/json", "data": {"total": 10.50},
    });
    assert_eq!(serde_json::from_slice::<Json>(got.body()).unwrap(), expected);
    let bytes = order(OutboxPayload::Hex(Bytes::from_static(b"\\x00ff")));
    let body: Json = serde_json::from_slice(made(&bytes, &options).unwrap().body()).unwrap();
    assert_eq!(body["datacontenttype"], "application/octet-stream");
    assert_eq!((&body["data_base64"], &body["data"]), (&json!("AP8="), &Json::Null));
}

#[test]
fn the_data_of_a_captured_change_is_what_format_watership_makes_of_it() {
    let columns = vec![Column::new("id", oid::INT4, -1)];
    let identity = Identity::Columns(vec![0]);
    let table =
        crate::event::Table { columns, key: vec![0], identity, ..table("gr\u{f6}\u{df}en") };
    let new = [Value::Text(Bytes::from_static(b"7"))].into();
    let event = event(table, Content::Change(Change::Insert { new }));
    let own = message(&event, rule(&event, Format::Watership), 0).unwrap();
    let binary = made(&event, &CloudEvents::default()).unwrap();
    assert_eq!(binary.body(), own.body());
    let (list, _) = attributes(&binary);
    let value = |name: &str| &list.iter().find(|(known, _)| known == name).unwrap().1;
    assert_eq!(value("source"), "/shop/public.gr%C3%B6%C3%9Fen");
    assert_eq!(value("type"), "public.gr\u{f6}\u{df}en.insert");
    assert_eq!(value("subject"), "public.gr\u{f6}\u{df}en/7");
    let options = CloudEvents { structured: true, ..CloudEvents::default() };
    let structured = made(&event, &options).unwrap();
    let body: Json = serde_json::from_slice(structured.body()).unwrap();
    assert_eq!(body["data"], serde_json::from_slice::<Json>(own.body()).unwrap());
}

#[test]
fn what_cannot_be_an_attribute_is_an_error_and_an_application_does_not_set_them() {
    let with_type = |kind: &'static str| {
        let mut event = order(json_payload());
        let Content::Outbox(row) = &mut event.content else { unreachable!() };
        row.event_type = kind.into();
        row.headers = Some(Bytes::from_static(b"{\"cloudEvents_id\": \"x\", \"a\": \"b\"}"));
        made(&event, &CloudEvents::default())
    };
    for (kind, text) in [("", "the event type is empty"), ("a\u{7}", "has a control character")] {
        let error = with_type(kind).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let (list, _) = attributes(&with_type("created").unwrap());
    assert_eq!(list.iter().filter(|(name, _)| name == "id").count(), 1);
    assert!(list.contains(&("id".to_owned(), ID.to_owned())), "{list:?}");
}

fn refused(event: &Event, options: &CloudEvents) -> String {
    made(event, options).unwrap_err().text_with_hint()
}

#[test]
fn source_and_type_can_be_templates_in_both_modes() {
    let columns = vec![Column::new("id", oid::INT4, -1), Column::new("tenant", oid::TEXT, -1)];
    let identity = Identity::Columns(vec![0]);
    let table = crate::event::Table { columns, key: vec![0], identity, ..table("t") };
    let row = |tenant: Option<&'static str>| -> crate::event::Row {
        let text = |text: &'static str| Value::Text(Bytes::from_static(text.as_bytes()));
        [text("7"), tenant.map_or(Value::Null, text)].into()
    };
    let insert =
        |tenant| event(table.clone(), Content::Change(Change::Insert { new: row(tenant) }));
    for structured in [false, true] {
        let options = CloudEvents {
            structured,
            source: "urn:shop:{column.tenant}/{table}".into(),
            kind: "com.example.{table}.{op}".into(),
            ..CloudEvents::default()
        };
        let got = made(&insert(Some("a/b \u{e9}")), &options).unwrap();
        let value = |name: &str| match structured {
            true => {
                serde_json::from_slice::<Json>(got.body()).unwrap()[name].as_str().map(Into::into)
            }
            false => {
                attributes(&got).0.into_iter().find(|(known, _)| known == name).map(|(_, v)| v)
            }
        };
        assert_eq!(value("source").as_deref(), Some("urn:shop:a%2Fb%20%C3%A9/t"));
        assert_eq!(value("type").as_deref(), Some("com.example.t.insert"));
        let error = refused(&insert(None), &options);
        let expected = "the CloudEvents attribute \"source\": column \"tenant\" is in a template";
        assert!(error.contains(expected), "{error}");
        let control =
            CloudEvents { source: String::new(), kind: "{column.tenant}".into(), ..options };
        assert!(refused(&insert(Some("a\u{7}")), &control).contains("has a control character"));
        assert!(refused(&insert(Some("")), &control).contains("the event type is empty"));
    }
    let options =
        CloudEvents { kind: "{aggregate_type}.{event_type}".into(), ..Default::default() };
    let (list, _) = attributes(&made(&order(json_payload()), &options).unwrap());
    assert!(list.contains(&("type".to_owned(), "order.created".to_owned())), "{list:?}");
}

#[test]
fn templates_of_attributes_that_cannot_be_followed_are_refused_at_start() {
    let text = |text: &str| text.to_owned();
    for (options, expected) in [
        (
            CloudEvents { source: text("/a/{table}"), ..Default::default() },
            "cloudevents.source \"/a/{table}\": field \"table\" is not known here, allowed are: ",
        ),
        (
            CloudEvents { source: text("/a b/{key}"), ..Default::default() },
            "expected a URI or a path, percent-encoded",
        ),
        (
            CloudEvents { kind: text("{key"), ..Default::default() },
            "cloudevents.type \"{key\": a \"{\" without \"}\"",
        ),
        (
            CloudEvents { kind: text("{record_key}"), ..Default::default() },
            "cloudevents.type: the field \"record_key\" needs format = \"debezium\"",
        ),
        (
            CloudEvents { kind: text("x"), type_prefix: text("y"), ..Default::default() },
            "cloudevents.type and cloudevents.type_prefix are two ways to say it; keep one",
        ),
    ] {
        let error = refused(&order(json_payload()), &options);
        assert!(error.contains(expected), "{error}");
    }
}
