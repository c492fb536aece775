//! `[[route]]`: from what was written to the router's rules.
//!
//! Invariant: with routes, each captured table is selected by one, and each route selects
//! something that is captured. So nothing that is captured is poison by configuration.

use std::collections::BTreeSet;

use super::raw;
use super::value::Problems;
use crate::route::{
    Action, MessageIdRule, OnPoison, Ordering, Policy, Router, Rule, Select, default_rules,
};

/// Largest `nack_limit`.
const NACKS_MAX: u64 = 1_000_000;

/// The rules of the file, or the default rules when it has none.
pub(super) fn rules(p: &mut Problems, routes: &[raw::Route], tables: &[String]) -> Vec<Rule> {
    if routes.is_empty() {
        return default_rules();
    }
    let found: Vec<Option<Rule>> =
        routes.iter().enumerate().map(|(index, route)| rule(p, index, route)).collect();
    let complete = found.iter().all(Option::is_some);
    let rules: Vec<Rule> = found.into_iter().flatten().collect();
    // The checks across routes would repeat the problems of a single one.
    if complete {
        if let Err(error) = Router::new(&rules) {
            p.error("route", &error);
        }
        check_tables(p, &rules, tables);
    }
    rules
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

fn rule(p: &mut Problems, index: usize, raw: &raw::Route) -> Option<Rule> {
    let at = if raw.name.is_empty() {
        format!("route[{index}]")
    } else {
        format!("route {:?}", raw.name)
    };
    if raw.name.is_empty() || raw.name.len() > crate::message::SHORT_STRING_MAX {
        p.value(&format!("{at}: name"), format!("{:?}", raw.name), "1 to 255 bytes");
    }
    let select = match (raw.outbox.aggregate_type.as_str(), raw.table.as_str()) {
        ("", "") => {
            p.other(format!(
                "{at} selects nothing; allowed: outbox = {{ aggregate_type = \"order\" }} or \
                 table = \"schema.table\", with \"*\" for all"
            ));
            return None;
        }
        (aggregate_type, "") => Select::Outbox { aggregate_type: aggregate_type.to_owned() },
        ("", table) => Select::Table { name: table.to_owned() },
        (_, _) => {
            p.other(format!("{at} selects an outbox and a table; make two routes of it"));
            return None;
        }
    };
    let action = if raw.drop { dropping(p, &at, raw) } else { publishing(p, &at, raw, &select) };
    Some(Rule { name: raw.name.clone(), owner: raw.owner.clone(), select, action: action? })
}

fn dropping(p: &mut Problems, at: &str, raw: &raw::Route) -> Option<Action> {
    let plain = raw::Route::default();
    let set = [
        ("exchange", raw.exchange != plain.exchange),
        ("routing_key", raw.routing_key != plain.routing_key),
        ("key", raw.key != plain.key),
        ("ordering", raw.ordering != plain.ordering),
        ("message_id", raw.message_id != plain.message_id),
        ("on_poison", raw.on_poison != plain.on_poison),
        ("on_unroutable", raw.on_unroutable != plain.on_unroutable),
        ("nack_limit", raw.nack_limit != plain.nack_limit),
    ];
    let set: Vec<&str> = set.iter().filter(|(_, set)| *set).map(|(key, _)| *key).collect();
    if !set.is_empty() {
        let keys = set.join(", ");
        p.other(format!("{at} drops, and has {keys}, which it would not use; keep one of them"));
        return None;
    }
    Some(Action::Drop)
}

fn publishing(p: &mut Problems, at: &str, raw: &raw::Route, select: &Select) -> Option<Action> {
    let orderings = [("keyed", Ordering::Keyed), ("pipelined", Ordering::Pipelined)];
    let ordering = p.word(&format!("{at}: ordering"), &raw.ordering, &orderings);
    let ids = [("event", MessageIdRule::Event), ("route", MessageIdRule::Route)];
    let message_id = p.word(&format!("{at}: message_id"), &raw.message_id, &ids);
    if raw.exchange.is_empty() || raw.exchange.len() > crate::message::SHORT_STRING_MAX {
        p.value(&format!("{at}: exchange"), format!("{:?}", raw.exchange), "1 to 255 bytes");
        return None;
    }
    let routing_key = match (raw.routing_key.as_str(), select) {
        ("", Select::Outbox { .. }) => "{aggregate_type}.{event_type}",
        ("", Select::Table { .. }) => "{schema}.{table}.{op}",
        (given, _) => given,
    };
    let policies = [("park", OnPoison::Park), ("block", OnPoison::Block), ("stop", OnPoison::Stop)];
    let on_poison = p.word(&format!("{at}: on_poison"), &raw.on_poison, &policies);
    let unroutable = [("hold", false), ("park", true)];
    let park_unroutable = p.word(&format!("{at}: on_unroutable"), &raw.on_unroutable, &unroutable);
    let nack_limit = p.number(&format!("{at}: nack_limit"), raw.nack_limit, 0, NACKS_MAX);
    let nack_limit = u32::try_from(nack_limit).ok().filter(|limit| *limit > 0);
    Some(Action::Publish {
        exchange: raw.exchange.clone(),
        routing_key: routing_key.to_owned(),
        ordering,
        message_id,
        key: raw.key.clone(),
        policy: Policy { on_poison, park_unroutable, nack_limit },
    })
}

fn check_tables(p: &mut Problems, rules: &[Rule], tables: &[String]) {
    let routed: BTreeSet<&str> = rules
        .iter()
        .filter_map(|rule| match &rule.select {
            Select::Table { name } => Some(name.as_str()),
            Select::Outbox { .. } => None,
        })
        .collect();
    if !routed.contains("*") {
        for table in tables.iter().filter(|table| !routed.contains(table.as_str())) {
            p.other(format!(
                "table {table:?} is captured and no route selects it; add a [[route]] with \
                 table = {table:?} (and drop = true to drop its changes)"
            ));
        }
    }
    for table in routed.iter().filter(|name| **name != "*") {
        if !tables.iter().any(|captured| captured == table) {
            p.other(format!(
                "a route selects table {table:?}, which is not captured; add it to source.tables"
            ));
        }
    }
}
