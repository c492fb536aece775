//! What the messages of a route look like. Pure.

/// The format of a route's messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Format {
    /// The payload of an outbox row and nothing else; a captured table has no payload.
    #[default]
    Raw,
    /// One JSON object that tells what happened, to what, and where in the stream.
    Watership,
}

impl Format {
    /// The word in the configuration.
    pub fn as_str(&self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Watership => "watership",
        }
    }
}
