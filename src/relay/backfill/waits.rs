//! Why a backfill does not go on now. Pure.
//!
//! Live changes come first: whatever keeps them from flowing stops a backfill, which resumes by
//! itself when that is over.

use crate::relay::WindowLimits;
use crate::relay::status::Snapshot;

/// A reason to wait, in words; absent when it may go on.
pub fn why(shown: &Snapshot, window: WindowLimits, max_slot_wal: u64) -> Option<String> {
    if shown.broker_blocked {
        return Some("the broker blocks publishing".into());
    }
    if let Some(held) = shown.held.first() {
        return Some(format!("route {:?} is held", held.route));
    }
    if let Some(refused) = shown.refused.first() {
        return Some(format!("the broker refuses messages of route {:?}", refused.route));
    }
    if let Some((route, _)) = shown.parked.blocked.first() {
        return Some(format!("a message of route {route:?} blocks its key"));
    }
    let retained = shown.slot.as_ref().map_or(0, |slot| slot.retained_bytes);
    if retained > max_slot_wal {
        return Some(format!(
            "the slot keeps {} MB of WAL, the limit is {} MB (backfill.max_slot_wal)",
            retained >> 20,
            max_slot_wal >> 20
        ));
    }
    if shown.window_events > window.events / 4 * 3 {
        return Some("the window is full of live changes".into());
    }
    None
}

/// A queue that is too long, in words.
pub fn too_long(name: &str, messages: u32, max: u32) -> String {
    format!(
        "queue {name:?} holds {messages} messages, the limit is {max} \
             (backfill.max_queue_messages)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::status::{Held, SlotStatus, Status};

    const WINDOW: WindowLimits = WindowLimits { events: 100, bytes: 1, unconfirmed: 1 };

    #[test]
    fn whatever_keeps_live_changes_from_flowing_stops_a_backfill() {
        let well = Status::new("r", Vec::new()).snapshot();
        let told = |change: fn(&mut Snapshot)| {
            let mut shown = well.clone();
            change(&mut shown);
            why(&shown, WINDOW, 10 << 20)
        };
        assert_eq!(told(|_| {}), None);
        let slot = |retained_bytes| SlotStatus {
            wal_status: None,
            safe_wal_size: None,
            retained_bytes,
            lag_bytes: 0,
            warning: None,
            hint: None,
        };
        let mut shown = well.clone();
        shown.slot = Some(slot(10 << 20));
        assert_eq!(why(&shown, WINDOW, 10 << 20), None);
        shown.slot = Some(slot(11 << 20));
        let text = why(&shown, WINDOW, 10 << 20).expect("it waits");
        assert!(text.contains("keeps 11 MB of WAL, the limit is 10 MB"), "{text}");
        assert!(told(|s| s.broker_blocked = true).is_some());
        assert!(told(|s| s.window_events = 76).is_some());
        assert!(told(|s| s.parked.blocked.push(("a".into(), "b".into()))).is_some());
        let held = |s: &mut Snapshot| {
            s.held.push(Held { route: "orders".into(), reason: "gone".into(), for_seconds: 1.0 });
        };
        assert_eq!(told(held).as_deref(), Some("route \"orders\" is held"));
    }
}
