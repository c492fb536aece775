//! Format `debezium`, for the outbox: what Debezium's outbox event router makes of a row.
//!
//! The payload is passed on as the application wrote it unless the route asks for another form.
//! An additional field is a column of a mapped table, or a member of the column `headers`.
//!
//! <https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html>

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{headers, raw};
use crate::column::write_string;
use crate::error::{Error, Result};
use crate::event::{Event, OutboxPayload, OutboxRow};
use crate::message::Builder;
use crate::route::{EventRouter, Placement};

/// Levels of arrays and objects that are looked into when a payload is expanded; what is deeper
/// stays as it is.
const DEPTH_MAX: usize = 128;

/// What became of the payload.
pub(super) enum Routed<'a> {
    /// It is the body as it is.
    Verbatim(raw::Body<'a>),
    /// The body was written.
    Written,
    /// An empty body, which consumers read as null.
    Tombstone,
}

/// Writes the body into `out`, unless it is the payload itself.
pub(super) fn make<'a>(
    out: &mut Vec<u8>,
    event: &Event,
    row: &'a OutboxRow,
    router: &EventRouter,
) -> Result<Routed<'a>> {
    let body = raw::Body::of(&row.payload)?;
    let text = match &row.payload {
        OutboxPayload::Json(text) => {
            Some(std::str::from_utf8(text).map_err(|_| Error::event("the payload is not UTF-8"))?)
        }
        OutboxPayload::Hex(_)
        | OutboxPayload::Bytes(_)
        | OutboxPayload::Empty
        | OutboxPayload::Broken(_) => None,
    };
    let is_null = text == Some("null") || matches!(row.payload, OutboxPayload::Empty);
    let is_empty = is_null || body.is_empty() || text == Some("\"\"");
    if router.tombstone_on_empty && is_empty {
        return Ok(Routed::Tombstone);
    }
    let expanded = router.expand && text.is_some_and(is_structure);
    if !router.has_envelope() && !expanded && !router.payload_as_string {
        return Ok(Routed::Verbatim(body));
    }
    if router.has_envelope() {
        out.extend_from_slice(b"{\"payload\":");
    }
    match text {
        Some(text) if expanded => expand(out, text, router, DEPTH_MAX)?,
        _ if is_null => out.extend_from_slice(b"null"),
        Some(text) => write_string(out, text),
        None => {
            out.push(b'"');
            body.write_base64(out);
            out.push(b'"');
        }
    }
    if router.has_envelope() {
        each_placed(event, row, router, true, |name, value| {
            out.push(b',');
            write_string(out, name);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
            Ok(())
        })?;
        out.push(b'}');
    }
    Ok(Routed::Written)
}

/// Adds the header `id`, and the fields that go into headers.
pub(super) fn write_headers(
    builder: &mut Builder<'_>,
    event: &Event,
    row: &OutboxRow,
    router: &EventRouter,
) -> Result<()> {
    let id = event.id.to_string();
    match router.quoted_id {
        true => builder.header_text("id", format!("\"{id}\"").as_bytes())?,
        false => builder.header_text("id", id.as_bytes())?,
    }
    each_placed(event, row, router, false, |name, value| {
        // The field of the outbox with this name stands before others.
        let is_taken = name == "traceparent" && row.traceparent.is_some();
        if is_taken { Ok(()) } else { headers::write_one(builder, name, value) }
    })
}

/// Whether the router sets a header of this name itself.
pub(super) fn sets_header(router: &EventRouter, name: &str) -> bool {
    name == "id" || router.placements.iter().any(|p| !p.in_body && p.name == name)
}

/// The fields that go into the body, or into headers, with their values as JSON.
fn each_placed(
    event: &Event,
    row: &OutboxRow,
    router: &EventRouter,
    in_body: bool,
    mut each: impl FnMut(&str, &str) -> Result<()>,
) -> Result<()> {
    let placed = router.placements.iter().filter(|placement| placement.in_body == in_body);
    for Placement { field, name, .. } in placed {
        let text = match field.as_str() {
            "id" => Some(event.id.to_string()),
            "aggregate_type" | "aggregatetype" => Some(row.aggregate_type.to_string()),
            "aggregate_id" | "aggregateid" => Some(row.aggregate_id.to_string()),
            "event_type" | "type" => Some(row.event_type.to_string()),
            _ => None,
        };
        if let Some(text) = text {
            let mut json = Vec::new();
            write_string(&mut json, &text);
            each(name, std::str::from_utf8(&json).expect("it was text"))?;
            continue;
        }
        // A column of the table stands before a member of the column headers.
        let columns = row.columns.as_deref().map(headers::parse).transpose()?;
        let members = row.headers.as_deref().map(headers::parse).transpose()?;
        let mut found = columns.iter().chain(&members).filter_map(|members| members.get(field));
        match found.next() {
            Some(value) => each(name, value.get())?,
            None if router.ignore_missing => {}
            None => {
                let text = format!("the row has no field {field:?}, which the route places");
                return Err(Error::event(text).hint(
                    "correct debezium.additional_placement (a field is a column of outbox.table or \
                     a member of the column headers), or set debezium.missing_field = \"ignore\"",
                ));
            }
        }
    }
    Ok(())
}

/// It begins like an object or array, and is JSON. Anything else stays a string.
fn is_structure(text: &str) -> bool {
    text.trim_start().starts_with(['{', '[']) && serde_json::from_str::<&RawValue>(text).is_ok()
}

/// Writes the value without white space, and without the members that the router leaves out.
fn expand(out: &mut Vec<u8>, json: &str, router: &EventRouter, depth: usize) -> Result<()> {
    let wrong = |_| Error::event("the payload is not JSON");
    let json = json.trim();
    match json.as_bytes().first() {
        Some(b'{') if depth > 0 => {
            let Members(members) = serde_json::from_str(json).map_err(wrong)?;
            out.push(b'{');
            let mut separator: &[u8] = b"";
            for (name, value) in members {
                let is_empty_array =
                    value.get().strip_prefix('[').is_some_and(|rest| rest.trim_start() == "]");
                let left_out = (value.get() == "null" && !router.keep_nulls)
                    || (is_empty_array && !router.keep_empty_arrays);
                if left_out {
                    continue;
                }
                out.extend_from_slice(separator);
                separator = b",";
                write_string(out, &name);
                out.push(b':');
                expand(out, value.get(), router, depth - 1)?;
            }
            out.push(b'}');
        }
        Some(b'[') if depth > 0 => {
            let items: Vec<&RawValue> = serde_json::from_str(json).map_err(wrong)?;
            out.push(b'[');
            for (index, item) in items.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                expand(out, item.get(), router, depth - 1)?;
            }
            out.push(b']');
        }
        _ => out.extend_from_slice(json.as_bytes()),
    }
    Ok(())
}

/// The members of an object in their order.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Walk)
    }
}
