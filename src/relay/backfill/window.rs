//! The loop's part of a backfill: live changes are held while a chunk is read, then its rows go
//! into the lanes, a few at a time, each before the live changes of the same row.
//!
//! Invariant: entries of the ring stand in source order whatever is held: a held change has its
//! entry, which is open until its messages are made. The entry of a chunk is open until all of its
//! rows are settled, and the cursor rides on its receipt: a chunk is settled as a whole.

use std::sync::Arc;
use std::time::Instant;

use super::merge::Unsent;
use super::moved::moved;
use super::{
    Backfill, Chunk, ChunkCommand, ChunkReport, Expected, GivenUp, HELD_SHARE, Held, Place,
    Remembered, Sending, Stage,
};
use crate::error::Result;
use crate::event::{Change, Content, Event, Row, Table, id};
use crate::position::Position;
use crate::publisher::Publisher;
use crate::relay::checkpoint::Store;
use crate::relay::window::admission::poison_verdict;
use crate::relay::window::described::columns_changed;
use crate::relay::window::lanes::Owner;
use crate::relay::{Making, Relay};
use crate::source::{LowMark, Note, Receipt, Source};

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// What the worker asked for since the last look.
    pub(in crate::relay) fn take_commands(&mut self, now: Instant) {
        while let Some(command) = self.backfill.try_command() {
            self.obey(Some(command), now);
        }
    }

    /// A command of the worker; none means that it has ended.
    pub(in crate::relay) fn obey(&mut self, command: Option<ChunkCommand>, now: Instant) {
        match command {
            Some(ChunkCommand::Begin(table)) => {
                self.backfill.tables.retain(|remembered| remembered.table != table);
                self.backfill.tables.push(Remembered::new(table));
                if !self.backfill.watched.contains(&table) {
                    self.backfill.watched.push(table);
                }
                self.backfill.report(ChunkReport::Began(table));
            }
            Some(ChunkCommand::End(table)) => {
                self.backfill.tables.retain(|remembered| remembered.table != table);
                self.abandon(now, |_, of| of == table);
            }
            Some(ChunkCommand::Expect { token, table, hold }) => {
                self.abandon(now, |_, _| true);
                let chunk = None;
                self.backfill.stage = Stage::Expected(Expected { token, table, hold, chunk });
            }
            Some(ChunkCommand::Rows(chunk)) => self.rows(chunk, now),
            Some(ChunkCommand::Forget(token)) => self.abandon(now, |of, _| of == token),
            None => {
                self.backfill.tables.clear();
                self.abandon(now, |_, _| true);
                self.backfill.link = None;
            }
        }
    }

    /// A low mark has come through the stream.
    pub(in crate::relay) fn marked(&mut self, mark: LowMark, receipt: Receipt, now: Instant) {
        // The worker says what it writes before it writes it.
        self.take_commands(now);
        let is_it = matches!(&self.backfill.stage, Stage::Expected(one) if one.token == mark.token);
        if !is_it {
            // Of another relay, or of a session before this one.
            self.push_settled(receipt);
            return;
        }
        let stage = std::mem::replace(&mut self.backfill.stage, Stage::None);
        let Stage::Expected(Expected { token, table, hold, chunk }) = stage else {
            unreachable!("it was looked at");
        };
        // One unsettled message stands for the rows that are not there, or not sent.
        let place = Place { mark, entry: self.push(receipt, 1, 0) };
        let remembered = self.backfill.table(table);
        let before = remembered.map(|one| std::mem::take(&mut one.transactions));
        self.backfill.stage = Stage::Held(Held {
            token,
            table,
            place,
            before: before.unwrap_or_default(),
            changes: Vec::new(),
            bytes: 0,
            until: now + hold,
        });
        if let Some(chunk) = chunk {
            self.rows(chunk, now);
        }
    }

    /// A live change, while a run has begun.
    ///
    /// # Errors
    /// For one that its route does not want parked.
    pub(in crate::relay) fn admit_beside(
        &mut self,
        event: Event,
        mut receipt: Receipt,
        now: Instant,
    ) -> Result<()> {
        let table = event.table.oid;
        if self.backfill.watched.contains(&table)
            && let Some(moved) = moved(&event)
        {
            receipt.add_note(Note::Moved(moved));
        }
        let is_change = matches!(event.content, Content::Change(_));
        let Some(remembered) = self.backfill.table(table).filter(|_| is_change) else {
            return self.admit(&event, receipt, now);
        };
        remembered.remember(event.xid);
        let truncated = matches!(event.content, Content::Change(Change::Truncate));
        if truncated && !std::mem::replace(&mut remembered.truncated, true) {
            self.backfill.report(ChunkReport::Truncated(table));
        }
        let (events, bytes) = (self.tuning.window.events, self.tuning.window.bytes);
        match &mut self.backfill.stage {
            Stage::Held(held) if held.table == table => {
                let size = event.bytes();
                held.bytes += size;
                let full = held.changes.len() >= events.div_ceil(HELD_SHARE)
                    || held.bytes >= bytes / HELD_SHARE;
                let entry = self.push(receipt, 1, size);
                self.seen.published.event(event.position.mark);
                if let Stage::Held(held) = &mut self.backfill.stage {
                    held.changes.push((event, entry));
                }
                if full {
                    self.give_up(GivenUp::TooSlow, now);
                }
                Ok(())
            }
            Stage::Sending(sending) if sending.table == table => {
                let first = meet(&mut self.making, sending, &event);
                self.send_rows(first, now)?;
                self.admit(&event, receipt, now)
            }
            Stage::None | Stage::Expected(_) | Stage::Held(_) | Stage::Sending(_) => {
                self.admit(&event, receipt, now)
            }
        }
    }

    /// The table is described in another way from here on: what was read of it by the old
    /// description goes before that.
    pub(in crate::relay) fn before_description(&mut self, table: &Table, now: Instant) {
        match &mut self.backfill.stage {
            Stage::Held(held) if held.table == table.oid => self.give_up(GivenUp::TooSlow, now),
            Stage::Sending(sending) if sending.table == table.oid => {
                let rows = std::iter::from_fn(|| sending.unsent.pop()).collect();
                if let Err(poison) = self.send_rows(rows, now) {
                    self.drain(Some(poison_verdict(poison)));
                }
            }
            Stage::None | Stage::Expected(_) | Stage::Held(_) | Stage::Sending(_) => {}
        }
    }

    /// The rows of a chunk are there.
    fn rows(&mut self, chunk: Box<Chunk>, now: Instant) {
        match std::mem::replace(&mut self.backfill.stage, Stage::None) {
            Stage::Expected(mut one) if one.token == chunk.token => {
                one.chunk = Some(chunk);
                self.backfill.stage = Stage::Expected(one);
            }
            Stage::Held(held) if held.token == chunk.token => self.fill(held, *chunk, now),
            // It was given up before.
            other => self.backfill.stage = other,
        }
    }

    /// The rows go where the mark stands, and then what was held.
    fn fill(&mut self, held: Held, chunk: Chunk, now: Instant) {
        let is_unseen = |xid: &u32| chunk.unseen.contains(xid);
        let remembered = self.backfill.table(held.table);
        let stale = match remembered {
            None => Some(GivenUp::Forgotten),
            Some(one) if one.forgotten => Some(GivenUp::Forgotten),
            Some(_) => held.before.iter().any(is_unseen).then_some(GivenUp::Stale),
        };
        if let Some(why) = stale {
            self.backfill.stage = Stage::Held(held);
            self.give_up(why, now);
            return;
        }
        let (plans, router) = (&self.making.plans, &self.making.router);
        if plans.needs_catalog(router, &chunk.table, held.place.mark.position)
            || plans.has_lost(&chunk.table, &chunk.numbers)
        {
            let changed = columns_changed(&chunk.table);
            self.backfill.stage = Stage::Held(held);
            self.drain(Some(changed));
            return;
        }
        // What the chunk shows of the transactions before the mark, later ones show, too.
        let Held { token, table, place, changes, .. } = held;
        let Chunk { table: description, rows, moved, cursor, .. } = chunk;
        self.backfill.filled_at = Some(now);
        let mark = place.mark.position.mark;
        self.making.plans.describe_read(&self.making.router, &description, mark);
        let unsent = Unsent::new(description, rows);
        let sending = Sending { token, table, place, unsent, moved, cursor };
        self.backfill.stage = Stage::Sending(Box::new(sending));
        self.release(changes, now);
    }

    /// Admits what was held, in order.
    fn release(&mut self, changes: Vec<(Event, super::EntryId)>, now: Instant) {
        for (event, entry) in changes {
            let released = match &mut self.backfill.stage {
                Stage::Sending(sending) => {
                    let first = meet(&mut self.making, sending, &event);
                    self.send_rows(first, now).and_then(|()| self.admit_held(&event, entry, now))
                }
                Stage::None | Stage::Expected(_) | Stage::Held(_) => {
                    self.admit_held(&event, entry, now)
                }
            };
            if let Err(poison) = released {
                // Its entry stays open: nothing after it may be settled.
                self.drain(Some(poison_verdict(poison)));
                return;
            }
        }
    }

    fn admit_held(&mut self, event: &Event, entry: super::EntryId, now: Instant) -> Result<()> {
        self.make(event)?;
        self.flight.window.becomes(entry, self.making.made.len());
        self.hand_over(event, Owner::Window(entry), now);
        Ok(())
    }

    /// The chunk will come again; what was held is sent without it.
    fn give_up(&mut self, why: GivenUp, now: Instant) {
        match std::mem::replace(&mut self.backfill.stage, Stage::None) {
            Stage::Held(Held { token, table, place, before, changes, .. }) => {
                if let Some(remembered) = self.backfill.table(table) {
                    // The next mark stands behind these, too.
                    remembered.transactions.splice(0..0, before);
                }
                self.flight.window.settle(place.entry);
                self.release(changes, now);
                self.backfill.report(ChunkReport::GivenUp(token, why));
            }
            other => self.backfill.stage = other,
        }
    }

    /// Ends what is under way for a mark or a table. Rows that are not sent are not sent.
    fn abandon(&mut self, now: Instant, is_it: impl Fn(uuid::Uuid, u32) -> bool) {
        match &self.backfill.stage {
            Stage::Expected(one) if is_it(one.token, one.table) => {
                self.backfill.stage = Stage::None;
            }
            Stage::Held(held) if is_it(held.token, held.table) => {
                self.give_up(GivenUp::TooSlow, now);
            }
            Stage::Sending(sending) if is_it(sending.token, sending.table) => {
                let entry = sending.place.entry;
                self.backfill.stage = Stage::None;
                self.flight.window.settle(entry);
            }
            Stage::None | Stage::Expected(_) | Stage::Held(_) | Stage::Sending(_) => {}
        }
    }

    /// Sends rows of the chunk while few of them are unconfirmed; gives it up when it is late.
    pub(in crate::relay) fn move_chunk(&mut self, now: Instant) {
        if self.backfill.wake_at().is_some_and(|until| now >= until) {
            self.give_up(GivenUp::TooSlow, now);
        }
        while let Stage::Sending(sending) = &mut self.backfill.stage {
            // One of the open ones stands for the rows that are not sent.
            let open = self.flight.window.open(sending.place.entry);
            if open > self.backfill.max_unconfirmed {
                return;
            }
            let Some(row) = sending.unsent.pop() else {
                self.sent();
                return;
            };
            if let Err(poison) = self.send_rows(vec![row], now) {
                self.drain(Some(poison_verdict(poison)));
                return;
            }
        }
    }

    /// All rows are on their way: the entry waits for their confirms only.
    fn sent(&mut self) {
        let stage = std::mem::replace(&mut self.backfill.stage, Stage::None);
        let Stage::Sending(sending) = stage else { unreachable!("the caller has looked") };
        let Sending { place, unsent, mut cursor, .. } = *sending;
        cursor.left_out += unsent.left_out();
        self.flight.window.note(place.entry, Note::Backfilled(cursor));
        self.flight.window.settle(place.entry);
        self.settle_prefix();
    }

    /// Puts rows of the chunk into their lanes.
    fn send_rows(&mut self, rows: Vec<(u32, Row)>, now: Instant) -> Result<()> {
        for (number, row) in rows {
            let Stage::Sending(sending) = &self.backfill.stage else {
                unreachable!("rows come from a chunk that is sent");
            };
            let table = sending.unsent.table().clone();
            let event = sending.event(table, number, row);
            let entry = sending.place.entry;
            if let Err(poison) = self.make(&event) {
                // Its chunk stays open: nothing after it may be settled.
                self.backfill.stage = Stage::None;
                return Err(poison);
            }
            self.flight.window.add(entry, self.making.made.len());
            self.hand_over(&event, Owner::Chunk(entry), now);
        }
        Ok(())
    }
}

/// The rows that have to be sent before a live change: see [`Unsent::meet`].
fn meet(making: &mut Making, sending: &mut Sending, change: &Event) -> Vec<(u32, Row)> {
    let Making { plans, router, .. } = making;
    let Sending { place, unsent, moved, cursor, .. } = sending;
    let table = unsent.table().clone();
    unsent.meet(change, |number, row| {
        let read = || place.event(cursor.run, table.clone(), number, row.clone(), moved);
        plans.replaces(router, change, read)
    })
}

impl Sending {
    /// A row as an event.
    fn event(&self, table: Arc<Table>, number: u32, row: Row) -> Event {
        self.place.event(self.cursor.run, table, number, row, &self.moved)
    }
}

impl Place {
    /// A row as an event.
    fn event(
        &self,
        run: uuid::Uuid,
        table: Arc<Table>,
        number: u32,
        row: Row,
        moved: &[String],
    ) -> Event {
        let moved = moved.get(number as usize - 1).map_or("", String::as_str);
        let LowMark { position, lsn, committed_at_us, xid, .. } = self.mark;
        Event {
            id: id::of_read(run, &table, &row, moved),
            position: Position { sub: number, ..position },
            lsn: Some(lsn),
            occurred_at_us: committed_at_us,
            committed_at_us,
            xid,
            table,
            content: Content::Change(Change::Read { new: row, run }),
        }
    }
}

impl Backfill {
    /// Nothing is held or sent: most sessions have no backfill.
    pub(in crate::relay) fn is_quiet(&self) -> bool {
        matches!(self.stage, Stage::None | Stage::Expected(_))
    }
}
