//! What `init` looks at before it makes anything: what would fail after half of the steps, and what
//! would make an application fail afterwards.

use tokio_postgres::Client;

use crate::cli::print_warning;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::connect::Options;
use crate::pg::hosting;
use crate::pg::publication::{Publication, TableFacts, TableName, read_publication, read_table};
use crate::pg::slot::{ServerFacts, read_slot};
use crate::pg::sqlstate::{INSUFFICIENT_PRIVILEGE, postgres_error};
use crate::pg::unnamed;
use crate::relay;
use crate::relay::check;
use crate::relay::check::publishable::{Harm, Obstacle, none_inside_another, obstacles};
use crate::relay::check::server::encoding_risk;
use crate::relay::check::tables;
use crate::relay::session::outbox::{self, Mapped};
use crate::relay::session::rights::{self, Lack};
use crate::relay::session::schemas;
use crate::route::keys_of;
use crate::source::SourceKind;

/// How the publication will be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Publish {
    /// Publish even tables that applications could then no longer change.
    pub(super) anyway: bool,
    /// A role other than the connected one will make it.
    pub(super) by_another: bool,
}

impl Publish {
    /// What the connected role cannot do is only a warning when another role will do it.
    fn unless_by_another(self, checked: Result<()>) -> Result<()> {
        match checked {
            Err(error) if self.by_another => {
                print_warning(&format!("{error}; {}", error.hint_or_kind()));
                Ok(())
            }
            checked => checked,
        }
    }
}

/// Refuses what is certain to go wrong, and warns of what may.
///
/// # Errors
/// Kind::Refused or Kind::Config with what to do, or the server's.
pub(super) async fn verify(
    client: &Client,
    config: &Config,
    admin: &Options,
    server: &ServerFacts,
    role: &str,
    publish: Publish,
) -> Result<()> {
    check_server(client, config, server).await?;
    warn_of_encoding(client).await?;
    check_relay_role(client, config, server, role).await?;
    if config.relay.kind == SourceKind::Poll {
        check_sight(client, config, role, publish).await?;
        return check_mapping(client, config, role).await;
    }
    if read_slot(client, &config.relay.slot).await?.is_none() {
        let what = format!("role {:?} may not create the replication slot", server.user);
        publish.unless_by_another(may_replicate(client, admin, &what).await)?;
    }
    check_sight(client, config, role, publish).await?;
    let publication = read_publication(client, &config.relay.publication).await?;
    if let Some(there) = &publication {
        publishes_roots(there)?;
    }
    check_outbox(client, config, (server, role), publication.as_ref(), publish).await?;
    check_tables(client, config, server, publication.as_ref(), publish).await
}

fn publishes_roots(there: &Publication) -> Result<()> {
    if there.via_root {
        return Ok(());
    }
    let name = &there.name;
    let quoted = postgres_protocol::escape::escape_identifier(name);
    Err(Error::refused(format!("publication {name:?} publishes partitions under their own names"))
        .hint(format!(
            "ALTER PUBLICATION {quoted} SET (publish_via_partition_root = true), \
             or set source.publication to another one"
        )))
}

/// Refuses what would fail later, after half of the steps.
async fn check_server(client: &Client, config: &Config, server: &ServerFacts) -> Result<()> {
    if server.in_recovery {
        return Err(Error::refused(
            "this server is a standby (in recovery); init needs the primary",
        )
        .hint("point source.url or --admin-url at the primary"));
    }
    if server.version_num < 150_000 {
        return Err(Error::refused(format!(
            "the server is Postgres {}; Watership needs 15 or later",
            server.version
        )));
    }
    if config.failover && server.version_num < 170_000 {
        return Err(Error::config(format!(
            "source.failover = true needs Postgres 17 or later; the server is {}",
            server.version
        ))
        .hint("set source.failover = false"));
    }
    if config.relay.kind == SourceKind::Wal && server.wal_level != "logical" {
        return Err(Error::refused(format!(
            "wal_level is {:?}, logical replication needs \"logical\"",
            server.wal_level
        ))
        .hint(hosting::how_to_make_logical(client).await?));
    }
    Ok(())
}

async fn warn_of_encoding(client: &Client) -> Result<()> {
    let sql = "SELECT current_setting('server_encoding')";
    let row = unnamed::query_one(client, sql, &[]).await.map_err(postgres_error)?;
    if let Some(risk) = encoding_risk(row.get(0)) {
        print_warning(&risk);
    }
    Ok(())
}

/// The role that the relay connects as must exist, and be allowed to replicate where the WAL is
/// read, before anything is created.
async fn check_relay_role(
    client: &Client,
    config: &Config,
    server: &ServerFacts,
    user: &str,
) -> Result<()> {
    if user == server.user {
        return Ok(());
    }
    let sql = "SELECT FROM pg_catalog.pg_roles WHERE rolname = $1::text";
    if unnamed::query_opt(client, sql, &[&user]).await.map_err(postgres_error)?.is_none() {
        let quoted = postgres_protocol::escape::escape_identifier(user);
        let hint = match config.relay.kind {
            SourceKind::Wal => hosting::how_to_create(client, user).await?,
            SourceKind::Poll => format!("CREATE ROLE {quoted} LOGIN PASSWORD '...'"),
        };
        return Err(
            Error::refused(format!("role {user:?} of source.url does not exist")).hint(hint)
        );
    }
    if config.relay.kind == SourceKind::Poll {
        return Ok(());
    }
    let what = format!("role {user:?} of source.url may not replicate");
    may_replicate(client, &config.relay.sql, &what).await
}

/// Asks the server; refuses only what is certain, because the role may be reachable from where the
/// relay runs and not from here.
async fn may_replicate(client: &Client, options: &Options, what: &str) -> Result<()> {
    match hosting::ask(options).await {
        Ok(_) => Ok(()),
        Err(error) if hosting::is_not_admitted(&error) => Err(Error::refused(what)
            .caused_by(error)
            .hint(hosting::how_to_admit(client, &options.user).await?)),
        Err(error) => {
            print_warning(&format!("could not check whether {what}: {error}"));
            Ok(())
        }
    }
}

/// Row-level security on tables that are there already, for the role that runs `init` and for that
/// of `source.url`: neither may take hidden rows for absent ones. Privileges may still be granted.
async fn check_sight(client: &Client, config: &Config, role: &str, publish: Publish) -> Result<()> {
    let kind = config.relay.kind;
    publish.unless_by_another(sees_all(rights::lacking(client, None, kind).await?))?;
    sees_all(rights::lacking(client, Some(role), kind).await?)
}

fn sees_all(mut lacks: Vec<Lack>) -> Result<()> {
    lacks.retain(|lack| lack.hidden && !lack.app);
    lacks.iter_mut().for_each(|lack| lack.privileges.clear());
    rights::verify(&lacks)
}

/// The same where it is polled: nothing of it is published.
async fn check_mapping(client: &Client, config: &Config, role: &str) -> Result<()> {
    let options = &config.relay;
    let Some(mapped) = outbox::read(client, options, Some(role)).await? else { return Ok(()) };
    check::outbox::fits(&options.outbox, mapped.found(), None, options.kind)?;
    warn_if_slow(options, &mapped);
    Ok(())
}

fn warn_if_slow(options: &relay::Options, mapped: &Mapped) {
    let deletes = options.delete_after.is_some();
    if let Some((what, hint)) = check::outbox::slow(&options.outbox, &mapped.columns, deletes) {
        print_warning(&format!("{what}; {hint}"));
    }
}

/// An outbox table of the application's, which must fit its mapping.
async fn check_outbox(
    client: &Client,
    config: &Config,
    (server, role): (&ServerFacts, &str),
    publication: Option<&Publication>,
    publish: Publish,
) -> Result<()> {
    let options = &config.relay;
    let Some(mapped) = outbox::read(client, options, Some(role)).await? else { return Ok(()) };
    let (table, kind) = (&options.outbox, options.kind);
    check::outbox::fits(table, mapped.found(), publication, kind)?;
    warn_if_slow(options, &mapped);
    refuse_obstacles(&mapped.facts, publication, publish)?;
    publish.unless_by_another(may_publish(server, &mapped.facts, publication))
}

async fn check_tables(
    client: &Client,
    config: &Config,
    server: &ServerFacts,
    publication: Option<&Publication>,
    publish: Publish,
) -> Result<()> {
    let mut found = Vec::new();
    for name in &config.relay.tables {
        let table: TableName = name.parse()?;
        let Some(facts) = read_table(client, &table).await? else {
            let what = format!("captured table {name} does not exist");
            if config.relay.held.contains(&table) {
                print_warning(&format!(
                    "{what}; it is held (on_table_lost = \"hold\"): the relay works without it, \
                     and `init` publishes it once it is there"
                ));
                continue;
            }
            return Err(Error::refused(what).hint("create it, or remove it from source.tables"));
        };
        check_table(config, server, &facts, publication, publish)?;
        found.push(facts);
    }
    none_inside_another(&found)?;
    check_rules(client, &config.relay, publication, &found, publish).await
}

/// Whether the rules of the routes fit their tables. What was agreed is known only if the schema is
/// there.
async fn check_rules(
    client: &Client,
    options: &relay::Options,
    publication: Option<&Publication>,
    tables: &[TableFacts],
    publish: Publish,
) -> Result<()> {
    let tables = schemas::catalog(client, publication, tables).await?;
    let agreed = match schemas::agreed_if_installed(client, &options.name).await {
        Err(error) if error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE) => {
            return publish.unless_by_another(Err(error));
        }
        agreed => agreed?,
    };
    schemas::verify(client, options, &tables, &agreed).await
}

/// A table that is published already is not refused: its application fails already, and a new
/// version must be able to run its migrations.
fn check_table(
    config: &Config,
    server: &ServerFacts,
    facts: &TableFacts,
    publication: Option<&Publication>,
    publish: Publish,
) -> Result<()> {
    if facts.nature.other_than_table.is_none() {
        tables::keys_its_changes(facts, publication)?;
    }
    refuse_obstacles(facts, publication, publish)?;
    for (route, key) in keys_of(&config.relay.rules, &facts.table.to_string()) {
        if let Some((what, hint)) = tables::hides_route_key(facts, route, key) {
            print_warning(&format!("{what}; {hint}"));
        }
    }
    publish.unless_by_another(may_publish(server, facts, publication))
}

fn is_published(facts: &TableFacts, publication: Option<&Publication>) -> bool {
    publication.is_some_and(|publication| publication.table(&facts.table).is_some())
}

fn refuse_obstacles(
    facts: &TableFacts,
    publication: Option<&Publication>,
    publish: Publish,
) -> Result<()> {
    let is_there = is_published(facts, publication);
    for Obstacle { harm, what, hint } in obstacles(facts, publication) {
        let fatal = match harm {
            Harm::Less => false,
            Harm::Partly | Harm::Absent | Harm::Breaks => !publish.anyway && !is_there,
            Harm::Impossible => true,
        };
        if !fatal {
            print_warning(&format!("{what}; {hint}"));
            continue;
        }
        let hint = match harm {
            Harm::Impossible => hint,
            _ => format!("{hint}; to publish it all the same: init --publish-anyway"),
        };
        return Err(Error::refused(what).hint(hint));
    }
    Ok(())
}

fn may_publish(
    server: &ServerFacts,
    facts: &TableFacts,
    publication: Option<&Publication>,
) -> Result<()> {
    let table = &facts.table;
    if !is_published(facts, publication) && !facts.nature.owned {
        let user = &server.user;
        let quoted = postgres_protocol::escape::escape_identifier(user);
        return Err(Error::refused(format!(
            "role {user:?} does not own {table}, and only an owner may publish it"
        ))
        .hint(format!(
            "GRANT the role that owns {table} TO {quoted}, or use that role in --admin-url"
        )));
    }
    Ok(())
}
