//! While the relay is on standby: whose connection holds the lock queue, by the management API.
//!
//! A relay of the same name for another database looks like the active one, and so does a dead
//! connection that the broker has not noticed yet.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::error::Result;
use crate::relay::Options;
use crate::relay::status::Status;

/// How often one looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Runs until it is aborted. Does nothing if no management API is configured.
pub async fn run(options: Options, status: Arc<Status>) {
    loop {
        if status.is_standing_by() {
            match look(&options).await {
                Ok(owner) => status.lock_owner(owner),
                Err(error) => tracing::debug!(error = %error, "the lock's owner is not known"),
            }
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Made again each time, because the password may have changed in its file.
async fn look(options: &Options) -> Result<Option<String>> {
    match options.audit.management(&options.broker)? {
        Some(management) => management.owner(&options.lock_queue()).await,
        None => Ok(None),
    }
}
