//! The command line: one file per command. The only place that prints.
//!
//! Data goes to stdout, as text or with `--json` as one object; errors and logs go to stderr. A
//! command returns an [`End`]; `main` turns that into an exit code.

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Parser, Subcommand};
use serde::Serialize;
use tokio::sync::watch;

use crate::config::Config;
use crate::error::{Error, Kind, Result};

mod ask;
mod backfill;
mod broker;
mod check;
mod colour;
mod contracts;
mod demo;
mod drop;
mod find;
mod findings;
mod gap_rows;
mod inbox;
mod init;
mod log_writer;
mod logging;
mod outbox;
mod parked;
mod partitions;
mod postgres;
mod printable;
mod resync;
mod run;
mod schema;
mod status;

/// How a command ended that could do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All is well. Exit code 0.
    Fine,
    /// It found a problem. Exit code 1.
    Failed,
    /// It found a verdict, which an operator has to decide. Exit code 3.
    NeedsDecision,
}

/// Ships the Postgres outbox and captured tables to RabbitMQ, at least once and in order.
#[derive(Debug, Parser)]
#[command(name = "watership", version, after_help = EXAMPLE)]
pub struct Cli {
    /// Configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = "watership.toml")]
    config: PathBuf,
    /// Print data as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLE: &str = "\
Exit codes: 0 success, 1 failure, 2 usage or configuration, 3 a verdict for you to decide.

Example:
  watership --config shop.toml init --admin-url postgres://postgres@127.0.0.1/shop
  watership --config shop.toml check
  watership --config shop.toml run";

#[derive(Debug, Subcommand)]
enum Command {
    /// Set up the database (schema, roles, publication, slot, checkpoint, grants), then the broker
    /// (exchanges, queues, bindings).
    Init(init::Args),
    /// Check everything the relay needs, and change nothing.
    Check(check::Args),
    /// Run the relay until SIGTERM.
    Run(run::Args),
    /// List, show, retry or discard events that could not be published.
    Parked(parked::Args),
    /// Publish the existing rows of a captured table, between its live changes.
    Backfill(backfill::Args),
    /// Show the state of the relay, its checkpoint and its slot.
    Status(status::Args),
    /// Say where an event is: in the outbox, in the relay's window, parked, confirmed or dropped.
    Find(find::Args),
    /// Show how a captured table has changed and what its routes are agreed with, or agree.
    Schema(schema::Args),
    /// Accept the gap a verdict reported and move the checkpoint past it.
    Resync(resync::Args),
    /// Remove the slot, the publication and the schema from the database.
    Drop(drop::Args),
    /// The consumer's side: install and maintain the inbox, handle what is parked, test a consumer.
    Inbox(inbox::Args),
    /// Show Watership at work on private servers, through two faults.
    Demo(demo::Args),
}

/// Runs the command. `run` and `inbox torture` call `watch_signals` to learn when to stop; `run`
/// also calls `give_up`, which does not return, when the relay's loop is stuck.
///
/// # Errors
/// The command's own.
pub async fn execute(
    cli: Cli,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    give_up: fn(),
) -> Result<End> {
    let end = command(cli, watch_signals, give_up).await?;
    note(io::stdout().flush());
    if UNPRINTED.load(Ordering::Relaxed) {
        return Err(Error::internal("stdout cannot be written, so the result is not complete"));
    }
    Ok(end)
}

async fn command(
    cli: Cli,
    watch_signals: impl FnOnce() -> Result<watch::Receiver<bool>>,
    give_up: fn(),
) -> Result<End> {
    let out = Out { json: cli.json };
    match cli.command {
        Command::Init(args) => init::execute(&load_with_warnings(&cli.config)?, &args, out).await,
        Command::Check(args) => check::execute(&load(&cli.config)?, &args, out).await,
        Command::Run(args) => {
            run::execute(Config::load(&cli.config)?, &args, watch_signals, give_up).await
        }
        Command::Parked(args) => {
            parked::execute(&load_with_warnings(&cli.config)?, &args, out).await
        }
        Command::Backfill(args) => {
            backfill::execute(&load_with_warnings(&cli.config)?, &args, out).await
        }
        Command::Status(args) if args.is_probe() => Ok(status::probe(&cli.config, &args).await),
        Command::Status(_) => status::execute(&load_with_warnings(&cli.config)?, out).await,
        Command::Find(args) => find::execute(&load_with_warnings(&cli.config)?, &args, out).await,
        Command::Schema(args) => {
            schema::execute(&load_with_warnings(&cli.config)?, &args, out).await
        }
        Command::Resync(args) => {
            resync::execute(&load_with_warnings(&cli.config)?, &args, out).await
        }
        Command::Drop(args) => drop::execute(&load_with_warnings(&cli.config)?, &args, out).await,
        Command::Inbox(args) => inbox::execute(&args, watch_signals, out).await,
        Command::Demo(args) => Ok(if demo::run(args).await? { End::Fine } else { End::Failed }),
    }
}

/// For commands that print their result and end: logs are quiet.
fn load(path: &Path) -> Result<Config> {
    let config = Config::load(path)?;
    logging::start_quiet(&config.log);
    Ok(config)
}

/// As [`load`]; warnings about the file go to stderr.
fn load_with_warnings(path: &Path) -> Result<Config> {
    let config = load(path)?;
    config.warnings.iter().for_each(|warning| print_warning(warning));
    Ok(config)
}

/// Waits for the log thread to write the lines it has.
pub fn flush_log() {
    logging::flush();
}

/// Prints an error and what to do: as a log line where logs are JSON, as text elsewhere.
pub fn print_error(error: &Error) {
    if logging::is_json() {
        let hint = error.hint_text().unwrap_or_default();
        tracing::error!(kind = error.label(), hint, "{error}");
        return logging::flush();
    }
    logging::flush();
    let what = error.to_string();
    // Only errors about the file have lines of their own; any other text is somebody else's.
    let what = match error.kind() {
        Kind::Config => printable::lines(&what),
        _ => printable::one_line(&what),
    };
    let mut text = format!("error: {what}\n");
    if let Some(hint) = error.hint_text() {
        text.push_str(&format!("hint: {}\n", printable::lines(hint)));
    }
    // A closed stderr leaves no place to report this.
    let _ = io::stderr().write_all(text.as_bytes());
}

fn print_warning(text: &str) {
    let _ = writeln!(io::stderr(), "warning: {}", printable::lines(text));
}

/// Says how far a long command has come, beside its data.
fn print_note(text: &str) {
    let _ = writeln!(io::stderr(), "{}", printable::lines(text));
}

/// Where data is printed. Everything passes `printable` on its way; what is one value of a line
/// passes it before, so that it stays on that line.
#[derive(Debug, Clone, Copy)]
struct Out {
    json: bool,
}

impl Out {
    /// Prints a line; nothing with `--json`.
    fn line(self, text: &str) {
        self.print("", text);
    }

    /// Prints a line that begins with `word`, in a colour (ANSI number) where that is wanted.
    fn marked(self, colour: u8, word: &str, text: &str) {
        let coloured = colour::is_wanted(io::stdout().is_terminal());
        let word = if coloured { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() };
        self.print(&word, text);
    }

    fn print(self, before: &str, text: &str) {
        if !self.json {
            note(writeln!(io::stdout(), "{before}{}", printable::lines(text)));
        }
    }

    /// Prints the whole result with `--json`; nothing without.
    fn data(self, data: &impl Serialize) -> Result<()> {
        if self.json {
            let text = serde_json::to_string_pretty(data)
                .map_err(|e| Error::internal("the result is not JSON").caused_by(e))?;
            note(writeln!(io::stdout(), "{}", printable::json(&text)));
        }
        Ok(())
    }
}

/// Something could not be printed, so the command did not do its work.
static UNPRINTED: AtomicBool = AtomicBool::new(false);

/// `head` closes the pipe early; that is not our failure. A full disk is.
fn note(written: io::Result<()>) {
    if written.is_err_and(|error| error.kind() != io::ErrorKind::BrokenPipe) {
        UNPRINTED.store(true, Ordering::Relaxed);
    }
}
