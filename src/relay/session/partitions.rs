//! The partitions in force, kept beside the checkpoint: read, compared with the configuration and
//! with what the broker's queues hold, and recorded before the first message goes out by them.

use tokio_postgres::Client;

use crate::amqp::{self, topology};
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::Options;
use crate::relay::check::partitions::{InForce, PartitionChange, Queued, changes};
use crate::relay::checkpoint::missing_schema;
use crate::relay::session::rights;
use crate::route::{PARTITIONS_MAX, Partitions};

/// The routes whose partitions are not those in force.
///
/// # Errors
/// The server's; a missing table is a verdict.
pub async fn changed(client: &Client, options: &Options) -> Result<Vec<PartitionChange>> {
    const SQL: &str = include_str!("../../../sql/query/partitions_read.sql");
    let rows = unnamed::query(client, SQL, &[&options.name]).await.map_err(missing_schema)?;
    let mut in_force = Vec::new();
    for row in rows {
        let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
        let count = row.try_get::<_, i32>(2).map_err(postgres_error)?;
        let wrong = || Error::protocol(format!("watership.partitions.count is {count}"));
        let count = u16::try_from(count).ok().filter(|count| *count <= PARTITIONS_MAX);
        let partitions = Partitions { queue: text(1)?, count: count.ok_or_else(wrong)? };
        in_force.push(InForce { route: text(0)?, partitions });
    }
    Ok(changes(&options.rules, &in_force))
}

/// What the queues hold that matter to a change; those that do not exist are left out.
///
/// # Errors
/// The broker's.
pub async fn queued(
    broker: &amqp::options::Options,
    change: &PartitionChange,
) -> Result<Vec<Queued>> {
    let names = change.queues();
    let counts = topology::counts(broker, &names).await?;
    let queued = |(name, count): (String, Option<(u32, u32)>)| {
        count.map(|(messages, consumers)| Queued { name, messages, consumers })
    };
    Ok(names.into_iter().zip(counts).filter_map(queued).collect())
}

/// Refuses changes while messages are queued, unless the options accept that.
///
/// # Errors
/// The verdict, or the broker's.
pub async fn verify(
    options: &Options,
    broker: &amqp::options::Options,
    changes: &[PartitionChange],
) -> Result<()> {
    for change in changes {
        let Err(refused) = change.verify(&queued(broker, change).await?) else { continue };
        if !options.accept_reorder {
            return Err(refused);
        }
        tracing::warn!(
            route = change.route,
            "{refused}; accepted (--accept-reorder): events of one key may be handled out of order"
        );
    }
    Ok(())
}

/// Connects, and refuses other partitions than those in force while messages are queued.
pub(super) async fn compare(
    options: &Options,
    broker: &amqp::options::Options,
) -> Result<(SqlConnection, Vec<PartitionChange>)> {
    let connected = sql(&options.sql).await?;
    rights::verify(&rights::lacking(&connected.client, None, options.kind).await?)?;
    let changes = changed(&connected.client, options).await?;
    verify(options, broker, &changes).await?;
    Ok((connected, changes))
}

/// The partitions of the configuration are in force from now on.
///
/// # Errors
/// The server's.
pub async fn record(client: &Client, options: &Options, changes: &[PartitionChange]) -> Result<()> {
    const STORE: &str = include_str!("../../../sql/query/partitions_store.sql");
    const FORGET: &str = include_str!("../../../sql/query/partitions_forget.sql");
    for PartitionChange { route, to, .. } in changes {
        match to {
            Some(Partitions { queue, count }) => {
                let count = i32::from(*count);
                unnamed::execute(client, STORE, &[&options.name, route, queue, &count]).await
            }
            None => unnamed::execute(client, FORGET, &[&options.name, route]).await,
        }
        .map_err(postgres_error)?;
    }
    Ok(())
}
