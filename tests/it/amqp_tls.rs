//! TLS to the broker: what is checked, and that both connections check the same.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use watership::amqp::options::{Options, Url};
use watership::amqp::publisher::Connection;
use watership::amqp::topology::{self, Topology};
use watership::dev::{Rabbit, RabbitOptions};
use watership::error::{Kind, Result};
use watership::publisher::Publisher;
use watership::tls::{self, SslMode};

use crate::support::waiting::until;

type Authority = Issuer<'static, KeyPair>;

fn authority(directory: &Path, name: &str) -> (Authority, PathBuf) {
    let key = KeyPair::generate().expect("test certificates");
    let mut params = CertificateParams::new(Vec::new()).expect("test certificates");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let path = directory.join(format!("{name}.pem"));
    std::fs::write(&path, params.self_signed(&key).expect("test certificates").pem())
        .expect("test certificates");
    (Issuer::new(params, key), path)
}

/// Certificate and key for `name`, as two files.
fn certificate(directory: &Path, authority: &Authority, name: &str) -> (PathBuf, PathBuf) {
    let key = KeyPair::generate().expect("test certificates");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("test certificates");
    let paths = (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
    std::fs::write(&paths.0, params.signed_by(&key, authority).expect("test certificates").pem())
        .expect("test certificates");
    std::fs::write(&paths.1, key.serialize_pem()).expect("test certificates");
    paths
}

fn options(port: u16, host: &str, tls: tls::Options) -> Options {
    let url = Url::parse(&format!("amqps://guest:guest@{host}:{port}/%2f")).expect("a good URL");
    let connect_timeout = std::time::Duration::from_secs(60);
    Options { tls, connect_timeout, ..Options::new(vec![url]) }
}

/// Opens and closes both kinds of connection; both must come to the same result.
async fn connect(port: u16, host: &str, tls: tls::Options) -> Result<()> {
    let options = options(port, host, tls);
    let lapin = topology::apply(&options, &Topology::default()).await;
    let own = Connection::open(&options).await;
    let kinds = (lapin.as_ref().err().map(|e| e.kind()), own.as_ref().err().map(|e| e.kind()));
    assert_eq!(kinds.0, kinds.1, "{lapin:?} {:?}", own.err());
    own?.close().await;
    lapin
}

#[tokio::test]
async fn certificates_of_both_sides_are_checked_as_the_level_says() {
    let directory = watership::dev::home().unwrap().join("amqp-tls");
    std::fs::create_dir(&directory).unwrap();
    let (ours, root_cert) = authority(&directory, "ours");
    let (_, other_root) = authority(&directory, "theirs");
    let (server_cert, server_key) = certificate(&directory, &ours, "localhost");
    let (client_cert, client_key) = certificate(&directory, &ours, "relay");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let conf = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\n\
         ssl_options.certfile = {}\nssl_options.keyfile = {}\n\
         ssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true",
        root_cert.display(),
        server_cert.display(),
        server_key.display(),
    );
    let node = RabbitOptions { conf: vec![conf], ..Default::default() };
    let _node = Rabbit::start(node).await.unwrap();
    // This listener may start after the plain one, which the start waits for.
    until("the TLS port is open", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;

    let good = tls::Options {
        mode: SslMode::Disable,
        root_cert: Some(root_cert),
        client_cert: Some(client_cert),
        client_key: Some(client_key),
    };
    // amqps without a level verifies in full.
    connect(port, "localhost", good.clone()).await.unwrap();
    let wrong_host = connect(port, "127.0.0.1", good.clone()).await.unwrap_err();
    assert_eq!(wrong_host.kind(), Kind::Refused, "{wrong_host:?}");
    let verify_ca = tls::Options { mode: SslMode::VerifyCa, ..good.clone() };
    connect(port, "127.0.0.1", verify_ca.clone()).await.unwrap();
    let other_ca = tls::Options { root_cert: Some(other_root), ..verify_ca };
    let unknown = connect(port, "localhost", other_ca.clone()).await.unwrap_err();
    assert_eq!(unknown.kind(), Kind::Refused, "{unknown:?}");
    let require = tls::Options { mode: SslMode::Require, ..other_ca };
    connect(port, "127.0.0.1", require).await.unwrap();
    let no_client = tls::Options { client_cert: None, client_key: None, ..good };
    // The alert comes after the client's side of the handshake, and a reset right behind it: lapin
    // may see only the reset, ours reads what was said.
    let options = options(port, "localhost", no_client);
    assert!(topology::apply(&options, &Topology::default()).await.is_err());
    let refused = Connection::open(&options).await.err().unwrap();
    assert_eq!(refused.kind(), Kind::Refused, "{refused:?}");
}
