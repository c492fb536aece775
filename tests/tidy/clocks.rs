//! No test asserts how long something took, how fast it was, or how much of a processor it used:
//! such a test fails on a loaded machine although nothing is wrong. A test waits for the effect and
//! reports the figure.

use std::ops::Range;

use super::code::{Code, body, closing, is_word};
use crate::{accepts, finds, holds};

/// What measures, where it stands in a condition or makes the value that stands there.
const MEASURES: &[&str] = &["elapsed", "duration_since", "saturating_duration_since"];

/// What a condition about a measurement speaks of, wherever it was taken.
const FIGURES: &[&str] = &[
    "as_secs",
    "as_secs_f32",
    "as_secs_f64",
    "as_millis",
    "as_micros",
    "as_nanos",
    "took",
    "rate",
    "per_second",
    "latency",
    "throughput",
    "recovery",
    "recoveries",
    "cpu",
    "cpu_seconds",
    "cpu_ticks",
];

/// The assertions, and how many of their arguments are the condition.
const ASSERTIONS: &[(&str, usize)] = &[
    ("assert!", 1),
    ("assert_eq!", 2),
    ("assert_ne!", 2),
    ("debug_assert!", 1),
    ("prop_assert!", 1),
    ("prop_assert_eq!", 2),
];

/// Here time is counted by the test, not by the machine: no load can delay it.
const VIRTUAL: &str = "tests/simulation/";

/// Assertions of test code whose condition is a measurement.
pub fn measured(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_rust() && !f.path.starts_with(VIRTUAL)) {
        for (assertion, arguments) in ASSERTIONS {
            for at in file.words(assertion).filter(|at| file.is_test(*at)) {
                let condition = condition(&file.masked, at + assertion.len(), *arguments);
                if let Some(word) = measurement(file, at, &condition) {
                    found.push(format!(
                        "{}: {assertion} of {word}: wait for the effect, report the figure",
                        file.at(at)
                    ));
                }
            }
        }
    }
    found.sort();
    found
}

/// The word by which a condition is a measurement.
fn measurement(file: &Code, at: usize, condition: &str) -> Option<String> {
    let said = MEASURES.iter().chain(FIGURES).find(|word| has(condition, word));
    // A moment against a moment: only the deadline of a wait may be compared with the clock.
    let compares = condition.contains(['<', '>']) && condition.contains("Instant::now()");
    let clock = compares && !has(condition, "deadline");
    let said = said.map(|word| (*word).to_owned()).or(clock.then(|| "the clock".into()));
    let made = || measured_names(file, at).into_iter().find(|name| has(condition, name));
    said.or_else(made)
}

/// The first arguments of the macro call whose parenthesis or bracket is at `open`.
fn condition(masked: &str, open: usize, arguments: usize) -> String {
    let (mut depth, mut left) = (0_i32, arguments);
    let mut text = String::new();
    for c in masked[open..].chars() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' if depth == 1 => left -= 1,
            _ => {}
        }
        if depth == 0 || left == 0 {
            break;
        }
        text.push(c);
    }
    text
}

/// The names in the function around `at` that hold a measurement: bound by a `let` whose value
/// measures, or is made of such a name.
fn measured_names(file: &Code, at: usize) -> Vec<String> {
    let Some(range) = function(&file.masked, at) else { return Vec::new() };
    let text = &file.masked[range.start..at];
    let mut names: Vec<String> = Vec::new();
    for (begin, _) in text.match_indices("let ") {
        let rest = &text[begin + 4..];
        let statement = &rest[..end_of_statement(rest)];
        let Some((pattern, value)) = statement.split_once('=') else { continue };
        let measures = MEASURES.iter().any(|word| has(value, word));
        // What a closure measures when it is called is not measured here.
        let closure = value.trim_start().starts_with(['|']) || value.contains("async ");
        if !closure && (measures || names.iter().any(|name| has(value, name))) {
            let pattern = pattern.split(':').next().unwrap_or_default();
            let words = pattern.split(|c| !is_word(c)).filter(|w| !w.is_empty() && *w != "mut");
            names.extend(words.map(str::to_owned));
        }
    }
    names
}

/// The body of the innermost function around `at`.
fn function(masked: &str, at: usize) -> Option<Range<usize>> {
    let mut before = &masked[..at];
    while let Some(begin) = before.rfind("fn ") {
        let open = body(masked, begin)?;
        let end = closing(masked, open).unwrap_or(masked.len());
        if open < at && at < end {
            return Some(open..end);
        }
        before = &masked[..begin];
    }
    None
}

/// Where the statement ends: at a semicolon outside of all brackets.
fn end_of_statement(text: &str) -> usize {
    let mut depth = 0_i32;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b';' if depth <= 0 => return at,
            _ => {}
        }
    }
    text.len()
}

/// Whether `word` stands in `text`, not as a part of a longer one.
fn has(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[test]
fn tests_assert_no_duration_no_rate_and_no_share_of_cpu() {
    holds(measured);
    let after_let = "fn f() {\n let begin = now();\n let given_up = begin.elapsed();\n \
        assert!(given_up < LIMIT);\n}";
    let of_two = "fn f() { let (a, b) = (begin.elapsed(), 1);\n let speed = 9.0 / a;\n \
        assert!(speed > 3.0, \"slow\"); }";
    finds(
        measured,
        &[
            ("tests/it/a.rs", "fn f() {\n assert!(start.elapsed() < LIMIT, \"{x}\");\n}", 2),
            ("tests/it/a.rs", "fn f() { assert!(took > Duration::from_secs(2)); }", 1),
            ("tests/it/a.rs", after_let, 4),
            ("tests/it/a.rs", of_two, 3),
            ("tests/a.rs", "fn f() { assert_eq!(1, a.duration_since(b).as_secs()); }", 1),
            ("tests/a.rs", "fn f() { assert!(Instant::now() < begin + LIMIT); }", 1),
            ("tests/soak/a.rs", "fn f() { assert!((1.0..9.0).contains(&rate)); }", 1),
            ("tests/a.rs", "fn f() { assert!(cpu_ticks(pid) < 10); }", 1),
            ("examples/a.rs", "fn f() { assert!(recoveries[0] < BACK); }", 1),
            ("src/a.rs", "#[cfg(test)]\nmod tests {\n fn f() { assert!(x.elapsed() < L); }\n}", 3),
        ],
    );
    accepts(
        measured,
        &[
            ("tests/a.rs", "fn f() { while go { assert!(Instant::now() < deadline); } }"),
            ("tests/a.rs", "fn f() { assert!(arrived, \"after {:?}\", begin.elapsed()); }"),
            ("tests/a.rs", "fn f() { let took = begin.elapsed();\n println!(\"{took:?}\"); }"),
            ("tests/a.rs", "fn f() { let took = a.elapsed(); note(took); assert_eq!(lost, 0); }"),
            ("tests/a.rs", "fn f() { let t = a.elapsed(); }\nfn g(t: u8) { assert!(t < 3); }"),
            ("tests/a.rs", "fn f() { assert_eq!(o.connect_timeout, Duration::from_secs(3)); }"),
            ("tests/a.rs", "fn f() { assert!(pirate.strategy() == \"rate\"); } // assert!(rate)"),
            ("src/a.rs", "fn f() { assert!(last.elapsed() < LIMIT); }"),
        ],
    );
}
