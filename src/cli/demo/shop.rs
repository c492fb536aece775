//! The demo's application: a small shop whose order events go through `watership.emit`.
//!
//! Each writer owns its orders, so the numbers that it gives to the events of one order are their
//! commit order. Every tenth transaction or so is rolled back; its numbers are used again, so that
//! an event which leaked from it would be noticed twice: by its id and by its number.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::Run;
use crate::dev::ledger::Stamp;
use crate::error::{Error, Result};

/// Writers, each on its own connection.
pub(super) const WRITERS: u64 = 8;
/// Orders of one writer. Together they are the keys.
const ORDERS: u64 = 25;
/// Most events in one transaction.
const MOST_EVENTS: u64 = 5;
/// One transaction in this many is rolled back.
const ROLLBACK_EVERY: u64 = 10;

/// The shop's own table; the events go to the outbox in the same transaction.
pub(super) const TABLE: &str = "CREATE TABLE orders (\
     id text PRIMARY KEY, status text NOT NULL, changes bigint NOT NULL, \
     changed_at timestamptz NOT NULL DEFAULT now()); \
     GRANT SELECT, INSERT, UPDATE ON orders TO shop";

const UPSERT: &str = "INSERT INTO orders (id, status, changes) VALUES ($1, $2, $3) \
     ON CONFLICT (id) DO UPDATE SET status = $2, changes = $3, changed_at = now()";
// The casts tell Postgres which overload is meant; a driver sends parameters without types.
const EMIT: &str = "SELECT watership.emit('order'::text, $1::text, $2::text, $3::text)";

const STATUS: [&str; 4] = ["placed", "paid", "packed", "shipped"];

/// How the writers' transactions ended.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Transactions {
    pub(super) committed: u64,
    pub(super) rolled_back: u64,
}

/// Commits `events` events at `rate` events a second and records them in the ledger.
///
/// # Errors
/// When Postgres cannot be reached or refuses; the demo never takes it away.
pub(super) async fn write(
    run: &Run,
    url: &str,
    writer: u64,
    events: u64,
    rate: f64,
) -> Result<Transactions> {
    let failed = |e| Error::unreachable(format!("writer {writer} of the shop")).caused_by(e);
    let connected = tokio_postgres::connect(url, tokio_postgres::NoTls).await;
    let (mut client, connection) = connected.map_err(failed)?;
    let connection = tokio::spawn(connection);
    let upsert = client.prepare(UPSERT).await.map_err(failed)?;
    let emit = client.prepare(EMIT).await.map_err(failed)?;
    let mut done = Transactions::default();
    let mut numbers: HashMap<String, u64> = HashMap::new();
    let mut dice = Dice::new(writer);
    let (start, mut written, mut attempted) = (Instant::now(), 0, 0);
    while written < events {
        tokio::time::sleep_until(start + Duration::from_secs_f64(attempted as f64 / rate)).await;
        let size = (1 + dice.below(MOST_EVENTS)).min(events - written);
        attempted += size;
        let mut marks: Vec<(Uuid, Stamp)> = Vec::new();
        let transaction = client.transaction().await.map_err(failed)?;
        for _ in 0..size {
            let key = format!("order-{writer}-{}", dice.below(ORDERS));
            let pending = marks.iter().filter(|(_, mark)| mark.key == key).count() as u64;
            let n = numbers.get(&key).copied().unwrap_or_default() + pending + 1;
            let status = STATUS[(n % 4) as usize];
            let body = payload(&key, n, status, dice.next());
            let number = n.cast_signed();
            let row: [&(dyn ToSql + Sync); 3] = [&key, &status, &number];
            transaction.execute(&upsert, &row).await.map_err(failed)?;
            let event: [&(dyn ToSql + Sync); 3] = [&key, &status, &body];
            let id: Uuid = transaction.query_one(&emit, &event).await.map_err(failed)?.get(0);
            marks.push((id, Stamp { key, n }));
        }
        if dice.below(ROLLBACK_EVERY) == 0 {
            transaction.rollback().await.map_err(failed)?;
            done.rolled_back += 1;
            continue;
        }
        transaction.commit().await.map_err(failed)?;
        done.committed += 1;
        written += size;
        let at = run.elapsed();
        let mut ledger = run.ledger();
        for (id, mark) in marks {
            numbers.insert(mark.key.clone(), mark.n);
            ledger.committed(id, mark, at);
        }
    }
    drop(client);
    // Ends with the client; its errors were the statements' errors.
    let _ = connection.await;
    Ok(done)
}

/// About 330 bytes, as a real order event would have.
fn payload(key: &str, n: u64, status: &str, salt: u64) -> String {
    format!(
        "{{\"order\":\"{key}\",\"n\":{n},\"status\":\"{status}\",\"customer\":\"c-{:05}\",\
         \"total\":\"{}.{:02}\",\"currency\":\"EUR\",\"note\":\"{}\"}}",
        salt % 100_000,
        salt % 900 + 10,
        salt % 100,
        "Please leave it with the neighbours if nobody opens. ".repeat(4)
    )
}

/// Reads key and number back from a message body.
pub(super) fn mark_of(body: &[u8]) -> Option<Stamp> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(Stamp { key: value.get("order")?.as_str()?.into(), n: value.get("n")?.as_u64()? })
}

/// A small generator of numbers (xorshift64*): the demo needs variety, not secrecy, and runs
/// should be alike.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(0x9E37_79B9_7F4A_7C15 ^ (seed + 1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_tells_its_key_and_number() {
        let body = payload("order-3-7", 42, "paid", 123_456);
        assert_eq!(mark_of(body.as_bytes()), Some(Stamp { key: "order-3-7".into(), n: 42 }));
        assert!((250..400).contains(&body.len()), "{} bytes", body.len());
        assert_eq!(mark_of(b"{}"), None);
        assert_eq!(mark_of(b"order"), None);
    }

    #[test]
    fn dice_fall_on_every_side() {
        let mut dice = Dice::new(1);
        let mut seen = [0; 10];
        (0..1000).for_each(|_| seen[dice.below(10) as usize] += 1);
        assert!(seen.iter().all(|&times| times > 50), "{seen:?}");
    }
}
