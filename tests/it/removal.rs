//! `watership drop`, and `init --print-sql`: what comes into a database by hand, and goes again.

use std::path::Path;
use std::process::{Command, Output};

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
async fn drop_removes_nothing_of_others_and_is_all_or_nothing() {
    let stage = Stage::new(Setup::default()).await;
    stage.execute("CREATE VIEW public.mine AS SELECT id FROM watership.outbox").await;
    let told = ["dropping the schema watership", "public.mine", "nothing was removed"];
    stage.run(&["drop", "--yes"]).await.expect_code(1).expect_text(&told);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    stage.execute("DROP VIEW public.mine").await;
    stage.run(&["drop", "--yes"]).await.expect_code(0).expect_text(&["removed schema"]);
    assert_eq!(there(&stage).await, "");
}

#[tokio::test]
async fn drop_removes_nothing_while_an_application_holds_the_outbox() {
    let stage = Stage::new(Setup::default()).await;
    let holder = stage.database.connect().await;
    holder.batch_execute(&format!("BEGIN; {TEXT}")).await.expect("an open transaction");
    let told = ["transactions that use these tables (pid ", "run `watership drop` again"];
    stage.run(&["drop", "--yes"]).await.expect_code(1).expect_text(&told);
    assert_eq!(there(&stage).await, "slot,publication,schema");
    holder.batch_execute("ROLLBACK").await.expect("its end");
    stage.run(&["drop", "--yes"]).await.expect_code(0).expect_text(&["removed slot"]);
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

/// What `init --print-sql` writes to standard output.
fn printed(file: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
    command.arg("--config").arg(file).args(["init", "--print-sql"]);
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs the script as its first line says.
async fn psql(file: &Path, url: &str, script: &str) -> Output {
    let path = file.with_extension("sql");
    std::fs::write(&path, script).expect("the script is written");
    let own = postgres().await.bin_dir().join("psql");
    let psql = if own.exists() { own } else { "psql".into() };
    let mut command = Command::new(psql);
    command.args(["-q", "-v", "ON_ERROR_STOP=1", "-f"]).arg(&path).arg(url);
    command.output().expect("psql runs")
}

#[tokio::test]
async fn what_init_refuses_is_not_printed_as_sql_either() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    let sql = "CREATE TABLE public.nopk (v text); CREATE VIEW public.seen AS SELECT * FROM nopk; \
        CREATE UNLOGGED TABLE public.fast (id int PRIMARY KEY)";
    client.batch_execute(sql).await.expect("tables");
    for (table, told) in [
        ("public.nopk", "public.nopk has no replica identity"),
        ("public.seen", "public.seen is a view"),
        ("public.fast", "public.fast is unlogged"),
        ("public.gone", "captured table public.gone does not exist"),
        ("pg_catalog.pg_class", "pg_catalog.pg_class is a system catalog"),
    ] {
        let setup = Setup { tables: &[table], ..Setup::default() };
        let (file, _) = configuration(&database.url, "slot_none", &vhost, &setup);
        for arguments in [&["init"][..], &["init", "--print-sql"]] {
            let ended = run(&file, arguments).await;
            ended.expect_code(1).expect_text(&[told]);
            assert!(!ended.log.contains("CREATE PUBLICATION"), "{}", ended.log);
        }
        if table == "public.nopk" {
            let arguments = ["init", "--print-sql", "--publish-anyway"];
            run(&file, &arguments).await.expect_code(0).expect_text(&["CREATE PUBLICATION"]);
        }
    }
}

#[tokio::test]
async fn rules_that_do_not_fit_their_table_are_refused_before_anything_is_made() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, name text, paid boolean)";
    client.batch_execute(sql).await.expect("a table");
    for (rules, told) in [
        ("filter = \"name > 3\"", "compares \"name\" (text) with a number"),
        ("filter = \"paid = 'x'\"", "compares \"paid\" (boolean) with a text"),
        ("filter = \"nmae = 'x'\"", "names column \"nmae\""),
        ("columns.hash = [\"mail\"]", "columns.hash names column \"mail\""),
        ("map.default = { paid = \"no\" }", "map.default of column \"paid\""),
    ] {
        let routes = format!(
            "[[route]]\nname = \"items\"\ntable = \"public.items\"\nexchange = \"watership\"\n\
             routing_key = \"items\"\n{rules}\n"
        );
        let setup = Setup { tables: &["public.items"], routes: &routes, ..Setup::default() };
        let (file, _) = configuration(&database.url, "slot_none", &vhost, &setup);
        for arguments in [&["init"][..], &["init", "--print-sql"], &["check"]] {
            run(&file, arguments).await.expect_code(1).expect_text(&["route \"items\"", told]);
        }
        let made = "SELECT count(*) FROM (SELECT nspname FROM pg_namespace WHERE nspname = \
            'watership' UNION ALL SELECT pubname FROM pg_publication UNION ALL SELECT slot_name \
            FROM pg_replication_slots WHERE slot_name = 'slot_none') AS made";
        let made: i64 = client.query_one(made, &[]).await.expect("it is counted").get(0);
        assert_eq!(made, 0, "{rules}");
    }
}

#[tokio::test]
async fn sql_is_printed_for_a_role_other_than_the_one_that_connects() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let role = format!("{}_relay", database.name);
    let client = database.connect().await;
    let sql = format!(
        "CREATE ROLE {role} LOGIN REPLICATION; CREATE TABLE public.items (id int PRIMARY KEY)"
    );
    client.batch_execute(&sql).await.expect("a role and a table");
    let source_url = &postgres().await.url(&role, &database.name);
    let setup = Setup { source_url, tables: &["public.items"], ..Setup::default() };
    let (file, _) = configuration(&database.url, "slot_none", &vhost, &setup);
    let told = ["does not own public.items", "CREATE PUBLICATION"];
    run(&file, &["init", "--print-sql"]).await.expect_code(0).expect_text(&told);
}

#[tokio::test]
async fn the_printed_sql_makes_no_slot_that_would_skip_rows() {
    let stage = Stage::new(Setup::default()).await;
    let drop_slot = format!("SELECT pg_drop_replication_slot('{}')", stage.slot);
    stage.execute(&drop_slot).await;
    let told = ["slot_missing", "do not recreate it by hand"];
    stage.run(&["init", "--print-sql"]).await.expect_code(3).expect_text(&told);
    stage.execute("DELETE FROM watership.checkpoint").await;

    let file = stage.config().to_owned();
    let script = printed(&file);
    stage.execute(TEXT).await;
    let told = ["watership.outbox has 1 rows that are older than the slot"];
    stage.run(&["init", "--print-sql"]).await.expect_code(1).expect_text(&told);
    let behind = script.replacen("IF EXISTS", "IF false AND EXISTS", 1);
    assert_ne!(behind, script);
    for script in [script, behind] {
        let output = psql(&file, &stage.database.url, &script).await;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains("watership.outbox has rows that are older than the slot"), "{text}");
        assert_eq!(there(&stage).await, "publication,schema", "no slot, and no checkpoint");
    }
    let skips = stage.run(&["init", "--print-sql", "--skip-existing"]).await;
    skips.expect_code(0).expect_text(&["pg_create_logical_replication_slot"]);
    assert!(!skips.log.contains("RAISE"), "{}", skips.log);
}

#[tokio::test]
async fn the_printed_sql_does_what_init_does() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    client.batch_execute("CREATE TABLE public.items (id int PRIMARY KEY)").await.unwrap();
    let setup = Setup { tables: &["public.items"], ..Setup::default() };
    let slot = format!("slot_{}", database.name);
    let (file, _) = configuration(&database.url, &slot, &vhost, &setup);
    let script = printed(&file);
    let there: String = client.query_one(THERE, &[]).await.unwrap().get(0);
    assert_eq!(there, "", "nothing was changed");
    let output = psql(&file, &database.url, &script).await;
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
    let later = printed(&file);
    assert!(!later.contains("\nCREATE "), "{later}");
}
