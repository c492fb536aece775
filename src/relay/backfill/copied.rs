//! A row as `COPY … TO STDOUT` sends it: values in text form, as the stream sends them. Pure.
//!
//! <https://www.postgresql.org/docs/current/sql-copy.html>, "Text Format": columns are separated by
//! tabs, null is `\N`, and of the backslash sequences the server sends `\b \f \n \r \t \v \\`.

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::{Error, Result};
use crate::event::Value;

/// The values of a line, slices of it where nothing was escaped.
///
/// # Errors
/// [`crate::error::Kind::Protocol`] for a line that no server sends.
pub fn values(line: &Bytes) -> Result<Vec<Value>> {
    let line = match line.last() {
        Some(b'\n') => line.slice(..line.len() - 1),
        _ => return Err(wrong()),
    };
    let mut values = Vec::new();
    let mut begin = 0;
    for end in tabs(&line) {
        values.push(value(&line, begin, end)?);
        begin = end + 1;
    }
    values.push(value(&line, begin, line.len())?);
    Ok(values)
}

fn tabs(line: &Bytes) -> impl Iterator<Item = usize> {
    line.iter().enumerate().filter(|(_, byte)| **byte == b'\t').map(|(at, _)| at)
}

fn value(line: &Bytes, begin: usize, end: usize) -> Result<Value> {
    let raw = &line[begin..end];
    if raw == b"\\N" {
        return Ok(Value::Null);
    }
    if !raw.contains(&b'\\') {
        return Ok(Value::Text(line.slice(begin..end)));
    }
    let mut text = BytesMut::with_capacity(raw.len());
    let mut bytes = raw.iter();
    while let Some(&byte) = bytes.next() {
        text.put_u8(match byte {
            b'\\' => match bytes.next() {
                Some(b'b') => 0x08,
                Some(b'f') => 0x0C,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 0x0B,
                Some(b'\\') => b'\\',
                Some(_) | None => return Err(wrong()),
            },
            byte => byte,
        });
    }
    Ok(Value::Text(text.freeze()))
}

fn wrong() -> Error {
    Error::protocol("a line of COPY that is not in text format")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &'static [u8]) -> Result<Vec<Value>> {
        values(&Bytes::from_static(line))
    }

    #[test]
    fn null_empty_and_escaped_values_are_told_apart() {
        let text = |bytes: &'static [u8]| Value::Text(Bytes::from_static(bytes));
        let values = [text(b"1"), Value::Null, text(b""), text(b"x")];
        assert_eq!(read(b"1\t\\N\t\tx\n").unwrap(), values);
        let escaped = read(b"\\\\N\ta\\tb\\nc\\\\d\t\\b\\f\\r\\v\n").unwrap();
        assert_eq!(escaped, [text(b"\\N"), text(b"a\tb\nc\\d"), text(b"\x08\x0C\r\x0B")]);
        assert_eq!(read(b"\n").unwrap(), [text(b"")], "one column, empty");
        assert_eq!(read(b"\xFF\xC3\n").unwrap(), [text(b"\xFF\xC3")], "any encoding");
    }

    #[test]
    fn what_no_server_sends_is_refused() {
        for line in [&b"1\t2"[..], b"a\\\n", b"a\\x\n", b""] {
            assert!(values(&Bytes::copy_from_slice(line)).is_err(), "{line:?}");
        }
    }
}
