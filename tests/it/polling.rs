//! Polling: what is hard for a source that reads a table while others write to it.

use std::process::Command;

use tokio::net::TcpStream;
use watership::dev::{self, Process};

use crate::sources::POLL;
use crate::support::inbox::kinds;
use crate::support::servers::{Database, own_vhost, private_postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

const SETUP: Setup<'static> =
    Setup { sql: "", tables: &[], settings: POLL, routes: "", source_url: "" };

fn emit(kind: &str) -> String {
    format!("SELECT watership.emit('order', '1', '{kind}', '1')")
}

/// Waits until this many events have arrived, and tells their kinds.
async fn arrived(stage: &Stage, count: usize) -> Vec<String> {
    let messages = stage.inbox.count(count).await;
    kinds(&messages).into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn a_row_that_commits_after_one_with_a_higher_number_is_not_skipped() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    let late = stage.database.connect().await;
    late.batch_execute(&format!("BEGIN; {}", emit("first"))).await.expect("it stays open");
    stage.execute(&emit("second")).await;
    assert_eq!(arrived(&stage, 1).await, ["second"], "it does not wait for the open one");
    late.batch_execute("COMMIT").await.expect("it commits");
    assert_eq!(arrived(&stage, 2).await, ["second", "first"]);
    relay.stop().await.expect_code(0);
}

/// Two transactions on one key: the one that began first writes last.
async fn overlapping(stage: &Stage) {
    let early = stage.database.connect().await;
    early.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.expect("it has its number");
    stage.execute(&emit("v1")).await;
    early.batch_execute(&format!("{}; COMMIT", emit("v2"))).await.expect("it commits");
}

#[tokio::test]
async fn order_is_that_of_commits_across_batches_and_of_inserts_within_one() {
    let stage = Stage::new(SETUP).await;
    // In one batch: the relay begins when both are there.
    overlapping(&stage).await;
    let relay = stage.start().await;
    assert_eq!(arrived(&stage, 2).await, ["v1", "v2"]);
    // In two.
    let early = stage.database.connect().await;
    early.batch_execute("BEGIN; SELECT pg_current_xact_id()").await.expect("it has its number");
    stage.execute(&emit("v3")).await;
    assert_eq!(arrived(&stage, 3).await[2], "v3");
    early.batch_execute(&format!("{}; COMMIT", emit("v4"))).await.expect("it commits");
    assert_eq!(arrived(&stage, 4).await[3], "v4");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn open_writers_and_prepared_transactions_hold_up_nobody_and_come_when_they_commit() {
    let server = private_postgres(&["max_prepared_transactions = 5"], None).await;
    server.create_database("shop").await.expect("a database");
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let stage = Stage::on(database, own_vhost().await, SETUP).await;
    let relay = stage.start().await;
    // One has written much of the outbox, one something else, one is prepared.
    let (open, other) = (stage.database.connect().await, stage.database.connect().await);
    let many = "SELECT watership.emit('order', '2', 'open', '1') FROM generate_series(1, 3000)";
    open.batch_execute(&format!("BEGIN; {many}")).await.expect("it stays open");
    other.batch_execute("CREATE TABLE x (n int); BEGIN; INSERT INTO x VALUES (1)").await.unwrap();
    let prepare = format!("BEGIN; {}; PREPARE TRANSACTION 'p'", emit("prepared"));
    stage.execute(&prepare).await;
    for n in 1..=3 {
        stage.execute(&emit(&format!("n{n}"))).await;
        arrived(&stage, n).await;
    }
    // Neither is a restart held up, nor do they get lost in it.
    relay.stop().await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("COMMIT PREPARED 'p'").await;
    assert_eq!(arrived(&stage, 4).await, ["n1", "n2", "n3", "prepared"]);
    open.batch_execute("COMMIT").await.expect("it commits");
    assert_eq!(stage.settled().await.len(), 3004);
    other.batch_execute("ROLLBACK").await.expect("it ends");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn many_transactions_that_commit_in_another_order_than_they_began_all_arrive() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    let mut sessions = Vec::new();
    for n in 0..20 {
        let session = stage.database.connect().await;
        let begin = format!("BEGIN; SELECT watership.emit('order', '{n}', 'a', '1')");
        session.batch_execute(&begin).await.expect("it stays open");
        sessions.push(session);
    }
    // Every third is rolled back; the others commit from the last to the first.
    for (n, session) in sessions.iter().enumerate().rev() {
        let end = match n % 3 {
            0 => "ROLLBACK".to_owned(),
            _ => format!("SELECT watership.emit('order', '{n}', 'b', '1'); COMMIT"),
        };
        session.batch_execute(&end).await.expect("it ends");
    }
    let messages = stage.settled().await;
    assert_eq!(messages.len(), 13 * 2);
    for n in (0..20).filter(|n| n % 3 != 0) {
        let key = format!("order/{n}");
        let of_key = messages.iter().filter(|message| message.text("ws-key") == key);
        let kinds: Vec<&str> = of_key.map(|message| message.kind()).collect();
        assert_eq!(kinds, ["a", "b"], "{key}");
    }
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn of_two_pollers_one_publishes_and_the_other_takes_over_when_it_dies() {
    let stage = Stage::new(SETUP).await;
    let first = stage.start().await;
    let second = stage.spawn_second();
    until("the second one is on standby", async || second.status().await["state"] == "standing_by")
        .await;
    for n in 1..=50 {
        stage.execute(&emit(&n.to_string())).await;
    }
    assert_eq!(stage.settled().await.len(), 50, "each once");
    first.kill();
    until("the second one works", async || second.get("/readyz").await.0 == 200).await;
    stage.execute(&emit("last")).await;
    assert_eq!(stage.settled().await.len(), 51);
    second.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_poller_whose_checkpoint_was_taken_over_stores_no_batch_and_publishes_nothing() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    stage.execute(&emit("before")).await;
    stage.settled().await;
    // Another relay, on another broker, would do this.
    stage
        .execute(&format!(
            "BEGIN; UPDATE watership.checkpoint SET session_no = session_no + 1; {}; COMMIT",
            emit("after")
        ))
        .await;
    until("it notices", async || relay.status().await["sessions"].as_u64() > Some(1)).await;
    // The same process takes it back, and the batch is made once.
    assert_eq!(kinds(&stage.settled().await), ["before", "after"]);
    relay.stop().await.expect_code(0).expect_text(&["another relay has taken over"]);
}

#[tokio::test]
async fn an_idle_poller_writes_nothing_and_its_looks_become_rare() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    stage.settled().await;
    let sql = "(SELECT string_agg(c.xmin::text, ',') FROM watership.checkpoint AS c) || \
        (SELECT string_agg(b.xmin::text || b.number, ',') FROM watership.poll_batch AS b)";
    let before = stage.text(sql).await;
    let polls = async || relay.metric("watership_polls_total").await.unwrap_or_default();
    let begun = polls().await;
    until("it looks again and again", async || polls().await > begun + 30.0).await;
    assert_eq!(stage.text(sql).await, before);
    let status = relay.status().await;
    assert_eq!(status["poll"]["backlog_age_seconds"], 0.0, "{status}");
    assert_eq!(status["poll"]["batch"], status["poll"]["settled_batch"], "{status}");
    assert!(status["flush_lsn"].is_null() && status["slot"].is_null(), "{status}");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn old_batches_are_removed_once_they_are_passed() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    for n in 1..=30 {
        stage.execute(&emit(&n.to_string())).await;
        arrived(&stage, n).await;
    }
    stage.settled().await;
    let one_more = async || {
        stage.execute(&emit("more")).await;
        stage.settled().await;
        stage.text("SELECT count(*) FROM watership.poll_batch").await == "2"
    };
    until("only the last two are left", one_more).await;
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn find_and_the_commands_know_what_a_poller_has_settled() {
    let stage = Stage::new(SETUP).await;
    stage.execute(&emit("waiting")).await;
    stage.run(&["find", "--key", "order/1"]).await.expect_code(0).expect_text(&["not passed"]);
    let relay = stage.start().await;
    stage.settled().await;
    stage.run(&["find", "--key", "order/1"]).await.expect_code(0).expect_text(&["passed: it was"]);
    stage.run(&["status"]).await.expect_code(0).expect_text(&["batch", "backlog", "streaming"]);
    stage.run(&["check"]).await.expect_text(&["watership.outbox has what polling needs"]);
    relay.stop().await.expect_code(0);
    stage.run(&["drop", "--yes", "--admin-url", &stage.database.url]).await.expect_code(0);
    assert!(stage.holds("NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'watership')").await);
}

#[tokio::test]
async fn partitions_go_only_when_pollers_and_readers_of_the_wal_have_passed_them() {
    let stage = Stage::new(SETUP).await;
    let old = "SET ROLE watership_owner; \
        CREATE TABLE watership.outbox_20200101 PARTITION OF watership.outbox \
            FOR VALUES FROM ('2020-01-01 00:00+00') TO ('2020-01-02 00:00+00'); RESET ROLE";
    let row = |at: &str, kind: &str| {
        format!(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, \
             created_at) VALUES ('order', '1', '{kind}', '1', '{at}')"
        )
    };
    stage.execute(old).await;
    let (day, no_day) = (row("2020-01-01 12:00+00", "old"), row("2019-01-01 12:00+00", "default"));
    stage.execute(&format!("{day}; {no_day}")).await;
    let maintain = async || {
        for _ in 0..8 {
            stage.execute("SELECT watership.maintain('1 day')").await;
        }
        stage
            .text(
                "SELECT (SELECT count(*) FROM watership.outbox) || ' ' || \
            (to_regclass('watership.outbox_20200101') IS NULL)",
            )
            .await
    };
    assert_eq!(maintain().await, "2 false", "nobody has read them");
    let postponed = "SELECT postponed[1] FROM watership.maintain('1 day')";
    assert!(stage.text(postponed).await.contains("has not read all of it"));
    // A transaction that is open has one that is not there yet.
    let open = stage.database.connect().await;
    open.batch_execute(&format!("BEGIN; {}", row("2019-01-02 12:00+00", "open"))).await.unwrap();
    let relay = stage.start().await;
    assert_eq!(kinds(&stage.settled().await), ["old", "default"]);
    // A relay that reads the WAL beside it holds them, as long as it has not passed them.
    stage
        .execute(
            "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, slot, \
             system_identifier, timeline, publication, publication_oid) \
             VALUES ('wal', 0, 1, 0, 1, 's', '1', 1, 'p', 1)",
        )
        .await;
    open.batch_execute("COMMIT").await.expect("it commits");
    let fences = "(SELECT count(*) FROM watership.outbox WHERE aggregate_type = 'fence')";
    let count = format!("(SELECT count(*) FROM watership.outbox) - {fences}");
    assert_eq!(kinds(&stage.settled().await), ["old", "default", "open"]);
    maintain().await;
    assert_eq!(stage.text(&count).await, "2", "the day is detached, the default has its two");
    assert!(stage.holds("to_regclass('watership.outbox_20200101') IS NOT NULL").await);
    stage
        .execute(
            "UPDATE watership.checkpoint SET flush_mark = 1::bigint << 62 \
        WHERE name = 'wal'",
        )
        .await;
    maintain().await;
    assert_eq!(stage.text(&count).await, "0", "all have passed them");
    assert!(stage.holds("to_regclass('watership.outbox_20200101') IS NULL").await);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn dead_rows_that_cannot_be_removed_are_not_read_by_a_look() {
    let stage = Stage::new(SETUP).await;
    let relay = stage.start().await;
    // An old snapshot keeps what is deleted.
    let old = stage.database.connect().await;
    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
    stage
        .execute(
            "ALTER TABLE watership.outbox DISABLE TRIGGER ALL; \
             INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
             SELECT 'fence', '1', 'dead', '1' FROM generate_series(1, 20000)",
        )
        .await;
    stage.settled().await;
    stage.execute("DELETE FROM watership.outbox").await;
    stage.execute(&emit("one")).await;
    assert_eq!(kinds(&stage.settled().await), ["one"]);
    let base = stage.text("SELECT snapshot FROM watership.poll_batch ORDER BY number DESC LIMIT 1");
    let base = base.await;
    stage.execute(&emit("two")).await;
    // As EXPLAIN sees the pages that one look touches: far fewer than the dead rows have.
    let buffers = |sql: String| {
        let stage = &stage;
        async move {
            let sql = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}");
            let row = stage.sql.query_one(&sql, &[]).await.expect("a plan");
            let plan: serde_json::Value = row.get(0);
            let plan = &plan[0]["Plan"];
            let blocks = |what: &str| plan[what].as_u64().expect("a count");
            blocks("Shared Hit Blocks") + blocks("Shared Read Blocks")
        }
    };
    let look = format!("SELECT * FROM watership.poll_look('{base}')");
    buffers(look.clone()).await;
    let touched = buffers(look).await;
    let pages = stage.text(
        "SELECT sum(pg_relation_size(relid))::bigint / 8192 \
            FROM pg_partition_tree('watership.outbox')",
    );
    let pages: u64 = pages.await.parse().expect("a number");
    assert!(touched * 2 < pages, "{touched} of {pages} pages");
    old.batch_execute("COMMIT").await.expect("it ends");
    relay.stop().await.expect_code(0);
}

/// PgBouncer in transaction mode, with fewer connections than its clients have.
pub struct Pooler {
    pub url: String,
    _process: Process,
}

impl Pooler {
    pub async fn before(port: u16, database: &str, role: &str) -> Self {
        let own = dev::free_port().expect("a free port");
        let folder = dev::home().expect("a temporary directory");
        let ini = folder.join(format!("pgbouncer-{own}.ini"));
        let users = folder.join(format!("pgbouncer-{own}.users"));
        std::fs::write(&users, format!("\"{role}\" \"\"\n")).expect("a file of ours");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {own}\nauth_type = trust\nauth_file = {}\nunix_socket_dir =\n\
             pool_mode = transaction\ndefault_pool_size = 2\n{}",
            users.display(),
            if nix_is_root() { "user = postgres\n" } else { "" },
        );
        std::fs::write(&ini, text).expect("a file of ours");
        let mut command = Command::new("pgbouncer");
        command.arg(&ini);
        let process = Process::spawn("PgBouncer", command, &ini.with_extension("log"));
        let process = process.expect("pgbouncer starts: scripts/install fault-tools");
        until("the pooler listens", async || TcpStream::connect(("127.0.0.1", own)).await.is_ok())
            .await;
        let url = format!("postgres://{role}@127.0.0.1:{own}/{database}");
        Self { url, _process: process }
    }
}

fn nix_is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

#[tokio::test]
async fn polling_works_through_a_pooler_in_transaction_mode_by_a_role_that_may_not_replicate() {
    if Command::new("pgbouncer").arg("--version").output().is_err() {
        println!("pgbouncer is missing: scripts/install fault-tools");
        return;
    }
    let server = private_postgres(&["wal_level = replica"], None).await;
    server.create_database("shop").await.expect("a database");
    let database = Database { url: server.url("postgres", "shop"), name: "shop".into() };
    let pooler = Pooler::before(server.port(), "shop", "poller").await;
    let settings = format!("{POLL}\n{}", crate::parking::SMALL);
    let setup = Setup {
        sql: "CREATE ROLE poller LOGIN",
        source_url: &pooler.url,
        settings: &settings,
        ..SETUP
    };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let relay = stage.start().await;
    for round in 0..3 {
        stage
            .execute(
                "SELECT watership.emit('order', (n % 7)::text, 'e', '1') \
                 FROM generate_series(1, 3000) AS n",
            )
            .await;
        assert_eq!(stage.settled().await.len(), (round + 1) * 3000);
    }
    crate::parking::emit_large(&stage, "order", "1", "large").await;
    crate::parking::until_rows(&stage, &["parked too_large"]).await;
    stage.run(&["parked", "discard", "--all", "--reason", "a test"]).await;
    stage.run(&["find", "--key", "order/3"]).await.expect_code(0).expect_text(&["passed: it was"]);
    stage.run(&["check"]).await.expect_text(&["has what polling needs", "at batch"]);
    relay.stop().await.expect_code(0);
    // Another process meets the server connections that this one has used.
    let relay = stage.start().await;
    stage.execute(&emit("again")).await;
    assert!(stage.settled().await.iter().any(|message| message.kind() == "again"));
    relay.stop().await.expect_code(0);
}
