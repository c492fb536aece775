//! The same of a relay that polls: no slot, no publication, no right to replicate.

use tokio_postgres::Client;

use super::{INIT, check_encoding, check_rights, check_schema, check_version};
use crate::cli::findings::Findings;
use crate::config::Config;
use crate::error::Result;
use crate::pg::slot::ServerFacts;
use crate::relay::check::polling::{self, PollingFrom};
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
    check_rights(f, config, client, &server.user).await?;
    if !check_schema(f, client).await {
        return Ok(());
    }
    let name = &config.relay.name;
    if checkpoint::read(client, name).await?.is_none() {
        check_indexes(f, polling::verify_indexes(&poll::facts(client, None).await?));
        f.problem("checkpoint", format!("relay {name:?} has no checkpoint row"), INIT);
        return Ok(());
    }
    match poll::read(client, &config.relay).await {
        Ok(found) => {
            check_indexes(f, polling::verify_indexes(&found.facts));
            check_start(f, name, &found);
        }
        Err(error) => f.error("checkpoint", &error),
    }
    Ok(())
}

fn check_indexes(f: &mut Findings, verified: Result<()>) {
    match verified {
        Ok(()) => f.ok("index", "watership.outbox has what polling needs"),
        Err(error) => f.error("index", &error),
    }
}

fn check_start(f: &mut Findings, name: &str, found: &PollStart) {
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
