//! The real binary as a process: started, killed, asked how it is.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use watership::dev::{self, Process, Signal};

use super::waiting::{LIMIT, POLL, Patience};

/// The one queue of a run; it gets everything.
pub const QUEUE: &str = "all";
/// The exchange of a relay without routes.
pub const EXCHANGE: &str = "watership";

/// Limits of the relay's window in this run.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    pub events: u32,
    pub unconfirmed: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self { events: 8192, unconfirmed: 2048 }
    }
}

/// Whether a relay with these settings polls: it has no slot.
pub fn is_polling(settings: &str) -> bool {
    settings.contains("source.mode = \"poll\"")
}

/// A relay process and how to reach it; killed and started again with the same configuration.
pub struct Relay {
    pub config: PathBuf,
    admin: u16,
    process: Option<Process>,
    /// Length of the log when this process began.
    log_begins: usize,
    /// Somebody looked at what it said.
    heard: bool,
}

impl Relay {
    pub fn new(database: &str, broker: &str, window: Window) -> Self {
        Self::with(database, broker, window, "")
    }

    /// With further lines at the configuration's top, such as `broker.heartbeat = "1s"`.
    pub fn with(database: &str, broker: &str, window: Window, settings: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let name = format!("crash-{}.toml", NEXT.fetch_add(1, Ordering::Relaxed));
        let config = dev::home().expect("a temporary directory").join(name);
        let admin = dev::free_port().expect("a free port");
        let slot = database.rsplit('/').next().expect("a database name");
        let slot = slot.split('?').next().unwrap_or(slot);
        let slot = if is_polling(settings) {
            String::new()
        } else {
            format!("source.slot = \"slot_{slot}\"\n")
        };
        let text = format!(
            "source.url = \"{database}\"\n{slot}\
             broker.url = \"{broker}\"\n\
             admin.listen = \"127.0.0.1:{admin}\"\nadmin.linger = \"0s\"\n\
             log.format = \"text\"\n{settings}\n\
             relay.max_window_events = {}\nrelay.max_unconfirmed = {}\n\
             [[queue]]\nname = \"{QUEUE}\"\n\
             [[binding]]\nqueue = \"{QUEUE}\"\nexchange = \"{EXCHANGE}\"\nrouting_key = \"#\"\n",
            window.events, window.unconfirmed
        );
        std::fs::write(&config, text).expect("the configuration is written");
        Self { config, admin, process: None, log_begins: 0, heard: false }
    }

    /// One of its commands, with its configuration.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
        command.arg("--config").arg(&self.config).arg(name);
        command
    }

    pub fn start(&mut self) {
        self.start_as(self.command("run"));
    }

    /// Starts it by a command of the test's own.
    pub fn start_as(&mut self, command: Command) {
        assert!(self.process.is_none(), "a relay runs already");
        let log = self.config.with_extension("log");
        self.log_begins = self.log_text().len();
        let process = Process::spawn("the relay", command, &log);
        self.process = Some(process.expect("the relay starts"));
    }

    /// The port of its HTTP server.
    pub fn admin(&self) -> u16 {
        self.admin
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("a relay runs").pid()
    }

    /// Waits for its end, with the exit code.
    pub async fn ended(&mut self) -> i32 {
        let mut process = self.process.take().expect("a relay runs");
        let status = process.wait(LIMIT).await.expect("the relay ends");
        status.code().unwrap_or(-1)
    }

    pub fn kill(&mut self) {
        self.process.take().expect("a relay runs").kill();
    }

    pub fn signal(&mut self, signal: Signal) {
        self.process.as_mut().expect("a relay runs").signal(signal);
    }

    /// Ends it with TERM; it must end well.
    pub async fn stop(&mut self) {
        let mut process = self.process.take().expect("a relay runs");
        process.signal(Signal::Term);
        let status = process.wait(LIMIT).await.expect("the relay ends");
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// All that it has logged.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.config.with_extension("log")).unwrap_or_default()
    }

    /// Waits until its log holds all of `texts`.
    pub async fn logs(&mut self, texts: &[&str]) {
        self.heard = true;
        let mut patience = Patience::new();
        while let Some(missing) = texts.iter().find(|text| !self.log_text().contains(**text)) {
            let what = || {
                // What ended the first session says more than the hundredth try since.
                let text = self.log_text();
                let ends = text.lines().filter(|l| l.contains("session ended")).take(3);
                let ends: Vec<_> = ends.collect();
                format!("{missing:?} not logged: {ends:#?}; {}", self.log())
            };
            patience.more((), what).await;
        }
    }

    /// Fails when it complained about anything, but for waiting for the place of a relay before it,
    /// and for the password in the test's own file.
    pub fn says_nothing(&mut self) {
        self.heard = true;
        let text = self.log_text();
        let complaints = text.lines().filter(|line| {
            let level = line.split_whitespace().nth(1);
            matches!(level, Some("WARN" | "ERROR"))
                && !line.contains("kind=\"busy\"")
                && !line.contains("holds a password")
        });
        let complaints: Vec<_> = complaints.collect();
        assert!(complaints.is_empty(), "nothing was wrong, and it said {complaints:#?}");
    }

    /// What the log must say is not known: it goes nowhere, or chance decides.
    pub fn cannot_be_heard(&mut self) {
        self.heard = true;
    }

    /// Whether the test looked at what it said.
    pub fn is_heard(&self) -> bool {
        self.heard
    }

    pub fn log(&self) -> String {
        format!("the relay's log:\n{}", dev::tail(&self.config.with_extension("log")))
    }

    /// Fails when it ended by itself.
    pub fn check(&mut self) {
        if let Some(status) = self.process.as_mut().and_then(Process::ended) {
            panic!("the relay ended by itself with {status}; {}", self.log());
        }
    }

    /// The body of an admin page; empty when nobody answers.
    pub async fn page(&self, path: &str) -> String {
        get(self.admin, path).await.1
    }

    /// `/status`; null when nobody answers.
    pub async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.page("/status").await).unwrap_or_default()
    }

    /// Waits until `/status` is as wanted.
    pub async fn reaches(&mut self, what: &str, wanted: impl Fn(&serde_json::Value) -> bool) {
        let mut patience = Patience::new();
        loop {
            let status = self.status().await;
            if wanted(&status) {
                return;
            }
            self.check();
            patience.more((), || format!("{what}: {status}; {}", self.log())).await;
        }
    }

    /// For so long, `/status` is as wanted whenever one looks, and the broker confirms nothing.
    /// What was sent before has to be settled already.
    pub async fn stays(&mut self, time: Duration, wanted: impl Fn(&serde_json::Value) -> bool) {
        let (deadline, confirmed) = (Instant::now() + time, self.confirmed().await);
        while Instant::now() < deadline {
            let status = self.status().await;
            assert!(wanted(&status), "{status}; {}", self.log());
            assert_eq!(self.confirmed().await, confirmed, "{}", self.log());
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until the broker has confirmed `count` messages to this process.
    pub async fn confirms(&mut self, count: u64) {
        let mut patience = Patience::new();
        loop {
            let confirmed = self.confirmed().await;
            if confirmed >= count {
                return;
            }
            self.check();
            patience.more(confirmed, || format!("{count} confirms; {}", self.log())).await;
        }
    }

    /// Messages that the broker confirmed to this process.
    pub async fn confirmed(&self) -> u64 {
        self.counted("watership_messages_confirmed_total").await
    }

    /// The sum of all series of `/metrics` that begin so.
    pub async fn counted(&self, series: &str) -> u64 {
        let page = self.page("/metrics").await;
        let lines = page.lines().filter(|line| line.starts_with(series));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Waits until that sum is `count` or more.
    pub async fn counts(&mut self, series: &str, count: u64) {
        let mut patience = Patience::new();
        loop {
            let counted = self.counted(series).await;
            if counted >= count {
                return;
            }
            self.check();
            let what = || format!("{series} stays below {count}; {}", self.log());
            patience.more(counted, what).await;
        }
    }

    /// Its metrics, when everything has arrived: each ended session is counted by its cause, and
    /// nothing that a fault raised stays raised.
    pub async fn has_counted_its_faults(&mut self) {
        for raised in [
            "watership_in_flight_messages",
            "watership_route_held{",
            "watership_broker_blocked ",
            "watership_window_paused",
            "watership_verdict",
            "watership_circuit_state{state=\"open\"}",
        ] {
            self.falls_to_zero(raised).await;
        }
        // Of the same trouble only the first and each tenth ending is logged at this level.
        let ended = self.log_text()[self.log_begins..].matches("session ended").count() as u64;
        self.counts("watership_reconnects_total", ended).await;
        let reconnects = self.counted("watership_reconnects_total").await;
        let sessions = self.counted("watership_sessions_total").await;
        assert!((1..=reconnects + 1).contains(&sessions), "{sessions} sessions, {reconnects}");
        assert_eq!(ended == 0, reconnects == 0, "{reconnects} reconnects; {}", self.log());
    }

    async fn falls_to_zero(&mut self, series: &str) {
        let mut patience = Patience::new();
        loop {
            let page = self.page("/metrics").await;
            let mut lines = page.lines().filter(|line| line.starts_with(series)).peekable();
            let there = lines.peek().is_some();
            if there && lines.all(|line| line.ends_with(" 0")) {
                return;
            }
            self.check();
            let what = || format!("{series} is not 0: {page}; {}", self.log());
            patience.more((), what).await;
        }
    }

    /// Resident memory in KiB: now and at its peak.
    pub fn memory_kib(&self) -> (u64, u64) {
        let path = format!("/proc/{}/status", self.pid());
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name))?;
            line.trim().trim_end_matches("kB").trim().parse().ok()
        };
        (field("VmRSS:").unwrap_or(0), field("VmHWM:").unwrap_or(0))
    }
}

/// Status code and body of a page of this machine; 0 when nobody listens, or answers.
pub async fn get(port: u16, path: &str) -> (u16, String) {
    let ask = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        std::io::Result::Ok(answer)
    };
    let answer =
        timeout(LIMIT, ask).await.map_or_else(|_| String::new(), Result::unwrap_or_default);
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    (code, body.to_owned())
}
