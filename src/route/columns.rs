//! What a route makes of the rows of one table: which columns are sent, under which names, and what
//! stands in the place of hidden values. Decided once for each description of the table. Pure.
//!
//! Invariant: **a hidden value leaves this file only as what stands in its place.** Formats,
//! routing keys, headers, parked rows and their errors are made of [`Projection::sent`] or
//! [`Projection::kept`], never of the row as it came. Only the hash of a lane is taken from that,
//! and keyed (`route/lanes`).
//!
//! An old row of which only the identity came has nulls where nothing was sent; nothing is put in
//! their place, because a null there says nothing about the value.

use std::sync::Arc;

use bytes::Bytes;
use ring::hmac::Key;
use uuid::Uuid;

use super::database_secret::{DatabaseSecret, hash, salted};
use super::rules::{ColumnRules, Constant, Map};
use crate::column::oid;
use crate::event::hidden::{Hidden, Hide};
use crate::event::{
    Change, Column, Content, Event, Identity, OldRow, Row, Table, Unreadable, Value, id,
};

/// Why an event with a hashed value that has no text cannot be published.
const UNHASHED: &str = "the column is hashed, and its value has no text form";

/// Why an event cannot be published with a default that its column cannot have: the column has
/// another type than at the start, or had it when the event was written.
const MISFIT: &str = "map.default of the column is not a value of its type";

/// What stands in the place of a value.
#[derive(Clone)]
pub(super) enum Stand {
    /// Nothing: the column is left out.
    Nothing,
    /// This text.
    Mask(Column, Bytes),
    /// The hash with this key.
    Hash(Arc<Key>),
    /// What is there already: a row that was stored.
    Stored,
}

/// How a column is hidden, and what stands in its place.
pub(super) type Hiding = Option<(Hide, Stand)>;

/// A member of the JSON objects that rows become.
struct Field {
    /// The column of the table; absent for a constant.
    from: Option<usize>,
    /// What stands in its place; absent: the value itself.
    stand: Option<Stand>,
    /// Sent instead of null, and as the value of a constant.
    default: Option<Value>,
}

/// What is made of a table's rows.
pub(super) struct Projection {
    /// The table as it is sent.
    pub(super) table: Arc<Table>,
    /// Indexes into it of the columns that make the route's key, as far as they are sent.
    pub(super) key: Vec<usize>,
    fields: Box<[Field]>,
    /// What is hidden in a row that is stored.
    pub(super) hidden: Hidden,
    stands: Box<[(usize, Stand)]>,
    /// Keys the ids of events: their identity is hidden.
    ids: Option<Arc<DatabaseSecret>>,
}

/// What a [`Projection`] is decided by.
pub(super) struct Deciding<'a> {
    pub(super) table: &'a Arc<Table>,
    /// Indexes of the columns that make the route's key.
    pub(super) key: &'a [usize],
    pub(super) hidings: Vec<Hiding>,
    pub(super) map: &'a Map,
    /// Version of the rules.
    pub(super) version: String,
    /// Absent for rows that were stored, which keep the ids that they have.
    pub(super) secret: Option<&'a Arc<DatabaseSecret>>,
}

/// How the columns of `table` are hidden by the rules of a route that is agreed with some of them,
/// and by what `hidden` says of a stored row: whichever hides more.
pub(super) fn hidings(
    rules: &ColumnRules,
    table: &Table,
    is_agreed: impl Fn(&str) -> bool,
    secret: &DatabaseSecret,
    hidden: &Hidden,
) -> Vec<Hiding> {
    let key = match &rules.salt {
        Some(salt) => salted(salt.expose()),
        None => secret.values(),
    };
    let key = Arc::new(key);
    let hide = |(index, column): (usize, &Column)| {
        let name = &column.name;
        let new = (!rules.is_empty() && !is_agreed(name)).then_some(Hide::Exclude);
        let (rule, stored) = (rules.hide(name).or(new), hidden.of(index));
        let stand = match rule.max(stored)? {
            Hide::Exclude => Stand::Nothing,
            // An equal mask is the rule's own, with its type; a hash cannot be made again.
            _ if stored > rule || (stored == rule && stored == Some(Hide::Hash)) => Stand::Stored,
            Hide::Mask => {
                let (column, text) = rules.mask(name)?.as_column(name);
                Stand::Mask(column, text)
            }
            Hide::Hash => Stand::Hash(key.clone()),
        };
        Some((rule.max(stored)?, stand))
    };
    table.columns.iter().enumerate().map(hide).collect()
}

/// Whichever hides more, column by column.
pub(super) fn union(mut one: Vec<Hiding>, other: Vec<Hiding>) -> Vec<Hiding> {
    let level = |hiding: &Hiding| hiding.as_ref().map(|(hide, _)| *hide);
    for (mine, theirs) in one.iter_mut().zip(other) {
        if level(&theirs) > level(mine) {
            *mine = theirs;
        }
    }
    one
}

impl Constant {
    /// As a column of this name, and its text form.
    fn as_column(&self, name: &str) -> (Column, Bytes) {
        let type_oid = match self {
            Constant::Text(_) => oid::TEXT,
            Constant::Int(_) => oid::INT8,
            Constant::Bool(_) => oid::BOOL,
        };
        (Column::new(name, type_oid, -1), self.text().into())
    }
}

impl Projection {
    /// Decides.
    pub(super) fn new(deciding: Deciding<'_>) -> Self {
        let Deciding { table, key, hidings, map, version, secret } = deciding;
        let (mut fields, mut columns) = (Vec::new(), Vec::new());
        for (index, (column, hiding)) in table.columns.iter().zip(&hidings).enumerate() {
            let sent_as = map.name(&column.name);
            // What the map makes stands before a column that came later under the same name.
            let is_taken = sent_as == column.name && map.makes().any(|made| made == sent_as);
            let stand = match hiding {
                Some((Hide::Exclude, _)) => continue,
                _ if is_taken || map.drop.contains(&column.name) => continue,
                Some((_, stand)) => Some(stand.clone()),
                None => None,
            };
            columns.push(match &stand {
                None => renamed(column, sent_as),
                Some(Stand::Mask(column, _)) => renamed(column, sent_as),
                Some(Stand::Nothing | Stand::Hash(_) | Stand::Stored) => {
                    Column::new(sent_as, oid::TEXT, -1)
                }
            });
            let default = map.if_null(&column.name).map(|constant| default(column, constant));
            fields.push(Field { from: Some(index), stand, default });
        }
        for (name, constant) in &map.set {
            let (column, text) = constant.as_column(name);
            columns.push(column);
            fields.push(Field { from: None, stand: None, default: Some(Value::Text(text)) });
        }
        let place = |index: &usize| fields.iter().position(|field| field.from == Some(*index));
        let places = |indexes: &[usize]| indexes.iter().filter_map(place).collect::<Vec<usize>>();
        let is_hidden = |index: &usize| hidings[*index].is_some();
        let hides = hidings.iter().any(Option::is_some);
        // With all columns in its identity, whether the id is keyed must not hang on a new one.
        let whole = !matches!(table.identity, Identity::Columns(_));
        // The id of a row that a backfill read is made of its key.
        let mut named = id::columns(table);
        named.extend(&table.key);
        let ids = secret.filter(|_| hides && (whole || named.iter().any(is_hidden)));
        Self {
            key: places(key),
            table: Arc::new(Table {
                key: places(&table.key),
                identity: match &table.identity {
                    Identity::Columns(columns) => Identity::Columns(places(columns)),
                    Identity::Full => Identity::Full,
                    Identity::Nothing => Identity::Nothing,
                },
                columns,
                ..Table::clone(table)
            }),
            fields: fields.into(),
            hidden: Hidden {
                rules: version,
                columns: (0..)
                    .zip(&hidings)
                    .filter_map(|(index, hiding)| Some((index, hiding.as_ref()?.0)))
                    .collect(),
            },
            stands: (0..)
                .zip(hidings)
                .filter_map(|(index, hiding)| Some((index, hiding?.1)))
                .collect(),
            ids: ids.cloned(),
        }
    }

    /// The event's id, as it may be known.
    pub(super) fn id(&self, id: Uuid) -> Uuid {
        self.ids.as_ref().map_or(id, |secret| secret.id(id))
    }

    /// The event as it is sent.
    pub(super) fn sent(&self, event: &Event) -> Event {
        self.made(event, self.table.clone(), |row, is_identity| {
            self.fields.iter().map(|field| field.value(row, is_identity)).collect()
        })
    }

    /// The event as it may be stored: all columns in their places, and nothing that is hidden.
    pub(super) fn kept(&self, event: &Event) -> Event {
        self.made(event, event.table.clone(), |row, is_identity| {
            let mut row = row.clone();
            for (index, stand) in &self.stands {
                row[*index] = stand.value(&row[*index], is_identity);
            }
            row
        })
    }

    fn made(&self, event: &Event, table: Arc<Table>, row: impl Fn(&Row, bool) -> Row) -> Event {
        let Content::Change(change) = &event.content else {
            unreachable!("column rules are for captured tables")
        };
        let old = |old: &OldRow| match old {
            OldRow::Key(old) => OldRow::Key(row(old, true)),
            OldRow::Full(old) => OldRow::Full(row(old, false)),
        };
        let change = match change {
            Change::Insert { new } => Change::Insert { new: row(new, false) },
            Change::Read { new, run } => Change::Read { new: row(new, false), run: *run },
            Change::Update { old: before, new } => {
                Change::Update { old: before.as_ref().map(old), new: row(new, false) }
            }
            Change::Delete { old: before } => Change::Delete { old: old(before) },
            Change::Truncate => Change::Truncate,
        };
        Event {
            id: self.id(event.id),
            position: event.position,
            lsn: event.lsn,
            occurred_at_us: event.occurred_at_us,
            committed_at_us: event.committed_at_us,
            xid: event.xid,
            table,
            content: Content::Change(change),
        }
    }
}

impl Field {
    fn value(&self, row: &Row, is_identity: bool) -> Value {
        let value = self.from.map_or(&Value::Null, |from| &row[from]);
        let value = match &self.stand {
            None => value.clone(),
            Some(stand) => stand.value(value, is_identity),
        };
        match (&self.default, value) {
            (Some(default), Value::Null) if !is_identity => default.clone(),
            (_, value) => value,
        }
    }
}

impl Stand {
    fn value(&self, value: &Value, is_identity: bool) -> Value {
        match (self, value) {
            (_, Value::Null) if is_identity => Value::Null,
            (Stand::Nothing, _) => Value::Null,
            (Stand::Mask(_, text), _) => Value::Text(text.clone()),
            (Stand::Stored, value) => value.clone(),
            (Stand::Hash(key), Value::Text(text)) => Value::Text(hash(key, text).into()),
            (Stand::Hash(_), Value::Null) => Value::Null,
            (Stand::Hash(_), Value::Unchanged) => Value::Unchanged,
            (Stand::Hash(_), Value::Unreadable(_)) => {
                Value::Unreadable(Box::new(Unreadable { why: UNHASHED.to_owned(), bytes: None }))
            }
        }
    }
}

/// What is sent where the column is null: never what would make the body invalid.
fn default(column: &Column, constant: &Constant) -> Value {
    let text = constant.text();
    match column.shape.takes(text.as_bytes()) {
        true => Value::Text(text.into()),
        false => Value::Unreadable(Box::new(Unreadable { why: MISFIT.to_owned(), bytes: None })),
    }
}

fn renamed(column: &Column, name: &str) -> Column {
    let Column { type_oid, type_modifier, shape, resolved, .. } = column;
    let (shape, resolved) = (*shape, *resolved);
    Column { shape, resolved, ..Column::new(name, *type_oid, *type_modifier) }
}

#[cfg(test)]
mod tests;
