//! What each series means, for `# HELP` of `/metrics`; `docs/metrics.md` holds the same texts.

use metrics::{Recorder, SharedString};

/// Name, labels and meaning of every series. Names that end in `_total` are counters, the latencies
/// of routes are histograms, the others are gauges.
pub const HELP: &[(&str, &str, &str)] = &[
    // Routes.
    ("watership_events_received_total", "route, owner", "Events that the route matched."),
    (
        "watership_events_dropped_total",
        "route, owner",
        "Events dropped by the route or its filter.",
    ),
    (
        "watership_messages_published_total",
        "route, owner",
        "Messages handed to the broker, retries included.",
    ),
    (
        "watership_messages_confirmed_total",
        "route, owner",
        "Messages that the broker confirmed and that reached a queue.",
    ),
    (
        "watership_messages_nacked_total",
        "route, owner",
        "Messages that the broker refused (basic.nack), for example because a queue is full.",
    ),
    (
        "watership_messages_returned_total",
        "route, owner",
        "Messages that the broker returned because no queue is bound (basic.return).",
    ),
    (
        "watership_commit_to_confirm_seconds",
        "route, owner",
        "Time from the commit of the event's transaction to the broker's confirm.",
    ),
    (
        "watership_capture_to_publish_seconds",
        "route, owner",
        "Time from reading the event to sending its message.",
    ),
    (
        "watership_route_held",
        "route, owner",
        "1 while nothing of the route is sent, because its destination is broken.",
    ),
    (
        "watership_route_held_seconds",
        "route, owner",
        "How long the route has been held; 0 if it is not.",
    ),
    (
        "watership_route_refused_seconds",
        "route, owner",
        "How long the broker has refused messages of the route; 0 if it does not.",
    ),
    (
        "watership_route_oldest_unsettled_seconds",
        "route, owner",
        "Age of the route's oldest message without a confirm.",
    ),
    (
        "watership_route_grade",
        "route, owner, grade",
        "1 for what a confirm of the route's messages is worth, by the audit of the broker.",
    ),
    (
        "watership_route_drift_total",
        "route, owner",
        "Changes of the route's table that broke what the route had promised.",
    ),
    ("watership_route_probes_total", "", "Messages sent to find out whether a held route works."),
    // Parked messages.
    (
        "watership_messages_parked_total",
        "route, kind",
        "Messages parked because they could not be published, by reason.",
    ),
    ("watership_parked_rows", "route, kind", "Parked messages that wait, by reason."),
    ("watership_parked", "", "Parked messages that wait."),
    ("watership_parked_keys", "", "Keys with a parked or blocked message."),
    (
        "watership_parked_blocked",
        "",
        "Messages that cannot be published and may not be parked; each blocks its key.",
    ),
    (
        "watership_parked_oldest_seconds",
        "",
        "Age of the oldest parked or blocked message; 0 without one.",
    ),
    ("watership_parked_retried_total", "", "Parked messages that were sent again."),
    (
        "watership_parked_lost_total",
        "",
        "Parked messages that a promoted standby lacks, as far as this process knows.",
    ),
    // What is under way.
    ("watership_in_flight_messages", "", "Messages sent and not yet answered by the broker."),
    ("watership_window_events", "", "Messages in the window: read and not yet settled."),
    ("watership_window_bytes", "", "Bytes of the messages in the window."),
    ("watership_window_paused", "", "1 while reading pauses because the window is full."),
    // The WAL.
    (
        "watership_slot_lag_bytes",
        "",
        "WAL between the slot's confirmed position and the end of the WAL.",
    ),
    ("watership_retained_wal_bytes", "", "WAL that the slot keeps from being removed."),
    (
        "watership_safe_wal_size_bytes",
        "",
        "WAL that can still be written before the slot may be lost; +Inf without a limit.",
    ),
    (
        "watership_slot_at_risk",
        "",
        "1 while WAL that the slot needs may be removed, or fills the disk.",
    ),
    (
        "watership_slot_held_by_standby",
        "",
        "1 while Postgres sends nothing because a standby has not received it yet.",
    ),
    ("watership_wal_status", "status", "1 for the slot's wal_status in pg_replication_slots."),
    (
        "watership_position_lsn",
        "stage",
        "Position in the WAL, as a number of bytes: received, settled, stored, told to the slot.",
    ),
    ("watership_transactions_total", "", "Transactions read to their end."),
    ("watership_changes_received_total", "", "Changes read, before any filter or route."),
    (
        "watership_events_skipped_total",
        "",
        "Events that came again although the checkpoint had passed them.",
    ),
    (
        "watership_canary_age_seconds",
        "",
        "Age of the last canary that came through the stream; 0 without canaries.",
    ),
    (
        "watership_phantom_suspected_total",
        "",
        "Events published that a failover has rolled back in the database.",
    ),
    // Polling.
    ("watership_polls_total", "", "Times that the outbox table was polled."),
    ("watership_poll_batches_total", "", "Batches found by polling."),
    (
        "watership_poll_batch",
        "stage",
        "Number of the newest batch that was found, and of the last one stored as settled.",
    ),
    (
        "watership_poll_backlog_age_seconds",
        "",
        "How long ago the oldest batch was found that is not settled and stored.",
    ),
    // Checkpoint, sessions, broker.
    (
        "watership_checkpoint_age_seconds",
        "",
        "Time since the stored position was last as new as the settled one.",
    ),
    ("watership_checkpoints_total", "", "Times that the position was stored."),
    (
        "watership_last_confirmed_timestamp_seconds",
        "",
        "Unix time of the broker's last confirm; 0 before the first.",
    ),
    (
        "watership_broker_blocked",
        "",
        "1 while the broker blocks the connection (memory or disk alarm).",
    ),
    (
        "watership_broker_blocked_seconds_total",
        "",
        "Time that the connection was blocked, in whole seconds.",
    ),
    ("watership_circuit_state", "state", "1 for the state of the sessions' circuit breaker."),
    ("watership_session_tries", "", "Failed sessions in a row."),
    ("watership_next_try_seconds", "", "Wait before the next session; 0 while one runs."),
    ("watership_sessions_total", "", "Sessions started."),
    ("watership_reconnects_total", "cause", "Sessions ended, by cause."),
    (
        "watership_busy_total",
        "what",
        "Sessions that could not start because another relay has the lock or the slot.",
    ),
    ("watership_audit_failures_total", "", "Audits of the broker that failed."),
    ("watership_verdict", "verdict", "1 for the verdict that ended the relay."),
    // The outbox table.
    (
        "watership_outbox_partitions_created_total",
        "",
        "Partitions of the outbox made ahead of time.",
    ),
    (
        "watership_outbox_partitions_dropped_total",
        "",
        "Partitions of the outbox dropped after every relay had passed them.",
    ),
    (
        "watership_outbox_partitions_skipped_total",
        "",
        "Days without a partition of their own, because the default partition has their rows.",
    ),
    (
        "watership_outbox_maintain_postponed_total",
        "",
        "Partition work put off because the table was locked.",
    ),
    ("watership_outbox_maintain_failures_total", "", "Partition work that failed."),
    (
        "watership_outbox_rows_deleted_total",
        "",
        "Rows of a mapped outbox table that delete_after deleted.",
    ),
    ("watership_outbox_updates_ignored_total", "", "Updates of outbox rows, which are ignored."),
    (
        "watership_messages_ignored_total",
        "",
        "Logical messages that are ignored: not transactional, or not written by emit_wal.",
    ),
    // Captured tables.
    (
        "watership_table_lost",
        "table",
        "1 while a captured table is missing or not published, with on_table_lost set to hold.",
    ),
    ("watership_backfill_rows_total", "table", "Rows that backfills have read and settled."),
    (
        "watership_backfill_rows_left_out_total",
        "table",
        "Rows that backfills have read and settled, but not sent.",
    ),
    (
        "watership_backfill_chunks_given_up_total",
        "table",
        "Chunks of backfills that were given up and read again.",
    ),
    ("watership_backfill_running", "table", "1 while a backfill has begun and not ended."),
    ("watership_backfill_waiting", "table", "1 while a backfill waits for something."),
    ("watership_backfill_failed_total", "table", "Backfills that failed."),
];

/// Hands the texts to the exporter, which keeps one for each name, whatever its type.
pub(super) fn describe(recorder: &impl Recorder) {
    for (name, _, meaning) in HELP {
        recorder.describe_gauge((*name).into(), None, SharedString::const_str(meaning));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{BackfillMetrics, Exporter, Metrics, RouteLabel, TableMetrics, builder};

    #[test]
    fn every_series_has_a_help_text_and_the_labels_that_it_says() {
        let recorder = builder().build_recorder();
        describe(&recorder);
        let exporter = Exporter(recorder.handle());
        metrics::with_local_recorder(&recorder, || {
            Metrics::new(&[RouteLabel { name: "a".into(), owner: "team".into() }]).routes[0]
                .commit_to_confirm
                .record(0.5);
            BackfillMetrics::new(["public.t".to_owned()]);
            TableMetrics::new(["public.t".to_owned()]);
        });
        let text = exporter.render();
        let told: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# HELP ")).collect();
        for (name, labels, meaning) in HELP {
            let help = format!("{name} {meaning}");
            assert!(told.contains(&&*help), "{help}");
            let suffix = if name.contains("_to_") { "_count" } else { "" };
            let series = format!("{name}{suffix}");
            let found: Vec<_> = text
                .lines()
                .filter_map(|line| line.strip_prefix(&*series))
                .filter(|rest| rest.starts_with(['{', ' ']))
                .collect();
            assert!(!found.is_empty(), "{series} is missing from\n{text}");
            for rest in found {
                let names =
                    rest.split('=').rev().skip(1).map(|part| {
                        part.rsplit([',', '{']).next().expect("a split has a last part")
                    });
                let mut names: Vec<_> = names.collect();
                names.reverse();
                assert_eq!(names.join(", "), *labels, "{series}{rest}");
            }
        }
        let types = text.lines().filter(|line| line.starts_with("# TYPE "));
        assert_eq!(types.count(), HELP.len(), "a series has no help text:\n{text}");
    }
}
