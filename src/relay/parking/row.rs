//! Rows of `watership.parked`: messages that could not be published, with why, and with what is
//! needed to keep their order and to try them again. Pure.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::envelope::key_text;
use crate::error::{Error, Result};
use crate::event::{Event, stored};
use crate::message::Message;
use crate::position::Position;
use crate::route::{LaneKeys, Plan};

/// Most bytes of one row. No document is larger than [`stored::STORED_MAX`]; a body of this size
/// is below the 1 GiB that Postgres takes, also in base64.
pub const ROW_BYTES_MAX: usize = 600 << 20;
const _: () = assert!(stored::STORED_MAX + (64 << 20) < ROW_BYTES_MAX);
/// Characters of an error that are kept.
const ERROR_CHARS: usize = 1000;

/// Which message of which event; the primary key. Sorts by position.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParkedKey {
    /// Place of the event.
    pub position: Position,
    /// Name of the route; empty when no route selected the event.
    pub route: Arc<str>,
    /// Number among the messages that the event has on the route.
    pub part: u16,
}

/// What a row waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowState {
    /// A person.
    Parked,
    /// The relay, which tries it again in order.
    Retrying,
    /// Nothing: it was published.
    Released,
    /// Nothing: a person gave it up.
    Discarded,
}

impl RowState {
    /// The word in the column `state`.
    pub fn as_str(self) -> &'static str {
        match self {
            RowState::Parked => "parked",
            RowState::Retrying => "retrying",
            RowState::Released => "released",
            RowState::Discarded => "discarded",
        }
    }

    /// Reads the word.
    ///
    /// # Errors
    /// [`crate::error::Kind::Protocol`] for any other.
    pub fn parse(text: &str) -> Result<Self> {
        let all = [Self::Parked, Self::Retrying, Self::Released, Self::Discarded];
        let found = all.into_iter().find(|state| state.as_str() == text);
        found.ok_or_else(|| Error::protocol(format!("watership.parked.state is {text:?}")))
    }
}

/// Why a message was parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Its body is larger than the broker takes.
    TooLarge,
    /// Its body, headers or routing key cannot be carried by AMQP, or its row breaks the contract.
    Invalid,
    /// Its table lacks what its route promised, and the route has `on_drift = "park"`.
    Drift,
    /// No route selects the event.
    NoRoute,
    /// No queue is bound for it, on a route that parks those.
    Unroutable,
    /// The broker refused it too often, and took others of its route.
    Nacked,
    /// The broker closed the channel because of it.
    Refused,
    /// Nothing is wrong with it; it follows an earlier message of its lane.
    Follows,
}

impl Why {
    /// All of them, in the order of the metrics.
    pub const ALL: [Self; 8] = [
        Self::TooLarge,
        Self::Invalid,
        Self::Drift,
        Self::NoRoute,
        Self::Unroutable,
        Self::Nacked,
        Self::Refused,
        Self::Follows,
    ];

    /// The word in the column `kind` and in labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Why::TooLarge => "too_large",
            Why::Invalid => "invalid",
            Why::Drift => "drift",
            Why::NoRoute => "no_route",
            Why::Unroutable => "unroutable",
            Why::Nacked => "nacked",
            Why::Refused => "refused",
            Why::Follows => "follows",
        }
    }

    /// Reads the word; what a later version wrote counts as invalid.
    pub fn parse(text: &str) -> Self {
        Self::ALL.into_iter().find(|why| why.as_str() == text).unwrap_or(Self::Invalid)
    }

    /// What a person can do about it.
    pub fn hint(self) -> &'static str {
        match self {
            Why::TooLarge => {
                "raise broker.max_message_size and the broker's own limit, restart the relay, then \
                 retry; or discard it"
            }
            Why::Invalid => {
                "correct what the error names (a template, contract or option of the route) and \
                 restart the relay, then retry; if the event itself is wrong, discard it"
            }
            Why::Drift => {
                "`watership schema TABLE` shows what has changed; agree with `watership schema \
                 accept TABLE`, then retry"
            }
            Why::NoRoute => {
                "add a [[route]] for it and restart the relay, then retry; or discard it"
            }
            Why::Unroutable => "bind a queue for its routing key, then retry; or discard it",
            Why::Nacked => {
                "see why the queue refuses it (its length limit, for example), then retry"
            }
            Why::Refused => "see the broker's text, fix the cause, then retry; or discard it",
            Why::Follows => "retry or discard the first row of its key",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a retry makes the message of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Raw {
    /// The event, as [`stored::to_json`] writes it: it is routed and encoded again.
    Event(String),
    /// The message, which the broker did not take: it is sent as it was.
    Message {
        /// Routing key.
        routing_key: String,
        /// AMQP property flags and list.
        properties: Vec<u8>,
        /// Body.
        body: Vec<u8>,
    },
}

/// A row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedRow {
    /// Which message.
    pub key: ParkedKey,
    /// What it waits for.
    pub state: RowState,
    /// Why it is here.
    pub why: Why,
    /// The error, in words.
    pub error: String,
    /// Tries so far.
    pub attempts: u32,
    /// The event's id, or the message's for a [`Raw::Message`].
    pub id: Uuid,
    /// `schema.table`.
    pub source: String,
    /// The key, for people.
    pub key_text: String,
    /// Commit time, in microseconds since 1970-01-01 UTC.
    pub committed_at_us: i64,
    /// What it must not overtake.
    pub lanes: LaneKeys,
    /// Whether the hashes of its lanes are keyed with the secret of the database.
    pub lanes_keyed: bool,
    /// Version of the rules that hid values in it; absent where there are none.
    pub rules: Option<String>,
    /// What it is made of.
    pub raw: Raw,
}

impl ParkedRow {
    /// The row of an event of which no message can be made, or which follows one: of what its plan
    /// lets be stored of it.
    pub fn of_event(event: &Event, plan: &Plan, lanes: LaneKeys, why: Why, error: &Error) -> Self {
        let (kept, hidden) = plan.kept(event);
        let (sent, of_sent) = plan.sent(event);
        Self {
            key: ParkedKey { position: event.position, route: plan.route.label.clone(), part: 0 },
            state: RowState::Parked,
            why,
            error: shorten(error),
            attempts: 1,
            id: kept.id,
            source: event.table.full_name.to_string(),
            key_text: key_text(&sent, of_sent),
            committed_at_us: event.committed_at_us,
            lanes,
            lanes_keyed: plan.has_keyed_lanes(),
            rules: hidden.map(|hidden| hidden.rules.clone()),
            raw: Raw::Event(stored::to_json(&kept, hidden)),
        }
    }

    /// Bytes that it holds.
    pub fn size(&self) -> usize {
        size_of::<Self>()
            + self.error.len()
            + match &self.raw {
                Raw::Event(json) => json.len(),
                Raw::Message { properties, body, .. } => properties.len() + body.len(),
            }
    }

    /// As `rider_parked.sql` reads it.
    fn to_json(&self) -> JsonRow<'_> {
        let (lanes, table_lane, barrier) = lanes_to_columns(self.lanes);
        let (event, routing_key, properties, body) = match &self.raw {
            Raw::Event(json) => {
                let raw: serde_json::Result<&RawValue> = serde_json::from_str(json);
                (Some(raw.expect("the document is JSON")), None, None, None)
            }
            Raw::Message { routing_key, properties, body } => {
                let (properties, body) = (STANDARD.encode(properties), STANDARD.encode(body));
                (None, Some(&**routing_key), Some(properties), Some(body))
            }
        };
        JsonRow {
            key: JsonKey::of(&self.key),
            state: self.state,
            kind: self.why,
            error: &self.error,
            attempts: self.attempts,
            event_id: self.id.to_string(),
            source: &self.source,
            key_text: &self.key_text,
            committed_at_us: self.committed_at_us,
            lanes,
            table_lane,
            barrier,
            lanes_keyed: self.lanes_keyed,
            rules: self.rules.as_deref(),
            event,
            routing_key,
            properties,
            body,
        }
    }
}

/// Parts of a message that is parked as it is.
pub fn raw_message(message: &Message) -> Raw {
    Raw::Message {
        routing_key: String::from_utf8_lossy(message.routing_key()).into_owned(),
        properties: message.properties().to_vec(),
        body: message.body().to_vec(),
    }
}

/// The text of an error, with its hint, at a length that a list can show.
pub fn shorten(error: &Error) -> String {
    error.text_with_hint().chars().filter(|c| *c != '\0').take(ERROR_CHARS).collect()
}

/// A change of a row that is in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Which row.
    pub key: ParkedKey,
    /// Its new state.
    pub state: RowState,
    /// Why a new try failed.
    pub why: Option<(Why, String)>,
}

/// Rows as a JSON array, for `rider_parked.sql`.
pub fn rows_to_json(rows: &[ParkedRow]) -> String {
    let rows: Vec<JsonRow<'_>> = rows.iter().map(ParkedRow::to_json).collect();
    serde_json::to_string(&rows).expect("rows are numbers, strings and documents")
}

/// Changes as a JSON array, for `rider_unparked.sql`.
pub fn changes_to_json(changes: &[Changed]) -> String {
    let change = |c: &Changed| JsonChange {
        key: JsonKey::of(&c.key),
        state: c.state,
        kind: c.why.as_ref().map(|(why, _)| *why),
        error: c.why.as_ref().map(|(_, error)| error.clone()),
    };
    let changes: Vec<JsonChange> = changes.iter().map(change).collect();
    serde_json::to_string(&changes).expect("changes are numbers and strings")
}

/// Keys as a JSON array, for `parked_rows.sql`.
pub fn keys_to_json(keys: &[ParkedKey]) -> String {
    let keys: Vec<JsonKey> = keys.iter().map(JsonKey::of).collect();
    serde_json::to_string(&keys).expect("keys are numbers and strings")
}

/// What the index knows of a row that is in the database and neither released nor discarded.
#[derive(Debug, Clone, PartialEq)]
pub struct Indexed {
    /// Which row.
    pub key: ParkedKey,
    /// What it waits for.
    pub state: RowState,
    /// Why it is here.
    pub why: Why,
    /// What it must not overtake.
    pub lanes: LaneKeys,
    /// About how many bytes it has.
    pub bytes: usize,
    /// When it was parked, in seconds since 1970-01-01 UTC.
    pub parked_at: f64,
}

/// Lanes as columns: hashes of the keys, hash of the table, whether it is a truncate. Postgres has
/// no unsigned numbers; the bits are the same.
pub fn lanes_to_columns(lanes: LaneKeys) -> (Vec<i64>, Option<i64>, bool) {
    match lanes {
        LaneKeys::Free => (Vec::new(), None, false),
        LaneKeys::One { lane, group } => (vec![lane as i64], group.map(|g| g as i64), false),
        LaneKeys::Two { lanes, group } => {
            (lanes.iter().map(|l| *l as i64).collect(), Some(group as i64), false)
        }
        LaneKeys::Barrier { group } => (Vec::new(), Some(group as i64), true),
    }
}

/// The way back.
///
/// # Errors
/// [`crate::error::Kind::Protocol`] when the columns do not belong together.
pub fn lanes_from_columns(lanes: &[i64], group: Option<i64>, barrier: bool) -> Result<LaneKeys> {
    let group = group.map(|g| g as u64);
    match (lanes, group, barrier) {
        ([], None, false) => Ok(LaneKeys::Free),
        ([lane], group, false) => Ok(LaneKeys::One { lane: *lane as u64, group }),
        ([a, b], Some(group), false) => Ok(LaneKeys::Two { lanes: [*a as u64, *b as u64], group }),
        ([], Some(group), true) => Ok(LaneKeys::Barrier { group }),
        _ => Err(Error::protocol(format!(
            "watership.parked: {} lanes, table {group:?}, barrier {barrier} do not go together",
            lanes.len()
        ))),
    }
}

#[derive(Serialize)]
struct JsonKey {
    epoch: u32,
    mark: u64,
    ordinal: u64,
    sub: u32,
    route: String,
    part: u16,
}

impl JsonKey {
    fn of(key: &ParkedKey) -> Self {
        let Position { epoch, mark, ordinal, sub } = key.position;
        let route = key.route.to_string();
        Self { epoch, mark: mark.0, ordinal, sub, route, part: key.part }
    }
}

#[derive(Serialize)]
struct JsonRow<'a> {
    #[serde(flatten)]
    key: JsonKey,
    state: RowState,
    kind: Why,
    error: &'a str,
    attempts: u32,
    event_id: String,
    source: &'a str,
    #[serde(rename = "key")]
    key_text: &'a str,
    committed_at_us: i64,
    lanes: Vec<i64>,
    table_lane: Option<i64>,
    barrier: bool,
    lanes_keyed: bool,
    rules: Option<&'a str>,
    event: Option<&'a RawValue>,
    routing_key: Option<&'a str>,
    properties: Option<String>,
    body: Option<String>,
}

#[derive(Serialize)]
struct JsonChange {
    #[serde(flatten)]
    key: JsonKey,
    state: RowState,
    kind: Option<Why>,
    error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_survive_the_trip_through_the_database() {
        for lanes in [
            LaneKeys::Free,
            LaneKeys::One { lane: u64::MAX, group: None },
            LaneKeys::One { lane: 1, group: Some(u64::MAX - 1) },
            LaneKeys::Two { lanes: [1, u64::MAX], group: 3 },
            LaneKeys::Barrier { group: 1 << 63 },
        ] {
            let (keys, group, barrier) = lanes_to_columns(lanes);
            assert_eq!(lanes_from_columns(&keys, group, barrier).unwrap(), lanes);
        }
        assert!(lanes_from_columns(&[1, 2], None, false).is_err());
        assert!(lanes_from_columns(&[1], Some(1), true).is_err());
    }

    #[test]
    fn words_are_read_back() {
        for why in Why::ALL {
            assert_eq!(Why::parse(why.as_str()), why);
            assert_eq!(serde_json::to_string(&why).unwrap(), format!("{:?}", why.as_str()));
        }
        for text in ["parked", "retrying", "released", "discarded"] {
            let state = RowState::parse(text).unwrap();
            assert_eq!(state.as_str(), text);
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("{text:?}"));
        }
        assert!(RowState::parse("lost").is_err());
    }
}
