//! What a handler says of a message that it could not handle.

use std::error::Error as StdError;
use std::{fmt, io};

use tokio_postgres::error::SqlState;

use crate::error::{Error, write_causes};

/// Why a message was not handled. Every error becomes one by `?`, and its message is tried again.
pub struct HandlerError {
    source: Box<dyn StdError + Send + Sync>,
    permanent: bool,
}

impl HandlerError {
    /// The message can never be handled: it is parked or dead-lettered at once.
    pub fn permanent(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { source: error.into(), permanent: true }
    }

    /// Whether another attempt is useless.
    pub fn is_permanent(&self) -> bool {
        self.permanent
    }

    /// Whether Postgres only asks for the transaction once more: it could not be serialized, or it
    /// was the one to give up in a deadlock.
    pub(super) fn is_serialization(&self) -> bool {
        let mut error: Option<&(dyn StdError + 'static)> = Some(&*self.source);
        while let Some(e) = error {
            let code = match (e.downcast_ref::<tokio_postgres::Error>(), e.downcast_ref::<Error>())
            {
                (Some(error), _) => error.code().map(SqlState::code),
                (None, Some(error)) => error.sqlstate(),
                (None, None) => None,
            };
            if code.is_some_and(is_serialization) {
                return true;
            }
            // An io::Error names the source of what it holds, and passes over that itself.
            let held = e.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            error = held.map(|held| held as &(dyn StdError + 'static)).or_else(|| e.source());
        }
        false
    }
}

/// Serialization failure, deadlock.
pub(super) fn is_serialization(sqlstate: &str) -> bool {
    matches!(sqlstate, "40001" | "40P01")
}

/// The error at the end of a handler's transaction, with what the handler did to it: the server
/// only says that a statement cannot be run there.
pub(super) fn spoilt(error: Error) -> Error {
    match error.sqlstate() {
        // No transaction is open, or not the one with our savepoint.
        Some("25P01" | "3B001") => error.context(
            "the handler ended the transaction (COMMIT or ROLLBACK): leave that to the inbox",
        ),
        Some("25P02") => error.context("the handler hid an error of the database"),
        _ => error,
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync>>> From<E> for HandlerError {
    fn from(error: E) -> Self {
        Self { source: error.into(), permanent: false }
    }
}

/// The error with its causes, on one line.
impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        write_causes(f, self.source.source())
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{self}", if self.permanent { "permanent: " } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn only_a_serialization_failure_in_the_chain_is_one() {
        let coded = |code: &str| Error::refused("x").coded(Code::Sqlstate(code.into()));
        assert!(HandlerError::from(coded("40001")).is_serialization());
        assert!(HandlerError::from(std::io::Error::other(coded("40P01"))).is_serialization());
        assert!(!HandlerError::from(coded("23505")).is_serialization());
        assert!(!HandlerError::from("could not serialize access").is_serialization());
    }

    #[test]
    fn every_error_may_be_tried_again_unless_it_says_otherwise() {
        fn fails() -> Result<(), HandlerError> {
            "x".parse::<u8>()?;
            Ok(())
        }
        assert!(!fails().unwrap_err().is_permanent());
        let error = HandlerError::permanent("no such order");
        assert_eq!((error.is_permanent(), error.to_string()), (true, "no such order".to_owned()));
    }
}
