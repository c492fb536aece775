//! Accepts connections and serves them, each with limits: how long a request may take to come, how
//! long a connection may live, how many there may be.
//!
//! The relay's own sockets come out of the same pool of file descriptors, so clients of the admin
//! port must not take them all. And nobody may keep a probe from its answer: an orchestrator kills
//! what does not answer. So with all places taken a newcomer does not wait, it takes the place of
//! the connection that has been idle for the longest time.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, yield_now};
use tokio::time::{sleep, timeout};

/// Maximum number of connections at once.
const CONNECTIONS_MAX: usize = 64;
/// Maximum time for a request to come in whole, also on a connection that had one before.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
/// After this time a connection ends, whatever it does; scrapers reconnect.
const LIFE_MAX: Duration = Duration::from_secs(60);
/// Maximum size of a request, in bytes; there are no bodies.
const REQUEST_BYTES_MAX: usize = 16 << 10;
/// Pause after a failed accept (no free file descriptor), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves connections indefinitely; `answer` makes the response to a request.
pub(super) async fn serve<A, F>(listener: TcpListener, answer: A) -> Infallible
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<String>> + Send + 'static,
{
    let mut places = Places::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                places.make_room();
                let used = places.clock.next();
                let serving = connection(stream, answer.clone(), used.clone());
                places.open.push(Place { used, task: tokio::spawn(serving).abort_handle() });
                // What was accepted may answer before many more have come.
                yield_now().await;
            }
            Err(error) => {
                tracing::warn!(%error, "the admin port cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection to its end, which is nobody's concern: a client may leave at any time.
async fn connection<A, F>(stream: TcpStream, answer: A, used: Used)
where
    A: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<String>> + Send + 'static,
{
    let service = service_fn(move |request| {
        used.now();
        let response = answer(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_LIMIT)
        .max_buf_size(REQUEST_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let _ = timeout(LIFE_MAX, serving).await;
}

/// The connections that are open.
#[derive(Default)]
struct Places {
    open: Vec<Place>,
    clock: Clock,
}

struct Place {
    used: Used,
    task: AbortHandle,
}

impl Places {
    /// Leaves at least one place free.
    fn make_room(&mut self) {
        self.open.retain(|place| !place.task.is_finished());
        while self.open.len() >= CONNECTIONS_MAX {
            let longest = self.open.iter().enumerate().min_by_key(|(_, place)| place.used.when());
            let Some((index, _)) = longest else { return };
            self.open.swap_remove(index).task.abort();
        }
    }
}

/// Counts uses of connections; what counts is only which was earlier.
#[derive(Clone, Default)]
struct Clock(Arc<AtomicU64>);

impl Clock {
    /// A connection that is used now for the first time.
    fn next(&self) -> Used {
        let used = Used { clock: self.clone(), at: Arc::default() };
        used.now();
        used
    }
}

/// When a connection was used last: accepted, or asked something.
#[derive(Clone)]
struct Used {
    clock: Clock,
    at: Arc<AtomicU64>,
}

impl Used {
    fn now(&self) {
        self.at.store(self.clock.0.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }

    fn when(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }
}
