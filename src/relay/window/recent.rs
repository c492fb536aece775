//! What the broker confirmed lately, for who looks for one event. A ring of fixed size: one write
//! per confirm. Nothing is decided by it. Pure.

use std::time::Duration;

use crate::relay::window::remembered::MessageKey;

/// Confirms that are remembered.
const CONFIRMS_MAX: usize = 4096;

/// The latest confirms of this session.
#[derive(Debug, Default)]
pub struct RecentConfirms {
    /// Message and time, since 1970-01-01 UTC.
    ring: Vec<(MessageKey, Duration)>,
    /// Where the next one goes, once the ring is full.
    next: usize,
}

impl RecentConfirms {
    /// The broker confirmed the message at `clock`, since 1970-01-01 UTC.
    pub fn add(&mut self, message: MessageKey, clock: Duration) {
        if self.ring.len() < CONFIRMS_MAX {
            self.ring.push((message, clock));
            return;
        }
        self.ring[self.next] = (message, clock);
        self.next = (self.next + 1) % CONFIRMS_MAX;
    }

    /// How many are remembered.
    pub fn count(&self) -> usize {
        self.ring.len()
    }

    /// When the oldest of them came, since 1970-01-01 UTC.
    pub fn oldest(&self) -> Option<Duration> {
        self.ring.get(self.next).map(|(_, clock)| *clock)
    }

    /// All of them.
    pub fn latest_first(&self) -> impl Iterator<Item = (MessageKey, Duration)> {
        let (new, old) = self.ring.split_at(self.next);
        new.iter().rev().chain(old.iter().rev()).copied()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::message::RouteId;

    #[test]
    fn the_latest_are_remembered_and_the_oldest_says_how_far_back() {
        let mut recent = RecentConfirms::default();
        assert_eq!((recent.count(), recent.oldest()), (0, None));
        let count = CONFIRMS_MAX as u64 * 2 + 3;
        for n in 0..count {
            let key = MessageKey { id: Uuid::from_u128(n.into()), route: RouteId(0), part: 0 };
            recent.add(key, Duration::from_secs(n));
        }
        let oldest = count - CONFIRMS_MAX as u64;
        assert_eq!(
            (recent.count(), recent.oldest()),
            (CONFIRMS_MAX, Some(Duration::from_secs(oldest)))
        );
        let seconds: Vec<u64> = recent.latest_first().map(|(_, at)| at.as_secs()).collect();
        assert_eq!(seconds, (oldest..count).rev().collect::<Vec<_>>());
    }
}
