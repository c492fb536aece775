//! The one error type.
//!
//! A kind says what the caller does about it; the text names the thing, its value and what is
//! allowed; the hint says what to do. `Kind::retry` is the only place that decides whether another
//! try can help; `fault`, `pg/sqlstate` and `amqp/reply` decide the kind.

use std::error::Error as StdError;
use std::fmt;

use crate::verdict::Verdict;

/// What the caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The configuration or the command line is wrong. Nothing was started. Exit code 2.
    Config,
    /// A peer cannot be reached or went away: sockets, timeouts, server shutdown.
    Unreachable,
    /// A peer answered and refused: authentication, permission, a missing object.
    Refused,
    /// The thing exists but somebody else holds it: an active slot, the lock queue.
    Busy,
    /// A peer sent something that its protocol does not allow, or that we do not understand.
    Protocol,
    /// One event can never be published: too large, not encodable, no route.
    Event,
    /// Going on would be a guess. A person must decide. Exit code 3.
    Verdict,
}

impl Kind {
    /// Every kind, in the order of the list above.
    pub const ALL: [Kind; 7] = [
        Kind::Config,
        Kind::Unreachable,
        Kind::Refused,
        Kind::Busy,
        Kind::Protocol,
        Kind::Event,
        Kind::Verdict,
    ];

    /// What a person should do about errors of this kind, when nothing better is known.
    pub fn advice(self) -> &'static str {
        match self {
            Kind::Config => "correct the configuration or the command line, then start again",
            Kind::Unreachable => "nothing, if the peer comes back: it is tried again for ever",
            Kind::Refused => "mend what the text names; it is tried again, slowly, for ever",
            Kind::Busy => "nothing: this one takes over when the other one ends",
            Kind::Protocol => {
                "look for a proxy in between and for the versions of both ends; it is tried again"
            }
            Kind::Event => "mend or discard the event; it can never be published as it is",
            Kind::Verdict => "decide how to go on, then start again: `watership check` says more",
        }
    }

    /// Whether another try can help: the one place that decides it.
    pub fn retry(self) -> Retry {
        match self {
            Kind::Unreachable | Kind::Busy | Kind::Protocol => Retry::Soon,
            Kind::Refused => Retry::Slowly,
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
            Kind::Event => "event",
            Kind::Verdict => "verdict",
        }
    }
}

/// Whether another try can help, and how patiently to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Soon: the peer is away and will be back.
    Soon,
    /// Slowly: a person has to change something, then it works without a restart.
    Slowly,
    /// Never.
    Never,
}

/// An error with its kind, its story and what to do about it.
pub struct Error {
    kind: Kind,
    what: String,
    verdict: Option<Verdict>,
    hint: Option<String>,
    code: Option<String>,
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

    /// A [`Kind::Event`] error.
    pub fn event(what: impl Into<String>) -> Self {
        Self::new(Kind::Event, what)
    }

    /// A [`Kind::Verdict`] error.
    pub fn verdict(what: impl Into<String>) -> Self {
        Self::new(Kind::Verdict, what)
    }

    /// A [`Kind::Verdict`] error with a stable name, which begins its text.
    pub fn named(verdict: Verdict, what: impl fmt::Display) -> Self {
        let what = format!("{}: {what}", verdict.name());
        Self { verdict: Some(verdict), ..Self::new(Kind::Verdict, what) }
    }

    /// The same story as a [`Kind::Verdict`] with a stable name, which begins its text.
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

    /// Adds the peer's own code, such as a SQLSTATE.
    #[must_use]
    pub fn coded(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    /// The peer's own code, where it gave one.
    pub fn code(&self) -> Option<&str> {
        self.code.as_deref()
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

    /// The same story under another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// What the caller does about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a person should do, where we know it.
    pub fn advice(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The text, with the advice in brackets where we know one.
    pub fn text_with_advice(&self) -> String {
        match self.advice() {
            Some(hint) => format!("{self} ({hint})"),
            None => self.to_string(),
        }
    }

    /// What a person should do: the advice of this error, else that of its kind.
    pub fn what_to_do(&self) -> &str {
        self.advice().unwrap_or_else(|| self.kind.advice())
    }

    /// Which verdict it is, where it has a name.
    pub fn name(&self) -> Option<Verdict> {
        self.verdict
    }

    /// Whether another try can help.
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
        let mut cause = self.source.as_ref().map(|e| &**e as &dyn StdError);
        while let Some(e) = cause {
            write!(f, ": {e}")?;
            cause = e.source();
        }
        Ok(())
    }
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
    fn a_verdict_is_never_retried() {
        assert_eq!(Error::verdict("slot recreated").retry(), Retry::Never);
        assert_eq!(Error::refused("password").retry(), Retry::Slowly);
        assert_eq!(Error::unreachable("down").retry(), Retry::Soon);
    }
}
