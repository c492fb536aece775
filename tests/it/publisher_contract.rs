//! What every `Publisher` must keep: the same cases for RabbitMQ and for the one that prints.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use futures_util::FutureExt as _;
use lapin::options::BasicGetOptions;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use watership::amqp::printer::Printer;
use watership::amqp::publisher::Connection;
use watership::amqp::topology::{self, Topology};
use watership::publisher::{Outcome, Publisher, Ticket};

use crate::amqp::{binding, direct, message, options, queue};
use crate::support::servers::{self, Vhost};
use crate::support::waiting::LIMIT;

const MESSAGES: u64 = 2_000;

/// Sends the messages with these numbers in sequence, and collects an outcome for each.
async fn send_all<P: Publisher>(publisher: &mut P, numbers: std::ops::Range<u64>) {
    let mut open: BTreeSet<Ticket> = BTreeSet::new();
    let mut outcomes = Vec::new();
    let collect = |outcomes: &mut Vec<(Ticket, Outcome)>, open: &mut BTreeSet<Ticket>| {
        for (ticket, outcome) in outcomes.drain(..) {
            assert!(open.remove(&ticket), "an outcome that nobody asked for: {ticket:?}");
            assert_eq!(outcome, Outcome::Confirmed);
        }
    };
    for number in numbers {
        let mut message = message(0, "all", number, number.to_string().as_bytes());
        message.in_sequence = true;
        assert!(open.insert(Ticket(number)));
        publisher.send(Ticket(number), &message);
        // A future that is dropped half-way loses neither bytes nor outcomes.
        if number % 7 == 0 {
            let polled = publisher.next_outcomes(&mut outcomes).now_or_never();
            polled.unwrap_or(Ok(())).expect("a living connection");
            collect(&mut outcomes, &mut open);
        }
    }
    while !open.is_empty() {
        let next = timeout(LIMIT, publisher.next_outcomes(&mut outcomes)).await;
        next.expect("an outcome comes").expect("a living connection");
        assert!(!outcomes.is_empty(), "at least one outcome each time");
        collect(&mut outcomes, &mut open);
    }
}

/// The cases that all must pass; afterwards everything was sent once, in order.
async fn keeps_the_contract<P: Publisher>(mut publisher: P) {
    let mut outcomes = Vec::new();
    let nothing = publisher.next_outcomes(&mut outcomes).now_or_never();
    assert!(nothing.is_none() && outcomes.is_empty(), "no outcome before the first message");
    assert!(!publisher.is_blocked());
    assert!(publisher.max_body() > 1024);
    send_all(&mut publisher, 0..1).await;
    send_all(&mut publisher, 1..MESSAGES).await;
    let nothing = publisher.next_outcomes(&mut outcomes).now_or_never();
    assert!(nothing.is_none() && outcomes.is_empty(), "no outcome is invented");
    publisher.close().await;
}

async fn vhost_with_queue() -> Vhost {
    let vhost = servers::own_vhost().await;
    let topology = Topology {
        exchanges: vec![direct("events")],
        queues: vec![queue("all")],
        bindings: vec![binding("all", "events")],
        ..Topology::default()
    };
    topology::apply(&options(&vhost, &["events"]), &topology).await.expect("declared");
    vhost
}

#[tokio::test]
async fn rabbitmq_keeps_the_contract_of_a_publisher() {
    let vhost = vhost_with_queue().await;
    keeps_the_contract(Connection::open(&options(&vhost, &["events"])).await.expect("open")).await;
    let (_connection, channel) = vhost.connect().await;
    for number in 0..MESSAGES {
        let got = channel.basic_get("all".into(), BasicGetOptions { no_ack: true }).await;
        let got = got.expect("an answer").expect("a message");
        assert_eq!(got.delivery.data, number.to_string().as_bytes());
    }
    let more = channel.basic_get("all".into(), BasicGetOptions { no_ack: true }).await;
    assert!(more.expect("an answer").is_none());
}

type Lines = Arc<Mutex<Vec<String>>>;

/// A printer, its lines, and whether it is over.
fn printer(
    limit: Option<u64>,
) -> (Printer<impl FnMut(&str) -> io::Result<()>>, Lines, watch::Receiver<bool>) {
    let lines = Lines::default();
    let (sender, over) = watch::channel(false);
    let kept = lines.clone();
    let print = move |line: &str| {
        kept.lock().expect("nobody panics").push(line.to_owned());
        Ok(())
    };
    let printer = Printer::new(print, vec!["events".into()], 16 << 20, limit, Arc::new(sender));
    (printer, lines, over)
}

#[tokio::test]
async fn the_printer_keeps_the_contract_of_a_publisher() {
    let (printer, lines, over) = printer(None);
    keeps_the_contract(printer).await;
    assert!(!*over.borrow());
    let lines = lines.lock().expect("nobody panics");
    assert_eq!(lines.len() as u64, MESSAGES);
    for (number, line) in lines.iter().enumerate() {
        let line: Value = serde_json::from_str(line).expect("one JSON object a line");
        assert_eq!(line["body"], number.to_string());
        assert_eq!((&line["exchange"], &line["routing_key"]), (&"events".into(), &"all".into()));
        assert_eq!(line["properties"]["type"], "tested");
    }
}

#[tokio::test]
async fn the_printer_ends_at_its_limit_and_when_nobody_reads() {
    let (limited, lines, over) = printer(Some(3));
    keeps_the_contract(limited).await;
    assert!(*over.borrow());
    assert_eq!(lines.lock().expect("nobody panics").len(), 3);

    let (sender, over) = watch::channel(false);
    let closed = |_: &str| Err(io::ErrorKind::BrokenPipe.into());
    let exchanges = || vec!["events".to_owned()];
    let printer = Printer::new(closed, exchanges(), 16 << 20, None, Arc::new(sender));
    keeps_the_contract(printer).await;
    assert!(*over.borrow());

    let full = |_: &str| Err(io::ErrorKind::StorageFull.into());
    let sender = Arc::new(watch::Sender::new(false));
    let mut printer = Printer::new(full, exchanges(), 16 << 20, None, sender);
    printer.send(Ticket(1), &message(0, "all", 1, b"x"));
    let error = printer.next_outcomes(&mut Vec::new()).await.expect_err("it cannot print");
    assert!(error.to_string().starts_with("the messages cannot be printed"), "{error}");
}

#[test]
fn a_body_that_is_not_text_is_printed_as_base64() {
    let (mut printer, lines, _) = printer(None);
    printer.send(Ticket(1), &message(0, "all", 1, b"\xff\x00"));
    let line: Value = serde_json::from_str(&lines.lock().expect("nobody panics")[0]).expect("JSON");
    assert_eq!(line["body_base64"], "/wA=");
    assert!(line.get("body").is_none());
}
