//! Which messages wait for each other: lanes, as hashes of route and key. Pure.
//!
//! Invariant: messages about one row, or one outbox key, share a lane whatever else changes
//! between them. Two keys with one hash share a lane, too, and wait for each other: slower, never
//! wrong. Where a change does not say which row it is about, it waits for everything before it in
//! its table, and everything after it waits for it.

use xxhash_rust::xxh64::Xxh64;

use super::database_secret::DatabaseSecret;
use super::plan::TablePlan;
use crate::event::{Change, OldRow, OutboxRow, Row, Table, Value};

/// The lanes that a message takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneKeys {
    /// None: the route is pipelined.
    Free,
    /// One key. `group` is its table's, which truncates wait for; outbox events have none.
    One {
        /// Hash of route and key.
        lane: u64,
        /// Hash of route and table.
        group: Option<u64>,
    },
    /// A key change: the old key's lane and the new one's.
    Two {
        /// Hashes of route and keys, different.
        lanes: [u64; 2],
        /// Hash of route and table.
        group: u64,
    },
    /// After everything before it in its table, before everything after it: a truncate, and a
    /// change that does not say which row it is about.
    Barrier {
        /// Hash of route and table.
        group: u64,
    },
}

impl LaneKeys {
    /// Hash of route and table.
    pub(super) fn group(self) -> Option<u64> {
        match self {
            LaneKeys::Free => None,
            LaneKeys::One { group, .. } => group,
            LaneKeys::Two { group, .. } | LaneKeys::Barrier { group } => Some(group),
        }
    }
}

// The hashes are stored with parked rows: they must be the same on every machine, always.

pub(super) fn outbox_lane(seed: u64, row: &OutboxRow) -> u64 {
    let mut hasher = Xxh64::new(seed);
    add(&mut hasher, row.aggregate_type.as_bytes());
    add(&mut hasher, row.aggregate_id.as_bytes());
    hasher.digest()
}

/// Where the hashes of a table's rows begin.
pub(super) fn table_hasher(seed: u64, table: &Table) -> Xxh64 {
    let mut hasher = Xxh64::new(seed);
    add(&mut hasher, table.full_name.as_bytes());
    hasher
}

/// The group of a table's rows: by its OID, because a table that is renamed is still that table.
pub(super) fn group(seed: u64, table: &Table) -> u64 {
    let mut hasher = Xxh64::new(seed);
    hasher.update(&table.oid.to_le_bytes());
    hasher.digest()
}

impl TablePlan {
    /// The lanes of a change of the table.
    pub(super) fn lanes(&self, change: &Change) -> LaneKeys {
        let group = self.group;
        self.known_lanes(change).unwrap_or(LaneKeys::Barrier { group })
    }

    /// Absent when the change does not say which row it is about.
    fn known_lanes(&self, change: &Change) -> Option<LaneKeys> {
        let group = self.group;
        let one = |lane| LaneKeys::One { lane, group: Some(group) };
        if self.key.is_empty() {
            return None;
        }
        match change {
            Change::Truncate => None,
            Change::Insert { new } | Change::Read { new, .. } => self.lane(new).map(one),
            // An identity without the key hides that an update changes it.
            Change::Update { .. } | Change::Delete { .. } if !self.identity_has_key => None,
            Change::Delete { old } => self.old_lane(old).map(one),
            Change::Update { old: None, new } => self.lane(new).map(one),
            Change::Update { old: Some(old), new } => {
                Some(match [self.old_lane(old)?, self.lane(new)?] {
                    [a, b] if a == b => one(a),
                    lanes => LaneKeys::Two { lanes, group },
                })
            }
        }
    }

    fn old_lane(&self, old: &OldRow) -> Option<u64> {
        let row = old.row();
        let sent = |column: &usize| match (old, &row[*column]) {
            // The columns of an identity by index are never null, those of a primary key neither:
            // a leaf with another identity than its root sends these nulls.
            (OldRow::Key(_), Value::Null) => false,
            (OldRow::Full(_), Value::Null) => !self.table.key.contains(column),
            (_, Value::Text(_) | Value::Unreadable(_) | Value::Unchanged) => true,
        };
        if self.key.iter().all(sent) { self.lane(row) } else { None }
    }

    fn lane(&self, row: &Row) -> Option<u64> {
        if let Some(secret) = &self.lane_secret {
            return self.keyed_lane(row, secret);
        }
        let mut hasher = self.hasher.clone();
        for &column in &self.key {
            match &row[column] {
                Value::Text(text) => add(&mut hasher, text),
                Value::Null => hasher.update(&[0xFF]),
                // Rows whose key cannot be read wait for each other.
                Value::Unreadable(_) => hasher.update(&[0xFE]),
                Value::Unchanged => return None,
            }
        }
        Some(hasher.digest())
    }

    /// The same for a key of which a column is hidden: lanes are stored, and nobody may try which
    /// value gives one.
    fn keyed_lane(&self, row: &Row, secret: &DatabaseSecret) -> Option<u64> {
        let mut context = secret.lane();
        context.update(&self.hasher.digest().to_le_bytes());
        for &column in &self.key {
            let (kind, bytes): (u8, &[u8]) = match &row[column] {
                Value::Text(text) => (0, text),
                Value::Null => (1, &[]),
                Value::Unreadable(_) => (2, &[]),
                Value::Unchanged => return None,
            };
            context.update(&[kind]);
            context.update(&(bytes.len() as u64).to_le_bytes());
            context.update(bytes);
        }
        let tag = context.sign();
        Some(u64::from_le_bytes(*tag.as_ref().first_chunk().expect("SHA-256 has 32 bytes")))
    }
}

fn add(hasher: &mut Xxh64, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes());
    hasher.update(part);
}
