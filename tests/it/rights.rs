//! What the relay's role may do and see of the relay's own tables.

use crate::support::inbox::kinds;
use crate::support::servers::{own_database, own_vhost, postgres};
use crate::support::stage::{Setup, Stage};
use crate::support::waiting::until;

/// A stage whose relay has a role that owns nothing; with the role's name.
async fn stage_of_a_role(settings: &str) -> (Stage, String) {
    let database = own_database().await;
    let role = format!("{}_relay", database.name);
    let sql = format!("CREATE ROLE {role} LOGIN REPLICATION");
    let source_url = &postgres().await.url(&role, &database.name);
    let setup = Setup { sql: &sql, source_url, settings, ..Setup::default() };
    (Stage::on(database, own_vhost().await, setup).await, role)
}

fn emit(key: &str, event: &str, headers: &str) -> String {
    format!("SELECT watership.emit('t', '{key}', '{event}', '1', {headers})")
}

/// Too large for the broker, so that it is parked.
const SMALL: &str = "broker.max_message_size = \"1KiB\"\nrelay.checkpoint_interval = \"20ms\"";

fn emit_large(key: &str, event: &str) -> String {
    format!("SELECT watership.emit('t', '{key}', '{event}', to_json(repeat('x', 2000)))")
}

#[tokio::test]
async fn a_table_whose_rows_are_hidden_from_the_relay_refuses_check_init_and_start() {
    let (stage, _) = stage_of_a_role("").await;
    for table in ["parked", "checkpoint", "publication_seen", "described", "canary"] {
        let hide = format!("ALTER TABLE watership.{table} ENABLE ROW LEVEL SECURITY");
        stage.execute(&hide).await;
        let told = format!("row-level security of watership.{table} applies to role");
        let remedy = format!("ALTER TABLE watership.{table} DISABLE ROW LEVEL SECURITY");
        let texts = [&*told, &*remedy, "BYPASSRLS"];
        for command in ["check", "init", "run"] {
            stage.run(&[command]).await.expect_code(1).expect_text(&texts);
        }
        stage.execute(&hide.replace("ENABLE", "DISABLE")).await;
    }
    for table in ["migration", "resync"] {
        let hide = format!("ALTER TABLE watership.{table} ENABLE ROW LEVEL SECURITY");
        stage.execute(&hide).await;
        let told = format!("row-level security of watership.{table} applies to role");
        stage.run(&["check"]).await.expect_code(1).expect_text(&[&told]);
        stage.execute(&hide.replace("ENABLE", "DISABLE")).await;
    }
    stage.run(&["check"]).await.expect_code(0);
}

#[tokio::test]
async fn an_outbox_whose_policies_admit_no_insert_is_a_problem_and_one_that_admits_it_is_not() {
    let (stage, _) = stage_of_a_role("").await;
    stage.execute("ALTER TABLE watership.outbox ENABLE ROW LEVEL SECURITY").await;
    let told = ["row-level security policy on watership.outbox", "CREATE POLICY emit"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    let policy = "CREATE POLICY emit ON watership.outbox FOR INSERT TO watership_app \
        WITH CHECK (true)";
    stage.execute(policy).await;
    stage.run(&["check"]).await.expect_code(0);
}

#[tokio::test]
async fn a_parked_row_that_is_hidden_while_the_relay_runs_is_never_overtaken() {
    let (stage, role) = stage_of_a_role(SMALL).await;
    let relay = stage.start().await;
    stage.execute(&emit_large("2", "first")).await;
    let waiting = "(SELECT count(*) FROM watership.parked WHERE state = 'parked') = 1";
    until("it is parked", async || stage.holds(waiting).await).await;
    stage.execute("ALTER TABLE watership.parked ENABLE ROW LEVEL SECURITY").await;
    let refused = async || {
        let text = relay.status().await["last_error"]["error"].to_string();
        text.contains("row-level security")
    };
    until("the relay says so", refused).await;
    stage.execute(&emit("2", "second", "NULL")).await;
    stage.execute(&emit("3", "other", "NULL")).await;
    assert!(kinds(&stage.settled_now().await).is_empty());
    stage.execute(&format!("ALTER ROLE {role} BYPASSRLS")).await;
    let got = stage.settled().await;
    assert_eq!(kinds(&got), ["other"], "the key of the parked row waits behind it");
    let waiting = "(SELECT count(*) FROM watership.parked WHERE state = 'parked') = 2";
    assert!(stage.holds(waiting).await);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn too_few_connections_of_the_role_are_a_problem() {
    let (stage, role) = stage_of_a_role("").await;
    stage.execute(&format!("ALTER ROLE {role} CONNECTION LIMIT 4")).await;
    let told = ["may have 4 connections, the relay needs 5", "CONNECTION LIMIT -1"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
    stage.execute(&format!("ALTER ROLE {role} CONNECTION LIMIT 5")).await;
    stage.run(&["check"]).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('order', '1', 'placed', '{}')").await;
    stage.inbox.count(1).await;
    stage.run(&["check"]).await.expect_code(0);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_role_with_no_more_rights_than_it_needs_stores_the_canary_with_its_checkpoint() {
    let settings = "relay.canary_interval = \"1s\"\nrelay.checkpoint_interval = \"20ms\"";
    let (stage, _) = stage_of_a_role(settings).await;
    let relay = stage.start().await;
    let stored = "(SELECT canary > 1 AND canary_lsn > '0/0' FROM watership.checkpoint)";
    until("the second canary is stored", async || {
        // A canary alone is not progress.
        stage.execute(&emit("1", "placed", "NULL")).await;
        stage.holds(&format!("coalesce({stored}, false)")).await
    })
    .await;
    assert_eq!(relay.metric("watership_sessions_total").await, Some(1.0));
    relay.stop().await.expect_code(0);
    let column = "watership.checkpoint FROM watership_relay";
    stage.execute(&format!("REVOKE UPDATE (canary) ON {column}")).await;
    let told = ["lacks UPDATE on watership.checkpoint"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
}

#[tokio::test]
async fn what_the_relay_lacks_refuses_check_init_and_start_and_says_what_to_do() {
    let (stage, _) = stage_of_a_role("").await;
    for (privilege, table) in [
        ("INSERT", "parked"),
        ("SELECT", "parked"),
        ("UPDATE", "canary"),
        ("INSERT", "described"),
        ("UPDATE", "publication_seen"),
        ("UPDATE", "checkpoint"),
    ] {
        let revoke = format!("REVOKE {privilege} ON watership.{table} FROM watership_relay");
        stage.execute(&revoke).await;
        let told = format!("lacks {privilege} on watership.{table}");
        let remedy = format!("GRANT {privilege} ON watership.{table} TO watership_relay");
        for command in ["check", "init", "run"] {
            stage.run(&[command]).await.expect_code(1).expect_text(&[&told, &remedy]);
        }
        stage.execute(&remedy).await;
    }
    for table in ["parked", "backfill", "described"] {
        stage.execute(&format!("ALTER TABLE watership.{table} RENAME TO away")).await;
        let told = format!("table watership.{table} does not exist");
        for command in ["check", "init", "run"] {
            stage.run(&[command]).await.expect_code(3).expect_text(&[&told, "restore it"]);
        }
        stage.execute(&format!("ALTER TABLE watership.away RENAME TO {table}")).await;
    }
    let revoke = "REVOKE EXECUTE ON FUNCTION watership.maintain(interval) FROM watership_relay";
    stage.execute(revoke).await;
    let told = ["lacks EXECUTE on FUNCTION watership.maintain(interval)"];
    stage.run(&["check"]).await.expect_code(1).expect_text(&told);
}
