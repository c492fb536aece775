//! A queue, a database with the inbox, and consumers between them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use watership::error::Result;
use watership::inbox::{HandlerError, Inbox, Message, Transaction};
use watership::metrics::Exporter;
use watership::pg::migrate::INBOX;

use crate::support::servers::{self, Database, own_database, own_vhost};
use crate::support::waiting::until;

/// What a handler does when nothing goes wrong.
pub async fn record(message: &Message, tx: &Transaction<'_>) -> Result<(), HandlerError> {
    let body = String::from_utf8_lossy(&message.body);
    let insert = "INSERT INTO effect (message_id, key, body) VALUES ($1, $2, $3)";
    tx.execute(insert, &[&message.id, &message.key, &body]).await?;
    Ok(())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// What this process counts.
pub fn exporter() -> &'static Exporter {
    static EXPORTER: OnceLock<Exporter> = OnceLock::new();
    EXPORTER.get_or_init(|| watership::metrics::install().expect("the one recorder"))
}

/// The fields of every span `handle` of this process.
pub fn spans() -> &'static Mutex<Vec<String>> {
    static SPANS: Mutex<Vec<String>> = Mutex::new(Vec::new());
    static SUBSCRIBED: Once = Once::new();
    SUBSCRIBED.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(Spans);
        tracing::subscriber::set_global_default(subscriber).expect("the one subscriber");
    });
    &SPANS
}

struct Spans;

impl<S: Subscriber> Layer<S> for Spans {
    fn on_new_span(&self, span: &Attributes<'_>, _: &Id, _: Context<'_, S>) {
        if span.metadata().name() == "handle" {
            let mut fields = Fields(String::new());
            span.record(&mut fields);
            spans().lock().expect("nobody panics with it").push(fields.0);
        }
    }
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!("{}={value:?} ", field.name()));
    }
}

pub struct Stage {
    pub database: Database,
    /// A session of the superuser.
    pub sql: Client,
    /// The database's URL for the consumer's own user.
    pub postgres: String,
    pub amqp: String,
    pub channel: Channel,
    pub queue: String,
    pub consumer: String,
    connection: Connection,
}

impl Stage {
    /// On the shared servers, with a quorum queue.
    pub async fn new() -> Self {
        let database = own_database().await;
        let vhost = own_vhost().await;
        Self::on(database, &vhost.url).await
    }

    pub async fn on(database: Database, amqp: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        exporter();
        spans();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut sql = database.connect().await;
        INBOX.apply(&mut sql).await.expect("the inbox");
        let user = format!("user_{}_{number}", database.name);
        sql.batch_execute(&format!(
            "CREATE ROLE {user} LOGIN IN ROLE watership_consumer;
             CREATE TABLE effect (n bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
                 message_id text, key text, body text, at timestamptz DEFAULT clock_timestamp());
             GRANT ALL ON effect TO {user}"
        ))
        .await
        .expect("a user of the consumer's own");
        let postgres = database.url.replacen("postgres@", &format!("{user}@"), 1);
        assert_ne!(postgres, database.url, "the URL has another user");
        let connection = Connection::connect(amqp, Default::default()).await.expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let stage = Self {
            queue: format!("queue_{number}"),
            consumer: format!("consumer_{number}"),
            amqp: amqp.to_owned(),
            database,
            sql,
            postgres,
            channel,
            connection,
        };
        stage.declare(&[]).await;
        stage
    }

    /// The same with another connection, which a broker that was away needs.
    pub async fn again(&mut self) {
        let mut opened = None;
        until("the queue is back", async || {
            opened = self.reopened().await.ok();
            opened.is_some()
        })
        .await;
        (self.connection, self.channel) = opened.expect("a channel");
    }

    async fn reopened(&self) -> lapin::Result<(Connection, Channel)> {
        let connection = Connection::connect(&self.amqp, Default::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = self.queue.as_str().into();
        channel.queue_declare(queue, options, FieldTable::default()).await?;
        Ok((connection, channel))
    }

    /// Declares the queue, with more arguments.
    pub async fn declare(&self, more: &[(&str, AMQPValue)]) {
        self.declare_queue(&self.queue, more).await;
    }

    pub async fn declare_queue(&self, queue: &str, more: &[(&str, AMQPValue)]) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(10_000));
        for (name, value) in more {
            arguments.insert((*name).into(), value.clone());
        }
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        self.channel.queue_declare(queue.into(), options, arguments).await.expect("the queue");
    }

    pub async fn delete(&self) {
        self.channel
            .queue_delete(self.queue.as_str().into(), Default::default())
            .await
            .expect("gone");
    }

    /// A consumer between the two, yet to be run.
    pub fn inbox(&self) -> Inbox {
        let inbox = Inbox::new(&self.consumer).queue(&self.queue);
        inbox.postgres(&self.postgres).amqp(&self.amqp)
    }

    /// Runs a consumer that records.
    pub fn start(&self) -> Running {
        run(self.inbox(), |message, tx| Box::pin(record(message, tx)))
    }

    /// Publishes a message of now.
    pub async fn publish(&self, id: &str, key: &str, body: &str) {
        self.publish_at(id, Some(now()), key, body).await;
    }

    /// An empty key or id: none.
    pub async fn publish_at(&self, id: &str, at: Option<u64>, key: &str, body: &str) {
        let mut properties = BasicProperties::default().with_delivery_mode(2);
        let mut headers = FieldTable::default();
        if !key.is_empty() {
            headers.insert("ws-key".into(), AMQPValue::LongString(key.into()));
        }
        if !id.is_empty() {
            properties = properties.with_message_id(id.into());
        }
        if let Some(at) = at {
            properties = properties.with_timestamp(at);
        }
        self.publish_with(properties.with_headers(headers), body).await;
    }

    pub async fn publish_with(&self, properties: BasicProperties, body: &str) {
        assert!(self.try_publish(properties, body).await, "it reached the queue");
    }

    /// False where the broker does not take it.
    pub async fn try_publish(&self, properties: BasicProperties, body: &str) -> bool {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let queue = self.queue.as_str().into();
        let publish =
            self.channel.basic_publish("".into(), queue, options, body.as_bytes(), properties);
        let confirmed = publish.await.expect("published").await.expect("confirmed");
        confirmed == Confirmation::Ack(None)
    }

    /// Publishes `m1` to `m<count>` under `keys` keys, with their numbers as bodies.
    pub async fn publish_many(&self, count: u32, keys: u32) {
        for n in 1..=count {
            self.publish(&format!("m{n}"), &format!("k{}", n % keys), &n.to_string()).await;
        }
    }

    /// The bodies of the effects of a key (of all with `%`), in their order.
    pub async fn effects(&self, key: &str) -> Vec<String> {
        let sql = "SELECT body FROM effect WHERE coalesce(key, '') LIKE $1 ORDER BY n";
        let rows = self.sql.query(sql, &[&key]).await.expect("the effects");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Waits until there are `count` effects, and nothing is left in the queue or in work.
    pub async fn effects_come(&self, count: usize) -> Vec<String> {
        let what = format!("{count} effects");
        until(&what, async || self.effects("%").await.len() >= count).await;
        let effects = self.effects("%").await;
        assert_eq!(effects.len(), count, "{effects:?}");
        effects
    }

    /// One value as text, by the superuser.
    pub async fn text(&self, sql: &str) -> String {
        servers::text(&self.database.url, sql).await
    }

    /// Messages that wait in the queue.
    pub async fn waiting(&self) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let channel = self.connection.create_channel().await.expect("a channel");
        let name = self.queue.as_str().into();
        let seen = channel.queue_declare(name, options, FieldTable::default()).await;
        let count = seen.expect("the queue").message_count();
        channel.close(200, "seen".into()).await.expect("closed");
        count
    }

    /// Parked messages of a key, in their order, with their reasons.
    pub async fn parked(&self) -> Vec<String> {
        let sql = "SELECT message_id || ' ' || reason FROM watership_inbox.parked_messages \
                   WHERE consumer = $1 ORDER BY id";
        let rows = self.sql.query(sql, &[&self.consumer]).await.expect("the parked");
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// The first message of a queue, which is taken out of it.
    pub async fn get(&self, queue: &str) -> lapin::message::BasicGetMessage {
        let mut message = None;
        until("a message is there", async || {
            let options = BasicGetOptions { no_ack: true };
            message = self.channel.basic_get(queue.into(), options).await.expect("an answer");
            message.is_some()
        })
        .await;
        message.expect("a message")
    }

    /// What a counter of this stage's consumer says; 0 without one.
    pub fn counted(&self, name: &str, label: &str) -> u64 {
        let page = exporter().render();
        let consumer = format!("consumer=\"{}\"", self.consumer);
        let mine = page.lines().filter(|line| {
            line.starts_with(&format!("watership_inbox_{name}{{"))
                && line.contains(&consumer)
                && line.contains(label)
        });
        mine.filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok()).sum()
    }
}

/// A consumer that runs.
pub struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
}

impl Running {
    /// Stops it, and waits until it has ended.
    pub async fn stop(self) {
        drop(self.stop);
        let ended = crate::support::waiting::within("the consumer ends", self.task).await;
        ended.expect("no panic").expect("no error");
    }

    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }
}

/// Runs a consumer.
pub fn run<H>(inbox: Inbox, handler: H) -> Running
where
    H: for<'a> Fn(&'a Message, &'a Transaction<'a>) -> Handled<'a> + Send + Sync + 'static,
{
    let (stop, stopped) = oneshot::channel::<()>();
    let stopped = async move {
        let _ = stopped.await;
    };
    Running { stop, task: tokio::spawn(inbox.run(handler, stopped)) }
}

pub type Handled<'a> =
    std::pin::Pin<Box<dyn Future<Output = Result<(), HandlerError>> + Send + 'a>>;

/// A handler that fails while a test says so, and records otherwise.
#[derive(Clone, Default)]
pub struct Failing(Arc<Mutex<Vec<(String, &'static str)>>>);

impl Failing {
    /// Messages with this body fail from now on: `error`, `permanent`, `panic`, `aborted`,
    /// `ended`, `restarted` or `serialization`.
    pub fn fail(&self, body: &str, how: &'static str) {
        self.0.lock().expect("nobody panics with it").push((body.to_owned(), how));
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        self.0.lock().expect("nobody panics with it").clear();
    }

    fn of(&self, message: &Message) -> Option<&'static str> {
        let list = self.0.lock().expect("nobody panics with it");
        list.iter().find(|(body, _)| body.as_bytes() == message.body).map(|(_, how)| *how)
    }

    pub async fn handle(
        &self,
        message: &Message,
        tx: &Transaction<'_>,
    ) -> Result<(), HandlerError> {
        record(message, tx).await?;
        match self.of(message) {
            None => Ok(()),
            Some("permanent") => Err(HandlerError::permanent("it can never be handled")),
            Some("panic") => panic!("the handler's own panic"),
            Some("aborted") => {
                // An error of Postgres that is swallowed leaves the transaction aborted.
                let _ = tx.batch_execute("SELECT 1 / 0").await;
                Ok(())
            }
            Some("ended") => {
                tx.batch_execute("ROLLBACK").await?;
                Ok(())
            }
            Some("restarted") => {
                tx.batch_execute("ROLLBACK; BEGIN").await?;
                Ok(())
            }
            Some("serialization") => {
                tx.batch_execute("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$").await?;
                Ok(())
            }
            Some(_) => Err("the handler's own error".into()),
        }
    }

    /// Runs a consumer with this handler.
    pub fn run(&self, inbox: Inbox) -> Running {
        let failing = self.clone();
        run(inbox, move |message, tx| {
            let failing = failing.clone();
            Box::pin(async move { failing.handle(message, tx).await })
        })
    }
}

/// A handler that says when it has begun, and continues when it may.
#[derive(Clone)]
pub struct Gate {
    pub begun: Arc<Semaphore>,
    pub go: Arc<Semaphore>,
}

impl Gate {
    pub fn new() -> Self {
        Self { begun: Arc::new(Semaphore::new(0)), go: Arc::new(Semaphore::new(0)) }
    }

    /// Runs a consumer with it.
    pub fn run(&self, inbox: Inbox) -> Running {
        let gate = self.clone();
        run(inbox, move |message, tx| {
            let gate = gate.clone();
            Box::pin(async move {
                gate.begun.add_permits(1);
                gate.go.acquire().await?.forget();
                record(message, tx).await
            })
        })
    }
}
