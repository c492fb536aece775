//! The limits of this machine: what a publisher without Postgres and a reader of the WAL without
//! a broker reach, each alone, and what CPU the servers need for it.

use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::Instant;
use tokio_postgres::Client;
use watership::error::{Error, Result};

use crate::servers::{Servers, sql};
use crate::usage::{Watch, tree_cpu_seconds};

/// More messages make the publisher's rate no truer.
pub const PUBLISH_MESSAGES_MAX: u64 = 200_000;
/// The relay's own `max_unconfirmed`.
const WINDOW: u64 = 2_000;
/// Bytes of a body, as `load` writes them.
const BODY_BYTES: u64 = 330;
/// How long one limit may take to measure.
const LIMIT: Duration = Duration::from_secs(300);
/// How long pg_recvlogical may take to appear in pg_stat_replication.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);

/// A raw confirming publisher into a quorum queue, no Postgres.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Publish {
    pub messages: u64,
    pub rate: f64,
    /// CPU of the broker, microseconds per message.
    pub broker_us: f64,
    /// CPU of the publisher itself, microseconds per message.
    pub publisher_us: f64,
}

/// pg_recvlogical to /dev/null, no broker.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Decode {
    pub rate: f64,
    /// CPU of the walsender, microseconds per event.
    pub walsender_us: f64,
}

/// What the raw publisher prints.
#[derive(Debug, Deserialize)]
struct Printed {
    messages: u64,
    rate: f64,
    user_s: f64,
    sys_s: f64,
}

/// The limit of a run: the smallest of both rates and of what the cores could serve.
pub fn limit(publish: Option<&Publish>, decode: &Decode) -> f64 {
    let Some(publish) = publish else { return decode.rate };
    publish.rate.min(decode.rate).min(cpu_bound(publish, decode))
}

/// Events per second at which broker and walsender alone use up all cores.
pub fn cpu_bound(publish: &Publish, decode: &Decode) -> f64 {
    cores() * 1e6 / (publish.broker_us + decode.walsender_us)
}

/// The cores that this process may use.
pub fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// What the raw publisher sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Two headers, through the default exchange: the least that a broker can be asked for.
    Bare,
    /// The headers of the relay's messages, through an exchange as the relay's: what the relay
    /// asks the broker for, without the relay.
    Relayed,
}

/// Measures the publisher; `None` when the program was not built.
pub async fn publish(servers: &Servers, messages: u64, kind: Kind) -> Result<Option<Publish>> {
    let program = match Servers::built("examples/raw_publisher") {
        Ok(program) => program,
        Err(error) => {
            eprintln!("the publish limit is left out: {error}");
            return Ok(None);
        }
    };
    let queue = "bench_publish";
    servers.fresh_queue(queue).await?;
    servers.settle_broker().await?;
    let pid = servers.rabbit_pid()?;
    let before = tree_cpu_seconds(pid);
    let mut command = Command::new(program);
    command.arg(servers.rabbit.url("/")).args(["--queue", queue]);
    for (name, value) in [("--messages", messages), ("--window", WINDOW), ("--body", BODY_BYTES)] {
        command.arg(name).arg(value.to_string());
    }
    if kind == Kind::Relayed {
        command.args(["--exchange", "bench_publish", "--kind", servers.routing.name()]);
    }
    let output = tokio::time::timeout(LIMIT, command.stderr(Stdio::inherit()).output()).await;
    let output = output
        .map_err(|e| Error::unreachable("the raw publisher takes too long").caused_by(e))?
        .map_err(|e| Error::config("starting the raw publisher").caused_by(e))?;
    let broker_seconds = tree_cpu_seconds(pid) - before;
    if !output.status.success() {
        return Err(Error::unreachable(format!("the raw publisher ended with {}", output.status)));
    }
    let printed: Printed = serde_json::from_slice(&output.stdout)
        .map_err(|e| Error::protocol("what the raw publisher prints").caused_by(e))?;
    servers.delete_queue(queue).await?;
    let per_message = 1e6 / printed.messages as f64;
    Ok(Some(Publish {
        messages: printed.messages,
        rate: printed.rate,
        broker_us: broker_seconds * per_message,
        publisher_us: (printed.user_s + printed.sys_s) * per_message,
    }))
}

/// Makes the slot that the limit is read from. Before the load: both slots see the same WAL.
pub async fn prepare(client: &Client, slot: &str) -> Result<()> {
    let make = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')";
    client.execute(make, &[&slot]).await.map(drop).map_err(sql("creating the limit's slot"))
}

/// Reads the backlog with pg_recvlogical, then drops the slot.
pub async fn decode(
    servers: &Servers,
    database: &str,
    slot: &str,
    publication: &str,
    events: u64,
) -> Result<Decode> {
    let client = servers.client(database).await?;
    let row = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await;
    let end: String = row.map_err(sql("asking for the end of the WAL"))?.get(0);
    let started = Instant::now();
    let mut child = Command::new(servers.postgres.bin_dir().join("pg_recvlogical"))
        .args(["--start", "--no-loop", "--fsync-interval=0", "--status-interval=1"])
        .args(["--file", "/dev/null", "--slot", slot, "--endpos", &end])
        .args(["-o", "proto_version=1", "-o", &format!("publication_names={publication}")])
        .args(["--dbname", &servers.postgres.url("postgres", database)])
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| {
            Error::config("starting pg_recvlogical")
                .caused_by(e)
                .hint("it belongs to Debian's postgresql-client; Postgres from npm has none")
        })?;
    let watch = Watch::start(walsender(&client, slot).await?);
    let ended = tokio::time::timeout(LIMIT, child.wait()).await;
    let seconds = started.elapsed().as_secs_f64();
    let status = ended
        .map_err(|e| Error::unreachable("pg_recvlogical takes too long").caused_by(e))?
        .map_err(|e| Error::unreachable("waiting for pg_recvlogical").caused_by(e))?;
    if !status.success() {
        return Err(Error::unreachable(format!("pg_recvlogical ended with {status}")));
    }
    let walsender_us = watch.finish().await * 1e6 / events as f64;
    let drop_slot = "SELECT pg_drop_replication_slot($1)";
    client.execute(drop_slot, &[&slot]).await.map_err(sql("dropping the limit's slot"))?;
    Ok(Decode { rate: events as f64 / seconds, walsender_us })
}

/// The process that serves `slot`, as soon as there is one.
pub async fn walsender(client: &Client, slot: &str) -> Result<u32> {
    let ask = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
    let deadline = Instant::now() + ATTACH_LIMIT;
    loop {
        let row = client.query_one(ask, &[&slot]).await.map_err(sql("asking for the slot"))?;
        if let Some(pid) = row.get::<_, Option<i32>>(0) {
            return u32::try_from(pid).map_err(|_| Error::protocol("a negative pid"));
        }
        if Instant::now() > deadline {
            return Err(Error::unreachable(format!("nobody reads slot {slot}")));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
