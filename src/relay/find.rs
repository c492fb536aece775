//! Where is my event: what the running relay knows of one event or one key. Asked over HTTP,
//! answered by the loop at its next tick, bounded in what it looks through and in what it says.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::envelope::{PARTS_MAX, message_id};
use crate::publisher::Publisher;
use crate::relay::Relay;
use crate::relay::checkpoint::Store;
use crate::relay::window::lanes::Owner;
use crate::source::Source;

/// Questions that may wait for a tick; more are refused.
const ASKS_MAX: usize = 8;
/// Messages that are named in an answer; more are counted.
const NAMED_MAX: usize = 20;

/// What is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The id of an event, or of a message.
    Id(Uuid),
    /// A key as the header `ws-key` has it.
    Key(String),
}

/// What the relay knows. That it names nothing does not prove that nothing was there:
/// `received_lsn` and `remembered` say how far it can tell.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sighting {
    /// The server has sent everything that was committed before this LSN.
    pub received_lsn: String,
    /// Messages that are not settled yet, the oldest first, at most 20.
    pub window: Vec<Waiting>,
    /// How many more there are.
    pub more: usize,
    /// What the broker confirmed lately, the latest first, at most 20; only for an id.
    pub confirmed: Vec<Delivered>,
    /// How many confirms are remembered.
    pub remembered: usize,
    /// Age of the oldest confirm that is remembered, in seconds.
    pub remembered_seconds: f64,
}

/// A message in the window.
#[derive(Debug, Clone, Serialize)]
pub struct Waiting {
    /// Its route; empty when no route selects its event.
    pub route: String,
    /// Its id.
    pub id: String,
    /// Where its event stands in the stream.
    pub position: String,
    /// What it waits for.
    pub waits_for: String,
}

/// A message that the broker has.
#[derive(Debug, Clone, Serialize)]
pub struct Delivered {
    /// Its route.
    pub route: String,
    /// How long ago, in seconds.
    pub seconds_ago: f64,
}

/// Questions from the admin thread to the loop.
#[derive(Debug, Default)]
pub struct Asks(Mutex<Vec<Ask>>);

#[derive(Debug)]
struct Ask {
    wanted: Wanted,
    answer: oneshot::Sender<Sighting>,
}

impl Asks {
    /// Asks; absent when too many wait already.
    pub fn ask(&self, wanted: Wanted) -> Option<oneshot::Receiver<Sighting>> {
        let mut asks = self.lock();
        // Who asked may have given up.
        asks.retain(|ask| !ask.answer.is_closed());
        let (answer, receiver) = oneshot::channel();
        (asks.len() < ASKS_MAX).then(|| asks.push(Ask { wanted, answer })).map(|()| receiver)
    }

    fn take(&self) -> Vec<Ask> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ask>> {
        self.0.lock().expect("nobody panics while holding the questions")
    }
}

impl<S: Source, P: Publisher, C: Store> Relay<S, P, C> {
    /// Answers who asked since the last tick.
    pub(in crate::relay) fn answer_asks(&self) {
        for Ask { wanted, answer } in self.seen.status.asks.take() {
            // Who asked may have given up.
            let _gone = answer.send(self.find(&wanted));
        }
    }

    fn find(&self, wanted: &Wanted) -> Sighting {
        let ids = match wanted {
            Wanted::Id(id) => self.ids_of(*id),
            Wanted::Key(_) => Vec::new(),
        };
        let is_it = |id: Uuid, key: &str| match wanted {
            Wanted::Id(_) => ids.contains(&id),
            Wanted::Key(wanted) => wanted == key,
        };
        let mut found = Vec::new();
        for slot in self.flight.lanes.unsettled() {
            let message = &slot.message;
            if is_it(message.id, message.key_text()) {
                let hold = self.flight.lanes.holds().find(|(route, _)| *route == message.route);
                let waits_for = match (hold, slot.owner) {
                    (Some((_, hold)), _) => {
                        format!("its route, which is held: {}", hold.reason)
                    }
                    (None, _) if slot.refused() > 0 => {
                        format!("its queue, which has refused it {} times", slot.refused())
                    }
                    (None, Owner::Parked(_)) => "its confirm or its turn; it was parked".into(),
                    (None, Owner::Window(_) | Owner::Chunk(_)) => {
                        "its confirm, or its turn in its key".into()
                    }
                };
                let route = self.making.router.by_id(message.route).name.clone();
                found.push((slot.about.position, route, message.id, waits_for));
            }
        }
        for row in self.parked.parking.unwritten().filter(|row| is_it(row.id, &row.key_text)) {
            let waits_for =
                format!("to be written to watership.parked, as {}: {}", row.why, row.error);
            found.push((row.key.position, row.key.route.to_string(), row.id, waits_for));
        }
        found.sort_by_key(|(position, ..)| *position);
        let more = found.len().saturating_sub(NAMED_MAX);
        let named = found.into_iter().take(NAMED_MAX);
        let window = named.map(|(position, route, id, waits_for)| Waiting {
            route,
            id: id.to_string(),
            position: position.to_string(),
            waits_for,
        });
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ago = |at: Duration| now.saturating_sub(at).as_secs_f64();
        let confirmed = self.seen.recent.latest_first().filter(|(key, _)| ids.contains(&key.id));
        Sighting {
            received_lsn: self.source.seen().received.to_string(),
            window: window.collect(),
            more,
            confirmed: confirmed
                .take(NAMED_MAX)
                .map(|(key, at)| Delivered {
                    route: self.making.router.by_id(key.route).name.clone(),
                    seconds_ago: ago(at),
                })
                .collect(),
            remembered: self.seen.recent.count(),
            remembered_seconds: self.seen.recent.oldest().map_or(0.0, ago),
        }
    }

    /// The id, and the ids that the routes give to the messages of an event with this id.
    fn ids_of(&self, id: Uuid) -> Vec<Uuid> {
        let routes = self.making.router.publishing();
        let of_route = |route| (0..PARTS_MAX).map(move |part| message_id(id, route, part));
        let mut ids: Vec<Uuid> = routes.flat_map(|route| of_route(route)).collect();
        ids.push(id);
        ids
    }
}
