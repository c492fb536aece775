//! Beside the loop, on two connections: parked messages that an operator marked for retry, and the
//! upkeep of the inbox.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::attempts::{maintain, started};
use super::claim::one;
use super::database::Database;
use super::handler::{HandlerError, is_serialization};
use super::message::Message;
use super::work::{Handler, KILLED, SAVEPOINT, Worker, begin, commit, never_returned, release};
use crate::backoff::Backoff;
use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;

/// Between two looks for keys that are marked for retry.
const EVERY: Duration = Duration::from_secs(1);
/// Between two calls of maintain.
const UPKEEP: Duration = Duration::from_secs(3600);
/// Pauses after an error.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Attempts at one transaction that Postgres cannot serialize.
const SERIALIZATION_TRIES: u32 = 10;

const NEXT: &str = "SELECT r.id, r.message_id, extract(epoch FROM r.occurred_at)::float8, r.key, \
    r.body, r.properties FROM watership_inbox.retry_next($1) AS r";
const RETRY_DONE: &str = "SELECT watership_inbox.retry_done($1)";
const RETRY_FAILED: &str = "SELECT watership_inbox.retry_failed($1, $2)";

/// Makes the consumer known, so that first messages do not wait for each other.
pub(super) async fn register(client: &Client, consumer: &str) -> Result<()> {
    let call = "SELECT watership_inbox.register($1)";
    one::<i32>(client, call, &[(&consumer, Type::TEXT)]).await.map(drop)
}

/// Retries and maintains until `halted`.
pub(super) async fn keep<H: Handler>(
    worker: Worker<H>,
    database: Database,
    mut halted: watch::Receiver<bool>,
) {
    let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut maintained = None;
    while !*halted.borrow() {
        let error = match keep_connected(&worker, &database, &mut halted, &mut maintained).await {
            Ok(()) => return,
            Err(error) => error,
        };
        let (consumer, error) = (&worker.options.consumer, error.text_with_hint());
        tracing::warn!(consumer, error, "retries of parked messages wait");
        let pause = pauses.next(fastrand::f64());
        let _ = timeout(pause, halted.wait_for(|halted| *halted)).await;
    }
}

async fn keep_connected<H: Handler>(
    worker: &Worker<H>,
    database: &Database,
    halted: &mut watch::Receiver<bool>,
    maintained: &mut Option<Instant>,
) -> Result<()> {
    let (mut client, side) = (database.connect().await?, database.connect().await?);
    loop {
        if maintained.is_none_or(|at| at.elapsed() >= UPKEEP) {
            maintain(&side, &worker.options.consumer, None).await?;
            *maintained = Some(Instant::now());
        }
        while !*halted.borrow() && retry(worker, &mut client, &side).await? {}
        if let Ok(halted) = timeout(EVERY, halted.wait_for(|halted| *halted)).await {
            drop(halted);
            return Ok(());
        }
    }
}

/// One parked message.
struct Parked {
    id: i64,
    message: Message,
}

impl Parked {
    fn read(row: &Row) -> Result<Self> {
        let read = || -> Result<_, tokio_postgres::Error> {
            let properties: Value = row.try_get(5)?;
            let message = Message::parked(
                row.try_get(1)?,
                row.try_get(2)?,
                row.try_get(3)?,
                row.try_get(4)?,
                properties,
            );
            Ok(Self { id: row.try_get(0)?, message })
        };
        read().map_err(postgres_error)
    }
}

/// What became of one.
enum Tried {
    /// There is none.
    None,
    Handled(Message),
    Failed(Parked, String),
}

/// Handles the next one. True if there was one. `side` sees what the transaction is doing, from
/// outside of it.
async fn retry<H: Handler>(worker: &Worker<H>, client: &mut Client, side: &Client) -> Result<bool> {
    let consumer = &worker.options.consumer;
    let mut tries = 1;
    let tried = loop {
        match try_next(worker, client, side, tries == 1).await? {
            Ok(tried) => break tried,
            // Not the handler's fault.
            Err((_, error)) if client.is_closed() => {
                return Err(Error::unreachable(error.to_string()));
            }
            Err((parked, error)) => {
                if !error.is_serialization() || tries >= SERIALIZATION_TRIES {
                    break Tried::Failed(parked, error.to_string());
                }
            }
        }
        tries += 1;
        worker.counters.retries.increment(1);
        sleep(Duration::from_millis(50).mul_f64(fastrand::f64())).await;
    };
    match tried {
        Tried::None => return Ok(false),
        Tried::Handled(message) => {
            worker.counters.handled.increment(1);
            let (message_id, key) = (message.id, message.key);
            tracing::info!(consumer, message_id, key, "handled a parked message");
        }
        Tried::Failed(Parked { id, message }, error) => {
            worker.counters.failures.increment(1);
            let (message_id, key) = (message.id, message.key);
            tracing::warn!(consumer, message_id, key, error, "a parked message failed again");
            let error = error.replace('\0', "\u{fffd}");
            let params: [(&(dyn ToSql + Sync), Type); 2] =
                [(&id, Type::INT8), (&error, Type::TEXT)];
            side.query_typed(RETRY_FAILED, &params).await.map_err(postgres_error)?;
        }
    }
    Ok(true)
}

/// One transaction: the next parked message, its handler, and its end. The outer error is of the
/// inbox or its connection, the inner one of the handler.
async fn try_next<H: Handler>(
    worker: &Worker<H>,
    client: &mut Client,
    side: &Client,
    is_first: bool,
) -> Result<Result<Tried, (Parked, HandlerError)>> {
    let consumer = &worker.options.consumer;
    let _turn = worker.turns.beside_others().await;
    let tx = begin(client, worker.options.isolation).await.map_err(postgres_error)?;
    let rows = tx.query_typed(NEXT, &[(consumer, Type::TEXT)]).await;
    let rows = match rows.map_err(postgres_error) {
        Err(error) if error.sqlstate().is_some_and(is_serialization) => Vec::new(),
        rows => rows?,
    };
    let Some(row) = rows.first() else {
        // It may have made a key live again.
        tx.commit().await.map_err(postgres_error)?;
        return Ok(Ok(Tried::None));
    };
    let parked = Parked::read(row)?;
    // A conflict does not make it another attempt.
    let killed = match is_first {
        true => started(side, consumer, &parked.message.id).await?.1,
        false => 0,
    };
    if killed >= worker.options.max_kills {
        tx.rollback().await.map_err(postgres_error)?;
        let error = format!("{KILLED}: {}", never_returned(killed));
        return Ok(Ok(Tried::Failed(parked, error)));
    }
    tx.batch_execute(SAVEPOINT).await.map_err(postgres_error)?;
    if let Err(error) = worker.handle(&parked.message, &tx).await {
        tx.rollback().await.map_err(postgres_error)?;
        return Ok(Err((parked, error)));
    }
    if let Err(error) = release(&tx).await {
        return Ok(Err((parked, error.into())));
    }
    let done = tx.query_typed(RETRY_DONE, &[(&parked.id, Type::INT8)]).await;
    if let Err(error) = done {
        let error = postgres_error(error);
        return Ok(Err((parked, error.into())));
    }
    match commit(tx).await {
        Ok(()) => Ok(Ok(Tried::Handled(parked.message))),
        Err(error) => Ok(Err((parked, error.into()))),
    }
}
