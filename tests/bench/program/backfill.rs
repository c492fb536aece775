//! A backfill beside live events: how fast it is, and what it costs them.
//!
//! Four writers emit a given number of events a second, each waits for its commits; one consumer
//! takes them. First without a backfill, then while a table is read, whose rows go to a queue that
//! nobody reads, or to another consumer. Finally the same rows again, without live events: on a
//! route that drops them, which shows what reading costs, and to a broker that confirms everything
//! at once and keeps nothing.

use std::collections::HashMap;
use std::time::Duration;

use lapin::types::FieldTable;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::Client;
use uuid::Uuid;
use watership::error::{Error, Result};

use crate::latency::{Received, consume, quantile};
use crate::null_broker::NullBroker;
use crate::relay::{Installation, Relay};
use crate::servers::{EXCHANGE, Servers, sql};

/// The table that is read, one whose rows are dropped, and one whose rows go to the null broker.
const TABLE: &str = "public.t";
const DROPPED: &str = "public.u";
const NOWHERE: &str = "public.v";
const WRITERS: u64 = 4;
/// Seconds without a backfill, and events of each writer that do not count.
const BEFORE: u64 = 15;
const WARM_UP: usize = 250;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// What is measured.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Rows of the table.
    pub rows: u64,
    /// Live events a second.
    pub live: u64,
    /// Instead of the default of `backfill.max_unconfirmed`.
    pub unconfirmed: Option<u64>,
    /// A consumer takes the rows as they come.
    pub drained: bool,
}

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Backfill {
    pub rows: u64,
    /// A consumer took the rows as they came.
    pub drained: bool,
    pub seconds: f64,
    pub rows_per_second: f64,
    /// Live events a second that were asked for.
    pub live_rate: u64,
    /// From COMMIT's answer to the consumer, without a backfill and during one.
    pub before_p50_ms: f64,
    pub before_p99_ms: f64,
    pub during_p50_ms: f64,
    pub during_p99_ms: f64,
    /// Of a table whose rows are dropped, without live events.
    pub dropped_rows_per_second: f64,
    /// Of a table whose rows go to the null broker, without live events.
    pub null_rows_per_second: f64,
}

/// Reads a table while events are emitted.
pub async fn run(servers: &Servers, setup: Setup) -> Result<Backfill> {
    let Setup { rows, live: rate, unconfirmed, drained } = setup;
    let name = "bench_backfill";
    servers.fresh_queue(name).await?;
    servers.bound_queue("rows", "rows", FieldTable::default()).await?;
    let routes = format!(
        "[[route]]\nname = \"live\"\noutbox = {{ aggregate_type = \"*\" }}\n\
         exchange = \"{EXCHANGE}\"\n[[route]]\nname = \"rows\"\ntable = \"{TABLE}\"\n\
         exchange = \"{EXCHANGE}\"\nrouting_key = \"rows\"\n\
         [[route]]\nname = \"nowhere\"\ntable = \"{NOWHERE}\"\n\
         exchange = \"{EXCHANGE}\"\nrouting_key = \"nowhere\"\n\
         [[route]]\nname = \"dropped\"\ntable = \"{DROPPED}\"\ndrop = true\n"
    );
    let limit = unconfirmed.map(|most| format!("[backfill]\nmax_unconfirmed = {most}\n"));
    let routes = limit.unwrap_or_default() + &routes;
    let make = tables_of(rows);
    let tables = [TABLE, DROPPED, NOWHERE];
    let installation = Installation::with_tables(servers, name, &make, &tables, &routes).await?;
    // What loading left to write is not the backfill's.
    let client = servers.client(name).await?;
    client.batch_execute("CHECKPOINT").await.map_err(sql("checkpointing"))?;
    servers.settle_broker().await?;
    let mut relay = installation.start()?;
    relay.ready().await?;
    let mut received = consume(servers, name).await?;
    if drained {
        let mut taken = consume(servers, "rows").await?;
        tokio::spawn(async move { while taken.recv().await.is_some() {} });
    }
    let before = live(servers, name, rate, &mut received, async {
        tokio::time::sleep(Duration::from_secs(BEFORE)).await;
        Ok(())
    })
    .await?;
    let during = live(servers, name, rate, &mut received, async {
        read(&client, name, TABLE, &mut relay).await
    })
    .await?;
    let seconds = elapsed(&client, TABLE).await?;
    read(&client, name, DROPPED, &mut relay).await?;
    let dropped = elapsed(&client, DROPPED).await?;
    relay.stop().await?;
    let null = NullBroker::start(servers.rabbit.port()).await?;
    installation.use_broker(servers, null.port)?;
    let mut relay = installation.start()?;
    relay.ready().await?;
    read(&client, name, NOWHERE, &mut relay).await?;
    let nowhere = elapsed(&client, NOWHERE).await?;
    relay.stop().await?;
    Ok(Backfill {
        rows,
        drained,
        seconds,
        rows_per_second: rows as f64 / seconds,
        live_rate: rate,
        before_p50_ms: quantile(&before, 0.5),
        before_p99_ms: quantile(&before, 0.99),
        during_p50_ms: quantile(&during, 0.5),
        during_p99_ms: quantile(&during, 0.99),
        dropped_rows_per_second: rows as f64 / dropped,
        null_rows_per_second: rows as f64 / nowhere,
    })
}

/// The statements that make the tables, each with this number of rows.
fn tables_of(rows: u64) -> String {
    format!(
        "CREATE TABLE {TABLE} (id bigint PRIMARY KEY, name text, note text, at timestamptz); \
         INSERT INTO {TABLE} SELECT g, 'customer-' || g, repeat('watership ', 12), now() \
         FROM generate_series(1, {rows}) AS g; \
         CREATE TABLE {DROPPED} (LIKE {TABLE} INCLUDING ALL); \
         INSERT INTO {DROPPED} SELECT * FROM {TABLE}; \
         CREATE TABLE {NOWHERE} (LIKE {TABLE} INCLUDING ALL); \
         INSERT INTO {NOWHERE} SELECT * FROM {TABLE}; ANALYZE"
    )
}

/// Asks for a backfill, and waits until it is done.
async fn read(client: &Client, name: &str, table: &str, relay: &mut Relay) -> Result<()> {
    let request = "INSERT INTO watership.backfill (name, table_name) VALUES ($1, $2)";
    let asked = client.execute(request, &[&name, &table]).await;
    asked.map_err(sql("asking for a backfill"))?;
    let began = Instant::now();
    while !is_done(client, table).await? {
        relay.alive()?;
        if began.elapsed() > LIMIT {
            return Err(Error::unreachable(format!("it does not end\n{}", relay.tail())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn is_done(client: &Client, table: &str) -> Result<bool> {
    let look = "SELECT state, error FROM watership.backfill WHERE table_name = $1";
    let row = client.query_one(look, &[&table]).await.map_err(sql("looking at the backfill"))?;
    match (row.get::<_, &str>(0), row.get::<_, Option<&str>>(1)) {
        ("done", _) => Ok(true),
        (_, Some(why)) => Err(Error::refused(why)),
        (_, None) => Ok(false),
    }
}

async fn elapsed(client: &Client, table: &str) -> Result<f64> {
    let took = "SELECT extract(epoch FROM ended_at - started_at)::float8 \
        FROM watership.backfill WHERE table_name = $1";
    let row = client.query_one(took, &[&table]).await.map_err(sql("looking at the backfill"))?;
    Ok(row.get(0))
}

/// Sorted latencies, in milliseconds, of what is emitted while `work` is done.
async fn live(
    servers: &Servers,
    name: &str,
    rate: u64,
    received: &mut Received,
    work: impl Future<Output = Result<()>>,
) -> Result<Vec<f64>> {
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = Vec::new();
    for _ in 0..WRITERS {
        let (client, stopped) = (servers.client(name).await?, stopped.clone());
        writers.push(tokio::spawn(write(client, rate / WRITERS, stopped)));
    }
    work.await?;
    stop.send_replace(true);
    let mut written = HashMap::new();
    for writer in writers {
        let of_one = writer.await.map_err(|e| Error::unreachable("a writer").caused_by(e))??;
        written.extend(of_one);
    }
    let mut gaps = Vec::new();
    let mut left: std::collections::HashSet<Uuid> = written.keys().copied().collect();
    while !left.is_empty() {
        let next = tokio::time::timeout(Duration::from_secs(60), received.recv()).await;
        let Ok(Some((id, at))) = next else {
            return Err(Error::unreachable(format!("{} events did not arrive", left.len())));
        };
        if left.remove(&id)
            && let Some(committed) = written[&id]
        {
            gaps.push(at.saturating_duration_since(committed).as_secs_f64() * 1e3);
        }
    }
    gaps.sort_by(f64::total_cmp);
    Ok(gaps)
}

/// Ids with the time of their commit; without one for those that do not count.
async fn write(
    client: Client,
    rate: u64,
    stopped: tokio::sync::watch::Receiver<bool>,
) -> Result<Vec<(Uuid, Option<Instant>)>> {
    let emit = "SELECT watership.emit('order', $1, 'placed', $2::text, NULL, $3)";
    let emit = client.prepare(emit).await.map_err(sql("preparing emit"))?;
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / rate));
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let payload = format!("{{\"note\":\"{}\"}}", "watership ".repeat(25));
    let mut written = Vec::new();
    while !*stopped.borrow() {
        tick.tick().await;
        let id = Uuid::now_v7();
        let key = format!("customer-{}", written.len() % 1000);
        client.execute(&emit, &[&key, &payload, &id]).await.map_err(sql("emitting"))?;
        written.push((id, (written.len() >= WARM_UP).then(Instant::now)));
    }
    Ok(written)
}
