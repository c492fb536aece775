//! `watership status`: the state of the relay, from the database and, if it runs, from its
//! `/status`, which `relay/status` makes and which is only printed here.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::printable::one_line;
use super::{End, Out, ask, print_error};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::slot::{SlotState, WalStatus, read_slot};
use crate::relay::checkpoint::{self, Checkpoint};
use crate::relay::session::{facts, poll, wal};
use crate::relay::status::{Concern, Severity};
use crate::source::SourceKind;

/// Options of `status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  \
    watership --config shop.toml status\n  \
    watership --config shop.toml status --alive    # a container's health check\n  \
    watership --config shop.toml status --ready --standby-ok    # the gate of a rolling update\n\n\
    Exit codes: 0 everything is flowing, or this is a standby; 1 something is wrong, and it is \
    printed; 3 a verdict.\n\
    --alive and --ready exit with 0 or 1, print only errors, and use just name and [admin] from \
    the configuration file.")]
pub(super) struct Args {
    /// Only ask /livez: the process works, whatever state its servers are in.
    #[arg(long, conflicts_with = "ready")]
    alive: bool,
    /// Only ask /readyz: it streams.
    #[arg(long)]
    ready: bool,
    /// With --ready: a standby, which waits for another relay to end, counts as ready.
    #[arg(long, requires = "ready")]
    standby_ok: bool,
}

impl Args {
    pub(super) fn is_probe(&self) -> bool {
        self.alive || self.ready
    }
}

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report {
    name: String,
    /// Everything that is wrong, of the relay and in the database.
    problems: Vec<Concern>,
    checkpoint: Option<CheckpointStatus>,
    slot: Option<Slot>,
    /// The running relay's /status; absent when it cannot be reached.
    relay: Option<Value>,
    /// Why it cannot be reached.
    relay_error: Option<String>,
}

#[derive(Serialize)]
struct CheckpointStatus {
    position: String,
    /// Of a relay that reads the WAL.
    flush_lsn: Option<String>,
    /// Of a relay that polls: the last batch that is settled.
    batch: Option<u64>,
    session_no: i64,
    publication: Option<String>,
}

#[derive(Serialize)]
struct Slot {
    name: String,
    active_pid: Option<i32>,
    confirmed_flush_lsn: Option<String>,
    wal_status: Option<&'static str>,
    lag_bytes: u64,
    retained_bytes: u64,
    safe_wal_size: Option<i64>,
}

pub(super) async fn execute(config: &Config, out: Out) -> Result<End> {
    let mut problems = Vec::new();
    let (relay, relay_error) = match config.admin.listen {
        None => (None, None),
        Some(address) => match ask::status(&config.relay.name, address).await {
            Ok(relay) => (Some(relay), None),
            Err(error) => {
                problems.push(Concern::new(
                    format!("cannot query the relay: {error}"),
                    error.hint_text().unwrap_or("start it with `watership run`"),
                ));
                (None, Some(error.to_string()))
            }
        },
    };
    problems.extend(relay.iter().flat_map(ask::problems));
    let (row, slot) = match stored(config, relay.is_none()).await {
        Ok(Stored { row, slot, verdicts }) => {
            if verdicts.is_empty() {
                problems.extend(missing(config, row.as_ref(), slot.as_ref()));
            }
            problems.extend(verdicts);
            (row, slot)
        }
        Err(error) => {
            let what = format!("cannot query the database: {error}");
            problems.push(Concern::new(what, error.hint_or_kind()));
            (None, None)
        }
    };
    let report = Report {
        name: config.relay.name.clone(),
        problems,
        checkpoint: row.as_ref().map(CheckpointStatus::from),
        slot: slot.as_ref().map(Slot::from),
        relay,
        relay_error,
    };
    table(&report, out);
    out.data(&report)?;
    Ok(match report.problems.iter().map(|problem| problem.level).max() {
        None | Some(Severity::Warning) => End::Fine,
        Some(Severity::Problem) => End::Failed,
        Some(Severity::Verdict) => End::NeedsDecision,
    })
}

/// What the database knows of the relay.
struct Stored {
    row: Option<Checkpoint>,
    slot: Option<SlotState>,
    /// With which the relay would end.
    verdicts: Vec<Concern>,
}

/// `judged`: nobody runs who would say that it cannot go on.
async fn stored(config: &Config, judged: bool) -> Result<Stored> {
    let options = &config.relay;
    let SqlConnection { client, closed: _closed } = sql(&options.sql).await?;
    let row = checkpoint::read(&client, &options.name).await?;
    let slot = match options.kind {
        SourceKind::Wal => read_slot(&client, &options.slot).await?,
        SourceKind::Poll => None,
    };
    let is_own = row.as_ref().is_some_and(|row| match options.kind {
        SourceKind::Wal => row.kind == options.kind && row.slot == options.slot,
        SourceKind::Poll => row.kind == options.kind,
    });
    let doubts = match options.kind {
        _ if !judged || !is_own => Vec::new(),
        SourceKind::Wal => {
            let found = facts::read(&client, options).await?;
            let history = wal::ancestors_for(&options.sql, &found).await?;
            found.doubts(options, &history)
        }
        SourceKind::Poll => {
            let found = poll::read(&client, options).await?;
            found.verify().err().into_iter().collect()
        }
    };
    let verdicts = doubts.iter().filter(|doubt| doubt.kind().is_verdict()).map(|doubt| Concern {
        level: Severity::Verdict,
        what: doubt.to_string(),
        hint: doubt.hint_or_kind().into(),
    });
    Ok(Stored { row, slot, verdicts: verdicts.collect() })
}

fn missing(config: &Config, row: Option<&Checkpoint>, slot: Option<&SlotState>) -> Vec<Concern> {
    let mut found = Vec::new();
    let name = &config.relay.slot;
    match slot.map(|slot| slot.wal_status) {
        None if config.relay.kind == SourceKind::Poll => {}
        None => {
            let hint = "run `watership check`, which says what to do next";
            found.push(Concern::new(format!("slot {name:?} does not exist"), hint));
        }
        Some(Some(WalStatus::Lost)) => found.push(Concern {
            level: Severity::Verdict,
            what: format!("slot {name:?} is lost: Postgres has removed WAL that it needs"),
            hint: "`watership resync` says what can be done".into(),
        }),
        Some(_) => {}
    }
    if row.is_none() {
        let what = format!("relay {:?} has no checkpoint", config.relay.name);
        found.push(Concern::new(what, "run `watership init`"));
    }
    found
}

/// One question to the running relay, for a health check, which runs every few seconds: no
/// database, no secrets, no warnings. A container's health check knows only the codes 0 and 1.
pub(super) async fn probe(path: &Path, args: &Args) -> End {
    match ask_probe(path, args).await {
        Ok(()) => End::Fine,
        Err(error) => {
            print_error(&error);
            End::Failed
        }
    }
}

async fn ask_probe(path: &Path, args: &Args) -> Result<()> {
    let (name, admin) = Config::load_admin(path)?;
    let address = admin.listen.ok_or_else(|| {
        Error::config("admin.listen is empty, so the relay cannot be queried")
            .hint("set admin.listen")
    })?;
    let (path, what) = match (args.alive, args.standby_ok) {
        (true, _) => ("/livez", "alive"),
        (false, true) => ("/readyz?standby=ok", "ready"),
        (false, false) => ("/readyz", "ready"),
    };
    // Another relay that has this port says nothing about ours.
    ask::status(&name, address).await?;
    let (code, body) = ask::get(address, path).await?;
    if code == 200 {
        return Ok(());
    }
    Err(Error::unreachable(format!("not {what}: {}", body.trim())))
}

impl From<&Checkpoint> for CheckpointStatus {
    fn from(row: &Checkpoint) -> Self {
        let is_wal = row.kind == SourceKind::Wal;
        Self {
            position: row.position.to_string(),
            flush_lsn: is_wal.then(|| row.flush_lsn.to_string()),
            batch: (!is_wal).then(|| row.flush().0),
            session_no: row.session_no,
            publication: is_wal.then(|| row.publication.clone()),
        }
    }
}

impl From<&SlotState> for Slot {
    fn from(slot: &SlotState) -> Self {
        Self {
            name: slot.name.clone(),
            active_pid: slot.active_pid,
            confirmed_flush_lsn: slot.confirmed_flush_lsn.map(|lsn| lsn.to_string()),
            wal_status: slot.wal_status.map(WalStatus::as_str),
            lag_bytes: slot.lag_bytes,
            retained_bytes: slot.retained_bytes,
            safe_wal_size: slot.safe_wal_size,
        }
    }
}

fn table(report: &Report, out: Out) {
    let line = |name: &str, value: &str| out.line(&format!("{name:<14} {}", one_line(value)));
    line("relay", &report.name);
    match (&report.relay, &report.relay_error) {
        (Some(relay), _) => relay_lines(relay, line),
        (None, Some(why)) => line("state", &format!("not running: {why}")),
        (None, None) => line("state", "unknown: admin.listen is empty"),
    }
    if let Some(row) = &report.checkpoint {
        line("checkpoint", &row.position);
        if let Some(lsn) = &row.flush_lsn {
            line("flush LSN", lsn);
        }
        if let Some(batch) = row.batch {
            line("batch", &batch.to_string());
        }
        line("session no", &row.session_no.to_string());
    }
    if let Some(slot) = &report.slot {
        let pid = slot.active_pid;
        let reader = pid.map_or("not in use".into(), |pid| format!("in use by pid {pid}"));
        line("slot", &format!("{}, {reader}", slot.name));
        line("wal status", slot.wal_status.unwrap_or("none"));
        line("lag", &format!("{} bytes", slot.lag_bytes));
        line("retained WAL", &format!("{} bytes", slot.retained_bytes));
        if let Some(bytes) = slot.safe_wal_size {
            line("safe WAL size", &format!("{bytes} bytes"));
        }
    }
    for problem in &report.problems {
        let (word, colour) = match problem.level {
            Severity::Warning => ("warning", 33),
            Severity::Problem => ("problem", 31),
            Severity::Verdict => ("verdict", 31),
        };
        out.marked(colour, &format!("{word:<14}"), &format!(" {}", one_line(&problem.what)));
        out.line(&format!("{:<14} -> {}", "", one_line(&problem.hint)));
    }
    if report.problems.is_empty() {
        line("problems", "none");
    }
}

fn relay_lines(relay: &Value, line: impl Fn(&str, &str)) {
    let seconds = relay["state_seconds"].as_f64().unwrap_or_default();
    line("state", &format!("{} for {seconds:.0} s", text(&relay["state"])));
    line("in flight", &text(&relay["in_flight"]));
    line("window", &format!("{} events", text(&relay["window_events"])));
    line("sessions", &text(&relay["sessions"]));
    if let Some(ms) = relay["circuit"]["next_try_ms"].as_u64() {
        let tries = text(&relay["circuit"]["tries"]);
        line("next try", &format!("in {ms} ms, after {tries} failed tries"));
    }
    if let Some(because) = relay["standing_by"]["because"].as_str() {
        line("waits for", because);
    }
    if let Some(owner) = relay["standing_by"]["lock_owner"].as_str() {
        line("lock held for", owner);
    }
    if let Some(doubt) = relay["standing_by"]["doubt"].as_str() {
        line("doubt", doubt);
    }
    if let Some(pid) = relay["standing_by"]["slot_holder"]["pid"].as_i64() {
        let client = relay["standing_by"]["slot_holder"]["client"].as_str();
        let client = client.unwrap_or("a local client");
        line("slot used by", &format!("pid {pid}, {client}"));
    }
    if let Some(seconds) = relay["canary_age_seconds"].as_f64() {
        line("canary", &format!("the newest that came is {seconds:.0} s old"));
    }
    if let Some(seconds) = relay["poll"]["backlog_age_seconds"].as_f64() {
        line("backlog", &format!("its oldest batch was found {seconds:.0} s ago"));
    }
    for route in relay["routes"].as_array().into_iter().flatten() {
        let grade = text(&route["grade"]).to_uppercase().replace('_', " ");
        let (name, reason) = (text(&route["name"]), text(&route["reason"]));
        line("route", &format!("{name} is {grade} ({reason})"));
    }
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
