//! The broker half of `check`: connection, exchanges, queues; bindings and grades if there is a
//! management URL.

use std::fmt;

use super::findings::Findings;
use super::partitions;
use crate::amqp::audit::{Grade, Graded};
use crate::amqp::management::Management;
use crate::amqp::publisher::Connection;
use crate::amqp::topology::{self, Binding, Mode, Thing, Topology, Wrong};
use crate::config::Config;
use crate::error::{Kind, Result};
use crate::message::KeyPart;
use crate::pg::client::{SqlConnection, sql};
use crate::pg::slot::read_slot;
use crate::publisher::Publisher as _;
use crate::relay::session;
use crate::relay::upkeep::route_audit;
use crate::route::{Action, MessageIdRule, Router, Rule, Select};
use crate::source::SourceKind;

/// Adds its findings; it never fails, because a failure is a finding too.
pub(super) async fn check(f: &mut Findings, config: &Config) {
    let options = &config.relay.broker;
    let things = &config.relay.topology;
    let verify = Topology { mode: Mode::Verify, ..things.clone() };
    let wrong = match topology::apply_each(options, &verify).await {
        Ok(wrong) => wrong,
        Err(error) => return f.error("broker", &error),
    };
    let urls: Vec<String> = options.urls.iter().map(ToString::to_string).collect();
    f.ok("broker", format!("connected to {}", urls.join(" or ")));
    let is_running = check_session(f, config, &verify).await;
    let mut refused = Vec::new();
    match check_topology(f, config, &wrong, is_running).await {
        Ok(bindings) => refused = bindings,
        Err(error) => f.error("broker", &error),
    }
    check_permission(f, config, &wrong).await;
    let Some(management) = config.relay.audit.management(options).transpose() else {
        f.warning(
            "bindings",
            "bindings cannot be verified: AMQP does not list them",
            "set broker.management_url",
        );
        return grade_by_declares(f, config, is_running).await;
    };
    let graded = match management {
        Ok(management) => check_routes(f, config, &management, &refused, is_running).await,
        Err(error) => Err(error),
    };
    if let Err(error) = graded {
        f.error("management", &error);
    }
}

/// Opens, briefly and all at the same time, what a session of `run` opens in the broker: the
/// publishing connection with its channels and the lock, and the one that looks at exchanges and
/// queues. So the broker's limits show here. Returns whether a relay of this name is running.
async fn check_session(f: &mut Findings, config: &Config, verify: &Topology) -> bool {
    const AREA: &str = "session";
    let options = &config.relay;
    let opened = async {
        let mut publisher =
            Connection::open(&session::publishing(options, &Router::new(&options.rules)?)).await?;
        let beside = topology::apply_each(&options.broker, verify);
        let looked = session::while_kept_alive(&mut publisher, beside).await;
        let unwatched = publisher.unwatched();
        publisher.close().await;
        let looked =
            looked.map_err(|e| e.context("the second connection (the first one publishes)"));
        looked.map(|_| unwatched)
    };
    match opened.await {
        Ok(unwatched) => {
            f.ok(AREA, "opened two connections, all channels, and the lock queue");
            if let Some((what, hint)) = unwatched {
                let queue = options.lock_queue();
                f.warning(AREA, format!("queue {queue:?}: {what}"), hint);
            }
        }
        Err(error) if error.kind() == Kind::Busy => {
            f.ok(AREA, "a relay of this name holds the lock queue");
            return streams(config).await;
        }
        Err(error) => f.error(AREA, &error),
    }
    false
}

/// Whether the holder of the lock streams by now: until then it may be declaring, or be another
/// `check`. One that polls reads no slot, so its lock has to do.
async fn streams(config: &Config) -> bool {
    let options = &config.relay;
    if options.kind == SourceKind::Poll {
        return true;
    }
    // What is wrong with Postgres was reported.
    let Ok(SqlConnection { client, closed: _closed }) = sql(&options.sql).await else {
        return false;
    };
    let slot = read_slot(&client, &options.slot).await;
    slot.is_ok_and(|slot| slot.is_some_and(|slot| slot.active_pid.is_some()))
}

/// Each exchange and each queue is a finding. What `run` will declare and is there already is
/// declared again: the same changes nothing, and anything else is refused as it will be then. For
/// what is missing the permission is tried. Returns the bindings that cannot be made.
async fn check_topology(
    f: &mut Findings,
    config: &Config,
    missing: &[Wrong],
    is_running: bool,
) -> Result<Vec<Binding>> {
    let (things, broker) = (&config.relay.topology, &config.relay.broker);
    let is_missing = |thing: &Thing| missing.iter().any(|wrong| wrong.thing == *thing);
    let mut there = things.clone();
    there.exchanges.retain(|e| !is_missing(&Thing::Exchange(e.name.clone())));
    there.queues.retain(|q| !is_missing(&Thing::Queue(q.name.clone())));
    there.bindings.clear();
    let mut to_make = things.clone();
    to_make.exchanges.retain(|e| is_missing(&Thing::Exchange(e.name.clone())));
    to_make.queues.retain(|q| is_missing(&Thing::Queue(q.name.clone())));
    let (refused, forbidden) = match things.mode {
        Mode::Verify => (Vec::new(), Vec::new()),
        Mode::Declare => (
            topology::apply_each(broker, &there).await?,
            topology::may_declare(broker, &to_make).await?,
        ),
    };
    let exchanges = things.exchanges.iter().map(|e| Thing::Exchange(e.name.clone()));
    let queues = things.queues.iter().map(|q| Thing::Queue(q.name.clone()));
    for thing in exchanges.chain(queues) {
        let area = if matches!(thing, Thing::Queue(_)) { "queue" } else { "exchange" };
        let of = |list: &'_ [Wrong]| list.iter().position(|wrong| wrong.thing == thing);
        match (of(missing), of(&refused)) {
            (Some(at), _) if things.mode == Mode::Declare && missing[at].missing => {
                match of(&forbidden) {
                    Some(at) => f.error(area, &forbidden[at].error),
                    None => undeclared(f, area, &thing, is_running),
                }
            }
            (Some(at), _) => f.error(area, &missing[at].error),
            (None, Some(at)) => f.error(area, &refused[at].error),
            (None, None) => f.ok(area, format!("{thing} exists")),
        }
    }
    let ends = topology::apply_each(broker, &things.unlisted()).await?;
    Ok(check_ends(f, things, &ends, &forbidden))
}

/// The bindings that cannot be made: an end of them is missing and nobody declares it, or the
/// permission is missing.
fn check_ends(
    f: &mut Findings,
    things: &Topology,
    ends: &[Wrong],
    forbidden: &[Wrong],
) -> Vec<Binding> {
    const AREA: &str = "binding";
    let mut refused = Vec::new();
    for binding in &things.bindings {
        let its_ends = binding.ends();
        let gone = ends.iter().find(|wrong| its_ends.contains(&wrong.thing));
        let is_it = |wrong: &&Wrong| wrong.thing == Thing::Binding(binding.clone());
        match (gone, forbidden.iter().find(is_it)) {
            (Some(gone), _) if gone.missing => {
                let what = format!("{binding}: {} does not exist, nor is it listed", gone.thing);
                f.problem(AREA, what, things.hint_for_ends(binding));
            }
            (Some(gone), _) => f.error(AREA, &gone.error),
            (None, Some(forbidden)) => f.error(AREA, &forbidden.error),
            (None, None) => continue,
        }
        refused.push(binding.clone());
    }
    refused
}

/// What is missing and is to be declared: a session does that when it starts, and later only for a
/// route that is held.
fn undeclared(f: &mut Findings, area: &'static str, thing: &impl fmt::Display, is_running: bool) {
    if is_running {
        let what = format!("{thing} does not exist, and the relay is running");
        let hint = "restart the relay, which declares it when it starts, or declare it yourself";
        return f.problem(area, what, hint);
    }
    f.ok(area, format!("{thing} does not exist; `watership run` will declare it"));
}

/// Whether the user may publish to the exchanges that exist.
async fn check_permission(f: &mut Findings, config: &Config, missing: &[Wrong]) {
    let mut asked = Vec::new();
    for rule in &config.relay.rules {
        let Action::Publish { address, .. } = &rule.action else { continue };
        let part = |part: KeyPart| match part {
            KeyPart::Text(text) => text,
            KeyPart::Word | KeyPart::Any => "x".to_owned(),
        };
        let key: String = rule.known_keys().swap_remove(0).into_iter().map(part).collect();
        for exchange in address.exchanges() {
            let thing = Thing::Exchange(exchange.clone());
            if missing.iter().any(|wrong| wrong.thing == thing) || asked.contains(exchange) {
                continue;
            }
            asked.push(exchange.clone());
            if let Err(error) = topology::may_publish(&config.relay.broker, exchange, &key).await {
                f.error("exchange", &error);
            }
        }
    }
}

/// A route and the queues that its messages reach.
struct Reached<'a> {
    rule: &'a Rule,
    queues: Vec<String>,
}

async fn check_routes(
    f: &mut Findings,
    config: &Config,
    management: &Management,
    refused: &[Binding],
    is_running: bool,
) -> Result<()> {
    check_bindings(f, config, management, refused, is_running).await?;
    let exchanges: Vec<String> =
        config.relay.topology.exchanges.iter().map(|e| e.name.clone()).collect();
    let survey = management.survey(&exchanges).await?;
    let mut reached = Vec::new();
    for rule in &config.relay.rules {
        let Action::Publish { address, .. } = &rule.action else { continue };
        let (exchanges, keys) = (address.exchanges(), rule.known_keys());
        let headers = rule.known_headers();
        let of_exchange = |exchange: &String| -> Vec<Vec<String>> {
            keys.iter().map(|key| survey.queues_of(&headers, exchange, key)).collect()
        };
        let found: Vec<Vec<String>> = exchanges.iter().flat_map(of_exchange).collect();
        let unreached = found.iter().any(Vec::is_empty);
        let graded = route_audit::grade(&survey, rule, exchanges);
        grade(f, config, rule, unreached, is_running, &graded);
        reached.push(Reached { rule, queues: found.into_iter().flatten().collect() });
        partitions::check_queues(f, rule, &survey);
    }
    partitions::check_dead_letters(f, config, management).await?;
    warn_of_shared_ids(f, &reached);
    Ok(())
}

/// What is missing was reported above; this adds what it means for each route.
async fn grade_by_declares(f: &mut Findings, config: &Config, is_running: bool) {
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
            Grade::Unsafe if declares && is_running => {
                "restart the relay: it declares what is missing"
            }
            Grade::Unsafe if declares => "`watership run` will try to declare what is missing",
            Grade::Unsafe => "declare what is missing; until then the route is held",
            Grade::Safe | Grade::Weak | Grade::NotVerified => {
                "check the bound queues: they decide what a confirm guarantees"
            }
        };
        f.warning("route", what, hint);
    }
}

async fn check_bindings(
    f: &mut Findings,
    config: &Config,
    api: &Management,
    refused: &[Binding],
    is_running: bool,
) -> Result<()> {
    let topology = &config.relay.topology;
    // What is wrong with the others was said.
    for binding in topology.bindings.iter().filter(|binding| !refused.contains(binding)) {
        let there = api.bindings(&binding.exchange).await?;
        let bound = there.iter().any(|found| binding.is(found));
        match (bound, topology.mode) {
            (true, Mode::Verify) => f.ok("binding", binding.to_string()),
            (true, Mode::Declare) => {
                // The same again changes nothing, and shows whether `run` may do it.
                let bindings = vec![binding.clone()];
                let again = Topology { mode: Mode::Declare, bindings, ..Topology::default() };
                match topology::apply(&config.relay.broker, &again).await {
                    Ok(()) => f.ok("binding", binding.to_string()),
                    Err(error) => f.error("binding", &error),
                }
            }
            (false, Mode::Declare) => undeclared(f, "binding", binding, is_running),
            (false, Mode::Verify) => {
                f.problem(
                    "binding",
                    format!("{binding} does not exist"),
                    "bind it, or set broker.topology = \"declare\"",
                );
            }
        }
    }
    Ok(())
}

fn grade(
    f: &mut Findings,
    config: &Config,
    rule: &Rule,
    unreached: bool,
    is_running: bool,
    graded: &Graded,
) {
    let Graded { grade, reason } = graded;
    let what = format!("{:?} is {grade} ({reason})", rule.name);
    let Action::Publish { address, .. } = &rule.action else { return };
    let bindings = &config.relay.topology.bindings;
    let declared = bindings.iter().any(|b| address.exchanges().contains(&b.exchange));
    let may_come = declared && config.relay.topology.mode == Mode::Declare;
    match grade {
        Grade::Safe => f.ok("route", what),
        // Before the first run nothing may exist yet; that is reported elsewhere.
        Grade::Unsafe if unreached && may_come && !is_running => {
            let hint = "`watership run` will try to declare what is missing; then run check again";
            f.warning("route", what, hint);
        }
        Grade::Unsafe if unreached => f.problem(
            "route",
            what,
            "bind a queue with a matching key; until then the route is held",
        ),
        Grade::NotVerified => f.warning(
            "route",
            what,
            "the reason says what is not known: bind with \"#\" where a value may have dots, and \
             give the user of broker.management_url the tag \"monitoring\"",
        ),
        Grade::Weak => {
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
