//! What a failed socket means: one table for I/O errors, one for TLS. Both peers use it.
//!
//! Together with `pg/sqlstate` (what Postgres answers) and `amqp/reply` (what RabbitMQ answers)
//! these tables give a failure its kind, and the kind decides whether it is retried
//! (`Error::retry`). `tests/snapshots` shows all of them. Where a caller knows better, it changes
//! the kind by the code: `amqp/handshake` at login and for the lock queue, `amqp/topology` for a
//! queue that another connection owns.

use std::io;

use crate::error::{Error, Kind};

/// An I/O error with its kind and what to do about it.
///
/// Where it carries an error of our own, that one comes back as it was.
pub fn io_error(what: &str, error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(error) => {
            let (kind, hint) = classify(&error);
            with_hint(Error::new(kind, what).caused_by(error), hint)
        }
    }
}

/// The largest file with a password or a certificate, in bytes.
#[cfg(any(feature = "inbox", feature = "relay"))]
const FILE_MAX: u64 = 1 << 20;

/// Reads a file that the configuration names. Only a regular one: a pipe or a device may never end,
/// and everything would wait for it.
///
/// # Errors
/// The system's; and for a file that is not a regular one, or larger than 1 MiB.
#[cfg(any(feature = "inbox", feature = "relay"))]
pub fn read_file(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let found = std::fs::metadata(path)?;
    if !found.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if found.len() > FILE_MAX {
        let text = format!("it has {} bytes, at most {FILE_MAX} are allowed", found.len());
        return Err(io::Error::other(text));
    }
    std::fs::read(path)
}

/// An error of reading a file that the configuration names. That this process has no file
/// descriptor left says nothing about the file.
#[cfg(any(feature = "inbox", feature = "relay"))]
pub fn file_error(what: &str, error: io::Error) -> Error {
    if is_out_of_files(&error) || error.kind() == io::ErrorKind::Interrupted {
        return io_error(what, error);
    }
    Error::config(what).caused_by(error).hint("create the file and make it readable by this user")
}

/// The kernel's "too many open files", for which the standard library has no kind.
fn is_out_of_files(error: &io::Error) -> bool {
    const EMFILE: i32 = 24;
    const ENFILE: i32 = 23;
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE))
}

/// Whether the TLS library failed, and not the socket below it.
#[cfg(any(feature = "inbox", feature = "relay"))]
pub fn is_tls(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>())
}

/// The kind of an I/O error and our hint; a TLS error inside it decides.
pub fn classify(error: &io::Error) -> (Kind, Option<&'static str>) {
    #[cfg(any(feature = "inbox", feature = "relay"))]
    {
        if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            return classify_tls(tls);
        }
    }
    if is_out_of_files(error) {
        let hint = "out of file descriptors; raise the limit on open files (ulimit -n)";
        return (Kind::Unreachable, Some(hint));
    }
    classify_io(error.kind())
}

/// The table of I/O errors.
pub fn classify_io(kind: io::ErrorKind) -> (Kind, Option<&'static str>) {
    use io::ErrorKind as E;
    match kind {
        E::ConnectionRefused => (
            Kind::Unreachable,
            Some("nothing is listening there: is the server up, is the port right?"),
        ),
        E::ConnectionReset
        | E::ConnectionAborted
        | E::BrokenPipe
        | E::NotConnected
        | E::UnexpectedEof
        | E::WriteZero => (
            Kind::Unreachable,
            Some(
                "connection lost; if it keeps happening, check the server log and the network path",
            ),
        ),
        E::TimedOut | E::WouldBlock => (
            Kind::Unreachable,
            Some(
                "no answer in time: is the server overloaded, or does a firewall drop the packets?",
            ),
        ),
        E::HostUnreachable | E::NetworkUnreachable | E::NetworkDown => {
            (Kind::Unreachable, Some("no route to that address; check routing and firewall"))
        }
        E::AddrNotAvailable | E::AddrInUse => {
            (Kind::Unreachable, Some("no local port or address is free on this machine"))
        }
        E::NotFound => {
            (Kind::Unreachable, Some("no such socket: is the server up, is the directory right?"))
        }
        E::PermissionDenied => (
            Kind::Refused,
            Some("permission denied; check the socket file's permissions and the firewall"),
        ),
        // The parsers of the protocol crates report malformed messages as these.
        E::InvalidInput | E::InvalidData => (
            Kind::Protocol,
            Some("is this the right server and port? a proxy may be corrupting the stream"),
        ),
        _ => (Kind::Unreachable, None),
    }
}

#[cfg(any(feature = "inbox", feature = "relay"))]
const BAD_SIGNATURE: &str = "name the CA that signed the server's certificate: sslrootcert in \
    source.url, or broker.tls_ca; or give the server a key that is supported: RSA with 2048 to \
    8192 bits, ECDSA P-256 or P-384, Ed25519";

/// The table of TLS errors: a bad certificate stays bad until a person replaces it.
#[cfg(any(feature = "inbox", feature = "relay"))]
pub fn classify_tls(error: &rustls::Error) -> (Kind, Option<&'static str>) {
    use rustls::CertificateError as C;
    use rustls::Error as T;
    match error {
        T::InvalidCertificate(C::UnknownIssuer) => (
            Kind::Refused,
            Some(
                "name the CA that signed the server's certificate: sslrootcert in source.url, or \
                 broker.tls_ca",
            ),
        ),
        T::InvalidCertificate(C::BadSignature) => (Kind::Refused, Some(BAD_SIGNATURE)),
        T::InvalidCertificate(C::NotValidForNameContext { presented, .. })
            if presented.is_empty() =>
        {
            (
                Kind::Refused,
                Some(
                    "the server's certificate has no subjectAltName, and its CN is ignored; make \
                     it with -addext subjectAltName=DNS:… (for Postgres, sslmode=verify-ca skips \
                     the name check)",
                ),
            )
        }
        T::InvalidCertificate(C::NotValidForName | C::NotValidForNameContext { .. }) => (
            Kind::Refused,
            Some(
                "use a host name listed in the certificate (for Postgres, sslmode=verify-ca skips \
                 the name check)",
            ),
        ),
        T::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => {
            (Kind::Refused, Some("the server's certificate has expired; renew it"))
        }
        T::InvalidCertificate(C::NotValidYet | C::NotValidYetContext { .. }) => {
            (Kind::Refused, Some("the certificate is not valid yet: are the clocks right?"))
        }
        T::InvalidCertificate(C::Revoked) => {
            (Kind::Refused, Some("the server's certificate is revoked; replace it"))
        }
        T::InvalidCertificate(_) | T::NoCertificatesPresented => {
            (Kind::Refused, Some(unfit_certificate(error)))
        }
        T::AlertReceived(alert) => (Kind::Refused, Some(refused_by_alert(*alert))),
        T::PeerIncompatible(_) => (
            Kind::Refused,
            Some("the server offers no TLS 1.2 or 1.3 with a cipher that Watership supports"),
        ),
        T::InvalidMessage(_) => (Kind::Unreachable, Some("is TLS enabled on this port?")),
        // Corrupted or cut records and the like: a new connection may help.
        _ => (Kind::Unreachable, None),
    }
}

/// OpenSSL sends the first of these alerts, and Erlang the second, when they share no algorithm
/// with us: most often we offer no signature scheme for the server's key. With TLS 1.2 some servers
/// also send the first when a client certificate is missing.
#[cfg(any(feature = "inbox", feature = "relay"))]
fn refused_by_alert(alert: rustls::AlertDescription) -> &'static str {
    use rustls::AlertDescription as A;
    match alert {
        A::HandshakeFailure | A::InsufficientSecurity => {
            "the server's key must be RSA with 2048 to 8192 bits, ECDSA P-256 or P-384, or Ed25519 \
             (P-521 is not supported); if it is one of these, check the client certificate and \
             key, and the server log"
        }
        _ => "the server refused TLS; check the client certificate and key, and the server log",
    }
}

/// What webpki says about a certificate, where rustls has no error of its own for it.
#[cfg(any(feature = "inbox", feature = "relay"))]
pub fn webpki_error(error: &rustls::Error) -> Option<&webpki::Error> {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            other.0.downcast_ref()
        }
        _ => None,
    }
}

/// How to make a certificate that a server can have, where `openssl` without options made another.
#[cfg(any(feature = "inbox", feature = "relay"))]
fn unfit_certificate(error: &rustls::Error) -> &'static str {
    match webpki_error(error) {
        Some(webpki::Error::CaUsedAsEndEntity) => {
            "the server presents a CA certificate (CA:TRUE); make it with -addext \
             basicConstraints=CA:FALSE -addext subjectAltName=DNS:…, or set this very certificate \
             as the root: sslrootcert in source.url, or broker.tls_ca"
        }
        Some(webpki::Error::UnsupportedCertVersion) => {
            "the server's certificate is X.509 v1, which is what `openssl x509 -req` makes without \
             an extension file; make it with -addext basicConstraints=CA:FALSE -addext \
             subjectAltName=DNS:… (`openssl x509` takes them in a file, -extfile)"
        }
        _ => "check the server's certificate",
    }
}

/// The error with the hint of a table.
pub fn with_hint(error: Error, hint: Option<&'static str>) -> Error {
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_error_survives_the_trip_through_io() {
        let ours = Error::refused("md5").hint("do this");
        let back = io_error("x", io::Error::other(ours));
        assert_eq!((back.kind(), back.hint_text()), (Kind::Refused, Some("do this")));
    }

    #[test]
    fn a_bad_certificate_is_refused_and_a_corrupt_record_is_not() {
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let error = io_error("TLS", io::Error::new(io::ErrorKind::InvalidData, unknown));
        assert_eq!(error.kind(), Kind::Refused);
        assert!(error.hint_text().unwrap().contains("sslrootcert"));
        let corrupt = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError);
        assert_eq!(io_error("TLS", corrupt).kind(), Kind::Unreachable);
    }
}
