//! Keys with one value: names, numbers, words, durations such as `100ms` and sizes such as `16MiB`.
//!
//! A value that is not what it may be is reported with what is expected; the default stands in.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use super::section::Section;
use crate::message::SHORT_STRING_MAX;

/// Maximum length of a Postgres identifier, in bytes (`NAMEDATALEN` - 1).
const NAME_MAX: usize = 63;

impl Section<'_> {
    /// A name that goes into identifiers of Postgres and AMQP; `extra` are further characters.
    pub(super) fn name(&mut self, key: &'static str, default: &str, extra: &str) -> String {
        let text = self.text(key, default);
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c);
        if text.is_empty() || text.len() > NAME_MAX || !text.chars().all(fits) {
            let extra: Vec<String> = extra.chars().map(|c| format!("{c:?}")).collect();
            let extra = extra.join(", ");
            let expected = format!("1 to {NAME_MAX} characters from a to z, 0 to 9, {extra}");
            self.invalid(key, format!("{text:?}"), expected);
        }
        text
    }

    /// A name in AMQP, which must be there.
    pub(super) fn short_string(&mut self, key: &'static str) -> String {
        let text = self.text(key, "");
        if text.is_empty() || text.len() > SHORT_STRING_MAX {
            self.invalid(key, format!("{text:?}"), "1 to 255 bytes");
        }
        text
    }

    /// True or false.
    pub(super) fn flag(&mut self, key: &'static str, default: bool) -> bool {
        let Some(value) = self.ask(key) else { return default };
        value.get_ref().as_bool().unwrap_or_else(|| {
            self.wrong_type(key, value, "true or false, without quotes");
            default
        })
    }

    /// A whole number.
    pub(super) fn number<T>(&mut self, key: &'static str, default: T, range: RangeInclusive<T>) -> T
    where
        T: Copy + PartialOrd + Display + TryFrom<i128>,
    {
        let Some(value) = self.ask(key) else { return default };
        let Some(number) = value.get_ref().as_integer() else {
            self.wrong_type(key, value, "a whole number, without quotes");
            return default;
        };
        let parsed = i128::from_str_radix(number.as_str(), number.radix()).ok();
        let parsed = parsed.and_then(|number| T::try_from(number).ok());
        parsed.filter(|number| range.contains(number)).unwrap_or_else(|| {
            self.invalid(key, number, format!("{} to {}", range.start(), range.end()));
            default
        })
    }

    /// A duration such as `100ms`.
    pub(super) fn duration(
        &mut self,
        key: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let text = self.string(key, "a duration in quotes, such as \"30s\"");
        let Some(text) = text else { return default };
        parse_duration(&text).filter(|duration| range.contains(duration)).unwrap_or_else(|| {
            let [min, max] = [range.start(), range.end()].map(|limit| show_duration(*limit));
            let expected = format!("{min} to {max}, written as a number with ms, s, m, h or d");
            self.invalid(key, format!("{text:?}"), expected);
            default
        })
    }

    /// A size such as `16MiB`, in bytes.
    pub(super) fn size(
        &mut self,
        key: &'static str,
        default: usize,
        range: RangeInclusive<u64>,
    ) -> usize {
        let Some(text) = self.string(key, "a size in quotes, such as \"16MiB\"") else {
            return default;
        };
        let size = parse_size(&text).filter(|size| range.contains(size));
        size.and_then(|size| usize::try_from(size).ok()).unwrap_or_else(|| {
            let [min, max] = [range.start(), range.end()].map(|limit| show_size(*limit));
            let expected = format!("{min} to {max}, written as a number with B, KiB, MiB or GiB");
            self.invalid(key, format!("{text:?}"), expected);
            default
        })
    }

    /// One of a list of words; the first is the default.
    pub(super) fn word<T: Clone>(&mut self, key: &'static str, words: &[(&str, T)]) -> T {
        let default = || words[0].1.clone();
        let Some(text) = self.string(key, "a string") else { return default() };
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return value.clone();
        }
        let list: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        self.invalid(key, format!("{text:?}"), list.join(", "));
        default()
    }
}

const UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(*factor)?))
}

fn show_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return "0s".into();
    }
    let fits = |(_, factor): &&(&str, u64)| millis.is_multiple_of(*factor);
    let (unit, factor) = UNITS.iter().rev().find(fits).unwrap_or(&UNITS[0]);
    format!("{}{unit}", millis / factor)
}

/// As the file has it.
pub(super) fn quoted(duration: Duration) -> String {
    format!("\"{}\"", show_duration(duration))
}

const SIZES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)];

/// In bytes; a number without a unit is bytes too.
fn parse_size(text: &str) -> Option<u64> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let (_, factor) = SIZES.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

fn show_size(bytes: u64) -> String {
    let fits = |(_, factor): &&(&str, u64)| bytes.is_multiple_of(*factor);
    let (unit, factor) = SIZES[..4].iter().rev().find(fits).unwrap_or(&SIZES[0]);
    format!("{}{unit}", bytes / factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_are_read_with_their_units() {
        let ms = Duration::from_millis;
        for (text, value) in [
            ("100ms", Some(ms(100))),
            ("5s", Some(ms(5000))),
            ("2m", Some(ms(120_000))),
            ("7d", Some(ms(604_800_000))),
            ("5", None),
            ("s", None),
            ("5 s", None),
            ("-5s", None),
            ("1.5s", None),
            ("99999999999999999d", None),
        ] {
            assert_eq!(parse_duration(text), value, "{text}");
        }
        for (text, value) in [
            ("16MiB", Some(16 << 20)),
            ("10", Some(10)),
            ("1KiB", Some(1024)),
            ("16MB", None),
            ("MiB", None),
            ("", None),
        ] {
            assert_eq!(parse_size(text), value, "{text}");
        }
        assert_eq!(show_duration(ms(60_000)), "1m");
        assert_eq!(show_duration(Duration::ZERO), "0s");
        assert_eq!(show_size(16 << 20), "16MiB");
    }
}
