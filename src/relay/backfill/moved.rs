//! Rows whose key changes while their table is read. Pure.
//!
//! Each chunk reads a range of keys. A row that moves from a range not yet read into one already
//! read is in no chunk, so the consumer gets only its live change, and a change lacks values that
//! it did not touch if they are stored out of line (unchanged TOAST). Such changes are recorded
//! with the checkpoint that covers them, and the run reads their rows again at its end. All moves
//! are recorded, whatever their direction, because the loop does not know the order of keys.

use crate::event::{Change, Content, Event, OldRow, Row, Table, Value};
use crate::source::Moved;

/// The new key, if this change moves a row without carrying all of its values.
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
        // The identity does not include the key, so a change of the key does not show.
        _ if !table.identity.covers(&table.key) => true,
        Some(OldRow::Key(old)) => differs(table, old, new),
        // The server would have sent the old identity if it had changed.
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
    use super::super::merge::tests::{event, table};
    use super::*;
    use crate::event::Identity;

    fn row(values: [&'static str; 3]) -> Row {
        let value = |text: &'static str| match text {
            "?" => Value::Unchanged,
            text => Value::Text(text.into()),
        };
        values.map(value).to_vec().into()
    }

    fn update(identity: Identity, old: Option<OldRow>, new: [&'static str; 3]) -> Option<Moved> {
        moved(&event(table(identity), Change::Update { old, new: row(new) }))
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
