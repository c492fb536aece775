//! Handshakes in memory with every kind of certificate that people make.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConnection, ServerConfig, ServerConnection};

use super::*;
use crate::fault::classify_tls;

/// Self-signed, X.509 version 1, CN=localhost, as `openssl x509 -req -signkey` makes it.
const VERSION_1: &str = "\
-----BEGIN CERTIFICATE-----
MIIBETCBuAIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwIBcN
MjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxvY2Fs
aG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKYiyCUrsva/xOBABg5/Q040
b1bsnP/gSv98KLunYEQikA2ceBLokFKvleeIK6OW+Tu0+QCA+86GhJ8G764khKcw
CgYIKoZIzj0EAwIDSAAwRQIhAN82WKtkGjsVp9Y02JYOYLhPJ0Q1s7iWhbmlbr5s
dDhdAiB+bOE1qm0SjmC+DFKqKVFKsDE2TQ6ireSPLzoz8fixsg==
-----END CERTIFICATE-----
";
const VERSION_1_KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgFVbHyZBMUu/e3S4J
G/A0JWO8bWZHtjVNO41a+9blTCehRANCAASmIsglK7L2v8TgQAYOf0NONG9W7Jz/
4Er/fCi7p2BEIpANnHgS6JBSr5XniCujlvk7tPkAgPvOhoSfBu+uJISn
-----END PRIVATE KEY-----
";

/// A server's certificate and its key.
struct Made {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

fn version_1() -> Made {
    Made {
        certificate: CertificateDer::from_pem_slice(VERSION_1.as_bytes()).unwrap(),
        key: PrivateKeyDer::from_pem_slice(VERSION_1_KEY.as_bytes()).unwrap(),
    }
}

fn private(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(key.serialize_der().into())
}

/// Self-signed and a CA, as `openssl req -new -x509` makes it.
fn self_signed(names: &[&str]) -> Made {
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Made { certificate: params.self_signed(&key).unwrap().into(), key: private(&key) }
}

/// Signed by a CA, whose certificate comes first.
fn signed(names: &[&str]) -> (CertificateDer<'static>, Made) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = params.self_signed(&key).unwrap().into();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let params = CertificateParams::new(names).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap().into();
    (root, Made { certificate, key: private(&key) })
}

#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// A handshake in memory with a server that has this certificate and this key, which need not
/// belong together.
fn handshake(
    mode: SslMode,
    root: &CertificateDer<'_>,
    certificate: &CertificateDer<'static>,
    key: &PrivateKeyDer<'static>,
    version: &'static rustls::SupportedProtocolVersion,
) -> Result<(), rustls::Error> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let file = std::env::temp_dir().join(format!("watership-tls-{}-{number}", std::process::id()));
    let base64 = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, root);
    let pem = format!("-----BEGIN CERTIFICATE-----\n{base64}\n-----END CERTIFICATE-----\n");
    std::fs::write(&file, pem).unwrap();
    let options = Options { mode, root_cert: Some(file.clone()), ..Options::default() };
    let client = client_config(&options).unwrap();
    std::fs::remove_file(file).unwrap();

    let provider = Arc::new(ring::default_provider());
    let signing = provider.key_provider.load_private_key(key.clone_key()).unwrap();
    let certified = CertifiedKey::new(vec![certificate.clone()], signing);
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Always(Arc::new(certified))));
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let mut client = ClientConnection::new(client, server_name("localhost").unwrap()).unwrap();
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &*bytes;
        while !rest.is_empty() {
            server.read_tls(&mut rest).unwrap();
            server.process_new_packets()?;
        }
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut rest = &*bytes;
        while !rest.is_empty() {
            client.read_tls(&mut rest).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}

/// By both versions of TLS, which must agree; the hint of the refusal.
fn connect(mode: SslMode, root: &CertificateDer<'_>, made: &Made) -> Result<(), &'static str> {
    let [old, new] = [&rustls::version::TLS12, &rustls::version::TLS13].map(|version| {
        let done = handshake(mode, root, &made.certificate, &made.key, version);
        done.map_err(|error| {
            let (kind, hint) = classify_tls(&error);
            assert_eq!(kind, Kind::Refused, "{error}");
            hint.unwrap()
        })
    });
    assert_eq!(old, new);
    new
}

#[test]
fn require_takes_any_certificate_whose_key_the_server_has() {
    let other = self_signed(&["other"]);
    for made in [version_1(), self_signed(&["localhost"]), signed(&[]).1] {
        assert_eq!(connect(SslMode::Require, &other.certificate, &made), Ok(()));
        let stolen = Made { certificate: made.certificate, key: other.key.clone_key() };
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let root = &other.certificate;
            let done = handshake(SslMode::Require, root, &stolen.certificate, &stolen.key, version);
            let refused = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
            assert_eq!(done, Err(refused), "{version:?}");
        }
    }
}

#[test]
fn a_self_signed_certificate_is_good_where_it_is_the_root_itself() {
    let (made, other) = (self_signed(&["localhost"]), self_signed(&["localhost"]));
    for mode in [SslMode::VerifyCa, SslMode::VerifyFull] {
        assert_eq!(connect(mode, &made.certificate, &made), Ok(()));
        let hint = connect(mode, &other.certificate, &made).unwrap_err();
        assert!(hint.contains("basicConstraints=CA:FALSE"), "{hint}");
    }
    let elsewhere = self_signed(&["elsewhere"]);
    assert_eq!(connect(SslMode::VerifyCa, &elsewhere.certificate, &elsewhere), Ok(()));
    let hint = connect(SslMode::VerifyFull, &elsewhere.certificate, &elsewhere).unwrap_err();
    assert!(hint.contains("use a host name listed in the certificate"), "{hint}");
    let old = version_1();
    assert_eq!(connect(SslMode::VerifyCa, &old.certificate, &old), Ok(()));
    // It has no name that could be compared.
    let hint = connect(SslMode::VerifyFull, &old.certificate, &old).unwrap_err();
    assert!(hint.contains("X.509 v1"), "{hint}");
}

#[test]
fn what_is_wrong_with_a_certificate_is_named_with_the_option_that_fixes_it() {
    let hint = connect(SslMode::VerifyCa, &self_signed(&[]).certificate, &version_1());
    assert!(hint.unwrap_err().contains("X.509 v1"), "{hint:?}");
    let (root, nameless) = signed(&[]);
    assert_eq!(connect(SslMode::VerifyCa, &root, &nameless), Ok(()));
    let hint = connect(SslMode::VerifyFull, &root, &nameless).unwrap_err();
    assert!(hint.contains("-addext subjectAltName=DNS:"), "{hint}");
    let (root, named) = signed(&["localhost"]);
    assert_eq!(connect(SslMode::VerifyFull, &root, &named), Ok(()));
}

#[test]
fn a_named_certificate_is_good_in_its_own_time_only() {
    let made = version_1();
    let chain = |name| {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(made.certificate.clone()).unwrap();
        let webpki = WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build();
        Chain { webpki: webpki.unwrap(), named: vec![made.certificate.clone()], name }
    };
    let at = |secs| {
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(secs));
        let name = server_name("localhost").unwrap();
        chain(false).verify_named(&made.certificate, &name, now).map(drop)
    };
    // Valid from 2020 to 2120.
    assert_eq!(at(1_500_000_000), Err(CertificateError::NotValidYet.into()));
    assert_eq!(at(1_600_000_000), Ok(()));
    assert_eq!(at(4_800_000_000), Err(CertificateError::Expired.into()));
}

#[test]
fn a_file_that_cannot_be_opened_for_want_of_descriptors_is_not_a_wrong_file() {
    for (code, kind) in [(24, Kind::Unreachable), (23, Kind::Unreachable), (2, Kind::Config)] {
        let error = std::io::Error::from_raw_os_error(code);
        assert_eq!(file_error("x", error).kind(), kind, "{code}");
    }
}
