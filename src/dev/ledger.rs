//! What was committed and what arrived: the judge of the demo and of the fault tests.
//!
//! Pure: times are handed in, as durations since the start of the run. Invariant: every event is
//! judged by its id; the order of a key is judged by first arrivals only, because a duplicate may
//! come at any time and the consumer drops it.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

/// One event as it was written: the `n`-th committed event of `key`, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// The ordering key.
    pub key: String,
    /// Its number within the key.
    pub n: u64,
}

/// The record of one run.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: HashMap<Uuid, Entry>,
    /// The highest `n` that arrived, by key.
    arrived_up_to: HashMap<String, u64>,
    /// First arrivals by second since the start.
    per_second: Vec<u64>,
    counts: Counts,
}

/// What the ledger counts while the run continues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Events of committed transactions.
    pub committed: u64,
    /// Different events that arrived.
    pub delivered: u64,
    /// Arrivals of an event that had arrived before.
    pub duplicates: u64,
    /// Those of them that the broker marked as redelivered to a consumer that had gone.
    pub redelivered: u64,
    /// First arrivals whose key had already got further.
    pub violations: u64,
    /// Arrivals whose key or number is not what was committed under that id, or unreadable.
    pub altered: u64,
}

#[derive(Debug)]
struct Entry {
    mark: Stamp,
    committed: Option<Duration>,
    arrived: Option<Duration>,
}

/// The judgement at the end of a run.
#[derive(Debug)]
pub struct Judgement {
    /// What was counted up to the end.
    pub counts: Counts,
    /// Committed and never arrived.
    pub lost: u64,
    /// Arrived and never committed: rolled back, or invented.
    pub unexpected: u64,
    /// Different keys that arrived.
    pub keys: usize,
    /// From the first commit to the last first arrival.
    pub span: Duration,
    /// Most first arrivals within one second.
    pub best_second: u64,
    /// Median and 99th percentile from commit to first arrival, of the events committed before
    /// the first fault.
    pub calm: Option<(Duration, Duration)>,
    /// The longest way from commit to first arrival, faults included.
    pub longest: Duration,
}

impl Ledger {
    /// The transaction with this event committed at `at`.
    pub fn committed(&mut self, id: Uuid, mark: Stamp, at: Duration) {
        self.counts.committed += 1;
        // The event may have arrived before its COMMIT returned to the writer.
        let entry = self.entries.entry(id).or_insert_with(|| Entry::new(mark.clone()));
        if entry.mark != mark {
            self.counts.altered += 1;
        }
        entry.committed = Some(at);
    }

    /// A message arrived at `at`. `redelivered` is the broker's mark.
    pub fn arrived(&mut self, id: Uuid, mark: Stamp, at: Duration, redelivered: bool) {
        let entry = self.entries.entry(id).or_insert_with(|| Entry::new(mark.clone()));
        if entry.mark != mark {
            self.counts.altered += 1;
        }
        if entry.arrived.is_some() {
            self.counts.duplicates += 1;
            self.counts.redelivered += u64::from(redelivered);
            return;
        }
        entry.arrived = Some(at);
        self.counts.delivered += 1;
        let second = usize::try_from(at.as_secs()).expect("a run takes seconds, not ages");
        if self.per_second.len() <= second {
            self.per_second.resize(second + 1, 0);
        }
        self.per_second[second] += 1;
        let up_to = self.arrived_up_to.entry(mark.key).or_default();
        if mark.n <= *up_to {
            self.counts.violations += 1;
        } else {
            *up_to = mark.n;
        }
    }

    /// A message arrived that is not one of the run's.
    pub fn unreadable(&mut self) {
        self.counts.altered += 1;
    }

    /// The counts so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The judgement; `first_fault` ends the calm part of the run.
    pub fn judgement(&self, first_fault: Duration) -> Judgement {
        let (mut lost, mut unexpected) = (0, 0);
        let (mut first, mut last) = (Duration::MAX, Duration::ZERO);
        let mut calm = Vec::new();
        let mut longest = Duration::ZERO;
        for entry in self.entries.values() {
            match (entry.committed, entry.arrived) {
                (Some(committed), Some(arrived)) => {
                    let took = arrived.saturating_sub(committed);
                    longest = longest.max(took);
                    first = first.min(committed);
                    last = last.max(arrived);
                    if committed < first_fault {
                        calm.push(took);
                    }
                }
                (Some(_), None) => lost += 1,
                (None, Some(_)) => unexpected += 1,
                (None, None) => unreachable!("an entry is made by a commit or an arrival"),
            }
        }
        calm.sort_unstable();
        Judgement {
            counts: self.counts,
            lost,
            unexpected,
            keys: self.arrived_up_to.len(),
            span: last.saturating_sub(first),
            best_second: self.per_second.iter().copied().max().unwrap_or_default(),
            calm: percentile(&calm, 50).zip(percentile(&calm, 99)),
            longest,
        }
    }
}

impl Entry {
    fn new(mark: Stamp) -> Self {
        Self { mark, committed: None, arrived: None }
    }
}

impl Judgement {
    /// Whether everything that committed arrived, nothing else did, and in order. Duplicates are
    /// allowed: that is what at-least-once means.
    pub fn holds(&self) -> bool {
        let Counts { committed, violations, altered, .. } = self.counts;
        committed > 0 && self.lost == 0 && self.unexpected == 0 && violations == 0 && altered == 0
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    let last = sorted.len().checked_sub(1)?;
    Some(sorted[(sorted.len() * percent / 100).min(last)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn mark(key: &str, n: u64) -> Stamp {
        Stamp { key: key.into(), n }
    }

    /// Ten events of each of two keys, all committed; the log of a flawless consumer.
    fn run() -> (Ledger, Vec<(Uuid, Stamp)>) {
        let mut ledger = Ledger::default();
        let mut log = Vec::new();
        for n in 1..=10 {
            for key in ["a", "b"] {
                let id = Uuid::from_u128(u128::from(n) << 8 | u128::from(key.as_bytes()[0]));
                ledger.committed(id, mark(key, n), SECOND);
                log.push((id, mark(key, n)));
            }
        }
        (ledger, log)
    }

    fn judge(mut ledger: Ledger, log: Vec<(Uuid, Stamp)>) -> Judgement {
        for (id, mark) in log {
            ledger.arrived(id, mark, 2 * SECOND, false);
        }
        ledger.judgement(SECOND)
    }

    #[test]
    fn a_flawless_log_holds() {
        let (ledger, log) = run();
        let judgement = judge(ledger, log);
        assert!(judgement.holds());
        assert_eq!((judgement.counts.committed, judgement.counts.delivered), (20, 20));
        assert_eq!((judgement.keys, judgement.best_second, judgement.longest), (2, 20, SECOND));
    }

    #[test]
    fn a_dropped_event_is_lost() {
        let (ledger, mut log) = run();
        log.remove(7);
        let judgement = judge(ledger, log);
        assert_eq!((judgement.lost, judgement.counts.violations), (1, 0));
        assert!(!judgement.holds());
    }

    #[test]
    fn two_swapped_events_of_a_key_are_a_violation() {
        let (ledger, mut log) = run();
        log.swap(4, 6);
        let judgement = judge(ledger, log);
        assert_eq!((judgement.lost, judgement.counts.violations), (0, 1));
        assert!(!judgement.holds());
    }

    #[test]
    fn two_swapped_events_of_different_keys_are_fine() {
        let (ledger, mut log) = run();
        log.swap(4, 5);
        assert!(judge(ledger, log).holds());
    }

    #[test]
    fn a_repeated_event_is_a_duplicate_and_no_violation() {
        let (ledger, mut log) = run();
        log.insert(9, log[2].clone());
        let judgement = judge(ledger, log);
        assert_eq!((judgement.counts.duplicates, judgement.counts.violations), (1, 0));
        assert!(judgement.holds());
    }

    #[test]
    fn an_event_that_never_committed_is_unexpected() {
        let (ledger, mut log) = run();
        log.push((Uuid::from_u128(1), mark("a", 11)));
        let judgement = judge(ledger, log);
        assert_eq!(judgement.unexpected, 1);
        assert!(!judgement.holds());
    }

    #[test]
    fn an_event_with_another_content_is_altered() {
        let (ledger, mut log) = run();
        log[3].1.n = 99;
        let judgement = judge(ledger, log);
        assert_eq!(judgement.counts.altered, 1);
        assert!(!judgement.holds());
    }

    #[test]
    fn an_arrival_before_the_commit_returned_counts_as_immediate() {
        let mut ledger = Ledger::default();
        ledger.arrived(Uuid::from_u128(1), mark("a", 1), SECOND, false);
        ledger.committed(Uuid::from_u128(1), mark("a", 1), 2 * SECOND);
        let judgement = ledger.judgement(3 * SECOND);
        assert!(judgement.holds());
        assert_eq!(judgement.calm, Some((Duration::ZERO, Duration::ZERO)));
    }

    #[test]
    fn an_empty_run_proves_nothing() {
        assert!(!Ledger::default().judgement(SECOND).holds());
    }
}
