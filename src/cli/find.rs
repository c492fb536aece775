//! `watership find`: where an event is, or the latest ones of a key. It says what is known from the
//! outbox, from `watership.parked` and from the running relay, and what cannot be known.

use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use uuid::Uuid;

use super::parked::{Listed, listed};
use super::printable::one_line;
use super::{End, Out, ask, outbox};
use crate::config::Config;
use crate::envelope::{PARTS_MAX, message_id};
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::Lsn;
use crate::route::{Action, Router, Rule, Select};
use crate::source::SourceKind;

/// Options of `find`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml find 0d5f3f6e-7a1c-4d0e-9c53-2f4d8d1c9e11\n  \
    watership --config shop.toml find --key order/42\n\n\
    ID is the id of an event or the message_id of a message. It takes up to 12 s when the relay \
    has to see how far the stream is.\n\
    Exit codes: 0 found, 1 not found or a server is unreachable.")]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(false).args(["id", "key"]))]
pub(super) struct Args {
    /// The id of the event.
    #[arg(value_parser = event_id)]
    pub(super) id: Option<Uuid>,
    /// The latest events of this key, such as order/42.
    #[arg(long, allow_hyphen_values = true)]
    pub(super) key: Option<String>,
}

/// Rows that are shown of a key.
const ROWS_MAX: i64 = 10;
/// How long the stream may take to pass a row: a canary, which is written every ten seconds, says
/// that it has.
const PATIENCE: Duration = Duration::from_secs(12);
/// How long a relay that polls may take to pass a row that is new: a look and a checkpoint.
const CHECKPOINT_PATIENCE: Duration = Duration::from_secs(3);
/// Between two questions to the relay.
const ASK_EVERY: Duration = Duration::from_millis(500);

#[derive(Serialize)]
struct Report {
    /// Rows of the outbox, the newest first.
    outbox: Vec<Row>,
    /// Rows of `watership.parked`, the newest first.
    parked: Vec<Listed>,
    /// What the running relay says; absent when it cannot be queried.
    relay: Option<Value>,
    /// Why it cannot be queried.
    relay_error: Option<String>,
}

/// A row of the outbox.
#[derive(Serialize)]
struct Row {
    id: String,
    key: String,
    event_type: String,
    created_at: String,
    /// What the routes, as they are configured now, do with it.
    routes: Vec<String>,
    checkpoint: Passed,
    #[serde(skip)]
    end_of_wal: Lsn,
}

/// Whether the relay is past an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Passed {
    /// The checkpoint was stored before the event was committed.
    NotYet,
    /// The checkpoint covers it, or will with its next write: it was published, dropped or parked.
    Yes,
    Unknown,
}

impl Passed {
    fn say(self) -> &'static str {
        match self {
            Passed::NotYet => {
                "not passed: it was committed after the checkpoint was stored, or (polling) its \
                 batch is not settled"
            }
            Passed::Yes => "passed: it was confirmed, dropped by its route, or parked",
            Passed::Unknown => {
                "cannot be known: rows do not say where in the WAL they were committed, and no \
                 running relay could say how far the stream is"
            }
        }
    }
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let router = Router::new(&config.relay.rules)?;
    let mut found = rows(&client, config, args).await?;
    let until = Instant::now() + CHECKPOINT_PATIENCE;
    let is_open = |row: &Row| row.checkpoint != Passed::Yes;
    while config.relay.kind == SourceKind::Poll
        && found.iter().any(is_open)
        && Instant::now() < until
    {
        sleep(ASK_EVERY).await;
        found = rows(&client, config, args).await?;
    }
    // The relay first: what it parks meanwhile is found in the table afterwards.
    let query = match (&args.id, &args.key) {
        (Some(id), _) => format!("id={id}"),
        (None, key) => {
            let key = key.as_deref().unwrap_or_default();
            format!("key={}", utf8_percent_encode(key, NON_ALPHANUMERIC))
        }
    };
    let asked = sighting(config, &query, &mut found).await;
    let ids: Vec<Uuid> = args.id.iter().flat_map(|id| ids_of(&router, *id)).collect();
    let parked = parked(&client, config, &ids, &args.key).await?;
    let (relay, relay_error) = match asked {
        Ok(relay) => (Some(relay), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let report = Report { outbox: found, parked, relay, relay_error };
    print(&report, out);
    out.data(&report)?;
    let seen = ["window", "confirmed"].iter().any(|list| {
        report.relay.as_ref().and_then(|r| r[list].as_array()).is_some_and(|l| !l.is_empty())
    });
    let found = seen || !report.outbox.is_empty() || !report.parked.is_empty();
    Ok(if found { End::Fine } else { End::Failed })
}

async fn rows(client: &Client, config: &Config, args: &Args) -> Result<Vec<Row>> {
    const SQL: &str = include_str!("../../sql/query/find_outbox.sql");
    let name = &config.relay.name;
    let found = match outbox::rows(client, config, args, ROWS_MAX).await? {
        Some(found) => found,
        None => {
            let found = unnamed::query(client, SQL, &[&name, &args.id, &args.key, &ROWS_MAX]).await;
            found.map_err(postgres_error)?
        }
    };
    let row = |row: &tokio_postgres::Row| {
        let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
        let flag = |i: usize| row.try_get::<_, bool>(i).map_err(postgres_error);
        let checkpoint = match (flag(5)?, flag(6)?) {
            (true, _) => Passed::NotYet,
            (false, true) => Passed::Yes,
            (false, false) => Passed::Unknown,
        };
        Ok(Row {
            id: text(0)?,
            routes: routes(&config.relay.rules, &text(2)?, &text(1)?),
            key: text(1)?,
            event_type: text(3)?,
            created_at: text(4)?,
            checkpoint,
            end_of_wal: text(7)?.parse()?,
        })
    };
    found.iter().map(row).collect()
}

/// What the rules do with an outbox event of this type and key.
fn routes(rules: &[Rule], kind: &str, key: &str) -> Vec<String> {
    let selects = |rule: &&Rule| match &rule.select {
        Select::Outbox { aggregate_type } => aggregate_type == "*" || aggregate_type == kind,
        Select::Table { .. } => false,
    };
    let say = |rule: &Rule| match &rule.action {
        Action::Publish { address, partitions, .. } => {
            let exchanges: Vec<String> =
                address.exchanges().iter().map(|name| format!("{name:?}")).collect();
            let exchange = exchanges.join(" or ");
            let queue = partitions.as_ref().map_or_else(String::new, |partitions| {
                format!(" for queue {:?}", partitions.name(partitions.of_key(key)))
            });
            format!("route {:?} publishes it to exchange {exchange}{queue}", rule.name)
        }
        Action::Drop => format!("route {:?} drops it", rule.name),
    };
    rules.iter().filter(selects).map(say).collect()
}

fn event_id(text: &str) -> std::result::Result<Uuid, &'static str> {
    text.parse().map_err(|_| "it is not a UUID; for the events of a key: --key")
}

/// The id, and the ids that the routes give to the messages of an event with this id.
fn ids_of(router: &Router, id: Uuid) -> Vec<Uuid> {
    let of_route = |route| (0..PARTS_MAX).map(move |part| message_id(id, route, part));
    router.publishing().flat_map(|route| of_route(route)).chain([id]).collect()
}

async fn parked(
    client: &Client,
    config: &Config,
    ids: &[Uuid],
    key: &Option<String>,
) -> Result<Vec<Listed>> {
    const SQL: &str = include_str!("../../sql/query/find_parked.sql");
    let rows = unnamed::query(client, SQL, &[&config.relay.name, &ids, key, &ROWS_MAX]).await;
    rows.map_err(postgres_error)?.iter().map(listed).collect()
}

/// What the relay knows. Where only its stream can tell whether it is past the rows, waits a while
/// for it to get there.
async fn sighting(config: &Config, query: &str, rows: &mut [Row]) -> Result<Value> {
    let address = config.admin.listen.ok_or_else(|| {
        Error::config("admin.listen is empty, so the relay cannot be queried")
            .hint("set admin.listen")
    })?;
    ask::status(&config.relay.name, address).await?;
    let until = Instant::now() + PATIENCE;
    loop {
        let (code, body) = ask::get(address, &format!("/find?{query}")).await?;
        if code != 200 {
            return Err(Error::unreachable(format!("the relay cannot tell: {}", body.trim())));
        }
        let seen: Value = serde_json::from_str(&body).map_err(|e| {
            Error::protocol(format!("{address}/find does not answer with JSON")).caused_by(e)
        })?;
        let received: Option<Lsn> =
            seen["received_lsn"].as_str().and_then(|text| text.parse().ok());
        let waits = seen["window"].as_array().is_some_and(|list| !list.is_empty());
        let known = waits || seen["confirmed"].as_array().is_some_and(|list| !list.is_empty());
        // The stream is in order: it has brought what was committed before there.
        let passed = |row: &&mut Row| received.is_some_and(|at| at >= row.end_of_wal);
        if !waits {
            rows.iter_mut().filter(passed).for_each(|row| row.checkpoint = Passed::Yes);
        }
        let open = rows.iter().any(|row| row.checkpoint != Passed::Yes);
        let said = config.relay.kind == SourceKind::Poll;
        if known || said || !open || Instant::now() >= until {
            return Ok(seen);
        }
        sleep(ASK_EVERY).await;
    }
}

fn print(report: &Report, out: Out) {
    let line = |name: &str, value: &str| out.line(&format!("{name:<12} {}", one_line(value)));
    if report.outbox.is_empty() {
        line(
            "outbox",
            "no such row: it was never committed, has been removed (outbox.retain), or \
             it is a captured-table change, or it was emitted by emit_wal, which keeps no row",
        );
    }
    for row in &report.outbox {
        let Row { id, key, event_type, created_at, .. } = row;
        line("outbox", &format!("{id}, {key}, {event_type}, made at {created_at}"));
        match &*row.routes {
            [] => line("routes", "none selects it: it is parked"),
            routes => line("routes", &routes.join("; ")),
        }
        line("checkpoint", row.checkpoint.say());
    }
    for row in &report.parked {
        let Listed { id, state, kind, route, key, attempts, error, .. } = row;
        let error = row.last_error.as_ref().unwrap_or(error);
        line("parked", &format!("row {id}, {state}: {kind}, {error}"));
        line("", &format!("key {key}, route {route:?}, {attempts} tries"));
    }
    if report.parked.is_empty() {
        line("parked", "no");
    }
    let relay = match (&report.relay, &report.relay_error) {
        (Some(relay), _) => relay,
        (None, why) => {
            let why = why.as_deref().unwrap_or_default();
            return line("relay", &format!("was not asked: {why}"));
        }
    };
    let list = |name: &str| relay[name].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for waiting in list("window") {
        let (route, position) = (text(&waiting["route"]), text(&waiting["position"]));
        let waits_for = text(&waiting["waits_for"]);
        line("window", &format!("route {route:?}, at {position}, waits for {waits_for}"));
    }
    match relay["more"].as_u64() {
        Some(more) if more > 0 => line("window", &format!("and {more} more")),
        _ if list("window").is_empty() => line("window", "no"),
        _ => {}
    }
    for confirmed in list("confirmed") {
        let seconds = confirmed["seconds_ago"].as_f64().unwrap_or_default();
        let route = text(&confirmed["route"]);
        line("confirmed", &format!("route {route:?}, {seconds:.0} s ago"));
    }
    if list("confirmed").is_empty() {
        let count = relay["remembered"].as_u64().unwrap_or_default();
        let seconds = relay["remembered_seconds"].as_f64().unwrap_or_default();
        let what = "not among the confirms that the relay remembers";
        line("confirmed", &format!("{what}: {count}, of {seconds:.0} s; by id only"));
    }
}
