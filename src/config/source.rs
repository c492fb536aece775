//! `[source]`: where events come from.

use super::section::Section;
use crate::pg::connect::Options;
use crate::secret::Secret;
use crate::source::SourceKind;
use crate::tls::SslMode;

/// How to reach Postgres and log in; `None` when there is a problem with it.
pub(super) fn connection(t: &mut Section<'_>) -> Option<Options> {
    const URL: &str = "url";
    let url = t.required_url(URL, "\"postgres://user@host:5432/database\"");
    let password = t.password("password");
    let mut options = match Options::parse(&Secret::new(url?)) {
        Ok(options) => options,
        Err(error) => {
            t.error(URL, &error);
            return None;
        }
    };
    if password.is_some() {
        if options.password.is_some() {
            let both = "source.password is set and source.url has a password; remove one";
            t.problem("password", both);
        }
        options.password = password;
    }
    Some(options)
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

/// Captured tables, `schema.table`.
pub(super) fn tables(t: &mut Section<'_>) -> Vec<String> {
    const TABLES: &str = "tables";
    let tables = t.list(TABLES);
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
    tables
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
