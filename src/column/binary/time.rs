//! Dates, times and intervals as the server writes them: ISO, UTC, IntervalStyle iso_8601.

use super::put;

const US_PER_SECOND: i64 = 1_000_000;
const US_PER_DAY: i64 = 86_400 * US_PER_SECOND;
/// Days from year 0, March 1 (proleptic Gregorian) to 2000-01-01.
const DAYS_TO_2000: i64 = 730_425;

/// Days since 2000-01-01; the ends of the range mean infinity.
pub(super) fn date(out: &mut Vec<u8>, days: i32) {
    match days {
        i32::MAX => put(out, "infinity"),
        i32::MIN => put(out, "-infinity"),
        days => {
            let is_bc = day(out, i64::from(days));
            put(out, if is_bc { " BC" } else { "" });
        }
    }
}

/// Microseconds since 2000-01-01; `zone` comes behind the time.
pub(super) fn timestamp(out: &mut Vec<u8>, us: i64, zone: &str) {
    match us {
        i64::MAX => put(out, "infinity"),
        i64::MIN => put(out, "-infinity"),
        us => {
            let is_bc = day(out, us.div_euclid(US_PER_DAY));
            out.push(b' ');
            time(out, us.rem_euclid(US_PER_DAY));
            put(out, zone);
            put(out, if is_bc { " BC" } else { "" });
        }
    }
}

/// Writes year, month and day; returns whether the year is before Christ.
///
/// <https://howardhinnant.github.io/date_algorithms.html#civil_from_days>
fn day(out: &mut Vec<u8>, days_since_2000: i64) -> bool {
    const DAYS_PER_ERA: i64 = 146_097;
    let days = days_since_2000 + DAYS_TO_2000;
    let era = days.div_euclid(DAYS_PER_ERA);
    let of_era = days.rem_euclid(DAYS_PER_ERA);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    // There is no year 0: it is 1 BC.
    let shown = if year > 0 { year } else { 1 - year };
    put(out, format_args!("{shown:04}-{month:02}-{day:02}"));
    year <= 0
}

/// Microseconds since midnight; 24:00:00 is allowed.
pub(super) fn time(out: &mut Vec<u8>, us: i64) {
    let (seconds, fraction) = (us.div_euclid(US_PER_SECOND), us.rem_euclid(US_PER_SECOND));
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    put(out, format_args!("{hours:02}:{minutes:02}:{:02}", seconds % 60));
    push_fraction(out, fraction);
}

fn push_fraction(out: &mut Vec<u8>, us: i64) {
    if us != 0 {
        let digits = format!("{us:06}");
        put(out, format_args!(".{}", digits.trim_end_matches('0')));
    }
}

/// The zone is in seconds west of Greenwich.
pub(super) fn timetz(out: &mut Vec<u8>, us: i64, west: i32) {
    time(out, us);
    let (sign, seconds) = (if west > 0 { '-' } else { '+' }, west.unsigned_abs());
    put(out, format_args!("{sign}{:02}", seconds / 3600));
    if !seconds.is_multiple_of(3600) {
        put(out, format_args!(":{:02}", seconds / 60 % 60));
    }
    if !seconds.is_multiple_of(60) {
        put(out, format_args!(":{:02}", seconds % 60));
    }
}

/// `EncodeInterval` of the server, style iso_8601. From Postgres 17 there are infinite ones.
pub(super) fn interval(out: &mut Vec<u8>, us: i64, days: i32, months: i32) {
    match (us, days, months) {
        (i64::MAX, i32::MAX, i32::MAX) => return put(out, "infinity"),
        (i64::MIN, i32::MIN, i32::MIN) => return put(out, "-infinity"),
        (0, 0, 0) => return put(out, "PT0S"),
        _ => {}
    }
    let (seconds, fraction) = (us / US_PER_SECOND % 60, us % US_PER_SECOND);
    let months = i64::from(months);
    out.push(b'P');
    part(out, months / 12, 'Y');
    part(out, months % 12, 'M');
    part(out, i64::from(days), 'D');
    if us == 0 {
        return;
    }
    out.push(b'T');
    part(out, us / (3600 * US_PER_SECOND), 'H');
    part(out, us / (60 * US_PER_SECOND) % 60, 'M');
    if seconds != 0 || fraction != 0 {
        let sign = if us < 0 { "-" } else { "" };
        put(out, format_args!("{sign}{}", seconds.abs()));
        push_fraction(out, fraction.abs());
        out.push(b'S');
    }
}

fn part(out: &mut Vec<u8>, value: i64, unit: char) {
    if value != 0 {
        put(out, format_args!("{value}{unit}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn dates_reach_from_before_christ_to_infinity() {
        for (days, expected) in [
            (0, "2000-01-01"),
            (59, "2000-02-29"),
            (8825, "2024-02-29"),
            (-1, "1999-12-31"),
            (-730_119, "0001-01-01"),
            (-730_120, "0001-12-31 BC"),
            (-2_451_545, "4714-11-24 BC"),
            (2_145_031_948, "5874897-12-31"),
            (i32::MAX, "infinity"),
            (i32::MIN, "-infinity"),
        ] {
            assert_eq!(text(|out| date(out, days)), expected);
        }
        assert_eq!(text(|out| timestamp(out, -1, "+00")), "1999-12-31 23:59:59.999999+00");
        assert_eq!(text(|out| timestamp(out, i64::MIN, "+00")), "-infinity");
        assert_eq!(text(|out| time(out, US_PER_DAY)), "24:00:00");
        assert_eq!(text(|out| timetz(out, 1_500_000, -19_800)), "00:00:01.5+05:30");
        assert_eq!(text(|out| timetz(out, 0, 28_800)), "00:00:00-08");
    }

    #[test]
    fn intervals_are_iso_8601_with_a_sign_on_each_part() {
        for ((us, days, months), expected) in [
            ((0, 0, 0), "PT0S"),
            ((14_706_700_000, 3, 14), "P1Y2M3DT4H5M6.7S"),
            ((-14_706_700_000, 3, -1), "P-1M3DT-4H-5M-6.7S"),
            ((500_000, 0, 0), "PT0.5S"),
            ((-500_000, 0, 0), "PT-0.5S"),
            ((0, -1, 0), "P-1D"),
            ((i64::MAX, i32::MAX, i32::MAX), "infinity"),
        ] {
            assert_eq!(text(|out| interval(out, us, days, months)), expected);
        }
    }
}
