//! `watership run`: the relay until SIGTERM.

use std::io::{self, Write as _};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::{End, logging, printable};
use crate::admin;
use crate::amqp::printer::Printer;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::metrics::{self, Metrics};
use crate::relay::session::dry_run::{self, Until};
use crate::relay::session::supervisor;
use crate::relay::status::Status;
use crate::route::Router;
use crate::source::SourceKind;
use crate::verdict::Verdict;

/// Options of `run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml run\n\n\
    On SIGTERM, SIGINT or SIGHUP it takes no new events, waits for confirms, stores the checkpoint \
    and exits. A second signal exits at once.\n\
    After a verdict it serves /status and /metrics for admin.linger more, then exits with code 3.")]
pub(super) struct Args {
    /// Use a changed partition count or queue even while messages are queued: events of one key may
    /// be handled out of order.
    #[arg(long)]
    accept_reorder: bool,
    /// Print what would be published, one JSON object a line, and change nothing: no connection to
    /// the broker, no checkpoint, no move of the slot. In mode "wal" the slot must have no reader.
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: exit after this many messages.
    #[arg(long, value_name = "N", requires = "dry_run")]
    limit: Option<NonZeroU64>,
    /// With --dry-run: exit once everything committed before the start is printed.
    #[arg(long, requires = "dry_run")]
    until_caught_up: bool,
}

pub(super) async fn execute(
    mut config: Config,
    args: &Args,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    give_up: fn(),
) -> Result<End> {
    logging::start(&config.log);
    config.relay.accept_reorder = args.accept_reorder;
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let shutdown = watch_signals()?;
    if args.dry_run {
        return dry_run(config, args, shutdown).await;
    }

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
        mode = config.relay.kind.name(),
        slot = (config.relay.kind == SourceKind::Wal).then_some(&config.relay.slot),
        broker = ?config.relay.broker.urls,
        routes = config.relay.rules.len(),
        admin = admin.address.map(|address| address.to_string()),
        "watership starts"
    );
    let ended = supervisor::run(config.relay, metrics, status, shutdown.clone()).await;
    if let Err(error) = &ended
        && error.kind().is_verdict()
        && config.admin.listen.is_some()
    {
        linger(error, config.admin.linger, shutdown).await;
    }
    ended?;
    tracing::info!("stopped");
    logging::flush();
    Ok(End::Fine)
}

/// Prints what would be published.
async fn dry_run(config: Config, args: &Args, mut shutdown: watch::Receiver<bool>) -> Result<End> {
    let options = config.relay;
    let router = Arc::new(Router::new(&options.rules)?);
    let over = Arc::new(watch::Sender::new(false));
    let exchanges = router.exchanges().to_vec();
    let print = |line: &str| writeln!(io::stdout(), "{}", printable::json(line));
    let max_body = options.broker.max_message_size;
    let printer =
        Printer::new(print, exchanges, max_body, args.limit.map(NonZeroU64::get), over.clone());
    let until = Until { over: over.clone(), caught_up: args.until_caught_up };
    let asked = async {
        // The sender is gone: no signal can come.
        if shutdown.wait_for(|stop| *stop).await.is_ok() {
            over.send_replace(true);
        }
        std::future::pending::<Result<u64>>().await
    };
    let parked = tokio::select! { biased;
        ended = dry_run::run(&options, &router, printer, &until) => ended?,
        never = asked => never?,
    };
    tracing::info!(would_be_parked = parked, "dry run ended; nothing was changed");
    logging::flush();
    Ok(End::Fine)
}

/// Keeps /status and /metrics up for a while: what an operator has to decide must be scraped once.
/// Both connections are closed by now, so no standby waits for it.
async fn linger(verdict: &Error, time: Duration, mut shutdown: watch::Receiver<bool>) {
    let asked = *shutdown.borrow();
    if time.is_zero() || asked {
        return;
    }
    tracing::error!(
        error = %verdict,
        hint = verdict.hint_or_kind(),
        verdict = verdict.verdict().map(Verdict::name),
        "the relay has stopped; /status and /metrics answer for {time:?} more (admin.linger), a \
         signal ends them"
    );
    tokio::select! {
        _ = shutdown.wait_for(|stop| *stop) => {}
        () = sleep(time) => {}
    }
}
