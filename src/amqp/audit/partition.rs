//! What a partition's queue must be so that a key's messages are handled in order and none is
//! dropped in silence. Pure.

use super::QueueFacts;

/// The delivery limit of RabbitMQ 4 where a queue sets none. Each crash of a consumer raises the
/// count of all messages that it holds, so innocent ones reach it.
/// <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>
const DEFAULT_LIMIT: i64 = 20;

impl QueueFacts {
    /// What is wrong with it as a partition, each in words that follow its name.
    pub fn wrong_as_partition(&self, broker_major: u32) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.kind != "quorum" {
            let kind = &self.kind;
            wrong.push(format!("is a {kind} queue, not a quorum queue"));
        }
        let argument = |name: &str| self.arguments.get(name);
        if argument("x-single-active-consumer").and_then(serde_json::Value::as_bool) != Some(true) {
            wrong.push(
                "has no x-single-active-consumer: several consumers handle the messages of one \
                 key at the same time"
                    .to_owned(),
            );
        }
        // Without one, every major version has another default.
        let explicit = self.has("delivery-limit");
        match self.delivery_limit(broker_major).filter(|limit| *limit <= DEFAULT_LIMIT) {
            _ if !explicit => wrong.push(format!(
                "has no delivery limit of its own: RabbitMQ 4 drops a message after \
                 {DEFAULT_LIMIT} redeliveries, which crashes of consumers use up"
            )),
            Some(limit) => wrong.push(format!(
                "has the delivery limit {limit}, which crashes of consumers use up; it should be \
                 far above {DEFAULT_LIMIT}"
            )),
            None => {}
        }
        if !self.has("dead-letter-exchange") {
            wrong.push(
                "has no dead-letter exchange: a message that is rejected or exceeds the delivery \
                 limit is dropped"
                    .to_owned(),
            );
        } else if self.text("dead-letter-strategy") != Some("at-least-once") {
            wrong.push(
                "lacks x-dead-letter-strategy = \"at-least-once\": a dead letter that its queue \
                 cannot take is dropped"
                    .to_owned(),
            );
        } else if self.overflow() != "reject-publish" {
            wrong.push(
                "lacks x-overflow = \"reject-publish\", without which dead letters are sent at \
                 most once"
                    .to_owned(),
            );
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::queue;

    const GOOD: &str = r#""x-single-active-consumer":true,"x-dead-letter-exchange":"d",
        "x-dead-letter-strategy":"at-least-once","x-overflow":"reject-publish""#;

    fn wrong(kind: &str, arguments: &str, policy: &str) -> String {
        let more =
            format!(r#","arguments":{{{arguments}}},"effective_policy_definition":{{{policy}}}"#);
        queue(kind, &more).wrong_as_partition(4).join("; ")
    }

    #[test]
    fn each_thing_that_a_partition_lacks_is_named() {
        let limit = r#","x-delivery-limit":1000"#;
        assert_eq!(wrong("quorum", &format!("{GOOD}{limit}"), ""), "");
        let none = wrong("quorum", r#""x-queue-type":"quorum""#, "");
        for part in ["x-single-active-consumer", "no delivery limit", "no dead-letter exchange"] {
            assert!(none.contains(part), "{none}");
        }
        assert!(wrong("classic", &format!("{GOOD}{limit}"), "").starts_with("is a classic queue"));
        let low = wrong("quorum", &format!(r#"{GOOD},"x-delivery-limit":20"#), "");
        assert!(low.starts_with("has the delivery limit 20"), "{low}");
        let by_policy = wrong("quorum", &format!("{GOOD}{limit}"), r#""delivery-limit":5"#);
        assert!(by_policy.starts_with("has the delivery limit 5"), "{by_policy}");
        let policy = r#""dead-letter-exchange":"d","delivery-limit":500"#;
        let most_once = wrong("quorum", r#""x-single-active-consumer":true"#, policy);
        assert!(most_once.starts_with("lacks x-dead-letter-strategy"), "{most_once}");
    }
}
