//! Whether the constants of rules are values of their columns' types, by what the server says: at
//! `init`, `check`, every start, and before an agreement.
//!
//! A default stands where Postgres would have written a value, so it must be written in the same
//! form: formats read it. What a filter compares a text form with is never equal to another form.

use tokio_postgres::GenericClient;

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::pg::unnamed;
use crate::relay::session::schemas::Cataloged;
use crate::route::filter::same_number;
use crate::route::rules::column_type::JudgedForm;
use crate::route::{Action, Rule};

/// Classes of SQLSTATE that say that a value is wrong: data exception, integrity constraint, and
/// what a function raises that a domain checks with.
const WRONG: [&str; 3] = ["22", "23", "P0"];
/// Classes that say that it cannot be judged: a right on the type or its schema is lacking, or it
/// has no input.
const NOT_JUDGED: [&str; 3] = ["42", "3F", "0A"];

/// Refuses constants of a route that no column of their types has.
///
/// # Errors
/// [`crate::error::Kind::Refused`] naming the route and the column; the server's.
pub async fn verify(client: &impl GenericClient, rule: &Rule, now: &Cataloged) -> Result<()> {
    let Action::Publish { rules, .. } = &rule.action else { return Ok(()) };
    for judged in rules.judged(&now.types) {
        let Some(of) = now.types.get(judged.column) else { continue };
        let (what, text) = (&judged.what, &*judged.text);
        let refused = |why: String| {
            let text = format!("route {:?}: {what} ({}) is {text:?}{why}", rule.name, of.name);
            Err(Error::refused(text))
        };
        match written(client, &of.name, text).await? {
            Written::NotJudged => {}
            Written::Wrong(why) => {
                let refused = refused(format!(": {why}"));
                return refused.map_err(|error| error.hint("use a value of the column's type"));
            }
            Written::As(written) => {
                let is_other = match judged.form {
                    JudgedForm::Exact => written != text,
                    JudgedForm::Number => !same_number(&written, text),
                    JudgedForm::Any => false,
                };
                if is_other {
                    let hint = format!("write it as Postgres does: {written:?}");
                    let refused = refused(format!(", which Postgres writes as {written:?}"));
                    return refused.map_err(|error| error.hint(hint));
                }
            }
        }
    }
    Ok(())
}

/// What the server makes of a text.
enum Written {
    /// A value, which it writes like this.
    As(String),
    /// Not a value, and why.
    Wrong(String),
    NotJudged,
}

/// `type_name` is what `format_type` gives, so it is quoted where it must be.
async fn written(client: &impl GenericClient, type_name: &str, text: &str) -> Result<Written> {
    // A cast of char(n) to text would cut the blanks at its end; concat takes what the output
    // function of the type writes.
    let sql = format!("SELECT concat($1::text::{type_name})");
    match unnamed::query_one(client, &sql, &[&text]).await {
        Ok(row) => Ok(Written::As(row.try_get(0).map_err(postgres_error)?)),
        Err(error) => {
            let error = postgres_error(error);
            let is_of = |classes: &[&str]| {
                let state = error.sqlstate().unwrap_or_default();
                classes.iter().any(|class| state.starts_with(class))
            };
            match (is_of(&WRONG), is_of(&NOT_JUDGED)) {
                (true, _) => Ok(Written::Wrong(error.to_string())),
                (_, true) => Ok(Written::NotJudged),
                _ => Err(error),
            }
        }
    }
}
