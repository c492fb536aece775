//! The checkpoint row and the parked rows, in memory.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::sleep;
use watership::error::Result;
use watership::event::Table;
use watership::position::{Lsn, Mark, Position};
use watership::relay::checkpoint::Store;
use watership::relay::checkpoint::rider::Rider;
use watership::relay::parking::row::{Indexed, ParkedKey, ParkedRow, RowState};
use watership::relay::parking::store::Found;

/// Every checkpoint that was written, and how long a write takes. A clone is the same store: it
/// outlives the session that writes it.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    /// The rows, oldest first.
    pub rows: Arc<Mutex<Vec<(Position, Mark)>>>,
    /// The parked rows, of any state.
    pub parked: Arc<Mutex<BTreeMap<ParkedKey, ParkedRow>>>,
    /// How captured tables were described last, by OID.
    pub described: Arc<Mutex<BTreeMap<u32, Arc<Table>>>>,
    /// Everything as it was after each write, for a server that is promoted.
    earlier: Arc<Mutex<Vec<Earlier>>>,
    pub keeps_history: bool,
    /// Half of it passes before the row is there, half after: a crash can fall on either side.
    pub latency: Duration,
}

/// The parked rows and the descriptions after the first writes of checkpoints.
#[derive(Debug)]
struct Earlier {
    writes: usize,
    parked: BTreeMap<ParkedKey, ParkedRow>,
    described: BTreeMap<u32, Arc<Table>>,
}

impl MemoryStore {
    pub fn new(latency: Duration) -> Self {
        Self { latency, ..Self::default() }
    }

    /// Names of the key columns of the tables as they were described last, by OID.
    pub fn keys(&self) -> HashMap<u32, Vec<String>> {
        let names = |table: &Table| {
            table.key.iter().map(|index| table.columns[*index].name.to_string()).collect()
        };
        let described = self.described.lock().unwrap();
        described.iter().map(|(oid, table)| (*oid, names(table))).collect()
    }

    /// What was written when the WAL was at `end` at most.
    pub fn go_back_to(&self, end: Lsn) {
        assert!(self.keeps_history, "it has forgotten");
        let mut rows = self.rows.lock().unwrap();
        // A row was written after all that it covers was.
        let covered = |(position, flush): &(Position, Mark)| position.mark.max(*flush);
        let kept = rows.partition_point(|row| covered(row).lsn() <= end);
        rows.truncate(kept);
        let mut earlier = self.earlier.lock().unwrap();
        earlier.retain(|state| state.writes <= kept);
        let (parked, described) = match earlier.last() {
            Some(state) => (state.parked.clone(), state.described.clone()),
            None => Default::default(),
        };
        *self.parked.lock().unwrap() = parked;
        *self.described.lock().unwrap() = described;
    }

    /// The unreleased rows.
    pub fn index(&self) -> Vec<Indexed> {
        let parked = self.parked.lock().unwrap();
        let indexed = |row: &ParkedRow| Indexed {
            key: row.key.clone(),
            state: row.state,
            why: row.why,
            lanes: row.lanes,
            bytes: row.size(),
            parked_at: 0.0,
        };
        parked.values().filter(|row| is_unreleased(row)).map(indexed).collect()
    }

    fn write(&self, position: Position, flush: Mark, riders: Vec<Rider>) {
        let mut rows = self.rows.lock().unwrap();
        rows.push((position, flush));
        let mut parked = self.parked.lock().unwrap();
        for rider in riders {
            match rider {
                Rider::Parked(rows) => {
                    for row in rows {
                        parked.entry(row.key.clone()).or_insert(row);
                    }
                }
                Rider::Unparked(changes) => {
                    for change in changes {
                        let row = parked.get_mut(&change.key);
                        if let Some(row) = row.filter(|row| is_unreleased(row)) {
                            row.state = change.state;
                        }
                    }
                }
                Rider::Changed(_) | Rider::Canary(_) => {}
                Rider::Described(tables) => {
                    let mut described = self.described.lock().unwrap();
                    described.extend(tables.into_iter().map(|table| (table.oid, table)));
                }
                Rider::Backfilled(_) | Rider::Moved(_) => {
                    unreachable!("nobody asked for a backfill")
                }
            }
        }
        if self.keeps_history {
            let described = self.described.lock().unwrap().clone();
            let state = Earlier { writes: rows.len(), parked: parked.clone(), described };
            self.earlier.lock().unwrap().push(state);
        }
    }

    fn contents(&self, keys: &[ParkedKey]) -> Vec<ParkedRow> {
        let parked = self.parked.lock().unwrap();
        let row = |key| parked.get(key).filter(|row| row.state == RowState::Retrying).cloned();
        keys.iter().filter_map(row).collect()
    }
}

impl Store for MemoryStore {
    fn store(
        &self,
        position: Position,
        flush: Mark,
        riders: Vec<Rider>,
    ) -> impl Future<Output = Result<Lsn>> + 'static {
        let store = self.clone();
        async move {
            sleep(store.latency / 2).await;
            store.write(position, flush, riders);
            sleep(store.latency / 2).await;
            Ok(flush.lsn())
        }
    }

    fn look(&self, _expected: (usize, usize)) -> impl Future<Output = Result<Found>> + 'static {
        let store = self.clone();
        async move {
            sleep(store.latency).await;
            Ok(Found::Index(store.index()))
        }
    }

    fn read(&self, keys: Vec<ParkedKey>) -> impl Future<Output = Result<Found>> + 'static {
        let store = self.clone();
        async move {
            sleep(store.latency).await;
            Ok(Found::Rows(store.contents(&keys)))
        }
    }
}

fn is_unreleased(row: &ParkedRow) -> bool {
    matches!(row.state, RowState::Parked | RowState::Retrying)
}
