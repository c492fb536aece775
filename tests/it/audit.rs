//! What the running relay says a confirm is worth, on a real broker, and how it notices a change.

use serde_json::Value;

use crate::management::answering;
use crate::support::servers::{Vhost, own_database, own_vhost, rabbit};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const ROUTES: &str = "[[route]]\nname = \"orders\"\nowner = \"team-orders\"\n\
    outbox = { aggregate_type = \"order\" }\nexchange = \"watership\"\n\
    routing_key = \"{aggregate_type}.{event_type}\"\n\
    [[route]]\nname = \"bills\"\noutbox = { aggregate_type = \"bill\" }\nexchange = \"bills\"\n\
    routing_key = \"{event_type}\"\n";

async fn stage(vhost: Vhost, more: &str) -> Stage {
    let settings = format!("broker.audit_interval = \"1s\"\n{more}");
    let setup = Setup { routes: ROUTES, settings: &settings, ..Setup::default() };
    Stage::on(own_database().await, vhost, setup).await
}

async fn management() -> String {
    let url = rabbit().await.management_url().expect("management runs");
    format!("broker.management_url = \"{url}\"")
}

/// The route of that name in `/status`.
async fn route(relay: &Running, name: &str) -> Value {
    let status = relay.status().await;
    let routes = status["routes"].as_array().cloned().unwrap_or_default();
    routes.into_iter().find(|route| route["name"] == name).unwrap_or_default()
}

/// Waits for a grade with a reason, and for the metric that says the same.
async fn graded(relay: &Running, name: &str, owner: &str, grade: &str, reason: &str) {
    let mut last = Value::Null;
    until(&format!("{name} is {grade}: {reason}"), async || {
        last = route(relay, name).await;
        last["grade"] == grade && last["reason"].as_str().is_some_and(|r| r.contains(reason))
    })
    .await;
    for other in ["safe", "not_verified", "weak", "unsafe"] {
        let series = format!(
            "watership_route_grade{{route=\"{name}\",owner=\"{owner}\",grade=\"{other}\"}}"
        );
        let wanted = f64::from(u8::from(other == grade));
        assert_eq!(relay.metric(&series).await, Some(wanted), "{series}");
    }
    assert_eq!(last["owner"], owner);
}

#[tokio::test]
async fn each_route_is_graded_by_the_queues_that_its_keys_reach_and_changes_are_noticed() {
    let node = rabbit().await;
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let stage = stage(vhost, &management().await).await;
    let relay = stage.start().await;
    let put = async |path: &str, body: &str| {
        node.management("PUT", path, body).await.expect("the broker takes it");
    };
    let bind = async |exchange: &str, queue: &str, key: &str| {
        let path = format!("/api/bindings/{name}/e/{exchange}/q/{queue}");
        let body = format!("{{\"routing_key\": \"{key}\"}}");
        node.management("POST", &path, &body).await.expect("the broker binds it");
    };
    // One node: its disk is the only copy. (RabbitMQ 4 adds its delivery limit.)
    graded(&relay, "orders", "team-orders", "weak", "quorum queue with a single member").await;
    graded(&relay, "bills", "", "unsafe", "no queue is bound to exchange \"bills\"").await;

    put(&format!("/api/queues/{name}/bills"), "{\"durable\": true}").await;
    bind("bills", "bills", "other.*.x").await;
    // An event type may be anything, so this binding may take some of the messages.
    graded(&relay, "bills", "", "weak", "some routing keys of the form \"{}\" match no binding")
        .await;
    bind("bills", "bills", "#").await;
    graded(&relay, "bills", "", "weak", "queue \"bills\": a classic queue").await;

    // A policy that somebody adds at run time.
    let policy = format!("/api/policies/{name}/limit");
    let limit = |definition: &str| {
        format!(
            "{{\"pattern\": \"^bills$\", \"apply-to\": \"queues\", \"definition\": {definition}}}"
        )
    };
    put(&policy, &limit("{\"max-length\": 10}")).await;
    graded(&relay, "bills", "", "unsafe", "overflow drop-head: when full, it drops").await;
    put(&policy, &limit("{\"max-length\": 10, \"overflow\": \"reject-publish\"}")).await;
    graded(&relay, "bills", "", "weak", "a classic queue").await;
    put(&policy, &limit("{\"message-ttl\": 60000}")).await;
    graded(&relay, "bills", "", "weak", "messages or the queue expire").await;

    // A queue that another route's keys never reach says nothing about this one.
    put(&format!("/api/queues/{name}/short"), "{\"auto_delete\": true}").await;
    bind("watership", "short", "customer.#").await;
    bind("watership", "short", "bill.#").await;
    bind("bills", "short", "#").await;
    graded(&relay, "bills", "", "unsafe", "queue \"short\": not durable").await;
    graded(&relay, "orders", "team-orders", "weak", "queue \"all\"").await;
    bind("watership", "short", "order.paid").await;
    graded(&relay, "orders", "team-orders", "unsafe", "queue \"short\": not durable").await;

    let log = relay.stop().await;
    log.expect_code(0).expect_text(&[
        "route graded",
        "grade=UNSAFE",
        "before=\"weak\"",
        "route=\"bills\"",
    ]);
}

#[tokio::test]
async fn without_the_management_api_nothing_is_verified_but_what_is_missing_is_seen() {
    let stage = stage(own_vhost().await, "").await;
    let relay = stage.start().await;
    let reason = "not verified: set broker.management_url";
    graded(&relay, "orders", "team-orders", "not_verified", reason).await;
    graded(&relay, "bills", "", "not_verified", reason).await;
    let delete = lapin::options::QueueDeleteOptions::default();
    stage.channel.queue_delete("all".into(), delete).await.expect("it is deleted");
    graded(&relay, "orders", "team-orders", "unsafe", "queue \"all\" does not exist").await;
    graded(&relay, "bills", "", "not_verified", reason).await;
    // The audit looks from the side: the session continues.
    assert_eq!(relay.status().await["sessions"], 1);
}

#[tokio::test]
async fn an_audit_that_fails_is_counted_and_disturbs_nothing() {
    // Nobody listens on the discard port of this machine.
    let nobody = "broker.management_url = \"http://127.0.0.1:9\"";
    let stage = stage(own_vhost().await, nobody).await;
    let relay = stage.start().await;
    graded(&relay, "orders", "team-orders", "not_verified", "could not be inspected").await;
    assert!(relay.metric("watership_audit_failures_total").await.unwrap() >= 1.0);
    stage.execute("SELECT watership.emit('order', '1', 'paid', '1')").await;
    stage.inbox.count(1).await;
    assert_eq!(relay.status().await["sessions"], 1);
}

#[tokio::test]
async fn a_route_that_is_held_or_released_is_graded_again_at_once() {
    let settings = format!("broker.audit_interval = \"1d\"\n{}", management().await);
    let setup = Setup { routes: ROUTES, settings: &settings, ..Setup::default() };
    let stage = Stage::on(own_database().await, own_vhost().await, setup).await;
    let relay = stage.start().await;
    graded(&relay, "orders", "team-orders", "weak", "quorum queue").await;
    let none = lapin::types::FieldTable::default();
    let unbind =
        stage.channel.queue_unbind("all".into(), "watership".into(), "#".into(), none.clone());
    unbind.await.expect("unbound");
    stage.execute("SELECT watership.emit('order', '1', 'paid', '1')").await;
    graded(&relay, "orders", "team-orders", "unsafe", "no queue is bound").await;
    let options = Default::default();
    let bind =
        stage.channel.queue_bind("all".into(), "watership".into(), "#".into(), options, none);
    bind.await.expect("bound");
    graded(&relay, "orders", "team-orders", "weak", "quorum queue").await;
}

#[tokio::test]
async fn a_route_to_a_headers_exchange_is_graded_by_its_own_headers_too() {
    let routes = "[[route]]\nname = \"hr\"\noutbox = { aggregate_type = \"a\" }\n\
        exchange = \"people\"\nrouting_key = \"x\"\n\
        headers = { region = \"eu\", kind = \"{event_type}\" }\n\
        [[exchange]]\nname = \"people\"\nkind = \"headers\"\n\
        [[binding]]\nqueue = \"all\"\nexchange = \"people\"\nrouting_key = \"\"\n\
        arguments = { x-match = \"all\", region = \"eu\", ws-route = \"hr\" }\n";
    let settings = management().await;
    let setup = Setup { routes, settings: &settings, ..Setup::default() };
    let stage = Stage::on(own_database().await, own_vhost().await, setup).await;
    let relay = stage.start().await;
    graded(&relay, "hr", "", "weak", "quorum queue with a single member").await;
    let text = stage.configuration().replace("region = \"eu\", ws-route", "kind = \"e\", ws-route");
    relay.stop().await.expect_code(0);
    let unbind = async |arguments: &[(&str, &str)]| {
        let mut table = lapin::types::FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), lapin::types::AMQPValue::LongString((*value).into()));
        }
        let unbind = stage.channel.queue_unbind("all".into(), "people".into(), "".into(), table);
        unbind.await.expect("unbound");
    };
    unbind(&[("x-match", "all"), ("region", "eu"), ("ws-route", "hr")]).await;
    stage.replace_configuration(&text);
    let relay = stage.start().await;
    // What the template makes differs from event to event.
    graded(&relay, "hr", "", "weak", "match no binding").await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_management_url_that_leads_elsewhere_leaves_routes_unverified_and_not_unsafe() {
    let (port, _) =
        answering("127.0.0.1:0", "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    let settings = format!("broker.management_url = \"http://u:p@127.0.0.1:{port}/rabbit\"");
    let stage = stage(own_vhost().await, &settings).await;
    let relay = stage.start().await;
    graded(&relay, "orders", "team-orders", "not_verified", "no management API at").await;
    let told = ["no management API at", "check port and path prefix"];
    let ended = stage.run(&["check"]).await;
    ended.expect_code(1).expect_text(&told);
    assert!(!ended.log.contains("UNSAFE") && !ended.log.contains("is held"), "{}", ended.log);
    relay.stop().await.expect_code(0);
}
