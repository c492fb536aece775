//! Which columns of a table are those that were agreed to, and not others under their names. Pure.
//!
//! Invariant: a route that hides columns sends only those that somebody agreed to. Names are not
//! enough: `note` is dropped, and the hidden `ssn` is renamed to `note`. The stream tells names and
//! their order; the catalog tells numbers, too, which a column keeps for life. Where the catalog
//! does not describe the table as it was then, the stream must show that nothing was exchanged: a
//! hidden column that is gone may be there under any name, and columns that exchange their names
//! change their order.

use super::description::{Description, Numbered};
use super::rules::ColumnRules;

/// The columns of `now` that a route with these rules was agreed with as `agreed`. `catalog` is the
/// table as the catalog had it last.
pub(super) fn columns<'a>(
    rules: &ColumnRules,
    agreed: &Description,
    now: &'a Description,
    catalog: Option<&Description>,
) -> Vec<&'a str> {
    let named = now.columns.iter().map(|column| &*column.name);
    let named = named.filter(|name| agreed.column(name).is_some());
    match numbers(agreed, now, catalog) {
        Some((then, today)) => named.filter(|name| then.of(agreed, name) == today.of(now, name)),
        None if is_kept(rules, agreed, now) => return named.collect(),
        // Without its key a change would say nothing.
        None => return named.filter(|name| now.key.iter().any(|key| key == name)).collect(),
    }
    .collect()
}

/// Whether only the catalog can tell which columns these are.
pub(super) fn needs_catalog(
    rules: &ColumnRules,
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> bool {
    rules.is_closed() && numbers(agreed, now, catalog).is_none() && !is_kept(rules, agreed, now)
}

/// The numbers of the columns when it was agreed to, and of those of `now`, if the catalog knows.
fn numbers<'a>(
    agreed: &'a Description,
    now: &Description,
    catalog: Option<&'a Description>,
) -> Option<(&'a Numbered, &'a Numbered)> {
    let catalog = catalog?;
    let names = |description: &Description| -> Vec<String> {
        description.columns.iter().map(|column| column.name.clone()).collect()
    };
    let (then, today) = (agreed.numbered.as_ref()?, catalog.numbered.as_ref()?);
    (then.relation == today.relation && names(now) == names(catalog)).then_some((then, today))
}

/// Whether no hidden column is gone, and none has exchanged its name with another.
fn is_kept(rules: &ColumnRules, agreed: &Description, now: &Description) -> bool {
    let is_hidden = |name: &str| rules.hide(name).is_some();
    let mut hidden = agreed.columns.iter().filter(|column| is_hidden(&column.name));
    let place = |name: &str| agreed.columns.iter().position(|column| column.name == name);
    let places = now.columns.iter().filter_map(|column| place(&column.name));
    hidden.all(|column| now.column(&column.name).is_some()) && places.is_sorted()
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
        let rules = ColumnRules { hash: vec!["ssn".into()], ..ColumnRules::default() };
        let agreed = described("id note ssn name", &[1, 2, 3, 4]);
        columns(&rules, &agreed, &described(now, &[]), catalog).join(" ")
    }

    #[test]
    fn without_the_catalog_a_column_is_known_while_no_hidden_one_can_be_under_its_name() {
        assert_eq!(agreed_of("id note ssn name", None), "id note ssn name");
        assert_eq!(agreed_of("id ssn name", None), "id ssn name", "an open one is gone");
        assert_eq!(agreed_of("id note ssn name more", None), "id note ssn name");
        assert_eq!(agreed_of("id remark ssn name", None), "id ssn name");
        assert_eq!(agreed_of("id note name", None), "id", "it may be the hidden one");
        assert_eq!(agreed_of("id ssn note name", None), "id", "they have exchanged their names");
        assert_eq!(agreed_of("id note name ssn", None), "id", "a new one has its name");
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
