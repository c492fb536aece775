//! `watership parked`: lists, retries and discards what could not be published.
//!
//! Nothing is published from here. Rows are marked, and the running relay does the rest, in the
//! order of each key.

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use tokio_postgres::{Client, Row};

use super::printable::{lines, one_line};
use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::position::{Mark, Position};
use crate::relay::parking::row::Why;

/// Options of `parked`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml parked list\n  \
    watership --config shop.toml parked show 17\n  \
    watership --config shop.toml parked retry --key order/42\n  \
    watership --config shop.toml parked discard 17 --reason 'created by a test, ticket 311'\n  \
    watership --config shop.toml parked discard --key order/42 --reason 'the same'\n\n\
    Later messages with the key of a parked one are parked too. A retry covers the whole key, in \
    order. What follows a discarded row is published by the relay, without a retry.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List rows, in the order of the stream.
    List {
        /// Only this route.
        #[arg(long)]
        route: Option<String>,
        /// Only this key, such as order/42.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// Only rows in this state.
        #[arg(long, value_enum, default_value_t = Which::Waiting)]
        state: Which,
        /// Maximum number of rows.
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Show one row with its contents.
    Show {
        /// The id in the list.
        id: i64,
        /// Show all of a long body or row.
        #[arg(long)]
        full: bool,
    },
    /// Have the relay retry rows, each with its whole key, in order.
    #[command(group = clap::ArgGroup::new("which").required(true).multiple(false)
        .args(["ids", "route", "key", "all"]))]
    Retry {
        /// The ids in the list.
        ids: Vec<i64>,
        /// All rows of this route; '' for events that no route selects.
        #[arg(long)]
        route: Option<String>,
        /// All rows with this key.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// All rows.
        #[arg(long)]
        all: bool,
    },
    /// Discard rows: they will never be published. Discarding a key's first row unblocks the rows
    /// after it: the relay then publishes them automatically, stopping at the next row with its own
    /// error.
    #[command(group = clap::ArgGroup::new("which").required(true).multiple(false)
        .args(["ids", "route", "key", "all"]))]
    Discard {
        /// The ids in the list.
        ids: Vec<i64>,
        /// All waiting rows of this route; '' for events that no route selects.
        #[arg(long)]
        route: Option<String>,
        /// All waiting rows with this key.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// All waiting rows.
        #[arg(long)]
        all: bool,
        /// Why; stored with the rows.
        #[arg(long)]
        reason: String,
    },
}

/// Bytes of a body or row that are shown without `--full`.
const SHOWN_MAX: i32 = 2048;
/// Bytes on a line of hexadecimal digits.
const HEX_WIDTH: usize = 32;

/// States of a row, as `--state` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    /// Parked or retrying.
    Waiting,
    /// Waiting for you to retry or discard it.
    Parked,
    /// Waiting for the relay to publish it.
    Retrying,
    /// Published by a retry.
    Released,
    /// Never to be published.
    Discarded,
    /// Any of these.
    All,
}

impl Which {
    fn states(self) -> Vec<&'static str> {
        match self {
            Which::Waiting => vec!["parked", "retrying"],
            Which::Parked => vec!["parked"],
            Which::Retrying => vec!["retrying"],
            Which::Released => vec!["released"],
            Which::Discarded => vec!["discarded"],
            Which::All => vec!["parked", "retrying", "released", "discarded"],
        }
    }
}

#[derive(Serialize)]
pub(super) struct Listed {
    pub(super) id: i64,
    pub(super) state: String,
    pub(super) kind: String,
    pub(super) route: String,
    pub(super) key: String,
    source: String,
    position: String,
    pub(super) attempts: i32,
    /// Why it was parked.
    pub(super) error: String,
    /// Why its last retry failed.
    last_kind: Option<String>,
    pub(super) last_error: Option<String>,
    event_id: String,
    age_seconds: f64,
    changed_by: Option<String>,
    note: Option<String>,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    row: Listed,
    hint: &'static str,
    committed_at: String,
    parked_at: String,
    /// The raw row; absent when the message was kept.
    event: Option<serde_json::Value>,
    routing_key: Option<String>,
    /// The message's body, if it is text.
    body: Option<String>,
    /// The same in hexadecimal digits, if it is not.
    body_hex: Option<String>,
    /// Size of row or body.
    bytes: i32,
}

#[derive(Serialize)]
struct Marked {
    /// Rows that the relay will retry.
    retrying: Vec<i64>,
}

#[derive(Serialize)]
struct Discarded {
    discarded: Vec<i64>,
    /// How many of them were being retried.
    were_retrying: i64,
    /// Other rows with the same keys that are still waiting.
    following: i64,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let name = &config.relay.name;
    match &args.command {
        Command::List { route, key, state, limit } => {
            let limit = i64::from(*limit);
            // One more than is shown tells whether there are more.
            let mut rows = list(&client, name, *state, route, key, limit + 1).await?;
            let more = rows.len() as i64 > limit;
            rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
            print_list(&rows, more, out);
            out.data(&rows)?;
        }
        Command::Show { id, full } => show(&client, name, *id, *full, out).await?,
        Command::Retry { ids, route, key, all } => {
            let retrying = retry(&client, name, ids, route, key, *all).await?;
            out.line(&format!("the relay will retry {} rows", retrying.len()));
            out.data(&Marked { retrying })?;
        }
        Command::Discard { ids, route, key, all, reason } => {
            let discarded = discard(&client, name, ids, route, key, *all, reason).await?;
            print_discarded(&discarded, out);
            out.data(&discarded)?;
        }
    }
    Ok(End::Fine)
}

async fn list(
    client: &Client,
    name: &str,
    state: Which,
    route: &Option<String>,
    key: &Option<String>,
    limit: i64,
) -> Result<Vec<Listed>> {
    const SQL: &str = include_str!("../../sql/query/parked_list.sql");
    let rows = unnamed::query(client, SQL, &[&name, &state.states(), route, key, &limit]).await;
    rows.map_err(postgres_error)?.iter().map(listed).collect()
}

pub(super) fn listed(row: &Row) -> Result<Listed> {
    let text = |i: usize| row.try_get::<_, String>(i).map_err(postgres_error);
    let int = |i: usize| row.try_get::<_, i64>(i).map_err(postgres_error);
    let maybe = |i: usize| row.try_get::<_, Option<String>>(i).map_err(postgres_error);
    let position = Position {
        epoch: int(6)?.try_into().unwrap_or_default(),
        mark: Mark(int(7)?.try_into().unwrap_or_default()),
        ordinal: int(8)?.try_into().unwrap_or_default(),
        sub: int(9)?.try_into().unwrap_or_default(),
    };
    Ok(Listed {
        id: int(0)?,
        state: text(1)?,
        kind: text(2)?,
        route: text(3)?,
        key: text(4)?,
        source: text(5)?,
        position: position.to_string(),
        attempts: row.try_get(10).map_err(postgres_error)?,
        error: text(11)?,
        event_id: text(12)?,
        age_seconds: row.try_get(13).map_err(postgres_error)?,
        changed_by: maybe(14)?,
        note: maybe(15)?,
        last_kind: maybe(16)?,
        last_error: maybe(17)?,
    })
}

fn print_list(rows: &[Listed], more: bool, out: Out) {
    if rows.is_empty() {
        return out.line("nothing is parked");
    }
    out.line(&format!(
        "{:>6} {:<9} {:<10} {:<16} {:<24} {:>8} {:>5}  error",
        "id", "state", "kind", "route", "key", "age", "tries"
    ));
    for row in rows {
        let Listed { id, state, kind, route, key, attempts, error, age_seconds, .. } = row;
        let (route, age) = (if route.is_empty() { "-" } else { route }, age(*age_seconds));
        // What failed last is what is to be fixed now.
        let kind = row.last_kind.as_ref().unwrap_or(kind);
        let error = row.last_error.as_ref().unwrap_or(error);
        let (kind, route, key, error) =
            (one_line(kind), one_line(route), one_line(key), one_line(error));
        out.line(&format!(
            "{id:>6} {state:<9} {kind:<10} {route:<16} {key:<24} {age:>8} {attempts:>5}  \
             {error:.100}"
        ));
    }
    if more {
        out.line(&format!("... there are more than these {}; see --limit", rows.len()));
    }
}

/// A duration in the unit that suits it.
pub(super) fn age(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

async fn one(client: &Client, name: &str, id: i64) -> Result<Listed> {
    const SQL: &str = include_str!("../../sql/query/parked_row.sql");
    let row = unnamed::query_opt(client, SQL, &[&name, &id]).await.map_err(postgres_error)?;
    row.as_ref().map(listed).transpose()?.ok_or_else(|| no_row(name, id))
}

fn no_row(name: &str, id: i64) -> Error {
    Error::refused(format!("relay {name:?} has no parked row {id}"))
        .hint("`watership parked list --state all` lists its rows")
}

async fn show(client: &Client, name: &str, id: i64, full: bool, out: Out) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/parked_content.sql");
    let row = one(client, name, id).await?;
    let limit = if full || out.json { i32::MAX } else { SHOWN_MAX };
    let content =
        unnamed::query_one(client, SQL, &[&name, &id, &limit]).await.map_err(postgres_error)?;
    let maybe = |i: usize| content.try_get::<_, Option<String>>(i).map_err(postgres_error);
    let (event, body): (_, Option<Vec<u8>>) =
        (maybe(0)?, content.try_get(2).map_err(postgres_error)?);
    let bytes: i32 = content.try_get(5).map_err(postgres_error)?;
    let text = body.as_deref().and_then(|body| text_of(body, bytes));
    let shown = Shown {
        hint: Why::parse(row.last_kind.as_ref().unwrap_or(&row.kind)).hint(),
        committed_at: content.try_get(3).map_err(postgres_error)?,
        parked_at: content.try_get(4).map_err(postgres_error)?,
        event: event.as_ref().and_then(|json| serde_json::from_str(json).ok()),
        routing_key: maybe(1)?,
        body: text.map(str::to_owned),
        body_hex: body.as_deref().filter(|_| text.is_none()).map(hex),
        bytes,
        row,
    };
    print_row(&shown, out);
    if let Some(event) = &event {
        let pretty = shown.event.as_ref().map(|event| format!("{event:#}"));
        print_content("row", pretty.as_ref().unwrap_or(event), event.len(), bytes, out);
    }
    if let (Some(body), Some(size)) = (&shown.body, body.as_ref().map(Vec::len)) {
        print_content("body", body, size, bytes, out);
    }
    if let Some(hex) = &shown.body_hex {
        let digits = hex.as_bytes().chunks(2 * HEX_WIDTH).map(String::from_utf8_lossy);
        let digits: Vec<_> = digits.collect();
        print_content("body (hex)", &digits.join("\n"), hex.len() / 2, bytes, out);
    }
    out.data(&shown)
}

fn print_row(shown: &Shown, out: Out) {
    let line = |name: &str, value: &str| out.line(&format!("{name:<12} {}", one_line(value)));
    let row = &shown.row;
    line("id", &row.id.to_string());
    line("state", &row.state);
    line("kind", &row.kind);
    line("route", &row.route);
    line("key", &row.key);
    line("source", &row.source);
    line("event id", &row.event_id);
    line("position", &row.position);
    line("committed", &shown.committed_at);
    line("parked", &shown.parked_at);
    line("tries", &row.attempts.to_string());
    line("error", &row.error);
    if let (Some(kind), Some(error)) = (&row.last_kind, &row.last_error) {
        line("last retry", &format!("failed, {kind}: {error}"));
    }
    line("hint", shown.hint);
    for (name, value) in
        [("changed by", &row.changed_by), ("note", &row.note), ("routing key", &shown.routing_key)]
    {
        value.iter().for_each(|value| line(name, value));
    }
}

/// Prints `text` below `name`, indented, so that no line of it can be taken for one of ours.
pub(super) fn print_content(name: &str, text: &str, shown: usize, bytes: i32, out: Out) {
    out.line(&format!("{name:<12} {bytes} bytes"));
    text.split('\n').for_each(|part| out.line(&format!("    {}", lines(part))));
    let more = usize::try_from(bytes).unwrap_or_default().saturating_sub(shown);
    if more > 0 {
        out.line(&format!("    ... and {more} bytes more; --full shows all"));
    }
}

/// A body of `bytes` bytes, of which `body` may be the beginning, as text; absent if it is not.
fn text_of(body: &[u8], bytes: i32) -> Option<&str> {
    match std::str::from_utf8(body) {
        Ok(text) => Some(text),
        // The cut went through a character.
        Err(error) if error.error_len().is_none() && (body.len() as i64) < i64::from(bytes) => {
            std::str::from_utf8(&body[..error.valid_up_to()]).ok()
        }
        Err(_) => None,
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn retry(
    client: &Client,
    name: &str,
    ids: &[i64],
    route: &Option<String>,
    key: &Option<String>,
    all: bool,
) -> Result<Vec<i64>> {
    const ALL: &str = include_str!("../../sql/query/parked_retry_all.sql");
    const SOME: &str = include_str!("../../sql/query/parked_retry.sql");
    for id in ids {
        is_waiting(client, name, *id, "retried").await?;
    }
    let rows = if all || route.is_some() {
        unnamed::query(client, ALL, &[&name, route]).await
    } else {
        unnamed::query(client, SOME, &[&name, &ids, key]).await
    };
    let rows = rows.map_err(postgres_error)?;
    // Matching rows may have been marked already; of all there may be none.
    if rows.is_empty()
        && ids.is_empty()
        && !all
        && list(client, name, Which::Waiting, route, key, 1).await?.is_empty()
    {
        return Err(no_match(name));
    }
    rows.iter().map(|r| r.try_get(0).map_err(postgres_error)).collect()
}

/// Refuses a row that was released or discarded, or is not there.
async fn is_waiting(client: &Client, name: &str, id: i64, done: &str) -> Result<()> {
    let row = one(client, name, id).await?;
    if Which::Waiting.states().contains(&&*row.state) {
        return Ok(());
    }
    let what = format!("row {id} is {}; only waiting rows can be {done}", row.state);
    Err(Error::refused(what).hint(format!("nothing was {done}")))
}

fn no_match(name: &str) -> Error {
    Error::refused(format!("relay {name:?} has no waiting rows that match"))
        .hint("`watership parked list` lists them")
}

async fn discard(
    client: &Client,
    name: &str,
    ids: &[i64],
    route: &Option<String>,
    key: &Option<String>,
    all: bool,
    reason: &str,
) -> Result<Discarded> {
    const SQL: &str = include_str!("../../sql/query/parked_discard.sql");
    if reason.trim().is_empty() {
        return Err(Error::config("--reason is empty; say why the rows are discarded"));
    }
    for id in ids {
        is_waiting(client, name, *id, "discarded").await?;
    }
    let found = unnamed::query_one(client, SQL, &[&name, &ids, key, route, &all, &reason]).await;
    let found = found.map_err(postgres_error)?;
    let discarded: Vec<i64> = found.try_get(0).map_err(postgres_error)?;
    if discarded.is_empty() {
        return Err(no_match(name));
    }
    Ok(Discarded {
        discarded,
        were_retrying: found.try_get(1).map_err(postgres_error)?,
        following: found.try_get(2).map_err(postgres_error)?,
    })
}

fn print_discarded(done: &Discarded, out: Out) {
    match &*done.discarded {
        [id] => out.line(&format!("discarded row {id}")),
        ids => out.line(&format!("discarded {} rows", ids.len())),
    }
    if done.were_retrying > 0 {
        let retried = done.were_retrying;
        out.line(&format!(
            "{retried} of them were being retried; what is on its way is published all the same"
        ));
    }
    if done.following > 0 {
        out.line(&format!(
            "{} rows with the same key follow; a running relay publishes them now, in order, \
             stopping at the next row with its own error. To discard them as well: `watership \
             parked discard --key …`",
            done.following
        ));
    }
}
