//! A hidden column that takes the name of one that is sent: its values are seen nowhere, and a
//! column that has only lost its neighbour is sent as before.

use serde_json::Value;

use crate::column_rules::not_seen;
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};

const TABLE: &str = "CREATE TABLE people (id int PRIMARY KEY, note text, ssn text, name text)";

/// What is done to the table, where the hidden value is then, and which columns come afterwards.
const MOVES: &[(&str, &str, &str)] = &[
    (
        "ALTER TABLE people DROP COLUMN note; ALTER TABLE people RENAME ssn TO note",
        "note",
        "id name",
    ),
    (
        "ALTER TABLE people RENAME ssn TO x; ALTER TABLE people RENAME note TO ssn; \
         ALTER TABLE people RENAME x TO note",
        "note",
        "id name ssn",
    ),
    (
        "ALTER TABLE people DROP COLUMN note; ALTER TABLE people RENAME ssn TO note; \
         ALTER TABLE people ADD ssn text",
        "note",
        "id name ssn",
    ),
    ("ALTER TABLE people RENAME ssn TO x", "x", "id name note"),
    // The hidden column stands in the middle of the agreed ones, as before.
    (
        "ALTER TABLE people RENAME note TO old; ALTER TABLE people RENAME ssn TO note; \
         ALTER TABLE people ADD ssn text",
        "note",
        "id name ssn",
    ),
    // Nothing is hidden any more, and all else is known.
    ("ALTER TABLE people DROP COLUMN ssn", "", "id name note"),
];

fn members(message: &Message) -> String {
    let body = message.json();
    let mut names: Vec<&str> =
        body["after"].as_object().expect("a row").keys().map(String::as_str).collect();
    names.sort_unstable();
    names.join(" ")
}

async fn insert(stage: &Stage, id: u32, column: &str) {
    let sql = match column {
        "" => format!("INSERT INTO people (id, name) VALUES ({id}, 'open')"),
        _ => format!("INSERT INTO people (id, name, {column}) VALUES ({id}, 'open', 'topsecret')"),
    };
    stage.execute(&sql).await;
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_under_the_name_of_one_that_is() {
    for on_drift in ["pass", "park"] {
        for (change, column, expected) in MOVES {
            for runs in [true, false] {
                let routes = format!(
                    "[[route]]\nname = \"people\"\ntable = \"public.people\"\n\
                     exchange = \"watership\"\ncolumns = {{ mask = [\"ssn\"] }}\n\
                     on_drift = \"{on_drift}\"\n"
                );
                let (sql, tables) = (TABLE, &["public.people"]);
                let stage =
                    Stage::new(Setup { sql, tables, routes: &routes, ..Setup::default() }).await;
                let mut relay = stage.start().await;
                insert(&stage, 1, "ssn").await;
                stage.settled().await;
                if !runs {
                    relay.stop().await.expect_code(0);
                    insert(&stage, 2, "ssn").await;
                    stage.execute(change).await;
                    insert(&stage, 3, column).await;
                    relay = stage.start().await;
                } else {
                    insert(&stage, 2, "ssn").await;
                    stage.execute(change).await;
                    insert(&stage, 3, column).await;
                }
                stage.execute("UPDATE people SET name = 'later'").await;
                let got = stage.settled().await;
                let parked =
                    "SELECT coalesce(string_agg(p::text, ' '), '') FROM watership.parked p";
                let parked = stage.text(parked).await;
                let mut all = format!("{got:?} {parked}");
                let bodies = got.iter().map(|m| String::from_utf8_lossy(&m.bytes).into_owned());
                all.extend(bodies);
                all += &stage.run(&["parked", "--json", "list"]).await.log;
                all += &stage.run(&["schema", "public.people"]).await.log;
                all += &relay.get("/status").await.1;
                let log = relay.stop().await.log;
                not_seen(&(all + &log));
                if on_drift == "pass" {
                    assert_eq!(got.len(), 6, "{change}, runs: {runs}");
                    assert_eq!(parked, "");
                    for message in &got[2..] {
                        let name = &message.json()["after"]["name"];
                        assert!(name == "open" || name == "later", "{name}");
                        assert_eq!(members(message), *expected, "{change}, runs: {runs}\n{log}");
                    }
                }
                let first: Value = got[0].json();
                assert_eq!(first["after"]["ssn"], "***");
            }
        }
    }
}
