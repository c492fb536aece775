//! Data contracts: what the body of a message promises, as JSON Schema. Pure.
//!
//! Invariant: a schema is compiled once, at the start, and stands alone: nothing is fetched while
//! it is compiled or used. What a check costs is bounded: by the size of the document, by the depth
//! that the JSON parser takes, and by patterns that are matched in linear time.
//!
//! No value of a document is ever part of an error, only its place and the keyword of the schema.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use jsonschema::error::ValidationErrorKind;
use jsonschema::{PatternOptions, ValidationError, Validator};
use serde_json::Value;

use crate::error::{Error, Result};

/// Most bytes of a document that is checked. As values in memory it is about ten times as large.
pub const CHECKED_MAX: usize = 4 << 20;
/// Most bytes of a schema.
pub const SCHEMA_MAX: usize = 1 << 20;
/// Most bytes of a place in a document that are shown: names of members can be anybody's data.
const PLACE_MAX: usize = 200;

/// A compiled schema.
pub struct Contract {
    file: String,
    text: String,
    validator: Validator,
}

impl fmt::Debug for Contract {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Contract").field("file", &self.file).finish_non_exhaustive()
    }
}

impl PartialEq for Contract {
    fn eq(&self, other: &Self) -> bool {
        (&self.file, &self.text) == (&other.file, &other.text)
    }
}

impl Eq for Contract {}

impl Contract {
    /// Compiles the schema `text` of `file`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with the place in the schema and what is wrong there.
    pub fn compile(file: &str, text: &str) -> Result<Self> {
        let wrong = |what: String| Error::config(format!("contract {file:?}: {what}"));
        if text.len() > SCHEMA_MAX {
            let len = text.len();
            return Err(wrong(format!("the schema has {len} bytes, at most {SCHEMA_MAX}")));
        }
        let schema: Value =
            serde_json::from_str(text).map_err(|e| wrong(format!("it is not JSON: {e}")))?;
        let options = jsonschema::options()
            .offline()
            .should_validate_formats(true)
            .with_pattern_options(PatternOptions::regex());
        let validator = options.build(&schema).map_err(|error| {
            let place = match error.instance_path().as_str() {
                "" => "at its top".to_owned(),
                place => format!("at {place}"),
            };
            wrong(format!("{place}: {error}")).hint(
                "schemas must be self-contained: $ref only within the file; patterns have neither \
                 look-around nor back-references",
            )
        })?;
        Ok(Self { file: file.to_owned(), text: text.to_owned(), validator })
    }

    /// The file it was read from, as the configuration has it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Checks a document. `absent` are members of its top that were not sent and may be missing.
    ///
    /// # Errors
    /// [`crate::error::Kind::Event`] with the place in the document and the keyword that it
    /// violates.
    pub fn check(&self, document: &[u8], absent: &[&str]) -> Result<()> {
        let file = &self.file;
        if document.len() > CHECKED_MAX {
            let len = document.len();
            let text = format!("contract {file:?}: {len} bytes, at most {CHECKED_MAX} are checked");
            return Err(Error::event(text).hint("send a reference instead of the data"));
        }
        // What serde says can show a value.
        let document: Value = serde_json::from_slice(document).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            Error::event(format!(
                "contract {file:?}: the body is not JSON, at line {line}, column {column}"
            ))
        })?;
        let is_excused = |error: &ValidationError<'_>| match error.kind() {
            ValidationErrorKind::Required { property: Value::String(name) } => {
                error.instance_path().as_str().is_empty() && absent.contains(&name.as_str())
            }
            _ => false,
        };
        let mut violations = self.validator.iter_errors(&document);
        match violations.find(|error| !is_excused(error)) {
            None => Ok(()),
            Some(error) => Err(self.violated(&error)),
        }
    }

    fn violated(&self, error: &ValidationError<'_>) -> Error {
        let place: String = error.instance_path().as_str().chars().take(PLACE_MAX).collect();
        let place = if place.is_empty() { "its top".to_owned() } else { place };
        let missing = match error.kind() {
            ValidationErrorKind::Required { property: Value::String(name) } => {
                format!(" ({name:?} is missing)")
            }
            _ => String::new(),
        };
        let (keyword, rule) = (error.kind().keyword(), error.schema_path().as_str());
        let file = &self.file;
        let text = format!(
            "the body violates contract {file:?} at {place}: {keyword}{missing}, by {rule}"
        );
        Error::event(text).hint("fix what the application writes, or change the contract")
    }
}

/// The contracts of a route.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contracts {
    /// Of every event that has none of its own.
    pub all: Option<Arc<Contract>>,
    /// Of outbox events with this event type.
    pub by_type: BTreeMap<String, Arc<Contract>>,
}

impl Contracts {
    /// Nothing is promised.
    pub fn is_empty(&self) -> bool {
        self.all.is_none() && self.by_type.is_empty()
    }

    /// What an event of this type must keep.
    pub fn of(&self, event_type: &str) -> Option<&Contract> {
        self.by_type.get(event_type).or(self.all.as_ref()).map(|contract| &**contract)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    const ORDER: &str = r##"{
        "type": "object", "required": ["id", "items"],
        "properties": {
            "id": {"type": "integer"}, "mail": {"type": "string", "format": "email"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
            "items": {"type": "array", "items": {"$ref": "#/$defs/item"}}
        },
        "$defs": {"item": {"properties": {"price": {"type": "number", "minimum": 0}}}}
    }"##;

    fn violation(document: &str, absent: &[&str]) -> String {
        let contract = Contract::compile("c.json", ORDER).unwrap();
        match contract.check(document.as_bytes(), absent) {
            Ok(()) => String::new(),
            Err(error) => {
                assert_eq!(error.kind(), Kind::Event);
                error.to_string()
            }
        }
    }

    #[test]
    fn a_violation_names_the_place_and_the_keyword_and_no_value() {
        assert_eq!(violation(r#"{"id": 1, "items": [{"price": 2.5}], "more": 1}"#, &[]), "");
        let of = |place: &str, what: &str, by: &str| {
            format!("the body violates contract \"c.json\" at {place}: {what}, by {by}")
        };
        let price = violation(r#"{"id": 1, "items": [{}, {"price": -77}]}"#, &[]);
        assert!(price.starts_with("the body violates contract \"c.json\" at /items/1/price: min"));
        assert!(!price.contains("77"), "{price}");
        let text = violation(r#"{"id": "secret", "items": []}"#, &[]);
        assert_eq!(text, of("/id", "type", "/properties/id/type"));
        let missing = of("its top", "required (\"items\" is missing)", "/required");
        assert_eq!(violation(r#"{"id": 1}"#, &[]), missing);
        assert_eq!(violation(r#"{"id": 1}"#, &["items"]), "");
        let mail = violation(r#"{"id": 1, "items": [], "mail": "no"}"#, &[]);
        assert_eq!(mail, of("/mail", "format", "/properties/mail/format"));
        let code = violation(r#"{"id": 1, "items": [], "code": "x"}"#, &[]);
        assert_eq!(code, of("/code", "pattern", "/properties/code/pattern"));
        let wrong = violation("{\"id\": secret}", &[]);
        assert_eq!(wrong, "contract \"c.json\": the body is not JSON, at line 1, column 8");
        let deep = "[".repeat(100_000);
        assert!(violation(&deep, &[]).contains("is not JSON"));
        let large = format!("\"{}\"", "x".repeat(CHECKED_MAX));
        assert!(violation(&large, &[]).contains("at most 4194304 are checked"));
    }

    #[test]
    fn a_schema_that_is_wrong_or_leads_elsewhere_is_refused() {
        for (schema, text) in [
            ("{", "it is not JSON"),
            (r#"{"type": "strin"}"#, "at /type"),
            (r#"{"properties": {"a": {"minimum": "x"}}}"#, "at /properties/a/minimum"),
            (r#"{"$ref": "https://example.com/a.json"}"#, "contract \"c.json\""),
            (r#"{"$ref": "other.json"}"#, "contract \"c.json\""),
            (r##"{"$ref": "#/$defs/missing"}"##, "contract \"c.json\""),
            (r#"{"pattern": "(a+)+(?=b)"}"#, "contract \"c.json\""),
            (r#"{"pattern": "("}"#, "contract \"c.json\""),
        ] {
            let error = Contract::compile("c.json", schema).expect_err(schema);
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.to_string().contains(text), "{schema}: {error}");
        }
    }

    #[test]
    fn a_pattern_that_backtracks_elsewhere_ends_at_once() {
        let contract = Contract::compile("c.json", r#"{"pattern": "^(a+)+$"}"#).unwrap();
        let document = format!("\"{}b\"", "a".repeat(1_000_000));
        assert!(contract.check(document.as_bytes(), &[]).is_err());
    }
}
