//! Outbox tables of the application's, by column mapping, with the real program on real servers.

use lapin::types::AMQPValue;
use uuid::Uuid;

use crate::support::inbox::{FENCE, Message, kinds};
use crate::support::servers::{own_database, own_vhost};
use crate::support::stage::{Setup, Stage, configuration, run};
use crate::support::waiting::{Patience, until};

/// The table of Debezium's outbox event router.
const DEBEZIUM: &str = "CREATE TABLE public.outbox (id uuid PRIMARY KEY, \
    aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL, \
    type varchar(255) NOT NULL, payload jsonb)";
const MAPPED: &str = "outbox.table = \"public.outbox\"\noutbox.profile = \"debezium\"";
const ID: &str = "da8d6de6-3b77-45ff-8f44-57db55a7a06c";

async fn stage(sql: &str, settings: &str) -> Stage {
    let settings = format!("{settings}\nrelay.idle_interval = \"1s\"");
    Stage::new(Setup { sql, settings: &settings, ..Setup::default() }).await
}

/// Everything that arrived, once the relay has settled all that is committed now. The fence is a
/// logical message, because nobody reads the relay's own outbox.
pub async fn settled(stage: &Stage) -> Vec<Message> {
    let now = stage.text("pg_current_wal_insert_lsn()").await;
    stage.execute(&format!("SELECT watership.emit_wal('{FENCE}', '1', 'passed', '{{}}')")).await;
    let passed = format!(
        "(SELECT flush_lsn FROM watership.checkpoint WHERE name = 'shop') > '{now}'::pg_lsn"
    );
    let mut patience = Patience::new();
    while !stage.holds(&passed).await {
        let row = stage.text("SELECT json_agg(c) FROM watership.checkpoint AS c").await;
        patience.more(row, || "the relay passes what is committed".into()).await;
    }
    stage.settled_now().await
}

fn content_type(message: &Message) -> &str {
    message.properties.content_type().as_ref().expect("set").as_str()
}

#[tokio::test]
async fn a_debezium_table_whose_rows_are_deleted_at_once_is_read_and_nothing_is_installed_for_it() {
    let stage = stage(DEBEZIUM, MAPPED).await;
    let relay = stage.start().await;
    stage
        .execute(&format!(
            "BEGIN; INSERT INTO outbox VALUES \
             ('{ID}', 'User', '10711fa5', 'UserCreated', '{{\"email\": \"gh@mefi.in\"}}'); \
             DELETE FROM outbox; COMMIT"
        ))
        .await;
    stage.execute("INSERT INTO outbox VALUES (gen_random_uuid(), 'User', '7', 'Gone', NULL)").await;
    stage.execute("UPDATE outbox SET type = 'Other'").await;
    stage.execute("DELETE FROM outbox").await;
    let got = settled(&stage).await;
    assert_eq!(kinds(&got), ["UserCreated", "Gone"]);
    let (created, gone) = (&got[0], &got[1]);
    assert_eq!((created.id(), &*created.routing_key), (ID.to_owned(), "User.UserCreated"));
    assert_eq!(
        (created.text("ws-key"), &*created.body),
        ("User/10711fa5".to_owned(), "{\"email\": \"gh@mefi.in\"}")
    );
    assert_eq!(content_type(created), "application/json");
    assert_eq!((&*gone.body, content_type(gone)), ("", "application/octet-stream"));
    let ignored = "watership_outbox_updates_ignored_total";
    until("it is counted", async || relay.metric(ignored).await == Some(1.0)).await;
    // The relay's own outbox is neither published nor open, and has no part in the upkeep.
    let published =
        "SELECT string_agg(tablename, ' ' ORDER BY tablename) FROM pg_publication_tables";
    assert_eq!(stage.text(published).await, "canary outbox");
    let closed = "NOT has_table_privilege('watership_app', 'watership.outbox', 'INSERT') \
                  AND NOT has_any_column_privilege('watership_app', 'watership.outbox', 'INSERT') \
                  AND has_schema_privilege('watership_app', 'watership', 'USAGE')";
    assert!(stage.holds(closed).await);
    stage.run(&["check"]).await.expect_code(0).expect_text(&["public.outbox, mapped"]);
    let again = stage.run(&["init", "--admin-url", &stage.database.url]).await;
    again.expect_code(0).expect_text(&["watership_app may call emit_wal"]);
    relay.stop().await.expect_code(0).expect_text(&["rows of the outbox were updated"]);
}

#[tokio::test]
async fn ids_keys_bodies_and_times_of_other_types_are_read() {
    let sql = "CREATE TYPE kind AS ENUM ('made', 'paid'); \
        CREATE DOMAIN instant AS bigint CHECK (value > 0); \
        CREATE TABLE events (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, \
            what kind NOT NULL, order_id bigint, body bytea, meta json, version int, \
            paid boolean, happened instant, \"Odd Name\" text)";
    let settings = "outbox.table = \"public.events\"\noutbox.aggregate_type = \"order\"\n\
        outbox.columns = { id = \"n\", aggregate_id = \"order_id\", event_type = \"what\", \
        payload = \"body\", headers = \"meta\", created_at = \"happened\" }\n\
        outbox.headers_from = { eventVersion = \"version\", isPaid = \"paid\", \
        odd = \"Odd Name\" }";
    for binary in ["", "source.binary = true\n"] {
        let stage = stage(sql, &format!("{binary}{settings}")).await;
        let relay = stage.start().await;
        stage
            .execute(
                "INSERT INTO events (what, order_id, body, meta, version, paid, happened, \
                 \"Odd Name\") VALUES \
                 ('made', 7, '\\x00ff', '{\"a\": 1, \"odd\": \"own\"}', 3, true, \
                 1553460779000, 'x'), \
                 ('paid', NULL, NULL, NULL, NULL, NULL, NULL, NULL), \
                 ('paid', 7, 'text', ' {} ', 4, false, 9223372036854775807, NULL)",
            )
            .await;
        let got = settled(&stage).await;
        assert_eq!(kinds(&got), ["made", "paid", "paid"], "{binary}");
        let namespace = Uuid::from_u128(0x3b5a_8f0e_6d0c_4c1b_9c55_2f7e_a1d4_5e03);
        let namespace = Uuid::new_v5(&namespace, b"public.events");
        for (index, message) in got.iter().enumerate() {
            let number = (index + 1).to_string();
            assert_eq!(message.id(), Uuid::new_v5(&namespace, number.as_bytes()).to_string());
        }
        assert_eq!(got[0].bytes, b"\x00\xff");
        assert_eq!(content_type(&got[0]), "application/octet-stream");
        assert_eq!(got[0].text("ws-key"), "order/7");
        assert_eq!(*got[0].properties.timestamp(), Some(1_553_460_779));
        assert_eq!(got[0].header("eventVersion"), Some(&AMQPValue::LongLongInt(3)));
        assert_eq!(got[0].header("isPaid"), Some(&AMQPValue::Boolean(true)));
        assert_eq!(got[0].header("a"), Some(&AMQPValue::LongLongInt(1)));
        assert_eq!(got[0].text("odd"), "own", "the application's header counts");
        // Without a key it is its own.
        assert_eq!(got[1].text("ws-key"), "order/2");
        assert_eq!(got[1].header("eventVersion"), Some(&AMQPValue::Void));
        // No year that a timestamp may have: the commit time.
        let Some(AMQPValue::LongLongInt(us)) = got[2].header("ws-committed-at") else { panic!() };
        let committed = u64::try_from(us / 1_000_000).ok();
        assert_eq!(*got[2].properties.timestamp(), committed);
        assert_eq!(got[2].header("isPaid"), Some(&AMQPValue::Boolean(false)));
        relay.stop().await.expect_code(0);
    }
}

#[tokio::test]
async fn a_row_that_makes_no_message_is_parked_under_its_key_and_others_flow() {
    let sql = "CREATE TABLE public.outbox (id text, aggregatetype text, aggregateid text, \
        type text, payload text, headers json); ALTER TABLE outbox REPLICA IDENTITY FULL";
    let settings = format!("{MAPPED}\noutbox.columns.headers = \"headers\"");
    let stage = stage(sql, &settings).await;
    let relay = stage.start().await;
    stage
        .execute(&format!(
            "INSERT INTO outbox VALUES ('{ID}', 'User', '1', NULL, '{{}}', NULL), \
             ('second', 'User', '1', 'Follows', '{{}}', NULL), \
             (NULL, 'User', '2', 'NoId', '{{}}', NULL), \
             ('fourth', 'User', '3', 'Fine', 'any text', NULL), \
             ('fifth', 'User', '4', 'Header', '{{}}', '[1]')"
        ))
        .await;
    assert_eq!(kinds(&settled(&stage).await), ["Fine"]);
    let rows = "SELECT string_agg(key || ': ' || error, '; ' ORDER BY mark, ordinal) \
                FROM watership.parked";
    let told = stage.text(rows).await;
    for part in [
        "User/1: column \"type\" of the outbox row is null",
        "User/2: column \"id\" of the outbox row is null",
        "User/4: column \"headers\" is not a JSON object",
    ] {
        assert!(told.contains(part), "{told}");
    }
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn a_table_that_does_not_fit_is_refused_by_init_check_and_run_with_the_same_words() {
    let columns = "id uuid PRIMARY KEY, aggregatetype text, aggregateid text, type text";
    let stage = stage(DEBEZIUM, MAPPED).await;
    for (alter, words) in [
        ("ALTER TABLE outbox DROP COLUMN type", "public.outbox has no column \"type\""),
        (
            "ALTER TABLE outbox ADD type point",
            "column \"type\" of public.outbox (outbox.columns.event_type) is of type point; \
             expected text, an enum or an integer",
        ),
        (
            "ALTER TABLE outbox DROP COLUMN type, ADD type text, DROP COLUMN payload",
            "public.outbox has no column \"payload\" for the body of an event",
        ),
    ] {
        stage.execute(alter).await;
        let init = stage.run(&["init", "--admin-url", &stage.database.url]).await;
        init.expect_code(1).expect_text(&[words]);
        stage.run(&["check"]).await.expect_code(1).expect_text(&[words]);
        stage.spawn().ended().await.expect_code(1).expect_text(&[words]);
    }
    // Nothing is made in a database whose table is missing or cannot be published.
    let (database, vhost) = (own_database().await, own_vhost().await);
    let sql = database.connect().await;
    let setup = Setup { settings: MAPPED, ..Setup::default() };
    let (config, _) = configuration(&database.url, "mapping_refused", &vhost, &setup);
    for (statement, words) in [
        (String::new(), "outbox.table public.outbox does not exist"),
        ("CREATE VIEW outbox AS SELECT 1 AS id".into(), "outbox.table public.outbox is a view"),
        (
            format!("DROP VIEW outbox; CREATE UNLOGGED TABLE outbox ({columns}, payload json)"),
            "outbox.table public.outbox is unlogged",
        ),
    ] {
        sql.batch_execute(&statement).await.expect("the test's own SQL");
        run(&config, &["init"]).await.expect_code(1).expect_text(&[words]);
        run(&config, &["check"]).await.expect_code(1).expect_text(&[words]);
    }
    let made = "SELECT to_regnamespace('watership') IS NULL";
    assert!(sql.query_one(made, &[]).await.expect("an answer").get::<_, bool>(0));
}

#[tokio::test]
async fn a_table_that_is_renamed_or_partitioned_is_still_the_outbox() {
    let sql = "CREATE TABLE public.outbox (id uuid, aggregatetype text, aggregateid text, \
            type text, payload json, day date DEFAULT '2026-01-01', PRIMARY KEY (id, day)) \
        PARTITION BY RANGE (day); \
        CREATE TABLE outbox_1 PARTITION OF outbox FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')";
    let stage = stage(sql, MAPPED).await;
    let relay = stage.start().await;
    let insert = |table: &str, kind: &str| {
        format!(
            "INSERT INTO {table} (id, aggregatetype, aggregateid, type, payload) \
             VALUES (gen_random_uuid(), 'User', '1', '{kind}', '{{}}')"
        )
    };
    stage.execute(&insert("outbox", "First")).await;
    assert_eq!(kinds(&settled(&stage).await), ["First"]);
    // What is written while it has another name is read, and an operator decides before the next.
    let renamed = format!("ALTER TABLE outbox RENAME TO other; {}", insert("other", "Second"));
    stage.execute(&renamed).await;
    assert_eq!(kinds(&stage.inbox.count(2).await), ["First", "Second"]);
    relay.ended().await.expect_code(3).expect_text(&["table_removed"]);
}

#[tokio::test]
async fn rows_older_than_the_slot_are_refused_and_the_rest_is_found() {
    let (database, vhost) = (own_database().await, own_vhost().await);
    let sql = database.connect().await;
    sql.batch_execute(DEBEZIUM).await.expect("the table");
    let insert = |id: &str| format!("INSERT INTO outbox VALUES ('{id}', 'User', '7', 'Made', '1')");
    sql.batch_execute(&insert(ID)).await.expect("a row");
    let setup = Setup { settings: MAPPED, ..Setup::default() };
    let slot = format!("slot_{}", database.name);
    let (config, _) = configuration(&database.url, &slot, &vhost, &setup);
    let refused = run(&config, &["init"]).await;
    refused.expect_code(1).expect_text(&["public.outbox has 1 rows that are older than the slot"]);
    run(&config, &["init", "--skip-existing"]).await.expect_code(0);
    for arguments in [&["find", ID][..], &["find", "--key", "User/7"]] {
        run(&config, arguments).await.expect_code(0).expect_text(&[ID, "User/7, Made"]);
    }
    run(&config, &["find", "--key", "User/8"]).await.expect_code(1).expect_text(&["emit_wal"]);
}

/// A row of a mapped table with times, made `days` ago.
fn old(kind: &str, days: u32) -> String {
    format!(
        "INSERT INTO outbox VALUES (gen_random_uuid(), 'User', '1', '{kind}', '{{}}', \
         now() - interval '{days} days')"
    )
}

#[tokio::test]
async fn old_rows_are_deleted_only_when_the_stored_checkpoint_has_passed_them() {
    let sql =
        format!("{DEBEZIUM}; ALTER TABLE outbox ADD at timestamptz; CREATE INDEX ON outbox (at)");
    let settings =
        format!("{MAPPED}\noutbox.delete_after = \"1d\"\noutbox.columns.created_at = \"at\"");
    let stage = stage(&sql, &settings).await;
    // They are there before the relay notes what may go, so one process deletes and counts.
    stage.execute(&old("before", 3)).await;
    stage.execute(&old("young", 0)).await;
    let mut relay = stage.start().await;
    stage.inbox.count(2).await;
    let kinds_left = "SELECT coalesce(string_agg(type, ' ' ORDER BY type), '') FROM outbox";
    until("the old row is deleted", async || stage.text(kinds_left).await == "young").await;
    let deleted = "watership_outbox_rows_deleted_total";
    until("it is counted", async || relay.metric(deleted).await == Some(1.0)).await;
    relay.stop().await.expect_code(0);
    // Another relay of the database, whose checkpoint does not move, has not passed it.
    stage
        .execute(
            "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, slot, \
             system_identifier, timeline, publication, publication_oid) \
             SELECT 'other', epoch, mark, ordinal, flush_mark, 'x', system_identifier, timeline, \
             publication, publication_oid FROM watership.checkpoint",
        )
        .await;
    stage.execute(&old("kept", 3)).await;
    relay = stage.start().await;
    stage.inbox.count(3).await;
    stage.execute(&old("later", 0)).await;
    stage.inbox.count(4).await;
    relay.stop().await.expect_code(0);
    relay = stage.start().await;
    settled(&stage).await;
    assert_eq!(stage.text(kinds_left).await, "kept later young");
    stage.execute("DELETE FROM watership.checkpoint WHERE name = 'other'").await;
    until("it is deleted now", async || stage.text(kinds_left).await == "later young").await;
    assert_eq!(kinds(&stage.settled_now().await), ["before", "young", "kept", "later"]);
    relay.stop().await.expect_code(0);
}

#[tokio::test]
async fn deleting_without_the_right_to_is_refused_and_an_index_is_asked_for() {
    let sql = format!("{DEBEZIUM}; ALTER TABLE outbox ADD at timestamp");
    let settings =
        format!("{MAPPED}\noutbox.delete_after = \"1d\"\noutbox.columns.created_at = \"at\"");
    let stage = stage(&sql, &settings).await;
    let words = "no index of public.outbox begins with \"at\"";
    stage.run(&["check"]).await.expect_code(0).expect_text(&[words, "CREATE INDEX CONCURRENTLY"]);
    let role = format!("role_{}", stage.slot);
    stage
        .execute(&format!(
            "CREATE ROLE {role} LOGIN REPLICATION SUPERUSER; ALTER ROLE {role} NOSUPERUSER; \
             GRANT watership_relay TO {role}"
        ))
        .await;
    let text = stage.configuration().replace("postgres://postgres", &format!("postgres://{role}"));
    stage.replace_configuration(&text);
    let checked = stage.run(&["check"]).await;
    checked
        .expect_code(1)
        .expect_text(&["may not delete rows of public.outbox", "GRANT SELECT, D"]);
}
