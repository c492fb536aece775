//! From a logical message of `watership.emit_wal` to an event. Pure.
//!
//! Invariant: whatever stands in the content becomes an event: what this program cannot read
//! (another version, a message that something else wrote under our prefix) is parked under an id of
//! its own, never a crash and never a loop. `sql/0009_emit_wal.sql` writes the form.

use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use bytestring::ByteString;
use uuid::Uuid;

use super::{Assembler, MARK_PREFIX, POSTGRES_EPOCH_US, State, id_source};
use crate::error::Result;
use crate::event::{Broken, Content, Identity, OutboxPayload, OutboxRow, Row, Table};
use crate::position::Lsn;
use crate::source::Item;

/// Prefix of the messages that are events. All others are somebody else's.
const PREFIX: &str = "watership";
/// Version of the form.
const VERSION: u8 = 1;

impl Assembler {
    /// A logical message: an event, a mark of ours, or traffic of somebody else. `at` is its LSN
    /// as XLogData has it, and as it says itself.
    pub(super) fn logical(
        &mut self,
        prefix: &str,
        transactional: bool,
        at: (Lsn, Lsn),
        content: Bytes,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        match (prefix, transactional) {
            (PREFIX, _) => return self.message(at.0, transactional, content, out),
            (MARK_PREFIX, true) => self.low_mark(at.1, &content, out),
            _ => {}
        }
        Ok(())
    }

    /// A logical message with our prefix. One outside of a transaction was sent even if its own
    /// rolled back and has no place among the others: it is not an event.
    fn message(
        &mut self,
        lsn: Lsn,
        transactional: bool,
        content: Bytes,
        out: &mut Vec<Item>,
    ) -> Result<()> {
        if !transactional {
            self.seen.messages_ignored += 1;
            return Ok(());
        }
        let counted = self.count_sub(lsn)?;
        self.seen.changes += 1;
        if let State::Open(transaction) = &mut self.state {
            transaction.has_messages = true;
        }
        let (id, at, row) = match read(content.clone()) {
            Ok(read) => (read.id, read.created_at_us, read.row),
            Err(why) => {
                let source = id_source(&mut self.namespace, &self.options, &counted);
                let id = self.ids.row(source, &[], &Row::default());
                (id, counted.transaction.committed_at_us, unreadable(why, content))
            }
        };
        self.hand_on(counted, &self.no_table, id, at, Content::Outbox(Box::new(row)), out);
        Ok(())
    }
}

/// What stands for the table of an event that comes from none.
pub(super) fn no_table(database: &Arc<str>) -> Arc<Table> {
    Arc::new(Table {
        database: database.clone(),
        oid: 0,
        version: 0,
        schema: "watership".into(),
        name: "emit_wal".into(),
        full_name: "watership.emit_wal".into(),
        columns: Vec::new(),
        key: Vec::new(),
        identity: Identity::Nothing,
    })
}

/// A message that was read.
struct Message {
    id: Uuid,
    /// In microseconds since 1970-01-01 UTC.
    created_at_us: i64,
    row: OutboxRow,
}

/// The event of a content, or why there is none. Texts and body are slices of the content.
fn read(mut content: Bytes) -> std::result::Result<Message, String> {
    const SHORT: &str = "the logical message is cut off";
    let short = |_| SHORT.to_owned();
    let version = content.try_get_u8().map_err(|_| "the logical message is empty".to_owned())?;
    if version != VERSION {
        return Err(format!(
            "the logical message has version {version}, and this program reads version {VERSION}"
        ));
    }
    let kind = content.try_get_u8().map_err(short)?;
    let id = Uuid::from_u128(content.try_get_u128().map_err(short)?);
    let created_at = content.try_get_i64().map_err(short)?;
    let mut text = |name: &str| -> std::result::Result<Option<ByteString>, String> {
        let length = content.try_get_i32().map_err(short)?;
        if length == -1 {
            return Ok(None);
        }
        let length = usize::try_from(length).ok().filter(|length| *length <= content.len());
        let text = content.split_to(length.ok_or_else(|| SHORT.to_owned())?);
        ByteString::try_from(text).map(Some).map_err(|_| format!("{name} is not valid UTF-8"))
    };
    let mut needed = |name: &str| text(name)?.ok_or_else(|| format!("{name} is null"));
    let aggregate_type = needed("aggregate_type")?;
    let aggregate_id = needed("aggregate_id")?;
    let event_type = needed("event_type")?;
    let content_type = text("content_type")?;
    let traceparent = text("traceparent")?;
    let headers = text("headers")?.map(ByteString::into_bytes);
    let payload = match kind {
        b'j' => OutboxPayload::Json(content),
        b'b' => OutboxPayload::Bytes(content),
        other => return Err(format!("the logical message has a body of unknown kind {other}")),
    };
    let row = OutboxRow {
        aggregate_type,
        aggregate_id,
        event_type,
        payload,
        content_type,
        headers,
        traceparent,
        columns: None,
        shown: Vec::new(),
    };
    Ok(Message { id, created_at_us: created_at.saturating_add(POSTGRES_EPOCH_US), row })
}

/// An event of a content that cannot be read. All of them have one key.
fn unreadable(why: String, content: Bytes) -> OutboxRow {
    let columns = vec![("content".to_owned(), Some(content))];
    OutboxRow {
        aggregate_type: ByteString::from_static("watership.emit_wal"),
        aggregate_id: ByteString::from_static("unreadable"),
        event_type: ByteString::from_static("unreadable"),
        payload: OutboxPayload::Broken(Box::new(Broken { why, columns })),
        content_type: None,
        headers: None,
        traceparent: None,
        columns: None,
        shown: Vec::new(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::BufMut as _;
    use proptest::prelude::*;

    use super::*;

    /// A content in the form of the SQL.
    pub(in crate::source::transaction) fn content(
        id: u128,
        event_type: &str,
        body: &[u8],
    ) -> Bytes {
        let mut out = vec![VERSION, b'b'];
        out.put_u128(id);
        out.put_i64(5);
        let texts = [Some("order"), Some("7"), Some(event_type), None, None, Some("{\"a\": 1}")];
        for text in texts {
            match text {
                None => out.put_i32(-1),
                Some(text) => {
                    out.put_i32(text.len() as i32);
                    out.extend_from_slice(text.as_bytes());
                }
            }
        }
        out.extend_from_slice(body);
        out.into()
    }

    #[test]
    fn a_message_is_read_as_it_was_written() {
        let Message { id, created_at_us, row } = read(content(9, "paid", b"\0x")).ok().unwrap();
        assert_eq!((id.as_u128(), created_at_us), (9, POSTGRES_EPOCH_US + 5));
        let texts = [&row.aggregate_type, &row.aggregate_id, &row.event_type];
        assert_eq!(texts, ["order", "7", "paid"]);
        assert_eq!(row.headers.as_deref(), Some(&b"{\"a\": 1}"[..]));
        assert!(matches!(&row.payload, OutboxPayload::Bytes(body) if &body[..] == b"\0x"));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let whole = content(9, "paid", b"");
        let changed = |index: usize, byte: u8| {
            let mut bytes = whole.to_vec();
            bytes[index] = byte;
            read(bytes.into()).err().expect("it is refused")
        };
        assert_eq!(read(Bytes::new()).err().expect("refused"), "the logical message is empty");
        let version = "the logical message has version 2, and this program reads version 1";
        assert_eq!(changed(0, 2), version);
        assert_eq!(changed(1, b'x'), "the logical message has a body of unknown kind 120");
        // The first length, and the first byte of the text after it.
        assert_eq!(changed(26, 0x7F), "the logical message is cut off");
        assert_eq!(changed(26, 0xFE), "the logical message is cut off");
        assert_eq!(changed(30, 0xFF), "aggregate_type is not valid UTF-8");
        for cut in 1..whole.len() {
            let told = read(whole.slice(..cut)).err().expect("it is refused");
            assert_eq!(told, "the logical message is cut off", "{cut}");
        }
    }

    proptest! {
        #[test]
        fn no_content_makes_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(bytes.clone().into());
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = read(bytes.into());
        }
    }
}
