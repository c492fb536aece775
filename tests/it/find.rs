//! `watership find`: where an event is, as far as that is known.

use serde_json::Value;

use crate::support::stage::{Ended, Setup, Stage};
use crate::support::waiting::until;

const ROUTES: &str = r#"
    [[route]]
    name = "lost"
    outbox = { aggregate_type = "lost" }
    exchange = "nobody"
    [[route]]
    name = "orders"
    outbox = { aggregate_type = "order" }
    exchange = "watership"
    message_id = "route"
    [[route]]
    name = "noise"
    outbox = { aggregate_type = "noise" }
    drop = true
    "#;
const SETTINGS: &str = "relay.canary_interval = \"1s\"";

async fn emit(stage: &Stage, kind: &str) -> String {
    stage.text(&format!("SELECT watership.emit('{kind}', '1', 'made', '1')::text")).await
}

/// What `find` says about an event that is found.
async fn find(stage: &Stage, id: &str) -> Ended {
    let ended = stage.run(&["find", id]).await;
    ended.expect_code(0);
    ended
}

#[tokio::test]
async fn an_event_is_found_in_the_window_confirmed_parked_dropped_and_behind_the_checkpoint() {
    let stage = Stage::new(Setup { routes: ROUTES, settings: SETTINGS, ..Setup::default() }).await;
    let relay = stage.start().await;
    let order = emit(&stage, "order").await;
    let message = stage.inbox.count(1).await[0].header("ws-position").is_some();
    assert!(message, "it came");
    let told = find(&stage, &order).await;
    told.expect_text(&["order/1, made, made at ", "publishes it to exchange \"watership\""]);
    told.expect_text(&["window       no", "confirmed    route \"orders\", "]);

    let noise = emit(&stage, "noise").await;
    let told = find(&stage, &noise).await;
    told.expect_text(&[
        "route \"noise\" drops it",
        "checkpoint   passed",
        "not among the confirms",
    ]);

    let stranger = emit(&stage, "stranger").await;
    until("it is parked", async || stage.holds("EXISTS (SELECT FROM watership.parked)").await)
        .await;
    let told = find(&stage, &stranger).await;
    told.expect_text(&["none selects it", "parked       row 1, parked: no_route, "]);

    let lost = emit(&stage, "lost").await;
    until("its route is held", async || relay.status().await["held"][0]["route"] == "lost").await;
    let told = find(&stage, &lost).await;
    told.expect_text(&["window       route \"lost\", at ", "its route, which is held: unroutable"]);
    let told = stage.run(&["find", "--key", "lost/1"]).await;
    told.expect_code(0).expect_text(&[&lost, "window       route \"lost\", at "]);
    let (code, page) = relay.get("/find?key=lost%2F1").await;
    let page: Value = serde_json::from_str(&page).unwrap_or_else(|e| panic!("{code} {e}: {page}"));
    assert_eq!(page["window"][0]["id"], lost.as_str(), "{page}");
    assert_eq!(relay.get("/find?id=7").await.0, 400);

    let unknown = "00000000-0000-4000-8000-000000000000";
    stage.run(&["find", unknown]).await.expect_code(1).expect_text(&["outbox       no such row"]);
    stage.run(&["find", "--key", "x\u{1b}[2J/1"]).await.expect_code(1);
    stage.run(&["find", "order/1"]).await.expect_code(2).expect_text(&["not a UUID", "--key"]);
    relay.kill();

    let told = find(&stage, &lost).await;
    told.expect_text(&["relay        was not asked: nothing listens"]);
    let later = emit(&stage, "order").await;
    find(&stage, &later).await.expect_text(&["checkpoint   not passed"]);
}

#[tokio::test]
async fn an_event_of_an_earlier_process_is_known_to_be_passed_once_the_stream_is_past_it() {
    let stage = Stage::new(Setup { settings: SETTINGS, ..Setup::default() }).await;
    let relay = stage.start().await;
    let order = emit(&stage, "order").await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    find(&stage, &order).await.expect_text(&["checkpoint   cannot be known"]);
    let relay = stage.start().await;
    let told = find(&stage, &order).await;
    told.expect_text(&["checkpoint   passed", "window       no", "not among the confirms"]);
    relay.stop().await.expect_code(0);
}
