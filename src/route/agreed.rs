//! Which columns of a table are those that were agreed to, and not others under their names. Pure.
//!
//! Invariant: a route that hides columns sends only those that somebody agreed to. Names are not
//! enough: `note` is dropped, and the hidden `ssn` is renamed to `note`. The stream tells names and
//! their order; the catalog tells numbers, too, which a column keeps for life. Where the catalog
//! does not describe the table as it was then, the stream must show that nothing was dropped,
//! renamed or exchanged: all columns that were agreed to stand where they stood, and new ones after
//! them. Otherwise only the key is sent, without which a change would say nothing.

use super::description::{Description, Numbered};
use super::rules::ColumnRules;

/// The columns of `now` that a route with these rules was agreed with as `agreed`. `catalog` is the
/// table as the catalog had it last, `key` the columns of the route's own key.
pub(super) fn columns<'a>(
    key: &[String],
    agreed: &Description,
    now: &'a Description,
    catalog: Option<&Description>,
) -> Vec<&'a str> {
    let numbers = numbers(agreed, now, catalog);
    let is_kept = is_kept(agreed, now);
    let is_key = |name: &str| now.key.iter().chain(key).any(|key| key == name);
    let is_it = |name: &&str| match numbers {
        Some((then, today)) => then.of(agreed, name) == today.of(now, name),
        None => is_kept || is_key(name),
    };
    let named = now.columns.iter().map(|column| &*column.name);
    named.filter(|name| agreed.column(name).is_some()).filter(is_it).collect()
}

/// Whether only the catalog can tell which columns these are.
pub(super) fn needs_catalog(
    rules: &ColumnRules,
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> bool {
    // A younger one says no more of a table that this one describes as it is, nor of another table
    // under its name: a session that ended for that would end again and again.
    let is_behind = catalog.is_none_or(|catalog| names(catalog) != names(now));
    let is_in_doubt = agreed.numbered.is_some() || !is_kept(agreed, now);
    rules.is_closed() && is_behind && is_in_doubt
}

/// The numbers of the columns when it was agreed to, and of those of `now`, if the catalog knows.
fn numbers<'a>(
    agreed: &'a Description,
    now: &Description,
    catalog: Option<&'a Description>,
) -> Option<(&'a Numbered, &'a Numbered)> {
    let catalog = catalog?;
    let (then, today) = (agreed.numbered.as_ref()?, catalog.numbered.as_ref()?);
    (then.relation == today.relation && names(now) == names(catalog)).then_some((then, today))
}

fn names(description: &Description) -> Vec<&str> {
    description.columns.iter().map(|column| &*column.name).collect()
}

/// Whether the columns that were agreed to stand where they stood.
fn is_kept(agreed: &Description, now: &Description) -> bool {
    let both = agreed.columns.iter().zip(&now.columns);
    now.columns.len() >= agreed.columns.len()
        && both.clone().all(|(then, now)| then.name == now.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::column::oid;
    use crate::route::description::DescribedColumn;

    fn described(names: &str, numbers: &[i16]) -> Description {
        let column = |name: &str| DescribedColumn {
            name: name.to_owned(),
            type_oid: oid::TEXT,
            type_modifier: -1,
        };
        let numbers = numbers.to_vec();
        Description {
            columns: names.split(' ').map(column).collect(),
            key: vec!["id".into()],
            numbered: (!numbers.is_empty()).then_some(Numbered { relation: 7, numbers }),
            ..Description::default()
        }
    }

    fn agreed_of(now: &str, catalog: Option<&Description>) -> String {
        let agreed = described("id note ssn name", &[1, 2, 3, 4]);
        columns(&["customer".into()], &agreed, &described(now, &[]), catalog).join(" ")
    }

    #[test]
    fn without_the_catalog_columns_are_known_while_all_stand_where_they_stood() {
        assert_eq!(agreed_of("id note ssn name", None), "id note ssn name");
        assert_eq!(agreed_of("id ssn name", None), "id", "`name` may be the hidden one");
        assert_eq!(agreed_of("id note ssn name more", None), "id note ssn name");
        assert_eq!(agreed_of("id remark ssn name", None), "id");
        assert_eq!(agreed_of("id old_note note ssn", None), "id", "`note` is the hidden one");
        assert_eq!(agreed_of("id note name", None), "id", "it may be the hidden one");
        assert_eq!(agreed_of("id ssn note name", None), "id", "they have exchanged their names");
        assert_eq!(agreed_of("id note name ssn", None), "id", "a new one has its name");
    }

    #[test]
    fn the_catalog_is_asked_only_where_a_younger_one_can_tell_more() {
        let rules = ColumnRules { hash: vec!["ssn".into()], ..ColumnRules::default() };
        let agreed = described("id note ssn", &[1, 2, 3]);
        let asks = |now: &str, catalog: &Description| {
            needs_catalog(&rules, &agreed, &described(now, &[]), Some(catalog))
        };
        assert!(asks("id old note ssn", &agreed), "its columns stand elsewhere");
        assert!(asks("id note ssn more", &agreed), "they may be others under these names");
        assert!(!asks("id note", &described("id note", &[1, 3])));
        let mut again = described("id note ssn", &[1, 2, 3]);
        again.numbered.as_mut().expect("numbers").relation = 8;
        assert!(!asks("id note ssn", &again), "it was dropped and created again");
    }

    #[test]
    fn the_catalog_tells_columns_by_their_numbers() {
        let dropped = described("id note name", &[1, 2, 4]);
        assert_eq!(agreed_of("id note name", Some(&dropped)), "id note name");
        let renamed = described("id note name", &[1, 3, 4]);
        assert_eq!(agreed_of("id note name", Some(&renamed)), "id name");
        let exchanged = described("id ssn note name", &[1, 2, 3, 4]);
        assert_eq!(agreed_of("id ssn note name", Some(&exchanged)), "id name");
        // It describes the table as it was at another time.
        assert_eq!(agreed_of("id note name", Some(&exchanged)), "id");
        // Another table of that name has numbers of its own.
        let mut other = described("id ssn note name", &[1, 2, 3, 4]);
        other.numbered.as_mut().expect("numbers").relation = 8;
        assert_eq!(agreed_of("id ssn note name", Some(&other)), "id");
    }
}
