//! A session that changes nothing: what would be published goes to a publisher that prints.
//!
//! Invariant: neither end is moved. Nothing is written to Postgres, no checkpoint is taken over,
//! and the server is never told a flush position, so the slot stays where it is (a status update
//! with the position 0 confirms nothing: walsender.c, `ProcessStandbyReplyMessage`), and the
//! batches that a poll finds are not stored. It does not connect to the broker. In mode `wal` it
//! occupies the slot while it runs, as any reader does.

use std::future::{Future, ready};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::Client;

use super::wal::{self, Streaming, TakenOver};
use super::{facts, poll};
use crate::error::{Error, Kind, Result};
use crate::metrics::{Metrics, RouteLabel};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::replication::ReplicationConnection;
use crate::pg::slot::insert_lsn;
use crate::pg::sqlstate::postgres_error;
use crate::position::{Lsn, Mark, Position};
use crate::publisher::Publisher;
use crate::relay::backfill::Backfill;
use crate::relay::check::position::Start;
use crate::relay::checkpoint::progress::Progress;
use crate::relay::checkpoint::rider::Rider;
use crate::relay::checkpoint::{Checkpoint, Store};
use crate::relay::parking::row::{ParkedKey, RowState};
use crate::relay::parking::store::Found;
use crate::relay::parking::{Parking, store as parked};
use crate::relay::session::broken::Missing;
use crate::relay::session::catalog::StartedWith;
use crate::relay::status::Status;
use crate::relay::upkeep::canary::Canary;
use crate::relay::{Kept, Options, Relay, RelayParts};
use crate::route::{Plans, Resumed, Router, Rule};
use crate::source::wal::{Timing, Wal};
use crate::source::{AnySource, Item, Seen, Source, SourceKind};

/// When a dry run ends by itself.
#[derive(Debug, Clone)]
pub struct Until {
    /// Ends the run when it becomes true.
    pub over: Arc<watch::Sender<bool>>,
    /// Ends it when everything is read that was committed when it began.
    pub caught_up: bool,
}

/// Reads from the checkpoint on until it is over, and gives each message to `publisher`. Returns
/// the number of messages that would have been parked.
///
/// # Errors
/// What would end the relay, at the first time: nothing is tried again. [`Kind::Busy`] while a
/// relay reads the slot.
pub async fn run<P: Publisher>(
    options: &Options,
    router: &Arc<Router>,
    publisher: P,
    until: &Until,
) -> Result<u64> {
    let SqlConnection { client, mut closed } = sql(&options.sql).await?;
    let client = Arc::new(client);
    let Looked { source, row, mut resumed, end } = match options.kind {
        SourceKind::Wal => look_at_wal(&client, options).await?,
        SourceKind::Poll => look_at_outbox(&client, options).await?,
    };
    let position = row.position;
    let mut found = parked::index(&client, &options.name).await?;
    // A dry run takes no row back out of the table.
    found.iter_mut().for_each(|row| row.state = RowState::Parked);
    resumed.parked = parked::table_names(&client, &options.name).await?;
    let known = parked::known(&client, &options.name, position).await?;
    let store = Nowhere::default();
    let source = Unmoved { source, end: until.caught_up.then_some(end), over: until.over.clone() };
    let label = |rule: &Rule| RouteLabel { name: rule.name.clone(), owner: rule.owner.clone() };
    let labels: Vec<RouteLabel> = options.rules.iter().map(label).collect();
    let names: Vec<String> = options.rules.iter().map(|rule| rule.name.clone()).collect();
    let parts = RelayParts {
        source,
        publisher,
        store: store.clone(),
        progress: Progress::new(position, row.flush()),
        parking: Parking::new(options.tuning.parked, found, known),
        router: router.clone(),
        plans: Plans::new(router, resumed),
        metrics: Arc::new(Metrics::new(&labels)),
        status: Status::new(&options.name, names),
        canary: Canary::new(Duration::ZERO),
        broken: Vec::new(),
        backfill: Backfill::none(),
        missing: Arc::new(Missing::default()),
        published: Kept::default().published,
        recently_parked: Kept::default().parked,
        remembered: Kept::default().remembered,
    };
    let mut relay = Relay::new(parts, &options.name, &options.tuning);
    let ended = tokio::select! { biased;
        error = closed.wait() => Err(error),
        ended = relay.run(until.over.subscribe()) => ended,
    };
    relay.close().await;
    ended.map(|()| store.parked.load(Ordering::Relaxed))
}

/// What a relay would start from.
struct Looked {
    source: AnySource,
    row: Checkpoint,
    resumed: Resumed,
    /// The end of what has been committed so far.
    end: Lsn,
}

/// The WAL from the checkpoint on.
async fn look_at_wal(client: &Arc<Client>, options: &Options) -> Result<Looked> {
    // Not in mode `poll`: a pooler would pass the setting on to other clients.
    let read_only = "SET default_transaction_read_only = on";
    client.batch_execute(read_only).await.map_err(postgres_error)?;
    let mut replication = ReplicationConnection::connect(&options.sql).await?;
    let (timelines, _) = wal::timelines(&mut replication).await?;
    let taken = look(client, options, timelines.history()).await?;
    let started_with = StartedWith::default();
    let Streaming { stream, assembler, columns, resumed } =
        wal::stream(client, replication, options, &taken, timelines, &started_with).await?;
    let end = insert_lsn(&**client).await?;
    let timing = Timing::new(taken.server.wal_sender_timeout);
    let source = AnySource::Wal(Wal::new(stream, assembler, columns, timing, Lsn::ZERO));
    Ok(Looked { source, row: taken.row, resumed, end })
}

/// The outbox from the checkpoint on. A relay may poll it at the same time.
async fn look_at_outbox(client: &Arc<Client>, options: &Options) -> Result<Looked> {
    let (row, source) = poll::look(client, options).await?;
    let (source, resumed) = (AnySource::Poll(source), Resumed::default());
    // The source reports when it has caught up.
    Ok(Looked { source, row, resumed, end: Lsn::ZERO })
}

/// What a start would read and compare, without taking anything over.
async fn look(client: &Client, options: &Options, history: &[(u32, Lsn)]) -> Result<TakenOver> {
    let found = facts::read(client, options).await?;
    match found.verify(options, history)? {
        Start::AsStored => {}
        Start::Failover(_) => {
            return Err(Error::refused("the server was promoted since the checkpoint was stored")
                .hint("start the relay once: it records the failover, which a dry run must not"));
        }
    }
    if let Some(pid) = found.position().1.and_then(|slot| slot.active_pid) {
        let text = format!("slot {:?} is in use by pid {pid}", options.slot);
        return Err(Error::new(Kind::Busy, text).hint(
            "a relay is running, and a slot has one reader: stop the relay for the dry run, or \
             make it with a relay name and a slot of its own",
        ));
    }
    TakenOver::looked_at(found, options)
}

/// A source that writes nothing: the WAL, which is never told that anything is settled, or the
/// outbox, whose batches are not stored.
struct Unmoved {
    source: AnySource,
    /// The end of what is to be read.
    end: Option<Lsn>,
    over: Arc<watch::Sender<bool>>,
}

impl Source for Unmoved {
    async fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<()> {
        self.source.next(room, batch).await?;
        let is_over = |end| match &self.source {
            AnySource::Wal(source) => source.seen().received >= end,
            AnySource::Poll(source) => source.is_caught_up(),
        };
        if self.end.is_some_and(is_over) {
            self.over.send_replace(true);
        }
        Ok(())
    }

    async fn advance(&mut self, flush: Mark) -> Result<()> {
        match &mut self.source {
            AnySource::Wal(_) => Ok(()),
            AnySource::Poll(source) => source.advance(flush).await,
        }
    }

    async fn keep_alive(&mut self) -> Result<()> {
        self.source.keep_alive().await
    }

    fn seen(&self) -> Seen {
        self.source.seen()
    }

    async fn close(self) {
        self.source.close().await;
    }
}

/// A store that forgets.
#[derive(Clone, Default)]
struct Nowhere {
    /// Rows that would have been parked.
    parked: Arc<AtomicU64>,
}

impl Store for Nowhere {
    fn store(
        &self,
        _position: Position,
        flush: Mark,
        riders: Vec<Rider>,
    ) -> impl Future<Output = Result<Lsn>> + 'static {
        for rider in riders {
            match rider {
                Rider::Parked(rows) => {
                    let count = rows.len() as u64;
                    self.parked.fetch_add(count, Ordering::Relaxed);
                }
                Rider::Unparked(_)
                | Rider::Described(_)
                | Rider::Changed(_)
                | Rider::Canary(_)
                | Rider::Moved(_)
                | Rider::Backfilled(_) => {}
            }
        }
        ready(Ok(flush.lsn()))
    }

    fn look(&self, _expected: (usize, usize)) -> impl Future<Output = Result<Found>> + 'static {
        ready(Ok(Found::Same))
    }

    fn read(&self, _keys: Vec<ParkedKey>) -> impl Future<Output = Result<Found>> + 'static {
        ready(Ok(Found::Rows(Vec::new())))
    }
}
