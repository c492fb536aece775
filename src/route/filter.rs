//! `filter = "…"`: which of the events that a route selects it publishes. Pure.
//!
//! Invariant: an event is dropped only when the filter is certainly false for it. Logic has three
//! values; what is not known of a row (a value that Postgres did not send, one without a text form,
//! one that is hidden in a stored row, a column that is gone) is unknown, and an event for which
//! the whole is unknown passes. A null is known: it equals no value.
//!
//! Numbers are compared by their digits and never as doubles. `filter/parse` reads the expression.

mod decimal;
mod operand;
mod parse;
#[cfg(test)]
mod tests;
mod verify;

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::value::RawValue;

use self::operand::{Operand, TextOrder};
use self::verify::Test;
use crate::error::Result;
use crate::event::hidden::Hidden;
use crate::event::{Change, Content, Event, OldRow, OutboxRow, Row, Table, Value};

/// An expression, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    text: String,
    /// What it looks at; the expression has indexes into it.
    names: Vec<Name>,
    root: Expression,
}

/// Something that an expression looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    /// A bare word: `op`, a column, or a field of the outbox.
    Word(String),
    /// In double quotes: a column.
    Quoted(String),
    /// `headers.name`
    Header(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Expression<Constant = Literal> {
    Or(Vec<Self>),
    And(Vec<Self>),
    Not(Box<Self>),
    /// A boolean by itself.
    IsTrue(usize),
    IsNull(usize),
    In(usize, Vec<Constant>),
    Compare(usize, Comparison, Constant),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A value in an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Literal {
    Text(String),
    /// As it is written.
    Number(String),
    Bool(bool),
}

/// A header that has a field of its own in an outbox row.
const TRACEPARENT: &str = "traceparent";

/// A filter for the events of one table, or of the outbox.
pub(super) struct Bound {
    /// With what its constants are for their sources.
    root: Expression<Operand>,
    /// Of the names, in their order.
    sources: Vec<Source>,
}

/// Where a value comes from.
enum Source {
    Op,
    AggregateType,
    AggregateId,
    EventType,
    Header(String),
    /// `headers.traceparent`
    Traceparent,
    Column(usize, TextOrder),
    /// A column that the table does not have, or whose value is hidden.
    Unknown,
}

/// A value of an event.
enum Found<'a> {
    Unknown,
    Null,
    Text(Cow<'a, str>),
}

/// What an event shows of itself.
#[derive(Clone, Copy)]
enum View<'a> {
    Outbox(&'a OutboxRow, &'a BTreeMap<String, &'a RawValue>),
    /// A whole row.
    Row(&'a Row),
    /// Only what the replica identity sends; the rest is null there.
    Identity(&'a Row),
    Nothing,
}

impl Filter {
    /// The columns that it names.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.names.iter().filter_map(|name| match name {
            Name::Word(word) if word == "op" => None,
            Name::Word(column) | Name::Quoted(column) => Some(column.as_str()),
            Name::Header(_) => None,
        })
    }

    /// For the events of a table, of which these columns are hidden, or for the outbox.
    pub(super) fn bind(&self, table: Option<&Table>, hidden: &Hidden) -> Bound {
        let column = |name: &str| {
            let table = table?;
            let index = table.column(name)?;
            let is_shown = hidden.of(index).is_none();
            is_shown.then(|| Source::Column(index, TextOrder::of(&table.columns[index])))
        };
        let source = |name: &Name| match name {
            Name::Word(word) if word == "op" => Source::Op,
            Name::Word(name) if table.is_none() => match name.as_str() {
                "aggregate_type" => Source::AggregateType,
                "aggregate_id" => Source::AggregateId,
                "event_type" => Source::EventType,
                _ => Source::Unknown,
            },
            Name::Word(name) | Name::Quoted(name) => column(name).unwrap_or(Source::Unknown),
            Name::Header(name) if name == TRACEPARENT => Source::Traceparent,
            Name::Header(name) => Source::Header(name.clone()),
        };
        let sources: Vec<Source> = self.names.iter().map(source).collect();
        let order = |name: usize| match &sources[name] {
            Source::Column(_, order) => *order,
            _ => TextOrder::Bytes,
        };
        Bound { root: self.root.bind(&|name, literal| Operand::of(order(name), literal)), sources }
    }
}

impl Expression {
    /// Calls `each` with all names and how they are tested, but not whether they are null.
    fn each<'l>(&'l self, each: &mut impl FnMut(usize, Test<'l>) -> Result<()>) -> Result<()> {
        self.each_within(false, each)
    }

    fn each_within<'l>(
        &'l self,
        negated: bool,
        each: &mut impl FnMut(usize, Test<'l>) -> Result<()>,
    ) -> Result<()> {
        let with = |comparison, literal| Test::With { comparison, literal, negated };
        match self {
            Expression::Or(parts) | Expression::And(parts) => {
                parts.iter().try_for_each(|part| part.each_within(negated, each))
            }
            Expression::Not(part) => part.each_within(!negated, each),
            Expression::IsTrue(name) => each(*name, Test::IsTrue),
            Expression::IsNull(_) => Ok(()),
            Expression::In(name, list) => {
                list.iter().try_for_each(|one| each(*name, with(Comparison::Equal, one)))
            }
            Expression::Compare(name, comparison, literal) => {
                each(*name, with(*comparison, literal))
            }
        }
    }

    /// The same with `wanted` in the places of the literals, by the names they stand beside.
    fn bind(&self, wanted: &impl Fn(usize, &Literal) -> Operand) -> Expression<Operand> {
        let all = |parts: &[Self]| parts.iter().map(|part| part.bind(wanted)).collect();
        match self {
            Expression::Or(parts) => Expression::Or(all(parts)),
            Expression::And(parts) => Expression::And(all(parts)),
            Expression::Not(part) => Expression::Not(Box::new(part.bind(wanted))),
            Expression::IsTrue(name) => Expression::IsTrue(*name),
            Expression::IsNull(name) => Expression::IsNull(*name),
            Expression::In(name, list) => {
                Expression::In(*name, list.iter().map(|one| wanted(*name, one)).collect())
            }
            Expression::Compare(name, comparison, literal) => {
                Expression::Compare(*name, *comparison, wanted(*name, literal))
            }
        }
    }
}

impl Bound {
    /// Whether the event is published. An update also passes if the row was published before it, as
    /// far as the whole old row tells: who has the row must learn that it has left.
    pub(super) fn passes(&self, event: &Event) -> bool {
        let judge = |view| self.judge(&self.root, event, view);
        let change = match &event.content {
            Content::Outbox(row) => {
                // What is not an object makes no message either.
                let headers = row.headers.as_deref();
                let headers = headers.and_then(|json| serde_json::from_slice(json).ok());
                return judge(View::Outbox(row, &headers.unwrap_or_default())) != Some(false);
            }
            Content::Change(change) => change,
        };
        let passes = match change {
            Change::Insert { new } | Change::Read { new, .. } | Change::Update { new, .. } => {
                judge(View::Row(new))
            }
            Change::Delete { old: OldRow::Full(old) } => judge(View::Row(old)),
            Change::Delete { old: OldRow::Key(old) } => judge(View::Identity(old)),
            Change::Truncate => judge(View::Nothing),
        };
        let passed = match change {
            Change::Update { old: Some(OldRow::Full(old)), .. } => judge(View::Row(old)),
            _ => None,
        };
        passes != Some(false) || passed == Some(true)
    }

    /// `None`: unknown.
    fn judge(
        &self,
        expression: &Expression<Operand>,
        event: &Event,
        view: View<'_>,
    ) -> Option<bool> {
        let found = |name: &usize| self.sources[*name].find(event, view);
        match expression {
            Expression::Or(parts) => {
                let mut any = Some(false);
                for part in parts {
                    match self.judge(part, event, view) {
                        Some(true) => return Some(true),
                        None => any = None,
                        Some(false) => {}
                    }
                }
                any
            }
            Expression::And(parts) => {
                let mut all = Some(true);
                for part in parts {
                    match self.judge(part, event, view) {
                        Some(false) => return Some(false),
                        None => all = None,
                        Some(true) => {}
                    }
                }
                all
            }
            Expression::Not(part) => self.judge(part, event, view).map(|is| !is),
            Expression::IsTrue(name) => {
                compare(&found(name), Comparison::Equal, &Operand::Bool(true))
            }
            Expression::IsNull(name) => match found(name) {
                Found::Unknown => None,
                Found::Null => Some(true),
                Found::Text(_) => Some(false),
            },
            Expression::In(name, list) => {
                let value = found(name);
                let mut any = Some(false);
                for literal in list {
                    match compare(&value, Comparison::Equal, literal) {
                        Some(true) => return Some(true),
                        None => any = None,
                        Some(false) => {}
                    }
                }
                any
            }
            Expression::Compare(name, comparison, literal) => {
                compare(&found(name), *comparison, literal)
            }
        }
    }
}

impl Source {
    fn find<'a>(&self, event: &'a Event, view: View<'a>) -> Found<'a> {
        let text = |text: &'a str| Found::Text(Cow::Borrowed(text));
        match (self, view) {
            (Source::Op, _) => text(event.op().as_str()),
            (Source::AggregateType, View::Outbox(row, _)) => text(&row.aggregate_type),
            (Source::AggregateId, View::Outbox(row, _)) => text(&row.aggregate_id),
            (Source::EventType, View::Outbox(row, _)) => text(&row.event_type),
            (Source::Header(name), View::Outbox(_, headers)) => header(headers.get(name)),
            (Source::Traceparent, View::Outbox(row, headers)) => match &row.traceparent {
                Some(traceparent) => text(traceparent),
                None => header(headers.get(TRACEPARENT)),
            },
            (Source::Column(index, _), View::Row(row)) => of_row(&row[*index]),
            (Source::Column(index, _), View::Identity(row)) => match of_row(&row[*index]) {
                Found::Null => Found::Unknown,
                found => found,
            },
            (
                Source::AggregateType
                | Source::AggregateId
                | Source::EventType
                | Source::Header(_)
                | Source::Traceparent
                | Source::Column(..)
                | Source::Unknown,
                _,
            ) => Found::Unknown,
        }
    }
}

fn of_row(value: &Value) -> Found<'_> {
    match value {
        Value::Null => Found::Null,
        Value::Text(text) => {
            std::str::from_utf8(text).map_or(Found::Unknown, |text| Found::Text(text.into()))
        }
        Value::Unchanged | Value::Unreadable(_) => Found::Unknown,
    }
}

/// A header that is not there is null.
fn header<'a>(value: Option<&&'a RawValue>) -> Found<'a> {
    let Some(value) = value else { return Found::Null };
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'n') => Found::Null,
        Some(b'"') => match serde_json::from_str::<String>(text) {
            Ok(text) => Found::Text(text.into()),
            Err(_) => Found::Unknown,
        },
        _ => Found::Text(text.into()),
    }
}

/// Whether it is one, as Postgres writes them.
pub(super) fn is_number(text: &str) -> bool {
    decimal::compare(text, "0").is_some()
}

/// Whether both are numbers, and the same.
pub fn same_number(one: &str, other: &str) -> bool {
    decimal::compare(one, other) == Some(Ordering::Equal)
}

fn compare(value: &Found<'_>, comparison: Comparison, wanted: &Operand) -> Option<bool> {
    let order = match value {
        Found::Unknown => return None,
        // It equals no value, and is neither before nor after one.
        Found::Null => return Some(comparison == Comparison::NotEqual),
        Found::Text(text) => wanted.followed_by(text)?,
    };
    Some(match comparison {
        Comparison::Equal => order == Ordering::Equal,
        Comparison::NotEqual => order != Ordering::Equal,
        Comparison::Less => order == Ordering::Less,
        Comparison::LessOrEqual => order != Ordering::Greater,
        Comparison::Greater => order == Ordering::Greater,
        Comparison::GreaterOrEqual => order != Ordering::Less,
    })
}
