//! Servers that are set up differently than a developer's own: by a hosting service, read-only,
//! with synchronous standbys, or in another encoding.

use super::sources::POLL;
use crate::support::inbox::kinds;
use crate::support::servers::{Database, database_of, own_database, own_vhost, postgres};
use crate::support::servers::{own_postgres, private_postgres};
use crate::support::stage::{Setup, Stage, configuration, run};
use crate::support::waiting::until;

fn emit(kind: &str) -> String {
    format!("SELECT watership.emit('t', '1', '{kind}', '1')")
}

/// A database of this encoding on the shared server.
pub async fn database_in(encoding: &str) -> Database {
    let server = postgres().await;
    let name = format!("{}_{}", own_database().await.name, encoding.to_lowercase());
    let sql = format!(
        "CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' \
         TEMPLATE template0"
    );
    server.execute(&sql).await.expect("a database");
    Database { url: server.url("postgres", &name), name }
}

#[tokio::test]
async fn init_works_in_every_encoding_and_check_says_what_may_happen() {
    for encoding in ["LATIN1", "LATIN9", "WIN1252", "EUC_JP"] {
        let stage =
            Stage::on(database_in(encoding).await, own_vhost().await, Setup::default()).await;
        let told = [&*format!("the encoding of the database is {encoding}"), "only UTF8 is safe"];
        stage.run(&["check"]).await.expect_code(0).expect_text(&told);
        let relay = stage.start().await;
        let umlaut = "SELECT watership.emit('t', 'k\u{e4}', 'e', '\"\u{e4}\"')";
        if encoding != "EUC_JP" {
            stage.execute(umlaut).await;
            let got = stage.settled().await;
            assert_eq!(got[0].body, "\"\u{e4}\"");
        }
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_byte_that_is_not_a_character_is_a_verdict_and_resync_continues_past_it() {
    let sql = "CREATE TABLE public.t (id int PRIMARY KEY, v text)";
    let setup = Setup { sql, tables: &["public.t"], ..Setup::default() };
    let stage = Stage::on(database_in("WIN1252").await, own_vhost().await, setup).await;
    stage.execute("INSERT INTO public.t VALUES (1, 'fine'), (2, chr(129))").await;
    let texts = ["row_unsendable: ", "encoding UTF8", "watership resync"];
    stage.spawn().ended().await.expect_code(3).expect_text(&texts);
    stage.execute("UPDATE public.t SET v = 'fine' WHERE id = 2").await;
    let arguments = ["resync", "--accept-gap", "--reason", "a test", "--from", "now", "--anyway"];
    stage.run(&arguments).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute(&emit("after")).await;
    assert!(kinds(&stage.settled().await).contains(&"after"));
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_polled_row_that_cannot_be_sent_has_only_to_be_corrected() {
    let setup = Setup { settings: POLL, ..Setup::default() };
    let stage = Stage::on(database_in("WIN1252").await, own_vhost().await, setup).await;
    stage.execute("SELECT watership.emit('t', '1', 'e', '\"' || chr(129) || '\"')").await;
    let ended = stage.spawn().ended().await;
    ended.expect_code(3).expect_text(&["row_unsendable: ", "correct the row", "start again"]);
    assert!(!ended.log.contains("watership resync"), "{}", ended.log);
    stage.execute("UPDATE watership.outbox SET payload = '\"fine\"'").await;
    let relay = stage.start().await;
    assert_eq!(stage.settled().await[0].body, "\"fine\"");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn limits_count_the_bytes_of_the_message_in_every_encoding() {
    let stage = Stage::on(database_in("LATIN1").await, own_vhost().await, Setup::default()).await;
    let long = |count: usize| "\u{e4}".repeat(count);
    let kinds_of = |kind, event| format!("'{}', '1', '{}', '1'", long(kind), long(event));
    let id_of = |count| format!("'t', '{}', 'e', '1'", long(count));
    for (most, more) in [(kinds_of(60, 67), kinds_of(60, 68)), (id_of(512), id_of(513))] {
        for name in ["emit", "emit_wal"] {
            stage.execute(&format!("SELECT watership.{name}({most})")).await;
            let refused =
                stage.sql.batch_execute(&format!("SELECT watership.{name}({more})")).await;
            let error = refused.expect_err(name);
            assert_eq!(error.code().map(|code| code.code()), Some("23514"), "{error:?}");
        }
    }
    let typed =
        |count: usize| format!("SELECT watership.emit_bytes('t', '1', 'e', '', '{}')", long(count));
    stage.execute(&typed(127)).await;
    stage.sql.batch_execute(&typed(128)).await.expect_err("256 bytes");
    let traced = |count: usize| {
        let headers = format!("{{\"traceparent\": \"{}\"}}", long(count));
        format!("SELECT watership.emit('t', '1', 'e', '1', '{headers}')")
    };
    stage.execute(&traced(127)).await;
    stage.sql.batch_execute(&traced(128)).await.expect_err("256 bytes");
    let relay = stage.start().await;
    assert_eq!(stage.settled().await.len(), 6, "and what was taken is sent");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_database_that_is_read_only_by_default_still_gets_its_checkpoint() {
    let stage = Stage::new(Setup::default()).await;
    let name = &stage.database.name;
    stage.execute(&format!("ALTER DATABASE {name} SET default_transaction_read_only = on")).await;
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    assert_eq!(kinds(&stage.settled().await), ["one"], "and the checkpoint has passed it");
    let told = ["default_transaction_read_only is on", "the relay's own sessions turn it off"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    relay.stop().await.expect_code(0);
}

/// For a superuser, and for a role that may not see whether it was chosen.
#[tokio::test]
async fn commits_that_wait_for_the_relay_as_a_synchronous_standby_end() {
    commits_end("postgres").await;
    commits_end("relay").await;
}

async fn commits_end(role: &str) {
    let server = private_postgres(&[], None).await;
    server.execute("CREATE ROLE relay LOGIN REPLICATION").await.expect("a role");
    let sql = "CREATE TABLE public.unpublished (id int)";
    // Without a canary, which is itself a commit, nothing else would end them.
    let settings = "relay.canary_interval = \"1h\"\nrelay.idle_interval = \"1h\"";
    let database = database_of(&server);
    let source_url = database.url.replacen("postgres@", &format!("{role}@"), 1);
    let setup = Setup { sql, settings, source_url: &source_url, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let relay = stage.start().await;
    stage.execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
    stage.execute("SELECT pg_reload_conf()").await;
    let chosen = "(SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync') = 1";
    until("the server counts the relay among its standbys", async || stage.holds(chosen).await)
        .await;
    let told = ["synchronous_standby_names = \"*\" can choose the relay"];
    stage.run(&["check"]).await.expect_code(0).expect_text(&told);
    for _ in 0..3 {
        let insert = stage.execute("INSERT INTO public.unpublished VALUES (1)");
        let limit = crate::support::waiting::LIMIT;
        tokio::time::timeout(limit, insert).await.expect("a commit that no event needs ends");
    }
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn init_and_check_advise_what_the_hosting_service_allows() {
    let server = own_postgres(&[]).await;
    let url = server.url("postgres", "shop");
    let relay = server.url("relay", "shop");
    for sql in
        ["CREATE ROLE relay LOGIN", "CREATE ROLE rds_superuser", "CREATE ROLE rds_replication"]
    {
        server.execute(sql).await.expect(sql);
    }
    let database = Database { url: url.clone(), name: "shop".into() };
    let setup = Setup { source_url: &relay, ..Setup::default() };
    let (file, _) = configuration(&database.url, "slot_shop", &own_vhost().await, &setup);
    let told = ["may not replicate", "GRANT rds_replication TO \"relay\""];
    run(&file, &["init", "--admin-url", &url]).await.expect_code(1).expect_text(&told);
    run(&file, &["check"]).await.expect_code(1).expect_text(&told);
    let told = ["role \"relay\" needs the right to replicate"];
    server.execute("ALTER ROLE relay REPLICATION").await.expect("the right");
    run(&file, &["init", "--admin-url", &url]).await.expect_code(0);
    run(&file, &["check"]).await.expect_code(0);
    server.execute("ALTER ROLE relay NOREPLICATION").await.expect("no right");
    run(&file, &["run"]).await.expect_code(1).expect_text(&told);
}
