//! What a consumer is started with.

use std::fmt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_postgres::{Client, IsolationLevel, Transaction};

use super::consumer;
use super::database::Database;
use super::handler::HandlerError;
use super::message::Message;
use crate::amqp::options::{Options as Broker, Url};
use crate::error::{Error, Result};
use crate::secret::Secret;
use crate::tls;

/// A future in a box, as handlers return it.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What becomes of a message whose handler has failed too often.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// It is stored in `watership_inbox.parked`, and later messages of its key wait behind it.
    #[default]
    Park,
    /// It is published elsewhere, with headers that say why. The order of its key is given up.
    DeadLetter {
        /// The exchange; empty for the default one.
        exchange: String,
        /// The routing key; with the default exchange the name of a queue.
        routing_key: String,
    },
}

/// A consumer: builds it up, then [`Inbox::run`].
#[derive(Clone)]
pub struct Inbox {
    pub(super) options: Options,
    postgres: Option<Postgres>,
    brokers: Vec<String>,
    tls: tls::Options,
}

#[derive(Clone)]
enum Postgres {
    Url(Secret),
    By(Connect),
}

/// Opens a client of the application's own.
pub(super) type Connect = Arc<dyn Fn() -> Boxed<'static, Result<Client>> + Send + Sync>;

/// The settings as the rest of this module reads them.
#[derive(Debug, Clone)]
pub(super) struct Options {
    pub consumer: String,
    pub queue: String,
    pub concurrency: usize,
    pub prefetch: u16,
    pub ordered: bool,
    pub on_failure: OnFailure,
    pub max_failures: u32,
    pub max_kills: u32,
    pub stop_timeout: Duration,
    pub isolation: Option<IsolationLevel>,
}

impl Inbox {
    /// A consumer of this name: each name handles a message once. Processes that share the work
    /// share the name.
    pub fn new(consumer: impl Into<String>) -> Self {
        let options = Options {
            consumer: consumer.into(),
            queue: String::new(),
            concurrency: 8,
            prefetch: 50,
            ordered: false,
            on_failure: OnFailure::Park,
            max_failures: 5,
            max_kills: 10,
            stop_timeout: Duration::from_secs(30),
            isolation: None,
        };
        Self { options, postgres: None, brokers: Vec::new(), tls: tls::Options::default() }
    }

    /// The queue that is consumed. It is never declared here: who owns it knows its arguments.
    #[must_use]
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.options.queue = queue.into();
        self
    }

    /// The database with the inbox, as `postgres://user:password@host/database`. TLS is verified
    /// unless `sslmode` says otherwise. Its sessions have the settings of server and role.
    #[must_use]
    pub fn postgres(mut self, url: impl Into<String>) -> Self {
        self.postgres = Some(Postgres::Url(Secret::new(url)));
        self
    }

    /// The same by clients that the application opens: `concurrency` of them for handlers and two
    /// for retries and upkeep. A client that has closed is replaced by another call.
    #[must_use]
    pub fn postgres_by<F>(mut self, connect: F) -> Self
    where
        F: Fn() -> Boxed<'static, Result<Client>> + Send + Sync + 'static,
    {
        self.postgres = Some(Postgres::By(Arc::new(connect)));
        self
    }

    /// The broker, as `amqps://user:password@host/vhost`. Called again it adds brokers of one
    /// cluster, which are tried in turn.
    #[must_use]
    pub fn amqp(mut self, url: impl Into<String>) -> Self {
        self.brokers.push(url.into());
        self
    }

    /// PEM file of the roots that the certificate of an `amqps` broker is verified by; without one
    /// the system's.
    #[must_use]
    pub fn amqp_ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.tls.root_cert = Some(file.into());
        self
    }

    /// PEM files of a client certificate for `amqps` and of its key.
    #[must_use]
    pub fn amqp_client_cert(
        mut self,
        certificate: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
    ) -> Self {
        (self.tls.client_cert, self.tls.client_key) = (Some(certificate.into()), Some(key.into()));
        self
    }

    /// Keys that are handled side by side, each on a connection of its own: 1 to 1000, by default
    /// 8.
    #[must_use]
    pub fn concurrency(mut self, keys: usize) -> Self {
        self.options.concurrency = keys;
        self
    }

    /// Messages that the broker hands out before the first is acknowledged: 1 to 10,000, by default
    /// 50. All consumers of an ordered queue need the same.
    #[must_use]
    pub fn prefetch(mut self, messages: u16) -> Self {
        self.options.prefetch = messages;
        self
    }

    /// The queue has `x-single-active-consumer`, and the order of its keys counts: the prefetch is
    /// 1 on brokers before 4.3, whose redelivery can change the order.
    #[must_use]
    pub fn ordered(mut self, ordered: bool) -> Self {
        self.options.ordered = ordered;
        self
    }

    /// What becomes of a message whose handler has failed too often; by default it is parked.
    #[must_use]
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.options.on_failure = on_failure;
        self
    }

    /// Failures of one message until it is given up: at least 1, by default 5.
    #[must_use]
    pub fn max_failures(mut self, failures: u32) -> Self {
        self.options.max_failures = failures;
        self
    }

    /// Attempts at one message that neither failed nor ended, because the process or its connection
    /// to the database did not survive, until it is given up: at least 1, by default 10.
    #[must_use]
    pub fn max_kills(mut self, kills: u32) -> Self {
        self.options.max_kills = kills;
        self
    }

    /// How long handlers may go on after the stop: by default 30 s.
    #[must_use]
    pub fn stop_timeout(mut self, limit: Duration) -> Self {
        self.options.stop_timeout = limit;
        self
    }

    /// Isolation of the handler's transaction; by default the database's. What cannot be serialized
    /// is tried again.
    #[must_use]
    pub fn isolation(mut self, level: IsolationLevel) -> Self {
        self.options.isolation = Some(level);
        self
    }

    /// Consumes until `stop` completes. Handlers that are at work may then end, within the stop
    /// timeout. Whatever is lost meanwhile (subscription, broker, database) is opened again.
    ///
    /// # Errors
    /// Only at the start: [`crate::error::Kind::Config`] for settings that cannot work,
    /// [`crate::error::Kind::Refused`] when the database lacks the inbox or the role its rights.
    pub async fn run<H>(self, handler: H, stop: impl Future<Output = ()> + Send) -> Result<()>
    where
        H: for<'a> Fn(&'a Message, &'a Transaction<'a>) -> Boxed<'a, Result<(), HandlerError>>
            + Send
            + Sync
            + 'static,
    {
        let (database, broker) = (self.database()?, self.broker()?);
        self.check()?;
        consumer::run(self.options, database, broker, Arc::new(handler), stop).await
    }

    fn check(&self) -> Result<()> {
        let Options { consumer, queue, concurrency, prefetch, .. } = &self.options;
        let wrong = |what: String| Err(Error::config(what));
        if !(1..=255).contains(&consumer.len()) || consumer.contains('\0') {
            return wrong(format!("consumer has {} bytes; allowed: 1 to 255", consumer.len()));
        }
        if !(1..=255).contains(&queue.len()) {
            return wrong(format!("queue has {} bytes; allowed: 1 to 255", queue.len()));
        }
        if !(1..=1000).contains(concurrency) {
            return wrong(format!("concurrency is {concurrency}; allowed: 1 to 1000"));
        }
        if !(1..=10_000).contains(prefetch) {
            return wrong(format!("prefetch is {prefetch}; allowed: 1 to 10000"));
        }
        for (name, n) in
            [("max_failures", self.options.max_failures), ("max_kills", self.options.max_kills)]
        {
            if n == 0 {
                return wrong(format!("{name} is 0; allowed: 1 and more"));
            }
        }
        Ok(())
    }

    fn database(&self) -> Result<Database> {
        match &self.postgres {
            None => Err(Error::config("the inbox has no database")
                .hint("name it: Inbox::postgres(\"postgres://...\")")),
            Some(Postgres::Url(url)) => Database::at(url, &self.options.consumer),
            Some(Postgres::By(connect)) => Ok(Database::by(connect.clone())),
        }
    }

    fn broker(&self) -> Result<Broker> {
        let urls = self.brokers.iter().map(|url| Url::parse(url)).collect::<Result<Vec<_>>>()?;
        if urls.is_empty() {
            return Err(Error::config("the inbox has no broker")
                .hint("name it: Inbox::amqp(\"amqps://...\")"));
        }
        let name = format!("watership inbox {}", self.options.consumer);
        let mut broker = Broker { connection_name: name, ..Broker::new(urls) };
        broker.tls = self.tls.clone();
        broker.urls.iter().try_for_each(|url| broker.tls_for(url).map(drop))?;
        Ok(broker)
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").field("options", &self.options).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    async fn refusal(inbox: Inbox) -> String {
        let run = inbox.run(|_, _| Box::pin(async { Ok(()) }), std::future::ready(()));
        let error = run.await.unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        format!("{error:?}")
    }

    #[tokio::test]
    async fn settings_that_cannot_work_are_named_with_what_is_allowed() {
        let whole = || {
            let inbox = Inbox::new("c").queue("q").postgres("postgres://c:hunter2@h/d");
            inbox.amqp("amqp://c:hunter2@h/v")
        };
        for (inbox, text) in [
            (Inbox::new("c"), "the inbox has no database"),
            (Inbox::new("c").postgres("postgres://u@h/d"), "the inbox has no broker"),
            (whole().postgres("mysql://u:hunter2@h"), "not a Postgres URL"),
            (whole().amqp("http://u:hunter2@h"), "use amqp or amqps"),
            (whole().queue(""), "queue has 0 bytes; allowed: 1 to 255"),
            (whole().concurrency(0), "concurrency is 0; allowed: 1 to 1000"),
            (whole().prefetch(0), "prefetch is 0; allowed: 1 to 10000"),
            (whole().max_kills(0), "max_kills is 0; allowed: 1 and more"),
            (whole().max_failures(0), "max_failures is 0; allowed: 1 and more"),
        ] {
            let said = refusal(inbox).await;
            assert!(said.contains(text), "{said}");
            assert!(!said.contains("hunter2"), "{said}");
        }
        assert!(!format!("{:?}", whole()).contains("hunter2"));
    }
}
