//! Reads tables for the loop, on a connection of its own: one chunk at a time, of each open run in
//! turn.
//!
//! Order of a chunk: the loop is told of the mark, the mark is committed, the rows are read, the
//! loop gets them, and says when their cursor is durable. Then comes the next one. What fails here
//! is tried again and ends no session.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use uuid::Uuid;

use super::active::{self, Active};
use super::read::{self, ChunkRows, ReadOutcome};
use super::reread::{self, MovedRows, Phase};
use super::runs::{self, Request, RunState};
use super::shown::BackfillView;
use super::{Chunk, ChunkCommand, ChunkReport, GivenUp, WorkerEnd, waits};
use crate::amqp::topology;
use crate::error::{Error, Kind, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::{LOCK_NOT_AVAILABLE, QUERY_CANCELED, postgres_error};
use crate::relay::options::Options;
use crate::relay::session::Shared;
use crate::source::transaction::MARK_PREFIX;

/// How often the table of runs is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often recorded moves of ended runs are deleted.
const PURGE_EVERY: Duration = Duration::from_secs(60);
/// How often the messages of queues are counted, where there is a limit.
const COUNT_EVERY: Duration = Duration::from_secs(2);
/// Longest pause while there is a run.
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// After a failure, and after a lock that did not come.
const AGAIN: Duration = Duration::from_secs(5);
const LOCKED_AGAIN: Duration = Duration::from_secs(1);
/// Runs that are gone on with in turn; others wait.
const TABLES_MAX: usize = 4;
/// Ended runs that are shown.
const ENDED_MAX: usize = 16;

/// For the connection. A mark comes through the stream once it is on this server's disk; whether a
/// standby has it does not matter. The order of the key is read from its index, and not sorted.
pub const SETTINGS: &str = "SET synchronous_commit = local; SET enable_seqscan = off; \
    SET enable_bitmapscan = off; SET max_parallel_workers_per_gather = 0; SET jit = off";

/// A worker that ends when this is dropped.
pub struct Running(JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts the worker of a session.
pub fn start(options: Options, shared: Shared, end: WorkerEnd) -> Running {
    Running(tokio::spawn(run(options, shared, end)))
}

async fn run(options: Options, shared: Shared, mut end: WorkerEnd) {
    let mut failing = false;
    loop {
        let error = match work(&options, &shared, &mut end).await {
            Ok(Gone) => return,
            Err(error) => error,
        };
        if !std::mem::replace(&mut failing, true) {
            tracing::warn!(error = %error, "the backfill worker failed; it will be retried");
        }
        shared.backfills.session_over();
        sleep(AGAIN).await;
    }
}

/// The loop has ended.
struct Gone;

/// Works until the loop ends.
async fn work(options: &Options, shared: &Shared, end: &mut WorkerEnd) -> Result<Gone> {
    let SqlConnection { client, closed: _closed } = sql(&options.sql).await?;
    client.batch_execute(SETTINGS).await.map_err(postgres_error)?;
    request_snapshots(&client, options).await?;
    let (active, ended, looked, purged, counted) = Default::default();
    let mut worker =
        Worker { options, shared, end, client, active, ended, looked, purged, counted };
    loop {
        worker.look().await?;
        let Some(pause) = worker.turn().await? else { return Ok(Gone) };
        worker.show();
        if !pause.is_zero() {
            sleep(pause).await;
        }
        if worker.end.commands.is_closed() {
            return Ok(Gone);
        }
    }
}

/// Asks for the snapshots that the configuration wants and that were never asked for.
async fn request_snapshots(client: &Client, options: &Options) -> Result<()> {
    for table in &options.backfill.initial {
        let (name, table) = (&options.name, table.to_string());
        let slot = Some(&*options.slot);
        let wanted = Request { table: &table, initial_slot: slot, ..Request::default() };
        match runs::request(client, name, wanted).await {
            Ok(Some(run)) => tracing::info!(table, %run, "its snapshot will be taken"),
            Ok(None) => {}
            Err(error) if error.kind() == Kind::Refused => {
                let error = error.to_string();
                tracing::warn!(table, error, "its snapshot will be taken after the next start");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

struct Worker<'a> {
    options: &'a Options,
    shared: &'a Shared,
    end: &'a mut WorkerEnd,
    client: Client,
    active: VecDeque<Active>,
    /// What became of runs of this process.
    ended: VecDeque<BackfillView>,
    looked: Option<Instant>,
    purged: Option<Instant>,
    /// When queues were counted, and which is too long.
    counted: Option<(Instant, Option<String>)>,
}

impl Worker<'_> {
    /// Compares the runs that are under way with those that people want.
    async fn look(&mut self) -> Result<()> {
        while let Ok(report) = self.end.reports.try_recv() {
            self.note(&report).await?;
        }
        if self.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return Ok(());
        }
        if self.purged.is_none_or(|at| at.elapsed() >= PURGE_EVERY) {
            runs::purge_moved(&self.client, &self.options.name).await?;
            self.purged = Some(Instant::now());
        }
        let open = runs::list(&self.client, &self.options.name, true).await?;
        self.looked = Some(Instant::now());
        let wanted = |run: &Uuid| {
            let wanted = |state| matches!(state, RunState::Requested | RunState::Running);
            open.iter().any(|one| one.run == *run && wanted(one.state))
        };
        while let Some(at) = self.active.iter().position(|one| !wanted(&one.run.run)) {
            let one = self.active.remove(at).expect("it was found there");
            tracing::info!(table = one.run.table, "its backfill was paused or cancelled");
            self.leave(&one).await;
        }
        for run in open {
            let begun = self.active.iter().any(|one| one.run.run == run.run);
            if begun || run.state == RunState::Paused || self.active.len() >= TABLES_MAX {
                continue;
            }
            self.begin(run).await?;
        }
        Ok(())
    }

    async fn begin(&mut self, run: runs::Run) -> Result<()> {
        let (id, table) = (run.run, run.table.clone());
        let mut one = match Active::begin(&self.client, self.options, run.clone()).await? {
            Ok(one) => one,
            Err(unfit) => return self.fail(run, &format!("{}: {}", unfit.what, unfit.hint)).await,
        };
        if !self.remember(&mut one).await? {
            return Ok(());
        }
        let from = if one.run.last_key.is_some() { "where it was" } else { "at its beginning" };
        tracing::info!(table, run = %id, "a backfill continues {from}");
        self.ended.retain(|ended| ended.table != table);
        self.active.push_back(one);
        Ok(())
    }

    /// Has the loop remember the transactions of the table. False when the loop has ended.
    async fn remember(&mut self, one: &mut Active) -> Result<bool> {
        let table = one.wanted.oid;
        if self.end.commands.send(ChunkCommand::Begin(table)).await.is_err() {
            return Ok(false);
        }
        while let Some(report) = self.end.reports.recv().await {
            if report == ChunkReport::Began(table) {
                let (open, _) = read::unseen(&self.client).await?;
                one.remembered_since(open);
                return Ok(true);
            }
            self.note(&report).await?;
        }
        Ok(false)
    }

    /// One chunk of the run whose turn it is. Returns how long to pause; none without a loop.
    async fn turn(&mut self) -> Result<Option<Duration>> {
        let Some(mut one) = self.active.pop_front() else { return Ok(Some(LOOK_EVERY)) };
        let limits = (self.options.tuning.window, self.options.backfill.max_slot_wal);
        let mut why = waits::why(&self.shared.status.snapshot(), limits.0, limits.1);
        if why.is_none() {
            why = self.queues().await;
        }
        if why.is_none() {
            why = one.waits_for_open(&self.client).await?;
        }
        let waits = why.is_some();
        self.wait(&mut one, why).await?;
        let mut pause = one.not_before.saturating_duration_since(Instant::now());
        if waits {
            pause = PAUSE_MAX;
        } else if pause.is_zero() {
            return self.chunk(one).await;
        }
        self.active.push_back(one);
        // Another run may go on sooner.
        let others = self.active.iter().map(|one| one.not_before);
        let soonest = others.min().map(|at| at.saturating_duration_since(Instant::now()));
        let pause = if waits { pause } else { soonest.unwrap_or(pause) };
        Ok(Some(pause.min(PAUSE_MAX)))
    }

    /// A queue of the configuration that is too long, as it was a moment ago.
    async fn queues(&mut self) -> Option<String> {
        let max = self.options.backfill.max_queue_messages;
        let names: Vec<String> =
            self.options.topology.queues.iter().map(|queue| queue.name.clone()).collect();
        if max == 0 || names.is_empty() {
            return None;
        }
        if self.counted.as_ref().is_none_or(|(at, _)| at.elapsed() >= COUNT_EVERY) {
            // A broker that cannot be queried is reported elsewhere.
            let counts = topology::counts(&self.options.broker, &names).await.unwrap_or_default();
            let counts = counts.into_iter().zip(&names);
            let mut long = counts.filter_map(|(count, name)| Some((count?.0, name)));
            let long = long.find(|(messages, _)| *messages > max);
            let why = long.map(|(messages, name)| waits::too_long(name, messages, max));
            self.counted = Some((Instant::now(), why));
        }
        self.counted.as_ref().and_then(|(_, why)| why.clone())
    }

    /// Tells why a run waits, if that is news.
    async fn wait(&mut self, one: &mut Active, why: Option<String>) -> Result<()> {
        if one.run.waits == why {
            return Ok(());
        }
        match &why {
            Some(why) => tracing::info!(table = one.run.table, "its backfill waits: {why}"),
            None => tracing::info!(table = one.run.table, "its backfill continues"),
        }
        runs::waits(&self.client, one.run.run, why.as_deref()).await?;
        one.run.waits = why;
        Ok(())
    }

    async fn chunk(&mut self, mut one: Active) -> Result<Option<Duration>> {
        let began = Instant::now();
        let moved = match self.moved(&one).await? {
            Ok(moved) => moved,
            Err(why) => return self.unfit(one, &why).await,
        };
        let (token, table, hold) = (Uuid::now_v7(), one.wanted.oid, one.pace.hold());
        if self.end.commands.send(ChunkCommand::Expect { token, table, hold }).await.is_err() {
            return Ok(None);
        }
        let rows = match self.read(&one, token, &moved).await {
            Ok(ReadOutcome::Rows(rows)) => rows,
            Ok(ReadOutcome::Changed(why)) => {
                self.forget(token).await;
                return self.unfit(one, &why).await;
            }
            Err(error) => {
                self.forget(token).await;
                return self.unread(one, error).await;
            }
        };
        let (read, took, all) = (rows.read, rows.took, rows.done);
        let (cursor, lacks) = (one.cursor(token, &rows, &moved), moved.lacks(&rows));
        let keys = rows.wanted.iter().filter(|_| moved.has_rows());
        let keys = keys.map(|row| read::key(&one.shape, row)).collect::<Result<Vec<_>>>()?;
        let chunk = Chunk {
            token,
            table: one.shape.table.clone(),
            numbers: one.shape.numbers.clone(),
            rows: rows.wanted,
            moved: moved.positions(keys.into_iter()),
            unseen: rows.unseen,
            cursor: cursor.clone(),
        };
        if self.end.commands.send(ChunkCommand::Rows(Box::new(chunk))).await.is_err() {
            return Ok(None);
        }
        match self.outcome(token, &one).await? {
            Ended::Gone => return Ok(None),
            Ended::Left => self.leave(&one).await,
            Ended::Truncated => {
                self.leave(&one).await;
                self.fail(one.run, "the table was truncated").await?;
            }
            Ended::Report(ChunkReport::Stored { left_out, sent, .. }) => {
                if one.phase == Phase::Passing {
                    one.until = reread::last(&self.client, one.run.run).await?;
                }
                one.next_phase(all, lacks, &moved, &cursor);
                let (sent_rows, skipped) = one.stored(&cursor, left_out);
                if let Some(metrics) = self.shared.backfills.of(&one.run.table) {
                    metrics.rows.increment(sent_rows);
                    metrics.left_out.increment(skipped);
                }
                one.not_before = Instant::now() + one.pace.done(read, took, sent, began.elapsed());
                if one.run.state == RunState::Done {
                    tracing::info!(table = one.run.table, rows = one.run.rows, "backfilled");
                    self.leave(&one).await;
                    self.end(one.view());
                } else {
                    self.active.push_back(one);
                }
            }
            Ended::Report(ChunkReport::GivenUp(_, why)) => self.given_up(one, why).await?,
            Ended::Report(ChunkReport::Began(_) | ChunkReport::Truncated(_)) => {
                unreachable!("these do not end a chunk")
            }
        }
        Ok(Some(Duration::ZERO))
    }

    /// The moved rows to read next, once everything else has been read. The inner error says why
    /// they cannot be read.
    async fn moved(&self, one: &Active) -> Result<std::result::Result<MovedRows, String>> {
        match one.phase {
            Phase::Keys | Phase::Passing => Ok(Ok(MovedRows::default())),
            Phase::Moved => {
                let limits = (one.moved_rows(), &*one.until);
                reread::load(&self.client, one.run.run, &one.shape, limits).await
            }
        }
    }

    /// The run cannot go on.
    async fn unfit(&mut self, one: Active, why: &str) -> Result<Option<Duration>> {
        self.leave(&one).await;
        self.fail(one.run, why).await.map(|()| Some(Duration::ZERO))
    }

    async fn read(&mut self, one: &Active, token: Uuid, moved: &MovedRows) -> Result<ReadOutcome> {
        let mark = "SELECT pg_catalog.pg_logical_emit_message(true, $1::text, $2::text)";
        let token = token.to_string();
        let written = self.client.execute(mark, &[&MARK_PREFIX, &token]).await;
        written.map_err(postgres_error)?;
        let (from, rows) = match one.phase {
            Phase::Keys => (one.from(), one.pace.rows()),
            Phase::Passing | Phase::Moved if !moved.has_rows() => {
                return Ok(ReadOutcome::Rows(ChunkRows { done: true, ..ChunkRows::default() }));
            }
            Phase::Passing | Phase::Moved => moved.from(),
        };
        let (wanted, shape, condition) = (&one.wanted, &one.shape, one.run.condition.as_deref());
        read::chunk(&mut self.client, wanted, shape, &from, condition, rows).await
    }

    /// A chunk could not be read.
    async fn unread(&mut self, mut one: Active, error: Error) -> Result<Option<Duration>> {
        match error.sqlstate() {
            Some(QUERY_CANCELED | LOCK_NOT_AVAILABLE) => {
                one.pace.given_up();
                one.not_before = Instant::now() + LOCKED_AGAIN;
                let why = "locking or reading the table took too long".to_owned();
                self.wait(&mut one, Some(why)).await?;
                self.active.push_back(one);
            }
            // Of what is asked for, and not of the connection.
            Some(code) if ["22", "42", "21", "0A"].iter().any(|class| code.starts_with(class)) => {
                let why = active::told(&error);
                self.leave(&one).await;
                self.fail(one.run, &why).await?;
            }
            None if error.kind() == Kind::Refused => {
                self.leave(&one).await;
                self.fail(one.run, &error.to_string()).await?;
            }
            Some(_) | None => return Err(error),
        }
        Ok(Some(Duration::ZERO))
    }

    async fn given_up(&mut self, mut one: Active, why: GivenUp) -> Result<()> {
        if let Some(metrics) = self.shared.backfills.of(&one.run.table) {
            metrics.given_up.increment(1);
        }
        match why {
            GivenUp::TooSlow => one.pace.given_up(),
            GivenUp::Stale => {
                // A commit that waits for a standby, or a process that is not scheduled.
                one.not_before = Instant::now() + PAUSE_MAX;
                let why = "a transaction of the table is committed and not visible".to_owned();
                self.wait(&mut one, Some(why)).await?;
            }
            GivenUp::Forgotten => {
                if !self.remember(&mut one).await? {
                    return Ok(());
                }
            }
        }
        self.active.push_back(one);
        Ok(())
    }

    /// Waits for the end of a chunk; looks now and then whether its run is still wanted.
    async fn outcome(&mut self, token: Uuid, one: &Active) -> Result<Ended> {
        loop {
            match timeout(LOOK_EVERY, self.end.reports.recv()).await {
                Ok(None) => return Ok(Ended::Gone),
                Ok(Some(report)) => match &report {
                    ChunkReport::Stored { token: of, .. } | ChunkReport::GivenUp(of, _)
                        if *of == token =>
                    {
                        return Ok(Ended::Report(report));
                    }
                    ChunkReport::Truncated(table) if *table == one.wanted.oid => {
                        return Ok(Ended::Truncated);
                    }
                    ChunkReport::Stored { .. }
                    | ChunkReport::GivenUp(..)
                    | ChunkReport::Truncated(_)
                    | ChunkReport::Began(_) => self.note(&report).await?,
                },
                Err(_) => {
                    let open = runs::list(&self.client, &self.options.name, true).await?;
                    if !open.iter().any(|run| run.run == one.run.run) {
                        return Ok(Ended::Left);
                    }
                }
            }
        }
    }

    /// A report that nobody waits for.
    async fn note(&mut self, report: &ChunkReport) -> Result<()> {
        let ChunkReport::Truncated(table) = report else { return Ok(()) };
        if let Some(at) = self.active.iter().position(|one| one.wanted.oid == *table) {
            let one = self.active.remove(at).expect("it was found there");
            self.leave(&one).await;
            self.fail(one.run, "the table was truncated").await?;
        }
        Ok(())
    }

    /// The run is not gone on with.
    async fn leave(&mut self, one: &Active) {
        // Without a loop there is nothing to tell.
        let _gone = self.end.commands.send(ChunkCommand::End(one.wanted.oid)).await;
    }

    async fn forget(&mut self, token: Uuid) {
        let _gone = self.end.commands.send(ChunkCommand::Forget(token)).await;
    }

    async fn fail(&mut self, mut run: runs::Run, why: &str) -> Result<()> {
        tracing::warn!(
            table = run.table,
            run = %run.run,
            "its backfill has failed: {why}; the others continue"
        );
        if let Some(metrics) = self.shared.backfills.of(&run.table) {
            metrics.failed.increment(1);
        }
        runs::fail(&self.client, run.run, why).await?;
        (run.state, run.error, run.waits) = (RunState::Failed, Some(why.to_owned()), None);
        self.end(BackfillView::new(&run, None));
        Ok(())
    }

    fn end(&mut self, view: BackfillView) {
        if self.ended.len() >= ENDED_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(view);
    }

    /// Tells `/status` and the metrics.
    fn show(&self) {
        let active = self.active.iter().map(Active::view);
        let shown: Vec<BackfillView> = self.ended.iter().cloned().chain(active).collect();
        for table in &self.options.tables {
            let Some(metrics) = self.shared.backfills.of(table) else { continue };
            let of = self.active.iter().find(|one| one.run.table == *table);
            metrics.running.set(f64::from(u8::from(of.is_some())));
            let waits = of.is_some_and(|one| one.run.waits.is_some());
            metrics.waiting.set(f64::from(u8::from(waits)));
        }
        self.shared.status.backfills(shown);
    }
}

/// How a chunk ended.
enum Ended {
    /// With what the loop said.
    Report(ChunkReport),
    /// The table was truncated.
    Truncated,
    /// Its run was paused or cancelled.
    Left,
    /// The loop has ended.
    Gone,
}
