//! The start of a session that polls the outbox: the checkpoint is compared with the server before
//! it is taken over, and reading continues behind the batches that are settled.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::Client;

use super::{Prepared, Shared, outbox, partitions, user_types};
use crate::amqp::{self, topology};
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::outbox::read_indexes;
use crate::pg::publication::TableName;
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
use crate::source::poll::{self, Poll, PolledOutbox};
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
    let source = source(Arc::new(reading.client), options, &row, polled).await?;
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
    let PollFacts { stored_age, unsettled_age, .. } = found.facts;
    let age = stored_age.max(unsettled_age);
    if let Some(missing) = polling::unread_too_long(options.retained_for, age) {
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
    let Some(mapped) = outbox::read(client, options).await? else {
        return Ok(PolledOutbox::own(database));
    };
    let catalog = check::outbox::fits(&options.outbox, mapped.found(options), None, options.kind)?;
    let outbox = OutboxTable { catalog, ..options.outbox.clone() };
    let types = user_types::read_types(client).await?;
    PolledOutbox::mapped(database, (&outbox, &polled(options)?), &mapped.columns, types)
}

async fn source(
    client: Arc<Client>,
    options: &Options,
    row: &Checkpoint,
    outbox: PolledOutbox,
) -> Result<Poll> {
    let batches = poll::batches(&client, &options.name, row.flush()).await?;
    let tables = batches.iter().map(|batch| batch.outbox.as_str());
    polling::verify_table(&options.name, &options.outbox.table, tables)?;
    polling::verify_batches(&options.name, row.flush(), batches.iter().map(|batch| batch.number))?;
    let options = poll::Options {
        name: options.name.clone(),
        session_no: row.session_no,
        epoch: row.position.epoch,
        resume_after: row.position,
        flushed: row.flush(),
        outbox,
        interval: options.poll_interval,
        max_body: options.broker.max_message_size.max(BODY_MAX),
    };
    Ok(Poll::new(client, options, batches))
}

/// What the checkpoint of a relay that polls is compared with.
pub struct PollStart {
    name: String,
    /// The outbox that is configured, and those of the batches.
    tables: (TableName, Vec<String>),
    /// The checkpoint.
    pub row: Checkpoint,
    /// The server.
    pub server: ServerFacts,
    /// The outbox.
    pub facts: PollFacts,
    /// Batches from the settled one on.
    pub batches: Vec<Mark>,
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
    let tables = batches.iter().map(|batch| batch.outbox.clone()).collect();
    let tables = (options.outbox.table.clone(), tables);
    let batches = batches.iter().map(|batch| batch.number).collect();
    Ok(PollStart { name: name.clone(), tables, row, server, facts, batches })
}

/// What the outbox and its indexes are like; `snapshot` is the newest that is stored.
///
/// # Errors
/// The server's.
pub async fn facts(
    client: &Client,
    options: &Options,
    snapshot: Option<&str>,
) -> Result<PollFacts> {
    const FACTS: &str = include_str!("../../../sql/query/poll_facts.sql");
    const FOREIGN: &str = include_str!("../../../sql/query/poll_foreign.sql");
    let outbox = polled(options)?;
    let row = unnamed::query_one(client, FACTS, &[&snapshot, &options.name]).await;
    let row = row.map_err(checkpoint::missing_schema)?;
    let age = |i: usize| -> Result<Option<Duration>> {
        let seconds: Option<i64> = row.try_get(i).map_err(postgres_error)?;
        Ok(seconds.map(|seconds| Duration::from_secs(seconds.max(0).unsigned_abs())))
    };
    let mut facts = PollFacts {
        snapshot_ahead: row.try_get(0).map_err(postgres_error)?,
        foreign_rows: false,
        indexes: read_indexes(client, &outbox.table).await?,
        outbox,
        stored_age: age(1)?,
        unsettled_age: age(2)?,
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
        let Self { name, tables: (table, stored), row, server, facts, batches } = self;
        let start = polling::verify(row, server)?;
        polling::verify_table(name, table, stored.iter().map(String::as_str))?;
        polling::verify_transactions(facts)?;
        polling::verify_batches(name, row.flush(), batches.iter().copied())?;
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
