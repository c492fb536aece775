//! Random types and random values of them, as SQL, with their JSON where it is plain what it is.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value as Json, json};

pub use fastrand::Rng;

/// A value: an SQL expression, and its JSON where that is plain.
pub struct Made {
    pub sql: String,
    pub json: Option<Json>,
}

type Make = Box<dyn Fn(&mut Rng) -> Made>;

/// A type.
pub struct Kind {
    pub name: String,
    pub make: Make,
}

fn made(sql: impl Into<String>, json: impl Into<Option<Json>>) -> Made {
    Made { sql: sql.into(), json: json.into() }
}

/// `count` types and the statements that create those of users.
pub fn kinds(dice: &mut Rng, count: usize) -> (String, Vec<Kind>) {
    let mut create =
        "CREATE TYPE public.mood AS ENUM ('fine', 'so so', 'it''s', '{,}'); ".to_owned();
    let kinds = (0..count).map(|_| kind(dice, &mut create, 3)).collect();
    (create, kinds)
}

/// A type that is made of others up to this depth.
fn kind(dice: &mut Rng, create: &mut String, depth: u32) -> Kind {
    match if depth == 0 { 0 } else { dice.u32(0..8) } {
        4 | 5 => array(kind(dice, create, depth - 1)),
        6 => domain(dice, create, depth),
        7 => composite(dice, create, depth),
        _ => scalar(dice),
    }
}

/// A name of its own: what stands in `create` only grows.
fn name(create: &str, kind: &str) -> String {
    format!("public.{kind}_{}", create.len())
}

fn domain(dice: &mut Rng, create: &mut String, depth: u32) -> Kind {
    let base = kind(dice, create, depth - 1);
    let name = name(create, "dom");
    *create += &format!("CREATE DOMAIN {name} AS {}; ", base.name);
    let cast = name.clone();
    let make: Make = Box::new(move |dice| {
        let value = (base.make)(dice);
        Made { sql: format!("({})::{cast}", value.sql), ..value }
    });
    Kind { name, make }
}

fn composite(dice: &mut Rng, create: &mut String, depth: u32) -> Kind {
    let fields: Vec<Kind> = (0..dice.usize(1..5)).map(|_| kind(dice, create, depth - 1)).collect();
    let name = name(create, "row");
    let columns: Vec<String> = fields
        .iter()
        .enumerate()
        .map(|(index, field)| format!("f{index} {}", field.name))
        .collect();
    *create += &format!("CREATE TYPE {name} AS ({}); ", columns.join(", "));
    let cast = name.clone();
    let make: Make = Box::new(move |dice| {
        let values: Vec<String> = fields.iter().map(|field| nullable(dice, field).sql).collect();
        made(format!("ROW({})::{cast}", values.join(", ")), None)
    });
    Kind { name, make }
}

fn nullable(dice: &mut Rng, kind: &Kind) -> Made {
    match dice.u32(0..6) {
        0 => made(format!("NULL::{}", kind.name), Json::Null),
        _ => (kind.make)(dice),
    }
}

/// Postgres has no arrays of arrays: an element that is one is a domain over it.
fn array(element: Kind) -> Kind {
    if element.name.ends_with("[]") {
        return element;
    }
    let name = format!("{}[]", element.name);
    let cast = name.clone();
    let make: Make = Box::new(move |dice| {
        let count = dice.usize(0..5);
        let values: Vec<Made> = (0..count).map(|_| nullable(dice, &element)).collect();
        let sql: Vec<&str> = values.iter().map(|value| &*value.sql).collect();
        let sql = format!("ARRAY[{}]::{cast}", sql.join(", "));
        let json: Option<Vec<Json>> = values.iter().map(|value| value.json.clone()).collect();
        let json = json.map(Json::Array);
        match dice.u32(0..4) {
            // Two dimensions, and bounds of its own.
            0 if count > 0 => made(
                format!("ARRAY[{sql}, {sql}]::{cast}"),
                json.map(|json| json!([json.clone(), json])),
            ),
            _ => made(sql, json),
        }
    });
    Kind { name, make }
}

fn quoted(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

fn text(dice: &mut Rng) -> String {
    const PARTS: [&str; 22] = [
        "a", "B", " ", "\"", "\\", "'", "{", "}", "(", ")", "[", "]", ",", ";", "\n", "\t", "NULL",
        "null", "é", "🐇", "\u{1}", "%",
    ];
    (0..dice.usize(0..6)).map(|_| PARTS[dice.usize(0..PARTS.len())]).collect()
}

fn pick<'a>(dice: &mut Rng, from: &[&'a str]) -> &'a str {
    from[dice.usize(0..from.len())]
}

fn day(dice: &mut Rng) -> String {
    match dice.u32(0..8) {
        0 => pick(dice, &["infinity", "-infinity", "4713-01-01 BC", "0044-03-15 BC"]).into(),
        1 => format!("{}-12-31", dice.u32(10_000..200_000)),
        _ => format!("{:04}-{:02}-{:02}", dice.u32(1..3000), dice.u32(1..13), dice.u32(1..29)),
    }
}

fn clock(dice: &mut Rng) -> String {
    let us = [0, 500_000, dice.u32(0..1_000_000)][dice.usize(0..3)];
    format!("{:02}:{:02}:{:02}.{us:06}", dice.u32(0..24), dice.u32(0..60), dice.u32(0..60))
}

fn moment(dice: &mut Rng) -> String {
    let day = day(dice);
    match day.strip_suffix(" BC") {
        Some(day) => format!("{day} {} BC", clock(dice)),
        None if day.contains("infinity") => day,
        None => format!("{day} {}", clock(dice)),
    }
}

fn float(dice: &mut Rng) -> f64 {
    match dice.u32(0..4) {
        0 => f64::from(dice.i32(-1000..1000)) / 8.0,
        1 => dice.f64() * 10_f64.powi(dice.i32(-20..20)),
        _ => Some(f64::from_bits(dice.u64(..))).filter(|v| v.is_finite()).unwrap_or(-0.0),
    }
}

fn numeric(dice: &mut Rng) -> String {
    let digits = |dice: &mut Rng, most: usize| -> String {
        (0..dice.usize(1..most)).map(|_| char::from(b'0' + dice.u8(0..10))).collect()
    };
    let sign = pick(dice, &["", "-"]);
    match dice.u32(0..6) {
        0 => pick(dice, &["NaN", "Infinity", "-Infinity", "0", "0.000"]).into(),
        1 => format!("{sign}{}{}", dice.u32(1..10), "0".repeat(dice.usize(0..40))),
        2 => format!("0.{}{}", "0".repeat(dice.usize(0..30)), dice.u32(1..100)),
        _ => {
            let whole = digits(dice, 30);
            let whole = whole.trim_start_matches('0');
            format!("{sign}{}.{}", if whole.is_empty() { "9" } else { whole }, digits(dice, 20))
        }
    }
}

fn numbers(dice: &mut Rng) -> Kind {
    let (name, make): (&str, fn(&mut Rng) -> Made) = match dice.u32(0..9) {
        0 => ("bool", |dice| {
            let yes = dice.bool();
            made(format!("{yes}"), json!(yes))
        }),
        1 => ("int2", |dice| {
            let n = dice.i16(..);
            made(format!("'{n}'::int2"), json!(n))
        }),
        2 => ("int4", |dice| {
            let n = dice.i32(..);
            made(format!("'{n}'::int4"), json!(n))
        }),
        3 => ("int8", |dice| {
            let n = dice.i64(..);
            made(format!("'{n}'::int8"), json!(n))
        }),
        4 => ("float8", |dice| match float(dice) {
            n if n == 0.0 => made(format!("'{n}'::float8"), None),
            // serde_json does not read all of the others exactly.
            n if n.abs() < 1000.0 && n.fract() != 0.0 && (n * 8.0).fract() == 0.0 => {
                made(format!("'{n:e}'::float8"), json!(n))
            }
            n => made(format!("'{n:e}'::float8"), None),
        }),
        5 => ("float4", |dice| {
            let n = f32::from_bits(dice.u32(..));
            made(format!("'{:e}'::float4", if n.is_finite() { n } else { 0.5 }), None)
        }),
        6 => ("numeric", |dice| {
            let n = numeric(dice);
            made(format!("'{n}'::numeric"), json!(n))
        }),
        7 => ("money", |dice| {
            made(format!("'{}.{:02}'::money", dice.i32(..), dice.u32(0..100)), None)
        }),
        _ => ("oid", |dice| {
            let n = dice.u32(..);
            made(format!("'{n}'::oid"), json!(n))
        }),
    };
    Kind { name: name.into(), make: Box::new(make) }
}

fn texts(dice: &mut Rng) -> Kind {
    let (name, make): (&str, fn(&mut Rng) -> Made) = match dice.u32(0..9) {
        0 => ("varchar(40)", |dice| {
            let value = text(dice);
            made(format!("{}::varchar(40)", quoted(&value)), json!(value))
        }),
        1 => ("char(12)", |dice| {
            let value = pick(dice, &["a", "", " b", "\"", "c d"]);
            let sql = format!("{}::char(12)", quoted(value));
            made(sql, json!(format!("{value:<12}")))
        }),
        2 => ("bytea", |dice| {
            let bytes: Vec<u8> = (0..dice.usize(0..20)).map(|_| dice.u8(..)).collect();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            made(format!("'\\x{hex}'::bytea"), json!(STANDARD.encode(bytes)))
        }),
        3 => ("uuid", |dice| {
            let uuid = uuid::Uuid::from_u128(dice.u128(..)).to_string();
            made(format!("'{uuid}'::uuid"), json!(uuid))
        }),
        4 => ("jsonb", |dice| {
            let value = json!({"a": text(dice), "b": [dice.i64(..), Json::Null], "c": {}});
            made(format!("{}::jsonb", quoted(&value.to_string())), value)
        }),
        5 => ("json", |dice| {
            let value = json!([text(dice), dice.bool()]);
            made(format!("{}::json", quoted(&value.to_string())), value)
        }),
        6 => ("public.mood", |dice| {
            let value = pick(dice, &["fine", "so so", "it's", "{,}"]);
            made(format!("{}::public.mood", quoted(value)), json!(value))
        }),
        7 => ("name", |dice| {
            let value = text(dice);
            made(format!("{}::name", quoted(&value)), json!(value))
        }),
        _ => ("text", |dice| {
            let value = text(dice);
            made(format!("{}::text", quoted(&value)), json!(value))
        }),
    };
    Kind { name: name.into(), make: Box::new(make) }
}

fn times(dice: &mut Rng) -> Kind {
    let (name, make): (&str, fn(&mut Rng) -> Made) = match dice.u32(0..6) {
        0 => ("date", |dice| made(format!("'{}'::date", day(dice)), None)),
        1 => ("time", |dice| made(format!("'{}'::time", clock(dice)), None)),
        2 => ("timetz", |dice| {
            let zone = pick(dice, &["+00", "-08", "+05:30", "-15:59:59", "+00:00:01"]);
            made(format!("'{}{zone}'::timetz", clock(dice)), None)
        }),
        3 => ("timestamp", |dice| made(format!("'{}'::timestamp", moment(dice)), None)),
        4 => ("timestamptz", |dice| made(format!("'{}'::timestamptz", moment(dice)), None)),
        _ => ("interval", |dice| {
            let (months, days) = (dice.i16(..), dice.i16(..));
            let us = [0, dice.i64(-1 << 50..1 << 50), dice.i64(-1000..1000)][dice.usize(0..3)];
            let span = format!("{months} months {days} days {us} us");
            made(format!("'{span}'::interval"), None)
        }),
    };
    Kind { name: name.into(), make: Box::new(make) }
}

fn ranges(dice: &mut Rng) -> Kind {
    type Bound = fn(&mut Rng) -> String;
    let kinds: [(&str, &str, Bound); 5] = [
        ("int4range", "int4multirange", |dice| dice.i16(..).to_string()),
        ("int8range", "int8multirange", |dice| dice.i32(..).to_string()),
        ("numrange", "nummultirange", |dice| format!("{}.{}", dice.i16(..), dice.u8(..))),
        ("daterange", "datemultirange", |dice| format!("2{:03}-01-02", dice.u32(0..1000))),
        ("tstzrange", "tstzmultirange", |dice| {
            format!("\"2{:03}-01-02 {}+00\"", dice.u32(0..1000), clock(dice))
        }),
    ];
    let (range, multirange, bound) = kinds[dice.usize(0..kinds.len())];
    let of = move |dice: &mut Rng| {
        let (first, second) = match dice.u32(0..5) {
            0 => (String::new(), bound(dice)),
            1 => (bound(dice), String::new()),
            _ => (bound(dice), bound(dice)),
        };
        let (open, close) = (pick(dice, &["[", "("]), pick(dice, &["]", ")"]));
        // The wrong way round is an error.
        let (a, b) = (first.trim_matches('"'), second.trim_matches('"'));
        let numbers = a.parse::<f64>().ok().zip(b.parse::<f64>().ok());
        let is_wrong = match numbers {
            Some((a, b)) => a > b,
            None => !a.is_empty() && !b.is_empty() && a > b,
        };
        match is_wrong {
            true => format!("'{open}{second},{first}{close}'::{range}"),
            false => format!("'{open}{first},{second}{close}'::{range}"),
        }
    };
    if dice.bool() {
        let make: Make = Box::new(move |dice| match dice.u32(0..6) {
            0 => made(format!("'empty'::{range}"), json!("empty")),
            _ => made(of(dice), None),
        });
        return Kind { name: range.into(), make };
    }
    let make: Make = Box::new(move |dice| {
        let count = dice.usize(0..4);
        let ranges: Vec<String> = (0..count).map(|_| of(dice)).collect();
        made(format!("{multirange}({})", ranges.join(", ")), None)
    });
    Kind { name: multirange.into(), make }
}

fn others(dice: &mut Rng) -> Kind {
    let (name, make): (&str, fn(&mut Rng) -> Made) = match dice.u32(0..10) {
        0 => ("inet", |dice| {
            let four = std::net::Ipv4Addr::from(dice.u32(..));
            made(format!("'{four}/{}'::inet", dice.u32(0..33)), None)
        }),
        1 => ("inet", |dice| {
            let mut words = [0_u16; 8].map(|_| dice.u16(..) * u16::from(dice.bool()));
            if dice.u32(0..4) == 0 {
                words[..6].copy_from_slice(&[0, 0, 0, 0, 0, [0, 0xFFFF][dice.usize(0..2)]]);
            }
            let six = std::net::Ipv6Addr::from(words);
            made(format!("'{six}/{}'::inet", dice.u32(0..129)), None)
        }),
        2 => ("macaddr8", |dice| made(format!("'{:016x}'::macaddr8", dice.u64(..)), None)),
        3 => ("varbit", |dice| {
            let bits: String = (0..dice.usize(0..20)).map(|_| pick(dice, &["0", "1"])).collect();
            made(format!("B'{bits}'::varbit"), json!(bits))
        }),
        4 => {
            ("point", |dice| made(format!("point('{:e}', '{:e}')", float(dice), float(dice)), None))
        }
        5 => ("box", |dice| {
            let mut number = || dice.i16(..);
            made(format!("'({},{}),({},{})'::box", number(), number(), number(), number()), None)
        }),
        6 => ("polygon", |dice| {
            let points: Vec<String> = (0..dice.usize(1..4))
                .map(|_| format!("({},{:e})", dice.i16(..), float(dice)))
                .collect();
            made(format!("'({})'::polygon", points.join(",")), None)
        }),
        7 => ("tsvector", |dice| {
            let words = quoted(&text(dice).replace('\u{1}', "x"));
            made(format!("to_tsvector('simple', {words} || ' one two''s one')"), None)
        }),
        8 => ("tsquery", |dice| made(format!("{}::tsquery", quoted(&query(dice, 4))), None)),
        _ => ("pg_lsn", |dice| {
            made(format!("'{:X}/{:X}'::pg_lsn", dice.u32(..), dice.u32(..)), None)
        }),
    };
    Kind { name: name.into(), make: Box::new(make) }
}

fn query(dice: &mut Rng, depth: u32) -> String {
    match if depth == 0 { 0 } else { dice.u32(0..6) } {
        1 => format!("!({})", query(dice, depth - 1)),
        2 | 3 => format!("({}) & ({})", query(dice, depth - 1), query(dice, depth - 1)),
        4 => format!("({}) | ({})", query(dice, depth - 1), query(dice, depth - 1)),
        5 => {
            let distance = pick(dice, &["<->", "<2>", "<17>"]);
            format!("({}) {distance} ({})", query(dice, depth - 1), query(dice, depth - 1))
        }
        _ => pick(dice, &["a", "b:*", "c:AB", "'it''s'", "d:*D"]).into(),
    }
}

fn scalar(dice: &mut Rng) -> Kind {
    match dice.u32(0..5) {
        0 => numbers(dice),
        1 => texts(dice),
        2 => times(dice),
        3 => ranges(dice),
        _ => others(dice),
    }
}
