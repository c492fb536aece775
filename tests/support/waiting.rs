//! Waits that end on what they see. None of them knows how long anything should take: a loaded
//! machine is slow, and only what does not move at all is wrong.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout};

/// A wait that has seen nothing move for this long fails.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at something in this process, or at a page of a relay.
pub const POLL: Duration = Duration::from_millis(10);
/// Between two looks that ask a server.
const ASK: Duration = Duration::from_millis(50);
/// Even a wait that sees progress ends after this.
pub const LONGEST: Duration = Duration::from_secs(1200);

/// The patience of one wait: it lasts for [`LIMIT`] after the last progress.
pub struct Patience<P = ()> {
    seen: Option<P>,
    begin: Instant,
    deadline: Instant,
}

impl<P: PartialEq + std::fmt::Debug> Patience<P> {
    pub fn new() -> Self {
        let begin = Instant::now();
        Self { seen: None, begin, deadline: begin + LIMIT }
    }

    /// Returns after a moment, so that the caller looks again. `seen` is how far things have come;
    /// `()` where only the end can be seen.
    ///
    /// # Panics
    /// When `seen` has not changed for [`LIMIT`]; `what` says what did not happen.
    pub async fn more(&mut self, seen: P, what: impl FnOnce() -> String) {
        let now = Instant::now();
        if self.seen.as_ref() != Some(&seen) {
            (self.seen, self.deadline) = (Some(seen), (now + LIMIT).min(self.begin + LONGEST));
        }
        if now >= self.deadline {
            let waited = now - self.begin;
            panic!("waited {waited:.0?}, at last {:?}: {}", self.seen, what());
        }
        tokio::time::sleep(POLL).await;
    }
}

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

/// Looks again and again for `time`, and fails as soon as `holds` is false.
pub async fn throughout(time: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        assert!(holds().await, "{what}");
        tokio::time::sleep(POLL).await;
    }
}
