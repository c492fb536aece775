//! `[source]`: where events come from.

use std::path::{Path, PathBuf};

use super::load::Filled;
use super::section::{Entry, Section};
use crate::error::Result;
use crate::pg::connect::Options;
use crate::pg::publication::TableName;
use crate::secret::{Again, Secret};
use crate::source::SourceKind;
use crate::tls::SslMode;

/// How to reach Postgres and log in; `None` when there is a problem with it.
pub(super) fn connection(t: &mut Section<'_>) -> Option<Options> {
    const URL: &str = "url";
    let url = t.required_url(URL, "\"postgres://user@host:5432/database\"");
    let login =
        Login { password: t.password("password"), url: url?, directory: t.directory().into() };
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
}

impl Login {
    fn read(&self) -> Result<Options> {
        let mut options = self.options()?;
        if let Some(password) = &self.password {
            options.password = Some(Secret::new(password.text()?));
        }
        options.tls.begin_at(&self.directory);
        Ok(options)
    }

    /// What the URL alone says.
    fn options(&self) -> Result<Options> {
        Options::parse(&Secret::new(self.url.text()?))
    }
}

/// How events are read.
pub(super) fn kind(t: &mut Section<'_>) -> SourceKind {
    let wal = SourceKind::Wal;
    let kind = t.word("mode", &[(wal.name(), Some(wal)), ("poll", None)]);
    if kind.is_none() {
        t.problem("mode", "source.mode = \"poll\" is not available yet; use \"wal\"");
    }
    kind.unwrap_or(wal)
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
pub(super) fn tables(t: &mut Section<'_>) -> CapturedTables {
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
