//! `source.binary`: the same messages, byte for byte, and rows that text mode cannot carry.

use std::fmt::Write as _;

use watership::column::Types;
use watership::column::oid;

use crate::relay_types::VALUES;
use crate::support::full;
use crate::support::inbox::Message;
use crate::support::servers::own_database;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// Column, type, SQL value: what the documented types do not show.
const MORE: &[(&str, &str, &str)] = &[
    ("zero", "numeric", "0"),
    ("zeros", "numeric", "0.000"),
    ("minus", "numeric", "-0.0001"),
    ("tiny_n", "numeric", "1e-20"),
    ("round_n", "numeric", "1e30"),
    ("ten_thousand", "numeric", "10000"),
    ("nines", "numeric", "9999.9999"),
    ("long_n", "numeric", "(repeat('1234567890', 100) || '.' || repeat('098', 100))::numeric"),
    ("inf_n", "numeric", "'-Infinity'"),
    ("scaled", "numeric(20,5)", "3.1"),
    ("bc", "date", "'0044-03-15 BC'"),
    ("far", "date", "'5874897-12-31'"),
    ("never", "date", "'-infinity'"),
    ("first_day", "date", "'0001-01-01'"),
    ("midnight", "time", "'24:00:00'"),
    ("west", "timetz", "'23:59:59.5-08:15:30'"),
    ("bc_stamp", "timestamp", "'4714-11-24 00:00:00 BC'"),
    ("last_stamp", "timestamptz", "'294276-12-31 23:59:59.999999+00'"),
    ("no_span", "interval", "'0'"),
    ("back", "interval", "'-1 year 2 days -03:04:05.000006'"),
    ("exact", "float8", "'1e23'"),
    ("least", "float8", "'5e-324'"),
    ("edge", "float8", "'1e15'"),
    ("edge_4", "float4", "'1e6'"),
    ("minus_0", "float8", "'-0'"),
    ("short_name", "name", "'x y'"),
    ("letter", "\"char\"", "'q'"),
    ("number", "oid", "4294967295"),
    ("place", "pg_lsn", "'16/B374D848'"),
    ("tx", "xid8", "'18446744073709551615'"),
    ("net", "cidr", "'10.1.0.0/16'"),
    ("net_6", "cidr", "'2001:db8::/32'"),
    ("host_6", "inet", "'::1'"),
    ("host_64", "inet", "'2001:db8:0:1::7/64'"),
    ("mapped", "inet", "'::ffff:10.1.2.3'"),
    ("compat", "inet", "'::10.1.2.3'"),
    ("card", "macaddr", "'08:00:2b:01:02:03'"),
    ("card_8", "macaddr8", "'08:00:2b:01:02:03:04:05'"),
    ("flags5", "bit(5)", "B'10110'"),
    ("flags_v", "varbit", "B'101100111000'"),
    ("no_flags", "varbit", "B''"),
    ("r_none", "int4range", "'empty'"),
    ("r_open", "int8range", "'(,5]'"),
    ("r_all", "numrange", "'(,)'"),
    ("r_time", "tsrange", "'[2024-01-01 00:00,2024-01-02 12:30)'"),
    ("r_zone", "tstzrange", "'[2024-01-01 00:00+02,)'"),
    ("r_day", "daterange", "'[2024-01-01,2024-01-03]'"),
    ("r_many", "int4multirange", "'{[1,3),[7,9)}'"),
    ("r_none_m", "nummultirange", "'{}'"),
    ("r_times", "tstzmultirange", "'{[2024-01-01,2024-01-02)}'"),
    ("r_own", "span8", "'[1.5,2.5]'"),
    ("moods", "mood[]", "'{fine,so so,NULL}'"),
    ("positives", "posint[]", "'{1,2}'"),
    ("label", "label", "'a \"label\"'"),
    ("cube", "int4[]", "'[0:1][5:5][-1:0]={{{1,2}},{{3,4}}}'"),
    ("odd", "text[]", "ARRAY['', 'null', 'NULL', E'a\\\\b', '\"', '{', ' ', E'\\t', ',', NULL]"),
    ("bytes", "bytea[]", "ARRAY['\\x00ff'::bytea, '']"),
    ("stamps", "timestamptz[]", "'{2024-01-01,infinity}'"),
    ("amounts", "numeric[]", "'{1.50,NaN}'"),
    ("ids", "uuid[]", "ARRAY['a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid]"),
    ("names", "name[]", "'{a,b}'"),
    ("ranges", "int4range[]", "ARRAY['[1,2]'::int4range, 'empty']"),
    ("hosts", "inet[]", "'{10.0.0.1,::1/64}'"),
    ("jsons", "json[]", "ARRAY['{\"a\": [1, 2]}'::json]"),
];

const TYPES: &str = "CREATE TYPE mood AS ENUM ('fine', 'so so'); \
    CREATE DOMAIN posint AS int CHECK (VALUE > 0); CREATE DOMAIN label AS text; \
    CREATE TYPE span8 AS RANGE (SUBTYPE = float8); ";

/// Rows of chance for the types in which a renderer can go wrong by a digit.
fn random_rows(rows: u32) -> String {
    let mut dice = fastrand::Rng::with_seed(20_260);
    let mut sql = String::from("INSERT INTO chance VALUES ");
    for id in 0..rows {
        let eight = f64::from_bits(dice.u64(..));
        let four = f32::from_bits(dice.u32(..));
        let eight = if eight.is_finite() { eight } else { 0.1 };
        let four = if four.is_finite() { four } else { 0.1 };
        let numeric =
            format!("{}.{:0width$}", dice.i64(..), dice.u32(..), width = dice.usize(1..20));
        let seconds = dice.i64(-200_000_000_000..9_000_000_000_000);
        let (us, days, months) = (dice.i64(-1 << 50..1 << 50), dice.i16(..), dice.i16(..));
        let separator = if id == 0 { "" } else { ", " };
        let _ = write!(
            sql,
            "{separator}({id}, '{eight:e}', '{four:e}', '{numeric}', \
             'epoch'::timestamptz + '{seconds} seconds'::interval + '{} us'::interval, \
             make_interval(months => {months}, days => {days}, secs => {us} / 1000000.0), \
             ARRAY['{eight:e}'::float8, {id}])",
            dice.u32(0..1_000_000),
        );
    }
    sql
}

/// What a message says, but for who sent it.
fn facts(message: &Message) -> (String, Vec<u8>, String, String, String) {
    (
        message.id(),
        message.bytes.clone(),
        message.kind().to_owned(),
        message.text("ws-key"),
        message.text("ws-position"),
    )
}

/// Puts a copy of the checkpoint back; what is generated is made again.
const PUT_BACK: &str = "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, \
    session_no, slot, system_identifier, timeline, publication, publication_oid) \
    SELECT name, epoch, mark, ordinal, flush_mark, session_no, slot, system_identifier, timeline, \
    publication, publication_oid FROM public.kept";

/// Types of some extensions have no send function: Postgres sends them as text.
#[tokio::test]
async fn a_type_without_a_binary_form_arrives_as_text_and_ends_no_session() {
    let sql = "CREATE EXTENSION isn; CREATE TABLE public.books (id int PRIMARY KEY, isbn isbn13)";
    let settings = "source.binary = true";
    let setup = Setup { sql, tables: &["public.books"], settings, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO books VALUES (1, '978-0-14-044793-4')").await;
    stage.execute("INSERT INTO books VALUES (2, '978-0-14-044793-4')").await;
    let got = stage.settled().await;
    let isbns: Vec<_> = got.iter().map(|message| message.json()["after"]["isbn"].clone()).collect();
    assert_eq!(isbns, ["978-0-14-044793-4", "978-0-14-044793-4"]);
    assert_eq!(relay.status().await["sessions"], 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn binary_and_text_mode_make_the_same_messages_byte_for_byte() {
    const ROWS: u32 = 4_000;
    let documented = VALUES.iter().map(|(name, kind, value, _)| (*name, *kind, *value));
    let all: Vec<_> = documented.chain(MORE.iter().copied()).collect();
    let columns: Vec<String> = all.iter().map(|(name, kind, _)| format!("{name} {kind}")).collect();
    let sql = format!(
        "{TYPES} CREATE TABLE public.everything (id int8 PRIMARY KEY, {}); \
         ALTER TABLE public.everything REPLICA IDENTITY FULL; \
         CREATE TABLE public.chance (id int PRIMARY KEY, eight float8, four float4, n numeric, \
         at timestamptz, span interval, list float8[]); \
         CREATE TABLE public.indexed (id int PRIMARY KEY, n numeric NOT NULL, at timestamptz NOT \
         NULL, list text[] NOT NULL, UNIQUE (list, at, n, id)); \
         ALTER TABLE public.indexed REPLICA IDENTITY USING INDEX indexed_list_at_n_id_key",
        columns.join(", ")
    );
    let tables = ["public.everything", "public.chance", "public.indexed"];
    let stage = Stage::new(Setup { sql: &sql, tables: &tables, ..Setup::default() }).await;
    // A second slot at the same place, to go the same way again.
    let (slot, copy) = (&stage.slot, format!("{}_copy", stage.slot));
    stage.execute(&format!("SELECT pg_copy_logical_replication_slot('{slot}', '{copy}')")).await;
    stage.execute("CREATE TABLE public.kept AS SELECT * FROM watership.checkpoint").await;
    let values: Vec<&str> = all.iter().map(|(_, _, value)| *value).collect();
    for sql in [
        &*format!("INSERT INTO everything VALUES (1, {})", values.join(", ")),
        "INSERT INTO everything (id) VALUES (2)",
        "UPDATE everything SET id = 3 WHERE id = 1",
        "DELETE FROM everything",
        "INSERT INTO indexed SELECT g, g / 8.0, 'epoch'::timestamptz + g * interval '1 us', \
         ARRAY[g, NULL] FROM generate_series(1, 20) AS g",
        "UPDATE indexed SET n = -n, list = '{}' WHERE id % 2 = 0",
        "DELETE FROM indexed",
        &*random_rows(ROWS),
        "SELECT watership.emit('t', '1', 'j', '{\"b\": 1.0,  \"a\": \"ü\"}', '{\"t\": \"x\"}')",
        "SELECT watership.emit_bytes('t', '1', 'bytes', '\\x5c00ff'::bytea, 'x/y')",
    ] {
        stage.execute(sql).await;
    }
    let relay = stage.start().await;
    let mut text = stage.settled().await;
    relay.stop().await.expect_code(0);
    stage
        .execute(&format!(
            "DELETE FROM watership.checkpoint; {PUT_BACK}; \
             UPDATE watership.checkpoint SET slot = '{copy}'"
        ))
        .await;
    let mut relay = stage.spawn_other(|config| {
        let line = format!("source.slot = \"{slot}\"");
        assert!(config.contains(&line));
        config.replace(&line, &format!("source.slot = \"{copy}\"\nsource.binary = true"))
    });
    relay.ready().await;
    let both = stage.settled().await;
    relay.stop().await.expect_code(0);
    let mut binary = both[text.len()..].to_vec();
    // Lanes overtake each other.
    text.sort_by_key(|message| message.text("ws-position"));
    binary.sort_by_key(|message| message.text("ws-position"));
    assert_eq!(text.len(), 5 + 50 + ROWS as usize + 2);
    assert_eq!(binary.len(), text.len());
    for (text, binary) in text.iter().zip(&binary) {
        assert_eq!(text.body, binary.body, "text mode is on the left");
        assert_eq!(facts(text), facts(binary));
    }
}

#[tokio::test]
async fn a_type_without_a_renderer_is_parked_with_its_column_and_what_to_do() {
    // A type of an extension that we do not know: text in one form, something else in the other.
    let sql = "CREATE TYPE odd_type; \
        CREATE FUNCTION odd_in(cstring) RETURNS odd_type IMMUTABLE STRICT LANGUAGE internal \
        AS 'textin'; \
        CREATE FUNCTION odd_out(odd_type) RETURNS cstring IMMUTABLE STRICT LANGUAGE internal \
        AS 'textout'; \
        CREATE FUNCTION odd_send(odd_type) RETURNS bytea IMMUTABLE STRICT LANGUAGE internal \
        AS 'byteasend'; \
        CREATE TYPE odd_type (INPUT = odd_in, OUTPUT = odd_out, SEND = odd_send); \
        CREATE TABLE public.odd (id int PRIMARY KEY, two odd_type)";
    let settings = "source.binary = true\nrelay.canary_interval = \"1s\"";
    let tables = ["public.odd"];
    let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO odd VALUES (1, NULL)").await;
    stage.inbox.count(1).await;
    stage.execute("INSERT INTO odd VALUES (2, 'x')").await;
    stage.execute("INSERT INTO odd VALUES (3, NULL)").await;
    stage.execute("UPDATE odd SET two = NULL WHERE id = 2").await;
    until("both changes of the key are parked", async || stage.holds(PARKED_TWO).await).await;
    stage.inbox.count(2).await;
    let error = stage.text("SELECT error FROM watership.parked ORDER BY mark LIMIT 1").await;
    assert!(error.contains("column \"two\": type"), "{error}");
    assert!(error.contains("cannot be rendered from binary"), "{error}");
    assert!(error.contains("set source.binary = false"), "{error}");
    // The value itself is kept.
    let kept = "SELECT event #>> '{content,insert,new,1,base64_binary}' FROM watership.parked \
                WHERE kind = 'invalid'";
    assert_eq!(stage.text(kept).await, "eA==");
    // A stream in binary is not deaf.
    let came = "(SELECT coalesce(max(number), 0) >= 5 FROM watership.canary)";
    until("more canaries are written", async || stage.holds(came).await).await;
    let fresh =
        async || relay.metric("watership_canary_age_seconds").await.is_some_and(|a| a < 3.0);
    until("the canary is fresh", fresh).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_name_of_the_catalog_is_refused_where_only_its_number_would_come() {
    // Types that are made of one are as it is.
    let table = |kind: &str| {
        format!(
            "CREATE DOMAIN of_it AS regclass; CREATE DOMAIN of_that AS of_it; \
             CREATE DOMAIN of_them AS regclass[]; CREATE TYPE of_some AS (a int, b of_that); \
             CREATE TYPE span AS RANGE (subtype = regclass, subtype_opclass = oid_ops); \
             CREATE TABLE public.t (id int PRIMARY KEY, what {kind})"
        )
    };
    for (kind, named) in [
        ("regclass", "regclass"),
        ("regtype", "regtype"),
        ("regrole", "regrole"),
        ("regnamespace", "regnamespace"),
        ("regproc", "regproc"),
        ("regclass[]", "regclass"),
        ("of_it", "regclass"),
        ("of_that", "regclass"),
        ("of_that[]", "regclass"),
        ("of_them", "regclass"),
        ("of_some", "regclass"),
        ("of_some[]", "regclass"),
        ("span", "regclass"),
        ("span_multirange", "regclass"),
    ] {
        let (sql, tables) = (table(kind), ["public.t"]);
        let routes = "[[route]]\nname = \"t\"\ntable = \"public.t\"\nexchange = \"watership\"\n";
        let stage = Stage::new(Setup { sql: &sql, tables: &tables, routes, ..Setup::default() });
        let stage = stage.await;
        let text = stage.configuration();
        let binary = text.replacen("source.tables", "source.binary = true\nsource.tables", 1);
        stage.replace_configuration(&binary);
        let told = format!("column \"what\" of table public.t is of type {named}, or");
        for command in ["init", "check", "run"] {
            let refused = stage.run(&[command]).await;
            refused.expect_code(1).expect_text(&[&told, "source.binary = false"]);
        }
        // What is not sent is in nobody's way.
        let exclude = "table = \"public.t\"\ncolumns = { exclude = [\"what\"] }";
        stage.replace_configuration(&binary.replacen("table = \"public.t\"", exclude, 1));
        stage.run(&["init"]).await.expect_code(0);
        let relay = stage.start().await;
        stage.execute("INSERT INTO t VALUES (1, NULL)").await;
        assert_eq!(stage.settled().await.len(), 1);
        relay.stop().await.expect_code(0);
        // Nor is a column that nobody has agreed to.
        stage.execute(&format!("ALTER TABLE t ADD more {kind}")).await;
        stage.run(&["check"]).await.expect_code(0).expect_text(&["leaves out new columns"]);
        let accepted = stage.run(&["schema", "accept", "public.t"]).await;
        accepted.expect_code(1).expect_text(&["column \"more\"", "source.binary = false"]);
        stage.start().await.stop().await.expect_code(0);
        // And text mode has the names.
        stage.replace_configuration(&text);
        let relay = stage.start().await;
        stage.execute("INSERT INTO t VALUES (2, NULL)").await;
        assert_eq!(stage.settled().await.len(), 2);
        relay.stop().await.expect_code(0);
    }
}

const PARKED_TWO: &str = "(SELECT count(*) FROM watership.parked) = 2";

#[tokio::test]
async fn a_row_that_is_too_large_for_text_is_a_verdict_and_binary_mode_gets_past_it() {
    // 513 MiB, and several times that in the walsender and in the relay.
    if !full() {
        return;
    }
    let sql = "CREATE TABLE public.large (id int PRIMARY KEY, data bytea)";
    let tables = ["public.large"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO large VALUES (1, '\\x00')").await;
    stage.inbox.count(1).await;
    let large = "convert_to(repeat('x', 513 * 1024 * 1024), 'UTF8')";
    stage.execute(&format!("INSERT INTO large VALUES (2, {large})")).await;
    relay.ended().await.expect_code(3).expect_text(&[
        "Postgres failed twice to send what follows",
        "SQLSTATE XX000",
        "set source.binary = true",
    ]);
    let relay = stage.spawn_other(|config| {
        config.replace("source.tables", "source.binary = true\nsource.tables")
    });
    // Now it is the broker that cannot take it, and the event that is wrong, by name. It is parked.
    stage.execute("INSERT INTO large VALUES (3, '\\x01')").await;
    stage.inbox.count(2).await;
    let parked = "(SELECT count(*) FROM watership.parked) = 1";
    until("it is parked", async || stage.holds(parked).await).await;
    let error = stage.text("SELECT error FROM watership.parked").await;
    assert!(error.contains("column \"data\": a value of 537919488 bytes"), "{error}");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_large_poison_row_is_parked_and_stops_nobody() {
    // 100 MB of payload, above every limit, and 300 MB of which the parked row keeps no payload.
    if !full() {
        return;
    }
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    for (key, megabytes) in [(1, 100), (2, 300)] {
        let payload = format!("to_json(repeat('x', {megabytes} * 1024 * 1024))::text");
        stage.execute(&format!("SELECT watership.emit('t', '{key}', 'x', {payload})")).await;
        stage.execute("SELECT watership.emit('t', '9', 'x', '1')").await;
    }
    stage.inbox.count(2).await;
    let parked = "(SELECT string_agg(key || ' ' || (length(event::text) > 9999), ',' ORDER BY key) \
                  FROM watership.parked) = 't/1 true,t/2 false'";
    until("both are parked", async || stage.holds(parked).await).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn floats_are_rendered_as_the_server_renders_them() {
    const EACH: usize = 60_000;
    let mut dice = fastrand::Rng::with_seed(4);
    let mut fours: Vec<f32> = (0..EACH).map(|_| f32::from_bits(dice.u32(..))).collect();
    // Ties and powers of two, where printers differ.
    fours.extend((0..EACH).map(|_| dice.i32(-20_000_000..20_000_000) as f32 / 8.0));
    fours.extend((-126..128).map(|power| 2_f32.powi(power)));
    let mut eights: Vec<f64> = (0..EACH).map(|_| f64::from_bits(dice.u64(..))).collect();
    eights.extend((0..EACH).map(|_| dice.i64(-(1 << 55)..1 << 55) as f64 / 8.0));
    eights.extend((-1022..1024).map(|power| 2_f64.powi(power)));
    eights.extend((-300..300).map(|power: i32| format!("1e{power}").parse::<f64>().unwrap()));
    let client = own_database().await.connect().await;
    let types = Types::default();
    let text = |type_oid, bytes: &[u8]| {
        String::from_utf8(types.text(type_oid, bytes).unwrap().into_owned()).unwrap()
    };
    let sql = "SELECT v::text FROM unnest($1::float4[]) WITH ORDINALITY AS t(v, n) ORDER BY n";
    for (row, value) in client.query(sql, &[&fours]).await.unwrap().iter().zip(&fours) {
        assert_eq!(text(oid::FLOAT4, &value.to_be_bytes()), row.get::<_, &str>(0), "{value:e}");
    }
    let sql = sql.replace("float4", "float8");
    for (row, value) in client.query(&sql, &[&eights]).await.unwrap().iter().zip(&eights) {
        assert_eq!(text(oid::FLOAT8, &value.to_be_bytes()), row.get::<_, &str>(0), "{value:e}");
    }
}
