//! A private RabbitMQ node.
//!
//! The node has its own name, directories, cookie, ports and its own `epmd` (the port mapper that
//! Erlang nodes find each other by), so it neither sees nor is seen by another node of the
//! machine. Everything listens on loopback only. The server's own script is called, not the
//! wrapper in /usr/sbin, which would switch to the user `rabbitmq` and read another cookie.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{INSTALL_HINT, Process, Signal, broken, clean_command, free_port, own_directory};
use super::{search_path, versions, wait_ready};
use crate::error::{Error, Result};

/// How long a start may take: 7 s on two idle cores, several times that on busy ones.
const START_LIMIT: Duration = Duration::from_secs(150);
/// How long one management request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);
/// `guest:guest`, for HTTP Basic authentication.
const CREDENTIALS: &str = "Z3Vlc3Q6Z3Vlc3Q=";

/// What kind of node is wanted.
#[derive(Debug, Clone, Default)]
pub struct RabbitOptions {
    /// Whether the management plugin runs: its HTTP API makes vhosts quickly and answers
    /// questions about queues, at the price of some memory and statistics.
    pub management: bool,
    /// Further lines of rabbitmq.conf. A key may stand only once with one value that counts: the
    /// last.
    pub conf: Vec<String>,
}

/// A running (or stopped, and startable again) private node. Killed and removed on drop.
#[derive(Debug)]
pub struct Rabbit {
    scripts: PathBuf,
    directory: PathBuf,
    node: String,
    port: u16,
    management: Option<u16>,
    epmd_port: u16,
    dist_port: u16,
    epmd: Process,
    process: Option<Process>,
}

impl Rabbit {
    /// Makes a new, empty node and waits until it speaks AMQP (and HTTP, with management).
    ///
    /// # Errors
    /// With a hint when the programs are missing; with the end of the log when it does not start.
    pub async fn start(options: RabbitOptions) -> Result<Self> {
        let scripts = find_scripts()?;
        let directory = own_directory("rabbit")?;
        for below in ["home", "data", "log"] {
            let path = directory.join(below);
            fs::create_dir(&path).map_err(|e| broken("making", &path, e))?;
        }
        let epmd_port = free_port()?;
        let mut epmd = clean_command(&find_epmd()?);
        epmd.args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"]);
        let epmd = Process::spawn("epmd", epmd, &directory.join("log/epmd"))?;
        let number = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut node = Self {
            scripts,
            node: format!("watership-{}-{number}@localhost", std::process::id()),
            directory,
            port: free_port()?,
            management: if options.management { Some(free_port()?) } else { None },
            epmd_port,
            dist_port: free_port()?,
            epmd,
            process: None,
        };
        node.configure(&options)?;
        node.start_again().await?;
        Ok(node)
    }

    fn configure(&self, options: &RabbitOptions) -> Result<()> {
        // The alarms are for a whole machine's broker; here they would only fire by accident.
        let mut conf = format!(
            "listeners.tcp.1 = 127.0.0.1:{}\ndisk_free_limit.absolute = 50MB\n\
             vm_memory_high_watermark.absolute = 2GB\nlog.console.level = warning\n",
            self.port
        );
        if let Some(port) = self.management {
            conf.push_str(&format!(
                "management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n"
            ));
        }
        for line in &options.conf {
            conf.push_str(line);
            conf.push('\n');
        }
        let plugins = match self.management {
            Some(_) => "[rabbitmq_management].\n",
            None => "[].\n",
        };
        for (name, text) in [("rabbitmq.conf", conf.as_str()), ("enabled_plugins", plugins)] {
            let path = self.directory.join(name);
            fs::write(&path, text).map_err(|e| broken("writing", &path, e))?;
        }
        Ok(())
    }

    /// A script of the server with the environment that makes the node private.
    /// <https://www.rabbitmq.com/docs/configure#supported-environment-variables>
    fn command(&self, script: &str) -> Command {
        let mut command = clean_command(&self.scripts.join(script));
        let inside = |name: &str| self.directory.join(name);
        command
            .current_dir(&self.directory)
            .env("HOME", inside("home"))
            .env("RABBITMQ_NODENAME", &self.node)
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env("RABBITMQ_CONFIG_FILE", inside("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", inside("advanced.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", inside("enabled_plugins"))
            .env("RABBITMQ_MNESIA_BASE", inside("data"))
            .env("RABBITMQ_LOG_BASE", inside("log"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_PID_FILE", inside("pid"))
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1");
        command
    }

    /// Starts the stopped or killed node again: same ports, same data.
    ///
    /// # Errors
    /// With the end of the log when it does not come up.
    pub async fn start_again(&mut self) -> Result<()> {
        let mut command = self.command("rabbitmq-server");
        // With a notify socket the script becomes the server instead of watching over it: the
        // process we hold is then the server itself. Nobody listens on that socket.
        command.env("NOTIFY_SOCKET", self.directory.join("nobody")).env(
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
            "-kernel inet_dist_use_interface {127,0,0,1}",
        );
        let log = self.directory.join("log/server");
        let mut process = Process::spawn("RabbitMQ", command, &log)?;
        wait_ready(&mut process, START_LIMIT, async || self.answer().await).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Whether the node answers: the greeting of AMQP, and an HTTP request with management.
    async fn answer(&self) -> Result<()> {
        let failed = |e: std::io::Error| Error::unreachable("private RabbitMQ").caused_by(e);
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.map_err(failed)?;
        stream.write_all(b"AMQP\x00\x00\x09\x01").await.map_err(failed)?;
        let mut kind = [0; 1];
        stream.read_exact(&mut kind).await.map_err(failed)?;
        if kind != [1] {
            let text =
                format!("private RabbitMQ greets with byte {}, a method frame is 1", kind[0]);
            return Err(Error::protocol(text));
        }
        match self.management {
            Some(_) => self.management("GET", "/api/overview", "").await.map(drop),
            None => Ok(()),
        }
    }

    /// A request to the management API as `guest`, for example `("GET", "/api/queues/v/q", "")`.
    /// Returns the body of the answer.
    ///
    /// # Errors
    /// Without the plugin, without an answer, or with a status of 300 and above.
    pub async fn management(&self, method: &str, path: &str, body: &str) -> Result<String> {
        let Some(port) = self.management else {
            return Err(Error::config("this private RabbitMQ runs without management")
                .hint("start it with RabbitOptions { management: true, .. }"));
        };
        let what = format!("management {method} {path}");
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n\
             authorization: Basic {CREDENTIALS}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        let exchange = async {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
            stream.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            std::io::Result::Ok(answer)
        };
        let answer = match tokio::time::timeout(REQUEST_LIMIT, exchange).await {
            Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            Ok(Err(e)) => return Err(Error::unreachable(what).caused_by(e)),
            Err(_) => return Err(Error::unreachable(format!("{what}: no answer"))),
        };
        let status: u16 =
            answer.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or_default();
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        match status {
            200..=299 => Ok(body.into()),
            _ => Err(Error::refused(format!("{what}: status {status}: {body}"))),
        }
    }

    /// Makes a new vhost in which `guest` may do everything.
    ///
    /// # Errors
    /// When the node cannot be reached or refuses.
    pub async fn create_vhost(&self, name: &str) -> Result<()> {
        if self.management.is_some() {
            let vhost = utf8_percent_encode(name, NON_ALPHANUMERIC);
            self.management("PUT", &format!("/api/vhosts/{vhost}"), "").await?;
            let all = r#"{"configure":".*","write":".*","read":".*"}"#;
            self.management("PUT", &format!("/api/permissions/{vhost}/guest"), all).await?;
            return Ok(());
        }
        self.ctl(&["add_vhost", name]).await?;
        self.ctl(&["set_permissions", "-p", name, "guest", ".*", ".*", ".*"]).await?;
        Ok(())
    }

    /// Runs `rabbitmqctl` on this node and returns what it prints. Takes one to two seconds.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub async fn ctl(&self, arguments: &[&str]) -> Result<String> {
        let what = format!("rabbitmqctl {}", arguments.join(" "));
        let mut command = tokio::process::Command::from(self.command("rabbitmqctl"));
        let out = command.arg("--quiet").args(arguments).kill_on_drop(true).output().await;
        let out = out.map_err(|e| Error::config(format!("starting {what}")).caused_by(e))?;
        if out.status.success() {
            return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&out.stderr);
        Err(Error::refused(format!("{what} failed with {}: {}", out.status, said.trim())))
    }

    /// Ends the node in an orderly way and waits for its end.
    ///
    /// # Errors
    /// When it had to be killed because it did not end in time.
    pub async fn stop(&mut self) -> Result<()> {
        match self.process.take() {
            Some(mut process) => process.stop(Signal::Term).await,
            None => Ok(()),
        }
    }

    /// Kills the node with -9.
    pub async fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Sends `signal` to the node.
    pub fn signal(&mut self, signal: Signal) {
        if let Some(process) = &mut self.process {
            process.signal(signal);
        }
    }

    /// `amqp://guest:guest@127.0.0.1:port/vhost`, the vhost percent-encoded.
    pub fn url(&self, vhost: &str) -> String {
        let vhost = utf8_percent_encode(vhost, NON_ALPHANUMERIC);
        format!("amqp://guest:guest@127.0.0.1:{}/{vhost}", self.port)
    }

    /// `http://guest:guest@127.0.0.1:port`; `None` without management.
    pub fn management_url(&self) -> Option<String> {
        self.management.map(|port| format!("http://guest:guest@127.0.0.1:{port}"))
    }

    /// The TCP port of AMQP on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The process id of the server; `None` while stopped.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The process id of the node's own port mapper.
    pub fn epmd_pid(&self) -> u32 {
        self.epmd.pid()
    }
}

impl Drop for Rabbit {
    fn drop(&mut self) {
        // Both processes are killed when dropped; the node has to go before its directory.
        drop(self.process.take());
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn find_scripts() -> Result<PathBuf> {
    let mut candidates = search_path("WATERSHIP_RABBITMQ_BIN");
    candidates.push("/usr/lib/rabbitmq/bin".into());
    candidates.extend(versions("/usr/lib/rabbitmq/lib", "sbin").into_iter().rev());
    candidates.push("/opt/rabbitmq/sbin".into());
    // The directory of the wrappers has no `rabbitmq-env`.
    let real = |d: &PathBuf| d.join("rabbitmq-server").exists() && d.join("rabbitmq-env").exists();
    candidates
        .into_iter()
        .find(real)
        .ok_or_else(|| Error::config("no RabbitMQ server programs found").hint(INSTALL_HINT))
}

fn find_epmd() -> Result<PathBuf> {
    let mut candidates = search_path("PATH");
    candidates.push("/usr/lib/erlang/bin".into());
    candidates.extend(versions("/usr/lib/erlang", "bin").into_iter().rev());
    candidates.push("/opt/erlang/lib/erlang/bin".into());
    let found = candidates.iter().map(|d| d.join("epmd")).find(|path: &PathBuf| is_file(path));
    found.ok_or_else(|| Error::config("no Erlang port mapper (epmd) found").hint(INSTALL_HINT))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}
