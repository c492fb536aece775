//! How a relay continues after someone accepted what a verdict named. Pure.
//!
//! Invariant: what is accepted is never more than what was named, and each verdict that is not a
//! gap is refused.

use super::position::check_slot;
use crate::error::{Error, Kind, Result};
use crate::pg::slot::{ServerFacts, SlotState};
use crate::position::Lsn;
use crate::relay::checkpoint::Checkpoint;
use crate::verdict::Verdict;

/// Where the stream begins again after a gap was accepted; the later ones lose more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ResumeFrom {
    /// Where the checkpoint is: only what it is compared with is accepted as it is now.
    Checkpoint,
    /// Where the slot is.
    Slot,
    /// At the birth of a new slot.
    Now,
}

impl ResumeFrom {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ResumeFrom::Checkpoint => "checkpoint",
            ResumeFrom::Slot => "slot",
            ResumeFrom::Now => "now",
        }
    }
}

/// How a relay will go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResyncPlan {
    /// Where it begins.
    pub from: ResumeFrom,
    /// That place; absent where a new slot decides.
    pub begin: Option<Lsn>,
}

/// How to continue in spite of `doubts`; `asked` is what a person wants instead.
///
/// # Errors
/// When it is not possible, or somebody reads the slot.
pub fn plan(
    row: &Checkpoint,
    slot: Option<&SlotState>,
    server: &ServerFacts,
    doubts: &[Error],
    asked: Option<ResumeFrom>,
) -> Result<ResyncPlan> {
    let name = &row.slot;
    if let Some(pid) = slot.and_then(|slot| slot.active_pid) {
        return Err(Error::new(Kind::Busy, format!("slot {name:?} is in use by pid {pid}"))
            .hint("stop the relay first"));
    }
    let usable = slot.filter(|slot| check_slot(row, server, slot).is_ok());
    let confirmed = usable.and_then(|slot| slot.confirmed_flush_lsn);
    let mut least = ResumeFrom::Checkpoint;
    for verdict in doubts.iter().filter_map(Error::verdict) {
        least = least.max(allowed_by(verdict, name)?);
    }
    if confirmed.is_none() {
        least = ResumeFrom::Now;
    }
    let from = asked.unwrap_or(least);
    if from < least {
        let (from, least) = (from.name(), least.name());
        return Err(Error::refused(format!("the relay cannot resume from the {from}"))
            .hint(format!("use --from {least}")));
    }
    let begin = match from {
        ResumeFrom::Checkpoint => Some(row.flush_lsn),
        ResumeFrom::Slot => confirmed,
        ResumeFrom::Now => None,
    };
    Ok(ResyncPlan { from, begin })
}

/// The earliest place from which the stream may begin after this verdict was accepted.
fn allowed_by(verdict: Verdict, slot: &str) -> Result<ResumeFrom> {
    Ok(match verdict {
        Verdict::PublicationMissing => {
            return Err(Error::refused("the publication does not exist")
                .hint("create it with `watership init` first, then accept the gap"));
        }
        Verdict::WalLevel => {
            return Err(Error::refused("wal_level is not \"logical\"")
                .hint("ALTER SYSTEM SET wal_level = 'logical', then restart Postgres"));
        }
        Verdict::CheckpointMissing
        | Verdict::OtherSlot
        | Verdict::SchemaUnknown
        | Verdict::OutboxAltered
        | Verdict::RowUnsendable
        | Verdict::EventUnpublishable
        | Verdict::SchemaDrift
        | Verdict::ParkingRefused
        | Verdict::PartitionsChanged
        | Verdict::BatchMissing
        | Verdict::BatchUnreadable
        | Verdict::ForeignRows => {
            return Err(Error::refused(format!(
                "{} is not a gap that can be accepted",
                verdict.name()
            ))
            .hint("`watership check` says what to do"));
        }
        Verdict::SlotUnfit => {
            return Err(Error::refused(format!("slot {slot:?} was not created by Watership"))
                .hint("if nobody needs it, drop it; then run resync again to accept the gap"));
        }
        // Only the process that lived through it knows of a row that went back.
        Verdict::CheckpointWentBack
        | Verdict::PublicationAltered
        | Verdict::TableRemoved
        | Verdict::TableRecreated => ResumeFrom::Checkpoint,
        Verdict::OtherCluster
        | Verdict::TimelineChanged
        | Verdict::CheckpointAhead
        | Verdict::SlotRecreated
        | Verdict::SlotAhead => ResumeFrom::Slot,
        // Older WAL is decoded with the catalog of its time, which has no such publication.
        Verdict::PublicationRecreated
        | Verdict::SlotMissing
        | Verdict::SlotLost
        | Verdict::StreamDeaf => ResumeFrom::Now,
    })
}
