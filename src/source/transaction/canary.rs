//! Where the columns of the canary are.

use crate::event::Table;
use crate::pg::pgoutput::{Tuple, TupleValue};

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
        // The binary form of a text is the same bytes.
        let (TupleValue::Text(found) | TupleValue::Binary(found)) = row.columns().nth(self.name)?
        else {
            return None;
        };
        if found != name.as_bytes() {
            return None;
        }
        match row.columns().nth(self.number)? {
            TupleValue::Text(text) => std::str::from_utf8(text).ok()?.parse().ok(),
            TupleValue::Binary(bytes) => {
                u64::try_from(i64::from_be_bytes(bytes.try_into().ok()?)).ok()
            }
            TupleValue::Null | TupleValue::Unchanged => None,
        }
    }
}
