//! After a gap: which of its events are still in the outbox, and how to emit them again.
//!
//! What a row does not say is where in the WAL it was committed, so this goes by time, and rather
//! takes too many: they keep their ids, so consumers drop what they have already.

use serde::Serialize;
use tokio_postgres::Client;

use super::{Out, outbox};
use crate::config::Config;
use crate::error::Result;
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;

/// Rows that are counted.
const COUNT_MAX: i64 = 1_000_000;

/// Rows of the gap.
#[derive(Debug, Serialize)]
pub(super) struct GapRows {
    /// How many there are; more than a million count as a million.
    rows: i64,
    /// From when they are.
    since: String,
    /// The same; no row of the gap was made later.
    until: String,
    /// The table, where it is the application's.
    mapped: Option<String>,
}

/// From when on rows may be in the gap; to be asked before the checkpoint is moved. Absent without
/// a checkpoint.
///
/// # Errors
/// The server's.
pub(super) async fn since(client: &Client, name: &str) -> Result<Option<String>> {
    const SQL: &str = include_str!("../../sql/query/outbox_gap_since.sql");
    let row = unnamed::query_opt(client, SQL, &[&name]).await.map_err(postgres_error)?;
    row.map(|row| row.try_get(0).map_err(postgres_error)).transpose()
}

/// Counts them.
///
/// # Errors
/// The server's: an outbox without the index for it may take longer than a query is allowed to.
pub(super) async fn count(client: &Client, config: &Config, since: &str) -> Result<GapRows> {
    const SQL: &str = include_str!("../../sql/query/outbox_gap_rows.sql");
    if let Some((rows, until)) = outbox::count_since(client, config, since, COUNT_MAX).await? {
        let mapped = Some(config.relay.outbox.table.to_string());
        return Ok(GapRows { rows, since: since.to_owned(), until, mapped });
    }
    let row =
        unnamed::query_one(client, SQL, &[&since, &COUNT_MAX]).await.map_err(postgres_error)?;
    let rows = row.try_get(0).map_err(postgres_error)?;
    let until = row.try_get(1).map_err(postgres_error)?;
    Ok(GapRows { rows, since: since.to_owned(), until, mapped: None })
}

impl GapRows {
    /// One line.
    pub(super) fn say(&self) -> String {
        let GapRows { rows, since, .. } = self;
        let more = if *rows >= COUNT_MAX { " or more" } else { "" };
        format!(
            "{rows}{more} outbox rows since {since} (10 minutes before the checkpoint was stored) \
             are still there; not all of them need be missing"
        )
    }

    /// The statement that emits them again under the same ids.
    fn statement(&self) -> String {
        const SQL: &str = include_str!("../../sql/query/outbox_emit_again.sql");
        let lines: Vec<&str> = SQL.lines().filter(|line| !line.starts_with("--")).collect();
        let times = [("$1", &self.since), ("$2", &self.until)];
        times.iter().fold(lines.join("\n"), |sql, (parameter, time)| {
            sql.replace(parameter, &format!("'{time}'"))
        })
    }

    /// Prints what can be done about them.
    pub(super) fn print_statement(&self, out: Out) {
        let gone = "Events of the gap that were emitted by emit_wal are not kept anywhere else";
        out.line(&format!("\n{gone} and cannot be sent again."));
        if self.rows == 0 {
            return;
        }
        if let Some(table) = &self.mapped {
            return out.line(&format!(
                "\nTo send rows of {table} made from {} to {} again, with their ids: delete and \
                 insert each in one transaction (where the table is polled, without the columns \
                 of outbox.order_by and outbox.xid). The relay ignores the delete and sends the \
                 insert; consumers drop by id what they have already. Changes of captured tables \
                 cannot be sent again.",
                self.since, self.until
            ));
        }
        out.line(&format!(
            "\nTo send them again, with their ids, as superuser:\n\n{};\n\n\
             Consumers drop by id what they have already. Transactions that ran for more than 10 \
             minutes may have older rows: set the first time accordingly. Changes of captured \
             tables cannot be sent again.",
            self.statement()
        ));
    }
}
