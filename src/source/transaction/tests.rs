//! The canary and our other tables in the stream, message by message.

use std::collections::HashMap;

use bytes::BufMut;

use super::*;
use crate::event::Value;
use crate::source::outbox::OutboxTable;

const OUTBOX_ID: u32 = 1;
const CANARY_ID: u32 = 2;
const CHECKPOINT_ID: u32 = 3;
/// A table that had another name when the session began.
const RENAMED_ID: u32 = 8;

fn assembler(resume_after: Position) -> Assembler {
    assembler_after(resume_after, None)
}

fn assembler_after(resume_after: Position, canary_before: Option<CanarySighting>) -> Assembler {
    let mut assembler = Assembler::new(Options {
        epoch: 1,
        system_id: 7,
        timelines: Timelines::new(1, Vec::new()),
        resume_after,
        database: "shop".into(),
        outbox: OutboxTable::default(),
        catalog_at: Lsn::ZERO,
        renumbered: Default::default(),
        types: Default::default(),
        captured: HashMap::from([(
            "public.t".into(),
            CapturedTable { oid: RENAMED_ID, primary_key: Vec::new(), ..Default::default() },
        )]),
        canary: "shop".into(),
        canary_before,
        canary_accepted: 0,
        messages: message::tests::key(),
        max_body: 16 << 20,
    });
    let outbox = ["id", "aggregate_type", "aggregate_id", "event_type", "payload"];
    let columns = ["name", "number", "written_at"];
    for (id, table, columns) in [
        (OUTBOX_ID, "outbox", &outbox[..]),
        (CANARY_ID, "canary", &columns),
        (CHECKPOINT_ID, "checkpoint", &columns[..1]),
    ] {
        assert!(apply(&mut assembler, &[relation(id, table, columns)]).is_empty());
    }
    assembler
}

fn apply(assembler: &mut Assembler, messages: &[Bytes]) -> Vec<Item> {
    let mut out = Vec::new();
    for message in messages {
        assembler.apply(Lsn(1), message, &mut out).expect("a message");
    }
    out
}

/// A column of a description, of type text.
pub(super) fn put_column(out: &mut Vec<u8>, name: &str, flagged: bool) {
    out.put_u8(u8::from(flagged));
    out.extend_from_slice(name.as_bytes());
    out.put_u8(0);
    out.put_u32(25);
    out.put_i32(-1);
}

fn relation(id: u32, table: &str, columns: &[&str]) -> Bytes {
    let mut out = vec![b'R'];
    out.put_u32(id);
    out.extend_from_slice(format!("watership\0{table}\0d").as_bytes());
    out.put_u16(columns.len() as u16);
    for name in columns {
        put_column(&mut out, name, *name == columns[0]);
    }
    out.into()
}

pub(super) fn begin(lsn: u64) -> Bytes {
    let mut out = vec![b'B'];
    out.put_u64(lsn);
    out.put_i64(0);
    out.put_u32(1);
    out.into()
}

fn commit(lsn: u64) -> Bytes {
    let mut out = vec![b'C', 0];
    out.put_u64(lsn);
    out.put_u64(lsn + 8);
    out.put_i64(0);
    out.into()
}

/// An insert (`I`) or update (`U`).
fn change(kind: u8, relation: u32, values: &[&str]) -> Bytes {
    let mut out = vec![kind];
    out.put_u32(relation);
    out.put_u8(b'N');
    out.put_u16(values.len() as u16);
    for value in values {
        out.put_u8(b't');
        out.put_u32(value.len() as u32);
        out.extend_from_slice(value.as_bytes());
    }
    out.into()
}

fn canary(kind: u8, name: &str, number: &str) -> Bytes {
    change(kind, CANARY_ID, &[name, number, "2026-01-01"])
}

fn event() -> Bytes {
    let id = "00000000-0000-0000-0000-000000000001";
    change(b'I', OUTBOX_ID, &[id, "order", "1", "made", "{}"])
}

#[test]
fn a_canary_is_seen_and_is_neither_event_nor_progress() {
    let mut assembler = assembler(Position::default());
    for (kind, number, lsn) in [(b'I', 1_u32, 100), (b'U', 2, 200)] {
        let messages = [begin(lsn), canary(kind, "shop", &number.to_string()), commit(lsn)];
        let items = apply(&mut assembler, &messages);
        let [Item::Idle(receipt)] = &items[..] else { panic!("{items:?}") };
        assert_eq!(receipt.flush(), Some(Mark(lsn + 8)));
        let seen = assembler.seen();
        let expected = CanarySighting { number: number.into(), end: Lsn(lsn + 8) };
        assert_eq!((seen.canary, seen.changes), (Some(expected), 0));
    }
}

#[test]
fn a_canary_in_binary_form_is_the_same() {
    let mut row = vec![b'I'];
    row.put_u32(CANARY_ID);
    row.extend_from_slice(b"N\0\x03b\0\0\0\x04shopb\0\0\0\x08");
    row.put_i64(6);
    row.push(b'n');
    let mut assembler = assembler(Position::default());
    apply(&mut assembler, &[begin(100), row.into(), commit(100)]);
    assert_eq!(assembler.seen().canary.map(|canary| canary.number), Some(6));
}

#[test]
fn a_type_that_may_be_younger_than_what_was_read_ends_the_session() {
    for form in [b't', b'b'] {
        ends_for_an_unknown_type(form);
    }
}

fn ends_for_an_unknown_type(form: u8) {
    const TABLE_ID: u32 = 9;
    let mut assembler = assembler(Position::default());
    assembler.options.catalog_at = Lsn(200);
    let mut table = relation(TABLE_ID, "t", &["id"]).to_vec();
    // Another schema than ours, and a type of a user.
    let at = table.windows(9).position(|w| w == b"watership").expect("its schema");
    table.splice(at..at + 9, *b"public");
    let at = table.len() - 8;
    table[at..at + 4].copy_from_slice(&20_000_u32.to_be_bytes());
    let mut row = vec![b'I'];
    row.put_u32(TABLE_ID);
    row.extend_from_slice(&[b'N', 0, 1, form, 0, 0, 0, 1, b'x']);
    // It was committed before the types were read, and dropped since: its text is all there is.
    let out = apply(&mut assembler, &[begin(100), table.into(), row.clone().into()]);
    let [Item::Described(..), Item::Event(event, _)] = &out[..] else { panic!("{out:?}") };
    let Content::Change(Change::Insert { new }) = &event.content else { panic!("{event:?}") };
    assert_eq!(matches!(new[0], Value::Text(_)), form == b't', "{new:?}");
    apply(&mut assembler, &[commit(100)]);
    let mut out = Vec::new();
    assembler.apply(Lsn(1), &begin(300), &mut out).expect("a message");
    let error = assembler.apply(Lsn(1), &row.into(), &mut out).expect_err("the session ends");
    assert!(error.to_string().contains("column \"id\" of public.t was created after"), "{error}");
}

#[test]
fn a_captured_table_that_was_renamed_is_still_captured_and_others_are_left_out() {
    for (id, events) in [(RENAMED_ID, 1), (RENAMED_ID + 1, 0)] {
        let mut assembler = assembler(Position::default());
        let mut table = relation(id, "other", &["id"]).to_vec();
        let at = table.windows(9).position(|w| w == b"watership").expect("its schema");
        table.splice(at..at + 9, *b"public");
        let mut row = vec![b'I'];
        row.put_u32(id);
        row.extend_from_slice(b"N\0\x01t\0\0\0\x01x");
        let out = apply(&mut assembler, &[begin(100), table.into(), row.into()]);
        let found = out.iter().filter(|item| matches!(item, Item::Event(..))).count();
        assert_eq!(found, events, "{out:?}");
        // Left out or not, it has a place: ordinals count every change.
        assert_eq!(assembler.seen().changes, 1);
    }
}

#[test]
fn a_canary_counts_when_it_is_committed_and_only_if_it_is_ours() {
    let mut assembler = assembler(Position::default());
    apply(&mut assembler, &[begin(100), canary(b'U', "shop", "5")]);
    assert_eq!(assembler.seen().canary, None, "not yet");
    apply(&mut assembler, &[commit(100)]);
    assert_eq!(assembler.seen().canary.map(|c| c.number), Some(5));
    let other = [begin(200), canary(b'U', "other", "9"), commit(200)];
    assert!(matches!(apply(&mut assembler, &other)[..], [Item::Idle(_)]));
    let wrong = [begin(300), canary(b'U', "shop", "many"), commit(300)];
    apply(&mut assembler, &wrong);
    assert_eq!(assembler.seen().canary.map(|c| c.number), Some(5));
}

#[test]
fn a_canary_that_is_missing_between_two_is_a_gap() {
    let mut assembler = assembler(Position::default());
    for (lsn, number) in [(100, "5"), (200, "6"), (300, "9"), (400, "12")] {
        apply(&mut assembler, &[begin(lsn), canary(b'U', "shop", number), commit(lsn)]);
        let gap = (lsn >= 300).then_some(CanaryGap {
            before: CanarySighting { number: 6, end: Lsn(208) },
            after: CanarySighting { number: 9, end: Lsn(308) },
        });
        assert_eq!(assembler.seen().canary_gap, gap, "the first one, from {lsn} on");
    }
}

/// The notes that the receipts of the items carry.
fn notes(items: Vec<Item>) -> Vec<Note> {
    let notes = |item| match item {
        Item::Commit(mut receipt) | Item::Idle(mut receipt) => receipt.take_notes(),
        _ => Vec::new(),
    };
    items.into_iter().flat_map(notes).collect()
}

#[test]
fn a_canary_that_is_missing_after_the_checkpoint_is_a_gap_in_every_session() {
    let before = Some(CanarySighting { number: 6, end: Lsn(50) });
    let id = "0192f2a0-0000-7000-8000-000000000001";
    let event = change(b'I', OUTBOX_ID, &[id, "order", "1", "placed", "{}"]);
    for (number, is_gap) in [("5", false), ("6", false), ("7", false), ("8", true)] {
        let mut assembler = assembler_after(Position::default(), before);
        let row = [begin(100), canary(b'U', "shop", number), commit(100)];
        assert_eq!(notes(apply(&mut assembler, &row)), [], "a canary alone is not progress");
        assert_eq!(assembler.seen().canary_gap.is_some(), is_gap, "{number}");
        // After a gap none is noted, so that the next session finds it again.
        let first = [begin(200), event.clone(), commit(200)];
        let canary = CanarySighting { number: number.parse().unwrap(), end: Lsn(108) };
        let noted = if is_gap { vec![] } else { vec![Note::Canary(canary)] };
        assert_eq!(notes(apply(&mut assembler, &first)), noted, "{number}");
        let second = [begin(300), event.clone(), commit(300)];
        assert_eq!(notes(apply(&mut assembler, &second)), [], "once");
    }
}

#[test]
fn a_canary_that_begins_again_is_no_gap() {
    let mut assembler = assembler(Position::default());
    for (lsn, number) in [(100, "5"), (200, "1"), (300, "2"), (400, "2")] {
        apply(&mut assembler, &[begin(lsn), canary(b'U', "shop", number), commit(lsn)]);
    }
    assert_eq!(assembler.seen().canary_gap, None);
}

#[test]
fn a_canary_that_an_earlier_session_had_passed_is_seen_too() {
    let passed = Position { epoch: 1, mark: Mark(500), ordinal: 3, sub: 0 };
    let mut assembler = assembler(passed);
    apply(&mut assembler, &[begin(100), canary(b'U', "shop", "5"), commit(100)]);
    assert_eq!(assembler.seen().canary.map(|c| c.number), Some(5));
}

#[test]
fn our_own_writes_take_an_ordinal_and_are_progress_only_beside_others() {
    let mut assembler = assembler(Position::default());
    let checkpoint = change(b'U', CHECKPOINT_ID, &["shop"]);
    let own = [begin(100), checkpoint.clone(), canary(b'U', "shop", "1"), commit(100)];
    assert!(matches!(apply(&mut assembler, &own)[..], [Item::Idle(_)]));
    let items = apply(&mut assembler, &[begin(200), checkpoint, event(), commit(200)]);
    let [Item::Event(event, _), Item::Commit(receipt)] = &items[..] else { panic!("{items:?}") };
    assert_eq!((event.position.ordinal, receipt.flush()), (2, Some(Mark(208))));
    assert_eq!(assembler.seen().changes, 1);
    let empty = apply(&mut assembler, &[begin(300), commit(300)]);
    assert!(matches!(empty[..], [Item::Idle(_)]), "nothing for us");
}

fn message(transactional: bool, prefix: &str, content: &str) -> Bytes {
    let mut out = vec![b'M', u8::from(transactional)];
    out.put_u64(77);
    out.extend_from_slice(prefix.as_bytes());
    out.put_u8(0);
    out.put_u32(u32::try_from(content.len()).expect("short"));
    out.extend_from_slice(content.as_bytes());
    out.into()
}

#[test]
fn a_low_mark_stands_before_every_change_and_after_the_rows_of_its_chunk() {
    let token = "5c0a2f4e-0000-4000-8000-00000000002a";
    let mark = message(true, MARK_PREFIX, token);
    let mut fresh = assembler(Position::default());
    let items = apply(&mut fresh, &[begin(100), mark.clone(), event(), commit(100)]);
    let [Item::LowMark(mark_of, receipt), Item::Event(event_of, _), Item::Commit(last)] =
        &items[..]
    else {
        panic!("{items:?}")
    };
    assert_eq!((mark_of.token.to_string(), mark_of.lsn), (token.into(), Lsn(77)));
    let row = Position { sub: u32::from(u16::MAX), ..mark_of.position };
    assert!(mark_of.position < row && row < receipt.position());
    assert!(receipt.position() < event_of.position && event_of.position <= last.position());
    assert_eq!(receipt.flush(), None);
    // Alone in its transaction.
    let items = apply(&mut fresh, &[begin(200), mark.clone(), commit(200)]);
    let [Item::LowMark(_, receipt), Item::Commit(last)] = &items[..] else { panic!("{items:?}") };
    assert_eq!((last.position(), last.flush()), (receipt.position(), Some(Mark(208))));
    // It was settled before; and the next one was not.
    let mut resumed = assembler(receipt.position());
    let items = apply(&mut resumed, &[begin(200), mark.clone(), commit(200)]);
    assert!(matches!(items[..], [Item::Commit(_)]), "{items:?}");
    let items = apply(&mut resumed, &[begin(300), mark, commit(300)]);
    assert!(matches!(items[..], [Item::LowMark(..), Item::Commit(_)]), "{items:?}");
}

#[test]
fn what_no_relay_would_have_written_is_no_low_mark() {
    let token = "5c0a2f4e-0000-4000-8000-00000000002a";
    let mut assembler = assembler(Position::default());
    for (lsn, other) in [
        (100, message(true, "watership.backfill.x", token)),
        (200, message(true, MARK_PREFIX, "")),
        (300, message(true, MARK_PREFIX, "'; DROP")),
    ] {
        let items = apply(&mut assembler, &[begin(lsn), other, commit(lsn)]);
        assert!(matches!(items[..], [Item::Idle(_)]), "{items:?}");
    }
    let outside = message(false, MARK_PREFIX, token);
    assert!(apply(&mut assembler, &[outside]).is_empty());
    let late = message(true, MARK_PREFIX, token);
    let items = apply(&mut assembler, &[begin(400), event(), late.clone(), late, commit(400)]);
    assert!(matches!(items[..], [Item::Event(..), Item::Commit(_)]), "{items:?}");
}

#[test]
fn a_stream_that_goes_back_is_a_protocol_error() {
    for back in [100, 200] {
        let mut assembler = assembler(Position::default());
        apply(&mut assembler, &[begin(200), event(), commit(200)]);
        let error =
            assembler.apply(Lsn(1), &begin(back), &mut Vec::new()).expect_err("it goes back");
        assert!(error.to_string().contains("after that of 0/C8"), "{error}");
    }
}

/// A logical message, sent inside of a transaction or not.
fn logical(transactional: bool, prefix: &str, content: &[u8]) -> Bytes {
    let mut out = vec![b'M', u8::from(transactional)];
    out.put_u64(1);
    out.extend_from_slice(prefix.as_bytes());
    out.put_u8(0);
    out.put_u32(content.len() as u32);
    out.extend_from_slice(content);
    out.into()
}

fn own(id: u128) -> Bytes {
    logical(true, "watership", &message::tests::content(id, "paid", b"{}"))
}

/// Ordinal and sub of each event.
fn places(items: &[Item]) -> Vec<(u64, u32)> {
    let place = |item: &Item| match item {
        Item::Event(event, _) => Some((event.position.ordinal, event.position.sub)),
        _ => None,
    };
    items.iter().filter_map(place).collect()
}

#[test]
fn messages_stand_between_the_changes_and_do_not_count() {
    let messages = [begin(100), own(1), own(2), event(), own(3), event(), commit(100)];
    let items = apply(&mut assembler(Position::default()), &messages);
    assert_eq!(places(&items), [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]);
    let Some(Item::Commit(receipt)) = items.last() else { panic!("{items:?}") };
    assert_eq!((receipt.position().ordinal, receipt.position().sub), (2, 0));
    let Item::Event(first, _) = &items[0] else { panic!("{items:?}") };
    assert_eq!((first.id.as_u128(), &*first.table.full_name), (1, "watership.emit_wal"));
}

#[test]
fn a_stream_resumes_after_the_message_that_was_settled_last() {
    let messages = [begin(100), own(1), own(2), event(), own(3), own(4), commit(100)];
    let all = [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)];
    for (count, (ordinal, sub)) in all.into_iter().enumerate() {
        let settled = Position { epoch: 1, mark: Mark(100), ordinal, sub };
        let mut assembler = assembler(settled);
        let items = apply(&mut assembler, &messages);
        assert_eq!(places(&items), all[count + 1..]);
        assert_eq!(assembler.seen().skipped, count as u64 + 1);
    }
    // Where a new relay begins, nothing of the transaction is settled.
    let begins = Position { epoch: 1, mark: Mark(100), ordinal: 0, sub: 0 };
    assert_eq!(places(&apply(&mut assembler(begins), &messages)), all);
}

#[test]
fn a_message_after_a_truncate_has_a_place_of_its_own() {
    let mut assembler = assembler(Position::default());
    let mut tables = Vec::new();
    for (id, name) in [(RENAMED_ID, "other"), (RENAMED_ID + 1, "more")] {
        let mut table = relation(id, name, &["id"]).to_vec();
        let at = table.windows(9).position(|w| w == b"watership").expect("its schema");
        table.splice(at..at + 9, *b"public");
        tables.push(Bytes::from(table));
    }
    let mut truncate = vec![b'T'];
    truncate.put_u32(2);
    truncate.put_u8(0);
    truncate.put_u32(RENAMED_ID);
    truncate.put_u32(RENAMED_ID + 1);
    let [one, two] = &tables[..] else { panic!("two tables") };
    let messages = [begin(100), own(1), one.clone(), two.clone(), truncate.into(), own(2)];
    let items = apply(&mut assembler, &messages);
    // The second table is nobody's, and its place stays empty.
    assert_eq!(places(&items), [(0, 1), (1, 0), (1, 2)]);
}

#[test]
fn messages_of_others_are_traffic_and_one_outside_of_a_transaction_is_counted() {
    let mut assembler = assembler(Position::default());
    let foreign = logical(true, "other", b"\xff");
    let items = apply(&mut assembler, &[begin(100), foreign.clone(), commit(100)]);
    let [Item::Idle(receipt)] = &items[..] else { panic!("{items:?}") };
    assert_eq!(receipt.flush(), Some(Mark(108)));
    let items = apply(&mut assembler, &[logical(false, "watership", b"x")]);
    assert!(items.is_empty(), "{items:?}");
    let unsigned = logical(true, "watership", b"{}");
    let items = apply(&mut assembler, &[begin(150), unsigned, commit(150)]);
    assert!(matches!(items[..], [Item::Idle(_) | Item::Commit(_)]), "{items:?}");
    assert_eq!(assembler.seen().messages_unsigned, 1);
    let items = apply(&mut assembler, &[begin(200), foreign, own(1), commit(200)]);
    assert!(matches!(items[..], [Item::Event(..), Item::Commit(_)]), "{items:?}");
    let seen = assembler.seen();
    assert_eq!((seen.messages_ignored, seen.changes), (1, 1));
    // The server would not send it so.
    let error = assembler.apply(Lsn(1), &own(1), &mut Vec::new()).expect_err("no transaction");
    assert!(error.to_string().contains("outside of a transaction"), "{error}");
}

#[test]
fn a_message_that_cannot_be_read_is_an_event_with_an_id_of_its_own() {
    let broken = logical(true, "watership", &message::tests::with_tag(b"{\"id\": 1}"));
    let ids = || {
        let mut assembler = assembler(Position::default());
        let mut out = Vec::new();
        assembler.apply(Lsn(1), &begin(100), &mut out).expect("a message");
        for lsn in [50, 60] {
            assembler.apply(Lsn(lsn), &broken, &mut out).expect("it is parked, and no error");
        }
        let id = |item: &Item| match item {
            Item::Event(event, _) => event.id,
            _ => panic!("{item:?}"),
        };
        out.iter().map(id).collect::<Vec<_>>()
    };
    assert_ne!(ids()[0], ids()[1]);
    assert_eq!(ids(), ids(), "the same on every attempt");
}

#[test]
fn an_update_of_an_outbox_row_is_counted_and_ignored() {
    let mut assembler = assembler(Position::default());
    let values = ["00000000-0000-0000-0000-000000000001", "order", "1", "made", "{}"];
    let update = change(b'U', OUTBOX_ID, &values);
    let items = apply(&mut assembler, &[begin(100), update, commit(100)]);
    assert!(matches!(items[..], [Item::Commit(_)]), "{items:?}");
    assert_eq!(assembler.seen().outbox_updates, 1);
}
