//! Deletes old rows of an outbox table that is the application's, where `delete_after` asks for it.
//!
//! Invariant: no row is deleted before the stored checkpoint of every relay has passed it. A row
//! does not say where in the WAL it was committed. So the end of the WAL is noted together with the
//! oldest transaction that is open then; what had ended by then lies before the note. Once the
//! checkpoints, as they are stored, have passed it, such rows may go if they are old. The note is
//! kept in memory: after a restart a new one is taken, and nothing is deleted for it before the
//! checkpoints have passed that.
//!
//! Of a table that is polled a row does say in which snapshots it is visible. So relays that read
//! the WAL have to pass the note, and the last settled batch of every relay that polls the table
//! must show the row. A relay that reads the WAL leaves the rows alone while one polls.

use std::time::Duration;

use tokio_postgres::Client;

use crate::error::Result;
use crate::metrics::Metrics;
use crate::pg::outbox::{Passed, PassedNote, delete_passed, note_passed, polled_snapshots};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::Options;
use crate::relay::check::outbox::time_column;
use crate::relay::session::outbox;
use crate::source::SourceKind;

/// Rows of one DELETE, in a table or in each of its partitions.
const ROWS_MAX: i64 = 1000;
/// Portions in one go.
const PORTIONS_MAX: u32 = 10;
/// When there is nothing more to delete.
const LATER: Duration = Duration::from_secs(60);
/// When there is, or when the checkpoint has to come first.
const SOON: Duration = Duration::from_secs(1);

/// What is waited for.
#[derive(Debug, Default)]
pub(super) struct PassedRows {
    note: Option<PassedNote>,
}

impl PassedRows {
    /// A bounded piece of it. Returns when to come again.
    pub(super) async fn delete(
        &mut self,
        client: &Client,
        options: &Options,
        metrics: &Metrics,
    ) -> Result<Duration> {
        let Some(age) = options.delete_after else { return Ok(LATER) };
        let Some(note) = &self.note else {
            let seconds = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
            self.note = Some(note_passed(client, seconds).await?);
            return Ok(SOON);
        };
        let polls = options.kind == SourceKind::Poll;
        if !every_relay_passed(client, &note.lsn, polls).await? {
            return Ok(SOON);
        }
        let Some(mapped) = outbox::read(client, options, None).await? else { return Ok(LATER) };
        // Without the column the next session refuses to start, and says so.
        let Some(time) = time_column(&options.outbox, &mapped.columns) else { return Ok(LATER) };
        let table = &options.outbox.table;
        let snapshots = match polls {
            true => polled_snapshots(client, table).await?,
            false => None,
        };
        let polled = options.outbox.xid.as_deref().zip(snapshots.as_deref());
        if polls && polled.is_none() {
            return Ok(SOON);
        }
        for _ in 0..PORTIONS_MAX {
            let passed = Passed { note, polled };
            let deleted = delete_passed(client, table, time, passed, ROWS_MAX).await?;
            metrics.outbox.rows_deleted.increment(deleted);
            if deleted < ROWS_MAX.unsigned_abs() {
                self.note = None;
                return Ok(LATER);
            }
        }
        Ok(SOON)
    }
}

async fn every_relay_passed(client: &Client, lsn: &str, polls: bool) -> Result<bool> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_passed.sql");
    let row = unnamed::query_one(client, SQL, &[&lsn, &polls]).await.map_err(postgres_error)?;
    row.try_get(0).map_err(postgres_error)
}
