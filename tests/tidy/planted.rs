//! The planted bugs (`scripts/planted`) stay plantable: each patch says what it is, touches
//! production files only, and still applies.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::code::Code;

/// Patches without a first line of the form `# M7, who shipped it: what it is.`, or that touch more
/// than `src`.
pub fn wrong_patches(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for patch in files.iter().filter(|f| is_patch(f)) {
        let first = patch.text.lines().next().unwrap_or_default();
        let name = patch.path.rsplit('/').next().unwrap_or_default();
        let number = name.split('_').next().and_then(|digits| digits.parse::<u8>().ok());
        let said = number.and_then(|number| first.strip_prefix(&format!("# M{number}, ")));
        if !said.is_some_and(|rest| rest.contains(": ") && rest.ends_with('.')) {
            found.push(format!("{}: begin with \"# M<number>, <who>: <what>.\"", patch.path));
        }
        let target = |line: &str| line.strip_prefix("+++ b/").map(str::to_owned);
        let foreign = |path: &String| !path.starts_with("src/");
        let foreign: Vec<String> = patch.text.lines().filter_map(target).filter(foreign).collect();
        found.extend(foreign.iter().map(|path| format!("{}: changes {path}", patch.path)));
    }
    found
}

/// Patches that no longer apply to the repository.
pub fn stale_patches(files: &[Code]) -> Vec<String> {
    let mut found = Vec::new();
    for patch in files.iter().filter(|f| is_patch(f)) {
        if let Err(text) = applies(&patch.text) {
            found.push(format!("{}: no longer applies: {text}", patch.path));
        }
    }
    found
}

/// How many there are; a rename must not switch the rules off unseen.
pub fn patches_seen(files: &[Code]) -> usize {
    files.iter().filter(|f| is_patch(f)).count()
}

fn is_patch(file: &Code) -> bool {
    file.path.starts_with("tests/planted/")
}

fn applies(patch: &str) -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut git = Command::new("git");
    // Below somebody else's repository, git would skip what is outside of it, and find no fault.
    git.env("GIT_CEILING_DIRECTORIES", root.parent().unwrap_or(root)).current_dir(root);
    git.args(["apply", "--check", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = git.spawn().expect("git is there");
    let mut stdin = child.stdin.take().expect("it was asked for");
    stdin.write_all(patch.as_bytes()).expect("git reads all of it");
    drop(stdin);
    let ended = child.wait_with_output().expect("git ends");
    let text = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    if ended.status.success() { Ok(()) } else { Err(text) }
}
