//! The benchmark: how fast the real relay drains a backlog, held against the limits of the same
//! machine, measured in the same run.
//!
//! Private servers (Postgres with fsync, RabbitMQ with a quorum queue), the real `watership run`
//! as its own process, nothing in between. See docs/performance.md for what each figure means.

mod backfill;
mod deleted;
mod drain;
mod edges;
mod latency;
mod limits;
mod load;
mod null_broker;
mod peer;
mod polling;
mod relay;
mod report;
mod servers;
mod trouble;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use watership::error::Result;

use crate::load::{Keys, Shape};
use crate::report::Report;
use crate::servers::{Routing, Servers};

/// Events that go into the queue that nacks.
const NACKED: u64 = 60_000;

/// Measures the relay against the limits of this machine.
///
/// Example: tests/bench/run --events 50000 --rows-per-tx 1
#[derive(Debug, Parser)]
struct Arguments {
    /// Events in the backlog.
    #[arg(long, default_value_t = 200_000)]
    events: u64,
    /// Rows per transaction; repeat for several runs. Without it: 1 and 100.
    #[arg(long)]
    rows_per_tx: Vec<u64>,
    /// How keys are chosen; repeat for several runs. Without it: uniform.
    #[arg(long, value_enum)]
    keys: Vec<Keys>,
    /// How often limits and drains are measured, in turn; the medians are printed at the end.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// Rows of the one large transaction; 0 leaves it out.
    #[arg(long, default_value_t = 1_000_000)]
    large: u64,
    /// Seconds of the latency measurement at 200 events a second; 0 leaves it out.
    #[arg(long, default_value_t = 20)]
    latency_seconds: u64,
    /// Kind of the exchange that the relay publishes to.
    #[arg(long, value_enum, default_value_t = Routing::Direct)]
    exchange: Routing,
    /// A program that relays too, to compare with; repeat for several. See tests/bench/peers.
    #[arg(long)]
    peer: Vec<PathBuf>,
    /// Measure what troubles cost, and nothing else: a queue that nacks, one that is deleted, a key
    /// that is poison.
    #[arg(long)]
    troubles: bool,
    /// Measure only what edge cases cost everything else: a full queue, parking at its limits, a
    /// locked checkpoint, a password that changes.
    #[arg(long)]
    edges: bool,
    /// Measure a backfill of this number of rows beside live events, and nothing else.
    #[arg(long)]
    backfill: Option<u64>,
    /// Live events a second beside it.
    #[arg(long, default_value_t = 1000)]
    live: u64,
    /// A consumer takes its rows as they come; without it they stay in their queue.
    #[arg(long)]
    drained: bool,
    /// Its share of the unconfirmed messages, instead of the default.
    #[arg(long)]
    unconfirmed: Option<u64>,
    /// Measure a relay that polls, and nothing else.
    #[arg(long)]
    poll: bool,
    /// Leave out the drains.
    #[arg(long)]
    no_drain: bool,
    /// Measure the limits only; needs no relay.
    #[arg(long)]
    limits_only: bool,
    /// A tenth of everything.
    #[arg(long)]
    quick: bool,
    /// Seed of the data.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Where the JSON goes.
    #[arg(long, default_value = "tests/bench/out")]
    out: PathBuf,
}

impl Arguments {
    fn shapes(&self, round: u32) -> Vec<Shape> {
        let nothing_asked = self.rows_per_tx.is_empty() && self.keys.is_empty();
        let rows =
            if self.rows_per_tx.is_empty() { vec![1, 100] } else { self.rows_per_tx.clone() };
        let keys = if self.keys.is_empty() { vec![Keys::Uniform] } else { self.keys.clone() };
        let mut shapes = Vec::new();
        for keys in keys {
            for &rows_per_tx in &rows {
                let events = self.events;
                shapes.push(Shape { events, rows_per_tx, keys, seed: self.seed, round });
            }
        }
        // Beside them, once, without a bar. One key means one message at a time: fewer events.
        if nothing_asked && round == 0 {
            for (keys, events) in [(Keys::Zipf, self.events), (Keys::Single, self.events / 20)] {
                shapes.push(Shape { events, rows_per_tx: 1, keys, seed: self.seed, round });
            }
        }
        shapes
    }

    /// `--quick` in figures.
    fn scaled(mut self) -> Self {
        if self.quick {
            self.events /= 10;
            self.large /= 10;
            self.latency_seconds = self.latency_seconds.div_ceil(4);
        }
        self
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse().scaled()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            if let Some(hint) = error.hint_text() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    let servers = Servers::start(arguments.exchange).await?;
    let mut report = Report::new(&servers);
    report.print_head();
    if arguments.troubles {
        let (events, seed) = (arguments.events, arguments.seed);
        report.nacks(trouble::nacks(&servers, NACKED.min(events), seed).await?);
        report.deleted(deleted::run(&servers).await?);
        report.poison(trouble::poison(&servers, events, seed, arguments.repeat).await?);
        return report.write(&arguments.out);
    }
    if arguments.edges {
        let Arguments { events, seed, repeat, .. } = arguments;
        report.at_limits(edges::at_limits(&servers, events, seed, repeat).await?);
        report.rotated(edges::rotated(&servers).await?);
        report.locked(edges::locked(&servers, events, seed).await?);
        report.beside(edges::beside(&servers, events, seed, repeat).await?);
        return report.write(&arguments.out);
    }
    if let Some(rows) = arguments.backfill {
        let Arguments { live, unconfirmed, drained, .. } = arguments;
        let setup = backfill::Setup { rows, live, unconfirmed, drained };
        report.backfill(backfill::run(&servers, setup).await?);
        return report.write(&arguments.out);
    }
    if arguments.poll {
        let Arguments { events, seed, latency_seconds: seconds, .. } = arguments;
        report.polling(polling::run(&servers, events, seed, seconds).await?);
        return report.write(&arguments.out);
    }
    let rounds = if arguments.no_drain && !arguments.limits_only { 0 } else { arguments.repeat };
    for round in 0..rounds {
        let messages = arguments.events.min(limits::PUBLISH_MESSAGES_MAX);
        let bare = limits::publish(&servers, messages, limits::Kind::Bare).await?;
        let relayed = limits::publish(&servers, messages, limits::Kind::Relayed).await?;
        report.publish(bare, relayed);
        for shape in arguments.shapes(round) {
            let (limits_only, peers) = (arguments.limits_only, &arguments.peer);
            let case = drain::run(&servers, &shape, &report, limits_only, peers).await?;
            report.case(case);
        }
    }
    report.medians();
    if !arguments.limits_only {
        if arguments.large > 0 {
            report.large(drain::large(&servers, arguments.large, arguments.seed).await?);
        }
        if arguments.latency_seconds > 0 {
            report.latency(latency::run(&servers, arguments.latency_seconds).await?);
        }
    }
    report.write(&arguments.out)
}
