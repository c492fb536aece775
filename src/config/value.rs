//! Reading single values: durations, sizes, names; and collecting what is wrong with them.
//!
//! Pure. Every problem names the key, the value and what is allowed.

use std::fmt::Display;
use std::time::Duration;

use crate::error::{Error, Result};

/// What is wrong, in the order in which it was found; so that all is reported at once.
#[derive(Default)]
pub(super) struct Problems {
    list: Vec<String>,
    hint: Option<String>,
}

impl Problems {
    /// Adds a problem with the value of `key`.
    pub(super) fn value(&mut self, key: &str, value: impl Display, allowed: impl Display) {
        self.list.push(format!("{key} = {value} is not allowed; allowed: {allowed}"));
    }

    /// Adds a problem in free words; `what` begins with the key.
    pub(super) fn other(&mut self, what: impl Into<String>) {
        self.list.push(what.into());
    }

    /// Adds the text of `error` under `key`, and keeps its hint if it is the first one.
    pub(super) fn error(&mut self, key: &str, error: &Error) {
        self.list.push(format!("{key}: {error}"));
        if self.hint.is_none() {
            self.hint = error.hint_text().map(str::to_owned);
        }
    }

    /// One error with every problem in it, or nothing.
    pub(super) fn into_result(self, file: &str) -> Result<()> {
        let error = match self.list.as_slice() {
            [] => return Ok(()),
            [one] => Error::config(format!("{file}: {one}")),
            many => Error::config(format!(
                "{file} has {} problems:\n  - {}",
                many.len(),
                many.join("\n  - ")
            )),
        };
        Err(match self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        })
    }

    /// A duration such as `100ms` within `min..=max`; `min` when it is wrong.
    pub(super) fn duration(
        &mut self,
        key: &str,
        text: &str,
        min: Duration,
        max: Duration,
    ) -> Duration {
        let value = parse_duration(text).filter(|d| (min..=max).contains(d));
        value.unwrap_or_else(|| {
            let allowed = format!(
                "{} to {}, written as a number with ms, s, m, h or d",
                show_duration(min),
                show_duration(max)
            );
            self.value(key, format!("{text:?}"), allowed);
            min
        })
    }

    /// A size such as `16MiB` within `min..=max`, in bytes; `min` when it is wrong.
    pub(super) fn size(&mut self, key: &str, text: &str, min: u64, max: u64) -> usize {
        let value = parse_size(text).filter(|n| (min..=max).contains(n));
        let value = value.unwrap_or_else(|| {
            let allowed = format!(
                "{} to {}, written as a number with B, KiB, MiB or GiB",
                show_size(min),
                show_size(max)
            );
            self.value(key, format!("{text:?}"), allowed);
            min
        });
        usize::try_from(value).unwrap_or(usize::MAX)
    }

    /// A number within `min..=max`; `min` when it is wrong.
    pub(super) fn number(&mut self, key: &str, value: u64, min: u64, max: u64) -> usize {
        if !(min..=max).contains(&value) {
            self.value(key, value, format!("{min} to {max}"));
        }
        usize::try_from(value.clamp(min, max)).unwrap_or(usize::MAX)
    }

    /// One of a list of words; the first when it is wrong.
    pub(super) fn word<T: Copy>(&mut self, key: &str, text: &str, words: &[(&str, T)]) -> T {
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return *value;
        }
        let list: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        self.value(key, format!("{text:?}"), list.join(", "));
        words[0].1
    }

    /// A name that goes into Postgres and AMQP identifiers.
    pub(super) fn name(&mut self, key: &str, text: &str, extra: &str) -> String {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || extra.contains(c);
        if text.is_empty() || text.len() > NAME_MAX || !text.chars().all(fits) {
            let extra: Vec<String> = extra.chars().map(|c| format!("{c:?}")).collect();
            let allowed =
                format!("1 to {NAME_MAX} of the letters a to z, digits and {}", extra.join(", "));
            self.value(key, format!("{text:?}"), allowed);
        }
        text.to_owned()
    }
}

/// Longest Postgres identifier, in bytes (`NAMEDATALEN` - 1).
const NAME_MAX: usize = 63;

const UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
    Some(Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(*factor)?))
}

fn show_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let fits = |(_, factor): &&(&str, u64)| millis.is_multiple_of(*factor);
    let (unit, factor) = UNITS.iter().rev().find(fits).unwrap_or(&UNITS[0]);
    format!("{}{unit}", millis / factor)
}

const SIZES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("", 1)];

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
        assert_eq!(show_size(16 << 20), "16MiB");
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let mut problems = Problems::default();
        problems.duration("a.b", "5", Duration::from_millis(1), Duration::from_secs(10));
        problems.word("c", "x", &[("wal", 1), ("poll", 2)]);
        let text = problems.into_result("w.toml").unwrap_err().to_string();
        assert_eq!(
            text,
            "w.toml has 2 problems:\n  - a.b = \"5\" is not allowed; allowed: 1ms to 10s, written \
             as a number with ms, s, m, h or d\n  - c = \"x\" is not allowed; allowed: \"wal\", \
             \"poll\""
        );
    }
}
