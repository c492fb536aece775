//! What the demo prints: the progress line while it runs, the summary at its end.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use tokio::time::Instant;

use super::shop::Transactions;
use super::{Faults, TICK};
use crate::dev::ledger::{Counts, Judgement};

/// How often progress is shown where it cannot be rewritten in place.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The progress line: rewritten in place on a terminal, a new line now and then elsewhere.
pub(super) struct View {
    terminal: bool,
    last: Option<Instant>,
}

impl View {
    pub(super) fn new() -> Self {
        Self { terminal: std::io::stdout().is_terminal(), last: None }
    }

    pub(super) fn show(&mut self, elapsed: Duration, counts: Counts) {
        let every = if self.terminal { TICK } else { LINE_EVERY };
        if self.last.is_some_and(|last| last.elapsed() < every) {
            return;
        }
        self.last = Some(Instant::now());
        let line = format!(
            "{:5.1} s  committed {:>7}  delivered {:>7}  in flight {:>6}  duplicates {}",
            elapsed.as_secs_f64(),
            counts.committed,
            counts.delivered,
            counts.committed.saturating_sub(counts.delivered),
            counts.duplicates
        );
        if self.terminal {
            print!("\r\x1b[K{line}");
        } else {
            println!("{line}");
        }
        let _ = std::io::stdout().flush();
    }

    pub(super) fn note(&mut self, text: &str) {
        self.end();
        println!("         {text}");
        self.last = None;
    }

    pub(super) fn end(&self) {
        if self.terminal {
            println!();
        }
    }
}

/// The summary.
pub(super) fn report(judgement: &Judgement, transactions: Transactions, faults: &Faults) {
    let counts = judgement.counts;
    let seconds = judgement.span.as_secs_f64().max(0.001);
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    println!();
    println!(
        "committed         {} events in {} transactions ({} more rolled back)",
        counts.committed, transactions.committed, transactions.rolled_back
    );
    println!("delivered         {}", counts.delivered);
    println!("lost              {}", judgement.lost);
    println!("never committed   {}", judgement.unexpected);
    println!(
        "duplicates        {} ({} of them redelivered by the broker)",
        counts.duplicates, counts.redelivered
    );
    println!("order violations  {} (of {} keys)", counts.violations, judgement.keys);
    if counts.altered > 0 {
        println!("altered           {}", counts.altered);
    }
    println!(
        "events/s          {:.0} (over the whole run with its faults; {} in the best second)",
        counts.delivered as f64 / seconds,
        judgement.best_second
    );
    if let Some((p50, p99)) = judgement.calm {
        println!(
            "latency           p50 {:.1} ms, p99 {:.1} ms (commit to consumer, before the faults); \
             longest {:.1} s",
            ms(p50),
            ms(p99),
            judgement.longest.as_secs_f64()
        );
    }
    println!(
        "faults            relay killed at {:.1} s, delivering again after {:.1} s; \
         RabbitMQ stopped at {:.1} s, delivering again after {:.1} s",
        faults.relay_killed.as_secs_f64(),
        (faults.relay_back.saturating_sub(faults.relay_killed)).as_secs_f64(),
        faults.broker_stopped.as_secs_f64(),
        (faults.broker_back.saturating_sub(faults.broker_stopped)).as_secs_f64(),
    );
    println!(
        "{}",
        if judgement.holds() { "OK: nothing lost, everything in order" } else { "FAILED" }
    );
}
