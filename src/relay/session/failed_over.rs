//! What is said and recorded of parked rows when the stream continues on a promoted server.

use tokio_postgres::Client;

use super::Shared;
use crate::error::Result;
use crate::relay::check::position::Failover;
use crate::relay::checkpoint::{self, Checkpoint, Gap};
use crate::relay::parking::Parking;
use crate::relay::{Kept, Options};
use crate::verdict::Verdict;

/// Lines about single rows, at most.
const LOGGED_MAX: usize = 20;

/// Logs and records the range of which the promoted server lacks what was parked.
///
/// # Errors
/// The server's.
pub(super) async fn record(
    client: &Client,
    options: &Options,
    row: &Checkpoint,
    failover: &Failover,
) -> Result<()> {
    let (from, to) = (failover.parked_until, failover.flush_lsn);
    if from >= to {
        return Ok(());
    }
    tracing::warn!(
        from_lsn = %from,
        to_lsn = %to,
        hint = "the old primary, if it can still be read, has them in watership.parked",
        "the promoted server has the slot's position, but not the last checkpoints before it: rows \
         that were parked for transactions of this range are not in watership.parked; it is \
         recorded in watership.resync"
    );
    let reason = "failover: rows that were parked in this range may not be in watership.parked";
    let gap = Gap { verdict: Verdict::TimelineChanged, from, to };
    checkpoint::record_gap(client, &options.name, row, &gap, reason).await
}

/// Logs and counts what this process did that the promoted server lacks: events that it published,
/// and rows that it parked.
pub(super) fn tell(
    failover: &Failover,
    epoch: u32,
    kept: &mut Kept,
    parking: &Parking,
    shared: &Shared,
) {
    let phantoms = kept.published.take_beyond(failover.switch);
    shared.metrics.wal.phantom_suspected.increment(phantoms);
    tracing::warn!(
        timeline = failover.timeline,
        switch = %failover.switch,
        from = %failover.flush_lsn,
        phantoms,
        epoch,
        "a standby was promoted: the stream continues from its slot in a new epoch; phantoms are \
         events that were published and then rolled back"
    );
    let (from, to) = (failover.parked_until, failover.flush_lsn);
    let missing = kept.parked.take_missing(from, to, |key| parking.is_stored(key));
    shared.metrics.parked.lost.increment(missing.len() as u64);
    for key in missing.iter().take(LOGGED_MAX) {
        tracing::error!(
            position = %key.position,
            route = &*key.route,
            "a parked row was lost by the failover: the promoted server lacks it, and its event \
             does not come again"
        );
    }
    if from < to {
        tracing::warn!(
            lost = missing.len(),
            "parked rows of this process that the promoted server lacks; how many an earlier \
             process parked is not known"
        );
    }
}
