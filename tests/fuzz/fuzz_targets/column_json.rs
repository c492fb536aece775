//! Any bytes as a column's text form: the output is one JSON value, or nothing and an error.
//!
//! The first byte picks the type. Run:
//! `scripts/fuzz 60 column_json`

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;
use watership::column::{Shape, oid};

/// `json` and `jsonb` are left out: they are embedded as they come.
const TYPES: &[u32] = &[
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
    1000,
    1001,
    1007,
    1009,
    1020,
    1022,
    1185,
];

fuzz_target!(|data: &[u8]| {
    let Some((pick, text)) = data.split_first() else { return };
    let type_oid = TYPES[usize::from(*pick) % TYPES.len()];
    let mut out = Vec::new();
    match Shape::of(type_oid).write(&mut out, text) {
        Ok(()) => {
            let text = std::str::from_utf8(&out).expect("JSON is UTF-8");
            serde_json::from_str::<&RawValue>(text).expect("the output is JSON");
        }
        Err(_) => assert!(out.is_empty(), "an error leaves nothing behind"),
    }
});
