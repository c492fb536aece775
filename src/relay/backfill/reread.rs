//! The rows that a run reads again at its end because they moved: see `moved`.
//!
//! Order: after the last chunk in key order comes a chunk without rows. Once its mark is durable,
//! every move from before the last read is recorded. The recorded rows are then read. If one is not
//! found, it may have moved again, and another such round follows. Rows that move later have been
//! read before, so they need no round.

use std::collections::HashMap;

use serde_json::Value as Json;
use tokio_postgres::GenericClient;
use uuid::Uuid;

use super::keyset::{From, TableShape};
use super::read::ChunkRows;
use crate::error::Result;
use crate::pg::sqlstate::postgres_error;

/// Maximum rows of a chunk: the statement names each key.
pub const ROWS_MAX: usize = 200;

/// What the next chunk of a run contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Rows in the order of the key.
    Keys,
    /// No rows: its mark makes sure that all moves are recorded.
    Passing,
    /// Rows that moved.
    Moved,
}

/// Rows that moved: the position of each change, and the new key in the order of
/// [`TableShape::key`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MovedRows {
    rows: Vec<(String, Vec<String>)>,
    /// Positions of changes that were made under an earlier key of the table, before the run began.
    former: Vec<String>,
}

/// The last recorded position of a run; empty if there is none.
///
/// # Errors
/// The server's.
pub async fn last(client: &impl GenericClient, run: Uuid) -> Result<String> {
    const SQL: &str = include_str!("../../../sql/query/backfill_moved_last.sql");
    let row = client.query_one(SQL, &[&run]).await.map_err(postgres_error)?;
    Ok(row.try_get::<_, Option<String>>(0).map_err(postgres_error)?.unwrap_or_default())
}

/// Loads the next rows of a run that moved up to position `until`, at most `max`. The inner error
/// says why they cannot be read.
///
/// # Errors
/// The server's.
pub async fn load(
    client: &impl GenericClient,
    run: Uuid,
    shape: &TableShape,
    (max, until): (usize, &str),
) -> Result<std::result::Result<MovedRows, String>> {
    const SQL: &str = include_str!("../../../sql/query/backfill_moved.sql");
    let max = i64::try_from(max).unwrap_or(i64::MAX);
    let rows = client.query(SQL, &[&run, &max, &until]).await.map_err(postgres_error)?;
    let mut moved = MovedRows::default();
    for row in rows {
        let position: String = row.try_get(0).map_err(postgres_error)?;
        let key: Option<String> = row.try_get(1).map_err(postgres_error)?;
        let Some(key) = key else {
            return Ok(Err(format!("the key of a row of {} is not UTF-8", shape.name)));
        };
        match of_json(shape, &key) {
            Some(key) => moved.rows.push((position, key)),
            None => moved.former.push(position),
        }
    }
    Ok(Ok(moved))
}

fn of_json(shape: &TableShape, key: &str) -> Option<Vec<String>> {
    let key: HashMap<String, Json> = serde_json::from_str(key).ok()?;
    let text = |name: &String| key.get(name)?.as_str().map(str::to_owned);
    shape.key.iter().map(|column| text(&shape.table.columns[column.column].name)).collect()
}

impl MovedRows {
    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.former.is_empty()
    }

    /// Whether there are rows to read.
    pub fn has_rows(&self) -> bool {
        !self.rows.is_empty()
    }

    /// The keys to read, and a row limit one above their number: a result below it is complete.
    pub fn from(&self) -> (From, usize) {
        let keys = self.rows.iter().map(|(_, key)| key.clone()).collect();
        (From::Only(keys), self.rows.len() + 1)
    }

    /// For each of these keys, the position of the last change that moved a row to it. A key whose
    /// text was recorded differently, although its type considers both equal, gets the last
    /// position of all.
    pub fn positions(&self, keys: impl Iterator<Item = Vec<String>>) -> Vec<String> {
        let last: HashMap<&[String], &String> =
            self.rows.iter().map(|(position, key)| (&**key, position)).collect();
        let of_all = self.rows.last().map(|(position, _)| position);
        let of = |key: Vec<String>| last.get(&*key).copied().or(of_all).cloned();
        keys.map(|key| of(key).unwrap_or_default()).collect()
    }

    /// Whether one of these rows was not found, although the read was complete.
    pub fn lacks(&self, rows: &ChunkRows) -> bool {
        rows.done && self.rows.iter().any(|(_, key)| !rows.keys.contains(key))
    }

    /// The positions of the changes that are done once these rows are sent.
    pub fn reread(&self, rows: &ChunkRows) -> Vec<String> {
        let is_read = |key: &Vec<String>| rows.done || rows.keys.contains(key);
        let read = self.rows.iter().filter(|(_, key)| is_read(key)).map(|(at, _)| at);
        read.chain(&self.former).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(rows: &[(&str, &str)]) -> MovedRows {
        let row = |(at, key): &(&str, &str)| ((*at).to_owned(), vec![(*key).to_owned()]);
        MovedRows { rows: rows.iter().map(row).collect(), former: vec!["0".to_owned()] }
    }

    #[test]
    fn a_row_has_the_position_of_its_last_move_and_what_was_not_read_is_left() {
        let rows = moved(&[("1", "a"), ("2", "b"), ("3", "a"), ("4", "c")]);
        let keys = [vec!["a".to_owned()], vec!["b".to_owned()]];
        assert_eq!(rows.positions(keys.clone().into_iter()), ["3", "2"]);
        let other = [vec!["A".to_owned()]];
        assert_eq!(rows.positions(other.into_iter()), ["4"]);
        let read = |done| ChunkRows { keys: keys.to_vec(), done, ..ChunkRows::default() };
        assert_eq!(rows.reread(&read(false)), ["1", "2", "3", "0"], "the rest was too large");
        assert_eq!(rows.reread(&read(true)), ["1", "2", "3", "4", "0"], "the last one is gone");
        assert!(rows.lacks(&read(true)) && !rows.lacks(&read(false)));
        assert_eq!(rows.from().1, 5);
    }
}
