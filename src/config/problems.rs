//! What is wrong with the file: collected while it is read, reported all at once.
//!
//! Each problem names the key, the value and what is expected, with line and column where the
//! file has the key. Invariant: no text shows a value that may be a secret, and any value may be
//! one if its key is mistyped or the file broken: an excerpt shows a key only.

use std::ops::Range;

use crate::error::{Error, Result};

/// Longest key, in bytes, that an excerpt shows.
const EXCERPT_MAX: usize = 200;

/// Where something stands in the file, in bytes.
pub(super) type Span = Range<usize>;

/// One thing that is wrong.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) at: Option<Span>,
    pub(super) what: String,
    pub(super) hint: Option<String>,
    /// Whether it is about a key, which is shown on a line of its own.
    pub(super) excerpt: bool,
}

/// Everything that is wrong, in the order in which it was found.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// One error with every problem in it, in the order of the file; or nothing.
    pub(super) fn into_result(mut self, file: &str, text: &str) -> Result<()> {
        self.0.sort_by_key(|problem| problem.at.as_ref().map(|at| at.start));
        match self.0.as_slice() {
            [] => Ok(()),
            [one] => Err(one.to_error(file, text)),
            many => {
                let lines: Vec<String> = many.iter().map(|problem| problem.line(text)).collect();
                let count = many.len();
                let list = lines.join("\n  - ");
                Err(Error::config(format!("{file} has {count} problems:\n  - {list}")))
            }
        }
    }
}

impl Problem {
    /// `file:line:column: what`, with the key below it where it is about one.
    pub(super) fn to_error(&self, file: &str, text: &str) -> Error {
        let what = &self.what;
        let error = Error::config(match &self.at {
            None => format!("{file}: {what}"),
            Some(at) => {
                let (line, column) = place(text, at.start);
                let excerpt = if self.excerpt { excerpt(text, at) } else { String::new() };
                format!("{file}:{line}:{column}: {what}{excerpt}")
            }
        });
        match &self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    /// One line of a list of problems.
    fn line(&self, text: &str) -> String {
        let what = match &self.at {
            Some(at) => format!("line {}: {}", place(text, at.start).0, self.what),
            None => self.what.clone(),
        };
        match &self.hint {
            Some(hint) => format!("{what} ({hint})"),
            None => what,
        }
    }
}

/// Line and column, both from 1, of the byte `at`.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

/// The key at `at` with a gutter, and a mark below it. Nothing for one in quotes: a URL may stand
/// where its key was forgotten.
fn excerpt(text: &str, at: &Span) -> String {
    let Some((key, after)) = text.get(at.clone()).zip(text.get(at.end..)) else {
        return String::new();
    };
    if !is_plain_key(key) || key.len() > EXCERPT_MAX {
        return String::new();
    }
    let (number, _) = place(text, at.start);
    let gutter = " ".repeat(number.to_string().len());
    let value = if after.trim_start().starts_with('=') { " = ***" } else { "" };
    let mark = "^".repeat(key.len());
    format!("\n{gutter} |\n{number} | {key}{value}\n{gutter} | {mark}")
}

/// Whether it is written without quotes: then it cannot be a URL in the wrong place.
pub(super) fn is_plain_key(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

/// The name with the smallest edit distance to `word`, if it is near enough to be a typo.
pub(super) fn nearest<'a>(word: &str, names: &[&'a str]) -> Option<&'a str> {
    let limit = 1 + word.len() / 4;
    let scored = names.iter().map(|name| (edit_distance(word, name), *name));
    scored.filter(|(distance, _)| *distance <= limit).min().map(|(_, name)| name)
}

/// Levenshtein distance, in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(at: Option<Span>, what: &str, hint: Option<&str>) -> Problem {
        Problem { at, what: what.into(), hint: hint.map(str::to_owned), excerpt: true }
    }

    #[test]
    fn one_problem_shows_its_line_and_several_are_listed_in_the_order_of_the_file() {
        let text = "a = 1\nbb = 2\n";
        let mut one = Problems::default();
        one.add(problem(Some(6..8), "unknown key \"bb\"", Some("did you mean \"b\"?")));
        let error = one.into_result("w.toml", text).unwrap_err();
        assert_eq!(error.to_string(), "w.toml:2:1: unknown key \"bb\"\n  |\n2 | bb = ***\n  | ^^");
        assert_eq!(error.hint_text(), Some("did you mean \"b\"?"));

        let mut two = Problems::default();
        two.add(problem(Some(6..8), "second", Some("do this")));
        two.add(problem(Some(0..1), "first", None));
        two.add(problem(None, "nowhere", None));
        let error = two.into_result("w.toml", text).unwrap_err();
        let expected = "w.toml has 3 problems:\n  - nowhere\n  - line 1: first\n  \
                        - line 2: second (do this)";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn an_excerpt_shows_a_key_and_no_value() {
        assert_eq!(excerpt("broker.pw = 'x'", &(7..9)), "\n  |\n1 | pw = ***\n  | ^^");
        assert_eq!(excerpt("[brokr]\npw = 'x'", &(1..6)), "\n  |\n1 | brokr\n  | ^^^^^");
        assert_eq!(excerpt("\"amqp://a:b@h\" = 1", &(0..14)), "");
        assert_eq!(excerpt(&"x".repeat(EXCERPT_MAX + 1), &(0..EXCERPT_MAX + 1)), "");
    }

    #[test]
    fn a_typo_finds_its_name_and_another_word_does_not() {
        let names = ["name", "slot", "publication"];
        assert_eq!(nearest("slott", &names), Some("slot"));
        assert_eq!(nearest("publcation", &names), Some("publication"));
        assert_eq!(nearest("tables", &names), None);
    }
}
