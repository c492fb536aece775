//! A column's Postgres text form as JSON.
//!
//! | Postgres type | JSON |
//! |---|---|
//! | `bool` | `true`, `false` |
//! | `int2`, `int4`, `int8`, `oid` | number |
//! | `float4`, `float8` | number; `"NaN"`, `"Infinity"`, `"-Infinity"` |
//! | `numeric` | string: digits are kept as they are |
//! | `json`, `jsonb` | embedded verbatim |
//! | `bytea` | string, base64 (standard alphabet, padded) |
//! | `date`, `time`, `timetz`, `timestamp`, `timestamptz` | string, ISO 8601; see [`Form`] |
//! | arrays | array of these, nested like the value; index bounds are dropped |
//! | domains | as the type under them |
//! | everything else | string: the text form |
//!
//! The invariant: what is appended is always one complete JSON value, or nothing and an error (for
//! `json` and `jsonb` the server vouches). The text must come from a session with DateStyle ISO,
//! IntervalStyle iso_8601 and TimeZone UTC, which the replication connection asks for.
//!
//! Not here: nulls and unchanged TOAST values, which the caller sees before there is text.
//! `docs/types.md` is the same table for users, with the edge cases.

mod array;
pub mod binary;
mod bytes;
pub mod debezium;
pub mod instant;
pub mod oid;
mod user_type;

pub use user_type::{Extension, Resolved, Types, UserType, ValueKind};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the values of a type are written. Decided once per column, not once per value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    form: Form,
    /// How many arrays are around one value: more than one where an array has elements of a domain
    /// over an array. The dimensions of an array do not count.
    arrays: u8,
    /// Between two elements of these arrays.
    delimiter: u8,
}

/// How one value that is not an array is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// `t` and `f` as `true` and `false`.
    Bool,
    /// A whole number.
    Integer,
    /// A number; what JSON has no number for is a string.
    Float,
    /// A string, as it is.
    Text,
    /// JSON already.
    Json,
    /// Bytes in hex (`\x00ff`) or in escape format, as base64.
    Bytes,
    /// `2024-01-02`. Years after 9999 get the sign that ISO 8601 asks for (`+10000-01-01`).
    /// `infinity`, `-infinity` and years before Christ (`0044-03-15 BC`) stay as they are, here
    /// and in both timestamps.
    Date,
    /// `2024-01-02T03:04:05.123`: no zone, because the type has none.
    Timestamp,
    /// `2024-01-02T03:04:05.123Z`.
    TimestampTz,
    /// `03:04:05Z`, `03:04:05+05:30`: the value's own zone.
    TimeTz,
}

impl Shape {
    /// A string, as it is.
    pub const TEXT: Shape = Shape { form: Form::Text, arrays: 0, delimiter: b',' };

    /// The shape of a built-in type's values; other types are text. [`Types::shape`] knows more.
    pub fn of(type_oid: u32) -> Shape {
        Types::default().shape(type_oid)
    }

    /// How one value is written, or one element of an array.
    pub fn form(self) -> Form {
        self.form
    }

    /// How many arrays are around one value.
    pub fn arrays(self) -> u8 {
        self.arrays
    }

    /// Appends `text` as one JSON value.
    ///
    /// # Errors
    /// `Kind::Event` when `text` is not what the type's output function writes, or not UTF-8.
    /// Nothing is appended then.
    pub fn write(self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        let start = out.len();
        let written = self.write_nested(out, text);
        if written.is_err() {
            out.truncate(start);
        }
        written
    }

    /// Whether `text` makes one JSON value, also where no server vouches for it.
    pub fn takes(self, text: &[u8]) -> bool {
        let mut out = Vec::new();
        let is_json = |out: &[u8]| serde_json::from_slice::<serde::de::IgnoredAny>(out).is_ok();
        let is_finite = |text: &[u8]| {
            std::str::from_utf8(text)
                .is_ok_and(|text| text.parse::<f64>().is_ok_and(f64::is_finite))
        };
        self.write(&mut out, text).is_ok()
            && match (self.form, self.arrays) {
                (Form::Float, 0) if out == text => is_finite(text),
                (Form::Json, _) => is_json(&out),
                _ => true,
            }
    }

    fn write_nested(self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        match self.arrays {
            0 => self.form.write(out, text),
            arrays => array::write(out, Shape { arrays: arrays - 1, ..self }, text),
        }
    }
}

impl Form {
    fn of(type_oid: u32) -> Form {
        match type_oid {
            oid::BOOL => Form::Bool,
            oid::INT2 | oid::INT4 | oid::INT8 | oid::OID => Form::Integer,
            oid::FLOAT4 | oid::FLOAT8 => Form::Float,
            oid::JSON | oid::JSONB => Form::Json,
            oid::BYTEA => Form::Bytes,
            oid::DATE => Form::Date,
            oid::TIMESTAMP => Form::Timestamp,
            oid::TIMESTAMPTZ => Form::TimestampTz,
            oid::TIMETZ => Form::TimeTz,
            _ => Form::Text,
        }
    }

    fn write(self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        match self {
            Form::Bool => write_bool(out, text),
            Form::Integer if is_number(text, false) => append(out, text),
            Form::Float if is_number(text, true) => append(out, text),
            Form::Float if matches!(text, b"NaN" | b"Infinity" | b"-Infinity") => {
                write_text(out, text)
            }
            Form::Integer | Form::Float => Err(unexpected(text, "a number")),
            Form::Text => write_text(out, text),
            Form::Json if text.is_empty() => Err(unexpected(text, "a JSON value")),
            Form::Json => append(out, utf8(text)?.as_bytes()),
            Form::Bytes => bytes::write(out, text),
            Form::Date => write_date(out, text),
            Form::Timestamp => write_timestamp(out, text, false),
            Form::TimestampTz => write_timestamp(out, text, true),
            Form::TimeTz => write_timetz(out, text),
        }
    }
}

/// Appends `text` as a JSON string.
///
/// Escapes only what JSON demands: quote, backslash and the control characters below U+0020.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    out.reserve(bytes.len() + 2);
    out.push(b'"');
    let mut copied = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if !ESCAPED[usize::from(byte)] {
            continue;
        }
        out.extend_from_slice(&bytes[copied..at]);
        copied = at + 1;
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                let (high, low) = (usize::from(byte >> 4), usize::from(byte & 15));
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', DIGITS[high], DIGITS[low]]);
            }
        }
    }
    out.extend_from_slice(&bytes[copied..]);
    out.push(b'"');
}

/// The bytes that a JSON string cannot hold as they are.
const ESCAPED: [bool; 256] = {
    let mut escaped = [false; 256];
    let mut byte = 0;
    while byte < 0x20 {
        escaped[byte] = true;
        byte += 1;
    }
    escaped[b'"' as usize] = true;
    escaped[b'\\' as usize] = true;
    escaped
};

fn append(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    out.extend_from_slice(text);
    Ok(())
}

fn write_text(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    write_string(out, utf8(text)?);
    Ok(())
}

fn write_bool(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    match text {
        b"t" => append(out, b"true"),
        b"f" => append(out, b"false"),
        _ => Err(unexpected(text, "t or f")),
    }
}

/// Does not show the value: it may be anybody's data, and this goes to the log.
fn unexpected(text: &[u8], allowed: &str) -> Error {
    Error::event(format!("value of {} bytes is not {allowed}", text.len()))
}

fn utf8(text: &[u8]) -> Result<&str> {
    std::str::from_utf8(text).map_err(|error| {
        let at = error.valid_up_to();
        Error::event(format!("value of {} bytes is not UTF-8 at byte {at}", text.len())).hint(
            "JSON must be UTF-8: fix the row, or use a database encoding other than SQL_ASCII",
        )
    })
}

/// The whole of `text` as JSON spells numbers. Only a `fraction` may have `.` and `e`.
fn is_number(text: &[u8], fraction: bool) -> bool {
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let rest = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits(rest);
    if whole == 0 || (whole > 1 && rest[0] == b'0') {
        return false;
    }
    let mut rest = &rest[whole..];
    if !fraction {
        return rest.is_empty();
    }
    if let Some(after) = rest.strip_prefix(b".") {
        let count = digits(after);
        if count == 0 {
            return false;
        }
        rest = &after[count..];
    }
    match rest {
        [] => true,
        [b'e' | b'E', b'+' | b'-', power @ ..] | [b'e' | b'E', power @ ..] => {
            !power.is_empty() && digits(power) == power.len()
        }
        _ => false,
    }
}

fn write_date(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    if !is_clock(text) {
        return write_text(out, text);
    }
    out.push(b'"');
    push_date(out, text);
    out.push(b'"');
    Ok(())
}

fn write_timestamp(out: &mut Vec<u8>, text: &[u8], zoned: bool) -> Result<()> {
    let space = text.iter().position(|&byte| byte == b' ').unwrap_or(text.len());
    let (date, time) = text.split_at(space);
    let Some(time) = time.strip_prefix(b" ").filter(|time| is_clock(date) && is_clock(time)) else {
        return write_text(out, text);
    };
    out.push(b'"');
    push_date(out, date);
    out.push(b'T');
    if zoned {
        push_zoned(out, time);
    } else {
        out.extend_from_slice(time);
    }
    out.push(b'"');
    Ok(())
}

fn write_timetz(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    if !is_clock(text) {
        return write_text(out, text);
    }
    out.push(b'"');
    push_zoned(out, text);
    out.push(b'"');
    Ok(())
}

/// Only what dates, times and zone offsets are made of: no words, nothing to escape.
fn is_clock(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_digit)
        && text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b':' | b'.' | b'+' | b'-'))
}

fn push_date(out: &mut Vec<u8>, date: &[u8]) {
    if date.iter().position(|&byte| byte == b'-').is_some_and(|digits| digits > 4) {
        out.push(b'+');
    }
    out.extend_from_slice(date);
}

/// The server writes whole-hour offsets without minutes; ISO 8601 with a colon wants them.
fn push_zoned(out: &mut Vec<u8>, time: &[u8]) {
    let sign = time.iter().rposition(|&byte| byte == b'+' || byte == b'-').unwrap_or(time.len());
    let (clock, zone) = time.split_at(sign);
    out.extend_from_slice(clock);
    match zone {
        b"+00" | b"-00" => out.push(b'Z'),
        [_, _, _] => {
            out.extend_from_slice(zone);
            out.extend_from_slice(b":00");
        }
        _ => out.extend_from_slice(zone),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_leaves_what_was_written_before() {
        let mut out = b"{\"a\":".to_vec();
        let error = Shape::of(1007).write(&mut out, b"{1,2,x}").unwrap_err();
        assert_eq!(error.to_string(), "value of 1 bytes is not a number");
        assert_eq!(out, b"{\"a\":");
        let error = Shape::of(oid::TEXT).write(&mut out, b"caf\xe9").unwrap_err();
        assert_eq!(error.to_string(), "value of 4 bytes is not UTF-8 at byte 3");
        assert_eq!(error.kind(), crate::error::Kind::Event);
        assert_eq!(out, b"{\"a\":");
    }

    #[test]
    fn numbers_are_numbers_only_as_json_spells_them() {
        for good in ["0", "-0", "7", "-10", "1.5", "1e-300", "1e+22", "1.2345678901234568E17"] {
            assert!(is_number(good.as_bytes(), true), "{good}");
        }
        let wrong =
            ["", "-", "01", "-01", "+1", ".5", "5.", "1.e5", "1e", "1e+", "1x", "1 ", "1.5.5"];
        for wrong in wrong {
            assert!(!is_number(wrong.as_bytes(), true), "{wrong}");
            assert!(!is_number(wrong.as_bytes(), false), "{wrong}");
        }
        assert!(!is_number(b"1.5", false) && !is_number(b"1e5", false));
    }

    #[test]
    fn every_byte_that_json_forbids_is_escaped() {
        let all: String = (0..=0x80u8).map(char::from).chain("é\u{2028}🐇".chars()).collect();
        let mut out = Vec::new();
        write_string(&mut out, &all);
        assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), all);
        assert!(out.starts_with(b"\"\\u0000") && out.iter().all(|byte| *byte >= 0x20));
    }
}
