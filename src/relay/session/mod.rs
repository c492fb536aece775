//! One life of the connections to both ends.
//!
//! Order of the start: the broker's lock queue is held before anything is read, so that no other
//! relay of this name is still publishing; then the source is prepared, by its kind: the checkpoint
//! is read, compared with the server, and taken over, and reading starts where it says.

pub mod broken;
pub(in crate::relay) mod catalog;
pub mod circuit;
pub mod constants;
pub mod dry_run;
pub mod facts;
mod failed_over;
mod held;
pub mod outbox;
pub mod partitions;
pub mod phantoms;
pub mod poll;
pub mod rights;
mod rotation;
pub mod schemas;
pub mod supervisor;
pub mod unsendable;
pub mod user_types;
pub mod wal;

use std::sync::Arc;

use crate::amqp;
use crate::amqp::publisher::Connection;
use crate::amqp::topology::Wrong;
use crate::error::{Error, Kind, Result};
use crate::metrics::{BackfillMetrics, Metrics, TableMetrics};
use crate::pg::client::Closed;
use crate::publisher::Publisher as _;
use crate::relay::backfill::{Backfill, WorkerEnd, worker};
use crate::relay::check::position::Failover;
use crate::relay::checkpoint::own::OwnCheckpoint;
use crate::relay::checkpoint::progress::Progress;
use crate::relay::checkpoint::{Checkpoint, PostgresStore};
use crate::relay::parking::Parking;
use crate::relay::session::broken::{BrokenRoute, Missing};
use crate::relay::status::Status;
use crate::relay::upkeep::canary::Canary;
use crate::relay::{Kept, Options, Relay, RelayParts};
use crate::route::{Plans, Resumed, Router};
use crate::source::{AnySource, SourceKind};

/// An open session, ready to run.
pub struct Session {
    /// The engine.
    pub relay: Relay<AnySource, Connection, PostgresStore>,
    /// Tells when the SQL connection ends: a shutdown of the server is seen at once.
    pub closed: Closed,
    /// Reads tables for backfills, until it is dropped.
    pub backfill: Option<worker::Running>,
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
    /// What the process itself last took or stored of its checkpoint.
    pub own: Arc<OwnCheckpoint>,
    /// Routes of which a thing is known to be missing from the broker.
    pub missing: Arc<Missing>,
    /// The keys that the session was started with.
    pub(in crate::relay) keys: Arc<catalog::StartedWith>,
    /// Metrics handles of the captured tables that are held when they are lost.
    pub held: Arc<TableMetrics>,
    /// Metrics handles of backfills.
    pub backfills: Arc<BackfillMetrics>,
}

/// Opens all three connections and starts the stream.
///
/// The broker comes first, because its lock queue decides who may continue: a standby asks nothing
/// of Postgres, and changes nothing in the broker.
///
/// # Errors
/// Whatever stands in the way; verdicts of [`check`](crate::relay::check) among them.
pub async fn open(
    options: &Options,
    router: &Arc<Router>,
    shared: &Shared,
    kept: &mut Kept,
) -> Result<Session> {
    let broker = publishing(options, router);
    let mut publisher = count_busy(Connection::open(&broker).await, &shared.metrics.lock_busy)?;
    let preparing = async {
        match options.kind {
            SourceKind::Wal => wal::prepare(options, &broker, shared, &mut kept.remembered).await,
            SourceKind::Poll => poll::prepare(options, &broker, shared, &mut kept.remembered).await,
        }
    };
    let prepared = while_kept_alive(&mut publisher, preparing).await;
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            publisher.close().await;
            return Err(error);
        }
    };
    let row = prepared.row;
    let broken = broken::routes(&options.topology, &options.rules, &prepared.wrong);
    shared.missing.set(&broken, &prepared.wrong);
    report(options, &prepared.wrong);
    if let Some(failover) = prepared.failover {
        failed_over::tell(&failover, row.position.epoch, kept, &prepared.parking, shared);
    }
    tell_start(options, &row, kept);
    let (backfill, end) = linked(row.kind, options.backfill.max_unconfirmed, prepared.backfilling);
    let parts = RelayParts {
        source: prepared.source,
        publisher,
        store: prepared.store,
        progress: Progress::new(row.position, row.flush()),
        parking: prepared.parking,
        router: router.clone(),
        plans: Plans::new(router, prepared.resumed),
        metrics: shared.metrics.clone(),
        status: shared.status.clone(),
        canary: shared.canary.clone(),
        broken,
        missing: shared.missing.clone(),
        published: std::mem::take(&mut kept.published),
        recently_parked: std::mem::take(&mut kept.parked),
        remembered: std::mem::take(&mut kept.remembered),
        backfill,
    };
    shared.canary.begin(row.flush_lsn, prepared.canary, std::time::Instant::now());
    let backfill = end.map(|end| worker::start(options.clone(), shared.clone(), end));
    let relay = Relay::new(parts, &options.name, &options.tuning);
    Ok(Session { relay, closed: prepared.closed, backfill })
}

/// Options of the publishing connection, which holds the lock of the relay.
pub fn publishing(options: &Options, router: &Router) -> amqp::options::Options {
    let mut broker = options.broker.clone();
    broker.exchanges = router.exchanges().to_vec();
    broker.lock_queue = Some(options.lock_queue());
    broker.serves = format!("database {}", options.sql);
    broker
}

/// The two ends of the link for backfills: the loop's and the worker's.
fn linked(
    kind: SourceKind,
    max_unconfirmed: usize,
    backfilling: Vec<u32>,
) -> (Backfill, Option<WorkerEnd>) {
    match kind {
        SourceKind::Wal => {
            let (backfill, end) = Backfill::linked(max_unconfirmed, backfilling);
            (backfill, Some(end))
        }
        // Its marks are in the WAL, and there are no captured tables.
        SourceKind::Poll => (Backfill::none(), None),
    }
}

fn tell_start(options: &Options, row: &Checkpoint, kept: &Kept) {
    tracing::info!(
        session = row.session_no,
        mode = row.kind.name(),
        position = %row.position,
        flush_lsn = (row.kind == SourceKind::Wal).then(|| row.flush_lsn.to_string()),
        slot = (row.kind == SourceKind::Wal).then_some(&options.slot),
        remembered = kept.remembered.len(),
        "streaming"
    );
}

/// Does `work` while the broker connection, which publishes nothing yet, is kept alive.
///
/// # Errors
/// Those of the connection and of the work.
pub async fn while_kept_alive<T>(
    publisher: &mut Connection,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let mut outcomes = Vec::new();
    tokio::select! { biased;
        ended = publisher.next_outcomes(&mut outcomes) => match ended {
            Err(error) => Err(error),
            Ok(()) => Err(Error::protocol("the broker confirmed what was never published")),
        },
        done = work => done,
    }
}

/// A line for each thing that is wrong in the broker, with the routes that are held for it.
fn report(options: &Options, wrong: &[Wrong]) {
    for one in wrong {
        let of_one = broken::routes(&options.topology, &options.rules, std::slice::from_ref(one));
        let name = |broken: &BrokenRoute| options.rules[usize::from(broken.route.0)].name.clone();
        let routes: Vec<String> = of_one.iter().map(name).collect();
        tracing::error!(
            thing = %one.thing,
            error = one.error.to_string(),
            hint = one.error.hint_or_kind(),
            ?routes,
            "wrong in the broker: the routes that use it are held, the others continue"
        );
    }
}

/// Counts an attempt that failed because another relay is active.
fn count_busy<T>(result: Result<T>, busy: &metrics::Counter) -> Result<T> {
    if result.as_ref().is_err_and(|error| error.kind() == Kind::Busy) {
        busy.increment(1);
    }
    result
}

/// The source's half of a session, of whatever kind it is.
struct Prepared {
    source: AnySource,
    /// What is known of the captured tables where the stream resumes.
    resumed: Resumed,
    store: PostgresStore,
    parking: Parking,
    /// The checkpoint, taken over.
    row: Checkpoint,
    /// The server that was left for its promoted standby.
    failover: Option<Failover>,
    /// Whether the canary is in the publication.
    canary: bool,
    /// What is wrong in the broker, thing by thing.
    wrong: Vec<Wrong>,
    /// Tables with a backfill that has not ended.
    backfilling: Vec<u32>,
    /// Reports the end of the SQL connection.
    closed: Closed,
}
