//! `watership init`: prepares the database, in an order in which nothing can be missed.
//!
//! Schema and roles, publication, slot, the checkpoint row at the slot's consistent point, and only
//! then the grant to applications: a row written before the slot exists is never streamed. What is
//! there is left as it is, so `init` may be run again.

use serde::Serialize;
use tokio_postgres::Client;

use super::{End, Out, print_warning};
use crate::amqp::topology::{self, Mode};
use crate::config::Config;
use crate::config::load;
use crate::error::{Error, Kind, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::Options;
use crate::pg::migrate;
use crate::pg::publication::{Publication, ReplicaIdentity, TableName};
use crate::pg::publication::{add_tables, create_publication, read_publication, read_table};
use crate::pg::slot::{ServerFacts, SlotState, WalStatus};
use crate::pg::slot::{create_slot, drop_slot, read_slot, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::position::Lsn;
use crate::relay::checkpoint::{self, NewCheckpoint};
use crate::relay::{position_check, session, table_check};
use crate::secret::Secret;
use crate::verdict::Verdict;

/// Options of `init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml init --admin-url 'postgres://postgres:${PW}@127.0.0.1/shop'\n\n\
    May be run again: what is there is left as it is.")]
pub(super) struct Args {
    /// Who makes the objects: a superuser, or a role with CREATEROLE, REPLICATION and CREATE that
    /// owns the captured tables. ${NAME} and ${file:/path} are filled in. Default: source.url.
    #[arg(long, value_name = "URL")]
    admin_url: Option<String>,
    /// Go on although the outbox has rows that are older than the slot; they are never sent.
    #[arg(long)]
    skip_existing: bool,
}

/// What happened to one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Done {
    Created,
    Exists,
    Changed,
    Skipped,
}

#[derive(Debug, Serialize)]
struct Step {
    done: Done,
    what: &'static str,
    detail: String,
}

/// The steps, printed as they are done.
struct Steps {
    list: Vec<Step>,
    out: Out,
}

impl Steps {
    fn add(&mut self, done: Done, what: &'static str, detail: impl Into<String>) {
        let detail = detail.into();
        let (word, colour) = match done {
            Done::Created => ("created", 32),
            Done::Exists => ("exists", 0),
            Done::Changed => ("changed", 32),
            Done::Skipped => ("skipped", 33),
        };
        let word = self.out.coloured(colour, &format!("{word:<8}"));
        self.out.line(&format!("{word} {what:<12} {detail}"));
        self.list.push(Step { done, what, detail });
    }
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let admin = admin_options(config, args)?;
    let SqlConnection { mut client, closed: _closed } = sql(&admin).await?;
    // The limit of 30 s is for the queries of a running relay.
    client.batch_execute("SET statement_timeout = '5min'").await.map_err(postgres_error)?;
    let server = server_facts(&client).await?;
    check_server(config, &server)?;
    check_relay_role(&client, config, &server).await?;
    if !server.user_may_replicate && read_slot(&client, &config.source.slot).await?.is_none() {
        let quoted = postgres_protocol::escape::escape_identifier(&server.user);
        let text = format!("role {:?} may not make the replication slot", server.user);
        return Err(Error::refused(text).hint(format!(
            "name a superuser in --admin-url, or, as superuser: ALTER ROLE {quoted} REPLICATION"
        )));
    }

    let mut steps = Steps { list: Vec::new(), out };
    schema(&mut steps, &mut client).await?;
    relay_role(&mut steps, &client, config, &server).await?;
    let publication = publication(&mut steps, &client, config).await?;
    slot_and_checkpoint(&mut steps, &client, config, args, &server, &publication).await?;
    grants(&mut steps, &mut client).await?;
    broker(&mut steps, config).await?;
    out.line(
        "\nNext: give the role to your application's user (GRANT watership_app TO …), then \
              `watership check` and `watership run`.",
    );
    out.data(&serde_json::json!({ "steps": steps.list }))?;
    Ok(End::Fine)
}

fn admin_options(config: &Config, args: &Args) -> Result<Options> {
    let Some(text) = &args.admin_url else { return Ok(config.source.sql.clone()) };
    let filled = load::fill_in_text(text).map_err(|e| e.context("--admin-url"))?;
    let admin = Options::parse(&Secret::new(&*filled)).map_err(|e| e.context("--admin-url"))?;
    if admin.password.is_some() && *text == filled {
        print_warning(
            "a password on the command line is seen by every user of this machine; \
             use '${NAME}' or '${file:/path}' in --admin-url",
        );
    }
    if admin.database != config.source.sql.database {
        return Err(Error::config(format!(
            "--admin-url names database {:?} and source.url names {:?}",
            admin.database, config.source.sql.database
        ))
        .hint("both have to name the database that holds the outbox"));
    }
    Ok(admin)
}

/// What would fail later, after half of the steps.
fn check_server(config: &Config, server: &ServerFacts) -> Result<()> {
    if server.in_recovery {
        return Err(Error::refused(
            "this server is a standby (in recovery); init needs the primary",
        )
        .hint("name the primary in source.url or --admin-url"));
    }
    if server.version_num < 150_000 {
        return Err(Error::refused(format!(
            "the server is Postgres {}, 15 or later is needed",
            server.version
        )));
    }
    if config.source.failover && server.version_num < 170_000 {
        return Err(Error::config(format!(
            "source.failover = true needs Postgres 17 or later, the server is {}",
            server.version
        ))
        .hint("set source.failover = false"));
    }
    if server.wal_level != "logical" {
        return Err(Error::refused(format!(
            "wal_level is {:?}, logical replication needs \"logical\"",
            server.wal_level
        ))
        .hint("ALTER SYSTEM SET wal_level = 'logical', then restart Postgres"));
    }
    Ok(())
}

/// The role that the relay connects as must exist and replicate before anything is made.
async fn check_relay_role(client: &Client, config: &Config, server: &ServerFacts) -> Result<()> {
    let user = &config.source.sql.user;
    if *user == server.user {
        return Ok(());
    }
    let sql = "SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = $1::text";
    let row = client.query_opt(sql, &[user]).await.map_err(postgres_error)?;
    let quoted = postgres_protocol::escape::escape_identifier(user);
    match row.map(|row| row.get::<_, bool>(0)) {
        Some(true) => Ok(()),
        Some(false) => {
            Err(Error::refused(format!("role {user:?} of source.url may not replicate"))
                .hint(format!("as superuser: ALTER ROLE {quoted} REPLICATION")))
        }
        None => Err(Error::refused(format!("role {user:?} of source.url does not exist"))
            .hint(format!("as superuser: CREATE ROLE {quoted} LOGIN REPLICATION PASSWORD '…'"))),
    }
}

async fn schema(steps: &mut Steps, client: &mut Client) -> Result<()> {
    let applied = migrate::apply(client).await?;
    if applied.is_empty() {
        let newest = migrate::MIGRATIONS.last().map_or("", |m| m.name);
        steps.add(Done::Exists, "schema", format!("watership, at {newest}"));
        return Ok(());
    }
    let names: Vec<&str> = applied.iter().map(|a| a.name).collect();
    steps.add(Done::Created, "schema", format!("watership: {}", names.join(", ")));
    Ok(())
}

/// Lets the role of source.url do what the relay does.
async fn relay_role(
    steps: &mut Steps,
    client: &Client,
    config: &Config,
    server: &ServerFacts,
) -> Result<()> {
    let user = &config.source.sql.user;
    let sql = "SELECT pg_catalog.pg_has_role($1::text, 'watership_relay', 'USAGE')";
    let member: bool = client.query_one(sql, &[user]).await.map_err(postgres_error)?.get(0);
    if member {
        steps.add(Done::Exists, "role", format!("{user} has the rights of watership_relay"));
        return Ok(());
    }
    let quoted = postgres_protocol::escape::escape_identifier(user);
    let grant = format!("GRANT watership_relay TO {quoted}");
    let granted = client.batch_execute(&grant).await.map_err(postgres_error);
    granted.map_err(|e| e.context(&grant).hint(format!("as superuser: {grant}")))?;
    let by = if *user == server.user { " (the role that runs init)" } else { "" };
    steps.add(Done::Created, "role", format!("watership_relay granted to {user}{by}"));
    Ok(())
}

async fn publication(steps: &mut Steps, client: &Client, config: &Config) -> Result<Publication> {
    let name = &config.source.publication;
    let mut wanted = vec![TableName::outbox(), TableName::canary()];
    for table in &config.source.tables {
        wanted.push(table.parse()?);
    }
    let detail = |tables: &[TableName]| {
        let names: Vec<String> = tables.iter().map(ToString::to_string).collect();
        format!("{name} for {}", names.join(", "))
    };
    match read_publication(client, name).await? {
        None => {
            check_identities(client, &wanted, None).await?;
            warn_of_missing_identity(client, &wanted).await?;
            create_publication(client, name, &wanted).await?;
            steps.add(Done::Created, "publication", detail(&wanted));
        }
        Some(there) => {
            if !there.via_root {
                let quoted = postgres_protocol::escape::escape_identifier(name);
                return Err(Error::refused(format!(
                    "publication {name:?} publishes partitions under their own names"
                ))
                .hint(format!(
                    "ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true), \
                     or name another one in source.publication"
                )));
            }
            check_identities(client, &wanted, Some(&there)).await?;
            let is_there = |table: &TableName| there.tables.iter().any(|t| t.table == *table);
            let missing: Vec<TableName> = wanted.iter().filter(|t| !is_there(t)).cloned().collect();
            if missing.is_empty() {
                steps.add(Done::Exists, "publication", detail(&wanted));
            } else {
                warn_of_missing_identity(client, &missing).await?;
                add_tables(client, name, &missing).await?;
                steps.add(Done::Changed, "publication", format!("added: {}", detail(&missing)));
            }
        }
    }
    let made = read_publication(client, name).await?;
    made.ok_or_else(|| Error::protocol(format!("publication {name:?} vanished while init ran")))
}

/// Refuses tables whose changes could not be told apart, before anything more is published.
async fn check_identities(
    client: &Client,
    tables: &[TableName],
    publication: Option<&Publication>,
) -> Result<()> {
    for table in tables {
        let Some(facts) = read_table(client, table).await? else { continue };
        table_check::keys_its_changes(&facts, publication)?;
    }
    Ok(())
}

/// From the moment that such a table is published, its application cannot change rows any more.
async fn warn_of_missing_identity(client: &Client, tables: &[TableName]) -> Result<()> {
    for table in tables {
        // The identity of a partitioned table is that of its partitions.
        let facts = read_table(client, table).await?.filter(|facts| !facts.partitioned);
        if facts.is_some_and(|facts| facts.identity == ReplicaIdentity::Nothing) {
            print_warning(&format!(
                "{table} has no replica identity: from now on UPDATE and DELETE fail in the \
                 application; ALTER TABLE {} REPLICA IDENTITY FULL, or give it a primary key",
                table.quoted()
            ));
        }
    }
    Ok(())
}

async fn slot_and_checkpoint(
    steps: &mut Steps,
    client: &Client,
    config: &Config,
    args: &Args,
    server: &ServerFacts,
    publication: &Publication,
) -> Result<()> {
    let name = &config.source.slot;
    let row = checkpoint::read(client, &config.name).await?;
    if let Some(row) = &row
        && row.slot != *name
    {
        let text = format!(
            "the checkpoint of relay {:?} belongs to slot {:?}, and source.slot is {name:?}",
            config.name, row.slot
        );
        return Err(Error::named(Verdict::OtherSlot, text)
            .hint("set source.slot to that slot, or choose another name for a new relay"));
    }
    refuse_shared_slot(client, config).await?;
    let slot = read_slot(client, name).await?;
    let consistent_point = match (slot, row) {
        (Some(slot), Some(row)) => {
            position(client, config).await?;
            steps.add(Done::Exists, "slot", slot_detail(name, slot.confirmed_flush_lsn));
            steps.add(Done::Exists, "checkpoint", format!("{} at {}", config.name, row.flush_lsn));
            return agree(steps, client, config).await;
        }
        (None, Some(_)) => return position(client, config).await,
        (Some(slot), None) => {
            let point = check_fresh_slot(&slot, server)?;
            refuse_older_rows(steps, client, args).await?;
            steps.add(Done::Exists, "slot", slot_detail(name, Some(point)));
            point
        }
        (None, None) => {
            refuse_older_rows(steps, client, args).await?;
            let failover = config.source.failover;
            let point = create_slot_without_gap(client, name, failover, args).await?;
            steps.add(Done::Created, "slot", slot_detail(name, Some(point)));
            point
        }
    };
    let new = NewCheckpoint {
        name: config.name.clone(),
        slot: name.clone(),
        publication: publication.name.clone(),
        publication_oid: publication.oid,
        consistent_point,
        system_id: server.system_identifier,
        timeline: server.timeline,
    };
    let created = checkpoint::create(client, &new).await?;
    let done = if created { Done::Created } else { Done::Exists };
    steps.add(done, "checkpoint", format!("{} at {consistent_point}", config.name));
    agree(steps, client, config).await
}

/// Whether the relay may go on from its checkpoint.
async fn position(client: &Client, config: &Config) -> Result<()> {
    let found = session::look(client, &config.relay_options()).await?;
    let history = session::ancestors_for(&config.source.sql, &found).await?;
    let (row, slot, server) = found.position();
    position_check::verify(row, server, slot, &history).map(drop)
}

/// The relay expects the publication as it is now. Where something is doubtful nothing is noted:
/// the relay says so, and a person decides.
async fn agree(steps: &mut Steps, client: &Client, config: &Config) -> Result<()> {
    let options = config.relay_options();
    let found = session::look(client, &options).await?;
    match (found.verify_publication(&options), found.publication()) {
        (Ok(()), Some(publication)) => {
            let facts = position_check::facts(publication, &options.wanted());
            checkpoint::agree(client, &config.name, &facts).await
        }
        (Ok(()), None) => Err(Error::protocol("the publication vanished while init ran")),
        (Err(doubt), _) => {
            steps.add(Done::Skipped, "publication", format!("not agreed to: {doubt}"));
            Ok(())
        }
    }
}

fn slot_detail(name: &str, at: Option<Lsn>) -> String {
    format!("{name} at {}", at.unwrap_or(Lsn::ZERO))
}

async fn refuse_shared_slot(client: &Client, config: &Config) -> Result<()> {
    let sql = "SELECT name FROM watership.checkpoint WHERE slot = $1::text AND name <> $2::text";
    let slot = &config.source.slot;
    let row = client.query_opt(sql, &[slot, &config.name]).await.map_err(postgres_error)?;
    match row {
        None => Ok(()),
        Some(row) => Err(Error::config(format!(
            "slot {slot:?} belongs to relay {:?}, and this one is {:?}",
            row.get::<_, String>(0),
            config.name
        ))
        .hint("one relay per slot: choose another source.slot, or the same name")),
    }
}

/// A slot without a checkpoint: made by hand, or by an `init` that was interrupted.
fn check_fresh_slot(slot: &SlotState, server: &ServerFacts) -> Result<Lsn> {
    let name = &slot.name;
    let fits = slot.plugin.as_deref() == Some("pgoutput")
        && slot.database.as_deref() == Some(&*server.database)
        && !slot.temporary
        && !slot.two_phase
        && slot.wal_status != Some(WalStatus::Lost);
    match slot.confirmed_flush_lsn {
        Some(point) if fits => Ok(point),
        None if fits && let Some(pid) = slot.active_pid => {
            let text = format!(
                "slot {name:?} is being made by pid {pid}, perhaps for an `init` \
                that was interrupted; it waits for open transactions to end"
            );
            Err(Error::new(Kind::Busy, text).hint("end them, then run init again"))
        }
        Some(_) | None => Err(Error::refused(format!(
            "slot {name:?} exists and does not fit: {}, wal_status {}; needed is a permanent \
             pgoutput slot of database {:?}",
            slot.kind(),
            slot.wal_status.map_or("none", WalStatus::as_str),
            server.database
        ))
        .hint("choose another source.slot")),
    }
}

/// Counting stops here; beyond, the number says nothing more.
const COUNT_MAX: i64 = 1_000_000;

async fn count_rows(client: &Client) -> Result<i64> {
    let sql = "SELECT count(*) FROM (SELECT FROM watership.outbox LIMIT $1::bigint) AS rows";
    Ok(client.query_one(sql, &[&COUNT_MAX]).await.map_err(postgres_error)?.get(0))
}

async fn refuse_older_rows(steps: &mut Steps, client: &Client, args: &Args) -> Result<()> {
    let count = count_rows(client).await?;
    if count == 0 {
        return Ok(());
    }
    let more = if count == COUNT_MAX { " or more" } else { "" };
    if args.skip_existing {
        steps.add(Done::Skipped, "outbox", format!("{count}{more} rows older than the slot"));
        return Ok(());
    }
    Err(Error::refused(format!(
        "watership.outbox has {count}{more} rows that are older than the slot; they would never be \
         sent"
    ))
    .hint("pass --skip-existing to leave them unsent, or empty the outbox first"))
}

/// Makes the slot. A row that commits between the count and the slot's consistent point would be
/// missed without a word; so rows that appeared meanwhile undo it.
async fn create_slot_without_gap(
    client: &Client,
    name: &str,
    failover: bool,
    args: &Args,
) -> Result<Lsn> {
    let point = create_slot(client, name, failover).await?;
    if args.skip_existing || count_rows(client).await? == 0 {
        return Ok(point);
    }
    drop_slot(client, name).await?;
    Err(Error::refused("applications write to the outbox while the slot is being made")
        .hint("stop them and empty the outbox, or pass --skip-existing to leave its rows unsent"))
}

async fn grants(steps: &mut Steps, client: &mut Client) -> Result<()> {
    let sql = "SELECT pg_catalog.has_schema_privilege('watership_app', 'watership', 'USAGE')";
    let before: bool = client.query_one(sql, &[]).await.map_err(postgres_error)?.get(0);
    migrate::grant_applications(client).await?;
    let done = if before { Done::Exists } else { Done::Created };
    steps.add(done, "grants", "watership_app may insert into the outbox and call emit");
    Ok(())
}

async fn broker(steps: &mut Steps, config: &Config) -> Result<()> {
    let topology = &config.topology;
    topology::apply(&config.broker_options(), topology).await?;
    let count = format!(
        "{} exchanges, {} queues, {} bindings",
        topology.exchanges.len(),
        topology.queues.len(),
        topology.bindings.len()
    );
    match topology.mode {
        Mode::Declare => steps.add(Done::Created, "broker", format!("declared {count}")),
        Mode::Verify => steps.add(Done::Exists, "broker", format!("verified {count}")),
    }
    Ok(())
}
