//! What a confirm for a route's messages is worth: SAFE, WEAK or UNSAFE, with the reasons. Pure.
//!
//! A confirm says that every queue which the message reached has it. So a route is worth as much
//! as the worst queue that its routing keys can reach: over bindings, bindings between exchanges
//! and alternate exchanges, by the rules of each exchange's type. `management` gathers the facts.
//!
//! <https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed>

mod matching;
mod partition;
mod reach;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::message::KeyPart;
use reach::Reach;

/// What a confirm is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Confirmed is stored on a majority of several nodes, and stays until it is consumed.
    Safe,
    /// Not known: it cannot be seen, or depends on what each message is.
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

/// A routing key as far as it is known without a message.
pub type KnownKey = [KeyPart];

/// The headers that all messages of a route have, as far as they are known without a message: a
/// value is absent where it differs from message to message.
pub type KnownHeaders = [(String, Option<String>)];

/// An exchange.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct ExchangeFacts {
    /// `topic`, `direct`, `fanout`, `headers` or a plugin's.
    #[serde(rename = "type")]
    pub kind: String,
    /// Survives a restart of the broker.
    pub durable: bool,
    /// Nobody but other exchanges may publish to it.
    pub internal: bool,
    /// Among them `alternate-exchange`.
    pub arguments: Map<String, Value>,
    /// Name of the policy that applies to it.
    pub policy: Option<String>,
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
    /// What policies and operator policies make of it; an empty list when there is none. Absent in
    /// the first seconds of a queue, and without statistics.
    effective_policy_definition: Option<Value>,
    /// The vhost has policies that may apply to it.
    #[serde(skip)]
    pub may_have_policy: bool,
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
    /// Definitions of the vhost's policies, by name; `None` when the user may not see them.
    pub policies: Option<Policies>,
}

/// Definitions of policies, by name.
pub type Policies = BTreeMap<String, Value>;

impl Survey {
    /// What a confirm is worth for messages of `route` to `exchange` with this routing key.
    pub fn grade(&self, headers: &KnownHeaders, exchange: &str, key: &KnownKey) -> Graded {
        let is_unsafe = |reason| Graded { grade: Grade::Unsafe, reason };
        match self.exchanges.get(exchange) {
            None => return is_unsafe(format!("exchange {exchange:?} does not exist")),
            Some(facts) if facts.internal => {
                let what = format!("exchange {exchange:?} is internal");
                return is_unsafe(format!("{what}: it does not accept publishes"));
            }
            Some(_) => {}
        }
        let reach = self.reach(headers, exchange, key);
        let unknown: Vec<&str> = reach.unknown.iter().map(String::as_str).collect();
        let unknown = unknown.join("; ");
        if reach.queues.is_empty() {
            return match unknown.as_str() {
                "" => is_unsafe(self.unbound(exchange, key, &reach)),
                _ => Graded { grade: Grade::NotVerified, reason: unknown },
            };
        }
        let graded: Vec<Graded> = reach.queues.iter().map(|name| self.grade_queue(name)).collect();
        let mut grade = graded.iter().map(|v| v.grade).max().unwrap_or(Grade::Unsafe);
        let worst = graded.into_iter().filter(|v| v.grade == grade).map(|v| v.reason);
        let mut reason = worst.collect::<Vec<_>>().join("; ");
        if !unknown.is_empty() {
            // What the queues are worth is known, but not whether these are the ones.
            grade = Grade::NotVerified;
            reason = format!("{unknown}; if it leads there: {reason}");
        } else if !reach.covered {
            // Those keys are held when they come, and nobody can say whether they will.
            grade = grade.max(Grade::NotVerified);
            let key = shown(key);
            reason.push_str(&format!("; some routing keys of the form {key:?} match no binding"));
        }
        if let Some(exchange) = &reach.delayed {
            grade = grade.max(Grade::Weak);
            reason.push_str(&format!(
                "; exchange {exchange:?} confirms a delayed message that is on one node only, and \
                 drops it if no queue is bound when it is due"
            ));
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

    /// The same for a route with several routing keys: it is worth as much as the worst.
    pub fn grade_keys(
        &self,
        headers: &KnownHeaders,
        exchange: &str,
        keys: &[Vec<KeyPart>],
    ) -> Graded {
        let all: Vec<Graded> = keys.iter().map(|key| self.grade(headers, exchange, key)).collect();
        let grade = all.iter().map(|graded| graded.grade).max().unwrap_or(Grade::Unsafe);
        let mut worst = all.into_iter().filter(|graded| graded.grade == grade);
        let mut reason = worst.next().map_or_else(String::new, |graded| graded.reason);
        let more = worst.count();
        if more > 0 {
            reason.push_str(&format!("; the same grade for {more} more of {} keys", keys.len()));
        }
        Graded { grade, reason }
    }

    /// The queues that messages of the route can reach.
    pub fn queues_of(&self, headers: &KnownHeaders, exchange: &str, key: &KnownKey) -> Vec<String> {
        self.reach(headers, exchange, key).queues.into_iter().collect()
    }

    /// The exchanges that messages of the route can come through, its own among them.
    pub fn exchanges_of(
        &self,
        headers: &KnownHeaders,
        exchange: &str,
        key: &KnownKey,
    ) -> Vec<String> {
        self.reach(headers, exchange, key).exchanges.into_keys().collect()
    }

    fn unbound(&self, exchange: &str, key: &KnownKey, reach: &Reach) -> String {
        const SHOWN: usize = 5;
        if reach.exchanges.len() > 1 {
            let others: Vec<String> = reach
                .exchanges
                .keys()
                .filter(|name| *name != exchange)
                .map(|n| format!("{n:?}"))
                .collect();
            return format!(
                "no queue is reached from exchange {exchange:?} or those that it leads to: {}; \
                 an alternate exchange gets only what no binding matches",
                others.join(", ")
            );
        }
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

/// The key for people: what is not known is `{}`.
fn shown(key: &KnownKey) -> String {
    let part = |part: &KeyPart| match part {
        KeyPart::Text(text) => text.clone(),
        KeyPart::Word | KeyPart::Any => "{}".to_owned(),
    };
    key.iter().map(part).collect()
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
        if self.may_have_policy && self.effective_policy_definition.is_none() {
            add(Grade::NotVerified, "it is so new that its policy cannot be seen yet");
        }
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
    /// default. Of policy and argument the smaller one counts, but a negative one lifts only itself
    /// (`resolve_delivery_limit` in `deps/rabbit/src/rabbit_quorum_queue.erl`).
    /// <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>
    fn delivery_limit(&self, broker_major: u32) -> Option<i64> {
        const DEFAULT: i64 = 20;
        let argument = self.arguments.get("x-delivery-limit").and_then(Value::as_i64);
        let policy = self.policy("delivery-limit").and_then(Value::as_i64);
        let set = match (argument, policy) {
            (Some(one), Some(other)) if one < 0 || other < 0 => Some(one.max(other)),
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let default = (broker_major >= 4).then_some(DEFAULT);
        set.or(default).filter(|limit| self.kind == "quorum" && *limit >= 0)
    }

    fn policy(&self, name: &str) -> Option<&Value> {
        self.effective_policy_definition.as_ref()?.get(name)
    }

    fn value(&self, name: &str) -> Option<&Value> {
        let argument = self.arguments.get(&format!("x-{name}"));
        argument.or_else(|| self.policy(name))
    }

    /// How long a message may wait in it, in milliseconds: the smaller of policy and argument.
    /// <https://www.rabbitmq.com/docs/ttl#per-queue-message-ttl>
    pub fn message_ttl_ms(&self) -> Option<u64> {
        let argument = self.arguments.get("x-message-ttl").and_then(Value::as_u64);
        let policy = self.policy("message-ttl").and_then(Value::as_u64);
        argument.into_iter().chain(policy).min()
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
        let policy = self.policy("overflow").filter(|_| self.kind == "quorum");
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
    pub(super) fn key(text: &str) -> Vec<KeyPart> {
        let mut pieces = Vec::new();
        for (index, piece) in text.split("{}").enumerate() {
            if index > 0 {
                pieces.push(KeyPart::Any);
            }
            if !piece.is_empty() {
                pieces.push(KeyPart::Text(piece.to_owned()));
            }
        }
        pieces
    }

    pub(super) fn queue(kind: &str, more: &str) -> QueueFacts {
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
        let new = QueueFacts { may_have_policy: true, ..queue("quorum", "") };
        assert_eq!(new.grade(3).grade, Grade::NotVerified);
        let endless = r#","arguments":{"x-delivery-limit":-1}"#;
        assert_eq!(queue("quorum", endless).grade(4).grade, Grade::Safe);
        for (argument, policy, limit) in
            [(50, 5, Some(5)), (5, 50, Some(5)), (-1, 5, Some(5)), (5, -1, Some(5)), (-1, -2, None)]
        {
            let both = format!(
                r#","arguments":{{"x-delivery-limit":{argument}}},
                   "effective_policy_definition":{{"delivery-limit":{policy}}}"#
            );
            assert_eq!(queue("quorum", &both).delivery_limit(4), limit, "{both}");
        }
    }

    #[test]
    fn all_reasons_of_a_queue_are_told_the_worst_first() {
        let more = r#","arguments":{"x-message-ttl":5,"x-max-length":5}"#;
        let graded = queue("classic", more).grade(3);
        assert_eq!(graded.grade, Grade::Unsafe);
        let at = |text| graded.reason.find(text).unwrap_or_else(|| panic!("{}", graded.reason));
        assert!(at("overflow drop-head") < at("expire") && at("expire") < at("classic"));
    }
}
