//! Whether captured tables still have the columns that the session has read of the catalog. The
//! stream describes a table again after each change of it, also when that looks as before: a column
//! was dropped, another renamed to it, and one added in the place of that.
//!
//! Invariant: what comes behind a description that the catalog was not asked about is not handed on
//! before its answer. Only one that is not younger than the answer counts: a transaction comes
//! through the stream before others see it. One that has altered the table keeps its lock until
//! they do, so an answer that was asked for without such a lock shows all that comes before.

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

/// How long a transaction may take to be seen that has altered a table. It may wait for a standby,
/// or for the relay itself.
const VISIBLE_LIMIT: Duration = Duration::from_secs(10);
/// How soon it is looked for again.
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
    /// Whether a column of this has gone from `now`.
    pub fn has_lost(&self, now: &Self) -> bool {
        self.numbers.iter().any(|number| !now.numbers.contains(number))
    }

    /// Whether `now` has another column under the name of one of this.
    pub fn has_another(&self, now: &Self) -> bool {
        let of = |name: &String| now.names.iter().position(|other| other == name);
        self.names.iter().zip(&self.numbers).any(|(name, number)| {
            of(name).is_some_and(|place| now.numbers.get(place) != Some(number))
        })
    }
}

/// The columns of these tables by OID, and the transactions that this shows.
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

/// A table of which the columns are looked after.
#[derive(Debug, Clone)]
pub struct Watched {
    /// As the session has them.
    pub columns: ColumnNumbers,
    /// What the catalog showed when they were read.
    pub shown: Visibility,
}

/// Asks the catalog.
pub struct ColumnWatch {
    client: Arc<Client>,
    watched: HashMap<u32, Watched>,
    asking: Option<Asking>,
    /// Set when nobody can know the columns of a table for now.
    unknown: Arc<AtomicBool>,
}

struct Asking {
    described: DescribedAt,
    answer: Pin<Box<dyn Future<Output = Result<Answer>> + Send>>,
}

enum Answer {
    Shown(ColumnNumbers, Visibility),
    /// It may be altered by what is not visible.
    Unknown,
}

impl ColumnWatch {
    /// Looks after these tables, by OID; others are not asked about.
    pub fn new(
        client: Arc<Client>,
        watched: HashMap<u32, Watched>,
        unknown: Arc<AtomicBool>,
    ) -> Self {
        Self { client, watched, asking: None, unknown }
    }

    /// The stream has described a table. Returns whether the answer of the catalog is to be waited
    /// for.
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

    /// Waits for the answer, if there is a question. Cancel-safe.
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
        // The lock comes first: when it is let go, the next statement sees what it was for.
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
