//! From disk to text and values: reading the file, and `${…}` in strings.
//!
//! The only place that looks at the environment.

use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::error::{Error, Result};
use crate::fault::{file_error, read_file};

/// What has a meaning in a URL, or might have.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

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
pub fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Replaces `${…}` in the URL of a command line option from the process environment.
///
/// # Errors
/// A variable that is not set, a file that cannot be read, or a `${…}` of another form.
pub fn fill_in_url(text: &str) -> Result<String> {
    Filled::parse(text, Notation::Url, &environment, Path::new(""))?.text()
}

/// What a string is; in a URL values are encoded where that is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    Plain,
    Url,
}

/// A string as written, with its variables filled in. Its files are read each time that its text is
/// asked for: a rotated password is seen at the next connect.
///
/// Neither has `Debug`, because both may hold secrets.
#[derive(Clone)]
pub(super) struct Filled(Vec<Piece>);

#[derive(Clone)]
struct Piece {
    value: Value,
    encoding: Encoding,
    /// How an error shows it; nothing for what stands in the string itself.
    shown: Option<String>,
}

#[derive(Clone)]
enum Value {
    Text(String),
    File { written: String, path: PathBuf },
}

/// How a value is written into its place.
#[derive(Clone, Copy)]
enum Encoding {
    Raw,
    /// Percent-encoded.
    Percent,
    /// User and password in one value: as before, but the first colon separates them.
    Credentials,
}

/// A part of a string as it is written.
enum Part<'t> {
    Literal(&'t str),
    /// What stands between `${` and `}`.
    Placeholder(&'t str),
}

impl Filled {
    /// Reads `text`: `${NAME}`, `${NAME:-default}` and `${file:/path}` stand for values, `$${` for
    /// `${`. Relative paths begin at `directory`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] naming the variable that is not set. What is malformed is not
    /// shown: it may be a piece of a password.
    pub(super) fn parse(
        text: &str,
        notation: Notation,
        lookup: Lookup<'_>,
        directory: &Path,
    ) -> Result<Self> {
        let parts = split(text)?;
        let encodings = match notation {
            Notation::Plain => vec![Encoding::Raw; parts.len()],
            Notation::Url => url_encodings(&parts),
        };
        let pieces = parts.iter().zip(encodings).map(|(part, encoding)| match part {
            Part::Literal(text) => {
                let value = Value::Text((*text).to_owned());
                Ok(Piece { value, encoding: Encoding::Raw, shown: None })
            }
            Part::Placeholder(inside) => resolve(inside, encoding, lookup, directory),
        });
        pieces.collect::<Result<_>>().map(Self)
    }

    /// The text, with its files as they are now.
    ///
    /// # Errors
    /// The file that cannot be read: [`crate::error::Kind::Config`], or
    /// [`crate::error::Kind::Unreachable`] where this process has no file descriptor left.
    pub(super) fn text(&self) -> Result<String> {
        let mut out = String::new();
        for piece in &self.0 {
            out.push_str(&piece.encoding.apply(&piece.value.read()?));
        }
        Ok(out)
    }

    /// The files that it reads.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter_map(|piece| match &piece.value {
            Value::File { path, .. } => Some(path.as_path()),
            Value::Text(_) => None,
        })
    }

    /// What came from elsewhere, as it may turn up in an error, and what is shown in its place.
    pub(super) fn hidden(&self) -> Vec<(String, String)> {
        let mut list = Vec::new();
        for piece in &self.0 {
            if let (Some(shown), Ok(value)) = (&piece.shown, piece.value.read()) {
                let quoted = value.escape_debug().to_string();
                for form in [piece.encoding.apply(&value), value, quoted] {
                    list.push((form, shown.clone()));
                }
            }
        }
        list
    }
}

impl Value {
    fn read(&self) -> Result<String> {
        match self {
            Value::Text(text) => Ok(text.clone()),
            Value::File { written, path } => {
                let what = format!("file {written} of ${{file:…}} cannot be read");
                let content = read_file(path).and_then(|bytes| {
                    String::from_utf8(bytes).map_err(|_| std::io::Error::other("it is not UTF-8"))
                });
                let content = content.map_err(|e| file_error(&what, e))?;
                Ok(without_newline(&content).to_owned())
            }
        }
    }
}

/// One newline: editors and `echo` add it, passwords do not end with it.
fn without_newline(text: &str) -> &str {
    let trimmed = text.strip_suffix('\n').unwrap_or(text);
    trimmed.strip_suffix('\r').unwrap_or(trimmed)
}

impl Encoding {
    fn apply(self, value: &str) -> String {
        let encode = |text| utf8_percent_encode(text, RESERVED).to_string();
        match (self, value.split_once(':')) {
            (Encoding::Raw, _) => value.to_owned(),
            (Encoding::Credentials, Some((user, password))) => {
                format!("{}:{}", encode(user), encode(password))
            }
            (Encoding::Percent | Encoding::Credentials, _) => encode(value),
        }
    }
}

fn split(text: &str) -> Result<Vec<Part<'_>>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, after) = (&rest[..at], &rest[at + 2..]);
        if before.ends_with('$') {
            parts.push(Part::Literal(&rest[..at - 1]));
            parts.push(Part::Literal("${"));
            rest = after;
            continue;
        }
        parts.push(Part::Literal(before));
        let Some((inside, tail)) = after.split_once('}') else {
            return Err(Error::config("\"${\" has no closing \"}\"")
                .hint("close it, or write $${ for a literal ${"));
        };
        parts.push(Part::Placeholder(inside));
        rest = tail;
    }
    parts.push(Part::Literal(rest));
    Ok(parts)
}

/// How the placeholders of a URL are encoded: those before the `@` and those that are the value of
/// a parameter are, so that every password is safe there. Others stand for any part of the URL.
fn url_encodings(parts: &[Part<'_>]) -> Vec<Encoding> {
    // The URL without its placeholders, and where each of them stands in it.
    let (mut text, mut places) = (String::new(), Vec::new());
    for part in parts {
        places.push(text.len());
        if let Part::Literal(literal) = part {
            text.push_str(literal);
        }
    }
    let start = text.find("://").map_or(text.len(), |at| at + 3);
    let end = text[start..].find(['/', '?', '#']).map_or(text.len(), |at| start + at);
    let user_info = text[start..end].rfind('@').map(|at| start..=start + at);
    let is_placeholder = |index: &usize| matches!(parts[*index], Part::Placeholder(_));
    let in_user_info =
        |at: usize| user_info.as_ref().is_some_and(|range| range.contains(&at) && at >= start);
    let placeholders = (0..parts.len()).filter(is_placeholder);
    let is_alone = placeholders.filter(|index| in_user_info(places[*index])).count() == 1
        && user_info.as_ref().is_some_and(|range| !text[range.clone()].contains(':'));
    let query = text[start..].find('?').map(|at| start + at);
    let is_value = |at: usize| {
        query.is_some_and(|query| query < at)
            && text[..at].ends_with('=')
            && (text[at..].is_empty() || text[at..].starts_with('&'))
    };
    let encoding = |at: usize| match () {
        () if in_user_info(at) && is_alone => Encoding::Credentials,
        () if in_user_info(at) || is_value(at) => Encoding::Percent,
        () => Encoding::Raw,
    };
    places.into_iter().map(encoding).collect()
}

fn resolve(
    inside: &str,
    encoding: Encoding,
    lookup: Lookup<'_>,
    directory: &Path,
) -> Result<Piece> {
    if let Some(written) = inside.strip_prefix("file:") {
        let (written, path) = (written.to_owned(), directory.join(written));
        let shown = Some("${file:…}".to_owned());
        return Ok(Piece { value: Value::File { written, path }, encoding, shown });
    }
    let (name, default) = match inside.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inside, None),
    };
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if !is_name {
        return Err(Error::config("the text inside ${…} is not the name of a variable")
            .hint("use letters, digits and _; write $${ for a literal ${"));
    }
    if default.is_some_and(|default| default.contains("${")) {
        return Err(Error::config(format!("the default of ${{{name}:-…}} holds another ${{…}}"))
            .hint("a default is plain text; set the variable where the relay is started"));
    }
    let value = match (lookup(name), default) {
        (Some(value), None) => value,
        (Some(value), Some(_)) if !value.is_empty() => value,
        (_, Some(default)) => default.to_owned(),
        (None, None) => {
            return Err(Error::config(format!("environment variable {name} is not set"))
                .hint("set it, or give a default with ${NAME:-default}; $${ is a literal ${"));
        }
    };
    let value = Value::Text(without_newline(&value).to_owned());
    Ok(Piece { value, encoding, shown: Some(format!("${{{name}}}")) })
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
    let query = authority.split_once('?').map_or("", |(_, query)| query);
    let mut parameters = query.split('&').filter_map(|pair| pair.split_once('='));
    user_info.split_once(':').is_some_and(|(_, password)| is_literal(password))
        || parameters.any(|(name, value)| name == "password" && is_literal(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variable(name: &str) -> Option<String> {
        match name {
            "USER" => Some("relay".into()),
            "EMPTY" => Some(String::new()),
            "LINE" => Some("hunter2\r\n".into()),
            "ODD" => Some("a b/c?d#e@f:g%41€".into()),
            "BOTH" => Some("re@lay:p:w".into()),
            _ => None,
        }
    }

    fn fill(text: &str) -> Result<String> {
        Filled::parse(text, Notation::Plain, &variable, Path::new(""))?.text()
    }

    fn fill_url(text: &str) -> String {
        let filled = Filled::parse(text, Notation::Url, &variable, Path::new(""));
        filled.and_then(|template| template.text()).unwrap()
    }

    #[test]
    fn variables_defaults_and_files_are_filled_in() {
        let directory = std::env::temp_dir();
        let name = format!("watership-load-{}", std::process::id());
        let file = directory.join(&name);
        std::fs::write(&file, "hunter2\n\n").unwrap();
        let from_file = format!("a${{file:{}}}b", file.display());
        for (text, filled) in [
            ("plain $ {} text", "plain $ {} text"),
            ("postgres://${USER}@${HOST:-db}/x", "postgres://relay@db/x"),
            ("${EMPTY}|${EMPTY:-x}", "|x"),
            ("$${USER}", "${USER}"),
            ("${LINE}", "hunter2"),
            ("$$${USER}", "$${USER}"),
            (&*from_file, "ahunter2\nb"),
        ] {
            assert_eq!(fill(text).unwrap(), filled);
        }
        // A relative path begins at the directory that is given, and the file is read each time.
        let relative = format!("${{file:{name}}}");
        let template = Filled::parse(&relative, Notation::Plain, &variable, &directory);
        let template = template.unwrap();
        assert_eq!(template.text().unwrap(), "hunter2\n");
        std::fs::write(&file, "other\r\n").unwrap();
        assert_eq!(template.text().unwrap(), "other");
        assert_eq!(template.files().collect::<Vec<_>>(), [&file]);
        std::fs::remove_file(file).unwrap();
    }

    #[test]
    fn what_stands_for_user_or_password_in_a_url_is_encoded() {
        let odd = "a%20b%2Fc%3Fd%23e%40f%3Ag%2541%E2%82%AC";
        for (text, filled) in [
            ("amqp://r:${ODD}@h/v", format!("amqp://r:{odd}@h/v")),
            (
                "amqp://${USER}:x${ODD}y@${USER}:1/${USER}",
                format!("amqp://relay:x{odd}y@relay:1/relay"),
            ),
            ("amqp://${USER}:${ODD}@h", format!("amqp://relay:{odd}@h")),
            ("amqp://${BOTH}@h", "amqp://re%40lay:p%3Aw@h".into()),
            ("amqp://${USER}@h", "amqp://relay@h".into()),
            (
                "postgres://r@h/x?password=${ODD}&a=b",
                format!("postgres://r@h/x?password={odd}&a=b"),
            ),
            ("postgres://r@h/x?password=${ODD}", format!("postgres://r@h/x?password={odd}")),
            ("postgres://h/x?${BOTH}", "postgres://h/x?re@lay:p:w".into()),
            ("amqp://h/${ODD}", "amqp://h/a b/c?d#e@f:g%41€".into()),
            ("${ODD}", "a b/c?d#e@f:g%41€".into()),
            ("amqp://r:a%40b@h", "amqp://r:a%40b@h".into()),
        ] {
            assert_eq!(fill_url(text), filled, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_filled_in_is_named_with_what_to_do() {
        for (text, problem, hint) in [
            ("${HOST}", "environment variable HOST is not set", "${NAME:-default}"),
            ("${HOST", "\"${\" has no closing \"}\"", "close it"),
            ("${HOST:-${OTHER}}", "the default of ${HOST:-…} holds another ${…}", "plain text"),
            ("${a b}", "the text inside ${…} is not the name", "letters, digits and _"),
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
        assert!(has_literal_password("postgres://a@h/x?sslmode=require&password=b"));
        assert!(!has_literal_password("postgres://a@h/x?password=${PW}"));
        assert!(!has_literal_password("postgres://a@h/x"));
        assert!(!has_literal_password("amqp://a:${PW}@h/x"));
        assert!(is_literal("b"));
        assert!(!is_literal("${file:/run/x}") && !is_literal(""));
    }
}
