//! A Postgres array's text form as a JSON array.
//!
//! `{1,NULL,"a \"b\""}`, `{{1,2},{3,4}}`, `[0:2]={1,2,3}`: index bounds have no place in JSON and
//! are dropped. Nesting is bounded by what Postgres allows, so hostile text cannot exhaust the
//! stack.
//!
//! <https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO>

use super::Shape;
use crate::error::{Error, Result};

/// Dimensions that a Postgres array can have (`MAXDIM`).
const DIMENSIONS_MAX: usize = 6;

/// Appends the array `text` with elements of this shape.
pub(super) fn write(out: &mut Vec<u8>, shape: Shape, text: &[u8]) -> Result<()> {
    write_elements(out, shape.delimiter, text, |out, element| shape.write_nested(out, element))
}

/// Appends the array `text`; `element` writes one that is not null.
pub(super) fn write_elements(
    out: &mut Vec<u8>,
    delimiter: u8,
    text: &[u8],
    element: impl Fn(&mut Vec<u8>, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut walk = Walk { text, at: bounds_len(text), element, delimiter, unescaped: Vec::new() };
    walk.expect(b'{')?;
    walk.elements(out, 1)?;
    if walk.at == text.len() { Ok(()) } else { Err(walk.wrong("text after the last brace")) }
}

/// The length of the optional prefix that gives the bounds, up to and with its `=`.
fn bounds_len(text: &[u8]) -> usize {
    let is_bound = |byte: &&u8| matches!(byte, b'0'..=b'9' | b'[' | b']' | b':' | b'-');
    let len = text.iter().take_while(is_bound).count();
    if len > 0 && text.get(len) == Some(&b'=') { len + 1 } else { 0 }
}

struct Walk<'a, E> {
    text: &'a [u8],
    at: usize,
    element: E,
    delimiter: u8,
    unescaped: Vec<u8>,
}

impl<E: Fn(&mut Vec<u8>, &[u8]) -> Result<()>> Walk<'_, E> {
    /// Writes one dimension; its opening brace is already behind.
    fn elements(&mut self, out: &mut Vec<u8>, depth: usize) -> Result<()> {
        if depth > DIMENSIONS_MAX {
            return Err(self.wrong("more than 6 dimensions"));
        }
        out.push(b'[');
        if self.skip(b'}') {
            out.push(b']');
            return Ok(());
        }
        loop {
            match self.text.get(self.at) {
                Some(b'{') => {
                    self.at += 1;
                    self.elements(out, depth + 1)?;
                }
                Some(b'"') => {
                    self.at += 1;
                    self.quoted(out)?;
                }
                _ => self.bare(out)?,
            }
            if self.skip(b'}') {
                out.push(b']');
                return Ok(());
            }
            self.expect(self.delimiter)?;
            out.push(b',');
        }
    }

    /// Writes an element in quotes; the opening quote is already behind.
    fn quoted(&mut self, out: &mut Vec<u8>) -> Result<()> {
        self.unescaped.clear();
        let mut start = self.at;
        loop {
            match self.text.get(self.at) {
                None => return Err(self.wrong("no closing quote")),
                Some(b'\\') => {
                    self.unescaped.extend_from_slice(&self.text[start..self.at]);
                    start = self.at + 1;
                    self.at += 2;
                }
                Some(b'"') => break,
                Some(_) => self.at += 1,
            }
        }
        let last = &self.text[start..self.at];
        self.at += 1;
        if self.unescaped.is_empty() {
            return (self.element)(out, last);
        }
        self.unescaped.extend_from_slice(last);
        (self.element)(out, &self.unescaped)
    }

    /// Writes an element without quotes: it ends at the delimiter or the closing brace.
    fn bare(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let rest = &self.text[self.at..];
        let end = rest.iter().position(|byte| *byte == self.delimiter || b"{}\"\\".contains(byte));
        let element = &rest[..end.unwrap_or(rest.len())];
        if element.is_empty() {
            return Err(self.wrong("an empty element without quotes"));
        }
        self.at += element.len();
        match element {
            b"NULL" => out.extend_from_slice(b"null"),
            element => (self.element)(out, element)?,
        }
        Ok(())
    }

    fn skip(&mut self, byte: u8) -> bool {
        let found = self.text.get(self.at) == Some(&byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<()> {
        if self.skip(byte) {
            return Ok(());
        }
        Err(self.wrong(&format!("no '{}'", char::from(byte))))
    }

    fn wrong(&self, what: &str) -> Error {
        let (at, len) = (self.at, self.text.len());
        Error::event(format!("array value of {len} bytes has {what} at byte {at}"))
    }
}
