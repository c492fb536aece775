//! Format `cloudevents`: CloudEvents 1.0, as headers beside the body (binary mode) or as one JSON
//! object (structured mode).
//!
//! Invariant: an event without a type, or with a character that an attribute must not have, is an
//! error and not a message.
//!
//! <https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md>

use uuid::Uuid;

use super::{JSON, iso_time, raw};
use crate::column::write_string;
use crate::error::{Error, Result};
use crate::event::{Event, OutboxPayload};
use crate::message::Builder;
use crate::route::{CloudEvents, Facts, Route, push_encoded};

/// Content type of an event in structured mode.
pub(super) const STRUCTURED: &str = "application/cloudevents+json";
const PREFIX: &str = "cloudEvents_";

/// The attributes of an event, apart from the content type of its data.
pub(super) struct Attributes {
    pub(super) structured: bool,
    /// In the order of the specification; those that are empty are not there.
    list: [(&'static str, String); 9],
}

impl Attributes {
    /// `id` is that of the message, `kind` its type unless the route has a template for it.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] without a type or source, for a control character in an
    /// attribute, and for a template that cannot be made.
    pub(super) fn new(
        relay: &str,
        event: &Event,
        (route, options): (&Route, &CloudEvents),
        facts: Facts<'_>,
        (id, kind): (Uuid, &str),
        traceparent: &str,
    ) -> Result<Self> {
        let [source, templated] = route.attributes(event, facts)?;
        let source = source.unwrap_or_else(|| {
            let mut source = String::new();
            for name in [relay, &event.table.full_name] {
                source.push('/');
                push_encoded(&mut source, name);
            }
            source
        });
        let key = facts.key;
        let is_empty = templated.as_deref().unwrap_or(kind).is_empty();
        let kind = templated.unwrap_or_else(|| format!("{}{kind}", options.type_prefix));
        let list = [
            ("specversion", "1.0".to_owned()),
            ("id", id.to_string()),
            ("source", source),
            ("type", kind),
            ("subject", key.to_owned()),
            ("time", iso_time(event.occurred_at_us)),
            ("dataschema", options.dataschema.clone()),
            ("partitionkey", key.to_owned()),
            ("traceparent", traceparent.to_owned()),
        ];
        if is_empty {
            return Err(Error::event("the event type is empty, and a CloudEvent needs a type"));
        }
        if list[2].1.is_empty() {
            return Err(Error::event("the source is empty, and a CloudEvent needs a source")
                .hint("give cloudevents.source a fixed part, such as \"/shop/{column.tenant}\""));
        }
        if let Some((name, _)) = list.iter().find(|(_, value)| value.contains(char::is_control)) {
            let text = format!("the CloudEvents attribute {name:?} has a control character");
            return Err(Error::event(text));
        }
        Ok(Self { structured: options.structured, list })
    }

    fn present(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = self.list.iter().map(|(name, value)| (*name, value.as_str()));
        all.filter(|(_, value)| !value.is_empty())
    }

    /// Binary mode: a header for each.
    pub(super) fn write_headers(&self, builder: &mut Builder<'_>) -> Result<()> {
        for (name, value) in self.present() {
            builder.header_text(&format!("{PREFIX}{name}"), value.as_bytes())?;
        }
        Ok(())
    }

    /// Structured mode: opens the object that has `data` or `data_base64` as its last member.
    pub(super) fn write_json(&self, out: &mut Vec<u8>, content_type: &str) {
        let mut separator = b'{';
        for (name, value) in self.present().chain([("datacontenttype", content_type)]) {
            out.push(separator);
            separator = b',';
            write_string(out, name);
            out.push(b':');
            write_string(out, value);
        }
    }
}

/// The last member of an event in structured mode, and its closing brace: JSON stands there as it
/// is, everything else in base64.
pub(super) fn write_data(
    out: &mut Vec<u8>,
    payload: &OutboxPayload,
    content_type: &str,
) -> Result<()> {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    let is_json = media_type == JSON || media_type.ends_with("+json");
    match payload {
        OutboxPayload::Json(json) if is_json => {
            out.extend_from_slice(b",\"data\":");
            out.extend_from_slice(raw::checked_json(json)?.as_bytes());
        }
        payload => {
            out.extend_from_slice(b",\"data_base64\":\"");
            raw::Body::of(payload)?.write_base64(out);
            out.push(b'"');
        }
    }
    out.push(b'}');
    Ok(())
}

/// Whether an application's header would be taken for an attribute.
pub(super) fn is_attribute(name: &str) -> bool {
    name.starts_with(PREFIX) || name.starts_with("cloudEvents:")
}
