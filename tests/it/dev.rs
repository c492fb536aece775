//! The private servers themselves: start, stop, kill, start again, and no trace left behind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use watership::dev::{Postgres, PostgresOptions, Rabbit, RabbitOptions, Signal, StopMode};

use crate::support::servers;
use crate::support::waiting::{LIMIT, until};

async fn sql(url: &str, text: &str) -> Vec<tokio_postgres::Row> {
    let connected = tokio_postgres::connect(url, tokio_postgres::NoTls).await;
    let (client, connection) = connected.expect("a connection");
    tokio::spawn(connection);
    client.query(text, &[]).await.expect("an answer")
}

fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

async fn publish_and_count(url: &str, queue: &str, body: &[u8]) -> u32 {
    use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
    let connection = lapin::Connection::connect(url, Default::default()).await.expect("connect");
    let channel = connection.create_channel().await.expect("channel");
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let declared = channel.queue_declare(queue.into(), durable, Default::default()).await;
    let before = declared.expect("a queue").message_count();
    let properties = lapin::BasicProperties::default().with_delivery_mode(2);
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish("".into(), queue.into(), options, body, properties).await;
    assert!(sent.expect("sent").await.expect("confirmed").is_ack());
    before
}

#[tokio::test]
async fn postgres_keeps_its_data_over_stop_kill_and_start_again() {
    let mut server = Postgres::start(PostgresOptions { fsync: true, ..Default::default() })
        .await
        .expect("a server");
    server.create_database("shop").await.expect("a database");
    let url = server.url("postgres", "shop");
    sql(&url, "CREATE TABLE t AS SELECT 1 AS n").await;
    assert_eq!(sql(&url, "SHOW wal_level").await[0].get::<_, &str>(0), "logical");

    let first = server.pid().expect("it runs");
    server.stop(StopMode::Fast).await.expect("stops");
    assert_eq!((server.pid(), runs(first)), (None, false));
    server.start_again().await.expect("starts again");
    sql(&url, "INSERT INTO t VALUES (2)").await;

    let second = server.pid().expect("it runs");
    server.kill().await;
    assert!(!runs(second));
    server.start_again().await.expect("starts again after a kill");
    sql(&url, "INSERT INTO t VALUES (3)").await;
    server.stop(StopMode::Immediate).await.expect("stops at once");
    server.start_again().await.expect("recovers");
    assert_eq!(sql(&url, "SELECT sum(n) FROM t").await[0].get::<_, i64>(0), 6);
}

#[tokio::test]
async fn a_stopped_postgres_answers_again_after_cont() {
    let mut server = Postgres::start(PostgresOptions::default()).await.expect("a server");
    let url = server.url("postgres", "postgres");
    let connected = tokio_postgres::connect(&url, tokio_postgres::NoTls).await;
    let (client, connection) = connected.expect("a connection");
    tokio::spawn(connection);
    server.signal(Signal::Stop);
    let mut query = std::pin::pin!(client.query("SELECT 1", &[]));
    let silence = tokio::time::timeout(Duration::from_millis(300), &mut query).await;
    assert!(silence.is_err(), "a frozen server must not answer");
    server.signal(Signal::Cont);
    let answer = tokio::time::timeout(LIMIT, query).await;
    assert_eq!(answer.expect("an answer").expect("a row").len(), 1);
}

#[tokio::test]
async fn later_conf_lines_and_own_hba_lines_count() {
    let options = PostgresOptions {
        conf: vec!["wal_level = replica".into(), "password_encryption = 'scram-sha-256'".into()],
        hba: Some(vec!["host all all 127.0.0.1/32 scram-sha-256".into()]),
        ..Default::default()
    };
    let server = Postgres::start(options).await.expect("a server");
    server.execute("CREATE ROLE app LOGIN PASSWORD 'sesame'").await.expect("a role");
    let url = server.url("app:sesame", "postgres");
    assert_eq!(sql(&url, "SHOW wal_level").await[0].get::<_, &str>(0), "replica");
    let wrong = server.url("app:wrong", "postgres");
    let refused = tokio_postgres::connect(&wrong, tokio_postgres::NoTls).await;
    assert!(refused.is_err(), "a wrong password must be refused");
}

#[tokio::test]
async fn rabbit_keeps_its_queues_over_stop_kill_and_start_again() {
    let mut node = Rabbit::start(RabbitOptions::default()).await.expect("a node");
    let url = node.url("/");
    assert_eq!(publish_and_count(&url, "q", b"one").await, 0);

    let first = node.pid().expect("it runs");
    node.stop().await.expect("stops");
    assert_eq!((node.pid(), runs(first)), (None, false));
    node.start_again().await.expect("starts again");
    assert_eq!(publish_and_count(&url, "q", b"two").await, 1);

    let second = node.pid().expect("it runs");
    node.kill().await;
    assert!(!runs(second));
    node.start_again().await.expect("starts again after a kill");
    assert_eq!(publish_and_count(&url, "q", b"three").await, 2);
}

#[tokio::test]
async fn each_test_has_its_own_database_and_vhost() {
    let (one, two) = (servers::own_database().await, servers::own_database().await);
    one.connect().await.batch_execute("CREATE TABLE t ()").await.expect("a table");
    two.connect().await.batch_execute("CREATE TABLE t ()").await.expect("the same name");
    assert_ne!(one.name, two.name);
    let (one, two) = (servers::own_vhost().await, servers::own_vhost().await);
    assert_ne!(one.name, two.name);
    let (connection, channel) = one.connect().await;
    assert!(connection.status().connected() && channel.status().connected());
    assert_eq!(publish_and_count(&one.url, "q", b"one").await, 0);
    assert_eq!(publish_and_count(&two.url, "q", b"one").await, 0);
    let url = servers::rabbit().await.management_url().expect("management runs");
    assert!(url.starts_with("http://guest:guest@127.0.0.1:"));
}

#[tokio::test]
async fn a_killed_parent_leaves_no_process_and_no_file() {
    let mut parent = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "dev::parent_that_is_killed", "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a parent");
    let mut lines = BufReader::new(parent.stdout.take().expect("its output")).lines();
    let line = lines.find_map(|line| line.ok()?.split_once("holding ").map(|(_, l)| l.to_owned()));
    let line = line.expect("the parent says what it holds");
    let (home, pids) = line.split_once(' ').expect("a directory and process ids");
    let pids: Vec<u32> = pids.split(' ').map(|pid| pid.parse().expect("a number")).collect();
    assert_eq!(pids.len(), 3);
    assert!(pids.iter().all(|&pid| runs(pid)) && Path::new(home).exists());

    parent.kill().expect("killed with -9");
    parent.wait().expect("reaped");
    let gone = async || !pids.iter().any(|&pid| runs(pid)) && !Path::new(home).exists();
    until(&format!("{home} and all of {pids:?} are gone"), gone).await;
}

/// Not a test: the process that `a_killed_parent_leaves_no_process_and_no_file` kills.
#[tokio::test]
#[ignore = "started by another test"]
async fn parent_that_is_killed() {
    let mut postgres = Postgres::start(PostgresOptions::default()).await.expect("a server");
    let node = Rabbit::start(RabbitOptions::default()).await.expect("a node");
    let home: PathBuf = watership::dev::home().expect("a directory").into();
    let pids = [postgres.pid(), node.pid(), Some(node.epmd_pid())].map(|p| p.expect("it runs"));
    // Frozen processes have to go as well.
    postgres.signal(Signal::Stop);
    println!("holding {} {} {} {}", home.display(), pids[0], pids[1], pids[2]);
    std::future::pending::<()>().await;
}
