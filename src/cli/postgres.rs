//! The Postgres half of `check`: server, role, schema, slot, publication, tables, checkpoint.

mod poll;
mod role;

use tokio_postgres::Client;

use super::findings::Findings;
use super::outbox;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::hosting;
use crate::pg::migrate;
use crate::pg::publication::{CatalogIdentity, Publication, TableFacts, TableName};
use crate::pg::publication::{filter_columns, read_publication, read_table};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus, read_slot, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::check::publishable::{
    Harm, Obstacle, filter_breaks, none_inside_another, obstacles,
};
use crate::relay::check::server::{encoding_risk, may_be_waited_for};
use crate::relay::check::slot_risk::{at_risk, held_by_standby};
use crate::relay::check::tables;
use crate::relay::checkpoint;
use crate::relay::session::{facts, wal};
use crate::route::keys_of;
use crate::source::SourceKind;
use crate::verdict::Verdict;

const INIT: &str = "run `watership init`";
/// Where a checkpoint says that it was there before.
const GONE: &str = "do not create it again: a new one begins after events that were not \
    published; do what the verdict says";

/// Adds its findings; it never fails, because a failure is a finding too.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    let client = match sql(&config.relay.sql).await {
        Ok(SqlConnection { client, closed: _ }) => client,
        Err(error) => return f.error("postgres", &error),
    };
    if let Err(error) = look(f, config, &client).await {
        f.error("postgres", &error);
    }
}

async fn look(f: &mut Findings, config: &Config, client: &Client) -> Result<()> {
    let server = server_facts(client).await?;
    if config.relay.kind == SourceKind::Poll {
        return poll::look(f, config, client, &server).await;
    }
    let slot = read_slot(client, &config.relay.slot).await?;
    // Without the schema there is none, which is said below.
    let checkpoint = checkpoint::read(client, &config.relay.name).await.unwrap_or_default();
    let missing = if checkpoint.is_some() { GONE } else { INIT };
    check_server(f, config, &server, hosting::how_to_make_logical(client).await?);
    check_capacity(f, &server, slot.as_ref());
    check_encoding(f, client).await?;
    role::check(f, config, client, &server).await?;
    let publication = read_publication(client, &config.relay.publication).await?;
    match &publication {
        Some(publication) => {
            check_publication(f, config, publication);
            check_strangers(f, config, client, publication).await?;
        }
        None => {
            let what = format!("{:?} does not exist", config.relay.publication);
            f.problem("publication", what, missing);
        }
    }
    outbox::check(f, config, client, publication.as_ref()).await?;
    check_tables(f, config, client, publication.as_ref()).await?;
    match &slot {
        Some(slot) => check_slot(f, config, &server, slot),
        None => f.problem("slot", format!("{:?} does not exist", config.relay.slot), missing),
    }
    if check_schema(f, client).await {
        check_checkpoint(f, config, client, &server).await?;
    }
    Ok(())
}

fn check_version(f: &mut Findings, config: &Config, server: &ServerFacts) {
    if server.version_num < 150_000 {
        f.problem("postgres", format!("version {}", server.version), "use Postgres 15 or later");
    } else {
        f.ok("postgres", format!("{}, Postgres {}", config.relay.sql, server.version));
    }
    if server.in_recovery {
        f.problem(
            "postgres",
            "the server is a standby (in recovery)",
            "set source.url to the primary",
        );
    }
}

fn check_server(f: &mut Findings, config: &Config, server: &ServerFacts, makes_logical: &str) {
    check_version(f, config, server);
    if server.wal_level == "logical" {
        f.ok("wal_level", "logical");
    } else {
        f.problem(
            "wal_level",
            format!("{:?}, logical replication needs \"logical\"", server.wal_level),
            makes_logical,
        );
    }
    let application = &config.relay.sql.application_name;
    if may_be_waited_for(&server.synchronous_standby_names, application) {
        f.warning(
            "postgres",
            format!(
                "synchronous_standby_names = {:?} can choose the relay ({application}): commits \
                 then wait until the broker has confirmed their events, and indefinitely while the \
                 relay or the broker is down",
                server.synchronous_standby_names
            ),
            "name your standbys there, or set another application_name in source.url",
        );
    }
    match server.max_slot_wal_keep_size {
        Some(bytes) => f.ok("disk", format!("a slot may retain {} MiB of WAL", bytes >> 20)),
        None => f.warning(
            "disk",
            "max_slot_wal_keep_size is -1: while the relay is down, WAL can fill the disk",
            "set it to what the disk can hold, and alert on watership_safe_wal_size_bytes",
        ),
    }
    if let Some(limit) = server.idle_replication_slot_timeout {
        f.warning(
            "slot",
            format!("idle_replication_slot_timeout: the slot is lost after {limit:?} of downtime"),
            "set it to 0, or make sure that the relay is never down that long",
        );
    }
}

fn check_capacity(f: &mut Findings, server: &ServerFacts, slot: Option<&SlotState>) {
    let (used, most) = (server.used_replication_slots, server.max_replication_slots);
    if slot.is_none() && used >= most {
        f.problem(
            "slots",
            format!("all {most} replication slots are in use"),
            "raise max_replication_slots and restart Postgres, or drop an unused slot",
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
            "raise max_wal_senders and restart Postgres",
        );
    } else {
        f.ok("walsenders", format!("{used} of {most} walsenders in use"));
    }
}

async fn check_encoding(f: &mut Findings, client: &Client) -> Result<()> {
    let sql = "SELECT current_setting('server_encoding')";
    let encoding: String =
        unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?.get(0);
    const ADVICE: &str = "use a database with encoding UTF8";
    match encoding_risk(&encoding) {
        Some(risk) if encoding == "SQL_ASCII" => f.problem("encoding", risk, ADVICE),
        Some(risk) => f.warning("encoding", risk, ADVICE),
        None => f.ok("encoding", encoding),
    }
    Ok(())
}

/// True when the schema is complete and readable.
async fn check_schema(f: &mut Findings, client: &Client) -> bool {
    match migrate::OUTBOX.pending(client).await {
        Ok(pending) if pending.is_empty() => {
            let newest = migrate::OUTBOX.newest();
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

fn check_slot(f: &mut Findings, config: &Config, server: &ServerFacts, slot: &SlotState) {
    let name = &config.relay.slot;
    if slot.database.as_deref() != Some(&*server.database)
        || slot.plugin.as_deref() != Some("pgoutput")
    {
        return f.problem(
            "slot",
            format!("{name:?} is the wrong kind ({})", slot.kind()),
            format!(
                "expected a pgoutput slot of database {:?}; set source.slot to another name",
                server.database
            ),
        );
    }
    let mib = slot.retained_bytes >> 20;
    let reader = slot.active_pid.map_or("not in use".into(), |pid| format!("in use by pid {pid}"));
    match slot.wal_status {
        Some(WalStatus::Lost) | None => {
            let reason = slot.invalidation_reason.as_deref().unwrap_or("max_slot_wal_keep_size");
            let text = format!("{name:?} is lost ({reason}): WAL it needs was removed");
            let lost = Error::named(Verdict::SlotLost, text);
            f.error(
                "slot",
                &lost.hint("events may be lost; `watership resync` shows how to continue"),
            );
        }
        Some(status @ (WalStatus::Reserved | WalStatus::Extended | WalStatus::Unreserved)) => {
            match at_risk(slot, server.max_slot_wal_keep_size) {
                Some(risk) => f.warning("slot", risk.what, risk.hint),
                None => f.ok(
                    "slot",
                    format!("{name:?} is {}, {reader}, retains {mib} MiB of WAL", status.as_str()),
                ),
            }
        }
    }
    if let Some(held) = held_by_standby(slot) {
        f.warning("slot", held.what, held.hint);
    }
    if config.failover && !slot.failover {
        f.warning(
            "slot",
            format!("{name:?} is not a failover slot, but source.failover is true"),
            format!("over a replication connection: ALTER_REPLICATION_SLOT \"{name}\" (FAILOVER)"),
        );
    }
}

fn check_publication(f: &mut Findings, config: &Config, publication: &Publication) {
    let name = &publication.name;
    let quoted = postgres_protocol::escape::escape_identifier(name);
    let wanted = config.relay.wanted();
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
            format!("{name:?} lacks {canary}: a stream that skips changes goes unnoticed"),
            format!("{INIT}, or as its owner: ALTER PUBLICATION {quoted} ADD TABLE {canary}"),
        );
    }
    for table in wanted.iter().filter(|table| !there.contains(table) && **table != canary) {
        f.problem(
            "publication",
            format!("{name:?} lacks {table}"),
            format!(
                "{INIT}, or as its owner: ALTER PUBLICATION {quoted} ADD TABLE {}",
                quoted_table(table)
            ),
        );
    }
    for table in there.iter().filter(|table| !wanted.contains(table)) {
        f.warning(
            "publication",
            format!("{name:?} has {table}, which is not in source.tables; its changes are ignored"),
            format!(
                "add it to source.tables, or ALTER PUBLICATION {quoted} DROP TABLE {}",
                quoted_table(table)
            ),
        );
    }
    for published in &publication.tables {
        let table = &published.table;
        if let Some(filter) = &published.row_filter {
            let what = format!("{table}: only rows WHERE {filter} are published");
            f.warning(
                "publication",
                what,
                "other rows are never captured; make sure that is intended",
            );
        }
        if let Some(columns) = &published.columns {
            let what = format!("{table}: only columns {} are published", columns.join(", "));
            f.warning(
                "publication",
                what,
                "other columns are absent from events; make sure that is intended",
            );
        }
    }
    check_operations(f, publication, &quoted);
    if f.problems() == before {
        f.ok("publication", format!("{name:?} has {}", wanted.join(", ")));
    }
}

/// Tables that are published and not captured: nothing of them is used, but their applications can
/// fail all the same.
async fn check_strangers(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    publication: &Publication,
) -> Result<()> {
    let wanted = config.relay.wanted();
    let is_ours = |table: &TableName| wanted.contains(&table.to_string());
    for published in publication.tables.iter().filter(|t| !is_ours(&t.table)) {
        let Some(facts) = read_table(client, &published.table).await? else { continue };
        let broken = obstacles(&facts, Some(publication));
        for obstacle in broken.into_iter().filter(|obstacle| obstacle.harm == Harm::Breaks) {
            f.problem("table", obstacle.what, obstacle.hint);
        }
    }
    Ok(())
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
    let hint =
        format!("ALTER PUBLICATION {quoted} SET (publish = 'insert, update, delete, truncate')");
    if o.insert {
        f.warning("publication", what, hint);
    } else {
        f.problem("publication", what, hint);
    }
}

async fn check_tables(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    publication: Option<&Publication>,
) -> Result<()> {
    let mut found = Vec::new();
    for name in &config.relay.tables {
        let table: TableName = name.parse()?;
        match read_table(client, &table).await? {
            Some(facts) => {
                if let Some(publication) = publication
                    && let Some(published) = publication.table(&table)
                    && let columns = filter_columns(client, published).await?
                    && let Some(broken) = filter_breaks(&facts, publication, &columns)
                {
                    f.problem("table", broken.what, broken.hint);
                }
                check_table(f, config, &facts, publication);
                found.push(facts);
            }
            None => f.problem(
                "table",
                format!("{name} does not exist"),
                "create it, or remove it from source.tables",
            ),
        }
    }
    if let Err(error) = none_inside_another(&found) {
        f.error("table", &error);
    }
    Ok(())
}

/// The name as SQL needs it.
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
    if facts.nature.other_than_table.is_none()
        && let Err(error) = tables::keys_its_changes(facts, publication)
    {
        f.error("table", &error);
    }
    for (what, hint) in publication.map_or_else(Vec::new, |p| tables::ids_differ(facts, p)) {
        f.warning("table", what, hint);
    }
    let identity = match &facts.identity {
        CatalogIdentity::Key(columns) | CatalogIdentity::Index(columns) => columns.join(", "),
        CatalogIdentity::Full => "all columns".into(),
        CatalogIdentity::Nothing if facts.partitioned => "that of its partitions".into(),
        CatalogIdentity::Nothing => "none".into(),
    };
    for Obstacle { harm, what, hint } in obstacles(facts, publication) {
        match harm {
            Harm::Less | Harm::Partly => f.warning("table", what, hint),
            Harm::Absent | Harm::Breaks | Harm::Impossible => f.problem("table", what, hint),
        }
    }
    if facts.nature.other_than_table.is_some() {
        return;
    }
    for (route, key) in keys_of(&config.relay.rules, &table.to_string()) {
        if let Some((what, hint)) = tables::hides_route_key(facts, route, key) {
            f.problem("table", what, hint);
        }
    }
    if f.problems() == before {
        f.ok("table", format!("{table}, replica identity: {identity}"));
    }
    if facts.partitioned {
        f.ok(
            "table",
            format!(
                "note: Postgres does not publish TRUNCATE of a single partition of {table}; to \
                 empty one, use DELETE"
            ),
        );
    }
    if facts.primary_key.is_empty() {
        f.warning(
            "table",
            format!("{table} has no primary key: its changes are published one after the other"),
            "add a primary key, or set key in its route",
        );
    }
}

async fn check_checkpoint(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    server: &ServerFacts,
) -> Result<()> {
    let Some(row) = checkpoint::read(client, &config.relay.name).await? else {
        f.error("checkpoint", &checkpoint::no_row(&config.relay.name));
        return Ok(());
    };
    if let Err(other) = checkpoint::is_of(&row, &config.relay.name, SourceKind::Wal) {
        f.error("checkpoint", &other);
        return Ok(());
    }
    if row.slot != config.relay.slot {
        f.problem(
            "checkpoint",
            format!(
                "it belongs to slot {:?}, but source.slot is {:?}",
                row.slot, config.relay.slot
            ),
            "set source.slot to that slot, or choose another name for a new relay",
        );
        return Ok(());
    }
    // A server that is not set up for logical replication was reported above.
    if server.wal_level != "logical" {
        return Ok(());
    }
    let options = &config.relay;
    let found = facts::read(client, options).await?;
    let history = wal::ancestors_for(&options.sql, &found).await?;
    let doubts = found.doubts(options, &history);
    if doubts.is_empty() {
        f.ok("checkpoint", format!("relay {:?} at {}", config.relay.name, row.flush_lsn));
    }
    doubts.iter().for_each(|doubt| f.error("checkpoint", doubt));
    Ok(())
}
