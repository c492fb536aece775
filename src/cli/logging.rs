//! Log lines on stderr: text on a terminal, JSON elsewhere, or as the configuration says.
//!
//! Other crates log errors only, and lapin nothing: it returns its errors, and logs a closed
//! connection as one. A name from outside cannot forge a line: what `run` logs passes `printable`.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use super::colour;
use super::log_writer::{self, ToThread};
use crate::config::{Log, LogFormat};

static JSON: OnceLock<bool> = OnceLock::new();

/// Whether lines are JSON; false before logging is started.
pub(super) fn is_json() -> bool {
    JSON.get().copied().unwrap_or(false)
}

/// For `run`: as configured.
pub(super) fn start(log: &Log) {
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !std::io::stderr().is_terminal(),
    };
    let writer = match log_writer::start() {
        true => BoxMakeWriter::new(ToThread),
        false => BoxMakeWriter::new(std::io::stderr),
    };
    install(json, &format!("error,lapin=off,watership={}", log.level), writer);
}

/// Creates the metrics of the log; call it when the recorder is installed.
pub(super) fn create_metrics() {
    log_writer::create_metrics();
}

/// Waits for the last lines of `run`.
pub(super) fn flush() {
    log_writer::flush();
}

/// For commands that print their result and end: text, and only warnings and errors.
pub(super) fn start_quiet(log: &Log) {
    let level = match log.level {
        "debug" | "trace" => log.level,
        _ => "warn",
    };
    install(false, &format!("off,watership={level}"), BoxMakeWriter::new(std::io::stderr));
}

fn install(json: bool, filter: &str, writer: BoxMakeWriter) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(writer)
        .with_ansi(colour::is_wanted(std::io::stderr().is_terminal()));
    let installed = if json {
        builder.json().flatten_event(true).with_current_span(true).try_init()
    } else {
        builder.try_init()
    };
    // In a test another subscriber may be installed already; lines go there then.
    if installed.is_ok() {
        let _ = JSON.set(json);
    }
}
