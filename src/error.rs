//! The one error type.
//!
//! A kind says what the caller does about it; the text names the thing, its value and what is
//! allowed; the hint says what a person should do; the code is the peer's own. `Kind::retry` is the
//! only place that decides whether another attempt can help. The kind of a failed socket, of an
//! SQLSTATE and of a reply code comes from the tables in `fault`, `pg/sqlstate` and `amqp/reply`.

use std::error::Error as StdError;
use std::fmt;

use crate::verdict::Verdict;

/// What the caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The configuration or the command line is wrong, or a file that it names. Ends a start with
    /// exit code 2; a relay that has run before retries: a file may be half rotated.
    Config,
    /// A peer cannot be reached or went away: sockets, timeouts, server shutdown.
    Unreachable,
    /// A peer answered and refused: authentication, permission, a missing object.
    Refused,
    /// The thing exists but another process holds it: an active slot, the lock queue.
    Busy,
    /// A peer sent something that its protocol does not allow, or that we do not understand.
    Protocol,
    /// A bug of ours, or this machine does not let the process run: no thread, no signals. Ends a
    /// start with exit code 1; a relay that has run before starts a new session.
    Internal,
    /// One event can never be published: too large, not encodable, no route.
    Event,
    /// Continuing would be a guess. A person must decide. Exit code 3.
    Verdict,
}

impl Kind {
    /// Every kind, in the order of the list above.
    pub const ALL: [Kind; 8] = [
        Kind::Config,
        Kind::Unreachable,
        Kind::Refused,
        Kind::Busy,
        Kind::Protocol,
        Kind::Internal,
        Kind::Event,
        Kind::Verdict,
    ];

    /// What a person should do about errors of this kind, when nothing better is known.
    pub fn hint(self) -> &'static str {
        match self {
            Kind::Config => "correct the configuration or the command line, then start again",
            Kind::Unreachable => "no action needed: Watership retries until the peer is back",
            Kind::Refused => {
                "fix the cause given in the error; Watership retries at least every 15 s"
            }
            Kind::Busy => {
                "no action needed: this relay is on standby and takes over when the other stops"
            }
            Kind::Protocol => {
                "check for a proxy in between and for version mismatches; Watership keeps retrying"
            }
            Kind::Internal => {
                "probably a bug: please report it, unless this machine ran out of memory, threads \
                 or file descriptors"
            }
            Kind::Event => "fix or discard the event; it can never be published as it is",
            Kind::Verdict => {
                "decide how to continue, then start again; `watership check` explains it"
            }
        }
    }

    /// A person must decide: see [`Verdict`].
    pub fn is_verdict(self) -> bool {
        self == Kind::Verdict
    }

    /// Whether another attempt can help: the one place that decides it.
    pub fn retry(self) -> Retry {
        match self {
            Kind::Unreachable | Kind::Busy | Kind::Protocol => Retry::Soon,
            Kind::Refused | Kind::Internal => Retry::Slowly,
            Kind::Config | Kind::Event | Kind::Verdict => Retry::Never,
        }
    }

    /// A short stable word for metric labels and logs.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Config => "config",
            Kind::Unreachable => "unreachable",
            Kind::Refused => "refused",
            Kind::Busy => "busy",
            Kind::Protocol => "protocol",
            Kind::Internal => "internal",
            Kind::Event => "event",
            Kind::Verdict => "verdict",
        }
    }
}

/// Whether another attempt can help, and how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Soon: the peer is away and will be back.
    Soon,
    /// Slowly: someone must change something, then it works without a restart.
    Slowly,
    /// Never.
    Never,
}

/// The peer's own code for what went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Code {
    /// Postgres: five characters. `pg/sqlstate` knows them.
    Sqlstate(String),
    /// RabbitMQ: an AMQP reply code. `amqp/reply` knows them.
    Reply(u16),
}

/// An error with its kind, its text and what to do about it.
pub struct Error {
    kind: Kind,
    what: String,
    verdict: Option<Verdict>,
    hint: Option<String>,
    code: Option<Code>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; `what` names the thing, its value and what is allowed.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), verdict: None, hint: None, code: None, source: None }
    }

    /// A [`Kind::Config`] error.
    pub fn config(what: impl Into<String>) -> Self {
        Self::new(Kind::Config, what)
    }

    /// A [`Kind::Unreachable`] error.
    pub fn unreachable(what: impl Into<String>) -> Self {
        Self::new(Kind::Unreachable, what)
    }

    /// A [`Kind::Refused`] error.
    pub fn refused(what: impl Into<String>) -> Self {
        Self::new(Kind::Refused, what)
    }

    /// A [`Kind::Protocol`] error.
    pub fn protocol(what: impl Into<String>) -> Self {
        Self::new(Kind::Protocol, what)
    }

    /// A [`Kind::Internal`] error, with the hint of its kind.
    pub fn internal(what: impl Into<String>) -> Self {
        Self::new(Kind::Internal, what).hint(Kind::Internal.hint())
    }

    /// A [`Kind::Event`] error.
    pub fn event(what: impl Into<String>) -> Self {
        Self::new(Kind::Event, what)
    }

    /// A [`Kind::Verdict`] error with a stable name, which begins its text.
    pub fn named(verdict: Verdict, what: impl fmt::Display) -> Self {
        let what = format!("{}: {what}", verdict.name());
        Self { verdict: Some(verdict), ..Self::new(Kind::Verdict, what) }
    }

    /// The same error as a [`Kind::Verdict`] with a stable name, which begins its text.
    #[must_use]
    pub fn as_verdict(mut self, verdict: Verdict) -> Self {
        (self.kind, self.verdict) = (Kind::Verdict, Some(verdict));
        self.context(verdict.name())
    }

    /// Adds what a person should do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the peer's own code.
    #[must_use]
    pub fn coded(mut self, code: Code) -> Self {
        self.code = Some(code);
        self
    }

    /// The peer's own code, where it gave one.
    pub fn code(&self) -> Option<&Code> {
        self.code.as_ref()
    }

    /// The SQLSTATE, where Postgres gave one.
    pub fn sqlstate(&self) -> Option<&str> {
        match self.code.as_ref()? {
            Code::Sqlstate(code) => Some(code),
            Code::Reply(_) => None,
        }
    }

    /// The AMQP reply code, where RabbitMQ gave one.
    pub fn reply_code(&self) -> Option<u16> {
        match self.code.as_ref()? {
            Code::Reply(code) => Some(*code),
            Code::Sqlstate(_) => None,
        }
    }

    /// Adds the error below this one.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Puts `context` before the text: what was being done.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.what = format!("{context}: {}", self.what);
        self
    }

    /// The same error under another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// What the caller does about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a person should do about this error, where we know it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// What a person should do: the hint of this error, else that of its kind.
    pub fn hint_or_kind(&self) -> &str {
        self.hint_text().unwrap_or_else(|| self.kind.hint())
    }

    /// The text, with the hint in brackets where we know one.
    pub fn text_with_hint(&self) -> String {
        match self.hint_text() {
            Some(hint) => format!("{self} ({hint})"),
            None => self.to_string(),
        }
    }

    /// Which verdict it is, where it has a name.
    pub fn verdict(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Whether another attempt can help.
    pub fn retry(&self) -> Retry {
        self.kind.retry()
    }

    /// A short stable word for metric labels and logs.
    pub fn label(&self) -> &'static str {
        self.kind.label()
    }
}

impl fmt::Display for Error {
    /// The text with the whole chain of causes on one line, without the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        write_causes(f, self.source.as_ref().map(|e| &**e as &dyn StdError))
    }
}

/// Adds a cause and the causes of that, on the same line.
pub(crate) fn write_causes(
    f: &mut fmt::Formatter<'_>,
    mut cause: Option<&dyn StdError>,
) -> fmt::Result {
    while let Some(e) = cause {
        write!(f, ": {e}")?;
        cause = e.source();
    }
    Ok(())
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)?;
        match &self.hint {
            Some(hint) => write!(f, " (hint: {hint})"),
            None => Ok(()),
        }
    }
}

// The chain is already part of Display, so `source` stays `None`: printers that walk the chain
// would otherwise say everything twice.
impl StdError for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_tells_the_whole_chain_once() {
        let io = std::io::Error::other("connection reset");
        let error = Error::unreachable("reading from the broker").caused_by(io).context("session");
        assert_eq!(error.to_string(), "session: reading from the broker: connection reset");
    }

    #[test]
    fn the_kind_decides_about_another_attempt() {
        assert_eq!(Error::named(Verdict::SlotRecreated, "x").retry(), Retry::Never);
        assert_eq!(Error::refused("password").retry(), Retry::Slowly);
        assert_eq!(Error::internal("no publication").retry(), Retry::Slowly);
        assert_eq!(Error::unreachable("down").retry(), Retry::Soon);
    }
}
