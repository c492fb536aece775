//! The calls of `sql/inbox`, for whichever client runs them. A time is a double with whole seconds
//! since 1970, or NULL: so no client needs a type for times.

pub(super) const CLAIM: &str = "SELECT watership_inbox.claim($1, $2, to_timestamp($3))";
#[cfg(feature = "inbox")]
pub(super) const CLAIM_WITH_HASH: &str =
    "SELECT watership_inbox.claim($1, $2, to_timestamp($3), $4, $5)";
pub(super) const CLAIM_WITHOUT_TIME: &str = "SELECT watership_inbox.claim($1, $2)";
pub(super) const CLAIM_MANY: &str = "SELECT watership_inbox.claim_many($1, $2, \
    ARRAY(SELECT to_timestamp(t.at) FROM unnest($3) WITH ORDINALITY AS t (at, n) ORDER BY t.n))";
pub(super) const RECEIVE: &str =
    "SELECT watership_inbox.receive($1, $2, to_timestamp($3), $4, $5, $6::text::jsonb)";
pub(super) const PARK: &str =
    "SELECT watership_inbox.park($1, $2, to_timestamp($3), $4, $5, $6, $7, $8::text::jsonb)";
pub(super) const FORGET: &str = "SELECT watership_inbox.forget($1, $2)";

/// What `watership_inbox.receive` says to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Handle the message, commit, acknowledge.
    Handle,
    /// It was handled before: commit, acknowledge.
    Duplicate,
    /// It is stored behind an earlier message of its key, or because nobody can know whether it was
    /// handled: commit, acknowledge.
    Parked,
}

impl Received {
    /// Reads the answer.
    pub(super) fn read(answer: &str) -> Option<Self> {
        match answer {
            "handle" => Some(Self::Handle),
            "duplicate" => Some(Self::Duplicate),
            "parked" => Some(Self::Parked),
            _ => None,
        }
    }
}
