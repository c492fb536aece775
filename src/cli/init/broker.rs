//! The broker half of `init`: what is missing is declared, or what must be there is verified.

use super::{Done, Steps};
use crate::amqp::topology::{self, Mode};
use crate::config::Config;
use crate::error::{Error, Result};

/// Declares or verifies the topology.
///
/// # Errors
/// The broker's, and a thing that is missing or different.
pub(super) async fn prepare(steps: &mut Steps, config: &Config) -> Result<()> {
    let topology = &config.relay.topology;
    topology::apply(&config.relay.broker, topology).await?;
    let (exchanges, queues) = (topology.exchanges.len(), topology.queues.len());
    let bindings = topology.bindings.len();
    match topology.mode {
        Mode::Declare => {
            let what = format!("{exchanges} exchanges, {queues} queues, {bindings} bindings");
            steps.add(Done::Created, "broker", format!("declared {what}"));
        }
        Mode::Verify => {
            let what = format!("verified {exchanges} exchanges, {queues} queues");
            steps.add(Done::Exists, "broker", what);
            if bindings > 0 {
                verify_bindings(steps, config).await?;
            }
        }
    }
    Ok(())
}

/// AMQP lists no bindings.
async fn verify_bindings(steps: &mut Steps, config: &Config) -> Result<()> {
    let bindings = &config.relay.topology.bindings;
    let Some(management) = config.relay.audit.management(&config.relay.broker)? else {
        let what = format!("{} are not verified: set broker.management_url", bindings.len());
        steps.add(Done::Skipped, "bindings", what);
        return Ok(());
    };
    let mut missing = Vec::new();
    for binding in bindings {
        let there = management.bindings(&binding.exchange).await?;
        if !there.iter().any(|found| binding.is(found)) {
            missing.push(binding.to_string());
        }
    }
    if missing.is_empty() {
        steps.add(Done::Exists, "bindings", format!("verified {}", bindings.len()));
        return Ok(());
    }
    let (count, missing) = (missing.len(), missing.join("; "));
    Err(Error::refused(format!("{count} of {} bindings are missing: {missing}", bindings.len()))
        .hint("bind them and run init again, or set broker.topology = \"declare\""))
}
