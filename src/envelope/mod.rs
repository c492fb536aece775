//! Event to message: the values of properties, headers and body (their encoding: `message`). Pure.
//!
//! Invariant: a message is a function of the event, its plan and the relay's name, so the same
//! event gives the same bytes on every attempt. Only a route that asks for it has the time at which
//! a message was made. Each format has a file for its bodies; what all
//! formats share (properties, the relay's own headers, the key) is here.

mod cloudevents;
mod contract;
mod debezium;
mod event_router;
mod headers;
mod key;
mod native;
mod raw;

use uuid::Uuid;

use crate::error::Result;
use crate::event::{Change, Content, Event, OutboxPayload, OutboxRow, id};
use crate::message::{Builder, EXCHANGE_HEADER, ExchangeId, Message, Properties};
use crate::route::{
    CloudEvents, Debezium, DebeziumTable, EventTime, Facts, Format, MessageIdRule, Ordering, Plan,
    Route, ShownRow, TablePlan,
};
use cloudevents::Attributes;
use debezium::Record;

use key::{key_columns, key_columns_of, key_row, sent_columns, shown_row};
use key::{write_key_text, write_row_key_text};

pub use crate::message::is_reserved_header;
pub use key::key_text;

const JSON: &str = "application/json";
const BYTES: &str = "application/octet-stream";
/// On a message without a value.
const TOMBSTONE_HEADER: &str = "ws-tombstone";
/// On the messages beyond the first that one event has on one route.
const PART_HEADER: &str = "ws-part";
/// A body above this size, in bytes, does not stay in memory as scratch space.
const SCRATCH_KEPT: usize = 64 * 1024;

/// Turns events into messages.
#[derive(Debug)]
pub struct Envelope {
    app_id: String,
    /// Asked only by a route that wants the time of processing.
    clock: fn() -> i64,
    // Scratch space, kept between events.
    routing_key: String,
    kind: String,
    key: String,
    record_key: String,
    other_key: String,
    header: String,
    body: Vec<u8>,
    message: Vec<u8>,
    /// The last commit time as text: the same for all changes of a transaction.
    committed_at: TimeText,
}

impl Envelope {
    /// `app_id` is the relay's name; `clock` gives microseconds since 1970-01-01 UTC.
    pub fn new(app_id: impl Into<String>, clock: fn() -> i64) -> Self {
        Self {
            app_id: app_id.into(),
            clock,
            routing_key: String::new(),
            kind: String::new(),
            key: String::new(),
            record_key: String::new(),
            other_key: String::new(),
            header: String::new(),
            body: Vec::new(),
            message: Vec::new(),
            committed_at: TimeText::new(),
        }
    }

    /// The event's message number `part` on this route; almost every event has one, number 0.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when something in it cannot be carried by AMQP.
    pub fn message(&mut self, event: &Event, plan: &Plan, part: u16) -> Result<Message> {
        if !plan.route.contracts.is_empty() {
            self.keeps_contract(event, &plan.route.contracts)?;
        }
        let mut message = match &event.content {
            Content::Outbox(row) => self.of_outbox(event, row, plan, part),
            Content::Change(change) => {
                let table = plan.table.as_ref().expect("a captured table has a plan of its own");
                self.of_change(event, change, plan, table, part)
            }
        }?;
        message.in_sequence = plan.route.ordering == Ordering::Pipelined;
        message.part = part;
        message.route_hash = plan.route.hash();
        Ok(message)
    }

    fn of_outbox(
        &mut self,
        event: &Event,
        row: &OutboxRow,
        plan: &Plan,
        part: u16,
    ) -> Result<Message> {
        let route = &*plan.route;
        self.key.clear();
        self.key.push_str(&row.aggregate_type);
        self.key.push('/');
        self.key.push_str(&row.aggregate_id);
        let (key, record_key) = (&*self.key, &*row.aggregate_id);
        let (op, columns) = (event.op().as_str(), route.template_columns());
        let facts = Facts { key, record_key, op, row: None, columns };
        let exchange = route.address(event, facts, &mut self.routing_key)?;
        let id = message_id(event.id, route, part);
        let attributes = match &route.format {
            Format::CloudEvents(options) => {
                let traceparent = row.traceparent.as_deref().unwrap_or_default();
                let (by, about) = ((route, &**options), (id, &*row.event_type));
                Some(Attributes::new(&self.app_id, event, by, facts, about, traceparent)?)
            }
            Format::Raw | Format::Watership | Format::Debezium(_) => None,
        };
        let (times, out) = (&mut self.committed_at, &mut self.body);
        let (content_type, body, is_tombstone) =
            outbox_body(out, times, event, row, route, attributes.as_ref())?;
        let properties = Properties {
            content_type,
            message_id: id,
            timestamp: seconds(event.occurred_at_us),
            kind: &row.event_type,
            app_id: &self.app_id,
        };
        let mut builder = Builder::new(&mut self.message, &self.routing_key, properties)?;
        builder.own_headers(&route.own_headers, event.position, key, event.committed_at_us)?;
        write_templates(&mut builder, event, route, exchange, facts, &mut self.header)?;
        if is_tombstone {
            builder.header_bool(TOMBSTONE_HEADER, true)?;
        }
        if let Some(traceparent) = &row.traceparent {
            builder.header_text("traceparent", traceparent.as_bytes())?;
        }
        let router = match &route.format {
            Format::Debezium(debezium) => Some(&debezium.router),
            Format::Raw | Format::Watership | Format::CloudEvents(_) => None,
        };
        if let Some(router) = router {
            event_router::write_headers(&mut builder, event, row, router)?;
        }
        if let Some(attributes) = attributes.as_ref().filter(|attributes| !attributes.structured) {
            attributes.write_headers(&mut builder)?;
        }
        if let Some(headers) = &row.headers {
            headers::write(&mut builder, headers, |name| {
                (name == "traceparent" && row.traceparent.is_some())
                    || route.sets_header(name)
                    || router.is_some_and(|router| event_router::sets_header(router, name))
                    || (attributes.is_some() && cloudevents::is_attribute(name))
            })?;
        }
        let message = builder.finish(exchange, route.id, |out| body.write(out));
        self.shrink();
        message
    }

    fn of_change(
        &mut self,
        event: &Event,
        change: &Change,
        plan: &Plan,
        table: &TablePlan,
        part: u16,
    ) -> Result<Message> {
        match (&plan.route.format, &table.debezium) {
            (Format::Debezium(debezium), Some(of_table)) => {
                let record = Record::of(change, table, debezium.tombstones, part);
                self.of_record(event, plan, table, (debezium, &**of_table), record, part)
            }
            (Format::Debezium(_), None) => unreachable!("the plan was made of the route"),
            (Format::Raw, _) => unreachable!("the router refuses it for a captured table"),
            (Format::CloudEvents(options), _) => {
                self.of_cloud_event(event, change, plan, table, options, part)
            }
            (Format::Watership, _) => {
                let op = event.op().as_str();
                self.key.clear();
                self.key.push_str(&event.table.full_name);
                write_key_text(&mut self.key, &event.table, table, change)?;
                self.record_key.clear();
                self.body.clear();
                self.committed_at.set(event.committed_at_us);
                let committed_at = &self.committed_at.text;
                native::write_change(&mut self.body, event, table, change, committed_at)?;
                let shown = shown_row(table, change);
                self.finish_change(event, plan, shown, (op, JSON), part, |_| Ok(()))
            }
        }
    }

    /// A change as a CloudEvent: its data is what format `watership` makes of it.
    fn of_cloud_event(
        &mut self,
        event: &Event,
        change: &Change,
        plan: &Plan,
        table: &TablePlan,
        options: &CloudEvents,
        part: u16,
    ) -> Result<Message> {
        let op = event.op().as_str();
        self.key.clear();
        self.key.push_str(&event.table.full_name);
        write_key_text(&mut self.key, &event.table, table, change)?;
        self.record_key.clear();
        let kind = format!("{}.{op}", event.table.full_name);
        let shown = shown_row(table, change);
        let facts = Facts { key: &self.key, record_key: "", op, row: Some(shown), columns: &[] };
        let (by, about) =
            ((&*plan.route, options), (message_id(event.id, &plan.route, part), &*kind));
        let attributes = Attributes::new(&self.app_id, event, by, facts, about, "")?;
        self.body.clear();
        if attributes.structured {
            attributes.write_json(&mut self.body, JSON);
            self.body.extend_from_slice(b",\"data\":");
        }
        self.committed_at.set(event.committed_at_us);
        let committed_at = &self.committed_at.text;
        native::write_change(&mut self.body, event, table, change, committed_at)?;
        if attributes.structured {
            self.body.push(b'}');
            let (op, kind) = (op, cloudevents::STRUCTURED);
            return self.finish_change(event, plan, shown, (op, kind), part, |_| Ok(()));
        }
        self.finish_change(event, plan, shown, (op, JSON), part, |builder| {
            attributes.write_headers(builder)
        })
    }

    /// One of the records that a change is in Debezium's format.
    fn of_record(
        &mut self,
        event: &Event,
        plan: &Plan,
        table: &TablePlan,
        (options, of_table): (&Debezium, &DebeziumTable),
        record: Record<'_>,
        part: u16,
    ) -> Result<Message> {
        self.key.clear();
        self.key.push_str(&event.table.full_name);
        if let Some((row, is_only_identity)) = record.key_row() {
            let columns = key_columns_of(table, is_only_identity.then_some(row));
            write_row_key_text(&mut self.key, &event.table, row, columns)?;
        }
        debezium::write_key(&mut self.record_key, table, of_table, record.key_row())?;
        let link = record.link();
        let other_row = link.map(|(_, row)| (row, false));
        let mut other_key = std::mem::take(&mut self.other_key);
        debezium::write_key(&mut other_key, table, of_table, other_row)?;
        self.body.clear();
        let is_tombstone = matches!(record, Record::Tombstone { .. });
        match is_tombstone {
            true => self.body.extend_from_slice(options.tombstone_body.bytes()),
            false => {
                let us = match options.event_time {
                    EventTime::Commit => event.committed_at_us,
                    EventTime::Processing => (self.clock)(),
                };
                let of = (of_table, options);
                debezium::write(&mut self.body, event, table, of, record, us)?;
            }
        }
        let row = record.key_row();
        let is_only_identity = row.is_some_and(|(_, is_only_identity)| is_only_identity);
        let shown = ShownRow { table, row: row.map(|(row, _)| row), is_only_identity };
        let message =
            self.finish_change(event, plan, shown, (record.op(), JSON), part, |builder| {
                if let Some((name, _)) = link {
                    builder.header_text(name, other_key.as_bytes())?;
                }
                if is_tombstone {
                    builder.header_bool(TOMBSTONE_HEADER, true)?;
                }
                Ok(())
            });
        self.other_key = other_key;
        message
    }

    /// The message of a captured change, with the body and the keys that were written.
    fn finish_change(
        &mut self,
        event: &Event,
        plan: &Plan,
        shown: ShownRow<'_>,
        (op, content_type): (&str, &str),
        part: u16,
        more_headers: impl FnOnce(&mut Builder<'_>) -> Result<()>,
    ) -> Result<Message> {
        let route = &*plan.route;
        self.kind.clear();
        self.kind.push_str(&event.table.full_name);
        self.kind.push('.');
        self.kind.push_str(op);
        let row = Some(shown);
        let (key, record_key) = (&*self.key, &*self.record_key);
        let facts = Facts { key, record_key, op, row, columns: &[] };
        let exchange = route.address(event, facts, &mut self.routing_key)?;
        let properties = Properties {
            content_type,
            message_id: message_id(event.id, route, part),
            timestamp: seconds(event.occurred_at_us),
            kind: &self.kind,
            app_id: &self.app_id,
        };
        let mut builder = Builder::new(&mut self.message, &self.routing_key, properties)?;
        builder.own_headers(&route.own_headers, event.position, key, event.committed_at_us)?;
        write_templates(&mut builder, event, route, exchange, facts, &mut self.header)?;
        builder.header_text("ws-source", event.table.full_name.as_bytes())?;
        builder.header_text("ws-op", op.as_bytes())?;
        if let Content::Change(Change::Read { run, .. }) = &event.content {
            let mut buffer = Uuid::encode_buffer();
            let run = run.hyphenated().encode_lower(&mut buffer);
            builder.header_text("ws-backfill", run.as_bytes())?;
        }
        if part > 0 {
            builder.header_int(PART_HEADER, i64::from(part))?;
        }
        if let Some(version) = &route.version {
            builder.header_text("ws-rules", version.as_bytes())?;
        }
        more_headers(&mut builder)?;
        let body = &self.body;
        let message = builder.finish(exchange, route.id, |out| out.extend_from_slice(body));
        self.shrink();
        message
    }

    /// Gives back what a large body took.
    fn shrink(&mut self) {
        if self.body.capacity() > SCRATCH_KEPT {
            self.body = Vec::new();
        }
    }
}

/// A time and its text.
#[derive(Debug)]
struct TimeText {
    us: i64,
    text: String,
}

impl TimeText {
    fn new() -> Self {
        Self { us: 0, text: iso_time(0) }
    }

    fn set(&mut self, us: i64) {
        if self.us != us {
            *self = Self { us, text: iso_time(us) };
        }
    }
}

/// Most messages that one event has on one route: delete, tombstone and create of a key change.
pub const PARTS_MAX: u16 = 3;

/// How many messages the event has on the plan's route; they are sent in the order of their
/// numbers.
pub fn parts(event: &Event, plan: &Plan) -> u16 {
    match (&event.content, &plan.table, &plan.route.format) {
        (Content::Change(change), Some(table), Format::Debezium(options)) => {
            debezium::records(change, table, options.tombstones)
        }
        _ => 1,
    }
}

/// Content type and body of an outbox event, and whether it is a tombstone.
fn outbox_body<'a>(
    out: &'a mut Vec<u8>,
    committed_at: &mut TimeText,
    event: &Event,
    row: &'a OutboxRow,
    route: &'a Route,
    attributes: Option<&Attributes>,
) -> Result<(&'a str, raw::Body<'a>, bool)> {
    let own_type = || row.content_type.as_deref().unwrap_or(default_type(&row.payload));
    match &route.format {
        Format::Raw => return Ok((own_type(), raw::Body::of(&row.payload)?, false)),
        Format::Watership => {
            out.clear();
            committed_at.set(event.committed_at_us);
            native::write_outbox(out, event, row, &committed_at.text)?;
        }
        Format::Debezium(debezium) => {
            out.clear();
            match event_router::make(out, event, row, &debezium.router)? {
                event_router::Routed::Verbatim(body) => return Ok((own_type(), body, false)),
                event_router::Routed::Written => {}
                event_router::Routed::Tombstone => {
                    let body = raw::Body::Verbatim(debezium.tombstone_body.bytes());
                    return Ok((own_type(), body, true));
                }
            }
        }
        Format::CloudEvents(_) => match attributes.filter(|attributes| attributes.structured) {
            None => return Ok((own_type(), raw::Body::of(&row.payload)?, false)),
            Some(attributes) => {
                out.clear();
                attributes.write_json(out, own_type());
                cloudevents::write_data(out, &row.payload, own_type())?;
                return Ok((cloudevents::STRUCTURED, raw::Body::Verbatim(out), false));
            }
        },
    }
    Ok((JSON, raw::Body::Verbatim(out), false))
}

fn default_type(payload: &OutboxPayload) -> &'static str {
    match payload {
        OutboxPayload::Json(_) => JSON,
        OutboxPayload::Hex(_)
        | OutboxPayload::Bytes(_)
        | OutboxPayload::Empty
        | OutboxPayload::Broken(_) => BYTES,
    }
}

/// The headers that the route's templates make.
fn write_templates(
    builder: &mut Builder<'_>,
    event: &Event,
    route: &Route,
    exchange: ExchangeId,
    facts: Facts<'_>,
    scratch: &mut String,
) -> Result<()> {
    if let Some(name) = route.chosen(exchange) {
        builder.header_text(EXCHANGE_HEADER, name.as_bytes())?;
    }
    route.each_header(event, facts, scratch, |name, value| {
        builder.header_text(name, value.as_bytes())
    })
}

/// The id of an event's message number `part` on a route.
pub fn message_id(event: Uuid, route: &Route, part: u16) -> Uuid {
    match route.message_id {
        MessageIdRule::Event => id::part(event, part),
        MessageIdRule::Route => id::part(id::of_route(event, &route.name), part),
    }
}

/// Lets `write!` append to bytes.
struct Text<'a>(&'a mut Vec<u8>);

impl std::fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// AMQP's timestamp: seconds since 1970-01-01 UTC, and nothing before.
fn seconds(us: i64) -> u64 {
    u64::try_from(us.div_euclid(1_000_000)).unwrap_or(0)
}

/// `2024-01-02T03:04:05.123456Z`.
fn iso_time(us: i64) -> String {
    match jiff::Timestamp::from_microsecond(us) {
        Ok(time) => format!("{time:.6}"),
        Err(_) => us.to_string(),
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_cloudevents;
#[cfg(test)]
mod tests_debezium;
#[cfg(test)]
mod tests_templates;
