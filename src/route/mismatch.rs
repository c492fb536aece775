//! What a rule asks for and does not go together. Pure.

use super::{Filter, Format, RouteRules, Select};
use crate::contract::Contracts;
use crate::error::{Error, Result};

/// What a rule asks for must go together.
///
/// # Errors
/// [`crate::error::Kind::Config`] with what does not.
pub(super) fn verify(
    select: &Select,
    key: &[String],
    format: &Format,
    contracts: &Contracts,
    rules: &RouteRules,
) -> Result<()> {
    if matches!(select, Select::Outbox { .. }) && !key.is_empty() {
        let text = "key columns apply to captured tables; the key of an outbox event is \
                    (aggregate_type, aggregate_id)";
        return Err(Error::config(text));
    }
    if matches!(select, Select::Table { .. }) && *format == Format::Raw {
        let text = "format \"raw\" is the payload of an outbox row, and a captured table has \
                    none; use \"watership\"";
        return Err(Error::config(text));
    }
    if matches!(select, Select::Table { .. }) && !contracts.by_type.is_empty() {
        let text = "contracts are named by the event type of the outbox; use contract \
                    for a captured table";
        return Err(Error::config(text));
    }
    match select {
        Select::Table { name } if name != "*" => rules.verify(key)?,
        Select::Table { .. } | Select::Outbox { .. } if !rules.is_only_filter() => {
            let text = "columns, map and on_drift are for one captured table: name it in table";
            return Err(Error::config(text));
        }
        Select::Table { .. } => {
            rules.filter.iter().try_for_each(|f| f.verify_table(true))?;
        }
        Select::Outbox { .. } => {
            rules.filter.iter().try_for_each(Filter::verify_outbox)?;
        }
    }
    Ok(())
}
