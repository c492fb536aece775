//! Private Postgres and RabbitMQ from local binaries, for the demo and the tests; with them what
//! both judge a run by, the [`ledger`] and its [`consumer`].
//!
//! Everything a process starts here lives in one temporary directory, on free loopback ports, with
//! its own data and its own cookie; it never touches a server that was there before.
//!
//! Invariant of this file: what was started ends, even when this process is killed with -9. A
//! small `sh`, the watchdog, holds the read end of a pipe whose only write end is ours. When we
//! end, however we end, the pipe closes; the watchdog then ends every process that has a file in
//! `pids/` and removes the directory. Servers are plain child processes, tied to no runtime, so
//! that one server can serve the tests of many runtimes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Result};

pub mod consumer;
pub mod ledger;
mod postgres;
mod rabbit;
pub mod torture;

pub use postgres::{Postgres, PostgresOptions, StopMode};
pub use rabbit::{Rabbit, RabbitOptions};

/// How often a wait looks again. A wait ends on what it sees; this is only its grain.
const POLL: Duration = Duration::from_millis(20);
/// How long a stopped process may take until it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(40);
/// How many bytes of a server's log an error message shows.
const LOG_TAIL: usize = 2_000;
/// What to do when a server's programs are not on this machine.
const INSTALL_HINT: &str = "run scripts/install (./demo and ./check do), or name the directory \
                            of the programs in WATERSHIP_PG_BIN or WATERSHIP_RABBITMQ_BIN";

/// Runs as the last breath of this process: ends what is listed in `pids/`, removes the directory.
///
/// `$1` is the directory. The `read` blocks until our end of the pipe is closed.
const WATCHDOG: &str = r#"
trap '' HUP INT TERM QUIT
while read -r line; do :; done
cd /
each() { for f in "$1"/pids/*; do [ -f "$f" ] && read -r s p <"$f" && "$2" "$s" "$p"; done; }
ask() { kill -s "$1" "$2"; kill -s CONT "$2"; }
force() { kill -s KILL "-$2"; kill -s KILL "$2"; }
alive() { kill -0 "$2" && left=1; }
each "$1" ask
tries=0
while [ $tries -lt 70 ]; do
    left=0
    each "$1" alive
    [ $left = 0 ] && break
    tries=$((tries + 1))
    sleep 0.1
done
each "$1" force
tries=0
until rm -rf "$1" || [ $tries -ge 20 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
"#;

/// A signal that can be sent to a server or process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Freeze: the sockets stay open, nobody answers.
    Stop,
    /// Go on after [`Signal::Stop`].
    Cont,
    /// Ask to end.
    Term,
    /// As by Ctrl-C; a fast shutdown for Postgres.
    Int,
    /// As when the terminal is closed.
    Hangup,
    /// An immediate shutdown for Postgres.
    Quit,
    /// End without a word.
    Kill,
}

impl Signal {
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "STOP",
            Self::Cont => "CONT",
            Self::Term => "TERM",
            Self::Int => "INT",
            Self::Hangup => "HUP",
            Self::Quit => "QUIT",
            Self::Kill => "KILL",
        }
    }
}

/// The temporary directory of this process. Made at the first use, removed by the watchdog.
///
/// # Errors
/// When the directory cannot be made or the watchdog cannot be started.
pub fn home() -> Result<&'static Path> {
    static HOME: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    match HOME.get_or_init(|| make_home().map_err(|e| e.to_string())) {
        Ok(path) => Ok(path),
        Err(text) => Err(Error::config(text.clone()).hint("set TMPDIR to a writable directory")),
    }
}

fn make_home() -> std::io::Result<PathBuf> {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let name = format!("watership-{}-{}", std::process::id(), &id[id.len() - 6..]);
    let home = std::env::temp_dir().join(name);
    fs::create_dir_all(home.join("pids"))?;
    // The servers may run as another user, who has to reach his directory inside.
    fs::set_permissions(&home, fs::Permissions::from_mode(0o755))?;
    let mut watchdog = Command::new("sh")
        .args(["-c", WATCHDOG, "watership-watchdog"])
        .arg(&home)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C goes to the whole group of the terminal; the watchdog has to outlive it.
        .process_group(0)
        .spawn()?;
    // Leaked on purpose: the pipe must stay open exactly as long as this process lives. The
    // standard library marks it close-on-exec, so no child of ours keeps it open.
    std::mem::forget(watchdog.stdin.take());
    Ok(home)
}

/// A new empty directory inside [`home`], named after `kind`.
fn own_directory(kind: &str) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let path = home()?.join(format!("{kind}{}", NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&path).map_err(|e| broken("making", &path, e))?;
    Ok(path)
}

/// A child process that does not outlive us: in its own process group, known to the watchdog.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pid_file: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its output appended to the file `log`.
    ///
    /// # Errors
    /// When the program or the log file cannot be opened.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        Self::spawn_with_ending(name, &mut command, log, Signal::Kill)
    }

    /// `ending` is the signal by which the watchdog ends it.
    fn spawn_with_ending(
        name: &str,
        command: &mut Command,
        log: &Path,
        ending: Signal,
    ) -> Result<Self> {
        let out = fs::OpenOptions::new().create(true).append(true).open(log);
        let out = out.map_err(|e| broken("opening the log file", log, e))?;
        let err = out.try_clone().map_err(|e| broken("opening the log file", log, e))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
        let child = command.spawn().map_err(|e| {
            Error::config(format!("starting {}", command.get_program().display())).caused_by(e)
        })?;
        let pid_file = home()?.join("pids").join(child.id().to_string());
        let process = Self { name: name.into(), child, pid_file, log: log.into() };
        fs::write(&process.pid_file, format!("{} {}\n", ending.name(), process.pid()))
            .map_err(|e| broken("writing", &process.pid_file, e))?;
        Ok(process)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The file that holds its output.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended; `None` while it runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.try_wait().ok().flatten();
        if status.is_some() {
            // Its number may be given to somebody else from here on.
            let _ = fs::remove_file(&self.pid_file);
        }
        status
    }

    /// Sends `signal` to its process group.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            send(signal, &[format!("-{}", self.pid())]);
        }
    }

    /// Kills it with -9 and reaps it.
    pub fn kill(&mut self) {
        self.signal(Signal::Kill);
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.pid_file);
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended within `limit`.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                let text =
                    format!("{} (pid {}) has not ended within {limit:?}", self.name, self.pid());
                return Err(Error::unreachable(text));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// For drops: blocks until the end, `limit` at most.
    fn wait_blocking(&mut self, limit: Duration) {
        let mut waited = Duration::ZERO;
        while self.ended().is_none() && waited < limit {
            std::thread::park_timeout(POLL);
            waited += POLL;
        }
    }

    /// Sends `signal` and waits for the end; kills what has not ended within [`STOP_LIMIT`].
    async fn stop(&mut self, signal: Signal) -> Result<()> {
        self.signal(Signal::Cont);
        self.signal(signal);
        let ended = self.wait(STOP_LIMIT).await.map(drop);
        if ended.is_err() {
            self.kill();
        }
        ended
    }

    /// An error when the process is no longer there, with the end of its log.
    fn check_running(&mut self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(Error::unreachable(format!(
                "{} ended with {status} before it was ready; the end of its log:\n{}",
                self.name,
                tail(&self.log)
            ))),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `ready` says so, as long as `process` runs, for `limit` at most.
async fn wait_ready<F>(process: &mut Process, limit: Duration, ready: F) -> Result<()>
where
    F: AsyncFn() -> Result<()>,
{
    let deadline = Instant::now() + limit;
    loop {
        process.check_running()?;
        // An answer that never comes must not hold up the look at the process.
        let answer = tokio::time::timeout(Duration::from_secs(5), ready()).await;
        match answer {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e)) if Instant::now() >= deadline => {
                let text = format!("{} is not ready after {limit:?}", process.name);
                return Err(Error::unreachable(text).caused_by(e));
            }
            Err(_) if Instant::now() >= deadline => {
                let text = format!("{} does not answer after {limit:?}", process.name);
                return Err(Error::unreachable(text));
            }
            Ok(Err(_)) | Err(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Sends `signal` to `targets`: process ids, or process groups with a leading minus. Those that
/// are gone already do not matter.
fn send(signal: Signal, targets: &[String]) {
    let script = r#"s=$1; shift; for p in "$@"; do kill -s "$s" -- "$p"; done"#;
    let _ = Command::new("sh")
        .args(["-c", script, "sh", signal.name()])
        .args(targets)
        .stderr(Stdio::null())
        .status();
}

/// Where free ports are looked for: below the range that the kernel takes outgoing connections'
/// ports from (32768 and up), because one of those may take a port between the look and the use.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// Draws before giving up.
const PORT_DRAWS: u32 = 100;

/// A loopback port that nobody listens on at this moment, and that this process gives to nobody
/// else: a server may bind it much later, or stop and bind it again.
///
/// # Errors
/// When the loopback interface has none.
pub fn free_port() -> Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut is_free = |port: &u16| {
        let free = std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
        free && given.insert(*port)
    };
    let mut draws = (0..PORT_DRAWS).map(|_| fastrand::u16(PORTS));
    draws.find(&mut is_free).ok_or_else(|| {
        Error::unreachable(format!("no free port among {PORT_DRAWS} tried in {PORTS:?}"))
    })
}

/// The path of the running program, to start it once more as another process.
///
/// # Errors
/// When the system does not say.
pub fn this_program() -> Result<PathBuf> {
    std::env::current_exe().map_err(|e| Error::internal("finding this program").caused_by(e))
}

/// A command with a clean environment: what `PG*` or `RABBITMQ_*` the caller has set is not for
/// private servers.
fn clean_command(program: &Path) -> Command {
    let mut path = std::env::var("PATH").unwrap_or_default();
    path.push_str(":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let mut command = Command::new(program);
    command.env_clear().env("PATH", path).env("LC_ALL", "C.UTF-8");
    command
}

/// The directories of the variable `name`, then those of PATH.
fn search_path(name: &str) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for variable in [name, "PATH"] {
        let value = std::env::var_os(variable).unwrap_or_default();
        directories.extend(std::env::split_paths(&value).filter(|d| d.is_absolute()));
    }
    directories
}

/// The directories `parent/*/below`, in the order of their names.
fn versions(parent: &str, below: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<_> = entries.flatten().map(|e| e.path().join(below)).collect();
    found.retain(|path| path.is_dir());
    found.sort();
    found
}

/// The last bytes of a log file.
pub fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let start = bytes.len().saturating_sub(LOG_TAIL);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

fn broken(doing: &str, path: &Path, error: std::io::Error) -> Error {
    Error::config(format!("{doing} {}", path.display())).caused_by(error)
}
