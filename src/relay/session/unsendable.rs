//! A row that Postgres cannot send: the walsender fails at the same place again and again, and no
//! further try will help. Pure.
//!
//! A value whose text form is above 1 GB, such as a bytea of 600 MB, which is twice as long in hex,
//! is an internal error. Where the encoding of the database is not UTF8, a byte without a character
//! in UTF-8 cannot be converted.

use crate::error::Error;
use crate::pg::sqlstate::{INTERNAL_ERROR, INVALID_ENCODING, UNTRANSLATABLE_CHARACTER};
use crate::position::Position;
use crate::source::SourceKind;
use crate::verdict::{RESYNC, Verdict};

/// A poll reads the rows as they are at that time; the WAL keeps them as they were.
const POLLED: &str = "correct the row, and whatever writes such values (the Postgres log says why; \
    in a database that is not UTF8, some bytes have no equivalent in UTF-8), then start again: \
    the relay reads the row as it is then, and publishes it";

/// Remembers where the last session ended by an error of the server about a change.
#[derive(Debug, Default)]
pub struct Unsendable {
    last: Option<Position>,
}

impl Unsendable {
    /// The error, or the verdict when this session ended like the one before, without having
    /// received anything more. `received` is how far the session came, however long it lived;
    /// `streaming` says that the stream itself failed.
    /// A session that received more has passed the row: what failed before is forgotten.
    pub fn judge(
        &mut self,
        error: Error,
        received: Option<Position>,
        streaming: bool,
        (kind, binary): (SourceKind, bool),
    ) -> Error {
        if received > self.last {
            self.last = None;
        }
        let hint = match error.sqlstate() {
            Some(INTERNAL_ERROR | UNTRANSLATABLE_CHARACTER | INVALID_ENCODING)
                if kind == SourceKind::Poll =>
            {
                POLLED.to_owned()
            }
            Some(INTERNAL_ERROR) if binary => {
                "see the Postgres log: this row cannot be read, or cannot be sent even in binary"
                    .to_owned()
            }
            Some(INTERNAL_ERROR) => {
                "a value whose text form is above 1 GB cannot be sent as text: \
                 set source.binary = true and start again"
                    .to_owned()
            }
            Some(UNTRANSLATABLE_CHARACTER | INVALID_ENCODING) => format!(
                "the change holds a byte that is not a character in UTF-8, and only a database \
                 with encoding UTF8 rules that out: correct the row and whatever writes such \
                 bytes, then accept that what was committed between the checkpoint and now is \
                 not published: {RESYNC} --from now --anyway"
            ),
            // Others in between, such as a broker that is away, say nothing about the row.
            _ => return error,
        };
        if !streaming {
            return error;
        }
        let again = received.is_some() && self.last == received;
        self.last = received;
        let Some(position) = received.filter(|_| again) else { return error };
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

    const WAL: (SourceKind, bool) = (SourceKind::Wal, false);

    fn failed(code: &str) -> Error {
        Error::protocol("the server's text").coded(Code::Sqlstate(code.into()))
    }

    fn internal() -> Error {
        failed(INTERNAL_ERROR)
    }

    fn at(ordinal: u64) -> Option<Position> {
        Some(Position { ordinal, ..Position::default() })
    }

    #[test]
    fn the_second_failure_at_the_same_place_is_a_verdict() {
        let mut unsendable = Unsendable::default();
        assert_eq!(unsendable.judge(internal(), at(1), true, WAL).kind(), Kind::Protocol);
        let moved = unsendable.judge(internal(), at(2), true, WAL);
        assert_eq!(moved.kind(), Kind::Protocol, "it moved");
        let away = unsendable.judge(Error::unreachable("away"), at(2), false, WAL);
        assert_eq!(away.kind(), Kind::Unreachable);
        let verdict = unsendable.judge(internal(), at(2), true, WAL);
        assert_eq!(verdict.kind(), Kind::Verdict);
        assert!(verdict.hint_text().unwrap().contains("source.binary = true"));
        let verdict = unsendable.judge(internal(), at(2), true, (SourceKind::Wal, true));
        assert!(!verdict.hint_text().unwrap().contains("= true"));
        assert_eq!(unsendable.judge(internal(), None, true, WAL).kind(), Kind::Protocol);
    }

    #[test]
    fn a_byte_that_is_not_a_character_is_a_verdict_that_says_so() {
        for code in [UNTRANSLATABLE_CHARACTER, INVALID_ENCODING] {
            let mut unsendable = Unsendable::default();
            assert_ne!(unsendable.judge(failed(code), at(7), true, WAL).kind(), Kind::Verdict);
            let verdict = unsendable.judge(failed(code), at(7), true, WAL);
            assert_eq!(verdict.verdict(), Some(Verdict::RowUnsendable));
            assert!(verdict.hint_text().unwrap().contains("encoding UTF8"));
            let mut unsendable = Unsendable::default();
            for _ in 0..3 {
                let error = unsendable.judge(failed(code), at(7), false, WAL);
                assert_ne!(error.kind(), Kind::Verdict, "it was not the stream that failed");
            }
        }
    }

    #[test]
    fn two_failures_with_a_session_between_them_that_received_more_are_not_a_verdict() {
        let mut unsendable = Unsendable::default();
        unsendable.judge(internal(), at(3), true, WAL);
        unsendable.judge(Error::unreachable("away"), at(9), false, WAL);
        // A replay: the checkpoint was behind.
        assert_eq!(unsendable.judge(internal(), at(3), true, WAL).kind(), Kind::Protocol);
        assert_eq!(unsendable.judge(internal(), at(3), true, WAL).kind(), Kind::Verdict);
    }

    #[test]
    fn a_row_that_is_polled_has_only_to_be_corrected() {
        for code in [INTERNAL_ERROR, UNTRANSLATABLE_CHARACTER, INVALID_ENCODING] {
            let mut unsendable = Unsendable::default();
            let poll = (SourceKind::Poll, false);
            unsendable.judge(failed(code), at(7), true, poll);
            let verdict = unsendable.judge(failed(code), at(7), true, poll);
            assert_eq!(verdict.verdict(), Some(Verdict::RowUnsendable));
            let hint = verdict.hint_text().unwrap();
            assert!(hint.contains("correct the row") && !hint.contains("resync"), "{hint}");
        }
    }
}
