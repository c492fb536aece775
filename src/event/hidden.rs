//! Which values of a row were replaced before it was stored. Pure.
//!
//! Invariant: what was hidden once stays hidden. A stored row says how each value was hidden, so
//! that a later, weaker rule does not take what stands in its place for the value itself.

use serde::{Deserialize, Serialize};

/// How a value is hidden; the later ones hide more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hide {
    /// A keyed hash stands in its place: equal values stay equal.
    Hash,
    /// A constant stands in its place.
    Mask,
    /// Nothing does: the column is left out.
    Exclude,
}

/// The values of a row that are hidden.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    /// Version of the rules that hid them.
    pub rules: String,
    /// Index of the column, and how.
    pub columns: Vec<(usize, Hide)>,
}

impl Hidden {
    /// How the value of this column was hidden.
    pub fn of(&self, column: usize) -> Option<Hide> {
        self.columns.iter().find(|(index, _)| *index == column).map(|(_, hide)| *hide)
    }

    /// Whether one of these columns is hidden.
    pub fn has_any(&self, columns: &[usize]) -> bool {
        columns.iter().any(|column| self.of(*column).is_some())
    }
}
