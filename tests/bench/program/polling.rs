//! A relay that polls: a backlog, nothing to do, a steady rate, and dead rows that an old snapshot
//! keeps.

use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_postgres::Client;
use watership::error::{Error, Result};

use crate::drain::{POLL, filled};
use crate::latency::{consume, paced, quantile};
use crate::load::{self, Keys, Shape};
use crate::relay::Installation;
use crate::servers::{Servers, sql};
use crate::usage::{cpu_seconds, peak_rss_bytes};

/// How long it has had nothing to do before that is measured, and how long that is measured.
const QUIET: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(30);
const DEAD: u64 = 1_000_000;
/// How often one look is timed.
const LOOKS: u32 = 200;

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Polling {
    pub events: u64,
    /// From the start of the process until the last message lies in the queue.
    pub rate: f64,
    /// User and system CPU of the relay.
    pub relay_us: f64,
    pub peak_rss_mb: f64,
    /// CPU of the relay with nothing to do, as a share of one core.
    pub idle_share: f64,
    /// From COMMIT's answer to the consumer, at 200 events a second.
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub dead_rows: u64,
    /// The same, and one look by itself, while an old snapshot keeps that number of dead rows.
    pub dead_p50_ms: f64,
    pub dead_p99_ms: f64,
    pub dead_look_p50_ms: f64,
    pub dead_look_p99_ms: f64,
}

/// Measures one after the other with the same relay.
pub async fn run(servers: &Servers, events: u64, seed: u32, seconds: u64) -> Result<Polling> {
    let name = "bench_polling";
    let shape = Shape { events, rows_per_tx: 1, keys: Keys::Uniform, seed, round: 0 };
    servers.fresh_queue(name).await?;
    let installation = Installation::polling(servers, name).await?;
    let client = servers.client(name).await?;
    load::fill(&client, &shape).await?;
    servers.settle_broker().await?;
    let mut relay = installation.start()?;
    let full = filled(servers, name, events, POLL, &mut relay).await?;
    let took = full.duration_since(relay.spawned).as_secs_f64();
    let pid = relay.process.pid();
    let drained = used(pid)?;
    tokio::time::sleep(QUIET).await;
    let (before, begin) = (used(pid)?, Instant::now());
    tokio::time::sleep(IDLE).await;
    let idle_share = (used(pid)? - before) / begin.elapsed().as_secs_f64();
    // So that a consumer meets nothing but new messages.
    servers.purge(name).await?;
    let mut received = consume(servers, name).await?;
    let alive = paced(servers, &relay, &mut received, name, seconds).await?;

    let pinned = servers.client(name).await?;
    leave_dead_rows(&client, &pinned, DEAD).await?;
    let with_dead = paced(servers, &relay, &mut received, name, seconds).await?;
    let looks = looks(&client).await?;
    let peak_rss_mb = peak_rss_bytes(pid)? as f64 / 1e6;
    relay.stop().await?;
    drop(pinned);
    servers.delete_queue(name).await?;
    Ok(Polling {
        events,
        rate: events as f64 / took,
        relay_us: drained * 1e6 / events as f64,
        peak_rss_mb,
        idle_share,
        p50_ms: quantile(&alive.commit, 0.5),
        p99_ms: quantile(&alive.commit, 0.99),
        dead_rows: DEAD,
        dead_p50_ms: quantile(&with_dead.commit, 0.5),
        dead_p99_ms: quantile(&with_dead.commit, 0.99),
        dead_look_p50_ms: quantile(&looks, 0.5),
        dead_look_p99_ms: quantile(&looks, 0.99),
    })
}

fn used(pid: u32) -> Result<f64> {
    cpu_seconds(pid).ok_or_else(|| Error::unreachable("the relay has ended"))
}

/// Rows that nobody ever sees, and that `pinned` keeps from being removed.
async fn leave_dead_rows(client: &Client, pinned: &Client, rows: u64) -> Result<()> {
    let pin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM watership.checkpoint";
    pinned.batch_execute(pin).await.map_err(sql("taking the snapshot"))?;
    let leave = format!(
        "BEGIN; INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
             SELECT 'dead', n::text, 'never', '{{}}' FROM generate_series(1, {rows}) AS n; \
         DELETE FROM watership.outbox WHERE aggregate_type = 'dead'; COMMIT; CHECKPOINT"
    );
    client.batch_execute(&leave).await.map_err(sql("leaving dead rows"))
}

/// Sorted times of single looks, in milliseconds, each a round trip. A transaction ends between
/// two of them, so that none is spared for want of anything new.
async fn looks(client: &Client) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for _ in 0..LOOKS {
        let since = "SELECT pg_current_snapshot()::text";
        let row = client.query_one(since, &[]).await.map_err(sql("taking a snapshot"))?;
        let since: String = row.get(0);
        client.execute("SELECT pg_current_xact_id()", &[]).await.map_err(sql("writing"))?;
        let look = format!("SELECT rows FROM watership.poll_look('{since}')");
        let begin = Instant::now();
        client.simple_query(&look).await.map_err(sql("looking"))?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
