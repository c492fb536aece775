//! What is committed, as a walsender has it: transactions of outbox events and of changes of
//! captured tables with every replica identity, in real pgoutput bytes, each change at its LSN.
//!
//! Whom a change must not overtake is known here independently of the relay: each is the nth of
//! one lane (its outbox key or its row), of two (a key change), or of all of its table (a truncate,
//! and every change of a table without a key).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use uuid::Uuid;
use watership::event::Table;
use watership::position::{Lsn, Position};
use watership::route::DatabaseSecret;
use watership::source::Item;
use watership::source::outbox::OutboxTable;
use watership::source::transaction::{Assembler, CapturedTable, Former, Options, Timelines};

pub const OUTBOX: u32 = 16_384;
/// WAL between two transactions: more than the relay's own writes, so that an idle stream advances.
pub const GAP: u64 = 10_000;
/// A small event's body is below it, a large one's above.
pub const MAX_BODY: usize = 2_000;
/// Rows of a captured table, live or not.
const ROWS: u32 = 5;

/// A captured table. Its columns are `id`, its key unless it has none, `body`, and `pad`, which may
/// be TOASTed.
struct Captured {
    oid: u32,
    name: &'static str,
    /// As Relation says it.
    identity: u8,
    keyed: bool,
}

const fn table(oid: u32, name: &'static str, identity: u8, keyed: bool) -> Captured {
    Captured { oid, name, identity, keyed }
}

const TABLES: [Captured; 5] = [
    table(20_001, "by_key", b'd', true),
    table(20_002, "by_index", b'i', true),
    table(20_003, "full", b'f', true),
    table(20_004, "full_without_key", b'f', false),
    // Only its inserts are published.
    table(20_005, "inserts", b'n', true),
];

/// One committed event.
#[derive(Debug, Clone)]
pub struct Written {
    pub id: Uuid,
    /// Where it stands: each lane, and its number there.
    pub places: Vec<(u32, u32)>,
    /// Its number in its transaction, and among the tables of a truncate.
    pub ordinal: u64,
    pub sub: u32,
}

/// A message of the stream.
#[derive(Debug, Clone)]
pub struct Frame {
    pub lsn: Lsn,
    pub bytes: Bytes,
    /// The captured tables that it is about: described before in each stream.
    pub tables: Vec<u32>,
}

/// A committed transaction.
#[derive(Debug)]
pub struct Transaction {
    pub commit_lsn: Lsn,
    pub end_lsn: Lsn,
    pub events: Vec<Written>,
    pub frames: Vec<Frame>,
    /// What was written after it, for a server that is promoted at its end.
    after: State,
}

/// What the next change depends on.
#[derive(Debug, Clone, Default)]
struct State {
    /// Events of each lane.
    counts: HashMap<u32, u32>,
    live: HashSet<(u32, u32)>,
    written: u32,
    xid: u32,
}

/// How many events of what a history has.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub events: u32,
    pub keys: u32,
    /// Probability that a body is large.
    pub large: f64,
    /// Share of the changes of captured tables.
    pub captured: f64,
}

/// The transactions of a cluster on its current timeline.
pub struct History {
    shape: Shape,
    pub log: Vec<Transaction>,
    timeline: u32,
    earlier: Vec<(u32, Lsn)>,
    /// Ids of what was committed, on any timeline.
    all: HashSet<Uuid>,
}

impl History {
    pub fn new(rng: &mut fastrand::Rng, shape: Shape) -> Self {
        let (log, earlier, all) = Default::default();
        let mut history = Self { shape, log, timeline: 1, earlier, all };
        history.write(rng);
        history
    }

    pub fn timelines(&self) -> Timelines {
        Timelines::new(self.timeline, self.earlier.clone())
    }

    /// A standby is promoted that has the first `kept` transactions; others are written in place of
    /// those that it does not have. It has all of the timelines before.
    pub fn promote(&mut self, rng: &mut fastrand::Rng, kept: usize) -> Lsn {
        let common = self.earlier.last().map_or(Lsn::ZERO, |(_, end)| *end);
        let on_it = self.log.partition_point(|t| t.end_lsn <= common);
        self.log.truncate(kept.max(on_it));
        let switch = self.log.last().map_or(Lsn(1000), |last| last.end_lsn);
        self.earlier.push((self.timeline, switch));
        self.timeline += 1;
        self.write(rng);
        switch
    }

    /// Of an event that a failover lost.
    pub fn was_lost(&self, id: Uuid) -> bool {
        self.all.contains(&id) && !self.log.iter().flat_map(|t| &t.events).any(|e| e.id == id)
    }

    fn write(&mut self, rng: &mut fastrand::Rng) {
        let known = self.log.len();
        let mut state = self.log.last().map(|last| last.after.clone()).unwrap_or_default();
        let mut lsn = self.log.last().map_or(1000, |last| last.end_lsn.0);
        while state.written < self.shape.events {
            let most = if rng.f64() < 0.05 { 200 } else { 5 };
            let size = rng.u32(1..=most);
            lsn += GAP;
            let (events, frames) = Default::default();
            let shape = self.shape;
            let mut writer = Writer { rng, shape, state, lsn, ordinal: 0, events, frames };
            for _ in 0..size {
                writer.write();
            }
            let Writer { events, frames, lsn: last, state: mut after, .. } = writer;
            after.xid += 1;
            after.written += events.len() as u32;
            state = after.clone();
            // The end of one transaction may equal the next change's LSN (M3).
            let (commit_lsn, end_lsn) = (Lsn(last + 1), Lsn(last + 11));
            lsn = end_lsn.0;
            self.log.push(Transaction { commit_lsn, end_lsn, events, frames, after });
        }
        self.name(known);
    }

    /// Ids of captured changes are derived by the assembler: here by one that sees everything.
    fn name(&mut self, from: usize) {
        let captured = captured_tables(&BTreeMap::new());
        let (position, timelines) = (Position::default(), self.timelines());
        let mut assembler = Assembler::new(options(position, timelines, captured));
        let mut items = Vec::new();
        let mut apply = |frame: &Frame, items: &mut Vec<Item>| {
            assembler.apply(frame.lsn, &frame.bytes, items).expect("a change");
        };
        apply(&relation(OUTBOX), &mut items);
        let mut described = HashSet::new();
        for (number, transaction) in self.log.iter_mut().enumerate() {
            apply(&begin(transaction), &mut items);
            for frame in &transaction.frames {
                for table in frame.tables.iter().filter(|table| described.insert(**table)) {
                    apply(&relation(*table), &mut items);
                }
                apply(frame, &mut items);
            }
            apply(&commit(transaction), &mut items);
            let events = items.drain(..).filter_map(|item| match item {
                Item::Event(event, _) => Some(event),
                Item::Commit(_)
                | Item::Idle(_)
                | Item::Described(..)
                | Item::Columns(..)
                | Item::LowMark(..) => None,
            });
            let events: Vec<_> = events.collect();
            assert_eq!(events.len(), transaction.events.len());
            for (event, written) in events.iter().zip(&mut transaction.events) {
                let place = (event.position.ordinal, event.position.sub);
                assert_eq!(place, (written.ordinal, written.sub));
                written.id = event.id;
                let is_new = self.all.insert(event.id);
                assert!(is_new || number < from, "two changes have the id {}", event.id);
            }
        }
    }
}

/// A transaction while it is written.
struct Writer<'a> {
    rng: &'a mut fastrand::Rng,
    shape: Shape,
    state: State,
    lsn: u64,
    ordinal: u64,
    events: Vec<Written>,
    frames: Vec<Frame>,
}

impl Writer<'_> {
    fn write(&mut self) {
        if self.rng.f64() >= self.shape.captured {
            return self.outbox();
        }
        let table = &TABLES[self.rng.usize(..TABLES.len())];
        let row = self.rng.u32(..ROWS);
        let live = self.state.live.contains(&(table.oid, row));
        let (dice, other) = (self.rng.u32(..20), self.rng.u32(..ROWS));
        match (live, dice) {
            (false, 0) => self.truncate(),
            (false, dice) => self.insert(table, row, 1 + u32::from(dice > 15)),
            // Its deletes are not published.
            (true, _) if table.identity == b'n' => self.insert(table, row, 1),
            (true, ..5) => self.delete(table, row),
            (true, ..10) => self.update(table, row, other),
            (true, _) => self.update(table, row, row),
        }
    }

    /// The next place in each of the lanes.
    fn places(&mut self, lanes: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
        let counts = &mut self.state.counts;
        let next = |lane| (lane, *counts.entry(lane).and_modify(|n| *n += 1).or_insert(1));
        lanes.into_iter().map(next).collect()
    }

    /// The lanes of rows of a table; one for all where a change does not say which it is about.
    fn rows(table: &Captured, rows: impl IntoIterator<Item = u32>) -> Vec<u32> {
        let lane = |row| table.oid * 100 + row;
        if table.keyed { rows.into_iter().map(lane).collect() } else { vec![lane(0)] }
    }

    fn is_large(&mut self) -> bool {
        self.rng.f64() < self.shape.large
    }

    /// A new message of the stream with one event; at an LSN of its own, or at the last one.
    fn push(&mut self, own_lsn: bool, table: Option<u32>, bytes: Vec<u8>, lanes: Vec<u32>) {
        self.lsn += u64::from(own_lsn);
        self.ordinal += 1;
        let tables = table.into_iter().collect();
        self.frames.push(Frame { lsn: Lsn(self.lsn), bytes: bytes.into(), tables });
        let places = self.places(lanes);
        self.events.push(Written { id: Uuid::nil(), places, ordinal: self.ordinal, sub: 0 });
    }

    fn outbox(&mut self) {
        let key = self.rng.u32(..self.shape.keys);
        let id = Uuid::from_u128(self.rng.u128(..)).to_string();
        let padding = padding(self.is_large());
        let payload = format!("{{\"padding\":\"{padding}\"}}");
        let key_text = key.to_string();
        let values = [&*id, "order", &*key_text, "changed", &*payload].map(Some);
        self.push(true, None, row(b'I', OUTBOX, None, &values), vec![key]);
    }

    /// Some rows of one COPY share an LSN; without a key they are equal, too.
    fn insert(&mut self, table: &Captured, id: u32, count: u32) {
        let mut lsn_is_new = true;
        for id in (id..ROWS).take(count as usize) {
            if table.identity != b'n' && !self.state.live.insert((table.oid, id)) {
                break;
            }
            let id_text = if table.keyed { id.to_string() } else { "0".into() };
            let values = [&*id_text, padding(self.is_large()), "pad"].map(Some);
            let bytes = row(b'I', table.oid, None, &values);
            self.push(lsn_is_new, Some(table.oid), bytes, Self::rows(table, [id]));
            lsn_is_new = false;
        }
    }

    /// An update, of the key where another row has that is not there.
    fn update(&mut self, table: &Captured, before: u32, after: u32) {
        let is_free = !self.state.live.contains(&(table.oid, after));
        let after = if is_free && table.keyed { after } else { before };
        if after != before {
            self.state.live.remove(&(table.oid, before));
            self.state.live.insert((table.oid, after));
        }
        let (old, new) = (before.to_string(), after.to_string());
        let old = match table.identity {
            b'f' => Some((b'O', vec![Some(&*old), Some("before"), Some("pad")])),
            _ if before != after => Some((b'K', vec![Some(&*old), None, None])),
            _ => None,
        };
        let mut values = [&*new, padding(self.is_large()), "pad"].map(Some);
        if self.rng.bool() {
            values[2] = Some(UNCHANGED);
        }
        let bytes = row(b'U', table.oid, old, &values);
        let rows = if before == after { vec![before] } else { vec![before, after] };
        self.push(true, Some(table.oid), bytes, Self::rows(table, rows));
    }

    fn delete(&mut self, table: &Captured, id: u32) {
        self.state.live.remove(&(table.oid, id));
        let id_text = id.to_string();
        let old = match table.identity {
            b'f' => (b'O', vec![Some(&*id_text), Some("before"), Some("pad")]),
            _ => (b'K', vec![Some(&*id_text), None, None]),
        };
        let bytes = row(b'D', table.oid, Some(old), &[]);
        self.push(true, Some(table.oid), bytes, Self::rows(table, [id]));
    }

    /// Of two tables at once.
    fn truncate(&mut self) {
        let first = self.rng.usize(..TABLES.len() - 2);
        let both = &TABLES[first..first + 2];
        let mut bytes = vec![b'T'];
        bytes.put_u32(2);
        bytes.put_u8(0);
        self.lsn += 1;
        self.ordinal += 1;
        for (sub, table) in both.iter().enumerate() {
            bytes.put_u32(table.oid);
            self.state.live.retain(|(oid, _)| *oid != table.oid);
            let places = self.places(Self::rows(table, 0..ROWS));
            let (id, ordinal, sub) = (Uuid::nil(), self.ordinal, sub as u32);
            self.events.push(Written { id, places, ordinal, sub });
        }
        let tables = both.iter().map(|table| table.oid).collect();
        self.frames.push(Frame { lsn: Lsn(self.lsn), bytes: bytes.into(), tables });
    }
}

/// Stands for a TOASTed value that an update did not touch.
const UNCHANGED: &str = "unchanged";

fn padding(large: bool) -> &'static str {
    const PADDING: &str = match str::from_utf8(&[b'x'; MAX_BODY]) {
        Ok(text) => text,
        Err(_) => panic!("it is ASCII"),
    };
    if large { PADDING } else { "" }
}

/// What is told to an assembler about the tables; `described` is what the store has of them.
pub fn captured_tables(described: &BTreeMap<u32, Arc<Table>>) -> HashMap<String, CapturedTable> {
    let captured = |table: &Captured| {
        let former = described.get(&table.oid).map(|before| Former {
            version: before.version,
            key: before.key.iter().map(|i| before.columns[*i].name.to_string()).collect(),
        });
        let has_primary_key = table.keyed && table.identity != b'i';
        let primary_key = if has_primary_key { vec!["id".to_owned()] } else { Vec::new() };
        let inserts_only = table.identity == b'n';
        let leading = vec!["id".to_owned(), "body".to_owned(), "pad".to_owned()];
        let (oid, partitioned) = (table.oid, false);
        let held = None;
        CapturedTable { oid, primary_key, leading, partitioned, inserts_only, former, held }
    };
    TABLES.iter().map(|table| (format!("public.{}", table.name), captured(table))).collect()
}

pub fn options(
    resume_after: Position,
    timelines: Timelines,
    captured: HashMap<String, CapturedTable>,
) -> Options {
    Options {
        epoch: resume_after.epoch,
        system_id: 7,
        timelines,
        resume_after,
        captured,
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
    }
}

pub fn relation(oid: u32) -> Frame {
    let outbox = [("id", 2950), ("aggregate_type", 25), ("aggregate_id", 25), ("event_type", 25)];
    let outbox: Vec<(&str, u32)> = outbox.into_iter().chain([("payload", 114)]).collect();
    let captured = vec![("id", 23), ("body", 25), ("pad", 25)];
    let table = TABLES.iter().find(|table| table.oid == oid);
    let (schema, name, identity, columns) = match table {
        Some(table) => ("public", table.name, table.identity, captured),
        None => ("watership", "outbox", b'd', outbox),
    };
    let mut out = vec![b'R'];
    out.put_u32(oid);
    for text in [schema, name] {
        out.extend_from_slice(text.as_bytes());
        out.put_u8(0);
    }
    out.put_u8(identity);
    out.put_i16(columns.len() as i16);
    for (name, type_oid) in columns {
        let flagged = match identity {
            b'f' => true,
            b'n' => false,
            _ => name == "id",
        };
        out.put_u8(u8::from(flagged));
        out.extend_from_slice(name.as_bytes());
        out.put_u8(0);
        out.put_u32(type_oid);
        out.put_i32(-1);
    }
    Frame { lsn: Lsn::ZERO, bytes: out.into(), tables: Vec::new() }
}

pub fn begin(transaction: &Transaction) -> Frame {
    let mut out = vec![b'B'];
    out.put_u64(transaction.commit_lsn.0);
    out.put_i64(transaction.after.xid.into());
    out.put_u32(transaction.after.xid);
    Frame { lsn: transaction.commit_lsn, bytes: out.into(), tables: Vec::new() }
}

pub fn commit(transaction: &Transaction) -> Frame {
    let mut out = b"C\0".to_vec();
    out.put_u64(transaction.commit_lsn.0);
    out.put_u64(transaction.end_lsn.0);
    out.put_i64(0);
    Frame { lsn: transaction.commit_lsn, bytes: out.into(), tables: Vec::new() }
}

type Values<'a> = [Option<&'a str>];

/// An insert, update or delete: the old row with its kind, if it is sent, and the new one.
fn row(kind: u8, table: u32, old: Option<(u8, Vec<Option<&str>>)>, new: &Values<'_>) -> Vec<u8> {
    let mut out = vec![kind];
    out.put_u32(table);
    if let Some((kind, values)) = old {
        out.put_u8(kind);
        put_values(&mut out, &values);
    }
    if kind != b'D' {
        out.put_u8(b'N');
        put_values(&mut out, new);
    }
    out
}

fn put_values(out: &mut Vec<u8>, values: &Values<'_>) {
    out.put_i16(values.len() as i16);
    for value in values {
        match value {
            None => out.put_u8(b'n'),
            Some(UNCHANGED) => out.put_u8(b'u'),
            Some(text) => {
                out.put_u8(b't');
                out.put_u32(text.len() as u32);
                out.extend_from_slice(text.as_bytes());
            }
        }
    }
}
