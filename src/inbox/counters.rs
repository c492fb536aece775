//! What a consumer counts, by the facade `metrics`: without a recorder it costs nothing.

use metrics::{Counter, counter};

/// Why a subscription was opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// The broker ended it: the queue was deleted, or the consumer took too long.
    Cancelled,
    /// The broker closed the channel.
    ChannelClosed,
    /// The connection is gone, or nothing was heard on it.
    ConnectionLost,
    /// Messages waited, and none came.
    Watchdog,
    /// The database was away, so nothing was to be consumed.
    Database,
}

impl Loss {
    /// As the label says it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::ChannelClosed => "channel_closed",
            Self::ConnectionLost => "connection_lost",
            Self::Watchdog => "watchdog",
            Self::Database => "database",
        }
    }
}

/// The counters of one consumer.
pub(super) struct Counters {
    consumer: String,
    /// Messages whose handler has committed.
    pub handled: Counter,
    /// Messages that had been handled before.
    pub duplicates: Counter,
    /// Failed attempts.
    pub failures: Counter,
    /// Transactions that Postgres could not serialize.
    pub retries: Counter,
    /// Messages that came back.
    pub redelivered: Counter,
}

impl Counters {
    /// All of them, at zero where a recorder shows them.
    pub fn new(consumer: &str) -> Self {
        let of = |name: &'static str| counter!(name, "consumer" => consumer.to_owned());
        Self {
            consumer: consumer.to_owned(),
            handled: of("watership_inbox_handled_total"),
            duplicates: of("watership_inbox_duplicates_total"),
            failures: of("watership_inbox_failures_total"),
            retries: of("watership_inbox_retries_total"),
            redelivered: of("watership_inbox_redelivered_total"),
        }
    }

    /// A message was parked.
    pub fn parked(&self, reason: &str) {
        self.reason("watership_inbox_parked_total", reason);
    }

    /// A message was published as a dead letter.
    pub fn dead_lettered(&self, reason: &str) {
        self.reason("watership_inbox_dead_lettered_total", reason);
    }

    /// A subscription was lost.
    pub fn resubscribed(&self, cause: Loss) {
        let consumer = self.consumer.clone();
        let name = "watership_inbox_resubscribed_total";
        counter!(name, "consumer" => consumer, "cause" => cause.label()).increment(1);
    }

    fn reason(&self, name: &'static str, reason: &str) {
        let (consumer, reason) = (self.consumer.clone(), reason.to_owned());
        counter!(name, "consumer" => consumer, "reason" => reason).increment(1);
    }
}
