//! What the role of `source.url` may do: replicate, connect, and use the relay's own tables.

use tokio_postgres::Client;

use super::INIT;
use crate::cli::findings::Findings;
use crate::config::Config;
use crate::error::Result;
use crate::pg::hosting;
use crate::pg::slot::ServerFacts;
use crate::pg::sqlstate::{TOO_MANY_CONNECTIONS, postgres_error};
use crate::pg::unnamed;
use crate::relay::session::rights::{self, Lack};

/// Checks the role of `source.url`.
pub(super) async fn check(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    server: &ServerFacts,
) -> Result<()> {
    let user = &server.user;
    match hosting::ask(&config.relay.sql).await {
        Ok(asked) => {
            f.ok("role", format!("{user} may replicate"));
            if asked.read_only {
                f.warning(
                    "read-only",
                    "default_transaction_read_only is on: applications cannot write, and emit \
                     fails; the relay's own sessions turn it off",
                    "hosting services do that when the disk is full: make room, or, where somebody \
                     has set it, ALTER SYSTEM, DATABASE or ROLE ... RESET \
                     default_transaction_read_only",
                );
            }
        }
        Err(error) if hosting::is_not_admitted(&error) => f.problem(
            "role",
            format!("{user} may not replicate: {error}"),
            hosting::how_to_admit(client, user).await?,
        ),
        // The running relay may have the only walsender.
        Err(error) if error.sqlstate() == Some(TOO_MANY_CONNECTIONS) => f.warning(
            "role",
            format!("could not check whether {user} may replicate: {error}"),
            error.hint_or_kind(),
        ),
        Err(error) => f.error("role", &error.context("a replication connection")),
    }
    check_limits(f, client, user).await?;
    check_rights(f, config, client, user).await
}

/// Connections that a relay needs: one each for the session, the source, upkeep and backfills, and
/// one for a command.
const CONNECTIONS: i32 = 5;

/// Checks the connection limits of the role and the database.
async fn check_limits(f: &mut Findings, client: &Client, user: &str) -> Result<()> {
    let sql = "SELECT r.rolconnlimit, d.datconnlimit FROM pg_catalog.pg_roles AS r, \
        pg_catalog.pg_database AS d \
        WHERE r.rolname = current_user AND NOT r.rolsuper AND d.datname = current_database()";
    let row = unnamed::query_opt(client, sql, &[]).await.map_err(postgres_error)?;
    let Some(row) = row else { return Ok(()) };
    let quoted = postgres_protocol::escape::escape_identifier(user);
    let limits = [
        (row.get::<_, i32>(0), format!("role {user}"), format!("ALTER ROLE {quoted}")),
        (row.get::<_, i32>(1), "the database".to_owned(), "ALTER DATABASE ...".to_owned()),
    ];
    for (limit, of, alter) in limits {
        if (0..CONNECTIONS).contains(&limit) {
            f.problem(
                "connections",
                format!("{of} may have {limit} connections, the relay needs {CONNECTIONS}"),
                format!("{alter} CONNECTION LIMIT -1"),
            );
        }
    }
    Ok(())
}

/// What the relay's role may do with the relay's own tables.
pub(super) async fn check_rights(
    f: &mut Findings,
    config: &Config,
    client: &Client,
    user: &str,
) -> Result<()> {
    let quoted = postgres_protocol::escape::escape_identifier(user);
    let sql = "SELECT pg_has_role(oid, 'USAGE') FROM pg_roles WHERE rolname = 'watership_relay'";
    let row = unnamed::query_opt(client, sql, &[]).await.map_err(postgres_error)?;
    match row.map(|row| row.get::<_, bool>(0)) {
        Some(true) => f.ok("role", format!("{user} has the rights of watership_relay")),
        Some(false) => f.problem(
            "role",
            format!("{user} is not a member of watership_relay"),
            format!("{INIT}, or as a superuser: GRANT watership_relay TO {quoted}"),
        ),
        None => f.problem("role", "role watership_relay does not exist", INIT),
    }
    let mut lacks = rights::lacking(client, None, config.relay.kind).await?;
    // Access to a mapped table is granted by its owner, not by us.
    lacks.retain(|lack| !(lack.app && config.relay.outbox.is_mapped()));
    if lacks.iter().any(Lack::is_everything) {
        lacks.retain(|lack| lack.app || lack.hidden);
    }
    for lack in lacks {
        match rights::verify(std::slice::from_ref(&lack)) {
            Err(error) => f.error("rights", &error),
            Ok(()) => {
                let (what, hint) = lack.told();
                f.problem("rights", what, hint);
            }
        }
    }
    Ok(())
}
