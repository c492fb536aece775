//! A secret that is never printed: passwords and URLs that carry one.
//!
//! Invariant: neither `Debug` nor `Display` nor serde shows the value. `expose` is the only way
//! to it, so `grep expose` lists every place that could leak.

use std::fmt;

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

/// `url` with the password replaced by `***`; for logs, errors and `/status`.
///
/// Works on text that need not be a valid URL, because an invalid one has to be shown too: with a
/// `://`, everything between the first `:` after it and the last `@` of the authority is hidden;
/// values of query parameters whose name contains "password" are hidden as well. Where an `@`
/// stands behind a `?`, what is a password cannot be known, and nothing is shown.
pub fn redact_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "***".into() };
    // A raw '/', '?' or '#' in a password is invalid, but must not leak: look for '@' first.
    let (authority, tail) = match rest.rfind('@') {
        Some(at) => (&rest[..at], &rest[at..]),
        None => ("", rest),
    };
    if authority.contains('?') {
        return format!("{scheme}://***");
    }
    let user = authority.split(':').next().unwrap_or_default();
    let shown = if authority.contains(':') { format!("{user}:***") } else { user.to_owned() };
    let (path, query) = tail.split_once('?').map_or((tail, None), |(p, q)| (p, Some(q)));
    let mut out = format!("{scheme}://{shown}{path}");
    if let Some(query) = query {
        let shown: Vec<String> = query.split('&').map(redact_parameter).collect();
        out.push('?');
        out.push_str(&shown.join("&"));
    }
    out
}

fn redact_parameter(pair: &str) -> String {
    match pair.split_once('=') {
        Some((name, _)) if name.to_ascii_lowercase().contains("password") => format!("{name}=***"),
        _ => pair.to_owned(),
    }
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
            ("postgres://h/shop?password=hunter2&x=1", "postgres://h/shop?password=***&x=1"),
            ("amqp://a:hun/ter2@h/v", "amqp://a:***@h/v"),
            ("amqp://a:hun/te?r2@h/v", "amqp://***"),
            ("postgres://r@h/x?password=hunter2&application_name=a@b", "postgres://***"),
            ("postgres://h:5432/x?password=hun@ter2", "postgres://***"),
            ("host=db password=hunter2", "***"),
        ] {
            assert_eq!(redact_url(url), shown);
        }
    }
}
