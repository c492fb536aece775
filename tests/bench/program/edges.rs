//! What edge cases cost everything else: a full queue beside a healthy one, parking at its limits,
//! a checkpoint that cannot be written, a password that has changed.

use std::time::Duration;

use lapin::types::{AMQPValue, FieldTable};
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use watership::dev::Signal;
use watership::error::{Error, Result};

use crate::drain;
use crate::load::{self, Keys, Shape};
use crate::relay::Installation;
use crate::report::median;
use crate::servers::{Servers, sql};

/// Keys that a full queue refuses.
const STUCK: u64 = 3_000;
/// What is behind refused or blocked events stays in the window: it must have room for all of
/// them, or intake pauses, and the window is what is measured.
const WIDE: &str = "[relay]\nmax_window_events = 500000\nmax_window_bytes = \"512MiB\"";
/// How long they are refused, at least.
const REFUSED: Duration = Duration::from_secs(60);
/// Keys whose first event is poison, and events of each that follow it into the table.
const POISON_KEYS: u64 = 1_000;
const FOLLOWING: u64 = 9;
/// Events of these keys that come when the table is full, so that they wait in the window.
const BLOCKED: u64 = 8_000;
/// How long the row of the checkpoint is locked.
const LOCKED: Duration = Duration::from_secs(20);
/// How long the relay fails to connect before its file has the new password.
const WRONG: Duration = Duration::from_secs(6);
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// A queue of one message that rejects, beside a healthy one on the same routing key, and events of
/// another routing key of the same route.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Beside {
    pub stuck: u64,
    pub seconds: f64,
    /// Messages in the healthy queue beyond the first of each event.
    pub copies: u64,
    /// Events a second of the other routing key, and of the same without the full queue: medians.
    pub rate: f64,
    pub rate_without: f64,
}

/// As many parked rows and blocked events as there may be, all of them retried and failing.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct AtLimits {
    pub parked: u64,
    pub blocked: u64,
    /// Tries of rows while the others were measured.
    pub retried: u64,
    /// Events a second of all other keys, and of the same without anything parked: medians.
    pub rate: f64,
    pub rate_without: f64,
    /// The largest seen meanwhile, in milliseconds.
    pub checkpoint_age_ms: f64,
    /// Of the other events, after a kill -9 at the end: the window holds all of them.
    pub duplicates: u64,
    pub lost: u64,
}

/// Somebody else locks the row of the checkpoint under full load, then the relay is killed.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Locked {
    pub events: u64,
    pub duplicates: u64,
    pub lost: u64,
}

/// How long the relay takes to stream again once its file has the new password, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rotated {
    pub ready_ms: f64,
}

/// Drains `events` beside what a full queue refuses, and without it, in turn.
pub async fn beside(servers: &Servers, events: u64, seed: u32, rounds: u32) -> Result<Beside> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut copies = 0;
    for round in 0..rounds {
        let shape = Shape { events, rows_per_tx: 1, keys: Keys::Uniform, seed, round };
        for is_full in [false, true] {
            let name = format!("bench_beside_{is_full}_{round}");
            let (full, healthy) = (format!("{name}_full"), format!("{name}_healthy"));
            servers.fresh_queue(&name).await?;
            servers.bound_queue(&healthy, "stuck.now", FieldTable::default()).await?;
            if is_full {
                servers.bound_queue(&full, "stuck.now", one_message()).await?;
            }
            let installation = Installation::create(servers, &name, WIDE).await?;
            let client = servers.client(&name).await?;
            emit(&client, "stuck", STUCK, "'{}'").await?;
            load::fill(&client, &shape).await?;
            let (drained, relay) = drain::drain(servers, &installation, events).await?;
            match is_full {
                true => with.push(drained.rate),
                false => without.push(drained.rate),
            }
            if is_full && round + 1 == rounds {
                tokio::time::sleep_until(relay.spawned + REFUSED).await;
                copies = servers.depth(&healthy).await?.saturating_sub(STUCK);
            }
            drain::finish(servers, &name, relay).await?;
            servers.delete_queue(&healthy).await?;
            servers.delete_queue(&full).await?;
        }
    }
    let (rate, rate_without) = (median(with), median(without));
    Ok(Beside { stuck: STUCK, seconds: REFUSED.as_secs_f64(), copies, rate, rate_without })
}

fn one_message() -> FieldTable {
    let mut limit = FieldTable::default();
    limit.insert("x-max-length".into(), AMQPValue::LongLongInt(1));
    limit.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    limit
}

/// One event of each of `keys` keys, in one transaction; `payload` is SQL.
async fn emit(client: &Client, kind: &str, keys: u64, payload: &str) -> Result<()> {
    let emit = format!(
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{kind}', n::text, 'now', {payload} FROM generate_series(1, {keys}) AS n"
    );
    client.batch_execute(&emit).await.map_err(sql("emitting"))
}

/// Drains `events` beside parked rows that are retried all the time, and without any, in turn.
pub async fn at_limits(servers: &Servers, events: u64, seed: u32, rounds: u32) -> Result<AtLimits> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let mut last = None;
    for round in 0..rounds {
        let shape = Shape { events, rows_per_tx: 1, keys: Keys::Uniform, seed, round };
        for is_parked in [false, true] {
            let run = one_at_limits(servers, &shape, is_parked).await?;
            match is_parked {
                true => with.push(run.rate),
                false => without.push(run.rate),
            }
            last = Some(run);
        }
    }
    let last = last.ok_or_else(|| Error::config("--repeat must be at least 1"))?;
    Ok(AtLimits { rate: median(with), rate_without: median(without), ..last })
}

/// The backlog comes while the relay runs, so both kinds of run have the same writer beside them.
async fn one_at_limits(servers: &Servers, shape: &Shape, is_parked: bool) -> Result<AtLimits> {
    let name = format!("bench_parking_{is_parked}_{}", shape.round);
    servers.fresh_queue(&name).await?;
    let settings = format!("max_message_size = \"2KiB\"\n{WIDE}");
    let installation = Installation::create(servers, &name, &settings).await?;
    let client = servers.client(&name).await?;
    let mut relay = installation.start()?;
    relay.ready().await?;
    if is_parked {
        emit(&client, "poison", POISON_KEYS, "to_json(repeat('x', 3000))").await?;
        for _ in 0..FOLLOWING {
            emit(&client, "poison", POISON_KEYS, "'{}'").await?;
        }
        let all = POISON_KEYS * (1 + FOLLOWING);
        relay.until("watership_parked", |rows| rows >= all as f64).await?;
        for _ in 0..BLOCKED / POISON_KEYS {
            emit(&client, "poison", POISON_KEYS, "'{}'").await?;
        }
        relay.until("watership_parked_blocked", |blocked| blocked >= BLOCKED as f64).await?;
    }
    let blocked = relay.metric("watership_parked_blocked").await as u64;
    let parked = relay.metric("watership_parked").await as u64;
    let tried_before = tries(&client).await?;
    servers.settle_broker().await?;
    let begin = Instant::now();
    let writer = tokio::spawn(fill(servers.client(&name).await?, *shape));
    let mut age = 0.0_f64;
    let mut retry_at = begin;
    while servers.depth(&name).await? < shape.events {
        relay.alive()?;
        if begin.elapsed() > LIMIT {
            let depth = servers.depth(&name).await?;
            let text = format!("{depth} of {} others have arrived\n{}", shape.events, relay.tail());
            return Err(Error::unreachable(text));
        }
        age = age.max(relay.metric("watership_checkpoint_age_seconds").await);
        if is_parked && Instant::now() >= retry_at {
            installation.retry_all().await?;
            retry_at = Instant::now() + Duration::from_secs(1);
        }
        sleep(POLL).await;
    }
    let rate = shape.events as f64 / begin.elapsed().as_secs_f64();
    writer.await.map_err(|e| Error::unreachable("the writer").caused_by(e))??;
    let retried = tries(&client).await? - tried_before;
    relay.process.signal(Signal::Kill);
    relay.process.wait(LIMIT).await?;
    let relay = installation.start()?;
    // What is blocked stands before all others, so all of them come again.
    let unsettled = if is_parked { BLOCKED + shape.events } else { 0 };
    relay.until("watership_changes_received_total", |n| n >= unsettled as f64).await?;
    relay.until("watership_in_flight_messages", |messages| messages == 0.0).await?;
    let depth = servers.depth(&name).await?;
    drain::finish(servers, &name, relay).await?;
    Ok(AtLimits {
        parked,
        blocked,
        retried,
        rate,
        rate_without: rate,
        checkpoint_age_ms: age * 1e3,
        duplicates: depth.saturating_sub(shape.events),
        lost: shape.events.saturating_sub(depth),
    })
}

/// How often rows were tried, together.
async fn tries(client: &Client) -> Result<u64> {
    let tries = "SELECT coalesce(sum(attempts), 0)::bigint FROM watership.parked";
    let row = client.query_one(tries, &[]).await.map_err(sql("counting tries"))?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

async fn fill(client: Client, shape: Shape) -> Result<u64> {
    load::fill(&client, &shape).await
}

/// Locks the checkpoint's row while a backlog of `events` is drained, and kills the relay.
pub async fn locked(servers: &Servers, events: u64, seed: u32) -> Result<Locked> {
    let name = "bench_locked";
    servers.fresh_queue(name).await?;
    let installation = Installation::create(servers, name, "").await?;
    let client = servers.client(name).await?;
    let shape = Shape { events, rows_per_tx: 1, keys: Keys::Uniform, seed, round: 0 };
    load::fill(&client, &shape).await?;
    let mut relay = installation.start()?;
    drain::first_message(servers, name, &mut relay).await?;
    let lock = "BEGIN; SELECT FROM watership.checkpoint FOR UPDATE";
    client.batch_execute(lock).await.map_err(sql("locking the checkpoint"))?;
    sleep(LOCKED).await;
    relay.process.signal(Signal::Kill);
    relay.process.wait(LIMIT).await?;
    client.batch_execute("ROLLBACK").await.map_err(sql("unlocking the checkpoint"))?;
    let mut relay = installation.start()?;
    drain::filled(servers, name, events, POLL, &mut relay).await?;
    relay.until("watership_slot_lag_bytes", |bytes| bytes < 1e6).await?;
    relay.until("watership_in_flight_messages", |messages| messages == 0.0).await?;
    let depth = servers.depth(name).await?;
    drain::finish(servers, name, relay).await?;
    let (duplicates, lost) = (depth.saturating_sub(events), events.saturating_sub(depth));
    Ok(Locked { events, duplicates, lost })
}

/// Changes the password at the broker, and some seconds later in the relay's file.
pub async fn rotated(servers: &Servers) -> Result<Rotated> {
    let (name, user) = ("bench_rotated", "bench");
    for arguments in
        [&["add_user", user, "first"][..], &["set_permissions", user, ".*", ".*", ".*"]]
    {
        servers.rabbit.ctl(arguments).await?;
    }
    servers.fresh_queue(name).await?;
    let installation = Installation::create(servers, name, "").await?;
    let password = installation.use_password_file(servers, user)?;
    write(&password, "first")?;
    let mut relay = installation.start()?;
    relay.ready().await?;
    servers.rabbit.ctl(&["change_password", user, "second"]).await?;
    let close = format!(
        "[rabbit_networking:close_connection(P, \"bench\") || P <- \
        rabbit_networking:connections(), proplists:get_value(user, \
        rabbit_networking:connection_info(P, [user])) =:= <<\"{user}\">>], ok."
    );
    servers.rabbit.ctl(&["eval", &close]).await?;
    relay.until("watership_session_tries", |tries| tries > 0.0).await?;
    sleep(WRONG).await;
    write(&password, "second")?;
    let changed = Instant::now();
    relay.ready().await?;
    let ready_ms = changed.elapsed().as_secs_f64() * 1e3;
    drain::finish(servers, name, relay).await?;
    Ok(Rotated { ready_ms })
}

fn write(path: &std::path::Path, text: &str) -> Result<()> {
    let written = std::fs::write(path, text);
    written.map_err(|e| Error::config(format!("writing {}", path.display())).caused_by(e))
}
