//! `watership check`: checks everything the relay needs, and changes nothing.

use super::findings::Findings;
use super::{End, Out, broker, postgres};
use crate::config::Config;
use crate::error::Result;

/// Options of `check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml check\n  \
    watership --config shop.toml check --json | jq '.findings[] | select(.level != \"ok\")'\n\n\
    Exit codes: 0 no problems, 1 problems, 3 a verdict for you to decide, such as a lost slot.")]
pub(super) struct Args {}

pub(super) async fn execute(config: &Config, Args {}: &Args, out: Out) -> Result<End> {
    let mut findings = Findings::new(out);
    let routes = config.relay.rules.len();
    findings.ok("config", format!("relay {:?}, {routes} routes", config.relay.name));
    for warning in &config.warnings {
        findings.warning("config", warning, "see config/watership.toml");
    }
    postgres::check(&mut findings, config).await;
    broker::check(&mut findings, config).await;
    findings.finish()
}
