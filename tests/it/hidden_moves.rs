//! A hidden column that takes the name of one that is sent: its values are seen nowhere, and a
//! column that has only lost its neighbour is sent as before.

use serde_json::Value;

use crate::backfill::until_state;
use crate::column_rules::not_seen;
use crate::support::inbox::Message;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{LIMIT, until};

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

/// Rules that hide `ssn` of `LIKE_BEFORE`, whatever it is called.
const RULES: &[&str] = &[
    "mask = [\"ssn\"]",
    "hash = [\"ssn\"]",
    "exclude = [\"ssn\"]",
    "include = [\"id\", \"note\"]",
];
const LIKE_BEFORE: &str = "CREATE TABLE people (id int PRIMARY KEY, note text, ssn text)";
/// Names, types and order are the same afterwards.
const SWAP: &str = "ALTER TABLE people DROP COLUMN note; ALTER TABLE people RENAME ssn TO note; \
    ALTER TABLE people ADD ssn text";

fn route(rules: &str) -> String {
    format!(
        "[[route]]\nname = \"people\"\ntable = \"public.people\"\n\
         exchange = \"watership\"\ncolumns = {{ {rules} }}\n"
    )
}

async fn like_before(rules: &str, settings: &str) -> Stage {
    let (routes, tables) = (route(rules), &["public.people"]);
    let setup = Setup { sql: LIKE_BEFORE, tables, settings, routes: &routes, source_url: "" };
    Stage::new(setup).await
}

/// All that people see.
async fn shown(stage: &Stage, got: &[Message]) -> String {
    let parked = "SELECT coalesce(string_agg(p::text, ' '), '') FROM watership.parked p";
    let mut all = format!("{got:?} {}", stage.text(parked).await);
    all.extend(got.iter().map(|m| String::from_utf8_lossy(&m.bytes).into_owned()));
    all += &stage.run(&["parked", "--json", "list"]).await.log;
    all += &stage.run(&["schema", "public.people"]).await.log;
    all
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_when_the_table_looks_as_before() {
    for rules in RULES {
        let stage = like_before(rules, "").await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO people VALUES (1, 'open', 'topsecret')").await;
        assert_eq!(stage.settled().await[0].json()["after"]["note"], "open");
        stage.execute(SWAP).await;
        stage.execute("INSERT INTO people (id, note) VALUES (2, 'topsecret')").await;
        stage.execute("UPDATE people SET ssn = 'topsecret'").await;
        let got = stage.settled().await;
        assert_eq!(got.len(), 4, "{rules}");
        for message in &got[1..] {
            assert!(!members(message).contains("note"), "{rules}: {}", message.json());
            assert!(message.json()["after"]["id"].is_number(), "{rules}");
        }
        let mut all = shown(&stage, &got).await;
        all += &stage.run(&["check"]).await.log;
        stage.run(&["schema", "accept", "public.people"]).await.expect_code(0);
        all += &relay.get("/status").await.1;
        all += &relay.stop().await.log;
        not_seen(&all);
        // What has the name is sent when somebody has agreed to it.
        let relay = stage.start().await;
        stage.execute("INSERT INTO people VALUES (3, 'agreed')").await;
        assert_eq!(stage.settled().await[4].json()["after"]["note"], "agreed");
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_by_the_transaction_that_renames_it() {
    for rules in RULES {
        let stage = like_before(rules, "").await;
        let relay = stage.start().await;
        let swap = format!("{SWAP}; INSERT INTO people (id, note) VALUES (1, 'topsecret')");
        // It is the first thing of the table in the stream.
        stage.execute(&swap).await;
        stage.execute("INSERT INTO people (id, note) VALUES (2, 'topsecret')").await;
        let got = stage.settled().await;
        assert_eq!(got.len(), 2, "{rules}");
        let all = shown(&stage, &got).await;
        not_seen(&(all + &relay.stop().await.log));
    }
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_from_a_backlog_in_which_the_table_looked_as_before() {
    for rules in RULES {
        for later in ["", "ALTER TABLE people ADD more text", "ALTER TABLE people DROP ssn"] {
            let stage = like_before(rules, "").await;
            stage.start().await.stop().await.expect_code(0);
            stage.execute("INSERT INTO people VALUES (1, 'open', 'topsecret')").await;
            stage.execute(SWAP).await;
            stage.execute("INSERT INTO people (id, note) VALUES (2, 'topsecret')").await;
            stage.execute(later).await;
            stage.execute("INSERT INTO people (id, note) VALUES (3, 'topsecret')").await;
            if later.contains("DROP") {
                // The rule names what is gone.
                stage.execute("ALTER TABLE people ADD ssn text").await;
            }
            let relay = stage.start().await;
            let got = stage.settled().await;
            assert_eq!(got.len(), 3, "{rules}, {later}");
            let all = shown(&stage, &got).await;
            not_seen(&(all + &relay.stop().await.log));
        }
    }
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_by_a_backfill_of_a_table_that_looks_as_before() {
    for rules in RULES {
        let stage = like_before(rules, "").await;
        let relay = stage.start().await;
        stage.execute("INSERT INTO people VALUES (1, 'open', 'topsecret')").await;
        stage.settled().await;
        stage.execute(SWAP).await;
        let ran = stage.run(&["backfill", "public.people", "--detach"]).await.log;
        until_state(&stage, "public.people", "done").await;
        let got = stage.settled().await;
        assert!(got.len() >= 2, "{rules}: {ran}");
        let all = shown(&stage, &got).await;
        not_seen(&(all + &relay.stop().await.log));
    }
}

#[tokio::test]
async fn a_hidden_column_that_takes_the_name_of_the_key_is_not_sent() {
    // Of the second the stream shows less than the catalog needs to tell the columns apart.
    for change in [
        "ALTER TABLE people DROP CONSTRAINT people_pkey; ALTER TABLE people RENAME id TO old; \
         ALTER TABLE people RENAME ssn TO id; ALTER TABLE people ADD PRIMARY KEY (id)",
        "ALTER TABLE people DROP COLUMN id; ALTER TABLE people DROP COLUMN note; \
         ALTER TABLE people RENAME ssn TO id; ALTER TABLE people ADD ssn text; \
         ALTER TABLE people ADD PRIMARY KEY (id)",
    ] {
        for later in ["", "ALTER TABLE people ADD more text"] {
            for runs in [true, false] {
                let stage = like_before("mask = [\"ssn\"]", "log.level = \"trace\"").await;
                let mut relay = Some(stage.start().await);
                if !runs && let Some(relay) = relay.take() {
                    relay.stop().await.expect_code(0);
                }
                stage.execute(&format!("{change}; UPDATE people SET id = id")).await;
                stage.execute("ALTER TABLE people ALTER id SET NOT NULL").await;
                let write = "INSERT INTO people (id, note) VALUES ('topsecret', 'open')";
                let write = match change.contains("DROP COLUMN note") {
                    true => "INSERT INTO people (id) VALUES ('topsecret')",
                    false => {
                        &write.replace("(id, note)", "(old, id, note)").replace("('t", "(7, 't")
                    }
                };
                stage.execute(write).await;
                stage.execute(later).await;
                stage.execute("DELETE FROM people").await;
                let relay = match relay {
                    Some(relay) => relay,
                    None => stage.start().await,
                };
                let got = stage.settled().await;
                assert!(!got.is_empty(), "{change}");
                let mut all = shown(&stage, &got).await;
                all += &relay.get("/status").await.1;
                not_seen(&(all + &relay.stop().await.log));
            }
        }
    }
}

#[tokio::test]
async fn a_hidden_column_is_not_sent_by_a_transaction_that_waits_for_the_relay_to_be_seen() {
    let server = private_postgres(&[], None).await;
    let (routes, tables) = (route("mask = [\"ssn\"]"), &["public.people"]);
    let setup = Setup { sql: LIKE_BEFORE, tables, routes: &routes, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO people VALUES (1, 'open', 'topsecret')").await;
    stage.settled().await;
    stage.execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
    stage.execute("SELECT pg_reload_conf()").await;
    let chosen = "(SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync') = 1";
    until("the relay is a standby", async || stage.holds(chosen).await).await;
    // Nobody sees it before the relay has settled it.
    let sql = format!("{SWAP}; INSERT INTO people (id, note) VALUES (2, 'topsecret')");
    tokio::time::timeout(LIMIT, stage.execute(&sql)).await.expect("the commit ends");
    until("the next session knows the columns", async || {
        relay.metric("watership_sessions_total").await > Some(1.0)
            && relay.status().await["state"] == "streaming"
    })
    .await;
    let sql = "INSERT INTO people (id, note) VALUES (3, 'topsecret')";
    tokio::time::timeout(LIMIT, stage.execute(sql)).await.expect("the commit ends");
    let got = stage.settled().await;
    assert_eq!(got.len(), 3);
    assert_eq!(got[2].json()["after"]["id"], 3);
    let mut all = shown(&stage, &got).await;
    let log = relay.stop().await.log;
    assert!(log.contains("columns that may need hiding are left out"), "{log}");
    all += &log;
    not_seen(&all);
}

#[tokio::test]
async fn a_hidden_column_that_was_seen_under_another_name_is_not_sent_after_it_has_its_own_again() {
    for rules in ["mask = [\"ssn\"]", "hash = [\"ssn\"]", "exclude = [\"ssn\"]"] {
        let routes = format!(
            "[[route]]\nname = \"people\"\ntable = \"public.people\"\n\
             exchange = \"watership\"\ncolumns = {{ {rules} }}\n"
        );
        let (sql, tables) = (TABLE, &["public.people"]);
        let stage = Stage::new(Setup { sql, tables, routes: &routes, ..Setup::default() }).await;
        let relay = stage.start().await;
        insert(&stage, 1, "ssn").await;
        let changes = "ALTER TABLE people DROP COLUMN note; ALTER TABLE people RENAME name TO old; \
            ALTER TABLE people RENAME ssn TO name; ALTER TABLE people ADD more text";
        stage.execute(changes).await;
        let secret = |id: u32| format!("INSERT INTO people (id, name) VALUES ({id}, 'topsecret')");
        stage.execute(&secret(2)).await;
        stage.settled().await;
        relay.stop().await.expect_code(0);
        // In the backlog it has the name that is not hidden, in the catalog its own.
        stage.execute(&secret(3)).await;
        stage.execute("ALTER TABLE people RENAME name TO ssn").await;
        let relay = stage.start().await;
        let got = stage.settled().await;
        let last = String::from_utf8_lossy(&got[2].bytes).into_owned();
        not_seen(&format!("{got:?} {last}"));
        assert_eq!(got.len(), 3, "{rules}");
        not_seen(&relay.stop().await.log);
    }
}
