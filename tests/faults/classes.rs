//! Which tests prove which class of the fault model, and which classes are not run, and why.
//!
//! Groups: A Postgres, B slot, publication and data, C network, D broker, E the relay's process,
//! M the museum.
//! A test of another binary stands with the name of that binary.

use std::collections::HashSet;

use serde_json::json;

use crate::support::results;

/// Class, what goes wrong, and the tests.
type Proved = (&'static str, &'static str, &'static [&'static str]);

const PROVED: &[Proved] = &[
    ("A1", "Postgres killed or shut down immediately", &["pg::pg_a01"]),
    ("A2", "Postgres restarted; fast shutdown not held up", &["pg::pg_a02"]),
    ("A3", "backends terminated", &["pg::pg_a03"]),
    ("A4", "Postgres frozen", &["pg::pg_a04"]),
    ("A5", "server in recovery", &["pg::pg_a05"]),
    ("A6", "failover to a standby that had everything (18)", &["standby::standby_a06"]),
    (
        "A7",
        "failover, relay ahead of the standby (18)",
        &["it failover::\
             after_a_failover_the_stream_goes_on_from_a_synchronised_slot_and_counts_phantoms"],
    ),
    ("A8", "failover, no slot on the new primary", &["cluster::pg_a08"]),
    ("A9", "another cluster", &["it relay_verdicts::another_cluster_behind_the_url_is_a_verdict"]),
    (
        "A10",
        "an old copy of the data",
        &[
            "cluster::pg_a10",
            "it position::a_checkpoint_that_went_back_is_a_verdict_of_the_next_session",
        ],
    ),
    ("A12", "disk of Postgres full", &["host_limits::host_limits_a12"]),
    ("A13", "connections or walsenders exhausted", &["pg::pg_a13"]),
    ("A14", "walsender killed", &["pg::pg_a14"]),
    ("A15", "clocks an hour apart", &["host_limits::host_limits_a15"]),
    ("A16", "held back by a standby that is down (18)", &["standby::standby_a16"]),
    ("A17", "pooler in the URL", &["host_limits::host_limits_a17"]),
    ("A18", "timeouts of the role", &["pg::pg_a18"]),
    ("A19", "intake paused beyond wal_sender_timeout", &["pg::pg_a19"]),
    (
        "B1",
        "slot dropped",
        &[
            "it relay_verdicts::a_slot_dropped_under_a_running_relay_is_a_verdict",
            "it relay_verdicts::museum_m04_a_slot_that_was_made_anew_is_a_verdict",
        ],
    ),
    ("B2", "slot lost, WAL removed", &["slot::slot_b02"]),
    ("B3", "slot invalidated for idleness (18)", &["slot::slot_b03"]),
    (
        "B4",
        "slot advanced by somebody else",
        &["it relay_verdicts::a_slot_that_somebody_else_advanced_is_a_verdict_that_names_the_gap"],
    ),
    ("B5", "checkpoint ahead of the server", &["slot::slot_b05"]),
    ("B6", "slot busy", &["slot::slot_b06"]),
    ("B7", "slot of another kind", &["slot::slot_b07"]),
    (
        "B8",
        "publication dropped (17 and before)",
        &["it relay_verdicts::a_dropped_publication_is_a_verdict_before_and_while_it_runs"],
    ),
    (
        "B9",
        "publication dropped (18)",
        &["it relay_verdicts::\
             events_of_a_time_without_publication_are_a_verdict_even_when_it_is_back"],
    ),
    (
        "B10",
        "publication altered",
        &[
            "it position::\
             a_table_taken_out_under_a_running_relay_is_a_verdict_even_when_it_is_back",
            "it position::a_stream_that_leaves_out_the_canary_is_deaf_and_the_slot_stays",
        ],
    ),
    ("B11", "REPLICATION revoked", &["slot_rights::slot_b11"]),
    ("B12", "rights on the relay's tables revoked", &["slot::slot_b12"]),
    (
        "B13",
        "password changed",
        &[
            "slot_rights::slot_b13",
            "it rotation::a_password_of_postgres_that_changes_in_its_file_is_used",
        ],
    ),
    ("B14", "ALTER TABLE", &["it relay_types::a_table_that_changes_its_columns_is_followed"]),
    ("B15", "replica identity changed", &["slot::slot_b15"]),
    (
        "B16",
        "TRUNCATE",
        &["it relay_types::\
             a_truncate_comes_after_the_rows_before_it_and_before_the_rows_after_it"],
    ),
    (
        "B17",
        "partitions attached and dropped",
        &[
            "it relay::every_partition_arrives_as_the_outbox_even_one_dropped_before_it_was_read",
            "it relay_types::a_partitioned_table_arrives_as_its_root_with_its_key",
        ],
    ),
    (
        "B18",
        "transaction of a million rows",
        &[
            "slot::slot_b18",
            "it relay_faults::\
             a_kill_inside_a_large_transaction_loses_nothing_and_repeats_only_what_was_not_stored",
        ],
    ),
    ("B19", "transaction open across a restart", &["slot::slot_b19"]),
    (
        "B20",
        "subtransactions, savepoints, COPY",
        &[
            "it relay::what_was_rolled_back_never_arrives_and_released_savepoints_do",
            "it relay::rows_of_a_copy_that_share_one_lsn_arrive_once_each",
        ],
    ),
    (
        "B21",
        "two-phase transactions",
        &["it relay_operation::two_phase_transactions_arrive_when_they_are_committed"],
    ),
    (
        "B22",
        "row too large",
        &["it parking::\
             a_message_that_is_too_large_is_parked_and_its_key_follows_while_others_flow"],
    ),
    (
        "B23",
        "row that cannot be sent as text",
        &["it binary::\
             a_row_that_is_too_large_for_text_is_a_verdict_and_binary_mode_gets_past_it"],
    ),
    ("B24", "unchanged TOAST", &["it relay_types::an_unchanged_toast_value_is_absent_and_listed"]),
    (
        "B25",
        "values at the edge of their types",
        &["it relay_types::every_column_type_arrives_in_its_documented_form"],
    ),
    (
        "B26",
        "types that nobody knows",
        &[
            "it type_matrix::random_values_are_the_same_in_text_in_binary_and_in_a_select",
            "it user_types::a_type_made_while_a_session_runs_is_read_and_nothing_is_parked",
            "it user_types::\
             a_backlog_with_a_type_that_is_gone_comes_as_text_or_is_parked_in_binary_mode",
        ],
    ),
    (
        "B27",
        "outbox row that is wrong",
        &[
            "it parking::a_row_that_breaks_the_outbox_contract_is_parked_whole",
            "it parking::an_event_that_no_route_selects_is_parked_until_a_route_is_there",
        ],
    ),
    ("B29", "old snapshots", &["slot::slot_b29"]),
    ("B30", "outbox rows changed or deleted", &["slot::slot_b30"]),
    ("C1", "reset, also inside messages", &["network::network_c01"]),
    ("C2", "end of stream", &["network::network_c02"]),
    ("C3", "half-open, stalled", &["network_slow::network_c03"]),
    ("C4", "one direction dead", &["network::network_c04", "network_slow::network_c04"]),
    ("C5", "latency and jitter", &["network::network_c05"]),
    ("C6", "little bandwidth", &["network_slow::network_c06"]),
    ("C7", "corrupt bytes", &["network::network_c07"]),
    ("C8", "one byte at a time", &["network::network_c08"]),
    ("C9", "name not resolved", &["network::network_c09"]),
    ("C10", "accepted, never answered", &["network::network_c10"]),
    ("C11", "flapping", &["network_slow::network_c11"]),
    ("D1", "node killed", &["broker::broker_d01"]),
    ("D2", "orderly restart", &["broker::broker_d02"]),
    ("D3", "connection closed by an operator", &["broker::broker_d03"]),
    ("D4", "exchange deleted", &["broker::broker_d04"]),
    ("D5", "permission revoked", &["broker_limits::broker_d05"]),
    (
        "D6",
        "channel closed for one message (406)",
        &["it parking::\
             a_message_that_makes_the_broker_close_the_channel_is_found_among_all_and_parked"],
    ),
    ("D8", "queue unbound or deleted", &["broker::broker_d08"]),
    ("D7", "headers beyond a frame", &["broker_limits::broker_d07"]),
    (
        "D9",
        "returns among confirms",
        &["it amqp::museum_m15_returned_are_exactly_the_unroutable_ones_among_fifty_thousand"],
    ),
    ("D10", "nacks of a full queue", &["broker::broker_d10"]),
    (
        "D11",
        "queues that lose what they confirmed",
        &["it audit::\
             each_route_is_graded_by_the_queues_that_its_keys_reach_and_changes_are_noticed"],
    ),
    ("D12", "memory alarm", &["broker::broker_d12"]),
    (
        "D13",
        "flow control",
        &["it crash::a_relay_killed_while_it_drains_large_transactions_loses_nothing"],
    ),
    ("D14", "confirms that never come", &["broker_limits::broker_d14"]),
    (
        "D16",
        "confirms out of order and in ranges",
        &["amqp_fake confirms_out_of_order_and_in_ranges_settle_each_publish_once"],
    ),
    ("D17", "confirms of nothing", &["amqp_fake confirm_that_fits_no_publish_ends_the_session"]),
    ("D18", "node frozen", &["broker::broker_d18"]),
    ("D20", "vhost or user deleted, password changed", &["broker_limits::broker_d20"]),
    (
        "D21",
        "TLS: wrong host, unknown authority, client certificate",
        &["it amqp_tls::certificates_of_both_sides_are_checked_as_the_level_says"],
    ),
    ("D22", "connection limit", &["broker_limits::broker_d22"]),
    ("D23", "disk alarm", &["broker::broker_d23"]),
    ("E1", "killed after WAL was read, and at random", &["process::process_e01"]),
    ("E2", "killed after it was decoded", &["process::process_e02"]),
    ("E3", "killed around a publish", &["process::process_e03"]),
    ("E4", "killed after a return", &["process::process_e04"]),
    ("E5", "killed around a confirm", &["process::process_e05"]),
    ("E6", "killed around a checkpoint", &["process::process_e06"]),
    ("E7", "killed around a feedback", &["process::process_e07"]),
    ("E8", "killed in its handshakes", &["process::process_e08"]),
    ("E10", "killed while it drains", &["process::process_e10"]),
    ("E12", "killed during a failover (18)", &["standby::standby_e12"]),
    ("E13", "SIGTERM once and twice", &["process::process_e13"]),
    ("E14", "frozen, a successor, a zombie", &["process::process_e14"]),
    ("E15", "several relays at once", &["process::process_e15"]),
    ("E16", "little memory", &["process_limits::process_e16"]),
    ("E17", "broker down at full input", &["process::process_e17"]),
    ("E18", "process aborted", &["host_limits::host_limits_e18"]),
    ("E19", "loop that hangs", &["host_limits::host_limits_e19"]),
    ("E20", "log blocked, closed, disk full", &["process_limits::process_e20"]),
    ("E21", "no home, no environment, another user", &["process_limits::process_e21"]),
    (
        "E23",
        "configuration with every kind of mistake",
        &[
            "config each_mistake_is_named_with_what_is_expected",
            "config a_broken_file_is_reported_with_its_place",
        ],
    ),
    ("E24", "clock that jumps", &["host_limits::host_limits_e24"]),
    ("E25", "few file descriptors", &["process_limits::process_e25"]),
    ("E27", "storm on the admin port", &["process_limits::process_e27"]),
    ("E28", "checkpoint missing, corrupt, locked", &["process_limits::process_e28"]),
    ("E29", "many event types", &["process_limits::process_e29"]),
    ("M1", "rows that share an LSN", &["museum::museum_m01"]),
    ("M2", "resume filter never switches off", &["museum::museum_m02"]),
    ("M3", "BEGIN carries the LSN of the first row", &["museum::museum_m03"]),
    (
        "M4",
        "slot re-created, silent gap",
        &["it relay_verdicts::museum_m04_a_slot_that_was_made_anew_is_a_verdict"],
    ),
    ("M5", "the driver acknowledges on its own", &["museum::museum_m05"]),
    ("M6", "keepalive past a small transaction", &["museum::museum_m06"]),
    ("M7", "position of the last callback", &["museum::museum_m07"]),
    ("M8", "size limit inside a transaction", &["museum::museum_m08"]),
    ("M10", "checkpoint stored late", &["museum::museum_m10"]),
    ("M11", "upstream told before the position is stored", &["museum::museum_m11"]),
    (
        "M12",
        "idle table, position never advances",
        &["it relay_operation::\
             museum_m12_an_idle_slot_advances_under_foreign_wal_and_rests_when_only_we_write"],
    ),
    ("M13", "confirm timeout without consequence", &["museum::museum_m13"]),
    (
        "M14",
        "publish to a forbidden exchange never resolves",
        &[
            "amqp_fake museum_m14_closed_channel_fails_its_own_publishes_and_is_opened_again",
            "it amqp::museum_m14_forbidden_exchange_closes_its_channel_and_says_so",
        ],
    ),
    (
        "M15",
        "return linked to the wrong confirm",
        &[
            "it amqp::museum_m15_returned_are_exactly_the_unroutable_ones_among_fifty_thousand",
            "amqp_fake museum_m15_returned_publishes_are_exactly_those_that_came_back",
        ],
    ),
    ("M16", "one internal connection lost, nobody notices", &["museum::museum_m16"]),
    ("M17", "missing confirm in a silent loop", &["museum::museum_m17"]),
    (
        "M18",
        "visibility order is not commit order",
        &["it relay::museum_m18_interleaved_transactions_arrive_whole_in_commit_order"],
    ),
];

/// Classes that have no test here, and the reason.
const NOT_RUN: &[(&str, &str)] = &[
    ("A11", "pg_upgrade needs the programs of two majors from 17 on"),
    ("B28", "a source that polls: tests/it/polling"),
    ("C12", "dropped idle connections need a network namespace; C3 covers what follows"),
    ("C13", "random packet loss needs a network namespace with nftables"),
    ("D15", "an election needs three nodes; a nack is a nack (D10)"),
    ("D19", "a partition needs three nodes, each in a network namespace"),
    ("D24", "power loss needs a file system that forgets (LazyFS, FUSE)"),
    ("D25", "a queue purged or consumed by others: out of scope"),
    ("E9", "a backfill that is killed: tests/it/backfill"),
    ("E11", "there is no reload: configuration is read at the start"),
    ("E22", "there is no reload"),
    ("E26", "there is one version only"),
    ("M9", "a backfill beside live changes: tests/it/backfill"),
];

const SIZES: &[(&str, u32)] = &[("A", 19), ("B", 30), ("C", 13), ("D", 25), ("E", 29), ("M", 18)];

const SOURCES: &[(&str, &str)] = &[
    ("broker", include_str!("broker.rs")),
    ("broker_limits", include_str!("broker_limits.rs")),
    ("cluster", include_str!("cluster.rs")),
    ("museum", include_str!("museum.rs")),
    ("network", include_str!("network.rs")),
    ("network_slow", include_str!("network_slow.rs")),
    ("pg", include_str!("pg.rs")),
    ("process", include_str!("process.rs")),
    ("process_limits", include_str!("process_limits.rs")),
    ("slot", include_str!("slot.rs")),
    ("slot_rights", include_str!("slot_rights.rs")),
    ("standby", include_str!("standby.rs")),
    ("host_limits", include_str!("host_limits.rs")),
];

#[test]
fn every_class_is_proved_or_has_a_reason() {
    let listed: Vec<&str> =
        PROVED.iter().map(|row| row.0).chain(NOT_RUN.iter().map(|row| row.0)).collect();
    let distinct: HashSet<&str> = listed.iter().copied().collect();
    assert_eq!(distinct.len(), listed.len(), "a class stands twice");
    for (group, size) in SIZES {
        for number in 1..=*size {
            let id = format!("{group}{number}");
            assert!(distinct.contains(&*id), "{id} has neither a test nor a reason");
        }
    }
    assert_eq!(distinct.len(), SIZES.iter().map(|(_, size)| *size as usize).sum::<usize>());
}

#[test]
fn every_test_that_is_named_exists_and_the_table_is_told() {
    let mut lines = String::new();
    for (id, title, tests) in PROVED {
        for test in *tests {
            if let Some((module, name)) = test.split_once("::").filter(|_| !test.contains(' ')) {
                let source = SOURCES.iter().find(|(known, _)| *known == module);
                let source = source.unwrap_or_else(|| panic!("no module {module}")).1;
                assert!(source.contains(&format!("async fn {name}")), "{id}: {test} is not a test");
                let class = format!("(\"{id}\"");
                assert!(source.contains(&class), "{id}: {test} tells another");
            } else {
                let (binary, name) = test.split_once(' ').expect("a binary and a test");
                let (module, function) = name.rsplit_once("::").unwrap_or(("", name));
                let path = match binary {
                    "it" => format!("tests/it/{module}.rs"),
                    "config" => "tests/config/main.rs".to_owned(),
                    other => format!("tests/{other}.rs"),
                };
                let source = std::fs::read_to_string(&path).expect("the file is there");
                assert!(
                    source.contains(&format!("fn {function}(")),
                    "{id}: no {function} in {path}"
                );
            }
        }
        lines += &format!("{}\n", json!({"listed": id, "title": title, "tests": tests}));
    }
    for (id, reason) in NOT_RUN {
        lines += &format!("{}\n", json!({"listed": id, "not_run": reason}));
    }
    results::add(&lines);
}
