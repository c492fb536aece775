//! What a route does with the columns of a captured table, as the configuration says it: which are
//! left out, masked or hashed, and what is done when the table changes. Pure.
//!
//! Invariant: rules name columns and nothing else; what they mean for a table is decided once for
//! each description of it, in `route/columns`. A route without rules has none of this.

pub mod column_type;

use xxhash_rust::xxh64::Xxh64;

use self::column_type::{ColumnTypes, Judged};
use super::filter::Filter;
use crate::error::{Error, Result};
use crate::event::hidden::Hide;
use crate::secret::Secret;

/// A value from the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constant {
    /// A JSON string.
    Text(String),
    /// A JSON number.
    Int(i64),
    /// `true` or `false`.
    Bool(bool),
}

impl Constant {
    /// As Postgres would write it.
    pub(super) fn text(&self) -> String {
        match self {
            Constant::Text(text) => text.clone(),
            Constant::Int(number) => number.to_string(),
            Constant::Bool(true) => "t".to_owned(),
            Constant::Bool(false) => "f".to_owned(),
        }
    }
}

/// `columns = { … }`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ColumnRules {
    /// Only these are sent; empty means all.
    pub include: Vec<String>,
    /// These are not sent.
    pub exclude: Vec<String>,
    /// A constant is sent instead of these.
    pub mask: Vec<(String, Constant)>,
    /// A keyed hash is sent instead of these.
    pub hash: Vec<String>,
    /// Key of the hashes; absent: one that is derived from the secret of the database.
    pub salt: Option<Secret>,
}

/// `map = { … }`, by the names that the columns have in the table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    /// Column, and the name under which it is sent.
    pub rename: Vec<(String, String)>,
    /// Columns that are not sent.
    pub drop: Vec<String>,
    /// Fields that are added to each row.
    pub set: Vec<(String, Constant)>,
    /// Column, and what is sent where it is null.
    pub default: Vec<(String, Constant)>,
}

/// What a route does with the columns of its table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteRules {
    /// Which are hidden.
    pub columns: ColumnRules,
    /// How the others are sent.
    pub map: Map,
    /// Which events are sent; absent: all.
    pub filter: Option<Filter>,
    /// What happens when the table no longer has what the route promised.
    pub on_drift: OnDrift,
}

/// What happens to the changes of a table that no longer has what a route promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDrift {
    /// They are published as they are.
    #[default]
    Pass,
    /// They are parked until somebody agrees to the table as it is now, and retries them.
    Park,
    /// The relay stops with a verdict.
    Stop,
}

impl ColumnRules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.include.is_empty() && !self.hides_some()
    }

    /// Whether only columns are sent that somebody agreed to: what is left out, masked or hashed is
    /// named, so one that comes later, or under another name, may need that, too.
    pub fn is_closed(&self) -> bool {
        self.hides_some()
    }

    fn hides_some(&self) -> bool {
        !(self.exclude.is_empty() && self.mask.is_empty() && self.hash.is_empty())
    }

    /// How the rules hide the column `name`.
    pub fn hide(&self, name: &str) -> Option<Hide> {
        let is_it = |listed: &String| listed == name;
        let left_out = !self.include.is_empty() && !self.include.iter().any(is_it);
        if left_out || self.exclude.iter().any(is_it) {
            Some(Hide::Exclude)
        } else if self.mask(name).is_some() {
            Some(Hide::Mask)
        } else {
            self.hash.iter().any(is_it).then_some(Hide::Hash)
        }
    }

    /// What is sent instead of the column `name`.
    pub fn mask(&self, name: &str) -> Option<&Constant> {
        self.mask.iter().find(|(listed, _)| listed == name).map(|(_, constant)| constant)
    }

    /// The columns that are named, each with the key that names it.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let include = self.include.iter().map(|name| ("columns.include", name.as_str()));
        let exclude = self.exclude.iter().map(|name| ("columns.exclude", name.as_str()));
        let mask = self.mask.iter().map(|(name, _)| ("columns.mask", name.as_str()));
        let hash = self.hash.iter().map(|name| ("columns.hash", name.as_str()));
        include.chain(exclude).chain(mask).chain(hash)
    }

    /// # Errors
    /// [`crate::error::Kind::Config`] when two of them contradict each other.
    fn verify(&self) -> Result<()> {
        if !self.include.is_empty() && !self.exclude.is_empty() {
            return Err(Error::config("columns has include and exclude")
                .hint("include names all that is sent; remove exclude"));
        }
        let named: Vec<(&str, &str)> = self.named().collect();
        for (index, (key, name)) in named.iter().enumerate() {
            let twice = named[..index].iter().find(|(other, listed)| {
                // What is included may be masked or hashed.
                listed == name && (*other == *key || *other != "columns.include")
            });
            if let Some((other, _)) = twice {
                let text = format!("column {name:?} is in {other} and in {key}; name it once");
                return Err(Error::config(text));
            }
        }
        let hidden = self.mask.iter().map(|(name, _)| name).chain(&self.hash);
        let lost = |name: &&String| !self.include.is_empty() && !self.include.contains(name);
        if let Some(name) = hidden.into_iter().find(lost) {
            let text = format!("column {name:?} is masked or hashed, but columns.include lacks it");
            return Err(Error::config(text).hint("add it to include, or remove the mask or hash"));
        }
        if self.salt.is_some() && self.hash.is_empty() {
            return Err(Error::config("columns.salt is set, but columns.hash is empty"));
        }
        Ok(())
    }
}

impl Map {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The name under which the column is sent.
    pub fn name<'a>(&'a self, column: &'a str) -> &'a str {
        self.rename.iter().find(|(from, _)| from == column).map_or(column, |(_, to)| to)
    }

    /// What is sent where the column is null.
    pub fn if_null(&self, column: &str) -> Option<&Constant> {
        self.default.iter().find(|(name, _)| name == column).map(|(_, constant)| constant)
    }

    /// The columns that are named, each with the key that names it.
    fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let rename = self.rename.iter().map(|(name, _)| ("map.rename", name.as_str()));
        let drop = self.drop.iter().map(|name| ("map.drop", name.as_str()));
        let default = self.default.iter().map(|(name, _)| ("map.default", name.as_str()));
        rename.chain(drop).chain(default)
    }

    /// The names of fields that it makes.
    pub fn makes(&self) -> impl Iterator<Item = &str> {
        let renamed = self.rename.iter().map(|(_, to)| to.as_str());
        renamed.chain(self.set.iter().map(|(name, _)| name.as_str()))
    }

    /// # Errors
    /// [`crate::error::Kind::Config`] when two of its parts contradict each other, or `columns`.
    fn verify(&self, columns: &ColumnRules) -> Result<()> {
        let made: Vec<&str> = self.makes().collect();
        if let Some(at) = (0..made.len()).find(|at| made[..*at].contains(&made[*at])) {
            return Err(Error::config(format!("map makes the field {:?} twice", made[at])));
        }
        if made.contains(&"") {
            return Err(Error::config("map makes a field without a name"));
        }
        for (key, name) in self.named() {
            if key != "map.drop" && self.drop.iter().any(|dropped| dropped == name) {
                return Err(Error::config(format!("column {name:?} is in map.drop and in {key}")));
            }
            match columns.hide(name) {
                Some(Hide::Exclude) => {
                    let text = format!("{key} names column {name:?}, which columns leaves out");
                    return Err(Error::config(text));
                }
                Some(Hide::Mask | Hide::Hash) if key == "map.default" => {
                    let text = format!("map.default names column {name:?}, which is hidden");
                    return Err(Error::config(text));
                }
                Some(Hide::Mask | Hide::Hash) | None => {}
            }
        }
        Ok(())
    }
}

impl RouteRules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.filter.is_none() && self.is_only_filter()
    }

    /// Whether there is at most a filter.
    pub(super) fn is_only_filter(&self) -> bool {
        self.columns.is_empty() && self.map.is_empty() && self.on_drift == OnDrift::Pass
    }

    /// The columns that are named, each with the key that names it.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let filter = self.filter.iter().flat_map(Filter::columns);
        let filter = filter.map(|name| ("filter", name));
        self.columns.named().chain(self.map.named()).chain(filter)
    }

    /// The version of what messages are made by: a hash of the rules. It says nothing about a salt.
    pub fn version(&self) -> Option<String> {
        if self.columns.is_empty() && self.map.is_empty() {
            return None;
        }
        let mut hasher = Xxh64::new(0);
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for (key, name) in self.columns.named().chain(self.map.named()) {
            add(key);
            add(name);
        }
        let Map { rename, drop: _, set, default } = &self.map;
        rename.iter().for_each(|(_, to)| add(to));
        let masks = self.columns.mask.iter();
        for (name, constant) in masks.chain(set).chain(default) {
            add(name);
            add(&format!("{constant:?}"));
        }
        Some(format!("{:016x}", hasher.digest()))
    }

    /// Refuses constants that columns of these types cannot have, and comparisons.
    ///
    /// # Errors
    /// [`crate::error::Kind::Refused`] naming the column.
    pub fn verify_types(&self, types: &ColumnTypes) -> Result<()> {
        if let Some(filter) = &self.filter {
            filter.verify_types(types)?;
        }
        for (name, constant) in &self.map.default {
            let Some(of) = types.get(name) else { continue };
            let text = constant.text();
            if !of.takes(&text) {
                let text = format!("map.default of column {name:?} ({}) is {text:?}", of.name);
                return Err(Error::refused(text).hint("use a value of the column's type"));
            }
        }
        Ok(())
    }

    /// The constants that the server can judge.
    pub fn judged<'a>(&'a self, types: &ColumnTypes) -> Vec<Judged<'a>> {
        let default = |(name, constant): &'a (String, Constant)| {
            Some(Judged {
                what: format!("map.default of column {name:?}"),
                column: name,
                text: constant.text().into(),
                form: types.get(name)?.form_of_default(),
                may_be_no_value: false,
            })
        };
        let filter = self.filter.iter().flat_map(|filter| filter.judged(types));
        self.map.default.iter().filter_map(default).chain(filter).collect()
    }

    /// `key`: the columns that the route names as its key.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] naming the rule that cannot be followed.
    pub(super) fn verify(&self, key: &[String]) -> Result<()> {
        self.columns.verify()?;
        self.map.verify(&self.columns)?;
        if let Some(filter) = &self.filter {
            filter.verify_table(false)?;
        }
        let left_out = |name: &&String| {
            self.columns.hide(name) == Some(Hide::Exclude) || self.map.drop.contains(name)
        };
        match key.iter().find(left_out) {
            None => Ok(()),
            Some(name) => Err(Error::config(format!("key column {name:?} is not sent"))
                .hint("a key can be hashed or masked, but not left out")),
        }
    }
}
