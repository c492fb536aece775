//! How large an event is, without making anything of it. Pure.
//!
//! A row can have up to 1 GiB in the stream. What is certain to become a body that no broker takes
//! is found out here, before it is copied.

use bytes::Bytes;

use super::{Change, Content, Event, OldRow, OutboxPayload, Row, Value};
use crate::column::{Form, Shape};

/// Most bytes of a text form for one byte of the JSON that it becomes: `bytea` in its escape
/// format, four for one, is base64 afterwards.
const SHRINKS_AT_MOST: usize = 4;

impl Event {
    /// Bytes of its values, as they came.
    pub fn bytes(&self) -> usize {
        let row = |row: &Row| row.iter().map(value).sum::<usize>();
        let old = |old: &OldRow| row(old.row());
        match &self.content {
            Content::Outbox(outbox) => {
                let payload = match &outbox.payload {
                    OutboxPayload::Json(bytes)
                    | OutboxPayload::Hex(bytes)
                    | OutboxPayload::Bytes(bytes) => bytes.len(),
                    OutboxPayload::Empty => 0,
                    OutboxPayload::Broken(broken) => broken
                        .columns
                        .iter()
                        .filter_map(|(_, value)| value.as_ref())
                        .map(Bytes::len)
                        .sum(),
                };
                let further = [&outbox.headers, &outbox.columns];
                let shown = outbox.shown.iter().filter_map(|(_, text)| text.as_ref());
                payload
                    + further.into_iter().flatten().map(Bytes::len).sum::<usize>()
                    + shown.map(|text| text.len()).sum::<usize>()
            }
            Content::Change(Change::Insert { new } | Change::Read { new, .. }) => row(new),
            Content::Change(Change::Update { old: before, new }) => {
                row(new) + before.as_ref().map_or(0, old)
            }
            Content::Change(Change::Delete { old: before }) => old(before),
            Content::Change(Change::Truncate) => 0,
        }
    }

    /// Bytes that a body of it has at least.
    pub fn least_body(&self) -> usize {
        let row = |row: &Row| {
            let columns = self.table.columns.iter();
            columns.zip(row.iter()).map(|(column, value)| least(column.shape, value)).sum::<usize>()
        };
        let old = |old: &OldRow| match old {
            OldRow::Full(full) => row(full),
            OldRow::Key(_) => 0,
        };
        match &self.content {
            Content::Outbox(outbox) => match &outbox.payload {
                OutboxPayload::Json(bytes) | OutboxPayload::Bytes(bytes) => bytes.len(),
                OutboxPayload::Hex(hex) => hex.len() / SHRINKS_AT_MOST,
                OutboxPayload::Empty | OutboxPayload::Broken(_) => 0,
            },
            Content::Change(Change::Insert { new } | Change::Read { new, .. }) => row(new),
            Content::Change(Change::Update { old: before, new }) => {
                row(new) + before.as_ref().map_or(0, old)
            }
            Content::Change(Change::Delete { old: before }) => old(before),
            Content::Change(Change::Truncate) => 0,
        }
    }
}

fn value(value: &Value) -> usize {
    match value {
        Value::Text(text) => text.len(),
        Value::Unreadable(value) => value.bytes.as_ref().map_or(0, Bytes::len),
        Value::Null | Value::Unchanged => 0,
    }
}

fn least(shape: Shape, value: &Value) -> usize {
    match (value, shape.arrays(), shape.form()) {
        (Value::Text(text), 0, Form::Text | Form::Json) => text.len(),
        (Value::Text(text), 0 | 1, _) => text.len() / SHRINKS_AT_MOST,
        // Each array around another one doubles the backslashes.
        (Value::Text(_), 2.., _) => 0,
        // A message with an unreadable value is not made.
        (Value::Null | Value::Unchanged | Value::Unreadable(_), _, _) => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;
    use crate::envelope::Envelope;
    use crate::event::hidden::Hidden;
    use crate::event::{Column, Identity, Table};
    use crate::position::Position;
    use crate::route::{Decision, Plans, Resumed, Router, default_rules};

    /// text, jsonb, bytea, integer, text[].
    const TYPES: [u32; 5] = [25, 3802, 17, 23, 1009];

    fn event(texts: [String; 5], full: bool) -> Event {
        let columns = TYPES.iter().enumerate();
        let columns = columns.map(|(i, oid)| Column::new(format!("c{i}"), *oid, -1)).collect();
        let table = Table {
            database: "shop".into(),
            oid: 1,
            version: 1,
            schema: "public".into(),
            name: "t".into(),
            full_name: "public.t".into(),
            columns,
            key: vec![3],
            identity: if full { Identity::Full } else { Identity::Columns(vec![3]) },
        };
        let row: Row = texts.map(|text| Value::Text(text.into())).into();
        let old = full.then(|| OldRow::Full(row.clone()));
        Event {
            id: Uuid::nil(),
            position: Position::default(),
            lsn: None,
            occurred_at_us: 0,
            committed_at_us: 0,
            xid: 1,
            table: Arc::new(table),
            content: Content::Change(Change::Update { old, new: row }),
        }
    }

    fn body_of(event: &Event) -> Vec<u8> {
        let router = Router::new(&default_rules()).unwrap();
        let (plans, mut bodies) = (Plans::new(&router, Resumed::default()), Vec::new());
        plans.decide_alone(&router, event, &Hidden::default(), |decision| {
            let Decision::Publish(plan, _) = decision else { panic!("it is dropped") };
            bodies.push(Envelope::new("r", || 0).message(event, plan, 0).unwrap().body().to_vec());
        });
        bodies.pop().expect("one route takes all tables")
    }

    proptest! {
        #[test]
        fn no_body_is_smaller_than_was_said(
            text in "\\PC{0,40}", number in any::<i32>(), bytes in any::<[u8; 9]>(),
            full in any::<bool>(),
        ) {
            let json = serde_json::json!({ "a": text }).to_string();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
            let texts = [
                text.clone(), json, format!("\\x{hex}"), number.to_string(),
                format!("{{\"{quoted}\"}}"),
            ];
            let event = event(texts, full);
            let body = body_of(&event);
            prop_assert!(event.least_body() <= body.len(), "{} of {body:?}", event.least_body());
            prop_assert!(event.bytes() >= event.least_body());
        }
    }
}
