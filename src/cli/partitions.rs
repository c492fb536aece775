//! The partitions of routes, for `check`: whether they are those in force, whether their queues are
//! what keeps the order, and whether queues are left over.

use std::collections::BTreeSet;

use super::findings::Findings;
use crate::amqp::audit::Survey;
use crate::amqp::management::Management;
use crate::amqp::topology::{self, Argument, Mode};
use crate::config::Config;
use crate::error::Result;
use crate::message::KeyPart;
use crate::pg::client::{SqlConnection, sql};
use crate::relay::session::partitions;
use crate::route::{PARTITIONS_MAX, Partitions, Rule};

const AREA: &str = "partitions";

/// Adds its findings; where an end cannot be reached, that is reported elsewhere.
pub(super) async fn check(f: &mut Findings, config: &Config, accept_reorder: bool) {
    let Ok(SqlConnection { client, closed: _closed }) = sql(&config.relay.sql).await else {
        return;
    };
    let Ok(changes) = partitions::changed(&client, &config.relay).await else { return };
    let broker = &config.relay.broker;
    for change in &changes {
        let Ok(queued) = partitions::queued(broker, change).await else { return };
        let route = &change.route;
        match change.verify(&queued) {
            Err(refused) if accept_reorder => f.warning(AREA, refused.to_string(), "accepted"),
            Err(refused) => f.error(AREA, &refused),
            Ok(()) if change.from.is_some() => {
                let what = format!("partitions of route {route:?} may be changed");
                f.ok(AREA, format!("{what}: nothing is queued"));
            }
            Ok(()) => {}
        }
    }
    let unseen = config.relay.audit.management_url.is_none();
    if unseen
        && config.relay.topology.mode == Mode::Verify
        && let Some((rule, _)) = partitioned(&config.relay.rules).next()
    {
        f.warning(
            AREA,
            format!(
                "route {:?}: whether its queues have a single active consumer, a delivery limit \
                 and a dead-letter exchange cannot be seen",
                rule.name
            ),
            "set broker.management_url",
        );
    }
    let mut seen = BTreeSet::new();
    for (rule, partitions) in partitioned(&config.relay.rules) {
        if !seen.insert(&partitions.queue) {
            continue;
        }
        let more = (partitions.count..PARTITIONS_MAX).map(|number| partitions.name(number));
        let more: Vec<String> = more.collect();
        let Ok(counts) = topology::counts(broker, &more).await else { return };
        let found = more.iter().zip(&counts).filter_map(|(name, count)| Some((name, (*count)?)));
        let found: Vec<(&String, (u32, u32))> = found.collect();
        let Partitions { queue, count } = partitions;
        if found.is_empty() {
            f.ok(AREA, format!("route {:?}: {count} of queue {queue:?}", rule.name));
            continue;
        }
        let messages: u64 = found.iter().map(|(_, (messages, _))| u64::from(*messages)).sum();
        let names: Vec<String> = found.iter().map(|(name, _)| format!("{name:?}")).collect();
        let names = names.join(", ");
        f.warning(
            AREA,
            format!(
                "route {:?} has {count} partitions of queue {queue:?}, and the broker has {}: \
                 {names} receive nothing new and still hold {messages} messages",
                rule.name,
                usize::from(*count) + found.len(),
            ),
            "delete them once they are empty",
        );
    }
}

/// What the management API shows of the queues; those that are missing are reported elsewhere.
pub(super) fn check_queues(f: &mut Findings, rule: &Rule, survey: &Survey) {
    let Some(partitions) = rule.partitions() else { return };
    // Mostly all have the same fault.
    let mut faults: Vec<(String, Vec<String>)> = Vec::new();
    for name in partitions.names() {
        let Some(queue) = survey.queues.get(&name) else { continue };
        for what in queue.wrong_as_partition(survey.broker_major) {
            match faults.iter_mut().find(|(fault, _)| *fault == what) {
                Some((_, names)) => names.push(name.clone()),
                None => faults.push((what, vec![name.clone()])),
            }
        }
    }
    for (what, names) in faults {
        let more = match names.len() {
            1 => String::new(),
            count => format!(" (so have {} more partitions)", count - 1),
        };
        f.problem(
            AREA,
            format!("queue {:?} {what}{more}", names[0]),
            "arguments cannot be changed: stop the relay, let the consumers empty the queue, \
             delete it, and let `watership run` declare it; a policy can set the limits and the \
             dead-letter exchange",
        );
    }
}

/// Whether what the partitions give up arrives anywhere.
pub(super) async fn check_dead_letters(
    f: &mut Findings,
    config: &Config,
    management: &Management,
) -> Result<()> {
    let topology = &config.relay.topology;
    let mut seen = BTreeSet::new();
    for (rule, partitions) in partitioned(&config.relay.rules) {
        let name = partitions.name(0);
        let queue = topology.queues.iter().find(|queue| queue.name == name);
        let exchange = queue.and_then(|queue| {
            queue.arguments.iter().find_map(|(key, value)| match value {
                Argument::Text(text) if key == "x-dead-letter-exchange" => Some(text),
                _ => None,
            })
        });
        let Some(exchange) = exchange.filter(|exchange| seen.insert((*exchange).clone())) else {
            continue;
        };
        let survey = management.survey(std::slice::from_ref(exchange)).await?;
        let key = [KeyPart::Text(name)];
        match survey.queues_of(&rule.known_headers(), exchange, &key).as_slice() {
            [] => f.problem(
                AREA,
                format!("the dead-letter exchange {exchange:?} is missing or leads to no queue"),
                "run `watership init`, or bind a queue: until then dead letters are kept",
            ),
            queues => {
                let queues = queues.join(", ");
                f.ok(
                    AREA,
                    format!("dead letters go through exchange {exchange:?} to queue {queues}"),
                );
            }
        }
    }
    Ok(())
}

fn partitioned(rules: &[Rule]) -> impl Iterator<Item = (&Rule, &Partitions)> {
    rules.iter().filter_map(|rule| Some((rule, rule.partitions()?)))
}
