//! The named reasons for which a relay stops until a person decides.
//!
//! A name is stable: the text of the error begins with it, and it is a metric label and a field of
//! `/status`. The error's hint says what to do; a gap is accepted with `watership resync`. The exit
//! code is 3 for all of them.
//!
//! To add one: its variant and name here, how `resync` continues after it in `relay/check/resync`,
//! and `Error::named` where it is found.

/// The command that accepts a gap.
pub const RESYNC: &str = "watership resync --accept-gap --reason '…'";

/// Why continuing would be a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// `wal_level` is no longer logical.
    WalLevel,
    /// The system identifier is another one.
    OtherCluster,
    /// The server is on another timeline, and no failover slot connects the two.
    TimelineChanged,
    /// The checkpoint lies beyond the end of the server's WAL: an older state was restored.
    CheckpointAhead,
    /// The checkpoint lies before what this very process had stored: it was set back.
    CheckpointWentBack,
    /// There is no slot of that name.
    SlotMissing,
    /// The slot cannot be this relay's: another plugin or database, temporary, or two-phase.
    SlotUnfit,
    /// WAL that the slot needs was removed.
    SlotLost,
    /// The slot was re-created: what was committed in between is not in it.
    SlotRecreated,
    /// The slot is past what this relay ever authorised: another process moved it.
    SlotAhead,
    /// There is no publication of that name.
    PublicationMissing,
    /// The publication is another one than that of the checkpoint.
    PublicationRecreated,
    /// Operations, root names, a row filter or a column list of the publication changed.
    PublicationAltered,
    /// A table is no longer in the publication.
    TableRemoved,
    /// A table of the publication was dropped and re-created.
    TableRecreated,
    /// The stream moves on without delivering published changes.
    StreamDeaf,
    /// There is no checkpoint for this relay.
    CheckpointMissing,
    /// The checkpoint belongs to another slot.
    OtherSlot,
    /// The schema in the database is missing, newer, or not what this program knows.
    SchemaUnknown,
    /// The outbox lacks a column that is needed.
    OutboxAltered,
    /// Postgres fails repeatedly to send the same row.
    RowUnsendable,
    /// An event that cannot be published, on a route with `on_poison = "stop"`.
    EventUnpublishable,
    /// A table lacks what a route with `on_drift = "stop"` promised.
    SchemaDrift,
    /// What cannot be published cannot be parked either: Postgres refuses the row.
    ParkingRefused,
    /// A route would use other partitions while messages are queued in those in force.
    PartitionsChanged,
    /// A batch that the polling relay stored is gone from its table.
    BatchMissing,
    /// A batch was made with another table or other columns than the outbox has now.
    BatchUnreadable,
    /// The outbox has rows of transactions that this cluster has not had yet.
    ForeignRows,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Verdict; 28] = [
        Verdict::WalLevel,
        Verdict::OtherCluster,
        Verdict::TimelineChanged,
        Verdict::CheckpointAhead,
        Verdict::CheckpointWentBack,
        Verdict::SlotMissing,
        Verdict::SlotUnfit,
        Verdict::SlotLost,
        Verdict::SlotRecreated,
        Verdict::SlotAhead,
        Verdict::PublicationMissing,
        Verdict::PublicationRecreated,
        Verdict::PublicationAltered,
        Verdict::TableRemoved,
        Verdict::TableRecreated,
        Verdict::StreamDeaf,
        Verdict::CheckpointMissing,
        Verdict::OtherSlot,
        Verdict::SchemaUnknown,
        Verdict::OutboxAltered,
        Verdict::RowUnsendable,
        Verdict::EventUnpublishable,
        Verdict::SchemaDrift,
        Verdict::ParkingRefused,
        Verdict::PartitionsChanged,
        Verdict::BatchMissing,
        Verdict::BatchUnreadable,
        Verdict::ForeignRows,
    ];

    /// The stable name.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::WalLevel => "wal_level",
            Verdict::OtherCluster => "other_cluster",
            Verdict::TimelineChanged => "timeline_changed",
            Verdict::CheckpointAhead => "checkpoint_ahead",
            Verdict::CheckpointWentBack => "checkpoint_went_back",
            Verdict::SlotMissing => "slot_missing",
            Verdict::SlotUnfit => "slot_unfit",
            Verdict::SlotLost => "slot_lost",
            Verdict::SlotRecreated => "slot_recreated",
            Verdict::SlotAhead => "slot_ahead",
            Verdict::PublicationMissing => "publication_missing",
            Verdict::PublicationRecreated => "publication_recreated",
            Verdict::PublicationAltered => "publication_altered",
            Verdict::TableRemoved => "table_removed",
            Verdict::TableRecreated => "table_recreated",
            Verdict::StreamDeaf => "stream_deaf",
            Verdict::CheckpointMissing => "checkpoint_missing",
            Verdict::OtherSlot => "other_slot",
            Verdict::SchemaUnknown => "schema_unknown",
            Verdict::OutboxAltered => "outbox_altered",
            Verdict::RowUnsendable => "row_unsendable",
            Verdict::EventUnpublishable => "event_unpublishable",
            Verdict::SchemaDrift => "schema_drift",
            Verdict::ParkingRefused => "parking_refused",
            Verdict::PartitionsChanged => "partitions_changed",
            Verdict::BatchMissing => "batch_missing",
            Verdict::BatchUnreadable => "batch_unreadable",
            Verdict::ForeignRows => "foreign_rows",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_and_differ() {
        let mut names = Verdict::ALL.map(Verdict::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Verdict::ALL.len());
        assert!(names.concat().bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
    }
}
