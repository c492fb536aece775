//! Hands log lines to a thread that writes them to stderr.
//!
//! Invariant: whoever logs never waits and never fails because of the log. A pipe that nobody
//! reads, a full disk or a closed stderr costs lines, which are counted, and nothing else.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for the thread.
const WAITING_MAX: usize = 4096;
/// How long the end of the program waits for the last lines.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Lines that were dropped or could not be written.
const SERIES: &str = "watership_log_lines_dropped_total";

static QUEUE: OnceLock<SyncSender<Work>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

enum Work {
    Line(Vec<u8>),
    /// Answer when everything before is written.
    Flush(SyncSender<()>),
}

/// Makes a [`Line`] for each event.
pub(super) struct ToThread;

/// One line in the making; sent when dropped.
pub(super) struct Line(Vec<u8>);

impl<'w> MakeWriter<'w> for ToThread {
    type Writer = Line;

    fn make_writer(&'w self) -> Line {
        Line(Vec::new())
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(queue) = QUEUE.get() else { return };
        match queue.try_send(Work::Line(std::mem::take(&mut self.0))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => count(),
        }
    }
}

fn count() {
    DROPPED.fetch_add(1, Ordering::Relaxed);
    metrics::counter!(SERIES).increment(1);
}

/// Makes the series.
pub(super) fn counted() {
    metrics::counter!(SERIES).increment(0);
}

/// Starts the thread. False when there can be none: then lines are written where they are made.
pub(super) fn start() -> bool {
    let (sender, receiver) = mpsc::sync_channel(WAITING_MAX);
    let work = move || {
        while let Ok(work) = receiver.recv() {
            match work {
                Work::Line(line) => write(&line),
                // Nobody waits any more: fine.
                Work::Flush(done) => drop(done.try_send(())),
            }
        }
    };
    let started = std::thread::Builder::new().name("log".into()).spawn(work);
    started.is_ok() && QUEUE.set(sender).is_ok()
}

fn write(line: &[u8]) {
    let mut stderr = io::stderr();
    let before = DROPPED.swap(0, Ordering::Relaxed);
    if before > 0 {
        let _ = writeln!(stderr, "{before} log lines were dropped: nobody took them in time");
    }
    if stderr.write_all(line).is_err() {
        metrics::counter!(SERIES).increment(1);
    }
}

/// Waits until the lines so far are written, one second at most.
pub(super) fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (done, written) = mpsc::sync_channel(1);
    if queue.try_send(Work::Flush(done)).is_ok() {
        let _ = written.recv_timeout(FLUSH_LIMIT);
    }
}
