//! `watership inbox`: what an operator of a consumer does.

use std::process::Stdio;

use serde_json::Value;
use tokio::process::Command;
use tokio_postgres::Client;
use watership::dev;

use crate::support::servers::{Database, own_database, own_vhost, rabbit};
use crate::support::waiting::LIMIT;

/// Runs the command, which must end with `code`, and returns stdout and stderr.
pub async fn inbox(arguments: &[&str], code: i32) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
    command.arg("inbox").args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output()).await;
    let output = output.expect("the command ends").expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{out}\n{err}");
    (out, err)
}

pub async fn installed() -> (Database, Client) {
    let database = own_database().await;
    inbox(&["install", "--url", &database.url], 0).await;
    let client = database.connect().await;
    (database, client)
}

async fn receive(client: &Client, id: &str, days_ago: i32, key: &str) -> String {
    let sql = "SELECT watership_inbox.receive('billing', $1, now() - make_interval(days => $2), \
               $3, '\\x7b7d', '{\"type\": \"x\"}')";
    client.query_one(sql, &[&id, &days_ago, &key]).await.expect("receive").get(0)
}

pub async fn park(client: &Client, consumer: &str, id: &str, key: &str) {
    let sql = "SELECT watership_inbox.park($1, $2, now(), $3, 'failed', 'no such account', \
               '\\x7b7d', '{}')";
    let parked: bool = client.query_one(sql, &[&consumer, &id, &key]).await.expect("park").get(0);
    assert!(parked);
}

#[tokio::test]
async fn the_inbox_is_installed_once_and_printed_for_psql() {
    let database = own_database().await;
    let (_, error) = inbox(&["status", "--url", &database.url], 1).await;
    assert!(error.contains("has no inbox") && error.contains("inbox install"), "{error}");
    let (script, _) = inbox(&["install", "--url", &database.url, "--print-sql"], 0).await;
    let client = database.connect().await;
    client.batch_execute(&script).await.expect("the printed script runs");
    let (out, _) = inbox(&["install", "--url", &database.url], 0).await;
    assert!(out.starts_with("exists"), "{out}");
    let checked = "SELECT count(*) FROM watership_inbox.migration WHERE checksum IS NOT NULL";
    let files: i64 = client.query_one(checked, &[]).await.expect("the migrations").get(0);
    assert_eq!(files, 5);
    let (out, _) = inbox(&["status", "--url", &database.url], 0).await;
    assert!(out.contains("7 days"), "{out}");
}

#[tokio::test]
async fn an_inbox_and_an_outbox_live_in_one_database() {
    let (database, mut client) = installed().await;
    watership::pg::migrate::OUTBOX.apply(&mut client).await.expect("the outbox");
    inbox(&["install", "--url", &database.url], 0).await;
    assert_eq!(receive(&client, "m1", 0, "k").await, "handle");
}

#[tokio::test]
async fn claims_fail_soon_is_a_problem_of_status() {
    let (database, client) = installed().await;
    assert_eq!(receive(&client, "m1", 0, "k").await, "handle");
    // As after weeks without maintenance.
    let past = "UPDATE watership_inbox.ring SET first_day = first_day - 31, \
                emptied_before = emptied_before - 31";
    client.batch_execute(past).await.expect("weeks pass");
    let (out, _) = inbox(&["status", "--url", &database.url], 1).await;
    assert!(out.contains("problem") && out.contains("inbox maintain"), "{out}");
    let (out, _) = inbox(&["maintain", "--url", &database.url], 0).await;
    assert!(out.contains("beyond the window"), "{out}");
    inbox(&["maintain", "--url", &database.url], 0).await;
    inbox(&["status", "--url", &database.url], 0).await;
}

/// What `inbox parked` prints as JSON.
async fn parked(url: &str, arguments: &[&str]) -> Value {
    let all = [&["--json", "parked", "--url", url], arguments].concat();
    serde_json::from_str(&inbox(&all, 0).await.0).expect("JSON")
}

#[tokio::test]
async fn an_operator_retries_and_discards_what_a_consumer_parked() {
    let (database, client) = installed().await;
    let url = &*database.url;
    park(&client, "billing", "m1", "order/1").await;
    assert_eq!(receive(&client, "m2", 0, "order/1").await, "parked");
    assert_eq!(receive(&client, "old", 30, "order/2").await, "parked");
    park(&client, "billing", "m3", "order/3").await;

    let list = parked(url, &["list"]).await;
    let keys: Vec<_> = list.as_array().expect("a list").iter().map(|row| &row["key"]).collect();
    assert_eq!(keys, ["order/1", "order/2", "order/3"]);
    assert_eq!((&list[0]["reason"], &list[0]["waiting"]), (&"failed".into(), &2.into()));
    assert_eq!(list[1]["reason"], "beyond_window");

    let shown = parked(url, &["show", "--consumer", "billing", "m1"]).await;
    assert_eq!((&shown["error"], &shown["body"]), (&"no such account".into(), &"{}".into()));

    let retry = parked(url, &["retry", "--consumer", "billing", "--all"]).await;
    assert_eq!((&retry["keys"], &retry["beyond_window"]), (&2.into(), &1.into()));
    let retry = parked(url, &["retry", "--consumer", "billing", "old", "--beyond-window"]).await;
    assert_eq!(retry["keys"], 1);
    let marked = "SELECT count(*) FROM watership_inbox.parked_keys WHERE retry_at IS NOT NULL";
    let marked: i64 = client.query_one(marked, &[]).await.expect("the keys").get(0);
    assert_eq!(marked, 3);

    let gone = parked(url, &["discard", "--consumer", "billing", "m1", "--reason", "a test"]).await;
    assert_eq!(gone["messages"], 1);
    let gone =
        parked(url, &["discard", "--consumer", "billing", "--key", "order/3", "--reason", "x"]);
    assert_eq!(gone.await["messages"], 1);
    let list = parked(url, &["list"]).await;
    let keys: Vec<_> = list.as_array().expect("a list").iter().map(|row| &row["key"]).collect();
    assert_eq!(keys, ["order/1", "order/2"], "what was behind the discarded one stays");
    assert_eq!(receive(&client, "m1", 0, "order/1").await, "duplicate", "discarded is handled");
    let none = ["parked", "--url", url, "retry", "--consumer", "billing", "--key", "order/9"];
    let (_, error) = inbox(&none, 1).await;
    assert!(error.contains("no such parked message"), "{error}");
}

#[tokio::test]
async fn a_consumer_that_is_unknown_and_a_reason_that_is_empty_are_refused_and_change_nothing() {
    let (database, client) = installed().await;
    let url = &*database.url;
    let parked = ["parked", "--url", url];
    let all = ["--consumer", "biling", "--all"];
    let (_, error) = inbox(&[&parked[..], &["retry"], &all].concat(), 1).await;
    assert!(error.contains("no consumer \"biling\"") && error.contains("started yet"), "{error}");
    park(&client, "billing", "m1", "order/1").await;
    park(&client, "stock", "m1", "order/1").await;
    let reason = ["--reason", "why"];
    let show = ["show", "--consumer", "biling", "m1"];
    for command in
        [&[&["retry"][..], &all].concat()[..], &[&["discard"][..], &all, &reason].concat(), &show]
    {
        let (_, error) = inbox(&[&parked[..], command].concat(), 1).await;
        assert!(error.contains("\"biling\"") && error.contains("billing, stock"), "{error}");
    }
    let empty = ["discard", "--consumer", "billing", "--all", "--reason", ""];
    let (_, error) = inbox(&[&parked[..], &empty].concat(), 2).await;
    assert!(error.contains("--reason"), "{error}");
    let names = "SELECT string_agg(name, ' ' ORDER BY name) FROM watership_inbox.consumer";
    let names: String = client.query_one(names, &[]).await.expect("the consumers").get(0);
    assert_eq!(names, "billing stock");
}

#[tokio::test]
async fn what_was_handled_is_seen_with_its_day_or_without_a_time() {
    let (_database, client) = installed().await;
    assert_eq!(receive(&client, "timed", 1, "k").await, "handle");
    let claim = "SELECT watership_inbox.claim('billing', 'untimed')";
    client.execute(claim, &[]).await.expect("claimed");
    // While a generation opens, a claim is in both.
    let opening = "UPDATE watership_inbox.generation SET opening = true";
    client.batch_execute(opening).await.expect("a generation opens");
    client.execute(&claim.replace("untimed", "twice"), &[]).await.expect("claimed");
    let seen = "SELECT string_agg(message_id || ' ' || coalesce(day::text, 'none'), ', ' \
                ORDER BY message_id) FROM watership_inbox.seen WHERE consumer = 'billing'";
    let seen: String = client.query_one(seen, &[]).await.expect("the view").get(0);
    let day = "SELECT ((now() - interval '1 day') AT TIME ZONE 'UTC')::date::text";
    let day: String = client.query_one(day, &[]).await.expect("a day").get(0);
    assert_eq!(seen, format!("timed {day}, twice none, untimed none"));
}

#[tokio::test]
async fn check_says_what_can_come_after_the_window() {
    let (inbox_database, _client) = installed().await;
    let (database, vhost) = (own_database().await, own_vhost().await);
    let (_connection, channel) = vhost.connect().await;
    let mut arguments = lapin::types::FieldTable::default();
    arguments.insert("x-message-ttl".into(), lapin::types::AMQPValue::LongInt(864_000_000));
    let durable = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("slow".into(), durable, arguments).await.expect("a queue");
    let management = rabbit().await.management_url().expect("a management URL");
    let text = format!(
        "source.url = \"{}\"\nsource.slot = \"slot_{}\"\nbroker.url = \"{}\"\n\
         broker.management_url = \"{management}\"\nadmin.listen = \"\"\n\
         broker.topology = \"verify\"\n",
        database.url, database.name, vhost.url
    );
    let exchange = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let topic = lapin::ExchangeKind::Topic;
    let declared =
        channel.exchange_declare("watership".into(), topic, exchange, Default::default());
    declared.await.expect("an exchange");
    let bound = channel.queue_bind(
        "slow".into(),
        "watership".into(),
        "#".into(),
        Default::default(),
        Default::default(),
    );
    bound.await.expect("a binding");
    let mut admin = database.connect().await;
    watership::pg::migrate::OUTBOX.apply(&mut admin).await.expect("the outbox");
    let row = "INSERT INTO watership.parked (name, epoch, mark, ordinal, sub, route, state, kind, \
               error, event_id, source, key, committed_at, lanes, barrier, event, size) \
               VALUES ('watership', 1, 1, 1, 0, 'r', 'parked', 'x', 'x', gen_random_uuid(), 's', \
               'k', now() - interval '9 days', '{1}', false, '{}', 1)";
    admin.batch_execute(row).await.expect("a parked row");

    let path = dev::home().expect("a directory").join("inbox-check.toml");
    std::fs::write(&path, text).expect("the file");
    let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
    command.arg("--config").arg(&path).args(["check", "--inbox-url", &inbox_database.url]);
    let output = command.stdin(Stdio::null()).output().await.expect("the program runs");
    let out = String::from_utf8_lossy(&output.stdout);
    let says = |text: &str| assert!(out.contains(text), "{text}\n{out}");
    says("messages are remembered for 7 days");
    says("the relay has a parked row from 9 days ago; the window is 7 days");
    says("queue \"slow\" keeps messages for 10 days; the window is 7 days");
}
