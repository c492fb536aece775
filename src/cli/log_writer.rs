//! Hands log lines to a thread that writes them to stderr.
//!
//! Invariant: logging never waits and never fails. A pipe that nobody reads, a full disk or a
//! closed stderr costs log lines, which are counted, and nothing else.

use std::io::{self, IsTerminal as _, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, SyncSender, TrySendError};
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use super::{colour, printable};

/// Maximum number of lines that wait for the thread.
const WAITING_MAX: usize = 4096;
/// Maximum wait for the last lines at the end of the program.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Lines that were dropped or could not be written.
const SERIES: &str = "watership_log_lines_dropped_total";

static QUEUE: OnceLock<SyncSender<Work>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

enum Work {
    Line(Vec<u8>),
    /// Answer when all lines before it are written.
    Flush(SyncSender<()>),
}

/// Makes a [`Line`] for each event.
pub(super) struct ToThread;

/// One line while it is written; sent when dropped.
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
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => count_dropped(),
        }
    }
}

fn count_dropped() {
    DROPPED.fetch_add(1, Ordering::Relaxed);
    metrics::counter!(SERIES).increment(1);
}

/// Creates the series, so that it is there before the first dropped line.
pub(super) fn create_metrics() {
    metrics::counter!(SERIES).increment(0);
}

/// Starts the thread. False if that fails: then lines are written directly.
pub(super) fn start() -> bool {
    let (sender, receiver) = mpsc::sync_channel(WAITING_MAX);
    let work = move || {
        while let Ok(work) = receiver.recv() {
            match work {
                Work::Line(line) => write(&line),
                // The waiter may have given up already.
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
        let _ = writeln!(stderr, "dropped {before} log lines: stderr was not read in time");
    }
    if stderr.write_all(shown(line, colour::is_wanted(stderr.is_terminal())).as_bytes()).is_err() {
        metrics::counter!(SERIES).increment(1);
    }
}

/// A line of which nothing can be taken for another: tracing-subscriber escapes the message, and
/// not every field. On a terminal it colours the line.
fn shown(line: &[u8], coloured: bool) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let shown = match text.starts_with('{') {
        true => printable::json(text),
        false if coloured => printable::coloured_line(text),
        false => printable::one_line(text),
    };
    format!("{shown}\n")
}

/// Waits until the lines so far are written, at most one second.
pub(super) fn flush() {
    let Some(queue) = QUEUE.get() else { return };
    let (done, written) = mpsc::sync_channel(1);
    if queue.try_send(Work::Flush(done)).is_ok() {
        let _ = written.recv_timeout(FLUSH_LIMIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_of_a_log_line_forges_another_line_or_moves_the_cursor() {
        let line = b"\x1b[2m12:00\x1b[0m WARN error=a\n12:01 INFO forged \x1b]0;t\x07\x1b[2J\n";
        let coloured = "\x1b[2m12:00\x1b[0m WARN error=a\\n12:01 INFO forged \
                        \\u{1b}]0;t\\u{7}\\u{1b}[2J\n";
        assert_eq!(shown(line, true), coloured);
        assert_eq!(shown(line, false), coloured.replace('\x1b', "\\u{1b}"));
        assert_eq!(shown(b"{\"a\":\"\xc2\x9b\"}\n", false), "{\"a\":\"\\u009b\"}\n");
    }
}
