//! The low marks of backfills, as the stream brings them. Pure.
//!
//! Invariant: nothing else stands at the positions of a chunk's rows. A mark is the first thing in
//! its transaction, where nothing is counted yet: its rows have ordinal 0 and the sub-ordinals from
//! 1 on, the mark itself the sub-ordinal [`MARK_SUB`] after them, and changes ordinals from 1 on.

use uuid::Uuid;

use super::{Assembler, State};
use crate::position::{Lsn, Position};
use crate::source::{Item, LowMark};

/// Prefix of the logical messages that are low marks; the content is the text of a token.
pub const MARK_PREFIX: &str = "watership.backfill";
/// Place of a mark among the things at ordinal 0: after all rows of its chunk.
const MARK_SUB: u32 = 1 << 31;

impl Assembler {
    /// A message with the prefix of a mark. Anybody may write one: what no relay would have written
    /// is ignored.
    pub(super) fn low_mark(&mut self, lsn: Lsn, content: &[u8], out: &mut Vec<Item>) {
        let State::Open(transaction) = &mut self.state else { return };
        let Ok(token) = Uuid::try_parse_ascii(content) else { return };
        if (transaction.ordinal, transaction.sub) != (0, 0) {
            return;
        }
        transaction.sub = MARK_SUB;
        transaction.has_messages = true;
        let transaction = *transaction;
        let at = self.position(&transaction);
        if at <= self.options.resume_after {
            return;
        }
        let mark = LowMark {
            token,
            position: Position { sub: 0, ..at },
            lsn,
            committed_at_us: transaction.committed_at_us,
            xid: transaction.xid,
        };
        out.push(Item::LowMark(mark, self.receipt(at, None)));
    }
}
