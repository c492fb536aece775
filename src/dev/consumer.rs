//! The consumer of the demo and of the fault tests: an ordinary lapin consumer that reconnects when
//! the broker went away.
//!
//! It hands each message to `record` and acknowledges it. What it sees twice is a duplicate; a
//! real consumer would drop that by the message id.
//!
//! A quorum queue that comes back from a broker's stop or crash still counts the consumer that it
//! had, and returns what that one held unacknowledged a moment later. Who subscribes before that
//! gets newer messages first (seen with RabbitMQ 3.10). So this consumer waits for the old one to
//! be gone: the order that it sees is the order that was published.

use std::ops::ControlFlow;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::{Connection, ConnectionProperties};
use tokio::sync::watch;

/// Messages that the broker may have on the way to us.
const PREFETCH: u16 = 500;
/// How long connecting may take; lapin itself has no limit.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts to consume. A caller gives up when no message comes for long.
const RETRY: Duration = Duration::from_millis(50);

/// Consumes until `record` breaks off; `consuming` says whether a consumer is set up at this
/// moment.
pub async fn consume(
    url: &str,
    queue: &str,
    consuming: &watch::Sender<bool>,
    mut record: impl FnMut(&Delivery) -> ControlFlow<()>,
) {
    loop {
        // The queue appears once the relay has declared it; a broker that restarts comes back.
        // Which of the two it is does not matter: try again.
        let ended = session(url, queue, consuming, &mut record).await;
        consuming.send_replace(false);
        if matches!(ended, Ok(ControlFlow::Break(()))) {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn session(
    url: &str,
    queue: &str,
    consuming: &watch::Sender<bool>,
    record: &mut impl FnMut(&Delivery) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, lapin::Error> {
    let connect = Connection::connect(url, ConnectionProperties::default());
    let Ok(connection) = tokio::time::timeout(CONNECT_LIMIT, connect).await else {
        return Ok(ControlFlow::Continue(()));
    };
    let connection = connection?;
    let channel = connection.create_channel().await?;
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    while channel.queue_declare(queue.into(), passive, Default::default()).await?.consumer_count()
        > 0
    {
        tokio::time::sleep(RETRY).await;
    }
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let consume = channel.basic_consume(queue.into(), "".into(), options, Default::default());
    let mut deliveries = consume.await?.ready_chunks(PREFETCH.into());
    consuming.send_replace(true);
    while let Some(chunk) = deliveries.next().await {
        let chunk = chunk.into_iter().collect::<Result<Vec<_>, _>>()?;
        let flow = chunk.iter().try_for_each(&mut *record);
        if let Some(last) = chunk.last() {
            last.ack(BasicAckOptions { multiple: true }).await?;
        }
        if flow.is_break() {
            return Ok(flow);
        }
    }
    Ok(ControlFlow::Continue(()))
}
