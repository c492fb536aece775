//! Where an event stands: in the source's order, and for the WAL in its bytes.
//!
//! Invariant: positions are compared, never guessed. A change's own LSN is neither unique nor
//! monotonic across transactions (several rows of one COPY share one); commit LSNs are monotonic.
//! So a position is (epoch, mark, ordinal, sub), where the mark is whatever the source's order is
//! made of: a commit LSN for the WAL, the number of a batch for polling.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A WAL location (log sequence number), in bytes since the start of the WAL.
///
/// Text form `16/B374D848`: <https://www.postgresql.org/docs/current/datatype-pg-lsn.html>.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The invalid LSN that Postgres uses for "none".
    pub const ZERO: Lsn = Lsn(0);

    /// Bytes from `earlier` to here; 0 when `earlier` is later.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::protocol(format!("LSN {text:?} is not of the form 16/B374D848"));
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        let high = u32::from_str_radix(high, 16).map_err(|_| wrong())?;
        let low = u32::from_str_radix(low, 16).map_err(|_| wrong())?;
        Ok(Lsn((u64::from(high) << 32) | u64::from(low)))
    }
}

/// How far a source is, in its own terms: a commit LSN for the WAL, a batch for polling. Grows with
/// the source; marks of different sources cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mark(pub u64);

impl Mark {
    /// Before everything.
    pub const ZERO: Mark = Mark(0);

    /// As a location in the WAL; only for marks of a source that reads the WAL.
    pub fn lsn(self) -> Lsn {
        Lsn(self.0)
    }
}

impl From<Lsn> for Mark {
    fn from(lsn: Lsn) -> Self {
        Mark(lsn.0)
    }
}

/// The place of an event, or of a transaction's end, in the source order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// Raised by `init`, `resync` and an accepted failover. It only sorts.
    pub epoch: u32,
    /// The transaction: its commit LSN (`Begin`'s final LSN) for the WAL, its batch for polling.
    pub mark: Mark,
    /// Number of the change in the transaction, from 1, counted before any filter or route.
    pub ordinal: u64,
    /// Number among the things at one ordinal, from 0: the tables of a truncate, and whatever
    /// stands between two counted changes.
    pub sub: u32,
}

/// Ordinals are below it: the text form has ten digits for them.
pub const ORDINAL_END: u64 = 1 << 40;

impl Position {
    /// The text form: fixed width, lower-case hexadecimal, so that positions sort as text: epoch
    /// (8 digits), mark (16), ordinal (10), sub (8).
    pub fn text(self) -> [u8; 45] {
        assert!(self.ordinal < ORDINAL_END, "a transaction has fewer than 2^40 changes");
        let mut text = [b'-'; 45];
        text[..8].copy_from_slice(&hex(self.epoch));
        text[9..17].copy_from_slice(&hex((self.mark.0 >> 32) as u32));
        text[17..25].copy_from_slice(&hex(self.mark.0 as u32));
        text[26..28].copy_from_slice(&hex((self.ordinal >> 32) as u32)[6..]);
        text[28..36].copy_from_slice(&hex(self.ordinal as u32));
        text[37..].copy_from_slice(&hex(self.sub));
        text
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(&self.text()).expect("hexadecimal digits are ASCII"))
    }
}

/// The digits of `value`, all eight at once: this is on the path of every event.
fn hex(value: u32) -> [u8; 8] {
    // One digit in each byte, the first in the highest.
    let spread = u64::from(value);
    let spread = (spread | spread << 16) & 0x0000_FFFF_0000_FFFF;
    let spread = (spread | spread << 8) & 0x00FF_00FF_00FF_00FF;
    let digits = (spread | spread << 4) & 0x0F0F_0F0F_0F0F_0F0F;
    // 1 in each byte whose digit is a letter.
    let letters = (digits + 0x0606_0606_0606_0606) >> 4 & 0x0101_0101_0101_0101;
    let to_letter = u64::from(b'a' - b'0' - 10);
    (digits + 0x3030_3030_3030_3030 + letters * to_letter).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_text_round_trips() {
        let lsn: Lsn = "16/B374D848".parse().unwrap();
        assert_eq!(lsn, Lsn(0x16_B374_D848));
        assert_eq!(lsn.to_string(), "16/B374D848");
        for wrong in ["", "16", "16/", "x/1", "1/100000000"] {
            assert!(wrong.parse::<Lsn>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn position_text_sorts_like_the_position() {
        let at = |epoch, mark, ordinal, sub| Position { epoch, mark: Mark(mark), ordinal, sub };
        let list = [
            at(1, 9, 2, 0),
            at(1, 9, 2, 1),
            at(1, 9, 2, 1_000_000),
            at(1, 9, 10, 0),
            at(1, 16, 1, 0),
            at(2, 1, 1, 0),
        ];
        for pair in list.windows(2) {
            assert!(pair[0] < pair[1]);
            assert!(pair[0].to_string() < pair[1].to_string());
        }
    }

    #[test]
    fn position_text_has_every_digit_in_its_place() {
        let text = |epoch, mark, ordinal, sub| {
            Position { epoch, mark: Mark(mark), ordinal, sub }.to_string()
        };
        let expected = "00000007-00000016b374d848-00000f4241-00011170";
        assert_eq!(text(7, 0x16_B374_D848, 1_000_001, 70_000), expected);
        let expected = "01234567-89abcdeffedcba98-7654321001-9a9f0fa0";
        let position = text(0x0123_4567, 0x89AB_CDEF_FEDC_BA98, 0x76_5432_1001, 0x9A9F_0FA0);
        assert_eq!(position, expected);
        for digit in 0..16 {
            let all = 0x1111_1111_u32 * digit;
            assert_eq!(hex(all), *format!("{all:08x}").as_bytes());
        }
    }
}
