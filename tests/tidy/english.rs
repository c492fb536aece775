//! Phrases that a reader in a hurry stumbles over, in texts, comments and documents alike.

use super::code::{Code, is_word};
use crate::{accepts, finds, holds};

/// The phrase, and what to write instead.
const PHRASES: &[(&str, &str)] = &[
    ("for ever", "always, indefinitely, or name the limit"),
    ("mend", "fix"),
    ("mends", "fixes"),
    ("mended", "fixed"),
    ("anew", "again"),
    ("to be had", "available"),
    ("so many", "say how many, or `count`"),
    ("is no", "is not a"),
    ("is none", "is not one, or name it"),
    ("stand-by", "standby"),
    ("stands by", "is on standby"),
    ("goes on", "continues"),
    ("whoever", "name them"),
    ("nobody can tell", "cannot be known"),
    ("besides", "in addition, or except"),
    ("a person has to", "someone must"),
    ("is well again", "is healthy again"),
    ("is there again", "is back"),
    ("are there again", "are back"),
    ("there with other", "exists with different"),
    ("without end", "indefinitely"),
    ("cannot be asked", "cannot be queried"),
    ("could not be asked", "could not be checked"),
    ("look whether", "check whether"),
    ("looks whether", "checks whether"),
    ("missing in", "missing from"),
    ("how to go on", "what to do next"),
    ("all flows", "everything is flowing"),
    ("server is away", "is down, or unreachable"),
    ("broker is away", "is down, or unreachable"),
    ("database is away", "is down, or unreachable"),
    ("begin again behind", "skip what is there, start with the next"),
    ("begins again behind", "skips what is there, starts with the next"),
    ("otherwise than", "differently than"),
    ("behind the point", "after the decimal point"),
];

/// The file that names the phrases, and what is quoted from others.
const EXEMPT: &[&str] = &["tests/tidy/english.rs", "tests/tidy/main.rs", "Cargo.lock"];

pub fn odd_phrases(files: &[Code]) -> Vec<String> {
    let read = |file: &&Code| {
        let ends = [".rs", ".md", ".sql", ".toml", ".service", ".yml"];
        let text = ends.iter().any(|end| file.path.ends_with(end)) || file.is_script();
        text && !EXEMPT.contains(&file.path.as_str())
    };
    let mut found = Vec::new();
    for file in files.iter().filter(read) {
        let text = file.text.to_ascii_lowercase();
        for (phrase, instead) in PHRASES {
            for at in whole_words(&text, phrase).filter(|at| !good(&text, *at)) {
                found.push(format!("{}: {phrase:?}; better: {instead}", file.at(at)));
            }
        }
    }
    found
}

/// "There is no slot" and "is no longer" are how one says it.
fn good(text: &str, at: usize) -> bool {
    text[..at].ends_with("there ") || text[at..].starts_with("is no longer")
}

/// Where the phrase stands, not as a part of longer words.
fn whole_words<'a>(text: &'a str, phrase: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(phrase).map(|(at, _)| at).filter(move |at| {
        let before = text[..*at].chars().next_back();
        let after = text[at + phrase.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

#[test]
fn nobody_stumbles_over_the_english() {
    holds(odd_phrases);
    finds(
        odd_phrases,
        &[
            ("src/relay/mod.rs", "//! It waits for ever.", 1),
            ("docs/operating.md", "x\nThe slot is well again.", 2),
            ("sql/0001_schema.sql", "-- It is no\n", 1),
            ("src/a.rs", "// It waits without end.", 1),
        ],
    );
    accepts(odd_phrases, &[("src/a.rs", "// amended: there is no slot, it is no longer noted")]);
}
