//! `numeric`, `money` and bit strings.

use std::io::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::{DecimalHandling, write_double, write_text};
use crate::column::{unexpected, write_string};
use crate::error::{Error, Result};

/// The scale in a type modifier; absent where the column has none, and each value has its own
/// (`numeric_typmod_scale`, `src/backend/utils/adt/numeric.c`).
pub(super) fn scale(modifier: i32) -> Option<i16> {
    const HEADER: i32 = 4;
    let packed = (modifier - HEADER) & 0x7FF;
    // Eleven bits with a sign.
    (modifier >= HEADER).then(|| (packed ^ 1024) as i16 - 1024)
}

/// A `numeric`; `scale` is the column's.
pub(super) fn write(
    out: &mut Vec<u8>,
    text: &[u8],
    handling: DecimalHandling,
    scale: Option<i16>,
) -> Result<()> {
    let special = matches!(text, b"NaN" | b"Infinity" | b"-Infinity");
    match (handling, scale) {
        (DecimalHandling::String, _) if special => write_text(out, text),
        (DecimalHandling::Double, _) if special => write_text(out, text),
        (DecimalHandling::Precise, _) if special => Err(Error::event(
            "a numeric value that is NaN or infinite has no precise form in Debezium's format",
        )
        .hint("set debezium.decimal_handling = \"string\" or \"double\" for this route")),
        (DecimalHandling::String, _) => {
            Decimal::parse(text)?;
            write_text(out, text)
        }
        (DecimalHandling::Double, _) => {
            Decimal::parse(text)?;
            write_double(out, parsed(text)?);
            Ok(())
        }
        (DecimalHandling::Precise, Some(scale)) => {
            let decimal = Decimal::parse(text)?.with_scale(i32::from(scale));
            write_string(out, &decimal.base64());
            Ok(())
        }
        (DecimalHandling::Precise, None) => {
            let decimal = Decimal::parse(text)?.shortest();
            let _ = write!(out, "{{\"scale\":{},\"value\":", decimal.scale);
            write_string(out, &decimal.base64());
            out.push(b'}');
            Ok(())
        }
    }
}

/// A `money`, whatever sign, currency and separators `lc_monetary` gives it: the last of `.` and
/// `,` stands before the fraction, unless three digits or none follow it.
pub(super) fn write_money(
    out: &mut Vec<u8>,
    text: &[u8],
    handling: DecimalHandling,
    digits: u8,
) -> Result<()> {
    let last = text.iter().rposition(|byte| matches!(byte, b'.' | b','));
    let count = |text: &[u8]| text.iter().filter(|byte| byte.is_ascii_digit()).count();
    let fraction = last.map_or(0, |last| count(&text[last..]));
    let scale = if fraction == 3 { 0 } else { fraction };
    let negative = text.iter().any(|byte| matches!(byte, b'-' | b'('));
    let number = text.iter().copied().filter(u8::is_ascii_digit).collect();
    let decimal = Decimal { negative, digits: number, scale: scale as i32 };
    if decimal.digits.is_empty() {
        return Err(unexpected(text, "an amount of money"));
    }
    match handling {
        DecimalHandling::Precise => {
            write_string(out, &decimal.with_scale(i32::from(digits)).base64());
        }
        DecimalHandling::Double => write_double(out, parsed(decimal.plain().as_bytes())?),
        DecimalHandling::String => write_string(out, &decimal.plain()),
    }
    Ok(())
}

fn parsed(text: &[u8]) -> Result<f64> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| unexpected(text, "a number"))
}

/// A bit string as little-endian bytes: as many as its highest bit needs.
pub(super) fn write_bits(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    if !text.iter().all(|bit| matches!(bit, b'0' | b'1')) {
        return Err(unexpected(text, "a bit string"));
    }
    let byte = |bits: &[u8]| bits.iter().fold(0_u8, |byte, bit| byte << 1 | (bit - b'0'));
    let mut bytes: Vec<u8> = text.rchunks(8).map(byte).collect();
    let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    bytes.truncate(len);
    write_string(out, &STANDARD.encode(&bytes));
    Ok(())
}

/// `digits` / 10^`scale`.
struct Decimal {
    negative: bool,
    /// In ASCII; may begin with zeros.
    digits: Vec<u8>,
    scale: i32,
}

impl Decimal {
    fn parse(text: &[u8]) -> Result<Self> {
        let (negative, rest) = match text {
            [b'-', rest @ ..] => (true, rest),
            rest => (false, rest),
        };
        let point = rest.iter().position(|byte| *byte == b'.');
        let (whole, fraction) = match point {
            Some(point) => (&rest[..point], &rest[point + 1..]),
            None => (rest, &rest[..0]),
        };
        let digits = [whole, fraction].concat();
        if whole.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(unexpected(text, "a number"));
        }
        // Postgres has at most 16,383 digits after the point.
        Ok(Self { negative, digits, scale: fraction.len() as i32 })
    }

    /// With this many digits after the decimal point, rounded half up; fewer than none means that
    /// the last digits before the point are left out.
    fn with_scale(mut self, scale: i32) -> Self {
        while self.scale < scale {
            self.digits.push(b'0');
            self.scale += 1;
        }
        let mut dropped = b'0';
        while self.scale > scale {
            dropped = self.digits.pop().unwrap_or(b'0');
            self.scale -= 1;
        }
        if dropped >= b'5' {
            self.increment();
        }
        self
    }

    fn increment(&mut self) {
        for digit in self.digits.iter_mut().rev() {
            if *digit < b'9' {
                *digit += 1;
                return;
            }
            *digit = b'0';
        }
        self.digits.insert(0, b'1');
    }

    /// Without zeros at the end of its fraction.
    fn shortest(mut self) -> Self {
        while self.scale > 0 && self.digits.last() == Some(&b'0') {
            self.digits.pop();
            self.scale -= 1;
        }
        self
    }

    fn plain(&self) -> String {
        let scale = usize::try_from(self.scale).unwrap_or(0);
        let mut text: String = self.digits.iter().map(|digit| char::from(*digit)).collect();
        while text.len() <= scale {
            text.insert(0, '0');
        }
        let leading = text.bytes().take_while(|digit| *digit == b'0').count();
        let mut text = text.split_off(leading.min(text.len() - scale - 1));
        if scale > 0 {
            text.insert(text.len() - scale, '.');
        }
        if self.negative { format!("-{text}") } else { text }
    }

    fn base64(&self) -> String {
        STANDARD.encode(self.bytes())
    }

    /// The digits as a number in two's complement, big-endian, in as few bytes as hold its sign.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = magnitude(&self.digits);
        // Room for the sign.
        bytes.insert(0, 0);
        if self.negative {
            let mut carry = true;
            for byte in bytes.iter_mut().rev() {
                (*byte, carry) = (!*byte).overflowing_add(u8::from(carry));
            }
        }
        let is_spare = |pair: &[u8]| {
            matches!(pair, [0x00, next] if *next < 0x80)
                || matches!(pair, [0xFF, next] if *next >= 0x80)
        };
        let spare = bytes.windows(2).take_while(|pair| is_spare(pair)).count();
        bytes.split_off(spare)
    }
}

/// Decimal digits as big-endian bytes.
fn magnitude(digits: &[u8]) -> Vec<u8> {
    // Least significant first; nine digits at a time fit into 32 bits.
    let mut limbs: Vec<u32> = Vec::new();
    for chunk in digits.chunks(9) {
        let factor = 10_u64.pow(chunk.len() as u32);
        let mut carry = chunk.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
        for limb in &mut limbs {
            let value = u64::from(*limb) * factor + carry;
            (*limb, carry) = (value as u32, value >> 32);
        }
        if carry > 0 {
            limbs.push(carry as u32);
        }
    }
    limbs.iter().rev().flat_map(|limb| limb.to_be_bytes()).collect()
}
