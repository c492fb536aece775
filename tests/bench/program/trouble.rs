//! How much a trouble costs those who have none: a queue that nacks, a key that cannot be sent.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};
use watership::error::{Error, Result};

use crate::drain;
use crate::load::{self, Keys, Shape};
use crate::relay::Installation;
use crate::servers::{Servers, broker, sql};

/// Messages that the full queue's consumer takes in a second.
const TAKEN: u64 = 3_000;
/// Most messages in the queue that is full.
const FULL: i64 = 200;
/// How long the next message may take.
const NEXT_LIMIT: Duration = Duration::from_secs(60);
/// Largest body in the run with poison, in bytes; the poison is larger.
const BODY_MAX: usize = 64 * 1024;

/// A queue of [`FULL`] messages that rejects, and a consumer that is slower than the relay.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Nacks {
    pub events: u64,
    pub nacks: u64,
    pub rate: f64,
    /// Of the rate that the consumer takes.
    pub share: f64,
    pub lost: u64,
    pub duplicates: u64,
    /// First arrivals of a key behind a later one.
    pub inversions: u64,
}

/// A backlog with one key among a thousand whose first event is too large.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Poison {
    pub events: u64,
    /// Events that followed the poison of their key into the table.
    pub parked: u64,
    /// Events a second of all other keys, and of a backlog without poison: medians.
    pub rate: f64,
    pub rate_without: f64,
}

/// Drains `events` into the full queue.
pub async fn nacks(servers: &Servers, events: u64, seed: u32) -> Result<Nacks> {
    let name = "bench_nacks";
    let mut limit = FieldTable::default();
    limit.insert("x-max-length".into(), AMQPValue::LongLongInt(FULL));
    limit.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    servers.fresh_queue_with(name, limit).await?;
    let installation = Installation::create(servers, name, "").await?;
    let client = servers.client(name).await?;
    let shape = Shape { events, rows_per_tx: 10, keys: Keys::Uniform, seed, round: 0 };
    load::fill(&client, &shape).await?;
    let consumer = tokio::spawn(take(servers.another_channel().await?, name, events));
    let relay = installation.start()?;
    let begin = Instant::now();
    let taken = consumer.await.map_err(|e| Error::unreachable("the consumer").caused_by(e))??;
    let seconds = begin.elapsed().as_secs_f64();
    let nacks = relay.metric("watership_messages_nacked_total").await as u64;
    drain::finish(servers, name, relay).await?;
    let rate = events as f64 / seconds;
    Ok(Nacks {
        events,
        nacks,
        rate,
        share: rate / TAKEN as f64,
        lost: events - taken.different,
        duplicates: taken.all - taken.different,
        inversions: taken.inversions,
    })
}

#[derive(Default)]
struct Taken {
    all: u64,
    different: u64,
    inversions: u64,
    /// The last number of each key.
    last: HashMap<String, u64>,
}

impl Taken {
    fn take(&mut self, delivery: &Delivery) -> Option<()> {
        let body: serde_json::Value = serde_json::from_slice(&delivery.data).ok()?;
        let number = body.get("order")?.as_u64()?;
        let headers = delivery.properties.headers().as_ref()?.inner();
        let AMQPValue::LongString(key) = headers.get("ws-key")? else { return None };
        self.all += 1;
        let last = self.last.entry(key.to_string()).or_default();
        match number.cmp(last) {
            std::cmp::Ordering::Greater => (self.different, *last) = (self.different + 1, number),
            std::cmp::Ordering::Equal => {}
            // Either came before, or is late: as late as can be is what is counted.
            std::cmp::Ordering::Less => self.inversions += 1,
        }
        Some(())
    }
}

/// Takes [`TAKEN`] messages a second, a hundredth of them at a time, until `events` came.
async fn take(channel: lapin::Channel, queue: &'static str, events: u64) -> Result<Taken> {
    let prefetch = channel.basic_qos(100, BasicQosOptions::default()).await;
    prefetch.map_err(broker("setting a prefetch"))?;
    let options = BasicConsumeOptions::default();
    let consumer =
        channel.basic_consume(queue.into(), "slow".into(), options, FieldTable::default());
    let mut consumer = consumer.await.map_err(broker("consuming"))?;
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut taken = Taken::default();
    loop {
        tick.tick().await;
        for number in 1..=TAKEN / 100 {
            let next = tokio::time::timeout(NEXT_LIMIT, consumer.next()).await;
            let next = next
                .map_err(|_| Error::unreachable(format!("{} of {events} came", taken.different)))?;
            let delivery = next
                .ok_or_else(|| Error::unreachable("the consumer has ended"))?
                .map_err(broker("consuming"))?;
            taken
                .take(&delivery)
                .ok_or_else(|| Error::protocol("a message that the load did not write"))?;
            let done = taken.different == events;
            if done || number == TAKEN / 100 {
                let options = BasicAckOptions { multiple: true };
                delivery.ack(options).await.map_err(broker("acknowledging"))?;
            }
            if done {
                return Ok(taken);
            }
        }
    }
}

/// Drains backlogs with and without poison, in turn.
pub async fn poison(servers: &Servers, events: u64, seed: u32, rounds: u32) -> Result<Poison> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut parked = 0;
    for round in 0..rounds {
        without.push(one_drain(servers, events, seed, round, false).await?.0);
        let (rate, rows) = one_drain(servers, events, seed, round, true).await?;
        with.push(rate);
        parked = rows;
    }
    let (rate, rate_without) = (crate::report::median(with), crate::report::median(without));
    Ok(Poison { events, parked, rate, rate_without })
}

/// Events a second into the queue, and rows that were parked.
async fn one_drain(
    servers: &Servers,
    events: u64,
    seed: u32,
    round: u32,
    poisoned: bool,
) -> Result<(f64, u64)> {
    let name = format!("bench_poison_{poisoned}_{round}");
    servers.fresh_queue(&name).await?;
    let settings = format!("max_message_size = \"{BODY_MAX}\"");
    let installation = Installation::create(servers, &name, &settings).await?;
    let client = servers.client(&name).await?;
    let mut own = 0;
    if poisoned {
        let poison = "SELECT watership.emit('order', 'customer-7', 'placed', \
            format('{\"note\":\"%s\"}', repeat('x', 100000)))";
        client.batch_execute(poison).await.map_err(sql("writing the poison"))?;
    }
    let shape = Shape { events, rows_per_tx: 1, keys: Keys::Uniform, seed, round };
    load::fill(&client, &shape).await?;
    if poisoned {
        let count = "SELECT count(*) FROM watership.outbox WHERE aggregate_id = 'customer-7'";
        let row = client.query_one(count, &[]).await.map_err(sql("counting"))?;
        own = u64::try_from(row.get::<_, i64>(0)).unwrap_or(0);
    }
    let others = events + u64::from(poisoned) - own;
    let (drained, relay) = drain::drain(servers, &installation, others).await?;
    // Those that follow the poison may come behind the last one of another key.
    let deadline = Instant::now() + NEXT_LIMIT;
    while relay.metric("watership_parked").await != own as f64 {
        if Instant::now() > deadline {
            return Err(Error::protocol(format!("not all {own} events of the key are parked")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drain::finish(servers, &name, relay).await?;
    Ok((drained.rate, own))
}
