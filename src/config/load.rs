//! From disk to text and values: reading the file, and `${…}` in strings.
//!
//! The only place that looks at the environment.

use std::path::Path;

use crate::error::{Error, Result};

/// What `${NAME}` stands for; the process environment, or a test's own.
pub type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The text of the file at `path`.
///
/// # Errors
/// [`crate::error::Kind::Config`] when it does not exist or cannot be read.
pub(super) fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| {
        let path = path.display();
        if e.kind() == std::io::ErrorKind::NotFound {
            return Error::config(format!("config file {path} does not exist"))
                .hint("create it (config/watership.toml lists every key), or pass --config FILE");
        }
        Error::config(format!("config file {path} cannot be read: {e}"))
    })
}

/// A variable of the process environment.
pub(super) fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// [`fill_in`] from the process environment; for values of command line options.
///
/// # Errors
/// [`crate::error::Kind::Config`] naming the variable or the file.
pub fn fill_in_text(text: &str) -> Result<String> {
    fill_in(text, &environment)
}

/// Replaces `${NAME}`, `${NAME:-default}` and `${file:/path}`; `$${` is a literal `${`.
///
/// # Errors
/// [`crate::error::Kind::Config`] naming the variable that is not set or the file that cannot be
/// read.
pub(super) fn fill_in(text: &str, lookup: Lookup<'_>) -> Result<String> {
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
            return Err(Error::config("\"${\" has no closing \"}\"")
                .hint("close it, or write $${ for a literal ${"));
        };
        out.push_str(&resolve(inside, lookup)?);
        rest = tail;
    }
    out.push_str(rest);
    Ok(out)
}

fn resolve(inside: &str, lookup: Lookup<'_>) -> Result<String> {
    if let Some(path) = inside.strip_prefix("file:") {
        let content = std::fs::read_to_string(path).map_err(|e| {
            Error::config(format!("file {path} of ${{file:…}} cannot be read: {e}"))
                .hint("create the file and make it readable by this user")
        })?;
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
        return Err(Error::config(format!("${{{name}}} is not a valid variable name"))
            .hint("use letters, digits and _; write $${ for a literal ${"));
    }
    match (lookup(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(Error::config(format!("environment variable {name} is not set"))
            .hint("set it, or give a default with ${NAME:-default}; $${ is a literal ${")),
    }
}

/// A file that holds a password and that others can read.
#[cfg(unix)]
pub(super) fn open_file_warning(path: &Path) -> Option<String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(path).ok()?.permissions().mode() & 0o777;
    let open = mode & 0o044 != 0;
    open.then(|| {
        format!(
            "{} holds a password and can be read by others (mode {mode:03o}): \
             chmod 600 it, or use ${{file:…}}",
            path.display()
        )
    })
}

#[cfg(not(unix))]
pub(super) fn open_file_warning(_: &Path) -> Option<String> {
    None
}

/// Whether `text`, a password as written, stands in the file itself and not in a variable or
/// another file.
pub(super) fn is_literal(text: &str) -> bool {
    !text.is_empty() && !text.starts_with("${")
}

/// Whether a URL as written has a password in it for which [`is_literal`] holds.
pub(super) fn has_literal_password(url: &str) -> bool {
    let authority = url.split_once("://").map_or("", |(_, rest)| rest);
    let user_info = authority.rsplit_once('@').map_or("", |(user_info, _)| user_info);
    user_info.split_once(':').is_some_and(|(_, password)| is_literal(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(text: &str) -> Result<String> {
        fill_in(text, &|name| match name {
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
            assert_eq!(fill(text).unwrap(), filled);
        }
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn what_cannot_be_filled_in_is_named_with_what_to_do() {
        for (text, problem, hint) in [
            ("${HOST}", "environment variable HOST is not set", "${NAME:-default}"),
            ("${HOST", "\"${\" has no closing \"}\"", "close it"),
            ("${a b}", "${a b} is not a valid variable name", "letters, digits and _"),
            ("${file:/none}", "file /none of ${file:…} cannot be read", "create the file"),
        ] {
            let error = fill(text).unwrap_err();
            assert!(error.to_string().starts_with(problem), "{error}");
            assert!(error.hint_text().unwrap().contains(hint), "{error:?}");
        }
    }

    #[test]
    fn passwords_in_the_file_are_noticed() {
        assert!(has_literal_password("postgres://a:b@h/x"));
        assert!(!has_literal_password("postgres://a@h/x"));
        assert!(!has_literal_password("amqp://a:${PW}@h/x"));
        assert!(is_literal("b"));
        assert!(!is_literal("${file:/run/x}") && !is_literal(""));
    }
}
