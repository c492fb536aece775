//! The Postgres half of `check`: server, role, schema, slot, publication, tables, checkpoint.

use tokio_postgres::Client;

use super::findings::Findings;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::migrate;
use crate::pg::publication::{Publication, ReplicaIdentity, TableFacts, TableName};
use crate::pg::publication::{read_publication, read_table};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus, read_slot, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::relay::position_check::{START_THE_STANDBY, at_risk, held_by_standby};
use crate::relay::{checkpoint, session, table_check};
use crate::route::keys_of;
use crate::verdict::Verdict;

const INIT: &str = "run `watership init`";

/// Adds what it finds; never fails, because a failure is a finding too.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    let client = match sql(&config.source.sql).await {
        Ok(SqlConnection { client, closed: _ }) => client,
        Err(error) => return f.error("postgres", &error),
    };
    if let Err(error) = look(f, config, &client).await {
        f.error("postgres", &error);
    }
}

async fn look(f: &mut Findings, config: &Config, client: &Client) -> Result<()> {
    let server = server_facts(client).await?;
    let slot = read_slot(client, &config.source.slot).await?;
    check_server(f, config, &server);
    check_capacity(f, &server, slot.as_ref());
    check_encoding(f, client).await?;
    check_role(f, client, &server).await?;
    let publication = read_publication(client, &config.source.publication).await?;
    match &publication {
        Some(publication) => check_publication(f, config, publication),
        None => f.problem(
            "publication",
            format!("{:?} does not exist", config.source.publication),
            INIT,
        ),
    }
    check_tables(f, config, client, publication.as_ref()).await?;
    check_slot(f, config, &server, slot.as_ref());
    if check_schema(f, client).await {
        check_checkpoint(f, config, client, &server).await?;
    }
    Ok(())
}

fn check_server(f: &mut Findings, config: &Config, server: &ServerFacts) {
    if server.version_num < 150_000 {
        f.problem("postgres", format!("version {}", server.version), "15 or later is needed");
    } else {
        f.ok("postgres", format!("{}, Postgres {}", config.source.sql, server.version));
    }
    if server.wal_level == "logical" {
        f.ok("wal_level", "logical");
    } else {
        f.problem(
            "wal_level",
            format!("{:?}, logical replication needs \"logical\"", server.wal_level),
            "ALTER SYSTEM SET wal_level = 'logical', then restart Postgres",
        );
    }
    if server.in_recovery {
        f.problem(
            "postgres",
            "the server is a standby (in recovery)",
            "name the primary in source.url",
        );
    }
    match server.max_slot_wal_keep_size {
        Some(bytes) => f.ok("disk", format!("a slot may keep {} MiB of WAL", bytes >> 20)),
        None => f.warning(
            "disk",
            "max_slot_wal_keep_size is -1: while the relay is down, WAL fills the disk",
            "set it to what the disk can hold, and alert on watership_safe_wal_size_bytes",
        ),
    }
    if let Some(limit) = server.idle_replication_slot_timeout {
        f.warning(
            "slot",
            format!("idle_replication_slot_timeout: the slot is lost after {limit:?} of downtime"),
            "set it to 0, or make sure that no downtime is that long",
        );
    }
}

fn check_capacity(f: &mut Findings, server: &ServerFacts, slot: Option<&SlotState>) {
    let (used, most) = (server.used_replication_slots, server.max_replication_slots);
    if slot.is_none() && used >= most {
        f.problem(
            "slots",
            format!("all {most} replication slots are in use"),
            "raise max_replication_slots and restart, or drop a slot that nobody needs",
        );
    } else {
        f.ok("slots", format!("{used} of {most} replication slots in use"));
    }
    let (used, most) = (server.used_wal_senders, server.max_wal_senders);
    let is_active = slot.is_some_and(|slot| slot.active_pid.is_some());
    if used >= most && !is_active {
        f.problem(
            "walsenders",
            format!("all {most} walsenders are in use"),
            "raise max_wal_senders and restart",
        );
    } else {
        f.ok("walsenders", format!("{used} of {most} walsenders in use"));
    }
}

async fn check_encoding(f: &mut Findings, client: &Client) -> Result<()> {
    let sql = "SELECT current_setting('server_encoding')";
    let encoding: String = client.query_one(sql, &[]).await.map_err(postgres_error)?.get(0);
    if encoding == "SQL_ASCII" {
        f.problem(
            "encoding",
            "the database is SQL_ASCII: text is not known to be UTF-8",
            "use a database with encoding UTF8",
        );
    } else {
        f.ok("encoding", encoding);
    }
    Ok(())
}

async fn check_role(f: &mut Findings, client: &Client, server: &ServerFacts) -> Result<()> {
    let user = &server.user;
    let quoted = postgres_protocol::escape::escape_identifier(user);
    if server.user_may_replicate {
        f.ok("role", format!("{user} may replicate"));
    } else {
        f.problem(
            "role",
            format!("{user} has no REPLICATION attribute"),
            format!("as superuser: ALTER ROLE {quoted} REPLICATION"),
        );
    }
    let sql = "SELECT pg_has_role(oid, 'USAGE') FROM pg_roles WHERE rolname = 'watership_relay'";
    let row = client.query_opt(sql, &[]).await.map_err(postgres_error)?;
    match row.map(|row| row.get::<_, bool>(0)) {
        Some(true) => f.ok("role", format!("{user} has the rights of watership_relay")),
        Some(false) => f.problem(
            "role",
            format!("{user} is no member of watership_relay"),
            format!("{INIT}, or as superuser: GRANT watership_relay TO {quoted}"),
        ),
        None => f.problem("role", "role watership_relay does not exist", INIT),
    }
    Ok(())
}

/// True when the schema is complete and may be read.
async fn check_schema(f: &mut Findings, client: &Client) -> bool {
    match migrate::pending(client).await {
        Ok(pending) if pending.is_empty() => {
            let newest = migrate::MIGRATIONS.last().map_or("", |m| m.name);
            f.ok("schema", format!("watership, at {newest}"));
            true
        }
        Ok(pending) => {
            let names: Vec<&str> = pending.iter().map(|m| m.name).collect();
            f.problem("schema", format!("not applied: {}", names.join(", ")), INIT);
            false
        }
        Err(error) => {
            f.error("schema", &error);
            false
        }
    }
}

fn check_slot(f: &mut Findings, config: &Config, server: &ServerFacts, slot: Option<&SlotState>) {
    let name = &config.source.slot;
    let Some(slot) = slot else {
        return f.problem("slot", format!("{name:?} does not exist"), INIT);
    };
    if slot.database.as_deref() != Some(&*server.database)
        || slot.plugin.as_deref() != Some("pgoutput")
    {
        return f.problem(
            "slot",
            format!("{name:?} does not fit: {}", slot.kind()),
            format!("needed: pgoutput, {:?}; choose another source.slot", server.database),
        );
    }
    let mib = slot.retained_bytes >> 20;
    let reader =
        slot.active_pid.map_or("nobody reads it".into(), |pid| format!("pid {pid} reads it"));
    match slot.wal_status {
        Some(WalStatus::Lost) | None => {
            let reason = slot.invalidation_reason.as_deref().unwrap_or("max_slot_wal_keep_size");
            let text = format!("{name:?} is lost ({reason}): WAL that it needs was removed");
            let lost = Error::named(Verdict::SlotLost, text);
            f.error("slot", &lost.hint("events are missing in the WAL; a person has to decide"));
        }
        Some(status @ (WalStatus::Reserved | WalStatus::Extended | WalStatus::Unreserved)) => {
            match at_risk(slot, server.max_slot_wal_keep_size) {
                Some(warning) => f.warning(
                    "slot",
                    warning,
                    "let the relay catch up now, or raise max_slot_wal_keep_size",
                ),
                None => f.ok(
                    "slot",
                    format!("{name:?} is {}, {reader}, it keeps {mib} MiB of WAL", status.as_str()),
                ),
            }
        }
    }
    if let Some(held) = held_by_standby(slot) {
        f.warning("slot", held, START_THE_STANDBY);
    }
    if config.source.failover && !slot.failover {
        f.warning(
            "slot",
            format!("{name:?} is no failover slot, and source.failover is true"),
            format!("over a replication connection: ALTER_REPLICATION_SLOT \"{name}\" (FAILOVER)"),
        );
    }
}

fn check_publication(f: &mut Findings, config: &Config, publication: &Publication) {
    let name = &publication.name;
    let quoted = postgres_protocol::escape::escape_identifier(name);
    let wanted = config.relay_options().wanted();
    let canary = TableName::canary().to_string();
    let there: Vec<String> = publication.tables.iter().map(|t| t.table.to_string()).collect();
    let before = f.problems();
    if !publication.via_root {
        f.problem(
            "publication",
            format!("{name:?} publishes partitions under their own names"),
            format!("ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true)"),
        );
    }
    if !there.contains(&canary) {
        f.warning(
            "publication",
            format!("{name:?} does not have {canary}: a deaf stream is not noticed"),
            format!("{INIT}, or as its owner: ALTER PUBLICATION {quoted} ADD TABLE {canary}"),
        );
    }
    for table in wanted.iter().filter(|table| !there.contains(table) && **table != canary) {
        f.problem(
            "publication",
            format!("{name:?} does not have {table}"),
            format!(
                "{INIT}, or as its owner: ALTER PUBLICATION {quoted} ADD TABLE {}",
                quoted_table(table)
            ),
        );
    }
    for table in there.iter().filter(|table| !wanted.contains(table)) {
        f.warning(
            "publication",
            format!("{name:?} has {table}, which is not in source.tables"),
            format!(
                "list it in source.tables, or ALTER PUBLICATION {quoted} DROP TABLE {}",
                quoted_table(table)
            ),
        );
    }
    for published in &publication.tables {
        let table = &published.table;
        if let Some(filter) = &published.row_filter {
            let what = format!("{table}: only rows WHERE {filter} are published");
            f.warning("publication", what, "other rows never become events; is that meant?");
        }
        if let Some(columns) = &published.columns {
            let what = format!("{table}: only columns {} are published", columns.join(", "));
            f.warning("publication", what, "other columns are absent in events; is that meant?");
        }
    }
    check_operations(f, publication, &quoted);
    if f.problems() == before {
        f.ok("publication", format!("{name:?} has {}", wanted.join(", ")));
    }
}

fn check_operations(f: &mut Findings, publication: &Publication, quoted: &str) {
    let o = &publication.operations;
    let all = [
        ("insert", o.insert),
        ("update", o.update),
        ("delete", o.delete),
        ("truncate", o.truncate),
    ];
    let missing: Vec<&str> = all.iter().filter(|(_, on)| !on).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return;
    }
    let what = format!("{:?} does not publish {}", publication.name, missing.join(", "));
    let advice =
        format!("ALTER PUBLICATION {quoted} SET (publish = 'insert, update, delete, truncate')");
    if o.insert {
        f.warning("publication", what, advice);
    } else {
        f.problem("publication", what, advice);
    }
}

async fn check_tables(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    publication: Option<&Publication>,
) -> Result<()> {
    for name in &config.source.tables {
        let table: TableName = name.parse()?;
        match read_table(client, &table).await? {
            Some(facts) => check_table(f, config, &facts, publication),
            None => f.problem(
                "table",
                format!("{name} does not exist"),
                "create it, or take it out of source.tables",
            ),
        }
    }
    Ok(())
}

/// As it is written in SQL.
fn quoted_table(table: &str) -> String {
    table.parse().map_or_else(|_| table.to_owned(), |name: TableName| name.quoted())
}

fn check_table(
    f: &mut Findings,
    config: &Config,
    facts: &TableFacts,
    publication: Option<&Publication>,
) {
    let table = &facts.table;
    let before = f.problems();
    if let Err(error) = table_check::keys_its_changes(facts, publication) {
        f.error("table", &error);
    }
    for (what, hint) in publication.map_or_else(Vec::new, |p| table_check::ids_differ(facts, p)) {
        f.warning("table", what, hint);
    }
    let identity: Option<&[String]> = match &facts.identity {
        ReplicaIdentity::Key(columns) | ReplicaIdentity::Index(columns) => Some(columns),
        ReplicaIdentity::Full => None,
        ReplicaIdentity::Nothing => {
            return f.problem(
                "table",
                format!(
                    "{table} has no replica identity: UPDATE and DELETE fail in the application"
                ),
                format!(
                    "add a primary key (not DEFERRABLE), or ALTER TABLE {} REPLICA IDENTITY FULL",
                    table.quoted()
                ),
            );
        }
    };
    for (route, key) in keys_of(&config.rules, &table.to_string()) {
        if let Some((what, hint)) = table_check::hides_route_key(facts, route, key) {
            f.problem("table", what, hint);
        }
    }
    if f.problems() == before {
        let shown = identity.map_or("all columns".into(), |columns| columns.join(", "));
        f.ok("table", format!("{table}, replica identity: {shown}"));
    }
    if facts.primary_key.is_empty() {
        f.warning(
            "table",
            format!("{table} has no primary key: its changes follow each other in one lane"),
            "add a primary key, or name key columns in its route",
        );
    }
}

async fn check_checkpoint(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    server: &ServerFacts,
) -> Result<()> {
    let Some(row) = checkpoint::read(client, &config.name).await? else {
        f.problem("checkpoint", format!("relay {:?} has no checkpoint row", config.name), INIT);
        return Ok(());
    };
    if row.slot != config.source.slot {
        f.problem(
            "checkpoint",
            format!("it belongs to slot {:?}, source.slot is {:?}", row.slot, config.source.slot),
            "set source.slot to that slot, or choose another name for a new relay",
        );
        return Ok(());
    }
    // A server that is not set up for logical replication was reported above.
    if server.wal_level != "logical" {
        return Ok(());
    }
    let options = config.relay_options();
    let found = session::look(client, &options).await?;
    let history = session::ancestors_for(&options.sql, &found).await?;
    let doubts = found.doubts(&options, &history);
    if doubts.is_empty() {
        f.ok("checkpoint", format!("relay {:?} at {}", config.name, row.flush_lsn));
    }
    doubts.iter().for_each(|doubt| f.error("checkpoint", doubt));
    Ok(())
}
