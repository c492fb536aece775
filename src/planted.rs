//! Bugs that other relays shipped, built in on purpose, to see whether the tests find them.
//!
//! Invariant: without the feature `planted` there is no bug here: the question is answered with
//! "no" when the program is compiled, and the code that asks it is gone. With the feature, the
//! variable `WATERSHIP_PLANTED` names one bug by its number in the museum. `scripts/planted` builds
//! that, runs the suite once for each bug, and counts those that no test finds.

/// Number of the bug that is planted; 0 is none.
#[cfg(feature = "planted")]
fn chosen() -> u8 {
    use std::sync::OnceLock;
    static CHOSEN: OnceLock<u8> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let text = std::env::var("WATERSHIP_PLANTED").unwrap_or_default();
        text.parse().unwrap_or_default()
    })
}

/// Whether museum bug number `bug` is planted.
#[cfg(feature = "planted")]
pub fn is(bug: u8) -> bool {
    chosen() == bug
}

/// Whether museum bug number `bug` is planted: no.
#[cfg(not(feature = "planted"))]
pub const fn is(_bug: u8) -> bool {
    false
}
