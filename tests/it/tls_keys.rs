//! The error says when a server's key is of an unsupported kind, for Postgres and RabbitMQ alike.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use watership::amqp::options::{Options, Url};
use watership::amqp::publisher::Connection;
use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, StopMode};
use watership::error::{Error, Kind};
use watership::pg::connect;
use watership::pg::replication::ReplicationConnection;
use watership::secret::Secret;
use watership::tls::{self, SslMode};

use crate::support::waiting::until;

/// ECDSA on P-521, self-signed, for localhost, as `openssl req -x509 -newkey ec -pkeyopt
/// ec_paramgen_curve:secp521r1` makes it.
const CERTIFICATE: &str = "\
-----BEGIN CERTIFICATE-----
MIICFzCCAXigAwIBAgIUOchJMxnVaPZRal7PoBvP1pYUXvswCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyOTE2MzYyMloYDzIxMjYxMTA1
MTYzNjIyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwgZswEAYHKoZIzj0CAQYFK4EE
ACMDgYYABAHImwX0z2jVNE2jgI+vl7sBViDmRmM32X3wP82PaNavcsSUYD7ddos0
yWzrhcsrF357cIX8cJS5+HqbDr48W8m9dwD5Ya9etcEL/9UZrqcOzRh1r0ZcJnR6
7YgB9BmxJgXGaEtCV6nu1TR2354DqnqsMzkmc4u5VDRi4b4RsUX8y2oJmaNjMGEw
HQYDVR0OBBYEFG5c2fUAgQqCaefPlOThgQHoLUrwMB8GA1UdIwQYMBaAFG5c2fUA
gQqCaefPlOThgQHoLUrwMAkGA1UdEwQCMAAwFAYDVR0RBA0wC4IJbG9jYWxob3N0
MAoGCCqGSM49BAMCA4GMADCBiAJCAch2lMI8vwxezqtM4J6VI7PV0Sup+GY+Zr5Q
yPFX1mPEhYTUpMA08rL30/V6416sreGgBHvtFEKxog2Rd3YA/wm1AkIA9QUXJamt
m+kX/IhAvF5PVQorN2Ysr3zOrairDtG20hvjLISFCB0lkpfS7iL3Zxg6zAGIeJaQ
GUhXpRVAUeSzM+s=
-----END CERTIFICATE-----
";
const KEY: &str = "\
-----BEGIN PRIVATE KEY-----
MIHuAgEAMBAGByqGSM49AgEGBSuBBAAjBIHWMIHTAgEBBEIAzLELc29CNbQhr46b
F9pvQuncs1luaDpKWqLqMg457Wvx30pTXAf///6uW76k0/SJf7qwMNBGbYLHsqPN
hJlDdTWhgYkDgYYABAHImwX0z2jVNE2jgI+vl7sBViDmRmM32X3wP82PaNavcsSU
YD7ddos0yWzrhcsrF357cIX8cJS5+HqbDr48W8m9dwD5Ya9etcEL/9UZrqcOzRh1
r0ZcJnR67YgB9BmxJgXGaEtCV6nu1TR2354DqnqsMzkmc4u5VDRi4b4RsUX8y2oJ
mQ==
-----END PRIVATE KEY-----
";

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("mode");
}

fn assert_names_the_key(error: &Error) {
    assert_eq!(error.kind(), Kind::Refused, "{error:?}");
    let hint = error.hint_text().expect("a hint");
    assert!(hint.contains("P-521 is not supported"), "{error:?}");
}

#[tokio::test]
async fn a_key_of_postgres_on_p_521_is_named_as_not_supported() {
    let mut server = Postgres::start(PostgresOptions::default()).await.expect("a server");
    for (name, text) in [("server.crt", CERTIFICATE), ("server.key", KEY)] {
        let path = server.data_dir().join(name);
        write(&path, text);
        server.give(&path).expect("owner");
    }
    server.append("postgresql.conf", "ssl = on\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with TLS");
    let url = format!("{}?sslmode=require", server.url("postgres", "postgres"));
    let options = connect::Options::parse(&Secret::new(url)).expect("a good URL");
    let connected = ReplicationConnection::connect(&options).await.map(drop);
    let error = connected.expect_err("no signature fits");
    assert_names_the_key(&error);
}

#[tokio::test]
async fn a_key_of_the_broker_on_p_521_is_named_as_not_supported() {
    let directory = watership::dev::home().expect("a directory").join("p521");
    std::fs::create_dir(&directory).expect("made");
    let (certificate, key) = (directory.join("server.crt"), directory.join("server.key"));
    write(&certificate, CERTIFICATE);
    write(&key, KEY);
    let port = watership::dev::free_port().expect("a free port");
    let conf = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\n\
         ssl_options.certfile = {}\nssl_options.keyfile = {}",
        certificate.display(),
        certificate.display(),
        key.display(),
    );
    let node = RabbitOptions { conf: vec![conf], ..Default::default() };
    let _node = Rabbit::start(node).await.expect("a node");
    until("the TLS port is open", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    let url = Url::parse(&format!("amqps://guest:guest@localhost:{port}/%2f")).expect("a good URL");
    let tls = tls::Options {
        mode: SslMode::VerifyFull,
        root_cert: Some(certificate),
        ..Default::default()
    };
    let connect_timeout = std::time::Duration::from_secs(60);
    let options = Options { tls, connect_timeout, ..Options::new(vec![url]) };
    let connected = Connection::open(&options).await.map(drop);
    assert_names_the_key(&connected.expect_err("no signature fits"));
}
