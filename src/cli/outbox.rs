//! What commands say of an outbox table that is the application's: `check`, `find` and `resync`.

use tokio_postgres::{Client, Row};

use super::find;
use super::findings::Findings;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg::outbox as table;
use crate::pg::outbox::FindColumns;
use crate::pg::publication::Publication;
use crate::relay::check::outbox as mapping;
use crate::relay::check::publishable::{Harm, Obstacle, obstacles};
use crate::relay::session::outbox;
use crate::source::SourceKind;
use crate::source::outbox::AggregateType;

/// Adds its findings: the table must fit its mapping. Returns whether it does.
///
/// # Errors
/// The server's.
pub(super) async fn check(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    publication: Option<&Publication>,
) -> Result<bool> {
    let (options, table) = (&config.relay, &config.relay.outbox);
    let mapped = match outbox::read(client, options, None).await {
        Ok(Some(mapped)) => mapped,
        Ok(None) => return Ok(true),
        Err(error) if error.kind() == Kind::Refused => {
            f.error("outbox", &error);
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    let before = f.problems();
    let found = mapped.found();
    for (what, hint) in mapping::faults(table, found, publication, options.kind) {
        f.problem("outbox", what, hint);
    }
    let deletes = options.delete_after.is_some();
    if let Some((what, hint)) = mapping::slow(table, &mapped.columns, deletes) {
        f.warning("outbox", what, hint);
    }
    let published = match options.kind {
        SourceKind::Wal => obstacles(&mapped.facts, publication),
        SourceKind::Poll => Vec::new(),
    };
    for Obstacle { harm, what, hint } in published {
        match harm {
            Harm::Less | Harm::Partly => f.warning("outbox", what, hint),
            Harm::Absent | Harm::Breaks => f.problem("outbox", what, hint),
            // It is among the faults.
            Harm::Impossible => {}
        }
    }
    let fits = f.problems() == before;
    if fits {
        let kept = match options.delete_after {
            Some(_) => "rows older than outbox.delete_after are deleted",
            None => "the relay never deletes its rows",
        };
        f.ok("outbox", format!("{}, mapped; {kept}", table.table));
    }
    Ok(fits)
}

/// Rows of the table with the wanted id or key, in the form of `find_outbox.sql`. Absent for the
/// relay's own outbox.
///
/// # Errors
/// The server's, or [`crate::error::Kind::Refused`] when the table is not there.
pub(super) async fn rows(
    client: &Client,
    config: &Config,
    args: &find::Args,
    most: i64,
) -> Result<Option<Vec<Row>>> {
    let options = &config.relay;
    let Some(mapped) = outbox::read(client, options, None).await? else { return Ok(None) };
    mapping::fits(&options.outbox, mapped.found(), None, options.kind)?;
    let names = &options.outbox.columns;
    let is_uuid = |name: &str| {
        let column = mapped.columns.iter().find(|column| column.name == name);
        column.is_some_and(|column| column.base_oid == crate::column::oid::UUID)
    };
    let columns = FindColumns {
        table: &options.outbox.table,
        id: (&names.id, is_uuid(&names.id)),
        aggregate_type: match &names.aggregate_type {
            AggregateType::Column(name) => Ok(name),
            AggregateType::Constant(text) => Err(text),
        },
        aggregate_id: &names.aggregate_id,
        event_type: &names.event_type,
        created_at: mapping::time_column(&options.outbox, &mapped.columns).map(|(name, _)| name),
        xid: options.outbox.xid.as_deref(),
    };
    let key = args.key.as_deref();
    table::find(client, columns, &options.name, args.id, key, most).await.map(Some)
}

/// How many rows of the table were made since `since`, at most `most`, and the time now; `None`
/// for the relay's own outbox.
///
/// # Errors
/// The server's, or [`crate::error::Kind::Refused`] when the table tells no time.
pub(super) async fn count_since(
    client: &Client,
    config: &Config,
    since: &str,
    most: i64,
) -> Result<Option<(i64, String)>> {
    let options = &config.relay;
    let Some(mapped) = outbox::read(client, options, None).await? else { return Ok(None) };
    let Some(created_at) = mapping::time_column(&options.outbox, &mapped.columns) else {
        let text = format!("{} has no column with the time of an event", options.outbox.table);
        return Err(Error::refused(text).hint("set outbox.columns.created_at"));
    };
    let table = &options.outbox.table;
    table::count_since(client, table, created_at, since, most).await.map(Some)
}
