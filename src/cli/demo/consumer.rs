//! The demo's consumer: an ordinary lapin consumer that reconnects when the broker went away.
//!
//! It acknowledges each message and records its arrival. What it sees twice is a duplicate; a
//! real consumer would drop that by the message id.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::{Connection, ConnectionProperties};
use tokio::sync::watch;
use uuid::Uuid;

use super::{QUEUE, Run, shop};

/// Messages that the broker may have on the way to us.
const PREFETCH: u16 = 500;
/// How long connecting may take; lapin itself may wait for ever.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts to connect. The demo as a whole ends when nothing arrives for long.
const RETRY: Duration = Duration::from_millis(100);

/// Consumes for ever; `consuming` says whether a consumer is set up at this moment.
pub(super) async fn consume(run: &Run, url: &str, consuming: &watch::Sender<bool>) {
    loop {
        // The queue appears once the relay has declared it; a broker that restarts comes back.
        // Which of the two it is does not matter: try again.
        let _ = session(run, url, consuming).await;
        consuming.send_replace(false);
        tokio::time::sleep(RETRY).await;
    }
}

async fn session(
    run: &Run,
    url: &str,
    consuming: &watch::Sender<bool>,
) -> Result<(), lapin::Error> {
    let connect = Connection::connect(url, ConnectionProperties::default());
    let Ok(connection) = tokio::time::timeout(CONNECT_LIMIT, connect).await else {
        return Ok(());
    };
    let connection = connection?;
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let consume = channel.basic_consume(QUEUE.into(), "".into(), options, Default::default());
    let mut deliveries = consume.await?;
    consuming.send_replace(true);
    while let Some(delivery) = deliveries.next().await {
        let delivery = delivery?;
        record(run, &delivery);
        delivery.ack(BasicAckOptions::default()).await?;
    }
    Ok(())
}

fn record(run: &Run, delivery: &Delivery) {
    let at = run.elapsed();
    let id = delivery.properties.message_id().as_ref().map(|id| Uuid::parse_str(id.as_str()));
    let mut ledger = run.ledger();
    match (id, shop::mark_of(&delivery.data)) {
        (Some(Ok(id)), Some(mark)) => ledger.arrived(id, mark, at, delivery.redelivered),
        (None | Some(Err(_)), _) | (_, None) => ledger.unreadable(),
    }
}
