//! One section of the file while it is read. A key is asked for once, with its default and what is
//! allowed, right where its value goes; that line is all the code knows about the key.
//!
//! Invariant: a key that nobody asked for is an error. A [`Section`] looks for them when it is
//! dropped, and borrows the [`Document`], so that the document cannot be finished before.
//!
//! An empty string or list means "not set". A wrong value is reported and replaced by the
//! default, so that reading continues and finds the other problems.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::load::{self, Filled, Lookup, Notation};
use super::problems::{Problem, Problems, Span, is_plain_key, nearest};
use crate::error::{Error, Result};

/// Shorter values, in bytes, are no secrets, and would be found in ordinary words: in the problem
/// with the value itself, and in other problems.
const HIDDEN_MIN: usize = 4;
const HIDDEN_MIN_ELSEWHERE: usize = 8;

/// The file while it is read.
pub(super) struct Document<'f> {
    lookup: Lookup<'f>,
    /// Where relative paths begin: the directory of the file.
    directory: PathBuf,
    /// Strings with values from elsewhere, which may be secrets in the wrong place.
    filled: RefCell<Vec<(Span, Filled)>>,
    problems: RefCell<Problems>,
    holds_password: Cell<bool>,
}

impl<'f> Document<'f> {
    /// `file` is where it was read from.
    pub(super) fn new(file: &str, lookup: Lookup<'f>) -> Self {
        Self {
            lookup,
            directory: Path::new(file).parent().unwrap_or(Path::new("")).to_owned(),
            filled: RefCell::default(),
            problems: RefCell::default(),
            holds_password: Cell::new(false),
        }
    }

    /// The table of the keys that are in no other.
    pub(super) fn root(&'f self, found: &'f Spanned<DeTable<'f>>) -> Section<'f> {
        Section::new(self, String::new(), Some(found.get_ref()), None)
    }

    /// Whether a password was read that stands in the file itself.
    pub(super) fn holds_password(&self) -> bool {
        self.holds_password.get()
    }

    /// `what`, a problem with what stands at `at`, with placeholders instead of their values.
    fn without_filled(&self, at: Option<&Span>, mut what: String) -> String {
        for (span, template) in self.filled.borrow().iter() {
            let here = at.is_some_and(|at| at.start <= span.start && span.end <= at.end);
            let shortest = if here { HIDDEN_MIN } else { HIDDEN_MIN_ELSEWHERE };
            for (value, shown) in template.hidden() {
                if value.len() >= shortest {
                    what = what.replace(&value, &shown);
                }
            }
        }
        what
    }

    /// # Errors
    /// [`crate::error::Kind::Config`] with everything that is wrong.
    pub(super) fn finish(self, file: &str, text: &str) -> Result<()> {
        self.problems.into_inner().into_result(file, text)
    }
}

/// TOML that cannot be read at all; the parser stops at the first mistake.
pub(super) fn syntax_error(file: &str, text: &str, error: &toml::de::Error) -> Error {
    let what = error.message().lines().next().unwrap_or_default().to_owned();
    let at = Some(error.span().unwrap_or(0..0));
    Problem { at, what, hint: None, excerpt: false }.to_error(file, text)
}

/// One table; an absent one has every key at its default.
pub(super) struct Section<'f> {
    document: &'f Document<'f>,
    /// Stands before a key in a problem: `relay.`, `route "orders": `.
    prefix: String,
    found: Option<&'f DeTable<'f>>,
    /// Where it stands, for problems with keys that it lacks.
    at: Option<Span>,
    /// The keys that were asked for.
    known: Vec<&'f str>,
}

/// A value of a table whose keys are free.
pub(super) enum Scalar {
    Text(String),
    Int(i64),
    Bool(bool),
}

/// An item of a list that has texts, tables, or both.
pub(super) enum Entry<'f> {
    Text(String),
    Table(Section<'f>),
}

impl<'f> Section<'f> {
    fn new(
        document: &'f Document<'f>,
        prefix: String,
        found: Option<&'f DeTable<'f>>,
        at: Option<Span>,
    ) -> Self {
        Self { document, prefix, found, at, known: Vec::new() }
    }

    /// The table below `key`; `example` shows how it is written.
    pub(super) fn table(&mut self, key: &'static str, example: &str) -> Section<'f> {
        let prefix = format!("{}.", self.path(key));
        let mut found = (None, self.at.clone());
        if let Some(value) = self.ask(key) {
            match value.get_ref() {
                DeValue::Table(table) => found = (Some(table), Some(value.span())),
                _ => self.wrong_type(key, value, &format!("a table, {example}")),
            }
        }
        Section::new(self.document, prefix, found.0, found.1)
    }

    /// The table `[key]`.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'f> {
        self.table(key, &format!("written [{key}], once, with its keys below it"))
    }

    /// The tables of the list `[[key]]`.
    pub(super) fn tables(&mut self, key: &'static str) -> Vec<Section<'f>> {
        let Some(value) = self.ask(key) else { return Vec::new() };
        let expected = format!("a list of tables: write [[{key}]] for each");
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_type(key, value, &expected);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = self.path(&format!("{key}[{index}]"));
            match item.get_ref() {
                DeValue::Table(table) => {
                    let prefix = format!("{path}.");
                    tables.push(Section::new(
                        self.document,
                        prefix,
                        Some(table),
                        Some(item.span()),
                    ));
                }
                _ => self.wrong_type(&format!("{key}[{index}]"), item, &expected),
            }
        }
        tables
    }

    /// Problems call this table `name` from now on.
    pub(super) fn call_it(&mut self, name: &str) {
        self.prefix = format!("{name}: ");
    }

    /// Whatever else the table has is not a mistake here.
    pub(super) fn ignore_rest(&mut self) {
        self.known.extend(self.keys());
    }

    /// What the file has in it, for tables whose keys are free.
    pub(super) fn keys(&self) -> Vec<&'f str> {
        self.found.into_iter().flat_map(|table| table.keys()).map(|key| &**key.get_ref()).collect()
    }

    /// The number of keys that were asked for so far.
    pub(super) fn asked(&self) -> usize {
        self.known.len()
    }

    /// The keys that the file has, among those asked for since [`Section::asked`] was `from`.
    pub(super) fn given_since(&self, from: usize) -> Vec<&'f str> {
        self.known[from..].iter().copied().filter(|key| self.value(key).is_some()).collect()
    }

    /// Any text; without the key it is `default`.
    pub(super) fn text(&mut self, key: &'static str, default: &str) -> String {
        self.string(key, "a string").unwrap_or_else(|| default.to_owned())
    }

    /// A file; a relative path begins at the directory of this one.
    pub(super) fn file(&mut self, key: &'static str) -> Option<PathBuf> {
        let path = Some(self.text(key, "")).filter(|path| !path.is_empty());
        path.map(|path| self.directory().join(path))
    }

    /// Where relative paths begin.
    pub(super) fn directory(&self) -> &'f Path {
        &self.document.directory
    }

    /// Text that must be there; `None` when it is not, which is a problem then.
    pub(super) fn required_url(&mut self, key: &'static str, example: &str) -> Option<Filled> {
        let urls = self.urls(key, example)?;
        if urls.len() > 1 {
            self.problem(key, format!("{} is a list; one URL is allowed", self.path(key)));
        }
        urls.into_iter().next()
    }

    /// One URL or a list of them; `None` when there is a problem with one, or none at all.
    pub(super) fn urls(&mut self, key: &'static str, example: &str) -> Option<Vec<Filled>> {
        const EXPECTED: &str = "a string or a list of strings";
        let filled: Option<Vec<_>> = match self.ask(key) {
            None => Some(Vec::new()),
            Some(value) => match value.get_ref() {
                DeValue::Array(items) => {
                    let fill = |item| self.fill(key, item, EXPECTED, Notation::Url);
                    items.iter().map(fill).collect::<Vec<_>>().into_iter().collect()
                }
                _ => self.fill(key, value, EXPECTED, Notation::Url).map(|url| vec![url]),
            },
        };
        let given = filled?.into_iter().filter(|(_, text)| !text.is_empty());
        let urls: Vec<Filled> = given.map(|(url, _)| url).collect();
        if urls.is_empty() {
            self.problem(key, format!("{} is not set; expected {example}", self.path(key)));
            return None;
        }
        Some(urls)
    }

    /// A URL that need not be there.
    pub(super) fn url(&mut self, key: &'static str) -> Option<Filled> {
        self.secret(key, Notation::Url)
    }

    /// A password that need not be there.
    pub(super) fn password(&mut self, key: &'static str) -> Option<Filled> {
        let written = self.value(key).and_then(|value| value.get_ref().as_str());
        if written.is_some_and(load::is_literal) {
            self.document.holds_password.set(true);
        }
        self.secret(key, Notation::Plain)
    }

    fn secret(&mut self, key: &'static str, notation: Notation) -> Option<Filled> {
        let value = self.ask(key)?;
        let filled = self.fill(key, value, "a string", notation)?;
        Some(filled).filter(|(_, text)| !text.is_empty()).map(|(template, _)| template)
    }

    /// A list of texts.
    pub(super) fn list(&mut self, key: &'static str) -> Vec<String> {
        let Some(value) = self.ask(key) else { return Vec::new() };
        self.strings(key, value).unwrap_or_default()
    }

    /// A list of texts and tables; `expected` shows how an item is written.
    pub(super) fn entries(&mut self, key: &'static str, expected: &str) -> Vec<Entry<'f>> {
        let Some(value) = self.ask(key) else { return Vec::new() };
        let Some(items) = value.get_ref().as_array() else {
            self.wrong_type(key, value, &format!("a list of {expected}"));
            return Vec::new();
        };
        let mut entries = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = format!("{key}[{index}]");
            if let DeValue::Table(table) = item.get_ref() {
                let prefix = format!("{}.", self.path(&path));
                let section = Section::new(self.document, prefix, Some(table), Some(item.span()));
                entries.push(Entry::Table(section));
            } else if let Some((_, text)) = self.fill(&path, item, expected, Notation::Plain) {
                entries.push(Entry::Text(text));
            }
        }
        entries
    }

    /// A table whose keys are free, with a scalar for each.
    pub(super) fn scalars(&mut self, key: &'static str, example: &str) -> Vec<(String, Scalar)> {
        let mut table = self.table(key, example);
        let keys = table.keys();
        let scalar = |key: &'f str| Some((key.to_owned(), table.scalar(key)?));
        keys.into_iter().filter_map(scalar).collect()
    }

    /// The same, or a list of keys; `None` stands for the scalar that is not given.
    pub(super) fn names_or_scalars(
        &mut self,
        key: &'static str,
        example: &str,
    ) -> Vec<(String, Option<Scalar>)> {
        if self.value(key).is_some_and(|value| value.get_ref().as_array().is_some()) {
            return self.list(key).into_iter().map(|name| (name, None)).collect();
        }
        let scalars = self.scalars(key, example).into_iter();
        scalars.map(|(name, scalar)| (name, Some(scalar))).collect()
    }

    /// A text, a whole number, true or false; `None` when there is a problem with it.
    pub(super) fn scalar(&mut self, key: &'f str) -> Option<Scalar> {
        let value = self.ask(key)?;
        let expected = "a string, a whole number, true or false";
        match value.get_ref() {
            DeValue::String(_) => {
                self.fill(key, value, expected, Notation::Plain).map(|(_, text)| Scalar::Text(text))
            }
            DeValue::Boolean(yes) => Some(Scalar::Bool(*yes)),
            DeValue::Integer(number) => {
                let parsed = i64::from_str_radix(number.as_str(), number.radix()).ok();
                if parsed.is_none() {
                    self.invalid(key, number, format!("{} to {}", i64::MIN, i64::MAX));
                }
                parsed.map(Scalar::Int)
            }
            DeValue::Float(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => {
                self.wrong_type(key, value, expected);
                None
            }
        }
    }

    /// The value of `key` is not what it may be.
    pub(super) fn invalid(&self, key: &str, value: impl Display, expected: impl Display) {
        let path = self.path(key);
        self.problem(key, format!("{path} = {value} is invalid; expected {expected}"));
    }

    /// A problem with `key`, in words that name it.
    pub(super) fn problem(&self, key: &str, what: impl Into<String>) {
        self.report(self.place(key), what.into(), None, false);
    }

    /// A problem with `key` in the words of `error`, with its hint.
    pub(super) fn error(&self, key: &str, error: &Error) {
        let what = format!("{}: {error}", self.path(key));
        self.report(self.place(key), what, error.hint_text().map(str::to_owned), false);
    }

    /// The key with the table before it.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn place(&self, key: &str) -> Option<Span> {
        self.value(key).map(Spanned::span).or_else(|| self.at.clone())
    }

    fn value(&self, key: &str) -> Option<&'f Spanned<DeValue<'f>>> {
        self.found.and_then(|table| table.get(key))
    }

    pub(super) fn ask(&mut self, key: &'f str) -> Option<&'f Spanned<DeValue<'f>>> {
        self.known.push(key);
        self.value(key)
    }

    pub(super) fn string(&mut self, key: &'static str, expected: &str) -> Option<String> {
        let value = self.ask(key)?;
        self.fill(key, value, expected, Notation::Plain).map(|(_, text)| text)
    }

    fn strings(&self, key: &str, value: &'f Spanned<DeValue<'f>>) -> Option<Vec<String>> {
        const EXPECTED: &str = "a list of strings, such as [\"…\"]";
        let Some(items) = value.get_ref().as_array() else {
            self.wrong_type(key, value, EXPECTED);
            return None;
        };
        let fill = |(n, item)| {
            let filled = self.fill(&format!("{key}[{n}]"), item, EXPECTED, Notation::Plain);
            filled.map(|(_, text)| text)
        };
        items.iter().enumerate().map(fill).collect::<Vec<_>>().into_iter().collect()
    }

    /// A string with its variables filled in, and its text.
    fn fill(
        &self,
        key: &str,
        value: &Spanned<DeValue<'f>>,
        expected: &str,
        notation: Notation,
    ) -> Option<(Filled, String)> {
        let Some(text) = value.get_ref().as_str() else {
            self.wrong_type(key, value, expected);
            return None;
        };
        if load::has_literal_password(text) {
            self.document.holds_password.set(true);
        }
        let Document { lookup, directory, .. } = self.document;
        let filled = Filled::parse(text, notation, lookup, directory)
            .and_then(|template| template.text().map(|text| (template, text)));
        match filled {
            Ok((template, text)) => {
                self.document.filled.borrow_mut().push((value.span(), template.clone()));
                Some((template, text))
            }
            Err(error) => {
                let what = format!("{}: {error}", self.path(key));
                let hint = error.hint_text().map(str::to_owned);
                self.report(Some(value.span()), what, hint, false);
                None
            }
        }
    }

    /// The value is not shown: it may be a password in the wrong place.
    pub(super) fn wrong_type(&self, key: &str, value: &Spanned<DeValue<'f>>, expected: &str) {
        let found = match value.get_ref() {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "an integer",
            DeValue::Float(_) => "a float",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        let what = format!("{} is {found}; expected {expected}", self.path(key));
        self.report(Some(value.span()), what, None, false);
    }

    fn report(&self, at: Option<Span>, what: String, hint: Option<String>, excerpt: bool) {
        let what = self.document.without_filled(at.as_ref(), what);
        self.document.problems.borrow_mut().add(Problem { at, what, hint, excerpt });
    }
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        let Some(found) = self.found else { return };
        for key in found.keys() {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let hint = match nearest(name, &self.known) {
                Some(known) => format!("did you mean {known:?}?"),
                None => format!("known keys here: {}", self.known.join(", ")),
            };
            // A URL may stand where its key was forgotten.
            let shown = if is_plain_key(name) { name } else { "***" };
            let what = format!("unknown key {shown:?}");
            self.report(Some(key.span()), what, Some(hint), true);
        }
    }
}
