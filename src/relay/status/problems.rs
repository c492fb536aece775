//! What is wrong with a running relay, judged in one place: `/status`, `watership status` and
//! `watership check` say the same, and the exit codes follow from it. Pure.

use serde::{Deserialize, Serialize};

use super::{RelayState, Snapshot, tables};
use crate::error::Kind;
use crate::relay::window::refusals::RefusedRoute;

/// Seconds without a stored checkpoint, although there is something to store, that are too many.
const CHECKPOINT_AGE_MAX: f64 = 10.0;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Everything flows; somebody should look.
    Warning,
    /// Something does not flow.
    Problem,
    /// The relay has stopped, and an operator has to decide.
    Verdict,
}

/// Something that is wrong, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Concern {
    /// How bad it is.
    pub level: Severity,
    /// What it is.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl Concern {
    /// One that someone should look at.
    pub fn warning(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Severity::Warning, what: what.into(), hint: hint.into() }
    }

    /// One that keeps something from flowing.
    pub fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { level: Severity::Problem, what: what.into(), hint: hint.into() }
    }
}

/// Everything that is wrong; a relay on standby is fine while the other one works.
pub(super) fn of(shown: &Snapshot, is_alive: bool) -> Vec<Concern> {
    let mut found: Vec<Concern> = session(shown, is_alive).into_iter().collect();
    if shown.broker_blocked {
        found.push(Concern::new(
            "the broker blocks publishing: it is short of memory or disk space",
            "see `rabbitmq-diagnostics alarms`; the relay resumes by itself",
        ));
    }
    for held in &shown.held {
        let (route, reason, seconds) = (&held.route, &held.reason, held.for_seconds);
        found.push(Concern::new(
            format!("route {route:?} has been held for {seconds:.0} s: {reason}"),
            "fix the exchange, queue, binding or permission; the relay keeps probing, and the \
             route resumes by itself",
        ));
    }
    for refused in &shown.refused {
        let RefusedRoute { route, exchange, routing_key, waiting, for_seconds, .. } = refused;
        let others = match refused.destinations {
            0 | 1 => String::new(),
            several => format!(" (and {} other routing keys)", several - 1),
        };
        found.push(Concern::new(
            format!(
                "the broker has refused messages of route {route:?} for {for_seconds:.0} s: \
                 exchange {exchange:?}, routing key {routing_key:?}{others}, {waiting} keys wait"
            ),
            "a queue behind it is full or has no majority: see `rabbitmqctl list_queues`; what is \
             refused is retried at increasing intervals until the queue accepts it",
        ));
    }
    for (route, reason) in &shown.parked.blocked {
        found.push(Concern::new(
            format!("a message of route {route:?} blocks its key and may not be parked: {reason}"),
            "fix the cause; or make room in watership.parked, see `watership parked list`",
        ));
    }
    found.extend(tables::concerns(&shown.lost_tables, &shown.returned_tables));
    for failed in shown.backfills.iter().filter(|one| one.error.is_some()) {
        found.push(Concern::warning(
            format!("a backfill has failed: {}", failed.line()),
            "start another backfill of the table; `watership backfill list` shows them",
        ));
    }
    if shown.parked.rows > 0 {
        let (rows, keys) = (shown.parked.rows, shown.parked.keys);
        found.push(Concern::warning(
            format!("{rows} rows of {keys} keys are parked"),
            "`watership parked list` shows them; retry or discard them",
        ));
    }
    found.extend(stream(shown));
    found
}

fn session(shown: &Snapshot, is_alive: bool) -> Option<Concern> {
    let state = match shown.state {
        RelayState::StandingBy => return shown.standing_by.as_ref()?.in_vain(),
        RelayState::Streaming if is_alive => return None,
        RelayState::Streaming => {
            return Some(Concern::new(
                "the relay's loop is stuck",
                "the relay ends itself when that lasts a minute; see its log",
            ));
        }
        RelayState::Connecting => "is connecting",
        RelayState::Waiting => "waits before its next try to connect",
        RelayState::Stopped => "has stopped",
    };
    let Some(error) = &shown.last_error else {
        let hint = "it takes as long as both servers need to answer; see the relay's log";
        return Some(Concern::new(format!("nothing is streamed: the relay {state}"), hint));
    };
    let what = format!("nothing is streamed: the relay {state}: {}", error.error);
    let verdict = shown.state == RelayState::Stopped && error.kind == Kind::Verdict.label();
    let level = if verdict { Severity::Verdict } else { Severity::Problem };
    Some(Concern { level, what, hint: error.hint.clone() })
}

/// What a stream shows that runs and does not move.
fn stream(shown: &Snapshot) -> Vec<Concern> {
    let mut found = Vec::new();
    if let Some(slot) = &shown.slot
        && let Some(warning) = &slot.warning
    {
        found.push(Concern::warning(warning, slot.hint.unwrap_or("see the relay's log")));
    }
    if shown.state != RelayState::Streaming {
        return found;
    }
    if let Some(seconds) = shown.canary_age_seconds.filter(|_| shown.canary_late) {
        found.push(Concern::new(
            format!("the newest canary that came through the stream is {seconds:.0} s old"),
            "what was committed since then has not come: Postgres may be decoding a large \
             transaction, or the window is full behind a held route or a blocked key",
        ));
    }
    let age = shown.checkpoint_age_seconds;
    if age > CHECKPOINT_AGE_MAX {
        found.push(Concern::new(
            format!("no checkpoint has been stored for {age:.0} s"),
            "after a crash, everything since then is sent again: look for a lock on \
             watership.checkpoint, and at the load of Postgres",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::Error;
    use crate::relay::status::{Held, SlotStatus, Status};
    use crate::verdict::Verdict;

    fn levels(shown: &Snapshot, is_alive: bool) -> Vec<Severity> {
        of(shown, is_alive).into_iter().map(|problem| problem.level).collect()
    }

    #[test]
    fn a_relay_that_streams_or_is_on_standby_has_no_problem_and_any_other_has() {
        let status = Status::new("r", Vec::new());
        assert_eq!(levels(&status.snapshot(), true), [Severity::Problem], "it connects");
        status.streaming();
        assert_eq!(levels(&status.snapshot(), true), []);
        assert_eq!(levels(&status.snapshot(), false), [Severity::Problem], "its loop is stuck");
        let second = Duration::from_secs(1);
        status.waiting(&Error::unreachable("the broker is down"), second);
        let problems = status.snapshot().problems;
        assert!(problems[0].what.contains("the broker is down"), "{problems:?}");
        assert_eq!(problems[0].level, Severity::Problem);
        status.waiting(&Error::new(Kind::Busy, "the lock queue is held"), second);
        assert_eq!(status.snapshot().problems, []);
        status.stopped(Some(&Error::named(Verdict::SlotLost, "it is lost")));
        assert_eq!(levels(&status.snapshot(), true), [Severity::Verdict]);
        status.stopped(Some(&Error::unreachable("shutdown: 3 events were not confirmed")));
        assert_eq!(levels(&status.snapshot(), true), [Severity::Problem]);
    }

    #[test]
    fn a_standby_whose_slot_nobody_reads_for_long_has_a_problem() {
        let status = Status::new("r", Vec::new());
        status.waiting(&Error::new(Kind::Busy, "the lock is held"), Duration::from_secs(1));
        status.slot_seen(None);
        let mut shown = status.snapshot();
        assert_eq!((&shown.problems, status.is_good_standby()), (&Vec::new(), true), "not yet");
        let by = shown.standing_by.as_mut().expect("it is on standby");
        assert_eq!(by.doubt_seconds, Some(0));
        (by.doubt_seconds, by.lock_owner) = (Some(31), Some("database d".into()));
        let found = of(&shown, true);
        assert!(found[0].what.contains("for 31 s: the connection that holds the lock (for"));
        assert_eq!((found.len(), found[0].level), (1, Severity::Problem));
        status.connecting();
        assert!(status.snapshot().standing_by.is_some_and(|by| by.doubt.is_some()), "it tries");
        status.waiting(&Error::unreachable("the broker is down"), Duration::from_secs(1));
        status.waiting(&Error::new(Kind::Busy, "the lock is held"), Duration::from_secs(1));
        assert!(
            status.snapshot().standing_by.is_some_and(|by| by.doubt.is_none()),
            "from the beginning"
        );
    }

    #[test]
    fn each_thing_that_does_not_flow_is_a_problem_and_the_rest_a_warning() {
        let status = Status::new("r", Vec::new());
        status.streaming();
        let good = status.snapshot();
        type Change = fn(&mut Snapshot);
        let changes: [(&str, Severity, Change); 8] = [
            ("the broker blocks", Severity::Problem, |s| s.broker_blocked = true),
            ("\"a\" has been held", Severity::Problem, |s| {
                let reason = "no queue".to_owned();
                s.held = vec![Held { route: "a".into(), reason, for_seconds: 3.0 }];
            }),
            ("key \"k\" (and 1 other routing keys), 3 keys wait", Severity::Problem, |s| {
                s.refused = vec![RefusedRoute {
                    route: "a".into(),
                    exchange: "e".into(),
                    routing_key: "k".into(),
                    destinations: 2,
                    waiting: 3,
                    for_seconds: 4.0,
                }];
            }),
            ("may not be parked: full", Severity::Problem, |s| {
                s.parked.blocked = vec![("a".into(), "full".into())];
            }),
            ("2 rows of 1 keys", Severity::Warning, |s| (s.parked.rows, s.parked.keys) = (2, 1)),
            ("stream is 77 s old", Severity::Problem, |s| {
                (s.canary_age_seconds, s.canary_late) = (Some(77.0), true);
            }),
            ("stored for 12 s", Severity::Problem, |s| s.checkpoint_age_seconds = 12.0),
            ("slot \"s\" is lost", Severity::Warning, |s| {
                s.slot = Some(SlotStatus {
                    wal_status: None,
                    safe_wal_size: None,
                    retained_bytes: 0,
                    lag_bytes: 0,
                    warning: Some("slot \"s\" is lost".into()),
                    hint: Some("resync"),
                });
            }),
        ];
        for (text, level, change) in changes {
            let mut shown = good.clone();
            change(&mut shown);
            let found = of(&shown, true);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].what.contains(text) && !found[0].hint.is_empty(), "{found:?}");
            assert_eq!(found[0].level, level, "{found:?}");
        }
    }
}
