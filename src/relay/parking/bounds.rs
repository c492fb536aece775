//! How much may be parked, and what an earlier session parked beyond the checkpoint.

use std::collections::HashSet;
use std::sync::Arc;

use uuid::Uuid;

use crate::position::Mark;

/// Limits of `watership.parked`, for one relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most unreleased rows.
    pub rows: usize,
    /// Most lanes that are parked.
    pub keys: usize,
}

impl Default for Limits {
    /// No limits; those of a relay come from its configuration.
    fn default() -> Self {
        Self { rows: usize::MAX, keys: usize::MAX }
    }
}

/// Rows of any state that a replay may come upon: id and route, and where the last of them is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Ids of events, or of messages, with the route and the part.
    pub ids: HashSet<(Uuid, Arc<str>, u16)>,
    /// Mark of the last one.
    pub until: Mark,
}
