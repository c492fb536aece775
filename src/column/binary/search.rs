//! `tsvector` and `tsquery`.

use super::{Read, put, wrong};
use crate::error::Result;

/// The count of words, then each with its positions and their weights.
pub(super) fn vector(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    for index in 0..read.count()? {
        if index > 0 {
            out.push(b' ');
        }
        quoted(out, read.text()?);
        for place in 0..read.u16()? {
            out.push(if place == 0 { b':' } else { b',' });
            let (weight, position) = {
                let both = read.u16()?;
                (both >> 14, both & 0x3FFF)
            };
            put(out, position);
            // D is the default and is not written.
            out.extend_from_slice([&b""[..], b"C", b"B", b"A"][usize::from(weight)]);
        }
    }
    Ok(())
}

const NOT: u8 = 1;
const AND: u8 = 2;
const OR: u8 = 3;
const PHRASE: u8 = 4;

/// A part of a query that is complete.
struct Part {
    text: Vec<u8>,
    /// What joins it; 0 for a single word.
    operator: u8,
}

impl Part {
    /// `tsearch_op_priority` of the server.
    fn priority(operator: u8) -> u8 {
        match operator {
            OR => 1,
            AND => 2,
            PHRASE => 3,
            _ => 4,
        }
    }

    /// In parentheses if it binds less than what it is now part of. A phrase on the right of
    /// another one is, too: their order matters.
    fn inside(mut self, operator: u8, is_right: bool) -> Vec<u8> {
        let binds_less = Self::priority(self.operator) < Self::priority(operator);
        let phrases = is_right && operator == PHRASE && self.operator == PHRASE;
        if self.operator != 0 && (binds_less || phrases) {
            self.text.splice(0..0, *b"( ");
            self.text.extend_from_slice(b" )");
        }
        self.text
    }
}

/// The count of words and operators, then these, each operator before its operands and the right
/// operand before the left one. Read from the end, the operands come first, so nothing recurs.
///
/// `infix` of the server's `tsquery.c`.
pub(super) fn query(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    let mut items = Vec::new();
    for _ in 0..read.count()? {
        items.push(item(read)?);
    }
    let mut parts: Vec<Part> = Vec::new();
    while let Some(item) = items.pop() {
        let (operator, distance) = match item {
            Item::Word(text) => {
                parts.push(Part { text, operator: 0 });
                continue;
            }
            Item::Operator(operator, distance) => (operator, distance),
        };
        let mut operand = || parts.pop().ok_or_else(|| wrong("tsquery"));
        let text = if operator == NOT {
            let mut text = vec![b'!'];
            text.append(&mut operand()?.inside(NOT, false));
            text
        } else {
            let right = operand()?.inside(operator, true);
            let mut text = operand()?.inside(operator, false);
            match operator {
                AND => text.extend_from_slice(b" & "),
                OR => text.extend_from_slice(b" | "),
                _ if distance == 1 => text.extend_from_slice(b" <-> "),
                _ => put(&mut text, format_args!(" <{distance}> ")),
            }
            text.extend_from_slice(&right);
            text
        };
        parts.push(Part { text, operator });
    }
    if let Some(whole) = parts.pop() {
        out.extend_from_slice(&whole.text);
    }
    if parts.is_empty() { Ok(()) } else { Err(wrong("tsquery")) }
}

enum Item {
    Word(Vec<u8>),
    /// With the distance of a phrase.
    Operator(u8, u16),
}

fn item(read: &mut Read<'_>) -> Result<Item> {
    const WORD: u8 = 1;
    const OPERATOR: u8 = 2;
    match read.u8()? {
        WORD => {
            let (weights, is_prefix) = (read.u8()?, read.u8()? != 0);
            let mut text = Vec::new();
            quoted(&mut text, read.text()?);
            if weights != 0 || is_prefix {
                text.push(b':');
            }
            if is_prefix {
                text.push(b'*');
            }
            let letters = [(3, b'A'), (2, b'B'), (1, b'C'), (0, b'D')];
            text.extend(letters.iter().filter(|(bit, _)| weights >> bit & 1 != 0).map(|l| l.1));
            Ok(Item::Word(text))
        }
        OPERATOR => match read.u8()? {
            operator @ (NOT | AND | OR) => Ok(Item::Operator(operator, 0)),
            PHRASE => Ok(Item::Operator(PHRASE, read.u16()?)),
            _ => Err(wrong("tsquery")),
        },
        _ => Err(wrong("tsquery")),
    }
}

/// In quotes, with quotes and backslashes doubled.
fn quoted(out: &mut Vec<u8>, word: &[u8]) {
    out.push(b'\'');
    for byte in word {
        if matches!(byte, b'\'' | b'\\') {
            out.push(*byte);
        }
        out.push(*byte);
    }
    out.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_has_parentheses_where_the_server_writes_them() {
        // !a & ( 'b' | 'c':*A ), as the server sends it.
        let mut bytes = vec![0, 0, 0, 6, 2, AND, 2, OR, 1, 8, 1];
        bytes.extend_from_slice(b"c\0\x01\0\0b\0");
        bytes.extend_from_slice(&[2, NOT, 1, 0, 0, b'a', 0]);
        let mut out = Vec::new();
        query(&mut out, &mut Read(&bytes, "tsquery")).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "!'a' & ( 'b' | 'c':*A )");
        let missing = [0, 0, 0, 1, 2, AND];
        assert!(query(&mut Vec::new(), &mut Read(&missing, "tsquery")).is_err());
        let many = [0, 0, 0, 2, 1, 0, 0, b'a', 0, 1, 0, 0, b'b', 0];
        assert!(query(&mut Vec::new(), &mut Read(&many, "tsquery")).is_err());
    }
}
