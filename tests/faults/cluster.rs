//! Group A: other servers behind the same address: a standby that was promoted, an old copy.

use std::path::Path;
use std::process::Command;

use watership::dev::{Postgres, StopMode};

use crate::pg::EMIT_ONE;
use crate::report::Class;
use crate::support::framing::Protocol;
use crate::support::inbox::kinds;
use crate::support::proxy::{How, Proxy};
use crate::support::scene::led;
use crate::support::servers::{Database, client, execute, own_postgres, own_vhost, text};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

fn run(program: &str, arguments: &[&Path]) {
    let done = Command::new(program).args(arguments).status().expect("the program runs");
    assert!(done.success(), "{program} {arguments:?}");
}

/// Puts a copy of the stopped `from` in the place of what the stopped `to` holds.
fn copy(from: &Postgres, to: &Postgres) {
    let conf = |name: &str| std::fs::read(to.data_dir().join(name)).expect("a file of ours");
    let kept = ["postgresql.conf", "pg_hba.conf"].map(|name| (name, conf(name)));
    run("rm", &[Path::new("-r"), &to.data_dir()]);
    run("cp", &[Path::new("-a"), &from.data_dir(), &to.data_dir()]);
    for (name, content) in kept {
        std::fs::write(to.data_dir().join(name), content).expect("a file of ours");
    }
}

#[tokio::test]
async fn pg_a08_failover_to_a_standby_without_the_slot() {
    let class = Class::new("A8", "pg_a08_failover_to_a_standby_without_the_slot");
    let (mut primary, mut standby) = (own_postgres(&[]).await, own_postgres(&[]).await);
    let url = primary.url("postgres", "shop");
    let proxy = Proxy::before(primary.port(), Protocol::Postgres).await;
    let vhost = own_vhost().await;
    primary.stop(StopMode::Fast).await.expect("stops");
    standby.stop(StopMode::Fast).await.expect("stops");
    copy(&primary, &standby);
    let follow =
        format!("primary_conninfo = 'host=127.0.0.1 port={} user=postgres'\n", primary.port());
    standby.append("postgresql.conf", &follow).expect("conf");
    let signal = standby.data_dir().join("standby.signal");
    std::fs::write(&signal, "").expect("a file of ours");
    primary.start_again().await.expect("starts");
    standby.start_again().await.expect("starts as a standby");
    let through = proxy.url(&url);
    let mut scene = led("A8", (&url, &through), (&vhost.url, &vhost.url), "").await;
    scene.consume();
    scene.relay().start();
    execute(&url, EMIT_ONE).await;
    scene.delivered(1).await;
    let end = text(&url, "SELECT pg_current_wal_lsn()").await;
    let behind = standby.url("postgres", "shop");
    let follows = format!("pg_last_wal_replay_lsn() >= '{end}'");
    until("the standby follows", async || text(&behind, &follows).await == "true").await;
    scene.fault("failover");
    primary.kill().await;
    execute(&behind, "SELECT pg_promote()").await;
    execute(&behind, &EMIT_ONE.replace("\"n\":1", "\"n\":2")).await;
    let confirmed = scene.relay().confirmed().await;
    proxy.redirect(standby.port());
    proxy.cut(How::Reset);
    // It publishes nothing that it cannot place, and says what someone must decide.
    assert_eq!(scene.relay().ended().await, 3, "{}", scene.relay().log());
    let log = scene.relay().log_text();
    assert!(log.contains("hint: ") && log.contains("timeline"), "{log}");
    assert_eq!((confirmed, scene.arrived()), (1, 1));
    class.held(2);
}

#[tokio::test]
async fn pg_a10_an_old_copy_of_the_data() {
    let class = Class::new("A10", "pg_a10_an_old_copy_of_the_data");
    let mut server = own_postgres(&[]).await;
    let mut old = own_postgres(&[]).await;
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let emit = |kind: &str| format!("SELECT watership.emit('t', '1', '{kind}', '1')");
    let mut stage = Stage::on(database, own_vhost().await, Setup::default()).await;
    let relay = stage.start().await;
    stage.execute(&emit("before")).await;
    stage.settled().await;
    server.stop(StopMode::Fast).await.expect("stops");
    old.stop(StopMode::Fast).await.expect("stops");
    copy(&server, &old);
    server.start_again().await.expect("starts");
    stage.sql = client(&stage.database.url).await.expect("a connection");
    stage.execute(&emit("rolled back by the restore")).await;
    stage.settled().await;
    server.stop(StopMode::Fast).await.expect("stops");
    copy(&old, &server);
    server.start_again().await.expect("starts");
    // The checkpoint went back together with the data. The process that lived through it says so.
    relay.ended().await.expect_code(3).expect_text(&["checkpoint_went_back: ", "hint: "]);
    let asked = ["resync", "--accept-gap", "--reason", "x", "--anyway", "--from", "checkpoint"];
    stage.run(&asked).await.expect_code(0);
    let relay = stage.start().await;
    stage.sql = client(&stage.database.url).await.expect("a connection");
    stage.execute(&emit("after")).await;
    let got = stage.settled().await;
    let kinds = kinds(&got);
    assert_eq!(kinds.last(), Some(&"after"), "{kinds:?}");
    assert!(kinds.contains(&"before"));
    relay.stop().await.expect_code(0);
    // A checkpoint that did not go back is refused.
    stage.execute("UPDATE watership.checkpoint SET flush_mark = 'FFFF/0'::pg_lsn - '0/0'").await;
    let texts = ["ahead of the server's WAL", "hint: "];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    class.held(3);
}
