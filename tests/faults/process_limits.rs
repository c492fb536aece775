//! Group E: what the surroundings of the process take away from it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::report::Class;
use crate::support::scene::{Scene, plain};
use crate::support::servers::{client, own_database, own_vhost, text};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::{throughout, until};
use crate::support::writers::{Load, STEADY};

/// Prepared, the relay not started.
async fn ready(title: &str, settings: &str) -> Scene {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain(title, &database.url, &vhost.url, settings).await;
    scene.consume();
    scene
}

/// The relay's `run`, as the last words of a shell script.
fn script(scene: &mut Scene, script: &str) -> Command {
    let run = scene.relay().command("run");
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(run.get_program()).args(run.get_args());
    command
}

/// What there is to read in the log of a relay that was started in some unfriendly way.
enum Log {
    /// These words.
    Words(&'static str),
    /// Nothing is wrong.
    Quiet,
    /// It goes nowhere.
    Lost,
}

/// Everything arrives although the relay was started like this.
async fn lives_with(class: Class, mut scene: Scene, command: Command, fault: &str, log: Log) {
    scene.fault(fault);
    scene.relay().start_as(command);
    scene.write(STEADY);
    scene.recovered(Instant::now(), 0).await;
    scene.flowing(2_000).await;
    match log {
        Log::Words(words) => scene.relay().logs(&[words]).await,
        Log::Quiet => scene.relay().says_nothing(),
        Log::Lost => scene.relay().cannot_be_heard(),
    }
    scene.enough();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0);
    class.survived(&judged);
}

#[tokio::test]
async fn process_e16_little_memory() {
    let Some(class) = Class::long("E16", "process_e16_little_memory") else { return };
    let mut scene = ready("E16", "").await;
    scene.write(Load { events: 30_000, rate: 0, rows: 200 });
    scene.written().await;
    // Data, heap and private mappings: 64 MiB for a backlog of 30,000 events.
    let command = script(&mut scene, "ulimit -d 65536; exec \"$@\"");
    scene.fault("64 MiB");
    scene.relay().start_as(command);
    scene.recovered(Instant::now(), 0).await;
    scene.delivered(scene.committed()).await;
    scene.relay().says_nothing();
    let judged = scene.judge().await;
    assert_eq!(judged.duplicates, 0, "it was not killed");
    class.survived(&judged);
}

#[tokio::test]
async fn process_e20_nobody_reads_its_log() {
    let class = Class::new("E20", "process_e20_nobody_reads_its_log");
    let mut scene = ready("E20", "log.level = \"trace\"").await;
    let command = script(&mut scene, "exec \"$@\" > >(exec sleep 600) 2>&1");
    // More than a pipe takes (64 KiB) has to be logged; sessions that end are logged at any level.
    scene.fault("a log that nobody reads");
    scene.relay().start_as(command);
    scene.write(STEADY);
    scene.recovered(Instant::now(), 0).await;
    scene.flowing(4_000).await;
    scene.relay().cannot_be_heard();
    scene.enough();
    class.survived(&scene.judge().await);
}

#[tokio::test]
async fn process_e20_log_closed() {
    let class = Class::new("E20", "process_e20_log_closed");
    let mut scene = ready("E20 closed", "log.level = \"trace\"").await;
    let command = script(&mut scene, "exec \"$@\" >&- 2>&-");
    lives_with(class, scene, command, "log closed", Log::Lost).await;
}

#[tokio::test]
async fn process_e20_log_disk_full() {
    let class = Class::new("E20", "process_e20_log_disk_full");
    let mut scene = ready("E20 full", "log.level = \"trace\"").await;
    let command = script(&mut scene, "exec \"$@\" >/dev/full 2>&1");
    lives_with(class, scene, command, "log disk full", Log::Lost).await;
}

#[tokio::test]
async fn process_e21_no_home_no_environment_another_user() {
    let class = Class::new("E21", "process_e21_no_home_no_environment_another_user");
    let mut scene = ready("E21", "").await;
    let nobody = |mut command: Command| {
        command.env_clear().current_dir("/").uid(65_534).gid(65_534);
        command
    };
    let mut probe = Command::new(env!("CARGO_BIN_EXE_watership"));
    probe.arg("--version");
    // Only root may become somebody else.
    let may = nobody(probe).output().is_ok_and(|out| out.status.success());
    let mut command = scene.relay().command("run");
    command.env_clear().current_dir("/");
    let command = if may { nobody(command) } else { command };
    lives_with(class, scene, command, "no environment", Log::Quiet).await;
}

#[tokio::test]
async fn process_e25_few_file_descriptors() {
    let class = Class::new("E25", "process_e25_few_file_descriptors");
    let mut scene = ready("E25", "").await;
    let few = script(&mut scene, "ulimit -n 16; exec \"$@\"");
    scene.relay().start_as(few);
    scene.relay().logs(&["Too many open files"]).await;
    scene.relay().kill();
    let enough = script(&mut scene, "ulimit -n 32; exec \"$@\"");
    let log = Log::Words("Too many open files");
    lives_with(class, scene, enough, "32 file descriptors", log).await;
}

#[tokio::test]
async fn process_e27_storm_on_the_admin_port() {
    let mut class = Class::new("E27", "process_e27_storm_on_the_admin_port");
    let mut scene = ready("E27", "").await;
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(500).await;
    scene.fault("1,000 connections");
    let port = scene.relay().admin();
    let mut storm = JoinSet::new();
    for number in 0..1_000 {
        storm.spawn(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let request: &[u8] = match number % 4 {
                0 => b"GET /metrics HTTP/1.0\r\n\r\n",
                1 => b"GET /metr",
                2 => b"POST /status HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n",
                _ => &[0xFF; 20_000],
            };
            stream.write_all(request).await.ok()?;
            let mut answer = Vec::new();
            let _ = timeout(Duration::from_secs(3), stream.read_to_end(&mut answer)).await;
            Some(answer.len())
        });
    }
    let begin = Instant::now();
    scene.flowing(1_600).await;
    class.took("ms_for_2_seconds_of_events", begin.elapsed());
    while storm.join_next().await.is_some() {}
    scene.recovered_in(Duration::ZERO);
    assert_eq!(scene.relay().status().await["sessions"], 1);
    class.survived_in_silence(scene).await;
}

#[tokio::test]
async fn process_e28_checkpoint_row_missing_and_corrupt() {
    let class = Class::new("E28", "process_e28_checkpoint_row_missing_and_corrupt");
    let stage = Stage::new(Setup::default()).await;
    stage.execute("SELECT watership.emit('t', '1', 'kept', '1')").await;
    stage.execute("CREATE TABLE kept AS SELECT * FROM watership.checkpoint").await;
    let put_back = "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, \
        session_no, slot, system_identifier, timeline, publication, publication_oid) \
        SELECT name, epoch, mark, ordinal, flush_mark, session_no, slot, system_identifier, \
        timeline, publication, publication_oid FROM kept";
    stage.execute("DELETE FROM watership.checkpoint").await;
    let texts = ["no checkpoint row", "hint: "];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    stage.execute(put_back).await;
    stage.execute("ALTER TABLE watership.checkpoint RENAME TO gone").await;
    stage.spawn().ended().await.expect_code(3).expect_text(&["watership init"]);
    stage.execute("ALTER TABLE watership.gone RENAME TO checkpoint").await;
    stage.execute("UPDATE watership.checkpoint SET slot = 'other'").await;
    stage.spawn().ended().await.expect_code(3).expect_text(&["belongs to slot \"other\""]);
    stage.execute("DELETE FROM watership.checkpoint").await;
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty(), "it began nowhere");
    stage.execute(put_back).await;

    let relay = stage.start().await;
    assert_eq!(stage.settled().await.len(), 1);
    stage.execute("DELETE FROM watership.checkpoint").await;
    stage.execute("SELECT watership.emit('t', '1', 'more', '1')").await;
    relay.ended().await.expect_code(3).expect_text(&["checkpoint"]);
    class.held(1);
}

#[tokio::test]
async fn process_e28_checkpoint_row_locked() {
    let class = Class::new("E28", "process_e28_checkpoint_row_locked");
    let (database, vhost) = (own_database().await, own_vhost().await);
    let mut scene = plain("E28 locked", &database.url, &vhost.url, "").await;
    scene.consume();
    scene.relay().start();
    scene.write(STEADY);
    scene.flowing(300).await;
    scene.fault("checkpoint row locked for 3 s");
    let locker = client(&database.url).await.expect("a connection");
    let lock = "BEGIN; SELECT 1 FROM watership.checkpoint FOR UPDATE";
    locker.batch_execute(lock).await.expect("locked");
    let stored = scene.relay().status().await["flush_lsn"].clone();
    throughout(Duration::from_secs(3), "it lives", async || {
        scene.relay().check();
        true
    })
    .await;
    let slot = text(
        &database.url,
        "SELECT confirmed_flush_lsn <= (SELECT flush_lsn FROM watership.checkpoint) \
         FROM pg_replication_slots WHERE database = current_database()",
    )
    .await;
    assert_eq!(slot, "true", "nothing is advanced that is not stored ({stored})");
    locker.batch_execute("COMMIT").await.expect("unlocked");
    let before = scene.relay().confirmed().await;
    scene.recovered(Instant::now(), before).await;
    class.survived_in_silence(scene).await;
}

#[tokio::test]
async fn process_e29_many_event_types_make_no_series() {
    let class = Class::new("E29", "process_e29_many_event_types_make_no_series");
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let series = async || relay.get("/metrics").await.1.lines().count();
    until("the metrics are there", async || series().await > 50).await;
    stage.settled().await;
    let before = series().await;
    let many = "SELECT count(watership.emit('type' || n, n::text, 'kind' || n, '1')) \
        FROM generate_series(1, 3000) AS n";
    stage.execute(many).await;
    assert_eq!(stage.settled().await.len(), 3_000);
    assert_eq!(series().await, before);
    class.held(3_000);
}
