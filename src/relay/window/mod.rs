//! Everything that was received and is not settled: from admission to the outcome of the last
//! message of an entry.
//!
//! The ring keeps source order and gives receipts back; the lanes say what may be sent; admission
//! fills both, outcomes empty them.

pub mod admission;
pub(in crate::relay) mod described;
pub mod lanes;
mod outcomes;
pub mod recent;
pub mod refusals;
pub mod remembered;
mod ring;

pub use ring::{EntryId, Window};
