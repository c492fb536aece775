//! `watership init`: sets up the database, in an order in which no event can be missed.
//!
//! Schema and roles, publication, slot, the checkpoint row at the slot's consistent point, and only
//! then the grant to applications: a row written before the slot exists is never streamed. What
//! exists is left as it is, so `init` may be run again.

mod before;
mod broker;
mod poll;
mod script;
mod slot;

use std::collections::HashMap;

use serde::Serialize;
use tokio_postgres::Client;

use super::{End, Out, print_warning};
use crate::config::Config;
use crate::config::load;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::connect::{Options, Settings};
use crate::pg::migrate;
use crate::pg::outbox::current_role;
use crate::pg::publication::{Publication, TableName};
use crate::pg::publication::{add_tables, create_publication, read_publication, read_table};
use crate::pg::slot::{ServerFacts, insert_lsn, server_facts};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay;
use crate::relay::check::partitions::PartitionChange;
use crate::relay::check::{lost, position};
use crate::relay::checkpoint;
use crate::relay::session::schemas::Cataloged;
use crate::relay::session::{self, facts, rights};
use crate::route::Agreement;
use crate::secret::Secret;
use crate::source::SourceKind;

/// Options of `init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml init --admin-url 'postgres://postgres:${PW}@127.0.0.1/shop'\n\n\
    It may be run again: what exists is left as it is.")]
pub(super) struct Args {
    /// The role that creates the objects: a superuser, or one with CREATEROLE, REPLICATION and
    /// CREATE that owns the captured tables. ${NAME} and ${file:/path} are filled in. Default:
    /// source.url.
    #[arg(long, value_name = "URL")]
    admin_url: Option<String>,
    /// Continue even if the outbox holds rows older than the slot; they will never be published.
    #[arg(long)]
    skip_existing: bool,
    /// Publish captured tables even if their UPDATE and DELETE fail from then on, or rows of them
    /// are never captured.
    #[arg(long)]
    publish_anyway: bool,
    /// Use a changed partition count or queue even while messages are queued: events of one key may
    /// be handled out of order.
    #[arg(long)]
    accept_reorder: bool,
    /// Print the SQL of the steps that the database still lacks, and change nothing.
    #[arg(long)]
    print_sql: bool,
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

/// All steps, printed as they are done.
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
        self.out.marked(colour, &format!("{word:<8}"), &format!(" {what:<12} {detail}"));
        self.list.push(Step { done, what, detail });
    }
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let admin = admin_options(config, args.admin_url.as_deref())?;
    if args.print_sql {
        return script::print(config, &admin, args).await;
    }
    let SqlConnection { mut client, closed: _closed } = sql(&admin).await?;
    if admin.settings == Settings::Relay {
        // The usual limit of 30 s is meant for the queries of a running relay. Commits do not wait
        // for standbys: one may be down, or be the relay itself, and init can be repeated.
        let settings = "SET statement_timeout = '5min'; SET synchronous_commit = local";
        client.batch_execute(settings).await.map_err(postgres_error)?;
    }
    let server = server_facts(&client).await?;
    let role = match args.admin_url {
        Some(_) => role_of_source(config).await,
        None => server.user.clone(),
    };
    let publish = before::Publish { anyway: args.publish_anyway, by_another: false };
    before::verify(&client, config, &admin, &server, &role, publish).await?;

    let mut steps = Steps { list: Vec::new(), out };
    schema(&mut steps, &mut client).await?;
    relay_role(&mut steps, &client, &role, &server).await?;
    let kind = config.relay.kind;
    rights::verify(&rights::lacking(&client, Some(&role), kind).await?)?;
    match kind {
        SourceKind::Wal => {
            let publication = publication(&mut steps, &client, config).await?;
            slot::slot_and_checkpoint(
                &mut steps,
                (&client, &admin),
                config,
                args,
                &server,
                &publication,
            )
            .await?;
            schemas(&mut steps, &client, config, &publication).await?;
        }
        SourceKind::Poll => {
            poll::indexes(&mut steps, &mut client, config).await?;
            poll::checkpoint(&mut steps, &client, config, args, &server).await?;
        }
    }
    grants(&mut steps, &mut client, config).await?;
    let changes = partitions(&client, config, args.accept_reorder).await?;
    broker::prepare(&mut steps, config).await?;
    session::partitions::record(&client, &config.relay, &changes).await?;
    out.line(
        "\nNext: grant the role to your application's user (GRANT watership_app TO …), then run \
         `watership check` and `watership run`.",
    );
    out.data(&serde_json::json!({ "steps": steps.list }))?;
    Ok(End::Fine)
}

/// What `--admin-url` says, or else `source.url`.
///
/// # Errors
/// Where it cannot be read, or names another database.
pub(super) fn admin_options(config: &Config, admin_url: Option<&str>) -> Result<Options> {
    let Some(text) = admin_url else { return Ok(config.relay.sql.clone()) };
    let filled = load::fill_in_url(text).map_err(|e| e.context("--admin-url"))?;
    let admin = Options::parse(&Secret::new(&*filled)).map_err(|e| e.context("--admin-url"))?;
    if admin.password.is_some() && text == &*filled {
        print_warning(
            "a password on the command line is visible to every user of this machine; \
             use '${NAME}' or '${file:/path}' in --admin-url",
        );
    }
    if admin.database != config.relay.sql.database {
        return Err(Error::config(format!(
            "--admin-url names database {:?}, but source.url names {:?}",
            admin.database, config.relay.sql.database
        ))
        .hint("both must name the database that holds the outbox"));
    }
    Ok(admin)
}

async fn schema(steps: &mut Steps, client: &mut Client) -> Result<()> {
    let applied = migrate::OUTBOX.apply(client).await?;
    if applied.is_empty() {
        let newest = migrate::OUTBOX.newest();
        steps.add(Done::Exists, "schema", format!("watership, at {newest}"));
        return Ok(());
    }
    let names: Vec<&str> = applied.iter().map(|a| a.name).collect();
    steps.add(Done::Created, "schema", format!("watership: {}", names.join(", ")));
    Ok(())
}

/// The role that a connection to source.url gets; a pooler may use another one than the URL names.
/// If it cannot be queried from here, for example because it does not exist yet, the URL's role is
/// assumed.
async fn role_of_source(config: &Config) -> String {
    let asked = async {
        let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
        current_role(&client).await
    };
    asked.await.unwrap_or_else(|_| config.relay.sql.user.clone())
}

/// Grants the role of source.url what the relay needs.
async fn relay_role(
    steps: &mut Steps,
    client: &Client,
    user: &str,
    server: &ServerFacts,
) -> Result<()> {
    let sql = "SELECT pg_catalog.pg_has_role($1::text, 'watership_relay', 'USAGE')";
    let member: bool =
        unnamed::query_one(client, sql, &[&user]).await.map_err(postgres_error)?.get(0);
    if member {
        steps.add(Done::Exists, "role", format!("{user} has the rights of watership_relay"));
        return Ok(());
    }
    let quoted = postgres_protocol::escape::escape_identifier(user);
    let grant = format!("GRANT watership_relay TO {quoted}");
    let granted = client.batch_execute(&grant).await.map_err(postgres_error);
    granted.map_err(|e| e.context(&grant).hint(format!("as a superuser: {grant}")))?;
    let by = if user == server.user { " (the role that runs init)" } else { "" };
    steps.add(Done::Created, "role", format!("watership_relay granted to {user}{by}"));
    Ok(())
}

async fn publication(steps: &mut Steps, client: &Client, config: &Config) -> Result<Publication> {
    let name = &config.relay.publication;
    let mut wanted = vec![config.relay.outbox.table.clone(), TableName::canary()];
    for table in &config.relay.tables {
        let table: TableName = table.parse()?;
        // A held one may be missing; that was said.
        if !config.relay.held.contains(&table) || read_table(client, &table).await?.is_some() {
            wanted.push(table);
        }
    }
    let detail = |tables: &[TableName]| {
        let names: Vec<String> = tables.iter().map(ToString::to_string).collect();
        format!("{name} for {}", names.join(", "))
    };
    match read_publication(client, name).await? {
        None => {
            create_publication(client, name, &wanted).await?;
            steps.add(Done::Created, "publication", detail(&wanted));
        }
        Some(there) => {
            let is_there = |table: &TableName| there.tables.iter().any(|t| t.table == *table);
            let missing: Vec<TableName> = wanted.iter().filter(|t| !is_there(t)).cloned().collect();
            if missing.is_empty() {
                steps.add(Done::Exists, "publication", detail(&wanted));
            } else {
                add_tables(client, name, &missing).await?;
                steps.add(Done::Changed, "publication", format!("added: {}", detail(&missing)));
            }
        }
    }
    let made = read_publication(client, name).await?;
    made.ok_or_else(|| Error::protocol(format!("publication {name:?} was dropped during init")))
}

/// Records the publication as it is now, which the relay expects from then on. Where it is in doubt
/// nothing is recorded: the relay reports a verdict, and an operator decides.
async fn agree(steps: &mut Steps, client: &Client, config: &Config) -> Result<()> {
    let options = &config.relay;
    let found = facts::read(client, options).await?;
    match (found.verify_publication(options), found.publication()) {
        (Ok(()), Some(publication)) => {
            let facts = position::facts(publication, &options.wanted());
            let agreed = lost::keep_held(found.agreed(), facts, &options.held);
            checkpoint::agree(client, &config.relay.name, &agreed).await
        }
        (Ok(()), None) => Err(Error::protocol("the publication was dropped during init")),
        (Err(doubt), _) => {
            steps.add(Done::Skipped, "publication", format!("not recorded: {doubt}"));
            Ok(())
        }
    }
}

/// The captured tables as they are, checked to have what their routes name, and what was agreed
/// for the routes.
async fn fitting_schemas(
    client: &Client,
    options: &relay::Options,
    publication: &Publication,
) -> Result<(Vec<Cataloged>, HashMap<(String, String), Agreement>)> {
    let mut tables = Vec::new();
    for table in &options.tables {
        tables.extend(read_table(client, &table.parse()?).await?);
    }
    let tables = session::schemas::catalog(client, Some(publication), &tables).await?;
    let agreed = session::schemas::agreed(client, &options.name).await?;
    session::schemas::verify(client, options, &tables, &agreed).await?;
    Ok((tables, agreed))
}

/// Agrees routes of captured tables that are new with their tables as they are now.
async fn schemas(
    steps: &mut Steps,
    client: &Client,
    config: &Config,
    publication: &Publication,
) -> Result<()> {
    let options = &config.relay;
    let at = insert_lsn(client).await?;
    let (tables, agreed) = fitting_schemas(client, options, publication).await?;
    let new = session::schemas::agree_first(client, options, &tables, &agreed, at).await?;
    for (route, table) in new {
        let detail = format!("route {route:?} sends {table} with the columns that it has now");
        steps.add(Done::Created, "agreement", detail);
    }
    Ok(())
}

/// A mapped table is its application's own: nobody is let into the outbox that no relay reads.
async fn grants(steps: &mut Steps, client: &mut Client, config: &Config) -> Result<()> {
    let sql = "SELECT pg_catalog.has_schema_privilege('watership_app', 'watership', 'USAGE')";
    let before: bool = unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?.get(0);
    let done = if before { Done::Exists } else { Done::Created };
    if config.relay.outbox.is_mapped() && config.relay.kind == SourceKind::Poll {
        steps.add(Done::Skipped, "grants", "not needed: applications write to their own table");
    } else if config.relay.outbox.is_mapped() {
        migrate::grant_messages(client).await?;
        steps.add(done, "grants", "watership_app may call emit_wal");
    } else {
        migrate::grant_applications(client).await?;
        steps.add(done, "grants", "watership_app may insert into the outbox and call emit");
    }
    Ok(())
}

/// Refuses other partitions than those in force while messages are queued. Returns what may be
/// recorded: a relay may still run with the ones before, and it alone records a change that nobody
/// had to accept.
async fn partitions(
    client: &Client,
    config: &Config,
    accept: bool,
) -> Result<Vec<PartitionChange>> {
    let options = relay::Options { accept_reorder: accept, ..config.relay.clone() };
    let mut changes = session::partitions::changed(client, &options).await?;
    session::partitions::verify(&options, &options.broker, &changes).await?;
    changes.retain(|change| accept || change.from.is_none());
    Ok(changes)
}
