//! What becomes of rows under each replica identity: key, identity, id, values; message by message.

use bytes::BufMut;

use super::*;
use crate::event::{Identity, OldRow, Row, Value};

const TABLE: u32 = 20_000;

fn assembler(primary_key: &[&str]) -> Assembler {
    let primary_key = primary_key.iter().map(|name| (*name).to_owned()).collect();
    let captured = CapturedTable { oid: TABLE, primary_key, former: None };
    Assembler::new(Options {
        epoch: 1,
        system_id: 7,
        timelines: Timelines::new(1, Vec::new()),
        resume_after: Position::default(),
        database: "shop".into(),
        outbox: OutboxTable::default(),
        captured: HashMap::from([("public.t".into(), captured)]),
        catalog_at: Lsn(1_000_000),
        types: None,
        canary: "shop".into(),
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
        Item::Commit(_) | Item::Idle(_) | Item::Described(..) => None,
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
        out.put_u8(u8::from(flagged.contains(name)));
        out.extend_from_slice(name.as_bytes());
        out.put_u8(0);
        out.put_u32(25);
        out.put_i32(-1);
    }
    out.into()
}

fn begin(lsn: u64) -> Bytes {
    let mut out = vec![b'B'];
    out.put_u64(lsn);
    out.put_i64(0);
    out.put_u32(1);
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
            Content::Change(Change::Update { old: Some(old), new }) => (old.clone(), new.clone()),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected: Row = [text("long"), text("b"), Value::Unchanged].into();
    assert!(matches!(rows[0].0, OldRow::Key(_)));
    assert_eq!(rows[0].1, expected, "what is outside the identity stays unknown");
    assert_eq!(rows[1].1, [text("long"), text("b"), text("x")].into());
}

#[test]
fn a_key_that_the_session_does_not_know_ends_it_and_an_older_one_does_not() {
    for (catalog_at, ends) in [(Lsn(50), true), (Lsn(200), false)] {
        let mut assembler = assembler(&["id"]);
        assembler.options.catalog_at = catalog_at;
        let mut out = Vec::new();
        assembler.apply(Lsn(1), &begin(100), &mut out).expect("Begin");
        for (columns, flagged) in
            [(&["new_id", "email"], &["new_id", "email"][..]), (&["id", "email"], &["email"])]
        {
            let identity = if flagged.len() == 2 { b'f' } else { b'i' };
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
