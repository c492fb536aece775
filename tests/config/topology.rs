//! Exchanges, queues and their arguments: what the broker would refuse when the relay declares it.

use crate::{LEAST, config, problem};

#[test]
fn names_that_belong_to_the_broker_or_to_relays_are_not_declared() {
    let route = |exchange: &str| {
        format!("[[route]]\nname = 'r'\noutbox.aggregate_type = '*'\nexchange = '{exchange}'\n")
    };
    for (more, part) in [
        (route("amq.nope"), "exchange \"amq.nope\": the broker refuses to declare names with"),
        ("[[exchange]]\nname = 'amq.x'".to_owned(), "4:8: exchange \"amq.x\": the broker refuses"),
        ("[[queue]]\nname = 'amq.q'".to_owned(), "queue \"amq.q\": the broker refuses to declare"),
        (
            "[[queue]]\nname = 'watership.shop.lock'".to_owned(),
            "relays use names of this form for their locks; use another one",
        ),
    ] {
        let text = problem(&more);
        assert!(text.contains(part), "{more}\n{text}");
        let verify = format!("{LEAST}broker.topology = 'verify'\n{more}");
        assert_eq!(config(&verify).is_ok(), more.contains("amq."), "{more}");
    }
    let own = config(&format!("{LEAST}{}", route("amq.headers"))).expect("every vhost has it");
    let kinds: Vec<&str> = own.relay.topology.exchanges.iter().map(|e| &*e.kind).collect();
    assert_eq!(kinds, ["headers"]);
}

#[test]
fn arguments_that_the_broker_knows_have_the_types_and_values_that_it_takes() {
    let queue = |kind: &str, argument: &str| {
        format!("[[queue]]\nname = 'q'\ntype = '{kind}'\narguments = {{ {argument} }}")
    };
    for (kind, argument, part) in [
        (
            "quorum",
            "x-max-length = '5'",
            "x-max-length = \"5\" is invalid; expected a whole number",
        ),
        (
            "quorum",
            "x-overflow = 'bogus'",
            "= \"bogus\" is invalid; expected \"drop-head\" or \"rej",
        ),
        ("classic", "x-message-ttl = -1", "= -1 is invalid; expected a whole number, at least 0"),
        (
            "quorum",
            "x-max-priority = 5",
            "a queue of type \"quorum\" does not take it, only classic",
        ),
        ("classic", "x-max-priority = 256", "expected a whole number, 0 to 255"),
        ("stream", "x-max-length = 5", "does not take it, only quorum or classic"),
        ("stream", "x-max-age = '7 days'", "such as \"7D\""),
        ("classic", "x-expires = 0", "expected a whole number, at least 1"),
        ("classic", "x-single-active-consumer = 1", "= 1 is invalid; expected true or false"),
        ("quorum", "x-dead-letter-exchange = 1", "= 1 is invalid; expected a string"),
        ("quorum", "x-dead-letter-routing-key = 'a'", "needs x-dead-letter-exchange, too"),
    ] {
        let text = problem(&queue(kind, argument));
        assert!(text.contains(part), "{argument}\n{text}");
    }
    for (kind, argument) in [
        ("quorum", "x-max-length = 5, x-overflow = 'reject-publish', x-delivery-limit = -1"),
        ("classic", "x-max-priority = 5, x-message-ttl = 0, x-queue-mode = 'lazy'"),
        ("stream", "x-max-age = '7D', x-max-length-bytes = 1000"),
        ("quorum", "x-of-a-plugin = 'whatever'"),
    ] {
        config(&format!("{LEAST}{}", queue(kind, argument))).expect(argument);
    }
    let exchange = "[[exchange]]\nname = 'e'\narguments = { alternate-exchange = 1 }";
    assert!(problem(exchange).contains("alternate-exchange = 1 is invalid; expected a string"));
    let partitions = "[[route]]\nname = 'r'\noutbox.aggregate_type = '*'\nexchange = 'x'\n\
                      partitions = 3\nqueue = 'q'\narguments = { x-max-length = 'a' }";
    assert!(problem(partitions).contains("x-max-length = \"a\" is invalid"));
}
