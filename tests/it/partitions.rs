//! Routes with partitions on a real broker: their queues, where each key goes, and the refusal to
//! change their number while messages are queued.

use std::collections::BTreeMap;

use futures_util::StreamExt as _;
use serde_json::{Value, json};
use watership::route::Partitions;

use crate::support::inbox::{Inbox, Message};
use crate::support::servers::{Vhost, own_database, own_vhost, rabbit};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const ROUTE: &str = r#"
    [[route]]
    name = "orders"
    outbox = { aggregate_type = "order" }
    partitions = 4
    queue = "orders"
    "#;

async fn stage(vhost: Vhost, routes: &str) -> Stage {
    let url = rabbit().await.management_url().expect("management runs");
    let settings = format!("broker.management_url = \"{url}\"");
    let setup = Setup { routes, settings: &settings, ..Setup::default() };
    Stage::on(own_database().await, vhost, setup).await
}

fn partitions(count: u16) -> Partitions {
    Partitions { queue: "orders".into(), count }
}

async fn consume(stage: &Stage, count: u16) -> Vec<Inbox> {
    let mut inboxes = Vec::new();
    for name in partitions(count).names() {
        inboxes.push(Inbox::open(&stage.channel, &name).await);
    }
    inboxes
}

/// Waits until `count` events have come to all of them together; returns them by queue.
async fn arrived(inboxes: &[Inbox], count: usize) -> Vec<Vec<Message>> {
    let mut all = Vec::new();
    until(&format!("{count} messages"), async || {
        all.clear();
        for inbox in inboxes {
            all.push(inbox.count(0).await);
        }
        all.iter().map(Vec::len).sum::<usize>() >= count
    })
    .await;
    all
}

/// Events number `from` to `to` of each key, one transaction for each number.
async fn emit(stage: &Stage, keys: u32, numbers: std::ops::RangeInclusive<u32>) {
    for number in numbers {
        let emit = format!(
            "SELECT watership.emit('order', key::text, 'e', '{number}') \
             FROM generate_series(1, {keys}) AS key"
        );
        stage.execute(&emit).await;
    }
}

/// Fails unless each key came to its partition only, with first arrivals in order.
fn judge(by_queue: &[Vec<Message>], keys: u32, numbers: u32) {
    let count = u16::try_from(by_queue.len()).expect("few partitions");
    let mut last: BTreeMap<String, u32> = BTreeMap::new();
    for (queue, messages) in by_queue.iter().enumerate() {
        for message in messages {
            let key = message.text("ws-key");
            assert_eq!(usize::from(partitions(count).of_key(&key)), queue, "{key}");
            assert_eq!(message.routing_key, format!("orders.{queue:02}"));
            let number: u32 = message.body.parse().expect("a number");
            let seen = last.entry(key.clone()).or_default();
            assert!(number <= *seen + 1, "{key}: {number} after {seen}");
            *seen = number.max(*seen);
        }
    }
    assert_eq!(last.len() as u32, keys);
    assert!(last.values().all(|last| *last == numbers), "{last:?}");
}

async fn queue(vhost: &str, name: &str) -> Value {
    let path = format!("/api/queues/{vhost}/{name}?disable_stats=true");
    let text = rabbit().await.management("GET", &path, "").await.expect("the queue exists");
    serde_json::from_str(&text).expect("JSON")
}

#[tokio::test]
async fn partitions_are_declared_so_that_keys_stay_in_order_and_nothing_is_dropped() {
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let more = "delivery_limit = 77\narguments = { x-max-length = 5000 }\n";
    let stage = stage(vhost, &format!("{ROUTE}{more}")).await;
    for partition in partitions(4).names() {
        let found = queue(&name, &partition).await;
        let arguments = json!({
            "x-queue-type": "quorum",
            "x-single-active-consumer": true,
            "x-delivery-limit": 77,
            "x-dead-letter-exchange": "orders.dlx",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
            "x-max-length": 5000,
        });
        assert_eq!(found["arguments"], arguments);
    }
    stage.run(&["check"]).await.expect_code(0).expect_text(&[
        "route \"orders\": 4 of queue \"orders\"",
        "dead letters go through exchange \"orders.dlx\" to queue orders.dead",
    ]);
    let relay = stage.start().await;
    let dead = Inbox::open(&stage.channel, "orders.dead").await;
    stage.execute("SELECT watership.emit('order', '1', 'e', '1')").await;
    let partition = partitions(4).name(partitions(4).of_key("order/1"));
    // What a consumer rejects is not dropped.
    let (options, none) = (Default::default(), Default::default());
    let consume = stage.channel.basic_consume(partition.as_str().into(), "".into(), options, none);
    let mut consumer = consume.await.expect("a consumer");
    let delivery = consumer.next().await.expect("a consumer").expect("a delivery");
    let reject = lapin::options::BasicRejectOptions { requeue: false };
    delivery.acker.reject(reject).await.expect("rejected");
    let letters = dead.count(1).await;
    assert_eq!((&*letters[0].body, &*letters[0].routing_key), ("1", &*partition));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn the_documented_rights_are_enough_to_declare_partitions() {
    let vhost = own_vhost().await;
    let node = rabbit().await;
    let (name, user) = (vhost.name.clone(), format!("user-{}", vhost.name));
    let path = format!("/api/users/{user}");
    let made = node.management("PUT", &path, r#"{"password":"pw","tags":""}"#).await;
    made.expect("a user");
    let docs = include_str!("../../docs/configuration.md");
    let (_, rights) = docs.split_once("# partitions\nrabbitmqctl").expect("they are documented");
    let mut rights = rights.split('\'').skip(1).step_by(2);
    // What the test's own queue and exchange need comes on top.
    let mut next = || {
        let pattern = rights.next().expect("three patterns");
        format!("{}|^(watership|all)$", pattern.replace('\\', "\\\\"))
    };
    let (configure, write, read) = (next(), next(), next());
    let path = format!("/api/permissions/{name}/{user}");
    let body = format!(r#"{{"configure":"{configure}","write":"{write}","read":"{read}"}}"#);
    node.management("PUT", &path, &body).await.expect("rights are set");
    let url = vhost.url.replace("guest:guest", &format!("{user}:pw"));
    let setup = Setup { routes: ROUTE, ..Setup::default() };
    let database = own_database().await;
    let stage = Stage::on(database, Vhost { url, name }, setup).await;
    stage.run(&["check"]).await.expect_code(0);
    let relay = stage.start().await;
    let inboxes = consume(&stage, 4).await;
    emit(&stage, 10, 1..=1).await;
    arrived(&inboxes, 10).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn check_names_what_is_wrong_with_a_partition() {
    let vhost = own_vhost().await;
    let node = rabbit().await;
    let name = vhost.name.clone();
    let stage = stage(vhost, ROUTE).await;
    stage.replace_configuration(&stage.configuration().replace(
        "[[route]]\nname = \"fence\"",
        "[[exchange]]\nname = \"orders\"\nkind = \"direct\"\n[[route]]\nname = \"fence\"",
    ));
    let put = async |queue: &str, arguments: &str| {
        let path = format!("/api/queues/{name}/{queue}");
        node.management("DELETE", &path, "").await.expect("deleted");
        let body = format!("{{\"durable\": true, \"arguments\": {arguments}}}");
        node.management("PUT", &path, &body).await.expect("declared");
        let path = format!("/api/bindings/{name}/e/orders/q/{queue}");
        let body = format!("{{\"routing_key\": \"{queue}\"}}");
        node.management("POST", &path, &body).await.expect("bound");
    };
    put("orders.01", r#"{"x-queue-type": "quorum"}"#).await;
    put("orders.02", r#"{"x-queue-type": "classic", "x-single-active-consumer": true}"#).await;
    let extra = format!("/api/queues/{name}/orders.05");
    node.management("PUT", &extra, r#"{"durable": true}"#).await.expect("declared");
    let all = format!("/api/queues/{name}/orders.dead");
    node.management("DELETE", &all, "").await.expect("deleted");
    stage.replace_configuration(
        &stage
            .configuration()
            .replace("name = \"shop\"", "name = \"shop\"\nbroker.topology = \"verify\""),
    );
    stage.run(&["check"]).await.expect_code(1).expect_text(&[
        "queue \"orders.01\" has no x-single-active-consumer",
        "queue \"orders.01\" has no delivery limit of its own",
        "queue \"orders.01\" has no dead-letter exchange",
        "(so have 1 more partitions)",
        "queue \"orders.02\" is a classic queue",
        "queue \"orders.dead\" does not exist",
        "\"orders.dlx\" is missing or leads to no queue",
        "and the broker has 5: \"orders.05\" receive nothing new",
    ]);
    // Without the API, declaring again finds the other arguments.
    let text = stage.configuration().replace("\"verify\"", "\"declare\"");
    let management = text.lines().find(|line| line.starts_with("broker.management_url"));
    stage.replace_configuration(&text.replace(management.expect("it is set"), ""));
    stage.run(&["check"]).await.expect_code(1).expect_text(&["queue \"orders.01\": 406"]);
}

#[tokio::test]
async fn a_relay_that_is_killed_loses_nothing_and_each_key_stays_in_order_in_its_partition() {
    const KEYS: u32 = 40;
    let stage = stage(own_vhost().await, ROUTE).await;
    let inboxes = consume(&stage, 4).await;
    for round in 0..4 {
        let relay = stage.start().await;
        let first = round * 25 + 1;
        emit(&stage, KEYS, first..=first + 24).await;
        let so_far = (first as usize + 5) * KEYS as usize;
        arrived(&inboxes, so_far).await;
        relay.kill();
    }
    let relay = stage.start().await;
    stage.settled().await;
    let mut by_queue = Vec::new();
    for (inbox, name) in inboxes.iter().zip(partitions(4).names()) {
        by_queue.push(inbox.flush(&stage.channel, &name).await);
    }
    judge(&by_queue, KEYS, 100);
    assert!(by_queue.iter().all(|messages| !messages.is_empty()));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn another_number_of_partitions_is_refused_while_messages_are_queued() {
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let stage = stage(vhost, ROUTE).await;
    let relay = stage.start().await;
    emit(&stage, 20, 1..=1).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    let four = stage.configuration();
    for count in [6_u16, 2] {
        let number = format!("partitions = {count}");
        stage.replace_configuration(&four.replace("partitions = 4", &number));
        let configured = format!("4 of \"orders\" are in force, configured {count} of \"orders\"");
        let refused = [&*configured, "while 20 messages are queued", "--accept-reorder"];
        stage.run(&["check"]).await.expect_code(3).expect_text(&refused);
        stage
            .run(&["init", "--admin-url", &stage.database.url])
            .await
            .expect_code(3)
            .expect_text(&refused);
        stage.spawn().ended().await.expect_code(3).expect_text(&refused);
    }
    let fifth = format!("/api/queues/{name}/orders.04");
    let declared = rabbit().await.management("GET", &fifth, "").await;
    assert!(declared.is_err(), "what is refused is not declared");
    // No partitions at all is a change, too.
    let none =
        four.replace("partitions = 4\n", "").replace("queue = \"orders\"\n", "exchange = \"x\"\n");
    stage.replace_configuration(&none);
    stage.spawn().ended().await.expect_code(3).expect_text(&["configured none"]);
    // Back to what it was, nothing is in the way.
    stage.replace_configuration(&four);
    stage.start().await.stop().await.expect_code(0);
    // When the queues are empty, and no consumer may hold a message, it may change.
    for partition in partitions(4).names() {
        let purge = stage.channel.queue_purge(partition.as_str().into(), Default::default());
        purge.await.expect("purged");
    }
    stage.replace_configuration(&four.replace("partitions = 4", "partitions = 6"));
    stage.run(&["check"]).await.expect_code(0).expect_text(&["may be changed: nothing is queued"]);
    stage.start().await.stop().await.expect_code(0);
    consume(&stage, 6).await;
    stage.replace_configuration(&four);
    stage.spawn().ended().await.expect_code(3).expect_text(&["consumers may hold messages"]);
}

#[tokio::test]
async fn an_accepted_change_is_in_force_from_then_on() {
    let stage = stage(own_vhost().await, ROUTE).await;
    let relay = stage.start().await;
    emit(&stage, 20, 1..=1).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    let four = stage.configuration();
    stage.replace_configuration(&four.replace("partitions = 4", "partitions = 6"));
    stage.run(&["check", "--accept-reorder"]).await.expect_code(0);
    let accepted = ["init", "--accept-reorder", "--admin-url", &stage.database.url];
    stage.run(&accepted).await.expect_code(0);
    let relay = stage.start().await;
    emit(&stage, 20, 2..=2).await;
    let inboxes = consume(&stage, 6).await;
    let by_queue = arrived(&inboxes, 40).await;
    for (queue, messages) in by_queue.iter().enumerate() {
        for message in messages {
            let count = if message.body == "1" { 4 } else { 6 };
            let wanted = partitions(count).of_key(&message.text("ws-key"));
            assert_eq!(usize::from(wanted), queue, "{} of {count}", message.text("ws-key"));
        }
    }
    relay.stop().await.expect_code(0);
    // The old number is now the other one.
    stage.replace_configuration(&four);
    stage.spawn().ended().await.expect_code(3).expect_text(&["6 of \"orders\" are in force"]);
}

#[tokio::test]
async fn a_number_that_nobody_recorded_is_read_from_the_queues() {
    let stage = stage(own_vhost().await, ROUTE).await;
    let relay = stage.start().await;
    emit(&stage, 20, 1..=1).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    stage.execute("DELETE FROM watership.partitions").await;
    let four = stage.configuration();
    for count in [6, 2] {
        let number = format!("partitions = {count}");
        stage.replace_configuration(&four.replace("partitions = 4", &number));
        stage.spawn().ended().await.expect_code(3).expect_text(&["4 of \"orders\" are in force"]);
    }
    stage.replace_configuration(&four);
    stage.start().await.stop().await.expect_code(0);
    assert!(stage.holds("(SELECT count FROM watership.partitions) = 4").await);
}

#[tokio::test]
async fn a_partition_that_is_full_holds_up_its_own_keys_only() {
    let more = "arguments = { x-max-length = 3 }\n";
    let stage = stage(own_vhost().await, &format!("{ROUTE}{more}")).await;
    let relay = stage.start().await;
    let key = |queue: u16| {
        let keys = (1..).map(|n: u32| n.to_string());
        let mut keys = keys.filter(|key| partitions(4).of_key(&format!("order/{key}")) == queue);
        keys.next().expect("there is one")
    };
    let (full, free) = (key(0), key(1));
    for number in 1..=40 {
        let emit = format!("SELECT watership.emit('order', '{full}', 'e', '{number}')");
        stage.execute(&emit).await;
    }
    until("the full one is refused", async || {
        relay.status().await["refused"][0]["routing_key"] == "orders.00"
    })
    .await;
    let other = Inbox::open(&stage.channel, "orders.01").await;
    let emit = format!("SELECT watership.emit('order', '{free}', 'e', '1')");
    stage.execute(&emit).await;
    assert_eq!(other.count(1).await.len(), 1);
    let consumed = Inbox::open(&stage.channel, "orders.00").await;
    let bodies: Vec<String> = consumed.count(40).await.into_iter().map(|m| m.body).collect();
    assert_eq!(bodies, (1..=40).map(|n| n.to_string()).collect::<Vec<_>>());
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_partition_that_is_deleted_is_declared_again_as_it_was() {
    let vhost = own_vhost().await;
    let name = vhost.name.clone();
    let stage = stage(vhost, ROUTE).await;
    let relay = stage.start().await;
    let before = queue(&name, "orders.02").await;
    let deleted = stage.channel.queue_delete("orders.02".into(), Default::default());
    deleted.await.expect("deleted");
    emit(&stage, 20, 1..=1).await;
    let declared = async || {
        let path = format!("/api/queues/{name}/orders.02?disable_stats=true");
        rabbit().await.management("GET", &path, "").await.is_ok()
    };
    until("it is declared", declared).await;
    assert_eq!(queue(&name, "orders.02").await["arguments"], before["arguments"]);
    judge(&arrived(&consume(&stage, 4).await, 20).await, 20, 1);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_parked_message_is_retried_into_the_partition_that_its_key_has_by_then() {
    let vhost = own_vhost().await;
    let node = rabbit().await;
    let name = vhost.name.clone();
    let more = "on_unroutable = \"park\"\n";
    let stage = stage(vhost, &format!("{ROUTE}{more}")).await;
    let keys = (1..).map(|n: u32| format!("order/{n}"));
    let moves = |key: &String| partitions(4).of_key(key) != partitions(6).of_key(key);
    let key = keys.into_iter().find(moves).expect("there is one");
    let (old, new) = (partitions(4).of_key(&key), partitions(6).of_key(&key));
    let relay = stage.start().await;
    let old = partitions(4).name(old);
    let unbind = format!("/api/bindings/{name}/e/orders/q/{old}/{old}");
    node.management("DELETE", &unbind, "").await.expect("unbound");
    let id = key.split_once('/').expect("type and id").1;
    stage.execute(&format!("SELECT watership.emit('order', '{id}', 'e', '1')")).await;
    until("it is parked", async || {
        stage.holds("(SELECT count(*) FROM watership.parked WHERE body IS NOT NULL) = 1").await
    })
    .await;
    relay.stop().await.expect_code(0);
    let six = stage.configuration().replace("partitions = 4", "partitions = 6");
    stage.replace_configuration(&six);
    let relay = stage.start().await;
    let inboxes = consume(&stage, 6).await;
    stage.run(&["parked", "retry", "--all"]).await.expect_code(0);
    assert_eq!(inboxes[usize::from(new)].count(1).await[0].body, "1");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn changes_of_a_captured_table_go_by_their_key_and_those_without_one_to_one_partition() {
    let routes = r#"
        [[route]]
        name = "items"
        table = "public.items"
        partitions = 4
        queue = "orders"
        "#;
    let sql = "CREATE TABLE items (id int PRIMARY KEY, note text)";
    let setup = Setup { sql, tables: &["public.items"], routes, ..Setup::default() };
    let stage = Stage::new(setup).await;
    let relay = stage.start().await;
    let inboxes = consume(&stage, 4).await;
    stage.execute("INSERT INTO items SELECT id, 'a' FROM generate_series(1, 20) AS id").await;
    stage.execute("UPDATE items SET note = 'b'").await;
    stage.execute("UPDATE items SET id = 100 WHERE id = 1").await;
    stage.execute("DELETE FROM items WHERE id > 1").await;
    stage.execute("TRUNCATE items").await;
    let by_queue = arrived(&inboxes, 62).await;
    let mut truncated = 0;
    for (queue, messages) in by_queue.iter().enumerate() {
        let mut ops: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for message in messages {
            let key = message.text("ws-key");
            assert_eq!(usize::from(partitions(4).of_key(&key)), queue, "{key}");
            truncated += usize::from(message.text("ws-op") == "truncate");
            ops.entry(key).or_default().push(message.text("ws-op"));
        }
        for (key, ops) in ops.iter().filter(|(key, _)| *key != "public.items") {
            let wanted: &[&str] = match key.as_str() {
                "public.items/1" => &["insert", "update"],
                "public.items/100" => &["update", "delete"],
                _ => &["insert", "update", "delete"],
            };
            assert_eq!(ops, wanted, "{key}");
        }
    }
    assert_eq!(truncated, 1);
    relay.stop().await.expect_code(0);
}
