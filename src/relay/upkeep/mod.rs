//! Work beside the data path, on a connection of its own: the canary, slot gauges every few
//! seconds, a second look at everything that the session was started from, and
//! `watership.maintain` every hour. Its failures are logged and counted; only a doubt about the
//! position ends a session.

pub mod canary;
pub mod lock_owner;
mod passed_rows;
pub mod redeclare;
pub mod route_audit;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_postgres::Client;

use crate::error::{Error, Kind, Result};
use crate::metrics::Metrics;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::slot::{WalStatus, insert_lsn, max_slot_wal_keep_size, read_slot};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::Options;
use crate::relay::check::polling::PollingFrom;
use crate::relay::check::server::may_be_waited_for;
use crate::relay::check::slot_risk::{at_risk, held_by_standby};
use crate::relay::session::{Shared, catalog, facts, outbox, poll, rights, schemas};
use crate::relay::status::SlotStatus;
use crate::relay::upkeep::canary::Canary;
use crate::relay::upkeep::canary::Written;
use crate::relay::upkeep::passed_rows::PassedRows;
use crate::source::{SourceKind, columns};

/// How often there may be something to do.
const TICK: Duration = Duration::from_secs(1);
/// How often the slot is looked at, and how soon a failed connection is tried again.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often position, slot and publication are compared while a session runs.
const COMPARE_EVERY: Duration = Duration::from_secs(10);
/// How often partitions are made and retired.
const MAINTAIN_EVERY: Duration = Duration::from_secs(3600);
/// The same after partition work that failed, or could not get its lock.
const MAINTAIN_AGAIN: Duration = Duration::from_secs(60);
/// Calls of `maintain` in one go; each does a bounded piece of work.
const MAINTAIN_CALLS_MAX: u32 = 100;

/// A piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    /// The gauges of the slot, and whether its WAL is at risk.
    LookAtSlot,
    /// What the session was started from must still hold.
    Compare,
    /// Rows of `watership.parked` and partitions of the outbox that are no longer needed.
    Maintain,
    /// Rows of a mapped outbox table that are old and passed.
    DeletePassed,
    /// The row that must come through the stream.
    WriteCanary,
}

impl Job {
    /// How long it may take: longer than `statement_timeout`, for a server or a proxy that answers
    /// nothing. Maintenance is many statements.
    fn limit(self) -> Duration {
        match self {
            Job::LookAtSlot | Job::Compare | Job::WriteCanary => Duration::from_secs(60),
            Job::Maintain | Job::DeletePassed => Duration::from_secs(600),
        }
    }
}

/// What there is to look after.
fn jobs(kind: SourceKind) -> &'static [Job] {
    match kind {
        SourceKind::Wal => {
            &[Job::LookAtSlot, Job::Compare, Job::Maintain, Job::DeletePassed, Job::WriteCanary]
        }
        SourceKind::Poll => &[Job::Compare, Job::Maintain, Job::DeletePassed],
    }
}

/// When each piece of work is due; the canary knows by itself.
struct Due {
    look: Instant,
    compare: Instant,
    maintain: Instant,
    delete: Instant,
}

impl Due {
    /// Whether the job is due; the next time is set.
    fn take(&mut self, job: Job, canary: &Canary) -> bool {
        let (at, every) = match job {
            Job::LookAtSlot => (&mut self.look, LOOK_EVERY),
            Job::Compare => (&mut self.compare, COMPARE_EVERY),
            Job::Maintain => (&mut self.maintain, MAINTAIN_EVERY),
            Job::DeletePassed => (&mut self.delete, MAINTAIN_AGAIN),
            Job::WriteCanary => return canary.is_due(std::time::Instant::now()),
        };
        let now = Instant::now();
        let due = now >= *at;
        if due {
            *at = now + every;
        }
        due
    }
}

/// Runs until it is aborted. What is doubtful while a session runs goes into `doubts`.
pub async fn run(options: Options, shared: Shared, doubts: mpsc::Sender<Error>) {
    let mut connection = None;
    let now = Instant::now();
    let mut due = Due { look: now, compare: now + COMPARE_EVERY, maintain: now, delete: now };
    let mut passed = PassedRows::default();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tick.tick().await;
        if !shared.status.is_streaming() {
            // No loop says it: it grows while nothing comes, unless another relay does the work.
            let silence = shared.canary.silence(std::time::Instant::now());
            let age = silence.filter(|_| !shared.status.is_standing_by()).unwrap_or_default();
            shared.metrics.wal.canary_age_seconds.set(age.as_secs_f64());
        }
        if failing && Instant::now() < due.look {
            continue;
        }
        let result = once(&options, &shared, &mut connection, &mut due, &mut passed, &doubts).await;
        if let Err(error) = &result {
            connection = None;
            due.look = Instant::now() + LOOK_EVERY;
            shared.metrics.outbox.maintain_failures.increment(1);
            if !failing {
                tracing::warn!(error = %error, "upkeep failed; it will be retried");
            }
        }
        failing = result.is_err();
    }
}

async fn once(
    options: &Options,
    shared: &Shared,
    connection: &mut Option<SqlConnection>,
    due: &mut Due,
    passed: &mut PassedRows,
    doubts: &mpsc::Sender<Error>,
) -> Result<()> {
    let client = match connection {
        Some(connection) => &connection.client,
        None => {
            let client = &connection.insert(sql(&options.sql).await?).client;
            if options.kind == SourceKind::Wal {
                // A canary is to come through the stream; whether a standby has it does not matter.
                let local = client.batch_execute("SET synchronous_commit = local").await;
                local.map_err(postgres_error)?;
            }
            client
        }
    };
    // One piece that fails, such as a canary whose row is locked, keeps no other from its turn.
    let mut result = Ok(());
    for job in jobs(options.kind) {
        if due.take(*job, &shared.canary) {
            let work = async {
                match job {
                    Job::LookAtSlot => look_at_slot(client, options, shared).await,
                    Job::Compare => compare_streaming(client, options, shared, doubts).await,
                    Job::Maintain => clean_up(client, options, shared, due).await,
                    Job::DeletePassed => {
                        let again = passed.delete(client, options, &shared.metrics).await?;
                        due.delete = Instant::now() + again;
                        Ok(())
                    }
                    Job::WriteCanary => write_canary(client, options, shared).await,
                }
            };
            match timeout(job.limit(), work).await {
                Ok(done) => result = result.and(done),
                // The connection is dead, and so are the other pieces.
                Err(_) => {
                    let text = format!("Postgres did not answer within {:?}", job.limit());
                    return Err(Error::unreachable(text));
                }
            }
        }
    }
    result
}

async fn clean_up(
    client: &Client,
    options: &Options,
    shared: &Shared,
    due: &mut Due,
) -> Result<()> {
    let purged = purge_parked(client, options).await;
    if !options.maintain {
        return purged;
    }
    let maintained = maintain(client, options, &shared.metrics).await;
    let again = maintained.as_ref().copied().unwrap_or(MAINTAIN_AGAIN);
    due.maintain = Instant::now() + again;
    purged.and(maintained.map(drop))
}

async fn compare_streaming(
    client: &Client,
    options: &Options,
    shared: &Shared,
    doubts: &mpsc::Sender<Error>,
) -> Result<()> {
    if !shared.status.is_streaming() {
        return Ok(());
    }
    // First: rows that are hidden from the role would look like rows that are gone.
    let lacks = rights::lacking(client, None, options.kind).await?;
    let doubt = match (rights::verify(&lacks), options.kind) {
        (Err(lacking), _) => Some(lacking),
        (Ok(()), SourceKind::Wal) => compare(client, options, shared).await?,
        (Ok(()), SourceKind::Poll) => compare_polling(client, options, shared).await?,
    };
    if let Some(doubt) = doubt {
        // A full channel means that one is on its way.
        let _ = doubts.try_send(doubt);
    }
    Ok(())
}

/// The same of a session that polls.
async fn compare_polling(
    client: &Client,
    options: &Options,
    shared: &Shared,
) -> Result<Option<Error>> {
    let last_known = shared.own.last_known();
    match outbox::verify(client, options, None).await {
        Ok(_) => {}
        // The next session refuses to start, and says what to alter.
        Err(error) if error.kind() == Kind::Refused => return Ok(Some(error)),
        Err(error) => return Err(error),
    }
    let found = match poll::read(client, options).await {
        Ok(found) => found,
        Err(error) if error.kind().is_verdict() => return Ok(Some(error)),
        Err(error) => return Err(error),
    };
    Ok(match found.verify().and_then(|start| found.verify_own(last_known).map(|()| start)) {
        Ok(PollingFrom::AsStored) => None,
        Ok(PollingFrom::NewEpoch) => {
            let text = "the server behind source.url is on a different timeline from this session";
            Some(Error::unreachable(text).hint("no action needed: the next session checks it"))
        }
        Err(error) => Some(error),
    })
}

/// Removes rows that were released or discarded long ago.
async fn purge_parked(client: &Client, options: &Options) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/parked_purge.sql");
    let retain = i64::try_from(options.parked_retain.as_secs()).unwrap_or(i64::MAX);
    for _ in 0..MAINTAIN_CALLS_MAX {
        let removed = unnamed::execute(client, SQL, &[&options.name, &retain]).await;
        if removed.map_err(postgres_error)? == 0 {
            break;
        }
    }
    Ok(())
}

async fn write_canary(client: &Client, options: &Options, shared: &Shared) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/canary_write.sql");
    let begin = insert_lsn(client).await?;
    let row = unnamed::query_one(client, SQL, &[&options.name]).await.map_err(postgres_error)?;
    let number: i64 = row.try_get(0).map_err(postgres_error)?;
    let number = u64::try_from(number)
        .map_err(|_| Error::protocol(format!("watership.canary.number is {number}")))?;
    let end = insert_lsn(client).await?;
    let at = std::time::Instant::now();
    shared.canary.wrote(Written { number, end, span: end.bytes_since(begin), at });
    Ok(())
}

/// What a session was started from must still hold while it runs.
async fn compare(client: &Client, options: &Options, shared: &Shared) -> Result<Option<Error>> {
    let mark = shared.own.last_known();
    let found = match facts::read(client, options).await {
        Ok(found) => found,
        Err(error) if error.kind().is_verdict() => return Ok(Some(error)),
        Err(error) => return Err(error),
    };
    if found.is_elsewhere() {
        let text = "the server behind source.url is on a different timeline from this session";
        return Ok(Some(
            Error::unreachable(text)
                .hint("no action needed yet: the relay reconnects and checks the new timeline"),
        ));
    }
    let verified = found.verify_own(mark).and_then(|()| found.verify(options, &[]).map(drop));
    if let Err(error) = verified {
        return Ok(Some(error));
    }
    let Some(publication) = found.publication() else { return Ok(None) };
    match outbox::verify(client, options, Some(publication)).await {
        Ok(_) => {}
        // The next session refuses to start, and says what to alter.
        Err(error) if error.kind() == Kind::Refused => return Ok(Some(error)),
        Err(error) => return Err(error),
    }
    match catalog::read_tables(client, options, publication, found.agreed()).await {
        Ok(tables) => {
            let (keys, end) = (&shared.keys, found.position().2.wal_lsn);
            let changed = |agreed| catalog::held_changed(options, publication, &tables, agreed);
            let held = found.agreed().and_then(changed);
            if held.is_none() {
                keys.seen_intact(end);
            }
            let agreed_to = schemas::agreed_to(client, &options.name).await?;
            let (columns, _) = columns::read(client, &keys.tables()).await?;
            let changed = held.or_else(|| keys.compare(&tables.found));
            let changed = changed.or_else(|| keys.compare_columns(&columns));
            Ok(changed.or_else(|| keys.compare_agreed(agreed_to)))
        }
        // The next session refuses to start, and says what to alter.
        Err(error) if error.kind() == Kind::Refused => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

async fn standby_names(client: &Client) -> Result<String> {
    let sql = "SELECT current_setting('synchronous_standby_names')";
    Ok(unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?.get(0))
}

async fn look_at_slot(client: &Client, options: &Options, shared: &Shared) -> Result<()> {
    let slot = read_slot(client, &options.slot).await?;
    shared.status.slot_seen(slot.as_ref());
    let synchronous = match slot.as_ref().map(|slot| slot.synchronous) {
        Some(Some(known)) => known,
        Some(None) => {
            may_be_waited_for(&standby_names(client).await?, &options.sql.application_name)
        }
        None => false,
    };
    shared.canary.hurry(synchronous);
    let Some(slot) = slot else { return Ok(()) };
    let at_risk = at_risk(&slot, max_slot_wal_keep_size(client).await?);
    let held = held_by_standby(&slot);
    let metrics = &shared.metrics.wal;
    metrics.slot_lag_bytes.set(slot.lag_bytes as f64);
    metrics.retained_bytes.set(slot.retained_bytes as f64);
    metrics.set_safe_wal_size(slot.safe_wal_size);
    metrics.set_status(slot.wal_status.map_or("", |s| s.as_str()));
    metrics.slot_at_risk.set(f64::from(u8::from(at_risk.is_some())));
    metrics.slot_held_by_standby.set(f64::from(u8::from(held.is_some())));
    let risk = at_risk.or(held);
    let hint = risk.as_ref().map(|risk| risk.hint);
    let warning = risk.map(|risk| risk.what);
    let news = shared.status.slot(SlotStatus {
        wal_status: slot.wal_status.map(WalStatus::as_str),
        safe_wal_size: slot.safe_wal_size,
        retained_bytes: slot.retained_bytes,
        lag_bytes: slot.lag_bytes,
        warning: warning.clone(),
        hint,
    });
    match warning {
        Some(warning) if news => tracing::warn!(hint, "{warning}"),
        None if news => tracing::info!(slot = options.slot, "the slot is healthy again"),
        Some(_) | None => {}
    }
    Ok(())
}

/// Returns when to come again: soon, where a lock was not available.
async fn maintain(client: &Client, options: &Options, metrics: &Metrics) -> Result<Duration> {
    const SQL: &str = include_str!("../../../sql/query/maintain.sql");
    let retain = i64::try_from(options.retain.as_secs()).unwrap_or(i64::MAX);
    let mut again = MAINTAIN_EVERY;
    for _ in 0..MAINTAIN_CALLS_MAX {
        let row = unnamed::query_one(client, SQL, &[&retain]).await.map_err(postgres_error)?;
        let names = |column: &str| row.try_get::<_, Vec<String>>(column).map_err(postgres_error);
        let (created, skipped) = (names("created")?, names("skipped")?);
        let (detached, dropped) = (names("detached")?, names("dropped")?);
        let postponed = names("postponed")?;
        metrics.outbox.partitions_created.increment(created.len() as u64);
        metrics.outbox.partitions_dropped.increment(dropped.len() as u64);
        metrics.outbox.partitions_skipped.increment(skipped.len() as u64);
        if !skipped.is_empty() {
            tracing::warn!(
                days = ?skipped,
                "no partition was created for these days: the default partition has rows for them"
            );
        }
        metrics.outbox.maintain_postponed.increment(postponed.len() as u64);
        if !postponed.is_empty() {
            again = MAINTAIN_AGAIN;
            tracing::warn!(?postponed, "partition work postponed, usually because of a lock");
        }
        if !(created.is_empty() && detached.is_empty() && dropped.is_empty()) {
            tracing::info!(?created, ?detached, ?dropped, "outbox partitions changed");
        }
        if !row.try_get::<_, bool>("more").map_err(postgres_error)? {
            break;
        }
    }
    Ok(again)
}
