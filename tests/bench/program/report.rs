//! Prints the figures beside their bars and writes them as JSON.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use watership::error::{Error, Result};

use crate::backfill::Backfill;
use crate::deleted::Deleted;
use crate::drain::{Case, Drain, Large};
use crate::edges::{AtLimits, Beside, Locked, Rotated};
use crate::latency::Latency;
use crate::limits::{Publish, cores, cpu_bound};
use crate::load::Keys;
use crate::polling::Polling;
use crate::servers::{Routing, Servers};
use crate::trouble::{Nacks, Poison};

/// The bars: share of the limit, CPU, memory, latency, start.
const SHARE_MIN: f64 = 0.8;
const PEER_TIMES_MIN: f64 = 1.5;
const RELAY_US_MAX: f64 = 8.0;
const RSS_MB_MAX: f64 = 25.0;
const LARGE_RSS_MB_MAX: f64 = 30.0;
const LARGE_FIRST_MS_MAX: f64 = 200.0;
const P50_MS_MAX: f64 = 2.0;
const P99_MS_MAX: f64 = 10.0;
const START_MS_MAX: f64 = 100.0;
const NACKS_SHARE_MIN: f64 = 0.9;
const POISON_SHARE_MIN: f64 = 0.95;
const BACKFILL_NULL_RATE_MIN: f64 = 100_000.0;
const POLL_RATE_MIN: f64 = 15_000.0;
const POLL_IDLE_PERCENT_MAX: f64 = 0.5;
const POLL_P50_MS_MAX: f64 = 8.0;
const POLL_DEAD_LOOK_MS_MAX: f64 = 10.0;
const COPIES_MAX: u64 = 200;
const CHECKPOINT_AGE_MS_MAX: f64 = 300.0;
/// The defaults of `relay.max_window_events` and `relay.max_unstored_events`.
const DUPLICATES_MAX: u64 = 8_192 + 16_384;
const ROTATED_MS_MAX: f64 = 2_000.0;
const BACKFILL_P99_TIMES_MAX: f64 = 2.0;

/// Everything that a run has measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Seconds since 1970.
    at: u64,
    cores: f64,
    postgres: u32,
    exchange: Routing,
    publish: Option<Publish>,
    /// The same with the relay's headers and exchange.
    publish_relayed: Option<Publish>,
    cases: Vec<Case>,
    large: Option<Large>,
    latency: Option<Latency>,
    backfill: Option<Backfill>,
    polling: Option<Polling>,
    nacks: Option<Nacks>,
    deleted: Option<Deleted>,
    poison: Option<Poison>,
    rotated: Option<Rotated>,
    locked: Option<Locked>,
    beside: Option<Beside>,
    at_limits: Option<AtLimits>,
}

impl Report {
    pub fn new(servers: &Servers) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            at: since.map_or(0, |d| d.as_secs()),
            cores: cores(),
            postgres: servers.postgres.major(),
            exchange: servers.routing,
            publish: None,
            publish_relayed: None,
            cases: Vec::new(),
            large: None,
            latency: None,
            backfill: None,
            polling: None,
            nacks: None,
            deleted: None,
            poison: None,
            rotated: None,
            locked: None,
            beside: None,
            at_limits: None,
        }
    }

    pub fn print_head(&self) {
        println!(
            "{} cores, Postgres {}, {} exchange, load {}",
            self.cores,
            self.postgres,
            self.exchange.name(),
            load_average()
        );
    }

    pub fn publish_limit(&self) -> Option<&Publish> {
        self.publish.as_ref()
    }

    pub fn publish(&mut self, bare: Option<Publish>, relayed: Option<Publish>) {
        let print = |what: &str, publish: &Option<Publish>| {
            if let Some(p) = publish {
                println!(
                    "{what}: {:.0}/s (broker {:.1} µs, publisher {:.1} µs a message)",
                    p.rate, p.broker_us, p.publisher_us
                );
            }
        };
        print("limit, publisher alone", &bare);
        print("  with the relay's headers and exchange", &relayed);
        (self.publish, self.publish_relayed) = (bare, relayed);
    }

    pub fn case(&mut self, case: Case) {
        let shape = &case.shape;
        println!(
            "\n{} events, {} rows a transaction, {:?} keys, {} bytes a body",
            shape.events, shape.rows_per_tx, shape.keys, case.body_bytes
        );
        println!(
            "  limit, pg_recvlogical alone: {:.0}/s (walsender {:.1} µs an event)",
            case.decode.rate, case.decode.walsender_us
        );
        if let Some(publish) = &self.publish {
            let bound = cpu_bound(publish, &case.decode);
            println!("  limit, all cores for broker and walsender: {bound:.0}/s");
        }
        println!("  limit of this run: {:.0}/s", case.limit);
        if let Some(drain) = &case.drain {
            let share = drain.rate / case.limit;
            print_drain("relay", drain);
            let bar = match shape.keys {
                Keys::Uniform => at_least(share, SHARE_MIN),
                Keys::Zipf | Keys::Single => "[no bar]".into(),
            };
            println!("  share of the limit: {share:.2} {bar}");
            if let Some(relayed) = &self.publish_relayed {
                let share = drain.rate / relayed.rate;
                println!("  share of a publisher of the same messages: {share:.2}");
            }
            println!("  CPU bar: {}", at_most(drain.relay_us, RELAY_US_MAX));
            println!("  memory bar: {}", at_most(drain.peak_rss_mb, RSS_MB_MAX));
            for peer in &case.peers {
                print_drain(&peer.name, &peer.drain);
                let times = drain.rate / peer.drain.rate;
                println!("  times its rate: {times:.2} {}", at_least(times, PEER_TIMES_MIN));
            }
        }
        self.cases.push(case);
    }

    /// What several rounds have in common, by the shape of the backlog.
    pub fn medians(&self) {
        let shape = |case: &Case| (case.shape.rows_per_tx, format!("{:?}", case.shape.keys));
        let mut seen = Vec::new();
        for first in &self.cases {
            let same: Vec<&Case> = self.cases.iter().filter(|c| shape(c) == shape(first)).collect();
            if same.len() < 2 || seen.contains(&shape(first)) {
                continue;
            }
            seen.push(shape(first));
            let of = |figure: &dyn Fn(&Case, &Drain) -> f64| {
                median(same.iter().filter_map(|c| Some(figure(c, c.drain.as_ref()?))).collect())
            };
            let share = of(&|c, d| d.rate / c.limit);
            println!(
                "\nmedians of {} rounds, {} rows a transaction, {} keys: {:.0} events/s, \
                 limit {:.0}/s, share {share:.2} {}, relay {:.1} µs, broker {:.1} µs, \
                 peak RSS {:.1} MB",
                same.len(),
                first.shape.rows_per_tx,
                shape(first).1,
                of(&|_, d| d.rate),
                of(&|c, _| c.limit),
                at_least(share, SHARE_MIN),
                of(&|_, d| d.relay_us),
                of(&|_, d| d.broker_us),
                of(&|_, d| d.peak_rss_mb),
            );
        }
    }

    pub fn large(&mut self, large: Large) {
        println!("\none transaction of {} rows", large.drain.events);
        print_drain("relay", &large.drain);
        println!("  memory bar: {}", at_most(large.drain.peak_rss_mb, LARGE_RSS_MB_MAX));
        match large.first_message_after_first_change_ms {
            Some(ms) => println!(
                "  first message after the first change: {ms:.0} ms {}",
                at_most(ms, LARGE_FIRST_MS_MAX)
            ),
            None => println!("  first message before the first change was counted"),
        }
        self.large = Some(large);
    }

    pub fn latency(&mut self, latency: Latency) {
        let l = &latency;
        println!("\nlatency at 200 events a second, {} events", l.events);
        println!(
            "  commit to consumer: p50 {:.2} ms {}, p99 {:.2} ms {}",
            l.commit_p50_ms,
            at_most(l.commit_p50_ms, P50_MS_MAX),
            l.commit_p99_ms,
            at_most(l.commit_p99_ms, P99_MS_MAX)
        );
        println!(
            "  with the writer's own commit: p50 {:.2} ms, p99 {:.2} ms",
            l.insert_p50_ms, l.insert_p99_ms
        );
        println!(
            "  process start to ready: {:.0} ms {}",
            l.start_to_ready_ms,
            at_most(l.start_to_ready_ms, START_MS_MAX)
        );
        self.latency = Some(latency);
    }

    pub fn backfill(&mut self, backfill: Backfill) {
        let b = &backfill;
        let drained = if b.drained { ", with a consumer of the rows" } else { "" };
        println!(
            "\nbackfill of {} rows beside {} live events a second{drained}",
            b.rows, b.live_rate
        );
        println!("  {:.1} s, {:.0} rows/s", b.seconds, b.rows_per_second);
        println!(
            "  live events, commit to consumer: p50 {:.2} ms, p99 {:.2} ms; without it \
             p50 {:.2} ms, p99 {:.2} ms",
            b.during_p50_ms, b.during_p99_ms, b.before_p50_ms, b.before_p99_ms
        );
        let times = b.during_p99_ms / b.before_p99_ms;
        println!("  {:.0} rows/s without live events, dropped", b.dropped_rows_per_second);
        let null = b.null_rows_per_second;
        let bar = at_least(null, BACKFILL_NULL_RATE_MIN);
        println!("  {null:.0} rows/s to a broker that takes everything at once {bar}");
        println!("  p99, times: {times:.2} {}", at_most(times, BACKFILL_P99_TIMES_MAX));
        self.backfill = Some(backfill);
    }

    pub fn polling(&mut self, polling: Polling) {
        let p = &polling;
        println!("\npolling, {} events of single-row transactions", p.events);
        let bar = at_least(p.rate, POLL_RATE_MIN);
        println!("  {:.0} events/s {bar}, relay {:.1} µs an event", p.rate, p.relay_us);
        let idle = p.idle_share * 100.0;
        println!("  idle: {idle:.2} % of a core {}", at_most(idle, POLL_IDLE_PERCENT_MAX));
        println!(
            "  at 200 events a second: p50 {:.2} ms {}, p99 {:.2} ms",
            p.p50_ms,
            at_most(p.p50_ms, POLL_P50_MS_MAX),
            p.p99_ms
        );
        println!(
            "  with {} dead rows under an old snapshot: p50 {:.2} ms, p99 {:.2} ms; one look \
             p50 {:.2} ms, p99 {:.2} ms {}",
            p.dead_rows,
            p.dead_p50_ms,
            p.dead_p99_ms,
            p.dead_look_p50_ms,
            p.dead_look_p99_ms,
            at_most(p.dead_look_p99_ms, POLL_DEAD_LOOK_MS_MAX)
        );
        println!("  peak RSS {:.1} MB", p.peak_rss_mb);
        self.polling = Some(polling);
    }

    pub fn nacks(&mut self, nacks: Nacks) {
        let n = &nacks;
        println!("\n{} events into a queue of 200 that rejects, {} nacks", n.events, n.nacks);
        println!(
            "  {:.0} events/s, {:.2} of what the consumer takes {}",
            n.rate,
            n.share,
            at_least(n.share, NACKS_SHARE_MIN)
        );
        println!("  lost {}, inversions {}, duplicates {}", n.lost, n.inversions, n.duplicates);
        self.nacks = Some(nacks);
    }

    pub fn deleted(&mut self, deleted: Deleted) {
        let d = &deleted;
        let share = d.rate_while / d.rate_before;
        println!("\na queue deleted for 60 s, {} events on two routes", d.events);
        println!(
            "  the other route {:.0} events/s until the window is full, {:.0} before: \
             {share:.2} {}",
            d.rate_while,
            d.rate_before,
            at_least(share, POISON_SHARE_MIN)
        );
        println!(
            "  resumed after {:.0} ms, lost {}, duplicates {}, parked {}; confirmed by the broker \
             while it deleted: {}",
            d.resumed_ms, d.lost, d.duplicates, d.parked, d.confirmed_in_vain
        );
        self.deleted = Some(deleted);
    }

    pub fn poison(&mut self, poison: Poison) {
        let share = poison.rate / poison.rate_without;
        println!(
            "\n{} events, one key among 1,000 is poison: {} parked",
            poison.events, poison.parked
        );
        println!(
            "  the others {:.0} events/s, {:.0} without: {share:.2} {}",
            poison.rate,
            poison.rate_without,
            at_least(share, POISON_SHARE_MIN)
        );
        self.poison = Some(poison);
    }

    pub fn rotated(&mut self, rotated: Rotated) {
        let ms = rotated.ready_ms;
        println!("\nready {ms:.0} ms after the file has the new password");
        println!("  {}", at_most(ms, ROTATED_MS_MAX));
        self.rotated = Some(rotated);
    }

    pub fn locked(&mut self, locked: Locked) {
        let l = &locked;
        println!("\nthe checkpoint locked for 20 s under {} events, then kill -9", l.events);
        let bar = at_most(l.duplicates as f64, DUPLICATES_MAX as f64);
        println!("  duplicates {} {bar}, lost {}", l.duplicates, l.lost);
        self.locked = Some(locked);
    }

    pub fn beside(&mut self, beside: Beside) {
        let (b, share) = (&beside, beside.rate / beside.rate_without);
        println!("\n{} keys that a full queue refuses, for {:.0} s", b.stuck, b.seconds);
        let bar = at_most(b.copies as f64, COPIES_MAX as f64);
        println!("  copies in the healthy queue beside it: {} {bar}", b.copies);
        let bar = at_least(share, POISON_SHARE_MIN);
        println!(
            "  another routing key of the route {:.0} events/s, {:.0} without: {share:.2} {bar}",
            b.rate, b.rate_without
        );
        self.beside = Some(beside);
    }

    pub fn at_limits(&mut self, at_limits: AtLimits) {
        let (a, share) = (&at_limits, at_limits.rate / at_limits.rate_without);
        println!("\n{} rows parked, {} blocked, retried {} times", a.parked, a.blocked, a.retried);
        let bar = at_least(share, POISON_SHARE_MIN);
        println!(
            "  the others {:.0} events/s, {:.0} without: {share:.2} {bar}",
            a.rate, a.rate_without
        );
        let bar = at_most(a.checkpoint_age_ms, CHECKPOINT_AGE_MS_MAX);
        println!(
            "  what is settled and not stored: at most {:.0} ms old {bar}",
            a.checkpoint_age_ms
        );
        println!("  after kill -9: duplicates {}, lost {}", a.duplicates, a.lost);
        self.at_limits = Some(at_limits);
    }

    /// Writes `<folder>/<time>.json` and `<folder>/latest.json`.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let failed = |e| Error::config(format!("writing to {}", folder.display())).caused_by(e);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::protocol("writing the report").caused_by(e))?;
        fs::create_dir_all(folder).map_err(failed)?;
        let own = folder.join(format!("{}.json", self.at));
        fs::write(&own, &text).map_err(failed)?;
        fs::write(folder.join("latest.json"), &text).map_err(failed)?;
        println!("\nwritten to {}", own.display());
        Ok(())
    }
}

fn print_drain(who: &str, drain: &Drain) {
    println!("  {who}: {:.0} events/s ({:.1} s)", drain.rate, drain.seconds);
    println!(
        "  CPU an event: {who} {:.1} µs, broker {:.1} µs, walsender {:.1} µs",
        drain.relay_us, drain.broker_us, drain.walsender_us
    );
    println!(
        "  peak RSS {:.1} MB, first message after {:.0} ms, duplicates {}",
        drain.peak_rss_mb, drain.first_message_ms, drain.duplicates
    );
}

pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn at_least(value: f64, bar: f64) -> String {
    format!("[bar ≥ {bar}: {}]", if value >= bar { "met" } else { "MISSED" })
}

fn at_most(value: f64, bar: f64) -> String {
    format!("[bar ≤ {bar}: {}]", if value <= bar { "met" } else { "MISSED" })
}

/// The 1-minute load before the run: figures from a busy machine compare with nothing.
fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}
