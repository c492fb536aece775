//! `[[route]]`: from what was written to the router's rules.
//!
//! Invariant: with routes, each captured table is selected by one, and each route selects
//! something that is captured. So nothing that is captured is poison by configuration.

use std::collections::BTreeSet;
use std::mem::discriminant;

use super::contracts;
use super::formats;
use super::partitions::Partitioned;
use super::rules::rules_of;
use super::section::Section;
use crate::route::{
    Action, MessageIdRule, OnPoison, Ordering, Policy, Router, Rule, Select, default_rules,
};

/// Maximum of `nack_limit`.
const NACKS_MAX: u32 = 1_000_000;

/// The rules of the file, or the default rules when it has none; and the partitions of its routes.
/// `relay` is the relay's name.
pub(super) fn rules(
    root: &mut Section<'_>,
    tables: &[String],
    relay: &str,
) -> (Vec<Rule>, Vec<Partitioned>) {
    const ROUTE: &str = "route";
    let routes = root.tables(ROUTE);
    if routes.is_empty() {
        return (default_rules(), Vec::new());
    }
    let mut partitioned = Vec::new();
    let found: Vec<Option<Rule>> =
        routes.into_iter().map(|mut t| rule(&mut t, &mut partitioned, relay)).collect();
    let complete = found.iter().all(Option::is_some);
    let rules: Vec<Rule> = found.into_iter().flatten().collect();
    // The checks across routes would repeat the problems of a single one.
    if complete {
        if let Err(error) = Router::new(&rules) {
            root.error(ROUTE, &error);
        }
        check_tables(root, &rules, tables);
    }
    (rules, partitioned)
}

/// The exchanges that the rules publish to, each once.
pub(super) fn exchanges(rules: &[Rule]) -> Vec<&str> {
    let mut list: Vec<&str> = Vec::new();
    for rule in rules {
        if let Action::Publish { exchange, .. } = &rule.action
            && !list.contains(&exchange.as_str())
        {
            list.push(exchange);
        }
    }
    list
}

/// `None` when there is a problem with what it selects or does.
fn rule(t: &mut Section<'_>, partitioned: &mut Vec<Partitioned>, relay: &str) -> Option<Rule> {
    const NAME: &str = "name";
    const DROP: &str = "drop";
    let name = t.short_string(NAME);
    if !name.is_empty() {
        t.call_it(&format!("route {name:?}"));
    }
    let owner = t.text("owner", "");
    let select = select(t);
    let drop = t.flag(DROP, false);
    let first = t.asked();
    let of_route = Partitioned::read(t);
    let action = publishing(t, select.as_ref(), !drop, of_route.as_ref(), relay);
    let action = if drop { Some(Action::Drop) } else { action };
    if let (Some(mut of_route), Some(Action::Publish { exchange, .. })) = (of_route, &action) {
        exchange.clone_into(&mut of_route.exchange);
        partitioned.push(of_route);
    }
    // What a route asks for to publish is of no use to one that drops.
    let unused = t.given_since(first);
    if drop && !unused.is_empty() {
        let (path, unused) = (t.path(DROP), unused.join(", "));
        t.problem(DROP, format!("{path} = true ignores {unused}; remove one or the other"));
    }
    Some(Rule { name, owner, select: select?, action: action? })
}

fn select(t: &mut Section<'_>) -> Option<Select> {
    const TABLE: &str = "table";
    let outbox = "such as { aggregate_type = \"order\" }";
    let aggregate_type = t.table("outbox", outbox).text("aggregate_type", "");
    let table = t.text(TABLE, "");
    match (aggregate_type.as_str(), table.as_str()) {
        ("", "") => {
            let path = t.path("");
            t.problem(
                TABLE,
                format!(
                    "{path}selects nothing; expected outbox = {{ aggregate_type = \"order\" }} or \
                     table = \"schema.table\", with \"*\" for all"
                ),
            );
            None
        }
        (_, "") => Some(Select::Outbox { aggregate_type }),
        ("", _) => Some(Select::Table { name: table }),
        (_, _) => {
            let path = t.path("");
            t.problem(TABLE, format!("{path}selects outbox events and a table; split it in two"));
            None
        }
    }
}

/// All keys of a route that publishes; without `select` or an exchange there is none.
fn publishing(
    t: &mut Section<'_>,
    select: Option<&Select>,
    publishes: bool,
    partitioned: Option<&Partitioned>,
    relay: &str,
) -> Option<Action> {
    const EXCHANGE: &str = "exchange";
    const ROUTING_KEY: &str = "routing_key";
    let exchange = match (publishes, partitioned) {
        (false, _) => t.text(EXCHANGE, ""),
        (true, None) => t.short_string(EXCHANGE),
        (true, Some(of_route)) => {
            let own = t.text(EXCHANGE, "");
            if own.is_empty() { of_route.partitions.queue.clone() } else { own }
        }
    };
    if exchange.contains('{') {
        let text =
            "an exchange has no fields, only routing_key has; write a route for each exchange";
        t.problem(EXCHANGE, format!("{} = {exchange:?}: {text}", t.path(EXCHANGE)));
    }
    let routing_key = t.text(ROUTING_KEY, "");
    if partitioned.is_some() && !routing_key.is_empty() {
        let path = t.path(ROUTING_KEY);
        let text = "with partitions the routing key is the name of the key's queue; remove it";
        t.problem(ROUTING_KEY, format!("{path}: {text}"));
    }
    let (format, own_key) = formats::read(t, select, relay);
    if own_key.is_some() && (partitioned.is_some() || !routing_key.is_empty()) {
        let (path, what) =
            (t.path(ROUTING_KEY), if partitioned.is_some() { "partitions" } else { "routing_key" });
        let text =
            format!("{path}: debezium.routing_key and {what} are two ways to say it; keep one");
        t.problem(ROUTING_KEY, text);
    }
    let contracts = contracts::contracts(t);
    let key = t.list("key");
    let orderings = [("keyed", Ordering::Keyed), ("pipelined", Ordering::Pipelined)];
    let ordering = t.word("ordering", &orderings);
    let ids = [("event", MessageIdRule::Event), ("route", MessageIdRule::Route)];
    let message_id = t.word("message_id", &ids);
    let policies = [("park", OnPoison::Park), ("block", OnPoison::Block), ("stop", OnPoison::Stop)];
    let on_poison = t.word("on_poison", &policies);
    let park_unroutable = t.word("on_unroutable", &[("hold", false), ("park", true)]);
    let nack_limit = t.number("nack_limit", 0, 0..=NACKS_MAX);
    let nack_limit = (nack_limit > 0).then_some(nack_limit);
    let rules = Box::new(rules_of(t));
    let select = select?;
    let routing_key = match (own_key, partitioned) {
        (_, Some(_)) => String::new(),
        (Some(own_key), None) => own_key,
        (None, None) if routing_key.is_empty() => default_routing_key(select),
        (None, None) => routing_key,
    };
    let policy = Policy { on_poison, park_unroutable, nack_limit };
    (!exchange.is_empty()).then_some(Action::Publish {
        exchange,
        routing_key,
        partitions: partitioned.map(|of_route| of_route.partitions.clone()),
        format,
        contracts,
        ordering,
        message_id,
        key,
        policy,
        rules,
    })
}

/// That of the default rule for events of the same kind.
fn default_routing_key(select: &Select) -> String {
    let same = |rule: &Rule| discriminant(&rule.select) == discriminant(select);
    let key = default_rules().into_iter().find(same).and_then(|rule| match rule.action {
        Action::Publish { routing_key, .. } => Some(routing_key),
        Action::Drop => None,
    });
    key.unwrap_or_default()
}

fn check_tables(root: &Section<'_>, rules: &[Rule], tables: &[String]) {
    let routed: BTreeSet<&str> = rules
        .iter()
        .filter_map(|rule| match &rule.select {
            Select::Table { name } => Some(name.as_str()),
            Select::Outbox { .. } => None,
        })
        .collect();
    if !routed.contains("*") {
        for table in tables.iter().filter(|table| !routed.contains(table.as_str())) {
            root.problem(
                "route",
                format!(
                    "table {table:?} is captured and no route selects it; add a [[route]] with \
                     table = {table:?} (and drop = true to drop its changes)"
                ),
            );
        }
    }
    for table in routed.iter().filter(|name| **name != "*") {
        if !tables.iter().any(|captured| captured == table) {
            root.problem(
                "route",
                format!(
                    "a route selects table {table:?}, which is not captured; add it to \
                     source.tables"
                ),
            );
        }
    }
}
