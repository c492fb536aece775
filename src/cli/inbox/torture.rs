//! `watership inbox torture`: the crash test for a consumer.

use std::time::Duration;

use tokio::sync::watch;

use super::Database;
use super::parked::{discard_all, is_parked};
use crate::cli::printable::one_line;
use crate::cli::{End, Out, print_note};
use crate::config::load;
use crate::dev::torture::{self, Report, Told};
use crate::error::{Error, Result};
use crate::pg::client::SqlConnection;

/// Options of `torture`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example, once and then each time:\n  \
    psql -U postgres billing -c 'GRANT CREATE ON DATABASE billing TO billing'\n  \
    watership inbox torture --url postgres://billing@127.0.0.1/billing \\\n    \
    --amqp amqp://guest:guest@127.0.0.1/%2f --queue torture --ordered -- python consumer.py\n\n\
    The user of --url needs the role watership_consumer, and CREATE on the database: this command \
    drops\nand makes the schema watership_torture.\n\n\
    The command is a consumer: it reads DATABASE_URL, AMQP_URL, QUEUE, CONSUMER and ORDERED from \
    its\nenvironment and runs until SIGTERM. For each message, {\"key\": \"k7\", \"number\": 13}, \
    its \
    handler\ninserts message_id, key and number into watership_torture.effect, in the transaction \
    of the\ninbox. To test a consumer with partitions, name one that is empty and has no \
    consumers:\n--queue orders.00 --ordered.\n\
    Exit code 0 if each event had its effect once (and, with --ordered, in the order of its key).")]
pub(super) struct Args {
    #[command(flatten)]
    database: Database,
    /// The broker. ${NAME} and ${file:/path} are filled in.
    #[arg(long, value_name = "URL")]
    amqp: String,
    /// An empty queue without consumers; one that does not exist is made, and removed at the end.
    #[arg(long)]
    queue: String,
    /// The name under which the consumer claims messages. What earlier tests parked under the
    /// default name is discarded.
    #[arg(long, default_value = CONSUMER)]
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
    /// Give up when there has been no new effect for this long.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = at_least_one)]
    patience: usize,
    /// Make the queue with a single active consumer, and judge the order within each key. A queue
    /// that exists must have been declared with x-single-active-consumer.
    #[arg(long)]
    ordered: bool,
    /// The consumer, and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The consumer's name unless one is given.
const CONSUMER: &str = "torture";

fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// Faults of one kind that are printed.
const SHOWN_MAX: usize = 10;

pub(super) async fn execute(
    args: &Args,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    out: Out,
) -> Result<End> {
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
        patience: Duration::from_secs(args.patience as u64),
        ordered: args.ordered,
        command: args.command.clone(),
    };
    let stop = watch_signals()?;
    begin_with_nothing_parked(args).await?;
    let tell = |line: Told<'_>| match line {
        Told::Round(text) => out.line(text),
        Told::Note(text) => print_note(text),
    };
    let report = torture::run(&options, stop, tell).await?;
    print(&report, args, out);
    out.data(&report)?;
    Ok(if report.is_good() { End::Fine } else { End::Failed })
}

/// New messages of a parked key are parked behind it, so a correct consumer would fail the test.
async fn begin_with_nothing_parked(args: &Args) -> Result<()> {
    let SqlConnection { client, closed: _closed } = args.database.inbox(super::URL).await?;
    let consumer = &args.consumer;
    if consumer == CONSUMER {
        discard_all(&client, consumer, "parked by an earlier crash test").await?;
    } else if is_parked(&client, consumer).await? {
        let text = format!("consumer {consumer:?} has parked messages; the test needs a free name");
        return Err(Error::refused(text).hint(format!(
            "give another name, none at all, or discard what is parked: watership inbox parked \
             --url … discard --consumer {consumer} --all --reason 'left by a test'"
        )));
    }
    Ok(())
}

fn print(report: &Report, args: &Args, out: Out) {
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
        if name == "out of order" && !args.ordered {
            out.line(&format!("{name:<13} not judged"));
            continue;
        }
        out.line(&format!("{name:<13} {}", list.len()));
        for item in list.iter().take(SHOWN_MAX) {
            out.line(&format!("    {}", one_line(item)));
        }
    }
    out.line(&format!("{:<13} {}", "parked", report.parked));
    if let Some(error) = &report.first_parked {
        out.line(&format!("    the first: {}", one_line(error)));
        out.line(&format!(
            "    see: watership inbox parked --url … list --consumer {}",
            one_line(&args.consumer)
        ));
    }
    out.line(&format!("{:<13} {}", "left in queue", report.left));
    if !report.output.is_empty() {
        out.line("\nThe last lines that a consumer printed:");
        report.output.iter().for_each(|line| out.line(&format!("    {}", one_line(line))));
    }
}
