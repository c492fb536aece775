//! The servers: shared ones, on which each test has a database and a vhost of its own, and private
//! ones for tests that stop, kill or specially configure them.
//!
//! The shared servers start at the first use and belong to no runtime; they end with the process,
//! by the watchdog of `watership::dev`. Without the programs every test fails, with the hint.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection};
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use tokio::time::{Instant, timeout};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal};

use super::waiting::Patience;

/// The Postgres that all tests share.
pub async fn postgres() -> &'static Postgres {
    static SHARED: OnceCell<Postgres> = OnceCell::const_new();
    let start = || Postgres::start(PostgresOptions::default());
    SHARED.get_or_try_init(start).await.unwrap_or_else(|e| panic!("{e:?}"))
}

/// The RabbitMQ, with management, that all tests share.
pub async fn rabbit() -> &'static Rabbit {
    static SHARED: OnceCell<Rabbit> = OnceCell::const_new();
    let start = || Rabbit::start(RabbitOptions { management: true, ..Default::default() });
    SHARED.get_or_try_init(start).await.unwrap_or_else(|e| panic!("{e:?}"))
}

/// A database that one test has for itself. Slots belong to a database, so they are its own too.
#[derive(Debug)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// Its URL for the superuser `postgres`.
    pub url: String,
}

/// A new, empty database on the shared server.
pub async fn own_database() -> Database {
    let server = postgres().await;
    let name = unique("db");
    server.create_database(&name).await.expect("a new database");
    Database { url: server.url("postgres", &name), name }
}

impl Database {
    /// An ordinary SQL connection as the superuser.
    pub async fn connect(&self) -> tokio_postgres::Client {
        let connected = tokio_postgres::connect(&self.url, tokio_postgres::NoTls).await;
        let (client, connection) = connected.expect("a connection to the own database");
        tokio::spawn(connection);
        client
    }
}

/// A vhost that one test has for itself.
#[derive(Debug)]
pub struct Vhost {
    /// Its name.
    pub name: String,
    /// Its URL for the user `guest`.
    pub url: String,
}

/// A new, empty vhost on the shared node.
pub async fn own_vhost() -> Vhost {
    let node = rabbit().await;
    let name = unique("vhost");
    node.create_vhost(&name).await.expect("a new vhost");
    Vhost { url: node.url(&name), name }
}

impl Vhost {
    /// A lapin connection as `guest`, with an open channel; keep both.
    pub async fn connect(&self) -> (lapin::Connection, lapin::Channel) {
        let connected = lapin::Connection::connect(&self.url, Default::default()).await;
        let connection = connected.expect("a connection to the own vhost");
        let channel = connection.create_channel().await.expect("a channel");
        (connection, channel)
    }
}

fn unique(kind: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("{kind}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The database `postgres` of a private server.
pub fn database_of(server: &Postgres) -> Database {
    Database { url: server.url("postgres", "postgres"), name: "postgres".into() }
}

/// A server of one test's own, with these lines of `postgresql.conf` and of `pg_hba.conf`.
pub async fn private_postgres(conf: &[&str], hba: Option<Vec<String>>) -> Postgres {
    let conf = conf.iter().map(|line| (*line).to_owned()).collect();
    let options = PostgresOptions { conf, hba, ..Default::default() };
    Postgres::start(options).await.expect("a private server")
}

/// A server of one test's own, with the database `shop`.
pub async fn own_postgres(conf: &[&str]) -> Postgres {
    let server = private_postgres(conf, None).await;
    server.create_database("shop").await.expect("a database");
    server
}

/// A node that one test at a time has for itself, with everything as at the beginning.
pub async fn own_node() -> MutexGuard<'static, Rabbit> {
    static NODE: OnceCell<Mutex<Rabbit>> = OnceCell::const_new();
    let start = async || {
        let options = RabbitOptions { management: true, ..Default::default() };
        Rabbit::start(options).await.map(Mutex::new)
    };
    let node = NODE.get_or_try_init(start).await.unwrap_or_else(|e| panic!("{e:?}"));
    let mut node = node.lock().await;
    // The test before may have failed in the middle of its fault.
    node.signal(Signal::Cont);
    if node.pid().is_none() {
        node.start_again().await.expect("the node starts again");
    }
    node
}

/// A new vhost on a node; returns its URL.
pub async fn vhost_on(node: &Rabbit) -> String {
    let name = format!("v{}", fastrand::u64(..));
    node.create_vhost(&name).await.expect("a new vhost");
    node.url(&name)
}

/// One try of a client that asks again: a server that was just frozen may never answer.
const TRY: Duration = Duration::from_secs(5);

/// When a raw publisher gets its first confirm from a quorum queue of the default exchange.
pub async fn first_confirm(url: String) -> Instant {
    let mut patience = Patience::new();
    loop {
        let last = timeout(TRY, confirm(&url)).await;
        if matches!(last, Ok(Ok(()))) {
            return Instant::now();
        }
        patience.more((), || format!("the broker confirms, and not {last:?}")).await;
    }
}

async fn confirm(url: &str) -> Result<(), lapin::Error> {
    let connection = Connection::connect(url, Default::default()).await?;
    let channel = connection.create_channel().await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), lapin::types::AMQPValue::LongString("quorum".into()));
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare("raw".into(), options, arguments).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicPublishOptions::default();
    let none = BasicProperties::default();
    channel.basic_publish("".into(), "raw".into(), options, b"x", none).await?.await?;
    Ok(())
}

/// When an ordinary client gets its first row.
pub async fn first_row(url: String) -> Instant {
    let mut patience = Patience::new();
    loop {
        let ask = async {
            let client = client(&url).await.ok()?;
            client.query_one("SELECT count(*) FROM watership.outbox", &[]).await.ok()
        };
        if timeout(TRY, ask).await.is_ok_and(|row| row.is_some()) {
            return Instant::now();
        }
        patience.more((), || "Postgres answers".into()).await;
    }
}

/// An ordinary SQL connection.
pub async fn client(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Runs SQL as the superuser.
pub async fn execute(url: &str, sql: &str) {
    let client = client(url).await.expect("a connection");
    client.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
}

/// One value as text.
pub async fn text(url: &str, sql: &str) -> String {
    let client = client(url).await.expect("a connection");
    let row = client.query_one(&format!("SELECT ({sql})::text"), &[]).await;
    row.unwrap_or_else(|e| panic!("{sql}: {e:?}")).get(0)
}
