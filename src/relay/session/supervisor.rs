//! Sessions: open all, run, and on any error close all, wait, begin again from what Postgres
//! says. There is no reconnect logic anywhere else.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::backoff::Backoff;
use crate::error::{Code, Error, Kind, Result, Retry};
use crate::metrics::{BackfillMetrics, Metrics, TableMetrics};
use crate::position::Position;
use crate::relay::checkpoint::own::OwnCheckpoint;
use crate::relay::session::broken::Missing;
use crate::relay::session::rotation::Rotation;
use crate::relay::session::unsendable::Unsendable;
use crate::relay::session::{self, Session, Shared};
use crate::relay::status::Status;
use crate::relay::upkeep::canary::Canary;
use crate::relay::upkeep::{self, lock_owner, redeclare, route_audit};
use crate::relay::{Kept, Options};
use crate::route::Router;

/// First upper bound of the wait between two sessions.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait while a peer is unreachable.
const SOON_LIMIT: Duration = Duration::from_secs(1);
/// Longest wait where someone must change something.
const SLOW_LIMIT: Duration = Duration::from_secs(15);
/// Longest time in which a session is opened: each connection and each query has a limit of its
/// own, but for a server that is frozen.
const OPEN_LIMIT: Duration = Duration::from_secs(180);
/// A session that lived this long was healthy: the next wait is short again.
const HEALTHY: Duration = Duration::from_secs(5);

/// Runs sessions until `shutdown`, or until an error that no further try can fix.
///
/// What someone must fix ends the process before the first session ever ran: a typing error
/// in a password should not look like a running relay. Later, or after it was a standby, the relay
/// stays up and retries: a certificate without its new key is half of a rotation. As soon as a file
/// with credentials or certificates changes, it tries again.
///
/// # Errors
/// The verdict, or the error of the first start.
pub async fn run(
    options: Options,
    metrics: Arc<Metrics>,
    status: Arc<Status>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let router = Arc::new(Router::new(&options.rules)?);
    let shared = shared(&options, &metrics, &status);
    let redeclaring = redeclare::run(options.clone(), status.clone(), shared.missing.clone());
    let (doubt, mut doubts) = mpsc::channel(1);
    let upkeep = tokio::spawn(upkeep::run(options.clone(), shared.clone(), doubt));
    let mut kept = Kept::default();
    let audit = tokio::spawn(route_audit::run(options.clone(), metrics.clone(), status.clone()));
    let redeclare = tokio::spawn(redeclaring);
    let lock = tokio::spawn(lock_owner::run(options.clone(), status.clone()));
    let mut backoff = Backoff::new(FIRST_WAIT, SOON_LIMIT);
    let mut unsendable = Unsendable::default();
    let mut has_run = false;
    let mut rotation = Rotation::new(&options);
    let mut told = Told::default();
    let result = loop {
        metrics.sessions.increment(1);
        rotation.look();
        let stop = shutdown.clone();
        let life = one_session(&options, &router, &shared, &mut kept, &mut doubts, stop).await;
        metrics.ended(life.result.as_ref().err());
        metrics.session_over();
        status.session_over();
        let Err(error) = life.result else { break Ok(()) };
        // It was asked to end and could not settle what it had sent: the exit code says so.
        if *shutdown.borrow() && life.streamed.is_some() {
            break Err(error);
        }
        let healthy = life.streamed.is_some_and(|lived| lived >= HEALTHY);
        let how = (options.kind, options.binary);
        let error = unsendable.judge(error, life.received, life.by_stream, how);
        has_run |= life.streamed.is_some() || error.kind() == Kind::Busy;
        if healthy {
            backoff.reset();
        }
        let Some(limit) = longest_wait(&error, has_run) else { break Err(error) };
        backoff.set_limit(limit);
        let wait = backoff.next(fastrand::f64());
        status.waiting(&error, wait);
        told.say(&error, wait, backoff.tries());
        if status.is_standing_by() {
            metrics.another_works();
        }
        show(&status, &metrics);
        tokio::select! { biased;
            stop = shutdown.wait_for(|stop| *stop) => if stop.is_ok() { break Ok(()) },
            () = rotation.changed() => {
                tracing::info!("a file with credentials or certificates has changed: trying again");
                backoff.reset();
            }
            () = sleep(wait) => {}
        }
    };
    upkeep.abort();
    audit.abort();
    redeclare.abort();
    lock.abort();
    status.stopped(result.as_ref().err());
    show(&status, &metrics);
    result
}

/// What all sessions share, as it is at first.
fn shared(options: &Options, metrics: &Arc<Metrics>, status: &Arc<Status>) -> Shared {
    Shared {
        metrics: metrics.clone(),
        status: status.clone(),
        canary: Canary::new(options.canary_interval),
        own: Arc::new(OwnCheckpoint::default()),
        missing: Arc::new(Missing::default()),
        keys: Arc::default(),
        held: Arc::new(TableMetrics::new(options.held.iter().map(ToString::to_string))),
        backfills: Arc::new(BackfillMetrics::new(options.tables.iter().cloned())),
    }
}

/// The longest wait for another try; `None` where none can help.
fn longest_wait(error: &Error, has_run: bool) -> Option<Duration> {
    match error.retry() {
        // It was right once: a file that it names, or the server, is about to change.
        Retry::Never if error.kind() == Kind::Config && has_run => Some(SOON_LIMIT),
        Retry::Never => None,
        Retry::Slowly => has_run.then_some(SLOW_LIMIT),
        Retry::Soon => Some(SOON_LIMIT),
    }
}

/// How a session went.
struct Life {
    result: Result<()>,
    /// How long it streamed, if it came so far.
    streamed: Option<Duration>,
    /// How far it received.
    received: Option<Position>,
    /// The stream itself failed.
    by_stream: bool,
}

impl Life {
    /// It ended before it streamed.
    fn unopened(result: Result<()>) -> Self {
        Self { result, streamed: None, received: None, by_stream: false }
    }
}

async fn one_session(
    options: &Options,
    router: &Arc<Router>,
    shared: &Shared,
    kept: &mut Kept,
    doubts: &mut mpsc::Receiver<Error>,
    mut shutdown: watch::Receiver<bool>,
) -> Life {
    let status = &shared.status;
    status.connecting();
    show(status, &shared.metrics);
    let opened = tokio::select! { biased;
        _ = shutdown.wait_for(|stop| *stop) => return Life::unopened(Ok(())),
        opened = in_time(session::open(options, router, shared, kept)) => opened,
    };
    let Session { mut relay, mut closed, backfill } = match opened {
        Ok(session) => session,
        Err(error) => return Life::unopened(Err(error)),
    };
    let began = Instant::now();
    // A doubt about the last session says nothing about this one.
    while doubts.try_recv().is_ok() {}
    let tries = status.streaming();
    show(status, &shared.metrics);
    if tries > 0 {
        tracing::info!(tries, circuit = "closed", "streaming again after an error");
    }
    let ended = tokio::select! { biased;
        error = closed.wait() => Ok(Err(error)),
        Some(doubt) = doubts.recv() => Err(doubt),
        result = relay.run(shutdown.clone()) => Ok(result),
    };
    let result = match ended {
        Ok(result) => result,
        Err(doubt) if !doubt.kind().is_verdict() => Err(doubt),
        // What was received before is good: it is settled first.
        Err(doubt) => {
            relay.drain(Some(doubt));
            tokio::select! { biased;
                error = closed.wait() => Err(error),
                result = relay.run(shutdown) => result,
            }
        }
    };
    shared.canary.end();
    drop(backfill);
    shared.backfills.session_over();
    let received = Some(relay.progress().received_position());
    let by_stream = relay.stream_failed();
    *kept = relay.close().await;
    Life { result, streamed: Some(began.elapsed()), received, by_stream }
}

/// A server that stops in the middle of a step would keep the session from ending and the process
/// from noticing.
async fn in_time<T>(open: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(OPEN_LIMIT, open).await.unwrap_or_else(|_| {
        let text = format!("no session was open within {OPEN_LIMIT:?}: a server does not answer");
        Err(Error::unreachable(text))
    })
}

/// The circuit as metrics.
fn show(status: &Status, metrics: &Metrics) {
    let view = status.circuit();
    let wait = view.next_try_ms.map_or(0.0, |ms| ms as f64 / 1000.0);
    metrics.circuit.set(view.state.label(), view.tries, wait);
}

/// The trouble that was last told at a level that everybody sees.
#[derive(Default)]
struct Told {
    trouble: Option<(&'static str, Option<Code>, String)>,
}

impl Told {
    /// Logs the end of a session. The first try is news, and so is another trouble than before:
    /// a broker that was restarted may now refuse the password. While the same one continues, every
    /// tenth line is enough.
    fn say(&mut self, error: &Error, wait: Duration, tries: u32) {
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let (kind, circuit) = (error.label(), "open");
        let hint = error.hint_or_kind();
        // What to do tells two troubles apart where the peer gave no code.
        let trouble = Some((kind, error.code().cloned(), hint.to_owned()));
        if tries == 1 || tries.is_multiple_of(10) || self.trouble != trouble {
            tracing::warn!(error = %error, hint, kind, tries, wait_ms, circuit, "session ended");
            self.trouble = trouble;
        } else {
            tracing::debug!(error = %error, kind, tries, wait_ms, circuit, "session ended");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_frozen_while_a_session_is_opened_ends_that_try() {
        let frozen = in_time(std::future::pending::<Result<()>>()).await;
        assert_eq!(frozen.expect_err("it ends").kind(), Kind::Unreachable);
    }
}
