//! A timestamptz as a number. Pure.

/// Microseconds from 1970-01-01 00:00 UTC to the instant that `text` names, in the form of a
/// session with DateStyle ISO and TimeZone UTC: `2024-01-02 03:04:05.123456+00`. The infinities,
/// and what lies beyond, are the ends of the range. Absent for anything else.
pub fn parse_us(text: &[u8]) -> Option<i64> {
    match (text.strip_suffix(b"+00"), text) {
        (Some(local), _) => ordinary(local).or_else(|| rare(local, false)),
        (None, b"infinity") => Some(i64::MAX),
        (None, b"-infinity") => Some(i64::MIN),
        (None, _) => rare(text.strip_suffix(b"+00 BC")?, true),
    }
}

/// The same of a timestamp without time zone, which is taken for UTC.
pub fn parse_local_us(text: &[u8]) -> Option<i64> {
    match (ordinary(text), text) {
        (Some(us), _) => Some(us),
        (None, b"infinity" | b"-infinity") => parse_us(text),
        (None, _) => match text.strip_suffix(b" BC") {
            Some(text) => rare(text, true),
            None => rare(text, false),
        },
    }
}

/// The same of a date whose year has four digits, at its beginning.
pub fn parse_date_us(text: &[u8]) -> Option<i64> {
    let mut midnight = *b"0000-00-00 00:00:00";
    midnight[..10].copy_from_slice(text.first_chunk::<10>().filter(|_| text.len() == 10)?);
    ordinary(&midnight)
}

/// Years with four digits: almost every timestamp there is, here without its zone. On the path of
/// every event, so it checks for non-digits only once, at the end.
fn ordinary(text: &[u8]) -> Option<i64> {
    let (date, rest) = text.split_first_chunk::<19>()?;
    let separators = [date[4], date[7], date[10], date[13], date[16]];
    if separators != *b"-- ::" {
        return None;
    }
    let mut only_digits = true;
    let mut number = |digits: &[u8]| {
        digits.iter().fold(0_i64, |sum, digit| {
            only_digits &= digit.is_ascii_digit();
            sum * 10 + i64::from(digit.wrapping_sub(b'0'))
        })
    };
    let (year, month, day) = (number(&date[..4]), number(&date[5..7]), number(&date[8..10]));
    let clock = [&date[11..13], &date[14..16], &date[17..]].map(&mut number);
    let us = match rest {
        [] => 0,
        [b'.', digits @ ..] => match digits.first_chunk::<6>() {
            Some(all) if digits.len() == 6 => number(all),
            _ if (1..6).contains(&digits.len()) => {
                number(digits) * 10_i64.pow(6 - digits.len() as u32)
            }
            _ => return None,
        },
        _ => return None,
    };
    let [hours, minutes, seconds] = clock;
    let seconds =
        days_since_1970(year, month, day) * 86_400 + hours * 3600 + minutes * 60 + seconds;
    only_digits.then_some(seconds * 1_000_000 + us)
}

/// Days of the proleptic Gregorian calendar, which is Postgres' too: era by era of 400 years, with
/// March as the first month, so that the leap day is a year's last.
pub(super) fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + day_of_year - 719_468
}

/// `12024-01-02 03:04:05`, and years before Christ.
fn rare(text: &[u8], before_christ: bool) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let (year, rest) = text.split_once('-')?;
    let year: i64 = year.parse().ok()?;
    // The year before 1 is 1 BC. Whole eras of 400 years have the same days, so only they move.
    let year = if before_christ { 1 - year } else { year };
    let shifted = year.rem_euclid(400) + 2000;
    let us = ordinary(format!("{shifted:04}-{rest}").as_bytes())?;
    let eras = (year - shifted) / 400;
    Some(us.saturating_add(eras.saturating_mul(146_097 * 86_400 * 1_000_000)))
}

#[cfg(test)]
mod tests {
    use super::{parse_date_us, parse_local_us, parse_us};

    #[test]
    fn timestamps_are_the_microseconds_that_postgres_counts() {
        for (text, us) in [
            ("1970-01-01 00:00:00+00", 0),
            ("2000-01-01 00:00:00+00", 946_684_800_000_000),
            ("2024-02-29 23:59:59.9+00", 1_709_251_199_900_000),
            ("2024-01-02 03:04:05.123456+00", 1_704_164_645_123_456),
            ("1969-12-31 23:59:59.999999+00", -1),
            ("0001-01-01 00:00:00+00", -62_135_596_800_000_000),
            ("0001-12-31 00:00:00+00 BC", -62_135_683_200_000_000),
            ("4714-11-24 00:00:00+00 BC", -210_866_803_200_000_000),
            ("294276-12-31 23:59:59.999999+00", i128::from(i64::MAX)),
            ("12024-01-02 03:04:05+00", 317_273_684_645_000_000),
        ] {
            assert_eq!(parse_us(text.as_bytes()).map(i128::from), Some(us), "{text}");
            let local = text.replace("+00", "");
            assert_eq!(parse_local_us(local.as_bytes()).map(i128::from), Some(us), "{local}");
        }
        assert_eq!(parse_us(b"infinity"), Some(i64::MAX));
        assert_eq!(parse_local_us(b"-infinity"), Some(i64::MIN));
        assert_eq!(parse_date_us(b"2024-01-02"), parse_us(b"2024-01-02 00:00:00+00"));
        for wrong in ["2024-1-02", "2024-01-02 ", "infinity", "12024-01-02"] {
            assert_eq!(parse_date_us(wrong.as_bytes()), None, "{wrong}");
        }
        for wrong in ["", "2024-01-02", "2024-01-02 03:04:05", "2024-01-02 03:04:05+01", "x"] {
            assert_eq!(parse_us(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
