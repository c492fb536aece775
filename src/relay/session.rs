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
use crate::column::binary::{Types, UserType};
use crate::error::{Error, Kind, Result};
use crate::message::Publisher as _;
use crate::metrics::Metrics;
use crate::pg;
use crate::pg::client::{Closed, SqlConnection, sql};
use crate::pg::publication::{Publication, TableFacts, TableName, read_publication, read_table};
use crate::pg::replication::{ReplicationConnection, ReplicationStream, StreamOptions};
use crate::pg::slot::{ServerFacts, SlotState, insert_lsn, read_slot, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::position::Lsn;
use crate::relay::canary::Canary;
use crate::relay::checkpoint::{self, PostgresStore, Row, Store};
use crate::relay::parking::{Parking, store as parked};
use crate::relay::phantoms::Published;
use crate::relay::position_check::{self, Failover, Start};
use crate::relay::progress::Progress;
use crate::relay::status::Status;
use crate::relay::table_check;
use crate::relay::{Options, Parts, Relay};
use crate::route::{Router, keys_of};
use crate::source::transaction::{self, Assembler, CapturedTable, Timelines};
use crate::source::wal::{Timing, Wal};
use crate::verdict::Verdict;

/// An open session, ready to run.
pub struct Session {
    /// The engine.
    pub relay: Relay<Wal, Connection>,
    /// Tells when the SQL connection ends: a shutdown of the server is seen at once.
    pub closed: Closed,
}

/// What all sessions of a process share.
#[derive(Clone)]
pub struct Shared {
    /// Metrics handles.
    pub metrics: Arc<Metrics>,
    /// What `/status` shows.
    pub status: Arc<Status>,
    /// What was written to be seen in the stream.
    pub canary: Arc<Canary>,
}

/// Opens all three connections and starts the stream.
///
/// The broker comes first, because its lock queue decides who may go on: a stand-by asks nothing
/// of Postgres, and changes nothing in the broker.
///
/// # Errors
/// Whatever stands in the way; verdicts of [`position_check`] among them.
pub async fn open(
    options: &Options,
    router: &Arc<Router>,
    shared: &Shared,
    published: &mut Published,
) -> Result<Session> {
    let mut broker = options.broker.clone();
    broker.exchanges = router.exchanges().to_vec();
    broker.lock_queue = Some(format!("watership.{}.lock", options.name));
    let mut publisher = counted(Connection::open(&broker).await, &shared.metrics.lock_busy)?;
    let prepared = beside(&mut publisher, prepare(options, &broker, &shared.metrics)).await;
    let Prepared { source, store, parking, taken, closed } = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            publisher.close().await;
            return Err(error);
        }
    };
    let row = taken.row;
    if let Some(failover) = taken.failover {
        let phantoms = published.take_beyond(failover.switch);
        shared.metrics.wal.phantom_suspected.increment(phantoms);
        tracing::warn!(
            timeline = failover.timeline,
            switch = %failover.switch,
            from = %failover.flush_lsn,
            phantoms,
            epoch = row.position.epoch,
            "a standby was promoted: the stream goes on from its slot in a new epoch; phantoms \
             are events that were published and then rolled away"
        );
    }
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
        progress: Progress::new(row.position, row.flush_lsn.into()),
        parking,
        router: router.clone(),
        metrics: shared.metrics.clone(),
        status: shared.status.clone(),
        canary: shared.canary.clone(),
        published: std::mem::take(published),
    };
    shared.canary.begin(row.flush_lsn, taken.canary, std::time::Instant::now());
    Ok(Session { relay: Relay::new(parts, &options.name, &options.tuning), closed })
}

/// Does `work` while the broker connection, which publishes nothing yet, is kept alive.
async fn beside<T>(publisher: &mut Connection, work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut outcomes = Vec::new();
    tokio::select! { biased;
        ended = publisher.next_outcomes(&mut outcomes) => match ended {
            Err(error) => Err(error),
            Ok(()) => Err(Error::protocol("the broker confirmed what was never published")),
        },
        done = work => done,
    }
}

/// Counts what could not be had because another relay has it.
fn counted<T>(result: Result<T>, busy: &metrics::Counter) -> Result<T> {
    if result.as_ref().is_err_and(|error| error.kind() == Kind::Busy) {
        busy.increment(1);
    }
    result
}

/// The Postgres half of a session.
struct Prepared {
    source: Wal,
    store: PostgresStore,
    parking: Parking,
    taken: TakenOver,
    closed: Closed,
}

async fn prepare(
    options: &Options,
    broker: &crate::amqp::options::Options,
    metrics: &Metrics,
) -> Result<Prepared> {
    let (SqlConnection { client, closed }, mut replication, ()) = tokio::try_join!(
        sql(&options.sql),
        ReplicationConnection::connect(&options.sql),
        topology::apply(broker, &options.topology)
    )?;
    let client = Arc::new(client);
    // Whether a standby has the checkpoint does not matter, and it may be away for long.
    client.batch_execute("SET synchronous_commit = local").await.map_err(postgres_error)?;
    let (timelines, system_id) = timelines(&mut replication).await?;
    let taken = counted(take_over(&client, options, &timelines).await, &metrics.slot_busy)?;
    let row = &taken.row;
    if system_id != row.system_id {
        let text = "the replication connection reaches another cluster than the SQL connection";
        return Err(Error::named(Verdict::OtherCluster, text)
            .hint("source.url must name one server, not a balancer"));
    }
    let stream = stream(&client, replication, options, &taken, timelines).await;
    let (stream, assembler) = counted(stream, &metrics.slot_busy)?;
    let timing = Timing::new(taken.server.wal_sender_timeout);
    let source = Wal::new(stream, assembler, timing, row.flush_lsn);
    let found = parked::index(&client, &options.name).await?;
    let known = parked::known(&client, &options.name, row.position).await?;
    let parking = Parking::new(options.tuning.parked, found, known);
    let store = PostgresStore::new(client, &options.name, row.session_no).await?;
    Ok(Prepared { source, store, parking, taken, closed })
}

/// SQLSTATE object_in_use.
const SLOT_IN_USE: &str = "55006";

struct TakenOver {
    row: Row,
    server: ServerFacts,
    publication: Publication,
    failover: Option<Failover>,
    /// Whether the canary is in the publication.
    canary: bool,
}

/// Reads the checkpoint, makes sure that it may be started from, and takes it over.
async fn take_over(client: &Client, options: &Options, timelines: &Timelines) -> Result<TakenOver> {
    let name = &options.name;
    let found = look(client, options).await?;
    if found.server.timeline != timelines.current() {
        // Promoted between two looks: the history is that of before.
        let (then, now) = (timelines.current(), found.server.timeline);
        let text = format!("the server went from timeline {then} to {now} just now");
        return Err(Error::unreachable(text).hint("nothing: the next session reads the new one"));
    }
    let failover = match found.verify(options, timelines.history())? {
        Start::AsStored => None,
        Start::Failover(failover) => Some(failover),
    };
    let publication = found
        .publication
        .as_ref()
        .ok_or_else(|| Error::protocol("a publication that is missing was not noticed"))?;
    position_check::carries(publication, &options.wanted())?;
    if let Some(pid) = found.slot.as_ref().and_then(|slot| slot.active_pid) {
        // Before the checkpoint is taken: a relay on another broker or vhost, which has another
        // lock, goes on undisturbed.
        let text = format!("slot {:?} is read by pid {pid}", options.slot);
        return Err(Error::new(Kind::Busy, text)
            .coded(SLOT_IN_USE)
            .hint("another relay reads the slot; this one waits"));
    }
    if let Some(failover) = &failover {
        let followed = checkpoint::follow(client, name, &found.row, failover).await?;
        followed.ok_or_else(|| checkpoint::taken_over(name))?;
    }
    let row = checkpoint::take_session(client, name, publication.oid).await?;
    let wanted = options.wanted();
    let unwanted = publication.tables.iter().map(|published| published.table.to_string());
    let unwanted: Vec<String> = unwanted.filter(|table| !wanted.contains(table)).collect();
    if !unwanted.is_empty() {
        let publication = &options.publication;
        tracing::warn!(
            publication,
            tables = ?unwanted,
            "these tables are published and not in source.tables: their changes are left out"
        );
    }
    let facts = position_check::facts(publication, &wanted);
    if found.agreed.as_ref() != Some(&facts) {
        tracing::info!(
            publication = options.publication,
            tables = ?facts.tables.iter().map(|t| t.table.to_string()).collect::<Vec<_>>(),
            "the publication is noted as it is now"
        );
        checkpoint::agree(client, name, &facts).await?;
    }
    // From the second on, a canary is an update of its row.
    let updates = publication.operations.update;
    let canary = updates && facts.tables.iter().any(|t| t.table == TableName::canary());
    if !canary && !options.canary_interval.is_zero() {
        tracing::warn!(
            publication = options.publication,
            updates,
            "watership.canary is not in the publication, or its updates are not, so a deaf stream \
             is not noticed: run `watership init`, and let the publication publish updates"
        );
    }
    let publication = publication.clone();
    Ok(TakenOver { row, server: found.server, publication, failover, canary })
}

/// What is compared at every start, and every few seconds while a session runs.
pub struct Found {
    row: Row,
    server: ServerFacts,
    slot: Option<SlotState>,
    agreed: Option<Publication>,
    publication: Option<Publication>,
}

/// Reads all of it. The slot comes first and the server last: what is read later may have moved on,
/// and slot ≤ checkpoint ≤ server must still hold.
///
/// # Errors
/// The server's, or a verdict when there is no checkpoint.
pub async fn look(client: &Client, options: &Options) -> Result<Found> {
    let name = &options.name;
    let slot = read_slot(client, &options.slot).await?;
    let row = checkpoint::read(client, name).await?.ok_or_else(|| checkpoint::no_row(name))?;
    if row.slot != options.slot {
        let (stored, asked) = (&row.slot, &options.slot);
        let text = format!("the checkpoint of {name:?} belongs to slot {stored:?}, not {asked:?}");
        return Err(Error::named(Verdict::OtherSlot, text)
            .hint("set source.slot back, or give the relay another name and run init"));
    }
    let agreed = checkpoint::read_agreed(client, name).await?;
    let publication = read_publication(client, &options.publication).await?;
    let server = server_facts(client).await?;
    Ok(Found { row, server, slot, agreed, publication })
}

impl Found {
    /// Compares it; `history` as in [`position_check::verify`].
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify(&self, options: &Options, history: &[(u32, Lsn)]) -> Result<Start> {
        let start = self.verify_position(history)?;
        self.verify_publication(options)?;
        Ok(start)
    }

    /// Everything that is in the way.
    pub fn doubts(&self, options: &Options, history: &[(u32, Lsn)]) -> Vec<Error> {
        let position = self.verify_position(history).err();
        position.into_iter().chain(self.verify_publication(options).err()).collect()
    }

    fn verify_position(&self, history: &[(u32, Lsn)]) -> Result<Start> {
        position_check::verify(&self.row, &self.server, self.slot.as_ref(), history)
    }

    /// Compares only the publication.
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify_publication(&self, options: &Options) -> Result<()> {
        let Self { row, server, agreed, publication, .. } = self;
        let (end, name, wanted) = (server.wal_lsn, &options.publication, options.wanted());
        let (agreed, found) = (agreed.as_ref(), publication.as_ref());
        position_check::verify_publication(row, end, name, agreed, found, &wanted)
    }

    /// The checkpoint, the slot, and the server.
    pub fn position(&self) -> (&Row, Option<&SlotState>, &ServerFacts) {
        (&self.row, self.slot.as_ref(), &self.server)
    }

    /// The publication.
    pub fn publication(&self) -> Option<&Publication> {
        self.publication.as_ref()
    }

    /// The server is on another timeline than the checkpoint.
    pub fn is_elsewhere(&self) -> bool {
        self.server.timeline != self.row.timeline
    }
}

/// The timeline that the server is on with its ancestors, and the system identifier.
async fn timelines(replication: &mut ReplicationConnection) -> Result<(Timelines, u64)> {
    let system = replication.identify_system().await?;
    let history = match system.timeline {
        0 | 1 => Vec::new(),
        timeline => parse_history(&replication.timeline_history(timeline).await?)?,
    };
    Ok((Timelines::new(system.timeline, history), system.system_id))
}

/// The ancestors of the server's timeline, for those who only look; empty where nobody needs them.
///
/// # Errors
/// The server's.
pub async fn ancestors_for(
    options: &pg::connect::Options,
    found: &Found,
) -> Result<Vec<(u32, Lsn)>> {
    if !found.is_elsewhere() || found.server.wal_level != "logical" {
        return Ok(Vec::new());
    }
    let mut replication = ReplicationConnection::connect(options).await?;
    let (timelines, _) = timelines(&mut replication).await?;
    replication.close().await;
    Ok(timelines.history().to_vec())
}

async fn stream(
    client: &Client,
    replication: ReplicationConnection,
    options: &Options,
    taken: &TakenOver,
    timelines: Timelines,
) -> Result<(ReplicationStream, Assembler)> {
    let row = &taken.row;
    // The place comes first: what is changed in between is then read, or newer.
    let catalog_at = insert_lsn(client).await?;
    let types = if options.binary { Some(user_types(client).await?) } else { None };
    let assembler = Assembler::new(transaction::Options {
        epoch: row.position.epoch,
        system_id: row.system_id,
        timelines,
        resume_after: row.position,
        database: taken.server.database.as_str().into(),
        outbox: options.outbox.clone(),
        captured: captured(client, options, &taken.publication).await?,
        catalog_at,
        types,
        canary: options.name.clone(),
    });
    let publications = [&*options.publication];
    let asked = StreamOptions { binary: options.binary, ..StreamOptions::default() };
    let stream = replication.start(&options.slot, row.flush_lsn, &publications, asked).await?;
    Ok((stream, assembler))
}

/// The tables of `source.tables`.
async fn captured(
    client: &Client,
    options: &Options,
    publication: &Publication,
) -> Result<HashMap<String, CapturedTable>> {
    let mut captured = HashMap::new();
    let operations = publication.operations;
    for facts in read_tables(client, options, publication).await? {
        let table = &facts.table.to_string();
        for (route, key) in keys_of(&options.rules, table) {
            if let Some((what, hint)) = table_check::hides_route_key(&facts, route, key) {
                tracing::warn!(hint, "{what}");
            }
        }
        let list = publication.table(&facts.table).and_then(|table| table.columns.as_ref());
        let described = CapturedTable {
            oid: facts.oid,
            primary_key: facts.primary_key,
            leading: if list.is_none() { facts.leading } else { Vec::new() },
            partitioned: facts.partitioned,
            inserts_only: !operations.update && !operations.delete,
        };
        captured.insert(table.clone(), described);
    }
    Ok(captured)
}

/// The tables of `source.tables`, each of them fit to be captured.
///
/// # Errors
/// [`Kind::Refused`] for one that does not exist, or whose changes could not be told apart.
pub async fn read_tables(
    client: &Client,
    options: &Options,
    publication: &Publication,
) -> Result<Vec<TableFacts>> {
    let mut tables = Vec::new();
    for table in &options.tables {
        let name: TableName = table.parse()?;
        let facts = read_table(client, &name).await?.ok_or_else(|| {
            Error::refused(format!("captured table {table} does not exist"))
                .hint("create it, or remove it from source.tables")
        })?;
        table_check::keys_its_changes(&facts, Some(publication))?;
        tables.push(facts);
    }
    Ok(tables)
}

/// How each type of users and extensions is sent in binary.
async fn user_types(client: &Client) -> Result<Types> {
    const SQL: &str = include_str!("../../sql/query/user_types.sql");
    let mut types = HashMap::new();
    for row in client.query(SQL, &[]).await.map_err(postgres_error)? {
        let type_oid: u32 = row.try_get(0).map_err(postgres_error)?;
        let base: Option<u32> = row.try_get(1).map_err(postgres_error)?;
        let send: &str = row.try_get(2).map_err(postgres_error)?;
        let subtype: Option<u32> = row.try_get(3).map_err(postgres_error)?;
        let how = match base {
            Some(base) => UserType::Domain(base),
            None => UserType::of(send, subtype.unwrap_or(0)),
        };
        types.insert(type_oid, how);
    }
    Ok(Types(types))
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
