//! Rows that get another key while their table is read. Pure.
//!
//! A chunk reads the rows of a range of keys. A row that moves from a key that is not read yet to
//! one that was read is in no chunk, so its consumer knows of it what the change says; and a change
//! does not carry what it did not touch where that is stored out of line (unchanged TOAST). Such
//! changes are recorded with the checkpoint that covers them, and the run reads their rows at its
//! end. That is done wherever the row came from: the loop does not know how keys are ordered.

use crate::event::{Change, Content, Event, OldRow, Row, Table, Value};
use crate::source::Moved;

/// The new key of a change that moves a row and does not carry all of it.
pub fn moved(event: &Event) -> Option<Moved> {
    let Content::Change(Change::Update { old, new }) = &event.content else { return None };
    let is_whole = |value: &Value| !matches!(value, Value::Unchanged);
    if new.iter().all(is_whole) || !may_move(&event.table, old.as_ref(), new) {
        return None;
    }
    let (table, position) = (&event.table, event.position);
    let text = |column: &usize| {
        let value = match (&new[*column], old) {
            (Value::Unchanged, Some(old)) => &old.row()[*column],
            (value, _) => value,
        };
        let Value::Text(text) = value else { return None };
        let text = String::from_utf8(text.to_vec()).ok()?;
        Some((table.columns[*column].name.to_string(), text))
    };
    let key = table.key.iter().map(text).collect();
    Some(Moved { relation: table.oid, position, key })
}

/// Whether the row may have had another key before.
fn may_move(table: &Table, old: Option<&OldRow>, new: &Row) -> bool {
    if table.key.is_empty() {
        return false;
    }
    match old {
        Some(OldRow::Full(old)) => differs(table, old, new),
        // Of another identity than the key: nobody says whether the key has changed.
        _ if !table.identity.covers(&table.key) => true,
        Some(OldRow::Key(old)) => differs(table, old, new),
        // The server sends the old identity when that has changed.
        None => false,
    }
}

fn differs(table: &Table, old: &Row, new: &Row) -> bool {
    table.key.iter().any(|column| match (&old[*column], &new[*column]) {
        (_, Value::Unchanged) => false,
        (Value::Text(old), Value::Text(new)) => old != new,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::event::{Column, Identity};
    use crate::position::Position;

    fn table(identity: Identity) -> Arc<Table> {
        Arc::new(Table {
            database: "shop".into(),
            oid: 7,
            version: 1,
            schema: "public".into(),
            name: "t".into(),
            full_name: "public.t".into(),
            columns: ["a", "b", "big"].map(|name| Column::new(name, 25, -1)).into(),
            key: vec![0, 1],
            identity,
        })
    }

    fn row(values: [&'static str; 3]) -> Row {
        let value = |text: &'static str| match text {
            "?" => Value::Unchanged,
            text => Value::Text(text.into()),
        };
        values.map(value).to_vec().into()
    }

    fn update(identity: Identity, old: Option<OldRow>, new: [&'static str; 3]) -> Option<Moved> {
        let content = Content::Change(Change::Update { old, new: row(new) });
        moved(&Event {
            id: uuid::Uuid::nil(),
            position: Position::default(),
            lsn: None,
            occurred_at_us: 0,
            committed_at_us: 0,
            xid: 1,
            table: table(identity),
            content,
        })
    }

    #[test]
    fn only_a_row_with_another_key_and_without_all_values_has_to_be_read_again() {
        let key = || Identity::Columns(vec![0, 1]);
        let old = |values| Some(OldRow::Key(row(values)));
        let found = update(key(), old(["1", "x", "?"]), ["2", "x", "?"]).expect("it moved");
        let text = |name: &str, text: &str| (name.to_owned(), text.to_owned());
        assert_eq!(found.key, Some(vec![text("a", "2"), text("b", "x")]));
        assert_eq!(update(key(), old(["1", "x", "?"]), ["2", "x", "all"]), None, "it says all");
        assert_eq!(update(key(), None, ["2", "x", "?"]), None, "its key is the same");
        assert_eq!(update(key(), old(["1", "x", "?"]), ["1", "x", "?"]), None, "the same");
        let full = |values| Some(OldRow::Full(row(values)));
        assert_eq!(update(Identity::Full, full(["1", "x", "z"]), ["1", "x", "?"]), None);
        assert!(update(Identity::Full, full(["0", "x", "z"]), ["1", "x", "?"]).is_some());
        let other = || Identity::Columns(vec![1]);
        assert!(update(other(), None, ["1", "x", "?"]).is_some(), "nobody knows");
        let wider = || Identity::Columns(vec![0, 1, 2]);
        assert_eq!(update(wider(), None, ["1", "x", "?"]), None, "it would be sent");
        assert_eq!(update(wider(), old(["1", "x", "y"]), ["1", "x", "?"]), None, "the same key");
        assert!(update(wider(), old(["0", "x", "y"]), ["1", "x", "?"]).is_some());
        let found = update(key(), old(["1", "long", "?"]), ["2", "?", "?"]).expect("it moved");
        assert_eq!(found.key, Some(vec![text("a", "2"), text("b", "long")]));
    }
}
