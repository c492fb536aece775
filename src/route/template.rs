//! Texts with fields, such as `{aggregate_type}.{event_type}`: parsed, and written for a message.
//! `Rule::known_keys` expands the same fields without an event, for the audit. Pure.

use super::partition::{self, Partitions};
use crate::error::{Error, Result};
use crate::event::{Content, Event};

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
}

pub(super) const OUTBOX_FIELDS: &[(&str, Field)] = &[
    ("aggregate_type", Field::AggregateType),
    ("aggregate_id", Field::AggregateId),
    ("event_type", Field::EventType),
    ("key", Field::Key),
    ("record_key", Field::RecordKey),
];
pub(super) const TABLE_FIELDS: &[(&str, Field)] = &[
    ("schema", Field::Schema),
    ("table", Field::Table),
    ("op", Field::Op),
    ("key", Field::Key),
    ("record_key", Field::RecordKey),
];

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
    pub(super) fn parse(setting: &str, text: &str, fields: &[(&str, Field)]) -> Result<Self> {
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
            let field = fields.iter().find(|(known, _)| *known == name).ok_or_else(|| {
                let known: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
                let known = known.join(", ");
                wrong(&format!("field {name:?} is not known here, allowed are: {known}"))
            })?;
            if !plain.is_empty() {
                segments.push(Segment::Text(std::mem::take(&mut plain)));
            }
            segments.push(Segment::Field(field.1));
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            segments.push(Segment::Text(plain));
        }
        Ok(Self(segments))
    }

    /// Bytes that every text of it has.
    pub(super) fn least_len(&self) -> usize {
        let len = |segment: &Segment| match segment {
            Segment::Text(text) => text.len(),
            Segment::Field(_) | Segment::Partition(_) => 0,
        };
        self.0.iter().map(len).sum()
    }

    /// Whether the field is in it.
    pub(super) fn has(&self, wanted: Field) -> bool {
        self.0.iter().any(|part| matches!(part, Segment::Field(field) if *field == wanted))
    }

    pub(super) fn render(&self, event: &Event, facts: Facts<'_>, out: &mut String) {
        for segment in &self.0 {
            match segment {
                Segment::Text(text) => out.push_str(text),
                Segment::Field(field) => out.push_str(field.of(event, facts)),
                Segment::Partition(names) => out.push_str(partition(names, facts.key)),
            }
        }
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubled_braces_are_braces() {
        let template =
            Template::parse("routing_key", "a{{b}}.{event_type}", OUTBOX_FIELDS).unwrap();
        assert_eq!(template.0.len(), 2);
        assert!(matches!(&template.0[0], Segment::Text(t) if t == "a{b}."));
    }
}
