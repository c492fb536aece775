//! Where the columns of the canary are.

use crate::event::Table;
use crate::pg::pgoutput::{Tuple, Value};

/// Indexes of the columns that are looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct CanaryColumns {
    name: usize,
    number: usize,
}

impl CanaryColumns {
    /// Absent when a column is not published.
    pub(super) fn find(table: &Table) -> Option<Self> {
        Some(Self { name: table.column("name")?, number: table.column("number")? })
    }

    /// The number, if it is the canary of the relay `name`.
    pub(super) fn number(self, row: &Tuple<'_>, name: &str) -> Option<u64> {
        let text = |index: usize| match row.columns().nth(index) {
            Some(Value::Text(text)) => std::str::from_utf8(text).ok(),
            Some(Value::Null | Value::Unchanged | Value::Binary(_)) | None => None,
        };
        (text(self.name)? == name).then(|| text(self.number)?.parse().ok())?
    }
}
