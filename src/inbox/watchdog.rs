//! Notices a subscription that does not work: messages wait, and nothing is delivered.
//!
//! A broker's cancel that got lost, a consumer that exists on one side only, a queue that was made
//! again: all look like a quiet queue from here, so the queue itself is asked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::Connection;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::counters::Loss;
use crate::amqp::client::queue_counts;
use crate::amqp::reply;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(15);
/// A subscriber with nothing in hand that is sent nothing for so long, while messages wait, has
/// none. (One that waits for its turn as the single active consumer loses nothing by a new try.)
const SILENCE: Duration = Duration::from_secs(30);
/// The connection must answer within this time.
const LIMIT: Duration = Duration::from_secs(10);

/// What the subscriber has, as the loop last saw it.
#[derive(Clone)]
pub(super) struct Activity(Arc<Mutex<(usize, Instant)>>);

impl Activity {
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new((0, Instant::now()))))
    }

    /// What is in hand; `delivered` if a message has just come.
    pub fn note(&self, in_hand: usize, delivered: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = in_hand;
        if delivered {
            state.1 = Instant::now();
        }
    }

    fn is_silent(&self) -> bool {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 == 0 && state.1.elapsed() >= SILENCE
    }
}

/// Looks again and again; returns when the subscription has to be opened again.
pub(super) async fn watch(connection: Arc<Connection>, queue: String, activity: Activity) -> Loss {
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        match queue_counts(&connection, &queue, LIMIT).await {
            Ok((waiting, consumers)) => {
                if waiting > 0 && (consumers == 0 || activity.is_silent()) {
                    return Loss::Watchdog;
                }
            }
            // The queue is gone, and the subscription has not heard of it.
            Err(error) if error.reply_code() == Some(reply::NOT_FOUND) => return Loss::Watchdog,
            Err(error) if error.reply_code().is_some() => {
                tracing::debug!(%error, "the queue cannot be checked");
            }
            Err(_) => return Loss::ConnectionLost,
        }
    }
}
