//! The publisher and the topology against a real broker.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use lapin::options::{BasicGetOptions, QueueDeclareOptions, QueueDeleteOptions};
use uuid::Uuid;
use watership::amqp::options::{Options, Url};
use watership::amqp::publisher::Connection;
use watership::amqp::reply;
use watership::amqp::topology::{
    self, Argument, Binding, Destination, Exchange, Mode, Queue, QueueKind, Topology,
};
use watership::error::{Error, Kind};
use watership::message::{Builder, ExchangeId, Message, Properties, RouteId};
use watership::publisher::{Outcome, Publisher, Ticket};

use crate::support::servers::{self, Vhost};
use crate::support::waiting::LIMIT;

const WINDOW: usize = 1000;

pub fn options(vhost: &Vhost, exchanges: &[&str]) -> Options {
    let mut options = Options::new(vec![Url::parse(&vhost.url).expect("a good URL")]);
    options.exchanges = exchanges.iter().map(|e| (*e).to_owned()).collect();
    options.connect_timeout = LIMIT;
    options
}

pub fn message(exchange: u16, routing_key: &str, n: u64, body: &[u8]) -> Message {
    let properties = Properties {
        content_type: "application/octet-stream",
        message_id: Uuid::from_u128(n.into()),
        timestamp: 1_700_000_000,
        kind: "tested",
        app_id: "it",
    };
    Builder::new(&mut Vec::new(), routing_key, properties)
        .and_then(|b| b.finish(ExchangeId(exchange), RouteId(0), |out| out.extend(body)))
        .expect("a good message")
}

pub fn queue(name: &str) -> Queue {
    Queue { name: name.into(), kind: QueueKind::Quorum, max_length: None, arguments: Vec::new() }
}

pub fn direct(name: &str) -> Exchange {
    let (name, kind, arguments) = (name.into(), "direct".into(), Vec::new());
    Exchange { name, kind, durable: true, arguments }
}

pub fn binding(queue: &str, exchange: &str) -> Binding {
    Binding {
        destination: Destination::Queue(queue.into()),
        exchange: exchange.into(),
        routing_key: queue.into(),
        arguments: Vec::new(),
    }
}

async fn refused(options: &Options) -> Error {
    let error = Connection::open(options).await.err().expect("a refusal");
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    error
}

/// Publishes all with a window, and returns the outcome of each, by its place.
async fn publish_all(connection: &mut Connection, messages: &[Message]) -> Vec<Outcome> {
    let mut all: Vec<Option<Outcome>> = vec![None; messages.len()];
    let (mut sent, mut settled) = (0, 0);
    let mut outcomes = Vec::new();
    while settled < messages.len() {
        while sent < messages.len() && sent - settled < WINDOW {
            connection.send(Ticket(sent as u64), &messages[sent]);
            sent += 1;
        }
        connection.next_outcomes(&mut outcomes).await.expect("a living connection");
        for (ticket, outcome) in outcomes.drain(..) {
            let twice = all[ticket.0 as usize].replace(outcome);
            assert_eq!(twice, None, "second outcome for {ticket:?}");
            settled += 1;
        }
    }
    all.into_iter().map(|o| o.expect("one outcome each")).collect()
}

async fn depth(vhost: &Vhost, queue: &str) -> u32 {
    let (_connection, channel) = vhost.connect().await;
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let declared = channel.queue_declare(queue.into(), passive, Default::default()).await;
    declared.expect("the queue").message_count()
}

#[tokio::test]
async fn ten_thousand_publishes_to_a_quorum_queue_are_confirmed_and_stored() {
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &["events"]);
    let topology = Topology {
        exchanges: vec![direct("events")],
        queues: vec![queue("all")],
        bindings: vec![binding("all", "events")],
        ..Topology::default()
    };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    let messages: Vec<_> = (1..=10_000).map(|n| message(0, "all", n, &[b'x'; 330])).collect();
    let outcomes = publish_all(&mut connection, &messages).await;
    assert!(outcomes.iter().all(|o| *o == Outcome::Confirmed));
    assert_eq!(connection.unconfirmed(), 0);
    connection.close().await;
    assert_eq!(depth(&vhost, "all").await, 10_000);
}

/// <https://github.com/amqp-rs/lapin/issues/254>
#[tokio::test]
async fn museum_m15_returned_are_exactly_the_unroutable_ones_among_fifty_thousand() {
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &["events"]);
    let topology = Topology {
        exchanges: vec![direct("events")],
        queues: vec![queue("all")],
        bindings: vec![binding("all", "events")],
        ..Topology::default()
    };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    for every in [2, 7] {
        let key = |n: u64| if n.is_multiple_of(every) { "nowhere" } else { "all" };
        let messages: Vec<_> = (0..50_000).map(|n| message(0, key(n), n, &[b'x'; 330])).collect();
        let outcomes = publish_all(&mut connection, &messages).await;
        let truly: BTreeSet<u64> = (0..50_000).filter(|n: &u64| n.is_multiple_of(every)).collect();
        let said = |wanted: fn(&Outcome) -> bool| -> BTreeSet<u64> {
            (0..).zip(&outcomes).filter(|(_, o)| wanted(o)).map(|(n, _)| n).collect()
        };
        assert_eq!(said(|o| *o == Outcome::Returned("NO_ROUTE".into())), truly);
        assert_eq!(said(|o| *o == Outcome::Confirmed).len(), 50_000 - truly.len());
    }
    connection.close().await;
    assert_eq!(depth(&vhost, "all").await, 25_000 + 42_857);
}

#[tokio::test]
async fn missing_exchange_concerns_its_own_messages_only_until_it_is_there() {
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &["here", "missing"]);
    let topology = Topology {
        exchanges: vec![direct("here")],
        queues: vec![queue("q")],
        bindings: vec![binding("q", "here")],
        ..Topology::default()
    };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    let messages: Vec<_> = (0..400).map(|n| message((n % 2) as u16, "q", n, b"x")).collect();
    for _ in 0..3 {
        let outcomes = publish_all(&mut connection, &messages).await;
        for (n, outcome) in outcomes.iter().enumerate() {
            match (n % 2, outcome) {
                (0, Outcome::Confirmed) => {}
                (1, Outcome::ChannelClosed { code: reply::NOT_FOUND, text }) => {
                    assert!(text.contains("no exchange 'missing'"), "{text}");
                }
                (n, outcome) => panic!("{n}: {outcome:?}"),
            }
        }
    }
    let created = Topology {
        exchanges: vec![direct("missing")],
        bindings: vec![binding("q", "missing")],
        ..Topology::default()
    };
    topology::apply(&options, &created).await.unwrap();
    let outcomes = publish_all(&mut connection, &messages).await;
    assert!(outcomes.iter().all(|o| *o == Outcome::Confirmed), "{outcomes:?}");
    connection.close().await;
}

/// <https://github.com/amqp-rs/lapin/issues/246>
#[tokio::test]
async fn museum_m14_forbidden_exchange_closes_its_channel_and_says_so() {
    let vhost = servers::own_vhost().await;
    let node = servers::rabbit().await;
    let options_guest = options(&vhost, &["open", "secret"]);
    let topology = Topology {
        exchanges: vec![direct("open"), direct("secret")],
        queues: vec![queue("q")],
        bindings: vec![binding("q", "open"), binding("q", "secret")],
        ..Topology::default()
    };
    topology::apply(&options_guest, &topology).await.unwrap();
    let user = format!("writer-{}", vhost.name);
    let body = r#"{"password":"hunter2","tags":""}"#;
    node.management("PUT", &format!("/api/users/{user}"), body).await.unwrap();
    let path = format!("/api/permissions/{}/{user}", vhost.name);
    let rights = r#"{"configure":"^watership\\..*","write":"^open$","read":"^$"}"#;
    node.management("PUT", &path, rights).await.unwrap();

    let mut options = options_guest;
    options.urls[0].username = user.clone();
    options.urls[0].password = watership::secret::Secret::new("hunter2");
    options.lock_queue = Some("watership.shop.lock".into());
    let mut connection = Connection::open(&options).await.unwrap();
    let messages = [message(0, "q", 1, b"x"), message(1, "q", 2, b"x"), message(0, "q", 3, b"x")];
    let outcomes = publish_all(&mut connection, &messages).await;
    assert_eq!((&outcomes[0], &outcomes[2]), (&Outcome::Confirmed, &Outcome::Confirmed));
    assert!(
        matches!(outcomes[1], Outcome::ChannelClosed { code: reply::ACCESS_REFUSED, .. }),
        "{outcomes:?}"
    );
    connection.close().await;

    options.lock_queue = Some("other.lock".into());
    let error = refused(&options).await;
    assert!(error.to_string().contains("lock queue \"other.lock\": ACCESS_REFUSED"), "{error}");
    assert!(error.hint_text().unwrap().contains("configure"), "{error:?}");
}

#[tokio::test]
async fn full_queue_that_rejects_nacks_and_its_nacks_are_not_success() {
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &[""]);
    let full = Queue {
        kind: QueueKind::Classic,
        max_length: Some(5),
        arguments: vec![("x-expires".into(), Argument::Int(600_000))],
        ..queue("full")
    };
    let topology = Topology { queues: vec![full], ..Topology::default() };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    let messages: Vec<_> = (0..100).map(|n| message(0, "full", n, b"x")).collect();
    let outcomes = publish_all(&mut connection, &messages).await;
    let confirmed = outcomes.iter().filter(|o| **o == Outcome::Confirmed).count();
    let nacked = outcomes.iter().filter(|o| **o == Outcome::Nacked).count();
    assert_eq!(confirmed + nacked, 100, "{outcomes:?}");
    assert_eq!(confirmed as u32, depth(&vhost, "full").await);
    assert!(nacked >= 90, "{nacked}");
    connection.close().await;
}

#[tokio::test]
async fn second_relay_of_the_same_name_is_turned_away_until_the_first_has_closed() {
    let vhost = servers::own_vhost().await;
    let mut options = options(&vhost, &["amq.topic"]);
    options.lock_queue = Some("watership.shop.lock".into());
    let first = Connection::open(&options).await.unwrap();
    let error = Connection::open(&options).await.err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    let text = "another relay named \"shop\" holds the lock queue \"watership.shop.lock\"";
    assert!(error.to_string().ends_with(text), "{error}");
    first.close().await;
    // No waiting: close-ok comes after the broker has deleted the exclusive queue.
    Connection::open(&options).await.unwrap().close().await;
}

#[tokio::test]
async fn wrong_password_and_wrong_vhost_are_told_apart() {
    let vhost = servers::own_vhost().await;
    let mut wrong = options(&vhost, &[]);
    wrong.urls[0].password = watership::secret::Secret::new("hunter2");
    let error = refused(&wrong).await;
    assert!(error.to_string().contains("403 ACCESS_REFUSED"), "{error}");
    assert!(error.hint_text().unwrap().contains("user \"guest\" and its password"), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"));
    let error = topology::apply(&wrong, &Topology::default()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");

    let mut wrong = options(&vhost, &[]);
    wrong.urls[0].vhost = "nowhere".into();
    let error = refused(&wrong).await;
    assert!(error.to_string().contains("530 NOT_ALLOWED - vhost nowhere not found"), "{error}");
    assert!(
        error.hint_text().unwrap().contains("create the virtual host \"nowhere\""),
        "{error:?}"
    );
    let error = topology::apply(&wrong, &Topology::default()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
}

#[tokio::test]
async fn bodies_of_every_size_around_a_frame_arrive_intact() {
    const FRAME: usize = 131_072 - 8;
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &[""]);
    let topology = Topology { queues: vec![queue("big")], ..Topology::default() };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    let sizes = [0, 1, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME, 5_000_000];
    let body = |size: usize| -> Vec<u8> { (0..size).map(|i| (i % 251) as u8).collect() };
    let messages: Vec<_> =
        (0..).zip(sizes).map(|(n, size)| message(0, "big", n, &body(size))).collect();
    let outcomes = publish_all(&mut connection, &messages).await;
    assert!(outcomes.iter().all(|o| *o == Outcome::Confirmed), "{outcomes:?}");
    connection.close().await;

    let (_connection, channel) = vhost.connect().await;
    for (n, size) in (0u128..).zip(sizes) {
        let got = channel.basic_get("big".into(), BasicGetOptions { no_ack: true }).await;
        let got = got.expect("an answer").expect("a message");
        assert!(got.data == body(size), "body of {size} bytes");
        let id = got.properties.message_id().as_ref().map(ToString::to_string);
        assert_eq!(id, Some(Uuid::from_u128(n).to_string()));
        assert_eq!(*got.properties.delivery_mode(), Some(2));
    }
}

#[tokio::test]
async fn alarm_longer_than_the_confirm_deadline_holds_publishes_and_lets_them_go() {
    use watership::dev::{Rabbit, RabbitOptions};
    let node = Rabbit::start(RabbitOptions::default()).await.unwrap();
    let vhost = Vhost { name: "/".into(), url: node.url("/") };
    let mut options = options(&vhost, &[""]);
    options.confirm_timeout = Duration::from_secs(8);
    let topology = Topology { queues: vec![queue("q")], ..Topology::default() };
    topology::apply(&options, &topology).await.unwrap();
    let mut connection = Connection::open(&options).await.unwrap();
    publish_all(&mut connection, &[message(0, "q", 1, b"x")]).await;
    let mut outcomes = Vec::new();
    // The connection is polled meanwhile: nobody else sends its heartbeats.
    let mut alarm = Box::pin(node.ctl(&["set_vm_memory_high_watermark", "absolute", "1"]));
    loop {
        tokio::select! {
            done = &mut alarm => break done.map(drop).unwrap(),
            result = connection.next_outcomes(&mut outcomes) => result.unwrap(),
        }
    }
    // Each poll is given up after a moment, to check whether the broker has blocked us.
    connection.send(Ticket(2), &message(0, "q", 2, b"x"));
    while !connection.is_blocked() {
        let poll = connection.next_outcomes(&mut outcomes);
        if let Ok(result) = tokio::time::timeout(Duration::from_millis(20), poll).await {
            result.unwrap();
        }
    }
    connection.send(Ticket(3), &message(0, "q", 3, b"x"));
    let blocked = Instant::now();
    while blocked.elapsed() < options.confirm_timeout * 3 / 2 {
        let poll = connection.next_outcomes(&mut outcomes);
        if let Ok(result) = tokio::time::timeout(Duration::from_millis(20), poll).await {
            result.unwrap();
        }
        assert!(outcomes.iter().all(|(ticket, _)| *ticket != Ticket(3)), "{outcomes:?}");
    }
    let clear = node.ctl(&["set_vm_memory_high_watermark", "0.6"]);
    let confirm = async {
        while outcomes.len() < 2 {
            connection.next_outcomes(&mut outcomes).await.unwrap();
        }
    };
    let (cleared, ()) = tokio::join!(clear, confirm);
    cleared.unwrap();
    let confirmed = |n| (Ticket(n), Outcome::Confirmed);
    assert_eq!(outcomes, [confirmed(2), confirmed(3)]);
}

#[tokio::test]
async fn stopped_broker_ends_the_session_with_its_reason() {
    use watership::dev::{Rabbit, RabbitOptions};
    let mut node = Rabbit::start(RabbitOptions::default()).await.unwrap();
    let vhost = Vhost { name: "/".into(), url: node.url("/") };
    let mut connection = Connection::open(&options(&vhost, &[""])).await.unwrap();
    let mut outcomes = Vec::new();
    let (stopped, result) = tokio::join!(node.stop(), connection.next_outcomes(&mut outcomes));
    stopped.unwrap();
    let error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert!(error.to_string().contains("320 CONNECTION_FORCED"), "{error}");
    assert!(outcomes.is_empty());
}

#[tokio::test]
async fn verify_names_what_is_missing_and_declare_quotes_what_differs() {
    let vhost = servers::own_vhost().await;
    let options = options(&vhost, &[]);
    let mut topology = Topology {
        mode: Mode::Verify,
        exchanges: vec![direct("events")],
        queues: vec![queue("all")],
        bindings: vec![binding("all", "events")],
    };
    let missing = topology::apply(&options, &topology).await.unwrap_err();
    assert_eq!(missing.kind(), Kind::Refused);
    let text = format!("exchange \"events\" does not exist in vhost {:?}", vhost.name);
    assert!(missing.to_string().contains(&text), "{missing}");
    assert!(missing.to_string().contains("queue \"all\" does not exist"), "{missing}");
    assert!(missing.hint_text().unwrap().contains("topology = \"declare\""));

    topology.mode = Mode::Declare;
    for _ in 0..2 {
        topology::apply(&options, &topology).await.unwrap();
    }
    topology.mode = Mode::Verify;
    topology::apply(&options, &topology).await.unwrap();

    let (_connection, channel) = vhost.connect().await;
    channel.queue_delete("all".into(), QueueDeleteOptions::default()).await.unwrap();
    let missing = topology::apply(&options, &topology).await.unwrap_err();
    let text = format!("queue \"all\" does not exist in vhost {:?}", vhost.name);
    assert!(missing.to_string().ends_with(&text), "{missing}");

    topology.mode = Mode::Declare;
    topology.exchanges[0].kind = "topic".into();
    let other = topology::apply(&options, &topology).await.unwrap_err();
    assert_eq!(other.kind(), Kind::Refused);
    for part in ["406", "inequivalent", "'topic'", "'direct'", "exchange \"events\""] {
        assert!(other.to_string().contains(part), "{other}");
    }
}
