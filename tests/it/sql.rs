//! The schema: who may do what, what `emit` takes, and how the files get into the database.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;
use watership::error::Kind;
use watership::outbox::{NewEvent, Payload, emit};
use watership::pg::migrate;

use crate::support::servers::{self, Database};

/// A database with the schema in it and open to applications, and a superuser's connection.
pub async fn installed() -> (Database, Client) {
    let database = servers::own_database().await;
    let mut client = database.connect().await;
    migrate::OUTBOX.apply(&mut client).await.expect("the schema");
    migrate::grant_applications(&mut client).await.expect("the grants");
    (database, client)
}

/// A connection as a new user that is a member of `group` and nothing else.
pub async fn login_as(database: &Database, admin: &Client, group: &str) -> Client {
    let user = format!("{}_{}", database.name, group);
    let sql = format!("CREATE ROLE {user} LOGIN IN ROLE {group}");
    admin.batch_execute(&sql).await.expect("a new user");
    connect_as(database, &user).await
}

async fn connect_as(database: &Database, user: &str) -> Client {
    let url = servers::postgres().await.url(user, &database.name);
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

async fn refusal(client: &Client, sql: &str) -> String {
    match client.batch_execute(sql).await {
        Ok(()) => panic!("not refused: {sql}"),
        Err(e) => e.as_db_error().expect("an answer of the server").code().code().to_owned(),
    }
}

const DENIED: &str = "42501";
const CHECK_VIOLATION: &str = "23514";

#[tokio::test]
async fn every_kind_of_payload_resolves() {
    let (database, admin) = installed().await;
    let app = login_as(&database, &admin, "watership_app").await;
    for payload in [
        "'{\"a\": 1}'",
        "'{\"a\": 1}'::text",
        "'{\"a\": 1}'::varchar",
        "'{\"a\": 1}'::json",
        "'{\"a\": 1}'::jsonb",
        "json_build_object('a', 1)",
        "jsonb_build_object('a', 1)",
    ] {
        for rest in ["", ", '{\"h\": 1}'", ", NULL", ", NULL, gen_random_uuid()"] {
            let sql = format!("SELECT watership.emit('order', '1', 'created', {payload}{rest})");
            let row = app.query_one(&sql, &[]).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
            assert!(!row.get::<_, Uuid>(0).is_nil(), "{sql}");
        }
    }
    let named = "SELECT watership.emit(aggregate_type => 'order', aggregate_id => '1', \
        event_type => 'created', payload => '{}', id => '00000000-0000-0000-0000-00000000002a')";
    assert_eq!(app.query_one(named, &[]).await.unwrap().get::<_, Uuid>(0).as_u128(), 42);
    let bytes = "SELECT watership.emit_bytes('order', '1', 'created', '\\x00ff', 'image/png')";
    app.query_one(bytes, &[]).await.expect("bytes");
    let prepared = "SELECT watership.emit('order', '1', 'created', $1)";
    app.query_one(prepared, &[&"{}"]).await.expect("a parameter without a type is text");
}

#[tokio::test]
async fn an_aggregate_id_may_be_an_integer_or_a_uuid_and_no_call_is_ambiguous() {
    let (database, admin) = installed().await;
    let app = login_as(&database, &admin, "watership_app").await;
    let uuid = "11111111-2222-4333-8444-555555555555";
    for (aggregate_id, kept) in [
        ("'42'", "42"),
        ("42", "42"),
        ("42::smallint", "42"),
        ("42::bigint", "42"),
        ("-7", "-7"),
        ("9223372036854775807", "9223372036854775807"),
        ("'42'::text", "42"),
        ("'42'::varchar", "42"),
        ("'x'::name", "x"),
        (&format!("'{uuid}'"), uuid),
        (&format!("'{uuid}'::uuid"), uuid),
    ] {
        for payload in ["'{}'", "'{}'::text", "'{}'::json", "'{}'::jsonb"] {
            for call in [
                format!("emit('t', {aggregate_id}, 'e', {payload})"),
                format!("emit('t', {aggregate_id}, 'e', {payload}, '{{\"a\": 1}}', '{uuid}')"),
                format!(
                    "emit(payload => {payload}, event_type => 'e', aggregate_id => {aggregate_id}, \
                     aggregate_type => 't', id => gen_random_uuid())"
                ),
                format!("emit_bytes('t', {aggregate_id}, 'e', '\\x00', 'a/b')"),
            ] {
                let sql = format!("BEGIN; SELECT watership.{call}");
                app.batch_execute(&sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
                app.batch_execute("ROLLBACK").await.unwrap();
            }
        }
        let sql = format!("SELECT watership.emit('t', {aggregate_id}, 'e', '{{}}')");
        let id: Uuid = app.query_one(&sql, &[]).await.unwrap().get(0);
        let sql = "SELECT aggregate_id FROM watership.outbox WHERE id = $1";
        assert_eq!(admin.query_one(sql, &[&id]).await.unwrap().get::<_, &str>(0), kept);
    }
    // Parameters with the types that drivers give them.
    let emit = |id_type: &str| format!("SELECT watership.emit('t', $1::{id_type}, 'e', '{{}}')");
    app.query_one(&emit("int4"), &[&42_i32]).await.expect("int4");
    app.query_one(&emit("int8"), &[&42_i64]).await.expect("int8");
    app.query_one(&emit("uuid"), &[&Uuid::from_u128(7)]).await.expect("uuid");
    // Without a type both are text.
    let untyped = "SELECT watership.emit('t', $1, 'e', $2)";
    app.query_one(untyped, &[&"42", &"{}"]).await.expect("parameters without a type");
    let typed = [
        (&42_i32 as &(dyn tokio_postgres::types::ToSql + Sync), tokio_postgres::types::Type::INT4),
        (&"{}", tokio_postgres::types::Type::TEXT),
    ];
    app.query_typed(untyped, &typed).await.expect("types in the protocol");
}

#[tokio::test]
async fn an_insert_may_return_what_the_server_made_and_be_repeated() {
    let (database, admin) = installed().await;
    let app = login_as(&database, &admin, "watership_app").await;
    let columns = "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload";
    for sql in [
        format!("{columns}) VALUES ('t', '1', 'e', '{{}}') RETURNING id"),
        format!("{columns}) VALUES ('t', '1', 'e', '{{}}') RETURNING id, created_at"),
        format!("{columns}, created_at) VALUES ('t', '1', 'e', '{{}}', now()) RETURNING id"),
        format!(
            "{columns}) SELECT 't', g::text, 'e', '{{}}' FROM generate_series(1, 3) AS g \
            RETURNING id"
        ),
    ] {
        app.query(&sql, &[]).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    let same = format!(
        "{columns}, id, created_at) VALUES ('t', '1', 'e', '{{}}', \
         '11111111-2222-4333-8444-555555555555', now()::date) \
         ON CONFLICT (id, created_at) DO NOTHING"
    );
    assert_eq!(app.execute(&same, &[]).await.unwrap(), 1);
    assert_eq!(app.execute(&same, &[]).await.unwrap(), 0, "it is there already");
    for wrong in ["'infinity'", "'-infinity'", "'10000-01-01'", "'1969-12-31'", "'0044-03-15 BC'"] {
        let sql = format!("{columns}, created_at) VALUES ('t', '1', 'e', '{{}}', {wrong})");
        assert_eq!(refusal(&app, &sql).await, CHECK_VIOLATION, "{sql}");
    }
}

#[tokio::test]
async fn headers_that_would_not_fit_a_frame_are_refused_whatever_they_are_made_of() {
    let (_database, admin) = installed().await;
    // Each at the limit and one above it: 57,344 bytes as AMQP fields.
    let emit = "SELECT watership.emit('t', '1', 'e', '{}', $1::text::jsonb)";
    for (fits, breaks) in [
        ("repeat('v', 57337)", "repeat('v', 57338)"),
        ("repeat('\u{e9}', 28668)", "repeat('\u{e9}', 28669)"),
    ] {
        let sql = |value: &str| format!("SELECT jsonb_build_object('k', {value})::text");
        let one: String = admin.query_one(&sql(fits), &[]).await.unwrap().get(0);
        admin.query(emit, &[&one]).await.unwrap_or_else(|e| panic!("{fits}: {e:?}"));
        let one: String = admin.query_one(&sql(breaks), &[]).await.unwrap().get(0);
        assert!(admin.query(emit, &[&one]).await.is_err(), "{breaks}");
    }
    // Many small numbers are longer as fields than as text.
    let many = |count: u32| {
        format!("SELECT jsonb_object_agg('k' || g, 1)::text FROM generate_series(1, {count}) AS g")
    };
    let fits: String = admin.query_one(&many(3_800), &[]).await.unwrap().get(0);
    admin.query(emit, &[&fits]).await.expect("3,800 numbers fit");
    let breaks: String = admin.query_one(&many(4_000), &[]).await.unwrap().get(0);
    assert!(breaks.len() < 57_344, "its text alone is not too long");
    assert!(admin.query(emit, &[&breaks]).await.is_err(), "4,000 numbers");
}

#[tokio::test]
async fn text_is_kept_to_the_byte_and_traceparent_gets_its_column() {
    let (database, admin) = installed().await;
    let mut app = login_as(&database, &admin, "watership_app").await;
    let body = "{\"b\":  1.10,\n \"a\": 12345678901234567890, \"a\": \"\\u00e9\"}";
    let headers = json!({"tenant": "t1"});
    let event = NewEvent {
        headers: Some(&headers),
        traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ..NewEvent::new("order", "1", "created", Payload::Json(body))
    };
    let tx = app.transaction().await.unwrap();
    let id = emit(&tx, &event).await.unwrap();
    let data = Payload::Bytes { data: b"\0\xff", content_type: "image/png" };
    let raw = emit(&tx, &NewEvent::new("order", "1", "drawn", data)).await.unwrap();
    tx.commit().await.unwrap();
    let tx = app.transaction().await.unwrap();
    let lost = NewEvent::new("order", "1", "rolled_back", Payload::Json("{}"));
    emit(&tx, &lost).await.unwrap();
    tx.rollback().await.unwrap();

    let sql = "SELECT payload::text, headers, traceparent FROM watership.outbox WHERE id = $1";
    let row = admin.query_one(sql, &[&id]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), body);
    assert_eq!(row.get::<_, serde_json::Value>(1), headers);
    assert!(row.get::<_, &str>(2).starts_with("00-4bf9"));
    let sql = "SELECT data, content_type FROM watership.outbox WHERE id = $1";
    let row = admin.query_one(sql, &[&raw]).await.unwrap();
    assert_eq!(row.get::<_, &[u8]>(0), b"\0\xff");
    assert_eq!(row.get::<_, &str>(1), "image/png");
    let all = admin.query_one("SELECT count(*) FROM watership.outbox", &[]).await.unwrap();
    assert_eq!(all.get::<_, i64>(0), 2);
}

#[tokio::test]
async fn what_no_message_can_carry_is_refused_in_the_application() {
    let (_database, admin) = installed().await;
    for headers in [
        r#"{"CC": ["a"]}"#,
        r#"{"BCC": "a"}"#,
        r#"{"x-death": 1}"#,
        r#"{"a": 1, "ws-position": "1"}"#,
        r#"{"": 1}"#,
        r#"{"na\u0000me": 1}"#,
        r#"{"größe": 1}"#,
        r#"{"a\nb": 1}"#,
        r#"{"\n": 1}"#,
        r#"{"CC\n": 1}"#,
        r#"{"a\r": 1}"#,
        &format!(r#"{{"{}": 1}}"#, "k".repeat(256)),
        &format!(r#"{{"k": "{}"}}"#, "v".repeat(65_536)),
        "[1]",
        "1",
        "null",
    ] {
        let emit = "SELECT watership.emit('t', '1', 'e', '{}', $1::text::jsonb)";
        assert!(admin.query(emit, &[&headers]).await.is_err(), "{headers:.40}");
        let insert = "INSERT INTO watership.outbox \
            (aggregate_type, aggregate_id, event_type, payload, headers) \
            VALUES ('t', '1', 'e', '{}', $1::text::jsonb)";
        assert!(admin.execute(insert, &[&headers]).await.is_err(), "{headers:.40}");
        let emit_wal = "SELECT watership.emit_wal('t', '1', 'e', '{}', $1::text::jsonb)";
        assert!(admin.query(emit_wal, &[&headers]).await.is_err(), "{headers:.40}");
    }
    let fine = r#"{"X-Request-Id": "1", "CCx": 1, "ws": 1, "nested": {"x-a": 1}}"#;
    let emit = "SELECT watership.emit('t', '1', 'e', '{}', $1::text::jsonb)";
    admin.query(emit, &[&fine]).await.expect("headers that only look reserved");

    let error = admin.query(emit, &[&r#"{"x-delay": 1}"#]).await.unwrap_err();
    let text = error.as_db_error().unwrap().message();
    assert!(text.contains("reserved names CC, BCC, x-* and ws-*"), "{text}");

    let long = "x".repeat(255);
    for values in [
        "'', '1', 'e', '{}', NULL",
        "'t', '', 'e', '{}', NULL",
        "'t', '1', '', '{}', NULL",
        &format!("'t', '1', '{long}', '{{}}', NULL"),
        &format!("'{}', '1', '{}', '{{}}', NULL", &long[..128], &long[..127]),
        "'t', repeat('k', 1025), 'e', '{}', NULL",
        "'t', '1', 'e', NULL, NULL",
        "'t', '1', 'e', '{}', '\\x00'",
    ] {
        let sql = format!(
            "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, \
             payload, data) \
             VALUES ({values})"
        );
        assert_eq!(refusal(&admin, &sql).await, CHECK_VIOLATION, "{sql}");
    }
    assert_eq!(refusal(&admin, "SELECT watership.emit('t', '1', 'e', '{')").await, "22P02");
}

#[tokio::test]
async fn an_application_may_only_add_events() {
    let (database, admin) = installed().await;
    let app = login_as(&database, &admin, "watership_app").await;
    app.batch_execute(
        "INSERT INTO watership.outbox (id, aggregate_type, aggregate_id, event_type, payload, \
         data, content_type, headers, traceparent) \
         VALUES (gen_random_uuid(), 't', '1', 'e', '{}', NULL, 'application/json', '{}', 'tp')",
    )
    .await
    .expect("a plain INSERT of every column but created_at");
    for sql in [
        "SELECT payload FROM watership.outbox",
        "SELECT * FROM watership.outbox",
        "UPDATE watership.outbox SET event_type = 'x'",
        "DELETE FROM watership.outbox",
        "TRUNCATE watership.outbox",
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload, seq) \
         VALUES ('t', '1', 'e', '{}', 1)",
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('t', '1', 'e', '{}') RETURNING payload",
        "INSERT INTO watership.outbox_default (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('t', '1', 'e', '{}')",
        "SELECT * FROM watership.checkpoint",
        "UPDATE watership.checkpoint SET ordinal = 0",
        "SELECT * FROM watership.migration",
        "SELECT * FROM watership.maintain('1 day')",
        "SELECT watership.detach_oldest('1 day')",
        "CREATE TABLE watership.mine ()",
        "SET ROLE watership_owner",
    ] {
        assert_eq!(refusal(&app, sql).await, DENIED, "{sql}");
    }
}

#[tokio::test]
async fn nobody_else_may_do_anything() {
    let (database, admin) = installed().await;
    let stranger = format!("{}_stranger", database.name);
    admin.batch_execute(&format!("CREATE ROLE {stranger} LOGIN")).await.unwrap();
    // Even with the schema open, tables and functions are not.
    admin.batch_execute(&format!("GRANT USAGE ON SCHEMA watership TO {stranger}")).await.unwrap();
    let client = connect_as(&database, &stranger).await;
    for sql in [
        "SELECT watership.emit('t', '1', 'e', '{}')",
        "SELECT watership.emit_bytes('t', '1', 'e', '\\x00', 'a/b')",
        "SELECT watership.append_event(NULL, 't', '1', 'e', '{}', NULL, NULL, NULL)",
        "SELECT * FROM watership.maintain('1 day')",
        "SELECT * FROM watership.create_days_ahead(1)",
        "SELECT * FROM watership.drop_passed('0/0', '0', 1)",
        "SELECT watership.delete_passed_default_rows('0/0', '1 day', 1)",
        "SELECT * FROM watership.outbox",
    ] {
        assert_eq!(refusal(&client, sql).await, DENIED, "{sql}");
    }
}

#[tokio::test]
async fn the_relay_owns_nothing_and_can_do_its_job() {
    let (database, admin) = installed().await;
    let relay = login_as(&database, &admin, "watership_relay").await;
    admin
        .batch_execute(
            "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, slot, \
             system_identifier, timeline, publication, publication_oid) VALUES \
             ('shop', 0, 1, 0, 1, 'watership', '1', 1, 'watership', 1)",
        )
        .await
        .unwrap();
    for sql in [
        "SELECT * FROM watership.outbox",
        "SELECT * FROM watership.maintain('14 days')",
        "SELECT * FROM watership.retired_partition, watership.default_retirement",
        "UPDATE watership.checkpoint SET kind = 'wal', epoch = 1, mark = 2, ordinal = 1, sub = 0, \
         flush_mark = 2, session_no = 1, slot = 's', system_identifier = '2', timeline = 2, \
         publication = 'p', publication_oid = 2, updated_at = now() \
         WHERE name = 'shop' AND session_no = 0",
    ] {
        relay.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    assert!(migrate::OUTBOX.pending(&relay).await.unwrap().is_empty());
    for sql in [
        "INSERT INTO watership.checkpoint (name, epoch, mark, ordinal, flush_mark, slot, \
         system_identifier, timeline, publication, publication_oid) VALUES \
         ('two', 0, 1, 0, 1, 'watership', '1', 1, 'watership', 1)",
        "UPDATE watership.checkpoint SET name = 'two'",
        "DELETE FROM watership.checkpoint",
        "INSERT INTO watership.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('t', '1', 'e', '{}')",
        "DELETE FROM watership.outbox",
        "DROP TABLE watership.outbox_default",
        "SELECT watership.emit('t', '1', 'e', '{}')",
        "SELECT watership.detach_oldest('1 day')",
        "CREATE TABLE watership.mine ()",
    ] {
        assert_eq!(refusal(&relay, sql).await, DENIED, "{sql}");
    }
    let owned = "SELECT count(*) FROM pg_class WHERE relnamespace = 'watership'::regnamespace \
        AND relowner <> 'watership_owner'::regrole";
    assert_eq!(admin.query_one(owned, &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn a_hostile_search_path_changes_nothing() {
    let (database, admin) = installed().await;
    let relay = login_as(&database, &admin, "watership_relay").await;
    let app = login_as(&database, &admin, "watership_app").await;
    let trap = "BEGIN RAISE EXCEPTION 'trapped'; END";
    admin
        .batch_execute(&format!(
            "CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO PUBLIC;
             CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS $t${trap}$t$;
             CREATE FUNCTION evil.gen_random_uuid() RETURNS uuid LANGUAGE plpgsql AS $t${trap}$t$;
             CREATE FUNCTION evil.format(text, VARIADIC text[]) RETURNS text LANGUAGE plpgsql
                 AS $t${trap}$t$;
             CREATE FUNCTION evil.jsonb_typeof(jsonb) RETURNS text LANGUAGE plpgsql
                 AS $t${trap}$t$;
             CREATE FUNCTION evil.less(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql
                 AS $t${trap}$t$;
             CREATE OPERATOR evil.< (FUNCTION = evil.less, LEFTARG = timestamptz,
                 RIGHTARG = timestamptz);
             CREATE OPERATOR evil.<= (FUNCTION = evil.less, LEFTARG = timestamptz,
                 RIGHTARG = timestamptz);
             CREATE TABLE evil.pg_inherits (inhparent oid, inhrelid oid);"
        ))
        .await
        .unwrap();
    let path = "SET search_path = evil, pg_catalog; \
        CREATE TEMP TABLE pg_class (oid oid); CREATE TEMP TABLE outbox (id uuid)";
    for client in [&relay, &app] {
        client.batch_execute(path).await.unwrap();
        // The trap is real: the session itself falls into it.
        assert!(client.batch_execute("SELECT now()").await.is_err());
    }
    admin.batch_execute("DROP TABLE watership.outbox_default").await.unwrap();
    admin
        .batch_execute(
            "SET ROLE watership_owner; \
             CREATE TABLE watership.outbox_default PARTITION OF watership.outbox DEFAULT; \
             CREATE TABLE watership.outbox_old PARTITION OF watership.outbox \
             FOR VALUES FROM ('2020-01-01') TO ('2020-01-02'); RESET ROLE",
        )
        .await
        .unwrap();
    let row = relay.query_one("SELECT * FROM watership.maintain('14 days')", &[]).await.unwrap();
    assert_eq!(row.get::<_, Vec<String>>("detached"), ["outbox_old"]);
    app.batch_execute("SELECT watership.emit('t', '1', 'e', '{}', '{\"a\": 1}')").await.unwrap();
}

#[tokio::test]
async fn applying_twice_or_at_once_installs_once() {
    let database = servers::own_database().await;
    let (mut one, mut two) = (database.connect().await, database.connect().await);
    assert_eq!(
        migrate::OUTBOX.pending(&one).await.unwrap().len(),
        migrate::OUTBOX.migrations.len()
    );
    let (first, second) =
        tokio::join!(migrate::OUTBOX.apply(&mut one), migrate::OUTBOX.apply(&mut two));
    let ran = first.unwrap().len() + second.unwrap().len();
    assert_eq!(ran, migrate::OUTBOX.migrations.len());
    assert!(migrate::OUTBOX.apply(&mut one).await.unwrap().is_empty());
    assert!(migrate::OUTBOX.pending(&one).await.unwrap().is_empty());
    let (first, second) =
        tokio::join!(migrate::grant_applications(&mut one), migrate::grant_applications(&mut two));
    first.and(second).unwrap();
    let role = one.query_one("SELECT current_user::text", &[]).await.unwrap();
    assert_eq!(role.get::<_, &str>(0), "postgres", "the session keeps its role");
}

#[tokio::test]
async fn a_changed_or_unknown_migration_needs_a_person() {
    let (_database, mut admin) = installed().await;
    let change = "UPDATE watership.migration SET checksum = 'other' WHERE version = 2";
    admin.batch_execute(change).await.unwrap();
    let error = migrate::OUTBOX.apply(&mut admin).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Verdict);
    assert!(error.to_string().contains("sql/0002_emit.sql"), "{error}");
    let newer = "UPDATE watership.migration SET checksum = NULL WHERE version = 2; \
        INSERT INTO watership.migration VALUES (9999, '9999_later')";
    admin.batch_execute(newer).await.unwrap();
    let error = migrate::OUTBOX.pending(&admin).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Verdict);
    assert!(error.to_string().contains("9999"), "{error}");
}

#[tokio::test]
async fn files_run_by_hand_with_psql_count_as_done() {
    let database = servers::own_database().await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|f| f.file_name().unwrap().as_encoded_bytes()[0].is_ascii_digit());
    files.sort();
    assert_eq!(files.len(), migrate::OUTBOX.migrations.len(), "each numbered file is a migration");
    files.push(folder.join("grant.sql"));
    let own = servers::postgres().await.bin_dir().join("psql");
    let psql = if own.exists() { own } else { PathBuf::from("psql") };
    for file in &files {
        let mut command = Command::new(&psql);
        command.args(["--single-transaction", "-q", "-v", "ON_ERROR_STOP=1", "-f"]);
        let output = command.arg(file).arg(&database.url).output().expect("psql runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.is_empty(), "{}: {text}", file.display());
    }
    let mut client = database.connect().await;
    assert!(migrate::OUTBOX.apply(&mut client).await.unwrap().is_empty());
    let app = login_as(&database, &client, "watership_app").await;
    app.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
}

#[tokio::test]
async fn an_administrator_without_superuser_can_install() {
    let database = servers::own_database().await;
    let root = database.connect().await;
    let admin = format!("{}_admin", database.name);
    root.batch_execute(&format!(
        "CREATE ROLE {admin} LOGIN CREATEROLE; GRANT CREATE ON DATABASE {} TO {admin}",
        database.name
    ))
    .await
    .unwrap();
    // In the shared cluster the roles may be another administrator's; then membership is given.
    let there = "SELECT FROM pg_roles WHERE rolname = 'watership_owner'";
    if root.query_opt(there, &[]).await.unwrap().is_some() {
        let grant = format!("GRANT watership_owner TO {admin}");
        root.batch_execute(&grant).await.unwrap();
    }
    let mut client = connect_as(&database, &admin).await;
    migrate::OUTBOX.apply(&mut client).await.unwrap();
    migrate::grant_applications(&mut client).await.unwrap();
    let app = login_as(&database, &root, "watership_app").await;
    app.batch_execute("SELECT watership.emit('t', '1', 'e', '{}')").await.unwrap();
}
