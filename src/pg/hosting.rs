//! Who gives the right to replicate. Where a hosting service keeps the superuser for itself, the
//! right comes in the service's own way, and advice for superusers could not be followed.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::GenericClient;

use crate::error::{Error, Result};
use crate::pg::connect::Options;
use crate::pg::replication::ReplicationConnection;
use crate::pg::sqlstate::{INSUFFICIENT_PRIVILEGE, postgres_error};

/// A hosting service, known by a role that only it has.
struct Service {
    role: &'static str,
    /// What gives the right to replicate; `{}` is the role, quoted.
    admits: &'static str,
    /// What makes `wal_level` logical.
    makes_logical: &'static str,
}

const SERVICES: &[Service] = &[
    Service {
        role: "rds_superuser",
        admits: "as the master user (RDS, Aurora): GRANT rds_replication TO {}",
        makes_logical: "set rds.logical_replication = 1 in the parameter group, then reboot",
    },
    Service {
        role: "cloudsqlsuperuser",
        admits: "as a member of cloudsqlsuperuser (Cloud SQL): ALTER ROLE {} REPLICATION",
        makes_logical: "set the flag cloudsql.logical_decoding = on; the instance restarts",
    },
    Service {
        role: "azure_pg_admin",
        admits: "as the admin user (Azure): ALTER ROLE {} REPLICATION",
        makes_logical: "set the server parameter wal_level = LOGICAL, then restart",
    },
    Service {
        role: "neon_superuser",
        admits: "create the role in the console or with the CLI (Neon), not with SQL: {}",
        makes_logical: "enable logical replication in the settings of the project",
    },
    Service {
        role: "supabase_admin",
        admits: "as role postgres (Supabase): ALTER ROLE {} REPLICATION",
        makes_logical: "contact support: wal_level is logical by default on Supabase",
    },
];

/// A server of one's own.
const OWN: Service = Service {
    role: "",
    admits: "as a superuser: ALTER ROLE {} REPLICATION",
    makes_logical: "ALTER SYSTEM SET wal_level = 'logical', then restart Postgres",
};

async fn service(client: &impl GenericClient) -> Result<&'static Service> {
    let sql = "SELECT rolname::text FROM pg_catalog.pg_roles WHERE rolname = ANY ($1)";
    let names: Vec<&str> = SERVICES.iter().map(|service| service.role).collect();
    let rows = client.query(sql, &[&names]).await.map_err(postgres_error)?;
    let here: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    Ok(SERVICES.iter().find(|service| here.contains(&service.role)).unwrap_or(&OWN))
}

/// What gives `role` the right to replicate on this server.
///
/// # Errors
/// What the server says.
pub async fn how_to_admit(client: &impl GenericClient, role: &str) -> Result<String> {
    Ok(service(client).await?.admits.replace("{}", &escape_identifier(role)))
}

/// What creates `role` with that right on this server.
///
/// # Errors
/// What the server says.
pub async fn how_to_create(client: &impl GenericClient, role: &str) -> Result<String> {
    let quoted = escape_identifier(role);
    let service = service(client).await?;
    if service.role.is_empty() {
        return Ok(format!(
            "as a superuser: CREATE ROLE {quoted} LOGIN REPLICATION PASSWORD '...'"
        ));
    }
    let admits = service.admits.replace("{}", &quoted);
    Ok(format!("CREATE ROLE {quoted} LOGIN PASSWORD '...'; then, {admits}"))
}

/// What makes `wal_level` logical on this server.
///
/// # Errors
/// What the server says.
pub async fn how_to_make_logical(client: &impl GenericClient) -> Result<&'static str> {
    Ok(service(client).await?.makes_logical)
}

/// What the server says to a replication connection of the role of `options`.
#[derive(Debug)]
pub struct Asked {
    /// The value of `default_transaction_read_only` for sessions of this role, other than ours.
    pub read_only: bool,
}

/// Asks the server whether the role may replicate, by a replication connection: attributes and
/// memberships do not say it where a service decides by rules of its own.
///
/// # Errors
/// What stood in the way; with `INSUFFICIENT_PRIVILEGE` the role may not replicate.
pub async fn ask(options: &Options) -> Result<Asked> {
    let mut connection = ReplicationConnection::connect(options).await?;
    connection.identify_system().await?;
    let read_only = connection.show("default_transaction_read_only").await? == "on";
    connection.close().await;
    Ok(Asked { read_only })
}

/// Whether the server has refused a replication connection for lack of the right.
pub fn is_not_admitted(error: &Error) -> bool {
    error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE)
}
