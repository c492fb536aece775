//! Where the faults happen: private servers, and users and vhosts of a test's own.

use std::time::Duration;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection};
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use tokio::time::{Instant, timeout};
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal};

use crate::crash_relay::{LIMIT, POLL, Window};
use crate::crash_support::{Place, Scene, client};

/// A steady load without an end; `Scene::enough` ends it.
pub const STEADY: crate::crash_support::Load =
    crate::crash_support::Load { events: 4_000_000, rate: 800, rows: 5 };

/// A server of one test's own, with the database `shop`.
pub async fn own_postgres(conf: &[&str]) -> Postgres {
    let conf = conf.iter().map(|line| (*line).to_owned()).collect();
    let options = PostgresOptions { conf, ..Default::default() };
    let server = Postgres::start(options).await.expect("a private server");
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

/// A run in which the relay goes by the same ways as everybody.
pub async fn plain(title: &str, database: &str, broker: &str, settings: &str) -> Scene {
    led(title, (database, database), (broker, broker), settings).await
}

/// A run in which the relay is led to its servers by the second URL of each pair.
pub async fn led(
    title: &str,
    (database, relay_database): (&str, &str),
    (broker, relay_broker): (&str, &str),
    settings: &str,
) -> Scene {
    let window = Window::default();
    Scene::at(Place { title, database, broker, relay_database, relay_broker, window, settings })
        .await
}

/// When a raw publisher gets its first confirm from a quorum queue of the default exchange.
pub async fn first_confirm(url: String) -> Instant {
    let deadline = Instant::now() + LIMIT;
    loop {
        let last = timeout(Duration::from_secs(5), confirm(&url)).await;
        if matches!(last, Ok(Ok(()))) {
            return Instant::now();
        }
        let late = "the broker confirms nothing within";
        assert!(Instant::now() < deadline, "{late} {LIMIT:?}, at last {last:?}");
        tokio::time::sleep(POLL).await;
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
    let deadline = Instant::now() + LIMIT;
    loop {
        let ask = async {
            let client = client(&url).await.ok()?;
            client.query_one("SELECT count(*) FROM watership.outbox", &[]).await.ok()
        };
        if timeout(Duration::from_secs(5), ask).await.is_ok_and(|row| row.is_some()) {
            return Instant::now();
        }
        assert!(Instant::now() < deadline, "Postgres answers nothing within {LIMIT:?}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits for the relay's first confirm, and notes how long after `raw` that came. `raw` is when
/// the server served somebody else.
pub async fn recovered_after(
    scene: &mut Scene,
    raw: impl Future<Output = Instant> + Send + 'static,
    confirmed_before: u64,
) -> Duration {
    let raw = tokio::spawn(raw);
    scene.relay().confirms(confirmed_before + 1).await;
    let relay = Instant::now();
    let raw = raw.await.expect("the server serves");
    let took = relay.saturating_duration_since(raw);
    scene.recovered_in(took);
    took
}

/// Looks again and again for so long, and fails when `holds` does not hold.
pub async fn throughout(time: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        assert!(holds().await, "{what}");
        tokio::time::sleep(POLL).await;
    }
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
