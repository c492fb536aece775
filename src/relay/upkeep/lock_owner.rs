//! While the relay is on standby: whose connection holds the lock queue, by the management API.
//!
//! A relay of the same name for another database looks like the active one, and so does a dead
//! connection that the broker has not noticed yet.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::amqp::management::Management;
use crate::relay::Options;
use crate::relay::status::Status;

/// How often one looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Runs until it is aborted; at once where there is no management API.
pub async fn run(options: Options, status: Arc<Status>) {
    let Some(url) = &options.audit.management_url else { return };
    let Ok(management) = Management::new(url, &options.broker) else { return };
    loop {
        if status.is_standing_by() {
            match management.owner(&options.lock_queue()).await {
                Ok(owner) => status.lock_owner(owner),
                Err(error) => tracing::debug!(error = %error, "the lock's owner is not known"),
            }
        }
        sleep(LOOK_EVERY).await;
    }
}
