//! What a message of each format looks like, byte for byte.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::Envelope;
use crate::error::Result;
use crate::event::{Content, Event, Identity, OutboxPayload, OutboxRow, Table};
use crate::message::Message;
use crate::position::{Lsn, Mark, Position};
use crate::route::{Action, Format, Plan, Router, Rule, default_rules};

/// 2026-01-02T03:04:05.678901Z.
const COMMITTED_AT_US: i64 = 1_767_323_045_678_901;

/// When messages are made.
pub(super) const NOW_US: i64 = COMMITTED_AT_US + 1_500_007;

pub(super) fn event(table: Table, content: Content) -> Event {
    Event {
        id: Uuid::from_u128(7),
        position: Position { epoch: 1, mark: Mark(0x1A4_6AF8), ordinal: 1, sub: 0 },
        lsn: Some(Lsn(0x1A4_6A00)),
        occurred_at_us: COMMITTED_AT_US,
        committed_at_us: COMMITTED_AT_US,
        xid: 742,
        table: Arc::new(table),
        content,
    }
}

pub(super) fn table(name: &str) -> Table {
    Table {
        database: "app".into(),
        oid: 16_400,
        version: 1,
        schema: "public".into(),
        name: name.into(),
        full_name: format!("public.{name}").into(),
        columns: Vec::new(),
        key: Vec::new(),
        identity: Identity::Nothing,
    }
}

pub(super) fn outbox(payload: OutboxPayload) -> Event {
    let row = OutboxRow {
        aggregate_type: "order".into(),
        aggregate_id: "42".into(),
        event_type: "created".into(),
        payload,
        content_type: None,
        headers: None,
        traceparent: None,
        columns: None,
        shown: Vec::new(),
    };
    event(table("outbox"), Content::Outbox(Box::new(row)))
}

/// The rule for outbox events, or for tables, with another format.
pub(super) fn rule(event: &Event, format: Format) -> Rule {
    let index = usize::from(matches!(event.content, Content::Change(_)));
    let mut rule = default_rules().remove(index);
    let Action::Publish { format: default, .. } = &mut rule.action else { unreachable!() };
    *default = format;
    rule
}

pub(super) fn message(event: &Event, rule: Rule, part: u16) -> Result<Message> {
    let router = Router::new(&[rule])?;
    let route = router.publishing().next().expect("one that publishes").clone();
    let table = matches!(event.content, Content::Change(_)).then_some(&event.table);
    Envelope::new("shop", || NOW_US).message(event, &Plan::new(route, table), part)
}

fn body(event: &Event, format: Format) -> Result<String> {
    let message = message(event, rule(event, format), 0)?;
    Ok(String::from_utf8(message.body().to_vec()).expect("it is text"))
}

#[test]
fn an_outbox_event_in_an_envelope_keeps_its_payload_as_it_was_written() {
    let json = outbox(OutboxPayload::Json(Bytes::from_static(b"{ \"b\":1.00 ,\"a\":[]}")));
    assert_eq!(
        body(&json, Format::Watership).unwrap(),
        "{\"id\":\"00000000-0000-0000-0000-000000000007\",\"aggregate_type\":\"order\",\
         \"aggregate_id\":\"42\",\"event_type\":\"created\",\
         \"payload\":{ \"b\":1.00 ,\"a\":[]},\
         \"position\":\"00000001-0000000001a46af8-0000000001-00000000\",\
         \"committed_at\":\"2026-01-02T03:04:05.678901Z\"}"
    );
    assert_eq!(body(&json, Format::Raw).unwrap(), "{ \"b\":1.00 ,\"a\":[]}");
    let bytes = outbox(OutboxPayload::Hex(Bytes::from_static(b"\\x00ff")));
    let body = body(&bytes, Format::Watership).unwrap();
    assert!(body.contains("\"event_type\":\"created\",\"payload_base64\":\"AP8=\","), "{body}");
}

#[test]
fn a_payload_that_is_not_json_is_an_error_where_it_would_break_the_envelope() {
    let text = outbox(OutboxPayload::Json(Bytes::from_static(b"plain text")));
    assert_eq!(body(&text, Format::Raw).unwrap(), "plain text");
    let error = body(&text, Format::Watership).unwrap_err().to_string();
    assert!(error.starts_with("the payload is not JSON"), "{error}");
}

#[test]
fn a_captured_table_has_no_raw_payload() {
    let mut rule = default_rules().remove(1);
    let Action::Publish { format, .. } = &mut rule.action else { unreachable!() };
    *format = Format::Raw;
    let error = Router::new(&[rule]).unwrap_err().to_string();
    assert!(error.starts_with("route \"tables\": format \"raw\""), "{error}");
}
