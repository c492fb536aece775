//! Where an event stands: the WAL position of its transaction and its place inside it.
//!
//! A change's own LSN is neither unique nor monotonic across transactions (several rows of one
//! COPY share one); commit LSNs are monotonic. So a position is (epoch, commit LSN, ordinal), and
//! positions are compared, never guessed.

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

/// The place of an event, or of a transaction's end, in the source order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position {
    /// Raised by `init`, `resync` and an accepted failover. It only sorts.
    pub epoch: u32,
    /// Commit LSN of the transaction (`Begin`'s final LSN).
    pub commit_lsn: Lsn,
    /// Number of the change in the transaction, from 1, counted before any filter or route.
    pub ordinal: u64,
    /// Number of the table within one truncate, from 0; 0 for every other change.
    pub sub: u16,
}

impl Position {
    /// The place of the whole change: checkpoints and receipts know no sub-ordinal.
    #[must_use]
    pub fn change(self) -> Self {
        Self { sub: 0, ..self }
    }

    /// Length of the text form, in bytes.
    pub const TEXT_LEN: usize = 8 + 1 + 16 + 1 + 10 + 1 + 4;

    /// Writes the text form (see `Display`) without allocating.
    ///
    /// Fixed width, lower-case hexadecimal, so positions sort as text: epoch (8 digits), commit
    /// LSN (16), ordinal (10), sub-ordinal (4).
    pub fn write_text(self, out: &mut Vec<u8>) {
        assert!(self.ordinal < 1 << 40, "a transaction has fewer than 2^40 changes");
        hex(out, u64::from(self.epoch), 8);
        out.push(b'-');
        hex(out, self.commit_lsn.0, 16);
        out.push(b'-');
        hex(out, self.ordinal, 10);
        out.push(b'-');
        hex(out, u64::from(self.sub), 4);
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lsn = self.commit_lsn.0;
        write!(f, "{:08x}-{lsn:016x}-{:010x}-{:04x}", self.epoch, self.ordinal, self.sub)
    }
}

impl FromStr for Position {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::protocol(format!("{text:?} is no position"));
        let mut parts = text.split('-').map(|part| u64::from_str_radix(part, 16));
        let mut part = || parts.next().and_then(Result::ok).ok_or_else(wrong);
        let position = Self {
            epoch: u32::try_from(part()?).map_err(|_| wrong())?,
            commit_lsn: Lsn(part()?),
            ordinal: part()?,
            sub: u16::try_from(part()?).map_err(|_| wrong())?,
        };
        if position.to_string() == text { Ok(position) } else { Err(wrong()) }
    }
}

fn hex(out: &mut Vec<u8>, value: u64, digits: u32) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for digit in (0..digits).rev() {
        out.push(DIGITS[(value >> (4 * digit)) as usize & 15]);
    }
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
        let at = |epoch, lsn, ordinal, sub| Position { epoch, commit_lsn: Lsn(lsn), ordinal, sub };
        let list =
            [at(1, 9, 2, 0), at(1, 9, 2, 1), at(1, 9, 10, 0), at(1, 16, 1, 0), at(2, 1, 1, 0)];
        for pair in list.windows(2) {
            assert!(pair[0] < pair[1]);
            assert!(pair[0].to_string() < pair[1].to_string());
        }
    }

    #[test]
    fn written_text_equals_display() {
        let position =
            Position { epoch: 7, commit_lsn: Lsn(0x16_B374_D848), ordinal: 1_000_001, sub: 3 };
        let mut out = Vec::new();
        position.write_text(&mut out);
        assert_eq!(out, position.to_string().as_bytes());
        assert_eq!(out.len(), Position::TEXT_LEN);
        assert_eq!(position.to_string().parse::<Position>().unwrap(), position);
        for wrong in ["", "1-2-3-4", "00000007-00000016B374D848-00000f4241-0003"] {
            assert!(wrong.parse::<Position>().is_err(), "{wrong}");
        }
    }
}
