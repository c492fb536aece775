//! Who judges: what arrived, held against what the outbox table has at the end.

use std::ops::ControlFlow;
use std::time::Duration;

use lapin::message::Delivery;
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Connection};
use uuid::Uuid;
use watership::dev::ledger::Stamp;

use super::relay::QUEUE;
use super::scene::Shared;
use super::servers::client;
use super::writers::checksum;

/// What the judge found; the rest of it would have failed the test.
#[derive(Debug, Clone, Default)]
pub struct Judged {
    pub events: u64,
    pub lost: u64,
    pub violations: u64,
    pub duplicates: u64,
    /// Most duplicates of all faults together that are promised; a figure beside the other.
    pub bound: u64,
    /// Duplicates of the fault that had most, as far as they came before the next fault.
    pub most: u64,
    pub faults: u64,
    pub recoveries: Vec<Duration>,
    /// The test looked at what the relay said.
    pub heard: bool,
}

/// The committed events.
pub async fn truth(database: &str) -> Vec<(Uuid, Stamp)> {
    let client = client(database).await.expect("Postgres is up at the end");
    let sql = "SELECT id, aggregate_id, (payload->>'n')::bigint FROM watership.outbox";
    let rows = client.query(sql, &[]).await.expect("the outbox can be read");
    let mark = |row: &tokio_postgres::Row| Stamp {
        key: row.get(1),
        n: row.get::<_, i64>(2).cast_unsigned(),
    };
    rows.iter().map(|row| (row.get(0), mark(row))).collect()
}

/// This many messages out of order are printed when they come; all are counted.
const TOLD_MOST: u64 = 10;

/// A message arrived; the last one ends the consumer.
pub fn record(shared: &Shared, message: &Delivery) -> ControlFlow<()> {
    let properties = &message.properties;
    if properties.kind().as_ref().is_some_and(|kind| kind.as_str() == LAST) {
        return ControlFlow::Break(());
    }
    let at = shared.start.elapsed();
    let id = properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
    let mut ledger = shared.ledger();
    match id.zip(mark_of(&message.data)) {
        Some((id, mark)) => {
            let before = ledger.counts().violations;
            let (key, n) = (mark.key.clone(), mark.n);
            ledger.arrived(id, mark, at, message.redelivered);
            if ledger.counts().violations > before && before < TOLD_MOST {
                let headers = properties.headers();
                println!("OUT OF ORDER after {at:.3?}: key {key}, n {n}: {headers:?}");
            }
        }
        None => ledger.unreadable(),
    }
    ControlFlow::Continue(())
}

fn mark_of(body: &[u8]) -> Option<Stamp> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    let mark = Stamp { key: value.get("key")?.as_str()?.into(), n: value.get("n")?.as_u64()? };
    match (value.get("sum"), value.get("note")) {
        // A test's own event, in a few bytes.
        (None, None) => Some(mark),
        (sum, note) => {
            let right = checksum(&mark.key, mark.n, note?.as_str()?);
            (sum?.as_u64()? == right).then_some(mark)
        }
    }
}

/// The type of the message behind which nothing comes any more.
const LAST: &str = "last";

pub async fn send_last(broker: &str) {
    let connection = Connection::connect(broker, Default::default()).await.expect("a connection");
    let channel = connection.create_channel().await.expect("a channel");
    let properties = BasicProperties::default().with_type(LAST.into());
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish("".into(), QUEUE.into(), options, b"", properties).await;
    sent.expect("sent").await.expect("not confirmed, but written");
}
