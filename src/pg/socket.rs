//! The byte stream to a Postgres server: TCP or unix socket, plain or TLS.
//!
//! The one place that opens a connection, for ordinary SQL and for replication alike, so that
//! both verify the same certificate in the same way. Invariant: after the server's one-byte
//! answer to the SSLRequest nothing is read outside TLS, and an answer other than `S` never falls
//! back to plain text.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use sha2::{Digest, Sha256, Sha384, Sha512};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::der::oid::db::rfc5912 as oid;

use super::connect::{Host, Options};
use crate::error::{Error, Result};
use crate::fault::io_error;
use crate::tls::{self, SslMode};

/// What to do when something else answers.
pub(super) const NOT_POSTGRES: &str =
    "this is not a Postgres port: check host and port in the URL, such as source.url";
/// The same, when it closes without an answer.
pub(super) const NO_WORD: &str = "see the server's log; if it has nothing, this is not a Postgres \
    port: check host and port in the URL, such as source.url";
/// The kernel probes an idle connection after this long, then as often, at most three times.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// Addresses of one host name that are tried.
const ADDRESSES_MAX: usize = 8;

/// A byte stream to the server.
pub enum Socket {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP; boxed because the session state is large.
    Tls(Box<TlsStream<TcpStream>>),
    /// Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// Opens the stream and, where asked for, TLS. The caller limits the time.
    ///
    /// # Errors
    /// [`crate::error::Kind::Unreachable`] when the server does not answer,
    /// [`crate::error::Kind::Refused`] when it has no TLS or its certificate does not pass,
    /// [`crate::error::Kind::Config`] when a certificate file is wrong.
    pub async fn open(options: &Options) -> Result<Self> {
        let name = match &options.host {
            Host::Unix(dir) => {
                let path = dir.join(format!(".s.PGSQL.{}", options.port));
                let stream = UnixStream::connect(&path).await;
                return stream
                    .map(Socket::Unix)
                    .map_err(|e| io_error(&path.display().to_string(), e));
            }
            Host::Tcp(name) => name,
        };
        let tcp = open_tcp(name, options).await?;
        match options.tls.mode {
            SslMode::Disable => Ok(Socket::Tcp(tcp)),
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                open_tls(tcp, name, &options.tls).await
            }
        }
    }

    /// The `tls-server-end-point` channel binding: the hash of the server's certificate. None
    /// without TLS, and where the certificate's signature names no hash (Ed25519, RSA-PSS).
    ///
    /// <https://www.rfc-editor.org/rfc/rfc5929#section-4.1>
    pub fn channel_binding(&self) -> Option<Vec<u8>> {
        let Socket::Tls(stream) = self else { return None };
        end_point_hash(stream.get_ref().1.peer_certificates()?.first()?)
    }
}

async fn open_tcp(name: &str, options: &Options) -> Result<TcpStream> {
    let resolved = lookup_host((name, options.port)).await;
    let resolved = resolved
        .map_err(|e| Error::unreachable(format!("host {name:?} cannot be resolved")).caused_by(e))?
        .take(ADDRESSES_MAX)
        .collect::<Vec<_>>();
    // An address that swallows packets must leave time for the others.
    let share = options.connect_timeout / u32::try_from(resolved.len()).unwrap_or(1).max(1);
    let mut last = Error::unreachable(format!("host {name:?} has no address"));
    for address in resolved {
        let connected = timeout(share, TcpStream::connect(address)).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => {
                configure(&stream, options)
                    .map_err(|e| Error::unreachable("setting socket options").caused_by(e))?;
                return Ok(stream);
            }
            Err(e) => last = io_error(&address.to_string(), e),
        }
    }
    Err(last)
}

/// A client that only reads cannot detect a half-open connection: the kernel has to.
fn configure(stream: &TcpStream, options: &Options) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if options.keepalives {
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_INTERVAL)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES);
        socket.set_tcp_keepalive(&keepalive)?;
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(options.tcp_user_timeout))?;
    Ok(())
}

/// SSLRequest, the server's one byte, then the handshake.
///
/// <https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL>
async fn open_tls(mut tcp: TcpStream, name: &str, options: &tls::Options) -> Result<Socket> {
    // The files come first: a wrong path is reported as such, even while the server is down.
    let config = tls::client_config(options)?;
    let name = tls::server_name(name)?;
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    let asked = |e| io_error("asking the server for TLS", e);
    tcp.write_all(&request).await.map_err(asked)?;
    // One byte exactly: what came after it in plain text would be an injection.
    let mut answer = [0];
    tcp.read_exact(&mut answer).await.map_err(asked)?;
    match answer[0] {
        b'S' => {}
        b'N' => {
            return Err(Error::refused("the server does not support TLS")
                .hint("set ssl=on on the server, or use sslmode=disable"));
        }
        other => {
            return Err(Error::protocol(format!(
                "the answer to an SSLRequest is {other:#04x}; expected 'S' or 'N'"
            ))
            .hint(NOT_POSTGRES));
        }
    }
    let stream = TlsConnector::from(config).connect(name, tcp).await;
    stream
        .map(|stream| Socket::Tls(Box::new(stream)))
        .map_err(|e| io_error("TLS handshake with the server", e))
}

/// MD5 and SHA-1 are replaced by SHA-256, other hashes are used as they are.
fn end_point_hash(der: &[u8]) -> Option<Vec<u8>> {
    let certificate = Certificate::from_der(der).ok()?;
    match signature_hash(certificate.signature_algorithm.oid)? {
        Hash::Sha256 => Some(Sha256::digest(der).to_vec()),
        Hash::Sha384 => Some(Sha384::digest(der).to_vec()),
        Hash::Sha512 => Some(Sha512::digest(der).to_vec()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// ecdsa-with-SHA1 (RFC 3279), which the table of names lacks.
const ECDSA_WITH_SHA_1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");

fn signature_hash(algorithm: ObjectIdentifier) -> Option<Hash> {
    match algorithm {
        oid::MD_5_WITH_RSA_ENCRYPTION
        | oid::SHA_1_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_1
        | oid::SHA_256_WITH_RSA_ENCRYPTION
        | oid::ECDSA_WITH_SHA_256 => Some(Hash::Sha256),
        oid::SHA_384_WITH_RSA_ENCRYPTION | oid::ECDSA_WITH_SHA_384 => Some(Hash::Sha384),
        oid::SHA_512_WITH_RSA_ENCRYPTION | oid::ECDSA_WITH_SHA_512 => Some(Hash::Sha512),
        _ => None,
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair};

    fn certificate(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let params = CertificateParams::new(vec!["db.example".into()]).unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_certificate_is_hashed_by_its_own_signature_algorithm() {
        let der = certificate(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(end_point_hash(&der), Some(Sha256::digest(&der).to_vec()));
        let der = certificate(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(end_point_hash(&der), Some(Sha384::digest(&der).to_vec()));
        assert_eq!(signature_hash(oid::SHA_1_WITH_RSA_ENCRYPTION), Some(Hash::Sha256));
        assert_eq!(signature_hash(oid::SHA_512_WITH_RSA_ENCRYPTION), Some(Hash::Sha512));
    }

    #[test]
    fn ed25519_and_garbage_have_no_channel_binding() {
        assert_eq!(end_point_hash(&certificate(&rcgen::PKCS_ED25519)), None);
        assert_eq!(end_point_hash(b"garbage"), None);
    }
}
