//! What passes, what does not, and where a mistake is.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::*;
use crate::column::{Types, UserType, oid};
use crate::error::Kind;
use crate::event::hidden::Hide;
use crate::event::{Column, Identity, OutboxPayload};
use crate::position::Position;
use crate::route::rules::column_type::{ColumnType, ColumnTypes, JudgedForm};

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
            traceparent: headers.is_some().then(|| "00-1".into()),
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
        ("headers.traceparent is not null and headers.traceparent = '00-1'", true),
    ] {
        assert_eq!(judge(filter, Some(headers)), expected, "{filter}");
    }
    assert!(!judge("headers.vip", None), "a header that is not there is null");
    assert!(!judge("headers.traceparent is not null", None));
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
        (
            "headers.tenant-id = 'a'",
            "tenant-id must be in double quotes: headers.\"tenant-id\" at character 9",
        ),
        ("headers.a.b = 'a'", "a.b must be in double quotes: headers.\"a.b\""),
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
}

fn types() -> ColumnTypes {
    let of = |(name, type_name, base, category): (&str, &str, u32, u8)| {
        let modifier = if base == oid::VARCHAR { 7 } else { -1 };
        (name.to_owned(), ColumnType { name: type_name.into(), base, category, modifier })
    };
    [
        ("status", "text", oid::TEXT, b'S'),
        ("total", "numeric", oid::NUMERIC, b'N'),
        ("open", "boolean", oid::BOOL, b'B'),
        ("price", "public.price", oid::NUMERIC, b'N'),
        ("list", "integer[]", 1007, b'A'),
        ("at", "timestamp with time zone", oid::TIMESTAMPTZ, b'D'),
        ("day", "date", oid::DATE, b'D'),
        ("json", "jsonb", oid::JSONB, b'U'),
        ("bytes", "bytea", oid::BYTEA, b'U'),
        ("mood", "public.mood", 20_000, b'E'),
        ("money", "money", oid::MONEY, b'N'),
        ("code", "character(5)", oid::BPCHAR, b'S'),
        ("mail", "public.citext", 20_001, b'S'),
        ("id", "uuid", oid::UUID, b'U'),
        ("n", "integer", oid::INT4, b'N'),
        ("age", "public.age", oid::INT2, b'N'),
        ("xid", "xid8", oid::XID8, b'U'),
        ("short", "character varying(3)", oid::VARCHAR, b'S'),
    ]
    .map(of)
    .into()
}

#[test]
fn a_comparison_that_a_type_cannot_have_is_refused_with_column_and_type() {
    for (filter, expected) in [
        ("status = 1", "compares \"status\" (text) with a number; expected a text"),
        ("total in (1, '2')", "compares \"total\" (numeric) with a text in single quotes"),
        ("status", "with true or false; expected a text in single quotes"),
        ("open = 'x' or not total", "expected true or false"),
        ("price = 'abc'", "compares \"price\" (public.price) with a text"),
        ("list = 1", "compares \"list\" (integer[]) with a number; expected a text"),
        ("list", "compares \"list\" (integer[]) with true or false; expected a text"),
        ("at > 5", "compares \"at\" (timestamp with time zone) with a number; expected a time"),
        ("at > 'x'", "with \"x\"; expected a time in UTC such as '2024-01-31'"),
        ("day = '31.1.2024'", "expected a date such as '2024-01-31'"),
        ("json = true", "compares \"json\" (jsonb) with true or false; expected a text"),
        ("bytes = 5", "compares \"bytes\" (bytea) with a number"),
        ("mood = 5", "compares \"mood\" (public.mood) with a number"),
        (
            "mood > 'hi'",
            "compares \"mood\" (public.mood) with >, but values of this type have no order here; \
             allowed are =, != and in, with a text in single quotes",
        ),
        ("money > 100", "compares \"money\" (money) with >, but values of this type have no"),
        (
            "n = 1.5",
            "compares \"n\" (integer) with 1.5; expected a whole number from -2147483648 to",
        ),
        ("n in (1, 99999999999)", "compares \"n\" (integer) with 99999999999; expected a whole"),
        ("not (n != -2147483649)", "compares \"n\" (integer) with -2147483649; expected"),
        ("age = 32768", "compares \"age\" (public.age) with 32768; expected a whole number from"),
        ("xid = -1", "compares \"xid\" (xid8) with -1; expected a whole number from 0 to 1844"),
    ] {
        let error = Filter::parse(filter).unwrap().verify_types(&types()).unwrap_err();
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.to_string().contains(expected), "{error}");
    }
    for filter in [
        "status = 'x' and total > 1 and open and gone = 1 and price >= 1.5 and id < 'a'",
        "list = '{1}' and json != '{}' and mood in ('lo', 'hi') and money = '$1.00'",
        "at >= '2024-01-31' and at < '2024-01-31T10:00:00Z' and day = '2024-01-31'",
        "code = 'a' and mail > 'a' and list is null and not json is null",
        "n = 1e3 and n = -5.00 and n > 1.5 and n < 1e12 and n != 1.5 and n not in (0.5)",
        "at > '2024-01-31 10:00:00' and n = -2147483648 and n = 2147483647",
    ] {
        Filter::parse(filter).unwrap().verify_types(&types()).unwrap();
    }
}

#[test]
fn the_server_is_asked_about_what_only_it_knows() {
    let judged = "mood = 'a' and list in ('b') and at > '2024-01-31' and id = 'c' and id < 'd' and \
        status = 'e' and code = 'f' and code > 'f2' and mail = 'g' and op = 'insert' and total = 1 \
        and total > 2 and n = 3 and short = 'h' and short < 'long' and mood != 'i' and \
        mood not in ('j') and not (mood != 'k') and not at = '2024-02-31' and open = true";
    let judged = Filter::parse(judged).unwrap();
    let asked: Vec<_> = judged
        .judged(&types())
        .iter()
        .map(|one| (one.text.to_string(), one.form, one.may_be_no_value))
        .collect();
    let exact = |text: &str| (text.to_owned(), JudgedForm::Exact, false);
    let unequal = |text: &str| (text.to_owned(), JudgedForm::Exact, true);
    let any = |text: &str| (text.to_owned(), JudgedForm::Any, false);
    assert_eq!(
        asked,
        [
            exact("a"),
            exact("b"),
            any("2024-01-31"),
            exact("c"),
            any("f"),
            ("1".to_owned(), JudgedForm::Number, false),
            exact("h"),
            unequal("i"),
            unequal("j"),
            exact("k"),
            ("2024-02-31".to_owned(), JudgedForm::Any, true),
        ]
    );
}

#[test]
fn a_column_is_compared_in_the_way_that_its_type_was_accepted_for() {
    const DOMAIN: u32 = 20_000;
    for base in (1..oid::FIRST_NOT_FIXED).filter(|base| *base < 6_000) {
        let of_type = ColumnType { name: "t".into(), base, category: b'U', modifier: -1 };
        let expected = TextOrder::of_comparable(of_type.comparable());
        // Under no domain, one, and more than twenty domains over each other.
        for depth in [0, 1, 2, 20, 40] {
            let under = |at: u32| if at == 1 { base } else { DOMAIN + at - 1 };
            let domain = |at: u32| (DOMAIN + at, UserType::Domain(under(at), -1));
            let types = Types((1..=depth).map(domain).collect());
            let type_oid = if depth == 0 { base } else { DOMAIN + depth };
            let column = Column::of("c", type_oid, -1, &types);
            assert_eq!(TextOrder::of(&column), expected, "{base} under {depth} domains");
        }
    }
}

#[test]
fn an_operation_that_never_comes_is_refused() {
    let all = "'insert', 'update', 'delete', 'truncate', 'read'";
    for (filter, expected) in [
        ("op = 'upsert'", format!("compares \"op\" with 'upsert'; op can be {all}")),
        ("op in ('insert', 'bogus')", "compares \"op\" with 'bogus'".to_owned()),
        ("not op != 'bogus'", "compares \"op\" with 'bogus'".to_owned()),
        ("op > 'insert'", "compares \"op\" with >; allowed are =, != and in".to_owned()),
        ("op = 1", format!("compares \"op\" with a number; expected {all}")),
        ("op", "compares \"op\" with true or false".to_owned()),
    ] {
        let error = Filter::parse(filter).unwrap().verify_table(false).unwrap_err().to_string();
        assert!(error.contains(&expected), "{error}");
    }
    for (filter, expected) in [
        ("op = 'update'", "op of an outbox event can be 'insert'"),
        ("op in ('insert', 'delete')", "compares \"op\" with 'delete'"),
        ("op != 'upsert'", "compares \"op\" with 'upsert'"),
        ("event_type = 5", "compares \"event_type\" with a number; expected a text"),
        ("not aggregate_id", "compares \"aggregate_id\" with true or false; expected a text"),
    ] {
        let error = Filter::parse(filter).unwrap().verify_outbox().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let filter = "op != 'delete' and op = 'insert' and aggregate_id > 5 and headers.a = 5";
    Filter::parse(filter).unwrap().verify_outbox().unwrap();
    for op in ["insert", "update", "delete", "truncate", "read"] {
        let filter = Filter::parse(&format!("op = '{op}' and \"op\" = 'x'")).unwrap();
        filter.verify_table(false).unwrap();
    }
}

#[test]
fn blanks_at_the_end_of_char_n_do_not_count_and_times_are_compared_as_times() {
    const CODE: u32 = 20_000;
    const AT: u32 = 20_001;
    let domains = Types(
        [(CODE, UserType::Domain(oid::BPCHAR, 9)), (AT, UserType::Domain(oid::TIMESTAMPTZ, -1))]
            .into(),
    );
    for (code, at) in [(oid::BPCHAR, oid::TIMESTAMPTZ), (CODE, AT)] {
        let columns = [("code", code), ("at", at)];
        let columns = columns.map(|(name, type_oid)| Column::of(name, type_oid, -1, &domains));
        let table = Arc::new(Table { columns: columns.into(), ..Table::clone(&table()) });
        let passes = |filter: &str, code: &'static str, at: &'static str| {
            let new = [code, at].map(|text| Value::Text(text.into())).into();
            let event = event(Content::Change(Change::Insert { new }));
            let filter = Filter::parse(filter).unwrap();
            filter.bind(Some(&table), &Hidden::default()).passes(&event)
        };
        let late = "2024-06-01 10:00:00.5+00";
        for (filter, expected) in [
            ("code = 'a'", true),
            ("code in ('b', 'a  ')", true),
            ("code != 'a'", false),
            ("code > 'a'", false),
            ("code = ' a'", false),
            ("at > '2024-06-01T10:00:00Z'", true),
            ("at = '2024-06-01T10:00:00.500Z'", true),
            ("at <= '2024-06-01'", false),
            ("at > '2024-06-01 10:00:00'", true),
            ("at in ('2024-06-01 10:00:00', '2024-06-01 10:00:00.5')", true),
        ] {
            assert_eq!(passes(filter, "a    ", late), expected, "{filter}");
        }
        assert!(passes("at <= '2024-06-01' and at >= '2024-06-01'", "", "2024-06-01 00:00:00+00"));
        assert!(passes("at < '2024-06-01'", "", "0044-03-15 00:00:00+00 BC"));
        assert!(passes("at > '2024-06-01'", "", "infinity"));
        assert!(passes("at > '2024-06-01'", "", "12024-01-01 00:00:00+00"));
    }
}
