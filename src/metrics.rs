//! What the relay counts and measures, as handles that are made once.
//!
//! Invariant: every series exists from the start, so an alert on a rate or on absence works from
//! the first scrape. Names are `watership_…`, in base units (seconds, bytes), counters end in
//! `_total`. A handle is a pointer to an atomic: the hot path looks up no name.
//!
//! Labels of a route come from `Config::route_labels`; what is counted for each publish is counted
//! in `relay/window/outcomes`.
//!
//! Without an installed recorder all handles do nothing; tests and the simulation rely on that.
//! Somebody must call [`Exporter::upkeep`] every few seconds even when nobody scrapes: histogram
//! samples wait in memory until then.

mod backfill;
mod help;
mod outbox;
mod parked;
mod poll;
mod tables;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::error::{Error, Result};
use crate::position::Lsn;
use crate::verdict::Verdict;
pub use backfill::BackfillMetrics;
pub use help::HELP;
pub use outbox::OutboxMetrics;
pub use parked::ParkedMetrics;
pub use poll::PollMetrics;
pub use tables::TableMetrics;

/// Upper bounds of the buckets of every `_seconds` histogram, in seconds: 0.5 ms to 60 s.
const BUCKETS: [f64; 16] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];

/// The values of `pg_replication_slots.wal_status`.
///
/// <https://www.postgresql.org/docs/current/view-pg-replication-slots.html>
pub const WAL_STATUS: [&str; 4] = ["reserved", "extended", "unreserved", "lost"];

/// Renders what was recorded in the Prometheus text format.
#[derive(Clone)]
pub struct Exporter(PrometheusHandle);

/// Makes the process record metrics. To be called once, before [`Metrics::new`].
///
/// # Errors
/// [`crate::error::Kind::Internal`] when a recorder is installed already.
pub fn install() -> Result<Exporter> {
    let recorder = builder().build_recorder();
    help::describe(&recorder);
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder)
        .map_err(|e| Error::internal("metrics cannot be recorded").caused_by(e))?;
    Ok(Exporter(handle))
}

fn builder() -> PrometheusBuilder {
    // Without explicit buckets the exporter would render summaries, which cannot be added up.
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)
        .expect("the list of buckets is not empty")
}

impl Exporter {
    /// Everything, in the Prometheus text format.
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Moves histogram samples into their buckets and frees their memory. Every few seconds.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

/// What identifies a route in labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteLabel {
    /// Name of the route.
    pub name: String,
    /// Who is called when this route is broken; may be empty.
    pub owner: String,
}

/// All handles.
#[derive(Clone)]
pub struct Metrics {
    /// By route, in the order of the list given to [`Metrics::new`] (index = `RouteId`).
    pub routes: Vec<RouteMetrics>,
    /// What is unsettled right now.
    pub window: WindowMetrics,
    /// The replication slot and the positions in the WAL.
    pub wal: WalMetrics,
    /// Polling.
    pub poll: PollMetrics,
    /// The checkpoint row.
    pub checkpoint: CheckpointMetrics,
    /// The broker connection.
    pub broker: BrokerMetrics,
    /// The outbox table's upkeep.
    pub outbox: OutboxMetrics,
    /// What could not be published.
    pub parked: ParkedMetrics,
    /// Whether sessions work.
    pub circuit: CircuitMetrics,
    /// Probes of held routes.
    pub probes: Counter,
    /// Sessions that could not be opened because another relay holds the lock queue.
    pub lock_busy: Counter,
    /// Sessions that could not be opened because the slot is in use.
    pub slot_busy: Counter,
    /// Audits of the broker that failed.
    pub audit_failures: Counter,
    /// Sessions started.
    pub sessions: Counter,
    /// Sessions ended, by cause; see [`Metrics::ended`].
    reconnects: Vec<(&'static str, Counter)>,
    /// 1 for the verdict that ended the relay.
    verdicts: Vec<(Verdict, Gauge)>,
}

/// Handles of one route (labels `route`, `owner`).
#[derive(Clone)]
pub struct RouteMetrics {
    /// Events that this route matched.
    pub received: Counter,
    /// Messages handed to the broker, retries included.
    pub published: Counter,
    /// Messages that the broker confirmed and that reached a queue.
    pub confirmed: Counter,
    /// `basic.nack`.
    pub nacked: Counter,
    /// `basic.return`: no queue is bound.
    pub returned: Counter,
    /// Events that a route with `drop = true`, or its filter, dropped.
    pub dropped: Counter,
    /// Times that its table was described without something that the route promised.
    pub drifted: Counter,
    /// From the transaction's commit time to the confirm, in seconds.
    pub commit_to_confirm: Histogram,
    /// From reading the change off the socket to handing the message to the publisher, in seconds.
    pub capture_to_publish: Histogram,
    /// 1 while the route is held because its destination is broken.
    pub held: Gauge,
    grade: Vec<(&'static str, Gauge)>,
    /// For how long it has been held, in seconds; 0 when it is not.
    pub held_seconds: Gauge,
    /// For how long the broker has refused (nacked) messages of it, in seconds; 0 when it does not.
    pub refused_seconds: Gauge,
    /// Age of its oldest message without a confirm, since it was read, in seconds.
    pub oldest_unsettled_seconds: Gauge,
}

/// The ring of unsettled entries.
#[derive(Clone)]
pub struct WindowMetrics {
    /// Messages published and not yet answered.
    pub in_flight: Gauge,
    /// Unsettled entries.
    pub events: Gauge,
    /// Bytes of unsettled messages.
    pub bytes: Gauge,
    /// 1 while intake pauses because the window is full.
    pub paused: Gauge,
}

/// The replication slot and the positions in the WAL.
#[derive(Clone)]
pub struct WalMetrics {
    /// Current WAL position minus the slot's confirmed position, in bytes.
    pub slot_lag_bytes: Gauge,
    /// WAL that the slot keeps from removal, in bytes.
    pub retained_bytes: Gauge,
    /// Bytes that can still be written before the slot may be lost; +Inf without a limit.
    pub safe_wal_size_bytes: Gauge,
    /// Transactions decoded to their end.
    pub transactions: Counter,
    /// Changes received, before any filter or route.
    pub changes: Counter,
    /// Events received again that the checkpoint had passed.
    pub skipped: Counter,
    /// Last position received.
    pub received: Gauge,
    /// Position up to which everything is confirmed or parked.
    pub settled: Gauge,
    /// Position stored in the checkpoint row.
    pub checkpointed: Gauge,
    /// Position told to the slot.
    pub advanced: Gauge,
    /// 1 while WAL that the slot needs may soon be removed.
    pub slot_at_risk: Gauge,
    /// 1 while the server sends nothing because a standby lacks it.
    pub slot_held_by_standby: Gauge,
    /// Age of the last canary that came through the stream, in seconds; 0 without canary.
    pub canary_age_seconds: Gauge,
    /// Events published on a timeline beyond the point where a failover left it.
    pub phantom_suspected: Counter,
    status: Vec<(&'static str, Gauge)>,
}

/// The checkpoint row.
#[derive(Clone)]
pub struct CheckpointMetrics {
    /// Seconds since the row was last known to be as new as the settled position.
    pub age_seconds: Gauge,
    /// Checkpoints written.
    pub written: Counter,
}

/// The broker connection.
#[derive(Clone)]
pub struct BrokerMetrics {
    /// Unix time of the last confirm, in seconds; 0 before the first.
    pub last_confirmed_seconds: Gauge,
    /// 1 while the broker blocks the connection (memory or disk alarm).
    pub blocked: Gauge,
    /// Whole seconds spent blocked since the process started.
    pub blocked_seconds: Counter,
}

/// The circuit view of the sessions.
#[derive(Clone)]
pub struct CircuitMetrics {
    state: Vec<(&'static str, Gauge)>,
    next_try_seconds: Gauge,
    tries: Gauge,
}

/// What a confirm for a route's messages is worth, as labels.
pub const ROUTE_GRADES: [&str; 4] = ["safe", "not_verified", "weak", "unsafe"];

/// The states of the circuit, as labels.
pub const CIRCUIT_STATES: [&str; 3] = ["closed", "open", "half-open"];

impl Metrics {
    /// Registers every series with the installed recorder, with value 0.
    pub fn new(routes: &[RouteLabel]) -> Self {
        Self {
            routes: routes.iter().map(RouteMetrics::new).collect(),
            window: WindowMetrics {
                in_flight: gauge!("watership_in_flight_messages"),
                events: gauge!("watership_window_events"),
                bytes: gauge!("watership_window_bytes"),
                paused: gauge!("watership_window_paused"),
            },
            wal: WalMetrics::new(),
            poll: PollMetrics::new(),
            checkpoint: CheckpointMetrics {
                age_seconds: gauge!("watership_checkpoint_age_seconds"),
                written: counter!("watership_checkpoints_total"),
            },
            broker: BrokerMetrics {
                last_confirmed_seconds: gauge!("watership_last_confirmed_timestamp_seconds"),
                blocked: gauge!("watership_broker_blocked"),
                blocked_seconds: counter!("watership_broker_blocked_seconds_total"),
            },
            outbox: OutboxMetrics::new(),
            parked: ParkedMetrics::new(routes),
            circuit: CircuitMetrics::new(),
            probes: counter!("watership_route_probes_total"),
            lock_busy: counter!("watership_busy_total", "what" => "lock"),
            slot_busy: counter!("watership_busy_total", "what" => "slot"),
            audit_failures: counter!("watership_audit_failures_total"),
            sessions: counter!("watership_sessions_total"),
            reconnects: CAUSES
                .iter()
                .map(|cause| (*cause, counter!("watership_reconnects_total", "cause" => *cause)))
                .collect(),
            verdicts: Verdict::ALL
                .iter()
                .map(|v| (*v, gauge!("watership_verdict", "verdict" => v.name())))
                .collect(),
        }
    }

    /// A session ended: what only a running one can say is not raised any more.
    pub fn session_over(&self) {
        let window = &self.window;
        for gauge in [&window.in_flight, &window.events, &window.bytes, &window.paused] {
            gauge.set(0.0);
        }
        self.broker.blocked.set(0.0);
        for route in &self.routes {
            route.held.set(0.0);
            route.held_seconds.set(0.0);
            route.refused_seconds.set(0.0);
            route.oldest_unsettled_seconds.set(0.0);
        }
    }

    /// Another relay does the work, and says what is parked and how old the checkpoint is.
    pub fn another_works(&self) {
        self.checkpoint.age_seconds.set(0.0);
        for gauge in [&self.parked.rows, &self.parked.keys, &self.parked.oldest_seconds] {
            gauge.set(0.0);
        }
        self.parked.set_rows(|_, _| 0);
    }

    /// Counts the end of a session; `None` is an orderly shutdown.
    pub fn ended(&self, cause: Option<&Error>) {
        let verdict = cause.and_then(Error::verdict);
        for (_, gauge) in self.verdicts.iter().filter(|(v, _)| Some(*v) == verdict) {
            gauge.set(1.0);
        }
        let cause = cause.map_or(SHUTDOWN, Error::label);
        for (_, counter) in self.reconnects.iter().filter(|(name, _)| *name == cause) {
            counter.increment(1);
        }
    }
}

const SHUTDOWN: &str = "shutdown";

/// [`Error::label`] of every kind, and the orderly end.
const CAUSES: [&str; 9] = [
    "config",
    "unreachable",
    "refused",
    "busy",
    "protocol",
    "internal",
    "event",
    "verdict",
    SHUTDOWN,
];

impl RouteMetrics {
    /// Sets the series of `grade` to 1 and the others to 0.
    pub fn set_grade(&self, grade: &str) {
        for (name, gauge) in &self.grade {
            gauge.set(f64::from(u8::from(*name == grade)));
        }
    }

    fn new(route: &RouteLabel) -> Self {
        let labels = [("route", route.name.clone()), ("owner", route.owner.clone())];
        Self {
            received: counter!("watership_events_received_total", &labels),
            published: counter!("watership_messages_published_total", &labels),
            confirmed: counter!("watership_messages_confirmed_total", &labels),
            nacked: counter!("watership_messages_nacked_total", &labels),
            returned: counter!("watership_messages_returned_total", &labels),
            dropped: counter!("watership_events_dropped_total", &labels),
            drifted: counter!("watership_route_drift_total", &labels),
            commit_to_confirm: histogram!("watership_commit_to_confirm_seconds", &labels),
            capture_to_publish: histogram!("watership_capture_to_publish_seconds", &labels),
            held: gauge!("watership_route_held", &labels),
            held_seconds: gauge!("watership_route_held_seconds", &labels),
            refused_seconds: gauge!("watership_route_refused_seconds", &labels),
            oldest_unsettled_seconds: gauge!("watership_route_oldest_unsettled_seconds", &labels),
            grade: ROUTE_GRADES.map(|grade| (grade, grade_gauge(&labels, grade))).to_vec(),
        }
    }
}

fn grade_gauge(labels: &[(&'static str, String); 2], grade: &'static str) -> Gauge {
    let [route, owner] = labels.clone();
    gauge!("watership_route_grade", &[route, owner, ("grade", grade.to_owned())])
}

impl CircuitMetrics {
    fn new() -> Self {
        let gauge = |state| (state, gauge!("watership_circuit_state", "state" => state));
        Self {
            state: CIRCUIT_STATES.map(gauge).to_vec(),
            next_try_seconds: gauge!("watership_next_try_seconds"),
            tries: gauge!("watership_session_tries"),
        }
    }

    /// Sets the series of `state` to 1 and the others to 0; the wait until the next try is 0
    /// unless the circuit is open.
    pub fn set(&self, state: &str, tries: u32, wait_seconds: f64) {
        for (name, gauge) in &self.state {
            gauge.set(f64::from(u8::from(*name == state)));
        }
        self.tries.set(f64::from(tries));
        self.next_try_seconds.set(wait_seconds);
    }
}

impl WalMetrics {
    fn new() -> Self {
        let position = |stage| gauge!("watership_position_lsn", "stage" => stage);
        let safe_wal_size_bytes = gauge!("watership_safe_wal_size_bytes");
        // Not known yet must not look like "nothing left".
        safe_wal_size_bytes.set(f64::INFINITY);
        Self {
            slot_lag_bytes: gauge!("watership_slot_lag_bytes"),
            retained_bytes: gauge!("watership_retained_wal_bytes"),
            safe_wal_size_bytes,
            transactions: counter!("watership_transactions_total"),
            changes: counter!("watership_changes_received_total"),
            skipped: counter!("watership_events_skipped_total"),
            received: position("received"),
            settled: position("settled"),
            checkpointed: position("checkpointed"),
            advanced: position("advanced"),
            slot_at_risk: gauge!("watership_slot_at_risk"),
            slot_held_by_standby: gauge!("watership_slot_held_by_standby"),
            canary_age_seconds: gauge!("watership_canary_age_seconds"),
            phantom_suspected: counter!("watership_phantom_suspected_total"),
            status: WAL_STATUS
                .iter()
                .map(|status| (*status, gauge!("watership_wal_status", "status" => *status)))
                .collect(),
        }
    }

    /// Sets the series of `status` to 1 and the others to 0. An unknown word sets all to 0.
    pub fn set_status(&self, status: &str) {
        for (name, gauge) in &self.status {
            gauge.set(f64::from(u8::from(*name == status)));
        }
    }

    /// Bytes that may still be written before the slot is lost; `None` means no limit.
    pub fn set_safe_wal_size(&self, bytes: Option<i64>) {
        self.safe_wal_size_bytes.set(bytes.map_or(f64::INFINITY, |b| b as f64));
    }
}

/// A position as a gauge value: exact up to 2^53 bytes (8 PiB) of WAL.
pub fn lsn_value(lsn: Lsn) -> f64 {
    lsn.0 as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn label(name: &str) -> RouteLabel {
        RouteLabel { name: name.into(), owner: "team".into() }
    }

    #[test]
    fn every_series_is_present_before_anything_happened() {
        let recorder = builder().build_recorder();
        let exporter = Exporter(recorder.handle());
        let _metrics = metrics::with_local_recorder(&recorder, || Metrics::new(&[label("orders")]));
        exporter.upkeep();
        let text = exporter.render();
        for series in [
            "watership_messages_confirmed_total{route=\"orders\",owner=\"team\"} 0",
            "watership_commit_to_confirm_seconds_bucket{route=\"orders\",owner=\"team\",\
             le=\"0.0005\"} 0",
            "watership_capture_to_publish_seconds_count{route=\"orders\",owner=\"team\"} 0",
            "watership_route_held{route=\"orders\",owner=\"team\"} 0",
            "watership_wal_status{status=\"lost\"} 0",
            "watership_reconnects_total{cause=\"shutdown\"} 0",
            "watership_position_lsn{stage=\"advanced\"} 0",
            "watership_safe_wal_size_bytes inf",
            "watership_sessions_total 0",
            "watership_verdict{verdict=\"slot_ahead\"} 0",
            "watership_slot_at_risk 0",
            "watership_slot_held_by_standby 0",
            "watership_canary_age_seconds 0",
            "watership_phantom_suspected_total 0",
        ] {
            assert!(text.contains(series), "{series} is missing from\n{text}");
        }
        let unnamed = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
        assert!(unnamed.clone().all(|l| l.starts_with("watership_")), "{text}");
    }

    #[test]
    fn latencies_are_histograms_not_summaries() {
        let recorder = builder().build_recorder();
        let exporter = Exporter(recorder.handle());
        metrics::with_local_recorder(&recorder, || {
            Metrics::new(&[label("a")]).routes[0].commit_to_confirm.record(0.0015);
        });
        let text = exporter.render();
        assert!(text.contains("# TYPE watership_commit_to_confirm_seconds histogram"), "{text}");
        assert!(text.contains("le=\"0.001\"} 0"), "{text}");
        assert!(text.contains("le=\"0.002\"} 1"), "{text}");
    }

    #[test]
    fn an_ended_session_is_counted_under_the_label_of_its_error() {
        let recorder = builder().build_recorder();
        let exporter = Exporter(recorder.handle());
        let metrics = metrics::with_local_recorder(&recorder, || Metrics::new(&[]));
        for kind in Kind::ALL {
            metrics.ended(Some(&Error::new(kind, "x")));
        }
        metrics.ended(None);
        let text = exporter.render();
        for cause in CAUSES {
            let series = format!("watership_reconnects_total{{cause=\"{cause}\"}} 1");
            assert!(text.contains(&series), "{series} is missing from\n{text}");
        }
    }

    #[test]
    fn the_verdict_that_ended_the_relay_is_a_label() {
        let recorder = builder().build_recorder();
        let exporter = Exporter(recorder.handle());
        let metrics = metrics::with_local_recorder(&recorder, || Metrics::new(&[]));
        metrics.ended(Some(&Error::named(Verdict::SlotAhead, "slot")));
        let text = exporter.render();
        assert!(text.contains("watership_verdict{verdict=\"slot_ahead\"} 1"), "{text}");
        assert!(text.contains("watership_verdict{verdict=\"slot_lost\"} 0"), "{text}");
    }

    #[test]
    fn exactly_one_wal_status_is_set() {
        let recorder = builder().build_recorder();
        let exporter = Exporter(recorder.handle());
        let metrics = metrics::with_local_recorder(&recorder, || Metrics::new(&[]));
        metrics.wal.set_status("extended");
        metrics.wal.set_status("lost");
        let text = exporter.render();
        assert!(text.contains("watership_wal_status{status=\"lost\"} 1"), "{text}");
        assert!(text.contains("watership_wal_status{status=\"extended\"} 0"), "{text}");
    }

    #[test]
    fn handles_do_nothing_without_a_recorder() {
        let metrics = Metrics::new(&[label("a")]);
        metrics.routes[0].confirmed.increment(1);
        metrics.routes[0].commit_to_confirm.record(0.1);
        metrics.ended(None);
    }
}
