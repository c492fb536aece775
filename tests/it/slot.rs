//! Slots, publications, tables and server facts, as the real server tells them.

use std::time::Duration;

use tokio_postgres::NoTls;
use watership::dev::{Postgres, PostgresOptions};
use watership::pg::publication::{
    CatalogIdentity, TableName, add_tables, create_publication, read_publication, read_table,
};
use watership::pg::slot::{WalStatus, create_slot, read_slot, server_facts};

use crate::support::servers;

#[tokio::test]
async fn a_new_slot_is_told_as_it_is() {
    let database = servers::own_database().await;
    let client = database.connect().await;
    let name = database.name.as_str();
    assert_eq!(read_slot(&client, name).await.unwrap(), None);
    let start = create_slot(&client, name, false).await.unwrap();
    let slot = read_slot(&client, name).await.unwrap().expect("it is there");
    assert_eq!(slot.confirmed_flush_lsn, Some(start));
    assert_eq!(slot.plugin.as_deref(), Some("pgoutput"));
    assert_eq!(slot.database.as_deref(), Some(name));
    assert_eq!((slot.temporary, slot.two_phase, slot.active_pid), (false, false, None));
    assert_eq!((slot.failover, slot.synced, slot.invalidation_reason), (false, false, None));
    assert_eq!(slot.wal_status, Some(WalStatus::Reserved));
    assert!(slot.restart_lsn.unwrap() <= start);
    client.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 1000)").await.unwrap();
    let later = read_slot(&client, name).await.unwrap().expect("it is there");
    assert!(later.lag_bytes > slot.lag_bytes && later.retained_bytes >= later.lag_bytes);

    let error = create_slot(&client, name, false).await.unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
    client.execute("SELECT pg_drop_replication_slot($1)", &[&name]).await.unwrap();
}

#[tokio::test]
async fn a_lost_slot_says_so() {
    let conf = vec!["max_slot_wal_keep_size = '16MB'".to_owned(), "min_wal_size = '32MB'".into()];
    let server =
        Postgres::start(PostgresOptions { conf, ..Default::default() }).await.expect("a server");
    let url = server.url("postgres", "postgres");
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    tokio::spawn(connection);
    create_slot(&client, "watership", false).await.unwrap();
    let facts = server_facts(&client).await.unwrap();
    assert_eq!(facts.max_slot_wal_keep_size, Some(16 * 1024 * 1024));
    assert_eq!(facts.used_replication_slots, 1);
    for _ in 0..5 {
        // Something must be in a segment for it to be switched.
        let fill = "CREATE TABLE IF NOT EXISTS t (); SELECT pg_logical_emit_message(true, 'a', '')";
        client.batch_execute(fill).await.unwrap();
        client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    }
    client.batch_execute("CHECKPOINT").await.unwrap();
    let slot = read_slot(&client, "watership").await.unwrap().expect("it is there");
    assert_eq!(slot.wal_status, Some(WalStatus::Lost), "{slot:?}");
    if server.major() >= 17 {
        assert_eq!(slot.invalidation_reason.as_deref(), Some("wal_removed"));
    }
}

#[tokio::test]
async fn the_server_tells_its_facts_to_any_role() {
    let database = servers::own_database().await;
    let admin = database.connect().await;
    let user = format!("{}_plain", database.name);
    admin.batch_execute(&format!("CREATE ROLE {user} LOGIN")).await.unwrap();
    let server = servers::postgres().await;
    let url = server.url(&user, &database.name);
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    tokio::spawn(connection);
    let facts = server_facts(&client).await.unwrap();
    assert_eq!(facts.version_num.cast_unsigned() / 10_000, server.major());
    assert_eq!((facts.wal_level.as_str(), facts.in_recovery), ("logical", false));
    assert!(facts.max_replication_slots > 0 && facts.max_wal_senders > 0);
    assert_eq!(facts.timeline, 1);
    assert!(facts.wal_lsn.0 > 0 && facts.system_identifier > 0);
    assert_eq!((facts.max_slot_wal_keep_size, facts.idle_replication_slot_timeout), (None, None));
    assert!(facts.wal_sender_timeout.is_none_or(|limit| limit >= Duration::from_secs(1)));
    assert_eq!((facts.user, facts.database), (user, database.name.clone()));
    assert_eq!(facts.synchronous_standby_names, "");
}

#[tokio::test]
async fn a_publication_is_read_back_with_all_that_it_leaves_out() {
    let database = servers::own_database().await;
    let client = database.connect().await;
    let hostile = TableName::new("s\"; --", "größe, 'x'.\\");
    let plain = TableName::new("public", "plain");
    client
        .batch_execute(&format!(
            "CREATE SCHEMA \"s\"\"; --\"; CREATE TABLE {} (id int PRIMARY KEY, note text); \
             CREATE TABLE plain (id int PRIMARY KEY, note text); \
             CREATE TABLE parted (id int PRIMARY KEY) PARTITION BY RANGE (id); \
             CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (9)",
            hostile.quoted()
        ))
        .await
        .unwrap();
    let name = "pub, \"lication\"";
    assert_eq!(read_publication(&client, name).await.unwrap(), None);
    let parted = TableName::new("public", "parted");
    create_publication(&client, name, &[hostile.clone(), parted.clone()]).await.unwrap();
    let made = read_publication(&client, name).await.unwrap().expect("it is there");
    assert!(made.via_root && !made.all_tables);
    let all = made.operations;
    assert!(all.insert && all.update && all.delete && all.truncate);
    let names: Vec<_> = made.tables.iter().map(|t| t.table.clone()).collect();
    assert_eq!(names, [parted, hostile], "the root and not its partition");
    assert!(made.tables.iter().all(|t| t.row_filter.is_none() && t.columns.is_none()));

    add_tables(&client, name, std::slice::from_ref(&plain)).await.unwrap();
    let read = read_publication(&client, name).await.unwrap().unwrap();
    assert_eq!((read.oid, read.tables.len()), (made.oid, 3));
    client
        .batch_execute(
            "DROP PUBLICATION \"pub, \"\"lication\"\"\"; \
             CREATE PUBLICATION \"pub, \"\"lication\"\"\" FOR TABLE plain (id) WHERE (id > 5) \
             WITH (publish = 'insert, update')",
        )
        .await
        .unwrap();
    let narrow = read_publication(&client, name).await.unwrap().unwrap();
    assert_ne!(narrow.oid, made.oid, "another publication of the same name");
    assert!(!narrow.via_root && narrow.operations.update && !narrow.operations.delete);
    assert_eq!(narrow.tables[0].columns, Some(vec!["id".to_owned()]));
    assert!(narrow.tables[0].row_filter.as_ref().unwrap().contains("id > 5"));

    let twice = create_publication(&client, name, &[plain]).await.unwrap_err();
    assert!(twice.to_string().contains("lication"), "{twice}");
}

#[tokio::test]
async fn each_replica_identity_is_told() {
    let database = servers::own_database().await;
    let client = database.connect().await;
    client
        .batch_execute(
            "CREATE TABLE keyed (a int, b int, c int, PRIMARY KEY (c, a) INCLUDE (b)); \
             CREATE TABLE bare (a int); \
             CREATE TABLE whole (a int PRIMARY KEY); ALTER TABLE whole REPLICA IDENTITY FULL; \
             CREATE TABLE mute (a int PRIMARY KEY); ALTER TABLE mute REPLICA IDENTITY NOTHING; \
             CREATE TABLE chosen (a int PRIMARY KEY, b int NOT NULL, c int NOT NULL); \
             CREATE UNIQUE INDEX chosen_key ON chosen (c, b); \
             ALTER TABLE chosen REPLICA IDENTITY USING INDEX chosen_key; \
             CREATE VIEW view AS SELECT 1",
        )
        .await
        .unwrap();
    let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    for (name, identity, key) in [
        ("keyed", CatalogIdentity::Key(words(&["c", "a"])), words(&["c", "a"])),
        ("bare", CatalogIdentity::Nothing, vec![]),
        ("whole", CatalogIdentity::Full, words(&["a"])),
        ("mute", CatalogIdentity::Nothing, words(&["a"])),
        ("chosen", CatalogIdentity::Index(words(&["c", "b"])), words(&["a"])),
    ] {
        let table = TableName::new("public", name);
        let facts = read_table(&client, &table).await.unwrap().expect("it is there");
        assert_eq!((facts.identity, facts.primary_key), (identity, key), "{name}");
        assert!(facts.may_select && !facts.partitioned);
    }
    assert_eq!(read_table(&client, &TableName::new("public", "nothing")).await.unwrap(), None);
    let view = read_table(&client, &TableName::new("public", "view")).await.unwrap().unwrap();
    assert_eq!(view.nature.other_than_table, Some("a view"));
    client.batch_execute("DROP INDEX chosen_key").await.unwrap();
    let chosen = read_table(&client, &TableName::new("public", "chosen")).await.unwrap().unwrap();
    assert_eq!(chosen.identity, CatalogIdentity::Nothing, "its index is gone");
}
