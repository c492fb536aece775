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
    match read(t, file).and_then(|text| Contract::compile(file, &text)) {
        Ok(contract) => Some(Arc::new(contract)),
        Err(error) => {
            t.error(key, &error);
            None
        }
    }
}

fn read(t: &Section<'_>, file: &str) -> Result<String> {
    let path = t.directory().join(file);
    let mut text = String::new();
    // One byte more than is allowed says that there is more.
    let limit = SCHEMA_MAX as u64 + 1;
    let read =
        std::fs::File::open(&path).and_then(|file| file.take(limit).read_to_string(&mut text));
    let path = path.display();
    read.map(|_| text).map_err(|error| {
        Error::config(format!("contract {file:?} cannot be read: {error} ({path})"))
    })
}
