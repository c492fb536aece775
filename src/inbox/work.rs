//! One message: claim and handler in one transaction, then what its outcome asks for.
//!
//! Invariant: a message is acknowledged only after the commit that makes it handled, parked or a
//! duplicate, or after the broker has confirmed its dead letter; on the channel that delivered it.

use std::mem;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt as _, TryFutureExt as _, try_join};
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::{Acker, BasicProperties};
use tokio::time::{sleep, timeout};
use tokio_postgres::{Client, IsolationLevel, Transaction};
use tracing::Instrument as _;

use super::attempts::{ended, failed, has_killed, maintain, parked_for, started};
use super::claim::{park, receive};
use super::counters::Counters;
use super::database::Database;
use super::dead_letters::{self, DeadLetters, Reason};
use super::handler::{HandlerError, is_serialization, spoilt};
use super::message::Message;
use super::options::{Boxed, OnFailure, Options};
use super::sql::Received;
use super::turns::Turns;
use crate::error::{Error, Kind, Result};
use crate::pg::sqlstate::postgres_error;

mod disconnected;
mod failure;

use failure::Failure;

/// The handler of the application.
pub(super) trait Handler:
    for<'a> Fn(&'a Message, &'a Transaction<'a>) -> Boxed<'a, Result<(), HandlerError>>
    + Send
    + Sync
    + 'static
{
}

impl<H> Handler for H where
    H: for<'a> Fn(&'a Message, &'a Transaction<'a>) -> Boxed<'a, Result<(), HandlerError>>
        + Send
        + Sync
        + 'static
{
}

/// Attempts at one transaction that Postgres cannot serialize.
const SERIALIZATION_TRIES: u32 = 10;
/// Longest pause between two of them.
const SERIALIZATION_PAUSE: Duration = Duration::from_millis(50);
/// Pauses between attempts: the first, doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// An acknowledgement is written by then, or the channel is not to be trusted.
const ACK_LIMIT: Duration = Duration::from_secs(10);
/// The inbox has no slot for today: nobody called maintain.
const NOT_MAINTAINED: &str = "WI003";
/// Calls of maintain in a row, at most: a turn of the ring needs two for each day.
const MAINTAIN_TRIES: u32 = 100;
/// The word for a handler that fails, and for one that its process does not survive.
pub(super) const FAILED: &str = "failed";
pub(super) const KILLED: &str = "killed";

/// What is said of attempts that did not even fail.
pub(super) fn never_returned(attempts: u32) -> String {
    format!(
        "{attempts} attempts started and never returned: the consumer was killed, crashed, or lost \
         its connection"
    )
}
const NO_MESSAGE_ID: &str = "no_message_id";
/// Around the handler. What it left aborted, or has ended by itself, would otherwise commit nothing
/// and look like success; in both cases the savepoint cannot be released.
pub(super) const SAVEPOINT: &str = "SAVEPOINT watership_handler";
const RELEASE: &str = "RELEASE SAVEPOINT watership_handler";
const RELEASE_AND_COMMIT: &str = "RELEASE SAVEPOINT watership_handler; COMMIT";
const UNDO: &str = "ROLLBACK TO SAVEPOINT watership_handler";

/// A delivered message on its way.
pub(super) struct InHand {
    pub message: Message,
    /// As they came, for a dead letter.
    properties: BasicProperties,
    acker: Acker,
    /// The subscription that it came from.
    pub session: u64,
    /// Failures that are recorded.
    failures: u32,
    /// Whether attempts are recorded.
    recorded: bool,
    /// Whether this process has begun with it.
    begun: bool,
    /// Whether a process died at it before.
    suspect: bool,
    /// How the handler's connection has ended under it just now, and whether one has before.
    lost: Option<HandlerError>,
    disconnected: bool,
}

impl InHand {
    pub fn new(delivery: Delivery, session: u64) -> Self {
        let message = Message::parse(&delivery);
        let Delivery { properties, acker, .. } = delivery;
        Self {
            message,
            properties,
            acker,
            session,
            failures: 0,
            recorded: false,
            begun: false,
            suspect: false,
            lost: None,
            disconnected: false,
        }
    }

    /// The lane of the message: its key, or itself.
    pub fn lane(&self) -> String {
        match &self.message.key {
            Some(key) => format!("k{key}"),
            None => format!("m{}", self.message.id),
        }
    }
}

/// What became of an attempt.
#[derive(Debug)]
pub(super) enum Attempt {
    /// Acknowledged.
    Settled,
    /// To be tried again after this time.
    Again(Duration),
    /// The channel does not take the acknowledgement.
    NotAcknowledged,
    /// The database is unreachable.
    DatabaseAway(Error),
}

/// What every attempt needs.
pub(super) struct Worker<H> {
    pub options: Options,
    pub handler: Arc<H>,
    pub counters: Arc<Counters>,
    pub dead_letters: Arc<DeadLetters>,
    pub turns: Turns,
}

impl<H> Clone for Worker<H> {
    fn clone(&self) -> Self {
        Self {
            options: self.options.clone(),
            handler: self.handler.clone(),
            counters: self.counters.clone(),
            dead_letters: self.dead_letters.clone(),
            turns: self.turns.clone(),
        }
    }
}

impl<H: Handler> Worker<H> {
    /// One attempt at a delivered message.
    pub async fn attempt(
        &self,
        database: &Database,
        client: &mut Client,
        item: &mut InHand,
    ) -> Attempt {
        let mut attempted = self.try_item(client, item).await;
        if let Some(error) = item.lost.take() {
            attempted = self.disconnected(database, client, item, error).await;
        }
        attempted.unwrap_or_else(|error| self.inbox_failed(client, item, error))
    }

    /// The inbox itself refuses: the message waits, others go on.
    fn inbox_failed(&self, client: &Client, item: &InHand, error: Error) -> Attempt {
        if client.is_closed() || error.kind() == Kind::Unreachable {
            return Attempt::DatabaseAway(error);
        }
        tracing::error!(
            consumer = self.options.consumer,
            message_id = item.message.id,
            key = item.message.key,
            error = error.text_with_hint(),
            "the inbox refuses the message; it waits and is tried again"
        );
        Attempt::Again(LONGEST_PAUSE)
    }

    async fn try_item(&self, client: &mut Client, item: &mut InHand) -> Result<Attempt> {
        let consumer = &self.options.consumer;
        if !item.message.has_id {
            let error = "the message has no message_id, so its duplicates cannot be recognized";
            self.park(client, item, NO_MESSAGE_ID, error).await?;
            return Ok(self.acknowledge(item).await);
        }
        let came_back = !item.begun && item.message.came_back();
        if came_back {
            item.suspect = has_killed(client, consumer, &item.message.id).await?;
        }
        // Before a transaction holds anything that another one may wait for.
        let _turn = match item.suspect {
            true => self.turns.alone().await,
            false => self.turns.beside_others().await,
        };
        if came_back {
            self.counters.redelivered.increment(1);
            let (failures, killed) = started(client, consumer, &item.message.id).await?;
            (item.failures, item.recorded) = (failures, true);
            if killed >= self.options.max_kills {
                return self.give_up(client, item, KILLED, &never_returned(killed)).await;
            }
        }
        item.begun = true;
        let last = item.failures + 1 >= self.options.max_failures;
        match self.transaction(client, item, last).await {
            Ok(()) => Ok(self.acknowledge(item).await),
            Err(Failure::Inbox(error)) if client.is_closed() => Err(error),
            Err(Failure::Handler(error)) if client.is_closed() => {
                item.lost = Some(error);
                Ok(Attempt::Again(Duration::ZERO))
            }
            // Not the message's fault: a lock that did not come, a full disk.
            Err(Failure::Inbox(error)) if !is_of_message(&error) => Err(error),
            Err(failure) => self.failed(client, item, failure.into_error()).await,
        }
    }

    /// Claim, handler and commit; again while Postgres asks for that.
    async fn transaction(
        &self,
        client: &mut Client,
        item: &InHand,
        last: bool,
    ) -> Result<(), Failure> {
        let mut tries = 1;
        let mut maintained = false;
        loop {
            let failure = match self.once(client, item, last).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            if client.is_closed() {
                return Err(match failure {
                    Failure::Inbox(error) => Failure::Inbox(Error::unreachable(error.to_string())),
                    handler => handler,
                });
            }
            if failure.is_not_maintained() && !maintained {
                maintained = true;
                for _ in 0..MAINTAIN_TRIES {
                    let at = item.message.occurred_at;
                    let more = maintain(client, &self.options.consumer, at).await;
                    if !more.map_err(Failure::Inbox)? {
                        break;
                    }
                }
                continue;
            }
            if !failure.is_serialization() || tries >= SERIALIZATION_TRIES {
                return Err(failure);
            }
            tries += 1;
            self.counters.retries.increment(1);
            sleep(SERIALIZATION_PAUSE.mul_f64(fastrand::f64())).await;
        }
    }

    async fn once(&self, client: &mut Client, item: &InHand, last: bool) -> Result<(), Failure> {
        let inbox = |error| Failure::Inbox(postgres_error(error));
        let Options { consumer, isolation, on_failure, .. } = &self.options;
        let message = &item.message;
        let tx = begin(client, *isolation).await.map_err(inbox)?;
        // Sent together, in this order.
        let savepoint = tx.batch_execute(SAVEPOINT).map_err(postgres_error);
        let both = try_join!(receive(&tx, consumer, message), savepoint);
        match both.map_err(Failure::Inbox)?.0 {
            Received::Handle if last && *on_failure == OnFailure::Park => {
                return self.last(tx, item).await;
            }
            Received::Handle => {
                if let Err(error) = self.handle(message, &tx).await {
                    rolled_back(tx.rollback().await);
                    return Err(Failure::Handler(error));
                }
                self.handled(tx, item).await?;
            }
            Received::Duplicate => {
                if item.recorded {
                    ended(&tx, consumer, &message.id).await.map_err(Failure::Inbox)?;
                }
                tx.commit().await.map_err(inbox)?;
                self.counters.duplicates.increment(1);
                tracing::debug!(consumer, message_id = message.id, "handled before");
            }
            Received::Parked => {
                let reason =
                    parked_for(&tx, consumer, &message.id).await.map_err(Failure::Inbox)?;
                if item.recorded {
                    ended(&tx, consumer, &message.id).await.map_err(Failure::Inbox)?;
                }
                tx.commit().await.map_err(inbox)?;
                let why = "it is queued behind its key, or older than the window";
                self.told_parked(message, &reason, why);
            }
        }
        Ok(())
    }

    /// The handler has succeeded: commits, if it left the transaction to us.
    async fn handled(&self, tx: Transaction<'_>, item: &InHand) -> Result<(), Failure> {
        if item.recorded {
            release(&tx).await.map_err(|error| Failure::Handler(error.into()))?;
            return self.released(tx, item).await;
        }
        let ended = end(tx, RELEASE_AND_COMMIT).await;
        ended.map_err(|error| Failure::Handler(error.into()))?;
        self.counters.handled.increment(1);
        Ok(())
    }

    /// Commits what the handler did, once its savepoint is released.
    async fn released(&self, tx: Transaction<'_>, item: &InHand) -> Result<(), Failure> {
        if item.recorded {
            let consumer = &self.options.consumer;
            ended(&tx, consumer, &item.message.id).await.map_err(Failure::Inbox)?;
        }
        commit(tx).await.map_err(|error| Failure::Handler(error.into()))?;
        self.counters.handled.increment(1);
        Ok(())
    }

    /// The last attempt: if it fails too, the message is parked without a moment in which something
    /// of its key passes.
    async fn last(&self, tx: Transaction<'_>, item: &InHand) -> Result<(), Failure> {
        let inbox = |error| Failure::Inbox(postgres_error(error));
        let (consumer, message) = (&self.options.consumer, &item.message);
        let failed = match self.handle(message, &tx).await {
            Ok(()) => release(&tx).await.err().map(HandlerError::from),
            Err(error) => Some(error),
        };
        let Some(error) = failed else { return self.released(tx, item).await };
        // What the handler left aborted is whole again; what it ended is gone.
        if error.is_serialization() || tx.batch_execute(UNDO).await.is_err() {
            return Err(Failure::Handler(error));
        }
        let text = error.to_string();
        park(&tx, consumer, message, FAILED, &text).await.map_err(Failure::Inbox)?;
        tx.commit().await.map_err(inbox)?;
        self.counters.failures.increment(1);
        self.told_parked(message, FAILED, &text);
        Ok(())
    }

    /// Calls the handler in its span; a panic is a failure.
    pub async fn handle(
        &self,
        message: &Message,
        tx: &Transaction<'_>,
    ) -> Result<(), HandlerError> {
        let span = tracing::info_span!(
            "handle",
            consumer = self.options.consumer,
            message_id = message.id,
            key = message.key,
            traceparent = message.traceparent()
        );
        // The call itself may panic as well.
        let called = async { (self.handler)(message, tx).await };
        let handled = AssertUnwindSafe(called).catch_unwind().instrument(span).await;
        handled.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(format!("the handler panicked: {}", text.unwrap_or_default()).into())
        })
    }

    /// The handler has failed: records it, and decides.
    async fn failed(
        &self,
        client: &Client,
        item: &mut InHand,
        error: HandlerError,
    ) -> Result<Attempt> {
        let (consumer, message) = (&self.options.consumer, &item.message);
        let text = error.to_string();
        self.counters.failures.increment(1);
        let failures = failed(client, consumer, &message.id, &text).await?;
        tracing::warn!(
            consumer,
            message_id = message.id,
            key = message.key,
            failures,
            error = text,
            "the handler failed"
        );
        (item.failures, item.recorded) = (failures, true);
        if error.is_permanent() || failures >= self.options.max_failures {
            return self.give_up(client, item, FAILED, &text).await;
        }
        let bound = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(20)).min(LONGEST_PAUSE);
        Ok(Attempt::Again(bound.mul_f64(fastrand::f64())))
    }

    async fn give_up(
        &self,
        client: &Client,
        item: &InHand,
        word: &'static str,
        error: &str,
    ) -> Result<Attempt> {
        let Options { consumer, on_failure, .. } = &self.options;
        let OnFailure::DeadLetter { exchange, routing_key } = on_failure else {
            self.park(client, item, word, error).await?;
            return Ok(self.acknowledge(item).await);
        };
        let reason = Reason { consumer, word, error, failures: item.failures };
        let letter = dead_letters::properties(&item.properties, &reason);
        let body = &item.message.body;
        let published = self.dead_letters.publish(exchange, routing_key, letter, body);
        if let Err(error) = published.await {
            tracing::error!(
                consumer,
                message_id = item.message.id,
                key = item.message.key,
                error = error.text_with_hint(),
                "the message cannot be dead-lettered; it is tried again"
            );
            return Ok(Attempt::Again(LONGEST_PAUSE));
        }
        // Moved back from there, it begins again.
        ended(client, consumer, &item.message.id).await?;
        self.counters.dead_lettered(word);
        tracing::error!(
            consumer,
            message_id = item.message.id,
            key = item.message.key,
            reason = word,
            error,
            "dead-lettered"
        );
        Ok(self.acknowledge(item).await)
    }

    /// Parks in a transaction of its own.
    async fn park(&self, client: &Client, item: &InHand, word: &str, error: &str) -> Result<()> {
        let (consumer, message) = (&self.options.consumer, &item.message);
        let mut tries = 1;
        let parked = loop {
            match park(client, consumer, message, word, error).await {
                // Where the database's own level is a stricter one.
                Err(error)
                    if error.sqlstate().is_some_and(is_serialization)
                        && tries < SERIALIZATION_TRIES =>
                {
                    tries += 1;
                    sleep(SERIALIZATION_PAUSE.mul_f64(fastrand::f64())).await;
                }
                parked => break parked?,
            }
        };
        if parked {
            self.told_parked(message, word, error);
        } else {
            self.counters.duplicates.increment(1);
        }
        Ok(())
    }

    fn told_parked(&self, message: &Message, reason: &str, error: &str) {
        self.counters.parked(reason);
        tracing::warn!(
            consumer = self.options.consumer,
            message_id = message.id,
            key = message.key,
            reason,
            error,
            "parked; see `watership inbox parked`"
        );
    }

    async fn acknowledge(&self, item: &InHand) -> Attempt {
        let ack = item.acker.ack(BasicAckOptions { multiple: false });
        match timeout(ACK_LIMIT, ack).await {
            Ok(Ok(true)) => Attempt::Settled,
            // The channel is gone: the message comes again and is found to be handled.
            Ok(Ok(false) | Err(_)) | Err(_) => Attempt::NotAcknowledged,
        }
    }
}

/// Whether another message may pass where this one fails before its handler: data, constraints,
/// limits, and what the inbox says itself.
fn is_of_message(error: &Error) -> bool {
    let classes = ["22", "23", "54", "WI"];
    error.sqlstate().is_some_and(|state| classes.iter().any(|class| state.starts_with(class)))
}

/// Begins the handler's transaction.
pub(super) async fn begin(
    client: &mut Client,
    isolation: Option<IsolationLevel>,
) -> Result<Transaction<'_>, tokio_postgres::Error> {
    let builder = client.build_transaction();
    match isolation {
        None => builder.start().await,
        Some(level) => builder.isolation_level(level).start().await,
    }
}

/// Ends the savepoint around the handler; an error if the handler ended the transaction or left it
/// aborted. Nothing else may be said to the server before: it would be committed by itself.
pub(super) async fn release(tx: &Transaction<'_>) -> Result<()> {
    tx.batch_execute(RELEASE).await.map_err(|error| spoilt(postgres_error(error)))
}

/// Commits what was released, or says why nothing was committed: an error of the commit is the
/// handler's (a deferred constraint, say).
pub(super) async fn commit(tx: Transaction<'_>) -> Result<()> {
    end(tx, "COMMIT").await
}

async fn end(tx: Transaction<'_>, statements: &str) -> Result<()> {
    match tx.batch_execute(statements).await {
        Ok(()) => {
            // It has ended on the server: there is nothing to roll back any more.
            mem::forget(tx);
            Ok(())
        }
        Err(error) => Err(spoilt(postgres_error(error)).context("committing")),
    }
}

/// A rollback that fails has lost its connection, and the next use of that says so.
fn rolled_back(result: Result<(), tokio_postgres::Error>) {
    if let Err(error) = result {
        tracing::debug!(%error, "rolling back");
    }
}
