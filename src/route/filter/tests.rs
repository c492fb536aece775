//! What passes, what does not, and where a mistake is.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::*;
use crate::event::hidden::Hide;
use crate::event::{Column, Identity, OutboxPayload};
use crate::position::Position;
use crate::route::description::DescribedColumn;

fn table() -> Arc<Table> {
    let column = |(name, type_oid): (&str, u32)| Column::new(name, type_oid, -1);
    Arc::new(Table {
        database: "shop".into(),
        oid: 7,
        version: 1,
        schema: "public".into(),
        name: "t".into(),
        full_name: "public.t".into(),
        columns: [
            ("status", oid::TEXT),
            ("total", oid::NUMERIC),
            ("open", oid::BOOL),
            ("op", oid::TEXT),
        ]
        .map(column)
        .into(),
        key: vec![0],
        identity: Identity::Full,
    })
}

fn row(values: [Option<&str>; 4]) -> Row {
    let value = |text: Option<&str>| match text {
        None => Value::Null,
        Some("?") => Value::Unchanged,
        Some(text) => Value::Text(text.to_owned().into()),
    };
    values.map(value).into()
}

fn event(content: Content) -> Event {
    Event {
        id: Uuid::nil(),
        position: Position::default(),
        lsn: None,
        occurred_at_us: 0,
        committed_at_us: 0,
        xid: 1,
        table: table(),
        content,
    }
}

fn passes(filter: &str, change: Change) -> bool {
    let filter = Filter::parse(filter).unwrap();
    let event = event(Content::Change(change));
    filter.bind(Some(&event.table), &Hidden::default()).passes(&event)
}

fn insert(filter: &str, values: [Option<&str>; 4]) -> bool {
    passes(filter, Change::Insert { new: row(values) })
}

#[test]
fn a_row_passes_where_the_filter_is_true_or_unknown() {
    let paid = [Some("paid"), Some("12.50"), Some("t"), Some("x")];
    for (filter, expected) in [
        ("status = 'paid'", true),
        ("status == 'paid' && op != 'delete'", true),
        ("status <> 'paid'", false),
        ("status in ('new', 'paid')", true),
        ("status not in ('new', 'paid')", false),
        ("total = 12.5", true),
        ("total > 12.4999999999999999999999 and total < 12.50000000000000000001", true),
        ("total in (1, 12.500)", true),
        ("total >= 13", false),
        ("open", true),
        ("not open", false),
        ("open = false or (status = 'paid' and total = 1)", false),
        ("!(status = 'new') || open", true),
        ("\"op\" = 'x' and op = 'insert'", true),
        ("status is null", false),
        ("status is not null AND NOT status IS NULL", true),
        ("status >= 'p' and status < 'q'", true),
        ("gone = 1", true),
        ("gone = 1 and status = 'new'", false),
        ("not gone", true),
    ] {
        assert_eq!(insert(filter, paid), expected, "{filter}");
    }
}

#[test]
fn a_null_is_known_and_what_was_not_sent_is_not() {
    let null = [None, None, None, None];
    let unsent = [Some("?"), Some("?"), Some("?"), Some("?")];
    for (filter, of_null) in [
        ("status = 'paid'", false),
        ("status != 'paid'", true),
        ("status in ('paid')", false),
        ("status not in ('paid')", true),
        ("total < 1", false),
        ("total >= 1", false),
        ("open", false),
        ("status is null", true),
    ] {
        assert_eq!(insert(filter, null), of_null, "{filter}");
        assert!(insert(filter, unsent), "{filter}");
        assert!(insert(&format!("not ({filter})"), unsent), "{filter}");
    }
    assert!(!insert("status = 'paid' and op = 'delete'", unsent), "certainly false");
}

#[test]
fn an_update_passes_as_long_as_the_row_was_published_before_it() {
    let values = |status| row([Some(status), None, None, None]);
    let update = |old: Option<OldRow>, new| Change::Update { old, new: values(new) };
    let full = |status| Some(OldRow::Full(values(status)));
    let filter = "status = 'paid'";
    assert!(passes(filter, update(full("paid"), "refunded")), "consumers must learn of it");
    assert!(passes(filter, update(full("new"), "paid")));
    assert!(!passes(filter, update(full("new"), "void")));
    assert!(!passes(filter, update(full("?"), "void")), "what is not known of the old row");
    assert!(!passes(filter, update(None, "refunded")), "without the old row nobody knows");
    assert!(passes(filter, Change::Delete { old: OldRow::Full(values("paid")) }));
    assert!(!passes(filter, Change::Delete { old: OldRow::Full(values("new")) }));
    let identity = |status| OldRow::Key(row([status, None, None, None]));
    assert!(passes(filter, Change::Delete { old: identity(None) }), "it was not sent");
    assert!(!passes(filter, Change::Delete { old: identity(Some("new")) }));
    assert!(passes(filter, Change::Truncate));
    assert!(!passes("op != 'truncate' and status = 'paid'", Change::Truncate));
}

#[test]
fn what_is_hidden_in_a_stored_row_is_unknown() {
    let filter = Filter::parse("status = 'paid'").unwrap();
    let hidden = Hidden { rules: String::new(), columns: vec![(0, Hide::Mask)] };
    let new = row([Some("***"), None, None, None]);
    let event = event(Content::Change(Change::Insert { new }));
    assert!(filter.bind(Some(&event.table), &hidden).passes(&event));
    assert!(!filter.bind(Some(&event.table), &Hidden::default()).passes(&event));
}

#[test]
fn an_outbox_event_is_judged_by_its_fields_and_headers() {
    let headers = r#"{"tenant": "a\"b", "x-n": 12.50, "vip": true, "none": null, "list": [1]}"#;
    let judge = |filter: &str, headers: Option<&'static str>| {
        let filter = Filter::parse(filter).unwrap();
        filter.verify_outbox().unwrap();
        let row = OutboxRow {
            aggregate_type: "order".into(),
            aggregate_id: "7".into(),
            event_type: "created".into(),
            payload: OutboxPayload::Json(Bytes::from_static(b"1")),
            content_type: None,
            headers: headers.map(|json| Bytes::from_static(json.as_bytes())),
            traceparent: None,
            columns: None,
            shown: Vec::new(),
        };
        let event = event(Content::Outbox(Box::new(row)));
        filter.bind(None, &Hidden::default()).passes(&event)
    };
    for (filter, expected) in [
        ("event_type = 'created' and aggregate_type = 'order'", true),
        ("event_type in ('deleted')", false),
        ("aggregate_id = '7'", true),
        ("op = 'insert'", true),
        ("headers.tenant = 'a\"b'", true),
        ("headers.\"x-n\" = 12.5", true),
        ("headers.vip", true),
        ("headers.none is null and headers.missing is null", true),
        ("headers.missing = 'a'", false),
    ] {
        assert_eq!(judge(filter, Some(headers)), expected, "{filter}");
    }
    assert!(!judge("headers.vip", None), "a header that is not there is null");
}

#[test]
fn a_mistake_is_shown_at_its_place() {
    for (filter, text) in [
        ("", "expected a name at the end"),
        ("status =", "expected a value: 'text', a number, true or false at the end"),
        ("status = paid", "at character 10, \"paid\""),
        ("status = 'paid", "a ' without its end at character 10"),
        ("status = 'a' status", "expected \"and\", \"or\" or the end at character 14"),
        ("(status = 'a'", "expected \")\" at the end"),
        ("'a' = status", "a value stands on the right of a comparison at character 1"),
        ("status = null", "a null is tested with \"is null\" at character 10"),
        ("status in 'a'", "expected \"(\" at character 11"),
        ("status in ('a' 'b')", "expected \",\" or \")\" at character 16"),
        ("status not 'a'", "expected \"in\" at character 12"),
        ("total = 1.2.3", "\"1.2.3\" is not a number at character 9"),
        ("total = 1 # comment", "'#' means nothing here at character 11"),
        ("and", "expected a name at character 1"),
        ("headers. = 'a'", "expected the name of a header"),
        ("tü = 'a' x", "at character 10"),
    ] {
        let error = Filter::parse(filter).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let deep = format!("{}open{}", "(".repeat(60), ")".repeat(60));
    assert!(Filter::parse(&deep).unwrap_err().to_string().contains("more than 50 levels"));
    assert!(Filter::parse(&"not ".repeat(5000)).is_err());
}

#[test]
fn names_and_types_are_held_against_what_there_is() {
    let parse = |text: &str| Filter::parse(text).unwrap();
    let error = parse("status = 'x'").verify_outbox().unwrap_err().to_string();
    assert!(error.contains("\"status\" is not known here; allowed are: op, "), "{error}");
    assert!(parse("headers.a = 'x'").verify_table(false).is_err());
    assert!(parse("status = 'x'").verify_table(true).is_err());
    assert!(parse("op = 'insert'").verify_table(true).is_ok());
    let describe = |column: &Column| DescribedColumn {
        name: column.name.clone(),
        type_oid: column.type_oid,
        type_modifier: -1,
    };
    let columns = table().columns.iter().map(describe).collect();
    let now = Description { columns, ..Description::default() };
    for (filter, expected) in [
        ("status = 1", Some("compares \"status\" with a number; expected a text")),
        ("total in (1, '2')", Some("compares \"total\" with a text in single quotes")),
        ("status", Some("expected a text in single quotes")),
        ("open = 'x' or not total", Some("expected true or false")),
        ("op = 1", Some("compares \"op\" with a number")),
        ("status = 'x' and total > 1 and open and gone = 1", None),
    ] {
        let error = parse(filter).verify_types(&now).err().map(|error| error.to_string());
        match expected {
            None => assert_eq!(error, None),
            Some(text) => assert!(error.as_ref().is_some_and(|e| e.contains(text)), "{error:?}"),
        }
    }
}
