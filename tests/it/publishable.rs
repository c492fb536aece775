//! Tables that an application could no longer change once they are published, or whose rows would
//! not come: `init` refuses them before it makes anything, `check` names them.

use crate::support::servers::{own_database, own_vhost};
use crate::support::stage::{Setup, configuration, run};

/// What `init` and `check` said.
struct Tried {
    refused: String,
    checked: String,
}

/// `init` refuses the table `public.t` that `sql` makes, before it makes anything;
/// `check` says the same.
async fn refused(sql: &str, texts: &[&str]) -> Tried {
    refused_of(&["public.t"], sql, texts).await
}

/// The same of these tables.
async fn refused_of(tables: &'static [&'static str], sql: &str, texts: &[&str]) -> Tried {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    client.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let setup = Setup { tables, ..Setup::default() };
    let (file, _) =
        configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
    let init = run(&file, &["init"]).await;
    init.expect_code(1).expect_text(texts);
    let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'watership'";
    let made: i64 = client.query_one(made, &[]).await.expect("the catalog").get(0);
    assert_eq!(made, 0, "nothing was made");
    let check = run(&file, &["check"]).await;
    check.expect_text(texts);
    Tried { refused: init.log, checked: check.log }
}

#[tokio::test]
async fn what_cannot_be_published_is_refused_before_anything_is_made() {
    refused("CREATE UNLOGGED TABLE public.t (id int PRIMARY KEY)", &["public.t is unlogged"]).await;
    refused("CREATE VIEW public.t AS SELECT 1 AS id", &["public.t is a view"]).await;
    let sql = "CREATE MATERIALIZED VIEW public.t AS SELECT 1 AS id";
    refused(sql, &["public.t is a materialized view"]).await;
    let sql = "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; \
        CREATE FOREIGN TABLE public.t (id int) SERVER s";
    refused(sql, &["public.t is a foreign table"]).await;
    refused("SELECT 1", &["public.t does not exist"]).await;
}

#[tokio::test]
async fn a_partition_is_not_captured_beside_its_table() {
    let sql = "CREATE TABLE public.t (id int PRIMARY KEY) PARTITION BY RANGE (id); \
        CREATE TABLE public.p PARTITION OF public.t FOR VALUES FROM (0) TO (9) \
            PARTITION BY RANGE (id); \
        CREATE TABLE public.q PARTITION OF public.p FOR VALUES FROM (0) TO (5)";
    let of = |part: &str| format!("{part} is a partition of public.t, and both are captured");
    refused_of(&["public.t", "public.q"], sql, &[&of("public.q"), "remove public.q"]).await;
    refused_of(&["public.p", "public.t"], sql, &["both are captured"]).await;
}

#[tokio::test]
async fn a_table_whose_changes_would_fail_is_refused_unless_told_to() {
    for (sql, text) in [
        ("CREATE TABLE public.t (id int)", "public.t has no replica identity"),
        (
            "CREATE TABLE public.t (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED)",
            "its primary key is DEFERRABLE",
        ),
        (
            "CREATE TABLE public.t (id int) PARTITION BY RANGE (id); \
             CREATE TABLE public.t_1 PARTITION OF public.t FOR VALUES FROM (0) TO (9)",
            "partition public.t_1 of public.t has no replica identity",
        ),
    ] {
        let tried = refused(sql, &[text]).await;
        assert!(tried.refused.contains("--publish-anyway"), "{}", tried.refused);
        assert!(tried.checked.contains("problem"), "{}", tried.checked);
    }
}

#[tokio::test]
async fn a_table_whose_rows_are_elsewhere_is_refused_unless_told_to() {
    let lost = "CREATE TABLE public.t (id int PRIMARY KEY) PARTITION BY RANGE (id); \
        CREATE UNLOGGED TABLE public.t_1 PARTITION OF public.t FOR VALUES FROM (0) TO (9)";
    refused(lost, &["partition public.t_1 of public.t is unlogged"]).await;
    let chunks = "CREATE SCHEMA _timescaledb_internal; CREATE TABLE public.t (id int PRIMARY KEY); \
        CREATE TABLE _timescaledb_internal.chunk_1 () INHERITS (public.t)";
    refused(chunks, &["public.t is a hypertable"]).await;
}

#[tokio::test]
async fn rows_of_inheritance_children_are_not_captured_and_their_changes_go_on_working() {
    let sql = "CREATE TABLE public.t (id int PRIMARY KEY, v text); \
        CREATE TABLE public.c1 () INHERITS (public.t)";
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    client.batch_execute(sql).await.unwrap();
    let setup = Setup { tables: &["public.t"], ..Setup::default() };
    let (file, _) =
        configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
    let told = ["public.t has inheritance children (public.c1): their rows are not captured"];
    run(&file, &["init"]).await.expect_code(1).expect_text(&told);
    run(&file, &["init", "--publish-anyway"]).await.expect_code(0).expect_text(&told);
    run(&file, &["check"]).await.expect_code(0).expect_text(&told);
    run(&file, &["init"]).await.expect_code(0);
    let change = "INSERT INTO public.c1 VALUES (1, 'a'); UPDATE public.t SET v = 'b'";
    client.batch_execute(change).await.expect("the application's changes work");
    // Somebody publishes the child, too: now they fail.
    client.batch_execute("ALTER PUBLICATION watership ADD TABLE public.c1").await.unwrap();
    let told = ["public.c1 has no replica identity"];
    run(&file, &["check"]).await.expect_code(1).expect_text(&told);
}

#[tokio::test]
async fn generated_columns_in_the_replica_identity_are_told_or_refused_by_version() {
    let sql = "CREATE TABLE public.t (id int PRIMARY KEY, title text, \
        slug text GENERATED ALWAYS AS (lower(title)) STORED); \
        ALTER TABLE public.t REPLICA IDENTITY FULL";
    if crate::support::servers::postgres().await.major() >= 18 {
        refused(sql, &["has generated columns that are not published (slug)"]).await;
        return;
    }
    let (database, vhost) = (own_database().await, own_vhost().await);
    database.connect().await.batch_execute(sql).await.unwrap();
    let setup = Setup { tables: &["public.t"], ..Setup::default() };
    let (file, _) =
        configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
    let told = ["generated columns of public.t (slug) are not in its events"];
    run(&file, &["init"]).await.expect_code(0).expect_text(&told);
    run(&file, &["check"]).await.expect_code(0).expect_text(&told);
}

#[tokio::test]
async fn an_administrator_who_does_not_own_the_table_is_told_before_anything_is_made() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    let admin = format!("{}_init", database.name);
    let sql = format!(
        "CREATE TABLE public.t (id int PRIMARY KEY); \
         CREATE ROLE {admin} LOGIN CREATEROLE REPLICATION; \
         GRANT CREATE ON DATABASE {} TO {admin}",
        database.name
    );
    client.batch_execute(&sql).await.unwrap();
    let setup = Setup { tables: &["public.t"], ..Setup::default() };
    let (file, _) =
        configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
    let url = crate::support::servers::postgres().await.url(&admin, &database.name);
    let told = ["does not own public.t", "only an owner may publish it"];
    run(&file, &["init", "--admin-url", &url]).await.expect_code(1).expect_text(&told);
    let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'watership'";
    assert_eq!(client.query_one(made, &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn a_route_key_that_is_not_a_column_is_told_under_every_identity() {
    let routes = "[[route]]\nname = \"t\"\ntable = \"public.t\"\nkey = [\"ID\"]\n\
        exchange = \"watership\"\n";
    for identity in ["DEFAULT", "FULL"] {
        let (database, vhost) = (own_database().await, own_vhost().await);
        let sql = format!(
            "CREATE TABLE public.t (id int PRIMARY KEY); \
             ALTER TABLE public.t REPLICA IDENTITY {identity}"
        );
        database.connect().await.batch_execute(&sql).await.unwrap();
        let setup = Setup { tables: &["public.t"], routes, ..Setup::default() };
        let (file, _) =
            configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
        let told = ["\"ID\"", "no such column"];
        run(&file, &["init"]).await.expect_text(&told);
        run(&file, &["check"]).await.expect_code(1).expect_text(&told);
    }
}

#[tokio::test]
async fn a_filter_or_a_list_of_somebody_else_that_makes_changes_fail_is_found_by_check() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let client = database.connect().await;
    let sql = "CREATE TABLE public.t (id int PRIMARY KEY, v text)";
    client.batch_execute(sql).await.expect("a table");
    let setup = Setup { tables: &["public.t"], ..Setup::default() };
    let (file, _) =
        configuration(&database.url, &format!("slot_{}", database.name), &vhost, &setup);
    run(&file, &["init"]).await.expect_code(0);
    let set = "ALTER PUBLICATION watership SET TABLE watership.outbox, watership.canary, public.t";
    for (clause, text) in [
        ("WHERE (v <> 'x')", "the row filter of public.t uses column \"v\""),
        ("(v)", "the column list of public.t lacks \"id\""),
    ] {
        client.batch_execute(&format!("{set} {clause}")).await.expect(clause);
        let update = "INSERT INTO public.t VALUES (1, 'a') ON CONFLICT DO NOTHING; \
            UPDATE public.t SET v = 'b'";
        client.batch_execute(update).await.expect_err("the application's changes fail");
        run(&file, &["check"]).await.expect_text(&[text]);
    }
    client.batch_execute(&format!("{set} WHERE (id > 0)")).await.expect("a filter of the key");
    client.batch_execute("UPDATE public.t SET v = 'b'").await.expect("changes work");
    let checked = run(&file, &["check"]).await;
    assert!(!checked.log.contains("UPDATE and DELETE on it fail"), "{}", checked.log);
}
