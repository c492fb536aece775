//! Whether a relay that polls may go on from its checkpoint. Pure.
//!
//! Checkpoint and batches are rows of the same database as the outbox, so what goes back in time
//! takes them along: after a failover or a restore they are a true account of a moment before it,
//! and only the epoch has to be another one, because the numbers of batches are used again. What is
//! left is what a snapshot cannot be compared with: the transaction ids of another cluster.

use crate::error::{Error, Result};
use crate::pg::slot::ServerFacts;
use crate::position::Mark;
use crate::relay::checkpoint::Checkpoint;
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
    /// The first two columns of each valid index on the outbox: `xid, seq`.
    pub indexes: Vec<String>,
}

/// What finds the rows of a batch, as `PollFacts` has it, and the statement that makes it.
pub const INDEXES: [(&str, &str); 2] = [
    ("xid, seq", "CREATE INDEX outbox_by_xid ON watership.outbox (xid, seq)"),
    ("seq", "CREATE INDEX outbox_by_seq ON watership.outbox (seq)"),
];

/// Compares the checkpoint with the server.
///
/// # Errors
/// [`crate::error::Kind::Unreachable`] for a standby, else a named verdict.
pub fn verify(row: &Checkpoint, server: &ServerFacts) -> Result<PollingFrom> {
    if server.in_recovery {
        return Err(Error::unreachable("the server is a standby (in recovery)")
            .hint("wait if it is about to be promoted; otherwise name the primary in source.url"));
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
        let text = "watership.outbox has rows of transactions that this cluster has not had yet: \
            they were copied from another one, and would be published when it gets there";
        return Err(Error::named(Verdict::ForeignRows, text).hint(adopt()));
    }
    Ok(())
}

/// What marks rows of another cluster as passed, or sends them (again), as the outbox's owner.
fn adopt() -> String {
    const SQL: &str = include_str!("../../../sql/query/poll_adopt.sql");
    let lines = SQL.lines().filter(|line| !line.starts_with("--"));
    let statement = lines.map(str::trim).collect::<Vec<_>>().join(" ");
    let sent = statement.replace("SET xid = '3'", "SET xid = pg_current_xact_id()");
    format!("to leave them unsent: {statement}; to send them (again), with their ids: {sent}")
}

/// What is wrong with the indexes of the outbox: each look would read all of it.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with the statements.
pub fn verify_indexes(facts: &PollFacts) -> Result<()> {
    let missing = missing_indexes(facts);
    if missing.is_empty() {
        return Ok(());
    }
    let (columns, statements): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
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

/// Those of [`INDEXES`] that are not there.
pub fn missing_indexes(facts: &PollFacts) -> Vec<(&'static str, &'static str)> {
    let is_there = |columns: &str| {
        let prefixed = format!("{columns}, ");
        facts.indexes.iter().any(|index| index == columns || index.starts_with(&prefixed))
    };
    INDEXES.into_iter().filter(|(columns, _)| !is_there(columns)).collect()
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
        "batch {number} of relay {name:?} is missing in watership.poll_batch, so what was \
         published cannot be told from what was not"
    );
    Error::named(Verdict::BatchMissing, text).hint(format!(
        "find out who deleted it; to begin again behind what is in the outbox now: {RESYNC}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> PollFacts {
        let indexes = ["id, created_at", "xid, seq", "seq"].map(str::to_owned).into();
        PollFacts { snapshot_ahead: false, foreign_rows: false, indexes }
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
        let wider = ["xid, seq", "seq, id"].map(str::to_owned).into();
        assert!(verify_indexes(&PollFacts { indexes: wider, ..facts() }).is_ok());
        let none = PollFacts { indexes: vec!["id, created_at".into(), "xid".into()], ..facts() };
        let error = verify_indexes(&none).expect_err("both are missing");
        assert!(error.to_string().contains("(xid, seq) and one on (seq)"), "{error}");
        assert!(error.hint_or_kind().contains("outbox (xid, seq); CREATE INDEX"), "{error:?}");
    }
}
