//! Fills the outbox: seeded, about 330 bytes of JSON a row, as an application would write it.
//!
//! The loop runs inside the server, so that loading takes no longer than the WAL does.

use clap::ValueEnum;
use serde::Serialize;
use tokio_postgres::Client;
use watership::error::Result;

use crate::servers::sql;

/// How many different keys there are, unless there is one only.
const KEYS: u32 = 1_000;

/// How the keys of the rows are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Keys {
    /// Each of 1,000 keys equally often.
    Uniform,
    /// The k-th of 1,000 keys with a weight of about 1/k.
    Zipf,
    /// One key for all.
    Single,
}

impl Keys {
    /// SQL for the number of a key.
    fn expression(self) -> String {
        match self {
            Self::Uniform => format!("floor(random() * {KEYS})::int"),
            // The inverse of the distribution function of a density of 1/x on 1..1000.
            Self::Zipf => format!("floor(power({KEYS}::float8, random()))::int"),
            Self::Single => "0".to_owned(),
        }
    }
}

/// What a backlog looks like.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    pub events: u64,
    pub rows_per_tx: u64,
    pub keys: Keys,
    pub seed: u32,
    /// Counts the repetitions of the same.
    pub round: u32,
}

impl Shape {
    /// A name for databases, slots and queues.
    pub fn name(&self) -> String {
        format!("bench_{:?}_{}_{}", self.keys, self.rows_per_tx, self.round).to_lowercase()
    }

    fn statement(&self, first: &str, count: &str) -> String {
        let key = self.keys.expression();
        format!(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload)
             SELECT 'order', 'customer-' || {key}, 'placed', format(
                 '{{\"order\":%s,\"status\":\"placed\",\"currency\":\"EUR\",\"total\":\"%s.99\",\
                 \"lines\":[{{\"sku\":\"%s\",\"count\":2}},{{\"sku\":\"%s\",\"count\":1}}],\
                 \"note\":\"%s\"}}',
                 n, n % 1000, md5(n::text), md5((n + 1)::text), repeat('watership ', 15))::json
             FROM generate_series({first}, {first} + {count} - 1) AS n"
        )
    }
}

/// Writes the backlog behind what is there; returns the mean size of a body in bytes.
///
/// Without waiting for the disk: a later reader of the WAL sees the same.
pub async fn fill(client: &Client, shape: &Shape) -> Result<u64> {
    let seed = f64::from(shape.seed) / f64::from(u32::MAX);
    let prepare = format!("SET synchronous_commit = off; SELECT setseed({seed})");
    client.batch_execute(&prepare).await.map_err(sql("preparing the load"))?;
    let before = count(client).await?;
    let statement = shape.statement("i", "step");
    let (events, rows) = (shape.events, shape.rows_per_tx);
    let block = format!(
        "DO $load$
         DECLARE step bigint;
         BEGIN
             FOR i IN 1 .. {events} BY {rows} LOOP
                 step := least({rows}, {events} - i + 1);
                 {statement};
                 COMMIT;
             END LOOP;
         END $load$"
    );
    client.batch_execute(&block).await.map_err(sql("loading"))?;
    // Flushes what asynchronous commits left, and keeps the next checkpoint out of the run.
    client.batch_execute("CHECKPOINT").await.map_err(sql("checkpointing"))?;
    assert_eq!(count(client).await? - before, shape.events, "the load wrote all rows");
    let size = "SELECT avg(octet_length(payload::text))::int8 FROM watership.outbox";
    let row = client.query_one(size, &[]).await.map_err(sql("measuring"))?;
    Ok(u64::try_from(row.get::<_, i64>(0)).unwrap_or(0))
}

async fn count(client: &Client) -> Result<u64> {
    let row = client.query_one("SELECT count(*) FROM watership.outbox", &[]).await;
    let count: i64 = row.map_err(sql("counting"))?.get(0);
    Ok(u64::try_from(count).unwrap_or(0))
}
