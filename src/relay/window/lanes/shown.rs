//! What others see of the lanes: the messages in them, for who looks for one. Pure.

use super::{Lanes, Pending};

impl Lanes {
    /// Bytes of the messages that wait for a held route or a destination that refuses.
    pub fn stuck_bytes(&self) -> usize {
        if self.holds.is_empty() && self.refusing.is_empty() {
            return 0;
        }
        let is_stuck = |slot: &&Pending| {
            self.holds.contains_key(&slot.message.route)
                || self.refusing.find(&slot.message).is_some()
        };
        self.unsettled().filter(is_stuck).map(|slot| slot.message.size()).sum()
    }

    /// Every message between admission and settlement, in no order.
    pub fn unsettled(&self) -> impl Iterator<Item = &Pending> {
        self.slots.iter().flatten()
    }
}

impl Pending {
    /// How often the broker has refused it.
    pub fn refused(&self) -> u32 {
        self.nacks
    }
}
