//! The application's own headers of an outbox row, and the names that it must not use.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::message::{Builder, is_reserved_header};

/// The members of the column `headers`.
pub(super) fn parse(headers: &[u8]) -> Result<BTreeMap<String, &RawValue>> {
    serde_json::from_slice(headers).map_err(wrong)
}

/// `is_taken` says which names have a value already, which the application's does not replace.
pub(super) fn write(
    builder: &mut Builder<'_>,
    headers: &[u8],
    is_taken: impl Fn(&str) -> bool,
) -> Result<()> {
    for (name, value) in &parse(headers)? {
        if is_reserved_header(name) {
            return Err(Error::event(format!("header {name:?} is reserved"))
                .hint("applications cannot set CC, BCC, x-* or ws-*; choose another name"));
        }
        if !is_taken(name) {
            write_one(builder, name, value.get())?;
        }
    }
    Ok(())
}

/// Adds a header with the value that the JSON `text` is. Numbers never go through a double, which
/// would change them, and which clients read in their own ways: what is not an integer of 64 bits
/// stays the text that it is.
pub(super) fn write_one(builder: &mut Builder<'_>, name: &str, text: &str) -> Result<()> {
    match text.as_bytes().first() {
        Some(b'n') => builder.header_void(name),
        Some(b't' | b'f') => builder.header_bool(name, text == "true"),
        Some(b'"') => {
            let value: String = serde_json::from_str(text).map_err(wrong)?;
            builder.header_text(name, value.as_bytes())
        }
        // AMQP tables could nest, but few clients read them; JSON text is read by all.
        Some(b'{' | b'[') => builder.header_text(name, compact(text).as_bytes()),
        _ => match text.parse() {
            Ok(int) => builder.header_int(name, int),
            Err(_) => builder.header_text(name, text.as_bytes()),
        },
    }
}

fn wrong(error: serde_json::Error) -> Error {
    let event = Error::event("column \"headers\" is not a JSON object");
    // What another kind of value is, serde shows with the value.
    if error.is_data() { event } else { event.caused_by(error) }
}

/// JSON without the white space between its parts; everything else as it is.
fn compact(json: &str) -> String {
    let (mut quoted, mut escaped) = (false, false);
    let keep = |c: &char| {
        let inside = quoted;
        quoted ^= *c == '"' && !escaped;
        escaped = quoted && *c == '\\' && !escaped;
        inside || !c.is_ascii_whitespace()
    };
    json.chars().filter(keep).collect()
}

#[cfg(test)]
mod tests {
    use super::compact;

    #[test]
    fn json_is_compacted_outside_of_strings_only() {
        for (json, expected) in [
            ("{\"a\": [1, 2.50]}", "{\"a\":[1,2.50]}"),
            ("{ \"a b\" : \"c  d\" }", "{\"a b\":\"c  d\"}"),
            ("[\"\\\" , \", 1]", "[\"\\\" , \",1]"),
            ("[\"\\\\\", 1]", "[\"\\\\\",1]"),
        ] {
            assert_eq!(compact(json), expected);
        }
    }
}
