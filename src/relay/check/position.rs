//! Whether a relay may go on from its checkpoint: pure comparisons, each with a named verdict.
//!
//! Invariant: never start behind a gap. The row is written before the slot is told, so the slot can
//! never rightly be ahead of it; LSNs are compared only on one timeline; the publication is the one
//! that was last agreed to. Whatever cannot be explained is a verdict that names the WAL range and
//! the command by which a person accepts it.

use crate::error::{Error, Result};
use crate::pg::publication::{Publication, PublishedTable, TableName};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus};
use crate::position::{Lsn, Mark};
use crate::relay::checkpoint::Checkpoint;
use crate::verdict::{RESYNC, Verdict};

/// How the relay continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From the checkpoint, as it is.
    AsStored,
    /// A standby with a copy of the slot was promoted: in a new epoch.
    Failover(Failover),
}

/// Where the stream continues after a failover with a synchronised slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failover {
    /// The timeline of the promoted server.
    pub timeline: u32,
    /// Where it left the timeline of the checkpoint.
    pub switch: Lsn,
    /// Commit LSN of the last settled event that both timelines have.
    pub mark: Mark,
    /// Its number in its transaction.
    pub ordinal: u64,
    /// Its number there.
    pub sub: u32,
    /// Where the stream begins.
    pub flush_lsn: Lsn,
    /// How far the checkpoint is that the promoted server has, with the rows that were parked up
    /// to there. If the stream begins later, the server lacks what was parked in between.
    pub parked_until: Lsn,
}

/// Compares the checkpoint with the server and the slot. `history` lists the ancestors of the
/// server's timeline with the LSN at which each ended, oldest first; needed only on another
/// timeline than the checkpoint's.
///
/// # Errors
/// [`crate::error::Kind::Unreachable`] for a standby, else a named verdict. The order is that of
/// certainty: another cluster explains everything that would come after it.
pub fn verify(
    row: &Checkpoint,
    server: &ServerFacts,
    slot: Option<&SlotState>,
    history: &[(u32, Lsn)],
) -> Result<Start> {
    if server.in_recovery {
        return Err(Error::unreachable("the server is a standby (in recovery)").hint(
            "wait if it is about to be promoted; otherwise point source.url at the primary",
        ));
    }
    if server.wal_level != "logical" {
        let text =
            format!("wal_level is {:?}, logical replication needs \"logical\"", server.wal_level);
        return Err(Error::named(Verdict::WalLevel, text)
            .hint("ALTER SYSTEM SET wal_level = 'logical', then restart Postgres"));
    }
    if server.system_identifier != row.system_id {
        let (now, then) = (server.system_identifier, row.system_id);
        let text = format!("this is another cluster: its system identifier is {now}, not {then}");
        return Err(gap(Verdict::OtherCluster, text, row.flush_lsn, server.wal_lsn)
            .hint(format!("check source.url; if the move was intended: {RESYNC}")));
    }
    if server.timeline != row.timeline {
        return failover(row, server, slot, history).map(Start::Failover);
    }
    if row.flush_lsn > server.wal_lsn {
        let (stored, now) = (row.flush_lsn, server.wal_lsn);
        let text = format!(
            "the checkpoint ({stored}) is ahead of the server's WAL ({now}): an older state was \
             restored; what was published between {now} and {stored} does not exist here"
        );
        return Err(Error::named(Verdict::CheckpointAhead, text)
            .hint(format!("check source.url; if the restore was intended: {RESYNC}")));
    }
    let slot = slot.ok_or_else(|| missing(row, server))?;
    check_slot(row, server, slot)?;
    match slot.confirmed_flush_lsn {
        Some(confirmed) if confirmed > row.flush_lsn => Err(ahead(row, slot, confirmed)),
        Some(_) | None => Ok(Start::AsStored),
    }
}

/// A verdict about a range of the WAL.
fn gap(verdict: Verdict, text: impl std::fmt::Display, from: Lsn, to: Lsn) -> Error {
    Error::named(
        verdict,
        format!(
            "{text}; events committed between {from} and {to} may not have been published by this \
             relay"
        ),
    )
}

fn missing(row: &Checkpoint, server: &ServerFacts) -> Error {
    let text = format!("replication slot {:?} does not exist", row.slot);
    gap(Verdict::SlotMissing, text, row.flush_lsn, server.wal_lsn).hint(format!(
        "find out who dropped it; do not recreate it by hand. To accept the gap and resume \
         with a new slot: {RESYNC}"
    ))
}

/// What a slot must be, wherever it stands.
pub(super) fn check_slot(row: &Checkpoint, server: &ServerFacts, slot: &SlotState) -> Result<()> {
    let name = &row.slot;
    if slot.plugin.as_deref() != Some("pgoutput")
        || slot.database.as_deref() != Some(&*server.database)
        || slot.temporary
        || slot.two_phase
    {
        let text = format!(
            "slot {name:?} is of the wrong kind: {}; expected a permanent pgoutput slot of \
             database {:?}",
            slot.kind(),
            server.database
        );
        return Err(Error::named(Verdict::SlotUnfit, text).hint(format!(
            "Watership did not create it: if nobody needs it, drop it, then run {RESYNC}"
        )));
    }
    if slot.wal_status == Some(WalStatus::Lost) {
        let reason = slot.invalidation_reason.as_deref().unwrap_or("max_slot_wal_keep_size");
        let text = format!("slot {name:?} is lost ({reason}): WAL that it needs was removed");
        let first = match reason {
            "wal_removed" | "max_slot_wal_keep_size" => "raise max_slot_wal_keep_size, and ",
            "idle_timeout" => "raise idle_replication_slot_timeout, and ",
            _ => "",
        };
        return Err(gap(Verdict::SlotLost, text, row.flush_lsn, server.wal_lsn).hint(format!(
            "{first}find out why the relay was down; to accept the gap and resume with a new \
             slot: {RESYNC}"
        )));
    }
    Ok(())
}

fn ahead(row: &Checkpoint, slot: &SlotState, confirmed: Lsn) -> Error {
    let (name, stored) = (&row.slot, row.flush_lsn);
    let text = format!("slot {name:?} is at {confirmed}, ahead of the checkpoint at {stored}");
    // A new slot keeps WAL from its birth on and has decoded nothing. One that was advanced keeps
    // older WAL, or has decoded what this relay read; a crash resets that count.
    let restart = slot.restart_lsn.filter(|restart| *restart > stored);
    let (verdict, why) = match restart {
        Some(restart) if slot.decoded == 0 => (
            Verdict::SlotRecreated,
            format!(
                "it keeps WAL from {restart} only and has decoded nothing, so it was re-created"
            ),
        ),
        Some(_) | None => (Verdict::SlotAhead, "it was advanced by somebody else".to_owned()),
    };
    let text = format!("{text}: {why}");
    gap(verdict, text, stored, confirmed).hint(format!(
        "find out who did that; to accept the gap and resume at {confirmed}: {RESYNC}"
    ))
}

/// On another timeline: with a synchronised slot the slot tells where to go on.
///
/// The row was replayed on the standby like any other row, so it is a true account of a moment
/// before the switch, perhaps an older one than the slot's: the slot's copy is fetched, not
/// replayed.
fn failover(
    row: &Checkpoint,
    server: &ServerFacts,
    slot: Option<&SlotState>,
    history: &[(u32, Lsn)],
) -> Result<Failover> {
    let (now, then) = (server.timeline, row.timeline);
    let refused = |text: String| {
        gap(Verdict::TimelineChanged, text, row.flush_lsn, server.wal_lsn).hint(format!(
            "positions of two timelines cannot be compared: make sure that this is the right \
             primary; to accept the gap and resume there: {RESYNC}"
        ))
    };
    let changed = format!("the server is on timeline {now}, the checkpoint on {then}");
    if now < then {
        return Err(refused(format!("{changed}: an older primary came back")));
    }
    let Some((_, switch)) = history.iter().find(|(timeline, _)| *timeline == then) else {
        return Err(refused(format!("{changed}, which is not among its ancestors")));
    };
    let Some(slot) = slot else {
        return Err(refused(format!(
            "{changed}: a failover, and slot {:?} does not exist there",
            row.slot
        )));
    };
    if !(slot.failover && slot.synced) {
        let text = format!("{changed}: a failover, and slot {:?} was not synchronised", slot.name);
        return Err(refused(text));
    }
    check_slot(row, server, slot)?;
    let Some(confirmed) = slot.confirmed_flush_lsn else {
        return Err(refused(format!("{changed}, and slot {:?} has no position", slot.name)));
    };
    let commit_lsn = row.position.mark.lsn();
    let common = row.flush_lsn <= *switch && commit_lsn <= *switch;
    let keeps = common && commit_lsn >= confirmed;
    Ok(Failover {
        parked_until: row.flush_lsn,
        timeline: now,
        switch: *switch,
        mark: if keeps { row.position.mark } else { confirmed.into() },
        ordinal: if keeps { row.position.ordinal } else { 0 },
        sub: if keeps { row.position.sub } else { 0 },
        flush_lsn: if common { row.flush_lsn.max(confirmed) } else { confirmed },
    })
}

/// What a relay agreed to of a publication: only the tables that it wants, so that other tables
/// come and go freely.
pub fn facts(publication: &Publication, wanted: &[String]) -> Publication {
    let mut facts = publication.clone();
    facts.tables.retain(|t| wanted.contains(&t.table.to_string()));
    facts
}

const ALTERED: &str = "find out who altered it; changes may be missing";

/// Compares the publication with what was agreed to; `wanted` are the tables that the relay reads
/// now. Tables that were not read before may be new, and those in `held` may come and go.
///
/// # Errors
/// A named verdict with the range between the checkpoint and the end of WAL.
pub fn verify_publication(
    row: &Checkpoint,
    wal_end: Lsn,
    name: &str,
    agreed: Option<&Publication>,
    found: Option<&Publication>,
    wanted: &[String],
    held: &[TableName],
) -> Result<()> {
    let verdict = |verdict: Verdict, text: String, what_to_do: &str| {
        let hint = format!("{what_to_do}; to accept the gap and continue: {RESYNC}");
        Err(gap(verdict, text, row.flush_lsn, wal_end).hint(hint))
    };
    let Some(found) = found else {
        return verdict(
            Verdict::PublicationMissing,
            format!("publication {name:?} does not exist"),
            "changes committed without it are not streamed: create it with `watership init`, then \
             decide whether to accept the gap",
        );
    };
    let then = agreed.map_or(row.publication_oid, |agreed| agreed.oid);
    if found.oid != then {
        let (now, stored) = (found.oid, &row.publication);
        return verdict(
            Verdict::PublicationRecreated,
            format!(
                "publication {name:?} (oid {now}) is not the one of the checkpoint, {stored:?} \
                 (oid {then})"
            ),
            "changes committed in between were not streamed",
        );
    }
    let Some(agreed) = agreed else { return Ok(()) };
    if let Some(what) = altered(agreed, found) {
        let text = format!("publication {name:?} was altered: {what}");
        return verdict(Verdict::PublicationAltered, text, ALTERED);
    }
    for then in agreed.tables.iter().filter(|t| wanted.contains(&t.table.to_string())) {
        let now = found.table(&then.table);
        let same = |now: &PublishedTable| (now.oid, now.entry) == (then.oid, then.entry);
        if held.contains(&then.table) && !now.is_some_and(same) {
            continue;
        }
        if let Some((named, text, what_to_do)) = table_altered(name, then, now) {
            return verdict(named, text, what_to_do);
        }
    }
    Ok(())
}

/// The verdict about one table, its text, and what to do.
fn table_altered(
    name: &str,
    then: &PublishedTable,
    now: Option<&PublishedTable>,
) -> Option<(Verdict, String, &'static str)> {
    let table = &then.table;
    let Some(now) = now else {
        return Some((
            Verdict::TableRemoved,
            format!("table {table} is not in publication {name:?} any more"),
            "put it back with `watership init`, or take it out of source.tables first",
        ));
    };
    if now.oid != then.oid {
        let (now, then) = (now.oid, then.oid);
        return Some((
            Verdict::TableRecreated,
            format!("table {table} was dropped and created again: oid {now}, not {then}"),
            "changes committed before it was in the publication again were not streamed",
        ));
    }
    if let Some(what) = narrowed(then, now) {
        let text = format!("publication {name:?} was altered: table {table}: {what}");
        return Some((Verdict::PublicationAltered, text, ALTERED));
    }
    (now.entry != then.entry).then(|| {
        (
            Verdict::TableRemoved,
            format!("table {table} was taken out of publication {name:?} and put back"),
            "changes committed in between were not streamed",
        )
    })
}

/// Whether the publication can carry what the relay is told to read. What it leaves out would be
/// passed in silence, so this is asked at every start, whatever was agreed to.
///
/// # Errors
/// What is wrong and the command that fixes it.
pub fn carries(publication: &Publication, wanted: &[String], held: &[TableName]) -> Result<()> {
    let name = &publication.name;
    if !publication.via_root {
        let text = format!(
            "publication {name:?} publishes partitions under their own names, so outbox events \
             would not be recognised"
        );
        return Err(Error::refused(text)
            .hint(format!("ALTER PUBLICATION {name:?} SET (publish_via_partition_root = true)")));
    }
    if !publication.operations.insert {
        let text = format!("publication {name:?} publishes no inserts, and every event is one");
        return Err(Error::refused(text).hint(format!(
            "ALTER PUBLICATION {name:?} SET (publish = 'insert, update, delete, truncate')"
        )));
    }
    // Without the canary nothing is lost; that is warned about.
    let canary = TableName::canary().to_string();
    let there = |name: &String| publication.tables.iter().any(|t| t.table.to_string() == *name);
    let may_lack = |name: &String| held.iter().any(|held| held.to_string() == *name);
    match wanted.iter().find(|name| **name != canary && !there(name) && !may_lack(name)) {
        None => Ok(()),
        Some(table) => {
            let text = format!("table {table} is not in publication {name:?}");
            Err(Error::refused(text)
                .hint("`watership init` adds it; or take it out of source.tables"))
        }
    }
}

fn altered(then: &Publication, now: &Publication) -> Option<String> {
    if then.operations != now.operations {
        let list = |p: &Publication| {
            let o = p.operations;
            let all = [(o.insert, "insert"), (o.update, "update"), (o.delete, "delete")];
            let all = all.into_iter().chain([(o.truncate, "truncate")]);
            all.filter(|(on, _)| *on).map(|(_, name)| name).collect::<Vec<_>>().join(", ")
        };
        return Some(format!("it publishes {:?} instead of {:?}", list(now), list(then)));
    }
    if then.via_root != now.via_root {
        let (now, then) = (now.via_root, then.via_root);
        return Some(format!("publish_via_partition_root is {now} instead of {then}"));
    }
    if then.altered_by.is_some() && then.altered_by != now.altered_by {
        return Some(
            "it publishes what it did, but was altered in between: perhaps something was left \
             out for a while"
                .to_owned(),
        );
    }
    None
}

/// What of a table is published differently than before.
pub(super) fn narrowed(then: &PublishedTable, now: &PublishedTable) -> Option<String> {
    if then.row_filter != now.row_filter {
        let show = |t: &PublishedTable| t.row_filter.clone().unwrap_or_else(|| "none".into());
        return Some(format!("row filter {} instead of {}", show(now), show(then)));
    }
    if then.columns != now.columns {
        let show = |t: &PublishedTable| t.columns.as_ref().map_or("all".into(), |c| c.join(", "));
        return Some(format!("columns {} instead of {}", show(now), show(then)));
    }
    None
}
