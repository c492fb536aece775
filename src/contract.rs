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
use jsonschema::{PatternOptions, ReferencingError, ValidationError, Validator};
use serde_json::{Value, json};

use crate::error::{Error, Result};

/// Most bytes of a document that is checked. As values in memory it is about ten times as large.
pub const CHECKED_MAX: usize = 4 << 20;
/// Most bytes of a schema.
pub const SCHEMA_MAX: usize = 1 << 20;
/// How deep a document that is checked is nested, and a schema: the limit of the JSON parser.
const DEPTH_MAX: usize = 127;
/// The drafts of JSON Schema, by what `$schema` has.
const DRAFTS: [&str; 5] = [
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
];
/// Most bytes of a place in a document that are shown: names of members can be anybody's data.
const PLACE_MAX: usize = 200;

/// A compiled schema.
pub struct Contract {
    file: String,
    text: Vec<u8>,
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
    /// Compiles the schema `text` of `file`, of which no more than one byte too many is needed.
    ///
    /// # Errors
    /// [`crate::error::Kind::Config`] with the place in the schema and what is wrong there.
    pub fn compile(file: &str, text: &[u8]) -> Result<Self> {
        let wrong = |what: String| Error::config(format!("contract {file:?}: {what}"));
        if text.len() > SCHEMA_MAX {
            return Err(wrong(format!("the schema has more than {SCHEMA_MAX} bytes")));
        }
        let schema: Value = serde_json::from_slice(text).map_err(|error| {
            wrong(match beyond(&error) {
                Some(what) => format!("the schema has {what}, {}", place(&error)),
                None => format!("it is not JSON: {error}"),
            })
        })?;
        match compiled(&schema) {
            Ok(validator) => Ok(Self { file: file.to_owned(), text: text.to_owned(), validator }),
            Err(error) => {
                let (what, hint) = uncompiled(&schema, &error);
                let error = wrong(what);
                Err(match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                })
            }
        }
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
            let place = place(&error);
            Error::event(match beyond(&error) {
                Some(what) => format!("contract {file:?}: the body has {what}, {place}"),
                None => format!("contract {file:?}: the body is not JSON, {place}"),
            })
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

fn compiled(schema: &Value) -> std::result::Result<Validator, ValidationError<'static>> {
    let options = jsonschema::options()
        .offline()
        .should_validate_formats(true)
        .with_pattern_options(PatternOptions::regex());
    options.build(schema)
}

/// Why a schema cannot be compiled, and what to do.
fn uncompiled(schema: &Value, error: &ValidationError<'_>) -> (String, Option<String>) {
    if let ValidationErrorKind::Referencing(ReferencingError::UnknownSpecification {
        specification,
    }) = error.kind()
    {
        let is_of_top = schema.get("$schema").and_then(Value::as_str) == Some(specification);
        let at = if is_of_top { "at /$schema: " } else { "$schema " };
        let what = format!("{at}{specification:?} is not known");
        return (what, Some(format!("use one of: {}", DRAFTS.join(", "))));
    }
    let at = match error.instance_path().as_str() {
        "" => "at its top".to_owned(),
        place => format!("at {place}"),
    };
    if let (ValidationErrorKind::Format { format }, Value::String(pattern)) =
        (error.kind(), error.instance().as_ref())
        && format == "regex"
    {
        return match compiled(&json!({ "pattern": without_counts(pattern) })) {
            Ok(_) => {
                let what = format!("{at}: the pattern {pattern:?} is too large when compiled");
                (what, Some("use smaller numbers of repetitions".to_owned()))
            }
            Err(_) => {
                let what = format!("{at}: {pattern:?} is not a pattern that can be used");
                let hint = "correct it; patterns have neither look-around nor back-references";
                (what, Some(hint.to_owned()))
            }
        };
    }
    let hint = matches!(error.kind(), ValidationErrorKind::Referencing(_))
        .then(|| "schemas must be self-contained: $ref only within the file".to_owned());
    (format!("{at}: {error}"), hint)
}

/// The pattern with `{1}` for every number of repetitions.
fn without_counts(pattern: &str) -> String {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(begin) = rest.find('{') {
        let (before, from) = rest.split_at(begin);
        out.push_str(before);
        let is_count = |c: char| c.is_ascii_digit() || c == ',';
        let inside = from[1..].find(|c| !is_count(c)).unwrap_or(0);
        rest = match from[1 + inside..].strip_prefix('}') {
            Some(after) if inside > 0 => {
                out.push_str("{1}");
                after
            }
            _ => {
                out.push('{');
                &from[1..]
            }
        };
    }
    out + rest
}

/// What a document has that is JSON, and more than is read.
fn beyond(error: &serde_json::Error) -> Option<String> {
    // The parser tells these only in words, which show no value.
    let told = error.to_string();
    if told.starts_with("number out of range") {
        Some("a number beyond what a double holds".to_owned())
    } else if told.starts_with("recursion limit exceeded") {
        Some(format!("parts nested more than {DEPTH_MAX} deep"))
    } else {
        None
    }
}

fn place(error: &serde_json::Error) -> String {
    format!("at line {}, column {}", error.line(), error.column())
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
        let contract = Contract::compile("c.json", ORDER.as_bytes()).unwrap();
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
            let error = Contract::compile("c.json", schema.as_bytes()).expect_err(schema);
            assert_eq!(error.kind(), Kind::Config);
            assert!(error.to_string().contains(text), "{schema}: {error}");
        }
    }

    #[test]
    fn what_is_json_but_more_than_is_read_is_not_called_something_else() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for (document, told) in [
            (nested(DEPTH_MAX + 1), "the body has parts nested more than 127 deep, at line 1"),
            ("[".repeat(100_000), "the body has parts nested more than 127 deep, at line 1"),
            (
                "{\"a\": 1e400}".to_owned(),
                "the body has a number beyond what a double holds, at line 1, column 11",
            ),
        ] {
            let violation = violation(&document, &[]);
            assert!(violation.contains(told), "{violation}");
            assert!(!violation.contains("not JSON"), "{violation}");
        }
        assert!(!violation(&nested(DEPTH_MAX), &[]).contains("nested"));
    }

    #[test]
    fn why_a_schema_cannot_be_used_is_told_with_what_to_do() {
        let large = format!("{{\"title\": \"{}\"}}", "x".repeat(SCHEMA_MAX));
        let drafts = "use one of: https://json-schema.org/draft/2020-12/schema, ";
        for (schema, told, hint) in [
            (&*large, "the schema has more than 1048576 bytes", ""),
            (r#"{"enum": [1e400]}"#, "the schema has a number beyond what a double holds", ""),
            (
                r#"{"properties": {"a": {"pattern": "^(\\p{L}{1,100}){1,100}$"}}}"#,
                "at /properties/a/pattern: the pattern \"^(\\\\p{L}{1,100}){1,100}$\" is too large",
                "smaller numbers of repetitions",
            ),
            (
                r#"{"pattern": "^(?!x)"}"#,
                "at /pattern: \"^(?!x)\" is not a pattern that can be used",
                "neither look-around nor back-references",
            ),
            (
                r#"{"$schema": "http://json-schema.org/draft-99/schema#"}"#,
                "at /$schema: \"http://json-schema.org/draft-99/schema#\" is not known",
                drafts,
            ),
            (
                r#"{"$schema": "https://json-schema.org/schema", "pattern": "^(?!x)"}"#,
                "at /pattern: \"^(?!x)\" is not a pattern",
                "neither look-around nor back-references",
            ),
            (r#"{"$ref": "other.json"}"#, "contract \"c.json\"", "$ref only within the file"),
            (r#"{"type": "strin"}"#, "at /type", ""),
        ] {
            let error = Contract::compile("c.json", schema.as_bytes()).expect_err(told);
            assert!(error.to_string().contains(told), "{error}");
            assert_eq!(error.hint_text().is_some(), !hint.is_empty(), "{error}");
            assert!(error.hint_text().unwrap_or_default().contains(hint), "{error}");
        }
        for draft in DRAFTS {
            for end in ["", "#"] {
                let schema = format!("{{\"$schema\": \"{draft}{end}\"}}");
                assert!(Contract::compile("c.json", schema.as_bytes()).is_ok(), "{schema}");
            }
        }
    }

    #[test]
    fn a_pattern_that_backtracks_elsewhere_ends_at_once() {
        let contract = Contract::compile("c.json", br#"{"pattern": "^(a+)+$"}"#).unwrap();
        let document = format!("\"{}b\"", "a".repeat(1_000_000));
        assert!(contract.check(document.as_bytes(), &[]).is_err());
    }
}
