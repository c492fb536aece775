//! Work beside the data path, on a connection of its own: slot gauges every few seconds, and
//! `watership.maintain` every hour. Its failures are logged and counted; they never end a session.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, interval};
use tokio_postgres::Client;

use crate::error::Result;
use crate::metrics::Metrics;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::slot::read_slot;
use crate::pg::sqlstate::postgres_error;
use crate::relay::Options;

/// How often the slot is looked at, and how soon a failed connection is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often partitions are made and retired.
const MAINTAIN_EVERY: Duration = Duration::from_secs(3600);
/// Calls of `maintain` in one go; each does a bounded piece of work.
const MAINTAIN_CALLS_MAX: u32 = 100;

/// Runs until it is aborted.
pub async fn run(options: Options, metrics: Arc<Metrics>) {
    let mut connection = None;
    let mut next_maintain = Instant::now();
    let mut look = interval(LOOK_EVERY);
    let mut failing = false;
    loop {
        look.tick().await;
        let result = once(&options, &metrics, &mut connection, &mut next_maintain).await;
        if let Err(error) = &result {
            connection = None;
            metrics.outbox.maintain_failures.increment(1);
            if !failing {
                tracing::warn!(error = %error, "upkeep failed; it is tried again");
            }
        }
        failing = result.is_err();
    }
}

async fn once(
    options: &Options,
    metrics: &Metrics,
    connection: &mut Option<SqlConnection>,
    next_maintain: &mut Instant,
) -> Result<()> {
    let client = match connection {
        Some(connection) => &connection.client,
        None => &connection.insert(sql(&options.sql).await?).client,
    };
    look_at_slot(client, options, metrics).await?;
    if options.maintain && Instant::now() >= *next_maintain {
        *next_maintain = Instant::now() + MAINTAIN_EVERY;
        maintain(client, options, metrics).await?;
    }
    Ok(())
}

async fn look_at_slot(client: &Client, options: &Options, metrics: &Metrics) -> Result<()> {
    let Some(slot) = read_slot(client, &options.slot).await? else { return Ok(()) };
    metrics.wal.slot_lag_bytes.set(slot.lag_bytes as f64);
    metrics.wal.retained_bytes.set(slot.retained_bytes as f64);
    metrics.wal.set_safe_wal_size(slot.safe_wal_size);
    metrics.wal.set_status(slot.wal_status.map_or("", |s| s.as_str()));
    Ok(())
}

async fn maintain(client: &Client, options: &Options, metrics: &Metrics) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/maintain.sql");
    let retain = i64::try_from(options.retain.as_secs()).unwrap_or(i64::MAX);
    for _ in 0..MAINTAIN_CALLS_MAX {
        let row = client.query_one(SQL, &[&retain]).await.map_err(postgres_error)?;
        let names = |column: &str| row.try_get::<_, Vec<String>>(column).map_err(postgres_error);
        let (created, skipped) = (names("created")?, names("skipped")?);
        let (detached, dropped) = (names("detached")?, names("dropped")?);
        metrics.outbox.partitions_created.increment(created.len() as u64);
        metrics.outbox.partitions_dropped.increment(dropped.len() as u64);
        metrics.outbox.partitions_skipped.increment(skipped.len() as u64);
        if !skipped.is_empty() {
            tracing::warn!(
                days = ?skipped,
                "no partition was made for these days: the default partition has rows of them"
            );
        }
        if !(created.is_empty() && detached.is_empty() && dropped.is_empty()) {
            tracing::info!(?created, ?detached, ?dropped, "outbox partitions");
        }
        if !row.try_get::<_, bool>("more").map_err(postgres_error)? {
            break;
        }
    }
    Ok(())
}
