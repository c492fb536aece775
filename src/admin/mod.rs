//! HTTP for probes, metrics and status: GET /livez, /readyz, /metrics, /status.
//!
//! It runs on its own thread, so that a storm of scrapes does not slow the data path and /livez
//! answers while the relay's loop hangs. The same thread does the histograms' upkeep, which must
//! not depend on a scraper, and it is the watchdog: it ends a process whose loop stays stuck, since
//! there may be no supervisor that probes /livez. Read-only, without authentication: the
//! configuration allows addresses other than loopback only on request.

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

/// Consecutive looks that must find the loop stuck before the process ends: half a minute more
/// than `/livez` takes. While the process is frozen nobody looks, so it does not end for that.
const STUCK_LOOKS: u32 = 6;

/// Where it listens.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address and port; `None` serves nothing and only does the upkeep.
    pub listen: Option<SocketAddr>,
}

/// The running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Admin {
    /// The address it listens on: with port 0 in the options, the port that was assigned.
    pub address: Option<SocketAddr>,
    _stop: oneshot::Sender<()>,
}

#[derive(Clone)]
struct Shared {
    status: Arc<Status>,
    exporter: Exporter,
}

/// Binds the address and starts the thread. `give_up` ends the process at once; it is called when
/// the relay's loop stays stuck.
///
/// # Errors
/// [`crate::error::Kind::Config`] when the address cannot be bound,
/// [`crate::error::Kind::Internal`] when there can be no thread.
pub fn start(
    options: &Options,
    give_up: fn(),
    status: Arc<Status>,
    exporter: Exporter,
) -> Result<Admin> {
    let listener = options.listen.map(bind).transpose()?;
    let address = listener.as_ref().and_then(|listener| listener.local_addr().ok());
    let shared = Shared { status, exporter };
    let (stop, stopped) = oneshot::channel();
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
            std::io::ErrorKind::AddrInUse => error.hint(
                "another process, perhaps another relay, uses this port; set admin.listen to a \
                 free one",
            ),
            _ => error.hint("set admin.listen to an address of this machine and a free port"),
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
        Err(error) => return tracing::error!(%error, "the admin server cannot be started"),
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
                hint = "no events are lost; make sure a supervisor restarts the process",
                "the relay's loop has been stuck for a minute; ending the process"
            );
            give_up();
        }
    }
}

/// Serves until the process ends; without a listener it only waits.
async fn accept(listener: Option<TcpListener>, shared: Shared) {
    let Some(listener) = listener else { return std::future::pending().await };
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => axum::serve(Listener::new(listener), router(shared)).await,
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%error, "the admin server stopped");
    }
    // The upkeep continues without HTTP.
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
    answer(shared.status.is_alive(), "the relay's loop has been stuck for 30 s")
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
