//! What a standby relay waits for.

use std::fmt;

use serde::Serialize;

/// What a standby may not know of the relay that it waits for.
pub(super) const NOBODY_READS: &str = "nobody reads this relay's slot: the other relay of this \
    name serves another database (give one of them another name or vhost), or its connection is \
    dead and the broker has not noticed yet";

/// Who reads the slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// The slot.
    pub slot: String,
    /// Process id of the walsender in Postgres.
    pub pid: i32,
    /// Address and port of the reader; absent for a unix socket, or when the role may not see it.
    pub client: Option<String>,
}

/// What a standby relay waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StandingBy {
    /// What is held: the error of the last try.
    pub because: String,
    /// Who reads the slot; absent when nobody does, then only the lock queue is held.
    pub slot_holder: Option<Holder>,
    /// Whom the connection that holds the lock queue works for, as the management API shows it.
    pub lock_owner: Option<String>,
    /// Why it may wait in vain.
    pub doubt: Option<&'static str>,
}

impl fmt::Display for StandingBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "on standby: {}", self.because)?;
        if let Some(owner) = &self.lock_owner {
            write!(f, "; the lock is held for {owner}")?;
        }
        if let Some(doubt) = self.doubt {
            write!(f, "; {doubt}")?;
        }
        let Some(Holder { slot, pid, client }) = &self.slot_holder else { return Ok(()) };
        write!(f, "; slot {slot:?} is in use by pid {pid}")?;
        client.as_ref().map_or(Ok(()), |client| write!(f, " from {client}"))
    }
}
