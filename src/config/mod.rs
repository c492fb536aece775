//! The configuration: what was written ([`raw`]) becomes what it means ([`Config`]).
//!
//! Invariant: after a `Config` exists nobody checks it again; every component gets its own
//! `Options` from it. All problems of a file are reported at once. `Debug` shows no secret.
//!
//! ```text
//! file ── load ──► Raw (strings, defaults) ── Config::from_raw ──► Config ──► …_options()
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::amqp;
use crate::amqp::management::Management;
use crate::amqp::options::{Auth, Scheme, Url};
use crate::amqp::topology::Topology;
use crate::error::Result;
use crate::metrics::RouteLabel;
use crate::pg;
use crate::relay;
use crate::route::Rule;
use crate::secret::Secret;
use crate::source::SourceKind;
use crate::source::transaction::OutboxTable;
use crate::tls;

pub mod load;
pub mod raw;
mod routes;
mod topology;
mod value;

use raw::Raw;
use value::Problems;

/// Everything, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of this relay: checkpoint row, lock queue and `app_id`.
    pub name: String,
    /// Where events come from.
    pub source: Source,
    /// Where messages go.
    pub broker: Broker,
    /// What is declared or verified in the broker; the routes' exchanges are among it.
    pub topology: Topology,
    /// What goes where, the default rules when the file has no route.
    pub rules: Vec<Rule>,
    /// How much is under way, and how often progress is stored.
    pub relay: Relay,
    /// Whether the relay makes and retires partitions.
    pub maintain: bool,
    /// How long rows stay in the outbox after they were relayed.
    pub retain: Duration,
    /// Where probes and metrics are served; `None` when switched off.
    pub listen: Option<SocketAddr>,
    /// Logging.
    pub log: Log,
    /// What is allowed but should be changed.
    pub warnings: Vec<String>,
}

/// `[source]`
#[derive(Debug, Clone)]
pub struct Source {
    /// Server, role and database.
    pub sql: pg::connect::Options,
    /// Name of the replication slot.
    pub slot: String,
    /// Whether `init` makes the slot so that standbys may keep a copy of it.
    pub failover: bool,
    /// Name of the publication.
    pub publication: String,
    /// Captured tables, `schema.table`, besides the outbox.
    pub tables: Vec<String>,
    /// Whether values come in binary form.
    pub binary: bool,
}

/// `[broker]`
#[derive(Debug, Clone)]
pub struct Broker {
    /// Nodes of one cluster, tried in turn; never empty.
    pub urls: Vec<Url>,
    /// Trusted roots and client certificate for `amqps`.
    pub tls: tls::Options,
    /// How the broker learns who we are.
    pub auth: Auth,
    /// Bounds one connection attempt.
    pub connect_timeout: Duration,
    /// Heartbeat timeout, whole seconds.
    pub heartbeat: Duration,
    /// Longest wait for a confirm.
    pub confirm_timeout: Duration,
    /// Largest body in bytes.
    pub max_message_size: usize,
    /// `http://[user:password@]host:port` of the management plugin.
    pub management_url: Option<Secret>,
    /// Time between two audits of the broker.
    pub audit_interval: Duration,
}

/// `[relay]`
#[derive(Debug, Clone)]
pub struct Relay {
    /// Most unsettled entries.
    pub max_window_events: usize,
    /// Most bytes of unsettled messages.
    pub max_window_bytes: usize,
    /// Most messages without a confirm.
    pub max_unconfirmed: usize,
    /// How often progress is stored: the duplicate window after a fault.
    pub checkpoint_interval: Duration,
    /// How long confirms are awaited at shutdown.
    pub drain_timeout: Duration,
    /// How often an idle stream advances the slot.
    pub idle_interval: Duration,
    /// Most rows in `watership.parked` that wait.
    pub parked_max_rows: usize,
    /// Most keys that are parked.
    pub parked_max_keys: usize,
    /// How long released and discarded rows stay.
    pub parked_retain: Duration,
    /// How often the canary is written; zero means never.
    pub canary_interval: Duration,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    /// Text or JSON.
    pub format: LogFormat,
    /// Least level of the relay's own lines.
    pub level: &'static str,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// Lines for people.
    Text,
    /// One object per line.
    Json,
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        let (raw, warnings) = load::load(path)?;
        let mut config = Self::from_raw(&path.display().to_string(), raw)?;
        config.warnings.splice(0..0, warnings);
        Ok(config)
    }

    /// Checks what was written; `file` is only shown in errors.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with everything that is wrong with it.
    pub fn from_raw(file: &str, raw: Raw) -> Result<Self> {
        let mut problems = Problems::default();
        let p = &mut problems;
        let name = p.name("name", &raw.name, "_-.");
        let source = source(p, &raw.source);
        let broker = broker(p, &raw.broker);
        let relay = relay(p, &raw.relay);
        let retain = p.duration("outbox.retain", &raw.outbox.retain, Duration::ZERO, YEAR);
        let listen = listen(p, &raw.admin);
        let log = log(p, &raw.log);
        let tables = source.as_ref().map_or(&[][..], |s| &s.tables);
        let rules = routes::rules(p, &raw.route, tables);
        let topology = topology::topology(p, &raw, &rules);
        let warnings = warnings(source.as_ref(), &broker);
        problems.into_result(file)?;
        let source = source.expect("without a source there is a problem");
        let maintain = raw.outbox.maintain;
        Ok(Self {
            name,
            source,
            broker,
            topology,
            rules,
            relay,
            maintain,
            retain,
            listen,
            log,
            warnings,
        })
    }

    /// What labels the routes' metrics, in the order of the rules.
    pub fn route_labels(&self) -> Vec<RouteLabel> {
        let label = |rule: &Rule| RouteLabel { name: rule.name.clone(), owner: rule.owner.clone() };
        self.rules.iter().map(label).collect()
    }

    /// For connections to the broker. The relay adds exchanges and the lock queue.
    pub fn broker_options(&self) -> amqp::options::Options {
        let Broker { urls, tls, auth, connect_timeout, heartbeat, confirm_timeout, .. } =
            &self.broker;
        let mut options = amqp::options::Options::new(urls.clone());
        options.tls = tls.clone();
        options.auth = *auth;
        options.heartbeat = *heartbeat;
        options.connect_timeout = *connect_timeout;
        options.confirm_timeout = *confirm_timeout;
        options.connection_name = format!("watership {}", self.name);
        options.max_message_size = self.broker.max_message_size;
        options
    }

    /// For the relay.
    pub fn relay_options(&self) -> relay::Options {
        relay::Options {
            name: self.name.clone(),
            sql: self.source.sql.clone(),
            slot: self.source.slot.clone(),
            publication: self.source.publication.clone(),
            kind: SourceKind::Wal,
            outbox: OutboxTable::default(),
            tables: self.source.tables.clone(),
            binary: self.source.binary,
            broker: self.broker_options(),
            topology: self.topology.clone(),
            audit: relay::upkeep::route_audit::AuditOptions {
                interval: self.broker.audit_interval,
                management_url: self.broker.management_url.clone(),
            },
            rules: self.rules.clone(),
            tuning: relay::Tuning {
                window: relay::WindowLimits {
                    events: self.relay.max_window_events,
                    bytes: self.relay.max_window_bytes,
                    unconfirmed: self.relay.max_unconfirmed,
                },
                checkpoint_interval: self.relay.checkpoint_interval,
                drain_timeout: self.relay.drain_timeout,
                idle_interval: self.relay.idle_interval,
                parked: relay::parking::Limits {
                    rows: self.relay.parked_max_rows,
                    keys: self.relay.parked_max_keys,
                },
            },
            parked_retain: self.relay.parked_retain,
            retain: self.retain,
            maintain: self.maintain,
            canary_interval: self.relay.canary_interval,
        }
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Parked rows are indexed in memory, about 300 bytes each.
const PARKED_MAX: u64 = 100_000;
/// RabbitMQ's own limit of `max_message_size`, in bytes.
const MESSAGE_MAX: u64 = 512 << 20;

fn source(p: &mut Problems, raw: &raw::Source) -> Option<Source> {
    if p.word("source.mode", &raw.mode, &[("wal", true), ("poll", false)]) {
        // The only mode so far.
    } else {
        p.other("source.mode = \"poll\" is not available yet; use \"wal\"");
    }
    let slot = p.name("source.slot", &raw.slot, "_");
    let publication = p.name("source.publication", &raw.publication, "_-.");
    let mut tables: Vec<String> = Vec::new();
    for (index, table) in raw.tables.iter().enumerate() {
        let key = format!("source.tables[{index}]");
        if !is_table_name(table) {
            p.value(&key, format!("{table:?}"), "\"schema.table\"");
        } else if table.starts_with("watership.") {
            p.value(&key, format!("{table:?}"), "tables outside the relay's own schema");
        } else if tables.contains(table) {
            p.other(format!("{key}: table {table:?} is listed twice"));
        }
        tables.push(table.clone());
    }
    let sql = postgres(p, raw)?;
    Some(Source { sql, slot, failover: raw.failover, publication, tables, binary: raw.binary })
}

fn postgres(p: &mut Problems, raw: &raw::Source) -> Option<pg::connect::Options> {
    const KEY: &str = "source.url";
    if raw.url.is_empty() {
        p.other(format!("{KEY} is not set; allowed: \"postgres://user@host:5432/database\""));
        return None;
    }
    let mut sql = match pg::connect::Options::parse(&Secret::new(&*raw.url)) {
        Ok(sql) => sql,
        Err(error) => {
            p.error(KEY, &error);
            return None;
        }
    };
    if !raw.password.is_empty() {
        if sql.password.is_some() {
            p.other(format!("{KEY} has a password and source.password is set; keep one"));
        }
        sql.password = Some(Secret::new(&*raw.password));
    }
    Some(sql)
}

fn broker(p: &mut Problems, raw: &raw::Broker) -> Broker {
    if raw.url.is_empty() {
        p.other("broker.url is not set; allowed: \"amqp://user@host:5672/vhost\" or a list");
    }
    let auth = [("plain", Auth::Plain), ("external", Auth::External)];
    let auth = p.word("broker.auth", &raw.auth, &auth);
    let file = |path: &str| (!path.is_empty()).then(|| PathBuf::from(path));
    let tls = tls::Options {
        mode: tls::Mode::Disable,
        root_cert: file(&raw.tls_ca),
        client_cert: file(&raw.tls_cert),
        client_key: file(&raw.tls_key),
    };
    if tls.client_cert.is_some() != tls.client_key.is_some() {
        p.other("broker.tls_cert and broker.tls_key belong together; set both or neither");
    }
    if auth == Auth::External && tls.client_cert.is_none() {
        p.other("broker.auth = \"external\" needs broker.tls_cert and broker.tls_key");
    }
    let heartbeat = p.duration("broker.heartbeat", &raw.heartbeat, SECOND, HOUR);
    if heartbeat.subsec_millis() != 0 {
        p.value("broker.heartbeat", format!("{:?}", raw.heartbeat), "whole seconds");
    }
    let key = "broker.confirm_timeout";
    let confirm_timeout = p.duration(key, &raw.confirm_timeout, SECOND, HOUR);
    if confirm_timeout <= heartbeat * 2 {
        let value = format!("{:?}", raw.confirm_timeout);
        p.value(key, value, "more than twice broker.heartbeat");
    }
    let urls = broker_urls(p, raw);
    check_urls(p, &urls, auth, &tls, confirm_timeout);
    let management_url = management_url(p, &raw.management_url, &urls);
    Broker {
        urls,
        tls,
        auth,
        connect_timeout: p.duration("broker.connect_timeout", &raw.connect_timeout, SECOND, HOUR),
        heartbeat,
        confirm_timeout,
        max_message_size: p.size("broker.max_message_size", &raw.max_message_size, 1, MESSAGE_MAX),
        management_url,
        audit_interval: p.duration("broker.audit_interval", &raw.audit_interval, SECOND, HOUR * 24),
    }
}

fn broker_urls(p: &mut Problems, raw: &raw::Broker) -> Vec<Url> {
    let mut urls = Vec::new();
    for (index, text) in raw.url.iter().enumerate() {
        let key =
            if raw.url.len() == 1 { "broker.url".into() } else { format!("broker.url[{index}]") };
        match Url::parse(text) {
            Ok(mut url) => {
                if !raw.password.is_empty() {
                    if !url.password.expose().is_empty() {
                        p.other(format!(
                            "{key} needs a user and no password, because broker.password is set"
                        ));
                    }
                    url.password = Secret::new(&*raw.password);
                }
                urls.push(url);
            }
            Err(error) => p.error(&key, &error),
        }
    }
    urls
}

/// Parameters of a URL go before the keys: what holds for the keys holds for them too.
fn check_urls(p: &mut Problems, urls: &[Url], auth: Auth, tls: &tls::Options, confirm: Duration) {
    for url in urls {
        if url.heartbeat.is_some_and(|heartbeat| confirm <= heartbeat * 2) {
            let what = "broker.confirm_timeout must be more than twice its heartbeat";
            p.other(format!("broker.url {url}: {what}"));
        }
        if url.auth.unwrap_or(auth) == Auth::External {
            if url.scheme == Scheme::Amqp {
                p.other(format!("broker.url {url}: external authentication needs amqps://"));
            }
            if tls.client_cert.is_none() && url.auth.is_some() {
                let what = "external authentication needs broker.tls_cert and broker.tls_key";
                p.other(format!("broker.url {url}: {what}"));
            }
        }
    }
    // They are tried in turn, for one lock queue and one set of exchanges.
    if let [first, others @ ..] = urls
        && let Some(other) = others.iter().find(|other| other.vhost != first.vhost)
    {
        let (one, two) = (&first.vhost, &other.vhost);
        p.other(format!("broker.url lists nodes of one cluster, and two vhosts: {one:?}, {two:?}"));
    }
}

fn management_url(p: &mut Problems, text: &str, urls: &[Url]) -> Option<Secret> {
    if text.is_empty() {
        return None;
    }
    let url = Secret::new(text);
    // Without a broker URL there is another problem to tell.
    if !urls.is_empty()
        && let Err(error) = Management::new(&url, &amqp::options::Options::new(urls.to_vec()))
    {
        p.error("broker.management_url", &error);
    }
    Some(url)
}

fn relay(p: &mut Problems, raw: &raw::Relay) -> Relay {
    const WINDOW_MAX: u64 = 1 << 20;
    let events = p.number("relay.max_window_events", raw.max_window_events, 1, WINDOW_MAX);
    let interval = "relay.checkpoint_interval";
    let minute = SECOND * 60;
    Relay {
        max_window_events: events,
        max_window_bytes: p.size("relay.max_window_bytes", &raw.max_window_bytes, 1 << 16, 4 << 30),
        max_unconfirmed: p.number("relay.max_unconfirmed", raw.max_unconfirmed, 1, WINDOW_MAX),
        checkpoint_interval: p.duration(interval, &raw.checkpoint_interval, MILLISECOND, minute),
        drain_timeout: p.duration("relay.drain_timeout", &raw.drain_timeout, MILLISECOND, HOUR),
        idle_interval: p.duration("relay.idle_interval", &raw.idle_interval, SECOND, HOUR),
        parked_max_rows: p.number("relay.parked_max_rows", raw.parked_max_rows, 1, PARKED_MAX),
        parked_max_keys: p.number("relay.parked_max_keys", raw.parked_max_keys, 1, PARKED_MAX),
        parked_retain: p.duration("relay.parked_retain", &raw.parked_retain, HOUR, YEAR),
        canary_interval: canary_interval(p, &raw.canary_interval),
    }
}

fn canary_interval(p: &mut Problems, text: &str) -> Duration {
    let key = "relay.canary_interval";
    let interval = p.duration(key, text, Duration::ZERO, HOUR);
    if !interval.is_zero() && interval < SECOND {
        p.value(key, format!("{text:?}"), "\"0s\", or 1s to 1h");
    }
    interval
}

fn listen(p: &mut Problems, raw: &raw::Admin) -> Option<SocketAddr> {
    const KEY: &str = "admin.listen";
    if raw.listen.is_empty() {
        return None;
    }
    let Ok(address) = raw.listen.parse::<SocketAddr>() else {
        p.value(KEY, format!("{:?}", raw.listen), "\"address:port\" such as \"127.0.0.1:9187\"");
        return None;
    };
    if !address.ip().is_loopback() && !raw.allow_remote {
        p.other(format!(
            "{KEY} = \"{address}\" can be reached from other machines, and there is no \
             authentication; listen on 127.0.0.1, or set admin.allow_remote = true"
        ));
    }
    Some(address)
}

fn log(p: &mut Problems, raw: &raw::Log) -> Log {
    let formats = [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)];
    let levels = ["info", "error", "warn", "debug", "trace"].map(|level| (level, level));
    Log {
        format: p.word("log.format", &raw.format, &formats),
        level: p.word("log.level", &raw.level, &levels),
    }
}

fn is_table_name(text: &str) -> bool {
    let parts = text.split_once('.');
    parts.is_some_and(|(schema, table)| {
        !schema.is_empty() && !table.is_empty() && !table.contains(['.', '"', '*'])
    })
}

fn warnings(source: Option<&Source>, broker: &Broker) -> Vec<String> {
    let mut list = Vec::new();
    if let Some(Source { sql, .. }) = source {
        let weak = match sql.tls.mode {
            tls::Mode::Require => Some("verifies no certificate"),
            tls::Mode::VerifyCa => Some("does not compare the host name"),
            tls::Mode::Disable | tls::Mode::VerifyFull => None,
        };
        list.extend(weak.map(|weak| {
            format!("source.url {weak}: somebody between can read and change everything")
        }));
    }
    let local = |host: &str| {
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
    };
    for url in &broker.urls {
        if url.scheme == crate::amqp::options::Scheme::Amqp && !local(&url.host) {
            list.push(format!("broker {url} is plain text over the network; use amqps://"));
        }
    }
    let management = broker.management_url.as_ref().filter(|_| !broker.urls.is_empty());
    let management = management.and_then(|url| {
        Management::new(url, &amqp::options::Options::new(broker.urls.clone())).ok()
    });
    if let Some(host) = management.as_ref().and_then(Management::plain_host).filter(|h| !local(h)) {
        list.push(format!(
            "broker.management_url sends a password in plain text to {host}; use https://"
        ));
    }
    list
}
