//! Whether the rules of a route fit its table, by what the catalog says of it: at `init`, `check`,
//! every start, and before an agreement. Pure.
//!
//! Invariant: a rule that names a column names one that the table has, or had when the route was
//! agreed. What a name that is spelt wrong should hide would be sent.

use crate::error::{Error, Result};
use crate::event::hidden::Hide;
use crate::relay::session::schemas::Cataloged;
use crate::route::description::Description;
use crate::route::{Action, Rule, Select};

/// Publishing routes that are for this table, with the columns that they name as their key.
pub fn routes_of<'a>(rules: &'a [Rule], table: &str) -> impl Iterator<Item = &'a Rule> {
    rules.iter().filter(move |rule| {
        let publishes = matches!(rule.action, Action::Publish { .. });
        publishes && matches!(&rule.select, Select::Table { name } if name == "*" || name == table)
    })
}

/// Refuses rules that cannot be followed in a table that is like `now` and was agreed as `agreed`.
///
/// # Errors
/// [`crate::error::Kind::Refused`] naming the route, the rule and the column.
pub fn verify(rule: &Rule, now: &Cataloged, agreed: Option<&Description>) -> Result<()> {
    let Cataloged { table, description: now, types, .. } = now;
    let Action::Publish { rules, key: named_key, .. } = &rule.action else { return Ok(()) };
    let in_route = |error: Error| error.context(format!("route {:?}", rule.name));
    let is_known = |name: &str| {
        now.column(name).is_some() || agreed.is_some_and(|agreed| agreed.column(name).is_some())
    };
    let of_rules = rules.named().map(|(key, name)| (key.to_owned(), name.to_owned()));
    let mut named = of_rules.chain(rule.template_columns());
    if let Some((key, name)) = named.find(|(_, name)| !is_known(name)) {
        let columns: Vec<&str> = now.columns.iter().map(|column| &*column.name).collect();
        let text = format!("{key} names column {name:?}, which table {table} does not have");
        return Err(in_route(Error::refused(text))
            .hint(format!("its published columns are: {}", columns.join(", "))));
    }
    let key = if named_key.is_empty() { &now.key } else { named_key };
    let left_out = |name: &&String| {
        rules.columns.hide(name) == Some(Hide::Exclude) || rules.map.drop.contains(name)
    };
    if let Some(name) = key.iter().find(left_out) {
        let text = format!("key column {name:?} of table {table} is not sent");
        return Err(in_route(Error::refused(text)).hint(
            "hash or mask it instead, add it to columns.include, or set key in the route to other \
             columns",
        ));
    }
    let is_there = |name: &&str| {
        let sent = rules.columns.hide(name) != Some(Hide::Exclude) && rules.map.name(name) == *name;
        now.column(name).is_some() && sent && !rules.map.drop.iter().any(|drop| drop == name)
    };
    if let Some(name) = rules.map.makes().find(is_there) {
        let text = format!("map makes the field {name:?}, which is also a column of table {table}");
        return Err(in_route(Error::refused(text))
            .hint("choose another name, or put the column into map.drop"));
    }
    rules.verify_types(types).map_err(in_route)
}

/// Refuses a column of which binary mode gets less than text mode, on a route that sends it. Every
/// event with a value in it would be parked.
///
/// # Errors
/// [`crate::error::Kind::Refused`] naming the route, the table, the column and its type.
pub fn verify_binary(rule: &Rule, now: &Cataloged, agreed: Option<&Description>) -> Result<()> {
    let Action::Publish { rules, .. } = &rule.action else { return Ok(()) };
    let is_new = |name: &str| agreed.is_some_and(|agreed| agreed.column(name).is_none());
    let is_sent = |name: &str| {
        // A hash is made of the text, too.
        rules.columns.hide(name) <= Some(Hide::Hash)
            && !rules.map.drop.iter().any(|dropped| dropped == name)
            && !(rules.columns.is_closed() && is_new(name))
    };
    let Some((column, kind)) = now.named_things.iter().find(|(column, _)| is_sent(column)) else {
        return Ok(());
    };
    let (route, table) = (&rule.name, &now.table);
    let text = format!(
        "route {route:?}: column {column:?} of table {table} is of type {kind}, or made of \
         it: in binary mode Postgres sends an OID instead of the name"
    );
    Err(Error::refused(text).hint(
        "set source.binary = false; or leave the column out (columns.exclude), or change its type \
         to text",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::column::oid;
    use crate::route::description::DescribedColumn;
    use crate::route::rules::column_type::ColumnType;
    use crate::route::rules::{ColumnRules, Constant, Map};
    use crate::route::{RouteRules, default_rules};

    fn cataloged(names: &[&str]) -> Cataloged {
        let description = description(names);
        let of = |column: &DescribedColumn| ColumnType {
            name: column.to_string(),
            base: column.type_oid,
            category: b'U',
            modifier: column.type_modifier,
        };
        let types = description.columns.iter().map(|column| (column.name.clone(), of(column)));
        Cataloged {
            table: "public.t".into(),
            oid: 7,
            types: types.collect(),
            description,
            named_things: Vec::new(),
        }
    }

    fn description(names: &[&str]) -> Description {
        let column = |name: &&str| DescribedColumn {
            name: (*name).into(),
            type_oid: if *name == "age" { oid::INT4 } else { oid::TEXT },
            type_modifier: -1,
        };
        let columns = names.iter().map(column).collect();
        Description { columns, key: vec!["id".into()], ..Description::default() }
    }

    fn judged(rules: RouteRules, agreed: Option<&Description>) -> Result<()> {
        let mut rule = default_rules().remove(1);
        let Action::Publish { rules: of_rule, .. } = &mut rule.action else { unreachable!() };
        **of_rule = rules;
        verify(&rule, &cataloged(&["id", "email", "age"]), agreed)
    }

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    fn columns(columns: ColumnRules) -> RouteRules {
        RouteRules { columns, ..RouteRules::default() }
    }

    fn map(map: Map) -> RouteRules {
        RouteRules { map, ..RouteRules::default() }
    }

    #[test]
    fn what_cannot_be_followed_is_refused_with_the_name() {
        let text = |text: &str| Constant::Text(text.into());
        for (rules, expected) in [
            (
                columns(ColumnRules { hash: names(&["mail"]), ..Default::default() }),
                "columns.hash names column \"mail\", which table public.t does not have",
            ),
            (
                columns(ColumnRules { exclude: names(&["id"]), ..Default::default() }),
                "key column \"id\" of table public.t is not sent",
            ),
            (
                columns(ColumnRules { include: names(&["email"]), ..Default::default() }),
                "key column \"id\" of table public.t is not sent",
            ),
            (map(Map { drop: names(&["id"]), ..Map::default() }), "key column \"id\""),
            (
                map(Map { rename: vec![("email".into(), "age".into())], ..Map::default() }),
                "map makes the field \"age\", which is also a column",
            ),
            (
                map(Map { default: vec![("age".into(), text("none"))], ..Map::default() }),
                "map.default of column \"age\" (integer)",
            ),
        ] {
            let error = judged(rules, None).unwrap_err().to_string();
            assert!(error.starts_with("route \"tables\": ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_column_that_was_there_when_the_route_was_agreed_may_be_named() {
        let rules = || columns(ColumnRules { exclude: names(&["mail"]), ..Default::default() });
        assert!(judged(rules(), None).is_err());
        assert!(judged(rules(), Some(&description(&["id", "mail"]))).is_ok());
        let hidden = ColumnRules {
            hash: names(&["id"]),
            mask: vec![("email".into(), Constant::Text("***".into()))],
            ..Default::default()
        };
        assert!(judged(columns(hidden), None).is_ok());
    }
}
