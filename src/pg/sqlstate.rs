//! What an error from the server means for us: one table, keyed by SQLSTATE, and the names of the
//! codes by which others decide.
//!
//! Both connections (ordinary SQL and replication) end here, so that the same answer from the
//! server always has the same kind and the same hint. The table knows codes, not texts: server
//! messages are translated by `lc_messages`.
//!
//! Codes: <https://www.postgresql.org/docs/current/errcodes-appendix.html>

use std::io;

use postgres_protocol::message::backend::ErrorFields;
use tokio_postgres::error::DbError;
use tokio_postgres::fallible_iterator::FallibleIterator;

use crate::error::{Code, Error, Kind};
use crate::fault::io_error;

/// Another process uses it: the slot has a reader.
pub const OBJECT_IN_USE: &str = "55006";
/// It is not in the state that the command needs: the slot is lost, `wal_level` is too low.
pub const OBJECT_NOT_IN_PREREQUISITE_STATE: &str = "55000";
/// A row with this key is there already.
pub const UNIQUE_VIOLATION: &str = "23505";
/// A row names another one that does not exist.
pub const FOREIGN_KEY_VIOLATION: &str = "23503";
/// A statement was cancelled: it took too long.
pub const QUERY_CANCELED: &str = "57014";
/// Something else depends on it.
pub const DEPENDENT_OBJECTS: &str = "2BP01";
/// A lock did not come in time.
pub const LOCK_NOT_AVAILABLE: &str = "55P03";
/// No table of that name.
pub const UNDEFINED_TABLE: &str = "42P01";
/// No column of that name.
pub const UNDEFINED_COLUMN: &str = "42703";
/// No object of that name: of a slot or a publication.
pub const UNDEFINED_OBJECT: &str = "42704";
/// No schema of that name.
pub const INVALID_SCHEMA_NAME: &str = "3F000";
/// Bytes that are not text in the encoding.
pub const INVALID_ENCODING: &str = "22021";
/// A character that the other encoding does not have.
pub const UNTRANSLATABLE_CHARACTER: &str = "22P05";
/// A right is lacking.
pub const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// No connection, or no walsender, is free.
pub const TOO_MANY_CONNECTIONS: &str = "53300";
/// The server failed inside.
pub const INTERNAL_ERROR: &str = "XX000";

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
    /// The server's own hint.
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
        let (kind, mut hint) = classify(&self.code);
        if self.code == "28000" && self.message.ends_with(NO_LOGIN) {
            hint = Some("ALTER ROLE ... LOGIN, or use another role in the URL");
        }
        let message = match quotes_value(&self.code) {
            true => without_quoted(&self.message),
            false => self.message.clone(),
        };
        let mut what = format!("{message} (SQLSTATE {})", self.code);
        if let Some(detail) = &self.detail
            && !carries_row_data(&self.code)
        {
            what = format!("{what}: {detail}");
        }
        let error = Error::new(kind, what).coded(Code::Sqlstate(self.code.clone()));
        match (hint, &self.hint) {
            (Some(ours), Some(server)) => error.hint(format!("{ours}; the server says: {server}")),
            (Some(ours), None) => error.hint(ours),
            (None, Some(server)) => error.hint(server.clone()),
            (None, None) => error,
        }
    }
}

/// The error of an ordinary SQL connection, by the same table.
pub fn postgres_error(error: tokio_postgres::Error) -> Error {
    match failure(error) {
        Failure::Known(error) => error,
        Failure::Io(cause) => io_error("talking to Postgres", cause),
        // A parameter or a column of another type than we ask for.
        Failure::Other(text, cause) => Error::internal(text).caused_by(cause),
    }
}

/// What tokio-postgres lets see of a failure.
enum Failure {
    /// What the server says, or an end of the connection.
    Known(Error),
    /// An I/O error, ours among them; the codec reports malformed messages as such.
    Io(io::Error),
    /// Its own text, and the cause.
    Other(String, Box<dyn std::error::Error + Send + Sync>),
}

fn failure(error: tokio_postgres::Error) -> Failure {
    if let Some(db) = error.as_db_error() {
        return Failure::Known(server_error(db).to_error());
    }
    if error.is_closed() {
        return Failure::Known(Error::unreachable("the connection to Postgres is closed"));
    }
    let text = error.to_string();
    match error.into_source().map(|cause| cause.downcast::<io::Error>()) {
        None => Failure::Known(Error::protocol(format!("Postgres: {text}"))),
        Some(Ok(cause)) => Failure::Io(*cause),
        Some(Err(cause)) => Failure::Other(text, cause),
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

/// Whether even the first line quotes the value: it has the wrong form for its type, is out of the
/// type's range, or no date.
fn quotes_value(code: &str) -> bool {
    matches!(code, "22P02" | "22P03" | "22001" | "22003" | "22007" | "22008" | "22018")
}

/// The text with `"***"` instead of all from the first quotation mark to the last.
fn without_quoted(text: &str) -> String {
    match (text.find('"'), text.rfind('"')) {
        (Some(first), Some(last)) if first < last => {
            format!("{}\"***\"{}", &text[..first], &text[last + 1..])
        }
        _ => text.to_owned(),
    }
}

/// Classes 22 and 23 quote values of rows; those never go to a log. But "invalid parameter value"
/// is about a command, and its detail is the reason, such as "not supported for unlogged tables".
fn carries_row_data(code: &str) -> bool {
    code != "22023" && (code.starts_with("22") || code.starts_with("23"))
}

/// What Postgres says of a role that may not log in; it is recognised in English only.
const NO_LOGIN: &str = "is not permitted to log in";

/// What poolers say for many reasons.
const POOLER: &str = "if this is a connection pooler such as PgBouncer: source.mode = \"wal\" and \
    `init` need the Postgres server itself; for source.mode = \"poll\" the pooler must be \
    configured with the database and the user, and source.url must not contain options that the \
    pooler does not recognise";

const READ_ONLY: &str = "this server is a standby, or read-only: point the URL at the primary, or \
    wait until it is promoted or writable";

/// The table: what the caller does about an SQLSTATE, and our hint. The last line of a class is
/// for all of its codes that are not named.
pub fn classify(code: &str) -> (Kind, Option<&'static str>) {
    let class = code.get(..2).unwrap_or_default();
    let (kind, hint) = match (class, code) {
        (_, "08P01") => (Kind::Refused, POOLER),
        ("08", _) => (Kind::Unreachable, "connection lost; Watership reconnects"),
        ("0A", _) => (
            Kind::Refused,
            "this server is too old, or lacks a feature that the configuration needs",
        ),
        (_, "25006") => (Kind::Unreachable, READ_ONLY),
        (_, "25P03" | "25P04" | "57P05") => {
            (Kind::Unreachable, "a server timeout ended the session; Watership reconnects")
        }
        (_, "28P01") => (Kind::Refused, "check user and password in the URL"),
        ("28", _) => {
            (Kind::Refused, "check user and password in the URL, and the server's pg_hba.conf")
        }
        (_, "3D000") => (Kind::Refused, "check the database name in the URL"),
        (_, INVALID_SCHEMA_NAME | UNDEFINED_TABLE | UNDEFINED_COLUMN | "42883") => {
            (Kind::Refused, "run `watership init` to install the schema in this database")
        }
        ("40", _) | (_, "55P03") => (Kind::Busy, "another session holds a lock; Watership retries"),
        (_, OBJECT_IN_USE) => {
            (Kind::Busy, "another relay is using the slot; this relay is on standby")
        }
        (_, INSUFFICIENT_PRIVILEGE) => {
            (Kind::Refused, "grant the missing privilege; `watership check` lists what is missing")
        }
        // Of a slot or publication that is needed, what asked for it makes a named verdict.
        (_, UNDEFINED_OBJECT) => (
            Kind::Refused,
            "what the error names does not exist; `watership check` shows which one",
        ),
        (_, "53400") => (Kind::Refused, "raise max_replication_slots, or drop unused slots"),
        (_, TOO_MANY_CONNECTIONS) => (
            Kind::Unreachable,
            "if this lasts, raise max_connections, max_wal_senders, or the CONNECTION LIMIT of the \
                 role or the database",
        ),
        (_, "53100") => (Kind::Unreachable, "free disk space on the server"),
        ("53", _) => {
            (Kind::Unreachable, "the server has run out of a resource; see the Postgres log")
        }
        (_, OBJECT_NOT_IN_PREREQUISITE_STATE) => (
            Kind::Refused,
            "an object is not in the required state; `watership check` shows which one",
        ),
        (_, "57014") => {
            (Kind::Unreachable, "cancelled by a timeout or an operator; Watership retries")
        }
        (_, "57P01" | "57P02" | "57P03") => (
            Kind::Unreachable,
            "the server is shutting down or starting up, or ended the session; Watership retries",
        ),
        (_, "57P04") => (Kind::Refused, "the database was dropped; check the URL"),
        (_, "58P01") => (
            Kind::Refused,
            "a server file is missing, perhaps WAL; see the Postgres log and `watership check`",
        ),
        ("58", _) => (Kind::Unreachable, "the server's storage failed; see the Postgres log"),
        ("XX", _) => (Kind::Protocol, "internal server error; see the Postgres log"),
        ("54", _) => (Kind::Refused, "a server limit was reached; see the Postgres log"),
        ("22" | "23", _) => (Kind::Refused, "the server rejected a value; see the Postgres log"),
        ("42", _) => (Kind::Refused, "the schema may not match this version; run `watership init`"),
        _ => return (Kind::Refused, None),
    };
    (kind, Some(hint))
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
            (Kind::Refused, &["42704", "55000"]),
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
        assert!(error("22023").to_error().to_string().contains("Key (mail)"), "a parameter");
        assert!(error("55000").to_error().to_string().contains("Key (mail)"));
        let error = ServerError {
            code: "22P02".into(),
            message: "invalid input syntax for type integer: \"a \"b\" c\"".into(),
            ..Default::default()
        };
        let told = "invalid input syntax for type integer: \"***\" (SQLSTATE 22P02)";
        assert_eq!(error.to_error().to_string(), told);
    }

    #[test]
    fn a_role_that_may_not_log_in_is_told_from_a_wrong_password() {
        let error = |message: &str| {
            let (code, message) = ("28000".into(), message.into());
            ServerError { code, message, ..Default::default() }.to_error()
        };
        let hint = error("role \"relay\" is not permitted to log in");
        assert!(hint.hint_text().unwrap().contains("ALTER ROLE"));
        let other = error("no pg_hba.conf entry for host \"::1\"");
        assert!(other.hint_text().unwrap().contains("pg_hba.conf"));
    }

    #[test]
    fn both_hints_are_kept() {
        let error =
            ServerError { code: "28P01".into(), hint: Some("try".into()), ..Default::default() };
        let error = error.to_error();
        let hint = error.hint_text().unwrap();
        assert!(hint.contains("password") && hint.ends_with("try"), "{hint}");
    }
}
