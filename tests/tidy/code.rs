//! Reads the repository and its Rust code, as far as the tidy rules need it.
//!
//! `Code::masked` is the text with the inside of comments, strings and character literals blanked
//! out, byte for byte, so that offsets and lines stay true and no rule is fooled by a word in a
//! comment. Not a parser: it can be tricked.

use std::fs;
use std::ops::Range;
use std::path::Path;

/// Folders that hold no source of ours.
const SKIPPED: &[&str] = &[
    ".git",
    "target",
    "tests/bench/out",
    "tests/bench/peers/venv",
    "tests/fuzz/artifacts",
    "tests/fuzz/corpus",
];

/// One file of the repository.
pub struct Code {
    /// Relative to the root, with `/`.
    pub path: String,
    pub text: String,
    /// The text with comments, strings and character literals blanked.
    pub masked: String,
    /// Byte ranges of the items under `#[cfg(test)]`.
    tests: Vec<Range<usize>>,
}

impl Code {
    pub fn new(path: &str, text: &str) -> Self {
        let rust = path.ends_with(".rs");
        let masked = if rust { mask(text) } else { String::new() };
        let tests = test_items(&masked);
        Self { path: path.to_owned(), text: text.to_owned(), masked, tests }
    }

    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Rust that is compiled into the library or the binary.
    pub fn is_src(&self) -> bool {
        self.is_rust() && self.path.starts_with("src/")
    }

    /// A script: named so, or recognised by its first line.
    pub fn is_script(&self) -> bool {
        let first = self.text.lines().next().unwrap_or_default();
        self.path.ends_with(".sh") || (first.starts_with("#!") && first.contains("sh"))
    }

    /// The path inside `src/` without `.rs` and `/mod.rs`: `relay/lanes`, `pg`.
    pub fn module(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let inner = inner.strip_suffix(".rs").unwrap_or(inner);
        inner.strip_suffix("/mod").unwrap_or(inner)
    }

    /// True when the module is one of `modules` or below one of them.
    pub fn is_in(&self, modules: &[&str]) -> bool {
        let mine = self.module();
        modules.iter().any(|m| {
            mine.strip_prefix(m).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// True when the byte belongs to test code.
    pub fn is_test(&self, at: usize) -> bool {
        !self.is_src()
            || self.module().ends_with("/tests")
            || self.tests.iter().any(|range| range.contains(&at))
    }

    /// Line number, from 1.
    pub fn line(&self, at: usize) -> usize {
        self.text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1
    }

    /// `path:line`, for messages.
    pub fn at(&self, at: usize) -> String {
        format!("{}:{}", self.path, self.line(at))
    }

    /// Offsets of `needle` in the code where it is not a part of a longer word.
    pub fn words<'a>(&'a self, needle: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.masked.match_indices(needle).map(|(at, _)| at).filter(move |at| {
            let before = self.masked[..*at].chars().next_back();
            let after = self.masked[at + needle.len()..].chars().next();
            let opens = needle.starts_with(is_word) && before.is_some_and(is_word);
            let goes_on = needle.ends_with(is_word) && after.is_some_and(is_word);
            !opens && !goes_on
        })
    }

    /// Every path that starts with `root::`, groups spread: offset and the path after the root.
    pub fn paths(&self, root: &str) -> Vec<(usize, String)> {
        let head = format!("{root}::");
        let mut found = Vec::new();
        for at in self.words(&head) {
            let mut rest = at + head.len();
            spread(&self.masked, &mut rest, "", at, &mut found);
        }
        found
    }
}

/// The files of the repository that the rules look at.
pub fn repository() -> Vec<Code> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    walk(root, "", &mut files);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.iter().any(Code::is_src), "no Rust file under src/: nothing was checked");
    files
}

fn walk(root: &Path, folder: &str, files: &mut Vec<Code>) {
    let entries = fs::read_dir(root.join(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
    for entry in entries {
        let entry = entry.expect("a readable folder");
        let name = entry.file_name().into_string().expect("names are UTF-8");
        let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
        let kind = entry.file_type().expect("a kind of file");
        let foreign = ["/target", "/node_modules"].iter().any(|end| path.ends_with(end));
        if foreign || SKIPPED.contains(&path.as_str()) {
            continue;
        }
        if kind.is_dir() {
            walk(root, &path, files);
        } else if kind.is_file() {
            // What is not UTF-8 is not source code.
            if let Ok(text) = fs::read_to_string(entry.path()) {
                files.push(Code::new(&path, &text));
            }
        }
    }
}

pub fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Reads the tree at `*at` and adds each of its leaves, with `prefix` before it.
fn spread(
    code: &str,
    at: &mut usize,
    prefix: &str,
    found_at: usize,
    out: &mut Vec<(usize, String)>,
) {
    let bytes = code.as_bytes();
    let blank = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_whitespace);
    let mut path = prefix.to_owned();
    loop {
        while blank(*at) {
            *at += 1;
        }
        let rest = &code[*at..];
        if rest.starts_with('{') {
            *at += 1;
            while bytes.get(*at).is_some_and(|b| *b != b'}') {
                let before = *at;
                spread(code, at, &path, found_at, out);
                *at += usize::from(*at == before);
                while blank(*at) || bytes.get(*at) == Some(&b',') {
                    *at += 1;
                }
            }
            *at += 1;
            return;
        }
        let word = rest.find(|c| !is_word(c) && c != '*').unwrap_or(rest.len());
        path.push_str(&rest[..word]);
        *at += word;
        if !code[*at..].starts_with("::") {
            break;
        }
        *at += 2;
        path.push_str("::");
    }
    // `as name` and whatever else stands before the next comma or brace inside a group.
    while !prefix_ends(code, *at) {
        *at += 1;
    }
    out.push((found_at, path));
}

fn prefix_ends(code: &str, at: usize) -> bool {
    code.as_bytes().get(at).is_none_or(|b| !b.is_ascii_whitespace() && !is_word(*b as char))
}

/// The byte after the brace that closes the one at `open`.
pub fn closing(masked: &str, open: usize) -> Option<usize> {
    let mut depth = 0_usize;
    for (at, byte) in masked.bytes().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return Some(at + 1),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// Where the item that starts at `at` begins its body, or ends without one.
pub fn body(masked: &str, at: usize) -> Option<usize> {
    let mut depth = 0_i32;
    for (at, byte) in masked.bytes().enumerate().skip(at) {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b'{' | b';' if depth == 0 => return Some(at),
            _ => {}
        }
    }
    None
}

fn test_items(masked: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    for (at, attribute) in masked.match_indices("#[cfg(test)]") {
        let Some(open) = body(masked, at + attribute.len()) else { continue };
        let end = if masked.as_bytes()[open] == b'{' { closing(masked, open) } else { None };
        found.push(at..end.unwrap_or(open + 1));
    }
    found
}

/// Blanks comments, strings and character literals; line breaks stay.
pub fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = literal_end(text, at);
        let Some(end) = end else {
            at += 1;
            continue;
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    // Whole literals and comments were blanked, so no character was cut in two.
    String::from_utf8(out).expect("blanking keeps UTF-8")
}

/// The end of the comment or literal that starts at `at`, if one does.
fn literal_end(text: &str, at: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let rest = &bytes[at..];
    if rest.starts_with(b"//") {
        return Some(text[at..].find('\n').map_or(text.len(), |n| at + n));
    }
    if rest.starts_with(b"/*") {
        return Some(block_comment_end(bytes, at));
    }
    if bytes[at] == b'"' {
        return Some(string_end(bytes, at + 1));
    }
    if bytes[at] == b'r' && !word_goes_on(bytes, at) {
        let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
        if rest.get(1 + hashes) == Some(&b'"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let start = at + 2 + hashes;
            let end = text[start..].find(&close).map(|n| start + n + close.len());
            return Some(end.unwrap_or(text.len()));
        }
    }
    if bytes[at] == b'\'' {
        let mut inner = text[at + 1..].chars();
        return match (inner.next()?, inner.next()?) {
            ('\\', escaped) => {
                let start = at + 2 + escaped.len_utf8();
                text[start..].find('\'').map(|n| start + n + 1)
            }
            (one, '\'') => Some(at + 2 + one.len_utf8()),
            _ => None,
        };
    }
    None
}

/// `r` continues a word, unless that word is the `b` or `c` of `br"…"`.
fn word_goes_on(bytes: &[u8], at: usize) -> bool {
    let word = |n: usize| at >= n && is_word(bytes[at - n] as char);
    word(1) && (word(2) || !matches!(bytes[at - 1], b'b' | b'c'))
}

fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn block_comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if bytes[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}
