//! Who may import whom, and which crates and calls belong to which files (docs/architecture.md).

use super::code::{Code, is_word};
use super::shape::Exception;

/// Nouns: known to all, they know only each other.
const NOUNS: &[&str] = &[
    "error",
    "fault",
    "position",
    "message",
    "publisher",
    "event",
    "backoff",
    "metrics",
    "secret",
    "tls",
    "column",
    "contract",
    "verdict",
];

/// A module of the library and the modules it may import in addition to itself.
const LAYERS: &[(&[&str], &[&[&str]])] = &[
    (NOUNS, &[NOUNS]),
    (&["pg", "amqp"], &[PROTOCOL_NOUNS]),
    (&["route"], &[NOUNS]),
    (&["envelope"], &[NOUNS, &["route"]]),
    // A consumer stands between a queue and a database. `relay` and what is above never meet it.
    (&["inbox"], &[NOUNS, &["pg", "amqp"]]),
    (APPLICATIONS, &[NOUNS, &["pg"]]),
    (&["source"], &[NOUNS, &["pg"], PURE, APPLICATIONS]),
    (&["relay"], &[NOUNS, &["pg", "amqp"], PURE, APPLICATIONS, &["source"]]),
    (&["admin"], &[NOUNS, &["pg", "amqp"], PURE, APPLICATIONS, &["source", "relay"]]),
    (&["config"], &[NOUNS, &["pg", "amqp"], PURE, APPLICATIONS, &["source", "relay", "admin"]]),
    (&["cli"], &[NOUNS, &["pg", "amqp"], PURE, APPLICATIONS, TOP]),
    (&["dev"], &[NOUNS, &["pg", "amqp", "config"], APPLICATIONS]),
    (&["main"], &[NOUNS, &["cli", "config"]]),
];

/// What the two ends may know: nothing about events or metrics of routes.
const PROTOCOL_NOUNS: &[&str] = &[
    "error",
    "fault",
    "position",
    "message",
    "publisher",
    "secret",
    "tls",
    "backoff",
    "metrics",
    "verdict",
];
const PURE: &[&str] = &["route", "envelope"];
const APPLICATIONS: &[&str] = &["outbox", "inbox"];
const TOP: &[&str] = &["source", "relay", "admin", "config", "dev"];

/// Modules that decide without looking at the world.
const PURE_FILES: &[&str] = &[
    "event",
    "message",
    "publisher",
    "position",
    "backoff",
    "route",
    "envelope",
    "column",
    "contract",
    "inbox/lanes",
    "pg/pgoutput",
    "source/outbox",
    "source/poll/batch",
    "source/poll/rows",
    "source/transaction",
    "relay/backfill/copied",
    "relay/backfill/keyset",
    "relay/backfill/merge",
    "relay/backfill/pace",
    "relay/backfill/shown",
    "relay/backfill/waits",
    "relay/check",
    "relay/checkpoint/own",
    "relay/checkpoint/progress",
    "relay/checkpoint/rider",
    "relay/parking/order",
    "relay/parking/row",
    "relay/session/circuit",
    "relay/session/phantoms",
    "relay/session/unsendable",
    "relay/window/lanes",
    "relay/window/remembered",
    "relay/window/ring",
    "amqp/reply",
    "amqp/audit",
];

/// Longest pause of a waiting test between two looks, in milliseconds.
const GRAIN_MS_MAX: u64 = 50;

/// Async, clocks and chance. A trait's `impl Future` is a signature and allowed.
const IMPURE: &[&str] = &[
    "async fn",
    "async move",
    "async {",
    ".await",
    "Instant::now",
    "SystemTime",
    "rand",
    "getrandom",
    "RandomState",
    "Uuid::new_v4",
    "Uuid::now_v7",
    "tokio::spawn",
];

/// A word of the code, the modules it may stand in, and whether tests are free to use it.
pub struct Home {
    words: &'static [&'static str],
    modules: &'static [&'static str],
    tests_too: bool,
}

pub const LAPIN: Home = Home {
    words: &["lapin"],
    modules: &["amqp/client", "amqp/topology", "inbox", "cli/demo", "dev"],
    tests_too: false,
};
pub const CLAP: Home = Home { words: &["clap"], modules: &["cli", "main"], tests_too: true };
pub const PRINTING: Home = Home {
    words: &["println!", "eprintln!", "print!", "eprint!"],
    modules: &["cli", "main"],
    tests_too: false,
};
pub const ENVIRONMENT: Home =
    Home { words: &["env::"], modules: &["config/load", "dev"], tests_too: false };
pub const EXIT: Home = Home { words: &["process::exit"], modules: &["main"], tests_too: true };
pub const TOKIO_POSTGRES: Home = Home {
    words: &["tokio_postgres"],
    modules: &[
        "pg",
        "source",
        "relay/backfill",
        "relay/checkpoint",
        "relay/parking",
        "relay/session",
        "relay/upkeep",
        "outbox",
        "inbox",
        "cli",
        "dev",
    ],
    tests_too: false,
};

/// Imports that point the wrong way.
pub fn layers(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src() && f.module() != "lib") {
        let mine = file.module().split('/').next().unwrap_or_default();
        let Some((_, allowed)) = LAYERS.iter().find(|(names, _)| names.contains(&mine)) else {
            found.push(format!("{}: module {mine} is in no layer, give it one", file.path));
            continue;
        };
        for root in ["crate", "watership"] {
            for (at, path) in file.paths(root) {
                let target = path.split("::").next().unwrap_or_default();
                let known = target == mine || allowed.iter().any(|set| set.contains(&target));
                if !known && !file.is_test(at) {
                    found.push(format!("{}: {mine} must not know {root}::{path}", file.at(at)));
                }
            }
        }
        found.extend(climbing(file));
    }
    found
}

/// `super::super` could leave the module without saying whither.
fn climbing(file: &Code) -> Vec<String> {
    let climbs = file.words("super::super::").filter(|at| !file.is_test(*at));
    climbs.map(|at| format!("{}: write crate::… instead of super::super", file.at(at))).collect()
}

/// Words outside of their home.
pub fn homes(files: &[Code], home: &Home) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src() && !f.is_in(home.modules)) {
        for word in home.words {
            // The path of the own program is not a setting.
            let setting = |at: &usize| !file.masked[*at..].starts_with("env::current_exe");
            for at in file.words(word).filter(setting) {
                if home.tests_too || !file.is_test(at) {
                    let allowed = home.modules.join(", ");
                    found.push(format!("{}: {word} belongs into {allowed}", file.at(at)));
                }
            }
        }
    }
    found
}

/// Uses of the environment, also through a group such as `use std::{env, fs}`.
pub fn environment(files: &[Code]) -> Vec<String> {
    let mut found = homes(files, &ENVIRONMENT);
    for file in files.iter().filter(|f| f.is_src() && !f.is_in(ENVIRONMENT.modules)) {
        for (at, path) in file.paths("std") {
            if path == "env" && !file.is_test(at) {
                found.push(format!("{}: std::env belongs into config/load", file.at(at)));
            }
        }
    }
    found
}

/// SQL in Rust on tables of our own. It lives in `sql/query`, one statement a file, where a change
/// of the schema finds it. A lookup in the catalog may stand where its one user is.
pub fn inline_sql(files: &[Code]) -> Vec<String> {
    const BEFORE: &[&str] = &["FROM", "INTO", "UPDATE", "JOIN"];
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src()) {
        for (at, _) in file.text.match_indices("watership.") {
            let line = file.text[..at].rsplit('\n').next().unwrap_or_default();
            let before = file.text[..at].trim_end_matches(|c: char| c == '\\' || c.is_whitespace());
            let word = before.rsplit(|c| !is_word(c)).next().unwrap_or_default();
            let comment = line.trim_start().starts_with("//");
            if !comment && !file.is_test(at) && BEFORE.contains(&word.to_uppercase().as_str()) {
                found.push(format!("{}: this statement belongs into sql/query", file.at(at)));
            }
        }
    }
    found
}

/// Async, clocks and chance in files that must not have them.
pub fn impurities(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src() && f.is_in(PURE_FILES)) {
        for word in IMPURE {
            for at in file.words(word) {
                if !file.is_test(at) {
                    found.push(format!("{}: {word} in a pure file", file.at(at)));
                }
            }
        }
    }
    found
}

/// Pure files that exist; a rename must not switch the rule off unseen.
pub fn pure_files_seen(files: &[Code]) -> usize {
    files.iter().filter(|f| f.is_src() && f.is_in(PURE_FILES)).count()
}

/// Calls of `sleep` in test code, other than the grain of a wait that ends on what it sees.
pub fn sleeps(files: &[Code], exceptions: &[Exception]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_rust() && !f.path.starts_with("tests/bench/")) {
        for at in file.words("sleep") {
            let called = file.masked[at..].trim_start_matches(is_word).starts_with('(');
            let excepted = exceptions.iter().any(|e| e.covers(file, at));
            if called && file.is_test(at) && !excepted && !is_grain(file, at) {
                found.push(format!("{}: a test waits on progress, it never sleeps", file.at(at)));
            }
        }
    }
    found
}

/// A loop with a deadline may look again after a moment.
fn is_grain(file: &Code, at: usize) -> bool {
    let before = &file.masked[..at];
    let function = &before[before.rfind("fn ").unwrap_or(0)..];
    let looping = function.contains("while ") || function.contains("loop {");
    let call = file.masked[at..].strip_prefix("sleep(").unwrap_or_default();
    let milliseconds = call.strip_prefix("Duration::from_millis(");
    let number = milliseconds.and_then(|rest| rest.split(')').next()?.parse::<u64>().ok());
    let short = call.starts_with("POLL") || number.is_some_and(|ms| ms <= GRAIN_MS_MAX);
    looping && short && function.contains("deadline")
}
