//! The window: everything received and not yet settled, in source order. Pure.
//!
//! Invariant: a source advances only past settled events. Entries stand in source order and
//! leave only from the front, so receipts come back as the settled prefix. A receipt cannot be
//! cloned, so this is the only way to get one. A commit has no entry: its receipt joins that of the
//! last event before it.

use std::collections::VecDeque;

use crate::source::{Note, Receipt};

/// Number of an entry; grows by one with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct EntryId(u64);

/// The ring of unsettled entries. All operations are O(1).
#[derive(Debug, Default)]
pub struct Window {
    entries: VecDeque<Entry>,
    first: u64,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    receipt: Receipt,
    /// Messages that are not settled yet; 0 means that the entry is settled.
    open: u32,
    bytes: usize,
}

impl Window {
    /// An empty window.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next entry in source order, with the number of its messages and their size.
    pub fn push(&mut self, receipt: Receipt, messages: u16, bytes: usize) -> EntryId {
        self.entries.push_back(Entry { receipt, open: messages.into(), bytes });
        self.bytes += bytes;
        EntryId(self.first + self.entries.len() as u64 - 1)
    }

    /// Something without messages, such as a commit: it is settled when all before it is, so it
    /// needs no entry of its own behind another one.
    pub fn push_settled(&mut self, receipt: Receipt) {
        match self.entries.back_mut() {
            Some(last) => last.receipt.absorb(receipt),
            None => drop(self.push(receipt, 0, 0)),
        }
    }

    /// One message of the entry is settled.
    ///
    /// # Panics
    /// When the entry has no unsettled message: an outcome was counted twice.
    pub fn settle(&mut self, id: EntryId) {
        let index = id.0.checked_sub(self.first).expect("a settled entry stays settled");
        let entry = &mut self.entries[usize::try_from(index).expect("the ring fits in memory")];
        assert!(entry.open > 0, "each message settles once");
        entry.open -= 1;
        if entry.open == 0 {
            // Its messages are gone, whatever it waits for.
            self.bytes -= std::mem::take(&mut entry.bytes);
        }
    }

    /// One unsettled message of the entry has become `open`: as many as the present routes make.
    ///
    /// # Panics
    /// When the entry has no unsettled message.
    pub fn becomes(&mut self, id: EntryId, messages: usize) {
        let index = id.0.checked_sub(self.first).expect("a settled entry stays settled");
        let entry = &mut self.entries[usize::try_from(index).expect("the ring fits in memory")];
        assert!(entry.open > 0, "each message settles once");
        entry.open += u32::try_from(messages).expect("RULES_MAX fits");
        entry.open -= 1;
        if entry.open == 0 {
            self.bytes -= std::mem::take(&mut entry.bytes);
        }
    }

    /// Adds unsettled messages to an entry that has some: a backfill's chunk gets them row by row.
    ///
    /// # Panics
    /// When the entry is settled.
    pub fn add(&mut self, id: EntryId, messages: usize) {
        self.unsettled(id).open += u32::try_from(messages).expect("RULES_MAX fits");
    }

    /// How many messages are unsettled of an entry that has some.
    ///
    /// # Panics
    /// When the entry is settled.
    pub fn open(&mut self, id: EntryId) -> usize {
        self.unsettled(id).open as usize
    }

    /// What is to be durable together with an unsettled entry.
    ///
    /// # Panics
    /// When the entry is settled.
    pub fn note(&mut self, id: EntryId, note: Note) {
        self.unsettled(id).receipt.add_note(note);
    }

    fn unsettled(&mut self, id: EntryId) -> &mut Entry {
        let index = id.0.checked_sub(self.first).expect("an unsettled entry is in the ring");
        let entry = &mut self.entries[usize::try_from(index).expect("the ring fits in memory")];
        assert!(entry.open > 0, "the entry is not settled");
        entry
    }

    /// Takes the settled prefix off and gives back what covers it.
    pub fn take_settled(&mut self) -> Option<Receipt> {
        let mut covered: Option<Receipt> = None;
        while self.entries.front().is_some_and(|entry| entry.open == 0) {
            let entry = self.entries.pop_front().expect("there is a front");
            self.first += 1;
            self.bytes -= entry.bytes;
            match &mut covered {
                None => covered = Some(entry.receipt),
                Some(receipt) => receipt.absorb(entry.receipt),
            }
        }
        covered
    }

    /// Entries that have left it.
    pub fn left(&self) -> u64 {
        self.first
    }

    /// Entries in the window.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when everything received is settled.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Size of the messages of entries that are not settled.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::position::{Mark, Position};

    fn receipt(lsn: u64, ordinal: u64, flush: Option<u64>) -> Receipt {
        let position = Position { epoch: 1, mark: Mark(lsn), ordinal, sub: 0 };
        Receipt::new(position, flush.map(Mark))
    }

    #[test]
    fn a_later_confirm_does_not_pass_an_earlier_open_event() {
        let mut window = Window::new();
        let first = window.push(receipt(10, 1, None), 1, 100);
        let second = window.push(receipt(10, 2, None), 2, 100);
        window.push_settled(receipt(10, 2, Some(12)));
        window.settle(second);
        window.settle(second);
        assert_eq!((window.take_settled(), window.bytes()), (None, 100));
        window.settle(first);
        assert_eq!(window.take_settled(), Some(receipt(10, 2, Some(12))));
        assert_eq!(window.left(), 2, "the commit came with the last event");
        assert!(window.is_empty());
        assert_eq!(window.bytes(), 0);
    }

    #[test]
    fn a_message_that_has_become_two_or_none_is_counted_as_such() {
        let mut window = Window::new();
        let two = window.push(receipt(10, 1, None), 1, 0);
        let none = window.push(receipt(10, 2, None), 1, 0);
        window.becomes(two, 2);
        window.becomes(none, 0);
        window.settle(two);
        assert_eq!(window.take_settled(), None);
        window.settle(two);
        assert_eq!(window.take_settled(), Some(receipt(10, 2, None)));
    }

    #[test]
    fn inside_a_transaction_nothing_may_be_flushed() {
        let mut window = Window::new();
        window.push_settled(receipt(10, 1, Some(12)));
        let event = window.push(receipt(20, 1, None), 1, 1);
        window.push_settled(receipt(20, 1, Some(22)));
        let covered = window.take_settled().unwrap();
        assert_eq!(covered.flush(), Some(Mark(12)));
        window.settle(event);
        assert_eq!(window.take_settled().unwrap().flush(), Some(Mark(22)));
    }

    #[test]
    #[should_panic(expected = "each message settles once")]
    fn an_outcome_cannot_count_twice() {
        let mut window = Window::new();
        let first = window.push(receipt(10, 1, None), 1, 0);
        let second = window.push(receipt(10, 2, None), 1, 0);
        window.settle(second);
        window.settle(second);
        window.settle(first);
    }
}
