//! From a logical message of `watership.emit_wal` to an event. Pure.
//!
//! Invariant: every role of the database can write messages with our prefix, so only those with the
//! tag of `emit_wal` are events; the others are counted and ignored. One with the tag that cannot
//! be read is parked under an id of its own: it never causes a crash or a loop. The form is that of
//! `sql/0014_signed_messages.sql`.

use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use bytestring::ByteString;
use ring::digest::SHA256_OUTPUT_LEN;
use ring::hmac::{Key, verify};
use uuid::Uuid;

use super::{Assembler, MARK_PREFIX, POSTGRES_EPOCH_US, State, id_source};
use crate::error::Result;
use crate::event::{Broken, Content, Identity, OutboxPayload, OutboxRow, Row, Table};
use crate::position::Lsn;
use crate::source::Item;

/// Prefix of the messages that are events. All others are somebody else's.
const PREFIX: &str = "watership";
/// Version of the form.
const VERSION: u8 = 2;
/// Version and tag come before what is signed.
const SIGNED_FROM: usize = 1 + SHA256_OUTPUT_LEN;

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
        let Some(signed) = signed(&self.options.messages, &content) else {
            self.seen.messages_unsigned += 1;
            return Ok(());
        };
        self.seen.changes += 1;
        if let State::Open(transaction) = &mut self.state {
            transaction.has_messages = true;
        }
        let (id, at, row) = match read(signed) {
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

/// What follows the tag, if the tag is valid.
fn signed(key: &Key, content: &Bytes) -> Option<Bytes> {
    if content.first() != Some(&VERSION) || content.len() < SIGNED_FROM {
        return None;
    }
    let signed = content.slice(SIGNED_FROM..);
    verify(key, &signed, &content[1..SIGNED_FROM]).is_ok().then_some(signed)
}

/// The event of a signed content, or why there is none. Texts and body are slices of the content.
fn read(mut content: Bytes) -> std::result::Result<Message, String> {
    const SHORT: &str = "the logical message is cut off";
    let short = |_| SHORT.to_owned();
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
    use ring::hmac::{HMAC_SHA256, sign};

    use super::*;

    /// The key of these tests.
    pub(in crate::source::transaction) fn key() -> Key {
        Key::new(HMAC_SHA256, b"of a test")
    }

    /// A message in the form of the SQL.
    pub(in crate::source::transaction) fn content(
        id: u128,
        event_type: &str,
        body: &[u8],
    ) -> Bytes {
        with_tag(&unsigned(id, event_type, body))
    }

    /// Anything with the right tag.
    pub(in crate::source::transaction) fn with_tag(content: &[u8]) -> Bytes {
        [&[VERSION], sign(&key(), content).as_ref(), content].concat().into()
    }

    /// What is signed of it.
    fn unsigned(id: u128, event_type: &str, body: &[u8]) -> Bytes {
        let mut out = vec![b'b'];
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
        let Message { id, created_at_us, row } = read(unsigned(9, "paid", b"\0x")).ok().unwrap();
        assert_eq!((id.as_u128(), created_at_us), (9, POSTGRES_EPOCH_US + 5));
        let texts = [&row.aggregate_type, &row.aggregate_id, &row.event_type];
        assert_eq!(texts, ["order", "7", "paid"]);
        assert_eq!(row.headers.as_deref(), Some(&b"{\"a\": 1}"[..]));
        assert!(matches!(&row.payload, OutboxPayload::Bytes(body) if &body[..] == b"\0x"));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let whole = unsigned(9, "paid", b"");
        let changed = |index: usize, byte: u8| {
            let mut bytes = whole.to_vec();
            bytes[index] = byte;
            read(bytes.into()).err().expect("it is refused")
        };
        assert_eq!(changed(0, b'x'), "the logical message has a body of unknown kind 120");
        // The first length, and the first byte of the text after it.
        assert_eq!(changed(25, 0x7F), "the logical message is cut off");
        assert_eq!(changed(25, 0xFE), "the logical message is cut off");
        assert_eq!(changed(29, 0xFF), "aggregate_type is not valid UTF-8");
        for cut in 0..whole.len() {
            let told = read(whole.slice(..cut)).err().expect("it is refused");
            assert_eq!(told, "the logical message is cut off", "{cut}");
        }
    }

    #[test]
    fn only_what_the_key_has_signed_is_an_event() {
        let whole = content(9, "paid", b"body");
        assert!(signed(&key(), &whole).is_some_and(|of| of == unsigned(9, "paid", b"body")));
        for place in 0..whole.len() {
            let mut bytes = whole.to_vec();
            bytes[place] ^= 1;
            assert!(signed(&key(), &bytes.into()).is_none(), "{place}");
            assert!(signed(&key(), &whole.slice(..place)).is_none(), "{place}");
        }
        assert!(signed(&Key::new(HMAC_SHA256, b"another"), &whole).is_none());
    }

    proptest! {
        #[test]
        fn no_content_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(bytes.clone().into());
            prop_assert!(signed(&key(), &bytes.into()).is_none());
        }
    }
}
