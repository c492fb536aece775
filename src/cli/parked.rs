//! `watership parked`: lists, retries and discards what could not be published.
//!
//! Nothing is published from here. Rows are marked, and the running relay does the rest, in the
//! order of each key.

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use tokio_postgres::{Client, Row};

use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::position::{Mark, Position};
use crate::relay::parking::row::Why;

/// Options of `parked`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml parked list\n  \
    watership --config shop.toml parked show 17\n  \
    watership --config shop.toml parked retry --key order/42\n  \
    watership --config shop.toml parked discard 17 --reason 'created by a test, ticket 311'\n\n\
    Later messages with the key of a parked one are parked too. A retry covers the whole key, in \
    order.")]
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
        #[arg(long)]
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
        #[arg(long)]
        key: Option<String>,
        /// All rows.
        #[arg(long)]
        all: bool,
    },
    /// Discard a row: it will never be published.
    Discard {
        /// The id in the list.
        id: i64,
        /// Why; stored with the row.
        #[arg(long)]
        reason: String,
    },
}

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
struct Listed {
    id: i64,
    state: String,
    kind: String,
    route: String,
    key: String,
    source: String,
    position: String,
    attempts: i32,
    error: String,
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
    body: Option<String>,
}

#[derive(Serialize)]
struct Marked {
    /// Rows that the relay will retry.
    retrying: Vec<i64>,
}

#[derive(Serialize)]
struct Discarded {
    discarded: i64,
    /// Rows with the same key that are still waiting.
    waiting_of_its_key: i64,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let name = &config.relay.name;
    match &args.command {
        Command::List { route, key, state, limit } => {
            let rows = list(&client, name, *state, route, key, i64::from(*limit)).await?;
            print_list(&rows, out);
            out.data(&rows)?;
        }
        Command::Show { id } => show(&client, name, *id, out).await?,
        Command::Retry { ids, route, key, all } => {
            let retrying = retry(&client, name, ids, route, key, *all).await?;
            out.line(&format!("the relay will retry {} rows", retrying.len()));
            out.data(&Marked { retrying })?;
        }
        Command::Discard { id, reason } => discard(&client, name, *id, reason, out).await?,
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
    let rows = client.query(SQL, &[&name, &state.states(), route, key, &limit]).await;
    rows.map_err(postgres_error)?.iter().map(listed).collect()
}

fn listed(row: &Row) -> Result<Listed> {
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
    })
}

fn print_list(rows: &[Listed], out: Out) {
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
        out.line(&format!(
            "{id:>6} {state:<9} {kind:<10} {route:<16} {key:<24} {age:>8} {attempts:>5}  \
             {error:.100}"
        ));
    }
}

/// A duration in the unit that suits it.
fn age(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} d", s / 86_400.0),
    }
}

async fn one(client: &Client, name: &str, id: i64) -> Result<Listed> {
    const SQL: &str = include_str!("../../sql/query/parked_row.sql");
    let row = client.query_opt(SQL, &[&name, &id]).await.map_err(postgres_error)?;
    row.as_ref().map(listed).transpose()?.ok_or_else(|| no_row(name, id))
}

fn no_row(name: &str, id: i64) -> Error {
    Error::refused(format!("relay {name:?} has no parked row {id}"))
        .hint("`watership parked list --state all` lists its rows")
}

async fn show(client: &Client, name: &str, id: i64, out: Out) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/parked_content.sql");
    let row = one(client, name, id).await?;
    let content = client.query_one(SQL, &[&name, &id]).await.map_err(postgres_error)?;
    let maybe = |i: usize| content.try_get::<_, Option<String>>(i).map_err(postgres_error);
    let body: Option<Vec<u8>> = content.try_get(2).map_err(postgres_error)?;
    let hint = Why::parse(&row.kind).hint();
    let shown = Shown {
        hint,
        committed_at: content.try_get(3).map_err(postgres_error)?,
        parked_at: content.try_get(4).map_err(postgres_error)?,
        event: maybe(0)?.and_then(|json| serde_json::from_str(&json).ok()),
        routing_key: maybe(1)?,
        body: body.map(|body| String::from_utf8_lossy(&body).into_owned()),
        row,
    };
    let line = |name: &str, value: &str| out.line(&format!("{name:<12} {value}"));
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
    line("hint", shown.hint);
    for (name, value) in [("changed by", &row.changed_by), ("note", &row.note)] {
        value.iter().for_each(|value| line(name, value));
    }
    shown.routing_key.iter().for_each(|key| line("routing key", key));
    shown.body.iter().for_each(|body| line("body", body));
    if let Some(event) = &shown.event {
        line("row", &format!("{event:#}"));
    }
    out.data(&shown)
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
        one(client, name, *id).await?;
    }
    let rows = if all || route.is_some() {
        client.query(ALL, &[&name, route]).await
    } else {
        client.query(SOME, &[&name, &ids, key]).await
    };
    rows.map_err(postgres_error)?.iter().map(|r| r.try_get(0).map_err(postgres_error)).collect()
}

async fn discard(client: &Client, name: &str, id: i64, reason: &str, out: Out) -> Result<()> {
    const SQL: &str = include_str!("../../sql/query/parked_discard.sql");
    if reason.trim().is_empty() {
        return Err(Error::config("--reason is empty; say why the row is discarded"));
    }
    let found = client.query_opt(SQL, &[&name, &id, &reason]).await.map_err(postgres_error)?;
    let Some(found) = found else {
        let row = one(client, name, id).await?;
        let state = row.state;
        let text = format!("row {id} is {state}; only parked or retrying rows can be discarded");
        return Err(Error::refused(text));
    };
    let waiting: i64 = found.try_get(0).map_err(postgres_error)?;
    out.line(&format!("discarded row {id}"));
    if waiting > 0 {
        out.line(&format!(
            "{waiting} rows with the same key are still waiting; `watership parked list` shows \
             them, `watership parked retry` publishes them"
        ));
    }
    out.data(&Discarded { discarded: id, waiting_of_its_key: waiting })
}
