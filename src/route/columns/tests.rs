//! Hidden values, maps, and stored rows.

use super::*;
use crate::position::Position;
use crate::route::description::{DescribedColumn, Description};

fn table(names: &[&str], identity: Identity) -> Arc<Table> {
    Arc::new(Table {
        database: "shop".into(),
        oid: 7,
        version: 1,
        schema: "public".into(),
        name: "t".into(),
        full_name: "public.t".into(),
        columns: names.iter().map(|name| Column::new(*name, oid::INT4, -1)).collect(),
        key: vec![0],
        identity,
    })
}

fn secret() -> Arc<DatabaseSecret> {
    Arc::new(DatabaseSecret::new(b"secret"))
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

fn agreed(list: &[&str]) -> Description {
    let column = |name: &&str| DescribedColumn {
        name: (*name).to_owned(),
        type_oid: oid::INT4,
        type_modifier: -1,
    };
    Description { columns: list.iter().map(column).collect(), ..Description::default() }
}

/// Rules that hash `a`, mask `b` and leave out `c`.
fn abc() -> ColumnRules {
    ColumnRules {
        exclude: names(&["c"]),
        mask: vec![("b".into(), Constant::Text("***".into()))],
        hash: names(&["a"]),
        ..ColumnRules::default()
    }
}

fn columns(
    rules: &ColumnRules,
    map: &Map,
    table: &Arc<Table>,
    agreement: &[&str],
    hidden: &Hidden,
) -> Projection {
    let (secret, agreed) = (secret(), agreed(agreement));
    // Which columns a route may send that names them is decided before: `route/agreed`.
    let is_agreed = |name: &str| !rules.is_closed() || agreed.column(name).is_some();
    Projection::new(Deciding {
        table,
        key: &table.key,
        hidings: hidings(rules, table, is_agreed, &secret, hidden),
        map,
        version: "v".into(),
        secret: Some(&secret),
    })
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned().into())
}

fn event(table: &Arc<Table>, new: Row) -> Event {
    Event {
        id: Uuid::from_u128(5),
        position: Position::default(),
        lsn: None,
        occurred_at_us: 0,
        committed_at_us: 0,
        xid: 1,
        table: table.clone(),
        content: Content::Change(Change::Insert { new }),
    }
}

fn row(event: &Event) -> &Row {
    let Content::Change(Change::Insert { new }) = &event.content else { panic!("an insert") };
    new
}

fn sent_names(columns: &Projection) -> Vec<&str> {
    columns.table.columns.iter().map(|column| &*column.name).collect()
}

#[test]
fn each_kind_of_value_is_replaced_and_an_identity_says_no_more_than_it_did() {
    let key = Arc::new(salted("salt"));
    let hashed = || text(&hash(&key, b"7"));
    let mask = Stand::Mask(Column::new("", oid::TEXT, -1), "***".into());
    let unreadable = |why: &str, bytes: Option<&'static [u8]>| {
        let bytes = bytes.map(Bytes::from_static);
        Value::Unreadable(Box::new(Unreadable { why: why.into(), bytes }))
    };
    let broken = || unreadable("canary", Some(b"canary"));
    for (stand, value, expected, of_identity) in [
        (Stand::Hash(key.clone()), text("7"), hashed(), hashed()),
        (Stand::Hash(key.clone()), Value::Null, Value::Null, Value::Null),
        (Stand::Hash(key.clone()), Value::Unchanged, Value::Unchanged, Value::Unchanged),
        (
            Stand::Hash(key.clone()),
            broken(),
            unreadable(UNHASHED, None),
            unreadable(UNHASHED, None),
        ),
        (mask.clone(), text("7"), text("***"), text("***")),
        (mask.clone(), Value::Null, text("***"), Value::Null),
        (mask.clone(), Value::Unchanged, text("***"), text("***")),
        (mask.clone(), broken(), text("***"), text("***")),
        (Stand::Nothing, text("7"), Value::Null, Value::Null),
        (Stand::Nothing, Value::Unchanged, Value::Null, Value::Null),
        (Stand::Nothing, broken(), Value::Null, Value::Null),
    ] {
        assert_eq!(stand.value(&value, false), expected, "{value:?}");
        assert_eq!(stand.value(&value, true), of_identity, "{value:?} of an identity");
    }
}

#[test]
fn what_is_sent_and_what_is_kept_has_no_hidden_value() {
    let table = table(&["a", "b", "c", "d"], Identity::Columns(vec![0]));
    let event = event(&table, ["1", "2", "3", "4"].map(text).into());
    let all = ["a", "b", "c", "d"];
    let columns = columns(&abc(), &Map::default(), &table, &all, &Hidden::default());
    assert_eq!(sent_names(&columns), ["a", "b", "d"]);
    let (sent, kept) = (columns.sent(&event), columns.kept(&event));
    let hashed = Value::Text(hash(&secret().values(), b"1").into());
    assert_eq!(**row(&sent), [hashed.clone(), text("***"), text("4")]);
    assert_eq!(**row(&kept), [hashed, text("***"), Value::Null, text("4")]);
    assert_eq!(sent.table.columns[0].type_oid, oid::TEXT, "a hash is not a number");
    assert_eq!((&*columns.key, &*sent.table.key), (&[0][..], &[0][..]));
    assert_eq!(sent.id, secret().id(event.id));
    assert_eq!(kept.id, sent.id);
    let hidden = [(0, Hide::Hash), (1, Hide::Mask), (2, Hide::Exclude)];
    assert_eq!(columns.hidden.columns, hidden);
}

#[test]
fn a_column_that_nobody_agreed_to_is_left_out_where_others_are_hidden() {
    let table = table(&["a", "b", "c", "d"], Identity::Columns(vec![0]));
    let sent = |rules: &ColumnRules| {
        let columns = columns(rules, &Map::default(), &table, &["a", "b", "c"], &Hidden::default());
        sent_names(&columns).join("")
    };
    assert_eq!(sent(&abc()), "ab");
    assert_eq!(sent(&ColumnRules::default()), "abcd");
    let include = ColumnRules { include: names(&["d", "a"]), ..ColumnRules::default() };
    assert_eq!(sent(&include), "ad");
    let mask = vec![("d".to_owned(), Constant::Int(0))];
    assert_eq!(sent(&ColumnRules { mask, ..ColumnRules::default() }), "abcd", "it is masked");
}

#[test]
fn a_stored_row_is_never_unmasked_and_a_stricter_rule_counts() {
    let table = table(&["a", "b", "c", "d"], Identity::Columns(vec![3]));
    let hidden = Hidden {
        rules: "old".into(),
        columns: vec![(0, Hide::Hash), (1, Hide::Mask), (2, Hide::Exclude)],
    };
    let kept = event(&table, [text("h"), text("m"), Value::Null, text("4")].into());
    let all = ["a", "b", "c", "d"];
    let sent = |rules: &ColumnRules| {
        let columns = columns(rules, &Map::default(), &table, &all, &hidden);
        let event = columns.sent(&kept);
        (sent_names(&columns).join(""), row(&event).clone())
    };
    // No rules any more, and the same rules: what stands there is not hashed again.
    for rules in [ColumnRules::default(), abc()] {
        let (names, row) = sent(&rules);
        let masked = if rules == ColumnRules::default() { "m" } else { "***" };
        assert_eq!((&*names, &*row), ("abd", &[text("h"), text(masked), text("4")][..]));
    }
    let stricter = ColumnRules {
        exclude: names(&["b"]),
        mask: vec![("a".into(), Constant::Text("#".into()))],
        ..ColumnRules::default()
    };
    let (names, row) = sent(&stricter);
    assert_eq!((&*names, &*row), ("ad", &[text("#"), text("4")][..]));
}

#[test]
fn a_map_renames_drops_adds_and_fills_in() {
    let table = table(&["id", "mail", "note", "age"], Identity::Columns(vec![0]));
    let map = Map {
        rename: vec![("mail".into(), "email".into())],
        drop: names(&["note"]),
        set: vec![("source".into(), Constant::Text("shop".into()))],
        default: vec![("age".into(), Constant::Int(0))],
    };
    let rules = ColumnRules::default();
    let columns = columns(&rules, &map, &table, &[], &Hidden::default());
    assert_eq!(sent_names(&columns), ["id", "email", "age", "source"]);
    for (age, expected) in
        [(text("7"), text("7")), (Value::Null, text("0")), (Value::Unchanged, Value::Unchanged)]
    {
        let event = event(&table, [text("1"), text("m"), text("n"), age].into());
        let sent = columns.sent(&event);
        assert_eq!(**row(&sent), [text("1"), text("m"), expected, text("shop")]);
        assert_eq!(sent.id, event.id, "nothing is hidden");
    }
    let partial = |field: &Field| {
        field.value(&[text("1"), Value::Null, Value::Null, Value::Null].into(), true)
    };
    let old: Vec<Value> = columns.fields.iter().map(partial).collect();
    assert_eq!(old, [text("1"), Value::Null, Value::Null, Value::Null]);
}

#[test]
fn an_id_is_keyed_where_what_it_is_made_of_is_hidden() {
    let keyed = |identity: Identity, rules: &ColumnRules| {
        let table = table(&["a", "b", "c", "d"], identity);
        let all = ["a", "b", "c", "d"];
        let columns = columns(rules, &Map::default(), &table, &all, &Hidden::default());
        columns.id(Uuid::nil()) != Uuid::nil()
    };
    let only_b = ColumnRules { exclude: names(&["b"]), ..ColumnRules::default() };
    assert!(!keyed(Identity::Columns(vec![3]), &only_b));
    assert!(keyed(Identity::Columns(vec![3]), &abc()), "a backfill makes ids of the key");
    assert!(keyed(Identity::Columns(vec![3, 0]), &abc()));
    assert!(keyed(Identity::Full, &abc()));
    assert!(keyed(Identity::Nothing, &abc()), "ids of its inserts are made of all columns");
    assert!(!keyed(Identity::Full, &ColumnRules::default()));
}

#[test]
fn a_default_that_its_column_cannot_have_is_never_part_of_a_body() {
    for (type_oid, fits, wrong) in [
        (oid::JSONB, "{\"a\": 1}", "{\"a\": 1"),
        (oid::JSON, "1e400", "none"),
        (3807, "{1,\"{}\"}", "{x}"),
        (oid::BOOL, "t", "yes"),
        (oid::FLOAT8, "NaN", "1e400"),
        (1007, "{1}", "[1]"),
    ] {
        let table = Arc::new(Table {
            columns: vec![Column::new("id", oid::INT4, -1), Column::new("a", type_oid, -1)],
            ..Table::clone(&table(&["id", "a"], Identity::Columns(vec![0])))
        });
        for (default, is_sent) in [(fits, true), (wrong, false)] {
            let default = vec![("a".to_owned(), Constant::Text(default.to_owned()))];
            let map = Map { default, ..Map::default() };
            let rules = ColumnRules::default();
            let columns = columns(&rules, &map, &table, &[], &Hidden::default());
            let sent = columns.sent(&event(&table, [text("1"), Value::Null].into()));
            match (&row(&sent)[1], is_sent) {
                (Value::Text(_), true) => {}
                (Value::Unreadable(value), false) => assert!(value.why.contains("map.default")),
                (other, _) => panic!("{type_oid} {map:?} {other:?}"),
            }
        }
    }
}
