//! A queue is deleted under load and made again a minute later: what that costs another route.

use std::time::Duration;

use lapin::options::QueueDeleteOptions;
use lapin::types::FieldTable;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_postgres::Client;
use watership::error::{Error, Result};

use crate::drain;
use crate::relay::{Installation, Relay};
use crate::servers::{EXCHANGE, Servers, broker, sql};

/// Of the database, the slot and the publication.
const NAME: &str = "bench_deleted";
/// The queue that goes, and the one that stays; also their routes, routing keys and types.
const GONE: &str = "gone";
const KEPT: &str = "kept";
/// How often one event of the queue that goes is written, with [`BESIDE`] of the other.
const TICK: Duration = Duration::from_millis(10);
const BESIDE: u64 = 20;
/// How long the rate without trouble is measured.
const BEFORE: Duration = Duration::from_secs(4);
/// How long the same with trouble; the window is full after about four seconds.
const WHILE: Duration = Duration::from_secs(3);
/// How long the queue is away.
const AWAY: Duration = Duration::from_secs(60);
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// What it cost.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Deleted {
    /// Events a second that reach the other queue, without trouble and until the window is full.
    pub rate_before: f64,
    pub rate_while: f64,
    /// From the queue's return until its first message.
    pub resumed_ms: f64,
    pub events: u64,
    /// Confirmed before the queue went, though they were not in it when the broker counted: it
    /// counts first and deletes then (RabbitMQ 3.10.8, `rabbit_quorum_queue:delete/4`).
    pub confirmed_in_vain: u64,
    pub lost: u64,
    pub duplicates: u64,
    pub parked: u64,
}

/// Events that were written, of the queue that goes and of the other.
type Written = (u64, u64);

/// Runs it; more than [`AWAY`].
pub async fn run(servers: &Servers) -> Result<Deleted> {
    for queue in [GONE, KEPT] {
        servers.delete_queue(queue).await?;
    }
    // It declares the exchange.
    servers.fresh_queue(NAME).await?;
    servers.bound_queue(GONE, GONE, FieldTable::default()).await?;
    servers.bound_queue(KEPT, KEPT, FieldTable::default()).await?;
    let routes = [GONE, KEPT].map(|name| {
        format!(
            "[[route]]\nname = \"{name}\"\noutbox = {{ aggregate_type = \"{name}\" }}\n\
             exchange = \"{EXCHANGE}\"\nrouting_key = \"{name}\"\n"
        )
    });
    let installation = Installation::with_routes(servers, NAME, "", &routes.concat()).await?;
    let mut relay = installation.start()?;
    let (enough, stop) = tokio::sync::watch::channel(false);
    let writer = tokio::spawn(write(servers.client(NAME).await?, stop));
    drain::first_message(servers, KEPT, &mut relay).await?;
    let rate_before = rate(servers, &relay, BEFORE).await?;

    let options = QueueDeleteOptions::default();
    let taken = servers.channel.queue_delete(GONE.into(), options).await;
    let taken = u64::from(taken.map_err(broker("deleting the queue"))?);
    let back = Instant::now() + AWAY;
    relay.until("watership_route_held", |value| value == 1.0).await?;
    // A held route gets no confirm: this is what the broker took before the queue went.
    let confirmed =
        relay.metric_of("watership_messages_confirmed_total", &label(GONE)).await as u64;
    let rate_while = rate(servers, &relay, WHILE).await?;
    relay.until("watership_window_paused", |value| value == 1.0).await?;
    tokio::time::sleep_until(back).await;

    servers.bound_queue(GONE, GONE, FieldTable::default()).await?;
    let returned = Instant::now();
    let first = drain::first_message(servers, GONE, &mut relay).await?;
    relay.until("watership_route_held", |value| value == 0.0).await?;
    // The end of the watch is what it waits for.
    let _ = enough.send(true);
    let (gone, kept) = writer.await.map_err(|e| Error::unreachable("writing").caused_by(e))??;
    let at_last = ends(servers, gone - confirmed, kept).await?;
    let parked = relay.metric("watership_parked").await as u64;
    drain::finish(servers, NAME, relay).await?;
    let missing = |wanted: u64, there: u64| wanted.saturating_sub(there);
    Ok(Deleted {
        rate_before,
        rate_while,
        resumed_ms: first.duration_since(returned).as_secs_f64() * 1e3,
        events: gone + kept,
        confirmed_in_vain: missing(confirmed, taken),
        lost: missing(gone - confirmed, at_last.0) + missing(kept, at_last.1),
        duplicates: missing(at_last.0, gone - confirmed) + missing(at_last.1, kept),
        parked,
    })
}

fn label(route: &str) -> String {
    format!("route=\"{route}\"")
}

/// Writes at an even rate until it is enough.
async fn write(client: Client, enough: tokio::sync::watch::Receiver<bool>) -> Result<Written> {
    let emit = format!(
        "SELECT watership.emit(t, (random() * 1000)::integer::text, 'placed'::text, \
             format('{{\"note\":\"%s\"}}', repeat('x', 300))) \
         FROM (SELECT '{GONE}'::text UNION ALL \
               SELECT '{KEPT}' FROM generate_series(1, {BESIDE})) AS rows(t)"
    );
    let emit = client.prepare(&emit).await.map_err(sql("preparing to write"))?;
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut ticks = 0;
    while !*enough.borrow() {
        tick.tick().await;
        client.query(&emit, &[]).await.map_err(sql("writing"))?;
        ticks += 1;
    }
    Ok((ticks, ticks * BESIDE))
}

/// Events a second that come into the queue that stays, until the window is full at most.
async fn rate(servers: &Servers, relay: &Relay, time: Duration) -> Result<f64> {
    let (begin, before) = (Instant::now(), servers.depth(KEPT).await?);
    while begin.elapsed() < time && relay.metric("watership_window_paused").await == 0.0 {
        sleep(POLL).await;
    }
    let came = servers.depth(KEPT).await? - before;
    Ok(came as f64 / begin.elapsed().as_secs_f64())
}

/// What the queues hold at last: as much as this, or when nothing has come for a while.
async fn ends(servers: &Servers, gone: u64, kept: u64) -> Result<Written> {
    let (mut seen, mut deadline) = ((0, 0), Instant::now() + LIMIT);
    loop {
        let now = (servers.depth(GONE).await?, servers.depth(KEPT).await?);
        if now != seen {
            (seen, deadline) = (now, Instant::now() + Duration::from_secs(10));
        }
        // A moment more for duplicates.
        if Instant::now() > deadline || now == (gone, kept) {
            return Ok(now);
        }
        sleep(POLL).await;
    }
}
