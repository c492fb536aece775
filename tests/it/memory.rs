//! Rows of tens and hundreds of megabytes, under the limits that are shipped: they are parked, and
//! the relay takes no more memory than docs/configuration.md says.

use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const MIB: u64 = 1 << 20;
/// What a debug build takes without them.
const BASE: u64 = 48 * MIB;
/// Up to this size a parked row is kept with its large values.
const KEPT: u64 = 64 * MIB;

/// A table whose updates send the old row, too.
const SQL: &str = "CREATE TABLE big (id int PRIMARY KEY, body text, data bytea); \
    ALTER TABLE big REPLICA IDENTITY FULL; \
    ALTER TABLE big ALTER body SET STORAGE EXTERNAL, ALTER data SET STORAGE EXTERNAL";

async fn parked(stage: &Stage, rows: u32) {
    let there = format!("SELECT count(*) = {rows} FROM watership.parked");
    until("the rows are parked", async || stage.holds(&there).await).await;
}

/// Runs `sql`, of which each change is parked, with a relay of its own; returns its peak, in bytes.
async fn peak(stage: &Stage, sql: &str) -> u64 {
    let before: u32 = stage.text("SELECT count(*) FROM watership.parked").await.parse().expect("n");
    let relay = stage.start().await;
    stage.execute(sql).await;
    parked(stage, before + 1).await;
    stage.settled().await;
    let peak = relay.peak_memory_kib() * 1024;
    relay.stop().await.expect_code(0);
    peak
}

/// The formula of docs/configuration.md: the row as Postgres sends it, and what is kept of it while
/// it is written. `kept` is the size of the row's values if they are kept.
fn most(sent: u64, kept: u64) -> u64 {
    BASE + sent + 6 * kept.min(KEPT)
}

async fn stage(binary: bool) -> Stage {
    let settings = if binary { "source.binary = true" } else { "" };
    Stage::new(Setup { sql: SQL, tables: &["public.big"], settings, ..Setup::default() }).await
}

#[tokio::test]
async fn a_huge_row_takes_little_more_memory_than_postgres_sends_of_it() {
    let stage = stage(false).await;
    for (what, sql, sent, kept) in [
        ("text", "INSERT INTO big VALUES (1, repeat('x', 50 << 20))", 50, 50),
        ("old and new", "UPDATE big SET body = body || 'y'", 100, 0),
        (
            "bytea",
            "INSERT INTO big VALUES (3, NULL, decode(repeat('00', 80 << 20), 'hex'))",
            160,
            0,
        ),
    ] {
        let (peak, most) = (peak(&stage, sql).await, most(sent * MIB, kept * MIB));
        assert!(peak <= most, "{what}: {} MiB, at most {}", peak / MIB, most / MIB);
    }
    // Each can be found: its table and key are there, and what was left out says so.
    let rows = "SELECT string_agg(concat_ws(' ', source, key, kind, \
        event::text LIKE '%too large to be kept%'), ', ' ORDER BY mark) FROM watership.parked";
    let expected = "public.big public.big/1 too_large f, public.big public.big/1 too_large t, \
        public.big public.big/3 too_large t";
    assert_eq!(stage.text(rows).await, expected);
}

#[tokio::test]
async fn a_huge_value_in_binary_is_not_made_text_of_when_no_message_can_have_it() {
    let stage = stage(true).await;
    let sql = "INSERT INTO big VALUES (3, NULL, decode(repeat('00', 80 << 20), 'hex'))";
    let (peak, most) = (peak(&stage, sql).await, most(80 * MIB, 0));
    assert!(peak <= most, "{} MiB, at most {}", peak / MIB, most / MIB);
    let row = stage.text("SELECT concat_ws(' ', key, error) FROM watership.parked").await;
    assert!(row.starts_with("public.big/3 ") && row.contains("a bytea of 83886080 bytes"), "{row}");
}
