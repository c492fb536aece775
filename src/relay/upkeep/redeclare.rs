//! Looks at the exchanges and queues of held routes from the side: says when what was missing is
//! there, and declares again what was deleted, if the configuration says to declare.
//!
//! A binding that somebody took away is left alone: that is how a queue is taken out of use. It is
//! made again with its queue or exchange, and at the start of a session. One that was refused then
//! is made in each look until the broker takes it, because nobody can see whether it is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::amqp::topology::{self, Binding, Mode, Thing, Topology, Wrong};
use crate::error::Result;
use crate::message::RouteId;
use crate::relay::Options;
use crate::relay::session::broken::{self, Missing, StillWrong};
use crate::relay::status::Status;

/// How often there may be something to do.
const TICK: Duration = Duration::from_secs(1);
/// How long a route is held before somebody looks: most holds end by themselves.
const LOOK_AFTER: Duration = Duration::from_secs(2);
/// Shortest time between two looks; each is a connection.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Runs until it is aborted.
pub async fn run(options: Options, status: Arc<Status>, missing: Arc<Missing>) {
    let mut look_at = Instant::now();
    loop {
        sleep(TICK).await;
        let held = status.held();
        let due = held.iter().any(|(_, since)| *since >= LOOK_AFTER);
        if !due || Instant::now() < look_at {
            continue;
        }
        let held: BTreeSet<RouteId> = held.into_iter().map(|(route, _)| route).collect();
        match look(&options, &held, &missing).await {
            Ok(()) => tracing::debug!("looked at the destinations of held routes"),
            Err(error) => {
                tracing::debug!(%error, "could not look at the destinations of held routes")
            }
        }
        look_at = Instant::now() + LOOK_EVERY;
    }
}

async fn look(options: &Options, held: &BTreeSet<RouteId>, missing: &Missing) -> Result<()> {
    let things = &options.topology;
    let part = broken::part(things, &options.rules, held);
    let verify = Topology { mode: Mode::Verify, ..part.clone() };
    let alone = Topology { bindings: Vec::new(), ..part.clone() };
    let begin = missing.unbound();
    let (refused, others): (Vec<Binding>, Vec<Binding>) =
        begin.bindings.iter().cloned().partition(|binding| part.bindings.contains(binding));
    let mut gone = still_missing(topology::apply_each(&options.broker, &verify).await?);
    if things.mode == Mode::Declare && !(gone.is_empty() && refused.is_empty()) {
        let lost: Vec<Thing> = gone.iter().map(|wrong| wrong.thing.clone()).collect();
        // With the bindings of all routes: others lost theirs, too, and nobody would notice.
        let lost = broken::lost(things.clone(), &lost, &refused);
        let before = gone;
        gone = topology::apply_each(&options.broker, &lost).await?;
        let is_there = |thing: &Thing| !gone.iter().any(|wrong| wrong.thing == *thing);
        for thing in before.into_iter().map(|wrong| wrong.thing).filter(is_there) {
            tracing::warn!(%thing, "it was deleted while its route is in use: declared again");
        }
        for thing in refused.into_iter().map(Thing::Binding).filter(is_there) {
            tracing::info!(%thing, "the broker accepts this binding now: it was made");
        }
        gone = still_missing(gone);
    }
    let of_routes = |wrong: &[Wrong]| -> BTreeSet<RouteId> {
        let broken = broken::routes(things, &options.rules, wrong);
        broken.into_iter().map(|broken| broken.route).collect()
    };
    let left = of_routes(&gone);
    // The same again changes nothing, and anything else is refused. A route that nothing was sent
    // on since has no probe that could tell.
    let wrong = of_routes(&topology::apply_each(&options.broker, &alone).await?);
    let well = held.iter().filter(|route| !left.contains(route) && !wrong.contains(route));
    let unbound = broken::unbound(&gone).into_iter().chain(others).collect();
    missing.looked(&begin, StillWrong { well: well.copied().collect(), missing: left, unbound });
    Ok(())
}

fn still_missing(wrong: Vec<Wrong>) -> Vec<Wrong> {
    wrong.into_iter().filter(|wrong| wrong.missing).collect()
}
