//! What goes wrong when: made from a seed alone, so a failing seed brings the same faults again.

use std::time::Duration;

/// A fault with all that chance decides about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    KillRelay,
    FreezeRelay { ms: u64 },
    FreezeBroker { ms: u64 },
    Cut { postgres: bool, reset: bool },
    CutInside { postgres: bool, nth: u64 },
    Delay { ms: u64, hold_ms: u64 },
    Stall { postgres: bool, ms: u64 },
    HalfOpen { postgres: bool, ms: u64 },
    RestartBroker { kill: bool },
    RestartPostgres { fast: bool },
    Alarm { ms: u64 },
    DeleteExchange { ms: u64 },
    DeleteQueue { ms: u64 },
}

/// A fault and when it begins, at the earliest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub at: Duration,
    pub fault: Fault,
}

/// How often each kind is drawn, in the order of [`draw`].
pub const WEIGHTS: [u32; 13] = [5, 3, 4, 4, 2, 3, 2, 1, 2, 1, 2, 1, 1];

/// The part of a run in which the relay is killed. After it one process lives to the end, and its
/// memory can be judged.
const KILLS_UNTIL: f64 = 0.4;

/// When the last process of a run of `seconds` has started.
pub fn last_life(seconds: u64) -> Duration {
    Duration::from_secs(seconds).mul_f64(KILLS_UNTIL)
}

/// The faults of a run of `seconds`, one in each interval.
pub fn schedule(seed: u64, seconds: u64, interval: Duration) -> Vec<Step> {
    let mut dice = fastrand::Rng::with_seed(seed);
    let end = Duration::from_secs(seconds);
    let mut steps = Vec::new();
    let mut at = interval;
    while at < end {
        let mut fault = draw(&mut dice);
        while at >= last_life(seconds) && fault == Fault::KillRelay {
            fault = draw(&mut dice);
        }
        steps.push(Step { at, fault });
        at += interval;
    }
    steps
}

fn draw(dice: &mut fastrand::Rng) -> Fault {
    let mut left = dice.u32(0..WEIGHTS.iter().sum());
    let mut kind = 0;
    while left >= WEIGHTS[kind] {
        left -= WEIGHTS[kind];
        kind += 1;
    }
    let postgres = dice.bool();
    let ms = dice.u64(500..4_000);
    match kind {
        0 => Fault::KillRelay,
        // Sometimes longer than twice the heartbeat.
        1 => Fault::FreezeRelay { ms: if dice.u32(0..4) == 0 { 11_000 + ms } else { ms } },
        2 => Fault::Cut { postgres, reset: dice.bool() },
        3 => Fault::CutInside { postgres, nth: dice.u64(1..50) },
        4 => Fault::Delay { ms: dice.u64(20..200), hold_ms: ms },
        5 => Fault::Stall { postgres, ms },
        6 => Fault::HalfOpen { postgres, ms },
        7 => Fault::RestartBroker { kill: dice.bool() },
        8 => Fault::RestartPostgres { fast: dice.bool() },
        9 => Fault::Alarm { ms },
        10 => Fault::DeleteExchange { ms },
        11 => Fault::DeleteQueue { ms },
        _ => Fault::FreezeBroker { ms: if dice.bool() { 11_000 + ms } else { ms } },
    }
}

/// Duplicates may come between the beginning of a fault and the end of its recovery, and nowhere
/// else. How many come within one fault is counted for the report.
#[derive(Debug, Default)]
pub struct Duplicates {
    seen: u64,
    most: u64,
    /// What is wrong, in words.
    pub wrong: Vec<String>,
}

impl Duplicates {
    /// A fault begins; there were `count` duplicates by now.
    pub fn begins(&mut self, fault: &str, count: u64) {
        if count != self.seen {
            let came = count - self.seen;
            self.wrong.push(format!("{came} duplicates without a fault, before {fault}"));
        }
        self.seen = count;
    }

    /// The relay has got over the fault.
    pub fn recovered(&mut self, count: u64) {
        self.most = self.most.max(count - self.seen);
        self.seen = count;
    }

    /// Most duplicates of one fault.
    pub fn most(&self) -> u64 {
        self.most
    }
}

/// By how much the samples rise in ten minutes: the slope of the straight line that is nearest to
/// them all. Each has the second in which it was taken.
pub fn growth(samples: &[(f64, u64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, u64)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (middle, level) = (mean(|s| s.0), mean(|s| s.1 as f64));
    let of = |s: &(f64, u64)| (s.0 - middle, s.1 as f64 - level);
    let rise: f64 = samples.iter().map(of).map(|(x, y)| x * y).sum();
    let run: f64 = samples.iter().map(of).map(|(x, _)| x * x).sum();
    if run > 0.0 { rise / run * 600.0 } else { 0.0 }
}
