//! The start of a session that polls the outbox: the checkpoint is compared with the server before
//! it is taken over, and reading continues behind the batches that are settled.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;

use super::{Prepared, Shared, outbox, partitions, user_types};
use crate::amqp::{self, topology};
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::outbox::{MappedColumn, read_indexes};
use crate::pg::slot::{ServerFacts, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::Mark;
use crate::relay::Options;
use crate::relay::check;
use crate::relay::check::polling::{self, PollFacts, PollingFrom};
use crate::relay::check::position::Failover;
use crate::relay::checkpoint::own::LastKnown;
use crate::relay::checkpoint::{self, Checkpoint, PostgresStore};
use crate::relay::parking::{Parking, store as parked};
use crate::relay::window::remembered::Remembered;
use crate::route::{Resumed, Schemas};
use crate::source::outbox::{OutboxTable, Polled};
use crate::source::poll::{self, Batch, MadeWith, Poll, PolledOutbox};
use crate::source::{AnySource, SourceKind};

/// Bodies up to this size are read even if the broker does not take them: then they are parked as
/// too large, like those of the WAL.
const BODY_MAX: usize = 64 << 20;

/// Connects to Postgres, takes the checkpoint over, and begins behind it.
///
/// # Errors
/// Whatever stands in the way; verdicts of [`polling`] among them.
pub(super) async fn prepare(
    options: &Options,
    broker: &amqp::options::Options,
    shared: &Shared,
    remembered: &mut Remembered,
) -> Result<Prepared> {
    let (SqlConnection { client, closed }, changes) = partitions::compare(options, broker).await?;
    // Partitions that are refused must not be declared.
    let declaring = topology::apply_each(broker, &options.topology);
    let (reading, wrong) = tokio::try_join!(sql(&options.sql), declaring)?;
    let client = Arc::new(client);
    outbox::verify(&client, options, None).await?;
    let (row, database) = take_over(&client, options, shared, remembered).await?;
    partitions::record(&client, options, &changes).await?;
    // The connection lives as long as the source has its client; the source sees its end.
    let polled = polled_outbox(&client, options, &database.into()).await?;
    let source = source(Arc::new(reading.client), options, &row, polled, false).await?;
    let parked_rows = parked::index(&client, &options.name).await?;
    let resumed = Resumed {
        keys: HashMap::new(),
        names: HashMap::new(),
        parked: parked::table_names(&client, &options.name).await?,
        schemas: Schemas::default(),
    };
    let known = parked::known(&client, &options.name, row.position).await?;
    let parking = Parking::new(options.tuning.parked, parked_rows, known);
    let own = shared.own.clone();
    let store = PostgresStore::pooled(client, &options.name, row.session_no, own);
    let (source, failover, canary) = (AnySource::Poll(source), None, false);
    Ok(Prepared {
        source,
        resumed,
        store,
        parking,
        row,
        failover,
        canary,
        wrong,
        backfilling: Vec::new(),
        closed,
    })
}

/// Reads the checkpoint, makes sure that it may be started from, and takes it over. Returns it with
/// the name of the database.
async fn take_over(
    client: &Client,
    options: &Options,
    shared: &Shared,
    remembered: &mut Remembered,
) -> Result<(Checkpoint, String)> {
    let name = &options.name;
    let last_known = shared.own.last_known();
    let found = read(client, options).await?;
    let start = found.verify()?;
    found.verify_own(last_known)?;
    if !options.outbox.is_mapped() {
        polling::verify_indexes(&found.facts)?;
    }
    if let Some(missing) = polling::unread_too_long(options.retained_for, found.facts.unread_for) {
        let hint = "compare the application's data with what consumers have; if applications keep \
            rows for longer, raise outbox.retained_for";
        tracing::warn!(hint, "{missing}");
    }
    if start == PollingFrom::NewEpoch {
        let (row, server) = (&found.row, &found.server);
        let followed = checkpoint::follow(client, name, row, &new_epoch(row, server)).await?;
        let epoch = followed.ok_or_else(|| checkpoint::taken_over(name))?;
        tracing::warn!(
            from = row.timeline,
            to = server.timeline,
            epoch,
            "the server is on another timeline: promoted or restored. Polling continues from its \
             checkpoint; what was published after the point where the timelines part does not \
             exist here, unless it was committed again"
        );
    }
    let row = checkpoint::take_session(client, name, None).await?;
    shared.own.took(&row, remembered);
    Ok((row, found.server.database))
}

/// What a start would read and compare, with a source that writes nothing.
///
/// # Errors
/// As of a start; [`crate::error::Kind::Refused`] where that would begin a new epoch.
pub(super) async fn look(client: &Arc<Client>, options: &Options) -> Result<(Checkpoint, Poll)> {
    outbox::verify(client, options, None).await?;
    let found = read(client, options).await?;
    if found.verify()? == PollingFrom::NewEpoch {
        let text = "the server was promoted or restored since the checkpoint was stored";
        return Err(Error::refused(text)
            .hint("start the relay once: it begins a new epoch, which a dry run must not"));
    }
    if !options.outbox.is_mapped() {
        polling::verify_indexes(&found.facts)?;
    }
    let polled = polled_outbox(client, options, &found.server.database.into()).await?;
    let source = source(client.clone(), options, &found.row, polled, true).await?;
    Ok((found.row, source))
}

/// The same place, on the timeline of the server.
fn new_epoch(row: &Checkpoint, server: &ServerFacts) -> Failover {
    Failover {
        timeline: server.timeline,
        switch: row.flush_lsn,
        mark: row.position.mark,
        ordinal: row.position.ordinal,
        sub: row.position.sub,
        flush_lsn: row.flush_lsn,
        parked_until: row.flush_lsn,
    }
}

/// The outbox as it is read; a table of the application's as the catalog has it now.
async fn polled_outbox(
    client: &Client,
    options: &Options,
    database: &Arc<str>,
) -> Result<PolledOutbox> {
    let Some(mapped) = outbox::read(client, options, None).await? else {
        return Ok(PolledOutbox::own(database));
    };
    let catalog = check::outbox::fits(&options.outbox, mapped.found(), None, options.kind)?;
    let outbox = OutboxTable { catalog, ..options.outbox.clone() };
    let types = user_types::read_types(client).await?;
    PolledOutbox::mapped(database, (&outbox, &polled(options)?), &mapped.columns, types)
}

async fn source(
    client: Arc<Client>,
    options: &Options,
    row: &Checkpoint,
    outbox: PolledOutbox,
    read_only: bool,
) -> Result<Poll> {
    let batches = poll::batches(&client, &options.name, row.flush()).await?;
    let (outbox_now, made_with) = (polled(options)?, outbox.made_with());
    verify_stored(&options.name, row.flush(), (&outbox_now, made_with, &[]), &batches)?;
    let options = poll::Options {
        name: options.name.clone(),
        session_no: row.session_no,
        epoch: row.position.epoch,
        resume_after: row.position,
        flushed: row.flush(),
        outbox,
        interval: options.poll_interval,
        noted_every: options.retained_for.map(noted_every),
        max_body: options.broker.max_message_size.max(BODY_MAX),
        read_only,
    };
    Ok(Poll::new(client, options, batches))
}

/// Compares the batches from the settled one on with the outbox as it is now: its configuration,
/// and what the catalog has for it.
fn verify_stored(
    name: &str,
    settled: Mark,
    (outbox, made_with, columns): (&Polled, Option<MadeWith>, &[MappedColumn]),
    batches: &VecDeque<Batch>,
) -> Result<()> {
    polling::verify_table(name, &outbox.table, batches.iter().map(|batch| batch.outbox.as_str()))?;
    let stored = batches.iter().map(|batch| (batch.number, &batch.made_with));
    polling::verify_made_with(name, outbox, (made_with, columns), settled, stored)?;
    polling::verify_batches(name, settled, batches.iter().map(|batch| batch.number))
}

/// How often a source that finds nothing records that it looked: often enough to recognize a pause
/// that was too long.
fn noted_every(retained_for: Duration) -> Duration {
    (retained_for / 10).clamp(Duration::from_secs(1), Duration::from_secs(60))
}

/// What the checkpoint of a relay that polls is compared with.
pub struct PollStart {
    name: String,
    /// The checkpoint.
    pub row: Checkpoint,
    /// The server.
    pub server: ServerFacts,
    /// The outbox.
    pub facts: PollFacts,
    /// Batches from the settled one on.
    batches: VecDeque<Batch>,
}

/// Reads all of it.
///
/// # Errors
/// The server's; a verdict if the checkpoint is missing, a refusal if it is of another kind.
pub async fn read(client: &Client, options: &Options) -> Result<PollStart> {
    let name = &options.name;
    let row = checkpoint::read(client, name).await?.ok_or_else(|| checkpoint::no_row(name))?;
    checkpoint::is_of(&row, name, SourceKind::Poll)?;
    let batches = poll::batches(client, name, row.flush()).await?;
    let newest = batches.back().map(|batch| &batch.snapshot);
    let facts = facts(client, options, newest.map(String::as_str)).await?;
    let server = server_facts(client).await?;
    Ok(PollStart { name: name.clone(), row, server, facts, batches })
}

/// What the outbox and its indexes are like; `snapshot` is the newest that is stored.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when a mapped table is not there or lacks a column that polling
/// goes by, or the server's.
pub async fn facts(
    client: &Client,
    options: &Options,
    snapshot: Option<&str>,
) -> Result<PollFacts> {
    const FACTS: &str = include_str!("../../../sql/query/poll_facts.sql");
    const FOREIGN: &str = include_str!("../../../sql/query/poll_foreign.sql");
    let outbox = polled(options)?;
    let mapped = outbox::polled_columns(client, options).await?;
    let row = unnamed::query_one(client, FACTS, &[&snapshot, &options.name]).await;
    let row = row.map_err(checkpoint::missing_schema)?;
    let unread: Option<i64> = row.try_get(1).map_err(postgres_error)?;
    let mut facts = PollFacts {
        snapshot_ahead: row.try_get(0).map_err(postgres_error)?,
        foreign_rows: false,
        indexes: read_indexes(client, &outbox.table).await?,
        outbox,
        mapped,
        unread_for: unread.map(|seconds| Duration::from_secs(seconds.max(0).unsigned_abs())),
    };
    // Without the index it would read all of the outbox.
    if polling::missing_indexes(&facts.outbox, &facts.indexes, false).is_empty() {
        let sql = facts.outbox.fill(FOREIGN);
        let row = unnamed::query_one(client, &sql, &[]).await.map_err(postgres_error)?;
        facts.foreign_rows = row.try_get(0).map_err(postgres_error)?;
    }
    Ok(facts)
}

/// What the source goes by.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when the configuration does not say it; the check of the mapping
/// says more.
pub fn polled(options: &Options) -> Result<Polled> {
    options.outbox.polled().ok_or_else(|| {
        let table = &options.outbox.table;
        let text = format!("polling {table} needs outbox.order_by and outbox.xid");
        Error::refused(text).hint("`watership check` prints the statements that add both")
    })
}

impl PollStart {
    /// Compares all of it but the indexes.
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify(&self) -> Result<PollingFrom> {
        let Self { name, row, server, facts, batches } = self;
        let start = polling::verify(row, server)?;
        polling::verify_transactions(facts)?;
        let columns = facts.mapped.as_ref().map_or(&[][..], |(_, columns)| columns);
        let outbox = (&facts.outbox, facts.made_with(), columns);
        verify_stored(name, row.flush(), outbox, batches)?;
        Ok(start)
    }

    /// Compares the row with what this process last knew of it; that was read before the row.
    ///
    /// # Errors
    /// A named verdict.
    pub fn verify_own(&self, last_known: Option<LastKnown>) -> Result<()> {
        last_known.map_or(Ok(()), |known| known.verify(&self.row))
    }
}
