//! Floats and numerics as the server writes them.

use super::{Read, put, wrong};
use crate::error::Result;

/// A float as `float8out` writes it: the shortest digits that lie nearer to it than to any other.
pub(super) fn float8(out: &mut Vec<u8>, value: f64) {
    if special(out, value) {
        return;
    }
    let bits = value.to_bits();
    let (mantissa, exponent) = match bits >> 52 & 0x7FF {
        0 => (bits & MANTISSA_8, -1074),
        exponent => (bits & MANTISSA_8 | 1 << 52, exponent as i32 - 1075),
    };
    let print = |digits: Option<usize>| match digits {
        Some(digits) => format!("{:.*e}", digits - 1, value.abs()),
        None => format!("{:e}", value.abs()),
    };
    let reads_back = |text: &str| text.parse() == Ok(value.abs());
    let digits = shortest(mantissa, exponent, &print, &reads_back);
    float(out, value.is_sign_negative(), &digits, 15);
}

/// A float as `float4out` writes it.
pub(super) fn float4(out: &mut Vec<u8>, value: f32) {
    if special(out, f64::from(value)) {
        return;
    }
    let bits = u64::from(value.to_bits());
    let (mantissa, exponent) = match bits >> 23 & 0xFF {
        0 => (bits & MANTISSA_4, -149),
        exponent => (bits & MANTISSA_4 | 1 << 23, exponent as i32 - 150),
    };
    let print = |digits: Option<usize>| match digits {
        Some(digits) => format!("{:.*e}", digits - 1, value.abs()),
        None => format!("{:e}", value.abs()),
    };
    let reads_back = |text: &str| text.parse() == Ok(value.abs());
    let digits = shortest(mantissa, exponent, &print, &reads_back);
    float(out, value.is_sign_negative(), &digits, 6);
}

const MANTISSA_8: u64 = (1 << 52) - 1;
const MANTISSA_4: u64 = (1 << 23) - 1;
/// Digits that tell any two doubles apart.
const DIGITS_MAX: usize = 17;

fn special(out: &mut Vec<u8>, value: f64) -> bool {
    let text = match value {
        _ if value.is_nan() => "NaN",
        f64::INFINITY => "Infinity",
        f64::NEG_INFINITY => "-Infinity",
        _ if value == 0.0 && value.is_sign_negative() => "-0",
        0.0 => "0",
        _ => return false,
    };
    out.extend_from_slice(text.as_bytes());
    true
}

/// Digits and decimal exponent of the first one.
struct Digits {
    digits: String,
    exponent: i32,
}

/// The server's printer differs from Rust's in two things. Text that lies exactly half-way between
/// two floats is not used, although reading it back would give the even one. And of two texts that
/// are equally near to the float, the one with the even last digit is used.
fn shortest(
    mantissa: u64,
    exponent: i32,
    print: &dyn Fn(Option<usize>) -> String,
    reads_back: &dyn Fn(&str) -> bool,
) -> Digits {
    let first = print(None);
    let digits = parse(&first);
    let is_even = mantissa.is_multiple_of(2);
    if !(is_even && is_halfway(&digits, mantissa, exponent)) {
        return even_of_two(digits, mantissa, exponent, reads_back);
    }
    for count in digits.digits.len() + 1..=DIGITS_MAX {
        let text = print(Some(count));
        let longer = parse(&text);
        if reads_back(&text) && !is_halfway(&longer, mantissa, exponent) {
            return longer;
        }
    }
    digits
}

/// `1.25e-7`, without trailing zeros in the digits.
fn parse(text: &str) -> Digits {
    let (digits, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let digits = digits.replace('.', "");
    let trimmed = digits.trim_end_matches('0');
    let digits = if trimmed.is_empty() { "0" } else { trimmed }.to_owned();
    Digits { digits, exponent: exponent.parse().unwrap_or(0) }
}

/// Whether the decimal is exactly half-way between the float and one of its neighbours.
fn is_halfway(decimal: &Digits, mantissa: u64, exponent: i32) -> bool {
    let Ok(digits) = decimal.digits.parse::<u128>() else { return false };
    let power = decimal.exponent - (decimal.digits.len() as i32 - 1);
    let above = (2 * mantissa + 1, exponent - 1);
    // Below a power of two the neighbour is at half the distance.
    let below = match mantissa.is_power_of_two() {
        true => (4 * mantissa - 1, exponent - 2),
        false => (2 * mantissa - 1, exponent - 1),
    };
    [above, below].into_iter().any(|(half, two)| equals(digits, power, u128::from(half), two))
}

/// The neighbour with an even last digit, when the float lies exactly between the two. Below a
/// power of two the neighbour may stand for another float.
fn even_of_two(
    decimal: Digits,
    mantissa: u64,
    exponent: i32,
    reads_back: &dyn Fn(&str) -> bool,
) -> Digits {
    let Ok(digits) = decimal.digits.parse::<u128>() else { return decimal };
    if digits.is_multiple_of(2) {
        return decimal;
    }
    let power = decimal.exponent - (decimal.digits.len() as i32 - 1);
    let zeros = mantissa.trailing_zeros();
    let (odd, two) = (u128::from(mantissa >> zeros), exponent + zeros as i32 + 1);
    let other = [digits - 1, digits + 1]
        .into_iter()
        .find(|other| equals(digits + other, power, odd, two))
        .filter(|other| other.to_string().len() == decimal.digits.len())
        .filter(|other| reads_back(&format!("{other}e{power}")));
    match other.map(|other| other.to_string()) {
        Some(other) => Digits { digits: other.trim_end_matches('0').to_owned(), ..decimal },
        None => decimal,
    }
}

/// digits · 10^power = half · 2^two, exactly; half is odd.
fn equals(digits: u128, power: i32, half: u128, two: i32) -> bool {
    // Beyond this neither side can be a float's half: 5^28 has 66 bits.
    const FIVES_MAX: u32 = 27;
    let fives = power.unsigned_abs();
    if fives > FIVES_MAX {
        return false;
    }
    let five = 5_u128.pow(fives);
    let (left, right) = if power >= 0 { (digits * five, half) } else { (digits, half * five) };
    let twos = left.trailing_zeros() as i32;
    left >> twos == right && twos + power == two
}

/// Plain between 1e-4 and 10^`plain_below`, else scientific with two digits of exponent at least.
fn float(
    out: &mut Vec<u8>,
    negative: bool,
    Digits { digits, exponent }: &Digits,
    plain_below: i32,
) {
    if negative {
        out.push(b'-');
    }
    let exponent = *exponent;
    if !(-4..plain_below).contains(&exponent) {
        let (first, rest) = digits.split_at(1);
        let dot = if rest.is_empty() { "" } else { "." };
        let sign = if exponent < 0 { '-' } else { '+' };
        return put(out, format_args!("{first}{dot}{rest}e{sign}{:02}", exponent.unsigned_abs()));
    }
    if exponent < 0 {
        let zeros = "0".repeat(exponent.unsigned_abs() as usize - 1);
        return put(out, format_args!("0.{zeros}{digits}"));
    }
    let whole = exponent as usize + 1;
    match digits.split_at_checked(whole) {
        Some((whole, "")) => put(out, whole),
        Some((whole, rest)) => put(out, format_args!("{whole}.{rest}")),
        None => put(out, format_args!("{digits}{}", "0".repeat(whole - digits.len()))),
    }
}

/// Count of digits to the base of 10000, the weight of the first, sign, digits after the decimal
/// point.
///
/// `numeric_send` and `get_str_from_var` of the server.
pub(super) fn numeric(out: &mut Vec<u8>, read: &mut Read<'_>) -> Result<()> {
    const NEGATIVE: u16 = 0x4000;
    let count = read.u16()?;
    let weight = i32::from(read.i16()?);
    let sign = read.u16()?;
    let scale = usize::from(read.u16()?);
    match sign {
        0 => {}
        NEGATIVE => out.push(b'-'),
        0xC000 => return special_numeric(out, "NaN"),
        0xD000 => return special_numeric(out, "Infinity"),
        0xF000 => return special_numeric(out, "-Infinity"),
        _ => return Err(wrong("numeric")),
    }
    let digits: Vec<u16> = (0..count).map(|_| read.u16()).collect::<Result<_>>()?;
    if digits.iter().any(|digit| *digit > 9999) {
        return Err(wrong("numeric"));
    }
    let at = |place: i32| {
        let digit = usize::try_from(place).ok().and_then(|place| digits.get(place));
        digit.copied().unwrap_or(0)
    };
    if weight < 0 {
        out.push(b'0');
    } else {
        put(out, at(0));
        (1..=weight).for_each(|place| put(out, format_args!("{:04}", at(place))));
    }
    if scale > 0 {
        out.push(b'.');
        let end = out.len() + scale;
        let mut place = weight + 1;
        while out.len() < end {
            put(out, format_args!("{:04}", at(place)));
            place += 1;
        }
        out.truncate(end);
    }
    Ok(())
}

fn special_numeric(out: &mut Vec<u8>, text: &str) -> Result<()> {
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

/// Hundredths, as `cash_out` writes them under lc_monetary C: `-$1,234.56`.
pub(super) fn money(out: &mut Vec<u8>, hundredths: i64) {
    if hundredths < 0 {
        out.push(b'-');
    }
    let whole = (hundredths.unsigned_abs() / 100).to_string();
    out.push(b'$');
    for (index, digit) in whole.bytes().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            out.push(b',');
        }
        out.push(digit);
    }
    put(out, format_args!(".{:02}", hundredths.unsigned_abs() % 100));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eight(value: f64) -> String {
        let mut out = Vec::new();
        float8(&mut out, value);
        String::from_utf8(out).unwrap()
    }

    fn four(value: f32) -> String {
        let mut out = Vec::new();
        float4(&mut out, value);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn floats_are_written_as_the_server_writes_them() {
        for (value, text) in [
            (0.1 + 0.2, "0.30000000000000004"),
            (1e-300, "1e-300"),
            (1e15, "1e+15"),
            (123_456_789_012_345.0, "123456789012345"),
            (1e-5, "1e-05"),
            (0.0001, "0.0001"),
            (-1.5, "-1.5"),
            (1200.0, "1200"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e+308"),
            (-0.0, "-0"),
            (2_f64.powi(-24), "5.960464477539063e-08"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
            // Half-way between two floats lies 1e23 exactly.
            (f64::from_bits(0x44B5_2D02_C7E1_4AF6), "9.999999999999999e+22"),
        ] {
            assert_eq!(eight(value), text);
        }
        for (value, text) in [
            (1.1_f32, "1.1"),
            (1e6, "1e+06"),
            (123_456.0, "123456"),
            (f32::MIN_POSITIVE, "1.1754944e-38"),
            (1_830_463_232.0, "1.8304632e+09"),
            (f32::from_bits(0x4A02_6849), "2.1365942e+06"),
        ] {
            assert_eq!(four(value), text);
        }
    }

    #[test]
    fn what_is_written_is_read_back_as_the_same_float() {
        let mut dice = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let value = f64::from_bits(dice.u64(..));
            if value.is_finite() {
                assert_eq!(eight(value).parse::<f64>().unwrap().to_bits(), value.to_bits());
            }
            let value = f32::from_bits(dice.u32(..));
            if value.is_finite() {
                assert_eq!(four(value).parse::<f32>().unwrap().to_bits(), value.to_bits());
            }
        }
    }
}
