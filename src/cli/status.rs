//! `watership status`: the state of the relay, from the database and, if it runs, from its
//! `/status`, which `relay/status` makes and which is only printed here.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{End, Out};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::pg::client::{SqlConnection, sql};
use crate::pg::slot::{SlotState, WalStatus, read_slot};
use crate::relay::checkpoint::{self, Checkpoint};

/// Options of `status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  watership --config shop.toml status\n  \
    watership --config shop.toml status --ready    # a container's health check\n\n\
    Exit codes: 0 fine; 1 not running, not ready, or no slot or checkpoint; 3 the slot is lost.")]
pub(super) struct Args {
    /// Only ask /readyz; print nothing unless it is an error.
    #[arg(long)]
    pub(super) ready: bool,
}

/// Bounds a request to the relay's own HTTP port.
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of the relay's answer, in bytes.
const HTTP_MAX: u64 = 1 << 20;

/// What is printed with `--json`.
#[derive(Serialize)]
struct Report {
    name: String,
    checkpoint: Option<CheckpointStatus>,
    slot: Option<Slot>,
    /// The running relay's /status; absent when it cannot be reached.
    relay: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct CheckpointStatus {
    position: String,
    flush_lsn: String,
    session_no: i64,
    publication: String,
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
    let SqlConnection { client, closed: _closed } = sql(&config.relay.sql).await?;
    let row = checkpoint::read(&client, &config.relay.name).await?;
    let slot = read_slot(&client, &config.relay.slot).await?;
    let answer = match config.admin.listen {
        Some(address) => own_status(config, address).await.map(Some),
        None => Ok(None),
    };
    let mut end = end(row.as_ref(), slot.as_ref());
    if answer.is_err() && matches!(end, End::Fine) {
        end = End::Failed;
    }
    let (relay, silence) = match answer {
        Ok(relay) => (relay, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let report = Report {
        name: config.relay.name.clone(),
        checkpoint: row.as_ref().map(CheckpointStatus::from),
        slot: slot.as_ref().map(Slot::from),
        relay,
    };
    table(config, &report, silence, out);
    out.data(&report)?;
    Ok(end)
}

fn end(row: Option<&Checkpoint>, slot: Option<&SlotState>) -> End {
    match (row, slot) {
        (Some(_), Some(slot)) if slot.wal_status == Some(WalStatus::Lost) => End::NeedsDecision,
        (Some(_), Some(_)) => End::Fine,
        (None, _) | (_, None) => End::Failed,
    }
}

/// The /status of this relay; an error if another relay uses the port.
async fn own_status(config: &Config, address: SocketAddr) -> Result<serde_json::Value> {
    let (_, body) = get(address, "/status").await?;
    let status: serde_json::Value = serde_json::from_str(&body).map_err(|e| {
        Error::protocol(format!("the answer from {address} is not a relay's /status")).caused_by(e)
    })?;
    let (name, own) = (text(&status["name"]), &config.relay.name);
    if name == *own {
        return Ok(status);
    }
    let what = format!("the relay at {address} is {name:?}, not {own:?}");
    Err(Error::config(what).hint("give each relay on this machine its own admin.listen"))
}

/// Exit code 0 when this relay is ready.
///
/// # Errors
/// When there is no answer, another relay answers, or this one is not ready.
pub(super) async fn ready(config: &Config) -> Result<End> {
    let address = config.admin.listen.ok_or_else(|| {
        Error::config("admin.listen is empty, so there is no /readyz").hint("set admin.listen")
    })?;
    own_status(config, address).await?;
    let (code, body) = get(address, "/readyz").await?;
    if code == 200 {
        return Ok(End::Fine);
    }
    Err(Error::unreachable(format!("not ready: {}", body.trim())))
}

/// A GET over HTTP/1.0: status code and body.
async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let unspecified = address.ip().is_unspecified();
    let host =
        if unspecified { SocketAddr::new([127, 0, 0, 1].into(), address.port()) } else { address };
    let request = async {
        let mut socket = TcpStream::connect(host).await?;
        socket.write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
        let mut response = String::new();
        socket.take(HTTP_MAX).read_to_string(&mut response).await?;
        Ok::<_, std::io::Error>(response)
    };
    let what = || format!("the relay at http://{host}{path}");
    let response = timeout(HTTP_TIMEOUT, request)
        .await
        .map_err(|_| Error::unreachable(format!("{} does not answer", what())))?
        .map_err(|e| Error::unreachable(format!("{} cannot be reached: {e}", what())))?;
    let (head, body) = response.split_once("\r\n\r\n").unwrap_or((&response, ""));
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let code = code.ok_or_else(|| Error::protocol(format!("{} is not HTTP", what())))?;
    Ok((code, body.to_owned()))
}

impl From<&Checkpoint> for CheckpointStatus {
    fn from(row: &Checkpoint) -> Self {
        Self {
            position: row.position.to_string(),
            flush_lsn: row.flush_lsn.to_string(),
            session_no: row.session_no,
            publication: row.publication.clone(),
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

fn table(config: &Config, report: &Report, silence: Option<String>, out: Out) {
    let line = |name: &str, value: String| out.line(&format!("{name:<14} {value}"));
    line("relay", report.name.clone());
    match &report.relay {
        Some(relay) => {
            let seconds = relay["state_seconds"].as_f64().unwrap_or_default();
            line("state", format!("{} for {seconds:.0} s", text(&relay["state"])));
            line("in flight", text(&relay["in_flight"]));
            line("window", format!("{} events", text(&relay["window_events"])));
            line("sessions", text(&relay["sessions"]));
            if let Some(error) = relay["last_error"]["error"].as_str() {
                line("last error", error.to_owned());
            }
            if let Some(ms) = relay["circuit"]["next_try_ms"].as_u64() {
                let tries = text(&relay["circuit"]["tries"]);
                line("next try", format!("in {ms} ms, after {tries} failed tries"));
            }
            if let Some(pid) = relay["standing_by"]["slot_holder"]["pid"].as_i64() {
                let client = relay["standing_by"]["slot_holder"]["client"].as_str();
                let client = client.unwrap_or("a local client");
                line("waits for", format!("the slot, in use by pid {pid}, {client}"));
            }
            for route in relay["routes"].as_array().into_iter().flatten() {
                let grade = text(&route["grade"]).to_uppercase().replace('_', " ");
                let (name, reason) = (text(&route["name"]), text(&route["reason"]));
                line("route", format!("{name} is {grade} ({reason})"));
            }
            for held in relay["held"].as_array().into_iter().flatten() {
                line("held", format!("route {}: {}", text(&held["route"]), text(&held["reason"])));
            }
            if relay["parked"]["rows"].as_u64().is_some_and(|rows| rows > 0) {
                let parked = &relay["parked"];
                let (rows, keys) = (text(&parked["rows"]), text(&parked["keys"]));
                line("parked", format!("{rows} rows of {keys} keys; see `watership parked list`"));
            }
            for blocked in relay["parked"]["blocked"].as_array().into_iter().flatten() {
                line("blocked", format!("route {}: {}", text(&blocked[0]), text(&blocked[1])));
            }
        }
        None => match silence {
            Some(why) => line("state", format!("not running: {why}")),
            None => line("state", "unknown: admin.listen is empty".into()),
        },
    }
    match &report.checkpoint {
        Some(row) => {
            line("checkpoint", row.position.clone());
            line("flush LSN", row.flush_lsn.clone());
            line("session no", row.session_no.to_string());
        }
        None => line("checkpoint", "none; run `watership init`".into()),
    }
    let Some(slot) = &report.slot else {
        return line("slot", format!("{} does not exist", config.relay.slot));
    };
    let reader = slot.active_pid.map_or("not in use".into(), |pid| format!("in use by pid {pid}"));
    line("slot", format!("{}, {reader}", slot.name));
    line("wal status", slot.wal_status.unwrap_or("none").to_owned());
    line("lag", format!("{} bytes", slot.lag_bytes));
    line("retained WAL", format!("{} bytes", slot.retained_bytes));
    if let Some(bytes) = slot.safe_wal_size {
        line("safe WAL size", format!("{bytes} bytes"));
    }
}

fn text(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
