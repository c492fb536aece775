//! HTTP for probes, metrics and status: GET /livez, /readyz, /metrics, /status, /find. Transport
//! only; what is shown is made in `relay/status`.
//!
//! It runs on its own thread, so that a storm of scrapes does not slow the data path and /livez
//! answers while the relay's loop hangs. The same thread does the histograms' upkeep, which must
//! not depend on a scraper, and it is the watchdog: it ends a process whose loop stays stuck, since
//! there may be no supervisor that probes /livez. Read-only, without authentication: the
//! configuration allows addresses other than loopback only on request.
//!
//! The relay's work does not depend on its port: while another process has it, the relay works
//! without, and takes it as soon as it is free.

mod listener;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, sleep, timeout};

use crate::error::{Error, Result};
use crate::metrics::Exporter;
use crate::relay::find::Wanted;
use crate::relay::status::Status;

/// How often histogram samples are moved into their buckets.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Consecutive looks that must find the loop stuck before the process ends: half a minute more
/// than `/livez` takes. While the process is frozen nobody looks, so it does not end for that.
const STUCK_LOOKS: u32 = 6;
/// How often a port that is taken is tried again.
const BIND_EVERY: Duration = Duration::from_secs(1);
/// How long the loop may take to answer /find: a few ticks.
const FIND_LIMIT: Duration = Duration::from_millis(1500);

/// Where it listens, and for how long.
#[derive(Debug, Clone)]
pub struct Options {
    /// Address and port; `None` serves nothing and only does the upkeep.
    pub listen: Option<SocketAddr>,
    /// How long a relay that has stopped with a verdict still serves, so that the verdict is
    /// scraped.
    pub linger: Duration,
}

/// The running server. It ends when this is dropped.
#[derive(Debug)]
pub struct Admin {
    /// The address it listens on: with port 0 in the options, the port that was assigned. Absent
    /// while another process has it.
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
/// [`crate::error::Kind::Config`] when the address can never be bound,
/// [`crate::error::Kind::Internal`] when there can be no thread.
pub fn start(
    options: &Options,
    give_up: fn(),
    status: Arc<Status>,
    exporter: Exporter,
) -> Result<Admin> {
    let port = options.listen.map_or(Ok(Port::None), Port::open)?;
    let address = match &port {
        Port::Open(listener) => listener.local_addr().ok(),
        Port::Taken(_) | Port::None => None,
    };
    let shared = Shared { status, exporter };
    let (stop, stopped) = oneshot::channel();
    std::thread::Builder::new()
        .name("admin".into())
        .spawn(move || serve(port, shared, give_up, stopped))
        .map_err(|e| Error::internal("the admin thread cannot be started").caused_by(e))?;
    Ok(Admin { address, _stop: stop })
}

/// The port of this process.
enum Port {
    /// There is to be none.
    None,
    Open(TcpListener),
    /// Another process has it.
    Taken(SocketAddr),
}

impl Port {
    fn open(address: SocketAddr) -> Result<Self> {
        match bind(address) {
            Ok(listener) => Ok(Self::Open(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                tracing::warn!(
                    hint = "another process, perhaps another relay, uses this port; end it, or \
                            set admin.listen to a free one",
                    "admin.listen = \"{address}\" is in use: no probe and no scrape reaches this \
                     relay until it is free"
                );
                Ok(Self::Taken(address))
            }
            Err(error) => {
                let text = format!("admin.listen = \"{address}\" cannot be bound: {error}");
                let hint = "set admin.listen to an address of this machine and a free port";
                Err(Error::config(text).hint(hint))
            }
        }
    }

    /// Waits for the port, if there is to be one.
    async fn listener(self) -> io::Result<tokio::net::TcpListener> {
        let address = match self {
            Port::None => return std::future::pending().await,
            Port::Open(listener) => return tokio::net::TcpListener::from_std(listener),
            Port::Taken(address) => address,
        };
        loop {
            sleep(BIND_EVERY).await;
            // What is wrong meanwhile (no free file descriptor) passes as well.
            if let Ok(listener) = bind(address) {
                tracing::info!(%address, "the admin port is free again; serving");
                return tokio::net::TcpListener::from_std(listener);
            }
        }
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn serve(port: Port, shared: Shared, give_up: fn(), stopped: oneshot::Receiver<()>) {
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
            () = accept(port, shared) => {}
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

/// Serves until the process ends; without a port it only waits.
async fn accept(port: Port, shared: Shared) {
    match port.listener().await {
        Ok(listener) => {
            let answer = move |request| {
                let shared = shared.clone();
                async move { answer(&request, &shared).await }
            };
            match listener::serve(listener, answer).await {}
        }
        Err(error) => tracing::error!(%error, "the admin server cannot be started"),
    }
    // The upkeep continues without HTTP.
    std::future::pending().await
}

async fn answer(request: &Request<Incoming>, shared: &Shared) -> Response<String> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = response(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".into());
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refused;
    }
    let status = &shared.status;
    match request.uri().path() {
        "/livez" => {
            let stuck = || "the relay's loop has been stuck for 30 s".to_owned();
            probe((!status.is_alive()).then(stuck))
        }
        "/readyz" => probe(match standby_counts(request.uri().query()) {
            Ok(true) if status.is_good_standby() => None,
            Ok(_) => status.not_ready(),
            Err(refused) => return response(StatusCode::BAD_REQUEST, TEXT, refused),
        }),
        "/metrics" => response(StatusCode::OK, METRICS, shared.exporter.render()),
        "/status" => json(&status.snapshot()),
        "/find" => match wanted(request.uri().query().unwrap_or_default()) {
            Ok(wanted) => find(status, wanted).await,
            Err(refused) => response(StatusCode::BAD_REQUEST, TEXT, refused.into()),
        },
        _ => {
            let paths = "not found; available: /livez, /readyz, /metrics, /status and /find\n";
            response(StatusCode::NOT_FOUND, TEXT, paths.into())
        }
    }
}

/// Whether the query of /readyz asks to call a standby ready. Another word for it is refused: a
/// probe with a typing error would always fail for the wrong reason.
fn standby_counts(query: Option<&str>) -> Result<bool, String> {
    let pairs = query.into_iter().flat_map(|query| query.split('&'));
    let asked = pairs.filter_map(|pair| pair.strip_prefix("standby")).next_back();
    match asked {
        None => Ok(false),
        Some("=ok") => Ok(true),
        Some(_) => Err("standby is invalid; expected \"standby=ok\"\n".to_owned()),
    }
}

/// What the query of /find asks for.
fn wanted(query: &str) -> Result<Wanted, &'static str> {
    const EXPECTED: &str = "expected /find?id=UUID or /find?key=KEY, percent-encoded\n";
    match query.split_once('=') {
        Some(("id", id)) => id.parse().map(Wanted::Id).map_err(|_| EXPECTED),
        Some(("key", key)) => {
            let key = percent_decode_str(key).decode_utf8().map_err(|_| EXPECTED)?;
            Ok(Wanted::Key(key.into_owned()))
        }
        _ => Err(EXPECTED),
    }
}

/// The loop answers at its next tick.
async fn find(status: &Status, wanted: Wanted) -> Response<String> {
    let unknown = |why: &str| {
        let text = format!("{why}\n");
        response(StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
    };
    if !status.is_streaming() {
        return unknown("nothing is streamed now; /status says why");
    }
    let Some(answer) = status.asks.ask(wanted) else {
        return unknown("too many concurrent requests; retry");
    };
    match timeout(FIND_LIMIT, answer).await {
        Ok(Ok(seen)) => json(&seen),
        Ok(Err(_)) | Err(_) => {
            unknown("the relay's loop did not answer; /status says what it does")
        }
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

fn probe(why_not: Option<String>) -> Response<String> {
    match why_not {
        None => response(StatusCode::OK, TEXT, "ok\n".into()),
        Some(why) => response(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
    }
}

fn json(data: &impl Serialize) -> Response<String> {
    match serde_json::to_string(data) {
        Ok(json) => response(StatusCode::OK, JSON, json),
        Err(e) => response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{e}\n")),
    }
}

fn response(code: StatusCode, kind: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
