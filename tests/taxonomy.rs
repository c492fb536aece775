//! What becomes of every failure, as text: `tests/snapshots/*.txt` holds the tables of kinds,
//! retries and hints, so that a change of any of them is seen in review. And what every series of
//! the metrics means: `docs/metrics.md`.
//!
//! `WATERSHIP_UPDATE_SNAPSHOTS=1 cargo test --test taxonomy` writes them again.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;

use watership::amqp::reply;
use watership::error::{Error, Kind, Retry};
use watership::fault;
use watership::pg::sqlstate::{self, ServerError};

/// Compares `text` with the file in `tests/snapshots`.
fn snapshot(name: &str, text: &str) {
    same_as_file(&format!("tests/snapshots/{name}"), text);
}

/// Compares `text` with the file, or writes the file when asked to.
fn same_as_file(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("WATERSHIP_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, text).expect("the snapshot is written");
        return;
    }
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<String> = text
        .lines()
        .filter(|line| !before.lines().any(|old| old == *line))
        .map(|line| format!("+ {line}"))
        .chain(
            before
                .lines()
                .filter(|line| !text.lines().any(|new| new == *line))
                .map(|line| format!("- {line}")),
        )
        .collect();
    assert_eq!(
        before,
        text,
        "{name} differs; WATERSHIP_UPDATE_SNAPSHOTS=1 accepts it:\n{}",
        changed.join("\n")
    );
}

fn word(retry: Retry) -> &'static str {
    match retry {
        Retry::Soon => "soon",
        Retry::Slowly => "slowly",
        Retry::Never => "never",
    }
}

fn line(out: &mut String, name: &str, error: &Error) {
    let (label, retry) = (error.label(), word(error.retry()));
    let _ = writeln!(out, "{name:<34} {label:<12} {retry:<7} {}", error.hint_or_kind());
}

#[test]
fn every_kind_has_one_decision_and_a_text() {
    let mut out = String::new();
    for kind in Kind::ALL {
        line(&mut out, kind.label(), &Error::new(kind, "x"));
    }
    snapshot("kinds.txt", &out);
}

/// The codes that a walsender and ordinary SQL can answer with, class by class, and for each class
/// one that no line names. <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const SQLSTATES: &str = "\
    01000 02000 03000 08000 08001 08003 08004 08006 08007 08P01 08999 09000 0A000 0B000 \
    0F000 0L000 0P000 0Z000 20000 21000 22000 22001 22003 22021 22P02 22P05 22999 23000 23502 \
    23505 23514 24000 25000 25001 25006 25P01 25P02 25P03 25P04 26000 27000 28000 28P01 \
    28999 2B000 2D000 2F000 34000 38000 39000 3B000 3D000 3F000 40000 40001 40002 40003 \
    40P01 42000 42501 42601 42703 42704 42710 42883 42P01 42P07 42999 44000 53000 53100 \
    53200 53300 53400 53999 54000 54001 55000 55006 55P02 55P03 55P04 55999 57000 57014 \
    57P01 57P02 57P03 57P04 57P05 57999 58000 58030 58P01 58P02 58999 72000 F0000 F0001 \
    HV000 P0000 P0001 XX000 XX001 XX002 ZZ999";

#[test]
fn every_sqlstate_has_a_kind_and_a_hint() {
    let mut out = String::new();
    for code in SQLSTATES.split_whitespace() {
        let error = ServerError { code: code.into(), ..Default::default() };
        line(&mut out, code, &error.to_error());
    }
    snapshot("sqlstate.txt", &out);
    // Whatever a server or a proxy makes up has an answer too.
    for odd in ["", "é", "日本", "5", "57", "57P0", "57P011"] {
        let _ = sqlstate::classify(odd);
    }
}

#[test]
fn every_reply_code_has_a_kind_and_a_hint() {
    let mut out = String::new();
    for code in [
        200, 311, 312, 313, 320, 402, 403, 404, 405, 406, 501, 502, 503, 504, 505, 506, 530, 540,
        541, 999,
    ] {
        let (name, ..) = reply::classify(code);
        let error = reply::error("broker closed the connection", code, "TEXT");
        line(&mut out, &format!("{code} {name}"), &error);
    }
    snapshot("amqp.txt", &out);
    let error = reply::error("x", 320, "CONNECTION_FORCED - broker forced connection closure");
    assert_eq!(error.to_string(), "x: 320 CONNECTION_FORCED - broker forced connection closure");
    assert_eq!(reply::error("x", 530, "vhost").to_string(), "x: 530 not-allowed, vhost");
}

#[test]
fn every_socket_error_has_a_kind_and_a_hint() {
    use io::ErrorKind as E;
    let mut out = String::new();
    for kind in [
        E::ConnectionRefused,
        E::ConnectionReset,
        E::ConnectionAborted,
        E::BrokenPipe,
        E::NotConnected,
        E::UnexpectedEof,
        E::WriteZero,
        E::TimedOut,
        E::WouldBlock,
        E::HostUnreachable,
        E::NetworkUnreachable,
        E::NetworkDown,
        E::AddrNotAvailable,
        E::AddrInUse,
        E::NotFound,
        E::PermissionDenied,
        E::InvalidInput,
        E::InvalidData,
        E::Interrupted,
        E::OutOfMemory,
        E::Other,
    ] {
        line(&mut out, &format!("{kind:?}"), &fault::io_error("x", kind.into()));
    }
    let files = io::Error::from_raw_os_error(24);
    line(&mut out, "too many open files", &fault::io_error("x", files));
    snapshot("io.txt", &out);
}

#[test]
fn every_tls_error_has_a_kind_and_a_hint() {
    use rustls::CertificateError as C;
    use rustls::{AlertDescription, Error as T, InvalidMessage, PeerIncompatible};
    let mut out = String::new();
    let unfit = |error| T::InvalidCertificate(C::Other(rustls::OtherError(Arc::new(error))));
    let expected = "localhost".try_into().expect("a name");
    let nameless = C::NotValidForNameContext { expected, presented: Vec::new() };
    for (name, error) in [
        ("unknown issuer", T::InvalidCertificate(C::UnknownIssuer)),
        ("bad signature", T::InvalidCertificate(C::BadSignature)),
        ("wrong name", T::InvalidCertificate(C::NotValidForName)),
        ("no name", T::InvalidCertificate(nameless)),
        ("certificate of a CA", unfit(webpki::Error::CaUsedAsEndEntity)),
        ("X.509 version 1", unfit(webpki::Error::UnsupportedCertVersion)),
        ("expired", T::InvalidCertificate(C::Expired)),
        ("not valid yet", T::InvalidCertificate(C::NotValidYet)),
        ("revoked", T::InvalidCertificate(C::Revoked)),
        ("wrong purpose", T::InvalidCertificate(C::InvalidPurpose)),
        ("no certificate", T::NoCertificatesPresented),
        ("alert: certificate required", T::AlertReceived(AlertDescription::CertificateRequired)),
        ("alert: handshake failure", T::AlertReceived(AlertDescription::HandshakeFailure)),
        ("alert: insufficient security", T::AlertReceived(AlertDescription::InsufficientSecurity)),
        ("incompatible", T::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon)),
        ("no TLS message", T::InvalidMessage(InvalidMessage::InvalidContentType)),
        ("corrupt record", T::DecryptError),
        ("oversized record", T::PeerSentOversizedRecord),
    ] {
        let error = io::Error::new(io::ErrorKind::InvalidData, error);
        line(&mut out, name, &fault::io_error("x", error));
    }
    snapshot("tls.txt", &out);
}

#[test]
fn every_series_is_documented_with_the_words_of_its_help() {
    let mut out = String::from(
        "# Metrics\n\n\
         `/metrics` is in the text format of Prometheus; [which of them to alert \
         on](operating.md#alerts). Every series exists from the start. Names that end in `_total` \
         are counters, `_to_confirm_seconds` and `_to_publish_seconds` are histograms, the others \
         are gauges. The words are those of `# HELP`.\n\n\
         | name | labels | meaning |\n|---|---|---|\n",
    );
    for (name, labels, meaning) in watership::metrics::HELP {
        let labels: Vec<String> =
            labels.split(", ").filter(|l| !l.is_empty()).map(|l| format!("`{l}`")).collect();
        let _ = writeln!(out, "| `{name}` | {} | {meaning} |", labels.join(", "));
    }
    same_as_file("docs/metrics.md", &out);
}
