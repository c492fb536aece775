//! What the messages of a route look like, and what is decided of it once for a table. Pure.

use std::fmt::Write as _;
use std::sync::Arc;

use crate::column::debezium::{ValueForms, Writer};
use crate::column::write_string;
use crate::event::{Column, Op, Table};

/// The format of a route's messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Format {
    /// The payload of an outbox row and nothing else; a captured table has no payload.
    #[default]
    Raw,
    /// One JSON object that tells what happened, to what, and where in the stream.
    Watership,
    /// What Debezium's PostgreSQL connector and its outbox event router make, in JSON and without
    /// schemas.
    Debezium(Arc<Debezium>),
    /// CloudEvents 1.0.
    CloudEvents(Arc<CloudEvents>),
}

/// How messages look as CloudEvents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloudEvents {
    /// One JSON object with all attributes, instead of headers beside the data.
    pub structured: bool,
    /// Template of the attribute `source`, a URI reference; if empty, made of the names of relay
    /// and table.
    pub source: String,
    /// Template of the attribute `type`; if empty, the event type, or table and operation.
    pub kind: String,
    /// Stands before the event type, or before table and operation, in the attribute `type`.
    pub type_prefix: String,
    /// The attribute `dataschema`, a URI; empty for none.
    pub dataschema: String,
}

impl Format {
    /// The word in the configuration.
    pub fn as_str(&self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Watership => "watership",
            Format::Debezium(_) => "debezium",
            Format::CloudEvents(_) => "cloudevents",
        }
    }

    /// Least size of a body as [`crate::event::Event::least_body`] has it, for one byte of it here:
    /// Debezium's has one byte for eight digits of a bit string.
    pub fn shrinks_at_most(&self) -> usize {
        match self {
            Format::Raw | Format::Watership | Format::CloudEvents(_) => 1,
            Format::Debezium(_) => 8,
        }
    }
}

/// How messages look like Debezium's. Beside each is the name of Debezium's property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Debezium {
    /// How column values are written.
    pub values: ValueForms,
    /// `topic.prefix`: `source.name`.
    pub topic_prefix: String,
    /// `source.version`: there it is the version of Debezium.
    pub version: String,
    /// What the times of a change event are; those in its `source` are always of the commit.
    pub event_time: EventTime,
    /// `tombstones.on.delete`: a message without a body follows each delete.
    pub tombstones: bool,
    /// What a message without a value has for its body. Debezium Server's RabbitMQ sink sends the
    /// word `default`.
    pub tombstone_body: TombstoneBody,
    /// `skipped.operations`.
    pub skipped: Vec<Op>,
    /// What is made of outbox rows.
    pub router: EventRouter,
}

/// `ts_ms`, `ts_us` and `ts_ns` of a change event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventTime {
    /// When it was committed: each attempt has the same bytes.
    Commit,
    /// When its message was made, as Debezium has it: attempts differ.
    Processing,
}

/// The body of a tombstone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TombstoneBody {
    /// Nothing.
    Empty,
    /// The word `default`.
    Default,
}

impl TombstoneBody {
    /// The bytes.
    pub fn bytes(self) -> &'static [u8] {
        match self {
            TombstoneBody::Empty => b"",
            TombstoneBody::Default => b"default",
        }
    }
}

/// How outbox rows become what the outbox event router makes of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventRouter {
    /// `table.fields.additional.placement`.
    pub placements: Vec<Placement>,
    /// `table.field.additional.missing` is `ignore`.
    pub ignore_missing: bool,
    /// `table.expand.json.payload`: null members and empty arrays are left out unless these say
    /// otherwise.
    pub expand: bool,
    /// `table.json.payload.null.behavior` is `optional_bytes`: null members stay.
    pub keep_nulls: bool,
    /// `table.json.payload.empty.array.behavior` is `optional_string`: empty arrays stay.
    pub keep_empty_arrays: bool,
    /// `route.tombstone.on.empty.payload`.
    pub tombstone_on_empty: bool,
    /// The payload is a JSON string with JSON in it, as Debezium's own JSON converter makes it.
    pub payload_as_string: bool,
    /// The header `id` has quotes around it, as Debezium Server's RabbitMQ sink sends it.
    pub quoted_id: bool,
}

/// An additional field of an outbox message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The column, or a member of the column `headers`.
    pub field: String,
    /// Where it goes: into the body beside the payload, or into a header.
    pub in_body: bool,
    /// Its name there.
    pub name: String,
}

impl EventRouter {
    /// Some field goes into the body, so that the payload is a member of it.
    pub fn has_envelope(&self) -> bool {
        self.placements.iter().any(|placement| placement.in_body)
    }
}

/// What is the same for all changes of a table in Debezium's format.
#[derive(Debug)]
pub struct DebeziumTable {
    /// `{"version":…,"connector":…,…,"table":…` as JSON, without the closing brace.
    pub source_json: Vec<u8>,
    /// How each column is written; columns without one are left out.
    pub writers: Vec<Option<Writer>>,
    /// Changes that have no message.
    pub skipped: Vec<Op>,
}

impl DebeziumTable {
    pub(super) fn new(debezium: &Debezium, table: &Table) -> Self {
        let mut source_json = Vec::new();
        let members = [
            ("version", &*debezium.version),
            ("connector", "postgresql"),
            ("name", &*debezium.topic_prefix),
            ("db", &*table.database),
            ("schema", &*table.schema),
            ("table", &*table.name),
        ];
        for (index, (name, value)) in members.into_iter().enumerate() {
            source_json.push(if index == 0 { b'{' } else { b',' });
            write_string(&mut source_json, name);
            source_json.push(b':');
            write_string(&mut source_json, value);
        }
        let values = &debezium.values;
        let writer = |column: &Column| match column.resolved {
            Some(resolved) => Writer::of_user_type(resolved, values),
            None => Writer::of(column.type_oid, column.type_modifier, values),
        };
        let writers = table.columns.iter().map(writer).collect();
        Self { source_json, writers, skipped: debezium.skipped.clone() }
    }
}

/// The routing key that is Debezium's topic: a template of the route's.
pub fn topic_template(topic_prefix: &str) -> String {
    let mut template = String::new();
    for char in topic_prefix.chars() {
        let doubled = if matches!(char, '{' | '}') { 2 } else { 1 };
        template.extend(std::iter::repeat_n(char, doubled));
    }
    let _ = write!(template, ".{{schema}}.{{table}}");
    template
}
