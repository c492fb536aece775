//! What a standby relay waits for.

use std::fmt;

use serde::Serialize;

use super::Concern;

/// What a standby may not know of the relay that it waits for.
pub(super) const NOBODY_READS: &str = "nobody reads this relay's slot: the other relay of this \
    name serves another database (give one of them another name or vhost), or its connection is \
    dead and the broker has not noticed yet";

/// How long the slot may have no reader before that is a problem, in seconds: a relay that has just
/// taken the lock reads it soon, and the broker notices a dead connection by its heartbeats.
const UNREAD_MAX: u64 = 30;

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
    /// For how long that has been so, in seconds.
    pub doubt_seconds: Option<u64>,
}

impl StandingBy {
    /// What is wrong, if it has waited too long behind a lock whose holder does not do its work.
    pub(super) fn in_vain(&self) -> Option<Concern> {
        let seconds = self.doubt_seconds.filter(|seconds| *seconds >= UNREAD_MAX)?;
        let owner = self.lock_owner.as_ref();
        let owner = owner.map_or(String::new(), |owner| format!(" (for {owner})"));
        Some(Concern::new(
            format!(
                "on standby, and nobody has read the slot for {seconds} s: the connection that \
                 holds the lock{owner} does not do this relay's work"
            ),
            "if a relay of this name serves another database, give one of them another name or \
             vhost; if the connection is dead, find its pid with `rabbitmqctl list_connections pid \
             name client_properties`, then `rabbitmqctl close_connection '<pid>' 'reason'`",
        ))
    }
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
