//! Which columns of a table are the agreed ones, and not others of the same name. Pure.
//!
//! Invariant: a route that hides columns sends only agreed ones. Names are not enough: `note` may
//! be dropped, and the hidden `ssn` renamed to `note`. The stream has the names and their order.
//! The catalog also has numbers: a column keeps its number for life, no later column gets it, and
//! columns are in the order of their numbers.
//!
//! The catalog may be newer than a row. An agreed column that it still has was there when the row
//! was written; one that it lacks may have been. A column is identified if no column that may have
//! been there could stand in its place. Otherwise it is treated as unknown.

use super::description::{Description, Numbered};
use super::rules::ColumnRules;
use crate::event::hidden::Hide;

/// Which column it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    /// The one with this number.
    Number(i16),
    /// A column that did not exist when the columns were agreed.
    New,
    /// Not known: it could be one of several.
    Unknown,
}

/// The columns of `now` that a route with these rules may send: those of `agreed`, and later ones
/// too if the route names what it sends. `key`: the columns of the route's own key. `catalog`: the
/// table as last read from the catalog. `seen`: the descriptions that were recorded since.
pub(super) fn columns<'a>(
    rules: &ColumnRules,
    key: &[String],
    agreed: &Description,
    now: &'a Description,
    (catalog, seen): (Option<&Description>, &[&Description]),
) -> Vec<&'a str> {
    let named = || now.columns.iter().map(|column| &*column.name);
    let Some(which) = which(agreed, now, catalog) else {
        let places = agreed.columns.iter().map(|column| &*column.name).zip(named());
        let kept = places.take_while(|(then, now)| then == now).count();
        // If one lost its place, all after it may have, too.
        let is_kept = kept == agreed.columns.len();
        let is_key = |name: &str| now.key.iter().chain(key).any(|key| key == name);
        let is_it = |(place, name): &(usize, &str)| *place < kept && (is_kept || is_key(name));
        return named().enumerate().filter(is_it).map(|(_, name)| name).collect();
    };
    let settled = catalog.is_some_and(|catalog| is_settled(rules, agreed, catalog))
        && seen.iter().all(|seen| is_settled(rules, agreed, seen));
    let is_it = |(which, name): &(Which, &str)| match which {
        Which::Number(number) => match agreed.with_number(*number) {
            Some(then) if then == *name => true,
            // It was hidden under another name.
            Some(then) => !rules.is_closed() && rules.hide(then) != Some(Hide::Exclude),
            None => !rules.is_closed(),
        },
        Which::New => !rules.is_closed(),
        Which::Unknown => settled && agreed.column(name).is_some(),
    };
    which.into_iter().zip(named()).filter(is_it).map(|(_, name)| name).collect()
}

/// Whether, in `other`, no column has taken over the name of another, and all hidden columns still
/// have their own. If that holds for two descriptions, a name in a row between them means the same
/// column, unless it was renamed back and forth in between.
fn is_settled(rules: &ColumnRules, agreed: &Description, other: &Description) -> bool {
    let (Some(then), Some(today)) = (&agreed.numbered, &other.numbered) else { return false };
    let mut columns = agreed.columns.iter().zip(&then.numbers);
    columns.all(|(column, number)| match other.place(&column.name) {
        Some(place) => today.numbers.get(place) == Some(number),
        None => rules.hide(&column.name).is_none(),
    })
}

/// Whether it takes a newer catalog to identify these columns.
pub(super) fn needs_catalog(
    rules: &ColumnRules,
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> bool {
    // A newer one would not help if this one already describes the table as it is, or if it is
    // another table of that name: the session would end again and again.
    let is_behind = catalog.is_none_or(|catalog| names(catalog) != names(now));
    let is_unknown = match which(agreed, now, catalog) {
        Some(which) => which.contains(&Which::Unknown),
        None => {
            let is_kept = agreed.columns.len() <= now.columns.len()
                && names(agreed).iter().zip(names(now)).all(|(then, now)| *then == now);
            agreed.numbered.is_some() || !is_kept
        }
    };
    !rules.is_empty() && is_behind && is_unknown
}

/// The numbers of the columns of `now`, where all are known.
pub(super) fn numbered(
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> Option<Numbered> {
    let today = catalog?.numbered.as_ref()?;
    let numbers = match which(agreed, now, catalog) {
        _ if is_as_cataloged(now, catalog?, today) => today.numbers.clone(),
        Some(which) => {
            let number = |which: Which| match which {
                Which::Number(number) => Some(number),
                Which::New | Which::Unknown => None,
            };
            which.into_iter().map(number).collect::<Option<Vec<i16>>>()?
        }
        None => return None,
    };
    Some(Numbered { relation: today.relation, numbers })
}

/// Identifies the columns of `now`; absent where numbers do not help.
fn which(
    agreed: &Description,
    now: &Description,
    catalog: Option<&Description>,
) -> Option<Vec<Which>> {
    let (then, catalog) = (agreed.numbered.as_ref()?, catalog?);
    let unknown = || Some(vec![Which::Unknown; now.columns.len()]);
    // The table was being altered when the catalog was read.
    let Some(today) = &catalog.numbered else { return unknown() };
    if then.relation != today.relation {
        return None;
    }
    if is_as_cataloged(now, catalog, today) {
        return Some(today.numbers.iter().map(|number| Which::Number(*number)).collect());
    }
    let is_there = |number: &&i16| today.numbers.contains(number);
    let kept = then.numbers.iter().filter(is_there).count();
    let last = then.numbers.last().copied().unwrap_or_default();
    let is_published_anew = |number: &i16| *number < last && !then.numbers.contains(number);
    // With a column list, numbers do not show which columns existed.
    if now.columns.len() < kept || today.numbers.iter().any(is_published_anew) {
        return unknown();
    }
    if now.columns.len() == kept {
        let kept = then.numbers.iter().filter(is_there);
        return Some(kept.map(|number| Which::Number(*number)).collect());
    }
    // The first that is gone may have been there, or not.
    let certain = then.numbers.iter().take_while(is_there).count();
    let of_place = |place: usize| match then.numbers.get(place) {
        Some(number) if place < certain => Which::Number(*number),
        None if certain == then.numbers.len() => Which::New,
        Some(_) | None => Which::Unknown,
    };
    Some((0..now.columns.len()).map(of_place).collect())
}

/// Whether the catalog has these columns.
fn is_as_cataloged(now: &Description, catalog: &Description, today: &Numbered) -> bool {
    names(now) == names(catalog) && today.numbers.len() == now.columns.len()
}

fn names(description: &Description) -> Vec<&str> {
    description.columns.iter().map(|column| &*column.name).collect()
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

    fn masks() -> ColumnRules {
        ColumnRules { hash: vec!["ssn".into()], ..ColumnRules::default() }
    }

    fn includes(names: &str) -> ColumnRules {
        let include = names.split(' ').map(str::to_owned).collect();
        ColumnRules { include, ..ColumnRules::default() }
    }

    fn agreed_of(now: &str, catalog: Option<&Description>) -> String {
        let agreed = described("id note ssn name", &[1, 2, 3, 4]);
        columns(&masks(), &["customer".into()], &agreed, &described(now, &[]), (catalog, &[]))
            .join(" ")
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
        assert_eq!(agreed_of("old note id name", None), "", "the key is the hidden one");
    }

    #[test]
    fn the_catalog_is_asked_only_where_a_younger_one_can_tell_more() {
        let agreed = described("id note ssn", &[1, 2, 3]);
        let asks = |now: &str, catalog: &Description| {
            needs_catalog(&masks(), &agreed, &described(now, &[]), Some(catalog))
        };
        let dropped = described("id ssn", &[1, 3]);
        assert!(asks("id note ssn", &dropped), "its columns stand elsewhere");
        assert!(!asks("id note ssn more", &agreed), "it has all that it had, and one more");
        assert!(!asks("id remark ssn", &agreed), "they have the same places");
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
        // Another table of that name has numbers of its own.
        let mut other = described("id ssn note name", &[1, 2, 3, 4]);
        other.numbered.as_mut().expect("numbers").relation = 8;
        assert_eq!(agreed_of("id ssn note name", Some(&other)), "id");
    }

    #[test]
    fn a_younger_catalog_tells_what_may_have_been_there() {
        // `note` was dropped, the hidden one has its name, and there is a new `ssn`: then a column
        // came. The rows before that look like those that were agreed to.
        let agreed = described("id note ssn", &[1, 2, 3]);
        let of = |now: &str, catalog: &Description| {
            columns(&masks(), &[], &agreed, &described(now, &[]), (Some(catalog), &[])).join(" ")
        };
        let swapped = described("id note ssn more", &[1, 3, 4, 5]);
        assert_eq!(of("id note ssn", &swapped), "id");
        assert_eq!(of("id note ssn more", &swapped), "id");
        let swapped = described("id note ssn", &[1, 3, 4]);
        assert_eq!(of("id note ssn", &swapped), "id");
        // Nothing is gone: all have their places, whatever they are called.
        let grown = described("id remark ssn more", &[1, 2, 3, 4]);
        assert_eq!(of("id note ssn", &grown), "id note ssn");
        assert_eq!(of("id ssn note", &grown), "id");
        // As many as are left of them are those.
        let less = described("id ssn more", &[1, 3, 4]);
        assert_eq!(of("id note", &less), "id", "it is the hidden one");
        // What is hidden is there, and nothing has another's name: one that was open was dropped.
        let agreed = described("id ssn note name", &[1, 2, 3, 4]);
        let dropped = described("id ssn name more", &[1, 2, 4, 5]);
        let now = described("id ssn note name", &[]);
        assert_eq!(columns(&masks(), &[], &agreed, &now, (Some(&dropped), &[])).len(), 4);
        let dropped = described("id note name more", &[1, 3, 4, 5]);
        let sent = columns(&masks(), &[], &agreed, &now, (Some(&dropped), &[]));
        assert_eq!(sent, ["id"], "the hidden one may have had any of these names");
        // A column list that grew does not tell what was there.
        let agreed = described("id note name", &[1, 2, 4]);
        let listed = described("id name ssn note", &[1, 2, 3, 4]);
        let now = described("id note name", &[]);
        assert!(columns(&masks(), &[], &agreed, &now, (Some(&listed), &[])).is_empty());
        // It was being altered when it was read.
        let open = described("id note name", &[]);
        assert!(columns(&masks(), &[], &agreed, &now, (Some(&open), &[])).is_empty());
    }

    #[test]
    fn a_hidden_column_that_was_last_seen_under_a_name_that_is_sent_is_not_sent_under_it() {
        let agreed = described("id a ssn b", &[1, 2, 3, 4]);
        // The name is back where it was, but the rows are older.
        let catalog = described("id ssn bb z", &[1, 3, 4, 5]);
        let of = |now: &str, seen: &[&Description]| {
            let found = (Some(&catalog), seen);
            columns(&masks(), &[], &agreed, &described(now, &[]), found).join(" ")
        };
        let taken = described("id b bb z", &[1, 3, 4, 5]);
        assert_eq!(of("id b bb z", &[&taken]), "id");
        assert_eq!(of("id b bb z", &[&taken, &catalog]), "id", "whatever was agreed afterwards");
        assert_eq!(of("id b bb z", &[&described("id b bb z", &[])]), "id", "nobody knows");
        assert_eq!(of("id b bb z", &[]), "id b", "it was never seen like that");
    }

    #[test]
    fn a_column_that_was_not_included_is_not_sent_under_a_name_that_is() {
        let agreed = described("id note ssn", &[1, 2, 3]);
        let of = |rules: &str, now: &str, numbers: &[i16]| {
            let catalog = described(now, numbers);
            columns(&includes(rules), &[], &agreed, &described(now, &[]), (Some(&catalog), &[]))
                .join(" ")
        };
        assert_eq!(of("id note", "id note", &[1, 3]), "id", "it is the other one");
        assert_eq!(of("id note", "id note", &[1, 4]), "id note", "it is a new one");
        assert_eq!(of("id note", "id ssn note", &[1, 2, 3]), "id ssn");
        assert_eq!(of("id note ssn", "id ssn note", &[1, 2, 3]), "id ssn note", "both are sent");
    }

    #[test]
    fn numbers_are_told_where_all_are_known() {
        let agreed = described("id note ssn", &[1, 2, 3]);
        let of = |now: &str, catalog: &Description| {
            numbered(&agreed, &described(now, &[]), Some(catalog)).map(|known| known.numbers)
        };
        let again = described("id ssn note", &[1, 3, 4]);
        assert_eq!(of("id ssn note", &again), Some(vec![1, 3, 4]));
        assert_eq!(of("id ssn", &again), Some(vec![1, 3]));
        assert_eq!(of("id note ssn", &again), None);
    }
}
