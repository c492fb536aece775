//! Formats between real servers: what a consumer gets, and that a replay has the same bytes.

use serde_json::{Value, json};

use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};

const TYPES: &str = "CREATE TABLE public.things (\
    id int PRIMARY KEY, flag boolean, one bit(1), bits bit(9), big bigint, small real, \
    exact numeric(10,2), loose numeric, day date, clock time, clock3 time(3), \
    moment timestamp, moment3 timestamp(3), zoned timestamptz, zone timetz, span interval, \
    bytes bytea, doc jsonb, plain json, code uuid, net inet, range int4range, numbers int[], \
    words text[], prices numeric(5,2)[], late timestamp, note text)";

const ROW: &str = "INSERT INTO things VALUES (7, true, B'1', B'000000101', 9007199254740993, 1.5, \
    1234.50, 1.10, '2016-11-04', '13:51:30.123456', '13:51:30.123', \
    '2016-11-04 13:51:30.123456', '2016-11-04 13:51:30.123', '2016-11-04 13:51:30.123456+02', \
    '13:51:30.5+02', '1 year 2 mons 3 days 04:05:06.78', '\\xfbff01', '{\"b\": 1.00, \"a\": []}', \
    '{ \"a\" :1}', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '10.0.0.1', '[1,10)', '{1,NULL,3}', \
    '{a,NULL}', '{1.10}', 'infinity', 'x')";

fn expected_row(id: i32) -> Value {
    json!({
        "id": id, "flag": true, "one": true, "bits": "BQ==", "big": 9_007_199_254_740_993_i64,
        "small": 1.5, "exact": "AeI6", "loose": {"scale": 1, "value": "Cw=="}, "day": 17109,
        "clock": 49_890_123_456_i64, "clock3": 49_890_123, "moment": 1_478_267_490_123_456_i64,
        "moment3": 1_478_267_490_123_i64, "zoned": "2016-11-04T11:51:30.123456Z",
        "zone": "11:51:30.5Z", "span": 37_091_106_780_000_i64, "bytes": "+/8B",
        "doc": "{\"a\": [], \"b\": 1.00}", "plain": "{ \"a\" :1}",
        "code": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "net": "10.0.0.1", "range": "[1,10)",
        "numbers": [1, null, 3], "words": ["a", null], "prices": ["bg=="],
        "late": 9_223_372_036_825_200_000_i64, "note": "x",
    })
}

const DEBEZIUM: &str = "
    [[route]]
    name = 'things'
    table = 'public.things'
    exchange = 'watership'
    format = 'debezium'
    debezium = { topic_prefix = 'bench', routing_key = 'topic', tombstones = true }
    ";

fn setup(settings: &'static str) -> Setup<'static> {
    let tables = &["public.things"];
    Setup { sql: TYPES, tables, settings, routes: DEBEZIUM, ..Setup::default() }
}

#[tokio::test]
async fn debezium_has_one_form_for_text_and_binary_mode() {
    for settings in ["", "source.binary = true"] {
        let stage = Stage::new(setup(settings)).await;
        let _relay = stage.start().await;
        stage.execute(ROW).await;
        stage.execute("UPDATE things SET id = 8").await;
        stage.execute("DELETE FROM things").await;
        stage.execute("TRUNCATE things").await;
        let got = stage.settled().await;
        let no = Value::Null;
        let expected = [
            Some(("c", no.clone(), expected_row(7))),
            Some(("d", json!({"id": 7}), no.clone())),
            None,
            Some(("c", no.clone(), expected_row(8))),
            Some(("d", json!({"id": 8}), no.clone())),
            None,
        ];
        assert_eq!(got.len(), expected.len(), "{got:?}");
        for (message, expected) in got.iter().zip(expected) {
            assert_eq!(message.routing_key, "bench.public.things");
            let Some((op, before, after)) = expected else {
                assert_eq!(message.body, "");
                continue;
            };
            let body = message.json();
            assert_eq!(body["op"], op);
            assert_eq!((&body["before"], &body["after"]), (&before, &after), "{settings}");
            let source = &body["source"];
            assert_eq!((&source["schema"], &source["table"]), (&json!("public"), &json!("things")));
            assert!(source["lsn"].is_u64() && source["txId"].is_u64(), "{source}");
            assert_eq!(body["ts_us"], source["ts_us"]);
        }
        assert_eq!(got[1].text("__debezium.newkey"), "{\"id\":8}");
        assert_eq!(got[3].text("__debezium.oldkey"), "{\"id\":7}");
        let ids: Vec<String> = got.iter().map(Message::id).collect();
        assert!(ids.iter().all(|id| ids.iter().filter(|other| *other == id).count() == 1));
    }
}

#[tokio::test]
async fn what_a_killed_relay_sends_again_has_the_same_bytes() {
    let stage = Stage::new(setup("relay.checkpoint_interval = '60s'")).await;
    let relay = stage.start().await;
    stage.execute(ROW).await;
    stage.execute("UPDATE things SET id = 8").await;
    stage.inbox.count(4).await;
    // No checkpoint covers them.
    relay.kill();
    let _relay = stage.start().await;
    let got = stage.inbox.count(8).await;
    for (first, again) in got[..4].iter().zip(&got[4..]) {
        assert_eq!(first.bytes, again.bytes);
        assert_eq!(first.properties, again.properties);
    }
}

const USER_TYPES: &str = "CREATE EXTENSION hstore; CREATE EXTENSION ltree; \
    CREATE EXTENSION citext; CREATE TYPE mood AS ENUM ('sad', 'so so'); \
    CREATE TYPE pair AS (a int, b text); CREATE DOMAIN price AS numeric(8,4); \
    CREATE DOMAIN net AS price; CREATE DOMAIN three AS timestamp(3); \
    CREATE TABLE public.things (id int PRIMARY KEY, m mood, ms mood[], p pair, pr price, \
        prs price[], n net, t three, h hstore, hs hstore[], l ltree, c citext, note text)";

#[tokio::test]
async fn debezium_resolves_types_of_users_and_extensions_in_both_modes_and_after_parking() {
    for mode in ["", "source.binary = true"] {
        let settings = format!("{mode}\n{}", crate::parking::SMALL);
        let (sql, tables) = (USER_TYPES, &["public.things"]);
        let setup =
            Setup { sql, tables, settings: &settings, routes: DEBEZIUM, ..Setup::default() };
        let stage = Stage::new(setup).await;
        let relay = stage.start().await;
        let row = "'so so', '{sad,NULL}', '(1,x)', 1.1, '{1.1,NULL}', 1.1, \
            '2016-11-04 13:51:30.123', '\"a b\"=>\"1\", c=>NULL', '{\"a=>1\"}', \
            'Top.Science', 'Ab'";
        stage.execute(&format!("INSERT INTO things VALUES (1, {row}, 'x')")).await;
        stage.execute(&format!("INSERT INTO things VALUES (2, {row}, repeat('x', 2000))")).await;
        crate::parking::until_rows(&stage, &["parked too_large"]).await;
        let mut expected = json!({
            "id": 1, "m": "so so", "ms": ["sad", null], "pr": "Kvg=", "prs": ["Kvg=", null],
            "n": {"scale": 1, "value": "Cw=="}, "t": 1_478_267_490_123_i64,
            "h": "{\"c\":null,\"a b\":\"1\"}", "hs": ["{\"a\":\"1\"}"], "l": "Top.Science",
            "c": "Ab", "note": "x",
        });
        let got = stage.settled().await;
        assert_eq!(got[0].json()["after"], expected, "{mode}");
        // What was parked is the same after a restart, though its types may be gone by then.
        relay.stop().await.expect_code(0);
        let text = stage.configuration().replace("1KiB", "1MiB");
        stage.replace_configuration(&text);
        let relay = stage.start().await;
        crate::parking::parked(&stage, &["retry", "--all"]).await;
        crate::parking::until_rows(&stage, &["released too_large"]).await;
        let got = stage.settled().await;
        expected["id"] = json!(2);
        expected["note"] = json!("x".repeat(2000));
        assert_eq!(got[1].json()["after"], expected, "{mode}");
        relay.stop().await.expect_code(0);
    }
}
