//! Dead code that the compiler cannot see: every module is public, so to it every `pub fn` has a
//! user. Here it needs one other than a test: in `src`, in a doctest, in an example, a benchmark or
//! a fuzz target. What is under `src/dev` exists for tests, and `src/inbox` for applications
//! elsewhere, so the use of tests counts for them.
//!
//! Names are all that is compared: a method that shares its name with one that is in use stays
//! unseen.

use std::collections::HashMap;
use std::ops::Range;

use super::code::{Code, body, closing, is_word};

/// A function that may stay although nothing uses it.
pub struct Kept {
    /// Its file.
    pub path: &'static str,
    pub name: &'static str,
    pub why: &'static str,
}

/// Where else than in `src` a use counts.
const USERS: &[&str] = &["examples/", "tests/bench/", "tests/fuzz/", "scripts/"];

/// A `pub fn`.
struct Function<'a> {
    file: &'a Code,
    name: &'a str,
    /// From `fn` to its last brace.
    range: Range<usize>,
    called: Called<'a>,
}

enum Called<'a> {
    /// `name(…)` where it is imported, or `module::name`.
    Free,
    /// `x.name(…)`, or `Type::name`.
    Method(&'a str),
    /// `Type::name`.
    Associated(&'a str),
}

/// Public functions without a user, other than those that are `kept`.
pub fn unused(files: &[Code], kept: &[Kept]) -> Vec<String> {
    let doctests = doctests(files);
    let users: Vec<User> = files.iter().chain(&doctests).map(User::new).collect();
    let mut places: HashMap<&str, Vec<(&User, usize)>> = HashMap::new();
    for user in &users {
        for (at, word) in identifiers(&user.file.masked) {
            places.entry(word).or_default().push((user, at));
        }
    }
    let mut found = Vec::new();
    for function in files.iter().filter(|f| f.is_src()).flat_map(functions) {
        let places = places.get(function.name).map(Vec::as_slice).unwrap_or_default();
        let is_kept = |k: &Kept| k.path == function.file.path && k.name == function.name;
        if !places.iter().any(|(user, at)| user.uses(&function, *at)) && !kept.iter().any(is_kept) {
            let at = function.file.at(function.range.start);
            found.push(format!("{at}: nothing but tests uses {}", function.name));
        }
    }
    found
}

/// A file that may use functions.
struct User<'a> {
    file: &'a Code,
    imports: Vec<Range<usize>>,
}

impl<'a> User<'a> {
    fn new(file: &'a Code) -> Self {
        let end = |at: usize| file.masked[at..].find(';').map_or(file.masked.len(), |n| at + n);
        Self { file, imports: file.words("use ").map(|at| at..end(at)).collect() }
    }

    fn is_import(&self, at: usize) -> bool {
        self.imports.iter().any(|range| range.contains(&at))
    }

    /// Whether the word at `at`, which is the function's name, is a use of it.
    fn uses(&self, function: &Function<'_>, at: usize) -> bool {
        let own = self.file.path == function.file.path;
        if own && function.range.contains(&at) || self.is_import(at) || !self.counts(function, at) {
            return false;
        }
        let before = &self.file.masked[..at];
        let after = &self.file.masked[at + function.name.len()..];
        let called = after.starts_with('(') || after.starts_with("::<");
        match function.called {
            Called::Method(owner) => {
                (before.ends_with('.') && called) || self.is_of(owner, own, before)
            }
            Called::Associated(owner) => self.is_of(owner, own, before),
            Called::Free if before.ends_with("::") => {
                last_word(before).starts_with(|c: char| c.is_lowercase())
            }
            Called::Free => {
                let is_name = before.ends_with('.') || before.ends_with("fn ");
                let is_field = after.starts_with(':') && !called;
                (own || self.imports(function.name)) && !is_name && !is_field
            }
        }
    }

    /// Whether what stands at `at` may be a use that counts for this function.
    fn counts(&self, function: &Function<'_>, at: usize) -> bool {
        let is_user = USERS.iter().any(|folder| self.file.path.starts_with(folder));
        is_user || !self.file.is_test(at) || function.file.is_in(&["dev", "inbox"])
    }

    fn imports(&self, name: &str) -> bool {
        self.file.words(name).any(|at| self.is_import(at))
    }

    /// Whether the text ends with the path of `owner`, by its own name or by another one that it
    /// was imported under.
    fn is_of(&self, owner: &str, own: bool, before: &str) -> bool {
        let path = before.ends_with("::").then(|| last_word(before));
        let renamed = |word: &str| {
            let alias = format!("{owner} as {word}");
            self.file.words(&alias).next().is_some()
        };
        path.is_some_and(|word| word == owner || (own && word == "Self") || renamed(word))
    }
}

/// The word before the `::` at the end; a generic argument is not looked through.
fn last_word(before: &str) -> &str {
    before.trim_end_matches("::").rsplit(|c| !is_word(c)).next().unwrap_or_default()
}

/// Every `pub fn` of a file, other than those of its tests.
fn functions(file: &Code) -> Vec<Function<'_>> {
    let owners = owners(&file.masked);
    let mut found = Vec::new();
    for at in file.words("fn ").filter(|at| !file.is_test(*at)) {
        let line = &file.masked[file.masked[..at].rfind('\n').map_or(0, |n| n + 1)..at];
        if !line.trim_start().starts_with("pub ") {
            continue;
        }
        let rest = &file.masked[at + 3..];
        let name = &rest[..rest.find(|c| !is_word(c)).unwrap_or(rest.len())];
        let open = body(&file.masked, at).unwrap_or(file.masked.len());
        let end = closing(&file.masked, open).unwrap_or(open);
        let owner = owners.iter().find(|(range, _)| range.contains(&at));
        let called = match owner {
            None => Called::Free,
            Some((_, owner)) if takes_self(&file.masked[at..open]) => Called::Method(owner),
            Some((_, owner)) => Called::Associated(owner),
        };
        found.push(Function { file, name, range: at..end, called });
    }
    found
}

/// Whether the first parameter is `self`, in any of its forms.
fn takes_self(signature: &str) -> bool {
    let parameters = signature.split_once('(').map_or("", |(_, rest)| rest);
    let first = parameters.split([',', ')', ':']).next().unwrap_or_default();
    first.split(|c| !is_word(c)).any(|word| word == "self")
}

/// The `impl` blocks, each with the name of its type.
fn owners(masked: &str) -> Vec<(Range<usize>, &str)> {
    let mut found = Vec::new();
    for (at, head) in masked.match_indices("impl") {
        let starts_line = at == 0 || masked.as_bytes()[at - 1] == b'\n';
        let Some(open) = body(masked, at).filter(|_| starts_line) else { continue };
        let mut rest = masked[at + head.len()..open].trim_start();
        if rest.starts_with('<') {
            rest = after_generics(rest);
        }
        let path = rest.split(['<', '{', ' ']).find(|word| !word.is_empty()).unwrap_or_default();
        let name = path.rsplit("::").next().unwrap_or(path);
        found.push((at..closing(masked, open).unwrap_or(open), name));
    }
    found
}

fn after_generics(text: &str) -> &str {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        depth += i32::from(c == '<') - i32::from(c == '>');
        if depth == 0 {
            return &text[at + 1..];
        }
    }
    ""
}

fn identifiers(masked: &str) -> impl Iterator<Item = (usize, &str)> {
    let words = masked.split(|c| !is_word(c)).filter(|word| !word.is_empty());
    // A part of the text knows where it begins.
    words.map(|word| (word.as_ptr().addr() - masked.as_ptr().addr(), word))
}

/// The code in the documentation of `src`, as files of an example.
fn doctests(files: &[Code]) -> Vec<Code> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src()) {
        let mut code = String::new();
        let mut fence = None;
        for line in file.text.lines().map(str::trim_start) {
            let Some(doc) = line.strip_prefix("///").or_else(|| line.strip_prefix("//!")) else {
                fence = None;
                continue;
            };
            match (doc.trim_start().strip_prefix("```"), fence) {
                (Some(language), None) => fence = Some(language),
                (Some(_), Some(_)) => fence = None,
                (None, Some("text")) | (None, None) => {}
                (None, Some(_)) => code.extend([doc, "\n"]),
            }
        }
        if !code.is_empty() {
            found.push(Code::new(&format!("examples/doctest/{}", file.path), &code));
        }
    }
    found
}
