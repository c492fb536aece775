//! Whether the constants of rules are values of their columns' types, by what the server says: at
//! `init`, `check`, every start, and before an agreement.
//!
//! A default stands where Postgres would have written a value, so it must be written in the same
//! form: formats read it. What a filter compares a text form with is never equal to another form.
//!
//! Invariant: nothing runs that the owner of a captured table or of its types has made, for the
//! role that asks can be a superuser (`sql/query/constants_written.sql`). So of a domain only the
//! type under it is judged.

use tokio_postgres::GenericClient;

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::session::schemas::Cataloged;
use crate::route::filter::same_number;
use crate::route::rules::column_type::{ColumnType, Judged, JudgedForm};
use crate::route::{Action, Rule};

/// What an error says of the value that the server was asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    /// It is not one.
    Wrong,
    /// It names a thing that the role may not see or that is not there yet, or its type has no
    /// input.
    NotJudged,
    /// The error is of connections, transactions, locks, resources, an operator, the system, or
    /// damaged data.
    Nothing,
}

impl Says {
    /// By the SQLSTATE. What an input function raises can have any class: also those of internal
    /// errors, of limits and of syntax errors.
    fn of(state: Option<&str>) -> Self {
        let is_of = |beginnings: &[&str]| {
            state.is_none_or(|state| beginnings.iter().any(|begin| state.starts_with(begin)))
        };
        if is_of(&["08", "25", "40", "53", "55", "57", "58", "XX001", "XX002"]) {
            Says::Nothing
        } else if is_of(&["42501", "42883", "42704", "3F", "0A"]) {
            Says::NotJudged
        } else {
            Says::Wrong
        }
    }
}

/// Refuses constants of a route that no column of their types has.
///
/// # Errors
/// [`crate::error::Kind::Refused`] naming the route and the column; the server's.
pub async fn verify(client: &impl GenericClient, rule: &Rule, now: &Cataloged) -> Result<()> {
    let Action::Publish { rules, .. } = &rule.action else { return Ok(()) };
    let judged = rules.judged(&now.types);
    let asked = judged.iter().filter_map(|one| Some((one, now.types.get(one.column)?)));
    let asked: Vec<(&Judged<'_>, &ColumnType)> = asked.collect();
    if asked.is_empty() {
        return Ok(());
    }
    let wrong = match written(client, &asked).await {
        Ok(all) => {
            let mut each = asked.iter().zip(&all);
            return each.try_for_each(|(one, written)| verify_form(rule, *one, written.as_deref()));
        }
        Err(error) => error,
    };
    if Says::of(wrong.sqlstate()) == Says::Nothing {
        let context = format!("route {:?}: checking the constants of its rules", rule.name);
        return Err(wrong.context(context));
    }
    // It does not say which one it is.
    for one in asked {
        let error = match written(client, &[one]).await {
            Ok(written) => {
                verify_form(rule, one, written.first().and_then(Option::as_deref))?;
                continue;
            }
            Err(error) => error,
        };
        match Says::of(error.sqlstate()) {
            Says::Nothing => return Err(error.context(place(rule, one))),
            Says::NotJudged => {}
            Says::Wrong if one.0.may_be_no_value => {}
            Says::Wrong => {
                let refused = Error::refused(format!("{}: {error}", place(rule, one)));
                return Err(refused.hint("use a value of the column's type"));
            }
        }
    }
    Ok(())
}

/// The route, the constant and its type, in words.
fn place(rule: &Rule, (Judged { what, text, .. }, of): (&Judged<'_>, &ColumnType)) -> String {
    format!("route {:?}: {what} ({}) is {text:?}", rule.name, of.name)
}

/// Refuses a constant that the server writes in another way.
fn verify_form(rule: &Rule, one: (&Judged<'_>, &ColumnType), written: Option<&str>) -> Result<()> {
    let Some(written) = written else { return Ok(()) };
    let text = &*one.0.text;
    let is_other = match one.0.form {
        JudgedForm::Exact => written != text,
        JudgedForm::Number => !same_number(written, text),
        JudgedForm::Any => false,
    };
    if !is_other {
        return Ok(());
    }
    let told = format!("{}, which Postgres writes as {written:?}", place(rule, one));
    Err(Error::refused(told).hint(format!("write it as Postgres does: {written:?}")))
}

/// What the server makes of texts; absent where it is not asked.
async fn written(
    client: &impl GenericClient,
    asked: &[(&Judged<'_>, &ColumnType)],
) -> Result<Vec<Option<String>>> {
    const SQL: &str = include_str!("../../../sql/query/constants_written.sql");
    let texts: Vec<&str> = asked.iter().map(|(one, _)| &*one.text).collect();
    let types: Vec<u32> = asked.iter().map(|(_, of)| of.base).collect();
    let modifiers: Vec<i32> = asked.iter().map(|(_, of)| of.modifier).collect();
    let rows = unnamed::query(client, SQL, &[&texts, &types, &modifiers]).await;
    let rows = rows.map_err(postgres_error)?;
    let written: std::result::Result<_, _> = rows.iter().map(|row| row.try_get(0)).collect();
    written.map_err(postgres_error)
}

#[cfg(test)]
mod tests {
    use super::Says;

    #[test]
    fn an_input_function_says_in_many_classes_that_a_text_is_no_value() {
        for (states, expected) in [
            (&["22P02", "22001", "22003", "23514", "P0001", "38000", "39004"][..], Says::Wrong),
            (&["2F005", "54000", "54001", "XX000", "42601", "42P01", "42703"], Says::Wrong),
            (&["42501", "42883", "42704", "3F000", "0A000"], Says::NotJudged),
            (&["08006", "25P02", "40001", "53200", "55P03"], Says::Nothing),
            (&["57014", "57P01", "58030", "XX001"], Says::Nothing),
        ] {
            for state in states {
                assert_eq!(Says::of(Some(state)), expected, "{state}");
            }
        }
        assert_eq!(Says::of(None), Says::Nothing, "the connection was lost");
    }
}
