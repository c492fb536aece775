//! Who may be at work beside whom. A message at which a process died before is handled while no
//! other is: if it kills this process too, no innocent message was at work beside it, to be counted
//! as killed.
//!
//! A turn is taken before a transaction begins: one that waits for its turn must hold no lock.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, RwLock, oneshot};
use tokio::time::timeout;

/// A suspect that takes longer than this does not kill at once, and the others go on beside it.
const ALONE_LIMIT: Duration = Duration::from_secs(5);

/// The turns of one consumer.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns(Arc<RwLock<()>>);

/// Being at work; ends when it is dropped.
#[derive(Debug)]
pub(super) enum Turn {
    #[expect(dead_code, reason = "held, never read")]
    Beside(OwnedRwLockReadGuard<()>),
    #[expect(dead_code, reason = "held, never read")]
    Alone(oneshot::Sender<()>),
}

impl Turns {
    /// Waits while a suspect is alone, or waits to be.
    pub async fn beside_others(&self) -> Turn {
        Turn::Beside(self.0.clone().read_owned().await)
    }

    /// Waits until nothing is at work; the others wait until this turn ends, or the limit is over.
    pub async fn alone(&self) -> Turn {
        let alone = self.0.clone().write_owned().await;
        let (turn, ended) = oneshot::channel();
        tokio::spawn(async move {
            // Ended, or still at work after the limit: either way nobody waits any longer.
            let _ = timeout(ALONE_LIMIT, ended).await;
            drop(alone);
        });
        Turn::Alone(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the future has an answer without waiting for another turn to end.
    async fn at_once<T>(turn: impl Future<Output = T>) -> bool {
        timeout(Duration::from_millis(1), turn).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_is_at_work_alone_and_others_side_by_side() {
        let turns = Turns::default();
        let (one, other) = (turns.beside_others().await, turns.beside_others().await);
        assert!(!at_once(turns.alone()).await);
        drop((one, other));
        let suspect = turns.alone().await;
        assert!(!at_once(turns.beside_others()).await);
        drop(suspect);
        assert!(at_once(turns.beside_others()).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_that_hangs_keeps_the_others_waiting_for_the_limit_only() {
        let turns = Turns::default();
        let suspect = turns.alone().await;
        assert!(!at_once(turns.beside_others()).await);
        tokio::time::advance(ALONE_LIMIT).await;
        assert!(at_once(turns.beside_others()).await);
        drop(suspect);
    }
}
