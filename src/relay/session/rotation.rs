//! Files with credentials or certificates that change while a relay waits to try again: what was
//! refused may be right now, so the wait ends at once.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::time::sleep;

use crate::relay::Options;

/// How often the files are looked at.
const INTERVAL: Duration = Duration::from_millis(500);

/// The files that a connection is opened with, and how they last looked.
pub(super) struct Rotation {
    files: Vec<PathBuf>,
    seen: Vec<Option<Look>>,
}

/// Enough to tell two versions of a file apart; a link that leads elsewhere looks different too.
type Look = (SystemTime, u64, u64);

impl Rotation {
    pub(super) fn new(options: &Options) -> Self {
        let (sql, broker) = (&options.sql, &options.broker);
        let credentials = [sql.again.files(), broker.urls_again.files()].into_iter().flatten();
        let tls = sql.tls.files().chain(broker.tls.files()).map(Path::to_owned);
        Self::of(credentials.cloned().chain(tls).collect())
    }

    fn of(files: Vec<PathBuf>) -> Self {
        let seen = look(&files);
        Self { files, seen }
    }

    /// Takes the files as they are now for known.
    pub(super) fn look(&mut self) {
        self.seen = look(&self.files);
    }

    /// Waits until one of the files has changed since it was last looked at.
    pub(super) async fn changed(&self) {
        loop {
            sleep(INTERVAL).await;
            if look(&self.files) != self.seen {
                return;
            }
        }
    }
}

fn look(files: &[PathBuf]) -> Vec<Option<Look>> {
    files.iter().map(|file| look_at(file)).collect()
}

#[cfg(unix)]
fn look_at(file: &Path) -> Option<Look> {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(file).ok()?;
    Some((found.modified().ok()?, found.len(), found.ino()))
}

#[cfg(not(unix))]
fn look_at(file: &Path) -> Option<Look> {
    let found = std::fs::metadata(file).ok()?;
    Some((found.modified().ok()?, found.len(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_written_replaced_or_removed_ends_the_wait() {
        let directory = std::env::temp_dir();
        let file = directory.join(format!("watership-rotation-{}", std::process::id()));
        let other = file.with_extension("new");
        let mut rotation = Rotation::of(vec![file.clone(), directory.join("watership-none")]);
        let long = INTERVAL * 10;
        assert!(tokio::time::timeout(long, rotation.changed()).await.is_err(), "nothing changed");
        for text in [Some("first"), Some("second, longer"), None] {
            match text {
                Some(text) => {
                    std::fs::write(&other, text).unwrap();
                    std::fs::rename(&other, &file).unwrap();
                }
                None => std::fs::remove_file(&file).unwrap(),
            }
            assert!(tokio::time::timeout(long, rotation.changed()).await.is_ok());
            rotation.look();
            assert!(tokio::time::timeout(long, rotation.changed()).await.is_err());
        }
    }
}
