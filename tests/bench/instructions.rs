//! Instructions per event on the hot path, counted by Callgrind: the same on a busy machine.
//!
//! Each benchmark works through [`EVENTS`] events, and fails above its own limit per event, which
//! is about a tenth above what was measured when it was last set. To move a limit is a decision,
//! made in the commit that needs it.
//!
//! Needs valgrind and `cargo install gungraun-runner` in the version of the gungraun dependency.
//! Run: `cargo bench --bench instructions`

#![allow(missing_docs, reason = "the benchmark macros make public items")]
#![allow(clippy::exit, clippy::disallowed_methods, reason = "gungraun's harness ends itself")]

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use gungraun::prelude::*;
use gungraun::{Callgrind, EventKind};
use watership::amqp::wire::put_publish;
use watership::column::{Shape, oid};
use watership::envelope::Envelope;
use watership::event::Event;
use watership::message::Message as WireMessage;
use watership::pg::pgoutput::{ReplicationMessage, TupleValue, decode};
use watership::position::{Lsn, Position};
use watership::relay;
use watership::route::{DatabaseSecret, Decision, LaneKeys, Plans, Resumed, Router, default_rules};
use watership::source::outbox::OutboxTable;
use watership::source::transaction::{Assembler, CapturedTable, Options, Timelines};
use watership::source::{Item, Receipt};

/// Events that one benchmark works through.
const EVENTS: u64 = 1000;

/// Limits, in instructions per event. Beside them: measured (rustc 1.95, x86-64).
const DECODE_OUTBOX_MAX: u64 = 1010; // 915
const DECODE_WIDE_MAX: u64 = 1520; // 1375
const JSON_WIDE_MAX: u64 = 8200; // 7439
const ASSEMBLE_MAX: u64 = 3270; // 2972
const ASSEMBLE_WIDE_MAX: u64 = 6500; // 5913
const ENVELOPE_MAX: u64 = 2450; // 2222
const ENVELOPE_WIDE_MAX: u64 = 15900; // 14454
const LANES_MAX: u64 = 1410; // 1279
const FRAMING_MAX: u64 = 325; // 295

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
            Some("1234567"),
            Some("7654321"),
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
        let mut values = [TupleValue::Null; N];
        match decode(black_box(frame)) {
            Ok(ReplicationMessage::Insert { new, .. }) => assert_eq!(new.read_into(&mut values), N),
            other => panic!("not an insert: {other:?}"),
        }
        black_box(values);
    }
    frames
}

#[library_benchmark(config = at_most(DECODE_OUTBOX_MAX))]
#[bench::payload_of_330_bytes(args = (), setup = outbox_frames)]
fn decode_outbox(frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    decode_and_read::<12>(frames)
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

/// An assembler inside of a transaction that captures the wide table, and what it is fed.
fn wide_assembler() -> (Assembler, Vec<Bytes>, Vec<Item>) {
    let (mut assembler, _, mut items) = assembler();
    let mut relation = b"R\0\0\x40\x08public\0wide\0d".to_vec();
    relation.extend_from_slice(&(WIDE_COLUMNS as u16).to_be_bytes());
    for column in 0..WIDE_COLUMNS {
        relation.push(u8::from(column == 0));
        relation.extend_from_slice(format!("column_{column}\0").as_bytes());
        relation.extend_from_slice(&WIDE[column % WIDE.len()].0.to_be_bytes());
        relation.extend_from_slice(&[0xff; 4]);
    }
    assembler.apply(Lsn(1), &relation.into(), &mut items).expect("Relation");
    let frame = |mut frame: Vec<u8>| {
        frame[4] = 8;
        Bytes::from(frame)
    };
    (assembler, wide_frames().into_iter().map(frame).collect(), items)
}

/// An assembler inside of a transaction, and what it is fed.
fn assembler() -> (Assembler, Vec<Bytes>, Vec<Item>) {
    let mut assembler = Assembler::new(Options {
        epoch: 1,
        system_id: 1,
        timelines: Timelines::new(1, Vec::new()),
        resume_after: Position::default(),
        captured: HashMap::from([(
            "public.wide".into(),
            CapturedTable {
                oid: 0x4008,
                primary_key: vec!["column_0".into()],
                ..Default::default()
            },
        )]),
        database: "shop".into(),
        outbox: OutboxTable::default(),
        catalog_at: Lsn::ZERO,
        renumbered: Default::default(),
        types: Default::default(),
        canary: String::new(),
        canary_before: None,
        canary_accepted: 0,
        messages: DatabaseSecret::new(&[0]).messages(),
        max_body: 16 << 20,
    });
    let mut relation = b"R\0\0\x40\x07watership\0outbox\0d\0\x0c".to_vec();
    let columns = [
        "id",
        "aggregate_type",
        "aggregate_id",
        "event_type",
        "payload",
        "data",
        "content_type",
        "headers",
        "traceparent",
        "created_at",
        "seq",
        "xid",
    ];
    for name in columns {
        relation.push(0);
        relation.extend_from_slice(name.as_bytes());
        relation.extend_from_slice(b"\0\0\0\0\x19\xff\xff\xff\xff");
    }
    let begin = [b"B".as_slice(), &7_u64.to_be_bytes(), &[0; 8], &[0; 4]].concat();
    let mut items = Vec::with_capacity(2048);
    assembler.apply(Lsn(1), &begin.into(), &mut items).expect("Begin");
    assembler.apply(Lsn(1), &relation.into(), &mut items).expect("Relation");
    (assembler, outbox_frames().into_iter().map(Bytes::from).collect(), items)
}

/// Frames, each at an LSN of its own.
fn take_all(assembler: &mut Assembler, frames: &[Bytes], items: &mut Vec<Item>) {
    for (lsn, frame) in frames.iter().enumerate() {
        let lsn = Lsn(1000 + lsn as u64);
        assembler.apply(lsn, black_box(frame), items).expect("a change");
    }
}

#[library_benchmark(config = at_most(ASSEMBLE_MAX))]
#[bench::outbox(args = (), setup = assembler)]
fn assemble(
    (mut assembler, frames, mut items): (Assembler, Vec<Bytes>, Vec<Item>),
) -> (Assembler, Vec<Bytes>, Vec<Item>) {
    take_all(&mut assembler, &frames, &mut items);
    (assembler, frames, items)
}

#[library_benchmark(config = at_most(ASSEMBLE_WIDE_MAX))]
#[bench::captured_20_columns(args = (), setup = wide_assembler)]
fn assemble_wide(
    (mut assembler, frames, mut items): (Assembler, Vec<Bytes>, Vec<Item>),
) -> (Assembler, Vec<Bytes>, Vec<Item>) {
    take_all(&mut assembler, &frames, &mut items);
    (assembler, frames, items)
}

/// Events with their router, plans and envelope.
struct Routing {
    router: Router,
    plans: Plans,
    envelope: Envelope,
    events: Vec<Event>,
    made: Vec<Made>,
}

fn routing((mut assembler, frames, mut items): (Assembler, Vec<Bytes>, Vec<Item>)) -> Routing {
    take_all(&mut assembler, &frames, &mut items);
    let event = |item| match item {
        Item::Event(event, _) => Some(event),
        Item::Commit(_)
        | Item::Idle(_)
        | Item::Described(..)
        | Item::Columns(..)
        | Item::LowMark(..) => None,
    };
    let router = Router::new(&default_rules()).expect("the default rules");
    Routing {
        plans: Plans::new(&router, Resumed::default()),
        router,
        envelope: Envelope::new("bench", || 0),
        events: items.into_iter().filter_map(event).collect(),
        made: Vec::with_capacity(2048),
    }
}

fn outbox_routing() -> Routing {
    routing(assembler())
}

fn wide_routing() -> Routing {
    routing(wide_assembler())
}

type Made = (WireMessage, LaneKeys);

fn wrap(mut routing: Routing) -> Routing {
    let Routing { router, plans, envelope, events, made } = &mut routing;
    for event in &*events {
        for decision in plans.decide(router, black_box(event)) {
            let Decision::Publish(plan, lanes) = decision else { panic!("nothing is dropped") };
            made.push((envelope.message(event, plan, 0).expect("it fits"), lanes));
        }
    }
    routing
}

#[library_benchmark(config = at_most(ENVELOPE_MAX))]
#[bench::outbox(args = (), setup = outbox_routing)]
fn route_and_envelope(routing: Routing) -> Routing {
    wrap(routing)
}

#[library_benchmark(config = at_most(ENVELOPE_WIDE_MAX))]
#[bench::captured_20_columns(args = (), setup = wide_routing)]
fn route_and_envelope_wide(routing: Routing) -> Routing {
    wrap(routing)
}

/// Messages and the receipts of their entries.
fn messages() -> (Vec<Made>, Vec<Receipt>) {
    let (mut assembler, frames, mut items) = assembler();
    take_all(&mut assembler, &frames, &mut items);
    let receipt = |item| match item {
        Item::Event(_, receipt) => Some(receipt),
        Item::Commit(_)
        | Item::Idle(_)
        | Item::Described(..)
        | Item::Columns(..)
        | Item::LowMark(..) => None,
    };
    let made = wrap(outbox_routing()).made;
    (made, items.into_iter().filter_map(receipt).collect())
}

// Through the window and the lanes, confirmed in the order of sending.
#[library_benchmark(config = at_most(LANES_MAX))]
#[bench::a_hundred_keys(args = (), setup = messages)]
fn lanes_and_watermark((made, receipts): (Vec<Made>, Vec<Receipt>)) -> Option<Receipt> {
    let (now, source): (_, Arc<str>) = (Instant::now(), "watership.outbox".into());
    let (mut lanes, mut window) =
        (relay::window::lanes::Lanes::new(), relay::window::Window::new());
    for ((message, keys), receipt) in made.into_iter().zip(receipts) {
        let entry = window.push(receipt, 1, message.size());
        let about = relay::window::lanes::About {
            position: Position::default(),
            source: source.clone(),
            committed_at_us: 0,
        };
        lanes.admit(message, about, keys, relay::window::lanes::Owner::Window(entry), now);
    }
    let mut flying = VecDeque::with_capacity(256);
    let mut last = None;
    loop {
        while let Some((ticket, _)) = lanes.next(now) {
            flying.push_back(ticket);
        }
        let Some(ticket) = flying.pop_front() else { return last };
        let confirmed = lanes.confirmed(ticket, now);
        let relay::window::lanes::Owner::Window(entry) = confirmed.owner else {
            unreachable!("nothing is parked here")
        };
        window.settle(entry);
        last = window.take_settled().or(last);
    }
}

fn publishes() -> (Vec<Made>, Vec<u8>) {
    (messages().0, Vec::with_capacity(2 << 20))
}

#[library_benchmark(config = at_most(FRAMING_MAX))]
#[bench::payload_of_330_bytes(args = (), setup = publishes)]
fn amqp_framing((made, mut out): (Vec<Made>, Vec<u8>)) -> (Vec<Made>, Vec<u8>) {
    for (message, _) in &made {
        put_publish(&mut out, 2, "watership", black_box(message), 131_072);
    }
    (made, out)
}

library_benchmark_group!(name = source, benchmarks = [assemble, assemble_wide]);
library_benchmark_group!(
    name = envelope,
    benchmarks = [route_and_envelope, route_and_envelope_wide]
);
library_benchmark_group!(name = engine, benchmarks = [lanes_and_watermark]);
library_benchmark_group!(name = amqp, benchmarks = [amqp_framing]);
library_benchmark_group!(name = decoder, benchmarks = [decode_outbox, decode_wide]);
library_benchmark_group!(name = column, benchmarks = [json_wide]);

main!(library_benchmark_groups = [decoder, column, source, envelope, engine, amqp]);
