//! Whether a route may use a changed partition count or queue. Pure.
//!
//! Invariant: while a message is queued, or may be with a consumer, its key is not given another
//! queue, unless a person accepts that events of one key are handled out of order.

use crate::error::Error;
use crate::route::{Action, PARTITIONS_MAX, Partitions, Rule};
use crate::verdict::Verdict;

/// Queues that an error names; more are counted.
const NAMED_MAX: usize = 4;

/// The partitions that a route published to last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// The route's name.
    pub route: String,
    /// Its partitions.
    pub partitions: Partitions,
}

/// A route whose partitions are not those in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionChange {
    /// The route's name.
    pub route: String,
    /// Those in force; absent when none are recorded.
    pub from: Option<Partitions>,
    /// Those of the configuration.
    pub to: Option<Partitions>,
}

/// What is in a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// Its name.
    pub name: String,
    /// Messages that are ready.
    pub messages: u32,
    /// Consumers; each may hold messages that are not counted as ready.
    pub consumers: u32,
}

/// The routes that publish to other partitions than those in force.
pub fn changes(rules: &[Rule], in_force: &[InForce]) -> Vec<PartitionChange> {
    let publishes = rules.iter().filter(|rule| matches!(rule.action, Action::Publish { .. }));
    let change = |rule: &Rule| {
        let from = in_force.iter().find(|known| known.route == rule.name);
        let from = from.map(|known| known.partitions.clone());
        let to = rule.partitions().cloned();
        (from != to).then(|| PartitionChange { route: rule.name.clone(), from, to })
    };
    publishes.filter_map(change).collect()
}

impl PartitionChange {
    /// The queues that matter. Without a record it is all that may exist: what is there says how
    /// many were in force.
    pub fn queues(&self) -> Vec<String> {
        match (&self.from, &self.to) {
            (Some(from), _) => from.names(),
            (None, Some(to)) => Partitions { count: PARTITIONS_MAX, ..to.clone() }.names(),
            (None, None) => Vec::new(),
        }
    }

    /// `found` are those of [`PartitionChange::queues`] that exist.
    ///
    /// # Errors
    /// The verdict, with the numbers, while one of them holds messages or may hold some.
    pub fn verify(&self, found: &[Queued]) -> Result<(), Error> {
        let (from, open) = match (&self.from, &self.to) {
            (Some(from), _) => (from.count, true),
            (None, Some(to)) => {
                let is_there = |number: &u16| {
                    let name = to.name(*number);
                    found.iter().any(|queue| queue.name == name)
                };
                let last = (0..PARTITIONS_MAX).rev().find(is_there);
                let there = last.map_or(0, |last| last + 1);
                if there == to.count {
                    return Ok(());
                }
                // Nobody says that this relay filled them: a consumer alone proves nothing.
                (there, false)
            }
            (None, None) => return Ok(()),
        };
        let messages: u64 = found.iter().map(|queue| u64::from(queue.messages)).sum();
        let consumers: u64 = found.iter().map(|queue| u64::from(queue.consumers)).sum();
        if messages == 0 && (consumers == 0 || !open) {
            return Ok(());
        }
        let (route, before) = (&self.route, self.named(from));
        let now = match &self.to {
            None => "none".to_owned(),
            Some(to) => format!("{} of {:?}", to.count, to.queue),
        };
        let text =
            format!("partitions of route {route:?}: {before} are in force, configured {now}");
        let error = |text: String| Error::named(Verdict::PartitionsChanged, text);
        let back = match &self.from {
            Some(from) => format!("partitions = {} and queue = {:?}", from.count, from.queue),
            None => format!("partitions = {from}"),
        };
        let accept = format!(
            "or set {back} again; to accept that events of one key are handled out of order, pass \
             --accept-reorder to `watership init` or `watership run`"
        );
        if messages == 0 {
            let text =
                format!("{text}, and {consumers} consumers may hold messages of these queues");
            return Err(
                error(text).hint(format!("stop the consumers until the relay runs, {accept}"))
            );
        }
        let full: Vec<&Queued> = found.iter().filter(|queue| queue.messages > 0).collect();
        let named = full.iter().take(NAMED_MAX);
        let mut list: Vec<String> =
            named.map(|queue| format!("{} in {:?}", queue.messages, queue.name)).collect();
        if full.len() > NAMED_MAX {
            list.push(format!("the others in {} more queues", full.len() - NAMED_MAX));
        }
        let list = list.join(", ");
        let text = format!("{text}, while {messages} messages are queued: {list}");
        let hint = format!(
            "stop the relay, let the consumers empty the queues, and stop the consumers; {accept}"
        );
        Err(error(text).hint(hint))
    }

    fn named(&self, count: u16) -> String {
        let partitions = self.from.as_ref().or(self.to.as_ref());
        let queue = partitions.map_or("", |partitions| &*partitions.queue);
        format!("{count} of {queue:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::default_rules;

    fn of(queue: &str, count: u16) -> Option<Partitions> {
        Some(Partitions { queue: queue.into(), count })
    }

    fn queued(name: &str, messages: u32, consumers: u32) -> Queued {
        Queued { name: name.into(), messages, consumers }
    }

    fn change(from: Option<Partitions>, to: Option<Partitions>) -> PartitionChange {
        PartitionChange { route: "orders".into(), from, to }
    }

    #[test]
    fn a_change_is_another_number_another_queue_or_none_at_all() {
        let mut rule = default_rules().remove(0);
        let found = |rule: &Rule, count| {
            let partitions = of("q", count).expect("some");
            let in_force = [InForce { route: rule.name.clone(), partitions }];
            changes(std::slice::from_ref(rule), &in_force)
        };
        assert_eq!(found(&rule, 8).len(), 1, "no partitions any more");
        let Action::Publish { partitions, .. } = &mut rule.action else { unreachable!() };
        *partitions = of("q", 8);
        assert!(found(&rule, 8).is_empty());
        assert_eq!(
            (&found(&rule, 12)[0].from, &found(&rule, 12)[0].to),
            (&of("q", 12), &of("q", 8))
        );
        assert_eq!(changes(std::slice::from_ref(&rule), &[])[0].from, None);
        rule.action = Action::Drop;
        assert!(found(&rule, 8).is_empty(), "it publishes nothing that could overtake");
    }

    #[test]
    fn what_is_queued_or_may_be_with_a_consumer_refuses_it_with_the_numbers() {
        for (from, to) in [(8, 12), (12, 8)] {
            let change = change(of("q", from), of("q", to));
            assert_eq!(change.queues().len(), usize::from(from));
            assert!(change.verify(&[queued("q.00", 0, 0)]).is_ok());
            let error = change.verify(&[queued("q.00", 3, 0), queued("q.07", 4, 1)]).unwrap_err();
            assert_eq!(error.verdict(), Some(Verdict::PartitionsChanged));
            let text = error.text_with_hint();
            let numbers = format!("{from} of \"q\" are in force, configured {to} of \"q\"");
            for part in
                [&*numbers, "7 messages", "3 in \"q.00\", 4 in \"q.07\"", "--accept-reorder"]
            {
                assert!(text.contains(part), "{text}");
            }
            let held = change.verify(&[queued("q.00", 0, 1)]).unwrap_err().to_string();
            assert!(held.contains("1 consumers may hold"), "{held}");
        }
        let gone = change(of("q", 8), None).verify(&[queued("q.00", 1, 0)]).unwrap_err();
        assert!(gone.to_string().contains("configured none"), "{gone}");
    }

    #[test]
    fn without_a_record_the_queues_that_exist_say_what_was_in_force() {
        let change = change(None, of("q", 2));
        assert_eq!(change.queues().len(), usize::from(PARTITIONS_MAX));
        assert!(change.verify(&[]).is_ok(), "the first start");
        assert!(change.verify(&[queued("q.00", 9, 1), queued("q.01", 9, 1)]).is_ok(), "the same");
        let three = [queued("q.00", 0, 0), queued("q.02", 1, 0)];
        let error = change.verify(&three).unwrap_err().to_string();
        assert!(error.contains("3 of \"q\" are in force, configured 2 of \"q\""), "{error}");
        assert!(change.verify(&[queued("q.00", 0, 1)]).is_ok(), "a consumer came first");
    }
}
