//! A private Postgres server.
//!
//! `initdb` runs once per process and version; every server gets a copy of that template. Postgres
//! refuses to run as root: under root it runs as the user `postgres`, else as the invoking user.
//! Administration goes through the unix socket, which always trusts `postgres`, so a test may
//! set up any `pg_hba.conf` for TCP without locking this file out.

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::sync::Mutex;

use super::{INSTALL_HINT, POLL, Process, Signal, broken, clean_command, free_port, own_directory};
use super::{search_path, send, versions, wait_ready};
use crate::error::{Error, Result};

/// How long a start may take; recovery after a crash included.
const START_LIMIT: Duration = Duration::from_secs(90);
/// How long a drop, which blocks its thread, may wait for an immediate shutdown.
const DROP_LIMIT: Duration = Duration::from_secs(3);
/// Longest path of a unix socket, with some room: `sun_path` holds 108 bytes.
const SOCKET_PATH_LIMIT: usize = 100;

/// What kind of server is wanted.
#[derive(Debug, Clone, Default)]
pub struct PostgresOptions {
    /// The major version; absent means the variable WATERSHIP_PG_MAJOR, then the first one found
    /// in WATERSHIP_PG_BIN, PATH and Debian's directories (newest first).
    pub major: Option<u32>,
    /// Whether the server syncs to disk. Off is for tests: a killed server is fine, a power
    /// failure is not.
    pub fsync: bool,
    /// Further lines of postgresql.conf; a later line wins over an earlier one.
    pub conf: Vec<String>,
    /// The lines of pg_hba.conf for TCP and for users other than `postgres`; absent means trust
    /// for everybody on loopback.
    pub hba: Option<Vec<String>>,
}

/// How a server is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a checkpoint, and waits for walsenders to have sent everything.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// A running (or stopped, and startable again) private server. Stopped and removed on drop.
#[derive(Debug)]
pub struct Postgres {
    programs: Programs,
    owner: Owner,
    directory: PathBuf,
    port: u16,
    process: Option<Process>,
}

/// Where the programs are and which version they have.
#[derive(Debug, Clone)]
struct Programs {
    bin: PathBuf,
    major: u32,
}

/// The user that the server runs as.
#[derive(Debug, Clone, Copy)]
enum Owner {
    Invoker,
    Other { uid: u32, gid: u32 },
}

impl Postgres {
    /// Makes a new server with an empty cluster and waits until it answers queries.
    ///
    /// # Errors
    /// With a hint when the programs are missing; with the end of the log when it does not start.
    pub async fn start(options: PostgresOptions) -> Result<Self> {
        let programs = Programs::find(options.major)?;
        let owner = Owner::choose()?;
        let template = template(&programs, owner).await?;
        let directory = own_directory("pg")?;
        let socket = directory.join(".s.PGSQL.12345");
        if socket.as_os_str().len() > SOCKET_PATH_LIMIT {
            let text = format!("the socket path {} is too long", socket.display());
            return Err(Error::config(text).hint("set TMPDIR to a shorter directory"));
        }
        owner.give(&directory)?;
        let mut server = Self { programs, owner, directory, port: free_port()?, process: None };
        let mut copy = server.owner.command(Path::new("cp"));
        copy.arg("-R").arg(template).arg(server.data_dir());
        run(copy, "copying the template cluster").await?;
        server.configure(&options)?;
        server.start_again().await?;
        Ok(server)
    }

    fn configure(&self, options: &PostgresOptions) -> Result<()> {
        let fsync = if options.fsync { "on" } else { "off" };
        let mut conf = format!(
            "listen_addresses = '127.0.0.1'\nport = {}\nunix_socket_directories = '{}'\n\
             wal_level = logical\nmax_connections = 300\nmax_wal_senders = 100\n\
             max_replication_slots = 500\nfsync = {fsync}\nfull_page_writes = {fsync}\n\
             shared_buffers = 64MB\nmax_wal_size = 1GB\nautovacuum_naptime = 10s\n\
             dynamic_shared_memory_type = mmap\n\
             log_line_prefix = '%m [%p] %q%u@%d '\ntimezone = 'UTC'\n",
            self.port,
            self.directory.display(),
        );
        for line in &options.conf {
            conf.push_str(line);
            conf.push('\n');
        }
        let mut hba = String::from("local all postgres trust\nlocal replication postgres trust\n");
        match &options.hba {
            Some(lines) => lines.iter().for_each(|line| {
                hba.push_str(line);
                hba.push('\n');
            }),
            None => hba.push_str(
                "local all all trust\nlocal replication all trust\n\
                 host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n",
            ),
        }
        self.append("postgresql.conf", &conf)?;
        let path = self.data_dir().join("pg_hba.conf");
        fs::write(&path, hba).map_err(|e| broken("writing", &path, e))
    }

    /// Appends `text` to a file of the data directory; call [`Postgres::start_again`] after a
    /// [`Postgres::stop`] for it to count.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn append(&self, file: &str, text: &str) -> Result<()> {
        let path = self.data_dir().join(file);
        let opened = fs::OpenOptions::new().append(true).open(&path);
        opened
            .and_then(|mut f| f.write_all(text.as_bytes()))
            .map_err(|e| broken("writing", &path, e))
    }

    /// Gives `path` to the user that the server runs as (a private key has to be his).
    ///
    /// # Errors
    /// When the owner cannot be changed.
    pub fn give(&self, path: &Path) -> Result<()> {
        self.owner.give(path)
    }

    /// Starts the stopped or killed server again: same port, same data.
    ///
    /// # Errors
    /// With the end of the log when it does not come up.
    pub async fn start_again(&mut self) -> Result<()> {
        let mut command = self.owner.command(&self.programs.bin.join("postgres"));
        self.programs.add_libraries(&mut command);
        command.arg("-D").arg(self.data_dir()).current_dir(&self.directory);
        let log = self.directory.join("log");
        let mut process = Process::spawn_with_ending("Postgres", &mut command, &log, Signal::Quit)?;
        wait_ready(&mut process, START_LIMIT, async || self.execute("SELECT 1").await).await?;
        self.process = Some(process);
        Ok(())
    }

    /// Makes a standby that streams from this server, not started yet. This server is restarted,
    /// because the standby begins as a copy of its files; it has no slot of this one.
    ///
    /// # Errors
    /// When the files cannot be copied, or this server does not come back.
    pub async fn standby(&mut self, conf: &str) -> Result<Self> {
        self.execute("SELECT pg_create_physical_replication_slot('standby', true)").await?;
        self.stop(StopMode::Fast).await?;
        let directory = own_directory("pg")?;
        self.owner.give(&directory)?;
        let programs = self.programs.clone();
        let port = free_port()?;
        let standby = Self { programs, owner: self.owner, directory, port, process: None };
        let mut copy = self.owner.command(Path::new("cp"));
        copy.arg("-R").arg(self.data_dir()).arg(standby.data_dir());
        run(copy, "copying the primary").await?;
        let slot = standby.data_dir().join("pg_replslot/standby");
        fs::remove_dir_all(&slot).map_err(|e| broken("removing", &slot, e))?;
        let signal = standby.data_dir().join("standby.signal");
        fs::write(&signal, "").map_err(|e| broken("writing", &signal, e))?;
        self.owner.give(&signal)?;
        let conf = format!(
            "port = {port}\nunix_socket_directories = '{}'\nprimary_slot_name = 'standby'\n\
             primary_conninfo = 'host=127.0.0.1 port={} user=postgres dbname=postgres'\n\
             hot_standby_feedback = on\n{conf}\n",
            standby.directory.display(),
            self.port,
        );
        standby.append("postgresql.conf", &conf)?;
        self.start_again().await?;
        Ok(standby)
    }

    /// Moves the stopped server to the TCP port of another one that is gone.
    ///
    /// # Errors
    /// When its configuration cannot be written.
    pub fn move_to(&mut self, port: u16) -> Result<()> {
        self.port = port;
        self.append("postgresql.conf", &format!("port = {port}\n"))
    }

    /// Runs SQL as the superuser `postgres`, over the unix socket, in the database `postgres`.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn execute(&self, sql: &str) -> Result<()> {
        self.execute_in("postgres", sql).await
    }

    /// Like [`Postgres::execute`], in another database.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub async fn execute_in(&self, database: &str, sql: &str) -> Result<()> {
        let failed = |e| Error::unreachable(format!("private Postgres: {sql}")).caused_by(e);
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.directory).port(self.port).user("postgres").dbname(database);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.map_err(failed)?;
        let connection = tokio::spawn(connection);
        let result = client.batch_execute(sql).await.map_err(failed);
        drop(client);
        // Waits for the goodbye, so that no session lingers in the database.
        let _ = connection.await;
        result
    }

    /// Makes a new, empty database.
    ///
    /// # Errors
    /// When it exists already or the server cannot be reached.
    pub async fn create_database(&self, name: &str) -> Result<()> {
        self.execute(&format!("CREATE DATABASE \"{}\"", name.replace('"', "\"\""))).await
    }

    /// Ends the server and waits for its end.
    ///
    /// # Errors
    /// When it had to be killed because it did not end in time.
    pub async fn stop(&mut self, mode: StopMode) -> Result<()> {
        let signal = match mode {
            StopMode::Fast => Signal::Int,
            StopMode::Immediate => Signal::Quit,
        };
        self.signal(Signal::Cont);
        match self.process.take() {
            Some(mut process) => process.stop(signal).await,
            None => Ok(()),
        }
    }

    /// Kills the postmaster with -9 and, as a power cut would, all of its children with it.
    pub async fn kill(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let children = children(process.pid());
        process.kill();
        send(Signal::Kill, &children);
        // The shared memory must be free before the server can start again. A killed process
        // cannot stay; the limit only guards against our own mistake.
        for _ in 0..500 {
            if !children.iter().any(|pid| is_running(pid)) {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Sends `signal` to the postmaster and its children.
    pub fn signal(&mut self, signal: Signal) {
        if let Some(process) = &mut self.process {
            let mut targets = children(process.pid());
            process.signal(signal);
            targets.retain(|pid| is_running(pid));
            send(signal, &targets);
        }
    }

    /// `postgres://user@127.0.0.1:port/database`.
    pub fn url(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}", self.port)
    }

    /// The directory of the unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.directory
    }

    /// The TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The postmaster's process id; `None` while stopped.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::pid)
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The directory of the programs (`postgres`, `initdb`, and with Debian's also `psql`).
    pub fn bin_dir(&self) -> &Path {
        &self.programs.bin
    }

    /// The major version.
    pub fn major(&self) -> u32 {
        self.programs.major
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Asked, not killed: a killed postmaster leaves its System V shared memory behind.
        self.signal(Signal::Cont);
        self.signal(Signal::Quit);
        if let Some(mut process) = self.process.take() {
            process.wait_blocking(DROP_LIMIT);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Programs {
    fn find(wanted: Option<u32>) -> Result<Self> {
        let wanted = match wanted {
            Some(major) => Some(major),
            None => match std::env::var("WATERSHIP_PG_MAJOR") {
                Ok(text) => Some(text.parse().map_err(|e: std::num::ParseIntError| {
                    let text = format!("WATERSHIP_PG_MAJOR = {text:?} is not a number");
                    Error::config(text).caused_by(e)
                })?),
                Err(_) => None,
            },
        };
        let mut candidates = search_path("WATERSHIP_PG_BIN");
        candidates.extend(versions("/usr/lib/postgresql", "bin").into_iter().rev());
        candidates.extend(versions("/usr", "bin").into_iter().filter(|d| d.ends_with("pgsql")));
        for directory in candidates {
            // A link into the versioned directory is followed: `initdb` looks for its files
            // relative to where it really is.
            let Ok(server) = directory.join("postgres").canonicalize() else { continue };
            let Some(bin) = server.parent() else { continue };
            if !bin.join("initdb").exists() {
                continue;
            }
            let mut found = Self { bin: bin.into(), major: 0 };
            found.major = found.version()?;
            if wanted.is_none_or(|major| major == found.major) {
                return Ok(found);
            }
        }
        let which = wanted.map_or_else(String::new, |major| format!(" {major}"));
        Err(Error::config(format!("no Postgres{which} server programs found")).hint(INSTALL_HINT))
    }

    fn version(&self) -> Result<u32> {
        let program = self.bin.join("postgres");
        let mut command = clean_command(&program);
        self.add_libraries(&mut command);
        let out = command.arg("--version").output();
        let out = out.map_err(|e| broken("running", &program, e))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        // "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)"
        let number = text.split_whitespace().nth(2).unwrap_or_default();
        let major: String = number.chars().take_while(char::is_ascii_digit).collect();
        major
            .parse()
            .map_err(|_| Error::config(format!("{} --version says {text:?}", program.display())))
    }

    /// A relocated build (the npm package) has its libraries beside its programs.
    fn add_libraries(&self, command: &mut Command) {
        let libraries = self.bin.join("../lib");
        if self.bin.ends_with("native/bin") && libraries.is_dir() {
            command.env("LD_LIBRARY_PATH", libraries);
        }
    }
}

impl Owner {
    fn choose() -> Result<Self> {
        let here = Path::new("/proc/self");
        let uid = fs::metadata(here).map_err(|e| broken("reading", here, e))?.uid();
        if uid != 0 {
            return Ok(Self::Invoker);
        }
        let path = Path::new("/etc/passwd");
        let text = fs::read_to_string(path).map_err(|e| broken("reading", path, e))?;
        let ids = text.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            (name == "postgres").then_some((uid, gid))
        });
        match ids {
            Some((uid, gid)) => Ok(Self::Other { uid, gid }),
            None => Err(Error::config("Postgres refuses root, and there is no user \"postgres\"")
                .hint("useradd --system postgres, or run as another user than root")),
        }
    }

    fn command(self, program: &Path) -> Command {
        let mut command = clean_command(program);
        match self {
            Self::Invoker => {}
            Self::Other { uid, gid } => {
                command.uid(uid).gid(gid);
            }
        }
        command
    }

    fn give(self, path: &Path) -> Result<()> {
        match self {
            Self::Invoker => Ok(()),
            Self::Other { uid, gid } => chown(path, Some(uid), Some(gid))
                .map_err(|e| broken("changing the owner of", path, e)),
        }
    }
}

/// The initialised cluster that every server of this process and these programs is a copy of.
async fn template(programs: &Programs, owner: Owner) -> Result<PathBuf> {
    static TEMPLATES: Mutex<Option<HashMap<PathBuf, PathBuf>>> = Mutex::const_new(None);
    let mut templates = TEMPLATES.lock().await;
    let templates = templates.get_or_insert_default();
    if let Some(path) = templates.get(&programs.bin) {
        return Ok(path.clone());
    }
    let directory = own_directory("template")?;
    owner.give(&directory)?;
    let data = directory.join("data");
    let mut initdb = owner.command(&programs.bin.join("initdb"));
    programs.add_libraries(&mut initdb);
    initdb.current_dir(&directory).arg("-D").arg(&data);
    initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"]);
    run(initdb, "initdb").await?;
    templates.insert(programs.bin.clone(), data.clone());
    Ok(data)
}

/// Runs a short-lived command; others go on meanwhile (RabbitMQ starts beside `initdb`).
async fn run(command: Command, what: &str) -> Result<()> {
    let mut command = tokio::process::Command::from(command);
    let out = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let out = out.map_err(|e| Error::config(format!("starting {what}")).caused_by(e))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(Error::config(format!("{what} failed with {}: {}", out.status, said.trim())))
}

/// The process ids of the children of `parent`, from /proc.
fn children(parent: u32) -> Vec<String> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|pid| stat(pid).is_some_and(|(_, ppid)| ppid == parent)).collect()
}

fn is_running(pid: &str) -> bool {
    stat(pid).is_some_and(|(state, _)| state != 'Z')
}

/// State and parent of a process. <https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html>
fn stat(pid: &str) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the fields after the last ")" are plain.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
