//! The soak: the real relay under load while a seeded supervisor breaks one thing after another.
//!
//! `cargo test --release --test soak -- --seed 7 --seconds 600 --load 80`. Without a seed one is
//! drawn and printed, with the whole schedule. `--load` is a percentage of what this relay, these
//! servers and this judge were seen to do together without a fault; `--rate` is in events a second.
//! After each fault everything that was committed has to arrive (liveness); in the end everything
//! is judged as in all fault tests: nothing lost, nothing invented or altered, first arrivals of
//! each key in order; also, duplicates only around faults, the slot never ahead of the stored
//! checkpoint, and memory within its bound. How long things took is reported.

mod supervisor;
#[path = "../support/mod.rs"]
mod support;

use std::process::ExitCode;
use std::time::Duration;

use support::schedule;

/// What the command line says.
#[derive(Debug, Clone, Copy)]
struct Arguments {
    seed: u64,
    seconds: u64,
    load: Load,
}

/// How much is written.
#[derive(Debug, Clone, Copy)]
pub enum Load {
    /// Events a second.
    Rate(u32),
    /// Per cent of what is possible here.
    Percent(u32),
}

/// Nothing when the command line asks for other tests.
fn arguments() -> Option<Arguments> {
    let seed = fastrand::u64(..1_000_000);
    let mut wanted = Arguments { seed, seconds: 45, load: Load::Rate(1_000) };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|text| text.parse::<u64>().ok());
        match &*word {
            "--seed" => wanted.seed = number()?,
            "--seconds" => wanted.seconds = number()?,
            "--rate" => wanted.load = Load::Rate(u32::try_from(number()?).ok()?),
            "--load" => wanted.load = Load::Percent(u32::try_from(number()?).ok()?),
            "--list" => return None,
            // What `cargo test` hands to every test binary.
            other if other.starts_with('-') || other == "soak" => {}
            _ => return None,
        }
    }
    Some(wanted)
}

fn main() -> ExitCode {
    let Some(wanted) = arguments() else { return ExitCode::SUCCESS };
    let interval = Duration::from_secs(if wanted.seconds >= 300 { 20 } else { 7 });
    let steps = schedule::schedule(wanted.seed, wanted.seconds, interval);
    println!("soak: {wanted:?}");
    for step in &steps {
        println!("    {:>6.1?} {:?}", step.at, step.fault);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (seed, seconds) = (wanted.seed, wanted.seconds);
    // A panic comes out of `block_on`, as from any test.
    runtime.block_on(supervisor::soak(seed, seconds, wanted.load, &steps));
    println!("test result: ok. 1 passed; 0 failed; 0 ignored; soak with seed {seed}");
    ExitCode::SUCCESS
}
