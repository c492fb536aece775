//! Tables of unusual shape: names, widths, encodings, generated columns, cascades.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::hosted::database_in;
use crate::support::servers::own_vhost;
use crate::support::stage::{Setup, Stage};

const MODES: [&str; 2] = ["", "source.binary = true"];

#[tokio::test]
async fn names_with_quotes_capitals_and_other_scripts_arrive_as_they_are() {
    for settings in MODES {
        let sql = "CREATE SCHEMA \"Läden\"; \
            CREATE TYPE \"Läden\".\"Größe\" AS ENUM ('klein', 'groß \"XL\"'); \
            CREATE TABLE \"Läden\".\"Neue Bestellung 🐇\" (\"Schlüssel\" int PRIMARY KEY, \
            \"a \"\"b\"\" \\ c\" text, \"数量\" \"Läden\".\"Größe\"[])";
        let tables = ["Läden.Neue Bestellung 🐇"];
        let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
        let relay = stage.start().await;
        let table = "\"Läden\".\"Neue Bestellung 🐇\"";
        stage
            .execute(&format!(
                "INSERT INTO {table} VALUES (1, 'x', '{{klein,\"groß \\\"XL\\\"\"}}')"
            ))
            .await;
        let got = stage.settled().await;
        let after = json!({"Schlüssel": 1, "a \"b\" \\ c": "x", "数量": ["klein", "groß \"XL\""]});
        assert_eq!(got[0].json()["after"], after, "{settings}");
        assert_eq!(got[0].text("ws-source"), tables[0]);
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_table_of_1600_columns_arrives_whole_after_every_change() {
    const COLUMNS: usize = 1600;
    let columns: Vec<String> = (1..COLUMNS).map(|n| format!("c{n} bool")).collect();
    let sql = format!("CREATE TABLE public.t (id int PRIMARY KEY, {})", columns.join(", "));
    for settings in MODES {
        let setup = Setup { sql: &sql, tables: &["public.t"], settings, ..Setup::default() };
        let stage = Stage::new(setup).await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO t (id, c1, c1599) VALUES (1, true, false)").await;
        stage.execute("UPDATE t SET c800 = true").await;
        let got = stage.settled().await;
        let mut after: Map<String, Value> =
            (1..COLUMNS).map(|n| (format!("c{n}"), Value::Null)).collect();
        after.insert("id".into(), json!(1));
        after.insert("c1".into(), json!(true));
        after.insert("c1599".into(), json!(false));
        assert_eq!(got[0].json()["after"], Value::Object(after.clone()), "{settings}");
        after.insert("c800".into(), json!(true));
        assert_eq!(got[1].json()["after"], Value::Object(after), "{settings}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn text_of_another_encoding_arrives_as_utf8_in_every_kind_of_type() {
    for settings in MODES {
        let sql = "CREATE TYPE mood AS ENUM ('grün'); CREATE TYPE pair AS (t text, m mood); \
            CREATE TABLE public.t (id int PRIMARY KEY, t text, ts text[], m mood, p pair, \
            j jsonb, x xml, v tsvector, c char(3))";
        let setup = Setup { sql, tables: &["public.t"], settings, ..Setup::default() };
        let stage = Stage::on(database_in("LATIN1").await, own_vhost().await, setup).await;
        let relay = stage.start().await;
        stage
            .execute(
                "INSERT INTO t VALUES (1, 'é', '{ü,\"a b\"}', 'grün', '(ß,grün)', \
                 '{\"ä\": \"ö\"}', '<ä/>', '''ö'':1', 'å')",
            )
            .await;
        let got = stage.settled().await;
        let after = json!({
            "id": 1, "t": "é", "ts": ["ü", "a b"], "m": "grün", "p": "(ß,grün)",
            "j": {"ä": "ö"}, "x": "<ä/>", "v": "'ö':1", "c": "å  ",
        });
        assert_eq!(got[0].json()["after"], after, "{settings}");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_generated_column_is_left_out_and_a_truncate_that_cascades_is_an_event_of_each_table() {
    let sql = "CREATE TABLE public.parent (id int PRIMARY KEY, a int, \
        twice int GENERATED ALWAYS AS (a * 2) STORED, b int); \
        CREATE TABLE public.child (id int PRIMARY KEY, parent int REFERENCES public.parent); \
        CREATE TABLE public.other (id int PRIMARY KEY, parent int REFERENCES public.parent)";
    for settings in MODES {
        let tables = ["public.parent", "public.child"];
        let stage = Stage::new(Setup { sql, tables: &tables, settings, ..Setup::default() }).await;
        let relay = stage.start().await;
        let mut statements = String::from("BEGIN; INSERT INTO parent (id, a, b) VALUES (1, 2, 3);");
        let _ = write!(statements, "INSERT INTO child VALUES (1, 1); COMMIT");
        stage.execute(&statements).await;
        stage.execute("TRUNCATE parent CASCADE").await;
        stage.execute("INSERT INTO parent (id, a, b) VALUES (1, 5, 6)").await;
        let got = stage.settled().await;
        let said: Vec<(String, String)> =
            got.iter().map(|m| (m.text("ws-source"), m.text("ws-op"))).collect();
        let of = |table: &str| -> Vec<&str> {
            let own = said.iter().filter(|(source, _)| source == &format!("public.{table}"));
            own.map(|(_, op)| &**op).collect()
        };
        assert_eq!(of("parent"), ["insert", "truncate", "insert"], "{settings}");
        assert_eq!(of("child"), ["insert", "truncate"], "{settings}");
        assert_eq!(said.len(), 5, "the table that nobody captures is left out");
        let after: Vec<Value> = got.iter().map(|m| m.json()["after"].clone()).collect();
        assert!(after.contains(&json!({"id": 1, "a": 2, "b": 3})), "{after:?}");
        relay.stop().await.expect_code(0);
    }
}
