//! The whole way: applications emit, the relay publishes, consumers handle; and relay, broker,
//! Postgres and consumers are each killed with -9 at random. In the end the effects must equal what
//! was committed: each once, and each key in its order.
//!
//! `cargo test --test consumers -- --events 60000 --kills 20 --partitions 8`. With `--partitions 0`
//! the consumers compete for one plain queue, and the order is not judged. A command after `--run`
//! is the consumer, in whatever language; without one it is the example `inbox_consumer`. It gets
//! the environment that `watership inbox torture` gives, with the names of all queues in QUEUE,
//! separated by commas. It reports how long it took and judges no rate.

mod judge;
mod stack;

use std::path::PathBuf;
use std::process::ExitCode;

/// What the command line says.
#[derive(Debug, Clone)]
struct Arguments {
    /// Events that the applications commit.
    events: u32,
    /// Keys that they have.
    keys: u32,
    /// How often each of relay, broker, Postgres and consumers is killed.
    kills: u32,
    /// Partitions of the route; 0 for one plain queue.
    partitions: u32,
    /// Consumer processes.
    consumers: usize,
    seed: u64,
    /// The consumer.
    command: Vec<String>,
}

/// Nothing when the command line asks for other tests.
fn arguments() -> Option<Arguments> {
    let mut wanted = Arguments {
        events: 3_000,
        keys: 100,
        kills: 2,
        partitions: 4,
        consumers: 3,
        seed: fastrand::u64(..1_000_000),
        command: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--run" {
            wanted.command = words.collect();
            break;
        }
        let mut number = || words.next().and_then(|text| text.parse::<u32>().ok());
        match &*word {
            "--events" => wanted.events = number()?,
            "--keys" => wanted.keys = number()?.max(1),
            "--kills" => wanted.kills = number()?,
            "--partitions" => wanted.partitions = number()?,
            "--consumers" => wanted.consumers = number()?.max(1) as usize,
            "--seed" => wanted.seed = number()?.into(),
            "--list" => return None,
            // What `cargo test` hands to every test binary.
            other if other.starts_with('-') || other == "consumers" => {}
            _ => return None,
        }
    }
    if wanted.command.is_empty() {
        wanted.command = vec![example().display().to_string()];
    }
    Some(wanted)
}

/// The example, which cargo builds before the tests.
fn example() -> PathBuf {
    let mut path = watership::dev::this_program().expect("this program");
    path.pop();
    path.set_file_name("examples");
    path.join("inbox_consumer")
}

fn main() -> ExitCode {
    let Some(wanted) = arguments() else { return ExitCode::SUCCESS };
    println!("consumers: {wanted:?}");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    // A panic comes out of `block_on`, as from any test.
    runtime.block_on(stack::run(&wanted));
    println!("test result: ok. 1 passed; 0 failed; 0 ignored; seed {}", wanted.seed);
    ExitCode::SUCCESS
}
