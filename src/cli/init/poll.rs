//! What `init` makes for a relay that polls: two indexes and the checkpoint. No slot, no
//! publication.

use tokio_postgres::Client;

use super::slot::rows_before;
use super::{Args, Done, Steps};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::slot::ServerFacts;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::check::polling::{self, Index, missing_indexes};
use crate::relay::checkpoint::{self, Checkpoint};
use crate::relay::session::poll;
use crate::source::SourceKind;
use crate::source::poll::MadeWith;

/// An outbox with more bytes is not indexed while its writers wait.
const INDEXED_MAX: i64 = 256 << 20;

/// What finds the rows of a batch. They cost every INSERT, so only a relay that polls has them.
/// Those of a mapped table are the application's to make.
pub(super) async fn indexes(steps: &mut Steps, client: &mut Client, config: &Config) -> Result<()> {
    const WHAT: &str = "index";
    if config.relay.outbox.is_mapped() {
        return Ok(());
    }
    let facts = poll::facts(client, &config.relay, None).await?;
    let missing = missing_indexes(&facts.outbox, &facts.indexes, true);
    if missing.is_empty() {
        let columns =
            polling::indexes(&facts.outbox, true).map(|index| format!("({})", index.columns));
        steps.add(Done::Exists, WHAT, format!("watership.outbox {}", columns.join(" and ")));
        return Ok(());
    }
    may_index(client).await?;
    let tx = client.transaction().await.map_err(postgres_error)?;
    tx.batch_execute("SET LOCAL ROLE watership_owner; SET LOCAL lock_timeout = '5s'")
        .await
        .map_err(postgres_error)?;
    for Index { statement, .. } in &missing {
        let made = tx.batch_execute(statement).await.map_err(postgres_error);
        made.map_err(|e| e.context(statement))?;
    }
    tx.commit().await.map_err(postgres_error)?;
    for Index { columns, .. } in missing {
        steps.add(Done::Created, WHAT, format!("watership.outbox ({columns})"));
    }
    Ok(())
}

/// Refuses to make an index if writers would have to wait for it too long.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with what to do; the server's.
pub(super) async fn may_index(client: &Client) -> Result<()> {
    let size = "SELECT coalesce(sum(pg_catalog.pg_relation_size(relid)), 0)::bigint \
        FROM pg_catalog.pg_partition_tree('watership.outbox'::regclass)";
    let size: i64 = unnamed::query_one(client, size, &[]).await.map_err(postgres_error)?.get(0);
    if size > INDEXED_MAX {
        let (size, most) = (size >> 20, INDEXED_MAX >> 20);
        return Err(Error::refused(format!(
            "watership.outbox has {size} MiB and lacks an index for polling; init makes it only up \
             to {most} MiB, because every INSERT waits meanwhile"
        ))
        .hint(
            "docs/sources.md shows how to make it while applications write; then run init again",
        ));
    }
    Ok(())
}

/// Where a relay that polls begins.
pub(super) const FIRST_POLL: &str = "its first poll";

/// The checkpoint, if there is one, checked that the relay may resume from it.
///
/// # Errors
/// A named verdict, or what [`checkpoint::is_of`] refuses; the server's.
pub(super) async fn resumes(client: &Client, config: &Config) -> Result<Option<Checkpoint>> {
    let name = &config.relay.name;
    let Some(row) = checkpoint::read(client, name).await? else { return Ok(None) };
    checkpoint::is_of(&row, name, SourceKind::Poll)?;
    poll::read(client, &config.relay).await?.verify()?;
    Ok(Some(row))
}

pub(super) async fn checkpoint(
    steps: &mut Steps,
    client: &Client,
    config: &Config,
    args: &Args,
    server: &ServerFacts,
) -> Result<()> {
    const WHAT: &str = "checkpoint";
    const CREATE: &str = include_str!("../../../sql/query/poll_create.sql");
    let name = &config.relay.name;
    if let Some(row) = resumes(client, config).await? {
        steps.add(Done::Exists, WHAT, format!("{name} at batch {}", row.flush().0));
        return Ok(());
    }
    let facts = poll::facts(client, &config.relay, None).await?;
    polling::verify_transactions(&facts)?;
    if let Some(rows) = rows_before(client, config, args.skip_existing, FIRST_POLL).await? {
        steps.add(Done::Skipped, "outbox", rows);
    }
    let (system, timeline) = (server.system_identifier.to_string(), i64::from(server.timeline));
    let table = config.relay.outbox.table.to_string();
    let (oid, order_by, xid) = MadeWith::stored(facts.made_with());
    let values: &[unnamed::Parameter<'_>] =
        &[name, &system, &timeline, &args.skip_existing, &table, &oid, &order_by, &xid];
    let create = poll::polled(&config.relay)?.fill(CREATE);
    let made = unnamed::query_opt(client, &create, values).await.map_err(postgres_error)?;
    let Some(made) = made else {
        let text = "an application wrote to the outbox while the checkpoint was being created";
        return Err(Error::refused(text).hint(
            "stop the application and empty the outbox, or pass --skip-existing to leave its rows \
             unpublished",
        ));
    };
    let batch: i64 = made.try_get(0).map_err(postgres_error)?;
    steps.add(Done::Created, WHAT, format!("{name} at batch {batch}"));
    Ok(())
}
