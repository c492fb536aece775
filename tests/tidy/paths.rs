//! A comment that sends its reader to a file sends them to one that exists.

use super::code::Code;
use super::{accepts, finds, holds};

/// Paths in the comments of `src`, such as `relay/check/position`, that name nothing.
pub fn stale_paths(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| f.is_src()) {
        let mut start = 0;
        for line in file.text.split_inclusive('\n') {
            if let Some(comment) = line.trim_start().strip_prefix("//") {
                let spans = comment.split('`').skip(1).step_by(2).filter(|span| is_path(span));
                for span in spans.filter(|span| !exists(files, file, span)) {
                    found.push(format!("{}: there is no {span}", file.at(start)));
                }
            }
            start += line.len();
        }
    }
    found
}

fn is_path(span: &str) -> bool {
    let (stem, is_file) = match span.strip_suffix(".rs") {
        Some(stem) => (stem, true),
        None => (span, false),
    };
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let mut parts = stem.split('/');
    (is_file || stem.contains('/')) && parts.all(|part| part.len() > 1 && part.chars().all(plain))
}

/// As seen from the root, from `src`, or from the folder of `file`; a module without `.rs`.
fn exists(files: &[Code], file: &Code, span: &str) -> bool {
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    [String::new(), "src/".into(), format!("{folder}/")].iter().any(|from| {
        let path = format!("{from}{span}");
        let leads_to = |f: &Code| match f.path.strip_prefix(&path) {
            Some(rest) => rest.is_empty() || rest == ".rs" || rest.starts_with('/'),
            None => false,
        };
        files.iter().any(leads_to)
    })
}

#[test]
fn paths_in_comments_lead_somewhere() {
    holds(stale_paths);
    finds(
        stale_paths,
        &[
            ("src/a.rs", "//! As decided in `relay/gone`.", 1),
            ("src/a.rs", "fn f() {}\n    // See `gone.rs`.\n", 2),
            ("src/ab/b.rs", "//! `ab/cd`", 1),
        ],
    );
    accepts(
        stale_paths,
        &[
            ("src/ab/bc.rs", "//! See `ab/bc`, `src/ab`, `bc.rs` and `/status`, not `x/y.h`."),
            ("src/a.rs", "fn f() { let s = \"`relay/gone`\"; }"),
        ],
    );
}
