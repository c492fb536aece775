//! The root and the documents: their size, that they exist, and that their links lead somewhere.

use std::collections::BTreeSet;

use super::code::Code;

/// Documents with a limit of their own, in lines.
const LINES_MAX: &[(&str, usize)] = &[("README.md", 120), ("docs/architecture.md", 250)];
/// Entries of the root whose name has no leading dot.
const ROOT_ENTRIES_MAX: usize = 16;
/// What a visitor looks for.
const WANTED: &[&str] =
    &["README.md", "CHANGELOG.md", "docs/licenses/MIT.txt", "docs/licenses/Apache-2.0.txt"];

pub fn long_documents(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, most) in LINES_MAX {
        let lines = files.iter().find(|f| f.path == *path).map(|f| f.text.lines().count());
        if let Some(lines) = lines.filter(|lines| lines > most) {
            found.push(format!("{path}: {lines} lines, at most {most}"));
        }
    }
    found
}

pub fn missing_documents(files: &[Code]) -> Vec<String> {
    let there = |name: &str| files.iter().any(|f| f.path == name);
    WANTED.iter().filter(|name| !there(name)).map(|name| format!("{name} is missing")).collect()
}

/// The first page anybody sees is the listing of the root.
pub fn crowded_root(files: &[Code]) -> Vec<String> {
    let names = files.iter().filter_map(|f| f.path.split('/').next());
    let visible: BTreeSet<&str> = names.filter(|name| !name.starts_with('.')).collect();
    if visible.len() <= ROOT_ENTRIES_MAX {
        return Vec::new();
    }
    let list = visible.iter().copied().collect::<Vec<_>>().join(" ");
    vec![format!("the root has {} entries, at most {ROOT_ENTRIES_MAX}: {list}", visible.len())]
}

/// Line numbers in documents are wrong after the next commit.
pub fn line_references(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in documents(files) {
        for (at, text) in file.text.match_indices(".rs:") {
            if file.text[at + text.len()..].starts_with(|c: char| c.is_ascii_digit()) {
                found.push(format!("{}: cites a line number, name the item", file.at(at)));
            }
        }
    }
    found
}

/// Links to files that do not exist, or to headings that a document does not have.
pub fn broken_links(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in documents(files) {
        for (at, link) in links(&file.text) {
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = resolve(&file.path, path);
            let inside = format!("{target}/");
            if !files.iter().any(|f| f.path == target || f.path.starts_with(&inside)) {
                found.push(format!("{}: {link} leads nowhere", file.at(at)));
                continue;
            }
            let document = files.iter().find(|f| f.path == target);
            let known = |f: &Code| headings(&f.text).iter().any(|known| known == heading);
            if !heading.is_empty() && !document.is_some_and(known) {
                found.push(format!("{}: {target} has no heading #{heading}", file.at(at)));
            }
        }
    }
    found
}

/// A document that README does not name is not found.
pub fn unlisted_documents(files: &[Code]) -> Vec<String> {
    let readme = files.iter().find(|f| f.path == "README.md");
    let listed: Vec<&str> =
        readme.map(|f| links(&f.text).iter().map(|(_, link)| *link).collect()).unwrap_or_default();
    let unlisted = documents(files).filter(|f| f.path.starts_with("docs/"));
    let unlisted = unlisted.filter(|f| !listed.contains(&f.path.as_str()));
    unlisted.map(|f| format!("{}: README.md does not link to it", f.path)).collect()
}

fn documents(files: &[Code]) -> impl Iterator<Item = &Code> {
    files.iter().filter(|f| f.path.ends_with(".md"))
}

/// The links of a document that stay inside the repository, with where they stand. Code is skipped.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let (mut at, mut fenced) = (0, false);
    for line in text.split_inclusive('\n') {
        fenced ^= line.trim_start().starts_with("```");
        for (open, mark) in line.match_indices("](").filter(|_| !fenced) {
            let rest = &line[open + mark.len()..];
            let link = rest.split(')').next().unwrap_or_default();
            if !link.contains("://") && !link.starts_with("mailto:") {
                found.push((at + open, link));
            }
        }
        at += line.len();
    }
    found
}

/// `link` as seen from the document `from`, relative to the root. Empty: the document itself.
fn resolve(from: &str, link: &str) -> String {
    if link.is_empty() {
        return from.to_owned();
    }
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "." | "" => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

/// The headings of a document, as links name them.
fn headings(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut found = Vec::new();
    for line in text.lines() {
        fenced ^= line.starts_with("```");
        if fenced || !line.starts_with('#') {
            continue;
        }
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        found.push(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
    }
    found
}
