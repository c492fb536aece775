//! What an error from the server means for us: one table, keyed by SQLSTATE.
//!
//! Both connections (ordinary SQL and replication) end here, so that the same answer from the
//! server always has the same kind and the same advice. The table knows codes, not texts: server
//! messages are translated by `lc_messages`.
//!
//! Codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>

use std::io;

use postgres_protocol::message::backend::ErrorFields;
use tokio_postgres::error::DbError;
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::error::{Error, Kind};
use crate::fault::io_error;

/// The fields of an error response that we use.
///
/// <https://www.postgresql.org/docs/current/protocol-error-fields.html>
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerError {
    /// Five characters.
    pub code: String,
    /// Primary text, in the server's language.
    pub message: String,
    /// Secondary text. May hold row data for the classes 22 and 23.
    pub detail: Option<String>,
    /// The server's own advice.
    pub hint: Option<String>,
    /// The source file that reports it, such as `pgoutput.c`; never translated.
    pub file: String,
    /// `ERROR` leaves the connection usable, `FATAL` and `PANIC` end it.
    pub fatal: bool,
}

impl ServerError {
    /// Reads the fields of an `ErrorResponse` or `NoticeResponse`; invalid UTF-8 is replaced,
    /// because errors before authentication come in the server's own encoding.
    ///
    /// # Errors
    /// When the body is cut short.
    pub fn read(mut fields: ErrorFields<'_>) -> io::Result<Self> {
        let mut error = Self::default();
        while let Some(field) = fields.next()? {
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                b'F' => error.file = value,
                // 'V' is the severity that is never translated (9.6 and later).
                b'V' => error.fatal = value == "FATAL" || value == "PANIC",
                _ => {}
            }
        }
        Ok(error)
    }

    /// The error that a caller sees.
    pub fn to_error(&self) -> Error {
        let (kind, advice) = classify(&self.code);
        let mut what = format!("{} (SQLSTATE {})", self.message, self.code);
        if let Some(detail) = &self.detail
            && !carries_row_data(&self.code)
        {
            what = format!("{what}: {detail}");
        }
        let error = Error::new(kind, what).coded(&*self.code);
        match (advice, &self.hint) {
            (Some(ours), Some(server)) => error.hint(format!("{ours}; the server says: {server}")),
            (Some(ours), None) => error.hint(ours),
            (None, Some(server)) => error.hint(server.clone()),
            (None, None) => error,
        }
    }
}

/// The error of an ordinary SQL connection, by the same table.
pub fn postgres_error(error: tokio_postgres::Error) -> Error {
    if let Some(db) = error.as_db_error() {
        return server_error(db).to_error();
    }
    if error.is_closed() {
        return Error::unreachable("the connection to Postgres is closed");
    }
    // The kind is private there; its fixed text is the only sign of it.
    let text = error.to_string();
    let Some(cause) = error.into_source() else {
        return Error::protocol("Postgres sent something that the protocol does not allow here");
    };
    if text == "authentication error" {
        return Error::refused("authentication with Postgres").caused_by(cause);
    }
    match cause.downcast::<io::Error>() {
        Ok(cause) => io_error("talking to Postgres", *cause),
        Err(cause) => Error::protocol(text).caused_by(cause),
    }
}

fn server_error(db: &DbError) -> ServerError {
    ServerError {
        code: db.code().code().to_owned(),
        message: db.message().to_owned(),
        detail: db.detail().map(str::to_owned),
        hint: db.hint().map(str::to_owned),
        file: db.file().unwrap_or_default().to_owned(),
        fatal: false,
    }
}

/// Classes 22 and 23 quote values of rows; those never go to a log.
fn carries_row_data(code: &str) -> bool {
    code.starts_with("22") || code.starts_with("23")
}

/// The table: what the caller does about an SQLSTATE, and our advice. The last line of a class is
/// for all of its codes that are not named.
pub fn classify(code: &str) -> (Kind, Option<&'static str>) {
    let class = code.get(..2).unwrap_or_default();
    match (class, code) {
        (_, "08P01") => {
            (Kind::Refused, Some("if this is a connection pooler, name the Postgres server itself"))
        }
        ("08", _) => (Kind::Unreachable, Some("the connection broke; it is opened again")),
        ("0A", _) => {
            (Kind::Refused, Some("this server is too old, or lacks a feature that is set"))
        }
        (_, "25006") => (
            Kind::Unreachable,
            Some("this server is a standby: name the primary in the URL, or wait for promotion"),
        ),
        (_, "25P03" | "25P04" | "57P05") => (
            Kind::Unreachable,
            Some("a time limit of the server ended the session; it is opened again"),
        ),
        (_, "28P01") => (Kind::Refused, Some("check user and password in the URL")),
        ("28", _) => (
            Kind::Refused,
            Some("check user and password in the URL, and the server's pg_hba.conf"),
        ),
        (_, "3D000") => (Kind::Refused, Some("check the database name in the URL")),
        (_, "3F000") | ("42", "42P01" | "42883" | "42703") => {
            (Kind::Refused, Some("is the schema installed in this database? `watership init` does"))
        }
        ("40", _) | (_, "55P03") => (Kind::Busy, Some("somebody held a lock; it is tried again")),
        (_, "55006") => (Kind::Busy, Some("another relay reads the slot; this one waits")),
        (_, "42501") => {
            (Kind::Refused, Some("the role lacks a privilege: replication needs LOGIN REPLICATION"))
        }
        (_, "42704") => (
            Kind::Verdict,
            Some("a slot or publication that was there is gone: `watership check` says which"),
        ),
        (_, "53400") => {
            (Kind::Refused, Some("raise max_replication_slots, or drop slots that nobody reads"))
        }
        (_, "53300") => {
            (Kind::Unreachable, Some("raise max_connections or max_wal_senders if this lasts"))
        }
        (_, "53100") => (Kind::Unreachable, Some("the server's disk is full")),
        ("53", _) => (Kind::Unreachable, Some("the server is short of a resource")),
        (_, "55000") => (
            Kind::Verdict,
            Some("the slot is lost or wal_level is not logical: `watership check` says which"),
        ),
        (_, "57014") => {
            (Kind::Unreachable, Some("a timeout or an operator cancelled it; it is tried again"))
        }
        (_, "57P01" | "57P02" | "57P03") => (
            Kind::Unreachable,
            Some("the server stops, starts or ended the session; it is tried again"),
        ),
        (_, "57P04") => (Kind::Refused, Some("the database was dropped: check the URL")),
        (_, "58P01") => (
            Kind::Refused,
            Some("a file of the server is missing, WAL perhaps: see its log and `watership check`"),
        ),
        ("58", _) => (Kind::Unreachable, Some("the server's storage failed: see its log")),
        ("XX", _) => (Kind::Protocol, Some("the server failed within: see its log")),
        ("54", _) => (Kind::Refused, Some("a limit of the server was met")),
        ("22" | "23", _) => (Kind::Refused, Some("the server did not take a value: see its log")),
        ("42", _) => (Kind::Refused, Some("does the schema fit this version? `watership init`")),
        _ => (Kind::Refused, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(code: &str) -> Kind {
        ServerError { code: code.into(), ..Default::default() }.to_error().kind()
    }

    #[test]
    fn each_sqlstate_has_its_kind() {
        for (kind, codes) in [
            (Kind::Unreachable, &["57P01", "57P02", "57P03", "08006", "08001", "53300"][..]),
            (Kind::Unreachable, &["57014", "53100", "25006", "58030", "57P05"]),
            (Kind::Refused, &["28P01", "28000", "3D000", "42501", "42P01", "53400", "08P01"]),
            (Kind::Refused, &["42601", "0A000", "23505", "42710", "58P01", "", "é", "日"]),
            (Kind::Busy, &["55006", "55P03", "40001", "40P01"]),
            (Kind::Verdict, &["42704", "55000"]),
            (Kind::Protocol, &["XX000"]),
        ] {
            for code in codes {
                assert_eq!(kind_of(code), kind, "{code}");
            }
        }
    }

    #[test]
    fn row_data_in_details_is_not_repeated() {
        let error = |code: &str| ServerError {
            code: code.into(),
            message: "text".into(),
            detail: Some("Key (mail)=(a@b)".into()),
            ..Default::default()
        };
        assert_eq!(error("23505").to_error().to_string(), "text (SQLSTATE 23505)");
        assert!(error("55000").to_error().to_string().contains("Key (mail)"));
    }

    #[test]
    fn both_hints_are_kept() {
        let error =
            ServerError { code: "28P01".into(), hint: Some("try".into()), ..Default::default() };
        let error = error.to_error();
        let advice = error.advice().unwrap();
        assert!(advice.contains("password") && advice.ends_with("try"), "{advice}");
    }
}
