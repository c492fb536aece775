//! pgoutput messages as a Postgres 15 server sent them, read back column by column.
//!
//! Captured with `pg_logical_slot_get_binary_changes` (`proto_version '1'`, `messages 'true'`).

#![allow(clippy::unwrap_used, reason = "a test may fail by it")]

use watership::pg::pgoutput::{
    OldKind, OldTuple, RelationColumn, ReplicaIdentity, ReplicationMessage, Tuple, TupleValue,
    decode,
};
use watership::position::Lsn;

const ORDERS: u32 = 0x4007;
const FULL_ID: u32 = 0x400e;

fn bytes(hex: &str) -> Vec<u8> {
    let pairs = hex.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

fn values<'a>(tuple: &Tuple<'a>) -> Vec<TupleValue<'a>> {
    assert_eq!(tuple.columns().len(), tuple.len());
    tuple.columns().collect()
}

fn text(value: &str) -> TupleValue<'_> {
    TupleValue::Text(value.as_bytes())
}

#[test]
fn begin_commit_and_origin() {
    let data = bytes("4200000000015310f0000303d2439f0f06000002dc");
    let begin = ReplicationMessage::Begin {
        final_lsn: Lsn(0x0153_10F0),
        commit_time: 0x0003_03d2_439f_0f06,
        xid: 732,
    };
    assert_eq!(decode(&data), Ok(begin));

    let data = bytes("430000000000015310f00000000001531120000303d2439f0f06");
    let commit = ReplicationMessage::Commit {
        commit_lsn: Lsn(0x0153_10F0),
        end_lsn: Lsn(0x0153_1120),
        commit_time: 0x0003_03d2_439f_0f06,
    };
    assert_eq!(decode(&data), Ok(commit));

    let data = bytes("4f00000001023456786265726c696e00");
    let origin = ReplicationMessage::Origin { commit_lsn: Lsn(0x1_0234_5678), name: "berlin" };
    assert_eq!(decode(&data), Ok(origin));
}

#[test]
fn a_type_comes_before_the_relation_that_uses_it() {
    let data = bytes("590000400273686f70006d6f6f6400");
    let mood = ReplicationMessage::Type { id: 0x4002, namespace: "shop", name: "mood" };
    assert_eq!(decode(&data), Ok(mood));

    let data = bytes(
        "520000400773686f70006f7264657273006400060169640000000014ffffffff006772c3b6c39f6500000000\
         19ffffffff00706169640000000010ffffffff00707269636500000006a4000a0006006d0000004002ffffffff\
         006e6f74650000000019ffffffff",
    );
    let Ok(ReplicationMessage::Relation(orders)) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!((orders.id, orders.namespace, orders.name), (ORDERS, "shop", "orders"));
    assert_eq!(orders.replica_identity, ReplicaIdentity::Default);
    let column =
        |key, name, type_oid, type_modifier| RelationColumn { key, name, type_oid, type_modifier };
    let expected = [
        column(true, "id", 20, -1),
        column(false, "größe", 25, -1),
        column(false, "paid", 16, -1),
        column(false, "price", 1700, (10 << 16 | 2) + 4),
        column(false, "m", 0x4002, -1),
        column(false, "note", 25, -1),
    ];
    assert_eq!(orders.columns().collect::<Vec<_>>(), expected);
}

#[test]
fn a_table_may_have_no_columns() {
    let data = bytes("52000040137075626c6963006261726500640000");
    let Ok(ReplicationMessage::Relation(bare)) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!((bare.name, bare.columns().len()), ("bare", 0));
    let data = bytes("49000040134e0000");
    let Ok(ReplicationMessage::Insert { new, .. }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert!(new.is_empty() && new.columns().next().is_none());
}

#[test]
fn an_insert_holds_every_value() {
    let mut data = bytes(
        "49000040074e0006740000000131740000000573c3bcc39f740000000174740000000531322e353074000000\
         04676c61647400000bb8",
    );
    data.extend_from_slice(&[b'x'; 3000]);
    let Ok(ReplicationMessage::Insert { relation, new }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    let note = "x".repeat(3000);
    let expected = ["1", "süß", "t", "12.50", "glad", &note].map(text);
    assert_eq!((relation, values(&new)), (ORDERS, expected.to_vec()));
}

#[test]
fn an_update_leaves_unchanged_toast_out() {
    let data = bytes(
        "55000040074e0006740000000131740000000573c3bcc39f740000000166740000000531322e353074000000\
         04676c616475",
    );
    let Ok(ReplicationMessage::Update { relation, old, new }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    let mut expected = ["1", "süß", "f", "12.50", "glad", ""].map(text);
    expected[5] = TupleValue::Unchanged;
    assert_eq!((relation, old, values(&new)), (ORDERS, None, expected.to_vec()));
}

#[test]
fn a_key_change_carries_the_old_key() {
    let data = bytes(
        "55000040074b00067400000001316e6e6e6e6e4e0006740000000132740000000573c3bcc39f740000000166\
         740000000531322e35307400000004676c616475",
    );
    let Ok(ReplicationMessage::Update { old: Some(OldTuple { kind, tuple }), new, .. }) =
        decode(&data)
    else {
        panic!("{:?}", decode(&data))
    };
    let mut expected = [TupleValue::Null; 6];
    expected[0] = text("1");
    assert_eq!((kind, values(&tuple)), (OldKind::Key, expected.to_vec()));
    assert_eq!(values(&new)[0], text("2"));
}

#[test]
fn full_identity_carries_the_whole_old_row() {
    let data = bytes(
        "520000400e7075626c69630066756c6c5f69640066000201610000000017ffffffff0162000000\
                      0019ffffffff",
    );
    let Ok(ReplicationMessage::Relation(full)) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!(full.replica_identity, ReplicaIdentity::Full);
    assert!(full.columns().all(|column| column.key));

    let data = bytes("550000400e4f00027400000001316e4e00027400000001317400000002c3a9");
    let Ok(ReplicationMessage::Update { relation, old: Some(old), new }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!((relation, old.kind), (FULL_ID, OldKind::Full));
    assert_eq!(values(&old.tuple), [text("1"), TupleValue::Null]);
    assert_eq!(values(&new), [text("1"), text("é")]);
}

#[test]
fn a_delete_holds_the_key_or_the_row() {
    let data = bytes("44000040074b00067400000001326e6e6e6e6e");
    let Ok(ReplicationMessage::Delete { relation, old }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!((relation, old.kind, old.tuple.len()), (ORDERS, OldKind::Key, 6));
    assert_eq!(values(&old.tuple)[..2], [text("2"), TupleValue::Null]);

    let data = bytes("440000400e4f00027400000001317400000002c3a9");
    let Ok(ReplicationMessage::Delete { relation, old }) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert_eq!((relation, old.kind), (FULL_ID, OldKind::Full));
    assert_eq!(values(&old.tuple), [text("1"), text("é")]);
}

#[test]
fn one_truncate_names_all_its_tables() {
    let data = bytes("540000000203000040070000400e");
    let Ok(ReplicationMessage::Truncate(truncate)) = decode(&data) else {
        panic!("{:?}", decode(&data))
    };
    assert!(truncate.cascade && truncate.restart_identity);
    assert_eq!(truncate.relations().collect::<Vec<_>>(), [ORDERS, FULL_ID]);
}

#[test]
fn logical_messages_inside_and_outside_a_transaction() {
    let data = bytes("4d010000000001532c3877617465727368697000000000077b2261223a317d");
    let inside = ReplicationMessage::Logical {
        transactional: true,
        lsn: Lsn(0x0153_2C38),
        prefix: "watership",
        content: br#"{"a":1}"#,
    };
    assert_eq!(decode(&data), Ok(inside));

    let data = bytes("4d000000000001532ca0000000000200ff");
    let outside = ReplicationMessage::Logical {
        transactional: false,
        lsn: Lsn(0x0153_2CA0),
        prefix: "",
        content: &[0, 0xff],
    };
    assert_eq!(decode(&data), Ok(outside));
}
