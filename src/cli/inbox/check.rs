//! What `watership check --inbox-url` adds: whether a message can come to this consumer after the
//! window in which the inbox remembers it.

use super::{Database, MAINTAIN_HINT, remembered};
use crate::amqp::audit::QueueFacts;
use crate::amqp::management::Management;
use crate::cli::findings::Findings;
use crate::config::Config;
use crate::error::Result;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::sqlstate::postgres_error;

const AREA: &str = "inbox";
const MS_PER_DAY: u64 = 86_400_000;

/// Adds findings about the inbox at `url`.
pub(in crate::cli) async fn check(findings: &mut Findings, config: &Config, url: &str) {
    if let Err(error) = look(findings, config, url).await {
        findings.error(AREA, &error);
    }
}

async fn look(findings: &mut Findings, config: &Config, url: &str) -> Result<()> {
    let database = Database { url: url.to_owned() };
    let SqlConnection { client, closed: _closed } = database.inbox("--inbox-url").await?;
    let now = remembered(&client).await?;
    let window_days = now.window_days;
    findings.ok(AREA, format!("messages are remembered for {window_days} days"));
    if let Some(problem) = now.problem() {
        findings.problem(AREA, problem, MAINTAIN_HINT);
    }
    let hint = "raise window_days in watership_inbox.ring; what comes later is parked at the \
                consumer as beyond_window";
    if let Some(days) = oldest_parked(config).await?.filter(|days| *days >= window_days) {
        let what = format!(
            "the relay has a parked row from {days} days ago; the window is {window_days} days"
        );
        findings.warning(AREA, what, hint);
    }
    let Some(management) = config.relay.audit.management(&config.relay.broker)? else {
        findings.ok(AREA, "the TTL of queues is unknown without broker.management_url");
        return Ok(());
    };
    for (queue, ttl) in ttls(config, &management).await? {
        let window_ms = u64::from(window_days.unsigned_abs()) * MS_PER_DAY;
        if ttl > window_ms {
            let days = ttl / MS_PER_DAY;
            let what = format!(
                "queue {queue:?} keeps messages for {days} days; the window is {window_days} days"
            );
            findings.warning(AREA, what, hint);
        }
    }
    Ok(())
}

/// How many days ago the oldest parked row of this relay was committed.
async fn oldest_parked(config: &Config) -> Result<Option<i32>> {
    const SQL: &str = include_str!("../../../sql/query/parked_oldest.sql");
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let row = client.query_opt(SQL, &[&config.relay.name]).await.map_err(postgres_error)?;
    Ok(row.map(|row| row.get(0)))
}

/// Queues that keep messages for a limited time, in milliseconds.
async fn ttls(config: &Config, management: &Management) -> Result<Vec<(String, u64)>> {
    let exchanges: Vec<_> =
        config.relay.topology.exchanges.iter().map(|e| e.name.clone()).collect();
    let survey = management.survey(&exchanges).await?;
    let ttl = |(name, queue): (&String, &QueueFacts)| Some((name.clone(), queue.message_ttl_ms()?));
    Ok(survey.queues.iter().filter_map(ttl).collect())
}
