//! `watership schema`: how a captured table has changed, what its routes are agreed with, and the
//! agreement to the table as it is now.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, Row as SqlRow};

use super::findings::Findings;
use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::publication::{TableName, read_publication, read_table};
use crate::pg::slot::{insert_lsn, read_slot};
use crate::pg::sqlstate::postgres_error;
use crate::position::{Mark, Position};
use crate::relay::check::columns::{self, routes_of};
use crate::relay::checkpoint;
use crate::relay::session::constants;
use crate::relay::session::schemas::{self, Cataloged};
use crate::route::description::Description;
use crate::route::{Agreement, OnDrift, Router};

/// Options of `schema`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml schema public.customers\n  \
    watership --config shop.toml schema accept public.customers\n\n\
    Exit codes: 0 the table has what its routes promise, 1 it does not, or a server is \
    unreachable.")]
pub(super) struct Args {
    /// A captured table, schema.table.
    #[arg(required = true)]
    table: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Agree with the table as it is now: for all its routes, whatever came in between.
    Accept {
        /// A captured table, schema.table.
        table: String,
    },
}

/// How long a running relay may take to begin a session with what was agreed.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Rows of the history that are shown.
const ROWS_MAX: i64 = 50;
const AREA: &str = "schema";
const ACCEPT: &str = "`watership schema accept TABLE` agrees to it";

#[derive(Serialize)]
struct Report {
    table: String,
    /// The columns that it has now.
    columns: Vec<String>,
    routes: Vec<RouteReport>,
    /// The latest first.
    history: Vec<Entry>,
}

/// A route of the table, against the table as it is now.
#[derive(Serialize)]
struct RouteReport {
    route: String,
    /// The columns that it is agreed with; none before the relay's first start.
    agreed: Vec<String>,
    /// What it promised and the table does not have.
    broken: Vec<String>,
    /// Columns that it leaves out because nobody agreed to them.
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct Entry {
    id: i64,
    kind: String,
    route: Option<String>,
    position: String,
    changes: Vec<String>,
    /// Routes that promised what is gone.
    broken: Vec<String>,
    at: String,
    by: String,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    match (&args.command, &args.table) {
        (Some(Command::Accept { table }), _) => accept(&client, config, table, out).await,
        (None, table) => show(&client, config, table.as_deref().unwrap_or_default(), out).await,
    }
}

async fn show(client: &Client, config: &Config, table: &str, out: Out) -> Result<End> {
    let now = cataloged(client, config, table).await?;
    let agreed = schemas::agreed(client, &config.relay.name).await?;
    let report = Report {
        table: table.to_owned(),
        columns: names(&now.description),
        routes: against(config, &now, &agreed)?,
        history: history(client, config, table).await?,
    };
    let line = |name: &str, text: &str| out.line(&format!("{name:<10} {text}"));
    line("table", &format!("{table}: {}", report.columns.join(", ")));
    for route in &report.routes {
        line("route", &format!("{:?} has agreed columns {}", route.route, route.agreed.join(", ")));
        for what in &route.broken {
            line("", &format!("it promised more: {what}"));
        }
        if !route.left_out.is_empty() {
            line("", &format!("it leaves out {}", route.left_out.join(", ")));
        }
    }
    for entry in &report.history {
        let Entry { at, position, changes, route, by, .. } = entry;
        match route {
            Some(route) => line(at, &format!("route {route:?} agreed by {by}")),
            None => line(at, &format!("at {position}: {}", changes.join("; "))),
        }
    }
    out.data(&report)?;
    let kept = report.routes.iter().all(|route| route.broken.is_empty());
    Ok(if kept { End::Fine } else { End::Failed })
}

async fn accept(client: &Client, config: &Config, table: &str, out: Out) -> Result<End> {
    let options = &config.relay;
    // The place comes first: what is changed in between is then agreed to, or newer.
    let at = insert_lsn(client).await?;
    let now = cataloged(client, config, table).await?;
    let agreed = schemas::agreed(client, &options.name).await?;
    // A rule for a column that is gone would hide nothing of what came in its place.
    for rule in routes_of(&options.rules, table) {
        columns::verify(rule, &now, None)?;
        constants::verify(client, rule, &now).await?;
        if options.binary {
            // Else the next session would refuse what is agreed to here.
            columns::verify_binary(rule, &now, Some(&now.description))?;
        }
    }
    let before = against(config, &now, &agreed)?;
    for rule in routes_of(&options.rules, table) {
        schemas::agree(client, &options.name, &rule.name, &now, at).await?;
    }
    // A session that begins from here on reads what was written.
    let session = checkpoint::read(client, &options.name).await?.map(|row| row.session_no);
    for RouteReport { route, broken, left_out, .. } in &before {
        let told = match (broken.is_empty(), left_out.is_empty()) {
            (true, true) => "as before".to_owned(),
            (true, false) => format!("sends now also {}", left_out.join(", ")),
            (false, _) => format!("no longer promises: {}", broken.join("; ")),
        };
        out.line(&format!("agreed     route {route:?}, table {table}: {told}"));
    }
    match taken_over(client, config, session).await? {
        Some(true) => out.line("The running relay now uses the agreement."),
        Some(false) => out.line(&format!(
            "The running relay has not picked up the agreement after {} s; see `watership status`.",
            TAKE_OVER_LIMIT.as_secs()
        )),
        None => out.line("The relay is not running; it will use the agreement when it starts."),
    }
    out.line("To send what was parked because of the change: `watership parked retry`.");
    out.data(&serde_json::json!({ "table": table, "agreed": before }))?;
    Ok(End::Fine)
}

/// Waits until a running relay has begun its next session, which reads what was agreed: what is
/// retried before that would be parked again. `None` if nobody reads the slot.
async fn taken_over(client: &Client, config: &Config, before: Option<i64>) -> Result<Option<bool>> {
    let deadline = Instant::now() + TAKE_OVER_LIMIT;
    let slot = read_slot(client, &config.relay.slot).await?;
    if before.is_none() || slot.is_none_or(|slot| slot.active_pid.is_none()) {
        return Ok(None);
    }
    while Instant::now() < deadline {
        let now = checkpoint::read(client, &config.relay.name).await?.map(|row| row.session_no);
        if now != before {
            return Ok(Some(true));
        }
        sleep(LOOK_EVERY).await;
    }
    Ok(Some(false))
}

/// Adds its findings to those of `check`.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    if config.relay.tables.is_empty() {
        return;
    }
    if let Err(error) = look(f, config).await {
        // What is missing was reported as such.
        if !error.kind().is_verdict() {
            f.error(AREA, &error);
        }
    }
}

async fn look(f: &mut Findings, config: &Config) -> Result<()> {
    let options = &config.relay;
    let SqlConnection { client, closed: _closed } = sql(&options.sql).await?;
    let agreed = schemas::agreed_if_installed(&client, &options.name).await?;
    for table in &options.tables {
        // A table that is missing was reported before.
        let Some(now) = found(&client, config, table).await? else { continue };
        let now_only = std::slice::from_ref(&now);
        if let Err(error) = schemas::verify(&client, options, now_only, &agreed).await {
            f.error(AREA, &error);
            continue;
        }
        let problems = f.problems();
        for RouteReport { route, broken, left_out, .. } in against(config, &now, &agreed)? {
            if !left_out.is_empty() {
                let columns = left_out.join(", ");
                let what = format!("route {route:?} leaves out new columns of {table}: {columns}");
                let hint = "mask, hash or exclude them if they must not be sent; then `watership \
                            schema accept` the table";
                f.warning(AREA, what, hint);
            }
            let rule = options.rules.iter().find(|rule| rule.name == route);
            let on_drift = rule.map(|rule| rule.on_drift()).unwrap_or_default();
            for what in broken {
                let what = format!("table {table}, route {route:?}: {what}");
                match on_drift {
                    OnDrift::Pass => f.warning(AREA, what, ACCEPT),
                    OnDrift::Park | OnDrift::Stop => f.problem(AREA, what, ACCEPT),
                }
            }
        }
        if f.problems() == problems {
            f.ok(AREA, format!("{table} can be sent as its routes say"));
        }
    }
    Ok(())
}

async fn found(client: &Client, config: &Config, table: &str) -> Result<Option<Cataloged>> {
    let table: TableName = table.parse()?;
    let Some(facts) = read_table(client, &table).await? else { return Ok(None) };
    let publication = read_publication(client, &config.relay.publication).await?;
    let tables = schemas::catalog(client, publication.as_ref(), &[facts]).await?;
    Ok(tables.into_iter().next())
}

async fn cataloged(client: &Client, config: &Config, table: &str) -> Result<Cataloged> {
    if !config.relay.tables.iter().any(|captured| captured == table) {
        let captured = config.relay.tables.join(", ");
        return Err(Error::config(format!("table {table:?} is not captured"))
            .hint(format!("source.tables has: {captured}")));
    }
    let found = found(client, config, table).await?;
    found.ok_or_else(|| Error::refused(format!("table {table} does not exist")))
}

fn names(description: &Description) -> Vec<String> {
    description.columns.iter().map(|column| column.name.clone()).collect()
}

/// The routes of the table, against the table as it is now.
fn against(
    config: &Config,
    now: &Cataloged,
    agreed: &HashMap<(String, String), Agreement>,
) -> Result<Vec<RouteReport>> {
    let router = Router::new(&config.relay.rules)?;
    let report = |route: &str| {
        let agreement = agreed.get(&(route.to_owned(), now.table.clone()));
        let Some(Agreement { description, .. }) = agreement else {
            let (route, agreed) = (route.to_owned(), Vec::new());
            return RouteReport { route, agreed, broken: Vec::new(), left_out: Vec::new() };
        };
        let (broken, left_out) = router.against(route, description, &now.description);
        RouteReport {
            route: route.to_owned(),
            agreed: names(description),
            broken: broken.iter().map(ToString::to_string).collect(),
            left_out,
        }
    };
    Ok(routes_of(&config.relay.rules, &now.table).map(|rule| report(&rule.name)).collect())
}

async fn history(client: &Client, config: &Config, table: &str) -> Result<Vec<Entry>> {
    const SQL: &str = include_str!("../../sql/query/schema_show.sql");
    let rows = client.query(SQL, &[&config.relay.name, &table, &ROWS_MAX]).await;
    let entry = |row: &SqlRow| {
        let int = |i: usize| row.try_get::<_, i64>(i).map_err(postgres_error);
        let number = |i: usize| int(i).map(|number| u64::try_from(number).unwrap_or_default());
        let position = Position {
            epoch: u32::try_from(int(3)?).unwrap_or_default(),
            mark: Mark(number(4)?),
            ordinal: number(5)?,
            sub: u32::try_from(int(6)?).unwrap_or_default(),
        };
        Ok(Entry {
            id: int(0)?,
            kind: row.try_get(1).map_err(postgres_error)?,
            route: row.try_get(2).map_err(postgres_error)?,
            position: position.to_string(),
            changes: row.try_get(8).map_err(postgres_error)?,
            broken: row.try_get(9).map_err(postgres_error)?,
            at: row.try_get(10).map_err(postgres_error)?,
            by: row.try_get(11).map_err(postgres_error)?,
        })
    };
    rows.map_err(postgres_error)?.iter().map(entry).collect()
}
