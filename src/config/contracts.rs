//! `contract` and `contracts` of a route: files with JSON Schema, compiled while the configuration
//! is read.

use std::io::Read as _;
use std::sync::Arc;

use super::section::{Scalar, Section};
use crate::contract::{Contract, Contracts, SCHEMA_MAX};
use crate::error::{Error, Result};

/// The contracts of the route that `t` is; relative paths begin at the configuration file.
pub(super) fn contracts(t: &mut Section<'_>) -> Contracts {
    const CONTRACT: &str = "contract";
    const CONTRACTS: &str = "contracts";
    let mut contracts = Contracts::default();
    let file = t.text(CONTRACT, "");
    if !file.is_empty() {
        contracts.all = compiled(t, CONTRACT, &file);
    }
    let mut of_types = t.table(CONTRACTS, "such as { placed = \"contracts/placed.json\" }");
    for event_type in of_types.keys() {
        if matches!(event_type, "" | "*") {
            let path = of_types.path("");
            let table = path.trim_end_matches('.');
            let text = format!(
                "{table} names {event_type:?}, which is not an event type; the \
                                contract of all other events is the key contract"
            );
            of_types.problem(event_type, text);
        }
        match of_types.scalar(event_type) {
            Some(Scalar::Text(file)) if !file.is_empty() => {
                if let Some(contract) = compiled(&of_types, event_type, &file) {
                    contracts.by_type.insert(event_type.to_owned(), contract);
                }
            }
            Some(Scalar::Text(_) | Scalar::Int(_) | Scalar::Bool(_)) => {
                let path = of_types.path(event_type);
                of_types.problem(event_type, format!("{path} is not the name of a file"));
            }
            None => {}
        }
    }
    contracts
}

fn compiled(t: &Section<'_>, key: &str, file: &str) -> Option<Arc<Contract>> {
    match read(t, file).and_then(|schema| Contract::compile(file, &schema)) {
        Ok(contract) => Some(Arc::new(contract)),
        Err(error) => {
            t.error(key, &error);
            None
        }
    }
}

fn read(t: &Section<'_>, file: &str) -> Result<Vec<u8>> {
    let path = t.directory().join(file);
    let mut schema = Vec::new();
    // One byte more than is allowed says that there is more.
    let limit = SCHEMA_MAX as u64 + 1;
    let read =
        std::fs::File::open(&path).and_then(|file| file.take(limit).read_to_end(&mut schema));
    let path = path.display();
    read.map(|_| schema).map_err(|error| {
        Error::config(format!("contract {file:?} cannot be read: {error} ({path})"))
    })
}
