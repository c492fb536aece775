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
use super::section::{Scalar, Section};
use crate::message::SHORT_STRING_MAX;
use crate::route::{
    Action, Address, EXCHANGES_MAX, Format, MessageIdRule, OnPoison, Ordering, Placement, Policy,
    Router, Rule, Select, default_rules,
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
        let Action::Publish { address, .. } = &rule.action else { continue };
        for exchange in address.exchanges() {
            if !list.contains(&exchange.as_str()) {
                list.push(exchange);
            }
        }
    }
    list
}

/// The fields that routes of the outbox place, each once.
pub(super) fn placed(rules: &[Rule]) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    for rule in rules {
        let Action::Publish { format: Format::Debezium(debezium), .. } = &rule.action else {
            continue;
        };
        for Placement { field, .. } in &debezium.router.placements {
            if !list.contains(field) {
                list.push(field.clone());
            }
        }
    }
    list
}

/// The columns that templates of outbox routes name, each once, after the first key that does.
pub(super) fn shown(rules: &[Rule]) -> Vec<(String, String)> {
    let mut list: Vec<(String, String)> = Vec::new();
    for rule in rules.iter().filter(|rule| matches!(rule.select, Select::Outbox { .. })) {
        for (key, column) in rule.template_columns() {
            if !list.iter().any(|(_, known)| *known == column) {
                list.push((format!("route {:?}: {key}", rule.name), column));
            }
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
    if let (Some(mut of_route), Some(Action::Publish { address, .. })) = (of_route, &action) {
        address.exchange.clone_into(&mut of_route.exchange);
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
        (kind, "") if kind != "*" && kind.contains('*') => {
            let expected = "an aggregate type, or \"*\" alone for all";
            t.invalid("outbox.aggregate_type", format!("{kind:?}"), expected);
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
    const ROUTING_KEY: &str = "routing_key";
    let (exchange, exchanges) = exchange(t, publishes, partitioned);
    let headers = headers(t);
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
    let ordering = t.word(ORDERING, &orderings);
    check_pipelined(t, ordering, &exchanges);
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
    let address = Box::new(Address { exchange, exchanges, routing_key, headers });
    (!address.exchange.is_empty()).then_some(Action::Publish {
        address,
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

const ORDERING: &str = "ordering";

/// Each exchange has channels of its own, and nothing holds messages of two channels in order but
/// waiting for confirms, which a pipelined route does not do.
fn check_pipelined(t: &mut Section<'_>, ordering: Ordering, exchanges: &[String]) {
    if ordering == Ordering::Pipelined && !exchanges.is_empty() {
        let text = format!(
            "{} = \"pipelined\" with exchanges: messages of one key could overtake each other on \
             their way to different exchanges; use \"keyed\"",
            t.path(ORDERING)
        );
        t.problem(ORDERING, text);
    }
}

/// The exchange of a route, and those that its fields may make.
fn exchange(
    t: &mut Section<'_>,
    publishes: bool,
    partitioned: Option<&Partitioned>,
) -> (String, Vec<String>) {
    const EXCHANGE: &str = "exchange";
    const EXCHANGES: &str = "exchanges";
    let mut exchanges = t.list(EXCHANGES);
    let mut exchange = t.text(EXCHANGE, "");
    if publishes && exchange.is_empty() {
        match partitioned {
            Some(of_route) => exchange.clone_from(&of_route.partitions.queue),
            None => t.invalid(EXCHANGE, "\"\"", "1 to 255 bytes"),
        }
    }
    let (path, of_list) = (t.path(EXCHANGE), t.path(EXCHANGES));
    match (exchange.contains('{'), exchanges.is_empty()) {
        (true, true) => {
            let text = "an exchange with fields needs exchanges, the list of all names that it can \
                        make, such as [\"shop.eu\", \"shop.us\"]";
            t.problem(EXCHANGE, format!("{path} = {exchange:?}: {text}"));
        }
        (false, false) if !exchange.is_empty() => {
            let text = "is only for an exchange with fields, but exchange contains no {field}";
            let what = "remove exchanges, or put a field into exchange";
            t.problem(EXCHANGES, format!("{of_list} {text}; {what}"));
        }
        (false, true) if exchange.len() > SHORT_STRING_MAX => {
            t.invalid(EXCHANGE, format!("{exchange:?}"), "1 to 255 bytes");
        }
        _ => {}
    }
    if exchanges.len() > EXCHANGES_MAX {
        let text = format!("{of_list} has {} names; at most {EXCHANGES_MAX}", exchanges.len());
        t.problem(EXCHANGES, text);
        exchanges.truncate(EXCHANGES_MAX);
    }
    for (index, name) in exchanges.iter().enumerate() {
        if name.is_empty() || name.len() > SHORT_STRING_MAX {
            t.invalid(EXCHANGES, format!("{name:.60?}"), "names of 1 to 255 bytes");
        }
        if exchanges[..index].contains(name) {
            t.problem(EXCHANGES, format!("{of_list} has {name:?} twice; remove one"));
        }
    }
    (exchange, exchanges)
}

/// `headers = { region = "{column.region}" }`.
fn headers(t: &mut Section<'_>) -> Vec<(String, String)> {
    let mut given = t.table("headers", "such as { region = \"{column.region}\" }");
    let mut headers = Vec::new();
    for name in given.keys() {
        match given.scalar(name) {
            Some(Scalar::Text(text)) => headers.push((name.to_owned(), text)),
            Some(Scalar::Int(_) | Scalar::Bool(_)) => {
                let path = given.path(name);
                given.problem(name, format!("{path} must be text in quotes"));
            }
            None => {}
        }
    }
    headers
}

/// That of the default rule for events of the same kind.
fn default_routing_key(select: &Select) -> String {
    let same = |rule: &Rule| discriminant(&rule.select) == discriminant(select);
    let key = default_rules().into_iter().find(same).and_then(|rule| match rule.action {
        Action::Publish { address, .. } => Some(address.routing_key),
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
