//! What a column's values are compared with: the constants of a filter, read once. Pure.
//!
//! Invariant: a column is compared in the way that `verify_types` took for its type. Both ask
//! [`Comparable::of_base`], about the type under all domains.

use std::cmp::Ordering;

use super::Literal;
use super::decimal::Number;
use crate::column::ValueKind;
use crate::event::Column;
use crate::route::rules::column_type::{Comparable, Instant};

/// How a value is compared with a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TextOrder {
    Bytes,
    /// Without the blanks at its end.
    Padded,
    Instant(Instant),
}

/// A constant.
pub(super) enum Operand {
    Bytes(String),
    /// Without the blanks at its end.
    Padded(String),
    Instant(Instant, i64),
    Number(Number),
    Bool(bool),
}

impl TextOrder {
    pub(super) fn of(column: &Column) -> Self {
        let base = match column.resolved {
            Some(of) if of.arrays > 0 => return TextOrder::Bytes,
            Some(of) => match of.kind {
                ValueKind::BuiltIn(base) => base,
                _ => return TextOrder::Bytes,
            },
            None => column.type_oid,
        };
        TextOrder::of_comparable(Comparable::of_base(base))
    }

    pub(super) fn of_comparable(comparable: Comparable) -> Self {
        match comparable {
            Comparable::Padded => TextOrder::Padded,
            Comparable::Instant(of) => TextOrder::Instant(of),
            Comparable::Bool | Comparable::Number | Comparable::Text => TextOrder::Bytes,
            Comparable::Time | Comparable::Equal => TextOrder::Bytes,
        }
    }
}

impl Operand {
    pub(super) fn of(order: TextOrder, literal: &Literal) -> Self {
        match literal {
            Literal::Bool(is) => Operand::Bool(*is),
            Literal::Number(number) => {
                Operand::Number(Number::read(number).expect("the parser takes only numbers"))
            }
            Literal::Text(text) => match order {
                TextOrder::Bytes => Operand::Bytes(text.clone()),
                TextOrder::Padded => Operand::Padded(text.trim_end_matches(' ').to_owned()),
                TextOrder::Instant(of) => match of.of(text) {
                    Some(at) => Operand::Instant(of, at),
                    None => Operand::Bytes(text.clone()),
                },
            },
        }
    }

    /// How the value with this text follows it; absent if it cannot be compared with it.
    pub(super) fn followed_by(&self, text: &str) -> Option<Ordering> {
        match self {
            Operand::Bytes(wanted) => Some(text.cmp(wanted)),
            Operand::Padded(wanted) => Some(text.trim_end_matches(' ').cmp(wanted)),
            Operand::Instant(of, at) => Some(of.of(text)?.cmp(at)),
            Operand::Number(wanted) => wanted.followed_by(text),
            Operand::Bool(wanted) => match text {
                "t" | "true" => Some(true.cmp(wanted)),
                "f" | "false" => Some(false.cmp(wanted)),
                _ => None,
            },
        }
    }
}
