//! One life of the three connections: SQL, replication, broker.
//!
//! Order of the start: the broker's lock queue is held before anything is read, so that no other
//! relay of this name is still publishing; then the checkpoint is read, compared with the server
//! and the slot, and taken over; then the stream starts where the checkpoint says.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::Client;

use crate::amqp::publisher::Connection;
use crate::amqp::topology;
use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::pg::client::{Closed, SqlConnection, sql};
use crate::pg::publication::{TableName, read_publication, read_table};
use crate::pg::replication::{ReplicationConnection, ReplicationStream, StreamOptions};
use crate::pg::slot::{ServerFacts, read_slot, server_facts};
use crate::position::Lsn;
use crate::relay::checkpoint::{self, PostgresStore, Row, Store};
use crate::relay::progress::Progress;
use crate::relay::status::Status;
use crate::relay::{Options, Parts, Relay};
use crate::route::Router;
use crate::source::transaction::{self, Assembler, Timelines};
use crate::source::wal::{Timing, Wal};

/// An open session, ready to run.
pub struct Session {
    /// The engine.
    pub relay: Relay<Wal, Connection>,
    /// Tells when the SQL connection ends: a shutdown of the server is seen at once.
    pub closed: Closed,
}

/// Opens all three connections and starts the stream.
///
/// # Errors
/// Whatever stands in the way; verdicts of [`checkpoint::verify`] among them.
pub async fn open(
    options: &Options,
    router: &Arc<Router>,
    metrics: &Arc<Metrics>,
    status: &Arc<Status>,
) -> Result<Session> {
    let (SqlConnection { client, closed }, replication, publisher) = tokio::try_join!(
        sql(&options.sql),
        ReplicationConnection::connect(&options.sql),
        broker(options, router)
    )?;
    let client = Arc::new(client);
    let (row, server) = take_over(&client, options).await?;
    let (stream, assembler) = stream(&client, replication, options, &row).await?;
    let timing = Timing::new(server.wal_sender_timeout);
    let source = Wal::new(stream, assembler, timing, row.flush_lsn);
    let store = PostgresStore::new(client, &options.name, row.session_no).await?;
    tracing::info!(
        session = row.session_no,
        position = %row.position,
        flush_lsn = %row.flush_lsn,
        slot = options.slot,
        "streaming"
    );
    let parts = Parts {
        source,
        publisher,
        store: Store::Postgres(Arc::new(store)),
        progress: Progress::new(row.position, row.flush_lsn),
        router: router.clone(),
        metrics: metrics.clone(),
        status: status.clone(),
    };
    Ok(Session { relay: Relay::new(parts, &options.name, &options.tuning), closed })
}

async fn broker(options: &Options, router: &Router) -> Result<Connection> {
    let mut broker = options.broker.clone();
    broker.exchanges = router.exchanges().to_vec();
    broker.lock_queue = Some(format!("watership.{}.lock", options.name));
    topology::apply(&broker, &options.topology).await?;
    Connection::open(&broker).await
}

/// Reads the checkpoint, makes sure that it may be started from, and takes it over.
async fn take_over(client: &Client, options: &Options) -> Result<(Row, ServerFacts)> {
    let name = &options.name;
    let row = checkpoint::read(client, name).await?.ok_or_else(|| checkpoint::no_row(name))?;
    if row.slot != options.slot {
        let (stored, asked) = (&row.slot, &options.slot);
        let text = format!("the checkpoint of {name:?} belongs to slot {stored:?}, not {asked:?}");
        return Err(Error::verdict(text)
            .hint("set source.slot back, or give the relay another name and run init"));
    }
    let server = server_facts(client).await?;
    let slot = read_slot(client, &options.slot).await?;
    checkpoint::verify(&row, &server, slot.as_ref())?;
    let publication = read_publication(client, &options.publication)
        .await?
        .ok_or_else(|| no_publication(options))?;
    let taken = checkpoint::take_session(client, name, publication.oid).await?;
    if taken.publication_oid != row.publication_oid {
        tracing::warn!(
            publication = options.publication,
            position = %taken.position,
            "the publication was re-created: its last transaction is sent again from its start"
        );
    }
    Ok((taken, server))
}

fn no_publication(options: &Options) -> Error {
    Error::verdict(format!("publication {:?} does not exist", options.publication)).hint(
        "changes committed without it were not streamed; create it with `watership init`, then \
         decide about the gap",
    )
}

async fn stream(
    client: &Client,
    mut replication: ReplicationConnection,
    options: &Options,
    row: &Row,
) -> Result<(ReplicationStream, Assembler)> {
    let system = replication.identify_system().await?;
    if system.system_id != row.system_id {
        let text = "the replication connection reaches another cluster than the SQL connection";
        return Err(Error::verdict(text).hint("source.url must name one server, not a balancer"));
    }
    let history = match system.timeline {
        0 | 1 => Vec::new(),
        timeline => parse_history(&replication.timeline_history(timeline).await?)?,
    };
    let assembler = Assembler::new(transaction::Options {
        epoch: row.position.epoch,
        system_id: system.system_id,
        timelines: Timelines::new(system.timeline, history),
        resume_after: row.position,
        primary_keys: primary_keys(client, &options.tables).await?,
    });
    let publications = [&*options.publication];
    let stream = replication
        .start(&options.slot, row.flush_lsn, &publications, StreamOptions::default())
        .await?;
    Ok((stream, assembler))
}

async fn primary_keys(client: &Client, tables: &[String]) -> Result<HashMap<String, Vec<String>>> {
    let mut keys = HashMap::new();
    for table in tables {
        let name: TableName = table.parse()?;
        let facts = read_table(client, &name).await?.ok_or_else(|| {
            Error::new(Kind::Refused, format!("captured table {table} does not exist"))
                .hint("create it, or remove it from source.tables")
        })?;
        keys.insert(table.clone(), facts.primary_key);
    }
    Ok(keys)
}

/// Lines of `timeline <tab> switch LSN <tab> reason`, oldest first, with comments.
///
/// <https://www.postgresql.org/docs/current/protocol-replication.html>, TIMELINE_HISTORY.
fn parse_history(content: &str) -> Result<Vec<(u32, Lsn)>> {
    let line = |line: &str| {
        let wrong = || Error::protocol(format!("timeline history line {line:?}"));
        let mut fields = line.split_whitespace();
        let timeline = fields.next().and_then(|f| f.parse().ok()).ok_or_else(wrong)?;
        let switch = fields.next().ok_or_else(wrong)?.parse()?;
        Ok((timeline, switch))
    };
    let is_entry = |l: &&str| !l.trim().is_empty() && !l.trim_start().starts_with('#');
    content.lines().filter(is_entry).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_timeline_history() {
        let text = "# comment\n1\t0/15D68C0\tno recovery target specified\n\n2\t0/3000000\tx y\n";
        let history = parse_history(text).unwrap();
        assert_eq!(history, [(1, Lsn(0x15D_68C0)), (2, Lsn(0x300_0000))]);
        assert!(parse_history("1 nonsense").is_err());
    }
}
