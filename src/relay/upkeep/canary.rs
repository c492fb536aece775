//! The in-band canary: a numbered row that goes through the publication like any event.
//!
//! The upkeep writes it, the source reports the last one that came through the stream. A stream
//! that has moved past a canary without bringing it leaves out what is published: it is deaf.
//! Postgres 18 does that, without an error, when the publication was dropped for a while.
//!
//! Rows of the canary are never events and never progress. While canaries are written, an idle
//! stream advances no further than the last one that came: what lies behind it is not proven.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio_postgres::GenericClient;
use tokio_postgres::types::PgLsn;

use crate::error::{Error, Result};
use crate::pg::sqlstate::postgres_error;
use crate::position::Lsn;
use crate::source::{CanaryGap, CanarySighting as Seen};
use crate::verdict::{RESYNC, Verdict};

/// In addition to three intervals: how long a canary may take at least.
const GRACE: Duration = Duration::from_secs(30);
/// Canaries that are remembered while the stream is far behind; the oldest says everything.
const PENDING_MAX: usize = 64;
/// The interval while commits wait for the stream.
const HURRIED: Duration = Duration::from_secs(1);
/// More WAL than one write of ours can be is somebody else's.
const SPAN_MAX: u64 = 16 * 1024;

/// The cell between the upkeep, which writes, and the loop, which sees.
#[derive(Debug)]
pub struct Canary(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    interval: Duration,
    /// The publication of the running session has the table.
    listening: bool,
    /// Where the session began.
    began: (Lsn, Instant),
    /// Written and not yet seen, oldest first.
    pending: VecDeque<Written>,
    last_written: Option<Instant>,
    /// The last one of this session.
    last_seen: Option<Seen>,
    /// When what was seen last had been written.
    fresh_at: Option<Instant>,
    /// WAL that canaries took and that was not asked for yet, in bytes.
    own_bytes: u64,
    /// Commits wait for the stream.
    hurried: bool,
    /// Where the last one before a missing one came.
    gap_from: Option<Lsn>,
}

/// A canary that was committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Its number.
    pub number: u64,
    /// The end of WAL after its commit.
    pub end: Lsn,
    /// About how much WAL it took, in bytes.
    pub span: u64,
    /// When it was committed.
    pub at: Instant,
}

impl Canary {
    /// One that is written every `interval`; zero means never.
    pub fn new(interval: Duration) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Inner {
            interval,
            listening: false,
            began: (Lsn::ZERO, Instant::now()),
            pending: VecDeque::new(),
            last_written: None,
            last_seen: None,
            fresh_at: None,
            own_bytes: 0,
            hurried: false,
            gap_from: None,
        })))
    }

    /// A session begins at `flush`; `published` says whether the canary comes through it.
    pub fn begin(&self, flush: Lsn, published: bool, now: Instant) {
        let mut inner = self.lock();
        inner.listening = published && !inner.interval.is_zero();
        inner.began = (flush, now);
        (inner.last_seen, inner.gap_from) = (None, None);
        // An earlier session passed it, or a failover rolled it away.
        inner.pending.clear();
    }

    /// The session ended.
    pub fn end(&self) {
        self.lock().listening = false;
    }

    /// Whether one is to be written now.
    pub fn is_due(&self, now: Instant) -> bool {
        let inner = self.lock();
        let waited = inner.last_written.map(|at| now.saturating_duration_since(at));
        // The upkeep looks in a little early or late.
        let interval = if inner.hurried { inner.interval.min(HURRIED) } else { inner.interval };
        inner.listening && waited.is_none_or(|waited| waited + TOLERANCE >= interval)
    }

    /// Whether commits wait for the stream, because the server counts it among its synchronous
    /// standbys. An idle stream advances only to the last canary, so those come more often then.
    pub fn hurry(&self, hurried: bool) {
        self.lock().hurried = hurried;
    }

    /// What was said with [`Canary::hurry`].
    pub fn is_hurried(&self) -> bool {
        self.lock().hurried
    }

    /// One was committed.
    pub fn wrote(&self, written: Written) {
        let mut inner = self.lock();
        inner.last_written = Some(written.at);
        inner.own_bytes += written.span.min(SPAN_MAX);
        let begin = Lsn(written.end.0.saturating_sub(written.span));
        // A smaller number than one that had come before it was written: the row was made again.
        if let Some(seen) = &mut inner.last_seen
            && seen.number > written.number
            && seen.end <= begin
        {
            seen.number = 0;
        }
        // The stream can be faster than the answer to the write; and what lies before the session
        // does not come in it.
        let came = inner.last_seen.is_some_and(|seen| seen.number >= written.number);
        if came {
            inner.fresh_at = inner.fresh_at.max(Some(written.at));
        }
        let came = came || begin <= inner.began.0;
        if !came && inner.pending.len() < PENDING_MAX {
            inner.pending.push_back(written);
        }
    }

    /// What the source saw last.
    pub fn seen(&self, seen: Option<Seen>, now: Instant) {
        let Some(seen) = seen else { return };
        let mut inner = self.lock();
        if inner.last_seen.is_some_and(|last| seen.end <= last.end) {
            return;
        }
        inner.last_seen = Some(seen);
        let mut fresh_at = None;
        while let Some(written) = inner.pending.front().filter(|w| w.number <= seen.number) {
            fresh_at = Some(written.at);
            inner.pending.pop_front();
        }
        // Another process may have written it.
        inner.fresh_at = Some(fresh_at.unwrap_or(now));
    }

    /// How old the newest state is that came through the stream; absent without canary.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        let inner = self.lock();
        let since = inner.fresh_at.unwrap_or(inner.began.1);
        inner.listening.then(|| now.saturating_duration_since(since))
    }

    /// The newest that came is older than a stream that moves lets it become.
    pub fn is_late(&self, now: Instant) -> bool {
        self.age(now).is_some_and(|age| age > self.lock().patience())
    }

    /// Time since one came through a stream of this process, also while none runs.
    pub fn silence(&self, now: Instant) -> Option<Duration> {
        self.lock().fresh_at.map(|at| now.saturating_duration_since(at))
    }

    /// WAL that canaries took since the last call, in bytes.
    pub fn take_own_bytes(&self) -> u64 {
        std::mem::take(&mut self.lock().own_bytes)
    }

    /// How far an idle stream may advance; absent when nothing limits it. When no canary can be
    /// written the limit falls: a canary must not pin WAL.
    pub fn limit(&self, now: Instant) -> Option<Lsn> {
        let inner = self.lock();
        if inner.gap_from.is_some() {
            return inner.gap_from;
        }
        let (began, begun_at) = inner.began;
        let last = inner.last_written.map_or(begun_at, |at| at.max(begun_at));
        let expected = now.saturating_duration_since(last) < inner.patience();
        (inner.listening && expected).then(|| inner.last_seen.map_or(began, |seen| seen.end))
    }

    /// A later canary came without the one before it. The stream may be well again by now, but what
    /// was committed in between may have been left out like the canary: an idle stream advances no
    /// further from here on. Returns the verdict; absent where no canaries are expected.
    pub fn missed(&self, gap: CanaryGap) -> Option<Error> {
        let CanaryGap { before, after } = gap;
        let mut inner = self.lock();
        if !inner.listening {
            return None;
        }
        inner.gap_from = Some(before.end);
        let missing = match (before.number + 1, after.number - 1) {
            (first, last) if first == last => format!("canary {first}"),
            // Of those that came, some may have come to an earlier session.
            (first, last) => format!("all of canaries {first} to {last}"),
        };
        let text = format!(
            "the stream brought canary {} and then {} without {missing}: published changes were \
             left out; events committed between {} and {} may be missing",
            before.number, after.number, before.end, after.end
        );
        Some(Error::named(Verdict::StreamDeaf, text).hint(format!(
            "find out who altered the publication in between; to accept the gap and continue: \
             {RESYNC} --anyway --from checkpoint"
        )))
    }

    /// The verdict about a stream that received everything up to `received` from the server.
    pub fn verdict(&self, received: Lsn, now: Instant) -> Option<Error> {
        let inner = self.lock();
        let missed = inner.pending.front().filter(|_| inner.listening)?;
        let waited = now.saturating_duration_since(missed.at);
        if missed.end >= received || waited < inner.patience() {
            return None;
        }
        let from = inner.last_seen.map_or(inner.began.0, |seen| seen.end);
        let text = format!(
            "the stream has reached {received} without canary {} (at {}, committed {} s ago): \
             published changes are left out; events committed between {from} and {received} may \
             be missing",
            missed.number,
            missed.end,
            waited.as_secs()
        );
        Some(Error::named(Verdict::StreamDeaf, text).hint(format!(
            "see the Postgres log, and check the publication with `watership check`; to accept \
             the gap and resume with a new slot: {RESYNC} --from now --anyway"
        )))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nobody panics while holding the canary")
    }
}

/// A person accepts that canaries that were written until now may be missing.
///
/// # Errors
/// The server's.
pub async fn accept(client: &impl GenericClient, name: &str) -> Result<()> {
    const SQL: &str = include_str!("../../../sql/query/canary_accept.sql");
    client.execute(SQL, &[&name]).await.map(drop).map_err(postgres_error)
}

/// What is stored of a relay's canaries.
#[derive(Debug, Clone, Copy, Default)]
pub struct StoredCanary {
    /// The last one that came before the checkpoint.
    pub before: Option<Seen>,
    /// The number up to which they may be missing; 0 where nothing was accepted.
    pub accepted: u64,
}

/// Reads it.
///
/// # Errors
/// The server's.
pub async fn recorded(client: &impl GenericClient, name: &str) -> Result<StoredCanary> {
    const SQL: &str = include_str!("../../../sql/query/canary_recorded.sql");
    let row = client.query_opt(SQL, &[&name]).await.map_err(postgres_error)?;
    let Some(row) = row else { return Ok(StoredCanary::default()) };
    let number = |i: usize| row.try_get::<_, Option<i64>>(i).map_err(postgres_error);
    let unsigned = |number: i64| u64::try_from(number).unwrap_or_default();
    let end: Option<PgLsn> = row.try_get(1).map_err(postgres_error)?;
    let before = number(0)?.zip(end);
    Ok(StoredCanary {
        before: before.map(|(number, end)| Seen { number: unsigned(number), end: Lsn(end.into()) }),
        accepted: number(2)?.map(unsigned).unwrap_or_default(),
    })
}

/// The upkeep's clock and ours differ by less.
const TOLERANCE: Duration = Duration::from_millis(100);

impl Inner {
    fn patience(&self) -> Duration {
        self.interval * 3 + GRACE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    fn written(number: u64, end: u64, at: Instant) -> Written {
        Written { number, end: Lsn(end), span: 10, at }
    }

    fn listening(at: Instant) -> Arc<Canary> {
        let canary = Canary::new(INTERVAL);
        canary.begin(Lsn(50), true, at);
        canary
    }

    #[test]
    fn a_row_that_was_made_again_counts_from_one_and_is_waited_for() {
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        let canary = Canary::new(Duration::from_secs(10));
        canary.begin(Lsn(100), true, now);
        canary.wrote(Written { number: 57, end: Lsn(200), span: 10, at: now });
        let old = Some(Seen { number: 57, end: Lsn(195) });
        canary.seen(old, now);
        canary.wrote(Written { number: 1, end: Lsn(300), span: 10, at: now });
        canary.seen(old, now);
        assert!(canary.verdict(Lsn(400), now + hour).is_some(), "it did not come");
        canary.seen(Some(Seen { number: 1, end: Lsn(295) }), now);
        assert!(canary.verdict(Lsn(400), now + hour).is_none());
    }

    #[test]
    fn one_that_may_lie_before_the_session_is_not_waited_for() {
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        let canary = Canary::new(Duration::from_secs(10));
        canary.begin(Lsn(295), true, now);
        // Its end is looked at after the session began.
        canary.wrote(Written { number: 2, end: Lsn(300), span: 10, at: now });
        assert!(canary.verdict(Lsn(400), now + hour).is_none());
    }

    #[test]
    fn a_stream_that_moves_past_a_canary_without_it_is_deaf_after_a_while() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let canary = listening(start);
        canary.wrote(written(7, 100, start));
        assert!(canary.verdict(Lsn(1000), after(59)).is_none(), "too early");
        assert!(canary.verdict(Lsn(100), after(3600)).is_none(), "a backlog is not deafness");
        let error = canary.verdict(Lsn(1000), after(61)).expect("deaf");
        assert_eq!(error.verdict(), Some(Verdict::StreamDeaf));
        for text in ["stream_deaf: ", "canary 7 (at 0/64", "between 0/32 and 0/3E8"] {
            assert!(error.to_string().contains(text), "{error}");
        }
        canary.seen(Some(Seen { number: 7, end: Lsn(90) }), after(61));
        assert!(canary.verdict(Lsn(1000), after(3600)).is_none(), "it came");
    }

    #[test]
    fn a_gap_is_told_with_its_numbers_and_its_range_while_canaries_are_expected() {
        let start = Instant::now();
        let canary = listening(start);
        let seen = |number, end| Seen { number, end: Lsn(end) };
        let gap = |to| CanaryGap { before: seen(7, 100), after: seen(to, 400) };
        canary.seen(Some(seen(7, 100)), start);
        canary.seen(Some(seen(9, 400)), start);
        assert_eq!(canary.limit(start), Some(Lsn(400)), "the last one that came");
        let one = canary.missed(gap(9)).expect("deaf").to_string();
        assert_eq!(canary.limit(start), Some(Lsn(100)), "the next start finds it again");
        assert!(one.contains("without canary 8:"), "{one}");
        assert!(one.contains("between 0/64 and 0/190"), "{one}");
        let more = canary.missed(gap(11)).expect("deaf");
        assert_eq!(more.verdict(), Some(Verdict::StreamDeaf));
        assert!(more.to_string().contains("without all of canaries 8 to 10:"), "{more}");
        canary.begin(Lsn(50), false, start);
        assert!(canary.missed(gap(9)).is_none(), "its updates are not published");
    }

    #[test]
    fn a_canary_that_came_before_its_write_was_answered_is_not_waited_for() {
        let start = Instant::now();
        let late = start + Duration::from_secs(3600);
        let canary = listening(start);
        canary.seen(Some(Seen { number: 7, end: Lsn(90) }), start);
        canary.wrote(written(7, 100, start));
        assert!(canary.verdict(Lsn(1000), late).is_none(), "it came");
        canary.begin(Lsn(200), true, start);
        canary.wrote(written(8, 200, start));
        assert!(canary.verdict(Lsn(1000), late).is_none(), "it lies before the session");
        canary.wrote(written(9, 300, start));
        assert!(canary.verdict(Lsn(1000), late).is_some());
    }

    #[test]
    fn only_the_own_session_is_judged() {
        let start = Instant::now();
        let late = start + Duration::from_secs(100);
        let canary = listening(start);
        canary.wrote(written(1, 100, start));
        canary.begin(Lsn(50), true, late);
        assert!(canary.verdict(Lsn(1000), late).is_none(), "it was the last session's");
        canary.wrote(written(2, 200, start));
        assert!(canary.verdict(Lsn(1000), late).is_some());
        canary.begin(Lsn(50), false, late);
        canary.wrote(written(3, 300, start));
        assert!(canary.verdict(Lsn(1000), late).is_none(), "it is not published");
        canary.begin(Lsn(50), true, late);
        canary.wrote(written(4, 400, start));
        canary.end();
        assert!(canary.verdict(Lsn(1000), late).is_none() && !canary.is_due(late));
    }

    #[test]
    fn an_idle_stream_stops_at_the_last_canary_as_long_as_they_are_written() {
        let start = Instant::now();
        let canary = listening(start);
        assert_eq!(canary.limit(start), Some(Lsn(50)), "the first one is on its way");
        let late = start + Duration::from_secs(61);
        assert_eq!(canary.limit(late), None, "none could be written");
        canary.wrote(written(1, 100, start));
        assert_eq!(canary.limit(start), Some(Lsn(50)), "none came: no further than the start");
        canary.seen(Some(Seen { number: 1, end: Lsn(95) }), start);
        assert_eq!(canary.limit(start), Some(Lsn(95)));
        assert_eq!(canary.limit(late), None, "a canary that cannot be written pins nothing");
        let off = Canary::new(Duration::ZERO);
        off.begin(Lsn(50), true, start);
        assert!(!off.is_due(start) && off.limit(start).is_none() && off.age(start).is_none());
    }

    #[test]
    fn the_age_is_that_of_the_write_and_not_of_the_arrival() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let canary = listening(start);
        assert!(canary.is_due(start));
        canary.wrote(written(1, 100, start));
        assert!(!canary.is_due(after(9)) && canary.is_due(after(10)));
        canary.seen(Some(Seen { number: 1, end: Lsn(95) }), after(4));
        assert_eq!(canary.age(after(6)), Some(Duration::from_secs(6)));
        canary.seen(Some(Seen { number: 1, end: Lsn(95) }), after(20));
        assert_eq!(canary.age(after(20)), Some(Duration::from_secs(20)), "nothing new came");
        assert_eq!((canary.take_own_bytes(), canary.take_own_bytes()), (10, 0));
    }
}
