//! `watership inbox torture`: the crash test for a consumer.

use super::Database;
use crate::cli::printable::one_line;
use crate::cli::{End, Out};
use crate::config::load;
use crate::dev::torture::{self, Report};
use crate::error::Result;

/// Options of `torture`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership inbox torture --url postgres://billing@127.0.0.1/billing \\\n    \
    --amqp amqp://guest:guest@127.0.0.1/%2f --queue torture --ordered -- python consumer.py\n\n\
    The command is a consumer: it reads DATABASE_URL, AMQP_URL, QUEUE, CONSUMER and ORDERED from \
    its\nenvironment and runs until SIGTERM. For each message, {\"key\": \"k7\", \"number\": 13}, \
    its \
    handler\ninserts message_id, key and number into watership_torture.effect, in the transaction \
    of the\ninbox. The schema watership_torture is dropped and made by this command.\n\
    Exit code 0 if each event had its effect once (and, with --ordered, in the order of its key).")]
pub(super) struct Args {
    #[command(flatten)]
    database: Database,
    /// The broker. ${NAME} and ${file:/path} are filled in.
    #[arg(long, value_name = "URL")]
    amqp: String,
    /// An empty queue; one that does not exist is made, and removed at the end.
    #[arg(long)]
    queue: String,
    /// The name under which the consumer claims messages.
    #[arg(long, default_value = "torture")]
    consumer: String,
    /// Number of different events.
    #[arg(long, default_value_t = 5_000)]
    events: usize,
    /// Number of keys.
    #[arg(long, default_value_t = 50, value_parser = at_least_one)]
    keys: usize,
    /// Percentage of events that are published twice.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=100))]
    duplicates: u8,
    /// How often a process is killed.
    #[arg(long, default_value_t = 20)]
    kills: usize,
    /// Processes that run side by side.
    #[arg(long, default_value_t = 3, value_parser = at_least_one)]
    processes: usize,
    /// Make the queue with a single active consumer, and judge the order within each key.
    #[arg(long)]
    ordered: bool,
    /// The consumer, and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// Faults of one kind that are printed.
const SHOWN_MAX: usize = 10;

pub(super) async fn execute(args: &Args, out: Out) -> Result<End> {
    let (postgres, postgres_url) = args.database.options(super::URL)?;
    let options = torture::Options {
        postgres,
        postgres_url,
        amqp_url: load::fill_in_url(&args.amqp).map_err(|e| e.context("--amqp"))?,
        queue: args.queue.clone(),
        consumer: args.consumer.clone(),
        events: args.events,
        keys: args.keys,
        duplicates_percent: args.duplicates,
        kills: args.kills,
        processes: args.processes,
        ordered: args.ordered,
        command: args.command.clone(),
    };
    let report = torture::run(&options, |line| out.line(line)).await?;
    print(&report, args.ordered, out);
    out.data(&report)?;
    Ok(if report.is_good() { End::Fine } else { End::Failed })
}

fn print(report: &Report, ordered: bool, out: Out) {
    out.line(&format!(
        "\n{} events, {} of them published twice; {} kills, {} processes ended by themselves",
        report.events, report.duplicates, report.kills, report.ended
    ));
    let lists = [
        ("lost", &report.lost),
        ("twice", &report.twice),
        ("out of order", &report.out_of_order),
        ("unknown", &report.unknown),
    ];
    for (name, list) in lists {
        if name == "out of order" && !ordered {
            out.line(&format!("{name:<13} not judged"));
            continue;
        }
        out.line(&format!("{name:<13} {}", list.len()));
        for item in list.iter().take(SHOWN_MAX) {
            out.line(&format!("    {}", one_line(item)));
        }
    }
    out.line(&format!("{:<13} {}", "parked", report.parked));
    out.line(&format!("{:<13} {}", "left in queue", report.left));
}
