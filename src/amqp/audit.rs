//! What a confirm for a route's messages is worth: SAFE, WEAK or UNSAFE, with the reasons. Pure.
//!
//! A confirm says that every queue which the message reached has it. So a route is worth as much
//! as the worst queue that its routing keys can reach: over bindings, bindings between exchanges
//! and alternate exchanges, by the rules of each exchange's type. `management` gathers the facts.
//!
//! <https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed>

mod matching;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use matching::Takes;

/// What a confirm is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Confirmed is stored on a majority of several nodes, and stays until it is consumed.
    Safe,
    /// Not known: AMQP itself shows neither bindings nor policies.
    NotVerified,
    /// Confirmed is stored, but power loss, a lost disk, time or a consumer may take it.
    Weak,
    /// Confirmed may be dropped, or nothing can be confirmed.
    Unsafe,
}

impl Grade {
    /// The label of its metric; `metrics::ROUTE_GRADES` has all of them.
    pub fn label(self) -> &'static str {
        match self {
            Grade::Safe => "safe",
            Grade::NotVerified => "not_verified",
            Grade::Weak => "weak",
            Grade::Unsafe => "unsafe",
        }
    }
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Grade::Safe => "SAFE",
            Grade::NotVerified => "NOT VERIFIED",
            Grade::Weak => "WEAK",
            Grade::Unsafe => "UNSAFE",
        })
    }
}

/// A grade and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graded {
    /// What a confirm is worth.
    pub grade: Grade,
    /// Why; for a queue, its name comes first.
    pub reason: String,
}

/// A routing key as far as it is known: `None` stands for any text.
pub type KnownKey = [Option<String>];

/// An exchange.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ExchangeFacts {
    /// `topic`, `direct`, `fanout`, `headers` or a plugin's.
    #[serde(rename = "type")]
    pub kind: String,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Among them `alternate-exchange`.
    pub arguments: Map<String, Value>,
}

/// A binding of an exchange to a queue or to another exchange.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct BindingFacts {
    /// Name of the queue or exchange.
    pub destination: String,
    /// `queue` or `exchange`.
    pub destination_type: String,
    /// The binding key.
    pub routing_key: String,
    /// What a headers exchange compares.
    pub arguments: Map<String, Value>,
}

/// What a confirm from a queue depends on.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct QueueFacts {
    /// Its name.
    pub name: String,
    /// `quorum`, `classic` or `stream`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Deleted with its last consumer.
    pub auto_delete: bool,
    /// Belongs to one connection.
    pub exclusive: bool,
    /// The nodes that have it, where it is replicated.
    pub members: Vec<String>,
    arguments: Map<String, Value>,
    /// What policies and operator policies make of it; an empty list when there is none.
    effective_policy_definition: Value,
}

/// Everything that the grades depend on.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    /// Major version of the broker; 0 when it is not known.
    pub broker_major: u32,
    /// By name; those that do not exist are absent.
    pub exchanges: BTreeMap<String, ExchangeFacts>,
    /// By the exchange that they lead from.
    pub bindings: BTreeMap<String, Vec<BindingFacts>>,
    /// By name; those that do not exist are absent.
    pub queues: BTreeMap<String, QueueFacts>,
}

/// Where a route's messages can go.
#[derive(Debug, Default)]
struct Reach {
    queues: BTreeSet<String>,
    /// Some binding takes every message.
    covered: bool,
    seen: BTreeSet<String>,
}

impl Survey {
    /// What a confirm is worth for messages of `route` to `exchange` with this routing key.
    pub fn grade(&self, route: &str, exchange: &str, key: &KnownKey) -> Graded {
        let is_unsafe = |reason| Graded { grade: Grade::Unsafe, reason };
        if !self.exchanges.contains_key(exchange) {
            return is_unsafe(format!("exchange {exchange:?} does not exist"));
        }
        let reach = self.reach(route, exchange, key);
        if reach.queues.is_empty() {
            return is_unsafe(self.unbound(exchange, key));
        }
        let graded: Vec<Graded> = reach.queues.iter().map(|name| self.grade_queue(name)).collect();
        let mut grade = graded.iter().map(|v| v.grade).max().unwrap_or(Grade::Unsafe);
        let worst = graded.into_iter().filter(|v| v.grade == grade).map(|v| v.reason);
        let mut reason = worst.collect::<Vec<_>>().join("; ");
        if !reach.covered {
            let key = shown(key);
            reason.push_str(&format!("; some routing keys of the form {key:?} match no binding"));
        }
        // What one queue refuses is nacked and tried again, and the others have taken it already.
        let refuses = |name: &&String| self.queues.get(*name).is_some_and(QueueFacts::refuses);
        if reach.queues.len() > 1
            && let Some(name) = reach.queues.iter().find(refuses)
        {
            grade = grade.max(Grade::Weak);
            reason.push_str(&format!(
                "; while queue {name:?} is full, the other queues receive every retry"
            ));
        }
        Graded { grade, reason }
    }

    /// The queues that messages of the route can reach.
    pub fn queues_of(&self, route: &str, exchange: &str, key: &KnownKey) -> Vec<String> {
        self.reach(route, exchange, key).queues.into_iter().collect()
    }

    fn reach(&self, route: &str, exchange: &str, key: &KnownKey) -> Reach {
        let mut reach = Reach::default();
        reach.covered = self.walk(route, exchange, key, &mut reach);
        reach
    }

    /// Follows the bindings of one exchange; returns whether one takes every message.
    fn walk(&self, route: &str, exchange: &str, key: &KnownKey, reach: &mut Reach) -> bool {
        if !reach.seen.insert(exchange.to_owned()) {
            return false;
        }
        let Some(facts) = self.exchanges.get(exchange) else { return false };
        let mut covered = false;
        for binding in self.bindings.get(exchange).into_iter().flatten() {
            let takes = facts.takes(binding, route, key);
            if takes == Takes::None {
                continue;
            }
            let reaches = if binding.destination_type == "queue" {
                reach.queues.insert(binding.destination.clone());
                true
            } else {
                self.walk(route, &binding.destination, key, reach)
            };
            covered |= reaches && takes == Takes::All;
        }
        let alternate = facts.arguments.get("alternate-exchange").and_then(Value::as_str);
        match alternate {
            Some(alternate) if !covered => self.walk(route, alternate, key, reach),
            Some(_) | None => covered,
        }
    }

    fn unbound(&self, exchange: &str, key: &KnownKey) -> String {
        const SHOWN: usize = 5;
        let keys: Vec<String> = self
            .bindings
            .get(exchange)
            .into_iter()
            .flatten()
            .take(SHOWN)
            .map(|b| format!("{:?}", b.routing_key))
            .collect();
        if keys.is_empty() {
            return format!("no queue is bound to exchange {exchange:?}");
        }
        let (key, keys) = (shown(key), keys.join(", "));
        format!("no binding of exchange {exchange:?} matches routing key {key:?}; bound: {keys}")
    }

    fn grade_queue(&self, name: &str) -> Graded {
        let graded = match self.queues.get(name) {
            Some(queue) => queue.grade(self.broker_major),
            None => Graded { grade: Grade::Unsafe, reason: "it does not exist".into() },
        };
        Graded { reason: format!("queue {name:?}: {}", graded.reason), ..graded }
    }
}

impl ExchangeFacts {
    fn takes(&self, binding: &BindingFacts, route: &str, key: &KnownKey) -> Takes {
        match self.kind.as_str() {
            "fanout" => Takes::All,
            "direct" => matching::direct(&binding.routing_key, key),
            "topic" => matching::topic(&binding.routing_key, key),
            "headers" => matching::headers(&binding.arguments, route),
            // A plugin's exchange: what it does with keys is not known.
            _ => Takes::Some,
        }
    }
}

/// The key for people: what is not known is `{}`.
fn shown(key: &KnownKey) -> String {
    key.iter().map(|piece| piece.as_deref().unwrap_or("{}")).collect()
}

impl QueueFacts {
    /// The grade and its reasons, the worst first.
    pub fn grade(&self, broker_major: u32) -> Graded {
        let mut reasons = self.reasons(broker_major);
        // Stable: reasons of one grade stay in their order.
        reasons.sort_by_key(|(grade, _)| std::cmp::Reverse(*grade));
        let grade = reasons.first().map_or(Grade::Safe, |(grade, _)| *grade);
        let texts: Vec<String> = reasons.into_iter().map(|(_, text)| text).collect();
        let reason = if texts.is_empty() { "quorum queue".into() } else { texts.join(", ") };
        Graded { grade, reason }
    }

    fn reasons(&self, broker_major: u32) -> Vec<(Grade, String)> {
        let mut list = Vec::new();
        let mut add = |grade, text: &str| list.push((grade, text.to_owned()));
        if !self.durable {
            add(Grade::Unsafe, "not durable: a broker restart loses its messages");
        }
        if self.exclusive || self.auto_delete {
            add(Grade::Unsafe, "it is deleted with its last consumer or connection");
        }
        let overflow = self.overflow();
        if self.kind != "stream" && self.is_limited() && !self.refuses() {
            let text = format!("has a length limit and overflow {overflow}: when full, it drops");
            add(Grade::Unsafe, &format!("{text} its oldest messages"));
        }
        if self.has("message-ttl") || self.has("expires") {
            add(Grade::Weak, "messages or the queue expire");
        }
        let redelivered = self.delivery_limit(broker_major);
        if let Some(limit) = redelivered.filter(|_| !self.has("dead-letter-exchange")) {
            let text = format!("delivery-limit {limit} without a dead-letter exchange:");
            add(Grade::Weak, &format!("{text} a message that is redelivered too often is dropped"));
        }
        match self.kind.as_str() {
            "quorum" if self.members.len() == 1 => {
                add(Grade::Weak, "quorum queue with a single member: its disk is the only copy");
            }
            "quorum" => {}
            "stream" => {
                add(Grade::Weak, "a stream confirms before fsync, and its retention drops messages")
            }
            _ => add(Grade::Weak, "a classic queue lives on one node and confirms before fsync"),
        }
        list
    }

    /// After how many deliveries a quorum queue drops or dead-letters a message; RabbitMQ 4 has a
    /// default. <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>
    fn delivery_limit(&self, broker_major: u32) -> Option<i64> {
        const DEFAULT: i64 = 20;
        let set = self.value("delivery-limit").and_then(Value::as_i64);
        let default = (broker_major >= 4).then_some(DEFAULT);
        set.or(default).filter(|limit| self.kind == "quorum" && *limit >= 0)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let argument = self.arguments.get(&format!("x-{name}"));
        argument.or_else(|| self.effective_policy_definition.get(name))
    }

    fn is_limited(&self) -> bool {
        self.has("max-length") || self.has("max-length-bytes")
    }

    /// When it is full it takes nothing more, and drops nothing.
    fn refuses(&self) -> bool {
        let refuses = match self.overflow() {
            "reject-publish" => true,
            // A quorum queue does not know it, and drops its head instead.
            "reject-publish-dlx" => self.kind != "quorum",
            _ => false,
        };
        refuses && self.is_limited()
    }

    /// On a quorum queue the policy goes before the argument, on others after it
    /// (`deps/rabbit/src/rabbit_quorum_queue.erl` and `rabbit_amqqueue_process.erl`).
    fn overflow(&self) -> &str {
        let policy =
            self.effective_policy_definition.get("overflow").filter(|_| self.kind == "quorum");
        policy.and_then(Value::as_str).or_else(|| self.text("overflow")).unwrap_or("drop-head")
    }

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.value(name).and_then(Value::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A routing key with `{}` for what is not known.
    pub(super) fn key(text: &str) -> Vec<Option<String>> {
        let mut pieces = Vec::new();
        for (index, piece) in text.split("{}").enumerate() {
            if index > 0 {
                pieces.push(None);
            }
            if !piece.is_empty() {
                pieces.push(Some(piece.to_owned()));
            }
        }
        pieces
    }

    fn queue(kind: &str, more: &str) -> QueueFacts {
        let members = r#""members":["a","b","c"]"#;
        let json = format!(r#"{{"type":"{kind}","durable":true,{members}{more}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn a_queue_is_graded_by_what_its_confirm_is_worth() {
        let limited = r#","arguments":{"x-max-length":5,"x-overflow":"reject-publish"}"#;
        let over = r#","arguments":{"x-max-length":5,"x-overflow":"reject-publish"},
            "effective_policy_definition":{"overflow":"drop-head"}"#;
        let unknown = r#","arguments":{"x-max-length":5,"x-overflow":"reject-publish-dlx"}"#;
        let limit = r#","arguments":{"x-delivery-limit":3}"#;
        let dead = r#","arguments":{"x-delivery-limit":3,"x-dead-letter-exchange":"dlx"}"#;
        for (kind, more, grade) in [
            ("quorum", "", Grade::Safe),
            ("quorum", limited, Grade::Safe),
            ("quorum", over, Grade::Unsafe),
            ("quorum", unknown, Grade::Unsafe),
            ("classic", unknown, Grade::Weak),
            ("quorum", dead, Grade::Safe),
            ("quorum", limit, Grade::Weak),
            ("quorum", r#","effective_policy_definition":{"delivery-limit":3}"#, Grade::Weak),
            ("quorum", r#","arguments":{"x-max-length":5}"#, Grade::Unsafe),
            ("quorum", r#","effective_policy_definition":{"max-length":5}"#, Grade::Unsafe),
            ("quorum", r#","effective_policy_definition":[]"#, Grade::Safe),
            ("quorum", r#","arguments":{"x-message-ttl":5}"#, Grade::Weak),
            ("classic", "", Grade::Weak),
            ("classic", limit, Grade::Weak),
            ("stream", r#","arguments":{"x-max-length-bytes":5}"#, Grade::Weak),
            ("classic", r#","auto_delete":true"#, Grade::Unsafe),
        ] {
            assert_eq!(queue(kind, more).grade(3).grade, grade, "{kind} {more}");
        }
        let alone = QueueFacts { members: vec!["a".into()], ..queue("quorum", "") };
        assert_eq!(alone.grade(3).grade, Grade::Weak);
        let transient = QueueFacts { durable: false, ..queue("quorum", "") };
        assert_eq!(transient.grade(3).grade, Grade::Unsafe);
        // RabbitMQ 4 limits deliveries by default.
        assert_eq!(queue("quorum", "").grade(4).grade, Grade::Weak);
        assert_eq!(queue("quorum", dead).grade(4).grade, Grade::Safe);
        let endless = r#","arguments":{"x-delivery-limit":-1}"#;
        assert_eq!(queue("quorum", endless).grade(4).grade, Grade::Safe);
    }

    #[test]
    fn all_reasons_of_a_queue_are_told_the_worst_first() {
        let more = r#","arguments":{"x-message-ttl":5,"x-max-length":5}"#;
        let graded = queue("classic", more).grade(3);
        assert_eq!(graded.grade, Grade::Unsafe);
        let at = |text| graded.reason.find(text).unwrap_or_else(|| panic!("{}", graded.reason));
        assert!(at("overflow drop-head") < at("expire") && at("expire") < at("classic"));
    }

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
            let exchange =
                ExchangeFacts { kind: kind.into(), durable: true, arguments: Map::new() };
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
        let grade = |s: &Survey| s.grade("orders", "events", &orders);
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
        let missing = survey(&[]).grade("orders", "nowhere", &orders);
        assert_eq!(missing.reason, "exchange \"nowhere\" does not exist");
    }

    #[test]
    fn bindings_between_exchanges_are_followed_by_the_rules_of_each() {
        let inner = ("events", bound("inner", "exchange", "order.#"));
        let to =
            |routing_key| survey(&[inner.clone(), ("inner", bound("poor", "queue", routing_key))]);
        let grade = |s: &Survey, text: &str| s.grade("orders", "events", &key(text));
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
        assert_eq!(survey.grade("r", "events", &key("a")).grade, Grade::Weak);
        survey.bindings.insert("events".into(), vec![bound("good", "queue", "a")]);
        assert_eq!(survey.grade("r", "events", &key("a")).grade, Grade::Safe);
        assert_eq!(survey.grade("r", "events", &key("{}")).grade, Grade::Weak, "some go there");
    }
}
