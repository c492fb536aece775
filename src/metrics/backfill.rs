//! Backfills of captured tables.

use metrics::{Counter, Gauge, counter, gauge};

/// Handles for each captured table, by its name (label `table`).
pub struct BackfillMetrics(Vec<(String, TableBackfill)>);

/// Those of one table.
#[derive(Clone)]
pub struct TableBackfill {
    /// Rows that were read and are settled.
    pub rows: Counter,
    /// Those of them that were not sent.
    pub left_out: Counter,
    /// Chunks that had to be given up and read again.
    pub given_up: Counter,
    /// 1 while a run has begun and not ended.
    pub running: Gauge,
    /// 1 while it waits for something.
    pub waiting: Gauge,
    /// Runs that failed.
    pub failed: Counter,
}

impl BackfillMetrics {
    /// Registers the series of each table, with value 0.
    pub fn new(tables: impl IntoIterator<Item = String>) -> Self {
        let handles = |table: String| {
            let label = || table.clone();
            let handles = TableBackfill {
                rows: counter!("watership_backfill_rows_total", "table" => label()),
                left_out: counter!("watership_backfill_rows_left_out_total", "table" => label()),
                given_up: counter!("watership_backfill_chunks_given_up_total", "table" => label()),
                running: gauge!("watership_backfill_running", "table" => label()),
                waiting: gauge!("watership_backfill_waiting", "table" => label()),
                failed: counter!("watership_backfill_failed_total", "table" => label()),
            };
            let counters = [&handles.rows, &handles.left_out, &handles.given_up, &handles.failed];
            counters.into_iter().for_each(|counter| counter.increment(0));
            handles.running.set(0.0);
            handles.waiting.set(0.0);
            (table, handles)
        };
        Self(tables.into_iter().map(handles).collect())
    }

    /// Those of one table; absent when it is not captured.
    pub fn of(&self, table: &str) -> Option<&TableBackfill> {
        self.0.iter().find(|(name, _)| name == table).map(|(_, handles)| handles)
    }

    /// No session runs: nothing is running or waiting.
    pub fn session_over(&self) {
        for (_, handles) in &self.0 {
            handles.running.set(0.0);
            handles.waiting.set(0.0);
        }
    }
}
