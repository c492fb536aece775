//! What makes a relay end by itself: the exit code, and a text that says what to do.

use watership::dev::StopMode;

use super::sources::POLL;
use crate::support::inbox::kinds;
use crate::support::servers::{database_of, own_database, own_vhost, postgres, private_postgres};
use crate::support::stage::{Setup, Stage, configuration, run};
use crate::support::waiting::until;

const TEXT: &str = "SELECT watership.emit('t', '1', 'e', '1')";

#[tokio::test]
async fn a_slot_that_somebody_else_advanced_is_a_verdict_that_names_the_gap() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute(TEXT).await;
    let stored = stage.text("SELECT flush_lsn FROM watership.checkpoint").await;
    let slot = &stage.slot;
    let advance = format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_lsn())");
    stage.execute(&advance).await;
    let now = stage.confirmed_flush().await;
    let texts = [
        &*format!("slot \"{slot}\" is at {now}, ahead of the checkpoint at {stored}"),
        &*format!("events committed between {stored} and {now} may not have been published"),
    ];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    assert!(stage.inbox.flush(&stage.channel, "all").await.is_empty());
}

/// <https://github.com/debezium/debezium/pull/3970>
#[tokio::test]
async fn museum_m04_a_slot_that_was_made_anew_is_a_verdict() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute(TEXT).await;
    let slot = &stage.slot;
    stage.execute(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
    let make = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    stage.execute(&make).await;
    stage.spawn().ended().await.expect_code(3).expect_text(&["ahead of the checkpoint"]);
}

#[tokio::test]
async fn a_missing_checkpoint_is_the_same_verdict_everywhere_and_init_says_what_is_known() {
    for settings in ["", POLL] {
        let stage = Stage::new(Setup { settings, ..Setup::default() }).await;
        let relay = stage.start().await;
        stage.execute(TEXT).await;
        assert_eq!(kinds(&stage.settled().await), ["e"]);
        relay.stop().await.expect_code(0);
        stage.execute("DELETE FROM watership.checkpoint").await;
        for command in ["run", "check", "resync"] {
            let ended = stage.run(&[command]).await;
            ended.expect_code(3).expect_text(&["checkpoint_missing: ", "watership init"]);
        }
        let refused = stage.run(&["init"]).await;
        refused.expect_code(1).expect_text(&["--skip-existing"]);
        let told = match settings {
            "" => "it is not known whether they already were",
            _ => "any not published yet never will be",
        };
        refused.expect_text(&[told]);
        stage.run(&["init", "--skip-existing"]).await.expect_code(0);
        stage.run(&["check"]).await.expect_code(0);
    }
}

#[tokio::test]
async fn a_role_that_may_not_log_in_is_told_so() {
    let database = own_database().await;
    let role = format!("{}_relay", database.name);
    let sql = format!("CREATE ROLE {role} LOGIN REPLICATION");
    let source_url = &postgres().await.url(&role, &database.name);
    let stage =
        Stage::on(database, own_vhost().await, Setup { sql: &sql, source_url, ..Setup::default() });
    let stage = stage.await;
    stage.execute(&format!("ALTER ROLE {role} NOLOGIN")).await;
    let told = ["is not permitted to log in", "ALTER ROLE ... LOGIN"];
    let ended = stage.run(&["check"]).await;
    ended.expect_code(1).expect_text(&told);
    assert!(!ended.log.contains("check user and password"), "{}", ended.log);
}

#[tokio::test]
async fn a_slot_dropped_under_a_running_relay_is_a_verdict() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    let slot = &stage.slot;
    let pid = format!("SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{slot}'");
    let drop = format!(
        "DO $$ BEGIN LOOP BEGIN PERFORM pg_terminate_backend(({pid})), \
         pg_drop_replication_slot('{slot}'); EXIT; EXCEPTION WHEN object_in_use THEN NULL; END; \
         END LOOP; END $$"
    );
    stage.execute(&drop).await;
    let texts = [&*format!("replication slot \"{slot}\" does not exist")];
    relay.ended().await.expect_code(3).expect_text(&texts);
}

#[tokio::test]
async fn a_dropped_publication_is_a_verdict_before_and_while_it_runs() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    stage.execute(TEXT).await;
    stage.settled().await;
    stage.execute("DROP PUBLICATION watership").await;
    stage.execute(TEXT).await;
    relay.ended().await.expect_code(3).expect_text(&["\"watership\"", "hint: "]);
    let texts = ["publication \"watership\" does not exist", "decide whether to accept the gap"];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    assert_eq!(stage.inbox.flush(&stage.channel, "all").await.len(), 1);
}

#[tokio::test]
async fn events_of_a_time_without_publication_are_a_verdict_even_when_it_is_back() {
    let stage = Stage::new(Setup::default()).await;
    let emit = |kind: &str| format!("SELECT watership.emit('t', '1', '{kind}', '1')");
    let relay = stage.start().await;
    stage.execute(&emit("before")).await;
    stage.settled().await;
    relay.stop().await.expect_code(0);
    // The database's own preference must not silence the server's warning (Postgres 18).
    let quiet = format!("ALTER DATABASE {} SET client_min_messages = error", stage.database.name);
    stage.execute(&quiet).await;
    stage.execute("DROP PUBLICATION watership").await;
    stage.execute(&emit("lost")).await;
    stage.run(&["init"]).await.expect_code(0);
    stage.execute(&emit("after")).await;
    for _ in 0..2 {
        stage.spawn().ended().await.expect_code(3).expect_text(&["\"watership\"", "hint: "]);
    }
    let got = stage.inbox.flush(&stage.channel, "all").await;
    assert_eq!(kinds(&got), ["before"]);
}

#[tokio::test]
async fn a_server_set_back_to_wal_level_replica_is_a_verdict() {
    let mut server = private_postgres(&[], None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    stage.execute(&format!("SELECT pg_drop_replication_slot('{}')", stage.slot)).await;
    server.append("postgresql.conf", "wal_level = replica\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts");
    let texts = ["wal_level is \"replica\"", "ALTER SYSTEM SET wal_level = 'logical'"];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
}

#[tokio::test]
async fn another_cluster_behind_the_url_is_a_verdict() {
    let server = private_postgres(&[], None).await;
    let stage = Stage::on(database_of(&server), own_vhost().await, Setup::default()).await;
    let identifier = stage.text("SELECT system_identifier FROM pg_control_system()").await;
    stage.execute("UPDATE watership.checkpoint SET system_identifier = '42'").await;
    let texts = ["this is another cluster", &identifier, "not 42"];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
}

#[tokio::test]
async fn a_wrong_password_ends_the_first_start_with_a_hint() {
    let line = |user: &str, method: &str| format!("host all {user} 127.0.0.1/32 {method}");
    let hba = vec![line("postgres", "trust"), line("relay", "scram-sha-256")];
    let server = private_postgres(&["password_encryption = 'scram-sha-256'"], Some(hba)).await;
    server.execute("CREATE ROLE relay LOGIN REPLICATION PASSWORD 'right'").await.expect("a role");
    let url = format!("postgres://relay:wrong-canary@127.0.0.1:{}/postgres", server.port());
    let setup = Setup { source_url: &url, ..Setup::default() };
    let (file, _) = configuration("", "shop", &own_vhost().await, &setup);
    let ended = run(&file, &["run"]).await;
    ended.expect_code(1).expect_text(&["password", "\"relay\"", "hint"]);
    assert!(!ended.log.contains("wrong-canary"), "{}", ended.log);
}

#[tokio::test]
async fn scram_over_verified_tls_carries_events_for_a_role_that_owns_nothing() {
    let hba = vec![
        "host all postgres 127.0.0.1/32 trust".into(),
        "hostssl all relay 127.0.0.1/32 scram-sha-256".into(),
    ];
    let mut server = private_postgres(&["password_encryption = 'scram-sha-256'"], Some(hba)).await;
    let [ca, ..] = crate::pg_wire::certify(&server, &rcgen::PKCS_ECDSA_P256_SHA256);
    server.append("postgresql.conf", "ssl = on\n").expect("conf");
    server.stop(StopMode::Fast).await.expect("stops");
    server.start_again().await.expect("starts with TLS");
    server.execute("CREATE ROLE relay LOGIN REPLICATION PASSWORD 'secret'").await.expect("a role");
    let url = format!(
        "postgres://relay:secret@localhost:{}/postgres?sslmode=verify-full&sslrootcert={}",
        server.port(),
        ca.display()
    );
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY)";
    let tables = ["public.items"];
    let setup = Setup { sql, tables: &tables, source_url: &url, ..Setup::default() };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let relay = stage.start().await;
    let secure = "(SELECT bool_and(ssl) AND count(*) > 1 FROM pg_stat_ssl JOIN pg_stat_activity \
        USING (pid) WHERE usename = 'relay')";
    until("all its sessions use TLS", async || stage.holds(secure).await).await;
    stage.execute(TEXT).await;
    stage.execute("INSERT INTO items VALUES (1)").await;
    assert_eq!(kinds(&stage.settled().await), ["e", "public.items.insert"]);
    relay.stop().await.expect_code(0);
}
