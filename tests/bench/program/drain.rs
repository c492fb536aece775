//! Drains a backlog through the real relay, and one large transaction.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_postgres::Client;
use watership::error::{Error, Result};

use crate::limits::{self, Decode};
use crate::load::{self, Keys, Shape};
use crate::peer::{self, Peer};
use crate::relay::{Installation, Relay};
use crate::report::Report;
use crate::servers::{Servers, sql};
use crate::usage::{cpu_seconds, peak_rss_bytes, tree_cpu_seconds};

/// How often the depth of the queue is asked for while it fills.
pub const POLL: Duration = Duration::from_millis(20);
/// The same until the first message.
const POLL_FIRST: Duration = Duration::from_millis(2);
/// How long the queue may stand still. Postgres decodes a large transaction before it sends any.
const STALL_LIMIT: Duration = Duration::from_secs(60);
/// How long the last confirm may come after its message lies in the queue.
const CONFIRM_LIMIT: Duration = Duration::from_secs(10);

const CONFIRMED: &str = "watership_messages_confirmed_total";
const CHANGES: &str = "watership_changes_received_total";

/// One backlog: its limits and what the relay made of it.
#[derive(Debug, Clone, Serialize)]
pub struct Case {
    pub shape: Shape,
    pub body_bytes: u64,
    pub decode: Decode,
    pub limit: f64,
    pub drain: Option<Drain>,
    pub peers: Vec<Peer>,
}

/// What the relay made of a backlog.
#[derive(Debug, Clone, Serialize)]
pub struct Drain {
    pub events: u64,
    /// From the start of the process until the last message lies in the queue.
    pub seconds: f64,
    pub rate: f64,
    /// From the start of the process.
    pub first_message_ms: f64,
    /// User and system CPU of the relay.
    pub relay_us: f64,
    pub broker_us: f64,
    pub walsender_us: f64,
    pub peak_rss_mb: f64,
    /// Messages in the queue at the end beyond the events: 0 without a fault.
    pub duplicates: u64,
}

/// One transaction with very many rows.
#[derive(Debug, Clone, Serialize)]
pub struct Large {
    pub drain: Drain,
    /// From the first change that the relay has counted until the first message in the queue;
    /// `None` when the first message was seen before the count.
    pub first_message_after_first_change_ms: Option<f64>,
}

/// Loads the backlog, measures the decode limit on it, then drains it; then the peers do.
pub async fn run(
    servers: &Servers,
    shape: &Shape,
    report: &Report,
    limits_only: bool,
    programs: &[PathBuf],
) -> Result<Case> {
    let name = shape.name();
    let limit_slot = format!("{name}_limit");
    let installation = if limits_only {
        bare_outbox(servers, &name).await?;
        None
    } else {
        servers.fresh_queue(&name).await?;
        Some(Installation::create(servers, &name, "").await?)
    };
    let client = servers.client(&name).await?;
    limits::prepare(&client, &limit_slot).await?;
    let mut prepared = Vec::new();
    for program in programs {
        prepared.push(peer::prepare(&client, program, &name).await?);
    }
    let body_bytes = load::fill(&client, shape).await?;
    let decode = limits::decode(servers, &name, &limit_slot, &name, shape.events).await?;
    let limit = limits::limit(report.publish_limit(), &decode);
    let drain = match &installation {
        Some(installation) => {
            let (drain, relay) = drain(servers, installation, shape.events).await?;
            finish(servers, &name, relay).await?;
            Some(drain)
        }
        None => None,
    };
    let mut peers = Vec::new();
    for peer in prepared {
        peers.push(peer.run(servers, &name, shape.events).await?);
    }
    Ok(Case { shape: *shape, body_bytes, decode, limit, drain, peers })
}

/// Drains one transaction of `rows` rows.
pub async fn large(servers: &Servers, rows: u64, seed: u32) -> Result<Large> {
    let name = "bench_large";
    servers.fresh_queue(name).await?;
    let installation = Installation::create(servers, name, "").await?;
    let client = servers.client(name).await?;
    let shape = Shape { events: rows, rows_per_tx: rows, keys: Keys::Uniform, seed, round: 0 };
    load::fill(&client, &shape).await?;
    servers.settle_broker().await?;
    let mut relay = installation.start()?;
    let (first_change, first_message) = beginning(servers, name, &mut relay).await?;
    let first_message_after_first_change_ms = first_change
        .and_then(|change| first_message.checked_duration_since(change))
        .map(|gap| gap.as_secs_f64() * 1e3);
    let drain = measure(servers, &client, name, rows, &mut relay, first_message).await?;
    confirmed(&relay, rows).await?;
    finish(servers, name, relay).await?;
    Ok(Large { drain, first_message_after_first_change_ms })
}

pub async fn drain(
    servers: &Servers,
    installation: &Installation,
    events: u64,
) -> Result<(Drain, Relay)> {
    servers.settle_broker().await?;
    let (name, mut relay) = (&installation.name, installation.start()?);
    let first_message = first_message(servers, name, &mut relay).await?;
    let client = servers.client(name).await?;
    let drain = measure(servers, &client, name, events, &mut relay, first_message).await?;
    confirmed(&relay, events).await?;
    Ok((drain, relay))
}

/// Waits for the first message in the queue.
pub async fn first_message(servers: &Servers, queue: &str, relay: &mut Relay) -> Result<Instant> {
    filled(servers, queue, 1, POLL_FIRST, relay).await
}

/// Follows a relay that has begun to publish until all `events` lie in the queue. Slot and queue
/// have one name; `client` is one of the slot's database.
pub async fn measure(
    servers: &Servers,
    client: &Client,
    name: &str,
    events: u64,
    relay: &mut Relay,
    first_message: Instant,
) -> Result<Drain> {
    let walsender = limits::walsender(client, name).await?;
    let broker = servers.rabbit_pid()?;
    // The broker's figure lacks what it did before the first message; the others lack nothing.
    let broker_before = tree_cpu_seconds(broker);
    let filled = filled(servers, name, events, POLL, relay).await?;
    let broker_seconds = tree_cpu_seconds(broker) - broker_before;
    let walsender_seconds = cpu_seconds(walsender).unwrap_or(0.0);
    let relay_pid = relay.process.pid();
    let relay_seconds = cpu_seconds(relay_pid).unwrap_or(0.0);
    let depth = servers.depth(name).await?;
    let seconds = filled.duration_since(relay.spawned).as_secs_f64();
    let per_event = 1e6 / events as f64;
    Ok(Drain {
        events,
        seconds,
        rate: events as f64 / seconds,
        first_message_ms: first_message.duration_since(relay.spawned).as_secs_f64() * 1e3,
        relay_us: relay_seconds * per_event,
        broker_us: broker_seconds * per_event,
        walsender_us: walsender_seconds * per_event,
        peak_rss_mb: peak_rss_bytes(relay_pid)? as f64 / 1e6,
        duplicates: depth.saturating_sub(events),
    })
}

/// Waits until the queue holds `wanted` messages; looks every `interval`.
///
/// # Errors
/// When the relay ends, or the queue stands still for [`STALL_LIMIT`].
pub async fn filled(
    servers: &Servers,
    name: &str,
    wanted: u64,
    interval: Duration,
    relay: &mut Relay,
) -> Result<Instant> {
    let mut depth = 0;
    let mut deadline = Instant::now() + STALL_LIMIT;
    loop {
        let now = servers.depth(name).await?;
        if now >= wanted {
            return Ok(Instant::now());
        }
        if now > depth {
            deadline = Instant::now() + STALL_LIMIT;
        }
        depth = now;
        relay.alive()?;
        if Instant::now() > deadline {
            let log = relay.tail();
            let text = format!("the queue stays at {depth} of {wanted} messages\n{log}");
            return Err(Error::unreachable(text));
        }
        tokio::time::sleep(interval).await;
    }
}

/// When the relay had counted its first change, if that was seen, and the first message.
async fn beginning(
    servers: &Servers,
    name: &str,
    relay: &mut Relay,
) -> Result<(Option<Instant>, Instant)> {
    let mut first_change = None;
    let deadline = Instant::now() + STALL_LIMIT;
    loop {
        if first_change.is_none() && relay.metric(CHANGES).await > 0.0 {
            first_change = Some(Instant::now());
        }
        if servers.depth(name).await? > 0 {
            return Ok((first_change, Instant::now()));
        }
        relay.alive()?;
        if Instant::now() > deadline {
            return Err(Error::unreachable(format!("no message arrives\n{}", relay.tail())));
        }
        tokio::time::sleep(POLL_FIRST).await;
    }
}

async fn confirmed(relay: &Relay, events: u64) -> Result<()> {
    let deadline = Instant::now() + CONFIRM_LIMIT;
    loop {
        let confirmed = relay.metric(CONFIRMED).await;
        if confirmed >= events as f64 {
            return Ok(());
        }
        if Instant::now() > deadline {
            let text =
                format!("{CONFIRMED} is {confirmed}, but {events} messages lie in the queue");
            return Err(Error::protocol(text));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Ends the relay and frees what would slow the next case: slot, queue.
pub async fn finish(servers: &Servers, name: &str, relay: Relay) -> Result<()> {
    relay.stop().await?;
    free(servers, name).await
}

/// Drops slot and queue of one name.
pub async fn free(servers: &Servers, name: &str) -> Result<()> {
    let client = servers.client("postgres").await?;
    let free = Instant::now() + CONFIRM_LIMIT;
    let drop_slot = "SELECT pg_drop_replication_slot($1)";
    // The walsender needs a moment to notice that its client has gone.
    while let Err(error) = client.execute(drop_slot, &[&name]).await {
        if Instant::now() > free {
            return Err(sql("dropping the slot")(error));
        }
        tokio::time::sleep(POLL).await;
    }
    servers.delete_queue(name).await
}

/// An outbox and a publication without the relay's `init`, when only limits are measured.
async fn bare_outbox(servers: &Servers, name: &str) -> Result<()> {
    servers.postgres.create_database(name).await?;
    let make = format!(
        "CREATE SCHEMA watership;
         CREATE TABLE watership.outbox (
             id uuid NOT NULL DEFAULT gen_random_uuid(), aggregate_type text NOT NULL,
             aggregate_id text NOT NULL, event_type text NOT NULL, payload json, data bytea,
             content_type text, headers jsonb, traceparent text,
             created_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (id, created_at)
         ) PARTITION BY RANGE (created_at);
         CREATE TABLE watership.outbox_default PARTITION OF watership.outbox DEFAULT;
         CREATE PUBLICATION {name} FOR TABLE watership.outbox
             WITH (publish_via_partition_root = true)"
    );
    servers.postgres.execute_in(name, &make).await
}
