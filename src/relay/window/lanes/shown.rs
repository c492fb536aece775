//! What others see of the lanes: the messages in them, for who looks for one. Pure.

use super::{Lanes, Pending};

impl Lanes {
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
