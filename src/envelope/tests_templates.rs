//! Templates with columns: what they show, and what they refuse.

use amq_protocol::protocol::basic::parse_properties;
use bytes::Bytes;

use super::tests::{event, message, outbox, rule, table};
use crate::column::oid;
use crate::error::Result;
use crate::event::{
    Change, Column, Content, Event, Identity, OldRow, OutboxPayload, Row, Unreadable, Value,
};
use crate::message::Message;
use crate::route::{Action, Address, Format, Router, Rule};

fn change(change: Change) -> Event {
    let columns = vec![Column::new("id", oid::INT4, -1), Column::new("region", oid::TEXT, -1)];
    let identity = Identity::Columns(vec![0]);
    let table = crate::event::Table { columns, key: vec![0], identity, ..table("t") };
    event(table, Content::Change(change))
}

fn text(text: &str) -> Value {
    Value::Text(Bytes::copy_from_slice(text.as_bytes()))
}

fn row(region: Value) -> Row {
    [text("7"), region].into()
}

fn insert(region: Value) -> Event {
    change(Change::Insert { new: row(region) })
}

/// A route with this routing key, a header `region`, and two exchanges to choose from.
fn by_region(event: &Event, routing_key: &str) -> Rule {
    let mut rule = rule(event, Format::Watership);
    let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
    **address = Address {
        exchange: "shop.{column.region}".into(),
        exchanges: vec!["shop.us".into(), "shop.eu".into()],
        routing_key: routing_key.into(),
        headers: vec![("region".into(), "<{column.region}>".into())],
    };
    rule
}

fn header(message: &Message, wanted: &str) -> Option<String> {
    let (_, properties) = parse_properties(message.properties()).unwrap();
    let headers = properties.headers().as_ref().unwrap().inner().clone();
    let found = headers.into_iter().find(|(name, _)| name.as_str() == wanted);
    found.map(|(_, value)| value.as_long_string().unwrap().to_string())
}

fn refused(made: Result<Message>) -> String {
    let error = made.unwrap_err();
    assert_eq!(error.kind(), crate::error::Kind::Event);
    error.text_with_hint()
}

#[test]
fn a_column_chooses_exchange_routing_key_and_header() {
    let event = insert(text("eu"));
    let rule = by_region(&event, "{table}.{column.region}.{column.id}");
    let router = Router::new(std::slice::from_ref(&rule)).unwrap();
    assert_eq!(router.exchanges(), ["shop.us", "shop.eu"]);
    let got = message(&event, rule, 0).unwrap();
    assert_eq!(got.routing_key(), b"t.eu.7");
    assert_eq!(router.exchanges()[usize::from(got.exchange.0)], "shop.eu");
    assert_eq!(header(&got, "region").as_deref(), Some("<eu>"));
    assert_eq!(header(&got, "ws-exchange").as_deref(), Some("shop.eu"));
    let again = router.by_name("tables").unwrap();
    assert_eq!(again.exchange_called(Some("shop.eu")).unwrap(), got.exchange);
    assert!(
        again.exchange_called(Some("shop.asia")).is_err() && again.exchange_called(None).is_err()
    );
}

#[test]
fn what_has_no_text_or_no_place_is_refused_with_the_reason_and_without_the_value() {
    let unreadable = Unreadable { why: "it has no text form".into(), bytes: None };
    let binary = Value::Text(Bytes::from_static(b"\xff"));
    for (event, expected) in [
        (
            insert(Value::Null),
            "column \"region\" is in a template of the route, but null in this row",
        ),
        (insert(binary), "column \"region\": value of 1 bytes is not UTF-8"),
        (insert(Value::Unreadable(Box::new(unreadable))), "column \"region\": it has no text form"),
        (
            change(Change::Update { old: None, new: row(Value::Unchanged) }),
            "this change did not touch its large value",
        ),
        (
            change(Change::Delete { old: OldRow::Key(row(Value::Null)) }),
            "the replica identity does not carry it",
        ),
        (change(Change::Truncate), "a truncate has no row"),
        (
            insert(text("secret")),
            "is not one of its exchanges: \"shop.us\", \"shop.eu\" (add it to exchanges",
        ),
    ] {
        let error = refused(message(&event, by_region(&event, "x"), 0));
        assert!(error.contains(expected) && !error.contains("secret"), "{error}");
    }
    let long = insert(text(&"x".repeat(255)));
    let mut of_one = by_region(&long, "{column.region}.");
    let Action::Publish { address, .. } = &mut of_one.action else { unreachable!() };
    **address = Address { headers: Vec::new(), ..Address::new("e", "{column.region}.") };
    let error = refused(message(&long, of_one, 0));
    assert!(
        error.contains("of route \"tables\" has 256 bytes, AMQP allows 255 (shorten"),
        "{error}"
    );
}

#[test]
fn headers_of_a_route_stand_before_those_of_the_application() {
    let mut event = outbox(OutboxPayload::Json(Bytes::from_static(b"{}")));
    let Content::Outbox(row) = &mut event.content else { unreachable!() };
    row.headers = Some(Bytes::from_static(b"{\"kind\": \"own\", \"other\": \"own\"}"));
    let mut rule = rule(&event, Format::Raw);
    let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
    address.headers = vec![("kind".into(), "{aggregate_type}/{event_type}".into())];
    let got = message(&event, rule, 0).unwrap();
    assert_eq!(header(&got, "kind").as_deref(), Some("order/created"));
    assert_eq!(header(&got, "other").as_deref(), Some("own"));
    assert_eq!(header(&got, "ws-exchange"), None);
}

#[test]
fn templates_that_cannot_be_followed_are_refused_at_start() {
    let change = insert(Value::Null);
    let outbox = outbox(OutboxPayload::Empty);
    let long = "x".repeat(256);
    let with = |event: &Event, make: &dyn Fn(&mut Address)| {
        let mut rule = rule(event, Format::Watership);
        let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
        make(address);
        Router::new(&[rule]).unwrap_err().text_with_hint()
    };
    let header = |name: &str, text: &str| vec![(name.to_owned(), text.to_owned())];
    for (error, expected) in [
        (
            with(&change, &|d| d.headers = header("a", "{colum.id}")),
            "headers.a \"{colum.id}\": field \"colum.id\" is not known here, allowed are: schema, \
             table, op, key, record_key, column.NAME",
        ),
        (
            with(&outbox, &|d| d.headers = header("a", "{colum.id}")),
            "field \"colum.id\" is not known here, allowed are: aggregate_type, aggregate_id, \
             event_type, key, record_key, column.NAME",
        ),
        (with(&change, &|d| d.headers = header("ws-a", "")), "headers has \"ws-a\": "),
        (with(&outbox, &|d| d.headers = header("traceparent", "")), "sets this header itself"),
        (with(&change, &|d| d.routing_key.clone_from(&long)), "routing_key has 256 bytes without"),
        (
            with(&change, &|d| {
                d.exchange = format!("{long}{{op}}");
                d.exchanges = vec!["a".into()];
            }),
            "exchange has 256 bytes without its fields",
        ),
    ] {
        assert!(error.contains(expected), "{error}");
    }
}
