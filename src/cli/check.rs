//! `watership check`: checks everything the relay needs, and changes nothing.

use super::findings::Findings;
use super::{End, Out, ask, backfill, broker, contracts, inbox, partitions, postgres, schema};
use crate::config::Config;
use crate::error::{Kind, Result};
use crate::relay::status::Concern;

/// Options of `check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml check\n  \
    watership --config shop.toml check --json | jq '.findings[] | select(.level != \"ok\")'\n\n\
    If the relay is running, it is asked what is wrong with it: held routes, parked rows, and so \
    on.\n\
    Exit codes: 0 no problems, 1 problems, 3 a verdict for you to decide, such as a lost slot.")]
pub(super) struct Args {
    /// Also check whether a message could reach a consumer after its inbox's deduplication window.
    /// The value is the URL of the consumer's database; ${NAME} and ${file:/path} are filled in.
    #[arg(long, value_name = "URL")]
    inbox_url: Option<String>,
    /// Report a changed partition count or queue as a warning only, even while messages are queued.
    #[arg(long)]
    accept_reorder: bool,
    /// Also validate the rows still in the outbox against the contracts of their routes.
    #[arg(long)]
    contracts: bool,
}

pub(super) async fn execute(config: &Config, args: &Args, out: Out) -> Result<End> {
    let mut findings = Findings::new(out);
    let routes = config.relay.rules.len();
    findings.ok("config", format!("relay {:?}, {routes} routes", config.relay.name));
    for warning in &config.warnings {
        findings.warning("config", warning, "see config/watership.toml");
    }
    postgres::check(&mut findings, config).await;
    schema::check(&mut findings, config).await;
    broker::check(&mut findings, config).await;
    if let Some(url) = &args.inbox_url {
        inbox::check::check(&mut findings, config, url).await;
    }
    partitions::check(&mut findings, config, args.accept_reorder).await;
    backfill::check(&mut findings, config).await;
    if args.contracts {
        contracts::check(&mut findings, config).await;
    }
    running(&mut findings, config).await;
    findings.finish()
}

/// What the relay of this name says of itself, if it runs: only it knows which routes it holds.
async fn running(findings: &mut Findings, config: &Config) {
    const AREA: &str = "relay";
    let Some(address) = config.admin.listen else {
        return findings.ok(AREA, "admin.listen is empty: a running relay cannot be queried");
    };
    let status = match ask::status(&config.relay.name, address).await {
        Ok(status) => status,
        Err(error) if error.kind() == Kind::Refused => {
            return findings.ok(AREA, format!("{error}: no relay is running here"));
        }
        Err(error) if error.kind() == Kind::Unreachable => {
            let hint = "a relay that hangs ends itself within a minute or so; see its log";
            return findings.reported(AREA, Concern::new(error.to_string(), hint));
        }
        Err(error) => return findings.warning(AREA, error.to_string(), error.hint_or_kind()),
    };
    let problems = ask::problems(&status);
    if problems.is_empty() {
        let state = status["state"].as_str().unwrap_or("running");
        findings.ok(AREA, format!("{state}, and nothing is wrong with it"));
    }
    problems.into_iter().for_each(|problem| findings.reported(AREA, problem));
}
