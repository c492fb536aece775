//! Where messages can go: bindings and alternate exchanges, followed by the rules of each type of
//! exchange.
//!
//! The broker asks the alternate exchange only about a message that no binding of the exchange
//! matched; a binding to another exchange counts, wherever that one leads
//! (`process_alternate` in `deps/rabbit/src/rabbit_exchange.erl`).

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::matching::{self, Takes};
use super::{BindingFacts, ExchangeFacts, KnownHeaders, KnownKey, Policies, Survey};

/// The argument of an exchange, and the key of a policy.
const ALTERNATE: &str = "alternate-exchange";

/// Where a route's messages can go.
#[derive(Debug, Default)]
pub(super) struct Reach {
    pub queues: BTreeSet<String>,
    /// Each message reaches a queue.
    pub covered: bool,
    /// The exchanges on the way, and whether each message that comes to one reaches a queue from
    /// it; `None` while it is followed.
    pub exchanges: BTreeMap<String, Option<bool>>,
    /// What cannot be judged.
    pub unknown: BTreeSet<String>,
    /// An exchange that keeps messages before it routes them.
    pub delayed: Option<String>,
}

impl Survey {
    pub(super) fn reach(&self, headers: &KnownHeaders, exchange: &str, key: &KnownKey) -> Reach {
        let mut reach = Reach::default();
        reach.covered = self.walk(headers, exchange, key, &mut reach);
        reach
    }

    /// Follows one exchange; returns whether each message that comes to it reaches a queue.
    fn walk(
        &self,
        headers: &KnownHeaders,
        exchange: &str,
        key: &KnownKey,
        reach: &mut Reach,
    ) -> bool {
        if let Some(covered) = reach.exchanges.get(exchange) {
            // A message comes to each exchange once, so a circle adds nothing.
            return covered.unwrap_or(false);
        }
        let Some(facts) = self.exchanges.get(exchange) else { return false };
        reach.exchanges.insert(exchange.to_owned(), None);
        if facts.kind == "x-delayed-message" {
            reach.delayed.get_or_insert_with(|| exchange.to_owned());
        }
        let rules = facts.rules();
        if rules == Rules::Unknown {
            let kind = &facts.kind;
            reach.unknown.insert(format!(
                "exchange {exchange:?} is of type {kind:?}, and how it routes is not known here"
            ));
        }
        let mut matched = Takes::None;
        let (mut one_takes_all, mut all_lead) = (false, true);
        for binding in self.bindings.get(exchange).into_iter().flatten() {
            let takes = rules.takes(binding, headers, key);
            if takes == Takes::None {
                continue;
            }
            matched = matched.max(takes);
            let leads = if binding.destination_type == "queue" {
                reach.queues.insert(binding.destination.clone());
                true
            } else {
                self.walk(headers, &binding.destination, key, reach)
            };
            all_lead &= leads;
            one_takes_all |= leads && takes == Takes::All;
        }
        let mut covered = one_takes_all;
        if rules == Rules::OneOf {
            covered = matched == Takes::All && all_lead;
        }
        if matched != Takes::All
            && let Some(alternate) = self.alternate(exchange, facts, reach)
        {
            covered = self.walk(headers, &alternate, key, reach) && all_lead;
        }
        reach.exchanges.insert(exchange.to_owned(), Some(covered));
        covered
    }

    /// The alternate exchange; a policy that cannot be read is reported.
    fn alternate(
        &self,
        exchange: &str,
        facts: &ExchangeFacts,
        reach: &mut Reach,
    ) -> Option<String> {
        let policy = facts.policy.as_deref().filter(|policy| !policy.is_empty());
        if let Some(policy) = policy
            && !facts.arguments.contains_key(ALTERNATE)
            && self.policies.as_ref().is_none_or(|all| !all.contains_key(policy))
        {
            reach.unknown.insert(format!(
                "policy {policy:?} applies to exchange {exchange:?} and could not be read: it may \
                 set an alternate exchange"
            ));
        }
        facts.alternate(self.policies.as_ref())
    }
}

/// How an exchange decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    /// Every binding takes everything.
    Fanout,
    /// Whole keys.
    Direct,
    /// Patterns of keys.
    Topic,
    /// Headers.
    Headers,
    /// Each message goes to one of the bindings.
    OneOf,
    /// Those of a plugin that is not known here.
    Unknown,
}

impl ExchangeFacts {
    /// The alternate exchange: the argument's, or else that of the policy.
    pub(in crate::amqp) fn alternate(&self, policies: Option<&Policies>) -> Option<String> {
        let of_policy = || policies?.get(self.policy.as_ref()?)?.get(ALTERNATE);
        let name = self.arguments.get(ALTERNATE).or_else(of_policy);
        name.and_then(Value::as_str).map(str::to_owned)
    }

    fn rules(&self) -> Rules {
        let delayed = self.arguments.get("x-delayed-type").and_then(Value::as_str);
        let kind = match self.kind.as_str() {
            "x-delayed-message" => delayed.unwrap_or(""),
            kind => kind,
        };
        match kind {
            "fanout" | "x-recent-history" => Rules::Fanout,
            "direct" => Rules::Direct,
            "topic" => Rules::Topic,
            "headers" => Rules::Headers,
            "x-consistent-hash" | "x-modulus-hash" => Rules::OneOf,
            _ => Rules::Unknown,
        }
    }
}

impl Rules {
    fn takes(self, binding: &BindingFacts, headers: &KnownHeaders, key: &KnownKey) -> Takes {
        match self {
            Rules::Fanout | Rules::OneOf => Takes::All,
            Rules::Direct => matching::direct(&binding.routing_key, key),
            Rules::Topic => matching::topic(&binding.routing_key, key),
            Rules::Headers => matching::headers(&binding.arguments, headers),
            Rules::Unknown => Takes::Some,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::super::tests::{key, queue};
    use super::super::*;

    fn bound(destination: &str, kind: &str, routing_key: &str) -> BindingFacts {
        BindingFacts {
            destination: destination.into(),
            destination_type: kind.into(),
            routing_key: routing_key.into(),
            arguments: Map::new(),
        }
    }

    fn survey(bindings: &[(&str, BindingFacts)]) -> Survey {
        let mut survey = Survey::default();
        for (name, kind) in [("events", "topic"), ("inner", "direct"), ("spare", "fanout")] {
            let exchange = ExchangeFacts { kind: kind.into(), ..ExchangeFacts::default() };
            survey.exchanges.insert(name.into(), exchange);
        }
        for (source, binding) in bindings {
            survey.bindings.entry((*source).into()).or_default().push(binding.clone());
        }
        for (name, kind) in [("good", "quorum"), ("poor", "classic")] {
            survey.queues.insert(name.into(), queue(kind, ""));
        }
        survey
    }

    #[test]
    fn a_route_is_worth_its_worst_queue_that_its_keys_reach() {
        let orders = key("order.{}");
        let grade = |s: &Survey| s.grade(&[], "events", &orders);
        let none = grade(&survey(&[]));
        assert_eq!(
            (none.grade, &*none.reason),
            (Grade::Unsafe, "no queue is bound to exchange \"events\"")
        );
        let other = grade(&survey(&[("events", bound("good", "queue", "customer.*"))]));
        assert_eq!(other.grade, Grade::Unsafe);
        assert!(other.reason.contains("matches routing key \"order.{}\"; bound: \"customer.*\""));
        let good = ("events", bound("good", "queue", "order.#"));
        assert_eq!(grade(&survey(std::slice::from_ref(&good))).grade, Grade::Safe);
        let poor = ("events", bound("poor", "queue", "customer.#"));
        assert_eq!(grade(&survey(&[good.clone(), poor])).grade, Grade::Safe, "not reached");
        let poor = ("events", bound("poor", "queue", "#"));
        let both = grade(&survey(&[good.clone(), poor]));
        assert!(both.grade == Grade::Weak && both.reason.starts_with("queue \"poor\": a classic"));
        let full = ("events", bound("full", "queue", "#"));
        let mut two = survey(&[good.clone(), full.clone()]);
        let limited = r#","arguments":{"x-max-length":5,"x-overflow":"reject-publish"}"#;
        two.queues.insert("full".into(), queue("quorum", limited));
        let graded = grade(&two);
        assert!(graded.grade == Grade::Weak && graded.reason.contains("the other queues receive"));
        let mut one = survey(&[full]);
        one.queues = two.queues;
        assert_eq!(grade(&one).grade, Grade::Safe, "alone it may be full");
        let gone = grade(&survey(&[good, ("events", bound("gone", "queue", "#"))]));
        assert_eq!(
            (gone.grade, &*gone.reason),
            (Grade::Unsafe, "queue \"gone\": it does not exist")
        );
        let missing = survey(&[]).grade(&[], "nowhere", &orders);
        assert_eq!(missing.reason, "exchange \"nowhere\" does not exist");
    }

    #[test]
    fn bindings_between_exchanges_are_followed_by_the_rules_of_each() {
        let inner = ("events", bound("inner", "exchange", "order.#"));
        let to =
            |routing_key| survey(&[inner.clone(), ("inner", bound("poor", "queue", routing_key))]);
        let grade = |s: &Survey, text: &str| s.grade(&[], "events", &key(text));
        assert_eq!(grade(&to("order.paid"), "order.paid").grade, Grade::Weak);
        assert_eq!(grade(&to("order.#"), "order.paid").grade, Grade::Unsafe, "direct has no #");
        let some = grade(&to("order.paid"), "order.{}");
        assert!(
            some.reason.ends_with("some routing keys of the form \"order.{}\" match no binding")
        );
        // A circle ends.
        let circle = [inner, ("inner", bound("events", "exchange", "order.paid"))];
        assert_eq!(grade(&survey(&circle), "order.paid").grade, Grade::Unsafe);
    }

    #[test]
    fn what_no_binding_takes_goes_to_the_alternate_exchange() {
        let mut survey = survey(&[("spare", bound("poor", "queue", ""))]);
        let events = survey.exchanges.get_mut("events").unwrap();
        events.arguments.insert("alternate-exchange".into(), "spare".into());
        assert_eq!(survey.grade(&[], "events", &key("a")).grade, Grade::Weak);
        survey.bindings.insert("events".into(), vec![bound("good", "queue", "a")]);
        assert_eq!(survey.grade(&[], "events", &key("a")).grade, Grade::Safe);
        assert_eq!(survey.grade(&[], "events", &key("{}")).grade, Grade::Weak, "some go there");
    }

    #[test]
    fn an_alternate_exchange_is_not_used_when_a_binding_matched_that_leads_nowhere() {
        let mut survey = survey(&[
            ("events", bound("inner", "exchange", "#")),
            ("spare", bound("good", "queue", "")),
        ]);
        let events = survey.exchanges.get_mut("events").unwrap();
        events.arguments.insert("alternate-exchange".into(), "spare".into());
        let graded = survey.grade(&[], "events", &key("a"));
        assert_eq!(graded.grade, Grade::Unsafe, "{}", graded.reason);
        assert!(graded.reason.contains("no queue is reached"), "{}", graded.reason);
        survey.bindings.insert("events".into(), vec![bound("inner", "exchange", "b")]);
        assert_eq!(survey.grade(&[], "events", &key("a")).grade, Grade::Safe, "not matched");
    }

    #[test]
    fn an_alternate_exchange_of_a_policy_is_followed_or_said_to_be_unknown() {
        let mut survey = survey(&[("spare", bound("good", "queue", ""))]);
        survey.exchanges.get_mut("events").unwrap().policy = Some("AE".into());
        let unknown = survey.grade(&[], "events", &key("a"));
        assert_eq!(unknown.grade, Grade::NotVerified);
        assert!(unknown.reason.contains("policy \"AE\" applies"), "{}", unknown.reason);
        let policy = json!({"alternate-exchange": "spare"});
        survey.policies = Some([("AE".to_owned(), policy)].into());
        assert_eq!(survey.grade(&[], "events", &key("a")).grade, Grade::Safe);
        survey.policies = Some([("AE".to_owned(), json!({}))].into());
        assert_eq!(survey.grade(&[], "events", &key("a")).grade, Grade::Unsafe);
    }

    #[test]
    fn an_exchange_that_is_reached_twice_counts_both_times_in_any_order() {
        let bindings = [
            ("events", bound("a", "exchange", "order.paid")),
            ("events", bound("b", "exchange", "#")),
            ("a", bound("inner", "exchange", "")),
            ("b", bound("inner", "exchange", "")),
            ("inner", bound("good", "queue", "")),
        ];
        let mut reversed = bindings.clone();
        reversed.reverse();
        for bindings in [bindings, reversed] {
            let mut survey = survey(&bindings);
            for name in ["a", "b", "inner"] {
                let fanout = ExchangeFacts { kind: "fanout".into(), ..Default::default() };
                survey.exchanges.insert(name.into(), fanout);
            }
            let graded = survey.grade(&[], "events", &key("order.{}"));
            assert_eq!(graded.grade, Grade::Safe, "{}", graded.reason);
        }
    }

    #[test]
    fn a_value_with_dots_is_not_one_word_so_a_star_may_miss_it() {
        let star = survey(&[("events", bound("good", "queue", "order.*"))]);
        let any = [KeyPart::Text("order.".into()), KeyPart::Any];
        let graded = star.grade(&[], "events", &any);
        assert_eq!(graded.grade, Grade::NotVerified);
        assert!(graded.reason.contains("match no binding"), "{}", graded.reason);
        let word = [KeyPart::Text("order.".into()), KeyPart::Word];
        assert_eq!(star.grade(&[], "events", &word).grade, Grade::Safe);
    }

    #[test]
    fn what_a_plugins_exchange_does_is_known_or_said_to_be_unknown() {
        let grade = |kind: &str, arguments: serde_json::Value| {
            let mut survey = survey(&[("events", bound("good", "queue", "1"))]);
            let events = survey.exchanges.get_mut("events").unwrap();
            events.kind = kind.into();
            events.arguments = arguments.as_object().cloned().unwrap();
            survey.grade(&[], "events", &key("{}")).grade
        };
        assert_eq!(grade("x-consistent-hash", json!({})), Grade::Safe);
        assert_eq!(grade("x-strange", json!({})), Grade::NotVerified);
        assert_eq!(grade("x-delayed-message", json!({"x-delayed-type": "fanout"})), Grade::Weak);
    }
}
