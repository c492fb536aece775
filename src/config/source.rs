//! `[source]`: where events come from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::load::Filled;
use super::section::{Entry, Section};
use super::value::quoted;
use super::{MILLISECOND, MINUTE, SECOND};
use crate::error::Result;
use crate::pg::connect::{Options, Settings};
use crate::pg::publication::TableName;
use crate::secret::{Again, Secret};
use crate::source::SourceKind;
use crate::source::poll::Interval;
use crate::tls::SslMode;

/// How to reach Postgres and log in; `None` when there is a problem with it.
pub(super) fn connection(t: &mut Section<'_>, kind: SourceKind) -> Option<Options> {
    const URL: &str = "url";
    let url = t.required_url(URL, "\"postgres://user@host:5432/database\"");
    let settings = match kind {
        SourceKind::Wal => Settings::Relay,
        SourceKind::Poll => Settings::Pooled,
    };
    let (password, directory) = (t.password("password"), t.directory().into());
    let login = Login { password, url: url?, directory, settings };
    let mut options = match login.read() {
        Ok(options) => options,
        Err(error) => {
            t.error(URL, &error);
            return None;
        }
    };
    if login.password.is_some() && login.options().is_ok_and(|own| own.password.is_some()) {
        let both = "source.password is set and source.url has a password; remove one";
        t.problem("password", both);
    }
    let files = login.url.files().chain(login.password.iter().flat_map(Filled::files));
    let files = files.map(Path::to_owned).collect();
    options.again = Again::new(files, move || login.read());
    Some(options)
}

/// As it is written; what it stands for may change.
struct Login {
    url: Filled,
    password: Option<Filled>,
    /// Where relative paths of the URL begin.
    directory: PathBuf,
    settings: Settings,
}

impl Login {
    fn read(&self) -> Result<Options> {
        let mut options = self.options()?;
        if let Some(password) = &self.password {
            options.password = Some(Secret::new(password.text()?));
        }
        options.tls.begin_at(&self.directory);
        options.settings = self.settings;
        Ok(options)
    }

    /// What the URL alone says.
    fn options(&self) -> Result<Options> {
        Options::parse(&Secret::new(self.url.text()?))
    }
}

/// How events are read.
pub(super) fn kind(t: &mut Section<'_>) -> SourceKind {
    t.word("mode", &SourceKind::ALL.map(|kind| (kind.name(), kind)))
}

/// The intervals by default.
const POLL_MIN: Duration = Duration::from_millis(5);
const POLL_MAX: Duration = SECOND;

/// What only mode `wal` has, apart from the captured tables.
pub(super) struct WalKeys {
    /// Whether standbys may keep a copy of the slot.
    pub(super) failover: bool,
    /// The slot.
    pub(super) slot: String,
    /// The publication.
    pub(super) publication: String,
    /// Whether values come in binary form.
    pub(super) binary: bool,
}

/// The keys of mode `wal`.
pub(super) fn wal_keys(t: &mut Section<'_>, kind: SourceKind) -> WalKeys {
    const NAME: &str = "watership";
    let failover = t.flag("failover", false);
    let (slot, publication) = (t.name("slot", NAME, "_"), t.name("publication", NAME, "_-."));
    let binary = t.flag("binary", false);
    let given = [
        ("failover", failover),
        ("slot", slot != NAME),
        ("publication", publication != NAME),
        ("binary", binary),
    ];
    refuse(t, kind == SourceKind::Poll, &given);
    WalKeys { failover, slot, publication, binary }
}

/// How often the outbox is looked at.
pub(super) fn poll_interval(t: &mut Section<'_>, kind: SourceKind) -> Interval {
    const MIN: &str = "poll_min_interval";
    const MAX: &str = "poll_max_interval";
    let min = t.duration(MIN, POLL_MIN, MILLISECOND..=MINUTE);
    let max = t.duration(MAX, POLL_MAX, MILLISECOND..=MINUTE);
    if min > max {
        let expected = format!("at least source.{MIN}, which is {}", quoted(min));
        t.invalid(MAX, quoted(max), expected);
    }
    refuse(t, kind == SourceKind::Wal, &[(MIN, min != POLL_MIN), (MAX, max != POLL_MAX)]);
    Interval { min, max }
}

/// Keys that do nothing in the other mode than theirs, and whether each has another value than its
/// default.
pub(super) fn refuse(t: &Section<'_>, other_mode: bool, keys: &[(&str, bool)]) {
    for (key, _) in keys.iter().filter(|(_, given)| other_mode && *given) {
        let own = if key.starts_with("poll_") { "poll" } else { "wal" };
        let what = format!("{} is only for source.mode = {own:?}; remove it", t.path(key));
        t.problem(key, what);
    }
}

/// What `tables` says.
pub(super) struct CapturedTables {
    /// Captured tables, `schema.table`.
    pub(super) names: Vec<String>,
    /// Those of them that are held when they are lost.
    pub(super) held: Vec<TableName>,
    /// Those of which a snapshot is taken.
    pub(super) initial: Vec<TableName>,
}

/// The captured tables.
pub(super) fn tables(t: &mut Section<'_>, kind: SourceKind) -> CapturedTables {
    const TABLES: &str = "tables";
    let (mut tables, mut held, mut initial) = (Vec::new(), Vec::new(), Vec::new());
    for entry in t.entries(TABLES, "\"schema.table\" or { name = \"schema.table\" }") {
        let (name, holds, snapshot) = match entry {
            Entry::Text(name) => (name, false, false),
            Entry::Table(mut table) => {
                let name = table.text("name", "");
                table.call_it(&format!("captured table {name:?}"));
                let holds = table.word("on_table_lost", &[("stop", false), ("hold", true)]);
                (name, holds, table.word("snapshot", &[("never", false), ("initial", true)]))
            }
        };
        if let Ok(name) = name.parse::<TableName>() {
            held.extend(holds.then(|| name.clone()));
            initial.extend(snapshot.then_some(name));
        }
        tables.push(name);
    }
    if kind == SourceKind::Poll && !tables.is_empty() {
        let what = "source.tables is not empty, but source.mode = \"poll\" reads the outbox only: \
            changes of other tables are in the WAL alone; use mode = \"wal\", or emit events";
        t.problem(TABLES, what);
    }
    for (index, table) in tables.iter().enumerate() {
        let expected = if !is_table_name(table) {
            "\"schema.table\""
        } else if table.starts_with("watership.") {
            "a table outside the relay's own schema"
        } else if tables[..index].contains(table) {
            "each table once"
        } else {
            continue;
        };
        let what = format!("source.tables has {table:?}; expected {expected}");
        t.problem(TABLES, what);
    }
    CapturedTables { names: tables, held, initial }
}

fn is_table_name(text: &str) -> bool {
    let parts = text.split_once('.');
    parts.is_some_and(|(schema, table)| {
        !schema.is_empty() && !table.is_empty() && !table.contains(['.', '"', '*'])
    })
}

/// What is allowed but weak.
pub(super) fn warning(options: &Options) -> Option<String> {
    let weak = match options.tls.mode {
        SslMode::Require => "does not verify the server's certificate (sslmode=require)",
        SslMode::VerifyCa => "does not verify the server's host name (sslmode=verify-ca)",
        SslMode::Disable | SslMode::VerifyFull => return None,
    };
    Some(format!(
        "source.url {weak}: an attacker on the network path can read and change everything; \
         use sslmode=verify-full"
    ))
}
