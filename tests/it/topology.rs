//! One thing that is wrong in the broker stops the routes that use it, and no other.

use serde_json::Value;
use watership::dev::Rabbit;

use crate::support::inbox::{Inbox, Message};
use crate::support::servers::{Vhost, own_database, own_vhost, rabbit};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const TWO_ROUTES: &str = r##"
    [[route]]
    name = "good"
    outbox = { aggregate_type = "good" }
    exchange = "watership"
    [[route]]
    name = "bad"
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

/// A stage whose broker connection is that of a user of its own, so that rights can be taken away.
async fn stage() -> (Stage, String) {
    let vhost = own_vhost().await;
    let (name, user) = (vhost.name.clone(), format!("user-{}", vhost.name));
    let node = rabbit().await;
    let path = format!("/api/users/{user}");
    let made = node.management("PUT", &path, r#"{"password":"pw","tags":""}"#).await;
    made.expect("a user");
    rights(node, &name, ".*").await;
    let url = vhost.url.replace("guest:guest", &format!("{user}:pw"));
    let vhost = Vhost { url, name: name.clone() };
    let settings = "broker.topology = \"declare\"";
    let setup = Setup { routes: TWO_ROUTES, settings, ..Setup::default() };
    (Stage::on(own_database().await, vhost, setup).await, name)
}

async fn rights(node: &Rabbit, vhost: &str, configure: &str) {
    all_rights(node, vhost, [configure, ".*", ".*"]).await;
}

/// Configure, write and read.
async fn all_rights(node: &Rabbit, vhost: &str, [configure, write, read]: [&str; 3]) {
    let path = format!("/api/permissions/{vhost}/user-{vhost}");
    let body = format!(r#"{{"configure":"{configure}","write":"{write}","read":"{read}"}}"#);
    node.management("PUT", &path, &body).await.expect("rights are set");
}

/// Adds to the configuration; its relay says when it has looked at held routes.
fn configure(stage: &Stage, more: &str) {
    let text = stage.configuration();
    stage.replace_configuration(&format!("log.level = \"debug\"\n{text}{more}"));
}

/// Waits until the relay has looked at held routes, from now on.
async fn looked(relay: &Running) {
    let times = || relay.log().matches("looked at the destinations").count();
    let before = times();
    // The first one may have begun before.
    until("the relay looks twice", async || times() >= before + 2).await;
}

async fn emit_both(stage: &Stage, numbers: std::ops::RangeInclusive<u32>) {
    for n in numbers {
        for kind in ["good", "bad"] {
            stage.execute(&format!("SELECT watership.emit('{kind}', '1', 'e', '{n}')")).await;
        }
    }
}

fn bodies(messages: &[Message]) -> Vec<&str> {
    messages.iter().map(|message| &*message.body).collect()
}

fn held(status: &Value) -> Vec<&str> {
    let list = status["held"].as_array().into_iter().flatten();
    list.filter_map(|held| held["route"].as_str()).collect()
}

/// Ends the session of the relay and waits for the next one.
async fn reconnect(stage: &Stage, relay: &Running) {
    let before = relay.status().await["sessions"].as_u64().expect("a number");
    let all = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE datname = current_database() AND pid <> pg_backend_pid()";
    stage.execute(all).await;
    until("the next session streams", async || {
        let status = relay.status().await;
        status["sessions"].as_u64() > Some(before) && status["state"] == "streaming"
    })
    .await;
}

/// Waits until only `bad` is held, for a reason with all of `texts`.
async fn held_for(relay: &Running, texts: &[&str]) {
    until(&format!("held for {texts:?}"), async || {
        let status = relay.status().await;
        let reason = status["held"][0]["reason"].as_str().unwrap_or_default().to_owned();
        held(&status) == ["bad"] && texts.iter().all(|text| reason.contains(text))
    })
    .await;
}

async fn released(relay: &Running) {
    until("the hold ends", async || held(&relay.status().await).is_empty()).await;
}

async fn declare(stage: &Stage, queue: &str, arguments: lapin::types::FieldTable) {
    let options = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
    stage.channel.queue_declare(queue.into(), options, arguments).await.expect("declared");
    bind(stage, queue, "#").await;
}

async fn bind(stage: &Stage, queue: &str, key: &str) {
    let (none, options) = (Default::default(), Default::default());
    let bind = stage.channel.queue_bind(queue.into(), "other".into(), key.into(), options, none);
    bind.await.expect("bound");
}

async fn delete_queue(stage: &Stage, queue: &str) {
    stage.channel.queue_delete(queue.into(), Default::default()).await.expect("deleted");
}

fn quorum() -> lapin::types::FieldTable {
    let mut arguments = lapin::types::FieldTable::default();
    let quorum = lapin::types::AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), quorum);
    arguments
}

#[tokio::test]
async fn a_queue_that_is_missing_at_a_reconnect_holds_its_route_only_and_hides_behind_no_other() {
    let (stage, _) = stage().await;
    stage.replace_configuration(&stage.configuration().replace("\"declare\"", "\"verify\""));
    let relay = stage.start().await;
    delete_queue(&stage, "others").await;
    // A probe would be confirmed by this one, although a queue that is wanted gets nothing.
    declare(&stage, "spare", quorum()).await;
    reconnect(&stage, &relay).await;
    held_for(&relay, &["queue \"others\" does not exist"]).await;
    emit_both(&stage, 1..=3).await;
    assert_eq!(bodies(&stage.inbox.count(3).await), ["1", "2", "3"]);
    let spare = Inbox::open(&stage.channel, "spare").await;
    assert!(spare.flush(&stage.channel, "spare").await.is_empty());
    assert_eq!(held(&relay.status().await), ["bad"]);
    assert_eq!(relay.get("/readyz").await.0, 200, "the other route works");
    declare(&stage, "others", quorum()).await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert_eq!(bodies(&others.count(3).await), ["1", "2", "3"]);
    released(&relay).await;
    assert_eq!(relay.status().await["sessions"], 2);
    relay.stop().await.expect_code(0).expect_text(&[
        "wrong in the broker",
        "routes=[\"bad\"]",
        "queue \"others\"",
    ]);
}

#[tokio::test]
async fn a_queue_that_was_declared_with_other_arguments_stops_nothing_at_a_reconnect_or_a_start() {
    let (stage, _) = stage().await;
    let relay = stage.start().await;
    delete_queue(&stage, "others").await;
    let mut limited = quorum();
    limited.insert("x-max-length".into(), lapin::types::AMQPValue::LongLongInt(1000));
    declare(&stage, "others", limited).await;
    let others = Inbox::open(&stage.channel, "others").await;
    reconnect(&stage, &relay).await;
    held_for(&relay, &["406", "x-max-length", "queue \"others\""]).await;
    emit_both(&stage, 1..=3).await;
    assert_eq!(bodies(&stage.inbox.count(3).await), ["1", "2", "3"]);
    assert_eq!(bodies(&others.count(3).await), ["1", "2", "3"], "the queue takes them");
    released(&relay).await;
    relay.stop().await.expect_code(0);

    let relay = stage.start().await;
    held_for(&relay, &["406", "x-max-length"]).await;
    emit_both(&stage, 4..=5).await;
    assert_eq!(bodies(&others.count(5).await), ["1", "2", "3", "4", "5"]);
    relay.stop().await.expect_code(0);
    // The commands that look say so, and `init` does not go on.
    stage.run(&["check"]).await.expect_code(1).expect_text(&["queue \"others\": 406"]);
}

#[tokio::test]
async fn a_right_to_declare_that_was_taken_away_stops_nothing_at_a_reconnect() {
    let (stage, vhost) = stage().await;
    let relay = stage.start().await;
    let others = Inbox::open(&stage.channel, "others").await;
    rights(rabbit().await, &vhost, "^(watership.*|all)$").await;
    reconnect(&stage, &relay).await;
    held_for(&relay, &["403", "others"]).await;
    emit_both(&stage, 1..=3).await;
    assert_eq!(bodies(&stage.inbox.count(3).await), ["1", "2", "3"]);
    assert_eq!(bodies(&others.count(3).await), ["1", "2", "3"], "the queue takes them");
    released(&relay).await;
    relay.stop().await.expect_code(0);
    stage.run(&["check"]).await.expect_code(1).expect_text(&["403", "\"others\"", "\"other\""]);
}

#[tokio::test]
async fn an_exchange_of_another_type_holds_its_route_only_until_messages_arrive() {
    let (stage, _) = stage().await;
    let relay = stage.start().await;
    let deleted = stage.channel.exchange_delete("other".into(), Default::default());
    deleted.await.expect("deleted");
    let options = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let kind = lapin::ExchangeKind::Direct;
    let declared =
        stage.channel.exchange_declare("other".into(), kind, options, Default::default());
    declared.await.expect("declared");
    reconnect(&stage, &relay).await;
    held_for(&relay, &["406", "exchange \"other\"", "'direct'"]).await;
    // The binding by "#" is made, and matches nothing in a direct exchange.
    emit_both(&stage, 1..=2).await;
    assert_eq!(bodies(&stage.inbox.count(2).await), ["1", "2"]);
    held_for(&relay, &["unroutable"]).await;
    bind(&stage, "others", "bad").await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert_eq!(bodies(&others.count(2).await), ["1", "2"]);
    released(&relay).await;
    relay.stop().await.expect_code(0);
    stage.run(&["check"]).await.expect_code(1).expect_text(&["exchange \"other\": 406"]);
}

#[tokio::test]
async fn an_exchange_whose_type_the_broker_lost_stops_nothing_else() {
    let (stage, _) = stage().await;
    // Asking for it makes the broker close the whole connection.
    let unknown = "[[exchange]]\nname = \"lost\"\nkind = \"x-lost\"\n";
    stage.append_to_configuration(unknown);
    let relay = stage.start().await;
    let others = Inbox::open(&stage.channel, "others").await;
    emit_both(&stage, 1..=2).await;
    assert_eq!(bodies(&stage.inbox.count(2).await), ["1", "2"]);
    assert_eq!(bodies(&others.count(2).await), ["1", "2"]);
    relay.stop().await.expect_code(0).expect_text(&["exchange \"lost\"", "x-lost"]);
}

#[tokio::test]
async fn a_binding_to_a_queue_that_is_not_there_holds_its_route_until_somebody_makes_the_queue() {
    let (stage, _) = stage().await;
    let binding = "[[binding]]\nqueue = \"later\"\nexchange = \"other\"\nrouting_key = \"#\"\n";
    configure(&stage, binding);
    let hint = "add [[queue]] name = \"later\" to the configuration";
    let told = ["queue \"later\" does not exist", hint];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    let again = ["init", "--admin-url", &stage.database.url];
    stage.run(&again).await.expect_code(1).expect_text(&[hint]);
    let relay = stage.start().await;
    held_for(&relay, &["404", "later"]).await;
    emit_both(&stage, 1..=3).await;
    assert_eq!(bodies(&stage.inbox.count(3).await), ["1", "2", "3"], "the other route flows");
    looked(&relay).await;
    held_for(&relay, &["404", "later"]).await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert!(others.flush(&stage.channel, "others").await.is_empty(), "it would hide the loss");
    stage.run(&["status"]).await.expect_code(1).expect_text(&["route \"bad\"", "later"]);
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);

    let options = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
    let made = stage.channel.queue_declare("later".into(), options, Default::default());
    made.await.expect("declared");
    let later = Inbox::open(&stage.channel, "later").await;
    assert_eq!(bodies(&later.count(3).await), ["1", "2", "3"], "the relay has bound it");
    assert_eq!(bodies(&others.count(3).await), ["1", "2", "3"]);
    released(&relay).await;
    stage.run(&["check"]).await.expect_code(0);
    relay.stop().await.expect_code(0).expect_text(&["wrong in the broker", "add [[queue]] name"]);
}

/// With these permissions, a queue is declared and cannot be bound.
async fn holds_until_permitted(refused: [&str; 3]) {
    let (stage, vhost) = stage().await;
    let node = rabbit().await;
    configure(
        &stage,
        "[[queue]]\nname = \"more\"\n\
         [[binding]]\nqueue = \"more\"\nexchange = \"other\"\nrouting_key = \"#\"\n",
    );
    all_rights(node, &vhost, refused).await;
    let told = ["binding of queue \"more\"", "403", "permission on "];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    let relay = stage.start().await;
    held_for(&relay, &["403", "more"]).await;
    emit_both(&stage, 1..=2).await;
    looked(&relay).await;
    held_for(&relay, &["403", "more"]).await;
    all_rights(node, &vhost, [".*", ".*", ".*"]).await;
    released(&relay).await;
    let others = Inbox::open(&stage.channel, "others").await;
    let more = Inbox::open(&stage.channel, "more").await;
    assert_eq!(bodies(&more.count(2).await), ["1", "2"]);
    assert_eq!(bodies(&others.count(2).await), ["1", "2"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_binding_from_an_exchange_that_may_not_be_read_holds_its_route_until_it_may() {
    holds_until_permitted([".*", ".*", "^watership.*$"]).await;
}

#[tokio::test]
async fn a_binding_to_a_queue_that_may_not_be_written_holds_its_route_until_it_may() {
    holds_until_permitted([".*", "^(watership.*|all|others?)$", ".*"]).await;
}

#[tokio::test]
async fn a_binding_to_an_exchange_that_is_not_there_holds_its_route() {
    let (stage, _) = stage().await;
    configure(
        &stage,
        "[[binding]]\nto_exchange = \"nope\"\nexchange = \"other\"\nrouting_key = \"#\"\n",
    );
    let told = ["exchange \"nope\" does not exist", "add [[exchange]] name = \"nope\""];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    let relay = stage.start().await;
    held_for(&relay, &["404", "nope"]).await;
    emit_both(&stage, 1..=2).await;
    looked(&relay).await;
    held_for(&relay, &["404", "nope"]).await;
    let options = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let kind = lapin::ExchangeKind::Topic;
    let made = stage.channel.exchange_declare("nope".into(), kind, options, Default::default());
    made.await.expect("declared");
    released(&relay).await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert_eq!(bodies(&others.count(2).await), ["1", "2"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_queue_or_exchange_that_is_deleted_while_running_is_declared_again() {
    let (stage, vhost) = stage().await;
    let node = rabbit().await;
    let relay = stage.start().await;
    let is_there = async |what: &str| {
        node.management("GET", &format!("/api/{what}?disable_stats=true"), "").await.is_ok()
    };
    delete_queue(&stage, "others").await;
    emit_both(&stage, 1..=2).await;
    let queue = format!("queues/{vhost}/others");
    until("the queue is declared", async || is_there(&queue).await).await;
    // A queue without a leader yet answers a consumer with 541; this one has taken messages.
    released(&relay).await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert_eq!(bodies(&others.count(2).await), ["1", "2"]);
    let deleted = stage.channel.exchange_delete("other".into(), Default::default());
    deleted.await.expect("deleted");
    emit_both(&stage, 3..=4).await;
    assert_eq!(bodies(&others.count(4).await), ["1", "2", "3", "4"]);
    released(&relay).await;
    assert_eq!(relay.status().await["sessions"], 1);
    relay.stop().await.expect_code(0).expect_text(&[
        "declared again",
        "exchange=\"other\"",
        "routing_key=\"bad\"",
        "hint=\"bind a queue",
    ]);
}

#[tokio::test]
async fn an_exchange_that_is_declared_again_has_the_bindings_of_routes_that_are_quiet_too() {
    let (stage, _) = stage().await;
    configure(
        &stage,
        "[[route]]\nname = \"quiet\"\noutbox = { aggregate_type = \"quiet\" }\n\
         exchange = \"other\"\nrouting_key = \"quiet\"\n[[queue]]\nname = \"quiets\"\n\
         [[binding]]\nqueue = \"quiets\"\nexchange = \"other\"\nrouting_key = \"quiet\"\n",
    );
    let relay = stage.start().await;
    let deleted = stage.channel.exchange_delete("other".into(), Default::default());
    deleted.await.expect("deleted");
    emit_both(&stage, 1..=1).await;
    let others = Inbox::open(&stage.channel, "others").await;
    assert_eq!(bodies(&others.count(1).await), ["1"]);
    released(&relay).await;
    stage.execute("SELECT watership.emit('quiet', '1', 'e', '2')").await;
    let quiets = Inbox::open(&stage.channel, "quiets").await;
    assert_eq!(bodies(&quiets.count(1).await), ["2"]);
    assert_eq!(relay.status().await["sessions"], 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn check_tells_what_run_will_meet_before_it_does() {
    let (stage, vhost) = stage().await;
    let node = rabbit().await;
    let path = format!("/api/permissions/{vhost}/user-{vhost}");
    // The relay may declare everything, and publish nothing to one exchange.
    let body = r#"{"configure":".*","write":"^(watership|all|others)$","read":".*"}"#;
    node.management("PUT", &path, body).await.expect("rights are set");
    let publishing = "publishing to exchange \"other\" with routing key \"bad\": 403";
    stage.run(&["check"]).await.expect_code(1).expect_text(&[publishing]);
    rights(node, &vhost, ".*").await;
    stage.run(&["check"]).await.expect_code(0).expect_text(&["exchange \"other\" exists"]);
    let queue = stage.inbox.flush(&stage.channel, "all").await;
    assert!(queue.is_empty(), "nothing was published");
    // An exchange that exists with arguments, and is configured without.
    let mut arguments = lapin::types::FieldTable::default();
    let spare = lapin::types::AMQPValue::LongString("spare".into());
    arguments.insert("alternate-exchange".into(), spare);
    let options = lapin::options::ExchangeDeclareOptions { durable: true, ..Default::default() };
    let kind = lapin::ExchangeKind::Topic;
    let declare = stage.channel.exchange_declare("third".into(), kind, options, arguments);
    declare.await.expect("declared");
    let third = "[[exchange]]\nname = \"third\"\n";
    stage.append_to_configuration(third);
    let refused = stage.run(&["check"]).await;
    refused.expect_code(1).expect_text(&["exchange \"third\": 406", "alternate-exchange"]);
    let with = format!("{third}arguments = {{ alternate-exchange = \"spare\" }}\n");
    stage.replace_configuration(&stage.configuration().replace(third, &with));
    stage.run(&["check"]).await.expect_code(0).expect_text(&["exchange \"third\" exists"]);
}

#[tokio::test]
async fn bindings_with_arguments_and_between_exchanges_route_as_configured() {
    let routes = r##"
        [[route]]
        name = "regions"
        outbox = { aggregate_type = "region" }
        exchange = "heads"
        [[route]]
        name = "hashed"
        outbox = { aggregate_type = "hash" }
        exchange = "outer"
        routing_key = "a.{event_type}"
        [[exchange]]
        name = "heads"
        kind = "headers"
        arguments = { alternate-exchange = "watership" }
        [[exchange]]
        name = "outer"
        [[queue]]
        name = "eu"
        [[binding]]
        queue = "eu"
        exchange = "heads"
        arguments = { x-match = "all", region = "eu", level = 7 }
        [[binding]]
        to_exchange = "watership"
        exchange = "outer"
        routing_key = "a.#"
        "##;
    let stage = Stage::new(Setup { routes, ..Setup::default() }).await;
    let relay = stage.start().await;
    let eu = Inbox::open(&stage.channel, "eu").await;
    for headers in [r#"{"region":"eu","level":7}"#, r#"{"region":"us","level":7}"#] {
        let sql = format!("SELECT watership.emit('region', '1', 'e', '1', '{headers}')");
        stage.execute(&sql).await;
    }
    stage.execute("SELECT watership.emit('hash', '1', 'e', '2')").await;
    let both = bodies(&stage.inbox.count(2).await).concat();
    assert!(both == "12" || both == "21", "{both}");
    assert_eq!(eu.count(1).await.len(), 1);
    assert_eq!(stage.settled().await.len(), 2, "the rest of the headers, and the inner exchange");
    assert_eq!(eu.flush(&stage.channel, "eu").await.len(), 1, "only what its headers say");
    relay.stop().await.expect_code(0);
    let url = rabbit().await.management_url().expect("management runs");
    let text = stage.configuration();
    stage.replace_configuration(&format!("broker.management_url = \"{url}\"\n{text}"));
    stage.run(&["check"]).await.expect_code(0).expect_text(&[
        "queue \"eu\" to exchange \"heads\" with routing key \"\" and arguments {",
        "exchange \"watership\" to exchange \"outer\" with routing key \"a.#\"",
    ]);
}
