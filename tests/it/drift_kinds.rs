//! Every kind of change of a captured table, in the middle of a transaction and of a stream, under
//! each policy, on a route that hides a column: nothing is lost, nothing overtakes within a key,
//! and what is hidden is seen nowhere.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::column_rules::not_seen;
use crate::parking::{parked, rows};
use crate::support::inbox::Message;
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const TABLE: &str = "CREATE SCHEMA other; \
    CREATE TABLE items (id int PRIMARY KEY, code text NOT NULL UNIQUE, size int, note text, \
        n int, secret text)";

/// A kind of change.
#[derive(Default)]
pub struct Case {
    /// Before `init`.
    identity: &'static str,
    change: &'static str,
    /// How it is told; of one that breaks no promise it is told, too.
    told: &'static str,
    breaks: bool,
    /// No update and no delete is possible afterwards.
    inserts_only: bool,
    /// The name of the table afterwards, where it is another.
    name: &'static str,
}

const FULL: &str = "ALTER TABLE items REPLICA IDENTITY FULL";
const OTHER_KEY: &str =
    "ALTER TABLE items DROP CONSTRAINT items_pkey, ADD CONSTRAINT by_code PRIMARY KEY (code)";
const PLAIN: Case =
    Case { identity: "", change: "", told: "", breaks: true, inserts_only: false, name: "" };

/// Those after which the table is where it was.
const STAYS: &[Case] = &[
    Case {
        change: "ALTER TABLE items DROP COLUMN note",
        told: "column \"note\" (text) is gone",
        ..PLAIN
    },
    Case {
        change: "ALTER TABLE items RENAME COLUMN note TO remark",
        told: "column \"note\" (text) is gone",
        ..PLAIN
    },
    Case {
        change: "ALTER TABLE items ALTER COLUMN size TYPE bigint",
        told: "column \"size\" was integer and is bigint",
        breaks: false,
        ..PLAIN
    },
    Case {
        identity: FULL,
        change: "ALTER TABLE items ALTER COLUMN size TYPE text",
        told: "column \"size\" was integer and is text",
        ..PLAIN
    },
    Case { change: OTHER_KEY, told: "the key was (id) and is (code)", ..PLAIN },
    Case {
        identity: FULL,
        change: "ALTER TABLE items REPLICA IDENTITY DEFAULT",
        told: "the replica identity was all columns and is (id)",
        ..PLAIN
    },
];

async fn stage(case: &Case, on_drift: &str) -> Stage {
    let routes = format!(
        "[[route]]\nname = \"items\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
         columns = {{ mask = [\"secret\"] }}\non_drift = \"{on_drift}\"\n"
    );
    let sql = format!("{TABLE}; {}", case.identity);
    let settings = "log.level = \"debug\"";
    let setup = Setup {
        sql: &sql,
        tables: &["public.items"],
        settings,
        routes: &routes,
        ..Setup::default()
    };
    Stage::new(setup).await
}

fn row(id: u32, n: u32) -> String {
    format!("INSERT INTO items (id, code, n, secret) VALUES ({id}, 'k{id}', {n}, 'topsecret{id}');")
}

const UPDATE: &str = "UPDATE items SET n = n + 1, secret = 'topsecret' || n;";

async fn two_rows(stage: &Stage) {
    stage.execute(&(row(1, 1) + &row(2, 1))).await;
    assert_eq!(stage.settled().await.len(), 2);
}

/// Writes before the change, around it in one transaction, and after it.
async fn writes(stage: &Stage, case: &Case) {
    stage.execute(UPDATE).await;
    let update = if case.inserts_only { "" } else { UPDATE };
    let name = if case.name.is_empty() { "items" } else { case.name };
    let after = |text: &str| text.replace(" items", &format!(" {name}"));
    let change = case.change;
    stage.execute(&format!("BEGIN; {UPDATE} {change}; {} COMMIT", after(update))).await;
    stage.execute(&after(update)).await;
    if !case.inserts_only {
        stage.execute(&after("DELETE FROM items WHERE id = 2")).await;
    }
    stage.execute(&after(&row(3, 1))).await;
    stage.execute(&after(update)).await;
}

/// Operations and `n`, in the order of arrival, by row.
fn by_row(messages: &[Message]) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for message in messages {
        let body = message.json();
        let id = [&body["after"], &body["before"], &body["key"]].map(|part| part["id"].clone());
        let id = id.into_iter().find(|id| !id.is_null());
        let id = match id {
            Some(id) => id.to_string(),
            None => body["key"]["code"].as_str().expect("a key").trim_matches('k').to_owned(),
        };
        let n = match &body["after"]["n"] {
            Value::Null => String::new(),
            n => format!(" {n}"),
        };
        all.entry(id).or_default().push(format!("{}{n}", message.text("ws-op")));
    }
    all
}

/// Everything that was committed came once, and in the order of its row.
fn is_complete(case: &Case, messages: &[Message]) {
    let updates = |most: u32| (2..=most).map(|n| format!("update {n}"));
    let row = |most: u32, last: Option<&str>| -> Vec<String> {
        ["insert 1".to_owned()]
            .into_iter()
            .chain(updates(most))
            .chain(last.map(str::to_owned))
            .collect()
    };
    let expected = match case.inserts_only {
        true => [("1", row(3, None)), ("2", row(3, None)), ("3", row(1, None))],
        false => [("1", row(6, None)), ("2", row(5, Some("delete"))), ("3", row(2, None))],
    };
    let expected: BTreeMap<String, Vec<String>> =
        expected.map(|(id, steps)| (id.to_owned(), steps)).into();
    assert_eq!(by_row(messages), expected, "{}", case.change);
}

/// Of what came before the change: two inserts, and two updates of each.
const BEFORE: usize = 6;

/// What is hidden is nowhere.
async fn nothing_is_seen(stage: &Stage, messages: &[Message], logs: &[&str]) {
    let tables = "SELECT coalesce((SELECT string_agg(p::text, ' ') FROM watership.parked AS p), \
        '') || coalesce((SELECT string_agg(h::text, ' ') FROM watership.schema_history AS h), '')";
    let mut all = vec![format!("{messages:?}"), stage.text(tables).await];
    all.extend(messages.iter().map(|message| String::from_utf8_lossy(&message.bytes).into_owned()));
    for arguments in
        [&["parked", "--json", "show", "1"][..], &["parked", "list"], &["status"], &["check"]]
    {
        all.push(stage.run(arguments).await.log);
    }
    all.extend(logs.iter().map(|log| (*log).to_owned()));
    not_seen(&all.join("\n"));
}

async fn is_recorded(stage: &Stage, case: &Case) {
    let broken = if case.breaks { "{items}" } else { "{}" };
    let recorded = format!(
        "(SELECT count(*) = 1 AND bool_and(changes @> ARRAY['{}'] AND broken = '{broken}') \
         FROM watership.schema_history WHERE kind = 'changed')",
        case.told
    );
    assert!(stage.holds(&recorded).await, "{}", stage.run(&["schema", "public.items"]).await.log);
}

async fn until_released(stage: &Stage) {
    parked(stage, &["retry", "--all"]).await;
    until("all are released", async || {
        rows(stage).await.iter().all(|row| row.starts_with("released "))
    })
    .await;
}

/// What was parked can be retried at once: `accept` waits for the running relay.
async fn accept(stage: &Stage) {
    let accepted = stage.run(&["schema", "accept", "public.items"]).await;
    accepted.expect_code(0).expect_text(&["The running relay now uses the agreement"]);
}

async fn until_another_session(relay: &Running, before: f64) {
    until("the next session streams", async || {
        relay.metric("watership_sessions_total").await.is_some_and(|now| now > before)
            && relay.status().await["state"] == "streaming"
    })
    .await;
}

#[tokio::test]
async fn with_pass_each_kind_of_change_is_passed_by_everything_in_order() {
    for case in STAYS {
        // While it runs, and as a backlog.
        for runs in [true, false] {
            let stage = stage(case, "pass").await;
            let relay = stage.start().await;
            two_rows(&stage).await;
            let relay = if runs {
                writes(&stage, case).await;
                relay
            } else {
                relay.stop().await.expect_code(0);
                writes(&stage, case).await;
                stage.start().await
            };
            let got = stage.settled().await;
            is_complete(case, &got);
            is_recorded(&stage, case).await;
            assert_eq!(rows(&stage).await, [""; 0], "{}", case.change);
            let log = relay.stop().await.log;
            nothing_is_seen(&stage, &got, &[&log]).await;
        }
    }
}

#[tokio::test]
async fn with_park_all_after_each_kind_of_change_waits_and_comes_in_order() {
    for case in STAYS {
        let stage = stage(case, "park").await;
        let relay = stage.start().await;
        two_rows(&stage).await;
        writes(&stage, case).await;
        let got = stage.settled().await;
        is_recorded(&stage, case).await;
        if case.breaks {
            assert_eq!(got.len(), BEFORE, "{}", case.change);
            let kinds = rows(&stage).await;
            assert!(kinds.iter().all(|kind| kind == "parked drift"), "{kinds:?}");
            nothing_is_seen(&stage, &got, &[]).await;
            accept(&stage).await;
            until_released(&stage).await;
        }
        let got = stage.settled().await;
        is_complete(case, &got);
        let log = relay.stop().await.log;
        nothing_is_seen(&stage, &got, &[&log]).await;
    }
}

#[tokio::test]
async fn with_stop_each_kind_of_change_is_waited_at_and_nothing_is_lost() {
    for case in STAYS {
        let stage = stage(case, "stop").await;
        let relay = stage.start().await;
        two_rows(&stage).await;
        writes(&stage, case).await;
        let mut logs = Vec::new();
        let relay = if case.breaks {
            let ended = relay.ended().await;
            ended.expect_code(3).expect_text(&["schema_drift", case.told]);
            logs.push(ended.log);
            let ended = stage.spawn().ended().await;
            ended.expect_code(3).expect_text(&["schema_drift", case.told]);
            logs.push(ended.log);
            let got = stage.settled_now().await;
            assert_eq!(got.len(), BEFORE, "{}", case.change);
            stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
            stage.start().await
        } else {
            relay
        };
        let got = stage.settled().await;
        is_complete(case, &got);
        is_recorded(&stage, case).await;
        logs.push(relay.stop().await.log);
        nothing_is_seen(&stage, &got, &logs.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
}

/// With all columns in the identity, the stream does not show that the key is another: the relay
/// sees it when it looks at the catalog.
const HIDDEN_KEY: Case =
    Case { identity: FULL, change: OTHER_KEY, told: "the key was (id) and is (code)", ..PLAIN };

/// Agrees to the changed table as the policy demands it; returns the relay that runs afterwards.
async fn agreed(stage: &Stage, relay: Running, on_drift: &str, case: &Case) -> Running {
    match on_drift {
        "stop" => {
            relay.ended().await.expect_code(3).expect_text(&["schema_drift", case.told]);
            stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
            stage.start().await
        }
        "park" => {
            accept(stage).await;
            until_released(stage).await;
            relay
        }
        _ => relay,
    }
}

#[tokio::test]
async fn another_key_that_the_stream_does_not_show_is_followed_from_where_it_is_seen() {
    let case = HIDDEN_KEY;
    for on_drift in ["pass", "park", "stop"] {
        let stage = stage(&case, on_drift).await;
        let relay = stage.start().await;
        two_rows(&stage).await;
        stage.execute(&format!("{UPDATE} {UPDATE}")).await;
        assert_eq!(stage.settled().await.len(), BEFORE);
        let sessions = relay.metric("watership_sessions_total").await.expect("a series");
        stage.execute(case.change).await;
        until_another_session(&relay, sessions).await;
        stage.execute(&format!("{UPDATE} {UPDATE} {UPDATE}")).await;
        stage.execute("DELETE FROM items WHERE id = 2").await;
        stage.execute(&format!("{} UPDATE items SET n = n + 1", row(3, 1))).await;
        if on_drift == "park" {
            assert_eq!(stage.settled().await.len(), BEFORE);
        }
        let relay = agreed(&stage, relay, on_drift, &case).await;
        let rows = by_row(&stage.settled().await);
        assert_eq!(rows["2"].last().map(String::as_str), Some("delete"));
        let updates: Vec<String> = (2..=7).map(|n| format!("update {n}")).collect();
        assert_eq!(rows["1"], [&["insert 1".to_owned()][..], &updates].concat(), "{on_drift}");
        assert_eq!(rows["3"], ["insert 1", "update 2"]);
        is_recorded(&stage, &case).await;
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn another_key_in_a_backlog_that_does_not_show_it_counts_from_the_start_of_the_relay() {
    let case = HIDDEN_KEY;
    for on_drift in ["pass", "park", "stop"] {
        let stage = stage(&case, on_drift).await;
        let relay = stage.start().await;
        two_rows(&stage).await;
        relay.stop().await.expect_code(0);
        stage.execute(case.change).await;
        stage.execute(&row(3, 1)).await;
        let relay = stage.start().await;
        stage.inbox.count(3).await;
        stage.execute(&row(4, 1)).await;
        if on_drift == "park" {
            until("it is parked", async || rows(&stage).await == ["parked drift"]).await;
        }
        let relay = agreed(&stage, relay, on_drift, &case).await;
        stage.execute(&row(5, 1)).await;
        let got = stage.settled().await;
        let keys: Vec<String> = got.iter().map(|message| message.text("ws-key")).collect();
        let expected = ["1", "2", "3", "k4", "k5"].map(|key| format!("public.items/{key}"));
        assert_eq!(keys, expected, "{on_drift}");
        relay.stop().await.expect_code(0);
    }
}

/// Those after which the configuration must name another table.
const MOVES: &[Case] = &[
    Case {
        change: "ALTER TABLE items RENAME TO goods",
        told: "public.items is public.goods now",
        name: "goods",
        ..PLAIN
    },
    Case {
        change: "ALTER TABLE items SET SCHEMA other",
        told: "public.items is other.items now",
        name: "other.items",
        ..PLAIN
    },
];

#[tokio::test]
async fn a_table_that_moves_goes_on_under_its_new_name_with_nothing_lost() {
    for case in MOVES {
        for on_drift in ["pass", "park", "stop"] {
            let stage = stage(case, on_drift).await;
            let relay = stage.start().await;
            two_rows(&stage).await;
            writes(&stage, case).await;
            let ended = relay.ended().await;
            ended.expect_code(3);
            let told = ended.log.contains("table_removed") || ended.log.contains("schema_drift");
            assert!(told, "{}", ended.log);
            let name = if case.name == "goods" { "public.goods" } else { case.name };
            let text = stage.configuration().replace("\"public.items\"", &format!("\"{name}\""));
            stage.replace_configuration(&text);
            let relay = stage.start().await;
            until_released(&stage).await;
            let got = stage.settled().await;
            is_complete(case, &got);
            let log = relay.stop().await.log;
            nothing_is_seen(&stage, &got, &[&ended.log, &log]).await;
        }
    }
}

/// From Postgres' own key to nothing: only inserts are possible afterwards.
const NOTHING: Case = Case {
    change: "ALTER TABLE items REPLICA IDENTITY NOTHING",
    told: "the replica identity was (id) and is nothing",
    inserts_only: true,
    ..PLAIN
};

#[tokio::test]
async fn an_identity_of_nothing_loses_nothing_whatever_the_policy() {
    let case = &NOTHING;
    for on_drift in ["pass", "park", "stop"] {
        let stage = stage(case, on_drift).await;
        let relay = stage.start().await;
        two_rows(&stage).await;
        writes(&stage, case).await;
        let relay = match on_drift {
            "stop" => {
                let ended = relay.ended().await;
                ended.expect_code(3).expect_text(&["schema_drift", case.told]);
                stage.run(&["schema", "accept", "public.items"]).await.expect_code(0);
                stage.start().await
            }
            "park" => {
                assert_eq!(stage.settled().await.len(), BEFORE);
                accept(&stage).await;
                until_released(&stage).await;
                relay
            }
            _ => relay,
        };
        let got = stage.settled().await;
        is_complete(case, &got);
        is_recorded(&stage, case).await;
        let log = relay.stop().await.log;
        nothing_is_seen(&stage, &got, &[&log]).await;
    }
}
