//! Texts with fields, such as `{aggregate_type}.{event_type}`: parsed, and written for a message.
//! `Rule::known_keys` expands the same fields without an event, for the audit. Pure.
//!
//! Invariant: a column is shown as it is sent. What stands in the place of a hidden value is all
//! that a template sees, and no error shows a value.

use super::Select;
use super::partition::{self, Partitions};
use super::plan::TablePlan;
use crate::error::{Error, Result};
use crate::event::{Content, Event, OutboxRow, Row, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    AggregateType,
    AggregateId,
    EventType,
    Schema,
    Table,
    Op,
    /// The text of `ws-key`.
    Key,
    /// The key of Debezium's record.
    RecordKey,
    /// The text form of a column, by its place among the columns that the route's templates name.
    Column(usize),
}

/// What a template can show of a message beside its event.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The text of its key, as in `ws-key`.
    pub key: &'a str,
    /// The key of Debezium's record; empty in other formats.
    pub record_key: &'a str,
    /// The operation, as in `ws-op`.
    pub op: &'a str,
    /// The row of a captured table, as it is sent.
    pub row: Option<ShownRow<'a>>,
    /// Of an event of the outbox: the columns that the route's templates name.
    pub columns: &'a [String],
}

/// The row that a message is about.
#[derive(Debug, Clone, Copy)]
pub struct ShownRow<'a> {
    /// Of what is sent.
    pub table: &'a TablePlan,
    /// Absent for a truncate.
    pub row: Option<&'a Row>,
    /// Only the columns of the replica identity came.
    pub is_only_identity: bool,
}

/// Stands before the name of a column.
const COLUMN: &str = "column.";
const OUTBOX_FIELDS: &[(&str, Field)] = &[
    ("aggregate_type", Field::AggregateType),
    ("aggregate_id", Field::AggregateId),
    ("event_type", Field::EventType),
    ("key", Field::Key),
    ("record_key", Field::RecordKey),
];
const TABLE_FIELDS: &[(&str, Field)] = &[
    ("schema", Field::Schema),
    ("table", Field::Table),
    ("op", Field::Op),
    ("key", Field::Key),
    ("record_key", Field::RecordKey),
];

/// The fields that the templates of a route may have.
#[derive(Debug)]
pub(super) struct Fields {
    known: &'static [(&'static str, Field)],
    /// The columns that were asked for, by the names that they have in the table.
    pub(super) columns: Vec<String>,
}

impl Fields {
    pub(super) fn of(select: &Select) -> Self {
        let known = match select {
            Select::Outbox { .. } => OUTBOX_FIELDS,
            Select::Table { .. } => TABLE_FIELDS,
        };
        Self { known, columns: Vec::new() }
    }

    fn find(&mut self, name: &str) -> Option<Field> {
        let column = name.strip_prefix(COLUMN).filter(|column| !column.is_empty());
        let Some(column) = column else {
            return self.known.iter().find(|(known, _)| *known == name).map(|(_, field)| *field);
        };
        let known = self.columns.iter().position(|asked| asked == column);
        Some(Field::Column(known.unwrap_or_else(|| {
            self.columns.push(column.to_owned());
            self.columns.len() - 1
        })))
    }

    fn names(&self) -> String {
        let mut names: Vec<&str> = self.known.iter().map(|(name, _)| *name).collect();
        names.push("column.NAME");
        names.join(", ")
    }
}

#[derive(Debug)]
pub(super) enum Segment {
    Text(String),
    Field(Field),
    /// The name of the key's partition, out of all names.
    Partition(Box<[Box<str>]>),
}

/// Text with fields, parsed.
#[derive(Debug, Default)]
pub(super) struct Template(pub(super) Vec<Segment>);

impl Template {
    /// That of a route with partitions: the name of the queue.
    pub(super) fn of_partitions(partitions: &Partitions) -> Self {
        let names = partitions.names().into_iter().map(String::into_boxed_str);
        Self(vec![Segment::Partition(names.collect())])
    }

    /// `setting` is the key of the configuration that it is the value of.
    pub(super) fn parse(setting: &str, text: &str, fields: &mut Fields) -> Result<Self> {
        let wrong = |what: &str| Error::config(format!("{setting} {text:?}: {what}"));
        let mut segments = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                plain.push_str(brace);
                rest = after;
                continue;
            }
            if brace == "}" {
                return Err(wrong("a \"}\" without \"{\"; write \"}}\" for a brace"));
            }
            let (name, after) =
                rest.split_once('}').ok_or_else(|| wrong("a \"{\" without \"}\""))?;
            let field = fields.find(name).ok_or_else(|| {
                let known = fields.names();
                wrong(&format!("field {name:?} is not known here, allowed are: {known}"))
            })?;
            if !plain.is_empty() {
                segments.push(Segment::Text(std::mem::take(&mut plain)));
            }
            segments.push(Segment::Field(field));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            segments.push(Segment::Text(plain));
        }
        Ok(Self(segments))
    }

    /// The texts between its fields.
    pub(super) fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|segment| match segment {
            Segment::Text(text) => Some(text.as_str()),
            Segment::Field(_) | Segment::Partition(_) => None,
        })
    }

    /// Bytes that every text of it has.
    pub(super) fn least_len(&self) -> usize {
        self.texts().map(str::len).sum()
    }

    /// Whether the field is in it.
    pub(super) fn has(&self, wanted: Field) -> bool {
        self.0.iter().any(|part| matches!(part, Segment::Field(field) if *field == wanted))
    }

    /// Appends the text for a message.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when a column that it names has no text in this row.
    pub(super) fn render(&self, event: &Event, facts: Facts<'_>, out: &mut String) -> Result<()> {
        self.each_piece(event, facts, |piece, _| out.push_str(piece))
    }

    /// The pieces of the text for a message, in order, and whether each is the value of a field.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub(super) fn each_piece(
        &self,
        event: &Event,
        facts: Facts<'_>,
        mut each: impl FnMut(&str, bool),
    ) -> Result<()> {
        for segment in &self.0 {
            match segment {
                Segment::Text(text) => each(text, false),
                Segment::Field(Field::Column(index)) => each(column(event, facts, *index)?, true),
                Segment::Field(field) => each(field.of(event, facts), true),
                Segment::Partition(names) => each(partition(names, facts.key), true),
            }
        }
        Ok(())
    }
}

/// The name of the key's partition.
pub(super) fn partition<'a>(names: &'a [Box<str>], key: &str) -> &'a str {
    let count = u16::try_from(names.len()).expect("at most PARTITIONS_MAX");
    &names[usize::from(partition::of_key(key, count))]
}

impl Field {
    fn of<'a>(self, event: &'a Event, facts: Facts<'a>) -> &'a str {
        match (self, &event.content) {
            (Field::Schema, _) => &event.table.schema,
            (Field::Table, _) => &event.table.name,
            (Field::Op, _) => facts.op,
            (Field::Key, _) => facts.key,
            (Field::RecordKey, _) => facts.record_key,
            (Field::AggregateType, Content::Outbox(row)) => &row.aggregate_type,
            (Field::AggregateId, Content::Outbox(row)) => &row.aggregate_id,
            (Field::EventType, Content::Outbox(row)) => &row.event_type,
            (Field::AggregateType | Field::AggregateId | Field::EventType, Content::Change(_)) => {
                unreachable!("a table route is parsed with the table fields only")
            }
            (Field::Column(_), _) => unreachable!("columns are shown by `column`"),
        }
    }
}

/// The text of a column that a template names.
fn column<'a>(event: &'a Event, facts: Facts<'a>, index: usize) -> Result<&'a str> {
    const FILTER: &str = "leave such changes out with filter, such as \"op != 'truncate'\"";
    if let Content::Outbox(row) = &event.content {
        return outbox_column(row, &facts.columns[index]);
    }
    let Some(ShownRow { table, row, is_only_identity }) = facts.row else {
        unreachable!("a change of a captured table has its row here")
    };
    let (name, place) = &table.shown[index];
    let wrong = |what: &str| Error::event(format!("column {name:?} {what}"));
    let Some(place) = *place else {
        let text = wrong("is in a template of the route, but the route does not send it");
        return Err(text.hint(
            "`watership schema TABLE` shows what it sends; if the column may be sent, \
             `watership schema accept TABLE`, then retry",
        ));
    };
    let Some(row) = row else {
        return Err(wrong("is in a template of the route, but a truncate has no row").hint(FILTER));
    };
    match &row[place] {
        Value::Text(text) => std::str::from_utf8(text).map_err(|_| wrong("is not UTF-8")),
        Value::Null if is_only_identity => Err(wrong(
            "is in a template of the route, but the replica identity does not carry it",
        )
        .hint("set REPLICA IDENTITY FULL, or leave deletes out with filter: \"op != 'delete'\"")),
        Value::Null => Err(wrong("is in a template of the route, but null in this row")
            .hint("set map.default for it, or leave such rows out with filter")),
        Value::Unchanged => Err(wrong(
            "is in a template of the route, but this change did not touch its large value",
        )
        .hint("Postgres does not send it then: set REPLICA IDENTITY FULL, or name another column")),
        Value::Unreadable(value) => Err(Error::event(format!("column {name:?}: {}", value.why))),
    }
}

fn outbox_column<'a>(row: &'a OutboxRow, name: &str) -> Result<&'a str> {
    let wrong = |what: &str| {
        Error::event(format!("column {name:?} is in a template of the route, but {what}"))
    };
    match row.shown.iter().find(|(shown, _)| **shown == *name) {
        Some((_, Some(text))) => Ok(text),
        Some((_, None)) => Err(wrong("null in this row")
            .hint("let the application fill it, or give the column a default")),
        None => Err(wrong("the event came without it").hint(
            "it was emitted with emit_wal, or parked before the template named the column: leave \
             such events to another route",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubled_braces_are_braces() {
        let mut fields = Fields::of(&Select::Outbox { aggregate_type: "*".into() });
        let template = Template::parse("routing_key", "a{{b}}.{event_type}", &mut fields).unwrap();
        assert_eq!(template.0.len(), 2);
        assert!(matches!(&template.0[0], Segment::Text(t) if t == "a{b}."));
    }
}
