//! What is stored of an event comes back as it was.

use super::*;
use crate::event::hidden::Hide;
use crate::position::Mark;

fn event(content: Content) -> Event {
    let mut columns = ["id", "note"].map(|name| Column::new(name, 25, 36));
    columns[1].shape = Shape::of(1009);
    let table = Table {
        database: "shop".into(),
        oid: 16_384,
        version: u64::MAX,
        schema: "public".into(),
        name: "t".into(),
        full_name: "public.t".into(),
        columns: columns.into(),
        key: vec![0],
        identity: Identity::Columns(vec![1]),
    };
    Event {
        id: Uuid::from_u128(5),
        position: Position { epoch: 1, mark: Mark(7), ordinal: 2, sub: 0 },
        lsn: Some(Lsn(6)),
        occurred_at_us: -4,
        committed_at_us: -3,
        xid: 9,
        table: Arc::new(table),
        content,
    }
}

fn round_trip(content: Content) {
    let before = event(content);
    let hidden = Hidden { rules: "v".into(), columns: vec![(1, Hide::Mask)] };
    for hidden in [None, Some(hidden)] {
        let json = to_json(&before, hidden.as_ref());
        let (_, found) = from_json(&json, before.id, before.position).unwrap();
        assert_eq!(found, hidden.unwrap_or_default());
    }
    let (after, _) = from_json(&to_json(&before, None), before.id, before.position).unwrap();
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
}

#[test]
fn a_row_that_postgres_would_not_take_is_kept_without_its_large_value() {
    let large = Value::Text(Bytes::from(vec![b'x'; KEPT_MAX + 1]));
    let new: Row = [Value::Text(Bytes::from_static(b"7")), large].into();
    let json = document(&event(Content::Change(Change::Insert { new })), None, KEPT_MAX);
    assert!(json.len() < 1000, "{} bytes", json.len());
    let Content::Change(Change::Insert { new }) =
        from_json(&json, Uuid::nil(), Position::default()).unwrap().0.content
    else {
        panic!("an insert")
    };
    assert_eq!(new[0], Value::Text(Bytes::from_static(b"7")));
    let Value::Unreadable(value) = &new[1] else { panic!("{:?}", new[1]) };
    assert!(value.why.starts_with("a value of 1048577 bytes was too large"), "{}", value.why);
}

#[test]
fn every_kind_of_event_comes_back_byte_for_byte() {
    let text = |t: &'static [u8]| Value::Text(Bytes::from_static(t));
    let row = || -> Row { [text(b"1"), text("\u{1F430} \"\\ \n".as_bytes())].into() };
    let odd = || -> Row { [Value::Null, text(b"\xFF\x00\xFE")].into() };
    let why = "no text".to_owned();
    let bytes = Some(Bytes::from_static(b"\xFF\x01"));
    let unreadable = Value::Unreadable(Box::new(Unreadable { why, bytes }));
    round_trip(Content::Change(Change::Insert { new: row() }));
    let new: Row = [text(b"1"), Value::Unchanged].into();
    round_trip(Content::Change(Change::Update { old: None, new: new.clone() }));
    round_trip(Content::Change(Change::Update { old: Some(OldRow::Key(odd())), new }));
    round_trip(Content::Change(Change::Delete { old: OldRow::Full(row()) }));
    let new = [text(b"1"), unreadable].into();
    round_trip(Content::Change(Change::Insert { new }));
    round_trip(Content::Change(Change::Truncate));
}

#[test]
fn an_outbox_payload_keeps_its_digits_spaces_and_key_order() {
    let json = Bytes::from_static(b"{ \"b\":1.000000000000000000001 ,\"a\" : \"\\u0000\"}");
    let row = |payload| OutboxRow {
        aggregate_type: "order".into(),
        aggregate_id: "4/2".into(),
        event_type: "created".into(),
        payload,
        content_type: None,
        headers: Some(Bytes::from_static(b"{\"n\": 1}")),
        traceparent: Some("00-1".into()),
        columns: Some(Bytes::from_static(b"{\"version\":1}")),
        shown: Vec::new(),
    };
    round_trip(Content::Outbox(Box::new(row(OutboxPayload::Json(json)))));
    round_trip(Content::Outbox(Box::new(row(OutboxPayload::Hex(Bytes::from_static(b"\\x00ff"))))));
    round_trip(Content::Outbox(Box::new(row(OutboxPayload::Empty))));
    // The same bytes, in the form in which a row has them.
    let before = event(Content::Outbox(Box::new(row(OutboxPayload::Bytes("\0\u{7f}".into())))));
    let (after, _) = from_json(&to_json(&before, None), before.id, before.position).unwrap();
    let Content::Outbox(after) = after.content else { panic!("{after:?}") };
    assert!(matches!(&after.payload, OutboxPayload::Hex(hex) if hex == "\\x007f"), "{after:?}");
    let columns = vec![("payload".into(), None), ("data".into(), Some(Bytes::from("x")))];
    let broken = Broken { why: "both".into(), columns };
    round_trip(Content::Outbox(Box::new(row(OutboxPayload::Broken(Box::new(broken))))));
}

#[test]
fn a_damaged_document_is_an_error_and_no_panic() {
    let good = to_json(&event(Content::Change(Change::Truncate)), None);
    let no_key = good.replace("\"key\":[0]", "\"key\":[7]");
    let no_identity = good.replace("[1]", "[7]");
    for wrong in ["", "{}", "null", &no_key, &no_identity] {
        let error = from_json(wrong, Uuid::nil(), Position::default()).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
    }
}

#[test]
fn a_document_of_a_later_version_is_refused_and_not_guessed() {
    let good = to_json(&event(Content::Change(Change::Truncate)), None);
    let later = good.replace("\"form\":2", "\"form\":3,\"more\":0");
    let error = from_json(&later, Uuid::nil(), Position::default()).unwrap_err();
    assert_eq!(error.to_string(), "the stored row has form 3, this version reads up to 2");
}
