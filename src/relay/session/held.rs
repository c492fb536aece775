//! What is said and recorded of captured tables with `on_table_lost = "hold"` when a session
//! starts: which are gone, which are back, and what may be missing of these.

use tokio_postgres::Client;

use super::Shared;
use super::catalog::Gone;
use crate::error::Result;
use crate::pg::publication::TableName;
use crate::position::Lsn;
use crate::relay::Options;
use crate::relay::check::lost::{Agreed, Returned};
use crate::relay::checkpoint::{self, Checkpoint};
use crate::relay::status::{LostTable, ReturnedTable};
use crate::verdict::Verdict;

/// Records in `watership.resync` that changes of a table may be missing, as for a gap that a person
/// accepted: by `on_table_lost = "hold"` it was accepted beforehand.
///
/// # Errors
/// The server's.
pub(super) async fn record(
    client: &Client,
    options: &Options,
    row: &Checkpoint,
    back: &Returned,
) -> Result<()> {
    let Returned { table, from, to, .. } = back;
    let reason = format!(
        "on_table_lost = \"hold\": {table} was not in publication {:?} under its name",
        options.publication
    );
    let gap = checkpoint::Gap { verdict: Verdict::TableRemoved, from: *from, to: *to };
    checkpoint::record_gap(client, &options.name, row, &gap, &reason).await
}

/// Logs what is news, and shows all of it in status and metrics.
pub(super) fn tell(shared: &Shared, agreed: &Agreed, returned: &[Returned], gone: Vec<Gone>) {
    let since = |table: &TableName| {
        agreed.lost(table).map_or(Lsn::ZERO, |lost| Lsn(lost.since)).to_string()
    };
    let lost = gone.into_iter().map(|Gone { table, why, .. }| LostTable {
        since_lsn: since(&table),
        reason: why.to_string(),
        hint: why.hint_or_kind().to_owned(),
        table: table.to_string(),
    });
    for table in shared.status.lost_tables(lost.collect()) {
        let LostTable { table, reason, hint, since_lsn } = table;
        tracing::error!(
            table,
            since_lsn,
            hint,
            "{reason}: its changes are not published from now on (on_table_lost = \"hold\"), the \
             other tables and the outbox are"
        );
    }
    for back in returned {
        let Returned { table, from, to, differs } = back;
        tracing::warn!(
            %table,
            from_lsn = %from,
            to_lsn = %to,
            differs,
            "a captured table is back and its changes are published again; changes committed \
             between from_lsn and to_lsn while it was out of the publication, or had another name, \
             were not published (recorded in watership.resync)"
        );
        shared.status.returned_table(ReturnedTable {
            table: table.to_string(),
            from_lsn: from.to_string(),
            to_lsn: to.to_string(),
            differs: differs.clone(),
        });
    }
    shared.held.set(|table| agreed.lost.iter().any(|lost| lost.table.to_string() == table));
}
