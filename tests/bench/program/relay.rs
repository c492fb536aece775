//! The real relay as its own process: configuration, start, metrics, end.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use watership::dev::{self, Process, Signal};
use watership::error::{Error, Result};

use crate::servers::{EXCHANGE, Servers};

/// How long the relay may take to be ready, or to end after SIGTERM.
const LIMIT: Duration = Duration::from_secs(30);

/// How long to wait for a metric, and how often to look at it.
const METRIC_LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(20);

/// A database with its own slot, publication and configuration file.
pub struct Installation {
    pub name: String,
    config: PathBuf,
    log: PathBuf,
    port: u16,
}

/// A running relay. Killed on drop.
pub struct Relay {
    pub process: Process,
    pub spawned: Instant,
    log: PathBuf,
    port: u16,
}

impl Installation {
    /// Makes the database and runs `watership init`, which makes slot and publication. `broker`
    /// are further keys of the configuration's table of that name.
    pub async fn create(servers: &Servers, name: &str, broker: &str) -> Result<Self> {
        Self::with_routes(servers, name, broker, &route_of_all()).await
    }

    /// The same with routes of one's own.
    pub async fn with_routes(
        servers: &Servers,
        name: &str,
        broker: &str,
        routes: &str,
    ) -> Result<Self> {
        servers.postgres.create_database(name).await?;
        Self::configured(servers, name, &slot(name, &[]), broker, routes).await
    }

    /// The same in a database with captured tables, which `sql` makes.
    pub async fn with_tables(
        servers: &Servers,
        name: &str,
        sql: &str,
        tables: &[&str],
        routes: &str,
    ) -> Result<Self> {
        servers.postgres.create_database(name).await?;
        servers.postgres.execute_in(name, sql).await?;
        Self::configured(servers, name, &slot(name, tables), "", routes).await
    }

    /// Of a relay that polls.
    pub async fn polling(servers: &Servers, name: &str) -> Result<Self> {
        servers.postgres.create_database(name).await?;
        Self::configured(servers, name, "mode = \"poll\"", "", &route_of_all()).await
    }

    async fn configured(
        servers: &Servers,
        name: &str,
        source: &str,
        broker: &str,
        routes: &str,
    ) -> Result<Self> {
        let folder = dev::home()?;
        let port = free_port()?;
        let config = folder.join(format!("{name}.toml"));
        let log = folder.join(format!("{name}.log"));
        let text = format!(
            "name = \"{name}\"\n\
             [source]\nurl = \"{}\"\n{source}\n\
             [broker]\nurl = \"{}\"\ntopology = \"verify\"\n{broker}\n\
             [admin]\nlisten = \"127.0.0.1:{port}\"\n\
             [[exchange]]\nname = \"{EXCHANGE}\"\nkind = \"{}\"\n{routes}",
            servers.postgres.url("postgres", name),
            servers.rabbit.url("/"),
            servers.routing.name(),
        );
        fs::write(&config, text)
            // It holds the password of the private broker; the relay warns when others can read it.
            .and_then(|()| fs::set_permissions(&config, fs::Permissions::from_mode(0o600)))
            .map_err(|e| Error::config(format!("writing {}", config.display())).caused_by(e))?;
        let installation = Self { name: name.to_owned(), config, log, port };
        installation.finish("init", installation.command(&["init"])?).await?;
        Ok(installation)
    }

    /// Runs a command that ends by itself.
    async fn finish(&self, what: &str, command: Command) -> Result<()> {
        let mut command = tokio::process::Command::from(command);
        let output = tokio::time::timeout(LIMIT, command.kill_on_drop(true).output()).await;
        let output = output
            .map_err(|_| Error::unreachable(format!("watership {what} takes too long")))?
            .map_err(|e| Error::config(format!("running watership {what}")).caused_by(e))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::refused(format!("watership {what}: {}: {said}", output.status)))
    }

    /// Uses another port of the broker from the next start on.
    pub fn use_broker(&self, servers: &Servers, port: u16) -> Result<()> {
        self.replace(&format!(":{}/", servers.rabbit.port()), |_| format!(":{port}/"))
    }

    /// Reads the broker's password from a file, as this user, from the next start on.
    pub fn use_password_file(&self, servers: &Servers, user: &str) -> Result<PathBuf> {
        let password = self.config.with_extension("password");
        let theirs = format!("//{user}:${{file:{}}}@", password.display());
        self.replace(&servers.rabbit.url("/"), |url| url.replace("//guest:guest@", &theirs))?;
        Ok(password)
    }

    fn replace(&self, part: &str, by: impl FnOnce(&str) -> String) -> Result<()> {
        let failed = |e| Error::config(format!("writing {}", self.config.display())).caused_by(e);
        let text = fs::read_to_string(&self.config).map_err(failed)?;
        fs::write(&self.config, text.replace(part, &by(part))).map_err(failed)
    }

    /// Marks all parked rows to be tried again, as an operator does.
    pub async fn retry_all(&self) -> Result<()> {
        self.finish("parked retry", self.command(&["parked", "retry", "--all"])?).await
    }

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(Servers::built("watership")?);
        command.arg("--config").arg(&self.config).args(words);
        Ok(command)
    }

    /// Starts `watership run`.
    pub fn start(&self) -> Result<Relay> {
        let command = self.command(&["run"])?;
        let spawned = Instant::now();
        let process = Process::spawn("the relay", command, &self.log)?;
        Ok(Relay { process, spawned, log: self.log.clone(), port: self.port })
    }
}

impl Relay {
    /// Another program that relays; it has no metrics of ours.
    pub fn other(process: Process, log: PathBuf) -> Self {
        Self { process, spawned: Instant::now(), log, port: 0 }
    }

    /// Waits until it says that it streams and has the broker; how long that took.
    pub async fn ready(&mut self) -> Result<Duration> {
        let deadline = Instant::now() + LIMIT;
        loop {
            if self.get("/readyz").await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                return Ok(self.spawned.elapsed());
            }
            self.alive()?;
            if Instant::now() > deadline {
                return Err(Error::unreachable(format!("the relay is not ready\n{}", self.tail())));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// An error with its log when it has ended.
    pub fn alive(&mut self) -> Result<()> {
        match self.process.ended() {
            None => Ok(()),
            Some(status) => {
                Err(Error::unreachable(format!("the relay ended with {status}\n{}", self.tail())))
            }
        }
    }

    /// The sum of a metric over all labels; 0 while the relay does not answer yet.
    pub async fn metric(&self, name: &str) -> f64 {
        self.metric_of(name, "").await
    }

    /// The sum of a metric over the series that have this label, as `name="value"`.
    pub async fn metric_of(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").await.unwrap_or_default();
        let series = text.lines().filter(|line| {
            let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']));
            rest.is_some_and(|rest| rest.contains(label))
        });
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until the sum of a metric is as wanted.
    pub async fn until(&self, name: &str, wanted: impl Fn(f64) -> bool) -> Result<()> {
        let deadline = Instant::now() + METRIC_LIMIT;
        loop {
            let value = self.metric(name).await;
            if wanted(value) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let text = format!("{name} stays at {value}\n{}", self.tail());
                return Err(Error::protocol(text));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks it to end, and waits.
    pub async fn stop(mut self) -> Result<()> {
        self.process.signal(Signal::Term);
        self.process.wait(LIMIT).await.map(drop)
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    async fn get(&self, path: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }
}

fn route_of_all() -> String {
    format!(
        "[[route]]\nname = \"bench\"\noutbox = {{ aggregate_type = \"*\" }}\n\
         exchange = \"{EXCHANGE}\"\n"
    )
}

/// Keys of `[source]`: the slot and the publication of this name, and what is captured.
fn slot(name: &str, tables: &[&str]) -> String {
    format!("tables = {tables:?}\nslot = \"{name}\"\npublication = \"{name}\"")
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
    Ok(listener.map_err(|e| Error::unreachable("finding a free port").caused_by(e))?.port())
}
