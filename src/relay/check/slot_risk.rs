//! Warnings about a slot that works: its WAL comes close to max_slot_wal_keep_size, or it waits for
//! a standby. For `check`, the upkeep and `/status`. Pure.

use crate::pg::slot::{SlotState, WalStatus};

/// What is wrong with a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Risk {
    /// The thing and its state.
    pub what: String,
    /// What to do about it.
    pub hint: &'static str,
}

/// Why nothing comes although all is well here: the server waits for a standby.
pub fn held_by_standby(slot: &SlotState) -> Option<Risk> {
    let names = slot.waits_for.join(", ");
    (!names.is_empty()).then(|| Risk {
        what: format!(
            "slot {:?} waits for standby slots that are not in use ({names}): Postgres sends no \
             changes until those standbys have received them",
            slot.name
        ),
        hint: "start the standby, or take its slot out of synchronized_standby_slots",
    })
}

/// Why WAL that the slot needs may soon be removed, or the disk may fill with it.
pub fn at_risk(slot: &SlotState, max_slot_wal_keep_size: Option<u64>) -> Option<Risk> {
    let what = danger(slot, max_slot_wal_keep_size)?;
    let hint = match (slot.wal_status, max_slot_wal_keep_size) {
        (Some(WalStatus::Lost), _) => "`watership resync` says what can be done",
        (_, Some(_)) => "let the relay catch up now, or raise max_slot_wal_keep_size",
        (_, None) => {
            "let the relay catch up now: max_slot_wal_keep_size is unlimited, so the disk may fill"
        }
    };
    Some(Risk { what, hint })
}

fn danger(slot: &SlotState, max_slot_wal_keep_size: Option<u64>) -> Option<String> {
    let name = &slot.name;
    let mib = slot.retained_bytes >> 20;
    let low = slot
        .safe_wal_size
        .zip(max_slot_wal_keep_size)
        .filter(|(safe, most)| u64::try_from(*safe).unwrap_or(0) < most / 4);
    match (slot.wal_status, low) {
        (Some(WalStatus::Lost), _) => Some(format!("slot {name:?} is lost")),
        (Some(WalStatus::Unreserved), _) => Some(format!(
            "slot {name:?} is unreserved: it keeps {mib} MiB, and the next checkpoint may remove \
             WAL that it needs"
        )),
        (Some(WalStatus::Reserved | WalStatus::Extended) | None, Some((safe, most))) => {
            let (safe, most) = (safe.max(0) >> 20, most >> 20);
            Some(format!(
                "slot {name:?} may be lost after {safe} MiB more of WAL: less than a quarter of \
                 max_slot_wal_keep_size ({most} MiB) is left"
            ))
        }
        (Some(WalStatus::Extended), None) => {
            Some(format!("slot {name:?} is extended: it keeps {mib} MiB, more than max_wal_size"))
        }
        (Some(WalStatus::Reserved) | None, None) => None,
    }
}
