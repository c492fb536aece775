//! The program: parses the command line, runs the command, turns the result into an exit code.
//!
//! Nothing else ends the process. Exit codes: 0 success, 1 failure, 2 usage or configuration, 3 a
//! verdict that an operator has to decide.

use std::process::ExitCode;

use clap::Parser as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use watership::cli::{self, Cli, End};
use watership::error::{Error, Kind, Result};

fn main() -> ExitCode {
    // Before anything else: lapin's connector would otherwise choose a provider by itself.
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        return report(&Error::internal("another TLS provider is installed already"));
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come here too, with code 0. A closed terminal is not a failure.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Error::internal("no async runtime").caused_by(error)),
    };
    let result = runtime.block_on(cli::execute(cli, watch_signals, give_up));
    // A name lookup may still hang in a thread; its answer is no longer needed.
    runtime.shutdown_background();
    match result {
        Ok(End::Fine) => ExitCode::SUCCESS,
        Ok(End::Failed) => ExitCode::from(1),
        Ok(End::NeedsDecision) => ExitCode::from(3),
        Err(error) => report(&error),
    }
}

fn report(error: &Error) -> ExitCode {
    cli::print_error(error);
    let kind = error.kind();
    ExitCode::from(if kind == Kind::Config {
        2
    } else if kind.is_verdict() {
        3
    } else {
        1
    })
}

/// The first SIGTERM, SIGINT or SIGHUP sets the value to true, another SIGTERM or SIGINT ends the
/// process.
///
/// It has its own thread, so that it works when everything else hangs.
fn watch_signals() -> Result<watch::Receiver<bool>> {
    let failed = |e: std::io::Error| Error::internal("signals cannot be handled").caused_by(e);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (sender, receiver) = watch::channel(false);
    let (mut terminate, mut interrupt, mut hang_up) = {
        let _guard = runtime.enter();
        let hang_up = (!ignores_hang_up()).then(|| signal(SignalKind::hangup()));
        let [terminate, interrupt] = [SignalKind::terminate(), SignalKind::interrupt()].map(signal);
        let hang_up = hang_up.transpose().map_err(failed)?;
        (terminate.map_err(failed)?, interrupt.map_err(failed)?, hang_up)
    };
    let wait = move || {
        runtime.block_on(async {
            loop {
                let is_hang_up = tokio::select! {
                    _ = terminate.recv() => false,
                    _ = interrupt.recv() => false,
                    // The terminal was closed. SIGHUP does not reload the configuration.
                    () = received(hang_up.as_mut()) => true,
                };
                if !sender.send_replace(true) {
                    tracing::info!("shutting down; send SIGTERM or SIGINT to exit now");
                } else if !is_hang_up {
                    // Shell and kernel both send SIGHUP, so that never counts as the second.
                    exit_now();
                }
            }
        });
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(failed)?;
    Ok(receiver)
}

async fn received(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether the parent, `nohup` for example, has this process ignore SIGHUP (proc(5), `SigIgn`).
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & 1 == 1)
}

/// Ends the process when its loop hangs, without destructors: they could hang too.
fn give_up() {
    cli::flush_log();
    std::process::abort()
}

#[expect(clippy::exit, clippy::disallowed_methods, reason = "the second signal does not wait")]
fn exit_now() {
    std::process::exit(1)
}
