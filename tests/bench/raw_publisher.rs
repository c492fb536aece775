//! How fast and how cheap the publisher is by itself, with no Postgres in front of it.
//!
//! `raw_publisher URL --queue Q --messages N --window W --body BYTES` declares the quorum queue Q,
//! publishes N messages to it with at most W unconfirmed, and prints one line of JSON. With
//! `--exchange X` they go through the exchange X (`--kind direct` or `topic`) and carry the headers
//! of the relay's messages: what the broker then needs more per message is not the relay's doing.

use std::time::{Duration, Instant};

use uuid::Uuid;
use watership::amqp::options::{Options, Url};
use watership::amqp::publisher::Connection;
use watership::amqp::topology::{self, Binding, Destination, Exchange, Queue, QueueKind, Topology};
use watership::error::{Error, Result};
use watership::message::{Builder, ExchangeId, Message, Properties, RouteId};
use watership::publisher::{Outcome, Publisher, Ticket};

/// Of every message that goes through an exchange.
const ROUTING_KEY: &str = "order.created";

struct Arguments {
    url: String,
    queue: String,
    messages: u64,
    window: u64,
    body: usize,
    /// Empty: the default exchange.
    exchange: String,
    kind: String,
}

fn arguments() -> Result<Arguments> {
    let mut all = Arguments {
        url: String::new(),
        queue: "raw_publisher".into(),
        messages: 200_000,
        window: 2000,
        body: 330,
        exchange: String::new(),
        kind: "topic".into(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            all.url = word;
            continue;
        }
        let value = words.next().ok_or_else(|| Error::config(format!("{word} needs a value")))?;
        let number = || {
            let bad = |e| Error::config(format!("{word} {value:?} is not a number")).caused_by(e);
            value.parse::<u64>().map_err(bad)
        };
        match word.as_str() {
            "--queue" => all.queue = value,
            "--exchange" => all.exchange = value,
            "--kind" => all.kind = value,
            "--messages" => all.messages = number()?,
            "--window" => all.window = number()?,
            "--body" => all.body = number()? as usize,
            other => return Err(Error::config(format!("unknown option {other}"))),
        }
    }
    Ok(all)
}

fn message(arguments: &Arguments, n: u64, body: &[u8]) -> Result<Message> {
    let like_relay = !arguments.exchange.is_empty();
    let routing_key = if like_relay { ROUTING_KEY } else { &arguments.queue };
    let properties = Properties {
        content_type: "application/json",
        message_id: Uuid::from_u128(n.into()),
        timestamp: 1_700_000_000,
        kind: ROUTING_KEY,
        app_id: "raw",
    };
    let mut scratch = Vec::new();
    let mut builder = Builder::new(&mut scratch, routing_key, properties)?;
    builder.header_text("ws-route", b"orders")?;
    builder.header_text("ws-key", b"order/4711")?;
    if like_relay {
        builder.header_text("ws-position", b"00000001-0000000001af2690-0000000001-00000000")?;
        builder.header_int("ws-committed-at", 1_700_000_000_123_456)?;
    }
    builder.finish(ExchangeId(0), RouteId(0), |out| out.extend_from_slice(body))
}

/// User and system CPU seconds of this process; the kernel counts in hundredths (proc(5)).
fn cpu() -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, the program's name, may contain spaces; it ends with the last ')'.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? / 100.0, ticks()? / 100.0))
}

async fn run(arguments: &Arguments) -> Result<()> {
    let mut options = Options::new(vec![Url::parse(&arguments.url)?]);
    options.exchanges = vec![arguments.exchange.clone()];
    // One channel, as such publishers have.
    options.channels_per_exchange = 1;
    options.connect_timeout = Duration::from_secs(10);
    let queue = Queue {
        name: arguments.queue.clone(),
        kind: QueueKind::Quorum,
        max_length: None,
        arguments: Vec::new(),
    };
    let mut topology = Topology { queues: vec![queue], ..Topology::default() };
    if !arguments.exchange.is_empty() {
        let (name, kind) = (arguments.exchange.clone(), arguments.kind.clone());
        let none = Vec::new();
        topology.exchanges.push(Exchange {
            name: name.clone(),
            kind,
            durable: true,
            arguments: none.clone(),
        });
        topology.bindings.push(Binding {
            destination: Destination::Queue(arguments.queue.clone()),
            exchange: name,
            routing_key: ROUTING_KEY.to_owned(),
            arguments: none,
        });
    }
    topology::apply(&options, &topology).await?;
    let mut connection = Connection::open(&options).await?;
    let body = vec![b'x'; arguments.body];
    // Built once: what is measured is the publisher.
    let message = message(arguments, 1, &body)?;
    let (user, system) = cpu().unwrap_or_default();
    let start = Instant::now();
    let (mut sent, mut settled) = (0, 0);
    let mut outcomes = Vec::new();
    while settled < arguments.messages {
        while sent < arguments.messages && sent - settled < arguments.window {
            connection.send(Ticket(sent), &message);
            sent += 1;
        }
        connection.next_outcomes(&mut outcomes).await?;
        for (_, outcome) in outcomes.drain(..) {
            if outcome != Outcome::Confirmed {
                return Err(Error::refused(format!("not confirmed: {outcome:?}")));
            }
            settled += 1;
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let (user_after, system_after) = cpu().unwrap_or_default();
    connection.close().await;
    println!(
        "{{\"messages\":{sent},\"seconds\":{seconds:.3},\"rate\":{:.0},\"user_s\":{:.2},\
         \"sys_s\":{:.2}}}",
        sent as f64 / seconds,
        user_after - user,
        system_after - system
    );
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    run(&arguments()?).await
}
