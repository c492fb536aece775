//! The broker half of `check`: connection, exchanges, queues; bindings and grades if there is a
//! management URL.

use super::findings::Findings;
use crate::amqp::audit::{Grade, Graded, Survey};
use crate::amqp::management::Management;
use crate::amqp::options::Options;
use crate::amqp::reply::is_missing;
use crate::amqp::topology::{self, Binding, Mode, Topology};
use crate::config::Config;
use crate::error::Result;
use crate::relay::upkeep::route_audit;
use crate::route::{Action, MessageIdRule, Rule, Select};

/// Adds its findings; it never fails, because a failure is a finding too.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    let options = &config.relay.broker;
    if let Err(error) = topology::apply(options, &nothing()).await {
        return f.error("broker", &error);
    }
    let urls: Vec<String> = options.urls.iter().map(ToString::to_string).collect();
    f.ok("broker", format!("connected to {}", urls.join(" or ")));
    check_topology(f, config, options).await;
    let Some(management) = config.relay.audit.management(options).transpose() else {
        f.warning(
            "bindings",
            "bindings cannot be verified: AMQP does not list them",
            "set broker.management_url",
        );
        return grade_by_declares(f, config).await;
    };
    let graded = match management {
        Ok(management) => check_routes(f, config, &management).await,
        Err(error) => Err(error),
    };
    if let Err(error) = graded {
        f.error("management", &error);
    }
}

fn nothing() -> Topology {
    Topology { mode: Mode::Verify, ..Topology::default() }
}

/// Verifies exchange by exchange and queue by queue, so that each is a finding.
async fn check_topology(f: &mut Findings, config: &Config, options: &Options) {
    let topology = &config.relay.topology;
    for exchange in &topology.exchanges {
        let one = Topology { exchanges: vec![exchange.clone()], ..nothing() };
        let what = format!("exchange {:?}", exchange.name);
        report(f, topology.mode, "exchange", &what, topology::apply(options, &one).await);
    }
    for queue in &topology.queues {
        let one = Topology { queues: vec![queue.clone()], ..nothing() };
        let what = format!("queue {:?}", queue.name);
        report(f, topology.mode, "queue", &what, topology::apply(options, &one).await);
    }
}

fn report(f: &mut Findings, mode: Mode, area: &'static str, what: &str, result: Result<()>) {
    match result {
        Ok(()) => f.ok(area, format!("{what} exists")),
        Err(error) if mode == Mode::Declare && is_missing(&error) => {
            f.ok(area, format!("{what} does not exist; `watership run` will declare it"));
        }
        Err(error) => f.error(area, &error),
    }
}

/// A route and the queues that its messages reach.
struct Reached<'a> {
    rule: &'a Rule,
    queues: Vec<String>,
}

async fn check_routes(f: &mut Findings, config: &Config, management: &Management) -> Result<()> {
    check_bindings(f, &config.relay.topology, management).await?;
    let exchanges: Vec<String> =
        config.relay.topology.exchanges.iter().map(|e| e.name.clone()).collect();
    let survey = management.survey(&exchanges).await?;
    let mut reached = Vec::new();
    for rule in &config.relay.rules {
        let Action::Publish { exchange, .. } = &rule.action else { continue };
        let key = rule.known_key();
        grade(f, config, rule, &survey, &survey.grade(&rule.name, exchange, &key));
        reached.push(Reached { rule, queues: survey.queues_of(&rule.name, exchange, &key) });
    }
    warn_of_shared_ids(f, &reached);
    Ok(())
}

/// What is missing was reported above; this adds what it means for each route.
async fn grade_by_declares(f: &mut Findings, config: &Config) {
    let all_graded = match route_audit::by_declares(&config.relay).await {
        Ok(all_graded) => all_graded,
        Err(error) => return f.error("route", &error),
    };
    let publishes = |rule: &&Rule| matches!(rule.action, Action::Publish { .. });
    for (rule, Graded { grade, reason }) in
        config.relay.rules.iter().filter(publishes).zip(all_graded)
    {
        let what = format!("{:?} is {grade} ({reason})", rule.name);
        let declares = config.relay.topology.mode == Mode::Declare;
        let hint = match grade {
            Grade::Unsafe if declares => "`watership run` will declare what is missing",
            Grade::Unsafe => "declare what is missing; until then the route is held",
            Grade::Safe | Grade::Weak | Grade::NotVerified => {
                "check the bound queues: they decide what a confirm guarantees"
            }
        };
        f.warning("route", what, hint);
    }
}

async fn check_bindings(f: &mut Findings, topology: &Topology, api: &Management) -> Result<()> {
    for Binding { queue, exchange, routing_key } in &topology.bindings {
        let what = format!("queue {queue:?} to exchange {exchange:?} with key {routing_key:?}");
        let there = api.bindings(exchange).await?;
        let bound = there.iter().any(|b| b.queue == *queue && b.routing_key == *routing_key);
        match (bound, topology.mode) {
            (true, Mode::Declare | Mode::Verify) => f.ok("binding", what),
            (false, Mode::Declare) => {
                f.ok("binding", format!("{what} does not exist; `watership run` will declare it"));
            }
            (false, Mode::Verify) => {
                f.problem(
                    "binding",
                    format!("{what} does not exist"),
                    "bind the queue, or set broker.topology = \"declare\"",
                );
            }
        }
    }
    Ok(())
}

fn grade(f: &mut Findings, config: &Config, rule: &Rule, survey: &Survey, graded: &Graded) {
    let Graded { grade, reason } = graded;
    let what = format!("{:?} is {grade} ({reason})", rule.name);
    let Action::Publish { exchange, .. } = &rule.action else { return };
    let unreached = survey.queues_of(&rule.name, exchange, &rule.known_key()).is_empty();
    let declared = config.relay.topology.bindings.iter().any(|b| b.exchange == *exchange);
    match grade {
        Grade::Safe => f.ok("route", what),
        // Before the first run nothing may exist yet; that is reported elsewhere.
        Grade::Unsafe if unreached && declared && config.relay.topology.mode == Mode::Declare => {
            let hint = "`watership run` will declare what is missing; then run check again";
            f.warning("route", what, hint);
        }
        Grade::Unsafe if unreached => f.problem(
            "route",
            what,
            "bind a queue with a matching key; until then the route is held",
        ),
        Grade::Weak | Grade::NotVerified => {
            f.warning(
                "route",
                what,
                "for SAFE, use a quorum queue on several nodes, without TTL, and with a \
                 dead-letter exchange if deliveries are limited (the default of RabbitMQ 4)",
            );
        }
        Grade::Unsafe => f.warning(
            "route",
            what,
            "confirmed messages can be lost; make the queue durable, with overflow reject-publish",
        ),
    }
}

/// Consumers drop a second message with the same id, so two routes with the event's id must not
/// meet in one queue.
fn warn_of_shared_ids(f: &mut Findings, reached: &[Reached<'_>]) {
    for (index, first) in reached.iter().enumerate() {
        for second in &reached[index + 1..] {
            let shared = first.queues.iter().find(|queue| second.queues.contains(queue));
            let (Some(queue), true) = (shared, may_share_ids(first.rule, second.rule)) else {
                continue;
            };
            f.warning(
                "route",
                format!(
                    "{:?} and {:?} may send the same event, with the same id, to queue {queue:?}: \
                     a consumer that drops duplicates drops one of them",
                    first.rule.name, second.rule.name
                ),
                "set message_id = \"route\" on one of them",
            );
        }
    }
}

fn may_share_ids(a: &Rule, b: &Rule) -> bool {
    let event_id = |rule: &Rule| match &rule.action {
        Action::Publish { message_id, .. } => *message_id == MessageIdRule::Event,
        Action::Drop => false,
    };
    let meet = |x: &str, y: &str| x == "*" || y == "*" || x == y;
    let overlap = match (&a.select, &b.select) {
        (Select::Outbox { aggregate_type: x }, Select::Outbox { aggregate_type: y })
        | (Select::Table { name: x }, Select::Table { name: y }) => meet(x, y),
        (Select::Outbox { .. }, Select::Table { .. })
        | (Select::Table { .. }, Select::Outbox { .. }) => false,
    };
    overlap && event_id(a) && event_id(b)
}
