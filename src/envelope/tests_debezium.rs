//! Debezium's envelope and outbox event router, byte for byte.
//!
//! Of its cases for the router, these have no counterpart here. Records without a value, without
//! a schema or with the wrong one, and updates and deletes of outbox rows: the relay makes records
//! of inserted rows only. Schema versions and equal schemas: there are no schemas. `partition`
//! placement: a queue has no partitions; `partitions` of a route is by key. An invalid regular
//! expression: templates take its place, and a wrong one is refused at start (`route`). A column of
//! another type than text as key: the outbox's columns are text.

use std::sync::Arc;

use amq_protocol::protocol::basic::parse_properties;
use amq_protocol::types::AMQPValue;
use bytes::Bytes;
use serde_json::{Value as Json, json};

use super::parts;
use super::tests::{NOW_US, event, message, outbox, rule, table};
use crate::column::{debezium::ValueForms, oid};
use crate::event::hidden::Hidden;
use crate::event::{
    Change, Column, Content, Event, Identity, OldRow, Op, OutboxPayload, Row, Value,
};
use crate::message::Message;
use crate::route::{
    Action, Debezium, Decision, EventRouter, EventTime, Format, Placement, Plans, Resumed, Router,
    TombstoneBody,
};

fn options() -> Debezium {
    Debezium {
        values: ValueForms::default(),
        topic_prefix: "bench".into(),
        version: "watership".into(),
        event_time: EventTime::Commit,
        tombstones: false,
        tombstone_body: TombstoneBody::Empty,
        skipped: vec![Op::Truncate],
        router: EventRouter::default(),
    }
}

/// A table with an integer key and a text.
fn change(identity: Identity, change: Change) -> Event {
    let columns = vec![
        Column::new("id", oid::INT4, -1),
        Column::new("name", oid::TEXT, -1),
        Column::new("query", 3615, -1),
    ];
    let table = crate::event::Table { columns, key: vec![0], identity, ..table("t") };
    event(table, Content::Change(change))
}

fn row(id: &'static str, name: Option<&'static str>) -> Row {
    let text = |text: &'static str| Value::Text(Bytes::from_static(text.as_bytes()));
    [text(id), name.map_or(Value::Null, text), Value::Null].into()
}

/// All messages of the event, as the relay makes them.
fn messages(event: &Event, options: Debezium) -> Vec<Message> {
    let rule = rule(event, Format::Debezium(Arc::new(options)));
    let router = Router::new(std::slice::from_ref(&rule)).unwrap();
    let (plans, mut count) = (Plans::new(&router, Resumed::default()), 0);
    plans.decide_alone(&router, event, &Hidden::default(), |decision| match decision {
        Decision::Publish(plan, _) => count = parts(event, plan),
        Decision::Drop(_) => {}
    });
    (0..count).map(|part| message(event, rule.clone(), part).unwrap()).collect()
}

fn body(message: &Message) -> Json {
    serde_json::from_slice(message.body()).unwrap()
}

fn header(message: &Message, name: &str) -> Option<AMQPValue> {
    let (_, properties) = parse_properties(message.properties()).unwrap();
    let headers = properties.headers().as_ref().unwrap().inner();
    headers.iter().find(|(key, _)| key.as_str() == name).map(|(_, value)| value.clone())
}

fn text(message: &Message, name: &str) -> Option<String> {
    header(message, name).map(|value| match value {
        AMQPValue::LongString(text) => text.to_string(),
        other => format!("{other:?}"),
    })
}

fn by_key() -> Identity {
    Identity::Columns(vec![0])
}

#[test]
fn an_insert_is_a_create_with_the_times_of_its_commit() {
    let event = change(by_key(), Change::Insert { new: row("7", Some("x")) });
    let got = messages(&event, options());
    assert_eq!(got.len(), 1);
    let times = "\"ts_ms\":1767323045678,\"ts_us\":1767323045678901,\
                 \"ts_ns\":1767323045678901000";
    assert_eq!(
        String::from_utf8(got[0].body().to_vec()).unwrap(),
        format!(
            "{{\"before\":null,\"after\":{{\"id\":7,\"name\":\"x\"}},\"source\":\
             {{\"version\":\"watership\",\"connector\":\"postgresql\",\"name\":\"bench\",\
             \"db\":\"app\",\"schema\":\"public\",\"table\":\"t\",{times},\"txId\":742,\
             \"lsn\":27552256,\"xmin\":null,\"sequence\":\"[\\\"27552504\\\",\\\"27552256\\\"]\",\
             \"snapshot\":\"false\"}},\"op\":\"c\",{times},\"transaction\":null}}"
        )
    );
    assert_eq!(text(&got[0], "ws-op").as_deref(), Some("insert"));
    assert_eq!(messages(&event, options())[0].body(), got[0].body());
}

#[test]
fn the_times_of_the_event_can_be_those_of_its_processing_and_the_source_has_its_commit() {
    let event = change(by_key(), Change::Insert { new: row("7", Some("x")) });
    let got = messages(&event, Debezium { event_time: EventTime::Processing, ..options() });
    let body = body(&got[0]);
    let times = |of: &Json| [of["ts_ms"].clone(), of["ts_us"].clone(), of["ts_ns"].clone()];
    let now = [json!(NOW_US / 1000), json!(NOW_US), json!(NOW_US * 1000)];
    assert_eq!(times(&body), now);
    assert_eq!(times(&body["source"])[1], json!(1_767_323_045_678_901_i64));
}

#[test]
fn a_row_that_a_backfill_read_is_a_read_of_no_transaction() {
    let run = uuid::Uuid::from_u128(9);
    let event = change(by_key(), Change::Read { new: row("7", Some("x")), run });
    let got = messages(&event, options());
    let read = body(&got[0]);
    assert_eq!((&read["op"], &read["source"]["snapshot"]), (&json!("r"), &json!("incremental")));
    assert_eq!(read["source"]["txId"], Json::Null);
    assert_eq!(read["after"], json!({"id": 7, "name": "x"}));
}

#[test]
fn before_is_what_the_replica_identity_sends() {
    let new = || row("7", Some("y"));
    let full = || Some(OldRow::Full(row("7", Some("x"))));
    for (identity, old, before) in
        [(by_key(), None, Json::Null), (Identity::Full, full(), json!({"id": 7, "name": "x"}))]
    {
        let event = change(identity, Change::Update { old, new: new() });
        let got = messages(&event, options());
        let [update] = &got[..] else { panic!("{got:?}") };
        assert_eq!(body(update)["before"], before);
        assert_eq!(body(update)["after"], json!({"id": 7, "name": "y"}));
        assert_eq!(body(update)["op"], "u");
    }
    let old = OldRow::Key(row("7", None));
    let got = messages(&change(by_key(), Change::Delete { old }), options());
    let delete = body(&got[0]);
    assert_eq!((&delete["before"], &delete["after"]), (&json!({"id": 7}), &Json::Null));
    assert_eq!(delete["op"], "d");
    // An index over another column.
    let old = OldRow::Key([Value::Null, row("7", Some("x"))[1].clone(), Value::Null].into());
    let by_name = Identity::Columns(vec![1]);
    let got = messages(&change(by_name, Change::Delete { old }), options());
    assert_eq!(body(&got[0])["before"], json!({"name": "x"}));
}

#[test]
fn a_key_change_is_a_delete_and_a_create_that_name_each_other() {
    let old = Some(OldRow::Key(row("7", None)));
    let event = change(by_key(), Change::Update { old, new: row("8", Some("x")) });
    for tombstones in [false, true] {
        let got = messages(&event, Debezium { tombstones, ..options() });
        assert_eq!(got.len(), 2 + usize::from(tombstones));
        let (delete, create) = (&got[0], &got[got.len() - 1]);
        assert_eq!(body(delete)["op"], "d");
        assert_eq!(body(delete)["before"], json!({"id": 7}));
        assert_eq!(text(delete, "__debezium.newkey").as_deref(), Some("{\"id\":8}"));
        assert_eq!(text(delete, "__debezium.oldkey"), None);
        assert_eq!(delete.key_text(), "public.t/7");
        assert_eq!(body(create)["op"], "c");
        assert_eq!(body(create)["before"], Json::Null);
        assert_eq!(body(create)["after"], json!({"id": 8, "name": "x"}));
        assert_eq!(text(create, "__debezium.oldkey").as_deref(), Some("{\"id\":7}"));
        assert_eq!(create.key_text(), "public.t/8");
        assert_ne!(delete.id, create.id);
        assert_eq!(text(create, "ws-position"), text(delete, "ws-position"));
        let part = AMQPValue::LongLongInt(if tombstones { 2 } else { 1 });
        assert_eq!(header(create, "ws-part"), Some(part));
        assert_eq!(header(delete, "ws-part"), None);
    }
    // The key is the same: one update, also where the old row is known.
    let old = Some(OldRow::Full(row("7", None)));
    let event = change(Identity::Full, Change::Update { old, new: row("7", Some("x")) });
    assert_eq!(messages(&event, options()).len(), 1);
}

#[test]
fn a_tombstone_follows_a_delete_where_it_is_asked_for() {
    let old = OldRow::Key(row("7", None));
    let event = change(by_key(), Change::Delete { old });
    assert_eq!(messages(&event, options()).len(), 1);
    let got = messages(&event, Debezium { tombstones: true, ..options() });
    assert_eq!(got.len(), 2);
    assert_eq!(got[1].body(), b"");
    assert_eq!(header(&got[1], "ws-tombstone"), Some(AMQPValue::Boolean(true)));
    assert_eq!(got[1].key_text(), got[0].key_text());
    let tombstone_body = TombstoneBody::Default;
    let got = messages(&event, Debezium { tombstones: true, tombstone_body, ..options() });
    assert_eq!(got[1].body(), b"default");
}

#[test]
fn operations_are_skipped_and_a_truncate_is_by_default() {
    let event = change(by_key(), Change::Truncate);
    assert!(messages(&event, options()).is_empty());
    let got = messages(&event, Debezium { skipped: Vec::new(), ..options() });
    let truncate = body(&got[0]);
    assert_eq!((&truncate["before"], &truncate["after"]), (&Json::Null, &Json::Null));
    assert_eq!(truncate["op"], "t");
    let event = change(by_key(), Change::Insert { new: row("7", None) });
    assert!(messages(&event, Debezium { skipped: vec![Op::Insert], ..options() }).is_empty());
}

#[test]
fn what_the_change_did_not_touch_has_a_placeholder_and_unknown_types_are_left_out() {
    let mut new = row("7", None);
    new[1] = Value::Unchanged;
    let event = change(by_key(), Change::Update { old: None, new });
    let got = messages(&event, options());
    let expected = json!({"id": 7, "name": "__debezium_unavailable_value"});
    assert_eq!(body(&got[0])["after"], expected);
}

#[test]
fn the_routing_key_can_be_the_topic_or_the_key_of_the_record() {
    let event = change(by_key(), Change::Insert { new: row("7", Some("x")) });
    for (template, expected) in [
        (crate::route::topic_template("a{b"), "a{b.public.t"),
        ("{record_key}".to_owned(), "{\"id\":7}"),
        ("{key}".to_owned(), "public.t/7"),
        (String::new(), ""),
    ] {
        let mut rule = rule(&event, Format::Debezium(Arc::new(options())));
        let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
        address.routing_key = template;
        let got = message(&event, rule, 0).unwrap();
        assert_eq!(got.routing_key(), expected.as_bytes());
    }
}

/// The base row of the router's cases, with this payload and these additional fields.
fn user(payload: &'static str, fields: Option<&'static str>) -> Event {
    let mut event = outbox(OutboxPayload::Json(Bytes::from_static(payload.as_bytes())));
    event.id = "da8d6de6-3b77-45ff-8f44-57db55a7a06c".parse().unwrap();
    let Content::Outbox(row) = &mut event.content else { unreachable!() };
    row.aggregate_type = "User".into();
    row.aggregate_id = "10711fa5".into();
    row.event_type = "UserCreated".into();
    row.headers = fields.map(|fields| Bytes::from_static(fields.as_bytes()));
    event
}

fn routed(event: &Event, router: EventRouter) -> crate::error::Result<Message> {
    let rule = rule(event, Format::Debezium(Arc::new(Debezium { router, ..options() })));
    message(event, rule, 0)
}

fn routed_body(event: &Event, router: EventRouter) -> String {
    let message = routed(event, router).unwrap();
    String::from_utf8(message.body().to_vec()).unwrap()
}

fn place(field: &str, place: &str, name: &str) -> Placement {
    let (field, name) = (field.to_owned(), name.to_owned());
    Placement { field, in_body: place == "envelope", name }
}

fn placing<const N: usize>(placements: [Placement; N]) -> EventRouter {
    EventRouter { placements: placements.into(), ..EventRouter::default() }
}

#[test]
fn case_7_defaults_pass_the_payload_on_with_the_id_as_a_header() {
    let event = user("{}", None);
    let got = routed(&event, EventRouter::default()).unwrap();
    assert_eq!(got.body(), b"{}");
    let id = "da8d6de6-3b77-45ff-8f44-57db55a7a06c";
    assert_eq!(text(&got, "id").as_deref(), Some(id));
    let quoted = EventRouter { quoted_id: true, ..EventRouter::default() };
    let got = routed(&event, quoted).unwrap();
    assert_eq!(text(&got, "id"), Some(format!("\"{id}\"")));
}

#[test]
fn cases_8_and_11_key_and_topic_are_templates() {
    for (template, expected) in [
        ("{record_key}", "10711fa5"),
        ("{event_type}", "UserCreated"),
        ("outbox.event.{aggregate_type}", "outbox.event.User"),
    ] {
        let event = user("{}", None);
        let mut rule = rule(&event, Format::Debezium(Arc::new(options())));
        let Action::Publish { address, .. } = &mut rule.action else { unreachable!() };
        address.routing_key = template.to_owned();
        assert_eq!(message(&event, rule, 0).unwrap().routing_key(), expected.as_bytes());
    }
}

#[test]
fn cases_14_and_d2_fields_go_into_headers_or_beside_the_payload() {
    let event = user(r#"{"email": "gh@mefi.in"}"#, None);
    let got = routed(&event, placing([place("type", "header", "eventType")])).unwrap();
    assert_eq!(text(&got, "eventType").as_deref(), Some("UserCreated"));
    assert_eq!(got.body(), br#"{"email": "gh@mefi.in"}"#);
    let router = placing([place("type", "envelope", "aggregateType")]);
    let expected = r#"{"payload":"{\"email\": \"gh@mefi.in\"}","aggregateType":"UserCreated"}"#;
    assert_eq!(routed_body(&event, router), expected);
    // 23: expanded, too.
    let router = placing([place("type", "envelope", "type")]);
    let router = EventRouter { expand: true, ..router };
    let expected = r#"{"payload":{"email":"gh@mefi.in"},"type":"UserCreated"}"#;
    assert_eq!(routed_body(&event, router), expected);
}

fn all_features() -> EventRouter {
    placing([
        place("version", "envelope", "eventVersion"),
        place("aggregatetype", "envelope", "aggregateType"),
        place("somebooltype", "envelope", "someBoolType"),
        place("is_deleted", "envelope", "deleted"),
        place("somebooltype", "header", "somebooltype"),
    ])
}

#[test]
fn cases_d5_d7_and_d8_all_features() {
    const FIELDS: &str = r#"{"version": 1, "somebooltype": true, "is_deleted": false}"#;
    let event = user(r#"{"email": "gh@mefi.in"}"#, Some(FIELDS));
    let got = routed(&event, all_features()).unwrap();
    let expected = json!({
        "payload": "{\"email\": \"gh@mefi.in\"}", "eventVersion": 1, "aggregateType": "User",
        "someBoolType": true, "deleted": false,
    });
    assert_eq!(body(&got), expected);
    assert_eq!(header(&got, "somebooltype"), Some(AMQPValue::Boolean(true)));
    // A payload that is null.
    let event = user("null", Some(FIELDS));
    assert_eq!(body(&routed(&event, all_features()).unwrap())["payload"], Json::Null);
    let tombstone = EventRouter { tombstone_on_empty: true, ..all_features() };
    let got = routed(&event, tombstone).unwrap();
    assert_eq!(got.body(), b"");
    assert_eq!(header(&got, "ws-tombstone"), Some(AMQPValue::Boolean(true)));
    assert_eq!(header(&got, "somebooltype"), Some(AMQPValue::Boolean(true)));
}

#[test]
fn cases_18_19_and_d9_an_empty_payload_is_a_tombstone_if_asked() {
    let tombstone = EventRouter { tombstone_on_empty: true, ..EventRouter::default() };
    for payload in ["", "\"\"", "null"] {
        let event = user(payload, None);
        let got = routed(&event, tombstone.clone()).unwrap();
        assert_eq!(got.body(), b"");
        assert_eq!(header(&got, "ws-tombstone"), Some(AMQPValue::Boolean(true)));
        let got = routed(&event, EventRouter::default()).unwrap();
        assert_eq!(got.body(), payload.as_bytes());
        assert_eq!(header(&got, "ws-tombstone"), None);
    }
    // 21: expanding changes nothing about it.
    let expand = EventRouter { expand: true, ..tombstone };
    assert_eq!(routed_body(&user("null", None), expand), "");
}

#[test]
fn cases_20_22_and_24_a_payload_is_expanded_if_asked() {
    let payload = r#"{"fullName":"John Doe", "enabled":true,"rating":4.90,"age":42,
        "pets":["dog","cat"],"petObjects":[{"type":"dog"},{"type":"cat"}],"none":null,"no":[ ]}"#;
    let event = user(payload, None);
    assert_eq!(routed_body(&event, EventRouter::default()), payload);
    let expand = EventRouter { expand: true, ..EventRouter::default() };
    let expected = [
        r#"{"fullName":"John Doe","enabled":true,"rating":4.90,"age":42,"#,
        r#""pets":["dog","cat"],"petObjects":[{"type":"dog"},{"type":"cat"}]}"#,
    ];
    let expected = expected.concat();
    assert_eq!(routed_body(&event, expand.clone()), expected);
    let keep = EventRouter { keep_nulls: true, keep_empty_arrays: true, ..expand.clone() };
    assert!(routed_body(&event, keep).ends_with(r#","none":null,"no":[]}"#));
    assert_eq!(routed_body(&user("[null,2,3]", None), expand.clone()), "[null,2,3]");
    // What does not parse is passed on.
    assert_eq!(routed_body(&user("{no", None), expand.clone()), "{no");
    assert_eq!(routed_body(&user("42", None), expand), "42");
}

#[test]
fn case_26_a_field_that_is_missing_is_an_error_or_ignored() {
    let event = user("{}", Some("{\"a\": 1}"));
    let router = placing([place("p", "header", "p")]);
    let error = routed(&event, router.clone()).unwrap_err();
    assert!(error.to_string().contains("has no field \"p\""), "{error}");
    let ignoring = EventRouter { ignore_missing: true, ..router };
    assert_eq!(header(&routed(&event, ignoring).unwrap(), "p"), None);
}

#[test]
fn a_field_that_is_placed_as_traceparent_does_not_send_that_header_twice() {
    let mut event = user("{}", None);
    let router = placing([place("type", "header", "traceparent")]);
    let got = routed(&event, router.clone()).unwrap();
    assert_eq!(text(&got, "traceparent").as_deref(), Some("UserCreated"));
    let Content::Outbox(row) = &mut event.content else { unreachable!() };
    row.traceparent = Some("00-1".into());
    let got = routed(&event, router).unwrap();
    assert_eq!(text(&got, "traceparent").as_deref(), Some("00-1"));
    let sent = got.properties().windows(11).filter(|part| part == b"traceparent");
    assert_eq!(sent.count(), 1);
}

#[test]
fn case_d4_a_payload_can_be_a_string_with_json_in_it() {
    let router = EventRouter { payload_as_string: true, ..EventRouter::default() };
    let body = routed_body(&user("{\"a\": 1}", None), router);
    assert_eq!(body, "\"{\\\"a\\\": 1}\"");
}
