//! What a captured table looked like at a place in the stream, and how two such descriptions
//! differ. Pure.
//!
//! A route is agreed with a description. What differs from it later either takes away something
//! that the route promised its consumers, which is drift, or only adds to it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::column::oid;
use crate::event::{Column, Identity, Table};

/// A table as the stream describes it, by names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Schema and name, as they were then.
    pub schema: String,
    /// The name.
    pub table: String,
    /// The columns that are published, in order.
    pub columns: Vec<DescribedColumn>,
    /// The columns of the key, in column order; none where it is not known.
    pub key: Vec<String>,
    /// What the stream sends of an old row.
    pub identity: DescribedIdentity,
    /// Which columns these are; only the catalog tells that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numbered: Option<Numbered>,
}

/// The numbers of a table's columns, which they keep whatever they are called.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered {
    /// OID of the table: the numbers of another say nothing about this one.
    pub relation: u32,
    /// One for each column of the description.
    pub numbers: Vec<i16>,
}

/// A column of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescribedColumn {
    /// Its name.
    pub name: String,
    /// OID of its type.
    pub type_oid: u32,
    /// Length, precision and scale, packed by the type; -1 for none.
    pub type_modifier: i32,
}

/// What the stream sends of a row before its change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DescribedIdentity {
    /// Nothing.
    #[default]
    Nothing,
    /// These columns.
    Columns(Vec<String>),
    /// All columns.
    Full,
}

/// One difference between two descriptions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// It has another schema or name.
    Name {
        /// Before.
        from: String,
        /// After.
        to: String,
    },
    /// A column is new.
    New(DescribedColumn),
    /// A column is gone.
    Gone(DescribedColumn),
    /// A column has another type.
    Retyped {
        /// Before.
        from: DescribedColumn,
        /// After.
        to: DescribedColumn,
    },
    /// Other columns make the key.
    Key {
        /// Before.
        from: Vec<String>,
        /// After.
        to: Vec<String>,
    },
    /// Other columns of an old row are sent.
    Identity {
        /// Before.
        from: DescribedIdentity,
        /// After.
        to: DescribedIdentity,
    },
}

impl Description {
    /// That of a table.
    pub fn of(table: &Table) -> Self {
        let name = |index: &usize| table.columns[*index].name.clone();
        let column = |Column { name, type_oid, type_modifier, .. }: &Column| DescribedColumn {
            name: name.clone(),
            type_oid: *type_oid,
            type_modifier: *type_modifier,
        };
        Self {
            schema: table.schema.clone(),
            table: table.name.clone(),
            columns: table.columns.iter().map(column).collect(),
            key: table.key.iter().map(name).collect(),
            identity: match &table.identity {
                Identity::Nothing => DescribedIdentity::Nothing,
                Identity::Columns(columns) => {
                    DescribedIdentity::Columns(columns.iter().map(name).collect())
                }
                Identity::Full => DescribedIdentity::Full,
            },
            numbered: None,
        }
    }

    /// The column of that name.
    pub fn column(&self, name: &str) -> Option<&DescribedColumn> {
        self.columns.iter().find(|column| column.name == name)
    }

    /// The place of the column of that name.
    pub(super) fn place(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// The name of the column with that number.
    pub(super) fn with_number(&self, number: i16) -> Option<&str> {
        let numbers = &self.numbered.as_ref()?.numbers;
        let at = numbers.iter().position(|known| *known == number)?;
        self.columns.get(at).map(|column| &*column.name)
    }

    /// Whether the column of that name is a different one in `later`: it has another number,
    /// because the earlier one was dropped or renamed.
    fn is_another(&self, later: &Self, name: &str) -> bool {
        let (Some(mine), Some(theirs)) = (&self.numbered, &later.numbered) else { return false };
        let number = |of: &Self, numbers: &Numbered| numbers.numbers.get(of.place(name)?).copied();
        mine.relation == theirs.relation && number(self, mine) != number(later, theirs)
    }

    /// Whether `later` has different columns under some of the same names.
    pub(super) fn has_others(&self, later: &Self) -> bool {
        let is_both = |column: &&DescribedColumn| later.column(&column.name).is_some();
        let mut both = self.columns.iter().filter(is_both);
        both.any(|column| self.is_another(later, &column.name))
    }

    /// The changes from this one to `later`. If a name belongs to a different column, the earlier
    /// column counts as gone and the other as new, since their values are unrelated.
    pub fn differences(&self, later: &Self) -> Vec<Difference> {
        let mut found = Vec::new();
        let name = |d: &Self| format!("{}.{}", d.schema, d.table);
        if name(self) != name(later) {
            found.push(Difference::Name { from: name(self), to: name(later) });
        }
        for before in &self.columns {
            match later.column(&before.name) {
                None => found.push(Difference::Gone(before.clone())),
                Some(_) if self.is_another(later, &before.name) => {
                    found.push(Difference::Gone(before.clone()));
                }
                Some(after) if after != before => {
                    let (from, to) = (before.clone(), after.clone());
                    found.push(Difference::Retyped { from, to });
                }
                Some(_) => {}
            }
        }
        let is_new = |column: &&DescribedColumn| {
            self.column(&column.name).is_none() || self.is_another(later, &column.name)
        };
        found.extend(later.columns.iter().filter(is_new).cloned().map(Difference::New));
        if !same_names(&self.key, &later.key) {
            found.push(Difference::Key { from: self.key.clone(), to: later.key.clone() });
        }
        if !self.identity.is_like(&later.identity) {
            let (from, to) = (self.identity.clone(), later.identity.clone());
            found.push(Difference::Identity { from, to });
        }
        found
    }
}

/// The order of columns in a key says nothing to consumers.
fn same_names(one: &[String], other: &[String]) -> bool {
    one.len() == other.len() && one.iter().all(|name| other.contains(name))
}

impl DescribedIdentity {
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Columns(one), Self::Columns(other)) => same_names(one, other),
            (one, other) => one == other,
        }
    }

    /// Whether it sends all that `before` sent.
    fn covers(&self, before: &Self) -> bool {
        match (before, self) {
            (Self::Nothing, _) | (_, Self::Full) => true,
            (Self::Columns(before), Self::Columns(now)) => {
                before.iter().all(|name| now.contains(name))
            }
            (Self::Columns(_) | Self::Full, _) => false,
        }
    }
}

impl Difference {
    /// Whether consumers may miss what they had: something is gone, or is of another form.
    pub fn takes_away(&self) -> bool {
        match self {
            Difference::New(_) => false,
            Difference::Name { .. } | Difference::Gone(_) | Difference::Key { .. } => true,
            Difference::Retyped { from, to } => !to.holds_all_of(from),
            Difference::Identity { from, to } => !to.covers(from),
        }
    }

    /// The column that it is about.
    pub fn column(&self) -> Option<&str> {
        match self {
            Difference::New(column)
            | Difference::Gone(column)
            | Difference::Retyped { from: column, .. } => Some(&column.name),
            Difference::Name { .. } | Difference::Key { .. } | Difference::Identity { .. } => None,
        }
    }
}

impl DescribedColumn {
    /// Whether every value of `before` is also one of this type, and is sent in the same form.
    fn holds_all_of(&self, before: &Self) -> bool {
        let (from, to) = (before.type_oid, self.type_oid);
        let is_text = |oid| matches!(oid, oid::TEXT | oid::VARCHAR);
        let (had, has) = (before.type_modifier, self.type_modifier);
        let longer = has < 0 || (had >= 0 && has >= had);
        match (from, to) {
            (oid::INT2, oid::INT4 | oid::INT8) | (oid::INT4, oid::INT8) => true,
            (oid::FLOAT4, oid::FLOAT8) => true,
            (oid::NUMERIC, oid::NUMERIC) => holds_digits(had, has),
            (from, to) if is_text(from) && is_text(to) => longer,
            (oid::VARBIT, oid::VARBIT) => longer,
            (
                oid::TIME | oid::TIMETZ | oid::TIMESTAMP | oid::TIMESTAMPTZ,
                oid::TIME | oid::TIMETZ | oid::TIMESTAMP | oid::TIMESTAMPTZ,
            ) => from == to && digits(has) >= digits(had),
            (oid::INTERVAL, oid::INTERVAL) => holds_fields(had, has),
            // `char(n)` and `bit(n)` have a fixed length: a longer one pads its values.
            (oid::BPCHAR | oid::BIT, _) => from == to && has == had,
            (from, to) if from == to => match element(from) {
                Some(type_oid) => {
                    let of = |one: &Self| Self { type_oid, ..one.clone() };
                    of(self).holds_all_of(&of(before))
                }
                // The modifiers of other types have an unknown meaning.
                None => has < 0 || has == had,
            },
            _ => false,
        }
    }
}

/// The element type of a built-in array type whose modifiers are compared.
fn element(type_oid: u32) -> Option<u32> {
    oid::precise_element_of(type_oid).filter(|element| *element != 0)
}

/// Fractional digits of a second; six without a modifier.
fn digits(modifier: i32) -> i32 {
    if modifier < 0 { 6 } else { modifier }
}

/// Whether an interval with the second modifier has all fields and digits of one with the first
/// (timestamp.h, `INTERVAL_TYPMOD`).
fn holds_fields(had: i32, has: i32) -> bool {
    const ALL: i32 = 0x7fff;
    let parts = |modifier: i32| match (modifier >> 16, modifier & 0xffff) {
        _ if modifier < 0 => (ALL, 6),
        (fields, digits) => (fields & ALL, digits.min(6)),
    };
    let ((had_fields, had_digits), (has_fields, has_digits)) = (parts(had), parts(has));
    (has_fields == ALL || has_fields == had_fields) && has_digits >= had_digits
}

/// Whether a numeric column with the second modifier holds all values of one with the first. A
/// modifier is 4 more than precision and scale in 16 bits each (numeric.c, `make_numeric_typmod`).
fn holds_digits(had: i32, has: i32) -> bool {
    const HEADER: i32 = 4;
    let parts = |modifier: i32| ((modifier - HEADER) >> 16, (modifier - HEADER) & 0x7ff);
    match (had < HEADER, has < HEADER) {
        (_, true) => true,
        (true, false) => false,
        (false, false) => {
            let ((had, had_scale), (has, has_scale)) = (parts(had), parts(has));
            // Another scale is another text of the same value.
            has_scale == had_scale && has >= had
        }
    }
}

impl fmt::Display for DescribedColumn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.type_oid {
            oid::BOOL => "boolean",
            oid::BYTEA => "bytea",
            oid::INT8 => "bigint",
            oid::INT2 => "smallint",
            oid::INT4 => "integer",
            oid::TEXT => "text",
            oid::JSON => "json",
            oid::FLOAT4 => "real",
            oid::FLOAT8 => "double precision",
            oid::BPCHAR => "char",
            oid::VARCHAR => "varchar",
            oid::DATE => "date",
            oid::TIME => "time",
            oid::TIMESTAMP => "timestamp",
            oid::TIMESTAMPTZ => "timestamptz",
            oid::INTERVAL => "interval",
            oid::TIMETZ => "timetz",
            oid::NUMERIC => "numeric",
            oid::UUID => "uuid",
            oid::JSONB => "jsonb",
            other => match element(other) {
                Some(type_oid) => return write!(f, "{}[]", Self { type_oid, ..self.clone() }),
                None => return write!(f, "type {other}"),
            },
        };
        f.write_str(name)?;
        match (self.type_oid, self.type_modifier - 4) {
            (_, modifier) if modifier < 0 => Ok(()),
            (oid::VARCHAR | oid::BPCHAR, length) => write!(f, "({length})"),
            (oid::NUMERIC, packed) => write!(f, "({},{})", packed >> 16, packed & 0x7ff),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for DescribedIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DescribedIdentity::Nothing => f.write_str("nothing"),
            DescribedIdentity::Columns(names) => f.write_str(&listed(names)),
            DescribedIdentity::Full => f.write_str("all columns"),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Name { from, to } => write!(f, "{from} is {to} now"),
            Difference::New(column) => write!(f, "column {:?} ({column}) is new", column.name),
            Difference::Gone(column) => write!(f, "column {:?} ({column}) is gone", column.name),
            Difference::Retyped { from, to } => {
                write!(f, "column {:?} was {from} and is {to}", from.name)
            }
            Difference::Key { from, to } => {
                write!(f, "the key was {} and is {}", listed(from), listed(to))
            }
            Difference::Identity { from, to } => {
                write!(f, "the replica identity was {from} and is {to}")
            }
        }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "unknown".to_owned() } else { format!("({})", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, type_oid: u32, type_modifier: i32) -> DescribedColumn {
        DescribedColumn { name: name.into(), type_oid, type_modifier }
    }

    fn description(columns: &[(&str, u32, i32)]) -> Description {
        Description {
            schema: "public".into(),
            table: "t".into(),
            columns: columns
                .iter()
                .map(|(name, oid, modifier)| column(name, *oid, *modifier))
                .collect(),
            key: vec!["id".into()],
            identity: DescribedIdentity::Columns(vec!["id".into()]),
            numbered: None,
        }
    }

    #[test]
    fn a_type_that_holds_every_value_in_the_same_form_takes_nothing_away() {
        let numeric = |precision: i32, scale: i32| (precision << 16 | scale) + 4;
        let interval = |fields: i32, digits: i32| fields << 16 | digits;
        for (from, to, fits) in [
            ((oid::INT2, -1), (oid::INT8, -1), true),
            ((oid::INT8, -1), (oid::INT4, -1), false),
            ((oid::INT4, -1), (oid::TEXT, -1), false),
            ((oid::VARCHAR, 14), (oid::VARCHAR, 24), true),
            ((oid::VARCHAR, 24), (oid::VARCHAR, 14), false),
            ((oid::VARCHAR, 24), (oid::TEXT, -1), true),
            ((oid::TEXT, -1), (oid::VARCHAR, 24), false),
            ((oid::NUMERIC, numeric(10, 2)), (oid::NUMERIC, numeric(12, 2)), true),
            ((oid::NUMERIC, numeric(10, 2)), (oid::NUMERIC, numeric(12, 4)), false),
            ((oid::NUMERIC, numeric(10, 2)), (oid::NUMERIC, -1), true),
            ((oid::NUMERIC, -1), (oid::NUMERIC, numeric(10, 2)), false),
            ((oid::TIMESTAMP, -1), (oid::TIMESTAMPTZ, -1), false),
            ((oid::FLOAT4, -1), (oid::FLOAT8, -1), true),
            ((16_999, -1), (17_000, -1), false),
            // `geometry(Point)`: another number is another thing.
            ((16_999, 4), (16_999, 8), false),
            ((16_999, 4), (16_999, -1), true),
            ((16_999, -1), (16_999, 4), false),
            // A longer one is filled up with spaces, or with zeros.
            ((oid::BPCHAR, 14), (oid::BPCHAR, 24), false),
            ((oid::BPCHAR, 14), (oid::BPCHAR, -1), false),
            ((oid::BPCHAR, 14), (oid::TEXT, -1), false),
            ((oid::BPCHAR, 14), (oid::VARCHAR, 24), false),
            ((oid::BIT, 8), (oid::BIT, 16), false),
            ((oid::BIT, 8), (oid::VARBIT, 16), false),
            ((oid::VARBIT, 8), (oid::VARBIT, 16), true),
            ((oid::VARBIT, 8), (oid::VARBIT, -1), true),
            ((oid::VARBIT, 16), (oid::VARBIT, 8), false),
            ((oid::TIMESTAMP, 3), (oid::TIMESTAMP, 6), true),
            ((oid::TIMESTAMP, 3), (oid::TIMESTAMP, -1), true),
            ((oid::TIMESTAMP, -1), (oid::TIMESTAMP, 6), true),
            ((oid::TIMESTAMP, -1), (oid::TIMESTAMP, 3), false),
            ((oid::TIMESTAMPTZ, 3), (oid::TIMESTAMPTZ, 6), true),
            ((oid::TIME, 0), (oid::TIME, 3), true),
            ((oid::TIME, 3), (oid::TIME, 0), false),
            ((oid::TIMETZ, 6), (oid::TIMETZ, 0), false),
            ((oid::TIME, 6), (oid::TIMETZ, 6), false),
            ((oid::INTERVAL, interval(0x7fff, 3)), (oid::INTERVAL, -1), true),
            ((oid::INTERVAL, interval(0x7fff, 3)), (oid::INTERVAL, interval(0x7fff, 6)), true),
            ((oid::INTERVAL, -1), (oid::INTERVAL, interval(0x7fff, 6)), true),
            ((oid::INTERVAL, -1), (oid::INTERVAL, interval(0x7fff, 3)), false),
            ((oid::INTERVAL, interval(0x4, 0xffff)), (oid::INTERVAL, -1), true),
            ((oid::INTERVAL, -1), (oid::INTERVAL, interval(0x4, 0xffff)), false),
            ((oid::INTERVAL, interval(0x4, 0xffff)), (oid::INTERVAL, interval(0x8, 6)), false),
            // Arrays as their elements.
            ((1015, 14), (1015, 24), true),
            ((1014, 14), (1014, 24), false),
            ((1231, numeric(10, 2)), (1231, numeric(12, 4)), false),
            ((1561, 8), (1561, 16), false),
            ((1115, 3), (1115, 6), true),
        ] {
            let (before, after) = (column("c", from.0, from.1), column("c", to.0, to.1));
            let difference = Difference::Retyped { from: before, to: after };
            assert_eq!(!difference.takes_away(), fits, "{difference}");
        }
    }

    #[test]
    fn differences_are_told_with_old_and_new() {
        let before = description(&[("id", oid::INT4, -1), ("mail", oid::VARCHAR, 24)]);
        let mut after = description(&[
            ("id", oid::INT8, -1),
            ("note", oid::TEXT, -1),
            ("total", oid::NUMERIC, (10 << 16 | 2) + 4),
        ]);
        after.table = "u".into();
        after.key = vec!["id".into(), "note".into()];
        after.identity = DescribedIdentity::Nothing;
        let told: Vec<String> =
            before.differences(&after).iter().map(ToString::to_string).collect();
        let expected = [
            "public.t is public.u now",
            "column \"id\" was integer and is bigint",
            "column \"mail\" (varchar(20)) is gone",
            "column \"note\" (text) is new",
            "column \"total\" (numeric(10,2)) is new",
            "the key was (id) and is (id, note)",
            "the replica identity was (id) and is nothing",
        ];
        assert_eq!(told, expected);
        assert_eq!(before.differences(&before), []);
        let array = column("c", 1231, (10 << 16 | 2) + 4);
        assert_eq!(array.to_string(), "numeric(10,2)[]");
    }

    #[test]
    fn an_identity_that_sends_more_takes_nothing_away() {
        let columns = |names: &[&str]| {
            DescribedIdentity::Columns(names.iter().map(|name| (*name).to_owned()).collect())
        };
        use DescribedIdentity::{Full, Nothing};
        for (from, to, fits) in [
            (columns(&["a"]), Full, true),
            (Full, columns(&["a"]), false),
            (columns(&["a"]), columns(&["b", "a"]), true),
            (columns(&["a"]), columns(&["b"]), false),
            (columns(&["a"]), Nothing, false),
            (Nothing, columns(&["a"]), true),
        ] {
            let difference = Difference::Identity { from, to };
            assert_eq!(!difference.takes_away(), fits, "{difference}");
        }
    }
}
