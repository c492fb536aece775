//! Whether sessions work: the circuit view of the supervisor's loop. Pure.
//!
//! ```text
//! half-open ── streaming ──► closed ── the session ends ──► open ── its wait is over ──► half-open
//!     └───────── the try fails ──────────────────────────────►─┘
//! ```
//!
//! A relay begins half-open: its first try is under way. One that has ended stays open, without a
//! next try.

use std::time::{Duration, Instant};

use serde::Serialize;

/// The three states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CircuitState {
    /// A session streams.
    Closed,
    /// The last session ended; the next one waits.
    Open,
    /// A session is being opened.
    HalfOpen,
}

impl CircuitState {
    /// Its word, in `/status`, logs and labels; `metrics::CIRCUIT_STATES` has all three.
    pub fn label(self) -> &'static str {
        match self {
            CircuitState::Closed => "closed",
            CircuitState::Open => "open",
            CircuitState::HalfOpen => "half-open",
        }
    }
}

/// Where the circuit is, and why.
#[derive(Debug, Clone)]
pub struct Circuit {
    state: CircuitState,
    tries: u32,
    cause: Option<&'static str>,
    next_try: Option<Instant>,
}

/// What `/status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CircuitView {
    /// Where it is.
    pub state: CircuitState,
    /// Milliseconds until the next try; only while open.
    pub next_try_ms: Option<u64>,
    /// Tries that failed in a row.
    pub tries: u32,
    /// Kind of the error that opened it; absent while closed.
    pub cause: Option<&'static str>,
}

impl Circuit {
    /// The first try is under way.
    pub fn new() -> Self {
        Self { state: CircuitState::HalfOpen, tries: 0, cause: None, next_try: None }
    }

    /// A session is being opened.
    pub fn try_now(&mut self) {
        (self.state, self.next_try) = (CircuitState::HalfOpen, None);
    }

    /// A session streams. Returns how many tries had failed before.
    pub fn close(&mut self) -> u32 {
        let tries = self.tries;
        *self = Self { state: CircuitState::Closed, tries: 0, cause: None, next_try: None };
        tries
    }

    /// A session ended, or could not be opened; `wait` is absent when none follows.
    pub fn open(&mut self, cause: &'static str, wait: Option<Duration>, now: Instant) {
        self.state = CircuitState::Open;
        self.tries = self.tries.saturating_add(1);
        self.cause = Some(cause);
        self.next_try = wait.map(|wait| now + wait);
    }

    /// The relay ended in order.
    pub fn end(&mut self) {
        (self.state, self.next_try) = (CircuitState::Open, None);
    }

    /// What to show at `now`.
    pub fn view(&self, now: Instant) -> CircuitView {
        let left = self.next_try.map(|at| at.saturating_duration_since(now));
        CircuitView {
            state: self.state,
            next_try_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            tries: self.tries,
            cause: self.cause,
        }
    }
}

impl Default for Circuit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_counted_until_a_session_streams() {
        let start = Instant::now();
        let mut circuit = Circuit::new();
        assert_eq!(circuit.view(start).state, CircuitState::HalfOpen);
        for tries in 1..4 {
            circuit.open("refused", Some(Duration::from_millis(500)), start);
            let view = circuit.view(start + Duration::from_millis(100));
            assert_eq!(
                (view.state, view.next_try_ms, view.tries),
                (CircuitState::Open, Some(400), tries)
            );
            assert_eq!(view.cause, Some("refused"));
            circuit.try_now();
            let view = circuit.view(start);
            assert_eq!(
                (view.state, view.next_try_ms, view.tries),
                (CircuitState::HalfOpen, None, tries)
            );
        }
        assert_eq!(circuit.close(), 3);
        let closed =
            CircuitView { state: CircuitState::Closed, next_try_ms: None, tries: 0, cause: None };
        assert_eq!(circuit.view(start), closed);
    }

    #[test]
    fn states_are_shown_as_words() {
        let all = [CircuitState::Closed, CircuitState::Open, CircuitState::HalfOpen];
        assert_eq!(all.map(CircuitState::label), crate::metrics::CIRCUIT_STATES);
        for state in all {
            assert_eq!(serde_json::to_value(state).unwrap(), state.label());
        }
        let mut circuit = Circuit::new();
        circuit.open("verdict", None, Instant::now());
        assert_eq!(circuit.view(Instant::now()).next_try_ms, None, "nothing follows a verdict");
    }
}
