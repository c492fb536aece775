//! What a `[[route]]` does with the columns of its table: `columns`, `map` and `on_drift`.

use super::section::{Scalar, Section};
use crate::route::filter::Filter;
use crate::route::rules::{ColumnRules, Constant, Map, OnDrift, RouteRules};
use crate::secret::Secret;

/// What is sent instead of a masked value, unless the route says otherwise.
const MASK: &str = "***";

pub(super) fn rules_of(t: &mut Section<'_>) -> RouteRules {
    let columns = columns(t);
    let (map, filter) = (map(t), filter(t));
    let policies = [("pass", OnDrift::Pass), ("park", OnDrift::Park), ("stop", OnDrift::Stop)];
    RouteRules { columns, map, filter, on_drift: t.word("on_drift", &policies) }
}

fn filter(t: &mut Section<'_>) -> Option<Filter> {
    const FILTER: &str = "filter";
    let text = t.text(FILTER, "");
    if text.is_empty() {
        return None;
    }
    match Filter::parse(&text) {
        Ok(filter) => Some(filter),
        Err(error) => {
            t.error(FILTER, &error);
            None
        }
    }
}

fn columns(t: &mut Section<'_>) -> ColumnRules {
    let mut columns = t.table("columns", "such as { exclude = [\"notes\"], mask = [\"email\"] }");
    let mask = columns.names_or_scalars("mask", "such as { email = \"***\" }, or a list");
    let constant = |scalar: Option<Scalar>| scalar.map_or(Constant::Text(MASK.into()), constant);
    ColumnRules {
        include: columns.list("include"),
        exclude: columns.list("exclude"),
        mask: mask.into_iter().map(|(name, scalar)| (name, constant(scalar))).collect(),
        hash: columns.list("hash"),
        salt: salt(&mut columns),
    }
}

fn salt(columns: &mut Section<'_>) -> Option<Secret> {
    const SALT: &str = "salt";
    let salt = columns.password(SALT)?;
    match salt.text() {
        Ok(text) => Some(Secret::new(text)),
        Err(error) => {
            columns.error(SALT, &error);
            None
        }
    }
}

fn map(t: &mut Section<'_>) -> Map {
    const RENAME: &str = "rename";
    let mut map = t.table("map", "such as { rename = { mail = \"email\" }, drop = [\"notes\"] }");
    let mut rename = Vec::new();
    for (from, to) in map.scalars(RENAME, "such as { mail = \"email\" }") {
        match to {
            Scalar::Text(to) => rename.push((from, to)),
            Scalar::Int(_) | Scalar::Bool(_) => {
                let path = map.path(RENAME);
                map.problem(RENAME, format!("{path}.{from} is not a string; expected a name"));
            }
        }
    }
    let named = |(name, scalar)| (name, constant(scalar));
    Map {
        rename,
        drop: map.list("drop"),
        set: map.scalars("set", "such as { source = \"shop\" }").into_iter().map(named).collect(),
        default: map
            .scalars("default", "such as { country = \"DE\" }")
            .into_iter()
            .map(named)
            .collect(),
    }
}

fn constant(scalar: Scalar) -> Constant {
    match scalar {
        Scalar::Text(text) => Constant::Text(text),
        Scalar::Int(number) => Constant::Int(number),
        Scalar::Bool(yes) => Constant::Bool(yes),
    }
}
