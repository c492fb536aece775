//! Whose fault it is that an attempt did not commit.

use super::{Error, HandlerError, NOT_MAINTAINED, is_serialization};

/// Why an attempt did not commit.
pub(super) enum Failure {
    /// The handler, or what it left to the commit.
    Handler(HandlerError),
    /// The inbox itself.
    Inbox(Error),
}

impl Failure {
    pub fn is_serialization(&self) -> bool {
        match self {
            Self::Handler(error) => error.is_serialization(),
            Self::Inbox(error) => error.sqlstate().is_some_and(is_serialization),
        }
    }

    pub fn into_error(self) -> HandlerError {
        match self {
            Self::Handler(error) => error,
            Self::Inbox(error) => error.into(),
        }
    }

    pub fn is_not_maintained(&self) -> bool {
        matches!(self, Self::Inbox(error) if error.sqlstate() == Some(NOT_MAINTAINED))
    }
}
