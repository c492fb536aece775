//! `watership inbox torture` with commands that are no consumers: what it refuses, what it shows,
//! and what it leaves behind. With a consumer it runs in `tests/inbox`.

use std::path::Path;
use std::process::Command;

use lapin::Channel;
use lapin::options::{BasicConsumeOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::Value;
use tokio_postgres::Client;
use watership::dev::{self, Process, Signal};

use crate::inbox_commands::{inbox, installed, park};
use crate::support::servers::{Database, Vhost, own_database, own_vhost};
use crate::support::waiting::{LIMIT, until};

struct Scene {
    database: Database,
    client: Client,
    vhost: Vhost,
    connection: lapin::Connection,
}

impl Scene {
    async fn new() -> Self {
        let (database, client) = installed().await;
        let vhost = own_vhost().await;
        let (connection, _) = vhost.connect().await;
        Self { database, client, vhost, connection }
    }

    fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let all = ["torture", "--url", &self.database.url, "--amqp", &self.vhost.url];
        [&all, more].concat()
    }

    /// Runs it to its end, which must have this code.
    async fn torture(&self, more: &[&str], code: i32) -> (String, String) {
        inbox(&self.arguments(more), code).await
    }

    /// Runs it with a "consumer" that does nothing, and returns the verdict.
    async fn idle(&self, more: &[&str]) -> Value {
        let command = ["--patience", "1", "--", "sleep", "3600"];
        let options = ["--json", "--kills", "0", "--events", "5", "--processes", "1"];
        let (out, _) = self.torture(&[more, &options, &command].concat(), 1).await;
        serde_json::from_str(&out).expect("JSON")
    }

    async fn channel(&self) -> Channel {
        self.connection.create_channel().await.expect("a channel")
    }

    /// Messages that are ready; `None` without the queue.
    async fn ready(&self, queue: &str) -> Option<u32> {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = self.channel().await;
        let declared = declared.queue_declare(queue.into(), passive, FieldTable::default()).await;
        declared.ok().map(|queue| queue.message_count())
    }

    async fn declare(&self, queue: &str, arguments: &[(&str, AMQPValue)]) {
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        let channel = self.channel().await;
        channel.queue_declare(queue.into(), durable, table).await.expect("a queue");
    }
}

#[tokio::test]
async fn the_queue_that_it_made_is_gone_when_the_command_is_none_or_ends_by_itself() {
    let scene = Scene::new().await;
    let none = ["--queue", "q", "--", "/nonexistent/consumer"];
    let (_, error) = scene.torture(&none, 2).await;
    assert!(error.contains("starting /nonexistent/consumer"), "{error}");
    assert_eq!(scene.ready("q").await, None);
    let ends = "echo 'no such table'; echo 'in line 7' >&2; exit 3";
    let ends = ["--queue", "q", "--kills", "0", "--events", "9", "--", "sh", "-c", ends];
    let (_, error) = scene.torture(&ends, 1).await;
    assert!(error.contains("ended by itself 10 times"), "{error}");
    assert!(error.contains("    no such table\n    in line 7\n"), "each on its line: {error}");
    assert_eq!(scene.ready("q").await, None);
}

#[tokio::test]
async fn a_signal_ends_it_with_its_consumers_and_its_queue_and_until_then_it_says_how_far_it_is() {
    let scene = Scene::new().await;
    let home = dev::home().expect("a directory");
    for (signal, name) in [(Signal::Int, "int"), (Signal::Term, "term")] {
        let file = |what: &str| home.join(format!("{}-{name}.{what}", scene.database.name));
        let (pid, log) = (file("pid"), file("log"));
        let script = format!("echo $$ > {}; exec sleep 3600", pid.display());
        let options = ["--queue", name, "--events", "5", "--kills", "0", "--processes", "1"];
        let options = [&options[..], &["--", "sh", "-c"]].concat();
        let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
        command.arg("inbox").args(scene.arguments(&options)).arg(script);
        let mut process = Process::spawn("torture", command, &log).expect("it starts");
        until("the consumer runs", async || number(&pid).is_some()).await;
        until("the queue is filled", async || scene.ready(name).await > Some(0)).await;
        if signal == Signal::Int {
            until("it says how far it is", async || dev::tail(&log).contains("waiting: 0 effects"))
                .await;
        }
        process.signal(signal);
        let status = process.wait(LIMIT).await.expect("it ends");
        let text = dev::tail(&log);
        assert_eq!(status.code(), Some(1), "{text}");
        assert!(text.contains("the run has no verdict"), "{text}");
        assert_eq!(scene.ready(name).await, None, "the queue is removed");
        let consumer = number(&pid).expect("its number");
        assert!(!Path::new(&format!("/proc/{consumer}")).exists(), "the consumer has ended");
    }
}

fn number(file: &Path) -> Option<u32> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[tokio::test]
async fn a_bad_verdict_comes_with_what_the_consumer_printed() {
    let scene = Scene::new().await;
    let script = "echo 'cannot connect'; echo 'wrong port' >&2; exec sleep 3600";
    let options = ["--queue", "q", "--events", "5", "--kills", "0", "--patience", "10"];
    let (out, _) = scene.torture(&[&options[..], &["--", "sh", "-c", script]].concat(), 1).await;
    assert!(out.contains("lost          5"), "{out}");
    assert!(out.contains("    cannot connect\n    wrong port\n"), "{out}");
}

#[tokio::test]
async fn a_queue_that_does_not_fit_is_refused_and_left_alone() {
    let scene = Scene::new().await;
    let text = |value: &str| AMQPValue::LongString(value.into());
    let single = ("x-single-active-consumer", AMQPValue::Boolean(true));
    let quorum = ("x-queue-type", text("quorum"));
    scene.declare("plain", std::slice::from_ref(&quorum)).await;
    scene.declare("classic", std::slice::from_ref(&single)).await;
    // As a partition of the relay.
    let partition = [
        quorum,
        single,
        ("x-delivery-limit", AMQPValue::LongInt(1_000)),
        ("x-dead-letter-exchange", text("orders.dlx")),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
        ("x-max-length", AMQPValue::LongLongInt(1_000_000)),
    ];
    scene.declare("orders.00", &partition).await;
    let refused = async |queue: &str| {
        let ordered = ["--queue", queue, "--ordered", "--", "sleep", "3600"];
        scene.torture(&ordered, if queue.contains(',') { 2 } else { 1 }).await.1
    };
    let error = refused("plain").await;
    assert!(error.contains("\"plain\" has no single active consumer"), "{error}");
    for fits in ["classic", "orders.00"] {
        assert_eq!(scene.idle(&["--queue", fits, "--ordered"]).await["events"], 5, "{fits}");
        assert!(scene.ready(fits).await > Some(0), "the queue of others stays");
    }
    let error = refused("orders.00").await;
    assert!(error.contains("holds") && error.contains("empty queue"), "{error}");
    let error = refused("orders.00,orders.01").await;
    assert!(error.contains("several queues") && error.contains("one partition"), "{error}");

    let channel = scene.channel().await;
    let (options, table) = (BasicConsumeOptions::default(), FieldTable::default());
    let _consumer = channel.basic_consume("plain".into(), "".into(), options, table).await;
    let error = refused("plain").await;
    assert!(error.contains("has 1 consumers"), "{error}");
}

#[tokio::test]
async fn what_was_parked_before_does_not_count_or_is_refused() {
    let scene = Scene::new().await;
    park(&scene.client, "torture", "old1", "k0").await;
    park(&scene.client, "torture", "old2", "k1").await;
    park(&scene.client, "billing", "m", "order/1").await;
    park(&scene.client, "billing", "n", "order/2").await;
    let report = scene.idle(&["--queue", "q"]).await;
    assert_eq!(report["parked"], 0, "under the name that is the test's own");

    let billing = ["--queue", "q", "--consumer", "billing", "--", "sleep", "3600"];
    let (_, error) = scene.torture(&billing, 1).await;
    assert!(error.contains("has parked messages"), "{error}");
    assert!(error.contains("discard --consumer billing --all"), "{error}");
    let url = &*scene.database.url;
    let discard = ["parked", "--url", url, "discard", "--consumer", "billing", "--all"];
    inbox(&[&discard[..], &["m"]].concat(), 2).await;
    let (out, _) = inbox(&[&discard[..], &["--reason", "a test"]].concat(), 0).await;
    assert!(out.contains("discarded 2 messages"), "{out}");
    let (out, _) = inbox(&["parked", "--url", url, "list"], 0).await;
    assert!(out.contains("nothing is parked"), "{out}");
    assert_eq!(scene.idle(&["--queue", "q", "--consumer", "billing"]).await["parked"], 0);
}

#[tokio::test]
async fn a_right_that_is_lacking_is_named_with_its_grant() {
    let scene = Scene::new().await;
    let name = &scene.database.name;
    let user = format!("poor_{name}");
    let role = format!("CREATE ROLE {user} LOGIN");
    scene.client.batch_execute(&role).await.expect("a user");
    let url = scene.database.url.replacen("postgres@", &format!("{user}@"), 1);
    let torture = ["torture", "--url", &url, "--amqp", &scene.vhost.url, "--queue", "q"];
    let torture = [&torture[..], &["--", "sleep", "3600"]].concat();
    let list = ["parked", "--url", &url, "list"];
    for command in [&["status", "--url", &url][..], &["maintain", "--url", &url], &list, &torture] {
        let (_, error) = inbox(command, 1).await;
        assert!(error.contains(&format!("GRANT watership_consumer TO {user}")), "{error}");
        assert!(!error.contains("watership check"), "{error}");
    }
    let (_, error) = inbox(&["install", "--url", &url], 1).await;
    let member = format!("GRANT watership_inbox_owner TO {user}");
    assert!(error.contains(&member) && !error.contains("watership check"), "{error}");
    scene.client.batch_execute(&member).await.expect("granted");
    inbox(&["install", "--url", &url], 0).await;
    let empty = own_database().await;
    let url_of_empty = empty.url.replacen("postgres@", &format!("{user}@"), 1);
    let (_, error) = inbox(&["install", "--url", &url_of_empty], 1).await;
    assert!(error.contains("CREATEROLE") && !error.contains("watership check"), "{error}");
    scene
        .client
        .batch_execute(&format!("REVOKE {}", &member[6..].replace(" TO ", " FROM ")))
        .await
        .expect("revoked");
    // Into the schema, and no further.
    let poor = format!("GRANT USAGE ON SCHEMA watership_inbox TO {user}");
    scene.client.batch_execute(&poor).await.expect("granted");
    for command in [&["status", "--url", &url][..], &["maintain", "--url", &url], &list] {
        let (_, error) = inbox(command, 1).await;
        assert!(error.contains("GRANT watership_consumer TO"), "{error}");
        assert!(!error.contains("watership check"), "{error}");
    }
    let grant = format!("GRANT watership_consumer TO {user}");
    scene.client.batch_execute(&grant).await.expect("granted");
    let (_, error) = inbox(&torture, 1).await;
    assert!(error.contains(&format!("GRANT CREATE ON DATABASE {name} TO {user}")), "{error}");
    assert_eq!(scene.ready("q").await, None);
}

#[tokio::test]
async fn a_wrong_password_of_the_broker_is_said_once() {
    let scene = Scene::new().await;
    let wrong = scene.vhost.url.replacen("guest@", "wrong@", 1);
    assert_ne!(wrong, scene.vhost.url, "the URL has another password");
    let torture = ["torture", "--url", &scene.database.url, "--amqp", &wrong, "--queue", "q"];
    let (_, error) = inbox(&[&torture[..], &["--", "sleep", "3600"]].concat(), 1).await;
    let said = "error: the broker refused user \"guest\": wrong password, or no such user\n";
    assert!(error.starts_with(said) || error.contains(&format!("\n{said}")), "{error}");
    assert!(!error.contains("ACCESS_REFUSED"), "{error}");
}
