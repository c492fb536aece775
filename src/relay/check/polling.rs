//! Whether a relay that polls may go on from its checkpoint. Pure.
//!
//! Checkpoint and batches are rows of the same database as the outbox, so what goes back in time
//! takes them along: after a failover or a restore they are a true account of a moment before it,
//! and only the epoch has to be another one, because the numbers of batches are used again. What is
//! left is what a snapshot cannot be compared with: the transaction ids of another cluster.

use std::time::Duration;

use postgres_protocol::escape::escape_literal;

use crate::error::{Error, Result};
use crate::pg::outbox::{IndexColumns, MappedColumn};
use crate::pg::publication::TableName;
use crate::pg::slot::ServerFacts;
use crate::pg::statement::fill;
use crate::position::Mark;
use crate::relay::checkpoint::Checkpoint;
use crate::source::outbox::Polled;
use crate::source::poll::MadeWith;
use crate::verdict::{RESYNC, Verdict};

/// How the relay continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollingFrom {
    /// From the checkpoint, as it is.
    AsStored,
    /// From there, in a new epoch: the server was promoted or restored.
    NewEpoch,
}

/// What the database says beside its [`ServerFacts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PollFacts {
    /// The newest batch that is stored has seen transactions that this server has not had.
    pub snapshot_ahead: bool,
    /// So have rows of the outbox.
    pub foreign_rows: bool,
    /// The outbox.
    pub outbox: Polled,
    /// Its indexes.
    pub indexes: Vec<IndexColumns>,
    /// OID and columns of an outbox table of the application's.
    pub mapped: Option<(u32, Vec<MappedColumn>)>,
    /// How long rows may have gone unread; absent without a checkpoint.
    pub unread_for: Option<Duration>,
}

impl PollFacts {
    /// What a new batch would be made with; absent for the relay's own outbox.
    pub fn made_with(&self) -> Option<MadeWith> {
        let (oid, columns) = self.mapped.as_ref()?;
        MadeWith::of(*oid, &self.outbox, columns)
    }
}

/// An index that finds the rows of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Its columns: `xid, seq`.
    pub columns: String,
    /// What makes it.
    pub statement: String,
}

/// What finds the rows of a batch. On the relay's own outbox they have names by which the next
/// version finds them; on a table of the application's they can be made while it writes.
pub fn indexes(outbox: &Polled, partitioned: bool) -> [Index; 2] {
    let Polled { order_by, xid, .. } = outbox;
    let create = match (outbox.is_own(), partitioned) {
        (true, _) => ["CREATE INDEX outbox_by_xid", "CREATE INDEX outbox_by_seq"],
        (false, true) => ["CREATE INDEX"; 2],
        (false, false) => ["CREATE INDEX CONCURRENTLY"; 2],
    };
    let statement =
        |i: usize, columns| outbox.fill(&format!("{} ON :outbox ({columns})", create[i]));
    [
        Index {
            columns: format!("{xid}, {order_by}"),
            statement: statement(0, ":transaction, :order"),
        },
        Index { columns: order_by.clone(), statement: statement(1, ":order") },
    ]
}

/// Compares the checkpoint with the server.
///
/// # Errors
/// [`crate::error::Kind::Unreachable`] for a standby, else a named verdict.
pub fn verify(row: &Checkpoint, server: &ServerFacts) -> Result<PollingFrom> {
    if server.in_recovery {
        return Err(Error::unreachable("the server is a standby (in recovery)").hint(
            "wait if it is about to be promoted; otherwise point source.url at the primary",
        ));
    }
    if server.system_identifier != row.system_id {
        let (now, then) = (server.system_identifier, row.system_id);
        let text = format!(
            "this is another cluster: its system identifier is {now}, not {then}; the stored \
             snapshot says nothing about its transactions, so outbox rows that were not published \
             there cannot be told from those that were"
        );
        return Err(Error::named(Verdict::OtherCluster, text)
            .hint(format!("check source.url; if the move was intended: {RESYNC}")));
    }
    Ok(if server.timeline == row.timeline { PollingFrom::AsStored } else { PollingFrom::NewEpoch })
}

/// Compares the transactions that were seen with those that the server has had.
///
/// # Errors
/// A named verdict.
pub fn verify_transactions(facts: &PollFacts) -> Result<()> {
    if facts.snapshot_ahead {
        let text = "the stored snapshot is ahead of the server's transactions: the checkpoint is \
            newer than the rest of the database, as after a restore of single tables; what was \
            published lately may not exist here";
        return Err(Error::named(Verdict::CheckpointAhead, text)
            .hint(format!("find out what was restored; to begin again from here: {RESYNC}")));
    }
    if facts.foreign_rows {
        let text = format!(
            "{} has rows with transaction IDs that this cluster has not reached: they were copied \
             from another one, and would be published once it reaches them",
            facts.outbox.table
        );
        return Err(Error::named(Verdict::ForeignRows, text).hint(adopt(&facts.outbox)));
    }
    Ok(())
}

/// What marks rows of another cluster as passed, or sends them (again), as the outbox's owner.
fn adopt(outbox: &Polled) -> String {
    const SQL: &str = include_str!("../../../sql/query/poll_adopt.sql");
    let adopting = |by| outbox.fill_with(&statement(SQL), &[("by", by)]);
    let (unsent, sent) = (adopting("'3'"), adopting("pg_current_xact_id()"));
    format!("to leave them unsent: {unsent}; to send them (again), with their ids: {sent}")
}

/// What is wrong with the indexes of the relay's own outbox: each look would read all of it.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with the statements.
pub fn verify_indexes(facts: &PollFacts) -> Result<()> {
    let missing = missing_indexes(&facts.outbox, &facts.indexes, true);
    if missing.is_empty() {
        return Ok(());
    }
    let missing = missing.into_iter().map(|index| (index.columns, index.statement));
    let (columns, statements): (Vec<_>, Vec<_>) = missing.unzip();
    let text = format!(
        "watership.outbox lacks an index on ({}), without which each poll reads all of it",
        columns.join(") and one on (")
    );
    Err(Error::refused(text).hint(format!(
        "run `watership init`; or as its owner: {} (INSERT waits meanwhile; docs/sources.md shows \
         how to avoid that)",
        statements.join("; ")
    )))
}

/// Those that are not there.
pub fn missing_indexes(outbox: &Polled, there: &[IndexColumns], partitioned: bool) -> Vec<Index> {
    let Polled { order_by, xid, .. } = outbox;
    let [by_xid, by_order] = indexes(outbox, partitioned);
    let has_xid =
        there.iter().any(|(first, second)| first == xid && second.as_ref() == Some(order_by));
    let has_order = there.iter().any(|(first, _)| first == order_by);
    let missing = [(has_xid, by_xid), (has_order, by_order)];
    missing.into_iter().filter(|(there, _)| !there).map(|(_, index)| index).collect()
}

/// Refuses batches of another table than the one that is configured.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with what to do.
pub fn verify_table<'a>(
    name: &str,
    table: &TableName,
    mut stored: impl Iterator<Item = &'a str>,
) -> Result<()> {
    const RENAME: &str = include_str!("../../../sql/query/poll_rename.sql");
    let now = table.to_string();
    let Some(other) = stored.find(|stored| *stored != now) else { return Ok(()) };
    let text = format!(
        "the checkpoint of relay {name:?} belongs to outbox {other}, but the configuration names \
         {now}: progress in one table says nothing about another"
    );
    Err(Error::refused(text).hint(format!(
        "correct outbox.table, or choose another name and run `watership init`; if the table was \
         renamed, run as the owner of the schema watership: {}",
        fill(
            &statement(RENAME),
            &[("old", &escape_literal(other)), ("new", &escape_literal(&now))]
        )
    )))
}

/// Refuses stored batches that would now be read through another table or other columns than those
/// that found them: some of their rows would be left out. A settled batch is not read again, so
/// only its table counts.
///
/// # Errors
/// A named verdict.
pub fn verify_made_with<'a>(
    name: &str,
    outbox: &Polled,
    (now, columns): (Option<MadeWith>, &[MappedColumn]),
    settled: Mark,
    stored: impl Iterator<Item = (Mark, &'a Option<MadeWith>)>,
) -> Result<()> {
    let Some(now) = now else { return Ok(()) };
    let told = |number: i32| {
        let column = columns.iter().find(|column| column.number == number);
        column.map_or_else(
            || format!("a column that is gone ({number})"),
            |c| format!("{:?}", c.name),
        )
    };
    let table = &outbox.table;
    for (batch, made_with) in stored {
        let Some(made_with) = *made_with else { continue };
        let number = batch.0;
        if made_with.table != now.table {
            let text = format!(
                "batch {number} of relay {name:?} was made with another table of the name {table} \
                 (OID {}, now {}): progress in one table says nothing about another",
                made_with.table, now.table
            );
            const ANY: &str = include_str!("../../../sql/query/poll_any_table.sql");
            let any = fill(&statement(ANY), &[("relay", escape_literal(name).trim_start())]);
            return Err(Error::named(Verdict::BatchUnreadable, text).hint(format!(
                "if the other table still exists under another name, correct outbox.table or \
                 rename it back; if this one has the same rows, numbers and transactions, as after \
                 a restore in the same cluster, run as the owner of the schema: {}; to skip what \
                 is in it now: {RESYNC}",
                any.trim()
            )));
        }
        let pairs = [
            ("order_by", made_with.order_by, now.order_by, &outbox.order_by),
            ("xid", made_with.xid, now.xid, &outbox.xid),
        ];
        let other = pairs.into_iter().find(|(_, then, now, _)| then != now);
        let Some((key, then, _, name_now)) = other.filter(|_| batch > settled) else { continue };
        let then = told(then);
        let text = format!(
            "batch {number} of relay {name:?} is not settled and was made with {then} as \
             outbox.{key}, but the configuration names {name_now:?}: ordered by that column, some \
             rows would be skipped"
        );
        return Err(Error::named(Verdict::BatchUnreadable, text).hint(format!(
            "set outbox.{key} back to {then}, let the relay settle what it has found, then change \
             it; if that is not possible, skip everything that is in the outbox now and start with \
             the next row: {RESYNC}"
        )));
    }
    Ok(())
}

/// A statement of `sql/query` in one line, for people.
fn statement(sql: &str) -> String {
    let lines = sql.lines().filter(|line| !line.starts_with("--"));
    lines.map(str::trim).collect::<Vec<_>>().join(" ")
}

/// What may be missing because it was not read in the time for which rows stay; nothing where that
/// is not known, or is not over. `age` is that of what is not passed.
pub fn unread_too_long(retained_for: Option<Duration>, age: Option<Duration>) -> Option<String> {
    let (retained_for, age) = (retained_for?, age?);
    (age > retained_for).then(|| {
        format!(
            "the outbox may have gone unread for {age:?}, longer than outbox.retained_for \
             ({retained_for:?}): rows that were deleted meanwhile were not sent"
        )
    })
}

/// The batches that are stored, from the settled one on, in order.
///
/// # Errors
/// A named verdict where one is missing.
pub fn verify_batches(name: &str, settled: Mark, stored: impl Iterator<Item = Mark>) -> Result<()> {
    let mut expected = settled.0;
    for number in stored {
        if number.0 != expected {
            return Err(batch_missing(name, expected));
        }
        expected += 1;
    }
    if expected == settled.0 {
        return Err(batch_missing(name, expected));
    }
    Ok(())
}

fn batch_missing(name: &str, number: u64) -> Error {
    let text = format!(
        "batch {number} of relay {name:?} is not in watership.poll_batch, so what was published \
         cannot be told from what was not"
    );
    Error::named(Verdict::BatchMissing, text).hint(format!(
        "find out who deleted it; to skip everything that is in the outbox now and start with the \
         next row: {RESYNC}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_index(columns: &[&str]) -> IndexColumns {
        (columns[0].to_owned(), columns.get(1).map(|name| (*name).to_owned()))
    }

    fn facts() -> PollFacts {
        let indexes =
            vec![own_index(&["id", "created_at"]), own_index(&["xid", "seq"]), own_index(&["seq"])];
        PollFacts {
            snapshot_ahead: false,
            foreign_rows: false,
            outbox: Polled::own(),
            indexes,
            mapped: None,
            unread_for: None,
        }
    }

    #[test]
    fn a_missing_batch_is_named() {
        let verify = |settled, stored: &[u64]| {
            verify_batches("shop", Mark(settled), stored.iter().map(|number| Mark(*number)))
        };
        assert!(verify(4, &[4]).is_ok() && verify(4, &[4, 5, 6]).is_ok());
        for (stored, missing) in [(&[][..], 4), (&[5], 4), (&[4, 6], 5)] {
            let error = verify(4, stored).expect_err("one is missing");
            assert_eq!(error.verdict(), Some(Verdict::BatchMissing));
            assert!(error.to_string().contains(&format!("batch {missing} ")), "{error}");
        }
    }

    #[test]
    fn transactions_of_another_cluster_are_a_verdict() {
        assert!(verify_transactions(&facts()).is_ok());
        let ahead = PollFacts { snapshot_ahead: true, ..facts() };
        let foreign = PollFacts { foreign_rows: true, ..facts() };
        let verdict = |facts| verify_transactions(&facts).expect_err("a verdict").verdict();
        assert_eq!(verdict(ahead), Some(Verdict::CheckpointAhead));
        assert_eq!(verdict(foreign), Some(Verdict::ForeignRows));
    }

    #[test]
    fn an_index_that_is_missing_is_told_with_its_statement() {
        assert!(verify_indexes(&facts()).is_ok());
        let wider = vec![own_index(&["xid", "seq"]), own_index(&["seq", "id"])];
        assert!(verify_indexes(&PollFacts { indexes: wider, ..facts() }).is_ok());
        let none = vec![own_index(&["id", "created_at"]), own_index(&["xid"])];
        let none = PollFacts { indexes: none, ..facts() };
        let error = verify_indexes(&none).expect_err("both are missing");
        assert!(error.to_string().contains("(xid, seq) and one on (seq)"), "{error}");
        assert!(error.hint_or_kind().contains("outbox (xid, seq); CREATE INDEX"), "{error:?}");
    }
    #[test]
    fn a_mapped_table_is_named_as_it_has_to_be_quoted() {
        let outbox = Polled {
            table: TableName::new("Shop", "outbox"),
            order_by: "the n".into(),
            xid: "xid".into(),
        };
        let foreign = PollFacts { foreign_rows: true, outbox: outbox.clone(), ..facts() };
        let told = verify_transactions(&foreign).expect_err("a verdict").text_with_hint();
        assert!(told.contains("Shop.outbox has rows"), "{told}");
        assert!(told.contains("UPDATE \"Shop\".\"outbox\" SET \"xid\" = '3' WHERE"), "{told}");
        assert!(told.contains("SET \"xid\" = pg_current_xact_id() WHERE \"xid\" >="), "{told}");
        let statements = missing_indexes(&outbox, &[], false).into_iter().map(|i| i.statement);
        assert_eq!(
            statements.collect::<Vec<_>>(),
            [
                "CREATE INDEX CONCURRENTLY ON \"Shop\".\"outbox\" (\"xid\", \"the n\")",
                "CREATE INDEX CONCURRENTLY ON \"Shop\".\"outbox\" (\"the n\")"
            ]
        );
    }

    #[test]
    fn batches_of_another_table_are_refused_with_what_to_do() {
        let table = TableName::new("public", "b");
        assert!(verify_table("shop", &table, ["public.b"; 2].into_iter()).is_ok());
        let error = verify_table("shop", &table, ["public.b", "public.a"].into_iter());
        let told = error.expect_err("another table").text_with_hint();
        assert!(
            told.contains("belongs to outbox public.a, but the configuration names public.b"),
            "{told}"
        );
        assert!(told.contains("SET outbox = 'public.b' WHERE outbox = 'public.a'"), "{told}");
    }

    #[test]
    fn what_was_not_read_while_rows_stay_is_told() {
        let told = |retained: Option<u64>, age: Option<u64>| {
            let [retained, age] = [retained, age].map(|seconds| seconds.map(Duration::from_secs));
            unread_too_long(retained, age).is_some()
        };
        assert!(told(Some(60), Some(61)));
        assert!(!told(Some(60), Some(60)) && !told(None, Some(61)) && !told(Some(60), None));
    }
}
