//! Sizes, names and words of the code.

use super::code::{Code, body, closing, is_word};

/// Longest function, in lines from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// Longest file of code, in lines, its unit tests included.
const FILE_LINES_MAX: usize = 550;
/// Longest line of code, in characters.
const LINE_CHARS_MAX: usize = 100;

/// Names that say nothing.
const BANNED_NAMES: &[&str] =
    &["utils", "util", "common", "types", "manager", "helpers", "helper", "core"];

/// Left-overs.
const BANNED_WORDS: &[&str] = &["todo!", "unimplemented!", "dbg!", "#[ignore"];

/// A place where a rule does not hold.
pub struct Exception {
    /// Beginning of the path.
    pub path: &'static str,
    /// Beginning of the code at that place.
    pub words: &'static str,
    pub why: &'static str,
}

impl Exception {
    pub fn covers(&self, file: &Code, at: usize) -> bool {
        file.path.starts_with(self.path) && file.masked[at..].starts_with(self.words)
    }
}

fn is_code(file: &Code) -> bool {
    file.is_rust() || file.is_script() || file.path.ends_with(".sql")
}

pub fn long_functions(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_rust()) {
        for at in file.words("fn ") {
            let Some(open) = body(&file.masked, at) else { continue };
            if file.masked.as_bytes()[open] != b'{' {
                continue;
            }
            let Some(end) = closing(&file.masked, open) else { continue };
            let lines = file.line(end - 1) - file.line(at) + 1;
            if lines > FUNCTION_LINES_MAX {
                let name: String =
                    file.masked[at + 3..].chars().take_while(|c| is_word(*c)).collect();
                found.push(format!(
                    "{}: fn {name} has {lines} lines, {FUNCTION_LINES_MAX} is the wall",
                    file.at(at)
                ));
            }
        }
    }
    found
}

pub fn long_files(files: &[Code]) -> Vec<String> {
    let count = |f: &Code| f.text.lines().count();
    let long = files.iter().filter(|f| is_code(f) && count(f) > FILE_LINES_MAX);
    long.map(|f| format!("{}: {} lines, at most {FILE_LINES_MAX}", f.path, count(f))).collect()
}

pub fn long_lines(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| is_code(f)) {
        for (number, line) in file.text.lines().enumerate() {
            let chars = line.chars().count();
            if chars > LINE_CHARS_MAX {
                let at = format!("{}:{}", file.path, number + 1);
                found.push(format!("{at}: {chars} characters, at most {LINE_CHARS_MAX}"));
            }
        }
    }
    found
}

/// Modules whose texts can end up in `watership.parked`.
const STORED: &[&str] =
    &["message", "envelope", "event", "route", "column", "amqp", "relay/parking", "relay/window"];

/// A database in another encoding than UTF8 takes no other character than those of ASCII for sure,
/// be it in a comment: neither in the SQL that we run, nor in the texts that we store.
pub fn foreign_characters(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        let sql = file.path.starts_with("sql/");
        let stored = file.is_src() && file.is_in(STORED);
        if !sql && !stored {
            continue;
        }
        for (at, c) in file.text.char_indices().filter(|(_, c)| !c.is_ascii()) {
            let start = file.text[..at].rfind('\n').map_or(0, |newline| newline + 1);
            let line = file.text[start..].lines().next().unwrap_or_default();
            let comment = !sql && (line.trim_start().starts_with("//") || file.is_test(at));
            if !comment {
                found.push(format!(
                    "{}: {c:?}; a database may not be able to store it",
                    file.at(at)
                ));
            }
        }
    }
    found
}

pub fn empty_names(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_rust()) {
        let stem = file.path.strip_suffix(".rs").unwrap_or(&file.path);
        for name in stem.split('/').filter(|name| BANNED_NAMES.contains(name)) {
            found.push(format!("{}: a file named {name} says nothing, name the noun", file.path));
        }
        for at in file.words("mod ") {
            let name: String = file.masked[at + 4..].chars().take_while(|c| is_word(*c)).collect();
            if BANNED_NAMES.contains(&name.as_str()) {
                found.push(format!("{}: mod {name} says nothing, name the noun", file.at(at)));
            }
        }
    }
    found
}

pub fn left_overs(files: &[Code], exceptions: &[Exception]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_rust()) {
        for word in BANNED_WORDS {
            for at in file.words(word) {
                if !exceptions.iter().any(|e| e.covers(file, at)) {
                    found.push(format!("{}: {word}", file.at(at)));
                }
            }
        }
    }
    found
}

pub fn headless(files: &[Code]) -> Vec<String> {
    let headless = files.iter().filter(|f| f.is_src() && !f.text.starts_with("//!"));
    headless
        .map(|f| format!("{}: must start with //! (what, invariant, what not)", f.path))
        .collect()
}

/// Migrations are `sql/NNNN_name.sql` and `sql/inbox/NNNN_name.sql`, each folder numbered from 0001
/// without holes or twins. What begins without a digit is another kind of script.
pub fn migration_holes(files: &[Code]) -> Vec<String> {
    let numbered = files.iter().filter_map(|f| {
        let name = f.path.strip_prefix("sql/")?.strip_suffix(".sql")?;
        let (folder, name) = name.rsplit_once('/').unwrap_or(("", name));
        name.starts_with(|c: char| c.is_ascii_digit()).then_some((f, folder, name))
    });
    let (mut found, mut last) = (Vec::new(), ("", 0));
    for (file, folder, name) in numbered {
        let number = name.split('_').next().unwrap_or_default();
        last = (folder, if last.0 == folder { last.1 + 1 } else { 1 });
        let wanted = format!("{:04}", last.1);
        if number != wanted {
            found.push(format!("{}: expected number {wanted} here", file.path));
        }
    }
    found
}
