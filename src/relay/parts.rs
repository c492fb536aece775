//! What an engine is made of, and what is left of it for the next one.

use std::sync::Arc;

use crate::metrics::Metrics;
use crate::relay::backfill::Backfill;
use crate::relay::checkpoint::progress::Progress;
use crate::relay::parking::Parking;
use crate::relay::parking::recent::RecentlyParked;
use crate::relay::session::broken::{BrokenRoute, Missing};
use crate::relay::session::phantoms::RecentlyPublished;
use crate::relay::status::Status;
use crate::relay::upkeep::canary::Canary;
use crate::relay::window::remembered::Remembered;
use crate::route::{Plans, Router};

/// What a [`Relay`](super::Relay) is made of.
pub struct RelayParts<S, P, C> {
    /// Where events come from.
    pub source: S,
    /// Where messages go.
    pub publisher: P,
    /// Where progress is kept.
    pub store: C,
    /// What the store says now.
    pub progress: Progress,
    /// What is parked.
    pub parking: Parking,
    /// Routes.
    pub router: Arc<Router>,
    /// What they decided of the tables as they were described last.
    pub plans: Plans,
    /// Metrics handles.
    pub metrics: Arc<Metrics>,
    /// What `/status` shows.
    pub status: Arc<Status>,
    /// What was written to be seen in the stream.
    pub canary: Arc<Canary>,
    /// Routes that begin held.
    pub broken: Vec<BrokenRoute>,
    /// Routes of which a thing is known to be missing.
    pub missing: Arc<Missing>,
    /// What earlier sessions published.
    pub published: RecentlyPublished,
    /// What they parked.
    pub recently_parked: RecentlyParked,
    /// What earlier sessions got confirms for.
    pub remembered: Remembered,
    /// The loop's end of the link to the backfill.
    pub backfill: Backfill,
}

/// What a process carries from one session to the next.
#[derive(Debug, Default)]
pub struct Kept {
    /// What was published lately.
    pub published: RecentlyPublished,
    /// What was parked lately.
    pub parked: RecentlyParked,
    /// What was confirmed and may not be covered by a checkpoint.
    pub remembered: Remembered,
}
