//! TLS for both ends: one place builds the rustls configuration.
//!
//! `verify-full` is what a URL that asks for TLS gets. The weaker levels exist because Postgres
//! has them; they have to be asked for by name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use webpki::RawPublicKeyEntity;
use x509_cert::Certificate;
use x509_cert::der::{Decode as _, Encode as _};

use crate::error::{Error, Kind, Result};
use crate::fault::{self, file_error, read_file};

/// How much of the server's certificate is checked; the names are those of libpq's `sslmode`.
///
/// <https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION>
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SslMode {
    /// No TLS.
    #[default]
    Disable,
    /// Encrypt, check nothing: a man in the middle goes unnoticed.
    Require,
    /// The chain must end in a trusted root; the host name is not compared.
    VerifyCa,
    /// Chain and host name.
    VerifyFull,
}

/// Everything that TLS needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// How much is checked.
    pub mode: SslMode,
    /// PEM file with the trusted roots; the system's roots when absent.
    pub root_cert: Option<PathBuf>,
    /// PEM file with the client's certificate chain.
    pub client_cert: Option<PathBuf>,
    /// PEM file with the client's private key.
    pub client_key: Option<PathBuf>,
}

impl Options {
    /// Relative paths begin at `directory`.
    pub fn begin_at(&mut self, directory: &Path) {
        let files = [&mut self.root_cert, &mut self.client_cert, &mut self.client_key];
        files.into_iter().flatten().for_each(|path| *path = directory.join(&*path));
    }

    /// The files that it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        [&self.root_cert, &self.client_cert, &self.client_key].into_iter().flatten().map(|p| &**p)
    }
}

/// Builds the client configuration. Reads the files each time, so that a rotated certificate is
/// used from the next connect on.
///
/// # Errors
/// [`crate::error::Kind::Config`] naming the file that cannot be read or holds no certificate.
///
/// # Panics
/// When called with [`SslMode::Disable`].
pub fn client_config(options: &Options) -> Result<Arc<ClientConfig>> {
    assert!(options.mode != SslMode::Disable, "no TLS configuration without TLS");
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| Error::internal("setting the TLS versions").caused_by(e))?;
    let verifier = Verifier::new(options, provider)?;
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    let config = match (&options.client_cert, &options.client_key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            builder.with_client_auth_cert(certificates(cert)?, private_key(key)?).map_err(|e| {
                Error::config(format!(
                    "client certificate {} does not match its key",
                    cert.display()
                ))
                .hint("write both files of the new pair; each connect reads them")
                .caused_by(e)
            })?
        }
        (Some(_), None) | (None, Some(_)) => {
            return Err(Error::config(
                "a client certificate and its key belong together, but only one is set",
            )
            .hint("set both or neither"));
        }
    };
    Ok(Arc::new(config))
}

/// The name to verify for `host`: a DNS name or an address.
///
/// # Errors
/// [`crate::error::Kind::Config`] when it is neither.
pub fn server_name(host: &str) -> Result<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).map_err(|e| {
        Error::config(format!("host {host:?} is neither a DNS name nor an IP address")).caused_by(e)
    })
}

/// The trusted roots, and the certificates of their file as they stand there.
fn roots(file: Option<&Path>) -> Result<(RootCertStore, Vec<CertificateDer<'static>>)> {
    let mut store = RootCertStore::empty();
    let (list, named) = match file {
        Some(path) => certificates(path).map(|list| (list.clone(), list))?,
        None => (native_certificates()?, Vec::new()),
    };
    let (added, _) = store.add_parsable_certificates(list);
    if added == 0 {
        let from =
            file.map_or("the system's certificate store".to_owned(), |p| p.display().to_string());
        return Err(Error::config(format!("no trusted root certificate found in {from}"))
            .hint("name a PEM file with the CA certificate (sslrootcert, or broker.tls_ca)"));
    }
    Ok((store, named))
}

/// What the system trusts. Some of its files may be broken; one that cannot be opened because this
/// process has no file descriptor left is another matter.
fn native_certificates() -> Result<Vec<CertificateDer<'static>>> {
    let found = rustls_native_certs::load_native_certs();
    for error in found.errors {
        if let rustls_native_certs::ErrorKind::Io { inner, path } = error.kind {
            let error = file_error(&format!("{} cannot be read", path.display()), inner);
            if error.kind() != Kind::Config {
                return Err(error);
            }
        }
    }
    Ok(found.certs)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let what = || format!("certificate file {} cannot be read", path.display());
    let content = read_file(path).map_err(|e| file_error(&what(), e))?;
    let found = CertificateDer::pem_slice_iter(&content).collect::<Result<_, _>>();
    found.map_err(|e| pem_error(what(), e))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>> {
    let what = || format!("private key file {} cannot be read", path.display());
    let content = read_file(path).map_err(|e| file_error(&what(), e))?;
    PrivateKeyDer::from_pem_slice(&content).map_err(|e| pem_error(what(), e))
}

fn pem_error(what: String, error: pem::Error) -> Error {
    Error::config(what).caused_by(error)
}

/// Checks as much of a certificate as the level asks for. That the server has the certificate's key
/// is always checked.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// None for `require`.
    chain: Option<Chain>,
}

/// What `verify-ca` and `verify-full` check.
#[derive(Debug)]
struct Chain {
    webpki: Arc<WebPkiServerVerifier>,
    /// The certificates of the file of roots.
    named: Vec<CertificateDer<'static>>,
    /// Whether the name is compared.
    name: bool,
}

impl Verifier {
    fn new(options: &Options, provider: Arc<CryptoProvider>) -> Result<Self> {
        let name = match options.mode {
            SslMode::Disable | SslMode::Require => return Ok(Self { provider, chain: None }),
            SslMode::VerifyCa => false,
            SslMode::VerifyFull => true,
        };
        let (roots, named) = roots(options.root_cert.as_deref())?;
        let webpki = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone())
            .build()
            .map_err(|e| Error::internal("using the trusted roots").caused_by(e))?;
        Ok(Self { provider, chain: Some(Chain { webpki, named, name }) })
    }
}

impl Chain {
    /// A certificate that stands in the file of roots itself, as a self-signed one does. By webpki
    /// it cannot be a server's if it is also a CA, as `openssl req -x509` makes it, or is of X.509
    /// version 1; but who named it trusts it.
    fn verify_named(
        &self,
        certificate: &CertificateDer<'_>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let validity = parsed(certificate)?.tbs_certificate.validity;
        if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
            return Err(CertificateError::NotValidYet.into());
        }
        if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
            return Err(CertificateError::Expired.into());
        }
        if self.name {
            verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }
}

fn parsed(certificate: &CertificateDer<'_>) -> Result<Certificate, rustls::Error> {
    Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        let webpki = &chain.webpki;
        // webpki checks the chain before the name, so a name error means that the chain is good.
        match webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !chain.name => Ok(ServerCertVerified::assertion()),
            Err(error) if is_unfit(&error) && chain.named.iter().any(|root| root == end_entity) => {
                chain.verify_named(end_entity, server_name, now)
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // The key alone, because webpki reads no certificate of X.509 version 1.
        let key = public_key(cert)?;
        let key = RawPublicKeyEntity::try_from(&key).map_err(|_| CertificateError::BadEncoding)?;
        let algorithms = self.provider.signature_verification_algorithms.mapping;
        // Here the scheme does not fix the curve: one of its algorithms fits the key.
        let fitting = algorithms.iter().filter(|(scheme, _)| *scheme == dss.scheme);
        if fitting
            .flat_map(|(_, list)| list.iter())
            .any(|a| key.verify_signature(*a, message, dss.signature()).is_ok())
        {
            return Ok(HandshakeSignatureValid::assertion());
        }
        Err(CertificateError::BadSignature.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &public_key(cert)?, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The certificate's key, also of one that webpki cannot read.
fn public_key(
    cert: &CertificateDer<'_>,
) -> Result<SubjectPublicKeyInfoDer<'static>, rustls::Error> {
    let key = parsed(cert)?.tbs_certificate.subject_public_key_info.to_der();
    key.map(SubjectPublicKeyInfoDer::from).map_err(|_| CertificateError::BadEncoding.into())
}

/// Whether webpki accepts no such certificate from a server, whatever its issuer.
fn is_unfit(error: &rustls::Error) -> bool {
    use webpki::Error as E;
    matches!(fault::webpki_error(error), Some(E::CaUsedAsEndEntity | E::UnsupportedCertVersion))
}

#[cfg(test)]
mod tests;
