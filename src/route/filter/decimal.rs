//! Decimal numbers compared by their digits: `12.50` equals `12.5`, and no digit is lost. Pure.
//!
//! As in Postgres, `NaN` equals itself and is greater than every number.

use std::cmp::Ordering;

/// Largest exponent that is read: those of Postgres' types are smaller.
const EXPONENT_MAX: i64 = 200_000;

/// A number: sign, digits without leading and trailing zeros, and the power of ten that the first
/// digit counts.
#[derive(Debug, PartialEq, Eq)]
enum Decimal<Digits> {
    NegativeInfinity,
    Finite { negative: bool, power: i64, whole: Digits, fraction: Digits },
    Infinity,
    NaN,
}

/// A number that is kept.
pub(super) struct Number(Decimal<Box<[u8]>>);

impl Number {
    /// Absent for what is not a number.
    pub(super) fn read(text: &str) -> Option<Self> {
        Some(Self(match parse(text)? {
            Decimal::NegativeInfinity => Decimal::NegativeInfinity,
            Decimal::Finite { negative, power, whole, fraction } => {
                Decimal::Finite { negative, power, whole: whole.into(), fraction: fraction.into() }
            }
            Decimal::Infinity => Decimal::Infinity,
            Decimal::NaN => Decimal::NaN,
        }))
    }

    /// How the number with this text follows it; absent for what is not a number.
    pub(super) fn followed_by(&self, text: &str) -> Option<Ordering> {
        Some(order(&parse(text)?, &self.0))
    }

    /// Whether it has no fraction, and is finite.
    pub(super) fn is_whole(&self) -> bool {
        let Decimal::Finite { power, whole, fraction, .. } = &self.0 else { return false };
        let digits = whole.len() + fraction.len();
        digits == 0 || i64::try_from(digits).is_ok_and(|digits| digits <= *power)
    }
}

/// How the numbers with these texts follow each other; absent if one is not a number.
pub(super) fn compare(one: &str, other: &str) -> Option<Ordering> {
    Some(order(&parse(one)?, &parse(other)?))
}

fn rank<Digits>(decimal: &Decimal<Digits>) -> u8 {
    match decimal {
        Decimal::NegativeInfinity => 0,
        Decimal::Finite { .. } => 1,
        Decimal::Infinity => 2,
        Decimal::NaN => 3,
    }
}

fn order<A: AsRef<[u8]>, B: AsRef<[u8]>>(one: &Decimal<A>, other: &Decimal<B>) -> Ordering {
    let (
        Decimal::Finite { negative, power, whole, fraction },
        Decimal::Finite {
            negative: negative_2,
            power: power_2,
            whole: whole_2,
            fraction: fraction_2,
        },
    ) = (one, other)
    else {
        return rank(one).cmp(&rank(other));
    };
    if negative != negative_2 {
        return negative_2.cmp(negative);
    }
    let digits = whole.as_ref().iter().chain(fraction.as_ref());
    let digits_2 = whole_2.as_ref().iter().chain(fraction_2.as_ref());
    let larger = power.cmp(power_2).then_with(|| digits.cmp(digits_2));
    if *negative { larger.reverse() } else { larger }
}

fn parse(text: &str) -> Option<Decimal<&[u8]>> {
    match text {
        "NaN" => return Some(Decimal::NaN),
        "Infinity" => return Some(Decimal::Infinity),
        "-Infinity" => return Some(Decimal::NegativeInfinity),
        _ => {}
    }
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, exponent) = match text.split_once(['e', 'E']) {
        Some((digits, exponent)) => (digits, exponent.parse::<i64>().ok()?),
        None => (text, 0),
    };
    if exponent.unsigned_abs() > EXPONENT_MAX.unsigned_abs() {
        return None;
    }
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || whole.len() + fraction.len() == 0 {
        return None;
    }
    let (whole, fraction) = (trim_start(whole.as_bytes()), trim_end(fraction.as_bytes()));
    if !whole.is_empty() {
        let power = whole.len() as i64 + exponent;
        // Zeros at the end of a whole number are no digits of their own.
        let whole = if fraction.is_empty() { trim_end(whole) } else { whole };
        return Some(Decimal::Finite { negative, power, whole, fraction });
    }
    let digits = trim_start(fraction);
    if digits.is_empty() {
        let (power, none) = (i64::MIN, &[][..]);
        return Some(Decimal::Finite { negative: false, power, whole: none, fraction: none });
    }
    let power = exponent - (fraction.len() - digits.len()) as i64;
    Some(Decimal::Finite { negative, power, whole: &[], fraction: digits })
}

fn trim_start(digits: &[u8]) -> &[u8] {
    let zeros = digits.iter().take_while(|digit| **digit == b'0').count();
    &digits[zeros..]
}

fn trim_end(digits: &[u8]) -> &[u8] {
    let zeros = digits.iter().rev().take_while(|digit| **digit == b'0').count();
    &digits[..digits.len() - zeros]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_compared_by_their_digits() {
        let ordered = [
            "-Infinity",
            "-1e200",
            "-9007199254740993",
            "-9007199254740992",
            "-1.5",
            "-1.4999",
            "-1e-7",
            "0",
            "0.00000001",
            "1e-7",
            "0.1",
            "0.10000000000000000001",
            "1",
            "1.5",
            "10",
            "9007199254740992",
            "9007199254740993",
            "1e+20",
            "100000000000000000001",
            "Infinity",
            "NaN",
        ];
        for (i, one) in ordered.iter().enumerate() {
            for (j, other) in ordered.iter().enumerate() {
                assert_eq!(compare(one, other), Some(i.cmp(&j)), "{one} and {other}");
                let kept = Number::read(other).unwrap();
                assert_eq!(kept.followed_by(one), Some(i.cmp(&j)), "{one} and {other}");
            }
        }
    }

    #[test]
    fn a_number_is_whole_however_it_is_written() {
        for (text, is_whole) in [
            ("5", true),
            ("-500", true),
            ("5.00", true),
            ("0.0", true),
            ("1e3", true),
            ("120e-1", true),
            ("1.25e2", true),
            ("1.5", false),
            ("0.001", false),
            ("125e-2", false),
            ("1.25e1", false),
            ("Infinity", false),
            ("NaN", false),
        ] {
            assert_eq!(Number::read(text).unwrap().is_whole(), is_whole, "{text}");
        }
    }

    #[test]
    fn equal_numbers_may_be_written_otherwise_and_other_texts_are_no_numbers() {
        for (one, other) in [
            ("12.50", "12.5"),
            ("0", "-0.00"),
            ("007", "7"),
            ("1e3", "1000"),
            ("1.2E+2", "120.0"),
            ("+5", "5"),
            (".5", "0.5"),
            ("100e-2", "1"),
        ] {
            assert_eq!(compare(one, other), Some(Ordering::Equal), "{one} and {other}");
        }
        // The last is one that has no absolute value in 64 bits.
        let least = format!("1e{}", i64::MIN);
        for text in ["", "-", ".", "1.2.3", "abc", "1e", "1e9999999", "0x10", "$1.00", "1 ", &least]
        {
            assert_eq!(compare(text, "1"), None, "{text:?}");
        }
    }
}
