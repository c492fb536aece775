//! `watership drop`, and `init --print-sql`: what comes into a database by hand, and goes again.

use std::process::Command;

use serde_json::Value;

use crate::support::inbox::kinds;
use crate::support::servers::{own_database, own_vhost, postgres};
use crate::support::stage::{Setup, Stage, configuration, run};

const TEXT: &str = "SELECT watership.emit('t', '1', 'e', '1')";

/// Slot, publication and schema that are there, in one line.
const THERE: &str = "SELECT concat_ws(',', \
    (SELECT 'slot' FROM pg_replication_slots WHERE database = current_database()), \
    (SELECT 'publication' FROM pg_publication), \
    (SELECT 'schema' FROM pg_namespace WHERE nspname = 'watership'))";

async fn there(stage: &Stage) -> String {
    stage.sql.query_one(THERE, &[]).await.expect("the catalog").get(0)
}

#[tokio::test]
async fn drop_removes_slot_publication_and_schema_and_only_when_told_to() {
    let stage = Stage::new(Setup::default()).await;
    let relay = stage.start().await;
    stage.execute(TEXT).await;
    assert_eq!(kinds(&stage.settled().await), ["e"]);
    let shown = ["would remove slot", "would remove publication", "would remove schema", "--yes"];
    stage.run(&["drop"]).await.expect_code(1).expect_text(&shown);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    let busy = ["is in use by pid", "stop the relay first"];
    stage.run(&["drop", "--yes"]).await.expect_code(1).expect_text(&busy);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    let told = ["removed slot", "removed publication", "removed schema", "kept: the roles"];
    stage.run(&["drop", "--yes", "--force"]).await.expect_code(0).expect_text(&told);
    assert_eq!(there(&stage).await, "");
    relay.ended().await.expect_code(3).expect_text(&["hint"]);
    stage.run(&["drop", "--yes"]).await.expect_code(0).expect_text(&["nothing of this relay"]);
    stage.run(&["init"]).await.expect_code(0);
    let relay = stage.start().await;
    stage.execute("SELECT watership.emit('t', '1', 'again', '1')").await;
    assert_eq!(kinds(&stage.settled().await), ["e", "again"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn drop_leaves_the_relays_beside_it_alone() {
    let stage = Stage::new(Setup::default()).await;
    let second = |text: String| {
        text.replace("name = \"shop\"", "name = \"two\"").replace("slot_db", "slot_two_db")
    };
    let own = stage.configuration();
    stage.replace_configuration(&second(own.clone()));
    stage.run(&["init", "--skip-existing"]).await.expect_code(0);
    let told = ["kept: the schema, which other relays use (shop)", "removed relay"];
    stage.run(&["drop", "--yes"]).await.expect_code(0).expect_text(&told);
    stage.replace_configuration(&own);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    let relay = stage.start().await;
    stage.execute(TEXT).await;
    assert_eq!(kinds(&stage.settled().await), ["e"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn drop_takes_nothing_of_others_along_and_leaves_no_slot_behind() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute("CREATE VIEW public.mine AS SELECT id FROM watership.outbox").await;
    let told = ["dropping the schema watership", "public.mine"];
    stage.run(&["drop", "--yes"]).await.expect_code(1).expect_text(&told);
    assert_eq!(there(&stage).await, "publication,schema", "no slot is left to fill a disk");
    stage.execute("DROP VIEW public.mine").await;
    stage.run(&["drop", "--yes"]).await.expect_code(0).expect_text(&["removed schema"]);
    assert_eq!(there(&stage).await, "");
}

#[tokio::test]
async fn drop_by_a_role_that_owns_nothing_is_refused_before_anything_goes() {
    let database = own_database().await;
    let role = format!("{}_relay", database.name);
    let sql = format!("CREATE ROLE {role} LOGIN REPLICATION");
    let source_url = &postgres().await.url(&role, &database.name);
    let setup = Setup { sql: &sql, source_url, ..Setup::default() };
    let stage = Stage::on(database, own_vhost().await, setup).await;
    let told = ["does not own the schema watership", "--admin-url"];
    stage.run(&["drop", "--yes"]).await.expect_code(1).expect_text(&told);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    let admin = stage.database.url.clone();
    stage.run(&["drop", "--yes", "--admin-url", &admin]).await.expect_code(0);
    assert_eq!(there(&stage).await, "");
}

#[tokio::test]
async fn the_printed_sql_does_what_init_does() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    client.batch_execute("CREATE TABLE public.items (id int PRIMARY KEY)").await.unwrap();
    let setup = Setup { tables: &["public.items"], ..Setup::default() };
    let slot = format!("slot_{}", database.name);
    let (file, _) = configuration(&database.url, &slot, &vhost, &setup);
    let printed = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
        command.arg("--config").arg(&file).args(["init", "--print-sql"]);
        let output = command.output().expect("it runs");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let script = printed();
    let there: String = client.query_one(THERE, &[]).await.unwrap().get(0);
    assert_eq!(there, "", "nothing was changed");
    let path = file.with_extension("sql");
    std::fs::write(&path, &script).expect("the script is written");
    let own = postgres().await.bin_dir().join("psql");
    let psql = if own.exists() { own } else { "psql".into() };
    let mut command = Command::new(psql);
    command.args(["-q", "-v", "ON_ERROR_STOP=1", "-f"]).arg(&path).arg(&database.url);
    let output = command.output().expect("psql runs");
    assert!(output.status.success(), "{output:?}\n{script}");
    let ended = run(&file, &["init", "--json"]).await;
    ended.expect_code(0);
    let json = &ended.log[ended.log.find("\n{").expect("JSON")..];
    let steps: Value = serde_json::from_str(json).expect("JSON");
    for step in steps["steps"].as_array().expect("steps") {
        // Without init the first start of the relay agrees.
        let by_run = step["what"] == "broker" || step["what"] == "agreement";
        let is_there = step["done"] == "exists" || by_run;
        assert!(is_there, "{step}");
    }
    run(&file, &["check"]).await.expect_code(0);
    let later = printed();
    assert!(!later.contains("\nCREATE "), "{later}");
}
