//! Which transactions a snapshot of the server shows. Pure.

use crate::error::{Error, Result};

/// Which transactions are visible in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visibility {
    /// The first that had not begun.
    next: u64,
    /// Those before it that had not ended.
    open: Vec<u64>,
}

impl Visibility {
    /// From `pg_current_snapshot()`: `xmin:xmax:xip,xip,…`.
    ///
    /// # Errors
    /// [`crate::error::Kind::Protocol`] for any other text.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = || Error::protocol(format!("snapshot {text:?}"));
        let number = |id: &str| id.parse::<u64>().map_err(|_| wrong());
        let mut parts = text.splitn(3, ':').skip(1);
        let next = number(parts.next().ok_or_else(wrong)?)?;
        let open = parts.next().ok_or_else(wrong)?.split(',').filter(|id| !id.is_empty());
        Ok(Self { next, open: open.map(number).collect::<Result<_>>()? })
    }

    /// Whether it shows a committed transaction, given by its xid without the epoch, as in the
    /// stream.
    pub fn shows(&self, xid: u32) -> bool {
        // The two are less than half of the xid range apart (transam.c, `TransactionIdPrecedes`).
        let behind = (self.next as u32).wrapping_sub(xid).cast_signed();
        behind > 0 && !self.open.iter().any(|open| *open as u32 == xid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_shows_what_had_ended_before_it() {
        let snapshot = Visibility::parse("10:20:10,15").expect("a snapshot");
        assert!(snapshot.shows(9) && snapshot.shows(11) && snapshot.shows(19));
        assert!(!snapshot.shows(10) && !snapshot.shows(15) && !snapshot.shows(20));
        let around = Visibility::parse("4294967290:4294967300:4294967299").expect("a snapshot");
        assert!(around.shows(4_294_967_289) && around.shows(2), "epochs are not compared");
        assert!(!around.shows(3) && !around.shows(4));
        assert!(Visibility::parse("10:20:").expect("a snapshot").shows(15));
        assert!(Visibility::parse("10").is_err() && Visibility::parse("a:b:c").is_err());
    }
}
