//! The configuration: a file becomes what the relay, the admin server and the log are told.
//!
//! Each key is read by one line, which has its name, its default and what is allowed, and goes
//! straight into the options of the component that uses it. Invariant: after a [`Config`] exists
//! nobody checks it again. All problems of a file are reported at once. `Debug` shows no secret.
//! `[relay]`, `[backfill]`, `[admin]` and `[log]` are read here, other sections in files named so.
//!
//! ```text
//! file ── load ──► text ── toml ──► Section ── keys ──► relay::Options, admin::Options, Log
//! ```

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use toml::de::DeTable;

use crate::amqp::topology::Mode;
use crate::error::{Error, Result};
use crate::metrics::RouteLabel;
use crate::pg::publication::TableName;
use crate::relay::parking::Limits;
use crate::route::Rule;
use crate::source::SourceKind;
use crate::{admin, relay};

mod broker;
mod checked_arguments;
mod contracts;
mod formats;
pub mod load;
mod outbox;
mod partitions;
mod problems;
mod routes;
mod rules;
mod section;
mod source;
mod topology;
mod value;

use load::Lookup;
use section::{Document, Section, syntax_error};
use value::quoted;

/// Everything, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Both ends, routes, limits and intervals.
    pub relay: relay::Options,
    /// Whether `init` creates the slot so that standbys may keep a copy of it.
    pub failover: bool,
    /// Where probes and metrics are served.
    pub admin: admin::Options,
    /// Logging.
    pub log: Log,
    /// What is allowed but should be changed.
    pub warnings: Vec<String>,
}

/// `[log]`
#[derive(Debug, Clone)]
pub struct Log {
    /// Text or JSON.
    pub format: LogFormat,
    /// Minimum level of the relay's own lines.
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
    /// Reads and checks the file at `path`; variables come from the environment.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with everything that is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        let text = load::read(path)?;
        let file = path.display().to_string();
        let (mut config, holds_password) = read(&file, &text, &load::environment)?;
        let warning = holds_password.then(|| load::open_file_warning(path)).flatten();
        config.warnings.splice(0..0, warning);
        Ok(config)
    }

    /// Reads only the relay's name and `[admin]` of the file at `path`, for a probe: it needs no
    /// secret of the file, and a mistake elsewhere in it does not make a relay dead that runs.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with what is wrong with these.
    pub fn load_admin(path: &Path) -> Result<(String, admin::Options)> {
        let text = load::read(path)?;
        read_admin(&path.display().to_string(), &text, &load::environment)
    }

    /// Checks the text of a file; `file` is only shown in errors.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with everything that is wrong with it.
    pub fn parse(file: &str, text: &str, lookup: Lookup<'_>) -> Result<Self> {
        read(file, text, lookup).map(|(config, _)| config)
    }

    /// What labels the routes' metrics, in the order of the rules.
    pub fn route_labels(&self) -> Vec<RouteLabel> {
        let label = |rule: &Rule| RouteLabel { name: rule.name.clone(), owner: rule.owner.clone() };
        self.relay.rules.iter().map(label).collect()
    }
}

/// The relay's name by default, and what it may hold apart from letters and digits.
const NAME: &str = "watership";
const NAME_CHARS: &str = "_-.";

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The first is the default.
const LEVELS: [&str; 5] = ["info", "error", "warn", "debug", "trace"];
/// What the window may hold, in events and messages.
const WINDOW: RangeInclusive<usize> = 1..=1 << 20;
/// What may be parked, in rows and keys: they are indexed in memory, about 300 bytes each.
const PARKED: RangeInclusive<usize> = 1..=100_000;

/// The configuration, and whether a password stands in the file itself.
fn read(file: &str, text: &str, lookup: Lookup<'_>) -> Result<(Config, bool)> {
    let parsed = DeTable::parse(text).map_err(|e| syntax_error(file, text, &e))?;
    let document = Document::new(file, lookup);
    let config = config(&mut document.root(&parsed));
    let holds_password = document.holds_password();
    document.finish(file, text)?;
    Ok((config.expect("a problem was reported where a part is missing"), holds_password))
}

fn read_admin(file: &str, text: &str, lookup: Lookup<'_>) -> Result<(String, admin::Options)> {
    let parsed = DeTable::parse(text).map_err(|e| syntax_error(file, text, &e))?;
    let document = Document::new(file, lookup);
    let mut root = document.root(&parsed);
    let name = root.name("name", NAME, NAME_CHARS);
    let options = admin_options(&mut root.section("admin"));
    root.ignore_rest();
    drop(root);
    document.finish(file, text)?;
    Ok((name, options))
}

/// `None` where source.url is missing or wrong; everything else has a value to go on with.
fn config(root: &mut Section<'_>) -> Option<Config> {
    let name = root.name("name", NAME, NAME_CHARS);
    let sections = ["source", "broker", "relay", "outbox", "backfill", "admin", "log"];
    let [mut source, mut broker, mut relay, mut outbox, mut backfill, mut admin, mut log] =
        sections.map(|section| root.section(section));
    let kind = source::kind(&mut source);
    let sql = source::connection(&mut source, kind);
    let source::WalKeys { failover, slot, publication, binary } =
        source::wal_keys(&mut source, kind);
    let poll_interval = source::poll_interval(&mut source, kind);
    let source::CapturedTables { names: tables, held, initial } = source::tables(&mut source, kind);
    let mut outbox = outbox::outbox(&mut outbox, kind, &tables);
    let connection = broker::connection(&mut broker, &name);
    let audit = broker::audit(&mut broker, &connection);
    let mode = broker.word("topology", &[("declare", Mode::Declare), ("verify", Mode::Verify)]);
    let (rules, partitioned) = routes::rules(root, &tables, &name);
    let shown = routes::shown(&rules);
    if outbox.table.is_mapped() {
        outbox.table.placed = routes::placed(&rules);
        outbox.table.shown = shown.into_iter().map(|(_, column)| column).collect();
    } else if let Some((key, column)) = shown.first() {
        let text = format!(
            "{key} has the field \"column.{column}\", and watership.outbox has no columns of yours"
        );
        root.error("route", &Error::config(text).hint("name a table of your own in outbox.table"));
    }
    let admin = admin_options(&mut admin);
    let log = Log {
        format: log.word(
            "format",
            &[("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)],
        ),
        level: log.word("level", &LEVELS.map(|level| (level, level))),
    };
    let relay = relay::Options {
        name,
        kind,
        outbox: outbox.table,
        poll_interval,
        slot,
        publication,
        tables,
        held,
        binary,
        broker: connection,
        topology: topology::topology(root, mode, &rules, &partitioned),
        audit,
        rules,
        tuning: tuning(&mut relay, kind),
        maintain: outbox.maintain,
        retain: outbox.retain,
        delete_after: outbox.delete_after,
        retained_for: outbox.retained_for,
        parked_retain: relay.duration("parked_retain", DAY * 7, HOUR..=YEAR),
        canary_interval: canary_interval(&mut relay, kind),
        backfill: backfill_options(&mut backfill, initial),
        accept_reorder: false,
        // Last, so that every key was asked for.
        sql: sql?,
    };
    let mut warnings: Vec<String> = source::warning(&relay.sql).into_iter().collect();
    warnings.extend(broker::warnings(&relay.broker, &relay.audit));
    Some(Config { relay, failover, admin, log, warnings })
}

/// Limits and intervals of the loop.
fn tuning(t: &mut Section<'_>, kind: SourceKind) -> relay::Tuning {
    const IDLE: Duration = SECOND.saturating_mul(30);
    let idle_interval = t.duration("idle_interval", IDLE, SECOND..=HOUR);
    source::refuse(t, kind == SourceKind::Poll, &[("idle_interval", idle_interval != IDLE)]);
    relay::Tuning {
        window: relay::WindowLimits {
            events: t.number("max_window_events", 8192, WINDOW),
            bytes: t.size("max_window_bytes", 16 << 20, 1 << 16..=4 << 30),
            unconfirmed: t.number("max_unconfirmed", 2048, WINDOW),
        },
        max_unstored: t.number("max_unstored_events", 16_384, WINDOW),
        checkpoint_interval: t.duration(
            "checkpoint_interval",
            MILLISECOND * 100,
            MILLISECOND..=MINUTE,
        ),
        drain_timeout: t.duration("drain_timeout", SECOND * 10, MILLISECOND..=HOUR),
        idle_interval,
        parked: Limits {
            rows: t.number("parked_max_rows", 10_000, PARKED),
            keys: t.number("parked_max_keys", 1_000, PARKED),
        },
    }
}

/// How rows are read that were there before.
fn backfill_options(t: &mut Section<'_>, initial: Vec<TableName>) -> relay::backfill::Options {
    relay::backfill::Options {
        initial,
        chunk_rows: t.number("chunk_rows", 5_000, 1..=100_000),
        max_unconfirmed: t.number("max_unconfirmed", 32, 1..=10_000),
        max_rate: t.number("max_rate", 0, 0..=10_000_000),
        max_queue_messages: t.number("max_queue_messages", 0, 0..=u32::MAX),
        max_slot_wal: t.size("max_slot_wal", 1 << 30, 1 << 20..=1 << 50) as u64,
    }
}

/// Zero means never.
fn canary_interval(t: &mut Section<'_>, kind: SourceKind) -> Duration {
    const KEY: &str = "canary_interval";
    const DEFAULT: Duration = SECOND.saturating_mul(10);
    let interval = t.duration(KEY, DEFAULT, Duration::ZERO..=HOUR);
    if !interval.is_zero() && interval < SECOND {
        t.invalid(KEY, quoted(interval), "\"0s\", or 1s to 1h");
    }
    source::refuse(t, kind == SourceKind::Poll, &[(KEY, interval != DEFAULT)]);
    interval
}

fn admin_options(t: &mut Section<'_>) -> admin::Options {
    admin::Options {
        listen: listen(t),
        linger: t.duration("linger", MINUTE, Duration::ZERO..=HOUR),
    }
}

fn listen(t: &mut Section<'_>) -> Option<SocketAddr> {
    const KEY: &str = "listen";
    const DEFAULT: &str = "127.0.0.1:9465";
    let text = t.text(KEY, DEFAULT);
    let allow_remote = t.flag("allow_remote", false);
    if text.is_empty() {
        return None;
    }
    let Ok(address) = text.parse::<SocketAddr>() else {
        t.invalid(KEY, format!("{text:?}"), format!("\"address:port\", such as \"{DEFAULT}\""));
        return None;
    };
    if !address.ip().is_loopback() && !allow_remote {
        t.problem(
            KEY,
            format!(
                "admin.listen = \"{address}\" can be reached from other machines, and there is no \
                 authentication; listen on 127.0.0.1, or set admin.allow_remote = true"
            ),
        );
    }
    Some(address)
}
