//! How to reach Postgres and log in: the options of a connection URL.
//!
//! Invariants: what weakens security must be asked for by name. TLS is verify-full except on a unix
//! socket or loopback; md5 needs `allow_md5=true`; a clear-text password is never sent. No text
//! made here shows the password, and errors about a URL show it redacted only.
//!
//! The grammar is libpq's: <https://www.postgresql.org/docs/current/libpq-connect.html>

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::error::{Error, Result};
use crate::secret::{Again, LACKS_AT, Secret, lacks_at, public_name, public_user, redact_url};
use crate::tls::{self, SslMode};

/// The query parameters that a URL may have.
const PARAMETERS: [&str; 17] = [
    "host",
    "port",
    "user",
    "password",
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
];

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Half-open connections are detected after this long, even without a read.
const DEFAULT_TCP_USER_TIMEOUT: Duration = Duration::from_secs(15);

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A DNS name or an address.
    Tcp(String),
    /// The directory of the unix socket `.s.PGSQL.<port>`.
    Unix(PathBuf),
}

/// Whether the SCRAM exchange is bound to the TLS session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// When the server offers it.
    Prefer,
    /// Or do not connect.
    Require,
}

/// Whose settings a session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settings {
    /// Ours: values as exact text, limits on every statement.
    Relay,
    /// Only those that a pooler such as PgBouncer passes on: encoding, date style and time zone.
    /// What else matters, each statement brings along.
    Pooled,
    /// What the server, the database and the role say: an application's statements run there.
    Application,
}

/// Everything that a connection needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where the server listens.
    pub host: Host,
    /// TCP port, and part of the name of the unix socket.
    pub port: u16,
    /// Role.
    pub user: String,
    /// Absent for trust, peer and certificate authentication.
    pub password: Option<Secret>,
    /// Database.
    pub database: String,
    /// TLS and what of it is verified.
    pub tls: tls::Options,
    /// Whether the SCRAM exchange is bound to the TLS session.
    pub channel_binding: ChannelBinding,
    /// Refuse a server that lets us in without SCRAM (`require_auth=scram-sha-256`).
    pub require_scram: bool,
    /// Answer a server that asks for an md5 hash.
    pub allow_md5: bool,
    /// Limit for all of name lookup, TCP, TLS, authentication and start-up.
    pub connect_timeout: Duration,
    /// What `pg_stat_activity` and `pg_stat_replication` show.
    pub application_name: String,
    /// Whether the kernel probes an idle connection (every 10 s).
    pub keepalives: bool,
    /// How long sent bytes may stay unacknowledged before the kernel gives up (Linux).
    pub tcp_user_timeout: Duration,
    /// Whose settings its sessions have; a URL means the relay's.
    pub settings: Settings,
    /// The same again, where the credentials are in files.
    pub again: Again<Options>,
}

impl Options {
    /// Reads a `postgres://` or `postgresql://` URL.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`], naming the part that is wrong and what is allowed.
    pub fn parse(url: &Secret) -> Result<Self> {
        parse(url.expose()).map_err(|error| error.context(redact_url(url.expose())))
    }

    /// As they are now: with the credentials that are in their files today.
    ///
    /// # Errors
    /// A file that cannot be read, or that does not hold what it should.
    pub fn current(&self) -> Result<Cow<'_, Self>> {
        match self.again.read() {
            None => Ok(Cow::Borrowed(self)),
            Some(Ok(current)) => Ok(Cow::Owned(current)),
            Some(Err(error)) => Err(error.context(format!("Postgres {self}"))),
        }
    }
}

/// The URL without the password.
impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, database, .. } = self;
        let user = public_user(&self.user);
        match &self.host {
            Host::Tcp(host) if host.contains(':') => {
                write!(f, "postgres://{user}@[{host}]:{port}/{database}")
            }
            Host::Tcp(host) => write!(f, "postgres://{user}@{host}:{port}/{database}"),
            Host::Unix(dir) => {
                write!(f, "postgres://{user}@:{port}/{database}?host={}", dir.display())
            }
        }
    }
}

/// The parts of a URL, percent-decoded, before they mean anything.
struct Parts {
    user: String,
    password: Option<String>,
    host: String,
    port: String,
    database: String,
    parameters: Vec<(&'static str, String)>,
}

impl Parts {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    /// The query parameter, or the part before the query; empty counts as absent.
    fn either<'a>(&'a self, name: &str, before: &'a str) -> Option<&'a str> {
        self.parameter(name).or(Some(before)).filter(|value| !value.is_empty())
    }

    fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.parameter(name) {
            None => Ok(None),
            Some("true" | "1" | "on") => Ok(Some(true)),
            Some("false" | "0" | "off") => Ok(Some(false)),
            Some(other) => Err(not_allowed(name, other, "true, false")),
        }
    }
}

fn not_allowed(name: &str, value: &str, allowed: &str) -> Error {
    Error::config(format!("{name}={value:?} is invalid; allowed: {allowed}"))
}

fn parse(url: &str) -> Result<Options> {
    let parts = split(url)?;
    let host = host(&parts)?;
    let user = parts.either("user", &parts.user).map(str::to_owned);
    let user = user.ok_or_else(|| {
        Error::config("the URL has no user").hint("name the role: postgres://user@host/database")
    })?;
    let database = parts.either("dbname", &parts.database).unwrap_or(&user).to_owned();
    let password = parts.parameter("password").or(parts.password.as_deref());
    let tls = tls_options(&parts, &host)?;
    let seconds =
        |name, default| number(&parts, name).map(|n| n.map_or(default, Duration::from_secs));
    Ok(Options {
        port: port(&parts)?,
        channel_binding: channel_binding(&parts, &tls)?,
        require_scram: require_scram(&parts)?,
        allow_md5: parts.flag("allow_md5")?.unwrap_or(false),
        connect_timeout: seconds("connect_timeout", DEFAULT_CONNECT_TIMEOUT)?,
        application_name: parts.either("application_name", "watership").unwrap_or_default().into(),
        keepalives: parts.flag("keepalives")?.unwrap_or(true),
        tcp_user_timeout: number(&parts, "tcp_user_timeout")?
            .map_or(DEFAULT_TCP_USER_TIMEOUT, Duration::from_millis),
        password: password.map(Secret::new),
        settings: Settings::Relay,
        again: Again::default(),
        host,
        user,
        database,
        tls,
    })
}

/// Splits the URL into its parts. Errors show no part before the `@`: a password with a raw `/`
/// would be taken for something else.
fn split(url: &str) -> Result<Parts> {
    let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://"));
    let rest = rest.ok_or_else(|| {
        Error::config("not a Postgres URL")
            .hint("the form is postgres://user:password@host:5432/database")
    })?;
    if lacks_at(rest) {
        return Err(Error::config(LACKS_AT));
    }
    let (front, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = front.split_once('/').unwrap_or((front, ""));
    let (user_info, address) = authority.rsplit_once('@').unwrap_or(("", authority));
    if address.contains(',') {
        return Err(several_hosts());
    }
    let (user, password) = match user_info.split_once(':') {
        Some((user, password)) => (user, Some(decode(password)?)),
        None => (user_info, None),
    };
    let (host, port) = match address.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, ""),
        Some((host, port)) => (host, port.strip_prefix(':').ok_or_else(unbracketed)?),
        None if address.matches(':').count() > 1 => return Err(unbracketed()),
        None => address.split_once(':').unwrap_or((address, "")),
    };
    Ok(Parts {
        user: decode(user)?,
        password,
        host: decode(host)?,
        port: port.to_owned(),
        database: decode(database)?,
        parameters: parameters(query)?,
    })
}

fn parameters(query: &str) -> Result<Vec<(&'static str, String)>> {
    let mut list: Vec<(&'static str, String)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let known = PARAMETERS.iter().find(|known| **known == name);
        let known = known.ok_or_else(|| unknown_parameter(name))?;
        if list.iter().any(|(seen, _)| seen == known) {
            return Err(Error::config(format!("parameter {name:?} is given twice")));
        }
        list.push((known, decode(value)?));
    }
    Ok(list)
}

fn unknown_parameter(name: &str) -> Error {
    let (shown, known) = (public_name(name), PARAMETERS.join(", "));
    Error::config(format!("unknown parameter {shown:?}; allowed: {known}"))
}

fn decode(text: &str) -> Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| Error::config("a percent-encoded part is not UTF-8"))?;
    if decoded.contains('\0') {
        return Err(Error::config("a part contains a zero byte"));
    }
    Ok(decoded.into_owned())
}

/// A slot belongs to one server; after a failover the name must lead to the new primary.
fn several_hosts() -> Error {
    Error::config("the URL names several hosts; only one is allowed").hint(
        "name the host that always leads to the primary: a DNS name or an address that moves, or a \
         proxy that asks each server",
    )
}

fn unbracketed() -> Error {
    Error::config("the host is an IPv6 address without brackets, or something follows its bracket")
        .hint("the form is postgres://user@[::1]:5432/database")
}

fn host(parts: &Parts) -> Result<Host> {
    let host = parts.either("host", &parts.host).ok_or_else(|| {
        Error::config("the URL has no host")
            .hint("for a unix socket, give its directory: postgres://user@/db?host=/run/postgresql")
    })?;
    if host.contains(',') {
        return Err(several_hosts());
    }
    match host.starts_with('/') {
        true => Ok(Host::Unix(PathBuf::from(host))),
        false => Ok(Host::Tcp(host.to_owned())),
    }
}

fn port(parts: &Parts) -> Result<u16> {
    match parts.either("port", &parts.port) {
        None => Ok(DEFAULT_PORT),
        // The text is not shown: it is a piece of the password when that holds a raw '/'.
        Some(text) => text.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
            Error::config("the port is not a number from 1 to 65535")
                .hint("special characters in user and password must be percent-encoded")
        }),
    }
}

fn number(parts: &Parts, name: &str) -> Result<Option<u64>> {
    let Some(text) = parts.parameter(name) else { return Ok(None) };
    // One hour in ms; libpq's 0 (no limit) is not offered: every wait has a limit.
    let value = text.parse().ok().filter(|n| (1..=3_600_000).contains(n));
    value.map(Some).ok_or_else(|| not_allowed(name, text, "1 to 3600000"))
}

fn channel_binding(parts: &Parts, tls: &tls::Options) -> Result<ChannelBinding> {
    match parts.parameter("channel_binding") {
        Some("disable") => Ok(ChannelBinding::Disable),
        None | Some("prefer") => Ok(ChannelBinding::Prefer),
        Some("require") if tls.mode == SslMode::Disable => {
            Err(Error::config("channel_binding=require needs TLS").hint("set sslmode=verify-full"))
        }
        Some("require") => Ok(ChannelBinding::Require),
        Some(other) => Err(not_allowed("channel_binding", other, "disable, prefer, require")),
    }
}

fn require_scram(parts: &Parts) -> Result<bool> {
    match parts.parameter("require_auth") {
        None => Ok(false),
        Some("scram-sha-256") => Ok(true),
        Some(other) => Err(not_allowed("require_auth", other, "scram-sha-256")),
    }
}

fn tls_options(parts: &Parts, host: &Host) -> Result<tls::Options> {
    let file = |name| parts.parameter(name).filter(|path| !path.is_empty()).map(PathBuf::from);
    // libpq: "system" means the roots of the operating system, which is our default.
    let root_cert = file("sslrootcert").filter(|path| path.as_os_str() != "system");
    let (client_cert, client_key) = (file("sslcert"), file("sslkey"));
    let asked = parts.flag("ssl")?;
    let names_files = parts.parameter("sslrootcert").is_some() || client_cert.is_some();
    let mode = match parts.parameter("sslmode") {
        Some(_) if asked.is_some() => {
            return Err(Error::config("ssl and sslmode are both given; sslmode is enough"));
        }
        Some("disable") => SslMode::Disable,
        // As in libpq: a root that is given is meant to be used.
        Some("require") if root_cert.is_some() => SslMode::VerifyCa,
        Some("require") => SslMode::Require,
        Some("verify-ca") => SslMode::VerifyCa,
        Some("verify-full") => SslMode::VerifyFull,
        Some(weak @ ("prefer" | "allow")) => {
            let error = not_allowed("sslmode", weak, "disable, require, verify-ca, verify-full");
            return Err(error.hint("it falls back to plain text if an attacker interferes"));
        }
        Some(other) => {
            let allowed = "disable, require, verify-ca, verify-full";
            return Err(not_allowed("sslmode", other, allowed));
        }
        None => match asked {
            Some(true) => SslMode::VerifyFull,
            Some(false) => SslMode::Disable,
            None if names_files => SslMode::VerifyFull,
            None if is_local(host) => SslMode::Disable,
            None => SslMode::VerifyFull,
        },
    };
    if parts.parameter("sslrootcert") == Some("system")
        && matches!(mode, SslMode::Require | SslMode::VerifyCa)
    {
        let text = "sslrootcert=system proves nothing unless the host name is checked: anyone can \
                    get a certificate from a public authority";
        return Err(Error::config(text).hint("set sslmode=verify-full"));
    }
    if mode != SslMode::Disable && matches!(host, Host::Unix(_)) {
        return Err(Error::config("Postgres has no TLS on a unix socket")
            .hint("set sslmode=disable, or name a host"));
    }
    Ok(tls::Options { mode, root_cert, client_cert, client_key })
}

fn is_local(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn options(url: &str) -> Options {
        Options::parse(&Secret::new(url)).unwrap()
    }

    fn refused(url: &str) -> Error {
        let error = Options::parse(&Secret::new(url)).unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{error}");
        error
    }

    #[test]
    fn every_part_of_the_url_is_read() {
        let o = options(
            "postgresql://re%40lay:p%2Fw@db.example:6543/sh%20op?sslmode=verify-ca&sslrootcert=/ca\
             &sslcert=/c&sslkey=/k&channel_binding=require&require_auth=scram-sha-256\
             &allow_md5=true\
             &connect_timeout=3&application_name=x&keepalives=0&tcp_user_timeout=4000",
        );
        assert_eq!(o.host, Host::Tcp("db.example".into()));
        assert_eq!((o.port, o.user.as_str(), o.database.as_str()), (6543, "re@lay", "sh op"));
        assert_eq!(o.password.unwrap().expose(), "p/w");
        assert_eq!(o.tls.mode, SslMode::VerifyCa);
        assert_eq!(o.tls.root_cert, Some("/ca".into()));
        assert_eq!((o.tls.client_cert, o.tls.client_key), (Some("/c".into()), Some("/k".into())));
        assert_eq!(o.channel_binding, ChannelBinding::Require);
        assert!(o.require_scram && o.allow_md5 && !o.keepalives);
        assert_eq!(o.connect_timeout, Duration::from_secs(3));
        assert_eq!(o.tcp_user_timeout, Duration::from_secs(4));
        assert_eq!(o.application_name, "x");
    }

    #[test]
    fn what_is_absent_has_its_default() {
        let o = options("postgres://relay@127.0.0.1");
        assert_eq!((o.port, o.database.as_str()), (5432, "relay"));
        assert_eq!((o.password, o.allow_md5, o.require_scram), (None, false, false));
        assert_eq!(o.channel_binding, ChannelBinding::Prefer);
        assert_eq!(o.application_name, "watership");
    }

    #[test]
    fn a_unix_socket_is_named_in_the_host_or_in_the_query() {
        for url in ["postgres://r@%2Frun%2Fpg:5433/db", "postgres://r@:5433/db?host=/run/pg"] {
            let o = options(url);
            assert_eq!((o.host, o.port), (Host::Unix("/run/pg".into()), 5433));
            assert_eq!(o.tls.mode, SslMode::Disable);
        }
        let o = options("postgres://r@[::1]:5/db");
        assert_eq!((o.host.clone(), o.port), (Host::Tcp("::1".into()), 5));
        assert_eq!(o.to_string(), "postgres://r@[::1]:5/db");
    }

    #[test]
    fn tls_is_verify_full_unless_local_or_named() {
        for (url, mode) in [
            ("postgres://r@db/x", SslMode::VerifyFull),
            ("postgres://r@10.0.0.1/x", SslMode::VerifyFull),
            ("postgres://r@db/x?sslmode=disable", SslMode::Disable),
            ("postgres://r@db/x?ssl=false", SslMode::Disable),
            ("postgres://r@db/x?sslmode=require", SslMode::Require),
            ("postgres://r@db/x?sslmode=require&sslrootcert=/ca", SslMode::VerifyCa),
            ("postgres://r@localhost/x", SslMode::Disable),
            ("postgres://r@127.0.0.1/x", SslMode::Disable),
            ("postgres://r@[::1]/x", SslMode::Disable),
            ("postgres://r@127.0.0.1/x?ssl=true", SslMode::VerifyFull),
            ("postgres://r@127.0.0.1/x?sslrootcert=/ca", SslMode::VerifyFull),
            ("postgres://r@127.0.0.1/x?sslrootcert=system", SslMode::VerifyFull),
        ] {
            assert_eq!(options(url).tls.mode, mode, "{url}");
        }
        assert_eq!(options("postgres://r@db/x?sslrootcert=system").tls.root_cert, None);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        for (url, text) in [
            ("mysql://r@h/x", "not a Postgres URL"),
            ("postgres://h/x", "no user"),
            ("postgres://r:x/y", "has no '@'"),
            ("postgres://r@/x", "no host"),
            ("postgres://r@::1/x", "IPv6 address without brackets"),
            ("postgres://r@fe80::1:5432/x", "IPv6 address without brackets"),
            ("postgres://r@[::1]5432/x", "something follows its bracket"),
            ("postgres:///x?host=/run/postgresql", "no user"),
            ("postgres://r@a,b/x", "several hosts"),
            ("postgres://r@h/x?sslmode=require&sslrootcert=system", "proves nothing unless"),
            ("postgres://r@a:1,b:2/x", "several hosts"),
            ("postgres://r@/x?host=a,b", "several hosts"),
            ("postgres://r@h:0/x", "1 to 65535"),
            ("postgres://r@h:70000/x", "1 to 65535"),
            ("postgres://r@h/x?sslmod=require", "allowed: host, port"),
            ("postgres://r@h/x?sslmode=prefer", "verify-full"),
            ("postgres://r@h/x?sslmode=allow", "verify-full"),
            ("postgres://r@h/x?sslmode=none", "verify-full"),
            ("postgres://r@h/x?sslmode=disable&sslmode=require", "twice"),
            ("postgres://r@h/x?ssl=true&sslmode=disable", "both"),
            ("postgres://r@h/x?channel_binding=no", "disable, prefer, require"),
            ("postgres://r@h/x?sslmode=disable&channel_binding=require", "needs TLS"),
            ("postgres://r@h/x?require_auth=md5", "scram-sha-256"),
            ("postgres://r@h/x?allow_md5=maybe", "true, false"),
            ("postgres://r@h/x?connect_timeout=0", "1 to"),
            ("postgres://r@/x?host=/run&sslmode=require", "unix socket"),
            ("postgres://r%FF@h/x", "UTF-8"),
            ("postgres://r%00@h/x", "zero byte"),
        ] {
            let error = refused(url);
            assert!(error.to_string().contains(text), "{url}: {error}");
        }
    }

    #[test]
    fn no_text_shows_the_password() {
        let o = options("postgres://r:hunter2@h/x");
        assert!(!format!("{o} {o:?}").contains("hunter2"));
        for url in [
            "postgres://r:hunter2@h:x/x",
            "postgres://r:hunter2/z@h/x",
            "postgres://r:hunter2@h/x?y=1",
            "postgres://r@h/x?password=hunter2&y=1",
            "postgres://r:x?hunter2@h/x",
            "mysql://r:hunter2@h/x",
            "host=h password=hunter2",
            "postgres://r:hunter2",
            "postgres://r:hunter2/x",
            "postgres://r:hun?ter2",
            "postgres://r:1/hunter2:x",
            "postgres://h/x?passwd=hunter2",
            "postgres://h/x?hunter2",
        ] {
            assert!(!format!("{:?}", refused(url)).contains("hunter2"), "{url}");
        }
    }
}
