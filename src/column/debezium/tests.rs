//! A vector for each row of Debezium's table of types, and for the edges of each.

use super::*;
use crate::error::Kind;

const NONE: i32 = -1;

fn numeric(precision: i32, scale: i32) -> i32 {
    (precision << 16 | (scale & 0x7FF)) + 4
}

fn try_json(values: &ValueForms, type_oid: u32, modifier: i32, text: &str) -> Result<String> {
    let writer = Writer::of(type_oid, modifier, values).expect("a type that Debezium knows");
    let mut out = Vec::new();
    writer.write(&mut out, text.as_bytes())?;
    let json = String::from_utf8(out).unwrap();
    serde_json::from_str::<serde_json::Value>(&json).expect(&json);
    Ok(json)
}

fn json_by(values: &ValueForms, type_oid: u32, modifier: i32, text: &str) -> String {
    try_json(values, type_oid, modifier, text).expect(text)
}

fn check(cases: &[(u32, i32, &str, &str)]) {
    check_by(&ValueForms::default(), cases);
}

fn check_by(values: &ValueForms, cases: &[(u32, i32, &str, &str)]) {
    for (type_oid, modifier, text, expected) in cases {
        let json = json_by(values, *type_oid, *modifier, text);
        assert_eq!(json, *expected, "type {type_oid}({modifier}) {text}");
    }
}

#[test]
fn numbers_and_texts() {
    check(&[
        (oid::BOOL, NONE, "t", "true"),
        (oid::BOOL, NONE, "f", "false"),
        (oid::INT2, NONE, "-32768", "-32768"),
        (oid::INT8, NONE, "9223372036854775807", "9223372036854775807"),
        (oid::OID, NONE, "4294967295", "4294967295"),
        (oid::FLOAT4, NONE, "3.33", "3.33"),
        (oid::FLOAT8, NONE, "1e-300", "1e-300"),
        (oid::FLOAT8, NONE, "NaN", "\"NaN\""),
        (oid::FLOAT4, NONE, "-Infinity", "\"-Infinity\""),
        (oid::TEXT, NONE, "a \"b\"\n", "\"a \\\"b\\\"\\n\""),
        (oid::BPCHAR, 14, "ab        ", "\"ab        \""),
        (oid::JSON, NONE, "{ \"a\": 1.00 }", "\"{ \\\"a\\\": 1.00 }\""),
        (oid::JSONB, NONE, "null", "\"null\""),
        (142, NONE, "<a>1</a>", "\"<a>1</a>\""),
        (
            oid::UUID,
            NONE,
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "\"a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11\"",
        ),
        (869, NONE, "192.168.0.1/24", "\"192.168.0.1/24\""),
        (650, NONE, "10.1.0.0/16", "\"10.1.0.0/16\""),
        (829, NONE, "08:00:2b:01:02:03", "\"08:00:2b:01:02:03\""),
        (774, NONE, "08:00:2b:01:02:03:04:05", "\"08:00:2b:01:02:03:04:05\""),
        (3904, NONE, "[1,10)", "\"[1,10)\""),
        (3910, NONE, "empty", "\"empty\""),
        (3614, NONE, "'a':1 'b'", "\"'a':1 'b'\""),
        // An enum.
        (20_000, NONE, "so so", "\"so so\""),
    ]);
}

#[test]
fn bit_strings_are_little_endian_and_one_bit_is_a_boolean() {
    check(&[
        (oid::BIT, 1, "1", "true"),
        (oid::BIT, 1, "0", "false"),
        (oid::BIT, 2, "11", "\"Aw==\""),
        (oid::BIT, 7, "0000001", "\"AQ==\""),
        (oid::VARBIT, 24, "000000110000001000000001", "\"AQID\""),
        // No more bytes than the highest bit needs.
        (oid::VARBIT, 33, "101", "\"BQ==\""),
        (oid::BIT, 16, "0000000100000000", "\"AAE=\""),
        (oid::BIT, 9, "000000000", "\"\""),
        (oid::VARBIT, NONE, "", "\"\""),
        (oid::VARBIT, 1, "1", "true"),
    ]);
}

#[test]
fn numeric_is_an_unscaled_number_in_twos_complement() {
    check(&[
        (oid::NUMERIC, numeric(3, 2), "1.10", "\"bg==\""),
        (oid::NUMERIC, numeric(3, 2), "-1.10", "\"kg==\""),
        (oid::NUMERIC, numeric(5, 0), "0", "\"AA==\""),
        (oid::NUMERIC, numeric(5, 0), "127", "\"fw==\""),
        (oid::NUMERIC, numeric(5, 0), "128", "\"AIA=\""),
        (oid::NUMERIC, numeric(5, 0), "-128", "\"gA==\""),
        (oid::NUMERIC, numeric(5, 0), "-129", "\"/38=\""),
        (oid::NUMERIC, numeric(5, 0), "-1", "\"/w==\""),
        // 12,300 with a scale of -2 is 123.
        (oid::NUMERIC, numeric(3, -2), "12300", "\"ew==\""),
        (
            oid::NUMERIC,
            numeric(38, 8),
            "123456789012345678901234567890.12345678",
            "\"CUmw9vACMxPESZBQ3jjzTg==\"",
        ),
        // Without a scale of the column each value has its own.
        (oid::NUMERIC, NONE, "1.10", "{\"scale\":1,\"value\":\"Cw==\"}"),
        (oid::NUMERIC, NONE, "110", "{\"scale\":0,\"value\":\"bg==\"}"),
        (oid::NUMERIC, NONE, "-0.00", "{\"scale\":0,\"value\":\"AA==\"}"),
        (oid::NUMERIC, NONE, "0.0001", "{\"scale\":4,\"value\":\"AQ==\"}"),
    ]);
    let double = ValueForms { decimal: DecimalHandling::Double, ..ValueForms::default() };
    check_by(
        &double,
        &[
            (oid::NUMERIC, numeric(3, 2), "1.10", "1.1"),
            (oid::NUMERIC, NONE, "42", "42.0"),
            (oid::NUMERIC, NONE, "NaN", "\"NaN\""),
            (oid::NUMERIC, NONE, "-Infinity", "\"-Infinity\""),
        ],
    );
    let string = ValueForms { decimal: DecimalHandling::String, ..ValueForms::default() };
    check_by(
        &string,
        &[
            (oid::NUMERIC, numeric(3, 2), "1.10", "\"1.10\""),
            (oid::NUMERIC, NONE, "Infinity", "\"Infinity\""),
            (oid::MONEY, NONE, "-$1,234.56", "\"-1234.56\""),
            (oid::MONEY, NONE, "$0.05", "\"0.05\""),
        ],
    );
    for special in ["NaN", "Infinity", "-Infinity"] {
        let error = try_json(&ValueForms::default(), oid::NUMERIC, NONE, special).unwrap_err();
        assert_eq!(error.kind(), Kind::Event);
        assert!(error.hint_text().unwrap().contains("decimal_handling"), "{error}");
    }
}

#[test]
fn money_has_the_scale_that_is_configured() {
    check(&[
        (oid::MONEY, NONE, "$1,234.56", "\"AeJA\""),
        (oid::MONEY, NONE, "-$1.00", "\"nA==\""),
        (oid::MONEY, NONE, "1.234,56 €", "\"AeJA\""),
    ]);
    let one = ValueForms { money_fraction_digits: 1, ..ValueForms::default() };
    assert_eq!(json_by(&one, oid::MONEY, NONE, "$1.25"), "\"DQ==\"", "13, half up");
    let double = ValueForms { decimal: DecimalHandling::Double, ..ValueForms::default() };
    assert_eq!(json_by(&double, oid::MONEY, NONE, "$1,234.56"), "1234.56");
}

#[test]
fn dates_and_times_in_numbers() {
    check(&[
        (oid::DATE, NONE, "1970-01-02", "1"),
        (oid::DATE, NONE, "2016-11-04", "17109"),
        (oid::DATE, NONE, "0044-03-15 BC", "-735160"),
        (oid::DATE, NONE, "5874897-12-31", "2145042905"),
        (oid::DATE, NONE, "infinity", "2146033979"),
        (oid::DATE, NONE, "-infinity", "-2147472691"),
        (oid::TIME, NONE, "13:51:30.123456", "49890123456"),
        (oid::TIME, 3, "13:51:30.123", "49890123"),
        (oid::TIME, 0, "24:00:00", "86400000"),
        (oid::TIMESTAMP, NONE, "2016-11-04 13:51:30.123456", "1478267490123456"),
        (oid::TIMESTAMP, 6, "2016-11-04 13:51:30", "1478267490000000"),
        (oid::TIMESTAMP, 4, "2016-11-04 13:51:30.1", "1478267490100000"),
        (oid::TIMESTAMP, 3, "2016-11-04 13:51:30.123", "1478267490123"),
        (oid::TIMESTAMP, 3, "1969-12-31 23:59:59.999", "-1"),
        (oid::TIMESTAMP, NONE, "infinity", "9223372036825200000"),
        (oid::TIMESTAMP, NONE, "-infinity", "-9223372036832400000"),
        (oid::TIMESTAMP, 3, "infinity", "9223372036825200"),
        (oid::TIMESTAMP, NONE, "0001-12-31 00:00:00 BC", "-62135683200000000"),
        (oid::TIMESTAMP, NONE, "294247-01-01 23:59:59.999999", "9223371331199999999"),
        (
            oid::TIMESTAMPTZ,
            NONE,
            "2016-11-04 11:51:30.123456+00",
            "\"2016-11-04T11:51:30.123456Z\"",
        ),
        (oid::TIMESTAMPTZ, NONE, "2016-11-04 11:51:30+00", "\"2016-11-04T11:51:30.000000Z\""),
        (oid::TIMESTAMPTZ, 3, "2016-11-04 11:51:30.1+00", "\"2016-11-04T11:51:30.100Z\""),
        (oid::TIMESTAMPTZ, 0, "2016-11-04 11:51:30+00", "\"2016-11-04T11:51:30Z\""),
        (oid::TIMESTAMPTZ, 0, "294276-12-31 23:59:59+00", "\"+294276-12-31T23:59:59Z\""),
        (oid::TIMESTAMPTZ, 0, "4714-11-24 00:00:00+00 BC", "\"-4713-11-24T00:00:00Z\""),
        (oid::TIMESTAMPTZ, NONE, "infinity", "\"infinity\""),
        (oid::TIMETZ, NONE, "13:51:30.123789+02", "\"11:51:30.123789Z\""),
        (oid::TIMETZ, NONE, "00:30:00+05:30", "\"19:00:00Z\""),
        (oid::TIMETZ, NONE, "23:00:00-01:00:30", "\"00:00:30Z\""),
        (oid::TIMETZ, NONE, "24:00:00+00", "\"24:00:00Z\""),
    ]);
}

#[test]
fn the_precision_of_times_can_be_chosen() {
    let by = |time| ValueForms { time, ..ValueForms::default() };
    let (stamp, clock) = ("2016-11-04 13:51:30.12", "13:51:30.12");
    for (precision, date, time, timestamp) in [
        (TimePrecision::AdaptiveTimeMicroseconds, "17109", "49890120000", "1478267490120"),
        (TimePrecision::Connect, "17109", "49890120", "1478267490120"),
        (TimePrecision::Microseconds, "17109", "49890120000", "1478267490120000"),
        (TimePrecision::Nanoseconds, "17109", "49890120000000", "1478267490120000000"),
        (
            TimePrecision::IsoString,
            "\"2016-11-04Z\"",
            "\"13:51:30.12Z\"",
            "\"2016-11-04T13:51:30.12Z\"",
        ),
    ] {
        let values = by(precision);
        assert_eq!(json_by(&values, oid::DATE, NONE, "2016-11-04"), date, "{precision:?}");
        assert_eq!(json_by(&values, oid::TIME, 3, clock), time, "{precision:?}");
        assert_eq!(json_by(&values, oid::TIMESTAMP, 3, stamp), timestamp, "{precision:?}");
    }
    let nanoseconds = by(TimePrecision::Nanoseconds);
    let max = i64::MAX.to_string();
    assert_eq!(json_by(&nanoseconds, oid::TIMESTAMP, NONE, "infinity"), max);
    let far = try_json(&nanoseconds, oid::TIMESTAMP, NONE, "9999-01-01 00:00:00").unwrap_err();
    assert!(far.hint_text().unwrap().contains("time_precision"), "{far}");
    let iso = by(TimePrecision::IsoString);
    let infinity = json_by(&iso, oid::TIMESTAMP, NONE, "infinity");
    assert_eq!(infinity, "\"+294247-01-10T04:00:25.2Z\"");
}

#[test]
fn intervals_are_microseconds_or_iso_8601() {
    let string = ValueForms { interval: IntervalHandling::String, ..ValueForms::default() };
    for (text, number, iso) in [
        ("P1Y2M3DT4H", "37090800000000", "P1Y2M3DT4H0M0S"),
        ("P1Y2M3DT4H5M6.78S", "37091106780000", "P1Y2M3DT4H5M6.78S"),
        ("P-1D", "-86400000000", "P0Y0M-1DT0H0M0S"),
        ("PT-4H-5M-6.78S", "-14706780000", "P0Y0M0DT-4H-5M-6.78S"),
        ("PT0S", "0", "P0Y0M0DT0H0M0S"),
        ("PT5M", "300000000", "P0Y0M0DT0H5M0S"),
    ] {
        assert_eq!(json_by(&ValueForms::default(), oid::INTERVAL, NONE, text), number, "{text}");
        assert_eq!(json_by(&string, oid::INTERVAL, NONE, text), format!("\"{iso}\""));
    }
    assert!(try_json(&string, oid::INTERVAL, NONE, "infinity").is_err());
}

#[test]
fn bytes_in_all_four_forms() {
    for (binary, expected) in [
        (BinaryHandling::Bytes, "\"+/8B\""),
        (BinaryHandling::Base64, "\"+/8B\""),
        (BinaryHandling::Base64UrlSafe, "\"-_8B\""),
        (BinaryHandling::Hex, "\"fbff01\""),
    ] {
        let values = ValueForms { binary, ..ValueForms::default() };
        assert_eq!(json_by(&values, oid::BYTEA, NONE, "\\xfbff01"), expected, "{binary:?}");
    }
}

#[test]
fn geometric_types_are_structures() {
    let point = r#"{"x":1.0,"y":2.0,"wkb":"AQEAAAAAAAAAAADwPwAAAAAAAABA","srid":null}"#;
    let center = r#"{"x":10.0,"y":4.0,"wkb":"AQEAAAAAAAAAAAAkQAAAAAAAABBA","srid":null}"#;
    let geometry = |wkb: &str, extensions: &str| {
        format!("{{\"wkb\":\"{wkb}\",\"srid\":null,\"extensions\":{extensions}}}")
    };
    let lseg = "AQIAAAACAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA8D8=";
    let path = "AQIAAAADAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA8D8AAAAAAAAAAAAAAAAAAABA";
    let square = "AQMAAAABAAAABQAAAAAAAAAAAPA/AAAAAAAA8D8AAAAAAADwPwAAAAAAAAAAAAAAAAAAAAAAAAAA\
                  AAAAAAAAAAAAAAAAAAAAAAAA8D8AAAAAAADwPwAAAAAAAPA/";
    let triangle = "AQMAAAABAAAABAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAPA/AAAAAAAA8D8AAAAA\
                    AAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    for (type_oid, text, expected) in [
        (oid::POINT, "(1,2)", point.to_owned()),
        (oid::CIRCLE, "<(10,4),10>", format!("{{\"center\":{center},\"radius\":10.0}}")),
        (oid::LINE, "{-1,0,0.5}", "{\"a\":-1.0,\"b\":0.0,\"c\":0.5}".to_owned()),
        (oid::LSEG, "[(0,0),(0,1)]", geometry(lseg, "{\"type\":\"lseg\"}")),
        (
            oid::PATH,
            "((0,0),(0,1),(0,2))",
            geometry(path, "{\"type\":\"path\",\"closed\":\"true\"}"),
        ),
        (
            oid::PATH,
            "[(0,0),(0,1),(0,2)]",
            geometry(path, "{\"type\":\"path\",\"closed\":\"false\"}"),
        ),
        (oid::BOX, "(1,1),(0,0)", geometry(square, "{\"type\":\"box\"}")),
        (oid::POLYGON, "((0,0),(0,1),(1,0))", geometry(triangle, "{\"type\":\"polygon\"}")),
    ] {
        assert_eq!(json_by(&ValueForms::default(), type_oid, NONE, text), expected, "{text}");
    }
    assert!(try_json(&ValueForms::default(), oid::POINT, NONE, "(1)").is_err());
}

#[test]
fn arrays_that_debezium_leaves_out_are_left_out_whatever_is_configured() {
    let all = ValueForms { include_unknown: true, ..ValueForms::default() };
    // money, name, interval, varbit, xml, point
    for array in [791, 1003, 1187, 1563, 143, 1017] {
        assert_eq!(Writer::of(array, NONE, &all), None, "{array}");
    }
    assert!(Writer::of(1018, NONE, &all).is_some(), "lseg");
}

#[test]
fn arrays_are_arrays_of_what_their_elements_are() {
    check(&[
        (1007, NONE, "{1,NULL,3}", "[1,null,3]"),
        (1007, NONE, "[0:1]={1,2}", "[1,2]"),
        (1007, NONE, "{{1,2},{3,4}}", "[[1,2],[3,4]]"),
        (1009, NONE, "{a,NULL,\"b \\\"c\\\"\",\"NULL\"}", "[\"a\",null,\"b \\\"c\\\"\",\"NULL\"]"),
        (1231, numeric(3, 2), "{1.10,NULL}", "[\"bg==\",null]"),
        (1182, NONE, "{1970-01-02}", "[1]"),
        (1115, 3, "{\"1970-01-01 00:00:01\"}", "[1000]"),
        (1185, 0, "{\"2016-11-04 11:51:30+00\"}", "[\"2016-11-04T11:51:30Z\"]"),
        (1001, NONE, "{\"\\\\xfbff01\"}", "[\"+/8B\"]"),
        (3807, NONE, "{\"{\\\"a\\\": 1}\"}", "[\"{\\\"a\\\": 1}\"]"),
        (1000, NONE, "{t,f}", "[true,false]"),
        (1041, NONE, "{10.0.0.1}", "[\"10.0.0.1\"]"),
        (3905, NONE, "{\"[1,10)\",empty}", "[\"[1,10)\",\"empty\"]"),
    ]);
    let boxes = json_by(&ValueForms::default(), 1020, NONE, "{(1,1),(0,0);(2,2),(0,0)}");
    assert_eq!(boxes.matches("\"type\":\"box\"").count(), 2, "{boxes}");
}

#[test]
fn a_type_that_debezium_does_not_know_has_no_field_unless_it_is_asked_for() {
    const TSQUERY: u32 = 3615;
    const PG_LSN: u32 = 3220;
    const INT4MULTIRANGE: u32 = 4451;
    for type_oid in [TSQUERY, PG_LSN, INT4MULTIRANGE, 3645] {
        assert_eq!(Writer::of(type_oid, NONE, &ValueForms::default()), None, "{type_oid}");
    }
    let values = ValueForms { include_unknown: true, ..ValueForms::default() };
    assert_eq!(json_by(&values, PG_LSN, NONE, "0/1"), "\"MC8x\"");
    let values = ValueForms { binary: BinaryHandling::Hex, ..values };
    assert_eq!(json_by(&values, PG_LSN, NONE, "0/1"), "\"302f31\"");
}

#[test]
fn what_was_not_sent_has_a_placeholder_of_its_type() {
    let values = ValueForms::default();
    let unavailable = |values: &ValueForms, type_oid| {
        let mut out = Vec::new();
        Writer::of(type_oid, NONE, values).unwrap().write_unavailable(&mut out, values);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(unavailable(&values, oid::TEXT), "\"__debezium_unavailable_value\"");
    assert_eq!(unavailable(&values, oid::JSONB), "\"__debezium_unavailable_value\"");
    let base64 = "\"X19kZWJleml1bV91bmF2YWlsYWJsZV92YWx1ZQ==\"";
    assert_eq!(unavailable(&values, oid::BYTEA), base64);
    assert_eq!(unavailable(&values, 1009), "[\"__debezium_unavailable_value\"]");
    let short = ValueForms { unavailable: "__".into(), binary: BinaryHandling::Hex, ..values };
    assert_eq!(unavailable(&short, 1016), "[95,95]");
    assert_eq!(unavailable(&short, 1182), "[95,95]", "dates are days");
    let iso = ValueForms { time: TimePrecision::IsoString, ..short.clone() };
    assert_eq!(unavailable(&iso, 1182), "[\"__\"]");
    assert_eq!(unavailable(&short, oid::BYTEA), "\"__\"");
}

#[test]
fn an_error_leaves_what_was_written_before_and_shows_no_value() {
    let writer = Writer::of(oid::DATE, NONE, &ValueForms::default()).unwrap();
    let mut out = b"{".to_vec();
    let error = writer.write(&mut out, b"secret").unwrap_err();
    assert_eq!(error.to_string(), "value of 6 bytes is not a date");
    assert_eq!(out, b"{");
}

/// Types of a database: an enum, domains, and those of extensions.
fn user_types() -> crate::column::Types {
    use crate::column::{Extension, UserType};
    crate::column::Types(std::collections::HashMap::from([
        (20_000, UserType::Text),
        (20_001, UserType::Array(20_000, b',')),
        (20_002, UserType::Domain(oid::NUMERIC, numeric(8, 4))),
        (20_003, UserType::Domain(20_002, NONE)),
        (20_004, UserType::Array(20_002, b',')),
        (20_005, UserType::Domain(1231, numeric(3, 2))),
        (20_006, UserType::Array(20_005, b',')),
        (20_007, UserType::Extension(Extension::Hstore)),
        (20_008, UserType::Array(20_007, b',')),
        (20_009, UserType::Extension(Extension::Ewkb)),
        (20_010, UserType::Array(20_009, b':')),
        (20_011, UserType::Extension(Extension::Vector)),
        (20_012, UserType::Extension(Extension::HalfVector)),
        (20_013, UserType::Extension(Extension::SparseVector)),
        (20_014, UserType::Extension(Extension::VersionedText)),
        (20_015, UserType::Composite),
        (20_016, UserType::Array(20_015, b',')),
        (20_017, UserType::Range(oid::INT4)),
        (20_018, UserType::Opaque),
        (20_019, UserType::Domain(oid::BIT, 1)),
        (20_020, UserType::Domain(oid::TIMESTAMP, 3)),
        (20_021, UserType::Domain(20_000, NONE)),
        (20_022, UserType::Domain(1007, NONE)),
        (20_023, UserType::Domain(20_014, NONE)),
    ]))
}

fn user_writer(type_oid: u32, values: &ValueForms) -> Option<Writer> {
    match user_types().resolve(type_oid, NONE) {
        Some(resolved) => Writer::of_user_type(resolved, values),
        None => Writer::of(type_oid, NONE, values),
    }
}

fn user_json(type_oid: u32, text: &str) -> String {
    let mut out = Vec::new();
    let writer = user_writer(type_oid, &ValueForms::default()).expect("a type that is known");
    writer.write(&mut out, text.as_bytes()).expect(text);
    let json = String::from_utf8(out).unwrap();
    serde_json::from_str::<serde_json::Value>(&json).expect(&json);
    json
}

#[test]
fn domains_are_their_base_type_and_enums_and_their_like_are_strings() {
    for (type_oid, text, expected) in [
        (20_000, "so so", r#""so so""#),
        (20_001, "{\"so so\",NULL}", r#"["so so",null]"#),
        (20_021, "ok", r#""ok""#),
        (20_014, "Top.Science", r#""Top.Science""#),
        (20_018, "978-0-393-04002-9", r#""978-0-393-04002-9""#),
        (20_023, "Top", r#""Top""#),
        (20_002, "1.1000", r#""Kvg=""#),
        // Nested domains lose length and scale.
        (20_003, "1.1", r#"{"scale":1,"value":"Cw=="}"#),
        (20_004, "{1.1000,NULL}", r#"["Kvg=",null]"#),
        (20_005, "{1.10}", r#"["bg=="]"#),
        (20_019, "1", "true"),
        (20_020, "2016-11-04 13:51:30.123", "1478267490123"),
        (20_022, "{1,NULL}", "[1,null]"),
    ] {
        assert_eq!(user_json(type_oid, text), expected, "{type_oid} {text}");
    }
}

#[test]
fn hstore_is_a_string_with_a_json_object() {
    for (text, expected) in [
        ("", "{}"),
        (r#""key"=>"val""#, r#"{"key":"val"}"#),
        (r#""a"=>"1", "b"=>NULL"#, r#"{"a":"1","b":null}"#),
        (r#""a, \"=>\\"=>"NULL", ""=>"", "é"=>"x""#, r#"{"a, \"=>\\":"NULL","":"","é":"x"}"#),
    ] {
        let json: String = serde_json::from_str(&user_json(20_007, text)).unwrap();
        assert_eq!(json, expected, "{text}");
    }
    let array = user_json(20_008, r#"{"\"a\"=>\"1\"",NULL}"#);
    assert_eq!(array, r#"["{\"a\":\"1\"}",null]"#);
    let writer = user_writer(20_007, &ValueForms::default()).unwrap();
    for wrong in ["a", "\"a\"", "\"a\"=>1", "\"a\"=>\"1\"x", "\"a\"=>\"1\", ", "\"a\"=>\"\\"] {
        let mut out = Vec::new();
        assert!(writer.write(&mut out, wrong.as_bytes()).is_err() && out.is_empty(), "{wrong}");
    }
    let mut out = Vec::new();
    writer.write_unavailable(&mut out, &ValueForms::default());
    let placeholder: String = serde_json::from_slice(&out).unwrap();
    let word = "__debezium_unavailable_value";
    let object = format!("{{\"{word}\":\"{word}\"}}");
    assert_eq!(placeholder, object);
    // Or an object itself.
    let map = ValueForms { hstore: HstoreHandling::Map, ..ValueForms::default() };
    let (mut of_one, mut of_many, mut unavailable) = (Vec::new(), Vec::new(), Vec::new());
    let writer = user_writer(20_007, &map).unwrap();
    writer.write(&mut of_one, br#""a"=>"1", "b"=>NULL"#).unwrap();
    assert_eq!(of_one, br#"{"a":"1","b":null}"#);
    let array = user_writer(20_008, &map).unwrap();
    array.write(&mut of_many, br#"{"\"a\"=>\"1\"",NULL}"#).unwrap();
    assert_eq!(of_many, br#"[{"a":"1"},null]"#);
    writer.write_unavailable(&mut unavailable, &map);
    assert_eq!(unavailable, object.as_bytes());
}

#[test]
fn geometries_of_postgis_are_structures_and_vectors_are_arrays_of_numbers() {
    let ewkb = "0101000020730C00001C7C613255DE6540787AA52C435C42C0";
    let point = r#"{"wkb":"AQEAACBzDAAAHHxhMlXeZUB4eqUsQ1xCwA==","srid":3187}"#;
    assert_eq!(user_json(20_009, ewkb), point);
    let big_endian = "00200000010000100A3FF00000000000004000000000000000";
    assert!(user_json(20_009, big_endian).ends_with("\"srid\":4106}"));
    let plain = "0101000000000000000000F03F0000000000000040";
    let plain_point = r#"{"wkb":"AQEAAAAAAAAAAADwPwAAAAAAAABA","srid":null}"#;
    assert_eq!(user_json(20_009, plain), plain_point);
    let both = format!("{{{ewkb}:{plain}}}");
    assert_eq!(user_json(20_010, &both), format!("[{point},{plain_point}]"));
    let writer = user_writer(20_009, &ValueForms::default()).unwrap();
    for wrong in ["", "0", "01010000", "0101000020", "0101000020730C", "xx01000000"] {
        assert!(writer.write(&mut Vec::new(), wrong.as_bytes()).is_err(), "{wrong}");
    }
    let mut out = Vec::new();
    writer.write_unavailable(&mut out, &ValueForms::default());
    let placeholder = r#"{"wkb":"AQEAACDmEAAAAAAA/IPXl8EAAAD8g9eXwQ==","srid":4326}"#;
    assert_eq!(String::from_utf8(out).unwrap(), placeholder);

    assert_eq!(user_json(20_011, "[1,2.5,-1e-07]"), "[1.0,2.5,-1e-7]");
    assert_eq!(user_json(20_012, "[1,0.1]"), "[1.0,0.1]");
    assert_eq!(
        user_json(20_013, "{1:10,11:20.5}/25"),
        r#"{"dimensions":25,"vector":[[1,10.0],[11,20.5]]}"#
    );
    assert_eq!(user_json(20_013, "{}/3"), r#"{"dimensions":3,"vector":[]}"#);
    for (type_oid, wrong) in
        [(20_011, "1,2"), (20_011, "[]"), (20_011, "[NaN]"), (20_013, "{1}/2"), (20_013, "{1:2}")]
    {
        let writer = user_writer(type_oid, &ValueForms::default()).unwrap();
        assert!(writer.write(&mut Vec::new(), wrong.as_bytes()).is_err(), "{wrong}");
    }
}

#[test]
fn row_types_and_ranges_of_users_have_no_field_unless_they_are_asked_for() {
    let asked = ValueForms { include_unknown: true, ..ValueForms::default() };
    // The last is an array of a domain over an array.
    for type_oid in [20_015, 20_016, 20_017, 20_006] {
        assert_eq!(user_writer(type_oid, &ValueForms::default()), None, "{type_oid}");
        assert!(user_writer(type_oid, &asked).is_some(), "{type_oid}");
    }
}

#[test]
fn a_wider_type_is_read_in_the_same_way_unless_its_form_is_another() {
    let string = ValueForms { decimal: DecimalHandling::String, ..ValueForms::default() };
    let micro = ValueForms { time: TimePrecision::Microseconds, ..ValueForms::default() };
    let adaptive = ValueForms::default();
    for (values, type_oid, from, to, expected) in [
        (&adaptive, oid::NUMERIC, numeric(10, 2), numeric(12, 2), true),
        (&adaptive, oid::NUMERIC, numeric(10, 2), NONE, false),
        (&string, oid::NUMERIC, numeric(10, 2), NONE, true),
        (&adaptive, 1231, numeric(10, 2), NONE, false),
        (&adaptive, oid::TIMESTAMP, 0, 3, true),
        (&adaptive, oid::TIMESTAMP, 3, 6, false),
        (&adaptive, oid::TIMESTAMP, 6, NONE, true),
        (&micro, oid::TIMESTAMP, 3, 6, true),
        (&adaptive, oid::TIME, 3, NONE, false),
        (&adaptive, oid::TIMESTAMPTZ, 3, 6, true),
        (&adaptive, oid::VARBIT, 1, 8, false),
        (&adaptive, oid::VARBIT, 8, 16, true),
        (&adaptive, oid::VARCHAR, 14, 24, true),
    ] {
        let writer = |modifier| Writer::of(type_oid, modifier, values).expect("a known type");
        assert_eq!(writer(from).is_like(writer(to)), expected, "{type_oid}: {from} to {to}");
    }
}
