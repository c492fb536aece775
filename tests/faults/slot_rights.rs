//! Group B: what the relay's role may do, and its password.

use std::time::Duration;

use tokio::time::Instant;
use watership::dev::{Postgres, PostgresOptions};

use crate::report::Class;
use crate::support::scene::{Scene, led};
use crate::support::servers::{execute, own_vhost, text};
use crate::support::writers::STEADY;

/// A server that wants a password from the role `relay`, and a run of that role.
async fn flowing(title: &str) -> (Postgres, String, Scene) {
    let line = |user: &str, method: &str| format!("host all {user} 127.0.0.1/32 {method}");
    let hba = vec![line("postgres", "trust"), line("relay", "scram-sha-256")];
    let conf = vec!["password_encryption = 'scram-sha-256'".to_owned()];
    let options = PostgresOptions { conf, hba: Some(hba), ..Default::default() };
    let server = Postgres::start(options).await.expect("a private server");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    execute(&url, "CREATE ROLE relay LOGIN REPLICATION PASSWORD 'canary-one'").await;
    let relay = server.url("relay:canary-one", "shop");
    let vhost = own_vhost().await;
    let mut scene = led(title, (&url, &relay), (&vhost.url, &vhost.url), "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    (server, url, scene)
}

async fn end_sessions(url: &str) {
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
        WHERE usename = 'relay'";
    assert_ne!(text(url, sql).await, "0");
}

async fn back(class: Class, mut scene: Scene) {
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn slot_b11_replication_revoked_while_it_streams() {
    let Some(class) = Class::long("B11", "slot_b11_replication_revoked_while_it_streams") else {
        return;
    };
    let (_server, url, mut scene) = flowing("B11").await;
    scene.fault("NOREPLICATION");
    execute(&url, "ALTER ROLE relay NOREPLICATION").await;
    scene.flowing(500).await;
    assert_eq!(scene.relay().status().await["sessions"], 1, "a running stream continues");
    end_sessions(&url).await;
    scene.relay().logs(&["session ended", "REPLICATION"]).await;
    let up = |status: &serde_json::Value| status["last_error"]["error"].is_string();
    scene.relay().reaches("it says why", up).await;
    scene.relay().stays(Duration::from_secs(2), |status| status["sessions"].is_u64()).await;
    execute(&url, "ALTER ROLE relay REPLICATION").await;
    back(class, scene).await;
}

#[tokio::test]
async fn slot_b13_password_changed() {
    let Some(class) = Class::long("B13", "slot_b13_password_changed") else { return };
    let (_server, url, mut scene) = flowing("B13").await;
    scene.fault("password changed");
    execute(&url, "ALTER ROLE relay PASSWORD 'canary-two'").await;
    end_sessions(&url).await;
    scene.relay().logs(&["session ended", "password authentication failed"]).await;
    scene.relay().stays(Duration::from_secs(2), |status| status["sessions"].is_u64()).await;
    assert!(!scene.relay().log_text().contains("canary-one"), "no password in the log");
    execute(&url, "ALTER ROLE relay PASSWORD 'canary-one'").await;
    back(class, scene).await;
}
