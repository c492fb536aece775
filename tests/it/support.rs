//! What every test needs: a database and a vhost of its own on the shared servers.
//!
//! The servers start at the first use and belong to no runtime; they end with the process, by the
//! watchdog of `watership::dev`. Without the programs every test fails, with the hint.

use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::OnceCell;
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions};

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
