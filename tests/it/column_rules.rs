//! Rules for columns between real servers: a hidden value is in no queue, parked row, log, page or
//! output, its key stays in order, and a new column waits until somebody agrees to it.

use serde_json::Value;

use crate::parking::{SMALL, parked, until_rows};
use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

pub const TABLE: &str =
    "CREATE TABLE customers (email text PRIMARY KEY, name text, ssn text, note text)";
const RULES: &str = "columns = { exclude = [\"ssn\"], mask = [\"name\"], hash = [\"email\"] }\n";

fn route(rules: &str) -> String {
    format!(
        "[[route]]\nname = \"customers\"\ntable = \"public.customers\"\nexchange = \"watership\"\n\
         {rules}"
    )
}

async fn stage(settings: &str, routes: &str) -> Stage {
    let tables = &["public.customers"];
    Stage::new(Setup { sql: TABLE, tables, settings, routes, ..Setup::default() }).await
}

/// The members of `after`, sorted.
fn members(message: &Message) -> Vec<String> {
    let after = message.json()["after"].clone();
    let mut names: Vec<String> =
        after.as_object().map(|row| row.keys().cloned().collect()).unwrap_or_default();
    names.sort();
    names
}

fn ops(messages: &[&Message]) -> Vec<String> {
    messages.iter().map(|message| message.text("ws-op")).collect()
}

/// Everything that people can see of it.
pub async fn seen(stage: &Stage, messages: &[Message], pages: &[String]) -> String {
    let tables = "SELECT coalesce((SELECT string_agg(p::text, ' ') FROM watership.parked AS p), \
        '') || coalesce((SELECT string_agg(h::text, ' ') FROM watership.schema_history AS h), '')";
    let mut all = vec![format!("{messages:?}"), stage.text(tables).await];
    all.extend(messages.iter().map(|message| String::from_utf8_lossy(&message.bytes).into_owned()));
    for arguments in [
        &["parked", "list"][..],
        &["parked", "--json", "list"],
        &["parked", "show", "1"],
        &["parked", "--json", "show", "1"],
        &["status"],
        &["check"],
        &["schema", "public.customers"],
        &["find", "--key", &messages[0].text("ws-key")],
        &["find", &messages[0].id()],
    ] {
        all.push(stage.run(arguments).await.log);
    }
    all.extend_from_slice(pages);
    all.join("\n")
}

pub fn not_seen(all: &str) {
    let lines: Vec<&str> = all.lines().filter(|line| line.contains("topsecret")).collect();
    assert!(lines.is_empty(), "it is seen in {lines:?}");
}

#[tokio::test]
async fn a_hidden_value_appears_nowhere_and_its_key_stays_in_order() {
    let settings = format!("{SMALL}\nlog.level = \"trace\"");
    let stage = stage(&settings, &route(RULES)).await;
    let relay = stage.start().await;
    stage
        .execute(
            "INSERT INTO customers \
             VALUES ('topsecret-mail', 'topsecret-name', 'topsecret-ssn', 'first'); \
             INSERT INTO customers \
             VALUES ('topsecret-other', 'topsecret-name', 'topsecret-ssn', 'first')",
        )
        .await;
    stage
        .execute("UPDATE customers SET note = repeat('x', 2000) WHERE email = 'topsecret-mail'")
        .await;
    stage.execute("UPDATE customers SET note = 'last' WHERE email = 'topsecret-mail'").await;
    let renamed = "UPDATE customers SET email = 'topsecret-new' WHERE email = 'topsecret-mail'";
    stage.execute(renamed).await;
    stage.execute("DELETE FROM customers WHERE email = 'topsecret-new'").await;
    stage.execute("UPDATE customers SET note = 'last' WHERE email = 'topsecret-other'").await;
    let follows = ["parked follows"; 3];
    until_rows(&stage, &[&["parked too_large"][..], &follows].concat()).await;
    let got = stage.settled().await;
    assert_eq!(got.len(), 3, "the other key flows");
    let body = got[0].json();
    assert_eq!((&body["after"]["name"], &body["after"]["note"]), (&"***".into(), &"first".into()));
    let hashed = body["after"]["email"].as_str().expect("a hash").to_owned();
    assert_eq!((hashed.len(), members(&got[0]).join(" ")), (64, "email name note".to_owned()));
    assert_eq!(got[0].text("ws-key"), format!("public.customers/{hashed}"));
    assert_eq!(&got[0].id()[14..15], "8", "its id is keyed");
    assert_eq!(got[0].text("ws-rules").len(), 16);
    let keyed = "NOT EXISTS (SELECT FROM watership.parked WHERE NOT lanes_keyed OR rules IS NULL)";
    assert!(stage.holds(keyed).await, "nobody can try which key gives a stored lane");

    let pages = [relay.get("/status").await.1, relay.get("/metrics").await.1];
    let mut all = seen(&stage, &got, &pages).await;
    all += &relay.stop().await.log;
    not_seen(&all);

    // Weaker rules do not unmask what was parked, and order per key is kept across them.
    let text = stage.configuration().replace("1KiB", "1MiB").replace(RULES, "");
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    parked(&stage, &["retry", "--all"]).await;
    let released = ["released follows"; 3];
    until_rows(&stage, &[&["released too_large"][..], &released].concat()).await;
    let got = stage.settled().await;
    let all = seen(&stage, &got, &[relay.get("/status").await.1]).await;
    not_seen(&all);
    let late: Vec<&Message> = got[3..].iter().collect();
    assert_eq!(ops(&late), ["update", "update", "update", "delete"]);
    assert_eq!(late[1].json()["after"]["note"], "last");
    assert!(late.iter().all(|message| members(message).join(" ") != "email name note ssn"));
    // What comes from now on is sent as it is.
    stage.execute("INSERT INTO customers VALUES ('open', 'name', 'ssn', 'note')").await;
    let got = stage.settled().await;
    assert_eq!(got.last().expect("it came").json()["after"]["ssn"], "ssn");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_new_column_is_left_out_until_somebody_agrees_to_it() {
    let rules = "columns = { mask = { name = \"hidden\" } }\n";
    let stage = stage("", &route(rules)).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO customers VALUES ('a', 'name', 'ssn', 'note')").await;
    stage.execute("ALTER TABLE customers ADD phone text").await;
    stage.execute("INSERT INTO customers VALUES ('b', 'name', 'ssn', 'note', 'topsecret')").await;
    stage.execute("UPDATE customers SET note = 'new' WHERE email = 'b'").await;
    let got = stage.settled().await;
    assert_eq!(got.len(), 3);
    for message in &got {
        assert_eq!(members(message), ["email", "name", "note", "ssn"]);
        assert_eq!(message.json()["after"]["name"], "hidden");
    }
    let left_out = "route \"customers\" leaves out new columns of public.customers: phone";
    stage.run(&["check"]).await.expect_code(0).expect_text(&[left_out]);
    let shown = stage.run(&["schema", "public.customers"]).await;
    shown.expect_code(0).expect_text(&["it leaves out phone", "column \"phone\" (text) is new"]);
    let sessions = relay.metric("watership_sessions_total").await.expect("a series");
    let accepted = stage.run(&["schema", "accept", "public.customers"]).await;
    accepted.expect_code(0).expect_text(&["sends now also phone"]);
    until("the running relay takes it over", async || {
        relay.metric("watership_sessions_total").await.is_some_and(|now| now > sessions)
            && relay.status().await["state"] == "streaming"
    })
    .await;
    stage.execute("INSERT INTO customers VALUES ('c', 'name', 'ssn', 'note', 'open')").await;
    let got = stage.settled().await;
    assert_eq!(got.last().expect("it came").json()["after"]["phone"], "open");
    let log = relay.stop().await.log;
    assert_eq!(log.matches("the route leaves out new columns").count(), 1, "{log}");
}

#[tokio::test]
async fn a_route_is_agreed_with_the_columns_that_its_table_has_when_it_is_new() {
    let stage = stage("", &route("")).await;
    let relay = stage.start().await;
    stage.execute("ALTER TABLE customers ADD phone text").await;
    stage.execute("INSERT INTO customers VALUES ('a', 'name', 'ssn', 'note', 'open')").await;
    assert_eq!(members(&stage.settled().await[0]).len(), 5, "a route without rules sends all");
    relay.stop().await.expect_code(0);
    let included = route("columns = { include = [\"email\", \"phone\"] }\n")
        .replace("customers\"\nt", "some\"\nt");
    let hiding =
        route("columns = { exclude = [\"ssn\"] }\n").replace("customers\"\nt", "most\"\nt");
    stage.append_to_configuration(&format!("\n{included}\n{hiding}"));
    let relay = stage.start().await;
    stage.execute("INSERT INTO customers VALUES ('b', 'name', 'ssn', 'note', 'open')").await;
    let got = stage.settled().await;
    let of = |route: &str| -> Vec<String> {
        let last = got.iter().rfind(|message| message.text("ws-route") == route);
        members(last.expect("it came"))
    };
    assert_eq!(of("some"), ["email", "phone"]);
    assert_eq!(of("most"), ["email", "name", "note", "phone"]);
    assert_eq!(of("customers").len(), 5);
    assert!(got.iter().all(|message| {
        message.header("ws-rules").is_some() != (message.text("ws-route") == "customers")
    }));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_rule_that_cannot_be_followed_is_refused_by_init_check_and_start() {
    let stage = stage("", &route("")).await;
    for (rules, text) in [
        (
            "columns = { mask = [\"mail\"] }\n",
            "columns.mask names column \"mail\", which table public.customers does not have",
        ),
        ("columns = { exclude = [\"email\"] }\n", "key column \"email\""),
        (
            "map = { rename = { note = \"ssn\" } }\n",
            "map makes the field \"ssn\", which is also a column",
        ),
    ] {
        let before = stage.configuration();
        let plain = "table = \"public.customers\"\n";
        stage.replace_configuration(&before.replacen(plain, &format!("{plain}{rules}"), 1));
        for command in ["init", "check", "run"] {
            stage.run(&[command]).await.expect_code(1).expect_text(&[text]);
        }
        stage.replace_configuration(&before);
    }
}

#[tokio::test]
async fn a_mapped_row_has_its_new_names_constants_and_defaults() {
    let rules = "map = { rename = { note = \"remark\" }, drop = [\"ssn\"], \
                 set = { source = \"shop\" }, default = { name = \"nobody\" } }\n";
    let stage = stage("", &route(rules)).await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO customers VALUES ('a', NULL, 'ssn', 'x')").await;
    stage.execute("DELETE FROM customers").await;
    let got = stage.settled().await;
    let expected: Value = serde_json::json!(
        { "email": "a", "name": "nobody", "remark": "x", "source": "shop" }
    );
    assert_eq!(got[0].json()["after"], expected);
    assert_eq!(got[1].json()["before"], serde_json::json!({ "email": "a" }));
    assert_eq!(got[1].json()["key"], serde_json::json!({ "email": "a" }));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn what_a_filter_drops_is_counted_and_a_row_that_leaves_it_is_told() {
    let rules = "filter = \"name in ('paid', 'sent') and op != 'truncate'\"\n";
    let orders = "[[route]]\nname = \"orders\"\noutbox = { aggregate_type = \"order\" }\n\
                  exchange = \"watership\"\nfilter = \"headers.tenant = 'a'\"\n";
    let stage = stage("", &format!("{}\n{orders}", route(rules))).await;
    stage.execute("ALTER TABLE customers REPLICA IDENTITY FULL").await;
    let relay = stage.start().await;
    stage.execute("INSERT INTO customers VALUES ('a', 'new'), ('b', 'paid')").await;
    stage.execute("UPDATE customers SET name = 'paid' WHERE email = 'a'").await;
    stage.execute("UPDATE customers SET name = 'void'").await;
    stage.execute("UPDATE customers SET note = 'later'").await;
    stage.execute("DELETE FROM customers").await;
    stage.execute("TRUNCATE customers").await;
    for tenant in ["a", "b"] {
        let headers = format!("'{{\"tenant\": \"{tenant}\"}}'");
        let emit = format!("SELECT watership.emit('order', '{tenant}', 'made', '1', {headers})");
        stage.execute(&emit).await;
    }
    let got = stage.settled().await;
    let of = |key: &str| -> Vec<String> {
        let of_key: Vec<&Message> = got.iter().filter(|m| m.text("ws-key") == key).collect();
        of_key.iter().map(|message| message.json()["after"]["name"].to_string()).collect()
    };
    assert_eq!(of("public.customers/a"), ["\"paid\"", "\"void\""]);
    assert_eq!(of("public.customers/b"), ["\"paid\"", "\"void\""]);
    assert_eq!(got.iter().filter(|m| m.text("ws-key") == "order/a").count(), 1);
    assert_eq!(got.len(), 5);
    let dropped = |route| format!("watership_events_dropped_total{{route=\"{route}\",owner=\"\"}}");
    assert_eq!(relay.metric(&dropped("customers")).await, Some(6.0));
    assert_eq!(relay.metric(&dropped("orders")).await, Some(1.0));
    assert!(stage.holds("NOT EXISTS (SELECT FROM watership.parked)").await);
    relay.stop().await.expect_code(0);
    let wrong = stage.configuration().replace("name in ('paid', 'sent')", "name in (1, 2)");
    stage.replace_configuration(&wrong);
    let text = "compares \"name\" (text) with a number; expected a text in single quotes";
    stage.run(&["check"]).await.expect_code(1).expect_text(&[text]);
    stage.run(&["run"]).await.expect_code(1).expect_text(&[text]);
    stage.replace_configuration(&wrong.replace("name in (1, 2)", "name in (1, 2"));
    let text = "expected \",\" or \")\" at character 15";
    stage.run(&["run"]).await.expect_code(2).expect_text(&[text]);
}
