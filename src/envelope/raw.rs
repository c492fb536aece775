//! Format `raw`: the payload of an outbox row, byte for byte, as the application wrote it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;

use crate::error::{Error, Result};
use crate::event::OutboxPayload;

/// A body that is known to be writable.
pub(super) enum Body<'a> {
    Verbatim(&'a [u8]),
    Hex(&'a [u8]),
}

impl<'a> Body<'a> {
    /// Checks the payload; what is found good can be written.
    pub(super) fn of(payload: &'a OutboxPayload) -> Result<Self> {
        match payload {
            OutboxPayload::Json(bytes) | OutboxPayload::Bytes(bytes) => Ok(Body::Verbatim(bytes)),
            OutboxPayload::Empty => Ok(Body::Verbatim(&[])),
            OutboxPayload::Hex(text) => {
                let digits = text
                    .strip_prefix(b"\\x")
                    .filter(|d| d.len().is_multiple_of(2) && d.iter().all(u8::is_ascii_hexdigit));
                digits.map(Body::Hex).ok_or_else(|| {
                    Error::event("a bytea of the outbox row is not in hex form")
                        .hint("the replication session must run with bytea_output = hex")
                })
            }
            OutboxPayload::Broken(broken) => Err(Error::event(broken.why.clone())
                .hint("discard it, and add constraints to the table that refuse such rows")),
        }
    }

    /// Appends it.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Body::Verbatim(bytes) => out.extend_from_slice(bytes),
            Body::Hex(digits) => {
                let digit = |d: u8| match d {
                    b'0'..=b'9' => d - b'0',
                    _ => (d | 0x20) - b'a' + 10,
                };
                out.extend(digits.chunks_exact(2).map(|d| digit(d[0]) << 4 | digit(d[1])));
            }
        }
    }

    /// It has no bytes.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Body::Verbatim(bytes) | Body::Hex(bytes) => bytes.is_empty(),
        }
    }

    /// Appends it in base64, for formats that are JSON.
    pub(super) fn write_base64(&self, out: &mut Vec<u8>) {
        let mut bytes = Vec::new();
        self.write(&mut bytes);
        out.extend_from_slice(STANDARD.encode(&bytes).as_bytes());
    }
}

/// The payload, if it is one JSON value: then it can stand in another one.
///
/// # Errors
/// [`crate::error::Kind::Event`] when it is not.
pub(super) fn checked_json(payload: &[u8]) -> Result<&str> {
    let value: &RawValue = serde_json::from_slice(payload).map_err(|_| {
        Error::event("the payload is not JSON, and the format of the route puts it into JSON")
            .hint("use format = \"raw\" for this route, or write the payload as JSON")
    })?;
    Ok(value.get())
}
