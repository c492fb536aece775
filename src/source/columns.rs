//! Whether captured tables still have the columns that the session read from the catalog. The
//! stream describes a table again after each change, even if the description looks the same: one
//! column may have been dropped, another renamed to it, and a third added in its place.
//!
//! Invariant: after a new description nothing is passed on until the catalog has been asked, and
//! its answer covers the transaction that altered the table. A transaction can arrive in the stream
//! before it is visible to others. It keeps its lock on the table until then, so an answer that was
//! read while nobody held such a lock covers it.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::event::Table;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::pg::visibility::Visibility;
use crate::source::ColumnDoubt;
use crate::source::transaction::DescribedAt;

/// Maximum wait until a transaction that altered a table becomes visible: it may be waiting for a
/// standby, which may be the relay itself.
const VISIBLE_LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// The columns of a table, as the catalog has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnNumbers {
    /// Their names, in the order of their numbers.
    pub names: Vec<String>,
    /// Their numbers.
    pub numbers: Vec<i16>,
}

impl ColumnNumbers {
    /// Whether `now` lacks a column of this.
    pub fn has_lost(&self, now: &Self) -> bool {
        self.numbers.iter().any(|number| !now.numbers.contains(number))
    }

    /// Whether a name belongs to another column in `now`.
    pub fn has_another(&self, now: &Self) -> bool {
        let of = |name: &String| now.names.iter().position(|other| other == name);
        self.names.iter().zip(&self.numbers).any(|(name, number)| {
            of(name).is_some_and(|place| now.numbers.get(place) != Some(number))
        })
    }
}

/// Reads the columns of these tables, by OID, and which transactions the answer covers.
///
/// # Errors
/// The server's.
pub async fn read(
    client: &Client,
    tables: &[u32],
) -> Result<(HashMap<u32, ColumnNumbers>, Option<Visibility>)> {
    const SQL: &str = include_str!("../../sql/query/columns_now.sql");
    let rows = unnamed::query(client, SQL, &[&tables]).await.map_err(postgres_error)?;
    let (mut found, mut snapshot) = (HashMap::new(), None);
    for row in rows {
        let numbers = ColumnNumbers {
            names: row.try_get(1).map_err(postgres_error)?,
            numbers: row.try_get(2).map_err(postgres_error)?,
        };
        found.insert(row.try_get(0).map_err(postgres_error)?, numbers);
        let text: &str = row.try_get(3).map_err(postgres_error)?;
        snapshot = Some(Visibility::parse(text)?);
    }
    Ok((found, snapshot))
}

/// A table whose columns are watched.
#[derive(Debug, Clone)]
pub struct Watched {
    /// The columns that the session works with.
    pub columns: ColumnNumbers,
    /// What the catalog showed when they were read.
    pub shown: Visibility,
}

/// Asks the catalog.
pub struct ColumnWatch {
    client: Arc<Client>,
    watched: HashMap<u32, Watched>,
    asking: Option<Asking>,
    /// Set while the columns of a table cannot be known.
    unknown: Arc<AtomicBool>,
}

struct Asking {
    described: DescribedAt,
    answer: Pin<Box<dyn Future<Output = Result<Answer>> + Send>>,
}

enum Answer {
    Shown(ColumnNumbers, Visibility),
    /// A transaction that is not visible may have altered the table.
    Unknown,
}

impl ColumnWatch {
    /// Watches these tables, by OID, and no others.
    pub fn new(
        client: Arc<Client>,
        watched: HashMap<u32, Watched>,
        unknown: Arc<AtomicBool>,
    ) -> Self {
        Self { client, watched, asking: None, unknown }
    }

    /// Takes a description from the stream. Returns whether to wait for the catalog's answer.
    pub(super) fn described(&mut self, described: DescribedAt) -> bool {
        let watched = self.watched.get(&described.table.oid);
        if watched.is_none_or(|watched| watched.shown.shows(described.xid)) {
            return false;
        }
        let (table, xid) = (described.table.oid, described.xid);
        let answer = Box::pin(ask(self.client.clone(), table, xid));
        self.asking = Some(Asking { described, answer });
        true
    }

    /// Waits for the answer, if one is pending. Cancel-safe.
    ///
    /// # Errors
    /// The server's.
    pub(super) async fn answer(&mut self) -> Result<Option<(Arc<Table>, ColumnDoubt)>> {
        let Some(asking) = &mut self.asking else { return Ok(None) };
        let answer = asking.answer.as_mut().await;
        let Some(Asking { described, .. }) = self.asking.take() else { return Ok(None) };
        let table = described.table;
        let Some(watched) = self.watched.get_mut(&table.oid) else { return Ok(None) };
        Ok(match answer? {
            Answer::Shown(now, _)
                if watched.columns.has_lost(&now) || watched.columns.has_another(&now) =>
            {
                Some((table, ColumnDoubt::Others))
            }
            Answer::Shown(_, shown) => {
                watched.shown = shown;
                None
            }
            Answer::Unknown => {
                self.unknown.store(true, Ordering::Relaxed);
                Some((table, ColumnDoubt::Unknown))
            }
        })
    }
}

async fn ask(client: Arc<Client>, table: u32, xid: u32) -> Result<Answer> {
    const LOCKED: &str = include_str!("../../sql/query/columns_locked.sql");
    let deadline = Instant::now() + VISIBLE_LIMIT;
    loop {
        // Look for the lock first: once it is released, the next statement sees what was done under
        // it.
        let locked = unnamed::query_one(&*client, LOCKED, &[&table]).await;
        let locked: bool = locked.and_then(|row| row.try_get(0)).map_err(postgres_error)?;
        let (mut found, shown) = read(&client, &[table]).await?;
        let (Some(columns), Some(shown)) = (found.remove(&table), shown) else {
            return Err(Error::protocol(format!("no answer about the columns of table {table}")));
        };
        if !locked || shown.shows(xid) {
            return Ok(Answer::Shown(columns, shown));
        }
        if Instant::now() >= deadline {
            return Ok(Answer::Unknown);
        }
        sleep(LOOK_AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_that_is_gone_is_seen_whatever_has_its_name() {
        let columns = |names: &str, numbers: &[i16]| ColumnNumbers {
            names: names.split(' ').map(str::to_owned).collect(),
            numbers: numbers.to_vec(),
        };
        let then = columns("id note ssn", &[1, 2, 3]);
        for (now, lost, another) in [
            (columns("id note ssn", &[1, 2, 3]), false, false),
            (columns("id note ssn more", &[1, 2, 3, 4]), false, false),
            (columns("id remark ssn", &[1, 2, 3]), false, false),
            (columns("id ssn note", &[1, 2, 3]), false, true),
            (columns("id note ssn", &[1, 3, 4]), true, true),
            (columns("id ssn", &[1, 3]), true, false),
        ] {
            assert_eq!((then.has_lost(&now), then.has_another(&now)), (lost, another), "{now:?}");
        }
    }
}
