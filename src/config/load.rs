//! From the file to [`Raw`]: reading, TOML, and `${…}` in strings.
//!
//! The only place that looks at the environment. Invariant: no error shows a value that may be a
//! secret; excerpts of lines that hold a URL or a password are cut at the `=`.

use std::fmt::Write as _;
use std::path::Path;

use crate::config::raw::Raw;
use crate::error::{Error, Result};

/// What `${NAME}` stands for; the process environment, or a test's own.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads the file at `path` and fills in variables from the environment.
///
/// Returns the configuration as written and warnings about the file itself.
///
/// # Errors
/// [`crate::error::Kind::Config`] with file, line and column where the file is wrong.
pub fn load(path: &Path) -> Result<(Raw, Vec<String>)> {
    let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    let shown = path.display().to_string();
    let raw = parse(&shown, &text)?;
    let warnings = open_file_warning(path, &raw).into_iter().collect();
    let raw = fill_in(&raw, &|name| std::env::var(name).ok()).map_err(|e| e.context(shown))?;
    Ok((raw, warnings))
}

fn unreadable(path: &Path, e: &std::io::Error) -> Error {
    let path = path.display();
    if e.kind() == std::io::ErrorKind::NotFound {
        return Error::config(format!("config file {path} does not exist")).hint(
            "write one (config/watership.toml lists every key), or name it with --config FILE",
        );
    }
    Error::config(format!("config file {path} cannot be read: {e}"))
}

/// Parses TOML; `file` is only shown in errors.
///
/// # Errors
/// [`crate::error::Kind::Config`] with `file:line:column`, an excerpt and, for an unknown key, the
/// nearest known one.
pub fn parse(file: &str, text: &str) -> Result<Raw> {
    toml::from_str(text).map_err(|e| syntax_error(file, text, &e))
}

/// Longest line, in bytes, that an error shows.
const EXCERPT_MAX: usize = 200;

fn syntax_error(file: &str, text: &str, e: &toml::de::Error) -> Error {
    let at = e.span().map_or(0, |span| span.start).min(text.len());
    let line_number = text[..at].matches('\n').count() + 1;
    let line_start = text[..at].rfind('\n').map_or(0, |i| i + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let column = text[line_start..at].chars().count() + 1;

    let (message, hint) = explain(e.message(), line);
    let gutter = line_number.to_string();
    let pad = " ".repeat(gutter.len());
    let mut what = format!("{file}:{line_number}:{column}: {message}");
    let is_short = line.len() <= EXCERPT_MAX;
    if is_short {
        let _ = write!(what, "\n{pad} |\n{gutter} | {}\n{pad} | ", without_secret(line));
    }
    if is_short && !line_may_hold_secret(line) {
        let len = e.span().map_or(1, |s| s.len()).clamp(1, line.len().max(1));
        let _ = write!(what, "{}{}", " ".repeat(column - 1), "^".repeat(len));
    }
    let error = Error::config(what.trim_end().trim_end_matches('|').trim_end());
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Rewords serde's message; adds a hint where the mistake is a common one.
fn explain(message: &str, line: &str) -> (String, Option<String>) {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if message.starts_with("unknown field") {
        let unknown = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let hint = match nearest(unknown, &known) {
            Some(name) => format!("did you mean {name:?}?"),
            None => format!("known keys here: {}", known.join(", ")),
        };
        return (format!("unknown key {unknown:?}"), Some(hint));
    }
    // serde shows the value of a wrong type; it may be a password in the wrong place.
    if message.starts_with("invalid type") {
        let expected = message.rsplit("expected ").next().unwrap_or_default();
        let found = message.trim_start_matches("invalid type: ").split([' ', ',']).next();
        if let Some((expected, hint)) = shape(expected, line) {
            let found = found.unwrap_or("value");
            return (format!("{found} found, expected {expected}"), Some(hint));
        }
        let hint = (expected == "a string" && line.contains(|c: char| c.is_ascii_digit()))
            .then(|| "durations and sizes are strings, such as \"30s\" or \"16MiB\"".to_owned());
        return (format!("{} found, expected {expected}", found.unwrap_or("value")), hint);
    }
    if message.starts_with("invalid value: integer") {
        let what = message.trim_start_matches("invalid value: ").split(',').next();
        let what = what.unwrap_or_default().replace('`', "");
        return (format!("{what} is not allowed here"), Some("a whole number, 0 or more".into()));
    }
    (message.lines().next().unwrap_or_default().to_owned(), None)
}

/// A wrong shape in the words of TOML, with what to write instead.
fn shape(expected: &str, line: &str) -> Option<(&'static str, String)> {
    let key = line.split('=').next().unwrap_or_default();
    let key = key.trim().trim_matches(['[', ']']).trim();
    if let Some(name) = expected.strip_prefix("struct ") {
        let hint = match name {
            "RouteOutbox" => format!("write {key} = {{ aggregate_type = \"order\" }}"),
            _ => format!("write its keys below [{key}], or as {key}.name = …"),
        };
        return Some(("a table", hint));
    }
    match expected {
        "a sequence" if line.trim_start().starts_with('[') => {
            Some(("a list of tables", format!("write [[{key}]], once for each")))
        }
        "a sequence" => Some(("a list", format!("write {key} = [\"…\"]"))),
        "u64" | "u32" | "u16" | "i64" => {
            Some(("a whole number", "without quotes, 0 or more".to_owned()))
        }
        _ if line.trim_start().starts_with("[[") => {
            Some(("a table", format!("write [{key}], once")))
        }
        _ => None,
    }
}

fn line_may_hold_secret(line: &str) -> bool {
    line.contains("://") || line.contains('@') || line.to_ascii_lowercase().contains("password")
}

fn without_secret(line: &str) -> String {
    if !line_may_hold_secret(line) {
        return line.to_owned();
    }
    let is_key = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "_-. ".contains(c));
    match line.split_once('=') {
        Some((key, _)) if is_key(key) => format!("{key}= ***"),
        _ => "***".into(),
    }
}

/// The name with the smallest edit distance to `word`, if it is near enough to be a typo.
fn nearest<'a>(word: &str, names: &[&'a str]) -> Option<&'a str> {
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

/// Replaces `${NAME}`, `${NAME:-default}` and `${file:/path}` in every string; `$${` is a
/// literal `${`.
///
/// # Errors
/// [`crate::error::Kind::Config`] listing every variable that is not set and every file that
/// cannot be read, with its key.
pub fn fill_in(raw: &Raw, lookup: Lookup<'_>) -> Result<Raw> {
    let mut tree = toml::Value::try_from(raw)
        .map_err(|e| Error::config("configuration cannot be filled in").caused_by(e))?;
    let mut problems = Vec::new();
    fill_tree(&mut tree, "", lookup, &mut problems);
    if let [first, rest @ ..] = problems.as_slice() {
        let what = rest.iter().fold(first.clone(), |all, problem| format!("{all}\n{problem}"));
        let hint = match problems.iter().all(|problem| problem.contains("${file:")) {
            true => "write the file, and let the user of this process read it",
            false => "set it, or give a default with ${NAME:-default}; $${ is a literal ${",
        };
        return Err(Error::config(what).hint(hint));
    }
    tree.try_into().map_err(|e| Error::config("configuration cannot be filled in").caused_by(e))
}

/// [`fill_in`] for one string, from the environment; for values of command line options.
///
/// # Errors
/// [`crate::error::Kind::Config`] naming the variable or the file.
pub fn fill_in_text(text: &str) -> Result<String> {
    fill_text(text, &|name| std::env::var(name).ok()).map_err(Error::config)
}

fn fill_tree(value: &mut toml::Value, key: &str, lookup: Lookup<'_>, problems: &mut Vec<String>) {
    match value {
        toml::Value::String(text) => match fill_text(text, lookup) {
            Ok(filled) => *text = filled,
            Err(problem) => problems.push(format!("{key}: {problem}")),
        },
        toml::Value::Array(list) => {
            for (index, item) in list.iter_mut().enumerate() {
                fill_tree(item, &format!("{key}[{index}]"), lookup, problems);
            }
        }
        toml::Value::Table(table) => {
            for (name, item) in table.iter_mut() {
                let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                fill_tree(item, &path, lookup, problems);
            }
        }
        toml::Value::Integer(_)
        | toml::Value::Float(_)
        | toml::Value::Boolean(_)
        | toml::Value::Datetime(_) => {}
    }
}

fn fill_text(text: &str, lookup: Lookup<'_>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        if let Some(literal) = before.strip_suffix('$') {
            out.push_str(literal);
            out.push_str("${");
            rest = after;
            continue;
        }
        out.push_str(before);
        let Some((inside, tail)) = after.split_once('}') else {
            return Err("\"${\" has no closing \"}\"".into());
        };
        out.push_str(&resolve(inside, lookup)?);
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

fn resolve(inside: &str, lookup: Lookup<'_>) -> Result<String, String> {
    if let Some(path) = inside.strip_prefix("file:") {
        let content = std::fs::read_to_string(path)
            .map_err(|e| format!("file {path} of ${{file:…}} cannot be read: {e}"))?;
        // One newline: editors add it, passwords do not end with it.
        let trimmed = content.strip_suffix('\n').unwrap_or(&content);
        return Ok(trimmed.strip_suffix('\r').unwrap_or(trimmed).to_owned());
    }
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !is_name {
        return Err(format!("${{{name}}} is no variable name, allowed: letters, digits and _"));
    }
    match (lookup(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!("environment variable {name} is not set")),
    }
}

/// A file that others can read should not hold a password.
#[cfg(unix)]
fn open_file_warning(path: &Path, raw: &Raw) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
    let open = mode & 0o044 != 0;
    (open && holds_literal_password(raw)).then(|| {
        format!(
            "{} holds a password and can be read by others (mode {mode:03o}): \
             chmod 600 it, or use ${{file:…}}",
            path.display()
        )
    })
}

#[cfg(not(unix))]
fn open_file_warning(_: &Path, _: &Raw) -> Option<String> {
    None
}

/// True when a password stands in the file itself, not in a variable or another file.
fn holds_literal_password(raw: &Raw) -> bool {
    let literal = |text: &str| !text.is_empty() && !text.starts_with("${");
    let in_url = |url: &str| {
        let authority = url.split_once("://").map_or("", |(_, rest)| rest);
        let user_info = authority.rsplit_once('@').map_or("", |(user_info, _)| user_info);
        user_info.split_once(':').is_some_and(|(_, password)| literal(password))
    };
    literal(&raw.source.password)
        || literal(&raw.broker.password)
        || in_url(&raw.source.url)
        || in_url(&raw.broker.management_url)
        || raw.broker.url.iter().any(|url| in_url(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(text: &str) -> Result<String, String> {
        fill_text(text, &|name| match name {
            "USER" => Some("relay".into()),
            "EMPTY" => Some(String::new()),
            _ => None,
        })
    }

    #[test]
    fn variables_defaults_and_files_are_filled_in() {
        let file = std::env::temp_dir().join(format!("watership-load-{}", std::process::id()));
        std::fs::write(&file, "hunter2\n\n").unwrap();
        let from_file = format!("a${{file:{}}}b", file.display());
        for (text, filled) in [
            ("plain $ {} text", "plain $ {} text"),
            ("postgres://${USER}@${HOST:-db}/x", "postgres://relay@db/x"),
            ("${EMPTY}|${EMPTY:-x}", "|x"),
            ("$${USER}", "${USER}"),
            (&*from_file, "ahunter2\nb"),
        ] {
            assert_eq!(fill(text).as_deref(), Ok(filled));
        }
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn what_cannot_be_filled_in_is_named() {
        for (text, problem) in [
            ("${HOST}", "environment variable HOST is not set"),
            ("${HOST", "\"${\" has no closing \"}\""),
            ("${a b}", "${a b} is no variable name, allowed: letters, digits and _"),
        ] {
            assert_eq!(fill(text).unwrap_err(), problem);
        }
        assert!(fill("${file:/none}").unwrap_err().starts_with("file /none of ${file:…} cannot"));
    }

    #[test]
    fn all_missing_variables_are_reported_with_their_keys() {
        let raw = parse("f", "source.url = '${A}'\nbroker.url = ['x', '${B}']").ok().unwrap();
        let error = fill_in(&raw, &|_| None).err().unwrap().to_string();
        assert!(error.contains("source.url: environment variable A is not set"), "{error}");
        assert!(error.contains("broker.url[1]: environment variable B is not set"), "{error}");
    }

    #[test]
    fn a_missing_file_is_told_with_what_to_do_about_files() {
        let raw = parse("f", "source.password = '${file:/none}'").ok().unwrap();
        let error = fill_in(&raw, &|_| None).err().unwrap();
        assert_eq!(
            error.hint_text(),
            Some("write the file, and let the user of this process read it")
        );
    }

    #[test]
    fn an_unknown_key_is_shown_with_its_place_and_the_nearest_name() {
        let text = "name = \"shop\"\n[relay]\nchekpoint_interval = \"1s\"\n";
        let error = parse("w.toml", text).err().unwrap();
        let expected = "w.toml:3:1: unknown key \"chekpoint_interval\"\n  |\n\
                        3 | chekpoint_interval = \"1s\"\n  | ^^^^^^^^^^^^^^^^^^";
        assert_eq!(error.to_string(), expected);
        assert_eq!(error.hint_text(), Some("did you mean \"checkpoint_interval\"?"));
    }

    #[test]
    fn a_broken_line_with_a_password_is_not_shown() {
        for text in [
            "source.url = \"postgres://a:hunter2@h/x\n",
            "[source]\nurl = postgres://a:hunter2@h/x",
            "[source]\npassword = hunter2",
            "[broker]\nurl = [\n\"amqp://a:hunter2=x@h\n]",
        ] {
            let error = parse("w.toml", text).err().unwrap();
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn passwords_in_the_file_are_noticed() {
        let literal = |text| holds_literal_password(&parse("f", text).ok().unwrap());
        assert!(literal("source.url = 'postgres://a:b@h/x'"));
        assert!(literal("broker.password = 'b'"));
        assert!(!literal("source.url = 'postgres://a@h/x'\nbroker.password = '${file:/run/x}'"));
        assert!(!literal("broker.url = 'amqp://a:${PW}@h/x'"));
    }
}
