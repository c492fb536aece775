//! Groups A and E: what stands around the two servers and the relay: a full disk, clocks that lie,
//! a pooler in between, threads that die or hang.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tokio::time::Instant;
use watership::dev::{self, Process};

use crate::report::Class;
use crate::support::scene::{Scene, plain};
use crate::support::servers::{Database, client, own_database, own_postgres, own_vhost};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{throughout, until};
use crate::support::writers::STEADY;

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

/// A file system of a few megabytes; gone when dropped.
struct Small(PathBuf);

impl Small {
    /// Only root may mount.
    fn mount(name: &str, megabytes: u32) -> Self {
        let path = dev::home().expect("a temporary directory").join(name);
        fs::create_dir(&path).expect("a directory of ours");
        let size = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path);
        assert!(mount.status().expect("mount runs").success(), "tmpfs is mounted");
        Self(path)
    }

    /// Takes all the room that is left.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("ballast");
        let mut file = fs::File::create(&path).expect("a file of ours");
        for size in [1 << 16, 1 << 12, 1 << 9] {
            let piece = vec![0; size];
            while file.write_all(&piece).is_ok() {}
        }
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn host_limits_a12_disk_of_postgres_full() {
    let class = Class::new("A12", "host_limits_a12_disk_of_postgres_full");
    if !is_root() {
        return class.not_here("only root may mount a small file system");
    }
    let disk = Small::mount("full", 64);
    let server = own_postgres(&[]).await;
    server.give(&disk.0).expect("it is the server's");
    let space = format!("CREATE TABLESPACE full_disk LOCATION '{}'", disk.0.display());
    server.execute(&space).await.expect("a tablespace");
    server.execute("CREATE DATABASE tight TABLESPACE full_disk").await.expect("a database");
    let url = server.url("postgres", "tight");
    let vhost = own_vhost().await;
    let mut scene = plain("A12", &url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    scene.fault("disk full");
    let ballast = disk.fill();
    // Writers fail with 53100 and try again; the relay's checkpoint may fail too.
    let client = client(&url).await.expect("a connection");
    let more = client.batch_execute("CREATE TABLE more AS SELECT generate_series(1, 100000)");
    let full = more.await.expect_err("there is no room");
    assert_eq!(full.code(), Some(&tokio_postgres::error::SqlState::DISK_FULL));
    let alive = async || {
        scene.relay().check();
        scene.relay().status().await["state"].is_string()
    };
    throughout(Duration::from_secs(3), "the relay lives on", alive).await;
    let before = scene.relay().confirmed().await;
    fs::remove_file(ballast).expect("a file of ours");
    scene.recovered(Instant::now(), before).await;
    scene.flowing(500).await;
    // Whether its own row needs a new page, so that it meets the fault itself, is chance.
    scene.relay().cannot_be_heard();
    scene.enough();
    let judged = scene.judge().await;
    class.survived(&judged);
    drop(server);
}

/// The library that makes a process see another wall clock; absent where it is not installed.
fn false_clock() -> Option<PathBuf> {
    let folders = fs::read_dir("/usr/lib").ok()?.flatten();
    let library = |folder: fs::DirEntry| folder.path().join("faketime/libfaketimeMT.so.1");
    folders.map(library).find(|path| path.exists())
}

/// The relay, with a wall clock that says what the file says; monotonic time stays true.
fn with_clock(scene: &mut Scene, library: &Path, file: &Path) -> Command {
    let mut command = scene.relay().command("run");
    command
        .env("LD_PRELOAD", library)
        .env("FAKETIME_TIMESTAMP_FILE", file)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    command
}

/// A run whose relay's clock is set to each of `clocks` in turn, while events flow.
async fn clocks(class: Class, title: &str, clocks: &[&str]) {
    let Some(library) = false_clock() else {
        return class.not_here("libfaketime is missing: scripts/install fault-tools");
    };
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain(title, &database.url, &vhost.url, "").await;
    let file = scene.relay().config.with_extension("clock");
    fs::write(&file, clocks[0]).expect("a file of ours");
    scene.consume();
    let command = with_clock(&mut scene, &library, &file);
    scene.fault(&format!("wall clock {clocks:?}"));
    scene.relay().start_as(command);
    scene.write(STEADY);
    scene.recovered(Instant::now(), 0).await;
    for clock in clocks {
        fs::write(&file, clock).expect("a file of ours");
        scene.flowing(1_000).await;
    }
    let sessions = scene.relay().status().await["sessions"].clone();
    assert_eq!(sessions, 1, "nothing depends on the wall clock");
    let page = scene.relay().page("/metrics").await;
    let negative =
        page.lines().find(|l| !l.starts_with('#') && l.contains(" -") && !l.ends_with("-1"));
    assert_eq!(negative, None, "an age below zero");
    class.survived_in_silence(scene).await;
}

#[tokio::test]
async fn host_limits_a15_clocks_an_hour_apart() {
    let class = Class::new("A15", "host_limits_a15_clocks_an_hour_apart");
    clocks(class, "A15", &["-1h"]).await;
}

#[tokio::test]
async fn host_limits_e24_clock_that_jumps() {
    let class = Class::new("E24", "host_limits_e24_clock_that_jumps");
    clocks(class, "E24", &["+0", "+2h", "-1h", "+0"]).await;
}

/// PgBouncer before a server, in session mode.
struct Pooler {
    port: u16,
    _process: Process,
}

impl Pooler {
    async fn before(port: u16, more: &str) -> Self {
        let own = dev::free_port().expect("a free port");
        let folder = dev::home().expect("a temporary directory");
        let ini = folder.join(format!("pgbouncer-{own}.ini"));
        let user = if is_root() { "user = postgres\n" } else { "" };
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {own}\nauth_type = any\nunix_socket_dir =\n{user}{more}\n"
        );
        fs::write(&ini, text).expect("a file of ours");
        let mut command = Command::new("pgbouncer");
        command.arg(&ini);
        let process = Process::spawn("PgBouncer", command, &ini.with_extension("log"));
        let process = process.expect("pgbouncer starts");
        until("the pooler listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", own)).await.is_ok()
        })
        .await;
        Self { port: own, _process: process }
    }
}

#[tokio::test]
async fn host_limits_a17_pooler_in_the_url() {
    let class = Class::new("A17", "host_limits_a17_pooler_in_the_url");
    if Command::new("pgbouncer").arg("--version").output().is_err() {
        return class.not_here("pgbouncer is missing: scripts/install fault-tools");
    }
    let server = own_postgres(&[]).await;
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let stage = Stage::on(database, own_vhost().await, Setup::default()).await;
    let emit = "SELECT watership.emit('t', '1', 'kept', '1')";
    stage.execute(emit).await;
    // As it comes, it knows no `options`; told to ignore them, it knows no `replication`.
    for more in ["", "ignore_startup_parameters = options"] {
        let pooler = Pooler::before(server.port(), more).await;
        let (direct, pooled) = (server.port().to_string(), pooler.port.to_string());
        let relay = stage.spawn_other(|text| text.replacen(&direct, &pooled, 1));
        let texts = ["if this is a connection pooler such as PgBouncer"];
        relay.ended().await.expect_code(1).expect_text(&texts);
    }
    // Nothing was lost by the attempts.
    let relay = stage.start().await;
    assert_eq!(stage.inbox.count(1).await.len(), 1);
    relay.stop().await.expect_code(0);
    class.held(1);
}

#[tokio::test]
async fn host_limits_e18_process_aborted() {
    let class = Class::new("E18", "host_limits_e18_process_aborted");
    let manifest = fs::read_to_string("Cargo.toml").expect("the manifest");
    let release = manifest.split("[profile.release]").nth(1).expect("a release profile");
    assert!(release.contains("panic = \"abort\""), "no thread dies alone");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("E18", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("SIGABRT");
    let pid = scene.relay().pid().to_string();
    let sent = Command::new("kill").args(["-ABRT", &pid]).status();
    assert!(sent.expect("kill runs").success());
    assert_ne!(scene.relay().ended().await, 0, "a service manager sees a failure");
    scene.relay().start();
    scene.recovered(Instant::now(), 0).await;
    scene.flowing(500).await;
    scene.relay().says_nothing();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn host_limits_e19_loop_that_hangs() {
    let Some(class) = Class::long("E19", "host_limits_e19_loop_that_hangs") else { return };
    if Command::new("strace").arg("--version").output().is_err() {
        return class.not_here("strace is missing: scripts/install fault-tools");
    }
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("E19", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("the loop's thread stands still");
    // Without -f only the main thread is traced, and that is the loop's. In microseconds.
    let mut tracer = Command::new("strace");
    tracer.args(["-p", &scene.relay().pid().to_string(), "-e", "trace=epoll_wait"]);
    tracer.args(["-e", "inject=epoll_wait:delay_enter=300000000"]);
    let log = scene.relay().config.with_extension("strace");
    let tracer = Process::spawn("strace", tracer, &log).expect("strace starts");
    let stuck = async || scene.relay().page("/livez").await.contains("has been stuck");
    until("/livez says it", stuck).await;
    // Half a minute later the process gives up: nobody may be there to probe it.
    scene.relay().logs(&["has been stuck for a minute"]).await;
    // A thread that is traced cannot die before its tracer lets go.
    drop(tracer);
    assert_ne!(scene.relay().ended().await, 0);
    scene.relay().start();
    scene.recovered(Instant::now(), 0).await;
    scene.flowing(500).await;
    scene.enough();
    class.survived(&scene.judge().await);
}
