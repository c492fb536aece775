//! What the catalog says of a column's type, and which comparisons and constants of a rule it can
//! have. Pure.
//!
//! What stands here is known without a server. Whether a text is a value of the type is for the
//! server to say, where one is at hand (`relay/session/constants`).

use std::borrow::Cow;
use std::collections::HashMap;

use crate::column::instant::{parse_date_us, parse_local_us, parse_us};
use crate::column::{Shape, oid};

/// The category of types that are texts, such as `citext`.
const OF_TEXT: u8 = b'S';

/// The type of a column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnType {
    /// As Postgres writes it, with its modifier: `numeric(10,2)`.
    pub name: String,
    /// OID of the type under all domains over it.
    pub base: u32,
    /// `pg_type.typcategory` of that type.
    pub category: u8,
    /// The modifier that values of that type have here: length, precision and scale; -1 for none.
    pub modifier: i32,
}

/// The types of a table's columns, by name.
pub type ColumnTypes = HashMap<String, ColumnType>;

/// A constant of a rule that the server can judge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged<'r> {
    /// Where it stands, in words: `map.default of column "a"`.
    pub what: String,
    /// The column.
    pub column: &'r str,
    /// The constant.
    pub text: Cow<'r, str>,
    /// What its text must be.
    pub form: JudgedForm,
    /// Whether it does no harm if it is not a value: every row is another.
    pub may_be_no_value: bool,
}

/// What the text of a constant must be, in addition to a value of its column's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JudgedForm {
    /// As Postgres writes the value: it is compared with that, or stands in its place.
    Exact,
    /// A number of the same value, however it is written.
    Number,
    /// Any.
    Any,
}

/// What the values of a type are compared with, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::route) enum Comparable {
    /// `true` and `false`.
    Bool,
    /// Numbers, by their digits.
    Number,
    /// Texts, by their bytes.
    Text,
    /// `char(n)`: texts, by their bytes without the blanks at their ends.
    Padded,
    /// Dates and timestamps, by their place in time.
    Instant(Instant),
    /// Times of day, by their text form.
    Time,
    /// Only whether their text form is the same.
    Equal,
}

/// A type whose values are places in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::route) enum Instant {
    /// `date`
    Date,
    /// `timestamp`
    Timestamp,
    /// `timestamptz`
    TimestampTz,
}

impl Comparable {
    /// Of a built-in type.
    pub(in crate::route) fn of_base(base: u32) -> Self {
        match base {
            oid::BOOL => Comparable::Bool,
            oid::INT2 | oid::INT4 | oid::INT8 | oid::OID => Comparable::Number,
            oid::NUMERIC | oid::FLOAT4 | oid::FLOAT8 | oid::XID | oid::XID8 => Comparable::Number,
            // As text, a UUID and the hex of bytea are in the order of their bytes.
            oid::TEXT | oid::VARCHAR | oid::CHAR | oid::NAME | oid::UUID | oid::BYTEA => {
                Comparable::Text
            }
            oid::BPCHAR => Comparable::Padded,
            oid::DATE => Comparable::Instant(Instant::Date),
            oid::TIMESTAMP => Comparable::Instant(Instant::Timestamp),
            oid::TIMESTAMPTZ => Comparable::Instant(Instant::TimestampTz),
            oid::TIME => Comparable::Time,
            _ => Comparable::Equal,
        }
    }

    /// What stands on the right of a comparison.
    pub(in crate::route) fn expected(self) -> &'static str {
        match self {
            Comparable::Bool => "true or false",
            Comparable::Number => "a number",
            Comparable::Text | Comparable::Padded | Comparable::Equal => "a text in single quotes",
            Comparable::Instant(Instant::Date) => "a date such as '2024-01-31'",
            Comparable::Instant(Instant::Timestamp) => {
                "a time such as '2024-01-31' or '2024-01-31 10:00:00'"
            }
            Comparable::Instant(Instant::TimestampTz) => {
                "a time in UTC such as '2024-01-31' or '2024-01-31 10:00:00+00'"
            }
            Comparable::Time => "a time such as '10:00:00'",
        }
    }

    /// Whether one value can be less than another.
    pub(in crate::route) fn has_order(self) -> bool {
        self != Comparable::Equal
    }
}

impl Instant {
    /// Microseconds from 1970-01-01 UTC; absent for what is not a value of the type as Postgres
    /// writes it, in ISO 8601, or a date. What has no time zone is UTC.
    pub(in crate::route) fn of(self, text: &str) -> Option<i64> {
        let usual = match self {
            Instant::Date => parse_date_us(text.as_bytes()),
            Instant::Timestamp => parse_local_us(text.as_bytes()),
            Instant::TimestampTz => parse_us(text.as_bytes()),
        };
        usual.or_else(|| self.rare(text))
    }

    /// Of a text that Postgres does not write, or seldom.
    fn rare(self, text: &str) -> Option<i64> {
        let (text, era) = match text.strip_suffix(" BC") {
            Some(text) => (text, " BC"),
            None => (text, ""),
        };
        let text = text.replacen('T', " ", 1);
        let is_date = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
        let utc = text.strip_suffix('Z').or_else(|| text.strip_suffix("+00"));
        match (self, is_date) {
            (_, true) => parse_local_us(format!("{text} 00:00:00{era}").as_bytes()),
            (Instant::Timestamp, false) => parse_local_us(format!("{text}{era}").as_bytes()),
            (Instant::TimestampTz, false) => match utc {
                Some(utc) => parse_us(format!("{utc}+00{era}").as_bytes()),
                None => parse_local_us(format!("{text}{era}").as_bytes()),
            },
            (Instant::Date, false) => {
                matches!(&*text, "infinity" | "-infinity").then(|| parse_us(text.as_bytes()))?
            }
        }
    }
}

impl ColumnType {
    /// What its values are compared with.
    pub(in crate::route) fn comparable(&self) -> Comparable {
        match Comparable::of_base(self.base) {
            // Such as `citext`.
            Comparable::Equal if self.category == OF_TEXT => Comparable::Text,
            comparable => comparable,
        }
    }

    /// Whether any text is a value of the type.
    pub(in crate::route) fn is_any_text(&self) -> bool {
        match self.base {
            oid::TEXT => true,
            oid::VARCHAR => self.modifier < 0,
            base => self.category == OF_TEXT && base >= oid::FIRST_NOT_FIXED,
        }
    }

    /// The least and the greatest value, if they are whole numbers.
    pub(in crate::route) fn whole(&self) -> Option<(&'static str, &'static str)> {
        match self.base {
            oid::INT2 => Some(("-32768", "32767")),
            oid::INT4 => Some(("-2147483648", "2147483647")),
            oid::INT8 => Some(("-9223372036854775808", "9223372036854775807")),
            oid::OID | oid::XID => Some(("0", "4294967295")),
            oid::XID8 => Some(("0", "18446744073709551615")),
            _ => None,
        }
    }

    /// Whether `text` is written as a value of the type is; more only the server knows.
    pub(in crate::route) fn takes(&self, text: &str) -> bool {
        match self.base {
            oid::NUMERIC => crate::route::filter::is_number(text),
            base => Shape::of(base).takes(text.as_bytes()),
        }
    }

    /// What the text of a default must be.
    pub(in crate::route) fn form_of_default(&self) -> JudgedForm {
        match self.base {
            // The members of an object may have another order, and numbers more digits.
            oid::JSON | oid::JSONB => JudgedForm::Any,
            base if Comparable::of_base(base) == Comparable::Number => JudgedForm::Number,
            _ => JudgedForm::Exact,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Instant::{self, Date, Timestamp, TimestampTz};

    #[test]
    fn times_are_read_as_postgres_writes_them_and_in_iso_8601() {
        let same = |one: (Instant, &str), other: (Instant, &str)| {
            assert_eq!(one.0.of(one.1), other.0.of(other.1), "{one:?} {other:?}");
            assert!(one.0.of(one.1).is_some(), "{one:?}");
        };
        same((Date, "2024-01-31"), (Timestamp, "2024-01-31 00:00:00"));
        same((TimestampTz, "2024-01-31"), (TimestampTz, "2024-01-31T00:00:00Z"));
        same((TimestampTz, "2024-01-31 10:00:00.5+00"), (Timestamp, "2024-01-31T10:00:00.500"));
        same((TimestampTz, "2024-01-31 10:00:00"), (TimestampTz, "2024-01-31T10:00:00Z"));
        same((TimestampTz, "0044-03-15 00:00:00+00 BC"), (Date, "0044-03-15 BC"));
        same((Date, "12024-01-31"), (Timestamp, "12024-01-31 00:00:00"));
        same((Date, "0044-03-15 BC"), (Timestamp, "0044-03-15 00:00:00 BC"));
        same((Date, "infinity"), (TimestampTz, "infinity"));
        assert!(Date.of("0044-03-15 BC") < Date.of("0001-01-01"));
        assert!(Timestamp.of("12024-01-01 00:00:00") > Timestamp.of("2024-01-01 00:00:00"));
        for (of, wrong) in [
            (Date, "x"),
            (Date, "2024"),
            (Date, "2024-01-31 10:00:00"),
            (Timestamp, "2024-01-31 10:00:00Z"),
            (TimestampTz, "2024-01-31 10:00:00+02"),
            (TimestampTz, "2024-01-31 10:00:00+00Z"),
            (TimestampTz, "infinity+00"),
            (Date, "2024-1-31"),
        ] {
            assert_eq!(of.of(wrong), None, "{wrong}");
        }
    }
}
