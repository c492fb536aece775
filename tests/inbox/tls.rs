//! TLS to both servers, by the URL alone.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use watership::dev::{Rabbit, RabbitOptions};

use crate::stage::{Stage, record, run};
use crate::support::servers::{database_of, private_postgres};
use crate::support::waiting::until;

/// A root, and a certificate for `localhost` with its key.
fn certificates(directory: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let path = |name: &str| directory.join(name);
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("a root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // With the name of its certificates it would be taken for one of them.
    params.distinguished_name.push(rcgen::DnType::CommonName, "root");
    std::fs::write(path("ca.pem"), params.self_signed(&key).expect("a root").pem())
        .expect("a file");
    let root = Issuer::new(params, key);
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a certificate");
    let signed = params.signed_by(&key, &root).expect("a certificate");
    std::fs::write(path("server.crt"), signed.pem()).expect("a file");
    std::fs::write(path("server.key"), key.serialize_pem()).expect("a file");
    (path("ca.pem"), path("server.crt"), path("server.key"))
}

#[tokio::test]
async fn a_consumer_works_over_tls_that_both_servers_require() {
    let directory = watership::dev::home().expect("a directory").join("inbox-tls");
    std::fs::create_dir(&directory).expect("a directory");
    let (root, certificate, key) = certificates(&directory);
    let hba = ["local all all trust", "host all postgres all trust", "hostssl all all all trust"];
    let hba = Some(hba.map(str::to_owned).to_vec());
    let mut server = private_postgres(&[], hba).await;
    for (from, to) in [(&certificate, "server.crt"), (&key, "server.key")] {
        let to = server.data_dir().join(to);
        std::fs::copy(from, &to).expect("copied");
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).expect("private");
        server.give(&to).expect("the server's own");
    }
    server.append("postgresql.conf", "ssl = on\n").expect("conf");
    server.stop(watership::dev::StopMode::Fast).await.expect("it stops");
    server.start_again().await.expect("it starts");

    let port = watership::dev::free_port().expect("a port");
    let conf = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\n\
         ssl_options.certfile = {}\nssl_options.keyfile = {}\nssl_options.verify = verify_peer\n\
         ssl_options.fail_if_no_peer_cert = true",
        root.display(),
        certificate.display(),
        key.display(),
    );
    let node = Rabbit::start(RabbitOptions { conf: vec![conf], ..Default::default() });
    let node = node.await.expect("a node");
    until("the TLS port is open", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;

    let stage = Stage::on(database_of(&server), &node.url("/")).await;
    let postgres = stage.postgres.replacen("127.0.0.1", "localhost", 1);
    let inbox = watership::inbox::Inbox::new(&stage.consumer)
        .queue(&stage.queue)
        .postgres(format!("{postgres}?sslmode=verify-full&sslrootcert={}", root.display()))
        .amqp(format!("amqps://guest:guest@localhost:{port}/%2f"))
        .amqp_ca(&root)
        .amqp_client_cert(&certificate, &key)
        .ordered(true);
    let running = run(inbox, |message, tx| Box::pin(record(message, tx)));
    stage.publish_many(5, 2).await;
    stage.effects_come(5).await;
    let encrypted = "SELECT bool_and(s.ssl) FROM pg_stat_ssl AS s JOIN pg_stat_activity AS a \
                     USING (pid) WHERE a.application_name LIKE 'watership inbox%'";
    assert_eq!(stage.text(encrypted).await, "true");
    running.stop().await;
}
