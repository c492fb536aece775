//! What becomes of rows under each replica identity: key, identity, id, values; message by message.

use std::collections::HashMap;

use bytes::BufMut;

use super::tests::{begin, put_column};
use super::*;
use crate::event::{Identity, Value};
use crate::source::outbox::OutboxTable;

const TABLE: u32 = 20_000;

fn assembler(primary_key: &[&str]) -> Assembler {
    let primary_key = primary_key.iter().map(|name| (*name).to_owned()).collect();
    let captured = CapturedTable { oid: TABLE, primary_key, ..Default::default() };
    Assembler::new(Options {
        epoch: 1,
        system_id: 7,
        timelines: Timelines::new(1, Vec::new()),
        resume_after: Position::default(),
        database: "shop".into(),
        outbox: OutboxTable::default(),
        captured: HashMap::from([("public.t".into(), captured)]),
        catalog_at: Lsn(1_000_000),
        renumbered: Default::default(),
        types: Default::default(),
        canary: "shop".into(),
        canary_before: None,
        canary_accepted: 0,
        messages: message::tests::key(),
        max_body: 16 << 20,
    })
}

/// Takes messages with LSNs one after the other.
fn apply(assembler: &mut Assembler, messages: &[Bytes]) -> Vec<Item> {
    let mut out = Vec::new();
    for (lsn, message) in messages.iter().enumerate() {
        assembler.apply(Lsn(500 + lsn as u64), message, &mut out).expect("a message");
    }
    out
}

fn events(items: Vec<Item>) -> Vec<Event> {
    let event = |item| match item {
        Item::Event(event, _) => Some(event),
        Item::Commit(_)
        | Item::Idle(_)
        | Item::Described(..)
        | Item::Columns(..)
        | Item::LowMark(..) => None,
    };
    items.into_iter().filter_map(event).collect()
}

/// A description; `flagged` are the columns of its identity.
fn relation(identity: u8, columns: &[&str], flagged: &[&str]) -> Bytes {
    let mut out = vec![b'R'];
    out.put_u32(TABLE);
    out.extend_from_slice(b"public\0t\0");
    out.put_u8(identity);
    out.put_u16(columns.len() as u16);
    for name in columns {
        put_column(&mut out, name, flagged.contains(name));
    }
    out.into()
}

/// `None` is null, `u` an unchanged TOAST value.
fn tuple(out: &mut Vec<u8>, values: &[Option<&str>]) {
    out.put_u16(values.len() as u16);
    for value in values {
        match value {
            None => out.put_u8(b'n'),
            Some("u") => out.put_u8(b'u'),
            Some(text) => {
                out.put_u8(b't');
                out.put_u32(text.len() as u32);
                out.extend_from_slice(text.as_bytes());
            }
        }
    }
}

fn insert(values: &[Option<&str>]) -> Bytes {
    let mut out = vec![b'I'];
    out.put_u32(TABLE);
    out.put_u8(b'N');
    tuple(&mut out, values);
    out.into()
}

fn update(old: Option<(u8, &[Option<&str>])>, new: &[Option<&str>]) -> Bytes {
    let mut out = vec![b'U'];
    out.put_u32(TABLE);
    if let Some((kind, values)) = old {
        out.put_u8(kind);
        tuple(&mut out, values);
    }
    out.put_u8(b'N');
    tuple(&mut out, new);
    out.into()
}

fn delete(kind: u8, values: &[Option<&str>]) -> Bytes {
    let mut out = vec![b'D'];
    out.put_u32(TABLE);
    out.put_u8(kind);
    tuple(&mut out, values);
    out.into()
}

fn described(primary_key: &[&str], relation: Bytes) -> (Vec<usize>, Identity) {
    let mut assembler = assembler(primary_key);
    let row = insert(&[Some("1"), Some("a"), Some("x")]);
    let events = events(apply(&mut assembler, &[begin(100), relation, row]));
    (events[0].table.key.clone(), events[0].table.identity.clone())
}

#[test]
fn key_and_identity_are_two_things() {
    let columns = ["id", "email", "note"];
    let seen = |identity, flagged: &[&str], primary_key: &[&str]| {
        described(primary_key, relation(identity, &columns, flagged))
    };
    let only = |column| Identity::Columns(vec![column]);
    assert_eq!(seen(b'd', &["id"], &["id"]), (vec![0], only(0)));
    // The key that was in force when this was written, whatever the catalog says today.
    assert_eq!(seen(b'd', &["id"], &["email"]), (vec![0], only(0)));
    assert_eq!(seen(b'i', &["email"], &["id"]), (vec![0], only(1)), "an index beside the key");
    assert_eq!(seen(b'i', &["email"], &[]), (vec![1], only(1)), "an index without a key");
    assert_eq!(seen(b'f', &columns, &["id"]), (vec![0], Identity::Full));
    assert_eq!(seen(b'f', &columns, &[]), (vec![], Identity::Full));
    assert_eq!(seen(b'f', &columns, &["renamed"]), (vec![], Identity::Full));
    assert_eq!(seen(b'n', &[], &["id"]), (vec![0], Identity::Nothing));
    assert_eq!(seen(b'd', &[], &[]), (vec![], Identity::Nothing));
}

#[test]
fn a_composite_key_has_one_order_under_every_identity() {
    let columns = ["a", "b", "note"];
    for (identity, flagged) in [(b'd', &columns[..2]), (b'f', &columns), (b'i', &columns[..2])] {
        let (key, _) = described(&["b", "a"], relation(identity, &columns, flagged));
        assert_eq!(key, [0, 1], "{}", char::from(identity));
    }
}

#[test]
fn a_toasted_key_that_did_not_change_comes_from_the_old_row() {
    let mut assembler = assembler(&["id"]);
    let columns = ["id", "email", "note"];
    let old = [Some("long"), None, None];
    let new = [Some("u"), Some("b"), Some("u")];
    let messages = [
        begin(100),
        relation(b'd', &columns, &["id"]),
        update(Some((b'K', &old)), &new),
        relation(b'f', &columns, &columns),
        update(Some((b'O', &[Some("long"), Some("a"), Some("x")])), &new),
    ];
    let events = events(apply(&mut assembler, &messages));
    let text = |text: &'static str| Value::Text(text.into());
    let rows: Vec<_> = events
        .iter()
        .map(|event| match &event.content {
            Content::Change(Change::Update { old, new }) => (old.is_some(), new.clone()),
            other => panic!("{other:?}"),
        })
        .collect();
    // What is outside the identity stays unknown, and an unchanged key gives no old row.
    assert_eq!(rows[0], (false, [text("long"), text("b"), Value::Unchanged].into()));
    assert_eq!(rows[1], (true, [text("long"), text("b"), text("x")].into()));
}

/// A root and its partition, described one after the other as a session finds them.
fn root_and_partition(root: u8, partition: u8, flagged: &[&str]) -> [Bytes; 2] {
    let columns = ["id", "email", "note"];
    let own: &[&str] = if root == b'f' { &columns } else { &["id"] };
    let mut leaf = relation(partition, &["note", "email", "id"], flagged).to_vec();
    leaf[1..5].copy_from_slice(&(TABLE + 1).to_be_bytes());
    let name = 5 + "public\0".len();
    leaf[name] = b'p';
    [relation(root, &columns, own), leaf.into()]
}

#[test]
fn a_partition_that_sends_less_than_its_root_ends_the_session_or_is_read_as_what_it_sends() {
    let full = ["id", "email", "note"];
    for (root, partition, flagged, fits) in [
        (b'd', b'd', &["id"][..], true),
        (b'd', b'f', &full, true),
        (b'd', b'i', &["email", "id"], true),
        (b'd', b'i', &["email"], false),
        (b'd', b'n', &[], false),
        (b'f', b'f', &full, true),
        (b'f', b'd', &["id"], false),
    ] {
        for inserts_only in [false, true] {
            let [root, partition] = root_and_partition(root, partition, flagged);
            let mut assembler = assembler(&["id"]);
            let captured = assembler.options.captured.get_mut("public.t").expect("it is captured");
            (captured.partitioned, captured.inserts_only) = (true, inserts_only);
            assembler.options.catalog_at = Lsn(100);
            let mut out = Vec::new();
            for message in [begin(100), root.clone()] {
                assembler.apply(Lsn(1), &message, &mut out).expect("a message");
            }
            let result = assembler.apply(Lsn(1), &partition, &mut out);
            assert_eq!(result.is_ok(), fits || inserts_only, "{partition:?}");
            // What is older than the catalog is over: it is read as it is.
            assembler.options.catalog_at = Lsn(1_000);
            let deleted = delete(b'K', &[None, Some("a"), None]);
            let row = events(apply(&mut assembler, &[root.clone(), partition, deleted]));
            let known = row[0].table.identity != Identity::Nothing;
            assert_eq!(known, fits || inserts_only);
            // As soon as the partition sends enough, and not before.
            let deleted = delete(b'K', &[Some("1"), None, None]);
            let row = events(apply(&mut assembler, &[root.clone(), deleted.clone()]));
            assert_eq!(row[0].table.identity != Identity::Nothing, known);
            let [_, fine] = root_and_partition(b'd', b'f', &full);
            let row = events(apply(&mut assembler, &[root, fine, deleted]));
            assert_ne!(row[0].table.identity, Identity::Nothing);
        }
    }
}

#[test]
fn another_table_that_is_described_after_a_root_is_no_partition_of_it() {
    let mut assembler = assembler(&["id"]);
    assembler.options.captured.get_mut("public.t").expect("it is captured").partitioned = true;
    assembler.options.catalog_at = Lsn(100);
    let [root, _] = root_and_partition(b'f', b'd', &["id"]);
    let mut other = relation(b'd', &["id", "email", "mark"], &["id"]).to_vec();
    other[1..5].copy_from_slice(&(TABLE + 1).to_be_bytes());
    apply(&mut assembler, &[begin(100), root, other.into()]);
    assert!(assembler.unlike.is_empty());
    // One truncate of both; it has the same columns, but is captured itself.
    let copy = CapturedTable { oid: TABLE + 1, ..Default::default() };
    assembler.options.captured.insert("public.p".into(), copy);
    let [root, alike] = root_and_partition(b'd', b'd', &[]);
    apply(&mut assembler, &[root, alike]);
    assert!(assembler.unlike.is_empty());
}

#[test]
fn what_a_partition_sends_fills_in_what_an_update_did_not_touch_even_if_another_sends_less() {
    let full = ["id", "email", "note"];
    let [root, less] = root_and_partition(b'f', b'd', &["id"]);
    let [_, fine] = root_and_partition(b'f', b'f', &full);
    let mut assembler = assembler(&["id"]);
    assembler.options.captured.get_mut("public.t").expect("it is captured").partitioned = true;
    let old = [Some("1"), Some("a"), Some("large")];
    let update = update(Some((b'O', &old)), &[Some("1"), Some("b"), Some("u")]);
    let of = |assembler: &mut Assembler, messages: &[Bytes]| {
        let event = events(apply(assembler, messages)).remove(0);
        let Content::Change(Change::Update { new, .. }) = event.content else {
            panic!("{event:?}")
        };
        (event.id, new)
    };
    let here = of(&mut assembler, &[begin(100), root.clone(), less, update.clone()]);
    // The id is that of a session which has never heard of the other partition.
    let mut other = super::tests_identity::assembler(&["id"]);
    let alone = of(&mut other, &[begin(100), root, fine, update]);
    assert_eq!(here, alone);
    assert_eq!(here.1[2], Value::Text(Bytes::from_static(b"large")));
}

#[test]
fn a_key_that_was_renamed_since_is_found_by_its_place_where_that_is_certain() {
    let seen = |columns: &[&str], leading: &[&str], catalog_at: u64| {
        let mut assembler = assembler(&["now"]);
        let captured = assembler.options.captured.get_mut("public.t").expect("it is captured");
        captured.leading = leading.iter().map(|name| (*name).to_owned()).collect();
        assembler.options.catalog_at = Lsn(catalog_at);
        let row: Vec<Option<&str>> = columns.iter().map(|_| Some("1")).collect();
        let messages = [begin(100), relation(b'f', columns, columns), insert(&row)];
        let mut out = Vec::new();
        for message in messages {
            assembler.apply(Lsn(1), &message, &mut out).ok()?;
        }
        Some(events(out)[0].table.key.clone())
    };
    let (found, unknown, ends) = (|place| Some(vec![place]), Some(vec![]), None);
    assert_eq!(seen(&["note", "then"], &["note", "now"], 101), found(1));
    assert_eq!(seen(&["old note", "then"], &["note", "now"], 101), found(1));
    assert_eq!(seen(&["note", "now"], &["note", "now"], 101), found(1));
    // A column before it was generated then, or a column list left it out.
    assert_eq!(seen(&["then"], &["note", "now"], 101), unknown);
    assert_eq!(seen(&["then", "note"], &["note", "now"], 101), unknown);
    // One before it was dropped, or this session has not seen all that was done to the table.
    assert_eq!(seen(&["gone", "note", "then"], &[], 101), unknown);
    assert_eq!(seen(&["note", "then"], &["note", "now"], 100), ends);
}

#[test]
fn a_key_that_the_session_does_not_know_ends_it_and_an_older_one_does_not() {
    for (catalog_at, ends) in [(Lsn(50), true), (Lsn(200), false)] {
        let mut assembler = assembler(&["id"]);
        assembler.options.catalog_at = catalog_at;
        let mut out = Vec::new();
        assembler.apply(Lsn(1), &begin(100), &mut out).expect("Begin");
        for (identity, columns, flagged) in [
            (b'f', &["new_id", "email"], &["new_id", "email"][..]),
            (b'i', &["new_id", "email"], &["new_id", "email"]),
            (b'i', &["id", "email"], &["email"]),
        ] {
            let result = assembler.apply(Lsn(1), &relation(identity, columns, flagged), &mut out);
            assert_eq!(result.is_err(), ends, "{columns:?}");
        }
    }
}

#[test]
fn ids_do_not_depend_on_what_else_a_publication_has() {
    let columns = ["id", "email", "note"];
    let row = [Some("7"), Some("a"), Some("x")];
    let one = |before: &[Bytes], change: Bytes| {
        let mut assembler = assembler(&["id"]);
        apply(&mut assembler, &[begin(100), relation(b'd', &columns, &["id"])]);
        let mut out = Vec::new();
        for message in before {
            assembler.apply(Lsn(1), message, &mut out).expect("a message");
        }
        out.clear();
        assembler.apply(Lsn(7), &change, &mut out).expect("a change");
        events(out)[0].clone()
    };
    let alone = one(&[], insert(&row));
    let after_others = one(&[insert(&[Some("1"), None, None])], insert(&row));
    assert_eq!(alone.id, after_others.id);
    assert_ne!(alone.position, after_others.position);
    // A row filter makes an INSERT or a DELETE of an UPDATE: it is the same change.
    let updated = one(&[], update(None, &row)).id;
    assert_eq!(updated, one(&[], insert(&row)).id);
    assert_eq!(updated, one(&[], delete(b'K', &[Some("7"), None, None])).id);
    assert_ne!(updated, one(&[], insert(&[Some("8"), Some("a"), Some("x")])).id);
}

#[test]
fn equal_rows_of_one_record_keep_their_numbers_when_the_stream_resumes_between_them() {
    let columns = ["note"];
    let of = |resume_after| {
        let mut assembler = assembler(&[]);
        assembler.options.resume_after = resume_after;
        apply(&mut assembler, &[begin(100), relation(b'n', &columns, &[])]);
        let mut out = Vec::new();
        for _ in 0..3 {
            assembler.apply(Lsn(7), &insert(&[Some("same")]), &mut out).expect("a row");
        }
        events(out)
    };
    let all = of(Position::default());
    assert!(all[0].id != all[1].id && all[1].id != all[2].id && all[0].id != all[2].id);
    for settled in 0..2 {
        let left = of(all[settled].position);
        let ids: Vec<_> = left.iter().map(|event| event.id).collect();
        let expected: Vec<_> = all[settled + 1..].iter().map(|event| event.id).collect();
        assert_eq!(ids, expected);
    }
}

#[test]
fn a_truncate_resumes_at_the_table_that_was_not_settled() {
    let truncate = |count: u32| {
        let mut out = vec![b'T'];
        out.put_u32(count);
        out.put_u8(0);
        (0..count).for_each(|_| out.put_u32(TABLE));
        Bytes::from(out)
    };
    let of = |resume_after| {
        let mut assembler = assembler(&["id"]);
        assembler.options.resume_after = resume_after;
        let relation = relation(b'd', &["id"], &["id"]);
        let mut items = apply(&mut assembler, &[begin(100), relation, truncate(3)]);
        let mut commit = vec![b'C', 0];
        commit.put_u64(100);
        commit.put_u64(108);
        commit.put_i64(0);
        assembler.apply(Lsn(9), &commit.into(), &mut items).expect("Commit");
        let Some(Item::Commit(receipt)) = items.last() else { panic!("{items:?}") };
        let end = receipt.position();
        (events(items), end)
    };
    let (all, end) = of(Position::default());
    assert_eq!(all.iter().map(|event| event.position.sub).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(end, all[2].position, "a commit covers all of it");
    let (left, _) = of(all[0].position);
    assert_eq!(left.len(), 2);
    assert_eq!((left[0].position, left[0].id), (all[1].position, all[1].id));
}
