//! Latency at a steady 200 events a second: one writer with `emit`, one consumer, one clock.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::BasicConsumeOptions;
use lapin::types::FieldTable;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;
use uuid::Uuid;
use watership::error::{Error, Result};

use crate::relay::{Installation, Relay};
use crate::servers::{Servers, broker, sql};

/// Events a second.
const RATE: u64 = 200;
/// Events that are sent before the measurement counts.
const WARM_UP: usize = 200;
/// How long the last message may take.
const LAST_LIMIT: Duration = Duration::from_secs(10);

/// Latencies in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    pub events: usize,
    /// From COMMIT's answer at the writer to the consumer.
    pub commit_p50_ms: f64,
    pub commit_p99_ms: f64,
    /// From sending the INSERT, so with the writer's own commit and its fsync.
    pub insert_p50_ms: f64,
    pub insert_p99_ms: f64,
    /// From the start of the process to /readyz, with the slot caught up.
    pub start_to_ready_ms: f64,
}

struct Written {
    sent: Instant,
    committed: Instant,
}

/// Runs a relay for `seconds` and measures.
pub async fn run(servers: &Servers, seconds: u64) -> Result<Latency> {
    let name = "bench_latency";
    servers.fresh_queue(name).await?;
    let installation = Installation::create(servers, name, "").await?;
    // The first run catches the slot up; the second one is the start that is measured.
    let mut relay = installation.start()?;
    relay.ready().await?;
    relay.stop().await?;
    let mut relay = installation.start()?;
    let start_to_ready = relay.ready().await?;

    let mut received = consume(servers, name).await?;
    let paced = paced(servers, &relay, &mut received, name, seconds).await?;
    relay.stop().await?;
    Ok(Latency {
        events: paced.commit.len(),
        commit_p50_ms: quantile(&paced.commit, 0.5),
        commit_p99_ms: quantile(&paced.commit, 0.99),
        insert_p50_ms: quantile(&paced.insert, 0.5),
        insert_p99_ms: quantile(&paced.insert, 0.99),
        start_to_ready_ms: start_to_ready.as_secs_f64() * 1e3,
    })
}

/// Sorted latencies, in milliseconds.
pub struct Paced {
    /// From COMMIT's answer.
    pub commit: Vec<f64>,
    /// From sending the INSERT.
    insert: Vec<f64>,
}

/// What comes of a consumer: ids, and when.
pub type Received = mpsc::UnboundedReceiver<(Uuid, Instant)>;

/// What a running relay needs at 200 events a second, for `seconds`.
pub async fn paced(
    servers: &Servers,
    relay: &Relay,
    received: &mut Received,
    name: &str,
    seconds: u64,
) -> Result<Paced> {
    let events = WARM_UP + usize::try_from(RATE * seconds).unwrap_or(usize::MAX);
    let client = servers.client(name).await?;
    let writer = tokio::spawn(async move { write(&client, events).await });
    let mut arrived = HashMap::with_capacity(events);
    while arrived.len() < events {
        let next = tokio::time::timeout(LAST_LIMIT, received.recv()).await;
        let (id, at) = next
            .map_err(|_| {
                let got = arrived.len();
                Error::unreachable(format!("{got} of {events} events arrived\n{}", relay.tail()))
            })?
            .ok_or_else(|| Error::unreachable("the consumer has ended"))?;
        arrived.entry(id).or_insert(at);
    }
    let written = writer.await.map_err(|e| Error::unreachable("the writer").caused_by(e))??;

    let since = |from: fn(&Written) -> Instant| {
        let counted = written.iter().skip(WARM_UP);
        let gaps = counted.map(|(id, w)| arrived[id].saturating_duration_since(from(w)));
        let mut gaps: Vec<_> = gaps.map(|gap| gap.as_secs_f64() * 1e3).collect();
        gaps.sort_by(f64::total_cmp);
        gaps
    };
    Ok(Paced { commit: since(|w| w.committed), insert: since(|w| w.sent) })
}

/// The value below which the part `q` of the sorted `values` lies.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let index = (values.len() as f64 * q).ceil() as usize;
    values.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Sends the id and the time of each message that arrives.
pub async fn consume(servers: &Servers, queue: &str) -> Result<Received> {
    let channel = servers.another_channel().await?;
    let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let consumer =
        channel.basic_consume(queue.into(), "bench".into(), options, FieldTable::default());
    let mut consumer = consumer.await.map_err(broker("consuming"))?;
    // Bounded by the writer: a fixed number of events.
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        // Keeps the channel open as long as the consumer lives.
        let _channel = channel;
        while let Some(Ok(delivery)) = consumer.next().await {
            let at = Instant::now();
            let id = delivery.properties.message_id().as_ref();
            let id = id.and_then(|id| Uuid::parse_str(id.as_str()).ok());
            if id.is_some_and(|id| sender.send((id, at)).is_err()) {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Emits `events` events, one transaction each, at the rate; in the order of writing.
async fn write(client: &Client, events: usize) -> Result<Vec<(Uuid, Written)>> {
    let emit = "SELECT watership.emit('order', $1, 'placed', $2::text, NULL, $3)";
    let emit = client.prepare(emit).await.map_err(sql("preparing emit"))?;
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / RATE));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let note = "watership ".repeat(25);
    let mut written = Vec::with_capacity(events);
    for n in 0..events {
        tick.tick().await;
        let id = Uuid::now_v7();
        let key = format!("customer-{}", n % 1000);
        let payload = format!("{{\"order\":{n},\"status\":\"placed\",\"note\":\"{note}\"}}");
        let sent = Instant::now();
        client.execute(&emit, &[&key, &payload, &id]).await.map_err(sql("emitting"))?;
        written.push((id, Written { sent, committed: Instant::now() }));
    }
    Ok(written)
}
