//! Captured tables with `on_table_lost = "hold"`.

use metrics::{Gauge, gauge};

/// A handle for each of them, by its name (label `table`).
pub struct TableMetrics(Vec<(String, Gauge)>);

impl TableMetrics {
    /// Registers `watership_table_lost` for each table, with value 0.
    pub fn new(tables: impl IntoIterator<Item = String>) -> Self {
        let handle = |table: String| {
            let lost = gauge!("watership_table_lost", "table" => table.clone());
            lost.set(0.0);
            (table, lost)
        };
        Self(tables.into_iter().map(handle).collect())
    }

    /// 1 for those that are lost, 0 for the others.
    pub fn set(&self, is_lost: impl Fn(&str) -> bool) {
        for (table, lost) in &self.0 {
            lost.set(f64::from(u8::from(is_lost(table))));
        }
    }
}
