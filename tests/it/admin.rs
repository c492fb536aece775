//! What an operator, an orchestrator and Prometheus are told: probes, exit codes, metrics. They
//! agree with what flows, and nobody can keep them from being told.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use watership::dev::{self, Signal};

use crate::support::servers::{own_database, own_vhost, rabbit};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

const LOST: &str = "[[route]]\nname = \"lost\"\noutbox = { aggregate_type = \"lost\" }\n\
    exchange = \"nobody\"\n\
    [[route]]\nname = \"all\"\noutbox = { aggregate_type = \"order\" }\nexchange = \"watership\"\n";

async fn emit(stage: &Stage, kind: &str) {
    stage.execute(&format!("SELECT watership.emit('{kind}', '1', 'made', '1')")).await;
}

#[tokio::test]
async fn a_held_route_is_told_by_status_and_check_with_their_exit_codes_until_it_is_mended() {
    let stage = Stage::new(Setup { routes: LOST, ..Setup::default() }).await;
    let relay = stage.start().await;
    stage.run(&["status"]).await.expect_code(0).expect_text(&["state          streaming", "none"]);
    stage.run(&["check"]).await.expect_text(&["streaming, and nothing is wrong with it"]);

    emit(&stage, "lost").await;
    until("the route is held", async || relay.status().await["held"][0]["route"] == "lost").await;
    let told = ["problem", "route \"lost\" has been held for", "NO_ROUTE", "-> fix the exchange"];
    stage.run(&["status"]).await.expect_code(1).expect_text(&told);
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    let status = relay.status().await;
    assert_eq!(status["problems"][0]["level"], "problem", "{status}");

    stage.inbox.count(0).await;
    let bind = stage.channel.queue_bind(
        "all".into(),
        "nobody".into(),
        "#".into(),
        Default::default(),
        Default::default(),
    );
    bind.await.expect("bound");
    stage.inbox.count(1).await;
    until("it is well", async || stage.run(&["status"]).await.code == 0).await;
    relay.stop().await.expect_code(0);
    stage.run(&["status"]).await.expect_code(1).expect_text(&["not running: "]);
}

#[tokio::test]
async fn without_its_broker_a_relay_is_alive_and_everything_else_says_that_nothing_flows() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let path = format!("/api/vhosts/{}", vhost.name);
    let stage = Stage::on(database, vhost, Setup::default()).await;
    let relay = stage.start().await;
    stage.run(&["status", "--alive"]).await.expect_code(0);
    stage.run(&["status", "--ready"]).await.expect_code(0);
    rabbit().await.management("DELETE", &path, "").await.expect("the vhost is gone");
    until("it waits", async || relay.status().await["state"] == "waiting").await;

    // It waits, or tries just now.
    let told = ["nothing is streamed: the relay ", "-> "];
    stage.run(&["status"]).await.expect_code(1).expect_text(&told);
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    stage.run(&["status", "--ready"]).await.expect_code(1).expect_text(&["error: not ready: "]);
    stage.run(&["status", "--ready", "--standby-ok"]).await.expect_code(1);
    assert_eq!(relay.get("/readyz?standby=ok").await.0, 503);
    stage.run(&["status", "--alive"]).await.expect_code(0);
    relay.kill();
}

#[tokio::test]
async fn a_standby_is_alive_and_well_and_ready_for_who_asks_for_it() {
    let stage = Stage::new(Setup::default()).await;
    let first = stage.start().await;
    let second = stage.spawn_second();
    until("it is on standby", async || second.status().await["state"] == "standing_by").await;
    assert_eq!(second.get("/readyz").await.0, 503);
    assert_eq!(second.get("/readyz?standby=ok").await.0, 200);
    assert_eq!(second.get("/readyz?standby=yes").await.0, 400);
    assert_eq!(first.get("/readyz?standby=ok").await.0, 200);
    let run = async |arguments: &[&str]| stage.run_for(&second, arguments).await;
    run(&["status", "--ready"]).await.expect_code(1).expect_text(&["not ready: on standby"]);
    run(&["status", "--ready", "--standby-ok"]).await.expect_code(0);
    run(&["status", "--alive"]).await.expect_code(0);
    run(&["status"]).await.expect_code(0).expect_text(&["standing_by", "waits for", "problems"]);
    first.stop().await.expect_code(0);
    until("it took over", async || second.get("/readyz").await.0 == 200).await;
    second.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_health_check_needs_no_secret_of_the_file() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let text = stage.configuration();
    stage.replace_configuration(&text.replacen(
        "[[exchange]]",
        "source.password = \"${file:/nowhere/secret}\"\n\
         broker.password = \"${WATERSHIP_TEST_UNSET}\"\n[[exchange]]",
        1,
    ));
    stage.run(&["status"]).await.expect_code(2);
    stage.run(&["status", "--alive"]).await.expect_code(0);
    stage.run(&["status", "--ready"]).await.expect_code(0);
    // Docker reserves every other code than 0 and 1.
    stage.replace_configuration("admin.lissten = \"x\"");
    stage
        .run(&["status", "--alive"])
        .await
        .expect_code(1)
        .expect_text(&["unknown key \"lissten\""]);
    relay.kill();
}

/// Asks as an orchestrator does, which does not wait for longer and then kills.
async fn livez(relay: &Running) -> u16 {
    let asked = timeout(Duration::from_secs(30), relay.get("/livez")).await;
    asked.expect("the probe is answered").0
}

#[tokio::test]
async fn idle_connections_do_not_keep_a_probe_from_its_answer() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let connect = async || {
        let stream = TcpStream::connect(("127.0.0.1", relay.port())).await;
        stream.expect("the port is open")
    };
    let (mut silent, mut kept, mut half) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..150 {
        silent.push(connect().await);
    }
    assert_eq!(livez(&relay).await, 200, "beside connections that send nothing");
    for _ in 0..150 {
        let mut stream = connect().await;
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("asked");
        let mut answer = [0; 15];
        stream.read_exact(&mut answer).await.expect("answered");
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        kept.push(stream);
    }
    assert_eq!(livez(&relay).await, 200, "beside connections that are kept");
    for _ in 0..150 {
        let mut stream = connect().await;
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow:").await.expect("asked");
        half.push(stream);
    }
    assert_eq!(livez(&relay).await, 200, "beside requests that never end");
    // Those that were not closed for the sake of others are closed for being idle.
    for stream in silent.iter_mut().chain(&mut kept).chain(&mut half) {
        let mut rest = Vec::new();
        let ended = timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await;
        let _closed = ended.expect("an idle connection is closed");
    }
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_relay_works_without_its_port_while_that_is_taken_and_takes_it_when_it_is_free() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let port = relay.port();
    relay.stop().await.expect_code(0);
    let other = std::net::TcpListener::bind(("127.0.0.1", port)).expect("the port is free");
    let mut relay = stage.spawn();
    emit(&stage, "order").await;
    stage.inbox.count(1).await;
    let told = stage.run(&["check"]).await;
    told.expect_text(&["relay", "does not answer"]);
    drop(other);
    relay.ready().await;
    let ended = relay.stop().await;
    ended.expect_code(0).expect_text(&[
        "is in use: no probe and no scrape reaches this relay",
        "the admin port is free again",
    ]);
    // An address that this machine does not have will not become free.
    let text = stage.configuration().replace("127.0.0.1:", "192.0.2.1:");
    let text = text.replace("admin.linger", "admin.allow_remote = true\nadmin.linger");
    stage.replace_configuration(&text.replace("@192.0.2.1:", "@127.0.0.1:"));
    stage.run(&["run"]).await.expect_code(2).expect_text(&["cannot be bound"]);
}

#[tokio::test]
async fn a_verdict_can_be_scraped_before_the_process_ends_with_3() {
    let stage = Stage::new(Setup::default()).await;
    stage.replace_configuration(&stage.configuration().replace("\"0s\"", "\"1h\""));
    let mut relay = stage.start().await;
    stage.execute("DROP PUBLICATION watership").await;
    until("it has stopped", async || relay.status().await["state"] == "stopped").await;
    let verdict = "watership_verdict{verdict=\"publication_missing\"}";
    assert_eq!(relay.metric(verdict).await, Some(1.0));
    let status = relay.status().await;
    assert_eq!(status["last_error"]["verdict"], "publication_missing", "{status}");
    assert_eq!(status["problems"][0]["level"], "verdict", "{status}");
    assert_eq!((livez(&relay).await, relay.get("/readyz").await.0), (200, 503));
    stage
        .run(&["status"])
        .await
        .expect_code(3)
        .expect_text(&["verdict        nothing is streamed"]);
    stage.run(&["check"]).await.expect_code(3);
    // A standby need not wait for a relay that has stopped.
    let sql = format!(
        "SELECT (active_pid IS NULL)::text FROM pg_replication_slots WHERE slot_name = '{}'",
        stage.slot
    );
    until("the slot is free", async || stage.text(&sql).await == "true").await;
    relay.signal(Signal::Term);
    relay.ended().await.expect_code(3).expect_text(&["(admin.linger)"]);
}

#[tokio::test]
async fn a_broken_or_foreign_answer_on_the_port_is_not_taken_for_the_relays() {
    let stage = Stage::new(Setup::default()).await;
    let port = dev::free_port().expect("a free port");
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a port");
    let answers = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("somebody asks");
            let mut asked = [0; 1024];
            let _asked = stream.read(&mut asked).await;
            let _sent = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"name\":7}\xff\x1b[2J").await;
        }
    });
    let text = stage.configuration();
    let listen = text.lines().find(|line| line.starts_with("admin.listen")).expect("it is there");
    stage.replace_configuration(
        &text.replace(listen, &format!("admin.listen = \"127.0.0.1:{port}\"")),
    );
    stage.run(&["status", "--ready"]).await.expect_code(1).expect_text(&["is not a relay"]);
    let told = ["warning", "what answers at", "is not a relay"];
    stage.run(&["check"]).await.expect_text(&told);
    stage.run(&["status"]).await.expect_code(1).expect_text(&["is not a relay"]);
    answers.abort();
}

#[tokio::test]
async fn another_relay_on_the_port_is_not_taken_for_this_one() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let other = stage.configuration().replacen("name = \"shop\"", "name = \"other\"", 1);
    stage.replace_configuration(&other);
    for probe in ["--alive", "--ready"] {
        let texts = ["is \"shop\", not \"other\""];
        stage.run(&["status", probe]).await.expect_code(1).expect_text(&texts);
    }
    relay.stop().await.expect_code(0);
}
