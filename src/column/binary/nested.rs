//! Values made of values: arrays, ranges, multiranges and rows.

use std::fmt::Write as _;

use super::{Read, wrong};
use crate::column::{Types, UserType, oid};
use crate::error::Result;

impl Types {
    /// Dimensions, a flag, the element type, length and lower bound of each dimension, elements.
    pub(super) fn array(
        &self,
        out: &mut Vec<u8>,
        between: u8,
        value: &[u8],
        depth: u8,
    ) -> Result<()> {
        const DIMENSIONS_MAX: usize = 6;
        let mut read = Read(value, "array");
        let dimensions = usize::try_from(read.i32()?).map_err(|_| wrong("array"))?;
        let _has_nulls = read.i32()?;
        let element = read.u32()?;
        if dimensions > DIMENSIONS_MAX {
            return Err(wrong("array"));
        }
        let mut lengths = Vec::new();
        let mut bounds = String::new();
        for _ in 0..dimensions {
            let (length, lower) = (read.i32()?, read.i32()?);
            let upper = i64::from(lower) + i64::from(length) - 1;
            let _ = write!(bounds, "[{lower}:{upper}]");
            // An empty array has no dimensions at all.
            let length = usize::try_from(length).ok().filter(|length| *length > 0);
            lengths.push((length.ok_or_else(|| wrong("array"))?, lower));
        }
        if lengths.is_empty() {
            out.extend_from_slice(b"{}");
            return read.end();
        }
        if lengths.iter().any(|(_, lower)| *lower != 1) {
            out.extend_from_slice(bounds.as_bytes());
            out.push(b'=');
        }
        let lengths: Vec<usize> = lengths.into_iter().map(|(length, _)| length).collect();
        Elements { types: self, read, element, between, depth: depth + 1 }.write(out, &lengths)
    }

    /// A byte of flags, then the bounds that are there.
    pub(super) fn range(
        &self,
        out: &mut Vec<u8>,
        subtype: u32,
        value: &[u8],
        depth: u8,
    ) -> Result<()> {
        const EMPTY: u8 = 0x01;
        const LOWER_INCLUSIVE: u8 = 0x02;
        const UPPER_INCLUSIVE: u8 = 0x04;
        const LOWER_INFINITE: u8 = 0x08;
        const UPPER_INFINITE: u8 = 0x10;
        let mut read = Read(value, "range");
        let flags = read.u8()?;
        if flags & EMPTY != 0 {
            out.extend_from_slice(b"empty");
            return read.end();
        }
        out.push(if flags & LOWER_INCLUSIVE != 0 { b'[' } else { b'(' });
        let mut text = Vec::new();
        for (infinite, after) in [(LOWER_INFINITE, b','), (UPPER_INFINITE, b'\0')] {
            if flags & infinite == 0 {
                let bound = read.field()?.ok_or_else(|| wrong("range"))?;
                text.clear();
                self.write(&mut text, subtype, bound, depth + 1)?;
                quote_bound(out, &text);
            }
            if after != 0 {
                out.push(after);
            }
        }
        out.push(if flags & UPPER_INCLUSIVE != 0 { b']' } else { b')' });
        read.end()
    }

    pub(super) fn multirange(
        &self,
        out: &mut Vec<u8>,
        subtype: u32,
        value: &[u8],
        depth: u8,
    ) -> Result<()> {
        let mut read = Read(value, "multirange");
        out.push(b'{');
        for index in 0..read.i32()? {
            if index > 0 {
                out.push(b',');
            }
            let range = read.field()?.ok_or_else(|| wrong("multirange"))?;
            self.range(out, subtype, range, depth + 1)?;
        }
        out.push(b'}');
        read.end()
    }

    /// Count of fields, then type, length and bytes of each.
    pub(super) fn composite(&self, out: &mut Vec<u8>, value: &[u8], depth: u8) -> Result<()> {
        let mut read = Read(value, "row");
        out.push(b'(');
        let mut text = Vec::new();
        for index in 0..read.i32()? {
            if index > 0 {
                out.push(b',');
            }
            let type_oid = read.u32()?;
            // A null has no text at all, an empty text has quotes.
            if let Some(field) = read.field()? {
                text.clear();
                self.write(&mut text, type_oid, field, depth + 1)?;
                quote_field(out, &text);
            }
        }
        out.push(b')');
        read.end()
    }
}

/// What is left of an array behind its head.
struct Elements<'a> {
    types: &'a Types,
    read: Read<'a>,
    element: u32,
    between: u8,
    depth: u8,
}

impl Elements<'_> {
    fn write(mut self, out: &mut Vec<u8>, lengths: &[usize]) -> Result<()> {
        self.dimension(out, lengths, &mut Vec::new())?;
        self.read.end()
    }

    fn dimension(
        &mut self,
        out: &mut Vec<u8>,
        lengths: &[usize],
        text: &mut Vec<u8>,
    ) -> Result<()> {
        out.push(b'{');
        let (length, inner) = lengths.split_first().ok_or_else(|| wrong("array"))?;
        for index in 0..*length {
            if index > 0 {
                out.push(self.between);
            }
            if !inner.is_empty() {
                self.dimension(out, inner, text)?;
                continue;
            }
            match self.read.field()? {
                None => out.extend_from_slice(b"NULL"),
                Some(value) => {
                    text.clear();
                    self.types.write(text, self.element, value, self.depth)?;
                    quote_element(out, text, self.between);
                }
            }
        }
        out.push(b'}');
        Ok(())
    }
}

/// The built-in ranges and multiranges, whose OIDs are fixed.
pub(super) fn range_of(type_oid: u32) -> Option<UserType> {
    Some(match type_oid {
        3904 => UserType::Range(oid::INT4),
        3906 => UserType::Range(oid::NUMERIC),
        3908 => UserType::Range(oid::TIMESTAMP),
        3910 => UserType::Range(oid::TIMESTAMPTZ),
        3912 => UserType::Range(oid::DATE),
        3926 => UserType::Range(oid::INT8),
        4451 => UserType::Multirange(oid::INT4),
        4532 => UserType::Multirange(oid::NUMERIC),
        4533 => UserType::Multirange(oid::TIMESTAMP),
        4534 => UserType::Multirange(oid::TIMESTAMPTZ),
        4535 => UserType::Multirange(oid::DATE),
        4536 => UserType::Multirange(oid::INT8),
        _ => return None,
    })
}

/// `array_out`: in quotes what could be taken for something else.
fn quote_element(out: &mut Vec<u8>, text: &[u8], between: u8) {
    let special = |byte: &u8| {
        matches!(byte, b'"' | b'\\' | b'{' | b'}') || *byte == between || is_space(byte)
    };
    let plain =
        !text.is_empty() && !text.eq_ignore_ascii_case(b"NULL") && !text.iter().any(special);
    if plain {
        return out.extend_from_slice(text);
    }
    out.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// `range_out`: in quotes what could be taken for something else, quotes and backslashes doubled.
fn quote_bound(out: &mut Vec<u8>, text: &[u8]) {
    let special = |byte: &u8| {
        matches!(byte, b'"' | b'\\' | b'(' | b')' | b'[' | b']' | b',') || is_space(byte)
    };
    if !text.is_empty() && !text.iter().any(special) {
        return out.extend_from_slice(text);
    }
    push_doubled(out, text);
}

/// `record_out`: as in a range, and only parentheses are special.
fn quote_field(out: &mut Vec<u8>, text: &[u8]) {
    let special = |byte: &u8| matches!(byte, b'"' | b'\\' | b'(' | b')' | b',') || is_space(byte);
    if !text.is_empty() && !text.iter().any(special) {
        return out.extend_from_slice(text);
    }
    push_doubled(out, text);
}

/// In quotes, with quotes and backslashes doubled.
fn push_doubled(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    for byte in text {
        if matches!(byte, b'"' | b'\\') {
            out.push(*byte);
        }
        out.push(*byte);
    }
    out.push(b'"');
}

/// Space as the server's parsers of arrays and ranges see it.
fn is_space(byte: &u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0B | 0x0C)
}
