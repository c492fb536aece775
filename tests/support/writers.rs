//! Who writes: several connections, each with keys of its own, and transactions that roll back.

use std::hash::{Hash as _, Hasher as _};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::scene::Shared;
use super::servers::client;
use super::waiting::{LIMIT, POLL};

/// Writers, each on its own connection.
pub const WRITERS: u32 = 4;
/// Keys of one writer.
const KEYS: u32 = 50;
/// One transaction in this many is rolled back.
const ROLLBACK_EVERY: u32 = 16;

/// What a writer may be behind and catch up: timers are a millisecond or two late.
const LATE: Duration = Duration::from_millis(20);

/// What the writers do.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Events of all writers together, rolled back ones included.
    pub events: u32,
    /// Events a second of all writers together, and never more: who was held up does not hurry
    /// afterwards. 0 means as fast as they can.
    pub rate: u32,
    /// Most rows in one transaction; the least is 1.
    pub rows: u32,
}

/// A steady load without an end; `Scene::enough` ends it.
pub const STEADY: Load = Load { events: 4_000_000, rate: 800, rows: 5 };

/// A writer: it continues through every fault of the server, and gives up after [`LIMIT`] of them.
pub async fn write(shared: &Shared, url: &str, writer: u32, load: Load, mut dice: fastrand::Rng) {
    let mut numbers = [0_u64; KEYS as usize];
    let (mut due, mut written) = (Instant::now(), 0);
    let mut deadline = due + LIMIT;
    let wanted = |written| written < load.events && !shared.enough.load(Ordering::Relaxed);
    while wanted(written) {
        assert!(Instant::now() < deadline, "writer {writer}: Postgres stays away");
        let Ok(client) = client(url).await else {
            tokio::time::sleep(POLL).await;
            continue;
        };
        // The casts say which overload is meant.
        let emit = "SELECT watership.emit('order'::text, k, 'changed'::text, p) \
                    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS u(k, p, i) ORDER BY i";
        let Ok(emit) = client.prepare(emit).await else { continue };
        while wanted(written) {
            let rows = dice.u32(1..=load.rows);
            if load.rate > 0 {
                tokio::time::sleep_until(due).await;
                due = due.max(Instant::now() - LATE) + Duration::from_secs(1) * rows / load.rate;
            }
            let (keys, bodies) = batch(writer, rows, &mut numbers, &mut dice);
            written += rows;
            let roll_back = dice.u32(0..ROLLBACK_EVERY) == 0;
            let done = async {
                if roll_back {
                    client.batch_execute("BEGIN").await?;
                }
                client.query(&emit, &[&keys, &bodies]).await?;
                if roll_back {
                    client.batch_execute("ROLLBACK").await?;
                }
                Ok::<_, tokio_postgres::Error>(())
            };
            // Whether it committed is what the table says at the end.
            if done.await.is_err() {
                break;
            }
            deadline = Instant::now() + LIMIT;
            if !roll_back {
                shared.committed.fetch_add(rows.into(), Ordering::Relaxed);
            }
        }
    }
}

/// Keys and bodies of one transaction.
fn batch(
    writer: u32,
    rows: u32,
    numbers: &mut [u64],
    dice: &mut fastrand::Rng,
) -> (Vec<String>, Vec<String>) {
    let event = |_| {
        let key = dice.usize(0..numbers.len());
        numbers[key] += 1;
        let (name, n) = (format!("{writer}-{key}"), numbers[key]);
        let note = "Please leave it with the neighbours if nobody opens. ".repeat(5);
        let sum = checksum(&name, n, &note);
        let body = format!("{{\"key\":\"{name}\",\"n\":{n},\"sum\":{sum},\"note\":\"{note}\"}}");
        (name, body)
    };
    (0..rows).map(event).unzip()
}

/// Of all that a body says; a body that was changed on its way counts as altered.
pub fn checksum(key: &str, n: u64, note: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    (key, n, note).hash(&mut hasher);
    // JSON numbers are exact up to here everywhere.
    hasher.finish() >> 11
}
