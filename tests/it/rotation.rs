//! Credentials and certificates that change while a relay runs: it continues by itself,
//! however the files look in between.

use std::path::{Path, PathBuf};

use watership::dev::{Postgres, PostgresOptions, StopMode};

use crate::pg_wire::certify;
use crate::support::inbox::kinds;
use crate::support::servers::{Database, own_database, own_vhost, rabbit};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::Patience;

fn directory(name: &str) -> PathBuf {
    let path = watership::dev::home().expect("a temporary directory").join(name);
    std::fs::create_dir(&path).expect("a new directory");
    path
}

/// A server that asks the role `relay` for what `hba` says, with the database `shop`.
async fn server(hba: &str) -> (Postgres, Database) {
    let hba = vec![format!("{hba}"), "host all postgres 127.0.0.1/32 trust".into()];
    let options = PostgresOptions { hba: Some(hba), ..Default::default() };
    let server = Postgres::start(options).await.expect("a private server");
    server.create_database("shop").await.expect("a database");
    server
        .execute("CREATE ROLE relay LOGIN REPLICATION PASSWORD 'canary-one'")
        .await
        .expect("a role");
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    (server, database)
}

async fn end_sessions(stage: &Stage) {
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
                 WHERE usename = 'relay'";
    assert_ne!(stage.text(ended).await, "0", "the relay was connected");
}

/// Waits until it is not ready and says so with this text.
async fn says(relay: &Running, text: &str) {
    let mut patience = Patience::new();
    loop {
        let (ready, status) = (relay.get("/readyz").await.0, relay.status().await);
        let error = status["last_error"]["error"].as_str().unwrap_or_default().to_owned();
        if ready != 200 && error.contains(text) {
            return;
        }
        patience.more((), || format!("{text:?}, not {status}")).await;
    }
}

/// Emits an event, which arrives as the last one.
async fn passes(stage: &Stage, relay: &mut Running, kind: &str) {
    relay.ready().await;
    stage.execute(&format!("SELECT watership.emit('order', '1', '{kind}', '{{}}')")).await;
    assert_eq!(kinds(&stage.settled().await).last(), Some(&kind));
}

#[tokio::test]
async fn a_password_of_postgres_that_changes_in_its_file_is_used() {
    let (server, database) = server("host all relay 127.0.0.1/32 scram-sha-256").await;
    let file = directory("rotation-pg").join("pw");
    std::fs::write(&file, "canary-one\n").unwrap();
    let url = server.url(&format!("relay:${{file:{}}}", file.display()), "shop");
    let setup = Setup { source_url: &url, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let mut relay = stage.start().await;
    stage.execute("ALTER ROLE relay PASSWORD 'canary-two'").await;
    end_sessions(&stage).await;
    says(&relay, "password authentication failed").await;
    // By now it waits for long, and the file ends the wait.
    let mut patience = Patience::new();
    while relay.status().await["circuit"]["next_try_ms"].as_u64() < Some(2000) {
        patience.more((), || "the wait grows".into()).await;
    }
    std::fs::write(&file, "canary-two\n").unwrap();
    passes(&stage, &mut relay, "first").await;
    // In the other order nothing is ever refused.
    std::fs::write(&file, "canary-three").unwrap();
    stage.execute("ALTER ROLE relay PASSWORD 'canary-three'").await;
    end_sessions(&stage).await;
    passes(&stage, &mut relay, "second").await;
    // The file is away for a moment.
    std::fs::remove_file(&file).unwrap();
    end_sessions(&stage).await;
    says(&relay, "pw of ${file:…} cannot be read").await;
    std::fs::write(&file, "canary-three").unwrap();
    passes(&stage, &mut relay, "third").await;
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&["a file with credentials or certificates has changed"]);
    assert!(!ended.log.contains("canary-"), "{}", ended.log);
}

#[tokio::test]
async fn a_password_of_the_broker_that_changes_in_its_file_is_used() {
    let node = rabbit().await;
    let vhost = own_vhost().await;
    node.ctl(&["add_user", "rotated", "canary-one"]).await.unwrap();
    let path = format!("/api/permissions/{}/rotated", vhost.name);
    let all = r#"{"configure":".*","write":".*","read":".*"}"#;
    node.management("PUT", &path, all).await.unwrap();
    let file = directory("rotation-mq").join("pw");
    std::fs::write(&file, "canary-one").unwrap();
    let stage = Stage::on(own_database().await, vhost, Setup::default()).await;
    let login = format!("amqp://rotated:${{file:{}}}@", file.display());
    let mut relay = stage.spawn_other(|text| text.replace("amqp://guest:guest@", &login));
    passes(&stage, &mut relay, "first").await;
    node.ctl(&["change_password", "rotated", "canary-two"]).await.unwrap();
    close_connections_of("rotated").await;
    says(&relay, "ACCESS_REFUSED").await;
    std::fs::write(&file, "canary-two\n").unwrap();
    passes(&stage, &mut relay, "second").await;
    let ended = relay.stop().await;
    ended.expect_code(0);
    assert!(!ended.log.contains("canary-"), "{}", ended.log);
}

async fn close_connections_of(user: &str) {
    let node = rabbit().await;
    let list = node.ctl(&["list_connections", "-q", "pid", "user"]).await.expect("a list");
    let pids: Vec<&str> = list
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .filter(|(_, name)| name.trim() == user)
        .map(|(pid, _)| pid)
        .collect();
    assert!(!pids.is_empty(), "{list}");
    for pid in pids {
        // The topology connection may be gone already.
        let _ = node.ctl(&["close_connection", pid, "rotation"]).await;
    }
}

#[tokio::test]
async fn a_certificate_half_rotated_at_a_reconnect_does_not_end_the_relay() {
    let trusting = "hostssl all relay 127.0.0.1/32 trust clientcert=verify-ca";
    let (mut server, database) = server(trusting).await;
    let [ca, _, certificate, key] = certify(&server, &rcgen::PKCS_ECDSA_P256_SHA256);
    server.append("postgresql.conf", "ssl = on\nssl_ca_file = 'ca.crt'\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with TLS");
    let files = directory("rotation-tls");
    let copy = |from: &Path, name: &str| std::fs::copy(from, files.join(name)).map(drop).unwrap();
    copy(&ca, "ca");
    copy(&certificate, "crt");
    copy(&key, "key");
    let url = format!(
        "postgres://relay@127.0.0.1:{}/shop?sslmode=verify-ca&sslrootcert={at}/ca\
         &sslcert={at}/crt&sslkey={at}/key",
        server.port(),
        at = files.display()
    );
    let setup = Setup { source_url: &url, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let mut relay = stage.start().await;

    // The new certificate is there, its key is not yet.
    let [_, _, certificate, key] = certify(&server, &rcgen::PKCS_ECDSA_P256_SHA256);
    copy(&certificate, "crt");
    end_sessions(&stage).await;
    says(&relay, "does not match its key").await;
    // All of the new authority: server, roots and key.
    copy(&key, "key");
    copy(&ca, "ca");
    stage.execute("SELECT pg_reload_conf()").await;
    passes(&stage, &mut relay, "first").await;

    // Half of a file.
    let whole = std::fs::read_to_string(files.join("crt")).unwrap();
    std::fs::write(files.join("crt"), &whole[..whole.len() / 2]).unwrap();
    end_sessions(&stage).await;
    says(&relay, "crt").await;
    std::fs::write(files.join("crt"), whole).unwrap();
    passes(&stage, &mut relay, "second").await;

    // No file.
    std::fs::remove_file(files.join("ca")).unwrap();
    end_sessions(&stage).await;
    says(&relay, "/ca cannot be read").await;
    copy(&ca, "ca");
    passes(&stage, &mut relay, "third").await;

    // The server begins to ask for a password.
    let hba = server.data_dir().join("pg_hba.conf");
    let before = std::fs::read_to_string(&hba).unwrap();
    std::fs::write(&hba, before.replace("trust clientcert=verify-ca", "scram-sha-256")).unwrap();
    stage.execute("SELECT pg_reload_conf()").await;
    end_sessions(&stage).await;
    says(&relay, "asks for the password").await;
    std::fs::write(&hba, before).unwrap();
    stage.execute("SELECT pg_reload_conf()").await;
    passes(&stage, &mut relay, "fourth").await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_wrong_file_still_ends_the_very_first_start() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.spawn_other(|text| {
        format!("source.password = \"${{file:/no/such/file}}\"\n{text}")
            .replace("postgres://postgres@", "postgres://relay@")
    });
    let ended = relay.ended().await;
    ended.expect_code(2).expect_text(&["file /no/such/file of ${file:…} cannot be read"]);
}
