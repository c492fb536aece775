//! A secret that is never printed: passwords and URLs that carry one.
//!
//! Invariant: neither `Debug` nor `Display` nor serde shows the value. `expose` is the only way
//! to it, so `grep expose` lists every place that could leak.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;

/// A string that prints as `***`.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Wraps `value`.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The value itself. Only for handing it to a server.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What holds a secret and can be read once more, from the files that the secret was read from: a
/// rotated password, or the token of a new hour, is used at the next connect.
#[derive(Clone)]
pub struct Again<T>(Option<Rereading<T>>);

#[derive(Clone)]
struct Rereading<T> {
    read: Arc<dyn Fn() -> Result<T> + Send + Sync>,
    files: Vec<PathBuf>,
}

impl<T> Again<T> {
    /// `read` reads it from `files`; without files there is nothing to read again.
    pub fn new(files: Vec<PathBuf>, read: impl Fn() -> Result<T> + Send + Sync + 'static) -> Self {
        Self((!files.is_empty()).then(|| Rereading { read: Arc::new(read), files }))
    }

    /// What it is now; `None` where it cannot change.
    ///
    /// # Errors
    /// A file that cannot be read, or that holds what does not fit.
    pub fn read(&self) -> Option<Result<T>> {
        self.0.as_ref().map(|rereading| (rereading.read)())
    }

    /// The files that it is read from.
    pub fn files(&self) -> &[PathBuf] {
        self.0.as_ref().map_or(&[], |rereading| &rereading.files)
    }
}

impl<T> Default for Again<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> fmt::Debug for Again<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.files(), f)
    }
}

/// By its files.
impl<T> PartialEq for Again<T> {
    fn eq(&self, other: &Self) -> bool {
        self.files() == other.files()
    }
}

impl<T> Eq for Again<T> {}

/// The parameters of our URLs that hold no secrets.
const PUBLIC_PARAMETERS: [&str; 19] = [
    "host",
    "port",
    "user",
    "dbname",
    "sslmode",
    "ssl",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "channel_binding",
    "require_auth",
    "allow_md5",
    "connect_timeout",
    "application_name",
    "keepalives",
    "tcp_user_timeout",
    "heartbeat",
    "connection_timeout",
    "auth_mechanism",
];

/// `url` without what is or may be a password; for logs, errors and `/status`.
///
/// Works on text that need not be a valid URL, because an invalid one has to be shown too. Of what
/// stands before the last `@` only the user is shown. What follows a colon behind it is shown if it
/// can be a port, and of the query the parameters without secrets. Where an `@` stands behind a
/// `?`, what is a password cannot be known, and nothing is shown.
pub fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "***".into() };
    if !scheme.chars().all(|c| c.is_ascii_lowercase()) {
        return "***".into();
    }
    // A raw '/', '?' or '#' in a password is invalid, but must not leak: look for '@' first.
    let (user, tail) = match rest.rfind('@') {
        Some(at) if rest[..at].contains('?') => return format!("{scheme}://***"),
        Some(at) => (format!("{}@", public_user(&rest[..at])), &rest[at + 1..]),
        None => (String::new(), rest),
    };
    if !has_port_only(tail) {
        let host = tail.split(':').next().unwrap_or_default();
        return format!("{scheme}://{user}{host}:***");
    }
    let (path, query) = tail.split_once('?').map_or((tail, None), |(p, q)| (p, Some(q)));
    // The number may be the beginning of a password that holds a raw '/'.
    let path = match path.split_once('/') {
        Some((host, rest)) if user.is_empty() && host.contains(':') && !rest.is_empty() => {
            format!("{host}/***")
        }
        _ => path.to_owned(),
    };
    let mut out = format!("{scheme}://{user}{path}");
    if let Some(query) = query {
        let shown: Vec<String> = query.split('&').map(public_parameter).collect();
        out.push('?');
        out.push_str(&shown.join("&"));
    }
    out
}

/// What is wrong with a URL for which [`lacks_at`] holds.
pub const LACKS_AT: &str =
    "it has no '@', and what follows its ':' cannot be a port; expected user:password@host:port";

/// Whether `rest`, a URL without its scheme, seems to be `user:password` whose `@host` is missing.
pub fn lacks_at(rest: &str) -> bool {
    !rest.contains('@') && !has_port_only(rest)
}

/// Whether in `rest`, which begins with a host, only a port or nothing follows the host's colon.
fn has_port_only(rest: &str) -> bool {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let is_port = |text: &str| text.is_empty() || text.parse::<u16>().is_ok();
    // There may be several hosts. The colons of an IPv6 address part nothing.
    authority.split(',').all(|host| match host.rsplit_once(']') {
        Some((_, after)) => is_port(after.strip_prefix(':').unwrap_or(after)),
        None if host.parse::<Ipv6Addr>().is_ok() => true,
        None => host.split_once(':').is_none_or(|(_, port)| is_port(port)),
    })
}

/// The user of `user:password`, up to where a password may begin by mistake.
pub fn public_user(user_info: &str) -> String {
    match user_info.find([':', '/', '#', '%', ' ']) {
        Some(at) => format!("{}:***", &user_info[..at]),
        None => user_info.to_owned(),
    }
}

/// What has no known name may be a piece of a password.
fn public_parameter(pair: &str) -> String {
    match pair.split_once('=') {
        _ if pair.is_empty() => String::new(),
        Some((name, _)) if PUBLIC_PARAMETERS.contains(&name) => pair.to_owned(),
        Some((name, _)) => format!("{}=***", public_name(name)),
        None => public_name(pair).to_owned(),
    }
}

/// The name of a parameter. One with other characters than letters is not shown: it is a piece of
/// the password when that has a raw `?`.
pub fn public_name(name: &str) -> &str {
    let is_plain = name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if is_plain { name } else { "***" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_prints_the_value() {
        let secret = Secret::new("hunter2");
        assert_eq!(
            format!("{secret} {secret:?} {:#?}", Some(&secret)).matches("hunter2").count(),
            0
        );
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn urls_are_shown_without_their_password() {
        for (url, shown) in [
            ("postgres://relay:hunter2@db:5432/shop", "postgres://relay:***@db:5432/shop"),
            ("postgres://relay@db/shop", "postgres://relay@db/shop"),
            ("amqp://a:hunter2@h/%2f?heartbeat=5", "amqp://a:***@h/%2f?heartbeat=5"),
            ("postgres://h/shop?password=hunter2&x=1", "postgres://h/shop?password=***&x=***"),
            ("amqp://a:hun/ter2@h/v", "amqp://a:***@h/v"),
            ("amqp://a:hun/te?r2@h/v", "amqp://***"),
            ("postgres://r@h/x?password=hunter2&application_name=a@b", "postgres://***"),
            ("postgres://h:5432/x?password=hun@ter2", "postgres://***"),
            ("host=db password=hunter2", "***"),
            ("amqp://relay:hunter2", "amqp://relay:***"),
            ("amqp://relay:hunter2/shop", "amqp://relay:***"),
            ("amqp://relay:hun/ter2", "amqp://relay:***"),
            ("postgres://relay:hunter2/shop?sslmode=require", "postgres://relay:***"),
            ("http://admin:hunter2", "http://admin:***"),
            ("http://admin:1234567890", "http://admin:***"),
            ("http://admin:1:hunter2", "http://admin:***"),
            ("amqp://h:5672/v", "amqp://h:5672/***"),
            ("postgres://r@a:1,b:2/x", "postgres://r@a:1,b:2/x"),
            ("postgres://[::1]:5432/x", "postgres://[::1]:5432/***"),
            ("postgres://[::1]:hunter2/x", "postgres://[:***"),
            ("amqp://r@::1/x", "amqp://r@::1/x"),
            ("amqp://relay/hunter2@h/x", "amqp://relay:***@h/x"),
            (
                "amqp://h/x?passwd=hunter2&hunter2&heartbeat=5",
                "amqp://h/x?passwd=***&***&heartbeat=5",
            ),
            ("amqp://relay@h:hunter2/x", "amqp://relay@h:***"),
            ("hunter2://h", "***"),
        ] {
            assert_eq!(redact_url(url), shown);
        }
    }
}
