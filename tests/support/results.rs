//! The file that WATERSHIP_FAULT_RESULTS names; `scripts/reliability` reads it.

use std::io::Write as _;

/// Adds `lines`, each with its line break; does nothing without the variable.
///
/// # Panics
/// When the file cannot be written.
pub fn add(lines: &str) {
    let Some(path) = std::env::var_os("WATERSHIP_FAULT_RESULTS") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    // One write: tests that end at the same time do not mix.
    let written = file.and_then(|mut file| file.write_all(lines.as_bytes()));
    written.expect("the results can be written");
}
