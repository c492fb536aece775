//! Waits that end on what they see.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// How long one step (a start, a stop, a recovery) may take on a loaded machine: who has waited for
/// so long waits in vain. Nothing is known of how long it should take.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Grain of looking at what is in this process, or at one page of a relay.
pub const POLL: Duration = Duration::from_millis(10);
/// Grain of looking at what asks a server.
const ASK: Duration = Duration::from_millis(50);

/// Waits until `check` is true, [`LIMIT`] at most.
pub async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let mut again = tokio::time::interval(ASK);
    let all = async {
        while !check().await {
            again.tick().await;
        }
    };
    let in_time = timeout(LIMIT, all).await;
    in_time.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"));
}

/// Waits for `done`, [`LIMIT`] at most.
pub async fn within<T>(what: &str, done: impl Future<Output = T>) -> T {
    timeout(LIMIT, done).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?}"))
}

/// Looks again and again for so long, and fails when `holds` does not hold.
pub async fn throughout(time: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        assert!(holds().await, "{what}");
        tokio::time::sleep(POLL).await;
    }
}
