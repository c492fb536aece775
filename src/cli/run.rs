//! `watership run`: the relay until SIGTERM.

use std::sync::Arc;

use tokio::sync::watch;

use super::{End, logging};
use crate::admin;
use crate::config::Config;
use crate::error::Result;
use crate::metrics::{self, Metrics};
use crate::relay::session::supervisor;
use crate::relay::status::Status;

/// Options of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml run\n\n\
    On SIGTERM or SIGINT it takes no new events, waits for confirms, stores the checkpoint and \
    exits. A second signal exits at once.")]
pub(super) struct Args {}

pub(super) async fn execute(
    config: Config,
    Args {}: &Args,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    give_up: fn(),
) -> Result<End> {
    logging::start(&config.log);
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let shutdown = watch_signals()?;

    let exporter = metrics::install()?;
    logging::create_metrics();
    let labels = config.route_labels();
    let metrics = Arc::new(Metrics::new(&labels));
    let names = labels.into_iter().map(|label| label.name).collect();
    let status = Status::new(&config.relay.name, names);
    let admin = admin::start(&config.admin, give_up, Arc::clone(&status), exporter)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name = config.relay.name,
        source = %config.relay.sql,
        slot = config.relay.slot,
        broker = ?config.relay.broker.urls,
        routes = config.relay.rules.len(),
        admin = admin.address.map(|address| address.to_string()),
        "watership starts"
    );
    supervisor::run(config.relay, metrics, status, shutdown).await?;
    tracing::info!("stopped");
    logging::flush();
    Ok(End::Fine)
}
