//! Other relays, on the same backlog in the same run: programs that are told by their environment
//! where to read and where to publish, and run until they are killed. `PROGRAM install` gets what
//! they need. `tests/bench/peers/` holds them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use tokio_postgres::Client;
use watership::dev::{self, Process};
use watership::error::{Error, Result};

use crate::drain::{self, Drain};
use crate::limits;
use crate::relay::Relay;
use crate::servers::Servers;

/// What a peer made of the backlog.
#[derive(Debug, Clone, Serialize)]
pub struct Peer {
    pub name: String,
    pub drain: Drain,
}

/// A peer's program, and its slot and queue for one backlog.
pub struct Prepared {
    name: String,
    program: PathBuf,
    /// Of the slot and the queue.
    place: String,
}

/// Lets the program install what it needs, and makes its slot. Before the load: all slots see the
/// same WAL.
pub async fn prepare(client: &Client, program: &Path, database: &str) -> Result<Prepared> {
    let name = program.file_stem().and_then(|stem| stem.to_str());
    let name = name.ok_or_else(|| Error::config(format!("{} names no peer", program.display())))?;
    let installed = tokio::process::Command::new(program).arg("install").status().await;
    let installed = installed.is_ok_and(|status| status.success());
    if !installed {
        return Err(Error::config(format!("`{} install` does not work", program.display())));
    }
    let place = format!("{database}_{}", name.replace('-', "_"));
    limits::prepare(client, &place).await?;
    Ok(Prepared { name: name.into(), program: program.into(), place })
}

impl Prepared {
    /// Starts the program and follows it until `events` messages lie in its queue.
    pub async fn run(&self, servers: &Servers, database: &str, events: u64) -> Result<Peer> {
        servers.fresh_queue(&self.place).await?;
        servers.settle_broker().await?;
        let mut command = Command::new(&self.program);
        command
            .env("PEER_DATABASE", servers.postgres.url("postgres", database))
            .env("PEER_PUBLICATION", database)
            .env("PEER_SLOT", &self.place)
            .env("PEER_BROKER", servers.rabbit.url("/"))
            .env("PEER_QUEUE", &self.place);
        let log = dev::home()?.join(format!("{}.log", self.place));
        let mut relay = Relay::other(Process::spawn(&self.name, command, &log)?, log);
        let first = drain::first_message(servers, &self.place, &mut relay).await?;
        let database = servers.client(database).await?;
        let drain =
            drain::measure(servers, &database, &self.place, events, &mut relay, first).await?;
        // It has no say in how it ends.
        drop(relay);
        drain::free(servers, &self.place).await?;
        Ok(Peer { name: self.name.clone(), drain })
    }
}
