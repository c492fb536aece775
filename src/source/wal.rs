//! The WAL as a source: the replication stream, decoded into items.
//!
//! Reads whatever the socket has, decodes it in place, hands items on. Keepalives that ask are
//! answered at once with the flush position that was authorised last, never with what the server
//! says: a keepalive may lie past a transaction that is not settled (museum M5, M6). How often it
//! reports unasked is `Timing`.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use crate::error::{Error, Result};
use crate::pg::replication::{Frame, ReplicationStream};
use crate::position::{Lsn, Mark, Position};
use crate::source::columns::ColumnWatch;
use crate::source::transaction::Assembler;
use crate::source::{Item, Receipt, Seen, Source};

/// Frames taken at once when none of them becomes an item, so that other work gets its turn.
const FRAMES_MAX: usize = 4096;
/// The server answers a status update that asks for it at once; longer means that the path is
/// dead.
const REPLY_LIMIT: Duration = Duration::from_secs(10);
/// What a walsender may take, beyond half of `wal_sender_timeout`, to look at what it was sent.
const REPLY_GRACE: Duration = Duration::from_secs(15);
/// A status update of 34 bytes that cannot be written for this long means a dead path.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// When the stream speaks although there is nothing to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Longest time between two status updates: a third of `wal_sender_timeout`, at most 10 s.
    pub status_interval: Duration,
    /// Silence of the server after which it is asked for a sign of life; its own keepalives may
    /// be switched off.
    pub silence: Duration,
    /// How long it may take to answer. A walsender that replays a large transaction of which
    /// nothing is published looks at replies only when the last one is older than half of
    /// `wal_sender_timeout` (walsender.c, `WalSndUpdateProgress`). Who gives it up sooner makes the
    /// next session replay the same, again and again. Dead paths are noticed by TCP_USER_TIMEOUT.
    pub reply_limit: Duration,
}

impl Timing {
    /// For a server whose `wal_sender_timeout` is this; `None` means that it has none.
    pub fn new(wal_sender_timeout: Option<Duration>) -> Self {
        const MOST: Duration = Duration::from_secs(10);
        let third = wal_sender_timeout.map_or(MOST, |t| (t / 3).min(MOST));
        let silence = Duration::from_secs(15);
        // Without a limit of its own a walsender may take longest; the default of it is a minute.
        let patience = wal_sender_timeout.unwrap_or(Duration::from_secs(60)) / 2 + REPLY_GRACE;
        Self { status_interval: third, silence, reply_limit: REPLY_LIMIT.max(patience) }
    }
}

/// A running replication stream.
pub struct Wal {
    stream: ReplicationStream,
    assembler: Assembler,
    columns: ColumnWatch,
    /// What is handed on when the catalog has answered about the columns of a table, and where it
    /// was described.
    waiting: Option<(Position, Vec<Item>)>,
    timing: Timing,
    flushed: Lsn,
    received: Lsn,
    last_status: Instant,
    silence: Silence,
}

/// What is known about the other side while nothing arrives.
#[derive(Debug, Clone, Copy)]
enum Silence {
    /// Bytes came at this time, or `next` was not called before it.
    Since(Instant),
    /// A reply was asked for at this time and has not come.
    Probed(Instant),
}

impl Wal {
    /// Takes over a stream that has just started. `flushed` is the stored flush position.
    pub fn new(
        stream: ReplicationStream,
        assembler: Assembler,
        columns: ColumnWatch,
        timing: Timing,
        flushed: Lsn,
    ) -> Self {
        let now = Instant::now();
        let (silence, received, waiting) = (Silence::Since(now), flushed, None);
        let last_status = now;
        Self {
            stream,
            assembler,
            columns,
            waiting,
            timing,
            flushed,
            received,
            last_status,
            silence,
        }
    }

    /// Takes what has arrived, without waiting.
    fn take(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<Taken> {
        for _ in 0..FRAMES_MAX {
            if batch.len() >= room {
                return Ok(Taken::Some);
            }
            match self.stream.try_next()? {
                None if batch.is_empty() => return Ok(Taken::Nothing),
                None => return Ok(Taken::Some),
                Some(Frame::XLogData { wal_start, wal_end, data, .. }) => {
                    self.received = self.received.max(wal_end);
                    let before = batch.len();
                    self.assembler.apply(wal_start, &data, batch)?;
                    if let Some(described) = self.assembler.take_described() {
                        let position = described.position;
                        if self.columns.described(described) {
                            self.waiting = Some((position, batch.split_off(before)));
                            let is_empty = batch.is_empty();
                            return Ok(if is_empty { Taken::OnlyFiltered } else { Taken::Some });
                        }
                    }
                }
                Some(Frame::Keepalive { wal_end, reply_requested, .. }) => {
                    self.received = self.received.max(wal_end);
                    if reply_requested {
                        self.status(false);
                    }
                    if self.assembler.is_idle() {
                        batch.push(Item::Idle(Receipt::idle(wal_end.into())));
                    }
                }
            }
        }
        Ok(if batch.is_empty() { Taken::OnlyFiltered } else { Taken::Some })
    }

    fn status(&mut self, reply_requested: bool) {
        self.stream.status_update(self.received, self.flushed, reply_requested);
        self.last_status = Instant::now();
    }

    fn deadline(&self) -> Instant {
        let silent = match self.silence {
            Silence::Since(at) => at.max(self.stream.last_received()) + self.timing.silence,
            Silence::Probed(at) => at + self.timing.reply_limit,
        };
        silent.min(self.last_status + self.timing.status_interval)
    }

    /// Acts on a passed deadline.
    fn overdue(&mut self) -> Result<()> {
        let now = Instant::now();
        match self.silence {
            Silence::Since(at) => {
                let last = at.max(self.stream.last_received());
                if now >= last + self.timing.silence {
                    self.silence = Silence::Probed(now);
                    self.status(true);
                }
            }
            Silence::Probed(at) if self.stream.last_received() > at => {
                self.silence = Silence::Since(self.stream.last_received());
            }
            Silence::Probed(at) if now >= at + self.timing.reply_limit => {
                let seconds = (self.timing.silence + self.timing.reply_limit).as_secs();
                let text = format!("Postgres was silent for {seconds} s and did not answer");
                return Err(Error::unreachable(text));
            }
            Silence::Probed(_) => {}
        }
        if now >= self.last_status + self.timing.status_interval {
            self.status(false);
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        timeout(WRITE_LIMIT, self.stream.flush()).await.unwrap_or_else(|_| {
            let seconds = WRITE_LIMIT.as_secs();
            Err(Error::unreachable(format!("Postgres read no status update for {seconds} s")))
        })
    }
}

enum Taken {
    /// The batch has items.
    Some,
    /// Frames, but nothing that becomes an item; there may be more.
    OnlyFiltered,
    /// Nothing has arrived.
    Nothing,
}

impl Source for Wal {
    async fn next(&mut self, room: usize, batch: &mut Vec<Item>) -> Result<()> {
        assert!(batch.is_empty(), "a batch is taken out before the next one comes");
        loop {
            if let Some((position, _)) = &self.waiting {
                let position = *position;
                let doubt = self.columns.answer().await?;
                batch.extend(doubt.map(|(table, doubt)| Item::Columns(table, position, doubt)));
                batch.extend(self.waiting.take().into_iter().flat_map(|(_, items)| items));
                if !batch.is_empty() {
                    return Ok(());
                }
            }
            match self.take(room, batch)? {
                Taken::Some => return Ok(()),
                Taken::OnlyFiltered => tokio::task::yield_now().await,
                Taken::Nothing => {
                    let deadline = self.deadline();
                    tokio::select! { biased;
                        filled = self.stream.fill() => {
                            filled?;
                            self.silence = Silence::Since(self.stream.last_received());
                        }
                        () = sleep_until(deadline) => self.overdue()?,
                    }
                }
            }
        }
    }

    async fn advance(&mut self, flush: Mark) -> Result<()> {
        let flush = flush.lsn();
        assert!(flush >= self.flushed, "the source never goes back");
        self.flushed = flush;
        self.status(false);
        self.flush().await
    }

    async fn keep_alive(&mut self) -> Result<()> {
        let now = Instant::now();
        if now >= self.last_status + self.timing.status_interval {
            // Called while nobody reads: the silence is ours, not the server's.
            if let Silence::Since(at) = &mut self.silence {
                *at = now;
            }
            self.status(false);
            self.flush().await?;
        }
        Ok(())
    }

    fn seen(&self) -> Seen {
        Seen { received: self.received, ..self.assembler.seen() }
    }

    async fn close(mut self) {
        self.status(false);
        self.stream.close().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walsender_that_is_busy_with_what_nobody_gets_is_given_the_time_to_answer() {
        let limit = |timeout: Option<u64>| {
            let timing = Timing::new(timeout.map(Duration::from_secs));
            (timing.status_interval.as_secs(), timing.reply_limit.as_secs())
        };
        // It looks at replies every timeout / 2, and ends by itself after the timeout.
        assert_eq!(limit(Some(60)), (10, 45));
        assert_eq!(limit(Some(300)), (10, 165));
        assert_eq!(limit(Some(3)), (1, 16));
        assert_eq!(limit(None), (10, 45));
    }
}
