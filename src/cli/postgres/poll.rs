//! The same of a relay that polls: no slot, no publication, no right to replicate.

use tokio_postgres::Client;

use super::{check_encoding, check_schema, check_version, outbox, role};
use crate::cli::findings::Findings;
use crate::config::Config;
use crate::error::Result;
use crate::pg::slot::ServerFacts;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::Options;
use crate::relay::check::polling::{self, PollFacts, PollingFrom};
use crate::relay::checkpoint;
use crate::relay::session::poll::{self, PollStart};

pub(super) async fn look(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    server: &ServerFacts,
) -> Result<()> {
    check_version(f, config, server);
    check_encoding(f, client).await?;
    role::check_rights(f, config, client, &server.user).await?;
    let fits = outbox::check(f, config, client, None).await?;
    if !check_schema(f, client).await {
        return Ok(());
    }
    let name = &config.relay.name;
    check_messages(f, client).await?;
    let relay = &config.relay;
    // The reason has been reported.
    if !fits {
        return Ok(());
    }
    if checkpoint::read(client, name).await?.is_none() {
        check_indexes(f, &poll::facts(client, relay, None).await?);
        f.error("checkpoint", &checkpoint::no_row(name));
        return Ok(());
    }
    match poll::read(client, &config.relay).await {
        Ok(found) => {
            check_indexes(f, &found.facts);
            check_start(f, relay, &found);
        }
        Err(error) => f.error("checkpoint", &error),
    }
    Ok(())
}

/// Those of a mapped table are part of its mapping.
fn check_indexes(f: &mut Findings, facts: &PollFacts) {
    if !facts.outbox.is_own() {
        return;
    }
    match polling::verify_indexes(facts) {
        Ok(()) => f.ok("index", "watership.outbox has what polling needs"),
        Err(error) => f.error("index", &error),
    }
}

/// Events that applications may emit and nobody would read.
async fn check_messages(f: &mut Findings, client: &Client) -> Result<()> {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_proc AS p \
        JOIN pg_catalog.pg_namespace AS n ON n.oid = p.pronamespace \
        JOIN pg_catalog.pg_roles AS r ON r.rolname = 'watership_app' \
        WHERE n.nspname = 'watership' AND p.proname IN ('emit_wal', 'emit_wal_bytes') \
            AND has_schema_privilege(r.oid, n.oid, 'USAGE') \
            AND has_function_privilege(r.oid, p.oid, 'EXECUTE'))";
    let row = unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?;
    if row.try_get(0).map_err(postgres_error)? {
        f.ok(
            "emit_wal",
            "note: watership_app may call emit_wal, and its events are only in the WAL: a relay \
             that polls does not see them",
        );
    }
    Ok(())
}

fn check_start(f: &mut Findings, relay: &Options, found: &PollStart) {
    let name = &relay.name;
    if let Some(missing) = polling::unread_too_long(relay.retained_for, found.facts.unread_for) {
        f.warning(
            "outbox",
            missing,
            "stop deleting rows until the relay has caught up; if your applications keep rows \
             for longer than this, raise outbox.retained_for",
        );
    }
    let batch = found.row.flush().0;
    match found.verify() {
        Ok(PollingFrom::AsStored) => f.ok("checkpoint", format!("relay {name:?} at batch {batch}")),
        Ok(PollingFrom::NewEpoch) => f.warning(
            "checkpoint",
            format!(
                "the server is on timeline {}, the checkpoint on {}: it was promoted or restored",
                found.server.timeline, found.row.timeline
            ),
            "no action needed: the relay continues from its checkpoint in a new epoch",
        ),
        Err(error) => f.error("checkpoint", &error),
    }
}
