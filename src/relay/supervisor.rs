//! Sessions: open all, run, and on any error close all, wait, begin again from what Postgres
//! says. There is no reconnect logic anywhere else.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::backoff::Backoff;
use crate::error::{Error, Result, Retry};
use crate::metrics::Metrics;
use crate::relay::session::{self, Session};
use crate::relay::status::Status;
use crate::relay::{Options, upkeep};
use crate::route::Router;

/// First upper bound of the wait between two sessions.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// Longest wait while a peer is unreachable.
const SOON_LIMIT: Duration = Duration::from_secs(1);
/// Longest wait where a person has to change something.
const SLOW_LIMIT: Duration = Duration::from_secs(15);
/// A session that lived this long was healthy: the next wait is short again.
const HEALTHY: Duration = Duration::from_secs(5);

/// Runs sessions until `shutdown`, or until an error that no further try can mend.
///
/// What a person has to mend ends the process before the first session ever ran: a typing error
/// in a password should not look like a running relay. Later the relay stays up and retries.
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
    let upkeep = tokio::spawn(upkeep::run(options.clone(), metrics.clone()));
    let mut backoff = Backoff::new(FIRST_WAIT, SOON_LIMIT);
    let mut has_run = false;
    let result = loop {
        metrics.sessions.increment(1);
        let life = one_session(&options, &router, &metrics, &status, shutdown.clone()).await;
        metrics.ended(life.result.as_ref().err());
        let Err(error) = life.result else { break Ok(()) };
        has_run |= life.streamed.is_some();
        if life.streamed.is_some_and(|lived| lived >= HEALTHY) {
            backoff.reset();
        }
        match error.retry() {
            Retry::Never => break Err(error),
            Retry::Slowly if !has_run => break Err(error),
            Retry::Slowly => backoff.set_limit(SLOW_LIMIT),
            Retry::Soon => backoff.set_limit(SOON_LIMIT),
        }
        let wait = backoff.next(fastrand::f64());
        report(&status, &error, wait, backoff.tries());
        tokio::select! { biased;
            stop = shutdown.wait_for(|stop| *stop) => if stop.is_ok() { break Ok(()) },
            () = sleep(wait) => {}
        }
    };
    upkeep.abort();
    status.stopped(result.as_ref().err());
    result
}

/// How a session went.
struct Life {
    result: Result<()>,
    /// How long it streamed, if it came so far.
    streamed: Option<Duration>,
}

async fn one_session(
    options: &Options,
    router: &Arc<Router>,
    metrics: &Arc<Metrics>,
    status: &Arc<Status>,
    mut shutdown: watch::Receiver<bool>,
) -> Life {
    status.connecting();
    let opened = tokio::select! { biased;
        _ = shutdown.wait_for(|stop| *stop) => return Life { result: Ok(()), streamed: None },
        opened = session::open(options, router, metrics, status) => opened,
    };
    let Session { mut relay, mut closed } = match opened {
        Ok(session) => session,
        Err(error) => return Life { result: Err(error), streamed: None },
    };
    let began = Instant::now();
    status.streaming();
    let result = tokio::select! { biased;
        error = closed.wait() => Err(error),
        result = relay.run(shutdown) => result,
    };
    relay.close().await;
    Life { result, streamed: Some(began.elapsed()) }
}

fn report(status: &Status, error: &Error, wait: Duration, tries: u32) {
    let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    status.waiting(error, wait);
    // The first try is news; while the same trouble goes on, every tenth line is enough.
    if tries == 1 || tries.is_multiple_of(10) {
        let hint = error.advice().unwrap_or_default();
        tracing::warn!(error = %error, hint, kind = error.label(), tries, wait_ms, "session ended");
    } else {
        tracing::debug!(error = %error, kind = error.label(), tries, wait_ms, "session ended");
    }
}
