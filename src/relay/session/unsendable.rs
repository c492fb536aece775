//! A row that Postgres cannot send: the walsender fails with an internal error (XX000) at the same
//! place again and again, and no further try will help. Pure.
//!
//! Above all this is a value whose text form is above 1 GB, such as a bytea of 600 MB, which is
//! twice as long in hex.

use crate::error::Error;
use crate::pg::sqlstate::INTERNAL_ERROR;
use crate::position::Position;
use crate::verdict::Verdict;

/// Remembers where the last session ended by an internal error of the server.
#[derive(Debug, Default)]
pub struct Unsendable {
    last: Option<Position>,
}

impl Unsendable {
    /// The error, or the verdict when this session ended like the one before, without having
    /// received anything more. `received` is how far the session came.
    /// A healthy session in between clears the row: what failed before is forgotten.
    pub fn judge(
        &mut self,
        error: Error,
        received: Option<Position>,
        healthy: bool,
        binary: bool,
    ) -> Error {
        if healthy {
            self.last = None;
        }
        if error.sqlstate() != Some(INTERNAL_ERROR) {
            // Others in between, such as a broker that is away, say nothing about the row.
            return error;
        }
        let again = received.is_some() && self.last == received;
        self.last = received;
        let Some(position) = received.filter(|_| again) else { return error };
        let hint = if binary {
            "see the Postgres log: this row cannot be read, or cannot be sent even in binary"
        } else {
            "a value whose text form is above 1 GB cannot be sent as text: set source.binary = \
             true and start again"
        };
        error
            .context(format!("Postgres failed twice to send the change after {position}"))
            .as_verdict(Verdict::RowUnsendable)
            .hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Code, Kind};

    fn internal() -> Error {
        Error::protocol("invalid memory alloc request size 1258291203")
            .coded(Code::Sqlstate(INTERNAL_ERROR.into()))
    }

    #[test]
    fn the_second_failure_at_the_same_place_is_a_verdict() {
        let at = |ordinal| Some(Position { ordinal, ..Position::default() });
        let mut unsendable = Unsendable::default();
        assert_eq!(unsendable.judge(internal(), at(1), false, false).kind(), Kind::Protocol);
        assert_eq!(
            unsendable.judge(internal(), at(2), false, false).kind(),
            Kind::Protocol,
            "it moved"
        );
        let away = unsendable.judge(Error::unreachable("away"), at(2), false, false);
        assert_eq!(away.kind(), Kind::Unreachable);
        let verdict = unsendable.judge(internal(), at(2), false, false);
        assert_eq!(verdict.kind(), Kind::Verdict);
        assert!(verdict.hint_text().unwrap().contains("source.binary = true"));
        assert!(
            !unsendable
                .judge(internal(), at(2), false, true)
                .hint_text()
                .unwrap()
                .contains("= true")
        );
        assert_eq!(unsendable.judge(internal(), None, false, false).kind(), Kind::Protocol);
    }

    #[test]
    fn two_failures_with_a_healthy_session_between_them_are_no_verdict() {
        let at = Some(Position::default());
        let mut unsendable = Unsendable::default();
        for healthy in [false, true, true] {
            let error = unsendable.judge(internal(), at, healthy, false);
            assert_eq!(error.kind(), Kind::Protocol);
        }
        assert_eq!(unsendable.judge(internal(), at, false, false).kind(), Kind::Verdict);
    }
}
