//! The real program between a database and a vhost of its own, and a consumer of what arrives.
//!
//! Every wait ends on what is seen and has a deadline. That something does *not* arrive is shown
//! by [`Stage::settled`]: the relay has passed everything that was committed, and a marker that
//! was put into the queue afterwards has come out of it.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use lapin::{Channel, Connection};
use serde_json::Value;
use tokio_postgres::Client;
use watership::dev::{self, Process, Signal};

use super::inbox::{FENCE, Inbox, Message};
use super::relay;
use super::servers::{Database, Vhost, own_database, own_vhost};
use super::waiting::{LIMIT, Patience};

/// A file of this process's own.
fn own_file(ending: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    dev::home().expect("a temporary directory").join(format!("relay-{number}.{ending}"))
}

/// What differs between tests.
#[derive(Debug, Default, Clone)]
pub struct Setup<'a> {
    /// Run before `init`.
    pub sql: &'a str,
    /// Captured tables.
    pub tables: &'a [&'a str],
    /// Further lines of the configuration's top, such as `relay.idle_interval = "1s"`.
    pub settings: &'a str,
    /// Routes and more topology; without any, everything goes to the exchange `watership`.
    pub routes: &'a str,
    /// What the relay connects to, when that is not the superuser's URL.
    pub source_url: &'a str,
}

/// A prepared database and vhost, and a consumer on the queue `all`, which gets everything that
/// comes to the exchange `watership`.
pub struct Stage {
    pub database: Database,
    /// A session of the superuser.
    pub sql: Client,
    pub slot: String,
    /// What came out of the queue.
    pub inbox: Inbox,
    /// An open channel of the consumer's connection.
    pub channel: Channel,
    config: PathBuf,
    port: u16,
    _connection: Connection,
}

impl Stage {
    /// On the shared servers.
    pub async fn new(setup: Setup<'_>) -> Self {
        Self::on(own_database().await, own_vhost().await, setup).await
    }

    /// With this database and vhost.
    pub async fn on(database: Database, vhost: Vhost, setup: Setup<'_>) -> Self {
        let sql = database.connect().await;
        sql.batch_execute(setup.sql).await.expect("the test's own SQL");
        let slot = format!("slot_{}", database.name);
        let (config, port) = configuration(&database.url, &slot, &vhost, &setup);
        run(&config, &["init", "--admin-url", &database.url]).await.expect_code(0);
        let (connection, channel) = vhost.connect().await;
        let inbox = Inbox::open(&channel, "all").await;
        Self { database, sql, slot, inbox, channel, config, port, _connection: connection }
    }

    /// Starts a relay and waits until it streams.
    pub async fn start(&self) -> Running {
        let mut running = self.spawn();
        running.ready().await;
        running
    }

    /// Starts a relay.
    pub fn spawn(&self) -> Running {
        Running::spawn(&self.config, self.port)
    }

    /// Starts another relay of the same name, with an HTTP port of its own.
    pub fn spawn_second(&self) -> Running {
        self.spawn_other(|text| text)
    }

    /// The same, with a configuration that differs.
    pub fn spawn_other(&self, change: impl FnOnce(String) -> String) -> Running {
        let text = std::fs::read_to_string(&self.config).expect("the configuration");
        let text = change(text);
        let port = dev::free_port().expect("a free port");
        let text = text.replace(&format!("127.0.0.1:{}", self.port), &format!("127.0.0.1:{port}"));
        let config = own_file("toml");
        std::fs::write(&config, text).expect("the configuration is written");
        Running::spawn(&config, port)
    }

    /// Runs a command of the program for another relay than this stage's.
    pub async fn run_for(&self, relay: &Running, arguments: &[&str]) -> Ended {
        run(&relay.config, arguments).await
    }

    /// Runs a command of the program to its end.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        run(&self.config, arguments).await
    }

    /// Adds to the configuration file; the next relay reads it.
    pub fn append_to_configuration(&self, text: &str) {
        let all = std::fs::read_to_string(&self.config).expect("the configuration") + text;
        std::fs::write(&self.config, all).expect("the configuration is written");
    }

    /// Where the configuration file is.
    pub fn config(&self) -> &PathBuf {
        &self.config
    }

    /// The configuration file.
    pub fn configuration(&self) -> String {
        std::fs::read_to_string(&self.config).expect("the configuration")
    }

    /// Writes another configuration; the next relay reads it.
    pub fn replace_configuration(&self, text: &str) {
        std::fs::write(&self.config, text).expect("the configuration is written");
    }

    /// Runs SQL.
    pub async fn execute(&self, sql: &str) {
        self.sql.batch_execute(sql).await.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }

    /// One value.
    pub async fn text(&self, sql: &str) -> String {
        let row = self.sql.query_one(&format!("SELECT ({sql})::text"), &[]).await;
        row.unwrap_or_else(|e| panic!("{sql}: {e:?}")).get(0)
    }

    /// True when the condition holds in the database.
    pub async fn holds(&self, condition: &str) -> bool {
        self.text(condition).await == "true"
    }

    /// Where the slot is.
    pub async fn confirmed_flush(&self) -> String {
        let slot = &self.slot;
        let from = format!("FROM pg_replication_slots WHERE slot_name = '{slot}'");
        self.text(&format!("SELECT confirmed_flush_lsn {from}")).await
    }

    /// Waits until the relay has settled all that is committed now, and the consumer has got it.
    /// Returns everything that arrived since the beginning, fences and markers left out.
    pub async fn settled(&self) -> Vec<Message> {
        let now = self.text("pg_current_wal_insert_lsn()").await;
        self.execute(&format!("SELECT watership.emit('{FENCE}', '1', 'passed', '{{}}')")).await;
        // Of a relay that polls, the batch that it stands at shows all rows that are there.
        let passed = format!(
            "(SELECT CASE kind WHEN 'wal' THEN flush_lsn > '{now}'::pg_lsn ELSE NOT EXISTS ( \
                 SELECT FROM watership.outbox AS o, watership.poll_batch AS b \
                 WHERE b.name = c.name AND b.number = c.flush_mark \
                     AND NOT pg_visible_in_snapshot(o.xid, b.snapshot)) END \
              FROM watership.checkpoint AS c WHERE name = 'shop')"
        );
        let mut patience = Patience::new();
        while !self.holds(&passed).await {
            // A large transaction moves the row and not its flush LSN.
            let rows = "SELECT json_agg(c ORDER BY name) FROM watership.checkpoint AS c";
            let row = self.text(rows).await;
            patience.more(row, || "the relay passes what is committed".into()).await;
        }
        self.settled_now().await
    }

    /// Everything that has arrived since the beginning, fences and markers left out.
    pub async fn settled_now(&self) -> Vec<Message> {
        self.inbox.flush(&self.channel, "all").await
    }
}

/// Writes the configuration file; returns it with the port of the relay's HTTP server.
pub fn configuration(url: &str, slot: &str, vhost: &Vhost, setup: &Setup<'_>) -> (PathBuf, u16) {
    let port = dev::free_port().expect("a free port");
    let routes = match setup.routes {
        "" => String::new(),
        routes => format!(
            "{routes}\n[[route]]\nname = \"fence\"\n\
             outbox = {{ aggregate_type = \"{FENCE}\" }}\ndrop = true\n"
        ),
    };
    let url = if setup.source_url.is_empty() { url } else { setup.source_url };
    let slot = if relay::is_polling(setup.settings) {
        String::new()
    } else {
        format!("source.slot = \"{slot}\"\n")
    };
    let text = format!(
        "name = \"shop\"\nsource.url = \"{url}\"\n{slot}\
         source.tables = {tables:?}\nbroker.url = \"{broker}\"\n\
         admin.listen = \"127.0.0.1:{port}\"\nadmin.linger = \"0s\"\n\
         log.format = \"text\"\n{patience}{settings}\n{routes}\n\
         [[exchange]]\nname = \"watership\"\nkind = \"topic\"\n\
         [[queue]]\nname = \"all\"\n\
         [[binding]]\nqueue = \"all\"\nexchange = \"watership\"\nrouting_key = \"#\"\n",
        tables = setup.tables,
        broker = vhost.url,
        patience = patience(setup.settings),
        settings = setup.settings,
    );
    let path = own_file("toml");
    std::fs::write(&path, text).expect("the configuration is written");
    (path, port)
}

/// A broker on a loaded machine answers late, and most tests are not about that.
fn patience(settings: &str) -> String {
    if settings.contains("broker.connect_timeout") {
        return String::new();
    }
    format!("broker.connect_timeout = \"{}s\"\n", LIMIT.as_secs())
}

/// Runs a command of the program to its end.
pub async fn run(config: &PathBuf, arguments: &[&str]) -> Ended {
    let mut process = spawn(config, arguments);
    let status = process.wait(LIMIT).await.expect("the command ends");
    Ended { code: status.code().unwrap_or(-1), log: read(&process) }
}

fn spawn(config: &PathBuf, arguments: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_watership"));
    command.arg("--config").arg(config).args(arguments);
    Process::spawn("watership", command, &own_file("log")).expect("the program starts")
}

fn read(process: &Process) -> String {
    std::fs::read_to_string(process.log()).expect("its log is UTF-8")
}

/// How a command ended, and all that it wrote.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub log: String,
}

impl Ended {
    /// Fails, showing the log, when the exit code is another.
    pub fn expect_code(&self, code: i32) -> &Self {
        assert_eq!(self.code, code, "{}", self.log);
        self
    }

    /// Fails, showing the log, when one of the texts is missing from it.
    pub fn expect_text(&self, texts: &[&str]) -> &Self {
        for text in texts {
            assert!(self.log.contains(text), "{text:?} is missing from\n{}", self.log);
        }
        self
    }
}

/// A relay process.
pub struct Running {
    process: Process,
    config: PathBuf,
    port: u16,
}

impl Running {
    fn spawn(config: &PathBuf, port: u16) -> Self {
        Self { process: spawn(config, &["run"]), config: config.clone(), port }
    }

    /// Waits until `/readyz` says so.
    pub async fn ready(&mut self) {
        let mut patience = Patience::new();
        while self.get("/readyz").await.0 != 200 {
            assert!(self.process.ended().is_none(), "it ended:\n{}", read(&self.process));
            let what = || format!("it is ready:\n{}", dev::tail(self.process.log()));
            patience.more((), what).await;
        }
    }

    /// The port of its HTTP server.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Status code and body; 0 when nobody listens.
    pub async fn get(&self, path: &str) -> (u16, String) {
        relay::get(self.port, path).await
    }

    /// `/status`; null when nobody listens.
    pub async fn status(&self) -> Value {
        serde_json::from_str(&self.get("/status").await.1).unwrap_or(Value::Null)
    }

    /// A series of `/metrics`; absent when there is none.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let (_, text) = self.get("/metrics").await;
        let line = text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok())
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        read(&self.process)
    }

    /// Peak resident memory, in KiB.
    pub fn peak_memory_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.process.pid());
        let text = std::fs::read_to_string(path).expect("the relay runs");
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("Linux tells it");
        line.trim().trim_end_matches("kB").trim().parse().expect("a number")
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Ends it with -9.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// Waits for its end.
    pub async fn ended(mut self) -> Ended {
        let status = self.process.wait(LIMIT).await;
        let status = status.unwrap_or_else(|e| panic!("{e}\n{}", read(&self.process)));
        Ended { code: status.code().unwrap_or(-1), log: read(&self.process) }
    }

    /// Asks it to end.
    pub async fn stop(mut self) -> Ended {
        self.process.signal(Signal::Term);
        self.ended().await
    }
}
