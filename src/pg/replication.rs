//! The streaming replication protocol over our own connection: commands of a walsender, XLogData,
//! keepalives, standby status updates.
//!
//! Invariants: every name is quoted or validated before it enters a command; the flush position
//! that we report never goes back; a frame that is cut short is an error, never a panic. What the
//! WAL data means is in `pgoutput.rs`; when to report which position is decided by the source.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BufMut, Bytes};
use postgres_protocol::escape::escape_identifier;
use tokio::time::Instant;

use super::auth::{NO_TRANSACTION_TIMEOUT, has_transaction_timeout};
use super::connect::Options;
use super::sqlstate::{INSUFFICIENT_PRIVILEGE, OBJECT_NOT_IN_PREREQUISITE_STATE, UNDEFINED_OBJECT};
use super::wire::{Rows, Wire};
use crate::error::{Error, Kind, Result};
use crate::position::Lsn;
use crate::verdict::{RESYNC, Verdict};

/// Length limit of a name in Postgres (`NAMEDATALEN` - 1), in bytes.
const NAME_MAX: usize = 63;
/// Bytes of status updates that wait while the socket takes nothing; above this, new ones are left
/// out. Positions are cumulative, so a later one makes up for it.
const UNSENT_MAX: usize = 16 * 1024;
/// How long `close` waits for the server.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// 2000-01-01 as seconds since 1970: the epoch of Postgres timestamps.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// The answer to IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemId {
    /// Unique per cluster, made by initdb; the same on its standbys.
    pub system_id: u64,
    /// Current timeline; a promotion raises it.
    pub timeline: u32,
    /// Current WAL flush location of the server.
    pub xlog_pos: Lsn,
    /// The database that we are connected to.
    pub dbname: String,
}

/// What START_REPLICATION asks of pgoutput in addition to the publications.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// Column values in binary form: lets rows pass whose text form is above 1 GB.
    pub binary: bool,
    /// Logical messages (`pg_logical_emit_message`) of every prefix.
    pub messages: bool,
}

/// One message of the replication stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// WAL data.
    XLogData {
        /// Start of the WAL data; for pgoutput the LSN of the change.
        wal_start: Lsn,
        /// Current end of WAL on the server; equal to `wal_start` for logical replication.
        wal_end: Lsn,
        /// The server's clock, microseconds since 2000-01-01.
        sent_at: i64,
        /// One pgoutput message, a slice of the read buffer.
        data: Bytes,
    },
    /// Primary keepalive.
    Keepalive {
        /// Up to here the server has decoded and sent everything.
        wal_end: Lsn,
        /// The server's clock, microseconds since 2000-01-01.
        sent_at: i64,
        /// Answer at once, or the server drops the connection.
        reply_requested: bool,
    },
}

/// A walsender session that takes commands.
pub struct ReplicationConnection {
    wire: Wire,
}

impl ReplicationConnection {
    /// Connects with `replication=database`.
    ///
    /// # Errors
    /// As [`Wire::connect`]; a role without REPLICATION is [`Kind::Refused`].
    pub async fn connect(options: &Options) -> Result<Self> {
        let not_admitted = |error: Error| match error.sqlstate() {
            Some(INSUFFICIENT_PRIVILEGE) => error.hint(format!(
                "role {:?} needs the right to replicate: as a superuser, ALTER ROLE {} \
                 REPLICATION; `watership check` says how on hosted servers",
                options.user,
                escape_identifier(&options.user)
            )),
            _ => error,
        };
        let mut wire = Wire::connect(options, true).await.map_err(not_admitted)?;
        if has_transaction_timeout(wire.server_version()) {
            wire.query(NO_TRANSACTION_TIMEOUT).await?;
        }
        Ok(Self { wire })
    }

    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// The server's, or [`Kind::Protocol`] for an answer of another shape.
    pub async fn identify_system(&mut self) -> Result<SystemId> {
        let rows = self.wire.query("IDENTIFY_SYSTEM").await?;
        Ok(SystemId {
            system_id: field(&rows, 0, "systemid")?,
            timeline: field(&rows, 1, "timeline")?,
            xlog_pos: field(&rows, 2, "xlogpos")?,
            dbname: field(&rows, 3, "dbname")?,
        })
    }

    /// SHOW: the value of a setting in this session. `name` is not quoted.
    ///
    /// # Errors
    /// The server's.
    pub async fn show(&mut self, name: &str) -> Result<String> {
        let rows = self.wire.query(&format!("SHOW {name}")).await?;
        field(&rows, 0, name)
    }

    /// The history file of a timeline: one line per ancestor, `timeline switch-LSN reason`.
    ///
    /// # Errors
    /// The server's; timeline 1 has no history file.
    pub async fn timeline_history(&mut self, timeline: u32) -> Result<String> {
        let rows = self.wire.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        field(&rows, 1, "content")
    }

    /// START_REPLICATION with `proto_version '1'`: whole transactions, in commit order.
    ///
    /// The server begins at `from` or at the slot's confirmed position, whichever is later. It
    /// complains about neither: an older `from` and one in the future are silent, so compare
    /// first. [`Lsn::ZERO`] means the slot's position.
    ///
    /// # Errors
    /// [`Kind::Verdict`] when the slot is missing or lost, [`Kind::Busy`] when it has a reader,
    /// with its pid in the text. A missing publication is an error of the stream, not of this call.
    pub async fn start(
        mut self,
        slot: &str,
        from: Lsn,
        publications: &[&str],
        options: StreamOptions,
    ) -> Result<ReplicationStream> {
        let slot = slot_name(slot)?;
        let command = start_command(slot, from, publications, options)?;
        self.wire.start_copy(&command).await.map_err(|e| about_slot(e, slot))?;
        Ok(ReplicationStream { wire: self.wire, flushed: Lsn::ZERO })
    }

    /// Ends the session.
    pub async fn close(self) {
        self.wire.close(CLOSE_LIMIT).await;
    }
}

/// A walsender session that streams.
///
/// `loop { while let Some(frame) = stream.try_next()? { … } stream.fill().await?; }`
pub struct ReplicationStream {
    wire: Wire,
    flushed: Lsn,
}

impl ReplicationStream {
    /// The next frame that has fully arrived; `None` when `fill` has to be awaited. Never waits.
    ///
    /// # Errors
    /// Sticky: the server's error, as a [`Kind::Verdict`] when publication or slot is lost,
    /// [`Kind::Unreachable`] when it ended the stream, [`Kind::Protocol`] for a malformed frame.
    pub fn try_next(&mut self) -> Result<Option<Frame>> {
        match self.wire.try_copy().map_err(name_loss)? {
            Some(body) => decode(body).map(Some).map_err(|e| self.wire.fail(e)),
            None => Ok(None),
        }
    }

    /// Sends what is queued and reads once. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the peer is gone.
    pub async fn fill(&mut self) -> Result<()> {
        self.wire.fill().await.map_err(name_loss)
    }

    /// Sends what is queued. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`Kind::Unreachable`] when the peer is gone.
    pub async fn flush(&mut self) -> Result<()> {
        self.wire.flush().await
    }

    /// When bytes last came from the server; the read deadline is the caller's.
    pub fn last_received(&self) -> Instant {
        self.wire.last_received()
    }

    /// Queues a standby status update; `fill` or `flush` sends it. `flushed` is the promise: the
    /// server may forget everything before it (it becomes the slot's `confirmed_flush_lsn`), and
    /// is reported as applied too. `written` is only shown in `pg_stat_replication`.
    ///
    /// `reply_requested` makes the server answer with a keepalive at once.
    ///
    /// # Panics
    /// When `flushed` goes back: the caller lost its place.
    pub fn status_update(&mut self, written: Lsn, flushed: Lsn, reply_requested: bool) {
        assert!(flushed >= self.flushed, "flush went back from {} to {flushed}", self.flushed);
        if self.wire.unsent() > UNSENT_MAX {
            return;
        }
        self.flushed = flushed;
        let written = written.max(flushed);
        let out = self.wire.output();
        out.put_u8(b'd');
        out.put_u32(4 + STATUS_LEN);
        out.put_u8(b'r');
        out.put_u64(written.0);
        out.put_u64(flushed.0);
        out.put_u64(flushed.0);
        out.put_i64(now_micros());
        out.put_u8(u8::from(reply_requested));
    }

    /// Ends the stream and the session, so that the slot is free when this returns; waits at most
    /// 2 s. Status updates that are queued are sent first.
    pub async fn close(self) {
        self.wire.close(CLOSE_LIMIT).await;
    }
}

/// Body of a standby status update: tag, three positions, clock, flag.
const STATUS_LEN: u32 = 1 + 3 * 8 + 8 + 1;

/// Reads the body of a CopyData message.
///
/// # Errors
/// [`Kind::Protocol`] when it is cut short or of an unknown kind.
pub fn decode(mut body: Bytes) -> Result<Frame> {
    let short = |e| Error::protocol("truncated replication message").caused_by(e);
    match body.try_get_u8().map_err(short)? {
        b'w' => {
            let wal_start = Lsn(body.try_get_u64().map_err(short)?);
            let wal_end = Lsn(body.try_get_u64().map_err(short)?);
            let sent_at = body.try_get_i64().map_err(short)?;
            Ok(Frame::XLogData { wal_start, wal_end, sent_at, data: body })
        }
        b'k' => Ok(Frame::Keepalive {
            wal_end: Lsn(body.try_get_u64().map_err(short)?),
            sent_at: body.try_get_i64().map_err(short)?,
            reply_requested: body.try_get_u8().map_err(short)? != 0,
        }),
        tag => Err(Error::protocol(format!(
            "unknown replication message '{}'; expected 'w' or 'k'",
            char::from(tag).escape_default()
        ))),
    }
}

/// The client's clock, for the server's view only (`reply_time`); nothing here depends on it.
fn now_micros() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since_2000 = since_1970.saturating_sub(POSTGRES_EPOCH);
    i64::try_from(since_2000.as_micros()).unwrap_or(i64::MAX)
}

/// The command. The publication list is identifiers inside a literal: pgoutput splits it like a
/// list of names, the replication grammar knows only `''` as an escape in a literal.
fn start_command(
    slot: &str,
    from: Lsn,
    publications: &[&str],
    options: StreamOptions,
) -> Result<String> {
    if publications.is_empty() {
        return Err(Error::config("no publication to stream"));
    }
    let names: Vec<String> =
        publications.iter().map(|name| identifier(name)).collect::<Result<_>>()?;
    let names = literal(&names.join(","));
    let mut command = format!(
        "START_REPLICATION SLOT \"{slot}\" LOGICAL {from} (proto_version '1', \
         publication_names {names}"
    );
    if options.binary {
        command.push_str(", binary 'true'");
    }
    if options.messages {
        command.push_str(", messages 'true'");
    }
    command.push(')');
    Ok(command)
}

/// <https://www.postgresql.org/docs/current/warm-standby.html>, section on replication slots.
fn slot_name(name: &str) -> Result<&str> {
    let fits = (1..=NAME_MAX).contains(&name.len());
    if fits && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') {
        return Ok(name);
    }
    Err(Error::config(format!(
        "slot name {name:?} is invalid; allowed: 1 to 63 of a-z, 0-9 and '_'"
    )))
}

fn identifier(name: &str) -> Result<String> {
    if !(1..=NAME_MAX).contains(&name.len()) || name.contains('\0') {
        let allowed = "allowed: 1 to 63 bytes without a zero byte";
        return Err(Error::config(format!("publication name {name:?} is invalid; {allowed}")));
    }
    Ok(format!("\"{}\"", name.replace('"', "\"\"")))
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn field<T: std::str::FromStr>(rows: &Rows, column: usize, name: &str) -> Result<T> {
    let text = rows.first().and_then(|row| row.get(column)).and_then(Option::as_ref);
    let value = text.and_then(|text| text.parse().ok());
    value.ok_or_else(|| {
        let text = text.map_or("nothing".into(), |text| format!("{text:?}"));
        Error::protocol(format!("the server answered {text} for {name}"))
    })
}

/// Names the thing, except where the peer is away: then the error is not about the thing.
fn about(error: Error, thing: &str, name: &str) -> Error {
    if error.kind() == Kind::Unreachable {
        return error;
    }
    error.context(format!("{thing} {name:?}"))
}

/// What a stream that has begun lacks: an object is its publication, because the slot cannot go
/// while it is read (an error up to Postgres 17, later a warning); a state is that of the slot.
fn name_loss(error: Error) -> Error {
    match error.sqlstate() {
        Some(UNDEFINED_OBJECT) => error.as_verdict(Verdict::PublicationMissing).hint(format!(
            "create it with `watership init` if it is gone. If it exists, it was created or \
             renamed after the first changes that the slot holds, which cannot be streamed; \
             to accept the gap: {RESYNC} --anyway --from now"
        )),
        Some(OBJECT_NOT_IN_PREREQUISITE_STATE) => error.as_verdict(Verdict::SlotLost).hint(
            format!("`watership check` shows the state of the slot; to accept the gap: {RESYNC}"),
        ),
        _ => error,
    }
}

/// Why the server does not stream from a slot. A missing one and a lost one are found before the
/// stream is asked for; here they went in between.
fn about_slot(error: Error, slot: &str) -> Error {
    let verdict = match error.sqlstate() {
        Some(UNDEFINED_OBJECT) => Verdict::SlotMissing,
        Some(OBJECT_NOT_IN_PREREQUISITE_STATE) if error.to_string().contains("wal_level") => {
            Verdict::WalLevel
        }
        Some(OBJECT_NOT_IN_PREREQUISITE_STATE) => Verdict::SlotLost,
        _ => return about(error, "slot", slot),
    };
    about(error, "slot", slot)
        .as_verdict(verdict)
        .hint(format!("`watership check` says more; to accept the gap: {RESYNC}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn xlog_data() -> Vec<u8> {
        let mut body = vec![b'w'];
        body.put_u64(0x16_0000_0001);
        body.put_u64(0x16_0000_0002);
        body.put_i64(77);
        body.extend_from_slice(b"data");
        body
    }

    #[test]
    fn frames_are_read() {
        let frame = decode(xlog_data().into()).unwrap();
        let (wal_start, wal_end) = (Lsn(0x16_0000_0001), Lsn(0x16_0000_0002));
        let data = Bytes::from_static(b"data");
        assert_eq!(frame, Frame::XLogData { wal_start, wal_end, sent_at: 77, data });
        let mut body = vec![b'k'];
        body.put_u64(9);
        body.put_i64(-1);
        body.put_u8(1);
        let keepalive = Frame::Keepalive { wal_end: Lsn(9), sent_at: -1, reply_requested: true };
        assert_eq!(decode(body.into()).unwrap(), keepalive);
    }

    #[test]
    fn a_frame_cut_short_is_a_protocol_error() {
        let body = xlog_data();
        for end in 0..25 {
            let error = decode(Bytes::copy_from_slice(&body[..end])).unwrap_err();
            assert_eq!(error.kind(), Kind::Protocol, "{end}");
        }
        assert!(decode(Bytes::from_static(b"z123")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_decode_panic(body in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(body.into());
        }
    }

    #[test]
    fn slot_names_are_validated() {
        for good in ["a", "watership_1", &"x".repeat(63)] {
            assert!(slot_name(good).is_ok());
        }
        for bad in ["", "A", "a b", "a\"", "ä", "a-b", &"x".repeat(64)] {
            assert_eq!(slot_name(bad).unwrap_err().kind(), Kind::Config, "{bad}");
        }
    }

    #[test]
    fn publication_names_are_identifiers_inside_a_literal() {
        let options = StreamOptions { binary: true, messages: true };
        let command = start_command("s", Lsn(16), &["plain", "a\"b,'c\\;ä"], options).unwrap();
        assert_eq!(
            command,
            "START_REPLICATION SLOT \"s\" LOGICAL 0/10 (proto_version '1', publication_names \
             '\"plain\",\"a\"\"b,''c\\;ä\"', binary 'true', messages 'true')"
        );
        let none = StreamOptions::default();
        for bad in [&[""][..], &["a\0"], &[], &["ok", &"x".repeat(64)]] {
            assert_eq!(start_command("s", Lsn::ZERO, bad, none).unwrap_err().kind(), Kind::Config);
        }
    }
}
