//! A queue that refuses for now: what it costs its neighbours, and what is said of it.

use std::collections::{HashMap, HashSet};

use lapin::options::BasicGetOptions;

use crate::support::inbox::Message;
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{Patience, until};

/// Copies that a healthy queue may get of what a full one beside it refuses.
const COPIES_MAX: usize = 200;

const TWO_QUEUES: &str = r#"
    [[route]]
    name = "all"
    outbox = { aggregate_type = "*" }
    exchange = "watership"
    routing_key = "{event_type}"
    [[queue]]
    name = "full"
    type = "classic"
    arguments = { "x-max-length" = 1, "x-overflow" = "reject-publish" }
    [[binding]]
    queue = "full"
    exchange = "watership"
    routing_key = "both.*"
    "#;

fn emit(kind: &str, keys: std::ops::Range<u32>) -> String {
    let (first, last) = (keys.start, keys.end - 1);
    format!(
        "SELECT watership.emit('order', n::text, '{kind}', '{{}}') \
         FROM generate_series({first}, {last}) AS n"
    )
}

#[tokio::test]
async fn a_full_queue_costs_a_healthy_one_beside_it_few_copies_and_other_keys_nothing() {
    let stage = Stage::new(Setup { routes: TWO_QUEUES, ..Setup::default() }).await;
    let relay = stage.start().await;
    let nacked = "watership_messages_nacked_total{route=\"all\",owner=\"\"}";
    // Ten routing keys, all of them into both queues.
    for kind in 0..10 {
        stage.execute(&emit(&format!("both.{kind}"), kind * 100..(kind + 1) * 100)).await;
    }
    until("it is refused", async || relay.metric(nacked).await.is_some_and(|n| n > 100.0)).await;
    stage.execute(&emit("well", 1000..2000)).await;
    let is_well = |kind: &str| kind == "well";
    let others =
        |all: &[Message]| all.iter().filter(|message| is_well(message.kind())).count() >= 1000;
    stage.inbox.wait("other routing keys", others).await;
    let status = relay.status().await;
    let refused = &status["refused"][0];
    assert_eq!((&refused["route"], &refused["exchange"]), (&"all".into(), &"watership".into()));
    assert!(refused["routing_key"].as_str().is_some_and(|key| key.starts_with("both.")));
    assert!(refused["waiting"].as_u64() > Some(900), "{status}");
    for series in ["refused", "oldest_unsettled"] {
        let series = format!("watership_route_{series}_seconds{{route=\"all\",owner=\"\"}}");
        until("the gauges say it", async || relay.metric(&series).await > Some(0.0)).await;
    }
    // More nacks than before, so there were probes in between.
    let before = relay.metric(nacked).await;
    until("it is probed", async || relay.metric(nacked).await > before.map(|n| n + 3.0)).await;
    let got = stage.inbox.flush(&stage.channel, "all").await;
    let copied = got.iter().filter(|message| !is_well(message.kind()));
    let ids: HashSet<String> = copied.clone().map(|message| message.id()).collect();
    let copies = copied.count() - ids.len();
    assert!(copies <= COPIES_MAX, "{copies} copies of {} messages", ids.len());
    let wide = lapin::types::FieldTable::default();
    stage.channel.queue_delete("full".into(), Default::default()).await.expect("deleted");
    stage.channel.queue_declare("full".into(), Default::default(), wide).await.expect("declared");
    let got = stage.settled().await;
    let ordered = got.iter().filter(|message| message.text("ws-key").starts_with("order/"));
    let ids: HashSet<String> = ordered.map(|message| message.id()).collect();
    assert_eq!(ids.len(), 2000);
    let over = async || relay.status().await["refused"].as_array().is_some_and(Vec::is_empty);
    until("nothing is refused any more", over).await;
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&["refuses messages of the route", "accepts all messages"]);
}

#[tokio::test]
async fn a_full_queue_with_a_slow_consumer_gets_everything_in_the_end_and_in_order() {
    let stage = Stage::new(Setup { routes: TWO_QUEUES, ..Setup::default() }).await;
    let relay = stage.start().await;
    for round in 0..3 {
        stage.execute(&emit(&format!("both.{round}"), 0..100)).await;
    }
    // Takes one at a time, so most of what is sent is refused.
    let (mut seen, mut last) = (HashSet::new(), HashMap::new());
    let mut patience = Patience::<usize>::new();
    while seen.len() < 300 {
        let options = BasicGetOptions { no_ack: true };
        let got = stage.channel.basic_get("full".into(), options).await.expect("an answer");
        let Some(message) = got else {
            patience.more(seen.len(), || "a message of the full queue".to_owned()).await;
            continue;
        };
        let properties = &message.delivery.properties;
        let id = properties.message_id().clone().expect("an id").to_string();
        if seen.insert(id) {
            let kind = properties.kind().clone().expect("a type").to_string();
            let headers = properties.headers().clone().expect("headers");
            let key = format!("{:?}", headers.inner().get("ws-key"));
            let before = last.insert(key, kind.clone());
            assert!(before.is_none_or(|before| before < kind), "out of order");
        }
    }
    relay.stop().await.expect_code(0);
}
