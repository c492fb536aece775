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
    SIGTERM or SIGINT: takes nothing new, waits for confirms, stores the checkpoint, ends. A \
    second one ends at once.")]
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
    logging::counted();
    let labels = config.route_labels();
    let metrics = Arc::new(Metrics::new(&labels));
    let names = labels.into_iter().map(|label| label.name).collect();
    let status = Status::new(&config.name, names);
    let options = admin::Options { listen: config.listen, give_up };
    let admin = admin::start(&options, Arc::clone(&status), exporter)?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name = config.name,
        source = %config.source.sql,
        slot = config.source.slot,
        broker = ?config.broker.urls,
        routes = config.rules.len(),
        admin = admin.address.map(|address| address.to_string()),
        "watership starts"
    );
    supervisor::run(config.relay_options(), metrics, status, shutdown).await?;
    tracing::info!("watership ends");
    logging::flush();
    Ok(End::Fine)
}
