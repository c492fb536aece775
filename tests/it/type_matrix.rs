//! Every type: the stream in text, the stream in binary and a SELECT say the same of a value.
//!
//! Random values of random types go through a real Postgres; the seed is printed with a failure.

use std::collections::HashMap;
use std::fmt::Write as _;

use bytes::Bytes;
use serde_json::Value as Json;
use tokio::time::timeout;
use tokio_postgres::SimpleQueryMessage;
use watership::column::Types;
use watership::event::{Change, Content, Row, Table, Value};
use watership::pg::client;
use watership::pg::connect::Options;
use watership::pg::pgoutput;
use watership::pg::replication::{Frame, ReplicationConnection, StreamOptions};
use watership::pg::slot::create_slot;
use watership::position::{Lsn, Position};
use watership::relay::session::user_types::read_types;
use watership::route::DatabaseSecret;
use watership::secret::Secret;
use watership::source::Item;
use watership::source::outbox::OutboxTable;
use watership::source::transaction::{self, Assembler, CapturedTable, Timelines};

use crate::random_values::{Rng, kinds};
use crate::support::servers::{Database, own_database};
use crate::support::waiting::LIMIT;

/// A table's rows, as three readers see them.
struct Read {
    table: std::sync::Arc<Table>,
    text: Vec<Row>,
    binary: Vec<Row>,
    selected: Vec<Row>,
}

fn options(database: &Database) -> Options {
    Options::parse(&Secret::new(database.url.as_str())).expect("a good URL")
}

/// Publishes `public.t`, which `create` makes, runs `insert`, and reads what came of it.
async fn read(database: &Database, create: &str, insert: &[String]) -> Read {
    let sql = client::sql(&options(database)).await.expect("a session of ours").client;
    let other = database.connect().await;
    other.batch_execute(create).await.unwrap_or_else(|e| panic!("{create}: {e:?}"));
    other.batch_execute("CREATE PUBLICATION p FOR TABLE public.t").await.expect("published");
    let types = read_types(&sql).await.expect("the types");
    let slots = ["text", "binary"].map(|form| format!("{form}_{}", database.name));
    for slot in &slots {
        create_slot(&sql, slot, false).await.expect("a slot");
    }
    for insert in insert {
        other.batch_execute(insert).await.unwrap_or_else(|e| panic!("{insert}: {e:?}"));
    }
    let [text, binary] = &slots;
    let (table, text) = stream(database, &types, text, false, insert.len()).await;
    let (in_binary, binary) = stream(database, &types, binary, true, insert.len()).await;
    assert_eq!(table, in_binary, "one description");
    let rows = sql.simple_query("SELECT * FROM public.t ORDER BY id").await.expect("the rows");
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let text = |text: &str| Value::Text(Bytes::copy_from_slice(text.as_bytes()));
            let value = |index| row.get(index).map_or(Value::Null, text);
            Some((0..row.len()).map(value).collect())
        }
        _ => None,
    };
    let selected = rows.iter().filter_map(row).collect();
    for slot in &slots {
        let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
        other.batch_execute(&drop).await.expect("the slot is free");
    }
    Read { table, text, binary, selected }
}

/// The rows that `inserts` transactions have inserted.
async fn stream(
    database: &Database,
    types: &Types,
    slot: &str,
    binary: bool,
    inserts: usize,
) -> (std::sync::Arc<Table>, Vec<Row>) {
    let session = ReplicationConnection::connect(&options(database)).await.expect("a session");
    let asked = StreamOptions { binary, ..StreamOptions::default() };
    let mut stream = session.start(slot, Lsn::ZERO, &["p"], asked).await.expect("a stream");
    let key = CapturedTable { primary_key: vec!["id".into()], ..CapturedTable::default() };
    let mut assembler = Assembler::new(transaction::Options {
        epoch: 1,
        system_id: 1,
        timelines: Timelines::new(1, Vec::new()),
        resume_after: Position::default(),
        database: "db".into(),
        outbox: OutboxTable::default(),
        captured: HashMap::from([("public.t".into(), key)]),
        catalog_at: Lsn::ZERO,
        renumbered: Default::default(),
        types: types.clone(),
        max_body: 16 << 20,
        canary: "none".into(),
        canary_before: None,
        canary_accepted: 0,
        messages: DatabaseSecret::new(&[0]).messages(),
    });
    let (mut items, mut commits) = (Vec::new(), 0);
    while commits < inserts {
        let Some(frame) = stream.try_next().expect("a frame") else {
            timeout(LIMIT, stream.fill()).await.expect("something arrives").expect("bytes");
            continue;
        };
        let Frame::XLogData { wal_start, data, .. } = frame else { continue };
        assembler.apply(wal_start, &data, &mut items).expect("a message that is understood");
        let commit =
            matches!(pgoutput::decode(&data), Ok(pgoutput::ReplicationMessage::Commit { .. }));
        commits += usize::from(commit);
    }
    stream.close().await;
    let (mut table, mut rows) = (None, Vec::new());
    for item in items {
        let Item::Event(event, _) = item else { continue };
        let Content::Change(Change::Insert { new }) = event.content else { panic!("an insert") };
        table = Some(event.table);
        rows.push(new);
    }
    (table.expect("a row came"), rows)
}

/// The JSON of a value, or why there is none.
fn written(table: &Table, row: &Row, column: usize) -> String {
    let mut out = Vec::new();
    match &row[column] {
        Value::Null => "null".into(),
        Value::Text(text) => match table.columns[column].shape.write(&mut out, text) {
            Ok(()) => String::from_utf8(out).expect("JSON is UTF-8"),
            Err(error) => format!("error: {error}"),
        },
        value => format!("{value:?}"),
    }
}

/// Fails where two of the readers differ in a value's text or its JSON is not JSON.
fn compare(read: &Read, about: &str) {
    assert_eq!(read.text.len(), read.selected.len(), "{about}");
    assert_eq!(read.binary.len(), read.selected.len(), "{about}");
    let rows = read.text.iter().zip(&read.binary).zip(&read.selected);
    for ((text, binary), selected) in rows {
        for (index, column) in read.table.columns.iter().enumerate() {
            let about = format!("{about}: column {:?} of type {}", column.name, column.type_oid);
            assert_eq!(shown(&text[index]), shown(&binary[index]), "{about}: text is left");
            assert_eq!(shown(&text[index]), shown(&selected[index]), "{about}: stream is left");
            let json = written(&read.table, text, index);
            if let Err(error) = serde_json::from_str::<&serde_json::value::RawValue>(&json) {
                panic!("{about}: {json}: {error}");
            }
        }
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
        value => format!("{value:?}"),
    }
}

#[tokio::test]
async fn random_values_are_the_same_in_text_in_binary_and_in_a_select() {
    const ROUNDS: u64 = 6;
    const COLUMNS: usize = 60;
    const ROWS: usize = 12;
    let seed = std::env::var("WATERSHIP_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| fastrand::u64(..));
    for round in 0..ROUNDS {
        let about = format!("WATERSHIP_SEED={seed}, round {round}");
        let mut dice = Rng::with_seed(seed.wrapping_add(round));
        let database = own_database().await;
        let (mut create, kinds) = kinds(&mut dice, COLUMNS);
        let _ = write!(create, "CREATE TABLE public.t (id int PRIMARY KEY");
        for (index, kind) in kinds.iter().enumerate() {
            let _ = write!(create, ", c{index} {}", kind.name);
        }
        create.push(')');
        let (mut inserts, mut expected) = (Vec::new(), Vec::new());
        for id in 0..ROWS {
            let made: Vec<_> = kinds.iter().map(|kind| (kind.make)(&mut dice)).collect();
            let values: Vec<&str> = made.iter().map(|made| &*made.sql).collect();
            inserts.push(format!("INSERT INTO public.t VALUES ({id}, {})", values.join(", ")));
            expected.push(made.into_iter().map(|made| made.json).collect::<Vec<_>>());
        }
        let read = read(&database, &create, &inserts).await;
        compare(&read, &about);
        for (row, expected) in read.text.iter().zip(expected) {
            for (index, expected) in expected.into_iter().enumerate() {
                let Some(expected) = expected else { continue };
                let json = written(&read.table, row, index + 1);
                let kind = &kinds[index].name;
                let found: Json = serde_json::from_str(&json).expect("JSON");
                assert_eq!(found, expected, "{about}: column {index} of type {kind}: {json}");
            }
        }
    }
}

/// The name of a type, a value, and its JSON.
const MATRIX: &[(&str, &str, &str)] = &[
    ("xml", "'<a b=\"1\">x</a>'", r#""<a b=\"1\">x</a>""#),
    ("money", "'-1234567.891'", r#""-$1,234,567.89""#),
    ("money", "'0.05'", r#""$0.05""#),
    ("money", "'-92233720368547758.08'", r#""-$92,233,720,368,547,758.08""#),
    ("tid", "'(4294967295,65535)'", r#""(4294967295,65535)""#),
    ("xid", "'4294967295'", r#""4294967295""#),
    ("cid", "'7'", r#""7""#),
    ("xid8", "'18446744073709551615'", r#""18446744073709551615""#),
    ("pg_lsn", "'0/0'", r#""0/0""#),
    ("\"char\"", "''", r#""""#),
    ("int2vector", "'1 -2 3'", r#""1 -2 3""#),
    ("oidvector", "''", r#""""#),
    ("int2vector[]", "ARRAY['1 2'::int2vector]", r#"["1 2"]"#),
    ("txid_snapshot", "'10:20:10,14,15'", r#""10:20:10,14,15""#),
    ("pg_snapshot", "'10:10:'", r#""10:10:""#),
    ("refcursor", "'c 1'", r#""c 1""#),
    ("jsonpath", "'$.a[*] ? (@ > 1)'", r#""$.\"a\"[*]?(@ > 1)""#),
    ("point", "'(1.5,-0)'", r#""(1.5,-0)""#),
    ("line", "'{1,-2,3}'", r#""{1,-2,3}""#),
    ("lseg", "'[(1,2),(3,4)]'", r#""[(1,2),(3,4)]""#),
    ("box", "'(1,2),(3,4)'", r#""(3,4),(1,2)""#),
    ("box[]", "'{(3,4),(1,2);(7,8),(5,6)}'", r#"["(3,4),(1,2)","(7,8),(5,6)"]"#),
    ("path", "'((1,2),(3,4))'", r#""((1,2),(3,4))""#),
    ("path", "'[(1,2),(3,4)]'", r#""[(1,2),(3,4)]""#),
    ("polygon", "'((0,0),(1e300,0),(0,Infinity))'", r#""((0,0),(1e+300,0),(0,Infinity))""#),
    ("circle", "'<(1,2),0.1>'", r#""<(1,2),0.1>""#),
    (
        "tsvector",
        "'a:1A,2B b:3C c:16383 ''it''''s'' ''b\\\\s'''",
        r#""'a':1A,2B 'b':3C 'b\\\\s' 'c':16383 'it''s'""#,
    ),
    ("tsvector", "''", r#""""#),
    (
        "tsquery",
        "'(a | b:*AB) & !c <-> (d <2> e)'",
        r#""( 'a' | 'b':*AB ) & !'c' <-> ( 'd' <2> 'e' )""#,
    ),
    ("tsquery", "'!(a & b) | !!c'", r#""!( 'a' & 'b' ) | !!'c'""#),
    ("tsquery", "''", r#""""#),
    ("time", "'24:00:00'", r#""24:00:00""#),
    ("timetz", "'23:59:60-15:59:59'", r#""24:00:00-15:59:59""#),
    ("timestamp", "'4714-11-24 00:00:00 BC'", r#""4714-11-24 00:00:00 BC""#),
    ("timestamptz", "'294276-12-31 23:59:59.999999+00'", r#""+294276-12-31T23:59:59.999999Z""#),
    ("numeric", "'Infinity'", r#""Infinity""#),
    ("numeric[]", "'{NaN,-Infinity,0.00}'", r#"["NaN","-Infinity","0.00"]"#),
    (
        "jsonb",
        "'{\"n\": 123456789012345678901234567890.10}'",
        r#"{"n": 123456789012345678901234567890.10}"#,
    ),
    ("char(4)", "'a'", r#""a   ""#),
    ("char(4)[]", "'{a,NULL}'", r#"["a   ",null]"#),
    ("int4[]", "'[-1:0][5:6]={{1,NULL},{3,4}}'", "[[1,null],[3,4]]"),
    ("int4[]", "'{}'", "[]"),
    (
        "datemultirange",
        "'{[2024-01-01,2024-02-01),[2025-01-01,)}'",
        r#""{[2024-01-01,2024-02-01),[2025-01-01,)}""#,
    ),
    (
        "tsmultirange[]",
        "ARRAY['{[2024-01-01 00:00,2024-01-02 00:00]}'::tsmultirange]",
        r#"["{[\"2024-01-01 00:00:00\",\"2024-01-02 00:00:00\"]}"]"#,
    ),
    ("mood[]", "'{fine,\"so so\",NULL}'", r#"["fine","so so",null]"#),
    ("posint", "7", "7"),
    ("smallint_d", "7", "7"),
    ("posint[]", "'{1,NULL}'", "[1,null]"),
    ("ints", "'[0:1]={1,2}'", "[1,2]"),
    ("ints[]", "ARRAY['{1,2}', NULL, '{}']::ints[]", "[[1,2],null,[]]"),
    ("stamp", "'2024-01-02 03:04:05+02'", r#""2024-01-02T01:04:05Z""#),
    ("pair", "ROW(1, 'a \"b\", c\\')", r#""(1,\"a \"\"b\"\", c\\\\\")""#),
    ("pair", "ROW(NULL, '')", r#""(,\"\")""#),
    ("pair", "ROW(NULL, NULL)", r#""(,)""#),
    ("pair[]", "ARRAY[ROW(1, 'x')::pair, NULL]", r#"["(1,x)",null]"#),
    (
        "nest",
        "ROW(ROW(1, 'x y')::pair, '{1,2}', 'so so', '[1,2)')",
        r#""(\"(1,\"\"x y\"\")\",\"{1,2}\",\"so so\",\"[1,2)\")""#,
    ),
    ("one", "ROW(true)", r#""(t)""#),
    ("span8", "'[1.5,2.5]'", r#""[1.5,2.5]""#),
    ("information_schema.sql_identifier", "'t'", r#""t""#),
    ("information_schema.cardinal_number", "3", "3"),
];

const TYPES: &str = "CREATE TYPE mood AS ENUM ('fine', 'so so'); \
    CREATE DOMAIN posint AS int CHECK (VALUE > 0); CREATE DOMAIN smallint_d AS posint; \
    CREATE DOMAIN ints AS int[]; CREATE DOMAIN stamp AS timestamptz; \
    CREATE TYPE pair AS (n int, t text); CREATE TYPE one AS (b bool); \
    CREATE TYPE nest AS (p pair, l int[], m mood, r int4range); \
    CREATE TYPE span8 AS RANGE (SUBTYPE = float8); ";

/// Reads one row of these values and compares each with the JSON that it must have.
async fn expect(database: &Database, before: &str, matrix: &[(&str, &str, &str)]) {
    let mut create = format!("{before} CREATE TABLE public.t (id int PRIMARY KEY");
    let mut insert = "INSERT INTO public.t VALUES (1".to_owned();
    for (index, (kind, value, _)) in matrix.iter().enumerate() {
        let _ = write!(create, ", c{index} {kind}");
        let _ = write!(insert, ", {value}");
    }
    let read = read(database, &format!("{create})"), &[format!("{insert})")]).await;
    compare(&read, "the matrix");
    for (index, (kind, value, expected)) in matrix.iter().enumerate() {
        assert_eq!(written(&read.table, &read.text[0], index + 1), *expected, "{kind} {value}");
    }
}

#[tokio::test]
async fn every_type_has_the_json_that_the_document_says() {
    expect(&own_database().await, TYPES, MATRIX).await;
}

#[tokio::test]
async fn types_of_extensions_are_the_same_in_both_modes() {
    let before = "CREATE EXTENSION hstore; CREATE EXTENSION ltree; CREATE EXTENSION citext; \
        CREATE EXTENSION cube; CREATE EXTENSION isn; CREATE EXTENSION seg;";
    let matrix = [
        (
            "hstore",
            r#"'a=>1, "b \" c"=>NULL, d=>"x\\y"'"#,
            r#""\"a\"=>\"1\", \"d\"=>\"x\\\\y\", \"b \\\" c\"=>NULL""#,
        ),
        ("hstore", "''", r#""""#),
        ("hstore[]", "ARRAY['a=>1'::hstore]", r#"["\"a\"=>\"1\""]"#),
        ("ltree", "'a.b.c'", r#""a.b.c""#),
        ("lquery", "'a.*{1,2}.b|c'", r#""a.*{1,2}.b|c""#),
        ("ltxtquery", "'a & b*'", r#""a & b*""#),
        ("ltree[]", "'{a.b,c}'", r#"["a.b","c"]"#),
        ("citext", "'MiXed'", r#""MiXed""#),
        ("citext[]", "'{A,b}'", r#"["A","b"]"#),
        ("cube", "'(1,2.5),(3,4)'", r#""(1, 2.5),(3, 4)""#),
        ("cube", "'(1,2)'", r#""(1, 2)""#),
        ("isbn13", "'978-0-14-044793-4'", r#""978-0-14-044793-4""#),
        ("seg", "'1.5 .. 2'", r#""1.5 .. 2""#),
    ];
    expect(&own_database().await, before, &matrix).await;
}

/// Runs where the extension is installed, and says where it is not.
async fn expect_extension(name: &str, matrix: &[(&str, &str, &str)]) {
    let database = own_database().await;
    let client = database.connect().await;
    let there = "SELECT count(*) FROM pg_available_extensions WHERE name = $1";
    let there: i64 = client.query_one(there, &[&name]).await.expect("a count").get(0);
    if there == 0 {
        eprintln!("SKIPPED: the extension {name} is not installed on this server");
        return;
    }
    expect(&database, &format!("CREATE EXTENSION {name};"), matrix).await;
}

#[tokio::test]
async fn postgis_types_are_the_same_in_both_modes() {
    let matrix = [
        ("geometry", "'POINT(1 2)'", r#""0101000000000000000000F03F0000000000000040""#),
        (
            "geometry(Point,4326)",
            "'SRID=4326;POINT(1 2)'",
            r#""0101000020E6100000000000000000F03F0000000000000040""#,
        ),
        ("geography", "'POINT(1 2)'", r#""0101000020E6100000000000000000F03F0000000000000040""#),
        (
            "geometry[]",
            "ARRAY['POINT(1 2)'::geometry, NULL]",
            r#"["0101000000000000000000F03F0000000000000040",null]"#,
        ),
        ("box2d", "'BOX(1 2,3 4)'", r#""BOX(1 2,3 4)""#),
        ("geometry", "NULL", "null"),
    ];
    expect_extension("postgis", &matrix).await;
}

#[tokio::test]
async fn pgvector_types_are_the_same_in_both_modes() {
    let matrix = [
        ("vector(3)", "'[1,-0.5,3e38]'", r#""[1,-0.5,3e+38]""#),
        ("vector[]", "ARRAY['[1,2]'::vector]", r#"["[1,2]"]"#),
        ("halfvec(2)", "'[1,65504]'", r#""[1,65504]""#),
        ("sparsevec(5)", "'{1:1.5,4:2}/5'", r#""{1:1.5,4:2}/5""#),
    ];
    expect_extension("vector", &matrix).await;
}

/// Built-in types whose binary form says less than their text.
const WITHOUT_BINARY: &[&str] = &[
    // Names of the catalog as numbers.
    "regproc",
    "regprocedure",
    "regoper",
    "regoperator",
    "regclass",
    "regcollation",
    "regtype",
    "regrole",
    "regnamespace",
    "regconfig",
    "regdictionary",
    // The server's own; no value can be written.
    "gtsvector",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_ddl_command",
];

#[tokio::test]
async fn every_built_in_type_has_a_renderer() {
    let client = own_database().await.connect().await;
    let sql = "SELECT typname::text, oid FROM pg_type WHERE oid < 10000 AND typtype IN \
        ('b', 'r', 'm') AND typsend <> 0 AND typoutput <> 'array_out'::regproc";
    let types = Types::default();
    for row in client.query(sql, &[]).await.expect("the types") {
        let (name, type_oid): (String, u32) = (row.get(0), row.get(1));
        let unrendered = types
            .text(type_oid, b"")
            .is_err_and(|error| error.to_string().contains("cannot be rendered"));
        assert_eq!(unrendered, WITHOUT_BINARY.contains(&&*name), "{name}");
    }
}

#[tokio::test]
async fn an_array_of_each_built_in_type_is_an_array() {
    let client = own_database().await.connect().await;
    let sql = "SELECT a.typname::text, a.oid, a.typdelim::text FROM pg_type AS a WHERE a.oid < \
        10000 AND a.typoutput = 'array_out'::regproc AND EXISTS (SELECT FROM pg_type AS e \
        WHERE e.oid = a.typelem AND e.typtype IN ('b', 'r', 'm'))";
    for row in client.query(sql, &[]).await.expect("the types") {
        let (name, type_oid): (String, u32) = (row.get(0), row.get(1));
        let shape = Types::default().shape(type_oid);
        assert_eq!(shape.arrays(), 1, "{name}");
    }
}
