//! `watership check --contracts`: the outbox rows that are still there, against the contracts of
//! the routes that they take. Reads only, row by row from a cursor.

use std::collections::BTreeMap;

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{Client, Row};

use super::findings::Findings;
use crate::config::Config;
use crate::contract::{CHECKED_MAX, Contracts};
use crate::error::Result;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;
use crate::relay::Options;
use crate::route::{Action, Rule, Select};
use crate::source::outbox::AggregateType;

/// Rows taken at once. With the largest payload that is checked, they have 400 MiB at most.
const BATCH: usize = 100;
/// Violations of a route that are shown.
const SHOWN_MAX: usize = 3;

const AREA: &str = "contracts";

/// What was found of a route.
#[derive(Default)]
struct Checked {
    rows: u64,
    wrong: u64,
    first: Vec<String>,
}

/// Adds a finding for each route that has contracts.
pub(super) async fn check(findings: &mut Findings, config: &Config) {
    let routes: Vec<(&Rule, &str, &Contracts)> = config.relay.rules.iter().filter_map(of).collect();
    if routes.is_empty() {
        return findings.ok(AREA, "no route of the outbox has a contract");
    }
    match rows(&config.relay, &routes).await {
        Ok(checked) => {
            for (index, (rule, ..)) in routes.iter().enumerate() {
                report(findings, &rule.name, checked.get(&index));
            }
        }
        Err(error) => findings.error(AREA, &error),
    }
}

fn of(rule: &Rule) -> Option<(&Rule, &str, &Contracts)> {
    match (&rule.select, &rule.action) {
        (Select::Outbox { aggregate_type }, Action::Publish { contracts, .. })
            if !contracts.is_empty() =>
        {
            Some((rule, aggregate_type, contracts))
        }
        _ => None,
    }
}

fn report(findings: &mut Findings, route: &str, checked: Option<&Checked>) {
    let none = Checked::default();
    let Checked { rows, wrong, first } = checked.unwrap_or(&none);
    if *wrong == 0 {
        let what = format!("{rows} rows of the outbox satisfy its contracts");
        return findings.ok(AREA, format!("route {route:?}: {what}"));
    }
    let text =
        format!("route {route:?}: {wrong} of {rows} rows of the outbox violate its contracts");
    let first = first.join("; ");
    findings.problem(AREA, text, format!("the first ones: {first}"));
}

/// Checks every row; the counts are by the index of the route.
async fn rows(
    options: &Options,
    routes: &[(&Rule, &str, &Contracts)],
) -> Result<BTreeMap<usize, Checked>> {
    let SqlConnection { client, closed: _closed } = sql(&options.sql).await?;
    let mut checked = BTreeMap::new();
    begin(&client, options).await?;
    loop {
        let fetch = format!("FETCH {BATCH} FROM outbox_rows");
        let batch = client.query(&fetch, &[]).await.map_err(postgres_error)?;
        for row in &batch {
            check_row(row, routes, &mut checked)?;
        }
        if batch.len() < BATCH {
            client.batch_execute("COMMIT").await.map_err(postgres_error)?;
            return Ok(checked);
        }
    }
}

async fn begin(client: &Client, options: &Options) -> Result<()> {
    let (table, names) = (&options.outbox.table, &options.outbox.columns);
    let [id, event] = [&names.id, &names.event_type].map(|name| escape_identifier(name));
    let kind = match &names.aggregate_type {
        AggregateType::Column(name) => escape_identifier(name),
        AggregateType::Constant(kind) => escape_literal(kind),
    };
    // The text of a bytea is its hex form, which is one as input too.
    let bytes = |name: &String| {
        let column = escape_identifier(name);
        format!(
            "CASE WHEN pg_typeof({column}) = 'bytea'::regtype THEN {column}::text::bytea \
             ELSE convert_to({column}::text, 'UTF8') END"
        )
    };
    let bodies: Vec<String> =
        [&names.payload, &names.data].into_iter().flatten().map(bytes).collect();
    // A payload that is too large comes as far as shows that it is.
    let most = CHECKED_MAX + 1;
    let sql = format!(
        "BEGIN READ ONLY; DECLARE outbox_rows NO SCROLL CURSOR FOR SELECT {id}::text, \
         {kind}::text, {event}::text, substr(coalesce({}, ''), 1, {most}) FROM {}",
        bodies.join(", "),
        table.quoted()
    );
    client.batch_execute(&sql).await.map_err(postgres_error)
}

fn check_row(
    row: &Row,
    routes: &[(&Rule, &str, &Contracts)],
    checked: &mut BTreeMap<usize, Checked>,
) -> Result<()> {
    let text = |index| row.try_get::<_, Option<&str>>(index).map_err(postgres_error);
    let (id, kind, event) = (text(0)?, text(1)?, text(2)?);
    let (kind, event) = (kind.unwrap_or_default(), event.unwrap_or_default());
    let body: &[u8] = row.try_get(3).map_err(postgres_error)?;
    for (index, (_, wanted, contracts)) in routes.iter().enumerate() {
        if *wanted != "*" && *wanted != kind {
            continue;
        }
        let Some(contract) = contracts.of(event) else { continue };
        let of_route = checked.entry(index).or_default();
        of_route.rows += 1;
        if let Err(error) = contract.check(body, &[]) {
            of_route.wrong += 1;
            if of_route.first.len() < SHOWN_MAX {
                of_route.first.push(format!("row {}: {error}", id.unwrap_or_default()));
            }
        }
    }
    Ok(())
}
