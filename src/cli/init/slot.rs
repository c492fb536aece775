//! Where a relay that reads the WAL begins: its slot, its checkpoint, and what is in the way.

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::Client;

use super::{Args, Done, Steps, agree};
use crate::cli::print_warning;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::Options;
use crate::pg::publication::Publication;
use crate::pg::slot::{ServerFacts, SlotState, WalStatus};
use crate::pg::slot::{create_slot, drop_slot, read_slot};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::Lsn;
use crate::relay::check::position;
use crate::relay::checkpoint::{self, NewCheckpoint};
use crate::relay::session::{facts, wal};
use crate::source::SourceKind;
use crate::verdict::Verdict;

/// Which of slot and checkpoint exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// Both, and the relay may resume.
    Both {
        /// Where the slot is.
        slot: Option<Lsn>,
        /// Where the checkpoint is.
        checkpoint: Lsn,
    },
    /// A slot that begins here, and no checkpoint.
    Slot(Lsn),
    /// Neither.
    Neither,
}

/// Finds out where the relay begins, and refuses what prevents that. `installed` says whether the
/// schema exists; if not, no checkpoint can be read.
///
/// # Errors
/// A named verdict, [`Kind::Refused`], [`Kind::Busy`] or [`Kind::Config`] with what to do; the
/// server's.
pub(super) async fn begin(
    client: &Client,
    config: &Config,
    server: &ServerFacts,
    installed: bool,
) -> Result<Begin> {
    let name = &config.relay.slot;
    let row = match installed {
        true => checkpoint::read(client, &config.relay.name).await?,
        false => None,
    };
    row.iter().try_for_each(|row| checkpoint::is_of(row, &config.relay.name, SourceKind::Wal))?;
    if let Some(row) = &row
        && row.slot != *name
    {
        let text = format!(
            "the checkpoint of relay {:?} belongs to slot {:?}, but source.slot is {name:?}",
            config.relay.name, row.slot
        );
        return Err(Error::named(Verdict::OtherSlot, text)
            .hint("set source.slot to that slot, or choose another name for a new relay"));
    }
    if installed {
        refuse_shared_slot(client, config).await?;
    }
    match (read_slot(client, name).await?, row) {
        (slot, Some(row)) => {
            verify_position(client, config).await?;
            let slot = slot.and_then(|slot| slot.confirmed_flush_lsn);
            Ok(Begin::Both { slot, checkpoint: row.flush_lsn })
        }
        (Some(slot), None) => Ok(Begin::Slot(check_fresh_slot(&slot, server)?)),
        (None, None) => Ok(Begin::Neither),
    }
}

/// Creates whichever of the two is missing.
///
/// # Errors
/// As [`begin`], and where rows of the outbox would stay unpublished.
pub(super) async fn slot_and_checkpoint(
    steps: &mut Steps,
    (client, admin): (&Client, &Options),
    config: &Config,
    args: &Args,
    server: &ServerFacts,
    publication: &Publication,
) -> Result<()> {
    let name = &config.relay.slot;
    let detail = |at: Option<Lsn>| format!("{name} at {}", at.unwrap_or(Lsn::ZERO));
    let begin = begin(client, config, server, true).await?;
    if let Some(rows) = older_rows(client, config, args.skip_existing, begin).await? {
        steps.add(Done::Skipped, "outbox", rows);
    }
    let consistent_point = match begin {
        Begin::Both { slot, checkpoint } => {
            steps.add(Done::Exists, "slot", detail(slot));
            let at = format!("{} at {checkpoint}", config.relay.name);
            steps.add(Done::Exists, "checkpoint", at);
            return agree(steps, client, config).await;
        }
        Begin::Slot(point) => {
            steps.add(Done::Exists, "slot", detail(Some(point)));
            point
        }
        Begin::Neither => {
            let point = create_slot_without_gap((client, admin), config, args).await?;
            steps.add(Done::Created, "slot", detail(Some(point)));
            point
        }
    };
    let new = NewCheckpoint {
        name: config.relay.name.clone(),
        slot: name.clone(),
        publication: publication.name.clone(),
        publication_oid: publication.oid,
        consistent_point,
        system_id: server.system_identifier,
        timeline: server.timeline,
    };
    let created = checkpoint::create(client, &new).await?;
    let done = if created { Done::Created } else { Done::Exists };
    steps.add(done, "checkpoint", format!("{} at {consistent_point}", config.relay.name));
    agree(steps, client, config).await
}

/// Fails when the relay may not resume from its checkpoint.
async fn verify_position(client: &Client, config: &Config) -> Result<()> {
    let found = facts::read(client, &config.relay).await?;
    let history = wal::ancestors_for(&config.relay.sql, &found).await?;
    let (row, slot, server) = found.position();
    position::verify(row, server, slot, &history).map(drop)
}

async fn refuse_shared_slot(client: &Client, config: &Config) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/checkpoint_of_slot.sql");
    let slot = &config.relay.slot;
    let row = unnamed::query_opt(client, SQL, &[slot, &config.relay.name])
        .await
        .map_err(postgres_error)?;
    match row {
        None => Ok(()),
        Some(row) => Err(Error::config(format!(
            "slot {slot:?} belongs to relay {:?}, but this relay is {:?}",
            row.get::<_, String>(0),
            config.relay.name
        ))
        .hint("each relay needs its own slot: set source.slot to a name that is not in use")),
    }
}

/// A slot without a checkpoint: created by hand, or by an `init` that was interrupted.
fn check_fresh_slot(slot: &SlotState, server: &ServerFacts) -> Result<Lsn> {
    let name = &slot.name;
    let fits = slot.plugin.as_deref() == Some("pgoutput")
        && slot.database.as_deref() == Some(&*server.database)
        && !slot.temporary
        && !slot.two_phase
        && slot.wal_status != Some(WalStatus::Lost);
    match slot.confirmed_flush_lsn {
        Some(_) if fits && let Some(pid) = slot.active_pid => {
            let text = format!("slot {name:?} has no checkpoint, and pid {pid} reads it");
            Err(Error::new(Kind::Busy, text).hint(
                "stop that reader if this relay is to use the slot, or set another source.slot",
            ))
        }
        Some(point) if fits => Ok(point),
        None if fits && let Some(pid) = slot.active_pid => {
            let text = format!(
                "slot {name:?} is being created by pid {pid}, perhaps for an `init` that was \
                 interrupted; it waits for open transactions to end"
            );
            Err(Error::new(Kind::Busy, text).hint("end those transactions, then run init again"))
        }
        Some(_) | None => Err(Error::refused(format!(
            "slot {name:?} is the wrong kind ({}, wal_status {}); expected a permanent pgoutput \
             slot of database {:?}",
            slot.kind(),
            slot.wal_status.map_or("none", WalStatus::as_str),
            server.database
        ))
        .hint("set source.slot to another name")),
    }
}

/// Counting stops here; a larger number would tell nothing new.
const COUNT_MAX: i64 = 1_000_000;

pub(super) async fn count_rows(client: &Client, config: &Config) -> Result<i64> {
    const SQL: &str = include_str!("../../../sql/query/outbox_count.sql");
    let outbox = &config.relay.outbox;
    if outbox.is_mapped() {
        return pg::outbox::count(client, &outbox.table, COUNT_MAX).await;
    }
    Ok(unnamed::query_one(client, SQL, &[&COUNT_MAX]).await.map_err(postgres_error)?.get(0))
}

/// Rows of the outbox that a relay which begins here would not send: `None` if there are none,
/// otherwise what to say about them if they may be skipped.
///
/// # Errors
/// [`Kind::Refused`] where they may not be skipped; the server's.
pub(super) async fn older_rows(
    client: &Client,
    config: &Config,
    skip: bool,
    begin: Begin,
) -> Result<Option<String>> {
    match begin {
        Begin::Both { .. } => Ok(None),
        Begin::Neither => rows_before(client, config, skip, "the slot").await,
        Begin::Slot(point) => {
            let Some(rows) = some_rows(client, config).await? else { return Ok(None) };
            let (table, slot) = (&config.relay.outbox.table, &config.relay.slot);
            let text = format!(
                "{table} has {rows}, and slot {slot:?} has no checkpoint: rows committed before \
                 {point} will not be sent, and it is not known whether they already were; later \
                 rows will be sent, some perhaps again"
            );
            if skip {
                return Ok(Some(text));
            }
            Err(Error::refused(text).hint(
                "if that is right, pass --skip-existing; otherwise emit again what was not sent, \
                 or empty the outbox first",
            ))
        }
    }
}

/// The same without slot and checkpoint; `begin` says where the relay begins.
pub(super) async fn rows_before(
    client: &Client,
    config: &Config,
    skip: bool,
    begin: &str,
) -> Result<Option<String>> {
    let Some(rows) = some_rows(client, config).await? else { return Ok(None) };
    if skip {
        return Ok(Some(format!("{rows} older than {begin}")));
    }
    Err(Error::refused(format!(
        "{} has {rows} that are older than {begin}; any not published yet never will be",
        config.relay.outbox.table
    ))
    .hint("pass --skip-existing to leave them unpublished, or empty the outbox first"))
}

/// How many rows the outbox has, in words.
async fn some_rows(client: &Client, config: &Config) -> Result<Option<String>> {
    Ok(match count_rows(client, config).await? {
        0 => None,
        COUNT_MAX => Some(format!("{COUNT_MAX} rows or more")),
        count => Some(format!("{count} rows")),
    })
}

/// A slot waits for all transactions that were open when it was begun, for minutes if need be. From
/// a session of its own, which is told nothing else; what it cannot find out stays unsaid.
async fn tell_for_whom_it_waits(admin: &Options, pid: i32) -> Infallible {
    const SQL: &str = include_str!("../../../sql/query/slot_waits_for.sql");
    const EVERY: Duration = Duration::from_secs(2);
    let (mut told, mut session) = (None, None);
    loop {
        sleep(EVERY).await;
        if session.is_none() {
            session = sql(admin).await.ok();
        }
        let Some(SqlConnection { client, .. }) = &session else { continue };
        let Ok(row) = unnamed::query_one(client, SQL, &[&pid]).await else {
            session = None;
            continue;
        };
        let others: Option<String> = row.get(0);
        if let Some(others) = &others
            && told.as_ref() != Some(others)
        {
            print_warning(&format!(
                "the slot waits for open transactions to end: {others}; end them, or wait"
            ));
        }
        told = others;
    }
}

/// Creates the slot. A row that commits between the count and the slot's consistent point would be
/// missed silently; so if rows have appeared meanwhile, the slot is dropped again.
async fn create_slot_without_gap(
    (client, admin): (&Client, &Options),
    config: &Config,
    args: &Args,
) -> Result<Lsn> {
    let name = &config.relay.slot;
    let pid = unnamed::query_one(client, "SELECT pg_catalog.pg_backend_pid()", &[]).await;
    let pid: i32 = pid.map_err(postgres_error)?.get(0);
    let point = tokio::select! {
        biased;
        point = create_slot(client, name, config.failover) => point?,
        never = tell_for_whom_it_waits(admin, pid) => match never {},
    };
    if args.skip_existing || count_rows(client, config).await? == 0 {
        return Ok(point);
    }
    drop_slot(client, name).await?;
    Err(Error::refused("an application wrote to the outbox while the slot was being created").hint(
        "stop the application and empty the outbox, or pass --skip-existing to leave its rows \
         unpublished",
    ))
}
