//! Whether a filter can be followed: names, operations, and comparisons by the types of columns.
//!
//! What can never be true is refused: it would drop every event, and nothing would tell.

use std::cmp::Ordering;

use super::decimal::Number;
use super::{Comparison, Filter, Literal, Name};
use crate::error::{Error, Result};
use crate::event::Op;
use crate::route::rules::column_type::{ColumnType, ColumnTypes, Comparable, Judged, JudgedForm};

/// The fields of an outbox event.
const OUTBOX: [&str; 4] = ["op", "aggregate_type", "aggregate_id", "event_type"];
/// What `op` can be of a change of a captured table.
const OPS: [Op; 5] = [Op::Insert, Op::Update, Op::Delete, Op::Truncate, Op::Read];
/// What it can be of an outbox event.
const OUTBOX_OPS: [Op; 1] = [Op::Insert];

/// A test of a value.
#[derive(Clone, Copy)]
pub(super) enum Test<'l> {
    /// A boolean by itself.
    IsTrue,
    With {
        comparison: Comparison,
        literal: &'l Literal,
        /// Within a `not`.
        negated: bool,
    },
}

const A_BOOLEAN: &str = "true or false";
const A_NUMBER: &str = "a number";
const A_TEXT: &str = "a text in single quotes";

impl Test<'_> {
    /// What the value is compared with.
    fn given(self) -> &'static str {
        match self {
            Test::IsTrue | Test::With { literal: Literal::Bool(_), .. } => A_BOOLEAN,
            Test::With { literal: Literal::Number(_), .. } => A_NUMBER,
            Test::With { literal: Literal::Text(_), .. } => A_TEXT,
        }
    }

    /// Whether it is true only of rows with the value.
    fn is_equal(self) -> bool {
        match self {
            Test::IsTrue => false,
            Test::With { comparison, negated: false, .. } => comparison == Comparison::Equal,
            Test::With { comparison, negated: true, .. } => comparison == Comparison::NotEqual,
        }
    }
}

impl Comparison {
    fn is_equality(self) -> bool {
        matches!(self, Comparison::Equal | Comparison::NotEqual)
    }

    fn sign(self) -> &'static str {
        match self {
            Comparison::Equal => "=",
            Comparison::NotEqual => "!=",
            Comparison::Less => "<",
            Comparison::LessOrEqual => "<=",
            Comparison::Greater => ">",
            Comparison::GreaterOrEqual => ">=",
        }
    }
}

impl Filter {
    /// Refuses names and operations that no outbox event has.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with the name.
    pub(in crate::route) fn verify_outbox(&self) -> Result<()> {
        let is_unknown = |name: &&Name| match name {
            Name::Word(word) => !OUTBOX.contains(&word.as_str()),
            Name::Quoted(_) => true,
            Name::Header(_) => false,
        };
        match self.names.iter().find(is_unknown) {
            Some(Name::Word(word) | Name::Quoted(word)) => Err(Error::config(format!(
                "filter {:?}: {word:?} is not known here; allowed are: {}, headers.NAME",
                self.text,
                OUTBOX.join(", ")
            ))),
            Some(Name::Header(_)) | None => self.verify_words(&OUTBOX_OPS),
        }
    }

    /// Refuses what the words that are not columns cannot be compared with.
    fn verify_words(&self, ops: &[Op]) -> Result<()> {
        self.root.each(&mut |index, test| {
            let Name::Word(word) = &self.names[index] else { return Ok(()) };
            let (text, given) = (&self.text, test.given());
            let is_outbox = *ops == OUTBOX_OPS;
            let wrong = match word.as_str() {
                "op" => wrong_op(ops, test),
                // Ids are often numbers.
                "aggregate_id" if is_outbox && given != A_BOOLEAN => None,
                word if is_outbox && given != A_TEXT => {
                    Some(format!("compares {word:?} with {given}; expected {A_TEXT}"))
                }
                _ => None,
            };
            match wrong {
                None => Ok(()),
                Some(wrong) => Err(Error::config(format!("filter {text:?} {wrong}"))),
            }
        })
    }

    /// Refuses names and operations that no change of a captured table has.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with the name.
    pub(in crate::route) fn verify_table(&self, any: bool) -> Result<()> {
        let header = self.names.iter().any(|name| matches!(name, Name::Header(_)));
        let (text, column) = (&self.text, self.columns().next());
        match column {
            _ if header => Err(Error::config(format!(
                "filter {text:?}: headers are those of outbox rows; a table has columns"
            ))),
            Some(column) if any => Err(Error::config(format!(
                "filter {text:?} names column {column:?}, and the route is for all tables"
            ))
            .hint("name one table in the route, or filter by op only")),
            _ => self.verify_words(&OPS),
        }
    }

    /// Refuses comparisons that columns of these types cannot have.
    ///
    /// # Errors
    /// [`crate::error::Kind::Refused`] with column, type and what it can be compared with.
    pub(in crate::route) fn verify_types(&self, types: &ColumnTypes) -> Result<()> {
        self.root.each(&mut |index, test| {
            let Some((name, of)) = self.column(index, types) else { return Ok(()) };
            let (text, type_name) = (&self.text, &of.name);
            let (comparable, given) = (of.comparable(), test.given());
            let wrong = |what: String| {
                Err(Error::refused(format!(
                    "filter {text:?} compares {name:?} ({type_name}) {what}"
                )))
            };
            if let Test::With { comparison, .. } = test
                && !comparison.is_equality()
                && !comparable.has_order()
            {
                return wrong(format!(
                    "with {}, but values of this type have no order here; allowed are =, != and \
                     in, with {}",
                    comparison.sign(),
                    comparable.expected()
                ));
            }
            let fits = match (comparable, test) {
                (Comparable::Instant(of), Test::With { literal: Literal::Text(text), .. }) => {
                    return match of.of(text) {
                        Some(_) => Ok(()),
                        None => wrong(format!("with {text:?}; expected {}", comparable.expected())),
                    };
                }
                (Comparable::Number, Test::With { literal: Literal::Number(number), .. })
                    if test.is_equal() =>
                {
                    return match of.whole().filter(|whole| !is_within(number, *whole)) {
                        None => Ok(()),
                        Some((least, greatest)) => wrong(format!(
                            "with {number}; expected a whole number from {least} to {greatest}"
                        )),
                    };
                }
                (Comparable::Bool, _) => given == A_BOOLEAN,
                (Comparable::Number, _) => given == A_NUMBER,
                _ => given == A_TEXT,
            };
            match fits {
                true => Ok(()),
                false => wrong(format!("with {given}; expected {}", comparable.expected())),
            }
        })
    }

    /// The constants of which only the server can say whether a column is ever equal to them.
    pub(in crate::route) fn judged<'a>(&'a self, types: &ColumnTypes) -> Vec<Judged<'a>> {
        let mut judged = Vec::new();
        let collected = self.root.each(&mut |index, test| {
            let (Some((column, of)), Test::With { comparison, literal, .. }) =
                (self.column(index, types), test)
            else {
                return Ok(());
            };
            let (Literal::Text(text) | Literal::Number(text)) = literal else { return Ok(()) };
            let form = match (of.comparable(), literal) {
                (Comparable::Instant(_), Literal::Text(_)) => JudgedForm::Any,
                // A part of a value can be a limit.
                (Comparable::Text, _) if !comparison.is_equality() => return Ok(()),
                (Comparable::Padded, Literal::Text(_)) if test.is_equal() => JudgedForm::Any,
                (Comparable::Text, Literal::Text(_)) if of.is_any_text() => return Ok(()),
                (Comparable::Text | Comparable::Equal | Comparable::Time, Literal::Text(_)) => {
                    JudgedForm::Exact
                }
                // Of whole numbers it is known.
                (Comparable::Number, Literal::Number(_))
                    if test.is_equal() && of.whole().is_none() =>
                {
                    JudgedForm::Number
                }
                (Comparable::Padded | Comparable::Bool | Comparable::Number, _)
                | (_, Literal::Number(_) | Literal::Bool(_)) => return Ok(()),
            };
            let what = format!("filter {:?}: the constant for column {column:?}", self.text);
            let text = text.into();
            let may_be_no_value = comparison.is_equality() && !test.is_equal();
            judged.push(Judged { what, column, text, form, may_be_no_value });
            Ok(())
        });
        collected.expect("nothing is refused");
        judged
    }

    /// The column that a test looks at, with its type.
    fn column<'a, 't>(
        &'a self,
        name: usize,
        types: &'t ColumnTypes,
    ) -> Option<(&'a str, &'t ColumnType)> {
        let name = match &self.names[name] {
            Name::Word(word) if word == "op" => return None,
            Name::Word(name) | Name::Quoted(name) => name,
            Name::Header(_) => return None,
        };
        Some((name, types.get(name)?))
    }
}

/// Whether a number is whole, and not beyond these.
fn is_within(number: &str, (least, greatest): (&str, &str)) -> bool {
    Number::read(number).is_some_and(|number| {
        number.is_whole()
            && number.followed_by(least) != Some(Ordering::Greater)
            && number.followed_by(greatest) != Some(Ordering::Less)
    })
}

/// Why `op` cannot be tested like this, where it is one of `ops`.
fn wrong_op(ops: &[Op], test: Test<'_>) -> Option<String> {
    let is_one = |ops: &[Op], op: &str| ops.iter().any(|one| one.as_str() == op);
    let listed: Vec<String> = ops.iter().map(|op| format!("'{}'", op.as_str())).collect();
    let allowed = listed.join(", ");
    let of = if *ops == OUTBOX_OPS { " of an outbox event" } else { "" };
    match test {
        Test::With { comparison, literal: Literal::Text(op), .. } if comparison.is_equality() => {
            // What is true for every event does no harm.
            let ops = if comparison == Comparison::NotEqual { &OPS } else { ops };
            let what = format!("compares \"op\" with '{op}'; op{of} can be {allowed}");
            (!is_one(ops, op)).then_some(what)
        }
        Test::With { comparison, literal: Literal::Text(_), .. } => {
            let sign = comparison.sign();
            Some(format!("compares \"op\" with {sign}; allowed are =, != and in, with {allowed}"))
        }
        Test::IsTrue | Test::With { .. } => {
            Some(format!("compares \"op\" with {}; expected {allowed}", test.given()))
        }
    }
}
