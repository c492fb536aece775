//! `[outbox]`: the relay's own outbox and its retention, or a table of the application's by column
//! mapping.
//!
//! Invariant: a key that belongs to the other kind of outbox is a problem, never without effect.

use std::time::Duration;

use super::section::{Scalar, Section};
use super::value::quoted;
use super::{DAY, MINUTE, YEAR};
use crate::envelope::is_reserved_header;
use crate::pg::publication::TableName;
use crate::source::SourceKind;
use crate::source::outbox::{AggregateType, OutboxNames, OutboxTable};

/// What `[outbox]` says.
pub(super) struct Outbox {
    pub(super) table: OutboxTable,
    pub(super) maintain: bool,
    pub(super) retain: Duration,
    pub(super) delete_after: Option<Duration>,
    pub(super) retained_for: Option<Duration>,
}

/// Where column names come from that are not given.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Watership,
    Debezium,
    OpenOutbox,
}

const TABLE: &str = "table";
const RETAINED_FOR: &str = "retained_for";
const RETAIN: Duration = DAY.saturating_mul(7);

/// All keys of the section. `captured` are the tables of `source.tables`.
pub(super) fn outbox(t: &mut Section<'_>, kind: SourceKind, captured: &[String]) -> Outbox {
    let maintain = t.flag("maintain", true);
    let retain = t.duration("retain", RETAIN, Duration::ZERO..=YEAR);
    let name = t.text(TABLE, "");
    let profile = t.word(
        "profile",
        &[
            ("watership", Profile::Watership),
            ("debezium", Profile::Debezium),
            ("open-outbox", Profile::OpenOutbox),
        ],
    );
    let mut columns = t.table("columns", "such as { id = \"event_id\" }");
    let given = Given::read(&mut columns);
    let constant = t.text("aggregate_type", "");
    let headers_from = headers_from(t);
    let order_by = column(t, "order_by");
    let xid = column(t, "xid");
    let delete_after = age(t, "delete_after");
    let retained_for = age(t, RETAINED_FOR);
    if name.is_empty() {
        let given = [
            (profile != Profile::Watership, "profile"),
            (!given.is_empty(), "columns"),
            (!constant.is_empty(), "aggregate_type"),
            (!headers_from.is_empty(), "headers_from"),
            (order_by.is_some(), "order_by"),
            (xid.is_some(), "xid"),
            (delete_after.is_some(), "delete_after"),
            (retained_for.is_some(), RETAINED_FOR),
        ];
        refuse_of_mapping(t, &given);
        let table = OutboxTable::default();
        return Outbox { table, maintain, retain, delete_after: None, retained_for: None };
    }
    if retain != RETAIN {
        let text = "outbox.retain is for the relay's own outbox; the rows of outbox.table stay \
                    unless outbox.delete_after is set";
        t.problem("retain", text);
    }
    let demanded = given.demanded();
    let (table, columns) = (mapped_table(t, &name, captured), given.names(t, profile, constant));
    if columns.payload.is_some() && columns.payload == columns.data {
        t.problem("columns", "outbox.columns names one column as payload and as data");
    }
    if delete_after.is_some() && columns.created_at.is_none() {
        t.problem(
            "delete_after",
            "outbox.delete_after goes by the age of a row: set outbox.columns.created_at",
        );
    }
    match kind {
        SourceKind::Wal => {
            let given = [
                ("order_by", order_by.is_some()),
                ("xid", xid.is_some()),
                (RETAINED_FOR, retained_for.is_some()),
            ];
            refuse_of_polling(t, &given);
        }
        SourceKind::Poll => check_retained(t, retained_for, delete_after),
    }
    // What routes ask for is read later, and the catalog by a session.
    let rest = OutboxTable::default();
    let table = OutboxTable { table, columns, demanded, headers_from, order_by, xid, ..rest };
    Outbox { table, maintain: false, retain, delete_after, retained_for }
}

fn mapped_table(t: &Section<'_>, name: &str, captured: &[String]) -> TableName {
    let parsed = name.parse::<TableName>().ok().filter(|table| !table.name.contains(['.', '"']));
    let expected = match &parsed {
        None => "\"schema.table\"",
        Some(table) if table.schema == "watership" => {
            "a table outside the relay's own schema; leave it empty for watership.outbox"
        }
        Some(_) if captured.iter().any(|captured| captured == name) => {
            "a table that is not in source.tables: its inserts are events already"
        }
        Some(_) => "",
    };
    if !expected.is_empty() {
        t.invalid(TABLE, format!("{name:?}"), expected);
    }
    parsed.unwrap_or_else(TableName::outbox)
}

/// What only a table of the application's needs.
fn refuse_of_mapping(t: &Section<'_>, keys: &[(bool, &str)]) {
    for (_, key) in keys.iter().filter(|(given, _)| *given) {
        let path = t.path(key);
        let text = format!(
            "{path} is for a table of your own: set outbox.table, or remove it; the relay's own \
             outbox has fixed columns, and outbox.retain"
        );
        t.problem(key, text);
    }
}

/// An age of rows; absent where it is `"0s"`.
fn age(t: &mut Section<'_>, key: &'static str) -> Option<Duration> {
    let age = t.duration(key, Duration::ZERO, Duration::ZERO..=YEAR * 10);
    if !age.is_zero() && age < MINUTE {
        t.invalid(key, quoted(age), "\"0s\", or 1m to 3650d");
    }
    (!age.is_zero()).then_some(age)
}

/// What only a source that polls needs.
fn refuse_of_polling(t: &Section<'_>, keys: &[(&str, bool)]) {
    for (key, _) in keys.iter().filter(|(_, given)| *given) {
        let path = t.path(key);
        let text = format!(
            "{path} is for source.mode = \"poll\": the WAL has the order of commits by itself; \
             remove it"
        );
        t.problem(key, text);
    }
}

/// The promise that polling of a mapped table rests on. Which columns it needs is compared with
/// the catalog, which can say how to add them.
fn check_retained(t: &Section<'_>, retained_for: Option<Duration>, delete_after: Option<Duration>) {
    let Some(retained_for) = retained_for else {
        let text = "source.mode = \"poll\" with outbox.table needs outbox.retained_for: for how \
                    long your applications leave a row after its commit, such as \"7d\"; a row \
                    that is deleted before it is read is not sent";
        return t.problem(RETAINED_FOR, text);
    };
    if let Some(delete_after) = delete_after.filter(|age| *age < retained_for) {
        let expected = format!("at least outbox.retained_for, which is {}", quoted(retained_for));
        t.invalid("delete_after", quoted(delete_after), expected);
    }
}

fn column(t: &mut Section<'_>, key: &'static str) -> Option<String> {
    Some(t.text(key, "")).filter(|name| !name.is_empty())
}

/// The columns that `columns` names itself.
struct Given {
    id: Option<String>,
    aggregate_type: Option<String>,
    aggregate_id: Option<String>,
    event_type: Option<String>,
    payload: Option<String>,
    data: Option<String>,
    content_type: Option<String>,
    headers: Option<String>,
    traceparent: Option<String>,
    created_at: Option<String>,
}

impl Given {
    fn read(t: &mut Section<'_>) -> Self {
        Self {
            id: column(t, "id"),
            aggregate_type: column(t, "aggregate_type"),
            aggregate_id: column(t, "aggregate_id"),
            event_type: column(t, "event_type"),
            payload: column(t, "payload"),
            data: column(t, "data"),
            content_type: column(t, "content_type"),
            headers: column(t, "headers"),
            traceparent: column(t, "traceparent"),
            created_at: column(t, "created_at"),
        }
    }

    fn optional(&self) -> [&Option<String>; 6] {
        let Self { payload, data, content_type, headers, traceparent, created_at, .. } = self;
        [payload, data, content_type, headers, traceparent, created_at]
    }

    fn is_empty(&self) -> bool {
        let needed = [&self.id, &self.aggregate_type, &self.aggregate_id, &self.event_type];
        needed.into_iter().chain(self.optional()).all(Option::is_none)
    }

    /// Of a column that is named and not needed, it is not taken silently that it is missing.
    fn demanded(&self) -> Vec<String> {
        self.optional().into_iter().flatten().cloned().collect()
    }

    /// With the names of the profile for those that are not given.
    fn names(self, t: &Section<'_>, profile: Profile, constant: String) -> OutboxNames {
        let of_profile = match profile {
            Profile::Watership => OutboxTable::default().columns,
            Profile::Debezium => debezium(),
            Profile::OpenOutbox => open_outbox(),
        };
        if self.aggregate_type.is_some() && !constant.is_empty() {
            t.problem(
                "aggregate_type",
                "outbox.aggregate_type and outbox.columns.aggregate_type are both set; remove one",
            );
        }
        let aggregate_type = match (self.aggregate_type, constant) {
            (Some(column), _) => AggregateType::Column(column),
            (None, constant) if !constant.is_empty() => AggregateType::Constant(constant),
            (None, _) => of_profile.aggregate_type,
        };
        // One that is given stands for the body alone.
        let (payload, data) = match (self.payload, self.data) {
            (None, None) => (of_profile.payload, of_profile.data),
            given => given,
        };
        OutboxNames {
            id: self.id.unwrap_or(of_profile.id),
            aggregate_type,
            aggregate_id: self.aggregate_id.unwrap_or(of_profile.aggregate_id),
            event_type: self.event_type.unwrap_or(of_profile.event_type),
            payload,
            data,
            content_type: self.content_type.or(of_profile.content_type),
            headers: self.headers.or(of_profile.headers),
            traceparent: self.traceparent.or(of_profile.traceparent),
            created_at: self.created_at.or(of_profile.created_at),
        }
    }
}

/// The columns of Debezium's outbox event router.
///
/// <https://debezium.io/documentation/reference/stable/transformations/outbox-event-router.html>
fn debezium() -> OutboxNames {
    OutboxNames {
        id: "id".into(),
        aggregate_type: AggregateType::Column("aggregatetype".into()),
        aggregate_id: "aggregateid".into(),
        event_type: "type".into(),
        payload: Some("payload".into()),
        data: None,
        content_type: None,
        headers: None,
        traceparent: None,
        created_at: None,
    }
}

/// The columns of the Open Outbox table that do not change after the insert. Its events are ordered
/// by partition key alone, whatever their type, so all of them are about one kind of thing.
///
/// <https://open-outbox.dev/concepts/table-schema>
fn open_outbox() -> OutboxNames {
    OutboxNames {
        id: "event_id".into(),
        aggregate_type: AggregateType::Constant("event".into()),
        aggregate_id: "partition_key".into(),
        event_type: "event_type".into(),
        payload: Some("payload".into()),
        data: None,
        content_type: None,
        headers: Some("headers".into()),
        traceparent: None,
        created_at: Some("created_at".into()),
    }
}

/// `headers_from = { "header" = "column" }`.
fn headers_from(t: &mut Section<'_>) -> Vec<(String, String)> {
    const KEY: &str = "headers_from";
    let mut found = t.table(KEY, "such as { eventVersion = \"version\" }");
    let mut list = Vec::new();
    for header in found.keys() {
        match found.scalar(header) {
            Some(Scalar::Text(column)) if !column.is_empty() => {
                let is_name = (1..=255).contains(&header.len())
                    && header.bytes().all(|byte| byte.is_ascii_graphic());
                if !is_name || is_reserved_header(header) {
                    let text = format!(
                        "outbox.headers_from has {header:?}; expected 1 to 255 printable ASCII \
                         characters, and not CC, BCC, x-* or ws-*"
                    );
                    found.problem(header, text);
                }
                list.push((header.to_owned(), column));
            }
            Some(_) => found.problem(
                header,
                format!("outbox.headers_from.{header} is not the name of a column in quotes"),
            ),
            None => {}
        }
    }
    list
}
