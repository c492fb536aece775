//! One fault class under test, and the line that tells how it went.
//!
//! A test that fails leaves its line too, from the drop.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use crate::support::judge::Judged;
use crate::support::scene::Scene;
use crate::support::{full, results};

/// A class while its test runs.
pub struct Class {
    id: &'static str,
    test: &'static str,
    told: bool,
    begin: Instant,
    extra: serde_json::Map<String, serde_json::Value>,
}

impl Class {
    /// `id` is the row of the fault model, such as "A1".
    pub fn new(id: &'static str, test: &'static str) -> Self {
        println!("{id}: {test}");
        Self { id, test, told: false, begin: Instant::now(), extra: serde_json::Map::new() }
    }

    /// The same, for a test that runs only when the long tests were asked for.
    pub fn long(id: &'static str, test: &'static str) -> Option<Self> {
        full().then(|| Self::new(id, test))
    }

    /// A figure of its own.
    pub fn note(&mut self, name: &str, value: impl Into<serde_json::Value>) {
        let value = value.into();
        println!("{}: {name} {value}", self.id);
        self.extra.insert(name.into(), value);
    }

    /// A duration of its own, in milliseconds: reported, never asserted.
    pub fn took(&mut self, name: &str, time: Duration) {
        self.note(name, milliseconds(&time));
    }

    /// It survived, and this was counted.
    ///
    /// # Panics
    /// When the test never looked at what the relay said.
    pub fn survived(mut self, judged: &Judged) {
        assert!(judged.heard, "{}: the test asserts no text of the relay", self.id);
        self.tell(Some(judged));
    }

    /// It survived without a word and without a duplicate, as if nothing had happened.
    ///
    /// # Panics
    /// When the relay said something, or when a message came twice.
    pub async fn survived_in_silence(self, mut scene: Scene) {
        scene.relay().says_nothing();
        scene.enough();
        let judged = scene.judge().await;
        assert_eq!(judged.duplicates, 0);
        self.survived(&judged);
    }

    /// It survived; what matters was asserted in the test: `events` arrived, once each, after one
    /// fault.
    pub fn held(mut self, events: u64) {
        self.tell(Some(&Judged { events, faults: 1, ..Judged::default() }));
    }

    /// This server cannot bring the fault about; nothing is told.
    pub fn not_here(mut self, why: &str) {
        println!("{}: not here: {why}", self.id);
        self.told = true;
    }

    /// A run that failed has no figures: what it would have counted is not known.
    fn tell(&mut self, judged: Option<&Judged>) {
        self.told = true;
        let ok = judged.is_some();
        let judged = judged.cloned().unwrap_or_default();
        let line = json!({
            "class": self.id,
            "group": &self.id[..1],
            "test": self.test,
            "ok": ok,
            "recovery_ms": judged.recoveries.iter().map(milliseconds).collect::<Vec<_>>(),
            "events": judged.events,
            "lost": judged.lost,
            "order_violations": judged.violations,
            "duplicates": judged.duplicates,
            "duplicate_bound": judged.bound,
            "most_duplicates": judged.most,
            "faults_injected": judged.faults,
            "seconds": self.begin.elapsed().as_secs(),
            "postgres": std::env::var("WATERSHIP_PG_MAJOR").unwrap_or_default(),
            "more": self.extra,
        });
        results::add(&format!("{line}\n"));
    }
}

fn milliseconds(time: &Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Drop for Class {
    fn drop(&mut self) {
        if !self.told {
            self.tell(None);
        }
    }
}
