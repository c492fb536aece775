//! Which messages an event becomes, and what happens to an event that cannot become one.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::inbox::{Inbox, Message, kinds};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

#[tokio::test]
async fn an_event_gets_a_message_of_its_own_from_every_route_that_selects_it() {
    let routes = r#"
        [[route]]
        name = "orders"
        outbox = { aggregate_type = "order" }
        exchange = "watership"
        routing_key = "a.{event_type}"
        [[route]]
        name = "audit"
        owner = "team-audit"
        outbox = { aggregate_type = "order" }
        exchange = "watership"
        routing_key = "b.{aggregate_id}"
        message_id = "route"
        [[route]]
        name = "noise"
        outbox = { aggregate_type = "noise" }
        drop = true
        "#;
    let stage = Stage::new(Setup { routes, ..Setup::default() }).await;
    let relay = stage.start().await;
    let id = Uuid::from_u128(0x1234);
    stage.execute(&format!("SELECT watership.emit('order', '7', 'made', '1', NULL, '{id}')")).await;
    let noise = "SELECT watership.emit('noise', '7', 'made', '1') FROM generate_series(1, 2)";
    stage.execute(noise).await;
    let mut got = stage.settled().await;
    got.sort_by_key(|message| message.routing_key.clone());
    let keys: Vec<&str> = got.iter().map(|message| &*message.routing_key).collect();
    assert_eq!(keys, ["a.made", "b.7"]);
    let names: Vec<String> = got.iter().map(|message| message.text("ws-route")).collect();
    assert_eq!(names, ["orders", "audit"]);
    // The route's id can be computed by anybody from the event's id and the route's name.
    let expected = [id.to_string(), Uuid::new_v5(&id, b"audit").to_string()];
    assert_eq!([got[0].id(), got[1].id()], expected);
    assert_eq!(got[0].text("ws-position"), got[1].text("ws-position"));
    let dropped = "watership_events_dropped_total{route=\"noise\",owner=\"\"}";
    assert_eq!(relay.metric(dropped).await, Some(2.0));
    let confirmed = "watership_messages_confirmed_total{route=\"audit\",owner=\"team-audit\"}";
    assert_eq!(relay.metric(confirmed).await, Some(1.0));
}

#[tokio::test]
async fn a_route_can_name_the_key_columns_and_select_one_table() {
    let sql = "CREATE TABLE public.lines (id int PRIMARY KEY, customer int NOT NULL); \
        ALTER TABLE public.lines REPLICA IDENTITY FULL";
    let routes = r#"
        [[route]]
        name = "lines"
        table = "public.lines"
        exchange = "watership"
        routing_key = "{table}.{op}"
        key = ["customer"]
        "#;
    let tables = ["public.lines"];
    let stage = Stage::new(Setup { sql, tables: &tables, routes, ..Setup::default() }).await;
    let _relay = stage.start().await;
    stage.execute("INSERT INTO lines VALUES (1, 10)").await;
    stage.execute("UPDATE lines SET customer = 11").await;
    let got = stage.settled().await;
    let keys: Vec<String> = got.iter().map(|m| m.text("ws-key")).collect();
    assert_eq!(keys, ["public.lines/10", "public.lines/11"]);
    let bodies: Vec<Value> = got.iter().map(Message::json).collect();
    assert_eq!(bodies[1]["key"], json!({"customer": 11}));
    assert_eq!(bodies[1]["before"], json!({"id": 1, "customer": 10}));
}

/// Emits one event that is fine, then `poison`, then another that is fine; the relay has to stop
/// at the poison, every time, having sent what stands before it.
async fn stops_at(stage: &Stage, poison: &str, texts: &[&str]) {
    stage.execute("SELECT watership.emit('order', '1', 'before', '1')").await;
    stage.execute(poison).await;
    stage.execute("SELECT watership.emit('order', '1', 'after', '1')").await;
    for _ in 0..2 {
        stage.spawn().ended().await.expect_code(3).expect_text(texts);
    }
    let got = stage.inbox.flush(&stage.channel, "all").await;
    assert_eq!(kinds(&got), ["before"]);
}

#[tokio::test]
async fn an_event_that_is_too_large_stops_the_relay_where_its_route_says_so() {
    let settings = "broker.max_message_size = \"1KiB\"";
    let routes = r#"
        [[route]]
        name = "all"
        outbox = { aggregate_type = "order" }
        exchange = "watership"
        on_poison = "stop"
        "#;
    let stage = Stage::new(Setup { settings, routes, ..Setup::default() }).await;
    let id = Uuid::from_u128(0xB16);
    let big = format!(
        "SELECT watership.emit('order', '1', 'big', to_json(repeat('x', 1023)), NULL, '{id}')"
    );
    let texts = ["its body has 1025 bytes, the limit is 1024", &id.to_string(), "max_message_size"];
    stops_at(&stage, &big, &texts).await;
}

const TWO_ROUTES: &str = r##"
    [[route]]
    name = "good"
    outbox = { aggregate_type = "good" }
    exchange = "watership"
    [[route]]
    name = "bad"
    owner = "team-bad"
    outbox = { aggregate_type = "bad" }
    exchange = "other"
    routing_key = "bad"
    [[exchange]]
    name = "other"
    [[queue]]
    name = "others"
    [[binding]]
    queue = "others"
    exchange = "other"
    routing_key = "#"
    "##;

async fn emit_both(stage: &Stage, numbers: std::ops::RangeInclusive<u32>) {
    for n in numbers {
        for kind in ["good", "bad"] {
            let sql = format!("SELECT watership.emit('{kind}', '1', 'e', '{n}')");
            stage.execute(&sql).await;
        }
    }
}

fn bodies(messages: &[Message]) -> Vec<&str> {
    messages.iter().map(|message| &*message.body).collect()
}

#[tokio::test]
async fn a_broken_destination_holds_its_route_only_and_goes_on_by_itself_when_mended() {
    let stage = Stage::new(Setup { routes: TWO_ROUTES, ..Setup::default() }).await;
    let others = Inbox::open(&stage.channel, "others").await;
    let relay = stage.start().await;
    let held = "watership_route_held{route=\"bad\",owner=\"team-bad\"}";
    assert_eq!(relay.metric(held).await, Some(0.0));
    emit_both(&stage, 1..=2).await;
    others.count(2).await;

    let channel = &stage.channel;
    let unbind =
        channel.queue_unbind("others".into(), "other".into(), "#".into(), Default::default());
    unbind.await.expect("unbound");
    emit_both(&stage, 3..=5).await;
    assert_eq!(bodies(&stage.inbox.count(5).await), ["1", "2", "3", "4", "5"]);
    until("the route is held", async || relay.status().await["held"][0]["route"] == "bad").await;
    let status = relay.status().await;
    assert_eq!(status["held"].as_array().map(Vec::len), Some(1), "{status}");
    let reason = status["held"][0]["reason"].as_str().expect("a reason").to_owned();
    assert!(reason.starts_with("unroutable: ") && reason.contains("NO_ROUTE"), "{reason}");
    assert_eq!(relay.metric(held).await, Some(1.0));
    assert_eq!(relay.get("/readyz").await.0, 200, "the other route works");
    let bind = |queue: &'static str, exchange: &'static str| {
        let options = Default::default();
        channel.queue_bind(queue.into(), exchange.into(), "#".into(), options, Default::default())
    };
    bind("others", "other").await.expect("bound");
    assert_eq!(bodies(&others.count(5).await), ["1", "2", "3", "4", "5"]);
    until("the route continues", async || relay.metric(held).await == Some(0.0)).await;
    until("it is shown", async || relay.status().await["held"] == json!([])).await;

    let delete = channel.exchange_delete("other".into(), Default::default());
    delete.await.expect("deleted");
    emit_both(&stage, 6..=8).await;
    stage.inbox.count(8).await;
    until("the broker's reason is shown", async || {
        let status = relay.status().await;
        let reason = status["held"][0]["reason"].as_str().unwrap_or_default();
        reason.contains("no exchange 'other'")
    })
    .await;
    emit_both(&stage, 9..=9).await;
    let kind = lapin::ExchangeKind::Topic;
    let options = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let declare = channel.exchange_declare("other".into(), kind, options, Default::default());
    declare.await.expect("declared");
    bind("others", "other").await.expect("bound");
    let numbers = ["1", "2", "3", "4", "5", "6", "7", "8", "9"];
    assert_eq!(bodies(&others.count(9).await), numbers);
    assert_eq!(bodies(&stage.settled().await), numbers);
    assert_eq!(others.flush(channel, "others").await.len(), 9, "none came twice");
    let status = relay.status().await;
    assert_eq!((&status["sessions"], &status["held"]), (&json!(1), &json!([])), "{status}");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_held_route_is_probed_on_and_goes_on_with_the_first_probe_that_arrives() {
    let stage = Stage::new(Setup { routes: TWO_ROUTES, ..Setup::default() }).await;
    let others = Inbox::open(&stage.channel, "others").await;
    let relay = stage.start().await;
    let probes = async || relay.metric("watership_route_probes_total").await.unwrap_or(0.0);
    let (none, options) = (lapin::types::FieldTable::default(), Default::default());
    let unbind = stage.channel.queue_unbind("others".into(), "other".into(), "#".into(), none);
    unbind.await.expect("unbound");
    emit_both(&stage, 1..=3).await;
    until("some probes", async || probes().await >= 4.0).await;
    assert!(others.flush(&stage.channel, "others").await.is_empty());
    let none = lapin::types::FieldTable::default();
    let bind = stage.channel.queue_bind("others".into(), "other".into(), "#".into(), options, none);
    bind.await.expect("bound");
    let bound = probes().await;
    assert_eq!(bodies(&others.count(3).await), ["1", "2", "3"]);
    until("the hold ends", async || relay.status().await["held"] == json!([])).await;
    // The metric lags behind by a tick.
    assert!(probes().await - bound <= 3.0, "the first one after the binding ends the hold");
    assert_eq!(bodies(&stage.settled().await), ["1", "2", "3"]);
    assert_eq!(others.flush(&stage.channel, "others").await.len(), 3, "none came twice");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_key_that_a_delete_does_not_carry_is_told_by_check_and_at_every_start() {
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, customer int)";
    let routes = "[[route]]\nname = \"items\"\ntable = \"public.items\"\nkey = [\"customer\"]\n\
                  exchange = \"watership\"\n";
    let setup = Setup { sql, tables: &["public.items"], routes, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let text = "in the replica identity: each UPDATE and DELETE waits for all earlier changes";
    stage.run(&["check"]).await.expect_text(&[text, "REPLICA IDENTITY FULL"]);
    let told = "route \"items\" uses column \"customer\" of public.items as key";
    let relay = stage.start().await;
    relay.stop().await.expect_code(0).expect_text(&[told, text]);
    stage.execute("ALTER TABLE items REPLICA IDENTITY FULL").await;
    let relay = stage.start().await;
    let ended = relay.stop().await;
    assert!(!ended.log.contains(told), "{}", ended.log);
}
