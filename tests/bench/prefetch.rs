//! What becomes of the order when consumers of a single-active-consumer quorum queue die: one node
//! of the RabbitMQ that is installed (`WATERSHIP_RABBITMQ_BIN` names another), a queue declared as
//! a partition, numbered messages, and consumer processes that are ended with kill -9.
//!
//! A consumer prints the number of a message, which stands for its effect, and then acknowledges
//! it. It does so for some, and holds the rest, as many as its prefetch allows. What is counted is
//! an effect after that of a later message; repeats are left out.
//!
//! `cargo run --locked --example prefetch [-- --runs N]` prints what each consumer got in a few
//! chosen cases, and then how often N random runs of each kind were out of order. See "Partitions"
//! in docs/consuming.md.

use std::collections::{BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::select_all;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection};
use tokio::time::{interval, timeout};
use watership::dev::{Rabbit, RabbitOptions};

/// Messages of one run.
const MESSAGES: u32 = 200;
/// Consumers of a random run that are killed.
const KILLS: usize = 20;
/// Between two messages that are published while consumers die.
const PACE: Duration = Duration::from_millis(8);
/// No delivery for this long: the consumer has what its prefetch allows.
const SETTLED: Duration = Duration::from_millis(100);
/// All of this program's waits together may take so long.
const LIMIT: Duration = Duration::from_secs(1800);

/// A consumer that will be killed: how many it may hold, how many it handles before, and whether it
/// is killed as soon as it has, or when it has all that its prefetch allows.
#[derive(Debug, Clone, Copy)]
struct Plan {
    prefetch: u16,
    handles: u32,
    at_once: bool,
}

/// What one consumer did.
struct Life {
    plan: Plan,
    handled: Vec<u32>,
    held: Vec<u32>,
}

#[tokio::main]
async fn main() {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[1..] {
        ["--consume", url, queue, prefetch, handles] => {
            let number = |text: &str| text.parse().expect("a number");
            consume(url, queue, number(prefetch), u32::from(number(handles))).await;
        }
        ["--runs", runs] => timed(runs.parse().expect("a number")).await,
        [] => timed(10).await,
        _ => panic!("usage: prefetch [--runs N]"),
    }
}

async fn timed(runs: u32) {
    timeout(LIMIT, experiment(runs)).await.expect("it ends in time");
}

async fn experiment(runs: u32) {
    let node = Rabbit::start(RabbitOptions::default()).await.unwrap_or_else(|e| panic!("{e:?}"));
    let url = node.url("/");
    let connected = Connection::connect(&url, Default::default()).await;
    let connection = connected.expect("a connection");
    println!("RabbitMQ {}", node.ctl(&["version"]).await.unwrap_or_default().trim());
    let chosen: [(&str, &[(u16, u32)]); 5] = [
        ("equal, 100", &[(100, 5), (100, 5), (100, MESSAGES)]),
        ("unequal, smaller second", &[(100, 5), (10, 5), (10, MESSAGES)]),
        ("unequal, larger second", &[(10, 5), (100, 5), (100, MESSAGES)]),
        (
            "unequal, smaller second, which handles all that it has",
            &[(100, 0), (10, 10), (10, MESSAGES)],
        ),
        ("one at a time", &[(1, 5), (1, 5), (1, MESSAGES)]),
    ];
    for standby in [false, true] {
        println!(
            "\n{}:",
            if standby { "all attached from the start" } else { "one after another" }
        );
        for (what, plans) in chosen {
            let plans: Vec<Plan> =
                plans.iter().map(|&(prefetch, handles)| plan(prefetch, handles)).collect();
            let lives = run(&connection, &url, &plans, standby, MESSAGES).await;
            println!("  {what}: {}", judged(&lives));
            for Life { plan, handled, held } in &lives {
                let (handled, held) = (ranges(handled), ranges(held));
                println!("    prefetch {:>3}: handled {handled}; held {held}", plan.prefetch);
            }
        }
    }
    random(&connection, &url, runs).await;
    println!("\nleft of {MESSAGES} after {} kills of consumers that handle none:", KILLS + 1);
    for (what, limit) in [("x-delivery-limit 1000", Some(1000)), ("no x-delivery-limit", None)] {
        for prefetch in [1, 100] {
            let left = left(&connection, &url, prefetch, limit).await;
            println!("  {what:<21} prefetch {prefetch:>3}: {left}");
        }
    }
}

/// How often consumers of each kind, killed at random, are out of order.
async fn random(connection: &Connection, url: &str, runs: u32) {
    println!("\n{runs} random runs of each, {KILLS} kills in each, while messages are published:");
    let kinds: [(&str, &[u16]); 7] = [
        ("prefetch 1", &[1]),
        ("prefetch 2", &[2]),
        ("prefetch 10", &[10]),
        ("prefetch 100", &[100]),
        ("1 or 2", &[1, 2]),
        ("10 or 20", &[10, 20]),
        ("1, 10 or 100", &[1, 10, 100]),
    ];
    for (what, choices) in kinds {
        for standby in [false, true] {
            let (mut wrong, mut inversions) = (0, 0);
            for _ in 0..runs {
                let choose = |_| {
                    let prefetch = *fastrand::choice(choices).expect("there are some");
                    // As often all that it has as a part of it.
                    let most = u32::from(prefetch.min(16));
                    Plan { prefetch, handles: fastrand::u32(0..=most), at_once: fastrand::bool() }
                };
                let mut plans: Vec<Plan> = (0..KILLS).map(choose).collect();
                let last = *fastrand::choice(choices).expect("there are some");
                plans.push(plan(last, MESSAGES));
                let first = MESSAGES / 4;
                let lives = run(connection, url, &plans, standby, first).await;
                let found = out_of_order(&lives);
                wrong += u32::from(found > 0);
                inversions += found;
            }
            let how = if standby { "attached from the start" } else { "one after another" };
            println!("  {what:<13} {how:<24} {wrong} runs out of order, {inversions} inversions");
        }
    }
}

fn plan(prefetch: u16, handles: u32) -> Plan {
    Plan { prefetch, handles, at_once: false }
}

/// Publishes messages with these numbers, one every few milliseconds if `slowly`.
async fn publish(channel: Channel, queue: String, numbers: RangeInclusive<u32>, slowly: bool) {
    let mut pace = interval(PACE);
    for number in numbers {
        if slowly {
            pace.tick().await;
        }
        let (body, properties) = (number.to_string(), BasicProperties::default());
        let options = BasicPublishOptions::default();
        let name = queue.as_str().into();
        let sent = channel.basic_publish("".into(), name, options, body.as_bytes(), properties);
        sent.await.expect("sent").await.expect("confirmed");
    }
}

async fn declare(channel: &Channel, queue: &str, delivery_limit: Option<i64>) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    if let Some(limit) = delivery_limit {
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(limit));
    }
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    let declared = channel.queue_declare(queue.into(), options, arguments).await;
    declared.expect("the queue is declared");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
}

/// Messages that are left of [`MESSAGES`] after consumers with this prefetch were killed that
/// handled none, one more than RabbitMQ 4 allows by default.
async fn left(connection: &Connection, url: &str, prefetch: u16, limit: Option<i64>) -> u32 {
    let queue = format!("left-{}", fastrand::u64(..));
    let channel = connection.create_channel().await.expect("a channel");
    declare(&channel, &queue, limit).await;
    publish(channel.clone(), queue.clone(), 1..=MESSAGES, false).await;
    for _ in 0..=KILLS {
        let mut consumer = start(url, &queue, plan(prefetch, 0)).await;
        while consumer.lines.next().await.is_some_and(|line| line != "settled") {}
        end(&mut consumer.child);
    }
    // What was held comes back when the broker has noticed the last end.
    let mut consumer = start(url, &queue, plan(2000, 0)).await;
    let mut left = 0;
    while consumer.lines.next().await.is_some_and(|line| line != "settled") {
        left += 1;
    }
    end(&mut consumer.child);
    channel.queue_delete(queue.as_str().into(), Default::default()).await.expect("deleted");
    left
}

/// One queue until it is empty, which holds `first` messages when the first consumer comes.
async fn run(
    connection: &Connection,
    url: &str,
    plans: &[Plan],
    standby: bool,
    first: u32,
) -> Vec<Life> {
    let queue = format!("run-{}", fastrand::u64(..));
    let channel = connection.create_channel().await.expect("a channel");
    declare(&channel, &queue, Some(1000)).await;
    publish(channel.clone(), queue.clone(), 1..=first, false).await;
    let rest = tokio::spawn(publish(channel.clone(), queue.clone(), first + 1..=MESSAGES, true));
    let (last, killed) = plans.split_last().expect("there are some");
    let mut waiting: VecDeque<Plan> = killed.iter().copied().collect();
    let mut attached = Vec::new();
    let mut lives = Vec::new();
    let mut seen: BTreeSet<u32> = BTreeSet::new();
    while (seen.len() as u32) < MESSAGES {
        let all = if standby { waiting.len() } else { 1 };
        if attached.is_empty() {
            let mut next: Vec<Plan> = waiting.drain(..all.min(waiting.len())).collect();
            if next.is_empty() {
                next.push(*last);
            }
            for plan in next {
                attached.push(start(url, &queue, plan).await);
            }
        }
        // Which of them becomes active is up to the broker.
        let first = select_all(attached.iter_mut().map(|one| Box::pin(one.lines.next())));
        let (line, index, _) = first.await;
        let Consumer { plan, mut child, mut lines } = attached.swap_remove(index);
        let (mut handled, mut held) = (Vec::new(), Vec::new());
        let mut line = line;
        loop {
            let number = |text: &str| text.parse().expect("a number");
            match line.as_deref().unwrap_or_default().split_once(' ') {
                Some(("handled", text)) => handled.push(number(text)),
                Some(("held", text)) => held.push(number(text)),
                _ => break,
            }
            seen.extend(handled.last());
            let is_done = handled.len() as u32 == plan.handles && plan.at_once;
            if is_done || seen.len() as u32 == MESSAGES {
                break;
            }
            line = lines.next().await;
        }
        end(&mut child);
        lives.push(Life { plan, handled, held });
    }
    rest.await.expect("all is published");
    attached.iter_mut().for_each(|one| end(&mut one.child));
    channel.queue_delete(queue.as_str().into(), Default::default()).await.expect("deleted");
    lives
}

/// The lines that a consumer prints.
struct Lines(tokio::io::Lines<tokio::io::BufReader<tokio::process::ChildStdout>>);

impl Lines {
    fn of(out: ChildStdout) -> Self {
        use tokio::io::AsyncBufReadExt as _;
        let out = tokio::process::ChildStdout::from_std(out).expect("a pipe");
        Self(tokio::io::BufReader::new(out).lines())
    }

    async fn next(&mut self) -> Option<String> {
        self.0.next_line().await.expect("its output is text")
    }
}

/// A consumer process.
struct Consumer {
    plan: Plan,
    child: Child,
    lines: Lines,
}

/// Ends it with kill -9.
fn end(child: &mut Child) {
    child.kill().expect("it is killed");
    child.wait().expect("it has ended");
}

/// Starts a consumer and waits until it is attached.
async fn start(url: &str, queue: &str, plan: Plan) -> Consumer {
    let program = std::env::current_exe().expect("this program");
    let (prefetch, handles) = (plan.prefetch.to_string(), plan.handles.to_string());
    let mut command = Command::new(program);
    command.args(["--consume", url, queue, &prefetch, &handles]).stdout(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut lines = Lines::of(child.stdout.take().expect("a pipe"));
    assert_eq!(lines.next().await.as_deref(), Some("attached"));
    Consumer { plan, child, lines }
}

/// The consumer process.
async fn consume(url: &str, queue: &str, prefetch: u16, handles: u32) {
    let connected = Connection::connect(url, Default::default()).await;
    let connection = connected.expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    channel.basic_qos(prefetch, BasicQosOptions::default()).await.expect("a prefetch");
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let consume = channel.basic_consume(queue.into(), "".into(), options, none);
    let mut consumer = consume.await.expect("a consumer");
    println!("attached");
    let (mut handled, mut held) = (0, Vec::new());
    loop {
        // As a standby it may wait for long, and for a message that is not published yet.
        let next = match handled < handles || (handled == 0 && held.is_empty()) {
            true => Ok(consumer.next().await),
            false => timeout(SETTLED, consumer.next()).await,
        };
        let Ok(next) = next else { break };
        let delivery = next.expect("a consumer").expect("a delivery");
        let number = String::from_utf8_lossy(&delivery.data).into_owned();
        if handled < handles {
            println!("handled {number}");
            delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
            handled += 1;
        } else {
            println!("held {number}");
            held.push(delivery);
        }
    }
    println!("settled");
    // Until it is killed.
    std::future::pending::<()>().await;
}

/// First effects after that of a later message.
fn out_of_order(lives: &[Life]) -> u32 {
    let mut seen = BTreeSet::new();
    let mut count = 0;
    for number in lives.iter().flat_map(|life| &life.handled) {
        let later = seen.last().is_some_and(|last| last > number);
        count += u32::from(seen.insert(*number) && later);
    }
    count
}

fn judged(lives: &[Life]) -> String {
    match out_of_order(lives) {
        0 => "in order".to_owned(),
        count => format!("OUT OF ORDER, {count} effects after that of a later message"),
    }
}

/// `1-5, 11-20`, in the order in which they came.
fn ranges(numbers: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |(first, last): &(u32, u32)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let text: Vec<String> = parts.iter().map(part).collect();
    if text.is_empty() { "none".to_owned() } else { text.join(", ") }
}
