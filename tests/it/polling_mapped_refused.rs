//! What commands say of an outbox table of the application's that is polled: what it lacks, with
//! the statement that adds it, and what its checkpoint is good for.

use crate::polling_mapped::{COLUMNS, MAPPED, TABLE, emit, settled, stage};
use crate::support::inbox::kinds;
use crate::support::servers::{own_database, own_vhost};
use crate::support::stage::{Setup, Stage, configuration, run};

/// All commands refuse, with the same words.
pub async fn refuse(stage: &Stage, words: &[&str]) {
    let init = stage.run(&["init", "--admin-url", &stage.database.url]).await;
    init.expect_code(1).expect_text(words);
    stage.run(&["check"]).await.expect_code(1).expect_text(words);
    stage.spawn().ended().await.expect_code(1).expect_text(words);
}

#[tokio::test]
async fn a_table_that_lacks_something_is_refused_by_init_check_and_run_with_its_statement() {
    let stage = stage(TABLE, "").await;
    let by_xid = "CREATE INDEX CONCURRENTLY ON \"public\".\"outbox\" (\"xid\", \"seq\")";
    let by_seq = "CREATE INDEX CONCURRENTLY ON \"public\".\"outbox\" (\"seq\")";
    let add_seq = "ALTER TABLE \"public\".\"outbox\" ADD COLUMN \"seq\" bigint GENERATED ALWAYS AS \
        IDENTITY (it rewrites the table";
    let add_xid = "ALTER TABLE \"public\".\"outbox\" ADD COLUMN \"xid\" xid8 NOT NULL DEFAULT \
        pg_current_xact_id() (it does not rewrite the table";
    let drop = "DO $$ DECLARE i regclass; BEGIN FOR i IN SELECT indexrelid FROM pg_index \
        WHERE indrelid = 'outbox'::regclass AND NOT indisprimary LOOP \
        EXECUTE format('DROP INDEX %s', i); END LOOP; END $$";
    let steps: [(&str, &[&str]); 8] = [
        (drop, &["lacks an index on (xid, seq)", by_xid, "lacks an index on (seq)", by_seq]),
        (
            "CREATE INDEX ON outbox (xid, seq); CREATE INDEX ON outbox USING brin (seq)",
            &["lacks an index on (seq)", by_seq],
        ),
        (
            "CREATE INDEX ON outbox (seq); ALTER TABLE outbox ALTER xid DROP NOT NULL",
            &["(outbox.xid) is of type xid8, may be null, with the def", "SET \"xid\" = '3' WHERE"],
        ),
        (
            "ALTER TABLE outbox ALTER xid SET NOT NULL, ALTER xid SET DEFAULT '5'",
            &["of type xid8, with the default '5'::xid8; expected", "SET DEFAULT pg_current_xact"],
        ),
        ("ALTER TABLE outbox DROP xid", &["no column \"xid\" (outbox.xid)", add_xid, by_xid]),
        (
            "ALTER TABLE outbox ADD xid text",
            &["is of type text, may be null, without a default; expected an xid8", "watership_xid"],
        ),
        (
            "ALTER TABLE outbox DROP xid, ADD xid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
                DROP seq; CREATE INDEX ON outbox (xid)",
            &["no column \"seq\" (outbox.order_by)", add_seq, by_seq],
        ),
        (
            "ALTER TABLE outbox ADD seq bigint NOT NULL DEFAULT 1; CREATE INDEX ON outbox (seq); \
                CREATE INDEX ON outbox (xid, seq)",
            &[
                "expected a NOT NULL integer that an ascending sequence with CACHE 1",
                "watership_seq",
            ],
        ),
    ];
    for (alter, words) in steps {
        stage.execute(alter).await;
        refuse(&stage, words).await;
    }
    // Without the keys the columns that are there are named, and else the statement.
    stage.replace_configuration(&stage.configuration().replace(COLUMNS, ""));
    let needs = "source.mode = \"poll\" needs outbox.order_by, a column of public.outbox";
    let set = "set outbox.order_by = \"watership_seq\"";
    refuse(&stage, &[needs, set, "set outbox.xid = \"xid\""]).await;
    stage.execute("ALTER TABLE outbox DROP seq, ADD n bigserial").await;
    refuse(&stage, &[needs, "set outbox.order_by = \"n\"", "(\"xid\", \"n\")"]).await;
    stage.execute("ALTER TABLE outbox DROP n, DROP xid").await;
    refuse(&stage, &[needs, add_seq, add_xid, by_xid, by_seq]).await;
}

#[tokio::test]
async fn rows_that_the_role_cannot_see_are_refused_by_init_check_and_run() {
    let stage = stage(TABLE, "").await;
    let role = format!("role_{}", stage.database.name);
    stage.execute(&format!("CREATE ROLE {role} LOGIN; GRANT watership_relay TO {role}")).await;
    let text = stage.configuration().replace("postgres://postgres", &format!("postgres://{role}"));
    stage.replace_configuration(&text);
    let grant = format!("GRANT SELECT ON \"public\".\"outbox\" TO \"{role}\"");
    refuse(&stage, &["may not read public.outbox", &grant]).await;
    stage.execute(&format!("{grant}; ALTER TABLE outbox ENABLE ROW LEVEL SECURITY")).await;
    refuse(&stage, &["row-level security of public.outbox", "BYPASSRLS"]).await;
    stage.execute("ALTER TABLE outbox DISABLE ROW LEVEL SECURITY").await;
    let relay = stage.start().await;
    stage.execute(&emit("seen")).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["seen"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_table_that_gets_the_columns_as_they_are_printed_is_read_from_then_on() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let sql = database.connect().await;
    let open = "CREATE TABLE outbox (event_id uuid PRIMARY KEY, partition_key text, \
        event_type text NOT NULL, payload bytea NOT NULL, headers jsonb, status text, \
        created_at timestamptz NOT NULL DEFAULT now())";
    sql.batch_execute(open).await.expect("the table");
    let insert = |kind: &str| {
        format!(
            "INSERT INTO outbox (event_id, partition_key, event_type, payload) \
             VALUES (gen_random_uuid(), '1', '{kind}', '{{}}')"
        )
    };
    sql.batch_execute(&insert("old")).await.expect("a row");
    let settings = format!("{MAPPED}\n{COLUMNS}").replace("debezium", "open-outbox");
    let setup = Setup { settings: &settings, ..Setup::default() };
    let (config, _) = configuration(&database.url, "", &vhost, &setup);
    run(&config, &["init"]).await.expect_code(1).expect_text(&["no column \"seq\""]);
    let statements = "ALTER TABLE \"public\".\"outbox\" ADD COLUMN \"seq\" bigint GENERATED ALWAYS \
            AS IDENTITY; \
        ALTER TABLE \"public\".\"outbox\" ADD COLUMN \"xid\" xid8 NOT NULL DEFAULT \
            pg_current_xact_id()";
    sql.batch_execute(statements).await.expect("the columns");
    for columns in ["\"xid\", \"seq\"", "\"seq\""] {
        let create = format!("CREATE INDEX CONCURRENTLY ON \"public\".\"outbox\" ({columns})");
        sql.batch_execute(&create).await.expect("the index");
    }
    let refused = run(&config, &["init"]).await;
    refused.expect_code(1).expect_text(&["public.outbox has 1 rows that are older than its first"]);
    run(&config, &["init", "--skip-existing"]).await.expect_code(0);
    // The rest is as on any stage.
    let stage = Stage::on(database, vhost, setup).await;
    let relay = stage.start().await;
    stage.execute(&insert("new")).await;
    let messages = settled(&stage, "outbox").await;
    assert_eq!(kinds(&messages), ["new"]);
    assert_eq!(messages[0].text("ws-key"), "event/1");
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn what_init_prints_makes_a_relay_that_polls_a_mapped_table() {
    let stage = stage(TABLE, "").await;
    stage.run(&["drop", "--yes"]).await.expect_code(0);
    let printed = stage.run(&["init", "--print-sql"]).await;
    printed.expect_code(0).expect_text(&["statements that public.outbox needs to be polled"]);
    let sql: Vec<&str> =
        printed.log.lines().filter(|line| !line.starts_with("warning: ")).collect();
    stage.execute(&sql.join("\n")).await;
    stage.run(&["init"]).await.expect_code(0).expect_text(&["exists   checkpoint"]);
    let made_with = "(SELECT (outbox_oid, order_attnum, xid_attnum) FROM watership.poll_batch) \
        = ('outbox'::regclass::oid, 6, 7)";
    assert!(stage.holds(made_with).await, "its first batch says what it was made with");
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    assert_eq!(kinds(&settled(&stage, "outbox").await), ["one"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn check_says_that_polling_does_not_see_what_emit_wal_writes_where_it_may_be_called() {
    let note = "a relay that polls does not see them";
    let mapped = stage(TABLE, "").await;
    assert!(!mapped.run(&["check"]).await.expect_code(0).log.contains(note));
    let settings = "source.mode = \"poll\"";
    let own = Stage::new(Setup { settings, ..Setup::default() }).await;
    own.run(&["check"]).await.expect_code(0).expect_text(&["emit_wal", note]);
}

#[tokio::test]
async fn a_checkpoint_of_one_table_is_not_taken_for_that_of_another() {
    let stage = stage(TABLE, "").await;
    let relay = stage.start().await;
    stage.execute(&emit("one")).await;
    settled(&stage, "outbox").await;
    relay.stop().await.expect_code(0);
    stage.execute("ALTER TABLE outbox RENAME TO events").await;
    let text = stage.configuration().replace("\"public.outbox\"", "\"public.events\"");
    stage.replace_configuration(&text);
    let words = ["belongs to outbox public.outbox, but the configuration names public.events"];
    refuse(&stage, &words).await;
    let renamed = "UPDATE watership.poll_batch SET outbox = 'public.events' \
        WHERE outbox = 'public.outbox'";
    stage.execute(renamed).await;
    let relay = stage.start().await;
    stage.execute(&emit("two").replace("outbox", "events")).await;
    assert_eq!(kinds(&settled(&stage, "events").await), ["one", "two"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn rows_of_another_cluster_in_a_mapped_table_are_a_verdict() {
    let stage = stage(TABLE, "").await;
    let foreign =
        emit("foreign").replace("payload)", "payload, xid)").replace("'1')", "'1', '9999999999')");
    stage.execute(&foreign).await;
    let words = ["foreign_rows", "UPDATE \"public\".\"outbox\" SET \"xid\" = pg_current_xact_id()"];
    stage.run(&["run"]).await.expect_code(3).expect_text(&words);
    stage.run(&["check"]).await.expect_code(3).expect_text(&words);
}
