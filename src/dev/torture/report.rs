//! What the crash test says of a consumer.

use std::collections::HashMap;

use super::Event;

/// What came of it.
#[derive(Debug, Default, serde::Serialize)]
pub struct Report {
    /// Different events that were published.
    pub events: usize,
    /// Messages published again.
    pub duplicates: usize,
    /// Processes killed with -9.
    pub kills: usize,
    /// Processes that ended by themselves.
    pub ended: u32,
    /// Different events with an effect.
    pub effects: usize,
    /// Events without an effect, the parked ones among them.
    pub lost: Vec<String>,
    /// Events with more than one effect.
    pub twice: Vec<String>,
    /// Effects that came after a later one of their key; not judged without `ordered`.
    pub out_of_order: Vec<String>,
    /// Effects of messages that were never published.
    pub unknown: Vec<String>,
    /// Events that the consumer parked.
    pub parked: i64,
    /// Why the first of them was.
    pub first_parked: Option<String>,
    /// Messages that were left in the queue.
    pub left: u32,
    /// Unless all is good: the last lines that a consumer printed.
    pub output: Vec<String>,
}

impl Report {
    /// Whether each event had its effect once, and in order where that is judged.
    pub fn is_good(&self) -> bool {
        let faults = [&self.lost, &self.twice, &self.out_of_order, &self.unknown];
        faults.iter().all(|list| list.is_empty()) && self.left == 0
    }
}

/// Compares what was published with the effects, in the order in which they happened.
pub(super) fn judge(
    events: &[Event],
    effects: impl Iterator<Item = Event>,
    ordered: bool,
    report: &mut Report,
) {
    let mut times: HashMap<&str, u32> = events.iter().map(|e| (&*e.id, 0)).collect();
    let mut last: HashMap<String, i64> = HashMap::new();
    for effect in effects {
        let name = format!("{} ({} {})", effect.id, effect.key, effect.number);
        let Some(times) = times.get_mut(&*effect.id) else {
            report.unknown.push(name);
            continue;
        };
        *times += 1;
        if *times > 1 {
            report.twice.push(name);
            continue;
        }
        let highest = last.entry(effect.key).or_default();
        if ordered && effect.number < *highest {
            report.out_of_order.push(format!("{name} after {highest}"));
        }
        *highest = effect.number.max(*highest);
    }
    report.events = events.len();
    report.effects = times.values().filter(|times| **times > 0).count();
    let lost = events.iter().filter(|event| times[&*event.id] == 0);
    report.lost = lost.map(|e| format!("{} ({} {})", e.id, e.key, e.number)).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: &str, number: i64) -> Event {
        Event { id: id.into(), key: "k".into(), number }
    }

    fn judged(effects: &[Event], ordered: bool) -> Report {
        let published = [event("a", 1), event("b", 2), event("c", 3)];
        let mut report = Report::default();
        judge(&published, effects.iter().cloned(), ordered, &mut report);
        report
    }

    #[test]
    fn each_effect_once_and_in_order_is_good() {
        let report = judged(&[event("a", 1), event("b", 2), event("c", 3)], true);
        assert!(report.is_good(), "{report:?}");
        assert_eq!((report.events, report.effects), (3, 3));
    }

    #[test]
    fn a_lost_a_doubled_and_an_unknown_effect_are_found() {
        let report = judged(&[event("a", 1), event("a", 1), event("x", 9), event("b", 2)], true);
        let counts = [&report.lost, &report.twice, &report.unknown].map(Vec::len);
        assert_eq!(counts, [1, 1, 1], "{report:?}");
        assert!(!report.is_good());
    }

    #[test]
    fn an_overtaking_is_found_only_where_order_is_judged() {
        let effects = [event("a", 1), event("c", 3), event("b", 2)];
        assert_eq!(judged(&effects, true).out_of_order.len(), 1);
        assert!(judged(&effects, false).is_good());
    }

    #[test]
    fn a_message_left_in_the_queue_is_not_good() {
        let report = Report { left: 1, ..Report::default() };
        assert!(!report.is_good());
    }
}
