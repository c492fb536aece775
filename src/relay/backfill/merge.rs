//! The rows of a chunk among the live changes of their table. Pure.
//!
//! Invariant: the chunk stands before every change that comes after its low mark, and what the last
//! of them leaves of a row is what its consumer ends with. So a row is sent before a change of the
//! same row, or it is left out, which is right only where the change says all that the row says: a
//! delete, a truncate, or a new row with every value. A change without a value that it did not
//! touch (unchanged TOAST) never replaces a row of the chunk: the value would be lost. Nor does a
//! change that is not sent on every route on which the row is: there nothing would say what the row
//! says.
//!
//! A row may be newer than its place: it is read after the mark. Then the changes after the mark
//! lead from an older state to the same one again, and the last state is the right one.

use std::collections::HashMap;
use std::sync::Arc;

use crate::event::{Change, Content, Event, OldRow, Row, Table, Value};

/// The rows of a chunk that are not sent.
#[derive(Debug)]
pub struct Unsent {
    table: Arc<Table>,
    /// In the order of the key; absent once sent or left out.
    rows: Vec<Option<Row>>,
    /// All before it are gone.
    next: usize,
    /// Where the row of each key is; made when the first change has to be compared.
    index: Option<HashMap<Vec<u8>, usize>>,
    left_out: u64,
}

/// What a change says about rows of its table.
#[derive(Debug, PartialEq, Eq)]
enum Says {
    /// It says everything about the rows with these keys.
    All(Vec<Vec<u8>>),
    /// It says something about the rows with these keys.
    Some(Vec<Vec<u8>>),
    /// It does not say which rows it is about.
    Unknown,
    /// The rows are gone.
    Nothing,
}

impl Unsent {
    /// The rows of a chunk, in the order of their key.
    pub fn new(table: Arc<Table>, rows: Vec<Row>) -> Self {
        let rows = rows.into_iter().map(Some).collect();
        Self { table, rows, next: 0, index: None, left_out: 0 }
    }

    /// How the rows are described.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Rows that were left out.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Takes the next row, with its number among the rows of the chunk, from 1.
    pub fn pop(&mut self) -> Option<(u32, Row)> {
        while let Some(row) = self.rows.get_mut(self.next) {
            self.next += 1;
            if let Some(row) = row.take() {
                return Some((number(self.next - 1), row));
            }
        }
        None
    }

    /// A change of the table comes. Returns the rows that have to be sent before it, with their
    /// numbers; leaves out those that need not be sent because of it. `replaces` says whether the
    /// change goes wherever the row of this number would.
    pub fn meet(
        &mut self,
        change: &Event,
        mut replaces: impl FnMut(u32, &Row) -> bool,
    ) -> Vec<(u32, Row)> {
        let (mut found, says_all): (Vec<_>, _) = match says(&self.table, change) {
            Says::Nothing => (std::iter::from_fn(|| self.pop()).collect(), true),
            Says::Unknown => (std::iter::from_fn(|| self.pop()).collect(), false),
            Says::All(keys) => (keys.iter().filter_map(|key| self.take(key)).collect(), true),
            Says::Some(keys) => (keys.iter().filter_map(|key| self.take(key)).collect(), false),
        };
        if says_all {
            let before = found.len();
            found.retain(|(number, row)| !replaces(*number, row));
            self.left_out += (before - found.len()) as u64;
        }
        found
    }

    fn take(&mut self, key: &[u8]) -> Option<(u32, Row)> {
        let index = self.index.get_or_insert_with(|| {
            let rows = self.rows.iter().enumerate();
            let keyed = rows.filter_map(|(at, row)| {
                Some((key_of(&self.table, &self.table, row.as_ref()?)?, at))
            });
            keyed.collect()
        });
        let at = *index.get(key)?;
        Some((number(at), self.rows[at].take()?))
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index + 1).expect("a chunk is far below 2^31 rows")
}

/// The key of `table`, which describes the chunk, out of a row that `of` describes; absent where it
/// is not all there.
fn key_of(table: &Table, of: &Table, row: &Row) -> Option<Vec<u8>> {
    let mut key = Vec::new();
    for column in &table.key {
        let column = match std::ptr::eq(table, of) {
            true => *column,
            false => of.column(&table.columns[*column].name)?,
        };
        let Value::Text(text) = &row[column] else { return None };
        key.extend_from_slice(&(text.len() as u64).to_le_bytes());
        key.extend_from_slice(text);
    }
    (!table.key.is_empty()).then_some(key)
}

fn says(table: &Table, event: &Event) -> Says {
    let Content::Change(change) = &event.content else { return Says::Some(Vec::new()) };
    let of = &*event.table;
    let key = |row: &Row| key_of(table, of, row);
    let keys = match change {
        Change::Truncate => return Says::Nothing,
        // It is not a change: another chunk has rows of its own.
        Change::Read { .. } => return Says::Some(Vec::new()),
        Change::Insert { new } => key(new).map(|key| vec![key]),
        Change::Delete { old } => key(old.row()).map(|key| vec![key]),
        // Without an old row the key is what it was, if the identity would tell that it changed.
        Change::Update { old: None, new } => {
            key(new).filter(|_| of.identity.covers(&of.key)).map(|key| vec![key])
        }
        Change::Update { old: Some(OldRow::Key(old) | OldRow::Full(old)), new } => {
            key(old).zip(key(new)).map(|(old, new)| vec![old, new])
        }
    };
    let Some(mut keys) = keys else { return Says::Unknown };
    keys.dedup();
    let is_there = |value: &Value| matches!(value, Value::Text(_) | Value::Null);
    let complete = match change {
        Change::Insert { new } | Change::Update { new, .. } => new.iter().all(is_there),
        Change::Delete { .. } | Change::Truncate => true,
        Change::Read { .. } => false,
    };
    if complete { Says::All(keys) } else { Says::Some(keys) }
}

#[cfg(test)]
pub(super) mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::event::{Column, Identity};
    use crate::position::Position;

    /// Two key columns of three, in another order than the identity flags them.
    pub(in crate::relay::backfill) fn table(identity: Identity) -> Arc<Table> {
        Arc::new(Table {
            database: "shop".into(),
            oid: 7,
            version: 1,
            schema: "public".into(),
            name: "t".into(),
            full_name: "public.t".into(),
            columns: ["a", "b", "note"].map(|name| Column::new(name, 25, -1)).into(),
            key: vec![0, 1],
            identity,
        })
    }

    fn keyed() -> Arc<Table> {
        table(Identity::Columns(vec![0, 1]))
    }

    fn text(text: &'static str) -> Value {
        Value::Text(text.as_bytes().into())
    }

    fn row(a: &'static str, b: &'static str, note: Value) -> Row {
        [text(a), text(b), note].into()
    }

    fn chunk() -> Unsent {
        let rows = [("1", "x"), ("1", "y"), ("2", "x"), ("3", "x")];
        Unsent::new(keyed(), rows.map(|(a, b)| row(a, b, text("read"))).into())
    }

    pub(in crate::relay::backfill) fn event(table: Arc<Table>, change: Change) -> Event {
        Event {
            id: Uuid::nil(),
            position: Position::default(),
            lsn: None,
            occurred_at_us: 0,
            committed_at_us: 0,
            xid: 0,
            table,
            content: Content::Change(change),
        }
    }

    fn numbers(rows: Vec<(u32, Row)>) -> Vec<u32> {
        rows.into_iter().map(|(number, _)| number).collect()
    }

    /// Which rows go before the change, how many are left out, and which come after it.
    fn met(table: Arc<Table>, change: Change) -> (Vec<u32>, u64, Vec<u32>) {
        let mut unsent = chunk();
        let first = numbers(unsent.meet(&event(table, change), |_, _| true));
        let left_out = unsent.left_out();
        (first, left_out, numbers(std::iter::from_fn(|| unsent.pop()).collect()))
    }

    #[test]
    fn a_row_is_left_out_only_for_a_change_that_says_everything_of_it() {
        let whole = || row("1", "y", text("live"));
        let toasted = || row("1", "y", Value::Unchanged);
        let insert = Change::Insert { new: whole() };
        assert_eq!(met(keyed(), insert), (vec![], 1, vec![1, 3, 4]));
        let update = Change::Update { old: None, new: whole() };
        assert_eq!(met(keyed(), update), (vec![], 1, vec![1, 3, 4]));
        let delete = Change::Delete { old: OldRow::Key(row("1", "y", Value::Null)) };
        assert_eq!(met(keyed(), delete), (vec![], 1, vec![1, 3, 4]));
        let update = Change::Update { old: None, new: toasted() };
        assert_eq!(met(keyed(), update), (vec![2], 0, vec![1, 3, 4]), "its value was not sent");
        let null = Change::Update { old: None, new: row("1", "y", Value::Null) };
        assert_eq!(met(keyed(), null), (vec![], 1, vec![1, 3, 4]), "null is a value");
        let unreadable = crate::event::Unreadable { why: "x".into(), bytes: None };
        let new = row("1", "y", Value::Unreadable(Box::new(unreadable)));
        assert_eq!(met(keyed(), Change::Insert { new }), (vec![2], 0, vec![1, 3, 4]));
        let elsewhere = Change::Insert { new: row("9", "y", text("live")) };
        assert_eq!(met(keyed(), elsewhere), (vec![], 0, vec![1, 2, 3, 4]));
    }

    #[test]
    fn a_key_change_is_about_the_old_row_and_the_new_one() {
        let update = |note: Value| Change::Update {
            old: Some(OldRow::Key(row("1", "x", Value::Null))),
            new: row("3", "x", note),
        };
        assert_eq!(met(keyed(), update(text("live"))), (vec![], 2, vec![2, 3]));
        assert_eq!(met(keyed(), update(Value::Unchanged)), (vec![1, 4], 0, vec![2, 3]));
    }

    #[test]
    fn everything_goes_before_a_change_that_does_not_say_which_row_it_is_about() {
        let all = (vec![1, 2, 3, 4], 0, vec![]);
        let new = row("1", "x", text("live"));
        let of = table(Identity::Columns(vec![0]));
        assert_eq!(met(of, Change::Update { old: None, new: new.clone() }), all);
        let old = OldRow::Key([text("1"), Value::Null, Value::Null].into());
        assert_eq!(met(keyed(), Change::Delete { old: old.clone() }), all);
        assert_eq!(met(keyed(), Change::Update { old: Some(old), new }), all);
        // A column of the key has another name by now.
        let mut renamed = Table::clone(&keyed());
        renamed.columns[1] = Column::new("c", 25, -1);
        let change = Change::Insert { new: row("1", "x", text("live")) };
        assert_eq!(met(Arc::new(renamed), change), all);
    }

    #[test]
    fn nothing_is_sent_of_a_table_that_was_emptied() {
        assert_eq!(met(keyed(), Change::Truncate), (vec![], 4, vec![]));
    }

    #[test]
    fn a_row_is_sent_before_a_change_that_does_not_go_wherever_the_row_does() {
        let whole = || row("1", "y", text("live"));
        let delete = Change::Delete { old: OldRow::Key(row("1", "y", Value::Null)) };
        for change in [Change::Insert { new: whole() }, delete] {
            let mut unsent = chunk();
            let change = event(keyed(), change);
            assert_eq!(numbers(unsent.meet(&change, |number, _| number != 2)), [2]);
            assert_eq!(unsent.left_out(), 0);
        }
        let mut unsent = chunk();
        let truncate = event(keyed(), Change::Truncate);
        assert_eq!(numbers(unsent.meet(&truncate, |number, _| number < 3)), [3, 4]);
        assert_eq!((unsent.pop(), unsent.left_out()), (None, 2));
    }

    #[test]
    fn keys_are_compared_by_the_columns_names_and_are_told_apart() {
        let mut turned = Table::clone(&keyed());
        turned.columns.swap(0, 1);
        let new: Row = [text("x"), text("2"), text("live")].into();
        assert_eq!(met(Arc::new(turned), Change::Insert { new }), (vec![], 1, vec![1, 2, 4]));
        let rows = vec![row("ab", "c", Value::Null), row("a", "bc", Value::Null)];
        let mut unsent = Unsent::new(keyed(), rows);
        let insert = Change::Insert { new: row("a", "bc", Value::Null) };
        unsent.meet(&event(keyed(), insert), |_, _| true);
        assert_eq!(unsent.pop().map(|(number, _)| number), Some(1));
        assert_eq!((unsent.pop(), unsent.left_out()), (None, 1));
    }

    #[test]
    fn what_was_sent_is_not_met_again() {
        let mut unsent = chunk();
        assert_eq!(unsent.pop().map(|(number, _)| number), Some(1));
        let again = Change::Update { old: None, new: row("1", "x", Value::Unchanged) };
        assert_eq!(unsent.meet(&event(keyed(), again), |_, _| true), []);
        let next = Change::Update { old: None, new: row("1", "y", Value::Unchanged) };
        assert_eq!(numbers(unsent.meet(&event(keyed(), next), |_, _| true)), [2]);
        assert_eq!(unsent.pop().map(|(number, _)| number), Some(3));
    }
}
