//! The texts of a route that templates make: exchange, routing key, headers, and the attributes of
//! CloudEvents. Pure.
//!
//! Invariant: a message goes to an exchange that the configuration lists. So each has its channels,
//! is verified at start, and is graded, whatever the rows say; what a template makes beside the
//! list is an error of the event.

use std::fmt::Write as _;

use super::template::{Facts, Field, Fields, Segment, Template, partition};
use super::{Action, CloudEvents, Format, Partitions, Rule, Select};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::event::hidden::Hide;
use crate::message::{ExchangeId, ROUTE_HEADER, SHORT_STRING_MAX, is_reserved_header};
use crate::route::RouteRules;

/// Where the messages of a route go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The exchange; with `exchanges`, a template that makes one of them.
    pub exchange: String,
    /// All exchanges that the template may make; empty where the exchange has no fields.
    pub exchanges: Vec<String>,
    /// Template of the routing key: text with `{field}`; `{{` and `}}` are braces. Empty for a
    /// route with partitions, whose names are its routing keys.
    pub routing_key: String,
    /// Headers by name, with the templates of their values.
    pub headers: Vec<(String, String)>,
}

impl Address {
    /// To one exchange, without headers.
    pub fn new(exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        let (exchange, routing_key) = (exchange.into(), routing_key.into());
        Self { exchange, exchanges: Vec::new(), routing_key, headers: Vec::new() }
    }

    /// The exchanges that it can go to: at least one.
    pub fn exchanges(&self) -> &[String] {
        match self.exchanges.as_slice() {
            [] => std::slice::from_ref(&self.exchange),
            several => several,
        }
    }
}

impl Rule {
    /// The headers that all its messages have, with the values that do not depend on the event.
    pub fn known_headers(&self) -> Vec<(String, Option<String>)> {
        let mut known = vec![(ROUTE_HEADER.to_owned(), Some(self.name.clone()))];
        let Action::Publish { address, .. } = &self.action else { return known };
        for (name, text) in &address.headers {
            let Ok(Template(segments)) = Template::parse(name, text, &mut Fields::of(&self.select))
            else {
                continue;
            };
            let constant = segments.into_iter().map(|segment| match segment {
                Segment::Text(text) => Some(text),
                Segment::Field(_) | Segment::Partition(_) => None,
            });
            known.push((name.clone(), constant.collect()));
        }
        known
    }
}

/// The templates of a route, parsed.
#[derive(Debug)]
pub(super) struct Texts {
    exchange: Exchange,
    routing_key: Template,
    headers: Vec<(String, Template)>,
    /// The attributes `source` and `type` of CloudEvents, where they are templates.
    attributes: [Option<Template>; 2],
    /// The columns that they name, by the names of the table.
    pub(super) columns: Vec<String>,
}

#[derive(Debug)]
enum Exchange {
    One(String, ExchangeId),
    /// One of these.
    Of(Template, Vec<(String, ExchangeId)>),
}

impl Texts {
    /// Those of a route without a name: nothing is published by it.
    pub(super) fn none() -> Self {
        let exchange = Exchange::One(String::new(), ExchangeId(0));
        let (routing_key, headers, columns) = (Template::default(), Vec::new(), Vec::new());
        Self { exchange, routing_key, headers, attributes: [None, None], columns }
    }

    /// Parses them. `exchange_id` numbers an exchange.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with what is wrong.
    pub(super) fn parse(
        select: &Select,
        address: &Address,
        partitions: Option<&Partitions>,
        format: &Format,
        rules: &RouteRules,
        mut exchange_id: impl FnMut(&str) -> ExchangeId,
    ) -> Result<Self> {
        let mut fields = Fields::of(select);
        let routing_key = match partitions {
            Some(partitions) => Template::of_partitions(partitions),
            None => Template::parse("routing_key", &address.routing_key, &mut fields)?,
        };
        let made = Template::parse("exchange", &address.exchange, &mut fields);
        let exchange = match address.exchanges.as_slice() {
            // Without a list the name is the name, as the broker has it.
            [] => Exchange::One(address.exchange.clone(), exchange_id(&address.exchange)),
            listed => {
                let made = made?;
                if partitions.is_some() {
                    return Err(Error::config(
                        "exchanges and partitions: the queues of partitions are bound to one \
                         exchange; name it in exchange, and remove exchanges",
                    ));
                }
                check_length("exchange", &made)?;
                check_record_key("exchange", &made, format)?;
                let id = |name: &String| (name.clone(), exchange_id(name));
                Exchange::Of(made, listed.iter().map(id).collect())
            }
        };
        check_length("routing_key", &routing_key)?;
        check_record_key("routing_key", &routing_key, format)?;
        let mut headers = Vec::new();
        for (name, text) in &address.headers {
            check_header(name, select, format)?;
            let template = Template::parse(&format!("headers.{name}"), text, &mut fields)?;
            check_record_key(&format!("headers.{name}"), &template, format)?;
            headers.push((name.clone(), template));
        }
        let attributes = match format {
            Format::CloudEvents(options) => attributes(options, &mut fields)?,
            Format::Raw | Format::Watership | Format::Debezium(_) => [None, None],
        };
        let columns = fields.columns;
        for name in &columns {
            check_column(name, rules)?;
        }
        Ok(Self { exchange, routing_key, headers, attributes, columns })
    }

    /// Writes the routing key into `out`, which is cleared first, and returns the exchange.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when a text is longer than 255 bytes, when a column has none,
    /// and for an exchange that is not listed. No error shows a value.
    pub(super) fn address(
        &self,
        route: &str,
        event: &Event,
        facts: Facts<'_>,
        out: &mut String,
    ) -> Result<ExchangeId> {
        let exchange = match &self.exchange {
            Exchange::One(_, id) => *id,
            Exchange::Of(template, listed) => {
                render("exchange", route, template, event, facts, out)?;
                let known = listed.iter().find(|(name, _)| name == out);
                known.map(|(_, id)| *id).ok_or_else(|| not_listed(route, listed))?
            }
        };
        render("routing_key", route, &self.routing_key, event, facts, out)?;
        Ok(exchange)
    }

    /// The number of a listed exchange, for a message that was made before.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when the route no longer has it, or `name` is missing where
    /// the route has several.
    pub(super) fn exchange_called(&self, route: &str, name: Option<&str>) -> Result<ExchangeId> {
        match &self.exchange {
            Exchange::One(own, _) if name.is_some_and(|name| name != own) => {
                let text = format!("it was made for exchange {:?}", name.unwrap_or_default());
                Err(Error::event(format!("{text}, which route {route:?} no longer has"))
                    .hint("give the route that exchange again to send it, or discard it"))
            }
            Exchange::One(_, id) => Ok(*id),
            Exchange::Of(_, listed) => {
                let Some(name) = name else {
                    let text = format!("it was made when route {route:?} had one exchange");
                    return Err(Error::event(text).hint(
                        "set exchange back to that one and remove exchanges, retry, then change \
                         the route again",
                    ));
                };
                let known = listed.iter().find(|(listed, _)| name == listed);
                known.map(|(_, id)| *id).ok_or_else(|| not_listed(route, listed))
            }
        }
    }

    /// The name of the exchange, where it is one of several.
    pub(super) fn chosen(&self, id: ExchangeId) -> Option<&str> {
        match &self.exchange {
            Exchange::One(..) => None,
            Exchange::Of(_, listed) => {
                listed.iter().find(|(_, listed)| *listed == id).map(|(name, _)| &**name)
            }
        }
    }

    /// The headers with their values, one by one; `out` is scratch space.
    ///
    /// # Errors
    /// Those of `each`, and as [`Self::address`].
    pub(super) fn each_header(
        &self,
        event: &Event,
        facts: Facts<'_>,
        out: &mut String,
        mut each: impl FnMut(&str, &str) -> Result<()>,
    ) -> Result<()> {
        for (name, template) in &self.headers {
            out.clear();
            let made = template.render(event, facts, out);
            made.map_err(|error| error.context(format!("header {name:?}")))?;
            each(name, out)?;
        }
        Ok(())
    }

    /// The attributes `source` and `type` of a CloudEvent, where they are templates.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] when a column has no text.
    pub(super) fn attributes(
        &self,
        event: &Event,
        facts: Facts<'_>,
    ) -> Result<[Option<String>; 2]> {
        let [source, kind] = &self.attributes;
        let render = |name: &str, template: &Option<Template>, is_uri: bool| -> Result<_> {
            let Some(template) = template else { return Ok(None) };
            let mut text = String::new();
            let made = template.each_piece(event, facts, |piece, is_field| match is_field {
                true if is_uri => push_encoded(&mut text, piece),
                _ => text.push_str(piece),
            });
            made.map_err(|error| error.context(format!("the CloudEvents attribute {name:?}")))?;
            Ok(Some(text))
        };
        Ok([render("source", source, true)?, render("type", kind, false)?])
    }

    /// Whether a header of this name is among them.
    pub(super) fn sets_header(&self, wanted: &str) -> bool {
        self.headers.iter().any(|(name, _)| name == wanted)
    }

    /// See [`super::Route::partition_of`].
    pub(super) fn partition_of(&self, key: &str) -> Option<&str> {
        match self.routing_key.0.as_slice() {
            [Segment::Partition(names)] => Some(partition(names, key)),
            _ => None,
        }
    }
}

impl Rule {
    /// The columns that its templates name, with the key of the configuration; none for a rule
    /// whose templates are wrong.
    pub fn template_columns(&self) -> Vec<(String, String)> {
        let super::Action::Publish { address, format, .. } = &self.action else {
            return Vec::new();
        };
        let Address { exchange, exchanges, routing_key, headers } = &**address;
        let exchange = (!exchanges.is_empty()).then(|| ("exchange".to_owned(), exchange));
        let headers = headers.iter().map(|(name, text)| (format!("headers.{name}"), text));
        let mut all = Vec::new();
        let texts = exchange.into_iter().chain([("routing_key".to_owned(), routing_key)]);
        let attributes = match format {
            Format::CloudEvents(options) => Some([
                ("cloudevents.source".to_owned(), &options.source),
                ("cloudevents.type".to_owned(), &options.kind),
            ]),
            Format::Raw | Format::Watership | Format::Debezium(_) => None,
        };
        for (setting, text) in texts.chain(headers).chain(attributes.into_iter().flatten()) {
            let mut fields = Fields::of(&self.select);
            if Template::parse(&setting, text, &mut fields).is_ok() {
                all.extend(fields.columns.into_iter().map(|column| (setting.clone(), column)));
            }
        }
        all
    }
}

/// `source` and `type`, where they are given.
fn attributes(options: &CloudEvents, fields: &mut Fields) -> Result<[Option<Template>; 2]> {
    let mut parse = |setting: &str, text: &str| {
        let parsed = (!text.is_empty()).then(|| Template::parse(setting, text, fields));
        let parsed = parsed.transpose()?;
        match parsed.as_ref().is_some_and(|parsed| parsed.has(Field::RecordKey)) {
            true => Err(no_record_key(setting)),
            false => Ok(parsed),
        }
    };
    let source = parse("cloudevents.source", &options.source)?;
    let kind = parse("cloudevents.type", &options.kind)?;
    // RFC 3986, section 2.
    let is_uri = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!$&'()*+,;=%".contains(c);
    if !source.iter().flat_map(Template::texts).flat_map(str::chars).all(is_uri) {
        let text = format!("cloudevents.source is {:?}", options.source);
        return Err(Error::config(text).hint("expected a URI or a path, percent-encoded"));
    }
    if kind.is_some() && !options.type_prefix.is_empty() {
        let text = "cloudevents.type and cloudevents.type_prefix are two ways to say it; keep one";
        return Err(Error::config(text));
    }
    if kind.iter().flat_map(Template::texts).any(|text| text.contains(char::is_control)) {
        return Err(Error::config("cloudevents.type has a control character; remove it"));
    }
    Ok([source, kind])
}

/// As a segment of a URI's path: what must not stand in one is percent-encoded (RFC 3986).
pub fn push_encoded(out: &mut String, text: &str) {
    for byte in text.bytes() {
        match byte {
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

fn render(
    what: &str,
    route: &str,
    template: &Template,
    event: &Event,
    facts: Facts<'_>,
    out: &mut String,
) -> Result<()> {
    out.clear();
    let made = template.render(event, facts, out);
    made.map_err(|error| error.context(format!("{what} of route {route:?}")))?;
    if out.len() > SHORT_STRING_MAX {
        let (what, len) = (what.replace('_', " "), out.len());
        let text =
            format!("{what} of route {route:?} has {len} bytes, AMQP allows {SHORT_STRING_MAX}");
        return Err(
            Error::event(text).hint("shorten the template, or leave such events out with filter")
        );
    }
    Ok(())
}

fn not_listed(route: &str, listed: &[(String, ExchangeId)]) -> Error {
    let names: Vec<String> = listed.iter().map(|(name, _)| format!("{name:?}")).collect();
    let text = format!(
        "route {route:?} makes the name of an exchange of this event (not shown: it may have \
         values of the row), and it is not one of its exchanges: {}",
        names.join(", ")
    );
    Error::event(text).hint("add it to exchanges and retry, or leave such events out with filter")
}

fn check_length(setting: &str, template: &Template) -> Result<()> {
    let least = template.least_len();
    if least > SHORT_STRING_MAX {
        let text = format!(
            "{setting} has {least} bytes without its fields, AMQP allows {SHORT_STRING_MAX}; \
             shorten it"
        );
        return Err(Error::config(text));
    }
    Ok(())
}

fn check_record_key(setting: &str, template: &Template, format: &Format) -> Result<()> {
    match template.has(Field::RecordKey) && !matches!(format, Format::Debezium(_)) {
        true => Err(no_record_key(setting)),
        false => Ok(()),
    }
}

fn no_record_key(setting: &str) -> Error {
    let text = "the field \"record_key\" needs format = \"debezium\"; use \"key\" instead";
    Error::config(format!("{setting}: {text}"))
}

/// A header must have one meaning: the relay's own and those of the format keep theirs.
fn check_header(name: &str, select: &Select, format: &Format) -> Result<()> {
    let wrong = |why: &str| Error::config(format!("headers has {name:?}: {why}"));
    let is_name =
        (1..=SHORT_STRING_MAX).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic());
    if !is_name {
        return Err(wrong("a name has 1 to 255 printable ASCII characters without spaces"));
    }
    if is_reserved_header(name) {
        return Err(wrong("CC, BCC, x-* and ws-* are reserved; choose another name"));
    }
    let is_outbox = matches!(select, Select::Outbox { .. });
    let is_taken = match format {
        Format::Debezium(debezium) if is_outbox => {
            let placed = debezium.router.placements.iter();
            name == "id" || placed.filter(|p| !p.in_body).any(|placed| placed.name == name)
        }
        Format::Debezium(_) => name.starts_with("__debezium."),
        Format::CloudEvents(_) => {
            name.starts_with("cloudEvents_") || name.starts_with("cloudEvents:")
        }
        Format::Raw | Format::Watership => false,
    };
    if is_taken || (is_outbox && name == "traceparent") {
        return Err(wrong("the route sets this header itself; choose another name"));
    }
    Ok(())
}

fn check_column(name: &str, rules: &RouteRules) -> Result<()> {
    let left_out = rules.columns.hide(name) == Some(Hide::Exclude);
    if left_out || rules.map.drop.iter().any(|dropped| dropped == name) {
        let text = format!("a template names column {name:?}, which the route does not send");
        return Err(Error::config(text).hint("mask or hash it instead, or name another column"));
    }
    Ok(())
}
