//! Column values as JSON: every rule with its edge values, spelled as Postgres 15 writes them.

use proptest::prelude::*;
use watership::column::{Shape, Types, oid};
use watership::error::Kind;

// Array types, whose OIDs only this table needs.
const BOOLS: u32 = 1000;
const BYTEAS: u32 = 1001;
const INTS: u32 = 1007;
const TEXTS: u32 = 1009;
const BOXES: u32 = 1020;
const FLOATS: u32 = 1022;
const DATES: u32 = 1182;
const TIMESTAMPTZS: u32 = 1185;
const INTERVALS: u32 = 1187;
const NUMERICS: u32 = 1231;
const JSONBS: u32 = 3807;
const INT4RANGES: u32 = 3905;
const MONEY: u32 = 790;
const BIT: u32 = 1560;
const POINT: u32 = 600;
/// The OID of some enum: unknown to us.
const MOOD: u32 = 16_386;

const SCALARS: &[(u32, &str, &str)] = &[
    (oid::BOOL, "t", "true"),
    (oid::BOOL, "f", "false"),
    (oid::INT2, "-32768", "-32768"),
    (oid::INT4, "0", "0"),
    (oid::INT8, "-9223372036854775808", "-9223372036854775808"),
    (oid::INT8, "9223372036854775807", "9223372036854775807"),
    (oid::OID, "4294967295", "4294967295"),
    (oid::FLOAT4, "0.1", "0.1"),
    (oid::FLOAT4, "1e+10", "1e+10"),
    (oid::FLOAT8, "-0", "-0"),
    (oid::FLOAT8, "1e-300", "1e-300"),
    (oid::FLOAT8, "1.2345678901234568e+17", "1.2345678901234568e+17"),
    (oid::FLOAT8, "NaN", r#""NaN""#),
    (oid::FLOAT8, "Infinity", r#""Infinity""#),
    (oid::FLOAT4, "-Infinity", r#""-Infinity""#),
    (oid::NUMERIC, "12.50", r#""12.50""#),
    (oid::NUMERIC, "NaN", r#""NaN""#),
    (oid::NUMERIC, "-Infinity", r#""-Infinity""#),
    (
        oid::UUID,
        "0192f2a0-0000-7000-8000-000000000001",
        r#""0192f2a0-0000-7000-8000-000000000001""#,
    ),
    (oid::TEXT, "", r#""""#),
    (oid::TEXT, "süß 🐇", r#""süß 🐇""#),
    (
        oid::VARCHAR,
        "a\"b\\c\n\r\t\u{1}\u{1f}\u{7f}",
        "\"a\\\"b\\\\c\\n\\r\\t\\u0001\\u001f\u{7f}\"",
    ),
    (oid::BPCHAR, "ab  ", r#""ab  ""#),
    (MOOD, "glad", r#""glad""#),
    (MOOD, "{glad,sad}", r#""{glad,sad}""#),
    (MONEY, "$12.34", r#""$12.34""#),
    (BIT, "101", r#""101""#),
    (POINT, "(1,2)", r#""(1,2)""#),
    (oid::JSON, "{\"b\":1, \"a\" : 1e400,\n\"a\":2}", "{\"b\":1, \"a\" : 1e400,\n\"a\":2}"),
    (
        oid::JSONB,
        r#"{"n": 123456789012345678901234567890}"#,
        r#"{"n": 123456789012345678901234567890}"#,
    ),
    (oid::JSONB, "null", "null"),
    (oid::BYTEA, "\\x", r#""""#),
    (oid::BYTEA, "\\x00ff5c4142", r#""AP9cQUI=""#),
    (oid::BYTEA, "\\000\\377\\\\AB", r#""AP9cQUI=""#),
    (oid::INTERVAL, "P1Y2M-3DT4H5M6.789S", r#""P1Y2M-3DT4H5M6.789S""#),
];

const TIMES: &[(u32, &str, &str)] = &[
    (oid::DATE, "2024-01-02", r#""2024-01-02""#),
    (oid::DATE, "0001-01-01", r#""0001-01-01""#),
    (oid::DATE, "4713-01-01 BC", r#""4713-01-01 BC""#),
    (oid::DATE, "10000-01-01", r#""+10000-01-01""#),
    (oid::DATE, "5874897-12-31", r#""+5874897-12-31""#),
    (oid::DATE, "infinity", r#""infinity""#),
    (oid::TIME, "24:00:00", r#""24:00:00""#),
    (oid::TIME, "03:04:05.5", r#""03:04:05.5""#),
    (oid::TIMETZ, "03:04:05+00", r#""03:04:05Z""#),
    (oid::TIMETZ, "03:04:05-08", r#""03:04:05-08:00""#),
    (oid::TIMETZ, "03:04:05+05:30", r#""03:04:05+05:30""#),
    (oid::TIMETZ, "03:04:05+05:30:15", r#""03:04:05+05:30:15""#),
    (oid::TIMESTAMP, "2024-01-02 03:04:05.123", r#""2024-01-02T03:04:05.123""#),
    (oid::TIMESTAMP, "294276-12-31 23:59:59.999999", r#""+294276-12-31T23:59:59.999999""#),
    (oid::TIMESTAMP, "-infinity", r#""-infinity""#),
    (oid::TIMESTAMP, "0044-03-15 12:00:00 BC", r#""0044-03-15 12:00:00 BC""#),
    (oid::TIMESTAMPTZ, "2024-01-02 03:04:05.123+00", r#""2024-01-02T03:04:05.123Z""#),
    (oid::TIMESTAMPTZ, "2024-01-02 08:34:05+05:30", r#""2024-01-02T08:34:05+05:30""#),
    (oid::TIMESTAMPTZ, "2024-01-01 23:04:05-04", r#""2024-01-01T23:04:05-04:00""#),
    (oid::TIMESTAMPTZ, "99999-01-01 00:00:00+00", r#""+99999-01-01T00:00:00Z""#),
    (oid::TIMESTAMPTZ, "0044-03-15 12:00:00+00 BC", r#""0044-03-15 12:00:00+00 BC""#),
    (oid::TIMESTAMPTZ, "infinity", r#""infinity""#),
    // Another DateStyle: not ours to understand, but still a string.
    (oid::TIMESTAMPTZ, "Tue Jan 02 03:04:05 2024 UTC", r#""Tue Jan 02 03:04:05 2024 UTC""#),
];

const ARRAYS: &[(u32, &str, &str)] = &[
    (TEXTS, "{}", "[]"),
    (INTS, "{1,NULL,3}", "[1,null,3]"),
    (INTS, "{{1,2},{3,4}}", "[[1,2],[3,4]]"),
    (INTS, "[0:2]={1,2,3}", "[1,2,3]"),
    (INTS, "[1:1][-2:-1]={{1,2}}", "[[1,2]]"),
    (INTS, "{{{{{{7}}}}}}", "[[[[[[7]]]]]]"),
    (BOOLS, "{t,NULL,f}", "[true,null,false]"),
    (FLOATS, "{1.5,NaN,-Infinity}", r#"[1.5,"NaN","-Infinity"]"#),
    (NUMERICS, "{1.50,NaN}", r#"["1.50","NaN"]"#),
    (
        TEXTS,
        "{\"a\\\"b\",\"c\\\\d\",\"\",\"NULL\",\"x,y\",\" sp \",NULL,é,\"{}\",\"tab\tt\"}",
        r#"["a\"b","c\\d","","NULL","x,y"," sp ",null,"é","{}","tab\tt"]"#,
    ),
    (TEXTS, r#"{"\\","\"\"","\\\\x"}"#, r#"["\\","\"\"","\\\\x"]"#),
    (TEXTS, "{nULL,Null}", r#"["nULL","Null"]"#),
    (BOXES, "{(3,4),(1,2);(7,8),(5,6)}", r#"["(3,4),(1,2)","(7,8),(5,6)"]"#),
    (BYTEAS, r#"{"\\xdead","\\x"}"#, r#"["3q0=",""]"#),
    (BYTEAS, r#"{"\\000\\377\\\\AB"}"#, r#"["AP9cQUI="]"#),
    (JSONBS, r#"{"{\"a\": \"b\"}","null"}"#, r#"[{"a": "b"},null]"#),
    (DATES, "{2024-01-02,infinity}", r#"["2024-01-02","infinity"]"#),
    (TIMESTAMPTZS, r#"{"2024-01-02 03:04:05+00"}"#, r#"["2024-01-02T03:04:05Z"]"#),
    (INTERVALS, "{P1D}", r#"["P1D"]"#),
    (INT4RANGES, r#"{"[1,3)"}"#, r#"["[1,3)"]"#),
];

#[test]
fn values_become_the_json_of_their_type() {
    for (type_oid, text, expected) in [SCALARS, TIMES, ARRAYS].concat() {
        let mut out = b"#".to_vec();
        Shape::of(type_oid)
            .write(&mut out, text.as_bytes())
            .unwrap_or_else(|error| panic!("{type_oid} {text}: {error}"));
        let written = std::str::from_utf8(&out).unwrap();
        assert_eq!(written, format!("#{expected}"), "type {type_oid}");
        serde_json::from_slice::<&serde_json::value::RawValue>(&out[1..]).unwrap();
    }
}

#[test]
fn what_the_output_function_never_writes_is_refused() {
    let cases: &[(u32, &[u8])] = &[
        (oid::BOOL, b"true"),
        (oid::BOOL, b""),
        (oid::INT4, b"1.5"),
        (oid::INT4, b"NaN"),
        (oid::INT8, b"007"),
        (oid::FLOAT8, b"inf"),
        (oid::FLOAT8, b"0x1p3"),
        (oid::JSON, b""),
        (oid::JSON, b"\"\xff\""),
        (oid::TEXT, b"\xc3"),
        (oid::DATE, b"\xff"),
        (oid::BYTEA, b"\\xabc"),
        (INTS, b""),
        (INTS, b"{"),
        (INTS, b"{1"),
        (INTS, b"{1,"),
        (INTS, b"{1,}"),
        (INTS, b"{,1}"),
        (INTS, b"{1}}"),
        (INTS, b"{1}x"),
        (INTS, b"{1;2}"),
        (INTS, b"{1 2}"),
        (INTS, b"[0:1={1,2}x"),
        (INTS, b"[x]={1}"),
        (INTS, b"{{{{{{{7}}}}}}}"),
        (TEXTS, b"{\"a}"),
        (TEXTS, b"{\"a\\"),
        (TEXTS, b"{\"a\\\"}"),
        (TEXTS, b"{a\"b\"}"),
        (TEXTS, b"{\xff}"),
    ];
    for (type_oid, text) in cases {
        let mut out = b"#".to_vec();
        let error =
            Shape::of(*type_oid).write(&mut out, text).expect_err(&text.escape_ascii().to_string());
        assert_eq!(error.kind(), Kind::Event);
        assert_eq!(out, b"#", "{}", text.escape_ascii());
    }
}

#[test]
fn a_numeric_keeps_all_its_digits() {
    let digits = "9".repeat(131_072);
    let mut out = Vec::new();
    Shape::of(oid::NUMERIC).write(&mut out, digits.as_bytes()).unwrap();
    assert_eq!(out, format!("\"{digits}\"").as_bytes());
}

#[test]
fn a_million_braces_do_not_exhaust_the_stack() {
    let braces = vec![b'{'; 1_000_000];
    assert!(Shape::of(INTS).write(&mut Vec::new(), &braces).is_err());
}

/// Types whose output is valid JSON whatever the text is, if it is written at all.
const CHECKED: &[u32] = &[
    oid::BOOL,
    oid::INT4,
    oid::FLOAT8,
    oid::NUMERIC,
    oid::TEXT,
    oid::BYTEA,
    oid::DATE,
    oid::TIMESTAMP,
    oid::TIMESTAMPTZ,
    oid::TIMETZ,
    oid::INTERVAL,
    MOOD,
    BOOLS,
    BYTEAS,
    INTS,
    TEXTS,
    BOXES,
    FLOATS,
    TIMESTAMPTZS,
];

/// Every type with a renderer of its own, and one that has none.
const BINARY: &[u32] = &[
    oid::BOOL,
    oid::BYTEA,
    oid::INT8,
    oid::INT2,
    oid::INT4,
    oid::TEXT,
    oid::OID,
    oid::JSON,
    oid::FLOAT4,
    oid::FLOAT8,
    oid::DATE,
    oid::TIME,
    oid::TIMESTAMP,
    oid::TIMESTAMPTZ,
    oid::INTERVAL,
    oid::TIMETZ,
    oid::NUMERIC,
    oid::UUID,
    oid::JSONB,
    18,
    28,
    650,
    774,
    829,
    869,
    1560,
    1562,
    3220,
    5069,
    3904,
    3906,
    3908,
    3910,
    3912,
    3926,
    4451,
    4532,
    4536,
    600,
    BOOLS,
    BYTEAS,
    INTS,
    TEXTS,
    FLOATS,
    DATES,
    TIMESTAMPTZS,
    INTERVALS,
    NUMERICS,
    JSONBS,
    INT4RANGES,
];

/// Text made of what the parsers look for, so that they get far.
fn tricky() -> impl Strategy<Value = Vec<u8>> {
    let token = prop::sample::select(vec![
        "{",
        "}",
        ",",
        ";",
        "\"",
        "\\",
        "NULL",
        "[",
        "]",
        "=",
        "0:1",
        "1",
        "-",
        "+00",
        " ",
        ":",
        ".5",
        "e+1",
        "t",
        "f",
        "\\x",
        "ff",
        "\\000",
        "2024-01-02",
        "03:04:05",
        "BC",
        "é",
        "\n",
    ]);
    prop::collection::vec(token, 0..16).prop_map(|tokens| tokens.concat().into_bytes())
}

fn array_text(elements: &[Option<String>]) -> String {
    let quote = |text: &String| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let quoted: Vec<_> =
        elements.iter().map(|e| e.as_ref().map_or("NULL".to_owned(), quote)).collect();
    format!("{{{}}}", quoted.join(","))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn output_is_one_json_value_or_nothing(
        type_oid in prop::sample::select(CHECKED),
        text in prop_oneof![tricky(), prop::collection::vec(any::<u8>(), 0..40)],
    ) {
        let mut out = Vec::new();
        match Shape::of(type_oid).write(&mut out, &text) {
            Ok(()) => {
                let text = std::str::from_utf8(&out).unwrap();
                serde_json::from_str::<&serde_json::value::RawValue>(text).unwrap();
            }
            Err(error) => {
                prop_assert_eq!(error.kind(), Kind::Event);
                prop_assert!(out.is_empty());
            }
        }
    }

    #[test]
    fn text_and_text_arrays_keep_their_content(
        elements in prop::collection::vec(prop::option::of(any::<String>()), 0..8)
    ) {
        let mut out = Vec::new();
        Shape::of(TEXTS).write(&mut out, array_text(&elements).as_bytes()).unwrap();
        prop_assert_eq!(&serde_json::from_slice::<Vec<Option<String>>>(&out).unwrap(), &elements);
        for text in elements.iter().flatten() {
            out.clear();
            Shape::of(oid::TEXT).write(&mut out, text.as_bytes()).unwrap();
            prop_assert_eq!(&serde_json::from_slice::<String>(&out).unwrap(), text);
        }
    }

    #[test]
    fn hostile_binary_values_are_text_or_an_error(
        type_oid in prop::sample::select(BINARY),
        value in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        match Types::default().text(type_oid, &value) {
            Ok(_) => {}
            Err(error) => prop_assert_eq!(error.kind(), Kind::Event),
        }
    }

    #[test]
    fn bytea_keeps_its_content(value in prop::collection::vec(any::<u8>(), 0..2000)) {
        use base64::Engine;
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut out = Vec::new();
        Shape::of(oid::BYTEA).write(&mut out, format!("\\x{hex}").as_bytes()).unwrap();
        let base64 = serde_json::from_slice::<String>(&out).unwrap();
        prop_assert_eq!(base64::engine::general_purpose::STANDARD.decode(base64).unwrap(), value);
    }
}
