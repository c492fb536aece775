//! The start of a session that reads the WAL: slot, publication and timeline are compared with the
//! checkpoint before it is taken over, and the stream begins where it says.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_postgres::Client;

use super::catalog::Captured;
use super::facts::{self, StartFacts};
use super::schemas::{self, Cataloged};
use super::user_types::read_types;
use super::{Prepared, Shared, catalog, count_busy, failed_over, held, outbox, partitions};
use crate::amqp::{self, topology};
use crate::error::{Code, Error, Kind, Result};
use crate::pg;
use crate::pg::client::SqlConnection;
use crate::pg::publication::{Publication, TableName};
use crate::pg::replication::{ReplicationConnection, ReplicationStream, StreamOptions};
use crate::pg::slot::{ServerFacts, insert_lsn};
use crate::pg::sqlstate::{OBJECT_IN_USE, postgres_error};
use crate::position::Lsn;
use crate::relay::Options;
use crate::relay::backfill::runs;
use crate::relay::check::columns::routes_of;
use crate::relay::check::lost::{self, Agreed, Returned};
use crate::relay::check::position::{self, Failover, Start};
use crate::relay::checkpoint::{self, Checkpoint, PostgresStore};
use crate::relay::parking::{Parking, store as parked};
use crate::relay::upkeep::canary;
use crate::relay::window::remembered::Remembered;
use crate::route::{Resumed, Rule};
use crate::source::AnySource;
use crate::source::columns::{self, ColumnWatch, Watched};
use crate::source::transaction::{self, Assembler, Timelines};
use crate::source::wal::{Timing, Wal};
use crate::verdict::Verdict;

/// Connects to Postgres, takes the checkpoint over, and starts the stream where it says.
///
/// # Errors
/// Whatever stands in the way; verdicts of [`position`] among them.
pub(super) async fn prepare(
    options: &Options,
    broker: &amqp::options::Options,
    shared: &Shared,
    remembered: &mut Remembered,
) -> Result<Prepared> {
    let busy = &shared.metrics.slot_busy;
    let replicating = ReplicationConnection::connect(&options.sql);
    let declaring = topology::apply_each(broker, &options.topology);
    let comparing = partitions::compare(options, broker);
    let is_partitioned = options.rules.iter().any(|rule| rule.partitions().is_some());
    let (compared, mut replication, wrong) = if is_partitioned {
        // Partitions that are refused must not be declared.
        let compared = comparing.await?;
        let (replication, wrong) = tokio::try_join!(replicating, declaring)?;
        (compared, replication, wrong)
    } else {
        tokio::try_join!(comparing, replicating, declaring)?
    };
    let (SqlConnection { client, closed }, changes) = compared;
    let client = Arc::new(client);
    // Whether a standby has the checkpoint does not matter, and it may be away for long. Questions
    // to the catalog must see what has just committed, even while a checkpoint is being stored.
    let settings = "SET synchronous_commit = local; \
        SET default_transaction_isolation = 'read committed'";
    client.batch_execute(settings).await.map_err(postgres_error)?;
    let (timelines, system_id) = timelines(&mut replication).await?;
    let taken = take_over(&client, options, &timelines, shared, remembered).await;
    let taken = count_busy(taken, busy)?;
    partitions::record(&client, options, &changes).await?;
    let row = &taken.row;
    if system_id != row.system_id {
        let text = "the replication connection and the SQL connection reach different clusters";
        return Err(Error::named(Verdict::OtherCluster, text)
            .hint("source.url must name one server, not a load balancer"));
    }
    let stream = stream(&client, replication, options, &taken, timelines, &shared.keys).await;
    let Streaming { stream, assembler, columns, mut resumed } = count_busy(stream, busy)?;
    let timing = Timing::new(taken.server.wal_sender_timeout);
    let source = AnySource::Wal(Wal::new(stream, assembler, columns, timing, row.flush_lsn));
    let found = parked::index(&client, &options.name).await?;
    resumed.parked = parked::table_names(&client, &options.name).await?;
    let known = parked::known(&client, &options.name, row.position).await?;
    let parking = Parking::new(options.tuning.parked, found, known);
    let backfilling = runs::list(&*client, &options.name, true).await?;
    let backfilling = backfilling.iter().filter_map(|run| Some(run.began?.0)).collect();
    let own = shared.own.clone();
    let store = PostgresStore::new(client, &options.name, row.session_no, own).await?;
    let TakenOver { row, failover, canary, .. } = taken;
    Ok(Prepared {
        source,
        resumed,
        store,
        parking,
        row,
        failover,
        canary,
        wrong,
        backfilling,
        closed,
    })
}

/// What a session starts from.
pub(super) struct TakenOver {
    pub(super) row: Checkpoint,
    pub(super) server: ServerFacts,
    publication: Publication,
    agreed: Agreed,
    failover: Option<Failover>,
    /// Whether the canary is in the publication.
    canary: bool,
}

impl TakenOver {
    /// The same, of a checkpoint that was only looked at.
    pub(super) fn looked_at(found: StartFacts, options: &Options) -> Result<Self> {
        let publication = carried(&found, options)?.clone();
        let facts = || Agreed::whole(position::facts(&publication, &options.wanted()));
        let agreed = found.agreed().cloned().unwrap_or_else(facts);
        let row = found.position().0.clone();
        let server = found.into_server();
        Ok(Self { row, server, publication, agreed, failover: None, canary: false })
    }
}

/// The publication, which passes on what the relay needs.
fn carried<'a>(found: &'a StartFacts, options: &Options) -> Result<&'a Publication> {
    let publication = found
        .publication()
        .ok_or_else(|| Error::internal("verification passed without a publication"))?;
    position::carries(publication, &options.wanted(), &options.held)?;
    Ok(publication)
}

/// Reads the checkpoint, makes sure that it may be started from, and takes it over.
async fn take_over(
    client: &Client,
    options: &Options,
    timelines: &Timelines,
    shared: &Shared,
    remembered: &mut Remembered,
) -> Result<TakenOver> {
    let own = &shared.own;
    let (name, last_known) = (&options.name, own.last_known());
    let found = facts::read(client, options).await?;
    let (stored, slot, server) = found.position();
    if server.timeline != timelines.current() {
        // Promoted between two looks: the history is that of before.
        let (then, now) = (timelines.current(), server.timeline);
        let text = format!("the server was promoted (timeline {then} to {now}) during start-up");
        return Err(Error::unreachable(text)
            .hint("no action needed: the next session uses the new timeline"));
    }
    found.verify_own(last_known)?;
    let failover = match found.verify(options, timelines.history())? {
        Start::AsStored => None,
        Start::Failover(failover) => Some(failover),
    };
    // The place comes first: what is changed in between is then agreed to, or newer.
    let agreed_at = insert_lsn(client).await?;
    let publication = carried(&found, options)?;
    // Before the checkpoint is taken: what cannot work must not replace what does.
    outbox::verify(client, options, Some(publication)).await?;
    let tables = catalog::read_tables(client, options, publication, found.agreed()).await?;
    let cataloged = schemas::catalog(client, Some(publication), &tables.found).await?;
    let routes_agreed = schemas::agreed(client, name).await?;
    schemas::verify(client, options, &cataloged, &routes_agreed).await?;
    if let Some(pid) = slot.and_then(|slot| slot.active_pid) {
        // Before the checkpoint is taken: a relay on another broker or vhost, which has another
        // lock, continues undisturbed.
        let text = format!("slot {:?} is in use by pid {pid}", options.slot);
        return Err(Error::new(Kind::Busy, text)
            .coded(Code::Sqlstate(OBJECT_IN_USE.into()))
            .hint("another relay is using the slot; this relay is on standby"));
    }
    if let Some(failover) = &failover {
        let followed = checkpoint::follow(client, name, stored, failover).await?;
        followed.ok_or_else(|| checkpoint::taken_over(name))?;
    }
    let row = checkpoint::take_session(client, name, Some(publication.oid)).await?;
    if let Some(failover) = &failover {
        failed_over::record(client, options, &row, failover).await?;
    }
    own.took(&row, remembered);
    let intact = shared.keys.intact().unwrap_or(row.flush_lsn);
    let (agreed, returned) =
        agree(client, options, &found, publication, &tables, &row, intact).await?;
    held::tell(shared, &agreed, &returned, tables.gone);
    let new = schemas::agree_first(client, options, &cataloged, &routes_agreed, agreed_at).await?;
    tell_agreed(&new, &cataloged);
    shared.keys.agreed_to(schemas::agreed_to(client, name).await?);
    let canary = has_canary(options, publication);
    let (publication, server) = (publication.clone(), found.into_server());
    Ok(TakenOver { row, server, publication, agreed, failover, canary })
}

/// Records the publication as it is now, and reports what is odd about it. Returns it with the held
/// tables that have come back.
async fn agree(
    client: &Client,
    options: &Options,
    found: &StartFacts,
    publication: &Publication,
    tables: &Captured,
    row: &Checkpoint,
    intact: Lsn,
) -> Result<(Agreed, Vec<Returned>)> {
    let wanted = options.wanted();
    let unwanted = publication.tables.iter().map(|published| published.table.to_string());
    let unwanted: Vec<String> = unwanted.filter(|table| !wanted.contains(table)).collect();
    if !unwanted.is_empty() {
        let publication = &options.publication;
        tracing::warn!(
            publication,
            tables = ?unwanted,
            "tables in the publication but not in source.tables; their changes are ignored"
        );
    }
    let facts = position::facts(publication, &wanted);
    let gone: Vec<TableName> = tables.gone.iter().map(|gone| gone.table.clone()).collect();
    let range = (intact, found.position().2.wal_lsn);
    let (facts, returned) = lost::agree(found.agreed(), facts, &options.held, &gone, range);
    if found.agreed() != Some(&facts) {
        tracing::info!(
            publication = options.publication,
            tables = ?facts.tables().map(ToString::to_string).collect::<Vec<_>>(),
            "recorded the current publication"
        );
        // Before it is agreed to, because afterwards nothing tells of it.
        for table in &returned {
            held::record(client, options, row, table).await?;
        }
        checkpoint::agree(client, &options.name, &facts).await?;
    }
    Ok((facts, returned))
}

fn tell_agreed(new: &[(String, String)], tables: &[Cataloged]) {
    for (route, table) in new {
        let of_table = tables.iter().find(|cataloged| cataloged.table == *table);
        let columns = of_table.into_iter().flat_map(|found| &found.description.columns);
        let columns: Vec<&str> = columns.map(|column| &*column.name).collect();
        tracing::info!(route, table, ?columns, "the route has agreed to the table as it is now");
    }
}

/// Whether the canary is in the publication; warns where it is not.
fn has_canary(options: &Options, publication: &Publication) -> bool {
    // From the second on, a canary is an update of its row.
    let updates = publication.operations.update;
    let canary = updates && publication.table(&TableName::canary()).is_some();
    if !canary && !options.canary_interval.is_zero() {
        tracing::warn!(
            publication = options.publication,
            updates,
            "watership.canary or its updates are not published, so skipped changes go \
             unnoticed: run `watership init`, and make sure the publication publishes updates"
        );
    }
    canary
}

/// A stream that has begun.
pub(super) struct Streaming {
    pub(super) stream: ReplicationStream,
    pub(super) assembler: Assembler,
    pub(super) columns: ColumnWatch,
    pub(super) resumed: Resumed,
}

pub(super) async fn stream(
    shared_client: &Arc<Client>,
    replication: ReplicationConnection,
    options: &Options,
    taken: &TakenOver,
    timelines: Timelines,
    started_with: &catalog::StartedWith,
) -> Result<Streaming> {
    let row = &taken.row;
    // The place comes first: what is changed in between is then read, or newer.
    let client: &Client = shared_client;
    let catalog_at = insert_lsn(client).await?;
    let types = read_types(client).await?;
    let columns = columns_of(shared_client, options, taken, started_with).await?;
    let captured = catalog::captured(client, options, &taken.publication, &taken.agreed).await?;
    let tables =
        catalog::read_tables(client, options, &taken.publication, Some(&taken.agreed)).await?;
    let cataloged = schemas::catalog(client, Some(&taken.publication), &tables.found).await?;
    started_with.set(&captured);
    let keys = captured.values().filter_map(|table| Some((table.oid, table.former.clone()?.key)));
    let names = captured.iter().map(|(name, table)| (table.oid, name.as_str().into()));
    let schemas = schemas::read(client, &options.name, (cataloged, catalog_at)).await?;
    let renumbered = captured.iter().filter(|(name, _)| schemas.is_renumbered(name));
    let renumbered = renumbered.map(|(_, table)| table.oid).collect();
    let messages = schemas.secret.messages();
    let canaries = canary::recorded(client, &options.name).await?;
    let resumed =
        Resumed { keys: keys.collect(), names: names.collect(), parked: HashMap::new(), schemas };
    let assembler = Assembler::new(transaction::Options {
        epoch: row.position.epoch,
        system_id: row.system_id,
        timelines,
        resume_after: row.position,
        database: taken.server.database.as_str().into(),
        outbox: outbox::verify(client, options, Some(&taken.publication)).await?,
        messages,
        captured,
        catalog_at,
        renumbered,
        types,
        max_body: options.broker.max_message_size,
        canary: options.name.clone(),
        canary_before: canaries.before,
        canary_accepted: canaries.accepted,
    });
    let publications = [&*options.publication];
    // Always with messages: an event that is one would be passed over in silence without.
    let asked = StreamOptions { binary: options.binary, messages: true };
    let stream = replication.start(&options.slot, row.flush_lsn, &publications, asked).await?;
    Ok(Streaming { stream, assembler, columns, resumed })
}

/// Watches the columns of captured tables. It reads the catalog before anything else does, so that
/// a change in between is noticed.
async fn columns_of(
    client: &Arc<Client>,
    options: &Options,
    taken: &TakenOver,
    started_with: &catalog::StartedWith,
) -> Result<ColumnWatch> {
    let tables =
        catalog::read_tables(client, options, &taken.publication, Some(&taken.agreed)).await?;
    let oids: Vec<u32> = tables.found.iter().map(|facts| facts.oid).collect();
    let (found, shown) = columns::read(client, &oids).await?;
    let mut watched = HashMap::new();
    for facts in &tables.found {
        let name = facts.table.to_string();
        let mut routes = routes_of(&options.rules, &name);
        let (columns, shown) = (found.get(&facts.oid), shown.clone());
        if let (Some(columns), Some(shown)) = (columns, shown)
            && routes.any(Rule::needs_columns)
        {
            watched.insert(facts.oid, Watched { columns: columns.clone(), shown });
        }
    }
    let unknown = started_with.set_columns(found, watched.keys().copied().collect());
    Ok(ColumnWatch::new(client.clone(), watched, unknown))
}

/// The timeline that the server is on with its ancestors, and the system identifier.
pub(super) async fn timelines(replication: &mut ReplicationConnection) -> Result<(Timelines, u64)> {
    let system = replication.identify_system().await?;
    let history = match system.timeline {
        0 | 1 => Vec::new(),
        timeline => parse_history(&replication.timeline_history(timeline).await?)?,
    };
    Ok((Timelines::new(system.timeline, history), system.system_id))
}

/// The ancestors of the server's timeline, for commands that only look; empty where not needed.
///
/// # Errors
/// The server's.
pub async fn ancestors_for(
    options: &pg::connect::Options,
    found: &StartFacts,
) -> Result<Vec<(u32, Lsn)>> {
    if !found.is_elsewhere() || found.position().2.wal_level != "logical" {
        return Ok(Vec::new());
    }
    let mut replication = ReplicationConnection::connect(options).await?;
    let (timelines, _) = timelines(&mut replication).await?;
    replication.close().await;
    Ok(timelines.history().to_vec())
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
