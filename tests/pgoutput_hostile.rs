//! The pgoutput decoder against bytes of all kinds: what an encoder writes comes back, and what
//! is damaged is refused or read as something else, but never panics and never reaches outside.

#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use std::ops::Range;

use proptest::prelude::*;
use watership::pg::pgoutput::{
    OldKind, ReplicaIdentity, ReplicationMessage, Tuple, TupleValue, decode,
};

/// Damaged copies made of each message.
const MUTATIONS: u64 = 20_000;
/// Damages done to one copy at most.
const DAMAGES_MAX: u64 = 4;

/// A message that owns its parts; the encoder's input.
#[derive(Debug, Clone, PartialEq)]
enum Owned {
    Begin { lsn: u64, time: i64, xid: u32 },
    Commit { lsn: u64, end: u64, time: i64 },
    Origin { lsn: u64, name: String },
    Relation { id: u32, names: [String; 2], identity: u8, columns: Vec<(bool, String, u32, i32)> },
    Type { id: u32, names: [String; 2] },
    Insert { id: u32, new: Row },
    Update { id: u32, old: Option<(OldKind, Row)>, new: Row },
    Delete { id: u32, old: (OldKind, Row) },
    Truncate { flags: [bool; 2], ids: Vec<u32> },
    Logical { transactional: bool, lsn: u64, prefix: String, content: Vec<u8> },
}

type Row = Vec<Cell>;

#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Null,
    Unchanged,
    Text(Vec<u8>),
    Binary(Vec<u8>),
}

/// Writes fields as the message formats page gives them.
#[derive(Default)]
struct Encoder(Vec<u8>);

impl Encoder {
    fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn name(self, name: &str) -> Self {
        self.raw(name).raw([0])
    }

    fn sized(self, bytes: &[u8]) -> Self {
        self.raw(i32::try_from(bytes.len()).unwrap().to_be_bytes()).raw(bytes)
    }

    fn row(self, row: &Row) -> Self {
        let count = self.raw(i16::try_from(row.len()).unwrap().to_be_bytes());
        row.iter().fold(count, |encoder, cell| match cell {
            Cell::Null => encoder.raw(b"n"),
            Cell::Unchanged => encoder.raw(b"u"),
            Cell::Text(value) => encoder.raw(b"t").sized(value),
            Cell::Binary(value) => encoder.raw(b"b").sized(value),
        })
    }

    fn old(self, (kind, row): &(OldKind, Row)) -> Self {
        self.raw(if *kind == OldKind::Key { b"K" } else { b"O" }).row(row)
    }
}

fn encode(message: &Owned) -> Vec<u8> {
    let encoder = Encoder::default();
    let u64 = u64::to_be_bytes;
    let u32 = u32::to_be_bytes;
    let encoder = match message {
        Owned::Begin { lsn, time, xid } => {
            encoder.raw(b"B").raw(u64(*lsn)).raw(time.to_be_bytes()).raw(u32(*xid))
        }
        Owned::Commit { lsn, end, time } => {
            encoder.raw(b"C\0").raw(u64(*lsn)).raw(u64(*end)).raw(time.to_be_bytes())
        }
        Owned::Origin { lsn, name } => encoder.raw(b"O").raw(u64(*lsn)).name(name),
        Owned::Relation { id, names: [namespace, name], identity, columns } => {
            let count = i16::try_from(columns.len()).unwrap().to_be_bytes();
            let head = encoder.raw(b"R").raw(u32(*id)).name(namespace).name(name);
            columns.iter().fold(head.raw([*identity]).raw(count), |encoder, column| {
                let (key, name, oid, modifier) = column;
                encoder.raw([u8::from(*key)]).name(name).raw(u32(*oid)).raw(modifier.to_be_bytes())
            })
        }
        Owned::Type { id, names: [namespace, name] } => {
            encoder.raw(b"Y").raw(u32(*id)).name(namespace).name(name)
        }
        Owned::Insert { id, new } => encoder.raw(b"I").raw(u32(*id)).raw(b"N").row(new),
        Owned::Update { id, old, new } => {
            let head = encoder.raw(b"U").raw(u32(*id));
            let head = if let Some(old) = old { head.old(old) } else { head };
            head.raw(b"N").row(new)
        }
        Owned::Delete { id, old } => encoder.raw(b"D").raw(u32(*id)).old(old),
        Owned::Truncate { flags: [cascade, restart], ids } => {
            let count = u32(ids.len().try_into().unwrap());
            let flags = u8::from(*cascade) | u8::from(*restart) << 1;
            ids.iter().fold(encoder.raw(b"T").raw(count).raw([flags]), |e, id| e.raw(u32(*id)))
        }
        Owned::Logical { transactional, lsn, prefix, content } => {
            encoder.raw([b'M', u8::from(*transactional)]).raw(u64(*lsn)).name(prefix).sized(content)
        }
    };
    encoder.0
}

/// Walks everything that a message holds, inside `frame` only, and owns it.
fn own(message: ReplicationMessage<'_>, frame: &Range<*const u8>) -> Owned {
    let text = |text: &str| {
        // "pg_catalog" stands for an empty name and is the only text from elsewhere.
        assert!(text == "pg_catalog" || is_inside(text.as_bytes(), frame));
        text.to_owned()
    };
    match message {
        ReplicationMessage::Begin { final_lsn, commit_time, xid } => {
            Owned::Begin { lsn: final_lsn.0, time: commit_time, xid }
        }
        ReplicationMessage::Commit { commit_lsn, end_lsn, commit_time } => {
            Owned::Commit { lsn: commit_lsn.0, end: end_lsn.0, time: commit_time }
        }
        ReplicationMessage::Origin { commit_lsn, name } => {
            Owned::Origin { lsn: commit_lsn.0, name: text(name) }
        }
        ReplicationMessage::Relation(relation) => Owned::Relation {
            id: relation.id,
            names: [text(relation.namespace), text(relation.name)],
            identity: match relation.replica_identity {
                ReplicaIdentity::Default => b'd',
                ReplicaIdentity::Nothing => b'n',
                ReplicaIdentity::Full => b'f',
                ReplicaIdentity::Index => b'i',
            },
            columns: relation
                .columns()
                .map(|column| {
                    (column.key, text(column.name), column.type_oid, column.type_modifier)
                })
                .collect(),
        },
        ReplicationMessage::Type { id, namespace, name } => {
            Owned::Type { id, names: [text(namespace), text(name)] }
        }
        ReplicationMessage::Insert { relation, new } => {
            Owned::Insert { id: relation, new: row(&new, frame) }
        }
        ReplicationMessage::Update { relation, old, new } => Owned::Update {
            id: relation,
            old: old.map(|old| (old.kind, row(&old.tuple, frame))),
            new: row(&new, frame),
        },
        ReplicationMessage::Delete { relation, old } => {
            Owned::Delete { id: relation, old: (old.kind, row(&old.tuple, frame)) }
        }
        ReplicationMessage::Truncate(truncate) => Owned::Truncate {
            flags: [truncate.cascade, truncate.restart_identity],
            ids: truncate.relations().collect(),
        },
        ReplicationMessage::Logical { transactional, lsn, prefix, content } => {
            assert!(is_inside(content, frame));
            let (prefix, content) = (text(prefix), content.to_vec());
            Owned::Logical { transactional, lsn: lsn.0, prefix, content }
        }
    }
}

fn row(tuple: &Tuple<'_>, frame: &Range<*const u8>) -> Row {
    let mut picked = vec![TupleValue::Null; tuple.len()];
    assert_eq!(tuple.read_into(&mut picked), tuple.len());
    assert!(tuple.columns().eq(picked.iter().copied()), "both ways to read agree");
    let own = |value: TupleValue<'_>| match value {
        TupleValue::Null => Cell::Null,
        TupleValue::Unchanged => Cell::Unchanged,
        TupleValue::Text(value) | TupleValue::Binary(value) if !is_inside(value, frame) => {
            panic!("{value:?} is outside the frame")
        }
        TupleValue::Text(value) => Cell::Text(value.to_vec()),
        TupleValue::Binary(value) => Cell::Binary(value.to_vec()),
    };
    picked.into_iter().map(own).collect()
}

fn is_inside(part: &[u8], frame: &Range<*const u8>) -> bool {
    let part = part.as_ptr_range();
    frame.start <= part.start && part.end <= frame.end
}

/// Decodes and walks; what was accepted must encode to something that decodes to the same.
fn survive(data: &[u8]) -> bool {
    let Ok(message) = decode(data) else { return false };
    let owned = own(message, &data.as_ptr_range());
    let again = encode(&owned);
    let message = decode(&again).expect("what was accepted can be encoded");
    assert_eq!(own(message, &again.as_ptr_range()), owned);
    true
}

fn any_name() -> impl Strategy<Value = String> {
    "[^\0]{0,12}"
}

/// A schema; never empty, because an empty one is read as `pg_catalog`.
fn any_names() -> impl Strategy<Value = [String; 2]> {
    ("[^\0]{1,12}", any_name()).prop_map(|(namespace, name)| [namespace, name])
}

fn any_row() -> impl Strategy<Value = Row> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let cell = prop_oneof![
        Just(Cell::Null),
        Just(Cell::Unchanged),
        bytes().prop_map(Cell::Text),
        bytes().prop_map(Cell::Binary),
    ];
    prop::collection::vec(cell, 0..12)
}

fn any_old() -> impl Strategy<Value = (OldKind, Row)> {
    (prop::sample::select(vec![OldKind::Key, OldKind::Full]), any_row())
}

fn any_message() -> impl Strategy<Value = Owned> {
    let columns =
        prop::collection::vec((any::<bool>(), any_name(), any::<u32>(), any::<i32>()), 0..12);
    let identity = prop::sample::select(b"dnfi".to_vec());
    prop_oneof![
        any::<(u64, i64, u32)>().prop_map(|(lsn, time, xid)| Owned::Begin { lsn, time, xid }),
        any::<(u64, u64, i64)>().prop_map(|(lsn, end, time)| Owned::Commit { lsn, end, time }),
        (any::<u64>(), any_name()).prop_map(|(lsn, name)| Owned::Origin { lsn, name }),
        (any::<u32>(), any_names(), identity, columns).prop_map(
            |(id, names, identity, columns)| Owned::Relation { id, names, identity, columns }
        ),
        (any::<u32>(), any_names()).prop_map(|(id, names)| Owned::Type { id, names }),
        (any::<u32>(), any_row()).prop_map(|(id, new)| Owned::Insert { id, new }),
        (any::<u32>(), prop::option::of(any_old()), any_row())
            .prop_map(|(id, old, new)| Owned::Update { id, old, new }),
        (any::<u32>(), any_old()).prop_map(|(id, old)| Owned::Delete { id, old }),
        (any::<[bool; 2]>(), prop::collection::vec(any::<u32>(), 0..12))
            .prop_map(|(flags, ids)| Owned::Truncate { flags, ids }),
        (any::<bool>(), any::<u64>(), any_name(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(transactional, lsn, prefix, content)| Owned::Logical {
                transactional,
                lsn,
                prefix,
                content
            }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_was_encoded_comes_back(message in any_message()) {
        let data = encode(&message);
        prop_assert_eq!(own(decode(&data).unwrap(), &data.as_ptr_range()), message);
    }

    #[test]
    fn every_cut_is_refused(message in any_message()) {
        let data = encode(&message);
        for cut in 0..data.len() {
            prop_assert!(decode(&data[..cut]).is_err(), "cut at {} of {}", cut, data.len());
        }
        prop_assert!(decode(&[&data[..], b"\0"].concat()).is_err());
    }

    #[test]
    fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..200)) {
        survive(&data);
    }
}

/// Messages that together use every field of the protocol.
fn samples() -> Vec<Owned> {
    let names = || ["shop".to_owned(), "größe".to_owned()];
    let row = || {
        let text = Cell::Text(b"0192f2a0-0000-7000-8000-000000000001".to_vec());
        vec![text, Cell::Null, Cell::Unchanged, Cell::Binary(vec![0; 4]), Cell::Text(vec![])]
    };
    let column = (true, "id".to_owned(), 20, -1);
    let columns = vec![column.clone(), (false, "größe".to_owned(), 1700, 655_366), column];
    let (lsn, time) = (0x16_B374_D848, 848_000_000_000_000);
    vec![
        Owned::Begin { lsn, time, xid: 732 },
        Owned::Commit { lsn, end: lsn + 48, time },
        Owned::Origin { lsn, name: "berlin".to_owned() },
        Owned::Relation { id: 16_391, names: names(), identity: b'd', columns },
        Owned::Type { id: 16_386, names: names() },
        Owned::Insert { id: 16_391, new: row() },
        Owned::Update { id: 16_391, old: None, new: row() },
        Owned::Update { id: 16_391, old: Some((OldKind::Full, row())), new: row() },
        Owned::Delete { id: 16_391, old: (OldKind::Key, row()) },
        Owned::Truncate { flags: [true, false], ids: vec![16_391, 16_398, 7] },
        Owned::Logical { transactional: true, lsn, prefix: "p".to_owned(), content: vec![7; 9] },
    ]
}

/// Small numbers in a fixed order (xorshift64*): a failure names its seed and comes again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }

    /// A byte that lengths, counts, kinds and flags are made of, or any other.
    fn byte(&mut self) -> u8 {
        const TELLING: &[u8] = b"\0\x01\x7f\x80\xffntubNKOBCRYIUDTMSEcA";
        if self.below(2) == 0 { TELLING[self.below(TELLING.len())] } else { self.below(256) as u8 }
    }

    fn damage(&mut self, data: &mut Vec<u8>) {
        let at = self.below(data.len());
        match self.below(6) {
            0 if !data.is_empty() => data[at] ^= 1 << self.below(8),
            1 if !data.is_empty() => data[at] = self.byte(),
            2 => data.truncate(at),
            3 => data.insert(at, self.byte()),
            4 if !data.is_empty() => drop(data.drain(at..at + 1 + self.below(data.len() - at))),
            _ => {
                let part = data[at..at + self.below(data.len() - at)].to_vec();
                data.splice(at..at, part);
            }
        }
    }
}

#[test]
fn damaged_messages_are_survived() {
    let (mut accepted, mut refused) = (0u64, 0u64);
    for (number, sample) in samples().iter().enumerate() {
        let valid = encode(sample);
        assert!(survive(&valid), "{sample:?}");
        for seed in 1..=MUTATIONS {
            let mut dice = Dice(seed << 8 | number as u64);
            let mut data = valid.clone();
            for _ in 0..=dice.below(DAMAGES_MAX as usize) {
                dice.damage(&mut data);
            }
            // An exact allocation of its own: reading outside would not land in spare capacity.
            let data = data.into_boxed_slice();
            let survived = std::panic::catch_unwind(|| survive(&data));
            match survived {
                Ok(true) => accepted += 1,
                Ok(false) => refused += 1,
                Err(_) => panic!("sample {number}, seed {seed}: {}", data.escape_ascii()),
            }
        }
    }
    // Both happen often, or the damage is not telling anything.
    assert!(accepted > MUTATIONS / 2 && refused > MUTATIONS, "{accepted} and {refused}");
}
