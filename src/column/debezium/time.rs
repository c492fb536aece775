//! Dates, times and intervals.
//!
//! What Debezium writes for infinity is a number that Java's driver has for it, so a consumer has
//! to know these. They are named here.

use std::io::Write as _;

use super::{IntervalHandling, TimePrecision, write_text};
use crate::column::{instant, unexpected, write_string};
use crate::error::{Error, Result};

/// What a number counts; or a string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Days,
    Milliseconds,
    Microseconds,
    Nanoseconds,
    Iso,
}

/// `timestamp` infinity, in microseconds since 1970 (`PGStatement.DATE_POSITIVE_INFINITY`).
const INFINITY_US: i64 = 9_223_372_036_825_200_000;
const MINUS_INFINITY_US: i64 = -9_223_372_036_832_400_000;
/// `date` infinity, in days since 1970, and as an ISO string.
const INFINITY_DAYS: (i64, &str) = (2_146_033_979, "+5877611-06-21Z");
const MINUS_INFINITY_DAYS: (i64, &str) = (-2_147_472_691, "-5877611-06-22Z");
/// The same moments as ISO strings.
const INFINITY_ISO: &str = "+294247-01-10T04:00:25.2Z";
const MINUS_INFINITY_ISO: &str = "-290308-12-21T19:59:27.6Z";

const US_PER_SECOND: i64 = 1_000_000;
const US_PER_DAY: i64 = 86_400 * US_PER_SECOND;

/// Digits after the decimal point of a second; without a type modifier there are six.
pub(super) fn digits(modifier: i32) -> u8 {
    u8::try_from(modifier).ok().filter(|digits| *digits <= 6).unwrap_or(6)
}

impl Unit {
    pub(super) fn of_date(precision: TimePrecision) -> Self {
        match precision {
            TimePrecision::IsoString => Unit::Iso,
            TimePrecision::Adaptive
            | TimePrecision::AdaptiveTimeMicroseconds
            | TimePrecision::Connect
            | TimePrecision::Microseconds
            | TimePrecision::Nanoseconds => Unit::Days,
        }
    }

    pub(super) fn of_time(precision: TimePrecision, modifier: i32) -> Self {
        match precision {
            TimePrecision::AdaptiveTimeMicroseconds => Unit::Microseconds,
            precision => Self::of_timestamp(precision, modifier),
        }
    }

    pub(super) fn of_timestamp(precision: TimePrecision, modifier: i32) -> Self {
        match precision {
            TimePrecision::Adaptive | TimePrecision::AdaptiveTimeMicroseconds => {
                if digits(modifier) <= 3 { Unit::Milliseconds } else { Unit::Microseconds }
            }
            TimePrecision::Connect => Unit::Milliseconds,
            TimePrecision::Microseconds => Unit::Microseconds,
            TimePrecision::Nanoseconds => Unit::Nanoseconds,
            TimePrecision::IsoString => Unit::Iso,
        }
    }

    fn write(self, out: &mut Vec<u8>, us: i64) -> Result<()> {
        let number = match self {
            Unit::Days => us.div_euclid(US_PER_DAY),
            Unit::Milliseconds => us.div_euclid(1000),
            Unit::Microseconds => us,
            Unit::Nanoseconds => us.checked_mul(1000).ok_or_else(|| {
                Error::event("a timestamp is too far from 1970 to be counted in nanoseconds")
                    .hint("set debezium.time_precision = \"adaptive\" for this route")
            })?,
            Unit::Iso => unreachable!("its callers write strings"),
        };
        // Writing to a vector cannot fail.
        let _ = write!(out, "{number}");
        Ok(())
    }
}

pub(super) fn write_date(out: &mut Vec<u8>, text: &[u8], unit: Unit) -> Result<()> {
    let infinite = match text {
        b"infinity" => Some(INFINITY_DAYS),
        b"-infinity" => Some(MINUS_INFINITY_DAYS),
        _ => None,
    };
    match (infinite, unit) {
        (Some((_, iso)), Unit::Iso) => write_string(out, iso),
        (Some((days, _)), _) => {
            let _ = write!(out, "{days}");
        }
        (None, Unit::Iso) => {
            let date = Date::parse(text)?;
            write_string(out, &format!("{}Z", date.iso()));
        }
        (None, _) => {
            let Date { year, month, day } = Date::parse(text)?;
            let _ = write!(out, "{}", instant::days_since_1970(year, month, day));
        }
    }
    Ok(())
}

pub(super) fn write_time(out: &mut Vec<u8>, text: &[u8], unit: Unit) -> Result<()> {
    let us = clock_us(text).ok_or_else(|| unexpected(text, "a time"))?;
    match unit {
        Unit::Iso => write_string(out, &format!("{}Z", iso_clock(us))),
        unit => unit.write(out, us)?,
    }
    Ok(())
}

pub(super) fn write_timestamp(out: &mut Vec<u8>, text: &[u8], unit: Unit) -> Result<()> {
    let infinite = match text {
        b"infinity" => Some((INFINITY_US, INFINITY_ISO, i64::MAX)),
        b"-infinity" => Some((MINUS_INFINITY_US, MINUS_INFINITY_ISO, i64::MIN)),
        _ => None,
    };
    match (infinite, unit) {
        (Some((_, iso, _)), Unit::Iso) => write_string(out, iso),
        (Some((_, _, ns)), Unit::Nanoseconds) => {
            let _ = write!(out, "{ns}");
        }
        (Some((us, ..)), unit) => unit.write(out, us)?,
        (None, Unit::Iso) => write_iso(out, text, None)?,
        (None, unit) => {
            let (date, clock) = split(text)?;
            let Date { year, month, day } = date;
            let days = instant::days_since_1970(year, month, day);
            // The last of the year 294276 is beyond 64 bits since 1970: the end of the range.
            unit.write(out, days.saturating_mul(US_PER_DAY).saturating_add(clock))?;
        }
    }
    Ok(())
}

/// `2024-01-02T03:04:05.120000Z`, with as many digits as the column has; infinity is a word.
pub(super) fn write_timestamptz(out: &mut Vec<u8>, text: &[u8], digits: u8) -> Result<()> {
    if matches!(text, b"infinity" | b"-infinity") {
        return write_text(out, text);
    }
    write_iso(out, text, Some(digits))
}

fn write_iso(out: &mut Vec<u8>, text: &[u8], digits: Option<u8>) -> Result<()> {
    let (date, us) = split(text)?;
    let mut clock = iso_clock(us);
    if let Some(digits) = digits.map(usize::from).filter(|digits| *digits > 0) {
        if clock.len() == "00:00:00".len() {
            clock.push('.');
        }
        let wanted = "00:00:00.".len() + digits;
        clock.extend(std::iter::repeat_n('0', wanted.saturating_sub(clock.len())));
    }
    write_string(out, &format!("{}T{clock}Z", date.iso()));
    Ok(())
}

/// In UTC.
pub(super) fn write_timetz(out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
    let wrong = || unexpected(text, "a time with a zone");
    let sign = text.iter().rposition(|byte| matches!(byte, b'+' | b'-')).ok_or_else(wrong)?;
    let (clock, zone) = text.split_at(sign);
    let us = clock_us(clock).ok_or_else(wrong)?;
    let mut offset = 0;
    for (part, seconds) in zone[1..].split(|byte| *byte == b':').zip([3600, 60, 1]) {
        offset += number(part).ok_or_else(wrong)? * seconds * US_PER_SECOND;
    }
    let offset = if zone[0] == b'-' { -offset } else { offset };
    let shown = match (us, offset) {
        // The end of the day does not become the start of the next one.
        (US_PER_DAY, 0) => iso_clock(US_PER_DAY),
        _ => iso_clock((us - offset).rem_euclid(US_PER_DAY)),
    };
    write_string(out, &format!("{shown}Z"));
    Ok(())
}

/// `P1Y2M3DT4H5M6.78S`, as the server writes it; parts that are zero are not there.
pub(super) fn write_interval(
    out: &mut Vec<u8>,
    text: &[u8],
    handling: IntervalHandling,
) -> Result<()> {
    const DAYS_PER_MONTH: f64 = 365.25 / 12.0;
    let wrong = || unexpected(text, "an interval that Debezium has a form for");
    let as_text = std::str::from_utf8(text).map_err(|_| wrong())?;
    let rest = as_text.strip_prefix('P').ok_or_else(wrong)?;
    let (date, time) = rest.split_once('T').unwrap_or((rest, ""));
    let ([years, months, days], [hours, minutes]) = ([0_i64; 3], [0_i64; 2]);
    let mut date_parts = [("Y", years), ("M", months), ("D", days)];
    let mut time_parts = [("H", hours), ("M", minutes)];
    let date_rest = take_parts(date, &mut date_parts).ok_or_else(wrong)?;
    let time_rest = take_parts(time, &mut time_parts).ok_or_else(wrong)?;
    let seconds = match time_rest {
        "" => "0",
        rest => rest.strip_suffix('S').ok_or_else(wrong)?,
    };
    let whole_seconds: f64 = seconds.parse().map_err(|_| wrong())?;
    if !date_rest.is_empty() {
        return Err(wrong());
    }
    let [(_, years), (_, months), (_, days)] = date_parts;
    let [(_, hours), (_, minutes)] = time_parts;
    match handling {
        IntervalHandling::String => {
            let text = format!("P{years}Y{months}M{days}DT{hours}H{minutes}M{seconds}S");
            write_string(out, &text);
        }
        IntervalHandling::Numeric => {
            // In doubles and in this order, as Debezium does it: the last digits hang on it.
            let days = (years * 12 + months) as f64 * DAYS_PER_MONTH + days as f64;
            let minutes = (days * 24.0 + hours as f64) * 60.0 + minutes as f64;
            let us = (minutes * 60.0 + whole_seconds) * 1e6;
            let _ = write!(out, "{}", us as i64);
        }
    }
    Ok(())
}

/// Reads the numbers before these letters, each of which may be absent; gives back what is left.
fn take_parts<'a>(mut text: &'a str, parts: &mut [(&str, i64)]) -> Option<&'a str> {
    for (letter, value) in parts {
        if let Some((number, rest)) = text.split_once(*letter)
            && !number.contains(['Y', 'M', 'D', 'H', 'S'])
        {
            *value = number.parse().ok()?;
            text = rest;
        }
    }
    Some(text)
}

/// A day; the year before 1 is 0.
struct Date {
    year: i64,
    month: i64,
    day: i64,
}

impl Date {
    /// `2024-01-02`, `0044-03-15 BC`.
    fn parse(text: &[u8]) -> Result<Self> {
        let (text, before_christ) = match text.strip_suffix(b" BC") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let mut parts = text.split(|byte| *byte == b'-');
        let mut next = || parts.next().and_then(number);
        let (Some(year), Some(month), Some(day)) = (next(), next(), next()) else {
            return Err(unexpected(text, "a date"));
        };
        let year = if before_christ { 1 - year } else { year };
        Ok(Self { year, month, day })
    }

    /// Years beyond four digits have a sign.
    fn iso(&self) -> String {
        let Self { year, month, day } = self;
        match *year {
            year if year < 0 => format!("-{:04}-{month:02}-{day:02}", -year),
            year if year > 9999 => format!("+{year}-{month:02}-{day:02}"),
            year => format!("{year:04}-{month:02}-{day:02}"),
        }
    }
}

/// `2024-01-02 03:04:05.12`, with or without `+00`, perhaps with ` BC`: the day and the clock.
fn split(text: &[u8]) -> Result<(Date, i64)> {
    let wrong = || unexpected(text, "a timestamp in UTC");
    let space = text.iter().position(|byte| *byte == b' ').ok_or_else(wrong)?;
    let (date, rest) = (&text[..space], &text[space + 1..]);
    let (rest, era) = match rest.strip_suffix(b" BC") {
        Some(rest) => (rest, &b" BC"[..]),
        None => (rest, &b""[..]),
    };
    let clock = rest.strip_suffix(b"+00").unwrap_or(rest);
    let us = clock_us(clock).ok_or_else(wrong)?;
    Ok((Date::parse(&[date, era].concat())?, us))
}

/// `03:04:05.12` in microseconds.
fn clock_us(text: &[u8]) -> Option<i64> {
    let (clock, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &text[..0]),
    };
    let mut parts = clock.split(|byte| *byte == b':');
    let mut next = || parts.next().and_then(number);
    let (hours, minutes, seconds) = (next()?, next()?, next()?);
    let us = match fraction {
        [] => 0,
        fraction if fraction.len() <= 6 => {
            number(fraction)? * 10_i64.pow(6 - fraction.len() as u32)
        }
        _ => return None,
    };
    Some((hours * 3600 + minutes * 60 + seconds) * US_PER_SECOND + us)
}

/// With as few digits after the decimal point as there are.
fn iso_clock(us: i64) -> String {
    let (seconds, us) = (us / US_PER_SECOND, us % US_PER_SECOND);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let clock = format!("{hours:02}:{minutes:02}:{seconds:02}");
    match us {
        0 => clock,
        us => format!("{clock}.{us:06}").trim_end_matches('0').to_owned(),
    }
}

/// Up to nine digits.
fn number(digits: &[u8]) -> Option<i64> {
    let is_number = (1..=9).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
    is_number.then(|| digits.iter().fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0')))
}
