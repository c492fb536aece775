//! `watership backfill`: asks the running relay for the rows that a captured table has already, and
//! shows how far it is.
//!
//! Nothing is read or published from here: a row of `watership.backfill` is written or changed, and
//! the running relay does the rest.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use uuid::Uuid;

use super::findings::Findings;
use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::relay;
use crate::relay::backfill::active::look;
use crate::relay::backfill::keyset::From;
use crate::relay::backfill::runs::{self, Request, Run, RunState};
use crate::relay::backfill::shown::BackfillView;
use crate::source::SourceKind;

/// Options of `backfill`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Example:\n  watership --config shop.toml backfill public.customers\n  \
        watership --config shop.toml backfill public.orders --where \"day > '2026-01-01'\"\n  \
        watership --config shop.toml backfill pause public.orders\n  \
        watership --config shop.toml backfill list\n\n\
        The running relay reads the table in the order of its key and publishes its rows between \
        the live changes. This command waits for the end; Ctrl-C leaves the backfill running."
)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The captured table, schema.table.
    #[arg(required = true)]
    table: Option<String>,
    /// Only rows matching this SQL condition over the table's columns.
    #[arg(long = "where", value_name = "SQL", allow_hyphen_values = true)]
    condition: Option<String>,
    /// Begin at this key; once for each column of the key, in the order of its index.
    #[arg(long = "from", value_name = "VALUE", allow_hyphen_values = true)]
    from: Vec<String>,
    /// Do not wait for completion.
    #[arg(long)]
    detach: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the backfills, the oldest first.
    List,
    /// Pause the backfill of a table.
    Pause(Which),
    /// Resume a paused one.
    Resume(Which),
    /// End it; what was published stays published.
    Cancel(Which),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// The table, or the id of the backfill.
    which: Option<String>,
    /// All of them.
    #[arg(long)]
    all: bool,
}

/// How often the progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Without a relay that begins for this long, one is told that none seems to run.
const NOTICED: Duration = Duration::from_secs(15);

/// # Errors
/// What Postgres says, or why the table cannot be read.
pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    if config.relay.kind == SourceKind::Poll {
        let text =
            "a relay with source.mode = \"poll\" captures no tables, so none can be backfilled";
        return Err(Error::refused(text)
            .hint("use mode = \"wal\", or emit an event for each row with watership.emit"));
    }
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let name = &config.relay.name;
    match &args.command {
        None => start(&client, config, args, out).await,
        Some(Command::List) => {
            let listed: Vec<Listed> =
                runs::list(&client, name, false).await?.iter().map(Listed::of).collect();
            if listed.is_empty() {
                out.line("no backfills");
            }
            listed
                .iter()
                .for_each(|one| out.line(&format!("{} {}", one.view.run, one.view.line())));
            out.data(&listed)?;
            Ok(End::Fine)
        }
        Some(Command::Pause(which)) => set(&client, name, which, RunState::Paused, out).await,
        Some(Command::Resume(which)) => set(&client, name, which, RunState::Requested, out).await,
        Some(Command::Cancel(which)) => set(&client, name, which, RunState::Cancelled, out).await,
    }
}

/// A run in a list.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    view: BackfillView,
    condition: Option<String>,
    /// It is the snapshot of the slot.
    initial: bool,
    /// In seconds since 1970-01-01 UTC.
    requested_at: f64,
    started_at: Option<f64>,
    ended_at: Option<f64>,
}

impl Listed {
    fn of(run: &Run) -> Self {
        Self {
            view: BackfillView::new(run, None),
            condition: run.condition.clone(),
            initial: run.initial,
            requested_at: run.requested_at,
            started_at: run.started_at,
            ended_at: run.ended_at,
        }
    }
}

#[derive(Serialize)]
struct Changed {
    run: String,
    table: String,
    state: &'static str,
}

async fn set(client: &Client, name: &str, which: &Which, to: RunState, out: Out) -> Result<End> {
    let changed = runs::set(client, name, which.which.as_deref(), to).await?;
    let changed = changed.into_iter().map(|(run, table)| {
        let (run, state) = (run.to_string(), to.name());
        Changed { run, table, state }
    });
    let changed: Vec<Changed> = changed.collect();
    for Changed { run, table, state } in &changed {
        out.line(&format!("{run} {table}: {state}"));
    }
    out.data(&changed)?;
    if changed.is_empty() {
        let which = which.which.as_deref().unwrap_or("--all");
        return Err(Error::refused(format!("{which}: no open backfill matches"))
            .hint("`watership backfill list` shows all of them, with their state"));
    }
    Ok(End::Fine)
}

async fn start(client: &Client, config: &Config, args: &Args, out: Out) -> Result<End> {
    let table = args.table.as_deref().unwrap_or_default();
    let (wanted, shape) = look(client, &config.relay, table).await??;
    if !args.from.is_empty() && args.from.len() != shape.key.len() {
        let key = shape.key.iter().map(|key| &*shape.table.columns[key.column].name);
        let key: Vec<&str> = key.collect();
        let text =
            format!("--from has {} values for the key ({})", args.from.len(), key.join(", "));
        return Err(Error::refused(text).hint("give --from once for each column, in this order"));
    }
    let first_key = (!args.from.is_empty()).then_some(&*args.from);
    let from = first_key.map_or(From::Start, |key| From::At(key.to_vec()));
    if args.condition.as_ref().is_some_and(|condition| condition.trim().is_empty()) {
        return Err(Error::refused("--where is empty")
            .hint("give a condition on the table's columns, or leave --where out"));
    }
    // Whether the server understands what the relay would ask.
    let statement = shape.statement(&from, args.condition.as_deref(), 0);
    let prepared = client.prepare(query_of(&statement)).await;
    prepared.map_err(|error| unclear(postgres_error(error)))?;
    let condition = args.condition.as_deref();
    let request = Request { table, condition, first_key, initial_slot: None };
    let run = runs::request(client, &config.relay.name, request).await?;
    let run = run.ok_or_else(|| Error::internal("a backfill was asked for and has no id"))?;
    let relation = wanted.oid;
    out.line(&format!("{run} {table} ({relation}): requested"));
    if args.detach {
        out.data(&Changed { run: run.to_string(), table: table.into(), state: "requested" })?;
        return Ok(End::Fine);
    }
    follow(client, &config.relay, run, out).await
}

/// An error of the server about what the user typed.
fn unclear(error: Error) -> Error {
    let is_theirs = error.kind() == Kind::Refused;
    let error = error.context("--where or --from");
    if !is_theirs {
        return error;
    }
    error.hint(
        "--where takes an SQL condition on the table's columns, with the schema of everything \
         outside pg_catalog; --from takes one value for each column of the key",
    )
}

/// The statement inside of a COPY.
fn query_of(copy: &str) -> &str {
    copy.strip_prefix("COPY (").and_then(|rest| rest.strip_suffix(") TO STDOUT")).unwrap_or(copy)
}

/// Shows the progress until the run has ended.
async fn follow(client: &Client, relay: &relay::Options, run: Uuid, out: Out) -> Result<End> {
    let began = Instant::now();
    let mut first: Option<(u64, Instant)> = None;
    let (mut shown, mut noticed) = (String::new(), false);
    loop {
        let all = runs::list(client, &relay.name, false).await?;
        let Some(one) = all.iter().find(|one| one.run == run) else {
            return Err(Error::refused("the backfill is gone: its relay was dropped"));
        };
        let (rows, since) = *first.get_or_insert((one.rows, Instant::now()));
        let view = BackfillView::new(one, Some((one.rows - rows, since.elapsed())));
        if one.state.has_ended() {
            progress(out, "");
            out.line(&view.line());
            out.data(&Listed::of(one))?;
            return Ok(if one.state == RunState::Done { End::Fine } else { End::Failed });
        }
        let line = format!("{} {}", bar(view.percent), view.line());
        if line != shown {
            progress(out, &line);
            shown = line;
        }
        let idle = one.state == RunState::Requested && began.elapsed() >= NOTICED;
        if idle && !std::mem::replace(&mut noticed, true) {
            progress(out, "");
            super::print_warning(
                "no relay has picked it up: is the relay running, with this version?",
            );
        }
        sleep(LOOK_EVERY).await;
    }
}

/// A bar of 20 characters; empty when nobody knows.
fn bar(percent: Option<f64>) -> String {
    let done = percent.map_or(0, |percent| (percent / 5.0) as usize).min(20);
    format!("[{}{}]", "#".repeat(done), "-".repeat(20 - done))
}

/// On a terminal, one line that is written again and again; elsewhere nothing.
fn progress(out: Out, line: &str) {
    let mut terminal = std::io::stderr();
    if !out.json && terminal.is_terminal() {
        // A closed stderr has no reader.
        let _ = write!(terminal, "\r\x1b[K{}", super::printable::one_line(line));
        let _ = terminal.flush();
    }
}

/// Adds to `check` what would keep the snapshots of the configuration from being taken.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    const AREA: &str = "backfill";
    let initial = &config.relay.backfill.initial;
    if initial.is_empty() {
        return;
    }
    // Where Postgres cannot be reached, that is reported elsewhere.
    let Ok(SqlConnection { client, closed: _closed }) = sql(&config.relay.sql).await else {
        return;
    };
    for table in initial {
        match look(&client, &config.relay, &table.to_string()).await {
            Ok(Ok(_)) => f.ok(AREA, format!("{table} can be read for its snapshot")),
            Ok(Err(unfit)) => f.problem(AREA, unfit.what, unfit.hint),
            Err(error) => f.error(AREA, &error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_shows_what_is_done() {
        assert_eq!(bar(None), "[--------------------]");
        assert_eq!(bar(Some(50.0)), "[##########----------]");
        assert_eq!(bar(Some(100.0)), "[####################]");
    }
}
