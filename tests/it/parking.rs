//! What cannot be published is parked, in the order of its key, and comes out again in that order:
//! the real program on real servers.

use std::collections::HashMap;

use serde_json::{Value, json};
use watership::dev::{Rabbit, RabbitOptions};

use crate::support::inbox::{Message, kinds, of_key};
use crate::support::servers::{Vhost, own_database};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

pub const SMALL: &str = "broker.max_message_size = \"1KiB\"\nrelay.checkpoint_interval = \"20ms\"";

pub async fn emit(stage: &Stage, kind: &str, key: &str, event: &str) {
    stage.execute(&format!("SELECT watership.emit('{kind}', '{key}', '{event}', '1')")).await;
}

pub async fn emit_large(stage: &Stage, kind: &str, key: &str, event: &str) {
    let payload = "to_json(repeat('x', 2000))";
    stage.execute(&format!("SELECT watership.emit('{kind}', '{key}', '{event}', {payload})")).await;
}

/// The rows of `watership.parked`, as `state kind` in the order of their positions.
pub async fn rows(stage: &Stage) -> Vec<String> {
    let sql = "SELECT state || ' ' || kind FROM watership.parked \
        ORDER BY epoch, mark, ordinal, sub, route";
    let rows = stage.sql.query(sql, &[]).await.expect("the table is there");
    rows.iter().map(|row| row.get(0)).collect()
}

pub async fn until_rows(stage: &Stage, expected: &[&str]) {
    until(&format!("parked rows are {expected:?}"), async || rows(stage).await == expected).await;
}

pub async fn parked(stage: &Stage, arguments: &[&str]) -> Value {
    let all: Vec<&str> = ["parked", "--json"].iter().chain(arguments).copied().collect();
    let ended = stage.run(&all).await;
    ended.expect_code(0);
    // A warning about the configuration file may stand before it.
    let json = |line: &&str| !line.starts_with("warning: ");
    let text: Vec<&str> = ended.log.lines().filter(json).collect();
    serde_json::from_str(&text.join("\n")).unwrap_or_else(|e| panic!("{e}: {}", ended.log))
}

/// The `type`s of the messages of one key, as they came.
async fn metric(relay: &Running, series: &str) -> f64 {
    relay.metric(series).await.unwrap_or_else(|| panic!("no series {series}"))
}

#[tokio::test]
async fn a_message_that_is_too_large_is_parked_and_its_key_follows_while_others_flow() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit(&stage, "order", "1", "before").await;
    emit_large(&stage, "order", "1", "large").await;
    emit(&stage, "order", "1", "after").await;
    emit(&stage, "order", "2", "other").await;
    until_rows(&stage, &["parked too_large", "parked follows"]).await;
    assert_eq!(kinds(&stage.settled().await), ["before", "other"], "and the slot has passed them");
    let passed = format!(
        "(SELECT max(mark) FROM watership.parked) < (SELECT confirmed_flush_lsn - '0/0' \
         FROM pg_replication_slots WHERE slot_name = '{}')",
        stage.slot
    );
    until("the slot passes the parked rows", async || stage.holds(&passed).await).await;

    let status = relay.status().await;
    assert_eq!((&status["parked"]["rows"], &status["parked"]["keys"]), (&json!(2), &json!(1)));
    let of = |kind| format!("watership_parked_rows{{route=\"outbox\",kind=\"{kind}\"}}");
    assert_eq!(metric(&relay, &of("too_large")).await, 1.0);
    assert_eq!(metric(&relay, &of("follows")).await, 1.0);
    let total = "watership_messages_parked_total{route=\"outbox\",kind=\"too_large\"}";
    assert_eq!(metric(&relay, total).await, 1.0);

    let list = parked(&stage, &["list"]).await;
    assert_eq!(list[0]["key"], "order/1");
    let error = list[0]["error"].as_str().expect("an error");
    assert!(error.starts_with("its body has 2002 bytes, the limit is 1024"), "{error}");
    let shown = parked(&stage, &["show", &list[0]["id"].to_string()]).await;
    assert_eq!(shown["event"]["content"]["outbox"]["event_type"], "large");
    assert!(shown["hint"].as_str().is_some_and(|text| text.contains("max_message_size")));

    // Nothing has changed: a retry parks it again, and nothing overtakes.
    assert_eq!(parked(&stage, &["retry", "--all"]).await["retrying"], json!([1, 2]));
    until("it was tried", async || {
        stage.holds("(SELECT attempts FROM watership.parked WHERE id = 1) = 2").await
    })
    .await;
    until_rows(&stage, &["parked too_large", "parked follows"]).await;
    relay.stop().await.expect_code(0);

    let text = stage.configuration().replace("1KiB", "1MiB");
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    emit(&stage, "order", "1", "late").await;
    until_rows(&stage, &["parked too_large", "parked follows", "parked follows"]).await;
    parked(&stage, &["retry", "--key", "order/1"]).await;
    until_rows(&stage, &["released too_large", "released follows", "released follows"]).await;
    emit(&stage, "order", "1", "live").await;
    let got = stage.settled().await;
    let order = ["before", "large", "after", "late", "live"];
    assert_eq!(of_key(&got, "order/1"), order);
    assert_eq!(got.len(), 6, "none came twice");
    assert_eq!(relay.status().await["parked"]["rows"], 0);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn an_event_that_no_route_selects_is_parked_until_a_route_is_there() {
    let routes = r#"
        [[route]]
        name = "orders"
        outbox = { aggregate_type = "order" }
        exchange = "watership"
        "#;
    let stage = Stage::new(Setup { routes, settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit(&stage, "stranger", "1", "first").await;
    emit(&stage, "order", "1", "order").await;
    emit(&stage, "stranger", "1", "second").await;
    until_rows(&stage, &["parked no_route", "parked follows"]).await;
    assert_eq!(kinds(&stage.settled().await), ["order"]);
    relay.stop().await.expect_code(0);

    let route = "\n[[route]]\nname = \"strangers\"\n\
        outbox = { aggregate_type = \"stranger\" }\nexchange = \"watership\"\n";
    stage.append_to_configuration(route);
    let relay = stage.start().await;
    emit(&stage, "stranger", "1", "third").await;
    emit(&stage, "stranger", "2", "free").await;
    until_rows(&stage, &["parked no_route", "parked follows", "parked follows"]).await;
    parked(&stage, &["retry", "--route", ""]).await;
    until_rows(&stage, &["released no_route", "released follows", "released follows"]).await;
    emit(&stage, "stranger", "1", "fourth").await;
    let got = stage.settled().await;
    assert_eq!(of_key(&got, "stranger/1"), ["first", "second", "third", "fourth"]);
    assert_eq!(of_key(&got, "stranger/2"), ["free"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_route_that_parks_the_unroutable_goes_on_and_a_retry_needs_no_restart() {
    let routes = r#"
        [[route]]
        name = "all"
        outbox = { aggregate_type = "*" }
        exchange = "narrow"
        routing_key = "{event_type}"
        on_unroutable = "park"
        [[exchange]]
        name = "narrow"
        [[binding]]
        queue = "all"
        exchange = "narrow"
        routing_key = "known"
        "#;
    let stage = Stage::new(Setup { routes, settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit(&stage, "order", "1", "unknown").await;
    emit(&stage, "order", "1", "known").await;
    emit(&stage, "order", "2", "known").await;
    until_rows(&stage, &["parked unroutable", "parked follows"]).await;
    let key = |messages: &[Message]| messages[0].text("ws-key");
    let got = stage.inbox.count(1).await;
    assert_eq!((got.len(), key(&got)), (1, "order/2".to_owned()));
    assert_eq!(relay.status().await["held"], json!([]));
    parked(&stage, &["retry", "1"]).await;
    until("it was tried", async || {
        stage.holds("(SELECT attempts FROM watership.parked WHERE id = 1) = 2").await
    })
    .await;
    until_rows(&stage, &["parked unroutable", "parked follows"]).await;

    let options = Default::default();
    let args = Default::default();
    let bind = stage.channel.queue_bind("all".into(), "narrow".into(), "#".into(), options, args);
    bind.await.expect("bound");
    parked(&stage, &["retry", "2"]).await;
    until_rows(&stage, &["released unroutable", "released follows"]).await;
    let got = stage.inbox.count(3).await;
    assert_eq!(of_key(&got, "order/1"), ["unknown", "known"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_discarded_message_is_never_published_and_what_followed_it_is() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit_large(&stage, "order", "1", "large").await;
    emit(&stage, "order", "1", "after").await;
    until_rows(&stage, &["parked too_large", "parked follows"]).await;
    stage.run(&["parked", "discard", "1", "--reason", " "]).await.expect_code(2);
    let ended = stage.run(&["parked", "discard", "1", "--reason", "made by a test"]).await;
    ended.expect_code(0).expect_text(&["1 rows with the same key follow; a running relay"]);
    let ended = stage.run(&["parked", "discard", "1", "--reason", "again"]).await;
    ended.expect_code(1).expect_text(&["row 1 is discarded"]);
    stage.run(&["parked", "show", "77"]).await.expect_code(1).expect_text(&["no parked row 77"]);
    // Nothing is wrong with what followed, and nobody has to ask for it.
    until_rows(&stage, &["discarded too_large", "released follows"]).await;
    emit(&stage, "order", "1", "live").await;
    assert_eq!(kinds(&stage.settled().await), ["after", "live"]);
    let shown = parked(&stage, &["show", "1"]).await;
    assert_eq!(shown["note"], "made by a test");
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&["parked messages are released: they were published"]);
}

#[tokio::test]
async fn a_row_that_breaks_the_outbox_contract_is_parked_whole() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    stage
        .execute("ALTER TABLE watership.outbox DROP CONSTRAINT outbox_either_payload_or_data")
        .await;
    let relay = stage.start().await;
    stage
        .execute(
            "INSERT INTO watership.outbox \
             (aggregate_type, aggregate_id, event_type, payload, data) VALUES \
             ('order', '1', 'both', '{\"a\": 1}', '\\x00ff')",
        )
        .await;
    emit(&stage, "order", "1", "after").await;
    until_rows(&stage, &["parked invalid", "parked follows"]).await;
    let shown = parked(&stage, &["show", "1"]).await;
    let broken = &shown["event"]["content"]["outbox"]["payload"]["broken"];
    assert_eq!(broken["why"], "exactly one of payload and data must be set");
    assert!(broken["columns"].to_string().contains("\\\\x00ff"), "{broken}");
    assert!(stage.settled().await.is_empty());
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn on_poison_block_lets_only_its_key_wait() {
    let routes = r#"
        [[route]]
        name = "all"
        outbox = { aggregate_type = "order" }
        exchange = "watership"
        on_poison = "block"
        "#;
    let stage = Stage::new(Setup { routes, settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit_large(&stage, "order", "1", "large").await;
    emit(&stage, "order", "1", "after").await;
    emit(&stage, "order", "2", "other").await;
    assert_eq!(kinds(&stage.inbox.count(1).await), ["other"]);
    until("it is shown", async || relay.status().await["parked"]["blocked"][0][0] == "all").await;
    assert!(rows(&stage).await.is_empty());
    until("it is counted", async || relay.metric("watership_parked_blocked").await == Some(2.0))
        .await;
    assert_eq!(relay.metric("watership_parked").await, Some(0.0), "nothing is parked");
    assert_eq!(relay.status().await["parked"]["rows"], 0);
    let log = relay.log();
    assert!(log.contains("neither published nor parked; its key is blocked"), "{log}");
    assert!(!log.contains("it is parked"), "{log}");
    relay.kill();
    let text = stage.configuration().replace("1KiB", "1MiB");
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    let got = stage.settled().await;
    assert_eq!(of_key(&got, "order/1"), ["large", "after"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn beyond_the_limit_poison_waits_and_is_parked_when_there_is_room() {
    let settings = format!("{SMALL}\nrelay.parked_max_rows = 1");
    let stage = Stage::new(Setup { settings: &settings, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit_large(&stage, "order", "1", "large").await;
    until_rows(&stage, &["parked too_large"]).await;
    emit_large(&stage, "order", "2", "large").await;
    emit(&stage, "order", "3", "other").await;
    assert_eq!(kinds(&stage.inbox.count(1).await), ["other"]);
    until("it is shown", async || relay.status().await["parked"]["blocked"][0][0] == "outbox")
        .await;
    stage.run(&["parked", "discard", "1", "--reason", "test"]).await.expect_code(0);
    until_rows(&stage, &["discarded too_large", "parked too_large"]).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_queue_that_refuses_one_message_for_ever_does_not_stop_its_route_when_it_may_park() {
    let routes = r#"
        [[route]]
        name = "all"
        outbox = { aggregate_type = "*" }
        exchange = "two"
        routing_key = "{event_type}"
        nack_limit = 5
        [[exchange]]
        name = "two"
        [[queue]]
        name = "full"
        type = "classic"
        arguments = { "x-max-length" = 1, "x-overflow" = "reject-publish" }
        [[binding]]
        queue = "full"
        exchange = "two"
        routing_key = "full"
        [[binding]]
        queue = "all"
        exchange = "two"
        routing_key = "fine"
        "#;
    let stage = Stage::new(Setup { routes, settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit(&stage, "order", "0", "full").await;
    until("the queue is full", async || {
        relay.metric("watership_messages_confirmed_total{route=\"all\",owner=\"\"}").await
            == Some(1.0)
    })
    .await;
    emit(&stage, "order", "1", "full").await;
    until("it is refused", async || {
        let nacked = "watership_messages_nacked_total{route=\"all\",owner=\"\"}";
        relay.metric(nacked).await.is_some_and(|n| n > 6.0)
    })
    .await;
    assert!(rows(&stage).await.is_empty(), "nothing else was confirmed: it may be the broker");
    emit(&stage, "order", "1", "fine").await;
    emit(&stage, "order", "2", "fine").await;
    until_rows(&stage, &["parked nacked", "parked follows"]).await;
    stage.channel.queue_purge("full".into(), Default::default()).await.expect("purged");
    parked(&stage, &["retry", "--all"]).await;
    until_rows(&stage, &["released nacked", "released follows"]).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn kills_while_messages_are_parked_and_retried_lose_nothing_and_keep_each_key_in_order() {
    const KEYS: i32 = 40;
    const EVENTS: i32 = 4_000;
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    // One in 50 is too large.
    let fill = format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT 'order', (n % {KEYS})::text, n::text, \
             to_json(repeat('x', CASE WHEN n % 50 = 7 THEN 2000 ELSE 1 END)) \
         FROM generate_series(1, {EVENTS}) AS n"
    );
    let relay = stage.start().await;
    stage.execute(&fill).await;
    until("something is parked", async || !rows(&stage).await.is_empty()).await;
    relay.kill();
    let relay = stage.start().await;
    let all = format!("(SELECT count(*) FROM watership.parked) > {}", EVENTS / 50);
    until("much is parked", async || stage.holds(&all).await).await;
    relay.kill();
    let text = stage.configuration().replace("1KiB", "1MiB");
    stage.replace_configuration(&text);
    let mut relay = stage.start().await;
    stage.settled().await;
    parked(&stage, &["retry", "--all"]).await;
    for released in [20, 200] {
        let some = format!(
            "(SELECT count(*) FROM watership.parked WHERE state = 'released') >= {released}"
        );
        until("some are released", async || stage.holds(&some).await).await;
        relay.kill();
        relay = stage.start().await;
    }
    let none = "NOT EXISTS (SELECT FROM watership.parked WHERE state <> 'released')";
    until("all are released", async || stage.holds(none).await).await;
    let got = stage.settled().await;
    let mut last: HashMap<String, i32> = HashMap::new();
    let mut first = std::collections::HashSet::new();
    for message in got.iter().filter(|m| first.insert(m.id())) {
        let n: i32 = message.kind().parse().expect("a number");
        let before = last.insert(message.text("ws-key"), n);
        assert!(before.is_none_or(|before| before < n), "{n} came after {before:?}");
    }
    assert_eq!(first.len(), usize::try_from(EVENTS).unwrap(), "lost some");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_message_that_makes_the_broker_close_the_channel_is_found_among_all_and_parked() {
    let conf = vec!["max_message_size = 100000".to_owned()];
    let options = RabbitOptions { conf, ..RabbitOptions::default() };
    let node = Rabbit::start(options).await.expect("a private node");
    let vhost = Vhost { name: "/".into(), url: node.url("/") };
    let setup = Setup { settings: "relay.checkpoint_interval = \"20ms\"", ..Setup::default() };
    let stage = Stage::on(own_database().await, vhost, setup).await;
    let relay = stage.start().await;
    stage
        .execute(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
             SELECT 'order', (n % 50)::text, n::text, to_json(repeat('x', \
                 CASE WHEN n IN (333, 777) THEN 200000 WHEN n % 10 = 0 THEN 50000 ELSE 1 END)) \
             FROM generate_series(1, 1000) AS n",
        )
        .await;
    let two = "(SELECT count(*) FROM watership.parked \
        WHERE kind IN ('refused', 'too_large')) >= 2";
    until("two are parked", async || stage.holds(two).await).await;
    let got = stage.settled().await;
    let mut last: HashMap<String, i32> = HashMap::new();
    let mut first = std::collections::HashSet::new();
    for message in got.iter().filter(|m| first.insert(m.id())) {
        let n: i32 = message.kind().parse().expect("a number");
        let before = last.insert(message.text("ws-key"), n);
        assert!(before.is_none_or(|before| before < n), "{n} came after {before:?}");
    }
    let parked: usize =
        stage.text("SELECT count(*) FROM watership.parked").await.parse().expect("a number");
    assert_eq!(first.len() + parked, 1000, "lost some");
    assert_eq!(relay.status().await["sessions"], 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_key_that_stays_busy_is_released_by_one_retry() {
    let stage = Stage::new(Setup { settings: SMALL, ..Setup::default() }).await;
    let relay = stage.start().await;
    emit_large(&stage, "order", "1", "0000").await;
    until_rows(&stage, &["parked too_large"]).await;
    relay.stop().await.expect_code(0);
    let text = stage.configuration().replace("1KiB", "1MiB");
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    let count = async |state: &str| -> u32 {
        let sql = format!("SELECT count(*) FROM watership.parked WHERE state IN ({state})");
        stage.text(&sql).await.parse().expect("a number")
    };
    let event = |number: u32| format!("{number:04}");
    let mut last = 0;
    while last < 50 {
        last += 1;
        emit(&stage, "order", "1", &event(last)).await;
    }
    until("the key is busy", async || count("'parked'").await == last + 1).await;
    parked(&stage, &["retry", "--key", "order/1"]).await;
    // It stays busy: for each two that leave, another one comes.
    let mut released = 0;
    until("nothing is left", async || {
        let now = count("'released'").await;
        if now >= released + 2 {
            (released, last) = (now, last + 1);
            emit(&stage, "order", "1", &event(last)).await;
        }
        count("'parked', 'retrying'").await == 0
    })
    .await;
    let expected: Vec<String> = (0..=last).map(event).collect();
    stage.inbox.count(expected.len()).await;
    let got = stage.settled().await;
    assert_eq!(of_key(&got, "order/1"), expected);
    relay.stop().await.expect_code(0);
}
