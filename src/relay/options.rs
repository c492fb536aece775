//! The options of a relay: both ends, routes, limits and intervals.
//!
//! There are no defaults here: `config` has each key with its default and what is allowed.

use std::time::Duration;

use crate::pg::publication::TableName;
use crate::relay::backfill;
use crate::relay::parking::Limits;
use crate::relay::upkeep::route_audit::AuditOptions;
use crate::route::Rule;
use crate::source::SourceKind;
use crate::source::outbox::OutboxTable;
use crate::source::poll::Interval;
use crate::{amqp, pg};

/// All options of a relay.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of the relay: its checkpoint row, its lock queue, the `app_id` of its messages.
    pub name: String,
    /// What it reads from. Slot, publication, captured tables and canary are only of the WAL.
    pub kind: SourceKind,
    /// How often a source that polls looks.
    pub poll_interval: Interval,
    /// How to reach Postgres and log in.
    pub sql: pg::connect::Options,
    /// Replication slot.
    pub slot: String,
    /// Publication.
    pub publication: String,
    /// The outbox.
    pub outbox: OutboxTable,
    /// Captured tables in addition to the outbox, `schema.table`.
    pub tables: Vec<String>,
    /// Those of them whose loss holds back only their own changes (`on_table_lost = "hold"`).
    pub held: Vec<TableName>,
    /// Whether values come in binary form: allows rows whose text form exceeds 1 GB.
    pub binary: bool,
    /// How to reach the broker and log in. The relay fills in `exchanges` and `lock_queue`.
    pub broker: amqp::options::Options,
    /// Exchanges, queues and bindings to declare or verify at the start of a session.
    pub topology: amqp::topology::Topology,
    /// How the broker is audited.
    pub audit: AuditOptions,
    /// Routes.
    pub rules: Vec<Rule>,
    /// Limits and intervals of the loop.
    pub tuning: Tuning,
    /// Age at which outbox partitions are retired.
    pub retain: Duration,
    /// Whether the relay runs `watership.maintain`.
    pub maintain: bool,
    /// Age at which rows of a mapped outbox table are deleted; absent: never.
    pub delete_after: Option<Duration>,
    /// How long applications leave the rows of a mapped outbox table that is polled.
    pub retained_for: Option<Duration>,
    /// Age at which released and discarded rows of `watership.parked` are removed.
    pub parked_retain: Duration,
    /// How often the canary is written; zero means never.
    pub canary_interval: Duration,
    /// How rows of captured tables are read that were there before.
    pub backfill: backfill::Options,
    /// Whether a changed partition count or queue may be used while messages are queued in these.
    pub accept_reorder: bool,
}

impl Options {
    /// The queue that only one relay of the name can hold.
    pub fn lock_queue(&self) -> String {
        format!("watership.{}.lock", self.name)
    }

    /// The tables whose changes the relay expects in its stream.
    pub fn wanted(&self) -> Vec<String> {
        let own = [&self.outbox.table, &TableName::canary()].map(ToString::to_string);
        own.into_iter().chain(self.tables.iter().cloned()).collect()
    }
}

/// Limits and intervals of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Limits of what is in memory.
    pub window: WindowLimits,
    /// Maximum number of events that are settled and not stored.
    pub max_unstored: usize,
    /// Maximum time between progress and its checkpoint.
    pub checkpoint_interval: Duration,
    /// Maximum time that a shutdown waits for the messages in the window.
    pub drain_timeout: Duration,
    /// How often an idle stream may advance the slot when little WAL was written.
    pub idle_interval: Duration,
    /// Limits of what is parked; above them messages wait in the window.
    pub parked: Limits,
}

/// Limits of what is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowLimits {
    /// Entries between the oldest unsettled one and the newest, commits included.
    pub events: usize,
    /// Bytes of their messages.
    pub bytes: usize,
    /// Messages sent and not confirmed.
    pub unconfirmed: usize,
}
