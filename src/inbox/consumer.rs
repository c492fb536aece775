//! The loop: deliveries into lanes, lanes to workers, and everything that is lost opened again.
//!
//! Invariant: nothing but the stop ends it. Whatever goes wrong closes the channel, so that the
//! broker has all messages that are not handled; work that has begun continues, and its lane waits
//! for it, whatever subscription the lane's next message comes from.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

use super::counters::{Counters, Loss};
use super::database::Database;
use super::dead_letters::DeadLetters;
use super::lanes::KeyLanes;
use super::options::Options;
use super::parked;
use super::subscription::{Subscriber, Subscription};
use super::turns::Turns;
use super::watchdog::{self, Activity};
use super::work::{Attempt, Handler, InHand, Worker};
use crate::amqp::options::Options as Broker;
use crate::backoff::Backoff;
use crate::error::{Error, Kind, Result};

/// Pauses between tries to connect or to subscribe.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Consumes until `stop` completes.
pub(super) async fn run<H: Handler>(
    options: Options,
    database: Database,
    broker: Broker,
    handler: Arc<H>,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let mut stop = pin!(stop);
    let counters = Arc::new(Counters::new(&options.consumer));
    let dead_letters = Arc::new(DeadLetters::new(&broker));
    let turns = Turns::default();
    let worker = Worker { options, handler, counters, dead_letters, turns };
    let mut keeper = JoinSet::new();
    match Stoppable::until(&mut stop, first_connection(&database, &worker.options)).await {
        None => return Ok(()),
        Some(connected) => connected?,
    }
    let (halt, halted) = tokio::sync::watch::channel(false);
    keeper.spawn(parked::keep(worker.clone(), database.clone(), halted));
    let mut consumer = Consumer::new(worker, database, broker);
    while let Some(()) = Stoppable::until(&mut stop, consumer.open_database()).await {
        let Some(subscription) = Stoppable::until(&mut stop, consumer.subscribe()).await else {
            break;
        };
        let (subscription, cause) = consumer.consume(subscription, &mut stop).await;
        match cause {
            None => {
                consumer.drain(Some(subscription)).await;
                break;
            }
            Some(cause) => consumer.lost(subscription, cause).await,
        }
    }
    consumer.drain(None).await;
    consumer.subscriber.close().await;
    let _ = halt.send(true);
    let limit = consumer.worker.options.stop_timeout;
    let _ = timeout(limit, async { while keeper.join_next().await.is_some() {} }).await;
    Ok(())
}

/// A future that the stop cuts off.
struct Stoppable;

impl Stoppable {
    /// `None` if the stop came first.
    async fn until<S, T>(stop: &mut Pin<&mut S>, work: impl Future<Output = T>) -> Option<T>
    where
        S: Future<Output = ()>,
    {
        tokio::select! {
            biased;
            () = stop.as_mut() => None,
            done = work => Some(done),
        }
    }
}

/// Reaches the database once and registers the consumer. Only what a person must correct is an
/// error.
async fn first_connection(database: &Database, options: &Options) -> Result<()> {
    let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let registered = async {
            let client = database.connect().await?;
            parked::register(&client, &options.consumer).await
        };
        match registered.await {
            Ok(()) => return Ok(()),
            Err(error) if matches!(error.kind(), Kind::Config | Kind::Verdict) => {
                return Err(error);
            }
            // The inbox is not installed, or the role may not use it.
            Err(error)
                if error
                    .sqlstate()
                    .is_some_and(|code| code.starts_with("42") || code == "3F000") =>
            {
                return Err(error.context(format!("the inbox of {database}")).hint(
                    "install it with `watership inbox install`, and grant the user the role \
                     watership_consumer",
                ));
            }
            Err(error) => pause(&mut pauses, &options.consumer, "the database", &error).await,
        }
    }
}

async fn pause(pauses: &mut Backoff, consumer: &str, what: &str, error: &Error) {
    let pause = pauses.next(fastrand::f64());
    let (error, tries) = (error.text_with_hint(), pauses.tries());
    tracing::warn!(
        consumer,
        error,
        tries,
        "{what} cannot be reached; the next try is in {pause:?}"
    );
    sleep(pause).await;
}

/// What a finished piece of work brings back.
struct Done {
    lane: String,
    item: InHand,
    client: Client,
    outcome: Attempt,
}

struct Consumer<H> {
    worker: Worker<H>,
    database: Database,
    subscriber: Subscriber,
    lanes: KeyLanes<InHand>,
    /// Connections that are not in use.
    idle: Vec<Client>,
    work: JoinSet<Done>,
    /// KeyLanes that wait for their next attempt.
    delays: JoinSet<String>,
    /// Counts the subscriptions.
    session: u64,
    /// Between subscriptions; begins again with a message that was settled.
    pauses: Backoff,
}

impl<H: Handler> Consumer<H> {
    fn new(worker: Worker<H>, database: Database, broker: Broker) -> Self {
        Self {
            worker,
            database,
            subscriber: Subscriber::new(broker),
            lanes: KeyLanes::default(),
            idle: Vec::new(),
            work: JoinSet::new(),
            delays: JoinSet::new(),
            session: 0,
            pauses: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
        }
    }

    fn name(&self) -> &str {
        &self.worker.options.consumer
    }

    /// Opens connections until there is one for each worker, those at work included.
    async fn open_database(&mut self) {
        let mut pauses = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        self.idle.retain(|client| !client.is_closed());
        while self.idle.len() + self.work.len() < self.worker.options.concurrency {
            match self.database.connect().await {
                Ok(client) => self.idle.push(client),
                Err(error) => pause(&mut pauses, self.name(), "the database", &error).await,
            }
        }
    }

    async fn subscribe(&mut self) -> Subscription {
        loop {
            match self.subscriber.subscribe(&self.worker.options).await {
                Ok(subscription) => return subscription,
                Err(error) => {
                    // After a step without an answer nothing is known of the connection.
                    if error.reply_code().is_none() {
                        self.subscriber.drop_connection();
                    }
                    let consumer = self.worker.options.consumer.clone();
                    pause(&mut self.pauses, &consumer, "the queue", &error).await;
                }
            }
        }
    }

    /// Handles what comes, until the subscription is lost (says why) or the stop.
    async fn consume<S: Future<Output = ()>>(
        &mut self,
        mut subscription: Subscription,
        stop: &mut Pin<&mut S>,
    ) -> (Subscription, Option<Loss>) {
        let Options { consumer, queue, .. } = self.worker.options.clone();
        tracing::info!(consumer, queue, "consuming");
        let activity = Activity::new();
        let mut watch = JoinSet::new();
        let connection = subscription.connection().clone();
        watch.spawn(watchdog::watch(connection, queue, activity.clone()));
        loop {
            let mut delivered = false;
            let lost = tokio::select! {
                biased;
                () = stop.as_mut() => return (subscription, None),
                Some(done) = self.work.join_next() => self.done(done.ok()),
                Some(lane) = self.delays.join_next() => {
                    self.lanes.wake(&lane.unwrap_or_default());
                    None
                }
                Some(cause) = watch.join_next() => Some(cause.unwrap_or(Loss::Watchdog)),
                next = subscription.next() => match next {
                    Ok(delivery) => {
                        delivered = true;
                        let item = InHand::new(delivery, self.session);
                        self.lanes.push(item.lane(), item);
                        None
                    }
                    Err((cause, error)) => {
                        let error = error.map(|error| error.to_string());
                        tracing::warn!(consumer, cause = cause.label(), error, "subscription lost");
                        Some(cause)
                    }
                },
            };
            let lost = lost.or_else(|| self.start_work());
            activity.note(self.lanes.in_hand(), delivered);
            if lost.is_some() {
                return (subscription, lost);
            }
        }
    }

    /// Gives each idle connection a message, as far as there are some.
    fn start_work(&mut self) -> Option<Loss> {
        while let Some(mut client) = self.idle.pop() {
            if client.is_closed() {
                return Some(Loss::Database);
            }
            let Some((lane, mut item)) = self.lanes.take() else {
                self.idle.push(client);
                break;
            };
            let (worker, database) = (self.worker.clone(), self.database.clone());
            self.work.spawn(async move {
                let outcome = worker.attempt(&database, &mut client, &mut item).await;
                Done { lane, item, client, outcome }
            });
        }
        None
    }

    /// Takes back what a worker had; says if the subscription has to be given up.
    fn done(&mut self, done: Option<Done>) -> Option<Loss> {
        // Only a worker that was cut off brings nothing back, and none is while this runs.
        let Done { lane, item, client, outcome } = done?;
        let current = item.session == self.session;
        self.idle.push(client);
        match outcome {
            Attempt::Again(pause) if current => {
                self.lanes.delay(lane.clone(), item);
                self.delays.spawn(async move {
                    sleep(pause).await;
                    lane
                });
                return None;
            }
            Attempt::Settled => self.pauses.reset(),
            Attempt::Again(_) => {}
            Attempt::NotAcknowledged if current => {
                self.lanes.done(&lane);
                return Some(Loss::ChannelClosed);
            }
            Attempt::NotAcknowledged => {}
            Attempt::DatabaseAway(error) => {
                let error = error.text_with_hint();
                tracing::warn!(consumer = self.name(), error, "the database is unreachable");
                self.lanes.done(&lane);
                return Some(Loss::Database);
            }
        }
        self.lanes.done(&lane);
        None
    }

    /// Gives the messages back to the broker.
    async fn lost(&mut self, subscription: Subscription, cause: Loss) {
        self.worker.counters.resubscribed(cause);
        self.delays.abort_all();
        while self.delays.join_next().await.is_some() {}
        self.lanes.clear();
        self.session += 1;
        tracing::info!(consumer = self.name(), cause = cause.label(), "subscribing again");
        let answers = subscription.close().await;
        if cause == Loss::ConnectionLost || !answers {
            self.subscriber.drop_connection();
        }
        sleep(self.pauses.next(fastrand::f64())).await;
    }

    /// Lets handlers end that have begun, then gives the rest back.
    async fn drain(&mut self, subscription: Option<Subscription>) {
        let limit = self.worker.options.stop_timeout;
        let ended = timeout(limit, async { while self.work.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            let running = self.work.len();
            tracing::warn!(consumer = self.name(), running, "handlers are cut off by the stop");
            // Their transactions are rolled back when the connections end.
            self.work.shutdown().await;
        }
        if let Some(subscription) = subscription {
            subscription.close().await;
        }
    }
}
