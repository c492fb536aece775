//! What a session reads of an outbox table that is the application's.

use tokio_postgres::Client;

use crate::error::Result;
use crate::pg::outbox::{
    MappedColumn, current_role, may_delete, read_columns, read_indexes, sight,
};
use crate::pg::publication::{Publication, TableFacts, read_table};
use crate::relay::Options;
use crate::relay::check::outbox::{self, MappedFacts};
use crate::relay::check::polled_table::{self, PolledTable};
use crate::source::SourceKind;
use crate::source::outbox::{OutboxCatalog, OutboxTable};

/// A mapped table, as it was read.
pub struct Mapped {
    /// The table.
    pub facts: TableFacts,
    /// Its columns.
    pub columns: Vec<MappedColumn>,
    may_delete: Option<bool>,
    polled: Option<PolledTable>,
    role: String,
}

/// Reads the mapped table and what `role`, or else the role of the connection, may do with it.
/// Absent for the relay's own outbox.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when it does not exist, or the server's.
pub async fn read(
    client: &Client,
    options: &Options,
    role: Option<&str>,
) -> Result<Option<Mapped>> {
    let table = &options.outbox;
    if !table.is_mapped() {
        return Ok(None);
    }
    let facts = read_table(client, &table.table).await?;
    let facts = facts.ok_or_else(|| outbox::missing(table))?;
    let columns = read_columns(client, facts.oid).await?;
    let role = match role {
        Some(role) => role.to_owned(),
        None => current_role(client).await?,
    };
    let deletes = options.delete_after.is_some();
    let may_delete = match deletes {
        true => Some(may_delete(client, facts.oid, &role).await?),
        false => None,
    };
    let polled = match options.kind {
        SourceKind::Wal => None,
        SourceKind::Poll => Some(read_polled(client, options, facts.oid, &role).await?),
    };
    Ok(Some(Mapped { facts, columns, may_delete, polled, role }))
}

/// OID and columns of a polled table that has the columns polling needs; absent for the relay's own
/// outbox. Rights and indexes are not checked.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when it is not there or lacks one of the two, or the server's.
pub async fn polled_columns(
    client: &Client,
    options: &Options,
) -> Result<Option<(u32, Vec<MappedColumn>)>> {
    let table = &options.outbox;
    if !table.is_mapped() {
        return Ok(None);
    }
    let facts = read_table(client, &table.table).await?;
    let facts = facts.ok_or_else(|| outbox::missing(table))?;
    let columns = read_columns(client, facts.oid).await?;
    let found =
        MappedFacts { facts: &facts, columns: &columns, may_delete: None, polled: None, role: "" };
    polled_table::verify_columns(table, found)?;
    Ok(Some((facts.oid, columns)))
}

async fn read_polled(
    client: &Client,
    options: &Options,
    oid: u32,
    role: &str,
) -> Result<PolledTable> {
    let indexes = read_indexes(client, &options.outbox.table).await?;
    let (may_use_schema, may_select, hidden) = sight(client, oid, role).await?;
    Ok(PolledTable { indexes, may_use_schema, may_select, hidden })
}

impl Mapped {
    /// For [`crate::relay::check::outbox`].
    pub fn found(&self) -> MappedFacts<'_> {
        let Self { facts, columns, may_delete, polled, role } = self;
        let (may_delete, polled) = (*may_delete, polled.as_ref());
        MappedFacts { facts, columns, may_delete, polled, role }
    }
}

/// The outbox as a session reads it, with what the catalog says of it.
///
/// # Errors
/// [`crate::error::Kind::Refused`] when it cannot be read as it is mapped, or the server's.
pub async fn verify(
    client: &Client,
    options: &Options,
    publication: Option<&Publication>,
) -> Result<OutboxTable> {
    let catalog = match read(client, options, None).await? {
        None => OutboxCatalog::default(),
        Some(mapped) => outbox::fits(&options.outbox, mapped.found(), publication, options.kind)?,
    };
    Ok(OutboxTable { catalog, ..options.outbox.clone() })
}
