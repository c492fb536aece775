//! The secret of the database: what is computed of a value that must not be guessed from it. Pure.
//!
//! Invariant: a lane, an id or a hash of a hidden value is an HMAC-SHA256 with a key that is
//! derived from `watership.secret`, one for each purpose, so that none of them says anything about
//! another. All relays of a database have the same secret, also after a failover.

use std::fmt;

use ring::hmac::{Context, HMAC_SHA256, Key, sign};
use uuid::{Builder, Uuid};

/// Keys for each purpose. `Debug` shows none of them.
pub struct DatabaseSecret {
    lanes: Key,
    ids: Key,
    values: Key,
    messages: Key,
}

impl fmt::Debug for DatabaseSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl DatabaseSecret {
    /// From the bytes in `watership.secret`.
    pub fn new(secret: &[u8]) -> Self {
        let master = Key::new(HMAC_SHA256, secret);
        let derive = |purpose: &str| {
            let derived = sign(&master, format!("watership {purpose}").as_bytes());
            Key::new(HMAC_SHA256, derived.as_ref())
        };
        Self {
            lanes: derive("lanes"),
            ids: derive("ids"),
            values: derive("values"),
            messages: derive("messages"),
        }
    }

    /// For the hash of a lane whose key is hidden.
    pub(super) fn lane(&self) -> Context {
        Context::with_key(&self.lanes)
    }

    /// The id of an event whose identity is hidden: a UUID of version 8.
    pub(super) fn id(&self, id: Uuid) -> Uuid {
        let tag = sign(&self.ids, id.as_bytes());
        let bytes = tag.as_ref().first_chunk().expect("SHA-256 has 32 bytes");
        Builder::from_custom_bytes(*bytes).into_uuid()
    }

    /// For the tags of logical messages: `sql/0014_signed_messages.sql` derives the same.
    pub fn messages(&self) -> Key {
        self.messages.clone()
    }

    /// For hashed columns of a route without a salt of its own.
    pub(super) fn values(&self) -> Key {
        self.values.clone()
    }
}

/// For hashed columns of a route with a salt of its own.
pub(super) fn salted(salt: &str) -> Key {
    Key::new(HMAC_SHA256, salt.as_bytes())
}

/// The hash of a value, in hex.
pub(super) fn hash(key: &Key, value: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let tag = sign(key, value);
    let digit = |bits: u8| char::from(DIGITS[usize::from(bits)]);
    tag.as_ref().iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_hmac_sha256_in_hex() {
        // RFC 4231, test case 2.
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hash(&salted("Jefe"), b"what do ya want for nothing?"), expected);
    }

    #[test]
    fn another_database_or_purpose_gives_other_hashes() {
        let (one, other) = (DatabaseSecret::new(b"one"), DatabaseSecret::new(b"other"));
        let id = Uuid::from_u128(7);
        assert_eq!(one.id(id), DatabaseSecret::new(b"one").id(id));
        assert_ne!(one.id(id), other.id(id));
        assert_eq!(one.id(id).get_version_num(), 8);
        assert_ne!(hash(&one.values(), b"x"), hash(&one.lanes, b"x"));
        assert_eq!(format!("{one:?}"), "***");
    }
}
