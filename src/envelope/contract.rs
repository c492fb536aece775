//! Whether the data of an event keeps the contract of its route.

use super::{Envelope, native, raw};
use crate::contract::Contracts;
use crate::error::Result;
use crate::event::{Change, Content, Event, Value};

impl Envelope {
    /// Checks the payload of an outbox event, or the row after a change.
    pub(super) fn keeps_contract(&mut self, event: &Event, contracts: &Contracts) -> Result<()> {
        self.body.clear();
        let (contract, absent) = match &event.content {
            Content::Outbox(row) => {
                let Some(contract) = contracts.of(&row.event_type) else { return Ok(()) };
                raw::Body::of(&row.payload)?.write(&mut self.body);
                (contract, Vec::new())
            }
            Content::Change(
                Change::Insert { new } | Change::Read { new, .. } | Change::Update { new, .. },
            ) => {
                let Some(contract) = &contracts.all else { return Ok(()) };
                let table = &*event.table;
                native::write_row(&mut self.body, table, new, 0..new.len())?;
                let unchanged = table.columns.iter().zip(new.iter());
                let unchanged = unchanged.filter(|(_, value)| **value == Value::Unchanged);
                (&**contract, unchanged.map(|(column, _)| &*column.name).collect())
            }
            Content::Change(Change::Delete { .. } | Change::Truncate) => return Ok(()),
        };
        contract.check(&self.body, &absent)
    }
}
