//! What a broker connection is opened with, and the broker's URL.
//!
//! A URL follows the RabbitMQ URI specification (<https://www.rabbitmq.com/docs/uri-spec> and
//! `/uri-query-parameters`), with two differences that prevent mistakes: an empty path
//! `/` means the virtual host `/`, not the one with the empty name, and an unknown parameter is an
//! error.
//! Nothing here prints a password.

use std::fmt;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};
use crate::secret::{Again, LACKS_AT, Secret, lacks_at, public_name, public_user, redact_url};
use crate::tls;

/// Maximum number of channels for the exchanges of one connection; further exchanges share them.
pub const CHANNELS_MAX: usize = 64;
/// Channels of one exchange. The broker runs each in a process of its own: a single one would limit
/// the rate while other cores are idle.
pub const CHANNELS_PER_EXCHANGE: usize = 4;
/// Below this number of unconfirmed publishes the first channel of an exchange is enough: then a
/// quiet stream arrives in the order of `send`, across keys too. Not promised, but convenient.
pub const SPREAD_FROM: usize = 256;

/// Everything that [`super::publisher::Connection::open`] needs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Brokers of one cluster, tried in turn.
    pub urls: Vec<Url>,
    /// The same again, where the credentials are in files.
    pub urls_again: Again<Vec<Url>>,
    /// TLS files and level; for `amqps` a level of `Disable` means `VerifyFull`.
    pub tls: tls::Options,
    /// How we identify ourselves to the broker.
    pub auth: Auth,
    /// Heartbeat timeout in whole seconds, 1 to 3600; sent twice as often.
    pub heartbeat: Duration,
    /// Bounds one attempt as a whole: name, TCP, TLS, handshake, lock queue and channels.
    pub connect_timeout: Duration,
    /// Maximum wait for a confirm; time in which the broker blocks us does not count.
    pub confirm_timeout: Duration,
    /// The exchanges; a message names one by its index.
    pub exchanges: Vec<String>,
    /// Channels that the messages of one exchange are spread over.
    pub channels_per_exchange: usize,
    /// Exclusive queue that fences this publisher against a second one of the same name.
    pub lock_queue: Option<String>,
    /// Shown in the broker's list of connections.
    pub connection_name: String,
    /// What this connection works for, such as a database: shown to operators, and to the standby
    /// of another database. Empty: nothing is shown.
    pub serves: String,
    /// Largest body, in bytes. RabbitMQ 4.0 and later: 16 MiB by default.
    pub max_message_size: usize,
}

impl Options {
    /// The defaults, for one or more URLs.
    pub fn new(urls: Vec<Url>) -> Self {
        Self {
            urls,
            urls_again: Again::default(),
            tls: tls::Options::default(),
            auth: Auth::Plain,
            heartbeat: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(30),
            exchanges: Vec::new(),
            channels_per_exchange: CHANNELS_PER_EXCHANGE,
            lock_queue: None,
            connection_name: "watership".into(),
            serves: String::new(),
            max_message_size: 16 * 1024 * 1024,
        }
    }

    /// The URLs as they are now: with the credentials that are in their files today.
    ///
    /// # Errors
    /// A file that cannot be read, or that does not hold what it should.
    pub fn current_urls(&self) -> Result<Vec<Url>> {
        self.urls_again.read().unwrap_or_else(|| Ok(self.urls.clone()))
    }

    /// The TLS options that apply to `url`, or `None` for plain text.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] when a TLS level was asked for and the URL is plain text.
    pub fn tls_for(&self, url: &Url) -> Result<Option<tls::Options>> {
        let mut options = self.tls.clone();
        match (url.scheme, options.mode) {
            (Scheme::Amqp, tls::SslMode::Disable) => return Ok(None),
            (
                Scheme::Amqp,
                tls::SslMode::Require | tls::SslMode::VerifyCa | tls::SslMode::VerifyFull,
            ) => {
                return Err(Error::config(format!(
                    "broker URL {url} is plain text, but a TLS level is set"
                ))
                .hint("use amqps://, or remove the TLS level"));
            }
            (Scheme::Amqps, tls::SslMode::Disable) => options.mode = tls::SslMode::VerifyFull,
            (
                Scheme::Amqps,
                tls::SslMode::Require | tls::SslMode::VerifyCa | tls::SslMode::VerifyFull,
            ) => {}
        }
        Ok(Some(options))
    }
}

/// SASL mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Auth {
    /// User and password of the URL.
    #[default]
    Plain,
    /// The client certificate; needs `rabbitmq_auth_mechanism_ssl` in the broker.
    External,
}

impl Auth {
    /// The name that AMQP uses.
    pub fn mechanism(self) -> &'static str {
        match self {
            Auth::Plain => "PLAIN",
            Auth::External => "EXTERNAL",
        }
    }
}

/// Plain text or TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// `amqp://`, port 5672.
    Amqp,
    /// `amqps://`, port 5671.
    Amqps,
}

/// One broker. `Display` and `Debug` hide the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    /// Plain text or TLS.
    pub scheme: Scheme,
    /// Host name or address, IPv6 without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// User name, decoded.
    pub username: String,
    /// Password, decoded.
    pub password: Secret,
    /// Virtual host, decoded.
    pub vhost: String,
    /// `heartbeat`, in seconds, if the URL has it.
    pub heartbeat: Option<Duration>,
    /// `connection_timeout`, in milliseconds, if the URL has it.
    pub connect_timeout: Option<Duration>,
    /// `auth_mechanism`, if the URL has it.
    pub auth: Option<Auth>,
}

const PARAMETERS: &str = "heartbeat (seconds), connection_timeout (milliseconds), \
                          auth_mechanism (plain, external)";

impl Url {
    /// Parses `amqp[s]://[user[:password]@]host[:port][/vhost][?parameters]`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`], naming the part that is wrong, without the password.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_parts(text).map_err(|what| {
            Error::config(format!("broker URL {}: {what}", redact_url(text)))
                .hint("the form is amqp[s]://user:password@host:port/vhost, percent-encoded")
        })
    }

    fn parse_parts(text: &str) -> Result<Self, String> {
        let (scheme, rest) =
            text.split_once("://").ok_or("has no scheme; use amqp:// or amqps://")?;
        let (scheme, default_port) = match scheme {
            "amqp" => (Scheme::Amqp, 5672),
            "amqps" => (Scheme::Amqps, 5671),
            other => {
                let other = public_name(other);
                return Err(format!("scheme {other:?} is unknown; use amqp or amqps"));
            }
        };
        if lacks_at(rest) {
            return Err(LACKS_AT.into());
        }
        let (rest, query) = rest.split_once('?').map_or((rest, ""), |(r, q)| (r, q));
        // The raw rest of a password would be taken for a port, a vhost or a parameter, and shown.
        if query.contains('@') || rest.split_once('/').is_some_and(|(_, path)| path.contains('@')) {
            return Err("an '@' follows a '/' or a '?': percent-encode it".into());
        }
        let (authority, vhost) = rest.split_once('/').map_or((rest, ""), |(a, v)| (a, v));
        let (userinfo, host) = authority.rsplit_once('@').map_or(("", authority), |(u, h)| (u, h));
        let (username, password) = match userinfo {
            "" => ("guest".to_owned(), "guest".to_owned()),
            _ => {
                let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
                (decode(user, "user name")?, decode(password, "password")?)
            }
        };
        let (host, port) = split_port(host, default_port)?;
        let vhost = match vhost {
            "" => "/".to_owned(),
            _ => decode(vhost, "virtual host")?,
        };
        if vhost.len() > 255 {
            return Err(format!("virtual host has {} bytes, at most 255 are allowed", vhost.len()));
        }
        let mut url = Self {
            scheme,
            host,
            port,
            username,
            password: Secret::new(password),
            vhost,
            heartbeat: None,
            connect_timeout: None,
            auth: None,
        };
        query.split('&').filter(|p| !p.is_empty()).try_for_each(|pair| url.parameter(pair))?;
        Ok(url)
    }

    fn parameter(&mut self, pair: &str) -> Result<(), String> {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match name {
            "heartbeat" => {
                self.heartbeat = Some(Duration::from_secs(number(name, value, 1, 3600)?));
            }
            "connection_timeout" => {
                self.connect_timeout =
                    Some(Duration::from_millis(number(name, value, 1, 3_600_000)?));
            }
            "auth_mechanism" => {
                self.auth = Some(match value.to_ascii_lowercase().as_str() {
                    "plain" => Auth::Plain,
                    "external" => Auth::External,
                    _ => {
                        return Err(format!(
                            "auth_mechanism is {value:?}; expected plain or external"
                        ));
                    }
                });
            }
            other => {
                let other = public_name(other);
                return Err(format!("parameter {other:?} is unknown; allowed: {PARAMETERS}"));
            }
        }
        Ok(())
    }
}

fn number(name: &str, value: &str, min: u64, max: u64) -> Result<u64, String> {
    match value.parse() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        Ok(_) | Err(_) => {
            Err(format!("{name} is {value:?}; expected a number from {min} to {max}"))
        }
    }
}

fn split_port(host: &str, default: u16) -> Result<(String, u16), String> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, rest) = rest.split_once(']').ok_or("IPv6 address lacks its ']'")?;
            match rest {
                "" => (name, None),
                _ => (name, Some(rest.strip_prefix(':').ok_or("only a port may follow the ']'")?)),
            }
        }
        None if host.matches(':').count() > 1 => {
            return Err("an IPv6 address stands in brackets, as in [::1]:5672".into());
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    if name.is_empty() {
        return Err("has no host".into());
    }
    let port = match port {
        None => default,
        Some(text) => text
            .parse()
            .ok()
            .filter(|p| *p > 0)
            // The text is not shown: it may be a password in the wrong place.
            .ok_or("the port is not a number from 1 to 65535")?,
    };
    Ok((decode(name, "host")?, port))
}

fn decode(text: &str, what: &str) -> Result<String, String> {
    percent_decode_str(text)
        .decode_utf8()
        .map(std::borrow::Cow::into_owned)
        .map_err(|_| format!("{what} is not UTF-8 after percent-decoding"))
}

impl fmt::Display for Url {
    /// The URL without password and parameters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Amqp => "amqp",
            Scheme::Amqps => "amqps",
        };
        let (open, close) = if self.host.contains(':') { ("[", "]") } else { ("", "") };
        let vhost = if self.vhost == "/" { "%2f" } else { &self.vhost };
        let user = public_user(&self.username);
        write!(f, "{scheme}://{user}@{open}{}{close}:{}/{vhost}", self.host, self.port)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_parts_are_decoded_and_defaults_filled_in() {
        let url =
            Url::parse("amqps://re%40lay:p%2Fw%3A1@[::1]:5999/my%2Fvhost?heartbeat=7").unwrap();
        assert_eq!((url.scheme, url.host.as_str(), url.port), (Scheme::Amqps, "::1", 5999));
        assert_eq!((url.username.as_str(), url.password.expose()), ("re@lay", "p/w:1"));
        assert_eq!((url.vhost.as_str(), url.heartbeat), ("my/vhost", Some(Duration::from_secs(7))));
        for text in ["amqp://h", "amqp://h/", "amqp://h/%2f", "amqp://guest:guest@h:5672/%2F"] {
            let url = Url::parse(text).unwrap();
            assert_eq!((url.port, url.vhost.as_str(), url.username.as_str()), (5672, "/", "guest"));
        }
    }

    #[test]
    fn wrong_urls_are_named_without_their_password() {
        for (text, part) in [
            ("relay:hunter2@h/", "has no scheme"),
            ("http://relay:hunter2@h/", "scheme \"http\" is unknown; use amqp or amqps"),
            ("amqp://relay:hunter2@/", "has no host"),
            ("amqp://relay:hunter2/x@h/", "an '@' follows a '/' or a '?': percent-encode it"),
            ("amqp://relay:hunter2?x@h/", "an '@' follows a '/' or a '?': percent-encode it"),
            ("amqp://relay:1234/hunter2@h/v", "an '@' follows"),
            ("amqp://relay:hunter2@h:0/", "the port is not a number from 1 to 65535"),
            ("amqp://relay:hunter2@h?frame_max=1", "parameter \"frame_max\" is unknown; allowed:"),
            (
                "amqp://relay:hunter2@h?heartbeat=0",
                "heartbeat is \"0\"; expected a number from 1 to 3600",
            ),
            ("amqp://relay:hunter2@h/%ff", "virtual host is not UTF-8"),
            ("amqp://relay:hunter2", "it has no '@', and what follows its ':' cannot be a port"),
            ("amqp://relay:hunter2/shop", "it has no '@'"),
            ("amqp://relay:hun?ter2", "it has no '@'"),
            ("amqp://r@::1/v", "an IPv6 address stands in brackets"),
            ("amqp://r@[::1]5673/v", "only a port may follow the ']'"),
            ("amqp://h?hunter2=1", "parameter \"***\" is unknown"),
        ] {
            let error = Url::parse(text).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
            assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
        }
        let url = Url::parse("amqp://relay:hunter2@h/").unwrap();
        assert_eq!(format!("{url} {url:?}").matches("hunter2").count(), 0);
    }

    #[test]
    fn amqps_verifies_and_plain_text_with_a_tls_level_is_refused() {
        let secure = Url::parse("amqps://h").unwrap();
        let plain = Url::parse("amqp://h").unwrap();
        let mut options = Options::new(vec![secure.clone()]);
        assert_eq!(options.tls_for(&secure).unwrap().unwrap().mode, tls::SslMode::VerifyFull);
        assert!(options.tls_for(&plain).unwrap().is_none());
        options.tls.mode = tls::SslMode::VerifyCa;
        assert!(options.tls_for(&plain).is_err());
    }
}
