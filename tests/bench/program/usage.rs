//! What a process has used, from `/proc`: CPU seconds and memory.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use tokio::task::JoinHandle;
use watership::error::{Error, Result};

/// Clock ticks per second in `/proc/PID/stat`: USER_HZ, 100 on every Linux that we run on.
const TICKS_PER_SECOND: f64 = 100.0;
/// How often a process that may end at any moment is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(10);

/// User and system CPU seconds of one process so far; `None` when it is gone.
pub fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets and may hold blanks; utime and stime are the 14th
    // and 15th.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / TICKS_PER_SECOND)
}

/// CPU seconds of a process and everything below it.
pub fn tree_cpu_seconds(root: u32) -> f64 {
    let mut pids = HashSet::from([root]);
    let all = processes();
    loop {
        let known = pids.len();
        pids.extend(
            all.iter()
                .filter(|(_, parent)| pids.contains(parent))
                .map(|(pid, _)| *pid)
                .collect::<Vec<_>>(),
        );
        if pids.len() == known {
            break;
        }
    }
    pids.into_iter().filter_map(cpu_seconds).sum()
}

fn processes() -> Vec<(u32, u32)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some((pid, parent))
    })
    .collect()
}

/// The largest resident size that the process has had, in bytes.
pub fn peak_rss_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path)
        .map_err(|e| Error::unreachable(format!("reading {path}")).caused_by(e))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let kilobytes = kilobytes.ok_or_else(|| Error::protocol(format!("no VmHWM in {path}")))?;
    Ok(kilobytes * 1024)
}

/// Follows the CPU seconds of a process that ends by itself.
pub struct Watch {
    task: JoinHandle<f64>,
}

impl Watch {
    pub fn start(pid: u32) -> Self {
        let task = tokio::spawn(async move {
            let mut last = 0.0;
            while let Some(now) = cpu_seconds(pid) {
                last = now;
                tokio::time::sleep(WATCH_INTERVAL).await;
            }
            last
        });
        Self { task }
    }

    /// The last figure seen. Waits for the end of the process.
    pub async fn finish(self) -> f64 {
        self.task.await.unwrap_or(0.0)
    }
}
