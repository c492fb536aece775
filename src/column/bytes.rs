//! A `bytea` value's text form as a base64 string.
//!
//! Decoded and encoded through a small buffer: a value of hundreds of megabytes takes no memory
//! except for the output.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::error::{Error, Result};

/// Bytes turned into base64 at a time. A multiple of 3, so that only the last chunk is padded.
const CHUNK_BYTES: usize = 768;
const _: () = assert!(CHUNK_BYTES.is_multiple_of(3));

/// Appends both of `bytea_output`'s formats; the escape format never starts with `\x`.
///
/// <https://www.postgresql.org/docs/current/datatype-binary.html>
pub(super) fn write(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    let mut base64 = Base64 { chunk: [0; CHUNK_BYTES], filled: 0, out };
    base64.out.push(b'"');
    match text.strip_prefix(b"\\x") {
        Some(hex) => write_hex(&mut base64, hex)?,
        None => write_escaped(&mut base64, text)?,
    }
    base64.flush();
    out.push(b'"');
    Ok(())
}

fn write_hex(base64: &mut Base64<'_>, hex: &[u8]) -> Result<()> {
    let (pairs, []) = hex.as_chunks() else {
        return Err(Error::event(format!("bytea value has {} hex digits, not pairs", hex.len())));
    };
    for &[high, low] in pairs {
        base64.push(digit(high, 16)? << 4 | digit(low, 16)?);
    }
    Ok(())
}

fn write_escaped(base64: &mut Base64<'_>, text: &[u8]) -> Result<()> {
    let mut rest = text;
    loop {
        let (byte, after) = match rest {
            [] => return Ok(()),
            [b'\\', b'\\', after @ ..] => (b'\\', after),
            [b'\\', high @ b'0'..=b'3', middle, low, after @ ..] => {
                ((high - b'0') << 6 | digit(*middle, 8)? << 3 | digit(*low, 8)?, after)
            }
            [b'\\', ..] => {
                let at = text.len() - rest.len();
                return Err(Error::event(format!("bytea value has an unknown escape at {at}")));
            }
            [byte, after @ ..] => (*byte, after),
        };
        base64.push(byte);
        rest = after;
    }
}

fn digit(byte: u8, radix: u32) -> Result<u8> {
    let wrong = || Error::event(format!("bytea value has something else than base-{radix} digits"));
    let digit = char::from(byte).to_digit(radix).ok_or_else(wrong)?;
    Ok(u8::try_from(digit).expect("a digit is below 16"))
}

struct Base64<'a> {
    chunk: [u8; CHUNK_BYTES],
    filled: usize,
    out: &'a mut Vec<u8>,
}

impl Base64<'_> {
    fn push(&mut self, byte: u8) {
        self.chunk[self.filled] = byte;
        self.filled += 1;
        if self.filled == CHUNK_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let start = self.out.len();
        self.out.resize(start + self.filled.div_ceil(3) * 4, 0);
        let written = STANDARD.encode_slice(&self.chunk[..self.filled], &mut self.out[start..]);
        assert_eq!(written.ok(), Some(self.out.len() - start), "base64 is 4 bytes for 3");
        self.filled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base64(text: &[u8]) -> Result<String> {
        let mut out = Vec::new();
        write(&mut out, text).map(|()| String::from_utf8(out).unwrap())
    }

    #[test]
    fn both_output_formats_give_the_same_base64() {
        assert_eq!(base64(b"\\x").unwrap(), "\"\"");
        assert_eq!(base64(b"").unwrap(), "\"\"");
        assert_eq!(base64(b"\\x00ff5c4142").unwrap(), "\"AP9cQUI=\"");
        assert_eq!(base64(b"\\000\\377\\\\AB").unwrap(), "\"AP9cQUI=\"");
    }

    #[test]
    fn a_value_of_several_chunks_is_padded_only_at_its_end() {
        for len in [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES + 2] {
            let value: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
            let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
            let expected = format!("\"{}\"", STANDARD.encode(&value));
            assert_eq!(base64(format!("\\x{hex}").as_bytes()).unwrap(), expected, "{len} bytes");
        }
    }

    #[test]
    fn what_the_server_never_writes_is_refused() {
        for wrong in [&b"\\x0"[..], b"\\x0g", b"\\9", b"\\400", b"\\08x", b"a\\"] {
            assert!(base64(wrong).is_err(), "{}", wrong.escape_ascii());
        }
    }
}
