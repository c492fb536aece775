//! What the assembler is told before the stream starts: the outbox, the captured tables, timelines,
//! and the position after which events are new.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ring::hmac::Key;

use crate::column::Types;
use crate::position::{Lsn, Position};
use crate::source::CanarySighting;
use crate::source::outbox::OutboxTable;

/// What the assembler has to know before the stream starts.
#[derive(Debug, Clone)]
pub struct Options {
    /// Epoch of the checkpoint.
    pub epoch: u32,
    /// System identifier of the cluster.
    pub system_id: u64,
    /// Timelines of the cluster.
    pub timelines: Timelines,
    /// Events up to and including this position were settled before: they are not handed on.
    pub resume_after: Position,
    /// Name of the database.
    pub database: Arc<str>,
    /// The outbox.
    pub outbox: OutboxTable,
    /// The key of the tags of logical messages.
    pub messages: Key,
    /// The captured tables, by `schema.table`. Changes of other tables that are published are
    /// counted and left out.
    pub captured: HashMap<String, CapturedTable>,
    /// Where the WAL ended when the catalog was read for `captured` and `types`.
    pub catalog_at: Lsn,
    /// OIDs of captured tables in which columns were replaced under the same names since they were
    /// recorded.
    pub renumbered: HashSet<u32>,
    /// The types of users and extensions.
    pub types: Types,
    /// Most bytes of a body: a value that alone makes a larger one is not made text of.
    pub max_body: usize,
    /// Name of the relay whose canary is looked for.
    pub canary: String,
    /// The last one that came before the checkpoint. Absent before the first.
    pub canary_before: Option<CanarySighting>,
    /// Canaries up to this number may be missing: a person accepted that.
    pub canary_accepted: u64,
}

/// What the catalog says of a captured table.
#[derive(Debug, Clone, Default)]
pub struct CapturedTable {
    /// Under another name it is still this one: the stream has the name of its time, and the next
    /// comparison with the catalog decides about it.
    pub oid: u32,
    /// The columns of its primary key. Under most replica identities the stream flags other columns
    /// or all of them, so it cannot tell.
    pub primary_key: Vec<String>,
    /// Its first columns, which have had the same places in every description that is older than
    /// this, whatever they were called; empty where that is not certain.
    pub leading: Vec<String>,
    /// It has partitions, which log their rows with identities of their own.
    pub partitioned: bool,
    /// Neither updates nor deletes are published, so it does not matter which row they are about.
    pub inserts_only: bool,
    /// How the stream described it at the position that is resumed.
    pub former: Option<Former>,
    /// Its loss holds back only its own changes: what is not certain to be of it is left out.
    pub held: Option<HeldTable>,
}

impl CapturedTable {
    pub(super) fn is_lost(&self) -> bool {
        matches!(self.held, Some(HeldTable::Lost { .. }))
    }
}

/// What a table with `on_table_lost = "hold"` is when a session begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldTable {
    /// It is there.
    There,
    /// It is not; the OID is the one that it had, or 0.
    Lost {
        /// OID of the table that has its name and cannot be captured; 0 without one.
        unfit: u32,
    },
}

/// What is kept of a description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Former {
    /// See [`crate::event::Table`].
    pub version: u64,
    /// Names of the key's columns then. Under replica identity FULL an older description can name
    /// columns that the catalog calls otherwise today.
    pub key: Vec<String>,
}

/// Which timeline an LSN lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timelines {
    current: u32,
    /// (timeline, LSN at which it ended), ascending.
    history: Vec<(u32, Lsn)>,
}

impl Timelines {
    /// `history` lists the earlier timelines with their switch points, oldest first.
    pub fn new(current: u32, history: Vec<(u32, Lsn)>) -> Self {
        assert!(history.is_sorted_by_key(|(_, end)| *end), "timelines end in order");
        Self { current, history }
    }

    /// The timeline that the server is on.
    pub fn current(&self) -> u32 {
        self.current
    }

    /// The earlier timelines with their switch points, oldest first.
    pub fn history(&self) -> &[(u32, Lsn)] {
        &self.history
    }

    pub(super) fn at(&self, lsn: Lsn) -> u32 {
        self.history.iter().find(|(_, end)| lsn < *end).map_or(self.current, |(tli, _)| *tli)
    }
}
