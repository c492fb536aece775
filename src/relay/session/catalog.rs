//! What a session reads of the catalog: the captured tables.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::pg::publication::{CatalogIdentity, Publication, TableFacts, TableName, read_table};
use crate::position::Lsn;
use crate::relay::check::lost::{Agreed, was_away};
use crate::relay::check::publishable::{Harm, Obstacle, none_inside_another, obstacles};
use crate::relay::check::tables;
use crate::relay::{Options, checkpoint};
use crate::route::keys_of;
use crate::source::columns::ColumnNumbers;
use crate::source::transaction::{CapturedTable, HeldTable};

/// The primary keys that the session was started with, by the table's OID. The stream does not show
/// that one was added or replaced, unless it is the replica identity.
#[derive(Debug, Default)]
pub(in crate::relay) struct StartedWith {
    keys: Mutex<HashMap<u32, Vec<String>>>,
    /// How far the publication is known to have been as it was agreed to.
    intact: Mutex<Option<Lsn>>,
    /// Number of the last agreement between routes and tables.
    agreed_to: Mutex<i64>,
    columns: Mutex<StartedColumns>,
}

/// The columns of the captured tables.
#[derive(Debug, Default)]
struct StartedColumns {
    of_tables: HashMap<u32, ColumnNumbers>,
    /// Tables whose columns matter to a route: it hides some, or has an `on_drift` policy.
    watched: HashSet<u32>,
    /// Set while the source does not know which columns a table has.
    unknown: Arc<AtomicBool>,
}

impl StartedWith {
    /// A session starts with these.
    pub(super) fn set(&self, captured: &HashMap<String, CapturedTable>) {
        let keys = captured.values().map(|table| (table.oid, table.primary_key.clone()));
        *self.keys.lock().expect("nobody panics while holding the keys") = keys.collect();
    }

    /// Starts a session with these columns, by OID, and the tables to watch. Returns the flag that
    /// its source sets while it does not know the columns of a table.
    pub(super) fn set_columns(
        &self,
        of_tables: HashMap<u32, ColumnNumbers>,
        watched: HashSet<u32>,
    ) -> Arc<AtomicBool> {
        let unknown = Arc::default();
        let started = StartedColumns { of_tables, watched, unknown: Arc::clone(&unknown) };
        *self.columns.lock().expect("nobody panics while holding columns") = started;
        unknown
    }

    /// The tables whose columns the session has read.
    pub(in crate::relay) fn tables(&self) -> Vec<u32> {
        let columns = self.columns.lock().expect("nobody panics while holding columns");
        columns.of_tables.keys().copied().collect()
    }

    /// An error if a table has other columns now: the next session reads them.
    pub(in crate::relay) fn compare_columns(
        &self,
        now: &HashMap<u32, ColumnNumbers>,
    ) -> Option<Error> {
        let columns = self.columns.lock().expect("nobody panics while holding columns");
        let is_other = |(table, then): (&u32, &ColumnNumbers)| {
            now.get(table).is_some_and(|now| {
                then.has_another(now) || (columns.watched.contains(table) && then.has_lost(now))
            })
        };
        let changed = columns.of_tables.iter().any(is_other);
        (columns.unknown.load(Ordering::Relaxed) || changed).then(|| {
            Error::protocol("the columns of a captured table have changed")
                .hint("no action needed: the next session reads which ones they are")
        })
    }

    /// The publication was as agreed when the WAL ended here; `None` where nobody has looked.
    pub(super) fn intact(&self) -> Option<Lsn> {
        *self.intact.lock().expect("nobody panics while holding an LSN")
    }

    /// The publication was seen to be as agreed, and the WAL ended at `end`.
    pub(in crate::relay) fn seen_intact(&self, end: Lsn) {
        *self.intact.lock().expect("nobody panics while holding an LSN") = Some(end);
    }

    /// The session starts with the agreements up to this one.
    pub(super) fn agreed_to(&self, last: i64) {
        *self.agreed_to.lock().expect("nobody panics while holding a number") = last;
    }

    /// An error when somebody has agreed to something since.
    pub(in crate::relay) fn compare_agreed(&self, last: i64) -> Option<Error> {
        let known = *self.agreed_to.lock().expect("nobody panics while holding a number");
        (known != last).then(|| {
            Error::protocol("somebody has agreed to a table as it is now")
                .hint("no action needed: the next session reads the agreement")
        })
    }

    /// An error when a key is another one now.
    pub(in crate::relay) fn compare(&self, tables: &[TableFacts]) -> Option<Error> {
        let keys = self.keys.lock().expect("nobody panics while holding the keys");
        let changed = |facts: &&TableFacts| {
            let shown = matches!(facts.identity, CatalogIdentity::Key(_));
            !shown && keys.get(&facts.oid).is_some_and(|key| *key != facts.primary_key)
        };
        let table = &tables.iter().find(changed)?.table;
        let text = format!("the primary key of {table} has changed");
        Some(Error::protocol(text).hint("no action needed: the next session reads it again"))
    }
}

/// The tables of `source.tables`.
pub(super) async fn captured(
    client: &Client,
    options: &Options,
    publication: &Publication,
    agreed: &Agreed,
) -> Result<HashMap<String, CapturedTable>> {
    let mut captured = HashMap::new();
    let operations = publication.operations;
    let mut described = checkpoint::described(client, &options.name).await?;
    let Captured { found, gone } = read_tables(client, options, publication, Some(agreed)).await?;
    for Gone { table, unfit, .. } in gone {
        let oid = agreed.was(&table).map_or(0, |was| was.oid);
        let (former, held) = (described.remove(&oid), Some(HeldTable::Lost { unfit }));
        let known = CapturedTable { oid, former, held, ..CapturedTable::default() };
        captured.insert(table.to_string(), known);
    }
    for facts in found {
        let table = &facts.table.to_string();
        let serious = |obstacle: &Obstacle| obstacle.harm > Harm::Less;
        for obstacle in obstacles(&facts, Some(publication)).into_iter().filter(serious) {
            tracing::warn!(hint = obstacle.hint, "{}", obstacle.what);
        }
        for (route, key) in keys_of(&options.rules, table) {
            if let Some((what, hint)) = tables::hides_route_key(&facts, route, key) {
                tracing::warn!(hint, "{what}");
            }
        }
        let list = publication.table(&facts.table).and_then(|table| table.columns.as_ref());
        let known = CapturedTable {
            oid: facts.oid,
            primary_key: facts.primary_key,
            leading: if list.is_none() { facts.leading } else { Vec::new() },
            partitioned: facts.partitioned,
            inserts_only: !operations.update && !operations.delete,
            former: described.remove(&facts.oid),
            held: options.held.contains(&facts.table).then_some(HeldTable::There),
        };
        captured.insert(table.clone(), known);
    }
    Ok(captured)
}

/// What there is of the tables of `source.tables`.
pub(in crate::relay) struct Captured {
    /// Those that can be captured.
    pub(in crate::relay) found: Vec<TableFacts>,
    /// Held ones that are not there, or cannot be captured as they are now.
    pub(in crate::relay) gone: Vec<Gone>,
}

/// A held table whose changes do not come.
pub(in crate::relay) struct Gone {
    pub(in crate::relay) table: TableName,
    /// Why, as a sentence about the table.
    pub(in crate::relay) why: Error,
    /// OID of the table that has its name and cannot be captured; 0 without one.
    pub(in crate::relay) unfit: u32,
}

/// The tables of `source.tables`, each of them fit to be captured; a held one may be gone.
///
/// # Errors
/// [`crate::error::Kind::Refused`] for one that does not exist, or whose changes could not be told
/// apart.
pub(in crate::relay) async fn read_tables(
    client: &Client,
    options: &Options,
    publication: &Publication,
    agreed: Option<&Agreed>,
) -> Result<Captured> {
    let mut captured = Captured { found: Vec::new(), gone: Vec::new() };
    for table in &options.tables {
        let table: TableName = table.parse()?;
        let is_held = options.held.contains(&table);
        let published = publication.table(&table);
        match read_table(client, &table).await? {
            Some(facts) if is_held && published.is_none() => {
                let why = left_out(&facts.table, publication);
                captured.gone.push(Gone { table, why, unfit: 0 });
            }
            Some(facts) => match fits(&facts, publication) {
                Ok(()) => captured.found.push(facts),
                // Changes of the one that was agreed to must not be passed over.
                Err(why) if is_held && is_another(agreed, &facts) => {
                    captured.gone.push(Gone { table, why, unfit: facts.oid });
                }
                Err(why) => return Err(why),
            },
            None if is_held => {
                let why = does_not_exist(&table);
                captured.gone.push(Gone { table, why, unfit: 0 });
            }
            None => return Err(does_not_exist(&table)),
        }
    }
    none_inside_another(&captured.found)?;
    Ok(captured)
}

fn fits(facts: &TableFacts, publication: &Publication) -> Result<()> {
    let impossible = |obstacle: &Obstacle| obstacle.harm == Harm::Impossible;
    let obstacles = obstacles(facts, Some(publication));
    if let Some(Obstacle { what, hint, .. }) = obstacles.into_iter().find(impossible) {
        return Err(Error::refused(what).hint(hint));
    }
    tables::keys_its_changes(facts, Some(publication))
}

fn is_another(agreed: Option<&Agreed>, facts: &TableFacts) -> bool {
    let was = agreed.and_then(|agreed| agreed.was(&facts.table));
    was.is_none_or(|was| was.oid != facts.oid)
}

fn does_not_exist(table: &TableName) -> Error {
    Error::refused(format!("captured table {table} does not exist")).hint(
        "create it, or rename it back, and run `watership init`; or remove it from source.tables",
    )
}

fn left_out(table: &TableName, publication: &Publication) -> Error {
    let name = &publication.name;
    Error::refused(format!("captured table {table} is not in publication {name:?}"))
        .hint("`watership init` puts it back; or take it out of source.tables")
}

/// Says of the first held table that is not as it was agreed to that it went or came.
pub(in crate::relay) fn held_changed(
    options: &Options,
    publication: &Publication,
    captured: &Captured,
    agreed: &Agreed,
) -> Option<Error> {
    let is_gone = |table: &TableName| captured.gone.iter().any(|gone| gone.table == *table);
    let changed = |table: &&TableName| {
        let now = publication.table(table).filter(|_| !is_gone(table));
        match (agreed.publication.table(table), now) {
            (None, None) => false,
            (Some(_), Some(now)) => was_away(agreed, now),
            (None, Some(_)) | (Some(_), None) => true,
        }
    };
    let table = options.held.iter().find(changed)?;
    let what = match captured.gone.iter().find(|gone| gone.table == *table) {
        Some(gone) => format!("{}; it is held", gone.why),
        None => format!("captured table {table} is back, or was gone for a while"),
    };
    let hint = "no action needed: the other tables continue in the next session";
    Some(Error::protocol(what).hint(hint))
}
