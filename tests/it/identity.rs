//! Ids of captured changes: the same from every relay that sees a change, never shared by two.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;
use watership::dev::StopMode;

use crate::support::inbox::Message;
use crate::support::servers::{database_of, own_vhost, private_postgres};
use crate::support::stage::{Running, Setup, Stage};
use crate::support::waiting::until;

/// The configuration of another relay of the stage: its own name, slot and publication.
fn another(stage: &Stage, name: &str, tables: &[&str]) -> String {
    let slot = &stage.slot;
    let lines = [
        ("name = \"shop\"", format!("name = \"{name}\"")),
        (
            &format!("source.slot = \"{slot}\""),
            format!("source.slot = \"{slot}_{name}\"\nsource.publication = \"{name}\""),
        ),
    ];
    let mut text = stage.configuration();
    for (old, new) in lines {
        assert!(text.contains(old), "{old} is missing from {text}");
        text = text.replacen(old, &new, 1);
    }
    let (before, after) = text.split_once("source.tables = ").expect("the captured tables");
    let (_, after) = after.split_once('\n').expect("more lines");
    format!("{before}source.tables = {tables:?}\n{after}")
}

/// Runs a command with another configuration than the stage's; returns what it wrote.
async fn run_with(stage: &Stage, configuration: &str, arguments: &[&str], code: i32) -> String {
    let own = stage.configuration();
    stage.replace_configuration(configuration);
    let ended = stage.run(arguments).await;
    stage.replace_configuration(&own);
    ended.expect_code(code);
    ended.log
}

/// Another relay of the stage, initialised and started.
pub async fn start_another(stage: &Stage, name: &str, tables: &[&str]) -> Running {
    let configuration = another(stage, name, tables);
    run_with(stage, &configuration, &["init"], 0).await;
    let mut running = stage.spawn_other(|_| configuration);
    running.ready().await;
    running
}

/// Keeps the stage's slot and checkpoint as they are now for a relay called `name`, which goes the
/// same way later.
pub async fn keep_place(stage: &Stage, name: &str) {
    let (slot, copy) = (&stage.slot, format!("{}_{name}", stage.slot));
    stage.execute(&format!("SELECT pg_copy_logical_replication_slot('{slot}', '{copy}')")).await;
    let columns = "epoch, mark, ordinal, flush_mark, session_no, system_identifier, timeline, \
        publication, publication_oid";
    let insert = format!(
        "INSERT INTO watership.checkpoint (name, slot, {columns}) \
         SELECT '{name}', '{copy}', {columns} FROM watership.checkpoint WHERE name = 'shop'"
    );
    stage.execute(&insert).await;
}

/// Starts a relay whose place was kept, with further lines of configuration.
pub async fn start_kept(stage: &Stage, name: &str, settings: &str) -> Running {
    let mut running = stage.spawn_other(|text| {
        let slot = format!("source.slot = \"{}\"", stage.slot);
        let kept = format!("source.slot = \"{}_{name}\"\n{settings}", stage.slot);
        let text = text.replacen("name = \"shop\"", &format!("name = \"{name}\""), 1);
        assert!(text.contains(&slot), "{text}");
        text.replacen(&slot, &kept, 1)
    });
    running.ready().await;
    running
}

/// Waits until these relays have settled all that is committed now; returns what each published.
pub async fn settled(stage: &Stage, relays: &[&str]) -> BTreeMap<String, Vec<Message>> {
    let now = stage.text("pg_current_wal_insert_lsn()").await;
    stage.execute("SELECT watership.emit('fence', '1', 'passed', '{}')").await;
    let passed = format!(
        "(SELECT min(flush_lsn) FROM watership.checkpoint WHERE name = ANY ('{{{}}}')) \
         > '{now}'::pg_lsn",
        relays.join(",")
    );
    until("the relays pass what is committed", async || stage.holds(&passed).await).await;
    let mut of: BTreeMap<String, Vec<Message>> = BTreeMap::new();
    for message in stage.settled_now().await {
        let relay = message.properties.app_id().as_ref().expect("an app_id").to_string();
        of.entry(relay).or_default().push(message);
    }
    of
}

/// What a change says, but for what depends on its reader.
pub fn content(message: &Message) -> Value {
    let mut body = message.json();
    if let Some(body) = body.as_object_mut() {
        body.remove("position");
    }
    serde_json::json!([message.kind(), message.text("ws-key"), body])
}

/// Contents by id. Each id has one content, and each message was sent once.
fn contents(messages: &[Message]) -> HashMap<String, Value> {
    let mut contents = HashMap::new();
    for message in messages {
        let before = contents.insert(message.id(), content(message));
        assert_eq!(before, None, "an id twice: {message:?}");
    }
    contents
}

/// Every change of `part` has in `whole` the same id.
fn assert_agree(whole: &HashMap<String, Value>, part: &HashMap<String, Value>) {
    for (id, content) in part {
        assert_eq!(whole.get(id), Some(content), "{id}");
    }
}

const TWO_TABLES: &str = "CREATE TABLE public.orders (id int PRIMARY KEY, n int); \
    CREATE TABLE public.invoices (id int PRIMARY KEY, n int)";

#[tokio::test]
async fn relays_of_different_tables_share_no_id_and_one_of_both_tables_agrees_with_them() {
    let tables = ["public.orders", "public.invoices"];
    let stage = Stage::new(Setup { sql: TWO_TABLES, tables: &tables, ..Setup::default() }).await;
    let _both = stage.start().await;
    let _orders = start_another(&stage, "orders", &["public.orders"]).await;
    let _invoices = start_another(&stage, "invoices", &["public.invoices"]).await;
    for sql in [
        "BEGIN; INSERT INTO orders VALUES (1, 1); INSERT INTO invoices VALUES (1, 1); \
         SELECT watership.emit('t', '1', 'e', '1'); UPDATE invoices SET n = 2; \
         UPDATE orders SET n = 2; COMMIT",
        "BEGIN; INSERT INTO invoices VALUES (2, 1); SELECT watership.emit('t', '1', 'e', '2'); \
         INSERT INTO orders SELECT g, 1 FROM generate_series(2, 9) AS g; COMMIT",
        "BEGIN; DELETE FROM invoices; DELETE FROM orders; COMMIT",
        "TRUNCATE orders, invoices",
    ] {
        stage.execute(sql).await;
    }
    let got = settled(&stage, &["shop", "orders", "invoices"]).await;
    let [both, orders, invoices] = ["shop", "orders", "invoices"].map(|name| contents(&got[name]));
    assert_eq!((both.len(), orders.len(), invoices.len()), (28, 22, 8));
    assert_agree(&both, &orders);
    assert_agree(&both, &invoices);
    let shared = orders.keys().filter(|id| invoices.contains_key(*id)).count();
    assert_eq!(shared, 2, "only the events of the outbox, which both relays publish");
}

#[tokio::test]
async fn a_row_filter_shifts_no_id_of_the_rows_that_pass_it() {
    let sql = "CREATE TABLE public.keyed (id int PRIMARY KEY, n int); \
        CREATE TABLE public.lines (line text); ALTER TABLE public.lines REPLICA IDENTITY FULL";
    let tables = ["public.keyed", "public.lines"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let _all = stage.start().await;
    stage
        .execute(
            "CREATE PUBLICATION part FOR TABLE watership.outbox, watership.canary, \
             public.keyed WHERE (id % 3 = 0), public.lines WHERE (line LIKE '%7%') \
             WITH (publish_via_partition_root = true)",
        )
        .await;
    let _part = start_another(&stage, "part", &tables).await;
    for sql in [
        "COPY keyed (id) FROM PROGRAM 'seq 1 700'",
        "UPDATE keyed SET n = 1 WHERE id % 2 = 0",
        "DELETE FROM keyed WHERE id <= 60",
        "COPY lines FROM PROGRAM 'seq 1 300 | sed \"p;p\"'",
        "UPDATE lines SET line = line || ' 7' WHERE line LIKE '17%'",
        "DELETE FROM lines WHERE line LIKE '7%'",
        "BEGIN; SAVEPOINT a; INSERT INTO keyed VALUES (3), (4); ROLLBACK TO a; \
         INSERT INTO keyed VALUES (3), (6); RELEASE a; COMMIT",
    ] {
        stage.execute(sql).await;
    }
    let got = settled(&stage, &["shop", "part"]).await;
    let (all, part) = (contents(&got["shop"]), contents(&got["part"]));
    let lines = 3 * 300 + 3 * 11 + 3 * 11;
    let with_7 = 3 * 57 + 3 * 11 + 3 * 11;
    assert_eq!(all.len(), 700 + 350 + 60 + 2 + lines);
    assert_eq!(part.len(), 233 + 116 + 20 + 2 + with_7);
    assert_agree(&all, &part);
}

#[tokio::test]
async fn check_names_a_row_filter_that_rewrites_changes_and_only_those_get_other_ids() {
    let sql = "CREATE TABLE public.jobs (id int PRIMARY KEY, state text); \
        ALTER TABLE public.jobs REPLICA IDENTITY FULL";
    let tables = ["public.jobs"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    let _all = stage.start().await;
    stage
        .execute(
            "CREATE PUBLICATION part FOR TABLE watership.outbox, watership.canary, \
             public.jobs WHERE (state = 'open') WITH (publish_via_partition_root = true)",
        )
        .await;
    let _part = start_another(&stage, "part", &tables).await;
    let said = run_with(&stage, &another(&stage, "part", &tables), &["check"], 0).await;
    let warning = "an UPDATE that moves a row into or out of the row filter arrives as an INSERT \
        or DELETE, and a relay with another filter gives it a different id";
    assert!(said.contains(warning), "{said}");
    let said = stage.run(&["check"]).await.log;
    assert!(!said.contains("a different id"), "{said}");
    for sql in [
        "INSERT INTO jobs SELECT g, CASE WHEN g % 2 = 0 THEN 'open' ELSE 'new' END \
         FROM generate_series(1, 10) AS g",
        "UPDATE jobs SET id = -id WHERE id = 2",
        "UPDATE jobs SET state = 'done' WHERE id = 4",
        "UPDATE jobs SET state = 'open' WHERE id = 5",
        "DELETE FROM jobs",
    ] {
        stage.execute(sql).await;
    }
    let got = settled(&stage, &["shop", "part"]).await;
    let (all, part) = (contents(&got["shop"]), contents(&got["part"]));
    assert_eq!((all.len(), part.len()), (23, 13));
    let unknown: Vec<&Value> =
        part.iter().filter(|(id, _)| !all.contains_key(*id)).map(|(_, content)| content).collect();
    assert_eq!(unknown.len(), 1, "{unknown:?}");
    assert_eq!(unknown[0][2]["before"], serde_json::json!({"id": 4, "state": "open"}));
    // What moved in arrives as an INSERT, and is the same change.
    let ids = |of: &[Message], op: &str| {
        let mut of =
            of.iter().filter(|m| m.text("ws-op") == op && m.text("ws-key").ends_with("/5"));
        of.next().map(Message::id)
    };
    let moved = ids(&got["part"], "insert");
    assert!(moved.is_some() && moved == ids(&got["shop"], "update"));
}

#[tokio::test]
async fn a_partition_gives_the_same_ids_under_its_own_name_and_under_its_roots() {
    // The partition has its columns in another order, and one that is gone.
    let table = |root: &str, leaf: &str| {
        format!(
            "CREATE TABLE {root} (day date, id int, note text, PRIMARY KEY (id, day)) \
             PARTITION BY RANGE (day); \
             CREATE TABLE {leaf} (note text, gone int, id int NOT NULL, day date NOT NULL); \
             ALTER TABLE {leaf} DROP COLUMN gone; \
             ALTER TABLE {root} ATTACH PARTITION {leaf} FOR VALUES FROM ('2026-01-01') \
             TO ('2026-02-01'); \
             CREATE TABLE {leaf}_next PARTITION OF {root} FOR VALUES FROM ('2026-02-01') \
             TO ('2026-03-01'); "
        )
    };
    let mut sql =
        table("public.days", "public.january") + &table("public.full_days", "public.full");
    for table in ["full_days", "\"full\"", "full_next"] {
        sql += &format!("ALTER TABLE {table} REPLICA IDENTITY FULL; ");
    }
    let tables = ["public.days", "public.full_days"];
    let stage = Stage::new(Setup { sql: &sql, tables: &tables, ..Setup::default() }).await;
    let _root = stage.start().await;
    let leaves = ["public.january", "public.full"];
    let _leaf = start_another(&stage, "leaf", &leaves).await;
    for table in tables {
        for sql in [
            "INSERT INTO TABLE SELECT date '2026-01-01' + g % 40, g, g % 3 FROM \
             generate_series(1, 400) AS g",
            "UPDATE TABLE SET note = 'x' WHERE id % 7 = 0",
            "UPDATE TABLE SET day = day + 25 WHERE id % 50 = 0",
            "DELETE FROM TABLE WHERE id % 11 = 0",
        ] {
            stage.execute(&sql.replace("TABLE", table)).await;
        }
    }
    let got = settled(&stage, &["shop", "leaf"]).await;
    // The names differ.
    let rows = |messages: &[Message]| -> HashMap<String, Value> {
        let row = |message: &Message| {
            let body = message.json();
            let row = serde_json::json!([body["op"], body["key"], body["before"], body["after"]]);
            (message.id(), row)
        };
        let rows: HashMap<_, _> = messages.iter().map(row).collect();
        assert_eq!(rows.len(), messages.len(), "each id once");
        rows
    };
    let (root, leaf) = (rows(&got["shop"]), rows(&got["leaf"]));
    assert!(leaf.len() > 600 && root.len() > leaf.len() + 200, "{} {}", root.len(), leaf.len());
    assert_agree(&root, &leaf);
}

/// What is done to the tables, and the column of `items` that has another name afterwards.
const ALTERATIONS: &[(&str, Option<(&str, &str)>)] = &[
    ("ALTER TABLE items ADD COLUMN price numeric DEFAULT 1.5", None),
    ("ALTER TABLE items DROP COLUMN note", None),
    ("ALTER TABLE items RENAME COLUMN name TO title", Some(("NAME", "title"))),
    ("ALTER TABLE lines RENAME COLUMN n TO a", None),
    ("ALTER TABLE items REPLICA IDENTITY FULL", None),
    ("ALTER TABLE items ALTER COLUMN title TYPE varchar(40)", None),
    ("CREATE UNIQUE INDEX wide ON items (id, part)", None),
    ("ALTER TABLE items REPLICA IDENTITY USING INDEX wide", None),
    ("ALTER TABLE items ALTER COLUMN part TYPE numeric(9, 2)", None),
    ("ALTER TABLE items REPLICA IDENTITY DEFAULT", None),
    ("ALTER TABLE items RENAME COLUMN part TO shelf", Some(("PART", "shelf"))),
    ("ALTER TABLE items REPLICA IDENTITY FULL", None),
    ("ALTER TABLE items RENAME COLUMN id TO number", Some(("ID", "number"))),
    ("ALTER TABLE lines DROP COLUMN a; ALTER TABLE lines ADD COLUMN z int", None),
    ("ALTER TABLE lines ADD COLUMN id serial PRIMARY KEY", None),
];

#[tokio::test]
async fn a_replay_after_alterations_gives_the_ids_and_bodies_of_before() {
    let sql = "CREATE TABLE public.items (id int, part int, name text, note text, kind regclass, \
        PRIMARY KEY (part, id)); \
        CREATE TABLE public.lines (line text, n int); \
        ALTER TABLE public.lines REPLICA IDENTITY FULL";
    let tables = ["public.items", "public.lines"];
    let stage = Stage::new(Setup { sql, tables: &tables, ..Setup::default() }).await;
    keep_place(&stage, "again").await;
    let relay = stage.start().await;
    let changes = "INSERT INTO items (ID, PART, NAME, kind) \
         SELECT g, g % 3, g, 'pg_class' FROM generate_series($, $ + 9) AS g; \
         UPDATE items SET NAME = NAME || 'x' WHERE ID BETWEEN $ AND $ + 5; \
         UPDATE items SET ID = -ID WHERE ID = $ + 1; \
         DELETE FROM items WHERE ID = $ + 2; \
         INSERT INTO lines VALUES ('a', 1), ('a', 1), ('b', NULL); DELETE FROM lines";
    let mut names = HashMap::from([("ID", "id"), ("PART", "part"), ("NAME", "name")]);
    for (round, (alter, renamed)) in ALTERATIONS.iter().enumerate() {
        let mut sql = changes.replace('$', &(100 * round + 1).to_string());
        for (name, now) in &names {
            sql = sql.replace(name, now);
        }
        stage.execute(&sql).await;
        stage.execute(alter).await;
        names.extend(*renamed);
    }
    let before = settled(&stage, &["shop"]).await;
    relay.stop().await.expect_code(0);
    // What a database or a role prefers does not change the text of a value.
    let odd = "ALTER DATABASE \"DB\" SET quote_all_identifiers = on; \
        ALTER DATABASE \"DB\" SET search_path = 'public'";
    stage.execute(&odd.replace("DB", &stage.database.name)).await;
    let _again = start_kept(&stage, "again", "").await;
    let after = settled(&stage, &["again"]).await;
    // A session that ended when a key was renamed may have sent something twice.
    let by_id = |messages: &[Message]| -> HashMap<String, Value> {
        messages.iter().map(|message| (message.id(), content(message))).collect()
    };
    let (before, after) = (by_id(&before["shop"]), by_id(&after["again"]));
    assert_eq!(before.len(), ALTERATIONS.len() * (10 + 6 + 1 + 1 + 3 + 3));
    assert_eq!(before.len(), after.len());
    assert_agree(&before, &after);
}

#[tokio::test]
async fn after_a_volume_was_restored_no_id_is_used_for_another_change() {
    const ROWS: usize = 30;
    let mut server = private_postgres(&["autovacuum = off"], None).await;
    let sql = "CREATE TABLE public.items (id int PRIMARY KEY, life int, n int)";
    let tables = ["public.items"];
    let settings = "outbox.maintain = false";
    let setup = Setup { sql, tables: &tables, settings, ..Setup::default() };
    let mut stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let rows = format!("INSERT INTO items SELECT g, 0, 0 FROM generate_series(1, {ROWS}) AS g");
    stage.execute(&rows).await;
    let relay = stage.start().await;
    settled(&stage, &["shop"]).await;
    relay.stop().await.expect_code(0);
    server.stop(StopMode::Fast).await.expect("stops");
    let (data, copy) = (server.data_dir(), server.data_dir().with_extension("copy"));
    copy_all(&data, &copy);
    // The same statements in two lives of the volume: the same places in the WAL, other rows.
    for life in 1..=2 {
        if life == 2 {
            server.stop(StopMode::Fast).await.expect("stops");
            std::fs::remove_dir_all(&data).expect("removed");
            copy_all(&copy, &data);
        }
        server.start_again().await.expect("starts");
        stage.sql = stage.database.connect().await;
        for id in 1..=ROWS {
            let update = format!("UPDATE items SET life = {life}, n = n + 1 WHERE id = {id}");
            stage.execute(&update).await;
        }
        let relay = stage.start().await;
        settled(&stage, &["shop"]).await;
        relay.stop().await.expect_code(0);
    }
    let got = stage.settled_now().await;
    let lives = |life: i32| -> Vec<&Message> {
        got.iter().filter(|message| message.json()["after"]["life"] == life).collect()
    };
    let (first, second) = (lives(1), lives(2));
    let place = |message: &&Message| message.json()["source"].to_string();
    let places: HashSet<String> = first.iter().map(place).collect();
    let same = second.iter().filter(|message| places.contains(&place(message))).count();
    assert!(same > 0, "the restored volume hands out the same LSNs: {places:?}");
    let mut by_id: HashMap<String, Value> = HashMap::new();
    for message in &got {
        let content = content(message);
        let other = by_id.insert(message.id(), content.clone());
        assert!(other.is_none() || other == Some(content), "{message:?}");
    }
    assert_eq!(by_id.len(), 3 * ROWS);
}

/// Copies a directory with its owners, as a snapshot of a volume would.
fn copy_all(from: &std::path::Path, to: &std::path::Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(status.expect("cp").success(), "{from:?} is not copied");
}

#[tokio::test]
async fn a_truncate_that_is_cut_between_its_tables_goes_on_with_the_same_ids() {
    let sql = "CREATE TABLE public.a (id int PRIMARY KEY); \
        CREATE TABLE public.b (id int PRIMARY KEY); CREATE TABLE public.c (id int PRIMARY KEY)";
    let tables = ["public.a", "public.b", "public.c"];
    // Nothing is bound to `later`: what goes there is held.
    let route = |table: &str, exchange: &str| {
        format!(
            "[[route]]\nname = \"{table}\"\ntable = \"public.{table}\"\n\
             exchange = \"{exchange}\"\nrouting_key = \"{table}.{{op}}\"\n"
        )
    };
    let routes = route("a", "watership")
        + &route("b", "later")
        + &route("c", "watership")
        + "[[exchange]]\nname = \"later\"\nkind = \"topic\"\n";
    let stage =
        Stage::new(Setup { sql, tables: &tables, routes: &routes, ..Setup::default() }).await;
    keep_place(&stage, "again").await;
    let relay = stage.start().await;
    stage.execute("BEGIN; INSERT INTO a VALUES (1); TRUNCATE a, b, c; COMMIT").await;
    let stored = "(SELECT ordinal = 2 AND sub = 0 FROM watership.checkpoint WHERE name = 'shop')";
    until("the first table is settled", async || stage.holds(stored).await).await;
    stage.inbox.count(3).await;
    relay.kill();
    stage
        .channel
        .queue_bind(
            "all".into(),
            "later".into(),
            "#".into(),
            Default::default(),
            Default::default(),
        )
        .await
        .expect("bound");
    let relay = stage.start().await;
    let first = settled(&stage, &["shop"]).await;
    relay.stop().await.expect_code(0);
    let _again = start_kept(&stage, "again", "").await;
    let again = settled(&stage, &["again"]).await;
    let ids = |messages: &[Message]| -> Vec<(String, String)> {
        let mut ids: Vec<_> = messages.iter().map(|m| (m.text("ws-source"), m.id())).collect();
        ids.sort();
        ids
    };
    let mut first = ids(&first["shop"]);
    let sent_again = first.len();
    first.dedup();
    assert_eq!((first.len(), sent_again), (4, 5), "only c was confirmed and not settled");
    assert_eq!(first, ids(&again["again"]));
    assert_eq!(first.iter().map(|(_, id)| id).collect::<HashSet<_>>().len(), 4);
}

#[tokio::test]
async fn prepared_transactions_savepoints_and_long_copies_have_the_same_ids_in_two_relays() {
    let server = private_postgres(&["max_prepared_transactions = 5"], None).await;
    let setup = Setup {
        sql: TWO_TABLES,
        tables: &["public.orders", "public.invoices"],
        ..Setup::default()
    };
    let stage = Stage::on(database_of(&server), own_vhost().await, setup).await;
    let _both = stage.start().await;
    let _orders = start_another(&stage, "orders", &["public.orders"]).await;
    for sql in [
        "BEGIN; COPY orders (id) FROM PROGRAM 'seq 1 3000'; SAVEPOINT a; \
         COPY invoices (id) FROM PROGRAM 'seq 1 3000'; ROLLBACK TO a; \
         COPY invoices (id) FROM PROGRAM 'seq 1 2000'; PREPARE TRANSACTION 'one'",
        "INSERT INTO orders VALUES (-1, 1)",
        "BEGIN; SAVEPOINT a; INSERT INTO invoices VALUES (-1, 1); SAVEPOINT b; \
         INSERT INTO orders VALUES (-2, 1); ROLLBACK TO b; INSERT INTO orders VALUES (-2, 2); \
         RELEASE b; RELEASE a; UPDATE orders SET n = 3 WHERE id = -2; COMMIT",
        "COMMIT PREPARED 'one'",
        "DO $$ BEGIN FOR i IN -99..-90 LOOP BEGIN INSERT INTO orders VALUES (i, i); \
         INSERT INTO invoices VALUES (i, 1); IF i % 2 = 0 THEN RAISE 'no'; END IF; \
         EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$",
    ] {
        stage.execute(sql).await;
    }
    let got = settled(&stage, &["shop", "orders"]).await;
    let (both, orders) = (contents(&got["shop"]), contents(&got["orders"]));
    assert_eq!((both.len(), orders.len()), (5_000 + 1 + 3 + 10, 3_000 + 1 + 2 + 5));
    assert_agree(&both, &orders);
}
