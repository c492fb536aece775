//! Instructions per event on the hot path, counted by Callgrind: the same on a busy machine.
//!
//! Each benchmark works through [`EVENTS`] events and fails above its own limit per event, which
//! is a good tenth above what was measured when it was last set. To move a limit is a decision,
//! made in the commit that needs it.
//!
//! Needs valgrind and `cargo install gungraun-runner` in the version of the gungraun dependency.
//! Run: `cargo bench --bench instructions`

#![allow(missing_docs, reason = "the benchmark macros make public items")]
#![allow(clippy::exit, clippy::disallowed_methods, reason = "gungraun's harness ends itself")]

use std::hint::black_box;

use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use watership::column::{Shape, oid};
use watership::pg::pgoutput::{Message, Value, decode};

/// Events that one benchmark works through.
const EVENTS: u64 = 1000;

/// Limits, in instructions per event. Beside them: measured (rustc 1.95, x86-64).
const DECODE_OUTBOX_MAX: u64 = 910; // 822
const DECODE_WIDE_MAX: u64 = 1600; // 1452
const JSON_WIDE_MAX: u64 = 8250; // 7471

/// Refuses more than `instructions` per event.
fn at_most(instructions: u64) -> LibraryBenchmarkConfig {
    let mut callgrind = Callgrind::with_args(["--cache-sim=no"]);
    callgrind.hard_limits([(EventKind::Ir, instructions * EVENTS)]);
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(callgrind);
    config
}

/// The text form of a value, by column; `None` is null.
type Columns<'a> = [Option<&'a str>];

fn insert(columns: &Columns<'_>) -> Vec<u8> {
    let mut frame = b"I\0\0\x40\x07N".to_vec();
    frame.extend_from_slice(&u16::try_from(columns.len()).expect("few columns").to_be_bytes());
    for column in columns {
        let Some(text) = column else {
            frame.push(b'n');
            continue;
        };
        frame.push(b't');
        frame.extend_from_slice(&u32::try_from(text.len()).expect("short text").to_be_bytes());
        frame.extend_from_slice(text.as_bytes());
    }
    frame
}

/// Inserts into the outbox with a payload of 330 bytes, a different row each.
fn outbox_frames() -> Vec<Vec<u8>> {
    let frame = |number: u64| {
        let id = format!("0192f2a0-0000-7000-8000-{number:012}");
        let key = format!("{}", number % 100);
        let payload = format!("{{\"order\":{number:08},\"note\":\"{}\"}}", "x".repeat(302));
        assert_eq!(payload.len(), 330);
        insert(&[
            Some(&id),
            Some("order"),
            Some(&key),
            Some("order_placed"),
            Some(&payload),
            None,
            Some("application/json"),
            None,
            None,
            Some("2024-01-02 03:04:05.123456+00"),
        ])
    };
    (0..EVENTS).map(frame).collect()
}

/// What the columns of a wide table hold, four times over.
const WIDE: [(u32, Option<&str>); 5] = [
    (oid::INT8, Some("9007199254740993")),
    (oid::TEXT, Some("Sandleford Warren, \"Hampshire\"")),
    (oid::NUMERIC, Some("1234.50")),
    (oid::TIMESTAMPTZ, Some("2024-01-02 03:04:05.123456+00")),
    (oid::BOOL, None),
];
const WIDE_COLUMNS: usize = 4 * WIDE.len();

fn wide_frames() -> Vec<Vec<u8>> {
    let columns = [WIDE.map(|(_, text)| text); 4].concat();
    vec![insert(&columns); usize::try_from(EVENTS).expect("EVENTS is small")]
}

/// The frames go back to the caller, so that freeing them is not counted.
fn decode_and_read<const N: usize>(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    for frame in &frames {
        let mut values = [Value::Null; N];
        match decode(black_box(frame)) {
            Ok(Message::Insert { new, .. }) => assert_eq!(new.read_into(&mut values), N),
            other => panic!("not an insert: {other:?}"),
        }
        black_box(values);
    }
    frames
}

#[library_benchmark(config = at_most(DECODE_OUTBOX_MAX))]
#[bench::payload_of_330_bytes(args = (), setup = outbox_frames)]
fn decode_outbox(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    decode_and_read::<10>(frames)
}

#[library_benchmark(config = at_most(DECODE_WIDE_MAX))]
#[bench::columns_20(args = (), setup = wide_frames)]
fn decode_wide(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    decode_and_read::<WIDE_COLUMNS>(frames)
}

/// A row of 20 columns, as the shapes and texts that `column` gets.
fn wide_row() -> ([(Shape, Option<&'static str>); WIDE_COLUMNS], Vec<u8>) {
    let row = std::array::from_fn(|column| {
        let (type_oid, text) = WIDE[column % WIDE.len()];
        (Shape::of(type_oid), text)
    });
    (row, Vec::with_capacity(4096))
}

#[library_benchmark(config = at_most(JSON_WIDE_MAX))]
#[bench::columns_20(args = (), setup = wide_row)]
fn json_wide((row, mut out): ([(Shape, Option<&'static str>); WIDE_COLUMNS], Vec<u8>)) -> Vec<u8> {
    for _ in 0..EVENTS {
        out.clear();
        for (shape, text) in &row {
            match black_box(text) {
                Some(text) => shape.write(&mut out, text.as_bytes()).expect("it is valid"),
                None => out.extend_from_slice(b"null"),
            }
        }
        black_box(&out);
    }
    out
}

library_benchmark_group!(name = decoder, benchmarks = [decode_outbox, decode_wide]);
library_benchmark_group!(name = column, benchmarks = [json_wide]);

main!(library_benchmark_groups = [decoder, column]);
