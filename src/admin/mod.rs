//! HTTP for probes, metrics and status: GET /livez, /readyz, /metrics, /status.
//!
//! It runs on a thread of its own, so that a storm of scrapes does not slow the data path, and so
//! that /livez answers when the relay's loop hangs. The same thread does the histograms' upkeep,
//! which must not depend on somebody scraping, and it is the watchdog: a loop that stays stuck ends
//! the process, which nobody may be there to probe. Read-only, without authentication: the
//! configuration allows other than loopback addresses only on demand.

mod listener;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;

use crate::error::{Error, Result};
use crate::metrics::Exporter;
use crate::relay::status::Status;
use listener::Listener;

/// How often histogram samples are moved into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Looks in a row that must find the loop stuck, before the process ends: half a minute more than
/// `/livez` takes. A process that was frozen does not look meanwhile, and so does not end for it.
const STUCK_LOOKS: u32 = 6;

/// What [`start`] needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen; `None` serves nothing and only does the upkeep.
    pub listen: Option<SocketAddr>,
    /// Ends the process at once, when the relay's loop stays stuck.
    pub give_up: fn(),
}

/// The running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Admin {
    /// The address it listens on: with port 0 in the options, the port that was found.
    pub address: Option<SocketAddr>,
    _stop: oneshot::Sender<()>,
}

#[derive(Clone)]
struct Shared {
    status: Arc<Status>,
    exporter: Exporter,
}

/// Binds the address and starts the thread.
///
/// # Errors
/// [`crate::error::Kind::Config`] when the address cannot be bound,
/// [`crate::error::Kind::Internal`] when there can be no thread.
pub fn start(options: &Options, status: Arc<Status>, exporter: Exporter) -> Result<Admin> {
    let listener = options.listen.map(bind).transpose()?;
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let shared = Shared { status, exporter };
    let (stop, stopped) = oneshot::channel();
    let give_up = options.give_up;
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(move || serve(listener, shared, give_up, stopped))
        .map_err(|e| Error::internal("the admin thread cannot be started").caused_by(e))?;
    Ok(Admin { address, _stop: stop })
}

fn bind(address: SocketAddr) -> Result<TcpListener> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|e| {
        let error = Error::config(format!("admin.listen = \"{address}\" cannot be bound: {e}"));
        match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                error.hint("another process listens there, perhaps another relay; choose a port")
            }
            _ => error.hint("choose an address of this machine and a free port"),
        }
    })
}

fn serve(
    listener: Option<TcpListener>,
    shared: Shared,
    give_up: fn(),
    stopped: oneshot::Receiver<()>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "the admin server has no runtime"),
    };
    runtime.block_on(async {
        let upkeep = upkeep(shared.clone(), give_up);
        tokio::select! {
            _ = stopped => {}
            () = upkeep => {}
            () = accept(listener, shared) => {}
        }
    });
}

async fn upkeep(shared: Shared, give_up: fn()) {
    let mut timer = tokio::time::interval(UPKEEP_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stuck_looks = 0;
    loop {
        timer.tick().await;
        shared.exporter.upkeep();
        stuck_looks = if shared.status.is_alive() { 0 } else { stuck_looks + 1 };
        if stuck_looks >= STUCK_LOOKS {
            tracing::error!(
                hint = "nothing is lost; whoever starts the process again should be told",
                "the relay's loop has not moved for a minute: the process ends"
            );
            give_up();
        }
    }
}

/// Serves until the process ends; for ever silent without a listener.
async fn accept(listener: Option<TcpListener>, shared: Shared) {
    let Some(listener) = listener else { return std::future::pending().await };
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => axum::serve(Listener::new(listener), router(shared)).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%error, "the admin server ended");
    }
    // Without HTTP the upkeep goes on.
    std::future::pending().await
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status))
        .with_state(shared)
}

async fn livez(State(shared): State<Shared>) -> Response {
    answer(shared.status.is_alive(), "the relay's loop has not moved for 30 s")
}

async fn readyz(State(shared): State<Shared>) -> Response {
    match shared.status.not_ready() {
        None => answer(true, ""),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

fn answer(good: bool, otherwise: &'static str) -> Response {
    if good {
        return (StatusCode::OK, "ok\n").into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("{otherwise}\n")).into_response()
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, shared.exporter.render()).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    axum::Json(shared.status.snapshot()).into_response()
}
