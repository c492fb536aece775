//! The outbox read with SQL, for databases that let nobody read their WAL. How many rows and bytes
//! one read takes is decided here.
//!
//! Invariant: what is new is told by comparing two snapshots, never by `seq > last`: a transaction
//! that commits late is in the next batch whatever its rows are numbered, and one that stays open
//! holds up nobody. A batch is stored before anything of it is handed on (see `batch`), and only
//! while this session has the checkpoint's row.
//!
//! Between two looks that find nothing the newer snapshot takes the place of the older one in
//! memory: they show the same rows. So a look has a lower bound close to its end, and an idle
//! source writes nothing.
//!
//! Each statement is one round trip without a name and without settings of the session, so all of
//! it works through a pooler in transaction mode.

mod batch;
mod outbox;
mod rows;

use std::collections::VecDeque;
use std::mem::take;
use std::sync::Arc;
use std::time::Duration;

use futures_util::try_join;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row};

use crate::error::{Error, Kind, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::{Mark, Position};
use crate::source::{Item, PollSeen, Receipt, Seen, Source};
use batch::{BatchCursor, LookPace};
use rows::PolledRow;

pub use batch::{Batch, Interval, MadeWith};
pub use outbox::PolledOutbox;

/// Most rows of one portion.
const ROWS_MAX: i64 = 2048;
/// A portion ends with the row whose body reaches this many bytes.
const BYTES_MAX: i64 = 4 << 20;
/// Batches that were handed on and are not passed; with more, what is new comes in fewer.
const BATCHES_MAX: usize = 256;
/// How long a look may take. It counts the rows of the batch, so it is long after an outage.
const LOOK_LIMIT: Duration = Duration::from_secs(600);
/// How long a portion may take.
const READ_LIMIT: Duration = Duration::from_secs(120);

/// What a source that polls has to know before it begins.
pub struct Options {
    /// Name of the relay.
    pub name: String,
    /// Number of its session, which may store batches as long as the checkpoint has it.
    pub session_no: i64,
    /// Epoch of the checkpoint.
    pub epoch: u32,
    /// Events up to and including this position were settled before: they are not handed on.
    pub resume_after: Position,
    /// All batches up to this one are settled.
    pub flushed: Mark,
    /// What is read.
    pub outbox: PolledOutbox,
    /// How often the outbox is looked at.
    pub interval: Interval,
    /// How often a source that finds nothing records that it looked; absent for never.
    pub noted_every: Option<Duration>,
    /// Most bytes of a body that are read.
    pub max_body: usize,
    /// Write nothing: keep batches in memory, and report a look that finds nothing.
    pub read_only: bool,
}

/// The outbox as a source.
pub struct Poll {
    client: Arc<Client>,
    options: Arc<Options>,
    /// A snapshot as text; nothing that it does not show has been seen.
    since: String,
    last: Mark,
    /// Batches that an earlier session had stored and not settled, in order.
    stored: VecDeque<Batch>,
    reading: Option<Reading>,
    /// What was read and not handed on: two portions at most.
    ready: VecDeque<Item>,
    work: Option<Work>,
    pace: LookPace,
    /// When a look that found nothing was last recorded.
    noted: Option<Instant>,
    /// Batches that are not passed, and when they were found or found again.
    open: VecDeque<(Mark, Instant)>,
    passed: Mark,
    /// Batches before this one are deleted.
    forgotten: Mark,
    seen: Seen,
    polled: PollSeen,
}

/// A batch that is being read.
struct Reading {
    batch: Arc<Batch>,
    cursor: BatchCursor,
}

/// A statement under way, in a task of its own: it ends even while nobody asks for items, so that
/// nothing in the database waits for us.
struct Work(JoinHandle<Result<Done>>);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What came of it.
enum Done {
    /// Nothing is new; what is visible now.
    Nothing { at: Instant, snapshot: String, noted: bool },
    /// A new batch, which is stored, with its first portion.
    Found(Box<Found>),
    /// The next portion of the batch that is being read.
    Read(Portion),
}

/// A new batch.
struct Found {
    /// When it was looked for.
    at: Instant,
    batch: Batch,
    portion: Portion,
    /// Batches before this one were deleted with the same statement.
    forgotten: Mark,
}

/// Rows of a batch.
struct Portion {
    rows: Vec<PolledRow>,
    /// There may be more of them.
    more: bool,
}

impl Poll {
    /// Begins behind the first of `batches`, which is settled; the others were stored and are
    /// handed on again.
    ///
    /// # Panics
    /// When `batches` is empty or its first is not the one that is settled.
    pub fn new(client: Arc<Client>, options: Options, mut batches: VecDeque<Batch>) -> Self {
        let settled = batches.pop_front().expect("the settled batch is there");
        assert_eq!(settled.number, options.flushed, "the first batch is the settled one");
        let newest = batches.back().unwrap_or(&settled);
        let (since, last, now) = (newest.snapshot.clone(), newest.number, Instant::now());
        Self {
            client,
            since,
            last,
            reading: None,
            ready: VecDeque::new(),
            work: None,
            pace: LookPace::new(options.interval, now.into_std()),
            noted: None,
            open: batches.iter().map(|batch| (batch.number, now)).collect(),
            passed: settled.number,
            forgotten: Mark::ZERO,
            stored: batches,
            seen: Seen::default(),
            polled: PollSeen { batch: last, ..PollSeen::default() },
            options: Arc::new(options),
        }
    }

    /// Begins what is to be done next; absent when it is not time yet.
    fn begin(&mut self) -> Option<Work> {
        if self.reading.is_none()
            && let Some(batch) = self.stored.pop_front()
        {
            let cursor = BatchCursor::begin(&batch, self.options.resume_after);
            self.reading = Some(Reading { batch: Arc::new(batch), cursor });
        }
        let (client, options) = (self.client.clone(), self.options.clone());
        if let Some(Reading { batch, cursor }) = &self.reading {
            let (batch, cursor) = (batch.clone(), cursor.clone());
            let read = async move {
                let reading = read(&client, &options, &batch, &cursor);
                in_time(READ_LIMIT, reading).await.map(Done::Read)
            };
            return Some(Work(tokio::spawn(read)));
        }
        if self.open.len() >= BATCHES_MAX || Instant::now() < self.due() {
            return None;
        }
        let look = Look {
            since: self.since.clone(),
            number: Mark(self.last.0 + 1),
            passed: (self.forgotten, self.passed),
            note: self.note_is_due(),
        };
        let looking = async move { in_time(LOOK_LIMIT, look.run(&client, &options)).await };
        Some(Work(tokio::spawn(looking)))
    }

    /// Whether everything that was there at the first look has been passed on.
    pub fn is_caught_up(&self) -> bool {
        self.polled.looks > 0 && self.reading.is_none() && self.ready.is_empty()
    }

    fn note_is_due(&self) -> bool {
        let due = |every| self.noted.is_none_or(|noted| noted.elapsed() >= every);
        !self.options.read_only && self.options.noted_every.is_some_and(due)
    }

    fn due(&self) -> Instant {
        self.pace.due().into()
    }

    fn apply(&mut self, done: Done) -> Result<()> {
        match done {
            Done::Nothing { at, snapshot, noted } => {
                if self.options.read_only {
                    self.ready.push_back(Item::Idle(Receipt::idle(self.passed)));
                }
                self.polled.looks += 1;
                self.noted = if noted { Some(at) } else { self.noted };
                self.since = snapshot;
                self.pace.looked(at.into_std(), false);
                Ok(())
            }
            Done::Found(found) => {
                let Found { at, batch, portion, forgotten } = *found;
                self.polled.looks += 1;
                self.polled.batches += 1;
                self.polled.batch = batch.number;
                self.pace.looked(at.into_std(), true);
                self.since.clone_from(&batch.snapshot);
                self.last = batch.number;
                self.forgotten = forgotten;
                self.open.push_back((batch.number, at));
                let cursor = BatchCursor::begin(&batch, self.options.resume_after);
                self.reading = Some(Reading { batch: Arc::new(batch), cursor });
                self.take(portion)
            }
            Done::Read(portion) => self.take(portion),
        }
    }

    /// Makes items of the next portion of the batch that is being read.
    fn take(&mut self, portion: Portion) -> Result<()> {
        let mut reading = self.reading.take().expect("a portion is of the batch that is read");
        let Options { epoch, resume_after, .. } = *self.options;
        let Reading { batch, cursor } = &mut reading;
        for mut row in portion.rows {
            let position = cursor.pass(batch, epoch, row.seq, take(&mut row.tie))?;
            self.seen.changes += 1;
            if position <= resume_after {
                self.seen.skipped += 1;
                continue;
            }
            let event = row.event(self.options.outbox.table(), position, batch.made_at_us);
            self.ready.push_back(Item::Event(event, Receipt::new(position, None)));
        }
        if portion.more {
            self.reading = Some(reading);
            return Ok(());
        }
        let end = cursor.last(batch, epoch).max(resume_after);
        self.ready.push_back(Item::Commit(Receipt::new(end, Some(batch.number))));
        Ok(())
    }
}

/// Looks for what is new, and stores it.
struct Look {
    since: String,
    /// What a batch is called if there is one.
    number: Mark,
    /// Batches from the first and before the second are passed.
    passed: (Mark, Mark),
    /// Whether to record that nothing was found.
    note: bool,
}

impl Look {
    async fn run(self, client: &Client, options: &Options) -> Result<Done> {
        let at = Instant::now();
        let row = options.outbox.look(client, &[&self.since]).await?;
        let int = |i: usize| row.try_get::<_, Option<i64>>(i).map_err(postgres_error);
        let snapshot: String = row.try_get(0).map_err(postgres_error)?;
        let Some(first_seq) = int(2)? else {
            if self.note {
                note(client, options).await?;
            }
            return Ok(Done::Nothing { at, snapshot, noted: self.note });
        };
        let batch = Batch {
            number: self.number,
            since: self.since,
            snapshot,
            first_seq,
            new: int(3)?.zip(int(4)?),
            made_at_us: int(5)?.unwrap_or_default(),
            outbox: options.outbox.name.clone(),
            made_with: options.outbox.made_with(),
        };
        // Sent together: reading does not hang on storing, but handing on does.
        let cursor = BatchCursor::begin(&batch, options.resume_after);
        let storing = async {
            match options.read_only {
                true => Ok(()),
                false => store(client, options, &batch, self.passed).await,
            }
        };
        let ((), portion) = try_join!(storing, read(client, options, &batch, &cursor))?;
        let forgotten = self.passed.1;
        Ok(Done::Found(Box::new(Found { at, batch, portion, forgotten })))
    }
}

/// Stores a batch. It must survive a crash of the server; whether a standby has it does not matter.
async fn store(
    client: &Client,
    options: &Options,
    batch: &Batch,
    passed: (Mark, Mark),
) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/poll_store.sql");
    let (number, new_first) = (to_sql(batch.number), batch.new.map(|new| new.0));
    let (new_last, from, to) = (batch.new.map(|new| new.1), to_sql(passed.0), to_sql(passed.1));
    let (oid, order_by, xid) = MadeWith::stored(batch.made_with);
    let values: [&(dyn ToSql + Sync); 15] = [
        &options.name,
        &options.session_no,
        &number,
        &batch.since,
        &batch.snapshot,
        &batch.first_seq,
        &new_first,
        &new_last,
        &batch.made_at_us,
        &from,
        &to,
        &options.outbox.name,
        &oid,
        &order_by,
        &xid,
    ];
    let begin = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
        SET LOCAL synchronous_commit = local";
    let (_, stored, _) = try_join!(
        client.batch_execute(begin),
        unnamed::execute(client, SQL, &values),
        client.batch_execute("COMMIT"),
    )
    .map_err(postgres_error)?;
    if stored == 1 {
        return Ok(());
    }
    let name = &options.name;
    Err(Error::new(Kind::Busy, format!("another relay has taken over the checkpoint of {name:?}"))
        .hint("two relays with one name: this one is on standby"))
}

/// Records that nothing was found. A crash may lose it. A session that was replaced records
/// nothing; its next batch fails instead.
async fn note(client: &Client, options: &Options) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/poll_noted.sql");
    let begin = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
        SET LOCAL synchronous_commit = off";
    let values: [unnamed::Parameter<'_>; 2] = [&options.name, &options.session_no];
    try_join!(
        client.batch_execute(begin),
        unnamed::execute(client, SQL, &values),
        client.batch_execute("COMMIT"),
    )
    .map_err(postgres_error)?;
    Ok(())
}

async fn read(
    client: &Client,
    options: &Options,
    batch: &Batch,
    cursor: &BatchCursor,
) -> Result<Portion> {
    let (new_first, new_last) = (batch.new.map(|new| new.0), batch.new.map(|new| new.1));
    let max_body = i64::try_from(options.max_body).unwrap_or(i64::MAX);
    let (seq, tie) = &cursor.after;
    let values: [&(dyn ToSql + Sync); 9] = [
        &batch.since,
        &batch.snapshot,
        &new_first,
        &new_last,
        seq,
        tie,
        &ROWS_MAX,
        &BYTES_MAX,
        &max_body,
    ];
    let rows = options.outbox.read(client, &values, options.max_body).await?;
    // As the statement decides it.
    let bytes: u64 = rows.iter().map(|row| row.body).sum();
    let more = rows.len() as i64 >= ROWS_MAX || bytes >= BYTES_MAX as u64;
    Ok(Portion { rows, more })
}

/// The batches from this one on, as they are stored.
///
/// # Errors
/// The server's.
pub async fn batches(client: &Client, name: &str, from: Mark) -> Result<VecDeque<Batch>> {
    const SQL: &str = include_str!("../../sql/query/poll_batches.sql");
    let rows =
        unnamed::query(client, SQL, &[&name, &to_sql(from)]).await.map_err(postgres_error)?;
    let batch = |row: &Row| -> std::result::Result<Batch, tokio_postgres::Error> {
        Ok(Batch {
            number: Mark(row.try_get::<_, i64>(0)?.unsigned_abs()),
            since: row.try_get(1)?,
            snapshot: row.try_get(2)?,
            first_seq: row.try_get(3)?,
            new: row.try_get::<_, Option<i64>>(4)?.zip(row.try_get(5)?),
            made_at_us: row.try_get(6)?,
            outbox: row.try_get(7)?,
            made_with: made_with(row)?,
        })
    };
    rows.iter().map(|row| batch(row).map_err(postgres_error)).collect()
}

fn made_with(row: &Row) -> std::result::Result<Option<MadeWith>, tokio_postgres::Error> {
    let (table, order_by): (Option<u32>, Option<i32>) = (row.try_get(8)?, row.try_get(9)?);
    let all = table.zip(order_by).zip(row.try_get::<_, Option<i32>>(10)?);
    Ok(all.map(|((table, order_by), xid)| MadeWith { table, order_by, xid }))
}

/// A number of a batch as bigint, which has no unsigned form.
fn to_sql(number: Mark) -> i64 {
    i64::try_from(number.0).expect("nobody makes 2^63 batches")
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        let text = format!("Postgres did not answer a poll of the outbox within {limit:?}");
        Err(Error::unreachable(text))
    })
}

impl Source for Poll {
    async fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<()> {
        assert!(batch.is_empty(), "a batch is taken out before the next one comes");
        loop {
            if self.work.is_none() && self.ready.len() < ROWS_MAX as usize {
                self.work = self.begin();
            }
            if !self.ready.is_empty() {
                batch.extend(self.ready.drain(..room.min(self.ready.len())));
                return Ok(());
            }
            match &mut self.work {
                Some(Work(task)) => {
                    let done = task.await;
                    self.work = None;
                    self.apply(done.map_err(|e| {
                        Error::internal("the task that polls has ended").caused_by(e)
                    })??)?;
                }
                // The loop calls again after it has said that batches are passed.
                None if self.open.len() >= BATCHES_MAX => std::future::pending::<()>().await,
                None => sleep_until(self.due()).await,
            }
        }
    }

    async fn advance(&mut self, flush: Mark) -> Result<()> {
        self.passed = self.passed.max(flush);
        while self.open.front().is_some_and(|(number, _)| *number <= flush) {
            self.open.pop_front();
        }
        Ok(())
    }

    async fn keep_alive(&mut self) -> Result<()> {
        Ok(())
    }

    fn seen(&self) -> Seen {
        let backlog_age = self.open.front().map_or(Duration::ZERO, |(_, at)| at.elapsed());
        Seen { polled: Some(PollSeen { backlog_age, ..self.polled }), ..self.seen }
    }

    async fn close(self) {}
}
